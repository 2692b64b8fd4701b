"""Torchao's tensor subclasses: master copies are encoded as training casts them, stored codes are read."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from conftest import assert_same, gaussian, plan_of, with_outliers
from torch import nn

from weightflip import FlipTrackingOptimizer, track_flips
from weightflip.quantizers.torchao import MasterCopyQuantizer, StoredCodes
from weightflip.selection import QuantizerSources, Selection, make_plan

pytest.importorskip("torchao")

from torchao.float8 import Float8LinearConfig, convert_to_float8_training, float8_linear
from torchao.float8.float8_training_tensor import GemmInputRole
from torchao.optim import _AdamW
from torchao.prototype.moe_training.config import Float8TrainingOpConfig
from torchao.prototype.quantized_training import (
    Int8MixedPrecisionTrainingConfig,
    bitnet,
    bitnet_training,
    int8_mixed_precision,
    int8_weight_only_quantized_training,
    quantize_int8_rowwise,
)
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, quantize_
from torchao.utils import TorchAOBaseTensor

ROWS, COLUMNS = 48, 32


def initial() -> torch.Tensor:
    return gaussian(ROWS, COLUMNS) * 0.02


def outliers() -> torch.Tensor:
    return with_outliers(initial())


def mixed() -> torch.Tensor:
    """Rows of every magnitude, zeros of both signs, a row of zeros, subnormal numbers."""
    weight = gaussian(ROWS, COLUMNS) * torch.logspace(-12, 6, ROWS).unsqueeze(1)
    weight[:, ::5], weight[:, 1::7], weight[3], weight[4] = 0.0, -0.0, weight[3] * 1e-35, 0.0
    return weight


WEIGHTS = [initial, outliers, mixed]


def quantized(config):
    def convert(model):
        quantize_(model, config())
        return model

    return convert


def float8_all_gather(model):
    return convert_to_float8_training(model, config=Float8LinearConfig(enable_fsdp_float8_all_gather=True))


FLOAT8 = {
    "float8 rowwise": (quantized(Float8TrainingOpConfig), "float8_e4m3:row:pow2"),
    "float8 tensorwise": (
        quantized(lambda: Float8TrainingOpConfig(float8_linear_recipe="tensorwise")),
        "float8_e4m3",
    ),
    "float8 all-gather": (float8_all_gather, "float8_e4m3"),
}
INTEGER = {
    "bitnet": (quantized(bitnet_training), "ternary"),
    "int8 mixed precision": (quantized(Int8MixedPrecisionTrainingConfig), "int8_mixed_precision"),
    "int8 mixed precision, module": (
        quantized(lambda: Int8MixedPrecisionTrainingConfig(module_swap=True)),
        "int8_mixed_precision",
    ),
}
MASTERS = {**FLOAT8, **INTEGER}


def layers(convert, weight=initial, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(COLUMNS, ROWS, bias=False, dtype=dtype), nn.ReLU(), nn.Linear(ROWS, 16, dtype=dtype)
    )
    with torch.no_grad():
        model[0].weight.copy_(weight())
        model[2].weight.copy_(gaussian(16, ROWS, seed=2) * 0.1)
    return convert(model)


@pytest.fixture
def casts(monkeypatch):
    """Records what torchao casts its weights to in forward, in the order of the layers: float8 bits or integers."""
    found = []
    float8, ternary, int8 = (
        float8_linear.hp_tensor_to_float8_dynamic,
        bitnet.quantize_bitnet_weight,
        int8_mixed_precision.quantize_int8_rowwise,
    )

    def spy_float8(*args, **kwargs):
        result = float8(*args, **kwargs)
        if kwargs["gemm_input_role"] is GemmInputRole.WEIGHT:
            found.append(result._data.t())
        return result

    def spy_ternary(*args, **kwargs):
        found.append(ternary(*args, **kwargs))
        return found[-1]

    def spy_int8(tensor, *args, **kwargs):
        result = int8(tensor, *args, **kwargs)
        if len(calls) % 2:  # the input comes first
            found.append(result[0])
        calls.append(tensor)
        return result

    calls = []
    monkeypatch.setattr(float8_linear, "hp_tensor_to_float8_dynamic", spy_float8)
    monkeypatch.setattr(bitnet, "quantize_bitnet_weight", spy_ternary)
    monkeypatch.setattr(int8_mixed_precision, "quantize_int8_rowwise", spy_int8)
    return found


def as_integers(data):
    if data.dtype is torch.int8:
        return data.numpy().astype(np.int64)
    bits = data.contiguous().view(torch.uint8).numpy().astype(np.int64)
    magnitude = bits & 0x7F
    return np.where(magnitude == 0x7F, 127, np.where(bits >= 0x80, -magnitude, magnitude))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("kind", MASTERS)
def test_codes_equal_those_of_forward(kind, weight, dtype, casts):
    convert, name = MASTERS[kind]
    model = layers(convert, weight, dtype)
    plan = plan_of(model)
    assert {key: str(quantizer) for key, quantizer in plan.tracked.items()} == {"0.weight": name, "2.weight": name}
    codes = {key: quantizer.encode(model.get_parameter(key).detach()) for key, quantizer in plan.tracked.items()}
    for cast, (key, found) in zip(stored_or_cast(model, casts), codes.items(), strict=True):
        np.testing.assert_array_equal(found.ordinals.numpy(), cast, err_msg=key)


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (7, 5), (33, 31)])
def test_odd_shapes(shape):
    weight = gaussian(*shape)
    model = quantized(Int8MixedPrecisionTrainingConfig)(nn.Sequential(nn.Linear(shape[1], shape[0], bias=False)))
    with torch.no_grad():
        model[0].weight.copy_(weight)
    (quantizer,) = plan_of(model).tracked.values()
    codes, (integers, scale) = quantizer.encode(model[0].weight.detach()), quantize_int8_rowwise(weight)
    assert torch.equal(codes.ordinals, integers)
    assert torch.equal(codes.scale, scale.view(-1, 1))


def plain(parameter):
    return getattr(
        parameter, "_data", getattr(parameter, "_tensor", getattr(parameter, "int_data", parameter))
    ).detach()


def data(step):
    return gaussian(32, COLUMNS, seed=step)


def train(model, optimizer, steps=20, before=None, after=None):
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        x = data(step)
        loss = (model(x).float() - x[:, :16]).square().mean()
        loss.backward()
        if before is not None:
            before()
        optimizer.step()
        if after is not None:
            after()
        losses.append(loss.detach())
    return losses


def stored_or_cast(model, casts):
    """The codes of both layers: stored, or cast in forward."""
    if hasattr(model[0].weight, "int_data"):
        return [as_integers(model[i].weight.int_data.clone()) for i in (0, 2)]
    if type(model[0].weight).__name__ == "Int8MixedPrecisionTrainingLinearWeight":
        # torchao 0.18 never reaches the cast that this class is for.
        return [as_integers(quantize_int8_rowwise(model[i].weight._data)[0]) for i in (0, 2)]
    casts.clear()
    with torch.no_grad():
        model(data(0).to(model[0].weight.dtype))
    assert len(casts) == 2
    found = [as_integers(cast) for cast in casts]
    casts.clear()
    return found


STORED = {"int8 stored": (quantized(int8_weight_only_quantized_training), "stored_int8")}


@pytest.mark.parametrize("form", ["wrapper", "hooks"])
@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW], ids=["sgd", "adamw"])
@pytest.mark.parametrize("kind", [*MASTERS, *STORED])
def test_counts_equal_brute_force_and_training_is_unchanged(kind, make, form, casts):
    convert, name = {**MASTERS, **STORED}[kind]
    options = {"lr": 0.05} if make is torch.optim.SGD else {"lr": 3e-3}
    if kind in STORED and make is torch.optim.AdamW:
        make = _AdamW

    def run(model, optimizer):
        """Train 20 steps and count flips and updates by cloning everything."""
        flips, updates, old = [0, 0], 0, []

        def before():
            nonlocal updates
            old[:] = stored_or_cast(model, casts)
            updates += int((model[0].weight.grad != 0).sum())

        def after():
            for i, (then, now) in enumerate(zip(old, stored_or_cast(model, casts), strict=True)):
                flips[i] += int((then != now).sum())

        torch.manual_seed(1)  # int8 weights are rounded stochastically
        losses = train(model, optimizer, 20, before, after)
        values = [plain(parameter).clone() for parameter in model.parameters()]
        return flips, updates, (losses, values, torch.get_rng_state())

    bare = layers(convert)
    bare_optimizer = make(bare.parameters(), **options)
    _, _, expected = run(bare, bare_optimizer)

    model = layers(convert)
    inner = optimizer = make(model.parameters(), **options)
    if form == "wrapper":
        optimizer = FlipTrackingOptimizer(inner, model, sinks=[])
        tracker, info = optimizer.tracker, optimizer.info
    else:
        handle = track_flips(inner, model, sinks=[])
        tracker, info = handle.tracker, handle.info
    flips, updates, result = run(model, optimizer)
    assert_same(result, expected)
    assert {quantizer for _, _, quantizer in info.tracked.values()} == {name}
    assert list(tracker.get_flip_counts().values()) == flips
    assert all(flips)
    assert tracker.get_update_counts()["0.weight"] == updates
    assert [layer.nonfinite for layer in tracker.record().layers] == [0, 0]


@pytest.mark.parametrize("kind", [*MASTERS, *STORED])
def test_non_finite_weights_are_counted(kind):
    convert, _ = {**MASTERS, **STORED}[kind]
    model = layers(convert)
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, sinks=[])
    train(model, optimizer, 1)
    weight = model[0].weight
    with torch.no_grad():
        if kind in STORED:
            weight.scale[0] = math.nan
        else:
            getattr(weight, "_data", getattr(weight, "_tensor", weight))[0, 0] = math.nan
    assert optimizer.tracker.record().layers[0].nonfinite == (COLUMNS if kind in STORED else 1)


def test_a_write_between_two_steps_is_not_a_flip():
    for convert, _ in {**MASTERS, **STORED}.values():
        model = layers(convert)
        optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, sinks=[])
        train(model, optimizer, 1)
        first = optimizer.tracker.get_flip_counts()["0.weight"]
        with torch.no_grad():
            model[0].weight.copy_(-initial())
        before = plan_of(model).tracked["0.weight"].encode(model[0].weight.detach()).ordinals.clone()
        train(model, optimizer, 1)
        after = plan_of(model).tracked["0.weight"].encode(model[0].weight.detach()).ordinals
        # Even a step of size 0 rounds int8 weights again.
        assert optimizer.tracker.get_flip_counts()["0.weight"] - first == int((before != after).sum())


def test_stored_codes_of_other_subclasses_are_read():
    model = nn.Linear(64, 16, bias=False)
    for config, name in ((Int8WeightOnlyConfig(), "stored_int8"), (IntxWeightOnlyConfig(torch.int4), "stored_int8")):
        layer = copy.deepcopy(model)
        quantize_(layer, config)
        weight = nn.Parameter(layer.weight.detach(), requires_grad=True)
        ((quantizer,),) = make_plan({"weight": weight}, QuantizerSources(), Selection()).tracked.values()
        assert (type(quantizer), str(quantizer)) == (StoredCodes, name)
        codes = quantizer.encode(weight.detach())
        values = codes.ordinals * codes.scale
        torch.testing.assert_close(values, weight.dequantize())


def test_a_named_format_encodes_the_master_copy():
    for kind, (convert, _) in MASTERS.items():
        model = layers(convert)
        optimizer = FlipTrackingOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05), model, quantizer="e3m4:row", sinks=[]
        )
        assert {quantizer for _, _, quantizer in optimizer.info.tracked.values()} == {"e3m4:row"}
        train(model, optimizer, 3)
        assert optimizer.tracker.get_flip_counts()["0.weight"] > 0, kind


def test_stored_codes_without_a_master_copy_refuse_other_formats():
    model = layers(STORED["int8 stored"][0])
    with pytest.raises(
        ValueError, match=r"'0.weight' cannot be tracked as requested: .*no high-precision copy that e3m4"
    ):
        FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, quantizer="e3m4", sinks=[])


def test_int8_training_without_quantized_forward_is_skipped():
    for module_swap in (False, True):
        config = Int8MixedPrecisionTrainingConfig(output=False, module_swap=module_swap)
        plan = plan_of(layers(quantized(lambda: config)), may_be_empty=True)  # noqa: B023
        assert "output=False" in plan.skipped["0.weight"]


def test_int8_training_that_does_not_reach_its_cast_is_noted():
    model = layers(MASTERS["int8 mixed precision"][0])
    plain_layer = nn.Linear(COLUMNS, ROWS, bias=False)
    plain_layer.weight = nn.Parameter(model[0].weight._data.clone())
    is_plain = torch.equal(model[0](data(0)), plain_layer(data(0)))
    assert any("module_swap=True" in note for note in plan_of(model).notes) == is_plain


def test_experts_are_skipped_with_the_reason():
    from torchao.prototype.moe_training.tensor import Float8TrainingWeightWrapperTensor

    experts = nn.Parameter(Float8TrainingWeightWrapperTensor(gaussian(2, 16, 16), Float8TrainingOpConfig()))
    assert "grouped_mm" in make_plan({"w": experts}, QuantizerSources(), Selection(), may_be_empty=True).skipped["w"]


class Unknown(TorchAOBaseTensor):
    """Built like torchao's own classes, in a module named like torchao's."""

    def __new__(cls, data):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=data.dtype)

    def __init__(self, data):
        self.hidden = data


Unknown.implements(torch.ops.aten.detach.default)(lambda func, types, args, kwargs: args[0])


def test_an_unknown_subclass_is_skipped_and_logged_once(caplog):
    model = nn.Module()
    model.a, model.b = (nn.Parameter(Unknown(torch.ones(4, 4))) for _ in range(2))
    model.c = nn.Linear(4, 4)
    plan = plan_of(model)
    assert list(plan.tracked) == ["c.weight"]
    assert "does not support torchao" in plan.skipped["a"]
    assert len([record for record in caplog.records if "not supported yet" in record.message]) == 1
    with pytest.raises(ValueError, match=r"'a' cannot be tracked as requested: .*does not support torchao"):
        plan_of(model, include="a")
    with pytest.raises(ValueError, match=r"'a' cannot be tracked as requested: .*no high-precision copy"):
        plan_of(model, quantizer={"a": "e3m4", "*": "auto"})


def test_a_name_missing_from_torchao_raises_with_the_version_that_has_it(monkeypatch):
    from torchao.prototype.quantized_training import int8

    weight = layers(MASTERS["int8 mixed precision"][0])[0].weight.detach()
    quantizer = MasterCopyQuantizer(
        "_data", plan_of(layers(MASTERS["int8 mixed precision"][0])).tracked["0.weight"].quantizer
    )
    monkeypatch.delattr(int8, "quantize_int8_rowwise")
    with pytest.raises(ImportError, match=r"quantize_int8_rowwise, which torchao 0\.18 has"):
        quantizer.encode(weight)


# torch cannot copy the other kinds: a deep copy of the bare model raises.
@pytest.mark.parametrize("kind", [*(kind for kind in MASTERS if "wise" not in kind), *STORED])
def test_copies_of_an_optimizer_continue(kind):
    convert, name = {**MASTERS, **STORED}[kind]
    model = layers(convert)
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model, sinks=[])
    train(model, optimizer, 1)
    twin_model, twin = copy.deepcopy((model, optimizer))
    before = twin.tracker.get_update_counts()
    train(twin_model, twin, 1)
    assert {quantizer for _, _, quantizer in twin.info.tracked.values()} == {name}
    after = twin.tracker.get_update_counts()
    assert all(after[layer] > before[layer] for layer in before)


# The module form has an ordinary parameter, in which writes through .data cannot be detected.
@pytest.mark.parametrize("kind", [*(kind for kind in MASTERS if not kind.endswith("module")), *STORED])
def test_writes_to_the_master_copy_are_not_flips(kind):
    convert, _ = {**MASTERS, **STORED}[kind]
    model = layers(convert)
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.0), model, sinks=[])
    train(model, optimizer, 1)
    for p in model.parameters():
        p.grad = None
    before = optimizer.tracker.get_flip_counts()["0.weight"]
    weight = model[0].weight
    inner = next(getattr(weight, name) for name in ("_data", "_tensor", "int_data") if hasattr(weight, name))
    with torch.no_grad():
        inner.mul_(-1)
    optimizer.step()
    assert optimizer.tracker.get_flip_counts()["0.weight"] == before
