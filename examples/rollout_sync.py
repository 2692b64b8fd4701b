"""Measure how much of a small GPT changes between two weight syncs to rollout engines; docs/rollouts.md has the table.

python examples/rollout_sync.py

A byte GPT is pretrained, as a model is before reinforcement learning. Then training continues at a small learning rate,
and the weights are published in bfloat16 every 1, 4 or 16 steps: once with float32 weights, which are rounded when they
are published, and once with bfloat16 weights. The objective stays next-byte prediction: the size of the steps decides
how much changes, not the objective.
"""

from __future__ import annotations

import argparse
import copy
from typing import NamedTuple

import torch
from bytes_gpt import GPT, compute_loss, get_windows, load_data
from torch import Tensor, nn
from tqdm import tqdm

from weightflip import FlipTrackingOptimizer

LEARNING_RATES = (1e-6, 1e-5, 1e-4)
SYNCS = (1, 4, 16)


class Row(NamedTuple):
    """What ``main`` returns for each training.

    Attributes:
        dtype: Of the weights that are trained.
        lr: The learning rate.
        every: Steps between two syncs.
        values: Numbers of the model over the second half of the steps: ``changed_fraction`` and delta sizes.
    """

    dtype: str
    lr: float
    every: int
    values: dict[str, float]


def train_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, data: Tensor, steps: int, args: argparse.Namespace
) -> None:
    for _ in range(steps):
        starts = torch.randint(len(data) - args.context, (args.batch,))
        optimizer.zero_grad()
        compute_loss(model, *get_windows(data, starts, args.context, args.device)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def pretrain(data: Tensor, args: argparse.Namespace) -> nn.Module:
    torch.manual_seed(args.seed)
    model = GPT(args.layers, args.width, args.heads, args.context).to(args.device)
    train_steps(model, torch.optim.AdamW(model.parameters(), lr=1e-3), data, args.pretrain, args)
    return model


def continue_training(pretrained: nn.Module, data: Tensor, row: Row, args: argparse.Namespace) -> Row:
    """Train a copy and compare what is published."""
    torch.manual_seed(args.seed)
    model = copy.deepcopy(pretrained).to(getattr(torch, row.dtype))
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=row.lr),
        model,
        quantizer="bfloat16",  # what the rollout engines compute with
        metrics=("flips", "sync"),
        sync_every=row.every,
        sinks=[],
    )
    # Adam's first updates all have the size of the learning rate, later ones do not: leave them out.
    train_steps(model, optimizer, data, args.steps // 2, args)
    optimizer.tracker.record()
    train_steps(model, optimizer, data, args.steps // 2, args)
    record = optimizer.tracker.record()
    assert record is not None
    return row._replace(values=record.model.values)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=64, help="bytes that the model sees")
    parser.add_argument("--batch", type=int, default=8, help="windows in a step")
    parser.add_argument("--pretrain", type=int, default=300, help="steps at a learning rate of 1e-3")
    parser.add_argument("--steps", type=int, default=64, help="per training; the second half is measured")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[Row]:
    args = parse_arguments(argv)
    data, _ = load_data()
    pretrained = pretrain(data, args)
    cases = [Row(dtype, lr, every, {}) for dtype in ("float32", "bfloat16") for lr in LEARNING_RATES for every in SYNCS]
    rows = [continue_training(pretrained, data, case, args) for case in tqdm(cases, desc="training", unit="run")]
    print("| weights | learning rate | sync every | changed | bits/weight, bound | bound | index + value | XOR, zstd |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype, lr, every, values in rows:
        zstd = values.get("delta_zstd_ratio")
        print(
            f"| {dtype} | {lr:.0e} | {every} | {values['changed_fraction']:.2%} | {values['delta_bits']:.2f} | "
            f"{values['delta_bound_ratio']:.1%} | {values['delta_index_ratio']:.1%} | "
            + ("- |" if zstd is None else f"{zstd:.1%} |")
        )
    return rows


if __name__ == "__main__":
    main()
