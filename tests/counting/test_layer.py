"""The state of a layer's codes, and of the weight they belong to."""

from __future__ import annotations

from parts import make, opened, weight

from weightflip.counting.layer import CodeState


def test_each_transition():
    parts = make()
    layer = opened(parts, weight("w", "e3m4"))
    tensor = layer.tracked.parameter.detach()
    assert layer.state is CodeState.ABSENT
    layer.invalidate()
    assert layer.state is CodeState.ABSENT
    layer.mark_encoded(tensor)
    assert layer.state is CodeState.FRESH
    layer.mark_counted(tensor)
    assert layer.state is CodeState.KEPT
    layer.invalidate()
    assert (layer.state, layer.stamp) == (CodeState.STALE, None)
    layer.mark_encoded(tensor)
    layer.mark_counted(tensor, has_state=True)
    assert layer.state is CodeState.STALE
    layer.mark_encoded(tensor)
    layer.drop_codes()
    assert layer.state is CodeState.ABSENT
    assert layer.is_unwritten(layer.tracked.parameter, tensor)  # of use where a scale is shared
    parts.layers.fail("w", ValueError("no"))
    for action in (layer.invalidate, layer.drop_codes):
        action()
        assert layer.state is CodeState.FAILED
