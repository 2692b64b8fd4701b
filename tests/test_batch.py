"""Many weights counted in one call: each as it is counted alone, in plain torch."""

from __future__ import annotations

import functools
import gc
import warnings
import weakref

import pytest
import torch
from conftest import case
from kernel_cases import QUANTIZERS, assert_batch_equals_one_by_one, by_eager, each_one_by_one, with_special
from test_cpu_kernel import weights
from test_observed import is_same
from torch import Tensor, nn

from weightflip import WeightFlipTracker, kernels
from weightflip.counting import batch
from weightflip.counting.layer import TrackedWeight
from weightflip.formats import E4M3, FloatFormat
from weightflip.kernels import cpu
from weightflip.metrics import LayerMetric, Metric, Value
from weightflip.quantizers import resolve
from weightflip.quantizers.block import MX_NAMES, MXQuantizer
from weightflip.quantizers.floatx import FloatxQuantizer

CPU = torch.device("cpu")
BLOCKS = [*(MXQuantizer(format, mode) for format in MX_NAMES.values() for mode in ("floor", "rceil", "ceil", "even")),
          "nvfp4", "int4:g32", "int8:g16", "float8_e4m3:1x128", "float8_e4m3:1x128:pow2"]  # fmt: skip


TILES = ["float8_e4m3:128x128", "float8_e4m3:128x128:pow2"]


@pytest.fixture(autouse=True, params=[(1, 1 << 21), (3, 1 << 21), (3, 2100)], ids=["1", "3", "3 in short runs"])
def threads_and_runs(request, monkeypatch):
    threads, elements = request.param
    monkeypatch.setattr(cpu, "_ELEMENTS_PER_ITEM", 100)
    monkeypatch.setattr(cpu, "_ELEMENTS_PER_ITEM_OF_BLOCKS", 20_000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(batch, "_ELEMENTS_PER_RUN", elements)


def many_weights(generator):
    """Shapes that fill runs badly, numbers that are hard, next to each other."""
    shapes = [(1,), (), (3, 32), (65, 96), (1, 4096), (40, 32), (7, 5, 64), (2, 352), (500, 32),
              (300, 416), (3, 130, 160), (256, 96)]  # fmt: skip
    plain = [torch.randn(shape, generator=generator) * 10.0 ** (i - 4) for i, shape in enumerate(shapes)]
    special = with_special(torch.randn(64, 64, generator=generator))
    others = [weight for name, weight in weights().items() if name not in ("empty", "transposed", "channels_last")]
    return [*plain, special, torch.zeros(4, 64), torch.full((2, 32), 1e-45), *others]


# The same for all numbers of threads.
@functools.cache
def many_one_by_one(spec, cuts_blocks=True):
    generator = torch.Generator().manual_seed(0)
    return each_one_by_one(many_weights(generator), resolve(spec), generator, cuts_blocks=cuts_blocks)


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, *BLOCKS, *TILES], ids=str)
def test_equals_one_by_one(quantizer):
    assert_batch_equals_one_by_one(many_one_by_one(quantizer), resolve(quantizer), "auto", cpu.Run)


@pytest.mark.parametrize("longest", [0, 100])
def test_equals_one_by_one_where_groups_are_too_long_for_one_pass(longest, monkeypatch):
    monkeypatch.setattr(cpu.Run, "longest_group", longest)
    for name in ("float8_e4m3", "e3m4:row", "int8", "float8_e4m3:row:pow2", *BLOCKS):
        with case(name):
            assert_batch_equals_one_by_one(many_one_by_one(name, cuts_blocks=False), resolve(name), "auto", cpu.Run)
    weight, codes = torch.ones(8, 130), torch.zeros(8, 130, dtype=torch.int8)
    for name in ("float8_e4m3:1x128", *TILES):
        assert batch.make_member(weight, resolve(name), codes, "auto", with_updates=True) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scales_of_groups_are_made_in_the_pass_that_counts(dtype):
    for name in ("float8_e4m3", "float8_e4m3:pow2", "e3m4:row", "int8", *BLOCKS, *TILES):
        weight, quantizer = torch.ones(4, 256, dtype=dtype), resolve(name)
        codes = torch.zeros(weight.shape, dtype=torch.int8)
        with case(name):
            member = batch.make_member(weight, quantizer, codes, "auto", with_updates=True)
            assert member.scaling is not None
            assert member.scaling is batch.make_member(weight, resolve(name), codes, "auto", with_updates=True).scaling
    weight, codes = (
        torch.ones(2, cpu.Run.longest_group + 1),
        torch.zeros(2, cpu.Run.longest_group + 1, dtype=torch.int8),
    )
    for name in ("float8_e4m3", "float8_e4m3:row:pow2", "int8"):
        member = batch.make_member(weight, resolve(name), codes, "auto", with_updates=True)
        assert (member.scaling is None, member.scaling_before is None) == (True, False), name


def test_scales_that_many_weights_share_are_the_quantizers_own():
    rows = torch.randn(7, cpu.Run.longest_group + 3) * torch.logspace(-44, 38, 7)[:, None]
    rows[1, 5], rows[2, 6], rows[3] = torch.inf, torch.nan, 0.0
    for name in ("float8_e4m3:row", "float8_e4m3:row:pow2", "float8_e5m2:row", "e3m4:row", "int8"):
        for weight in (rows, rows.bfloat16()):
            quantizer, codes = resolve(name), torch.zeros(weight.shape, dtype=torch.int8)
            member = batch.make_member(weight, quantizer, codes, "auto", with_updates=False)
            place = kernels.Stretch(member.address, codes.data_ptr(), weight.numel(), member.group)
            kind = kernels.Kind(weight.dtype, None, codes.dtype, member.rounding, weight.device)
            with case(name, weight.dtype):
                found = cpu.Run([place], kind).factors(member.scaling_before)
                expected = quantizer.applied_scale(quantizer.scale(weight)).flatten()
                torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_formats_side_by_side_and_without_updates():
    generator = torch.Generator().manual_seed(1)
    found, wanted = [], []
    for name in ("float8_e4m3", "e3m4:row", "float8_e4m3", "bfloat16", "mxfp4", "e2m1:none"):
        weight, quantizer = torch.randn(30, 64, generator=generator), resolve(name)
        old = torch.zeros(weight.shape, dtype=quantizer.code_dtype(weight))
        found.append((batch.make_member(weight, quantizer, old.clone(), "auto", with_updates=False), weight))
        wanted.append(by_eager(weight, quantizer, old, None, (0, 0, 0)))
    counted = batch.Batch([member for member, _ in found], with_updates=False).advance([0] * 6)
    assert counted.counts.tolist() == [counts.tolist() for _, counts, _ in wanted]
    assert all(torch.equal(member.codes, codes) for (member, _), (codes, *_) in zip(found, wanted, strict=True))


def powers_of_two_and_their_neighbors():
    exponents = torch.arange(-126, 128, dtype=torch.float64)
    around = torch.exp2(exponents).float().view(torch.int32).view(-1, 1) + torch.arange(-40, 41, dtype=torch.int32)
    return around.view(torch.float32)


@pytest.mark.parametrize(
    "name",
    [
        "float8_e4m3:pow2",
        "float8_e4m3:1x128:pow2",
        "float8_e5m2",
        "e3m4",
        "mxfp8_e4m3:rceil",
        "mxfp4",
        "nvfp4",
        "int4:g32",
    ],
)
def test_many_scales_at_once_are_each_the_quantizers_own(name):
    # Logarithms decide between two powers of two: they must not depend on how many are taken at once.
    quantizer = resolve(name)
    largest = powers_of_two_and_their_neighbors().flatten()
    width = quantizer.group or 32
    together = quantizer.scale_of(largest)
    for i in range(0, largest.numel(), 97):
        weight = torch.zeros(1, width)
        weight[0, 3] = -largest[i]
        alone = quantizer.scale(quantizer.grouped(weight)).flatten()
        assert torch.equal(alone, together[i : i + 1]), (largest[i], alone, together[i])


class OwnScale(FloatxQuantizer):
    def scale(self, weight):
        return weight.flatten()[0].abs()


class OwnEncoding(FloatxQuantizer):
    def encode_into(self, weight, scale, out, scratch):
        out.zero_()


E3M4 = FloatFormat("e3m4", 3, 4, 3)


@pytest.mark.parametrize(
    ("quantizer", "weight"),
    [
        ("float8_e4m3", torch.ones(8, 4).T),
        ("float8_e4m3", torch.ones(8, 8)[:, ::2]),
        ("float8_e4m3", torch.ones(8, 4, dtype=torch.float64)),
        ("float8_e4m3", torch.ones(0, 4)),
        ("float8_e4m3", torch.ones(8, 4).as_subclass(type("Subclass", (torch.Tensor,), {}))),
        ("float8_e4m3", torch._neg_view(torch.ones(8, 4))),
        ("float8_e4m3", torch.zeros(17, dtype=torch.uint8)[1:].view(-1)[:16]),
        ("nvfp4:tensor", torch.ones(8, 32)),
        ("binary", torch.ones(8, 4)),
        ("ternary", torch.ones(8, 4)),
        ("e6m1", torch.ones(8, 4)),
        ("native", torch.ones(8, 4)),
        (FloatxQuantizer(E3M4, fixed_scale=2.0), torch.ones(8, 4)),
        (OwnScale(E3M4, "tensor"), torch.ones(8, 4)),
        (OwnEncoding(E3M4, "tensor"), torch.ones(8, 4)),
    ],
    ids=str,
)
def test_which_weights_are_counted_one_by_one(quantizer, weight):
    quantizer = resolve(quantizer)
    codes = torch.zeros(weight.shape, dtype=torch.int8)
    assert batch.make_member(weight, quantizer, codes, "auto", with_updates=True) is None


def test_eager_is_eager():
    weight, codes = torch.ones(8, 4), torch.zeros(8, 4, dtype=torch.int8)
    assert batch.make_member(weight, resolve("float8_e4m3"), codes, "eager", with_updates=True) is None


def test_a_fault_is_of_the_weights_that_share_it():
    class Broken(FloatxQuantizer):
        def scale_of(self, largest):
            raise RuntimeError("no scale today")

    def member(quantizer):
        weight = torch.ones(8, 4)
        keep.append(weight)
        return batch.make_member(weight, quantizer, torch.zeros(8, 4, dtype=torch.int8), "auto", with_updates=False)

    keep = []
    broken = Broken(E3M4, "tensor")
    members = [member(broken), member(resolve("float8_e4m3")), member(broken)]
    counted = batch.Batch(members, with_updates=False).advance([])
    assert [(index, str(error)) for index, error in counted.failed] == [(0, "no scale today"), (2, "no scale today")]
    assert counted.counts[:, 0].tolist() == [0, 32, 0]


# ---------------------------------------------------------------------- in the tracker


def parameters(generator):
    shapes = [(40, 32), (3, 32), (65, 96), (1, 4096), (7, 5, 64), (500, 32), (16, 32), (8, 32)]
    result = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    result.append(torch.nn.Parameter(torch.randn(64, 32, generator=generator).bfloat16()))
    result.append(torch.nn.Parameter(torch.randn(32, 64, generator=generator).T))
    return result


def live(backend, quantizer, **options):
    """Everything that happens to weights and gradients in a life; the records of it."""
    generator = torch.Generator().manual_seed(2)
    weights = [
        TrackedWeight(f"w{i}", parameter, resolve(quantizer)) for i, parameter in enumerate(parameters(generator))
    ]
    tracker = WeightFlipTracker(backend=backend, **options)
    records = []
    for step in range(12):
        for tracked in weights:
            grad = torch.randn(tracked.parameter.shape, generator=generator).to(tracked.parameter.dtype)
            tracked.parameter.grad = grad * (torch.rand(grad.shape, generator=generator) < 0.7)
        third, fourth, fifth, sixth = (weights[i].parameter for i in (2, 3, 4, 5))
        if step % 3 == 1:
            third.grad = None
            fourth.grad = fourth.grad.to_sparse()
            fifth.grad = torch.stack([fifth.grad, fifth.grad], dim=-1)[..., 0]
        if step == 4:
            with torch.no_grad():
                third.mul_(1.5)  # between two steps: no flip
            fourth.data = fourth.data * 1.5
            fifth.data = fifth.data.clone()
        if step == 5:
            # The same values of another quantizer object, as after a second look at the model.
            weights = [TrackedWeight(tracked.name, tracked.parameter, resolve(quantizer)) for tracked in weights]
        if step == 6:
            weights[6].parameter = torch.nn.Parameter(weights[6].parameter.detach() * 2)
        seen = weights[:7] if step in (7, 8) else weights
        tracker.before_step(seen)
        if step == 9:
            tracker.before_step(seen)  # the step raised
        for tracked in seen:
            change = torch.randn(tracked.parameter.shape, generator=generator).to(tracked.parameter.dtype) * 0.02
            tracked.parameter.data.add_(change)
        if step == 10:
            sixth.data = sixth.data.clone()
            third.data = third.data.double().float()
        if step == 11:
            for tracked in seen[:3]:
                tracked.parameter.grad = None  # by a hook, in the step
        tracker.after_step(torch.tensor(step != 8) if step > 6 else None)
        if step % 4 == 3:
            records.append(tracker.record())
    return records


# Plain torch knows nothing of the kernel's threads and runs.
live_in_plain_torch = functools.cache(functools.partial(live, "eager"))


@pytest.mark.parametrize("options", [{}, {"low_memory": True}, {"fresh_snapshots": True}, {"track_every": 2},
                                     {"metrics": ("flips",)}], ids=str)  # fmt: skip
@pytest.mark.parametrize("quantizer", ["float8_e4m3", "e3m4:row", "mxfp4", "nvfp4", "bfloat16", "native", "int8"])
def test_a_life_is_counted_as_in_plain_torch(quantizer, options):
    assert live("auto", quantizer, **options) == live_in_plain_torch(quantizer, **options)


class Sliced(Metric):
    name = "sliced"
    values = (Value("sliced", "rate"),)

    def open(self, name, weight):
        class Layer(LayerMetric):
            def slice(self, part, sums):
                pass

        return Layer()


def together(tracker):
    return [member.numel for member in tracker.batches[0].members]


def test_which_weights_the_tracker_batches():
    weights = [TrackedWeight(f"w{i}", p, resolve("float8_e4m3")) for i, p in enumerate(parameters(torch.Generator()))]
    tracker = WeightFlipTracker()
    built = set()
    for step in range(4):
        for tracked in weights:
            tracked.parameter.grad = torch.ones_like(tracked.parameter)
        if step == 3:
            weights[0].parameter.grad = torch.ones(40, 32).to_sparse()
        tracker.before_step(weights)
        tracker.after_step()
        assert together(tracker) == [w.parameter.numel() for w in weights[step == 3 : 9]]
        if step < 3:
            built.add(id(tracker.batches[0]))
    # Built once while nothing changes, though gradients are new in each step.
    assert len(built) == 1
    tracker.drop_codes()
    assert tracker.batches == []
    # Groups that have a form for kernels leave weights together; one that has to see slices does not.
    for groups, expected in ((("oscillation", "coverage", "scale", "travel"), 9), ((Sliced(),), 0)):
        grouped = WeightFlipTracker(metrics=("flips", *groups))
        grouped.before_step(weights)
        grouped.after_step()
        assert sum(len(batch.members) for batch in grouped.batches) == expected


def test_reused_memory_is_not_taken_for_the_weight():
    weight = TrackedWeight("w", torch.nn.Parameter(torch.ones(64, 64)), resolve("e3m4:none"))
    tracker = WeightFlipTracker()
    tracker.before_step([weight])
    tracker.after_step()
    address = weight.parameter.data_ptr()
    weight.parameter.data = torch.zeros(1)
    others = [torch.full((64, 64), 3.0) for _ in range(1000)]
    at_the_same_place = [other for other in others if other.data_ptr() == address]
    if not at_the_same_place:
        pytest.skip("this allocator does not give memory out again")
    weight.parameter.data = at_the_same_place[0]
    tracker.before_step([weight])
    tracker.after_step()
    assert tracker.get_flip_counts() == {"w": 0}


def test_a_fault_of_a_scale_gives_up_its_layers_and_no_others():
    class BreaksLater(FloatxQuantizer):
        steps = 0

        def scale_of(self, largest):
            BreaksLater.steps += 1
            if BreaksLater.steps > 3:
                raise RuntimeError("no scale today")
            return super().scale_of(largest)

    def of(name, quantizer):
        return TrackedWeight(name, torch.nn.Parameter(torch.ones(4, 4)), quantizer)

    weights = [of("good", resolve("float8_e4m3:row")), of("bad", BreaksLater(E3M4, "tensor"))]
    tracker = WeightFlipTracker()
    for step in range(4):
        tracker.before_step(weights)
        for weight in weights:
            weight.parameter.data[0, 0] *= 2
        if step == 2:
            with pytest.warns(UserWarning, match="'bad' is no longer tracked, training continues: RuntimeError: no"):
                tracker.after_step()
        else:
            tracker.after_step()
    assert tracker.get_flip_counts() == {"good": 4 * 3, "bad": 2 * 15}


def weights_with_gradients(format, shape=(8, 64)):
    generator = torch.Generator().manual_seed(0)
    weights = [
        TrackedWeight(name, torch.nn.Parameter(torch.randn(shape, generator=generator)), resolve(format))
        for name in ("a", "b")
    ]
    for weight in weights:
        weight.parameter.grad = torch.randn(shape, generator=generator)
    return weights, generator


@pytest.mark.parametrize("format", ["float8_e4m3", "mxfp4", "int4:g32"])
@pytest.mark.parametrize("why", ["sparse gradient", "expanded gradient", "new memory"])
def test_a_weight_counted_one_by_one_returns_to_its_batch(format, why):
    weights, generator = weights_with_gradients(format)
    weight, quantizer = weights[0], resolve(format)
    tracker = WeightFlipTracker()
    flips = changes = 0
    for step in range(4):
        old = quantizer.encode(weight.parameter)
        is_odd = step == 1
        gradient = torch.randn(weight.parameter.shape, generator=generator)
        weight.parameter.grad = gradient
        if is_odd and why == "sparse gradient":
            weight.parameter.grad = gradient.to_sparse()
        elif is_odd and why == "expanded gradient":
            weight.parameter.grad = gradient[:1].expand_as(gradient)
        tracker.before_step(weights)
        new = weight.parameter.data * (1 + 0.3 * torch.rand(weight.parameter.shape, generator=generator))
        if is_odd and why == "new memory":
            weight.parameter.data = new
        else:
            with torch.no_grad():
                weight.parameter.copy_(new)
        tracker.after_step()
        codes = quantizer.encode(weight.parameter)
        flips += int((codes.ordinals != old.ordinals).sum())
        if quantizer.group:
            changes += int((quantizer.scale_codes(codes.scale) != quantizer.scale_codes(old.scale)).sum())
        assert together(tracker) == ([512] if is_odd else [512, 512])
        counts = tracker.record().layers[0].total
        assert (counts.flips, counts.scale_changes) == (flips, changes)


@pytest.mark.parametrize("metrics", [("flips",), ("flips", "stalls")])
def test_a_weight_that_no_longer_fits_a_batch_is_counted_one_by_one(metrics):
    weights, generator = weights_with_gradients("int4", (16, 8))
    tracker = WeightFlipTracker(metrics=metrics)
    flips = dict.fromkeys("ab", 0)
    for step in range(6):
        old = {weight.name: codes_of(weight) for weight in weights}
        tracker.before_step(weights)
        for weight in weights:
            weight.parameter.data.add_(torch.randn(weight.parameter.shape, generator=generator))
        if step == 1:
            weights[0].parameter.data = weights[0].parameter.data.T.contiguous().T
        if step == 3:
            weights[1].parameter.data = weights[1].parameter.data.clone()
        tracker.after_step()
        for weight in weights:
            flips[weight.name] += int((codes_of(weight) != old[weight.name]).sum())
        assert tracker.get_flip_counts() == flips
        assert sum(len(batch.members) for batch in tracker.batches) == [2, 1, 1, 0, 1, 1][step]
    assert [counts.weight_steps for *_, counts in tracker.totals()[1]] == [6 * 128] * 2


def codes_of(weight):
    return weight.quantizer.encode(weight.parameter).ordinals


def test_codes_of_another_width_are_encoded_again():
    weights, generator = weights_with_gradients("native", (16, 8))
    tracker = WeightFlipTracker(metrics=("flips",))
    flips = 0
    for step in range(5):
        old = codes_of(weights[0])
        tracker.before_step(weights)
        weights[0].parameter.data.mul_(1 + 0.01 * torch.rand(16, 8, generator=generator))
        if step == 1:
            weights[0].parameter.data = weights[0].parameter.data.bfloat16()
        tracker.after_step()
        flips += int((codes_of(weights[0]) != old).sum())
        assert tracker.get_flip_counts() == {"a": flips, "b": 0}


def test_low_memory_holds_no_codes_between_steps():
    weights, _ = weights_with_gradients("float8_e4m3")
    tracker = WeightFlipTracker(low_memory=True)
    tracker.before_step(weights)
    codes = [weakref.ref(layer.codes) for layer in tracker.layers.values()]
    assert len(codes) == 2
    tracker.after_step()
    gc.collect()
    assert [code() for code in codes] == [None, None]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", ["e3m4:row", "mxfp4", "int4:g32"])
def test_another_shape_in_the_same_memory_is_encoded_again(name, backend):
    weights, _ = weights_with_gradients(name, (16, 64))
    weight, quantizer = weights[0], resolve(name)
    tracker = WeightFlipTracker(backend=backend)
    tracker.before_step(weights)
    tracker.after_step()
    weight.parameter.grad = None
    weight.parameter.data = weight.parameter.data.view(8, 128)
    old = quantizer.encode(weight.parameter).ordinals
    tracker.before_step(weights)
    with torch.no_grad():
        weight.parameter[0, :4] *= 3
    tracker.after_step()
    assert tracker.get_flip_counts()["a"] == int((quantizer.encode(weight.parameter).ordinals != old).sum()) > 0


def test_a_default_device_of_another_kind():
    weights, _ = weights_with_gradients("float8_e4m3")
    tracker = WeightFlipTracker()
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            tracker.before_step(weights)
            with torch.no_grad():
                weights[0].parameter.mul_(-1)
            tracker.after_step()
    assert tracker.get_flip_counts() == {"a": 2 * 512, "b": 0}


class Halved(FloatxQuantizer):
    """e3m4 with its own factor for the scale, which its name does not tell."""

    def __init__(self, factor: float) -> None:
        super().__init__(E3M4, "tensor")
        self.factor = factor

    def scale_of(self, largest: Tensor) -> Tensor:
        return super().scale_of(largest) * self.factor

    def scale(self, weight: Tensor, statistic: Tensor | None = None) -> Tensor | None:
        return self.scale_of(weight.abs().amax())

    only_needs_amax = True


class InSteps(MXQuantizer):
    """mxfp8 with its own shift of the exponent, which its name does not tell."""

    def __init__(self, shift: int) -> None:
        super().__init__(E4M3)
        self.shift = shift

    def scale_of(self, largest: Tensor, of_tensor: Tensor | None = None) -> Tensor:
        return super().scale_of(largest.float() * 2.0**self.shift)

    def scale_rule(self, dtype: torch.dtype) -> str:
        return "steps"


@pytest.mark.parametrize("quantizers", [(Halved(1.0), Halved(1.7)), (InSteps(0), InSteps(3))], ids=["scale", "table"])
@pytest.mark.parametrize("metrics", [("flips",), ("flips", "scale", "travel")], ids=str)
def test_quantizers_of_one_name_with_other_parameters_keep_their_own_scales(quantizers, metrics):
    def run(backend: str):
        generator = torch.Generator().manual_seed(5)
        start = torch.randn(64, 64, generator=generator)
        tracked = [
            TrackedWeight(name, nn.Parameter(start.clone()), quantizer)
            for name, quantizer in zip("abc", (*quantizers, quantizers[0]), strict=True)
        ]
        tracker = WeightFlipTracker(backend=backend, metrics=metrics)
        for _ in range(4):
            tracker.before_step(tracked)
            change = 1 + torch.randn(64, 64, generator=generator) / 30
            for weight in tracked:
                weight.parameter.data.mul_(change)
            tracker.after_step()
        return tracker.state_dict(), {name: layer.codes for name, layer in tracker.layers.items()}

    (found, codes), (expected, expected_codes) = run("auto"), run("eager")
    assert is_same(found, expected)
    for name in "abc":
        assert torch.equal(codes[name], expected_codes[name])
    assert not torch.equal(codes["a"], codes["b"])
    assert torch.equal(codes["a"], codes["c"])


def test_factors_are_never_those_of_other_scales():
    """A kernel that computes the scales itself returns no factors."""
    quantizer = resolve("float8_e4m3:row")
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    for observed in (False, True):
        codes = quantizer.encode(weight)
        member = batch.make_member(weight, quantizer, codes.ordinals, "auto", with_updates=False, observed=observed)
        assert (member.scaling is None) == observed
        member.keeps_scale = True
        member.set_scale(codes.scale)
        whole = batch.Batch([member], with_updates=False)
        for _ in range(2):
            weight.mul_(1.5)
            assert not whole.advance([0]).failed
            assert torch.equal(member.scale, quantizer.scale(weight))
            (kept,) = {scale_slice.kept for scale_slice in member.scale_slices}
            assert kept.applied is None or torch.equal(kept.applied, quantizer.applied_scale(kept.scale))
            assert (kept.applied is None) == (not observed)


def test_quantizers_of_a_name_share_a_kind():
    assert resolve("mxfp4").key == resolve("mxfp4").key != resolve("mxfp4:rceil").key
    one, other = Halved(1.0), Halved(1.0)
    assert one.key == one.key != other.key
    assert len({one.key, one.key, other.key, resolve("e3m4").key}) == 3
    kept = one.key
    del one
    assert kept != Halved(1.0).key
