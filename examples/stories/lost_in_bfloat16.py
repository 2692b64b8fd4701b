"""Updates lost in pure bfloat16: the same training with bfloat16 weights and with float32 weights.

python examples/stories/lost_in_bfloat16.py
"""

from __future__ import annotations

import torch
from _story import Digits, arguments, make_model, print_table, save
from matplotlib import pyplot
from torch.nn import functional as F

from weightflip import FlipRecord, FlipTrackingOptimizer


def train(dtype: torch.dtype, digits: Digits, epochs: int, sink: str) -> tuple[torch.nn.Module, list[FlipRecord]]:
    model = make_model().to(dtype)
    records: list[FlipRecord] = []
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        model,
        quantizer="native",  # the stored bits: did the step change the parameter at all?
        log_every=digits.steps(1),
        sinks=[sink, records.append],
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, digits.steps(epochs))
    for images, targets in digits.batches(epochs):
        optimizer.zero_grad()
        F.cross_entropy(model(images.to(dtype)), targets).backward()
        optimizer.step()
        schedule.step()
    optimizer.close()
    return model, records


def main() -> None:
    args = arguments(__doc__, "lost_in_bfloat16", epochs=30)
    digits = Digits()
    rows, runs = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(args.seed)
        name = str(dtype).removeprefix("torch.")
        model, records = train(dtype, digits, args.epochs, str(args.log_dir / name / "flips.jsonl"))
        runs[name] = records
        of_epoch = [records[0], records[len(records) // 2], records[-1]]
        rows.append(
            [
                name,
                *(f"{record.model.stall_ratio:.2%}" for record in of_epoch),
                f"{records[-1].model.total.stall_ratio:.2%}",
                f"{digits.loss(model):.4f}",
                f"{digits.accuracy(model):.1%}",
            ]
        )
    print_table(["weights", "lost, first epoch", "middle", "last", "in all", "training loss", "accuracy"], rows)

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name, records in runs.items():
        axes.plot(range(1, len(records) + 1), [record.model.stall_ratio for record in records], marker=".", label=name)
    axes.set(xlabel="epoch", ylabel="updates that changed no bit", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, args.picture)


if __name__ == "__main__":
    main()
