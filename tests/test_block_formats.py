"""Block formats as data, against torchao's constants, and the quantizers that use them."""

from __future__ import annotations

import dataclasses
import inspect
import math

import ml_dtypes
import numpy as np
import pytest
import torch

from weightflip import encode, formats
from weightflip.formats import BLOCK_FORMATS, E2M1, E4M3, E8M0, FLOAT8_E4M3_128X128, MXFP4, NVFP4, BlockFormat
from weightflip.quantizers import resolve

# Written out, from the table of the OCP Microscaling specification, NVIDIA's recipe and DeepSeek-V3's: element, rows
# and columns of a block; and the scale that goes with each option.
MX = {"": "e8m0", ":rceil": "e8m0", ":ceil": "e8m0", ":even": "e8m0"}
FLOAT8 = {"": "e8m23", ":pow2": "e8m0"}
TABLE = {
    "mxfp8_e4m3": ("e4m3", 1, 32, MX),
    "mxfp8_e5m2": ("e5m2", 1, 32, MX),
    "mxfp6_e2m3": ("e2m3", 1, 32, MX),
    "mxfp6_e3m2": ("e3m2", 1, 32, MX),
    "mxfp4": ("e2m1", 1, 32, MX),
    "nvfp4": ("e2m1", 1, 16, {"": "e4m3", ":tensor": "e4m3"}),
    "float8_e4m3:1x128": ("e4m3", 1, 128, FLOAT8),
    "float8_e4m3:128x128": ("e4m3", 128, 128, FLOAT8),
}


def test_every_block_format():
    names = [family + option for family, (*_, options) in TABLE.items() for option in options]
    assert list(BLOCK_FORMATS) == names
    for name, format in BLOCK_FORMATS.items():
        assert format.name == name
        element, *block, options = TABLE[format.family]
        assert (format.element.name, [format.rows, format.block_size]) == (element, block)
        assert format.scale.name == options[name.removeprefix(format.family)]
        assert len(format.variants) == len(format.rules) == len(options)
        assert format in format.variants
        assert getattr(formats, format.family.upper().replace(":", "_")) == format.variants[0]
        assert format.variants[0].rule == format.rules[0]


def test_quantizers_follow_the_formats():
    weight = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    for name, format in BLOCK_FORMATS.items():
        quantizer = resolve(name)
        assert resolve(format).name == quantizer.name == name
        assert (quantizer.format, quantizer.group, quantizer.block) == (format.element, format.block_size, format)
        codes = encode(weight, format)
        assert torch.equal(codes.ordinals, encode(weight, name).ordinals)
        assert codes.ordinals.abs().max() <= format.element.max_ordinal
        assert codes.scale.shape == (256, 256 // format.block_size, 1)
        # Each stored scale is a number of the scale's format.
        scale = quantizer.block_scales(codes.scale, weight.shape)
        assert scale.numel() * format.rows * format.block_size == weight.numel()
        values = [format.scale.value(code) for code in quantizer.scale_codes(scale).flatten().tolist()]
        # Float8 is multiplied by a scale when encoded, and stored with the inverse.
        scale = 1 / scale if name.startswith("float8") else scale.real if scale.is_complex() else scale
        assert values == scale.flatten().tolist()


def test_a_user_defined_scale_replaces_the_block_scales():
    weight = torch.tensor([[0.5, 3.0, -14.0] * 32])
    assert torch.equal(encode(weight, MXFP4, scale=2.0).ordinals, encode(weight, "mxfp4", scale=2.0).ordinals)
    assert encode(weight, MXFP4, scale=2.0).ordinals[0, :3].tolist() == [0, 3, -7]


def test_bits_per_weight():
    assert [BLOCK_FORMATS[name].bits for name in TABLE] == [
        *(8.25, 8.25, 6.25, 6.25, 4.25, 4.5),
        *(8 + 32 / 128, 8 + 32 / 128**2),
    ]
    assert BLOCK_FORMATS["float8_e4m3:128x128:pow2"].bits == 8 + 8 / 128**2


def test_every_code_of_e8m0():
    theirs = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    assert np.array_equal([E8M0.value(code) for code in range(256)], theirs, equal_nan=True)
    stored = torch.arange(256, dtype=torch.uint8).view(torch.float8_e8m0fnu).double()
    assert np.array_equal(stored.numpy(), theirs, equal_nan=True)
    assert math.isnan(E8M0.value(E8M0.nan_code))
    for code in (-1, 256):
        with pytest.raises(ValueError, match=f"e8m0 has codes 0 to 255, got {code}"):
            E8M0.value(code)


def test_constants_match_torchao():
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


def test_str():
    assert str(NVFP4) == "nvfp4: e2m1 in blocks of 16, each with an e4m3 scale (amax), 4.5 bits per weight"
    assert str(BLOCK_FORMATS["mxfp4:rceil"]) == (
        "mxfp4:rceil: e2m1 in blocks of 32, each with an e8m0 scale (rceil), 4.25 bits per weight"
    )
    assert str(BLOCK_FORMATS["float8_e4m3:128x128:pow2"]) == (
        "float8_e4m3:128x128:pow2: e4m3 in blocks of 128 x 128, each with an e8m0 scale (pow2), 8.00049 bits per weight"
    )


def test_wrong_block_formats():
    with pytest.raises(ValueError, match="a block must have at least one weight, got 0"):
        dataclasses.replace(MXFP4, block_size=0)
    with pytest.raises(ValueError, match="a block must have at least one weight, got 0 x 128"):
        dataclasses.replace(FLOAT8_E4M3_128X128, rows=0)
    with pytest.raises(ValueError, match=r"the rule of an e8m23 scale must be one of \('amax',\), got 'pow2'"):
        dataclasses.replace(FLOAT8_E4M3_128X128, rule="pow2")
    with pytest.raises(ValueError, match=r"the rule of an e8m0 scale must be one of \('floor', .*\), got 'tensor'"):
        dataclasses.replace(MXFP4, rule="tensor")
    with pytest.raises(ValueError, match=r"the scale of a block must be e8m0 or e4m3 or e8m23, got e2m1"):
        BlockFormat("mine", E2M1, 16, E2M1, "amax")
    with pytest.raises(ValueError, match=r"no quantizer for the block format mine: .*; expected one of mxfp8_e4m3, "):
        resolve(BlockFormat("mine", E2M1, 8, E8M0, "floor"))
