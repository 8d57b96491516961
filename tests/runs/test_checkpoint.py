"""Checkpoints: bit-exact, reproducible, every damage noticed, never lost to a full disk or a kill."""

import errno
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fmrun.runs import checkpoint
from fmrun.runs.checkpoint import (
    Best,
    CorruptCheckpoint,
    ImagesIdentity,
    Meta,
    newest,
    read,
    read_meta,
    rotate,
    save,
    steps,
)
from fmrun.runtime.errors import SaveError, UserError
from fmrun.runtime.files import clean


def meta(step: int, **changes: Any) -> Meta:
    known: dict[str, Any] = {
        "config": {"seed": 0, "name": "naïve [x]", "z": [1, None, 2.5]},
        "data": "a" * 8,
        "held_out": None,
        "images": ImagesIdentity({"number": 3, "contents": "a"}, None),
        "machine": {"ranks": 1},
        "window": {},
        "best": Best("eval/kid", 0.5, step),
    }
    return Meta(step=step, **known | changes)


WEIGHT = torch.arange(6.0).reshape(2, 3)
NETS = {f"{net}.weight": WEIGHT for net in ("generator", "ema", "discriminator")} | {
    "optimiser.generator.weight/exp_avg": WEIGHT,
    "optimiser.generator.weight/step": torch.tensor(3.0),
    "guard.bad": torch.tensor([-1, -1]),
}


def whole(tensors: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """All parts of a checkpoint, with these tensors among the state of feature matching."""
    return {**NETS, **{f"matching.discriminator.{name}": tensor for name, tensor in (tensors or {}).items()}}


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
    path = save(tmp_path / "checkpoints", whole(tensors()), meta(12))
    assert path.name == "step-00000012.safetensors"
    loaded = read(path)
    assert loaded.step == 12
    assert loaded.meta == meta(12) == read_meta(path)
    found = loaded.part("matching.discriminator")
    assert found.keys() == tensors().keys()
    for name, tensor in tensors().items():
        assert same(found[name], tensor), name
    found["float"].add_(1)


def test_same_state_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    config = meta(1).config
    a = save(tmp_path / "a", whole(tensors()), meta(1)).read_bytes()
    turned = meta(1, config=dict(reversed(config.items())))
    b = save(tmp_path / "b", dict(reversed(whole(tensors()).items())), turned).read_bytes()
    assert a == b


def test_file_mode_follows_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, whole(), meta(1))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_other_readers_see_plain_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    assert same(load_file(save(tmp_path, whole(tensors()), meta(1)))["matching.discriminator.half"], tensors()["half"])


def test_any_changed_byte_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path, whole(tensors()), meta(3))
    data = path.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    places = [*range(header), *range(header, len(data), 7), len(data) - 1]
    for place in places:
        for flip in (1, 0x80) if place < 8 else (1,) if place % 2 else (0x80,):
            path.write_bytes(data[:place] + bytes([data[place] ^ flip]) + data[place + 1 :])
            with pytest.raises(CorruptCheckpoint):
                read(path)
    path.write_bytes(data)
    assert read(path).step == 3


@pytest.mark.parametrize("damage", ["empty", "short", "one byte less", "one byte more", "pickle", "foreign", "folder"])
def test_any_other_damage_is_noticed_in_one_sentence(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, whole(tensors()), meta(3))
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
    with pytest.raises(UserError, match=r"cannot read .*y: No such file"):
        read_meta(tmp_path / "y")


@pytest.mark.parametrize(
    ("changes", "window", "problem"),
    [
        ({"ema.weight": None}, {}, "it has no ema"),
        ({"other.weight": WEIGHT}, {}, "there is no part 'other'"),
        ({"ema.weight": WEIGHT[:1]}, {}, "the averaged generator is not of the generator's shape"),
        ({"optimiser.generator.weight/exp_avg": WEIGHT.T}, {}, "the optimiser's weight/exp_avg does not fit"),
        ({"optimiser.discriminator.bias/exp_avg": WEIGHT}, {}, "the optimiser's bias/exp_avg does not fit"),
        ({"generator.weight": WEIGHT / 0, "ema.weight": WEIGHT}, {}, "generator.weight is not finite"),
        ({}, {"loss/d": 2}, "the log's sums and their counts differ"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, changes: dict[str, torch.Tensor | None], window: dict[str, int], problem: str
) -> None:
    held = {name: tensor for name, tensor in {**whole(), **changes}.items() if tensor is not None}
    with pytest.raises(CorruptCheckpoint, match=problem):
        read(save(tmp_path, held, meta(1, window=window)))


def test_the_step_is_that_of_the_name(tmp_path: Path) -> None:
    path = save(tmp_path, whole(), meta(3))
    with pytest.raises(CorruptCheckpoint, match="it is of step 3"):
        read(path.rename(tmp_path / "step-00000004.safetensors"))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"step": "3"}, "step: "),
        ({"step": -1}, "step: "),
        ({"config": []}, "config: "),
        ({"data": None}, "data: "),
        ({"window": {"loss/d": 0}}, "window.loss/d: "),
        ({"best": {"metric": "eval/kid"}}, "best.value: "),
        ({"format": 2}, "another version"),
        ({"format": None}, "version 0.1.0"),
    ],
)
def test_metadata_of_another_kind_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], problem: str
) -> None:
    """A file whose hash is right, from another program or an older version."""
    content = {key: value for key, value in {**asdict(meta(3)), **changes}.items() if (key, value) != ("format", None)}
    monkeypatch.setattr(checkpoint, "asdict", lambda _: content)
    path = save(tmp_path, whole(), meta(3))
    for reader in (read, read_meta):
        with pytest.raises(CorruptCheckpoint, match=problem):
            reader(path)


def test_newest_falls_back_past_damage(tmp_path: Path) -> None:
    assert newest(tmp_path / "missing") == (None, [])
    for step in (5, 10, 15):
        save(tmp_path, whole({"a": torch.tensor(step)}), meta(step))
    for step in (10, 15):
        path = checkpoint.path_of(tmp_path, step)
        path.write_bytes(path.read_bytes()[:-1])
    good, skipped = newest(tmp_path)
    assert good is not None
    assert good.step == 5
    assert [str(s) in text for s, text in zip((15, 10), skipped, strict=True)] == [True, True]
    assert steps(tmp_path) == [5, 10, 15]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, whole({"a": torch.tensor(1)}), meta(5))
    save(tmp_path, whole({"a": torch.tensor(2)}), meta(5))
    assert read(checkpoint.path_of(tmp_path, 5)).tensors["matching.discriminator.a"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000005.safetensors"]


def test_rotation_keeps_last_every_and_named(tmp_path: Path) -> None:
    for step in range(10, 101, 10):
        save(tmp_path, whole(), meta(step))
    rotate(tmp_path, keep_last=2, keep_every=40, keep={30})
    assert steps(tmp_path) == [30, 40, 80, 90, 100]
    rotate(tmp_path, keep_last=1, keep_every=0, keep=set())
    assert steps(tmp_path) == [100]


def test_damaged_file_costs_no_good_one(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, whole({"a": torch.zeros(3)}), meta(step))
    for step in (4, 5):
        checkpoint.path_of(tmp_path, step).write_bytes(b"")
    rotate(tmp_path, keep_last=2, keep_every=0, keep=set())
    assert steps(tmp_path) == [2, 3, 4, 5]
    rotate(tmp_path, keep_last=0, keep_every=0, keep=set())
    assert steps(tmp_path) == [3, 4, 5]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_refused_write_leaves_everything_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    folder = tmp_path / "myrun" / "checkpoints"
    save(folder, whole({"a": torch.tensor(1)}), meta(5))

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, refuse)
        with pytest.raises(SaveError) as caught:
            save(folder, whole({"a": torch.tensor(2)}), meta(10))
    message = str(caught.value)
    for part in ("step 10", "Input/output error", "free and the folder writable", "fmrun resume myrun"):
        assert part in message
    assert [p.name for p in folder.iterdir()] == ["step-00000005.safetensors"]
    assert read(checkpoint.path_of(folder, 5)).tensors["matching.discriminator.a"] == 1


def test_full_disk(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if sys.platform != "linux" or os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a small file system")
    try:
        folder = disk / "run" / "checkpoints"
        save(folder, whole({"a": torch.zeros(100_000)}), meta(1))
        with pytest.raises(SaveError, match=r"step 2 .*No space left.* have 1 MB free"):
            save(folder, whole({"a": torch.zeros(250_000)}), meta(2))
        assert [p.name for p in folder.iterdir()] == ["step-00000001.safetensors"]
        assert newest(folder)[0] is not None
        save(folder, whole({"a": torch.zeros(100_000)}), meta(3))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot save the checkpoint of step 1"):
        save(tmp_path / "file" / "checkpoints", whole(), meta(1))


def test_what_a_kill_leaves_is_cleaned_and_never_taken_for_a_checkpoint(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys, torch; from pathlib import Path; from fmrun.runs import checkpoint\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "images = checkpoint.ImagesIdentity({}, None)\n"
        "meta = checkpoint.Meta(9, {}, '', None, images, {}, {})\n"
        "checkpoint.save(Path(sys.argv[1]), {'a': torch.zeros(9)}, meta)"
    )
    save(tmp_path, whole(), meta(8))
    assert subprocess.run([sys.executable, "-c", script, str(tmp_path)]).returncode == -9
    assert len(list(tmp_path.iterdir())) == 2
    assert steps(tmp_path) == [8]
    clean(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000008.safetensors"]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
some_tensor = st.builds(
    lambda dtype, shape, turned: (torch.randn(shape) * 3).to(dtype).permute([*range(len(shape))][::turned]),
    st.sampled_from(DTYPES),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from([1, -1]),
)


@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=6).filter(lambda name: name != "__metadata__"), some_tensor, max_size=4
    )
)
def test_tensors_of_any_kind_survive_the_file(tmp_path: Path, state: dict[str, torch.Tensor]) -> None:
    loaded = read(save(tmp_path, whole(state), meta(1))).part("matching.discriminator")
    assert loaded.keys() == state.keys()
    assert all(same(loaded[name], tensor) for name, tensor in state.items())


def test_machine_and_its_differences() -> None:
    facts = checkpoint.machine("cpu", ranks=2)
    assert json.loads(json.dumps(facts)) == facts
    assert checkpoint.machine_differences(facts, facts) == []
    other = {**facts, "threads": facts["threads"] + 1, "ranks": 1}
    assert checkpoint.machine_differences(facts, other) == [
        "ranks: 2 then, 1 now",
        f"threads: {facts['threads']} then, {facts['threads'] + 1} now",
    ]
