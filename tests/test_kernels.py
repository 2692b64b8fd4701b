"""Fast counting equals the reference, whatever the shape, the strides and the slices."""

from __future__ import annotations

import pytest
import torch
from conftest import case

from weightflip import functional, kernels
from weightflip.kernels import eager, reference
from weightflip.kernels.slices import slices, take

SHAPES = [(1,), (7,), (1024,), (3, 341), (5, 1025), (2, 3, 4, 5), (1, 4099), (4099, 1), (64, 64)]


def codes_of(shape, generator, dtype=torch.int8):
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


@pytest.fixture(params=[64, 1000, 1 << 19], ids=lambda n: f"slices of {n}")
def slice_limit(request, monkeypatch):
    monkeypatch.setattr(eager, "slice_elements", lambda tensor: request.param)
    return request.param


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_count_equals_reference(shape, slice_limit):
    for dtype in (torch.int8, torch.int16, torch.int32):
        generator = torch.Generator().manual_seed(1)
        old, new = codes_of(shape, generator, dtype), codes_of(shape, generator, dtype)
        gradient = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.5)
        updates = {"none": None, "gradient": gradient, "bfloat16 gradient": gradient.bfloat16(), "mask": gradient != 0}
        for kind, update in updates.items():
            with case(dtype, kind):
                expected = reference.count(old, new, update)
                counts, codes = torch.tensor([100, 200, 300]), old.clone()
                functional.compare(codes, new, update, counts, kernels.ScratchPool())
                assert counts.tolist() == (expected + torch.tensor([100, 200, 300])).tolist()
                assert torch.equal(codes, new)


@pytest.mark.parametrize("shape", [(0,), (), *SHAPES], ids=str)
def test_keep_in_plain_torch_equals_reference(shape, slice_limit):
    scratch = kernels.ScratchPool()
    for dtype in (torch.int8, torch.int16, torch.int32, torch.int64):
        generator = torch.Generator().manual_seed(1)
        old, new = codes_of(shape, generator, dtype), codes_of(shape, generator, dtype)
        for kind, other in {
            "random": new,
            "all": old + 1,
            "none": old,
            "strided": new.mT if new.ndim > 1 else new,
        }.items():
            with case(dtype, kind):
                codes = old.reshape(other.shape).clone(memory_format=torch.contiguous_format)
                expected = reference.count(codes, other)[0]
                assert eager.keep_(codes, other, scratch) == expected
                assert torch.equal(codes, other)


def test_every_flag_set(slice_limit):
    # 255 and more flags a lane would overflow the bytes that they are added in.
    old, new = torch.zeros(700, 1024, dtype=torch.int8), torch.ones(700, 1024, dtype=torch.int8)
    counts = torch.zeros(3, dtype=torch.int64)
    functional.compare(old, new, torch.ones(700, 1024), counts, kernels.ScratchPool())
    assert counts.tolist() == [716800, 716800, 0]
    assert eager.keep_(torch.zeros_like(old), torch.ones_like(old), kernels.ScratchPool()) == 716800


def test_scratch_of_an_earlier_weight_does_not_leak(slice_limit):
    scratch = kernels.ScratchPool()
    counts = torch.zeros(3, dtype=torch.int64)
    functional.compare(torch.zeros(5000, dtype=torch.int8), torch.ones(5000, dtype=torch.int8), None, counts, scratch)
    counts.zero_()
    same = torch.zeros(77, dtype=torch.int8)
    functional.compare(same, same.clone(), torch.ones(77), counts, scratch)
    assert counts.tolist() == [0, 77, 77]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-45, -1e-45, 1e-40])
def test_odd_gradients_are_updates(value):
    counts = torch.zeros(3, dtype=torch.int64)
    update = torch.full((64,), value)
    update[:4] = torch.tensor([0.0, -0.0, 0.0, -0.0])
    functional.compare(
        torch.zeros(64, dtype=torch.int8), torch.zeros(64, dtype=torch.int8), update, counts, kernels.ScratchPool()
    )
    assert counts.tolist() == [0, 60, 60]


@pytest.mark.parametrize("limit", [1, 5, 64, 10**6])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(60).view(3, 4, 5),
        torch.arange(60).view(3, 4, 5).permute(2, 0, 1),
        torch.arange(60).view(1, 60),
        torch.arange(60).view(60, 1),
        torch.arange(120)[::2],
        torch.arange(60).view(3, 1, 4, 5).to(memory_format=torch.channels_last),
        torch.tensor(7),
    ],
    ids=lambda t: f"{tuple(t.shape)} {t.stride()}",
)
def test_slices_cover_everything_once(tensor, limit):
    parts = [tensor[index] for index in slices(tensor, limit)]
    assert all(part.numel() <= limit for part in parts)
    assert torch.equal(torch.cat([part.flatten() for part in parts]).sort().values, tensor.flatten().sort().values)


@pytest.mark.parametrize("scale_shape", [(), (1,), (6, 1), (1, 8), (6, 8), (8,)])
def test_take_follows_broadcasting(scale_shape):
    weight = torch.randn(6, 8)
    scale = torch.rand(scale_shape) + 1
    whole = weight * scale
    for index in slices(weight, 16):
        assert torch.equal(weight[index] * take(scale, index), whole[index])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nonfinite_weights_are_counted(dtype):
    weight = torch.randn(50, 3).to(dtype)
    weight[3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    count = torch.tensor(17)
    functional.count_nonfinite(weight, count, kernels.ScratchPool())
    assert count.item() == 3
