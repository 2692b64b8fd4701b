"""Records read as arrays equal those of the record parser, and neither accepts what the other rejects."""

from __future__ import annotations

import json
import random

import numpy as np
from test_shown_names import train_evil

from weightflip.records import FlipRecord
from weightflip.report.lines import DamagedLine, parse_record
from weightflip.report.record_arrays import IrregularRecord, RecordArrays
from weightflip.sinks import ReportFileSink, TensorBoardSink


def same(a: RecordArrays, b: RecordArrays) -> bool:
    arrays = [(getattr(a, name), getattr(b, name)) for name in ("weights", "nonfinite", "window", "total")]
    for of in ("window_ratios", "total_ratios", "gauges"):
        mine, others = getattr(a, of), getattr(b, of)
        if mine.keys() != others.keys():
            return False
        arrays += [(mine[name], others[name]) for name in mine]
    return a.names == b.names and all(np.array_equal(x, y, equal_nan=True) for x, y in arrays)


def test_blocks_are_records(tmp_path):
    path = tmp_path / "flips.jsonl"
    options = {"metrics": ("flips", "stalls", "oscillation", "travel", "range"), "log_every": 2}
    tensorboard = TensorBoardSink(str(tmp_path / "run"))
    train_evil(sinks=[path, tensorboard, ReportFileSink(tensorboard)], **options).close()
    (beside,) = (tmp_path / "run").glob("*.jsonl")
    draw = random.Random(0)
    cells = [b'"x"', b"9" * 40, b"1e999", b"-1", b"true", b"null", b"[]", b"{}", b"NaN", b"1e308", b"0", b"2.5"]
    taken = refused = 0
    for kind in (path, beside):
        for line in [line for line in kind.read_bytes().splitlines() if line.startswith(b'{"record"')][:3]:
            record = json.loads(line)["record"]
            whole = RecordArrays.from_json(record)
            assert same(whole, RecordArrays.from_record(FlipRecord.from_dict(record)))
            assert whole.gauges
            assert whole.window_ratios
            assert len(whole.names) > 2
            # Any number replaced by another value, or any key missing.
            places = [at for at, byte in enumerate(line) if byte in b"0123456789" and line[at - 1] in b' [,"']
            for _ in range(150):
                begin = end = draw.choice(places)
                while line[end] in b"0123456789.":
                    end += 1
                broken = line[:begin] + draw.choice(cells) + line[end:]
                try:
                    data = json.loads(broken)["record"]
                except ValueError:
                    continue
                try:
                    fast = RecordArrays.from_json(data)
                except IrregularRecord:
                    refused += 1
                    continue
                taken += 1
                assert same(fast, RecordArrays.from_record(FlipRecord.from_dict(data)))
                if data["step"] == record["step"]:
                    # The parser that checks each number also accepts it.
                    assert same(parse_record(broken, record["step"]), fast)
    assert refused > 100 < taken
    # Earlier versions have fewer counts and fields.
    record = json.loads(next(line for line in path.read_bytes().splitlines() if line.startswith(b'{"record"')))[
        "record"
    ]
    for layer in record["layers"]:
        del layer["histograms"], layer["gauges"], layer["nonfinite"]
        for period in ("window", "total"):
            del layer[period]["scale_steps"], layer[period]["scale_changes"], layer[period]["ratios"]
    earlier = RecordArrays.from_json(record)
    assert same(earlier, RecordArrays.from_record(FlipRecord.from_dict(record)))
    assert not earlier.gauges
    for line in (b"{}", b'{"record": 5}', b'{"record": {"step": 1}}', b'{"record": {"step": 1, "rows": [[1]]}}'):
        try:
            parse_record(line, 1)
        except DamagedLine:
            continue
        raise AssertionError(line)
