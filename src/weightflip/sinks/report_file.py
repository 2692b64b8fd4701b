"""A JSONL file next to TensorBoard's event file, for reports: event files hold rounded ratios instead of counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from weightflip.records import AlertEvent, FlipRecord, RunInfo
from weightflip.sinks.background import BackgroundSink
from weightflip.sinks.files import AppendedFile, writer_id
from weightflip.sinks.jsonl import JSONLSink
from weightflip.sinks.tensorboard import TensorBoardSink


class ReportFileSink(BackgroundSink):
    """Writes ``flips.<time>.<host>.<process>.<number>.jsonl`` into the directory of a TensorBoard sink.

    It is a separate sink, so that an error with this file does not stop TensorBoard. Lines are those of
    :class:`JSONLSink`, with records in the compact form of ``FlipRecord.to_rows``: about two fifths of the event file's
    size. Like event files, each process that resumes a run writes its own file.

    Args:
        tensorboard: The TensorBoard sink, started before this one. If it writes to a remote store (``s3://``) or has
            opened nothing, nothing is written here.
    """

    def __init__(self, tensorboard: TensorBoardSink) -> None:
        self._tensorboard = tensorboard
        self._lines: _CompactJSONLSink | None = None

    def start(self, info: RunInfo, first_step: int) -> None:
        directory = self._tensorboard.log_dir
        if self._lines is None and directory is not None and "://" not in directory:
            self._lines = _CompactJSONLSink(str(Path(directory, f"flips.{writer_id()}.jsonl")))
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
        # A copy writes its own file.
        return {"_tensorboard": self._tensorboard, "_lines": None}


class _CompactJSONLSink(JSONLSink):
    _separators = (",", ":")

    def __init__(self, path: str) -> None:
        super().__init__(path)
        # If the directory is deleted, TensorBoard's sink warns.
        self._file = AppendedFile(path, warns_of_deletion=False)

    def _encode_record(self, record: FlipRecord) -> dict[str, object]:
        return record.to_rows()
