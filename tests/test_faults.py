"""A fault at any line of tracking: training stays bit for bit what it is without tracking, and nothing raises."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from conftest import assert_same
from torch import nn
from tracing import SOURCE, Traced

from weightflip import FlipTrackingOptimizer, WeightFlipTracker, track_flips
from weightflip.counting.marks import SyncMarks
from weightflip.counting.metric_runner import MetricRunner
from weightflip.counting.schedule import Schedule
from weightflip.session.guard import Guard, run_outside_graphs
from weightflip.session.last_record import LastRecord
from weightflip.session.log import Log
from weightflip.session.session import Session
from weightflip.texts import printable

# A generator that a fault leaves half way is closed when it is collected, where nothing can be raised.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

# Nothing surrounds the lines that pass calls on, catch faults and issue warnings, so they are left out. What they call
# is not.
LEFT_OUT_FILES = ("/optimizer.py", "/hooks.py", "/inner.py", "session/tracked.py")
LEFT_OUT = {
    inspect.unwrap(function).__code__
    for function in (
        *(run_outside_graphs, Guard.run, Guard.contain, Guard._stop_tracking),
        *(Session.run_guarded, Session.finish_step, Session._finish_step, Session.abort_step, Session.save_into),
        *(Session.flush, Session.close, Session.end, Session.restore),
        *(Log.emit_warnings, Log._take_warnings, Log.flush, Log.close, Log.end_source, Log._attempt),
        *(LastRecord.write_now, printable, WeightFlipTracker.mark_sync, WeightFlipTracker._mark_if_due),
        *(SyncMarks.request, SyncMarks._check, SyncMarks.take_due, SyncMarks.guarded.__wrapped__),
        SyncMarks.are_expected.fget,
        *(MetricRunner.uses_marks.fget, Schedule.allows_marks.fget),
    )
}


class FaultAt(Traced):
    """Raises before the n-th executed line of the library, counted from 0; None only records the lines.

    Args:
        place: The line.
        then: Called before it raises.
    """

    def __init__(self, place: int | None, then=lambda: None) -> None:
        self.place, self.then, self.lines, self.where = place, then, [], None

    def _trace(self, frame, event, arg):
        name = frame.f_code.co_filename
        if not name.startswith(SOURCE) or name.endswith(LEFT_OUT_FILES) or frame.f_code in LEFT_OUT:
            return None
        if event == "line":
            self.lines.append((name, frame.f_lineno))
            if len(self.lines) - 1 == self.place:
                self.where = self.lines[-1]
                self.then()
                # This also ends tracing.
                raise RuntimeError("broken on purpose")
        return self._trace


def bare(inner, model, **options):
    return inner, lambda: None, lambda: None, None


def wrapped(inner, model, **options):
    optimizer = FlipTrackingOptimizer(inner, model, **options)
    return optimizer, optimizer.flush, optimizer.close, optimizer._session


def hooked(inner, model, **options):
    handle = track_flips(inner, model, **options)
    return inner, handle.flush, handle.remove, handle._session


OPTIONS = {
    "default": {},
    "groups": {"metrics": ("flips", "stalls", "oscillation", "range", "travel"), "backend": "eager"},
    "sparsely": {"track_every": 2, "low_memory": True},
    "marks": {"metrics": ("flips", "sync", "touched")},
}


def train(form, options, place=None, *, is_end_broken=False):
    """Train with a checkpoint and a step that raises, and have tracking fail.

    Args:
        form: How the optimizer is tracked.
        options: Its keyword arguments.
        place: Number of the line at which a fault is raised.
        is_end_broken: Whether the methods that end tracking raise from then on.

    Returns:
        All that tracking must not change, the warnings, and the executed lines.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Dropout(), nn.Linear(6, 4, bias=False))
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer, flush, close, session = form(
        inner,
        model,
        quantizer="float8_e4m3",
        log_every=2,
        alerts=["flip_rate > 2"],
        sinks=[lambda record: None],
        **options,
    )
    results = []

    def closure():
        optimizer.zero_grad()
        loss = model(torch.linspace(-1, 1, 8).repeat(4, 1)).square().sum()
        loss.backward()
        if len(results) == 2:
            raise ArithmeticError("the user's own")
        return loss

    def step():
        if len(results) in (0, 3):
            closure()
            return optimizer.step()
        try:
            return optimizer.step(closure)
        except ArithmeticError:
            return None

    def raises(*_, **__):
        raise RuntimeError("broken twice")

    def break_end():
        session.tracker.drop_codes = session.tracker.abandon = session.weights.release = raises

    with warnings.catch_warnings(record=True) as caught, FaultAt(place, break_end if is_end_broken else int) as fault:
        warnings.simplefilter("always")
        for i in range(5):
            results.append(step())
            if session is not None and "sync" in session.tracker.metrics:
                session.tracker.mark_sync()
            if i == 3:
                state = optimizer.state_dict()
                flush()
                optimizer.load_state_dict(state)
        close()
    assert (fault.where is None) == (place is None)
    state = inner.state_dict()
    state.pop("flip_tracking", None)
    kept = (list(model.parameters()), state, torch.get_rng_state(), results)
    return kept, [str(warning.message) for warning in caught], fault.lines


def check_each(form, options, is_end_broken, *, first=0, strides=(1, 1)):
    """Check a fault at the last execution of each line.

    Args:
        form: How the optimizer is tracked.
        options: Its keyword arguments.
        is_end_broken: Whether the methods that end tracking raise, too.
        first: The first line that is checked.
        strides: One in how many lines is checked, in ``session/`` and elsewhere.
    """
    expected, _, _ = train(bare, {})
    # A first run, because it also imports and compiles.
    train(form, options)
    found, texts, lines = train(form, options)
    assert_same(expected, found)
    assert texts == []
    assert len(lines) > 500
    last = {line: place for place, line in enumerate(lines)}
    places = [place for line, place in last.items() if "session" in line[0]][first :: strides[0]]
    places += [place for line, place in last.items() if "session" not in line[0]][first :: strides[1]]
    assert len(places) > 20
    for place in places:
        try:
            found, texts, _ = train(form, options, place, is_end_broken=is_end_broken)
        except Exception as error:
            raise AssertionError(f"a fault at {lines[place]} reaches training") from error
        assert_same(expected, found)
        assert all(text.startswith("weightflip: ") for text in texts)
        assert sum("tracking has stopped" in text for text in texts) <= 1


CASES = [(form, options, twice) for form in (wrapped, hooked) for options in OPTIONS for twice in (False, True)]
each_case = pytest.mark.parametrize(
    ("form", "options", "is_end_broken"),
    CASES,
    ids=[f"{form.__name__}-{options}-{'twice' if twice else 'once'}" for form, options, twice in CASES],
)


@each_case
def test_a_fault_does_not_change_training(form, options, is_end_broken):
    # Each line of the session in one case. Faults elsewhere reach training by way of the session.
    first = CASES.index((form, options, is_end_broken))
    check_each(form, OPTIONS[options], is_end_broken, first=first, strides=(len(CASES), 197))


@pytest.mark.conformance
@each_case
def test_a_fault_at_every_line(form, options, is_end_broken):
    check_each(form, OPTIONS[options], is_end_broken)
