"""Rules for selecting parameters: the user's globs over names, and what makes a parameter impossible to track."""

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
        reason: Shown to the user.
        is_mismatch: Whether the user named a format that does not fit the weight.
        unknown_class: A torchao class that weightflip does not support; logged once.
    """

    is_from_model = False
    """Whether the reason comes from the model, which a copy of the optimizer does not have."""

    is_expected = False
    """Whether this is not a mistake in the call: other processes hold the weights, or a later step will."""

    note: str | None = None
    """A sentence for the user in addition to the reason."""

    def __init__(self, reason: str, *, is_mismatch: bool = False, unknown_class: str | None = None) -> None:
        super().__init__(reason)
        self.is_mismatch = is_mismatch
        self.unknown_class = unknown_class


@dataclass(frozen=True)
class Selection:
    """Which weights to track, with which quantizers, as the user wrote it.

    Attributes:
        quantizer: ``"auto"``, a name, an object, a function, a list of these, or a mapping from globs over names to
            any of them; the first glob that matches counts.
        include: Globs over names; None for every floating-point weight that has two or more dimensions, or had them
            before it was flattened.
        exclude: Globs over names.
    """

    quantizer: Any = "auto"
    include: str | Sequence[str] | None = None
    exclude: str | Sequence[str] | None = None


class Rules:
    """A selection with its globs and quantizers resolved.

    Attributes:
        include: Globs over names; empty if the user gave none.

    Raises:
        ValueError: An unknown quantizer, or an empty mapping.
        TypeError: An object that is not a quantizer or a glob.
    """

    def __init__(self, selection: Selection) -> None:
        self._quantizers = _resolve_rules(selection.quantizer)
        self._is_mapping = isinstance(selection.quantizer, Mapping)
        self.include = globs("include", selection.include)
        self._exclude = globs("exclude", selection.exclude)

    @property
    def has_patterns(self) -> bool:
        """Whether the user gave any globs."""
        return bool(self.include or self._exclude) or self._is_mapping

    def check(self, names: Iterable[str]) -> None:
        """Raise ValueError for a glob that matches none of the names."""
        names = list(names)
        check_globs("quantizer", list(self._quantizers) if self._is_mapping else [], names)
        check_globs("include", self.include, names)
        check_globs("exclude", self._exclude, names)

    def check_trackable(self, name: str, parameter: Tensor, original_ndim: int | None) -> None:
        """Check that the globs and the parameter itself allow tracking.

        Args:
            name: Matched against the globs.
            parameter: The parameter.
            original_ndim: Number of dimensions before it was flattened; None if it was not.

        Raises:
            Skip: The parameter is not tracked.
        """
        if _matches_any(name, self._exclude):
            raise Skip("excluded")
        if self.include and not _matches_any(name, self.include):
            raise Skip("not included")
        if nn.parameter.is_lazy(parameter):
            raise expected_skip("not initialized yet")
        ndim = parameter.ndim if original_ndim is None else original_ndim
        if not self.include and ndim < 2:
            raise Skip(f"{ndim}-dimensional (name it in include= to track it)")
        if not parameter.is_floating_point():
            raise Skip(f"dtype {dtype_name(parameter)} is not floating-point")
        if parameter.is_meta:
            raise expected_skip("on the meta device, without data yet")
        if parameter.numel() == 0 and original_ndim is None:
            raise Skip("empty")
        if parameter.layout is not torch.strided:
            raise Skip(f"layout {parameter.layout} is not strided")
        if not parameter.requires_grad:
            raise Skip("frozen (requires_grad=False)")

    def specs_for(self, name: str) -> tuple[Any, ...]:
        """Return the quantizers of the first glob that matches.

        Raises:
            Skip: No glob matches.
        """
        for glob, specs in self._quantizers.items():
            if fnmatchcase(name, glob):
                return specs
        raise Skip("no pattern in quantizer= matches; add '*' for the rest")


def _resolve_rules(quantizer: Any) -> dict[str, tuple[Any, ...]]:
    """Map each glob to its quantizers, resolved or "auto"."""
    rules = dict(quantizer) if isinstance(quantizer, Mapping) else {"*": quantizer}
    if not rules:
        raise ValueError(
            "quantizer= must map globs over names to quantizers, such as {'*': 'auto'}; got an empty mapping"
        )
    for glob in rules:
        if not isinstance(glob, str):
            raise TypeError(
                f"quantizer= must map globs over names, such as 'blocks.*', to quantizers; got the key {describe(glob)}"
            )
    return {glob: _resolve_specs(specs) for glob, specs in rules.items()}


def _resolve_specs(specs: Any) -> tuple[Any, ...]:
    found = tuple(
        spec if isinstance(spec, str) and spec == "auto" else resolve(spec)
        for spec in (specs if isinstance(specs, (list, tuple)) else [specs])
    )
    names = [spec if isinstance(spec, str) else quantizer_name(spec) for spec in found]
    if not found or len(set(names)) < len(names):
        raise ValueError(
            f"quantizer= must be a list of different quantizers, got {names}; give each object or function its own name"
        )
    return found


def make_layer_groups(
    groups: Mapping[str, str | Sequence[str]] | str | None,
    names: Sequence[str],
    types: Mapping[str, str],
    *,
    tracked: Sequence[str] = (),
    strict: bool = True,
) -> dict[str, tuple[str, ...]]:
    """Map the name of each layer group to the names of its parameters.

    Args:
        groups: Name to globs over parameter names; ``"type"`` for one layer group per module type; ``"blocks"`` for one
            per repeated model block; None for ``"blocks"`` if more than 30 weights are tracked, else no layer groups.
        names: Names of the parameters.
        types: Parameter name to the type of its module. With ``"type"``, a parameter without one is in no layer group.
        tracked: Names of the tracked parameters, among which model blocks are found.
        strict: Whether a glob that matches nothing is an error.

    Returns:
        The layer groups, in the order in which they were given or first found.

    Raises:
        ValueError: If ``strict``: a glob that matches nothing, or ``"type"`` without types.
    """
    if groups is None or groups == "blocks":
        return blocks_of(tracked) if groups or len(tracked) > MANY_LAYERS else {}
    if isinstance(groups, str):
        if strict and not types:
            raise ValueError("groups='type' needs the model's modules; pass model=, or globs over parameter names")
        found: dict[str, tuple[str, ...]] = {}
        for name in names:
            if name in types:
                found[types[name]] = (*found.get(types[name], ()), name)
        return found
    rules = {group: globs(f"groups[{group!r}]", matching) for group, matching in groups.items()}
    if strict:
        for matching in rules.values():
            check_globs("groups", matching, names)
    return {group: tuple(name for name in names if _matches_any(name, matching)) for group, matching in rules.items()}


def check_globs(option: str, globs: Sequence[str], names: Iterable[str]) -> None:
    """Raise ValueError for a glob that matches no name."""
    names = list(names)
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"the pattern {glob!r} in {option}= matches none of the {len(names)} parameters: {shown}")


def _matches_any(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def expected_skip(reason: str) -> Skip:
    """Return a Skip that is not a mistake in the call: other processes hold the weights, or a later step will."""
    skip = Skip(reason)
    skip.is_expected = True
    return skip


def dtype_name(parameter: Tensor) -> str:
    """Return the name without the module, such as ``"float32"``."""
    return str(parameter.dtype).removeprefix("torch.")
