"""Enlarging a video: :func:`upscale_video` for Python, and what ``ppsr video`` is made of.

Frames are decoded one after the other, enlarged by an :class:`~ppsr.pictures.upscaler.Upscaler` in float, and encoded
in runs that need no frame of another run; each run is a file in a hidden folder beside the output. When all are there,
they are put into the output together with the streams that are copied.
"""

import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ppsr.errors import UserError
from ppsr.extras import need
from ppsr.images import atomic_file
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
        held = HELD * 4 * channels * self.output_size[0] * self.output_size[1]
        tile = upscaler.for_frames(shape, held).tile
        self.key = {
            'input': describe_file(video.path),
            'network': describe_network(upscaler.net),
            'enlarged': [upscaler.outscale, upscaler.tile, upscaler.tile_overlap, upscaler.dtype, upscaler.device.type],
            'encoded': [encoder.container, encoder.name, encoder.options, self.layout.name, asdict(self.colour)],
            'part': [start, end, segment],
            'versions': [__version__, video.av.__version__, video.av.library_versions],
        }
        self.work = Work(target, self.key, {'tile': tile})
        self._make_frames = lambda tile: upscaler.for_frames(shape, held, tile)

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
        enlarged = _Enlarged(self, self._make_frames(work.chosen['tile']), bar)
        frames = itertools.islice(self.frames, stats.resumed, None)
        for index in itertools.count(done):
            run = list(itertools.islice(frames, 1))
            if not run:
                return
            context = self.encoder.open(*self._settings())
            rest = itertools.islice(frames, self.segment - 1)
            packets = self.encoder.encode(context, enlarged(itertools.chain(run, rest)))
            about = enlarged.taken()
            work.write(index, packets, about)
            self._count(stats, about)

    @staticmethod
    def _count(stats: VideoStats, about: dict) -> None:
        for name, value in about.items():
            setattr(stats, name, getattr(stats, name) + value)


class _Enlarged:
    """Enlarges frames, and counts."""

    def __init__(self, job: _Job, upscaler: Upscaler, bar):
        self.job, self.upscaler, self.bar = job, upscaler, bar
        self.repeated = RepeatedTiles()
        self.last: Frame | None = None
        self.planes: list[np.ndarray] = []  # of the last result
        self.gmacs = 0.0  # of the last frame in full
        self.counted = VideoStats()

    def taken(self) -> dict:
        """What was counted since the last call."""
        names = ('frames', 'repeated', 'tiles', 'reused', 'gmacs', 'full_gmacs')
        counted, self.counted = self.counted, VideoStats()
        return {name: getattr(counted, name) for name in names}

    def __call__(self, frames: Iterable[Frame]) -> Iterator:
        """Frames of the source -> frames for the encoder."""
        job, unit = self.job, self.job.video.time_base
        for frame in frames:
            if frame.size != job.input_size:
                (height, width), (h, w) = job.input_size, frame.size
                at = clock(frame.pts * unit - job.video.zero)
                raise UserError(
                    f'{job.video.path}: at {at} the picture changes from {width}×{height} to {w}×{h} pixels; do the '
                    f'parts by themselves, with --end {at} and with --start {at}.'
                )
            self._enlarge(frame)
            self.bar.update()
            if self.counted.reused:
                self.bar.set_postfix_str(f'{self.counted.reused / self.counted.tiles:.0%} of the tiles reused')
            yield job.encoder.frame(self.planes, job.layout, job.colour, frame.pts, frame.duration, unit)

    def _enlarge(self, frame: Frame) -> None:
        job, counted = self.job, self.counted
        counted.frames += 1
        tiles = count_tiles(*job.input_size, self.upscaler.tile, self.upscaler.tile_overlap)
        if frame.repeats(self.last):
            counted.repeated += 1
            counted.tiles += tiles
            counted.reused += tiles
            counted.full_gmacs += self.gmacs
            return
        asked, reused, macs = self.repeated.tiles, self.repeated.reused, self.repeated.macs
        result, stats = self.upscaler.upscale_with_stats(frame.rgb(), repeated=self.repeated)
        self.gmacs = stats.gmacs + (self.repeated.macs - macs) / 1e9
        counted.tiles += self.repeated.tiles - asked
        counted.reused += self.repeated.reused - reused
        counted.gmacs += stats.gmacs
        counted.full_gmacs += self.gmacs
        if stats.tile:  # smaller ones, where the memory did not suffice
            self.upscaler.tile = stats.tile
        self.planes = rgb_to_planes(result, job.layout, job.colour)
        self.last = frame
