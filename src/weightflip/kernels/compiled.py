"""Compile the loops over weights on the CPU with Numba, and cache them on disk. Imported only if Numba is installed."""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import threading
import types
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import llvmlite.binding  # type: ignore[import-untyped]
import numba
import numpy as np

from weightflip.kernels import groups, items, lowering, moves, vectors
from weightflip.kernels.pointwise import Pointwise

logger = logging.getLogger("weightflip")

# Seconds after which a log line says that loops are being compiled.
_PATIENCE = 1.0

_INTEGERS = {8: np.int8, 16: np.int16, 32: np.int32}


class Loop(NamedTuple):
    """A C function.

    Attributes:
        address: Address of its code.
        call: Calls it with integers, without holding the GIL.
        is_from_cache: Whether it was loaded from disk.
        owner: The object that keeps the code in memory.
    """

    address: int
    call: Callable[..., None]
    is_from_cache: bool
    owner: Any


_loops: dict[tuple[Any, ...], Loop | None] = {}


def count_loop() -> Loop | None:
    """:func:`weightflip.kernels.items.count`, ready to be called; None if it cannot be compiled."""
    return _loop(items.count, 1)


def largest_loop() -> Loop | None:
    """:func:`weightflip.kernels.items.largest`."""
    return _loop(items.largest, 1)


def count_lanes(
    weight_bits: int,
    update_bits: int,
    code_bits: int,
    scaling: int,
    by_adding: bool,
    groups: tuple[Pointwise, ...] = (),
) -> Loop | None:
    """:func:`weightflip.kernels.items.count_lanes` for these dtypes, as in ``vectors.make_advance``, and groups."""
    kind = (weight_bits, update_bits, code_bits, scaling, by_adding)
    if not groups:
        return _loop(items.count_lanes, 9, kind, lambda: {"ADVANCE": vectors.make_advance(*kind)})

    def instructions() -> dict[str, Any]:
        def observing(v: vectors.Vectors, found_at: Any, code: Any) -> lowering.Observing:
            return lowering.Observing(v, found_at, groups, code)

        return {"ADVANCE": vectors.make_advance(*kind, observing=observing)}

    what = hashlib.sha256(repr(groups).encode()).hexdigest()[:12]
    return _loop(items.count_lanes, 9, (*kind, what), instructions)


def largest_lanes(weight_bits: int) -> Loop | None:
    """:func:`weightflip.kernels.items.largest_lanes` for weights of 32 bits, float32, or 16, bfloat16."""

    def instructions() -> dict[str, Any]:
        return {
            "WIDE": vectors.make_largest(weight_bits, vectors.WIDE_OF_LARGEST // vectors.LANES_OF_LARGEST),
            "NARROW": vectors.make_largest(weight_bits, 1),
            "IN_BLOCKS": vectors.make_largest_of_blocks(weight_bits),
            "BITS": _INTEGERS[weight_bits],
            "SIZE": weight_bits // 8,
        }

    return _loop(items.largest_lanes, 4, (weight_bits,), instructions)


def keep_loop(code_bits: int) -> Loop | None:
    """:func:`weightflip.kernels.items.keep` for codes of 8, 16 or 32 bits."""

    def instructions() -> dict[str, Any]:
        return {"KEEP": vectors.make_keep(code_bits), "BITS": _INTEGERS[code_bits], "SIZE": code_bits // 8}

    return _loop(items.keep, 1, (code_bits,), instructions)


def take_loop(weight_bits: int, code_bits: int) -> Loop | None:
    """:func:`weightflip.kernels.moves.take` for float32 or bfloat16 weights, and codes of 8 or 16 bits."""
    return _loop(moves.take, 1, (weight_bits, code_bits), lambda: _dtypes_of_moves(weight_bits, code_bits))


def move_loop(weight_bits: int, code_bits: int) -> Loop | None:
    """:func:`weightflip.kernels.moves.move`; see :func:`take_loop`."""
    return _loop(moves.move, 1, (weight_bits, code_bits), lambda: _dtypes_of_moves(weight_bits, code_bits))


def _dtypes_of_moves(weight_bits: int, code_bits: int) -> dict[str, Any]:
    return {
        "BITS": _INTEGERS[weight_bits],
        "BITS_SIZE": weight_bits // 8,
        "CODE": _INTEGERS[code_bits],
        "CODE_SIZE": code_bits // 8,
        "HALF": 1 << (code_bits - 1),
        "TALLY": vectors.make_tally(weight_bits, code_bits, by_table=False),
        # Never called with codes of more bits.
        "TALLY_BY_TABLE": vectors.make_tally(weight_bits, code_bits, by_table=code_bits == 8),
    }


def count_groups_loop() -> Loop | None:
    """:func:`weightflip.kernels.groups.count_groups`."""
    return _loop(groups.count_groups, 1)


def scales_loop(form: int | None, *, is_half: bool, stores: bool) -> Loop | None:
    """Return the loop for group scales: :func:`weightflip.kernels.groups.scales_by_formula` or ``scales_by_steps``.

    Args:
        form: The form of the formula; None for steps.
        is_half: Whether the formula's scale is rounded to bfloat16.
        stores: Whether scales are stored, so that their changes are counted.
    """
    if form is None:
        return _loop(groups.scales_by_steps, 6, (stores,), lambda: {"STORES": stores})
    constants = {"FORM": form, "HALF": is_half, "STORES": stores}
    return _loop(groups.scales_by_formula, 6, (form, is_half, stores), lambda: constants)


def _loop(
    function: Callable[..., None],
    arguments: int,
    kind: tuple[int | str, ...] = (),
    instructions: Callable[[], dict[str, Any]] = dict,
) -> Loop | None:
    key = (function, *kind)
    if key not in _loops:
        name = "_".join([function.__name__, *(part if isinstance(part, str) else str(int(part)) for part in kind)])
        note = threading.Timer(_PATIENCE, _log_compilation)
        note.daemon = True
        note.start()
        try:
            _loops[key] = _compiled(function, f"{name}_{_digest()}", arguments, instructions())
        except Exception as error:
            _loops[key] = None
            message = str(error).strip().splitlines()[:1]
            warnings.warn(
                "weightflip: Numba cannot compile, counting continues without it: "
                f"{type(error).__name__}: {' '.join(message)}",
                stacklevel=2,
            )
        finally:
            note.cancel()
    return _loops[key]


@functools.cache
def _log_compilation() -> None:
    logger.warning(
        "weightflip: Numba compiles the counting loops for the CPU, which takes some seconds, and caches them on disk"
    )


def _compiled(function: Any, name: str, arguments: int, instructions: dict[str, Any]) -> Loop:
    renamed = types.FunctionType(function.__code__, {**function.__globals__, **instructions}, name)
    renamed.__qualname__ = name
    renamed.__module__ = function.__module__
    signature = numba.types.void(*[numba.types.int64] * arguments)
    for cache in (True, False):
        try:
            compiled = numba.cfunc(signature, cache=cache, error_model="numpy")(renamed)
        except Exception:
            # Usually the cache directory does not exist, or cannot be written or read.
            if not cache:
                raise
        else:
            break
    assert compiled.address is not None
    return Loop(compiled.address, compiled.ctypes, compiled.cache_hits > 0, compiled)


@functools.cache
def _digest() -> str:
    """Return a digest of the processor and of the loops' source code.

    Numba's cache has one file per function name for all signatures, which processes that start together can corrupt.
    With a separate name for each, they write identical files. Numba also misses changes outside of a function's file.
    """
    host = llvmlite.binding
    # Set by NUMBA_CPU_NAME and NUMBA_CPU_FEATURES.
    requested = numba.config.CPU_NAME, numba.config.CPU_FEATURES  # type: ignore[attr-defined]
    processor = f"{host.get_host_cpu_name()} {host.get_host_cpu_features().flatten()} {requested}"
    sources = [inspect.getsource(module) for module in (groups, items, lowering, moves, vectors)]
    return hashlib.sha256("\n".join([processor, *sources]).encode()).hexdigest()[:12]
