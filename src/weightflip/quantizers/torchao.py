"""Codes of weights that torchao quantizes in training, made with torchao's own functions or read where it keeps them.

The one place that knows torchao's private names. torchao is imported when something is encoded, not before.
"""

from __future__ import annotations

import copy
import importlib
from typing import Any

import torch
from torch import Tensor

from weightflip.formats import FloatFormat
from weightflip.quantizers.adapt import adapt
from weightflip.quantizers.integer import NAN_ORDINAL
from weightflip.quantizers.ordinals import STORED_FORMATS, bits_to_ordinals_
from weightflip.quantizers.protocol import BaseQuantizer, Codes, Quantizer, Scope, fresh

_PRIMITIVES = "torchao.quantization.quant_primitives"


def _torchao(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"weightflip needs {module}.{name}, which torchao 0.18 has and the one installed has not: {error}"
        ) from error


def _as_ordinals(integers: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Whole numbers in floating point to ordinals; NaN to the smallest integer of ``dtype``."""
    return integers.nan_to_num(nan=float(torch.iinfo(dtype).min)).to(dtype)


def _float8_ordinals(data: Tensor) -> Tensor:
    format = STORED_FORMATS[data.dtype]
    ordinals = data.contiguous().view(torch.int8).clone()
    bits_to_ordinals_(ordinals, format, fresh)
    return ordinals


class FakeQuantizer(BaseQuantizer):
    """A quantizer that a fake quantizer of torchao's quantization-aware training (QAT) stands behind.

    While the fake quantizer is disabled the layer computes with the weight itself, and nothing is counted. Nothing of
    its state is written.

    Args:
        fake_quantizer: What the layer holds as ``weight_fake_quantizer``.
    """

    scope: Scope | None = "row"

    def __init__(self, fake_quantizer: Any) -> None:
        self.fake_quantizer = fake_quantizer

    @property
    def is_active(self) -> bool:  # type: ignore[override]
        return bool(self.fake_quantizer.enabled)


class IntxFakeQuantizer(FakeQuantizer):
    """Integers of 1 to 8 bits by group, row or token, symmetric or not: torchao's ``IntxFakeQuantizer``.

    Scale and zero point are those that a call of the fake quantizer would use now, and the integers those of its
    forward. Where the zero point ``z`` is an integer, values are ``(q - z) * scale`` and the code is ``q - z``: the
    number in units of the scale. The stored ``q`` would not do: when ``z`` moves by one with the smallest weight of a
    group, every ``q`` of the group changes and no number does, and a weight that stays at ``q = 0`` stands for another
    number. Where the zero point is a floating-point number (``ZeroPointDomain.FLOAT``), the grid slides continuously,
    as it stretches with a scale, and the code is ``q``.

    Codes are int8, and int32 for asymmetric formats: torchao 0.18 takes the zero point of groups and rows for a value
    of the weights before it makes an integer of it, so that it has no bounds. (It is 0 for weights below 1, and an
    unsigned format then makes 0 of every negative weight: that is what the layer computes with.) NaN is the smallest
    integer of the dtype, which symmetric ``int8`` alone uses for a number as well. A learned zero point need not be
    whole; numbers at the ends of its range are rounded.
    """

    def __init__(self, fake_quantizer: Any) -> None:
        super().__init__(fake_quantizer)
        config = fake_quantizer.config
        dtype = getattr(config.dtype, "name", None) or str(config.dtype).removeprefix("torch.")
        granularity = type(config.granularity).__name__
        by = {"PerAxis": "row", "PerToken": "token"}.get(granularity) or f"g{config.group_size}"
        self.name = f"qat_{dtype.lower()}:{by}" + ("" if config.is_symmetric else ":asymmetric")

    @property
    def has_state(self) -> bool:  # type: ignore[override]
        """Scales that are learned, or kept from the first forward, are not the weight's."""
        return not self.fake_quantizer.config.is_dynamic

    @property
    def scope(self) -> Scope | None:  # type: ignore[override]
        """Scales that are kept are those of the whole weight."""
        return None if self.has_state else "row"

    def encode(self, weight: Tensor) -> Codes:
        quantize = _torchao(_PRIMITIVES, "_do_fake_quantize_affine")
        domains = _torchao(_PRIMITIVES, "ZeroPointDomain")
        config = self.fake_quantizer.config
        scale, zero_point = self._parameters(weight)
        low, high = _torchao(_PRIMITIVES, "_DTYPE_TO_QVALUE_BOUNDS")[config.dtype]
        # torchao leaves the domain of tokens at its default.
        by_token = type(config.granularity).__name__ == "PerToken"
        domain = domains.INT if by_token else config.zero_point_domain
        block = (1, weight.numel() // max(1, scale.numel()))
        integers, _ = quantize(weight, block, scale, zero_point, torch.int32, low, high, domain)
        integers = integers.view(scale.numel(), -1)
        if domain is domains.INT and not config.is_symmetric:
            integers = (integers.double() - zero_point.view(-1, 1)).round()
        # A NaN is lost in a zero point that is an integer, but not in the scale.
        integers = integers.masked_fill(scale.view(-1, 1).isnan(), torch.nan)
        ordinals = _as_ordinals(integers, torch.int8 if config.is_symmetric else torch.int32)
        rows = weight.shape[0]
        shape = (rows, 1) if scale.numel() == rows else (rows, scale.numel() // rows, 1)
        return Codes(ordinals.view(weight.shape), scale.float().view(shape))

    def _parameters(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # forward() stores what it computes; in this shallow copy, that does not reach the module that trains. Not
        # called as a module: hooks would run.
        probe = copy.copy(self.fake_quantizer)
        probe.__dict__["_parameters"] = dict(self.fake_quantizer._parameters)
        probe.__dict__["enabled"] = True
        probe.forward(weight)
        return probe.scale.detach(), probe.zero_point.detach()


class Int4WeightFakeQuantizer(FakeQuantizer):
    """int4 by group as MSLK's kernels have it: torchao's ``Int4WeightFakeQuantizer``.

    With bfloat16 activations the grid runs from the smallest to the largest weight of a group, 0 need not be on it, and
    the code is the stored integer, -8 to 7: ``round((w - min) / scale) - 8``, ``scale = (max - min) / 15``. With
    float8 activations the weight is rounded to float8 by row first, and then to ``round(w / scale)`` in -8 to 7,
    ``scale = amax / 8``. Source: torchao 0.18, ``torchao/quantization/qat/fake_quantizer.py``.
    """

    def __init__(self, fake_quantizer: Any) -> None:
        super().__init__(fake_quantizer)
        config = fake_quantizer.config
        self._is_float8 = config.activation_dtype is torch.float8_e4m3fn
        self.name = f"qat_int4:g{config.group_size}" + (":float8" if self._is_float8 else ":asymmetric")

    def encode(self, weight: Tensor) -> Codes:
        group = self.fake_quantizer.config.group_size
        integers, scale = self._after_float8(weight, group) if self._is_float8 else self._plain(weight, group)
        return Codes(_as_ordinals(integers).view(weight.shape), scale.float().unsqueeze(-1))

    @staticmethod
    def _plain(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
        grouped = weight.float().view(weight.shape[0], -1, group)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-6) / 15
        return ((grouped - low) / scale).round().clamp(0, 15) - 8, scale.squeeze(-1)

    @staticmethod
    def _after_float8(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
        choose = _torchao(_PRIMITIVES, "_choose_scale_float8")
        cast = _torchao(_PRIMITIVES, "_quantize_affine_float8")
        cast_back = _torchao(_PRIMITIVES, "_dequantize_affine_float8")
        quantize = _torchao(_PRIMITIVES, "_do_fake_quantize_affine")
        float8 = torch.float8_e4m3fn
        row_scale = choose(weight, (1, weight.shape[-1]), float8, hp_value_lb=1e-12)
        rounded = cast_back(cast(weight, row_scale, float8), row_scale, weight.dtype)
        scale = (rounded.view(weight.shape[0], -1, group).abs().amax(-1) / 8).clamp(min=1e-6)
        integers, _ = quantize(rounded, (1, group), scale, torch.zeros_like(scale), torch.int8, -8, 7)
        return integers, scale


class Float8FakeQuantizer(FakeQuantizer):
    """Float8 divided by its scale: torchao's ``Float8FakeQuantizer``. Codes are those of its own cast.

    ``s = amax / max``, in the weight's dtype and then stored in float32; the code is that of ``clamp(w / s, -max,
    max)``. Without a lower bound in the configuration an all-zero row is ``0 / 0``: NaN in forward, and here.
    """

    def __init__(self, fake_quantizer: Any) -> None:
        super().__init__(fake_quantizer)
        config = fake_quantizer.config
        by = {"PerTensor": "", "PerRow": ":row"}.get(type(config.granularity).__name__, ":block")
        self.scope = "row" if by == ":row" else "tensor"
        self.format: FloatFormat = STORED_FORMATS[config.dtype]
        self.name = f"qat_float8_{self.format.name}{by}"

    def encode(self, weight: Tensor) -> Codes:
        config = self.fake_quantizer.config
        block = _torchao("torchao.quantization.utils", "get_block_size")(weight.shape, config.granularity)
        scale = _torchao(_PRIMITIVES, "_choose_scale_float8")(
            weight, block, config.dtype, hp_value_lb=config.hp_value_lb, hp_value_ub=config.hp_value_ub
        )
        return Codes(
            _float8_ordinals(_torchao(_PRIMITIVES, "_quantize_affine_float8")(weight, scale, config.dtype)), scale
        )


FAKE_QUANTIZERS: dict[str, type[FakeQuantizer]] = {
    cls.__name__: cls for cls in (IntxFakeQuantizer, Int4WeightFakeQuantizer, Float8FakeQuantizer)
}
"""torchao's class name to the quantizer that follows it."""


class OfMaster(BaseQuantizer):
    """Encodes the high-precision master copy that a tensor subclass holds.

    Args:
        attribute: Where the subclass has it.
        quantizer: What encodes it.
    """

    def __init__(self, attribute: str, quantizer: Quantizer) -> None:
        self.attribute = attribute
        self.quantizer = quantizer
        self.encodes = adapt(quantizer)
        self.name = self.encodes.name
        self.scope = self.encodes.scope

    def plain(self, weight: Tensor) -> Tensor:
        """The master copy."""
        master: Tensor = getattr(weight, self.attribute)
        return master

    def encode(self, weight: Tensor) -> Codes:
        return self.quantizer.encode(self.plain(weight))

    def __str__(self) -> str:
        return str(self.quantizer)


class Int8RowwiseQuantizer(BaseQuantizer):
    """int8 as torchao's int8 mixed-precision training casts a weight: ``scale = amax / 127`` of each row.

    The codes are those of ``quantize_int8_rowwise``, -127 to 127; NaN is -128.
    """

    name = "int8_mixed_precision"
    scope = "row"

    def encode(self, weight: Tensor) -> Codes:
        cast = _torchao("torchao.prototype.quantized_training.int8", "quantize_int8_rowwise")
        integers, scale = cast(weight)
        scale = scale.view(-1, 1)
        return Codes(integers.masked_fill(weight.isnan() | ~scale.isfinite(), NAN_ORDINAL), scale.float())


class StoredCodes(BaseQuantizer):
    """The codes that a tensor subclass stores, read as they are.

    Never made anew from values: the update of these weights rounds stochastically.

    Args:
        attribute: Where the subclass has its codes, int8 or float8, as large as the weight.
        name: What it is called in reports.
    """

    # Read before each step: what writes to the codes does not show on the subclass around them.
    has_state = True
    scope = "element"

    def __init__(self, attribute: str, name: str) -> None:
        self.attribute = attribute
        self.name = name

    def encode(self, weight: Any) -> Codes:
        stored, scale = getattr(weight, self.attribute), self._scale(weight)
        if stored.dtype is not torch.int8:
            return Codes(_float8_ordinals(stored), scale)
        zero_point = getattr(weight, "zero_point", None)
        if zero_point is not None:
            integers = stored.short() - self._spread(zero_point, stored).short()
            return Codes(integers.masked_fill(scale.isnan(), torch.iinfo(torch.int16).min), scale)
        return Codes(stored.masked_fill(scale.isnan(), NAN_ORDINAL), scale)

    def plain(self, weight: Any) -> Tensor:
        """The scales, one for each weight."""
        return self._scale(weight).expand(weight.shape)

    def _scale(self, weight: Any) -> Tensor:
        return self._spread(weight.scale, getattr(weight, self.attribute))

    @staticmethod
    def _spread(factor: Tensor, like: Tensor) -> Tensor:
        if factor.numel() == 1:
            return factor.view([1] * like.ndim)
        if factor.ndim < like.ndim:
            return factor.view(*factor.shape, *[1] * (like.ndim - factor.ndim))
        for dim, (blocks, size) in enumerate(zip(factor.shape, like.shape, strict=True)):
            if blocks not in (1, size):
                factor = factor.repeat_interleave(size // blocks, dim)
        return factor


class ParqQuantizer(BaseQuantizer):
    """The level that a weight is nearest to, of those that torchao's PARQ ``QuantOptimizer`` keeps for it.

    After its step the parameter is the quantized value (with ``ProxHardQuant``; others approach it), and the levels
    move with the weights. So the code is the number of the level, counted from the middle one, and not the value.
    During the warm-up there are no levels, and nothing is counted. int8 for up to 255 levels, else int16; NaN is the
    smallest integer of that.

    Args:
        optimizer: The ``QuantOptimizer``.
        place: The indices of the weight's param group and of the weight in it; levels are kept for each weight.
        bits: What its group has as ``quant_bits``.
    """

    has_state = True

    def __init__(self, optimizer: Any, place: tuple[int, int], bits: int) -> None:
        self.optimizer = optimizer
        self.place = place
        self.bits = bits
        self.name = f"parq_{bits}bit"

    @property
    def is_active(self) -> bool:  # type: ignore[override]
        return self._levels() is not None

    def _levels(self) -> Tensor | None:
        group, index = self.place
        parameter = self.optimizer.param_groups[group]["params"][index]
        # get(): to index the state would put an entry into it.
        levels: Tensor | None = self.optimizer.state.get(parameter, {}).get("quants")
        return levels

    def encode(self, weight: Tensor) -> Codes:
        levels = self._levels()
        if levels is None:
            return Codes(torch.zeros_like(weight, dtype=torch.int8))
        levels = levels.view(-1, levels.shape[-1])
        # A row of levels for each channel or block, in the order of the weights; or one for all.
        rows = weight.reshape(levels.shape[0], -1).to(levels.dtype)
        halfway = (levels[:, :-1] + levels[:, 1:]) / 2
        nearest = torch.searchsorted(halfway, rows) - levels.shape[-1] // 2
        dtype = torch.int8 if levels.shape[-1] <= 255 else torch.int16
        ordinals = nearest.to(dtype).masked_fill_(rows.isnan(), torch.iinfo(dtype).min)
        return Codes(ordinals.view(weight.shape))
