"""Detect training steps that bypass tracking, and warn about them."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from weightflip.session.log import Log
from weightflip.session.steps import is_state_initialization, parameters_of, weak_reference

# Initialization, loading a checkpoint and a broadcast write a weight once or twice each; training soon writes more.
_MIN_TRAINING_WRITES = 8


class _StepDetector:
    """A step hook that records whether the inner optimizer was stepped directly."""

    was_stepped = False

    def __call__(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        if not is_state_initialization(optimizer):
            self.was_stepped = True


class MissedSteps:
    """Watches for training steps that bypass tracking, until the first tracked step.

    A hook on the optimizer detects its own steps; the version counters of the weights detect writes by anything else.
    Neither the optimizer nor a parameter is kept alive. Parameters are not referenced at all, since even weak
    references would make ``Module.to()`` fail.

    Args:
        log: Receives the warning.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._reset()

    def _reset(self) -> None:
        self._is_watching = False
        self._has_warned = False
        self._final_text = ""
        self._optimizer: Callable[[], Optimizer | None] = lambda: None
        self._versions: dict[int, int] = {}
        self._detector = _StepDetector()
        self._hook: RemovableHandle | None = None
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def watch(self, optimizer: Optimizer, owner: object) -> None:
        """Start watching.

        Args:
            optimizer: The optimizer that is tracked.
            owner: An object that lives as long as the run. When it is deleted, the warning is issued at the latest.
        """
        self._is_watching = True
        self._optimizer = weak_reference(optimizer)
        self._versions = _versions(optimizer)
        if hasattr(optimizer, "_optimizer_step_post_hooks"):
            self._hook = optimizer.register_step_post_hook(self._detector)
        self._finalizer = weakref.finalize(owner, self._on_owner_gone, os.getpid())

    def stop(self, text: str = "") -> None:
        """Stop watching: a step was tracked, or none will follow.

        Args:
            text: What :attr:`text` returns from now on.
        """
        if not self._is_watching:
            return
        self._is_watching, self._versions, self._final_text = False, {}, text
        if self._hook is not None:
            self._hook.remove()
        if self._finalizer is not None:
            self._finalizer.detach()

    @property
    def text(self) -> str:
        """What happened instead of tracked steps, and what to do; empty if nothing did."""
        if not self._is_watching:
            return self._final_text
        if self._detector.was_stepped:
            return (
                "no step() was tracked and nothing was counted: step() of the inner optimizer was called directly; "
                "call step() of the FlipTrackingOptimizer, or use track_flips(optimizer, model), which counts every "
                "step of an optimizer, whoever calls it"
            )
        optimizer = self._optimizer()
        writes = 0 if optimizer is None else self._count_writes(optimizer)
        if writes < _MIN_TRAINING_WRITES:
            return ""
        return (
            f"no step() was tracked and nothing was counted: the weights of this {type(optimizer).__name__} were "
            f"written {writes} times by something else; {_suggest_fix(optimizer)}"
        )

    def _count_writes(self, optimizer: Optimizer) -> int:
        """Count the writes since ``watch`` to the weight written most often. Replaced parameters are ignored."""
        now = _versions(optimizer)
        return max((version - self._versions[p] for p, version in now.items() if p in self._versions), default=0)

    def queue_warning(self) -> None:
        """Add the warning to the log's pending ones, once."""
        text = self.text
        if text and not self._has_warned and self._log.is_writer():
            self._has_warned = True
            self._log.pending_warnings.append(f"weightflip: {text}")

    def finish(self) -> None:
        """Stop watching because tracking ends. The text remains available."""
        self.queue_warning()
        self.stop(self.text)

    def _on_owner_gone(self, process: int) -> None:
        # In a forked process, missing steps mean nothing: they are made in its parent.
        if os.getpid() == process:
            self.queue_warning()
            self.stop()
            self._log.emit_warnings()

    def __getstate__(self) -> dict[str, Any]:
        # Nothing is known of a copy yet: it may not be meant to be stepped.
        return {"_log": self._log}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()


def _versions(optimizer: Optimizer) -> dict[int, int]:
    """Map the id of each parameter to its version. Inference tensors, lazy parameters and others have none."""
    versions = {}
    for parameter in parameters_of(optimizer):
        with suppress(Exception):
            versions[id(parameter)] = parameter._version
    return versions


def _suggest_fix(optimizer: Any) -> str:
    inner = [name for name, value in getattr(optimizer, "__dict__", {}).items() if isinstance(value, Optimizer)]
    if inner:
        return (
            f"it holds another optimizer that makes the steps; track that one: track_flips(optimizer.{inner[0]}, model)"
        )
    return "if another optimizer trains them, such as one created by a framework, track that one"
