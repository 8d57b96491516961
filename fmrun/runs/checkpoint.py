"""Checkpoints, format 1: one safetensors file each, no pickle, atomic, hashed, rotated.

Tensors are named by the part they belong to:

    generator.*  ema.*               weights and buffers of the generator and of its moving average
    discriminator.*                  of the discriminator
    matching.discriminator.*         balance and running means of its feature matching
    optimiser.NET.PARAMETER/KEY      Adam's moments and step counts of a net
    guard.*  window.*                what the guard saw; sums of the log since the last read-out

The metadata (`Meta`) is one JSON string under one key, so that saving the same state twice gives the same bytes. It
holds the sha256 of the whole file, computed with the hash itself blanked out: any changed byte shows.
"""

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import safetensors.torch
import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor

from ..runtime.environment import cpu_model
from ..runtime.errors import SaveError, UserError, reading
from ..runtime.files import Json, make_folder, write_atomic

KEY = "fmrun"
BLANK = b"0" * 64
BEFORE_HASH = rb'"fmrun":"{\"hash\":\"'
NAME = re.compile(r"step-(\d{8,})\.safetensors")


class CorruptCheckpoint(UserError):
    """A checkpoint that cannot be read, or is not what was written."""


FORMAT: Literal[1] = 1
"""Of what is written. Files of another format are refused."""


@dataclass(frozen=True)
class Best:
    metric: str
    value: float
    step: int


@dataclass(frozen=True)
class ImagesIdentity:
    """What the images of a run are, wherever they lie: see `Images.identity`."""

    train: dict[str, int | str]
    held_out: dict[str, int | str] | None


@dataclass(frozen=True)
class Meta:
    """What a checkpoint holds besides tensors."""

    step: Annotated[int, Field(ge=0)]
    config: Json
    """As the run's `config.json` has it."""
    data: str
    """Fingerprint of the training images; `held_out`: of those held out."""
    held_out: str | None
    images: ImagesIdentity
    machine: Json
    """See `machine`."""
    window: dict[str, Annotated[int, Field(ge=1)]]
    """Steps in each of the log's sums."""
    best: Best | None = None
    format: Literal[1] = FORMAT


META = TypeAdapter(Meta)


@dataclass(frozen=True)
class Checkpoint:
    meta: Meta
    tensors: dict[str, Tensor]

    @property
    def step(self) -> int:
        return self.meta.step

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of a part, by their names within it."""
        return {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}


def named(parts: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all parts, as a checkpoint names them."""
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint of this step lies."""
    return folder / f"step-{step:08d}.safetensors"


def steps(folder: Path) -> list[int]:
    """The steps that have a file in `folder`, ascending; whether they can be read is another question."""
    if not folder.is_dir():
        return []
    return sorted(int(m[1]) for m in map(NAME.fullmatch, (p.name for p in folder.iterdir())) if m)


def save(folder: Path, tensors: Mapping[str, Tensor], meta: Meta) -> Path:
    """Write one checkpoint, wholly or not at all; one of the same step is replaced.

    Tensors may lie on any device, be non-contiguous and share storage. Raises SaveError when the disk refuses, and leaves what was there before as it was.
    """
    path = path_of(folder, meta.step)
    data, at, digest = _encode(tensors, meta)
    try:
        make_folder(folder)
        write_atomic(path, data[:at], digest, data[at + len(digest) :])
    except OSError as error:
        raise SaveError(
            f"cannot save the checkpoint of step {meta.step} in {folder}: {error.strerror or error}; have {len(data) / 1e6:.0f} MB "
            f"free and the folder writable, then `fmrun resume {folder.parent.name}`; earlier checkpoints are as they were"
        ) from error
    return path


def read(path: Path) -> Checkpoint:
    """The checkpoint at `path`, every byte of it verified and what it holds validated; raises CorruptCheckpoint."""
    with reading(path):
        data = _verified(path)
        try:
            meta = _meta(data[8 : 8 + _header_size(data)], path)
            loaded = Checkpoint(meta, safetensors.torch.load(data))
        except (safetensors.SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CorruptCheckpoint(f"{path} cannot be read by this version of fmrun: {error}") from error
    if problem := _problem(loaded, path):
        raise CorruptCheckpoint(f"{path} is not as fmrun writes it: {problem}")
    return loaded


def read_meta(path: Path) -> Meta:
    """The metadata alone, from the file's header; tensors are neither loaded nor verified."""
    with reading(path), open(path, "rb") as file:
        size = min(_header_size(file.read(8)), path.stat().st_size)
        try:
            return _meta(file.read(size), path)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpoint(f"{path} is not a checkpoint of fmrun, or its beginning is damaged") from error


def _problem(loaded: Checkpoint, path: Path) -> str | None:
    """What does not fit together in a checkpoint, before any net is built from it."""
    in_name = NAME.fullmatch(path.name)
    if in_name is not None and int(in_name[1]) != loaded.step:
        return f"it is of step {loaded.step}"
    parts = {name.partition(".")[0] for name in loaded.tensors}
    if missing := {"generator", "ema", "discriminator", "guard"} - parts:
        return f"it has no {min(missing)}"
    if unknown := parts - {"generator", "ema", "discriminator", "matching", "optimiser", "guard", "window"}:
        return f"there is no part '{min(unknown)}'"
    if loaded.part("window").keys() != loaded.meta.window.keys():
        return "the log's sums and their counts differ"
    nets = {name: loaded.part(name) for name in ("generator", "ema", "discriminator")}
    if _shapes(nets["ema"]) != _shapes(nets["generator"]):
        return "the averaged generator is not of the generator's shape"
    for net in ("generator", "discriminator"):
        for name, moment in loaded.part(f"optimiser.{net}").items():
            parameter, _, key = name.rpartition("/")
            if parameter not in nets[net] or (key != "step" and moment.shape != nets[net][parameter].shape):
                return f"the optimiser's {name} does not fit the {net}"
    for name, tensor in loaded.tensors.items():
        checked = name.startswith(("generator.", "ema.", "discriminator.", "optimiser."))
        if checked and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return f"{name} is not finite"
    return None


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that can be read, and a sentence for each newer one that cannot."""
    skipped: list[str] = []
    for step in reversed(steps(folder)):
        try:
            return read(path_of(folder, step)), skipped
        except CorruptCheckpoint as error:
            skipped.append(str(error))
    return None, skipped


def rotate(folder: Path, *, keep_last: int, keep_every: int, keep: set[int]) -> None:
    """Delete what is older than the `keep_last` newest good checkpoints (at least one), except multiples of
    `keep_every` (0: none) and the steps in `keep`. A damaged file never counts as one of the newest; it is
    deleted when it is older than they are.
    """
    good = 0
    for step in reversed(steps(folder)):
        if good >= max(keep_last, 1):
            if step not in keep and not (keep_every and step % keep_every == 0):
                try:
                    path_of(folder, step).unlink(missing_ok=True)
                except OSError as error:
                    raise SaveError(f"cannot delete {path_of(folder, step)}: {error.strerror or error}") from error
            continue
        with suppress(CorruptCheckpoint):
            _verified(path_of(folder, step))
            good += 1


def machine(device: torch.device | str = "cpu", ranks: int = 1) -> Json:
    """What it takes for a resumed run to equal an uninterrupted one to the bit; goes into `meta`."""
    device = torch.device(device)
    facts = {
        "torch": torch.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "ranks": ranks,
        "device": device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if device.type == "cuda":
        gpu = torch.cuda.get_device_name(device)
        return facts | {"gpu": gpu, "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    return facts | {"threads": torch.get_num_threads(), "processor": cpu_model()}


def machine_differences(before: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Where `machine` then and now differ, in words: `"threads: 2 then, 1 now"`."""
    facts = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key}: {before.get(key, 'none')} then, {now.get(key, 'none')} now" for key in facts]


def _encode(tensors: Mapping[str, Tensor], meta: Meta) -> tuple[memoryview, int, bytes]:
    """The file with its hash left blank, where the hash goes, and the hash."""
    header = json.dumps({"hash": BLANK.decode(), "meta": asdict(meta)}, sort_keys=True, separators=(",", ":"))
    own = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}
    data = safetensors.torch.save(own, {KEY: header})
    at = data.index(BEFORE_HASH) + len(BEFORE_HASH)
    return memoryview(data), at, _digest(data, at)


def _digest(data: bytes, at: int) -> bytes:
    view = memoryview(data)
    sha = hashlib.sha256(view[:at])
    sha.update(BLANK)
    sha.update(view[at + len(BLANK) :])
    return sha.hexdigest().encode()


def _verified(path: Path) -> bytes:
    """The bytes of the file, after its hash has been checked."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CorruptCheckpoint(f"cannot read {path}: {error.strerror or error}") from error
    at = data.find(BEFORE_HASH, 0, 8 + _header_size(data)) + len(BEFORE_HASH)
    if at < len(BEFORE_HASH):
        raise CorruptCheckpoint(f"{path} is not a checkpoint of fmrun, or its beginning is damaged")
    if data[at : at + len(BLANK)] != _digest(data, at):
        raise CorruptCheckpoint(f"{path} is damaged: its content does not have the hash it was saved with")
    return data


def _header_size(data: bytes) -> int:
    return int.from_bytes(data[:8], "little")


def _meta(header: bytes, path: Path) -> Meta:
    content = json.loads(json.loads(header)["__metadata__"][KEY])["meta"]
    if content.get("format") != FORMAT:
        written = "version 0.1.0" if "format" not in content else "another version"
        raise CorruptCheckpoint(f"{path} was written by fmrun's {written}, whose format is no longer read; train again")
    try:
        return META.validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        problem = error.errors()[0]
        what = ": ".join(filter(None, (".".join(map(str, problem["loc"])), problem["msg"])))
        raise CorruptCheckpoint(f"{path} is not as fmrun writes it: {what}") from None
