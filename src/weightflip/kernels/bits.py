"""Flags of many weights in plain torch, one bit each: bit ``i % 8`` of byte ``i // 8`` belongs to weight ``i``."""

from __future__ import annotations

import torch
from torch import Tensor

from weightflip.kernels.scratch import ScratchPool

# Multiplied with eight bytes that are 0 or 1, it moves the lowest bit of the i-th byte to the i-th of the last 8 bits.
_GATHER, _LAST_BYTE = 0x0102040810204080, 56
_WORD = torch.int64.itemsize
# Bytes that are counted at once, so that they stay in the cache.
_AT_ONCE = 1 << 18


def zeros(numel: int, device: torch.device) -> Tensor:
    """Return the bits of ``numel`` weights, none of them set, uint8. Their number is rounded up to whole int64."""
    return torch.zeros(-(-numel // (8 * _WORD)) * _WORD, dtype=torch.uint8, device=device)


def or_(bits: Tensor, flags: Tensor, first: int, scratch: ScratchPool) -> None:
    """Set the bits of weights whose flags are set.

    Args:
        bits: The bits of all weights.
        flags: Flags of adjacent weights, a 1-d bool tensor.
        first: The index of the first of these weights.
        scratch: Provides temporary buffers.
    """
    lead = first % 8
    last = lead + flags.numel()
    padded = scratch.flat("bits", -(-last // 8) * 8, torch.bool, bits.device)
    padded[:lead].zero_()
    padded[lead:last].copy_(flags)
    padded[last:].zero_()
    words = padded.view(torch.int64)
    packed = words.mul_(_GATHER).bitwise_right_shift_(_LAST_BYTE).to(torch.uint8)
    bits[first // 8 :][: packed.numel()].bitwise_or_(packed)


def count(bits: Tensor) -> Tensor:
    """Return the number of bits that are set, 0-dim int64. No device synchronization."""
    ones = torch.zeros((), dtype=torch.int64, device=bits.device)
    for part in torch.split(bits, _AT_ONCE):
        words = part.view(torch.int64)
        # Sums of 2, 4 and 8 neighboring bits.
        words = words - (words >> 1).bitwise_and_(0x5555555555555555)
        upper = (words >> 2).bitwise_and_(0x3333333333333333)
        words = words.bitwise_and_(0x3333333333333333).add_(upper)
        words = words.add_(words >> 4).bitwise_and_(0x0F0F0F0F0F0F0F0F)
        # The product has the sum of all bytes in its last byte, at most 64.
        ones.add_(words.mul_(0x0101010101010101).bitwise_right_shift_(_LAST_BYTE).sum())
    return ones


def unpack(bits: Tensor, numel: int) -> Tensor:
    """Return the flags of the first ``numel`` weights, bool."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> places) & 1).flatten()[:numel].bool()
