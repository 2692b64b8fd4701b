"""What tests of the compiled kernels share: formats and numbers that are hard, and what plain torch makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from weightflip import functional, kernels
from weightflip.counting import batch
from weightflip.formats import FloatFormat

QUANTIZERS = [
    "float8_e4m3",
    "float8_e4m3:row",
    "float8_e5m2:pow2",
    "float8_e5m2:row:pow2",
    *(f"e{e}m{7 - e}" for e in range(6)),
    *(f"e{e}m{15 - e}:row" for e in range(6)),
    "e5m0",
    "e2m1:none",
    "e4m3:none",
    "e1m1",
    FloatFormat("e5m0 of an even bias", 5, 0, 14),
    "bfloat16",
    "float16",
    "int8",
    "int4",
    "int2",
]
NAN, INF = float("nan"), float("inf")


def hard_numbers() -> Tensor:
    """Every bfloat16 as a float32 (so all ties of formats with up to 6 mantissa bits), and its two neighbors."""
    bits = torch.arange(1 << 16, dtype=torch.int32) << 16
    return torch.cat([bits - 1, bits, bits + 1]).view(torch.float32)


def with_special(weight: Tensor) -> Tensor:
    weight = weight.clone()
    weight[0, :6] = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0])
    return weight


def gradient_of(weight: Tensor, generator: torch.Generator) -> Tensor:
    """In float32 on the CPU, laid out as the weight, with zeros of both signs and NaN."""
    gradient = torch.empty_like(weight, dtype=torch.float32, device="cpu").normal_(generator=generator)
    for share, value in ((0.3, 0.0), (0.1, -0.0), (0.1, NAN)):
        gradient[torch.rand(weight.shape, generator=generator) < share] = value
    return gradient


def eager(quantizer) -> functional.Encoding:
    return functional.Encoding(quantizer, kernels.ScratchPool(), "eager")


def codes_of(weight: Tensor, quantizer) -> tuple[Tensor, Tensor | None]:
    codes = torch.empty_like(weight, dtype=quantizer.code_dtype(weight))
    return codes, functional.encode_into(weight, eager(quantizer), codes)


def scale_codes_of(weight: Tensor, quantizer, scale: Tensor) -> Tensor:
    """What is stored of the scales of groups: one for each block."""
    return quantizer.scale_codes(quantizer.block_scales(scale, weight.shape))


def stale_codes(weight: Tensor, quantizer, generator: torch.Generator) -> Tensor:
    """Codes of which about half are the weight's."""
    old, _ = codes_of(weight, quantizer)
    old[(torch.rand(weight.shape, generator=generator) < 0.5).to(weight.device)] += 1
    return old


def by_eager(weight: Tensor, quantizer, old: Tensor, update: Tensor | None, counted=(5, 6, 7)):
    """Codes, counts (added to what was counted before) and scale."""
    codes, counts = old.clone(), torch.tensor(counted, device=weight.device)
    scale = functional.advance(weight, eager(quantizer), codes, update, counts)
    return codes, counts, scale


class OneByOneCase(NamedTuple):
    """A weight with what it had before, and what plain torch makes of it."""

    weight: Tensor
    update: Tensor | None
    old: Tensor
    old_scale_codes: Tensor | None
    codes: Tensor
    counts: list[int]
    scale: Tensor | None
    scale_changes: int


def each_one_by_one(
    weights: Iterable[Tensor], quantizer, generator: torch.Generator, *, cuts_blocks: bool = False
) -> list[OneByOneCase]:
    """Those of the weights that the groups fit, changed since they were encoded; every fourth has no update.

    With ``cuts_blocks``, blocks may be smaller at the end of a row.
    """
    found = []
    for i, weight in enumerate(weights):
        # A row that is shorter than a tile is one, though a smaller one.
        is_cut = cuts_blocks and quantizer.tile is not None
        is_one_block = is_cut or (quantizer.tile is not None and weight.ndim > 0 and weight.shape[-1] < quantizer.group)
        if quantizer.group and not is_one_block and (weight.ndim == 0 or weight.shape[-1] % quantizer.group):
            continue
        old, old_scale = codes_of(weight, quantizer)
        weight.mul_((torch.rand(weight.shape, generator=generator) + 0.5).to(weight.device))
        update = None if i % 4 == 1 else gradient_of(weight, generator).to(weight.device, weight.dtype)
        codes, counts, scale = by_eager(weight, quantizer, old, update, (0, 0, 0))
        old_scale_codes, changes = None, 0
        if quantizer.group:
            old_scale_codes = scale_codes_of(weight, quantizer, old_scale)
            changes = int(torch.count_nonzero(scale_codes_of(weight, quantizer, scale) != old_scale_codes))
        found.append(OneByOneCase(weight, update, old, old_scale_codes, codes, counts.tolist(), scale, changes))
    assert len(found) >= 8
    return found


def assert_batch_equals_one_by_one(wanted: list[OneByOneCase], quantizer, backend: str, run: type[kernels.Run]) -> None:
    """A batch of the weights, counted in one call by this kernel, is each of them alone."""
    members = []
    for alone in wanted:
        member = batch.make_member(alone.weight, quantizer, alone.old.clone(), backend, with_updates=True)
        assert member.run is run
        if quantizer.group:
            member.scale_codes.copy_(alone.old_scale_codes)
        members.append(member)
    together = batch.Batch(members, with_updates=True)
    counted = together.advance([0 if alone.update is None else alone.update.data_ptr() for alone in wanted])
    assert counted.failed == []
    for member, alone in zip(members, wanted, strict=True):
        assert torch.equal(member.codes, alone.codes)
        if quantizer.group:
            assert torch.equal(member.scale_codes, scale_codes_of(alone.weight, quantizer, alone.scale))
    assert counted.counts.tolist() == [alone.counts for alone in wanted]
    assert counted.scale_changes.tolist() == [alone.scale_changes for alone in wanted]
    assert counted.counts[:, 0].count_nonzero() > 4
