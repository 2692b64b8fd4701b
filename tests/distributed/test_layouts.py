"""Layouts of weights over several processes."""

from __future__ import annotations

import pytest
import torch

from weightflip.distributed.layouts import chunk_boundaries, layout


def test_an_ordinary_tensor_has_no_layout():
    assert layout(torch.nn.Parameter(torch.ones(2, 2))) is None


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 8, 9, 64, 100])
@pytest.mark.parametrize("parts", [(2,), (4,), (2, 2), (3, 5)])
def test_borders_are_those_of_chunk(size, parts):
    pieces = [torch.arange(size)]
    for n in parts:
        pieces = [chunk for piece in pieces for chunk in piece.chunk(n)]
    expected = {0, size} | {int(piece[0]) for piece in pieces if len(piece)}
    boundaries = {0, size}
    for n in parts:
        boundaries = chunk_boundaries(boundaries, n)
    assert boundaries == expected
