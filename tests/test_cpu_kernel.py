"""The compiled CPU kernel equals eager torch bit for bit, or leaves everything as it was."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import time
import warnings

import numba
import pytest
import torch
from conftest import case
from kernel_cases import QUANTIZERS, by_eager, gradient_of, hard_numbers, stale_codes, with_special
from processes import run_python

from weightflip import WeightFlipTracker, functional, kernels
from weightflip.formats import FloatFormat
from weightflip.kernels import compiled, cpu, items, reference, vectors
from weightflip.kernels.runs import OnePass
from weightflip.quantizers import resolve
from weightflip.quantizers.floatx import FloatxQuantizer


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(65, 129, generator=generator)
    special = with_special(normal)
    return {
        "normal": normal,
        "special": special,
        "tiny": normal * 1e-38,
        "zero": torch.zeros(4, 8),
        "transposed": normal.T,
        "channels_last": normal.flatten()[:8320].view(4, 8, 20, 13).to(memory_format=torch.channels_last),
        "0-dim": torch.tensor(3.7),
        "empty": torch.zeros(0, 5),
        "bfloat16": normal.bfloat16(),
        "special bfloat16": special.bfloat16(),
        "all": hard_numbers().view(3, -1),
    }


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, "ternary", "native"], ids=str)
def test_equals_eager(quantizer, monkeypatch):
    monkeypatch.setattr(cpu, "_ELEMENTS_PER_ITEM", 100)
    quantizer = resolve(quantizer)
    for name, weight in weights().items():
        generator = torch.Generator().manual_seed(1)
        old, gradient = stale_codes(weight, quantizer, generator), gradient_of(weight, generator)
        scale, rounding = quantizer.applied_scale(quantizer.scale(weight)), quantizer.rounding(weight)
        by_row = scale is not None and scale.numel() > 1
        for update in (None, gradient, gradient.bfloat16(), gradient.half(), gradient != 0):
            expected_codes, expected_counts, _ = by_eager(weight, quantizer, old, update)
            # With several threads only some: where the machine is busy they wait for each other.
            for threads in (1, 2, 3) if update is gradient and name in ("special", "all") else (1,):
                monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
                with case(name, None if update is None else update.dtype, threads, "threads"):
                    codes, counts = old.clone(), torch.tensor([5, 6, 7])
                    done = OnePass(cpu.Run)(weight, scale, rounding, codes, update, counts)
                    assert done == (not by_row or weight.is_contiguous())
                    if done:
                        assert torch.equal(codes, expected_codes)
                        assert counts.tolist() == expected_counts.tolist()


@pytest.mark.parametrize("flushes", [False, True])
def test_equals_eager_under_any_scale(flushes):
    """All numbers that are hard, also where the processor takes subnormal ones for 0."""
    if flushes and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot do so")
    try:
        for quantizer in map(resolve, [*QUANTIZERS, "mxfp6_e2m3", "mxfp4", "ternary", "native"]):
            for dtype in (torch.float32, torch.bfloat16):
                # Of an odd length, so that some stand alone at the end.
                weight = hard_numbers()[:-1].to(dtype)
                update = torch.where(torch.arange(weight.numel()) % 3 == 0, 0.0, 1.0).to(dtype)
                for number in (None,) if quantizer.scope == "element" else (0.37, 2.0**-20, 2.0**20):
                    scale = None if number is None else quantizer.applied_scale(torch.tensor(number))
                    wanted = torch.empty(weight.shape, dtype=quantizer.code_dtype(weight))
                    under = None if number is None else torch.tensor(number)
                    quantizer.encode_under(weight, under, wanted, kernels.ScratchPool())
                    old = torch.where(torch.arange(weight.numel()) % 5 == 0, wanted ^ 1, wanted)
                    codes, counts = old.clone(), torch.zeros(3, dtype=torch.int64)
                    with case(quantizer.name, dtype, number):
                        rounding = quantizer.rounding(weight)
                        assert OnePass(cpu.Run)(weight, scale, rounding, codes, update, counts)
                        assert torch.equal(codes, wanted)
                        assert torch.equal(counts, reference.count(old, wanted, update))
    finally:
        torch.set_flush_denormal(False)


def test_an_update_of_any_size_counts():
    """The smallest subnormal gradient is not 0, also where the processor takes it for that."""
    quantizer, weight = resolve("e2m1:none"), torch.ones(3, 35)
    found = []
    for flushes in (False, True):
        torch.set_flush_denormal(flushes)
        try:
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                bits = torch.zeros(3, 35, dtype={4: torch.int32, 2: torch.int16}[dtype.itemsize])
                bits[1], bits[2] = 1, torch.iinfo(bits.dtype).min
                codes, counts = torch.zeros(3, 35, dtype=torch.int8), torch.zeros(3, dtype=torch.int64)
                assert OnePass(cpu.Run)(weight, None, quantizer.rounding(weight), codes, bits.view(dtype), counts)
                found.append(counts.tolist())
        finally:
            torch.set_flush_denormal(False)
    assert found == [[105, 35, 0]] * 6


def test_counts_beyond_a_chunk():
    weight = torch.ones(3, 100_001)
    codes, counts = torch.zeros(3, 100_001, dtype=torch.int8), torch.zeros(3, dtype=torch.int64)
    quantizer = resolve("e2m1:row")
    assert OnePass(cpu.Run)(
        weight, quantizer.scale(weight), quantizer.rounding(weight), codes, torch.ones_like(weight), counts
    )
    assert counts.tolist() == [300_003, 300_003, 0]
    assert codes.unique().tolist() == [7]


@pytest.mark.parametrize(
    "case",
    ["float64 weight", "float16 weight", "sliced weight", "other update strides", "float64 update", "odd scale",
     "float64 scale", "wide codes", "subclass"],
)  # fmt: skip
def test_what_is_not_covered_is_left_alone(case):
    weight, scale, rounding = torch.randn(8, 16), torch.tensor(2.0), resolve("float8_e4m3").rounding(torch.ones(1))
    update = torch.ones(8, 16)
    if case == "float64 weight":
        weight = weight.double()
    elif case == "float16 weight":
        weight = weight.half()
    elif case == "sliced weight":
        weight = torch.randn(8, 32)[:, ::2]
    elif case == "other update strides":
        update = torch.ones(16, 8).T
    elif case == "float64 update":
        update = update.double()
    elif case == "odd scale":
        scale = torch.ones(16)
    elif case == "float64 scale":
        scale = scale.double()
    elif case == "subclass":
        weight = weight.as_subclass(type("Subclass", (torch.Tensor,), {}))
    codes = torch.zeros(8, 16, dtype=torch.int32 if case == "wide codes" else torch.int8)
    counts = torch.zeros(3, dtype=torch.int64)
    assert not OnePass(cpu.Run)(weight, scale, rounding, codes, update, counts)
    assert codes.count_nonzero() == 0
    assert counts.tolist() == [0, 0, 0]


@pytest.mark.parametrize("quantizer", ["native", "bfloat16", "e6m1", "e3m4"])
def test_every_weight_dtype_goes_through_the_tracker(quantizer):
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        weight = torch.randn(9, 7, generator=torch.Generator().manual_seed(2)).to(dtype)
        found = []
        for backend in ("eager", "numba"):
            resolved = resolve(quantizer)
            codes = torch.empty(9, 7, dtype=resolved.code_dtype(weight))
            functional.encode_into(weight, functional.Encoding(resolved, kernels.ScratchPool(), backend), codes)
            found.append(codes)
        assert torch.equal(*found)


WITHOUT_NUMBA = """
import gc, os, sys, weakref
{how}
import torch, weightflip
from weightflip.quantizers import resolve
from weightflip.quantizers.floatx import FloatxQuantizer
from weightflip.counting.layer import TrackedWeight

def train():
    weight = torch.ones(4, 4)
    tracker = weightflip.WeightFlipTracker()
    tracker.before_step([TrackedWeight("w", weight, resolve("e3m4:none"))])
    weight[0] = 5.0
    tracker.after_step()
    print(tracker.get_flip_counts())
    return weakref.ref(weight)

weight = train()
gc.collect()
print(weight() is None)
try:
    weightflip.WeightFlipTracker(backend="numba")
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "how",
    [
        'sys.modules["numba"] = None',
        'sys.modules["llvmlite"] = None',
        'os.environ["NUMBA_DISABLE_JIT"] = "1"',
        "import importlib.abc, importlib.machinery\n"
        "class Broken(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'numba': raise OSError('cannot load libllvmlite')\n"
        "sys.meta_path.insert(0, Broken())",
    ],
    ids=["no numba", "no llvmlite", "NUMBA_DISABLE_JIT", "a library that cannot be loaded"],
)
def test_without_numba_auto_is_eager_and_numba_says_what_to_do(how):
    code = WITHOUT_NUMBA.format(how=how)
    result = run_python("-c", code)
    counts, is_freed, message = result.stdout.splitlines()[:3]
    assert counts == "{'w': 4}"
    # A kept exception would hold its traceback, and that the frames of everything that called for this step.
    assert is_freed == "True"
    assert "pip install 'weightflip[numba]'" in message


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"one of \('auto', 'eager', 'numba', 'triton'\), got 'cuda'"):
        WeightFlipTracker(backend="cuda")


def fresh_count():
    """Count once with the kernel; the warnings."""
    weight, quantizer = torch.randn(5, 5), resolve("float8_e4m3")
    codes, counts = torch.zeros(5, 5, dtype=torch.int8), torch.zeros(3, dtype=torch.int64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        functional.advance(weight, functional.Encoding(quantizer, kernels.ScratchPool()), codes, None, counts)
    assert counts.tolist() == [25, 0, 0]
    return [str(warning.message) for warning in caught]


def test_without_a_place_for_the_cache_it_compiles_all_the_same(monkeypatch):
    # Numba finds no place for a function that is in no file.
    scope = dict(vars(items))
    exec(inspect.getsource(items.count), scope)
    with pytest.raises(RuntimeError, match="no locator"):
        numba.njit(cache=True)(scope["count"])
    monkeypatch.setattr(items, "count", scope["count"])
    monkeypatch.setattr(compiled, "_loops", {})
    assert fresh_count() == []
    assert all(loop is not None for loop in compiled._loops.values())


def test_a_numba_that_cannot_compile_is_warned_about_once(monkeypatch):
    def broken(task):
        return task.nothing

    monkeypatch.setattr(items, "count", broken)
    monkeypatch.setattr(compiled, "_loops", {})
    (message,) = fresh_count()
    assert message.startswith("weightflip: Numba cannot compile, counting continues without it: TypingError: ")
    assert fresh_count() == []


TWO_KINDS = """
import torch
from weightflip import functional, kernels
from weightflip.kernels import compiled
from weightflip.quantizers import resolve
weight, counts = torch.ones(4, 4), torch.zeros(3, dtype=torch.int64)
for update in (None, weight):
    codes = torch.zeros(4, 4, dtype=torch.int8)
    encoding = functional.Encoding(resolve("float8_e4m3"), kernels.ScratchPool(), "numba")
    functional.advance(weight, encoding, codes, update, counts)
assert counts.tolist() == [32, 16, 0]
from_cache = {name: loop.is_from_cache for name, loop in compiled._loops.items()}
print(len(from_cache), set(from_cache.values()))
"""


def test_each_loop_has_a_cache_file_of_its_own(tmp_path, monkeypatch):
    # One index for several of them is mixed up by processes that start together.
    def from_cache():
        monkeypatch.setattr(compiled, "_loops", {})
        namespace = {}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            exec(TWO_KINDS, namespace)
        return namespace["from_cache"]

    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    found = from_cache()
    lanes = [(items.count_lanes, 32, update, 8, vectors.MULTIPLIED, True) for update in (0, 32)]
    assert {(items.count,), *lanes} <= found.keys()
    assert not any(found.values())
    indices = sorted(tmp_path.rglob("*.nbi"))
    assert len(indices) == len(list(tmp_path.rglob("*.nbc"))) == len(found)
    files = {file: file.read_bytes() for file in tmp_path.rglob("*.nb?")}
    other = run_python("-c", TWO_KINDS, env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)})
    assert other.stdout == f"{len(found)} {{True}}\n"
    assert {file: file.read_bytes() for file in tmp_path.rglob("*.nb?")} == files
    # What cannot be read is compiled anew.
    for file in indices:
        file.write_bytes(file.read_bytes()[:20])
    assert not any(from_cache().values())


def test_processes_that_start_together_do_not_spoil_the_cache(tmp_path):
    env = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    together = [
        subprocess.Popen([sys.executable, "-c", TWO_KINDS], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    for process in together:
        process.communicate(timeout=300)
    assert [process.returncode for process in together] == [0, 0]
    later = run_python("-c", TWO_KINDS, env=env)
    assert later.stdout.endswith(" {True}\n")


def test_the_log_says_what_takes_time(monkeypatch, caplog):
    def slow(task):
        time.sleep(0.2)
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compiled, "_PATIENCE", 0.01)
    monkeypatch.setattr(compiled, "_loops", {})
    monkeypatch.setattr(compiled, "_compiled", lambda *args: slow(args))
    compiled._log_compilation.cache_clear()
    # A warning: without a configured logger, users do not see other lines.
    with caplog.at_level("WARNING", logger="weightflip"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert compiled.count_loop() is None
        assert compiled.largest_loop() is None
    assert [record.getMessage() for record in caplog.records] == [
        "weightflip: Numba compiles the counting loops for the CPU, which takes some seconds, and caches them on disk"
    ]


def test_a_subclass_with_its_own_encode_into_is_asked():
    class Zero(FloatxQuantizer):
        def encode_into(self, weight, scale, out, scratch):
            out.zero_()

    weight = torch.randn(5, 5)
    found = torch.ones(5, 5, dtype=torch.int8)
    functional.encode_into(
        weight, functional.Encoding(Zero(FloatFormat("e3m4", 3, 4, 3)), kernels.ScratchPool()), found
    )
    assert found.count_nonzero() == 0
