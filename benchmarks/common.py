"""What the CPU benchmarks share: inputs, alternating timing, Markdown tables, a line about the machine."""

import argparse
import contextlib
import io
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image

from ppsr.data.bicubic import imresize_bicubic, modcrop
from ppsr.generated import write_section
from ppsr.images import as_rgb, read_picture, to_tensor
from ppsr.ops import use_backend


def machine() -> str:
    """One line: processor, cores, torch."""
    model = platform.processor() or platform.machine()
    if Path('/proc/cpuinfo').exists():
        names = [line for line in Path('/proc/cpuinfo').read_text().splitlines() if line.startswith('model name')]
        model = names[0].split(':', 1)[1].strip() if names else model
    return f'{model}, {torch.get_num_threads()} threads, torch {torch.__version__}, Python {platform.python_version()}'


def add_document(parser: argparse.ArgumentParser) -> None:
    """--document FILE: write what is printed into a document, too."""
    parser.add_argument('--document', type=Path, metavar='FILE', help='also write it into this page, as SECTION')
    parser.add_argument('--section', metavar='NAME', help="between this section's markers (default: the script's name)")


@contextlib.contextmanager
def document(args: argparse.Namespace) -> Iterator[None]:
    """What the block prints goes to standard output, and with --document between the markers of a section there."""
    if args.document is None:
        yield
        return
    script, arguments = Path(sys.argv[0]), sys.argv[1:]
    for option in ('--document', '--section'):  # where it was written to is no part of how it was measured
        if option in arguments:
            del arguments[arguments.index(option) : arguments.index(option) + 2]
    command = shlex.join(['python', f'benchmarks/{script.name}', *arguments])
    copy = _Copy(sys.stdout)
    with contextlib.redirect_stdout(copy):
        yield
    write_section(args.document, args.section or script.stem, f'`{command}` ({machine()}):\n\n{copy.getvalue()}')


class _Copy(io.StringIO):
    """Remembers what is written and passes it on."""

    def __init__(self, stream: io.TextIOBase):
        super().__init__()
        self.stream = stream

    def write(self, text: str) -> int:
        self.stream.write(text)
        self.stream.flush()
        return super().write(text)


def photograph(name: str, height: int, width: int) -> torch.Tensor:
    """A photograph that scikit-image ships, resized (bicubic, 8 bit) to (1, 3, height, width) in [0, 1]."""
    path = next(Path(skimage.data.__file__).parent.glob(f'{name}.*'))
    image = Image.open(path).convert('RGB').resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).astype(np.float32) / 255)[None]


def image_pairs(folder: Path, scale: int, first: int | None = None) -> Iterator[tuple[Path, torch.Tensor, np.ndarray]]:
    """(path, lq (1, 3, h, w), gt (H, W, 3) uint8) of the HR images of a folder, by name; lq by the exact bicubic."""
    paths = sorted(p for p in folder.iterdir() if p.suffix.lower() in ('.png', '.jpg', '.bmp'))
    for path in paths[:first]:
        gt = modcrop(as_rgb(read_picture(path).pixels), scale)
        yield path, to_tensor(imresize_bicubic(gt, scale)), gt


def as_image(sr: torch.Tensor) -> np.ndarray:
    """(3, H, W) -> (H, W, 3) uint8"""
    return (sr.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()


def noise(height: int, width: int, seed: int = 0) -> torch.Tensor:
    """(1, 3, height, width) in which no pixel is pure."""
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed))


def alternate(cases: dict[str, Callable[[], object]], runs: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each case, run in turn (A B C A B C …), so that a drift of the machine meets all alike."""
    seconds = {name: [] for name in cases}
    for i in range(warmup + runs):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def on(backend: str | None, run: Callable[[], object]) -> Callable[[], object]:
    """`run` with one attention backend."""

    def wrapped():
        with use_backend(backend):
            return run()

    return wrapped


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Median of the ratios a/b, pair by pair: both of a pair were measured next to each other."""
    return statistics.median(x / y for x, y in zip(a, b))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    lines = [header, ['---', *['---:'] * (len(header) - 1)], *rows]
    return '\n'.join('| ' + ' | '.join(map(str, line)) + ' |' for line in lines)
