"""Routes encode and count layers: one by one here, many at once in ``batched.py`` and ``gathered.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from weightflip import distributed, functional, kernels
from weightflip.counting.layer import Layer, TrackedWeight
from weightflip.counting.ledger import COUNTED, SCALE_CHANGES, SCALE_STEPS, WEIGHT_STEPS
from weightflip.counting.metric_runner import MetricRunner
from weightflip.counting.table import LayerTable
from weightflip.quantizers.protocol import ElementwiseQuantizer, Quantizer, bits_of_scale


class Gradients:
    """Gradients by layer name, as they were before a step.

    Args:
        layers: The layers.
        gradients: The gradient of each of them.
    """

    def __init__(self, layers: Sequence[Layer] = (), gradients: Sequence[Tensor | None] = ()) -> None:
        self._layers, self._gradients = layers, gradients
        self._by_name: dict[str, Tensor | None] | None = None

    def get(self, name: str) -> Tensor | None:
        """Return the gradient of a layer; None if it has none."""
        if self._by_name is None:
            # Not in the constructor, because most steps leave the gradients in place.
            names = [layer.name for layer in self._layers]
            self._by_name = dict(zip(names, self._gradients, strict=True))
        return self._by_name.get(name)

    def __reduce__(self) -> tuple[type[Gradients], tuple[()]]:
        # A copy of a tracker does not continue the step.
        return Gradients, ()


class Route(Protocol):
    """A way to get codes and counts from weights. A layer that fails is no longer tracked; the others continue.

    Attributes:
        counts_together: Whether it encodes and counts many layers at once, from the parameters themselves.
    """

    counts_together: ClassVar[bool]

    def accepts(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> bool:
        """Take a layer over and return True if this route supports it. Called when the layer is opened or changes.

        Args:
            layer: The layer, with its weight in ``tracked``.
            weight: The tensor to encode.
            quantizer: Encodes it.
        """
        ...

    def encode(self, layers: Sequence[Layer]) -> None:
        """Encode the current weights."""
        ...

    def count(self, layers: Sequence[Layer], gradients: Gradients, valid: Tensor | None) -> None:
        """Encode the weights again, count the changes, and keep the new codes.

        Args:
            layers: Layers with the codes from before the step.
            gradients: The gradients before the step. Gradients that parameters have after it take precedence.
            valid: 0-dim: False if the step was skipped. None: it was not.
        """
        ...

    def release(self) -> None:
        """Release all codes. The next step takes them from the layers."""
        ...


class OneByOne(ABC):
    """Encodes and counts each layer separately.

    Args:
        layers: Receives failures.
        runner: The metric groups.
        scratch: Provides temporary buffers.
        backend: As in :func:`weightflip.kernels.check_backend`.
        with_updates: Whether updates are counted.
    """

    counts_together: ClassVar[bool] = False

    def __init__(
        self, layers: LayerTable, runner: MetricRunner, scratch: kernels.ScratchPool, backend: str, with_updates: bool
    ) -> None:
        self._layers, self._runner = layers, runner
        self._scratch, self._backend, self._with_updates = scratch, backend, with_updates

    @abstractmethod
    def accepts(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> bool:
        """As in :class:`Route`."""

    @abstractmethod
    def _encode(self, layer: Layer, weight: Tensor, quantizer: Any) -> Tensor | None:
        """Write the codes of a weight to the layer, and return the scale."""

    @abstractmethod
    def _advance(
        self,
        layer: Layer,
        weight: Tensor,
        quantizer: Any,
        update: Tensor | None,
        observe: functional.Observer | None,
    ) -> Tensor | None:
        """Add the changes to the layer's row, keep the new codes, and return the scale."""

    def release(self) -> None:
        """As in :class:`Route`. Nothing to do: only the layers hold codes."""
        return

    def encode(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            try:
                assert layer.tracked is not None
                weight, quantizer = layer.tracked.unwrapped()
                scale = self._encode(layer, weight, quantizer)
                layer.scale_codes = _scale_codes(quantizer, scale, weight, layer.tracked)
                layer.scale = scale if self._runner else None
                layer.mark_encoded(weight)
            except Exception as error:
                self._layers.fail(layer.name, error)

    def count(self, layers: Sequence[Layer], gradients: Gradients, valid: Tensor | None) -> None:
        for layer in layers:
            try:
                self._count(layer, gradients, valid)
            except Exception as error:
                self._layers.fail(layer.name, error)

    def _count(self, layer: Layer, gradients: Gradients, valid: Tensor | None) -> None:
        assert layer.tracked is not None
        assert layer.codes is not None
        assert layer.row is not None
        weight, quantizer = layer.tracked.unwrapped()
        gradient = self._gradient(layer, gradients)
        step = layer.row.step
        sparse = None
        if gradient is not None and gradient.layout is not torch.strided:
            sparse = gradient.to_sparse_coo().coalesce()  # type: ignore[no-untyped-call]
            at = tuple(sparse.indices())
            before = layer.codes[at]
        dense = None if gradient is None or sparse is not None else gradient.detach()
        scale = self._advance(
            layer, weight, quantizer, dense, self._runner.make_observer(layer, weight, quantizer, valid)
        )
        layer.scale = scale if self._runner else None
        self._runner.after(layer, weight, quantizer)
        scale_codes = _scale_codes(quantizer, scale, weight, layer.tracked)
        if scale_codes is not None and layer.scale_codes is not None:
            step[SCALE_CHANGES].copy_(torch.count_nonzero(scale_codes != layer.scale_codes))
            step[SCALE_STEPS].fill_(scale_codes.numel())
        layer.scale_codes = scale_codes
        if sparse is not None:
            updated = sparse.values() != 0
            counts = step[COUNTED]
            counts[kernels.UPDATES].add_(torch.count_nonzero(updated))
            counts[kernels.STALLED].add_(torch.count_nonzero(updated & (layer.codes[at] == before)))
        step[WEIGHT_STEPS].fill_(weight.numel())
        layer.mark_counted(weight, has_state=quantizer.has_state)

    def _gradient(self, layer: Layer, gradients: Gradients) -> Tensor | None:
        """Return the gradient after the step, or the one before it if there is none any more.

        A closure computes gradients during the step, and a hook may remove them during the step.
        """
        assert layer.tracked is not None
        if not self._with_updates:
            return None
        parameter = layer.tracked.parameter
        gradient = parameter.grad
        gradient = gradients.get(layer.name) if gradient is None else gradient
        if gradient is None or not layer.tracked.is_dtensor:
            return gradient
        return distributed.local_gradient(gradient, parameter)


class ElementwiseRoute(OneByOne):
    """Quantizers that encode each element separately once they have a scale: in slices, or in one kernel pass."""

    def accepts(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> bool:
        return isinstance(quantizer, ElementwiseQuantizer)

    def _encode(self, layer: Layer, weight: Tensor, quantizer: ElementwiseQuantizer) -> Tensor | None:
        codes = layer.allocate_codes(weight, quantizer.code_dtype(weight))
        return functional.encode_into(weight, self._encoding(layer, quantizer), codes)

    def _advance(
        self,
        layer: Layer,
        weight: Tensor,
        quantizer: ElementwiseQuantizer,
        update: Tensor | None,
        observe: functional.Observer | None,
    ) -> Tensor | None:
        assert layer.codes is not None
        assert layer.row is not None
        encoding = self._encoding(layer, quantizer)
        return functional.advance(weight, encoding, layer.codes, update, layer.row.step[COUNTED], observe)

    def _encoding(self, layer: Layer, quantizer: ElementwiseQuantizer) -> functional.Encoding:
        return functional.Encoding(quantizer, self._scratch, self._backend, layer.statistic)


class WholeWeightRoute(OneByOne):
    """All other quantizers, which encode a whole weight at once."""

    def accepts(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> bool:
        return True

    def _encode(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> Tensor | None:
        encoded = quantizer.encode(weight)
        # A copy, because these codes are written to, and a quantizer may return a view of the weight.
        layer.codes = encoded.ordinals.clone()
        return encoded.scale

    def _advance(
        self,
        layer: Layer,
        weight: Tensor,
        quantizer: Quantizer,
        update: Tensor | None,
        observe: functional.Observer | None,
    ) -> Tensor | None:
        assert layer.codes is not None
        assert layer.row is not None
        encoded = quantizer.encode(weight)
        functional.compare(layer.codes, encoded.ordinals, update, layer.row.step[COUNTED], self._scratch, observe)
        return encoded.scale


def _scale_codes(quantizer: Quantizer, scale: Tensor | None, weight: Tensor, tracked: TrackedWeight) -> Tensor | None:
    """Return the stored form of block and group scales, ``(..., K // group, 1)``; None for other scales."""
    if scale is None:
        return None
    if isinstance(quantizer, ElementwiseQuantizer):
        if quantizer.group is None:
            return None
        first_row = distributed.first_row(tracked.parameter) if tracked.is_dtensor else 0
        return quantizer.scale_codes(quantizer.block_scales(scale, weight.shape, first_row))
    is_of_groups = scale.ndim == weight.ndim + 1
    return bits_of_scale(scale) if is_of_groups else None
