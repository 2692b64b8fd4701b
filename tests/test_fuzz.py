"""Random trainings: tracked equals bare, and counts equal brute force with independently computed codes."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

pytest.importorskip("torchao")
pytest.importorskip("numba")

from fuzz import check
from fuzz_oracles import Difference, oracle_of
from fuzz_scenarios import FORMATS, make_scenario

SEEDS = 200
AT_ONCE = 25


@pytest.mark.parametrize("first", range(0, SEEDS, AT_ONCE))
def test_random_trainings(first, caplog):
    # Silences the note on plain float32 weights, which would appear each time.
    caplog.set_level(logging.ERROR, logger="weightflip")
    failed = {}
    for seed in range(first, first + AT_ONCE):
        try:
            check(seed)
        except Difference as difference:
            failed[seed] = str(difference)
    assert not failed, "\n\n".join([f"seeds {list(failed)} differ", *failed.values()])


def test_a_scenario_is_always_the_same_and_its_formats_take_turns():
    assert str(make_scenario(3)) == str(make_scenario(3))
    named = " ".join(repr(make_scenario(seed).quantizer) for seed in range(SEEDS))
    assert [format for format in FORMATS if repr(format) not in named] == []


def test_oracles_distinguish_neighboring_weights():
    """An oracle whose codes are all the same would never find a difference."""
    weight = torch.linspace(-3, 3, 64).view(2, 32)
    for format in FORMATS:
        codes = oracle_of(format.removeprefix("format ")).encode(weight).codes
        assert len(np.unique(codes)) >= 2, format
