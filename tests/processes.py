"""Start processes for tests, forked from a server that has already imported torch.

Importing torch, torchao and scikit-learn takes longer than what most of these tests do, and is not what they test.
Everything else is as in a newly started process: environment, working directory, ``__main__``, and Python's shutdown.
As in the tests themselves, torch multiplies float8 with its own code.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path

import torch

# torch imports the last one when the first optimizer is created.
ALWAYS = ("torch", "torch.utils.tensorboard", "torch._dynamo")

_servers: dict[tuple[str, ...], subprocess.Popen[str]] = {}


def multiply_float8_without_onednn() -> None:
    """Have torch multiply float8 with its own loops, as on every CPU without AMX.

    If the CPU has AMX but the system does not let processes use it, torch still calls oneDNN, which then falls back to
    its reference code: 500 times slower, with the same results.
    """
    torch.backends.mkldnn.set_flags(_enabled=False)


def run_python(
    *args: str,
    imported: tuple[str, ...] = (),
    env: Mapping[str, str] = os.environ,
    cwd: Path | None = None,
    check: bool = True,
    timeout: float = 300,
) -> subprocess.CompletedProcess[str]:
    """Like ``subprocess.run([sys.executable, *args], capture_output=True, text=True)``.

    Args:
        args: ``"-c", code``, ``"-m", module`` or the path of a script; then its own arguments.
        imported: Modules to import before it starts, in addition to ``ALWAYS``. Equal ones share a server.
        env: The environment.
        cwd: The working directory; by default the current one.
        check: Whether to print its errors and raise CalledProcessError if it fails.
        timeout: Seconds after which it is killed.
    """
    if sys.platform != "linux":
        # On other systems, the libraries do not survive a fork.
        return subprocess.run(
            [sys.executable, *args], env=env, cwd=cwd, check=check, timeout=timeout, capture_output=True, text=True
        )
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        request = {
            "args": args,
            "env": dict(env),
            "cwd": str(cwd or Path.cwd()),
            "outputs": [str(path) for path in outputs],
        }
        code = _request_process(imported, request, timeout)
        done = subprocess.CompletedProcess([sys.executable, *args], code, *(path.read_text() for path in outputs))
    if check and code:
        print(done.stderr, file=sys.stderr)
        done.check_returncode()
    return done


def end_servers() -> None:
    """Stop the servers when all tests are done."""
    for server in _servers.values():
        server.communicate()


def _request_process(imported: tuple[str, ...], request: dict[str, object], timeout: float) -> int:
    """Have a server run a process, and return its exit code."""
    if imported not in _servers:
        _servers[imported] = subprocess.Popen(
            [sys.executable, __file__, *ALWAYS, *imported],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    server = _servers[imported]
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps(request), file=server.stdin, flush=True)
    if not select.select([server.stdout], [], [], timeout)[0]:
        os.killpg(server.pid, signal.SIGKILL)
        del _servers[imported]
        raise subprocess.TimeoutExpired(str(request["args"]), timeout)
    return int(server.stdout.readline())


def _serve() -> list[str]:
    """Fork for each line of standard input. Returns only in the new processes: the arguments of each."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    multiply_float8_without_onednn()
    # Otherwise each process copies the memory of all imported modules when it ends.
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _apply_request(request)
            return request["args"]
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _apply_request(request: dict) -> None:
    sys.stdin = open(os.devnull)  # noqa: SIM115
    os.dup2(sys.stdin.fileno(), 0)
    for descriptor, path in enumerate(request["outputs"], start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])


def _run(first: str, *rest: str) -> None:
    """Run what Python would run with these command-line arguments."""
    if first == "-m":
        module, *arguments = rest
        sys.argv[:], sys.path[0] = [module, *arguments], os.getcwd()
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    if first == "-c":
        source, *arguments = rest
        file, sys.path[0] = "<string>", ""
    else:
        source, arguments = Path(first).read_text(encoding="utf-8"), list(rest)
        file, sys.path[0] = first, str(Path(first).resolve().parent)
    sys.argv[:] = ["-c" if first == "-c" else first, *arguments]
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__file__ = file
    exec(compile(source, file, "exec"), vars(main))


if __name__ == "__main__":
    _run(*_serve())
