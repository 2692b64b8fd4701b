"""The JSONL file next to TensorBoard's event file: exact numbers for reports, without disturbing TensorBoard."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from pathlib import Path

import pytest
import torch
from conftest import backward, digits_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import read_one, run_cli, train
from test_sinks import scalars
from torch.utils.tensorboard import SummaryWriter

from weightflip import FlipRecord, FlipTrackingOptimizer
from weightflip.metrics.oscillation import Oscillation
from weightflip.report import read_runs
from weightflip.report.events import find_span
from weightflip.sinks import JSONLSink, ReportFileSink, TensorBoardSink

METRICS = ("flips", "stalls", "oscillation", "travel", "range")


def beside(path) -> list[Path]:
    return sorted(path.glob("flips.*.jsonl"))


def events(path) -> list[Path]:
    return sorted(path.glob("*tfevents*"))


def test_a_report_has_the_counts_of_a_plain_run(digits, tmp_path):
    """A directory gives exactly the numbers of a JSONL file with the same records."""
    tensorboard = TensorBoardSink(str(tmp_path / "run"))
    sinks = [tensorboard, ReportFileSink(tensorboard), tmp_path / "full.jsonl"]
    options = {"metrics": METRICS, "quantizer": ["float8_e4m3", "int4:g16"], "alerts": ["flip_rate > 0"]}
    train(digits, 40, sinks=sinks, **options).close()
    found, full = read_one(tmp_path / "run"), read_one(tmp_path / "full.jsonl")
    assert found.info == full.info
    assert found.alerts == full.alerts != ()
    assert not found.notes
    assert list(found.layers) == list(full.layers)
    for name, layer in full.layers.items():
        assert found.layers[name].weights == layer.weights
        assert found.layers[name].values.keys() == layer.values.keys() >= {"travel_ratio", "zero_fraction"}
        for value, series in layer.values.items():
            other = found.layers[name].get(value)
            assert other.numerators.tolist() == series.numerators.tolist()
            assert other.denominators.tolist() == series.denominators.tolist()
            assert other.steps.tolist() == series.steps.tolist()
            assert other.gauge == series.gauge


def test_it_is_there_by_default_small_and_as_far_as_the_events(digits, tmp_path, capsys):
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(20)))
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters()), model, log_dir=tmp_path, log_every=1, exclude="19.weight"
    )
    for step in range(200):
        optimizer.zero_grad()
        model(digits[0][step : step + 8]).square().mean().backward()
        optimizer.step()
    (path,) = beside(tmp_path)
    assert len(path.read_bytes().splitlines()) >= 200, "on disk before it is flushed, but for the last record"
    optimizer.flush()
    assert len(path.read_bytes().splitlines()) == 1 + 200, "on disk before it is closed"
    optimizer.close()
    assert read_one(tmp_path).steps.tolist() == [step for step, _ in scalars(tmp_path)["flips/rate"]]
    pictures = 200_000
    assert path.stat().st_size < (events(tmp_path)[0].stat().st_size - pictures) / 2
    assert "rounded" not in run_cli(capsys, tmp_path)
    # Only with the default TensorBoard sink.
    with SummaryWriter(tmp_path / "own") as writer:
        train(digits, 10, sinks=[writer]).close()
    assert not beside(tmp_path / "own")


def test_rows_hold_what_the_report_reads(digits):
    records = []
    metrics = ("flips", "stalls", Oscillation(ema=0.01), "travel", "coverage")
    train(digits, 10, metrics=metrics, sinks=[records.append]).close()
    (record,) = records
    again = FlipRecord.from_dict(record.to_rows())
    assert [layer.values for layer in again.layers] == [layer.values for layer in record.layers]
    assert [(layer.window, layer.total) for layer in again.layers] == [(x.window, x.total) for x in record.layers]


def test_resumed_runs_go_on_and_trainings_at_once_stay_apart(digits, tmp_path):
    model = digits_model()
    first = train(digits, 20, model=model, log_dir=tmp_path)
    state = copy.deepcopy(first.state_dict())
    for step in range(20, 50):
        backward(model, digits, step)
        first.step()
    first.close()
    time.sleep(0.01)
    train(digits, 15, begin=20, state=state, log_dir=tmp_path).close()
    assert len(beside(tmp_path)) == 2
    run = read_one(tmp_path)
    assert run.steps.tolist() == [10, 20, 30, 35]
    assert run.layers["0.weight"].get("flip_rate").denominators.tolist() == [48 * 64 * n for n in (10, 10, 10, 5)]
    assert not run.notes

    at_once = tmp_path / "at once"
    models = [digits_model(seed=seed) for seed in range(2)]
    with pytest.warns(UserWarning, match="another tracked optimizer also writes there"):
        both = [
            FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=lr), model, log_dir=at_once)
            for model, lr in zip(models, (0.1, 1e-6), strict=True)
        ]
    for step in range(30):
        for model, optimizer in zip(models, both, strict=True):
            backward(model, digits, step)
            optimizer.step()
    for optimizer in both:
        optimizer.close()
    runs = read_runs([at_once])
    assert [run.name for run in runs] == ["writer 1", "writer 2"]
    for run, optimizer in zip(runs, both, strict=True):
        flips = optimizer.tracker.get_flip_counts()
        assert {n: layer.get("flip_rate").numerators.sum() for n, layer in run.layers.items()} == flips
        assert "wrote to this directory at the same time" in run.notes[-1]


def test_where_it_does_not_reach_as_far_the_event_files_are_read(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("weightflip.report.read._SLACK", 0.0)
    train(digits, 40, log_dir=tmp_path).close()
    (path,) = beside(tmp_path)
    lines = path.read_bytes().splitlines(keepends=True)
    denominators = read_one(tmp_path).layers["0.weight"].get("flip_rate").denominators
    assert denominators.tolist() == [48 * 64 * 10] * 4
    for kept in (lines[:3], lines[:1], []):
        path.write_bytes(b"".join(kept))
        run = read_one(tmp_path)
        assert run.steps.tolist() == [10, 20, 30, 40]
        assert "read from event files" in run.notes[-1]
    path.unlink()
    assert not read_one(tmp_path).notes


def test_a_full_disk_costs_the_file_and_not_tensorboard(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("weightflip.sinks.report_file.writer_id", lambda: "1.host.1.0")
    # Every write to this device fails like on a full disk.
    (tmp_path / "flips.1.host.1.0.jsonl").symlink_to("/dev/full")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(digits, 40, log_dir=tmp_path).close()
    messages = [str(warning.message) for warning in caught if "weightflip" in str(warning.message)]
    assert len(messages) == 1
    assert "ReportFileSink failed" in messages[0]
    assert "No space left on device" in messages[0]
    assert [step for step, _ in scalars(tmp_path)["flips/rate"]] == [10, 20, 30, 40]


def test_deleted_midway_it_goes_on_without_a_word(digits, tmp_path):
    model = digits_model()
    optimizer = train(digits, 20, model=model, log_dir=tmp_path)
    optimizer.flush()
    (path,) = beside(tmp_path)
    path.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(20, 40):
            backward(model, digits, step)
            optimizer.step()
        optimizer.close()
    assert [path.name] == [file.name for file in beside(tmp_path)]
    assert len(path.read_bytes().splitlines()) == 3
    run = read_one(tmp_path)
    assert run.steps.tolist() == [10, 20, 30, 40]
    assert "read from event files" in run.notes[-1]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_writes_a_file_of_its_own(digits, tmp_path, copied):
    tensorboard = TensorBoardSink(str(tmp_path))
    sinks = [tensorboard, ReportFileSink(tensorboard)]
    train(digits, 10, sinks=sinks).close()
    before = beside(tmp_path)[0].read_bytes()
    again = copied(sinks)
    assert again[1]._tensorboard is again[0]
    train(digits, 10, sinks=again).close()
    assert len(beside(tmp_path)) == 2
    assert before in [path.read_bytes() for path in beside(tmp_path)]


def test_a_remote_place_gets_none(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tensorboard = TensorBoardSink(writer=SummaryWriter(tmp_path / "local"))
    tensorboard.log_dir = "s3://bucket/run"
    train(digits, 10, sinks=[tensorboard, ReportFileSink(tensorboard)]).close()
    assert [path.name for path in tmp_path.iterdir()] == ["local"]


def test_a_training_that_opens_its_file_again_is_one(digits, tmp_path):
    model = digits_model()
    optimizer = train(digits, 20, model=model, sinks=[JSONLSink(str(tmp_path / "flips.jsonl"))])
    optimizer.close()
    for step in range(20, 40):
        backward(model, digits, step)
        optimizer.step()
    optimizer.close()
    run = read_one(tmp_path)
    assert run.steps.tolist() == [10, 20, 30, 40]
    assert not run.notes


@pytest.mark.parametrize("first_step", [0, 1, 127, 128, 300, 2**20])
def test_where_an_event_file_begins_and_ends(tmp_path, first_step):
    with SummaryWriter(tmp_path) as writer:
        writer.add_text("about", "flips/rate " * 30, 0)
        for step in range(first_step, first_step + 3):
            for tag in ("loss", "flips/rate", "flip_rate/a"):
                writer.add_scalar(tag, 0.5, step)
    (path,) = events(tmp_path)
    points = EventAccumulator(str(path)).Reload().Scalars("flips/rate")
    whole = path.read_bytes()
    assert find_span(path) == (points[0].wall_time, points[-1].wall_time, first_step)
    # A file that is still being written, or was cut off by a kill.
    path.write_bytes(whole[: whole.rindex(b"flips/rate") + 5])
    assert find_span(path) == (points[0].wall_time, points[-2].wall_time, first_step)
