"""xxh3-128 digests of tensors and files."""

from __future__ import annotations

from typing import Protocol

from weightflip.delta.bits import Bytes
from weightflip.delta.errors import extra
from weightflip.delta.mapped import MappedTensor

NBYTES = 16
_PART = 1 << 24


class Digest(Protocol):
    """Interface of an incremental digest."""

    def update(self, data: Bytes | bytes, /) -> None: ...

    def digest(self) -> bytes: ...


def new_digest() -> Digest:
    """Create an empty digest."""
    digest: Digest = extra("xxhash", "a delta").xxh3_128()
    return digest


def digest_of(tensor: MappedTensor) -> bytes:
    """The digest of a tensor's bytes."""
    digest = new_digest()
    for begin, end in tensor.spans(_PART // tensor.stored.unit):
        digest.update(tensor.read(begin, end))
        tensor.release(begin, end)
    return digest.digest()
