"""A layer that oscillates in int4 quantization-aware training, next to one in int8 that does so less.

python examples/stories/oscillating_int4.py
"""

from __future__ import annotations

import torch
from _story import Digits, arguments, make_model, print_table, save
from matplotlib import pyplot
from torch import nn
from torch.nn import functional as F
from torchao.quantization import quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

from weightflip import FlipRecord, FlipTrackingOptimizer, LayerRecord

BITS = {"0": torch.int8, "2": torch.int4}


def prepare(model: nn.Module) -> None:
    """Forward computes with rounded weights of the first two layers; float32 weights receive the updates."""
    for layer, dtype in BITS.items():
        config = QATConfig(
            weight_config=IntxFakeQuantizeConfig(dtype, group_size=32, is_symmetric=True), step="prepare"
        )
        quantize_(model, config, lambda module, name, layer=layer: name == layer)


def label(layer: LayerRecord) -> str:
    """Name and format of a layer."""
    return f"{layer.name}, {str(BITS[layer.name.removesuffix('.weight')]).removeprefix('torch.')}"


def main() -> None:
    args = arguments(__doc__, "oscillating_int4", epochs=20)
    digits = Digits()
    model = make_model()
    prepare(model)
    records: list[FlipRecord] = []
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        model,
        exclude="4.*",  # the last layer stays in float32
        metrics=("flips", "stalls", "oscillation", "coverage"),
        log_every=digits.steps(1),
        sinks=[str(args.log_dir / "flips.jsonl"), records.append],
    )
    # A cosine that ends at a tenth of the first learning rate.
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, digits.steps(args.epochs), eta_min=1e-4)
    for images, targets in digits.batches(args.epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(images), targets).backward()
        optimizer.step()
        schedule.step()
    optimizer.close()

    shown = ("flip_rate", "oscillation_ratio", "ever_flipped", "net_flipped")
    rows = []
    for at in sorted({0, len(records) // 2, len(records) - 1}):
        for layer in records[at].layers:
            numbers = [f"{layer.values[value]:.1%}" for value in shown]
            rows.append([label(layer), str(at + 1), *numbers])
    print_table(
        ["layer", "epoch", "flip rate", "oscillation", "ever flipped", "net flipped"],
        sorted(rows, key=lambda row: row[0]),
    )
    print(f"Test accuracy: {digits.accuracy(model):.1%}")

    figure, panels = pyplot.subplots(1, 2, figsize=(8, 3.3), layout="constrained")
    for axes, value in zip(panels, ("flip_rate", "oscillation_ratio"), strict=True):
        for i, layer in enumerate(records[0].layers):
            numbers = [record.layers[i].values[value] for record in records]
            axes.plot(range(1, len(records) + 1), numbers, marker=".", label=label(layer))
        axes.set(xlabel="epoch", ylabel=value.replace("_", " "), ylim=(0, None))
        axes.grid(alpha=0.3)
    panels[1].legend()
    save(figure, args.picture)


if __name__ == "__main__":
    main()
