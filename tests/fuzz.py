"""Run random trainings twice, bare and tracked: ``python tests/fuzz.py --seed 17``, or ``--seed 0 --count 3000``."""

from __future__ import annotations

import argparse
import copy
import io
import logging
import pickle
import random
import sys
import time
import warnings
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch
from fuzz_oracles import BruteForce, Difference, TrackedWeight, assert_equal, oracle_of, thirds
from fuzz_scenarios import Action, Parameter, Scenario, Slot, make_scenario, make_weight
from torch import Tensor, nn

from weightflip import FlipTrackingOptimizer, track_flips
from weightflip.formats import exmy

RECORDS: list[Any] = []


def collect(record: Any) -> None:
    """A sink. A module-level function, which copies of an optimizer share."""
    RECORDS.append(record)


class _Raised(Exception):
    """Raised by a closure."""


class _Holder(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class Training:
    """One of the two trainings."""

    def __init__(self, scenario: Scenario, tracked: bool) -> None:
        self.scenario, self.tracked = scenario, tracked
        generator = torch.Generator().manual_seed(scenario.seed)
        groups = [self._parameters(group, generator) for group in scenario.groups]
        self.sparse = [[p.sparse for p in group] for group in scenario.groups]
        options = scenario.options
        metrics = options.get("metrics", ("flips", "stalls"))
        default = {"rank": 500}
        every = metrics if isinstance(metrics, dict) else {name: default.get(name, 1) for name in metrics}
        self.brute = BruteForce(
            {name: n for name, n in every.items() if name not in ("flips", "stalls")},
            "stalls" in metrics,
            (options.get("track_every", 1), options.get("start_step", 0), options.get("end_step")),
            options.get("oscillation_ema"),
            options.get("sync_every"),
        )
        self.log_calls = 0
        self.optimizer: Any = None
        self._build(groups)

    def _parameters(self, group: tuple[Parameter, ...], generator: torch.Generator) -> list[nn.Parameter]:
        made = [make_weight(p, self.scenario.magnitude, generator) for p in group]
        for dtype in {p.dtype for p in group}:
            views = [k for k, p in enumerate(group) if p.layout == "view of a storage" and p.dtype is dtype]
            storage = torch.cat([torch.zeros(3, dtype=dtype), *(made[k].flatten() for k in views)])
            start = 3
            for k in views:
                made[k] = storage[start : start + made[k].numel()].view(made[k].shape)
                start += made[k].numel()
        return [nn.Parameter(w, requires_grad=not p.frozen) for w, p in zip(made, group, strict=True)]

    def _build(self, groups: list[list[nn.Parameter]]) -> None:
        scenario = self.scenario
        self.model = nn.Module() if scenario.naming == "model" else None
        self.names: dict[Slot, str] = {}
        for i, group in enumerate(groups):
            self._name(i, group, knows_model=True)
        param_groups = [self._group(i, group) for i, group in enumerate(groups)]
        cls = getattr(torch.optim, scenario.optimizer.name)
        params = param_groups[0]["params"] if len(param_groups) == 1 else param_groups
        self.inner = cls(params, **scenario.optimizer.arguments)
        self.is_copy = False
        self.known = set(self.names)
        """Slots whose names tracking has used. A copy has no model, and names the others by their position."""
        self._track()

    def _name(self, i: int, group: list[nn.Parameter], *, knows_model: bool) -> None:
        naming, tied = self.scenario.naming, self.scenario.tied
        for j, parameter in enumerate(group):
            if self.model is not None:
                module = f"group{i}_{j}"
                if tied == "before" and (i, j) == (0, 0):
                    self.model.add_module("group0_tied", _Holder(parameter))
                self.model.add_module(module, _Holder(parameter))
                name = "group0_tied.weight" if tied == "before" and (i, j) == (0, 0) else f"{module}.weight"
                self.names[i, j] = name if knows_model else f"group{i}.param{j}"
                if tied == "after" and (i, j) == (0, 0):
                    self.model.add_module("group0_tied", _Holder(parameter))
            else:
                self.names[i, j] = f"group{i}.param{j}" if naming == "place" else f"group{i}.name{j}"

    def _group(self, i: int, group: list[nn.Parameter]) -> dict[str, Any]:
        named = self.scenario.naming == "param_names"
        return {"params": [(self.names[i, j], p) for j, p in enumerate(group)] if named else list(group)}

    # ------------------------------------------------------------------ tracking

    def _track(self) -> None:
        self.optimizer, self.handle = self.inner, None
        if not self.tracked:
            return
        scenario = self.scenario
        options = dict(scenario.options, sinks=[collect] if scenario.logs else [])
        if "exclude" in options:
            if any(self._is_excluded(name) for name in self.names.values()):
                options["exclude"] = "group1*"
            else:
                del options["exclude"]
        quantizer = scenario.quantizer
        if isinstance(quantizer, dict):
            quantizer = {"group0*": self._spec(quantizer["first"]), "*": self._spec(quantizer["*"])}
        elif isinstance(quantizer, list):
            quantizer = [self._spec(name) for name in quantizer]
        else:
            quantizer = self._spec(quantizer)
        if scenario.form == "wrapper":
            self.optimizer = FlipTrackingOptimizer(self.inner, self.model, quantizer=quantizer, **options)
        else:
            self.handle = track_flips(self.inner, self.model, quantizer=quantizer, **options)

    @staticmethod
    def _spec(name: str) -> Any:
        if name == "thirds":
            return thirds
        return exmy(name.removeprefix("format ").partition(":")[0]) if name.startswith("format ") else name

    @property
    def tracker(self) -> Any:
        return self.optimizer.tracker if self.handle is None else self.handle.tracker

    def _is_excluded(self, name: str) -> bool:
        return "exclude" in self.scenario.options and fnmatchcase(name, "group1*")

    def tracked_weights(self) -> list[TrackedWeight]:
        """The weights that must be tracked now, with their oracles."""
        found = []
        for slot, name in self.names.items():
            p = self.parameter(slot)
            is_wanted = "include" in self.scenario.options or p.ndim >= 2
            is_weight = p.is_floating_point() and p.numel() > 0 and p.requires_grad
            if not (is_wanted and is_weight) or self._is_excluded(name):
                continue
            quantizer = self.scenario.quantizer
            if isinstance(quantizer, dict):
                quantizer = quantizer["first" if name.startswith("group0") else "*"]
            if quantizer == "auto":
                quantizer = "native" if p.dtype in (torch.bfloat16, torch.float16) else "float8_e4m3"
            for format in quantizer if isinstance(quantizer, list) else [quantizer]:
                variant = f"{name}@{format.removesuffix(':floor')}" if isinstance(quantizer, list) else name
                found.append(TrackedWeight(variant, p, oracle_of(format.removeprefix("format "))))
        return found

    def signature(self) -> list[tuple[object, ...]]:
        return [(id(self.parameter(slot)), self.parameter(slot).requires_grad) for slot in self.names]

    def parameter(self, slot: Slot) -> nn.Parameter:
        return self.optimizer.param_groups[slot[0]]["params"][slot[1]]

    # ------------------------------------------------------------------ actions

    def do(self, action: Action) -> None:
        torch.manual_seed(action.seed)
        generator = torch.Generator().manual_seed(action.seed)
        getattr(self, "_" + action.kind.replace(" ", "_").replace(".", ""))(action, generator)
        if self.tracked and action.kind != "record":
            self.brute.check_totals(self.tracker)

    def _step(self, action: Action, generator: torch.Generator) -> None:
        details = action.details
        if details["zero_grad"] == "default":
            self.optimizer.zero_grad()
        elif details["zero_grad"] != "not called":
            self.optimizer.zero_grad(set_to_none=details["zero_grad"] == "set_to_none")
        made = {slot: self._gradient(slot, kind, details["size"], generator) for slot, kind in details["grads"].items()}

        def give() -> None:
            for slot, kind in details["grads"].items():
                if kind != "old one":
                    gradient = made[slot]
                    self.parameter(slot).grad = None if gradient is None else gradient.clone()

        def closure() -> Tensor:
            give()
            if details["closure"] == "raises":
                raise _Raised
            return torch.tensor(1.0)

        if not details["closure"]:
            give()
        if details["found_inf"] is not None:
            self.optimizer.grad_scale, self.optimizer.found_inf = None, torch.tensor(details["found_inf"])
        if self.tracked:
            if self.brute.is_tracking:
                self.known.update(self.names)
            self.brute.before(self.tracked_weights(), self.signature())
        try:
            self.optimizer.step(closure) if details["closure"] else self.optimizer.step()
        except _Raised:
            # No hook runs then, so the handle keeps the parameters until the next step.
            self.brute.are_held = self.handle is not None and self.brute.is_tracking
            self.brute.is_in_step = self.handle is not None
            return
        finally:
            if details["found_inf"] is not None:
                del self.optimizer.grad_scale, self.optimizer.found_inf
        if self.tracked:
            self.brute.after(details["found_inf"] != 1.0, self.tracked_weights())
            self.log_calls += 1
            if self.scenario.logs and self.log_calls % self.scenario.options["log_every"] == 0:
                self._check_written()

    def _check_written(self, *, is_last: bool = False) -> None:
        written, RECORDS[:] = list(RECORDS), []
        assert_equal("number of records", len(written), min(len(written), 1))
        self.brute.check_record(written[0] if written else None, self.signature(), is_last=is_last)

    def _gradient(self, slot: Slot, kind: str, size: float, generator: torch.Generator) -> Tensor | None:
        weight = self.parameter(slot).detach()
        if kind in ("none", "old one"):
            return None
        dense = torch.randn(weight.shape, generator=generator, dtype=torch.float64).mul_(size).to(weight.dtype)
        if kind == "zeros":
            return torch.zeros_like(dense)
        if kind == "some zeros" and dense.ndim:
            dense[torch.rand(dense.shape, generator=generator) < 0.5] = 0
        if kind == "infinite" and dense.ndim and dense.numel():
            dense.view(-1)[0] = float("inf")
        if kind == "as the weight":
            return torch.empty_like(weight).copy_(dense)
        if kind.startswith("sparse"):
            at = torch.randint(weight.shape[0], (3,), generator=generator)
            if kind == "sparse":
                at = torch.stack([torch.randint(n, (5,), generator=generator) for n in weight.shape])
                values = torch.randn(5, generator=generator).mul_(size)
            else:
                values = torch.randn(3, *weight.shape[1:], generator=generator).mul_(size)
            values.view(-1)[::4] = 0
            # Some rows occur twice.
            return torch.sparse_coo_tensor(at if at.ndim > 1 else at[None], values.to(weight.dtype), weight.shape)
        return dense

    def _record(self, action: Action, generator: torch.Generator) -> None:
        if self.tracked:
            self.brute.check_record(self.tracker.record(), self.signature())

    def _mark(self, action: Action, generator: torch.Generator) -> None:
        if self.tracked:
            self.tracker.mark_sync()
            self.brute.mark(self.tracked_weights())

    def _write(self, action: Action, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.parameter(action.slot).mul_(0.9).add_(0.01 * self.scenario.magnitude)

    def _write_through_data(self, action: Action, generator: torch.Generator) -> None:
        self.parameter(action.slot).data.mul_(1.1).sub_(0.03 * self.scenario.magnitude)

    def _swap_data(self, action: Action, generator: torch.Generator) -> None:
        parameter = self.parameter(action.slot)
        how = action.details["how"]
        values = parameter.data.clone()
        if how == "other":
            values = values * 0.8 + 0.02 * self.scenario.magnitude
        elif how == "strided" and values.ndim:
            values = torch.stack([values, values], -1)[..., 0]
        elif how == "view":
            values = torch.cat([values.flatten()[:1], values.flatten()])[1:].view(values.shape)
        parameter.data = values.to(parameter.dtype)

    def _transpose_data(self, action: Action, generator: torch.Generator) -> None:
        self.parameter(action.slot).data = self.parameter(action.slot).data.t()

    def _channels_last_data(self, action: Action, generator: torch.Generator) -> None:
        parameter = self.parameter(action.slot)
        parameter.data = parameter.data.to(memory_format=torch.channels_last)

    def _freeze_or_unfreeze(self, action: Action, generator: torch.Generator) -> None:
        parameter = self.parameter(action.slot)
        parameter.requires_grad_(not parameter.requires_grad)

    def _replace(self, action: Action, generator: torch.Generator) -> None:
        old = self.parameter(action.slot)
        new = nn.Parameter(old.detach() * 0.7 + 0.01 * self.scenario.magnitude, requires_grad=old.requires_grad)
        i, j = action.slot
        self.optimizer.param_groups[i]["params"][j] = new
        if old in self.inner.state:
            self.inner.state[new] = self.inner.state.pop(old)
        for module in self.model.modules() if self.model is not None else ():
            if isinstance(module, _Holder) and module.weight is old:
                module.weight = new

    def _add_group(self, action: Action, generator: torch.Generator) -> None:
        parameters = self._parameters(action.details["parameters"], generator)
        i = len(self.optimizer.param_groups)
        self._name(i, parameters, knows_model=self.model is not None and not self.is_copy)
        self.optimizer.add_param_group(self._group(i, parameters))

    def _load_into_itself(self, action: Action, generator: torch.Generator) -> None:
        self.optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        self.brute.restart()

    def _checkpoint(self, action: Action, generator: torch.Generator) -> None:
        file = io.BytesIO()
        torch.save(self.optimizer.state_dict(), file)
        file.seek(0)
        groups = [
            [nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad) for p in group["params"]]
            for group in self.optimizer.param_groups
        ]
        self._leave()
        self._build(groups)
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        self.brute.restart()

    def _leave(self) -> None:
        """End the optimizer, which writes its last record."""
        if self.tracked:
            self.close()
            if self.scenario.logs:
                self._check_written(is_last=True)

    def close(self) -> None:
        (self.optimizer if self.handle is None else self.handle).close()

    def _deepcopy(self, action: Action, generator: torch.Generator) -> None:
        self._continue_with(copy.deepcopy((self.optimizer, self.model)))

    def _pickle(self, action: Action, generator: torch.Generator) -> None:
        self._continue_with(pickle.loads(pickle.dumps((self.optimizer, self.model))))

    def _continue_with(self, made: tuple[Any, nn.Module | None]) -> None:
        self._leave()
        self.optimizer, self.model = made
        self.inner = self.optimizer.inner if self.tracked else self.optimizer
        self.is_copy = True
        if self.model is not None:
            self.names.update({(i, j): f"group{i}.param{j}" for i, j in self.names if (i, j) not in self.known})
        self.brute.current = []


def same_bits(what: str, a: Any, b: Any) -> None:
    """Compare bit for bit: NaN equals NaN with the same bits."""
    if isinstance(a, Tensor):
        assert_equal(what, (b.shape, b.dtype, b.layout), (a.shape, a.dtype, a.layout))
        if a.layout is not torch.strided:
            a, b = a.to_dense(), b.to_dense()
        a, b = (torch.view_as_real(x) if x.is_complex() else x for x in (a.detach(), b.detach()))
        if not torch.equal(
            *(x.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8) for x in (a, b))
        ):
            raise Difference(f"{what}: training has changed")
    elif isinstance(a, dict):
        assert_equal(f"{what}: keys", list(b), list(a))
        for key in a:
            same_bits(f"{what}[{key!r}]", a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert_equal(f"{what}: length", len(b), len(a))
        for n, (x, y) in enumerate(zip(a, b, strict=True)):
            same_bits(f"{what}[{n}]", x, y)
    elif a == a:
        assert_equal(what, b, a)


def _state(training: Training) -> dict[str, Any]:
    groups = training.optimizer.param_groups
    return {
        "parameters": [list(group["params"]) for group in groups],
        "gradients": [[p.grad for p in group["params"]] for group in groups],
        "optimizer": training.inner.state_dict()["state"],
        "random numbers": torch.get_rng_state(),
    }


def run(scenario: Scenario) -> bool:
    """Run both trainings, step by step.

    Returns:
        Whether they ran to the end; False if the bare training itself failed.

    Raises:
        Difference: The message says what differs, and after which action.
    """
    RECORDS.clear()
    trainings = [Training(scenario, tracked) for tracked in (False, True)]
    try:
        return _run(scenario, trainings)
    finally:
        # Otherwise its last record is written at garbage collection, among those of another scenario.
        trainings[1].close()


def _run(scenario: Scenario, trainings: list[Training]) -> bool:
    others = random.getstate(), np.random.get_state()[1].tobytes()
    for n, action in enumerate(scenario.actions):
        states, messages = [], []
        bare_error: Exception | None = None
        for training in trainings:
            with warnings.catch_warnings(record=True) as caught, np.errstate(all="ignore"):
                warnings.simplefilter("always")
                try:
                    training.do(action)
                except Difference as difference:
                    raise Difference(f"after action {n}, {action.kind}: {difference}") from None
                except Exception as error:
                    if training.tracked and type(bare_error) is not type(error):
                        raise Difference(f"action {n}, {action.kind}: {type(error).__name__}: {error}") from error
                    bare_error = error
                else:
                    if bare_error is not None:
                        raise Difference(f"action {n}, {action.kind}: only the bare training raises {bare_error!r}")
            states.append(_state(training))
            messages.append([str(warning.message) for warning in caught])
        try:
            same_bits("", *states)
        except Difference as difference:
            raise Difference(f"after action {n}, {action.kind}: {difference}") from None
        if added := [text for text in messages[1] if text not in messages[0]]:
            raise Difference(f"after action {n}, {action.kind}: warns {added[0]!r}")
        if bare_error is not None:
            return False
    assert_equal("other random numbers", (random.getstate(), np.random.get_state()[1].tobytes()) == others, True)
    return True


def difference_in(scenario: Scenario) -> str | None:
    """Return what differs; None if nothing does."""
    try:
        run(scenario)
    except Difference as difference:
        return str(difference)
    return None


def minimal(scenario: Scenario, tries: int = 80) -> Scenario:
    """Remove the actions and options that a difference does not need."""
    is_smaller = True
    while is_smaller:
        is_smaller = False
        candidates = [
            replace(scenario, actions=scenario.actions[:n] + scenario.actions[n + 1 :])
            for n in reversed(range(len(scenario.actions)))
            if scenario.actions[n].kind != "add group"
        ]
        for name in scenario.options.keys() - {"log_every"}:
            candidates.append(replace(scenario, options={k: v for k, v in scenario.options.items() if k != name}))
        for candidate in candidates:
            if tries <= 0:
                return scenario
            tries -= 1
            try:
                differs = difference_in(candidate) is not None
            except Exception:
                # No longer a valid scenario.
                continue
            if differs:
                scenario, is_smaller = candidate, True
                break
    return scenario


def check(seed: int) -> bool:
    """Run the scenario of a seed.

    Returns:
        Whether it ran to the end.

    Raises:
        Difference: The message includes the smallest scenario found that has a difference.
    """
    scenario = make_scenario(seed)
    try:
        return run(scenario)
    except Difference as difference:
        small = minimal(scenario)
        raise Difference(
            f"{difference}\n\nThe smallest scenario found: {difference_in(small)}\n{small}\n\n"
            f"To repeat: python tests/fuzz.py --seed {seed}"
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--count", type=int, default=1, help="how many consecutive seeds to run")
    parser.add_argument("--show", action="store_true", help="also print the scenarios")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    # Silences the note on plain float32 weights, which would appear each time.
    logging.getLogger("weightflip").setLevel(logging.ERROR)
    began, failed, cut = time.perf_counter(), [], 0
    for seed in range(arguments.seed, arguments.seed + arguments.count):
        if arguments.show:
            print(make_scenario(seed))
        try:
            cut += not check(seed)
        except Difference as difference:
            failed.append(seed)
            print(f"seed {seed}: {difference}\n", flush=True)
    print(
        f"{arguments.count} scenarios from seed {arguments.seed} in {time.perf_counter() - began:.0f} s: "
        f"{len(failed)} differ {failed or ''}, {cut} cut short by an error of the bare training"
    )
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
