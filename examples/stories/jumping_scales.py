"""MXFP4 scales that jump: a few power-of-two scales change, and cause much of the flips.

python examples/stories/jumping_scales.py
"""

from __future__ import annotations

import torch
from _story import Digits, arguments, make_model, print_table, save
from matplotlib import pyplot
from torch.nn import functional as F

from weightflip import FlipRecord, FlipTrackingOptimizer

LAYER = "2.weight"


def main() -> None:
    args = arguments(__doc__, "jumping_scales", epochs=20)
    digits = Digits()
    model = make_model()
    records: list[FlipRecord] = []
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        model,
        quantizer="mxfp4",
        include=LAYER,
        metrics=("flips", "stalls", "scale"),
        log_every=digits.steps(1),
        sinks=[str(args.log_dir / "flips.jsonl"), records.append],
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, digits.steps(args.epochs), eta_min=1e-4)
    for images, targets in digits.batches(args.epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        schedule.step()
    optimizer.close()

    layers = [record.layers[0] for record in records]
    rows = []
    for at in sorted({0, len(layers) // 4, len(layers) // 2, len(layers) - 1}):
        layer = layers[at]
        rows.append(
            [
                str(at + 1),
                f"{layer.scale_change_rate:.3%}",
                f"{layer.flip_rate:.2%}",
                f"{1 - layer.values['weight_driven_fraction']:.0%}",
            ]
        )
    print_table(["epoch", "scales that change in a step", "flip rate", "scale-driven flips"], rows)

    epochs = range(1, len(layers) + 1)
    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(7, 4.5), layout="constrained")
    upper.bar(epochs, [1 - layer.values["weight_driven_fraction"] for layer in layers], color="C1")
    upper.set(ylabel="flips that a scale caused")
    lower.bar(epochs, [layer.scale_change_rate for layer in layers])
    lower.set(ylabel="scales that change in a step", yscale="log", xlabel="epoch", xticks=epochs)
    save(figure, args.picture)


if __name__ == "__main__":
    main()
