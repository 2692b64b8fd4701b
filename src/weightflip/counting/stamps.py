"""Detect whether weights were written, replaced, moved or reshaped since some moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress, count
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

_storage_has_expired: Callable[[int], bool] = torch.UntypedStorage._expired  # type: ignore[assignment]


@dataclass(eq=False, slots=True)
class Stamp:
    """Identifies a parameter at one moment, to detect whether it is later written, replaced, moved or reshaped.

    Only ``versions`` changes later.
    """

    # An id, not a weak reference: torch.utils.swap_tensors, and with it Module.to(), refuses tensors that have one. If
    # the id is reused for another parameter, its storage differs as well.
    parameter: int
    # An address alone is not enough: freed memory may be reused for the next storage.
    storage: StorageWeakRef
    data_ptr: int
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype
    versions: tuple[int, int]

    @classmethod
    def of(cls, parameter: Tensor, weight: Tensor) -> Stamp | None:
        """Make a stamp; None for inference tensors.

        Args:
            parameter: The parameter.
            weight: What is encoded: the same tensor, or the master copy inside it.
        """
        if parameter.is_inference():
            # Inference tensors have no version counter.
            return None
        return cls(
            id(parameter),
            StorageWeakRef(weight.untyped_storage()),  # type: ignore[no-untyped-call]
            weight.data_ptr(),
            weight.shape,
            weight.stride(),
            weight.dtype,
            (parameter._version, weight._version),
        )

    def is_in_place(self, weight: Tensor) -> bool:
        """Whether a weight is in the same memory, with the same shape, strides and dtype."""
        address = weight.data_ptr()
        return (
            address == self.data_ptr
            and weight.shape == self.shape
            and weight.dtype is self.dtype
            and weight.stride() == self.strides
            # The same as StorageWeakRef.expired(), but six times faster. Tensors without memory share an address.
            and (not _storage_has_expired(self.storage.cdata) if address else self._has_same_storage(weight))
        )

    def _has_same_storage(self, weight: Tensor) -> bool:
        return bool(self.storage == StorageWeakRef(weight.untyped_storage()))  # type: ignore[no-untyped-call]

    def try_update(self, parameter: Tensor, weight: Tensor) -> bool:
        """Update the stamp, if it is the same parameter in the same memory, and return whether it is."""
        if id(parameter) != self.parameter or parameter.is_inference() or not self.is_in_place(weight):
            return False
        self.versions = parameter._version, weight._version
        return True

    def is_unwritten(self, parameter: Tensor, weight: Tensor) -> bool:
        """Whether it is also the same parameter, and no version counter has changed."""
        of_parameter, of_weight = self.versions
        return (
            id(parameter) == self.parameter
            and parameter._version == of_parameter
            and (weight is parameter or weight._version == of_weight)
            and self.is_in_place(weight)
        )


class Stamps:
    """The stamps of many weights, compared attribute by attribute, which is faster than weight by weight."""

    def __init__(self, stamps: Sequence[Stamp]) -> None:
        self._stamps = stamps
        self._parameters = [stamp.parameter for stamp in stamps]
        self._storages = [stamp.storage.cdata for stamp in stamps]
        self._addresses = [stamp.data_ptr for stamp in stamps]
        self._shapes = [stamp.shape for stamp in stamps]
        self._strides = [stamp.strides for stamp in stamps]
        self._dtypes = [stamp.dtype for stamp in stamps]
        self._without_memory = [index for index, stamp in enumerate(stamps) if not stamp.data_ptr]

    def find_moved(self, weights: Sequence[Tensor]) -> set[int]:
        """Return the indices of the weights that are not in the same memory any more.

        For use right after a step. Between two steps, the same memory may also have been given another shape or dtype.

        Args:
            weights: The weight of each stamp, as it is now.
        """
        return (
            _find_different([weight.data_ptr() for weight in weights], self._addresses)
            | set(compress(count(), map(_storage_has_expired, self._storages)))
            | {index for index in self._without_memory if not self._stamps[index].is_in_place(weights[index])}
        )

    def find_written(self, parameters: Sequence[Tensor]) -> set[int]:
        """Return the indices of the parameters for which :meth:`Stamp.is_unwritten` is False.

        Args:
            parameters: The parameter of each stamp, as it is now. It is encoded itself, not a tensor inside it.
        """
        return (
            self.find_moved(parameters)
            | _find_different([parameter._version for parameter in parameters], [s.versions[0] for s in self._stamps])
            | _find_different([parameter.shape for parameter in parameters], self._shapes)
            | _find_different([parameter.stride() for parameter in parameters], self._strides)
            | _find_different([parameter.dtype for parameter in parameters], self._dtypes)
            | _find_different([id(parameter) for parameter in parameters], self._parameters)
        )

    def update_versions(self, parameters: Sequence[Tensor]) -> None:
        """Note that the parameters, which have not moved, may have been written until now."""
        for stamp, version in zip(self._stamps, [parameter._version for parameter in parameters], strict=True):
            stamp.versions = version, version


def _find_different(found: list[Any], expected: list[Any]) -> set[int]:
    """Return the indices of the elements of a list that differ from those of another list."""
    if found == expected:
        return set()
    return {index for index, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other}
