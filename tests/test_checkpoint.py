"""Checkpoints: bit-exact, reproducible, every damage noticed, never lost to a full disk or a kill."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmrun import checkpoint
from fmrun.checkpoint import (
    CorruptCheckpoint,
    newest,
    read,
    read_meta,
    rotate,
    save,
    steps,
)
from fmrun.errors import SaveError, UserError
from fmrun.runs import clean

META = {"config": {"seed": 0, "name": "naïve [x]"}, "z": [1, None, 2.5]}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [t.detach().contiguous().reshape(-1).view(torch.uint8).tolist() if t.numel() else [] for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and raw[0] == raw[1]


def tensors() -> dict[str, torch.Tensor]:
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    return {
        "float": base,
        "shared": base[1:],
        "turned": base.t(),
        "spread": torch.ones(1).expand(5),
        "scalar": torch.tensor(7.5),
        "empty": torch.empty(0, 3),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "long": torch.tensor([2**62, -1]),
        "byte": torch.arange(5, dtype=torch.uint8),
        "double": torch.tensor([0.1], dtype=torch.float64, requires_grad=True),
    }


def test_round_trip_is_exact_to_the_bit(tmp_path: Path) -> None:
    path = save(tmp_path / "checkpoints", 12, tensors(), META)
    assert path.name == "step-00000012.safetensors"
    loaded = read(path)
    assert loaded.step == 12
    assert loaded.meta == {**META, "step": 12} == read_meta(path)
    assert loaded.tensors.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert same(loaded.tensors[name], tensor), name
    loaded.tensors["float"].add_(1)


def test_same_state_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    a = save(tmp_path / "a", 1, tensors(), META).read_bytes()
    b = save(tmp_path / "b", 1, dict(reversed(tensors().items())), dict(reversed(META.items()))).read_bytes()
    assert a == b


def test_file_mode_follows_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1, {}, {})
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_other_readers_see_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert same(load_file(save(tmp_path, 1, tensors(), META))["half"], tensors()["half"])


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, 3, tensors(), META)
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(header), *range(header, len(data), 7), len(data) - 1]
    for place in places:
        for flip in (1, 0x20, 0x80):
            path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            with pytest.raises(CorruptCheckpoint):
                read(path)
    path.write_bytes(data)
    assert read(path).step == 3


@pytest.mark.parametrize("damage", ["empty", "short", "one byte less", "one byte more", "pickle", "foreign", "folder"])
def test_any_other_damage_is_noticed_in_one_sentence(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, 3, tensors(), META)
    data = path.read_bytes()
    if damage == "pickle":
        torch.save({"a": torch.zeros(2)}, path)
    elif damage == "foreign":
        from safetensors.torch import save_file

        save_file({"a": torch.zeros(2)}, path)
    elif damage == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(
            {"empty": b"", "short": data[:5], "one byte less": data[:-1], "one byte more": data + b"\0"}[damage]
        )
    with pytest.raises(CorruptCheckpoint, match=path.name) as caught:
        read(path)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, UserError)


def test_metadata_of_rubbish_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"\xff" * 20, b"\x02" + b"\0" * 7 + b"{}", b"PK\x03\x04" * 9):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(CorruptCheckpoint):
            read_meta(tmp_path / "x")
    with pytest.raises(CorruptCheckpoint, match="there is no checkpoint"):
        read_meta(tmp_path / "y")


def test_newest_falls_back_past_damage(tmp_path: Path) -> None:
    assert newest(tmp_path / "missing") == (None, [])
    for step in (5, 10, 15):
        save(tmp_path, step, {"a": torch.tensor(step)}, {})
    for step in (10, 15):
        path = checkpoint.path_of(tmp_path, step)
        path.write_bytes(path.read_bytes()[:-1])
    good, skipped = newest(tmp_path)
    assert good is not None
    assert good.step == 5
    assert [str(s) in text for s, text in zip((15, 10), skipped, strict=True)] == [True, True]
    assert steps(tmp_path) == [5, 10, 15]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5, {"a": torch.tensor(1)}, {})
    save(tmp_path, 5, {"a": torch.tensor(2)}, {})
    assert read(checkpoint.path_of(tmp_path, 5)).tensors["a"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005.safetensors"]


def test_rotation_keeps_last_every_and_named(tmp_path: Path) -> None:
    for step in range(10, 101, 10):
        save(tmp_path, step, {}, {})
    rotate(tmp_path, keep_last=2, keep_every=40, keep={30})
    assert steps(tmp_path) == [30, 40, 80, 90, 100]
    rotate(tmp_path, keep_last=1, keep_every=0, keep=set())
    assert steps(tmp_path) == [100]


def test_damaged_file_costs_no_good_one(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, {"a": torch.zeros(3)}, {})
    for step in (4, 5):
        checkpoint.path_of(tmp_path, step).write_bytes(b"")
    rotate(tmp_path, keep_last=2, keep_every=0, keep=set())
    assert steps(tmp_path) == [2, 3, 4, 5]
    rotate(tmp_path, keep_last=0, keep_every=0, keep=set())
    assert steps(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize(
    ("number", "fix"), [(errno.ENOSPC, "free"), (errno.EACCES, "writable"), (errno.EIO, "check the disk")]
)
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_refused_write_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, fix: str, call: str
) -> None:
    folder = tmp_path / "myrun" / "checkpoints"
    save(folder, 5, {"a": torch.tensor(1)}, {})

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(SaveError) as caught:
            save(folder, 10, {"a": torch.tensor(2)}, {})
    message = str(caught.value)
    for part in ("step 10", os.strerror(number), "step 5", fix, "fmrun resume myrun"):
        assert part in message
    assert [p.name for p in folder.iterdir()] == ["step-00000005.safetensors"]
    assert read(checkpoint.path_of(folder, 5)).tensors["a"] == 1


def test_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        folder = disk / "run" / "checkpoints"
        save(folder, 1, {"a": torch.zeros(100_000)}, {})
        with pytest.raises(SaveError, match=r"step 2 .*No space left.* step 1; free 1 MB"):
            save(folder, 2, {"a": torch.zeros(250_000)}, {})
        assert [p.name for p in folder.iterdir()] == ["step-00000001.safetensors"]
        assert newest(folder)[0] is not None
        save(folder, 3, {"a": torch.zeros(100_000)}, {})
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="there is no earlier one"):
        save(tmp_path / "file" / "checkpoints", 1, {}, {})


def test_what_a_kill_leaves_is_cleaned_and_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, torch; from pathlib import Path; from fmrun import checkpoint\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "checkpoint.save(Path(sys.argv[1]), 9, {'a': torch.zeros(9)}, {})"
    )
    save(tmp_path, 8, {}, {})
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    assert steps(tmp_path) == [8]
    being_written = tmp_path / f".step-00000010.safetensors.{os.getpid()}.tmp"
    being_written.touch()
    clean(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [being_written.name, "step-00000008.safetensors"]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
some_tensor = st.builds(
    lambda dtype, shape, turned: (torch.randn(shape) * 3).to(dtype).permute([*range(len(shape))][::turned]),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([1, -1]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__"), some_tensor, max_size=4
    )
)
def test_tensors_of_any_kind_survive_the_file(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    loaded = read(save(tmp_path, 1, state, {}))
    assert loaded.tensors.keys() == state.keys()
    assert all(same(loaded.tensors[name], tensor) for name, tensor in state.items())


def test_machine_and_its_differences() -> None:
    facts = checkpoint.machine("cpu", ranks=2)
    assert json.loads(json.dumps(facts)) == facts
    assert checkpoint.differences(facts, facts) == []
    other = {**facts, "threads": facts["threads"] + 1, "ranks": 1}
    assert checkpoint.differences(facts, other) == [
        "number of processes: 2 then, 1 now",
        f"number of threads: {facts['threads']} then, {facts['threads'] + 1} now",
    ]
