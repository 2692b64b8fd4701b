"""What is computed once for a quantizer is kept as long as the quantizer, and for named quantizers for good."""

from __future__ import annotations

import gc

import torch
from torch import Tensor, nn

from weightflip import WeightFlipTracker
from weightflip.counting.layer import TrackedWeight
from weightflip.counting.quantizer_cache import QuantizerCache
from weightflip.formats import E2M1, E3M4
from weightflip.quantizers import resolve
from weightflip.quantizers.block import MXQuantizer
from weightflip.quantizers.floatx import FloatxQuantizer


class Halved(FloatxQuantizer):
    """A format with half of the usual scale, which its name does not tell."""

    only_needs_amax = True

    def scale_of(self, largest: Tensor) -> Tensor:
        return super().scale_of(largest) / 2

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor | None:
        return self.scale_of(weight.abs().amax())


class InSteps(MXQuantizer):
    """mxfp4 with half of the usual scale, in a table."""

    def scale_of(self, largest: Tensor, of_tensor: Tensor | None = None) -> Tensor:
        return super().scale_of(largest.float() / 2)

    def scale_rule(self, dtype: torch.dtype) -> str:
        return "steps"


def custom() -> list:
    return [Halved(E3M4, "tensor"), Halved(resolve("e2m9").format, "tensor"), InSteps(E2M1)]


def track_a_step(quantizers: list) -> None:
    for metrics in (("flips",), ("flips", "travel")):
        tracker = WeightFlipTracker(metrics=metrics)
        tracked = [
            TrackedWeight(f"w{at}", nn.Parameter(torch.linspace(-1, 1, 64 * 32).view(64, 32)), quantizer)
            for at, quantizer in enumerate(quantizers)
        ]
        tracker.before_step(tracked)
        for weight in tracked:
            weight.parameter.data.pow_(3)
        tracker.after_step()
    assert all(tracker.get_flip_counts().values())


def held() -> tuple[int, int]:
    """Bytes of all tensors, and how many objects of the package and of the classes above there are."""
    gc.collect()
    things = gc.get_objects()
    # Not isinstance(): other objects have properties that warn.
    tensors = sum(thing.nbytes for thing in things if type(thing) is Tensor)
    modules = [str(type(thing).__module__) for thing in things]
    return tensors, sum(module.startswith("weightflip.") or module == __name__ for module in modules)


def test_what_is_known_of_custom_quantizers_goes_away_with_them():
    track_a_step(custom())
    tensors, objects = held()
    for _ in range(17):
        track_a_step(custom())
    tensors_after, objects_after = held()
    # Less if something of another test was released meanwhile.
    assert tensors_after <= tensors
    assert objects_after <= objects


def test_results_stay_for_a_name_and_end_with_an_object():
    results, ids = QuantizerCache(), set()
    assert results.get(resolve("e3m4"), "kind", lambda: "of the name") == "of the name"
    for number in range(100):
        quantizer = Halved(E3M4, "tensor")
        ids.add(id(quantizer))
        assert results.get(quantizer, "kind", lambda number=number: number) == number
        assert results.get(quantizer, "kind", lambda: "made again") == number
        assert results.get(quantizer, "other kind", lambda: "other") == "other"
    assert len(ids) < 100, "an id is used again"
    gc.collect()
    assert results.get(resolve("e3m4"), "kind", lambda: "made again") == "of the name"
