"""Weights on a device in plain torch: gathered, and each counted as it is alone. The CPU stands in for the device."""

from __future__ import annotations

import gc
import logging
import weakref

import pytest
import torch
from kernel_cases import gradient_of
from test_batch import E3M4, live_in_plain_torch, many_weights

from weightflip import FlipTrackingOptimizer, WeightFlipTracker
from weightflip.counting import gathered
from weightflip.counting.layer import TrackedWeight
from weightflip.kernels import gathered as kernel
from weightflip.kernels.gathered import Layout, pack
from weightflip.quantizers import resolve
from weightflip.quantizers.block import NVFP4Quantizer
from weightflip.quantizers.floatx import FloatxQuantizer

QUANTIZERS = ["float8_e4m3", "float8_e4m3:row", "float8_e5m2:pow2", "e3m4", "e2m5:row", "e2m1:none", "e4m11",
              "e6m1:row", "mxfp8_e4m3", "mxfp6_e2m3:even", "mxfp4:rceil", "nvfp4", "nvfp4:tensor", "int8", "int4:g32",
              "binary", "bfloat16", "native"]  # fmt: skip


@pytest.fixture
def on_a_device(monkeypatch, caplog):
    """Weights on the CPU go together, and none may be counted alone because its bucket failed."""
    caplog.set_level(logging.INFO, "weightflip")
    monkeypatch.setattr(gathered, "_EXCLUDED_DEVICES", frozenset())
    return caplog


def buckets(tracker):
    return sorted([layer.name for layer in bucket.layers] for bucket in tracker.buckets)


# ---------------------------------------------------------------------- as each alone


def hard_weights(quantizer):
    """Numbers that are hard, of odd lengths and three dtypes, as far as blocks fit them; each as a parameter."""
    found = []
    for weight in many_weights(torch.Generator().manual_seed(0)):
        fits = quantizer.group is None or (weight.ndim and weight.shape[-1] % quantizer.group == 0)
        if weight.numel() and weight.is_contiguous() and fits:
            found += [weight, weight.flip(0).bfloat16() if weight.ndim else weight.half()]
    assert len(found) >= 16
    return [torch.nn.Parameter(weight) for weight in found]


@pytest.mark.parametrize(("wide", "narrow"), [(1 << 24, 1 << 20), (5000, 1500)])
@pytest.mark.parametrize("name", QUANTIZERS)
def test_hard_weights_are_each_counted_by_brute_force(name, wide, narrow, on_a_device, monkeypatch):
    monkeypatch.setattr(kernel, "_ELEMENTS", wide)
    monkeypatch.setattr(kernel, "_ELEMENTS_IN_NARROW", narrow)
    quantizer, generator = resolve(name), torch.Generator().manual_seed(1)
    weights = [TrackedWeight(f"w{i}", weight, quantizer) for i, weight in enumerate(hard_weights(quantizer))]
    tracker = WeightFlipTracker(backend="eager")
    expected = {weight.name: [0, 0, 0, 0] for weight in weights}
    for step in range(3):
        before = [quantizer.encode(weight.parameter) for weight in weights]
        for i, weight in enumerate(weights):
            gradient = gradient_of(weight.parameter.detach(), generator)
            # Some have none, some another dtype, some other strides.
            gradient = gradient.to(weight.parameter.dtype if i % 3 else torch.bfloat16)
            gradient = torch.stack([gradient, gradient], dim=-1)[..., 0] if i % 5 == 2 else gradient
            weight.parameter.grad = None
            if (i + step) % 4 and gradient.dtype is weight.parameter.dtype:
                weight.parameter.grad = gradient
        tracker.before_step(weights)
        with torch.no_grad():
            for weight in weights:
                factor = 0.5 + torch.rand(weight.parameter.shape, generator=generator)
                weight.parameter.mul_(factor.to(weight.parameter.dtype))
        tracker.after_step()
        for weight, old in zip(weights, before, strict=True):
            new, counts, grad = quantizer.encode(weight.parameter), expected[weight.name], weight.parameter.grad
            flipped = new.ordinals != old.ordinals
            updated = torch.zeros_like(flipped) if grad is None else grad != 0
            stored = 0
            if quantizer.group:
                stored = int((quantizer.scale_codes(new.scale) != quantizer.scale_codes(old.scale)).sum())
            for column, found in enumerate((flipped.sum(), updated.sum(), (updated & ~flipped).sum(), stored)):
                counts[column] += int(found)
            assert torch.equal(tracker.layers[weight.name].codes, new.ordinals), weight.name
    found = {layer.name: layer.total for layer in tracker.record().layers}
    for counted, counts in ((found[name], counts) for name, counts in expected.items()):
        assert [counted.flips, counted.updates, counted.stalled, counted.scale_changes] == counts
    together = [name for bucket in buckets(tracker) for name in bucket]
    assert len(together) >= 8
    assert len(buckets(tracker)) < len(together) / (4 if wide > 5000 else 1)
    assert "one by one" not in on_a_device.text


OPTIONS = [{}, {"low_memory": True}, {"fresh_snapshots": True}, {"track_every": 2}, {"metrics": ("flips",)}]


@pytest.mark.parametrize("quantizer", ["float8_e4m3", "e3m4:row", "nvfp4", "nvfp4:tensor", "int4:g32", "native"])
def test_a_life_is_counted_as_one_by_one(quantizer, monkeypatch, request):
    expected = [live_in_plain_torch(quantizer, **options) for options in OPTIONS]
    log, counted = request.getfixturevalue("on_a_device"), []
    count = gathered.Bucket.count
    monkeypatch.setattr(gathered.Bucket, "count", lambda bucket, *rest: counted.append(bucket) or count(bucket, *rest))
    found = [live_in_plain_torch.__wrapped__(quantizer, **options) for options in OPTIONS]
    assert found == expected
    assert len(counted) >= 12 * len(OPTIONS) / 2
    assert "one by one" not in log.text


def train(**options):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32), torch.nn.Linear(32, 16)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if options:
        optimizer = FlipTrackingOptimizer(optimizer, model, include="*", sinks=[], backend="eager", **options)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
    return [*model.state_dict().values(), torch.get_rng_state()], optimizer


def test_training_is_unchanged(on_a_device):
    formats = {"0.*": "float8_e4m3", "2.weight": "mxfp4", "*": "e3m4"}
    bare, (tracked, optimizer) = train()[0], train(quantizer=formats)
    assert all(torch.equal(a, b) for a, b in zip(bare, tracked, strict=True))
    assert sorted(map(len, buckets(optimizer.tracker))) == [1, 2, 3]
    assert all(optimizer.tracker.get_flip_counts().values())


# ---------------------------------------------------------------------- what goes together


def of(name, weight, quantizer="float8_e4m3"):
    tracked = TrackedWeight(name, torch.nn.Parameter(weight), resolve(quantizer))
    tracked.parameter.grad = torch.ones_like(weight)
    return tracked


def step(tracker, weights):
    tracker.before_step(weights)
    with torch.no_grad():
        for weight in weights:
            weight.parameter.mul_(-1)
    tracker.after_step()


def test_which_layers_are_gathered(on_a_device, monkeypatch):
    weights = [
        of("a", torch.ones(4, 32)),
        of("transposed", torch.ones(8, 4).T),
        of("double", torch.ones(3).double()),
        of("b", torch.ones(7)),
        of("ternary", torch.ones(2, 2), "ternary"),
        of("row", torch.ones(4, 32), "int8"),
        of("fixed", torch.ones(2), FloatxQuantizer(E3M4, fixed_scale=2.0)),
        of("large", torch.ones(2001)),
    ]
    monkeypatch.setattr(kernel, "_ELEMENTS_IN_NARROW", 2000)
    tracker = WeightFlipTracker(backend="eager")
    step(tracker, weights)
    assert buckets(tracker) == [["a", "b"], ["double"], ["row"]]
    before = [id(bucket) for bucket in tracker.buckets]
    step(tracker, weights)
    # Built once while nothing changes.
    assert [id(bucket) for bucket in tracker.buckets] == before
    weights[0].parameter.grad = torch.ones(4, 32).to_sparse()
    step(tracker, weights)
    assert buckets(tracker) == [["b"], ["double"], ["row"]]
    weights[0].parameter.grad = None
    step(tracker, weights)
    assert buckets(tracker) == [["a", "b"], ["double"], ["row"]]
    assert tracker.get_flip_counts() == {weight.name: 4 * weight.parameter.numel() for weight in weights}
    assert tracker.get_update_counts()["a"] == 3 * 128
    tracker.drop_codes()
    assert buckets(tracker) == []
    grouped = WeightFlipTracker(backend="eager", metrics=("flips", "oscillation"))
    step(grouped, weights)
    assert buckets(grouped) == []


@pytest.mark.parametrize("per_tensor_scale", [False, True])
def test_a_scale_of_the_users_own_is_asked_of_each_weight(per_tensor_scale, on_a_device):
    class OwnScale(NVFP4Quantizer):
        def scale(self, weight, statistic=None):
            return super().scale(weight * 3, statistic)

    tracker = WeightFlipTracker(backend="eager")
    step(tracker, [of("a", torch.ones(4, 32), OwnScale(per_tensor_scale))])
    assert buckets(tracker) == []


def test_nothing_is_gathered_on_the_cpu():
    tracker = WeightFlipTracker(backend="eager")
    step(tracker, [of("a", torch.ones(4, 32))])
    assert buckets(tracker) == []


def test_a_fault_affects_only_its_layer(on_a_device):
    class BreaksLater(FloatxQuantizer):
        is_broken = False

        def scale_of(self, largest):
            if self.is_broken:
                raise RuntimeError("no scale today")
            return super().scale_of(largest)

    broken = BreaksLater(E3M4, "tensor")
    weights = [of("good", torch.ones(4, 4)), of("bad", torch.ones(4, 4), broken)]
    tracker = WeightFlipTracker(backend="eager")
    for at in range(4):
        broken.is_broken = at > 1
        if at == 2:
            with pytest.warns(UserWarning, match="'bad' is no longer tracked, training continues: RuntimeError: no"):
                step(tracker, weights)
        else:
            step(tracker, weights)
    assert tracker.get_flip_counts() == {"good": 4 * 16, "bad": 2 * 16}
    assert buckets(tracker) == [["good"]]


@pytest.mark.parametrize("method", ["magnitudes", "sums"])
def test_what_cannot_be_gathered_is_counted_one_by_one(method, on_a_device, monkeypatch):
    def missing(*_):
        raise NotImplementedError("aten::scatter_reduce.two_out is not there for this device")

    monkeypatch.setattr(Layout, method, missing)
    weights = [of("a", torch.ones(4, 32)), of("b", torch.ones(7))]
    tracker = WeightFlipTracker(backend="eager")
    for _ in range(3):
        step(tracker, weights)
    assert tracker.get_flip_counts() == {"a": 3 * 128, "b": 3 * 7}
    assert on_a_device.text.count("2 weights are counted one by one: NotImplementedError: aten::scatter_reduce") == 1


def test_low_memory_holds_no_codes_between_steps(on_a_device):
    weights, tracker = (
        [of("a", torch.ones(4, 32)), of("b", torch.ones(4, 64))],
        WeightFlipTracker(backend="eager", low_memory=True),
    )
    tracker.before_step(weights)
    codes = [weakref.ref(layer.codes) for layer in tracker.layers.values()]
    assert [code() is None for code in codes] == [False, False]
    tracker.after_step()
    gc.collect()
    assert [code() for code in codes] == [None, None]


def test_large_buffers_are_released(on_a_device, monkeypatch):
    weights, tracker = [of("a", torch.ones(4, 32)), of("b", torch.ones(4, 64))], WeightFlipTracker(backend="eager")
    step(tracker, weights)
    assert tracker._scratch.nbytes > 0
    monkeypatch.setattr(gathered, "_MAX_SCRATCH_BYTES", 0)
    step(tracker, weights)
    assert tracker._scratch.nbytes == 0
    assert tracker.memory_usage().codes == 128 + 256


# ---------------------------------------------------------------------- the layout


def test_heaps_are_full_and_narrow_weights_spoil_few(monkeypatch):
    monkeypatch.setattr(kernel, "_ELEMENTS", 100)
    monkeypatch.setattr(kernel, "_ELEMENTS_IN_NARROW", 50)
    numels = [64, 32, 32, 64, 32, 7, 3, 16]
    found = pack(numels, numels)
    assert sorted(index for bucket in found for index in bucket) == list(range(8))
    for bucket in found:
        assert sum(numels[index] for index in bucket) <= (50 if any(numels[index] % 16 for index in bucket) else 100)
    assert len(found) == 4


@pytest.mark.parametrize(
    ("numels", "groups"),
    [([48, 48], [48, 48]), ([48, 16, 7], [48, 16, 7]), ([48, 96], [16, 32]), ([9, 6], [3, 3]), ([1], [1])],
)
def test_scales_and_sums_of_a_layout(numels, groups):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(numel, generator=generator) for numel in numels]
    tensors[0][0] = float("nan")
    layout = Layout(numels, groups, torch.device("cpu"))
    chunks, scales = layout.chunks(layout.gather(tensors)), layout.scales_of_chunks()
    largest = layout.largest(layout.magnitudes(chunks), scales).flatten()
    expected = torch.cat([t.view(-1, group).abs().amax(1) for t, group in zip(tensors, groups, strict=True)])
    assert torch.equal(largest.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))
    spread = largest if scales is None else largest[scales]
    elements = torch.cat(
        [
            e.repeat_interleave(g)
            for e, g in zip(expected.split([n // g for n, g in zip(numels, groups, strict=True)]), groups, strict=True)
        ]
    )
    assert torch.equal(spread.repeat_interleave(layout.width).nan_to_num(nan=-1.0), elements.nan_to_num(nan=-1.0))
    flags = torch.rand(2, sum(numels), generator=generator) < 0.5
    of_chunks = torch.rand(len(chunks), generator=generator) < 0.5
    found = layout.sums(flags, of_chunks)
    each = zip(flags.split(numels, dim=1), of_chunks.split([numel // layout.width for numel in numels]), strict=True)
    assert found.T.tolist() == [[*a.sum(1).tolist(), int(b.sum())] for a, b in each]
