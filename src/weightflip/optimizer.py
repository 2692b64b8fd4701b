"""The drop-in wrapper: connects the parts of tracking and delegates everything else to the inner optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from weightflip.inner import adapt_step_hook, check_optimizer, delegated, hides_unknown_keywords, runs_hooks_itself
from weightflip.metrics.columns import METRICS, MetricsLike
from weightflip.session import setup
from weightflip.session.alerts import Alert
from weightflip.session.options import Options, check_names
from weightflip.session.session import STATE_KEY, Session
from weightflip.session.tracked import Tracked

_OWN_ATTRIBUTES = frozenset({"inner", "_session"})


class FlipTrackingOptimizer(Tracked, Optimizer):
    """Wraps an optimizer and records how the quantized weights move. Training stays bit-for-bit identical.

    Each step runs as follows:

    1. The codes before the step are those kept from the last step. A weight that is new, or was written in between (a
       loaded checkpoint, an EMA swap), is encoded again, so that this change does not count as a flip.
    2. ``inner.step(closure)`` runs. Its result is returned at the end.
    3. Each weight is encoded again and compared. Flips, updates (``grad != 0``) and stalled updates are added to
       counters on the weight's device, without device synchronization.
    4. Every ``log_every`` steps, the counters are read in one transfer and written to the sinks.

    Everything else, including ``param_groups``, ``state`` and new attributes, belongs to the inner optimizer. Methods
    have the signatures of the inner optimizer's methods. An error during tracking or writing causes one warning, and
    training continues.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, or an object with its ``step``, ``zero_grad``, ``state_dict``,
            ``load_state_dict``, ``param_groups`` and ``state``.
        model: Provides the layer names and, for ``quantizer="auto"``, how each weight is quantized. Without it, names
            come from ``param_names`` of the param groups, or else from the position (``group0.param3``).
        quantizer: ``"auto"``, a name (``"float8_e4m3"``, ``"e3m4:row"``, ``"bfloat16"``, ...), a ``FloatFormat``, an
            object with ``encode(weight)``, a function from a weight to its quantized values, a list of these to track
            the same weights in several formats, or a mapping from globs over parameter names to any of these. In a
            mapping, the first matching glob applies.
        include: Globs over parameter names. None selects every floating-point weight with at least two dimensions, the
            flat parameters of FSDP1 and the partitions of ZeRO-3. In a model converted by torchao, None leaves out the
            weights that stay in high precision.
        exclude: Globs over parameter names.
        groups: Layer groups whose totals are reported in addition to the layers: a mapping from name to globs, such as
            ``{"attention": "*.attn.*", "mlp": ["*.fc1.*", "*.fc2.*"]}``, ``"type"`` for one group per module type, or
            ``"blocks"`` for one group per repeated model block (``layers.3``). None: ``"blocks"`` if more than 30
            weights are tracked. ``{}``: no groups.
        metrics: ``"flips"``, ``"stalls"``, and the groups ``"oscillation"``, ``"coverage"``, ``"scale"``, ``"travel"``,
            ``"range"``, ``"rank"``, ``"sync"``, ``"touched"``. With a mapping, such as ``{"flips": 1, "travel": 10}``,
            a group runs only at every tenth tracked step.
        oscillation_ema: Momentum of the moving average of each weight's oscillation frequency, such as 0.01, or a tuple
            of the momentum and the threshold above which a weight counts as oscillating.
        sync_every: For the groups ``"sync"`` and ``"touched"``: number of steps between two syncs. The weights before
            the first tracked step are the first sync. None: a sync is where you call ``tracker.mark_sync()``.
        track_every: Track every n-th step.
        start_step: First step to track, counted from 0.
        end_step: First step that is no longer tracked.
        log_dir: Directory of the TensorBoard files and of a JSONL file for reports. None for the default of
            ``SummaryWriter``. Created at the first record.
        log_every: Number of steps between two records.
        layer_values: Numbers that TensorBoard shows per layer: ``"all"``, or names such as ``("flip_rate",)``. None:
            all of them for up to 30 layers. With more layers, each has its cumulative flip rate; the other numbers
            exist for model blocks and outliers. The cumulative flip rate is always included.
        sinks: Replaces TensorBoard in ``log_dir``: ``SummaryWriter`` objects, ``wandb`` runs, paths that end in
            ``.jsonl`` or ``.csv``, functions of a :class:`FlipRecord`, ``Sink`` objects. An empty list keeps the
            numbers and writes nothing. If another tracked optimizer or its handle is passed instead of a list, both
            form one run and are written as one record, at the logging points of the first.
        alerts: Rules for the numbers, as text such as ``"stall_ratio > 0.99 for 200 steps"`` or :class:`Alert`. If
            several optimizers form one run, all rules apply to all layers.
        low_memory: Drop the codes after each step. Saves one byte per weight and costs a second encoding.
        fresh_snapshots: Encode again before each step, for scripts that write weights through ``.data``.
        backend: ``"auto"``, ``"eager"``, ``"numba"`` or ``"triton"``, as in :class:`WeightFlipTracker`.

    Attributes:
        inner: The wrapped optimizer.
        tracker: The :class:`WeightFlipTracker`, which holds the numbers.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or ``model`` is not a module.
        ValueError: Unknown quantizer or metric, a pattern that matches nothing, a format that does not fit a weight,
            patterns that leave nothing to track, an invalid rule, or an invalid step number.
        OSError: ``log_dir`` or a file in ``sinks`` is not writable.
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
    _session: Session

    @hides_unknown_keywords
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
        sync_every: int | None = None,
        track_every: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
        log_dir: str | PathLike[str] | None = None,
        log_every: int = 10,
        layer_values: str | Sequence[str] | None = None,
        sinks: Sequence[Any] | Tracked | None = None,
        alerts: Sequence[str | Alert] | None = None,
        low_memory: bool = False,
        fresh_snapshots: bool = False,
        backend: str = "auto",
        **unknown: NoReturn,
    ) -> None:
        """Wrap an optimizer.

        Size: each option is a keyword argument, as in ``torch.optim``, so that editors complete and check it.
        """
        # Not super().__init__(): it would create a second set of param groups and state.
        _check_call(optimizer, model)
        check_names(f"{type(self).__name__}()", unknown)
        options = Options(
            quantizer=quantizer,
            include=include,
            exclude=exclude,
            groups=groups,
            metrics=metrics,
            oscillation_ema=oscillation_ema,
            sync_every=sync_every,
            track_every=track_every,
            start_step=start_step,
            end_step=end_step,
            log_dir=log_dir,
            log_every=log_every,
            layer_values=layer_values,
            sinks=sinks,
            alerts=alerts,
            low_memory=low_memory,
            fresh_snapshots=fresh_snapshots,
            backend=backend,
        )
        # The session first: if both are destroyed together, it still finds the optimizer.
        self.__dict__.update(_session=setup.start_session(optimizer, model, options), inner=optimizer)

    @delegated
    @runs_hooks_itself
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the inner optimizer's step and count how the quantized weights change.

        Args:
            *args: Passed to the inner optimizer's step: a closure and other arguments. A closure of None is dropped,
                since some optimizers do not accept one.
            **kwargs: Passed to the inner optimizer's step.

        Returns:
            The result of the inner optimizer's step.
        """
        if len(args) == 1 and args[0] is None:
            args = ()
        if kwargs.get("closure", self) is None:
            del kwargs["closure"]
        has_closure = args[0] is not None if args else "closure" in kwargs
        session, inner = self._session, self.inner
        try:
            session.run_guarded(session.before_step, inner, has_closure)
            result = inner.step(*args, **kwargs)
        except BaseException:
            # Release parameters and gradients: the caller may catch the error and need the memory.
            session.abort_step()
            raise
        session.finish_step()
        return result

    def _patch_step_function(self) -> None:
        """Nothing to patch: see ``runs_hooks_itself``."""

    def __enter__(self) -> FlipTrackingOptimizer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # After an error, the other processes of a sharded run may never get here.
        self._session.close(is_collective=exc_info[0] is None)

    # ------------------------------------------------------------------ the inner optimizer's

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimizer's param groups. Not cached, since ``load_state_dict`` rebinds them."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.inner.param_groups = value

    @property
    def state(self) -> Any:
        """The inner optimizer's state. The wrapper stores nothing in it."""
        return self.inner.state

    @state.setter
    def state(self, value: Any) -> None:
        self.inner.state = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner.defaults = value

    @delegated
    def zero_grad(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.zero_grad(*args, **kwargs)

    @delegated
    def add_param_group(self, *args: Any, **kwargs: Any) -> Any:
        """Add a param group to the inner optimizer. New weights are tracked from their first step."""
        return self.inner.add_param_group(*args, **kwargs)

    @delegated
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The inner optimizer's state plus the counts under ``"flip_tracking"``. A bare optimizer can load it."""
        state = dict(self.inner.state_dict(*args, **kwargs))
        self._session.save_into(state)
        return state

    @delegated
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load a state dict saved by a wrapped or a bare optimizer. If it has no counts, the current ones continue.

        Unreadable counts only cause a warning: a checkpoint of another version must not stop a run.
        """
        # The inner optimizer may use any name for this argument.
        states = [*args, *kwargs.values()]
        saved = [state[STATE_KEY] for state in states if isinstance(state, Mapping) and STATE_KEY in state]
        result = self.inner.load_state_dict(
            *map(_without_counts, args), **{name: _without_counts(value) for name, value in kwargs.items()}
        )
        for counts in saved:
            self._session.restore(counts)
        return result

    @delegated
    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self.inner.register_step_pre_hook(adapt_step_hook(self, self.inner, hook))

    @delegated
    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self.inner.register_step_post_hook(adapt_step_hook(self, self.inner, hook))

    @delegated
    def register_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_state_dict_pre_hook(lambda _: hook(self), prepend=prepend)

    @delegated
    def register_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_state_dict_post_hook(lambda _, state: hook(self, state), prepend=prepend)

    @delegated
    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_load_state_dict_pre_hook(lambda _, state: hook(self, state), prepend=prepend)

    @delegated
    def register_load_state_dict_post_hook(self, hook: Callable[..., Any], prepend: bool = False) -> RemovableHandle:
        return self.inner.register_load_state_dict_post_hook(lambda _: hook(self), prepend=prepend)

    def __getattr__(self, name: str) -> Any:
        # Dunder and own names are never looked up on the inner optimizer: copy and pickle access partly initialized
        # objects, which would recurse.
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
        # Attributes of the class stay here, since schedulers and frameworks patch them (``step``). All others go to the
        # inner optimizer, whose step reads them, such as GradScaler's ``found_inf``. Lightning creates objects of this
        # class that have no inner optimizer.
        is_own = name in self.__dict__ or name.startswith("__") or hasattr(type(self), name)
        return "inner" in self.__dict__ and not is_own

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Patched methods, such as a scheduler's step, are bound to this object and are not copied.
        return {"inner": self.inner, "_session": self._session}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "inner" in state:
            self.__dict__.update(state)
            # The copy may mark a sync before its first step.
            self._session.weights.optimizer = self.inner
        else:
            self.inner.__setstate__(state)


def _without_counts(argument: Any) -> Any:
    if isinstance(argument, Mapping) and STATE_KEY in argument:
        return {key: value for key, value in argument.items() if key != STATE_KEY}
    return argument


def _check_call(optimizer: Any, model: Any) -> None:
    check_optimizer(optimizer)
    hooks = getattr(optimizer, "__dict__", {}).get("_optimizer_step_pre_hooks", {})
    is_hooked = any(isinstance(getattr(hook, "__self__", None), Tracked) for hook in hooks.values())
    if is_hooked or isinstance(optimizer, Tracked):
        raise TypeError(
            "this optimizer is already tracked, and its checkpoints hold one set of counts; to track the weights in "
            "several formats, pass a list to quantizer="
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model= must be a torch.nn.Module or None, got {type(model).__name__}")
