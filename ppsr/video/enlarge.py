"""Enlarging a video: :func:`upscale_video` for Python, and what ``ppsr video`` is made of.

Frames are decoded one after the other, enlarged by an :class:`~ppsr.pictures.upscaler.Upscaler` in float, and encoded
in runs that need no frame of another run; each run is a file in a hidden folder beside the output. When all are there,
they are put into the output together with the streams that are copied.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ppsr.errors import UserError
from ppsr.extras import need
from ppsr.images import atomic_file
from ppsr.pictures import side_by_side
from ppsr.pictures.upscaler import Upscaler
from ppsr.tiling import RepeatedTiles, count_tiles
from ppsr.version import __version__
from ppsr.video.colour import rgb_to_planes
from ppsr.video.encoder import CONTAINERS, Encoder, choose_layout
from ppsr.video.finish import Finish
from ppsr.video.segments import Work, describe_file, describe_network
from ppsr.video.source import Frame, Source, clock

__all__ = ['SEGMENT', 'VideoStats', 'check_video', 'upscale_video']

SEGMENT = 96  # frames of a run: a few minutes of work without a GPU, a few seconds of video
HELD = 5  # arrays of the size of a result that are held at once: the result twice, as tiles, and on its way to planes
MOST_REPEATED = 96  # frames of one picture that are handed on together: a long still is not read to its end first


@dataclass
class VideoStats:
    """What became of a video.

    Attributes:
        frames: in the output.
        repeated: of them, those that show exactly what the one before shows; nothing was computed for them.
        tiles: of all frames.
        reused: of them, those that had the pixels of the frame before, repeated frames included.
        gmacs: 10⁹ multiply-adds of the network that were done.
        full_gmacs: what every frame in full takes, in the same tiles.
        resumed: frames that an earlier run had done.
        damaged: parts of the input that could not be decoded.
        seconds: wall-clock of this run.
        tile: side of the tiles in input pixels, 0 = frames were not cut.
        input_size, output_size: (width, height) in pixels.

    All but `resumed`, `damaged` and `seconds` are of the whole video, whatever run did it.
    """

    frames: int = 0
    repeated: int = 0
    tiles: int = 0
    reused: int = 0
    gmacs: float = 0.0
    full_gmacs: float = 0.0
    resumed: int = 0
    damaged: int = 0
    seconds: float = 0.0
    tile: int = 0
    input_size: tuple[int, int] = (0, 0)
    output_size: tuple[int, int] = (0, 0)

    @property
    def reused_share(self) -> float:
        """Share of the tiles that were not computed again, 0 to 1."""
        return self.reused / self.tiles if self.tiles else 0.0

    @property
    def saved_share(self) -> float:
        """Share of the multiply-adds that this saved, 0 to 1; of a network that counts none, :attr:`reused_share`."""
        return 1 - self.gmacs / self.full_gmacs if self.full_gmacs else self.reused_share

    def __str__(self) -> str:
        width, height = self.output_size
        new = self.frames - self.resumed
        parts = [f'{self.frames} frame{"s" * (self.frames != 1)} of {width}×{height}']
        parts.append(f'{self.resumed} of them by an earlier run') if self.resumed else None
        parts.append(f'{new} in {self.seconds:.1f} s ({new / max(self.seconds, 1e-9):.3g} frames/s)')
        if self.reused:
            repeated = f'{self.repeated} frame{"s" * (self.repeated != 1)} repeated'
            parts.append(f'{repeated}, {self.reused_share:.1%} of the tiles not computed again')
        if self.full_gmacs:
            saved = f', {self.saved_share:.1%} saved by repetition' if self.reused else ''
            parts.append(f'{self.gmacs:.4g} GMACs{saved}')
        if self.damaged:
            parts.append(f'{self.damaged} part{"s" * (self.damaged != 1)} of the input damaged and passed over')
        return '; '.join(parts) + '.'


def upscale_video(
    upscaler: Upscaler,
    source: str | os.PathLike,
    target: str | os.PathLike,
    *,
    codec: str | None = None,
    crf: float | None = None,
    preset: str | None = None,
    pix_fmt: str | None = None,
    start: float | Fraction | None = None,
    end: float | Fraction | None = None,
    leave_out: Iterable[str | int] = (),
    segment: int = SEGMENT,
    progress: bool | None = None,
) -> VideoStats:
    """Enlarge a video file into a video file.

    Times, sound, subtitles, attachments (Matroska), chapters, bit depth and colour are kept; a rotation is applied to
    the pixels. The target appears when it is complete, and replaces an older one then. After an interruption the same
    call goes on; what is done lies in a hidden folder beside the target until then.

    Args:
        upscaler: does the work; what it remembers of the last frame is not computed again.
        source: what FFmpeg reads.
        target: .mp4, .m4v, .mov, .mkv or .webm.
        codec: FFmpeg's name of the encoder; None = libx264, for .webm libvpx-vp9.
        crf: quality as the encoder counts it, smaller is better; None = 17 for libx264.
        preset: as the encoder names it.
        pix_fmt: FFmpeg's name of the format of the samples; None = as in the source.
        start, end: seconds from the beginning of the file: frames from `start` on and before `end`.
        leave_out: 'audio', 'subtitles', or numbers of streams.
        segment: frames of a run, which is what an interruption costs at most.
        progress: show the progress bar; None = only on a terminal.

    Returns:
        What was done.

    Raises:
        UserError: anything that the caller can mend; the target is as it was before.
    """
    begun = time.perf_counter()
    encoder, start, end = check_video(source, target, codec, crf, preset, start, end)
    with Source(source, lambda text: upscaler.say(text)) as video:
        job = _Job(upscaler, video, Path(target), encoder, pix_fmt, start, end, leave_out, segment)
        stats = job.run(progress)
    stats.seconds = time.perf_counter() - begun
    return stats


def check_video(
    source: str | os.PathLike,
    target: str | os.PathLike,
    codec: str | None = None,
    crf: float | None = None,
    preset: str | None = None,
    start: float | Fraction | None = None,
    end: float | Fraction | None = None,
) -> tuple[Encoder, Fraction | None, Fraction | None]:
    """What can be said about the arguments of :func:`upscale_video` before there is a network.

    Returns:
        The encoder, and `start` and `end` exactly.

    Raises:
        UserError: as there.
    """
    need('video', 'ppsr video', 'av')
    source, target = Path(source), Path(target)
    with Source(source, lambda text: None):
        pass
    container = CONTAINERS.get(target.suffix.lower())
    if container is None:
        raise UserError(f'{target}: no kind of video that ppsr writes; use one of {", ".join(CONTAINERS)}.')
    if target.is_dir():
        raise UserError(f'{target} is a folder; give the name of a file.')
    start, end = (None if value is None else Fraction(value) for value in (start, end))
    if start is not None and end is not None and start >= end:
        raise UserError(f'--start {clock(start)} is not before --end {clock(end)}.')
    if target.exists() and os.path.samefile(source, target):
        raise UserError(f'{target} is the input itself; choose another name.')
    return Encoder(container, codec, crf, preset), start, end


class _Job:
    """One video; arguments as of :func:`upscale_video`."""

    def __init__(
        self,
        upscaler: Upscaler,
        video: Source,
        target: Path,
        encoder: Encoder,
        pix_fmt: str | None,
        start: Fraction | None,
        end: Fraction | None,
        leave_out: Iterable[str | int],
        segment: int,
    ):
        self.upscaler, self.video, self.target, self.encoder = upscaler, video, target, encoder
        self.start, self.end, self.segment = start, end, segment
        frames = video.frames(start, end)
        first = next(frames, None)
        if first is None:
            raise UserError(self._why_empty())
        self.frames = itertools.chain([first], frames)
        self.input_size = first.size
        self.output_size = tuple(max(1, round(side * upscaler.outscale)) for side in first.size)
        self.layout = choose_layout(encoder.codec, first.layout, pix_fmt, upscaler.say)
        encoder.check(self.layout, self.output_size)
        self.colour = first.colour.written_as(self.layout)
        aspect = video.aspect
        self.aspect = 1 / aspect if aspect and first.turn.transposed else aspect
        self.encoder.open(*self._settings()).encode(None)  # or it is refused after the first run
        self.finish = Finish(video, encoder.container, str(target), self._add_video, start, end, leave_out)
        self.finish.rehearse()

        channels = 1 if first.layout.kind == 'gray' else 3
        shape = (*self.input_size, channels)
        self.held = HELD * 4 * channels * self.output_size[0] * self.output_size[1]
        tile = upscaler.for_frames(shape, self.held).tile
        self.key = {
            'input': describe_file(video.path),
            'network': describe_network(upscaler.net),
            'enlarged': [upscaler.outscale, upscaler.tile, upscaler.tile_overlap, upscaler.dtype, upscaler.device.type],
            'encoded': [encoder.container, encoder.name, encoder.options, self.layout.name, asdict(self.colour)],
            'part': [start, end, segment],
            'versions': [__version__, video.av.__version__, video.av.library_versions],
        }
        self.work = Work(target, self.key, {'tile': tile})
        self._make_frames = lambda tile: upscaler.for_frames(shape, self.held, tile)

    def _why_empty(self) -> str:
        path, length = self.video.path, self.video.duration
        if self.start is None and self.end is None:
            return f'{path} has no frame that can be decoded; it is empty or damaged.'
        if self.start is not None and length is not None and self.start >= length:
            return f'{path} ends at {clock(length)}, before --start {clock(self.start)}.'
        return f'{path} has no frame in the part that --start and --end name.'

    def _settings(self) -> tuple:
        return self.layout, self.colour, self.output_size, self.video.time_base, self.video.rate, self.aspect

    def _add_video(self, container):
        """A stream for the encoded frames."""
        stream = container.add_stream(self.encoder.name, rate=self.video.rate)
        self.encoder.configure(stream.codec_context, *self._settings())
        stream.time_base = self.video.time_base
        return stream

    def run(self, progress: bool | None) -> VideoStats:
        expected = self.video.expected(self.start, self.end)
        say = self.upscaler.say
        with self.work as work:
            for folder in work.others:
                say(f'{folder} holds parts of {self.target.name} with other options; remove it if it is not wanted.')
            stats = VideoStats(tile=self.work.chosen['tile'])
            stats.input_size, stats.output_size = self.input_size[::-1], self.output_size[::-1]
            done = 0
            for packets, about in work.read_all():
                self._count(stats, about)
                stats.resumed += len(packets.pts)
                done += 1
            if stats.resumed:
                say(f'{stats.resumed} frames are done; going on.')
            bar = tqdm(
                total=expected,
                initial=stats.resumed,
                unit='frame',
                disable=None if progress is None else not progress,
                file=sys.stderr,
            )

            def say_above(text: str) -> None:
                with bar.external_write_mode(file=sys.stderr):
                    say(text)

            self.upscaler.say, finished = say_above, False
            try:
                self._enlarge(work, stats, done, bar)
                with atomic_file(self.target) as file:
                    self.finish.write(file, lambda: (packets for packets, _ in work.read_all()))
                finished = True
            finally:
                bar.close()
                self.upscaler.say = say
                if not finished and stats.frames:
                    say(f'{stats.frames} frames of {self.target.name} are done; the same command goes on from there.')
            work.remove()
        stats.damaged = self.video.damaged
        return stats

    def _enlarge(self, work: Work, stats: VideoStats, done: int, bar) -> None:
        """Encode what is not yet done, run by run."""
        enlarged = _Enlarged(self, self._make_frames(work.chosen['tile']), self.held, bar)
        frames = itertools.islice(self.frames, stats.resumed, None)
        with contextlib.closing(enlarged(frames)) as results:
            for index in itertools.count(done):
                run = list(itertools.islice(results, 1))
                if not run:
                    return
                context = self.encoder.open(*self._settings())
                rest = itertools.islice(results, self.segment - 1)
                packets = self.encoder.encode(context, itertools.chain(run, rest))
                about = enlarged.taken()
                work.write(index, packets, about)
                self._count(stats, about)

    @staticmethod
    def _count(stats: VideoStats, about: dict) -> None:
        for name, value in about.items():
            setattr(stats, name, getattr(stats, name) + value)


@dataclass
class _Shown:
    """A picture, and the frames that show it one after another.

    Attributes:
        rgb: as of :meth:`ppsr.video.source.Frame.rgb`, until it is enlarged; None = further frames of the one before.
        times: (pts, duration) of each frame.
        error: what came instead of a frame, to be raised in its turn.
        planes: of the result, for the encoder.
        counted: of the first frame.
        tiles: of one frame.
    """

    rgb: np.ndarray | None = None
    times: list[tuple[int, int]] = field(default_factory=list)
    error: Exception | None = None
    planes: list[np.ndarray] | None = None
    counted: VideoStats | None = None
    tiles: int = 0


class _Enlarged:
    """Enlarges frames, and counts.

    Args:
        job: what they belong to.
        upscaler: cuts all of them in the same way.
        held: bytes that enlarging a frame takes beside the network, the frame for the encoder included.
        bar: shows how far it is.
    """

    def __init__(self, job: _Job, upscaler: Upscaler, held: int, bar):
        self.job, self.upscaler, self.held, self.bar = job, upscaler, held, bar
        self.repeated = RepeatedTiles()
        self.shown = _Shown()  # the last picture that was enlarged
        self.counted = VideoStats()

    def taken(self) -> dict:
        """What was counted since the last call."""
        names = ('frames', 'repeated', 'tiles', 'reused', 'gmacs', 'full_gmacs')
        counted, self.counted = self.counted, VideoStats()
        return {name: getattr(counted, name) for name in names}

    def __call__(self, frames: Iterable[Frame]) -> Iterator:
        """Frames of the source -> frames for the encoder; close it where it may be left early.

        Small ones that are not cut are enlarged side by side, with twice as many pictures as threads in hand at most.
        """
        pictures = self._pictures(frames)
        if self._whole:
            job = self.job
            # each thread has one at work, and one that was read or waits for the encoder, which takes less
            pictures, workers = side_by_side.stream(job.upscaler, pictures, job.input_size, each=2 * self.held)
            if workers > 1:
                done = side_by_side.in_order(self._aside, self._while_whole(pictures), workers, self.upscaler.say)
                with contextlib.closing(done):
                    for shown in done:
                        yield from self._frames(shown)
        for shown in pictures:
            self._enlarge(shown, self.upscaler, self.repeated)
            yield from self._frames(shown)

    @property
    def _whole(self) -> bool:
        """Whether frames are not cut."""
        return count_tiles(*self.job.input_size, self.upscaler.tile, self.upscaler.tile_overlap) == 1

    def _while_whole(self, pictures: Iterator[_Shown]) -> Iterator[_Shown]:
        """Until the memory did not suffice for one of those that are enlarged side by side."""
        while self._whole and (shown := next(pictures, None)) is not None:
            yield shown

    def _pictures(self, frames: Iterable[Frame]) -> Iterator[_Shown]:
        """The pictures that frames show. What reading raises comes in its turn, so that what is before it is kept."""
        shown, last, rgb, failed = _Shown(), None, None, None
        try:
            for frame in frames:
                self._check_size(frame)
                if not frame.repeats(last):
                    before, rgb = rgb, frame.rgb()
                    if before is None or not np.array_equal(rgb, before):  # else other samples of the same colours
                        if shown.times:
                            yield shown
                        shown = _Shown(rgb)
                last = frame
                shown.times.append((frame.pts, frame.duration))
                if len(shown.times) == MOST_REPEATED:
                    yield shown
                    shown = _Shown()
        except Exception as error:  # raised by _enlarge
            failed = _Shown(error=error)
        if shown.times:
            yield shown
        if failed is not None:
            yield failed

    def _check_size(self, frame: Frame) -> None:
        job = self.job
        if frame.size != job.input_size:
            (height, width), (h, w) = job.input_size, frame.size
            at = clock(frame.pts * job.video.time_base - job.video.zero)
            raise UserError(
                f'{job.video.path}: at {at} the picture changes from {width}×{height} to {w}×{h} pixels; do the '
                f'parts by themselves, with --end {at} and with --start {at}.'
            )

    def _aside(self, shown: _Shown, say: Callable[[str], None]) -> _Shown:
        """:meth:`_enlarge` in a thread of its own."""
        self._enlarge(shown, self.upscaler.for_small(say), RepeatedTiles())
        return shown

    def _enlarge(self, shown: _Shown, upscaler: Upscaler, repeated: RepeatedTiles) -> None:
        """Enlarge a picture; what is in `repeated` is not computed again."""
        if shown.error is not None:
            raise shown.error
        if shown.rgb is None:
            return
        asked, reused, macs = repeated.tiles, repeated.reused, repeated.macs
        result, stats = upscaler.upscale_with_stats(shown.rgb, repeated=repeated)
        shown.counted = VideoStats(
            tiles=repeated.tiles - asked,
            reused=repeated.reused - reused,
            gmacs=stats.gmacs,
            full_gmacs=stats.gmacs + (repeated.macs - macs) / 1e9,
        )
        if stats.tile:  # smaller ones, where the memory did not suffice
            self.upscaler.tile = stats.tile
        shown.tiles = count_tiles(*self.job.input_size, stats.tile, upscaler.tile_overlap)
        shown.planes = rgb_to_planes(result, self.job.layout, self.job.colour)
        shown.rgb = None

    def _frames(self, shown: _Shown) -> Iterator:
        """The frames of an enlarged picture for the encoder; they are counted one by one."""
        job, new = self.job, shown.planes is not None
        if new:
            self.shown = shown
        for pts, duration in shown.times:
            self._count(new)
            new = False
            self.bar.update()
            if self.counted.reused:
                self.bar.set_postfix_str(f'{self.counted.reused / self.counted.tiles:.0%} of the tiles reused')
            planes, unit = self.shown.planes, job.video.time_base
            yield job.encoder.frame(planes, job.layout, job.colour, pts, duration, unit)

    def _count(self, new: bool) -> None:
        counted, own = self.counted, self.shown.counted
        counted.frames += 1
        counted.full_gmacs += own.full_gmacs
        if new:
            counted.tiles += own.tiles
            counted.reused += own.reused
            counted.gmacs += own.gmacs
        else:
            counted.repeated += 1
            counted.tiles += self.shown.tiles
            counted.reused += self.shown.tiles
