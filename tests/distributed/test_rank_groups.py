"""Groups of processes whose numbers are combined."""

from __future__ import annotations

from made_layouts import layout

from weightflip.distributed.rank_groups import find_rank_groups


def test_rank_groups_are_the_largest_meshes():
    two_d, dp, other = layout(ranks=(0, 1, 2, 3)), layout(ranks=(1, 3)), layout(ranks=(4, 5))
    found = find_rank_groups([dp, two_d, other])
    assert [group.ranks for group in found] == [(0, 1, 2, 3), (0, 1, 2, 3), (4, 5)]
    # Of the mesh slices that hold the same weight, the one with the first process counts.
    assert not found[0].is_counted(dp)
    assert found[0].is_counted(layout(ranks=(0, 2)))
    assert not found[0].is_counted(layout(ranks=(0, 2), is_first_copy=False))
