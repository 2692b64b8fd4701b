"""What is known of one weight between steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from weightflip import distributed
from weightflip.counting.batch import Member
from weightflip.counting.ledger import Ledger
from weightflip.metrics import LayerMetric
from weightflip.quantizers.base import Quantizer

_storage_has_expired: Callable[[int], bool] = torch.UntypedStorage._expired  # type: ignore[assignment]


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
        self.quantizer = quantizer

    @property
    def is_held(self) -> bool:
        """Whether the parameter is at hand."""
        return hasattr(self, "parameter")

    def release(self) -> None:
        """Let go of the parameter; reading it raises AttributeError from here on."""
        if self.is_held:
            del self.parameter

    def unwrapped(self) -> tuple[Tensor, Quantizer]:
        """What is encoded, and by what: of a shard, this process's; where a subclass holds a master copy, that."""
        quantizer = self.quantizer
        inner: Quantizer | None = getattr(quantizer, "encodes", None)
        weight = distributed.local(self.parameter)
        if inner is None:
            return weight.detach(), quantizer
        # Not of a detached subclass: the copy inside it has a version counter of its own.
        plain: Callable[[Tensor], Tensor] = quantizer.plain  # type: ignore[attr-defined]
        return plain(weight).detach(), inner


@dataclass
class Stamp:
    """Tells whether a parameter was written, replaced, moved or viewed in another way since."""

    # An id, not a weak reference: torch.utils.swap_tensors, and with it Module.to(), refuses tensors that have one. If
    # the id is given to another parameter, its storage differs as well.
    parameter: int
    # Memory that was given back may be given out again for the next storage: an address alone does not tell.
    storage: StorageWeakRef
    data_ptr: int
    storage_offset: int
    strides: tuple[int, ...]
    dtype: torch.dtype
    versions: tuple[int, int]

    def is_of(self, address: int) -> bool:
        """Whether a parameter at this address is still in the memory that it was in."""
        # As StorageWeakRef.expired() asks, which takes six times as long.
        return address == self.data_ptr and not _storage_has_expired(self.storage.cdata)

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
            int(weight.storage_offset()),
            weight.stride(),
            weight.dtype,
            (parameter._version, weight._version),
        )


@dataclass(frozen=True, eq=False)
class Row:
    """Where a layer is counted. One object, so that an interrupt never leaves a ledger without its index."""

    ledger: Ledger
    index: int

    @property
    def total(self) -> Tensor:
        return self.ledger.total[self.index]

    @property
    def step(self) -> Tensor:
        return self.ledger.step[self.index]

    def clear(self) -> None:
        """Forget all that was counted here."""
        self.ledger.clear_row(self.index)


@dataclass
class Layer:
    """What is known of one weight between steps."""

    name: str
    weights: int
    quantizer: str
    base: list[float]
    """Counted before this ledger: in a loaded checkpoint, or on another device. Of a sharded weight, what all
    processes have counted up to their last synchronization."""
    own: list[float] = field(default_factory=list)
    """Of a sharded weight, what this process has counted before this ledger."""
    given: list[float] = field(default_factory=list)
    """And what of all it has counted is in ``base``."""
    row: Row | None = None
    codes: Tensor | None = None
    scale_codes: Tensor | None = None
    """Of block and group scales."""
    statistic: Tensor | None = None
    """What the quantizer has to know of the whole of a sharded weight, as of the last collective."""
    scale: Tensor | None = None
    """Of the codes; kept for metric groups."""
    stamp: Stamp | None = None
    tracked: TrackedWeight | None = None
    """What the codes are of, where it is counted together with others."""
    member: Member | None = None
    metrics: dict[str, LayerMetric | None] | None = None
    """Name of a group to what it keeps, once there is a baseline; None for a group without numbers for this layer."""
    saved: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """What groups kept in a checkpoint, or on another device."""
    code_kind: tuple[torch.Size, torch.dtype] | None = None
    """Shape and dtype of the codes that groups began with."""

    def drop_codes(self, *, stamp: bool = True, metrics: bool = False) -> None:
        """Give back memory; with ``metrics``, also what metric groups remember of each weight."""
        self.codes = self.scale_codes = self.scale = self.tracked = self.member = None
        if stamp:
            self.stamp = None
        if metrics:
            self.metrics, self.saved = None, {}

    def close_metrics(self) -> None:
        """Groups begin anew with the next codes, from what they kept."""
        self.saved, self.metrics = self.metric_tensors(), None

    def metric_tensors(self) -> dict[str, dict[str, Tensor]]:
        if self.metrics is None:
            return {group: dict(tensors) for group, tensors in self.saved.items()}
        return {group: metric.tensors for group, metric in self.metrics.items() if metric is not None and metric.state}

    def __getstate__(self) -> dict[str, Any]:
        # The stamp is about this process's parameter: a copy encodes its own anew.
        names = ("codes", "scale_codes", "scale", "statistic", "stamp", "tracked", "member", "metrics")
        return {**self.__dict__, **dict.fromkeys(names), "saved": self.metric_tensors()}
