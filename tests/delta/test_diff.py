"""Changes in stored bits and codes, compared with clones of whole tensors, and their display."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from conftest import case
from delta_cases import bits, nudged, save, weights

from weightflip import encode, quantizer_names
from weightflip.delta import DeltaError, FormatDiff, diff, format_diff
from weightflip.delta.show import print_diff, write_html
from weightflip.delta.table import write_csv
from weightflip.quantizers import resolve

FORMATS = (
    "native",
    "bfloat16",
    "float8_e4m3",
    "float8_e4m3:row",
    "float8_e5m2:pow2",
    "e3m4",
    "e2m1:none",
    "mxfp4",
    "mxfp8_e4m3:rceil",
    "nvfp4",
    "nvfp4:tensor",
    "int8",
    "int4:g32",
    "ternary",
    "binary",
)


def scale_bits(codes):
    """The scales in a comparable form: those of a block format as its quantizer stores them."""
    if codes.scale is None:
        return None
    return codes.quantizer.scale_codes(codes.scale)


def brute(old, new, name) -> FormatDiff:
    """From the codes of both tensors, each encoded as a whole."""
    first, second = encode(old, name), encode(new, name)
    changed = int((first.ordinals != second.ordinals).sum())
    before, after = scale_bits(first), scale_bits(second)
    if after is None:
        return FormatDiff(changed, 0, 0)
    return FormatDiff(changed, after.numel(), int((before != after).sum()))


def checkpoints(tmp_path, old, new):
    return [save(tmp_path / f"{name}.safetensors", tensors) for name, tensors in (("old", old), ("new", new))]


def test_formats_show_what_whole_tensors_do(tmp_path, monkeypatch):
    """In parts of a few rows: sparse changes, different maxima, everything or nothing changed, three dimensions."""
    monkeypatch.setattr(format_diff, "_ELEMENTS", 1500)
    old, new = {}, {}
    for dtype in (torch.bfloat16, torch.float32):
        base = weights(40, 96, dtype=dtype)
        louder = base.clone()
        louder[7, 9] = 3.0
        nan = nudged(base, 0.01)
        nan[3, 3] = torch.nan
        variants = {
            "sparse": nudged(base, 0.01, most=200),
            "loud": louder,
            "all": (base.float() * 1.05).to(dtype),
            "same": base.clone(),
            "zeros": base * 0,
            "nan": nan,
        }
        for name, tensor in list(variants.items())[: 2 if dtype is torch.float32 else None]:
            old[f"{dtype}.{name}"], new[f"{dtype}.{name}"] = base.clone(), tensor
    deep = weights(3, 16, 64)
    old["deep"], new["deep"] = deep, nudged(deep, 0.02, most=100)
    found = diff(*checkpoints(tmp_path, old, new), quantizers=FORMATS)
    assert found.formats == tuple(resolve(name).name for name in FORMATS)
    for tensor in found.tensors:
        for name in FORMATS:
            with case(tensor.name, name):
                before, after = old[tensor.name], new[tensor.name]
                assert tensor.format_diffs[resolve(name).name] == brute(before, after, name)
        assert tensor.changed == np.count_nonzero(bits(old[tensor.name]) != bits(new[tensor.name]))
    assert {name.partition(":")[0] for name in FORMATS} <= set(quantizer_names()) | {"e3m4", "e2m1"}


def test_what_a_format_cannot_show_has_no_numbers(tmp_path):
    """One dimension, integers, float8 storage, and unsupported block shapes: only the stored bits are compared."""
    old = {
        "bias": weights(64),
        "whole": torch.ones(4, 64, dtype=torch.int32),
        "float8": weights(4, 64).to(torch.float8_e4m3fn),
        "odd": weights(4, 33),
        "empty": torch.empty(0, 32),
        "fits": weights(4, 64),
    }
    new = {name: nudged(tensor, 0.5) for name, tensor in old.items()}
    found = diff(*checkpoints(tmp_path, old, new), quantizers=["mxfp4"])
    assert [tensor.name for tensor in found.tensors if tensor.format_diffs] == ["fits"]
    assert all(tensor.changed == tensor.weights // 2 for tensor in found.tensors)


def test_a_function_and_a_quantizer_of_ones_own(tmp_path):
    old = {"w": weights(8, 32)}
    new = {"w": nudged(old["w"], 0.5, most=500)}
    paths = checkpoints(tmp_path, old, new)

    def rounded(weight):
        return (weight.float() * 100).round() / 100

    found = diff(*paths, quantizers=[rounded])
    expected = int((rounded(old["w"]) != rounded(new["w"])).sum())
    assert expected > 0
    assert found.tensors[0].format_diffs["rounded"].changed == expected


def test_sums_and_table(tmp_path, capsys):
    base = weights(50, 64)
    old = {"a": base, "b": weights(1000), "c": weights(10, 64), "gone": weights(3)}
    new = {"a": nudged(base, 0.1), "b": old["b"], "c": nudged(old["c"], 0.5), "new\x1b[2J": weights(4)}
    paths = checkpoints(tmp_path, old, new)
    found = diff(*paths, quantizers=["float8_e4m3"], write=tmp_path / "delta.safetensors")
    assert (found.weights, found.changed) == (3200 + 1000 + 640, 320 + 320)
    assert found.changed_fraction == 640 / 4840
    assert found.new_nbytes == 2 * (3200 + 1000 + 640 + 4)
    print_diff(found)
    text = capsys.readouterr().out
    lines = [line.split() for line in text.splitlines()]
    names = [
        line[0] for line in lines if len(line) > 2 and line[0] in ("a", "b", "c", "gone", "all") and line[1] != "bytes"
    ]
    # The largest changed fraction first. Identical tensors are not listed.
    assert names == ["c", "a", "gone", "all"]
    assert "\x1b" not in text
    assert "640 of 4,840 weights have different bits (13 %)." in text
    assert "1 of 5 tensors are identical." in text
    size = (tmp_path / "delta.safetensors").stat().st_size
    assert f"The delta takes {size:,} bytes" in text

    write_csv(found, tmp_path / "numbers.csv")
    with open(tmp_path / "numbers.csv", newline="") as file:
        rows = {row["tensor"]: row for row in csv.DictReader(file)}
    assert rows["a"]["changed"] == "320"
    assert rows["a"]["old_shape"] == "50x64"
    assert rows["a"]["float8_e4m3 changed"] == str(found.tensors[0].format_diffs["float8_e4m3"].changed)
    assert (rows["gone"]["new_dtype"], rows["gone"]["changed"]) == ("", "")
    assert len(rows) == 5

    write_html(found, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<td class=left>gone</td>" in page
    assert "\x1b" not in page
    assert "http" not in page


def test_nothing_changed(tmp_path, capsys):
    path = save(tmp_path / "old.safetensors", {"a": weights(4, 4)})
    print_diff(diff(path, path))
    assert capsys.readouterr().out == "0 of 16 weights have different bits.\n1 of 1 tensors are identical.\n"


def test_wrong_calls(tmp_path):
    path = save(tmp_path / "old.safetensors", {"a": weights(4, 4)})
    with pytest.raises(ValueError, match="unknown quantizer 'mxfp5'; did you mean"):
        diff(path, path, quantizers=["mxfp5"])
    with pytest.raises(TypeError, match="old must be a path"):
        diff({"a": weights(4)}, path)
    with pytest.raises(
        DeltaError, match=r"none\.safetensors does not exist; expected a checkpoint: a \.safetensors file"
    ):
        diff(tmp_path / "none.safetensors", path)
