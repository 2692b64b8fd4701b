"""The commands ``weightflip diff`` and ``weightflip apply``, and their cost when they are not used."""

from __future__ import annotations

import subprocess
import sys

import pytest
from delta_cases import nudged, program, save, weights

from weightflip.report.cli import main


@pytest.fixture
def paths(tmp_path):
    old = {"a": weights(20, 32), "b": weights(7)}
    new = {"a": nudged(old["a"], 0.1), "b": old["b"]}
    return [save(tmp_path / f"{name}.safetensors", tensors) for name, tensors in (("old", old), ("new", new))]


def test_diff_and_apply(paths, tmp_path, capsys):
    delta, made = tmp_path / "delta.safetensors", tmp_path / "made.safetensors"
    arguments = ["--csv", tmp_path / "n.csv", "--html", tmp_path / "p.html", "--write", delta]
    done = program("diff", *paths, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert "64 of 647 weights have different bits (9.9 %)." in done.stdout
    assert [line for line in done.stdout.splitlines() if line.startswith("Wrote")] == [
        f"Wrote {file}" for file in (delta, tmp_path / "p.html", tmp_path / "n.csv")
    ]
    assert (tmp_path / "p.html").exists()
    assert main(["apply", str(paths[0]), str(delta), str(made)]) == 0
    assert capsys.readouterr() == (f"Wrote {made}\n", "")
    assert made.read_bytes() == paths[1].read_bytes()


def test_errors_are_one_line(paths, tmp_path, capsys, monkeypatch):
    # Headings of narrow tables have two lines.
    monkeypatch.setenv("COLUMNS", "200")
    delta = tmp_path / "delta.safetensors"
    assert main(["diff", *map(str, paths), "--quantizer", "mxfp4", "--write", str(delta)]) == 0
    assert "mxfp4 scales" in capsys.readouterr().out
    for arguments, message in (
        (["diff", paths[0], tmp_path / "none"], "does not exist"),
        (["diff", *paths, "--quantizer", "mxfp5"], "unknown quantizer"),
        (["diff", *paths, "--write", delta], "already exists"),
        (["diff", *paths, "--csv", paths[0]], "would overwrite OLD, NEW or DELTA"),
        (["diff", *paths, "--html", tmp_path / "none" / "p.html"], "create it first"),
        (["apply", paths[1], delta, tmp_path / "made.safetensors"], "is not the checkpoint that"),
        (["apply", paths[0], paths[1], tmp_path / "made.safetensors"], "got another safetensors file"),
        (["apply", paths[0], tmp_path / "none", tmp_path / "made.safetensors"], "does not exist"),
    ):
        assert main(list(map(str, arguments))) == 1
        shown = capsys.readouterr()
        assert message in shown.err
        assert shown.err.startswith("weightflip: ")
        assert shown.err.count("\n") == 1
        assert "Wrote" not in shown.out
    assert not (tmp_path / "made.safetensors").exists()


def test_a_missing_package_is_named(paths, tmp_path, monkeypatch, capsys):
    write = ["--write", tmp_path / "delta.safetensors"]
    for package, options in (("safetensors", []), ("xxhash", write), ("zstandard", write), ("rich", [])):
        with monkeypatch.context() as missing:
            missing.setitem(sys.modules, package, None)
            assert main(list(map(str, ["diff", *paths, *options]))) == 1
        shown = capsys.readouterr()
        assert f"needs the package {package}: pip install 'weightflip[delta]'" in shown.err
        assert shown.err.count("\n") == 1
    assert not (tmp_path / "delta.safetensors").exists()


def test_who_does_not_compare_imports_nothing_of_it():
    """Importing weightflip does not import it, and the program imports no optional package before a command runs."""
    code = (
        "import sys, weightflip; before = 'weightflip.delta' in sys.modules; import weightflip.report.cli;"
        "print(before, [name for name in ('zstandard', 'xxhash', 'safetensors', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False []\n"
