"""torchao's PARQ: an optimizer whose step quantizes the weights themselves."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same
from torch import nn

from weightflip import FlipTrackingOptimizer, track_flips

pytest.importorskip("torchao")

from torchao.prototype.parq.optim import ProxHardQuant, ProxPARQ, QuantOptimizer
from torchao.prototype.parq.quant import LSBQuantizer, UnifQuantizer

QUANTIZERS = {"uniform": UnifQuantizer, "least squares": LSBQuantizer}
LAYOUTS = {
    "tensor": ({}, {}),
    "channel": ({}, {"quant_per_channel": True}),
    "block": ({"quant_block_size": 16}, {"quant_per_channel": True}),
}


def built(quantizer=UnifQuantizer, layout="tensor", warmup_steps=3, bits=2, prox=ProxHardQuant):
    of_group, options = LAYOUTS[layout]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10), nn.Linear(10, 10))
    groups = [
        {"params": [model[0].weight, model[2].weight], "quant_bits": bits, **of_group},
        {"params": [model[0].bias, model[2].bias, *model[3].parameters()]},
    ]
    inner = QuantOptimizer(
        torch.optim.SGD(groups, lr=0.2, momentum=0.9),
        quantizer(),
        prox(),
        warmup_steps=warmup_steps,
        quant_period=4,
        **options,
    )
    return model, inner


def train(model, optimizer, before=lambda: None, after=lambda: None, steps=20):
    losses = []
    for step in range(steps):
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x[:, :10]).square().mean()
        loss.backward()
        before()
        optimizer.step()
        after()
        losses.append(loss.detach())
    return losses


def levels(parameter, state):
    """The index of each quantized value among the levels of its row, block or tensor; None before levels exist."""
    if "quants" not in state.get(parameter, {}):
        return None
    quants = state[parameter]["quants"].view(-1, state[parameter]["quants"].shape[-1])
    rows = parameter.detach().reshape(quants.shape[0], -1)
    distance = (rows.unsqueeze(-1) - quants.unsqueeze(1)).abs()
    assert distance.amin(-1).max() < 1e-6, "after a step with hard quantization every weight is one of the levels"
    return distance.argmin(-1)


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_counts_equal_brute_force_and_training_is_unchanged(quantizer, layout, warmup_steps):
    bare, bare_optimizer = built(QUANTIZERS[quantizer], layout, warmup_steps)
    model, inner = built(QUANTIZERS[quantizer], layout, warmup_steps)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[])
    assert {name: quantizer for name, (_, _, quantizer) in optimizer.info.tracked.items()} == {
        "0.weight": "parq_2bit",
        "2.weight": "parq_2bit",
    }
    assert "high precision" in optimizer.info.skipped["3.weight"]
    weights = {"0.weight": model[0].weight, "2.weight": model[2].weight}
    flips, old = dict.fromkeys(weights, 0), {}

    def before():
        old.update({name: levels(weight, inner.state) for name, weight in weights.items()})

    def after():
        for name, weight in weights.items():
            if old[name] is not None:
                flips[name] += int((levels(weight, inner.state) != old[name]).sum())

    losses = train(model, optimizer, before, after)
    assert_same(losses, train(bare, bare_optimizer))
    assert_same(dict(model.state_dict()), dict(bare.state_dict()))
    counts = optimizer.tracker.get_flip_counts()
    assert {name: counts[name] for name in weights} == flips
    assert flips["0.weight"] > 0
    # The step that computes the first levels is the baseline.
    first = next(layer for layer in optimizer.tracker.record().layers if layer.name == "0.weight")
    assert first.total.weight_steps == (20 - warmup_steps - 1) * model[0].weight.numel()


def test_moving_all_levels_causes_no_flips():
    model, inner = built(warmup_steps=0)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[])
    train(model, optimizer, steps=2)
    (quantizer,) = (w.quantizer for w in optimizer._session.weights.tracked if w.name == "0.weight")
    before = quantizer.encode(model[0].weight.detach()).ordinals
    assert before.unique().tolist() == [-2, -1, 0, 1]
    with torch.no_grad():
        model[0].weight.mul_(0.9)
        inner.state[model[0].weight]["quants"].mul_(0.9)
    assert torch.equal(quantizer.encode(model[0].weight.detach()).ordinals, before)


def test_soft_quantization_uses_the_nearest_level():
    model, inner = built(prox=lambda: ProxPARQ(anneal_start=0, anneal_end=30), warmup_steps=0)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[])
    train(model, optimizer, steps=5)
    (quantizer,) = (w.quantizer for w in optimizer._session.weights.tracked if w.name == "0.weight")
    quants = inner.state[model[0].weight]["quants"]
    nearest = (model[0].weight.detach().unsqueeze(-1) - quants).abs().argmin(-1) - 2
    assert torch.equal(quantizer.encode(model[0].weight.detach()).ordinals.long(), nearest)


def test_hooks_would_run_before_the_weights_are_quantized():
    model, inner = built()
    with pytest.raises(TypeError, match=r"use FlipTrackingOptimizer\(optimizer, model\)"):
        track_flips(inner, model, sinks=[])
