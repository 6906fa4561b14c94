"""Several processes on one machine from one command: ``ppsr train --processes N``.

torch starts them (:mod:`torch.distributed.elastic.multiprocessing`, as torchrun does) and they meet as torchrun's do:
a training is bit for bit the one of torchrun. What differs is the end: signals are passed on, and a checkpoint may take
as long as it takes; one process speaks for all, and its exit code is that of the command.
"""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

__all__ = ['cores', 'start_processes', 'suggestion']

PATIENCE = 30.0  # seconds in which the others notice by themselves that one has failed
LINES = 40  # of what a process says that nobody else repeats


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count() or 1


def suggestion(batch: int) -> str | None:
    """What makes a training on the CPU with this batch faster, in a line; None where one process does best.

    Args:
        batch: pictures of a step.
    """
    available = min(cores(), torch.get_num_threads())
    count = max(n for n in range(1, min(available, batch) + 1) if batch % n == 0)
    if count == 1:
        return None
    threads = available // count
    return (
        f'{count} processes of {threads} {"thread" if threads == 1 else "threads"} train faster on a CPU than one of '
        f'{available}: add --processes {count}, and --force_yml datasets:train:batch_size_per_gpu={batch // count} for '
        f'the same batch of {batch} in all.'
    )


def start_processes(command: Sequence[str], count: int) -> int:
    """Run a command `count` times side by side, as the processes of one group, until all have ended.

    Their environment is what torchrun makes: RANK, LOCAL_RANK, WORLD_SIZE, where they meet; and OMP_NUM_THREADS
    (the cores shared out) unless it is set. Only the first one's output is shown; what another one says is shown at the
    end if it failed in a way of its own. SIGINT, SIGTERM and SIGHUP are passed on; a second Ctrl-C kills.

    Args:
        command: program and arguments.
        count: processes, at least 1.

    Returns:
        The exit code of the first process that failed, 0 if none did; 128 + N if it was ended by signal N.
    """
    from torch.distributed.elastic import multiprocessing as elastic

    # where they meet: a store in this process, so that no port has to be guessed
    store = dist.TCPStore('127.0.0.1', 0, is_master=True, wait_for_workers=False)
    shared = {
        'WORLD_SIZE': str(count),
        'LOCAL_WORLD_SIZE': str(count),
        'MASTER_ADDR': '127.0.0.1',
        'MASTER_PORT': str(store.port),
        'TORCHELASTIC_USE_AGENT_STORE': 'True',
        'TORCHELASTIC_RESTART_COUNT': '0',
        'TORCHELASTIC_RUN_ID': 'ppsr',
        'OMP_NUM_THREADS': os.environ.get('OMP_NUM_THREADS') or str(max(1, cores() // count)),
    }
    others = range(1, count)
    with tempfile.TemporaryDirectory() as folder, _Signals() as signals:
        group = elastic.start_processes(
            name='ppsr',
            entrypoint=command[0],
            args={rank: tuple(command[1:]) for rank in range(count)},
            envs={rank: shared | {'RANK': str(rank), 'LOCAL_RANK': str(rank)} for rank in range(count)},
            logs_specs=elastic.DefaultLogsSpecs(
                log_dir=folder, redirects=dict.fromkeys(others, elastic.Std.ALL) | {0: elastic.Std.NONE}
            ),
        )
        try:
            signals.catch()  # after torch, which has handlers of its own
            processes = [group.subprocess_handlers[rank].proc for rank in range(count)]
            killed = _wait(processes, signals)
        finally:
            group.close()  # ends what is left, and waits for it
        codes = [process.returncode for process in processes]
        said = {rank: Path(group.stderrs[rank]).read_text(errors='replace') for rank in others}
    if killed:
        print('ppsr: interrupted.', file=sys.stderr)
        return 128 + signal.SIGINT
    return _verdict(codes, said, signals.received)


class _Signals:
    """Signals that ask to end, noted from :meth:`catch` on; outside of the main thread none."""

    def __init__(self):
        self.received: set[int] = set()
        self.waiting: list[int] = []  # to be passed on
        numbers = (signal.SIGINT, signal.SIGTERM, getattr(signal, 'SIGHUP', None), getattr(signal, 'SIGQUIT', None))
        self.before = {number: signal.getsignal(number) for number in numbers if number is not None}
        self.usable = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> '_Signals':
        return self

    def catch(self) -> None:
        if self.usable:
            for number, handler in self.before.items():
                ours = number != getattr(signal, 'SIGQUIT', None) and handler is not signal.SIG_IGN  # nohup
                signal.signal(number, self._note if ours else handler)

    def __exit__(self, *_) -> None:
        if self.usable:
            for number, handler in self.before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self.waiting.append(number)


def _wait(processes: Sequence, signals: _Signals) -> bool:
    """Until all have ended, or all but those that do not notice that one has failed; True if they were killed."""
    failed_at = None
    while any(process.poll() is None for process in processes):
        while signals.waiting:
            number = signals.waiting.pop(0)
            again = number == signal.SIGINT and number in signals.received
            signals.received.add(number)
            for process in processes:
                process.send_signal(signal.SIGKILL if again else number)
            if again:
                for process in processes:
                    process.wait()
                return True
        if failed_at is None and any(process.poll() for process in processes):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() - failed_at > PATIENCE:
            return False
        time.sleep(0.05)
    return False


def _verdict(codes: Sequence[int], said: dict[int, str], received: set[int]) -> int:
    """The exit code of all, with what the first process could not tell on standard error."""
    for rank, text in said.items():
        if codes[rank] and 'Traceback (most recent call last)' in text:
            lines = text.rstrip().splitlines()[-LINES:]
            print('\n'.join([f'ppsr: process {rank}:', *lines]), file=sys.stderr)
            break
    for rank, code in enumerate(codes):
        if code < 0 and -code not in received | {signal.SIGTERM}:  # not one that we or torch sent
            print(
                f'ppsr: error: process {rank} was ended by {signal.Signals(-code).name}, and the others with it; go on '
                'with --auto_resume.',
                file=sys.stderr,
            )
            return 128 - code
    code = next(filter(None, codes), 0)
    return 128 - code if code < 0 else code
