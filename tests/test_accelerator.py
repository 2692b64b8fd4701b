"""Everything that depends on the device, on whatever accelerator there is: codes, counts, metrics, optimizers,
checkpoints, gradient scaling, streams and CUDA graphs.

``make gpu`` runs it, or plainly ``PYTHONPATH=src python -m pytest tests/test_accelerator.py``. The device is torch's
current accelerator; ``WEIGHTFLIP_TEST_DEVICE=cpu`` names another one. What is expected comes from plain torch on the
CPU, or from brute force on the device.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import FORMS, BruteForce, assert_same, backward, digits_model, float8_values
from kernel_cases import QUANTIZERS, gradient_of, hard_numbers, stale_codes
from torch import Tensor, nn

from weightflip import FlipTrackingOptimizer, WeightFlipTracker, functional, kernels
from weightflip.counting.layer import TrackedWeight
from weightflip.metrics import metric_names
from weightflip.quantizers import resolve
from weightflip.quantizers.block import MX_NAMES, MXQuantizer


def device_under_test() -> torch.device | None:
    named = os.environ.get("WEIGHTFLIP_TEST_DEVICE")
    if named:
        return torch.device(named)
    return torch.accelerator.current_accelerator(check_available=True)


FOUND = device_under_test()
if FOUND is None:
    pytest.skip("no accelerator; WEIGHTFLIP_TEST_DEVICE=cpu runs it on the CPU", allow_module_level=True)
DEVICE: torch.device = FOUND
CPU = torch.device("cpu")
ON_CUDA = DEVICE.type == "cuda"
on_cuda = pytest.mark.skipif(not ON_CUDA, reason="about CUDA")

KERNEL = {"cuda": "triton", "cpu": "numba"}.get(DEVICE.type)
HAS_KERNEL = KERNEL is not None and importlib.util.find_spec(KERNEL) is not None
BACKENDS = ["eager", "auto", *([KERNEL] if HAS_KERNEL else [])]

BLOCKS = [*(MXQuantizer(f, mode) for f in MX_NAMES.values() for mode in ("floor", "rceil", "ceil", "even")),
          "nvfp4", "nvfp4:tensor", "int4:g32"]  # fmt: skip
SMALLEST = ["ternary", "binary", "native", "e6m1", "float8_e4m3:pow2", "float8_e4m3:row:pow2"]


def divides_by_a_number(quantizer) -> bool:
    """Whether torchao's recipe divides by a Python number, as a GPU does by a product with its inverse."""
    return quantizer.name.startswith(("int", "nvfp4")) or quantizer.name.endswith(":rceil")


def logarithms_decide(quantizer) -> bool:
    """Whether a scale comes from a logarithm, whose last bit is the device's own affair."""
    return quantizer.name.endswith((":pow2", ":rceil"))


# ---------------------------------------------------------------------- codes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantizer", [*QUANTIZERS, *BLOCKS, *SMALLEST], ids=str)
def test_codes_are_those_of_the_cpu(quantizer, dtype):
    """Every bfloat16 and its neighbors, with all ties, subnormal numbers, infinities and NaN."""
    quantizer = resolve(quantizer)
    finite = hard_numbers()
    whole = (finite, torch.where(finite.isfinite(), finite, 1.0), finite.clamp(-1e4, 1e4))
    for weight in whole if dtype is torch.float32 else whole[:2]:
        weight = quantizer.grouped(weight.to(dtype).view(48, -1))
        there = weight.to(DEVICE)
        scale, scale_there = quantizer.scale(weight), quantizer.scale(there)
        if scale is not None:
            assert scale_there is not None
            if quantizer.name == "ternary":
                torch.testing.assert_close(scale_there.cpu(), scale, rtol=1e-5, atol=0, equal_nan=True)
            elif logarithms_decide(quantizer):
                ratio = (scale_there.cpu() / scale).flatten()
                assert torch.equal(scale_there.cpu().isnan(), scale.isnan())
                ratio = ratio[~ratio.isnan()]
                assert ((ratio == 1) | (ratio == 2) | (ratio == 0.5)).all()
                assert (ratio != 1).count_nonzero() <= 0.1 * len(ratio)
            elif divides_by_a_number(quantizer):
                if quantizer.name == "nvfp4:tensor":
                    scale, found_scale = torch.view_as_real(scale), torch.view_as_real(scale_there).cpu()
                else:
                    found_scale = scale_there.cpu()
                # An E4M3 of another rounding is up to an eighth away; most are not.
                is_close = torch.isclose(found_scale, scale, rtol=0.15, atol=0, equal_nan=True)
                is_near = torch.isclose(found_scale, scale, rtol=1e-6, atol=0, equal_nan=True)
                assert is_close.all()
                assert is_near.double().mean() > 0.9
            else:
                assert same_bits(scale_there.cpu(), scale)
            scale = scale_there.cpu()
        codes = torch.empty(weight.shape, dtype=quantizer.code_dtype(weight))
        quantizer.encode_into(weight, scale, codes, kernels.ScratchPool())
        found = torch.empty(weight.shape, dtype=codes.dtype, device=DEVICE)
        quantizer.encode_into(there, scale_there, found, kernels.ScratchPool())
        assert torch.equal(found.cpu(), codes)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantizer", [*QUANTIZERS, *BLOCKS, *SMALLEST], ids=str)
def test_counts_are_those_of_the_obvious_version(quantizer, backend):
    quantizer, generator = resolve(quantizer), torch.Generator().manual_seed(0)
    numbers = hard_numbers().view(96, -1)
    for dtype in (torch.float32, torch.bfloat16):
        weight = numbers.to(dtype)
        update = gradient_of(weight, generator).to(dtype)
        old = stale_codes(weight, quantizer, generator).to(DEVICE)
        there, update = weight.to(DEVICE), update.to(DEVICE)
        new = quantizer.encode(there).ordinals
        codes, counts = old.clone(), torch.zeros(3, dtype=torch.int64, device=DEVICE)
        encoding = functional.Encoding(quantizer, kernels.ScratchPool(), backend)
        functional.advance(there, encoding, codes, update, counts)
        assert torch.equal(codes, new)
        flipped, updated = old != new, update != 0
        assert counts.tolist() == [int(x.sum()) for x in (flipped, updated, updated & ~flipped)]


# ---------------------------------------------------------------------- counts of a training


@functools.cache
def lifetime() -> list[list[tuple[Tensor, Tensor | None]]]:
    """Weights and gradients of each step, made on the CPU, so that every device sees the same numbers."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1,), (3, 32), (65, 96), (2, 4128), (7, 5, 64), (300, 32), (257, 160), (16, 1024)]
    weights = [torch.randn(shape, generator=generator) * 10.0 ** (i - 4) for i, shape in enumerate(shapes)]
    weights += [torch.zeros(4, 64), torch.randn(64, 64, generator=generator).bfloat16()]
    weights[2][0, :6] = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45])
    steps = []
    for step in range(6):
        now = []
        for i, weight in enumerate(weights):
            grad = None if (step + i) % 4 == 3 else gradient_of(weight, generator).to(weight.dtype)
            now.append((weight, grad))
            weights[i] = weight * (1 + 0.05 * torch.randn(weight.shape, generator=generator)).to(weight.dtype)
        steps.append(now)
    return steps


def live(device: torch.device, backend: str, quantizer, shapes_fit: Callable[[Tensor], bool], **options: Any):
    """The records of the lifetime, and the codes that are left."""
    tracker = WeightFlipTracker(backend=backend, **options)
    steps = [[(w, g) for w, g in step if shapes_fit(w)] for step in lifetime()]
    quantizer = resolve(quantizer)
    tracked = [
        TrackedWeight(f"w{i}", nn.Parameter(weight.to(device, copy=True)), quantizer)
        for i, (weight, _) in enumerate(steps[0])
    ]
    records = []
    for now, following in itertools.pairwise(steps):
        for weight, (_, grad) in zip(tracked, now, strict=True):
            weight.parameter.grad = None if grad is None else grad.to(device)
        tracker.before_step(tracked)
        with torch.no_grad():
            for weight, (new, _) in zip(tracked, following, strict=True):
                weight.parameter.copy_(new)
        tracker.after_step()
        if len(records) == 0 or now is steps[-2]:
            records.append(tracker.record())
    return records, {name: layer.codes.cpu() for name, layer in tracker.layers.items() if layer.codes is not None}


def fits(quantizer) -> Callable[[Tensor], bool]:
    group = resolve(quantizer).group
    return lambda weight: group is None or weight.shape[-1] % group == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "quantizer",
    ["float8_e4m3", "float8_e4m3:row", "float8_e5m2", "e3m4", "e2m5:row", "e4m11", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4",
     "nvfp4", "nvfp4:tensor", "int8", "int4:g32", "binary", "bfloat16", "native"],
)  # fmt: skip
def test_a_lifetime_of_many_weights_is_counted_as_on_the_cpu(quantizer, backend):
    expected, expected_codes = live(CPU, "eager", quantizer, fits(quantizer))
    found, codes = live(DEVICE, backend, quantizer, fits(quantizer))
    if divides_by_a_number(resolve(quantizer)):
        # Scales may be the device's own; what is counted under them is not.
        near = live(DEVICE, "eager", quantizer, fits(quantizer))
        for theirs, ours in zip(expected, near[0], strict=True):
            assert ours.model.window.flips == pytest.approx(theirs.model.window.flips, rel=0.02)
            assert ours.model.window.updates == theirs.model.window.updates
        expected, expected_codes = near
    assert found == expected
    assert_same(codes, expected_codes)
    assert expected[1].model.window.updates > 100
    # No weight of the lifetime changes its sign.
    assert expected[1].model.window.flips > 100 or quantizer == "binary"
    assert expected[1].model.window.stalled > 100 or quantizer in ("native", "e4m11")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"low_memory": True}, {"fresh_snapshots": True}, {"metrics": ("flips",)}], ids=str)
def test_options(options, backend):
    for quantizer in ("float8_e4m3", "mxfp4"):
        expected, _ = live(CPU, "eager", quantizer, fits(quantizer), **options)
        found, _ = live(DEVICE, backend, quantizer, fits(quantizer), **options)
        assert found == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantizer", ["float8_e4m3", "e3m4:row", "int8", "mxfp4", "nvfp4"])
def test_metric_groups(quantizer, backend):
    options = {"metrics": ("flips", "stalls", *metric_names())}
    # Without the weight that holds NaN: sums of floats of it say nothing.
    shapes_fit = fits(quantizer)

    def fit(weight: Tensor) -> bool:
        return shapes_fit(weight) and bool(weight.isfinite().all())

    expected, _ = live(CPU, "eager", quantizer, fit, **options)
    found, _ = live(DEVICE, backend, quantizer, fit, **options)
    if divides_by_a_number(resolve(quantizer)):
        expected, _ = live(DEVICE, "eager", quantizer, fit, **options)
    for theirs, ours in zip(expected, found, strict=True):
        for a, b in zip(theirs.layers, ours.layers, strict=True):
            for x, y in ((a.window, b.window), (a.total, b.total)):
                assert (x.flips, x.updates, x.stalled, x.scale_changes) == (
                    y.flips,
                    y.updates,
                    y.stalled,
                    y.scale_changes,
                )
                assert x.ratios.keys() == y.ratios.keys()
                for name in x.ratios:
                    # Sums of float32, whose order is the device's own affair.
                    assert x.ratios[name] == pytest.approx(y.ratios[name], rel=1e-3, abs=1e-6, nan_ok=True), name
            assert a.values.keys() == b.values.keys()


# ---------------------------------------------------------------------- optimizers


def optimizers() -> Iterator[Any]:
    """Each optimizer of torch, in each of its implementations that this device has."""
    for name in torch.optim.__all__:
        cls = getattr(torch.optim, name)
        if not isinstance(cls, type) or name in ("Optimizer", "SparseAdam", "LBFGS"):
            continue
        parameters = inspect.signature(cls).parameters
        base = {"lr": 1e-2}
        implementations = [{}, *({flag: True} for flag in ("foreach", "fused", "capturable") if flag in parameters)]
        for options in implementations:
            if options.get("capturable") and DEVICE.type == "cpu":
                continue
            yield pytest.param(cls, {**base, **options}, id=f"{name} {'-'.join(options) or 'plain'}")


def has_fused(cls) -> bool:
    weight = torch.ones(2, 2, device=DEVICE, requires_grad=True)
    weight.grad = torch.ones_like(weight)
    try:
        cls([weight], lr=1e-2, fused=True).step()
    except (RuntimeError, NotImplementedError):
        return False
    return True


def model_of(cls) -> nn.Sequential:
    torch.manual_seed(0)
    bias = cls is not torch.optim.Muon
    return nn.Sequential(nn.Linear(64, 48, bias=bias), nn.ReLU(), nn.Linear(48, 10, bias=bias)).to(DEVICE)


@pytest.fixture(scope="module")
def data(digits) -> tuple[Tensor, Tensor]:
    return digits[0].to(DEVICE), digits[1].to(DEVICE)


@pytest.mark.parametrize(("cls", "kwargs"), list(optimizers()))
@pytest.mark.parametrize("form", FORMS)
def test_training_is_that_of_the_bare_optimizer_and_counts_are_brute_force(cls, kwargs, form, data):
    if kwargs.get("fused") and not has_fused(cls):
        pytest.skip(f"torch has no fused {cls.__name__} for this device")
    results = []
    for is_tracked in (False, True):
        model = model_of(cls)
        inner = cls(model.parameters(), **kwargs)
        optimizer, tracker = FORMS[form](inner, model) if is_tracked else (inner, None)
        brute = BruteForce(model)
        for step in range(5):
            backward(model, data, step)
            brute.before()
            optimizer.step()
            brute.after()
        results.append((dict(model.state_dict()), inner.state_dict()["state"]))
        if tracker is not None:
            brute.check(tracker)
            assert sum(brute.flips.values()) > 0
    assert_same(*results)


@pytest.mark.parametrize("backend", BACKENDS)
def test_random_numbers_are_not_touched(data, backend):
    model = digits_model().to(DEVICE)
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters()), model, sinks=[], backend=backend,
        metrics=("flips", "stalls", *metric_names()),
    )  # fmt: skip

    def states() -> list[Tensor]:
        return [torch.get_rng_state(), *([torch.cuda.get_rng_state(DEVICE)] if ON_CUDA else [])]

    for step in range(3):
        backward(model, data, step)
        before = states()
        optimizer.step()
        optimizer.tracker.record()
        assert_same(states(), before)


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize(("saved_on", "resumed_on"), [(DEVICE, DEVICE), (CPU, DEVICE), (DEVICE, CPU)], ids=str)
def test_checkpoints_move_between_devices(saved_on, resumed_on, digits, tmp_path):
    def make(device: torch.device, seed: int = 0):
        model = digits_model(seed).to(device)
        options = {"metrics": ("flips", "stalls", "oscillation", "coverage"), "sinks": []}
        return model, FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=2e-3), model, **options)

    def train(model, optimizer, device, steps) -> BruteForce:
        there = digits[0].to(device), digits[1].to(device)
        brute = BruteForce(model)
        for step in steps:
            backward(model, there, step)
            brute.before()
            optimizer.step()
            brute.after()
        return brute

    model, optimizer = make(saved_on)
    first = train(model, optimizer, saved_on, range(7))
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "state.pt")

    model, optimizer = make(resumed_on, seed=1)
    weights, state = torch.load(tmp_path / "state.pt", weights_only=True, map_location=resumed_on)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert optimizer.tracker.get_flip_counts() == first.flips
    second = train(model, optimizer, resumed_on, range(7, 12))
    for name in first.flips:
        assert optimizer.tracker.get_flip_counts()[name] == first.flips[name] + second.flips[name]
        assert optimizer.tracker.get_stall_counts()[name] == first.stalled[name] + second.stalled[name]
    assert optimizer.tracker.step_count == 12


def test_a_model_that_moves_to_the_device_starts_with_a_baseline(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    backward(model, digits, 0)
    optimizer.step()
    counted = optimizer.tracker.get_flip_counts()
    model.to(DEVICE)
    there = digits[0].to(DEVICE), digits[1].to(DEVICE)
    brute = BruteForce(model)
    for step in (1, 2):
        backward(model, there, step)
        brute.before()
        optimizer.step()
        brute.after()
    assert optimizer.tracker.get_flip_counts() == {name: counted[name] + brute.flips[name] for name in counted}


# ---------------------------------------------------------------------- what a device does beside


@pytest.mark.parametrize("fused", [False, True])
def test_steps_that_a_gradient_scaler_skips_are_none(fused, data):
    """Without autocast, so that the CPU has what it needs too; the fused optimizer does not tell the host."""
    model = digits_model().to(DEVICE)
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), fused=fused), model, sinks=[])
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=1024.0)
    brute = BruteForce(model)
    taken = 0
    for step in range(8):
        optimizer.zero_grad()
        at = torch.arange(step * 32, (step + 1) * 32, device=DEVICE)
        loss = nn.functional.cross_entropy(model(data[0][at]), data[1][at])
        scaler.scale(loss * (float("inf") if step % 3 == 1 else 1.0)).backward()
        brute.before()
        before = model[0].weight.detach().clone()
        scaler.step(optimizer)
        scaler.update()
        if not torch.equal(before, model[0].weight):
            taken += 1
            brute.after()
    assert taken == 5
    assert optimizer.tracker.step_count == 5
    assert optimizer.tracker.get_flip_counts() == brute.flips


@on_cuda
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantizer", ["float8_e4m3", "float8_e4m3:row", "e3m4", "int8", "mxfp4", "nvfp4", "bfloat16"])
def test_nothing_waits_for_the_device_between_records(backend, quantizer):
    weights = [torch.randn(64, 64, device=DEVICE, requires_grad=True) for _ in range(3)]
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(weights, lr=0.1), quantizer=quantizer, backend=backend, log_every=1000, sinks=[]
    )
    for step in range(4):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        # The first step opens what is kept, and "auto" then tries what it may take.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(optimizer.tracker.get_flip_counts()) == 3
    assert all(optimizer.tracker.get_flip_counts().values())


@on_cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_steps_on_another_stream(backend, data):
    model = digits_model().to(DEVICE)
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, sinks=[], backend=backend)
    brute, stream = BruteForce(model), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(6):
            backward(model, data, step)
            brute.before()
            # Work that keeps the stream busy, so that a kernel on another one would be early.
            torch.randn(2048, 2048, device=DEVICE).matmul(torch.randn(2048, 2048, device=DEVICE))
            optimizer.step()
            brute.after()
    torch.cuda.current_stream().wait_stream(stream)
    brute.check(optimizer.tracker)


@on_cuda
@pytest.mark.skipif(ON_CUDA and torch.cuda.device_count() < 2, reason="one GPU only")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_on_two_devices(backend, data):
    model = digits_model()
    model[0].to("cuda:0")
    model[2].to("cuda:1")
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters()), model, sinks=[], backend=backend)
    brute = BruteForce(model)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        brute.before()
        optimizer.step()
        brute.after()
    brute.check(optimizer.tracker)


@on_cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_more_than_two_to_the_31_weights(backend):
    numel = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 9 * numel:
        pytest.skip("less than 20 GB of free memory on the device")
    weight = nn.Parameter(torch.ones(numel // 4096, 4096, dtype=torch.bfloat16, device=DEVICE))
    weight.grad = torch.zeros_like(weight)
    # Below the largest number, so that no scale moves: three updates, of which one is too small for bfloat16.
    weight.grad[-1, -3:] = torch.tensor([0.5, 0.25, 1e-4])
    weight.grad[0, 0] = 0.5
    for quantizer in ("e3m4", "bfloat16"):
        with torch.no_grad():
            weight.fill_(1)
        optimizer = FlipTrackingOptimizer(
            torch.optim.SGD([weight], lr=1.0), quantizer=quantizer, sinks=[], backend=backend
        )
        optimizer.step()
        window = optimizer.tracker.record().layers[0].window
        assert (window.flips, window.updates, window.stalled) == (3, 4, 1)
        optimizer.close()


# ---------------------------------------------------------------------- CUDA graphs


@on_cuda
def test_a_captured_step_is_left_alone(data):
    results = []
    for is_tracked in (False, True):
        model = digits_model().to(DEVICE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
        if is_tracked:
            optimizer = FlipTrackingOptimizer(optimizer, model, sinks=[])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(3):
                backward(model, data, step)
                optimizer.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(record=True) as caught, torch.cuda.graph(graph):
            warnings.simplefilter("always")
            optimizer.step()
        for _ in range(3):
            graph.replay()
        assert sum("captured in a CUDA graph" in str(warning.message) for warning in caught) == is_tracked
        results.append([p.detach().clone() for p in model.parameters()])
    assert_same(*results)
    assert optimizer.tracker.step_count == 3


@on_cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_step_may_be_a_captured_one(backend, data):
    """Then nothing is tried or compiled in it, and a step outside is counted."""
    model = digits_model().to(DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = FlipTrackingOptimizer(optimizer, model, sinks=[], backend=backend)
    backward(model, data, 0)
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.zeros(1, device=DEVICE)
    with warnings.catch_warnings(), torch.cuda.graph(graph, stream=stream):
        warnings.simplefilter("ignore")
        optimizer.step()
    graph.replay()
    brute = BruteForce(model)
    for step in (1, 2):
        backward(model, data, step)
        brute.before()
        optimizer.step()
        brute.after()
    brute.check(optimizer.tracker)


@on_cuda
@pytest.mark.parametrize("backend", BACKENDS)
def test_forward_and_backward_in_a_graph_and_the_step_outside(backend, data):
    model = digits_model().to(DEVICE)
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, sinks=[], backend=backend)
    images, labels = data[0][:64].clone(), data[1][:64].clone()

    def compute() -> None:
        nn.functional.cross_entropy(model(images), labels).backward()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            model.zero_grad(set_to_none=True)
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    model.zero_grad(set_to_none=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        compute()
    brute = BruteForce(model)
    for step in range(5):
        images.copy_(data[0][step * 64 : (step + 1) * 64])
        labels.copy_(data[1][step * 64 : (step + 1) * 64])
        for parameter in model.parameters():
            parameter.grad.zero_()
        graph.replay()
        brute.before()
        optimizer.step()
        brute.after()
    brute.check(optimizer.tracker)


# ---------------------------------------------------------------------- torchao and mixed precision


def test_torchaos_float8_linear():
    float8 = pytest.importorskip("torchao.float8", reason="torchao is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).to(DEVICE)
    float8.convert_to_float8_training(model, config=float8.Float8LinearConfig(emulate=True))
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-2), model, sinks=[])
    brute = BruteForce(model)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 64, generator=generator).to(DEVICE)).square().mean().backward()
        brute.before()
        optimizer.step()
        brute.after()
    brute.check(optimizer.tracker)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_autocast(backend, data):
    model = digits_model().to(DEVICE)
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3), model, quantizer="float8_e4m3", sinks=[], backend=backend
    )
    brute = BruteForce(model, float8_values)
    for step in range(4):
        optimizer.zero_grad()
        at = torch.arange(step * 64, (step + 1) * 64, device=DEVICE)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(data[0][at]).float(), data[1][at])
        loss.backward()
        brute.before()
        optimizer.step()
        brute.after()
    brute.check(optimizer.tracker)
