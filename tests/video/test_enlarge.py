"""Videos, from file to file."""

import os
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip('av')

from picture_cases import Blur, Repeat, repeat  # noqa: E402
from video_cases import cartoon, clip, moving, planar, read, samples, smooth  # noqa: E402

from ppsr.archs import PPATDLight  # noqa: E402
from ppsr.errors import UserError  # noqa: E402
from ppsr.pictures.upscaler import Upscaler  # noqa: E402
from ppsr.video import upscale_video  # noqa: E402
from ppsr.video.colour import Colour, Layout, planes_to_rgb, rgb_to_planes  # noqa: E402
from ppsr.video.finish import decoding_times  # noqa: E402

DEEP, RGB = Layout.named('gbrp10le'), Colour(0, True)  # what ffv1 has of RGB
SLOW = {'crf': '20', 'preset': 'medium'}


@pytest.fixture
def said():
    return []


@pytest.fixture
def upscaler(said):
    return Upscaler(Repeat(), device='cpu', say=said.append)


def lossless(path, pictures):
    frames = [planar(picture.astype(np.float32) / 255, DEEP, RGB) for picture in pictures]
    return clip(path, frames, codec='ffv1', pix_fmt=DEEP.name, options={})


def hidden(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith('.')]


def test_every_frame_with_sound_subtitles_and_variable_times(tmp_path, upscaler, said):
    times = [20, 21, 25, 26, 30, 31, 33, 100]
    source = clip(
        tmp_path / 'a.mp4', moving(8), times=times, unit=Fraction(1, 90), rate=30, sound='aac', subtitles='mov_text'
    )
    stats = upscale_video(upscaler, source, tmp_path / 'b.mp4', segment=3, codec='libx264', crf=0)
    before, after = read(source), read(tmp_path / 'b.mp4')
    assert after[0] == before[0] == [Fraction(t, 90) for t in times]
    assert after[2] == before[2] and [kind for kind, *_ in after[2]] == ['audio', 'subtitle']
    assert len(after[2][0][2]) > 40
    for small, large in zip(before[1], after[1]):
        assert (large.width, large.height) == (96, 64)
        assert np.abs(repeat(samples(small)[0]).astype(int) - samples(large)[0]).max() <= 1
    assert stats.frames == 8 and stats.output_size == (96, 64) and stats.resumed == 0
    assert hidden(tmp_path) == [] and said == []


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_runs_with_b_frames_fit_together(tmp_path, upscaler, suffix):
    times = [0, 1, 2, 3, 100, 101, 102, 103, 500, 501, 502, 503, 504, 505]  # a long frame at a border of runs
    source = clip(tmp_path / 'a.mp4', smooth(14), times=times, unit=Fraction(1, 90), rate=30, options=SLOW)
    target = tmp_path / f'b{suffix}'
    upscale_video(upscaler, source, target, segment=4)
    with av.open(str(target)) as file:
        packets = [packet for packet in file.demux(video=0) if packet.size]
        assert file.start_time == 0
    assert [packet.pts for packet in packets] != sorted(packet.pts for packet in packets)  # there are some
    unit = Fraction(1, 1000) if suffix == '.mkv' else Fraction(1, 10**9)
    assert all(abs(one - two) <= unit for one, two in zip(read(target)[0], read(source)[0]))
    assert sum(packet.is_keyframe for packet in packets) == 4
    if suffix == '.mp4':
        dts = [packet.dts for packet in packets]
        assert dts[0] < 0 and dts == sorted(set(dts)) and all(packet.dts <= packet.pts for packet in packets)


def test_the_same_frames_give_the_same_file_each_time(tmp_path, upscaler):
    """Whatever lies in memory that is used again; libx264 looks at it where it takes AVX-512."""
    source = clip(tmp_path / 'a.mp4', smooth(6, (90, 160)))
    files = set()
    for seed in range(5):
        _ = [np.random.default_rng(seed).integers(0, 255, size, np.uint8) for size in [10_000, 50_000, 90_000] * 20]
        del _
        upscale_video(upscaler, source, tmp_path / 'b.mp4', segment=3)
        files.add((tmp_path / 'b.mp4').read_bytes())
    assert len(files) == 1


def test_decoding_times_rise_and_are_never_too_late():
    pts = [0, 8, 4, 2, 6, 10, 100, 90, 95]
    dts = decoding_times(pts)
    assert all(a < b for a, b in zip(dts, dts[1:])) and all(d <= p for d, p in zip(dts, pts))
    assert decoding_times([5]) == [5] and decoding_times([]) == []


@pytest.mark.parametrize('suffix', ['.mkv', '.mp4'])
def test_subtitles_and_sound_of_matroska(tmp_path, upscaler, suffix):
    source = clip(tmp_path / 'a.mkv', moving(3), sound='libopus', subtitles='subrip')
    target = tmp_path / f'b{suffix}'
    if suffix == '.mp4':
        with pytest.raises(UserError, match=r'cannot hold stream 2 .*subtitles.*--leave-out 2'):
            upscale_video(upscaler, source, target)
        assert [path.name for path in tmp_path.iterdir()] == ['a.mkv']
        upscale_video(upscaler, source, target, leave_out=[2])
        assert [(kind, len(packets)) for kind, _, packets in read(target)[2]] == [('audio', 51)]
    else:
        upscale_video(upscaler, source, target)
        assert read(target)[2] == read(source)[2]
    upscale_video(upscaler, source, target, leave_out=['audio', 'subtitles'])
    assert read(target)[0] == read(source)[0] and read(target)[2] == []


def test_what_a_muxer_refuses_is_known_before_the_work(tmp_path, upscaler):
    """QuickTime takes FLAC until its header is written, MP4 the unlabelled channels of an AVI until its last byte."""
    for name, sound, target in (('a.mkv', 'flac', 'b.mov'), ('a.avi', 'pcm_s16le', 'b.mp4')):
        source = clip(tmp_path / name, moving(2), codec='mpeg4', options={}, sound=sound)
        with pytest.raises(UserError, match='cannot hold stream 1 of .*--leave-out 1'):
            upscale_video(upscaler, source, tmp_path / target)
        assert not hidden(tmp_path)
        assert upscale_video(upscaler, source, tmp_path / target, leave_out=['audio']).frames == 2


def test_webm_is_vp9_and_takes_opus_along(tmp_path, upscaler):
    source = clip(tmp_path / 'a.webm', moving(2, (16, 16)), codec='libvpx-vp9', options={}, sound='libopus')
    upscale_video(upscaler, source, tmp_path / 'b.webm')
    times, frames, others = read(tmp_path / 'b.webm')
    assert times == read(source)[0] and frames[0].width == 32 and others == read(source)[2]
    with av.open(str(tmp_path / 'b.webm')) as file:
        assert file.streams.video[0].codec_context.name in ('vp9', 'libvpx-vp9')


@pytest.mark.parametrize('degrees', [0, 90, 180, 270])
def test_rotation_is_applied_to_the_pixels(tmp_path, upscaler, degrees):
    """By our own picture: the corner that is white says how it was turned."""
    picture = np.full((32, 48, 3), 40, np.uint8)
    picture[:16, :16] = 230
    source = clip(tmp_path / 'a.mp4', [picture], rotation=degrees)
    upscale_video(upscaler, source, tmp_path / 'b.mp4')
    ((_, (frame,), _),) = (read(tmp_path / 'b.mp4'),)
    assert frame.rotation == 0
    expected = repeat(np.rot90(picture, degrees // 90))  # both count counterclockwise
    assert np.abs(expected[..., 0].astype(int) - frame.to_ndarray(format='gray')).max() < 12


@pytest.mark.parametrize('name', ['yuv444p', 'yuv444p10le', 'gbrp10le', 'gray10le'])
@pytest.mark.parametrize('wide', [1, 2], ids=['limited', 'full'])
@pytest.mark.parametrize('matrix', [1, 6, 9], ids=['bt709', 'bt601', 'bt2020'])
def test_depth_matrix_and_range_are_kept_to_the_last_bit(tmp_path, upscaler, name, wide, matrix):
    """Lossless in, lossless out, and a network that repeats pixels: every sample comes back, so none went through
    another depth, matrix or range."""
    layout = Layout.named(name)
    colour = Colour(matrix, wide == 2).written_as(layout)
    rgb = np.random.default_rng(0).uniform(0.1, 0.9, (16, 24, 1 if layout.kind == 'gray' else 3)).astype(np.float32)
    tags = dict(colorspace=colour.matrix, color_range=2 if colour.full else 1, color_primaries=9, color_trc=16)
    options = dict(codec='ffv1', pix_fmt=name, options={'level': '3'}, tags=tags)
    source = clip(tmp_path / 'a.mkv', [planar(rgb, layout, colour)], **options)
    upscale_video(upscaler, source, tmp_path / 'b.mkv', codec='ffv1')
    _, (frame,), _ = read(tmp_path / 'b.mkv')
    assert frame.format.name == name
    assert (int(frame.color_primaries), int(frame.color_trc)) == (9, 16)
    if layout.kind == 'yuv':
        assert (int(frame.colorspace), int(frame.color_range)) == (matrix, wide)
    for small, large in zip(rgb_to_planes(rgb, layout, colour), samples(frame)):
        assert np.array_equal(repeat(small), large)


@pytest.mark.parametrize('codec', ['libx264', 'libx265', 'libsvtav1'])
def test_ten_bits_stay_ten_bits_with_their_colour(tmp_path, upscaler, codec):
    if codec not in av.codecs_available:
        pytest.skip(f'PyAV has no {codec}')
    tags = dict(colorspace=9, color_range=1, color_primaries=9, color_trc=16)
    source = clip(tmp_path / 'a.mp4', smooth(2), pix_fmt='yuv420p10le', tags=tags)
    upscale_video(upscaler, source, tmp_path / 'b.mp4', codec=codec)
    frame = read(tmp_path / 'b.mp4')[1][0]
    assert frame.format.name == 'yuv420p10le'
    assert tuple(map(int, (frame.colorspace, frame.color_range, frame.color_primaries, frame.color_trc))) == (
        9,
        1,
        9,
        16,
    )
    small = samples(read(source)[1][0])[0]
    assert np.abs(repeat(small).astype(int) - samples(frame)[0]).mean() < 12  # of 1024


def test_colour_that_is_not_said_is_said_afterwards(tmp_path, upscaler):
    """Players guess by the size, which is another one then."""
    source = clip(tmp_path / 'a.mp4', moving(1))
    upscale_video(upscaler, source, tmp_path / 'b.mp4')
    frame = read(tmp_path / 'b.mp4')[1][0]
    assert (int(frame.colorspace), int(frame.color_range)) == (6, 1)


def test_what_repeats_is_not_computed_again_and_the_result_is_the_same(tmp_path, tiny):
    """Bit for bit, on a clip like a cartoon: half of the frames repeat, and the figure moves in some tiles only."""
    net = PPATDLight(**tiny)
    upscaler = Upscaler(net, device='cpu', tile=32, tile_overlap=8)
    source = lossless(tmp_path / 'a.mkv', cartoon(8))
    stats = upscale_video(upscaler, source, tmp_path / 'b.mkv', codec='ffv1', segment=5)
    full = 0.0
    for small, large in zip(read(source)[1], read(tmp_path / 'b.mkv')[1]):
        whole = upscaler(planes_to_rgb(samples(small), DEEP, RGB))  # every frame by itself, in the same tiles
        full += upscaler.stats.gmacs
        assert all(map(np.array_equal, rgb_to_planes(whole, DEEP, RGB), samples(large)))
    assert stats.frames == 8 and stats.repeated == 4
    assert stats.tile == 32 and stats.tiles == 8 * 3 * 4
    figures = 3 * (stats.tiles // 8)  # tiles of the frames that are new and not the first
    assert 4 * 12 < stats.reused < 4 * 12 + figures
    assert stats.full_gmacs == pytest.approx(full, rel=1e-6)
    assert 0.5 < stats.saved_share < 1 and stats.gmacs == pytest.approx(full * (1 - stats.saved_share))
    assert f'{stats.saved_share:.1%} saved by repetition' in str(stats)
    assert '4 frames repeated' in str(stats)


def test_a_change_in_the_overlap_changes_both_tiles(tmp_path):
    """A pixel that two tiles share: both are computed again."""
    upscaler = Upscaler(Blur(), device='cpu', tile=32, tile_overlap=16)
    pictures = [np.full((32, 48, 3), 90, np.uint8) for _ in range(2)]
    pictures[1][10, 24] = 255
    source = lossless(tmp_path / 'a.mkv', pictures)
    stats = upscale_video(upscaler, source, tmp_path / 'b.mkv', codec='ffv1')
    assert (stats.tiles, stats.reused) == (4, 0)
    expected = rgb_to_planes(upscaler(planes_to_rgb(samples(read(source)[1][1]), DEEP, RGB)), DEEP, RGB)
    assert all(map(np.array_equal, expected, samples(read(tmp_path / 'b.mkv')[1][1])))


def test_a_part(tmp_path, upscaler):
    source = clip(tmp_path / 'a.mp4', moving(12), sound='aac', subtitles='mov_text')
    upscale_video(upscaler, source, tmp_path / 'b.mp4', start=Fraction(1, 4), end=Fraction(5, 12), crf=0)
    times, frames, others = read(tmp_path / 'b.mp4')
    assert times == [Fraction(n, 24) for n in range(4)]
    assert np.abs(repeat(samples(read(source)[1][6])[0]).astype(int) - samples(frames[0])[0]).max() <= 3
    sound, lines = others
    packets = [(t, data) for t, data in read(source)[2][0][2] if Fraction(1, 4) <= t < Fraction(5, 12)]
    assert [data for _, data in sound[2]] == [data for _, data in packets]
    assert all(abs(a - (b - Fraction(1, 4))) < 1e-4 for (a, _), (b, _) in zip(sound[2], packets))
    assert lines[2][0][0] < 0.06 and b'second' in b''.join(data for _, data in lines[2])
    for start, end, sentence in (
        (5, None, 'ends at 0:00:0'),
        (2, 1, 'is not before'),
        (None, 0, 'no frame in the part'),
    ):
        with pytest.raises(UserError, match=sentence):
            upscale_video(upscaler, source, tmp_path / 'c.mp4', start=start, end=end)
    assert not (tmp_path / 'c.mp4').exists()


def test_chapters_title_and_language_are_kept(tmp_path, upscaler):
    source = tmp_path / 'a.mkv'
    with av.open(str(source), 'w') as out:
        out.metadata['title'] = 'A film'
        stream = out.add_stream('ffv1', rate=10, width=16, height=16)
        stream.metadata['language'] = 'fra'
        unit = Fraction(1, 1000)
        out.set_chapters([{'id': 1, 'start': 0, 'end': 100, 'time_base': unit, 'metadata': {'title': 'One'}}])
        attachment = out.add_attachment('font.ttf', 'application/x-truetype-font', b'letters')
        for picture in moving(2, (16, 16)):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, 'rgb24')))
        out.mux(stream.encode(None))
    assert attachment.data == b'letters'
    upscale_video(upscaler, source, tmp_path / 'b.mkv')
    with av.open(str(tmp_path / 'b.mkv')) as file:
        assert file.metadata['title'] == 'A film' and file.streams.video[0].language == 'fra'
        (chapter,) = file.chapters()
        assert chapter['metadata']['title'] == 'One'
        assert [stream.data for stream in file.streams if stream.type == 'attachment'] == [b'letters']


def test_one_frame_tiny_frames_and_another_factor(tmp_path):
    upscaler = Upscaler(Repeat(), device='cpu', outscale=1.5)
    source = clip(tmp_path / 'a.mp4', moving(1, (16, 16)))
    stats = upscale_video(upscaler, source, tmp_path / 'b.mkv')
    (frame,) = read(tmp_path / 'b.mkv')[1]
    assert (frame.width, frame.height) == (24, 24) == stats.output_size


def _raw(path, *parts):
    """H.264 without a container, one after the other."""
    data = b''
    for number, pictures in enumerate(parts):
        data += clip(path.with_suffix(f'.{number}'), pictures, container='h264').read_bytes()
        path.with_suffix(f'.{number}').unlink()
    path.write_bytes(data)
    return path


def test_a_stream_without_times_gets_some(tmp_path, upscaler):
    upscale_video(upscaler, _raw(tmp_path / 'a.h264', moving(5)), tmp_path / 'b.mp4')
    assert read(tmp_path / 'b.mp4')[0] == [Fraction(n, 25) for n in range(5)]


def test_a_change_of_size_says_where_to_cut(tmp_path, upscaler):
    source = _raw(tmp_path / 'a.h264', moving(5), moving(5, (48, 64)))
    with pytest.raises(UserError, match=r'from 48×32 to 64×48 pixels; .* --end 0:00:00.2 and with --start 0:00:00.2\.'):
        upscale_video(upscaler, source, tmp_path / 'b.mp4')
    assert hidden(tmp_path) == [] and not (tmp_path / 'b.mp4').exists()
    upscale_video(upscaler, source, tmp_path / 'b.mp4', end=Fraction('0.2'))
    upscale_video(upscaler, source, tmp_path / 'c.mp4', start=Fraction('0.2'))
    assert [read(tmp_path / name)[1][0].width for name in ('b.mp4', 'c.mp4')] == [96, 128]


def test_interlaced_video_and_transparency_are_said(tmp_path, upscaler, said):
    source = clip(tmp_path / 'a.mp4', moving(2), options={'x264-params': 'interlaced=1'})
    upscale_video(upscaler, source, tmp_path / 'b.mp4')
    assert len(said) == 1 and 'it is interlaced' in said.pop()
    source = clip(tmp_path / 'a.mkv', moving(2), codec='ffv1', pix_fmt='bgra', options={})
    upscale_video(upscaler, source, tmp_path / 'c.mp4', pix_fmt='yuv420p')
    assert len(said) == 1 and 'transparency is not kept' in said[0]


def test_what_is_damaged_is_passed_over_and_counted(tmp_path, upscaler, said):
    source = clip(tmp_path / 'a.mkv', moving(60), options={'crf': '20', 'g': '1'}, container='matroska')
    data = source.read_bytes()
    source.write_bytes(data[: len(data) // 2])  # the header promises nothing in Matroska: what is there is there
    stats = upscale_video(upscaler, source, tmp_path / 'b.mp4')
    assert 10 < stats.frames < 50
    film = clip(tmp_path / 'a.mp4', moving(60))
    with av.open(str(film)) as file, av.open(str(tmp_path / 'fast.mp4'), 'w', options={'movflags': 'faststart'}) as out:
        stream = out.add_stream_from_template(file.streams.video[0])
        for packet in file.demux(file.streams.video[0]):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    data = (tmp_path / 'fast.mp4').read_bytes()
    (tmp_path / 'fast.mp4').write_bytes(data[: len(data) // 2])
    stats = upscale_video(upscaler, tmp_path / 'fast.mp4', tmp_path / 'c.mp4')
    assert stats.damaged and 'damaged' in str(stats) and stats.frames < 50
    assert any('it is cut off or damaged' in sentence for sentence in said)


def _write(path, data=b''):
    path.write_bytes(data)
    return path


def test_bad_input_is_a_sentence(tmp_path, upscaler):
    good = clip(tmp_path / 'a.mp4', moving(2))
    sound = tmp_path / 'sound.m4a'
    clip(tmp_path / 'both.mp4', moving(1), sound='aac')
    with av.open(str(tmp_path / 'both.mp4')) as file, av.open(str(sound), 'w', format='mp4') as out:
        stream = out.add_stream_from_template(file.streams.audio[0])
        for packet in file.demux(file.streams.audio[0]):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    from PIL import Image

    Image.new('RGB', (8, 8)).save(tmp_path / 'p.png')
    cut = _write(tmp_path / 'cut.mp4', good.read_bytes()[:500])
    cases = [
        (dict(source=tmp_path / 'none.mp4'), 'none.mp4 cannot be opened: No such file'),
        (dict(source=tmp_path), 'is not a file'),
        (dict(source=_write(tmp_path / 'empty.mp4')), 'empty.mp4 is empty'),
        (dict(source=_write(tmp_path / 'text.mp4', b'no video')), 'text.mp4 is not a video, or it is damaged'),
        (dict(source=cut), 'cut.mp4 is not a video, or it is damaged'),
        (dict(source=sound), 'holds sound only'),
        (dict(source=tmp_path / 'p.png'), 'is a picture, not a video; ppsr upscale'),
        (dict(target=tmp_path / 'b.avi'), 'no kind of video that ppsr writes; use one of .mp4'),
        (dict(target=good), 'is the input itself'),
        (dict(codec='h265'), 'PyAV has no encoder h265; it has libx264'),
        (dict(codec='aac'), 'encodes audio, not video'),
        (dict(codec='ffv1', crf=3), 'ffv1 has no --crf'),
        (dict(preset='sideways'), 'libx264 does not encode 96×64'),
        (dict(pix_fmt='rgb24'), 'does not encode rgb24; it takes yuv420p'),
        (dict(codec='libx264', target=tmp_path / 'b.webm'), 'webm holds no such video'),
        (dict(leave_out=['7']), 'has no stream 7'),
        (dict(leave_out=[0]), 'is the video that is enlarged'),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for options, sentence in cases:
        with pytest.raises(UserError) as error:
            upscale_video(upscaler, **{'source': good, 'target': tmp_path / 'b.mp4', **options})
        assert sentence in str(error.value) and str(error.value).endswith('.') and '\n' not in str(error.value)
    odd = Upscaler(Repeat(1), device='cpu')
    source = clip(tmp_path / 'odd.mkv', moving(1, (33, 35)), codec='ffv1', options={})
    with pytest.raises(UserError, match='35×33 pixels would have to be even for libx264 with yuv420p'):
        upscale_video(odd, source, tmp_path / 'b.mp4')
    upscale_video(odd, source, tmp_path / 'odd444.mp4', pix_fmt='yuv444p')
    left = {path.name for path in tmp_path.iterdir()} - set(before) - {'odd.mkv', 'odd444.mp4'}
    assert left == set()


@pytest.mark.parametrize(
    'text',
    [
        '#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n',
        "ffconcat version 1.0\nfile '{}'\n",
    ],
    ids=['hls', 'concat'],
)
def test_a_list_of_files_opens_none_of_them(tmp_path, upscaler, text):
    clip(tmp_path / 'secret.ts', moving(2), container='mpegts')
    source = _write(tmp_path / 'a.m3u8', text.format('secret.ts').encode())
    with av.open(str(source)) as file:
        assert file.streams.video  # FFmpeg by itself does
    with pytest.raises(UserError, match='a list of other files|not a video'):
        upscale_video(upscaler, source, tmp_path / 'b.mp4')


def test_the_shape_of_pixels_turns_with_them(tmp_path, upscaler):
    source = clip(tmp_path / 'a.mp4', moving(1), rotation=90, tags={'sample_aspect_ratio': Fraction(4, 3)})
    upscale_video(upscaler, source, tmp_path / 'b.mp4')
    with av.open(str(tmp_path / 'b.mp4')) as file:
        video = file.streams.video[0]
        assert (video.width, video.height, video.sample_aspect_ratio) == (64, 96, Fraction(3, 4))


def test_a_link_to_the_input_is_the_input(tmp_path, upscaler):
    source = clip(tmp_path / 'a.mp4', moving(1))
    os.symlink(source, tmp_path / 'b.mp4')
    with pytest.raises(UserError, match='is the input itself'):
        upscale_video(upscaler, source, tmp_path / 'b.mp4')
