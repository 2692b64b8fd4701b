"""The memory that tracking holds, and that it frees all of it."""

from __future__ import annotations

import gc
import warnings
import weakref

import pytest
import torch
from conftest import backward, digits_model
from torch import nn

from weightflip import FlipTrackingOptimizer, track_flips
from weightflip.metrics import metric_names
from weightflip.quantizers import resolve

EVERYTHING = ("flips", "stalls", *metric_names())


def wrapped(optimizer, model, **options):
    return FlipTrackingOptimizer(optimizer, model, sinks=[], **options)


def hooked(optimizer, model, **options):
    return track_flips(optimizer, model, sinks=[], **options)


FORMS = pytest.mark.parametrize("form", [wrapped, hooked])


class Owned:
    """Tensors created since then, by identity, including those of the code under test."""

    def __init__(self) -> None:
        gc.collect()
        self._before = {id(tensor) for tensor in self._tensors()}
        self._kept_alive = self._tensors()

    @staticmethod
    def _tensors() -> list[torch.Tensor]:
        return [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]

    def bytes(self) -> int:
        """Bytes of the new tensors' storages, each counted once."""
        gc.collect()
        found = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in self._tensors()
            if id(t) not in self._before
        }
        return sum(found.values())


def make(form, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512, bias=False), nn.Linear(512, 512, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return model, optimizer, form(optimizer, model, **options)


def step(model, optimizer, tracked) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.full_like(parameter, 0.01)
    stepper = tracked if isinstance(tracked, FlipTrackingOptimizer) else optimizer
    stepper.step()
    optimizer.zero_grad()


@FORMS
@pytest.mark.parametrize(
    "options", [{}, {"metrics": EVERYTHING}, {"quantizer": "bfloat16"}, {"low_memory": True}], ids=str
)
def test_replaced_parameters_are_freed_at_once(form, options, digits):
    model = digits_model()
    inner = torch.optim.AdamW(model.parameters(), lr=0.01)
    tracked = form(inner, model, **options)
    optimizer = tracked if form is wrapped else inner
    for at in range(3):
        backward(model, digits, at)
        optimizer.step()
    old = [weakref.ref(parameter.untyped_storage()) for parameter in model.parameters()]
    for parameter_owner in (model[0], model[2]):
        for name, parameter in list(parameter_owner.named_parameters()):
            setattr(parameter_owner, name, nn.Parameter(parameter.detach().clone()))
    for parameter in inner.param_groups[0]["params"]:
        inner.state.pop(parameter, None)
    inner.param_groups[0]["params"] = list(model.parameters())
    del parameter
    assert [reference() for reference in old] == [None] * len(old)
    flips = sum(tracked.tracker.get_flip_counts().values())
    backward(model, digits, 3)
    before = [
        resolve(options.get("quantizer", "float8_e4m3")).encode(w.detach()).ordinals
        for w in (model[0].weight, model[2].weight)
    ]
    optimizer.step()
    after = [
        resolve(options.get("quantizer", "float8_e4m3")).encode(w.detach()).ordinals
        for w in (model[0].weight, model[2].weight)
    ]
    expected = sum(int((new != old).sum()) for new, old in zip(after, before, strict=True))
    assert sum(tracked.tracker.get_flip_counts().values()) - flips == expected > 0


@FORMS
def test_parameters_are_freed_with_the_step_that_raises(form):
    model, inner, tracked = make(form)
    step(model, inner, tracked)

    def closure():
        raise RuntimeError("out of memory")

    optimizer = tracked if form is wrapped else inner
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(closure)
    if form is hooked:
        # No hook runs after a step that raises, so they are freed at the next one.
        step(model, inner, tracked)
    old = weakref.ref(model[0].weight.untyped_storage())
    inner.param_groups[0]["params"][0] = model[0].weight = nn.Parameter(torch.zeros(512, 512))
    assert old() is None


@FORMS
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_codes_of_frozen_weights_are_freed(form, backend):
    model, inner, tracked = make(form, backend=backend)
    owned = Owned()
    step(model, inner, tracked)
    step(model, inner, tracked)
    assert tracked.tracker.memory_usage().codes == 2 * 512 * 512
    assert owned.bytes() >= 2 * 512 * 512
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    step(model, inner, tracked)
    assert tracked.tracker.memory_usage().codes == tracked.tracker.memory_usage().buffers == 0
    assert owned.bytes() < 10_000


class Broken:
    name = "broken"
    is_due = False

    def encode(self, weight):
        if self.is_due:
            raise RuntimeError("broken")
        return resolve("int8").encode(weight)


@FORMS
@pytest.mark.parametrize("metrics", [("flips", "stalls"), EVERYTHING], ids=len)
def test_a_fault_frees_codes_and_gradients(form, metrics):
    broken = Broken()
    model, inner, tracked = make(form, quantizer=broken, metrics=metrics)
    owned = Owned()
    step(model, inner, tracked)
    broken.is_due = True
    with pytest.warns(UserWarning, match="is no longer tracked"):
        step(model, inner, tracked)
    assert tracked.tracker.memory_usage()[:1] + tracked.tracker.memory_usage()[3:] == (0, 0)
    step(model, inner, tracked)
    assert owned.bytes() < 20_000


@FORMS
def test_tracking_that_stops_frees_everything(form, monkeypatch):
    def fail(*_):
        raise RuntimeError("a fault of the tracker's own")

    model, inner, tracked = make(form, metrics=EVERYTHING)
    owned = Owned()
    step(model, inner, tracked)
    assert owned.bytes() > 2 * 512 * 512
    monkeypatch.setattr(tracked.tracker, "before_step", fail)
    with pytest.warns(UserWarning, match="tracking has stopped"):
        step(model, inner, tracked)
    assert owned.bytes() < 20_000


@FORMS
def test_after_the_last_tracked_step_only_numbers_remain(form):
    model, inner, tracked = make(form, end_step=2)
    owned = Owned()
    for _ in range(3):
        step(model, inner, tracked)
    assert owned.bytes() < 10_000
    assert set(tracked.tracker.get_update_counts().values()) == {2 * 512 * 512}


def test_remove_frees_everything():
    model, inner, handle = make(hooked, metrics=EVERYTHING)
    owned = Owned()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            step(model, inner, handle)
        handle.remove()
    assert owned.bytes() < 20_000
