"""What a file may say and still be read; what it may not; and who else may have a say in it."""

import io
import os
import struct
import subprocess
import textwrap
import zlib

import numpy as np
import pytest
from PIL import GifImagePlugin, Image, ImageCms, ImageFile, features
from processes import Process

from ppsr.errors import UserError
from ppsr.images import decode_rgb, image_size, list_images, read_header, read_picture, write_picture
from ppsr.images.formats import READABLE
from ppsr.images.png import chunk

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


def picture(height=37, width=23) -> np.ndarray:
    y, x, c = np.mgrid[:height, :width, :3]
    return (128 + 100 * np.sin(y / 7 + c) * np.cos(x / 5)).astype(np.uint8)


def encode(form: str, pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    write_picture(file, form, pixels.shape, pixels.dtype, [pixels])
    return file.getvalue()


def tagged_jpeg(*entries: tuple[int, int, int, bytes]) -> bytes:
    """A JPEG of 16×8 with these EXIF entries: (tag, type, count, value of up to four bytes)."""
    plain = io.BytesIO()
    Image.fromarray(picture(height=8, width=16)).save(plain, 'JPEG')
    exif = b'Exif\0\0II*\0' + struct.pack('<IH', 8, len(entries))
    for tag, kind, count, value in sorted(entries):
        exif += struct.pack('<HHI', tag, kind, count) + value.ljust(4, b'\0')
    exif += bytes(4)
    data = plain.getvalue()
    return data[:2] + b'\xff\xe1' + struct.pack('>H', len(exif) + 2) + exif + data[2:]


UP = (274, 3, 1, struct.pack('<HH', 6, 0))
ODD_EXIF = {
    'orientation as text': ([(274, 2, 2, b'6\0')], False),
    'orientation as byte': ([(274, 1, 1, b'\6')], True),
    'orientation as long': ([(274, 4, 1, b'\6')], True),
    'orientation 9': ([(274, 3, 1, b'\t')], False),
    'unit as byte': ([UP, (0x128, 1, 1, b'\2')], True),
    'resolution as text': ([UP, (0x11A, 2, 3, b'72\0')], True),
    'XMP as text': ([UP, (0x2BC, 2, 4, b'<x>\0')], True),
    'values beyond the end': ([UP, (0x11A, 5, 1, b'\xff\xff\xff\x7f')], True),
}


@pytest.mark.parametrize('name', ODD_EXIF)
def test_odd_exif_breaks_no_picture(name, tmp_path):
    entries, turned = ODD_EXIF[name]
    path = tmp_path / 'x.jpg'
    path.write_bytes(tagged_jpeg(*entries))
    size = (16, 8) if turned else (8, 16)
    assert image_size(path) == size == read_picture(path).pixels.shape[:2] == decode_rgb(path).shape[:2]


def with_chunks(*extra: tuple[bytes, bytes]) -> bytes:
    plain, file = encode('PNG', picture()), io.BytesIO()
    for kind, data in extra:
        chunk(file, kind, data)
    return plain[:33] + file.getvalue() + plain[33:]


@pytest.mark.parametrize('kind', ['zTXt', 'iTXt', 'tEXt', 'iCCP', 'damaged tEXt'])
def test_much_text_or_a_large_profile_breaks_no_png(kind):
    text = b'{"nodes": "' + b'abcdefgh' * 200_000 + b'"}'
    profile = SRGB + bytes(1_100_000)
    data = with_chunks(
        {
            'zTXt': (b'zTXt', b'workflow\0\0' + zlib.compress(text)),
            'iTXt': (b'iTXt', b'workflow\0\1\0\0\0' + zlib.compress(text)),
            'iCCP': (b'iCCP', b'p\0\0' + zlib.compress(profile)),
        }.get(kind, (b'tEXt', b'workflow\0' + text))
    )
    if kind == 'damaged tEXt':
        data = data[:60] + b'?' + data[61:]  # the checksum is wrong now
    back = read_picture(data)
    np.testing.assert_array_equal(back.pixels, picture())
    np.testing.assert_array_equal(decode_rgb(data), picture())
    assert back.icc == (profile if kind == 'iCCP' else None) and back.notes == ()


def test_a_profile_that_unfolds_without_end_is_dropped_and_said():
    back = read_picture(with_chunks((b'iCCP', b'p\0\0' + zlib.compress(bytes(2**25)))))
    assert back.icc is None and 'profile' in back.notes[0]


def bare_tiff(width, height, samples, bits, strip=bytes(8), compression=1, sample_format=1) -> bytes:
    entries = [(256, width), (257, height), (258, bits), (259, compression), (262, 1), (273, 134), (277, samples)]
    entries += [(278, height), (279, len(strip)), (339, sample_format)]
    tags = b''.join(struct.pack('<HHII', tag, 4, 1, value) for tag, value in entries)
    return b'II*\0\x08\0\0\0' + struct.pack('<H', len(entries)) + tags + bytes(4) + strip


def png_header(width, height, bits, colour) -> bytes:
    file = io.BytesIO()
    file.write(b'\x89PNG\r\n\x1a\n')
    chunk(file, b'IHDR', struct.pack('>IIBBBBB', width, height, bits, colour, 0, 0, 0))
    chunk(file, b'IDAT', zlib.compress(bytes(1000)))
    return file.getvalue()


def encoded_by_pillow(form: str, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(height=32, width=32)).save(file, form, **options)
    return file.getvalue()


def swollen(data: bytes, marker: bytes, distance: int, size: bytes) -> bytes:
    """A whole file with another size, so many bytes behind the first byte of `marker`."""
    at = data.index(marker) + distance
    return data[:at] + size + data[at + len(size) :]


def animated_webp() -> bytes:
    frames = [Image.fromarray(picture(height=32, width=32)), Image.fromarray(picture(height=32, width=32)[::-1])]
    file = io.BytesIO()
    frames[0].save(file, 'WEBP', save_all=True, append_images=frames[1:])
    return file.getvalue()


SIDE = struct.pack('>II', 100_000, 100_000)
WITH_SIZES = {  # formats whose headers are read by Pillow's libraries
    'JPEG': swollen(encoded_by_pillow('JPEG'), b'\xff\xc0', 5, struct.pack('>HH', 60_000, 60_000)),
    'WebP': swollen(encoded_by_pillow('WEBP'), b'\x9d\x01\x2a', 3, struct.pack('<HH', 16_383, 16_383)),
    'WebP, lossless': swollen(
        encoded_by_pillow('WEBP', lossless=True), b'VP8L', 9, struct.pack('<I', 16_383 | 16_383 << 14)
    ),
    'WebP, animated': swollen(animated_webp(), b'VP8X', 12, 2 * (60_000 - 1).to_bytes(3, 'little')),
    'JP2': swollen(swollen(encoded_by_pillow('JPEG2000'), b'ihdr', 4, SIDE), b'\xff\x51', 6, SIDE),
    'JP2, the stream alone': swollen(
        encoded_by_pillow('JPEG2000')[encoded_by_pillow('JPEG2000').index(b'\xff\x4f\xff\x51') :],
        b'\xff\x51',
        6,
        SIDE,
    ),
}
if features.check('avif'):
    WITH_SIZES['AVIF'] = swollen(encoded_by_pillow('AVIF'), b'ispe', 8, struct.pack('>II', 16_000, 16_000))

PROMISES = WITH_SIZES | {
    'PNG': png_header(100_000, 100_000, 16, 6),
    'PNG, bilevel': png_header(60_000, 60_000, 1, 0),
    'TIFF of 60,000 samples': bare_tiff(1000, 1000, 60_000, 16),
    'TIFF, large': bare_tiff(100_000, 100_000, 3, 8),
    'TIFF, compressed': bare_tiff(3000, 3000, 100, 16, zlib.compress(bytes(10**6)), 8),
    'PGM': b'P5 100000 100000 255\n',
    'PPM as text': b'P3 100000 100000 65535\n0 0 0',
    'PAM': b'P7\nWIDTH 20000\nHEIGHT 20000\nDEPTH 4\nMAXVAL 65535\nENDHDR\n',
    'GIF': b'GIF89a' + struct.pack('<HH3x', 65535, 65535) + b',' + struct.pack('<4H', 0, 0, 65535, 65535) + bytes(4),
    'BMP': b'BM' + struct.pack('<IIIIiiHHII', 70, 0, 54, 40, 100_000, 100_000, 1, 24, 0, 0) + bytes(16),
    'TGA': struct.pack('<BBBHHBHHHHBB', 0, 0, 2, 0, 0, 0, 0, 0, 60_000, 60_000, 24, 0) + bytes(30),
}


def test_what_a_header_promises_is_refused_before_memory_is_taken(tmp_path):
    """In a process of its own, which may take 300 MB more than it has after its imports."""
    for name, data in PROMISES.items():
        (tmp_path / name).write_bytes(data)
    code = """
        import pathlib, resource
        from ppsr.images import decode_rgb, read_header, read_picture
        from ppsr.errors import UserError
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for path in sorted(pathlib.Path('.').iterdir()):
            for read in (read_picture, read_header, decode_rgb):
                try:
                    read(path)
                except UserError as error:
                    print(f'{path}|{error}')
        print('MiB:', (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    """
    process = Process(textwrap.dedent(code), cwd=tmp_path)
    assert process.wait() == 0, process.stderr
    lines = process.stdout.decode().splitlines()
    for name in PROMISES:
        said = [line for line in lines if line.startswith(f'{name}|')]
        assert len(said) == 3 and all('is too large to be opened safely' in line for line in said), (name, said)
    assert int(lines[-1].split()[1]) < 300


@pytest.mark.parametrize('form', ['AVIF', 'WEBP'])
def test_what_a_library_refuses_itself_is_a_sentence_too(form):
    """libavif and libwebp have limits of their own."""
    if form == 'AVIF':
        if not features.check('avif'):
            pytest.skip('this Pillow reads no AVIF')
        data = swollen(encoded_by_pillow('AVIF'), b'ispe', 8, SIDE)
    else:
        data = swollen(animated_webp(), b'VP8X', 12, b'\xff' * 6)
    for read in (read_picture, read_header, decode_rgb):
        with pytest.raises(UserError, match='is damaged or incomplete') as error:
            read(data)
        assert ' object at 0x' not in str(error.value)


@pytest.mark.parametrize('kind, number', [('signed', 2), ('floating-point', 3), ('complex', 6)])
@pytest.mark.parametrize('bits', [8, 16, 32])
def test_samples_that_are_no_numbers_from_zero_up_are_refused(kind, number, bits):
    for read in (read_picture, read_header, decode_rgb):
        with pytest.raises(UserError, match=f'{kind} samples'):
            read(bare_tiff(2, 2, 1, bits, bytes(16), sample_format=number))
    with pytest.raises(UserError, match='samples of 32 bits'):
        read_picture(bare_tiff(2, 2, 1, 32, bytes(16)))
    with pytest.raises(UserError, match='floating-point'):
        read_picture(b'PF\n2 2\n-1.0\n' + bytes(48))


def test_a_file_is_opened_by_the_reader_of_its_format_alone(tmp_path, monkeypatch):
    """PostScript named a.png: Pillow's plug-in for it, which starts Ghostscript, never sees it; no plug-in does."""
    monkeypatch.setattr('PIL.Image.open', lambda *args, **kwargs: pytest.fail(f'Pillow opens {kwargs}'))
    postscript, photoshop = b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n', b'8BPS\0\1' + bytes(40)
    for name, content in (('a.png', postscript), ('b.jpg', photoshop)):
        (tmp_path / name).write_bytes(content)
        for read in (read_picture, read_header, decode_rgb, image_size):
            with pytest.raises(UserError, match='not a picture that can be read'):
                read(tmp_path / name)
    monkeypatch.undo()
    asked = []
    opened = Image.open
    monkeypatch.setattr('PIL.Image.open', lambda file, formats: asked.append(formats) or opened(file, formats=formats))
    for form in ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF'):
        file = io.BytesIO()
        Image.fromarray(picture()).save(file, form)
        read_picture(file.getvalue())
    assert asked == [['PNG'], ['JPEG'], ['WEBP'], ['BMP'], ['GIF']]


@pytest.mark.parametrize('form', [f.name for f in READABLE if f.name not in ('PNM', 'TIFF')])
def test_every_format_of_the_list_is_read(form):
    file = io.BytesIO()
    options = {'quality': 95} if form in ('JPEG', 'AVIF') else {}
    Image.fromarray(picture(height=32, width=32)).save(file, form, **options)
    back = read_picture(file.getvalue())
    assert back.mode == 'RGB' and np.abs(back.pixels.astype(int) - picture(height=32, width=32)).mean() < 8
    header = read_header(file.getvalue())
    assert header.upright == (32, 32) and header.bits == 8


def test_settings_that_others_made_in_pillow_change_nothing(monkeypatch):
    whole = encode('PNG', picture(height=200, width=200))
    jpeg = encode('JPEG', picture(height=200, width=200))
    file = io.BytesIO()
    Image.fromarray(picture()).convert('P').save(file, 'GIF')
    expected = [read_picture(data).pixels for data in (whole, jpeg, file.getvalue())]
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 10)
    monkeypatch.setattr(ImageFile, 'LOAD_TRUNCATED_IMAGES', True)
    monkeypatch.setattr(GifImagePlugin, 'LOADING_STRATEGY', GifImagePlugin.LoadingStrategy.RGB_ALWAYS)
    for data, pixels in zip((whole, jpeg, file.getvalue()), expected):
        np.testing.assert_array_equal(read_picture(data).pixels, pixels)
    for cut in (whole[:-2000], jpeg[:-2000]):  # Pillow would fill them up with gray
        with pytest.raises(UserError, match='damaged'):
            read_picture(cut)
    assert Image.MAX_IMAGE_PIXELS == 10 and ImageFile.LOAD_TRUNCATED_IMAGES is True  # and stay as they were


def test_pipes_and_devices(tmp_path, caplog):
    fifo, path = tmp_path / 'f.png', tmp_path / 'x.png'
    os.mkfifo(fifo)
    path.write_bytes(encode('PNG', picture()))
    (tmp_path / 'zero.png').symlink_to('/dev/zero')
    assert list_images(tmp_path) == ['x.png']
    assert sorted(record.args[0] for record in caplog.records) == [str(fifo), str(tmp_path / 'zero.png')]
    with pytest.raises(UserError, match='no regular file'):
        read_picture(tmp_path / 'zero.png')
    with pytest.raises(UserError, match='pipe'):
        image_size(fifo)  # would wait for ever, or take what is in it from who reads it next
    writer = subprocess.Popen(['cp', str(path), str(fifo)])
    np.testing.assert_array_equal(read_picture(fifo).pixels, picture())  # named by the user: read whole
    assert writer.wait() == 0
