"""Try a quantizer on a weight before training, so that errors are raised in the user's call."""

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
from weightflip.quantizers.protocol import new_buffer
from weightflip.selection.rules import dtype_name

_ORDINALS = (torch.int8, torch.int16, torch.int32, torch.int64)
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def trial_failure_message(quantizer: Quantizer, parameter: Tensor, error: Exception) -> str:
    """Explain why a quantizer does not encode a parameter, and what to do."""
    kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
    return (
        f"{quantizer_name(quantizer)!r} cannot encode it (dtype {dtype_name(parameter)}, shape "
        f"{tuple(parameter.shape)}): {kind}{error}; name another quantizer for it in quantizer=, or leave it "
        "out with exclude="
    )


@torch.no_grad()
def try_quantizer(quantizer: Quantizer, weight: Tensor) -> Tensor | None:
    """Encode a weight now to raise the errors that the first step would raise. RNG states are restored.

    An elementwise quantizer is tried on one row. Any other encodes the whole weight, as in each step, since it may
    depend on the shape.

    Returns:
        The scale of the weight.

    Raises:
        Exception: Whatever the quantizer raises, or ValueError if it does not return valid codes.
    """
    with _preserve_rng_state(weight.device):
        if not isinstance(quantizer, ElementwiseQuantizer):
            # On a copy: a quantizer that works in place would change the training.
            copy = weight.clone() if type(weight) is Tensor else weight
            codes = quantizer.encode(copy)
            _check_codes(quantizer, codes, weight)
            if copy is not weight and not torch.equal(_bits(copy), _bits(weight)):
                raise ValueError(
                    f"{quantizer} writes to the weight passed to it, which would change the training; "
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
            quantizer.encode_into(piece, scale_of_piece, out, new_buffer)
        return scale


@contextmanager
def _preserve_rng_state(device: torch.device) -> Iterator[None]:
    """Restore the random states of torch, Python and NumPy afterward: a user's quantizer may draw numbers."""
    devices = [device] if device.type == "cuda" else []
    numpy = sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


def _check_codes(quantizer: Quantizer, codes: Any, weight: Tensor) -> None:
    if not isinstance(codes, Codes) or codes.ordinals.shape != weight.shape or codes.ordinals.dtype not in _ORDINALS:
        got = (
            f"{codes.ordinals.dtype} ordinals of shape {tuple(codes.ordinals.shape)}"
            if isinstance(codes, Codes)
            else type(codes).__name__
        )
        raise ValueError(
            f"encode() of {quantizer} must return Codes with int8, int16, int32 or int64 ordinals of the weight's "
            f"shape {tuple(weight.shape)}, got {got}"
        )


def _bits(tensor: Tensor) -> Tensor:
    """View a tensor as integers, for which NaN equals itself."""
    return tensor.view(_BITS[tensor.element_size()])
