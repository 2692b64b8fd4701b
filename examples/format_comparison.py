"""See the same training through several number formats at once: which updates each of them would have lost.

python examples/format_comparison.py
"""

from __future__ import annotations

import argparse

import matplotlib
import torch
from digits_float8 import Classifier, load_data
from matplotlib import pyplot
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from weightflip import FlipRecord, FlipTrackingOptimizer

FORMATS = ["bfloat16", "float8_e4m3", "float8_e5m2", "e3m4", "mxfp6_e2m3", "mxfp4", "nvfp4", "int4:g32", "ternary"]


def main(argv: list[str] | None = None) -> list[FlipRecord]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--log-dir", default="runs/format_comparison", help="where the event files go")
    parser.add_argument("--formats", nargs="+", default=FORMATS, help="names as in docs/formats.md")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    matplotlib.use("agg")
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    train, _ = load_data(args.seed)
    loader = DataLoader(train, 64, shuffle=True, drop_last=True)
    model = Classifier()

    records: list[FlipRecord] = []
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=args.lr),
        model,
        quantizer=args.formats,
        exclude="head.*",
        log_every=len(loader),
        sinks=[SummaryWriter(args.log_dir), records.append],
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * len(loader))
    for _ in tqdm(range(args.epochs), desc="training", unit="epoch"):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
            scheduler.step()
    optimizer.close()

    print(f"{'format':<16}{'flips/weight':>14}{'stall ratio':>14}{'first epoch':>14}{'last epoch':>14}")
    for name in args.formats:
        total, first, last = (records[-1].models[name].total, records[0].models[name], records[-1].models[name])
        weights = records[-1].models[name].weights
        print(
            f"{name:<16}{total.flips / weights:>14.2f}{total.stall_ratio:>14.1%}"
            f"{first.stall_ratio:>14.1%}{last.stall_ratio:>14.1%}"
        )

    epochs = range(1, len(records) + 1)
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name in args.formats:
        axes.plot(epochs, [record.models[name].stall_ratio for record in records], marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="fraction of updates lost to rounding", ylim=(0, 1))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(f"{args.log_dir}/stall_ratio.png", dpi=120)
    pyplot.close(figure)
    print(f"Plot: {args.log_dir}/stall_ratio.png")
    print(f"Open the event files: tensorboard --logdir {args.log_dir}")
    return records


if __name__ == "__main__":
    main()
