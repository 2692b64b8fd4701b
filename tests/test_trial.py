"""Errors of the first step are raised at construction, and the trial has no side effects."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from weightflip import Codes, FlipTrackingOptimizer, encode, quantizer_names

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)


class Holder(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)


def wrap(weight, quantizer):
    model = Holder(weight)
    return FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, quantizer=quantizer, sinks=[])


def test_every_quantizer_and_dtype():
    """Construction raises if and only if encode() does."""
    refused = set()
    for name, dtype in itertools.product([*quantizer_names(), "e2m1:none", "e3m4:row", "int4:g32"], DTYPES):
        weight = torch.linspace(-1, 1, 256).view(4, 64).to(dtype)
        try:
            encode(weight, name)
        except Exception:
            refused.add((name, dtype))
            with pytest.raises(ValueError, match=rf"parameter 'weight' cannot be tracked.*'{name}'") as caught:
                wrap(weight, name)
            assert str(dtype).removeprefix("torch.") in str(caught.value)
            assert "name another quantizer for it in quantizer=, or leave it out with exclude=" in str(caught.value)
        else:
            assert "weight" in wrap(weight, name).info.tracked, (name, dtype)
    assert ("binary", torch.float8_e4m3fn) in refused
    assert not {dtype for _, dtype in refused} & set(DTYPES[:4])


def drawing(weight):
    torch.rand(3), random.random(), np.random.rand(3)
    return weight.sign()


class Drawing:
    def encode(self, weight):
        return Codes(drawing(weight).to(torch.int8))


@pytest.mark.parametrize("quantizer", [drawing, Drawing(), "e3m4"])
def test_rng_states_are_restored(quantizer):
    weight = torch.randn(4, 64)

    def draws():
        return torch.rand(1).item(), random.random(), np.random.rand()

    seeds = (torch.manual_seed, random.seed, np.random.seed)
    for seed in seeds:
        seed(7)
    expected = draws()
    for seed in seeds:
        seed(7)
    wrap(weight, quantizer)
    assert draws() == expected


def test_the_message_names_the_type_of_the_error():
    def broken(weight):
        raise KeyError("table")

    with pytest.raises(ValueError, match=r"'weight' .*'broken' cannot encode it .dtype float32.*KeyError: 'table'"):
        wrap(torch.ones(2, 2), broken)


@pytest.mark.parametrize("writes", [torch.Tensor.mul_, lambda w, x: w.data.mul_(x)], ids=["traced", "through .data"])
def test_a_quantizer_that_writes_to_its_weight_is_refused(writes):
    def in_place(weight):
        writes(weight, 0.5)
        return weight.sign()

    weight = torch.tensor([[1.0, float("nan")], [-2.0, 4.0]])
    before = weight.clone()
    with pytest.raises(ValueError, match=r"in_place.* writes to the weight .*weight.clone\(\)"):
        wrap(weight, in_place)
    assert torch.equal(weight.nan_to_num(7.0), before.nan_to_num(7.0))


def test_meta_parameters_are_not_tried():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model, quantizer={"0.*": "e3m4", "*": "mxfp4"}, sinks=[]
    )
    assert list(optimizer.info.tracked) == ["0.weight"]
