"""Four trainings of one network: healthy, with a stuck layer, oscillating, and bfloat16 without master weights.

python examples/gallery.py

docs/interpretation.md explains what they look like.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import matplotlib
import torch
from digits_float8 import Classifier, evaluate, load_data
from matplotlib import pyplot
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from tqdm import tqdm

from weightflip import FlipRecord, FlipTrackingOptimizer
from weightflip.sinks import TensorBoardSink

METRICS = ("flips", "stalls", "oscillation", "coverage", "travel", "range")


def healthy(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """float32 weights, as a float8 forward pass would see them."""
    return torch.optim.AdamW(model.parameters(), lr=lr)


def stuck(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """The same, but one layer has a learning rate a thousand times smaller."""
    slow = [model.hidden.weight]
    others = [parameter for parameter in model.parameters() if parameter is not model.hidden.weight]
    return torch.optim.AdamW([{"params": others}, {"params": slow, "lr": lr / 1000}], lr=lr)


def oscillating(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Quantization-aware training with 3 bits, and a constant learning rate."""
    weights = IntxFakeQuantizeConfig(torch.int3, group_size=32, is_symmetric=True)
    quantize_(model, QATConfig(weight_config=weights, step="prepare"), lambda module, name: name in ("input", "hidden"))
    return torch.optim.SGD(model.parameters(), lr=100 * lr, momentum=0.9)


def bfloat16(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Weights in bfloat16, updated in place: no float32 copy in which small updates accumulate."""
    return torch.optim.AdamW(model.to(torch.bfloat16).parameters(), lr=lr)


RUNS = {"healthy": healthy, "stuck": stuck, "oscillating": oscillating, "bfloat16": bfloat16}


def train(name: str, log_dir: Path, epochs: int, lr: float, seed: int) -> tuple[list[FlipRecord], float]:
    """One run: one record per epoch, and its accuracy on the test images."""
    torch.manual_seed(seed)
    train_data, test_data = load_data(seed)
    model = Classifier()
    inner = RUNS[name](model, lr)
    dtype = model.head.weight.dtype
    loader = DataLoader(train_data, 64, shuffle=True, drop_last=True)
    records: list[FlipRecord] = []
    optimizer = FlipTrackingOptimizer(
        inner,
        model,
        exclude="head.*",
        metrics=METRICS,
        log_every=len(loader),
        sinks=[TensorBoardSink(str(log_dir / name)), str(log_dir / name / "flips.jsonl"), records.append],
    )
    steps = epochs * len(loader)

    def factor(step: int) -> float:
        """A cosine from the first learning rate to a tenth of it."""
        return 1.0 if name == "oscillating" else 0.55 + 0.45 * math.cos(math.pi * step / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for _ in tqdm(range(epochs), desc=f"training {name}", unit="epoch"):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(dtype)), labels).backward()
            optimizer.step()
            schedule.step()
    optimizer.close()
    test_data.tensors = (test_data.tensors[0].to(dtype), test_data.tensors[1])
    return records, evaluate(model, test_data)


def plot(runs: dict[str, list[FlipRecord]], file: Path) -> None:
    """One column per run, one row per number, one line per layer."""
    shown = {"flip_rate": "flip rate", "stall_ratio": "stall ratio", "oscillation_ratio": "oscillation ratio"}
    figure, grid = pyplot.subplots(
        len(shown),
        len(runs),
        figsize=(2.6 * len(runs), 6),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for column, (name, records) in zip(grid.T, runs.items(), strict=True):
        column[0].set_title(name)
        column[-1].set_xlabel("epoch")
        for axes, value in zip(column, shown, strict=True):
            for i, layer in enumerate(records[0].layers):
                values = [record.layers[i].values.get(value, math.nan) for record in records]
                axes.plot(range(1, len(records) + 1), values, label=layer.name)
            axes.set_yscale("log" if value == "flip_rate" else "linear")
            axes.grid(alpha=0.3)
    for axes, label in zip(grid[:, 0], shown.values(), strict=True):
        axes.set_ylabel(label)
    grid[-1, 0].legend(fontsize="small")
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> dict[str, list[FlipRecord]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--log-dir", type=Path, default=Path("runs/gallery"), help="where the runs go")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    matplotlib.use("agg")
    torch.set_num_threads(1)
    runs = {}
    for name in args.runs:
        runs[name], accuracy = train(name, args.log_dir, args.epochs, args.lr, args.seed)
        print(f"{name}: test accuracy {accuracy:.1%}; in the last epoch")
        for layer in runs[name][-1].layers:
            print(f"  {layer.name}: " + ", ".join(f"{of} {value:.4f}" for of, value in layer.values.items()))
    plot(runs, args.log_dir / "gallery.png")
    print(f"Plot: {args.log_dir}/gallery.png")
    print(f"Open the event files: tensorboard --logdir {args.log_dir}")
    return runs


if __name__ == "__main__":
    main()
