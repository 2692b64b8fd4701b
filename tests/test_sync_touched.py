"""Which weights flipped at least once between two syncs, against brute force that clones the codes in each step."""

from __future__ import annotations

import copy
import importlib.util
import pickle
from collections.abc import Iterable

import pytest
import torch
from conftest import assert_trained_alike, backward, digits_model
from torch import Tensor, nn

from weightflip import FlipTrackingOptimizer, track_flips
from weightflip.counting import batch
from weightflip.kernels import ScratchPool
from weightflip.metrics.base import RunFlag, Weight
from weightflip.metrics.touched import _LayerTouched
from weightflip.quantizers import resolve

RATES = ("touched_fraction", "untouched_layers")
METRICS = ("flips", "touched")
FORMATS = ["float8_e4m3", "float8_e4m3:row", "int4:g16", "mxfp4", "bfloat16", "float8_e4m3:128x128"]
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs Numba")


class Touched:
    """The codes before and after each tracked step, and nothing but that."""

    def __init__(self, parameters: Iterable[tuple[str, Tensor]], format: str) -> None:
        self.parameters = {name: p for name, p in parameters if p.ndim >= 2}
        self.format = format
        self.flags: dict[str, Tensor | None] = dict.fromkeys(self.parameters)
        self.windows: dict[str, list[int]] = {name: [] for name in self.parameters}
        self.has_run = self.is_marked = False

    def codes(self, parameter: Tensor) -> Tensor:
        return resolve(self.format).encode(parameter.detach()).ordinals.clone()

    def before(self) -> None:
        self.old = {name: self.codes(p) for name, p in self.parameters.items()}

    def after(self) -> None:
        self.has_run = True
        for name, p in self.parameters.items():
            flipped = self.codes(p) != self.old[name]
            flags = self.flags[name]
            self.flags[name] = flipped if flags is None else flags | flipped

    def mark(self) -> None:
        if self.is_marked and not self.has_run:
            return
        for name, flags in self.flags.items():
            if self.is_marked:
                assert flags is not None
                self.windows[name].append(int(flags.sum()))
            self.flags[name] = None
        self.is_marked, self.has_run = True, False

    def rates(self, name: str) -> dict[str, tuple[float, float]]:
        windows = self.windows[name]
        weights = self.parameters[name].numel() * len(windows)
        return {"touched_fraction": (sum(windows), weights), "untouched_layers": (windows.count(0), len(windows))}


def rates_of(counts) -> dict[str, tuple[float, float]]:
    return {name: tuple(counts.ratios[name]) for name in RATES if counts.ratios[name].denominator}


def wrapped(model, format="float8_e4m3", metrics=METRICS, lr=0.02, **options):
    inner = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return FlipTrackingOptimizer(inner, model, quantizer=format, metrics=metrics, **{"sinks": [], **options})


def train(optimizer, model, digits, seen, steps, every=None, start=0, track_every=1):
    for step in range(start, start + steps):
        backward(model, digits, step)
        is_tracked = step % track_every == 0
        if is_tracked:
            seen.before()
        optimizer.step()
        if is_tracked:
            seen.after()
        if every and (step + 1) % every == 0:
            seen.mark()
            optimizer.tracker.mark_sync()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"track_every": 5},
        {"low_memory": True},
        {"fresh_snapshots": True},
        {"backend": "eager"},
        {"metrics": ("flips", "stalls", "oscillation", "sync", "touched", "scale")},
    ],
    ids=str,
)
def test_windows_equal_the_definition(options, digits):
    for format in FORMATS:
        model = digits_model(width=64)
        optimizer, seen = wrapped(model, format, **options), Touched(model.named_parameters(), format)
        seen.mark()
        optimizer.tracker.mark_sync()
        # With track_every=5, some windows are without a tracked step.
        train(optimizer, model, digits, seen, 12, every=3, track_every=options.get("track_every", 1))
        record = optimizer.tracker.record()
        for layer in record.layers:
            assert rates_of(layer.window) == rates_of(layer.total) == seen.rates(layer.name), format
        assert 0 < record.model.values["touched_fraction"] <= 1
        optimizer.tracker.mark_sync()
        assert rates_of(optimizer.tracker.record(may_be_empty=True).model.window) == {}, "there was no step"


@pytest.mark.parametrize("options", [{}, {"start_step": 2, "track_every": 2}], ids=str)
def test_sync_every(options, digits):
    """Bits of the first tracked step are in the first window."""
    model = digits_model(width=64)
    optimizer, seen = wrapped(model, sync_every=3, **options), Touched(model.named_parameters(), "float8_e4m3")
    start, every = options.get("start_step", 0), options.get("track_every", 1)
    for step in range(12):
        if step >= start and (step - start) % 3 == 0:
            seen.mark()
        backward(model, digits, step)
        is_tracked = step >= start and (step - start) % every == 0
        if is_tracked:
            seen.before()
        optimizer.step()
        if is_tracked:
            seen.after()
    if (12 - start) % 3 == 0:
        seen.mark()
    for layer in optimizer.tracker.record().layers:
        assert rates_of(layer.total) == seen.rates(layer.name)


def test_weights_that_move_back_and_forth_are_touched():
    """In each window, the net change is empty, and half of the weights flip twice."""
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD([weight], lr=1.0), quantizer="e3m4:none", metrics=("flips", "sync", "touched"), sync_every=2,
        sinks=[],
    )  # fmt: skip
    for by in (1.0, -1.0, 1.0, -1.0):
        weight.grad = torch.zeros_like(weight)
        weight.grad[:4] = by
        optimizer.step()
    layer = optimizer.tracker.record().layers[0]
    assert (layer.window.flips, layer.values["changed_fraction"], layer.values["empty_layers"]) == (128, 0, 1)
    assert layer.window.ratios["touched_fraction"] == (64, 128)
    assert layer.window.ratios["untouched_layers"] == (0, 2)


def odd_weights(generator: torch.Generator) -> list[nn.Parameter]:
    """Odd lengths, a single weight, more than one item of the kernel, and layouts that are not contiguous."""
    shapes = [(33, 7), (1, 1), (3, 5, 31), (2300, 65), (1, 64), (9, 129), (64, 96)]
    found = [torch.randn(shape, generator=generator) for shape in shapes]
    found += [torch.randn(2300, 515, generator=generator).t(), torch.randn(40, 66, generator=generator)[:, ::2]]
    found.append(torch.randn(4, 3, 5, 7, generator=generator).to(memory_format=torch.channels_last))
    return [nn.Parameter(weight) for weight in found]


def run_odd(backend: str, format: str, dtype: torch.dtype = torch.float32) -> tuple[Touched, FlipTrackingOptimizer]:
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(weight.detach().to(dtype)) for weight in odd_weights(generator)]
    if format == "mxfp4":
        parameters = [p for p in parameters if p.shape[-1] % 32 == 0]
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(parameters, lr=1.0), quantizer=format, metrics=METRICS, sinks=[], backend=backend
    )
    seen = Touched(((f"group0.param{i}", p) for i, p in enumerate(parameters)), format)
    for step in range(5):
        for p in parameters:
            noise = torch.randn(p.shape, generator=generator)
            p.grad = torch.where(torch.rand(p.shape, generator=generator) < 0.1, noise * 0.1, 0.0).to(dtype)
        seen.before()
        optimizer.step()
        seen.after()
        if step % 2 == 0:
            seen.mark()
            optimizer.tracker.mark_sync()
    return seen, optimizer


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_any_size_and_layout(backend, threads, monkeypatch):
    # Pieces of a weight that are counted one after the other, some of them of odd rows.
    monkeypatch.setattr(batch, "_ELEMENTS_PER_RUN", 70_000)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for format in ("float8_e4m3", "e3m4:row", "mxfp4", "bfloat16"):
            for dtype in (torch.float32, torch.bfloat16) if backend == "auto" else (torch.float32,):
                seen, optimizer = run_odd(backend, format, dtype)
                for layer in optimizer.tracker.record().layers:
                    assert rates_of(layer.total) == seen.rates(layer.name), (format, dtype, layer.name)
                # The bits themselves: they were cleared after the fifth step.
                for layer in optimizer.tracker.layers.values():
                    assert not layer.metrics["touched"].bits.any()
    finally:
        torch.set_num_threads(before)


@needs_numba
def test_the_kernel_sets_the_bits(digits, monkeypatch):
    def fail(self, part, sums):
        raise AssertionError("the kernel was expected to set the bits")

    monkeypatch.setattr(_LayerTouched, "slice", fail)
    for format in ("float8_e4m3", "float8_e4m3:row", "bfloat16", "mxfp4"):
        model = digits_model(width=64)
        optimizer, seen = wrapped(model, format), Touched(model.named_parameters(), format)
        train(optimizer, model, digits, seen, 5, every=2)
        assert [len(batch.members) for batch in optimizer.tracker.batches] == [2]
        for layer in optimizer.tracker.record().layers:
            assert rates_of(layer.window) == seen.rates(layer.name)


def test_memory_is_one_bit_per_weight(digits):
    weight = nn.Parameter(torch.randn(1000, 801))
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD([weight], lr=1.0), quantizer="bfloat16", metrics=METRICS, sinks=[]
    )
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    optimizer.tracker.mark_sync()
    assert weight.numel() / 8 <= optimizer.tracker.memory_usage().metrics <= weight.numel() / 8 + 9


def test_frozen_and_later_layers_start_with_a_baseline(digits):
    model = digits_model(width=64)
    optimizer, seen = wrapped(model), Touched(model.named_parameters(), "float8_e4m3")
    first, second = "0.weight", "2.weight"
    windows: dict[str, list[int]] = {first: [], second: []}

    def steps(is_frozen, counted):
        model[2].weight.requires_grad_(not is_frozen)
        train(optimizer, model, digits, seen, 2)
        for name in counted:
            windows[name].append(int(seen.flags[name].sum()))
        seen.flags = dict.fromkeys(seen.flags)
        optimizer.tracker.mark_sync()

    optimizer.tracker.mark_sync()
    steps(False, [first, second])
    steps(True, [first])
    # It was no part of the last mark, so that this window has no beginning.
    steps(False, [first])
    steps(False, [first, second])
    for layer in optimizer.tracker.record().layers:
        of = windows[layer.name]
        assert layer.window.ratios["touched_fraction"] == (sum(of), layer.weights * len(of))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("form", ["checkpoint", "pickle", "deepcopy"])
def test_a_resumed_run_goes_on_in_its_window(form, backend, digits):
    model = digits_model(width=64)
    optimizer, seen = wrapped(model, backend=backend), Touched(model.named_parameters(), "float8_e4m3")
    train(optimizer, model, digits, seen, 5, every=3)
    if form == "checkpoint":
        state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        model = digits_model(width=64)
        optimizer = wrapped(model, backend=backend)
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    else:
        pair = (model, optimizer)
        model, optimizer = copy.deepcopy(pair) if form == "deepcopy" else pickle.loads(pickle.dumps(pair))
    seen.parameters = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
    train(optimizer, model, digits, seen, 4, every=3, start=5)
    for layer in optimizer.tracker.record().layers:
        assert rates_of(layer.window) == seen.rates(layer.name)
        assert layer.window.ratios["touched_fraction"].denominator == 2 * layer.weights


def constant(found_inf=None):
    """A weight of ones with a gradient of ones, and a function that makes a step."""
    weight = nn.Parameter(torch.ones(8, 8))
    inner = torch.optim.Adam([weight], lr=0.5, fused=True) if found_inf else torch.optim.SGD([weight], lr=1.0)
    optimizer = FlipTrackingOptimizer(inner, quantizer="e3m4:none", metrics=("flips", "sync", "touched"), sinks=[])

    def step(inf=0.0):
        weight.grad = torch.ones_like(weight)
        if found_inf:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(inf)
        optimizer.step()

    return optimizer, step


def test_a_window_of_skipped_steps_is_continued():
    optimizer, step = constant(found_inf=True)
    optimizer.tracker.mark_sync()
    for inf in (0.0, 1.0, 1.0, 1.0):
        step(inf)
        optimizer.tracker.mark_sync()
    assert rates_of(optimizer.tracker.record().model.window) == {
        "touched_fraction": (64, 64),
        "untouched_layers": (0, 1),
    }
    step(1.0)
    step(0.0)
    optimizer.tracker.mark_sync()
    assert rates_of(optimizer.tracker.record().model.window) == {
        "touched_fraction": (64, 64),
        "untouched_layers": (0, 1),
    }


@pytest.mark.parametrize("form", ["checkpoint", "pickle", "deepcopy"])
@pytest.mark.parametrize("first", ["mark", "step"])
def test_a_resumed_run_knows_whether_its_window_has_a_step(form, first):
    expected = {"touched_fraction": (64, 64), "untouched_layers": (0, 1)}
    for has_run in (False, True):
        optimizer, step = constant()
        optimizer.tracker.mark_sync()
        step()
        optimizer.tracker.mark_sync()
        optimizer.tracker.mark_sync()
        assert rates_of(optimizer.tracker.record().model.window) == expected
        if has_run:
            step()
        if form == "checkpoint":
            state = copy.deepcopy(optimizer.state_dict())
            optimizer, step = constant()
            optimizer.load_state_dict(state)
        else:
            optimizer = copy.deepcopy(optimizer) if form == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        if first == "mark":
            optimizer.tracker.mark_sync()
            window = optimizer.tracker.record(may_be_empty=True).model.window
            assert rates_of(window) == (expected if has_run else {})
        (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        optimizer.tracker.mark_sync()
        assert rates_of(optimizer.tracker.record().model.window) == expected


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_run_flag_follows_the_validity_of_steps(device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    skipped, valid = (torch.tensor(value, device=device) for value in (False, True))
    for steps, expected in (
        ([], False),
        ([skipped], False),
        ([skipped, skipped, valid, skipped], True),
        ([None, skipped], True),
        ([skipped, None, skipped], True),
    ):
        flag = RunFlag()
        for step in steps:
            flag.note_step(step)
        assert bool(flag.value) is expected
        flag.clear()
        assert flag.is_known
        assert not flag.value


class DeviceFlag(RunFlag):
    is_known = False


def test_a_mark_does_not_read_a_flag_of_another_device():
    """The sums are multiplied by it, and bits of a window that goes on are kept."""
    weight = Weight(torch.ones(8, 8), torch.zeros(8, 8, dtype=torch.uint8), None, resolve("e3m4:none"))
    touched, sums = _LayerTouched(weight), torch.zeros(2, 2, dtype=torch.float64)
    touched.run_flag = DeviceFlag()
    touched.mark(weight, sums, ScratchPool())
    touched.bits.view(-1)[0] = 7
    for has_run, expected in (
        (False, [[0, 0], [0, 0]]),
        (True, [[3, 64], [0, 1]]),
        (False, [[3, 64], [0, 1]]),
        (True, [[3, 128], [1, 2]]),
    ):
        touched.run_flag.value = torch.tensor(has_run)
        touched.mark(weight, sums, ScratchPool())
        assert sums.tolist() == expected


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_window_of_steps_that_a_device_skipped_is_continued():
    weight = nn.Parameter(torch.ones(8, 8, device="cuda"))
    inner = torch.optim.Adam([weight], lr=0.5, fused=True)
    optimizer = FlipTrackingOptimizer(inner, quantizer="e3m4:none", metrics=METRICS, sinks=[])
    optimizer.tracker.mark_sync()
    for inf in (0.0, 1.0, 1.0, 0.0, 1.0):
        weight.grad = torch.ones_like(weight)
        optimizer.grad_scale, optimizer.found_inf = (torch.tensor(value, device="cuda") for value in (1.0, inf))
        optimizer.step()
        optimizer.tracker.mark_sync()
    assert rates_of(optimizer.tracker.record().model.window) == {
        "touched_fraction": (128, 128),
        "untouched_layers": (0, 2),
    }


def test_a_checkpoint_of_another_layout_goes_on(digits):
    """Bits have the order of contiguous codes, whatever the strides."""
    weight = torch.randn(33, 40)
    optimizers = []
    for make in (lambda w: w.clone(), lambda w: w.t().contiguous().t()):
        parameter = nn.Parameter(make(weight))
        optimizer = FlipTrackingOptimizer(
            torch.optim.SGD([parameter], lr=1.0), quantizer="e3m4:none", metrics=METRICS, sinks=[]
        )
        optimizers.append((parameter, optimizer))
    gradients = [torch.zeros_like(weight) for _ in range(2)]
    gradients[0][:5], gradients[1][3:9, 1:4] = 1.0, 1.0
    optimizers[0][1].tracker.mark_sync()
    for (parameter, optimizer), gradient in zip(optimizers, gradients, strict=True):
        parameter.grad = gradient.clone()
        optimizer.step()
        if optimizer is optimizers[0][1]:
            optimizers[1][0].data.copy_(parameter.data)
            optimizers[1][1].load_state_dict(optimizer.state_dict())
    optimizers[1][1].tracker.mark_sync()
    expected = int(((gradients[0] + gradients[1]) > 0).sum())
    assert optimizers[1][1].tracker.record().model.window.ratios["touched_fraction"] == (expected, weight.numel())


def test_training_is_what_it_was(digits):
    models = [digits_model(width=64) for _ in range(2)]
    bare = torch.optim.AdamW(models[0].parameters(), lr=1e-2)
    inner = torch.optim.AdamW(models[1].parameters(), lr=1e-2)
    handle = track_flips(inner, models[1], quantizer="mxfp4", metrics=METRICS, sync_every=2, log_every=1, sinks=[])
    assert_trained_alike(models, (bare, inner), digits)
    assert handle.tracker.record(may_be_empty=True).model.total.ratios["touched_fraction"].denominator > 0
