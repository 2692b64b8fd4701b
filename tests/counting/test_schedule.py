"""Which steps are tracked."""

from __future__ import annotations

import pytest
import torch

from weightflip import WeightFlipTracker
from weightflip.counting.schedule import Schedule


@pytest.mark.parametrize(
    ("options", "due"),
    [
        ((1, 0, None), list(range(12))),
        ((3, 0, None), [0, 3, 6, 9]),
        ((3, 2, None), [2, 5, 8, 11]),
        ((2, 1, 6), [1, 3, 5]),
    ],
)
def test_which_steps_are_due(options, due):
    schedule = Schedule(*options)
    assert [step for step in range(12) if schedule.is_due(step)] == due
    found = []
    for step in range(12):
        assert schedule.steps == step
        if schedule.is_due():
            assert schedule.tracked_steps == len(found)
            found.append(step)
        assert schedule.is_over() == (options[2] is not None and step >= options[2])
        schedule.progress = schedule.progress.next(None)
    assert found == due


def test_a_skipped_step_does_not_count():
    schedule = Schedule()
    for valid in (None, torch.tensor(True), torch.tensor(False), None, torch.tensor(False)):
        schedule.progress = schedule.progress.next(valid)
    assert (schedule.steps, schedule.completed()) == (5, 3)


def test_invalid_numbers():
    with pytest.raises(ValueError, match="track_every= must be an integer of at least 1, got True"):
        Schedule(True)
    with pytest.raises(ValueError, match="end_step= must be an integer of at least 4, got 3"):
        Schedule(1, 3, 3)


@pytest.mark.parametrize("made", [Schedule, WeightFlipTracker])
def test_invalid_numbers_set_later(made):
    schedule = made(start_step=3, end_step=5)
    with pytest.raises(ValueError, match="end_step= must be an integer of at least 4, got 3"):
        schedule.end_step = 3
    with pytest.raises(ValueError, match="start_step= must be below end_step=5, got 5; set end_step first"):
        schedule.start_step = 5
    with pytest.raises(ValueError, match="start_step= must be an integer of at least 0, got -1"):
        schedule.start_step = -1
    assert (schedule.start_step, schedule.end_step) == (3, 5)
    schedule.end_step = 9
    schedule.start_step = 8
    schedule.end_step = None
    schedule.start_step = 20
    assert (schedule.start_step, schedule.end_step) == (20, None)
