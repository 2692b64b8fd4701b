"""Shows how quantized weights move while a network trains."""

from __future__ import annotations

from weightflip import formats
from weightflip.counting.stalls import BitStallDetector
from weightflip.counting.tracker import WeightFlipTracker
from weightflip.functional import compute_flip_rate, compute_stall_ratio
from weightflip.hooks import FlipTrackingHandle, track_flips
from weightflip.optimizer import FlipTrackingOptimizer
from weightflip.quantizers import Codes, Quantizer, decode, encode, quantize, quantizer_names
from weightflip.records import AlertEvent, FlipRecord, LayerRecord, RunInfo
from weightflip.session.alerts import Alert
from weightflip.sinks import Sink
from weightflip.version import __version__ as __version__

__all__ = [
    "Alert",
    "AlertEvent",
    "BitStallDetector",
    "Codes",
    "FlipRecord",
    "FlipTrackingHandle",
    "FlipTrackingOptimizer",
    "LayerRecord",
    "Quantizer",
    "RunInfo",
    "Sink",
    "WeightFlipTracker",
    "compute_flip_rate",
    "compute_stall_ratio",
    "decode",
    "encode",
    "formats",
    "quantize",
    "quantizer_names",
    "track_flips",
]
