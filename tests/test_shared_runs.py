"""Several optimizers that form one run are shown together; separate runs in the same place are not mixed."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from weightflip import Alert, FlipTrackingOptimizer, track_flips
from weightflip.metrics import base
from weightflip.metrics.coverage import Coverage
from weightflip.records import FlipRecord


def net():
    return nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(), nn.Linear(6, 4, bias=False))


def backward(model):
    model.zero_grad()
    model(torch.linspace(-1, 1, 8).repeat(4, 1)).square().sum().backward()


def cells(text):
    return [line.split() for line in text.splitlines()]


def test_print_shows_the_layers_of_all_optimizers_of_a_run():
    model = net()
    first = FlipTrackingOptimizer(torch.optim.Muon([model[0].weight], lr=0.1), model, quantizer="e3m4", sinks=[])
    inner = torch.optim.AdamW(model[2].parameters(), lr=0.1)
    second = track_flips(inner, model, quantizer="int4", sinks=first)
    for step in range(3):
        backward(model)
        first.step()
        if step < 2:
            inner.step()
    assert str(first.tracker) == str(second.tracker)
    heading, _, *rows = cells(str(first.tracker))
    assert heading == ["after", "step", "3"]
    flips = {**first.tracker.get_flip_counts(), **second.tracker.get_flip_counts()}
    assert [row[:4] for row in rows] == [
        ["0.weight", "e3m4", "48", str(flips["0.weight"])],
        ["2.weight", "int4", "24", str(flips["2.weight"])],
        ["all", "72", str(sum(flips.values())), rows[2][3]],
    ]
    # It includes the optimizer that has ended.
    second.remove()
    assert cells(str(first.tracker))[2:] == rows


def test_print_shows_one_table_for_one_optimizer_per_parameter():
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(5)))
    optimizers = []
    for parameter in model.parameters():
        shared = optimizers[0] if optimizers else []
        optimizers.append(FlipTrackingOptimizer(torch.optim.SGD([parameter], lr=0.1), model, sinks=shared))
        parameter.register_post_accumulate_grad_hook(lambda _, optimizer=optimizers[-1]: optimizer.step())
    model(torch.ones(4)).sum().backward()
    for optimizer in optimizers:
        assert [row[0] for row in cells(str(optimizer.tracker))[2:]] == [*(f"{i}.weight" for i in range(5)), "all"]


def test_two_runs_in_the_default_place_are_warned_about(tmp_path, monkeypatch):
    """SummaryWriter names its default directory after the second in which it is opened, at the first record."""
    monkeypatch.chdir(tmp_path)
    for _ in range(5):
        before = len(os.listdir("runs")) if os.path.exists("runs") else 0
        model = net()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizers = [
                FlipTrackingOptimizer(torch.optim.SGD(layer.parameters(), lr=0.1), model, log_every=1)
                for layer in (model[0], model[2])
            ]
            backward(model)
            for optimizer in optimizers:
                optimizer.step()
        are_apart = len(os.listdir("runs")) == before + 2
        texts = [
            str(warning.message)
            for warning in caught
            if "another tracked optimizer also writes there" in str(warning.message)
        ]
        for optimizer in optimizers:
            optimizer.close()
        assert len(texts) == (0 if are_apart else 1)
        if not are_apart:
            return
    pytest.fail("every time on the border of two seconds")


def test_when_the_first_optimizer_is_no_longer_tracked_the_next_one_writes():
    model, records = net(), []
    inner = torch.optim.SGD([model[0].weight], lr=0.1)
    first = FlipTrackingOptimizer(inner, model, log_every=2, sinks=[records.append])
    second = FlipTrackingOptimizer(torch.optim.SGD([model[2].weight], lr=0.1), model, log_every=2, sinks=first)

    for step in range(8):
        if step == 4:
            # Neither its steps nor its totals are available.
            first.tracker.after_step = first.tracker.record = broken
            with pytest.warns(UserWarning, match="tracking has stopped, training continues: RuntimeError: broken on"):
                first.step()
        backward(model)
        first.step()
        second.step()
    # The last record is written by the second step of the second optimizer.
    assert [record.step for record in records] == [2, 4, 6, 8]
    assert [[layer.name for layer in record.layers] for record in records] == [
        *[["0.weight", "2.weight"]] * 2,
        *[["2.weight"]] * 2,
    ]


def shared_run(**options):
    """Two optimizers of one run, the list of its records, and a function that trains a step."""
    model, records = net(), []
    options = {"log_every": 2, **options}
    first = FlipTrackingOptimizer(torch.optim.SGD([model[0].weight], lr=0.1), model, sinks=[records.append], **options)
    second = FlipTrackingOptimizer(torch.optim.SGD([model[2].weight], lr=0.1), model, sinks=first, **options)

    def step():
        backward(model)
        second.step()
        first.step()

    return first, second, records, step


def broken(*_, **__):
    raise RuntimeError("broken on purpose")


def layers(records):
    return [[layer.name for layer in record.layers] for record in records]


@pytest.mark.parametrize("at", ["a logging point", "flush()", "close()"])
@pytest.mark.parametrize("index", [0, 1])
def test_only_the_optimizer_whose_record_fails_is_no_longer_tracked(index, at):
    optimizers, (*_, records, step) = (found := shared_run())[:2], found
    failing, other = optimizers[index], optimizers[1 - index]
    for _ in range(3):
        step()
    failing.tracker.record = broken
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if at == "a logging point":
            step()
        else:
            getattr(other, at.removesuffix("()"))()
        steps = other.tracker.step_count
        assert layers(records) == [["0.weight", "2.weight"], [f"{2 - 2 * index}.weight"]]
        while other.tracker.step_count < 8:
            step()
    (text,) = [str(warning.message) for warning in caught]
    assert text == "weightflip: tracking has stopped, training continues: RuntimeError: broken on purpose"
    assert failing.tracker.step_count == steps
    assert failing.tracker.memory_usage().codes == 0
    assert [record.step for record in records] == [2, *([] if at == "a logging point" else [3]), 4, 6, 8]
    assert layers(records)[2:] == [[f"{2 - 2 * index}.weight"]] * (len(records) - 2)
    flips = other.tracker.get_flip_counts()
    assert {layer.name: layer.total.flips for layer in records[-1].layers} == flips


class Undescribed(Coverage):
    name = "undescribed"
    # Not hashable, so that the values of several optimizers cannot be compared.
    values = tuple(replace(value, expects=["nothing"]) for value in Coverage.values)


class Kept:
    """A sink that keeps what it receives."""

    def __init__(self) -> None:
        self.infos, self.records = [], []

    def start(self, info, first_step):
        self.infos.append(info)

    def write(self, record):
        self.records.append(record)

    def flush(self):
        pass

    close = flush


@pytest.mark.parametrize("index", [0, 1])
def test_an_optimizer_whose_description_cannot_be_merged_is_written_without_it(index, monkeypatch):
    monkeypatch.setitem(base._registry, "undescribed", Undescribed)
    model, kept, optimizers = net(), Kept(), []
    for at in range(2):
        metrics = ("flips", "undescribed") if at == index else ("flips",)
        inner = torch.optim.SGD([model[2 * at].weight], lr=0.1)
        options = {"quantizer": "e3m4", "metrics": metrics, "log_every": 2}
        optimizers.append(FlipTrackingOptimizer(inner, model, sinks=optimizers[0] if at else [kept], **options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            backward(model)
            for optimizer in reversed(optimizers):
                optimizer.step()
    (text,) = [str(warning.message) for warning in caught]
    assert text.startswith("weightflip: some of the tracked weights are written without their description: TypeError:")
    assert [(record.step, *layers([record])) for record in kept.records] == [
        (step, ["0.weight", "2.weight"]) for step in (2, 4, 6)
    ]
    flips = {name: count for optimizer in optimizers for name, count in optimizer.tracker.get_flip_counts().items()}
    assert {layer.name: layer.total.flips for layer in kept.records[-1].layers} == flips
    (info,) = kept.infos
    assert [*info.tracked] == [f"{2 - 2 * index}.weight"]


def test_a_fault_in_what_optimizers_share_ends_no_tracking(monkeypatch):
    first, second, records, step = shared_run()
    merged = FlipRecord.merged
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(8):
            # Two of the four records cannot be made.
            monkeypatch.setattr(FlipRecord, "merged", broken if 2 <= number < 6 else merged)
            step()
    (text,) = [str(warning.message) for warning in caught]
    assert text == "weightflip: a record could not be written, tracking continues: RuntimeError: broken on purpose"
    assert [record.step for record in records] == [2, 8]
    flips = {**first.tracker.get_flip_counts(), **second.tracker.get_flip_counts()}
    assert {layer.name: layer.total.flips for layer in records[-1].layers} == flips
    assert {layer.total.weight_steps // layer.weights for layer in records[-1].layers} == {8}


@pytest.mark.parametrize("index", [0, 1])
def test_flush_of_an_optimizer_that_is_no_longer_tracked_writes_the_others(index):
    first, second, records, step = shared_run(log_every=100)
    failing = (first, second)[index]
    failing.tracker.before_step = broken
    with pytest.warns(UserWarning, match="tracking has stopped"):
        step()
    failing.flush()
    step()
    failing.flush()
    assert [record.step for record in records] == [1, 2]
    new = {layer.name: layer.window.weight_steps for layer in records[-1].layers}
    assert new[f"{2 - 2 * index}.weight"] == (24, 48)[index]


@pytest.mark.parametrize(
    "mistake",
    [{"alerts": [Alert("flip_rate > 0.5", layers="typo*")]}, {"groups": {"all": "typo*"}}, {"include": "typo*"}],
    ids=lambda mistake: next(iter(mistake)),
)
def test_a_call_that_raises_does_not_change_the_run(mistake):
    model, records = net(), []
    first = FlipTrackingOptimizer(torch.optim.SGD([model[0].weight], lr=0.1), model, sinks=[records.append])
    gone = track_flips(inner := torch.optim.SGD([model[2].weight], lr=0.1), model, quantizer="int4", sinks=first)
    backward(model)
    first.step()
    inner.step()
    gone.remove()
    text = str(first.tracker)
    hooks = {name: len(found) for name, found in vars(inner).items() if name.endswith("_hooks")}
    with pytest.raises(ValueError, match=r"'typo\*'") as refusal:
        FlipTrackingOptimizer(inner, model, quantizer="e3m4", sinks=first, **mistake)
    assert {name: len(found) for name, found in vars(inner).items() if name.endswith("_hooks")} == hooks
    assert str(first.tracker) == text
    # While the traceback still holds the objects of the failed call.
    second = FlipTrackingOptimizer(inner, model, quantizer="e3m4", sinks=first)
    backward(model)
    second.step()
    first.step()
    first.close()
    assert [layer.name for layer in records[-1].layers] == ["0.weight", "2.weight"]
    del refusal
