"""Names of layers, inside wrappers and without a model."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from weightflip import FlipTrackingOptimizer
from weightflip.selection import name_parameters


class Net(nn.Module):
    """Has a layer named ``module``, like the attribute of DDP that holds the model."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)


NAMES = ["module.weight", "module.bias", "head.weight", "head.bias"]


@pytest.fixture
def data_parallel(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield nn.parallel.DistributedDataParallel
    torch.distributed.destroy_process_group()


def fabric(module):
    lightning = pytest.importorskip("lightning", reason="needs: pip install lightning")
    return lightning.Fabric(accelerator="cpu").setup(module)


def test_wrappers_leave_no_trace_in_names(data_parallel):
    wrappers = {
        "plain": lambda net: net,
        "ddp": data_parallel,
        "compiled": torch.compile,
        "compiled ddp": lambda net: torch.compile(data_parallel(net)),
        "ddp of compiled": lambda net: data_parallel(torch.compile(net)),
        "data parallel": nn.DataParallel,
        "checkpointed": checkpoint_wrapper,
        "ddp inside a module": lambda net: nn.ModuleDict({"net": data_parallel(net)}),
    }
    for how, wrap in wrappers.items():
        model = wrap(Net())
        found = list(name_parameters([{"params": list(model.parameters())}], model))
        assert [name.removeprefix("net.") for name in found] == NAMES, how
        # Without the model, a prefix "module." that all param_names share is taken for that of a wrapper.
        model = wrap(nn.Sequential(nn.Linear(4, 4)))
        named = [(name.removeprefix("net."), parameter) for name, parameter in model.named_parameters()]
        found = name_parameters(torch.optim.SGD(named).param_groups, None)
        assert list(found) == ["0.weight", "0.bias"], how
    mixed = [("module.weight", nn.Parameter(torch.ones(2, 2))), ("head.weight", nn.Parameter(torch.ones(2, 2)))]
    assert list(name_parameters(torch.optim.SGD(mixed).param_groups, None)) == ["module.weight", "head.weight"]


def test_fabric_leaves_no_trace_in_names(data_parallel):
    for model in (fabric(Net()), fabric(data_parallel(Net()))):
        assert list(name_parameters([{"params": list(model.parameters())}], model)) == NAMES


@pytest.fixture
def nothing_logged(monkeypatch):
    """As in a new process."""
    monkeypatch.setattr("weightflip.session.weights._logged", set())


def test_positional_names_of_many_optimizers_are_logged_once(caplog, nothing_logged):
    """Scripts that step each parameter in the backward pass have one optimizer per parameter."""
    caplog.set_level(logging.WARNING, "weightflip")
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    for index in (0, 0, 1, 2):
        FlipTrackingOptimizer(torch.optim.SGD([model[index].weight], lr=0.1), quantizer="e3m4", sinks=[])
    FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), quantizer="e3m4", sinks=[])
    said = [message for message in caplog.messages if "model=" in message]
    assert [message.rpartition(" ")[2] for message in said] == ["(group0.param0)", "...)"]


def test_positional_names_are_logged_once(caplog, nothing_logged):
    caplog.set_level(logging.WARNING, "weightflip")
    model = Net()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), sinks=[])
    assert list(optimizer.info.tracked) == ["group0.param0", "group0.param2"]
    for _ in range(3):
        model.head(model.module(torch.ones(4))).sum().backward()
        optimizer.step()
    copy.deepcopy(optimizer).step()
    said = [message for message in caplog.messages if "model=" in message]
    assert len(said) == 1
    assert "group0.param0" in said[0]
    assert said[0].removeprefix("weightflip: ") in optimizer.info.notes

    caplog.clear()
    for named in (model, None):
        parameters = model.parameters() if named is model else model.named_parameters()
        FlipTrackingOptimizer(torch.optim.SGD(parameters, lr=0.1), named, sinks=[])
    FlipTrackingOptimizer(torch.optim.SGD([model.head.bias], lr=0.1), sinks=[])
    assert not any("model=" in message and "nothing" not in message for message in caplog.messages)
