"""Output that is closed from inside, deleted during the run, or passed twice."""

from __future__ import annotations

import csv
import gc
import json
import os
import shutil
import warnings

import pytest
import torch
from test_sinks import scalars
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from weightflip import Alert, FlipTrackingOptimizer, track_flips
from weightflip.sinks import JSONLSink


def make(form=FlipTrackingOptimizer, **options):
    torch.manual_seed(0)
    model = nn.Linear(8, 8)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = form(inner, model, **{"log_every": 1, "quantizer": "e3m4", **options})
    return model, (inner if form is track_flips else handle), handle


def steps(model, optimizer, count=1):
    for _ in range(count):
        model(torch.ones(8)).square().sum().backward()
        optimizer.step()


def written_steps(model, optimizer, count=1):
    """Run steps until their records are on disk."""
    steps(model, optimizer, count)
    optimizer.flush()


def records(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["record"]["step"] for line in lines if "record" in line]


@pytest.mark.parametrize("what", ["close", "flush"])
@pytest.mark.parametrize("form", [FlipTrackingOptimizer, track_flips])
def test_a_callback_may_close_or_flush(tmp_path, form, what):
    seen, alerted, at = [], [], {}

    def function(record):
        seen.append(record.step)
        if record.step == 2:
            getattr(at["handle"], what)()

    def callback(event):
        alerted.append(event.step)
        getattr(at["handle"], what)()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, at["handle"] = make(
            form,
            sinks=[function, tmp_path / "a.jsonl", SummaryWriter(tmp_path), tmp_path / "a.csv"],
            alerts=[Alert("flip_rate >= 0 for 2 steps", layers="model", callback=callback)],
        )
        steps(model, optimizer, 5)
        at["handle"].close()
    assert seen == records(tmp_path / "a.jsonl") == [1, 2, 3, 4, 5]
    assert alerted == [3]
    assert '{"alert"' in (tmp_path / "a.jsonl").read_text()
    assert [step for step, _ in scalars(tmp_path)["flips/rate"]] == [1, 2, 3, 4, 5]
    with (tmp_path / "a.csv").open() as file:
        assert {int(row["step"]) for row in csv.DictReader(file)} == {1, 2, 3, 4, 5}


def test_a_sink_may_close_the_run_in_its_own_methods(tmp_path):
    class Closing:
        calls = 0

        def start(self, info, first_step): ...

        def write(self, record): ...

        def flush(self):
            Closing.calls += 1
            optimizer.flush()
            optimizer.close()

        close = flush

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, optimizer, _ = make(sinks=[Closing(), tmp_path / "a.jsonl"])
        steps(model, optimizer)
        optimizer.flush()
        steps(model, optimizer)
        optimizer.close()
    assert records(tmp_path / "a.jsonl") == [1, 2]
    assert 1 <= Closing.calls < 10


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
@pytest.mark.parametrize("how", ["directory", "file", "renamed", "replaced"])
def test_a_file_that_is_deleted_midway(tmp_path, name, how):
    path = tmp_path / "run" / name
    model, optimizer, _ = make(sinks=[path])
    written_steps(model, optimizer, 2)
    for _ in range(2):
        if how == "directory":
            shutil.rmtree(path.parent)
        elif how == "file":
            path.unlink()
        else:
            path.rename(tmp_path / "away")
            if how == "replaced":
                path.touch()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            written_steps(model, optimizer, 2)
        if _ == 0:
            (message,) = [str(w.message) for w in caught]
            assert name in message
            assert "deleted or moved" in message
            assert "earlier records are not written again" in message
        else:
            assert not caught
    optimizer.close()
    if name == "a.jsonl":
        assert records(path) == [5, 6]
        assert "info" in json.loads(path.read_text().splitlines()[0])
    else:
        with path.open() as file:
            assert {row["step"] for row in csv.DictReader(file)} == {"5", "6"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_file_that_is_emptied_midway_begins_with_its_heading(tmp_path, name):
    """Like logrotate's copytruncate."""
    path = tmp_path / name
    model, optimizer, _ = make(sinks=[path])
    written_steps(model, optimizer, 2)
    for _ in range(2):
        heading = path.read_text().splitlines()[0]
        os.truncate(path, 0)
        written_steps(model, optimizer, 2)
        assert path.read_text().splitlines()[0] == heading
    optimizer.close()
    assert path.read_text().count(heading) == 1
    if name == "a.jsonl":
        assert records(path) == [5, 6]
    else:
        with path.open() as file:
            assert {row["step"] for row in csv.DictReader(file)} == {"5", "6"}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_plain_file_gets_its_heading_once(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    reader = os.open(tmp_path / "a.jsonl", os.O_RDONLY | os.O_NONBLOCK)
    model, optimizer, _ = make(sinks=[tmp_path / "a.jsonl"])
    steps(model, optimizer, 3)
    optimizer.close()
    lines = os.read(reader, 65536).decode().splitlines()
    os.close(reader)
    assert [next(iter(json.loads(line))) for line in lines] == ["info", "record", "record", "record"]


def test_a_place_that_cannot_come_back_is_said(tmp_path):
    path = tmp_path / "run" / "a.jsonl"
    model, optimizer, _ = make(sinks=[path])
    written_steps(model, optimizer)
    shutil.rmtree(path.parent)
    path.parent.write_text("a file now")
    with pytest.warns(UserWarning, match=r"JSONLSink failed and gets no more records.*(FileExists|NotADirectory)"):
        written_steps(model, optimizer)


def test_another_working_directory_is_no_deletion(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path / "a")
    model, optimizer, _ = make(sinks=["x.jsonl", "x.csv"])
    written_steps(model, optimizer)
    monkeypatch.chdir(tmp_path / "b")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        written_steps(model, optimizer)
    assert records(tmp_path / "a" / "x.jsonl") == [1, 2]
    assert os.listdir() == []


def test_with_warnings_as_errors_no_record_is_lost(tmp_path):
    path = tmp_path / "run" / "a.jsonl"
    model, optimizer, _ = make(sinks=[path])
    written_steps(model, optimizer)
    shutil.rmtree(path.parent)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="deleted or moved"):
            written_steps(model, optimizer)
        written_steps(model, optimizer)
    assert records(path) == [2, 3]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("how", ["directory", "file"])
def test_tensorboards_directory_is_deleted_midway(tmp_path, how):
    run = tmp_path / "run"
    model, optimizer, _ = make(sinks=None, log_dir=run)
    steps(model, optimizer, 2)
    optimizer.flush()
    if how == "directory":
        shutil.rmtree(run)
    else:
        for file in run.iterdir():
            file.unlink()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(model, optimizer, 3)
        optimizer.close()
    (message,) = [text for w in caught if "deleted or moved" in (text := str(w.message))]
    assert str(run) in message
    assert [step for step, _ in scalars(run)["flips/rate"]] == [3, 4, 5]
    steps(model, optimizer)
    optimizer.close()
    assert [step for step, _ in scalars(run)["flips/rate"]] == [3, 4, 5, 6]


def test_a_path_twice_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    writer = SummaryWriter(tmp_path / "tb")
    seen = []

    def function(record):
        seen.append(record)

    for pair in (
        ["a.jsonl", "a.jsonl"],
        ["a.csv", tmp_path / "a.csv"],
        ["real/a.jsonl", tmp_path / "link" / "a.jsonl"],
        ["a.jsonl", JSONLSink("a.jsonl")],
        [writer, writer],
        [SummaryWriter("tb"), SummaryWriter(tmp_path / "tb")],
        [function, function],
    ):
        with pytest.raises(ValueError, match=r"in sinks= twice, and every point would be written twice.*remove one"):
            make(sinks=pair)
    make(sinks=["a.jsonl", "a.csv", "real/a.jsonl", writer, function])
    writer.close()


def test_the_place_of_another_live_wrapper_is_warned_about(tmp_path):
    for options in ({"sinks": None, "log_dir": tmp_path / "run"}, {"sinks": [tmp_path / "a.jsonl"]}):
        _, first, _ = make(**options)
        with pytest.warns(UserWarning, match=r"another tracked optimizer also writes there.*close\(\).*sinks=first"):
            model, second, _ = make(track_flips, **options)
        second.zero_grad()
        del first, second, model, _
        gc.collect()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Garbage-collected, closed, closed after a step, removed, or failed.
            model, third, _ = make(**options)
            third.close()
            model, fourth, _ = make(**options)
            steps(model, fourth)
            fourth.close()
            model, inner, handle = make(track_flips, **options)
            steps(model, inner)
            handle.remove()
            with pytest.raises(ValueError, match="matches none") as kept:
                make(include="nothing", **options)
            model, fifth, _ = make(**options)
            fifth.close()
            del kept
        # Continuing after close() opens the sinks again.
        model, sixth, _ = make(**options)
        with pytest.warns(UserWarning, match="another tracked optimizer also writes there"):
            steps(nn.Linear(8, 8), fourth)
        sixth.close()
        fourth.close()


def test_the_place_of_a_writer_of_the_users_own_is_warned_about(tmp_path):
    writer = SummaryWriter(tmp_path / "gan")
    for first, second in (
        ({"log_dir": tmp_path / "a"}, {"sinks": [SummaryWriter(tmp_path / "a")]}),
        ({"sinks": [writer]}, {"sinks": [writer]}),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model, generator, _ = make(**first)
            other, discriminator, _ = make(**second)
            for _ in range(2):
                steps(model, generator, 2)
                steps(other, discriminator, 2)
                generator.close()
                discriminator.close()
        (text,) = (str(w.message) for w in caught)
        assert "another tracked optimizer also writes there" in text
        assert "sinks=first" in text
    writer.close()


def test_one_run_of_several_optimizers_is_no_double(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        first = FlipTrackingOptimizer(torch.optim.SGD(model[0].parameters(), 0.1), model, log_dir=tmp_path)
        FlipTrackingOptimizer(torch.optim.SGD(model[1].parameters(), 0.1), model, sinks=first)
        first.close()
