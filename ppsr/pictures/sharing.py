"""Several processes that share the files of one command: ``torchrun --nproc_per_node=4 -m ppsr upscale …``.

torchrun keeps a small store of keys and values, which all processes reach, on other machines, too. A counter in it
says which job is next: whoever has finished takes it, so that nobody waits and no file is done twice. There are no
collective operations: a process that dies stops no other one, and the first process tells what it left undone.
"""

import contextlib
import os
import pickle
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import psutil
import torch.distributed as dist

from ppsr.errors import UserError

__all__ = ['Alone', 'Crew', 'join_crew']

POLL = 0.2  # seconds between two looks at the store
BEAT = 2.0  # seconds between two signs of life
SILENCE = 60.0  # seconds without one after which a process of another machine counts as dead
ENDED = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)

T = TypeVar('T')


class Alone:
    """One process: it makes every plan and does every job.

    Attributes:
        rank: of this process; the first one, 0, talks to the user.
        size: number of processes.
        local_rank, local_size: the same among the processes of this machine.
    """

    rank = local_rank = 0
    size = local_size = 1
    work = 0.0

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns in the first process.

        Raises:
            UserError: the first process raised it, or anything else went wrong there.
        """
        return make()

    def take(self, jobs: Sequence[T], name: Callable[[T], str] = str) -> Iterator[T]:
        """The jobs that this process is to do, one after the other; each goes to one process alone.

        Args:
            jobs: the same in every process.
            name: what to call a job.
        """
        yield from jobs

    def advance(self, work: float) -> float:
        """Add work that was done, in any unit; what all processes have done together."""
        self.work += work
        return self.work

    def gather(self, result: T, waiting: Callable[[float], None] = lambda work: None) -> tuple[list[T], list[str]]:
        """In the first process, when all have ended: the results in the order of the ranks, and a sentence for each
        process that ended without one. In the others: nothing.

        Args:
            result: of this process; has to pickle.
            waiting: is called now and then meanwhile, with the work that all have done.
        """
        return [result], []


class Crew(Alone):
    """Processes that a launcher has started with torchrun's variables.

    Args:
        store: a torch.distributed.Store that all of them reach.
        rank, size, local_rank, local_size: as for :class:`Alone`.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, local_rank: int = 0, local_size: int = 1):
        self.store, self.rank, self.size = dist.PrefixStore('ppsr', store), rank, size
        self.local_rank, self.local_size = local_rank, local_size
        self.asked = self.lists = 0
        self.heard: dict[int, tuple[int, float]] = {}  # rank -> signs of life, and when the last one came
        self._set(f'who {rank}', (socket.gethostname(), os.getpid()))
        self._stop = threading.Event()
        threading.Thread(target=self._beat, daemon=True).start()

    def from_first(self, make: Callable[[], T]) -> T:
        self.asked += 1
        key = f'answer {self.asked}'
        if self.rank:
            answer, problem = self._wait(key)
            if problem is not None:
                raise UserError(problem)
            return answer
        try:
            answer = make()
        except BaseException as error:  # Ctrl-C, too: nobody is left waiting
            problem = str(error) if isinstance(error, UserError) else f'process 0 ended ({type(error).__name__}).'
            self._set(key, (None, problem))
            raise
        self._set(key, (answer, None))
        return answer

    def take(self, jobs: Sequence[T], name: Callable[[T], str] = str) -> Iterator[T]:
        self.lists += 1
        while (index := self.store.add(f'next {self.lists}', 1) - 1) < len(jobs):
            self._set(f'at {self.rank}', name(jobs[index]))
            yield jobs[index]
            self._set(f'at {self.rank}', None)

    def advance(self, work: float) -> float:
        return self.store.add('work', round(1e6 * work)) / 1e6

    def gather(self, result: T, waiting: Callable[[float], None] = lambda work: None) -> tuple[list[T], list[str]]:
        self._set(f'result {self.rank}', result)
        if self.rank:
            return [], []
        results, lost = {0: result}, {}
        while len(results) + len(lost) < self.size:
            for rank in set(range(self.size)) - results.keys() - lost.keys():
                if self.store.check([f'result {rank}']):
                    results[rank] = self._get(f'result {rank}')
                elif self._is_dead(rank):
                    lost[rank] = self._epitaph(rank)
            waiting(self.advance(0))
            time.sleep(POLL)
        return [results[rank] for rank in sorted(results)], [lost[rank] for rank in sorted(lost)]

    def lost(self) -> list[str]:
        """A sentence for each process that has died until now."""
        try:
            return [self._epitaph(rank) for rank in range(self.size) if rank != self.rank and self._is_dead(rank)]
        except RuntimeError:  # the store is gone, too
            return []

    def close(self) -> None:
        self._stop.set()

    def _beat(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone: everybody ends
            while not self._stop.wait(BEAT):
                self.store.add(f'beat {self.rank}', 1)

    def _is_dead(self, rank: int) -> bool:
        """Whether a process has ended; of other machines, whether it has been silent for too long."""
        host, pid = self._get(f'who {rank}') if self.store.check([f'who {rank}']) else (None, None)
        if host == socket.gethostname():
            try:
                return psutil.Process(pid).status() in ENDED and not self.store.check([f'result {rank}'])
            except psutil.NoSuchProcess:
                return not self.store.check([f'result {rank}'])
        beats, now = self.store.add(f'beat {rank}', 0), time.monotonic()
        if self.heard.setdefault(rank, (beats, now))[0] != beats:
            self.heard[rank] = (beats, now)
        return now - self.heard[rank][1] > SILENCE

    def _epitaph(self, rank: int) -> str:
        host = self._get(f'who {rank}')[0] if self.store.check([f'who {rank}']) else 'a machine that was never heard of'
        at = self._get(f'at {rank}') if self.store.check([f'at {rank}']) else None
        return f'Process {rank} on {host} died' + (f'; {at} is not done.' if at else '.')

    def _set(self, key: str, value) -> None:
        self.store.set(key, pickle.dumps(value))

    def _get(self, key: str):
        return pickle.loads(self.store.get(key))

    def _wait(self, key: str):
        """The value of a key that the first process is to set; looked at now and then, so that signs of life go on."""
        try:
            while not self.store.check([key]):
                time.sleep(POLL)
            return self._get(key)
        except RuntimeError as error:
            raise UserError('the first process is gone; its own message says why.') from error


@contextlib.contextmanager
def join_crew() -> Iterator[Alone]:
    """The processes that share the work: those of torchrun, or this one alone.

    Raises:
        UserError: the launcher's variables are there, and the other processes are not.
    """
    size = os.environ.get('WORLD_SIZE', '1')
    if not size.isdecimal() or int(size) < 2 or 'MASTER_ADDR' not in os.environ:
        yield Alone()
        return
    try:
        store, rank, size = next(dist.rendezvous('env://'))
        place = [int(os.environ.get(name, unset)) for name, unset in (('LOCAL_RANK', 0), ('LOCAL_WORLD_SIZE', 1))]
        crew = Crew(store, rank, size, *place)
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip('.')
        raise UserError(f'the processes do not find each other ({reason}); start them with torchrun.') from error
    try:
        yield crew
    except UserError:
        raise
    except BaseException:  # torchrun ends all processes when one has died
        if crew.is_first and (lost := crew.lost()):
            print('ppsr:', *lost, 'The same command goes on with what is not done.', file=sys.stderr)
        raise
    finally:
        crew.close()
