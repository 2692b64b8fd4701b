"""Chunks: decoding inverts encoding, codes are small, and damage raises an error."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
import zstandard
from conftest import case
from delta_cases import bits, bound, nudged, random_bits, weights

from weightflip.delta import DeltaError, coding
from weightflip.delta.bits import STORED, add_differences, differences, integers

DTYPES = {name: stored for name, stored in STORED.items() if stored.dtype is not None}


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return bits(tensor).view(np.uint8)


@pytest.mark.parametrize("width", [1, 2])
def test_differences_follow_the_order_of_numbers_and_lose_no_bit(width):
    """Each of the 65,536 bfloat16 with some others, and all pairs of the 256 float8."""
    dtype = {1: torch.float8_e5m2, 2: torch.bfloat16}[width]
    count = 1 << (8 * width)
    every = np.arange(count, dtype=f"u{width}").view(f"i{width}")
    values = torch.from_numpy(every.copy()).view(dtype).double().numpy()
    random = np.random.default_rng(0)
    partners = range(count) if width == 1 else random.integers(0, count, 300)
    for partner in partners:
        others = every != every[partner]
        old, new = every[others], np.full(others.sum(), every[partner])
        steps = differences(old, new, True)
        assert np.array_equal(add_differences(old, steps, True), new)
        before, after = values[others], values[partner]
        # Numbers of one sign are less than half the range apart, so nothing wraps.
        alike = np.isfinite(before) & np.isfinite(after) & (np.sign(before) * np.sign(after) > 0)
        assert np.array_equal(steps[alike] % 2 == 1, before[alike] < after)


def test_next_numbers_are_one_step_apart():
    rising = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0]).bfloat16()
    up = torch.nextafter(rising, torch.full_like(rising, 9))
    steps = differences(integers(as_bytes(rising), 2), integers(as_bytes(up), 2), True)
    # The next larger value after -0 is the one after +0.
    assert steps.tolist() == [1, 1, 3, 1, 1]


def test_round_trip_of_every_dtype():
    random = np.random.default_rng(1)
    for name, stored in DTYPES.items():
        for size in (1, 2, 7, 1000):
            for share in (0.0, 0.003, 0.1, 0.5, 1.0):
                with case(name, size, share):
                    old = as_bytes(random_bits(stored.dtype, size, seed=size))
                    new = old.copy()
                    elements, others = new.view(f"u{stored.unit}"), as_bytes(random_bits(stored.dtype, size, seed=9))
                    at = random.random(size) < share
                    elements[at] = others.view(f"u{stored.unit}")[at]
                    for before in (old, None):
                        count, coded = coding.encode(before, new, stored.unit, stored.has_sign_bit)
                        start = np.zeros_like(new) if before is None else before
                        assert count == np.count_nonzero(start.view(elements.dtype) != elements)
                        assert len(coded) <= len(new) + 1
                        assert (count == 0) == (coded == b"")
                        data = np.frombuffer(coded, np.uint8)
                        back = coding.decode(before, data, len(new), stored.unit, stored.has_sign_bit)
                        assert np.array_equal(back, new)


def test_clustered_changes_take_less_than_scattered_ones():
    old = weights(1 << 18)
    rows = old.clone()
    rows[5000:7000] = nudged(rows[5000:7000], 1.0)
    scattered = nudged(old, 2000 / (1 << 18))
    sizes = [len(coding.encode(as_bytes(old), as_bytes(new), 2, True)[1]) for new in (rows, scattered)]
    assert sizes[0] < 0.25 * sizes[1]


def xor_under_zstd(old: torch.Tensor, new: torch.Tensor) -> int:
    return len(zstandard.ZstdCompressor(level=3).compress((bits(old) ^ bits(new)).tobytes()))


@pytest.mark.parametrize(("most", "dtype"), [(1, torch.bfloat16), (40, torch.bfloat16), (3, torch.float8_e4m3fn)])
def test_sizes_are_near_the_bound_and_below_other_encodings(most, dtype):
    old = weights(1 << 19, dtype=torch.float32).mul_(50).to(dtype)
    for share in (0.001, 0.01, 0.05, 0.2):
        with case(dtype, most, share):
            new = nudged(old, share, most=most)
            count, coded = coding.encode(as_bytes(old), as_bytes(new), old.element_size(), True)
            assert count == round(share * old.numel())
            assert len(coded) <= 1.08 * bound(old, new) + 16
            assert len(coded) < count * (4 + old.element_size())
            assert len(coded) < xor_under_zstd(old, new)
            assert len(coded) < new.nbytes


def test_what_training_does_is_near_the_bound():
    """Sums of many small steps, rounded to bfloat16, move small weights by more numbers than large ones."""
    master = weights(1 << 19, dtype=torch.float32)
    for rate in (1e-6, 1e-5, 1e-4):
        with case(rate):
            step = torch.randn(master.shape, generator=torch.Generator().manual_seed(3)) * rate
            old, new = master.bfloat16(), (master + step).bfloat16()
            _, coded = coding.encode(as_bytes(old), as_bytes(new), 2, True)
            assert len(coded) <= 1.08 * bound(old, new) + 16


def test_damaged_chunks_decode_to_an_error_or_to_bytes_of_the_same_length():
    """Damage that a file's checksum catches: only DeltaError is raised, and no read or allocation is out of bounds."""
    random = np.random.default_rng(2)
    old = weights(4096)
    for share, most in ((0.01, 1), (0.5, 300), (1.0, 2)):
        coded = coding.encode(as_bytes(old), as_bytes(nudged(old, share, most=most)), 2, True)[1]
        for _ in range(300):
            data = np.frombuffer(coded, np.uint8).copy()
            data = data[: random.integers(1, len(data) + 1)]
            data[random.integers(0, min(len(data), 40), 2)] = random.integers(0, 256, 2)
            with contextlib.suppress(DeltaError):
                assert len(coding.decode(as_bytes(old), data, 8192, 2, True)) == 8192
