"""How layers are encoded and counted: one by one here, many at once in ``batched.py``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from weightflip import distributed, functional, kernels
from weightflip.counting.layer import Layer, TrackedWeight
from weightflip.counting.ledger import COUNTED, SCALE_CHANGES, SCALE_STEPS, WEIGHT_STEPS
from weightflip.counting.metric_runner import MetricRunner
from weightflip.counting.table import LayerTable
from weightflip.quantizers.protocol import ElementwiseQuantizer, Quantizer, bits_of_scale

Gradients = Mapping[str, Tensor | None]
"""Of the layers, as they were before the step."""


class Route(Protocol):
    """One way from weights to codes and counts. A layer that fails on it is given up, and the others go on."""

    def accepts(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> bool:
        """Take a layer over, if this route can. Asked when the layer is opened, or changes.

        Args:
            layer: With its weight in ``tracked``.
            weight: What is encoded of it.
            quantizer: By what.
        """
        ...

    def encode(self, layers: Sequence[Layer]) -> None:
        """Make the codes of the weights as they are now."""
        ...

    def count(self, layers: Sequence[Layer], gradients: Gradients, valid: Tensor | None) -> None:
        """Encode the weights anew, count what changed, and keep the new codes.

        Args:
            layers: With the codes of before the step.
            gradients: Of before the step; after it, the parameters' own come first.
            valid: 0-dim: whether the step was one at all; None: it was.
        """
        ...

    def release(self) -> None:
        """Hold no codes of layers; the next step finds them in the layers."""
        ...


class OneByOne(ABC):
    """Each layer by itself.

    Args:
        layers: Where faults go.
        runner: The metric groups, which see each weight.
        scratch: Where temporaries come from.
        backend: What encodes.
        with_updates: Whether gradients are looked at.
    """

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
        """Put the codes of a weight into the layer; its scale."""

    @abstractmethod
    def _advance(
        self,
        layer: Layer,
        weight: Tensor,
        quantizer: Any,
        update: Tensor | None,
        observe: functional.Observer | None,
    ) -> Tensor | None:
        """Count what changed into the layer's row, and keep the new codes; the scale."""

    def release(self) -> None:
        """As in :class:`Route`: codes are held by the layers only."""
        return

    def encode(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            try:
                assert layer.tracked is not None
                weight, quantizer = layer.tracked.unwrapped()
                scale = self._encode(layer, weight, quantizer)
                layer.scale_codes = _scale_codes(quantizer, scale, weight, layer.tracked)
                layer.scale = scale if self._runner else None
                layer.encoded(weight)
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
        scale = self._advance(layer, weight, quantizer, dense, self._runner.observer(layer, weight, quantizer, valid))
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
        layer.counted(weight, has_state=quantizer.has_state)

    def _gradient(self, layer: Layer, gradients: Gradients) -> Tensor | None:
        """After the step, since a closure makes them in it; before the step, where a hook has taken them away in it."""
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
    """Quantizers that look at each element by itself once they have a scale: in slices, or in one pass of a kernel."""

    def accepts(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> bool:
        return isinstance(quantizer, ElementwiseQuantizer)

    def _encode(self, layer: Layer, weight: Tensor, quantizer: ElementwiseQuantizer) -> Tensor | None:
        codes = layer.make_room(weight, quantizer.code_dtype(weight))
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
    """Quantizers of which no more is known than that they make codes of a weight."""

    def accepts(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> bool:
        return True

    def _encode(self, layer: Layer, weight: Tensor, quantizer: Quantizer) -> Tensor | None:
        encoded = quantizer.encode(weight)
        # A copy: these codes are written to, and a quantizer may hand out a view of the weight.
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
    """What is stored of scales that are codes themselves: those of blocks and groups, ``(..., K // group, 1)``."""
    if scale is None:
        return None
    if isinstance(quantizer, ElementwiseQuantizer):
        if quantizer.group is None:
            return None
        first_row = distributed.first_row(tracked.parameter) if tracked.is_dtensor else 0
        return quantizer.scale_codes(quantizer.of_blocks(scale, weight.shape, first_row))
    is_of_groups = scale.ndim == weight.ndim + 1
    return bits_of_scale(scale) if is_of_groups else None
