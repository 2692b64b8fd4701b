"""The examples run as users run them, print their table, and write TensorBoard files."""

from __future__ import annotations

import itertools
import os
import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from processes import run_python
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from weightflip.report import find, read_runs

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(
    any(find_spec(package) is None for package in ("matplotlib", "torchao", "sklearn", "tqdm")),
    reason="the examples need: pip install 'weightflip[examples]'",
)

DIGITS_LAYERS = ["input.weight", "hidden.weight"]
# One block; the embeddings, and the head that shares its weight with one of them, stay in high precision.
GPT_LAYERS = [f"blocks.0.{linear}.weight" for linear in ("attention.qkv", "attention.out", "mlp.0", "mlp.2")]
GPT_SMALL = ["--layers=1", "--width=32", "--heads=2", "--context=32", "--batch=8", "--steps=30", "--device=cpu"]


IMPORTS = (
    "torchao.float8",
    "torch.distributed.fsdp",
    "torch.distributed.run",
    "sklearn.model_selection",
    "matplotlib.pyplot",
    "numba",
)


def run_example(script: str, *args: str, bar: str = "training: 100%", imported: tuple[str, ...] = IMPORTS) -> str:
    """Run an example as a user would, and return what it prints without its progress bar."""
    # On a busy machine, threads that share matrices this small mostly wait for each other.
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = run_python(f"examples/{script}", *args, imported=imported, cwd=ROOT, env=env)
    assert "weightflip: tracking has stopped" not in done.stderr
    assert bar in done.stderr
    return done.stdout


def numbers_after(label: str, output: str) -> list[float]:
    """The numbers in the first line that starts with a label."""
    line = next(line for line in output.splitlines() if line.startswith(label))
    return [float(number) for number in re.findall(r"\d+\.\d+", line)]


def check_table(output: str, layers: list[str], quantizer: str) -> None:
    """Check that each tracked layer has a row, in order, and that the last row is their sum."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in output.splitlines()]
    start = rows.index(["layer", "quantizer", "weights", "flips", "flips/weight", "stall ratio", "updated"])
    table = rows[start + 1 : start + 2 + len(layers)]
    assert [row[0] for row in table] == [*layers, "all"]
    assert [row[1] for row in table[:-1]] == [quantizer] * len(layers)

    weights, flips = ([int(row[column].replace(",", "")) for row in table] for column in (-5, -4))
    assert weights[-1] == sum(weights[:-1])
    assert flips[-1] == sum(flips[:-1])
    assert all(count > 0 for count in flips)
    for row, n, count in zip(table, weights, flips, strict=True):
        assert float(row[-3]) == pytest.approx(count / n, abs=0.01)
        assert 0 < float(row[-2].rstrip("%")) < 100
        assert 0 < float(row[-1].rstrip("%")) <= 100


def check_events(log_dir: Path, layers: list[str], steps: int) -> None:
    """Check that TensorBoard finds the tags of the model and of each layer, up to the last step."""
    assert list(log_dir.glob("events.out.tfevents.*"))
    events = EventAccumulator(str(log_dir))
    events.Reload()
    values = ("flip_rate", "cumulative_flip_rate", "stall_ratio")
    tags = ["flips/rate", "flips/cumulative_rate", "flips/stall_ratio", "flips/updated_fraction"]
    tags += [f"{tag}/{layer}" for layer in layers for tag in values] + [f"Model/{tag}" for tag in values]
    # Written from the point at which not all weights have a gradient.
    later = {f"updated_fraction/{layer}" for layer in layers} | {"Model/updated_fraction"}
    assert set(events.Tags()["scalars"]) - later == set(tags)
    for tag in tags:
        scalars = events.Scalars(tag)
        assert [scalar.step for scalar in scalars] == [*range(10, steps, 10), steps]
        assert all(scalar.value >= 0 for scalar in scalars)
        if "cumulative" not in tag:
            assert all(scalar.value <= 1 for scalar in scalars)


def test_digits_float8(tmp_path: Path) -> None:
    output = run_example("digits_float8.py", f"--log-dir={tmp_path}", "--epochs=2")
    first_loss, last_loss = numbers_after("Training loss:", output)
    assert last_loss < first_loss
    assert numbers_after("Test accuracy:", output)[0] > 60  # chance: 10 %
    first_stall_ratio, last_stall_ratio = numbers_after("Stall ratio:", output)
    assert first_stall_ratio < last_stall_ratio
    check_table(output, DIGITS_LAYERS, "float8_e4m3")
    check_events(tmp_path, DIGITS_LAYERS, steps=2 * 22)
    assert f"tensorboard --logdir {tmp_path}" in output


@pytest.mark.parametrize("quantizer", ["float8_e4m3", "e3m4"])
def test_bytes_gpt(tmp_path: Path, quantizer: str) -> None:
    # The example's model uses float8 by default; other formats are selected by name.
    named = [] if quantizer == "float8_e4m3" else [f"--quantizer={quantizer}"]
    output = run_example("bytes_gpt.py", f"--log-dir={tmp_path}", *GPT_SMALL, *named)
    first_loss, last_loss = numbers_after("Validation loss:", output)
    assert last_loss < first_loss - 0.5
    check_table(output, GPT_LAYERS, quantizer)
    check_events(tmp_path, GPT_LAYERS, steps=30)


def test_the_report_names_what_pure_bfloat16_loses(tmp_path: Path) -> None:
    stalls = {}
    for dtype in ("float32", "bfloat16"):
        output = run_example(
            "bytes_gpt.py", f"--log-dir={tmp_path / dtype}", f"--dtype={dtype}", "--quantizer=native", *GPT_SMALL
        )
        stalls[dtype] = numbers_after("all ", output)[-2]
    comparison = next(finding.text for finding in find(read_runs([tmp_path])) if finding.rule == "comparison")
    assert comparison.startswith("In bfloat16 (stored bfloat16 weights)")
    bfloat16, float32 = (float(number) for number in re.findall(r"([\d.]+) %", comparison)[:2])
    assert bfloat16 == pytest.approx(stalls["bfloat16"], abs=1)
    assert float32 == pytest.approx(stalls["float32"], abs=0.1)
    assert bfloat16 > 5 > float32


def test_format_comparison(tmp_path: Path) -> None:
    formats = ["bfloat16", "float8_e4m3", "mxfp4", "int4:g32", "ternary"]
    output = run_example("format_comparison.py", f"--log-dir={tmp_path}", "--epochs=2", "--formats", *formats)
    rows = {line.split()[0]: line.split()[1:] for line in output.splitlines() if line.split()[:1] and "%" in line}
    assert list(rows) == formats
    # For the same updates, a coarser format has fewer flips and more stalls.
    assert float(rows["bfloat16"][0]) > float(rows["float8_e4m3"][0]) > float(rows["mxfp4"][0]) > 0
    stall_ratios = [float(row[1].rstrip("%")) for row in rows.values()]
    assert stall_ratios[0] < stall_ratios[1] < stall_ratios[2] < 100
    assert (tmp_path / "stall_ratio.png").stat().st_size > 10_000
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in formats:
        assert [scalar.step for scalar in events.Scalars(f"flips/stall_ratio@{name}")] == [22, 44]
        assert events.Scalars(f"flip_rate/hidden.weight@{name}")
    assert [scalar.step for scalar in events.Scalars("scale_changes/hidden.weight@mxfp4")] == [22, 44]
    assert events.Scalars("scale_changes/hidden.weight@int4:g32")[0].value > 0.9


def test_gallery(tmp_path):
    output = run_example(
        "gallery.py", f"--log-dir={tmp_path}", "--epochs=3", "--runs", "stuck", "oscillating", bar="100%"
    )
    lines = [line.split(": ") for line in output.splitlines() if line.startswith("  ")]
    layers = [(name.strip(), dict(pair.split() for pair in values.split(", "))) for name, values in lines]
    assert [name for name, _ in layers] == ["input.weight", "hidden.weight"] * 2
    (_, moving), (_, stuck), (_, oscillating), _ = layers
    assert float(stuck["stall_ratio"]) > 0.99 > float(moving["stall_ratio"])
    assert float(stuck["ever_flipped"]) < 0.1 < float(moving["ever_flipped"])
    assert float(oscillating["oscillation_ratio"]) > 2 * float(moving["oscillation_ratio"])
    assert (tmp_path / "gallery.png").stat().st_size > 1000


# Like `torchrun --standalone --nproc-per-node=2`, with forked processes, which do not import everything again.
TORCHRUN = """
import runpy, sys
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def run(script, *args):
    sys.argv[:], sys.path[0] = [script, *args], "examples"
    runpy.run_path(script, run_name="__main__")

config = LaunchConfig(1, 1, nproc_per_node=2, run_id="test", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                      max_restarts=0, start_method="fork")
elastic_launch(config, run)(*sys.argv[1:])
"""


def test_fsdp2_float8(tmp_path: Path) -> None:
    args = ["examples/fsdp2_float8.py", f"--log-dir={tmp_path}/log", f"--checkpoint={tmp_path}/saved", "--steps=30"]
    done = run_python("-c", TORCHRUN, *args, imported=IMPORTS, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert "weightflip: tracking has stopped" not in done.stderr
    first_loss, last_loss = numbers_after("Training loss:", done.stdout)
    assert last_loss < first_loss
    check_table(done.stdout, ["0.weight", "2.weight"], "float8_e4m3")
    check_events(tmp_path / "log", ["0.weight", "2.weight"], steps=30)
    assert (tmp_path / "saved" / ".metadata").is_file()


def test_rollout_sync():
    args = ["--layers=1", "--width=32", "--heads=2", "--context=32", "--pretrain=30", "--steps=32", "--device=cpu"]
    output = run_example("rollout_sync.py", *args)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines() if line.startswith("|")]
    assert rows[0] == ["weights", "learning rate", "sync every", "changed", "bits/weight, bound", "bound",
                       "index + value", "XOR, zstd"]  # fmt: skip
    cases = [tuple(row[:3]) for row in rows[2:]]
    rates, syncs = ("1e-06", "1e-05", "1e-04"), ("1", "4", "16")
    assert cases == list(itertools.product(("float32", "bfloat16"), rates, syncs))
    changed = {case: float(row[3].rstrip("%")) for case, row in zip(cases, rows[2:], strict=True)}
    for dtype, lr, every in cases:
        # Larger steps and longer windows change more.
        for lower, higher in (*itertools.pairwise(rates), *itertools.pairwise(syncs)):
            if lower in rates:
                assert changed[dtype, lower, every] < changed[dtype, higher, every]
            else:
                assert changed[dtype, lr, lower] <= changed[dtype, lr, higher]
    for row in rows[2:]:
        # The index of 32 bits and the value of 16, and a bound that nothing is below.
        assert float(row[6].rstrip("%")) == pytest.approx(3 * float(row[3].rstrip("%")), abs=0.06)
        assert float(row[5].rstrip("%")) <= float(row[7].rstrip("%"))
