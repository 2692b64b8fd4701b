"""The fraction of weights with a gradient: in records, tags, files, alerts and tables."""

from __future__ import annotations

import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from weightflip import Alert, FlipRecord, FlipTrackingOptimizer

STEPS = 4


class OneGradient(torch.autograd.Function):
    """Passes on the gradient of the largest weight only, like a tensorwise scale that is not detached."""

    @staticmethod
    def forward(ctx, weight):
        ctx.save_for_backward(weight)
        return weight.clone()

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        return gradient * (weight.abs() == weight.abs().max())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.starved = nn.Linear(64, 128, bias=False)
        self.embedding = nn.Embedding(16, 128)
        self.head = nn.Linear(128, 2, bias=False)
        self.unused = nn.Linear(8, 8, bias=False)

    def forward(self, tokens, x):
        hidden = nn.functional.linear(x, OneGradient.apply(self.starved.weight))
        return self.head(hidden + self.embedding(tokens))


def train(**options):
    torch.manual_seed(0)
    model, records = Net(), []
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, quantizer="e3m4", log_every=STEPS, **options
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        model(torch.tensor([1, 3]), torch.randn(2, 64)).square().sum().backward()
        optimizer.step()
    return model, optimizer, records


# 2 of the 16 rows of the embedding are used.
EXPECTED = {"starved.weight": 1 / 8192, "embedding.weight": 2 / 16, "head.weight": 1.0, "unused.weight": 0.0}
OF_MODEL = (1 + 2 * 128 + 256) / (8192 + 16 * 128 + 256 + 64)


def test_it_is_in_records_files_tags_and_tables(tmp_path):
    seen, events = [], []
    alerts = [Alert("updated_fraction < 1%", callback=events.append)]
    _, optimizer, _ = train(sinks=[seen.append, tmp_path / "a.jsonl"], alerts=alerts)
    optimizer.close()
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    (line,) = (line for line in lines if "record" in line)
    (record,) = seen
    for one in (record, FlipRecord.from_dict(line["record"]), FlipRecord.from_dict(record.to_rows())):
        assert {layer.name: layer.updated_fraction for layer in one.layers} == EXPECTED
        assert {layer.name: layer.values["updated_fraction"] for layer in one.layers} == EXPECTED
        assert one.model.updated_fraction == pytest.approx(OF_MODEL)
    assert [event.layer for event in events] == ["starved.weight", "unused.weight"]

    rows = [line.split() for line in str(optimizer.tracker).splitlines()]
    assert rows[1][-1] == "updated"
    shown = {row[0]: row[-1] for row in rows[2:]}
    assert shown == {
        "starved.weight": "0.01%",
        "embedding.weight": "12.5%",
        "head.weight": "100.0%",
        "unused.weight": "0.0%",
        "all": f"{OF_MODEL:.1%}",
    }

    train(log_dir=tmp_path / "tb")[1].close()
    tags = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert tags.Scalars("flips/updated_fraction")[-1].value == pytest.approx(OF_MODEL)
    shown = [tag.partition("/")[2] for tag in tags.Tags()["scalars"] if tag.startswith("updated_fraction/")]
    # A layer in which all weights have gradients has no line in TensorBoard.
    assert sorted(shown) == sorted(name for name, expected in EXPECTED.items() if expected < 1)
    for name in shown:
        assert tags.Scalars(f"updated_fraction/{name}")[-1].value == pytest.approx(EXPECTED[name])


def test_without_stalls_nobody_knows():
    seen = []
    _, optimizer, _ = train(sinks=[seen.append], metrics=("flips",))
    (record,) = seen
    for one in (record, FlipRecord.from_dict(record.to_dict()), FlipRecord.from_dict(record.to_rows())):
        assert not any("updated_fraction" in layer.values for layer in one.layers)
    assert {line.split()[-1] for line in str(optimizer.tracker).splitlines()[2:]} == {"-"}


def test_rows_of_an_earlier_version_and_rows_stay_short():
    seen = []
    train(sinks=[seen.append])
    row = next(row for row in seen[0].to_rows()["rows"] if row[0] == "head.weight")
    # Only weight steps, flips, updates and stalled.
    assert len(row[2]) <= 4
    data = seen[0].to_dict()
    for layer in data["layers"]:
        for period in ("window", "total"):
            del layer[period]["update_steps"]
    assert not any("updated_fraction" in layer.values for layer in FlipRecord.from_dict(data).layers)
