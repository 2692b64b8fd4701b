"""Threads for the loops on the CPU: those of torch if they are accessible, otherwise a separate thread pool.

After each operation, torch's threads spin for some milliseconds while they wait for the next one. Other threads would
have to share the cores with them, which took twice as long as the same work in torch's threads.
"""

from __future__ import annotations

import ctypes
import functools
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def _parallel() -> Any:
    """Return the function of GNU OpenMP that runs a function in each thread of torch's pool; None if it is missing.

    Its interface is stable, because compilers generate calls of it. Other OpenMP libraries have a function of that name
    with fewer guarantees.
    """
    try:
        # The library that torch is linked with: another copy would have other threads.
        linked = ctypes.CDLL(torch._C.__file__)
    except (OSError, AttributeError):
        return None
    if not hasattr(linked, "GOMP_parallel") or hasattr(linked, "__kmpc_fork_call"):
        return None
    function = linked.GOMP_parallel
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


class _State:
    is_forked = False
    """Whether this process was forked. OpenMP would then wait for threads that only the parent has."""


class _Workers:
    """Threads that wait for calls.

    An interrupt in a method of ThreadPoolExecutor, or in one of Condition, can leave a lock acquired, and the process
    then waits for its threads forever when it exits. These threads are daemons and wait for a queue and for locks that
    are written in C, whose methods an interrupt does not divide.
    """

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._number = 0

    def submit(self, call: Callable[[], None], threads: int) -> None:
        """Make several threads call a function: fewer if no more can be started, and none if all of them are busy."""
        try:
            while self._number < threads:
                threading.Thread(target=self._work, name="weightflip", daemon=True).start()
                self._number += 1
        except RuntimeError:
            # At the system's limit, or at the end of the process.
            threads = self._number
        for _ in range(threads):
            self._calls.put(call)

    def _work(self) -> None:
        while True:
            self._calls.get()()


def _forget_threads() -> None:
    _State.is_forked = True
    _workers.cache_clear()


@functools.lru_cache(maxsize=1)
def _workers() -> _Workers:
    return _Workers()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def run(function: int, call: Callable[[int], None], task: int, parts: int) -> None:
    """Call a C function in as many threads as torch has, including this one, and wait for all of them.

    Each thread calls it with the same argument. The function must distribute the work over any number of threads.

    Args:
        function: Address of the function.
        call: Calls the function from Python.
        task: Address of its argument.
        parts: The number of parts of the work; with one part, only this thread runs.
    """
    threads = torch.get_num_threads()
    if parts < 2 or threads < 2:
        call(task)
        return
    parallel = None if _State.is_forked else _parallel()
    if parallel is None:
        _run_in_pool(call, task, min(parts, threads))
    else:
        # Always use all threads: with another number, OpenMP stops some, and starts them again for torch.
        parallel(function, task, threads, 0)


def _run_in_pool(call: Callable[[int], None], task: int, threads: int) -> None:
    team = _Team(call, task)
    try:
        _workers().submit(team.join, threads - 1)
        call(task)
    finally:
        # Even after an interrupt, because the threads write to memory that may then be freed.
        team.end()


class _Team:
    """Threads that work on the same task. Threads that join after its end do nothing."""

    def __init__(self, call: Callable[[int], None], task: int) -> None:
        self._call, self._task = call, task
        self._lock, self._is_over = threading.Lock(), False
        self._at_work: list[threading.Lock] = []
        """A lock for each thread that has joined, which it holds while it works."""

    def join(self) -> None:
        at_work = threading.Lock()
        with at_work:
            with self._lock:
                if self._is_over:
                    return
                self._at_work.append(at_work)
            self._call(self._task)

    def end(self) -> None:
        """Let no more threads join, and wait for those that have. An interrupt is raised after that."""
        interrupt: BaseException | None = None
        while True:
            try:
                with self._lock:
                    self._is_over = True
                for at_work in self._at_work:
                    with at_work:
                        pass
                break
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
