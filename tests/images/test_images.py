"""Every kind of picture in and out; every kind of broken file refused in a sentence."""

import errno
import io
import os
import struct
import zlib

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

from ppsr.errors import UserError
from ppsr.images import (
    Picture,
    atomic_file,
    format_of,
    from_pil,
    read_header,
    read_picture,
    to_pil,
    write_file,
    write_picture,
)
from ppsr.images.png import chunk

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def picture(channels=3, dtype=np.uint8, height=37, width=23, seed=0):
    """A smooth picture with some noise: filters and predictors have something to do."""
    rng = np.random.default_rng(seed)
    y, x, c = np.mgrid[:height, :width, :channels]
    peak = np.iinfo(dtype).max
    values = 0.5 + 0.4 * np.sin(y / 7 + c) * np.cos(x / 5) + rng.normal(0, 0.02, y.shape)
    return (values.clip(0, 1) * peak).astype(dtype)


def encode(form, pixels, bands=None, **options):
    file = io.BytesIO()
    write_picture(file, form, pixels.shape, pixels.dtype, [pixels] if bands is None else bands, **options)
    return file.getvalue()


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('form', ['PNG', 'TIFF'])
def test_lossless_formats_keep_every_sample_profile_and_resolution(form, channels, dtype):
    pixels = picture(channels, dtype, 150)
    data = encode(form, pixels, [pixels[:1], pixels[1:90], pixels[90:]], icc=SRGB, dpi=(300, 150))
    back = read_picture(io.BytesIO(data))
    np.testing.assert_array_equal(back.pixels, pixels)
    assert back.pixels.dtype == dtype and back.icc == SRGB and back.notes == ()
    assert back.dpi == pytest.approx((300, 150), rel=1e-4)


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
def test_other_readers_agree_about_our_16_bit_png(channels):
    pixels = picture(channels, np.uint16)
    data = encode('PNG', pixels)
    np.testing.assert_array_equal(imagecodecs.png_decode(data).reshape(pixels.shape), pixels)
    if channels == 3:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        np.testing.assert_array_equal(bgr[..., ::-1], pixels)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.sampled_from([np.uint8, np.uint16]), st.integers())
def test_png_of_any_bytes(height, width, channels, dtype, seed):
    rng = np.random.default_rng(abs(seed))
    pixels = rng.integers(0, np.iinfo(dtype).max + 1, (height, width, channels)).astype(dtype)
    back = read_picture(io.BytesIO(encode('PNG', pixels))).pixels
    np.testing.assert_array_equal(back, pixels)


@pytest.mark.parametrize('form, channels', [('JPEG', 1), ('JPEG', 3), ('WEBP', 3), ('WEBP', 4), ('WEBP', 2)])
def test_lossy_formats(form, channels):
    pixels = picture(channels, np.uint16, 64, 64)
    data = encode(form, pixels, icc=SRGB, quality=95)
    image = Image.open(io.BytesIO(data))
    assert image.format == form and image.info['icc_profile'] == SRGB
    back = np.asarray(image.convert({1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}[channels])).reshape(pixels.shape)
    error = np.abs(back.astype(float) - pixels / 257)
    assert error.mean() < 8
    if channels in (2, 4):
        assert error[..., -1].max() <= 1  # alpha is kept as it is
    if form == 'JPEG':
        assert len(encode(form, pixels, quality=30)) < len(data)
        assert Image.open(io.BytesIO(encode(form, pixels, dpi=(72, 96)))).info['dpi'] == (72, 96)


@pytest.mark.parametrize('channels', [2, 4])
def test_jpeg_refuses_transparency(channels):
    with pytest.raises(UserError, match='transparency'):
        encode('JPEG', picture(channels))


@pytest.mark.parametrize('form, side', [('JPEG', 65_536), ('WEBP', 16_384)])
def test_a_format_refuses_what_it_cannot_hold(form, side):
    with pytest.raises(UserError, match='at most'):
        write_picture(io.BytesIO(), form, (1, side, 3), np.uint8, [])


@pytest.mark.parametrize('orientation', range(1, 9))
@pytest.mark.parametrize('kind', ['jpeg', 'png8', 'png16', 'tiff8', 'tiff16', 'pil'])
def test_exif_orientation_is_applied(kind, orientation, tmp_path):
    pixels = picture(3, np.uint16 if '16' in kind else np.uint8, 24, 16)
    eight = pixels if pixels.dtype == np.uint8 else (pixels // 257).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    tagged = Image.fromarray(eight)
    tagged.getexif()[0x0112] = orientation
    upright = np.asarray(ImageOps.exif_transpose(tagged))
    path = tmp_path / ('x.' + kind.rstrip('0123456789'))
    if kind == 'pil':
        np.testing.assert_array_equal(from_pil(tagged).pixels, upright)
        return
    if kind == 'tiff16':
        tifffile.imwrite(path, pixels, photometric='rgb', extratags=[(0x0112, 'H', 1, orientation, True)])
    elif kind == 'png16':
        plain, chunk = encode('PNG', pixels), exif.tobytes().removeprefix(b'Exif\0\0')
        chunk = struct.pack('>I', len(chunk)) + b'eXIf' + chunk + struct.pack('>I', zlib.crc32(b'eXIf' + chunk))
        path.write_bytes(plain[:33] + chunk + plain[33:])
    else:
        Image.fromarray(eight).save(path, exif=exif, **({'quality': 95} if kind == 'jpeg' else {}))
    back = read_picture(path).pixels
    assert back.shape == upright.shape
    back = back if back.dtype == np.uint8 else back // 257
    assert np.abs(back.astype(int) - upright).mean() < (6 if kind == 'jpeg' else 0.01)


def test_cmyk_jpeg_becomes_rgb_and_says_so(tmp_path):
    rgb = Image.fromarray(picture(3, height=32, width=32))
    rgb.convert('CMYK').save(tmp_path / 'x.jpg', quality=95)
    back = read_picture(tmp_path / 'x.jpg')
    assert back.mode == 'RGB' and back.notes == ('CMYK converted to RGB',) and back.icc is None
    assert np.abs(back.pixels.astype(int) - np.asarray(rgb)).mean() < 6


def test_palettes(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), 'P')
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.save(tmp_path / 'opaque.png')
    image.save(tmp_path / 'clear.png', transparency=1)
    opaque, clear = read_picture(tmp_path / 'opaque.png'), read_picture(tmp_path / 'clear.png')
    assert opaque.mode == 'RGB' and opaque.pixels[0, 1].tolist() == [0, 255, 0]
    assert clear.mode == 'RGBA' and clear.pixels[..., 3].tolist() == [[255, 0], [255, 0]]


@pytest.mark.parametrize('form', ['GIF', 'WEBP', 'PNG', 'TIFF'])
def test_of_an_animation_the_first_frame_is_taken_and_said(form):
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'lime', 'blue')]
    file = io.BytesIO()
    frames[0].save(
        file, form, save_all=True, append_images=frames[1:], **({'lossless': True} if form == 'WEBP' else {})
    )
    file.seek(0)
    back = read_picture(file)
    assert back.notes == ('first of 3 frames',)
    assert back.pixels[4, 4, :3].tolist() == [255, 0, 0]


@pytest.mark.parametrize(
    'mode, channels', [('1', 1), ('L', 1), ('LA', 2), ('RGB', 3), ('RGBA', 4), ('HSV', 3), ('YCbCr', 3), ('I;16', 1)]
)
def test_modes_of_pillow(mode, channels):
    image = Image.new(mode, (5, 4))
    back = from_pil(image)
    assert back.pixels.shape == (4, 5, channels)
    assert back.pixels.dtype == (np.uint16 if mode == 'I;16' else np.uint8)
    assert bool(back.notes) == (mode in ('HSV', 'YCbCr'))


def test_tiff_of_16_bits_in_all_its_ways(tmp_path):
    path, rgba = tmp_path / 'x.tif', picture(4, np.uint16)
    tifffile.imwrite(path, rgba[..., 0], photometric='miniswhite')
    np.testing.assert_array_equal(read_picture(path).pixels[..., 0], 65535 - rgba[..., 0])
    tifffile.imwrite(path, rgba[..., :3].transpose(2, 0, 1), photometric='rgb', planarconfig='separate')
    np.testing.assert_array_equal(read_picture(path).pixels, rgba[..., :3])
    tifffile.imwrite(path, rgba[..., :3], photometric='rgb', compression='lzw', predictor=True, byteorder='>')
    np.testing.assert_array_equal(read_picture(path).pixels, rgba[..., :3])
    rgba[..., 3] = np.maximum(rgba[..., 3], 30000)
    premultiplied = rgba.copy()
    premultiplied[..., :3] = np.rint(rgba[..., :3] * (rgba[..., 3:] / 65535))
    tifffile.imwrite(path, premultiplied, photometric='rgb', extrasamples=['assocalpha'])
    assert np.abs(read_picture(path).pixels.astype(int) - rgba).max() <= 2
    assert read_header(path).upright == (37, 23)
    tifffile.imwrite(path, rgba, photometric='separated')
    with pytest.raises(UserError, match='SEPARATED'):
        read_picture(path)


def test_pillow_has_no_16_bit_colour():
    gray = to_pil(Picture(picture(1, np.uint16), SRGB, (72, 72)))
    assert gray.mode == 'I;16' and gray.info['icc_profile'] == SRGB and gray.info['dpi'] == (72, 72)
    with pytest.raises(UserError, match='16-bit RGB'):
        to_pil(Picture(picture(3, np.uint16)))


def _png_header(width, height):
    file = io.BytesIO(b'\x89PNG\r\n\x1a\n')
    file.seek(8)
    chunk(file, b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0))
    chunk(file, b'IDAT', zlib.compress(b''))
    chunk(file, b'IEND', b'')
    return file.getvalue()


BROKEN = {
    'text named .png': (b'this is no picture', 'not a picture'),
    'zero bytes': (b'', 'empty|not a picture'),
    '0×N': (_png_header(0, 7), 'no pixels|damaged|not a picture'),
    'bomb': (_png_header(100_000, 100_000), 'too large'),
    'png, truncated': (encode('PNG', picture())[:-300], 'damaged'),
    'png, 16 bits, truncated': (encode('PNG', picture(3, np.uint16))[:-300], 'damaged'),
    'tiff, truncated': (encode('TIFF', picture(3, np.uint16))[:200], 'damaged|not a picture'),
    'jpeg, truncated': (encode('JPEG', picture(3, height=200, width=200))[:3000], 'damaged'),
    'webp, truncated': (encode('WEBP', picture())[:200], 'damaged|not a picture'),
}


@pytest.mark.parametrize('name', BROKEN)
def test_broken_files_are_refused_in_a_sentence(name, tmp_path):
    data, message = BROKEN[name]
    path = tmp_path / 'broken.png'
    path.write_bytes(data)
    with pytest.raises(UserError, match=message) as error:
        read_picture(path)
    assert 'broken.png' in str(error.value) and '\n' not in str(error.value)


@settings(max_examples=150)
@given(
    st.sampled_from(['PNG', 'JPEG', 'WEBP', 'TIFF']),
    st.sampled_from([np.uint8, np.uint16]),
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    st.integers(0, 10_000),
)
def test_random_damage_never_escapes_as_anything_else(form, dtype, changes, keep):
    data = bytearray(encode(form, picture(3, dtype)))
    for position, value in changes:
        data[position % len(data)] = value
    data = data[: max(1, keep % (len(data) + 1))]
    try:
        back = read_picture(io.BytesIO(bytes(data)))
    except UserError:
        return
    assert back.pixels.ndim == 3 and back.pixels.dtype in (np.uint8, np.uint16)


def test_missing_files_folders_and_empty_input(tmp_path):
    with pytest.raises(UserError, match='does not exist'):
        read_picture(tmp_path / 'nothing.png')
    with pytest.raises(UserError, match='folder'):
        read_picture(tmp_path)
    with pytest.raises(UserError, match='empty'):
        read_picture(io.BytesIO(b''))


@pytest.mark.parametrize('mode', ['F', 'I'])
def test_samples_of_32_bits_are_refused(mode):
    with pytest.raises(UserError, match='floating|32-bit'):
        from_pil(Image.fromarray(np.full((3, 3), 70_000, np.float32 if mode == 'F' else np.int32)))


def test_a_file_appears_only_when_complete(tmp_path):
    path = tmp_path / 'new' / 'x.png'
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b'half')
        assert not path.exists()
        raise RuntimeError
    assert os.listdir(path.parent) == []
    write_file(path, picture())
    assert os.listdir(path.parent) == ['x.png']


def test_a_full_disk_leaves_nothing_behind(tmp_path):
    def bands():
        yield picture()[:10]
        raise OSError(errno.ENOSPC, 'No space left on device')

    path = tmp_path / 'x.png'
    write_file(path, picture(1))
    before = path.read_bytes()
    with pytest.raises(UserError, match='disk is full'), atomic_file(path) as file:
        write_picture(file, 'PNG', (37, 23, 3), np.uint8, bands())
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['x.png']


def test_no_permission_is_a_sentence(tmp_path, monkeypatch):
    def denied(*args, **kwargs):  # root may write anywhere, so the refusal is made here
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr('ppsr.atomic.os.open', denied)
    with pytest.raises(UserError, match='no permission'):
        write_file(tmp_path / 'x.png', picture())
    with pytest.raises(UserError, match='cannot write that kind'):
        format_of('x.bmp')
