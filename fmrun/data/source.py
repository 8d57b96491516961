"""One split of a data set: N images, all of one shape, read by index."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch


def files_identity(pairs: int, files: Sequence[tuple[str, int]]) -> dict[str, int | str]:
    """`identity` of so many images or pairs that are files, of which there are names and sizes in bytes."""
    names, sizes = (hashlib.sha256() for _ in range(2))
    for name, size in files:
        names.update(f"{name}\0".encode(errors="surrogateescape"))
        sizes.update(f"{size}\0".encode())
    return {"number": pairs, "names": names.hexdigest(), "sizes": sizes.hexdigest()}


def unlike(then: dict[str, Any] | None, now: dict[str, Any] | None) -> str | None:
    """How images differ from those there were, by their identities: the second half of a sentence; None if they do not."""
    if then is None or now is None:
        counts = ["none" if one is None else str(one["number"]) for one in (now, then)]
        return None if then is now else " instead of ".join(counts)
    if then["number"] != now["number"]:
        return f"{now['number']} instead of {then['number']}"
    if then.keys() != now.keys():
        return "files instead of arrays" if "names" in now else "arrays instead of files"
    other = [key for key in then if then[key] != now[key]]
    return f"other {' and '.join(other)}" if other else None


class Images:
    """N images, uint8 `(C, S, S)`, with or without labels (int64 `(N,)`)."""

    left_out: tuple[str, ...] = ()
    """Files of the same folder that are not among them, by name."""

    def __init__(
        self,
        name: str,
        channels: int,
        size: int,
        labels: np.ndarray | None = None,
        pixels: torch.Tensor | None = None,
    ) -> None:
        self.name = name
        self.channels = channels
        self.size = size
        self.labels = labels
        self.pixels = pixels
        """All images decoded, uint8 `(N, C, S, S)` in RAM, or `None` if they are decoded when read."""

    def __len__(self) -> int:
        raise NotImplementedError

    def read(self, indices: Any) -> torch.Tensor:
        """The images at `indices` (any sequence of integers), uint8 `(B, C, S, S)` on the CPU."""
        wanted = np.asarray(indices, dtype=np.int64)
        if self.pixels is not None:
            return self.pixels.index_select(0, torch.from_numpy(wanted))
        return self._decode(wanted)

    def _decode(self, wanted: np.ndarray) -> torch.Tensor:
        raise NotImplementedError

    def take(self, indices: np.ndarray) -> "Images":
        """The split made of these images, in this order."""
        raise NotImplementedError

    @property
    def fingerprint(self) -> str:
        """A sha256 that changes when the data do."""
        raise NotImplementedError

    @property
    def identity(self) -> dict[str, int | str]:
        """What copying the images to another place does not change: their `number`, and digests of what they are."""
        return {"number": len(self), "contents": self.fingerprint}

    @property
    def nbytes(self) -> int:
        """Size of all images decoded."""
        return len(self) * self.channels * self.size * self.size


class ArrayImages(Images):
    """Images that came as an array."""

    def __init__(self, name: str, pixels: torch.Tensor, labels: np.ndarray | None = None) -> None:
        assert pixels.dtype == torch.uint8, pixels.dtype
        assert pixels.ndim == 4, pixels.shape
        assert pixels.shape[2] == pixels.shape[3], pixels.shape
        super().__init__(name, pixels.shape[1], pixels.shape[2], labels, pixels.contiguous())

    def __len__(self) -> int:
        assert self.pixels is not None
        return len(self.pixels)

    def take(self, indices: np.ndarray) -> "ArrayImages":
        labels = None if self.labels is None else self.labels[indices]
        return ArrayImages(self.name, self.read(indices), labels)

    @cached_property
    def fingerprint(self) -> str:
        """Of shape and pixels."""
        assert self.pixels is not None
        digest = hashlib.sha256(repr(tuple(self.pixels.shape)).encode())
        digest.update(self.pixels.numpy().data)
        return digest.hexdigest()
