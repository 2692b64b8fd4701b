"""Train on handwritten digits with Hugging Face Accelerate, and see how many weights move in float8.

python examples/accelerate_digits.py
"""

from __future__ import annotations

import argparse

import torch
from _report import print_report
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from weightflip import FlipTrackingOptimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--log-dir", default="runs/accelerate_digits", help="where the event files go")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=32, help="images in a micro-batch; two of them make a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="the first learning rate; a cosine takes it to 0")
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    args = parser.parse_args()

    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    loader = DataLoader(data, args.batch, shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    accelerator = Accelerator(gradient_accumulation_steps=2, mixed_precision=args.mixed_precision)

    # The one line that changes. Before, it was
    #     optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    optimizer = FlipTrackingOptimizer(torch.optim.AdamW(model.parameters(), lr=args.lr), model, log_dir=args.log_dir)

    # One step for two micro-batches, and one for what is left over at the end of an epoch.
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.epochs * ((len(loader) + 1) // 2))
    # prepare() wraps once more: `optimizer` stays the one with the tracker, the loop steps the prepared one.
    model, prepared, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    losses = []
    for _ in range(args.epochs):
        loss_sum = 0.0
        for images, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(images), targets)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                prepared.step()
                scheduler.step()
                prepared.zero_grad()
            loss_sum += loss.item()
        losses.append(loss_sum / len(loader))
    optimizer.close()

    print(f"Training loss: {losses[0]:.4f} in the first epoch, {losses[-1]:.4f} in the last")
    print()
    print_report(optimizer, args.log_dir)


if __name__ == "__main__":
    main()
