"""MX and NVFP4 as torchao trains with them: detected automatically, with the codes of torchao's forward."""

from __future__ import annotations

import pytest
import torch
from conftest import FORMS, assert_same, plan_of
from torch import Tensor, nn

pytest.importorskip("torchao", reason="torchao is not installed")

from torchao.prototype.moe_training.config import MXFP8TrainingOpConfig
from torchao.prototype.mx_formats import MXDynamicActivationMXWeightConfig, mx_tensor
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor, per_tensor_amax_to_scale
from torchao.prototype.qat.mx import MXFakeQuantizeConfig
from torchao.prototype.qat.nvfp4 import NVFP4FakeQuantizeConfig
from torchao.quantization import quantize_
from torchao.quantization.qat import QATConfig
from torchao.quantization.quantize_.common.kernel_preference import KernelPreference

from weightflip import FlipTrackingOptimizer

ROWS, COLUMNS = 96, 64
MODES = list(ScaleCalculationMode)


def qat(dtype: torch.dtype, mode: ScaleCalculationMode) -> QATConfig:
    config = MXFakeQuantizeConfig(dtype=dtype, scaling_mode=mode)
    return QATConfig(activation_config=config, weight_config=config, step="prepare")


KINDS = {
    **{
        f"{name}:{mode.value}": (lambda dtype=dtype, mode=mode: qat(dtype, mode))
        for name, dtype in {
            "mxfp4": torch.float4_e2m1fn_x2,
            "mxfp8_e4m3": torch.float8_e4m3fn,
            "mxfp8_e5m2": torch.float8_e5m2,
        }.items()
        for mode in MODES
    },
    **{
        f"training mxfp8_e4m3:{mode.value}": (
            lambda mode=mode: MXFP8TrainingOpConfig(
                kernel_preference=KernelPreference.EMULATED, scale_calculation_mode=mode
            )
        )
        for mode in MODES
    },
}


def name_of(kind: str) -> str:
    """The name that users write: floor is the default and needs no option."""
    return kind.removeprefix("training ").removesuffix(":floor")


def initial() -> Tensor:
    """Outliers, a block of zeros, subnormals."""
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) * 0.1
    weight[0, 0], weight[1, 33], weight[2, :32], weight[3] = 1e4, -7.0, 0.0, weight[3] * 1e-38
    return weight


def layers(kind: str, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(initial())
    model = model.to(dtype)
    quantize_(model, KINDS[kind]())
    return model


def master(weight: Tensor) -> Tensor:
    return getattr(weight, "_data", weight)


@pytest.fixture
def casts(monkeypatch):
    """Records (scale, elements) of every cast to MX that torchao makes of a tensor of the weight's shape."""
    found: list[tuple[Tensor, Tensor]] = []
    original = mx_tensor.to_mx

    def spy(data, *args, **kwargs):
        scale, elements = original(data, *args, **kwargs)
        if tuple(data.shape) == (ROWS, COLUMNS):
            found.append((scale.view(torch.uint8).clone(), elements.view(torch.uint8).clone()))
        return scale, elements

    for module in ("mx_formats.mx_tensor", "mx_formats.mx_linear", "moe_training.mxfp8_grouped_mm"):
        try:
            monkeypatch.setattr(f"torchao.prototype.{module}.to_mx", spy)
        except (AttributeError, ImportError):
            continue
    return found


def as_integers(elements: Tensor, kind: str) -> Tensor:
    """Convert sign and magnitude, packed two per byte for 4 bits, to signed integers."""
    bits = elements.to(torch.int16)
    width = 8
    if "mxfp4" in kind:
        bits, width = torch.stack([bits & 15, bits >> 4], -1).flatten(-2), 4
    magnitude = bits & ((1 << (width - 1)) - 1)
    return torch.where(bits >> (width - 1) > 0, -magnitude, magnitude).view(ROWS, COLUMNS)


def in_forward(model: nn.Module, casts) -> tuple[Tensor, Tensor]:
    """The scale and the elements that a forward casts the weight to."""
    casts.clear()
    with torch.no_grad():
        model(torch.randn(33, COLUMNS, generator=torch.Generator().manual_seed(5)).to(master(model[0].weight).dtype))
    (cast,) = casts
    casts.clear()
    return cast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_codes_equal_those_of_forward(kind, dtype, casts):
    model = layers(kind, dtype)
    scale, elements = in_forward(model, casts)
    plan = plan_of(model)
    assert {name: str(quantizer) for name, quantizer in plan.tracked.items()} == {"0.weight": name_of(kind)}
    quantizer = plan.tracked["0.weight"]
    codes = quantizer.encode(model[0].weight.detach())
    assert torch.equal(codes.ordinals.to(torch.int16), as_integers(elements, kind))
    inner = quantizer.encoder
    assert torch.equal(inner.scale_codes(codes.scale).flatten(), scale.flatten())


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("kind", ["mxfp4:rceil", "mxfp8_e5m2:even", "training mxfp8_e4m3:rceil"])
def test_counts_equal_brute_force_and_training_is_unchanged(kind, form, casts):
    def run(tracked):
        model = layers(kind)
        inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
        optimizer, tracker = form(inner, model) if tracked else (inner, None)
        flips = updates = scale_changes = 0
        losses = []
        for step in range(20):
            data = torch.randn(32, COLUMNS, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            loss = (model(data) - 1.0).square().mean()
            loss.backward()
            scale, elements = in_forward(model, casts)
            updates += int((model[0].weight.grad != 0).sum())
            optimizer.step()
            new_scale, new_elements = in_forward(model, casts)
            flips += int((as_integers(elements, kind) != as_integers(new_elements, kind)).sum())
            scale_changes += int((scale != new_scale).sum())
            losses.append(loss.detach())
        return (losses, master(model[0].weight).detach().clone()), (flips, updates, scale_changes), tracker

    bare, _, _ = run(tracked=False)
    result, (flips, updates, scale_changes), tracker = run(tracked=True)
    assert_same(result, bare)
    (layer,) = tracker.record().layers
    assert (layer.total.flips, layer.total.updates, layer.total.scale_changes) == (flips, updates, scale_changes)
    assert layer.total.scale_steps == 20 * ROWS * COLUMNS // 32
    assert flips > 0
    assert scale_changes > 0


@pytest.mark.parametrize("per_tensor", [False, True], ids=["one level", "two levels"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nvfp4_qat_is_detected(dtype, per_tensor):
    # Its forward needs a Blackwell GPU, so the test calls the cast as forward would.
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, bias=False).to(dtype))
    with torch.no_grad():
        model[0].weight.copy_(initial())
    config = NVFP4FakeQuantizeConfig(use_per_tensor_scale=per_tensor)
    quantize_(model, QATConfig(activation_config=config, weight_config=config, step="prepare"))
    weight = model[0].weight.detach()
    scale = per_tensor_amax_to_scale(weight.abs().max()) if per_tensor else None
    expected = NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=scale)
    (quantizer,) = plan_of(model).tracked.values()
    assert str(quantizer) == ("nvfp4:tensor" if per_tensor else "nvfp4")
    codes = quantizer.encode(weight)
    assert torch.equal(codes.ordinals.to(torch.int16), as_integers(expected.qdata.view(torch.uint8), "mxfp4"))
    assert torch.equal(quantizer.scale_codes(codes.scale).flatten(), expected.scale.view(torch.int8).flatten())


def test_the_inference_config_gives_the_mode_of_training():
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS))
    base = MXDynamicActivationMXWeightConfig(activation_dtype=torch.float8_e4m3fn, weight_dtype=torch.float8_e4m3fn)
    quantize_(model, QATConfig(base, step="prepare"))
    (quantizer,) = plan_of(model).tracked.values()
    assert str(quantizer) == f"mxfp8_e4m3:{model[0].weight_config.scaling_mode.value}"


def test_unsupported_weights_are_skipped_and_raise_if_named():
    config = MXFakeQuantizeConfig(dtype=torch.float8_e4m3fn, block_size=64, kernel_preference=KernelPreference.EMULATED)
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS), nn.Linear(ROWS, 16))
    quantize_(
        model,
        QATConfig(activation_config=config, weight_config=config, step="prepare"),
        filter_fn=lambda module, name: name == "0",
    )
    plan = plan_of(model)
    assert list(plan.tracked) == ["1.weight"]
    assert "blocks of 64" in plan.skipped["0.weight"]
    with pytest.raises(ValueError, match=r"'0.weight' cannot be tracked as requested.*blocks of 64"):
        FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, include="0.weight", sinks=[])
    with pytest.raises(ValueError, match=r"'1.weight'.*does not divide|'0.weight'.*does not divide"):
        FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, quantizer="int4:g40", sinks=[])
