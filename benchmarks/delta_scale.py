"""Time and peak memory of ``weightflip diff`` and ``apply`` on large checkpoints.

    python benchmarks/delta_scale.py --gigabytes 10

creates two sharded checkpoints of that size in a temporary directory. They hold bfloat16 matrices in which some weights
moved to the next number up or down. Each command runs in its own process. Everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

_ROW = 4096
_SHARD = 10
_PROGRAM = "import sys; from weightflip.report.cli import main; sys.exit(main(sys.argv[1:]))"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=10.0, help="size of each checkpoint")
    parser.add_argument("--changed", type=float, default=0.01, help="fraction of weights that differ")
    parser.add_argument("--quantizer", action="append", default=[], help="also time diff with this format")
    parser.add_argument("--directory", help="parent of the temporary directory")
    args = parser.parse_args()
    needed = int(args.gigabytes * 1e9 * (3 + 2 * args.changed) * 1.05)
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        free = shutil.disk_usage(directory).free
        if free < needed:
            sys.exit(f"{directory} has {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f}; give less --gigabytes")
        root = Path(directory)
        make(root, int(args.gigabytes * 1e9), args.changed)
        print(
            f"2 x {args.gigabytes:g} GB of bfloat16, {args.changed:.2%} of the weights differ, {os.cpu_count()} cores"
        )
        print("| command | seconds | CPU seconds | most memory, MB |\n|---|---|---|---|")
        old, new, delta, made = (str(root / name) for name in ("old", "new", "delta.safetensors", "made"))
        measure("diff OLD NEW", ["diff", old, new])
        for name in args.quantizer:
            measure(f"diff OLD NEW --quantizer {name}", ["diff", old, new, "--quantizer", name])
        measure("diff OLD NEW --write DELTA", ["diff", old, new, "--write", delta])
        measure("apply OLD DELTA MADE", ["apply", old, delta, made])
        print(f"the delta has {os.path.getsize(delta) / 1e6:,.1f} MB")
        subprocess.run(["diff", "-r", new, made], check=True)


def make(root: Path, nbytes: int, changed: float) -> None:
    """Create two sharded checkpoints, matrix by matrix."""
    for name in ("old", "new"):
        (root / name).mkdir()
    random = np.random.default_rng(0)
    # Rotations of one block of weights: drawing 10 GB of random numbers would take longer than the measurements.
    block = (random.standard_normal(1 << 24, np.float32) * 0.02).view(np.uint32) >> 16
    block = block.astype(np.uint16)
    rows = 4 * _ROW
    matrices = max(1, nbytes // (2 * rows * _ROW))
    weight_map = {}
    for first in range(0, matrices, _SHARD):
        names = [f"layers.{at}.weight" for at in range(first, min(first + _SHARD, matrices))]
        file = f"model-{first // _SHARD:05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        size = 2 * rows * _ROW
        header = {
            name: {"dtype": "BF16", "shape": [rows, _ROW], "data_offsets": [at * size, (at + 1) * size]}
            for at, name in enumerate(names)
        }
        text = json.dumps(header).encode()
        with open(root / "old" / file, "wb") as old, open(root / "new" / file, "wb") as new:
            for each in (old, new):
                each.write(len(text).to_bytes(8, "little") + text)
            for _ in names:
                write_matrix(old, new, block, changed, random, rows * _ROW)
    for name in ("old", "new"):
        index = {"metadata": {}, "weight_map": weight_map}
        (root / name / "model.safetensors.index.json").write_text(json.dumps(index))


def write_matrix(old, new, block, changed, random, weights) -> None:
    for _ in range(weights // len(block)):
        part = np.roll(block, int(random.integers(len(block))))
        old.write(part.data)
        at = random.integers(0, len(part), int(changed * len(part)))
        part[at] += random.choice(np.array([1, -1 & 0xFFFF], np.uint16), len(at))
        new.write(part.data)


def measure(title: str, arguments: list[str]) -> None:
    """Run the program and print a row of the table."""
    begin = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, *arguments], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        sys.exit(f"{title} failed")
    assert isinstance(usage, resource.struct_rusage)
    cpu = usage.ru_utime + usage.ru_stime
    print(f"| `{title}` | {seconds:.1f} | {cpu:.1f} | {usage.ru_maxrss / 1000:.0f} |", flush=True)


if __name__ == "__main__":
    main()
