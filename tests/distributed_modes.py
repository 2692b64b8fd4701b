"""What each process of ``test_distributed.py`` runs. Not a test file: processes are started with it."""

from __future__ import annotations

import gc
import itertools
import json
import os
import time
import traceback
import warnings
import weakref
import zlib
from contextlib import redirect_stdout, suppress
from datetime import timedelta
from io import StringIO
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from weightflip import Alert, FlipTrackingOptimizer, distributed, track_flips
from weightflip.distributed.groups import process_group
from weightflip.quantizers import resolve
from weightflip.quantizers.ordinals import STORED_FORMATS, bits_to_ordinals_

STEPS = 8
FORMATS = [
    "float8_e4m3",
    "float8_e4m3:row",
    "e3m4",
    "e6m1",
    "mxfp4",
    "nvfp4:tensor",
    "int8",
    "int4:g32",
    "bfloat16",
]


class Net(nn.Module):
    """Weights whose rows divide evenly, whose rows do not divide by 2 or 4, with a single row, and with three rows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(128, 64, bias=False)
        self.second = nn.Linear(64, 128, bias=False)
        self.uneven = nn.Linear(64, 7, bias=False)
        self.three = nn.Linear(32, 3, bias=False)
        self.single = nn.Linear(32, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(torch.relu(self.first(x)))
        return self.uneven(x[:, :64]).sum(1) + self.three(x[:, :32]).sum(1) + self.single(x[:, 32:64])[:, 0]


def make_net(values=None) -> Net:
    """Seeded weights; or 0, 1, 2, ... in each weight, to see which elements a process holds."""
    torch.manual_seed(3)
    net = Net()
    if values == "indices":
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.arange(p.numel()).view_as(p))
    return net


def full_gradient(name: str, shape: torch.Size, step: int) -> Tensor:
    """The gradient of the whole weight, a third of which is exactly 0."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + step)
    gradient = torch.randn(shape, generator=generator)
    return gradient * (torch.rand(shape, generator=generator) > 1 / 3)


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Sharded:
    """A model, and one of indices sharded by the same code, with which gradients are cut."""

    def __init__(self, shard) -> None:
        self.model, indices = make_net(), make_net("indices")
        shard(self.model)
        shard(indices)
        self.indices = {name: local(p.detach()).long() for name, p in indices.named_parameters()}

    def set_gradients(self, step: int) -> None:
        for name, p in self.model.named_parameters():
            gradient = full_gradient(name, p.shape, step).flatten()[self.indices[name]]
            if isinstance(p, DTensor):
                gradient = DTensor.from_local(
                    gradient, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
            p.grad = gradient

    def equals(self, weights: dict[str, Tensor]) -> bool:
        """Whether this process's part of each weight equals that of a single-process run, bit for bit."""
        return all(
            torch.equal(local(p.detach()), weights[name].flatten()[self.indices[name]])
            for name, p in self.model.named_parameters()
        )


def numbers(tracker) -> dict[str, object]:
    return {
        "flips": tracker.get_flip_counts(),
        "updates": tracker.get_update_counts(),
        "stalled": tracker.get_stall_counts(),
        "rates": tracker.get_flip_rates(),
        "steps": tracker.step_count,
        "table": str(tracker),
    }


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def wrap(inner: torch.optim.Optimizer, model: nn.Module | None = None, **options) -> FlipTrackingOptimizer:
    """Use no compiled kernel, since each process would take seconds to load it."""
    return FlipTrackingOptimizer(inner, model, **{"sinks": [], "backend": "eager", **options})


def run(
    shard=lambda model: None, *, steps=range(STEPS), make=adamw, track=FlipTrackingOptimizer, before=None, **options
):
    """Train on gradients cut from those of the whole weights; return the counts and this process's weights."""
    sharded = Sharded(shard)
    records = []
    options = {"sinks": [records.append], "log_every": 5, "quantizer": FORMATS, "backend": "eager", **options}
    bare = make(sharded.model)
    tracked = track(bare, sharded.model, **options)
    optimizer = tracked if isinstance(tracked, FlipTrackingOptimizer) else bare
    for step in steps:
        sharded.set_gradients(step)
        if before is not None:
            before(step, sharded.model)
        optimizer.step()
    (tracked.close if track is FlipTrackingOptimizer else tracked.remove)()
    found = numbers(tracked.tracker)
    found["records"] = [record.to_dict() for record in records]
    return found, sharded, tracked


def over(*shape: int, names: tuple[str, ...] | None = None):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def fsdp(model: nn.Module) -> None:
    mesh = over(dist.get_world_size())
    fully_shard(model.first, mesh=mesh)
    fully_shard(model, mesh=mesh)


def hsdp(model: nn.Module) -> None:
    fully_shard(model, mesh=over(2, dist.get_world_size() // 2, names=("replicate", "shard")))


PLAN = {"first": ColwiseParallel(), "second": RowwiseParallel()}


def tensor_parallel(model: nn.Module) -> None:
    parallelize_module(model, over(dist.get_world_size()), PLAN)


def fsdp_and_tp(model: nn.Module) -> None:
    mesh = over(2, dist.get_world_size() // 2, names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], PLAN)
    fully_shard(model.first, mesh=mesh["dp"])
    fully_shard(model, mesh=mesh["dp"])


def columns(model: nn.Module) -> None:
    """Shard with FSDP2 by the last dimension, which cuts rows."""
    fully_shard(model.second, mesh=over(dist.get_world_size()), shard_placement_fn=lambda p: Shard(1))


SHARDINGS = {"fsdp": fsdp, "hsdp": hsdp, "tp": tensor_parallel, "fsdp_and_tp": fsdp_and_tp, "columns": columns}


def shardings(rank: int, world: int, weights: dict[str, Tensor]) -> dict[str, object]:
    """Train the same trajectory under each sharding."""
    results = {}
    for name, shard in SHARDINGS.items():
        # Shards of 16 columns cut the blocks of 32.
        cut = {"tp": 4, "columns": 4}.get(name) == world
        formats = [f for f in FORMATS if not (cut and f in ("mxfp4", "int4:g32"))]
        found, sharded, _ = run(shard, quantizer=formats)
        results[name] = {**found, "is_equal": sharded.equals(weights), "formats": formats}
    return results


def options_of_the_tracker(rank: int, world: int) -> dict[str, object]:
    """Train with every way of encoding before a step."""
    return {name: run(fsdp, quantizer=["float8_e4m3", "int4:g32"], **options)[0] for name, options in OPTIONS.items()}


OPTIONS = {
    "low_memory": {"low_memory": True},
    "fresh_snapshots": {"fresh_snapshots": True},
    "track_every": {"track_every": 3},
    "hooks": {"track": track_flips},
    "groups": {
        "metrics": {"flips": 1, "stalls": 1, "oscillation": 1, "coverage": 1, "scale": 1, "travel": 1, "range": 1}
    },
}


def write_between(step: int, model: nn.Module) -> None:
    """Write weights as an EMA swap does, which must not count as flips of the next step."""
    if step in (4, 5, 9):
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.5 if step == 4 else 1.5)


def writes(rank: int, world: int) -> dict[str, object]:
    """Write weights between steps: as DTensors, and one shard on one process alone."""

    def one_shard(step: int, model: nn.Module) -> None:
        if step == 6 and rank == world - 1:
            with torch.no_grad():
                model.first.weight.to_local().mul_(2)

    def zeroed_on_one(step: int, model: nn.Module) -> None:
        if rank == 0:
            model.uneven.weight.grad = None

    quantizer = ["float8_e4m3", "float8_e4m3:row"]
    return {
        "all": run(fsdp, quantizer=quantizer, before=write_between)[0],
        "one": run(fsdp, quantizer=quantizer, before=one_shard, log_every=1)[0],
        "no_gradient_on_one": run(fsdp, quantizer=quantizer, before=zeroed_on_one)[0],
    }


def syncs(rank: int, world: int) -> dict[str, object]:
    """What differs between two syncs, of untracked steps and writes in between too; and on gathered weights."""
    formats = ["float8_e4m3", "float8_e4m3:row", "mxfp4", "bfloat16"]
    results = {}
    for name, options in {"calls": {}, "untracked": {"track_every": 3}, "every": {"sync_every": 2}}.items():
        sharded = Sharded(fsdp)
        model = sharded.model
        optimizer = wrap(adamw(model), model, quantizer=formats, metrics=("flips", "sync"), **options)
        marks = []

        def mark(marks=marks, model=model, optimizer=optimizer, name=name) -> None:
            whole = {of: full(p.detach()) for of, p in model.named_parameters()}
            marks.append({f"{of}@{f}": resolve(f).encode(w) for of, w in whole.items() for f in formats})
            if name != "every":
                optimizer.tracker.mark_sync()

        mark()
        for step in range(6):
            sharded.set_gradients(step)
            if name != "every":
                write_between(step, model)
            optimizer.step()
            if step % 2:
                mark()
        brute = {}
        for layer in marks[0]:
            windows = [(old[layer], new[layer]) for old, new in itertools.pairwise(marks)]
            changed = sum(int((old.ordinals != new.ordinals).sum()) for old, new in windows)
            scales = [(o.scale != n.scale).double().mean().item() for o, n in windows if o.scale is not None]
            brute[layer] = [changed, 3 * windows[0][0].ordinals.numel(), sum(scales) / 3 if scales else None]
        found = {}
        record = optimizer.tracker.record()
        for layer in record.layers:
            ratios = layer.window.ratios
            scale = ratios["scale_changed_fraction"]
            found[layer.name] = [*ratios["changed_fraction"], scale.value if scale.denominator else None]
        sizes = {of: model.values.get("delta_bits") for of, model in record.models.items()}
        results[name] = {"found": found, "brute": brute, "sizes": sizes}
    return results


def touched(rank: int, world: int) -> dict[str, object]:
    """Which weights flipped at least once between two syncs; and on gathered weights."""
    formats = ["float8_e4m3", "float8_e4m3:row", "mxfp4", "bfloat16"]
    sharded = Sharded(fsdp)
    model = sharded.model
    optimizer = wrap(adamw(model), model, quantizer=formats, metrics=("flips", "touched"), sync_every=3, track_every=2)

    def codes() -> dict[str, torch.Tensor]:
        whole = {of: full(p.detach()) for of, p in model.named_parameters()}
        return {f"{of}@{f}": resolve(f).encode(w).ordinals.clone() for of, w in whole.items() for f in formats}

    flags, brute = {}, {}
    for step in range(6):
        sharded.set_gradients(step)
        write_between(step, model)
        before = codes()
        optimizer.step()
        for name, after in codes().items() if step % 2 == 0 else ():
            flags[name] = flags.get(name, False) | (after != before[name])
        if step % 3 == 2:
            for name, flag in flags.items():
                seen, weights = brute.get(name, (0, 0))
                brute[name] = [seen + int(flag.sum()), weights + flag.numel()]
            flags = {}
    record = optimizer.tracker.record()
    found = {layer.name: list(layer.window.ratios["touched_fraction"]) for layer in record.layers}
    return {"found": found, "brute": brute, "layers": list(record.model.window.ratios["untouched_layers"])}


def collectives(rank: int, world: int) -> dict[str, object]:
    """Count the collectives, and their bytes, in a step and at a logging point."""
    results = {}
    for name, shard, quantizer in (
        ("tensorwise", fsdp, "float8_e4m3"),
        ("several", fsdp, ["float8_e4m3", "ternary", "nvfp4:tensor", "int8"]),
        ("by_row", fsdp, ["float8_e4m3:row", "mxfp4", "int8", "bfloat16"]),
        ("cut_rows", columns, "int8"),
        ("plain", lambda model: None, "float8_e4m3"),
        ("two_meshes", fsdp_and_tp if world == 4 else fsdp, "float8_e4m3"),
    ):
        sharded = Sharded(shard)
        model = sharded.model
        optimizer = wrap(adamw(model), model, quantizer=quantizer, log_every=2)
        found = []
        for step in range(4):
            sharded.set_gradients(step)
            with Collectives() as done:
                optimizer.step()
            found.append(done.calls)
        with Collectives() as done:
            numbers(optimizer.tracker)
        results[name] = [*found, done.calls]
    return results


class Collectives(TorchDispatchMode):
    """Records every collective passed to a process group: its name and number of elements."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional"):
            self.calls.append((func._opname, sum(tensor.numel() for tensor in args[0])))
        return func(*args, **(kwargs or {}))


def means(rank: int, world: int) -> dict[str, object]:
    """Compute the absmean of ternary weights, which the order of the sum may change by one bit."""
    found, sharded, optimizer = run(fsdp, quantizer="ternary")
    layers = optimizer.tracker.layers
    found["means"] = {
        name: float(layers[name].statistic) for name, _ in sharded.model.named_parameters() if name in layers
    }
    found["exact"] = {
        name: float(p.detach().full_tensor().double().abs().mean()) for name, p in sharded.model.named_parameters()
    }
    return found


class BruteForce:
    """Counts by brute force on whole weights gathered from the processes, in float8."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.counts = [dict.fromkeys(self.parameters, 0) for _ in range(3)]

    @staticmethod
    def values(p: Tensor) -> Tensor:
        weight = full(p.detach())
        scale = (448.0 / weight.abs().max().double()).float()
        return (weight * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()

    def before(self) -> None:
        self.old = {name: self.values(p) for name, p in self.parameters.items()}
        self.updated = {name: full(p.grad) != 0 for name, p in self.parameters.items()}

    def after(self) -> None:
        for name, p in self.parameters.items():
            flipped, updated = self.values(p) != self.old[name], self.updated[name]
            for counts, found in zip(self.counts, (flipped, updated, updated & ~flipped), strict=True):
                counts[name] += int(found.sum())


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def data_parallel(rank: int, world: int) -> dict[str, object]:
    """Train with DDP, and with ZeroRedundancyOptimizer outside and inside the wrapper."""
    results = {}

    def zero(model: nn.Module) -> torch.optim.Optimizer:
        return ZeroRedundancyOptimizer(model.parameters(), optimizer_class=torch.optim.AdamW, lr=0.02)

    results["zero"] = run(make=zero)[0]
    results["ddp_of_all_formats"] = run(nn.parallel.DistributedDataParallel)[0]

    sharded = Sharded(lambda model: None)
    outer = zero(sharded.model)
    handle = track_flips(outer.optim, sharded.model, quantizer=FORMATS, sinks=[], backend="eager")
    for step in range(STEPS):
        sharded.set_gradients(step)
        outer.step()
    results["zero_within"] = numbers(handle.tracker)
    handle.remove()

    model = nn.parallel.DistributedDataParallel(make_net())
    optimizer = wrap(adamw(model), model)
    brute = BruteForce(model.module)
    for step in range(6):
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        for _ in range(2):
            model(torch.randn(8, 128)).square().mean().backward()
        brute.before()
        optimizer.step()
        brute.after()
    results["ddp"] = {**numbers(optimizer.tracker), "brute": brute.counts}
    return results


def training(rank: int, world: int) -> dict[str, object]:
    """Train under FSDP2 with gradient accumulation; each process has its own data, and one is slow."""
    model = make_net()
    for layer in model.children():
        fully_shard(layer)
    fully_shard(model)
    # With two processes, use the default kernel.
    optimizer = wrap(adamw(model), model, log_every=3, backend="auto" if world == 2 else "eager")
    brute = BruteForce(model)
    for step in range(6):
        torch.manual_seed(10 * step + rank)
        optimizer.zero_grad()
        for micro in range(2):
            model.set_requires_gradient_sync(micro == 1)
            model(torch.randn(8, 128)).square().mean().backward()
        if rank == step % world:
            time.sleep(0.05)
        brute.before()
        optimizer.step()
        brute.after()
    optimizer.close()
    return {**numbers(optimizer.tracker), "brute": brute.counts}


def torchao_float8(rank: int, world: int) -> dict[str, object]:
    """Train Float8Linear with float8 all-gather, whose codes are those that the shards are cast to."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training, precompute_float8_dynamic_scale_for_fsdp

    results = {}
    for name, precompute in (("dynamic", False), ("precomputed", True)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 48, bias=False), nn.Linear(48, 16, bias=False))
        config = Float8LinearConfig(enable_fsdp_float8_all_gather=True, emulate=True)
        model = convert_to_float8_training(model, config=config)
        for layer in model:
            fully_shard(layer)
        fully_shard(model)
        optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=0.02), model, log_every=2)
        flips = dict.fromkeys(["0.weight", "1.weight"], 0)

        def cast(model: nn.Module = model) -> dict[str, Tensor]:
            found = {}
            for name, p in model.named_parameters():
                (data,), _ = p._local_tensor.fsdp_pre_all_gather(p.device_mesh)
                ordinals = data.contiguous().view(torch.int8).clone()
                bits_to_ordinals_(ordinals, STORED_FORMATS[data.dtype], _fresh)
                found[name] = ordinals
            return found

        are_equal = []
        cast_now = cast()
        for step in range(4):
            # Gathered as bytes, since gloo does not gather float8.
            torch.manual_seed(10 * step + rank)
            for p in model.parameters():
                p.grad = DTensor.from_local(torch.randn(p.to_local().shape), p.device_mesh, p.placements)
            optimizer.step()
            if precompute:
                precompute_float8_dynamic_scale_for_fsdp(model)
            cast_before, cast_now = cast_now, cast()
            for layer, codes in cast_now.items():
                flips[layer] += int((codes != cast_before[layer]).sum())
                are_equal.append(torch.equal(codes, optimizer.tracker.layers[layer].codes))
        optimizer.close()
        together = torch.tensor(list(flips.values()))
        dist.all_reduce(together)
        results[name] = {
            **numbers(optimizer.tracker),
            "cast_flips": dict(zip(flips, together.tolist(), strict=True)),
            "are_equal": are_equal,
            "quantizers": [row[2] for row in optimizer.info.tracked.values()],
        }
    return results


def _fresh(slot, like, dtype):
    return torch.empty(like.shape, dtype=dtype)


class FailsOnOne:
    """A quantizer that raises on the last process in its sixth call."""

    name, scope = "fails", "element"

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, weight):
        from weightflip import encode

        self.calls += 1
        if self.calls > 5 and dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("broken on purpose")
        return encode(weight, "bfloat16")


def faults(rank: int, world: int) -> dict[str, object]:
    """Have a layer, or all of tracking, fail on one process, which must not keep others waiting."""
    results = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, _, _ = run(fsdp, quantizer={"first*": FailsOnOne(), "*": "float8_e4m3"}, log_every=3)
        results["layer"] = {**found, "warnings": [str(w.message) for w in caught]}

    from weightflip.quantizers.float8 import Float8Quantizer

    class Breaks(Float8Quantizer):
        calls = 0

        def statistic(self, weight):
            self.calls += 1
            if self.calls > 9 and rank == 0:
                raise RuntimeError("broken on purpose")
            return super().statistic(weight)

    from weightflip.formats import E4M3

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found, _, _ = run(fsdp, quantizer={"first*": Breaks(E4M3), "*": "float8_e4m3"}, log_every=3)
        results["statistic"] = {**found, "warnings": [str(w.message) for w in caught]}

    sharded = Sharded(fsdp)
    model = sharded.model
    optimizer = wrap(adamw(model), model, quantizer="float8_e4m3", log_every=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            sharded.set_gradients(step)
            if step == 4 and rank == world - 1:
                optimizer._session.run_guarded(lambda: 1 / 0)
            optimizer.step()
        optimizer.close()
        results["tracking"] = {**numbers(optimizer.tracker), "warnings": [str(w.message) for w in caught]}

    # Different layers on each process, although they share one mesh.
    torch.manual_seed(0)
    mesh = over(world)
    weights = [torch.randn(8, 8 + 8 * rank * i) for i in range(1, 3)]
    parameters = [nn.Parameter(distribute_tensor(w, mesh, [Shard(0)], src_data_rank=None)) for w in weights]
    inner = torch.optim.SGD(parameters, lr=0.5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = wrap(inner, quantizer="float8_e4m3", log_every=1)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.close()
        results["stages"] = {**numbers(optimizer.tracker), "warnings": [str(w.message) for w in caught]}
    return results


class Breaks:
    """bfloat16, until one of its methods raises on the last process."""

    scope = "element"

    def __init__(self, part: str = "") -> None:
        self.part, self.is_broken = part, False

    def use(self, part: str) -> None:
        if self.is_broken and part == self.part and dist.get_rank() == dist.get_world_size() - 1:
            raise RuntimeError("broken on purpose")

    @property
    def name(self):
        self.use("name")
        return "breaks"

    @property
    def is_active(self):
        self.use("is_active")
        return True

    @property
    def plain(self):
        self.use("plain")
        return lambda weight: weight

    def encode(self, weight):
        from weightflip import encode

        self.use("encode")
        return encode(weight, "bfloat16")


PARTS = {"name": "select", "is_active": "before", "plain": "look", "encode": "count"}


def faults_of_a_quantizer(rank: int, world: int) -> dict[str, object]:
    """Have a quantizer raise in any method on one process, also with warnings as errors: no process may wait."""
    results = {}
    for part in PARTS:
        for action in ("always", "error"):
            quantizer = Breaks(part)

            def break_it(step: int, model: nn.Module, quantizer: Breaks = quantizer) -> None:
                quantizer.is_broken = step >= 3

            # Without a sink, the process only takes part in the other's records.
            sinks = {"sinks": []} if rank and action == "error" else {}
            results[f"{part}-{action}"] = steps_with_faults(
                action, quantizer={"first*": quantizer, "*": "float8_e4m3"}, log_every=3, before=break_it, **sinks
            )
    return results


def steps_with_faults(action: str, *, shard=fsdp, before=None, at=None, **options) -> dict[str, object]:
    """Take steps that may warn, or raise their warnings; all of them are completed."""
    sharded = Sharded(shard)
    records, texts = [], []
    optimizer = wrap(adamw(sharded.model), sharded.model, **{"sinks": [records.append], **options})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter(action)

        def do(call) -> None:
            try:
                call()
            except UserWarning as error:
                texts.append(str(error))

        for step in range(STEPS):
            sharded.set_gradients(step)
            if before is not None:
                before(step, sharded.model)
            if at is not None:
                at(step, optimizer, sharded.model)
            do(optimizer.step)
        do(optimizer.close)
    return {
        **numbers(optimizer.tracker),
        "records": [record.to_dict() for record in records],
        "warnings": texts + [str(w.message) for w in caught],
    }


def faults_of_the_list(rank: int, world: int) -> dict[str, object]:
    """Change what is tracked, while one process does not notice or selects something else."""
    results = {}

    def all_but_three(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for name, p in model.named_parameters() if name != "three.weight"], lr=0.02)

    for name in ("fails", "goes_well"):
        sharded = Sharded(fsdp)
        quantizer = Breaks("name" if name == "fails" else "")
        optimizer = wrap(
            all_but_three(sharded.model),
            sharded.model,
            quantizer={"first*": quantizer, "*": "float8_e4m3"},
            log_every=3,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(STEPS):
                sharded.set_gradients(step)
                if step == 4:
                    quantizer.is_broken = True
                    optimizer.add_param_group({"params": [sharded.model.three.weight]})
                optimizer.step()
            optimizer.close()
        results[name] = {**numbers(optimizer.tracker), "warnings": [str(w.message) for w in caught]}

    # A weight that is not sharded: the others compare nothing.
    quantizer = Breaks("name")

    def freeze(step: int, model: nn.Module) -> None:
        if step == 4:
            quantizer.is_broken = True
            model.three.weight.requires_grad_(False)

    results["plain"] = steps_with_faults(
        "always", shard=columns, quantizer={"first*": quantizer, "*": "float8_e4m3"}, log_every=3, before=freeze
    )

    # From some step on, the processes have different weights on their common mesh.
    for name, at in (("after_a_record", 4), ("before_any", 2)):
        sharded = Sharded(fsdp)
        model = sharded.model
        optimizer = wrap(adamw(model), quantizer="float8_e4m3", log_every=3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(STEPS):
                sharded.set_gradients(step)
                if step == at:
                    other = distribute_tensor(torch.ones(8, 8 + 8 * rank), over(world), [Shard(0)], src_data_rank=None)
                    optimizer.add_param_group({"params": [nn.Parameter(other)]})
                optimizer.step()
            optimizer.close()
        results[name] = {**numbers(optimizer.tracker), "warnings": [str(w.message) for w in caught]}
    return results


def faults_of_plain_weights(rank: int, world: int) -> dict[str, object]:
    """Have a batch of unsharded weights, next to sharded ones, raise on one process."""
    from weightflip.formats import E4M3
    from weightflip.quantizers.float8 import Float8Quantizer

    class BreaksInBatch(Float8Quantizer):
        calls = 0

        def scale_of(self, largest):
            self.calls += 1
            if self.calls > 9 and rank == world - 1:
                raise RuntimeError("broken on purpose")
            return super().scale_of(largest)

    quantizer = {"second*": "float8_e4m3", "*": BreaksInBatch(E4M3)}
    return steps_with_faults("always", shard=columns, quantizer=quantizer, log_every=3, backend="auto")


def faults_of_the_writer(rank: int, world: int) -> dict[str, object]:
    """Have a sink, or an alert's callback, raise on the process that has it."""

    def raises(_) -> None:
        raise RuntimeError("broken on purpose")

    rule = Alert("flip_rate >= 0", callback=raises)
    results = {}
    for action in ("always", "error"):
        options = {"quantizer": "float8_e4m3", "log_every": 3}
        results[f"sink-{action}"] = steps_with_faults(action, sinks=[raises], **options)
        results[f"alert-{action}"] = steps_with_faults(action, alerts=[rule], **options)
    return results


READ = {"metrics": ("flips", "stalls", "range"), "log_every": 3}


def spoil(step: int, model: nn.Module) -> None:
    """Set some weights of the last process to NaN."""
    if step == 5 and (not dist.is_initialized() or dist.get_rank() == dist.get_world_size() - 1):
        local(model.first.weight.grad)[-1, :7] = float("nan")


def readers(rank: int, world: int) -> dict[str, object]:
    """Check that a process without sinks also contributes what is measured at logging points."""
    sinks = {"sinks": []} if rank else {}
    return run(fsdp, quantizer="float8_e4m3:row", before=spoil, **READ, **sinks)[0]


def several_optimizers(rank: int, world: int) -> dict[str, object]:
    """Train with two optimizers of one run; one of them raises at logging points on one process."""
    results = {}

    def raises() -> None:
        raise RuntimeError("broken on purpose")

    for name in ("whole", "broken", "record"):
        sharded, calls = Sharded(fsdp), []
        model, quantizer, records = sharded.model, Breaks("plain"), []
        of_first = [model.first.weight, model.three.weight]
        others = [model.second.weight, model.uneven.weight, model.single.weight]
        first = wrap(
            torch.optim.AdamW(of_first, lr=0.02),
            model,
            quantizer={"first*": quantizer, "*": "float8_e4m3"},
            sinks=[records.append],
            log_every=3,
        )
        second = wrap(torch.optim.AdamW(others, lr=0.02), model, quantizer="float8_e4m3", sinks=first, log_every=3)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(STEPS):
                quantizer.is_broken = name == "broken" and step >= 3
                if name == "record" and step == 3 and rank == 0:
                    # The whole record of the optimizer that does not lead, on the process that writes.
                    second.tracker._inspect_weights = raises
                sharded.set_gradients(step)
                with Collectives() as done:
                    second.step()
                    first.step()
                calls.append(done.calls)
            first.close()
        both = [numbers(optimizer.tracker) for optimizer in (first, second)]
        results[name] = {
            **{key: both[0][key] | both[1][key] for key in ("flips", "updates", "stalled")},
            "records": [record.to_dict() for record in records],
            "warnings": [str(w.message) for w in caught],
            "calls": calls[1:],
        }
    return results


def unsharded_leader(rank: int, world: int) -> dict[str, object]:
    """Two optimizers of one run; the first, whose weights are not sharded, breaks on one process."""
    sharded, records = Sharded(fsdp), []
    whole = torch.nn.Linear(32, 32)
    options = {"quantizer": "float8_e4m3", "log_every": 3}
    first = wrap(torch.optim.AdamW(whole.parameters(), lr=0.02), whole, sinks=[records.append], **options)
    second = wrap(torch.optim.AdamW(sharded.model.parameters(), lr=0.02), sharded.model, sinks=first, **options)

    def raises(*_: object) -> None:
        raise RuntimeError("broken on purpose")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            if step == 4 and rank == world - 1:
                first.tracker.after_step = raises
            sharded.set_gradients(step)
            whole.weight.grad = torch.full_like(whole.weight, 0.1)
            first.step()
            second.step()
        first.close()
    return {
        "steps": [record.step for record in records],
        "warnings": [str(w.message) for w in caught],
        "flips": second.tracker.get_flip_counts(),
    }


class StateOnOne(torch.optim.SGD):
    """An optimizer that keeps state only on the processes that need it."""

    steps = 0

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        if dist.get_rank() == 0:
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["calls"] = torch.tensor(1.0)


def phantom_steps(rank: int, world: int) -> dict[str, object]:
    """Combine steps with a learning rate of 0 and steps made by torch.distributed.checkpoint."""
    sharded = Sharded(fsdp)
    model = sharded.model
    optimizer = wrap(StateOnOne(model.parameters(), lr=0.0), model, quantizer="float8_e4m3", log_every=3)
    for step in range(STEPS):
        sharded.set_gradients(step)
        if rank == 1:
            # Its part of the gradients is all 0.
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        optimizer.param_groups[0]["lr"] = 0.0 if step < 4 else 0.5
        optimizer.step()
    optimizer.zero_grad()
    # Only the second process has no state and makes a step to initialize it. The states then cannot be gathered.
    with suppress(KeyError, RuntimeError):
        get_optimizer_state_dict(model, optimizer)
    optimizer.close()
    return {**numbers(optimizer.tracker), "inner_steps": optimizer.inner.steps}


def frozen_on_one(rank: int, world: int) -> dict[str, object]:
    """Freeze a weight on the last process alone, and later another one on both."""
    patience, distributed.collectives.BARRIER_TIMEOUT = distributed.collectives.BARRIER_TIMEOUT, timedelta(seconds=1)

    def freeze(step: int, model: nn.Module) -> None:
        if step == 4 and rank == world - 1:
            model.three.weight.requires_grad_(False)
        if step == 7:
            model.single.weight.requires_grad_(False)

    results = {}
    for quantizer in ("float8_e4m3", "float8_e4m3:row"):
        start = time.monotonic()
        found = steps_with_faults("always", shard=fsdp, quantizer=quantizer, log_every=3, before=freeze)
        results[quantizer] = {**found, "seconds": time.monotonic() - start}
    distributed.collectives.BARRIER_TIMEOUT = patience
    return results


def made_states(rank: int, world: int) -> dict[str, object]:
    """Initialize state by a step that is not training; and start a warm-up in which one process has only zeros."""
    results = {}
    for name in ("framework", "warm-up"):
        for quantizer in ("float8_e4m3", "float8_e4m3:row"):
            sharded = Sharded(fsdp)
            optimizer = wrap(adamw(sharded.model), sharded.model, quantizer=quantizer, log_every=3)
            (group,) = optimizer.param_groups
            group["lr"] = 0.0
            for p in sharded.model.parameters():
                p.grad = torch.zeros_like(p)
                if name == "warm-up" and rank == 0:
                    local(p.grad).fill_(1.0)
            optimizer.step()
            group["lr"] = 0.02
            for step in range(STEPS):
                sharded.set_gradients(step)
                optimizer.step()
            optimizer.close()
            results[f"{name} {quantizer}"] = numbers(optimizer.tracker)
    return results


def inference(rank: int, world: int) -> dict[str, object]:
    """Make every second step in inference mode, whose tensors cannot be written to outside of it."""
    sharded = Sharded(fsdp)
    inner = torch.optim.SGD(sharded.model.parameters(), lr=0.02)
    optimizer = wrap(inner, sharded.model, quantizer="float8_e4m3", log_every=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            sharded.set_gradients(step)
            with torch.inference_mode(step % 2 == 0):
                optimizer.step()
        optimizer.close()
    return {**numbers(optimizer.tracker), "warnings": [str(w.message) for w in caught]}


def late_gradients(rank: int, world: int) -> dict[str, object]:
    """Start a step while its gradients are still in flight."""
    sharded = Sharded(fsdp)
    model = sharded.model
    optimizer = wrap(adamw(model), model, quantizer="float8_e4m3", log_every=3)
    were_late = True
    for step in range(STEPS):
        for name, p in model.named_parameters():
            summand = full_gradient(name, p.shape, step) / world
            partial = DTensor.from_local(summand, p.device_mesh, [Partial()], run_check=False)
            p.grad = partial.redistribute(placements=p.placements, async_op=True)
            were_late &= isinstance(p.grad._local_tensor, AsyncCollectiveTensor)
        optimizer.step()
    optimizer.close()
    return {**numbers(optimizer.tracker), "were_late": were_late}


def skipped_steps(rank: int, world: int) -> dict[str, object]:
    """Have a gradient scaler skip a step because of an infinity in one shard."""
    sharded = Sharded(fsdp)
    model = sharded.model
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    inner = torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)
    optimizer = wrap(inner, model, quantizer="float8_e4m3", log_every=3)
    for step in range(STEPS):
        sharded.set_gradients(step)
        if step == 4 and rank == world - 1:
            local(model.first.weight.grad)[0, 0] = float("inf")
        scaler.scale(torch.zeros(()))
        scaler.step(optimizer)
        scaler.update(1.0)
    optimizer.close()
    return numbers(optimizer.tracker)


def groups(rank: int, world: int) -> dict[str, object]:
    """Return the process group in which the counts of a mesh's weights are summed."""
    mesh = over(2, world // 2, names=("replicate", "shard"))["shard"]
    parameter = nn.Parameter(distribute_tensor(torch.ones(8, 8), mesh, [Shard(0)], src_data_rank=None))
    layout = distributed.layout(parameter)
    ours, theirs = (process_group((kind, layout.ranks)) for kind in ("cpu", "cuda"))
    # On two of the processes; the others have it in their optimizer but hold no part of it.
    part = DeviceMesh("cpu", [0, 1])
    of_two = nn.Parameter(distribute_tensor(torch.ones(8, 8), part, [Shard(0)], src_data_rank=None))
    plain = nn.Parameter(torch.ones(8, 8))
    optimizer = wrap(torch.optim.SGD([of_two, plain], lr=0.5), quantizer="float8_e4m3")
    plain.grad = torch.ones(8, 8)
    if rank < 2:
        of_two.grad = DTensor.from_local(torch.ones_like(of_two.to_local()), part, [Shard(0)], run_check=False)
    optimizer.step()
    optimizer.close()
    return {
        "updates": optimizer.tracker.get_update_counts(),
        "skipped": optimizer.info.skipped,
        "is_of_mesh": ours is mesh.get_group(),
        "is_another": theirs is not ours and dist.get_process_group_ranks(theirs) == list(layout.ranks),
    }


def second_world(rank: int, world: int, store: str) -> dict[str, object]:
    """Check what is left after a new default group is created, which is when the old one is released."""
    old = weakref.ref(dist.group.WORLD)
    first, sharded, optimizer = run(fsdp_and_tp, quantizer="float8_e4m3")
    dist.destroy_process_group()
    sharded.set_gradients(STEPS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
        optimizer.close()
    del sharded, optimizer
    gc.collect()
    is_deleted = old() is None
    connect(rank, world, store)
    return {
        "first": first,
        "second": run(fsdp_and_tp, quantizer="float8_e4m3")[0],
        "is_deleted": is_deleted,
        "warnings": [str(w.message) for w in caught],
    }


def refusals(rank: int, world: int) -> dict[str, str]:
    """Refuse what cannot be exact, with an explanation."""
    mesh = over(world)
    weight = torch.arange(8 * 16 * world, dtype=torch.float32).view(8, 16 * world)

    def reason(placements, quantizer, tensor=weight) -> str:
        parameter = nn.Parameter(distribute_tensor(tensor, mesh, placements))
        try:
            wrap(torch.optim.SGD([parameter]), quantizer=quantizer)
        except ValueError as error:
            return str(error)
        return ""

    def squared(w):
        return w.square().to(torch.bfloat16)

    def allowed(w):
        return w.to(torch.bfloat16)

    allowed.scope = "element"
    results = {
        "cut_block": reason([Shard(1)], "mxfp4"),
        "whole_block": reason([Shard(1)], "nvfp4"),
        "function": reason([Shard(0)], squared),
        "function_with_scope": reason([Shard(0)], allowed),
        "replicated_function": reason([Replicate()], squared),
    }
    partial = DTensor.from_local(weight, mesh, [Partial()], run_check=False)
    try:
        wrap(torch.optim.SGD([nn.Parameter(partial)]), quantizer="bfloat16")
    except ValueError as error:
        results["partial"] = str(error)
    return results


def on_one_only(rank: int, world: int) -> dict[str, object]:
    """Do on one process alone what does not need the others: read, copy, delete the optimizer."""
    sharded = Sharded(fsdp)
    model = sharded.model
    optimizer = wrap(adamw(model), model, quantizer="float8_e4m3", log_every=4)
    seen = []
    for step in range(STEPS):
        sharded.set_gradients(step)
        optimizer.step()
        if step == 6:
            if rank == 0:
                with redirect_stdout(StringIO()) as text:
                    print(optimizer.tracker)
                seen.append(text.getvalue())
                numbers(optimizer.tracker)
                optimizer.tracker.memory_usage()
            seen.append(optimizer.tracker.get_flip_counts())
    optimizer = wrap(adamw(model), model, quantizer="float8_e4m3")
    sharded.set_gradients(0)
    optimizer.step()
    if rank == 0:
        try:
            with optimizer:
                raise KeyError("only here")
        except KeyError:
            pass
    del optimizer
    gc.collect()
    return {"seen": seen}


def writer(rank: int, world: int, folder: Path) -> dict[str, object]:
    """Write to disk from the first process only."""
    run(fsdp, quantizer="float8_e4m3", sinks=None, log_dir=folder / "sharded" / str(rank), log_every=5)
    run(quantizer="float8_e4m3", sinks=None, log_dir=folder / "plain" / str(rank), log_every=5)
    run(fsdp, quantizer="float8_e4m3", sinks=[str(folder / f"{rank}.jsonl")], log_every=5)
    found, _, _ = run(fsdp, quantizer="float8_e4m3")
    return {"records": found["records"]}


def save(rank: int, world: int, folder: Path) -> None:
    """Train the first half of the trajectory, and save a checkpoint of everything."""
    found, sharded, optimizer = run(fsdp, steps=range(STEPS // 2))
    state = {
        "model": sharded.model.state_dict(),
        "optimizer": get_optimizer_state_dict(sharded.model, optimizer),
        "tracker": optimizer.tracker,
    }
    dcp.save(state, checkpoint_id=folder / "dcp")
    whole = optimizer.state_dict()["flip_tracking"]
    if rank == 1:
        torch.save(whole, folder / "flip_tracking.pt")
    return found


def resume(shard, folder: Path, weights: dict[str, Tensor]) -> dict[str, object]:
    """Train the second half, on any number of processes."""
    sharded = Sharded(shard)
    optimizer = wrap(adamw(sharded.model), sharded.model, quantizer=FORMATS, log_every=5)
    state = {
        "model": sharded.model.state_dict(),
        "optimizer": get_optimizer_state_dict(sharded.model, optimizer),
        "tracker": optimizer.tracker,
    }
    dcp.load(state, checkpoint_id=folder / "dcp")
    sharded.model.load_state_dict(state["model"])
    set_optimizer_state_dict(sharded.model, optimizer, state["optimizer"])
    at = numbers(optimizer.tracker)
    for step in range(STEPS // 2, STEPS):
        sharded.set_gradients(step)
        optimizer.step()
    optimizer.close()
    return {**numbers(optimizer.tracker), "at": at, "is_equal": sharded.equals(weights)}


def connect(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", f"file://{store}", timeout=timedelta(seconds=60), rank=rank, world_size=world)


def work(rank: int, world: int, folder: Path, weights: dict[str, Tensor]) -> None:
    """Run every mode in turn in one process, and save the results to a file."""
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    connect(rank, world, f"{folder}/rendezvous{world}")
    here = folder / str(world)
    here.mkdir(exist_ok=True)
    modes = {}
    if world == 4:
        # First, while torch's own caches do not contain a mesh of the first world.
        modes["second_world"] = lambda: second_world(rank, world, f"{folder}/again{world}")
    modes |= {
        "shardings": lambda: shardings(rank, world, weights),
        "collectives": lambda: collectives(rank, world),
        "training": lambda: training(rank, world),
        "means": lambda: means(rank, world),
        "data_parallel": lambda: data_parallel(rank, world),
        "torchao": lambda: torchao_float8(rank, world),
        "late_gradients": lambda: late_gradients(rank, world),
        "skipped_steps": lambda: skipped_steps(rank, world),
    }
    if world == 2:
        modes["options"] = lambda: options_of_the_tracker(rank, world)
        modes["syncs"] = lambda: syncs(rank, world)
        modes["touched"] = lambda: touched(rank, world)
        modes["writes"] = lambda: writes(rank, world)
        modes["faults"] = lambda: faults(rank, world)
        modes["faults_of_a_quantizer"] = lambda: faults_of_a_quantizer(rank, world)
        modes["faults_of_the_list"] = lambda: faults_of_the_list(rank, world)
        modes["faults_of_plain_weights"] = lambda: faults_of_plain_weights(rank, world)
        modes["faults_of_the_writer"] = lambda: faults_of_the_writer(rank, world)
        modes["readers"] = lambda: readers(rank, world)
        modes["several_optimizers"] = lambda: several_optimizers(rank, world)
        modes["unsharded_leader"] = lambda: unsharded_leader(rank, world)
        modes["phantom_steps"] = lambda: phantom_steps(rank, world)
        modes["frozen_on_one"] = lambda: frozen_on_one(rank, world)
        modes["made_states"] = lambda: made_states(rank, world)
        modes["inference"] = lambda: inference(rank, world)
        modes["refusals"] = lambda: refusals(rank, world)
        modes["on_one_only"] = lambda: on_one_only(rank, world)
        modes["writer"] = lambda: writer(rank, world, here)
        modes["resume"] = lambda: resume(fsdp, folder, weights)
    else:
        modes["save"] = lambda: save(rank, world, folder)
        modes["groups"] = lambda: groups(rank, world)
    only = os.environ.get("ONLY", "").split(",")
    results = {}
    for name, mode in modes.items():
        if only != [""] and name not in only:
            continue
        start = time.process_time()
        try:
            results[name] = mode()
        except Exception:
            results[name] = {"error": traceback.format_exc()}
        results.setdefault("seconds", {})[name] = time.process_time() - start
    (here / f"{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()
