"""A compiled kernel is used only where it was shown to count as plain torch does, and faster where that is asked."""

from __future__ import annotations

import ast
import ctypes
import functools
import logging
import time
from pathlib import Path

import pytest
import torch
from conftest import case
from kernel_cases import QUANTIZERS, hard_numbers

from weightflip import FlipTrackingOptimizer, kernels
from weightflip.counting.scaling import get_scaling, in_plain_torch
from weightflip.formats import IntegerRounding
from weightflip.kernels import backend, cpu, items, proof, runs
from weightflip.kernels.constants import Lanes
from weightflip.kernels.pointwise import NEW, NEW_UNDER_OLD_SCALE, OLD, Pointwise, bit, differ, state, where
from weightflip.kernels.runs import Kind
from weightflip.quantizers import block, resolve

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_tried_yet(monkeypatch):
    monkeypatch.setattr(proof, "_answers", {})


def take_instead(monkeypatch, kernel):
    monkeypatch.setattr(backend, "_compiled", lambda name: backend._Compiled(kernel, "cpu"))


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, "mxfp6_e2m3", "nvfp4", "ternary", "native"], ids=str)
def test_the_table_says_what_plain_torch_does(quantizer):
    quantizer, numbers = resolve(quantizer), hard_numbers().view(-1, 32)
    for weight in (numbers, numbers.bfloat16()) if quantizer.name == "native" else (numbers,):
        assert_the_table_is_right(quantizer, weight)


def assert_the_table_is_right(quantizer, weight):
    weight = quantizer.grouped(weight)
    for scale in (None, torch.tensor(0.37)):
        if scale is not None and quantizer.scope == "element":
            continue
        if scale is None and quantizer.scope != "element":
            continue
        expected = torch.empty(weight.shape, dtype=quantizer.code_dtype(weight))
        # Under, since this scale is not the weight's own.
        quantizer.encode_under(weight, scale, expected, kernels.ScratchPool())
        rounding, values = quantizer.rounding(weight), weight.float()
        if scale is not None:
            applied = quantizer.applied_scale(scale)
            values = values / applied if rounding.divides else values * applied
        assert torch.equal(proof.ordinals(values, rounding), expected.long())


def question_of(quantizer, dtype=torch.float32, with_updates=True) -> proof.Question:
    quantizer, weight = resolve(quantizer), torch.ones(4, 32, dtype=dtype)
    kind = Kind(dtype, dtype if with_updates else None, quantizer.code_dtype(weight), quantizer.rounding(weight), CPU)
    is_scaled = quantizer.scope != "element"
    return proof.Question(kind, is_scaled, is_scaled)


@pytest.mark.parametrize("quantizer", [*QUANTIZERS, "mxfp4", "nvfp4", "native"], ids=str)
def test_the_kernel_passes(quantizer):
    for dtype in (torch.float32, torch.bfloat16):
        for with_updates in (False, True):
            question = question_of(quantizer, dtype, with_updates)
            assert cpu.Run.can_do(question.kind, scaled=question.finds_scale)
            assert proof.find_fault(cpu.Run, question) is None


# What the metric groups do, and an expression of every operation.
LAST, KEPT = state("directions", torch.int8), state("kept", torch.float32)
UP = NEW > OLD
GROUPS = {
    "oscillation": Pointwise((UP & (LAST < 0),), ((LAST, where(UP, 1, where(NEW < OLD, -1, LAST))),)),
    "coverage": Pointwise((), ((state("bits"), state("bits") | (OLD ^ NEW)),)),
    "scale": Pointwise((differ(NEW_UNDER_OLD_SCALE, OLD),)),
    "touched": Pointwise((), ((bit("bits"), bit("bits") | differ(OLD, NEW)),)),
    "every operation": Pointwise(
        (~UP | differ(KEPT, 0.0), (KEPT > 0.1) ^ (LAST > 0)),
        (
            (LAST, (LAST + 1) * LAST - (LAST & 1)),
            (KEPT, where(~UP, KEPT * 0.99 + 0.01, KEPT - 0.5)),
            (state("code"), where(UP, ~NEW, state("code"))),
            (bit("flags"), bit("flags") ^ (~UP & (NEW > 1))),
        ),
    ),
}


@pytest.mark.parametrize("quantizer", ["float8_e4m3", "e3m4:row", "e2m9", "mxfp4", "int8", "bfloat16", "native"])
def test_the_kernel_passes_with_metric_groups(quantizer):
    for groups in (tuple(GROUPS.values())[:4], tuple(GROUPS.values())[4:]):
        for dtype, with_updates in ((torch.float32, True), (torch.bfloat16, False)):
            question = question_of(quantizer, dtype, with_updates)._replace(groups=groups)
            assert cpu.Run.can_do(question.kind, scaled=question.finds_scale, groups=groups)
            assert proof.find_fault(cpu.Run, question) is None


class LosesAState(cpu.Run):
    def count_into_(self, counts, rows, scale, updates, scale_codes=None, observed=None):
        super().count_into_(counts, rows, scale, updates, scale_codes, observed)
        if observed is not None and len(observed.states):
            ctypes.c_int8.from_address(int(observed.states[0, -1])).value ^= 1


class MiscountsForAGroup(cpu.Run):
    def count_into_(self, counts, rows, scale, updates, scale_codes=None, observed=None):
        super().count_into_(counts, rows, scale, updates, scale_codes, observed)
        if observed is not None and observed.sums.numel():
            observed.sums[-1, 0] += 1


class TakesTheNewScaleForTheOld(cpu.Run):
    def count_into_(self, counts, rows, scale, updates, scale_codes=None, observed=None):
        if observed is not None:
            observed = observed._replace(old_scale=scale)
        super().count_into_(counts, rows, scale, updates, scale_codes, observed)


@pytest.mark.parametrize(
    ("kernel", "group", "fault"),
    [
        (LosesAState, "oscillation", "1 states of metric groups differ"),
        (LosesAState, "coverage", "1 states of metric groups differ"),
        (LosesAState, "touched", "1 states of metric groups differ"),
        (MiscountsForAGroup, "oscillation", "metric groups count "),
        (TakesTheNewScaleForTheOld, "scale", "metric groups count "),
    ],
)
def test_a_kernel_that_is_wrong_for_groups_is_found_out(kernel, group, fault):
    question = question_of("float8_e4m3:row")._replace(groups=(GROUPS[group],))
    assert cpu.Run.can_do(question.kind, scaled=True, groups=question.groups)
    assert fault in proof.find_fault(kernel, question)


@pytest.mark.parametrize("kernel", [LosesAState, MiscountsForAGroup])
def test_groups_of_a_broken_kernel_see_slices_and_training_goes_on(kernel, monkeypatch, caplog):
    metrics = ("flips", "stalls", "oscillation", "coverage", "scale")
    expected, _ = train("eager", metrics=metrics)
    take_instead(monkeypatch, kernel)
    found, _ = train("auto", metrics=metrics)
    assert found == expected
    assert "not used, plain torch counts instead" in caplog.text


def test_what_kernels_cannot_compile_is_left_to_slices():
    question = question_of("float8_e4m3")
    too_many = (Pointwise((UP,) * 9),)
    assert not cpu.Run.can_do(question.kind, scaled=True, groups=too_many)
    with pytest.warns(UserWarning, match="operands of one type"):
        assert not cpu.Run.can_do(question.kind, scaled=True, groups=(Pointwise((KEPT < LAST,)),))


def test_the_kernel_passes_where_subnormal_numbers_are_flushed():
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot do so")
    try:
        for quantizer in ("float8_e4m3", "e3m4", "bfloat16", "native", "int8", "mxfp4"):
            question = question_of(quantizer)
            assert cpu.Run.can_do(question.kind, scaled=question.finds_scale)
            assert proof.find_fault(cpu.Run, question) is None
    finally:
        torch.set_flush_denormal(False)


class TwoPasses(cpu.Run):
    longest_group = 0


class Raises(TwoPasses):
    def count_(self, scale, updates):
        raise RuntimeError("no instruction of that name")


class LosesAFlip(TwoPasses):
    def count_(self, scale, updates):
        found = super().count_(scale, updates)
        found[-1, 0] -= 1
        return found


class IgnoresNaNAsUpdate(TwoPasses):
    def count_(self, scale, updates):
        found = super().count_(scale, updates)
        if updates is not None:
            found[0, 1] -= 1
        return found


class RoundsCoarsely(TwoPasses):
    def __init__(self, stretches, kind):
        super().__init__(stretches, kind)
        # As if subnormal numbers were twice as far apart.
        self._lanes[Lanes._fields.index("first")] += 1 << 23


class MissesNaN(TwoPasses):
    def largest(self):
        return super().largest().nan_to_num(nan=0.0)


class LosesAChangeOfAScale(TwoPasses):
    def count_into_(self, counts, rows, scale, updates, scale_codes=None):
        super().count_into_(counts, rows, scale, updates, scale_codes)
        if scale_codes is not None:
            scale_codes.changes[-1] -= 1


class KeepsAnOldScale(TwoPasses):
    def count_into_(self, counts, rows, scale, updates, scale_codes=None):
        super().count_into_(counts, rows, scale, updates, scale_codes)
        if scale_codes is not None:
            scale_codes.stored[-1] ^= 1


class WritesTooFar(cpu.Run):
    def count_(self, scale, updates):
        ctypes.c_int8.from_address(int(self._places[1, items.CODES]) + 4099).value = 3
        return super().count_(scale, updates)


FAULTS = {
    Raises: "it raised RuntimeError: no instruction of that name",
    LosesAFlip: "it counts ",
    IgnoresNaNAsUpdate: "it counts ",
    RoundsCoarsely: "codes differ",
    MissesNaN: "its largest magnitudes differ",
    LosesAChangeOfAScale: "it counts changes of scales",
    KeepsAnOldScale: "its stored scales differ",
}


def train(backend_name: str, quantizer: str = "float8_e4m3", **options):
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(40, 32, generator=generator)) for _ in range(3)]
    weights.append(torch.nn.Parameter(torch.randn(32, 40, generator=generator).T))
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(weights, lr=0.05), quantizer=quantizer, backend=backend_name, sinks=[], **options
    )
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return optimizer.tracker.record(), [weight.detach() for weight in weights]


@pytest.mark.parametrize("backend_name", ["auto", "numba"])
@pytest.mark.parametrize("kernel", FAULTS)
def test_a_broken_kernel_is_refused_and_training_goes_on(kernel, backend_name, monkeypatch, caplog):
    expected, weights = train("eager")
    take_instead(monkeypatch, kernel)
    with caplog.at_level(logging.INFO, logger="weightflip"):
        found, same = train(backend_name)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    refusals = [record for record in caplog.records if "not used, plain torch counts instead" in record.getMessage()]
    assert refusals
    assert all(FAULTS[kernel] in record.getMessage() and record.levelname == "WARNING" for record in refusals)
    # Each question was asked once.
    assert len({record.getMessage() for record in refusals}) == len(refusals)


def test_a_good_kernel_is_logged_once(monkeypatch, caplog):
    with caplog.at_level(logging.INFO, logger="weightflip"):
        train("auto")
        train("auto")
    told = [record.getMessage() for record in caplog.records if ": equal" in record.getMessage()]
    assert told
    assert len(set(told)) == len(told)
    assert told[0] == "numba for float32 to e4m3 (int8; updates None) on cpu, scales of groups in the same pass: equal"
    # The weight that is not contiguous has a scale that plain torch makes.
    assert "numba for float32 to e4m3 (int8; updates None) on cpu: equal" in told


class LosesAFlipInGroups(cpu.Run):
    def count_groups_into_(self, counts, rows, scaling, updates, stored=None, largest=None):
        super().count_groups_into_(counts, rows, scaling, updates, stored, largest)
        counts[-1, 0] -= 1


class TakesAnotherScale(cpu.Run):
    def count_groups_into_(self, counts, rows, scaling, updates, stored=None, largest=None):
        formula = scaling.description
        other = kernels.Scaling(formula._replace(number=formula.number * (1 + 2.0**-20)), scaling.is_stored)
        super().count_groups_into_(counts, rows, other, updates, stored, largest)


class LosesAChangeInGroups(cpu.Run):
    def count_groups_into_(self, counts, rows, scaling, updates, stored=None, largest=None):
        super().count_groups_into_(counts, rows, scaling, updates, stored, largest)
        if stored is not None:
            stored.changes[-1] -= 1


class KeepsAnOldScaleInGroups(cpu.Run):
    def count_groups_into_(self, counts, rows, scaling, updates, stored=None, largest=None):
        super().count_groups_into_(counts, rows, scaling, updates, stored, largest)
        if stored is not None:
            stored.codes[-1] ^= 1


class RoundsFactorsUp(cpu.Run):
    def factors(self, scaling):
        factors = super().factors(scaling)
        return torch.nextafter(factors, torch.full_like(factors, torch.inf))


class SharesScalesByRowsOfBlocks(cpu.Run):
    def __init__(self, stretches, kind):
        super().__init__([s._replace(height=1) if s.width else s for s in stretches], kind)


@pytest.mark.parametrize(
    ("kernel", "quantizer", "fault"),
    [
        (LosesAFlipInGroups, "mxfp4", "it counts "),
        (TakesAnotherScale, "int8", "codes differ"),
        (TakesAnotherScale, "float8_e4m3:1x128", "codes differ"),
        (LosesAChangeInGroups, "int4:g32", "it counts changes of scales"),
        (KeepsAnOldScaleInGroups, "nvfp4", "its stored scales differ"),
        (SharesScalesByRowsOfBlocks, "int8", "in blocks over several rows, "),
        (RoundsFactorsUp, "float8_e4m3", "its scales before counting differ"),
    ],
)
def test_broken_scales_of_groups_are_refused_and_made_by_plain_torch(kernel, quantizer, fault, monkeypatch, caplog):
    expected, weights = train("eager", quantizer)
    take_instead(monkeypatch, kernel)
    with caplog.at_level(logging.INFO, logger="weightflip"):
        found, same = train("auto", quantizer)
    assert found == expected
    assert all(torch.equal(a, b) for a, b in zip(weights, same, strict=True))
    messages = [record.getMessage() for record in caplog.records]
    assert any("not used, plain torch computes the scales instead" in text and fault in text for text in messages)
    # In two passes the kernel counts all the same.
    assert any(text.endswith("on cpu: equal") for text in messages)


def scaling_question_of(quantizer, dtype=torch.float32, with_updates=True):
    question, quantizer = question_of(quantizer, dtype, with_updates), resolve(quantizer)
    scaling = get_scaling(quantizer, question.kind.rounding, dtype, CPU)
    return question._replace(scaling=scaling), in_plain_torch(quantizer, dtype)


SCALED = [name for name in QUANTIZERS if resolve(name).scope != "element"]
BLOCKS = [*block.MX_NAMES, "mxfp4:rceil", "mxfp8_e5m2:ceil", "mxfp6_e2m3:even", "nvfp4", "int4:g32",
          "float8_e4m3:1x128", "float8_e4m3:1x128:pow2", "float8_e4m3:128x128",
          "float8_e4m3:128x128:pow2"]  # fmt: skip


@pytest.mark.parametrize("flushes", [False, True])
def test_the_kernel_makes_the_scales_of_every_format(flushes):
    if flushes and not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot do so")
    try:
        for quantizer in [*SCALED, *BLOCKS]:
            for dtype in (torch.float32, torch.bfloat16):
                for with_updates in (False, True):
                    with case(quantizer, dtype, with_updates):
                        question, scales = scaling_question_of(quantizer, dtype, with_updates)
                        assert question.scaling is not None
                        assert question.is_supported_by(cpu.Run)
                        assert proof.find_fault_in_groups(cpu.Run, question, scales) is None
    finally:
        torch.set_flush_denormal(False)


def test_no_stretch_is_left():
    """Codes beside those of a stretch have to stay as they are."""
    question = question_of("float8_e4m3")
    assert proof.find_fault(WritesTooFar, question).startswith("1 of ")


class Slow(TwoPasses):
    def count_(self, scale, updates):
        time.sleep(0.02)
        return super().count_(scale, updates)


@pytest.mark.parametrize(("kernel", "is_used"), [(TwoPasses, True), (Slow, False)])
def test_where_there_is_a_race_the_slower_is_not_used_by_itself(kernel, is_used, monkeypatch, caplog):
    expected, _ = train("eager")
    take_instead(monkeypatch, kernel)
    monkeypatch.setattr(proof, "_must_be_faster_on", lambda device: True)
    # What the kernel needs for so few weights is less than what plain torch needs in calls, and far less than 20 ms.
    monkeypatch.setattr(proof, "_RACE_SHAPE", (32, 32))
    for name in ("auto", "numba"):
        with caplog.at_level(logging.INFO, logger="weightflip"):
            found, _ = train(name)
        assert found == expected
    question = question_of("float8_e4m3")
    eager = functools.partial(pytest.fail, "asked again")
    assert proof.is_usable("numba", kernel, question, eager, must_be_faster=True) == is_used
    assert proof.is_usable("numba", kernel, question, eager, must_be_faster=False)
    told = [record.getMessage() for record in caplog.records if ": equal" in record.getMessage()]
    assert all(("x faster than eager" in text) == is_used for text in told)


def test_a_failed_timing_is_not_a_fault(monkeypatch, caplog):
    monkeypatch.setattr(proof, "_must_be_faster_on", lambda device: True)

    def eager(weight, codes, update, counts):
        raise ValueError("no such scale")

    question = question_of("e3m4:row")
    assert cpu.Run.can_do(question.kind, scaled=True)
    assert not proof.is_usable("numba", cpu.Run, question, eager, must_be_faster=True)
    assert proof.is_usable("numba", cpu.Run, question, eager, must_be_faster=False)
    assert "its speed could not be measured: ValueError: no such scale" in caplog.text


def test_it_draws_no_random_numbers_and_is_over_soon():
    question = question_of("mxfp8_e4m3", torch.bfloat16)
    assert cpu.Run.can_do(question.kind, scaled=True)
    before = torch.get_rng_state()
    start = time.perf_counter()
    assert proof.find_fault(cpu.Run, question) is None
    assert time.perf_counter() - start < 1
    assert torch.equal(torch.get_rng_state(), before)


def test_in_a_capture_nothing_is_tried(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    question = question_of("float8_e4m3")
    question = question._replace(kind=question.kind._replace(device=torch.device("cuda", 0)))
    eager = functools.partial(pytest.fail, "tried")
    assert not proof.is_usable("triton", Raises, question, eager, must_be_faster=False)
    assert proof._answers == {}


def test_integers_are_those_of_the_rounding():
    values = torch.tensor([0.5, 1.5, -0.5, -1.5, 9.0, -9.0, float("nan"), float("inf")])
    assert proof.ordinals(values, IntegerRounding(-8, 7, -128)).tolist() == [0, 2, 0, -2, 7, -8, -128, 7]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_kernels_have_what_is_asked_of_them(name):
    """Read from the source, since Triton may be missing, and mypy does not see that a module is a kernel."""
    folder = Path(runs.__file__).parent

    def members(file: str) -> dict[str, list[str]]:
        tree = ast.parse((folder / f"{file}.py").read_text(encoding="utf-8"))
        (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Run")
        found = {}
        for node in cls.body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = [arg.arg for arg in (*node.args.args, *node.args.kwonlyargs) if arg.arg != "self"]
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
                found[target.id] = []
        return found

    found, required = members(name), members("runs")
    assert len(required) > 8
    assert {member: found.get(member) for member in required} == required
