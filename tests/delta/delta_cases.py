"""Shared by the delta tests: files, changes, and brute force over cloned bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

_WIDTHS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(tensor: Tensor) -> np.ndarray:
    """The stored elements, cloned, as unsigned integers."""
    flat = tensor.detach().clone().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().copy().view(_WIDTHS[tensor.element_size()])


def nudged(tensor: Tensor, share: float, seed: int = 0, most: int = 1) -> Tensor:
    """A copy in which some elements move up or down by 1 to ``most`` stored numbers."""
    random = np.random.default_rng(seed)
    found = bits(tensor)
    at = random.choice(len(found), round(share * len(found)), replace=False)
    step = random.integers(1, most + 1, len(at)) * random.choice([-1, 1], len(at))
    found[at] += step.astype(f"i{found.itemsize}").view(found.dtype)
    return torch.from_numpy(found.view(np.uint8)).view(tensor.dtype).reshape(tensor.shape)


def random_bits(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Random bits, including NaN payloads, infinities, -0 and subnormals."""
    random = np.random.default_rng(seed)
    if dtype is torch.bool:
        return torch.from_numpy(random.integers(0, 2, shape, np.uint8)).bool()
    width = torch.empty((), dtype=dtype).element_size()
    count = int(np.prod(shape)) * width
    data = np.frombuffer(random.bytes(count), np.uint8).copy()
    return torch.from_numpy(data).view(dtype).reshape(shape)


def weights(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02).to(dtype)


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, path, metadata)
    return path


def save_sharded(path: Path, shards: list[dict[str, Tensor]]) -> Path:
    """A directory as written by transformers."""
    import json

    path.mkdir()
    weight_map = {}
    for at, shard in enumerate(shards, 1):
        file = f"model-{at:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return path


def files_below(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in sorted(path.iterdir())}


def program(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the program in a separate process."""
    code = "import sys; from weightflip.report.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)


def entropy(counts: np.ndarray) -> float:
    """Bits per symbol."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def bound(old: Tensor, new: Tensor) -> float:
    """Minimum bytes for independent changes: which elements changed, and by how many stored numbers."""
    first, second = bits(old), bits(new)
    changed = first != second
    count = int(changed.sum())
    positions = len(first) * entropy(np.array([count, len(first) - count]))

    def ordinals(found: np.ndarray) -> np.ndarray:
        half = 1 << (8 * found.itemsize - 1)
        wide = found.astype(np.int64)
        return np.where(wide < half, wide, half - 1 - wide)

    _, steps = np.unique(ordinals(second[changed]) - ordinals(first[changed]), return_counts=True)
    return (positions + count * entropy(steps)) / 8
