"""How much memory there is, and how much a network takes: measured, not guessed."""

import contextlib
import ctypes
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from ppsr.errors import UserError
from ppsr.ops import workspace

__all__ = ['free_memory', 'gib', 'is_out_of_memory', 'measure_bytes_per_pixel', 'parse_size', 'used_memory']

PROBE = 128  # side of the noise image that a network is measured with
SAMPLE_SECONDS = 0.002


def parse_size(text: str | int) -> int:
    """'800M', '4G', '1.5GiB', '2000000', or a number -> bytes (K, M, G are powers of 1024).

    Raises:
        UserError: not an amount of memory, or more than any machine has (an exbibyte).

    >>> parse_size('1.5G') // 2**20
    1536
    """
    match = re.fullmatch(r'\s*(\d{1,20}(?:\.\d{1,20})?)\s*([kmgt]?)(?:i?b)?\s*', str(text)[:100], re.IGNORECASE)
    size = int(float(match[1]) * 1024 ** ' kmgt'.index(match[2].lower() or ' ')) if match else 0
    if not 0 < size <= 2**60:
        shown = repr(text) if len(repr(text)) < 40 else f'{repr(text)[:30]}…'
        raise UserError(f'{shown} is not an amount of memory; write it like 800M or 4G.')
    return size


def gib(size: float) -> str:
    """Bytes for a message.

    >>> gib(1.5 * 2**30)
    '1.5 GiB'
    """
    return f'{size / 2**30:.1f} GiB'


def free_memory(device: torch.device) -> int:
    """Bytes that can still be had: on a GPU, or of RAM (within the control group's limit, if there is one)."""
    if device.type == 'cuda':
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    release_heap()
    return min(psutil.virtual_memory().available, _cgroup_room())


def used_memory(device: torch.device) -> int:
    """Bytes that this process holds now: on the GPU, or of RAM."""
    if device.type == 'cuda':
        return torch.cuda.memory_allocated(device)
    release_heap()
    return psutil.Process().memory_info().rss


def _cgroup_room(proc: Path = Path('/proc/self/cgroup'), root: Path = Path('/sys/fs/cgroup')) -> float:
    """Bytes that the limits of control groups (both versions) still leave to this process; infinite without any.

    The limit may be that of any group above this process's own: SLURM and systemd nest them.
    """
    room = float('inf')
    try:
        lines = [line.split(':', 2) for line in proc.read_text().splitlines()]
    except OSError:  # no Linux
        return room
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers == '':
            base, names = root, ('memory.max', 'memory.current', 'inactive_file')
        elif 'memory' in controllers.split(','):
            base, names = root / 'memory', ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file')
        else:
            continue
        group = base / path.lstrip('/')
        # inside a container the path may be that of the host; its own group is the root then
        for folder in [group, *group.parents][: len(group.parts) - len(base.parts) + 1]:
            room = min(room, _room_of(folder, *names))
    return room


def _room_of(group: Path, limit: str, used: str, cached: str) -> float:
    try:
        most, now = int((group / limit).read_text()), int((group / used).read_text())
        statistics = dict(line.split() for line in (group / 'memory.stat').read_text().splitlines())
    except (OSError, ValueError):  # no such file, or 'max'
        return float('inf')
    return most - now + int(statistics.get(cached, 0))  # cached files give way


def release_heap() -> None:
    """Hand freed memory back to the system, where workspaces or the C library (glibc) would keep it."""
    workspace.free()
    if sys.platform == 'linux':
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL('libc.so.6').malloc_trim(0)


def _peak_rss(run: Callable[[], object]) -> int:
    """Highest resident memory of the process while `run` runs, in bytes."""
    try:  # Linux keeps the peak itself; writing 5 resets it
        Path('/proc/self/clear_refs').write_text('5')
        run()
        status = Path('/proc/self/status').read_text()
        return 1024 * int(re.search(r'^VmHWM:\s+(\d+) kB', status, re.MULTILINE)[1])
    except OSError:
        return _sampled_peak_rss(run)


def _sampled_peak_rss(run: Callable[[], object]) -> int:
    """The same where the system does not keep it: looked at every few milliseconds."""
    process, stop = psutil.Process(), threading.Event()
    peak = process.memory_info().rss

    def sample() -> None:
        nonlocal peak
        while not stop.wait(SAMPLE_SECONDS):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        run()
    finally:
        stop.set()
        thread.join()
    return peak


def measure_bytes_per_pixel(run: Callable[[torch.Tensor], object], device: torch.device) -> float:
    """Memory that one more input pixel costs while the network runs, in bytes.

    Args:
        run: calls the network on a (1, 3, h, w) float32 tensor in [0, 1].
        device: of the network.

    The probe is noise: in noise nothing is pure, so nothing can need more.
    """
    noise = torch.rand(1, 3, PROBE, PROBE, generator=torch.Generator().manual_seed(0)).to(device)
    run(noise[..., :32, :32])  # what is set up once must not be counted
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run(noise)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        release_heap()
        before = psutil.Process().memory_info().rss
        peak = _peak_rss(lambda: run(noise)) - before
    return max(peak, noise.nbytes) / PROBE**2


def is_out_of_memory(error: BaseException) -> bool:
    """Is this what PyTorch, numpy or Python raise when memory cannot be had, on any device?"""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and bool(
        re.search(r"can't allocate memory|not enough memory|out of memory", str(error), re.IGNORECASE)
    )
