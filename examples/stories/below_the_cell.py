"""A learning-rate schedule that ends below the cell: in the last third of the training, the weights stand still.

python examples/stories/below_the_cell.py
"""

from __future__ import annotations

import torch
from _story import Digits, arguments, make_model, print_table, save
from matplotlib import pyplot
from torch.nn import functional as F

from weightflip import FlipRecord, FlipTrackingOptimizer, compute_flip_rate, encode

FIRST_LR = 1e-3
RUNS = {
    "bfloat16, to 1e-6": (torch.bfloat16, 1e-6),
    "float32, to 1e-6": (torch.float32, 1e-6),
    "bfloat16, to 1e-4": (torch.bfloat16, 1e-4),
}
"""The weights' dtype, and the last learning rate."""


def bits(model: torch.nn.Module) -> list[torch.Tensor]:
    """The stored bits of all matrices."""
    return [encode(parameter.detach(), "native").ordinals for parameter in model.parameters() if parameter.ndim == 2]


def train(name: str, digits: Digits, epochs: int, sink: str) -> tuple[list[FlipRecord], list[float], float]:
    """Records and losses of each epoch, and the fraction of the weights that the last third of them changed."""
    dtype, last_lr = RUNS[name]
    model = make_model().to(dtype)
    records: list[FlipRecord] = []
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=FIRST_LR),
        model,
        quantizer="native",  # the stored bits
        log_every=digits.steps(1),
        sinks=[sink, records.append],
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, (last_lr / FIRST_LR) ** (1 / epochs))
    losses = []
    for epoch in range(epochs):
        if epoch == epochs - epochs // 3:
            before = bits(model)
        for images, targets in digits.batches(1):
            optimizer.zero_grad()
            F.cross_entropy(model(images.to(dtype)), targets).backward()
            optimizer.step()
        schedule.step()
        losses.append(digits.loss(model))
    optimizer.close()
    changed = compute_flip_rate(torch.cat([b.flatten() for b in before]), torch.cat([b.flatten() for b in bits(model)]))
    return records, losses, changed


def main() -> None:
    args = arguments(__doc__, "below_the_cell", epochs=30)
    digits = Digits()
    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(7, 4.5), layout="constrained")
    for name, (_, last_lr) in RUNS.items():
        torch.manual_seed(args.seed)
        folder = args.log_dir / name.replace(", ", "_").replace(" ", "_")
        records, losses, changed = train(name, digits, args.epochs, str(folder / "flips.jsonl"))
        print(f"Weights in {name.replace('to', f'learning rate from {FIRST_LR:g} to')}")
        rows = []
        for epoch in sorted({0, args.epochs // 3, 2 * args.epochs // 3, args.epochs - 1}):
            lr = FIRST_LR * (last_lr / FIRST_LR) ** (epoch / args.epochs)
            model = records[epoch].model
            rows.append(
                [
                    str(epoch + 1),
                    f"{lr:.1e}",
                    f"{model.flip_rate:.2%}",
                    f"{model.stall_ratio:.2%}",
                    f"{losses[epoch]:.4f}",
                ]
            )
        print_table(["epoch", "learning rate", "flip rate", "stall ratio", "training loss"], rows)
        print(f"Weights that the last third of the epochs changed: {changed:.1%}\n")
        epochs = range(1, args.epochs + 1)
        upper.plot(epochs, [record.model.flip_rate for record in records], marker=".", label=name)
        lower.plot(epochs, losses, marker=".", label=name)
    upper.set(ylabel="flip rate", yscale="log")
    lower.set(ylabel="training loss", xlabel="epoch", yscale="log")
    upper.legend(title=f"weights, and learning rate from {FIRST_LR:g}", fontsize="small")
    for axes in (upper, lower):
        axes.grid(alpha=0.3)
    save(figure, args.picture)


if __name__ == "__main__":
    main()
