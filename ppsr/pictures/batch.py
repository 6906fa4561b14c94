"""Enlarging many files: which input becomes which output, then one after the other, whatever happens to any of them."""

import glob
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from ppsr.errors import UserError
from ppsr.images import FORMATS, read_size, write_file
from ppsr.masks.pure_pass import PurePass
from ppsr.pictures.upscaler import Stats, Upscaler

__all__ = ['EXTENSIONS', 'STREAM', 'Job', 'Summary', 'plan_jobs', 'run_jobs']

STREAM = '-'  # standard input or output
EXTENSIONS = ('auto', 'png', 'jpg', 'webp', 'tiff')


@dataclass(frozen=True)
class Job:
    """One input and where its result goes; STREAM for standard input and output."""

    source: str | Path
    target: str | Path


@dataclass
class Summary:
    """What became of the jobs.

    Attributes:
        done: statistics of each enlarged picture.
        skipped: outputs that existed already.
        failed: one sentence for each that failed.
        seconds: wall-clock of the whole run.
    """

    done: list[Stats] = field(default_factory=list)
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        pixels = sum(s.output_size[0] * s.output_size[1] for s in self.done)
        inputs = sum(s.input_size[0] * s.input_size[1] for s in self.done)
        pure = sum(s.pure_share * s.input_size[0] * s.input_size[1] for s in self.done) / max(inputs, 1)
        gmacs, dense = sum(s.gmacs for s in self.done), sum(s.dense_gmacs for s in self.done)
        parts = [f'{len(self.done)} image{"s" * (len(self.done) != 1)} enlarged in {self.seconds:.1f} s']
        if self.done:
            parts.append(f'{pixels / 1e6 / max(self.seconds, 1e-9):.3g} output megapixels/s')
        if any(s.mask is not None for s in self.done):
            parts.append(f'{pure:.1%} of the pixels pure')
        if dense > 0:
            saved = f', {dense - gmacs:.4g} saved by Pure-Pass ({1 - gmacs / dense:.1%})' if gmacs < dense else ''
            parts.append(f'{gmacs:.4g} GMACs{saved}')
        if self.skipped:
            parts.append(f'{self.skipped} skipped because the output exists (--overwrite replaces it)')
        parts.append(f'{len(self.failed)} failed' if self.failed else 'no failures')
        return '; '.join(parts) + '.'


def plan_jobs(
    inputs: Iterable[str],
    output: str,
    suffix: str = 'out',
    ext: str = 'auto',
    recursive: bool = False,
) -> list[Job]:
    """Which files are enlarged into which.

    Args:
        inputs: files, folders (their pictures; with `recursive` those of their subfolders, too), globs, or '-'.
        output: a folder; for a single picture also a file name with a picture's extension; or '-'.
        suffix: NAME becomes NAME_suffix; '' keeps the name.
        ext: of the output; 'auto' keeps the input's if we write it (png, jpg, webp, tiff), else png.
        recursive: descend into folders; the tree below each input folder is kept.

    Raises:
        UserError: an input that does not exist, nothing to do, two inputs with one output, an output that is an input.
    """
    if ext not in EXTENSIONS:
        raise UserError(f'{ext!r} is not an extension that can be written; use {", ".join(EXTENSIONS)}.')
    if os.sep in suffix or '/' in suffix:
        raise UserError(f'The suffix {suffix!r} must not contain a path separator.')
    found = _find(inputs, output, recursive)
    single_file = Path(output).suffix.lower() in FORMATS and not Path(output).is_dir()
    if output == STREAM or single_file:
        if len(found) > 1:
            raise UserError(f'{len(found)} inputs cannot go to one output ({output}); give a folder as output.')
        jobs = [Job(found[0][0], output if output == STREAM else Path(output))]
    else:
        jobs = [Job(source, Path(output) / _target_name(relative, suffix, ext)) for source, relative, _ in found]

    if suffix:  # a folder may hold the results of an earlier run beside its pictures: these are no inputs
        listed = {_real(source) for source, _, in_folder in found if in_folder}
        results = {_real(job.target) for job in jobs if STREAM not in (job.source, job.target)} & listed
        jobs = [job for job in jobs if job.source == STREAM or _real(job.source) not in results]

    sources = {_real(job.source) for job in jobs if job.source != STREAM}
    taken: dict[str, Job] = {}
    for job in jobs:
        if job.target == STREAM:
            continue
        real = _real(job.target)
        if real in sources:
            raise UserError(f'{job.target} is an input itself; choose another output folder or a --suffix.')
        if real in taken:
            raise UserError(f'{taken[real].source} and {job.source} would both become {job.target}; run them apart.')
        taken[real] = job
    return jobs


def _source_name(job: Job) -> str:
    return 'standard input' if job.source == STREAM else str(job.source)


def _real(path) -> str:
    return os.path.realpath(path)


def _target_name(relative: Path, suffix: str, ext: str) -> Path:
    own = relative.suffix.lower()
    extension = (relative.suffix if own in FORMATS else '.png') if ext == 'auto' else f'.{ext}'
    return relative.with_name(relative.stem + (f'_{suffix}' if suffix else '') + extension)


def _find(inputs: Iterable[str], output: str, recursive: bool) -> list[tuple[str | Path, Path, bool]]:
    """(source, path below the output folder, found in a folder) of every input, without doubles, in order."""
    found: dict[str, tuple[str | Path, Path, bool]] = {}
    known = tuple(Image.registered_extensions())
    for text in inputs:
        if text == STREAM:
            found.setdefault(STREAM, (STREAM, Path('stdin.png'), False))
            continue
        paths = [Path(text)]
        if not paths[0].exists():
            if not glob.has_magic(text):
                raise UserError(f'{text} does not exist.')
            paths = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
            if not paths:
                raise UserError(f'{text} matches no file.')
        for path in paths:
            if not path.is_dir():
                found.setdefault(_real(path), (path, Path(path.name), False))
                continue
            files = sorted(path.rglob('*') if recursive else path.glob('*'))
            pictures = [
                file
                for file in files
                if file.suffix.lower() in known and file.is_file() and not file.name.startswith('.')
            ]
            if not pictures and len(paths) == 1:
                below = '' if recursive else ' (its subfolders are searched with --recursive)'
                raise UserError(f'{path} has no pictures{below}.')
            # an output folder inside of the input folder is not an input
            inner = _real(output) + os.sep if _real(output).startswith(_real(path) + os.sep) else None
            for file in pictures:
                if inner and _real(file).startswith(inner):
                    continue
                found.setdefault(_real(file), (file, file.relative_to(path), True))
    if not found:
        raise UserError('There is nothing to enlarge.')
    return list(found.values())


def run_jobs(
    upscaler: Upscaler,
    jobs: list[Job],
    quality: int = 95,
    overwrite: bool = False,
    save_mask: bool = False,
    progress: bool | None = None,
) -> Summary:
    """Enlarge every job's input; one that fails is told and counted, the others go on.

    Args:
        upscaler: does the work; its messages go above the progress bar.
        quality: of JPEG and WebP.
        overwrite: redo what exists; otherwise it is skipped.
        save_mask: write the mask's overlay (NAME_mask.png) beside each output.
        progress: show the progress bar; None = only on a terminal.
    """
    start, summary = time.perf_counter(), Summary()
    todo = []
    for job in jobs:
        if not overwrite and job.target != STREAM and Path(job.target).exists():
            summary.skipped += 1
        else:
            todo.append(job)
    bar = _Bar(todo, progress)
    upscaler.say = bar.say
    try:
        for job in todo:
            bar.begin(job)
            try:
                summary.done.append(_run_job(upscaler, job, quality, save_mask, bar))
            except UserError as error:
                message = str(error)
                if str(job.source) not in message and str(job.target) not in message:
                    message = f'{_source_name(job)}: {message}'
                summary.failed.append(message)
                bar.say(f'Failed: {message}')
            bar.end()
    finally:
        bar.close()
    summary.seconds = time.perf_counter() - start
    return summary


def _run_job(upscaler: Upscaler, job: Job, quality: int, save_mask: bool, bar: '_Bar') -> Stats:
    source = sys.stdin.buffer if job.source == STREAM else job.source
    target = sys.stdout.buffer if job.target == STREAM else job.target
    if target != job.target and sys.stdout.isatty():
        raise UserError('-o - writes a PNG to standard output, which is a terminal; redirect it to a file.')
    picture = upscaler.read(source)
    for note in picture.notes:
        bar.say(f'{_source_name(job)}: {note}.')
    stats = upscaler.upscale_file(picture, target, quality, bar.tile)
    if save_mask and stats.mask is not None and job.target != STREAM:
        from ppsr.pictures.visualize import mask_overlay  # brings matplotlib, which nobody else here needs

        pure_pass = getattr(upscaler.net, 'pure_pass', PurePass())
        overlay = mask_overlay(picture.pixels, stats.mask, pure_pass.num_centers)
        path = Path(job.target).with_name(Path(job.target).stem + '_mask.png')
        write_file(path, overlay)
    return stats


class _Bar:
    """Progress over the input pixels of all jobs: images differ in size, so counting them would mislead."""

    def __init__(self, jobs: list[Job], show: bool | None):
        self.sizes = {job: self._pixels(job) for job in jobs}
        self.images, self.started, self.finished = len(jobs), 0, 0.0
        self.job: Job | None = None
        self.bar = tqdm(
            total=max(sum(self.sizes.values()), 1e-9),
            unit='MP',
            disable=None if show is None else not show,
            bar_format='{percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} MP, {elapsed} gone, {remaining} to go{postfix}',
            file=sys.stderr,
        )

    @staticmethod
    def _pixels(job: Job) -> float:
        if job.source == STREAM:
            return 1.0
        try:
            width, height = read_size(job.source)
        except UserError:  # told when its turn comes
            return 0.0
        return width * height / 1e6

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)

    def begin(self, job: Job) -> None:
        self.job, self.started = job, self.started + 1
        self._postfix('')

    def tile(self, done: int, total: int) -> None:
        self._advance(self.finished + self.sizes[self.job] * done / total)
        self._postfix(f', tile {done}/{total}' if total > 1 else '')

    def end(self) -> None:
        self.finished += self.sizes[self.job]
        self._advance(self.finished)

    def _advance(self, to: float) -> None:
        if to > self.bar.n:  # a second try with smaller tiles starts again: the bar waits for it
            self.bar.update(to - self.bar.n)

    def _postfix(self, tile: str) -> None:
        self.bar.set_postfix_str(f'image {self.started}/{self.images} {_source_name(self.job)}{tile}')

    def close(self) -> None:
        self.bar.close()
