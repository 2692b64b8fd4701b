"""The hook form: counts flips through the hooks of an optimizer, without wrapping it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from weightflip.inner import check_optimizer, full_name
from weightflip.optimizer import FlipTrackingOptimizer
from weightflip.selection import quantizes_weights
from weightflip.session.options import TrackingOptions, check_names
from weightflip.session.session import STATE_KEY, Session
from weightflip.session.tracked import Tracked

if TYPE_CHECKING:
    from typing_extensions import Unpack

_KINDS = ("step_pre", "step_post", "state_dict_post", "load_state_dict_pre", "load_state_dict_post")


class FlipTrackingHandle(Tracked):
    """What :func:`track_flips` returns.

    Attributes:
        tracker: The :class:`WeightFlipTracker`, which holds the numbers.
        info: What is tracked and how, and what is skipped and why. ``print`` displays it.
    """

    def __init__(self, optimizer: Optimizer, session: Session) -> None:
        self._session = session
        self._loading: Any = None
        self._hooks: list[RemovableHandle] = []
        hooks = (self._before_step, self._after_step, self._save_counts, self._extract_counts, self._restore_counts)
        try:
            for kind, hook in zip(_KINDS, hooks, strict=True):
                self._hooks.append(getattr(optimizer, f"register_{kind}_hook")(hook))
        except BaseException:
            self._remove(is_collective=False)
            raise

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer
        self._session.run_guarded(self._session.before_step, optimizer, closure is not None)

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._session.finish_step()

    def _save_counts(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        self._session.save_into(state_dict)

    def _extract_counts(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        self._loading = state_dict.get(STATE_KEY)
        return {key: value for key, value in state_dict.items() if key != STATE_KEY}

    def _restore_counts(self, optimizer: Optimizer) -> None:
        if self._loading is not None:
            self._session.restore(self._loading)
            self._loading = None

    def __getstate__(self) -> dict[str, Any]:
        # A copied optimizer has no hooks.
        return {"_session": self._session, "_loading": None, "_hooks": []}

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.info!r}>"

    def remove(self) -> None:
        """Stop tracking, write the last record and close the sinks. Frees memory but keeps the numbers."""
        self._remove(is_collective=True)

    def _remove(self, *, is_collective: bool) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._session.end(is_collective=is_collective)

    def __enter__(self) -> FlipTrackingHandle:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._remove(is_collective=exc_info[0] is None)


def track_flips(
    optimizer: Optimizer, model: nn.Module | None = None, **options: Unpack[TrackingOptions]
) -> FlipTrackingHandle:
    """Count flips at each step of an optimizer through its hooks, without wrapping it.

    Use it with code that requires its own optimizer class. The numbers and the checkpoints are the same as with
    :class:`FlipTrackingOptimizer`. Copies of the optimizer are not tracked, since copying drops hooks. If the ``step``
    of a class calls the ``step`` of its parent class, torch runs the hooks twice, and only the parent's step is
    tracked. No hook runs if a step raises: the parameters and gradients of that step are kept alive until the next step
    or ``remove()``. The wrapper releases them immediately.

    Args:
        optimizer: Any ``torch.optim.Optimizer``.
        model: See :class:`FlipTrackingOptimizer`.
        **options: The keyword arguments of :class:`FlipTrackingOptimizer`.

    Returns:
        A handle with the numbers in ``tracker`` and a method ``remove()``. It is also a context manager.

    Raises:
        TypeError: See :class:`FlipTrackingOptimizer`. Also if the optimizer has no hooks, like some wrappers.
        ValueError: See :class:`FlipTrackingOptimizer`.
        OSError: See :class:`FlipTrackingOptimizer`.
        ImportError: See :class:`FlipTrackingOptimizer`.

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
    check_names("track_flips()", options)
    check_optimizer(optimizer)
    _check_hooks(optimizer)
    return FlipTrackingHandle(optimizer, FlipTrackingOptimizer(optimizer, model, **options)._session)


def _check_hooks(optimizer: Optimizer) -> None:
    if quantizes_weights(optimizer):
        raise TypeError(
            f"{type(optimizer).__name__} runs its hooks around its inner optimizer, before the weights are quantized; "
            "use FlipTrackingOptimizer(optimizer, model)"
        )
    missing = [kind for kind in _KINDS if not _runs_hooks(optimizer, kind)]
    if missing:
        raise TypeError(
            f"track_flips needs hooks that {full_name(optimizer)} does not run: {', '.join(missing)}; use "
            "FlipTrackingOptimizer(optimizer, model), which needs none. track_flips on its inner optimizer would miss "
            "what the outer one does to the weights"
        )


def _runs_hooks(optimizer: Optimizer, kind: str) -> bool:
    """Whether hooks of this kind can be registered and are called. Classes that skip torch's constructor lack them."""
    name = f"_optimizer_{kind}_hooks"
    if not hasattr(optimizer, name) or not callable(getattr(optimizer, f"register_{kind}_hook", None)):
        return False
    # Lightning's optimizers share the hooks of the optimizer inside, whose step runs them.
    has_own_hooks = name in vars(optimizer)
    is_step_patched = any(getattr(owner.step, "hooked", False) for owner in (type(optimizer), optimizer))
    return is_step_patched or not has_own_hooks or not kind.startswith("step")
