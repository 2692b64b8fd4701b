"""The drop-in: puts the parts together and delegates everything else to the inner optimizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any, NoReturn

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from weightflip.inner import check_optimizer, delegated, runs_hooks_itself, seen_from
from weightflip.metrics.columns import METRICS, MetricsLike
from weightflip.session import setup
from weightflip.session.alerts import Alert
from weightflip.session.options import Options, check_names
from weightflip.session.session import STATE_KEY, Session
from weightflip.session.tracked import Tracked

_OWN_ATTRIBUTES = frozenset({"inner", "_session"})


class FlipTrackingOptimizer(Tracked, Optimizer):
    """Wraps an optimizer and shows how the quantized weights move. Training is bit for bit what it was.

    A step does this:

    1. The codes of the weights before the step are those kept from the last step. A weight that is new or was written
       in between (a loaded checkpoint, an EMA swap) is encoded now, so that this change is no flip.
    2. ``inner.step(closure)`` runs, and its result is returned.
    3. Each weight is encoded anew and compared: flips, updates (``grad != 0``) and stalled updates are added to
       counters on the weight's device. Nothing waits for the device.
    4. Every ``log_every`` steps the counters are read, in one transfer, and written to the sinks.

    Everything else, ``param_groups``, ``state`` and new attributes included, is the inner optimizer's own, and methods
    show its signatures. A fault while tracking or writing warns once and lets training go on.

    Args:
        optimizer: Any ``torch.optim.Optimizer``, built as before; or an object with its ``step``, ``zero_grad``,
            ``state_dict``, ``load_state_dict``, ``param_groups`` and ``state``.
        model: Gives the layers their names and, for ``quantizer="auto"``, tells how each weight is quantized. Without
            it names come from the groups' ``param_names``, else from the place (``group0.param3``).
        quantizer: ``"auto"``, a name (``"float8_e4m3"``, ``"e3m4:row"``, ``"bfloat16"``, ...), a ``FloatFormat``, an
            object with ``encode(weight)``, a function from a weight to its quantized values, a list of these to see the
            same weights through several formats, or a mapping from globs over parameter names to any of them, of which
            the first that matches counts.
        include: Globs over parameter names; None for every floating-point weight with two dimensions or more, and
            for the flat parameters of FSDP1 and the partitions of ZeRO-3. Of a model that torchao has converted, None
            leaves out the weights that stay in high precision.
        exclude: Globs over parameter names.
        groups: Layers whose sums are shown beside the single ones: name to globs over parameter names, such as
            ``{"attention": "*.attn.*", "mlp": ["*.fc1.*", "*.fc2.*"]}``, ``"type"`` for a group of each type of module,
            or ``"blocks"`` for one of each repeated block (``layers.3``). None: blocks where more than 30 weights are
            tracked; ``{}``: none.
        metrics: ``"flips"``, ``"stalls"``, and the groups ``"oscillation"``, ``"coverage"``, ``"scale"``, ``"travel"``,
            ``"range"``, ``"rank"``, ``"sync"``; a mapping, such as ``{"flips": 1, "travel": 10}``, has a group look at
            every tenth tracked step only.
        oscillation_ema: Momentum of the moving average of each weight's oscillation frequency, such as 0.01, or a tuple
            of it and the threshold above which a weight counts as oscillating.
        sync_every: With the group ``"sync"``: the weights count as published before the first step, and again after
            every so many steps. None: where ``tracker.mark_sync()`` is called.
        track_every: Track every n-th step.
        start_step: First step to track, from 0.
        end_step: Track no step from this one on.
        log_dir: Where TensorBoard files go, and a JSONL file beside them for reports; None for ``SummaryWriter``'s own
            default place. Made at the first record.
        log_every: Steps between two records.
        layer_values: Which numbers TensorBoard has of each layer: ``"all"``, or names such as ``("flip_rate",)``. None:
            all, but of more than 30 layers the cumulative flip rate alone, and the rest for blocks and for layers that
            stand out. The cumulative flip rate is always there.
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
            patterns that leave nothing to track, a rule that cannot be read, or a step number that makes no sense.
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
    _session: Session

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

        Size: each option is a keyword of its own, as in ``torch.optim``, so that editors complete and check it.
        """
        # Not super().__init__(): it would make a second set of groups and state beside the inner optimizer's.
        _check(optimizer, model)
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
        # The session first: where both come to their end together, it still finds the optimizer.
        self.__dict__.update(_session=setup.start(optimizer, model, options), inner=optimizer)

    @delegated
    @runs_hooks_itself
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Do the inner optimizer's step and count what it did to the quantized weights.

        Args:
            *args: Passed on: a closure, and whatever else the inner optimizer's step takes. A closure that is None is
                left out, since some steps take none.
            **kwargs: Passed on.

        Returns:
            What the inner optimizer's step returns.
        """
        if len(args) == 1 and args[0] is None:
            args = ()
        if kwargs.get("closure", self) is None:
            del kwargs["closure"]
        has_closure = args[0] is not None if args else "closure" in kwargs
        session, inner = self._session, self.inner
        try:
            session.guarded(session.before, inner, has_closure)
            result = inner.step(*args, **kwargs)
        except BaseException:
            # Whoever catches it may want the memory of parameters and gradients.
            session.abort()
            raise
        session.finish()
        return result

    def _patch_step_function(self) -> None:
        """Nothing to patch: see ``runs_hooks_itself``."""

    def __enter__(self) -> FlipTrackingOptimizer:
        return self

    def __exit__(self, *exc_info: object) -> None:
        # After an error, the other processes of a sharded run may not come here.
        self._session.close(together=exc_info[0] is None)

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

    @delegated
    def zero_grad(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner.zero_grad(*args, **kwargs)

    @delegated
    def add_param_group(self, *args: Any, **kwargs: Any) -> Any:
        """Passed on; new weights are tracked from their first step on."""
        return self.inner.add_param_group(*args, **kwargs)

    @delegated
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The inner optimizer's state, and the counts under ``"flip_tracking"``; a bare optimizer can load it."""
        state = dict(self.inner.state_dict(*args, **kwargs))
        self._session.save_into(state)
        return state

    @delegated
    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load what a wrapped or a bare optimizer saved. Without counts in it, they go on from where they are.

        Counts that cannot be read are warned about: a checkpoint of another version must not stop a run.
        """
        # Whatever the inner optimizer calls this argument.
        given = [*args, *kwargs.values()]
        saved = [state[STATE_KEY] for state in given if isinstance(state, Mapping) and STATE_KEY in state]
        result = self.inner.load_state_dict(
            *map(_without_counts, args), **{name: _without_counts(value) for name, value in kwargs.items()}
        )
        for counts in saved:
            self._session.restore(counts)
        return result

    @delegated
    def register_step_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self.inner.register_step_pre_hook(seen_from(self, self.inner, hook))

    @delegated
    def register_step_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        return self.inner.register_step_post_hook(seen_from(self, self.inner, hook))

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
        # What the class has and others patch, such as a scheduler its step, stays here. Whatever else is set is for the
        # inner step to see; so is what GradScaler sets around it. A framework's object that only imitates this class
        # has no inner one.
        is_own = name in self.__dict__ or name.startswith("__") or hasattr(type(self), name)
        return "inner" in self.__dict__ and not is_own

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def __getstate__(self) -> dict[str, Any]:
        # What others patched on the instance (a scheduler's step) is bound to this object and stays with it.
        return {"inner": self.inner, "_session": self._session}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "inner" in state:
            self.__dict__.update(state)
        else:
            self.inner.__setstate__(state)


def _without_counts(given: Any) -> Any:
    if isinstance(given, Mapping) and STATE_KEY in given:
        return {key: value for key, value in given.items() if key != STATE_KEY}
    return given


def _check(optimizer: Any, model: Any) -> None:
    check_optimizer(optimizer)
    hooks = getattr(optimizer, "__dict__", {}).get("_optimizer_step_pre_hooks", {})
    is_hooked = any(isinstance(getattr(hook, "__self__", None), Tracked) for hook in hooks.values())
    if is_hooked or isinstance(optimizer, Tracked):
        raise TypeError(
            "this optimizer is tracked already, and its checkpoints hold one set of counts; to see the weights through "
            "several formats give quantizer= a list of them"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model= is a torch.nn.Module or None, got {type(model).__name__}")
