"""The wrapped optimizer: what it has to be, and how its methods and hooks look from outside."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

_METHODS = ("step", "zero_grad", "state_dict", "load_state_dict")
_DATA = ("param_groups", "state")

Method = TypeVar("Method", bound=Callable[..., Any])


def check_optimizer(optimizer: Any) -> None:
    """Raise a TypeError for what is no optimizer: a ``torch.optim.Optimizer``, or an object that can do the same."""
    if isinstance(optimizer, type):
        raise TypeError(
            f"expected an optimizer, got the class {optimizer.__name__}; "
            f"build it first: FlipTrackingOptimizer({optimizer.__name__}(model.parameters()), model)"
        )
    name = full_name(optimizer)
    if type(optimizer).__name__ == "AcceleratedOptimizer":
        # Its step does nothing in a micro-batch that only accumulates gradients, and each would count as a step.
        raise TypeError(
            "expected the optimizer as it is before accelerator.prepare(), got an AcceleratedOptimizer; "
            "track first, then prepare"
        )
    if isinstance(optimizer, Optimizer):
        return
    if name.startswith("deepspeed."):
        # Its groups are empty between steps, and its step steps each partition by itself.
        raise TypeError(
            f"expected the optimizer as it is before deepspeed.initialize(), got {name}; "
            "track first, then deepspeed.initialize(optimizer=...)"
        )
    lacking = [name for name in _METHODS if not callable(getattr(optimizer, name, None))]
    lacking += [name for name in _DATA if not hasattr(optimizer, name)]
    if not lacking and not _are_groups(optimizer.param_groups):
        lacking = ["param_groups that are dictionaries with 'params', a list of tensors"]
    if lacking:
        raise TypeError(
            "expected a torch.optim.Optimizer such as torch.optim.AdamW(model.parameters()), or an object with "
            f"{_listed([*_METHODS, *_DATA])}; got {name}, which lacks {_listed(lacking)}; {_instead_of(optimizer)}"
        )


def full_name(thing: Any) -> str:
    """Module and class, since several libraries call theirs ``Optimizer``."""
    kind = type(thing)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _are_groups(param_groups: Any) -> bool:
    return isinstance(param_groups, Iterable) and all(
        isinstance(group, dict) and _are_tensors(group.get("params")) for group in param_groups
    )


def _are_tensors(params: Any) -> bool:
    return isinstance(params, (list, tuple)) and all(isinstance(parameter, Tensor) for parameter in params)


def _listed(names: list[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _instead_of(thing: Any) -> str:
    """What to wrap instead."""
    if isinstance(thing, nn.Module):
        return "give the optimizer first: FlipTrackingOptimizer(optimizer, model)"
    if isinstance(thing, (list, tuple, dict)):
        return "wrap each optimizer by itself, and give the others sinks=first to have one run"
    inside = [name for name, value in getattr(thing, "__dict__", {}).items() if isinstance(value, Optimizer)]
    if inside:
        return f"wrap the torch.optim.Optimizer in its attribute {inside[0]!r} instead"
    return "wrap the object that steps the weights"


class _Delegated:
    """A method of the wrapper that is shown with the signature of the inner optimizer's method of this name.

    Frameworks look before they call: Accelerate passes ``set_to_none`` on where ``zero_grad`` has it. A method that the
    inner optimizer lacks is missing here, too. Not a data descriptor, so that what others patch on the instance counts.
    """

    def __init__(self, method: FunctionType) -> None:
        self.__doc__ = method.__doc__
        self._name = method.__name__
        # On the class it is that of torch's.
        self._method = _with_signature(method, inspect.signature(getattr(Optimizer, self._name)))
        self._known: WeakKeyDictionary[Any, FunctionType] = WeakKeyDictionary()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self._method
        inner = getattr(instance, "inner", None)
        # None for an object that copy or pickle is about to fill.
        method = self._method if inner is None else self._like(getattr(inner, self._name))
        return MethodType(method, instance)

    def _like(self, inner_method: Any) -> FunctionType:
        function = getattr(inner_method, "__func__", inner_method)
        try:
            known = self._known.get(function)
        except TypeError:  # not hashable, or not weakly referenced: rare enough to look each time
            return self._made_like(inner_method)
        if known is None:
            known = self._known[function] = self._made_like(inner_method)
        return known

    def _made_like(self, inner_method: Any) -> FunctionType:
        try:
            signature = inspect.signature(inner_method)
        except (TypeError, ValueError):  # written in C
            return self._method
        parameters = list(signature.parameters.values())
        # What a scheduler put on the inner optimizer shows ``self`` as it is.
        if not parameters or parameters[0].name != "self":
            parameters.insert(0, inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY))
        return _with_signature(self._method, signature.replace(parameters=parameters))


def delegated(method: Method) -> Method:
    """Show a method of the wrapper with the signature of the inner optimizer's."""
    return cast("Method", _Delegated(cast("FunctionType", method)))


def runs_hooks_itself(method: Method) -> Method:
    """Tell torch's step-patching machinery that this step runs the hooks already: the inner one's does."""
    method.hooked = True  # type: ignore[attr-defined]
    return method


def _with_signature(method: FunctionType, signature: inspect.Signature) -> FunctionType:
    """A copy that shows this signature; not a function around it, which each call and traceback would pass."""
    twin = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    functools.update_wrapper(twin, method)
    twin.__kwdefaults__ = method.__kwdefaults__
    twin.__signature__ = signature  # type: ignore[attr-defined]
    return twin


def seen_from(wrapper: Any, inner: Any, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A step hook for the inner optimizer that sees the wrapper: as its optimizer, and in the arguments of the step."""

    def adapted(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = hook(wrapper, _replaced(args, inner, wrapper), kwargs)
        if isinstance(result, tuple) and len(result) == 2:
            # New arguments of a pre-hook, for the inner step.
            return _replaced(result[0], wrapper, inner), result[1]
        return result

    return adapted


def _replaced(args: Iterable[Any], old: Any, new: Any) -> tuple[Any, ...]:
    return tuple(new if arg is old else arg for arg in args)
