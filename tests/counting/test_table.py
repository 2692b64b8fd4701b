"""Layers, rows, totals and snapshots, without an optimizer."""

from __future__ import annotations

import pytest
import torch
from parts import commit, make, opened, weight

from weightflip.counting.ledger import WEIGHT_STEPS
from weightflip.counting.named import NamedSnapshots
from weightflip.counting.totals import parse


def test_a_step_is_in_the_totals_once_committed_unless_skipped():
    parts = make()
    layer = opened(parts, weight("w", "e3m4"))
    for valid, expected in ((None, 3), (torch.tensor(False), 3), (torch.tensor(True), 6)):
        parts.layers.begin_step()
        layer.row.step[WEIGHT_STEPS] = 3
        commit(parts, valid)
        assert parts.totals.rows()[1]["w"][WEIGHT_STEPS] == expected
    assert parts.totals.rows()[0] == 2


def test_totals_interrupted_while_put_in_place_are_completed_later():
    parts = make()
    layer = opened(parts, weight("w", "e3m4"))
    layer.row.step[WEIGHT_STEPS] = 3
    parts.layers.prepare(None)
    assert parts.layers.read_rows()[0]["w"][WEIGHT_STEPS] == 0
    parts.schedule.progress = parts.schedule.progress.next(None)._replace(is_committed=False)
    assert parts.layers.read_rows()[0]["w"][WEIGHT_STEPS] == 3
    assert parts.schedule.progress.is_committed


def test_another_weight_with_the_same_name_starts_from_zero():
    parts = make()
    layer = opened(parts, weight("w", "e3m4"))
    layer.row.step[WEIGHT_STEPS] = 512
    commit(parts)
    assert parts.totals.close_window(parts.sharding).model.window.weight_steps == 512
    layer = opened(parts, weight("w", "e3m4", (4, 4)))
    assert "'w' had 512 weights and now has 16; its counts start from zero" in parts.notices.take()[0]
    parts.layers.begin_step()
    layer.row.step[WEIGHT_STEPS] = 16
    commit(parts)
    (found,) = parts.totals.close_window(parts.sharding).layers
    assert (found.window.weight_steps, found.total.weight_steps, found.weights) == (16, 16, 16)


def test_checkpoint_round_trip():
    parts, other = make(), make()
    opened(parts, weight("w", "e3m4")).row.step[WEIGHT_STEPS] = 512
    commit(parts)
    state = parts.totals.state_dict(parts.sharding)
    steps, layers, window_base, unasked = parse(state, other.columns, set())
    other.totals.load(steps, layers, window_base)
    assert other.totals.state_dict(other.sharding) == state
    assert unasked == set()
    with pytest.raises(ValueError, match="without"):
        parse({}, other.columns, set())


def test_removed_weights_have_no_codes():
    parts = make()
    weights = [weight(name, "e3m4") for name in ("a", "bb")]
    layers = [opened(parts, tracked) for tracked in weights]
    parts.elementwise.encode(layers)
    assert parts.layers.set_weights(weights)
    assert not parts.layers.set_weights(weights)
    assert parts.layers.set_weights(weights[:1])
    assert [layer.codes is None for layer in layers] == [False, True]


def test_a_snapshot_is_compared_once():
    parts = make()
    named = NamedSnapshots(parts.layers, parts.scratch)
    tensor = torch.linspace(1, 2, 16).view(4, 4)
    named.take("w", tensor, "e3m4", 1.0, torch.ones(4, 4))
    assert named.pending_updates() == {"w": 16}
    assert set(named.codes) == {"w"}
    tensor[0] *= 2
    assert named.compare("w", tensor, "e3m4", 1.0) == 4
    assert named.codes == {}
    with pytest.raises(KeyError, match="No pre-step snapshot for 'w'"):
        named.compare("w", tensor, "e3m4", 1.0)
