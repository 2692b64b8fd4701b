"""The state of a layer's codes, and of the weight they belong to."""

from __future__ import annotations

import pytest
import torch
from parts import make, opened, weight

from weightflip.counting.layer import CodeState, Stamp


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


def _write(p):
    with torch.no_grad():
        p.mul_(2)


def _move(p):
    p.data = p.data.clone()


def _transpose(p):
    p.data = p.data.t()


def _view_in_another_shape(p):
    p.data = p.data.view(16, 4)


def _view_another_part(p):
    p.data = p.data[1:]


def _view_in_another_dtype(p):
    p.data = p.data.view(torch.int32)


@pytest.mark.parametrize(
    ("change", "is_in_place"),
    [
        (lambda p: None, True),
        (_write, True),
        (_move, False),
        (_transpose, False),
        (_view_in_another_shape, False),
        (_view_another_part, False),
        (_view_in_another_dtype, False),
    ],
)
def test_unwritten_memory_is_recognized(change, is_in_place):
    parameter = torch.nn.Parameter(torch.ones(8, 8), requires_grad=False)
    stamp = Stamp.of(parameter, parameter)
    version = parameter._version
    change(parameter)
    assert stamp.is_in_place(parameter) == is_in_place
    assert stamp.is_unwritten(parameter, parameter) == (is_in_place and parameter._version == version)


def test_another_parameter_over_the_same_memory_and_one_without_memory():
    parameter = torch.nn.Parameter(torch.ones(8, 8))
    stamp = Stamp.of(parameter, parameter.detach())
    other = torch.nn.Parameter(parameter.data)
    assert stamp.is_in_place(other)
    assert not stamp.is_unwritten(other, other)
    empty, same = torch.empty(0, 4), torch.empty(0, 4)
    assert Stamp.of(empty, empty).is_in_place(empty)
    assert not Stamp.of(empty, empty).is_in_place(same)
    with torch.inference_mode():
        assert Stamp.of(torch.ones(2), torch.ones(2)) is None
