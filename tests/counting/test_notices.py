"""Warnings that wait."""

from __future__ import annotations

import warnings

from weightflip.counting.notices import Notices


def test_everything_is_said_once_when_told():
    notices = Notices()
    notices.add("one")
    notices.add("two")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notices.flush()
        notices.flush()
    assert [str(warning.message) for warning in caught] == ["weightflip: one", "weightflip: two"]


def test_what_is_held_is_taken():
    notices = Notices()
    notices.hold = True
    notices.add("one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notices.flush()
    assert notices.take() == ["weightflip: one"]
    assert notices.take() == []
