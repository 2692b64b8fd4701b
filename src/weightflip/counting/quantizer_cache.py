"""Keep what is computed once for each quantizer: tables, and the results of tests of kernels."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")


class Keyed(Protocol):
    """The part of a quantizer that this module needs."""

    @property
    def key(self) -> Hashable: ...

    @property
    def is_defined_by_name(self) -> bool: ...


class QuantizerCache(Generic[T]):
    """Results for quantizers, which quantizers with the same key share.

    Those of a quantizer that is defined by its own object are dropped together with the object, so that programs that
    make quantizers in a loop do not accumulate them.
    """

    def __init__(self) -> None:
        self._results: dict[Hashable, dict[Hashable, T]] = {}

    def get(self, quantizer: Keyed, kind: Hashable, make: Callable[[], T]) -> T:
        """Return the result for a quantizer; the first time, make it.

        Args:
            quantizer: The quantizer.
            kind: What else the result depends on.
            make: Makes the result, which must not refer to the quantizer.
        """
        key = quantizer.key
        results = self._results.get(key)
        if results is None:
            results = self._results[key] = {}
            if not quantizer.is_defined_by_name:
                weakref.finalize(quantizer, self._results.pop, key, None).atexit = False
        if kind not in results:
            results[kind] = make()
        return results[kind]
