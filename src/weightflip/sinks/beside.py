"""What a report needs, as JSONL beside TensorBoard's event file, which holds quotients of rounded counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightflip.records import AlertEvent, FlipRecord, RunInfo
from weightflip.sinks.background import BackgroundSink
from weightflip.sinks.files import AppendedFile, writer_id
from weightflip.sinks.jsonl import JSONLSink
from weightflip.sinks.tensorboard import TensorBoardSink


class BesideSink(BackgroundSink):
    """Writes ``flips.<time>.<host>.<process>.<number>.jsonl`` into the directory of a TensorBoard sink.

    It is a sink of its own, so that a fault of this file does not cost TensorBoard its records. Lines are those of
    :class:`JSONLSink`, with records as ``FlipRecord.to_rows`` has them: about two fifths of the event file's size. Each
    process that resumes a run writes a file of its own, as it does with event files.

    Args:
        tensorboard: The other sink, started before this one. Where it writes to a remote store (``s3://``), or has not
            opened anything, nothing is written.
    """

    def __init__(self, tensorboard: TensorBoardSink) -> None:
        self._tensorboard = tensorboard
        self._lines: _Rows | None = None

    def start(self, info: RunInfo, first_step: int) -> None:
        directory = self._tensorboard.log_dir
        if self._lines is None and directory is not None and "://" not in directory:
            self._lines = _Rows(str(Path(directory, f"flips.{writer_id()}.jsonl")))
        if self._lines is not None:
            self._lines.start(info, first_step)

    def write(self, record: FlipRecord) -> None:
        if self._lines is not None:
            self._lines.write(record)

    def alert(self, event: AlertEvent) -> None:
        if self._lines is not None:
            self._lines.alert(event)

    def flush(self) -> None:
        if self._lines is not None:
            self._lines.flush()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()

    def __getstate__(self) -> dict[str, Any]:
        # A copy writes a file of its own.
        return {"_tensorboard": self._tensorboard, "_lines": None}


class _Rows(JSONLSink):
    _separators = (",", ":")

    def __init__(self, path: str) -> None:
        super().__init__(path)
        # Where the directory was deleted, TensorBoard's sink says so.
        self._file = AppendedFile(path, tells=False)

    def _contents(self, record: FlipRecord) -> dict[str, object]:
        return record.to_rows()
