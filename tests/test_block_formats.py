"""Block formats as data: against torchao's constants, and the quantizers that follow them."""

from __future__ import annotations

import dataclasses
import inspect
import math

import ml_dtypes
import numpy as np
import pytest
import torch

from weightflip import encode, formats
from weightflip.formats import BLOCK_FORMATS, E2M1, E4M3, E8M0, MXFP4, NVFP4, BlockFormat
from weightflip.quantizers import resolve

# Written out, from the table of the OCP Microscaling specification and NVIDIA's recipe: element, block, scale.
TABLE = {
    "mxfp8_e4m3": ("e4m3", 32, "e8m0"),
    "mxfp8_e5m2": ("e5m2", 32, "e8m0"),
    "mxfp6_e2m3": ("e2m3", 32, "e8m0"),
    "mxfp6_e3m2": ("e3m2", 32, "e8m0"),
    "mxfp4": ("e2m1", 32, "e8m0"),
    "nvfp4": ("e2m1", 16, "e4m3"),
}
OPTIONS = {"e8m0": ["", ":rceil", ":ceil", ":even"], "e4m3": ["", ":tensor"]}


def test_every_block_format_there_is():
    names = [family + option for family, (*_, scale) in TABLE.items() for option in OPTIONS[scale]]
    assert list(BLOCK_FORMATS) == names
    for name, format in BLOCK_FORMATS.items():
        assert format.name == name
        element, size, scale = TABLE[format.family]
        assert (format.element.name, format.block_size, format.scale.name) == (element, size, scale)
        assert getattr(formats, format.family.upper()) == dataclasses.replace(format, rule=format.rules[0])


def test_quantizers_follow_them():
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    for name, format in BLOCK_FORMATS.items():
        quantizer = resolve(name)
        assert resolve(format).name == quantizer.name == name
        assert (quantizer.format, quantizer.group, quantizer.block) == (format.element, format.block_size, format)
        codes = encode(weight, format)
        assert torch.equal(codes.ordinals, encode(weight, name).ordinals)
        assert codes.ordinals.abs().max() <= format.element.max_ordinal
        assert codes.scale.shape == (4, 64 // format.block_size, 1)
        # Of the scales as stored, each stands for a number of the scale's format.
        stored, scale = quantizer.scale_codes(codes.scale).flatten(), codes.scale
        values = [format.scale.value(code) for code in stored.tolist()]
        assert values == (scale.real if scale.is_complex() else scale).flatten().tolist()


def test_a_scale_of_the_users_own_takes_the_place_of_the_blocks():
    weight = torch.tensor([[0.5, 3.0, -14.0] * 32])
    assert torch.equal(encode(weight, MXFP4, scale=2.0).ordinals, encode(weight, "mxfp4", scale=2.0).ordinals)
    assert encode(weight, MXFP4, scale=2.0).ordinals[0, :3].tolist() == [0, 3, -7]


def test_bits_a_weight():
    assert [BLOCK_FORMATS[name].bits for name in TABLE] == [8.25, 8.25, 6.25, 6.25, 4.25, 4.5]


def test_every_code_of_e8m0():
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert np.array_equal([E8M0.value(code) for code in range(256)], theirs, equal_nan=True)
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).double()
    assert np.array_equal(stored.numpy(), theirs, equal_nan=True)
    assert math.isnan(E8M0.value(E8M0.nan_code))
    for code in (-1, 256):
        with pytest.raises(ValueError, match=f"e8m0 has codes 0 to 255, got {code}"):
            E8M0.value(code)


def test_constants_are_torchaos():
    pytest.importorskip("torchao")
    from torchao.prototype.mx_formats import constants
    from torchao.prototype.mx_formats.config import ScaleCalculationMode
    from torchao.prototype.mx_formats.mx_tensor import MXTensor
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    assert (E8M0.bias, E8M0.nan_code) == (constants.E8M0_EXPONENT_BIAS, constants.E8M0_EXPONENT_NAN_VAL)
    assert set(MXFP4.rules) == {mode.value for mode in ScaleCalculationMode}
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    dtypes = {"mxfp8_e4m3": torch.float8_e4m3fn, "mxfp8_e5m2": torch.float8_e5m2, "mxfp4": torch.float4_e2m1fn_x2}
    dtypes |= {"mxfp6_e2m3": constants.DTYPE_FP6_E2M3, "mxfp6_e3m2": constants.DTYPE_FP6_E3M2}
    for name, dtype in dtypes.items():
        format, prefix = BLOCK_FORMATS[name], constants.DTYPE_TO_SHORT_STR[dtype]
        prefix = prefix.upper() if prefix.startswith("f8") else f"{prefix[:2].upper()}_{prefix[2:].upper()}"
        assert format.element.max == getattr(constants, f"{prefix}_MAX")
        assert format.element.max_exponent == getattr(constants, f"{prefix}_MAX_POW2")
        theirs = MXTensor.to_mx(weight, dtype, format.block_size)
        assert theirs.scale.dtype is torch.float8_e8m0fnu
        assert theirs.scale.numel() == weight.numel() // format.block_size
    theirs = NVFP4Tensor.to_nvfp4(weight)
    assert inspect.signature(NVFP4Tensor.to_nvfp4).parameters["block_size"].default == NVFP4.block_size
    assert (theirs.scale.dtype, theirs.scale.numel()) == (torch.float8_e4m3fn, weight.numel() // NVFP4.block_size)
    assert E4M3.max * E2M1.max == constants.F8E4M3_MAX * constants.F4_E2M1_MAX


def test_they_say_what_they_are():
    assert str(NVFP4) == "nvfp4: e2m1 in blocks of 16, each with an e4m3 scale (amax), 4.5 bits a weight"
    assert str(BLOCK_FORMATS["mxfp4:rceil"]) == (
        "mxfp4:rceil: e2m1 in blocks of 32, each with an e8m0 scale (rceil), 4.25 bits a weight"
    )


def test_wrong_block_formats():
    with pytest.raises(ValueError, match="a block has at least one weight, got 0"):
        dataclasses.replace(MXFP4, block_size=0)
    with pytest.raises(ValueError, match=r"an e8m0 scale is found by one of \('floor', .*\), got 'tensor'"):
        dataclasses.replace(MXFP4, rule="tensor")
    with pytest.raises(ValueError, match=r"the scale of a block is e8m0 or e4m3, got e2m1"):
        BlockFormat("mine", E2M1, 16, E2M1, "amax")
    with pytest.raises(ValueError, match=r"no quantizer for the block format mine: .*; expected one of mxfp8_e4m3, "):
        resolve(BlockFormat("mine", E2M1, 8, E8M0, "floor"))
