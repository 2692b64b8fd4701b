"""Stamps: whether a weight was written, replaced, moved or reshaped since some moment."""

from __future__ import annotations

import pytest
import torch

from weightflip.counting.stamps import Stamp, Stamps


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


def _leave(p):
    pass


CHANGES = {
    _leave: True,
    _write: True,
    _move: False,
    _transpose: False,
    _view_in_another_shape: False,
    _view_another_part: False,
    _view_in_another_dtype: False,
}


@pytest.mark.parametrize(("change", "is_in_place"), CHANGES.items())
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


def _parameters(numel=8):
    return [torch.nn.Parameter(torch.ones(numel, 8), requires_grad=False) for _ in CHANGES]


def test_many_weights_at_once_as_one_by_one():
    parameters = [*_parameters(), *_parameters(), *_parameters(0)]
    each = [Stamp.of(parameter, parameter) for parameter in parameters]
    together = Stamps(each)
    assert together.find_moved(parameters) == together.find_written(parameters) == set()
    for parameter, change in zip(parameters, CHANGES, strict=False):
        change(parameter)
    # The same memory, but another parameter, and the same address 0, but other memory.
    parameters[-9] = torch.nn.Parameter(parameters[-9].data, requires_grad=False)
    parameters[-1].data = torch.ones(0, 8)
    pairs = list(enumerate(zip(each, parameters, strict=True)))
    written = {index for index, (stamp, parameter) in pairs if not stamp.is_unwritten(parameter, parameter)}
    assert together.find_written(parameters) == written == {1, 2, 3, 4, 5, 6, len(parameters) - 9, len(parameters) - 1}
    assert together.find_moved(parameters) == {2, 5, len(parameters) - 1}, "only those in other memory"
    for index in (2, 5, len(parameters) - 1):
        each[index] = Stamp.of(parameters[index], parameters[index])
    together = Stamps(each)
    together.update_versions(parameters)
    assert each[1].is_unwritten(parameters[1], parameters[1])
    assert together.find_written(parameters) == {3, 4, 6, len(parameters) - 9}


def test_freed_memory_that_another_weight_reuses():
    freed = 0
    for _ in range(50):
        parameter = torch.nn.Parameter(torch.ones(64, 64))
        address, stamps = parameter.data_ptr(), Stamps([Stamp.of(parameter, parameter)])
        parameter.data = torch.empty(0)
        parameter.data = torch.ones(64, 64)
        freed += parameter.data_ptr() == address
        assert stamps.find_moved([parameter]) == stamps.find_written([parameter]) == {0}
    assert freed, "the allocator reuses memory"
