"""Colours of video: between the planes of a decoded frame and RGB in [0, 1], in float32 at the full depth.

libswscale, which PyAV has, would go through integers and dither on the way back; here what is flat stays flat, 10 bits
stay 10 bits, and matrix and range are those that the file names (ITU-T H.273). It is used for the formats whose samples
are packed, palettes and big-endian, which it takes apart without changing values.
"""

import re
from dataclasses import dataclass, replace

import numpy as np

from ppsr.errors import UserError

__all__ = ['Colour', 'Layout', 'planes_of', 'planes_to_rgb', 'rgb_to_planes']

# weights of red and blue in luma, by matrix as H.273 numbers them (AVColorSpace)
WEIGHTS = {
    1: (0.2126, 0.0722),  # BT.709
    4: (0.30, 0.11),  # FCC
    5: (0.299, 0.114),  # BT.601, 625 lines
    6: (0.299, 0.114),  # BT.601, 525 lines
    7: (0.212, 0.087),  # SMPTE 240M
    9: (0.2627, 0.0593),  # BT.2020
}
RGB, BT709, BT601, UNSPECIFIED = 0, 1, 6, 2
LIMITED, FULL = 1, 2  # AVColorRange
_PLANAR = re.compile(r'(?:yuv[aj]?(4\d\d)p|gray|gbra?p)(\d*)(?:le)?')
_SHIFTS = {'444': (0, 0), '440': (0, 1), '422': (1, 0), '420': (1, 1), '411': (2, 0), '410': (2, 2)}


@dataclass(frozen=True)
class Layout:
    """How the samples of a frame lie.

    Attributes:
        name: FFmpeg's, of a format whose colours are planes of their own, little-endian.
        kind: 'yuv', 'rgb' or 'gray'.
        depth: bits of a sample, 8 to 16.
        shifts: log2 of the columns and rows of luma that share a sample of chroma.
        alpha: whether the source has transparency, which is not kept.
        centred: whether chroma lies between the columns, as in JPEG and MPEG-1, not on the even ones.
    """

    name: str
    kind: str
    depth: int
    shifts: tuple[int, int] = (0, 0)
    alpha: bool = False
    centred: bool = False

    @classmethod
    def of(cls, video_format) -> 'Layout':
        """The layout that frames of a format (av.VideoFormat) are read in."""
        name, parts = video_format.name, video_format.components
        alpha = any(part.is_alpha for part in parts) or video_format.has_palette
        depth = max(part.bits for part in parts)
        if planar := _PLANAR.fullmatch(name):
            kind = 'gray' if name.startswith('gray') else 'rgb' if name.startswith('gb') else 'yuv'
            shifts = _SHIFTS[planar[1]] if kind == 'yuv' else (0, 0)
            return cls(name, kind, depth, shifts, alpha, name.startswith('yuvj'))
        if video_format.is_rgb or video_format.has_palette or name.startswith('xyz'):
            return cls('gbrp', 'rgb', 8, (0, 0), alpha) if depth <= 8 else cls('gbrp16le', 'rgb', 16, (0, 0), alpha)
        depth = next(bits for bits in (8, 10, 12, 16) if bits >= min(depth, 16))
        ending = '' if depth == 8 else f'{depth}le'
        if len([part for part in parts if not part.is_alpha]) == 1:
            return cls(f'gray{ending}', 'gray', depth, (0, 0), alpha)
        whole = type(video_format)(name, 64, 64)  # what shares a sample is seen in a size
        width, height = whole.components[1].width, whole.components[1].height
        sampling = {(64, 64): '444', (64, 32): '440', (32, 64): '422', (32, 32): '420', (16, 64): '411'}[width, height]
        return cls(f'yuv{sampling}p{ending}', 'yuv', depth, _SHIFTS[sampling], alpha)

    @classmethod
    def named(cls, name: str) -> 'Layout | None':
        """The layout of a format that can be written, by FFmpeg's name; None for others."""
        planar = _PLANAR.fullmatch(name)
        if planar is None or name.startswith(('yuva', 'gbra')) or planar[1] in ('411', '410'):
            return None
        kind = 'gray' if name.startswith('gray') else 'rgb' if name.startswith('gb') else 'yuv'
        shifts = _SHIFTS[planar[1]] if kind == 'yuv' else (0, 0)
        return cls(name, kind, int(planar[2] or 8), shifts, False, name.startswith('yuvj'))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype('u1' if self.depth == 8 else '<u2')


@dataclass(frozen=True)
class Colour:
    """What the numbers of a frame mean, as H.273 and FFmpeg number it.

    Attributes:
        matrix: from RGB to luma and chroma; 0 = RGB itself.
        full: whether all values are used; else black is 16 and white 235 (of 8 bits).
        primaries, transfer: handed on as they are.
    """

    matrix: int
    full: bool
    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED

    @classmethod
    def of(cls, frame, layout: Layout) -> 'Colour':
        """Of a decoded frame (av.VideoFrame); what it does not say is taken as players take it.

        Raises:
            UserError: a matrix that is not known here.
        """
        matrix, known = int(frame.colorspace), int(frame.color_range)
        tags = int(frame.color_primaries), int(frame.color_trc)
        if layout.kind != 'yuv':
            full = layout.kind == 'rgb' or known != LIMITED
            return cls(RGB if layout.kind == 'rgb' else matrix, full, *tags)
        if matrix in (RGB, UNSPECIFIED):
            matrix = BT709 if frame.height >= 720 or frame.width >= 1280 else BT601
        if matrix not in WEIGHTS:
            raise UserError(
                f'the video has colours by matrix {matrix} of H.273, which ppsr cannot convert; convert it to BT.709 '
                'or BT.2020 first.'
            )
        return cls(matrix, known == FULL or (known != LIMITED and layout.centred), *tags)

    def written_as(self, layout: Layout) -> 'Colour':
        """The colour to write in another layout: the same where it can be."""
        if layout.kind == 'rgb':
            return replace(self, matrix=RGB, full=True)
        if layout.kind == 'yuv' and self.matrix not in WEIGHTS:
            return replace(self, matrix=BT709, full=False if self.matrix == RGB else self.full)
        return self


def planes_of(frame, layout: Layout, reformatter) -> list[np.ndarray]:
    """The samples of a decoded frame: one array (rows, columns) per colour, in FFmpeg's order, without copying."""
    if frame.format.name != layout.name:
        # the same range before and after: values stay; this way no chroma is resampled either
        same = {'src_color_range': FULL, 'dst_color_range': FULL} if layout.kind != 'rgb' else {}
        # one thread: with more, libswscale 9.5 now and then leaves rows of chroma out where it begins a slice
        frame = reformatter.reformat(frame, format=layout.name, interpolation='POINT', threads=1, **same)
    planes = []
    for plane in frame.planes[: 1 if layout.kind == 'gray' else 3]:
        rows = np.frombuffer(plane, layout.dtype).reshape(plane.height, -1)
        planes.append(rows[:, : plane.width])
    return planes


def planes_to_rgb(planes: list[np.ndarray], layout: Layout, colour: Colour) -> np.ndarray:
    """(H, W, 3) float32 RGB, gray (H, W, 1), in [0, 1]; what lies beyond black and white is cut off."""
    black, white, middle, span = _levels(layout.depth, colour.full)
    if layout.kind == 'rgb':
        green, blue, red = (plane / np.float32(white) for plane in planes)
        return np.stack([red, green, blue], 2)
    luma = (planes[0] - black) / (white - black)
    if layout.kind == 'gray':
        return luma.clip(0, 1)[..., None]
    chroma = []
    for plane in planes[1:]:
        plane = (plane - middle) / span
        plane = _spread(plane, luma.shape[0], 0, layout.shifts[1], centred=True)
        chroma.append(_spread(plane, luma.shape[1], 1, layout.shifts[0], layout.centred))
    kr, kb = map(np.float32, WEIGHTS[colour.matrix])
    blue = luma + 2 * (1 - kb) * chroma[0]
    red = luma + 2 * (1 - kr) * chroma[1]
    green = (luma - kr * red - kb * blue) / (1 - kr - kb)
    return np.stack([red, green, blue], 2).clip(0, 1)


def rgb_to_planes(rgb: np.ndarray, layout: Layout, colour: Colour) -> list[np.ndarray]:
    """The opposite of :func:`planes_to_rgb`.

    Args:
        rgb: (H, W, 3 or 1) float32 in [0, 1].
        layout: of :meth:`Layout.named`.
        colour: of :meth:`Colour.written_as`.

    Returns:
        One array (rows, columns) of the layout's dtype per colour, in FFmpeg's order.
    """
    black, white, middle, span = _levels(layout.depth, colour.full)
    top = 2**layout.depth - 1

    def whole(plane: np.ndarray, scale: np.float32, offset: np.float32) -> np.ndarray:
        return np.rint(plane * scale + offset).clip(0, top).astype(layout.dtype)

    red, green, blue = np.moveaxis(np.broadcast_to(rgb, (*rgb.shape[:2], 3)), 2, 0)
    if layout.kind == 'rgb':
        return [whole(plane, white, black) for plane in (green, blue, red)]
    kr, kb = map(np.float32, WEIGHTS.get(colour.matrix, WEIGHTS[BT709]))
    luma = red if rgb.shape[2] == 1 else kr * red + (1 - kr - kb) * green + kb * blue
    planes = [whole(luma, white - black, black)]
    if layout.kind == 'gray':
        return planes
    for plane in ((blue - luma) / (2 * (1 - kb)), (red - luma) / (2 * (1 - kr))):
        plane = _gather(plane, 0, layout.shifts[1], centred=True)
        planes.append(whole(_gather(plane, 1, layout.shifts[0], layout.centred), span, middle))
    return planes


def _levels(depth: int, full: bool) -> tuple[np.float32, ...]:
    """Black, white, no chroma, and the span of chroma, in samples."""
    unit, top = 2 ** (depth - 8), 2**depth - 1
    levels = (0, top, (top + 1) // 2, top) if full else (16 * unit, 235 * unit, 128 * unit, 224 * unit)
    return tuple(map(np.float32, levels))


def _spread(plane: np.ndarray, size: int, axis: int, shift: int, centred: bool) -> np.ndarray:
    """Chroma at every pixel along an axis, linear between its samples."""
    if shift == 0:
        return plane
    where = np.arange(size, dtype=np.float32) / 2**shift
    if centred:
        where += np.float32(0.5**shift / 2 - 0.5)
    where = where.clip(0, plane.shape[axis] - 1)
    first = where.astype(np.intp)
    share = (where - first).reshape((-1, 1) if axis == 0 else (1, -1))
    second = np.minimum(first + 1, plane.shape[axis] - 1)
    a, b = plane.take(first, axis), plane.take(second, axis)
    return a + share * (b - a)  # of equal neighbours exactly their value


def _gather(plane: np.ndarray, axis: int, shift: int, centred: bool) -> np.ndarray:
    """Chroma for every second pixel along an axis: the mean of two, or around the even ones weights 1, 2, 1."""
    if shift == 0:
        return plane
    even = np.arange(0, plane.shape[axis], 2)
    here, after = plane.take(even, axis), plane.take(np.minimum(even + 1, plane.shape[axis] - 1), axis)
    if centred:
        return (here + after) / 2
    return (plane.take(np.maximum(even - 1, 0), axis) + 2 * here + after) / 4
