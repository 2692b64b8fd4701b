"""Quantization-aware training with torchao: codes equal those that its fake quantizers compute in forward."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import assert_same, gaussian, plan_of, with_outliers
from torch import nn

from weightflip import FlipTrackingOptimizer

pytest.importorskip("torchao")

from torchao.quantization import (
    Float8DynamicActivationFloat8WeightConfig,
    Int4WeightOnlyConfig,
    Int8DynamicActivationIntxWeightConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.qat import (
    Float8FakeQuantizeConfig,
    IntxFakeQuantizeConfig,
    QATConfig,
    initialize_fake_quantizers,
)
from torchao.quantization.qat.fake_quantize_config import Int4WeightFakeQuantizeConfig
from torchao.quantization.qat.linear import Int4WeightOnlyQATQuantizer, Int8DynActInt4WeightQATQuantizer
from torchao.quantization.quant_primitives import (
    _DTYPE_TO_QVALUE_BOUNDS,
    ZeroPointDomain,
    _choose_scale_float8,
    _quantize_affine_float8,
    _quantize_affine_tinygemm,
    quantize_affine,
)
from torchao.quantization.utils import get_block_size

ROWS, COLUMNS = 24, 64


def initial() -> torch.Tensor:
    return gaussian(ROWS, COLUMNS) * 0.02


def outliers() -> torch.Tensor:
    return with_outliers(initial())


def mixed() -> torch.Tensor:
    """Rows of every magnitude, zeros of both signs, subnormal numbers, all-positive and all-negative rows."""
    weight = gaussian(ROWS, COLUMNS) * torch.logspace(-12, 6, ROWS).unsqueeze(1)
    weight[:, ::5], weight[:, 1::7], weight[3] = 0.0, -0.0, weight[3] * 1e-35
    weight[5], weight[6] = weight[5].abs(), -weight[6].abs()
    return weight


WEIGHTS = [initial, outliers, mixed]


def intx(dtype, **options):
    return QATConfig(weight_config=IntxFakeQuantizeConfig(dtype, **options))


# Name: configuration, weightflip's name.
INTX = {
    "int4 groups": (lambda: intx(torch.int4, group_size=32), "qat_int4:g32"),
    "int8 groups": (lambda: intx(torch.int8, group_size=16), "qat_int8:g16"),
    "int4 rows": (lambda: intx(torch.int4, granularity="per_channel"), "qat_int4:row"),
    "int8 rows": (lambda: intx(torch.int8, granularity="per_channel"), "qat_int8:row"),
    "int2 groups": (lambda: intx(torch.int2, group_size=8), "qat_int2:g8"),
    "int3 rows": (lambda: intx(torch.int3, granularity="per_channel"), "qat_int3:row"),
    "int4 rows, bf16 scales": (
        lambda: intx(torch.int4, granularity="per_channel", scale_precision=torch.bfloat16),
        "qat_int4:row",
    ),
    "int4 asymmetric": (lambda: intx(torch.int4, group_size=32, is_symmetric=False), "qat_int4:g32:asymmetric"),
    "uint4 asymmetric": (lambda: intx(torch.uint4, group_size=32, is_symmetric=False), "qat_uint4:g32:asymmetric"),
    "uint6 asymmetric": (lambda: intx(torch.uint6, group_size=8, is_symmetric=False), "qat_uint6:g8:asymmetric"),
    "uint7 asymmetric": (lambda: intx(torch.uint7, group_size=8, is_symmetric=False), "qat_uint7:g8:asymmetric"),
    "uint8 asymmetric rows": (
        lambda: intx(torch.uint8, granularity="per_channel", is_symmetric=False),
        "qat_uint8:row:asymmetric",
    ),
    "int8 asymmetric tokens": (
        lambda: intx(torch.int8, granularity="per_token", is_symmetric=False),
        "qat_int8:token:asymmetric",
    ),
    "intx weight only": (
        lambda: QATConfig(IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))),
        "qat_int4:g32",
    ),
    "8da4w": (
        lambda: QATConfig(Int8DynamicActivationIntxWeightConfig(torch.int4, PerGroup(32))),
        "qat_int4:g32",
    ),
}
SLIDING = {
    "uint4 tinygemm": (
        lambda: intx(
            torch.uint4,
            group_size=32,
            is_symmetric=False,
            zero_point_domain=ZeroPointDomain.FLOAT,
            zero_point_precision=torch.float32,
        ),
        "qat_uint4:g32:asymmetric",
    ),
    "int4 weight only": (lambda: QATConfig(Int4WeightOnlyConfig(group_size=32)), "qat_int4:g32:asymmetric"),
}
INT4_FLOAT8 = {
    "float8 activations, int4": (
        lambda: QATConfig(weight_config=Int4WeightFakeQuantizeConfig(32, torch.float8_e4m3fn)),
        "qat_int4:g32:float8",
    ),
}
FLOAT8 = {
    "rowwise": (
        lambda: QATConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())),
        "qat_float8_e4m3:row",
    ),
    "tensorwise": (
        lambda: QATConfig(Float8DynamicActivationFloat8WeightConfig(granularity=PerTensor())),
        "qat_float8_e4m3",
    ),
    "e5m2, bounded": (
        lambda: QATConfig(
            weight_config=Float8FakeQuantizeConfig(torch.float8_e5m2, PerRow(), hp_value_lb=1e-6, hp_value_ub=2.0)
        ),
        "qat_float8_e5m2:row",
    ),
}
EVERY = {**INTX, **SLIDING, **INT4_FLOAT8, **FLOAT8}


def prepared(config, weight=initial, dtype=torch.float32) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS, dtype=dtype))
    with torch.no_grad():
        model[0].weight.copy_(weight())
    quantize_(model, config)
    return model


def state_of(fake_quantizer):
    return {key: copy.deepcopy(value) for key, value in vars(fake_quantizer).items() if key != "config"}


def codes_and_forward(model, name):
    layer = model[0]
    (quantizer,) = plan_of(model).tracked.values()
    assert str(quantizer) == name
    before, rng = state_of(layer.weight_fake_quantizer), torch.get_rng_state()
    codes = quantizer.encode(layer.weight.detach())
    assert_same(state_of(layer.weight_fake_quantizer), before)
    assert torch.equal(torch.get_rng_state(), rng)
    with torch.no_grad():
        values = layer.weight_fake_quantizer(layer.weight)
    return codes, values, layer.weight_fake_quantizer


def spread(tensor, codes):
    """Expand one number per group to one per weight."""
    return tensor.float().reshape(-1, 1).expand(-1, codes.ordinals.numel() // tensor.numel()).reshape(ROWS, COLUMNS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("config", INTX)
def test_integers_equal_those_of_forward(config, weight, dtype):
    make, name = INTX[config]
    codes, values, fake_quantizer = codes_and_forward(prepared(make(), weight, dtype), name)
    # After forward the fake quantizer holds its scale and zero point.
    scale, zero_point = fake_quantizer.scale, fake_quantizer.zero_point
    low, high = _DTYPE_TO_QVALUE_BOUNDS[fake_quantizer.config.dtype]
    block = (1, ROWS * COLUMNS // scale.numel())
    stored = quantize_affine(
        prepared(make(), weight, dtype)[0].weight, block, scale, zero_point, torch.int32, low, high
    )
    assert torch.equal(codes.ordinals.int(), stored - spread(zero_point, codes).int())
    assert torch.equal(spread(codes.scale, codes), spread(scale, codes))
    # The code is the number in units of the scale.
    assert torch.equal((codes.ordinals * spread(scale.to(dtype), codes).to(dtype)).to(dtype), values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_with_a_floating_zero_point_the_code_is_the_stored_integer(weight, dtype):
    make, name = SLIDING["uint4 tinygemm"]
    codes, values, fake_quantizer = codes_and_forward(prepared(make(), weight, dtype), name)
    scale, zero_point = fake_quantizer.scale, fake_quantizer.zero_point
    stored = _quantize_affine_tinygemm(weight().to(dtype), (1, 32), scale, zero_point, torch.int32, 0, 15)
    assert torch.equal(codes.ordinals.int(), stored)
    assert stored.unique().numel() == 16
    if dtype is torch.float32:
        back = (codes.ordinals - 8) * spread(scale, codes) + spread(zero_point, codes)
        torch.testing.assert_close(back, values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_int4_weight_only_equals_forward(weight, dtype):
    make, name = SLIDING["int4 weight only"]
    model = prepared(make(), weight, dtype)
    codes, values, _ = codes_and_forward(model, name)
    grouped = model[0].weight.detach().float().view(ROWS, -1, 32)
    low, scale = grouped.amin(-1, keepdim=True), codes.scale
    back = codes.ordinals.view(ROWS, -1, 32) * scale + (low + scale * 8)
    assert torch.equal(back.view(ROWS, COLUMNS).to(dtype), values)
    assert (codes.ordinals.min(), codes.ordinals.max()) == (-8, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_int4_after_float8_equals_forward(weight, dtype):
    make, name = INT4_FLOAT8["float8 activations, int4"]
    codes, values, _ = codes_and_forward(prepared(make(), weight, dtype), name)
    assert torch.equal((codes.ordinals * spread(codes.scale, codes)).to(dtype), values)
    assert (codes.ordinals.min(), codes.ordinals.max()) == (-8, 7)


@pytest.mark.parametrize("config", ["int4 groups", "int8 rows", "uint4 asymmetric", "uint8 asymmetric rows", "8da4w"])
def test_nan_has_its_own_code(config):
    def with_nan():
        weight = initial()
        weight[2, 3] = math.nan
        return weight

    make, name = EVERY[config]
    plain, _, _ = codes_and_forward(prepared(make()), name)
    codes, values, _ = codes_and_forward(prepared(make(), with_nan), name)
    nan = torch.iinfo(codes.ordinals.dtype).min
    assert torch.equal(codes.ordinals == nan, values.isnan() | (plain.ordinals == nan))
    assert torch.equal(codes.ordinals[3:], plain.ordinals[3:])


def test_a_moving_zero_point_does_not_flip_unchanged_numbers():
    model = prepared(intx(torch.int8, granularity="per_token", is_symmetric=False))
    layer = model[0]
    with torch.no_grad():
        # Multiples of 0.1 in 255 steps: scale 0.1. Afterward only the range is shifted by one step.
        layer.weight.copy_((torch.arange(COLUMNS) % 14 - 5).expand(ROWS, COLUMNS) * 0.1)
        layer.weight[:, 0], layer.weight[:, 1] = -0.6, 24.9
        (quantizer,) = plan_of(model).tracked.values()
        before = quantizer.encode(layer.weight).ordinals
        layer.weight_fake_quantizer(layer.weight)
        zero_point = layer.weight_fake_quantizer.zero_point
        layer.weight[:, 0], layer.weight[:, 1] = -0.7, 24.8
        flipped = quantizer.encode(layer.weight).ordinals != before
        layer.weight_fake_quantizer(layer.weight)
    assert (layer.weight_fake_quantizer.zero_point == zero_point + 1).all()
    assert flipped[:, :2].all()
    assert not flipped[:, 2:].any()


class Net(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.embedding = nn.Embedding(50, 64, dtype=dtype)
        self.first = nn.Linear(64, 32, dtype=dtype)
        self.second = nn.Linear(32, 64, bias=False, dtype=dtype)

    def forward(self, tokens):
        return self.second(torch.relu(self.first(self.embedding(tokens))))


def net(config, dtype=torch.float32, embedding=None):
    torch.manual_seed(0)
    model = Net(dtype)
    quantize_(model, config)
    if embedding is not None:
        quantize_(model, embedding, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
    return model


def train(model, optimizer, steps, before=None, after=None, hook=None):
    losses = []
    for step in range(steps):
        if hook is not None:
            hook(step)
        tokens = torch.randint(0, 50, (16,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = model(tokens).float().square().mean()
        loss.backward()
        if before is not None:
            before()
        optimizer.step()
        if after is not None:
            after()
        losses.append(loss.detach())
    return losses


def layers_of(model):
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if getattr(module, "weight_fake_quantizer", None) is not None
    }


def numbers(layer):
    """The quantized values in units of their scale, through torchao's own forward."""
    fake_quantizer = copy.deepcopy(layer.weight_fake_quantizer)
    fake_quantizer.enabled = True
    with torch.no_grad():
        values = fake_quantizer(layer.weight.detach().clone()).float()
        if not hasattr(fake_quantizer, "scale"):
            return values
        scale = fake_quantizer.scale.float().reshape(-1, 1)
        return (values.reshape(scale.numel(), -1) / scale).round().view(values.shape)


TRAINED = [key for key in INTX if "bf16" not in key]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", TRAINED)
def test_counts_equal_brute_force_and_training_is_unchanged(config, dtype):
    make, name = INTX[config]
    bare = net(make(), dtype)
    bare_optimizer = torch.optim.AdamW(bare.parameters(), lr=3e-3)
    losses = train(bare, bare_optimizer, 20)

    embedding = None
    model = net(make(), dtype, embedding)
    layers = layers_of(model)
    flips, old = dict.fromkeys(layers, 0), {}
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[], exclude="embedding.*")
    assert {key: quantizer for key, (_, _, quantizer) in optimizer.info.tracked.items()} == dict.fromkeys(layers, name)

    def before():
        old.update({key: numbers(layer) for key, layer in layers.items()})

    def after():
        for key, layer in layers.items():
            flips[key] += int((numbers(layer) != old[key]).sum())

    assert_same(train(model, optimizer, 20, before, after), losses)
    assert optimizer.tracker.get_flip_counts() == flips
    assert all(flips.values())
    assert_same(dict(model.state_dict()), dict(bare.state_dict()))
    assert_same(inner.state_dict()["state"], bare_optimizer.state_dict()["state"])


def steps(layer):
    """Forward's result for a weight, in integer steps of its grid, computed from the formula."""
    fake_quantizer, weight = copy.deepcopy(layer.weight_fake_quantizer), layer.weight.detach()
    values, config = fake_quantizer(weight), fake_quantizer.config
    if isinstance(config, Float8FakeQuantizeConfig):
        by_row = isinstance(config.granularity, PerRow)
        amax = weight.abs().amax(-1, keepdim=True) if by_row else weight.abs().amax()
        scale = amax.clamp(config.hp_value_lb, config.hp_value_ub) if config.hp_value_lb else amax
        return (values / (scale / torch.finfo(config.dtype).max)).to(config.dtype).float()
    grouped, values = weight.view(weight.shape[0], -1, 32), values.view(weight.shape[0], -1, 32)
    if isinstance(config, IntxFakeQuantizeConfig):
        return (values - fake_quantizer.zero_point.unsqueeze(-1)).div(fake_quantizer.scale.unsqueeze(-1)).round()
    if config.activation_dtype is torch.bfloat16:
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        return ((values - low) / ((high - low) / 15)).round()
    row_scale = weight.abs().amax(-1, keepdim=True) / 448
    rounded = (weight / row_scale).to(torch.float8_e4m3fn).float() * row_scale
    return (values / (rounded.view_as(grouped).abs().amax(-1, keepdim=True) / 8)).round()


@pytest.mark.parametrize("config", [*SLIDING, *INT4_FLOAT8, *FLOAT8])
def test_counts_of_other_grids(config):
    make, name = EVERY[config]
    bare, model = net(make()), net(make())
    bare_optimizer = torch.optim.AdamW(bare.parameters(), lr=3e-3)
    inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[], include=["first.weight", "second.weight"])
    assert {quantizer for _, _, quantizer in optimizer.info.tracked.values()} == {name}
    layers = layers_of(model)
    flips, old = dict.fromkeys(layers, 0), {}

    def before():
        old.update({key: steps(layer) for key, layer in layers.items()})

    def after():
        for key, layer in layers.items():
            flips[key] += int((steps(layer) != old[key]).sum())

    assert_same(train(model, optimizer, 20, before, after), train(bare, bare_optimizer, 20))
    assert optimizer.tracker.get_flip_counts() == flips
    assert all(flips.values())
    assert_same(dict(model.state_dict()), dict(bare.state_dict()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("config", FLOAT8)
def test_float8_bits_equal_torchaos_cast(config, weight, dtype):
    make, name = FLOAT8[config]
    codes, values, fake_quantizer = codes_and_forward(prepared(make(), weight, dtype), name)
    config = fake_quantizer.config
    block = get_block_size((ROWS, COLUMNS), config.granularity)
    scale = _choose_scale_float8(
        weight().to(dtype), block, config.dtype, hp_value_lb=config.hp_value_lb, hp_value_ub=config.hp_value_ub
    )
    data = _quantize_affine_float8(weight().to(dtype), scale, config.dtype)
    bits = data.view(torch.uint8).int()
    expected = torch.where(bits >= 128, 128 - bits, bits)
    nan = 127 if config.dtype is torch.float8_e4m3fn else 126
    assert torch.equal(codes.ordinals.int(), expected.masked_fill(data.float().isnan(), nan))
    torch.testing.assert_close((data.float() * codes.scale).to(dtype), values, rtol=0, atol=0, equal_nan=True)


def test_a_row_of_zeros_is_nan_as_in_forward():
    def with_zeros():
        weight = initial()
        weight[4] = 0.0
        return weight

    codes, values, _ = codes_and_forward(prepared(FLOAT8["rowwise"][0](), with_zeros), "qat_float8_e4m3:row")
    assert values[4].isnan().all()
    assert (codes.ordinals[4] == 127).all()


def test_disabled_layers_are_not_counted_and_resume_with_a_baseline():
    config = INTX["int4 groups"][0]
    model = net(config())
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=2.0), model, sinks=[], exclude="embedding.*", log_every=100
    )
    layers, flips, old, steps_counted = layers_of(model), 0, {}, 0

    def switch(step):
        model.first.weight_fake_quantizer.enabled = step not in (0, 1, 5, 6, 7)

    def before():
        old.update({key: numbers(layer) for key, layer in layers.items()})

    def after():
        nonlocal flips, steps_counted
        if model.first.weight_fake_quantizer.enabled:
            flips += int((numbers(model.first) != old["first.weight"]).sum())
            steps_counted += 1

    train(model, optimizer, 12, before, after, switch)
    assert optimizer.tracker.get_flip_counts()["first.weight"] == flips > 0
    layer = next(layer for layer in optimizer.tracker.record().layers if layer.name == "first.weight")
    assert layer.total.weight_steps == steps_counted * model.first.weight.numel() == 7 * model.first.weight.numel()


def test_a_layer_that_starts_disabled_is_noted():
    model = net(INTX["int4 groups"][0]())
    model.first.weight_fake_quantizer.enabled = False
    plan = plan_of(model)
    assert set(plan.tracked) == {"first.weight", "second.weight"}
    assert "high precision" in plan.skipped["embedding.weight"]
    assert any("Fake quantization is disabled" in note and "first.weight" in note for note in plan.notes)


def test_embeddings():
    model = nn.Sequential(nn.Embedding(20, 32))
    quantize_(model, intx(torch.int4, group_size=8), filter_fn=lambda module, name: isinstance(module, nn.Embedding))
    (quantizer,) = plan_of(model).tracked.values()
    assert str(quantizer) == "qat_int4:g8"
    with torch.no_grad():
        values = model[0].weight_fake_quantizer(model[0].weight)
        codes = quantizer.encode(model[0].weight)
    assert torch.equal((codes.ordinals.view(20, 4, 8) * codes.scale).view(20, 32), values)


def learned(is_symmetric):
    options = {} if is_symmetric else {"is_symmetric": False, "zero_point_precision": torch.float32}
    model = net(intx(torch.int4, group_size=16, is_dynamic=False, range_learning=True, **options))
    initialize_fake_quantizers(model, (torch.arange(16),))
    return model


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_learned_ranges(is_symmetric):
    bare, model = learned(is_symmetric), learned(is_symmetric)
    bare_optimizer = torch.optim.SGD(bare.parameters(), lr=0.5)
    inner = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[], exclude="embedding.weight")
    assert set(optimizer.info.tracked) == {"first.weight", "second.weight"}
    assert "learns, not a weight" in optimizer.info.skipped["first.weight_fake_quantizer.scale"]
    layers = layers_of(model)
    flips, old = dict.fromkeys(["first.weight", "second.weight"], 0), {}

    def whole(layer):
        """The rounded quotient, clamped, from the current parameters."""
        fake_quantizer = layer.weight_fake_quantizer
        scale, zero = (x.detach().float().reshape(-1, 1) for x in (fake_quantizer.scale, fake_quantizer.zero_point))
        ratio = (layer.weight.detach().reshape(scale.numel(), -1) * (1 / scale)).round()
        return ((ratio + zero).clamp(-8, 7).double() - zero).round()

    def before():
        old.update({key: whole(layers[key]) for key in flips})

    def after():
        for key in flips:
            flips[key] += int((whole(layers[key]) != old[key]).sum())

    def drift(step):
        # Between two steps, so not a flip of the next one.
        with torch.no_grad():
            for network in (bare, model):
                network.first.weight_fake_quantizer.scale.mul_(1.01)

    losses = train(model, optimizer, 20, before, after)
    assert_same(losses, train(bare, bare_optimizer, 20))
    drift(0)
    train(model, optimizer, 3, before, after, drift)
    assert optimizer.tracker.get_flip_counts() == flips
    assert all(flips.values())


def test_uninitialized_ranges_are_skipped_with_the_reason():
    model = net(intx(torch.int4, group_size=16, is_dynamic=False, range_learning=True))
    assert (
        "initialize_fake_quantizers"
        in plan_of(model, include="first.*", exclude="first.b*", may_be_empty=True).skipped["first.weight"]
    )
    with pytest.raises(
        ValueError, match=r"'first.weight' cannot be tracked as requested: .*initialize_fake_quantizers"
    ):
        plan_of(model, include="first.weight")


def test_tracking_does_not_initialize_a_scale_kept_from_the_first_forward():
    model = prepared(intx(torch.int4, group_size=32, is_dynamic=False))
    layer = model[0]
    codes, values, _ = codes_and_forward(model, "qat_int4:g32")
    with torch.no_grad():
        layer.weight.mul_(0.5)
    halved, values, _ = codes_and_forward(model, "qat_int4:g32")
    assert torch.equal(halved.scale, codes.scale)
    assert torch.equal((halved.ordinals.view(ROWS, 2, 32) * halved.scale).view(ROWS, COLUMNS), values)


def test_hooks_on_a_fake_quantizer_are_not_called():
    model, calls = prepared(INTX["int4 groups"][0]()), []
    model[0].weight_fake_quantizer.register_forward_hook(lambda *args: calls.append(args))
    (quantizer,) = plan_of(model).tracked.values()
    quantizer.encode(model[0].weight.detach())
    assert not calls


def test_activations_only():
    model = nn.Sequential(nn.Linear(COLUMNS, ROWS))
    activation = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    quantize_(model, QATConfig(activation_config=activation))
    assert "leaves the weight in high precision" in plan_of(model, may_be_empty=True).skipped["0.weight"]


def test_a_bias_is_not_tracked():
    plan = plan_of(prepared(INTX["int4 groups"][0]()), include="*")
    assert str(plan.tracked["0.bias"]) == "float8_e4m3"


@pytest.mark.parametrize(
    ("quantizer", "dtype", "name"),
    [
        (lambda: Int8DynActInt4WeightQATQuantizer(groupsize=32), torch.float32, "qat_int4:g32"),
        (lambda: Int4WeightOnlyQATQuantizer(groupsize=32), torch.bfloat16, "qat_uint4:g32:asymmetric"),
    ],
)
def test_older_quantizers(quantizer, dtype, name):
    model = nn.Sequential(nn.Linear(1024, 16, bias=False, dtype=dtype))
    model = quantizer().prepare(model)
    (found,) = plan_of(model).tracked.values()
    assert str(found) == name
    codes = found.encode(model[0].weight.detach())
    assert codes.ordinals.unique().numel() == 16


def test_an_unknown_fake_quantizer_is_skipped_and_logged_once(caplog):
    class Ours(type(prepared(INTX["int4 groups"][0]())[0].weight_fake_quantizer).__mro__[1]):
        enabled = True

    model = net(INTX["int4 groups"][0]())
    for layer in layers_of(model).values():
        layer.weight_fake_quantizer = Ours()
    plan = plan_of(model, may_be_empty=True)
    assert "Ours" in plan.skipped["first.weight"]
    assert len([record for record in caplog.records if "Ours" in record.message]) == 1
    assert str(plan_of(model, quantizer="int4:g32").tracked["first.weight"]) == "int4:g32"


def test_copies_of_an_optimizer_continue():
    model = net(INTX["int4 groups"][0]())
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), model, sinks=[])
    train(model, optimizer, 2)
    twin = copy.deepcopy(optimizer)
    for parameter in (p for group in twin.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    twin.step()
    assert twin.tracker.get_flip_counts()["first.weight"] > optimizer.tracker.get_flip_counts()["first.weight"]


class Mixed(nn.Module):
    """A model that was converted in parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(32, 64)
        self.first = nn.Linear(64, 64)
        self.second = nn.Linear(64, 64)
        self.norm = nn.LayerNorm(64).bfloat16()
        self.mixer = nn.Linear(64, 64, bias=False).bfloat16()
        self.head = nn.Linear(64, 32, bias=False)
        self.tied = nn.Linear(64, 32, bias=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        x = torch.relu(self.second(torch.relu(self.first(x))))
        x = self.mixer(self.norm(x.bfloat16())).float()
        return self.head(x) + self.tied(x)


def test_each_part_of_a_mixed_model_has_its_quantizer():
    from torchao.float8 import convert_to_float8_training

    model = Mixed()
    model = convert_to_float8_training(model, module_filter_fn=lambda module, name: name in ("first", "second"))
    embedding = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(
        model, QATConfig(weight_config=embedding, step="prepare"), filter_fn=lambda m, _: isinstance(m, nn.Embedding)
    )
    model.tied.weight = model.head.weight
    asked = {"mixer.*": "native", "head.*": "float8_e4m3", "*": "auto"}
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, quantizer=asked, sinks=[])
    expected = {
        "embedding.weight": "qat_int4:g32",
        "first.weight": "float8_e4m3",
        "second.weight": "float8_e4m3",
        "mixer.weight": "native",
        "head.weight": "float8_e4m3",
    }
    assert {name: quantizer for name, (_, _, quantizer) in optimizer.info.tracked.items()} == expected
    assert set(optimizer.info.skipped) == {"first.bias", "second.bias", "norm.weight", "norm.bias"}
    assert optimizer.info.notes == ()
    plan = plan_of(model)
    assert expected.keys() - plan.tracked.keys() == {"mixer.weight", "head.weight"}
    (note,) = plan.notes
    assert "head.weight" in note
    assert "first.weight" not in note

    def embedded():
        """The integers of the embedding, from torchao's own fake quantizer."""
        fake_quantizer = model.embedding.weight_fake_quantizer
        values = fake_quantizer(model.embedding.weight.detach()).view(32, -1, 32)
        return (values / fake_quantizer.scale.view(32, -1, 1)).round().view(32, 64)

    tokens = torch.randint(0, 24, (4, 16), generator=torch.Generator().manual_seed(1))
    flips = updates = 0
    for _ in range(20):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        updates += int((model.embedding.weight.grad != 0).sum())
        before = embedded()
        optimizer.step()
        flips += int((embedded() != before).sum())
    assert optimizer.tracker.get_flip_counts()["embedding.weight"] == flips
    assert optimizer.tracker.get_update_counts()["embedding.weight"] == updates < 20 * 32 * 64
    assert all(optimizer.tracker.get_flip_counts().values())
    rows = {line.split()[0]: line.split()[1:3] for line in str(optimizer.tracker).splitlines()[2:-1]}
    sizes = {"embedding.weight": "2,048", "head.weight": "2,048"}
    assert rows == {name: [quantizer, sizes.get(name, "4,096")] for name, quantizer in expected.items()}


def test_a_model_prepared_during_training_is_noticed_at_the_next_logging_point():
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), model, log_every=2, sinks=[lambda record: None]
    )

    def step():
        optimizer.zero_grad()
        model(torch.ones(4, 64)).square().mean().backward()
        optimizer.step()

    step()
    step()
    quantize_(model, QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=32), step="prepare"))
    with pytest.warns(UserWarning, match="'0.weight' was tracked as float8_e4m3 and is now tracked as qat_int4:g32"):
        step()
    assert optimizer.info.tracked["0.weight"][2] == "qat_int4:g32"
    updates = int(model[0].weight.grad.count_nonzero())
    assert optimizer.tracker.get_update_counts() == {"0.weight": updates}
    assert updates > 0


def test_a_copy_skips_what_the_model_skipped():
    model = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64, bias=False))
    activations = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
    quantize_(
        model,
        QATConfig(activation_config=activations, step="prepare"),
        filter_fn=lambda module, name: name == "0",
    )
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, sinks=[])
    assert list(optimizer.info.tracked) == ["1.weight"]
    twin_model, twin = copy.deepcopy((model, optimizer))
    twin_model(torch.ones(4, 64)).square().mean().backward()
    twin.step()
    assert (twin.info.tracked, twin.info.skipped) == (optimizer.info.tracked, optimizer.info.skipped)


def test_row_scales_are_not_group_scales():
    model = nn.Sequential(nn.Linear(64, 32, bias=False))
    quantize_(model, QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"), step="prepare"))
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, sinks=[])
    model(torch.ones(4, 64)).square().mean().backward()
    optimizer.step()
    (layer,) = optimizer.tracker.record().layers
    assert layer.total.updates > 0
    assert layer.total.scale_steps == 0
