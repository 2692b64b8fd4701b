"""One bit per weight: against the flags that were set."""

from __future__ import annotations

import numpy as np
import torch

from weightflip.kernels import ScratchPool, bits


def test_bits_of_any_number_and_place():
    """Packed bits are those of numpy, and bits of other weights stay as they are."""
    generator, scratch = torch.Generator().manual_seed(0), ScratchPool()
    for numel in (1, 7, 8, 63, 64, 65, 1000, 70_001):
        expected = torch.zeros(numel, dtype=torch.bool)
        found = bits.zeros(numel, torch.device("cpu"))
        assert found.numel() == -(-numel // 64) * 8
        for share in (0.0, 0.01, 0.5, 1.0):
            first = int(torch.randint(numel, (), generator=generator))
            flags = (
                torch.rand(int(torch.randint(numel - first, (), generator=generator)) + 1, generator=generator) < share
            )
            expected[first : first + len(flags)] |= flags
            bits.or_(found, flags, first, scratch)
            packed = np.packbits(expected.numpy(), bitorder="little")
            assert np.array_equal(found.numpy()[: len(packed)], packed)
            assert not found[len(packed) :].any()
            assert torch.equal(bits.unpack(found, numel), expected)
            assert bits.count(found) == expected.sum()


def test_bits_are_counted_in_parts():
    flags = torch.arange(9 << 20) % 3 == 0
    found = bits.zeros(len(flags), torch.device("cpu"))
    bits.or_(found, flags, 0, ScratchPool())
    assert bits.count(found) == flags.sum()
