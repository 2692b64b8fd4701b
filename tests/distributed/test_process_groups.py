"""Process groups, and which process writes."""

from __future__ import annotations

import pytest

from weightflip.distributed.groups import group_of, is_available, is_writer


def test_without_torch_distributed_this_process_writes():
    assert not is_available()
    assert is_writer()


def test_without_torch_distributed_there_is_no_group():
    with pytest.raises(RuntimeError, match=r"there is no process group any more; call close\(\) before"):
        group_of(("cpu", (0, 1)))
