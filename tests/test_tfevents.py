"""Event files are read exactly as by TensorBoard's own reader, and alerts in them are recovered."""

from __future__ import annotations

import math
import random

import pytest
import torch
from conftest import backward, digits_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_report import read_one
from torch.utils.tensorboard import SummaryWriter

from weightflip import Alert, FlipTrackingOptimizer
from weightflip.report import find
from weightflip.report.tfevents import read


def oracle(path):
    """Steps, times and values by tag, as read by tensorboard."""
    sizes = {"scalars": 0, "tensors": 0, "images": 1}
    events = EventAccumulator(str(path), sizes, purge_orphaned_data=False).Reload()
    return {tag: [(e.step, e.wall_time, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def files(path):
    return sorted(path.glob("*tfevents*"))


def write_much(path):
    """Points with the same layout, and everything that may come between: other steps, tags and kinds of events."""
    draw = random.Random(0)
    with SummaryWriter(path) as writer:
        step = 0
        for point in range(80):
            # Steps of 1, 2 and 3 bytes.
            step += draw.choice((1, 3, 700))
            writer.add_scalar("loss", draw.random(), step - 1)
            if point % 3 == 0:
                writer.add_scalar("loss", draw.random(), step)
            layers = 20 + (point > 30) + 5 * (50 < point < 60)
            for tag in ("flips/rate", *(f"flip_rate/{at}" for at in range(layers))):
                value = math.nan if draw.random() < 0.01 else draw.choice((0.0, 1.0, draw.random()))
                writer.add_scalar(tag, value, step)
            if point % 20 == 0:
                writer.add_text("weightflip/tracking", f"text {point}", step)
                writer.add_image("picture", torch.zeros(3, 4, 4), step)
                writer.add_histogram("histogram", torch.arange(9.0), step)
            if point == 70:
                step -= 900
    (file,) = files(path)
    return file


def same(found, expected):
    """NaN equals NaN. Points that are read together get the time of the first of them."""
    assert found.keys() == expected.keys()
    for tag, points in found.items():
        steps, times, values = zip(*expected[tag], strict=True)
        assert points.steps.tolist() == list(steps), tag
        assert [repr(value) for value in points.values.tolist()] == [repr(value) for value in values], tag
        assert points.times.tolist() == pytest.approx(list(times), abs=2.0)


def test_scalars_are_those_that_tensorboard_reads(tmp_path):
    file = write_much(tmp_path)
    found = read([file])
    assert len(found.scalars) > 25
    same(found.scalars, oracle(file))
    assert [text.text for text in found.texts["weightflip/tracking"]] == [f"text {at}" for at in (0, 20, 40, 60)]
    # Tags written together share one array of steps.
    assert found.scalars["flip_rate/1"].steps is found.scalars["flip_rate/2"].steps


def test_a_torn_file_is_read_up_to_where_it_is_torn(tmp_path):
    file = write_much(tmp_path)
    data = file.read_bytes()
    draw = random.Random(1)
    for cut in [1, 5, 16, 17, *(draw.randrange(len(data)) for _ in range(12))]:
        file.write_bytes(data[:-cut])
        same(read([file]).scalars, oracle(file))
    # Zeros, which a file system may leave after a crash.
    file.write_bytes(data + bytes(5000))
    same(read([file]).scalars, oracle(file))


def test_no_damage_ends_the_reading(tmp_path):
    file = write_much(tmp_path)
    data = file.read_bytes()
    draw = random.Random(2)
    for _ in range(60):
        damaged = bytearray(data)
        at = draw.randrange(len(data))
        if draw.random() < 0.5:
            damaged[at] ^= 1 << draw.randrange(8)
        else:
            del damaged[at : at + draw.choice((1, 50))]
        file.write_bytes(damaged)
        whole = oracle(file)
        found = read([file]).scalars
        # Everything before the damage is the same.
        for tag, points in whole.items():
            if at > len(data) // 2 and len(points) > 2:
                assert found[tag].steps.tolist()[:3] == [step for step, _, _ in points[:3]]


@pytest.mark.parametrize("width", [2, 12])
def test_alerts_of_event_files_are_those_of_jsonl(digits, tmp_path, width):
    """A few layers are listed by name, many at once by number."""
    layers = [torch.nn.Linear(64 if at == 0 else 16, 16) for at in range(width)]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(16, 10)) if width > 2 else digits_model()
    rules = ["flip_rate >= 0", Alert("stall_ratio > 0.5 for 10 steps", layers="0.*"), Alert("flip_rate < 2", "model")]
    with SummaryWriter(tmp_path / "events") as writer:
        optimizer = FlipTrackingOptimizer(
            torch.optim.SGD(model.parameters(), lr=1e-6),
            model,
            sinks=[writer, tmp_path / "jsonl" / "flips.jsonl"],
            alerts=rules,
        )
        for step in range(40):
            backward(model, digits, step)
            optimizer.step()
        optimizer.close()
    events, jsonl = (
        [finding for finding in find([read_one(tmp_path / name)]) if finding.rule == "alert"]
        for name in ("events", "jsonl")
    )
    assert [finding.text for finding in events] == [finding.text for finding in jsonl]
    tracked = 2 if width == 2 else 13
    everywhere = "both layers" if tracked == 2 else "all 13 layers"
    texts = [finding.text for finding in events]
    assert f"Alert at step 10 for model and {everywhere}: flip_rate >= 0" in texts
    assert "Alert at step 20 for 0.weight: stall_ratio > 0.5 for 10 steps (1, since step 10)" in texts
    assert any(text.startswith("Alert at step 10 for model: flip_rate < 2 (") for text in texts)
    # By hand: two layers and the model for the first rule, at most three lines; one line for thirteen layers.
    text = read(files(tmp_path / "events")).texts["weightflip/tracking_alerts"][0].text
    lines = [line for line in text.splitlines() if "flip_rate >= 0" in line]
    assert len(lines) == (3 if tracked == 2 else 1)
    assert tracked == 2 or lines[0].endswith(" and 9 more")
