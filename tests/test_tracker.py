"""The tracker on its own: calls by name, calls per step, edge cases, checkpoints."""

from __future__ import annotations

import gc
import math
import warnings
import weakref

import pytest
import torch
from conftest import float8_values

from weightflip import BitStallDetector, Codes, WeightFlipTracker, compute_flip_rate, compute_stall_ratio, kernels
from weightflip.counting.layer import CodeState, TrackedWeight
from weightflip.formats import E3M4, E5M2
from weightflip.quantizers import resolve
from weightflip.quantizers.floatx import FloatxQuantizer

NAN, INF = float("nan"), float("inf")


@pytest.fixture(autouse=True, params=["compiled", "eager"])
def backend(request, monkeypatch):
    if request.param == "eager":
        monkeypatch.setattr(kernels.backend, "_compiled", lambda name: "left out for this test")


# ---------------------------------------------------------------------- pure functions


def test_compute_flip_rate():
    a = torch.tensor([1.0, 2.0, 3.0, NAN, 0.0])
    assert compute_flip_rate(a, a.clone()) == 0.0
    assert compute_flip_rate(a, torch.tensor([1.0, 9.0, 3.0, NAN, -0.0])) == 1 / 5
    assert compute_flip_rate(a, torch.tensor([1.0, 2.0, NAN, 3.0, 0.0])) == 2 / 5
    assert compute_flip_rate(torch.empty(0, 4), torch.empty(0, 4)) == 0.0
    assert compute_flip_rate(torch.tensor([1, 2], dtype=torch.int8), torch.tensor([1, 3], dtype=torch.int8)) == 0.5
    float8 = torch.tensor([0.0, 1.0, NAN]).to(torch.float8_e4m3fn)
    assert compute_flip_rate(float8, torch.tensor([-0.0, 2.0, NAN]).to(torch.float8_e4m3fn)) == 1 / 3
    with pytest.raises(ValueError, match="Shape mismatch"):
        compute_flip_rate(torch.zeros(3), torch.zeros(2))


def test_compute_stall_ratio():
    assert compute_stall_ratio(10, 100) == 0.9
    assert compute_stall_ratio(100, 100) == 0.0
    assert compute_stall_ratio(0, 100) == 1.0
    assert compute_stall_ratio(0, 0) == 0.0


# ---------------------------------------------------------------------- one weight at a time


def test_seed_calls_count_and_add_up():
    tracker = WeightFlipTracker()
    w = torch.tensor([1.0, 2.0, 3.0])
    for before, after, expected in [(w, w, 0), (w, w * 10, 3), (w * 10, w, 3)]:
        tracker.snapshot_pre_step("a", before, E5M2, torch.tensor(1.0))
        assert list(tracker.prev_quantized) == ["a"]
        flips = tracker.compute_flips_post_step("a", after, E5M2, torch.tensor(1.0))
        assert flips == expected
        assert isinstance(flips, int)
        assert tracker.prev_quantized == {}
    assert tracker.get_flip_counts() == {"a": 6}
    assert tracker.get_flip_rates() == {"a": 2.0}


def test_seed_calls_keep_layers_apart():
    tracker = WeightFlipTracker()
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0, 5.0])
    tracker.snapshot_pre_step("a", a, E5M2, 1.0)
    tracker.snapshot_pre_step("b", b, E3M4, 1.0)
    assert tracker.compute_flips_post_step("a", a, E5M2, 1.0) == 0
    assert tracker.compute_flips_post_step("b", b * 2, E3M4, 1.0) == 3


def test_seed_calls_count_updates_and_stalls():
    tracker = WeightFlipTracker()
    w = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    grad = torch.tensor([1.0, -1.0, NAN, 0.0, -0.0])
    tracker.snapshot_pre_step("a", w, E5M2, 1.0, grad=grad)
    assert tracker.get_update_counts() == {"a": 3}
    grad.zero_()  # zero_grad(set_to_none=False) before the count must not matter
    w = w.clone()
    w[0] *= 10
    w[3] *= 10  # flips without an update: momentum
    assert tracker.compute_flips_post_step("a", w, E5M2, 1.0) == 2
    assert tracker.get_update_counts() == {"a": 3}
    assert tracker.get_stall_counts() == {"a": 2}
    assert tracker.get_stall_ratios() == {"a": 2 / 3}


def test_seed_calls_without_updates_have_stall_ratio_zero():
    tracker = WeightFlipTracker()
    w = torch.ones(3)
    tracker.snapshot_pre_step("a", w, E5M2, 1.0, grad=torch.zeros(3))
    tracker.compute_flips_post_step("a", w, E5M2, 1.0)
    assert tracker.get_stall_ratios() == {"a": 0.0}


def test_a_second_snapshot_replaces_the_first():
    tracker = WeightFlipTracker()
    w = torch.tensor([1.0, 2.0])
    tracker.snapshot_pre_step("a", w * 10, E5M2, grad=torch.ones(2))
    tracker.snapshot_pre_step("a", w, E5M2, grad=torch.ones(2))
    assert tracker.compute_flips_post_step("a", w, E5M2) == 0
    assert tracker.get_update_counts() == {"a": 2}


def test_scale_divides():
    tracker = WeightFlipTracker()
    w = torch.tensor([100.0, 200.0])
    # E3M4 ends at 31: both saturate unscaled, and differ when divided by 10.
    tracker.snapshot_pre_step("a", w, E3M4)
    assert tracker.compute_flips_post_step("a", w + 50, E3M4) == 0
    tracker.snapshot_pre_step("a", w, E3M4, scale=10.0)
    assert tracker.compute_flips_post_step("a", w + 50, E3M4, scale=10.0) == 2


def test_seed_calls_raise_helpful_errors():
    tracker = WeightFlipTracker()
    with pytest.raises(KeyError, match="No pre-step snapshot for 'x'"):
        tracker.compute_flips_post_step("x", torch.ones(2), E5M2)
    tracker.snapshot_pre_step("a", torch.ones(2), E5M2)
    with pytest.raises(ValueError, match="Shape mismatch"):
        tracker.compute_flips_post_step("a", torch.ones(3), E5M2)
    with pytest.raises(ValueError, match=r"gradient of 'a' has shape \(3,\)"):
        tracker.snapshot_pre_step("a", torch.ones(2), E5M2, grad=torch.ones(3))
    with pytest.raises(ValueError, match=r"torch\.int8 codes"):
        tracker.compute_flips_post_step("a", torch.ones(2), "bfloat16")


def test_reset():
    tracker = WeightFlipTracker()
    tracker.snapshot_pre_step("a", torch.ones(2), E5M2, grad=torch.ones(2))
    tracker.reset()
    assert tracker.get_flip_counts() == tracker.get_flip_rates() == tracker.get_update_counts() == {}
    assert tracker.prev_quantized == {}
    assert tracker.step_count == 0


# ---------------------------------------------------------------------- a step at a time


def weight_of(values, quantizer="e3m4:none", name="w", grad=1.0):
    parameter = torch.nn.Parameter(torch.tensor(values))
    parameter.grad = None if grad is None else torch.full_like(parameter, grad)
    return TrackedWeight(name, parameter, resolve(quantizer))


def step(tracker, weights, change=lambda p: None, valid=None):
    tracker.before_step(weights)
    with torch.no_grad():
        for weight in weights:
            change(weight.parameter)
    tracker.after_step(valid)


def test_nan_to_nan_is_not_a_flip_and_is_reported():
    weight = weight_of([[1.0, 2.0, NAN, NAN]])
    tracker = WeightFlipTracker()
    step(tracker, [weight], lambda p: p.copy_(torch.tensor([[1.0, NAN, -NAN, INF]])))
    assert tracker.get_flip_counts() == {"w": 2}  # 2 -> NaN, NaN -> inf; the sign of NaN is no matter
    assert tracker.record().layers[0].nonfinite == 3


def test_no_gradient_counts_flips_and_no_updates():
    weight = weight_of([[1.0, 2.0, 4.0]], grad=None)
    tracker = WeightFlipTracker()
    step(tracker, [weight], lambda p: p.mul_(2))
    assert tracker.get_flip_counts() == {"w": 3}
    assert tracker.get_update_counts() == {"w": 0}
    record = tracker.record()
    assert math.isnan(record.layers[0].stall_ratio)
    assert math.isnan(record.model.stall_ratio)


def test_a_write_between_steps_is_not_a_flip():
    weight = weight_of([[1.0, 2.0]])
    tracker = WeightFlipTracker()
    step(tracker, [weight])
    with torch.no_grad():
        weight.parameter.mul_(2)
    step(tracker, [weight])
    assert tracker.get_flip_counts() == {"w": 0}
    step(tracker, [weight], lambda p: p.mul_(2))
    assert tracker.get_flip_counts() == {"w": 2}


def test_a_replaced_parameter_and_replaced_storage_are_baselines():
    tracker = WeightFlipTracker()
    first, second = weight_of([[1.0, 2.0]]), weight_of([[3.0, 4.0]])
    step(tracker, [first])
    step(tracker, [second])
    second.parameter.data = torch.tensor([[8.0, 9.0]])
    step(tracker, [second])
    assert tracker.get_flip_counts() == {"w": 0}


def test_another_quantizer_for_the_same_weight_is_a_baseline():
    weight = weight_of([[1.0, 2.0, 3.3]], "float8_e4m3")
    tracker = WeightFlipTracker()
    for quantizer in ("float8_e4m3", "e3m4", "float8_e4m3:row:pow2"):
        step(tracker, [TrackedWeight("w", weight.parameter, resolve(quantizer))])
    assert tracker.get_flip_counts() == {"w": 0}


def test_data_writes_need_fresh_snapshots():
    counts = {}
    for fresh in (False, True):
        weight = weight_of([[1.0, 2.0]])
        tracker = WeightFlipTracker(fresh_snapshots=fresh)
        # A step at which no sample is due.
        for _ in range(25):
            step(tracker, [weight])
        weight.parameter.data.mul_(2)
        step(tracker, [weight])
        counts[fresh] = tracker.get_flip_counts()["w"]
    assert counts == {False: 2, True: 0}


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"fresh_snapshots": True}], ids=str)
@pytest.mark.parametrize("quantizer", ["float8_e4m3", "e3m4:row", "bfloat16", "native", float8_values])
def test_all_ways_to_keep_codes_count_the_same(options, quantizer):
    torch.manual_seed(3)
    weight = weight_of(torch.randn(40, 30).tolist(), quantizer)
    tracker = WeightFlipTracker(**options)
    encode, expected = weight.quantizer.encode, 0
    for _ in range(5):
        before = encode(weight.parameter.detach().clone()).ordinals.clone()
        step(tracker, [weight], lambda p: p.add_(torch.randn_like(p) * (torch.rand_like(p) < 0.5), alpha=0.01))
        expected += int((encode(weight.parameter.detach().clone()).ordinals != before).sum())
    assert 0 < expected < 5 * 1200
    assert tracker.get_flip_counts() == {"w": expected}


@pytest.mark.parametrize(
    ("quantizer", "width"), [("float8_e4m3", 1), ("e3m4:row", 1), ("e4m7", 2), ("bfloat16", 2), ("native", 4)]
)
def test_codes_take_the_documented_bytes(quantizer, width):
    weight = weight_of(torch.randn(100, 40).tolist(), quantizer)
    for low_memory, expected in ((False, 4000 * width), (True, 0)):
        tracker = WeightFlipTracker(low_memory=low_memory)
        step(tracker, [weight])
        assert tracker.memory_usage().codes == expected


def test_codes_that_are_a_view_of_the_weight():
    class StoredBits:
        def encode(self, weight):
            return Codes(weight.view(torch.int32))

    weight = TrackedWeight("w", weight_of([[1.0, 2.0, 3.0]]).parameter, StoredBits())
    tracker = WeightFlipTracker()
    for _ in range(2):
        step(tracker, [weight], lambda p: p[0, 0].mul_(2))
    assert tracker.get_flip_counts() == {"w": 2}
    assert weight.parameter.tolist() == [[4.0, 2.0, 3.0]]
    tracker.snapshot_pre_step("seed", weight.parameter, StoredBits())
    with torch.no_grad():
        weight.parameter.mul_(2)
    assert tracker.compute_flips_post_step("seed", weight.parameter, StoredBits()) == 3
    assert weight.parameter.tolist() == [[8.0, 4.0, 6.0]]


@pytest.mark.parametrize("quantizer", ["float8_e4m3", "e3m4", "mxfp4", "nvfp4", "int4:g32", "ternary", "bfloat16"])
def test_buffers_do_not_grow_with_the_weight(quantizer):
    sizes = []
    for rows in (1024, 4096):
        weight = TrackedWeight("w", torch.nn.Parameter(torch.randn(rows, 1024)), resolve(quantizer))
        weight.parameter.grad = torch.ones(rows, 1024)
        tracker = WeightFlipTracker()
        step(tracker, [weight])
        sizes.append(tracker.memory_usage().buffers)
    assert sizes[1] <= sizes[0] * 1.1
    assert sizes[1] < 20 * 2**20


def test_a_step_that_raised_leaves_no_stale_codes():
    weight = weight_of([[1.0, 2.0]])
    tracker = WeightFlipTracker()
    step(tracker, [weight])
    tracker.before_step([weight])
    weight.parameter.data.mul_(2)  # a kernel that wrote without moving the version counter, then raised
    step(tracker, [weight])
    assert tracker.get_flip_counts() == {"w": 0}
    assert tracker.step_count == 2


def test_skipped_steps_count_nothing():
    weight = weight_of([[1.0, 2.0]])
    tracker = WeightFlipTracker()
    step(tracker, [weight], lambda p: p.mul_(2), valid=torch.tensor(True))
    step(tracker, [weight], valid=torch.tensor(False))
    step(tracker, [weight])
    record = tracker.record()
    assert record.step == tracker.step_count == 2
    assert record.layers[0].window.weight_steps == 4
    assert record.layers[0].flip_rate == 0.5
    assert record.layers[0].window.updates == 4


def test_schedule():
    weight = weight_of([[1.0]], "native")
    tracker = WeightFlipTracker(track_every=3, start_step=2, end_step=9)
    tracked = []
    for _ in range(12):
        # Through .data: like fused optimizers, it changes no version counter.
        tracker.before_step([weight])
        weight.parameter.data.add_(1)
        tracker.after_step()
        tracked.append(tracker.get_flip_counts().get("w", 0))
    assert [b - a for a, b in zip([0, *tracked], tracked, strict=False)] == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0, 0]
    assert tracker.step_count == 12


def test_records_are_windows_and_totals():
    a, b = weight_of([[1.0, 2.0]], name="a"), weight_of([[1.0, 2.0, 3.0, 4.0]], name="b")
    tracker = WeightFlipTracker()
    step(tracker, [a, b], lambda p: p.mul_(2))
    step(tracker, [a, b])
    first = tracker.record()
    assert tracker.record() is None
    step(tracker, [b], lambda p: p.mul_(2))
    second = tracker.record()
    assert [layer.name for layer in first.layers] == ["a", "b"]
    frozen, moving = second.layers
    assert first.model.flip_rate == 6 / 12
    assert math.isnan(frozen.flip_rate)
    assert frozen.cumulative_flip_rate == 2 / 2
    assert moving.flip_rate == 1.0
    assert moving.cumulative_flip_rate == 8 / 4
    # The sum of all layers, including one that is no longer tracked.
    assert second.model.flip_rate == 1.0
    assert second.model.cumulative_flip_rate == 10 / 6
    assert (first.step, second.step) == (2, 3)


def test_print_shows_layers_and_their_sum():
    tracker = WeightFlipTracker()
    large = weight_of([[1.0, 2.0, 4.0]], "e3m4:none", name="large")
    small = weight_of([[1.0]], "bfloat16", name="small", grad=None)
    step(tracker, [large, small], lambda p: p[:, 0].mul_(2))
    assert str(tracker).splitlines() == [
        "after step 1",
        "layer  quantizer  weights  flips  flips/weight  stall ratio  updated",
        "large  e3m4:none        3      1          0.33        66.7%   100.0%",
        "small  bfloat16         1      1          1.00            -     0.0%",
        "all                     4      2          0.50        66.7%    75.0%",
    ]


def test_model_rates_are_sums_divided_not_means():
    small, large = weight_of([[1.0]], name="small"), weight_of([[1.0] * 9], name="large", grad=None)
    tracker = WeightFlipTracker()
    tracker.before_step([small, large])
    with torch.no_grad():
        small.parameter.mul_(2)
    tracker.after_step()
    model = tracker.record().model
    assert model.flip_rate == 1 / 10
    assert model.stall_ratio == 0.0


@pytest.mark.parametrize("layout", ["embedding", "coo"])
def test_sparse_gradients(layout):
    torch.manual_seed(0)
    if layout == "embedding":
        table = torch.nn.Embedding(50, 8, sparse=True)
        (table(torch.tensor([3, 7, 3, 9])).square().sum() * 1e-3).backward()
        parameter = table.weight
    else:
        parameter = torch.nn.Parameter(torch.randn(6, 5))
        parameter.grad = torch.tensor([[0.0, 1.0, 0.0, 0.0, 2.0]] * 6).to_sparse()
    grad = parameter.grad.to_dense()
    weight = TrackedWeight("w", parameter, resolve("bfloat16"))
    before = parameter.detach().bfloat16()
    tracker = WeightFlipTracker()
    # Large steps for odd columns, steps lost to rounding for even columns.
    alpha = torch.tensor([1e-7, 0.5] * 4)[: parameter.size(1)]
    step(tracker, [weight], lambda p: p.sub_(alpha * grad.sign()))
    flipped = parameter.detach().bfloat16() != before
    assert tracker.get_flip_counts() == {"w": int(flipped.sum())}
    assert tracker.get_update_counts() == {"w": int((grad != 0).sum())}
    assert tracker.get_stall_counts() == {"w": int(((grad != 0) & ~flipped).sum())}
    assert tracker.get_stall_counts()["w"] > 0


@pytest.mark.parametrize("quantizer", ["float8_e4m3", "float8_e4m3:row", "e3m4:row"])
def test_strides_do_not_matter(quantizer):
    torch.manual_seed(0)
    base = torch.randn(64, 3, 5, 5)
    change = 1 + 0.05 * torch.randn(64, 3, 5, 5)
    grad = (torch.rand(64, 3, 5, 5) < 0.5).float()
    results = []
    for prepare in (
        lambda t: t.clone(),
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
        lambda t: torch.stack([t, t], -1)[..., 0],
    ):
        parameter = torch.nn.Parameter(prepare(base))
        parameter.grad = prepare(grad)
        tracker = WeightFlipTracker()
        step(tracker, [TrackedWeight("w", parameter, resolve(quantizer))], lambda p: p.mul_(change))
        results.append((tracker.get_flip_counts(), tracker.get_update_counts(), tracker.get_stall_counts()))
    assert results[0][0]["w"] > 0
    assert all(result == results[0] for result in results)


def test_a_failing_layer_is_dropped_with_one_warning():
    calls = []

    def breaks_later(weight):
        calls.append(None)
        if len(calls) > 2:
            raise RuntimeError("no codes today")
        return weight

    good, bad = weight_of([[1.0, 2.0]], name="good"), weight_of([[1.0, 2.0]], breaks_later, name="bad")
    tracker = WeightFlipTracker()
    step(tracker, [good, bad], lambda p: p.mul_(2))
    with pytest.warns(
        UserWarning, match=r"'bad' is no longer tracked, training continues: RuntimeError: no codes today"
    ) as caught:
        step(tracker, [good, bad], lambda p: p.mul_(2))
    assert caught[0].filename == __file__, "the line that calls the tracker"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(tracker, [good, bad], lambda p: p.mul_(2))
    assert tracker.get_flip_counts() == {"good": 6, "bad": 2}


def test_nothing_reads_the_device_between_records(monkeypatch):
    weights = [weight_of(torch.randn(30, 32).tolist(), q, name=q) for q in ("float8_e4m3", "e3m4", "mxfp4", "bfloat16")]
    tracker = WeightFlipTracker()
    step(tracker, weights)

    def forbidden(self, *args):
        raise AssertionError("waits for the device")

    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "__bool__", "__int__", "__float__", "cpu"):
            patch.setattr(torch.Tensor, method, forbidden)
        for valid in (None, torch.tensor(True)):
            step(tracker, weights, lambda p: p.mul_(1.1), valid)
    assert tracker.step_count == 3
    assert all(layer.state is CodeState.KEPT for layer in tracker.layers.values())


def test_state_dict_is_plain_and_continues(tmp_path):
    torch.manual_seed(0)
    changes = [torch.randn(6, 5) for _ in range(8)]
    start = torch.randn(6, 5)

    def run(tracker, parameter, some_changes):
        records = []
        for change in some_changes:
            step(tracker, [TrackedWeight("w", parameter, resolve("e3m4"))], lambda p, c=change: p.add_(c, alpha=0.05))
            if tracker.step_count % 3 == 0:
                records.append(tracker.record())
        return records

    def parameter_of(values):
        parameter = torch.nn.Parameter(values.clone())
        parameter.grad = torch.ones_like(parameter)
        return parameter

    whole = WeightFlipTracker()
    expected = run(whole, parameter_of(start), changes)

    first, parameter = WeightFlipTracker(), parameter_of(start)
    records = run(first, parameter, changes[:4])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = WeightFlipTracker()
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    records += run(second, parameter_of(parameter.detach()), changes[4:])

    assert records == expected
    assert second.state_dict() == whole.state_dict()
    assert second.get_flip_counts() == whole.get_flip_counts()


def test_load_state_dict_refuses_other_objects():
    with pytest.raises(ValueError, match="without"):
        WeightFlipTracker().load_state_dict({"steps": 3})
    state = WeightFlipTracker().state_dict()
    with pytest.raises(ValueError, match="version 2"):
        WeightFlipTracker().load_state_dict({**state, "version": 2})


def test_a_layer_of_another_size_starts_from_zero():
    tracker = WeightFlipTracker()
    step(tracker, [weight_of([[1.0, 2.0]])], lambda p: p.mul_(2))
    with pytest.warns(UserWarning, match="'w' had 2 weights and now has 3"):
        step(tracker, [weight_of([[1.0, 2.0, 3.0]])])
    assert tracker.get_flip_counts() == {"w": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": ("flip",)}, "metrics="),
        ({"metrics": "flips"}, "metrics="),
        ({"metrics": ("stalls",)}, "must be a sequence that contains 'flips'"),
        ({"track_every": 0}, "track_every= must be an integer of at least 1, got 0"),
        ({"track_every": 1.5}, "track_every="),
        ({"start_step": -1}, "start_step="),
        ({"start_step": 5, "end_step": 5}, "end_step= must be an integer of at least 6"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        WeightFlipTracker(**options)


def test_without_stalls_no_gradient_is_read():
    weight = weight_of([[1.0, 2.0]])
    tracker = WeightFlipTracker(metrics=("flips",))
    step(tracker, [weight], lambda p: p.mul_(2))
    assert tracker.get_flip_counts() == {"w": 2}
    assert tracker.get_update_counts() == {"w": 0}


# ---------------------------------------------------------------------- predicting


def test_bit_stall_detector_predictions_come_true():
    torch.manual_seed(0)
    weight = torch.randn(100, 20).bfloat16()
    update = (torch.randn(100, 20) * 0.01 * (torch.rand(100, 20) < 0.7)).bfloat16()
    detector = BitStallDetector("native")
    stalled, attempted = detector.update(weight, update)
    after = weight + update
    assert attempted == int((update != 0).sum())
    assert stalled == int(((update != 0) & (after == weight)).sum())
    assert 0 < stalled < attempted
    detector.update(weight, torch.zeros_like(update))
    assert detector.get_stall_rate() == stalled / attempted
    detector.reset()
    assert detector.get_stall_rate() == 0.0
    with pytest.raises(ValueError, match="Shape mismatch"):
        detector.update(weight, update[0])


class Switched:
    """The sign of weights that are quantized only at times, with an offset that does not depend on the weight."""

    def __init__(self, **state):
        self.is_active, self.offset = True, 0.0
        self.__dict__.update(state)

    def encode(self, weight):
        return Codes((weight + self.offset).sign().to(torch.int8))

    def plain(self, weight):
        return torch.tensor([math.nan, 1.0])

    def __str__(self):
        return "switched"


def test_nothing_is_counted_while_a_quantizer_is_off():
    parameter, quantizer = torch.nn.Parameter(torch.ones(4)), Switched()
    tracker, flips = WeightFlipTracker(), []
    for is_active in (True, False, False, True, True):
        quantizer.is_active = is_active
        tracker.before_step([TrackedWeight("w", parameter, quantizer)])
        parameter.data.neg_()  # leaves no trace
        tracker.after_step()
        flips.append(tracker.get_flip_counts().get("w", 0))
    assert flips == [4, 4, 4, 8, 12]
    assert tracker.record().layers[0].total.weight_steps == 12
    assert tracker.record(may_be_empty=True).layers[0].nonfinite == 1


@pytest.mark.parametrize("has_state", [False, True])
def test_codes_that_depend_on_more_than_the_weight_are_not_kept(has_state):
    parameter, quantizer = torch.nn.Parameter(torch.ones(4)), Switched(has_state=has_state)
    tracker = WeightFlipTracker()
    for _ in range(2):
        tracker.before_step([TrackedWeight("w", parameter, quantizer)])
        tracker.after_step()
        quantizer.offset = -2.0
    assert tracker.get_flip_counts() == {"w": 0 if has_state else 4}


AWAY_FROM_0 = torch.linspace(1, 2, 256).view(8, 32).tolist()


def test_tensors_from_inference_mode_can_be_written_to_later():
    weight = weight_of(AWAY_FROM_0, "float8_e4m3")
    inside, outside = WeightFlipTracker(metrics=("flips", "coverage")), WeightFlipTracker()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for turn in range(3):
            step(outside, [weight], lambda p: p.neg_())
            with torch.inference_mode():
                # Evaluation during training, which flushes; and training without gradients.
                outside.record()
                step(inside, [weight], lambda p: p.neg_())
            assert inside.record().model.total.flips == outside.get_flip_counts()["w"] == 256 * (turn + 1)


def test_a_weight_that_returns_starts_with_a_baseline():
    weights = [weight_of(AWAY_FROM_0, "float8_e4m3", name=name) for name in "ab"]
    tracker = WeightFlipTracker()
    step(tracker, weights, lambda p: p.neg_())
    held = weakref.ref(tracker.layers["b"].codes)
    away = weights.pop()
    step(tracker, weights, lambda p: p.neg_())
    gc.collect()
    assert held() is None
    # Like a fused kernel, or a write through .data: the version counter does not change.
    away.parameter.data.neg_()
    step(tracker, [*weights, away], lambda p: p)
    step(tracker, [*weights, away], lambda p: p.neg_())
    assert tracker.get_flip_counts() == {"a": 3 * 256, "b": 2 * 256}


class InterruptedOnce(FloatxQuantizer):
    is_due = False

    def scale_of(self, largest):
        if self.is_due:
            self.is_due = False
            raise KeyboardInterrupt
        return super().scale_of(largest)


def test_an_interrupted_count_leaves_a_baseline():
    interrupted = InterruptedOnce(E3M4, "tensor")
    weights = [weight_of(AWAY_FROM_0, "float8_e4m3"), weight_of(AWAY_FROM_0, interrupted, "interrupted")]
    tracker = WeightFlipTracker()
    step(tracker, weights)
    interrupted.is_due = True
    with pytest.raises(KeyboardInterrupt):
        step(tracker, weights, lambda p: p.neg_())
    for _ in range(2):
        step(tracker, weights)
    assert tracker.get_flip_counts() == {"w": 0, "interrupted": 0}
    step(tracker, weights, lambda p: p.neg_())
    assert tracker.get_flip_counts() == {"w": 256, "interrupted": 256}


# ---------------------------------------------------------------------- the same memory, viewed differently


def _transpose(parameter):
    parameter.data = parameter.data.t()


def _other_dtype_of_the_same_memory(parameter):
    parameter.data = parameter.data.view(torch.float16)


def _next_row(parameter):
    parameter.data = parameter.data.as_strided((32, 32), (32, 1), 32)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("quantizer", ["e3m4", "float8_e4m3:row", "mxfp4", "native", "int8"])
@pytest.mark.parametrize("change", [_transpose, _other_dtype_of_the_same_memory, _next_row])
def test_the_same_memory_viewed_differently_is_a_baseline(change, quantizer, backend):
    memory = torch.randn(33, 32, generator=torch.Generator().manual_seed(0))
    if change is _other_dtype_of_the_same_memory:
        memory = memory.to(torch.bfloat16)
    parameter = torch.nn.Parameter(memory[:32])
    weight = TrackedWeight("w", parameter, resolve(quantizer))
    tracker = WeightFlipTracker(metrics=("flips",), backend=backend)

    def codes():
        return resolve(quantizer).encode(parameter.detach()).ordinals.clone()

    expected = 0
    for at in range(4):
        if at == 2:
            change(parameter)
        before = codes()
        step(tracker, [weight], lambda p: p.mul_(1 + 0.2 * torch.eye(32).to(p.dtype)))
        expected += int((codes() != before).sum())
    assert tracker.get_flip_counts() == {"w": expected}
