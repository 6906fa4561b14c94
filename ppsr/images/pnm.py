"""Netpbm's formats (PBM, PGM, PPM, PAM), at the depth that the file has: Pillow reads 16-bit colour as 8 bits."""

import re
from typing import BinaryIO

import numpy as np

from ppsr.errors import UserError
from ppsr.images.picture import Header, Picture, check_size, stretch

__all__ = ['header', 'read']

_CHANNELS = {'1': 1, '2': 1, '3': 3, '4': 1, '5': 1, '6': 3}
_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}


def _parse(file: BinaryIO, name: str) -> tuple[str, int, int, int, int]:
    """(kind, width, height, channels, greatest value); the file is left at the first sample."""
    kind = file.read(2).decode('ascii')[1]
    if kind in 'Ff':
        raise UserError(f'{name} has floating-point samples; convert it to 8 or 16 bits first.')
    if kind == '7':
        entries = {}
        while (line := file.readline(200)).strip() != b'ENDHDR':
            if not line:
                raise ValueError('its header has no end')
            key, _, value = line.strip().partition(b' ')
            entries[key] = value.strip()
        width, height, channels, most = (int(entries[key]) for key in (b'WIDTH', b'HEIGHT', b'DEPTH', b'MAXVAL'))
        if channels not in _MODES:
            raise UserError(f'{name} has {channels} samples per pixel; pictures have 1 to 4.')
    else:
        width, height, *rest = (_number(file) for _ in range(2 if kind in '14' else 3))
        channels, most = _CHANNELS[kind], rest[0] if rest else 1
    if not 1 <= most <= 65535:
        raise ValueError(f'its greatest value is {most}')
    check_size(name, width, height, channels, 8 if most < 256 else 16)
    return kind, width, height, channels, most


def _number(file: BinaryIO) -> int:
    """The next number of the header; one character behind it is taken, too."""
    digits = b''
    while True:
        c = file.read(1)
        if c == b'#':
            file.readline()
            c = b'\n'
        if c.isdigit() and len(digits) < 10:
            digits += c
        elif c.isspace() and not digits:
            continue
        elif c.isspace():
            return int(digits)
        else:
            raise ValueError('its header is cut off or holds something that is not a number')


def header(file: BinaryIO, name: str) -> Header:
    kind, width, height, channels, most = _parse(file, name)
    return Header(width, height, '1' if kind in '14' else _MODES[channels], most.bit_length())


def read(file: BinaryIO, name: str) -> Picture:
    kind, width, height, channels, most = _parse(file, name)
    shape, count = (height, width, channels), height * width * channels
    if kind == '4':
        row = -(-width // 8)
        bits = np.frombuffer(_exactly(file, row * height), np.uint8).reshape(height, row)
        samples = 1 - np.unpackbits(bits, axis=1)[:, :width]  # 1 is black
    elif kind in '123':
        samples = _plain(file, count, digits=kind == '1')
        samples = 1 - samples if kind == '1' else samples
    else:
        dtype = np.dtype('u1' if most < 256 else '>u2')
        samples = np.frombuffer(_exactly(file, count * dtype.itemsize), dtype)
    return Picture(np.array(stretch(samples.reshape(shape), most)))  # a copy: what is read may not be written to


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) < size:
        raise ValueError(f'it ends after {len(data)} of {size} bytes')
    return data


def _plain(file: BinaryIO, count: int, digits: bool) -> np.ndarray:
    """`count` numbers written in decimal; of a bitmap every digit is one."""
    text = re.sub(rb'#[^\n]*', b'', file.read(8 * count + 2**16))
    found = re.findall(rb'[01]' if digits else rb'\d+', text)[:count]
    if len(found) < count:
        raise ValueError(f'it ends after {len(found)} of {count} samples')
    return np.array([min(int(number), 65535) for number in found], np.uint8 if digits else np.uint16)
