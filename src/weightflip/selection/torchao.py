"""Find out how torchao's modules, tensors and optimizers quantize the weights that they hold."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from weightflip import distributed
from weightflip.quantizers import Quantizer, resolve, torchao
from weightflip.quantizers.adapt import adapt
from weightflip.selection.rules import Skip, dtype_name

_STORED_CODES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


def torchao_classes(thing: object) -> tuple[str, ...]:
    """Return the names of the torchao classes in the type's MRO, without importing torchao."""
    return _torchao_classes_of(type(thing))  # type: ignore[arg-type]  # types are hashable


@functools.lru_cache(maxsize=256)
def _torchao_classes_of(cls: type) -> tuple[str, ...]:
    return tuple(base.__name__ for base in cls.__mro__ if base.__module__.split(".")[0] == "torchao")


def quantizes_weights(optimizer: Any) -> bool:
    """Whether the optimizer's own step quantizes weights, as that of torchao's PARQ does."""
    return "QuantOptimizer" in torchao_classes(optimizer)


def quantizers_of_optimizer(optimizer: Any) -> dict[int, Quantizer]:
    """Map the id of each weight that the optimizer itself quantizes to its quantizer."""
    if not quantizes_weights(optimizer):
        return {}
    regularized = {id(group) for group in optimizer.regularized_param_groups()}
    return {
        id(parameter): torchao.ParqQuantizer(optimizer, (i, j), group["quant_bits"])
        for i, group in enumerate(optimizer.param_groups)
        if id(group) in regularized
        for j, parameter in enumerate(group["params"])
    }


def wrap_for_subclass(parameter: Tensor, quantizer: Quantizer) -> Quantizer:
    """Have a quantizer that the user named encode the master copy, if the parameter is a subclass that holds one.

    Raises:
        Skip: The subclass has no master copy.
    """
    parameter = distributed.local(parameter)
    classes = torchao_classes(parameter)
    if not classes or adapt(quantizer).has_plain:
        return quantizer
    for attribute in ("_data", "_tensor"):
        if isinstance(getattr(parameter, attribute, None), Tensor):
            return torchao.MasterCopyQuantizer(attribute, quantizer)
    raise Skip(
        f"torchao's {classes[0]} has no high-precision copy that {quantizer} could encode; use quantizer='auto'",
        is_mismatch=True,
    )


def quantizer_of_module(module: Any, classes: Sequence[str]) -> tuple[Quantizer, str | None]:
    """Return the quantizer that a torchao module applies to its ``weight``, and a note."""
    if "Float8Linear" in classes:
        return _float8_training(module.config), None
    if "Float8BlockwiseLinear" in classes:
        if module.block_size != 128:
            raise Skip(f"torchao casts it in blocks of {module.block_size}: not supported yet")
        return resolve("float8_e4m3:128x128"), None
    if "FakeQuantizedLinear" in classes or "FakeQuantizedEmbedding" in classes:
        quantizer = _fake_quantized(module.weight_fake_quantizer)
        note = None if quantizer.is_active else "Fake quantization is disabled: flips are counted once it is enabled"
        return quantizer, note
    if "Int8MixedPrecisionTrainingLinear" in classes:
        return _int8_mixed_precision(module.config), None
    if "MXFakeQuantizedLinear" in classes:
        config = module.weight_config
        return _mx(config.dtype, config.scaling_mode, config.block_size), None
    if "NVFP4FakeQuantizedLinear" in classes:
        return resolve("nvfp4:tensor" if module.weight_config.use_per_tensor_scale else "nvfp4"), None
    raise Skip(
        f"weightflip does not know how torchao's {classes[0]} quantizes its weight; name a format in quantizer=",
        unknown_class=classes[0],
    )


def quantizer_of_subclass(
    parameter: Any, classes: Sequence[str], owner: nn.Module | None
) -> tuple[Quantizer, str | None]:
    """Return the quantizer that a torchao tensor subclass applies, and a note."""
    if "Float8TrainingWeightWrapperTensor" in classes:
        if not hasattr(parameter.config, "_float8_linear_config"):
            raise Skip("before version 0.18, torchao casts these weights only in its grouped_mm: not supported yet")
        if parameter.ndim != 2:
            raise Skip(f"torchao casts {parameter.ndim}-dimensional weights for its grouped_mm: not supported yet")
        return torchao.MasterCopyQuantizer("_data", _float8_training(parameter.config._float8_linear_config)), None
    if "MXFP8TrainingWeightWrapperTensor" in classes:
        if parameter.ndim != 2:
            raise Skip(f"torchao casts {parameter.ndim}-dimensional weights for its grouped_mm: not supported yet")
        return torchao.MasterCopyQuantizer(
            "_data", _mx(torch.float8_e4m3fn, parameter.config.scale_calculation_mode)
        ), None
    if "BitNetTrainingLinearWeight" in classes:
        return torchao.MasterCopyQuantizer("_data", resolve("ternary")), None
    if "Int8MixedPrecisionTrainingLinearWeight" in classes:
        quantizer = torchao.MasterCopyQuantizer("_data", _int8_mixed_precision(parameter.config))
        # torchao 0.18 registers this subclass's linear in a table that is never read.
        functions = getattr(type(parameter), "_TORCH_FN_TABLE", {}).values()
        if any(nn.functional.linear in table for table in functions):
            return quantizer, None
        return quantizer, (
            f"This torchao version computes with the unquantized weights of {classes[0]}; use "
            "Int8MixedPrecisionTrainingConfig(module_swap=True) for int8. They are tracked as if cast to int8"
        )
    if "WeightWithDynamicFloat8CastTensor" in classes:
        if owner is not None and "Float8Linear" in torchao_classes(owner):
            return torchao.MasterCopyQuantizer("_tensor", _float8_training(cast(Any, owner).config)), None
        return torchao.MasterCopyQuantizer("_tensor", _float8(parameter._dtype)), None
    for attribute in ("int_data", "qdata"):
        stored = getattr(parameter, attribute, None)
        if isinstance(stored, Tensor) and isinstance(getattr(parameter, "scale", None), Tensor):
            if stored.shape != parameter.shape or stored.dtype not in _STORED_CODES:
                raise Skip(
                    f"torchao's {classes[0]} packs its codes ({attribute}: {dtype_name(stored)}): not supported yet"
                )
            return torchao.StoredCodes(attribute, f"stored_{dtype_name(stored)}"), None
    raise Skip(f"weightflip does not support torchao's {classes[0]}", unknown_class=classes[0])


def _fake_quantized(fake_quantizer: Any) -> torchao.FakeQuantizer:
    """Return the quantizer of a layer in quantization-aware training."""
    if fake_quantizer is None:
        raise Skip("torchao's QAT leaves the weight in high precision and quantizes only activations")
    for name in torchao_classes(fake_quantizer):
        if name in torchao.FAKE_QUANTIZERS:
            try:
                return torchao.FAKE_QUANTIZERS[name](fake_quantizer)
            except KeyError:
                raise Skip(f"torchao's {fake_quantizer} casts to a dtype that is not supported yet") from None
    name = type(fake_quantizer).__name__
    raise Skip(
        f"weightflip does not know how torchao's {name} quantizes; name a format in quantizer=", unknown_class=name
    )


def _int8_mixed_precision(config: Any) -> Quantizer:
    if not config.output:
        raise Skip("its int8 mixed-precision training leaves the weight in high precision in forward (output=False)")
    return torchao.Int8RowwiseQuantizer()


def _float8_training(config: Any) -> Quantizer:
    """Return the quantizer that a Float8LinearConfig applies to the weight."""
    weight = config.cast_config_weight
    if weight.scaling_type.name == "DISABLED":
        raise Skip("its Float8Linear leaves the weight in high precision (scaling DISABLED)")
    granularity = {"TENSORWISE": "", "AXISWISE": ":row"}.get(weight.scaling_granularity.name)
    if granularity is None:
        raise Skip(f"its Float8Linear casts to {weight.target_dtype}, {weight.scaling_granularity}: not supported yet")
    return _float8(weight.target_dtype, granularity + (":pow2" if config.round_scales_to_power_of_2 else ""))


def _float8(dtype: torch.dtype, options: str = "") -> Quantizer:
    name = {torch.float8_e4m3fn: "float8_e4m3", torch.float8_e5m2: "float8_e5m2"}.get(dtype)
    if name is None:
        raise Skip(f"torchao casts it to {dtype}: not supported yet")
    return resolve(name + options)


def _mx(dtype: torch.dtype, mode: Any, block_size: int = 32) -> Quantizer:
    """Return the MX quantizer with the scaling mode of a torchao config."""
    name = {
        torch.float4_e2m1fn_x2: "mxfp4",
        torch.float8_e4m3fn: "mxfp8_e4m3",
        torch.float8_e5m2: "mxfp8_e5m2",
    }.get(dtype)
    if name is None or block_size != 32:
        raise Skip(f"torchao casts it to {dtype} in blocks of {block_size}: not supported yet")
    return resolve(f"{name}:{mode.value}")
