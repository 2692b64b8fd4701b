"""The tracker's parts, assembled without a tracker."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from weightflip import kernels
from weightflip.counting.batched import BatchedRoute
from weightflip.counting.columns import Columns
from weightflip.counting.current import CurrentLayers
from weightflip.counting.layer import TrackedWeight
from weightflip.counting.metric_runner import MetricRunner
from weightflip.counting.notices import Notices
from weightflip.counting.routes import ElementwiseRoute, WholeWeightRoute
from weightflip.counting.schedule import Schedule
from weightflip.counting.silent_writes import SilentWrites
from weightflip.counting.table import LayerTable
from weightflip.counting.totals import Totals
from weightflip.counting.unsharded import UnshardedRun
from weightflip.metrics.columns import make_groups
from weightflip.quantizers import resolve


def make(*metrics: str, backend: str = "auto") -> SimpleNamespace:
    _, groups = make_groups(("flips", *metrics), None)
    parts = SimpleNamespace(groups=groups, columns=Columns(groups), schedule=Schedule(), notices=Notices())
    parts.scratch = kernels.ScratchPool()
    parts.layers = LayerTable(parts.columns, parts.schedule, parts.notices)
    parts.runner = MetricRunner(groups, parts.schedule, parts.notices, parts.scratch, backend)
    alone = (parts.layers, parts.runner, parts.scratch, backend, True)
    parts.elementwise, parts.whole = ElementwiseRoute(*alone), WholeWeightRoute(*alone)
    parts.batched = BatchedRoute(parts.layers, parts.elementwise, parts.runner, backend, True)
    parts.current = CurrentLayers(parts.layers, (parts.batched, parts.elementwise, parts.whole))
    parts.silent = SilentWrites(parts.layers, parts.notices)
    parts.totals = Totals(parts.columns, parts.layers, parts.schedule, parts.silent)
    parts.sharding = UnshardedRun(parts.layers, parts.columns)
    return parts


def weight(name: str, quantizer: object, shape: tuple[int, ...] = (8, 64)) -> TrackedWeight:
    generator = torch.Generator().manual_seed(len(name))
    parameter = torch.nn.Parameter(torch.randn(shape, generator=generator))
    parameter.grad = torch.randn(shape, generator=generator)
    return TrackedWeight(name, parameter, resolve(quantizer))


def opened(parts: SimpleNamespace, tracked: TrackedWeight):
    layer = parts.layers.open(tracked, *tracked.unwrapped())
    layer.tracked = tracked
    return layer


def commit(parts: SimpleNamespace, valid: torch.Tensor | None = None) -> None:
    """Finish a step."""
    parts.layers.prepare(valid)
    parts.schedule.progress = parts.schedule.progress.next(valid)._replace(is_committed=False)
    parts.layers.commit()
