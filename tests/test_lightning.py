"""With Lightning: training is unchanged, the counts are right, and a resumed run continues."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from conftest import FORMS, assert_same, by_wrapper, digits_model, float8_values, watched
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_examples import check_events, check_table, numbers_after, run_example
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from weightflip import FlipTrackingOptimizer

lightning = pytest.importorskip("lightning", reason="needs: pip install lightning")

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)

BATCHES_AN_EPOCH = 12
LR = 3e-3
MAX_NORM = 0.25


class Digits(lightning.LightningModule):
    """A module with or without tracking, otherwise always the same."""

    def __init__(self, *, form=None, result: str = "dict", values=float8_values) -> None:
        super().__init__()
        self.model = digits_model()
        self.form, self.result, self.values = form, result, values
        self.lr = LR
        self.losses: list[Tensor] = []
        self.norms: list[Tensor] = []
        self.lrs: list[float] = []

    def loss(self, batch) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images.to(self.dtype)), labels)
        self.losses.append(loss.detach())
        return loss

    def training_step(self, batch, index):
        return self.loss(batch)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.norms.append(torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None]))
        super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self):
        inner = torch.optim.AdamW(self.parameters(), lr=self.lr)
        self.brute = watched(inner, self)
        self.brute.values = self.values
        inner.register_step_pre_hook(lambda opt, *_: self.lrs.append(opt.param_groups[0]["lr"]))
        self.optimizer, self.tracker = self.form(inner, self) if self.form else (inner, None)
        if self.result == "alone":
            return self.optimizer
        scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, gamma=0.9)
        if self.result == "lists":
            return [self.optimizer], [{"scheduler": scheduler, "interval": "step"}]
        return {"optimizer": self.optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ByHand(Digits):
    """Manual optimization, alternately with and without a closure, with a step every second batch."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, index):
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        if index % 4 == 0:
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
        elif index % 4 == 1:
            self.manual_backward(self.loss(batch))
            self.clip_gradients(optimizer, MAX_NORM, "norm")
            optimizer.step()
            scheduler.step()
        else:

            def closure():
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)
            scheduler.step()


class Run(NamedTuple):
    """The results of a training."""

    trainer: lightning.Trainer
    module: Digits
    monitor: lightning.pytorch.callbacks.LearningRateMonitor
    warnings: list[tuple[type[Warning], str]]


def train(digits, directory, module, *, epochs=2, load=None, callbacks=(), **options) -> Run:
    images, labels = (tensor[: 64 * BATCHES_AN_EPOCH] for tensor in digits)
    loader = DataLoader(TensorDataset(images, labels), batch_size=64)
    monitor = lightning.pytorch.callbacks.LearningRateMonitor(logging_interval="step")
    if module.automatic_optimization:
        options = {"accumulate_grad_batches": 2, "gradient_clip_val": MAX_NORM, **options}
    options = {"logger": lightning.pytorch.loggers.CSVLogger(directory), **options}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            log_every_n_steps=1,
            callbacks=[monitor, *callbacks],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **options,
        )
        trainer.fit(module, loader, ckpt_path=load)
    # The directories differ, and so does a warning about them.
    seen = [(w.category, str(w.message).replace(str(directory), "")) for w in caught]
    return Run(trainer, module, monitor, seen)


def check_same_training(bare: Run, run: Run) -> None:
    assert_same(bare.module.losses, run.module.losses)
    assert_same(bare.module.norms, run.module.norms)
    assert_same(dict(bare.module.state_dict()), dict(run.module.state_dict()))
    assert bare.module.lrs == run.module.lrs
    assert bare.warnings == run.warnings
    assert bare.trainer.global_step == run.trainer.global_step


def check_counts(run: Run) -> None:
    tracker, brute = run.module.tracker, run.module.brute
    brute.check(tracker)
    assert sum(brute.flips.values()) > 0
    assert sum(brute.stalled.values()) > 0
    assert tracker.step_count == run.trainer.global_step


@each_form
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("result", ["alone", "dict", "lists"])
def test_automatic_optimization(result, precision, form, digits, tmp_path):
    bare = train(digits, tmp_path / "bare", Digits(result=result), precision=precision)
    run = train(digits, tmp_path / "wrapped", Digits(form=form, result=result), precision=precision)
    check_same_training(bare, run)
    check_counts(run)
    steps = BATCHES_AN_EPOCH  # in two epochs, at two micro-batches a step
    assert len(run.module.lrs) == steps
    assert max(run.module.norms) > MAX_NORM
    gamma = 1.0 if result == "alone" else 0.9
    assert run.module.lrs == pytest.approx([LR * gamma**step for step in range(steps)])


@each_form
def test_manual_optimization(form, digits, tmp_path):
    bare = train(digits, tmp_path / "bare", ByHand())
    run = train(digits, tmp_path / "wrapped", ByHand(form=form))
    check_same_training(bare, run)
    check_counts(run)
    steps = 2 * BATCHES_AN_EPOCH * 3 // 4
    assert run.module.lrs == pytest.approx([LR * 0.9**step for step in range(steps)])


@each_form
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_passes_set_to_none_on(set_to_none, form, digits, tmp_path):
    grads = []

    class Zeroed(ByHand):
        def training_step(self, batch, index):
            super().training_step(batch, index)
            self.optimizers().zero_grad(set_to_none=set_to_none)
            grads.append({p.grad is None for p in self.parameters()})

    bare = train(digits, tmp_path / "bare", Zeroed(), epochs=1)
    run = train(digits, tmp_path / "wrapped", Zeroed(form=form), epochs=1)
    check_same_training(bare, run)
    run.module.brute.check(run.module.tracker)
    assert len(grads) == 2 * BATCHES_AN_EPOCH
    assert all(seen == {set_to_none} for seen in grads)


def test_mixed_precision_leaves_the_weights_float32(digits, tmp_path):
    full = train(digits, tmp_path / "full", Digits(form=by_wrapper), epochs=1)
    mixed = train(digits, tmp_path / "mixed", Digits(form=by_wrapper), epochs=1, precision="bf16-mixed")
    assert not torch.equal(torch.stack(full.module.losses), torch.stack(mixed.module.losses))
    assert {row[1:] for row in mixed.module.optimizer.info.tracked.values()} == {("float32", "float8_e4m3")}


def test_true_bfloat16_weights_are_tracked_as_native(digits, tmp_path):
    bare = train(digits, tmp_path / "bare", Digits(values=Tensor.float), precision="bf16-true")
    run = train(digits, tmp_path / "wrapped", Digits(form=by_wrapper, values=Tensor.float), precision="bf16-true")
    check_same_training(bare, run)
    check_counts(run)
    assert {row[1:] for row in run.module.optimizer.info.tracked.values()} == {("bfloat16", "native")}


def test_learning_rate_monitor(digits, tmp_path):
    for result in ("alone", "dict"):
        bare = train(digits, tmp_path / "bare", Digits(result=result))
        run = train(digits, tmp_path / "wrapped", Digits(form=by_wrapper, result=result))
        # The monitor names its curve after the optimizer's class.
        assert list(bare.monitor.lrs) == ["lr-AdamW"]
        assert list(run.monitor.lrs) == ["lr-FlipTrackingOptimizer"]
        assert bare.monitor.lrs["lr-AdamW"] == run.monitor.lrs["lr-FlipTrackingOptimizer"]
        assert len(run.monitor.lrs["lr-FlipTrackingOptimizer"]) > BATCHES_AN_EPOCH


def test_what_lightning_returns_gives_access_to_the_tracker(digits, tmp_path):
    run = train(digits, tmp_path, Digits(form=by_wrapper), epochs=1)
    assert run.trainer.optimizers == [run.module.optimizer]
    # self.optimizers() returns Lightning's own wrapper, whose class is a subclass of ours.
    lightning_optimizer = run.module.optimizers()
    assert isinstance(lightning_optimizer, FlipTrackingOptimizer)
    assert lightning_optimizer is not run.module.optimizer
    assert lightning_optimizer.tracker is run.module.tracker
    assert lightning_optimizer.info is run.module.optimizer.info
    assert lightning_optimizer.param_groups is run.module.optimizer.inner.param_groups


@each_form
@pytest.mark.parametrize("make_module", [Digits, ByHand])
def test_a_resumed_run_continues(make_module, form, digits, tmp_path):
    whole = train(digits, tmp_path / "whole", make_module(form=form))
    half = train(digits, tmp_path / "half", make_module(form=form), epochs=1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = train(digits, tmp_path / "resumed", make_module(form=form), load=tmp_path / "half.ckpt")

    assert_same(whole.module.losses, half.module.losses + resumed.module.losses)
    assert whole.module.lrs == half.module.lrs + resumed.module.lrs
    assert_same(dict(whole.module.state_dict()), dict(resumed.module.state_dict()))
    assert_same(whole.module.optimizer.state_dict(), resumed.module.optimizer.state_dict())
    whole.module.brute.check(resumed.module.tracker)
    assert resumed.module.tracker.step_count == resumed.trainer.global_step == whole.trainer.global_step


@pytest.mark.parametrize(("saved", "loading"), [(None, by_wrapper), (by_wrapper, None)])
def test_bare_and_wrapped_runs_load_each_others_checkpoints(saved, loading, digits, tmp_path):
    whole = train(digits, tmp_path / "whole", Digits())
    half = train(digits, tmp_path / "half", Digits(form=saved), epochs=1)
    half.trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = train(digits, tmp_path / "resumed", Digits(form=loading), load=tmp_path / "half.ckpt")
    assert_same(dict(whole.module.state_dict()), dict(resumed.module.state_dict()))
    if loading:
        resumed.module.brute.check(resumed.module.tracker)


@each_form
def test_a_layer_that_a_batch_does_not_use_has_no_updates_in_its_step(form, digits, tmp_path):
    """Lightning computes gradients in a closure: those before the step are from the last step."""

    class Detour(Digits):
        def __init__(self, **options):
            super().__init__(**options)
            self.detour = nn.Linear(64, 64)

        def training_step(self, batch, index):
            images, labels = batch
            return self.loss((self.detour(images) if index % 2 else images, labels))

    options = {"accumulate_grad_batches": 1, "gradient_clip_val": None, "epochs": 1}
    run = train(digits, tmp_path, Detour(form=form), **options)
    run.module.brute.check(run.module.tracker)
    assert 0 < run.module.brute.updates["detour.weight"] <= 64 * 64 * BATCHES_AN_EPOCH // 2


def test_weight_averaging_swaps_for_validation_are_not_flips(digits, tmp_path):
    swapped = []

    class Validated(Digits):
        def on_train_batch_end(self, outputs, batch, index):
            self.trainer.callback_metrics["sum"] = self.model[0].weight.sum().detach()

        def validation_step(self, batch, index):
            trained = self.trainer.callback_metrics["sum"]
            swapped.append(not torch.equal(trained, self.model[0].weight.sum()))

        def val_dataloader(self):
            return self.trainer.train_dataloader

    averaging = lightning.pytorch.callbacks.EMAWeightAveraging
    options = {"num_sanity_val_steps": 0, "val_check_interval": 4, "check_val_every_n_epoch": None}
    bare = train(digits, tmp_path / "bare", Validated(), callbacks=[averaging()], **options)
    run = train(digits, tmp_path / "wrapped", Validated(form=by_wrapper), callbacks=[averaging()], **options)
    check_same_training(bare, run)
    check_counts(run)


def test_learning_rate_finder(digits, tmp_path):
    """The finder attaches its own scheduler, and restores weights, state and counts after the search."""
    found = []

    class Finder(lightning.pytorch.callbacks.LearningRateFinder):
        def on_fit_start(self, trainer, module):
            super().on_fit_start(trainer, module)
            found.append(self.optimal_lr.suggestion())
            found.append(self.optimal_lr.results)
            module.brute.__init__(module)

    def finder():
        return Finder(num_training_steps=20, min_lr=1e-4, max_lr=1e-1, attr_name="lr")

    bare = train(digits, tmp_path / "bare", Digits(), callbacks=[finder()], default_root_dir=tmp_path)
    run = train(digits, tmp_path / "wrapped", Digits(form=by_wrapper), callbacks=[finder()], default_root_dir=tmp_path)
    assert_same(found[:2], found[2:])
    check_same_training(bare, run)
    assert run.module.lrs[0] != LR
    check_counts(run)


def test_one_writer_for_lightning_and_the_flips(digits, tmp_path):
    """Both count optimizer steps."""

    class OneWriter(Digits):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self):
            inner = torch.optim.AdamW(self.parameters(), lr=LR)
            return FlipTrackingOptimizer(inner, self, sinks=[self.logger.experiment], log_every=4)

    logger = lightning.pytorch.loggers.TensorBoardLogger(tmp_path)
    run = train(digits, tmp_path, OneWriter(form=by_wrapper), logger=logger)
    run.trainer.optimizers[0].flush()
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("flips/rate")] == [4, 8, 12]
    assert events.Scalars("loss")[-1].step == BATCHES_AN_EPOCH - 1  # Lightning's steps start at 0


def test_fabric(digits, tmp_path):
    images, labels = digits
    finals = []
    for wrap, stops in ((False, ()), (True, ()), (True, (3,))):
        fabric = lightning.Fabric(accelerator="cpu", precision="bf16-mixed")

        def setup(fabric=fabric, wrap=wrap):
            model = digits_model()
            inner = torch.optim.AdamW(model.parameters(), lr=LR)
            brute = watched(inner, model)
            optimizer = FlipTrackingOptimizer(inner, model, sinks=[]) if wrap else inner
            return *fabric.setup(model, optimizer), optimizer, brute

        model, optimizer, unprepared, brute = setup()
        for step in range(6):
            if step in stops:
                fabric.save(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
                model, optimizer, unprepared, _ = setup()
                fabric.load(tmp_path / "fabric.ckpt", {"model": model, "optimizer": optimizer})
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images[step::6]), labels[step::6])
            fabric.backward(loss)
            fabric.clip_gradients(model, optimizer, max_norm=MAX_NORM)
            optimizer.step()
        finals.append((dict(model.state_dict()), unprepared.inner.state_dict() if wrap else unprepared.state_dict()))
        if wrap and not stops:
            brute.check(optimizer.tracker)
            whole = unprepared.state_dict()
    assert_same(finals[0], finals[1])
    assert_same(finals[0], finals[2])
    assert_same(whole, unprepared.state_dict())


def test_example(tmp_path):
    output = run_example("lightning_digits.py", f"--log-dir={tmp_path}", "--steps=58", bar="", imported=())
    assert numbers_after("Training loss:", output)[0] < 2.2  # chance: log(10) = 2.303
    layers = ["model.0.weight", "model.2.weight"]
    check_table(output, layers, "float8_e4m3")
    check_events(tmp_path, layers, steps=58)
