"""What a metric group is, and how one is found by name.

A new group is one new file in this folder: a class with :class:`Metric`'s attributes and methods under ``@register``.
Every module of the folder is imported when the first name is looked up.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, TypeVar

from torch import Tensor

from weightflip import checks, functional, records
from weightflip.kernels import Index, Pointwise, ScratchPool, take
from weightflip.quantizers.protocol import ElementwiseQuantizer, Quantizer
from weightflip.records import Kind, Value

CORE_VALUES = tuple(value.name for value in records.CORE_VALUES if value.unit != "count")
"""What records' ``values`` have without any group."""


class Bins(NamedTuple):
    """A histogram that a group keeps.

    Attributes:
        name: What it is called in records and tags.
        edges: Ascending, finite borders, one more than there are bins.
    """

    name: str
    edges: tuple[float, ...]


class Weight(NamedTuple):
    """A weight at one moment, as a group sees it.

    Attributes:
        values: The weight; of formats with a scale for each group of ``g`` neighbours with its last dimension split,
            ``(..., K // g, g)``.
        codes: Its ordinals, in that shape.
        scale: What the format shares, broadcastable to them; None where it has none.
        quantizer: What made the codes.
        backend: As in :func:`weightflip.kernels.check_backend`.
    """

    values: Tensor
    codes: Tensor
    scale: Tensor | None
    quantizer: Quantizer
    backend: str = "auto"

    @property
    def ndim(self) -> int:
        """Dimensions of the weight itself."""
        is_split = self.elementwise is not None and self.elementwise.group is not None
        return self.values.ndim - is_split

    @property
    def elementwise(self) -> ElementwiseQuantizer | None:
        """The quantizer, where any part of the weight can be encoded and decoded by itself."""
        return self.quantizer if isinstance(self.quantizer, ElementwiseQuantizer) else None


@dataclass(frozen=True)
class Slice:
    """A part of a weight, just after the optimizer's step.

    Attributes:
        index: Which part.
        values: The weights there.
        old: Their ordinals before the step; a buffer that the next slice takes back.
        new: Their ordinals after it.
        old_scale: Of the whole weight, before the step; None where the format has none.
        valid: 0-dim bool on the device: whether the step was one at all; None: it was. What is added to sums in a step
            that was none is dropped by the caller, and codes are the same before and after.
        scratch: Where temporaries come from.
        backend: What encodes: as in :func:`weightflip.kernels.check_backend`.
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
        """What the ordinals of ``values`` would be under another scale; a buffer that the next slice takes back.

        Args:
            scale: Of the whole weight.
            quantizer: Of the weight.
        """
        ordinals = self.scratch("under", self.old, self.old.dtype)
        encoding = functional.Encoding(quantizer, self.scratch, self.backend)
        functional.encode_under(self.values, encoding, take(scale, self.index), ordinals)
        return ordinals


class LayerMetric:
    """What a group keeps of one weight, and how it counts, without gradients.

    ``before``, ``slice`` and ``after`` must not wait for the device.

    ``sums`` and ``gauges`` are float64 and hold a numerator and a denominator for each name, in the group's order.
    """

    state: tuple[str, ...] = ()
    """Attributes with one tensor element a weight: saved in checkpoints, counted as memory."""

    pointwise: Pointwise | None = None
    """What :meth:`slice` does, as an expression for each weight, which kernels compile into the pass that counts flips.
    They read and write the tensors that it names in place. None: there is none, and every slice is shown to ``slice``,
    which is slower. A class that overrides ``slice`` sets it as well."""

    def before(self, weight: Weight) -> None:
        """Just before the optimizer's step."""

    def slice(self, part: Slice, sums: Tensor) -> None:
        """Just after it, for each part of the weight in turn.

        Args:
            part: The part.
            sums: Added to, float64 of shape (ratios, 2).
        """

    def after(self, weight: Weight, sums: Tensor) -> None:
        """Once all parts are done.

        Args:
            weight: The whole weight.
            sums: As in ``slice``.
        """

    def mark(self, weight: Weight, sums: Tensor, scratch: ScratchPool) -> None:
        """At a mark of ``mark_sync`` or ``sync_every=``. Must not synchronize with the device.

        Args:
            weight: The whole weight.
            sums: As in ``slice``, but added to the totals at once.
            scratch: Provides temporaries.
        """

    def gauge(self, weight: Weight, gauges: Tensor, bins: Tensor) -> None:
        """At a logging point.

        Args:
            weight: The whole weight.
            gauges: Written to, float64 of shape (gauges, 2); zeros so far.
            bins: Written to, float64 of shape (all bins,); zeros so far.
        """

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The state, by name."""
        return {name: getattr(self, name) for name in self.state}

    @property
    def nbytes(self) -> int:
        """Bytes that are held between steps."""
        return sum(value.nbytes for value in vars(self).values() if isinstance(value, Tensor))


class Metric(ABC):
    """A group of numbers that ``metrics=`` asks for by ``name``.

    A number is a numerator and a denominator, each of which is summed over layers, steps and processes before they are
    divided. Rates are counted in steps, gauges and histograms are found at logging points.
    """

    name: ClassVar[str]
    values: tuple[Value, ...] = ()
    """What it gives, and how each number is shown, everywhere: in charts, tables and reports."""
    histograms: tuple[Bins, ...] = ()
    every: int = 1
    """Steps, or steps between logging points, from one look to the next, unless the user says otherwise."""
    uses_steps: bool = True
    """Whether it has ``before``, ``slice`` or ``after``. If no group does, many weights are counted in one call."""
    uses_marks: bool = False
    """Whether it has ``mark``. A group with ``mark`` only is opened at the first mark."""
    of_shards: bool = True
    """Whether the sums over the shards of a weight are those of the whole; else sharded weights have no numbers."""

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
        """Every number that it gives, also one that ``values`` does not describe, with the charts it stands among."""
        kinds: dict[str, Kind] = dict.fromkeys(self.ratios, "rate")
        kinds.update(dict.fromkeys(self.gauges, "gauge"))
        kinds.update(dict.fromkeys((bins.name for bins in self.histograms), "histogram"))
        described = {value.name: value for value in self.values}
        found = [described.get(name) or Value(name, kind) for name, kind in kinds.items()]
        return tuple(replace(value, chart=value.chart or f"weightflip: {self.name}") for value in found)

    @abstractmethod
    def open(self, name: str, weight: Weight) -> LayerMetric | None:
        """What is kept of one weight from here on.

        Args:
            name: The layer's.
            weight: As it is now: the baseline.

        Returns:
            None for a weight, or a quantizer, that this group has no numbers for.
        """


_registry: dict[str, type[Metric]] = {}

MetricType = TypeVar("MetricType", bound=type[Metric])


def register(metric: MetricType) -> MetricType:
    """Make a group available by its ``name``. Its class is called without arguments."""
    _registry[metric.name] = metric
    return metric


def _import_modules() -> None:
    package = importlib.import_module(__package__ or "")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")


def metric_names() -> list[str]:
    """The names of all groups.

    Example:
        >>> "oscillation" in metric_names()
        True
    """
    _import_modules()
    return sorted(_registry)


def make_metrics(groups: Mapping[Any, int | None]) -> list[tuple[Metric, int]]:
    """The groups that were asked for, and how often each looks.

    Args:
        groups: Names or :class:`Metric` objects, to the number of steps from one look to the next; None for the group's
            own default.

    Raises:
        ValueError: An unknown name, two groups that give the same number, or a number of steps below 1.
        TypeError: A group whose ``values`` are something else.
    """
    made: list[tuple[Metric, int]] = []
    taken = {"flips", "stalls", *(value.name for value in records.CORE_VALUES)}
    for spec, every in groups.items():
        metric = spec if isinstance(spec, Metric) else _by_name(spec)
        every = metric.every if every is None else every
        every = checks.whole_number(f"metrics={{{metric.name!r}: n}} looks every n steps, and n", every, 1)
        for value in metric.values:
            if not isinstance(value, Value):
                raise TypeError(
                    f"values of the group {metric.name!r} in metrics= are Value objects, got {value!r}; "
                    f"Value({str(value)!r}) is the shortest"
                )
        names = {metric.name, *(value.name for value in metric.declared)}
        if taken & names:
            raise ValueError(
                f"two in metrics= are called, or give, {sorted(taken & names)}; leave one out or rename it"
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
