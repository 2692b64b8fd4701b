"""The base classes of metric groups, and their registry.

To add a group, add a file to this package with a subclass of :class:`Metric` that is decorated with ``@register``. All
modules of the package are imported when the first name is looked up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from weightflip import checks, functional, modules, records
from weightflip.kernels import Index, Pointwise, Sample, ScratchPool, take
from weightflip.quantizers.protocol import ElementwiseQuantizer, Quantizer
from weightflip.records import Kind, Value

CORE_VALUES = tuple(value.name for value in records.CORE_VALUES if value.unit != "count")
"""The names in ``values`` of a record without any metric group."""


class Bins(NamedTuple):
    """A histogram of a metric group.

    Attributes:
        name: Its name in records and tags.
        edges: Finite bin edges in ascending order, one more than there are bins.
    """

    name: str
    edges: tuple[float, ...]


class Weight(NamedTuple):
    """A weight at one moment, as passed to a metric group.

    Attributes:
        values: The weight. For formats with one scale per group of ``g`` adjacent weights, the last dimension is split:
            ``(..., K // g, g)``.
        codes: Its ordinals, in the same shape.
        scale: The scale, which broadcasts to the codes; None for formats without one.
        quantizer: The quantizer that made the codes.
        backend: As in :func:`weightflip.kernels.check_backend`.
        scale_codes: Between steps, the scales of blocks and groups as the format stores them; None for other formats.
    """

    values: Tensor
    codes: Tensor
    scale: Tensor | None
    quantizer: Quantizer
    backend: str = "auto"
    scale_codes: Tensor | None = None

    @property
    def ndim(self) -> int:
        """The number of dimensions of the weight itself."""
        is_split = self.elementwise is not None and self.elementwise.group is not None
        return self.values.ndim - is_split

    @property
    def elementwise(self) -> ElementwiseQuantizer | None:
        """The quantizer if it can encode and decode each part of the weight separately; otherwise None."""
        return self.quantizer if isinstance(self.quantizer, ElementwiseQuantizer) else None


@dataclass(frozen=True)
class Slice:
    """A part of a weight, just after the optimizer's step.

    Attributes:
        index: The index of the part.
        values: The weights of the part.
        old: Their ordinals before the step, in a buffer that the next slice reuses.
        new: Their ordinals after the step.
        old_scale: The scale of the whole weight before the step; None for formats without one.
        valid: 0-dim bool on the device: False if the step was skipped. None: it was not. In a skipped step, codes do
            not change, and the caller drops what is added to sums.
        scratch: Provides temporary buffers.
        backend: As in :func:`weightflip.kernels.check_backend`.
    """

    index: Index
    values: Tensor
    old: Tensor
    new: Tensor
    old_scale: Tensor | None
    valid: Tensor | None
    scratch: ScratchPool
    backend: str

    def codes_under(self, scale: Tensor, quantizer: ElementwiseQuantizer) -> Tensor:
        """Return the ordinals of ``values`` under another scale, in a buffer that the next slice reuses.

        Args:
            scale: The other scale, of the whole weight.
            quantizer: The weight's quantizer.
        """
        ordinals = self.scratch("under", self.old, self.old.dtype)
        encoding = functional.Encoding(quantizer, self.scratch, self.backend)
        functional.encode_under(self.values, encoding, take(scale, self.index), ordinals)
        return ordinals


class RunFlag:
    """Whether a group has run in a step since the last mark. Steps that the optimizer skipped do not count.

    Attributes:
        value: 0-dim bool. On the CPU, unless only another device knows whether steps were skipped. Never written in
            place.
    """

    def __init__(self) -> None:
        self.clear()

    @property
    def is_known(self) -> bool:
        """Whether ``value`` can be read without a device synchronization."""
        return self.value.device.type == "cpu"

    def clear(self) -> None:
        """Note a mark."""
        self.value = torch.zeros((), dtype=torch.bool, device="cpu")

    def note_step(self, valid: Tensor | None) -> None:
        """Note that the group has run in a step.

        Args:
            valid: 0-dim, on any device: False if the step was skipped. None: it was not.
        """
        if self.is_known and self.value:
            return
        if valid is None or (valid.device.type == "cpu" and valid):
            self.value = torch.ones((), dtype=torch.bool, device="cpu")
        elif valid.device.type != "cpu":
            before = None if self.is_known else self.value.to(valid.device, non_blocking=True)
            self.value = valid.ne(0) if before is None else before.logical_or(valid)


class LayerMetric:
    """The state of a metric group for one weight, and the methods that update it. They run without gradients.

    ``before``, ``slice`` and ``after`` must not synchronize with the device.

    ``sums`` and ``gauges`` are float64 and have a numerator and a denominator for each name, in the group's order.
    """

    state: tuple[str, ...] = ()
    """Names of attributes that are tensors with one element per weight. They are saved in checkpoints."""

    pointwise: Pointwise | None = None
    """What :meth:`slice` computes, as an expression for each weight. Kernels compile it into the pass that counts
    flips, and update the tensors that it names in place. None: ``slice`` is called for every slice, which is slower. A
    class that overrides ``slice`` does not inherit it, and sets its own."""

    run_flag: RunFlag | None = None
    """Set by the caller, for groups with marks that also run in steps. All layers of a group share it."""

    sample: Sample | None = None
    """What :meth:`before` keeps of the weight for :meth:`after`, if ``after`` does what
    :class:`weightflip.kernels.Sample` describes, with its four sums as the columns of ``sums``. A kernel may then do
    the work of both methods for many weights at once. It is tested against them before it is used."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "slice" in vars(cls) and "pointwise" not in vars(cls):
            cls.pointwise = None

    def before(self, weight: Weight) -> None:
        """Called just before the optimizer's step."""

    def slice(self, part: Slice, sums: Tensor) -> None:
        """Called after the step, for one part of the weight after the other.

        Args:
            part: The part.
            sums: float64 of shape (ratios, 2), to add to.
        """

    def after(self, weight: Weight, sums: Tensor) -> None:
        """Called after all parts.

        Args:
            weight: The whole weight.
            sums: As in ``slice``.
        """

    def mark(self, weight: Weight, sums: Tensor, scratch: ScratchPool) -> None:
        """Called at a mark of ``mark_sync`` or ``sync_every=``. Must not synchronize with the device.

        A group that also runs in steps reads in ``run_flag`` whether it has run in a step since the last mark.

        Args:
            weight: The whole weight.
            sums: As in ``slice``, but added directly to the totals.
            scratch: Provides temporary buffers.
        """

    def gauge(self, weight: Weight, gauges: Tensor, bins: Tensor) -> None:
        """Called at a logging point.

        Args:
            weight: The whole weight.
            gauges: float64 zeros of shape (gauges, 2), to write to.
            bins: float64 zeros of shape (all bins,), to write to.
        """

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of ``state``, by name."""
        return {name: getattr(self, name) for name in self.state}

    @property
    def nbytes(self) -> int:
        """Bytes held between steps."""
        kept = [*vars(self).values(), *(() if self.sample is None else vars(self.sample).values())]
        return sum(value.nbytes for value in kept if isinstance(value, Tensor))


class Metric(ABC):
    """A group of values that ``metrics=`` selects by ``name``.

    A value consists of a numerator and a denominator. Each is summed over layers, steps and processes before they are
    divided. Rates are counted in steps; gauges and histograms are computed at logging points.
    """

    name: ClassVar[str]
    values: tuple[Value, ...] = ()
    """The values of the group, and how charts, tables and reports show each of them."""
    histograms: tuple[Bins, ...] = ()
    every: int = 1
    """The default number of steps between two evaluations: tracked steps for rates, all steps for gauges."""
    uses_steps: bool = True
    """Whether it has ``before``, ``slice`` or ``after``. If no group does, many weights are counted in one call."""
    uses_marks: bool = False
    """Whether it has ``mark``. A group with ``mark`` only is opened at the first mark."""
    reads_scale: bool = True
    """Whether ``mark`` and ``gauge`` use ``Weight.scale`` of formats with ``Weight.scale_codes``. If not, it is None
    there, and the weight need not be read for it."""
    supports_shards: bool = True
    """Whether the sums over the shards of a weight equal those of the whole. If not, sharded weights are left out."""

    @property
    def ratios(self) -> tuple[str, ...]:
        """Names of the rates among ``values``: the rows of ``sums``."""
        return self._names("rate")

    @property
    def gauges(self) -> tuple[str, ...]:
        """Names of the gauges among ``values``: the rows of ``gauges``."""
        return self._names("gauge")

    def _names(self, kind: Kind) -> tuple[str, ...]:
        return tuple(value.name for value in self.values if value.kind == kind)

    @property
    def declared(self) -> tuple[Value, ...]:
        """All values with their charts, including those that ``values`` does not describe."""
        kinds: dict[str, Kind] = dict.fromkeys(self.ratios, "rate")
        kinds.update(dict.fromkeys(self.gauges, "gauge"))
        kinds.update(dict.fromkeys((bins.name for bins in self.histograms), "histogram"))
        described = {value.name: value for value in self.values}
        found = [described.get(name) or Value(name, kind) for name, kind in kinds.items()]
        return tuple(replace(value, chart=value.chart or f"weightflip: {self.name}") for value in found)

    @abstractmethod
    def open(self, name: str, weight: Weight) -> LayerMetric | None:
        """Create the state for one weight.

        Args:
            name: The layer's name.
            weight: The current weight, which is the baseline.

        Returns:
            The state; None if the group does not support the weight or its quantizer.
        """


_registry: dict[str, type[Metric]] = {}

MetricType = TypeVar("MetricType", bound=type[Metric])


def register(metric: MetricType) -> MetricType:
    """Register a group under its ``name``. The class must work without arguments."""
    _registry[metric.name] = metric
    return metric


def metric_names() -> list[str]:
    """Return the names of all groups.

    Example:
        >>> "oscillation" in metric_names()
        True
    """
    modules.import_all(__package__)
    return sorted(_registry)


def make_metrics(groups: Mapping[Any, int | None]) -> list[tuple[Metric, int]]:
    """Return the requested groups, with the number of steps between two evaluations.

    Args:
        groups: Maps names or :class:`Metric` objects to that number of steps; None for the group's default.

    Raises:
        ValueError: Unknown name, two groups with the same value, or a number of steps below 1.
        TypeError: The ``values`` of a group are not :class:`Value` objects.
    """
    made: list[tuple[Metric, int]] = []
    taken = {"flips", "stalls", *(value.name for value in records.CORE_VALUES)}
    for spec, every in groups.items():
        metric = spec if isinstance(spec, Metric) else _by_name(spec)
        every = metric.every if every is None else every
        every = checks.whole_number(f"metrics={{{metric.name!r}: n}} runs every n steps, and n", every, 1)
        for value in metric.values:
            if not isinstance(value, Value):
                raise TypeError(
                    f"values of the group {metric.name!r} in metrics= are Value objects, got {value!r}; "
                    f"use Value({str(value)!r}), for example"
                )
        names = {metric.name, *(value.name for value in metric.declared)}
        if taken & names:
            raise ValueError(
                f"two groups in metrics= use the names {sorted(taken & names)}; leave one out or rename it"
            )
        taken |= names
        made.append((metric, every))
    return made


def _by_name(name: Any) -> Metric:
    known = metric_names()
    if not isinstance(name, str) or name not in known:
        hint = checks.did_you_mean(name, ["flips", "stalls", *known])
        if isinstance(name, type) and issubclass(name, Metric):
            hint = f"call it: {name.__name__}(). "
        raise ValueError(
            f"unknown group {name!r} in metrics=; {hint}Expected 'flips', 'stalls', {', '.join(map(repr, known))}, or "
            "a Metric object"
        )
    return _registry[name]()
