"""Attributes of layers that are collected once, until a layer changes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from parts import commit, make, weight

from weightflip.counting.collected import CollectedLayers
from weightflip.counting.layer import CodeState, Layer


def _step(parts, weights):
    """Count a step that negates the weights, and return their layers."""
    current = parts.current.encode_current(weights, parts.sharding, force=False)
    parts.current.set_layers(current)
    gradients = parts.current.gradients()
    parts.layers.begin_step()
    with torch.no_grad():
        for tracked in weights:
            tracked.parameter.neg_()
    parts.current.count(gradients, None)
    commit(parts)
    return current


def _counted(parts, *names):
    return _step(parts, [weight(name, "float8_e4m3") for name in names])


CHANGES = {
    "invalidate": lambda layer: layer.invalidate(),
    "drop_codes": lambda layer: layer.drop_codes(),
    "leave_route": lambda layer: layer.leave_route(),
    "fail": lambda layer: layer.fail(),
    "mark_encoded": lambda layer: layer.mark_encoded(layer.tracked.parameter),
    "another weight": lambda layer: setattr(layer, "tracked", weight(layer.name, "float8_e4m3")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_after_each_change_of_a_layer_they_are_collected_again(change):
    layers = _counted(parts := make(), "a", "b")
    collected = CollectedLayers(parts.layers.changes)
    collected.collect(layers)
    stamps = collected.stamps
    assert collected.are_kept
    collected.collect(list(layers))
    assert collected.stamps is stamps, "the same layers, and none has changed"
    change(layers[1])
    collected.collect(layers)
    assert (collected.stamps is not stamps, collected.tracked) == (True, [layer.tracked for layer in layers])
    assert collected.are_kept == (layers[1].state is CodeState.KEPT and layers[1].route is not None)


def test_setting_an_attribute_to_what_it_was_is_no_change():
    layer = _counted(parts := make(), "a")[0]
    number = parts.layers.changes.number
    layer.state, layer.tracked = CodeState.KEPT, layer.tracked
    assert parts.layers.changes.number == number
    parts.layers.put(Layer("b", 4, "e3m4", [], []))
    assert parts.layers.changes.number > number


def test_copies_collect_again_and_share_the_changes_of_their_layers():
    layers = _counted(parts := make(), "a")
    collected = CollectedLayers(parts.layers.changes)
    collected.collect(layers)
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        other, layer = copied((collected, layers[0]))
        assert (other.layers, other.stamps is None, collected.stamps is None) == ([], False, False)
        other.collect([layer])
        assert not other.are_kept
        layer.tracked, layer.stamp = layers[0].tracked, layers[0].stamp
        other.collect([layer])
        assert other.tracked == [layer.tracked]


def test_the_steps_of_a_batch_change_no_layer_until_a_weight_is_written():
    parts, weights = make(), [weight(name, "float8_e4m3") for name in ("a", "bb", "ccc")]
    nonzero = [int((tracked.plain() != 0).sum()) for tracked in weights]
    layers = _step(parts, weights)
    number = parts.layers.changes.number
    for _ in range(3):
        assert _step(parts, weights) is layers
        assert parts.layers.changes.number == number
    with torch.no_grad():
        weights[1].parameter.mul_(-1)
    assert parts.current.encode_current(weights, parts.sharding, force=False) == layers
    assert [layer.state for layer in layers] == [CodeState.KEPT, CodeState.FRESH, CodeState.KEPT]
    _step(parts, weights)
    rows = parts.totals.rows()[1].values()
    assert [parts.columns.counts(row).flips for row in rows] == [5 * number for number in nonzero]


def test_layers_that_are_counted_alone_do_not_slow_the_others_down():
    parts = make()
    weights = [weight("a", "float8_e4m3"), weight("bb", lambda w: w.sign()), weight("ccc", "float8_e4m3")]
    # A batch does not read such a gradient.
    weights[2].parameter.grad = torch.eye(8, 64).to_sparse()
    layers = _step(parts, weights)
    _step(parts, weights)
    number = parts.layers.changes.number
    for _ in range(3):
        assert parts.current._find_outdated(weights) == [1]
        assert _step(parts, weights) == layers
        assert parts.layers.changes.number == number
    counts = [parts.columns.counts(row) for row in parts.totals.rows()[1].values()]
    assert [count.flips for count in counts] == [5 * int((tracked.plain() != 0).sum()) for tracked in weights]
    assert counts[2].updates == 5 * 8


def test_gradients_that_the_step_removes():
    parts, weights = make(), [weight(name, "float8_e4m3") for name in ("a", "bb", "ccc")]
    weights[2].parameter.grad = None
    _step(parts, weights)
    current = parts.current.encode_current(weights, parts.sharding, force=False)
    parts.current.set_layers(current)
    gradients = parts.current.gradients()
    weights[1].parameter.grad, updates = None, weights[1].parameter.grad
    parts.layers.begin_step()
    parts.current.count(gradients, None)
    commit(parts)
    counts = [parts.columns.counts(row) for row in parts.totals.rows()[1].values()]
    of_first = int(torch.count_nonzero(weights[0].parameter.grad))
    assert [count.updates for count in counts] == [2 * of_first, 2 * int(torch.count_nonzero(updates)), 0]
