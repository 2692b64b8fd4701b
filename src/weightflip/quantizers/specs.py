"""Turn what users pass as a quantizer (a name, dtype, format, object or function) into one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from weightflip import checks
from weightflip.formats import BLOCK_FORMATS, BlockFormat, FloatFormat
from weightflip.quantizers import registry
from weightflip.quantizers.adapt import adapt
from weightflip.quantizers.floatx import FloatxQuantizer
from weightflip.quantizers.protocol import ElementwiseQuantizer, Quantizer

QuantizerLike: TypeAlias = "str | torch.dtype | FloatFormat | BlockFormat | Quantizer | Callable[[Tensor], Tensor]"

# Other common names of a format, and names that may mean any of several formats.
_ALIASES = {"float8_e4m3fn": "float8_e4m3", "e4m3fn": "e4m3", "fp16": "float16", "bf16": "bfloat16"}
_AMBIGUOUS = {
    **dict.fromkeys(("fp8", "float8"), ("float8_e4m3", "float8_e5m2")),
    "mxfp8": ("mxfp8_e4m3", "mxfp8_e5m2"),
    "mxfp6": ("mxfp6_e2m3", "mxfp6_e3m2"),
    "fp4": ("mxfp4", "nvfp4"),
    **dict.fromkeys(("fp32", "float32", "fp64", "float64"), ("native",)),
}
_DTYPE_NAMES = {
    torch.float8_e4m3fn: "float8_e4m3",
    torch.float8_e5m2: "float8_e5m2",
    torch.int8: "int8",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}


def _make_by_name(name: str) -> ElementwiseQuantizer:
    family, *options = name.lower().split(":")
    # A registered name takes precedence over an alias.
    for candidate in (family, _ALIASES.get(family)):
        found = None if candidate is None else registry.make_quantizer(candidate, tuple(options))
        if found is not None:
            return found
    known = registry.quantizer_names()
    hint = checks.did_you_mean(family, known)
    if family in _AMBIGUOUS:
        hint = f"did you mean {' or '.join(map(repr, _AMBIGUOUS[family]))}? "
    raise ValueError(
        f"unknown quantizer {name!r}; {hint}Expected one of {', '.join(known)} (and any eXmY of up to 16 bits), "
        "a FloatFormat, an object with encode(weight), or a function from a weight to its quantized values"
    )


def resolve(spec: Any, scale: Tensor | float | None = None) -> Quantizer:
    """Return the quantizer that ``spec`` stands for.

    Args:
        spec: A name (``"float8_e4m3:row"``), a ``torch.dtype`` that has exactly one format, a ``FloatFormat``
            (unscaled unless ``scale`` is given), one of the ``BLOCK_FORMATS``, an object with
            ``encode(weight) -> Codes``, or a function from a weight to its quantized values.
        scale: What the weight is divided by before rounding, instead of the format's own rule: a number or a tensor
            that broadcasts to the weight. Only for formats with a ``FloatFormat`` element.

    Raises:
        ValueError: An unknown name, option or dtype, or a scale for a quantizer that takes none.
        TypeError: ``spec`` is none of the above.
    """
    if isinstance(spec, torch.dtype):
        if spec not in _DTYPE_NAMES:
            raise ValueError(
                f"no single format belongs to {spec}; expected {', '.join(map(str, _DTYPE_NAMES))}, or a name such as "
                "'e3m4', or 'native' for the stored bits"
            )
        spec = _DTYPE_NAMES[spec]
    if isinstance(spec, str):
        spec = _make_by_name(spec)
    if isinstance(spec, BlockFormat):
        if BLOCK_FORMATS.get(spec.name) != spec:
            known = ", ".join(BLOCK_FORMATS)
            raise ValueError(f"no quantizer for the block format {spec}; expected one of {known}")
        spec = _make_by_name(spec.name)
    if isinstance(spec, FloatFormat):
        return FloatxQuantizer(spec, fixed_scale=scale)
    if isinstance(spec, type):
        raise TypeError(f"expected a quantizer, got the class {spec.__name__}; pass an instance of it")
    if isinstance(spec, Quantizer):
        if scale is None:
            return spec
        element = adapt(spec).format
        if isinstance(element, FloatFormat):
            return FloatxQuantizer(element, fixed_scale=scale)
        raise ValueError(f"quantizer {spec} does not take scale=; leave it out, or name a format such as 'e4m3'")
    if callable(spec):
        if scale is not None:
            raise ValueError("a function from a weight to its quantized values does not take scale=; scale inside it")
        return adapt(spec)
    raise TypeError(
        "expected a quantizer name such as 'float8_e4m3', a FloatFormat, an object with encode(weight), or a function "
        f"from a weight to its quantized values, got {type(spec).__name__}"
    )
