"""The cost of a report on a large run: time and peak memory, from JSONL and from event files.

    PYTHONPATH=src python benchmarks/report_cost.py                       # 1,000 layers x 2,000 points
    PYTHONPATH=src python benchmarks/report_cost.py --layers 100 --points 500 --html

The run is created once, below ``--dir``: 1.4 GB. ``jsonl`` is what a path in ``sinks=`` writes, ``log_dir`` what
``log_dir=`` writes, ``events`` the same without the JSONL file next to the event file. Each report runs in its own
process. The peak resident memory is reported by the operating system.
"""

from __future__ import annotations

import argparse
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from torch.utils.tensorboard import SummaryWriter

from weightflip.records import Counts, FlipRecord, LayerRecord, RunInfo
from weightflip.sinks import JSONLSink, ReportFileSink, TensorBoardSink
from weightflip.sinks.tags import tagged_values

SOURCES = ("jsonl", "log_dir", "events")
SIZE, EVERY = 4096, 10


class FastEvents:
    """Appends scalars to a SummaryWriter's file, byte-for-byte as SummaryWriter does, but a hundred times faster."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("ab")
        self._of: tuple[list[str], int] = ([], 0)

    def write(self, record: FlipRecord) -> None:
        """Append the numbers of one point."""
        tags = tagged_values(record)
        step = record.step
        varint = Event(step=step).SerializeToString()[1:]
        if self._of != (list(tags), len(varint)):
            self._of = list(tags), len(varint)
            self._lay_out(list(tags), step)
        block = self._block
        now = np.frombuffer(struct.pack("<d", time.time()), np.uint8)
        block[self._begins[:, None] + np.arange(1, 9)] = now
        block[self._begins[:, None] + np.arange(10, 10 + len(varint))] = np.frombuffer(varint, np.uint8)
        values = np.array(list(tags.values()), "<f4").view(np.uint8).reshape(-1, 4)
        block[self._ends[:, None] + np.arange(-4, 0)] = values
        crcs = masked_crcs(block, self._begins, self._ends)
        block[self._ends[:, None] + np.arange(4)] = crcs.view(np.uint8).reshape(-1, 4)
        self._file.write(block.tobytes())

    def _lay_out(self, tags: Sequence[str], step: int) -> None:
        parts = [
            Event(wall_time=1.0, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=1.0)]))
            for tag in tags
        ]
        events = [part.SerializeToString() for part in parts]
        lengths = np.array([len(event) for event in events])
        self._begins = np.cumsum([12, *(lengths[:-1] + 16)])
        self._ends = self._begins + lengths
        headers = np.array(lengths, "<u8").view(np.uint8)
        places = 8 * np.arange(len(lengths))
        checksums = masked_crcs(headers, places, places + 8)
        framed = zip(lengths.tolist(), checksums.tolist(), events, strict=True)
        self._block = np.frombuffer(
            b"".join(struct.pack("<QI", length, crc) + event + bytes(4) for length, crc, event in framed), np.uint8
        ).copy()

    def close(self) -> None:
        self._file.close()


def masked_crcs(data: NDArray[np.uint8], begins: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.uint32]:
    """The checksums of parts of an array, as in TFRecord files: CRC-32C, rotated, plus a constant."""
    table = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> 1 ^ np.where(table & 1, np.uint32(0x82F63B78), np.uint32(0))
    crc = np.full(len(begins), 0xFFFFFFFF, np.uint32)
    for at in range(int((ends - begins).max())):
        byte = data[np.minimum(begins + at, len(data) - 1)]
        crc = np.where(begins + at < ends, table[(crc ^ byte) & 255] ^ crc >> 8, crc)
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + np.uint32(0xA282EAD8)).astype("<u4")


def write_run(where: Path, layers: int, points: int) -> None:
    """Write one run in three forms."""
    draw = np.random.default_rng(0)
    names = [f"blocks.{at // 8}.part{at % 8}.weight" for at in range(layers)]
    info = RunInfo(dict.fromkeys(names, ("64x64", "float32", "float8_e4m3")), {}, {"optimizer": "AdamW"})
    with SummaryWriter(str(where / "log_dir"), filename_suffix=".weightflip") as writer:
        writer.add_text("weightflip/tracking", info.to_markdown(), 0)
    (file,) = (where / "log_dir").glob("*tfevents*")
    tensorboard = TensorBoardSink(str(where / "log_dir"))
    events, sinks = FastEvents(file), [ReportFileSink(tensorboard), JSONLSink(str(where / "jsonl" / "flips.jsonl"))]
    for sink in sinks:
        sink.start(info, 0)
    totals = [Counts()] * layers
    speed = draw.uniform(0.01, 0.2, layers)
    for point in range(points):
        flips = draw.binomial(SIZE * EVERY, speed * (1 - 0.9 * point / points)).tolist()
        every_step = SIZE * EVERY
        windows = [Counts(every_step, n, every_step, every_step - n, update_steps=every_step) for n in flips]
        totals = [total + window for total, window in zip(totals, windows, strict=True)]
        rows = zip(names, [SIZE] * layers, windows, totals, strict=True)
        record = FlipRecord((point + 1) * EVERY, tuple(LayerRecord(*row) for row in rows))
        for sink in (events, *sinks):
            sink.write(record)
    for sink in (events, *sinks):
        sink.close()
    (where / "events").mkdir()
    os.link(file, where / "events" / file.name)


def measure(path: Path, options: Sequence[str]) -> tuple[float, float, float]:
    """Seconds, CPU seconds and peak memory in MB of a report's process."""
    begin = time.perf_counter()
    command = [sys.executable, "-m", "weightflip.report", str(path), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"the report of {path} failed")
    seconds = time.perf_counter() - begin
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--dir", type=Path, default=Path("runs/report_cost"))
    parser.add_argument("--sources", nargs="+", choices=SOURCES, default=SOURCES)
    parser.add_argument("--html", action="store_true", help="also write the HTML page")
    args = parser.parse_args()
    where = args.dir / f"{args.layers}x{args.points}"
    if not (where / "events").exists():
        shutil.rmtree(where, ignore_errors=True)
        write_run(where, args.layers, args.points)
    print(f"{'from':<8} {'MB':>8} {'seconds':>8} {'CPU':>8} {'peak MB':>8}")
    for source in args.sources:
        size = sum(file.stat().st_size for file in (where / source).iterdir()) / 1e6
        seconds, processor, peak = measure(
            where / source, ["--html", str(where / f"{source}.html")] if args.html else []
        )
        print(f"{source:<8} {size:>8,.0f} {seconds:>8.1f} {processor:>8.1f} {peak:>8,.0f}", flush=True)


if __name__ == "__main__":
    main()
