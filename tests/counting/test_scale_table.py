"""Scales from the lookup table equal those of the format's rule, for every magnitude."""

from __future__ import annotations

import pytest
import torch

from weightflip.counting import scale_table
from weightflip.counting.quantizer_cache import QuantizerCache
from weightflip.counting.scale_table import get_scale_table
from weightflip.quantizers import resolve
from weightflip.quantizers.block import MX_NAMES, MXQuantizer, NVFP4Quantizer

CPU = torch.device("cpu")
RULES = [*(MXQuantizer(f, mode) for f in MX_NAMES.values() for mode in ("floor", "rceil", "ceil", "even")), "nvfp4"]


@pytest.fixture(autouse=True)
def nothing_made_yet(monkeypatch):
    monkeypatch.setattr(scale_table, "_tables", QuantizerCache())


def made_for(quantizer, dtype=torch.float32):
    return get_scale_table(quantizer, quantizer.rounding(torch.ones(1)), dtype, CPU)


@pytest.mark.parametrize("quantizer", RULES, ids=str)
def test_a_table_equals_the_rule(quantizer):
    quantizer = resolve(quantizer)
    # Other magnitudes than those with which the table was verified: 300,000 of all sizes, infinity, NaN.
    bits = torch.arange(0, 1 << 31, 7001, dtype=torch.int64).to(torch.int32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        table = made_for(quantizer, dtype)
        largest = bits.view(torch.float32).to(dtype)
        scale = quantizer.scale_of(largest)
        factors, codes = table.look_up(largest.float().abs())
        assert torch.equal(codes, quantizer.scale_codes(scale).int())
        assert torch.equal(factors.nan_to_num(nan=-1.0), quantizer.applied_scale(scale).nan_to_num(nan=-1.0))
        assert table is made_for(resolve(quantizer.name), dtype)


class UpAndDown(NVFP4Quantizer):
    def scale_of(self, largest, of_tensor=None):
        return super().scale_of(torch.where(largest > 1000, 1.0, largest))


class Raises(NVFP4Quantizer):
    def scale_of(self, largest, of_tensor=None):
        raise RuntimeError("no scale today")


@pytest.mark.parametrize("quantizer", [resolve("int4:g32"), UpAndDown(), Raises()], ids=["wide", "falls", "raises"])
def test_rules_without_a_table(quantizer):
    assert made_for(quantizer) is None
