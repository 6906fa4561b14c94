"""Reading a video: its frames, upright and with their times, and the packets of the streams that are copied."""

import contextlib
import math
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from ppsr.errors import UserError
from ppsr.extras import need
from ppsr.video.colour import Colour, Layout, planes_of, planes_to_rgb

__all__ = ['Frame', 'Source', 'clock']

PROGRESSIVE = (0, 1)  # AVFieldOrder: not said, and not interlaced


def clock(seconds: Fraction | float) -> str:
    """A time as people write it, to the millisecond before it: what is cut there begins with what is at that time.

    >>> clock(3725.5)
    '1:02:05.5'
    """
    minutes, rest = divmod(math.floor(seconds * 1000) / 1000, 60)
    hours, minutes = divmod(int(minutes), 60)
    return f'{hours}:{minutes:02}:{rest:06.3f}'.rstrip('0').rstrip('.')


@dataclass(frozen=True)
class Turn:
    """How a frame is turned before it is shown: exchanged axes first, then mirrored ones.

    >>> Turn.of([0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30])  # a quarter clockwise
    Turn(transposed=True, flip_rows=False, flip_columns=True)
    """

    transposed: bool = False
    flip_rows: bool = False
    flip_columns: bool = False

    @classmethod
    def of(cls, matrix) -> 'Turn | None':
        """Of a display matrix (9 numbers, as FFmpeg has it); None where it is no turn by quarters."""
        a, b, _, c, d = (int(value) for value in matrix[:5])
        if abs(a) > abs(b):
            small, turn = (b, c), cls(False, d < 0, a < 0)
        else:
            small, turn = (a, d), cls(True, b < 0, c < 0)
        return turn if max(map(abs, small)) * 100 < max(abs(a), abs(b)) else None

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """Applied to (H, W, C)."""
        if self.transposed:
            pixels = pixels.transpose(1, 0, 2)
        rows, columns = (slice(None, None, -1 if flip else 1) for flip in (self.flip_rows, self.flip_columns))
        return pixels[rows, columns]


@dataclass(frozen=True)
class Frame:
    """One frame as it was decoded.

    Attributes:
        pts: when it is shown, in the time base of the stream.
        duration: how long, 0 = until the next.
        planes: its samples.
        layout, colour: what they are.
        turn: how it is turned.
    """

    pts: int
    duration: int
    planes: list[np.ndarray]
    layout: Layout
    colour: Colour
    turn: Turn

    def rgb(self) -> np.ndarray:
        """(H, W, 3) float32 in [0, 1], upright; gray (H, W, 1)."""
        return np.ascontiguousarray(self.turn(planes_to_rgb(self.planes, self.layout, self.colour)))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), upright."""
        size = self.planes[0].shape
        return size[::-1] if self.turn.transposed else size

    def repeats(self, other: 'Frame | None') -> bool:
        """Whether it shows exactly what the other one shows."""
        if other is None or (self.layout, self.colour, self.turn) != (other.layout, other.colour, other.turn):
            return False
        return all(map(np.array_equal, self.planes, other.planes))


class Source:
    """A video file, opened; a context manager.

    Args:
        path: of the file.
        say: receives sentences about what cannot be kept.

    Attributes:
        stream: the video that is enlarged.
        time_base: of its timestamps, seconds.
        rate: frames per second, on average.
        zero: time at which the file begins, in seconds; --start and --end count from there.
        damaged: parts that could not be decoded.

    Raises:
        UserError: not a file, not a video, no picture that moves.
    """

    def __init__(self, path: str | os.PathLike, say: Callable[[str], None]):
        (self.av,) = need('video', 'ppsr video', 'av')
        self.path, self.say, self.damaged = Path(path), say, 0
        self._said: set[str] = set()
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise UserError(f'{path} is not a file; give a video file.')
            self._file = open(path, 'rb')  # noqa: SIM115 (close() does)
        except OSError as error:
            raise UserError(f'{path} cannot be opened: {error.strerror}.') from None
        try:
            self._container = self._open(self._file)
            self._choose()
        except BaseException:
            self._file.close()
            raise

    def _open(self, file):
        """The container. A playlist in the guise of a video must not open other files or addresses."""

        def refuse(url: str, flags: int, options: dict):
            raise UserError(f'{self.path} is a list of other files ({url[:100]}), not a video; give a video file.')

        try:
            options = {'protocol_whitelist': 'none'}  # for what opens others without asking
            return self.av.open(file, container_options=options, metadata_errors='replace', io_open=refuse)
        except (self.av.error.FFmpegError, OSError, ValueError) as error:
            if not os.fstat(file.fileno()).st_size:
                raise UserError(f'{self.path} is empty.') from None
            reason = getattr(error, 'strerror', None) or error
            raise UserError(f'{self.path} is not a video, or it is damaged ({reason}).') from None

    def _choose(self) -> None:
        container = self._container
        if container.format.name.endswith('_pipe') or container.format.name == 'image2':
            raise UserError(f'{self.path} is a picture, not a video; ppsr upscale enlarges pictures.')
        cover = self.av.stream.Disposition.attached_pic
        moving = [s for s in container.streams.video if not s.disposition & cover]
        if not moving:
            what = 'sound only' if container.streams.audio else 'no video'
            raise UserError(f'{self.path} holds {what}; there is nothing to enlarge.')
        self.stream = stream = moving[0]
        if stream.codec_context is None or not stream.time_base:
            raise UserError(f'{self.path}: its video is in a format that PyAV cannot decode.')
        stream.thread_type = 'AUTO'
        self.time_base = Fraction(stream.time_base)
        self.rate = Fraction(stream.average_rate or stream.guessed_rate or 25)
        self.zero = Fraction(container.start_time or 0, self.av.time_base)
        self._frames = stream.frames

    def close(self) -> None:
        self._container.close()
        self._file.close()

    def __enter__(self) -> 'Source':
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def once(self, sentence: str) -> None:
        """Say something that holds for many frames."""
        if sentence not in self._said:
            self._said.add(sentence)
            self.say(f'{self.path}: {sentence}.')

    @property
    def duration(self) -> Fraction | None:
        """Seconds of the file, as it says; None where it does not."""
        length = self._container.duration
        return None if length is None else Fraction(length, self.av.time_base)

    def expected(self, start: Fraction | None, end: Fraction | None) -> int | None:
        """About how many frames there are from `start` to `end`; None = the file does not say."""
        length = self.duration
        if start is None and end is None and self._frames:
            return self._frames
        if length is None and end is None:
            return None
        stop = min(value for value in (length, end) if value is not None)
        return max(1, math.ceil((stop - (start or 0)) * self.rate))

    def frames(self, start: Fraction | None = None, end: Fraction | None = None) -> Iterator[Frame]:
        """The frames that are shown from `start` on and before `end` (seconds from the beginning of the file).

        Raises:
            UserError: a frame whose colours cannot be converted.
        """
        reformatter = self.av.video.reformatter.VideoReformatter()
        last, step = None, max(1, round(1 / self.rate / self.time_base))
        for decoded in self._decoded():
            pts = decoded.pts
            if pts is None:  # a bare stream has no times
                pts = 0 if last is None else last + step
            elif last is not None and pts <= last:
                self.once('some frames have the time of the one before; they are moved by the smallest step')
                pts = last + 1
            last = pts
            time = pts * self.time_base - self.zero
            if start is not None and time < start:
                continue
            if end is not None and time >= end:
                return
            yield self._frame(decoded, pts, reformatter)
        if last is not None and self.stream.duration is not None:
            promised = (self.stream.start_time or 0) + self.stream.duration
            if (promised - last) * self.time_base > 1 + 2 / self.rate:
                self.damaged += 1
                ends = clock(last * self.time_base - self.zero)
                self.once(f'its last frame is at {ends}, and it says to be longer: it is cut off or damaged')

    def _decoded(self) -> Iterator:
        """Frames of PyAV; what is damaged is counted and passed over."""
        packets = self._container.demux(self.stream)
        while True:
            try:
                packet = next(packets, None)
            except self.av.error.FFmpegError:
                self.damaged += 1
                return  # the rest cannot be read
            if packet is None:
                return
            try:
                yield from packet.decode()
            except self.av.error.EOFError:
                return
            except self.av.error.FFmpegError:
                self.damaged += 1

    def _frame(self, decoded, pts: int, reformatter) -> Frame:
        layout = Layout.of(decoded.format)
        if layout.alpha:
            self.once('its transparency is not kept')
        if decoded.interlaced_frame or self.stream.codec_context.field_order not in PROGRESSIVE:
            self.once('it is interlaced, and both fields are enlarged as one picture; deinterlace it first for more')
        if decoded.is_corrupt:
            self.damaged += 1
        colour = Colour.of(decoded, layout)
        turn = Turn()
        matrix = decoded.side_data.get(self.av.sidedata.sidedata.Type.DISPLAYMATRIX)
        if matrix is not None:
            turn = Turn.of(np.frombuffer(bytes(matrix), '=i4'))
            if turn is None:
                self.once('its rotation is not by quarters and is left out')
                turn = Turn()
        planes = planes_of(decoded, layout, reformatter)
        return Frame(pts, decoded.duration or 0, planes, layout, colour, turn)

    @property
    def aspect(self) -> Fraction | None:
        """Width of a pixel by its height, as it is stored; None = not said."""
        ratio = self.stream.sample_aspect_ratio or self.stream.codec_context.sample_aspect_ratio
        return Fraction(ratio) if ratio else None

    @property
    def about(self) -> dict[str, str]:
        """Title, author and so on of the file."""
        own = ('major_brand', 'minor_version', 'compatible_brands', 'encoder')
        return {key: value for key, value in self._container.metadata.items() if key.lower() not in own}

    @property
    def streams(self):
        """All streams, in order."""
        return self._container.streams

    @property
    def chapters(self) -> list[dict]:
        return self._container.chapters()

    @contextlib.contextmanager
    def packets(self, streams) -> Iterator[Iterator]:
        """The packets of some streams, from the beginning; what cannot be read ends them."""

        def read(container) -> Iterator:
            wanted = [container.streams[stream.index] for stream in streams]
            with contextlib.suppress(self.av.error.FFmpegError):
                for packet in container.demux(wanted) if wanted else ():
                    if packet.size or packet.pts is not None:  # else the sign of the end
                        yield packet

        with open(self.path, 'rb') as file:
            container = self._open(file)
            try:
                yield read(container)
            finally:
                container.close()
