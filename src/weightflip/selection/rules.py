"""What the user and the parameter itself say: globs over names, and a reason for each weight that is not tracked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from weightflip.checks import describe, globs
from weightflip.overview import MANY_LAYERS, blocks_of
from weightflip.quantizers import resolve
from weightflip.quantizers.adapt import quantizer_name


class Skip(Exception):
    """A parameter cannot be tracked; the message says why.

    Args:
        reason: For people.
        misfit: Whether the user asked for a format that the weight does not fit.
        unknown: A class of torchao's that weightflip should know and does not; said once in the log.
    """

    is_of_model = False
    """Whether it is the model that says so, which a copy of an optimizer cannot ask."""

    is_elsewhere = False
    """Whether other processes, or later steps, have the weights: no fault of the call."""

    note: str | None = None
    """A sentence that is worth reading beside the reason."""

    def __init__(self, reason: str, *, misfit: bool = False, unknown: str | None = None) -> None:
        super().__init__(reason)
        self.misfit = misfit
        self.unknown = unknown


@dataclass(frozen=True)
class Selection:
    """Which weights are to be tracked, as what.

    Attributes:
        quantizer: ``"auto"``, a name, an object, a function, a list of these, or a mapping from globs over names to
            any of them, of which the first that matches counts.
        include: Globs over names; None for every floating-point weight that has two dimensions or more, or had them
            before it was made flat.
        exclude: Globs over names.
    """

    quantizer: Any = "auto"
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None


class Rules:
    """A selection, resolved.

    Attributes:
        include: Globs over names; none for those that need no name.

    Raises:
        ValueError: An unknown quantizer, or an empty mapping.
        TypeError: Something that is no quantizer, or no glob.
    """

    def __init__(self, selection: Selection) -> None:
        self._quantizers = _resolved(selection.quantizer)
        self._is_mapping = isinstance(selection.quantizer, Mapping)
        self.include = globs("include", selection.include)
        self._exclude = globs("exclude", selection.exclude)

    @property
    def has_patterns(self) -> bool:
        """Whether the user wrote any."""
        return bool(self.include or self._exclude) or self._is_mapping

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError for a glob that matches none of the names."""
        names = list(names)
        check_globs("quantizer", list(self._quantizers) if self._is_mapping else [], names)
        check_globs("include", self.include, names)
        check_globs("exclude", self._exclude, names)

    def check_trackable(self, name: str, parameter: Tensor, ndim_before: int | None) -> None:
        """What the parameter itself and its name say; and its dimensions before it was made flat, if it was.

        Raises:
            Skip: It is not tracked.
        """
        if _matches(name, self._exclude):
            raise Skip("excluded")
        if self.include and not _matches(name, self.include):
            raise Skip("not included")
        if nn.parameter.is_lazy(parameter):
            raise elsewhere("not initialised yet")
        ndim = parameter.ndim if ndim_before is None else ndim_before
        if not self.include and ndim < 2:
            raise Skip(f"{ndim}-dimensional (name it in include= to track it)")
        if not parameter.is_floating_point():
            raise Skip(f"dtype {dtype_name(parameter)} is not floating-point")
        if parameter.is_meta:
            raise elsewhere("on the meta device, without data yet")
        if parameter.numel() == 0 and ndim_before is None:
            raise Skip("empty")
        if parameter.layout is not torch.strided:
            raise Skip(f"layout {parameter.layout} is not strided")
        if not parameter.requires_grad:
            raise Skip("frozen (requires_grad=False)")

    def specs_of(self, name: str) -> tuple[Any, ...]:
        """What the first rule that matches says.

        Raises:
            Skip: None does.
        """
        for glob, specs in self._quantizers.items():
            if fnmatchcase(name, glob):
                return specs
        raise Skip("no pattern in quantizer= matches; add '*' for the rest")


def _resolved(quantizer: Any) -> dict[str, tuple[Any, ...]]:
    """Glob to quantizers, each resolved or "auto"."""
    rules = dict(quantizer) if isinstance(quantizer, Mapping) else {"*": quantizer}
    if not rules:
        raise ValueError("quantizer= is an empty mapping; expected globs over names, such as {'*': 'auto'}")
    for glob in rules:
        if not isinstance(glob, str):
            raise TypeError(
                f"quantizer= maps globs over names, such as 'blocks.*', to quantizers; got the key {describe(glob)}"
            )
    return {glob: _specs(specs) for glob, specs in rules.items()}


def _specs(specs: Any) -> tuple[Any, ...]:
    found = tuple(
        spec if isinstance(spec, str) and spec == "auto" else resolve(spec)
        for spec in (specs if isinstance(specs, (list, tuple)) else [specs])
    )
    names = [spec if isinstance(spec, str) else quantizer_name(spec) for spec in found]
    if not found or len(set(names)) < len(names):
        raise ValueError(
            f"quantizer= takes a list of different quantizers, got {names}; objects and functions need a name each"
        )
    return found


def make_groups(
    groups: Mapping[str, str | Sequence[str]] | str | None,
    names: Sequence[str],
    types: Mapping[str, str],
    *,
    tracked: Sequence[str] = (),
    strict: bool = True,
) -> dict[str, tuple[str, ...]]:
    """Name of each group of layers to the parameters in it.

    Args:
        groups: Name to globs over parameter names; ``"type"`` for a group of each type; ``"blocks"`` for one of each
            repeated block; None for blocks where more than 30 weights are tracked, else none.
        names: Of the parameters.
        types: Name to the type of the module that holds the parameter; what has none is in no group.
        tracked: Those of the parameters that blocks are found among.
        strict: Whether a glob that matches nothing is an error.

    Returns:
        The groups, in the order in which they were given, or first met.

    Raises:
        ValueError: If ``strict``: a glob that matches nothing, or ``"type"`` without types.
    """
    if groups is None or groups == "blocks":
        return blocks_of(tracked) if groups or len(tracked) > MANY_LAYERS else {}
    if isinstance(groups, str):
        if strict and not types:
            raise ValueError("groups='type' looks at the model's modules; pass model=, or globs over parameter names")
        found: dict[str, tuple[str, ...]] = {}
        for name in names:
            if name in types:
                found[types[name]] = (*found.get(types[name], ()), name)
        return found
    rules = {group: globs(f"groups[{group!r}]", matching) for group, matching in groups.items()}
    if strict:
        for matching in rules.values():
            check_globs("groups", matching, names)
    return {group: tuple(name for name in names if _matches(name, matching)) for group, matching in rules.items()}


def check_globs(option: str, globs: Sequence[str], names: Iterable[str]) -> None:
    """Raise ValueError for a glob that matches no name."""
    names = list(names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"the pattern {glob!r} in {option}= matches none of the {len(names)} parameters: {shown}")


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def elsewhere(reason: str) -> Skip:
    """Other processes, or later steps, have the weights."""
    skip = Skip(reason)
    skip.is_elsewhere = True
    return skip


def dtype_name(parameter: Tensor) -> str:
    """As people write it: ``"float32"``."""
    return str(parameter.dtype).removeprefix("torch.")
