"""Steps that go past what is tracked: a run that looks as if nothing happened says what did."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from weightflip.session.log import Log
from weightflip.session.steps import is_phantom, parameters_of, reference

# A loaded checkpoint and new initial weights are a write each; a few steps are more.
_WRITES_OF_STEPS = 4


class _Inside:
    """Whether the optimizer inside was stepped by itself. The hook on it keeps this alive, and nothing else."""

    was_stepped = False

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not is_phantom(optimizer):
            self.was_stepped = True


class UnseenSteps:
    """Watches, until the first step is seen, whether there are others.

    A hook on the optimizer tells of its own steps, and the weights' version counters tell of writes by whatever else.
    Nothing keeps a parameter or the optimizer alive, and weak references to parameters would stop ``Module.to()``.

    Args:
        log: Where the warning goes.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._start()

    def _start(self) -> None:
        self._is_watching = False
        self._has_told = False
        self._last_text = ""
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._versions: dict[int, int] = {}
        self._inside = _Inside()
        self._hook: RemovableHandle | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def watch(self, optimizer: Optimizer, owner: object) -> None:
        """Begin.

        Args:
            optimizer: The one that is tracked.
            owner: What ends with the run: then it is the last chance to say something.
        """
        self._is_watching = True
        self._optimizer = reference(optimizer)
        self._versions = _versions(optimizer)
        if hasattr(optimizer, "_optimizer_step_post_hooks"):
            self._hook = optimizer.register_step_post_hook(self._inside)
        self._finalizer = weakref.finalize(owner, self._come_to_end, os.getpid())

    def end(self, text: str = "") -> None:
        """Watch no more: a step was seen, or none is to come.

        Args:
            text: What there is to say from here on.
        """
        if not self._is_watching:
            return
        self._is_watching, self._versions, self._last_text = False, {}, text
        if self._hook is not None:
            self._hook.remove()
        if self._finalizer is not None:
            self._finalizer.detach()

    @property
    def text(self) -> str:
        """What happened instead of steps that are seen, and what to do; empty if nothing did."""
        if not self._is_watching:
            return self._last_text
        if self._inside.was_stepped:
            return (
                "no step() was seen, and nothing was counted: step() of the optimizer inside it was called; call "
                "step() of the FlipTrackingOptimizer, or use track_flips(optimizer, model), which counts the steps of "
                "an optimizer whoever calls them"
            )
        optimizer = self._optimizer()
        writes = 0 if optimizer is None else self._writes(optimizer)
        if writes < _WRITES_OF_STEPS:
            return ""
        return (
            f"no step() was seen, and nothing was counted: the weights of this {type(optimizer).__name__} were written "
            f"{writes} times by something else; {_instead_of(optimizer)}"
        )

    def _writes(self, optimizer: Optimizer) -> int:
        """How often the weights were written that are still those of the beginning: the most of any one."""
        now = _versions(optimizer)
        return max((version - self._versions[p] for p, version in now.items() if p in self._versions), default=0)

    def tell(self) -> None:
        """Have it warned about, once."""
        text = self.text
        if text and not self._has_told and self._log.find_writer():
            self._has_told = True
            self._log.untold.append(f"weightflip: {text}")

    def _come_to_end(self, process: int) -> None:
        # A forked process has seen no step, since its parent goes on.
        if os.getpid() == process:
            self.tell()
            self.end()
            self._log.tell()

    def __getstate__(self) -> dict[str, Any]:
        # Of a copy nobody knows yet whether it is there to be stepped.
        return {"_log": self._log}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


def _versions(optimizer: Optimizer) -> dict[int, int]:
    """Id of each parameter to its version: not of inference tensors, lazy parameters and others that have none."""
    versions = {}
    for parameter in parameters_of(optimizer):
        with suppress(Exception):
            versions[id(parameter)] = parameter._version
    return versions


def _instead_of(optimizer: Any) -> str:
    inside = [name for name, value in getattr(optimizer, "__dict__", {}).items() if isinstance(value, Optimizer)]
    if inside:
        return (
            f"it holds another optimizer, whose steps are those that count: track_flips(optimizer.{inside[0]}, model)"
        )
    return "if another optimizer trains them, as one that a framework has made, track that one"
