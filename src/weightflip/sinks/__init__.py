"""Output of records. A new sink is one new file here with the four methods of :class:`Sink`."""

from __future__ import annotations

from weightflip.sinks.background import BackgroundSink
from weightflip.sinks.base import CallableSink, Sink, make_sink, make_sinks
from weightflip.sinks.csv import CSVSink
from weightflip.sinks.group import SinkGroup
from weightflip.sinks.jsonl import JSONLSink
from weightflip.sinks.report_file import ReportFileSink
from weightflip.sinks.tensorboard import TensorBoardSink
from weightflip.sinks.wandb import WandbSink

__all__ = [
    "BackgroundSink",
    "CSVSink",
    "CallableSink",
    "JSONLSink",
    "ReportFileSink",
    "Sink",
    "SinkGroup",
    "TensorBoardSink",
    "WandbSink",
    "make_sink",
    "make_sinks",
]
