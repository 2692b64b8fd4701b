"""What a step asks of torch does not grow with the number of tensors, and nothing in it waits for the device."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from weightflip import FlipTrackingOptimizer
from weightflip.counting import gathered
from weightflip.counting.canary import Canary

FOUND = torch.accelerator.current_accelerator(check_available=True)
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
FORMATS = ["float8_e4m3", "float8_e4m3:row", "float8_e5m2:pow2", "e3m4", "mxfp8_e4m3", "mxfp4", "nvfp4", "int8",
           "int4:g32", "bfloat16"]  # fmt: skip
# What a step starts on a device, kernels and calls of torch.
ON_TRITON = {"float8_e4m3": 12, "float8_e4m3:row": 12, "e3m4": 12, "int8": 12, "bfloat16": 12,
             "mxfp8_e4m3": 9, "nvfp4": 9, "mxfp4:rceil": 9, "int4:g32": 12}  # fmt: skip
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::is_nonzero", "aten::equal",
           "aten::masked_select", "aten::_unique2"}  # fmt: skip
# Plain torch goes weight by weight on the CPU, which here stands in for a device.
DEVICES = ["cpu", *([] if FOUND is None else [FOUND.type])]
SHAPES = [(32, 32)]
# Rows and tensors of several lengths, so that nothing is the same for all.
MIXED = [(32, 32), (3, 352), (64, 96), (7, 5, 64), (1, 4096)]


class Calls(TorchDispatchMode):
    """Counts what torch is asked for, by name; what a kernel is asked for apart, since no dispatcher sees that.

    ``started`` is what of both a device has to run: neither views nor memory. ``moved`` counts copies to a device that
    is named.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.launches = self.started = self.beyond_views = self.moved = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        self.names[name] += 1
        self.beyond_views += name.startswith("aten::") and not func.is_view
        self.moved += name == "aten::_to_copy" and (kwargs or {}).get("device") is not None
        self.started += name.startswith("aten::") and not func.is_view and "empty" not in name
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_wait(device: str):
    """Where CUDA can tell, whatever waits for the device raises."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def asked_in_a_step(backend: str, quantizer: str, tensors: int, monkeypatch, shapes=SHAPES, device="cpu") -> Calls:
    """Of tracking alone, in a step between two logging points."""
    weights = [torch.nn.Parameter(torch.randn(shapes[i % len(shapes)], device=device)) for i in range(tensors)]

    class Still(torch.optim.SGD):
        def step(self, closure=None):
            with _disable_current_modes(), torch.no_grad():
                for weight in weights:
                    weight.add_(0.01)

    optimizer = FlipTrackingOptimizer(
        Still(weights, lr=0.1), quantizer=quantizer, backend=backend, sinks=[], log_every=1000
    )
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    monkeypatch.setattr(Canary, "is_due", staticmethod(lambda steps: False))
    for _ in range(2):
        optimizer.step()
    calls = Calls()
    if backend == "triton":
        from weightflip.kernels import cuda

        start = cuda.Run._start

        def launch(self, *args, **kwargs):
            calls.launches += 1
            calls.started += 1
            with _disable_current_modes():
                start(self, *args, **kwargs)

        monkeypatch.setattr(cuda.Run, "_start", launch)
    with calls, no_wait(device):
        optimizer.step()
    if backend == "eager":
        assert [len(bucket.layers) for bucket in optimizer.tracker.buckets] == [tensors]
    else:
        assert [len(batch.members) for batch in optimizer.tracker.batches] == [tensors]
    assert all(optimizer.tracker.get_flip_counts().values())
    return calls


def bounded(backend: str, quantizer: str, monkeypatch, tensors: int, device="cpu") -> Calls:
    with monkeypatch.context() as patch:
        few = asked_in_a_step(backend, quantizer, 10, patch, device=device)
    with monkeypatch.context() as patch:
        many = asked_in_a_step(backend, quantizer, tensors, patch, device=device)
    for calls in (few, many):
        assert calls.names.total() <= 60, calls.names
        assert calls.launches <= 2
        assert not WAITING & set(calls.names)
    assert few.names == many.names
    return many


@pytest.mark.skipif(IS_INTERPRETED, reason="about plain torch")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shapes", [SHAPES, MIXED], ids=["alike", "mixed"])
@pytest.mark.parametrize("quantizer", [*FORMATS, "mxfp6_e2m3:even", "nvfp4:tensor", "e6m1:row", "binary", "native"])
def test_plain_torch_as_on_a_device(quantizer, shapes, device, monkeypatch):
    monkeypatch.setattr(gathered, "_EXCLUDED_DEVICES", frozenset())
    few = asked_in_a_step("eager", quantizer, 10, monkeypatch, shapes, device)
    many = asked_in_a_step("eager", quantizer, 1000, monkeypatch, shapes, device)
    assert few.beyond_views == many.beyond_views <= 60
    assert not WAITING & set(many.names)
    assert many.moved == 0


@pytest.mark.skipif(IS_INTERPRETED, reason="about the CPU's kernel")
@pytest.mark.parametrize("quantizer", FORMATS)
def test_numba(quantizer, monkeypatch):
    pytest.importorskip("numba")
    bounded("numba", quantizer, monkeypatch, 1000)


@pytest.mark.skipif(not IS_INTERPRETED, reason="the interpreter is chosen before Triton is imported")
@pytest.mark.parametrize("quantizer", ON_TRITON)
def test_triton(quantizer, monkeypatch):
    # The interpreter takes its time for each tile: fewer tensors tell as much.
    assert bounded("triton", quantizer, monkeypatch, 40).started <= ON_TRITON[quantizer]


@pytest.mark.skipif(IS_INTERPRETED or "cuda" not in DEVICES, reason="no GPU")
@pytest.mark.parametrize("quantizer", ON_TRITON)
def test_triton_on_a_gpu(quantizer, monkeypatch):
    pytest.importorskip("triton")
    assert bounded("triton", quantizer, monkeypatch, 1000, "cuda").started <= ON_TRITON[quantizer]


@pytest.mark.skipif(IS_INTERPRETED or importlib.util.find_spec("triton") is None, reason="no Triton, or run already")
def test_triton_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-o", "addopts=", "-q", __file__]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-4000:]
    assert f"{len(ON_TRITON)} passed" in result.stdout
