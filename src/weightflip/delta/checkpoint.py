"""Checkpoints on disk: their tensors and files."""

from __future__ import annotations

import json
import os
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightflip.delta.bits import OF_TORCH
from weightflip.delta.errors import DeltaError, extra
from weightflip.delta.layout import File, Layout, one_file
from weightflip.delta.mapped import MappedTensor, Mapping
from weightflip.records import printable

_INDEX = ".safetensors.index.json"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An opened checkpoint.

    Attributes:
        path: File or directory of the checkpoint.
        tensors: Tensors by name, in the order of their bytes in the files.
        layout: Files that hold these tensors. For a file of torch.save, one equivalent safetensors file.
    """

    path: Path
    tensors: dict[str, MappedTensor]
    layout: Layout

    def holds(self, path: Path) -> bool:
        """Whether a file belongs to the checkpoint."""
        files = [self.path / file.name for file in self.layout.files] if self.path.is_dir() else [self.path]
        return path.exists() and any(file.exists() and file.samefile(path) for file in files)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Open a checkpoint without reading its tensors.

    Args:
        path: A safetensors file, a directory with an index or with one safetensors file, an index, or a file written by
            torch.save.

    Raises:
        DeltaError: None of these, or damaged.
    """
    location = Path(path)
    if location.is_dir():
        return _open_directory(location)
    if not location.is_file():
        raise DeltaError(f"{printable(str(location))} does not exist; expected a checkpoint: {_EXPECTED}")
    if location.name.endswith(_INDEX):
        return _open_sharded(location)
    if location.suffix == ".safetensors":
        return _open_single(location)
    if zipfile.is_zipfile(location):
        return _open_torch(location)
    raise DeltaError(
        f"{printable(str(location))} is not a supported checkpoint; expected {_EXPECTED}. If it was written before "
        "torch 1.6, or with _use_new_zipfile_serialization=False, load it and save it again"
    )


_EXPECTED = (
    "a .safetensors file, a directory with model.safetensors.index.json or with one .safetensors file, or a file "
    "written by torch.save"
)


def read_header(path: Path) -> File:
    """Read the header of a safetensors file. The safetensors package validates it.

    Raises:
        DeltaError: The file is not a safetensors file, or it is damaged.
    """
    safetensors = extra("safetensors", "a .safetensors file")
    try:
        with safetensors.safe_open(path, framework="numpy"), open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            return File(path.name, file.read(length))
    except safetensors.SafetensorError as error:
        raise DeltaError(
            f"{printable(str(path))} is not a valid safetensors file ({printable(str(error))}): it is truncated, "
            "modified, or not a safetensors file; write or copy it again"
        ) from error


# ---------------------------------------------------------------------- safetensors


def _open_single(path: Path) -> Checkpoint:
    file = read_header(path)
    return Checkpoint(path, {tensor.name: tensor for tensor in _map_tensors(path, file)}, Layout((file,), None))


def _map_tensors(path: Path, file: File) -> Iterator[MappedTensor]:
    mapping, base = Mapping(path), len(file.prefix)
    for entry in file.entries():
        yield MappedTensor(entry.name, entry.dtype, entry.shape, mapping, base + entry.begin)


def _open_directory(path: Path) -> Checkpoint:
    indices = sorted(path.glob(f"*{_INDEX}"))
    files = sorted(path.glob("*.safetensors"))
    if len(indices) == 1:
        return _open_sharded(indices[0])
    if not indices and len(files) == 1:
        return _open_single(files[0])
    found = [each.name for each in indices or files]
    raise DeltaError(
        f"the directory {printable(str(path))} has {_summarize_names(found) or 'no .safetensors files'}; expected one "
        f"index (model{_INDEX}), or one .safetensors file and no index. Pass the file or the index instead"
    )


def _open_sharded(index: Path) -> Checkpoint:
    weight_map, text = _read_index(index)
    files, tensors = [], {}
    for name in sorted(set(weight_map.values())):
        path = index.parent / name
        if not is_plain_name(name) or not path.is_file():
            raise DeltaError(
                f"{printable(str(index))} lists the file {printable(name)!r}, which does not exist in its directory; "
                "copy all shards"
            )
        file = read_header(path)
        files.append(file)
        for tensor in _map_tensors(path, file):
            if weight_map.pop(tensor.name, None) != name:
                raise DeltaError(
                    f"tensor {printable(tensor.name)!r} is in {printable(name)}, but {printable(str(index))} does not "
                    "list it there: the index and the files belong to different checkpoints; save them again"
                )
            tensors[tensor.name] = tensor
    if weight_map:
        lost, name = next(iter(weight_map.items()))
        raise DeltaError(
            f"{printable(str(index))} lists tensor {printable(lost)!r} in {printable(name)}, but the file does not "
            "contain it; copy all shards again, or save them again"
        )
    return Checkpoint(index.parent, tensors, Layout(tuple(files), (index.name, text)))


def _read_index(index: Path) -> tuple[dict[str, str], str]:
    try:
        text = index.read_bytes().decode()
        weight_map = dict(json.loads(text)["weight_map"])
        if all(isinstance(name, str) for name in weight_map.values()):
            return weight_map, text
        reason = "a file name is not a string"
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise DeltaError(
        f"{printable(str(index))} is not an index of a sharded checkpoint: expected JSON with a weight_map from "
        f"tensors to files ({printable(reason)}); save it again"
    )


def is_plain_name(name: str) -> bool:
    """Whether a file name has no directory part."""
    return name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0", ":"}


def _summarize_names(names: list[str]) -> str:
    return printable(", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""))


# ---------------------------------------------------------------------- torch.save


def _open_torch(path: Path) -> Checkpoint:
    mapping = Mapping(path)
    tensors: dict[str, MappedTensor] = {}
    first_names: dict[tuple[object, ...], str] = {}
    for name, tensor in _iterate_tensors(_load(path), ()):
        if name in tensors:
            raise DeltaError(f"{printable(str(path))} has two tensors named {printable(name)!r}; rename one of them")
        if name == "__metadata__":
            raise DeltaError(
                f"{printable(str(path))} has a tensor named {name!r}, which safetensors reserves; rename it"
            )
        begin, nbytes, dtype, shape, strides = _locate(path, name, tensor)
        if begin + nbytes > mapping.nbytes:
            raise DeltaError(
                f"{printable(str(path))} is too short for tensor {printable(name)!r}; copy or save it again"
            )
        key = (begin, dtype, shape, strides)
        first = first_names.setdefault(key, name) if nbytes else name
        same_as = None if first == name else first
        tensors[name] = MappedTensor(name, dtype, shape, mapping, begin, strides, same_as)
    return Checkpoint(path, tensors, one_file((each.name, each.dtype, each.shape) for each in tensors.values()))


def _load(path: Path) -> Any:
    """Load with fake tensors, which only know the position of their storage in the file."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with zipfile.ZipFile(path) as archive:
        orders = [archive.read(each) for each in archive.namelist() if each.endswith("/byteorder")]
    if orders != [b"little"]:
        raise DeltaError(
            f"expected a checkpoint in little-endian byte order, got {printable(str(path))}; save it on a "
            "little-endian machine"
        )
    try:
        with FakeTensorMode():
            return torch.load(path, weights_only=True, map_location="cpu")
    # pickle and torch raise many types of errors for damaged files.
    except Exception as error:
        raise DeltaError(
            f"{printable(str(path))} cannot be loaded with torch.load(weights_only=True); expected only tensors in "
            "dictionaries and lists, such as model.state_dict(). Save only these. Error from torch: "
            f"{printable(_reason(error))}"
        ) from error


def _reason(error: Exception) -> str:
    """The cause of an error, without torch's hints on workarounds."""
    text = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
    return (text.strip().splitlines() or [type(error).__name__])[0]


def _iterate_tensors(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Tensors in nested containers, named by their keys joined with dots."""
    if isinstance(value, Tensor):
        yield ".".join(path) or "tensor", value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _iterate_tensors(inner, (*path, str(key)))
    elif isinstance(value, (list, tuple)):
        for at, inner in enumerate(value):
            yield from _iterate_tensors(inner, (*path, str(at)))


def _locate(path: Path, name: str, tensor: Tensor) -> tuple[int, int, str, tuple[int, ...], tuple[int, ...] | None]:
    """Offset and length of a tensor in the file, its dtype, shape, and strides in bytes."""
    dtype = OF_TORCH.get(tensor.dtype)
    kind = f"of {tensor.dtype}" if tensor.layout is torch.strided else f"of layout {tensor.layout}"
    is_plain = tensor.layout is torch.strided and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())
    if dtype is None or not is_plain:
        raise DeltaError(
            f"tensor {printable(name)!r} of {printable(str(path))} is {kind if is_plain else kind + ', and a view'}, "
            f"which deltas do not support; expected dense tensors of {', '.join(OF_TORCH.values())}. Save it as one of "
            "these, or leave it out"
        )
    storage = tensor.untyped_storage()
    # The offset of the storage in the file, documented in torch's notes on serialization.
    offset: int | None = storage._checkpoint_offset
    width = tensor.element_size()
    shape, strides = tuple(tensor.shape), tuple(stride * width for stride in tensor.stride())
    if not tensor.numel():
        return 0, 0, dtype, shape, None
    first = int(tensor.storage_offset()) * width
    nbytes = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) + width
    if offset is None or first + nbytes > storage.nbytes():
        raise DeltaError(
            f"tensor {printable(name)!r} of {printable(str(path))} extends beyond its storage; save it again"
        )
    return offset + first, nbytes, dtype, shape, None if tensor.is_contiguous() else strides
