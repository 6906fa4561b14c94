"""What is kept beside the pixels, and what a format cannot keep is said."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from ppsr.images import Picture, losses, read_picture, write_picture

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()
GAMMA = (b'gAMA', struct.pack('>I', 100_000))
CHROMATICITIES = (b'cHRM', struct.pack('>8I', 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000))
HDR = (b'cICP', bytes([9, 16, 0, 1]))


def gray_profile(gamma: float) -> bytes:
    """A gray ICC profile of a plain power law."""

    def number(value: float) -> bytes:
        return struct.pack('>i', round(value * 65536))

    white = number(0.9642) + number(1) + number(0.8249)
    tags = {
        b'desc': b'desc\0\0\0\0' + struct.pack('>I', 5) + b'gray\0' + bytes(78),
        b'cprt': b'text\0\0\0\0none\0',
        b'wtpt': b'XYZ \0\0\0\0' + white,
        b'kTRC': b'curv\0\0\0\0' + struct.pack('>IH', 1, round(gamma * 256)),
    }
    table, data = struct.pack('>I', len(tags)), b''
    for kind, value in tags.items():
        value += bytes(-len(value) % 4)
        table += kind + struct.pack('>II', 132 + 12 * len(tags) + len(data), len(value))
        data += value
    head = bytearray(128)
    head[8:12], head[12:16], head[16:20], head[20:24], head[36:40] = b'\2\x10\0\0', b'mntr', b'GRAY', b'XYZ ', b'acsp'
    head[68:80] = white
    profile = bytes(head) + table + data
    return struct.pack('>I', len(profile)) + profile[4:]


def encode(form: str, picture: Picture) -> bytes:
    file, pixels = io.BytesIO(), picture.pixels
    about = picture.icc, picture.dpi, 95, picture.colour
    write_picture(file, form, pixels.shape, pixels.dtype, [pixels], *about)
    return file.getvalue()


@pytest.mark.parametrize('colour', [(GAMMA, CHROMATICITIES), (HDR,), ((b'sRGB', b'\0'),), ()])
def test_png_keeps_what_a_png_says_of_its_colours(colour):
    pixels = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    back = read_picture(encode('PNG', Picture(pixels, colour=colour)))
    assert back.colour == colour
    np.testing.assert_array_equal(back.pixels, pixels)
    assert Image.open(io.BytesIO(encode('PNG', back))).size == (5, 4)  # others read it, too
    for form in ('JPEG', 'TIFF', 'WEBP'):
        said = losses(back, form)
        assert len(said) == bool(colour)
        for kind, _ in colour:
            assert kind.decode() in said[0]
    assert losses(back, 'PNG') == ()


def test_a_profile_takes_the_place_of_srgb():
    picture = Picture(np.zeros((2, 2, 3), np.uint8), SRGB, colour=((b'sRGB', b'\0'), GAMMA))
    back = read_picture(encode('PNG', picture))
    assert back.icc == SRGB and back.colour == (GAMMA,)


@pytest.mark.parametrize('channels', [1, 2])
def test_a_gray_profile_is_applied_where_the_format_has_no_gray(channels):
    """WebP's pixels are RGB: with a gray profile other programs refuse them, without it they are too dark or light."""
    levels = np.array([40, 80, 120, 160, 200, 240], np.uint8)
    pixels = np.full((64, 96, channels), 200, np.uint8)  # alpha that the encoder keeps
    pixels[..., 0] = levels.repeat(16)
    picture = Picture(pixels, gray_profile(1.0))
    back = read_picture(encode('WEBP', picture))
    assert back.icc is None and back.mode == ('RGB' if channels == 1 else 'RGBA')
    linear = levels / 255
    expected = 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(back.pixels[32, 8::16, :3].astype(float) - expected[:, None]).max() <= 4
    assert len(losses(picture, 'WEBP')) == 1 and losses(picture, 'PNG') == losses(picture, 'TIFF') == ()
    broken = Picture(pixels, gray_profile(1.0)[:100])
    assert np.abs(read_picture(encode('WEBP', broken)).pixels[32, 8::16, 0].astype(float) - levels).max() <= 4


def test_rounding_to_8_bits_is_said():
    deep = Picture(np.zeros((2, 2, 3), np.uint16))
    assert '8 bits' in losses(deep, 'JPEG')[0] and losses(deep, 'PNG') == losses(deep, 'TIFF') == ()
