"""Train a small GPT on the source of Python's standard library, byte by byte, and see which weights still move.

python examples/bytes_gpt.py                    # linear layers that really multiply in float8
python examples/bytes_gpt.py --quantizer e3m4   # a plain model, and what a format would see of it

Pure bfloat16 against float32, each seen as its stored bits: docs/report.md shows what the report says about the two.

small="--layers 8 --width 64 --context 64 --batch 8 --device cpu --quantizer native"
python examples/bytes_gpt.py $small --log-dir runs/gpt/float32
python examples/bytes_gpt.py $small --log-dir runs/gpt/bfloat16 --dtype bfloat16
weightflip report runs/gpt
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import NamedTuple

import torch
from _report import print_report
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from weightflip import FlipTrackingOptimizer, WeightFlipTracker

VOCABULARY = 256  # the values of a byte: no tokenizer


class Result(NamedTuple):
    """What ``main`` returns. Losses are nats per byte on the held-out files, before and after training."""

    first_loss: float
    last_loss: float
    tracker: WeightFlipTracker


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        batch, length, width = x.shape
        # Query, key and value, each (batch, heads, length, width / heads).
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(x.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """Attention, then a two-layer perceptron; each reads a normalized copy and adds to the residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.GELU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length, width) to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """Predicts the next byte."""

    def __init__(self, layers: int, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.byte_embedding = nn.Embedding(VOCABULARY, width)
        self.position_embedding = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.byte_embedding.weight  # tied, as in GPT-2
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # What is added to the residual stream starts smaller, so that the sum does not grow with the depth.
                into_residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if into_residual else 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Bytes, (batch, length), to logits of the byte that follows each, (batch, length, 256)."""
        positions = torch.arange(x.size(1), device=x.device)
        x = self.byte_embedding(x) + self.position_embedding(positions)
        return self.head(self.norm(self.blocks(x)))


def load_data() -> tuple[Tensor, Tensor]:
    """The standard library's source files, in alphabetical order; every tenth is held out for validation."""
    root = Path(os.__file__).parent
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
    files = sorted(path for path in root.glob("**/*.py") if not skipped & set(path.relative_to(root).parts))
    held_out = files[::10]
    train = [path for i, path in enumerate(files) if i % 10]
    return _read(train), _read(held_out)


def _read(files: list[Path]) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def get_windows(data: Tensor, starts: Tensor, context: int, device: str) -> tuple[Tensor, Tensor]:
    """Windows of the data, and the same windows shifted by one byte: the target of each byte is the next one."""
    windows = torch.stack([data[start : start + context + 1] for start in starts.tolist()]).long().to(device)
    return windows[:, :-1], windows[:, 1:]


def compute_loss(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model(inputs).flatten(0, 1).float(), targets.flatten())


def make_model(args: argparse.Namespace) -> nn.Module:
    model = GPT(args.layers, args.width, args.heads, args.context).to(args.device, getattr(torch, args.dtype))
    if args.quantizer != "auto":
        return model
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # On some processors oneDNN has only reference loops for products of float8, hundreds of times slower than torch's.
    torch.backends.mkldnn.set_flags(False)
    # GPUs before compute capability 8.9 have no float8 matrix multiplication; there torchao can emulate it.
    emulate = args.device.startswith("cuda") and torch.cuda.get_device_capability(args.device) < (8, 9)
    # The head shares its weight with the embedding and stays in high precision, as is usual.
    return convert_to_float8_training(
        model, module_filter_fn=lambda module, name: name != "head", config=Float8LinearConfig(emulate=emulate)
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--log-dir", default="runs/bytes_gpt", help="where the event files go")
    parser.add_argument(
        "--quantizer",
        default="auto",
        help="auto: linear layers in float8, through torchao; a name such as e3m4, bfloat16 or float8_e4m3:row: the "
        "model stays plain, and the flips are those that its weights would have in this format; native: the bits as "
        "stored",
    )
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=["float32", "bfloat16"],
        help="of the weights, and with them of AdamW's state; bfloat16: no float32 copy is kept anywhere",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="a multiple of 16, for float8, and of --heads")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=128, help="bytes that the model sees")
    parser.add_argument("--batch", type=int, default=16, help="windows in a step")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3, help="the highest learning rate; a cosine takes it to 0")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> Result:
    args = parse_arguments(argv)
    torch.manual_seed(args.seed)
    train, validation = load_data()
    model = make_model(args)

    # The one line that changes. Before, it was
    #     optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    # The embeddings, and with them the head, stay in high precision: there is nothing to track in them.
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=args.lr),
        model,
        quantizer=args.quantizer,
        exclude="*embedding.weight",
        log_dir=args.log_dir,
    )

    warmup = max(1, args.steps // 20)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 1 / warmup, total_iters=warmup),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=max(1, args.steps - warmup)),
        ],
        milestones=[warmup],
    )

    # The same windows before and after training, spread evenly over the held-out files.
    validation_starts = torch.linspace(0, len(validation) - args.context - 1, 64).long()
    validation_windows = get_windows(validation, validation_starts, args.context, args.device)
    with torch.no_grad():
        first_loss = compute_loss(model, *validation_windows).item()

    start = time.perf_counter()
    progress = tqdm(range(args.steps), desc="training", unit="step")
    for step in progress:
        starts = torch.randint(len(train) - args.context, (args.batch,))
        loss = compute_loss(model, *get_windows(train, starts, args.context, args.device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if step % 10 == 0:
            # Only now and then: reading the loss synchronizes with the GPU.
            progress.set_postfix(loss=f"{loss.item():.3f}")
    with torch.no_grad():
        last_loss = compute_loss(model, *validation_windows).item()
    seconds = time.perf_counter() - start
    optimizer.close()

    print(f"Validation loss: {first_loss:.3f} nats per byte before training, {last_loss:.3f} after")
    print(f"Training time:   {seconds:.1f} s for {args.steps} steps on {args.device}")
    print()
    print_report(optimizer, args.log_dir)
    return Result(first_loss, last_loss, optimizer.tracker)


if __name__ == "__main__":
    main()
