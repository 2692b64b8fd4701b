"""What differs between two syncs, against brute force that clones the codes at each mark."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import pickle

import numpy as np
import pytest
import torch
from conftest import assert_trained_alike, backward, digits_model
from torch import Tensor, nn

from weightflip import FlipTrackingOptimizer, WeightFlipTracker, functional, track_flips
from weightflip.counting.batch import Member
from weightflip.counting.layer import TrackedWeight
from weightflip.metrics.sync import _LayerSync
from weightflip.quantizers import resolve

FORMATS = ["float8_e4m3", "float8_e4m3:row", "int4:g16", "mxfp4", "bfloat16"]
METRICS = ("flips", "stalls", "sync")
RATES = ("changed_fraction", "empty_layers", "scale_changed_fraction", "delta_index_ratio")
SIZES = ("delta_bits", "delta_bound_ratio", "delta_zstd_ratio")
BITS = {"int4:g16": 4, "mxfp4": 4, "bfloat16": 16}


class Marks:
    """The codes and the scales of every weight at each mark, and nothing but that."""

    def __init__(self, model: nn.Module, format: str) -> None:
        self.model, self.format = model, format
        self.codes: dict[str, list[Tensor]] = {}
        self.scales: dict[str, list[Tensor | None]] = {}

    def take(self) -> None:
        for name, p in self.model.named_parameters():
            if p.ndim >= 2:
                found = resolve(self.format).encode(p.detach())
                self.codes.setdefault(name, []).append(found.ordinals.clone().long())
                self.scales.setdefault(name, []).append(None if found.scale is None else found.scale.clone())

    def windows(self, name: str, first: int = 0, last: int | None = None) -> list[tuple[Tensor, Tensor]]:
        return list(itertools.pairwise(self.codes[name][first:last]))

    def rates(self, name: str, first: int = 0, last: int | None = None) -> dict[str, tuple[float, float]]:
        """Numerators and denominators, summed over windows."""
        bits = BITS.get(self.format, 8)
        windows = self.windows(name, first, last)
        changed = [int((a != b).sum()) for a, b in windows]
        weights = [a.numel() for a, _ in windows]
        found = {
            "changed_fraction": (sum(changed), sum(weights)),
            "empty_layers": (changed.count(0), len(windows)),
            "delta_index_ratio": ((32 + bits) * sum(changed), bits * sum(weights)),
        }
        scales = list(itertools.pairwise(self.scales[name][first:last]))
        if scales and scales[0][0] is not None:
            moved = sum(int((a != b).sum()) for a, b in scales)
            found["scale_changed_fraction"] = moved, sum(a.numel() for a, _ in scales)
        return found


def rates_of(counts) -> dict[str, tuple[float, float]]:
    return {name: tuple(counts.ratios[name]) for name in RATES if counts.ratios[name].denominator}


def wrapped(model, format="float8_e4m3", metrics=METRICS, lr=0.02, **options):
    inner = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return FlipTrackingOptimizer(inner, model, quantizer=format, metrics=metrics, **{"sinks": [], **options})


def train(optimizer, model, digits, marks, steps, every=None, start=0):
    """Steps, with a mark after every so many."""
    for step in range(start, start + steps):
        backward(model, digits, step)
        optimizer.step()
        if every and (step + 1) % every == 0:
            marks.take()
            optimizer.tracker.mark_sync()


# ------------------------------------------------------------------ counts against brute force


@pytest.mark.parametrize("options", [{}, {"track_every": 5}, {"low_memory": True}, {"fresh_snapshots": True},
                                     {"backend": "eager"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("format", FORMATS)
def test_windows_equal_the_definition(format, options, digits):
    model = digits_model(width=64)
    optimizer, marks = wrapped(model, format, **options), Marks(model, format)
    marks.take()
    optimizer.tracker.mark_sync()
    train(optimizer, model, digits, marks, 12, every=3)
    record = optimizer.tracker.record()
    for layer in record.layers:
        assert rates_of(layer.window) == rates_of(layer.total) == marks.rates(layer.name)
        assert layer.window.ratios["changed_fraction"].denominator == 4 * layer.weights
    assert 0 < record.model.values["changed_fraction"] < 1
    train(optimizer, model, digits, marks, 4, start=12)
    assert rates_of(optimizer.tracker.record().model.window) == {}, "no window was completed"
    train(optimizer, model, digits, marks, 2, every=1, start=16)
    for layer in optimizer.tracker.record().layers:
        assert rates_of(layer.window) == marks.rates(layer.name, first=4)
        assert rates_of(layer.total) == marks.rates(layer.name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"track_every": 5},
        {"start_step": 4},
        {"start_step": 3},
        {"end_step": 8},
        {"start_step": 3, "end_step": 7},
    ],
    ids=str,
)
def test_sync_every_marks_at_every_so_many_steps(options, digits):
    """The first mark comes before the first tracked step."""
    model = digits_model(width=64)
    optimizer, marks = wrapped(model, sync_every=4, **options), Marks(model, "float8_e4m3")
    start = options.get("start_step", 0)
    for step in range(13):
        if (step - start) % 4 == 0 and start <= step <= options.get("end_step", 13):
            marks.take()
        if step < 12:
            backward(model, digits, step)
            optimizer.step()
    for layer in optimizer.tracker.record().layers:
        assert rates_of(layer.total) == marks.rates(layer.name)
        assert layer.total.ratios["empty_layers"].denominator == len(marks.windows(layer.name)) > 0


def test_the_first_mark_of_a_run_that_resumes_at_its_start_step(digits):
    """A window without steps does not count, nor do the codes at a mark from before the start."""
    model = digits_model(width=64)
    optimizer = wrapped(model, sync_every=4)
    train(optimizer, model, digits, None, 3)
    saved = optimizer.state_dict()
    optimizer, marks = wrapped(model, sync_every=4, start_step=3), Marks(model, "float8_e4m3")
    optimizer.load_state_dict(saved)
    marks.take()
    train(optimizer, model, digits, None, 4, start=3)
    marks.take()
    for layer in optimizer.tracker.record().layers:
        assert rates_of(layer.total) == marks.rates(layer.name)


@pytest.mark.parametrize("form", ["outside the steps", "tracker", "removed"])
def test_a_mark_that_cannot_be_made_is_logged_once(form, digits, caplog):
    model = digits_model(width=64)
    if form == "tracker":
        tracker = WeightFlipTracker(metrics=METRICS)
        expected = ["mark_sync() made no mark at step 0: no weight is tracked"]
        for _ in range(2):
            tracker.mark_sync()
    elif form == "removed":
        inner = torch.optim.SGD(model.parameters(), lr=0.02)
        handle = track_flips(inner, model, quantizer="e3m4", metrics=METRICS, sinks=[])
        backward(model, digits, 0)
        inner.step()
        handle.remove()
        expected = ["mark_sync() made no mark at step 1: no weight is tracked"]
        for _ in range(2):
            handle.tracker.mark_sync()
    else:
        optimizer, marks = wrapped(model, start_step=2, end_step=4), Marks(model, "float8_e4m3")
        optimizer.tracker.mark_sync()
        expected = [
            "mark_sync() made no mark at step 0: marks are made from start_step=2 to end_step=4",
            "mark_sync() made no mark at step 5: marks are made from start_step=2 to end_step=4",
        ]
        for step in range(6):
            backward(model, digits, step)
            optimizer.step()
            if 2 <= step + 1 <= 4:
                marks.take()
            optimizer.tracker.mark_sync()
        for layer in optimizer.tracker.record().layers:
            assert rates_of(layer.total) == marks.rates(layer.name)
    logged = [line for line in caplog.messages if "mark_sync()" in line]
    assert [line[: len("weightflip: ") + len(text)] for line, text in zip(logged, expected, strict=True)] == [
        f"weightflip: {text}" for text in expected
    ]


def test_the_second_of_several_quantizers(digits):
    model = digits_model(width=64)
    optimizer = wrapped(model, ["float8_e4m3", "bfloat16"], sync_every=2)
    seen = {format: Marks(model, format) for format in ("float8_e4m3", "bfloat16")}
    for marks in seen.values():
        marks.take()
    for step in range(6):
        backward(model, digits, step)
        optimizer.step()
        if step % 2:
            for marks in seen.values():
                marks.take()
    record = optimizer.tracker.record()
    for layer in record.layers:
        name, _, format = layer.name.partition("@")
        assert rates_of(layer.window) == seen[format].rates(name)
    of_float8, of_bfloat16 = record.models.values()
    assert of_float8.values["changed_fraction"] < of_bfloat16.values["changed_fraction"]


def test_what_is_written_outside_of_the_optimizer_is_seen(digits):
    model = digits_model(width=64)
    optimizer, marks = wrapped(model), Marks(model, "float8_e4m3")
    marks.take()
    optimizer.tracker.mark_sync()
    train(optimizer, model, digits, marks, 1)
    with torch.no_grad():
        model[0].weight[:5].mul_(-1)
    marks.take()
    optimizer.tracker.mark_sync()
    # Nothing is written any more.
    marks.take()
    optimizer.tracker.mark_sync()
    record = optimizer.tracker.record()
    for layer in record.layers:
        assert rates_of(layer.window) == marks.rates(layer.name)
    assert record.model.window.ratios["empty_layers"] == (2, 4)


def test_net_changes_are_no_flips(digits):
    """There and back again: two flips a weight, and an empty delta."""
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD([weight], lr=1.0), quantizer="e3m4:none", metrics=METRICS, sync_every=2, sinks=[]
    )
    for by in (1.0, -1.0):
        weight.grad = torch.full_like(weight, by)
        optimizer.step()
    layer = optimizer.tracker.record().layers[0]
    assert (layer.window.flips, layer.values["changed_fraction"], layer.values["empty_layers"]) == (128, 0, 1)


def test_frozen_and_later_layers_start_with_a_baseline(digits):
    model = digits_model(width=64)
    optimizer, marks = wrapped(model), Marks(model, "float8_e4m3")
    first, second = "0.weight", "2.weight"
    second_layer = model[2].weight

    def mark():
        marks.take()
        optimizer.tracker.mark_sync()

    mark()
    train(optimizer, model, digits, marks, 2)
    mark()
    second_layer.requires_grad_(False)
    train(optimizer, model, digits, marks, 2)
    mark()
    second_layer.requires_grad_(True)
    train(optimizer, model, digits, marks, 2)
    mark()
    train(optimizer, model, digits, marks, 2)
    mark()
    layers = {layer.name: layer for layer in optimizer.tracker.record().layers}
    assert rates_of(layers[first].window) == marks.rates(first)
    # The mark at which it was frozen ended nothing, and the next one is its baseline.
    apart = [marks.rates(second, 0, 2), marks.rates(second, 3, 5)]
    expected = {name: tuple(map(sum, zip(*(of[name] for of in apart), strict=True))) for name in apart[0]}
    assert rates_of(layers[second].window) == expected

    later = nn.Parameter(torch.randn(4, 4))
    optimizer.add_param_group({"params": [later]})
    model.later = later
    optimizer.tracker.mark_sync()
    with torch.no_grad():
        later[0].neg_()
    optimizer.tracker.mark_sync()
    # It has had no step yet; the model was not asked for its name.
    found = [layer for layer in optimizer.tracker.record().layers if layer.weights == 16]
    assert [layer.window.ratios["changed_fraction"] for layer in found] == [(4, 16)]


@pytest.mark.parametrize("form", ["checkpoint", "pickle", "deepcopy"])
def test_a_resumed_run_goes_on_in_its_window(form, digits):
    model = digits_model(width=64)
    optimizer, marks = wrapped(model), Marks(model, "float8_e4m3")
    train(optimizer, model, digits, marks, 5, every=3)
    if form == "checkpoint":
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model = digits_model(width=64)
        optimizer = wrapped(model)
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    else:
        pair = (model, optimizer)
        model, optimizer = copy.deepcopy(pair) if form == "deepcopy" else pickle.loads(pickle.dumps(pair))
    marks.model = model
    train(optimizer, model, digits, marks, 4, every=3, start=5)
    for layer in optimizer.tracker.record().layers:
        assert rates_of(layer.window) == marks.rates(layer.name)
        assert layer.window.ratios["changed_fraction"].denominator == 2 * layer.weights


def test_a_checkpoint_between_two_marks_of_a_resumed_run(digits):
    """Its window goes on, although no mark came between loading and saving."""
    model, metrics = digits_model(width=64), ("flips", "stalls", "coverage", "sync")
    optimizer, marks = wrapped(model, metrics=metrics), Marks(model, "float8_e4m3")
    train(optimizer, model, digits, marks, 3, every=3)
    for step in (3, 4):
        saved = copy.deepcopy(optimizer.state_dict())
        optimizer = wrapped(model, metrics=metrics)
        optimizer.load_state_dict(saved)
        train(optimizer, model, digits, marks, 1, start=step)
    train(optimizer, model, digits, marks, 1, every=3, start=5)
    for layer in optimizer.tracker.record().layers:
        assert rates_of(layer.window) == marks.rates(layer.name)


def test_a_weight_reshaped_since_its_state_was_saved_starts_a_new_window():
    parameter = nn.Parameter(torch.randn(8, 64))
    weights = [TrackedWeight("w", parameter, resolve("float8_e4m3"))]
    tracker = WeightFlipTracker(metrics=("flips", "sync"))

    def step(tracker):
        tracker.before_step(weights)
        with torch.no_grad():
            parameter.neg_()
        tracker.after_step()

    step(tracker)
    tracker.mark_sync()
    resumed = WeightFlipTracker(metrics=("flips", "sync"))
    resumed.load_state_dict(tracker.state_dict())
    parameter.data = parameter.data.view(16, 32)
    step(resumed)
    resumed.mark_sync()
    assert not any(ratio.denominator for ratio in resumed.record().layers[0].window.ratios.values())
    step(resumed)
    resumed.mark_sync()
    assert resumed.record().layers[0].window.ratios["changed_fraction"].denominator == 512


def test_marks_after_the_end_do_nothing(digits):
    model = digits_model(width=64)
    inner = torch.optim.SGD(model.parameters(), lr=0.02)
    handle = track_flips(inner, model, quantizer="e3m4", metrics=METRICS, log_every=1, sinks=[])
    backward(model, digits, 0)
    inner.step()
    handle.tracker.mark_sync()
    handle.remove()
    handle.tracker.mark_sync()
    assert (handle.tracker.memory_usage().codes, handle.tracker.memory_usage().metrics) == (0, 0)


def test_windows_of_a_resumed_run_with_sync_every_keep_their_length(digits):
    model = digits_model(width=64)
    optimizer, marks = wrapped(model, sync_every=4), Marks(model, "float8_e4m3")
    marks.take()
    train(optimizer, model, digits, marks, 4)
    marks.take()
    saved = optimizer.state_dict()
    optimizer = wrapped(model, sync_every=4)
    optimizer.load_state_dict(saved)
    train(optimizer, model, digits, marks, 4, start=4)
    marks.take()
    for layer in optimizer.tracker.record().layers:
        assert rates_of(layer.total) == marks.rates(layer.name)


def test_both_forms_and_marks_in_hooks(digits):
    """A hook of the step comes before it is counted: the mark is of the weights just after it."""
    expected = None
    for form in ("wrapper", "hooks"):
        model = digits_model(width=64)
        inner = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
        options = {"quantizer": "float8_e4m3", "metrics": METRICS, "sinks": []}
        if form == "wrapper":
            optimizer = FlipTrackingOptimizer(inner, model, **options)
            tracker = optimizer.tracker
        else:
            optimizer, tracker = inner, track_flips(inner, model, **options).tracker
        marks = Marks(model, "float8_e4m3")

        def publish(*_, tracker=tracker, marks=marks) -> None:
            marks.take()
            tracker.mark_sync()

        optimizer.register_step_post_hook(publish)
        for step in range(3):
            backward(model, digits, step)
            optimizer.step()
        record = tracker.record()
        for layer in record.layers:
            assert rates_of(layer.window) == marks.rates(layer.name)
        expected = expected or record.model.window
        assert record.model.window == expected


def test_training_is_what_it_was(digits):
    models = [digits_model(width=64) for _ in range(2)]
    bare = torch.optim.AdamW(models[0].parameters(), lr=1e-2)
    tracked = FlipTrackingOptimizer(
        torch.optim.AdamW(models[1].parameters(), lr=1e-2), models[1], quantizer="mxfp4", metrics=METRICS,
        sync_every=2, log_every=1, sinks=[lambda record: None],
    )  # fmt: skip
    assert_trained_alike(models, (bare, tracked), digits)


# ------------------------------------------------------------------ sizes


def entropy(counts) -> float:
    counts = np.asarray(counts, float)
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def packed_bytes(codes: np.ndarray, format: str) -> bytes:
    """The stored bits, without a loop over the format's own code: sign and magnitude, or two's complement."""
    bits = BITS.get(format, 8)
    is_integer = format.startswith("int")
    texts = [
        f"{code & ((1 << bits) - 1):0{bits}b}" if is_integer else f"{int(code < 0)}{abs(code):0{bits - 1}b}"
        for code in codes.reshape(-1).tolist()
    ]
    if bits <= 8:
        joined = "".join(texts)
        return bytes(int(joined[at : at + 8], 2) for at in range(0, len(joined), 8))
    return b"".join(int(text, 2).to_bytes(bits // 8, "little") for text in texts)


@pytest.mark.parametrize("format", ["float8_e4m3", "int4:g16", "mxfp4", "bfloat16"])
def test_sizes_equal_an_independent_computation(format, digits):
    zstandard = pytest.importorskip("zstandard")
    model = digits_model(width=64)
    optimizer, marks = wrapped(model, format, lr=0.005), Marks(model, format)
    marks.take()
    optimizer.tracker.mark_sync()
    train(optimizer, model, digits, marks, 6, every=2)
    bits = BITS.get(format, 8)
    sums = np.zeros((3, 2))
    record = optimizer.tracker.record()
    for layer in record.layers:
        old, new = (codes.numpy() for codes in marks.windows(layer.name)[-1])
        steps = (new - old)[new != old]
        shares = [len(steps), old.size - len(steps)]
        bound = old.size * entropy(shares) + len(steps) * entropy(np.unique(steps, return_counts=True)[1])
        xor = np.bitwise_xor(*(np.frombuffer(packed_bytes(codes, format), np.uint8) for codes in (old, new)))
        compressed = 8 * len(zstandard.ZstdCompressor(level=3).compress(xor.tobytes()))
        dense = old.size * bits
        expected = [(bound, old.size), (bound, dense), (compressed, dense)]
        for name, pair in zip(SIZES, expected, strict=True):
            assert layer.gauges[name] == pytest.approx(pair), name
        sums += expected
    for name, pair in zip(SIZES, sums, strict=True):
        assert record.model.values[name] == pytest.approx(pair[0] / pair[1])
    assert optimizer.tracker.record(may_be_empty=True).model.gauges == {}, "sizes are of windows that end since then"


def test_sizes_of_large_layers_are_estimates_from_a_part():
    """Independent changes: what a part says of them is true of all."""
    torch.manual_seed(0)
    weight = nn.Parameter((torch.randn(1200, 1000) * 0.02).bfloat16())
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD([weight], lr=1.0), quantizer="native", metrics=METRICS, sync_every=1, sinks=[]
    )
    before = weight.detach().clone()
    weight.grad = ((torch.rand(weight.shape) < 0.05) * torch.randn(weight.shape) * 1e-4).bfloat16()
    optimizer.step()
    old, new = (resolve("native").encode(w).ordinals.long().numpy() for w in (before, weight.detach()))
    steps = (new - old)[new != old]
    bound = old.size * entropy([len(steps), old.size - len(steps)])
    bound += len(steps) * entropy(np.unique(steps, return_counts=True)[1])
    layer = optimizer.tracker.record().layers[0]
    assert layer.window.ratios["changed_fraction"] == (len(steps), old.size)
    assert layer.gauges["delta_bits"].value == pytest.approx(bound / old.size, rel=0.05)
    assert layer.values["delta_bits"] / 16 == pytest.approx(layer.values["delta_bound_ratio"])


# ------------------------------------------------------------------ where the numbers go


def test_records_without_a_tracked_step_have_the_windows_that_end_in_them(digits):
    """log_every=2 and track_every=8: the windows of untracked steps reach the sinks."""
    model, records = digits_model(width=64), []
    optimizer = wrapped(model, sync_every=2, track_every=8, log_every=2, sinks=[records.append])
    marks = Marks(model, "float8_e4m3")
    marks.take()
    for step in range(8):
        backward(model, digits, step)
        optimizer.step()
        if step % 2:
            marks.take()
    assert [record.step for record in records] == [2, 4, 6, 8]
    for at, record in enumerate(records):
        for layer in record.layers:
            assert rates_of(layer.window) == marks.rates(layer.name, at, at + 2)
            assert "changed_fraction" in layer.new_values
            assert ("flip_rate" in layer.new_values) == (at == 0)
            assert "delta_bits" in layer.new_values


def test_memory_is_counted_and_given_back(digits):
    model = digits_model(width=64)
    optimizer = wrapped(model, "bfloat16")
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    train(optimizer, model, digits, None, 1)
    assert optimizer.tracker.memory_usage().metrics == 0, "nothing before the first mark"
    # The codes at the mark; and of up to 65,536 weights of a layer those of the mark before.
    for expected in (2 * weights, 4 * weights):
        optimizer.tracker.mark_sync()
        assert expected <= optimizer.tracker.memory_usage().metrics <= expected + 64
    optimizer.tracker.drop_codes()
    assert optimizer.tracker.memory_usage().metrics == 0


def test_nothing_is_done_between_marks(digits):
    """Layers stay in the batch of a compiled kernel: nobody looks at each weight by itself."""
    model = digits_model(width=64)
    optimizer = wrapped(model, sync_every=3)
    for step in range(7):
        backward(model, digits, step)
        optimizer.step()
        assert [len(batch.members) for batch in optimizer.tracker.batches] == [2]


def test_wrong_calls(digits):
    model = digits_model(width=64)
    for options, message in [
        ({"metrics": ("flips",), "sync_every": 2}, "sync_every= .*'sync'.*metrics="),
        ({"sync_every": 0}, "sync_every"),
        ({"sync_every": 1.5}, "sync_every"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            wrapped(model, **options)
    with pytest.raises(ValueError, match=r"mark_sync\(\) .*'sync'.*metrics="):
        wrapped(model, metrics=("flips",)).tracker.mark_sync()
    with pytest.raises(ValueError, match=r"'sync'"):
        WeightFlipTracker(sync_every=3)


# ------------------------------------------------------------------ the scale at a mark


def seen_scales(monkeypatch):
    """Collect the weights that the group sees at marks, with copies of their codes and scales, stored if in groups."""
    seen = []
    mark = _LayerSync.mark

    def observe(self, weight, sums, scratch):
        scale = weight.scale if weight.scale_codes is None else weight.scale_codes
        seen.append((weight.values.clone(), weight.codes.clone(), scale.clone(), weight.quantizer))
        mark(self, weight, sums, scratch)

    monkeypatch.setattr(_LayerSync, "mark", observe)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "format", ["float8_e4m3", "float8_e4m3:row", "int8", "int4:g16", "nvfp4", "float8_e4m3:128x128"]
)
def test_the_scale_at_a_mark_is_that_of_the_codes(format, dtype, monkeypatch):
    seen = seen_scales(monkeypatch)
    torch.manual_seed(0)
    # The first one is too large for the pass that also makes the scale of a tensor.
    model = nn.Sequential(nn.Linear(176, 208), nn.Linear(208, 32)).to(dtype)
    optimizer = wrapped(model, format, lr=0.1)

    def step(kind):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        if kind == "sparse":
            # This layer is counted alone in the step.
            model[0].weight.grad = model[0].weight.grad.to_sparse()
        if kind == "none":
            model[1].weight.grad = None
        optimizer.step()
        if kind == "written":
            with torch.no_grad():
                model[0].weight.mul_(3)

    kinds = ["plain", "plain", "sparse", "plain", "written", "plain", "none", "sparse", "sparse", "plain"]
    for number, kind in enumerate(kinds):
        step(kind)
        optimizer.tracker.mark_sync()
        if number == 5:
            # A new tensor, elsewhere.
            model[1].weight.data = model[1].weight.data.clone() * 2
    assert len(seen) == 2 * len(kinds)
    for values, codes, scale, quantizer in seen:
        values = values if quantizer.group is None else values.flatten(-2)
        expected = quantizer.encode(values)
        expected_scale = expected.scale
        if quantizer.group is not None:
            of_groups = expected.scale.reshape(*values.shape[:-1], -1, 1)
            expected_scale = quantizer.scale_codes(quantizer.block_scales(of_groups, values.shape))
        assert torch.equal(expected_scale.reshape(scale.shape), scale)
        assert torch.equal(expected.ordinals.reshape(codes.shape), codes)


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs Numba")
@pytest.mark.parametrize("format", ["float8_e4m3", "float8_e4m3:row", "mxfp4"])
def test_a_mark_after_a_step_needs_no_scale_from_plain_torch(format, monkeypatch):
    # Too large for the pass that also makes the scale of a tensor: that scale is kept.
    model = nn.Linear(320, 200)
    optimizer = wrapped(model, format)

    def step():
        model.weight.grad = torch.randn(200, 320)
        optimizer.step()

    step()

    def fail(self, weight):
        raise AssertionError("the scale was expected to be kept, or to come from the kernel")

    monkeypatch.setattr(functional.Encoding, "scale", fail)
    optimizer.tracker.mark_sync()
    step()
    optimizer.tracker.mark_sync()
    assert optimizer.tracker.record().model.window.ratios["scale_changed_fraction"].denominator > 0


# ------------------------------------------------------------------ faults and copies


def test_a_mark_after_a_step_that_raised_is_made_at_once(digits):
    model = digits_model()
    optimizer = wrapped(model, "e3m4")
    backward(model, digits, 0)
    optimizer.step()
    optimizer.tracker.mark_sync()

    def fails():
        raise RuntimeError("no loss")

    with pytest.raises(RuntimeError, match="no loss"):
        optimizer.step(fails)
    with torch.no_grad():
        model[0].weight.neg_()
    optimizer.tracker.mark_sync()
    changed = {layer.name: layer.window.ratios["changed_fraction"].value for layer in optimizer.tracker.record().layers}
    assert changed["0.weight"] > 0.9
    assert changed["2.weight"] == 0
    backward(model, digits, 0)
    optimizer.step()
    assert optimizer.tracker.record().model.window.flips > 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_a_copy_makes_marks_before_its_first_step(copied, digits):
    model = digits_model()
    optimizer, marks = wrapped(model, "e3m4"), Marks(model, "e3m4")
    train(optimizer, model, digits, marks, 2, every=1)
    backward(model, digits, 0)
    optimizer.step()
    model, optimizer = copied((model, optimizer))
    marks.model = model
    marks.take()
    optimizer.tracker.mark_sync()
    for layer in optimizer.tracker.record().layers:
        assert rates_of(layer.total) == marks.rates(layer.name)


def test_a_fault_at_the_first_mark_only_costs_this_mark(digits, monkeypatch):
    model = digits_model()
    optimizer = wrapped(model, "e3m4", sync_every=2)

    def fails(*_, **__):
        raise RuntimeError("broken on purpose")

    backward(model, digits, 0)
    with monkeypatch.context() as patch:
        patch.setattr(optimizer.tracker._marks, "make", fails)
        with pytest.warns(UserWarning, match="training continues.*broken on purpose"):
            optimizer.step()
    for step in range(1, 6):
        backward(model, digits, step)
        optimizer.step()
    record = optimizer.tracker.record()
    assert record.model.window.flips > 0
    # Marks after the steps 2, 4 and 6: two windows.
    assert record.model.window.ratios["changed_fraction"].denominator == 2 * record.model.weights


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs Numba")
@pytest.mark.parametrize("format", ["float8_e4m3:row", "int8", "int4:g16", "mxfp4", "float8_e4m3:128x128"])
def test_a_mark_after_a_step_does_not_read_the_weight(format, monkeypatch):
    """Scales of rows are kept by the pass that counts, and those of blocks are stored."""
    model = nn.Linear(320, 200)
    optimizer = wrapped(model, format)

    def fail(self, *args):
        raise AssertionError("the scale was expected to be kept")

    for step in range(3):
        model.weight.grad = torch.randn(200, 320)
        optimizer.step()
        if step == 0:
            monkeypatch.setattr(functional.Encoding, "scale", fail)
            monkeypatch.setattr(Member, "computed_scale", fail)
        optimizer.tracker.mark_sync()
    assert optimizer.tracker.record().model.window.ratios["scale_changed_fraction"].denominator > 0
