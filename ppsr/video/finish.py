"""The file itself: the encoded frames, and beside them sound and subtitles as they came."""

import heapq
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from typing import BinaryIO

from ppsr.errors import UserError
from ppsr.video.encoder import Packets
from ppsr.video.source import Source

__all__ = ['Finish', 'decoding_times']

KINDS = {'audio': 'sound', 'subtitle': 'subtitles', 'attachment': 'an attachment', 'data': 'data', 'video': 'video'}


class Finish:
    """Writes the output.

    Args:
        source: what the other streams are copied from.
        container: FFmpeg's name of the format.
        target: name of the output, for messages.
        prepare: adds the video stream to a container and returns it.
        start, end: what is kept, in seconds from the beginning; None = all.
        leave_out: 'audio', 'subtitles', and numbers of streams.

    Raises:
        UserError: no stream of that number.
    """

    def __init__(
        self,
        source: Source,
        container: str,
        target: str,
        prepare: Callable,
        start: Fraction | None = None,
        end: Fraction | None = None,
        leave_out: Iterable[str | int] = (),
    ):
        self.av, self.source, self.container, self.target = source.av, source, container, target
        self.prepare, self.end = prepare, end
        # times are kept; of a part they begin at 0
        self.start = start
        self.shift = Fraction(0) if start is None else start + source.zero
        out = {str(word) for word in leave_out}
        numbers = {str(stream.index) for stream in source.streams}
        for word in sorted(out - numbers - {'audio', 'subtitles'}):
            raise UserError(
                f'{source.path} has no stream {word}; --leave-out takes audio, subtitles, or numbers from 0 to '
                f'{len(numbers) - 1}.'
            )
        if str(source.stream.index) in out:
            raise UserError(f'Stream {source.stream.index} is the video that is enlarged; it cannot be left out.')
        names = {'audio': 'audio', 'subtitle': 'subtitles'}
        self.copied = []
        for stream in source.streams:
            if stream is source.stream or str(stream.index) in out or names.get(stream.type) in out:
                continue
            if stream.type in names or (stream.type == 'attachment' and container == 'matroska'):
                self.copied.append(stream)
            else:
                source.once(f'stream {stream.index} ({_name(stream)}) is not copied')

    def rehearse(self) -> None:
        """See whether the format takes the streams: each beside the video, sound with a packet, and all together.

        Raises:
            UserError: it does not; says which, and how to leave it out.
        """
        for streams in (*([stream] for stream in self.copied), self.copied):
            try:
                container, _, copies = self._begin(io.BytesIO(), streams)
                sound = [stream for stream in streams if stream.type == 'audio'][:1]
                with self.source.packets(sound) as found:
                    for _, packet in itertools.islice(self._copies(found, copies), 1):
                        container.mux_one(packet)
                container.close()
            except self.av.error.FFmpegError as error:
                if len(streams) == 1:
                    raise self._refused(streams[0]) from None
                raise self._refused_all(error) from None

    def write(self, file: BinaryIO, runs: Callable[[], Iterable[Packets]]) -> None:
        """Write everything.

        Args:
            file: open for writing.
            runs: gives the encoded frames, each time that it is called from the beginning.

        Raises:
            UserError: the format refuses what is written.
            OSError: the file cannot be written.
        """
        try:
            container, video, copies = self._begin(file, self.copied)
            with self.source.packets(self.copied) as found:
                video_packets = self._video(container, video, runs)
                for _, packet in heapq.merge(video_packets, self._copies(found, copies), key=lambda item: item[0]):
                    container.mux_one(packet)
            container.close()
        except self.av.error.FFmpegError as error:
            if isinstance(error, OSError):  # a full disk
                raise
            raise self._refused_all(error) from None

    def _begin(self, file: BinaryIO, streams: list):
        """The container with its header written, its video stream, and the copies of some streams by their number."""
        container = self.av.open(file, 'w', format=self.container, container_options=self._options())
        container.metadata.update(self.source.about)
        try:
            video = self.prepare(container)
        except ValueError:
            raise UserError(f'{self.target}: {self.container} holds no such video; choose another --codec.') from None
        own = self.source.stream
        video.metadata.update({key: own.metadata[key] for key in ('language', 'title') if key in own.metadata})
        video.disposition = own.disposition
        copies = {}
        for stream in streams:
            try:
                copy = container.add_stream_from_template(stream)
                copy.metadata.update(stream.metadata)
                copy.disposition = stream.disposition
            except (ValueError, self.av.error.FFmpegError):
                raise self._refused(stream) from None
            copies[stream.index] = copy
        if self.source.chapters:
            container.set_chapters(self._chapters())
        container.start_encoding()
        return container, video, copies

    def _options(self) -> dict[str, str]:
        """Of the muxer. MP4 says in a unit of the whole file when a stream begins, a millisecond unless told otherwise;
        and it can only be told a whole number."""
        if self.container not in ('mp4', 'mov'):
            return {}
        unit = self.source.time_base.denominator
        every = math.lcm(unit, *(stream.time_base.denominator for stream in self.copied))
        return {'movie_timescale': str(next((n for n in (every, unit) if 1000 <= n < 10_000_000), 1000))}

    def _refused(self, stream) -> UserError:
        return UserError(
            f'{self.target}: {self.container} cannot hold stream {stream.index} of {self.source.path} '
            f'({_name(stream)}); leave it out with --leave-out {stream.index}, or write another kind of file.'
        )

    def _refused_all(self, error) -> UserError:
        streams = ', '.join(f'{stream.index} ({_name(stream)})' for stream in self.copied)
        hint = f'; leave something out with --leave-out, of {streams}' if streams else ', choose another --codec'
        return UserError(f'{self.target} cannot be written: {self.container} refuses it ({error.strerror}){hint}.')

    def _chapters(self) -> list[dict]:
        """The chapters of what is kept."""
        kept = []
        stop = None if self.end is None else self.end - (self.start or 0)
        for chapter in self.source.chapters:
            unit = Fraction(chapter['time_base'])
            begin, until = (max(Fraction(0), chapter[edge] * unit - (self.start or 0)) for edge in ('start', 'end'))
            until = until if stop is None else min(until, stop)
            if begin < until or (self.start is None and self.end is None):
                kept.append({**chapter, 'start': int(begin / unit), 'end': int(until / unit)})
        return kept

    def _video(self, container, stream, runs: Callable[[], Iterable[Packets]]) -> Iterator[tuple]:
        """(time, packet) of the encoded frames."""
        unit = self.source.time_base
        shift = round(self.shift / unit)
        pts = [int(value) for run in runs() for value in run.pts]
        times = iter(decoding_times(pts))
        header = stream.codec_context.extradata or b''
        for run in runs():
            if run.header.tobytes() != header:
                raise UserError(
                    f'{self.target}: the parts of the video were encoded by different encoders; remove the folder with '
                    'the parts and run again.'
                )
            for shown, duration, key, data in run:
                decoded = next(times)
                packet = self.av.Packet(data)
                packet.pts, packet.dts, packet.duration = shown - shift, decoded - shift, duration
                packet.time_base, packet.stream, packet.is_keyframe = unit, stream, key
                yield (decoded - shift) * unit, packet

    def _copies(self, found: Iterator, copies: dict) -> Iterator[tuple]:
        """(time, packet) of the copied streams."""
        last = Fraction(-(2**31))
        for packet in found:
            unit = Fraction(packet.time_base)
            if not self._keep(packet, unit):
                continue
            shift = round(self.shift / unit)
            packet.pts = None if packet.pts is None else packet.pts - shift
            packet.dts = None if packet.dts is None else packet.dts - shift
            time = packet.pts if packet.dts is None else packet.dts
            last = last if time is None else time * unit
            packet.stream = copies[packet.stream.index]
            yield last, packet

    def _keep(self, packet, unit: Fraction) -> bool:
        """Whether a packet belongs to what is kept; subtitles on either edge are shortened."""
        if packet.pts is None or (self.start is None and self.end is None):
            return True
        zero = self.source.zero
        begin = packet.pts * unit - zero
        length = (packet.duration or 0) * unit
        if self.end is not None and begin >= self.end:
            return False
        if packet.stream.type != 'subtitle':
            return self.start is None or begin >= self.start
        if self.start is not None and begin < self.start:
            if begin + length <= self.start:
                return False
            packet.pts = packet.dts = round((self.start + zero) / unit)
            begin, length = self.start, begin + length - self.start
        if self.end is not None and length:
            length = min(length, self.end - begin)
        packet.duration = round(length / unit)
        return True


def decoding_times(pts: list[int]) -> list[int]:
    """When each frame is decoded, from when it is shown: the earliest times that rise and are never too late.

    Runs are encoded by themselves, and each encoder counts from its own beginning; over all of them that fits together
    only if the times are given anew.

    Args:
        pts: different times, in the order of decoding.

    >>> decoding_times([0, 30, 10, 20])
    [-10, 0, 10, 20]
    """
    shown = sorted(pts)
    rank = {value: position for position, value in enumerate(shown)}
    delay = max((position - rank[value] for position, value in enumerate(pts)), default=0)
    step = shown[1] - shown[0] if len(shown) > 1 else 1
    return [shown[0] - step * n for n in range(delay, 0, -1)] + shown[: len(shown) - delay]


def _name(stream) -> str:
    codec = stream.codec_context.name if stream.codec_context is not None else 'unknown to PyAV'
    return f'{KINDS.get(stream.type, stream.type)}, {codec}'
