"""Records are written in a background thread: what waits for it, what does not, and what a killed process loses."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch

from weightflip import FlipTrackingOptimizer
from weightflip.sinks import BackgroundSink


class Slow(BackgroundSink):
    """Writes a record when it is allowed to."""

    def __init__(self):
        self.may_write, self.is_writing = threading.Event(), threading.Event()
        self.steps, self.threads = [], {}

    def _came(self, method):
        self.threads.setdefault(method, set()).add(threading.current_thread() is threading.main_thread())

    def start(self, info, first_step):
        self._came("start")

    def write(self, record):
        self._came("write")
        self.is_writing.set()
        assert self.may_write.wait(60)
        self.steps.append(record.step)

    def alert(self, event):
        self._came("alert")
        self.steps.append(event.message)

    def flush(self):
        self._came("flush")

    def close(self):
        self._came("close")


class Direct(Slow):
    writes_in_background = False


def make(*sinks, **options):
    model = torch.nn.Linear(8, 8)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = FlipTrackingOptimizer(inner, model, quantizer="e3m4", log_every=1, sinks=sinks, **options)

    def step():
        model(torch.ones(8)).square().sum().backward()
        optimizer.step()

    return optimizer, step


def test_a_step_does_not_wait_for_its_record():
    sink = Slow()
    optimizer, step = make(sink, alerts=["flip_rate >= 0"])
    step()
    assert sink.is_writing.wait(60)
    assert sink.steps == []
    sink.may_write.set()
    optimizer.flush()
    assert sink.steps[0] == 1
    assert "flip_rate" in sink.steps[1], "alerts come after their record"
    optimizer.close()
    main, other = {True}, {False}
    assert sink.threads == {"start": main, "write": other, "alert": other, "flush": main, "close": main}


def test_one_record_at_a_time_is_on_its_way():
    sink = Slow()
    optimizer, step = make(sink)
    step()
    second = threading.Thread(target=step)
    second.start()
    second.join(0.3)
    assert second.is_alive(), "a second record waits for the first"
    sink.may_write.set()
    second.join(60)
    assert not second.is_alive()
    optimizer.close()
    assert sink.steps == [1, 2]


def test_what_users_write_is_called_in_the_trainings_thread():
    threads, direct = set(), Direct()
    direct.may_write.set()
    optimizer, step = make(lambda record: threads.add(threading.current_thread()), direct)
    before = threading.active_count()
    step()
    assert threads == {threading.main_thread()}
    assert direct.threads["write"] == {True}
    assert threading.active_count() == before, "no thread where nothing needs one"
    optimizer.close()


def test_a_fault_is_warned_about_and_costs_the_others_nothing(tmp_path):
    class Broken(Slow):
        def write(self, record):
            raise ValueError("no room")

    other = Slow()
    other.may_write.set()
    optimizer, step = make(Broken(), other, alerts=["flip_rate >= 0"])

    def step_and_flush():
        step()
        optimizer.flush()

    with pytest.warns(UserWarning, match="Broken failed and gets no more records, training continues: ValueError: no"):
        step_and_flush()
    step()
    optimizer.close()
    assert [s for s in other.steps if isinstance(s, int)] == [1, 2]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_process_is_forked_while_a_record_is_written():
    sink = Slow()
    optimizer, step = make(sink)
    step()
    assert sink.is_writing.wait(60)
    child = os.fork()
    if child == 0:
        # The child writes nothing for its parent, and does not wait for a thread that it lacks.
        import warnings

        warnings.simplefilter("ignore")
        signal.alarm(60)
        step()
        copy.deepcopy(optimizer._session.log.sinks._worker)
        optimizer.flush()
        optimizer.close()
        os._exit(0 if sink.steps == [] else 1)
    _, status = os.waitpid(child, 0)
    sink.may_write.set()
    optimizer.close()
    assert status == 0
    assert sink.steps == [1]


def test_a_copy_made_while_a_record_is_written(tmp_path):
    optimizer, step = make(tmp_path / "a.jsonl")
    step()
    other = copy.deepcopy(optimizer)
    step()
    optimizer.close()
    assert steps_in(tmp_path / "a.jsonl") == [1, 2]
    other.close()


def steps_in(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line["record"]["step"] for line in lines if "record" in line]


SCRIPT = """
import os, signal, sys, torch
from weightflip import FlipTrackingOptimizer
model = torch.nn.Linear(8, 8)
inner = torch.optim.SGD(model.parameters(), lr=0.1)
optimizer = FlipTrackingOptimizer(inner, model, quantizer="e3m4", log_every=1, sinks=[sys.argv[1]])
for _ in range(20):
    model(torch.ones(8)).square().sum().backward()
    optimizer.step()
if sys.argv[2] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("how", ["killed", "ends"])
def test_what_a_process_that_never_closes_leaves(tmp_path, how):
    path = tmp_path / "a.jsonl"
    done = subprocess.run([sys.executable, "-c", SCRIPT, path, how], capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    assert done.returncode == (-signal.SIGKILL if how == "killed" else 0)
    least = 19 if how == "killed" else 20
    found = steps_in(path)
    assert found == list(range(1, len(found) + 1))
    assert len(found) >= least
