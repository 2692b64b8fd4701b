"""The cost of tracking on an accelerator, compared with a fused AdamW step, a plain read, and a whole training step.

``python benchmarks/gpu.py`` prints a table in less than two minutes. Bare and tracked steps alternate. Times are
medians, from device events and from the host's clock. If both are equal, the host is the bottleneck.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightflip import FlipTrackingOptimizer

FORMATS = ("float8_e4m3", "float8_e4m3:row", "mxfp8_e4m3", "nvfp4", "int8", "native")
ONE = [(4096, 4096)]
BLOCKS = [(2304, 768), (768, 768), (3072, 768), (768, 3072)] * 12
SMALL = [(64, 64)] * 1000
SETS = {"4096 x 4096": ONE, "blocks of GPT-2 small": BLOCKS, "1,000 of 64 x 64": SMALL}
Row = dict[str, Any]


class Calls(TorchDispatchMode):
    """Counts torch operations. Views, which start no kernel, are counted separately."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.views = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.views += func.is_view
        return func(*args, **(kwargs or {}))


class Stopwatch:
    """Seconds that a call takes on the device and on the host."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def __call__(self, action: Callable[[], object]) -> tuple[float, float]:
        self.wait()
        if self.device.type == "cpu":
            start = time.perf_counter()
            action()
            elapsed = time.perf_counter() - start
            return elapsed, elapsed
        before, after = (torch.Event(self.device, enable_timing=True) for _ in range(2))
        before.record()
        start = time.perf_counter()
        action()
        on_host = time.perf_counter() - start
        after.record()
        self.wait()
        return before.elapsed_time(after) / 1e3, on_host

    def time_in_rounds(
        self, actions: Sequence[Callable[[], object]], budget: float, warmup: int = 3
    ) -> list[list[float]]:
        """Median seconds of each call on device and host. The calls alternate."""
        for _ in range(warmup):
            for action in actions:
                start = time.perf_counter()
                action()
                self.wait()
        turns = max(3, min(30, int(budget / max(1e-9, (time.perf_counter() - start) * len(actions)))))
        samples = [[self(action) for action in actions] for _ in range(turns)]
        return [[median(turn[i][j] for turn in samples) for j in range(2)] for i in range(len(actions))]


def adamw(shapes: Sequence[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> torch.optim.AdamW:
    parameters = []
    for shape in shapes:
        parameter = nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype))
        parameter.grad = torch.randn(shape, device=device).to(dtype)
        parameters.append(parameter)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True)


def launches(action: Callable[[], object], device: torch.device) -> tuple[int, float] | tuple[None, None]:
    """Kernels and copies of a call, and the seconds that the device spends on them; None if unknown."""
    if device.type != "cuda":
        return None, None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return (len(events), sum(event.device_time for event in events) / 1e6) if events else (None, None)


def read_seconds(nbytes: int, stopwatch: Stopwatch) -> float:
    buffer = torch.ones(max(1, nbytes // 4), device=stopwatch.device)
    ((seconds, _),) = stopwatch.time_in_rounds([buffer.sum], 0.1)
    return seconds


def step_costs(
    name: str, shapes: Sequence[tuple[int, ...]], backends: Sequence[str], formats: Sequence[str], device: torch.device
) -> list[Row]:
    stopwatch, rows = Stopwatch(device), []
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    for quantizer in formats:
        dtype = torch.bfloat16 if quantizer == "native" else torch.float32
        # Weights and gradients are read once, codes twice. With a scale, weights are read once more.
        code = 2 if quantizer == "native" else 1
        read = read_seconds(numel * (dtype.itemsize * (2 + (quantizer != "native")) + 2 * code), stopwatch)
        bare = adamw(shapes, device, dtype)
        for backend in backends:
            row: Row = {"weights": name, "format": quantizer, "backend": backend}
            try:
                tracked = FlipTrackingOptimizer(
                    adamw(shapes, device, dtype), quantizer=quantizer, backend=backend, sinks=[], log_every=10**9
                )
                (base, base_host), (whole, whole_host) = stopwatch.time_in_rounds([bare.step, tracked.step], 0.5)
                with Calls() as calls:
                    bare.step()
                of_bare = calls.all - calls.views
                with Calls() as calls:
                    tracked.step()
                kernels, busy = launches(tracked.step, device)
                kernels_bare, busy_bare = launches(bare.step, device)
            except Exception as error:
                rows.append({**row, "error": f"{type(error).__name__}: {error}"})
                continue
            row |= {
                "bare_ms": base * 1e3,
                "tracking_ms": (whole - base) * 1e3,
                "host_ms": (whole_host - base_host) * 1e3,
                "ratio": (whole - base) / base,
                "read_ms": read * 1e3,
                "calls": calls.all - calls.views - of_bare,
                "launches": None if kernels is None or kernels_bare is None else kernels - kernels_bare,
                "busy_ms": None if busy is None or busy_bare is None else (busy - busy_bare) * 1e3,
            }
            rows.append(row)
            tracked.close()
        del bare
    return rows


class Block(nn.Module):
    """Attention and two linear layers, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.first(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.second(x)), approximate="tanh"))


class GPT(nn.Module):
    """GPT-2 with given sizes. Input and output embeddings are tied."""

    def __init__(self, vocabulary: int, length: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def training(device: torch.device, backends: Sequence[str], tiny: bool) -> list[Row]:
    """A training step of GPT-2 small under bfloat16 autocast, batch 8 x 512, with default options except the format."""
    sizes = (256, 64, 64, 2, 2) if tiny else (50304, 512, 768, 12, 12)
    batch, length = (2, 32) if tiny else (8, 512)
    stopwatch = Stopwatch(device)

    def step_of(wrap: Callable[[torch.optim.Optimizer, nn.Module], torch.optim.Optimizer]) -> Callable[[], None]:
        torch.manual_seed(0)
        model = GPT(*sizes).to(device)
        optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), model)
        tokens = torch.randint(sizes[0], (batch, length + 1), device=device)

        def step() -> None:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                logits = model(tokens[:, :-1])
            nn.functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case, options in (
            *((f"{backend}, no logging point", {"backend": backend, "sinks": []}) for backend in backends),
            ("auto, TensorBoard every 10 steps", {"log_dir": folder}),
        ):
            opened: list[FlipTrackingOptimizer] = []

            def wrap(
                optimizer: torch.optim.Optimizer, model: nn.Module, options: Any = options, opened: Any = opened
            ) -> torch.optim.Optimizer:
                opened.append(FlipTrackingOptimizer(optimizer, model, quantizer="float8_e4m3", **options))
                return opened[0]

            steps = [step_of(lambda optimizer, model: optimizer), step_of(wrap)]
            if "log_dir" in options:
                # Ten steps at a time, with one logging point.
                steps = [lambda step=step: [step() for _ in range(10)] for step in steps]  # type: ignore[misc]
            (base, _), (whole, _) = stopwatch.time_in_rounds(steps, 3.0)
            n = 10 if "log_dir" in options else 1
            rows.append({"case": case, "step_ms": base * 1e3 / n, "tracking_ms": (whole - base) * 1e3 / n,
                         "share": (whole - base) / base})  # fmt: skip
            opened[0].close()
    return rows


def show(rows: Sequence[Row]) -> None:
    columns = ("bare_ms", "tracking_ms", "host_ms", "busy_ms", "ratio", "read_ms", "calls", "launches")
    print(f"\n{rows[0]['weights']}\n  {'':<30}" + "".join(f"{column:>13}" for column in columns))
    for row in rows:
        cells = [row.get(column) for column in columns]
        shown = "".join(f"{'' if c is None else f'{c:.3f}' if isinstance(c, float) else c:>13}" for c in cells)
        print(f"  {row['format'] + ', ' + row['backend']:<30}" + row.get("error", shown), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="default: torch's current accelerator")
    parser.add_argument("--backends", nargs="+", default=("eager", "auto"))
    parser.add_argument("--formats", nargs="+", default=FORMATS)
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--tiny", action="store_true", help="small weights: test that it runs, do not measure")
    parser.add_argument("--json", type=Path, help="output file for the numbers")
    options = parser.parse_args()
    device = torch.device(options.device) if options.device else torch.accelerator.current_accelerator(True)
    if device is None:
        parser.error("expected an accelerator, found none; name a device with --device=")

    about = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or str(device),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    start, rows = time.perf_counter(), []
    for name in options.sets:
        shapes = SETS[name]
        if options.tiny:
            shapes = [(64, 96)] * min(20, len(shapes))
        rows += (found := step_costs(name, shapes, options.backends, options.formats, device))
        show(found)
    shares = training(device, options.backends, options.tiny)
    print("\na training step of GPT-2 small, bfloat16 autocast, batch 8 x 512")
    for row in shares:
        print(f"  {row['case']:<34}{row['step_ms']:>9.2f} ms  + {row['tracking_ms']:.3f} ms  {row['share']:.2%}")
    print(f"took {time.perf_counter() - start:.0f} s")
    if options.json:
        options.json.write_text(json.dumps({"machine": about, "rows": rows, "training": shares}, indent=1) + "\n")


if __name__ == "__main__":
    main()
