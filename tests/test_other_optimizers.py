"""Optimizers from elsewhere: torchao's, schedule-free ones, and one whose step takes more than a closure."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from conftest import FORMS, BruteForce, assert_same, backward, digits_model, same_as_bare
from torch import nn

from weightflip import FlipTrackingOptimizer, track_flips

each_form = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)


def wide_model() -> nn.Sequential:
    """A model whose first weight has 8,192 elements: torchao only quantizes the state of weights with 4,096 or more."""
    return digits_model(width=128)


# ---------------------------------------------------------------------- torchao


def low_bit(name: str, **options):
    torchao_optim = pytest.importorskip("torchao.optim", reason="torchao is not installed")
    return lambda p: getattr(torchao_optim, name)(p, lr=0.01, **options)


@pytest.fixture
def eager():
    # These optimizers compile their step, which would take a minute and give the same result.
    with torch.compiler.set_stance("force_eager"):
        yield


@each_form
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamWFp8", "AdamW4bit"])
def test_torchao_low_bit_optimizers(name, form, digits, eager):
    def train(model, optimizer, digits):
        for step in range(6):
            backward(model, digits, step)
            optimizer.step()
            if step == 2:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
        kinds = {type(value).__name__ for state in optimizer.state.values() for value in state.values()}
        assert any(kind.startswith("OptimState") for kind in kinds)

    same_as_bare(form, low_bit(name), train, digits, wide_model)


@each_form
def test_torchao_stochastic_rounding_draws_the_same_numbers(form, digits, eager):
    # Updates of bfloat16 weights are rounded at random: any random number drawn by tracking would change the training.
    def train(model, optimizer, digits):
        images, labels = digits
        for step in range(6):
            optimizer.zero_grad()
            at = slice(step * 64, (step + 1) * 64)
            nn.functional.cross_entropy(model(images[at].bfloat16()).float(), labels[at]).backward()
            optimizer.step()
        return torch.get_rng_state()

    make = low_bit("_AdamW", bf16_stochastic_round=True)
    results = []
    for tracked in (False, True):
        model = wide_model().bfloat16()
        torch.manual_seed(1)
        brute = BruteForce(model, lambda weight: weight.detach().float())
        inner = make(model.parameters())
        inner.register_step_pre_hook(lambda *_, brute=brute: brute.before())
        inner.register_step_post_hook(lambda *_, brute=brute: brute.after())
        optimizer, tracker = form(inner, model) if tracked else (inner, None)
        rng = train(model, optimizer, digits)
        results.append((rng, dict(model.state_dict())))
        if tracker is not None:
            brute.check(tracker)
            assert sum(brute.flips.values()) > 0
            assert sum(brute.stalled.values()) > 0
    assert_same(*results)


# ---------------------------------------------------------------------- schedule-free


@each_form
@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"])
def test_schedule_free_train_and_eval(name, form, digits):
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    images, labels = digits

    def train(model, optimizer, digits):
        trace = []
        for epoch in range(3):
            optimizer.train()
            for step in range(4):
                backward(model, digits, epoch * 4 + step)
                optimizer.step()
            # Writes the averaged weights into the parameters, and train() writes the others back. These are not flips.
            optimizer.eval()
            with torch.no_grad():
                trace.append(nn.functional.cross_entropy(model(images), labels))
        assert trace[-1] < trace[0]
        return trace

    def make(p):
        lr = {"lr": 1.0} if name == "SGDScheduleFree" else {"lr": 0.01}
        return getattr(schedulefree, name)(p, **lr)

    same_as_bare(form, make, train, digits)


def test_only_schedule_free_optimizers_have_train_and_eval():
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    model = digits_model()
    with_mode = FlipTrackingOptimizer(schedulefree.AdamWScheduleFree(model.parameters()), model, sinks=[])
    without = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters()), model, sinks=[])
    assert hasattr(with_mode, "train")
    assert hasattr(with_mode, "eval")
    assert not hasattr(without, "train")
    assert not hasattr(without, "eval")


# ---------------------------------------------------------------------- not a subclass of torch.optim.Optimizer


class ByHand:
    """The minimal optimizer: six attributes. Its param groups are created on each access, like fastai's."""

    def __init__(self, parameters, lr):
        self.parameters, self.lr, self.state = list(parameters), lr, {}

    param_groups = property(lambda self: [{"params": self.parameters, "lr": self.lr}])

    def step(self):
        with torch.no_grad():
            for p in self.parameters:
                if p.grad is not None:
                    p.sub_(self.lr * p.grad)

    def zero_grad(self):
        for p in self.parameters:
            p.grad = None

    def state_dict(self):
        return {"lr": self.lr}

    def load_state_dict(self, state):
        self.lr = state.pop("lr")
        assert not state


def with_slots(parameters):
    names = {name: value for name, value in vars(ByHand).items() if name not in ("__dict__", "__weakref__")}
    return type("Slotted", (), {**names, "__slots__": ("parameters", "lr", "state")})(parameters, 0.5)


def schedule_free_wrapper(parameters):
    schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
    return schedulefree.ScheduleFreeWrapper(torch.optim.SGD(parameters, lr=0.5), momentum=0.9)


@pytest.mark.parametrize("make", [schedule_free_wrapper, lambda p: ByHand(p, 0.5)], ids=["schedulefree", "by hand"])
def test_objects_that_only_behave_like_an_optimizer(make, digits):
    results = []
    for tracked in (False, True):
        model = digits_model()
        inner = make(model.parameters())
        assert not isinstance(inner, torch.optim.Optimizer)
        optimizer = FlipTrackingOptimizer(inner, model, sinks=[]) if tracked else inner
        brute, trace = BruteForce(model), []
        for step in range(8):
            if hasattr(optimizer, "train"):
                optimizer.train()
            optimizer.zero_grad()
            trace.append(backward(model, digits, step).detach())
            brute.before()
            assert optimizer.step() is None
            brute.after()
            if hasattr(optimizer, "eval"):
                optimizer.eval()
                trace.append(nn.functional.cross_entropy(model(digits[0]), digits[1]).detach())
            if step == 3:
                state = copy.deepcopy(optimizer.state_dict())
                inner = make(model.parameters())
                optimizer = FlipTrackingOptimizer(inner, model, sinks=[]) if tracked else inner
                optimizer.load_state_dict(state)
            elif step == 5:
                model, optimizer, brute = copy.deepcopy((model, optimizer, brute))
        results.append((trace, dict(model.state_dict())))
    assert_same(*results)
    brute.check(optimizer.tracker)
    assert sum(brute.flips.values()) > 0
    assert hasattr(optimizer, "train") == hasattr(inner, "train")
    assert hasattr(optimizer, "add_param_group") == hasattr(inner, "add_param_group")
    assert not hasattr(optimizer, "register_step_pre_hook")
    with pytest.raises(TypeError, match=r"step_pre, step_post, .*; use FlipTrackingOptimizer\("):
        track_flips(inner, model, sinks=[])


def test_objects_with_slots(digits):
    model = digits_model()
    optimizer, brute = FlipTrackingOptimizer(with_slots(model.parameters()), model, sinks=[]), BruteForce(model)
    for step in range(3):
        backward(model, digits, step)
        brute.before()
        optimizer.step()
        brute.after()
    brute.check(optimizer.tracker)
    assert sum(brute.flips.values()) > 0


@pytest.mark.parametrize("missing", ["step", "zero_grad", "state_dict", "load_state_dict", "param_groups", "state"])
def test_objects_that_lack_an_attribute_are_refused_by_name(missing):
    names = {name: value for name, value in vars(ByHand).items() if name not in ("__dict__", "__weakref__", missing)}
    kind = type("Optimizer", (), {**names, "__module__": "fastai.optimizer", "__qualname__": "Optimizer"})
    thing = kind(digits_model().parameters(), 0.1)
    if missing == "state":
        del thing.state
    with pytest.raises(TypeError, match=f"got fastai.optimizer.Optimizer, which lacks {missing}; wrap the object"):
        FlipTrackingOptimizer(thing, sinks=[])
    thing.opt = torch.optim.SGD(thing.parameters, 0.1)
    with pytest.raises(TypeError, match=f"lacks {missing}; wrap the torch.optim.Optimizer in its attribute 'opt'"):
        track_flips(thing, sinks=[])


@pytest.mark.parametrize(
    "groups",
    [
        lambda parameters: parameters,
        lambda parameters: [{"params": parameters[0]}],
        lambda parameters: [{"params": iter(parameters)}],
        lambda parameters: [{"params": [("0.weight", parameters[0])]}],
        lambda parameters: [{"params": None}],
    ],
)
def test_invalid_param_groups(groups):
    kind = type("Bare", (ByHand,), {"param_groups": property(lambda self: groups(self.parameters))})
    with pytest.raises(
        TypeError, match="Bare, which lacks param_groups that are dictionaries with 'params', a list of tensors"
    ):
        FlipTrackingOptimizer(kind(digits_model().parameters(), 0.1), sinks=[])


def test_deepspeeds_optimizer_is_refused():
    kind = type("DeepSpeedZeroOptimizer", (ByHand,), {"__module__": "deepspeed.runtime.zero.stage_1_and_2"})
    with pytest.raises(
        TypeError, match=r"got deepspeed.runtime.*; wrap it first, then call deepspeed.initialize\(optimizer="
    ):
        FlipTrackingOptimizer(kind(digits_model().parameters(), 0.1), sinks=[])


# ---------------------------------------------------------------------- a step that takes more than a closure


@each_form
def test_a_step_with_a_hessian(form, digits):
    optimizers = pytest.importorskip("pytorch_optimizer", reason="pytorch_optimizer is not installed")

    def train(model, optimizer, digits):
        losses = []
        for step in range(4):
            losses.append(backward(model, digits, step).detach())
            hessian = [p.grad.square() + 1e-3 for p in model.parameters()]
            assert optimizer.step(hessian=hessian) is None
            losses.append(backward(model, digits, step).detach())
            loss = losses[-1]
            assert optimizer.step(lambda loss=loss: loss, hessian) is loss
        return losses

    same_as_bare(form, lambda p: optimizers.SophiaH(p, lr=0.01), train, digits)
