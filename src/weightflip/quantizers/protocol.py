"""The quantizer interface.

To add a quantizer, add a file to this package with a class that has ``encode`` and a factory decorated with
``@register``.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from weightflip.formats import FloatFormat, Rounding, ScaleFormula

Scope: TypeAlias = Literal["element", "group", "block", "row", "tensor"]
Reduction: TypeAlias = Literal["max", "mean"]


@dataclass(frozen=True)
class Codes:
    """The codes of one weight tensor.

    Attributes:
        ordinals: Signed integers of the weight's shape that increase with the number they stand for. Equal ordinals
            stand for equal numbers. int8 for formats of up to 8 bits, else int16, int32 or int64.
        scale: The factor that the format shares among weights, broadcastable to their shape; for groups of ``g``
            neighbors in the last dimension, of shape ``(..., K // g, 1)``; None if the format has no scale. Whether
            weights are divided or multiplied by it is up to the quantizer.
        quantizer: The quantizer that made the codes and can decode them, if known.
    """

    ordinals: Tensor
    scale: Tensor | None = None
    quantizer: Quantizer | None = None


@runtime_checkable
class Quantizer(Protocol):
    """Anything that turns a weight into codes.

    ``encode`` is called with gradients disabled. It must not change the weight and must not draw random numbers. Its
    ``name``, or else ``str()``, identifies the quantizer in tables, tags and checkpoints.

    Quantizers that belong to a module or a tensor subclass may also have these attributes:

    * ``is_active``: False while the weight is not quantized. Nothing is counted then, and the first codes afterward
      are a baseline.
    * ``has_state``: True if codes depend on more than the weight, so that they are never kept from step to step.
    * ``plain(weight)``: an ordinary tensor whose non-finite elements are those of the weight.
    * ``encodes``: the quantizer of ``plain(weight)``, if ``encode`` does nothing but encode that.

    For weights that are sharded over processes, any quantizer may have:

    * ``scope``: how much of a weight one code depends on: ``"element"``, ``"group"`` (``group`` neighbors in the last
      dimension), ``"block"`` (the rows and columns in ``tile``, or fewer at the edges), ``"row"`` (the last dimension)
      or ``"tensor"``. Without it shards are not encoded, since their codes may differ from those of the whole weight.
    """

    def encode(self, weight: Tensor) -> Codes:
        """Return the codes of ``weight``, in its shape."""
        ...


def bits_of_scale(scale: Tensor) -> Tensor:
    """Return float32 scales as int32 integers that are equal where the scales are equal, NaN included."""
    return scale.float().masked_fill(scale.isnan(), torch.nan).view(torch.int32)


class Scratch(Protocol):
    """Provides reusable buffers, so that a step makes no large allocations."""

    def __call__(self, slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a contiguous buffer of ``like``'s shape and device, valid until the next call with slot and dtype."""
        ...


def new_buffer(slot: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """A :class:`Scratch` that allocates each buffer and reuses none."""
    return torch.empty(like.shape, dtype=dtype, device=like.device)


CHANGING = frozenset({"is_active", "has_state", "encodes"})
"""The attributes that may change from step to step. If a quantizer's class or ``__init__`` sets one of them, they are
read in each step, and its weights are not counted together with others."""


class BaseQuantizer(ABC):
    """A quantizer with everything the tracker needs to know about it; every attribute has a default.

    Users need not derive from it: ``adapt`` wraps any object with ``encode``, and functions.

    Attributes:
        name: Identifies the quantizer in tables, tags and checkpoints.
        is_active: False while the weight is not quantized.
        has_state: Whether codes depend on more than the weight, so that they are never kept from step to step.
        scope: How much of a weight one code depends on, as :class:`Quantizer` describes; None if unknown.
        group: The number of neighbors in the last dimension that share a scale, if any do.
        tile: The rows and columns that share a scale, if ``scope`` is ``"block"``.
        reduction: How the ``statistic`` of a weight is computed from those of its parts.
        batchable: Whether codes depend only on the quantizer and the weight's memory, so that a kernel may encode many
            weights at once.
        format: The number format of the elements, if there is a single one.
        encodes: The quantizer of ``plain(weight)``, if ``encode`` does nothing but encode that.
    """

    name: str
    is_active: bool = True
    has_state: bool = False
    scope: Scope | None = None
    group: int | None = None
    tile: tuple[int, int] | None = None
    reduction: Reduction = "max"
    batchable: bool = False
    format: FloatFormat | None = None
    encodes: BaseQuantizer | None = None

    @abstractmethod
    def encode(self, weight: Tensor) -> Codes:
        """Return the codes of ``weight``, in its shape."""

    def decode(self, codes: Codes) -> Tensor:
        """Return the quantized values.

        Raises:
            ValueError: The quantizer can only encode.
        """
        raise ValueError(f"quantizer {self} only encodes: it has no decode(codes)")

    def plain(self, weight: Tensor) -> Tensor:
        """Return an ordinary tensor whose non-finite elements are those of the weight."""
        return weight

    def statistic(self, weight: Tensor) -> Tensor:
        """Return what encoding needs to know of a whole block, row or tensor, computed from a part of it: magnitudes.

        0-dim; or ``(..., 1)``, one per row; or ``(..., number of blocks)``, one per row and block.
        """
        raise NotImplementedError(f"quantizer {self} has no statistic")

    @property
    def has_plain(self) -> bool:
        """Whether it handles tensor subclasses itself."""
        return type(self).plain is not BaseQuantizer.plain

    @property
    def has_statistic(self) -> bool:
        """Whether it can encode shards that cut its ``scope``, once their statistics are combined."""
        return type(self).statistic is not BaseQuantizer.statistic

    @property
    def encoder(self) -> BaseQuantizer:
        """The quantizer that makes the codes: ``encodes``, or this one."""
        return self.encodes or self

    def __str__(self) -> str:
        return self.name


class _Reference:
    """A weak reference that equals others to the same object, whatever that object is equal to."""

    __slots__ = ("_id", "_reference")

    def __init__(self, thing: object) -> None:
        # There is one such reference to an object, as long as anything holds it.
        self._reference, self._id = weakref.ref(thing), id(thing)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reference) and self._reference is other._reference

    def __hash__(self) -> int:
        return self._id


class ElementwiseQuantizer(BaseQuantizer):
    """A quantizer that computes scales from the weight, and then encodes each element on its own.

    The tracker can therefore encode in slices that fit the cache. ``name`` is the name by which users select it. If
    ``group`` neighbors in the last dimension share a scale, the other methods take the weight, and any tensor of its
    shape, with that dimension split: ``(..., K // group, group)``.

    If a weight is sharded, and ``scope`` (see :class:`Quantizer`) is ``"tensor"``, or ``"row"`` and shards cut rows, no
    process can compute the scale alone. This works for quantizers with a method ``statistic``: the statistics of all
    shards are combined and passed to ``scale``.
    """

    batchable = True
    is_defined_by_name: bool = False
    """Whether quantizers of this class with the same ``name`` and ``rounding`` make the same codes, so that weights
    with different quantizer objects may share tables and calls of kernels. A subclass does not inherit it."""
    only_needs_amax: bool = False
    """Whether a code depends only on its weight and the largest magnitude in its ``scope``, from which :meth:`scale_of`
    computes the scale; only on its weight if ``scope`` is ``"element"``. With this and ``rounding``, many weights are
    counted in one call."""
    is_two_level: bool = False
    """Whether a code depends only on its weight and the largest magnitudes of its group and its tensor, from which
    :meth:`scale_of_groups` computes the scale."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "is_defined_by_name" not in vars(cls):
            cls.is_defined_by_name = False
        if "encode_into" in vars(cls) and "rounding" not in vars(cls):
            # An inherited rounding does not describe an overridden encode_into.
            cls.rounding = ElementwiseQuantizer.rounding  # type: ignore[method-assign]
        if vars(cls).keys() & {"scale_of", "applied_scale", "scale_codes"} and "scale_rule" not in vars(cls):
            # An inherited rule does not describe overridden scales.
            cls.scale_rule = ElementwiseQuantizer.scale_rule  # type: ignore[method-assign]
        if "values" in vars(cls) and "value_rule" not in vars(cls):
            cls.value_rule = ElementwiseQuantizer.value_rule  # type: ignore[method-assign]
        if vars(cls).keys() & CHANGING and "batchable" not in vars(cls):
            cls.batchable = False
        if "scale" in vars(cls) and "only_needs_amax" not in vars(cls):
            # An inherited scale_of does not describe an overridden scale.
            cls.only_needs_amax = False

    @property
    def key(self) -> Hashable:
        """Equal for quantizers that make the same codes, if ``rounding`` is also equal: by name, or for one object."""
        return (type(self), self.name, self.format) if self.is_defined_by_name else _Reference(self)

    def grouped(self, tensor: Tensor) -> Tensor:
        """View a tensor of the weight's shape with the last dimension split, as the other methods take it.

        Raises:
            ValueError: The last dimension does not divide into groups.
        """
        if self.group is None:
            return tensor
        if tensor.ndim == 0 or tensor.shape[-1] % self.group:
            raise ValueError(
                f"quantizer {self.name!r} has one scale per {self.group} neighbors in the last dimension, but shape "
                f"{tuple(tensor.shape)} does not divide into groups of {self.group}"
            )
        return tensor.view(*tensor.shape[:-1], tensor.shape[-1] // self.group, self.group)

    @abstractmethod
    def code_dtype(self, weight: Tensor) -> torch.dtype:
        """Return the integer dtype of the ordinals."""

    @abstractmethod
    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor | None:
        """Return the scale of ``weight``; None if the format has none.

        0-dim, or broadcastable to the weight; with one scale per group, of shape ``(..., K // group, 1)``.

        Args:
            weight: The weight, or a shard of it.
            statistic: The statistic of the whole weight if ``weight`` is a shard; None to use the weight's own. Only
                quantizers with a method ``statistic(weight)`` get one. It returns magnitudes: a 0-dim tensor, or one of
                shape ``(..., 1)`` if ``scope`` is ``"row"``.

        Raises:
            ValueError: The weight's shape or dtype does not fit the format.
        """

    def scale_codes(self, scale: Tensor) -> Tensor:
        """Return group scales as they are stored, as integers of their shape, so that changes can be counted."""
        return bits_of_scale(scale)

    def block_scales(self, scale: Tensor, shape: Sequence[int], first_row: int = 0) -> Tensor:
        """Select the group scales to count: one per block if several groups share a scale.

        Args:
            scale: The scales of all groups.
            shape: The shape of the weight.
            first_row: If the weight is a shard, where it begins in the whole weight's last dimension but one. A block
                counts in the shard in which it begins.
        """
        return scale

    @abstractmethod
    def encode_into(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        """Write the ordinals of a slice.

        Args:
            weight: A slice of the weight.
            scale: The scale of the slice.
            out: Contiguous, in the slice's shape, of ``code_dtype``.
            scratch: Provides temporary buffers.
        """

    def encode_under(self, weight: Tensor, scale: Tensor | None, out: Tensor, scratch: Scratch) -> None:
        """As ``encode_into``, with a scale that may come from another weight: values beyond the format saturate."""
        self.encode_into(weight, scale, out, scratch)

    def rounding(self, weight: Tensor) -> Rounding | None:
        """Describe ``encode_into`` as data, for kernels that do more in one pass; None if that is not possible.

        The scale of the :class:`Rounding` is ``applied_scale``.
        """
        return None

    def scale_of(self, largest: Tensor) -> Tensor:
        """Compute scales from the largest magnitudes of the weights that share them.

        Works element by element, whichever weights they belong to. The largest magnitudes have the weight's dtype, and
        are NaN if one of the weights is.
        """
        raise NotImplementedError(f"quantizer {self.name!r} computes its scales from whole weights")

    def scale_rule(self, dtype: torch.dtype) -> ScaleFormula | Literal["steps"] | None:
        """What ``scale_of``, ``applied_scale`` and ``scale_codes`` do for weights of a dtype, as data.

        ``"steps"``: what weights are multiplied or divided by takes at most 256 values. The stored code of each is a
        byte that grows with the largest magnitude; where nothing is stored, each is a power of two. None: there is no
        such description, and the methods are called.
        """
        return None

    def scale_of_groups(self, largest: Tensor, of_tensors: Tensor) -> Tensor:
        """As ``scale_of``, from the largest magnitude of each group and that of the tensor it belongs to."""
        raise NotImplementedError(f"quantizer {self.name!r} does not have two-level scales")

    def applied_scale(self, scale: Tensor | None) -> Tensor | None:
        """Return what the weight is multiplied or divided by: the scale, unless the format uses another number."""
        return scale

    @abstractmethod
    def values(self, ordinals: Tensor, scale: Tensor | None) -> Tensor:
        """Return the numbers that ordinals stand for under a scale that broadcasts to them: float32 or float64.

        Without a scale, a format that has one returns the numbers under a scale of 1.
        """

    def value_rule(self) -> Literal["multiplies", "divides"] | None:
        """What ``values`` does with a scale, as data, for kernels that compute values.

        It multiplies or divides ``values(ordinals, None)``, the numbers without a scale, by ``value_scale(scale)``, all
        in float32. None: something else.
        """
        return None

    def value_scale(self, scale: Tensor) -> Tensor:
        """Return what numbers are multiplied or divided by to get values, as ``value_rule`` says: float32."""
        return scale

    def ordinal_range(self, weight: Tensor) -> tuple[int, int] | None:
        """Return the smallest and largest ordinal of a finite number; None if some ordinals between have no number."""
        return None

    def decode(self, codes: Codes) -> Tensor:
        """Return the quantized values: float32, or float64 for float64 weights and formats beyond float32."""
        return self.values(self.grouped(codes.ordinals), codes.scale).view(codes.ordinals.shape)

    @torch.no_grad()
    def encode(self, weight: Tensor) -> Codes:
        """Encode the whole weight at once. The tracker uses ``encode_into`` instead."""
        weight = weight.detach()
        grouped = self.grouped(weight)
        scale = self.scale(grouped)
        out = torch.empty(grouped.shape, dtype=self.code_dtype(weight), device=weight.device)
        self.encode_into(grouped, scale, out, new_buffer)
        return Codes(out.view(weight.shape), scale, self)
