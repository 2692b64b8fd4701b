"""The Triton kernel equals eager torch bit for bit: on a GPU, or in Triton's interpreter on the CPU.

The interpreter is chosen by the environment before Triton is imported. Without it and without a GPU, one test here runs
this file once more, in a process of its own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings

import pytest
import torch
from kernel_cases import (
    QUANTIZERS,
    assert_batch_equals_one_by_one,
    by_eager,
    each_one_by_one,
    gradient_of,
    hard_numbers,
    stale_codes,
    with_special,
)

pytest.importorskip("triton", reason="Triton is not installed")

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from weightflip import FlipTrackingOptimizer, WeightFlipTracker, kernels
from weightflip.formats import FloatFormat
from weightflip.kernels import backend, cuda, proof
from weightflip.kernels.runs import Kind, OnePass, Stretch
from weightflip.quantizers import resolve
from weightflip.quantizers.block import MX_NAMES, MXQuantizer

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device(cuda.DEVICE)
runs_here = pytest.mark.skipif(
    not IS_INTERPRETED and not torch.cuda.is_available(), reason="no GPU; test_in_the_interpreter runs it"
)
on_a_gpu = pytest.mark.skipif(IS_INTERPRETED or not torch.cuda.is_available(), reason="no GPU")

BLOCKS = [*(MXQuantizer(format, mode) for format in MX_NAMES.values() for mode in ("rceil",)), "nvfp4", "int4:g32",
          "float8_e4m3:1x128"]  # fmt: skip


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        # NumPy, which the interpreter computes with, remarks on infinity times 0 and on NaN.
        warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton|numpy")
        yield


def assert_equals_eager(weight, quantizer, old, update):
    expected_codes, expected_counts, scale = by_eager(weight, quantizer, old, update)
    codes, counts = old.clone(), torch.tensor([5, 6, 7], device=DEVICE)
    assert OnePass(cuda.Run)(weight, quantizer.applied_scale(scale), quantizer.rounding(weight), codes, update, counts)
    assert torch.equal(codes, expected_codes)
    assert counts.tolist() == expected_counts.tolist()


@runs_here
@pytest.mark.parametrize("quantizer", [*QUANTIZERS, "ternary"], ids=str)
def test_every_bfloat16_and_its_neighbors(quantizer, monkeypatch):
    # The interpreter takes as long for a small tile as for a large one.
    monkeypatch.setattr(cuda, "_ELEMENTS_PER_TILE", 1 << 16)
    quantizer, generator = resolve(quantizer), torch.Generator().manual_seed(0)
    finite = hard_numbers()
    for weight in (finite, torch.where(finite.isfinite(), finite, 1.0), finite.clamp(-1e4, 1e4)):
        weight = weight.view(48, -1).to(DEVICE)
        old = stale_codes(weight, quantizer, generator)
        assert_equals_eager(weight, quantizer, old, gradient_of(weight, generator).to(DEVICE))


@runs_here
@pytest.mark.parametrize("quantizer", ["float8_e4m3", "e3m4:row", "e2m1:none", "e2m13"])
def test_dtypes_updates_and_layouts(quantizer):
    quantizer, generator = resolve(quantizer), torch.Generator().manual_seed(1)
    normal = torch.randn(65, 129, generator=generator)
    special = with_special(normal)
    gradient = gradient_of(normal, generator)
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        weight = (special if i else normal).to(DEVICE, dtype)
        old = stale_codes(weight, quantizer, generator)
        updates = (None, gradient, gradient.bfloat16(), gradient.half(), gradient != 0)
        for update in updates if i == 0 else updates[i::2]:
            assert_equals_eager(weight, quantizer, old, None if update is None else update.to(DEVICE))
    if quantizer.name.endswith(":row"):
        return
    for weight in (normal.T, normal.flatten()[:8320].view(4, 8, 20, 13).to(memory_format=torch.channels_last),
                   torch.tensor(3.7), torch.zeros(0, 5), torch.zeros(4, 8)):  # fmt: skip
        weight = weight.to(DEVICE)
        assert_equals_eager(weight, quantizer, stale_codes(weight, quantizer, generator), torch.ones_like(weight))


@runs_here
@pytest.mark.parametrize("numel", [1, 15, 16, 4095, 4096, 4097, 3 * 4096 + 16])
def test_tails(numel):
    generator = torch.Generator().manual_seed(numel)
    memory = torch.randn(numel + 64, generator=generator).to(DEVICE)
    quantizer = resolve("float8_e5m2")
    for first in (0, 1, 4):
        # The codes lie between others, which stay as they are.
        weight, around = memory[first : first + numel], torch.full((numel + 32,), 99, dtype=torch.int8, device=DEVICE)
        codes, counts = around[16:-16], torch.zeros(3, dtype=torch.int64, device=DEVICE)
        expected, expected_counts, scale = by_eager(weight, quantizer, codes, memory[:numel])
        rounding = quantizer.rounding(weight)
        assert OnePass(cuda.Run)(weight, scale, rounding, codes, memory[:numel], counts)
        assert torch.equal(codes, expected)
        assert counts.tolist() == (expected_counts - torch.tensor([5, 6, 7], device=DEVICE)).tolist()
        assert around[:16].eq(99).all()
        assert around[-16:].eq(99).all()


def many_weights(generator):
    """Shapes that fill tiles badly, wide and narrow rows, and numbers that are hard."""
    shapes = [(1,), (), (3, 32), (65, 96), (1, 4096), (2, 4128), (40, 32), (7, 5, 64), (2, 352), (300, 32), (3, 129)]
    plain = [torch.randn(shape, generator=generator) * 10.0 ** (i - 5) for i, shape in enumerate(shapes)]
    special = with_special(torch.randn(64, 64, generator=generator))
    kinds = [special.bfloat16(), torch.randn(33, 32, generator=generator).bfloat16(), special.half()]
    return [*plain, special, torch.zeros(4, 64), torch.full((2, 32), 1e-45), *kinds]


@runs_here
@pytest.mark.parametrize(
    "quantizer", ["float8_e4m3", "float8_e5m2:row:pow2", "e3m4:row", "e0m7", "e2m1:none", *BLOCKS], ids=str
)
def test_many_weights_at_once(quantizer):
    generator, quantizer = torch.Generator().manual_seed(0), resolve(quantizer)
    weights = [weight.to(DEVICE) for weight in many_weights(generator)]
    assert_batch_equals_one_by_one(each_one_by_one(weights, quantizer, generator), quantizer, "triton", cuda.Run)


@runs_here
def test_one_launch_for_weights_whose_tiles_are_alike():
    kind = Kind(torch.float32, None, torch.int8, resolve("float8_e4m3").rounding(torch.ones(1)), DEVICE)
    stretches = [Stretch(4096 * i, 4096 * i, numel, numel) for i, numel in enumerate((64, 4096, 160, 8192 + 16))]
    (launch,) = cuda.Run(stretches, kind)._launches
    assert launch.tiles.tolist() == [0, 1, 2, 3, 3, 3]
    assert (launch.columns, launch.is_aligned) == (4096, True)


@runs_here
@pytest.mark.parametrize(
    "case",
    ["float64 weight", "sliced weight", "other update strides", "float64 update", "odd scale", "float64 scale",
     "wide codes", "subclass", "wide format"],
)  # fmt: skip
def test_what_is_not_covered_is_left_alone(case):
    weight, scale = torch.randn(8, 16, device=DEVICE), torch.tensor(2.0, device=DEVICE)
    update, rounding = torch.ones(8, 16, device=DEVICE), resolve("float8_e4m3").rounding(torch.ones(1))
    if case == "float64 weight":
        weight = weight.double()
    elif case == "sliced weight":
        weight = torch.randn(8, 32, device=DEVICE)[:, ::2]
    elif case == "other update strides":
        update = torch.ones(16, 8, device=DEVICE).T
    elif case == "float64 update":
        update = update.double()
    elif case == "odd scale":
        scale = torch.ones(16, device=DEVICE)
    elif case == "float64 scale":
        scale = scale.double()
    elif case == "subclass":
        weight = weight.as_subclass(type("Subclass", (torch.Tensor,), {}))
    elif case == "wide format":
        rounding = rounding._replace(format=FloatFormat("e9m6", 9, 6, 255))
    codes = torch.zeros(8, 16, dtype=torch.int32 if case == "wide codes" else torch.int8, device=DEVICE)
    counts = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert not OnePass(cuda.Run)(weight, scale, rounding, codes, update, counts)
    assert codes.count_nonzero() == 0
    assert counts.tolist() == [0, 0, 0]


def train(backend, device=DEVICE, **options):
    """A few steps in float32 and bfloat16, with biases, and a weight that has no gradient in some steps."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.Tanh(), torch.nn.Linear(64, 32), torch.nn.Tanh())
    model.append(torch.nn.Linear(32, 16, dtype=torch.bfloat16))
    model.to(device)
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
    records = []
    optimizer = FlipTrackingOptimizer(
        inner, model, include="*", quantizer={"0.*": "float8_e4m3", "2.weight": "mxfp4", "*": "e3m4:row"},
        backend=backend, log_every=5, sinks=[records.append], **options,
    )  # fmt: skip
    x = torch.randn(64, 32).to(device)
    for step in range(5):
        optimizer.zero_grad()
        hidden = model[:2](x) if step % 2 else model[:4](x)
        (model[2:4](hidden) if step % 2 else model[4](hidden.bfloat16())).square().mean().backward()
        optimizer.step()
    optimizer.close()
    return records, [parameter.detach().clone() for parameter in model.parameters()], optimizer.tracker


@runs_here
@pytest.mark.parametrize(
    "options",
    [{}, {"low_memory": True}, {"metrics": ("flips",)}, {"metrics": ("flips", "stalls", "oscillation")}],
    ids=str,
)
def test_training_is_counted_as_by_eager(options):
    expected, parameters, _ = train("eager", **options)
    found, same, tracker = train("triton", **options)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(parameters, same, strict=True))
    if options == {}:
        assert [len(batch.members) for batch in tracker.batches] == [6]


@runs_here
def test_where_it_is_asked_for():
    assert (kernels.run("auto", DEVICE) is cuda.Run) == (DEVICE.type == "cuda")
    assert kernels.run("triton", DEVICE) is cuda.Run
    assert kernels.run("triton", torch.device("meta")) is None


def question(name, dtype=torch.float32, with_updates=True):
    quantizer, weight = resolve(name), torch.ones(4, 32, dtype=dtype, device=DEVICE)
    update = dtype if with_updates else None
    kind = Kind(dtype, update, quantizer.code_dtype(weight), quantizer.rounding(weight), weight.device)
    is_scaled = quantizer.scope != "element"
    return proof.Question(kind, is_scaled, is_scaled)


@runs_here
@pytest.mark.parametrize("name", ["float8_e4m3", "float8_e5m2", "e3m4", "e4m11", "mxfp4", "nvfp4", "int8", "bfloat16"])
def test_it_is_shown_to_count_right(name):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert proof.find_fault(cuda.Run, question(name, dtype)) is None
    assert proof.find_fault(cuda.Run, question(name, with_updates=False)) is None


class Raises(cuda.Run):
    def largest(self):
        raise RuntimeError("no such instruction")


class LosesAFlip(cuda.Run):
    def count_(self, scale, updates):
        found = super().count_(scale, updates)
        found[-1, 0] -= 1
        return found


@runs_here
@pytest.mark.parametrize("fault", ["raises", "loses a flip", "rounds otherwise"])
def test_a_broken_kernel_is_refused_and_training_goes_on(fault, monkeypatch, caplog):
    expected, parameters, _ = train("eager")
    kernel = {"raises": Raises, "loses a flip": LosesAFlip}.get(fault, cuda.Run)
    if fault == "rounds otherwise":
        right = cuda.constants
        monkeypatch.setattr(
            cuda, "constants", lambda rounding: right(rounding)._replace(adder=right(rounding).adder * 2)
        )
    monkeypatch.setattr(proof, "_answers", {})
    monkeypatch.setattr(backend, "_compiled", lambda name: backend._Compiled(kernel, DEVICE.type))
    found, same, tracker = train("triton")
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(parameters, same, strict=True))
    assert tracker.batches == []
    assert "not used, plain torch counts instead: " in caplog.text


@on_a_gpu
@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize(
    "quantizer", ["float8_e4m3", "float8_e4m3:row", "e3m4", "e3m4:row", "mxfp4", "nvfp4", "bfloat16"]
)
def test_nothing_waits_for_the_device_between_records(backend, quantizer):
    weights = [torch.randn(64, 64, device="cuda", requires_grad=True) for _ in range(3)]
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(weights, lr=0.1), quantizer=quantizer, backend=backend, log_every=1000, sinks=[]
    )
    for step in range(4):
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        # The first step opens what is kept.
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(optimizer.tracker.get_flip_counts()) == 3


@pytest.mark.skipif(IS_INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("divides", [False, True])
def test_compiled_for_a_gpu_it_rounds_as_ieee_says(divides):
    # Needs no GPU. What could differ from eager torch is all in the kind of float instructions.
    kernel, numbers = cuda._count, {"stored": tl.int32, "coded": tl.int8, "updated": tl.int32, "rows": 32}
    numbers |= {
        "update_mask": 0x7FFFFFFF,
        "is_scaled": True,
        "has_rows": True,
        "has_scale_codes": True,
        "divides": divides,
        "columns": 128,
        "is_aligned": True,
    }
    pointers = {
        "places": "*i64",
        "tiles": "*i32",
        "scales": "*fp32",
        "updates": "*i64",
        "counts": "*i64",
        "counted": "*i64",
        "new_scales": "*i32",
        "stored_scales": "*u8",
        "scale_changes": "*i64",
    }
    signature = {name: pointers.get(name, "constexpr" if name in numbers else "i32") for name in kernel.arg_names}
    at = kernel.arg_names.index
    source = ASTSource(
        kernel,
        signature,
        constexprs={(at(name),): value for name, value in numbers.items()},
        attrs={(at(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    options = {"num_warps": cuda._WARPS, "enable_fp_fusion": False}
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    floats = set(re.findall(r"\b((?:add|sub|mul|div|fma|mad|rcp|cvt)[.\w]*\.f32)\b", code))
    assert floats == {"add.rn.f32", "div.rn.f32" if divides else "mul.rn.f32"}
    # Four words at a time, where memory is laid out for it.
    assert "ld.global.v4.b32" in code
    assert "st.global.v4.b32" in code


@pytest.mark.skipif(IS_INTERPRETED or torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="backend='triton' is for weights on a GPU, and torch finds none"):
        WeightFlipTracker(backend="triton")


@pytest.mark.skipif(IS_INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-o", "addopts=", __file__]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", result.stdout)[1]) > 60
