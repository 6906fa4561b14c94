"""Writing video: which codec and format, how an encoder is set up, and a run of frames as packets."""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch

from ppsr.errors import UserError
from ppsr.extras import need
from ppsr.video.colour import Colour, Layout

__all__ = ['CONTAINERS', 'Encoder', 'Packets', 'choose_layout']

CONTAINERS = {'.mp4': 'mp4', '.m4v': 'mp4', '.mov': 'mov', '.mkv': 'matroska', '.webm': 'webm'}
DEFAULT_CODECS = {'webm': 'libvpx-vp9'}  # by container, else libx264
# quality where none is asked for: hardly to be told from the frames themselves
DEFAULT_CRF = {'libx264': 17, 'libx265': 19, 'libsvtav1': 22, 'libvpx-vp9': 20, 'libvpx': 8}
# what goes with crf where it is not enough by itself: no bit rate as a bound
WITH_CRF = {'libvpx-vp9': {'b': '0'}}
QUIET = {'libx265': {'x265-params': 'log-level=error'}}  # it tells its settings otherwise
EVEN_ONLY = ('libx264', 'libx265', 'libsvtav1')  # of sides that chroma is halved along
# with AVX-512 mbtree of x264 (core 165) depends on what lay in memory: eight runs on the same frames gave seven files
SAME_EACH_TIME = {'libx264': {'x264-params': 'asm=AVX2'}}
GLOBAL_HEADER = 1 << 22  # AV_CODEC_FLAG_GLOBAL_HEADER: all of CONTAINERS want it


@dataclass(frozen=True)
class Packets:
    """A run of encoded frames, in the order of decoding.

    Attributes:
        pts, durations: (N,) int64, in the time base of the video.
        keys: (N,) bool, frames that need no other.
        sizes: (N,) int64, bytes of each.
        data: (sum of sizes,) uint8.
        header: (M,) uint8, what the decoder needs beforehand (extradata).
    """

    pts: np.ndarray
    durations: np.ndarray
    keys: np.ndarray
    sizes: np.ndarray
    data: np.ndarray
    header: np.ndarray

    def __iter__(self) -> Iterator[tuple[int, int, bool, bytes]]:
        """(pts, duration, key, bytes) of each."""
        ends = self.sizes.cumsum()
        for pts, duration, key, size, end in zip(self.pts, self.durations, self.keys, self.sizes, ends):
            yield int(pts), int(duration), bool(key), self.data[end - size : end].tobytes()


def choose_layout(codec, source: Layout, wanted: str | None, say: Callable[[str], None]) -> Layout:
    """The layout to encode: that of the source, or the one nearest to it that the codec takes.

    Args:
        codec: an av.Codec for encoding.
        wanted: FFmpeg's name of a pixel format; None = chosen here.
        say: is told what is lost.

    Raises:
        UserError: a format that is none of the codec's.
    """
    names = [video_format.name for video_format in codec.video_formats or ()]
    layouts = [layout for name in names if (layout := Layout.named(name)) and not layout.centred]
    if wanted is not None:
        for layout in layouts:
            if layout.name == wanted:
                return layout
        offered = ', '.join(layout.name for layout in layouts) or 'nothing that ppsr can write'
        raise UserError(f'{codec.name} does not encode {wanted}; it takes {offered}.')
    if not layouts:
        raise UserError(f'{codec.name} encodes no format that ppsr can write; choose another --codec.')

    def loss(layout: Layout) -> tuple:
        """What is worse about a layout, the worst first: bits, colour, columns and rows of chroma; then what is more
        than needed."""
        shifts = [max(0, own - other) for own, other in zip(layout.shifts, source.shifts)]
        spare = [max(0, other - own) for own, other in zip(layout.shifts, source.shifts)]
        no_colour = layout.kind == 'gray' and source.kind != 'gray'
        return no_colour, shifts, max(0, source.depth - layout.depth), layout.kind != source.kind, spare, layout.depth

    layout = min(layouts, key=loss)
    if layout.depth < source.depth:
        say(f'{codec.name} encodes {layout.depth} bits here: {source.depth} bits are rounded to them.')
    if any(own > other for own, other in zip(layout.shifts, source.shifts)):
        say(f'{codec.name} encodes {layout.name}: colour is stored at half the resolution.')
    if source.kind == 'rgb' and layout.kind == 'yuv' and layout.shifts == (0, 0):
        say(f'RGB is encoded as {layout.name}, which not every player shows; --pix-fmt yuv420p is for all of them.')
    return layout


class Encoder:
    """How the video is encoded.

    Args:
        container: FFmpeg's name of the format of the file.
        codec: FFmpeg's name of the encoder; None = H.264, in WebM VP9.
        crf: quality, smaller is better, as the encoder counts it; None = a high one.
        preset: speed, as the encoder names it; None = the encoder's default.

    Raises:
        UserError: no such encoder, one that the container or PyAV does not take, an option that it does not have.
    """

    def __init__(self, container: str, codec: str | None = None, crf: float | None = None, preset: str | None = None):
        (self.av,) = need('video', 'ppsr video', 'av')
        self.container = container
        self.name = DEFAULT_CODECS.get(container, 'libx264') if codec is None else codec
        try:
            self.codec = self.av.Codec(self.name, 'w')
        except self.av.codec.codec.UnknownCodecError:
            offered = [name for name in (*DEFAULT_CRF, 'ffv1', 'prores_ks') if name in self.av.codecs_available]
            raise UserError(f'PyAV has no encoder {self.name}; it has {", ".join(offered)} and others.') from None
        self.name = self.codec.name
        if self.codec.type != 'video':
            raise UserError(f'{self.name} encodes {self.codec.type}, not video; choose another --codec.')
        known = {option.name for option in self.av.CodecContext.create(self.name, 'w').supported_options.private}
        self.options: dict[str, str] = dict(QUIET.get(self.name, {}))
        os.environ.setdefault('SVT_LOG', '1')  # of libsvtav1: errors only
        for option, value in (('crf', crf), ('preset', preset)):
            if value is not None and option not in known:
                raise UserError(f'{self.name} has no --{option}; leave it out.')
        if 'crf' in known:
            chosen = DEFAULT_CRF.get(self.name) if crf is None else crf
            self.options |= {} if chosen is None else {'crf': f'{chosen:g}', **WITH_CRF.get(self.name, {})}
        elif self.codec.name in ('mpeg4', 'mjpeg', 'mpeg2video'):
            self.options |= {'flags': '+qscale', 'global_quality': str(2 * 118)}  # their best; or 200 kbit/s
        if preset is not None:
            self.options['preset'] = preset

    def check(self, layout: Layout, size: tuple[int, int]) -> None:
        """Refuse (UserError) what the encoder cannot take of a (height, width)."""
        odd = any(side % 2 and shift for side, shift in zip(size[::-1], layout.shifts))
        if odd and self.name in EVEN_ONLY:
            raise UserError(
                f'{size[1]}×{size[0]} pixels would have to be even for {self.name} with {layout.name}; choose another '
                '--outscale, or --pix-fmt yuv444p.'
            )

    def configure(self, context, layout: Layout, colour: Colour, size, time_base, rate, aspect) -> None:
        """Set up a codec context for frames of a (height, width)."""
        context.height, context.width = size
        context.pix_fmt = layout.name
        context.time_base, context.framerate = time_base, rate
        context.colorspace, context.color_range = colour.matrix, 2 if colour.full else 1
        context.color_primaries, context.color_trc = colour.primaries, colour.transfer
        if aspect:
            context.sample_aspect_ratio = aspect
        context.flags |= GLOBAL_HEADER
        context.options = dict(self.options)
        if torch.backends.cpu.get_cpu_capability() == 'AVX512':
            context.options |= SAME_EACH_TIME.get(self.name, {})

    def open(self, layout: Layout, colour: Colour, size, time_base: Fraction, rate: Fraction, aspect):
        """A codec context that is ready.

        Raises:
            UserError: the encoder refuses the settings.
        """
        context = self.av.CodecContext.create(self.name, 'w')
        self.configure(context, layout, colour, size, time_base, rate, aspect)
        try:
            context.open()
        except self.av.error.FFmpegError as error:
            given = ', '.join(f'{name} {value}' for name, value in self.options.items()) or 'its defaults'
            raise UserError(
                f'{self.name} does not encode {size[1]}×{size[0]} pixels of {layout.name} with {given} '
                f'({error.strerror}); choose another --codec, --preset or --outscale.'
            ) from None
        return context

    def frame(self, planes: list[np.ndarray], layout: Layout, colour: Colour, pts: int, duration: int, time_base):
        """Samples as an av.VideoFrame."""
        height, width = planes[0].shape
        frame = self.av.VideoFrame(width, height, layout.name)
        for plane, samples in zip(frame.planes, planes):
            rows = np.frombuffer(plane, layout.dtype).reshape(plane.height, -1)
            rows[:, : plane.width] = samples
        frame.colorspace, frame.color_range = colour.matrix, 2 if colour.full else 1
        frame.pts, frame.duration, frame.time_base = pts, duration, time_base
        return frame

    def encode(self, context, frames: Iterable) -> Packets:
        """All frames, as a run that needs no frame of another run."""
        durations, packets = {}, []
        for frame in frames:
            durations[frame.pts] = frame.duration
            packets += context.encode(frame)
        packets += context.encode(None)
        data = [bytes(packet) for packet in packets]
        pts = [packet.pts for packet in packets]
        if sorted(pts) != sorted(durations):
            raise UserError(f'{self.name} did not keep the times of the frames; choose another --codec.')
        return Packets(
            np.array(pts, np.int64),
            np.array([durations[value] for value in pts], np.int64),
            np.array([packet.is_keyframe for packet in packets], bool),
            np.array([len(part) for part in data], np.int64),
            np.frombuffer(b''.join(data), np.uint8),
            np.frombuffer(context.extradata or b'', np.uint8),
        )
