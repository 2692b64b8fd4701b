"""Reports on running trainings and on large files: reread, redrawn, with a progress bar."""

from __future__ import annotations

import contextlib
import io
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console
from test_report import Script, read_one, steady
from torch.utils.tensorboard import SummaryWriter

import weightflip
from weightflip.records import FlipRecord, RunInfo
from weightflip.report import ReportError, cli, live, read_runs
from weightflip.report.follow import follow
from weightflip.report.read import total_size
from weightflip.sinks import JSONLSink, TensorBoardSink


class Growing:
    """A training that writes while the reader waits."""

    def __init__(self, path, kind):
        self.script = Script(path / "flips.jsonl")
        self.writer = SummaryWriter(path) if kind == "events" else None
        self.sink = TensorBoardSink(writer=self.writer) if self.writer else JSONLSink(str(path / "flips.jsonl"))
        self.points = 0

    def write(self):
        if not self.points:
            self.sink.start(RunInfo(dict.fromkeys("ab", ("1000", "float32", "float8_e4m3")), {}), 0)
        self.points += 1
        layers = tuple(self.script.layer(name, 0.1) for name in "ab")
        self.sink.write(FlipRecord(10 * self.points, layers))
        self.sink.flush()


@pytest.mark.parametrize("kind", ["jsonl", "events"])
def test_follow_reads_again_what_has_grown(tmp_path, kind):
    growing = None
    waits = []

    def sleep(seconds):
        nonlocal growing
        waits.append(seconds)
        # No directory, then a directory, two points, one more, nothing new for a while, one more, end.
        if len(waits) == 2:
            (tmp_path / "run").mkdir()
            growing = Growing(tmp_path / "run", kind)
        for _ in range({3: 2, 4: 1, 7: 1}.get(len(waits), 0)):
            growing.write()
        if len(waits) == 9:
            raise KeyboardInterrupt

    seen = []
    with contextlib.suppress(KeyboardInterrupt):
        for runs in follow([str(tmp_path / "run")], pause=0.5, sleep=sleep):
            seen.append(runs[0].steps.tolist() if runs else [])
    assert [steps for steps in seen if steps] == [[10, 20], [10, 20, 30], [10, 20, 30, 40]]
    assert seen[0] == []
    assert min(waits) >= 0.5
    if growing.writer:
        growing.writer.close()


def test_a_mistake_is_not_taken_for_a_run_that_has_not_begun(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ReportError, match=r"expected a directory, a \.jsonl file"):
        next(follow([str(tmp_path / "notes.txt")]))


def reports(*runs):
    yield from runs
    raise KeyboardInterrupt


def test_the_last_report_stays_on_a_terminal(tmp_path):
    first, second = (Script(tmp_path / f"{count}.jsonl").write(steady(count)) for count in (9, 12))
    out = io.StringIO()
    live.watch(reports([], [first], [second]), Console(file=out, force_terminal=True, width=100, height=30))
    text = out.getvalue()
    assert "no points yet" in text
    assert "up to step 90" in text
    assert "up to step 120. Press Ctrl+C to stop" in text
    # The live display is cleared, and the last report is printed below.
    last = text[text.rindex("Press Ctrl+C to stop") :]
    assert "\x1b[2K" in last
    assert last.count("Nothing stands out up to step 120") == 2
    # In a pipe, reports follow each other.
    out = io.StringIO()
    live.watch(reports([], [first], [second]), Console(file=out, width=100))
    assert out.getvalue().index("No points yet.") < out.getvalue().index("up to step 90")
    assert out.getvalue().count("Nothing stands out") == 2
    assert "\x1b" not in out.getvalue()


def test_follow_as_a_program(tmp_path):
    script = Growing(tmp_path, "jsonl")
    script.write()
    command = [sys.executable, "-u", "-m", "weightflip", "report", "--follow", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Programs in the background of a script inherit that SIGINT is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        first = process.stdout.readline()
        deadline = time.monotonic() + 120
        lines = [first]
        while "Columns that do not fit" not in (line := process.stdout.readline()) and "Means over" not in line:
            assert time.monotonic() < deadline
            lines.append(line)
        script.write()
        while "up to step 20" not in (line := process.stdout.readline()):
            assert time.monotonic() < deadline
            lines.append(line)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0
    assert errors == ""
    assert "up to step 10 " in "".join(lines)


def test_version_and_wrong_calls(capsys):
    for arguments, code in ((["--version"], 0), (["report", "x", "--follow", "--html", "y"], 2)):
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == code
    out, errors = capsys.readouterr()
    assert out == f"weightflip {weightflip.__version__}\n"
    assert "use --html and --csv without it" in errors
    done = subprocess.run([sys.executable, "-m", "weightflip", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == out


@pytest.mark.parametrize("kind", ["jsonl", "events"])
def test_progress_comes_to_the_size_of_the_files(tmp_path, monkeypatch, kind):
    growing = Growing(tmp_path, kind)
    for _ in range(50):
        growing.write()
    growing.sink.close()
    size = total_size([tmp_path])
    assert size == sum(file.stat().st_size for file in tmp_path.iterdir())
    done = []
    read_runs([tmp_path], progress=done.append)
    assert sum(done) == pytest.approx(size, rel=0.05)
    # The progress bar on a terminal is cleared at the end.
    monkeypatch.setattr(live, "_LARGE", 100)
    out = io.StringIO()
    with live.progress_bar([tmp_path], Console(file=out, force_terminal=True, width=80)) as progress:
        progress(size)
    assert "reading" in out.getvalue()
    assert "100%" in out.getvalue() or "kB" in out.getvalue() or "bytes" in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K")
    out = io.StringIO()
    with live.progress_bar([tmp_path], Console(file=out)) as progress:
        progress(size)
    assert out.getvalue() == ""
    assert read_one(tmp_path).end == 500
