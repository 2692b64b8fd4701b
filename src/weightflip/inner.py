"""The wrapped optimizer: requirements on it, and how its methods and hooks look from outside."""

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
    """Raise a TypeError unless this is a ``torch.optim.Optimizer`` or an object with the same interface."""
    if isinstance(optimizer, type):
        raise TypeError(
            f"expected an optimizer, got the class {optimizer.__name__}; "
            f"build it first: FlipTrackingOptimizer({optimizer.__name__}(model.parameters()), model)"
        )
    name = full_name(optimizer)
    if type(optimizer).__name__ == "AcceleratedOptimizer":
        # Its step does nothing during gradient accumulation, and each of these calls would count as a step.
        raise TypeError(
            "expected the optimizer before accelerator.prepare(), got an AcceleratedOptimizer; "
            "wrap it first, then call prepare"
        )
    if isinstance(optimizer, Optimizer):
        return
    if name.startswith("deepspeed."):
        # Its param groups are empty between steps, and its step updates each partition separately.
        raise TypeError(
            f"expected the optimizer before deepspeed.initialize(), got {name}; "
            "wrap it first, then call deepspeed.initialize(optimizer=...)"
        )
    missing = [name for name in _METHODS if not callable(getattr(optimizer, name, None))]
    missing += [name for name in _DATA if not hasattr(optimizer, name)]
    if not missing and not _are_param_groups(optimizer.param_groups):
        missing = ["param_groups that are dictionaries with 'params', a list of tensors"]
    if missing:
        raise TypeError(
            "expected a torch.optim.Optimizer such as torch.optim.AdamW(model.parameters()), or an object with "
            f"{_enumerate([*_METHODS, *_DATA])}; got {name}, which lacks {_enumerate(missing)}; "
            f"{_suggest_instead(optimizer)}"
        )


def full_name(thing: Any) -> str:
    """Module and class name, since several libraries have a class ``Optimizer``."""
    kind = type(thing)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _are_param_groups(param_groups: Any) -> bool:
    return isinstance(param_groups, Iterable) and all(
        isinstance(group, dict) and _are_tensors(group.get("params")) for group in param_groups
    )


def _are_tensors(params: Any) -> bool:
    return isinstance(params, (list, tuple)) and all(isinstance(parameter, Tensor) for parameter in params)


def _enumerate(names: list[str]) -> str:
    return " and ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def _suggest_instead(thing: Any) -> str:
    """What to wrap instead."""
    if isinstance(thing, nn.Module):
        return "pass the optimizer first: FlipTrackingOptimizer(optimizer, model)"
    if isinstance(thing, (list, tuple, dict)):
        return "wrap each optimizer separately, and pass sinks=first to the others to get one run"
    inner = [name for name, value in getattr(thing, "__dict__", {}).items() if isinstance(value, Optimizer)]
    if inner:
        return f"wrap the torch.optim.Optimizer in its attribute {inner[0]!r} instead"
    return "wrap the object that updates the weights"


class _Delegated:
    """A method of the wrapper with the signature of the inner optimizer's method of the same name.

    Frameworks inspect signatures: Accelerate passes ``set_to_none`` only if ``zero_grad`` accepts it. A method that the
    inner optimizer lacks is missing here too. This is not a data descriptor, so methods patched on the instance win.
    """

    def __init__(self, method: FunctionType) -> None:
        self.__doc__ = method.__doc__
        self._name = method.__name__
        # On the class, show the signature of torch.optim.Optimizer.
        self._method = _with_signature(method, inspect.signature(getattr(Optimizer, self._name)))
        self._cache: WeakKeyDictionary[Any, FunctionType] = WeakKeyDictionary()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self._method
        inner = getattr(instance, "inner", None)
        # None for a partly initialized object, as copy and pickle create it.
        method = self._method if inner is None else self._with_signature_of(getattr(inner, self._name))
        return MethodType(method, instance)

    def _with_signature_of(self, inner_method: Any) -> FunctionType:
        function = getattr(inner_method, "__func__", inner_method)
        try:
            cached = self._cache.get(function)
        except TypeError:  # not hashable or not weakly referenceable; too rare to cache
            return self._build_method(inner_method)
        if cached is None:
            cached = self._cache[function] = self._build_method(inner_method)
        return cached

    def _build_method(self, inner_method: Any) -> FunctionType:
        try:
            signature = inspect.signature(inner_method)
        except (TypeError, ValueError):  # written in C
            return self._method
        parameters = list(signature.parameters.values())
        # A step that a scheduler patched onto the inner optimizer still lists ``self``.
        if not parameters or parameters[0].name != "self":
            parameters.insert(0, inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY))
        return _with_signature(self._method, signature.replace(parameters=parameters))


def delegated(method: Method) -> Method:
    """Give a method of the wrapper the signature of the inner optimizer's method."""
    return cast("Method", _Delegated(cast("FunctionType", method)))


def hides_unknown_keywords(method: Method) -> Method:
    """Leave ``**kwargs`` out of a method's signature, for a method that takes them only to reject them."""
    signature = inspect.signature(method)
    named = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
    method.__signature__ = signature.replace(parameters=named)  # type: ignore[attr-defined]
    return method


def runs_hooks_itself(method: Method) -> Method:
    """Mark a step as hooked, so that torch does not patch it: the inner optimizer's step runs the hooks."""
    method.hooked = True  # type: ignore[attr-defined]
    return method


def _with_signature(method: FunctionType, signature: inspect.Signature) -> FunctionType:
    """A copy of the function with this signature. A wrapper function would show up in every call and traceback."""
    copied = FunctionType(method.__code__, method.__globals__, method.__name__, method.__defaults__, method.__closure__)
    functools.update_wrapper(copied, method)
    copied.__kwdefaults__ = method.__kwdefaults__
    copied.__signature__ = signature  # type: ignore[attr-defined]
    return copied


def adapt_step_hook(wrapper: Any, inner: Any, hook: Callable[..., Any]) -> Callable[..., Any]:
    """Adapt a step hook for the inner optimizer: it gets the wrapper as its optimizer and in the step's arguments."""

    def adapted(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        result = hook(wrapper, _replace(args, inner, wrapper), kwargs)
        if isinstance(result, tuple) and len(result) == 2:
            # A pre-hook returned new arguments for the inner step.
            return _replace(result[0], wrapper, inner), result[1]
        return result

    return adapted


def _replace(args: Iterable[Any], old: Any, new: Any) -> tuple[Any, ...]:
    return tuple(new if arg is old else arg for arg in args)
