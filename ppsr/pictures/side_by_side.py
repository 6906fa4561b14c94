"""Small pictures side by side: a thread with one core for each, instead of all cores on one picture after another.

:func:`groups` and :func:`stream` say where that pays, :func:`in_order` does it. Between two parallel loops of a network
all cores but one wait, and while a picture is read or written, too. That is a larger share the smaller the picture is
(``benchmarks/frames.py``). Results are those of single calls, bit for bit: no kernel's result depends on how many
threads it runs on, and a picture that is small enough is never cut.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

from ppsr.archs.masked import as_masked
from ppsr.errors import UserError
from ppsr.ops import dispatch, native
from ppsr.pictures.bands import working_bytes
from ppsr.pictures.tile_choice import SURELY_ENOUGH

__all__ = ['SMALL', 'groups', 'in_order', 'stream']

SMALL = 240 * 135  # input pixels up to which it pays on two cores, measured
WRITER_BYTES = 32  # per output pixel: the result in any dtype, and the copies of Pillow and the WebP encoder

T, R = TypeVar('T'), TypeVar('R')
Size = tuple[int, int]


def groups(
    upscaler, items: Sequence[T], size: Callable[[T], Size | None], held: float = 0
) -> Iterator[tuple[list[T], int]]:
    """The items in order, cut into runs that are worked on alike: (items, number of threads; 1 = one after another).

    How many threads the memory allows is looked at when a run is asked for.

    Args:
        upscaler: an :class:`ppsr.pictures.upscaler.Upscaler`.
        size: (H, W) of an item's picture; None = unknown, and then it is none of the small ones.
        held: bytes that the caller will hold beside the work on the pictures.
    """
    for small, run in itertools.groupby(items, lambda item: _is_small(size(item))):
        run = list(run)
        workers = _workers(upscaler, {size(item) for item in run}, held) if small else 1
        rest = len(run) % workers
        rest = rest if _too_few(rest, workers) else 0
        if len(run) > rest:
            yield run[: len(run) - rest], min(workers, len(run))
        if rest:
            yield run[len(run) - rest :], 1


def stream(upscaler, items: Iterable[T], size: Size, each: float = 0) -> tuple[Iterator[T], int]:
    """The same for pictures of one size of which nobody knows how many come: (items, number of threads).

    As many items as there are threads are taken for that.

    Args:
        each: bytes that the caller will hold for each thread.
    """
    items = iter(items)
    workers = _workers(upscaler, {size}, 0, each) if _is_small(size) else 1
    first = list(itertools.islice(items, workers))
    threads = 1 if _too_few(len(first), workers) else len(first)
    return itertools.chain(first, items), threads


def in_order(
    work: Callable[[T, Callable[[str], None]], R], items: Iterable[T], workers: int, say: Callable[[str], None]
) -> Iterator[R]:
    """work(item, say) of every item, in their order, by threads of one core each; close it where it may be left early.

    What one says or raises is said or raised by the caller's thread when its turn comes. After an exception those that
    have begun are finished, and no other begins.
    """

    def listen(item: T) -> tuple[list[str], R | None, BaseException | None]:
        said: list[str] = []
        try:
            return said, work(item, said.append), None
        except BaseException as error:  # raised again below
            return said, None, error

    def tell(future: Future) -> R:
        said, result, error = future.result()
        for sentence in said:
            say(sentence)
        if error is not None:
            raise error
        return result

    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(workers, 'ppsr-picture', initializer=_take_one_core)
    try:
        for item in items:
            if len(waiting) == 2 * workers:  # results are not piled up
                yield tell(waiting.popleft())
            waiting.append(pool.submit(listen, item))
        while waiting:
            yield tell(waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _is_small(size: Size | None) -> bool:
    return size is not None and size[0] * size[1] <= SMALL


def _too_few(count: int, workers: int) -> bool:
    """Whether all cores on one after another make so few faster than one core on each, half of them idle."""
    return 2 * count <= workers


def _workers(upscaler, sizes: Iterable[Size], held: float, each: float = 0) -> int:
    """How many pictures at once: the cores that torch uses, as far as memory suffices for uncut pictures."""
    threads = torch.get_num_threads()
    if threads == 1 or not _same_in_one_thread(upscaler) or _runtime() is None:
        return 1
    room = upscaler.memory_budget() - held
    workers = min(threads, int(room // (max(_bytes(upscaler, size) for size in sizes) + each)))
    return 1 if _too_few(workers, threads) else workers


def _same_in_one_thread(upscaler) -> bool:
    """Whether results surely depend neither on the number of threads nor on the thread: our networks on the compiled
    kernels. The last bit of torch's own products may, and what somebody else's network does is unknown."""
    if upscaler.device.type != 'cpu' or torch.is_autocast_enabled('cpu') or as_masked(upscaler.net) is None:
        return False  # the caller's autocast is of the caller's thread
    try:
        return dispatch.choose(torch.empty(0, dtype=torch.float32, device='cpu')) == 'native'
    except UserError:  # told with the first picture
        return False


def _bytes(upscaler, size: Size) -> float:
    """What one picture may take."""
    height, width = size
    multiple = upscaler.multiple
    padded = -(-height // multiple) * multiple * (-(-width // multiple) * multiple)
    results = WRITER_BYTES * height * width * upscaler.outscale**2
    return padded * SURELY_ENOUGH + results + working_bytes((height, width, 4), upscaler.scale, upscaler.outscale)


def _runtime():
    """torch's OpenMP, in which the number of threads belongs to each thread; None where torch has another one."""
    runtime = native.openmp() if torch.backends.openmp.is_available() else None
    return runtime if hasattr(runtime, 'omp_set_num_threads') else None


def _take_one_core() -> None:
    torch.get_num_threads()  # sets the number at a thread's first call, and would undo what follows
    _runtime().omp_set_num_threads(1)  # of this thread alone; torch.set_num_threads is the process's, too
