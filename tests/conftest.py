"""Shared by several test files: real data, and brute-force counts made without the library."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from processes import end_servers, multiply_float8_without_onednn
from torch import Tensor, nn

from weightflip import FlipTrackingOptimizer, track_flips
from weightflip.selection import Plan, QuantizerSources, Selection, make_plan, name_parameters

multiply_float8_without_onednn()

# `make test` distributes whole files to its two workers in this order: the longest first, so that neither waits for the
# other at the end. While one runs the first file, the other compiles the CPU kernel in the second, once for all files.
LONGEST_FIRST = (
    "test_distributed.py",
    "test_batch.py",
    "test_trainer.py",
    "test_interrupts.py",
    "test_examples.py",
    "test_drop_in.py",
    "test_lightning.py",
    "test_flat_parameters.py",
    "test_memory.py",
    "test_block.py",
    "test_cpu_kernel.py",
    "test_report.py",
    "test_accelerate.py",
    "test_wandb.py",
    "test_conformance.py",
    "test_metric_groups.py",
    "test_checkpoint.py",
    "test_torchao_subclasses.py",
    "test_torchao_qat.py",
)

# The wrapper exposes these with the inner optimizer's signatures.
DELEGATED = (
    "step",
    "zero_grad",
    "add_param_group",
    "state_dict",
    "load_state_dict",
    "register_step_pre_hook",
    "register_step_post_hook",
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    positions = {name: position for position, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: positions.get(item.path.name, len(positions)))


def pytest_sessionfinish() -> None:
    end_servers()


@pytest.fixture(scope="session")
def digits() -> tuple[Tensor, Tensor]:
    """All 1797 handwritten digits of scikit-learn: float32 (1797, 64) in [0, 1], and their labels."""
    # Imported here because it takes as long as importing torch, and processes started by tests also import this file.
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(labels)


@contextmanager
def case(*names: object) -> Iterator[None]:
    """Name one row of a table that a test loops over, so that a failure shows it, as an id does for a parameter."""
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        raise AssertionError(f"in the case {', '.join(str(name) for name in names)}: {error}") from error


def digits_model(seed: int = 0, width: int = 48) -> nn.Sequential:
    """A model with two matrices and two biases."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def backward(model: nn.Module, digits: tuple[Tensor, Tensor], step: int, batch: int = 64) -> Tensor:
    """Compute the gradients of one batch. Consecutive steps take consecutive batches of the data."""
    images, labels = digits
    at = torch.arange(step * batch, (step + 1) * batch) % len(images)
    model.zero_grad()
    loss = nn.functional.cross_entropy(model(images[at]), labels[at])
    loss.backward()
    return loss


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_outliers(weight: Tensor) -> Tensor:
    """Make every 500th weight so large that it alone determines the scale it shares with others."""
    weight.view(-1)[::500] *= 1e4
    return weight


def float8_values(weight: Tensor) -> Tensor:
    """The weight in tensorwise float8_e4m3, in the most direct form."""
    weight = weight.detach().float()
    scale = (448.0 / weight.abs().max().double().clamp(min=1e-12)).float()
    return (weight * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()


class BruteForce:
    """Counts flips, updates and stalls of a model's matrices by cloning everything."""

    def __init__(self, model: nn.Module, values=float8_values) -> None:
        self.parameters = {name: p for name, p in model.named_parameters() if p.ndim >= 2}
        self.values = values
        self.flips = dict.fromkeys(self.parameters, 0)
        self.updates = dict.fromkeys(self.parameters, 0)
        self.stalled = dict.fromkeys(self.parameters, 0)

    def before(self) -> None:
        self.old = {name: self.values(p.detach().clone()) for name, p in self.parameters.items()}
        self.take_gradients()

    def take_gradients(self) -> None:
        """Take the gradients; called again after a step with a closure, which computes them."""
        self.grads = {
            name: torch.zeros_like(p) if p.grad is None else p.grad.detach().clone().to_dense()
            for name, p in self.parameters.items()
        }

    def after(self) -> None:
        for name, p in self.parameters.items():
            new = self.values(p.detach().clone())
            flipped = (new != self.old[name]) & ~(new.isnan() & self.old[name].isnan())
            updated = self.grads[name] != 0
            self.flips[name] += int(flipped.sum())
            self.updates[name] += int(updated.sum())
            self.stalled[name] += int((updated & ~flipped).sum())

    def check(self, tracker) -> None:
        assert tracker.get_flip_counts() == self.flips
        assert tracker.get_update_counts() == self.updates
        assert tracker.get_stall_counts() == self.stalled


def assert_same(a, b) -> None:
    """Assert equality bit for bit, through dictionaries and lists."""
    assert type(a) is type(b)
    if hasattr(a, "__tensor_flatten__") and type(a) not in (Tensor, nn.Parameter):
        # A subclass composed of other tensors, such as torchao's quantized optimizer state.
        for name in a.__tensor_flatten__()[0]:
            assert_same(getattr(a, name), getattr(b, name))
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        assert a == b


def by_wrapper(optimizer, model):
    wrapped = FlipTrackingOptimizer(optimizer, model, sinks=[])
    return wrapped, wrapped.tracker


def by_hooks(optimizer, model):
    return optimizer, track_flips(optimizer, model, sinks=[]).tracker


FORMS = {"wrapper": by_wrapper, "hooks": by_hooks}


def watched(optimizer: torch.optim.Optimizer, model: nn.Module) -> BruteForce:
    """Count by brute force around every training step of the innermost optimizer, whoever calls it."""
    brute = BruteForce(model)

    def after(optimizer, args, kwargs):
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not found_inf:
            brute.take_gradients()
            brute.after()

    optimizer.register_step_pre_hook(lambda optimizer, args, kwargs: brute.before())
    optimizer.register_step_post_hook(after)
    return brute


def same_as_bare(form, make: Callable, train: Callable, digits, build: Callable = digits_model) -> None:
    """Train bare and tracked: results, parameters and optimizer state must be equal, counts must equal brute force.

    Args:
        form: One of ``FORMS``.
        make: Creates the bare optimizer from parameters.
        train: Called with model, optimizer and digits.
        digits: The data.
        build: Creates the model, always with the same weights.
    """
    results = []
    for tracked in (False, True):
        model = build()
        torch.manual_seed(1)
        inner = make(model.parameters())
        optimizer, tracker, brute = inner, None, watched(inner, model)
        if tracked:
            optimizer, tracker = form(inner, model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trace = train(model, optimizer, digits)
        results.append((trace, dict(model.state_dict()), inner.state_dict()["state"]))
        if tracker is not None:
            brute.check(tracker)
            assert sum(brute.flips.values()) > 0
    assert_same(*results)


def assert_trained_alike(models: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], digits) -> None:
    """Train each model with its optimizer: parameters and random numbers must be equal after each step."""
    for step in range(5):
        states = []
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            backward(model, digits, step)
            optimizer.step()
            states.append((model.state_dict(), torch.get_rng_state()))
        assert_same(*states)


def plan_of(model: nn.Module, *, may_be_empty: bool = False, **options) -> Plan:
    """Plan how to track the weights of a model, with exactly one quantizer each."""
    parameters = name_parameters([{"params": list(model.parameters())}], model)
    plan = make_plan(parameters, QuantizerSources(model), Selection(**options), may_be_empty=may_be_empty)
    return replace(plan, tracked={name: quantizer for name, (quantizer,) in plan.tracked.items()})
