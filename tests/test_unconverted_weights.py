"""Weights that torchao leaves in high precision alongside converted layers are not counted."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from conftest import float8_values
from torch import nn
from torchao.float8 import Float8LinearConfig, convert_to_float8_training
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from weightflip import FlipTrackingOptimizer, track_flips

REASON = "left in high precision by torchao, which converted other layers"


def float8(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 10)).to(dtype)
    config = Float8LinearConfig(emulate=True)
    return convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name != "3")


def qat():
    model = nn.Sequential(nn.Embedding(8, 32), nn.Linear(32, 32))
    config = IntxFakeQuantizeConfig(torch.int4, group_size=32)
    quantize_(model, QATConfig(weight_config=config, step="prepare"), filter_fn=lambda m, _: isinstance(m, nn.Linear))
    return model


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("model", "plain"),
    [(float8(), "3.weight"), (float8(torch.bfloat16), "3.weight"), (qat(), "0.weight")],
    ids=["float8", "float8 of bfloat16", "qat"],
)
def test_unconverted_weights_are_skipped_with_a_log_line(model, plain, caplog):
    caplog.set_level(logging.WARNING, "weightflip")
    optimizer = FlipTrackingOptimizer(sgd(model.parameters()), model, sinks=[])
    assert plain not in optimizer.info.tracked
    assert optimizer.info.skipped[plain] == REASON
    assert not any("float8" in message for message in caplog.messages), "no word on a format that nobody sees"
    (message,) = (message for message in caplog.messages if plain in message)
    assert "quantizer=" in message
    assert message.removeprefix("weightflip: ") in optimizer.info.notes

    # A copy does not hold the model.
    twin = copy.deepcopy(optimizer)
    twin.step()
    assert twin.info.tracked == optimizer.info.tracked
    assert twin.info.skipped[plain] == REASON


def test_the_model_total_covers_only_converted_layers():
    model = float8()
    optimizer = FlipTrackingOptimizer(sgd(model.parameters()), model, sinks=[])
    flips = 0
    for _ in range(3):
        model(torch.randn(16, 32)).square().sum().backward()
        old = [float8_values(model[i].weight.clone()) for i in (0, 2)]
        optimizer.step()
        flips += sum(
            int((float8_values(model[i].weight) != before).sum()) for i, before in zip((0, 2), old, strict=True)
        )
        optimizer.zero_grad()
    record = optimizer.tracker.record()
    assert (record.model.weights, record.model.total.flips) == (2 * 32 * 32, flips)
    assert flips > 0


def test_unconverted_weights_can_be_requested():
    model = float8()
    for options in (
        {"quantizer": {"3.*": "bfloat16", "*": "auto"}},
        {"include": "*.weight"},
        {"quantizer": ["auto", "bfloat16"]},
    ):
        optimizer = FlipTrackingOptimizer(sgd(model.parameters()), model, sinks=[], **options)
        assert any(name.startswith("3.weight") for name in optimizer.info.tracked), options


def test_an_optimizer_with_only_unconverted_weights():
    model = float8()
    first = FlipTrackingOptimizer(sgd([model[0].weight, model[2].weight]), model, sinks=[])
    second = track_flips(sgd(model[3].parameters()), model, sinks=first)
    assert second.info.skipped["3.weight"] == REASON
    for options in ({}, {"exclude": "*.bias"}):
        alone = FlipTrackingOptimizer(sgd(model[3].parameters()), model, sinks=[], **options)
        assert alone.info.tracked == {}
        assert alone.info.skipped["3.weight"] == REASON


def test_frozen_converted_layers_do_not_count_as_converted():
    """As in LoRA: a frozen, converted base and adapters in high precision."""
    model = float8()
    for layer in (model[0], model[2]):
        layer.weight.requires_grad_(False)
    optimizer = FlipTrackingOptimizer(sgd(model.parameters()), model, sinks=[])
    assert list(optimizer.info.tracked) == ["3.weight"]


def test_a_model_that_is_converted_later():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 10))
    optimizer = FlipTrackingOptimizer(sgd(model.parameters()), model, sinks=[])
    assert list(optimizer.info.tracked) == ["0.weight", "1.weight"]
    config = Float8LinearConfig(emulate=True)
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name != "1")
    model(torch.randn(16, 32)).square().sum().backward()
    optimizer.step()
    assert list(optimizer.info.tracked) == ["0.weight"]
    assert list(optimizer.tracker.get_flip_counts()) == ["0.weight"]
