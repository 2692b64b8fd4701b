"""With the Trainer of transformers: training is unchanged, the counts are right, and a resumed run continues."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from conftest import FORMS, BruteForce, assert_same, by_wrapper, watched
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_examples import check_events, check_table, numbers_after, run_example
from torch import nn
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter

from weightflip import FlipTrackingOptimizer, WeightFlipTracker

transformers = pytest.importorskip("transformers", reason="needs: pip install transformers accelerate")
pytest.importorskip("accelerate", reason="needs: pip install accelerate")

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)

STEPS = 12
LR = 5e-3
MAX_NORM = 0.5


class Tokens(Dataset):
    """Reads a digit as a sentence: its 64 pixels are words from a vocabulary of 17."""

    def __init__(self, digits, size: int = 96) -> None:
        images, labels = digits
        self.tokens, self.labels = (images[:size] * 16).long(), labels[:size]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[i], "labels": self.labels[i]}


def tiny_bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=17,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        num_labels=10,
    )
    return transformers.BertForSequenceClassification(config)


class Run(NamedTuple):
    """The results of a training."""

    trainer: transformers.Trainer
    model: nn.Module
    optimizer: torch.optim.Optimizer
    tracker: WeightFlipTracker | None
    brute: BruteForce
    lrs: list[float]
    warnings: list[tuple[type[Warning], str]]


def settings(directory, **options) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(
        output_dir=str(directory),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=MAX_NORM,
        learning_rate=LR,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        weight_decay=0.1,
        logging_steps=1,
        save_steps=STEPS // 2,
        report_to="none",
        disable_tqdm=True,
        **options,
    )


def train(
    digits, directory, *, form=None, resume=None, trainer_class=transformers.Trainer, make=None, **options
) -> Run:
    """Train with dropout, two micro-batches per step, clipped gradients, warm-up and cosine, tracked or not."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = tiny_bert()
        inner = (make or torch.optim.AdamW)(model.parameters(), lr=LR)
        brute = watched(inner, model)
        optimizer, tracker = form(inner, model) if form else (inner, None)
        lrs = []
        inner.register_step_pre_hook(lambda opt, *_: lrs.append(opt.param_groups[0]["lr"]))
        data = Tokens(digits)
        trainer = transformers.Trainer(
            model, settings(directory, **options), train_dataset=data, eval_dataset=data, optimizers=(optimizer, None)
        )
        trainer.train(resume_from_checkpoint=resume)
    seen = [(w.category, str(w.message)) for w in caught]
    return Run(trainer, model, optimizer, tracker, brute, lrs, seen)


def curve(run: Run, key: str) -> list[float]:
    return [entry[key] for entry in run.trainer.state.log_history if key in entry]


@each_form
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_tracked_equals_bare_and_counts_equal_brute_force(bf16, form, digits, tmp_path):
    bare = train(digits, tmp_path / "bare", bf16=bf16)
    run = train(digits, tmp_path / "tracked", form=form, bf16=bf16)

    for key in ("loss", "grad_norm", "learning_rate"):
        assert curve(bare, key) == curve(run, key)
        assert len(curve(run, key)) == STEPS
    assert_same(dict(bare.model.state_dict()), dict(run.model.state_dict()))
    assert bare.warnings == run.warnings

    run.brute.check(run.tracker)
    assert sum(run.brute.flips.values()) > 0
    assert sum(run.brute.stalled.values()) > 0
    assert run.tracker.step_count == STEPS
    # Gradients were clipped, and the inner optimizer's learning rate follows the Trainer's scheduler.
    assert max(curve(run, "grad_norm")) > MAX_NORM
    factor = transformers.get_cosine_schedule_with_warmup(torch.optim.SGD([nn.Parameter(torch.ones(1))], LR), 2, STEPS)
    assert run.lrs == [LR * factor.lr_lambdas[0](step) for step in range(STEPS)] == bare.lrs


def test_bf16_is_autocast_and_the_weights_stay_float32(digits, tmp_path):
    full = train(digits, tmp_path / "full", form=by_wrapper)
    mixed = train(digits, tmp_path / "mixed", form=by_wrapper, bf16=True)
    assert curve(full, "loss") != curve(mixed, "loss")
    assert {row[1:] for row in mixed.optimizer.info.tracked.values()} == {("float32", "float8_e4m3")}


@each_form
@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad_passes_set_to_none_on(set_to_none, form, digits, tmp_path):
    """The Trainer uses Accelerate's optimizer, which looks for it in the signature."""

    class Zeroes(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            optimizer.zero_grad(set_to_none=set_to_none)
            grads.append({p.grad is None for group in optimizer.param_groups for p in group["params"]})

    grads = []
    runs = []
    for each in (None, form):
        model = tiny_bert()
        inner = torch.optim.AdamW(model.parameters(), lr=LR)
        brute = watched(inner, model)
        optimizer, tracker = each(inner, model) if each else (inner, None)
        trainer = transformers.Trainer(
            model,
            settings(tmp_path, save_strategy="no"),
            train_dataset=Tokens(digits),
            optimizers=(optimizer, None),
            callbacks=[Zeroes()],
        )
        trainer.train()
        runs.append(dict(model.state_dict()))
    assert_same(*runs)
    brute.check(tracker)
    assert len(grads) == 2 * STEPS
    assert all(seen == {set_to_none} for seen in grads)


def test_layers_have_the_models_names(digits, tmp_path):
    run = train(digits, tmp_path, form=by_wrapper)
    assert list(run.tracker.get_flip_counts())[:4] == [
        "bert.embeddings.word_embeddings.weight",
        "bert.embeddings.position_embeddings.weight",
        "bert.embeddings.token_type_embeddings.weight",
        "bert.encoder.layer.0.attention.self.query.weight",
    ]


def test_the_trainers_optimizer_gives_access_to_the_tracker(digits, tmp_path):
    run = train(digits, tmp_path, form=by_wrapper)
    assert run.trainer.optimizer is not run.optimizer  # Accelerate's, around it
    assert run.trainer.optimizer.optimizer is run.optimizer


@each_form
def test_a_resumed_run_continues(form, digits, tmp_path):
    whole = train(digits, tmp_path / "whole", form=form)
    resumed = train(
        digits, tmp_path / "resumed", form=form, resume=str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}")
    )

    assert curve(whole, "loss") == curve(resumed, "loss")
    assert whole.lrs[STEPS // 2 :] == resumed.lrs
    assert_same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    assert_same(whole.optimizer.state_dict(), resumed.optimizer.state_dict())
    whole.brute.check(resumed.tracker)
    assert 0 < sum(resumed.brute.flips.values()) < sum(whole.brute.flips.values())
    assert resumed.tracker.step_count == STEPS


def test_a_resumed_run_continues_its_event_files(digits, tmp_path):
    """The points after the checkpoint are replaced, not duplicated."""
    for resume in (None, str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}")):

        def form(inner, model):
            optimizer = FlipTrackingOptimizer(inner, model, log_dir=tmp_path / "runs", log_every=2)
            return optimizer, optimizer.tracker

        train(digits, tmp_path / "whole", form=form, resume=resume).optimizer.close()
        events = EventAccumulator(str(tmp_path / "runs"))
        events.Reload()
        assert [scalar.step for scalar in events.Scalars("flips/rate")] == list(range(2, STEPS + 1, 2))
    of_each = sorted(path.name.partition(".")[0] for path in (tmp_path / "runs").iterdir())
    assert of_each == ["events", "events", "flips", "flips"]


@pytest.mark.parametrize(("saved", "loading"), [(None, by_wrapper), (by_wrapper, None)])
def test_bare_and_wrapped_runs_load_each_others_checkpoints(saved, loading, digits, tmp_path):
    whole = train(digits, tmp_path / "whole", form=saved)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{STEPS // 2}")
    resumed = train(digits, tmp_path / "resumed", form=loading, resume=checkpoint)
    assert_same(dict(whole.model.state_dict()), dict(resumed.model.state_dict()))
    assert whole.warnings == resumed.warnings
    if loading:
        resumed.brute.check(resumed.tracker)


class WrapsItsOwn(transformers.Trainer):
    """Keeps the Trainer's choice of optimizer and weight decay."""

    def create_optimizer(self, *args, **kwargs):
        if self.optimizer is None:
            inner = super().create_optimizer(*args, **kwargs)
            self.brute = watched(inner, self.model)
            self.optimizer = FlipTrackingOptimizer(inner, self.model, sinks=[])
        return self.optimizer


def test_wrapping_the_optimizer_that_the_trainer_creates(digits, tmp_path):
    trainers = []
    for trainer_class in (transformers.Trainer, WrapsItsOwn):
        trainer = trainer_class(tiny_bert(), settings(tmp_path / trainer_class.__name__), train_dataset=Tokens(digits))
        trainer.train()
        trainers.append(trainer)
    bare, trainer = trainers
    assert_same(dict(bare.model.state_dict()), dict(trainer.model.state_dict()))
    assert_same(bare.state.log_history[:-1], trainer.state.log_history[:-1])  # the last entry has run times in it
    assert [group["weight_decay"] for group in trainer.optimizer.param_groups] == [0.1, 0.0]
    trainer.brute.check(trainer.optimizer.optimizer.tracker)


def test_schedule_free_weight_swaps_for_evaluation_are_not_flips(digits, tmp_path):
    schedulefree = pytest.importorskip("schedulefree", reason="needs: pip install schedulefree")
    options = {"make": schedulefree.AdamWScheduleFree, "eval_strategy": "steps", "eval_steps": 3}
    bare = train(digits, tmp_path / "bare", **options)
    run = train(digits, tmp_path / "wrapped", form=by_wrapper, **options)
    assert curve(bare, "eval_loss") == curve(run, "eval_loss")
    assert len(curve(run, "eval_loss")) == STEPS // 3
    assert_same(dict(bare.model.state_dict()), dict(run.model.state_dict()))
    run.brute.check(run.tracker)
    assert sum(run.brute.flips.values()) > 0


def test_one_writer_for_the_trainer_and_the_flips(digits, tmp_path):
    """Both count optimizer steps."""
    writer = SummaryWriter(tmp_path / "runs")
    model = tiny_bert()
    inner = torch.optim.AdamW(model.parameters(), lr=LR)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[writer], log_every=4)
    callback = transformers.integrations.TensorBoardCallback(writer)
    data = Tokens(digits)
    trainer = transformers.Trainer(
        model, settings(tmp_path), train_dataset=data, optimizers=(optimizer, None), callbacks=[callback]
    )
    trainer.train()
    optimizer.close()
    writer.close()
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("flips/rate")] == [4, 8, 12]
    assert [scalar.step for scalar in events.Scalars("train/loss")] == list(range(1, STEPS + 1))


def test_example(tmp_path):
    output = run_example("trainer_digits.py", f"--log-dir={tmp_path}", "--steps=30", bar="30/30", imported=())
    first_loss, last_loss = numbers_after("Training loss:", output)
    assert last_loss < first_loss
    layers = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]
    layers += [f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")]
    check_table(output, layers, "e4m3:row")
    check_events(tmp_path, layers, steps=30)
