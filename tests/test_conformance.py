"""Every optimizer of torch, in every configuration of PyTorch's own test database, wrapped and bare.

``make conformance`` runs all of them; ``make test`` a part: each optimizer's first input with each of its
implementations. Left out, with the reason:

- configurations that the database itself gives for GPUs only (``capturable``): torch refuses them on CPU;
- the deep copy of LBFGS: a bare LBFGS loses its parameter list when it is copied, and its next step raises.
"""

from __future__ import annotations

import copy
import inspect
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from conftest import DELEGATED, BruteForce, assert_same
from torch import Tensor, nn
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

from weightflip import FlipTrackingOptimizer, track_flips


class Case(NamedTuple):
    info: OptimizerInfo
    kwargs: dict[str, Any]
    name: str
    first: bool


def cases() -> list[Case]:
    found = []
    for info in optim_db:
        # torch's own helper omits foreach on the CPU, although it works there.
        flags = [flag for flag in info.supported_impls if flag != "fused" or "cpu" in info.supports_fused_on]
        for i, given in enumerate(info.optim_inputs_func(device="cpu")):
            base = {**given.kwargs, **dict.fromkeys(flags, False)}
            for flag in [None, *flags]:
                kwargs = base if flag is None else {**base, flag: True}
                found.append(Case(info, kwargs, f"{info.optim_cls.__name__} {given.desc} {flag or 'plain'}", i == 0))
    return found


CASES = cases()


class Net(nn.Module):
    """Matrices, vectors, or a table with sparse gradients, depending on what the optimizer takes."""

    def __init__(self, info: OptimizerInfo) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.sparse = info.only_supports_sparse_grads
        if self.sparse:
            self.table = nn.Embedding(40, 12, sparse=True)
        else:
            bias = info.optim_cls is not torch.optim.Muon
            self.first = nn.Linear(12, 20, bias=bias)
            self.second = nn.Linear(20, 6, bias=bias)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        if self.sparse:
            return self.table(torch.randint(0, 40, (16,), generator=generator)).square().mean()
        x = torch.randn(16, 12, generator=generator)
        return (self.second(torch.tanh(self.first(x))) - x[:, :6]).square().mean()


def build(case: Case, net: Net, wrap) -> torch.optim.Optimizer:
    kwargs = copy.deepcopy(case.kwargs)  # tensor learning rates are written in place by schedulers
    named = list(net.named_parameters())
    # LBFGS takes only one param group.
    several = case.info.optim_cls is not torch.optim.LBFGS
    groups = [{"params": [p]} for _, p in named] if several else [p for _, p in named]
    return wrap(case.info.optim_cls(groups, **kwargs), net)


def train(case: Case, wrap, steps: int = 5) -> list[Any]:
    """Train with a scheduler, interrupted by a save and load and by a deep copy; return everything that could differ.

    Args:
        case: What to run.
        wrap: From optimizer and network to the optimizer that is used.
        steps: In each of three parts.
    """
    net = Net(case.info)
    optimizer = build(case, net, wrap)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.8)
    result: list[Any] = []
    for part in range(3):
        brute = BruteForce(net)
        counted_before = counts(optimizer)
        for step in range(part * steps, (part + 1) * steps):

            def closure(step: int = step, net: Net = net, optimizer: torch.optim.Optimizer = optimizer) -> Tensor:
                with torch.enable_grad():
                    optimizer.zero_grad()
                    loss = net.loss(step)
                    loss.backward()
                return loss

            brute.before()
            result.append(step_once(case, net, optimizer, closure))
            brute.take_gradients()
            brute.after()
            scheduler.step()
        if counted_before is not None:
            check(brute, counts(optimizer), counted_before)
        result.append({name: p.detach().clone() for name, p in net.named_parameters()})
        result.append(bare_state(optimizer))
        if part == 0:
            weights, state, schedule = net.state_dict(), optimizer.state_dict(), scheduler.state_dict()
            weights, state = copy.deepcopy((weights, state))
            net = Net(case.info)
            net.load_state_dict(weights)
            optimizer = build(case, net, wrap)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.8)
            scheduler.load_state_dict(schedule)
            optimizer.load_state_dict(state)
        elif part == 1 and case.info.optim_cls is not torch.optim.LBFGS:
            schedule = scheduler.state_dict()
            net, optimizer = copy.deepcopy((net, optimizer))
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.8)
            scheduler.load_state_dict(schedule)
    return result


def step_once(case: Case, net: Net, optimizer: torch.optim.Optimizer, closure) -> Any:
    if case.info.step_requires_closure:
        return optimizer.step(closure).detach()
    # Half of the steps without a closure, as in most scripts, and half with one.
    loss = closure()
    if int(loss.detach().item() * 1e6) % 2:
        assert optimizer.step() is None
        return loss.detach()
    optimizer.zero_grad()
    return optimizer.step(closure).detach()


def counts(optimizer: torch.optim.Optimizer) -> tuple[dict[str, int], ...] | None:
    tracker = getattr(optimizer, "tracker", None)
    if tracker is None:
        return None
    return tracker.get_flip_counts(), tracker.get_update_counts(), tracker.get_stall_counts()


def check(brute: BruteForce, now, before) -> None:
    for expected, after, earlier in zip((brute.flips, brute.updates, brute.stalled), now, before, strict=True):
        assert {name: count - earlier.get(name, 0) for name, count in after.items()} == expected
    assert sum(brute.updates.values()) > 0


def bare_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {key: value for key, value in copy.deepcopy(optimizer.state_dict()).items() if key != "flip_tracking"}


def tracked(optimizer: torch.optim.Optimizer, net: nn.Module) -> FlipTrackingOptimizer:
    return FlipTrackingOptimizer(optimizer, net, sinks=[])


def hooked(optimizer: torch.optim.Optimizer, net: nn.Module) -> torch.optim.Optimizer:
    # An attribute that copies do not have, just as they do not have the hooks.
    optimizer.tracker = track_flips(optimizer, net, sinks=[]).tracker
    return optimizer


def conforms(case: Case, wrap) -> None:
    if case.kwargs.get("differentiable"):
        assert_same(differentiable(case, lambda o, net: o), differentiable(case, wrap))
    else:
        assert_same(train(case, lambda o, net: o), train(case, wrap))


def differentiable(case: Case, wrap) -> list[Tensor]:
    """Make a differentiable step: parameters are not leaves, and autograd differentiates the result."""
    torch.manual_seed(0)
    leaf = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 5, dtype=torch.float64)
    result = []
    weight = leaf.clone()
    weight.grad = grad
    optimizer = wrap(case.info.optim_cls([weight], **copy.deepcopy(case.kwargs)), None)
    # Only one step: the second step of some optimizers overwrites what autograd saved for the first.
    optimizer.step()
    (slope,) = torch.autograd.grad(weight.square().sum(), leaf)
    result += [weight.detach().clone(), slope]
    return result


FAST = [case for case in CASES if case.first]


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_first_input_of_each_optimizer(case):
    conforms(case, tracked)


@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_first_input_of_each_optimizer_in_the_hook_form(case):
    conforms(case, hooked)


@pytest.mark.conformance
@pytest.mark.parametrize("form", [tracked, hooked], ids=["wrapper", "hooks"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_input_of_each_optimizer(case, form):
    conforms(case, form)


def replaced_parameters_that_stay_alive(case: Case, wrap) -> list[str]:
    """Train two steps, replace all parameters, and return the names of old ones that are still alive."""
    net = Net(case.info)
    optimizer = build(case, net, wrap)
    for step in range(2):
        step_once(case, net, optimizer, lambda step=step: optimizer.zero_grad() or backward_of(net, step))
    old = {name: weakref.ref(parameter.untyped_storage()) for name, parameter in net.named_parameters()}
    for module in net.children():
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(parameter.detach().clone()))
    new = list(net.parameters())
    for group in optimizer.param_groups:
        group["params"] = [new.pop(0) for _ in group["params"]]
    optimizer.state.clear()
    del parameter
    return [name for name, reference in old.items() if reference() is not None]


def backward_of(net: Net, step: int) -> Tensor:
    with torch.enable_grad():
        loss = net.loss(step)
        loss.backward()
    return loss


@pytest.mark.conformance
@pytest.mark.parametrize("form", [tracked, hooked], ids=["wrapper", "hooks"])
@pytest.mark.parametrize(
    "case", [case for case in FAST if not case.kwargs.get("differentiable")], ids=lambda case: case.name
)
def test_replaced_parameters_are_freed_as_by_the_bare_optimizer(case, form):
    bare = replaced_parameters_that_stay_alive(case, lambda optimizer, net: optimizer)
    # LBFGS keeps its own list.
    assert bool(bare) == (case.info.optim_cls is torch.optim.LBFGS)
    assert replaced_parameters_that_stay_alive(case, form) == bare


@pytest.mark.conformance
@pytest.mark.parametrize("form", [tracked, hooked], ids=["wrapper", "hooks"])
@pytest.mark.parametrize("case", FAST, ids=lambda case: case.name)
def test_each_wrapped_optimizer_looks_like_the_bare_one(case, form):
    """The signatures of its methods, the arguments of hooks, and where new attributes go."""
    if case.kwargs.get("differentiable"):
        case = case._replace(kwargs={**case.kwargs, "differentiable": False})
    net = Net(case.info)
    inner = build(case, net, lambda optimizer, net: optimizer)
    signatures = {name: inspect.signature(getattr(inner, name)) for name in DELEGATED}
    optimizer = form(inner, net)
    assert {name: inspect.signature(getattr(optimizer, name)) for name in DELEGATED} == signatures

    seen = []
    optimizer.register_step_pre_hook(lambda *given: seen.append(given))
    optimizer.register_step_pre_hook(lambda o, args, kwargs: (args, {**kwargs, "closure": closure}))
    optimizer.register_step_post_hook(lambda *given: seen.append(given))
    inner.register_step_pre_hook(lambda o, *_: setattr(o, "sum", getattr(o, "brand_new", 0) + 1))

    def closure():
        optimizer.zero_grad()
        return backward_of(net, 0)

    optimizer.brand_new = 41
    # LBFGS and others that need a closure get it from the hook.
    loss = optimizer.step(**({"closure": closure} if case.info.step_requires_closure else {}))
    assert torch.equal(loss.detach(), Net(case.info).loss(0).detach())
    assert [(o is optimizer, args[0] is optimizer, len(args)) for o, args, _ in seen] == [(True, True, 1)] * 2
    assert (optimizer.sum, inner.sum, vars(inner)["brand_new"]) == (42, 42, 41)
    del optimizer.brand_new
    assert not hasattr(inner, "brand_new")
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is not None for p in net.parameters())
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in net.parameters())


def test_the_database_has_the_expected_optimizers():
    names = {case.info.optim_cls.__name__ for case in CASES}
    missing = {name for name in torch.optim.__all__ if isinstance(getattr(torch.optim, name), type)} - names
    assert missing == {"Optimizer"}
    assert len(CASES) >= 180


class NaiveWrapper(torch.optim.Optimizer):
    """A typical faulty wrapper: copies the param groups and drops the closure's loss."""

    def __init__(self, optimizer):
        super().__init__([{**group} for group in optimizer.param_groups], optimizer.defaults)
        self.optimizer = optimizer

    def step(self, closure=None):
        self.optimizer.step(closure)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("case", [case for case in FAST if "plain" in case.name], ids=lambda case: case.name)
def test_a_naive_wrapper_fails(case):
    with pytest.raises((AssertionError, AttributeError)):
        conforms(case, lambda optimizer, net: NaiveWrapper(optimizer))


def takes_vectors(case: Case) -> bool:
    is_other = case.info.only_supports_sparse_grads or case.info.optim_cls is torch.optim.Muon
    return not (is_other or case.kwargs.get("differentiable"))


def takes_meta(case: Case) -> bool:
    # LBFGS keeps a list of old parameters and Adagrad their state, and fused implementations refuse the meta device.
    keeps = case.info.optim_cls in (torch.optim.LBFGS, torch.optim.Adagrad)
    return takes_vectors(case) and not (keeps or case.kwargs.get("fused"))


def trained(case: Case, net: Net, optimizer: torch.optim.Optimizer, brute: BruteForce | None = None) -> list[Any]:
    result: list[Any] = []
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            return backward_of(net, step)

        if brute is not None:
            brute.before()
        result.append(step_once(case, net, optimizer, closure))
        if brute is not None:
            brute.take_gradients()
            brute.after()
    return [*result, *(p.detach().clone() for p in net.parameters()), bare_state(optimizer)]


@pytest.mark.conformance
@pytest.mark.parametrize("form", [tracked, hooked], ids=["wrapper", "hooks"])
@pytest.mark.parametrize("case", [case for case in FAST if takes_vectors(case)], ids=lambda case: case.name)
def test_vectors_only(case, form):
    results = []
    for wrap in (lambda optimizer, net: optimizer, form):
        net = Net(case.info)
        vectors = [p for p in net.parameters() if p.ndim == 1]
        optimizer = wrap(case.info.optim_cls(vectors, **copy.deepcopy(case.kwargs)), net)
        results.append(trained(case, net, optimizer))
    assert_same(*results)
    assert optimizer.tracker.get_flip_counts() == {}
    assert optimizer.tracker.step_count == 4


@pytest.mark.conformance
@pytest.mark.parametrize("form", [tracked, hooked], ids=["wrapper", "hooks"])
@pytest.mark.parametrize("case", [case for case in FAST if takes_meta(case)], ids=lambda case: case.name)
def test_parameters_on_the_meta_device_that_get_data_later(case, form):
    results = []
    for wrap in (lambda optimizer, net: optimizer, form):
        with torch.device("meta"):
            net = Net(case.info)
        optimizer, real = build(case, net, wrap), Net(case.info)
        for module, other in zip(net.children(), real.children(), strict=True):
            for name, parameter in list(other.named_parameters()):
                setattr(module, name, parameter)
        new = list(net.parameters())
        for group in optimizer.param_groups:
            group["params"] = [new.pop(0) for _ in group["params"]]
        brute = BruteForce(net)
        results.append(trained(case, net, optimizer, brute))
    assert_same(*results)
    brute.check(optimizer.tracker)
    assert sum(brute.updates.values()) > 0
