"""Output in real files, read back by the readers that users have."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import math
import pickle
import warnings

import pytest
import torch
from conftest import BruteForce, backward, digits_model
from processes import run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from weightflip import FlipRecord, FlipTrackingOptimizer
from weightflip.sinks import JSONLSink, make_sink
from weightflip.sinks.base import FILE_SINKS

STEPS = 25


def scalars(log_dir) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(log_dir), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def train(digits, steps=STEPS, model=None, **options):
    """Trains on digits. Yields the optimizer and the brute-force totals after each step."""
    model = model or digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, **options)
    brute, history = BruteForce(model), []
    for step in range(steps):
        backward(model, digits, step)
        brute.before()
        optimizer.step()
        brute.after()
        history.append((dict(brute.flips), dict(brute.updates), dict(brute.stalled)))
    return optimizer, history


def test_tensorboard_tags_steps_and_values(digits, tmp_path):
    optimizer, history = train(digits, log_dir=tmp_path, log_every=10)
    optimizer.close()
    found = scalars(tmp_path)

    layers = {"0.weight": 48 * 64, "2.weight": 10 * 48}
    expected = {"flips/rate", "flips/cumulative_rate", "flips/stall_ratio", "flips/updated_fraction"}
    values = ("flip_rate", "cumulative_flip_rate", "stall_ratio", "updated_fraction")
    expected |= {f"{tag}/{name}" for tag in values for name in layers}
    # Repeated under a tag that TensorBoard opens first.
    expected |= {f"Model/{tag}" for tag in values}
    assert set(found) == expected

    zero = dict.fromkeys(layers, 0)
    ends = [0, 10, 20, 25]
    for start, end in itertools.pairwise(ends):
        then = history[start - 1] if start else (zero, zero, zero)
        flips, updates, stalled = (
            {name: now[name] - before[name] for name in layers}
            for now, before in zip(history[end - 1], then, strict=True)
        )
        at = ends.index(end) - 1
        for name, size in layers.items():
            for tag, value in [
                (f"flip_rate/{name}", flips[name] / (size * (end - start))),
                (f"cumulative_flip_rate/{name}", history[end - 1][0][name] / size),
                (f"stall_ratio/{name}", stalled[name] / updates[name]),
            ]:
                assert found[tag][at] == (end, pytest.approx(value, rel=1e-6)), tag
        total = sum(layers.values())
        for tag, value in [
            ("flips/rate", sum(flips.values()) / (total * (end - start))),
            ("flips/cumulative_rate", sum(history[end - 1][0].values()) / total),
            ("flips/stall_ratio", sum(stalled.values()) / sum(updates.values())),
        ]:
            assert found[tag][at] == (end, pytest.approx(value, rel=1e-6)), tag
    assert all(len(points) == 3 for points in found.values())


def test_text_panel_says_what_is_tracked_and_skipped(digits, tmp_path):
    optimizer, _ = train(digits, 10, log_dir=tmp_path)
    optimizer.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()["tensors"]
    text = events.Tensors("weightflip/tracking/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| `0.weight` | 48x64 | float32 | float8_e4m3 |" in text
    assert "| `0.bias` | 1-dimensional" in text
    assert "tracked as if cast to float8_e4m3" in text
    assert "optimizer=AdamW" in text
    assert "custom_scalars__config__" in tags


def test_no_updates_write_no_stall_ratio(tmp_path):
    model = digits_model()
    with FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, log_dir=tmp_path) as optimizer:
        optimizer.step()
    found = scalars(tmp_path)
    assert "flips/rate" in found
    assert not [tag for tag in found if "stall" in tag]


def test_nonfinite_weights_show_up(digits, tmp_path):
    model = digits_model()
    with torch.no_grad():
        model[0].weight[0, :3] = math.nan
    optimizer, _ = train(digits, 10, model=model, log_dir=tmp_path)
    optimizer.close()
    # One NaN spreads to all activations, and to all weights within one step.
    assert scalars(tmp_path)["nonfinite_weights/0.weight"][0][1] >= 3


def test_jsonl(digits, tmp_path):
    path = tmp_path / "deep" / "flips.jsonl"
    optimizer, history = train(digits, sinks=[path], log_every=10)
    before_close = [json.loads(line) for line in path.read_text().splitlines()]
    optimizer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines[:-1] == before_close  # a crash loses no complete record
    assert lines[0]["info"]["tracked"]["0.weight"] == ["48x64", "float32", "float8_e4m3"]
    records = [FlipRecord.from_dict(line["record"]) for line in lines[1:]]
    assert [record.step for record in records] == [10, 20, 25]
    last = {layer.name: layer.total for layer in records[-1].layers}
    for name, counts in last.items():
        assert (counts.flips, counts.updates, counts.stalled) == tuple(total[name] for total in history[-1])


def test_callable_sees_records(digits):
    records = []
    _, history = train(digits, sinks=[records.append], log_every=5)
    assert [record.step for record in records] == [5, 10, 15, 20, 25]
    assert records[-1].model.total.flips == sum(history[-1][0].values())


def test_own_writer_is_used_and_left_open(digits, tmp_path):
    writer = SummaryWriter(tmp_path)
    optimizer, _ = train(digits, 10, sinks=[writer])
    optimizer.close()
    writer.add_scalar("mine", 1.0, 1)
    writer.close()
    assert {"mine", "flips/rate"} <= set(scalars(tmp_path))


def test_nothing_is_made_before_the_first_record(digits, tmp_path):
    optimizer, _ = train(digits, 9, log_dir=tmp_path / "run", log_every=10)
    assert not (tmp_path / "run").exists()
    optimizer.flush()
    assert scalars(tmp_path / "run")["flips/rate"][0][0] == 9
    optimizer.close()


def test_no_sinks_write_nothing_and_keep_the_numbers(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer, history = train(digits, sinks=[])
    optimizer.close()
    assert list(tmp_path.iterdir()) == []
    assert optimizer.tracker.get_flip_counts() == history[-1][0]


def test_default_place_is_the_summary_writers(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    optimizer, _ = train(digits, 10)
    optimizer.close()
    (run,) = (tmp_path / "runs").iterdir()
    assert scalars(run)["flips/rate"][0][0] == 10


def test_a_broken_sink_warns_once_and_the_others_go_on(digits):
    records = []

    def disk_full(record):
        raise OSError(28, "No space left on device")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer, history = train(digits, sinks=[disk_full, records.append], log_every=5)
    messages = [str(w.message) for w in caught if "weightflip" in str(w.message)]
    assert len(messages) == 1
    assert "No space left on device" in messages[0]
    assert "training continues" in messages[0]
    assert len(records) == 5
    assert optimizer.tracker.get_flip_counts() == history[-1][0]


def test_a_full_disk_costs_records_not_the_run(digits, tmp_path):
    # Every write to this device fails like on a full disk.
    (tmp_path / "flips.jsonl").symlink_to("/dev/full")
    with pytest.warns(UserWarning, match="JSONLSink failed .* No space left on device"):
        optimizer, history = train(digits, sinks=[tmp_path / "flips.jsonl"])
    assert optimizer.tracker.get_flip_counts() == history[-1][0]


SCRIPT = """
import torch
from weightflip import FlipTrackingOptimizer
model = torch.nn.Linear(8, 8)
optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, log_dir={log_dir!r})
for _ in range(13):
    model(torch.ones(8)).sum().backward()
    optimizer.step()
"""


def test_a_script_that_never_closes_loses_nothing(tmp_path):
    run_python("-c", SCRIPT.format(log_dir=str(tmp_path)))
    assert [step for step, _ in scalars(tmp_path)["flips/rate"]] == [10, 13]


def test_garbage_collection_writes_the_last_record(digits):
    records = []
    optimizer, _ = train(digits, 7, sinks=[records.append])
    assert records == []
    del optimizer
    gc.collect()
    assert [record.step for record in records] == [7]


def test_a_discarded_copy_writes_nothing(digits, tmp_path):
    path = tmp_path / "flips.jsonl"
    optimizer, _ = train(digits, 15, sinks=[path])
    optimizer.flush()
    before = path.read_text()
    twin = copy.deepcopy(optimizer)
    del twin
    gc.collect()
    assert path.read_text() == before


def test_functions_that_do_not_pickle_are_left_behind(digits):
    records = []
    optimizer, _ = train(digits, 5, sinks=[lambda record: records.append(record)], log_every=5)
    copy.deepcopy(optimizer)
    with pytest.warns(UserWarning, match="is not pickled with the optimizer"):
        twin = pickle.loads(pickle.dumps(optimizer))
    twin.close()
    assert len(records) == 1


def test_reopening_after_a_resume_keeps_the_points(digits, tmp_path):
    model = digits_model()
    optimizer, _ = train(digits, 5, model=model, log_dir=tmp_path / "first", log_every=1)
    optimizer.close()
    state = optimizer.state_dict()
    again = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters()), model, log_dir=tmp_path, log_every=1)
    again.load_state_dict(state)
    for steps in (5, 2):
        for step in range(steps):
            backward(model, digits, step)
            again.step()
        again.close()
    # TensorBoard reads the two files in the order of their names, which is arbitrary within a second.
    assert sorted(step for step, _ in scalars(tmp_path)["flips/rate"]) == [6, 7, 8, 9, 10, 11, 12]


def test_resuming_beside_a_users_writer_hides_none_of_its_points(digits, tmp_path):
    with SummaryWriter(tmp_path) as writer:
        for samples in range(0, 640, 64):
            writer.add_scalar("loss", 1.0, samples)
    model = digits_model()
    optimizer, _ = train(digits, 5, model=model, sinks=[])
    again = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters()), model, log_dir=tmp_path, log_every=1)
    again.load_state_dict(optimizer.state_dict())
    backward(model, digits, 5)
    again.step()
    again.close()
    assert len(scalars(tmp_path)["loss"]) == 10


def test_a_partial_line_of_a_killed_run_keeps_its_own_line(digits, tmp_path):
    path = tmp_path / "flips.jsonl"
    path.write_text('{"record": {"st')
    train(digits, 10, sinks=[path])
    torn, *lines = path.read_text().splitlines()
    assert torn == '{"record": {"st'
    assert FlipRecord.from_dict(json.loads(lines[1])["record"]).step == 10


def test_a_new_path_ending_is_one_line_in_one_table(tmp_path, monkeypatch):
    monkeypatch.setitem(FILE_SINKS, ".txt", JSONLSink)
    assert isinstance(make_sink(tmp_path / "flips.txt"), JSONLSink)
    with pytest.raises(ValueError, match=r"must end in \.jsonl or \.csv or \.txt, got .*flips\.xml"):
        make_sink(tmp_path / "flips.xml")
    with pytest.raises(TypeError, match=r"paths that end in \.jsonl or \.csv or \.txt, .*got int"):
        make_sink(5)
