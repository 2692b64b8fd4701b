"""The codes of a Float8Linear weight equal the float8 bits of torchao's own cast in forward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import plan_of
from oracles import LAST, float8_ordinals
from torch import nn

from weightflip import decode, encode
from weightflip.formats import E4M3, E5M2
from weightflip.quantizers.float8 import Float8Quantizer

pytest.importorskip("torchao")

from torchao.float8 import CastConfig, Float8LinearConfig, convert_to_float8_training, float8_linear
from torchao.float8.config import ScalingGranularity, ScalingType
from torchao.float8.float8_training_tensor import GemmInputRole
from torchao.float8.float8_utils import tensor_to_scale, to_fp8_saturated

FORMATS = {torch.float8_e4m3fn: E4M3, torch.float8_e5m2: E5M2}


def rowwise(dtype: torch.dtype | None = None) -> CastConfig:
    return CastConfig(scaling_granularity=ScalingGranularity.AXISWISE, target_dtype=dtype)


def e5m2(**options: bool) -> Float8LinearConfig:
    return Float8LinearConfig(cast_config_weight=CastConfig(target_dtype=torch.float8_e5m2), **options)


def rowwise_config(dtype: torch.dtype, **options: bool) -> Float8LinearConfig:
    return Float8LinearConfig(
        cast_config_input=rowwise(), cast_config_weight=rowwise(dtype), cast_config_grad_output=rowwise(), **options
    )


CONFIGS = {
    "tensorwise": lambda: Float8LinearConfig.from_recipe_name("tensorwise"),
    "rowwise": lambda: Float8LinearConfig.from_recipe_name("rowwise"),
    "rowwise_with_gw_hp": lambda: Float8LinearConfig.from_recipe_name("rowwise_with_gw_hp"),
    "tensorwise emulated": lambda: Float8LinearConfig(emulate=True),
    "tensorwise pow2": lambda: Float8LinearConfig(round_scales_to_power_of_2=True),
    "rowwise without pow2": lambda: rowwise_config(torch.float8_e4m3fn),
    "e5m2": e5m2,
    "e5m2 pow2": lambda: e5m2(round_scales_to_power_of_2=True),
    "e5m2 emulated": lambda: e5m2(emulate=True),
    "e5m2 rowwise pow2": lambda: rowwise_config(torch.float8_e5m2, round_scales_to_power_of_2=True),
}

NAMES = {
    "tensorwise": "float8_e4m3",
    "rowwise": "float8_e4m3:row:pow2",
    "rowwise_with_gw_hp": "float8_e4m3:row:pow2",
    "tensorwise emulated": "float8_e4m3",
    "tensorwise pow2": "float8_e4m3:pow2",
    "rowwise without pow2": "float8_e4m3:row",
    "e5m2": "float8_e5m2",
    "e5m2 pow2": "float8_e5m2:pow2",
    "e5m2 emulated": "float8_e5m2",
    "e5m2 rowwise pow2": "float8_e5m2:row:pow2",
}


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def initial(rows: int, columns: int) -> torch.Tensor:
    return gaussian(rows, columns) * 0.02


def outliers(rows: int, columns: int) -> torch.Tensor:
    weight = initial(rows, columns)
    weight.view(-1)[:: rows * columns // 3 + 1] *= 1e4
    return weight


def mixed_rows(rows: int, columns: int) -> torch.Tensor:
    """Rows of every magnitude, one of zeros, one of negative zeros, one of subnormal numbers."""
    weight = gaussian(rows, columns) * torch.logspace(-12, 6, rows).unsqueeze(1)
    weight[0], weight[rows // 2], weight[-1] = 0.0, -0.0, weight[-1] * 1e-45
    return weight


def subnormal(rows: int, columns: int) -> torch.Tensor:
    return gaussian(rows, columns) * 1e-39


def underflowing(rows: int, columns: int) -> torch.Tensor:
    """Float8 subnormals and zeros next to one large weight."""
    weight = gaussian(rows, columns) * torch.logspace(-9, 0, columns)
    weight[0, 0] = 3.0
    return weight


def zeros(rows: int, columns: int) -> torch.Tensor:
    return torch.zeros(rows, columns)


def with_nan(rows: int, columns: int) -> torch.Tensor:
    weight = initial(rows, columns)
    weight[0, 0] = math.nan
    return weight


def with_infinity(rows: int, columns: int) -> torch.Tensor:
    weight = initial(rows, columns)
    weight[-1, 0] = -math.inf
    return weight


WEIGHTS = [initial, outliers, mixed_rows, subnormal, underflowing, zeros, with_nan, with_infinity]


@pytest.fixture
def weight_casts(monkeypatch):
    """Records what torchao casts its weights to, in the order of the layers."""
    casts = []
    cast = float8_linear.hp_tensor_to_float8_dynamic

    def spy(*args, **kwargs):
        result = cast(*args, **kwargs)
        if kwargs["gemm_input_role"] is GemmInputRole.WEIGHT:
            casts.append(result)
        return result

    monkeypatch.setattr(float8_linear, "hp_tensor_to_float8_dynamic", spy)
    return casts


def float8_model(shapes, weight, dtype, config) -> nn.Sequential:
    """A stack of Linear layers of ``(rows, columns)``, converted by torchao."""
    model = nn.Sequential(*[nn.Linear(columns, rows, dtype=dtype) for rows, columns in shapes])
    with torch.no_grad():
        for layer in model:
            layer.weight.copy_(weight(*layer.weight.shape))
    return convert_to_float8_training(model, config=config)


def assert_codes_match_torchao(model, casts, columns, dtype) -> None:
    tracked = plan_of(model).tracked
    with torch.no_grad():
        model(torch.ones(16, columns, dtype=dtype))
    assert len(casts) == len(tracked) == len(model)
    for cast, (name, quantizer) in zip(casts, tracked.items(), strict=True):
        codes = quantizer.encode(model.get_parameter(name).detach())
        # torchao casts the transposed weight.
        np.testing.assert_array_equal(codes.ordinals.numpy(), float8_ordinals(cast._data.t()), err_msg=name)
        expected_scale = cast._scale.t() if cast._scale.ndim else cast._scale
        torch.testing.assert_close(codes.scale, expected_scale, rtol=0, atol=0, equal_nan=True)
        if dtype is torch.float32:
            # Otherwise torchao divides in the weight's own precision.
            values = cast.to_original_precision().t()
            torch.testing.assert_close(decode(codes, quantizer), values, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_codes_equal_the_bits_of_forward(config, weight, dtype, weight_casts):
    model = float8_model([(32, 16), (48, 32)], weight, dtype, CONFIGS[config]())
    assert_codes_match_torchao(model, weight_casts, 16, dtype)


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (7, 5), (33, 31), (3, 100)])
@pytest.mark.parametrize("emulate", [False, True])
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
def test_odd_shapes(recipe, emulate, shape, weight_casts):
    config = Float8LinearConfig.from_recipe_name(recipe)
    object.__setattr__(config, "emulate", emulate)
    model = float8_model([shape], initial, torch.float32, config)
    assert_codes_match_torchao(model, weight_casts, shape[1], torch.float32)


def test_codes_follow_training(weight_casts):
    model = float8_model([(32, 16), (16, 32)], initial, torch.float32, Float8LinearConfig())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    seen = []
    for seed in range(3):
        weight_casts.clear()
        assert_codes_match_torchao(model, weight_casts, 16, torch.float32)
        seen.append(float8_ordinals(weight_casts[0]._data))
        model(gaussian(16, 16, seed=seed)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (seen[0] != seen[1]).any()
    assert (seen[1] != seen[2]).any()


@pytest.mark.parametrize("config", CONFIGS)
def test_the_recipe_has_the_name_that_users_write(config):
    tracked = plan_of(float8_model([(32, 16)], initial, torch.float32, CONFIGS[config]())).tracked
    assert {name: str(quantizer) for name, quantizer in tracked.items()} == {"0.weight": NAMES[config]}


def test_unconverted_layers_are_not_tracked_as_torchaos():
    model = nn.Sequential(nn.Linear(16, 16, dtype=torch.bfloat16), nn.Linear(16, 16, dtype=torch.bfloat16))
    model = convert_to_float8_training(model, module_filter_fn=lambda module, name: name == "1")
    plan = plan_of(model)
    assert {name: str(quantizer) for name, quantizer in plan.tracked.items()} == {"1.weight": "float8_e4m3"}
    assert "high precision" in plan.skipped["0.weight"]
    tracked = plan_of(model, include="*.weight").tracked
    assert {name: str(quantizer) for name, quantizer in tracked.items()} == {
        "0.weight": "native",
        "1.weight": "float8_e4m3",
    }


def test_a_weight_left_in_high_precision_is_skipped(weight_casts):
    off, on = CastConfig(scaling_type=ScalingType.DISABLED), CastConfig()
    config = Float8LinearConfig(
        cast_config_input=off,
        cast_config_weight=off,
        cast_config_input_for_grad_weight=on,
        cast_config_weight_for_grad_input=on,
    )
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model = convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name == "1")
    plan = plan_of(model)
    assert list(plan.tracked) == ["0.weight"]
    assert "DISABLED" in plan.skipped["1.weight"]
    with torch.no_grad():
        model(torch.ones(16, 16))
    assert not weight_casts


def torchao_cast(weight, dtype, by_row, pow2):
    scale = tensor_to_scale(
        weight,
        dtype,
        scaling_granularity=ScalingGranularity.AXISWISE if by_row else ScalingGranularity.TENSORWISE,
        axiswise_dim=-1 if by_row else None,
        round_scales_to_power_of_2=pow2,
    )
    return scale, to_fp8_saturated(weight.float() * scale, dtype)


def assert_equals_torchao(weight, dtype, by_row, pow2):
    quantizer = Float8Quantizer(FORMATS[dtype], "row" if by_row else "tensor", round_scales_to_power_of_2=pow2)
    codes = quantizer.encode(weight)
    scale, data = torchao_cast(weight, dtype, by_row, pow2)
    np.testing.assert_array_equal(codes.ordinals.numpy(), float8_ordinals(data))
    assert torch.equal(codes.scale, scale)
    return codes


every_recipe = [
    pytest.mark.parametrize("pow2", [False, True], ids=["exact", "pow2"]),
    pytest.mark.parametrize("by_row", [False, True], ids=["tensor", "row"]),
    pytest.mark.parametrize("dtype", LAST, ids=["e4m3", "e5m2"]),
]


def all_recipes(test):
    for mark in every_recipe:
        test = mark(test)
    return test


@all_recipes
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_random_weights(weight_dtype, dtype, by_row, pow2):
    for exponent in range(-10, 11, 5):
        weight = (gaussian(64, 96, seed=exponent + 10) * 2.0**exponent).to(weight_dtype)
        codes = assert_equals_torchao(weight, dtype, by_row, pow2)
        assert codes.ordinals.unique().numel() > 50  # not all zeros or saturated


# If the largest weight gives a scale close to a power of two, rounding it down jumps by a factor of 2.
@all_recipes
def test_scales_close_to_a_power_of_two(dtype, by_row, pow2):
    for exponent in (-40, -10, 0, 7, 30):
        edge = np.float32(torch.finfo(dtype).max * 2.0**exponent)
        for amax in (np.nextafter(edge, np.float32(0)), edge, np.nextafter(edge, np.float32(np.inf))):
            weight = gaussian(8, 8).clamp(-1, 1) * float(amax)
            weight[:, 0] = float(amax)
            assert_equals_torchao(weight, dtype, by_row, pow2)


@all_recipes
def test_tiny_and_huge_weights(dtype, by_row, pow2):
    # Below 1e-12 torchao divides by 1e-12: small weights no longer use the format's full range.
    for amax in (1e-11, 1e-12, 1e-13, 1e-15, 1e-20, 1e-38, 1e-44, 0.0, 1e10, 1e30, 5e37):
        assert_equals_torchao(gaussian(8, 16) * amax, dtype, by_row, pow2)


@all_recipes
def test_every_bfloat16_number_as_a_weight(dtype, by_row, pow2):
    weight = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weight = weight[weight.isfinite()].view(-1, 128)
    assert_equals_torchao(weight, dtype, by_row, pow2)


@all_recipes
def test_strides_do_not_matter(dtype, by_row, pow2):
    weight = gaussian(24, 40)
    for view in (weight.t(), weight[::3, ::2], weight.view(4, 6, 40).mT):
        assert_equals_torchao(view, dtype, by_row, pow2)


@all_recipes
def test_names_select_the_recipe(dtype, by_row, pow2):
    weight = gaussian(16, 32) * torch.logspace(-1, 1, 16).unsqueeze(1)
    name = f"float8_{FORMATS[dtype].name}" + (":row" if by_row else "") + (":pow2" if pow2 else "")
    codes, (scale, data) = encode(weight, name), torchao_cast(weight, dtype, by_row, pow2)
    np.testing.assert_array_equal(codes.ordinals.numpy(), float8_ordinals(data))
    assert torch.equal(decode(codes, name), data.float() / scale)
    if not pow2:  # there the rounded amax may need the next scale
        assert torch.equal(encode(decode(codes, name), name).ordinals, codes.ordinals)


def test_other_formats_are_refused():
    from weightflip.formats import E3M4

    with pytest.raises(ValueError, match="the format of float8 must be E4M3 or E5M2, got e3m4"):
        Float8Quantizer(E3M4)
