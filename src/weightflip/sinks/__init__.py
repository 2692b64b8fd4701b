"""Where records go. A new sink is one new file here, with the four methods of :class:`Sink`."""

from __future__ import annotations

from weightflip.sinks.base import CallableSink, Sink, SinkGroup, make_sink, make_sinks
from weightflip.sinks.beside import BesideSink
from weightflip.sinks.csv import CSVSink
from weightflip.sinks.jsonl import JSONLSink
from weightflip.sinks.tensorboard import TensorBoardSink
from weightflip.sinks.wandb import WandbSink

__all__ = [
    "BesideSink",
    "CSVSink",
    "CallableSink",
    "JSONLSink",
    "Sink",
    "SinkGroup",
    "TensorBoardSink",
    "WandbSink",
    "make_sink",
    "make_sinks",
]
