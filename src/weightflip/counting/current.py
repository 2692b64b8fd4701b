"""The layers of one step: brings their codes up to date, and counts them on their routes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from weightflip.counting.collected import CollectedLayers
from weightflip.counting.layer import CodeState, Layer, TrackedWeight
from weightflip.counting.routes import Gradients, Route
from weightflip.counting.sharding import Sharding
from weightflip.counting.table import LayerTable


class CurrentLayers:
    """The layers of the last step that began.

    Args:
        layers: All layers.
        routes: The routes. The first one that accepts a layer encodes and counts it.

    Attributes:
        layers: The current layers, in the order of the weights.
    """

    def __init__(self, layers: LayerTable, routes: Sequence[Route]) -> None:
        self._table, self._routes = layers, tuple(routes)
        self._collected = CollectedLayers(layers.changes)
        self._set([])

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __bool__(self) -> bool:
        return bool(self.layers)

    def encode_current(self, weights: Iterable[TrackedWeight], sharding: Sharding, *, force: bool) -> list[Layer]:
        """Encode the weights whose codes are outdated, and return their layers with current codes.

        Args:
            weights: Some or all of the weights of the step.
            sharding: Tells which codes may be kept.
            force: Whether to encode all of them.
        """
        weights = list(weights)
        outdated = range(len(weights)) if force else self._find_outdated(weights)
        if not outdated and len(weights) == len(self.layers):
            return self.layers
        layers, stale = self._table.by_name, dict[Route, list[Layer]]()
        current: list[Layer | None] = [None] * len(weights) if len(outdated) == len(weights) else list(self.layers)
        for index in outdated:
            tracked = weights[index]
            try:
                layer = layers.get(tracked.name)
                if layer is None or force or not layer.is_current(tracked):
                    layer = self._check(tracked, stale, sharding, force)
                current[index] = layer
            except Exception as error:
                current[index] = None
                self._table.fail(tracked.name, error)
        found = [layer for layer in current if layer is not None]
        for route, of_route in stale.items():
            route.encode(of_route)
        if self._table.has_new_failures:
            self.release()
            found = _without_failed(found)
        return found

    def _find_outdated(self, weights: list[TrackedWeight]) -> Sequence[int]:
        """Return the indices of the weights that may not have current codes."""
        collected = self._collected
        collected.collect(self.layers)
        every = range(len(weights))
        if weights != collected.tracked:
            return every
        kept = collected.kept
        of_kept = weights if collected.are_kept else [weights[index] for index in kept]
        try:
            written = collected.stamps_of_kept.find_written([tracked.parameter for tracked in of_kept])
        except Exception:
            # Checked one by one, a weight that cannot be read does not affect the others.
            return every
        if collected.are_kept:
            return sorted(written)
        return sorted({*every}.difference(kept).union(kept[index] for index in written))

    def gradients(self) -> Gradients:
        """Return the current gradients of the layers."""
        self._collected.collect(self.layers)
        tracked = self._collected.tracked
        return Gradients(self.layers, [one.parameter.grad for one in tracked])

    def _check(
        self, tracked: TrackedWeight, stale: dict[Route, list[Layer]], sharding: Sharding, force: bool
    ) -> Layer | None:
        """Return a weight's layer, and add it to ``stale`` if its codes are outdated. None if it is not tracked."""
        if tracked.name in self._table.failed:
            return None
        if not tracked.is_active:
            if tracked.name in self._table:
                self._table[tracked.name].invalidate()
            return None
        weight, quantizer = tracked.unwrapped()
        layer = self._table.open(tracked, weight, quantizer)
        is_kept = sharding.may_keep(tracked.name, layer.is_unwritten(tracked.parameter, weight))
        is_kept = is_kept and layer.state is CodeState.KEPT and not force
        if not is_kept:
            layer.invalidate()
        if not is_kept or layer.route is None or layer.tracked is not tracked:
            layer.tracked = tracked
            layer.route = next(route for route in self._routes if route.accepts(layer, weight, quantizer))
            self._has_rerouted = True
        if layer.state is not CodeState.KEPT:
            # Also if the route has allocated memory for other codes.
            stale.setdefault(layer.route, []).append(layer)
        return layer

    def set_layers(self, layers: list[Layer]) -> None:
        """Set the layers of the step that begins."""
        if self._has_rerouted or layers != self.layers:
            self._set(layers)

    def _set(self, layers: list[Layer]) -> None:
        self.layers, self._has_rerouted = layers, False
        self._by_route: dict[Route, list[Layer]] = {}
        for layer in layers:
            assert layer.route is not None
            self._by_route.setdefault(layer.route, []).append(layer)

    def drop_failed(self) -> None:
        """Remove the layers that have failed since the last call."""
        if self._table.has_new_failures:
            self._table.has_new_failures = False
            self.release()
            self.layers = _without_failed(self.layers)
            # Do not use layer.route: a layer that has left its route in this step has none until the next one.
            self._by_route = {route: _without_failed(layers) for route, layers in self._by_route.items()}

    def count(self, gradients: Gradients, valid: Tensor | None) -> None:
        """Count the step on each route. See :meth:`Route.count`."""
        self.drop_failed()
        for route, layers in self._by_route.items():
            route.count(layers, gradients, valid)
        self.drop_failed()

    def clear(self) -> None:
        """Remove all layers, and release what routes hold."""
        self._set([])
        self.release()

    def release(self) -> None:
        """Make all routes release the codes that they hold."""
        self._collected.release()
        for route in self._routes:
            route.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layers": [], "_by_route": {}}


def _without_failed(layers: Iterable[Layer]) -> list[Layer]:
    """Return the layers that have not failed."""
    return [layer for layer in layers if layer.state is not CodeState.FAILED]
