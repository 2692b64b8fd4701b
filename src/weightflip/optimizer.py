"""The drop-in: puts the parts together and delegates everything else to the inner optimizer."""

from __future__ import annotations

import glob
import logging
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from weightflip.detect import make_plan, name_parameters
from weightflip.records import RunInfo
from weightflip.sinks import SinkGroup, TensorBoardSink, make_sink
from weightflip.tracker import METRICS, TrackedWeight, WeightFlipTracker

logger = logging.getLogger("weightflip")

_STATE_KEY = "flip_tracking"
_OWN_ATTRIBUTES = frozenset({"inner", "_tracking"})
# Set by torch.amp.GradScaler around the step of an optimizer that supports it; they have to reach that optimizer.
_AMP_ATTRIBUTES = frozenset({"grad_scale", "found_inf"})


class _Log:
    """Takes records from the tracker to the sinks."""

    def __init__(self, tracker: WeightFlipTracker, sinks: SinkGroup) -> None:
        self.tracker = tracker
        self.sinks = sinks
        self.info = RunInfo({}, {})
        self.first_step = 0

    def write(self) -> None:
        """Write what was counted since the last record, if anything."""
        record = self.tracker.record() if self.sinks else None
        if record is not None:
            self.sinks.write(record, self.info, self.first_step)

    def close(self) -> None:
        """Write the last record and let the sinks go."""
        try:
            self.write()
        except Exception as error:
            warnings.warn(f"weightflip: the last record is lost: {type(error).__name__}: {error}", stacklevel=2)
        self.sinks.close()


class _Tracking:
    """What happens around the steps of one optimizer: which weights, counting, logging."""

    def __init__(
        self,
        tracker: WeightFlipTracker,
        log: _Log,
        log_every: int,
        model: nn.Module | None,
        selection: Mapping[str, Any],
        settings: Mapping[str, str],
    ) -> None:
        self.tracker = tracker
        self.log = log
        self._log_every = log_every
        self._model = model
        self._selection = dict(selection)
        self._settings = dict(settings)
        self._calls = 0
        self._broken = False
        self._names: list[list[str]] = []
        self._start()

    def _start(self) -> None:
        self._weights: list[TrackedWeight] = []
        self._seen: tuple[object, ...] = ()
        self._finalizer: weakref.finalize[Any, Any] | None = None

    def select(self, param_groups: Sequence[Mapping[str, Any]], *, strict: bool) -> None:
        """Look at the optimizer's parameters again, if they are not the ones of the last step.

        They are read from the groups each time: FSDP2 under Accelerate replaces them in place, and users add groups,
        freeze and unfreeze.
        """
        seen = tuple(
            (id(p), type(p), p.dtype, p.device.type, p.requires_grad) for group in param_groups for p in group["params"]
        )
        if seen == self._seen:
            return
        parameters = name_parameters(param_groups, self._model, self._names)
        names = {id(parameter): name for name, parameter in parameters.items()}
        self._names = [[names[id(p)] for p in group["params"]] for group in param_groups]
        plan = make_plan(parameters, self._model, **self._selection, strict=strict)
        for note in plan.notes:
            if note not in self.log.info.notes:
                logger.warning("weightflip: %s", note)
        # Again at the first step: until then a model may still be converted, which leaves its parameters what they are.
        self._seen = () if strict else seen
        self._weights = [TrackedWeight(name, parameters[name], q) for name, q in plan.tracked.items()]
        described = {
            weight.name: (
                "x".join(str(size) for size in weight.parameter.shape) or "scalar",
                str(weight.parameter.dtype).removeprefix("torch."),
                str(weight.quantizer),
            )
            for weight in self._weights
        }
        self.log.info = RunInfo(described, plan.skipped, self._settings, plan.notes)

    def before(self, param_groups: Sequence[Mapping[str, Any]]) -> None:
        """Have the codes at hand."""
        if self.tracker.is_tracking:
            self.select(param_groups, strict=False)
        self.tracker.before_step(self._weights)

    def after(self, valid: Tensor | None) -> None:
        """Count; at a logging point, write."""
        self.tracker.after_step(valid)
        self._calls += 1
        if self._finalizer is None:
            # Also at garbage collection and at interpreter exit: a script that never calls close() loses no record. Not
            # before the first step: a copy that is thrown away writes nothing.
            self._finalizer = weakref.finalize(self, self.log.close)
        if self._calls % self._log_every == 0:
            self.log.write()

    def guarded(self, action: Callable[..., None], *args: Any) -> None:
        """Run something that must not stop a training: a fault is warned about once, and tracking ends."""
        if self._broken:
            return
        try:
            action(*args)
        except Exception as error:
            self._broken = True
            warnings.warn(
                f"weightflip: tracking has stopped, training goes on: {type(error).__name__}: {error}", stacklevel=3
            )

    def state_dict(self) -> dict[str, Any]:
        return {"tracker": self.tracker.state_dict(), "calls": self._calls}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        calls = int(state_dict["calls"])
        self.tracker.load_state_dict(state_dict["tracker"])
        self._calls = calls
        self.log.first_step = self.tracker.step_count

    def __getstate__(self) -> dict[str, Any]:
        # A copy of an optimizer has no model in it: names and quantizers stand in for what the model was asked.
        known = {glob.escape(weight.name): weight.quantizer for weight in self._weights}
        state = {k: v for k, v in self.__dict__.items() if k not in ("_weights", "_seen", "_finalizer")}
        quantizer = self._selection["quantizer"]
        rest = quantizer if isinstance(quantizer, Mapping) else {"*": quantizer}
        return {**state, "_model": None, "_selection": {**self._selection, "quantizer": {**known, **rest}}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()


class FlipTrackingOptimizer(Optimizer):
    """Wraps an optimizer and shows how the quantized weights move. Training is bit for bit what it was.

    A step does this:

    1. The codes of the weights before the step are those kept from the last step. A weight that is new or was written
       in between (a loaded checkpoint, an EMA swap) is encoded now, so that this change is no flip.
    2. ``inner.step(closure)`` runs, and its result is returned.
    3. Each weight is encoded anew and compared: flips, updates (``grad != 0``) and stalled updates are added to
       counters on the weight's device. Nothing waits for the device.
    4. Every ``log_every`` steps the counters are read, in one transfer, and written to the sinks.

    Everything else, ``param_groups`` and ``state`` included, is the inner optimizer's own. A fault while tracking or
    writing warns once and lets training go on.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, built as before.
        model: Gives the layers their names and, for ``quantizer="auto"``, tells how each weight is quantized. Without
            it names come from the groups' ``param_names``, else from the place (``group0.param3``).
        quantizer: ``"auto"``, a name (``"float8_e4m3"``, ``"e3m4:row"``, ``"bfloat16"``, ...), a ``FloatFormat``, an
            object with ``encode(weight)``, a function from a weight to its quantized values, or a mapping from globs
            over parameter names to any of these, of which the first that matches counts.
        include: Globs over parameter names; None for every floating-point weight with two dimensions or more.
        exclude: Globs over parameter names.
        metrics: ``"flips"`` and ``"stalls"``.
        track_every: Track every n-th step.
        start_step: First step to track, from 0.
        end_step: Track no step from this one on.
        log_dir: Where TensorBoard files go; None for ``SummaryWriter``'s own default place. Made at the first record.
        log_every: Steps between two records.
        sinks: Instead of TensorBoard in ``log_dir``: ``SummaryWriter`` objects, paths that end in ``.jsonl``, functions
            of a :class:`FlipRecord`, ``Sink`` objects. An empty list keeps the numbers and writes nothing.
        low_memory: Drop the codes after each step; a second encoding instead of a byte a weight.
        fresh_snapshots: Encode anew before each step, for scripts that write weights through ``.data``.
        backend: ``"auto"``, ``"eager"`` or ``"numba"``, as in :class:`WeightFlipTracker`.

    Attributes:
        inner: The wrapped optimizer.
        tracker: The :class:`WeightFlipTracker`, with the numbers.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or ``model`` no module.
        ValueError: An unknown quantizer or metric, a pattern that matches nothing, a format that a weight does not fit,
            nothing to track, or a step number that makes no sense.
        OSError: ``log_dir``, or a file of ``sinks``, cannot be written.
        ImportError: ``backend="numba"`` without Numba.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = FlipTrackingOptimizer(
        ...     torch.optim.SGD(model.parameters(), lr=0.1), model, quantizer="e3m4", sinks=[]
        ... )
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> optimizer.tracker.get_update_counts()
        {'weight': 8}
    """

    inner: Optimizer
    _tracking: _Tracking

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        *,
        quantizer: Any = "auto",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        metrics: Sequence[str] = METRICS,
        track_every: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        log_dir: str | PathLike[str] | None = None,
        log_every: int = 10,
        sinks: Sequence[Any] | None = None,
        low_memory: bool = False,
        fresh_snapshots: bool = False,
        backend: str = "auto",
    ) -> None:
        # Not super().__init__(): it would make a second set of groups and state beside the inner optimizer's.
        _check_optimizer(optimizer, model)
        if not isinstance(log_every, int) or isinstance(log_every, bool) or log_every < 1:
            raise ValueError(
                f"log_every= is a whole number of at least 1, got {log_every!r}; for no output use sinks=[]"
            )
        tracker = WeightFlipTracker(
            metrics=metrics,
            track_every=track_every,
            start_step=start_step,
            end_step=end_step,
            low_memory=low_memory,
            fresh_snapshots=fresh_snapshots,
            backend=backend,
        )
        settings = {
            "optimizer": type(optimizer).__name__,
            "metrics": "+".join(tracker.metrics),
            "track_every": str(track_every),
            "log_every": str(log_every),
        }
        tracking = _Tracking(
            tracker,
            _Log(tracker, _make_sinks(log_dir, sinks)),
            log_every,
            model,
            {"quantizer": quantizer, "include": include, "exclude": exclude},
            settings,
        )
        tracking.select(optimizer.param_groups, strict=True)
        self.__dict__.update(inner=optimizer, _tracking=tracking)

    @property
    def info(self) -> RunInfo:
        """What is tracked and how, what is skipped and why; ``print`` shows it."""
        return self._tracking.log.info

    @property
    def tracker(self) -> WeightFlipTracker:
        """The numbers."""
        return self._tracking.tracker

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Do the inner optimizer's step and count what it did to the quantized weights.

        Args:
            closure: Passed on where it is given.
            **kwargs: Passed on.

        Returns:
            What the inner optimizer's step returns.
        """
        tracking, inner = self._tracking, self.inner
        found_inf = vars(inner).get("found_inf")
        tracking.guarded(tracking.before, inner.param_groups)
        result = inner.step(**kwargs) if closure is None else inner.step(closure, **kwargs)
        tracking.guarded(tracking.after, found_inf == 0 if isinstance(found_inf, Tensor) else None)
        return result

    # Tells torch's step-patching machinery that this step runs the hooks already: the inner one's does.
    step.hooked = True  # type: ignore[attr-defined]

    def _patch_step_function(self) -> None:
        """Nothing to patch: see ``step.hooked``."""

    def flush(self) -> None:
        """Write what was counted since the last record, and have it on disk."""
        self._tracking.guarded(self._tracking.log.write)
        self._tracking.log.sinks.flush()

    def close(self) -> None:
        """Write the last record and close the sinks. Steps go on being counted, and open them again if they log."""
        self._tracking.log.close()

    def __enter__(self) -> FlipTrackingOptimizer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # ------------------------------------------------------------------ the inner optimizer's

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's. Never an alias kept here: ``load_state_dict`` rebinds it."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's; nothing of this wrapper's is in it."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self.inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner.defaults = value

    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        self.inner.zero_grad(*args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Passed on; new weights are tracked from their first step on."""
        self.inner.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and the counts under ``"flip_tracking"``; a bare optimizer can load it."""
        state = dict(self.inner.state_dict())

        def add() -> None:
            state[_STATE_KEY] = self._tracking.state_dict()

        self._tracking.guarded(add)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what a wrapped or a bare optimizer saved. Without counts in it, they go on from where they are.

        Counts that cannot be read are warned about: a checkpoint of another version must not stop a run.
        """
        inner_state = {key: value for key, value in state_dict.items() if key != _STATE_KEY}
        self.inner.load_state_dict(inner_state)
        if _STATE_KEY in state_dict:
            try:
                self._tracking.load_state_dict(state_dict[_STATE_KEY])
            except Exception as error:
                warnings.warn(
                    "weightflip: the counts of this checkpoint cannot be read and start anew, the optimizer's state is "
                    f"loaded: {type(error).__name__}: {error}",
                    stacklevel=2,
                )

    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self.inner.register_step_pre_hook(lambda _, args, kwargs: hook(self, args, kwargs))

    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self.inner.register_step_post_hook(lambda _, args, kwargs: hook(self, args, kwargs))

    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_state_dict_pre_hook(lambda _: hook(self), prepend=prepend)

    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_state_dict_post_hook(lambda _, state: hook(self, state), prepend=prepend)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_load_state_dict_pre_hook(lambda _, state: hook(self, state), prepend=prepend)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_load_state_dict_post_hook(lambda _: hook(self), prepend=prepend)

    def __getattr__(self, name: str) -> Any:
        # Only asked where the usual look-up fails. Dunder and own names never go to the inner optimizer, or copy and
        # pickle, which ask a half-made object, would recurse.
        if name in _OWN_ATTRIBUTES or name.startswith("__") or "inner" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if self._belongs_to_inner(name):
            setattr(self.inner, name, value)
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if self._belongs_to_inner(name):
            delattr(self.inner, name)
        else:
            object.__delattr__(self, name)

    def _belongs_to_inner(self, name: str) -> bool:
        if "inner" not in self.__dict__ or name in self.__dict__ or hasattr(type(self), name):
            return False
        return name in _AMP_ATTRIBUTES or hasattr(self.inner, name)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def __getstate__(self) -> dict[str, Any]:
        # What others patched on the instance (a scheduler's step) is bound to this object and stays with it.
        return {"inner": self.inner, "_tracking": self._tracking}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "inner" in state:
            self.__dict__.update(state)
        else:
            self.inner.__setstate__(state)


def _check_optimizer(optimizer: Any, model: Any) -> None:
    if isinstance(optimizer, type):
        raise TypeError(
            f"expected an optimizer, got the class {optimizer.__name__}; "
            f"build it first: FlipTrackingOptimizer({optimizer.__name__}(model.parameters()), model)"
        )
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            "expected a torch.optim.Optimizer such as torch.optim.AdamW(model.parameters()), "
            f"got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, FlipTrackingOptimizer):
        raise TypeError("this optimizer is a FlipTrackingOptimizer already; wrap the inner one")
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model= is a torch.nn.Module or None, got {type(model).__name__}")


def _make_sinks(log_dir: str | PathLike[str] | None, sinks: Sequence[Any] | None) -> SinkGroup:
    if sinks is None:
        return SinkGroup([TensorBoardSink(None if log_dir is None else fspath(log_dir))])
    if log_dir is not None:
        raise ValueError("log_dir= says where the default sink writes; with sinks= give SummaryWriter(log_dir) there")
    if isinstance(sinks, (str, PathLike)) or not isinstance(sinks, Sequence):
        raise TypeError(f"sinks= is a list, got {type(sinks).__name__}; put it in brackets: sinks=[...]")
    return SinkGroup([make_sink(spec) for spec in sinks])
