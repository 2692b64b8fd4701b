"""Size of deltas, compared with the entropy bound and with other encodings.

    python benchmarks/delta_sizes.py

One bfloat16 matrix of 16M weights. In the first rows, some weights move independently to the next stored number, up or
down. In the others, all are rounded from float32 weights before and after a random step. The bound is
``n * H(changed / n) + changed * H(differences)`` bits. Sizes are fractions of the 2 bytes of each weight.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
import zstandard
from safetensors.torch import save_file
from torch import Tensor

from weightflip.delta import diff

_SHAPE = (4096, 4096)


def main() -> None:
    torch.manual_seed(0)
    master = torch.randn(_SHAPE) * 0.02
    old = master.bfloat16()
    cases = [(f"{share:.1%} by one number", nudged(old, share)) for share in (0.001, 0.01, 0.05, 0.2)]
    cases += [
        (f"random step of {rate:g}", (master + torch.randn(_SHAPE) * rate).bfloat16()) for rate in (1e-6, 1e-5, 1e-4)
    ]
    cases.append(("other weights", (torch.randn(_SHAPE) * 0.02).bfloat16()))
    print("| what happened | changed | bound | delta | delta / bound | XOR, zstd | index and value | dense |")
    print("|---|---|---|---|---|---|---|---|")
    for title, new in cases:
        before, after = bits(old), bits(new)
        changed = int(np.count_nonzero(before != after))
        least, size = bound(before, after), delta(old, new)
        xor = len(zstandard.ZstdCompressor(level=3).compress((before ^ after).tobytes()))
        shares = [f"{nbytes / after.nbytes:.2%}" for nbytes in (least, size, xor, 6 * changed, after.nbytes)]
        print(
            f"| {title} | {changed / len(before):.2%} | {shares[0]} | {shares[1]} | {size / least:.3f} | "
            + " | ".join(shares[2:])
            + " |"
        )


def bits(tensor: Tensor) -> np.ndarray:
    return tensor.view(torch.int16).numpy().reshape(-1)


def nudged(tensor: Tensor, share: float) -> Tensor:
    found = tensor.clone().view(torch.int16).reshape(-1)
    at = torch.randperm(len(found))[: round(share * len(found))]
    found[at] += (2 * torch.randint(2, (len(at),)) - 1).short()
    return found.view(torch.bfloat16).view(tensor.shape)


def entropy(counts: np.ndarray) -> float:
    """Bits per symbol."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def bound(before: np.ndarray, after: np.ndarray) -> float:
    """Minimum number of bytes if changes are independent of each other and of the weights."""
    ordinals = [np.where(part < 0, part.astype(int) ^ 0x7FFF, part) for part in (before, after)]
    steps = (ordinals[1] - ordinals[0])[before != after]
    positions = len(before) * entropy(np.array([len(steps), len(before) - len(steps)]))
    return (positions + len(steps) * entropy(np.unique(steps, return_counts=True)[1])) / 8


def delta(old: Tensor, new: Tensor) -> int:
    """Size of the delta file in bytes."""
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory, f"{name}.safetensors") for name in ("old", "new", "delta")]
        for path, tensor in zip(paths, (old, new), strict=False):
            save_file({"weight": tensor}, path)
        return diff(paths[0], paths[1], write=paths[2]).delta_nbytes or 0


if __name__ == "__main__":
    main()
