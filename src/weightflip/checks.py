"""Argument checks. Each error says what was expected, what was passed, and what to do."""

from __future__ import annotations

import difflib
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor


def whole_number(name: str, value: Any, minimum: int, *, hint: str = "") -> int:
    """Check an integer of any type with ``__index__``, NumPy's included, and return it as an int.

    Args:
        name: Name of the option.
        value: The value passed for it.
        minimum: Smallest valid number.
        hint: What to do, appended to the error.

    Raises:
        ValueError: Not an integer, a bool, or below ``minimum``.
    """
    try:
        number = minimum - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = minimum - 1
    if number < minimum:
        raise ValueError(f"{name}= must be an integer of at least {minimum}, got {value!r}{hint and '; ' + hint}")
    return number


def flag(name: str, value: Any) -> bool:
    """Check a Python or NumPy bool.

    Raises:
        TypeError: Any other type. A string such as ``"no"`` would count as true.
    """
    if isinstance(value, bool):
        return value
    # Compare names, so that NumPy need not be imported.
    if type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_"):
        return bool(value)
    raise TypeError(f"{name}= must be True or False, got {value!r}")


def path(name: str, value: Any) -> str:
    """Check a path and return it as a string.

    Raises:
        TypeError: Neither a string nor a path object.
        ValueError: The path contains null characters.
    """
    text = fspath(value) if isinstance(value, (str, PathLike)) else None
    if not isinstance(text, str):
        raise TypeError(f"{name} must be a path, as a string or pathlib.Path; got {describe(value)}")
    if "\0" in text:
        raise ValueError(f"{name} must be a path without null characters, got {text!r}; remove them")
    return text


def globs(name: str, value: Any) -> tuple[str, ...]:
    """Check one glob or several globs over names; None means no globs. Consumes a generator.

    Raises:
        TypeError: Neither a string nor an iterable of strings.
    """
    if value is None:
        return ()
    is_many = isinstance(value, Iterable) and not isinstance(value, (str, bytes, Mapping))
    patterns = tuple(value) if is_many else (value,)
    if not all(isinstance(glob, str) for glob in patterns):
        raise TypeError(
            f"{name}= must be a glob over names or a sequence of globs, such as 'blocks.*.weight'; "
            f"got {describe(value)}"
        )
    return patterns


def tensor(name: str, value: Any) -> Tensor:
    """Check a tensor.

    Raises:
        TypeError: Any other type. The error says how to convert it.
    """
    if isinstance(value, Tensor):
        return value
    if type(value).__module__ == "numpy":
        hint = "; convert it with torch.from_numpy(array)"
    elif isinstance(value, (list, tuple, int, float)):
        hint = "; convert it with torch.tensor(...)"
    elif isinstance(getattr(value, "weight", None), Tensor):
        hint = "; pass its weight"
    else:
        hint = ""
    raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}{hint}")


def dense(name: str, value: Any) -> Tensor:
    """Check a tensor that is not sparse.

    Raises:
        TypeError: Not a tensor, or a sparse one.
    """
    checked = tensor(name, value)
    if checked.layout is not torch.strided:
        layout = str(checked.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got layout {layout}; convert it with .to_dense()")
    return checked


def number(name: str, value: Any) -> Any:
    """Check a number or a tensor.

    Raises:
        TypeError: Any other type.
    """
    if isinstance(value, (Real, Tensor)):
        return value
    raise TypeError(f"{name} must be a number, got {describe(value)}")


def describe(value: object) -> str:
    """A short description of a value for error messages: its type, and the value itself if that helps."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (str, bytes, int, float, torch.dtype)):
        return f"{type(value).__name__} {value!r}"
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        text = repr(value)
        return text if len(text) <= 80 else f"{type(value).__name__} {text[:70]} ..."
    return type(value).__name__


def closest_match(name: object, known: Iterable[str]) -> str | None:
    """The known name most similar to ``name``, ignoring case; None if none is similar."""
    by_lower = {one.lower(): one for one in known}
    close = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return by_lower[close[0]] if close else None


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """``"did you mean 'flips'? "``; empty if no known name is similar."""
    match = closest_match(name, known)
    return f"did you mean {match!r}? " if match is not None else ""
