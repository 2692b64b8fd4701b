"""Encode weights that torchao quantizes during training, with its own functions or by reading the codes it stores.

The only module that uses torchao's private names. torchao is not imported until something is encoded.
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
from weightflip.quantizers.protocol import BaseQuantizer, Codes, Quantizer, Scope, new_buffer

_PRIMITIVES = "torchao.quantization.quant_primitives"


def _import_from_torchao(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"weightflip needs {module}.{name}, which torchao 0.18 has, but the installed version does not: {error}"
        ) from error


def _as_ordinals(integers: Tensor, dtype: torch.dtype = torch.int8) -> Tensor:
    """Convert floating-point integers to ordinals, and NaN to the smallest integer of ``dtype``."""
    return integers.nan_to_num(nan=float(torch.iinfo(dtype).min)).to(dtype)


def _float8_ordinals(data: Tensor) -> Tensor:
    format = STORED_FORMATS[data.dtype]
    ordinals = data.contiguous().view(torch.int8).clone()
    bits_to_ordinals_(ordinals, format, new_buffer)
    return ordinals


class FakeQuantizer(BaseQuantizer):
    """Encodes as a fake quantizer of torchao's quantization-aware training (QAT) does.

    While the fake quantizer is disabled, the layer computes with the weight itself, and nothing is counted. The fake
    quantizer's state is never changed.

    Args:
        fake_quantizer: The layer's ``weight_fake_quantizer``.
    """

    scope: Scope | None = "row"

    def __init__(self, fake_quantizer: Any) -> None:
        self.fake_quantizer = fake_quantizer

    @property
    def is_active(self) -> bool:  # type: ignore[override]
        return bool(self.fake_quantizer.enabled)


class IntxFakeQuantizer(FakeQuantizer):
    """Integers of 1 to 8 bits per group, row or token, symmetric or not: torchao's ``IntxFakeQuantizer``.

    Scale and zero point are those that a call of the fake quantizer would use now, and the integers are those of its
    forward. If the zero point ``z`` is an integer, values are ``(q - z) * scale`` and the code is ``q - z``: the
    number in units of the scale. The stored ``q`` would be wrong: when ``z`` moves by one with the smallest weight of a
    group, every ``q`` of the group changes but no number does, and a weight that stays at ``q = 0`` stands for a
    different number. If the zero point is a floating-point number (``ZeroPointDomain.FLOAT``), the grid shifts
    continuously, just as a scale stretches it, and the code is ``q``.

    Codes are int8, or int32 for asymmetric formats: torchao 0.18 uses the zero point of groups and rows as a value in
    the weights' units before converting it to an integer, so it is unbounded. (It is 0 for weights below 1, and an
    unsigned format then maps every negative weight to 0: that is what the layer computes with.) NaN is the smallest
    integer of the dtype, which only symmetric ``int8`` also uses for a number. A learned zero point need not be an
    integer; numbers at the ends of its range are rounded.
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
        """True if scales are learned, or kept from the first forward: then they do not depend on the weight alone."""
        return not self.fake_quantizer.config.is_dynamic

    @property
    def scope(self) -> Scope | None:  # type: ignore[override]
        """None if scales are kept, since those belong to the whole weight."""
        return None if self.has_state else "row"

    def encode(self, weight: Tensor) -> Codes:
        quantize = _import_from_torchao(_PRIMITIVES, "_do_fake_quantize_affine")
        domains = _import_from_torchao(_PRIMITIVES, "ZeroPointDomain")
        config = self.fake_quantizer.config
        scale, zero_point = self._scale_and_zero_point(weight)
        low, high = _import_from_torchao(_PRIMITIVES, "_DTYPE_TO_QVALUE_BOUNDS")[config.dtype]
        # Per token, torchao does not pass the domain on, so its default applies.
        by_token = type(config.granularity).__name__ == "PerToken"
        domain = domains.INT if by_token else config.zero_point_domain
        block = (1, weight.numel() // max(1, scale.numel()))
        integers, _ = quantize(weight, block, scale, zero_point, torch.int32, low, high, domain)
        integers = integers.view(scale.numel(), -1)
        if domain is domains.INT and not config.is_symmetric:
            integers = (integers.double() - zero_point.view(-1, 1)).round()
        # An integer zero point loses NaN, but the scale keeps it.
        integers = integers.masked_fill(scale.view(-1, 1).isnan(), torch.nan)
        ordinals = _as_ordinals(integers, torch.int8 if config.is_symmetric else torch.int32)
        rows = weight.shape[0]
        shape = (rows, 1) if scale.numel() == rows else (rows, scale.numel() // rows, 1)
        return Codes(ordinals.view(weight.shape), scale.float().view(shape))

    def _scale_and_zero_point(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        # forward() stores what it computes, so call it on a shallow copy, which leaves the trained module unchanged.
        # Calling the module itself would run hooks.
        probe = copy.copy(self.fake_quantizer)
        probe.__dict__["_parameters"] = dict(self.fake_quantizer._parameters)
        probe.__dict__["enabled"] = True
        probe.forward(weight)
        return probe.scale.detach(), probe.zero_point.detach()


class Int4WeightFakeQuantizer(FakeQuantizer):
    """int4 per group as in MSLK's kernels: torchao's ``Int4WeightFakeQuantizer``.

    With bfloat16 activations, the grid runs from the smallest to the largest weight of a group and need not contain 0.
    The code is the stored integer, -8 to 7: ``round((w - min) / scale) - 8``, ``scale = (max - min) / 15``. With
    float8 activations, the weight is first rounded to float8 per row, and then to ``round(w / scale)`` in -8 to 7,
    ``scale = amax / 8``. Source: torchao 0.18, ``torchao/quantization/qat/fake_quantizer.py``.
    """

    def __init__(self, fake_quantizer: Any) -> None:
        super().__init__(fake_quantizer)
        config = fake_quantizer.config
        self._is_float8 = config.activation_dtype is torch.float8_e4m3fn
        self.name = f"qat_int4:g{config.group_size}" + (":float8" if self._is_float8 else ":asymmetric")

    def encode(self, weight: Tensor) -> Codes:
        group = self.fake_quantizer.config.group_size
        integers, scale = (
            self._quantize_after_float8(weight, group) if self._is_float8 else self._quantize_asymmetric(weight, group)
        )
        return Codes(_as_ordinals(integers).view(weight.shape), scale.float().unsqueeze(-1))

    @staticmethod
    def _quantize_asymmetric(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
        grouped = weight.float().view(weight.shape[0], -1, group)
        low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
        scale = (high - low).clamp(min=1e-6) / 15
        return ((grouped - low) / scale).round().clamp(0, 15) - 8, scale.squeeze(-1)

    @staticmethod
    def _quantize_after_float8(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
        choose = _import_from_torchao(_PRIMITIVES, "_choose_scale_float8")
        cast = _import_from_torchao(_PRIMITIVES, "_quantize_affine_float8")
        cast_back = _import_from_torchao(_PRIMITIVES, "_dequantize_affine_float8")
        quantize = _import_from_torchao(_PRIMITIVES, "_do_fake_quantize_affine")
        float8 = torch.float8_e4m3fn
        row_scale = choose(weight, (1, weight.shape[-1]), float8, hp_value_lb=1e-12)
        rounded = cast_back(cast(weight, row_scale, float8), row_scale, weight.dtype)
        scale = (rounded.view(weight.shape[0], -1, group).abs().amax(-1) / 8).clamp(min=1e-6)
        integers, _ = quantize(rounded, (1, group), scale, torch.zeros_like(scale), torch.int8, -8, 7)
        return integers, scale


class Float8FakeQuantizer(FakeQuantizer):
    """Float8 that divides by its scale: torchao's ``Float8FakeQuantizer``. Codes are those of its own cast.

    ``s = amax / max``, computed in the weight's dtype and stored in float32. The code is that of ``clamp(w / s, -max,
    max)``. Without a lower bound in the configuration, an all-zero row is ``0 / 0``: NaN, as in forward.
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
        block = _import_from_torchao("torchao.quantization.utils", "get_block_size")(weight.shape, config.granularity)
        scale = _import_from_torchao(_PRIMITIVES, "_choose_scale_float8")(
            weight, block, config.dtype, hp_value_lb=config.hp_value_lb, hp_value_ub=config.hp_value_ub
        )
        return Codes(
            _float8_ordinals(_import_from_torchao(_PRIMITIVES, "_quantize_affine_float8")(weight, scale, config.dtype)),
            scale,
        )


FAKE_QUANTIZERS: dict[str, type[FakeQuantizer]] = {
    cls.__name__: cls for cls in (IntxFakeQuantizer, Int4WeightFakeQuantizer, Float8FakeQuantizer)
}
"""Name of torchao's class to the quantizer that encodes as it does."""


class MasterCopyQuantizer(BaseQuantizer):
    """Encodes the high-precision master copy that a tensor subclass holds.

    Args:
        attribute: The subclass's attribute that holds the master copy.
        quantizer: Encodes the master copy.
    """

    def __init__(self, attribute: str, quantizer: Quantizer) -> None:
        self.attribute = attribute
        self.quantizer = quantizer
        self.encodes = adapt(quantizer)
        self.name = self.encodes.name
        self.scope = self.encodes.scope

    def plain(self, weight: Tensor) -> Tensor:
        """Return the master copy."""
        master: Tensor = getattr(weight, self.attribute)
        return master

    def encode(self, weight: Tensor) -> Codes:
        return self.quantizer.encode(self.plain(weight))

    def __str__(self) -> str:
        return str(self.quantizer)


class Int8RowwiseQuantizer(BaseQuantizer):
    """int8 as torchao's int8 mixed-precision training casts a weight: ``scale = amax / 127``, per row.

    The codes are those of ``quantize_int8_rowwise``, -127 to 127; NaN is -128.
    """

    name = "int8_mixed_precision"
    scope = "row"

    def encode(self, weight: Tensor) -> Codes:
        cast = _import_from_torchao("torchao.prototype.quantized_training.int8", "quantize_int8_rowwise")
        integers, scale = cast(weight)
        scale = scale.view(-1, 1)
        return Codes(integers.masked_fill(weight.isnan() | ~scale.isfinite(), NAN_ORDINAL), scale.float())


class StoredCodes(BaseQuantizer):
    """Reads the codes that a tensor subclass stores.

    They are never computed again from values: the update of these weights rounds stochastically.

    Args:
        attribute: The subclass's attribute that holds the codes: int8 or float8, of the weight's shape.
        name: The quantizer's name in reports.
    """

    # Read before each step: writes to the codes do not change the version counter of the subclass around them.
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
            integers = stored.short() - self._expand_to_weights(zero_point, stored).short()
            return Codes(integers.masked_fill(scale.isnan(), torch.iinfo(torch.int16).min), scale)
        return Codes(stored.masked_fill(scale.isnan(), NAN_ORDINAL), scale)

    def plain(self, weight: Any) -> Tensor:
        """Return the scales, expanded to one per weight."""
        return self._scale(weight).expand(weight.shape)

    def _scale(self, weight: Any) -> Tensor:
        return self._expand_to_weights(weight.scale, getattr(weight, self.attribute))

    @staticmethod
    def _expand_to_weights(factor: Tensor, like: Tensor) -> Tensor:
        if factor.numel() == 1:
            return factor.view([1] * like.ndim)
        if factor.ndim < like.ndim:
            return factor.view(*factor.shape, *[1] * (like.ndim - factor.ndim))
        for dim, (blocks, size) in enumerate(zip(factor.shape, like.shape, strict=True)):
            if blocks not in (1, size):
                factor = factor.repeat_interleave(size // blocks, dim)
        return factor


class ParqQuantizer(BaseQuantizer):
    """The nearest of the levels that torchao's PARQ ``QuantOptimizer`` keeps for a weight.

    After its step the parameter is the quantized value (with ``ProxHardQuant``; other maps approach it), and the levels
    move with the weights. The code is therefore the index of the level, counted from the middle one, not the value.
    During the warm-up there are no levels, and nothing is counted. Codes are int8 for up to 255 levels, else int16; NaN
    is the smallest integer of the dtype.

    Args:
        optimizer: The ``QuantOptimizer``.
        position: The index of the param group and of the weight in it. The optimizer keeps levels per weight.
        bits: The param group's ``quant_bits``.
    """

    has_state = True

    def __init__(self, optimizer: Any, position: tuple[int, int], bits: int) -> None:
        self.optimizer = optimizer
        self.position = position
        self.bits = bits
        self.name = f"parq_{bits}bit"

    @property
    def is_active(self) -> bool:  # type: ignore[override]
        return self._current_levels() is not None

    def _current_levels(self) -> Tensor | None:
        group, index = self.position
        parameter = self.optimizer.param_groups[group]["params"][index]
        # get(), since indexing the state would create an entry.
        levels: Tensor | None = self.optimizer.state.get(parameter, {}).get("quants")
        return levels

    def encode(self, weight: Tensor) -> Codes:
        levels = self._current_levels()
        if levels is None:
            return Codes(torch.zeros_like(weight, dtype=torch.int8))
        levels = levels.view(-1, levels.shape[-1])
        # One row of levels per channel or block, in the order of the weights; or one row for all.
        rows = weight.reshape(levels.shape[0], -1).to(levels.dtype)
        halfway = (levels[:, :-1] + levels[:, 1:]) / 2
        nearest = torch.searchsorted(halfway, rows) - levels.shape[-1] // 2
        dtype = torch.int8 if levels.shape[-1] <= 255 else torch.int16
        ordinals = nearest.to(dtype).masked_fill_(rows.isnan(), torch.iinfo(dtype).min)
        return Codes(ordinals.view(weight.shape))
