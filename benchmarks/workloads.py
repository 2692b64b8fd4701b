"""Workloads: sets of weights with an optimizer, the byte GPT, and flip counting as in research code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ONE = [(4096, 4096)]
SMALL = [(64, 64)] * 1000
# The parameters of GPT-2 small: 148 tensors, 124,439,808 weights. Those with one dimension are not tracked.
GPT2 = [
    (50257, 768),
    (1024, 768),
    *[
        shape
        for _ in range(12)
        for shape in ((768,), (768,), (768, 2304), (2304,), (768, 768), (768,),
                      (768,), (768,), (768, 3072), (3072,), (3072, 768), (768,))
    ],
    (768,),
    (768,),
]  # fmt: skip


class Weights:
    """Gradients shared by several optimizers, each with its own parameters."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self.shapes = shapes
        self.gradients = [torch.randn(shape) for shape in shapes]

    @property
    def numel(self) -> int:
        return sum(gradient.numel() for gradient in self.gradients)

    @property
    def numel_tracked(self) -> int:
        return sum(gradient.numel() for gradient in self.gradients if gradient.ndim > 1)

    def adamw(self) -> torch.optim.AdamW:
        """A fused AdamW over new parameters, so that steps of other optimizers are not seen as external writes."""
        parameters = []
        for gradient in self.gradients:
            parameter = torch.nn.Parameter(torch.randn(gradient.shape) * 0.02)
            parameter.grad = gradient
            parameters.append(parameter)
        return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def naive_step(optimizer: torch.optim.Optimizer) -> list[tuple[int, int, int]]:
    """Flip counting as in research code: clone and quantize before and after the step, compare, read the numbers."""

    def quantized(weight: Tensor) -> Tensor:
        scale = (448.0 / weight.abs().max().double().clamp(min=1e-12)).float()
        return (weight * scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()

    weights = [p for group in optimizer.param_groups for p in group["params"] if p.ndim > 1]
    before = [quantized(weight.detach().clone()) for weight in weights]
    optimizer.step()
    counts = []
    for weight, codes in zip(weights, before, strict=True):
        flipped = quantized(weight.detach().clone()) != codes
        updated = weight.grad != 0
        stalled = updated & ~flipped
        counts.append((int(flipped.sum().item()), int(updated.sum().item()), int(stalled.sum().item())))
    return counts


def byte_gpt(
    wrap: Callable[[torch.optim.Optimizer, torch.nn.Module], torch.optim.Optimizer],
) -> tuple[Callable[[], None], torch.optim.Optimizer]:
    """A training step of ``examples/bytes_gpt.py`` at its default size, and its optimizer as ``wrap`` returns it."""
    examples = str(Path(__file__).parent.parent / "examples")
    if examples not in sys.path:
        sys.path.append(examples)
    import bytes_gpt

    args = bytes_gpt.parse_arguments(["--device=cpu"])
    torch.manual_seed(0)
    data = torch.randint(256, (1 << 20,), dtype=torch.uint8)
    model: Any = bytes_gpt.make_model(args)
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=args.lr), model)

    def step() -> None:
        starts = torch.randint(len(data) - args.context, (args.batch,))
        windows = bytes_gpt.get_windows(data, starts, args.context, args.device)
        loss = bytes_gpt.compute_loss(model, *windows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step, optimizer
