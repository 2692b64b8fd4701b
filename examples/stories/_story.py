"""What the stories share: handwritten digits, a small network, a table of numbers, and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

matplotlib.use("agg")


class Digits:
    """1797 images of 8x8 pixels in [0, 1], of which every fifth is kept for the test."""

    def __init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        images, targets = torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels)
        kept = torch.arange(len(targets)) % 5 == 0
        self.train, self.test = (images[~kept], targets[~kept]), (images[kept], targets[kept])

    def batches(self, epochs: int, size: int = 64) -> Iterator[tuple[Tensor, Tensor]]:
        """Shuffled batches of the training images; a smaller rest at the end of an epoch is left out."""
        images, targets = self.train
        for _ in range(epochs):
            for batch in torch.randperm(len(images)).split(size):
                if len(batch) == size:
                    yield images[batch], targets[batch]

    def steps(self, epochs: int, size: int = 64) -> int:
        """How many batches that makes."""
        return epochs * (len(self.train[0]) // size)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """Fraction of the test images that are recognized."""
        images, targets = self.test
        dtype = next(model.parameters()).dtype
        return (model(images.to(dtype)).argmax(1) == targets).float().mean().item()

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean cross-entropy on the training images."""
        images, targets = self.train
        dtype = next(model.parameters()).dtype
        return nn.functional.cross_entropy(model(images.to(dtype)).float(), targets).item()


def make_model(width: int = 256) -> nn.Sequential:
    """Three linear layers: ``0``, ``2`` and ``4``."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


def arguments(doc: str, name: str, epochs: int) -> argparse.Namespace:
    """The command line of a story; one thread, since these tensors are too small to share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--epochs", type=int, default=epochs)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/stories") / name, help="where records are written")
    parser.add_argument("--picture", type=Path, help="where the picture is written (default: picture.png in --log-dir)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.picture = args.picture or args.log_dir / "picture.png"
    args.log_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    return args


def print_table(heads: list[str], rows: list[list[str]]) -> None:
    """The first column to the left, all others to the right."""
    lines = [heads, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    for line in lines:
        cells = [
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def save(figure: Figure, path: Path) -> None:
    """Write the picture and say where it is."""
    figure.savefig(path, dpi=100)
    pyplot.close(figure)
    print(f"\nPicture: {path}")
