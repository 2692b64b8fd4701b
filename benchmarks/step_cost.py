"""The cost of tracking relative to an optimizer's step. Both alternate in one run; results are ratios of medians.

``python benchmarks/step_cost.py`` prints tables. Times depend on the machine and its load, so compare ratios.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from chart import draw
from measure import cpu_time_of_one_thread, peak_bytes, time_in_rounds
from workloads import GPT2, ONE, SMALL, Weights, byte_gpt, naive_step

from weightflip import FlipTrackingOptimizer
from weightflip.metrics import metric_names

FORMATS = (
    "float8_e4m3", "float8_e4m3:row", "float8_e4m3:row:pow2", "float8_e5m2", "e3m4", "e3m4:row", "e2m1:none",
    "float8_e4m3:1x128", "float8_e4m3:128x128", "mxfp8_e4m3", "mxfp6_e2m3", "mxfp4", "nvfp4", "nvfp4:tensor",
    "int8", "int4:g32", "ternary", "binary", "bfloat16", "float16", "native",
)  # fmt: skip
SCALED = (
    "float8_e4m3:row", "int8", "int4", "int4:g32", "mxfp8_e4m3", "mxfp4", "nvfp4", "float8_e4m3:1x128",
    "float8_e4m3:128x128",
)  # fmt: skip
SYNCED = (
    "bfloat16", "float8_e4m3", "float8_e4m3:row", "float8_e4m3:1x128", "float8_e4m3:128x128", "mxfp4", "nvfp4",
)  # fmt: skip
DEFAULT = "flips + stalls"
Row = dict[str, Any]


def wrapped(weights: Weights, **options: Any) -> FlipTrackingOptimizer:
    return FlipTrackingOptimizer(weights.adamw(), sinks=[], **{"quantizer": "float8_e4m3", **options})


def against_bare(name: str, weights: Weights, cases: Mapping[str, Mapping[str, Any]], repeats: int) -> list[Row]:
    """Compare each wrapped case with the bare optimizer, one by one, so that only two sets of weights exist at once."""
    rows = []
    for case, options in cases.items():
        bare = weights.adamw()
        if case == "naive":
            plain = weights.adamw()
            actions: dict[str, Callable[[], object]] = {"bare": bare.step, "tracked": lambda o=plain: naive_step(o)}
            memory = None
        else:
            tracked = wrapped(weights, **options)
            actions = {"bare": bare.step, "tracked": tracked.step}
            memory = tracked
        # A plain read of the bytes that a float32 weight needs to read and write: the weight is read twice if it has
        # one scale, and once if its rows or blocks have scales of their own.
        read = READ.get(case) if len(weights.shapes) == 1 else None
        if read is not None:
            actions["read"] = torch.zeros(weights.numel * read // 4).sum
        # The naive method is so slow that a few rounds suffice.
        times = time_in_rounds(actions, 3, warmup=1) if case == "naive" else time_in_rounds(actions, repeats)
        extra = times["tracked"] - times["bare"]
        row = {
            "weights": name,
            "case": case,
            "bare_ms": times["bare"] * 1e3,
            "tracking_ms": extra * 1e3,
            "ratio": extra / times["bare"],
            "tracking_in_reads": extra / times["read"] if "read" in times else None,
            "persistent_bytes_per_weight": None,
            "peak_temporary_bytes": peak_bytes(actions["tracked"]),
        }
        if memory is not None:
            row["persistent_bytes_per_weight"] = sum(memory.tracker.memory_usage()) / weights.numel_tracked
        rows.append(row)
    return rows


READ = {"flips": 10, DEFAULT: 14, f"{DEFAULT}, by row": 10, "flips, by row": 6, **dict.fromkeys(SCALED, 10)}
BASIC: dict[str, dict[str, Any]] = {"flips": {"metrics": ("flips",)}, DEFAULT: {}}


def one(repeats: int) -> list[Row]:
    """One large weight."""
    cases = {
        **BASIC,
        f"{DEFAULT}, by row": {"quantizer": "float8_e4m3:row"},
        f"{DEFAULT}, low_memory": {"low_memory": True},
        f"{DEFAULT}, backend='eager'": {"backend": "eager"},
        "naive": {},
    }
    return against_bare("one weight of 4096 x 4096", Weights(ONE), cases, repeats)


def scaled(repeats: int) -> list[Row]:
    """Formats whose scales are shared by a row or a block, and flips alone by row."""
    cases: dict[str, dict[str, Any]] = {"flips, by row": {"metrics": ("flips",), "quantizer": "float8_e4m3:row"}}
    cases |= {name: {"quantizer": name} for name in SCALED}
    return against_bare("scales of rows and blocks, 4096 x 4096", Weights(ONE), cases, repeats)


def gpt2(repeats: int) -> list[Row]:
    """The parameters of GPT-2 small."""
    return against_bare("GPT-2 small, 148 tensors", Weights(GPT2), {**BASIC, "naive": {}}, max(5, repeats // 2))


def small(repeats: int) -> list[Row]:
    """Many small weights."""
    return against_bare("1,000 weights of 64 x 64", Weights(SMALL), {**BASIC, "naive": {}}, repeats)


def formats(repeats: int) -> list[Row]:
    """All formats."""
    cases = {name: {"quantizer": name} for name in FORMATS}
    return against_bare("formats, 4096 x 4096", Weights(ONE), cases, max(3, repeats // 3))


def groups(repeats: int) -> list[Row]:
    """What each metric group adds to flips and stalls, and all of them that count in each step."""
    each_step = ("coverage", "oscillation", "scale", "travel")
    cases = {f"+ {name}": (name,) for name in metric_names()} | {f"+ {', '.join(each_step)}": each_step}
    some = {f"+ {', '.join(each_step[:3])}": each_step[:3], f"+ {', '.join(each_step)}": each_step}
    return (
        on_top("one weight of 4096 x 4096", Weights(ONE), cases, repeats)
        + on_top("GPT-2 small, 148 tensors", Weights(GPT2), some, max(5, repeats // 2))
        + on_top("1,000 weights of 64 x 64", Weights(SMALL), some, repeats)
    )


def on_top(name: str, weights: Weights, cases: Mapping[str, Sequence[str]], repeats: int) -> list[Row]:
    """Metric groups as what they add to flips and stalls, in bare steps: all three in turns."""
    rows = []
    for case, metrics in cases.items():
        bare, default = weights.adamw(), wrapped(weights)
        observed = wrapped(weights, metrics=("flips", "stalls", *metrics))
        times = time_in_rounds({"bare": bare.step, "default": default.step, "observed": observed.step}, repeats)
        extra = times["observed"] - times["default"]
        rows.append(
            {
                "weights": f"metric groups on top of {DEFAULT}, {name}",
                "case": case,
                "bare_ms": times["bare"] * 1e3,
                "tracking_ms": extra * 1e3,
                "ratio": extra / times["bare"],
                "persistent_bytes_per_weight": sum(observed.tracker.memory_usage()) / weights.numel_tracked,
            }
        )
    return rows


def syncs(repeats: int) -> list[Row]:
    """What the groups ``sync`` and ``touched`` add to flips and stalls, with a sync after each step."""
    weights, rows = Weights(ONE), []
    for quantizer in SYNCED:
        bare, default = weights.adamw(), wrapped(weights, quantizer=quantizer)
        actions: dict[str, Callable[[], object]] = {"bare": bare.step, "default": default.step}
        found = {}
        for group in ("sync", "touched"):
            found[group] = wrapped(weights, quantizer=quantizer, metrics=("flips", "stalls", group))

            def step_and_mark(optimizer: FlipTrackingOptimizer = found[group]) -> None:
                optimizer.step()
                optimizer.tracker.mark_sync()

            actions[group] = step_and_mark
        times = time_in_rounds(actions, repeats)
        rows += [
            {
                "weights": f"a sync after each step, on top of {DEFAULT}, 4096 x 4096",
                "case": f"{group}, {quantizer}",
                "bare_ms": times["bare"] * 1e3,
                "tracking_ms": (times[group] - times["default"]) * 1e3,
                "ratio": (times[group] - times["default"]) / times["bare"],
                "persistent_bytes_per_weight": optimizer.tracker.memory_usage().metrics / weights.numel_tracked,
            }
            for group, optimizer in found.items()
        ]
    return rows


def every(repeats: int) -> list[Row]:
    """Tracking every n-th step: means over n steps with one tracked step."""
    weights = Weights(ONE)
    bare = weights.adamw()
    rows = []
    for n in (1, 2, 5, 10):
        tracked = wrapped(weights, track_every=n)

        def steps(optimizer: Any, n: int = n) -> Callable[[], None]:
            def some() -> None:
                for _ in range(n):
                    optimizer.step()

            return some

        times = time_in_rounds({"bare": steps(bare), "tracked": steps(tracked)}, max(5, repeats // n))
        extra = (times["tracked"] - times["bare"]) / n
        rows.append(
            {
                "weights": "every n-th step, 4096 x 4096",
                "case": f"track_every={n}",
                "bare_ms": times["bare"] / n * 1e3,
                "tracking_ms": extra * 1e3,
                "ratio": extra * n / times["bare"],
            }
        )
    return rows


def bytes_gpt(repeats: int) -> list[Row]:
    """The byte GPT end to end, with TensorBoard: sets of ten steps, each with one logging point.

    The extra time of the optimizer's step is compared with the whole training step: the difference between two whole
    steps would be lost in the noise of forward and backward.
    """
    spent = {"bare": 0.0, "tracked": 0.0}

    def timed(name: str, optimizer: Any) -> None:
        step = optimizer.step

        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = step(*args, **kwargs)
            spent[name] += time.perf_counter() - start
            return result

        optimizer.step = watched

    with tempfile.TemporaryDirectory() as log_dir:
        bare_step, bare = byte_gpt(lambda optimizer, model: optimizer)
        tracked_step, tracked = byte_gpt(
            lambda optimizer, model: FlipTrackingOptimizer(
                optimizer, model, exclude="*embedding.weight", log_dir=log_dir
            )
        )
        timed("bare", bare)
        timed("tracked", tracked)
        blocks: list[Row] = []
        for _ in range(max(3, repeats // 2) + 1):
            spent.update(bare=0.0, tracked=0.0)
            whole = 0.0
            for _ in range(10):
                start = time.perf_counter()
                bare_step()
                whole += time.perf_counter() - start
                tracked_step()
            blocks.append({"bare": whole, "extra": spent["tracked"] - spent["bare"]})
        tracked.close()
    del blocks[0]
    extra, base = (sorted(block[key] for block in blocks)[len(blocks) // 2] for key in ("extra", "bare"))
    return [
        {
            "weights": "byte GPT, a whole training step",
            "case": f"{DEFAULT}, TensorBoard",
            "bare_ms": base * 100,
            "tracking_ms": extra * 100,
            "ratio": extra / base,
        }
    ]


PARTS = {part.__name__: part for part in (one, scaled, gpt2, small, formats, groups, syncs, every, bytes_gpt)}


def machine() -> dict[str, Any]:
    names = [
        line.split(":", 1)[1].strip()
        for line in (Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ())
        if line.startswith("model name")
    ]
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(names) or None,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def show(rows: list[Row]) -> None:
    for _, of_weights in itertools.groupby(rows, lambda row: row["weights"]):
        _show(list(of_weights))


def _show(rows: list[Row]) -> None:
    print(f"\n{rows[0]['weights']}")
    print(f"  {'':<34}{'bare ms':>9}{'tracking ms':>13}{'ratio':>8}{'/ read':>8}{'bytes/weight':>14}{'peak MiB':>10}")
    for row in rows:
        held, peak = row.get("persistent_bytes_per_weight"), row.get("peak_temporary_bytes")
        memory = f"{'' if held is None else f'{held:.3f}':>14}{'' if peak is None else f'{peak / 2**20:.1f}':>10}"
        reads = row.get("tracking_in_reads")
        memory = f"{'' if reads is None else f'{reads:.2f}':>8}{memory}"
        print(f"  {row['case']:<34}{row['bare_ms']:>9.1f}{row['tracking_ms']:>13.1f}{row['ratio']:>8.2f}{memory}")
    sys.stdout.flush()


def load() -> float | None:
    """Mean number of running and runnable processes over the last minute; None if the system does not report it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe_load(before: float | None, after: float | None) -> str:
    """Whether the machine was idle enough for reliable times."""
    if before is None or after is None:
        return "load: unknown on this system"
    # Afterward, the load includes the benchmark's own threads.
    is_idle = before < 0.5 and after < torch.get_num_threads() + 0.5
    return f"load {before:.1f} before, {after:.1f} after: " + (
        "idle" if is_idle else "NOT IDLE, other work ran here; ratios may be off"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"what to measure, of {', '.join(PARTS)}; all by default")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--one-thread", action="store_true", help="measure CPU time of a single thread, for a shared machine"
    )
    parser.add_argument("--json", type=Path, help="output file for the numbers")
    parser.add_argument("--chart", type=Path, help="output file for the chart (.svg, .png)")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"expected some of {', '.join(PARTS)}, got {', '.join(sorted(unknown))}")

    parts = options.parts or list(PARTS)
    if options.chart and not {"one", "gpt2", "small"} & set(parts):
        parser.error("--chart= shows the parts one, gpt2 and small; ask for one of them")

    if options.one_thread:
        cpu_time_of_one_thread()
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    before = load()
    rows: list[Row] = []
    for part in parts:
        rows += (found := PARTS[part](options.repeats))
        show(found)
        if options.json:
            options.json.write_text(json.dumps({"machine": about, "rows": rows}, indent=1) + "\n")
    print(f"\n{describe_load(before, load())}")
    if options.chart:
        draw(rows, options.chart)


if __name__ == "__main__":
    main()
