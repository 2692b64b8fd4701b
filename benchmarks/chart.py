"""The chart of docs/performance.md: the cost of tracking relative to the optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

BARS = {
    ("one weight of 4096 x 4096", "flips"): "flips",
    ("one weight of 4096 x 4096", "flips + stalls"): "flips + stalls",
    ("one weight of 4096 x 4096", "naive"): "clone and compare",
    ("GPT-2 small, 148 tensors", "flips"): "flips",
    ("GPT-2 small, 148 tensors", "flips + stalls"): "flips + stalls",
    ("GPT-2 small, 148 tensors", "naive"): "clone and compare",
    ("1,000 weights of 64 x 64", "flips"): "flips",
    ("1,000 weights of 64 x 64", "flips + stalls"): "flips + stalls",
    ("1,000 weights of 64 x 64", "naive"): "clone and compare",
}
COLORS = {"flips": "#2a9d8f", "flips + stalls": "#1d6f87", "clone and compare": "#c9c9c9"}


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw bars of tracking time / fused AdamW step time, on a logarithmic axis.

    Args:
        rows: Result rows.
        path: Output file. Its suffix selects the image format.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    ratios = {(row["weights"], row["case"]): row["ratio"] for row in rows if row.get("ratio") is not None}
    bars = [(weights, case, label) for (weights, case), label in BARS.items() if (weights, case) in ratios]
    groups = list(dict.fromkeys(weights for weights, _, _ in bars))
    matplotlib.rcParams["svg.hashsalt"] = "weightflip"
    figure, axes = pyplot.subplots(figsize=(8, 0.32 * len(bars) + 0.3 * len(groups) + 1.0))
    position, ticks = 0.0, []
    for group in groups:
        own = [(case, label) for weights, case, label in bars if weights == group]
        ticks.append((position + (len(own) - 1) / 2, group))
        for case, label in own:
            ratio = ratios[group, case]
            axes.barh(position, ratio, color=COLORS[label], height=0.85)
            axes.text(ratio * 1.06, position, f"{label}  {ratio:.2g}x", va="center", fontsize=9)
            position += 1
        position += 0.7
    axes.axvline(1.0, color="black", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlim(0.1, max(ratios[bar[:2]] for bar in bars) * 12)
    axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks], fontsize=9)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlabel("time of tracking / time of a fused AdamW step (logarithmic)")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
