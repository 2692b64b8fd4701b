"""Where records go. A new sink is one new file here, with the four methods of :class:`Sink`."""

from __future__ import annotations

from weightflip.sinks.base import CallableSink, Sink, SinkGroup, make_sink
from weightflip.sinks.jsonl import JSONLSink
from weightflip.sinks.tensorboard import TensorBoardSink

__all__ = ["CallableSink", "JSONLSink", "Sink", "SinkGroup", "TensorBoardSink", "make_sink"]
