"""Colours of video: between planes and RGB."""

import numpy as np
import pytest

av = pytest.importorskip('av')

from av.video.reformatter import VideoReformatter  # noqa: E402
from video_cases import SIZE, moving  # noqa: E402

from ppsr.errors import UserError  # noqa: E402
from ppsr.video.colour import Colour, Layout, planes_of, planes_to_rgb, rgb_to_planes  # noqa: E402


@pytest.mark.parametrize('matrix', [1, 4, 5, 6, 7, 9])
@pytest.mark.parametrize('full', [False, True], ids=['limited', 'full'])
@pytest.mark.parametrize('name', ['yuv444p', 'yuv444p10le', 'yuv444p16le', 'gbrp', 'gbrp10le', 'gray', 'gray10le'])
def test_samples_survive_rgb(name, matrix, full):
    """In the gamut, samples -> RGB -> samples is the identity at every depth, so nothing is lost on the way."""
    layout = Layout.named(name)
    colour = Colour(matrix, full).written_as(layout)
    rgb = np.random.default_rng(0).random((16, 24, 1 if layout.kind == 'gray' else 3), np.float32)
    planes = rgb_to_planes(rgb, layout, colour)
    back = planes_to_rgb(planes, layout, colour)
    assert back.shape == rgb.shape and back.dtype == np.float32
    assert np.abs(back - rgb).max() < 1.2 / 2 ** (layout.depth - 1)
    inside = (back > 0).all(2) & (back < 1).all(2)  # where rounding left the gamut it is cut off
    off = 0 if layout.depth < 16 else 1  # float32 ends there
    for one, two in zip(planes, rgb_to_planes(back, layout, colour)):
        assert np.abs(one.astype(int) - two)[inside].max() <= off


def test_black_white_and_gray_are_where_the_standard_has_them():
    picture = np.array([[[0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5]]], np.float32)
    for depth, unit in ((8, 1), (10, 4)):
        layout = Layout.named('yuv444p' if depth == 8 else 'yuv444p10le')
        luma, *chroma = rgb_to_planes(picture, layout, Colour(1, False))
        assert luma.tolist() == [[16 * unit, 235 * unit, round(125.5 * unit)]]
        assert all((plane == 128 * unit).all() for plane in chroma)
        luma, *chroma = rgb_to_planes(picture, layout, Colour(1, True))
        assert luma.tolist() == [[0, 2**depth - 1, 2 ** (depth - 1)]]  # halves to even
        assert all((plane == 2 ** (depth - 1)).all() for plane in chroma)


@pytest.mark.parametrize('matrix', [1, 5, 9])
@pytest.mark.parametrize('wide', [1, 2], ids=['limited', 'full'])
def test_equals_swscale(matrix, wide):
    frame = av.VideoFrame.from_ndarray(moving(1)[0], 'rgb24')
    frame = frame.reformat(format='yuv444p', dst_colorspace=matrix, dst_color_range=wide, threads=1)
    frame.colorspace, frame.color_range = matrix, wide
    layout = Layout.of(frame.format)
    ours = planes_to_rgb(planes_of(frame, layout, VideoReformatter()), layout, Colour.of(frame, layout))
    theirs = frame.reformat(format='rgb24', dst_color_range=2, threads=1).to_ndarray()
    assert Colour.of(frame, layout) == Colour(matrix, wide == 2)
    assert np.abs(np.rint(ours * 255) - theirs).max() <= 2


@pytest.mark.parametrize('name', ['yuv420p', 'yuv422p', 'yuv440p', 'yuv420p10le'])
def test_flat_colours_and_slopes_survive_halved_chroma(name):
    """Flat pictures exactly; of a slope what is halved is where it was, not shifted."""
    layout, colour = Layout.named(name), Colour(1, False)
    flat = np.broadcast_to(np.float32([0.8, 0.3, 0.1]), (8, 12, 3))
    planes = rgb_to_planes(flat, layout, colour)
    assert all((plane == plane[0, 0]).all() for plane in planes)
    again = rgb_to_planes(planes_to_rgb(planes, layout, colour), layout, colour)
    assert all(map(np.array_equal, planes, again))
    slope = np.linspace(0.2, 0.8, 40, dtype=np.float32)
    slope = np.stack(np.broadcast_arrays(slope, slope[:, None], np.float32(0.5)), 2)
    back = planes_to_rgb(rgb_to_planes(slope, layout, colour), layout, colour)
    assert np.abs(back - slope)[2:-2, 2:-2].max() < 3 / 2**layout.depth  # a shift by half a pixel would be 0.0077


def test_odd_sizes_have_a_sample_for_the_last_pixel():
    layout = Layout.named('yuv420p')
    planes = rgb_to_planes(np.full((5, 7, 3), 0.5, np.float32), layout, Colour(1, False))
    assert [plane.shape for plane in planes] == [(5, 7), (3, 4), (3, 4)]
    assert planes_to_rgb(planes, layout, Colour(1, False)).shape == (5, 7, 3)


@pytest.mark.parametrize(
    'name', ['nv12', 'p010le', 'p216le', 'y210le', 'yuyv422', 'uyvy422', 'yuv420p10be', 'yuvj422p', 'yuva444p10le']
)
def test_packed_formats_are_taken_apart_without_changing_values(name):
    whole = Layout.of(av.VideoFormat(name, *SIZE[::-1]))
    frame = av.VideoFrame.from_ndarray(moving(1)[0], 'rgb24').reformat(format=whole.name, threads=1)
    expected = [plane.copy() for plane in planes_of(frame, whole, VideoReformatter())]
    same = {'interpolation': 'POINT', 'src_color_range': 2, 'dst_color_range': 2, 'threads': 1}
    packed = frame.reformat(format=name, **same)
    assert packed.format.name == name
    for _ in range(50):  # libswscale is wrong now and then with threads
        assert all(map(np.array_equal, expected, planes_of(packed, whole, VideoReformatter())))


def test_what_is_not_said_is_taken_as_players_take_it():
    layout = Layout.of(av.VideoFormat('yuv420p', 64, 48))
    small, large = av.VideoFrame(720, 576, 'yuv420p'), av.VideoFrame(1280, 720, 'yuv420p')
    assert Colour.of(small, layout) == Colour(6, False) and Colour.of(large, layout) == Colour(1, False)
    assert Colour.of(small, Layout.of(av.VideoFormat('yuvj420p', 64, 48))).full
    strange = av.VideoFrame(64, 48, 'yuv420p')
    strange.colorspace = 14  # ICtCp
    with pytest.raises(UserError, match='matrix 14'):
        Colour.of(strange, layout)
