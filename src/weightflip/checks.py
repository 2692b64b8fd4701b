"""What a call is checked with, so that a wrong argument is answered in plain words: expected, got, what to do."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor


def whole(name: str, value: Any, least: int, *, hint: str = "") -> int:
    """A whole number, whatever type it comes in: NumPy's integers have ``__index__``, too.

    Args:
        name: Of the option.
        value: What was given.
        least: The smallest number that makes sense.
        hint: What else to do.

    Raises:
        ValueError: No whole number, a bool, or too small.
    """
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        raise ValueError(f"{name}= is a whole number of at least {least}, got {value!r}{hint and '; ' + hint}")
    return number


def flag(name: str, value: Any) -> bool:
    """True or False, as a bool or NumPy's.

    Raises:
        TypeError: Anything else: ``"no"`` is true to Python.
    """
    if isinstance(value, bool):
        return value
    # Asked by name: NumPy is not imported to look.
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name}= is True or False, got {value!r}")


def path(name: str, value: Any) -> str:
    """A path, as text.

    Raises:
        TypeError: No path.
        ValueError: One that no system takes.
    """
    text = fspath(value) if isinstance(value, (str, PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"{name} is a path, as text or pathlib.Path; got {described(value)}")
    if "\0" in text:
        raise ValueError(f"{name} is a path without null characters, got {text!r}; leave them out")
    return text


def globs(name: str, value: Any) -> tuple[str, ...]:
    """Globs over names, none for None. A generator is read here, once.

    Raises:
        TypeError: Something else than a text, or texts.
    """
    if value is None:
        return ()
    is_many = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    found = tuple(value) if is_many else (value,)
    if not all(isinstance(glob, str) for glob in found):
        raise TypeError(
            f"{name}= is a glob over names or a sequence of them, such as 'blocks.*.weight'; got {described(value)}"
        )
    return found


def tensor(name: str, value: Any) -> Tensor:
    """A tensor.

    Raises:
        TypeError: Anything else, with how to make a tensor of it.
    """
    if isinstance(value, Tensor):
        return value
    if type(value).__module__ == "numpy":
        hint = "; make one with torch.from_numpy(array)"
    elif isinstance(value, (list, tuple, int, float)):
        hint = "; make one with torch.tensor(...)"
    elif isinstance(getattr(value, "weight", None), Tensor):
        hint = "; give its weight"
    else:
        hint = ""
    raise TypeError(f"{name} is a torch.Tensor, got {described(value)}{hint}")


def dense(name: str, value: Any) -> Tensor:
    """A tensor that is not sparse.

    Raises:
        TypeError: Anything else.
    """
    given = tensor(name, value)
    if given.layout is not torch.strided:
        layout = str(given.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a dense tensor, got one of layout {layout}; make it dense with .to_dense()")
    return given


def number(name: str, value: Any) -> Any:
    """A number, or a tensor of one.

    Raises:
        TypeError: Anything else.
    """
    if isinstance(value, (Real, Tensor)):
        return value
    raise TypeError(f"{name} is a number, got {described(value)}")


def described(value: object) -> str:
    """What was given, short: the type, and the value where that says more."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (str, bytes, int, float, torch.dtype)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        text = repr(value)
        return text if len(text) <= 80 else f"{type(value).__name__} {text[:70]} ..."
    return type(value).__name__


def near(name: object, known: Iterable[str]) -> str | None:
    """The name that was meant, in upper or lower case; None where none is near."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"did you mean 'flips'? "``; empty where none is near."""
    meant = near(name, known)
    return f"did you mean {meant!r}? " if meant is not None else ""
