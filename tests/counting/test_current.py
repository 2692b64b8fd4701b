"""The layers of a step: each has codes, and the route that encoded a layer also counts it."""

from __future__ import annotations

import copy

import torch
from parts import commit, make, weight

from weightflip.counting.layer import CodeState


def begin(parts, weights, *, force=False):
    parts.current.set_layers(parts.current.encode_current(weights, parts.sharding, force=force))
    return [(layer.name, layer.state) for layer in parts.current]


def step(parts, weights):
    begin(parts, weights)
    parts.layers.begin_step()
    with torch.no_grad():
        for tracked in weights:
            tracked.parameter.mul_(-1)
    parts.current.count({}, None)
    commit(parts)


def flips(parts):
    return {name: parts.columns.counts(row).flips for name, row in parts.totals.rows()[1].items()}


def test_each_route_counts_its_layers_in_the_order_of_the_weights():
    parts = make()
    weights = [weight("a", "float8_e4m3"), weight("bb", "ternary"), weight("ccc", lambda w: w.sign())]
    expected = {
        tracked.name: int((tracked.plain() != 0).sum() if tracked.name != "bb" else (codes(tracked) != 0).sum())
        for tracked in weights
    }
    assert begin(parts, weights) == [(name, CodeState.FRESH) for name in ("a", "bb", "ccc")]
    routes = [layer.route for layer in parts.current]
    assert routes == [parts.batched, parts.elementwise, parts.whole]
    step(parts, weights)
    assert flips(parts) == expected


def codes(tracked):
    return tracked.quantizer.encode(tracked.plain()).ordinals


def test_weights_are_encoded_again_only_if_necessary():
    parts, weights = make(), [weight("a", "float8_e4m3"), weight("bb", "ternary")]
    step(parts, weights)
    assert begin(parts, weights) == [("a", CodeState.KEPT), ("bb", CodeState.KEPT)]
    assert begin(parts, weights, force=True) == [("a", CodeState.FRESH), ("bb", CodeState.FRESH)]
    step(parts, weights)
    with torch.no_grad():
        weights[1].parameter.mul_(-1)
    assert begin(parts, weights) == [("a", CodeState.KEPT), ("bb", CodeState.FRESH)]


def test_other_layers_continue_without_one_that_fails():
    parts, weights = make(), [weight("a", "float8_e4m3"), weight("bb", "ternary")]
    step(parts, weights)
    parts.layers.fail("a", ValueError("it broke"))
    parts.current.drop_failed()
    assert [layer.name for layer in parts.current] == ["bb"]
    assert [layer.name for layer in parts.current.encode_current(weights, parts.sharding, force=False)] == ["bb"]


def test_a_copy_holds_no_step():
    parts, weights = make(), [weight("a", "float8_e4m3")]
    begin(parts, weights)
    assert parts.current
    assert not copy.copy(parts.current)
    parts.current.clear()
    assert not parts.current
