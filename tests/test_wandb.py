"""The numbers in a real offline run of Weights & Biases, read back from its file."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import pickle
import struct
import subprocess
import sys
import time

import pytest
import torch
from conftest import backward, digits_model

from weightflip import FlipRecord, FlipTrackingOptimizer, RunInfo
from weightflip.records import Counts, Histogram, LayerRecord
from weightflip.sinks import WandbSink

if importlib.util.find_spec("wandb") is None:
    pytest.skip("needs the wandb package (pip install 'weightflip[integrations]')", allow_module_level=True)

import wandb
from wandb.proto import wandb_internal_pb2


def stored(path) -> list:
    """Everything in a finished offline run. wandb's process may still be writing."""
    for _ in range(300):
        found = read(path)
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.1)
    raise AssertionError(f"{path} has no end")


def read(path) -> list:
    """Protobufs in LevelDB's log format, after 7 bytes of header. Incomplete ones are skipped."""
    data = path.read_bytes()
    if not data:
        return []
    assert data[:4] == b":W&B"
    at, whole, found = 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + length > len(data):
            break
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the only or the last fragment
            found.append(wandb_internal_pb2.Record.FromString(whole))
            whole = b""
    return found


def rows(records) -> list[dict]:
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]


@pytest.fixture(scope="module")
def service():
    """wandb's own process, which all runs share."""
    yield
    wandb.teardown()


@pytest.fixture
def init(service, tmp_path, monkeypatch):
    """Arguments for ``wandb.init``: no network, and no files outside the test's directory."""
    for place in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(place, str(tmp_path))
    # Collecting data about the machine takes time.
    settings = wandb.Settings(
        x_disable_meta=True, x_disable_stats=True, disable_git=True, disable_code=True, console="off", silent=True
    )
    yield {"dir": str(tmp_path), "mode": "offline", "project": "flips", "settings": settings}
    if wandb.run is not None:
        wandb.run.finish()


def files(tmp_path) -> list:
    return sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def train(digits, steps=25, log=None, **options):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, **options)
    for step in range(steps):
        loss = backward(model, digits, step)
        optimizer.step()
        if log is not None:
            log(step, loss.item())
    return optimizer


def test_a_users_run_gets_the_numbers_beside_its_own(digits, init, tmp_path):
    run, records = wandb.init(**init), []
    optimizer = train(
        digits,
        sinks=[run, records.append],
        log_every=5,
        groups={"first": "0.*"},
        metrics=("flips", "stalls", "oscillation"),
        alerts=["flip_rate > 0"],
        log=lambda step, loss: run.log({"loss": loss}, step=step) if step < 15 else None,
    )
    optimizer.close()
    run.log({"mine": 1})  # not finished by the sink
    run.finish()

    (path,) = files(tmp_path)
    found = stored(path)
    # The user's steps are unchanged, and every loss has its own step.
    of_user = [(row["_step"], row["loss"]) for row in rows(found) if "loss" in row]
    assert [step for step, _ in of_user] == list(range(15))
    # Every record exists exactly once, at its own step.
    ours = {row["weightflip/step"]: row for row in rows(found) if "weightflip/step" in row}
    assert [row["weightflip/step"] for row in rows(found) if "weightflip/step" in row] == [5, 10, 15, 20, 25]
    for record in records:
        row, first = ours[record.step], record.layers[0]
        assert row["flips/rate"] == record.model.flip_rate
        assert row["flips/oscillation_ratio"] == record.model.values["oscillation_ratio"]
        assert row["stall_ratio/2.weight"] == record.layers[1].stall_ratio
        assert row["flip_rate_by_group/first"] == row["flip_rate/0.weight"] == first.flip_rate

    metrics = {record.metric.name or record.metric.glob_name: record.metric.step_metric for record in found}
    assert metrics["flips/*"] == metrics["flip_rate/*"] == metrics["flip_rate_by_group/*"] == "weightflip/step"
    config = next(u for record in found for u in record.config.update if u.key == "weightflip")
    assert json.loads(config.value_json)["tracked"]["0.weight"] == "float8_e4m3"
    alerts = [record.alert.text for record in found if record.WhichOneof("record_type") == "alert"]
    assert [text.split(" (")[0] for text in alerts] == [
        f"step 5: flip_rate > 0: {name}" for name in ("model", "0.weight", "2.weight")
    ]


def test_a_run_of_its_own(init, tmp_path):
    sink = WandbSink(**init)
    assert files(tmp_path) == []  # nothing before the first record
    counts = Counts(10, 1)
    histogram = Histogram((0.0, 1.0, 2.0), (7, 3))

    def write(sink, step):
        sink.start(RunInfo({}, {}), 0)
        sink.write(FlipRecord(step, (LayerRecord("fc", 10, counts, counts, histograms={"travel": histogram}),)))

    for step in (1, 2, 3):
        write(sink, step)
    run = wandb.run
    twin = pickle.loads(pickle.dumps(copy.deepcopy(sink)))
    sink.close()
    assert wandb.run is None  # finished
    (path,) = files(tmp_path)
    found = rows(stored(path))
    assert [row["weightflip/step"] for row in found] == [1, 2, 3]
    assert found[0]["flip_rate/fc"] == 0.1
    assert (found[0]["travel/fc/values"], found[0]["travel/fc/bins"]) == ([7, 3], [0, 1, 2])

    # Opened again, here or in a copy: the same run.
    for again, step in ((sink, 4), (twin, 5)):
        write(again, step)
        assert wandb.run.id == run.id
        again.close()
    steps = [row["weightflip/step"] for path in files(tmp_path) for row in rows(stored(path))]
    assert sorted(steps) == [1, 2, 3, 4, 5]


SCRIPT = """
import sys, torch, wandb
from weightflip import FlipTrackingOptimizer
settings = wandb.Settings(silent=True, x_disable_meta=True, x_disable_stats=True)
run = wandb.init(dir=sys.argv[1], mode="offline", project="flips", settings=settings)
model = torch.nn.Linear(8, 8)
optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[run])
for _ in range(13):
    model(torch.ones(8)).sum().backward()
    optimizer.step()
"""


def test_a_script_that_never_closes_loses_nothing(tmp_path):
    # A separate service, which ends with the process.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    assert "failed" not in done.stderr
    (path,) = files(tmp_path)
    assert [row["weightflip/step"] for row in rows(stored(path))] == [10, 13]


def test_mistakes():
    with pytest.raises(TypeError, match=r"a run or arguments for wandb.init, got a run and \['project'\]"):
        WandbSink(object(), project="flips")
    with pytest.raises(TypeError, match="sinks= expects SummaryWriters, wandb runs"):
        FlipTrackingOptimizer(torch.optim.SGD(digits_model().parameters(), lr=1), sinks=[wandb])
