"""Weights to codes: one file a family of formats, found by name through :func:`resolve`."""

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
    """The codes that a weight has in a format.

    Args:
        weight: Floating-point, any shape.
        format: A quantizer name, a ``torch.dtype`` that there is one format for, a ``FloatFormat`` or ``Quantizer``, or
            a function from a weight to its quantized values.
        scale: What the weight is divided by before rounding, instead of the format's own rule; a number or a tensor
            that broadcasts to ``weight``. A ``FloatFormat`` without ``scale`` is not scaled.

    Returns:
        Ordinals of the weight's shape, and the scale that ``decode`` needs.

    Raises:
        ValueError: Unknown format, or a weight or scale that does not fit it.
        TypeError: ``weight`` is no dense tensor, ``format`` none of the above, or ``scale`` neither a number nor a
            tensor.

    Example:
        >>> from weightflip.formats import E2M1
        >>> encode(torch.tensor([0.0, 0.7, -6.0]), E2M1).ordinals
        tensor([ 0,  1, -7], dtype=torch.int8)
    """
    checks.dense("weight", weight)
    return resolve(format, scale).encode(weight)


@torch.no_grad()
def decode(codes: Codes, format: Any = None) -> Tensor:
    """The quantized values that codes stand for: the inverse of :func:`encode` on what the format can hold.

    Args:
        codes: What ``encode`` gave.
        format: Only needed for codes that do not know their quantizer, such as ones that you made yourself.

    Returns:
        The codes' shape; float32, or float64 where the weight or the format needed it.

    Raises:
        TypeError: ``codes`` are none.
        ValueError: The quantizer has no ``decode``, or is not known.

    Example:
        >>> from weightflip.formats import E2M1
        >>> decode(encode(torch.tensor([0.0, 0.7, -9.0]), E2M1))
        tensor([ 0.0000,  0.5000, -6.0000])
    """
    if not isinstance(codes, Codes):
        raise TypeError(
            f"codes are what encode() gives, got {checks.describe(codes)}; put your own together with "
            "Codes(ordinals, scale)"
        )
    if codes.quantizer is None and format is None:
        raise ValueError("these codes do not know their quantizer; pass its name as format=")
    quantizer = codes.quantizer if codes.quantizer is not None else resolve(format)
    return adapt(quantizer).decode(codes)


@torch.no_grad()
def quantize(weight: Tensor, format: Any, scale: Tensor | float | None = None) -> Tensor:
    """The values that a weight takes in a format: encoded and decoded.

    Arguments and errors are those of :func:`encode`.

    Returns:
        The weight's shape; float32, or float64 where the weight or the format needs it.

    Example:
        >>> quantize(torch.tensor([0.1, 0.2, -0.4]), "float8_e4m3")
        tensor([ 0.1000,  0.2000, -0.4000])
    """
    checks.dense("weight", weight)
    quantizer = resolve(format, scale)
    return decode(quantizer.encode(weight), quantizer)
