"""Encode weights as codes. Each family of formats has one module; :func:`resolve` finds them by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from weightflip import checks
from weightflip.quantizers.adapt import adapt
from weightflip.quantizers.protocol import BaseQuantizer, Codes, ElementwiseQuantizer, Quantizer
from weightflip.quantizers.registry import quantizer_names, register
from weightflip.quantizers.specs import resolve

__all__ = [
    "BaseQuantizer",
    "Codes",
    "ElementwiseQuantizer",
    "Quantizer",
    "adapt",
    "decode",
    "encode",
    "quantize",
    "quantizer_names",
    "register",
    "resolve",
]


@torch.no_grad()
def encode(weight: Tensor, format: Any, scale: Tensor | float | None = None) -> Codes:
    """Encode a weight in a format.

    Args:
        weight: A floating-point tensor of any shape.
        format: A quantizer name, a ``torch.dtype`` that has exactly one format, a ``FloatFormat`` or ``Quantizer``, or
            a function from a weight to its quantized values.
        scale: What the weight is divided by before rounding, instead of the format's own rule: a number or a tensor
            that broadcasts to ``weight``. A ``FloatFormat`` without ``scale`` is not scaled.

    Returns:
        Ordinals of the weight's shape, and the scale that ``decode`` needs.

    Raises:
        ValueError: Unknown format, or a weight or scale that does not fit it.
        TypeError: ``weight`` is not a dense tensor, ``format`` is none of the above, or ``scale`` is neither a number
            nor a tensor.

    Example:
        >>> from weightflip.formats import E2M1
        >>> encode(torch.tensor([0.0, 0.7, -6.0]), E2M1).ordinals
        tensor([ 0,  1, -7], dtype=torch.int8)
    """
    checks.dense("weight", weight)
    return resolve(format, scale).encode(weight)


@torch.no_grad()
def decode(codes: Codes, format: Any = None) -> Tensor:
    """Decode codes to quantized values: the inverse of :func:`encode` for numbers that the format can hold.

    Args:
        codes: The result of ``encode``.
        format: Only needed for codes without a quantizer, such as those you create yourself.

    Returns:
        A tensor of the codes' shape: float32, or float64 if the weight or the format needs it.

    Raises:
        TypeError: ``codes`` is not a :class:`Codes` object.
        ValueError: The quantizer has no ``decode``, or is not known.

    Example:
        >>> from weightflip.formats import E2M1
        >>> decode(encode(torch.tensor([0.0, 0.7, -9.0]), E2M1))
        tensor([ 0.0000,  0.5000, -6.0000])
    """
    if not isinstance(codes, Codes):
        raise TypeError(
            f"codes are the result of encode(), got {checks.describe(codes)}; create your own with "
            "Codes(ordinals, scale)"
        )
    if codes.quantizer is None and format is None:
        raise ValueError("these codes have no quantizer; pass its name as format=")
    quantizer = codes.quantizer if codes.quantizer is not None else resolve(format)
    return adapt(quantizer).decode(codes)


@torch.no_grad()
def quantize(weight: Tensor, format: Any, scale: Tensor | float | None = None) -> Tensor:
    """Quantize a weight: encode it in a format and decode it.

    Arguments and errors are those of :func:`encode`.

    Returns:
        A tensor of the weight's shape: float32, or float64 if the weight or the format needs it.

    Example:
        >>> quantize(torch.tensor([0.1, 0.2, -0.4]), "float8_e4m3")
        tensor([ 0.1000,  0.2000, -0.4000])
    """
    checks.dense("weight", weight)
    quantizer = resolve(format, scale)
    return decode(quantizer.encode(weight), quantizer)
