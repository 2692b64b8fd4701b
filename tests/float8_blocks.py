"""Shared by tests of blockwise float8: torchao's casts and its layer, and both formulas in their simplest form."""

from __future__ import annotations

import ast
import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from weightflip.quantizers.ordinals import STORED_FORMATS

NAMES = ["float8_e4m3:1x128", "float8_e4m3:1x128:pow2", "float8_e4m3:128x128", "float8_e4m3:128x128:pow2"]


def of_torchao(module: str, *names: str, **given: Any) -> ModuleType:
    """Load functions and classes from torchao's source without the rest of their module, which imports Triton.

    Args:
        module: Its name.
        names: What to load, in any order; may include constants.
        given: Other names that they need.
    """
    package = importlib.util.find_spec("torchao")
    assert package is not None
    assert package.submodule_search_locations is not None
    path = Path(package.submodule_search_locations[0], *module.split(".")[1:]).with_suffix(".py")
    wanted = []
    for node in ast.parse(path.read_text()).body:
        targets = [getattr(target, "id", None) for target in node.targets] if isinstance(node, ast.Assign) else []
        if getattr(node, "name", None) in names or set(targets) & set(names):
            wanted.append(node)
    found = ModuleType(module)
    vars(found).update(torch=torch, nn=nn, **given)
    exec(compile(ast.Module(wanted, []), str(path), "exec"), vars(found))
    assert set(names) <= set(vars(found))
    return found


def rows_of(name: str) -> int:
    return 128 if "128x128" in name else 1


def blocks(weight: Tensor, rows: int) -> list[tuple[slice, slice]]:
    """The positions of the blocks of a matrix, including smaller ones at its edges."""
    height, width = weight.shape
    return [
        (slice(i, min(i + rows, height)), slice(j, min(j + 128, width)))
        for i in range(0, height, rows)
        for j in range(0, width, 128)
    ]


def scale_of(block: Tensor, name: str) -> float:
    """What a block is multiplied by: 448 / amax, or the largest power of two with which nothing exceeds 448."""
    amax = float(block.abs().max())
    if math.isnan(amax):
        return math.nan
    amax = max(amax, 1e-12)
    if not name.endswith("pow2") or math.isinf(amax):
        return float(torch.tensor(448.0 / amax, dtype=torch.float32))
    exponent = math.frexp(amax)[1] - 10
    while 448.0 * 2.0**exponent < amax:
        exponent += 1
    return 2.0**-exponent


def plain(weight: Tensor, name: str, *, divided: bool = False) -> tuple[Tensor, Tensor]:
    """Compute float8 values (as float32) and the factor of each weight, block by block.

    Args:
        weight: A matrix.
        name: The name of the quantizer.
        divided: Divide by ``amax / 448`` instead of multiplying by ``448 / amax``.
    """
    values, scales = torch.empty(weight.shape), torch.empty(weight.shape)
    for at in blocks(weight, rows_of(name)):
        block, scale = weight[at].float(), scale_of(weight[at], name)
        if divided:
            scaled = block / torch.tensor(1 / scale if "pow2" in name else max(float(block.abs().max()), 1e-12) / 448.0)
        else:
            scaled = block * torch.tensor(scale)
        values[at] = scaled.clamp(-448, 448).to(torch.float8_e4m3fn).float()
        scales[at] = scale
    return values, scales


def values_of(ordinals: Tensor) -> Tensor:
    """The number that each ordinal of E4M3 stands for."""
    format = STORED_FORMATS[torch.float8_e4m3fn]
    table = torch.tensor([math.nan, *format.values])
    index = ordinals.long() + format.max_ordinal + 1
    return table[torch.where(ordinals == format.nan_ordinal, 0, index)]


def changed(old: Tensor, new: Tensor) -> Tensor:
    return (old != new) & ~(old.isnan() & new.isnan())
