"""Every depth, colour, kind of transparency and container: known samples in, known samples out, for both callers."""

import struct
import zlib

import imagecodecs
import numpy as np
import pytest

from ppsr.images import decode_rgb, describe_conversion, image_size, read_header, read_picture
from ppsr.images.png import chunk

HEIGHT, WIDTH = 5, 7


def samples(bits: int, channels: int) -> np.ndarray:
    """(H, W, C): the darkest, the brightest and others, no two neighbours alike."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (HEIGHT, WIDTH, channels))
    values[0, 0], values[0, 1], values[0, 2] = 0, 2**bits - 1, 2 ** (bits - 1)
    return values


def full_range(values: np.ndarray, most: int) -> np.ndarray:
    """By definition: the nearest of value / most · peak."""
    peak = 255 if most < 256 else 65535
    return np.floor(values * peak / most + 0.5).astype(np.uint8 if most < 256 else np.uint16)


def pack(rows: np.ndarray, bits: int) -> bytes:
    """(rows, samples) as a stream of bits, each row filled up to a whole byte."""
    stream = (rows[..., None] >> np.arange(bits)[::-1]) & 1
    return np.packbits(stream.reshape(len(rows), -1).astype(np.uint8), axis=1).tobytes()


def tiff(values, bits, photometric, extra=None, planar=False, sample_format=None, orientation=1) -> bytes:
    channels = values.shape[2]
    planes = [values[..., c] for c in range(channels)] if planar else [values.reshape(HEIGHT, -1)]
    # whole samples are in the byte order of the file, others are a stream of bits
    strips = [p.astype(f'<u{bits // 8}').tobytes() if bits in (8, 16) else pack(p, bits) for p in planes]
    tags = {256: (3, [WIDTH]), 257: (3, [HEIGHT]), 258: (3, [bits] * channels), 259: (3, [1]), 262: (3, [photometric])}
    tags |= {274: (3, [orientation]), 277: (3, [channels]), 278: (4, [HEIGHT]), 284: (3, [2 if planar else 1])}
    if extra is not None:
        tags[338] = (3, [extra])
    if sample_format is not None:
        tags[339] = (3, [sample_format] * channels)
    begin = 8 + sum(len(strip) for strip in strips)
    tags[279] = (4, [len(strip) for strip in strips])
    tags[273] = (4, [8 + sum(map(len, strips[:i])) for i in range(len(strips))])
    end, entries, more = begin + 2 + 12 * len(tags) + 4, b'', b''
    for tag, (kind, numbers) in sorted(tags.items()):
        data = struct.pack(f'<{len(numbers)}{"H" if kind == 3 else "I"}', *numbers)
        if len(data) > 4:
            offset, more = struct.pack('<I', end + len(more)), more + data
        else:
            offset = data.ljust(4, b'\0')
        entries += struct.pack('<HHI', tag, kind, len(numbers)) + offset
    return (
        b'II*\0'
        + struct.pack('<I', begin)
        + b''.join(strips)
        + struct.pack('<H', len(tags))
        + entries
        + bytes(4)
        + more
    )


def png(values, bits, colour, *extra: tuple[bytes, bytes]) -> bytes:
    import io

    file = io.BytesIO()
    file.write(b'\x89PNG\r\n\x1a\n')
    chunk(file, b'IHDR', struct.pack('>IIBBBBB', WIDTH, HEIGHT, bits, colour, 0, 0, 0))
    for kind, data in extra:
        chunk(file, kind, data)
    rows = values.reshape(HEIGHT, -1)
    chunk(file, b'IDAT', zlib.compress(b''.join(b'\0' + pack(row[None], bits) for row in rows)))
    chunk(file, b'IEND', b'')
    return file.getvalue()


def check(data: bytes, expected: np.ndarray, tmp_path, tolerance: int = 0) -> None:
    """Both readers, and what they say of the header."""
    path = tmp_path / 'x'
    path.write_bytes(data)
    pixels = read_picture(path).pixels
    assert pixels.shape == expected.shape and pixels.dtype == expected.dtype
    assert np.abs(pixels.astype(int) - expected).max() <= tolerance
    colour = pixels[..., :-1] if pixels.shape[2] in (2, 4) else pixels
    eight = colour if colour.dtype == np.uint8 else np.floor(colour / 257 + 0.5).astype(np.uint8)
    rgb = decode_rgb(path)
    np.testing.assert_array_equal(rgb, np.broadcast_to(eight, rgb.shape))
    assert rgb.shape == (HEIGHT, WIDTH, 3) and rgb.flags.writeable and image_size(path) == (HEIGHT, WIDTH)
    kept = pixels.shape[2] == 3 and read_header(path).bits == 8
    assert (describe_conversion(path) is None) == kept
    if pixels.dtype == np.uint16:
        assert f'{read_header(path).bits}-bit' in describe_conversion(path)


@pytest.mark.parametrize('planar', [False, True], ids=['contiguous', 'planar'])
@pytest.mark.parametrize('alpha', ['none', 'unassociated', 'associated', 'unspecified', 'untagged'])
@pytest.mark.parametrize('colour', ['gray', 'white is zero', 'RGB'])
@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
def test_tiff(bits, colour, alpha, planar, tmp_path):
    channels = (3 if colour == 'RGB' else 1) + (alpha != 'none')
    values, most = samples(bits, channels), 2**bits - 1
    stored = values.copy()
    tolerance = 0
    if alpha == 'associated':
        values[..., -1] = np.maximum(values[..., -1], most // 2)
        stored = values.copy()
        stored[..., :-1] = np.floor(values[..., :-1] * (values[..., -1:] / most) + 0.5)
        tolerance = 3 * -(-(255 if bits == 8 else 65535) // most)  # half a step of what is stored, twice as large
    if colour == 'white is zero':
        stored[..., 0] = most - stored[..., 0]
    extra = {'unassociated': 2, 'associated': 1, 'unspecified': 0}.get(alpha)
    data = tiff(stored, bits, {'gray': 1, 'white is zero': 0, 'RGB': 2}[colour], extra, planar)
    check(data, full_range(values, most), tmp_path, tolerance)


@pytest.mark.parametrize('alpha', ['none', 'channel', 'colour'])
@pytest.mark.parametrize('colour, bits', [('gray', b) for b in (1, 2, 4, 8, 16)] + [('RGB', 8), ('RGB', 16)])
def test_png(colour, bits, alpha, tmp_path):
    if alpha == 'channel' and bits < 8:
        pytest.skip('PNG has no such kind')
    channels = (3 if colour == 'RGB' else 1) + (alpha == 'channel')
    values, most = samples(bits, channels), 2**bits - 1
    expected, kind, extra = full_range(values, most), {1: 0, 2: 4, 3: 2, 4: 6}[channels], []
    if alpha == 'colour':
        # another pixel differs from the transparent colour in the low bits only
        values[1, 1] = values[2, 2] = most // 2
        values[2, 2, 0] ^= 1
        expected, key = full_range(values, most), values[1, 1]
        extra = [(b'tRNS', struct.pack(f'>{channels}H', *key))]
        peak = np.iinfo(expected.dtype).max
        opaque = (values != key).any(axis=2, keepdims=True) * peak
        expected = np.concatenate([expected, opaque.astype(expected.dtype)], axis=2)
        assert expected[1, 1, -1] == 0 and expected[2, 2, -1] == peak
    check(png(values, bits, kind, *extra), expected, tmp_path)


@pytest.mark.parametrize('bits', [10, 12, 14])
def test_a_png_of_fewer_significant_bits_is_at_full_range_already(bits, tmp_path):
    values = full_range(samples(bits, 3), 2**bits - 1).astype(int)
    check(png(values, 16, 2, (b'sBIT', bytes([bits] * 3))), values.astype(np.uint16), tmp_path)


@pytest.mark.parametrize('most', [1, 100, 255, 1023, 4095, 16383, 40000, 65535])
@pytest.mark.parametrize('kind', ['P2', 'P3', 'P5', 'P6', 'P7 1', 'P7 2', 'P7 3', 'P7 4'])
def test_pnm(kind, most, tmp_path):
    channels = {'P2': 1, 'P3': 3, 'P5': 1, 'P6': 3}.get(kind) or int(kind[3:])
    values = np.random.default_rng(most).integers(0, most + 1, (HEIGHT, WIDTH, channels))
    values[0, 0], values[0, 1] = 0, most
    binary = values.astype('u1' if most < 256 else '>u2').tobytes()
    if kind.startswith('P7'):
        header = f'P7\nWIDTH {WIDTH}\nHEIGHT {HEIGHT}\nDEPTH {channels}\nMAXVAL {most}\nENDHDR\n'
    else:
        header = f'{kind} # a comment\n{WIDTH}\n# another\n{HEIGHT} {most}\n'
    body = binary if kind[1] in '567' else b' '.join(b'%d' % value for value in values.ravel())
    check(header.encode() + body, full_range(values, most), tmp_path)


@pytest.mark.parametrize('kind', ['P1', 'P4'])
def test_bitmaps(kind, tmp_path):
    values = samples(1, 1)
    body = ''.join(map(str, values.ravel())).encode() if kind == 'P1' else pack(values[..., 0], 1)
    check(f'{kind}\n{WIDTH} {HEIGHT}\n'.encode() + body, full_range(1 - values, 1), tmp_path)


@pytest.mark.parametrize('channels', [1, 3, 4])
@pytest.mark.parametrize('bits', [8, 10, 12])
def test_avif(bits, channels, tmp_path):
    values = samples(bits, channels)
    stored = values.astype(np.uint8 if bits == 8 else np.uint16).squeeze()
    data = imagecodecs.avif_encode(stored, level=100, bitspersample=bits)  # 100: without loss
    check(data, full_range(values, 2**bits - 1), tmp_path)


@pytest.mark.parametrize('channels', [1, 2, 3, 4])
@pytest.mark.parametrize('bits', [8, 10, 12, 14, 16])
def test_jpeg_2000(bits, channels, tmp_path):
    values = samples(bits, channels)
    stored = values.astype(np.uint8 if bits == 8 else np.uint16).squeeze()
    data = imagecodecs.jpeg2k_encode(stored, level=0, bitspersample=bits, reversible=True)
    check(data, full_range(values, 2**bits - 1), tmp_path)
