"""The state of one weight between steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from weightflip import distributed
from weightflip.counting.batch import Member
from weightflip.counting.ledger import Row
from weightflip.counting.stamps import Stamp
from weightflip.metrics import LayerMetric, Weight
from weightflip.metrics.columns import Group
from weightflip.quantizers.adapt import adapt
from weightflip.quantizers.protocol import CHANGING, BaseQuantizer, ElementwiseQuantizer, Quantizer

if TYPE_CHECKING:
    from weightflip.counting.routes import Route

# A fast path for the common case: weights of these types are not sharded.
_PLAIN = (nn.Parameter, Tensor)


class TrackedWeight:
    """One weight of a step: its name, the parameter, and how it is quantized.

    Frameworks replace parameters between two steps, and the old ones may be a whole unsharded model. Callers that keep
    these objects over many steps must call ``release`` after each step and set ``parameter`` again before the next one.
    """

    __slots__ = ("name", "parameter", "quantizer")

    parameter: Tensor

    def __init__(self, name: str, parameter: Tensor, quantizer: Quantizer) -> None:
        self.name = name
        self.parameter = parameter
        self.quantizer = adapt(quantizer)

    @property
    def is_held(self) -> bool:
        """Whether the parameter is available."""
        return hasattr(self, "parameter")

    def release(self) -> None:
        """Release the parameter. Reading it then raises AttributeError."""
        if hasattr(self, "parameter"):
            del self.parameter

    @property
    def is_dtensor(self) -> bool:
        """Whether the parameter is a DTensor, of which this process may hold only a part."""
        return type(self.parameter) not in _PLAIN and distributed.is_dtensor(self.parameter)

    @property
    def is_active(self) -> bool:
        """Whether the weight is quantized now."""
        return self.quantizer.is_active

    @property
    def is_batchable(self) -> bool:
        """Whether the codes depend only on the quantizer and the weight's memory."""
        quantizer = self.quantizer
        is_fixed = quantizer.batchable and CHANGING.isdisjoint(vars(quantizer))
        return is_fixed and not self.parameter.is_inference() and not self.is_dtensor

    def _local(self) -> Tensor:
        return distributed.local(self.parameter) if self.is_dtensor else self.parameter

    def unwrapped(self) -> tuple[Tensor, BaseQuantizer]:
        """Return the tensor to encode and its quantizer: the local shard, or the master copy that a subclass holds."""
        quantizer = self.quantizer
        inner = quantizer.encodes
        if inner is None:
            return self._local().detach(), quantizer
        # Detach the copy, not the subclass: the copy in a detached subclass has a new version counter.
        return quantizer.plain(self._local()).detach(), inner

    def plain(self) -> Tensor:
        """Return a plain tensor whose non-finite elements are those of the weight."""
        return self.quantizer.plain(self._local().detach())


class MetricCalls(NamedTuple):
    """The metric groups to call for a layer in a step, with their state.

    Attributes:
        before: Those called before the step.
        slices: Those called for each slice, unless a kernel does the same.
        after: Those called after the step.
        samples: Those with a sample, whose ``before`` and ``after`` are called unless a kernel does the same. They are
            not among the others.
    """

    before: tuple[tuple[Group, LayerMetric], ...] = ()
    slices: tuple[tuple[Group, LayerMetric], ...] = ()
    after: tuple[tuple[Group, LayerMetric], ...] = ()
    samples: tuple[tuple[Group, LayerMetric], ...] = ()


class CodeState(Enum):
    """The validity of a layer's codes. Only the transitions of :class:`Layer` change it."""

    ABSENT = "there are no codes"
    FRESH = "made just before the current step"
    KEPT = "made after the last counted step, and valid before the next one unless the weight is written"
    STALE = "outdated, but their memory can be reused"
    FAILED = "the layer is no longer tracked"


_COUNTED = frozenset({"tracked", "member", "stamp", "state", "route"})


class Changes:
    """Counts the changes of layers, so that what was read from them can be used until the next change.

    Changes are those of ``tracked``, ``member``, ``stamp``, ``state`` and ``route``.

    Attributes:
        number: The number of changes so far.
    """

    __slots__ = ("number",)

    def __init__(self) -> None:
        self.number = 0


@dataclass(eq=False)
class Layer:
    """The state of one weight between steps."""

    changes: Changes = field(default_factory=Changes, kw_only=True)
    """Shared with the other layers of a table. The first attribute, since setting others counts as changes."""
    name: str
    weights: int
    quantizer: str
    synchronized_counts: list[float]
    """Counts that are the same on all processes: those of a loaded checkpoint, and for a sharded weight the sums up to
    the last synchronization."""
    earlier_local_counts: list[float]
    """Counts of this process from earlier rows on other devices."""
    restarts: int = 0
    """The number of times its counts were reset because it became another weight."""
    row: Row | None = None
    state: CodeState = CodeState.ABSENT
    codes: Tensor | None = None
    scale_codes: Tensor | None = None
    """The stored block or group scales."""
    statistic: Tensor | None = None
    """The statistic of the whole sharded weight that the quantizer needs, from the last collective."""
    scale: Tensor | None = None
    """The scale of the codes if the layer was encoded alone; kept for metric groups."""
    stamp: Stamp | None = None
    """Identifies the weight when its codes were made; None if it has no version counter or may have been written."""
    tracked: TrackedWeight | None = None
    """The weight that was passed last."""
    route: Route | None = None
    """Encodes and counts the layer; None until a step chooses one."""
    member: Member | None = None
    """Its place in a batch."""
    metrics: dict[str, LayerMetric | None] | None = None
    """The state of each metric group by name, once there is a baseline. None for a group that does not support it."""
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """The state of groups from a checkpoint or another device."""
    code_kind: tuple[torch.Size, torch.dtype] | None = None
    """Shape and dtype of the codes for which the groups were opened."""
    metric_calls: MetricCalls | None = None
    """The groups to call in a step, once ``metrics`` are opened."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _COUNTED and self.__dict__.get(name) is not value:
            # First, so that an interrupt in between cannot hide the change.
            self.changes.number += 1
        object.__setattr__(self, name, value)

    # ------------------------------------------------------------------ transitions

    def mark_encoded(self, weight: Tensor) -> None:
        """Note that the codes are those of the current weight."""
        assert self.tracked is not None
        self.stamp = Stamp.of(self.tracked.parameter, weight)
        self.state = CodeState.FRESH

    def mark_counted(self, weight: Tensor, *, has_state: bool = False) -> None:
        """Note that the codes are those of the weight after the step, and kept for the next one.

        Args:
            weight: The tensor that was encoded.
            has_state: Whether the codes also depend on a state, so that they cannot be kept.
        """
        assert self.tracked is not None
        if self.stamp is None or not self.stamp.try_update(self.tracked.parameter, weight):
            self.stamp = Stamp.of(self.tracked.parameter, weight)
        self.state = CodeState.STALE if has_state or self.stamp is None else CodeState.KEPT

    def mark_counted_in_place(self, stamp: Stamp, version: int) -> None:
        """As ``mark_counted``, if the weight is the parameter itself and has not moved."""
        stamp.versions = version, version
        self.state = CodeState.KEPT

    def invalidate(self) -> None:
        """Note that the weight may have been written since its codes were made."""
        self.stamp = None
        if self.state in (CodeState.FRESH, CodeState.KEPT):
            self.state = CodeState.STALE

    def drop_codes(self, *, metrics: bool = False) -> None:
        """Release the codes; with ``metrics``, also the state of metric groups.

        The stamp stays, since it also tells whether other state of the weight is still valid.
        """
        self.codes = self.scale_codes = self.scale = None
        self.leave_route()
        if self.state is not CodeState.FAILED:
            self.state = CodeState.ABSENT
        if metrics:
            self.metrics, self.metric_calls, self.saved = None, None, {}

    def leave_route(self) -> None:
        """Leave the current route, so that the next step chooses one."""
        self.member = self.route = None

    def fail(self) -> None:
        """Stop tracking the layer."""
        self.drop_codes(metrics=True)
        self.stamp = self.tracked = None
        self.state = CodeState.FAILED

    # ------------------------------------------------------------------ queries

    def is_unwritten(self, parameter: Tensor, weight: Tensor) -> bool:
        """Whether a weight is the stamped one and was not written since, as far as writes leave a trace."""
        return self.stamp is not None and self.stamp.is_unwritten(parameter, weight)

    def is_current(self, tracked: TrackedWeight) -> bool:
        """Whether a layer that is counted together with others has current codes. A fast check without other cases."""
        return (
            self.tracked is tracked
            and self.is_kept_together
            and self.is_unwritten(parameter := tracked.parameter, parameter)
        )

    @property
    def is_kept_together(self) -> bool:
        """Whether a layer that is counted together with others has kept codes."""
        return self.state is CodeState.KEPT and self.route is not None and self.route.counts_together

    def view_for_metrics(self, weight: Tensor, quantizer: Quantizer) -> Weight:
        """Return the weight in the form that metric groups receive."""
        assert self.codes is not None
        if isinstance(quantizer, ElementwiseQuantizer):
            return Weight(quantizer.grouped(weight), quantizer.grouped(self.codes), self.scale_of_codes, quantizer)
        return Weight(weight, self.codes, self.scale_of_codes, quantizer)

    @property
    def scale_of_codes(self) -> Tensor | None:
        """The scale of the codes, kept for metric groups by the layer or its batch."""
        return self.member.scale if self.scale is None and self.member is not None else self.scale

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes and their scales."""
        return sum(kept.nbytes for kept in (self.codes, self.scale_codes, self.scale_of_codes) if kept is not None)

    @property
    def metric_bytes(self) -> int:
        """Bytes of the state of metric groups."""
        kept = sum(metric.nbytes for metric in (self.metrics or {}).values() if metric is not None)
        return kept + sum(tensor.nbytes for tensors in self.saved.values() for tensor in tensors.values())

    # ------------------------------------------------------------------ memory

    def allocate_codes(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor for the codes of a weight, reusing the old one if it fits."""
        if self.codes is None or self.codes.shape != weight.shape or self.codes.dtype != dtype:
            self.invalidate()
            self.codes = torch.empty_like(weight, dtype=dtype)
            # The scales of the old codes may have another shape.
            self.scale_codes = self.scale = None
        return self.codes

    def close_metrics(self) -> None:
        """Close the groups, and save their state for when they are opened again with the next codes."""
        self.saved = self.metric_tensors()
        self.metrics = self.metric_calls = None

    def metric_tensors(self) -> dict[str, dict[str, Tensor]]:
        """Return the per-weight state of the groups, by group and name."""
        kept = {group: dict(tensors) for group, tensors in self.saved.items()}
        is_open = (self.metrics or {}).items()
        return kept | {group: metric.tensors for group, metric in is_open if metric is not None and metric.state}

    def __getstate__(self) -> dict[str, Any]:
        # The stamp identifies a parameter of this process. A copy of the layer encodes its weight again.
        names = (
            "codes",
            "scale_codes",
            "scale",
            "statistic",
            "stamp",
            "tracked",
            "route",
            "member",
            "metrics",
            "metric_calls",
        )
        state = self.state if self.state is CodeState.FAILED else CodeState.ABSENT
        return {**self.__dict__, **dict.fromkeys(names), "saved": self.metric_tensors(), "state": state}
