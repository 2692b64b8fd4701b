"""Trying a quantizer on a weight before training, so that what fails does so in the call."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from weightflip.quantizers import Codes, ElementwiseQuantizer, Quantizer
from weightflip.quantizers.adapt import quantizer_name
from weightflip.quantizers.protocol import fresh
from weightflip.selection.rules import dtype_name

_ORDINALS = (torch.int8, torch.int16, torch.int32, torch.int64)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def why_not(quantizer: Quantizer, parameter: Tensor, error: Exception) -> str:
    """What a trial that failed says."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return (
        f"{quantizer_name(quantizer)!r} does not encode it, dtype {dtype_name(parameter)}, shape "
        f"{tuple(parameter.shape)}: {kind}{error}; name another quantizer for it in quantizer=, or leave it "
        "out with exclude="
    )


@torch.no_grad()
def try_on(quantizer: Quantizer, weight: Tensor) -> Tensor | None:
    """Find out now what would fail at the first step; random numbers go on from where they were.

    A quantizer that goes element by element shows on a row what it does. Any other sees the whole weight, as in each
    step: it may need all of its shape.

    Returns:
        The scale of the weight.

    Raises:
        Exception: Whatever the quantizer raises, or ValueError for codes that are none.
    """
    with _random_numbers_kept(weight.device):
        if not isinstance(quantizer, ElementwiseQuantizer):
            # A copy: one that works in place would change the training.
            given = weight.clone() if type(weight) is Tensor else weight
            codes = quantizer.encode(given)
            _check_codes(quantizer, codes, weight)
            if given is not weight and not torch.equal(_bits(given), _bits(weight)):
                raise ValueError(
                    f"{quantizer} writes the weight that it is given, which would change the training; "
                    "have it work on a copy, such as weight.clone()"
                )
            return codes.scale
        weight = quantizer.grouped(weight)
        scale = quantizer.scale(weight)
        if weight.numel():
            row = (slice(0, 1),) * (weight.ndim - 1)
            piece, scale_of_piece = weight[row], scale
            if scale is not None and scale.ndim:
                scale_of_piece = scale[(slice(0, 1),) * (scale.ndim - 1)]
            out = torch.empty(piece.shape, dtype=quantizer.code_dtype(weight), device=weight.device)
            quantizer.encode_into(piece, scale_of_piece, out, fresh)
        return scale


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """What is drawn inside, by a quantizer of the user's, is drawn again afterwards."""
    devices = [device] if device.type == "cuda" else []
    numpy = sys.modules.get("numpy")
    of_python, of_numpy = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(of_python)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def _check_codes(quantizer: Quantizer, codes: Any, weight: Tensor) -> None:
    if not isinstance(codes, Codes) or codes.ordinals.shape != weight.shape or codes.ordinals.dtype not in _ORDINALS:
        got = (
            f"{codes.ordinals.dtype} ordinals of shape {tuple(codes.ordinals.shape)}"
            if isinstance(codes, Codes)
            else type(codes).__name__
        )
        raise ValueError(
            f"encode() of {quantizer} has to return Codes with int8, int16, int32 or int64 ordinals of the weight's "
            f"shape, got {got}"
        )


def _bits(tensor: Tensor) -> Tensor:
    """What equals itself, NaN too."""
    return tensor.view(_BITS[tensor.element_size()])
