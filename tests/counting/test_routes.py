"""The counts of each route equal brute force."""

from __future__ import annotations

import pytest
import torch
from parts import commit, make, opened, weight

from weightflip import Codes
from weightflip.counting.layer import CodeState


class Signs:
    """A quantizer that only has encode()."""

    def encode(self, tensor):
        return Codes(tensor.sign().to(torch.int8))

    def __str__(self):
        return "signs"


@pytest.mark.parametrize(
    ("route", "quantizer"),
    [("batched", "float8_e4m3"), ("batched", "mxfp4"), ("elementwise", "ternary"), ("elementwise", "e3m4"),
     ("whole", Signs())],
    ids=str,
)  # fmt: skip
def test_counts_equal_brute_force(route, quantizer):
    parts = make()
    route = getattr(parts, route)
    layers = [opened(parts, weight(name, quantizer)) for name in ("a", "bb")]
    for layer in layers:
        assert route.accepts(layer, *layer.tracked.unwrapped())
    route.encode(layers)
    assert [layer.state for layer in layers] == [CodeState.FRESH] * 2
    before = [layer.tracked.quantizer.encode(layer.tracked.parameter.detach()).ordinals.clone() for layer in layers]
    assert all(torch.equal(layer.codes, codes) for layer, codes in zip(layers, before, strict=True))
    with torch.no_grad():
        for layer in layers:
            layer.tracked.parameter.mul_(torch.linspace(-1, 2, 64))
    parts.layers.begin_step()
    route.count(layers, {}, None)
    assert [layer.state for layer in layers] == [CodeState.KEPT] * 2
    commit(parts)
    steps, rows = parts.totals.rows()
    assert steps == 1
    for layer, codes in zip(layers, before, strict=True):
        after = layer.tracked.quantizer.encode(layer.tracked.parameter.detach()).ordinals
        counts = parts.columns.counts(rows[layer.name])
        assert counts.flips == int((after != codes).sum()) > 0
        assert counts.updates == 512
        assert counts.stalled == 512 - counts.flips
        assert torch.equal(layer.codes, after)


def test_which_route_accepts_which_weight():
    parts = make()
    for quantizer, expected in (("float8_e4m3", (True, True)), ("ternary", (False, True)), (Signs(), (False, False))):
        layer = opened(parts, weight(f"{quantizer}", quantizer))
        found = [route.accepts(layer, *layer.tracked.unwrapped()) for route in (parts.batched, parts.elementwise)]
        assert tuple(found) == expected
    # With metric groups, weights are counted together only if a kernel counts for the groups, too.
    for backend, expected in (("auto", True), ("eager", False)):
        grouped = make("oscillation", backend=backend)
        layer = opened(grouped, weight("w", "float8_e4m3"))
        assert grouped.batched.accepts(layer, *layer.tracked.unwrapped()) is expected


def test_a_fault_only_affects_its_layer():
    class Broken(Signs):
        def encode(self, tensor):
            raise RuntimeError("no codes today")

    parts = make()
    layers = [opened(parts, weight("good", Signs())), opened(parts, weight("bad", Broken()))]
    parts.whole.encode(layers)
    assert [layer.state for layer in layers] == [CodeState.FRESH, CodeState.FAILED]
    assert parts.layers.failed == {"bad"}
    (said,) = parts.notices.take()
    assert "'bad' is no longer tracked, training continues: RuntimeError: no codes today" in said


def test_batches_are_built_once_while_nothing_changes():
    parts = make()
    layers = [opened(parts, weight(name, "float8_e4m3")) for name in ("a", "bb", "ccc")]
    for layer in layers:
        parts.batched.accepts(layer, *layer.tracked.unwrapped())
    parts.batched.encode(layers)
    built = set()
    for _ in range(3):
        parts.batched.count(layers, {}, None)
        built.add(id(parts.batched.batches[0]))
    assert len(built) == 1
    layers[0].tracked.parameter.grad = layers[0].tracked.parameter.grad.to_sparse()
    parts.batched.count(layers, {}, None)
    assert len(parts.batched.batches[0].members) == 2
    assert all(layer.state is CodeState.KEPT for layer in layers)
    parts.batched.release()
    assert parts.batched.batches == []
