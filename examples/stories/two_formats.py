"""Two formats on one training: what float8 and MXFP4 would see of a small GPT on the source of Python's library.

python examples/stories/two_formats.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from _story import arguments, print_table, save
from matplotlib import pyplot

from weightflip import FlipRecord, FlipTrackingOptimizer

sys.path.append(str(Path(__file__).parents[1]))
from bytes_gpt import GPT, compute_loss, get_windows, load_data

FORMATS = ["float8_e4m3", "mxfp4"]
CONTEXT, BATCH, STEPS_OF_EPOCH = 64, 16, 20


def main() -> None:
    args = arguments(__doc__, "two_formats", epochs=15)
    text, held_out = load_data()
    model = GPT(layers=2, width=64, heads=4, context=CONTEXT)
    steps = args.epochs * STEPS_OF_EPOCH
    records: list[FlipRecord] = []
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        model,
        quantizer=FORMATS,
        exclude="*embedding.weight",
        log_every=STEPS_OF_EPOCH,
        sinks=[str(args.log_dir / "flips.jsonl"), records.append],
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,))
        optimizer.zero_grad()
        compute_loss(model, *get_windows(text, starts, CONTEXT, "cpu")).backward()
        optimizer.step()
        schedule.step()
    optimizer.close()

    middle = len(records) // 2
    rows = []
    for name in FORMATS:
        total = records[-1].models[name].total
        of_steps = [records[at].models[name] for at in (0, middle, -1)]
        rows.append(
            [name, f"{total.flips / records[-1].models[name].weights:.2f}"]
            + [f"{model.stall_ratio:.2%}" for model in of_steps]
        )
    heads = [f"stall ratio, step {records[at].step}" for at in (0, middle, -1)]
    print_table(["format", "flips/weight", *heads], rows)
    starts = torch.linspace(0, len(held_out) - CONTEXT - 1, 64).long()
    with torch.no_grad():
        loss = compute_loss(model, *get_windows(held_out, starts, CONTEXT, "cpu"))
    print(f"Loss on held-out files: {loss:.2f} nats per byte")

    figure, axes = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for name in FORMATS:
        numbers = [record.models[name].flip_rate for record in records]
        axes.plot([record.step for record in records], numbers, marker=".", label=name)
    axes.set(xlabel="step", ylabel="flip rate", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, args.picture)


if __name__ == "__main__":
    main()
