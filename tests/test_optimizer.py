"""The drop-in wrapper: training is unchanged bit for bit, and the counts are right at every step."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from conftest import DELEGATED, BruteForce, assert_same, backward, digits_model, float8_values
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from weightflip import Codes, FlipTrackingOptimizer, WeightFlipTracker
from weightflip.formats import E3M4

OPTIMIZERS = {
    "SGD momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def bfloat16_values(weight):
    return weight.detach().bfloat16().float()


@pytest.mark.parametrize(
    ("quantizer", "values"), [("auto", None), ("bfloat16", bfloat16_values)], ids=["float8_e4m3", "bfloat16"]
)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_wrapped_equals_bare_and_counts_equal_brute_force(make, quantizer, values, digits):
    bare_model, model = digits_model(), digits_model()
    bare = make(bare_model.parameters())
    optimizer = FlipTrackingOptimizer(make(model.parameters()), model, quantizer=quantizer, sinks=[])
    brute = BruteForce(model) if values is None else BruteForce(model, values)
    for step in range(40):
        backward(bare_model, digits, step)
        bare.step()

        backward(model, digits, step)
        brute.before()
        rng = torch.get_rng_state()
        assert optimizer.step() is None
        assert torch.equal(torch.get_rng_state(), rng)
        brute.after()
        brute.check(optimizer.tracker)

    assert_same(dict(bare_model.state_dict()), dict(model.state_dict()))
    state = optimizer.state_dict()
    del state["flip_tracking"]
    assert_same(bare.state_dict(), state)
    flips, stalled = sum(brute.flips.values()), sum(brute.stalled.values())
    assert flips > 0
    assert stalled > 0


def test_gradients_are_not_changed(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    backward(model, digits, 0)
    grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    optimizer.step()
    assert_same(grads, {name: p.grad for name, p in model.named_parameters()})


# ---------------------------------------------------------------------- what is tracked


def names(optimizer):
    return list(optimizer.info.tracked), optimizer.info.skipped


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(8, 8)
        self.head = nn.Linear(8, 8, bias=False)
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.head.weight
        self.half = nn.Linear(8, 8, dtype=torch.bfloat16)
        self.frozen = nn.Linear(8, 8)
        self.frozen.weight.requires_grad_(False)
        self.empty = nn.Parameter(torch.empty(0, 8))
        self.phase = nn.Parameter(torch.zeros(4, 4, dtype=torch.complex64))
        self.scalar = nn.Parameter(torch.tensor(1.0))


def test_default_selection_names_and_reasons():
    zoo = Zoo()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(zoo.parameters(), lr=0.1), zoo, sinks=[])
    tracked, skipped = names(optimizer)
    assert tracked == ["body.weight", "head.weight", "half.weight"]
    assert "frozen" in skipped["frozen.weight"]
    assert "1-dimensional" in skipped["body.bias"]
    assert "0-dimensional" in skipped["scalar"]
    assert "empty" in skipped["empty"]
    assert "complex64" in skipped["phase"]
    assert optimizer.info.tracked["half.weight"] == ("8x8", "bfloat16", "native")
    assert optimizer.info.tracked["body.weight"] == ("8x8", "float32", "float8_e4m3")


def test_the_assumed_format_is_logged(caplog):
    zoo = Zoo()
    FlipTrackingOptimizer(torch.optim.SGD(zoo.parameters(), lr=0.1), zoo, sinks=[])
    assert "Plain float32 weights have no quantizer of their own" in caplog.text


def test_names_without_a_model():
    zoo = Zoo()
    by_place = FlipTrackingOptimizer(torch.optim.SGD([zoo.body.bias, zoo.body.weight], lr=0.1), sinks=[])
    assert names(by_place)[0] == ["group0.param1"]
    named = FlipTrackingOptimizer(torch.optim.SGD([("a", zoo.body.weight), ("b", zoo.body.bias)], lr=0.1), sinks=[])
    assert names(named)[0] == ["a"]


def test_names_through_wrappers():
    model = nn.Sequential(nn.Linear(4, 4))
    for wrapped in (torch.compile(model), nn.DataParallel(model)):
        optimizer = FlipTrackingOptimizer(torch.optim.SGD(wrapped.parameters(), lr=0.1), wrapped, sinks=[])
        assert names(optimizer)[0] == ["0.weight"]


def test_globs_include_exclude_and_quantizer_mapping():
    zoo = Zoo()
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(zoo.parameters(), lr=0.1),
        zoo,
        include=["*.weight", "body.bias"],
        exclude="half.*",
        quantizer={"body.*": "e3m4", "h*": "auto"},
        sinks=[],
    )
    info = optimizer.info
    assert {name: row[2] for name, row in info.tracked.items()} == {
        "body.weight": "e3m4",
        "body.bias": "e3m4",
        "head.weight": "float8_e4m3",
    }
    assert info.skipped["half.weight"] == "excluded"
    assert info.skipped["half.bias"] == "excluded"
    assert "not included" in info.skipped["scalar"]


def test_frozen_then_unfrozen_starts_with_a_baseline(digits):
    model = digits_model()
    model[0].weight.requires_grad_(False)
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), model, sinks=[])
    backward(model, digits, 0)
    optimizer.step()
    assert list(optimizer.tracker.get_flip_counts()) == ["2.weight"]
    model[0].weight.requires_grad_(True)
    with torch.no_grad():
        model[0].weight.mul_(1.7)
    brute = BruteForce(model)
    backward(model, digits, 1)
    brute.before()
    optimizer.step()
    brute.after()
    assert optimizer.tracker.get_flip_counts()["0.weight"] == brute.flips["0.weight"] > 0


def test_added_groups_are_tracked(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model[2].parameters(), lr=0.5), model, sinks=[])
    optimizer.add_param_group({"params": list(model[0].parameters())})
    backward(model, digits, 0)
    optimizer.step()
    assert list(optimizer.tracker.get_flip_counts()) == ["2.weight", "0.weight"]


def test_lazy_and_converted_parameters():
    model = nn.Sequential(nn.LazyLinear(8), nn.Linear(8, 8))
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    assert names(optimizer)[1]["0.weight"] == "not initialized yet"
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert optimizer.tracker.get_update_counts() == {"0.weight": 32, "1.weight": 64}
    model.bfloat16()
    optimizer.step()
    assert optimizer.info.tracked["1.weight"] == ("8x8", "bfloat16", "native")


def test_tied_weights_count_once():
    zoo = Zoo()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(zoo.parameters(), lr=0.1), zoo, sinks=[], include="*ea*")
    zoo.head(zoo.tied(torch.ones(2, 8))).sum().backward()
    optimizer.step()
    assert optimizer.tracker.get_update_counts() == {"head.weight": 64}


# ---------------------------------------------------------------------- delegation


def test_closure_and_its_loss(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.LBFGS(model.parameters(), max_iter=4), model, sinks=[])
    calls = []

    def closure():
        calls.append(None)
        return backward(model, digits, 0)

    brute = BruteForce(model)
    brute.before()
    loss = optimizer.step(closure)
    assert isinstance(loss, torch.Tensor)
    assert len(calls) > 1
    brute.take_gradients()
    brute.after()
    brute.check(optimizer.tracker)


def test_param_groups_state_and_defaults_are_the_inner_ones(digits):
    model = digits_model()
    inner = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[])
    assert isinstance(optimizer, torch.optim.Optimizer)
    backward(model, digits, 0)
    optimizer.step()
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backward(model, digits, 1)
        optimizer.step()
        scheduler.step()
    assert inner.param_groups[0]["lr"] == 0.05


def test_hooks_run_once_with_the_wrapper(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt)))
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append(("save", opt)))
    optimizer.register_state_dict_post_hook(lambda opt, state: seen.append(("saved", opt)))
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: seen.append(("load", opt)))
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append(("loaded", opt)))
    backward(model, digits, 0)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [(name, optimizer) for name in ("pre", "post", "save", "saved", "load", "loaded")]


def test_step_hooks_see_the_wrapper_in_the_arguments_and_may_return_new_ones(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    seen, calls = [], []

    def replace(opt, args, kwargs):
        # As in torch's documentation: the same arguments plus a closure.
        seen.append(args)
        return (*args, lambda: calls.append(None)), kwargs

    optimizer.register_step_pre_hook(replace)
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(args[:1]))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(args[:1]))
    backward(model, digits, 0)
    optimizer.step()
    assert len(calls) == 1
    assert seen == [(optimizer,)] * 3

    optimizer.register_step_pre_hook(lambda opt, args, kwargs: "nonsense")
    with pytest.raises(RuntimeError, match="must return None or a tuple of"):
        optimizer.step()


class Unusual(torch.optim.SGD):
    """An optimizer whose methods have their own signatures."""

    def step(self, *, closure=None, grads=None):
        self.seen = closure, grads
        return super().step(closure)

    def zero_grad(self, set_to_none=False):
        super().zero_grad(set_to_none)

    def load_state_dict(self, state, strict=True):
        self.was_strict = strict
        return super().load_state_dict(state)


def test_methods_show_the_inner_optimizers_signatures(digits):
    model = digits_model()
    for inner in (torch.optim.AdamW(model.parameters()), Unusual(model.parameters(), 0.1)):
        optimizer = FlipTrackingOptimizer(inner, model, sinks=[])
        for twin in (optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            for name in DELEGATED:
                shown = getattr(twin, name)
                assert inspect.signature(shown) == inspect.signature(getattr(inner, name)), name
                assert shown == getattr(twin, name)
                assert shown.__self__ is twin
    for name in DELEGATED:
        expected = inspect.signature(getattr(torch.optim.Optimizer, name))
        assert inspect.signature(getattr(FlipTrackingOptimizer, name)) == expected

    optimizer = FlipTrackingOptimizer(Unusual(model.parameters(), 0.1, momentum=0.9), model, sinks=[])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    assert set(inspect.signature(optimizer.step).parameters) >= {"closure", "grads"}
    optimizer.step(closure=lambda: backward(model, digits, 0), grads="some")
    scheduler.step()
    assert optimizer.seen[1] == "some"
    assert sum(optimizer.tracker.get_update_counts().values()) > 0
    optimizer.zero_grad()
    assert not model[0].weight.grad.any()
    optimizer.zero_grad(set_to_none=True)
    assert model[0].weight.grad is None
    optimizer.step(closure=None)
    optimizer.step(None)  # left out, though this one takes none by position
    counts, state = optimizer.tracker.get_update_counts(), optimizer.state_dict()
    for call in (
        lambda o: o.load_state_dict(state, strict=False),
        lambda o: o.load_state_dict(strict=False, state=state),
    ):
        optimizer = FlipTrackingOptimizer(Unusual(model.parameters(), 0.1, momentum=0.9), model, sinks=[])
        call(optimizer)
        assert optimizer.tracker.get_update_counts() == counts
        assert optimizer.inner.was_strict is False


def test_methods_patched_or_overridden_on_the_inner_optimizer_are_used(digits):
    model = digits_model()
    inner = torch.optim.SGD(model.parameters(), 0.1)

    class Own(FlipTrackingOptimizer):
        def zero_grad(self, set_to_none=True, *, why=None):
            self.why = why
            super().zero_grad(set_to_none)

    optimizer = Own(inner, model, sinks=[])
    assert "why" in inspect.signature(optimizer.zero_grad).parameters
    backward(model, digits, 0)
    optimizer.zero_grad(why="to see")
    assert model[0].weight.grad is None
    assert optimizer.why == "to see"

    torch.optim.lr_scheduler.StepLR(inner, 1)  # on the inner one, whose step it patches
    assert list(inspect.signature(optimizer.step).parameters) == ["closure"]
    inner.step = functools.partial(inner.step, closure=None)
    assert "closure" in inspect.signature(optimizer.step).parameters
    backward(model, digits, 0)
    optimizer.step()
    assert sum(optimizer.tracker.get_update_counts().values()) > 0


def test_new_attributes_go_to_the_inner_optimizer(digits):
    class Tunable(torch.optim.SGD):
        def step(self, closure=None):
            if getattr(self, "brand_new", None):
                self.param_groups[0]["lr"] = self.brand_new
            return super().step(closure)

    bare_model, model = digits_model(), digits_model()
    bare = Tunable(bare_model.parameters(), 0.1)
    optimizer = FlipTrackingOptimizer(Tunable(model.parameters(), 0.1), model, sinks=[])
    for each, its in ((bare, bare_model), (optimizer, model)):
        each.brand_new = 0.5
        backward(its, digits, 0)
        each.step()
        assert each.brand_new == 0.5
    assert_same(dict(bare_model.state_dict()), dict(model.state_dict()))
    assert optimizer.inner.brand_new == 0.5
    del optimizer.brand_new
    assert not hasattr(optimizer.inner, "brand_new")
    with pytest.raises(AttributeError):
        del optimizer.brand_new

    # What a scheduler or user patches stays on the wrapper, and leads to the inner optimizer's method.
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for name in ("zero_grad", "state_dict", "load_state_dict", "add_param_group"):
        setattr(optimizer, name, getattr(optimizer, name))
    patched = {"step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"}
    assert set(vars(optimizer)) == {"inner", "_session"} | patched
    assert not patched & set(vars(optimizer.inner))


@pytest.mark.filterwarnings("error:weightflip")
def test_deepcopies_and_pickles_continue_on_their_own(digits, tmp_path):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters()), model, log_dir=tmp_path, log_every=1)
    backward(model, digits, 0)
    optimizer.step()
    for model_copy, twin in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        assert twin.tracker.get_flip_counts() == optimizer.tracker.get_flip_counts()
        brute = BruteForce(model_copy)
        before = twin.tracker.get_flip_counts()
        backward(model_copy, digits, 1)
        brute.before()
        with pytest.warns(UserWarning, match="another tracked optimizer also writes there"):
            twin.step()
        brute.after()
        flips = {name: count - before[name] for name, count in twin.tracker.get_flip_counts().items()}
        assert flips == brute.flips
        twin.close()
    optimizer.close()


def test_attributes_reach_the_right_object():
    model = digits_model()
    inner = torch.optim.AdamW(model.parameters(), fused=True)
    optimizer = FlipTrackingOptimizer(inner, model, sinks=[])
    optimizer.grad_scale = torch.ones(())
    assert "grad_scale" in vars(inner)
    del optimizer.grad_scale
    assert "grad_scale" not in vars(inner)
    assert optimizer._step_supports_amp_scaling is True
    optimizer.step = optimizer.step
    assert "step" in vars(optimizer)
    assert "step" not in vars(inner)
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "_tracking_that_is_not")
    assert isinstance(optimizer.tracker, WeightFlipTracker)
    assert repr(optimizer).startswith("FlipTrackingOptimizer(AdamW (")


def test_found_inf_steps_do_not_count(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=0.1, fused=True), model, sinks=[])
    brute = BruteForce(model)
    for step, found in enumerate([0.0, 1.0, 0.0]):
        backward(model, digits, step)
        optimizer.grad_scale, optimizer.found_inf = torch.ones(()), torch.tensor(found)
        brute.before()
        optimizer.step()
        if not found:
            brute.after()
        del optimizer.grad_scale, optimizer.found_inf
    brute.check(optimizer.tracker)
    assert optimizer.tracker.step_count == 2


def test_module_conversions_by_swapping_work(digits):
    # torch.utils.swap_tensors fails for tensors that have weak references.
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    backward(model, digits, 0)
    optimizer.step()
    optimizer.zero_grad()
    before = optimizer.tracker.get_flip_counts()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
        model.float()
        model.load_state_dict(digits_model(seed=3).state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    optimizer.step()
    assert optimizer.tracker.get_flip_counts() == before


def test_a_copy_without_the_model_remembers_the_quantizers(digits):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = digits_model()
    config = Float8LinearConfig.from_recipe_name("rowwise")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name == "0")
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    model.register_buffer("large", torch.zeros(100_000))
    model.activation = model[2].weight * 2  # no leaf: a model with it cannot be copied
    for twin in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        twin.param_groups[0]["params"][0].grad = torch.ones(48, 64)
        twin.step()
        quantizers = {name: row[2] for name, row in twin.info.tracked.items()}
        assert quantizers == {"0.weight": "float8_e4m3:row:pow2"}
        assert "high precision" in twin.info.skipped["2.weight"]
    assert len(pickle.dumps(optimizer)) < 100_000


def test_a_model_converted_after_wrapping_is_noticed_at_the_first_step(digits):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    config = Float8LinearConfig.from_recipe_name("rowwise")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name == "0")
    optimizer.step()
    assert optimizer.info.tracked["0.weight"][2] == "float8_e4m3:row:pow2"


def test_gradients_that_a_hook_removes_during_the_step_count(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    optimizer.register_step_post_hook(lambda opt, args, kwargs: opt.zero_grad())
    brute = BruteForce(model)
    backward(model, digits, 0)
    brute.before()
    optimizer.step()
    brute.after()
    brute.check(optimizer.tracker)
    optimizer.step()
    assert optimizer.tracker.get_update_counts() == brute.updates


# ---------------------------------------------------------------------- faults


def test_unreadable_counts_do_not_stop_a_run(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model, sinks=[])
    backward(model, digits, 0)
    optimizer.step()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 0.25
    for broken in ({}, {"calls": 1, "tracker": {"version": 2}}, {**state["flip_tracking"], "calls": None}):
        with pytest.warns(UserWarning, match="cannot be read and start from zero"):
            optimizer.load_state_dict({**state, "flip_tracking": broken})
        assert optimizer.param_groups[0]["lr"] == 0.25
    backward(model, digits, 1)
    optimizer.step()
    assert optimizer.tracker.step_count == 1


def test_a_fault_in_tracking_warns_once_and_training_continues(digits, monkeypatch):
    bare_model, model = digits_model(), digits_model()
    bare = torch.optim.SGD(bare_model.parameters(), lr=0.1)
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])

    def broken(weights):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(optimizer.tracker, "before_step", broken)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            backward(bare_model, digits, step)
            bare.step()
            backward(model, digits, step)
            optimizer.step()
    messages = [str(w.message) for w in caught if "weightflip" in str(w.message)]
    assert messages == ["weightflip: tracking has stopped, training continues: RuntimeError: out of luck"]
    assert_same(dict(bare_model.state_dict()), dict(model.state_dict()))


def test_a_fault_of_the_inner_step_reaches_the_user(digits):
    model = digits_model()
    optimizer = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, sinks=[])
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    backward(model, digits, 0)
    optimizer.step()
    assert optimizer.tracker.step_count == 1


# ---------------------------------------------------------------------- mistakes in the call


def sgd(model=None):
    return torch.optim.SGD((model or digits_model()).parameters(), lr=0.1)


def total(weight):
    return weight.sum()


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "the class SGD; build it first", lambda m: FlipTrackingOptimizer(torch.optim.SGD, m)),
        (
            TypeError,
            "expected a torch.optim.Optimizer such as .* got torch.nn.modules.container.Sequential, which lacks step, "
            "param_groups and state; pass the optimizer first",
            lambda m: FlipTrackingOptimizer(m),
        ),
        (
            TypeError,
            "got list, which lacks step, .* wrap each optimizer separately, and pass sinks=first to the others",
            lambda m: FlipTrackingOptimizer([sgd(m)], m),
        ),
        (
            TypeError,
            "got torch.optim.lr_scheduler.StepLR, which lacks zero_grad, .*in its attribute 'optimizer' instead",
            lambda m: FlipTrackingOptimizer(torch.optim.lr_scheduler.StepLR(sgd(m), 1), m),
        ),
        (
            TypeError,
            "already tracked, and its checkpoints hold one set of counts",
            lambda m: FlipTrackingOptimizer(FlipTrackingOptimizer(sgd(m), m, sinks=[]), m),
        ),
        (
            TypeError,
            "model= must be a torch.nn.Module or None, got str",
            lambda m: FlipTrackingOptimizer(sgd(m), "runs/1"),
        ),
        (
            ValueError,
            "unknown quantizer 'float8_e4m4'; did you mean 'float8_e4m3'",
            lambda m: FlipTrackingOptimizer(sgd(m), m, quantizer="float8_e4m4"),
        ),
        (
            ValueError,
            "2 to 16 bits, including the sign; got 'e9m9' with 19",
            lambda m: FlipTrackingOptimizer(sgd(m), m, quantizer="e9m9"),
        ),
        (TypeError, "got int", lambda m: FlipTrackingOptimizer(sgd(m), m, quantizer=8)),
        (
            ValueError,
            r"pattern '\*.attention.\*' in include= matches none of the 4 parameters: 0.weight, 0.bias",
            lambda m: FlipTrackingOptimizer(sgd(m), m, include="*.attention.*"),
        ),
        (ValueError, "in exclude= matches none", lambda m: FlipTrackingOptimizer(sgd(m), m, exclude=["1.*"])),
        (
            ValueError,
            "in quantizer= matches none",
            lambda m: FlipTrackingOptimizer(sgd(m), m, quantizer={"*": "e3m4", "lm_head*": "e2m1"}),
        ),
        (
            ValueError,
            "nothing to track among 2 parameters",
            lambda m: FlipTrackingOptimizer(torch.optim.SGD([m[0].bias, m[2].bias], lr=0.1), m, exclude="0.*"),
        ),
        (
            ValueError,
            "log_every= must be an integer of at least 1, got 0",
            lambda m: FlipTrackingOptimizer(sgd(m), m, log_every=0),
        ),
        (
            ValueError,
            "metrics= must be a sequence",
            lambda m: FlipTrackingOptimizer(sgd(m), m, metrics=["oscillations"]),
        ),
        (
            OSError,
            "is not writable.*choose another directory",
            lambda m: FlipTrackingOptimizer(sgd(m), m, log_dir="/dev/null/runs"),
        ),
        (
            OSError,
            "is not writable",
            lambda m: FlipTrackingOptimizer(sgd(m), m, sinks=["/proc/weightflip/flips.jsonl"]),
        ),
        (
            ValueError,
            r"must end in .jsonl or .csv, got 'flips.txt'",
            lambda m: FlipTrackingOptimizer(sgd(m), m, sinks=["flips.txt"]),
        ),
        (TypeError, "put it in brackets", lambda m: FlipTrackingOptimizer(sgd(m), m, sinks="flips.jsonl")),
        (TypeError, "got int", lambda m: FlipTrackingOptimizer(sgd(m), m, sinks=[3])),
        (
            ValueError,
            r"model= \(Sequential\) holds none of the optimizer's 4 parameters",
            lambda m: FlipTrackingOptimizer(sgd(m), digits_model()),
        ),
        (
            ValueError,
            r"shape \(48, 64\)\): the function 'total' must return a tensor of the weight's shape",
            lambda m: FlipTrackingOptimizer(sgd(m), m, quantizer=total),
        ),
        (
            ValueError,
            "log_dir= is the directory of the default sink",
            lambda m: FlipTrackingOptimizer(sgd(m), m, sinks=[], log_dir="runs"),
        ),
    ],
)
def test_mistakes_raise_at_construction(error, message, call):
    with pytest.raises(error, match=message):
        call(digits_model())


def test_weights_that_no_format_fits():
    zoo = Zoo()
    inner = torch.optim.SGD(zoo.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="parameter 'phase' cannot be tracked as requested: dtype complex64"):
        FlipTrackingOptimizer(inner, zoo, include=["body.weight", "phase"], sinks=[])
    with pytest.raises(ValueError, match=r"parameter 'empty' cannot be tracked as requested: empty"):
        FlipTrackingOptimizer(inner, zoo, include=["empty"], sinks=[])

    class Blocks:
        def encode(self, weight):
            if weight.size(-1) % 32:
                raise ValueError(f"last dimension {weight.size(-1)} is no multiple of 32")

    with pytest.raises(
        ValueError, match=r"parameter 'body.weight' .* shape \(8, 8\)\): last dimension 8 is no multiple"
    ):
        FlipTrackingOptimizer(inner, zoo, quantizer=Blocks(), sinks=[])


def e3m4_values(weight):
    # 2**4 * 31/16 is the largest number: exponent field 7, bias 3, and in a finite format all codes are numbers.
    scale = weight.detach().abs().max() / 31.0
    grid = torch.tensor(E3M4.values, dtype=torch.float64)
    middles = (grid[1:] + grid[:-1]) / 2
    return grid[torch.bucketize((weight.detach() / scale).double(), middles)]


def test_several_quantizers_on_the_same_weights(digits, tmp_path):
    model = digits_model()
    formats = {"float8_e4m3": float8_values, "bfloat16": bfloat16_values, "e3m4": e3m4_values}
    brutes = {name: BruteForce(model, values) for name, values in formats.items()}
    records = []
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters()),
        model,
        quantizer={"0.*": ["auto", "bfloat16", "e3m4", E3M4], "*": "bfloat16"},
        log_every=2,
        sinks=[SummaryWriter(tmp_path), records.append],
    )
    for step in range(6):
        if step == 3:
            model, optimizer, brutes = copy.deepcopy((model, optimizer, brutes))
        backward(model, digits, step)
        for brute in brutes.values():
            brute.before()
        optimizer.step()
        for brute in brutes.values():
            brute.after()
    optimizer.close()
    flips, stalled = optimizer.tracker.get_flip_counts(), optimizer.tracker.get_stall_counts()
    for name, brute in brutes.items():
        assert flips[f"0.weight@{name}"] == brute.flips["0.weight"] > 0
        assert stalled[f"0.weight@{name}"] == brute.stalled["0.weight"]
    assert flips["2.weight"] == brutes["bfloat16"].flips["2.weight"]
    assert set(flips) == {*(f"0.weight@{name}" for name in (*formats, "e3m4:none")), "2.weight"}

    models = records[0].models
    assert set(models) == {*formats, "e3m4:none", ""}
    assert models["e3m4"].weights == 64 * 48
    assert models[""].weights == 480
    lines = str(optimizer.tracker).splitlines()
    assert next(line.split()[:2] for line in lines if line.startswith("all")) == ["all", "float8_e4m3"]
    events = EventAccumulator(str(tmp_path)).Reload()
    # Sorted by step: event files of the same second are read in the order of their names, the 10th before the 9th.
    written = {event.step: event.value for event in events.Scalars("flips/cumulative_rate@float8_e4m3")}
    assert written[2] == pytest.approx(records[0].models["float8_e4m3"].cumulative_flip_rate)
    assert "flip_rate/0.weight@e3m4" in events.Tags()["scalars"]


def test_equal_quantizers_in_a_list_are_used_once():
    model = digits_model()
    for given in (["e3m4", "e3m4"], []):
        with pytest.raises(ValueError, match="a list of different quantizers, got"):
            FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, quantizer=given, sinks=[])
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model, quantizer=["auto", "float8_e4m3"], sinks=[]
    )
    # Names still contain the quantizer, so that layers for which "auto" finds another one can be distinguished.
    assert set(optimizer.info.tracked) == {"0.weight@float8_e4m3", "2.weight@float8_e4m3"}
    twin = pickle.loads(pickle.dumps(optimizer))
    backward(model, (torch.rand(64, 64), torch.randint(0, 10, (64,))), 0)
    twin.step()
    assert set(twin.info.tracked) == set(optimizer.info.tracked)


def test_quantizers_without_a_name_are_named_after_their_class():
    class Sign:
        def encode(self, weight):
            return Codes(weight.sign().to(torch.int8))

    model = digits_model()
    optimizer = FlipTrackingOptimizer(
        torch.optim.SGD(model.parameters(), 0.1), model, quantizer=[Sign(), "e3m4"], sinks=[]
    )
    assert "0.weight@Sign" in optimizer.info.tracked
    with pytest.raises(ValueError, match="give each object or function its own name"):
        FlipTrackingOptimizer(
            torch.optim.SGD(model.parameters(), 0.1), model, quantizer=[lambda w: w, lambda w: w.sign()], sinks=[]
        )


def test_counts_of_another_format_are_not_continued(digits):
    model = digits_model()
    first = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, quantizer="bfloat16", sinks=[])
    backward(model, digits, 0)
    first.step()
    second = FlipTrackingOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, quantizer="e3m4", sinks=[])
    second.load_state_dict(first.state_dict())
    brute = BruteForce(model, e3m4_values)
    brute.before()
    message = r"'0.weight' was tracked as bfloat16 and is now tracked as e3m4; its counts start from zero"
    with pytest.warns(UserWarning, match=message):
        second.step()
    brute.after()
    brute.check(second.tracker)
    assert second.tracker.step_count == 2
