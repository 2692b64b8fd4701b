"""The layers of one step: each has its codes, and the route that made them counts them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from weightflip.counting.layer import CodeState, Layer, TrackedWeight
from weightflip.counting.routes import Gradients, Route
from weightflip.counting.shards import Shards
from weightflip.counting.table import LayerTable


class CurrentLayers:
    """The layers of the last step that began.

    Args:
        layers: All layers.
        routes: They are asked in turn which layers they take.

    Attributes:
        layers: In the order of the weights.
    """

    def __init__(self, layers: LayerTable, routes: Sequence[Route]) -> None:
        self._table, self._routes = layers, tuple(routes)
        self._set([])

    def __iter__(self) -> Iterator[Layer]:
        return iter(self.layers)

    def __bool__(self) -> bool:
        return bool(self.layers)

    def with_codes(self, weights: Iterable[TrackedWeight], shards: Shards, *, anew: bool) -> list[Layer]:
        """The layers of the weights, each with its codes of now.

        Args:
            weights: Some of those of the step.
            shards: Says which codes may be kept.
            anew: Keep none.
        """
        layers, found = self._table.by_name, []
        stale: dict[Route, list[Layer]] = {}
        for tracked in weights:
            try:
                layer = layers.get(tracked.name)
                if layer is None or anew or not layer.is_as_it_was(tracked):
                    layer = self._look_at(tracked, stale, shards, anew)
            except Exception as error:
                self._table.fail(tracked.name, error)
                continue
            if layer is not None:
                found.append(layer)
        for route, of_route in stale.items():
            route.encode(of_route)
        if self._table.has_lost:
            self.release()
            found = _counted(found)
        return found

    def _look_at(
        self, tracked: TrackedWeight, stale: dict[Route, list[Layer]], shards: Shards, anew: bool
    ) -> Layer | None:
        """The layer of a weight, and among the stale ones if its codes are not those of now; None if none counts it."""
        if tracked.name in self._table.failed:
            return None
        if not tracked.is_active:
            if tracked.name in self._table:
                self._table[tracked.name].distrust()
            return None
        weight, quantizer = tracked.unwrapped()
        layer = self._table.open(tracked, weight, quantizer)
        is_kept = shards.may_keep(tracked.name, layer.is_unwritten(tracked.parameter, weight))
        is_kept = is_kept and layer.state is CodeState.KEPT and not anew
        if not is_kept:
            layer.distrust()
        if not is_kept or layer.route is None or layer.tracked is not tracked:
            layer.tracked = tracked
            layer.route = next(route for route in self._routes if route.accepts(layer, weight, quantizer))
            self._has_rerouted = True
        if layer.state is not CodeState.KEPT:
            # Also where the route has made room for other codes.
            stale.setdefault(layer.route, []).append(layer)
        return layer

    def take_up(self, layers: list[Layer]) -> None:
        """These are the layers of the step that begins."""
        if self._has_rerouted or layers != self.layers:
            self._set(layers)

    def _set(self, layers: list[Layer]) -> None:
        self.layers, self._has_rerouted = layers, False
        self._by_route: dict[Route, list[Layer]] = {}
        for layer in layers:
            assert layer.route is not None
            self._by_route.setdefault(layer.route, []).append(layer)

    def leave_out_failed(self) -> None:
        """Go on without those that have failed since this was called last."""
        if self._table.has_lost:
            self._table.has_lost = False
            self.release()
            self.layers = _counted(self.layers)
            # Not by their routes of now: one that has left its route in this step has none until the next.
            self._by_route = {route: _counted(layers) for route, layers in self._by_route.items()}

    def count(self, gradients: Gradients, valid: Tensor | None) -> None:
        """Count what the step did, on each route; see :meth:`Route.count`."""
        self.leave_out_failed()
        for route, layers in self._by_route.items():
            route.count(layers, gradients, valid)
        self.leave_out_failed()

    def clear(self) -> None:
        """There is no step, and nothing is held for one."""
        self._set([])
        self.release()

    def release(self) -> None:
        """Have no route hold codes of layers."""
        for route in self._routes:
            route.release()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "layers": [], "_by_route": {}}


def _counted(layers: Iterable[Layer]) -> list[Layer]:
    """Those that have not been given up."""
    return [layer for layer in layers if layer.state is not CodeState.FAILED]
