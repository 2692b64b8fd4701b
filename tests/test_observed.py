"""Metric groups that a kernel counts in its own pass: as in plain torch, bit for bit."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from kernel_cases import INF, NAN
from torch import Tensor, nn

from weightflip import FlipTrackingOptimizer, WeightFlipTracker
from weightflip.counting.expressions import find_difference
from weightflip.counting.layer import TrackedWeight
from weightflip.functional import Encoding, encode_into
from weightflip.kernels import ScratchPool
from weightflip.metrics import (
    NEW,
    OLD,
    LayerMetric,
    Metric,
    Pointwise,
    Value,
    Weight,
    make_metrics,
    metric_names,
    state,
    where,
)  # fmt: skip
from weightflip.metrics.coverage import Coverage
from weightflip.metrics.oscillation import Oscillation
from weightflip.quantizers import resolve

GROUPS = ("oscillation", "coverage", "scale", "travel", "touched")
STEPS = 7


def weights(dtype: torch.dtype, generator: torch.Generator) -> list[nn.Parameter]:
    """All values of 16 bits, odd lengths, one weight, and more weights than one thread takes at a time."""
    patterns = torch.arange(1 << 16, dtype=torch.int32)
    every = (patterns << 16).view(torch.float32) if dtype is torch.float32 else patterns.to(torch.int16).view(dtype)
    found = [torch.randn(shape, generator=generator) for shape in ((33, 7), (5,), (1,), (3, 5, 31), (2300, 65))]
    found += [torch.randn(64, 96, generator=generator) for _ in range(2)]
    found[-1][0, :4] = torch.tensor([NAN, INF, -INF, -0.0])
    return [nn.Parameter(every.view(256, 256).clone()), *(nn.Parameter(weight.to(dtype)) for weight in found)]


def fits(weight: Tensor, name: str) -> bool:
    group = resolve(name).group
    return group is None or weight.shape[-1] % group == 0


def move(tracked: list[TrackedWeight], generator: torch.Generator, share: float) -> None:
    """Some weights go up and down by about a cell, and the largest ones change, so that scales do."""
    for weight in tracked:
        numbers = torch.randn(weight.parameter.shape, generator=generator)
        moves = torch.rand(weight.parameter.shape, generator=generator) < share
        factor = torch.where(moves, 1 + numbers / 8, 1.0).to(weight.parameter.dtype)
        weight.parameter.data.mul_(factor)
        weight.parameter.grad = (numbers * moves).to(weight.parameter.dtype)


def live(backend: str, quantizer: str, dtype: torch.dtype, **options):
    """What a tracker has counted, what its groups keep of each weight, and how many weights went together."""
    generator = torch.Generator().manual_seed(0)
    tracked = [
        TrackedWeight(f"w{i}", weight, resolve(quantizer))
        for i, weight in enumerate(weights(dtype, generator))
        if fits(weight, quantizer)
    ]
    options = {"metrics": ("flips", "stalls", *GROUPS), **options}
    tracker = WeightFlipTracker(backend=backend, **options)
    together = []
    for step in range(STEPS):
        tracker.before_step(tracked)
        is_step = step != 3
        if is_step:
            move(tracked, generator, 0.0 if step == 5 else 0.4)
        if tracker.is_tracking:
            tracker.after_step(torch.tensor(is_step))
            together.append(sum(len(batch.members) for batch in tracker.batches) == len(tracked))
        else:
            tracker.after_step()
    kept = {name: layer.metric_tensors() for name, layer in tracker.layers.items()}
    record = tracker.record()
    return tracker.state_dict()["layers"], kept, [layer.values for layer in record.layers], together


live_in_plain_torch = functools.cache(functools.partial(live, "eager"))


def is_same(a, b) -> bool:
    """Of anything made of tensors and numbers; NaN is NaN."""
    if isinstance(a, Tensor):
        return a.dtype is b.dtype and torch.equal(a.nan_to_num(nan=9.0), b.nan_to_num(nan=9.0))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b or (a != a and b != b)


# Every kind of scale, rounding and width of codes.
QUANTIZERS = (
    "float8_e4m3", "float8_e4m3:row:pow2", "float8_e5m2:row", "e3m4", "e4m3:row", "e2m9", "e5m0", "e2m1:none", "int8",
    "mxfp4", "mxfp8_e4m3", "nvfp4", "int4:g32", "float8_e4m3:1x128", "bfloat16", "native",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_kernel_counts_as_plain_torch_does(dtype):
    for quantizer in QUANTIZERS:
        *found, together = live("auto", quantizer, dtype)
        *expected, alone = live_in_plain_torch(quantizer, dtype)
        assert is_same(found, expected), quantizer
        assert all(together), quantizer
        assert not any(alone), quantizer


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_is_right(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for quantizer in ("float8_e4m3:row:pow2", "mxfp4"):
            assert is_same(
                live("auto", quantizer, torch.float32)[:3], live_in_plain_torch(quantizer, torch.float32)[:3]
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options",
    [
        {"oscillation_ema": 0.01},
        {"oscillation_ema": (1.0, 0.5)},
        {"low_memory": True},
        {"fresh_snapshots": True},
        {"track_every": 2},
        {"metrics": {"flips": 1, "stalls": 1, "oscillation": 1, "scale": 3, "coverage": 2, "travel": 2}},
        {"metrics": ("flips", "scale")},
        {"metrics": ("flips", "range", "travel")},
    ],
    ids=str,
)
@pytest.mark.parametrize("quantizer", ["float8_e4m3", "mxfp4"])
def test_options_keep_their_meaning(quantizer, options):
    *found, together = live("auto", quantizer, torch.float32, **options)
    *expected, _ = live("eager", quantizer, torch.float32, **options)
    assert is_same(found, expected)
    # With low_memory batches are given back after each step.
    assert all(together) or "low_memory" in options


class Ups(Metric):
    """Flips to a larger number, counted in slices only."""

    name = "ups"
    values = (Value("ups", "rate"),)

    def open(self, name, weight):
        return LayerUps()


class LayerUps(LayerMetric):
    def slice(self, part, sums):
        sums[0, 0] += torch.count_nonzero(part.new > part.old)
        sums[0, 1] += torch.count_nonzero(part.new != part.old)


def test_a_group_that_only_has_slices_sees_them_and_the_others_go_on():
    """In every third step weights are counted one by one, and in the others together: scales and states go along."""
    metrics = {"flips": 1, "stalls": 1, **dict.fromkeys(GROUPS, 1), Ups(): 3}
    for quantizer in ("float8_e4m3", "mxfp4"):
        *found, together = live("auto", quantizer, torch.float32, metrics=metrics)
        *expected, _ = live("eager", quantizer, torch.float32, metrics=metrics)
        assert is_same(found, expected)
        assert together == [step % 3 != 0 for step in range(STEPS)]


class Broken(Coverage):
    """Of one layer of all."""

    name = "broken"
    values = tuple(Value(f"broken_{value.name}", value.kind) for value in Coverage.values)

    def open(self, name, weight):
        if name == "w1":
            raise RuntimeError("no today")
        return super().open(name, weight)


def test_layers_with_other_groups_are_counted_in_the_same_step():
    with pytest.warns(UserWarning, match="'w1' no longer has numbers of 'broken'"):
        *found, together = live("auto", "e3m4", torch.float32, metrics=("flips", "oscillation", Broken()))
    with pytest.warns(UserWarning, match="'w1' no longer has numbers of 'broken'"):
        *expected, _ = live("eager", "e3m4", torch.float32, metrics=("flips", "oscillation", Broken()))
    assert is_same(found, expected)
    assert all(together)


def test_a_run_is_resumed_where_it_was():
    def run(backend: str):
        generator = torch.Generator().manual_seed(1)
        model = nn.Linear(33, 65)
        model.weight.data.normal_(generator=generator)

        def make():
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
            metrics = ("flips", "stalls", *GROUPS)
            return FlipTrackingOptimizer(optimizer, model, metrics=metrics, sinks=[], backend=backend)

        optimizer = make()
        for step, _ in itertools.product(range(2), range(4)):
            if step and _ == 0:
                state = optimizer.state_dict()
                optimizer = make()
                optimizer.load_state_dict(state)
            model.weight.grad = torch.randn(model.weight.shape, generator=generator)
            optimizer.step()
        return optimizer.tracker.state_dict()

    assert is_same(run("auto"), run("eager"))


def test_a_layer_that_leaves_and_comes_back_keeps_its_states():
    """Another gradient layout, another place in memory: alone for a step, with the same states and scales."""

    def run(backend: str):
        generator = torch.Generator().manual_seed(2)
        tracked = [
            TrackedWeight(name, nn.Parameter(torch.randn(16, 32, generator=generator)), resolve("float8_e4m3:row"))
            for name in "ab"
        ]
        tracker = WeightFlipTracker(metrics=("flips", "stalls", *GROUPS), backend=backend)
        for step in range(8):
            tracker.before_step(tracked)
            move(tracked, generator, 0.5)
            if step == 2:
                tracked[0].parameter.grad = tracked[0].parameter.grad.to_sparse()
            if step == 4:
                tracked[1].parameter.data = tracked[1].parameter.data.clone()
            tracker.after_step()
        return tracker.state_dict()

    assert is_same(run("auto"), run("eager"))


UP_STEPS = state("up_steps", torch.int32)


class LayerUpSteps(LayerMetric):
    """How many weights went up since the last record. The state is replaced at each record."""

    state = ("up_steps",)
    pointwise = Pointwise(states=((UP_STEPS, where(NEW > OLD, UP_STEPS + 1, UP_STEPS)),))

    def __init__(self, weight):
        self.up_steps = torch.zeros(weight.codes.shape, dtype=torch.int32)

    def slice(self, part, sums):
        self.up_steps[part.index] += part.new > part.old

    def gauge(self, weight, gauges, bins):
        gauges[0, 0], gauges[0, 1] = (self.up_steps > 0).sum(), self.up_steps.numel()
        self.up_steps = torch.zeros_like(self.up_steps)


class UpSteps(Metric):
    name = "up_steps"
    values = (Value("up_fraction", "gauge"),)

    def open(self, name, weight):
        return LayerUpSteps(weight)


def up_fractions(backend):
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(64, 64, generator=generator))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer = FlipTrackingOptimizer(optimizer, sinks=[], metrics=["flips", UpSteps()], backend=backend)
    found = []
    for _ in range(6):
        weight.grad = torch.randn(64, 64, generator=generator)
        optimizer.step()
        found.append(optimizer.tracker.record().model.values["up_fraction"])
    return found


def test_a_group_may_replace_its_state_at_a_record():
    assert up_fractions("auto") == up_fractions("eager")
    assert min(up_fractions("auto")) > 0.1


class LayerUpStepsAtMarks(LayerUpSteps):
    def mark(self, weight, sums, scratch):
        sums[0, 0] += (self.up_steps > 0).sum()
        sums[0, 1] += self.up_steps.numel()
        self.up_steps = torch.zeros_like(self.up_steps)

    def gauge(self, weight, gauges, bins):
        pass


class UpStepsAtMarks(Metric):
    name = "up_steps_at_marks"
    values = (Value("up_fraction", "rate"),)
    uses_marks = True

    def __init__(self):
        self.opened = []

    def open(self, name, weight):
        self.opened.append((name, weight.codes.shape))
        return LayerUpStepsAtMarks(weight)


def test_a_group_may_replace_its_state_at_a_mark():
    found = {}
    for backend in ("auto", "eager"):
        generator = torch.Generator().manual_seed(0)
        weight, metric = nn.Parameter(torch.randn(64, 64, generator=generator)), UpStepsAtMarks()
        optimizer = torch.optim.SGD([weight], lr=0.1)
        optimizer = FlipTrackingOptimizer(optimizer, sinks=[], metrics=["flips", metric], backend=backend)
        for _ in range(4):
            weight.grad = torch.randn(64, 64, generator=generator)
            optimizer.step()
            optimizer.tracker.mark_sync()
        found[backend] = optimizer.tracker.record().layers[0].window.ratios["up_fraction"]
        # Groups that remember layers by name do not confuse them with weights of a test.
        assert {shape for name, shape in metric.opened if name == "group0.param0"} == {(64, 64)}
    assert found["auto"] == found["eager"]
    assert found["auto"].numerator > 0


def test_a_class_that_overrides_slice_does_not_inherit_the_expression():
    class Other(LayerUpSteps):
        def slice(self, part, sums):
            raise NotImplementedError

    assert Other.pointwise is None
    assert LayerUpSteps.pointwise is not None


class WrongCount(Metric):
    """Up flips, with an expression that counts down flips."""

    name = "wrong_count"
    values = (Value("wrong_count", "rate"),)

    def open(self, name, weight):
        return LayerWrongCount()


class LayerWrongCount(LayerUps):
    slice = LayerUps.slice
    pointwise = Pointwise((NEW < OLD,))


class WrongState(UpSteps):
    """With an expression that differs only for flips in the direction of the last one."""

    name = "wrong_state"

    def open(self, name, weight):
        return LayerWrongState(weight)


class LayerWrongState(LayerUpSteps):
    slice = LayerUpSteps.slice
    pointwise = Pointwise(states=((UP_STEPS, where(NEW > OLD, where(UP_STEPS > 1, 2, UP_STEPS + 1), UP_STEPS)),))


@pytest.mark.parametrize("group", [WrongCount, WrongState])
def test_a_group_whose_expression_is_wrong_is_counted_by_its_slices(group, caplog):
    def run(backend):
        generator = torch.Generator().manual_seed(3)
        tracked = [
            TrackedWeight(name, nn.Parameter(torch.randn(33, 7, generator=generator)), resolve("e3m4")) for name in "ab"
        ]
        tracker = WeightFlipTracker(metrics=("flips", "oscillation", group()), backend=backend)
        together = []
        for _ in range(5):
            tracker.before_step(tracked)
            move(tracked, generator, 0.5)
            tracker.after_step()
            together.append(len(tracker.batches))
        return [layer.values for layer in tracker.record().layers], together

    expected, _ = run("eager")
    assert caplog.messages == []
    found, together = run("auto")
    assert is_same(found, expected)
    assert together == [0] * 5
    run("auto")
    (message,) = [message for message in caplog.messages if "compil" not in message]
    assert message.startswith(
        f"weightflip: the metric group {group.name!r} is counted by its slice(), which is slower: "
    )
    assert "pointwise" in message


def test_the_expressions_of_all_groups_are_right():
    """With weights of one, two and three dimensions, and every kind of scale, rounding and width of codes."""
    groups = [*(group for group, _ in make_metrics(dict.fromkeys(metric_names()))), Oscillation(ema=0.01)]
    have_expressions = set()
    for index, (quantizer, group) in enumerate(itertools.product(QUANTIZERS, groups)):
        dtype = (torch.float32, torch.bfloat16)[index % 2]
        for shape in ((256,), (4, 256), (2, 4, 256))[index % 3 :]:
            weight = torch.ones(shape, dtype=dtype)
            assert find_difference(group, "layer", weight, resolve(quantizer)) is None, (group.name, quantizer, dtype)
        seen = view(weight, resolve(quantizer))
        opened = group.open("layer", seen)
        if opened is not None and opened.pointwise is not None:
            have_expressions.add(group.name)
    assert have_expressions >= {"oscillation", "coverage", "scale", "touched"}


def view(weight: Tensor, quantizer) -> Weight:
    """A weight as metric groups receive it."""
    codes = torch.zeros(weight.shape, dtype=quantizer.code_dtype(weight))
    scale = encode_into(weight, Encoding(quantizer, ScratchPool(), "eager"), codes)
    return Weight(quantizer.grouped(weight), quantizer.grouped(codes), scale, quantizer, "eager")
