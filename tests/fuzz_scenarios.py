"""Random trainings as data: what to build, and a sequence of actions on it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Slot = tuple[int, int]
"""Index of a param group, and position in it."""

# Every family of the README, with its options.
FORMATS = (
    "float8_e4m3",
    "mxfp8_e4m3",
    "e3m4",
    "int8",
    "bfloat16",
    "ternary",
    "nvfp4",
    "native",
    "float8_e5m2:row",
    "mxfp4",
    "e2m1:row",
    "int4:g32",
    "float16",
    "binary",
    "nvfp4:tensor",
    "thirds",
    "float8_e4m3:row:pow2",
    "mxfp8_e5m2:ceil",
    "e4m3:none",
    "int4",
    "float8_e5m2:pow2",
    "mxfp6_e2m3:even",
    "e0m7",
    "int2:g4",
    "float8_e4m3:row",
    "mxfp6_e3m2:rceil",
    "e5m10",
    "int8:g16",
    "float8_e4m3:pow2",
    "mxfp4:rceil",
    "e8m7:row",
    "int3",
    "float8_e5m2",
    "mxfp8_e4m3:even",
    "e6m1",
    "int6:g8",
    "mxfp6_e2m3",
    "e3m0:row",
    "mxfp6_e3m2:ceil",
    "e1m6:row",
    "mxfp8_e5m2",
    "e5m2:none",
    "mxfp4:even",
    "e7m0",
    "e4m7:none",
    "e2m5:none",
    "float8_e4m3:1x128",
    "float8_e4m3:128x128",
    "float8_e4m3:128x128:pow2",
    "format e3m4:none",
    "format e5m2:none",
)

GROUPS = ("oscillation", "coverage", "scale", "travel", "range", "rank", "sync", "touched")


def multiple_of(format: str) -> int:
    """The number that the last dimension must be a multiple of."""
    if format.startswith("mx"):
        return 32
    if format.startswith("nvfp4"):
        return 16
    return int(format.rpartition(":g")[2]) if ":g" in format else 1


@dataclass(frozen=True)
class Optimizer:
    """An optimizer class, its arguments, and its capabilities."""

    name: str
    arguments: dict[str, Any]
    takes_sparse: bool = False
    needs_sparse: bool = False
    needs_matrices: bool = False
    needs_closure: bool = False
    skips: bool = False
    """Whether it reads ``found_inf``."""

    def __str__(self) -> str:
        return f"{self.name}({', '.join(f'{name}={value}' for name, value in self.arguments.items())})"


def _optimizers(lr: float) -> list[Callable[[random.Random], Optimizer]]:
    def fused(name: str, **arguments: Any) -> Callable[[random.Random], Optimizer]:
        return lambda r: Optimizer(name, {"lr": lr, **arguments, "fused": True}, skips=True)

    def plain(name: str, **arguments: Any) -> Callable[[random.Random], Optimizer]:
        def make(r: random.Random) -> Optimizer:
            foreach = {"foreach": True} if r.random() < 0.3 and name != "Adafactor" else {}
            return Optimizer(name, {"lr": lr, **arguments, **foreach})

        return make

    return [
        lambda r: Optimizer("SGD", {"lr": lr}, takes_sparse=True),
        lambda r: Optimizer("Adagrad", {"lr": lr, "eps": 1e-4}, takes_sparse=True),
        lambda r: Optimizer("SparseAdam", {"lr": lr}, takes_sparse=True, needs_sparse=True),
        lambda r: Optimizer("Muon", {"lr": lr}, needs_matrices=True),
        lambda r: Optimizer("LBFGS", {"lr": lr, "max_iter": 2}, needs_closure=True),
        fused("AdamW", eps=1e-4),
        fused("Adam", eps=1e-4, amsgrad=True),
        # Without momentum, which torch leaves uninitialized if the first step is skipped.
        fused("SGD"),
        fused("Adagrad", eps=1e-4),
        plain("SGD", momentum=0.9, weight_decay=0.1),
        plain("SGD", momentum=0.9, nesterov=True, maximize=True),
        plain("Adam", eps=1e-4),
        plain("AdamW", eps=1e-4, weight_decay=0.1),
        plain("RMSprop", eps=1e-4, momentum=0.5),
        plain("Adamax", eps=1e-4),
        plain("NAdam", eps=1e-4),
        plain("RAdam", eps=1e-4),
        plain("ASGD"),
        plain("Adadelta", eps=1e-4),
        plain("Rprop"),
        plain("Adafactor"),
    ]


@dataclass(frozen=True)
class Parameter:
    """How to create a parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    frozen: bool = False
    sparse: bool = False
    """Whether its gradients are sparse."""

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), "x".join(map(str, self.shape)) or "scalar", self.layout]
        words += ["frozen"] * self.frozen + ["sparse gradients"] * self.sparse
        return " ".join(words)

    @property
    def is_weight(self) -> bool:
        return self.dtype.is_floating_point and 0 not in self.shape


@dataclass(frozen=True)
class Action:
    """One action of a training."""

    kind: str
    seed: int
    slot: Slot | None = None
    details: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        where = "" if self.slot is None else f" {self.slot}"
        shown = {name: value for name, value in self.details.items() if value not in (None, False, {})}
        return f"{self.kind}{where}" + "".join(f", {name}: {value}" for name, value in shown.items())


@dataclass(frozen=True)
class Scenario:
    """A training and how it is tracked."""

    seed: int
    form: str
    naming: str
    magnitude: float
    optimizer: Optimizer
    groups: tuple[tuple[Parameter, ...], ...]
    tied: str
    quantizer: Any
    options: dict[str, Any]
    logs: bool
    actions: tuple[Action, ...]

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}: {self.optimizer}, as {self.form}, names by {self.naming}"
            + (f", (0, 0) tied {self.tied}" if self.tied else ""),
            f"quantizer={self.quantizer!r}, {'a sink' if self.logs else 'sinks=[]'}"
            + "".join(f", {name}={value!r}" for name, value in self.options.items()),
        ]
        for i, group in enumerate(self.groups):
            lines += [f"  ({i}, {j}) {parameter}" for j, parameter in enumerate(group)]
        lines += [f"  {n}. {action}" for n, action in enumerate(self.actions)]
        return "\n".join(lines)


def make_scenario(seed: int) -> Scenario:
    """Create the scenario of a seed, always the same one."""
    return _Maker(seed).make()


class _Maker:
    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.random = random.Random(f"scenario {seed}")

    def chance(self, share: float) -> bool:
        return self.random.random() < share

    def make(self) -> Scenario:
        r = self.random
        magnitude = r.choice([0.02, 1.0, 1.0, 30.0])
        lr = magnitude * 10 ** r.uniform(-2.5, -0.7)
        makers = _optimizers(lr)
        # In turn, so that a few hundred seeds cover all of them.
        self.optimizer = makers[self.seed * 5 % len(makers)](r)
        formats, quantizer = self._quantizer()
        self.multiple = max(multiple_of(format) for format in formats)
        self.form = r.choice(["wrapper", "wrapper", "hooks"])
        naming = r.choice(["model", "model", "place", "param_names"])
        groups = [
            [self._weight() for _ in range(r.randint(1, 3))]
            for _ in range(1 if self._is_alone() else r.choice([1, 1, 2]))
        ]
        # The first one is always tracked and therefore never frozen.
        groups[0][0] = Parameter(
            groups[0][0].shape if len(groups[0][0].shape) > 1 else self._shape(2), groups[0][0].dtype
        )
        if self.optimizer.needs_sparse:
            groups[0][0] = Parameter(groups[0][0].shape, sparse=True)
        elif not (self._is_alone() or self.optimizer.needs_matrices):
            groups[-1] += [odd for odd in self._odd_ones() if self.chance(0.2)]
        self.groups = groups
        tied = r.choice(["", "", "before", "after"]) if naming == "model" else ""
        options = self._options()
        scenario_groups = tuple(tuple(group) for group in groups)
        actions = self._actions(options)
        return Scenario(
            self.seed,
            self.form,
            naming,
            magnitude,
            self.optimizer,
            scenario_groups,
            tied,
            quantizer,
            options,
            self.chance(0.5),
            actions,
        )

    def _is_alone(self) -> bool:
        """Whether the optimizer takes only one param group."""
        return self.optimizer.needs_closure

    def _quantizer(self) -> tuple[list[str], Any]:
        r, first = self.random, FORMATS[self.seed % len(FORMATS)]
        how = r.random()
        if how < 0.1:
            return ["float8_e4m3", "native"], "auto"
        if how < 0.55:
            return [first], first
        others = r.sample([format for format in FORMATS if format != first and not format.startswith("format")], 2)
        if how < 0.85 and not first.startswith("format"):
            listed = [first, *others[: r.randint(1, 2)]]
            return listed, listed
        return [first, others[0]], {"first": first, "*": others[0]}

    def _shape(self, dimensions: int) -> tuple[int, ...]:
        r = self.random
        last = self.multiple * r.randint(1, 3 if self.multiple < 16 else 2)
        last = max(last, r.randint(1, 9)) if self.multiple == 1 else last
        return (*(r.randint(1, 5) for _ in range(dimensions - 1)), last)[-dimensions:] if dimensions else ()

    def _weight(self) -> Parameter:
        r = self.random
        dimensions = r.choice([2, 2, 2, 2, 1, 3, 4, 4] + [0] * (self.multiple == 1))
        if self.optimizer.needs_matrices:
            dimensions = 2
        shape = self._shape(dimensions)
        if dimensions == 2 and self.chance(0.25):
            shape = (shape[-1], shape[-1])
        if self.optimizer.needs_sparse:
            return Parameter(self._shape(2), sparse=True)
        dtype = r.choice([torch.float32] * 6 + [torch.bfloat16] * 2 + [torch.float16, torch.float64])
        if self._is_alone():
            dtype = torch.float32
        sparse = self.optimizer.takes_sparse and dimensions >= 1 and dtype in (torch.float32, torch.float64)
        sparse = sparse and self.chance(0.5)
        layouts = ["contiguous"] * 3
        if not sparse:
            layouts += ["transposed"] * (dimensions == 2) + ["channels last"] * (dimensions == 4) * 3
            layouts += ["strided", "view of a storage"] * (dimensions > 0)
        return Parameter(shape, dtype, r.choice(layouts), frozen=self.chance(0.15), sparse=sparse)

    def _odd_ones(self) -> list[Parameter]:
        odd = [Parameter((0, 32)), Parameter((3, 32), torch.int32, frozen=True)]
        if self.optimizer.name in ("SGD", "Adam", "AdamW") and "fused" not in self.optimizer.arguments:
            odd.append(Parameter((3, 32), torch.complex64))
        return odd

    @staticmethod
    def marks(metrics: Any) -> bool:
        """Whether metric groups use marks."""
        return "sync" in metrics or "touched" in metrics

    def _options(self) -> dict[str, Any]:
        r = self.random
        options: dict[str, Any] = {}
        groups = [group for group in GROUPS if self.chance(0.35)] if self.chance(0.65) else []
        kind = r.random()
        if groups and kind < 0.35:
            options["metrics"] = {"flips": 1, "stalls": 1, **{group: r.randint(1, 3) for group in groups}}
        elif kind < 0.5:
            options["metrics"] = ["flips", *groups]
        elif groups:
            options["metrics"] = ["flips", "stalls", *groups]
        if "oscillation" in groups and self.chance(0.5):
            options["oscillation_ema"] = (r.choice([0.1, 0.3, 0.7]), r.choice([0.005, 0.2]))
        if self.chance(0.25):
            options["track_every"] = r.randint(2, 3)
        if self.marks(groups) and self.chance(0.4):
            options["sync_every"] = r.randint(1, 3)
        if self.chance(0.15):
            options["start_step"] = r.randint(1, 3)
        if self.chance(0.15):
            options["end_step"] = options.get("start_step", 0) + r.randint(1, 5)
        if self.chance(0.2):
            options["low_memory"] = True
        if self.chance(0.2):
            options["fresh_snapshots"] = True
        options["backend"] = r.choice(["eager", "numba", "auto", "auto"])
        options["log_every"] = r.choice([1, 2, 3, 10])
        include = r.random()
        if include < 0.6:
            options["include"] = "*"
        if self.chance(0.2) and len(self.groups) > 1:
            options["exclude"] = "second group"
        if self.chance(0.2):
            options["groups"] = {"all": "*"}
        return options

    # ------------------------------------------------------------------ actions

    def _actions(self, options: dict[str, Any]) -> tuple[Action, ...]:
        r = self.random
        actions: list[Action] = []
        steps = r.randint(3, 8)
        has_marks = self.marks(options.get("metrics", ())) and "sync_every" not in options
        if has_marks and self.chance(0.6):
            actions.append(self._action("mark"))
        for step in range(steps):
            if step:
                actions += [action for action in self._between(options) if action is not None]
            actions.append(self._step(fails=step > 0 and self.chance(0.04)))
            if has_marks and self.chance(0.5):
                actions.append(self._action("mark"))
            if self.chance(0.25):
                actions.append(self._action("record"))
        actions.append(self._action("record"))
        return tuple(actions)

    def _action(self, kind: str, slot: Slot | None = None, **details: Any) -> Action:
        return Action(kind, self.random.randrange(2**31), slot, details)

    def _slots(self, wanted: Callable[[Parameter], bool]) -> list[Slot]:
        return [(i, j) for i, group in enumerate(self.groups) for j, p in enumerate(group) if wanted(p)]

    def _step(self, fails: bool) -> Action:
        r, optimizer = self.random, self.optimizer
        grads = {}
        for slot in self._slots(lambda p: p.dtype.is_floating_point or p.dtype.is_complex):
            parameter = self.groups[slot[0]][slot[1]]
            if parameter.sparse and (optimizer.needs_sparse or self.chance(0.8)):
                grads[slot] = r.choice(["sparse rows", "sparse rows", "sparse", "none"])
            else:
                kinds = ["dense"] * 5 + ["some zeros"] * 3 + ["none", "old one", "as the weight", "zeros"]
                grads[slot] = r.choice([*kinds, *["infinite"] * (self.seed % 9 == 0)])
        if optimizer.needs_sparse:
            grads = {slot: "sparse rows" if kind == "sparse" else kind for slot, kind in grads.items()}
        closure = optimizer.needs_closure or self.chance(0.15)
        found_inf = r.choice([None, None, 0.0, 1.0]) if optimizer.skips and not fails else None
        return self._action(
            "step",
            grads=grads,
            size=r.choice([0.1, 1.0, 1.0]),
            zero_grad=r.choice(["set_to_none", "zero", "default", "not called"]),
            closure="raises" if fails else "gives gradients" if closure else None,
            found_inf=found_inf,
        )

    def _between(self, options: dict[str, Any]) -> list[Action | None]:
        r = self.random
        weights = self._slots(lambda p: p.is_weight)
        found: list[Action | None] = []
        if self.chance(0.15):
            found.append(self._action("write", r.choice(weights)))
        if options.get("fresh_snapshots") and self.chance(0.4):
            found.append(self._action("write through .data", r.choice(weights)))
        if self.chance(0.12):
            found.append(
                self._action("swap .data", r.choice(weights), how=r.choice(["copy", "other", "strided", "view"]))
            )
        squares = self._slots(lambda p: p.is_weight and len(p.shape) == 2 and p.shape[0] == p.shape[1] > 1)
        if squares and self.chance(0.25):
            found.append(self._action("transpose .data", r.choice(squares)))
        images = self._slots(lambda p: p.is_weight and len(p.shape) == 4)
        if images and self.chance(0.15):
            found.append(self._action("channels last .data", r.choice(images)))
        others = [slot for slot in weights if slot != (0, 0)]
        if others and self.chance(0.5 if self.optimizer.skips else 0.15):
            # Fused optimizers change frozen weights without changing their versions. Often take the same one, so that
            # it is unfrozen again.
            found.append(self._action("freeze or unfreeze", others[0] if self.optimizer.skips else r.choice(others)))
        if self.chance(0.12):
            found.append(self._action("replace", r.choice(weights)))
        if not self._is_alone() and self.chance(0.1):
            self.groups.append([self._weight() for _ in range(r.randint(1, 2))])
            found.append(self._action("add group", parameters=tuple(self.groups[-1])))
        if self.chance(0.1):
            found.append(self._action("load into itself"))
        if self.chance(0.12):
            copies = ["deepcopy", "pickle"] if self.form == "wrapper" else []
            found.append(self._action(r.choice(["checkpoint", "checkpoint", *copies])))
        if self.chance(0.1):
            found.append(self._action("record"))
        return found


def make_weight(parameter: Parameter, magnitude: float, generator: torch.Generator) -> Tensor:
    """Create a tensor. The caller combines several for the layout ``"view of a storage"``."""
    shape, dtype = parameter.shape, parameter.dtype
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.zeros(shape, dtype=dtype)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude
    if shape and torch.rand((), generator=generator) < 0.3:
        values[torch.rand(shape, generator=generator) < 0.2] = 0.0
    values = values.to(dtype)
    if parameter.layout == "transposed":
        return values.t().contiguous().t()
    if parameter.layout == "channels last":
        return values.to(memory_format=torch.channels_last)
    if parameter.layout == "strided":
        wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)
        wide[..., ::2] = values
        return wide[..., ::2]
    return values
