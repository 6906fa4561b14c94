"""Enlarging many files: which input becomes which output, then one after the other, whatever happens to any of them."""

import contextlib
import glob
import os
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from PIL import Image
from tqdm import tqdm

from ppsr.archs.masked import mask_module
from ppsr.errors import UserError
from ppsr.images import FORMATS, IMAGE_SUFFIXES, Picture, read_header, write_file
from ppsr.pictures.sharing import Alone
from ppsr.pictures.side_by_side import groups, in_order
from ppsr.pictures.upscaler import Stats, Upscaler

__all__ = ['EXTENSIONS', 'STREAM', 'Job', 'Plan', 'Summary', 'exists', 'open_source', 'plan_jobs', 'run_jobs']

STREAM = '-'  # standard input or output
EXTENSIONS = ('auto', 'png', 'jpg', 'webp', 'tiff')
MAX_FOLDERS = 100_000  # folders that link to each other crosswise have more paths than anybody can visit


@dataclass(frozen=True)
class Job:
    """One input and where its results go; STREAM for standard input and output.

    Attributes:
        source: the picture.
        target: the enlarged one.
        mask: the overlay of its mask, where one is wanted.
    """

    source: str | Path
    target: str | Path
    mask: Path | None = None


@dataclass
class Plan:
    """What is to be done, and what was noticed when the inputs were looked for.

    Attributes:
        jobs: in order.
        notes: a sentence for everything that was passed over and is no failure: earlier results, pipes, loops.
        failed: a sentence for everything that should have been an input and could not be: folders that may not be read,
            links that lead nowhere.
        folders: that were looked into.
    """

    jobs: list[Job] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    folders: int = 0


@dataclass
class Summary:
    """What became of the jobs.

    Attributes:
        done: statistics of each enlarged picture.
        masks: masks that were drawn for pictures enlarged earlier.
        skipped: pictures all of whose outputs existed already.
        failed: one sentence for each that failed.
        seconds: wall-clock of the whole run.
    """

    done: list[Stats] = field(default_factory=list)
    masks: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, part: 'Summary') -> None:
        """What became of further jobs."""
        self.done += part.done
        self.masks += part.masks
        self.skipped += part.skipped
        self.failed += part.failed

    @classmethod
    def of(cls, parts: Sequence['Summary'], failed: Iterable[str] = ()) -> 'Summary':
        """One of several, and of further failures."""
        together = cls(failed=list(failed))
        for part in parts:
            together.add(part)
        return together

    def without_pictures(self) -> 'Summary':
        """The same with empty masks: for other processes."""
        done = [replace(s, mask=None if s.mask is None else s.mask[:0]) for s in self.done]
        return replace(self, done=done)

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
        if self.masks:
            parts.append(f'{self.masks} mask{"s" * (self.masks != 1)} drawn for pictures that exist')
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
    save_mask: bool = False,
) -> Plan:
    """Which files are enlarged into which.

    One output per name: a link to a picture is a picture of its own. Results that an earlier run of the same plan left
    beside its pictures, masks included, are no inputs, unless they are named one by one.

    Args:
        inputs: files, folders (their pictures; with `recursive` those of their subfolders, too), globs, or '-'.
        output: a folder; for a single picture also a file name with a picture's extension; or '-'.
        suffix: NAME becomes NAME_suffix; '' keeps the name.
        ext: of the output; 'auto' keeps the input's if we write it (png, jpg, webp, tiff), else png.
        recursive: descend into folders, linked ones included; the tree below each input folder is kept.
        save_mask: plan NAME_mask.png beside each output, too.

    Raises:
        UserError: an input that does not exist, nothing to do, two results of one name, a result that is an input, an
            output that cannot be one.
    """
    if ext not in EXTENSIONS:
        raise UserError(f'{ext!r} is not an extension that can be written; use {", ".join(EXTENSIONS)}.')
    if os.sep in suffix or '/' in suffix:
        raise UserError(f'The suffix {suffix!r} must not contain a path separator.')
    is_file = _is_file_name(output)
    plan = Plan()
    found = _find(inputs, output, recursive, plan)
    if output == STREAM or is_file:
        if len(found) > 1:
            raise UserError(f'{len(found)} inputs cannot go to one output ({output}); give a folder as output.')
        targets = [output if output == STREAM else Path(output)]
    else:
        targets = [Path(output) / _target_name(item.relative, suffix, ext) for item in found]
    masks = [None if target == STREAM else target.with_name(f'{target.stem}_mask.png') for target in targets]

    if suffix:
        searched = {_place(item.source) for item in found if item.searched}
        earlier = searched & {_place(path) for path in (*targets, *masks) if path not in (None, STREAM)}
        if earlier:
            names = sorted(os.path.basename(path) for path in earlier)
            shown = ', '.join(names[:3]) + (', …' if len(names) > 3 else '')
            plan.notes.append(f'{shown}: results of an earlier run are no inputs.')
    else:
        earlier = set()
    once = {}  # one file named in two ways, for one result
    for item, target, mask in zip(found, targets, masks):
        place = STREAM if item.source == STREAM else _place(item.source)
        if place not in earlier:
            once.setdefault((place, target), Job(item.source, target, mask if save_mask else None))
    plan.jobs = list(once.values())
    _refuse_collisions(plan.jobs)
    return plan


def _refuse_collisions(jobs: list[Job]) -> None:
    sources = [job.source for job in jobs if job.source != STREAM]
    inputs = {_place(source) for source in sources} | {os.path.realpath(source) for source in sources}
    taken: dict[str, Job] = {}
    for job in jobs:
        for result in (job.target, job.mask):
            if result in (None, STREAM):
                continue
            place = _place(result)
            if place in inputs or os.path.realpath(result) in inputs:
                raise UserError(f'{result} is an input itself; choose another output folder or a --suffix.')
            if place in taken:
                other = 'itself' if taken[place] is job else taken[place].source
                raise UserError(
                    f'{result} would be made of {job.source} and of {other}; run them apart, or with another --suffix.'
                )
            taken[place] = job


def _source_name(job: Job) -> str:
    return 'standard input' if job.source == STREAM else str(job.source)


def _place(path) -> str:
    """A name in a folder, however the way to it is written; what it links to does not matter."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(os.path.realpath(folder), name)


def exists(path: str | Path) -> bool:
    """Whether a result is there already.

    Raises:
        UserError: a folder is, which nobody can skip or replace.
    """
    if os.path.isdir(path):
        raise UserError(f'{path} is a folder; move it away, or choose another name for the picture.')
    return os.path.lexists(path)


def _target_name(relative: Path, suffix: str, ext: str) -> Path:
    own = relative.suffix.lower()
    extension = (relative.suffix if own in FORMATS else '.png') if ext == 'auto' else f'.{ext}'
    return relative.with_name(relative.stem + (f'_{suffix}' if suffix else '') + extension)


def _is_file_name(output: str) -> bool:
    """Whether the output is one picture's file name, not a folder; UserError if it can be neither."""
    if output == STREAM:
        return False
    try:
        mode = os.stat(output).st_mode
    except FileNotFoundError:
        mode = None
    except (OSError, ValueError) as error:  # a name that is too long, a folder that may not be entered, a NUL
        raise UserError(f'{_short(output)} cannot be written: {getattr(error, "strerror", None) or error}.') from None
    extension = Path(output).suffix.lower()
    if output.endswith(os.sep) or (mode is not None and stat.S_ISDIR(mode)):
        return False
    if extension in FORMATS:
        return True
    if extension in Image.registered_extensions() or extension in IMAGE_SUFFIXES:
        raise UserError(
            f'{output}: cannot write that kind of file; use one of {", ".join(FORMATS)} (or {output}{os.sep} for a '
            'folder of that name).'
        )
    if mode is not None:
        raise UserError(f'{output} is no folder; give a folder, or a file name with one of {", ".join(FORMATS)}.')
    return False


def _short(text: str) -> str:
    return text if len(text) < 80 else f'{text[:60]}…'


@dataclass(frozen=True)
class _Found:
    """An input: its path, its path below the output folder, and whether it was searched for or named."""

    source: str | Path
    relative: Path
    searched: bool


def _find(inputs: Iterable[str], output: str, recursive: bool, plan: Plan) -> list[_Found]:
    """Every input once, in order."""
    found: dict[str, _Found] = {}
    for text in inputs:
        if text == STREAM:
            found.setdefault(STREAM, _Found(STREAM, Path('stdin.png'), False))
            continue
        paths, searched = [Path(text)], False
        if not os.path.exists(text):
            if not glob.has_magic(text) or os.path.lexists(text):
                raise UserError(_why_missing(text))
            paths, searched = [Path(match) for match in sorted(glob.glob(text, recursive=True))], True
            if not paths:
                raise UserError(f'{_short(text)} matches no file.')
        for path in paths:
            if not os.path.isdir(path):
                if not os.path.exists(path):
                    plan.failed.append(_why_missing(str(path)))
                else:
                    found.setdefault(os.path.abspath(path), _Found(path, Path(path.name), searched))
                continue
            # an output folder inside of the input folder is not an input
            inner = None if output == STREAM else os.path.realpath(output)
            inner = None if inner == os.path.realpath(path) else inner
            told = len(plan.failed)
            pictures = sorted(_walk(path, recursive, inner, plan))
            if not pictures and len(paths) == 1 and len(plan.failed) == told:
                below = '' if recursive else ' (its subfolders are searched with --recursive)'
                raise UserError(f'{path} has no pictures{below}.')
            for file in pictures:
                found.setdefault(os.path.abspath(file), _Found(file, file.relative_to(path), True))
    if not found:
        raise UserError(plan.failed[0] if plan.failed else 'There is nothing to enlarge.')
    return list(found.values())


def _why_missing(text: str) -> str:
    try:
        os.stat(text)
        return f'{_short(text)} cannot be opened.'
    except FileNotFoundError:
        return f'{text} is a link that leads nowhere.' if os.path.islink(text) else f'{_short(text)} does not exist.'
    except (OSError, ValueError) as error:
        return f'{_short(text)} cannot be opened: {getattr(error, "strerror", None) or error}.'


def _walk(folder: Path, recursive: bool, inner: str | None, plan: Plan, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The pictures of a folder, in any order; what is passed over is noted in the plan."""
    real = os.path.realpath(folder)
    if any(path == real or path.startswith(os.path.join(real, '')) for path in above):
        plan.notes.append(f'{folder} is a link to a folder that it lies in: it is not followed.')
        return
    if real == inner:
        return
    plan.folders += 1
    if plan.folders > MAX_FOLDERS:
        raise UserError(f'{folder} is one of more than {MAX_FOLDERS:,} folders; give a part of them.')
    try:
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        plan.failed.append(f'{folder} cannot be read: {error.strerror}.')
        return
    for entry in entries:
        path = folder / entry.name
        if entry.is_dir():
            if recursive:
                yield from _walk(path, recursive, inner, plan, (*above, real))
            continue
        if os.path.splitext(entry.name)[1].lower() not in IMAGE_SUFFIXES or entry.name.startswith('.'):
            continue
        if entry.is_file():
            yield path
        elif os.path.exists(path):
            plan.notes.append(f'{path} is a pipe, a socket or a device: it is passed over.')
        else:
            plan.failed.append(_why_missing(str(path)))


def open_source(source: str | Path) -> str | Path | BinaryIO:
    """What to read a picture from: the path itself, or all of a stream (standard input, a pipe), which comes only once.

    Raises:
        UserError: standard input is closed or cannot be read.
    """
    if source == STREAM:
        if sys.stdin is None:
            raise UserError('Standard input is closed; pipe a picture into it.')
        return sys.stdin.buffer
    try:
        return open(source, 'rb') if stat.S_ISFIFO(os.stat(source).st_mode) else source
    except OSError:
        return source  # the reader says what is wrong with it


def run_jobs(
    upscaler: Upscaler,
    plan: Plan,
    quality: int = 95,
    overwrite: bool = False,
    progress: bool | None = None,
    crew: Alone | None = None,
) -> Summary:
    """Enlarge every job's input; one that fails is told and counted, the others go on.

    A picture that is there is not made again, nor is a mask; where only one of the two is missing, only that is made.

    Args:
        upscaler: does the work; its messages go above the progress bar meanwhile.
        plan: of :func:`plan_jobs`.
        quality: of JPEG and WebP.
        overwrite: redo what exists; otherwise it is skipped.
        progress: show the progress bar; None = only on a terminal.
        crew: processes that share the jobs; the summary of the first is that of all. None: this one alone.
    """
    crew = crew or Alone()
    start, summary = time.perf_counter(), Summary(failed=list(plan.failed) if crew.is_first else [])
    jobs, notes = plan.jobs, list(plan.notes)
    if any(job.mask for job in jobs) and not upscaler.has_mask:
        notes.append('This network exempts no pixels: there are no masks to save.')
        jobs = [replace(job, mask=None) for job in jobs]
    todo = crew.from_first(lambda: [job for job in jobs if not _is_done(job, overwrite)])  # once: results appear later
    summary.skipped = len(jobs) - len(todo) if crew.is_first else 0
    bar = _Bar(todo, progress, crew)
    before, upscaler.say = upscaler.say, bar.say
    try:
        for note in (*notes, *(f'Failed: {sentence}' for sentence in plan.failed)) if crew.is_first else ():
            bar.say(note)
        # processes that share the jobs are side by side already, and each says which job it is at
        runs = groups(upscaler, todo, bar.shapes.__getitem__) if crew.size == 1 else [(todo, 1)]
        for run, workers in runs:
            if workers > 1:
                _run_side_by_side(upscaler, run, workers, quality, overwrite, bar, summary)
                continue
            for job in crew.take(run, _source_name):
                bar.begin(job)
                summary.add(_attempt(upscaler, job, quality, overwrite, bar.tile))
                bar.end()
        parts, lost = crew.gather(summary.without_pictures(), bar.show)
        for sentence in lost:
            bar.say(f'Failed: {sentence}')
    finally:
        upscaler.say = before
        bar.close()
    if len(parts) > 1 or lost:
        summary = Summary.of(parts, lost)
    summary.seconds = time.perf_counter() - start
    return summary


def _is_done(job: Job, overwrite: bool) -> bool:
    """Whether all results of a job are there and are kept."""
    try:
        done = [not overwrite and exists(path) for path in (job.target, job.mask) if path not in (None, STREAM)]
    except UserError:  # told when its turn comes
        return False
    return bool(done) and all(done)


def _run_side_by_side(
    upscaler: Upscaler, jobs: list[Job], workers: int, quality: int, overwrite: bool, bar: '_Bar', summary: Summary
) -> None:
    """Small pictures in threads."""

    def work(job: Job, say: Callable[[str], None]) -> Summary:
        return _attempt(upscaler.for_small(say), job, quality, overwrite)

    with contextlib.closing(in_order(work, jobs, workers, bar.say)) as outcomes:
        for job, part in zip(jobs, outcomes):
            bar.begin(job)
            summary.add(part)
            bar.end()


def _attempt(
    upscaler: Upscaler, job: Job, quality: int, overwrite: bool, on_tile: Callable[[int, int], None] | None = None
) -> Summary:
    """What became of one job; a failure is told."""
    summary = Summary()
    try:
        _run_job(upscaler, job, quality, overwrite, on_tile, summary)
    except UserError as error:
        message = str(error)
        if str(job.source) not in message and str(job.target) not in message:
            message = f'{_source_name(job)}: {message}'
        summary.failed.append(message)
        upscaler.say(f'Failed: {message}')
    return summary


def _run_job(
    upscaler: Upscaler,
    job: Job,
    quality: int,
    overwrite: bool,
    on_tile: Callable[[int, int], None] | None,
    summary: Summary,
) -> None:
    target = job.target
    if target == STREAM:
        if sys.stdout.isatty():
            raise UserError('-o - writes a PNG to standard output, which is a terminal; redirect it to a file.')
        target = sys.stdout.buffer
    picture = upscaler.read(open_source(job.source))
    for note in picture.notes:
        upscaler.say(f'{_source_name(job)}: {note}.')
    if job.target != STREAM and not overwrite and exists(job.target):  # then its mask is missing
        _save_mask(upscaler, picture, upscaler.mask(picture.pixels), job.mask)
        summary.masks += 1
        return
    stats = upscaler.upscale_file(picture, target, quality, on_tile)
    summary.done.append(stats)
    if job.mask is None:
        return
    if not overwrite and exists(job.mask):
        upscaler.say(f'{job.mask} exists and is kept (--overwrite replaces it).')
        return
    _save_mask(upscaler, picture, stats.mask, job.mask)


def _save_mask(upscaler: Upscaler, picture: Picture, mask, path: Path) -> None:
    from ppsr.pictures.visualize import mask_overlay  # brings matplotlib, which nobody else here needs

    write_file(path, mask_overlay(picture.pixels, mask, mask_module(upscaler.net)))


class _Bar:
    """Progress over the input pixels of all jobs: images differ in size, so counting them would mislead."""

    def __init__(self, jobs: list[Job], show: bool | None, crew: Alone):
        self.crew, show = crew, show if crew.is_first else False
        self.shapes = {job: self._shape(job) for job in jobs}  # (H, W), None = unknown
        self.sizes = {job: self._pixels(job) for job in jobs}
        self.images, self.started, self.mine = len(jobs), 0, 0.0  # of the picture that is being made
        self.job: Job | None = None
        self.bar = tqdm(
            total=max(sum(self.sizes.values()), 1e-9),
            unit='MP',
            disable=None if show is None else not show,
            bar_format='{percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} MP, {elapsed} gone, {remaining} to go{postfix}',
            file=sys.stderr,
        )

    @staticmethod
    def _comes_once(job: Job) -> bool:
        return job.source == STREAM or not os.path.isfile(job.source)

    @classmethod
    def _shape(cls, job: Job) -> tuple[int, int] | None:
        if cls._comes_once(job):  # not looked at twice
            return None
        try:
            return read_header(job.source).upright
        except UserError:  # told when its turn comes
            return None

    def _pixels(self, job: Job) -> float:
        shape = self.shapes[job]
        if shape is None:
            return 1.0 if self._comes_once(job) else 0.0
        return shape[0] * shape[1] / 1e6

    def say(self, text: str) -> None:
        self.bar.write(text, file=sys.stderr)

    def begin(self, job: Job) -> None:
        self.job, self.started, self.mine = job, self.started + 1, 0.0
        self._postfix('')

    def tile(self, done: int, total: int) -> None:
        self._advance(self.sizes[self.job] * done / total)
        self._postfix(f', tile {done}/{total}' if total > 1 else '')

    def end(self) -> None:
        self._advance(self.sizes[self.job])

    def show(self, work: float) -> None:
        """What all processes have done."""
        self.bar.update(work - self.bar.n)

    def _advance(self, to: float) -> None:
        """So much of this picture is done. A second try with smaller tiles starts again: the bar waits for it."""
        if to > self.mine:
            self.show(self.crew.advance(to - self.mine))
            self.mine = to

    def _postfix(self, tile: str) -> None:
        which = f'image {self.started}/{self.images}' if self.crew.size == 1 else f'{self.images} images, here'
        self.bar.set_postfix_str(f'{which} {_source_name(self.job)}{tile}')

    def close(self) -> None:
        self.bar.close()
