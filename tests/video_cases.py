"""Small videos for tests, made with PyAV."""

import sys
import time
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from ppsr.pictures.upscaler import Upscaler
from ppsr.video.colour import Layout, planes_of, rgb_to_planes

SIZE = 32, 48


def moving(count, size=SIZE, seed=0):
    """(H, W, 3) uint8 pictures, all of them different: noise that moves."""
    height, width = size
    noise = np.random.default_rng(seed).integers(0, 256, (height, width + 4 * count, 3), np.uint8)
    noise = (noise[:-1, :-1] // 2 + noise[1:, 1:] // 2)[: height - 1]
    noise = np.concatenate([noise, noise[-1:]])
    return [np.ascontiguousarray(noise[:, 4 * n : 4 * n + width]) for n in range(count)]


def smooth(count, size=(64, 96)):
    """(H, W, 3) uint8 pictures that move slowly: an encoder finds B-frames in them."""
    y, x = np.mgrid[: size[0], : size[1]]
    colours = [
        (np.sin((x + 2 * n) / 9) * 60 + 128, np.cos((y + n) / 7) * 60 + 128, (x + y + 3 * n) % 128 + 40)
        for n in range(count)
    ]
    return [np.stack(colour, 2).astype(np.uint8) for colour in colours]


def cartoon(count, size=(64, 96)):
    """(H, W, 3) uint8 pictures as of a cartoon: a still background, a small figure that moves on every second one."""
    background = moving(1, size)[0]
    pictures = []
    for n in range(count):
        picture = background.copy()
        left = 8 + 4 * (n // 2)
        picture[10:20, left : left + 8] = (250, 120, 20)
        pictures.append(picture)
    return pictures


def planar(picture, layout, colour):
    """An av.VideoFrame of samples that are in the gamut: made of RGB by our own arithmetic."""
    frame = av.VideoFrame(picture.shape[1], picture.shape[0], layout.name)
    for plane, samples in zip(frame.planes, rgb_to_planes(picture, layout, colour)):
        np.frombuffer(plane, layout.dtype).reshape(plane.height, -1)[:, : plane.width] = samples
    return frame


def samples(frame):
    """The planes of an av.VideoFrame, as arrays."""
    layout = Layout.of(frame.format)
    return [plane.copy() for plane in planes_of(frame, layout, VideoReformatter())]


def clip(
    path,
    pictures,
    *,
    times=None,
    unit=Fraction(1, 24),
    rate=24,
    codec='libx264',
    pix_fmt='yuv420p',
    options=None,
    rotation=None,
    sound=None,
    subtitles=None,
    tags=None,
    container=None,
):
    """Write a video.

    Args:
        path: of the file.
        pictures: (H, W, 3) uint8 arrays, or av.VideoFrame.
        times: in `unit`, of each; None = 0, 1, 2, …
        sound: codec of a second of a tone; None = silent.
        subtitles: codec of two lines; None = none.
        tags: attributes of the codec context (colorspace, color_range, …).
    """
    exact = {'movie_timescale': '90000'} if str(path).endswith('.mp4') else {}  # or a late start is rounded to 1 ms
    with av.open(str(path), 'w', format=container, container_options=exact) as out:
        stream = out.add_stream(
            codec, rate=rate, options={'crf': '0', 'preset': 'ultrafast'} if options is None else options
        )
        first = pictures[0] if pictures else np.zeros((*SIZE, 3), np.uint8)
        height, width = (first.height, first.width) if isinstance(first, av.VideoFrame) else first.shape[:2]
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.time_base = stream.time_base = unit
        for name, value in (tags or {}).items():
            setattr(stream.codec_context, name, value)
        if rotation is not None:
            stream.set_display_rotation(rotation)
        tone = out.add_stream(sound, rate=48000) if sound else None
        lines = out.add_mux_stream(subtitles) if subtitles else None
        packets = []
        for number, picture in enumerate(pictures):
            frame = picture if isinstance(picture, av.VideoFrame) else av.VideoFrame.from_ndarray(picture, 'rgb24')
            if frame.format.name != pix_fmt:
                frame = frame.reformat(format=pix_fmt, threads=1)
            frame.pts, frame.time_base = number if times is None else times[number], unit
            for name, value in (tags or {}).items():
                if name != 'sample_aspect_ratio':  # the stream's alone
                    setattr(frame, name, value)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        if tone is not None:
            packets += _tone(tone)
        if lines is not None:
            for begin, text in ((0, 'first'), (300, 'second')):
                packet = av.Packet(text.encode() if subtitles == 'subrip' else bytes([0, len(text)]) + text.encode())
                packet.pts = packet.dts = begin
                packet.duration, packet.time_base, packet.stream = 200, Fraction(1, 1000), lines
                packets.append(packet)
        for packet in sorted(packets, key=lambda p: p.dts * p.time_base):
            out.mux(packet)
    return path


def _tone(stream):
    packets = []
    wave = (np.sin(np.arange(48000) / 20) * 0.3).astype(np.float32)
    size = stream.codec_context.frame_size or 960
    layout, form = stream.codec_context.layout.name, stream.codec_context.format.name
    resampler = av.AudioResampler(form, layout, 48000, size)
    frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), 'fltp', 'stereo')
    frame.sample_rate, frame.pts = 48000, 0
    for part in [*resampler.resample(frame), *resampler.resample(None)]:
        packets += stream.encode(part)
    return packets + stream.encode(None)


def read(path):
    """Everything of a video that a test may want: (pts in seconds, frames as av.VideoFrame), and the packets of the
    other streams as (type, codec, [(pts in seconds, bytes)])."""
    with av.open(str(path)) as file:
        video = file.streams.video[0]
        frames = list(file.decode(video))
        times = [frame.pts * video.time_base for frame in frames]
    others = []
    with av.open(str(path)) as file:
        for stream in file.streams:
            if stream.type != 'video':
                others.append((stream.type, stream.codec_context.name, []))
        index = [s.index for s in file.streams if s.type != 'video']
        for packet in file.demux([file.streams[i] for i in index]) if index else ():
            if packet.size:
                others[index.index(packet.stream.index)][2].append((packet.pts * packet.time_base, bytes(packet)))
    return times, frames, others


def wait_in_the_eighth_frame(seconds):
    """Of a command, in its own process: says 'waiting' on standard error and sleeps before it enlarges that one."""
    real, calls = Upscaler.upscale_with_stats, []

    def slow(self, *args, **options):
        calls.append(args)
        if len(calls) == 8:
            print('waiting', file=sys.stderr, flush=True)
            time.sleep(seconds)
        return real(self, *args, **options)

    Upscaler.upscale_with_stats = slow
