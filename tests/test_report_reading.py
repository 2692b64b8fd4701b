"""Reports on files that hold more or less than one training: damage, other writers, other kinds of files."""

from __future__ import annotations

import contextlib
import io
import math
import random
import warnings

import pytest
from test_report import read_one, train
from test_shown_names import train_evil
from torch.utils.tensorboard import SummaryWriter

from weightflip.metrics import LayerMetric, Metric
from weightflip.report import find, read_runs
from weightflip.report.html import write_html
from weightflip.report.run import ReportError
from weightflip.report.table import write_csv
from weightflip.report.terminal import print_report
from weightflip.sinks import ReportFileSink, TensorBoardSink


class Progress(Metric):
    """Grows with each point, so that its mean differs from its last value."""

    name = "progress"
    gauges = ("progress_gauge",)

    def open(self, name, weight):
        return _LayerProgress()


class _LayerProgress(LayerMetric):
    def __init__(self):
        self.looks = 0

    def gauge(self, weight, gauges, bins):
        self.looks += 1
        gauges[0, 0], gauges[0, 1] = self.looks / 4, 1


@pytest.mark.parametrize("where", ["events", "flips.jsonl"])
def test_a_users_own_gauge_is_a_gauge(digits, tmp_path, where):
    options = {"log_dir": tmp_path / where} if where == "events" else {"sinks": [tmp_path / where]}
    train(digits, 40, metrics=("flips", Progress()), **options).close()
    series = read_one(tmp_path / where).layers["0.weight"].get("progress_gauge")
    assert series.values.tolist() == [0.25, 0.5, 0.75, 1]
    assert series.gauge
    assert series.summary == 1


def test_points_that_are_not_finite_are_left_out_and_said(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for step, rate in enumerate([0.5, math.nan, 0.25, math.inf], 1):
            writer.add_scalar("flips/rate", rate, step)
            writer.add_scalar("flip_rate/a", rate, step)
    run = read_one(tmp_path)
    assert run.layers["a"].get("flip_rate").values.tolist() == [0.5, 0.25]
    assert run.layers["a"].get("flip_rate").summary == pytest.approx((0.5 + 2 * 0.25) / 3, rel=0.2)
    assert run.notes == ("4 non-finite points skipped",)


def test_writers_at_once_are_kept_apart_and_resumed_ones_are_one(tmp_path):
    def write(writer, rate, steps):
        for step in steps:
            writer.add_scalar("flips/rate", rate, step)
            writer.add_scalar("flip_rate/a", rate, step)

    with SummaryWriter(tmp_path, filename_suffix=".a") as a, SummaryWriter(tmp_path, filename_suffix=".b") as b:
        for step in range(1, 6):
            write(a, 0.25, [step])
            write(b, 0.75, [step])
    with SummaryWriter(tmp_path, filename_suffix=".others") as others:
        others.add_scalar("loss", 1, 1)
    runs = read_runs([tmp_path])
    assert [run.name for run in runs] == ["writer 1", "writer 2"]
    assert [set(run.layers["a"].get("flip_rate").values.tolist()) for run in runs] == [{0.25}, {0.75}]
    assert all(run.steps.tolist() == [1, 2, 3, 4, 5] for run in runs)
    assert all("one of 2 trainings that wrote to this directory at the same time" in run.notes[-1] for run in runs)

    resumed = tmp_path / "resumed"
    for suffix, steps in ((".a", (1, 2, 3)), (".b", (3, 4))):
        with SummaryWriter(resumed, filename_suffix=suffix) as writer:
            write(writer, 0.5, steps)
    run = read_one(resumed)
    assert run.steps.tolist() == [1, 2, 3, 4]
    assert not run.notes


def test_two_writers_of_one_jsonl_file_are_kept_apart(digits, tmp_path):
    for name, lr in (("a", 1e-3), ("b", 1e-2)):
        train(digits, 40, lr=lr, sinks=[tmp_path / f"{name}.jsonl"]).close()
    a, b = ((tmp_path / f"{name}.jsonl").read_text().splitlines() for name in ("a", "b"))
    mixed = tmp_path / "mixed.jsonl"
    lines = [line for pair in zip(a, b, strict=True) for line in pair]
    mixed.write_text("\n".join(lines) + "\n")
    runs = read_runs([mixed])
    for run, name in zip(runs, "ab", strict=True):
        alone = read_one(tmp_path / f"{name}.jsonl")
        for layer, other in zip(run.layers.values(), alone.layers.values(), strict=True):
            assert layer.get("flip_rate").numerators.tolist() == other.get("flip_rate").numerators.tolist()
        assert "one of 2 trainings that wrote to this file at the same time" in run.notes[-1]
    assert [run.name for run in runs] == ["writer 1", "writer 2"]
    # Files of earlier versions do not name the writer of a line.
    mixed.write_text("\n".join(line[: line.index(', "writer"')] + "}" for line in lines) + "\n")
    (note,) = read_one(mixed).notes
    assert "steps go back 4 times without a restart" in note
    # One after the other: this is one training, resumed or restarted.
    mixed.write_text("\n".join([*a[:3], *b]) + "\n")
    run = read_one(mixed)
    assert run.steps.tolist() == [10, 20, 30, 40]
    assert not run.notes


ODD = [
    b"[]", b"5", b"null", b'"text"', b"not JSON", b"\xff\xfe{", b"NaN", b'{"info": 5}', b'{"info": {"tracked": 5}}',
    b'{"info": {"tracked": {"a": 5}}}', b'{"info": {"notes": [5]}}', b'{"alert": []}', b'{"alert": {"step": "x"}}',
    b'{"record": {"step": 5, "layers": 5}}', b'{"record": {"step": 5, "layers": [[]]}}', b'{"record": []}',
    b'{"record": {"step": ' + b"9" * 5000 + b', "layers": []}}', b"[" * 100_000, b'{"a":' * 100_000,
    b'{"record": {"step": 5, "layers": ' + b"[" * 100_000,
]  # fmt: skip


def look_at(path, html=None):
    """All views of a file. Files that cannot be read at all raise an error that says so."""
    try:
        runs = read_runs([path])
    except ReportError:
        return []
    out = io.StringIO()
    print_report(runs, find(runs), out)
    write_csv(runs, path.with_suffix(".csv"))
    if html is not None:
        write_html(runs, find(runs), html)
    return runs


def test_damaged_lines_are_counted_and_left_out(digits, tmp_path):
    path = tmp_path / "flips.jsonl"
    train(digits, 40, sinks=[path], metrics=("flips", "stalls", "oscillation", "range")).close()
    lines = path.read_bytes().splitlines()
    whole = read_one(path)
    path.write_bytes(b"\n".join([lines[0], *ODD, *lines[1:], b"", b'{"later": "kind"}']) + b"\n")
    (run,) = look_at(path, tmp_path / "report.html")
    assert run.notes == (
        f"{len(ODD)} damaged lines skipped: incomplete, because the training was killed or is still writing, or "
        "modified afterward",
    )
    assert run.steps.tolist() == whole.steps.tolist()
    for cell in (b'"5"', b"1" + b"0" * 400, b"-5", b"true", b"2.5", b"NaN", b"[]", b"null"):
        for key in (b"flips", b"weight_steps", b"weights", b"nonfinite"):
            head, _, rest = lines[2].partition(b'"' + key + b'": ')
            broken = head + b'"' + key + b'": ' + cell + rest[rest.index(b",") :]
            path.write_bytes(b"\n".join([*lines[:2], broken, *lines[3:]]) + b"\n")
            run = read_one(path)
            assert run.steps.tolist() == [10, 30, 40], (key, cell)
            assert run.notes[0].startswith("1 damaged line skipped"), (key, cell)


def test_no_mutation_of_a_file_ends_a_report(tmp_path):
    path = tmp_path / "flips.jsonl"
    options = {"metrics": ("flips", "stalls", "oscillation", "travel", "range"), "alerts": ["flip_rate >= 0"]}
    tensorboard = TensorBoardSink(str(tmp_path / "run"))
    train_evil(sinks=[path, tensorboard, ReportFileSink(tensorboard)], log_every=2, **options).close()
    (rows,) = (tmp_path / "run").glob("*.jsonl")
    texts = [path.read_bytes(), rows.read_bytes()]
    draw = random.Random(0)
    cells = [
        b'"x"',
        b"9" * 400,
        b"1e999",
        b"-1",
        b"true",
        b"null",
        b"[]",
        b"{}",
        b"NaN",
        b"1e308",
        b"0",
        b"\xff",
        b"\x00",
    ]
    for at in range(400):
        text = texts[at >= 300]
        data = bytearray(text)
        for _ in range(draw.choice((1, 3, 30))):
            begin = draw.randrange(len(data))
            how = draw.randrange(5)
            if how == 0:
                data[begin] = draw.randrange(256)
            elif how == 1:
                del data[begin : begin + draw.choice((1, 20, 2000))]
            elif how == 2:
                data[begin:begin] = data[: draw.choice((10, 3000))]
            else:
                # A number replaced by another value.
                end = begin = data.find((b": ", b",")[at >= 300], begin) + (2, 1)[at >= 300]
                while end < len(data) and data[end] in b"0123456789.":
                    end += 1
                data[begin:end] = draw.choice(cells)
        path.write_bytes(data)
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            with contextlib.suppress(ReportError):
                read_runs([path])
        if at % 10 == 0:
            look_at(path, tmp_path / "report.html" if at % 100 == 0 else None)
