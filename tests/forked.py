"""Processes of their own without the seconds that importing torch and lightning takes.

They are forks of a copy of this process, made before the first test, when everything is imported and nothing has run.
The start of an interpreter is not in them: what depends on it (which modules are imported, the hash seed, an installed
wheel, the rank that Lightning reads from the environment when it is imported) is tested with ``subprocess``.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import io
import json
import os
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver, resource_tracker, util
from typing import IO, Any
from unittest import mock

PATIENCE = 1200.0
"""Seconds; a busy machine makes processes that take a few of them take minutes."""
DEVNULL, PIPE, STDOUT = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
_MESSAGE = struct.Struct("!cq")
_RUNNING = 1 << 32
_server: socket.socket | None = None
_for_good = contextlib.ExitStack()


def serve() -> None:
    """Make the copy of this process that others are forked from; it ends with this process."""
    global _server
    _server, theirs = socket.socketpair()
    if os.fork() == 0:
        try:
            _serve(theirs)
        finally:
            os._exit(1)
    theirs.close()


def _do_once() -> None:
    """Apply ``command.once`` to every process that is forked from here."""
    import command

    _for_good.enter_context(command.once())


def _serve(ours: socket.socket) -> None:
    os.setsid()
    faulthandler.disable()
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    os.closerange(3, ours.fileno())
    os.closerange(ours.fileno() + 1, 4096)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.freeze()
    _do_once()
    children: set[int] = set()
    while True:
        message, streams, _, _ = socket.recv_fds(ours, _MESSAGE.size, 4)
        if not message:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            os._exit(0)
        kind, answer = _MESSAGE.unpack(message)
        if kind == b"s":
            answer = os.fork()
            if answer == 0:
                ours.close()
                _run(*streams)
            children.add(answer)
            for stream in streams:
                os.close(stream)
        else:
            ended, status = os.waitpid(answer, os.WNOHANG)
            children.discard(ended)
            answer = os.waitstatus_to_exitcode(status) if ended else _RUNNING
        ours.sendall(_MESSAGE.pack(kind, answer))


def _open_streams() -> None:
    """Let Python's streams be the first three files, as in a new interpreter."""
    sys.stdin = sys.__stdin__ = io.TextIOWrapper(io.FileIO(0, "r", closefd=False), encoding="utf-8")  # type: ignore[misc]
    for number, name in ((1, "stdout"), (2, "stderr")):
        raw = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
        errors = "strict" if name == "stdout" else "backslashreplace"
        text = io.TextIOWrapper(raw, encoding="utf-8", errors=errors, line_buffering=name == "stderr")
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)


def _run(request: int, *streams: int) -> None:
    """Become the process that was asked for, as far as Python code sees."""
    code: Any = 1
    try:
        os.setsid()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        _open_streams()
        with os.fdopen(request) as file:
            file.seek(0)
            task = json.load(file)
        os.environ.clear()
        os.environ.update(task["env"])
        os.chdir(task["cwd"])
        words = task["words"]
        paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
        first = os.getcwd() if words[0] == "-m" else os.path.dirname(os.path.abspath(words[0]))
        sys.path[:] = [*dict.fromkeys([first, *paths, *sys.path])]
        if words[0] == "-m":
            sys.argv[:] = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv[:] = words
            runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
        finally:
            os._exit(code if isinstance(code, int) else code is not None)


def serve_cells() -> None:
    """Let ``multiprocessing`` fork the cells of studies from a copy of this process.

    Otherwise it starts an interpreter for that, and each cell imports what the first study of the process did not need.
    """

    def fork(executable: object, words: Sequence[str], kept: Sequence[int]) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                faulthandler.disable()
                nothing = os.open(os.devnull, os.O_RDWR)
                for stream in range(3):
                    os.dup2(nothing, stream)
                for number in range(3, 4096):
                    if number not in kept:
                        with contextlib.suppress(OSError):
                            os.close(number)
                _open_streams()
                _do_once()
                exec(words[-1], {})
            finally:
                os._exit(1)
        return pid

    resource_tracker.ensure_running()
    with mock.patch.object(util, "spawnv_passfds", fork):
        forkserver.ensure_running()


class Popen:
    """A Python module or file that runs in a fork: as much of ``subprocess.Popen`` as is used of it.

    Args:
        command: ``sys.executable`` and ``-m`` with a module's name, or a file, and what follows.
        stdout: a file, ``DEVNULL``, or ``PIPE``: ``communicate`` returns it.
        stderr: the same, or ``STDOUT``.
        env: the environment; ``PYTHONPATH`` in it is searched first.
        cwd: the working folder.
    """

    def __init__(
        self,
        command: Sequence[str],
        stdout: int | IO[Any] = PIPE,
        stderr: int | IO[Any] = PIPE,
        env: dict[str, str] | None = None,
        cwd: object = None,
    ) -> None:
        assert _server is not None and command[0] == sys.executable, command
        self.returncode: int | None = None
        nothing = open(os.devnull, "r+b")  # noqa: SIM115
        pipes = (tempfile.TemporaryFile() if stream == PIPE else None for stream in (stdout, stderr))  # noqa: SIM115
        self._pipes = [*pipes]
        files: list[Any] = [nothing]
        for given, pipe in zip((stdout, stderr), self._pipes, strict=True):
            special = {DEVNULL: nothing, PIPE: pipe, STDOUT: files[-1]}
            files.append(special[given] if isinstance(given, int) else given)
        task = {"words": command[1:], "env": dict(os.environ if env is None else env), "cwd": str(cwd or os.getcwd())}
        with nothing, tempfile.TemporaryFile("w+") as request:
            json.dump(task, request)
            request.flush()
            numbers = [request.fileno(), *(file.fileno() for file in files)]
            socket.send_fds(_server, [_MESSAGE.pack(b"s", 0)], numbers)
            _, self.pid = _MESSAGE.unpack(_server.recv(_MESSAGE.size, socket.MSG_WAITALL))

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None: it is still running."""
        if self.returncode is None:
            assert _server is not None
            _server.sendall(_MESSAGE.pack(b"p", self.pid))
            _, code = _MESSAGE.unpack(_server.recv(_MESSAGE.size, socket.MSG_WAITALL))
            self.returncode = None if code == _RUNNING else code
        return self.returncode

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end; returns the exit code."""
        until = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > until:
                self.kill()
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(0.05)
        assert self.returncode is not None
        return self.returncode

    def communicate(self, timeout: float = PATIENCE) -> tuple[str, str]:
        """Wait for the end; returns what was written to stdout and stderr."""
        self.wait(timeout)
        written = []
        for pipe in self._pipes:
            if pipe is not None:
                pipe.seek(0)
            written.append("" if pipe is None else pipe.read().decode())
        return written[0], written[1]

    def kill(self) -> None:
        """Send SIGKILL."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def run(command: Sequence[str], timeout: float = PATIENCE, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a Python module or file in a fork to its end, and return what it printed."""
    process = Popen(command, **options)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(list(command), process.wait(), out, err)
