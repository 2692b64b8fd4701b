"""Threads for the loops on the CPU: torch's own, where they can be had, or a pool of this library.

After each of its operations torch's threads wait for the next one for some milliseconds, at full speed. Other threads
would have to share the cores with them: that took twice as long as the same work in torch's pool.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch


@functools.cache
def _parallel() -> Any:
    """GNU OpenMP's function that runs another one in each thread of the pool that torch uses, too; None without.

    Compilers call it with code of theirs, which is why it stays as it is. Other OpenMP libraries have one of that name,
    but promise less.
    """
    try:
        # Among what torch was linked with: another copy of the library would have other threads.
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
    """Whether this process was forked: OpenMP then waits for threads that only the parent has."""


def _forget_threads() -> None:
    _State.is_forked = True
    _own_threads.cache_clear()


@functools.lru_cache(maxsize=1)
def _own_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="weightflip")


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def run(function: int, call: Callable[[int], None], task: int, parts: int) -> None:
    """Call a C function in as many threads as torch has, this one included, and wait for all of them.

    Each thread calls it with the same argument: it has to share the work itself, for any number of threads.

    Args:
        function: Its address.
        call: Calls it from Python.
        task: Its argument, an address.
        parts: How many there are to share; one is done here.
    """
    threads = torch.get_num_threads()
    if parts < 2 or threads < 2:
        call(task)
        return
    parallel = None if _State.is_forked else _parallel()
    if parallel is None:
        _in_own_threads(call, task, min(parts, threads))
    else:
        # Always with all threads: for another number of them OpenMP ends some, and starts them again for torch.
        parallel(function, task, threads, 0)


def _in_own_threads(call: Callable[[int], None], task: int, threads: int) -> None:
    team = _Team(call, task)
    try:
        for _ in range(threads - 1):
            _own_threads().submit(team.join)
        call(task)
    finally:
        # Also when this is interrupted: they write to memory that may be given back then.
        team.end()


class _Team:
    """Threads at the same task. Those that come when it is over have nothing to do."""

    def __init__(self, call: Callable[[int], None], task: int) -> None:
        self._call, self._task = call, task
        self._working, self._is_over = 0, False
        self._changed = threading.Condition()

    def join(self) -> None:
        with self._changed:
            if self._is_over:
                return
            self._working += 1
        try:
            self._call(self._task)
        finally:
            with self._changed:
                self._working -= 1
                self._changed.notify_all()

    def end(self) -> None:
        """Let no thread join from now on, and wait for those that have joined; an interrupt also waits."""
        interrupt: BaseException | None = None
        while True:
            try:
                with self._changed:
                    self._is_over = True
                    self._changed.wait_for(lambda: not self._working)
                break
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt
