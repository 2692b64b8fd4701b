"""Train on handwritten digits with Lightning, and see how many weights move in float8.

python examples/lightning_digits.py
"""

from __future__ import annotations

import argparse

import lightning
import torch
from _report import print_report
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from weightflip import FlipTrackingOptimizer


class Digits(lightning.LightningModule):
    """A classifier of 8x8 pixels."""

    def __init__(self, lr: float, steps: int, log_dir: str) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        self.lr, self.steps, self.log_dir = lr, steps, log_dir

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        images, targets = batch
        loss = nn.functional.cross_entropy(self.model(images), targets)
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> dict:
        # The one line that changes. Before, it was
        #     optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        optimizer = FlipTrackingOptimizer(torch.optim.AdamW(self.parameters(), lr=self.lr), self, log_dir=self.log_dir)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=self.steps)
        # The name keeps the curve of LearningRateMonitor what it was: without it, the optimizer's class is in it.
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr-AdamW"},
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--log-dir", default="runs/lightning_digits", help="where the event files go")
    parser.add_argument("--steps", type=int, default=300, help="of the optimizer; each takes two batches")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3, help="the first learning rate; a cosine takes it to 0")
    args = parser.parse_args()

    lightning.seed_everything(0)
    pixels, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(pixels / 16, dtype=torch.float32), torch.tensor(labels))
    module = Digits(args.lr, args.steps, args.log_dir)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=args.steps,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(args.log_dir, name="lightning", version=0),
        callbacks=[LearningRateMonitor()],
        enable_checkpointing=False,
    )
    trainer.fit(module, DataLoader(data, args.batch, shuffle=True))

    optimizer = trainer.optimizers[0]
    optimizer.close()
    print(f"Training loss: {trainer.callback_metrics['loss']:.4f} in the last epoch")
    print()
    print_report(optimizer, args.log_dir)


if __name__ == "__main__":
    main()
