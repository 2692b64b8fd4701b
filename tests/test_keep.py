"""The compiled comparison of codes with those at the last sync equals the reference."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from conftest import case

from weightflip import kernels
from weightflip.kernels import proof, reference

# Around a vector, an item, and several items.
LENGTHS = [0, 1, 15, 16, 63, 64, 65, 1000, (1 << 16) - 1, 1 << 16, (1 << 16) + 1, 3 * (1 << 16) + 77]
DTYPES = (torch.int8, torch.int16, torch.int32)

needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs Numba")


@pytest.fixture(params=[1, 2, 3], ids=lambda n: f"{n} threads")
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def codes_of(numel, dtype, seed):
    of = torch.iinfo(dtype)
    codes = torch.randint(of.min, of.max, (numel,), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    codes[::7], codes[3::7] = of.min, of.max
    return codes


@needs_numba
def test_the_compiled_loop_equals_the_reference(threads):
    from weightflip.kernels.cpu import Run

    for dtype in DTYPES:
        for numel in LENGTHS:
            old, other = codes_of(numel, dtype, 1), codes_of(numel, dtype, 2)
            sparse, last = old.clone(), old.clone()
            sparse[::501] = other[::501]
            last[-1:] = ~last[-1:]
            for kind, new in {"all": other, "none": old.clone(), "sparse": sparse, "last": last}.items():
                with case(dtype, numel, kind):
                    # Memory around the codes stays as it is, and codes begin anywhere.
                    around = torch.full((numel + 10,), 77, dtype=dtype)
                    codes = around[5 : numel + 5]
                    codes.copy_(old)
                    changed = Run.keep(codes, new)
                    assert changed.dtype is torch.int64
                    assert changed.shape == ()
                    assert changed == reference.count(old, new)[0]
                    assert torch.equal(codes, new)
                    assert (around[:5] == 77).all()
                    assert (around[numel + 5 :] == 77).all()


@needs_numba
def test_what_the_compiled_loop_leaves_to_plain_torch():
    from weightflip.kernels.cpu import Run

    old, new = torch.zeros(33, 17, dtype=torch.int16), torch.ones(17, 33, dtype=torch.int16).mT
    long = torch.zeros(9, dtype=torch.int64)
    assert Run.keep(old, new) is None, "the new codes are not contiguous"
    assert Run.keep(long, long + 1) is None
    assert Run.keep(old, new.contiguous().int()) is None
    assert not old.any()
    for codes, other in ((old, new), (long, long + 1)):
        assert kernels.keep_(codes, other, kernels.ScratchPool()) == codes.numel()
        assert torch.equal(codes, other)


@needs_numba
def test_eager_does_not_use_the_compiled_loop(monkeypatch):
    from weightflip.kernels.cpu import Run

    def fail(codes, new):
        raise AssertionError("backend='eager' is plain torch only")

    monkeypatch.setattr(Run, "keep", staticmethod(fail))
    codes = torch.zeros(5, dtype=torch.int8)
    assert kernels.keep_(codes, codes + 1, kernels.ScratchPool(), "eager") == 5


@needs_numba
@pytest.mark.parametrize("fault", ["counts", "codes"])
def test_a_loop_that_is_wrong_is_not_used(fault, monkeypatch, caplog):
    from weightflip.kernels import backend, cpu

    class Wrong(cpu.Run):
        @staticmethod
        def keep(codes, new):
            before = codes[-1].clone()
            changed = cpu.Run.keep(codes, new)
            if fault == "codes":
                codes[-1] = before
                return changed
            return changed - 1

    monkeypatch.setattr(backend, "run", lambda name, device: Wrong)
    codes = torch.zeros(100, dtype=torch.int8)
    assert kernels.keep_(codes, codes + 1, kernels.ScratchPool()) == 100
    assert (codes == 1).all()
    assert "plain torch compares them instead" in caplog.text
    assert not proof.may_keep(Wrong, torch.int8)
