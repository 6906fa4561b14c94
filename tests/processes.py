"""Processes of their own for tests, which start in milliseconds: forked from one that has imported everything.

For what a running process does: commands with their standard streams, signals, memory, a directory and variables of its
own. What a start does (imports, variables that libraries read while they are loaded) needs subprocess, and 6 seconds.
"""

import contextlib
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

_server = multiprocessing.get_context('forkserver')
_server.set_forkserver_preload(
    [
        'processes',
        'ppsr',
        'ppsr.training.train',
        'ppsr.training.loader',
        'ppsr.pictures.batch',
        'ppsr.video',
        'ppsr.data.prepare',
        'ppsr.demo',
        'basicsr.train',
    ]
)


class Process:
    """A command of ppsr, or a program, in a process of its own.

    Args:
        run: words after ``ppsr``, or the text of a Python program.
        cwd: working directory; None = this process's.
        environment: variables beside this process's.
        shell: redirections of the standard streams as in a shell: '< a.png >&- 2>/dev/full', '> a.txt 2>&1'.
        encoding: of the standard streams, as PYTHONIOENCODING says it.
        input: what it reads from standard input; None = nothing at once.
        group: in a process group of its own, as a terminal starts one.
        prepare: called in the process first (to break something there on purpose); a function of a module.

    Attributes:
        pid: number of the process.
        stdout, stderr: what it has printed up to now, bytes.
    """

    def __init__(
        self,
        run: list | str,
        cwd: Path | None = None,
        environment: dict[str, str] | None = None,
        shell: str = '',
        encoding: str = 'utf-8',
        input: bytes = b'',
        group: bool = False,
        prepare: Callable[[], object] | None = None,
    ):
        self._printed = {1: bytearray(), 2: bytearray()}
        ours, theirs = {}, {}
        theirs[0], ours[0] = multiprocessing.Pipe(duplex=False)
        for number in (1, 2):
            ours[number], theirs[number] = multiprocessing.Pipe(duplex=False)
        settings = SimpleNamespace(
            run=run if isinstance(run, str) else list(map(str, run)),
            cwd=str(cwd or os.getcwd()),
            environment=dict(os.environ) | (environment or {}),
            shell=shell,
            encoding=encoding,
            group=group,
            prepare=prepare,
        )
        self._process = _server.Process(target=_main, args=(settings, theirs))
        self._process.start()
        self.pid = self._process.pid
        for connection in theirs.values():
            connection.close()
        work = [(self._feed, ours[0], input), *((self._collect, ours[number], number) for number in (1, 2))]
        self._threads = [threading.Thread(target=target, args=args, daemon=True) for target, *args in work]
        for thread in self._threads:
            thread.start()

    def _feed(self, connection: Connection, data: bytes) -> None:
        with connection:
            while data:
                try:
                    data = data[os.write(connection.fileno(), data) :]
                except BrokenPipeError:
                    return

    def _collect(self, connection: Connection, number: int) -> None:
        with connection:
            while data := os.read(connection.fileno(), 2**16):
                self._printed[number] += data

    @property
    def stdout(self) -> bytes:
        return bytes(self._printed[1])

    @property
    def stderr(self) -> bytes:
        return bytes(self._printed[2])

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    @property
    def exitcode(self) -> int | None:
        """Minus the number of the signal that killed it; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float = 120) -> int:
        """The exit code, when it has ended and its standard streams are closed by all who had them."""
        self._process.join(seconds)
        said = (self.stdout + self.stderr).decode(errors='replace')
        assert self._process.exitcode is not None, f'still running after {seconds} s:\n{said}'
        for thread in self._threads:
            thread.join(seconds)
            assert not thread.is_alive(), f'a child of it still holds its streams after {seconds} s:\n{said}'
        return self._process.exitcode

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Return when the condition holds, or the process has ended."""
        end = time.monotonic() + seconds
        while self.alive and not condition():
            assert time.monotonic() < end, f'not after {seconds} s:\n{self.stdout}\n{self.stderr}'
            time.sleep(0.01)

    def kill(self) -> None:
        """And wait for its end, not that of its children."""
        self.send_signal(signal.SIGKILL)
        self._process.join()

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """To it and its children (`group`), as a terminal or a cluster manager does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def _main(settings: SimpleNamespace, streams: dict[int, Connection]) -> None:
    os.chdir(settings.cwd)
    os.environ.clear()
    os.environ.update(settings.environment)
    multiprocessing.set_start_method('fork', force=True)  # workers as in a process that a shell has started
    if settings.group:
        os.setpgid(0, 0)
    for number, connection in streams.items():
        os.dup2(connection.fileno(), number)
        connection.close()
    _redirect(settings.shell)
    _open_streams(settings.encoding)
    import torch

    torch.set_num_threads(1)
    if settings.prepare is not None:
        settings.prepare()
    if isinstance(settings.run, str):
        sys.argv = ['-c']
        exec(compile(settings.run, '<program>', 'exec'), {'__name__': '__main__'})
    else:
        import ppsr_command

        ppsr_command.entry(settings.run)


def _redirect(shell: str) -> None:
    for number, sign, to in re.findall(r'(\d?)([<>])\s*(&-|&\d|[^\s<>]+)', shell):
        number = int(number or '<>'.index(sign))
        if to == '&-':
            os.close(number)
        elif to.startswith('&'):
            os.dup2(int(to[1:]), number)
        else:
            append = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND  # some processes may write to one file
            file = os.open(to, os.O_RDONLY if sign == '<' else append)
            os.dup2(file, number)
            os.close(file)


def _open_streams(encoding: str) -> None:
    """sys.stdin, stdout and stderr as an interpreter has them that starts now: None where one is closed."""
    encoding, _, errors = encoding.partition(':')
    for number, name in enumerate(('stdin', 'stdout', 'stderr')):
        try:
            os.fstat(number)
        except OSError:
            stream = None
        else:
            own = 'backslashreplace' if name == 'stderr' else errors or 'strict'
            mode = 'w' if number else 'r'
            stream = open(number, mode, -1, encoding, own, closefd=False)  # noqa: SIM115
            stream.reconfigure(line_buffering=number == 2)
        setattr(sys, name, stream)
        setattr(sys, f'__{name}__', stream)
