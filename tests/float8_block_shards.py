"""What each process of ``test_float8_block_shards.py`` runs. Not a test file: processes are started with it."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from distributed_modes import Collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from weightflip import FlipTrackingOptimizer

STEPS = 4
# Cut inside blocks of 128 rows, or between them; fewer rows than processes; experts that are cut between and inside.
SHAPES = {
    "inside": (300, 256),
    "between": (512, 128),
    "few": (3, 200),
    "experts": (4, 40, 130),
    "within_experts": (2, 200, 130),
    "columns": (130, 512),
    "both": (300, 512),
}
FORMATS = ["float8_e4m3:128x128", "float8_e4m3:128x128:pow2", "float8_e4m3:1x128"]


class Net(nn.Module):
    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(whole(name)))


def whole(name: str, step: int | None = None) -> Tensor:
    """A weight, or its gradient in a step, a third of which is exactly 0."""
    generator = torch.Generator().manual_seed(list(SHAPES).index(name) + 100 * (0 if step is None else step + 1))
    values = torch.randn(SHAPES[name], generator=generator)
    if step is not None:
        return values * 0.05 * (torch.rand(values.shape, generator=generator) > 1 / 3)
    # Rows of many magnitudes, so that the largest number of a block is usually on another process.
    values *= torch.exp2(torch.randint(-6, 6, (*values.shape[:-1], 1), generator=generator))
    if name == "inside":
        values[140, 3], values[299, 200] = float("nan"), float("inf")
    return values


def run(
    names: list[str], shard=lambda model: None, before=lambda step, model: None, calls: list | None = None
) -> dict[str, object]:
    """Train on gradients cut from those of whole weights; return the counts. ``calls`` receives all collectives."""
    model = Net(names)
    shard(model)
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), lr=1.0),
        model,
        include="*",
        quantizer=FORMATS,
        metrics=("flips", "stalls", "scale"),
        log_every=STEPS,
        sinks=[],
        backend="eager",
    )
    for step in range(STEPS):
        for name, p in model.named_parameters():
            gradient = whole(name, step)
            p.grad = distribute_tensor(gradient, p.device_mesh, p.placements) if isinstance(p, DTensor) else gradient
        before(step, model)
        with nullcontext() if calls is None else Collectives() as done:
            optimizer.step()
        if calls is not None:
            calls.append(done.calls)
    return {layer.name: layer.total.to_dict() for layer in optimizer.tracker.record().layers}


def over(*shape: int) -> DeviceMesh:
    return init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])


def fsdp(model: nn.Module) -> None:
    fully_shard(model, mesh=over(dist.get_world_size()))


def hsdp(model: nn.Module) -> None:
    fully_shard(model, mesh=over(2, dist.get_world_size() // 2))


def by(*placements, shape=None):
    """Distribute every weight of the model with these placements."""

    def shard(model: nn.Module) -> None:
        mesh = over(*(shape or (dist.get_world_size(),)))
        for name, p in list(model.named_parameters()):
            model.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), mesh, placements)))

    return shard


def write_between(step: int, model: nn.Module) -> None:
    if step == 2:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)


def fsdp_and_tp(model: nn.Module) -> None:
    mesh = over(2, dist.get_world_size() // 2)
    by_tp = DeviceMesh.__getitem__(mesh, "b")
    for name, p in list(model.named_parameters()):
        model.register_parameter(name, nn.Parameter(distribute_tensor(p.detach(), by_tp, [Shard(0)])))
    fully_shard(model, mesh=mesh["a"])


FLAT = ["inside", "between", "few", "experts"]
CASES = {
    "fsdp": (FLAT, fsdp),
    "written": (FLAT, fsdp, write_between),
    "hsdp": (FLAT, hsdp),
    "experts": (["within_experts"], by(Shard(1))),
    "columns": (["columns"], by(Shard(1))),
}
OF_FOUR = {
    "both": (["both"], by(Shard(0), Shard(1), shape=(2, 2))),
    "copies": (["both"], by(Replicate(), Shard(0), shape=(2, 2))),
}
REFUSED = {"columns that are cut": (["few"], by(Shard(1))), "strided": (["inside"], fsdp_and_tp)}


@contextmanager
def connected(rank: int, world: int, folder: Path) -> Iterator[None]:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = f"file://{folder}/rendezvous{world}"
    dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=world)
    yield
    dist.destroy_process_group()


def work(rank: int, world: int, folder: Path) -> None:
    """Run every case in turn in one process, and save the results to a file."""
    with connected(rank, world, folder), warnings.catch_warnings():
        warnings.simplefilter("error")
        cases = CASES | (OF_FOUR if world == 4 else {})
        calls: list = []
        results = {name: run(*case, calls=calls if name == "fsdp" else None) for name, case in cases.items()}
        results["calls"] = calls
        for name, case in REFUSED.items():
            if name != "strided" or world == 4:
                try:
                    run(*case)
                except ValueError as error:
                    results[name] = str(error)
        (folder / f"{world}-{rank}.json").write_text(json.dumps(results))
