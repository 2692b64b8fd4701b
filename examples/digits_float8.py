"""Train a small float8 network on handwritten digits, and see how many of its weights still move.

python examples/digits_float8.py
"""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

import torch
from _report import print_report
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchao.float8 import convert_to_float8_training
from tqdm import tqdm

from weightflip import FlipTrackingOptimizer, WeightFlipTracker


class Result(NamedTuple):
    """What ``main`` returns. Losses are means over the first and the last epoch, the accuracy is of the test images."""

    first_loss: float
    last_loss: float
    accuracy: float
    tracker: WeightFlipTracker


class Classifier(nn.Module):
    """Three linear layers; sizes of float8 matrix multiplications are multiples of 16."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Linear(64, 256)
        self.hidden = nn.Linear(256, 256)
        self.head = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Pixels, (batch, 64), to logits of the ten digits, (batch, 10)."""
        return self.head(F.relu(self.hidden(F.relu(self.input(images)))))


def load_data(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """1797 images of 8x8 pixels, in [0, 1]; a fifth of them, drawn at random, is kept for the test."""
    pixels, labels = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels / 16, labels, test_size=0.2, stratify=labels, random_state=seed
    )
    return (
        TensorDataset(torch.tensor(train_x, dtype=torch.float32), torch.tensor(train_y)),
        TensorDataset(torch.tensor(test_x, dtype=torch.float32), torch.tensor(test_y)),
    )


@torch.no_grad()
def evaluate(model: nn.Module, test: TensorDataset) -> float:
    """Fraction of the test images that are recognized."""
    images, labels = test.tensors
    return (model(images).argmax(dim=1) == labels).float().mean().item()


def main(argv: list[str] | None = None) -> Result:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--log-dir", default="runs/digits_float8", help="where the event files go")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="images in a step, a multiple of 16")
    parser.add_argument("--lr", type=float, default=1e-3, help="the first learning rate; a cosine takes it to 0")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    # The matrices are too small to share among threads: on a busy machine the threads mostly wait for each other.
    torch.set_num_threads(1)
    # On some processors oneDNN has only reference loops for products of float8, hundreds of times slower than torch's.
    torch.backends.mkldnn.set_flags(False)
    torch.manual_seed(args.seed)
    train, test = load_data(args.seed)
    # The last, smaller batch is left out: float8 matrix multiplications also need multiples of 16 there.
    loader = DataLoader(train, args.batch, shuffle=True, drop_last=True)

    # The head has 10 outputs, not a multiple of 16: it stays in high precision, and there is nothing to track in it.
    model = convert_to_float8_training(Classifier(), module_filter_fn=lambda module, name: name != "head")

    # The one line that changes. Before, it was
    #     optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=args.lr), model, log_dir=args.log_dir, exclude="head.weight"
    )

    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * len(loader))

    losses, stall_ratios = [], []
    stalled, updates = 0, 0
    start = time.perf_counter()
    progress = tqdm(range(args.epochs), desc="training", unit="epoch")
    for _ in progress:
        loss_sum = 0.0
        for images, labels in loader:
            loss = F.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            loss_sum += loss.item()
        losses.append(loss_sum / len(loader))

        # The tracker counts from the start; subtracting the previous counts gives those of this epoch.
        stalled_before, updates_before = stalled, updates
        stalled = sum(optimizer.tracker.get_stall_counts().values())
        updates = sum(optimizer.tracker.get_update_counts().values())
        stall_ratios.append((stalled - stalled_before) / (updates - updates_before))

        accuracy = evaluate(model, test)
        progress.set_postfix(loss=f"{losses[-1]:.4f}", accuracy=f"{accuracy:.1%}", stalled=f"{stall_ratios[-1]:.1%}")
    seconds = time.perf_counter() - start
    optimizer.close()

    print(f"Training loss: {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last")
    print(f"Test accuracy: {accuracy:.1%}")
    print(f"Stall ratio:   {stall_ratios[0]:.1%} in the first epoch, {stall_ratios[-1]:.1%} in the last")
    print(f"Training time: {seconds:.1f} s")
    print()
    print_report(optimizer, args.log_dir)
    return Result(losses[0], losses[-1], accuracy, optimizer.tracker)


if __name__ == "__main__":
    main()
