"""Layer groups by globs, module type and model block, compared with brute force."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from conftest import BruteForce, backward, digits_model
from test_sinks import train
from torch import nn

from weightflip import FlipTrackingOptimizer, track_flips


class Mixed(nn.Module):
    """An embedding, a convolution and linear layers, named as in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(16, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.Linear(8, 8), "mlp": nn.Linear(8, 8), "norm": nn.LayerNorm(8)}) for _ in range(2)
        )
        self.token = nn.Parameter(torch.randn(1, 8))

    def forward(self, at):
        x = self.conv(self.embed(at).transpose(1, 2)).transpose(1, 2) + self.token
        for block in self.blocks:
            x = block["norm"](x + block["mlp"](block["attn"](x).relu()))
        return x


def make(**options):
    model, records = Mixed(), []
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), model, sinks=[records.append], log_every=1, **options
    )
    return model, optimizer, records


def steps(model, optimizer, count=3):
    for _ in range(count):
        optimizer.zero_grad()
        model(torch.arange(16).view(2, 8)).square().mean().backward()
        optimizer.step()


ATTN = ("blocks.0.attn.weight", "blocks.1.attn.weight")
BY_TYPE = {
    "Mixed": ("token",),
    "Embedding": ("embed.weight",),
    "Conv1d": ("conv.weight",),
    "Linear": ("blocks.0.attn.weight", "blocks.0.mlp.weight", "blocks.1.attn.weight", "blocks.1.mlp.weight"),
}


def test_totals_equal_brute_force():
    groups = {"attention": "*.attn.*", "blocks": ["*.attn.*", "*.mlp.*"], "rest": ["embed.*", "conv.*", "token"]}
    model, optimizer, records = make(groups=groups)
    brute = BruteForce(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.arange(16).view(2, 8)).square().mean().backward()
        brute.before()
        optimizer.step()
        brute.after()
    sums = records[-1].group_sums
    assert list(sums) == ["attention", "blocks", "rest"]
    assert records[-1].groups["attention"] == ATTN
    assert sums["attention"].total.flips == sum(brute.flips[name] for name in ATTN) > 0
    assert sums["blocks"].total.flips + sums["rest"].total.flips == sum(brute.flips.values())
    assert sums["attention"].weights == 2 * 64


@pytest.mark.parametrize("form", ["wrapper", "hooks"])
def test_groups_by_module_type(form):
    model, records = Mixed(), []
    inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
    options = {"sinks": [records.append], "log_every": 1, "groups": "type"}
    track = FlipTrackingOptimizer if form == "wrapper" else track_flips
    tracked = track(inner, model, **options)
    steps(model, tracked if form == "wrapper" else inner)
    assert records[-1].groups == BY_TYPE == tracked.info.groups
    assert "| Embedding | `embed.weight` |" in tracked.info.to_markdown()
    assert f"group Linear: {', '.join(BY_TYPE['Linear'])}" in str(tracked.info)


def test_no_groups_by_default():
    model, optimizer, records = make()
    steps(model, optimizer, 1)
    assert records[0].groups == optimizer.info.groups == {}
    assert "group" not in optimizer.info.to_markdown()


BLOCKS = {
    "token": ("token",),
    "embed": ("embed.weight",),
    "conv": ("conv.weight",),
    "blocks.0": ("blocks.0.attn.weight", "blocks.0.mlp.weight"),
    "blocks.1": ("blocks.1.attn.weight", "blocks.1.mlp.weight"),
}


def test_groups_by_block():
    model, optimizer, records = make(groups="blocks")
    steps(model, optimizer, 1)
    assert records[0].groups == optimizer.info.groups == BLOCKS
    assert "| blocks.1 | `blocks.1.attn.weight`, `blocks.1.mlp.weight` |" in optimizer.info.to_markdown()
    sums = records[0].group_sums
    assert sum(block.total.flips for block in sums.values()) == records[0].model.total.flips > 0


class Deep(nn.Module):
    """``blocks.<i>.a.weight`` and ``blocks.<i>.b.weight``, and a head."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}) for _ in range(blocks))
        self.head = nn.Linear(4, 4)


def step_with_ones(model, *optimizers):
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("blocks", [14, 15])
def test_many_layers_are_grouped_by_block_by_default(blocks):
    model, records = Deep(blocks), []
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[records.append], log_every=1
    )
    step_with_ones(model, optimizer)
    # 29 layers are not grouped, 31 are grouped by block.
    expected = [] if blocks == 14 else [*(f"blocks.{i}" for i in range(15)), "head"]
    assert list(records[0].groups) == list(optimizer.info.groups) == expected
    none = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[], groups={})
    assert none.info.groups == {}


def test_no_block_repeats(caplog):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=1), model, sinks=[], groups="blocks")
    assert optimizer.info.groups == {}
    assert "groups='blocks' finds no repeated model block, such as layers.0 and layers.1" in caplog.text


@pytest.mark.parametrize("groups", [None, "blocks", {"b": "*.b.*"}])
def test_blocks_span_all_optimizers_of_a_run(groups):
    model, records = Deep(16), []
    of_each = [[p for n, p in model.named_parameters() if f".{part}.weight" in n] for part in "ab"]
    options = {} if groups is None else {"groups": groups}
    plain = {} if groups is None else {"groups": "blocks"}
    first = FlipTrackingOptimizer(
        torch.optim.SGD(of_each[0], lr=0.1), model, sinks=[records.append], log_every=1, **plain
    )
    second = FlipTrackingOptimizer(torch.optim.SGD(of_each[1], lr=0.1), model, sinks=first, **options)
    step_with_ones(model, second, first)
    if isinstance(groups, dict):
        assert records[-1].groups == {"b": tuple(f"blocks.{i}.b.weight" for i in range(16))}
    else:
        assert records[-1].groups == {f"blocks.{i}": tuple(f"blocks.{i}.{x}.weight" for x in "ab") for i in range(16)}


def test_untracked_weights_are_in_no_group():
    model, optimizer, records = make(groups={"norms": "*.norm.*", "attention": "*.attn.*"})
    model.blocks[1]["attn"].weight.requires_grad_(False)
    steps(model, optimizer, 1)
    assert records[0].groups == {"attention": ATTN[:1]}
    model.blocks[1]["attn"].weight.requires_grad_(True)
    steps(model, optimizer, 1)
    assert records[1].groups == {"attention": ATTN}


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        ({"attention": "*.attention.*"}, ValueError, r"the pattern '\*\.attention\.\*' in groups= matches none of the"),
        ({"attention": ["*.attn.*", "nope"]}, ValueError, "the pattern 'nope' in groups= matches none"),
        ("types", TypeError, "groups= must be 'type', 'blocks', or a mapping from names to globs"),
        (["*.attn.*"], TypeError, "groups= must be 'type', 'blocks', or a mapping from names to globs"),
        ({"attention": 3}, TypeError, "not iterable|must be a glob"),
        ({3: "*"}, TypeError, "groups= must be 'type', 'blocks', or a mapping"),
    ],
)
def test_mistakes_raise_at_construction(groups, error, message):
    with pytest.raises(error, match=message):
        make(groups=groups)


def test_module_types_need_a_model():
    with pytest.raises(ValueError, match="groups='type' needs the model's modules; pass model="):
        FlipTrackingOptimizer(torch.optim.SGD(Mixed().parameters(), lr=1), sinks=[], groups="type")


def test_globs_do_not_need_a_model():
    model, records = digits_model(), []
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1),
        sinks=[records.append],
        log_every=1,
        groups={"first": "0.*"},
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert records[0].groups == {"first": ("0.weight",)}


def test_layers_added_later_join_their_group():
    model, optimizer, records = make(groups="type")
    more = nn.Linear(8, 8)
    model.add_module("head", more)
    optimizer.add_param_group({"params": list(more.parameters())})
    steps(model, optimizer, 1)
    assert records[0].groups["Linear"] == (*BY_TYPE["Linear"], "head.weight")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
def test_copies_remember_module_types_without_a_model(tmp_path, duplicate):
    model = Mixed()
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-2), model, sinks=[tmp_path / "flips.jsonl"], groups="type"
    )
    steps(model, optimizer, 1)
    twin = duplicate(optimizer)
    for group in twin.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    twin.step()
    assert twin.info.groups == BY_TYPE


def test_optimizers_of_a_run_share_groups(digits):
    model, records = digits_model(), []
    options = {"groups": "type"}
    first = FlipTrackingOptimizer(
        torch.optim.SGD(model[0].parameters(), lr=0.1), model, sinks=[records.append], log_every=1, **options
    )
    second = FlipTrackingOptimizer(torch.optim.SGD(model[2].parameters(), lr=0.1), model, sinks=first, **options)
    for step in range(2):
        backward(model, digits, step)
        second.step()
        first.step()
    assert records[-1].groups == {"Linear": ("0.weight", "2.weight")}
    (linear,) = records[-1].group_sums.values()
    assert linear.total == records[-1].model.total


def test_training_is_unchanged(digits):
    results = []
    for groups in (None, "type"):
        model = digits_model()
        train(digits, model=model, sinks=[], groups=groups)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
