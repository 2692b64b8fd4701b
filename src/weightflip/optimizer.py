"""The drop-in: puts the parts together and delegates everything else to the inner optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, TypedDict

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from weightflip import distributed
from weightflip.alerts import Alert, AlertWatch
from weightflip.detect import quantizes_weights
from weightflip.log import Log
from weightflip.metrics.columns import METRICS, MetricsLike
from weightflip.records import RunInfo
from weightflip.sinks import BesideSink, SinkGroup, TensorBoardSink, make_sink
from weightflip.tracker import WeightFlipTracker
from weightflip.tracking import STATE_KEY, Tracking

if TYPE_CHECKING:
    from typing_extensions import Unpack

_OWN_ATTRIBUTES = frozenset({"inner", "_tracking"})
# Set by torch.amp.GradScaler around the step of an optimizer that supports it; they have to reach that optimizer.
_AMP_ATTRIBUTES = frozenset({"grad_scale", "found_inf"})


class TrackingOptions(TypedDict, total=False):
    """The keyword arguments of :class:`FlipTrackingOptimizer`."""

    quantizer: Any
    include: str | Sequence[str] | None
    exclude: str | Sequence[str] | None
    groups: Mapping[str, str | Sequence[str]] | str | None
    metrics: MetricsLike
    oscillation_ema: float | tuple[float, float] | None
    track_every: int
    start_step: int
    end_step: int | None
    log_dir: str | PathLike[str] | None
    log_every: int
    sinks: Any
    alerts: Sequence[str | Alert] | None
    low_memory: bool
    fresh_snapshots: bool
    backend: str


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
            object with ``encode(weight)``, a function from a weight to its quantized values, a list of these to see the
            same weights through several formats, or a mapping from globs over parameter names to any of them, of which
            the first that matches counts.
        include: Globs over parameter names; None for every floating-point weight with two dimensions or more, and
            for the flat parameters of FSDP1 and the partitions of ZeRO-3.
        exclude: Globs over parameter names.
        groups: Layers whose sums are shown beside the single ones: name to globs over parameter names, such as
            ``{"attention": "*.attn.*", "mlp": ["*.fc1.*", "*.fc2.*"]}``, or ``"type"`` for a group of each type of
            module.
        metrics: ``"flips"``, ``"stalls"``, and the groups ``"oscillation"``, ``"coverage"``, ``"scale"``, ``"travel"``,
            ``"range"``, ``"rank"``; a mapping, such as ``{"flips": 1, "travel": 10}``, has a group look at every tenth
            tracked step only.
        oscillation_ema: Momentum of the moving average of each weight's oscillation frequency, such as 0.01, or a tuple
            of it and the threshold above which a weight counts as oscillating.
        track_every: Track every n-th step.
        start_step: First step to track, from 0.
        end_step: Track no step from this one on.
        log_dir: Where TensorBoard files go, and a JSONL file beside them for reports; None for ``SummaryWriter``'s own
            default place. Made at the first record.
        log_every: Steps between two records.
        sinks: Instead of TensorBoard in ``log_dir``: ``SummaryWriter`` objects, ``wandb`` runs, paths that end in
            ``.jsonl`` or ``.csv``, functions of a :class:`FlipRecord`, ``Sink`` objects. An empty list keeps the
            numbers and writes nothing. Another tracked optimizer, or its handle, instead of a list: the two are parts
            of one run and written as one record, at the logging points of the first.
        alerts: Rules over the numbers, as text such as ``"stall_ratio > 0.99 for 200 steps"`` or :class:`Alert`. Of
            several optimizers that are one run, all rules watch all layers.
        low_memory: Drop the codes after each step; a second encoding instead of a byte a weight.
        fresh_snapshots: Encode anew before each step, for scripts that write weights through ``.data``.
        backend: ``"auto"``, ``"eager"``, ``"numba"`` or ``"triton"``, as in :class:`WeightFlipTracker`.

    Attributes:
        inner: The wrapped optimizer.
        tracker: The :class:`WeightFlipTracker`, with the numbers.

    Raises:
        TypeError: ``optimizer`` is no optimizer, or ``model`` no module.
        ValueError: An unknown quantizer or metric, a pattern that matches nothing, a format that a weight does not fit,
            nothing to track, a rule that cannot be read, or a step number that makes no sense.
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
    _tracking: Tracking

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        *,
        quantizer: Any = "auto",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        groups: Mapping[str, str | Sequence[str]] | str | None = None,
        metrics: MetricsLike = METRICS,
        oscillation_ema: float | tuple[float, float] | None = None,
        track_every: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        log_dir: str | PathLike[str] | None = None,
        log_every: int = 10,
        sinks: Sequence[Any] | FlipTrackingOptimizer | FlipTrackingHandle | None = None,
        alerts: Sequence[str | Alert] | None = None,
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
            oscillation_ema=oscillation_ema,
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
        tracking = Tracking(
            tracker,
            _make_log(log_dir, sinks),
            log_every,
            model,
            {"quantizer": quantizer, "include": include, "exclude": exclude},
            groups,
            settings,
        )
        watch = AlertWatch(alerts, tracker.value_names)
        tracking.select(optimizer, strict=True)
        watch.check_layers([*tracking.info.tracked, *tracking.info.skipped])
        tracking.log.alerts.extend(watch)
        self.__dict__.update(inner=optimizer, _tracking=tracking)

    @property
    def info(self) -> RunInfo:
        """What is tracked and how, what is skipped and why; ``print`` shows it."""
        return self._tracking.info

    @property
    def tracker(self) -> WeightFlipTracker:
        """The numbers."""
        return self._tracking.tracker

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Do the inner optimizer's step and count what it did to the quantized weights.

        Args:
            closure: Passed on where it is given.
            *args: Passed on.
            **kwargs: Passed on.

        Returns:
            What the inner optimizer's step returns.
        """
        tracking, inner = self._tracking, self.inner
        try:
            tracking.guarded(tracking.before, inner, closure is not None)
            result = inner.step(closure, *args, **kwargs) if args or closure is not None else inner.step(**kwargs)
        except BaseException:
            # Whoever catches it may want the memory of parameters and gradients.
            tracking.abort()
            raise
        tracking.finish()
        return result

    # Tells torch's step-patching machinery that this step runs the hooks already: the inner one's does.
    step.hooked = True  # type: ignore[attr-defined]

    def _patch_step_function(self) -> None:
        """Nothing to patch: see ``step.hooked``."""

    def flush(self) -> None:
        """Write what was counted since the last record, and have it on disk."""
        self._tracking.flush()

    def close(self) -> None:
        """Write the last record and close the sinks. Steps go on being counted, and open them again if they log."""
        self._tracking.log.close()

    def __enter__(self) -> FlipTrackingOptimizer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # After an error, the other processes of a sharded run may not come here.
        self._tracking.log.close(together=exc_info[0] is None)

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
        self._tracking.save_into(state)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what a wrapped or a bare optimizer saved. Without counts in it, they go on from where they are.

        Counts that cannot be read are warned about: a checkpoint of another version must not stop a run.
        """
        inner_state = {key: value for key, value in state_dict.items() if key != STATE_KEY}
        self.inner.load_state_dict(inner_state)
        if STATE_KEY in state_dict:
            self._tracking.restore(state_dict[STATE_KEY])

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
    hooks = vars(optimizer).get("_optimizer_step_pre_hooks", {})
    is_hooked = any(isinstance(getattr(hook, "__self__", None), FlipTrackingHandle) for hook in hooks.values())
    if is_hooked or isinstance(optimizer, FlipTrackingOptimizer):
        raise TypeError(
            "this optimizer is tracked already, and its checkpoints hold one set of counts; to see the weights through "
            "several formats give quantizer= a list of them"
        )
    if type(optimizer).__name__ == "AcceleratedOptimizer":
        # Its step does nothing in a micro-batch that only accumulates gradients, and each would count as a step.
        raise TypeError(
            "expected the optimizer as it is before accelerator.prepare(), got an AcceleratedOptimizer; "
            "track first, then prepare"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model= is a torch.nn.Module or None, got {type(model).__name__}")


def _make_log(log_dir: str | PathLike[str] | None, sinks: Any) -> Log:
    # Other processes do not even look at the place.
    is_writer = distributed.is_writer()
    if sinks is None:
        place = None if log_dir is None else fspath(log_dir)
        if not is_writer:
            return Log(SinkGroup([]), is_wanted=True)
        tensorboard = TensorBoardSink(place)
        return Log(SinkGroup([tensorboard, BesideSink(tensorboard)]), is_wanted=True)
    if log_dir is not None:
        raise ValueError("log_dir= says where the default sink writes; with sinks= give SummaryWriter(log_dir) there")
    if isinstance(sinks, (FlipTrackingOptimizer, FlipTrackingHandle)):
        return sinks._tracking.log
    if isinstance(sinks, (str, PathLike)) or not isinstance(sinks, Sequence):
        raise TypeError(f"sinks= is a list, got {type(sinks).__name__}; put it in brackets: sinks=[...]")
    if any(isinstance(sink, (FlipTrackingOptimizer, FlipTrackingHandle)) for sink in sinks):
        raise TypeError("another tracked optimizer stands alone, not in a list: sinks=first")
    return Log(SinkGroup([make_sink(spec) for spec in sinks] if is_writer else []), is_wanted=bool(sinks))


class FlipTrackingHandle:
    """What :func:`track_flips` returns.

    Attributes:
        tracker: The :class:`WeightFlipTracker`, with the numbers.
        info: What is tracked and how, what is skipped and why; ``print`` shows it.
    """

    def __init__(self, optimizer: Optimizer, tracking: Tracking) -> None:
        self._tracking = tracking
        self._loading: Any = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
            optimizer.register_state_dict_post_hook(self._save_counts),
            optimizer.register_load_state_dict_pre_hook(self._take_counts),
            optimizer.register_load_state_dict_post_hook(self._restore_counts),
        ]

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        self._tracking.guarded(self._tracking.before, optimizer, closure is not None)

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._tracking.finish()

    def _save_counts(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._tracking.save_into(state_dict)

    def _take_counts(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._loading = state_dict.get(STATE_KEY)
        return {key: value for key, value in state_dict.items() if key != STATE_KEY}

    def _restore_counts(self, optimizer: Optimizer) -> None:
        if self._loading is not None:
            self._tracking.restore(self._loading)
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the optimizer has no hooks.
        return {"_tracking": self._tracking, "_loading": None, "_hooks": []}

    @property
    def tracker(self) -> WeightFlipTracker:
        return self._tracking.tracker

    @property
    def info(self) -> RunInfo:
        return self._tracking.info

    def flush(self) -> None:
        """Write what was counted since the last record, and have it on disk."""
        self._tracking.flush()

    def close(self) -> None:
        """Write the last record and close the sinks. Steps go on being counted, and open them again if they log."""
        self._tracking.log.close()

    def remove(self) -> None:
        """Stop tracking, write the last record and close the sinks; the numbers stay, memory is given back."""
        self._remove(together=True)

    def _remove(self, *, together: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._tracking.end(together=together)

    def __enter__(self) -> FlipTrackingHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._remove(together=exc_info[0] is None)


def track_flips(
    optimizer: Optimizer, model: nn.Module | None = None, **options: Unpack[TrackingOptions]
) -> FlipTrackingHandle:
    """Count flips at each step of an optimizer that stays the very same object, through its hooks.

    For code that insists on its own optimizer class. The numbers, and the optimizer's checkpoints, are those of
    :class:`FlipTrackingOptimizer`. Copies of the optimizer are not tracked, since copying drops hooks. Of a class whose
    ``step`` calls that of its parent class, torch runs the hooks twice, and what the parent's does is seen.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        model: As in :class:`FlipTrackingOptimizer`, which explains all of these.
        **options: The keyword arguments of :class:`FlipTrackingOptimizer`.

    Returns:
        A handle with the numbers in ``tracker``, and ``remove()``; also a context manager.

    Raises:
        TypeError: As :class:`FlipTrackingOptimizer`; or the optimizer has no hooks, which wrappers of other libraries
            lack.
        ValueError: As :class:`FlipTrackingOptimizer`.
        OSError: As :class:`FlipTrackingOptimizer`.
        ImportError: As :class:`FlipTrackingOptimizer`.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> handle = track_flips(optimizer, model, quantizer="e3m4", sinks=[])
        >>> model(torch.ones(4)).sum().backward()
        >>> optimizer.step()
        >>> handle.tracker.get_update_counts()
        {'weight': 8}
    """
    tracking = FlipTrackingOptimizer(optimizer, model, **options)._tracking
    if quantizes_weights(optimizer):
        raise TypeError(
            f"the hooks of {type(optimizer).__name__} run around the optimizer inside it, before the weights are "
            "quantized; use FlipTrackingOptimizer(optimizer, model)"
        )
    if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
        raise TypeError(
            f"{type(optimizer).__name__} has no step hooks; call track_flips on the optimizer inside it, or wrap that "
            "one in FlipTrackingOptimizer first"
        )
    return FlipTrackingHandle(optimizer, tracking)
