"""The compiled loops in torch's own threads: right, and never waiting for ever, wherever they are called."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import threading
import time
import warnings
import weakref

import pytest
import torch
from processes import run_python
from torch import Tensor

from weightflip import FlipTrackingOptimizer
from weightflip.kernels import pool
from weightflip.kernels.cpu import Run
from weightflip.kernels.runs import Kind, OnePass
from weightflip.quantizers import resolve

# More than one item, and more than one thread takes.
SHAPE = (400, 1000)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def count_once(seed: int = 0) -> tuple[Tensor, list[int]]:
    """Codes and counts of a weight whose codes were 0."""
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    quantizer, counts = resolve("float8_e4m3:row"), torch.zeros(3, dtype=torch.int64)
    codes = torch.zeros(SHAPE, dtype=torch.int8)
    assert OnePass(Run)(weight, quantizer.scale(weight), quantizer.rounding(weight), codes, weight, counts)
    return codes, counts.tolist()


def expected(seed: int = 0) -> tuple[Tensor, list[int]]:
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))
    codes = resolve("float8_e4m3:row").encode(weight).ordinals
    flips, updates = int(codes.count_nonzero()), int(weight.count_nonzero())
    return codes, [flips, updates, int(((codes == 0) & (weight != 0)).sum())]


def assert_counted(found: tuple[Tensor, list[int]], seed: int = 0) -> None:
    codes, counts = expected(seed)
    assert torch.equal(found[0], codes)
    assert found[1] == counts


needs_torch_pool = pytest.mark.skipif(pool._parallel() is None, reason="torch was built with another thread pool")


@pytest.mark.parametrize("has_torch_pool", [pytest.param(True, marks=needs_torch_pool), False])
def test_both_pools_count_the_same(has_torch_pool, two_threads, monkeypatch):
    used = []
    parallel = pool._parallel()
    run_own = pool._run_in_pool
    monkeypatch.setattr(
        pool, "_parallel", lambda: (lambda *args: (used.append("torch"), parallel(*args))) if has_torch_pool else None
    )
    monkeypatch.setattr(pool, "_run_in_pool", lambda *args: (used.append("own"), run_own(*args)))
    assert_counted(count_once())
    assert used == ["torch" if has_torch_pool else "own"]


def test_without_more_threads_this_one_counts(two_threads, monkeypatch):
    """As at the end of the process, or at the system's limit. An error would leave unknown how much is counted."""

    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pool, "_parallel", lambda: None)
    pool._workers.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start)
        assert_counted(count_once())
        done = []

        def call(task):
            done.append(task)

        kept = weakref.ref(call)
        pool.run(0, call, 7, 2)
        del call
        gc.collect()
        assert done == [7]
        assert kept() is None, "no thread will take it"


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_another_process_counts(method, two_threads):
    if method not in multiprocessing.get_all_start_methods():
        pytest.skip(f"this system has no {method}")
    # Now this process has OpenMP's threads, which a fork of it has not.
    assert_counted(count_once())
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=_count_in_child, args=(queue,))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    try:
        assert queue.get(timeout=120) == expected()[1]
    finally:
        child.kill()
        child.join()


def _count_in_child(queue) -> None:
    # torch's own operations must not use the parent's OpenMP: one thread for those around the count.
    torch.set_num_threads(1)
    weight = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    quantizer, counts = resolve("float8_e4m3:row"), torch.zeros(3, dtype=torch.int64)
    codes, scale = torch.zeros(SHAPE, dtype=torch.int8), quantizer.scale(weight)
    assert Run.can_do(
        Kind(weight.dtype, weight.dtype, torch.int8, quantizer.rounding(weight), weight.device), scaled=False
    )
    torch.set_num_threads(2)
    assert OnePass(Run)(weight, scale, quantizer.rounding(weight), codes, weight, counts)
    queue.put(counts.tolist())


def train(backend: str, threads=(1,), seed: int = 0) -> list[tuple[int, int, int]]:
    """What each step counts, with another number of threads in each."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in (SHAPE, (300, 333))]
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(weights, lr=0.05), backend=backend, sinks=[])
    found = []
    for number in threads:
        torch.set_num_threads(number)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        counts = optimizer.tracker.record().model.window
        found.append((counts.flips, counts.updates, counts.stalled))
    return found


def test_the_number_of_threads_may_change_between_steps(two_threads):
    threads = (2, 1, 3, 2, 4)
    assert train("numba", threads) == train("eager", threads)


def test_two_optimizers_in_two_threads(two_threads):
    wanted = {seed: train("eager", [2] * 5, seed) for seed in (1, 2)}
    found = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: train("numba", [2] * 5, seed)}))
        for seed in (1, 2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert found == wanted


@needs_torch_pool
def test_inside_a_parallel_region(two_threads):
    found = []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def each(_):
        found.append(count_once(len(found)))

    pool._parallel()(ctypes.cast(each, ctypes.c_void_p).value, 0, 2, 0)
    assert len(found) == 2
    for codes, counts in found:
        assert any(torch.equal(codes, expected(seed)[0]) and counts == expected(seed)[1] for seed in (0, 1))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
@pytest.mark.parametrize("has_torch_pool", [True, False])
def test_an_interrupt_comes_after_the_count(has_torch_pool, two_threads, monkeypatch):
    """Never in the midst of it: no code is lost, and no thread writes to memory that was given back."""
    if not has_torch_pool:
        monkeypatch.setattr(pool, "_parallel", lambda: None)
    weight = torch.randn(2000, 4000, generator=torch.Generator().manual_seed(0))
    quantizer = resolve("float8_e4m3")
    scale, rounding = quantizer.scale(weight), quantizer.rounding(weight)
    wanted = quantizer.encode(weight).ordinals
    codes, counts = torch.zeros_like(weight, dtype=torch.int8), torch.zeros(3, dtype=torch.int64)
    calls = 0

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for _ in range(5):
            codes.zero_()
            counts.zero_()
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012
                signal.setitimer(signal.ITIMER_REAL, 0.001)
                end = time.monotonic() + 60
                while time.monotonic() < end:
                    OnePass(Run)(weight, scale, rounding, codes, None, counts)
                    calls += 1
            # Whoever was at work has ended.
            assert torch.equal(codes, wanted) or not codes.any()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    codes.zero_()
    counts.zero_()
    OnePass(Run)(weight, scale, rounding, codes, None, counts)
    assert torch.equal(codes, wanted)
    assert counts[0] == wanted.count_nonzero()


def test_an_interrupt_waits_for_the_other_threads():
    """They write to memory that whoever is interrupted may give back."""
    begun, ended = threading.Semaphore(0), []
    main = threading.get_ident()

    def work(task):
        if threading.get_ident() == main:
            for _ in range(2):
                begun.acquire()
            raise KeyboardInterrupt
        begun.release()
        time.sleep(0.2)
        ended.append(task)

    with pytest.raises(KeyboardInterrupt):
        pool._run_in_pool(work, 7, 3)
    assert ended == [7, 7]


INTERRUPTED = """
import signal, threading
from weightflip.kernels import pool

def work(task):
    for _ in range(100):
        pass

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
interrupts = 0
while interrupts < 300:
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.0003)
        while True:
            pool._run_in_pool(work, 7, 3)
    except KeyboardInterrupt:
        interrupts += 1
signal.setitimer(signal.ITIMER_REAL, 0)
found = []
while len(found) < 2:
    pool._run_in_pool(lambda task: found.append(threading.current_thread().name), 7, 3)
print(interrupts)
"""


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no timers")
def test_after_any_number_of_interrupts_the_process_ends():
    assert run_python("-c", INTERRUPTED, timeout=60).stdout == "300\n"


def test_who_comes_when_all_is_done_does_nothing():
    done = []
    team = pool._Team(done.append, 7)
    team.end()
    team.join()
    assert done == []


FORK = """
import os
import weightflip
if os.fork() == 0:
    from weightflip.kernels import pool
    print(pool._State.is_forked, flush=True)
    os._exit(0)
os.wait()
from weightflip.kernels import pool
print(pool._State.is_forked)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_fork_is_noted_from_the_import_on():
    assert run_python("-c", FORK).stdout == "True\nFalse\n"
