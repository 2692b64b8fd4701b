"""What the examples print after training: what the quantized weights did, layer by layer, and where to see more."""

from __future__ import annotations

from weightflip import FlipTrackingOptimizer


def print_report(optimizer: FlipTrackingOptimizer, log_dir: str) -> None:
    print(optimizer.tracker)
    print()
    print("A flip: a step changed the number that a weight is rounded to. flips/weight counts them over all steps.")
    print("Stall ratio: of the weights that had a gradient in a step, the share that did not flip in it.")
    print()
    print(f"Event files: {log_dir}")
    print(f"Open them:   tensorboard --logdir {log_dir}   (or `make tensorboard` for everything under runs/)")
