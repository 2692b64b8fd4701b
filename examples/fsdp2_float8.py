"""Train a small float8 network on handwritten digits with FSDP2, on several processes.

torchrun --standalone --nproc-per-node=2 examples/fsdp2_float8.py

Runs on GPUs (NCCL) where there is one for each process, else on the CPU (gloo).
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from sklearn.datasets import load_digits
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torchao.float8 import Float8LinearConfig, convert_to_float8_training, precompute_float8_dynamic_scale_for_fsdp

from weightflip import FlipTrackingOptimizer


def connect() -> torch.device:
    """Join the other processes of torchrun; the device of this one."""
    local_rank, local_world = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() < local_world:
        dist.init_process_group("gloo")
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    dist.init_process_group("nccl")
    return torch.device("cuda", local_rank)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--log-dir", default="runs/fsdp2_float8", help="where the event files go")
    parser.add_argument("--checkpoint", help="a folder to save model, optimizer and counts in, at the end")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="images in a step on each process, a multiple of 16")
    parser.add_argument("--lr", type=float, default=1e-3)
    args = parser.parse_args()

    device = connect()
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    images, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
    images, labels = (images / 16).float().to(device), labels.to(device)

    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
    # Weights are cast to float8, one byte each, before they are gathered; with gloo, which gathers no float8, after it.
    config = Float8LinearConfig(enable_fsdp_float8_all_gather=device.type == "cuda")
    convert_to_float8_training(model, config=config, module_filter_fn=lambda module, name: name != "4")
    mesh = init_device_mesh(device.type, (world,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # The one line that changes. Before, it was
    #     optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    optimizer = FlipTrackingOptimizer(
        torch.optim.AdamW(model.parameters(), lr=args.lr), model, log_dir=args.log_dir, exclude="4.weight"
    )

    losses = []
    for step in range(args.steps):
        # Each process has its own images.
        at = torch.arange(args.batch, device=device) + (step * world + rank) * args.batch
        at %= len(images)
        loss = F.cross_entropy(model(images[at]), labels[at])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        precompute_float8_dynamic_scale_for_fsdp(model)
        losses.append(loss.detach())

    # On every process: the last numbers are summed, and the first process writes them.
    optimizer.close()
    if args.checkpoint:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state, "flips": optimizer.tracker}
        dcp.save(state, checkpoint_id=args.checkpoint)

    mean_losses = torch.stack([losses[0], losses[-1]])
    dist.all_reduce(mean_losses)
    first, last = (mean_losses / world).tolist()
    if rank == 0:
        print(f"{world} processes on {device.type}")
        print(f"Training loss: {first:.4f} in the first step, {last:.4f} in the last")
        print(optimizer.tracker)
        print(f"Event files: {args.log_dir}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
