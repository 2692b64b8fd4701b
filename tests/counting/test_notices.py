"""Deferred warnings."""

from __future__ import annotations

import warnings

from weightflip.counting.notices import Notices


def test_flush_issues_each_warning_once():
    notices = Notices()
    notices.add("one")
    notices.add("two")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        notices.flush()
        notices.flush()
    assert [str(warning.message) for warning in caught] == ["weightflip: one", "weightflip: two"]


def test_held_warnings_are_taken_by_the_owner():
    notices = Notices()
    notices.hold = True
    notices.add("one")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        notices.flush()
    assert notices.take() == ["weightflip: one"]
    assert notices.take() == []
