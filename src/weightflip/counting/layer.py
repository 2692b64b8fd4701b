"""What is known of one weight between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from weightflip import distributed
from weightflip.counting.batch import Member
from weightflip.counting.ledger import Row
from weightflip.metrics import LayerMetric, Weight
from weightflip.metrics.columns import Group
from weightflip.quantizers.adapt import adapt
from weightflip.quantizers.protocol import BaseQuantizer, ElementwiseQuantizer, Quantizer

if TYPE_CHECKING:
    from weightflip.counting.routes import Route

_storage_has_expired: Callable[[int], bool] = torch.UntypedStorage._expired  # type: ignore[assignment]
# By far the most weights: of their types it is known that they are not spread over processes.
_PLAIN = (nn.Parameter, Tensor)


class TrackedWeight:
    """One weight of a step: its name, the parameter, and how it is quantized.

    Frameworks replace parameters between two steps, and the old ones may be a whole unsharded model. So whoever makes
    these objects for many steps calls ``release`` after each step and sets ``parameter`` again before the next one.
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
        """Let go of the parameter; reading it raises AttributeError from here on."""
        if self.is_held:
            del self.parameter

    @property
    def is_dtensor(self) -> bool:
        """Whether this process may hold only a part of it."""
        return type(self.parameter) not in _PLAIN and distributed.is_dtensor(self.parameter)

    @property
    def is_active(self) -> bool:
        """Whether it is quantized now."""
        return self.quantizer.is_active

    @property
    def is_batchable(self) -> bool:
        """Whether nothing but its quantizer and its memory decides on its codes."""
        return self.quantizer.batchable and not self.parameter.is_inference() and not self.is_dtensor

    def _local(self) -> Tensor:
        return distributed.local(self.parameter) if self.is_dtensor else self.parameter

    def unwrapped(self) -> tuple[Tensor, BaseQuantizer]:
        """What is encoded, and by what: of a shard, this process's; where a subclass holds a master copy, that."""
        quantizer = self.quantizer
        inner = quantizer.encodes
        if inner is None:
            return self._local().detach(), quantizer
        # Not of a detached subclass: the copy inside it has a version counter of its own.
        return quantizer.plain(self._local()).detach(), inner

    def plain(self) -> Tensor:
        """A tensor of a plain type whose non-finite elements are those of the weight."""
        return self.quantizer.plain(self._local().detach())


@dataclass
class Stamp:
    """Tells whether a parameter was written, replaced, moved or viewed in another way since."""

    # An id, not a weak reference: torch.utils.swap_tensors, and with it Module.to(), refuses tensors that have one. If
    # the id is given to another parameter, its storage differs as well.
    parameter: int
    # Memory that was given back may be given out again for the next storage: an address alone does not tell.
    storage: StorageWeakRef
    data_ptr: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    versions: tuple[int, int]

    @classmethod
    def of(cls, parameter: Tensor, weight: Tensor) -> Stamp | None:
        """Of a parameter and what is encoded of it: the same, or the master copy inside it."""
        if parameter.is_inference():
            # Inference tensors have no version counter.
            return None
        return cls(
            id(parameter),
            StorageWeakRef(weight.untyped_storage()),  # type: ignore[no-untyped-call]
            weight.data_ptr(),
            weight.shape,
            weight.stride(),
            weight.dtype,
            (parameter._version, weight._version),
        )

    def is_in_place(self, weight: Tensor) -> bool:
        """Whether a weight lies in the memory that it lay in, and in the same way."""
        address = weight.data_ptr()
        return (
            address == self.data_ptr
            and weight.shape == self.shape
            and weight.dtype is self.dtype
            and weight.stride() == self.strides
            # As StorageWeakRef.expired() asks, which takes six times as long; tensors without memory share an address.
            and (not _storage_has_expired(self.storage.cdata) if address else self._is_of_storage(weight))
        )

    def _is_of_storage(self, weight: Tensor) -> bool:
        return bool(self.storage == StorageWeakRef(weight.untyped_storage()))  # type: ignore[no-untyped-call]

    def is_unwritten(self, parameter: Tensor, weight: Tensor) -> bool:
        """Whether it is also the same parameter, and no version counter has moved."""
        of_parameter, of_weight = self.versions
        return (
            id(parameter) == self.parameter
            and parameter._version == of_parameter
            and (weight is parameter or weight._version == of_weight)
            and self.is_in_place(weight)
        )


class Looks(NamedTuple):
    """How metric groups look at a layer: each with what it keeps of it.

    Attributes:
        before: Those that look at the weight before the step.
        slices: Those that look at every slice, or have the kernel do the same.
        after: Those that look at the weight after the step.
    """

    before: tuple[tuple[Group, LayerMetric], ...] = ()
    slices: tuple[tuple[Group, LayerMetric], ...] = ()
    after: tuple[tuple[Group, LayerMetric], ...] = ()


class CodeState(Enum):
    """What the codes of a layer are worth. The methods of :class:`Layer` below are all transitions there are."""

    ABSENT = "there are none"
    FRESH = "made just before the step that is under way"
    KEPT = "of the end of the last counted step, which is before the next one unless the weight is written"
    STALE = "nobody knows of when; only their memory is of use"
    FAILED = "given up"


@dataclass(eq=False)
class Layer:
    """What is known of one weight between steps."""

    name: str
    weights: int
    quantizer: str
    settled: list[float]
    """Counted before and elsewhere: in a loaded checkpoint. Of a sharded weight also what all processes have counted
    up to their last synchronization."""
    local_before: list[float]
    """What this process has counted in rows on other devices."""
    restarts: int = 0
    """How often its counts have started anew, because it was another weight."""
    row: Row | None = None
    state: CodeState = CodeState.ABSENT
    codes: Tensor | None = None
    scale_codes: Tensor | None = None
    """Of block and group scales."""
    statistic: Tensor | None = None
    """What the quantizer has to know of the whole of a sharded weight, as of the last collective."""
    scale: Tensor | None = None
    """Of the codes, where they were made alone; kept for metric groups."""
    stamp: Stamp | None = None
    """Of the weight when its codes were made; None where it has no version counter, or is not to be trusted."""
    tracked: TrackedWeight | None = None
    """The weight, as it was handed in last."""
    route: Route | None = None
    """What encodes and counts it; None until a step finds one."""
    member: Member | None = None
    """Its place in a batch."""
    is_gathered: bool = False
    """Whether it is counted in plain torch together with others."""
    metrics: dict[str, LayerMetric | None] | None = None
    """Name of a group to what it keeps, once there is a baseline; None for a group without numbers for this layer."""
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What groups kept in a checkpoint, or on another device."""
    code_kind: tuple[torch.Size, torch.dtype] | None = None
    """Shape and dtype of the codes that groups began with."""
    looks: Looks | None = None
    """How groups look at it, since ``metrics`` were opened."""

    # ------------------------------------------------------------------ transitions

    def encoded(self, weight: Tensor) -> None:
        """Its codes are those of the weight as it is now."""
        assert self.tracked is not None
        self.stamp = Stamp.of(self.tracked.parameter, weight)
        self.state = CodeState.FRESH

    def counted(self, weight: Tensor, *, has_state: bool = False) -> None:
        """Its codes are those of the weight after the step, and kept for the next one.

        Args:
            weight: What was encoded.
            has_state: Whether codes depend on more than the weight, so that they cannot be kept.
        """
        assert self.tracked is not None
        self.stamp = Stamp.of(self.tracked.parameter, weight)
        self.state = CodeState.STALE if has_state or self.stamp is None else CodeState.KEPT

    def counted_in_place(self, stamp: Stamp, version: int) -> None:
        """As ``counted``, where the weight is the parameter itself and lies where it did."""
        stamp.versions = (version, version)
        self.state = CodeState.KEPT

    def distrust(self) -> None:
        """It may have been written since its codes were made."""
        self.stamp = None
        if self.state in (CodeState.FRESH, CodeState.KEPT):
            self.state = CodeState.STALE

    def drop_codes(self, *, metrics: bool = False) -> None:
        """Give back memory; with ``metrics``, also what metric groups remember of each weight.

        The stamp stays: it tells whether what is known of the weight beside its codes still holds.
        """
        self.codes = self.scale_codes = self.scale = None
        self.leave_route()
        if self.state is not CodeState.FAILED:
            self.state = CodeState.ABSENT
        if metrics:
            self.metrics, self.looks, self.saved = None, None, {}

    def leave_route(self) -> None:
        """Its route takes it no more: the next step finds another one."""
        self.member = self.route = None
        self.is_gathered = False

    def fail(self) -> None:
        """Count it no more."""
        self.drop_codes(metrics=True)
        self.stamp = self.tracked = None
        self.state = CodeState.FAILED

    # ------------------------------------------------------------------ questions

    def is_unwritten(self, parameter: Tensor, weight: Tensor) -> bool:
        """Whether a weight is the one that was stamped, as far as writing it leaves a trace."""
        return self.stamp is not None and self.stamp.is_unwritten(parameter, weight)

    def is_as_it_was(self, tracked: TrackedWeight) -> bool:
        """Whether a layer that is counted together with others has the codes of now, asked as cheaply as can be."""
        stamp = self.stamp
        return (
            self.tracked is tracked
            and self.state is CodeState.KEPT
            and (self.is_gathered or self.member is not None)
            and stamp is not None
            and stamp.is_unwritten(parameter := tracked.parameter, parameter)
        )

    def seen(self, weight: Tensor, quantizer: Quantizer) -> Weight:
        """The weight as metric groups see it."""
        assert self.codes is not None
        if isinstance(quantizer, ElementwiseQuantizer):
            return Weight(quantizer.grouped(weight), quantizer.grouped(self.codes), self.scale_of_codes, quantizer)
        return Weight(weight, self.codes, self.scale_of_codes, quantizer)

    @property
    def scale_of_codes(self) -> Tensor | None:
        """The quantizer's scale, wherever it is kept for metric groups."""
        return self.member.scale if self.scale is None and self.member is not None else self.scale

    @property
    def code_bytes(self) -> int:
        """Of the codes, and what belongs to them."""
        return sum(kept.nbytes for kept in (self.codes, self.scale_codes, self.scale_of_codes) if kept is not None)

    @property
    def metric_bytes(self) -> int:
        """Of what metric groups remember."""
        kept = sum(metric.nbytes for metric in (self.metrics or {}).values() if metric is not None)
        return kept + sum(tensor.nbytes for tensors in self.saved.values() for tensor in tensors.values())

    # ------------------------------------------------------------------ memory

    def make_room(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor for codes of this weight; a new one holds none yet."""
        if self.codes is None or self.codes.shape != weight.shape or self.codes.dtype != dtype:
            self.distrust()
            self.codes = torch.empty_like(weight, dtype=dtype)
        return self.codes

    def close_metrics(self) -> None:
        """Groups begin anew with the next codes, from what they kept."""
        self.saved = self.metric_tensors()
        self.metrics = self.looks = None

    def metric_tensors(self) -> dict[str, dict[str, Tensor]]:
        """What groups keep of each weight, by group and name."""
        kept = {group: dict(tensors) for group, tensors in self.saved.items()}
        is_open = (self.metrics or {}).items()
        return kept | {group: metric.tensors for group, metric in is_open if metric is not None and metric.state}

    def __getstate__(self) -> dict[str, Any]:
        # The stamp is about this process's parameter: a copy encodes its own anew.
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
            "looks",
        )
        state = self.state if self.state is CodeState.FAILED else CodeState.ABSENT
        return {**self.__dict__, **dict.fromkeys(names), "saved": self.metric_tensors(), "state": state}
