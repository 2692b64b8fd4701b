"""With Hugging Face Accelerate: training is unchanged, the counts are right, and a resumed run continues."""

from __future__ import annotations

import math
import warnings
from typing import NamedTuple

import pytest
import torch
from conftest import FORMS, BruteForce, assert_same, by_wrapper, digits_model, watched
from test_examples import check_events, check_table, numbers_after, run_example
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from weightflip import FlipTrackingOptimizer, WeightFlipTracker, track_flips

accelerate = pytest.importorskip("accelerate", reason="needs: pip install accelerate")
each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)

BATCHES_AN_EPOCH = 12
ACCUMULATE = 2
STEPS = 2 * BATCHES_AN_EPOCH // ACCUMULATE
LR = 3e-3
MAX_NORM = 0.33


class Run(NamedTuple):
    """The results of a training, and the objects to continue with."""

    accelerator: accelerate.Accelerator
    model: nn.Module
    optimizer: torch.optim.Optimizer  # as it was before accelerator.prepare()
    prepared: accelerate.optimizer.AcceleratedOptimizer
    tracker: WeightFlipTracker | None
    brute: BruteForce
    losses: list[Tensor]
    lrs: list[float]
    norms: list[Tensor]
    warnings: list[tuple[type[Warning], str]]


def new_accelerator(**options) -> accelerate.Accelerator:
    """Create an accelerator as in a new process: otherwise accelerators share their state, and so their precision."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    return accelerate.Accelerator(cpu=True, **options)


def train(
    digits,
    *,
    form=None,
    epochs=range(2),
    mixed_precision="no",
    fused=False,
    scaler=None,
    overflows=(),
    save=None,
    load=None,
    zero_grad=None,
) -> Run:
    """Train with two micro-batches per step, clipped gradients and a cosine schedule, with or without tracking."""
    accelerator = new_accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=ACCUMULATE)
    accelerator.scaler = scaler
    images, labels = (tensor[: 64 * BATCHES_AN_EPOCH] for tensor in digits)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64)
    model = digits_model()
    inner = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)
    brute = watched(inner, model)
    optimizer, tracker = form(inner, model) if form else (inner, None)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)
    losses, lrs, norms = [], [], []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, prepared, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
        if load is not None:
            accelerator.load_state(load)
        for _ in epochs:
            for batch, targets in loader:
                with accelerator.accumulate(model):
                    loss = nn.functional.cross_entropy(model(batch), targets)
                    accelerator.backward(loss * math.inf if len(losses) in overflows else loss)
                    if accelerator.sync_gradients:
                        norms.append(accelerator.clip_grad_norm_(model.parameters(), MAX_NORM))
                    prepared.step()
                    scheduler.step()
                    prepared.zero_grad(**zero_grad or {})
                losses.append(loss.detach())
                lrs.append(inner.param_groups[0]["lr"])
        if save is not None:
            accelerator.save_state(save)
    seen = [(w.category, str(w.message)) for w in caught]
    return Run(accelerator, model, optimizer, prepared, tracker, brute, losses, lrs, norms, seen)


@each_form
@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_tracked_equals_bare_and_counts_equal_brute_force(mixed_precision, form, digits):
    bare = train(digits, mixed_precision=mixed_precision)
    run = train(digits, form=form, mixed_precision=mixed_precision)

    assert_same(bare.losses, run.losses)
    assert_same(bare.norms, run.norms)
    assert_same(dict(bare.model.state_dict()), dict(run.model.state_dict()))
    assert bare.warnings == run.warnings

    run.brute.check(run.tracker)
    assert sum(run.brute.flips.values()) > 0
    assert sum(run.brute.stalled.values()) > 0
    assert run.tracker.step_count == STEPS
    # Gradients were clipped, and the inner optimizer's learning rate drops with each step.
    assert max(run.norms) > MAX_NORM
    assert bare.lrs == run.lrs
    cosine = [LR * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(1, STEPS + 1)]
    assert run.lrs[ACCUMULATE - 1 :: ACCUMULATE] == pytest.approx(cosine, abs=1e-9)


@each_form
@pytest.mark.parametrize("fused", [False, True], ids=["for-loop", "fused"])
def test_steps_skipped_by_the_scaler_do_not_count(fused, form, digits):
    """Accelerate creates a scaler only for float16 on a GPU, so the test sets one."""
    bare, run = (
        train(digits, form=each, fused=fused, scaler=torch.amp.GradScaler("cpu"), overflows=(2, 9, 17))
        for each in (None, form)
    )
    assert sum(not norm.isfinite() for norm in run.norms) == 3
    assert_same(bare.losses, run.losses)
    assert_same(dict(bare.model.state_dict()), dict(run.model.state_dict()))
    assert bare.lrs == run.lrs
    assert bare.warnings == run.warnings
    run.brute.check(run.tracker)
    assert run.tracker.step_count == STEPS - 3


@each_form
@pytest.mark.parametrize("set_to_none", [None, True, False])
def test_zero_grad_passes_set_to_none_on(set_to_none, form, digits):
    """Accelerate looks for it in the signature."""
    bare, run = (train(digits, form=each, zero_grad={"set_to_none": set_to_none}) for each in (None, form))
    assert_same(bare.losses, run.losses)
    assert_same(dict(bare.model.state_dict()), dict(run.model.state_dict()))
    run.brute.check(run.tracker)
    for each in (bare, run):
        assert {p.grad is None for p in each.model.parameters()} == {set_to_none is not False}


def test_bf16_is_autocast_and_the_weights_stay_float32(digits):
    """Therefore flips are those of float8, not of bfloat16 weights."""
    full = train(digits, form=by_wrapper, epochs=range(1))
    mixed = train(digits, form=by_wrapper, epochs=range(1), mixed_precision="bf16")
    assert not torch.equal(torch.stack(full.losses), torch.stack(mixed.losses))
    assert {row[1:] for row in mixed.optimizer.info.tracked.values()} == {("float32", "float8_e4m3")}


def test_layers_that_prepare_converts_to_float8_are_detected(digits):
    """Accelerate converts them after the optimizer was created; the first and the last stay as they are.

    Without a config of its own, accelerate 1.15 takes one for FSDP2. It puts new parameters into the model and leaves
    the old ones to the optimizer: without FSDP2 these layers do not train, tracked or not.
    """
    float8 = pytest.importorskip("torchao.float8", reason="needs: pip install torchao")
    config = float8.Float8LinearConfig(round_scales_to_power_of_2=True)
    recipe = accelerate.utils.AORecipeKwargs(config=config)
    accelerator = new_accelerator(mixed_precision="fp8", kwargs_handlers=[recipe])
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    inner = torch.optim.AdamW(model.parameters(), lr=LR)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[])
    model, prepared = accelerator.prepare(model, optimizer)
    assert isinstance(model[2], float8.float8_linear.Float8Linear)
    for step in range(3):
        images, labels = (tensor[64 * step : 64 * (step + 1)] for tensor in digits)
        accelerator.backward(nn.functional.cross_entropy(model(images), labels))
        prepared.step()
        prepared.zero_grad()
    quantizers = {name: row[2] for name, row in optimizer.info.tracked.items()}
    assert quantizers == {"2.weight": "float8_e4m3:pow2"}
    assert all("high precision" in optimizer.info.skipped[name] for name in ("0.weight", "4.weight"))
    assert optimizer.tracker.get_flip_counts()["2.weight"] > 0


def test_what_prepare_returns_gives_access_to_the_tracker(digits):
    run = train(digits, form=by_wrapper, epochs=range(1))
    assert isinstance(run.prepared, accelerate.optimizer.AcceleratedOptimizer)
    assert run.prepared.optimizer is run.optimizer
    assert not hasattr(run.prepared, "tracker")  # it passes no unknown attribute on
    assert run.prepared.param_groups is run.optimizer.inner.param_groups


def test_an_already_prepared_optimizer_is_refused():
    """Each micro-batch would count as a step."""
    model = digits_model()
    prepared = new_accelerator().prepare(torch.optim.AdamW(model.parameters()))
    for track in (FlipTrackingOptimizer, track_flips):
        with pytest.raises(TypeError, match="got an AcceleratedOptimizer; wrap it first, then call prepare"):
            track(prepared, model, sinks=[])


@each_form
def test_a_resumed_run_continues(form, digits, tmp_path):
    whole = train(digits, form=form)
    half = train(digits, form=form, epochs=range(1), save=tmp_path)
    resumed = train(digits, form=form, epochs=range(1), load=tmp_path)

    assert_same(whole.losses, half.losses + resumed.losses)
    assert whole.lrs == half.lrs + resumed.lrs
    assert_same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    assert_same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    whole.brute.check(resumed.tracker)
    assert resumed.tracker.step_count == whole.tracker.step_count
    assert half.tracker.step_count == whole.tracker.step_count // 2


@pytest.mark.parametrize(("saved", "loading"), [(None, by_wrapper), (by_wrapper, None)])
def test_bare_and_wrapped_runs_load_each_others_checkpoints(saved, loading, digits, tmp_path):
    whole = train(digits)
    train(digits, form=saved, epochs=range(1), save=tmp_path)
    resumed = train(digits, form=loading, epochs=range(1), load=tmp_path)
    assert_same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    if loading:
        resumed.brute.check(resumed.tracker)


def test_schedule_free_weight_swaps_between_steps_are_not_flips(digits):
    schedulefree = pytest.importorskip("schedulefree", reason="needs: pip install schedulefree")
    runs = {}
    for wrap in (False, True):
        accelerator = new_accelerator()
        model = digits_model()
        inner = schedulefree.AdamWScheduleFree(model.parameters(), lr=1e-2)
        brute = watched(inner, model)
        optimizer = FlipTrackingOptimizer(inner, model, sinks=[]) if wrap else inner
        model, prepared = accelerator.prepare(model, optimizer)
        losses = []
        for step in range(6):
            prepared.train()
            images, labels = (tensor[64 * step : 64 * (step + 1)] for tensor in digits)
            prepared.zero_grad()
            accelerator.backward(nn.functional.cross_entropy(model(images), labels))
            prepared.step()
            trained = model[0].weight.detach().clone()
            prepared.eval()
            # At the first step, the averaged weights equal the trained ones.
            assert torch.equal(trained, model[0].weight) == (step == 0)
            losses.append(nn.functional.cross_entropy(model(images), labels).detach())
        runs[wrap] = losses, dict(model.state_dict())
    assert_same(runs[False], runs[True])
    brute.check(optimizer.tracker)
    assert sum(brute.flips.values()) > 0


def test_example(tmp_path):
    output = run_example("accelerate_digits.py", f"--log-dir={tmp_path}", "--epochs=2", bar="", imported=())
    first_loss, last_loss = numbers_after("Training loss:", output)
    assert last_loss < first_loss
    layers = ["0.weight", "2.weight"]
    check_table(output, layers, "float8_e4m3")
    check_events(tmp_path, layers, steps=2 * 29)
