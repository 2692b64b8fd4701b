"""Parameters without rows or channels: flat parameters and shards of FSDP1, partitions of DeepSpeed ZeRO-3."""

from __future__ import annotations

import copy
import logging
import os
import traceback
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.multiprocessing as mp
from conftest import FORMS, BruteForce, assert_same, digits_model, float8_values
from sklearn.datasets import load_digits
from torch import Tensor, nn

from weightflip import FlipTrackingOptimizer
from weightflip.selection import QuantizerSources, Selection, make_plan, name_parameters

BY_ROW_GROUP_OR_BLOCK = ("float8_e4m3:row", "e3m4:row", "mxfp4", "nvfp4", "nvfp4:tensor", "int8", "int4:g32")
AT_MOST_ONE_SCALE = ("float8_e4m3", "float8_e5m2:pow2", "e3m4", "e3m4:none", "bfloat16", "native", "ternary", "binary")

WIDTH = 47
"""64 * 47 + 47 weights and biases: an odd number, so that FSDP1 pads the second of two shards."""


class Flats(BruteForce):
    """Brute force over the tensors of an optimizer, whatever they are, under their expected names."""

    def __init__(self, parameters: dict[str, Tensor], values: Callable[[Tensor], Tensor] = float8_values) -> None:
        super().__init__(nn.Module(), values)
        self.parameters = parameters
        for counts in (self.flips, self.updates, self.stalled):
            counts.update(dict.fromkeys(parameters, 0))

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_pre_hook(lambda *_: self.before())
        optimizer.register_step_post_hook(lambda *_: self.after())


class Lines(logging.Handler):
    """Collects the warnings that weightflip logs."""

    def __enter__(self) -> list[str]:
        self.lines: list[str] = []
        logging.getLogger("weightflip").addHandler(self)
        return self.lines

    def __exit__(self, *_: object) -> None:
        logging.getLogger("weightflip").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def fsdp(*, use_orig_params: bool, dtype: torch.dtype = torch.float32, strategy: str = "FULL_SHARD") -> nn.Module:
    """Wrap each linear layer in its own FSDP1 module."""
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    model = digits_model(width=WIDTH).to(dtype)
    for i in (0, 2):
        model[i] = FullyShardedDataParallel(
            model[i],
            use_orig_params=use_orig_params,
            device_id=torch.device("cpu"),
            sharding_strategy=ShardingStrategy[strategy],
        )
    return model


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[Tensor]:
    """Train on this rank's part of each batch."""
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    rank, dtype = torch.distributed.get_rank(), next(model.parameters()).dtype
    losses = []
    for step in range(steps):
        at = slice((2 * step + rank) * 64, (2 * step + rank + 1) * 64)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[at].to(dtype) / 16).float(), labels[at])
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


def bare_and_tracked(form: str, expected: Callable[[nn.Module], dict[str, Tensor]], values=float8_values, **options):
    """Train bare and tracked and compare; return the tracked model, what tracked it, and what was logged."""
    results = []
    for is_tracked in (False, True):
        model = fsdp(**options)
        optimizer = inner = torch.optim.AdamW(model.parameters(), lr=3e-3)
        brute = Flats(expected(model), values)
        brute.watch(inner)
        with Lines() as lines:
            if is_tracked:
                optimizer, tracker = FORMS[form](inner, model)
            losses = train(model, optimizer)
        state = copy.deepcopy([inner.state[p] for p in model.parameters()])
        results.append((losses, [p.detach().clone() for p in model.parameters()], state))
    assert_same(*results)
    brute.check(tracker)
    assert sum(brute.flips.values()) > 0
    return model, optimizer, tracker, lines


# ------------------------------------------------------------------ scenarios for two processes


def flat_parameters_are_counted() -> None:
    for form in FORMS:
        _, optimizer, tracker, lines = bare_and_tracked(form, flat_names, use_orig_params=False)
        found = [line for line in lines if "no rows or channels" in line]
        assert len(found) == of_first_process()
        assert all(line.endswith("(0._flat_param, 2._flat_param)") for line in found)
        if form == "wrapper":
            assert {name: row[2] for name, row in optimizer.info.tracked.items()} == {
                "0._flat_param": "float8_e4m3",
                "2._flat_param": "float8_e4m3",
            }
            numbers = torch.tensor([layer.weights for layer in tracker.record().layers])
            torch.distributed.all_reduce(numbers)
            # The extra weight is FSDP's padding of the first layer.
            assert numbers.tolist() == [64 * WIDTH + WIDTH + 1, WIDTH * 10 + 10]


def of_first_process() -> int:
    """How often this process logs what all of them would: only the first does."""
    return int(torch.distributed.get_rank() == 0)


def flat_names(model: nn.Module) -> dict[str, Tensor]:
    return dict(zip(("0._flat_param", "2._flat_param"), model.parameters(), strict=True))


def bfloat16_flat_parameters_are_native() -> None:
    _, optimizer, *_ = bare_and_tracked(
        "wrapper", flat_names, values=Tensor.float, use_orig_params=False, dtype=torch.bfloat16
    )
    assert {row[2] for row in optimizer.info.tracked.values()} == {"native"}


def unsharded_flat_parameters_are_counted() -> None:
    bare_and_tracked("hooks", flat_names, use_orig_params=False, strategy="NO_SHARD")


def weights_here(model: nn.Module) -> dict[str, Tensor]:
    named = ((name.replace("_fsdp_wrapped_module.", ""), p) for name, p in model.named_parameters())
    return {name: p for name, p in named if name.endswith("weight") and p.numel() > 0}


def shards_of_original_parameters_are_counted() -> None:
    for form in FORMS:
        model, optimizer, tracker, lines = bare_and_tracked(form, weights_here, use_orig_params=True)
        assert all(p.ndim == 1 for p in model.parameters())
        assert len([line for line in lines if "no rows or channels" in line]) == of_first_process()
        numbers = torch.tensor(sum(layer.weights for layer in tracker.record().layers))
        torch.distributed.all_reduce(numbers)
        assert numbers == 64 * WIDTH + WIDTH * 10
        if form == "wrapper":
            skipped = optimizer.info.skipped
            assert {skipped["0.bias"], skipped["2.bias"]} == {"1-dimensional (name it in include= to track it)"}


def a_weight_of_another_rank_is_no_fault() -> None:
    model = fsdp(use_orig_params=True)
    tiny = model[2]
    with torch.no_grad():
        empty = [p for p in tiny.parameters() if p.numel() == 0]
    assert bool(empty) == (torch.distributed.get_rank() == 0)
    for options in ({}, {"include": "2.bias"}):
        optimizer = FlipTrackingOptimizer(torch.optim.SGD(tiny.parameters(), lr=0.1), model, sinks=[], **options)
        if empty and options:
            assert optimizer.info.skipped["2.bias"] == "none of it is on this rank"
            assert optimizer.info.tracked == {}


def unsharded_parameters_keep_their_rows() -> None:
    model = fsdp(use_orig_params=True, strategy="NO_SHARD")
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, quantizer="int8", sinks=[])
    assert list(optimizer.info.tracked) == ["0.weight", "2.weight"]
    assert not any("no rows" in note for note in optimizer.info.notes)


def formats_by_row_group_or_block_raise() -> None:
    for use_orig_params in (False, True):
        model = fsdp(use_orig_params=use_orig_params)
        for quantizer in BY_ROW_GROUP_OR_BLOCK:
            # Must raise on every rank, even if its shards are empty, or the other ranks would wait.
            for parameters in (model.parameters(), model[2].parameters()):
                with pytest.raises(ValueError, match=r"without rows or channels, but .* name a format"):
                    FlipTrackingOptimizer(torch.optim.SGD(parameters, lr=0.1), model, quantizer=quantizer, sinks=[])
        for quantizer in (*AT_MOST_ONE_SCALE, lambda weight: weight.half()):
            sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            assert FlipTrackingOptimizer(sgd, model, quantizer=quantizer, sinks=[]).info.tracked


def parameters_made_flat_later_are_skipped() -> None:
    full = digits_model(width=WIDTH)
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(full.parameters(), lr=0.1), full, quantizer="int8", sinks=[])
    model = fsdp(use_orig_params=False)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    with Lines() as lines:
        train(model, optimizer, steps=2)
    assert len(optimizer.info.skipped) == 2
    assert all("int8 has one scale per row, group or block" in why for why in optimizer.info.skipped.values())
    assert len([line for line in lines if "no rows or channels" in line]) == of_first_process()


def layers_of_torchao_that_cast_by_row_are_skipped() -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    for recipe, tracked in (("tensorwise", {"float8_e4m3"}), ("rowwise", set())):
        model = convert_to_float8_training(digits_model(), config=Float8LinearConfig.from_recipe_name(recipe))
        sharded = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        optimizer = FlipTrackingOptimizer(torch.optim.SGD(sharded.parameters(), lr=0.1), sharded, sinks=[])
        assert {row[2] for row in optimizer.info.tracked.values()} == tracked
        if not tracked:
            assert "without rows or channels" in optimizer.info.skipped["0.weight"]


SCENARIOS = (
    flat_parameters_are_counted,
    bfloat16_flat_parameters_are_native,
    unsharded_flat_parameters_are_counted,
    shards_of_original_parameters_are_counted,
    a_weight_of_another_rank_is_no_fault,
    unsharded_parameters_keep_their_rows,
    formats_by_row_group_or_block_raise,
    parameters_made_flat_later_are_skipped,
    layers_of_torchao_that_cast_by_row_are_skipped,
)


def in_process(rank: int, world_size: int, folder: str, scenarios: tuple[Callable[[], None], ...]) -> None:
    torch.set_num_threads(1)
    # FSDP warns that NO_SHARD is deprecated and collectives are renamed. Only weightflip's warnings are errors.
    warnings.filterwarnings("error", message="weightflip")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    failures = {}
    for scenario in scenarios:
        try:
            scenario()
        except BaseException:
            failures[scenario.__name__] = traceback.format_exc()
            break
    torch.save(failures, f"{folder}/{rank}.pt")
    if not failures:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> list[dict[str, str]]:
    """Run the scenarios in two processes, and return the failures of each."""
    folder = str(tmp_path_factory.mktemp("gloo"))
    mp.spawn(in_process, (2, folder, SCENARIOS), nprocs=2)
    return [torch.load(f"{folder}/{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in SCENARIOS])
def test_fsdp1(two_processes, scenario):
    for failures in two_processes:
        assert not failures.get(scenario), failures[scenario]
        assert not failures, f"not reached: {list(failures)} failed before"


# ------------------------------------------------------------------ DeepSpeed ZeRO-3


def zero3(rank: int, folder: str, form: str, has_groups: bool, has_empty_model: bool) -> None:
    """Train a DeepSpeed engine bare and tracked, and compare."""
    os.environ.update(DS_ACCELERATOR="cpu", RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    import deepspeed

    torch.set_num_threads(1)
    # Its shared-memory collectives are C++ code that would now be compiled for minutes.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": 64,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    results = []
    for is_tracked in (False, True):
        if has_empty_model:
            with deepspeed.zero.Init(config_dict_or_path=config):
                model = digits_model(width=WIDTH)
            assert all(p.numel() == 0 for p in model.parameters())
        else:
            model = digits_model(width=WIDTH)
        named = dict(model.named_parameters())
        decay = [p for name, p in named.items() if not has_groups or name.endswith("weight")]
        rest = [p for p in named.values() if not any(p is other for other in decay)]
        inner = torch.optim.AdamW([{"params": group} for group in (decay, rest) if group], lr=3e-3)
        brute = Partitions(inner)
        optimizer = inner
        with Lines() as lines:
            if is_tracked:
                if has_empty_model:
                    with pytest.raises(ValueError, match="without rows or channels"):
                        FlipTrackingOptimizer(inner, model, quantizer="int8", sinks=[])
                optimizer, tracker = FORMS[form](inner, model)
            engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
            losses = zero3_losses(engine)
        results.append((losses, list(brute.last.values()), copy.deepcopy(list(inner.state.values()))))
    assert_same(*results)
    assert len(brute.flips) == (2 if has_groups else 1)
    brute.check(tracker)
    assert sum(brute.flips.values()) > 0
    assert tracker.step_count == 5 * len(brute.flips)
    assert len([line for line in lines if "no rows or channels" in line]) == 1


class Partitions(Flats):
    """The parameters that the optimizer currently has: DeepSpeed passes it one after the other."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__({})
        self.optimizer, self.last = optimizer, {}
        self.watch(optimizer)

    def before(self) -> None:
        groups = enumerate(self.optimizer.param_groups)
        self.parameters = {f"group{i}.partition{p.ds_id}": p for i, group in groups for p in group["params"]}
        for name, p in self.parameters.items():
            assert p.ndim == 1
            self.last[name] = p
            for counts in (self.flips, self.updates, self.stalled):
                counts.setdefault(name, 0)
        super().before()


def zero3_losses(engine) -> list[Tensor]:
    images, labels = (torch.tensor(array) for array in load_digits(return_X_y=True))
    losses = []
    for step in range(5):
        at = slice(step * 64, (step + 1) * 64)
        loss = nn.functional.cross_entropy(engine(images[at].float() / 16), labels[at])
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach().clone())
    return losses


@pytest.mark.parametrize(
    ("form", "has_groups", "has_empty_model"),
    [("wrapper", False, False), ("hooks", True, False), ("wrapper", True, True)],
)
def test_zero3(tmp_path, form, has_groups, has_empty_model):
    pytest.importorskip("deepspeed")
    mp.spawn(zero3, (str(tmp_path), form, has_groups, has_empty_model), nprocs=1)


def marked(tensor: Tensor, **attributes: object) -> Tensor:
    for name, value in attributes.items():
        setattr(tensor, name, value)
    return tensor


def test_zero3_tensors_are_recognized_by_their_attributes():
    """Without DeepSpeed: the attributes that 0.19 sets on the model's placeholders and on its partitions."""
    model = digits_model()
    for i, parameter in enumerate(model.parameters()):
        marked(parameter, ds_id=i, ds_shape=parameter.shape).data = torch.empty(0)
    groups = [{"params": list(model.parameters())}]

    plan = make_plan(name_parameters(groups, model), QuantizerSources(model), Selection())
    assert plan.tracked == {}
    later = "ZeRO-3 keeps it in partitions, which are tracked once DeepSpeed passes them to the optimizer"
    skipped = {"0.weight": later, "2.weight": later}
    assert plan.skipped == {**skipped, **dict.fromkeys(("0.bias", "2.bias"), plan.skipped["0.bias"])}
    assert plan.skipped["0.bias"] == "1-dimensional (name it in include= to track it)"
    assert (
        make_plan(name_parameters(groups, model), QuantizerSources(model), Selection(include="0.weight")).tracked == {}
    )
    for quantizer in BY_ROW_GROUP_OR_BLOCK:
        with pytest.raises(ValueError, match=r"'0.weight' cannot be tracked as requested: it is a flat parameter"):
            make_plan(name_parameters(groups, model), QuantizerSources(model), Selection(quantizer))

    partition = marked(torch.ones(3610, requires_grad=True), ds_id="0_3")
    earlier = [list(name_parameters(groups, model))]
    parameters = name_parameters([{"params": [partition]}], model, earlier)
    assert list(parameters) == ["group0.partition0_3"]
    plan = make_plan(parameters, QuantizerSources(model), Selection(), strict=False)
    assert [str(quantizer) for quantizer in plan.tracked["group0.partition0_3"]] == ["float8_e4m3"]
    assert [note for note in plan.notes if "no rows or channels" in note and "(group0.partition0_3)" in note]
    for quantizer in BY_ROW_GROUP_OR_BLOCK:
        plan = make_plan(parameters, QuantizerSources(model), Selection(quantizer), strict=False)
        assert plan.tracked == {}
        assert f"{quantizer} has one scale per row, group or block" in plan.skipped["group0.partition0_3"]
        assert any("no rows or channels" in note for note in plan.notes)
