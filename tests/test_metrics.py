"""Metric groups against brute force that keeps everything, on real trainings."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import sys
import warnings

import pytest
import torch
from conftest import assert_same, backward, digits_model
from torch import Tensor, nn

from weightflip import FlipTrackingOptimizer, WeightFlipTracker, quantize, track_flips
from weightflip.counting.layer import TrackedWeight
from weightflip.metrics import LayerMetric, Metric, metric_names, register
from weightflip.metrics.coverage import Coverage
from weightflip.quantizers import resolve

FORMATS = ["float8_e4m3", "int4:g16", "mxfp4"]


class History:
    """Records the values of every weight in a format after each step, in units of its scale."""

    def __init__(self, model: nn.Module, format: str) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
        self.format = format
        self.codes: dict[str, list[Tensor]] = {name: [] for name in self.parameters}
        self.take()

    def take(self) -> None:
        for name, p in self.parameters.items():
            self.codes[name].append(self.numbers(p.detach()))

    def numbers(self, weight: Tensor) -> Tensor:
        # Other tests check ordinals against oracles; here they are only compared with each other.
        return resolve(self.format).encode(weight).ordinals.clone().long()

    def flips(self, name: str) -> list[Tensor]:
        codes = self.codes[name]
        return [(b - a).sign() for a, b in itertools.pairwise(codes)]


def train(format, metrics, digits, steps=40, lr=0.05, **options):
    model = digits_model(width=64)
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9),
        model,
        quantizer=format,
        metrics=metrics,
        sinks=[],
        **options,
    )
    history = History(model, format)
    for step in range(steps):
        backward(model, digits, step)
        optimizer.step()
        history.take()
    return optimizer, history


def oscillations(flips: list[Tensor]) -> list[Tensor]:
    """Count oscillations by definition, one weight after the other: compare each of its flips with the previous one."""
    directions = torch.stack(flips).flatten(1)
    flags = torch.zeros_like(directions, dtype=torch.bool)
    for i, of_weight in enumerate(directions.T):
        (steps,) = of_weight.nonzero(as_tuple=True)
        flags[steps[1:], i] = of_weight[steps[1:]] == -of_weight[steps[:-1]]
    return list(flags.view(-1, *flips[0].shape))


@pytest.mark.parametrize("format", FORMATS)
def test_oscillations_equal_the_definition(format, digits):
    optimizer, history = train(format, ("flips", "oscillation"), digits)
    record = optimizer.tracker.record()
    for layer in record.layers:
        flips = history.flips(layer.name)
        expected = sum(int(step.sum()) for step in oscillations(flips))
        assert layer.total.ratios["oscillation_ratio"] == (expected, sum(int((f != 0).sum()) for f in flips))
    assert record.model.values["oscillation_ratio"] > 0


def test_oscillation_frequency_is_nagels_moving_average(digits):
    ema, threshold = 0.1, 0.15
    optimizer, history = train("int4:g16", ("flips", "oscillation"), digits, oscillation_ema=(ema, threshold))
    for layer in optimizer.tracker.record().layers:
        flags = oscillations(history.flips(layer.name))
        frequency = torch.zeros(flags[0].shape, dtype=torch.float64)
        for oscillates in flags:
            frequency = ema * oscillates.double() + (1 - ema) * frequency
        far = (frequency - threshold).abs() > 1e-5
        assert far.all(), "a frequency on the threshold: float32 may count it on the other side"
        assert layer.gauges["oscillating_fraction"] == (int((frequency > threshold).sum()), frequency.numel())
        assert 0 < layer.values["oscillating_fraction"] < 1


@pytest.mark.parametrize("format", FORMATS)
def test_coverage_equals_the_definition(format, digits):
    optimizer, history = train(format, ("flips", "coverage"), digits, steps=12)
    for layer in optimizer.tracker.record().layers:
        flips, codes = history.flips(layer.name), history.codes[layer.name]
        ever = torch.stack([flip != 0 for flip in flips]).any(0)
        net = codes[0] != codes[-1]
        assert layer.gauges["ever_flipped"] == (int(ever.sum()), ever.numel())
        assert layer.gauges["net_flipped"] == (int(net.sum()), net.numel())
        assert 0 < net.sum() < ever.sum() < ever.numel()


@pytest.mark.parametrize("backend", ["eager", "numba"])
def test_groups_do_not_change_flips_stalls_or_training(digits, backend):
    alone, _ = train("float8_e4m3", ("flips", "stalls"), digits, backend="eager")
    every = metric_names()
    together, _ = train("float8_e4m3", ("flips", "stalls", *every), digits, oscillation_ema=0.01, backend=backend)
    for getter in ("get_flip_counts", "get_update_counts", "get_stall_counts"):
        assert getattr(alone.tracker, getter)() == getattr(together.tracker, getter)()
    for a, b in zip(alone.param_groups[0]["params"], together.param_groups[0]["params"], strict=True):
        assert torch.equal(a, b)


def test_weights_of_several_slices_and_strides(monkeypatch):
    monkeypatch.setattr(sys.modules["weightflip.kernels.slices"], "_CPU_ELEMENTS", 64)
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 32, generator=generator).t())
    assert not weight.is_contiguous()
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD([weight], lr=0.1), quantizer="e3m4", metrics=("flips", "oscillation", "coverage"), sinks=[]
    )
    codes = [quantize(weight.detach(), "e3m4")]
    first_scale = weight.detach().abs().max()
    for _ in range(6):
        weight.grad = torch.randn(32, 24, generator=generator)
        # The largest weight, and with it the scale, does not change, so values are equivalent to codes.
        weight.grad[weight.detach().abs() == first_scale] = 0
        optimizer.step()
        codes.append(quantize(weight.detach(), "e3m4"))
    flips = [(b - a).sign() for a, b in itertools.pairwise(codes)]
    layer = optimizer.tracker.record().layers[0]
    assert layer.total.ratios["oscillation_ratio"].numerator == sum(int(o.sum()) for o in oscillations(flips))
    assert layer.gauges["net_flipped"].numerator == int((codes[0] != codes[-1]).sum())


def test_a_group_can_be_limited_to_some_steps(digits):
    optimizer, history = train("float8_e4m3", {"flips": 1, "oscillation": 4}, digits)
    for layer in optimizer.tracker.record().layers:
        flips = history.flips(layer.name)[::4]
        assert layer.total.flips == sum(int((f != 0).sum()) for f in history.flips(layer.name))
        expected = (sum(int(o.sum()) for o in oscillations(flips)), sum(int((f != 0).sum()) for f in flips))
        assert layer.total.ratios["oscillation_ratio"] == expected


def test_a_skipped_step_does_not_count_for_groups(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5, fused=True),
        model,
        metrics=("flips", "oscillation", "coverage"),
        oscillation_ema=0.5,
        sinks=[],
    )
    backward(model, digits, 0)
    optimizer.step()
    states = copy.deepcopy(optimizer.tracker.state_dict()["weights"])
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    for name, groups in optimizer.tracker.state_dict()["weights"].items():
        for group, tensors in groups.items():
            for kind, tensor in tensors.items():
                assert torch.equal(tensor, states[name][group][kind]), (name, group, kind)


def test_a_resumed_run_continues(digits, tmp_path):
    def build():
        model = digits_model()
        optimizer = FlipTrackingOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
            model,
            metrics=("flips", "oscillation", "coverage"),
            oscillation_ema=0.1,
            sinks=[],
        )
        return model, optimizer

    def steps(model, optimizer, start, stop):
        for step in range(start, stop):
            backward(model, digits, step)
            optimizer.step()

    model, optimizer = build()
    steps(model, optimizer, 0, 15)
    optimizer.tracker.record()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")
    steps(model, optimizer, 15, 30)
    expected = optimizer.tracker.record()

    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model, optimizer = build()
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    steps(model, optimizer, 15, 30)
    assert optimizer.tracker.record() == expected


def test_a_checkpoint_of_a_run_without_groups_is_loaded(digits):
    plain, _ = train("float8_e4m3", ("flips", "stalls"), digits, steps=3)
    grouped, _ = train("float8_e4m3", ("flips", "oscillation"), digits, steps=1)
    grouped.load_state_dict(plain.state_dict())
    assert grouped.tracker.get_flip_counts() == plain.tracker.get_flip_counts()
    plain.load_state_dict(grouped.state_dict())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))], ids=["copy", "pickle"])
def test_copies_continue_on_their_own(digits, twin):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        model,
        metrics=("flips", "oscillation", "coverage"),
        sinks=[],
    )

    def steps(model, optimizer, start, stop):
        for step in range(start, stop):
            backward(model, digits, step)
            optimizer.step()

    steps(model, optimizer, 0, 10)
    other_model, other = twin((model, optimizer))
    before = other.tracker.state_dict()
    steps(model, optimizer, 10, 20)
    assert_same(other.tracker.state_dict(), before)
    steps(other_model, other, 10, 20)
    assert_same(other.tracker.state_dict(), optimizer.tracker.state_dict())
    assert before["weights"]["0.weight"].keys() == {"oscillation", "coverage"}


def test_memory_is_as_documented(digits):
    for metrics, ema, bytes_a_weight in (
        (("flips", "oscillation"), None, 1),
        (("flips", "oscillation"), 0.01, 5),
        (("flips", "coverage"), None, 2),
    ):
        optimizer, _ = train("float8_e4m3", metrics, digits, steps=2, oscillation_ema=ema)
        weights = sum(layer.weights for layer in optimizer.tracker.record().layers)
        assert optimizer.tracker.memory_usage().metrics == bytes_a_weight * weights


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("flips", "oscilation")}, "did you mean 'oscillation'"),
        ({"metrics": ("stalls",)}, "must be a sequence that contains 'flips'"),
        ({"metrics": "flips"}, "must be a sequence that contains 'flips'"),
        ({"metrics": {"flips": 2}}, "track_every="),
        ({"metrics": {"flips": 1, "coverage": 0}}, "integer of at least 1"),
        ({"oscillation_ema": 0.1}, "add it to metrics="),
        ({"metrics": ("flips", "oscillation"), "oscillation_ema": 2}, "momentum above 0"),
        ({"metrics": ("flips", "oscillation"), "oscillation_ema": (0.1, 3)}, "at least 0 and below 1"),
        ({"metrics": ("flips", "oscillation"), "oscillation_ema": "0.1"}, "momentum above 0"),
        ({"metrics": ("flips", "oscillation"), "oscillation_ema": [0.1, 0.1, 0.1]}, "momentum and a threshold"),
        ({"metrics": None}, "must be a sequence that contains 'flips'"),
        ({"metrics": ("flips", Coverage)}, r"call it: Coverage\(\)"),
        ({"metrics": ("flips", "coverage", Coverage())}, r"use the names \['coverage'"),
    ],
)
def test_mistakes_raise_immediately(options, message):
    model = digits_model()
    with pytest.raises(ValueError, match=message):
        FlipTrackingOptimizer(torch.optim.SGD(model.parameters()), model, sinks=[], **options)


def own_group(name: str, layer: type[LayerMetric] | None = None, **names: tuple[str, ...]) -> Metric:
    """A metric group with these names, and one ``layer`` per weight."""
    return type("Own", (Metric,), {"name": name, "open": lambda *_: None if layer is None else layer(), **names})()


class _LargestWeight(LayerMetric):
    def gauge(self, weight, gauges, bins):
        gauges[0, 0] = weight.values.abs().max()
        gauges[0, 1] = 1


def test_a_user_defined_group(digits):
    @register
    class Largest(Metric):
        name = "largest"
        gauges = ("largest_weight",)

        def open(self, name, weight):
            return _LargestWeight()

    optimizer, _ = train("float8_e4m3", ("flips", "largest"), digits, steps=3)
    record = optimizer.tracker.record()
    weights = optimizer.param_groups[0]["params"]
    assert record.layers[0].values["largest_weight"] == pytest.approx(weights[0].abs().max().item())
    assert "largest_weight" in optimizer.tracker.value_names


def test_a_group_that_fails_is_dropped_with_a_warning_and_the_rest_continues(digits):
    class Failing(LayerMetric):
        def slice(self, part, sums):
            raise RuntimeError("no such thing")

    broken = own_group("broken", Failing, ratios=("broken_ratio",))
    with pytest.warns(UserWarning, match=r"no longer has numbers of 'broken'.*no such thing") as warned:
        optimizer, history = train("float8_e4m3", ("flips", broken), digits, steps=5)
    assert len([w for w in warned if "broken" in str(w.message)]) == 2, "once a layer"
    for name, flips in optimizer.tracker.get_flip_counts().items():
        assert flips == sum(int((f != 0).sum()) for f in history.flips(name))


def test_a_group_may_not_use_an_existing_name():
    model, mine = digits_model(), own_group("mine", gauges=("flip_rate",))
    with pytest.raises(ValueError, match=r"\['flip_rate'\]"):
        FlipTrackingOptimizer(torch.optim.SGD(model.parameters()), model, metrics=("flips", mine), sinks=[])


def test_a_groups_numbers_of_a_skipped_step_are_dropped(digits):
    class Adding(LayerMetric):
        def after(self, weight, sums):
            sums += math.inf

    model = digits_model()
    infinite = own_group("infinite", Adding, ratios=("infinite_ratio",))
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.5, fused=True), model, metrics=("flips", infinite), sinks=[]
    )
    backward(model, digits, 0)
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    assert optimizer.tracker.record(may_be_empty=True).model.total.ratios["infinite_ratio"] == (0, 0)


def test_weights_now_stored_in_another_dtype_start_from_zero():
    weight = nn.Parameter(torch.randn(8, 8))
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD([weight], lr=0.0), quantizer="native", metrics=("flips", "coverage"), sinks=[]
    )
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    weight.data = weight.data.bfloat16()
    weight.grad = None
    optimizer.step()
    assert optimizer.tracker.record().layers[0].gauges["net_flipped"] == (0, 64)


def test_saved_state_of_groups_not_requested_is_dropped_with_a_warning(digits):
    both, _ = train("float8_e4m3", ("flips", "oscillation", "coverage"), digits, steps=3, oscillation_ema=0.1)
    one, _ = train("float8_e4m3", ("flips", "oscillation"), digits, steps=1)
    with pytest.warns(UserWarning, match=r"has per-weight state of \['coverage'\]"):
        one.load_state_dict(both.state_dict())
    one.param_groups[0]["lr"] = 0.0
    one.step()
    kept = one.tracker.state_dict()["weights"]["0.weight"]
    assert kept.keys() == {"oscillation"}
    known = both.tracker.state_dict()["weights"]["0.weight"]["oscillation"]["directions"]
    assert torch.equal(kept["oscillation"]["directions"] != 0, known != 0)


def test_memory_is_freed_and_not_allocated_again(digits):
    model = digits_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with track_flips(optimizer, model, metrics=("flips", "coverage", "range"), end_step=3, sinks=[]) as handle:
        for step in range(5):
            backward(model, digits, step)
            optimizer.step()
            handle.tracker.record()
        assert handle.tracker.memory_usage().codes == 0
    assert handle.tracker.memory_usage().metrics == 0


def test_gauges_are_kept_if_nothing_was_tracked(digits):
    model = digits_model()
    have_rank = []
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1),
        model,
        metrics={"flips": 1, "rank": 5},
        track_every=4,
        start_step=2,
        log_every=2,
        sinks=[lambda record: have_rank.append((record.step, "stable_rank" in record.model.values))],
    )
    for step in range(16):
        backward(model, digits, step)
        optimizer.step()
    assert have_rank == [(4, True), (8, False), (12, True), (16, False)]


def test_repeated_changes_of_the_quantizer_take_no_more_memory():
    weight = nn.Parameter(torch.randn(8, 8))
    tracker, counters = WeightFlipTracker(metrics=("flips", "coverage")), set()
    for step in range(40):
        weights = [TrackedWeight("w", weight, resolve("e3m4" if step % 2 else "e4m3"))]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tracker.before_step(weights)
        tracker.after_step()
        counters.add(tracker.memory_usage().counters)
    assert len(counters) == 1
