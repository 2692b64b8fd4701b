"""Process groups, and which process writes."""

from __future__ import annotations

import pytest

from weightflip.distributed.groups import is_available, is_writer, process_group


def test_without_torch_distributed_this_process_writes():
    assert not is_available()
    assert is_writer()


def test_without_torch_distributed_there_is_no_group():
    with pytest.raises(RuntimeError, match=r"there is no process group any more; call close\(\) before"):
        process_group(("cpu", (0, 1)))
