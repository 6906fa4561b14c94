"""Random broken and unusual input of every kind a user can hand in: options, pictures, weights, tensors.

A case takes a generator, makes its input, and checks what must always hold: a result of the right shape without NaN, or
one UserError (ValueError where a Python function was called wrongly). tests/cli/test_hostile.py runs the same cases
through hypothesis. The long run:

    python tests/fuzz.py --cases 10000 --seed 0            each of the kinds in turn; exit code 1 if anything was found
    python tests/fuzz.py --only options --seed 0 --first 1234 --cases 1      one case again, with its traceback
"""

import argparse
import contextlib
import copy
import functools
import io
import json
import logging
import math
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections import Counter
from pathlib import Path

import imagecodecs
import numpy as np
import torch
import yaml
from PIL import Image
from support import TINY
from tiny_training import options, write_pairs

from ppsr.errors import UserError
from ppsr.masks.pure_pass import pure_mask
from ppsr.schema import Choice, Each, Either, FilePath, Kind, Nested, Number, Section, Several, Truth, Typed, Whole
from ppsr.training import checkpoints

ODD_VALUES = [
    None,
    True,
    False,
    0,
    -1,
    1,
    3,
    7,
    0.5,
    -2.5,
    math.nan,
    math.inf,
    '',
    'x',
    '../up',
    '/tmp/x',
    '1e-4',
    'a b',
]
ODD_VALUES += [[], [1], ['x', None], [[1]], {}, {'type': 'x'}, {'type': None}, {1: 2}, '🙂', '\x00', [6, 6, 6, 6], [3]]
ODD_KEYS = ['x', 'type', 'name', 'scale', '', 1, None, '../up', 'dataroot_gt', 'lr']
FORCED = [
    '',
    '=',
    'a',
    'train:=1',
    ':=',
    'train:ema_decay=0.5',
    'name={',
    'val:metrics=[',
    'x:y:z=1',
    'train=~',
    'val=~',
]

# left alone by the grammar: what all else depends on, a loss whose weights would be fetched, tiles of a pixel
HELD = ('datasets', 'network_g', 'model_type', 'scale', 'num_gpu', 'perceptual_opt', 'tile')
SECONDS = 5  # of computing, for a case
WAIT = 12 * SECONDS  # by the clock: the machine may have other work
BYTES = 2**30


@functools.cache
def workplace() -> Path:
    """A folder with a few pictures and a checkpoint, for all cases of the process."""
    keep = tempfile.TemporaryDirectory(prefix='ppsr-fuzz-')
    workplace.keep = keep  # removed when the process ends
    folder = Path(keep.name)
    write_pairs(folder, 3)
    torch.save({'params': network().state_dict(), 'params_ema': network().state_dict()}, folder / 'net.pth')
    state = {'epoch': 1, 'iter': 5, 'optimizers': [{'state': {0: torch.ones(9)}}], 'schedulers': [{'last_epoch': 4}]}
    checkpoints.write(folder / '5.state', state | {'random_states': [checkpoints.random_state()]})
    from ppsr.weights import save_checkpoint

    config = {'type': 'PPATDLight', **TINY, 'depths': [1], 'num_heads': [2]}
    save_checkpoint(folder / 'net.safetensors', network().state_dict(), config, {'psnr': 1.0})
    return folder


@functools.cache
def network():
    from ppsr.archs import PPATDLight

    torch.manual_seed(0)
    return PPATDLight(**TINY | {'depths': [1], 'num_heads': [2]}).eval()


@functools.cache
def upscaler():
    from ppsr.pictures.upscaler import Upscaler

    return Upscaler(network(), device='cpu', say=lambda sentence: None)


# ------------------------------------------------------------------------------------------------------------ options


def options_case(rng: random.Random) -> None:
    """An options file with entries changed, missing or added, drawn from the schema, or damaged as text: up to a step
    and a validation."""
    from basicsr.data import build_dataloader, build_dataset
    from basicsr.models import build_model
    from basicsr.utils.options import dict2str

    from ppsr.data.checks import check_datasets
    from ppsr.training.loader import TrainBatches
    from ppsr.training.options import load_options

    opt = options(workplace(), path__pretrain_network_g=rng.choice([None, str(workplace() / 'net.pth')]))
    is_train = rng.random() < 0.8
    if not is_train:
        opt['datasets'] = {'test_1': opt['datasets']['val']}
    drawn = rng.random() < 0.5
    if drawn:
        _draw_options(opt, rng)
    for _ in range(0 if drawn else rng.choice([0, 1, 1, 2, 4])):
        _change(opt, rng)
    text = yaml.safe_dump(opt, allow_unicode=True)
    if not drawn and rng.random() < 0.2:
        text = _damage(text.encode(), rng).decode('utf-8', errors='replace')
    path = workplace() / 'options.yml'
    path.write_text(text, encoding='utf-8')
    forced = [rng.choice(FORCED) for _ in range(0 if drawn else rng.choice([0, 0, 0, 1, 2]))]
    try:
        opt = load_options(path, is_train, forced, root=workplace())
        for key in ('experiments_root', 'results_root', 'models', 'training_states', 'visualization', 'log'):
            inside = Path(opt['path'].get(key, workplace())).resolve()
            assert inside.is_relative_to(workplace().resolve()), f'{key} would write to {inside}'
        dict2str(opt)
        check_datasets(opt)
        for phase, dataset_opt in opt['datasets'].items():
            dataset = build_dataset(dataset_opt)
            if phase == 'train':
                train_data = next(TrainBatches(dataset, dataset_opt | {'num_worker_per_gpu': 0}, opt).epoch(0))
        model = build_model(opt)
        if is_train:
            model.update_learning_rate(1, opt['train'].get('warmup_iter', -1))
            model.feed_data(train_data)
            model.optimize_parameters(1)
            model.update_learning_rate(2, opt['train'].get('warmup_iter', -1))
        if opt['val'] is not None:
            loader = build_dataloader(dataset, dataset_opt, num_gpu=0)
            model.validation(loader, 1, None, False)
    except UserError as e:
        _one_sentence(e)


def _draw_options(opt: dict, rng: random.Random) -> None:
    """Change some entries to what the grammar of options (ppsr.training.schema) has for them: values inside and at the
    ends of their ranges, a few outside; other optimizers, schedulers, losses and metrics."""
    from ppsr.archs.settings import SETTINGS
    from ppsr.training import schema

    datasets = opt['datasets']
    sections = [(opt, schema.Options), (opt['path'], schema.Paths), (opt['val'], schema.TrainVal)]
    sections += [
        (opt['train'], schema.Train),
        (opt['logger'], schema.Logger),
        (datasets.get('train'), schema.PairedSRTrain),
    ]
    sections += [(datasets.get('val') or datasets.get('test_1'), schema.PairedSR)]
    for values, section in rng.sample([pair for pair in sections if pair[0] is not None], 2):
        values.update(_draw_section(section, rng, share=0.2, required=False))
    if rng.random() < 0.3:
        name = rng.choice(list(SETTINGS))
        opt['network_g'][name] = _draw(SETTINGS[name][0], rng)


def _draw_section(section: type[Section], rng: random.Random, share: float, required: bool = True) -> dict:
    """Values for a share of the keys of a section, and for those that it has to have."""
    drawn = {}
    for name, key in section.model_fields.items():
        kind = next(m for m in key.metadata if isinstance(m, Kind))
        if isinstance(kind, FilePath) or name in HELD:
            continue
        if (required and key.is_required()) or rng.random() < share:
            drawn[name] = _draw(kind, rng)
    return drawn


def _draw(kind: Kind, rng: random.Random):
    """A value of a kind, now and then one that is none."""
    if rng.random() < 0.02:
        return _odd(rng)
    if isinstance(kind, Number):
        least = kind.least if kind.least is not None else kind.above
        if rng.random() < 0.03:
            return rng.choice([least - 1, kind.most and kind.most + 1, kind.below])
        step = 1 if isinstance(kind, Whole) else 0.25
        # not up to the other end: as a size it would take all memory
        return least + step * rng.choice([kind.least is None, 1, 2, 3, 16 if (kind.most or 0) >= 16 else 0])
    if isinstance(kind, Several):
        count = kind.least if kind.least == kind.most else kind.least + rng.choice([0, 0, 0, 1])
        return [_draw(kind.kind, rng) for _ in range(count)]
    if isinstance(kind, Each):
        return {name: _draw(kind.kind, rng) for name in rng.sample(['a', 'ratio', 'psnr'], rng.randrange(3))}
    if isinstance(kind, Typed):
        name = rng.choice(list(kind.sections))
        return {'type': name, **_draw_section(kind.sections[name], rng, share=0.3)}
    if isinstance(kind, Nested):
        return _draw_section(kind.section, rng, share=0.5)
    if isinstance(kind, Either):
        return _draw(rng.choice(kind.kinds), rng)
    if isinstance(kind, Choice):
        return rng.choice(kind.values)
    return rng.choice([True, False]) if isinstance(kind, Truth) else rng.choice(['x', 'params', '{}', '{}x2'])


def _odd(rng: random.Random):
    """An odd value of its own: what another case changes in it must not be seen here."""
    return copy.deepcopy(rng.choice(ODD_VALUES))


def _change(opt: dict, rng: random.Random) -> None:
    """Change an entry somewhere in nested options."""
    node = opt
    while True:
        sections = [value for value in node.values() if isinstance(value, dict) and value]
        if not sections or rng.random() < 0.3:
            break
        node = rng.choice(sections)
    key = rng.choice([*node, rng.choice(ODD_KEYS)])
    if rng.random() < 0.2:
        node.pop(key, None)
    else:
        node[key] = _odd(rng)


def _damage(content: bytes, rng: random.Random) -> bytes:
    """Cut, overwrite, repeat or insert bytes."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        at, how = rng.randrange(len(content) + 1), rng.randrange(5)
        if how == 0:
            del content[at:]
        elif how == 1:
            del content[at : at + rng.randrange(1, 40)]
        elif how == 2:
            content[at:at] = bytes(rng.randrange(256) for _ in range(rng.randrange(1, 9)))
        elif how == 3:
            content[at:at] = content[at : at + rng.randrange(1, 60)]
        else:
            content[at : at + 1] = bytes([rng.randrange(256)])
    return bytes(content)


def _one_sentence(error: UserError) -> None:
    text = str(error)
    assert text.strip() and 'Traceback' not in text, f'not a sentence: {text!r}'


# ----------------------------------------------------------------------------------------------------------- pictures


def picture_case(rng: random.Random) -> None:
    """A picture of any shape, mode, depth and format, whole or damaged: read, and enlarged by a network."""
    from ppsr.images import read_picture

    content = _picture(rng)
    whole = rng.random() < 0.4
    if not whole:
        content = _damage(content, rng)
    try:
        picture = read_picture(io.BytesIO(content) if content else io.BytesIO(b' '))
    except UserError as e:
        _one_sentence(e)
        return
    height, width, channels = picture.pixels.shape
    assert picture.pixels.dtype in (np.uint8, np.uint16) and 1 <= channels <= 4 and height > 0 < width
    if height * width <= 4096:
        result = upscaler()(picture.pixels)
        assert result.shape[:2] == (2 * height, 2 * width) and result.dtype == picture.pixels.dtype
        assert result.reshape(2 * height, 2 * width, -1).shape[2] == channels


def _picture(rng: random.Random) -> bytes:
    height, width = rng.choice([1, 1, 2, 5, 8, 13, 31]), rng.choice([1, 2, 7, 8, 17, 40])
    noise = np.random.default_rng(rng.getrandbits(32))
    if rng.random() < 0.3:  # 16 bits
        channels = rng.choice([1, 2, 3, 4])
        pixels = noise.integers(0, 65536, (height, width, channels), np.uint16).squeeze()
        if pixels.ndim < 2:
            pixels = np.zeros((2, 2), np.uint16)
        return imagecodecs.png_encode(pixels)
    mode = rng.choice(['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'I', 'I;16', 'F', 'YCbCr', 'LAB', 'HSV'])
    form = rng.choice(['PNG', 'PNG', 'JPEG', 'TIFF', 'WEBP', 'BMP', 'GIF', 'PPM'])
    if mode in ('I', 'F'):
        image = Image.fromarray(
            noise.integers(-9, 70000, (height, width)).astype(np.int32 if mode == 'I' else np.float32)
        )
    elif mode == 'I;16':
        image = Image.fromarray(noise.integers(0, 65536, (height, width)).astype(np.uint16))
    else:
        rgba = Image.fromarray(noise.integers(0, 256, (height, width, 4), np.uint8), 'RGBA')
        image = Image.new(mode, (width, height)) if mode in ('LAB', 'HSV', 'PA') else rgba.convert('RGB').convert(mode)
        image = rgba if mode == 'RGBA' else image
    exif = Image.Exif()
    exif[0x0112] = rng.choice([1, 1, 3, 6, 8, 0, 99])
    file = io.BytesIO()
    try:
        image.save(file, form, **({'exif': exif.tobytes()} if form in ('JPEG', 'PNG', 'WEBP', 'TIFF') else {}))
    except (OSError, ValueError, KeyError, TypeError):  # a mode that this format does not have
        file = io.BytesIO()
        image.convert('RGB').save(file, 'PNG')
    return file.getvalue()


# Tags of TIFF: what each may reasonably hold; any of them may be anything (ODD_NUMBERS) instead
ODD_NUMBERS = [0, 1, 2, 3, 5, 9, 255, 256, 1000, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
TIFF_TAGS = {
    254: [0, 1],
    256: [1, 2, 5, 17],  # width
    257: [1, 2, 5, 17],
    258: [1, 2, 4, 8, 8, 10, 12, 14, 16, 16, 32],  # bits of a sample
    259: [1, 1, 1, 1, 1, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34712, 34925, 50000, 50001],  # compression
    262: [0, 1, 1, 2, 2, 3, 5, 6, 8, 32803],  # kind of colours
    266: [1, 2],
    273: [8],  # where the pixels are
    274: [1, 3, 6, 8, 9],  # orientation
    277: [1, 1, 2, 3, 4, 5],  # samples
    278: [17, 17, 17, 1, 2, 5],
    279: [1, 64, 999, 10_000],
    282: [72],
    283: [72],
    284: [1, 2],  # contiguous or planar
    296: [1, 2, 3],
    317: [1, 2, 3],  # predictor
    320: [0, 128],  # palette
    322: [16, 32],  # tiles
    323: [16, 32],
    324: [8],
    325: [64, 999],
    338: [0, 1, 2],  # further samples
    339: [1, 1, 1, 1, 1, 1, 2, 3, 4, 6],  # kind of samples
    347: [0, 255],
    34675: [0],  # profile
}
USUAL = (256, 257, 258, 259, 262, 273, 277, 278, 279)


def tiff_case(rng: random.Random) -> None:
    """A TIFF made tag by tag: read, or refused in a sentence; what the header says agrees with what is read."""
    from ppsr.images import decode_rgb, read_header, read_picture

    content = _tiff(rng)
    try:
        pixels = read_picture(content).pixels
    except UserError as e:
        _one_sentence(e)
        return
    assert pixels.dtype in (np.uint8, np.uint16) and 1 <= pixels.shape[2] <= 4 and pixels.size
    header = read_header(content)
    assert header.upright == pixels.shape[:2], f'{header} but {pixels.shape}'
    assert (header.bits > 8) == (pixels.dtype == np.uint16), f'{header} but {pixels.dtype}'
    assert decode_rgb(content).shape == (*pixels.shape[:2], 3)


def _tiff(rng: random.Random) -> bytes:
    order, big = rng.choice('<>'), rng.random() < 0.1
    odd = rng.choice([0, 0, 0.03, 0.1])  # share of tags with odd values; of odd types and counts half as many
    samples = rng.choice(TIFF_TAGS[277])
    pixels = bytes(rng.randrange(256) for _ in range(rng.choice([0, 7, 300, 9000, 9000, 9000])))
    if rng.random() < 0.3:
        pixels = zlib.compress(pixels)
    chosen = [tag for tag in TIFF_TAGS if rng.random() < (0.99 if tag in USUAL else 0.1)]
    begin = (16 if big else 8) + len(pixels)
    end = begin + (8 if big else 2) + (20 if big else 12) * len(chosen) + (8 if big else 4)
    entries, more = b'', b''
    for tag in chosen:
        kind, count = rng.choice([3, 3, 3, 4, 4, 16 if big else 4]), 1
        if tag in (258, 339) or (tag in (273, 279) and rng.random() < 0.3):
            count = samples
        if tag == 320:
            count = 3 * rng.choice([2, 16, 256])
        values = [rng.choice(TIFF_TAGS[tag])] * count
        if tag == 273:
            values = [16 if big else 8] * count
        elif tag == 277:
            values = [samples]
        elif tag == 279 and rng.random() < 0.7:
            values = [max(1, len(pixels) // count)] * count
        if rng.random() < odd:
            values = [rng.choice(ODD_NUMBERS) for _ in range(rng.choice([0, 1, 2, 3, 300]))]
        if rng.random() < odd / 2:
            kind = rng.choice([0, 1, 2, 5, 7, 10, 11, 12, 13, 99])
        code = {3: 'H', 4: 'I', 16: 'Q', 1: 'B', 2: 'B', 7: 'B', 5: 'II', 10: 'ii', 11: 'f', 12: 'd'}.get(kind, 'I')
        limit = 2 ** (8 * min(4, struct.calcsize('=' + code[0]))) - 1
        data = b''.join(
            struct.pack(order + code, *[min(v, limit // 2 if 'i' in code else limit)] * len(code)) for v in values
        )
        claimed = len(values) if rng.random() >= odd / 2 else rng.choice(ODD_NUMBERS)
        room = 8 if big else 4
        if len(data) > room:
            data, more = struct.pack(order + ('Q' if big else 'I'), end + len(more)), more + data
        entries += struct.pack(order + ('HHQ' if big else 'HHI'), tag, kind, claimed) + data.ljust(room, b'\0')
    follows = rng.choice([0, 0, 0, begin, 2**31])  # the next page: none, the same again, nowhere
    head = b'II' if order == '<' else b'MM'
    head += struct.pack(order + 'HHHQ', 43, 8, 0, begin) if big else struct.pack(order + 'HI', 42, begin)
    directory = struct.pack(order + ('Q' if big else 'H'), len(chosen)) + entries
    return head + pixels + directory + struct.pack(order + ('Q' if big else 'I'), follows) + more


# ------------------------------------------------------------------------------------------------------------ weights


def weights_case(rng: random.Random) -> None:
    """A damaged weight file or training state: refused, or read and found to fit or not."""
    from ppsr.weights import load_into, load_model, read_checkpoint

    original = workplace() / rng.choice(['net.pth', 'net.safetensors', 'net.safetensors', '5.state'])
    path = workplace() / f'damaged{original.suffix}'
    path.write_bytes(_damage_file(original.read_bytes(), rng))
    try:
        if original.suffix == '.state':
            checkpoints.read_state(path)
        elif rng.random() < 0.5:
            load_into(network_copy(), read_checkpoint(path, rng.choice([None, 'params', 'params_ema'])))
        else:
            load_model(path)
    except UserError as e:
        _one_sentence(e)


TYPES = ['ATDLight', 'PPATDLight', 'CAMixerATDLight', 'SpyNet', 'VGGFeatureExtractor', 'RRDBNet', '', 'x', 5, None]
NUMBERS = [0, 1, 2, 3, 7, 16, 48, 1024, 1025, -1, 10**9, 10**30, 0.5, 1.0, 5.5, math.nan, math.inf, True, None, '8']


def metadata_case(rng: random.Random) -> None:
    """A whole weight file whose metadata are made by a grammar: refused, or a network that enlarges a picture."""
    import safetensors.torch

    from ppsr.archs.settings import MASK_SETTINGS, SETTINGS
    from ppsr.convert import convert
    from ppsr.masks import list_masks
    from ppsr.weights import load_model

    def value(depth: int = 0):
        kind = rng.randrange(6)
        if kind == 0 and depth < 3:
            return [value(depth + 1) for _ in range(rng.choice([0, 1, 2, 65, 300]) if depth == 0 else 2)]
        if kind == 1 and depth < 3:
            return {rng.choice([*SETTINGS, 'type', 'x']): value(depth + 1)}
        return _odd(rng) if kind == 2 else rng.choice(NUMBERS)

    config = {'type': rng.choice([*TYPES[:3], *TYPES]), **TINY, 'depths': [1], 'num_heads': [2]}
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        key = rng.choice([*SETTINGS, *SETTINGS, 'type', 'load_path', 'self', 'args', '__class__', '\x1b[2J'])
        if rng.random() < 0.2:
            config.pop(key, None)
        else:
            config[key] = value()
    if rng.random() < 0.2:
        own = {rng.choice([*MASK_SETTINGS, 'x']): rng.choice(NUMBERS) for _ in range(rng.choice([0, 1, 1, 2]))}
        config |= {'type': 'PPATDLight', 'pp_mask': {'type': rng.choice(list_masks()), **own}}
    text = json.dumps(config)
    how = rng.randrange(8)
    if how == 0:
        text = _damage(text.encode(), rng).decode('utf-8', errors='replace')
    elif how == 1:
        text = rng.choice(['[', '{"type":', '"', '9']) * rng.choice([1, 1000, 200_000])
    metadata = {'config': text, 'facts': json.dumps({'\x1b[2J': value()}) if rng.random() < 0.5 else text}
    state = network().state_dict()
    if rng.random() < 0.3:
        name = rng.choice(list(state))
        state[name] = rng.choice([lambda x: x.half(), lambda x: x.int(), lambda x: x[:1].clone()])(state[name])
    path = workplace() / 'metadata.safetensors'
    safetensors.torch.save_file(state, path, metadata)
    try:
        net = load_model(path, arch=rng.choice([None, None, None, 'PPATDLight', 'SpyNet', 'x']))
    except UserError as e:
        _one_sentence(e)
    else:
        assert net(torch.rand(1, 3, 5, 6)).shape == (1, 3, 10, 12)
    try:
        for line in convert(path, workplace() / 'converted.safetensors'):
            assert line.isprintable(), f'would move the cursor: {line!r}'
    except UserError as e:
        _one_sentence(e)


def network_copy():
    return copy.deepcopy(network())


def _damage_file(content: bytes, rng: random.Random) -> bytes:
    """Damage near the structure (beginning or end) as often as anywhere."""
    part = rng.randrange(3)
    size = min(len(content), 4000)
    if part == 0:
        return _damage(content[:size], rng) + content[size:]
    if part == 1:
        return content[:-size] + _damage(content[-size:], rng)
    return _damage(content, rng)


# ------------------------------------------------------------------------------------------------------------ tensors


def tensor_case(rng: random.Random) -> None:
    """Tensors of any shape through the mask, the attention operators and a network."""
    torch.manual_seed(rng.getrandbits(32))
    case = rng.choice([_mask_case, _category_case, _window_case, _network_case])
    case(rng)


def _values(shape: tuple[int, ...], rng: random.Random) -> torch.Tensor:
    dtype = rng.choice([torch.float32, torch.float32, torch.float32, torch.float64])
    kind = rng.randrange(5)
    if kind == 0:
        return torch.zeros(shape, dtype=dtype)
    if kind == 1:
        return torch.full(shape, rng.choice([1.0, 0.5, -3.0, 1e-30]), dtype=dtype)
    if kind == 2:
        return torch.randn(shape, dtype=dtype) * rng.choice([1e-12, 1e3])
    return torch.rand(shape, dtype=dtype)


def _mask_case(rng: random.Random) -> None:
    shape = tuple(rng.choice([0, 1, 2, 3, 3, 5, 17, 33]) for _ in range(rng.choice([3, 4, 4, 4, 4, 5])))
    if rng.random() < 0.7:
        shape = (rng.choice([1, 2]), 3, rng.randrange(1, 40), rng.randrange(1, 40))
    lq = _values(shape, rng)
    if rng.random() < 0.2 and lq.numel():
        lq.view(-1)[0] = rng.choice([math.nan, math.inf, -math.inf])
    settings = (
        rng.choice([8, 1, 2, 128, 0, -1]),
        rng.choice([5, 1, 2, 16, 100, 0, -1]),
        rng.choice([None, 0, 1, 4, -3]),
    )
    try:
        mask = pure_mask(lq, *settings)
    except ValueError:
        return
    assert mask.dtype == torch.bool and mask.shape == (lq.shape[0], *lq.shape[2:])


def _category_case(rng: random.Random) -> None:
    from ppsr.ops.category_attention import COMPENSATIONS, category_attention

    batch, n, heads = rng.choice([1, 2, 3]), rng.choice([1, 2, 7, 16, 63, 130]), rng.choice([1, 2, 4])
    channels = heads * rng.choice([1, 3, 8, 12])
    qkv = _values((batch, n, 3 * channels), rng).requires_grad_(rng.random() < 0.5)
    category = torch.randint(0, rng.choice([1, 2, 64]), (batch, n))
    pure = rng.choice([None, torch.rand(batch, n) < rng.choice([0.0, 0.3, 0.9, 1.1])])
    if rng.random() < 0.1:
        category = category[:, : n // 2]
    scale = torch.tensor([rng.choice([1e-3, 1.0, 10.0, 100.0])], dtype=qkv.dtype)
    try:
        out = category_attention(
            qkv,
            category,
            scale,
            num_heads=heads,
            category_size=rng.choice([0, 1, 5, 16, 128, 1000]),
            pure=pure,
            compensation=rng.choice([*COMPENSATIONS, 'x']),
        )
    except ValueError:
        return
    _check_attention(out, qkv, (batch, n, channels))


def _window_case(rng: random.Random) -> None:
    from ppsr.ops.window_attention import window_attention

    window, heads = rng.choice([1, 2, 4, 8]), rng.choice([1, 2, 4])
    height, width = (window * rng.choice([1, 1, 2, 3]) + (rng.random() < 0.05) for _ in range(2))
    channels = heads * rng.choice([1, 3, 8, 12])
    qkv = _values((rng.choice([1, 2]), height, width, 3 * channels), rng).requires_grad_(rng.random() < 0.5)
    table = torch.randn((2 * window - 1) ** 2, heads, dtype=qkv.dtype)
    try:
        out = window_attention(
            qkv, table, num_heads=heads, window_size=window, shift=rng.choice([0, window // 2, window // 2, window, -1])
        )
    except ValueError:
        return
    _check_attention(out, qkv, (*qkv.shape[:3], channels))


def _check_attention(out: torch.Tensor, qkv: torch.Tensor, shape: tuple[int, ...]) -> None:
    assert out.shape == shape and out.dtype == qkv.dtype
    assert out.isfinite().all(), 'not finite'
    if qkv.requires_grad:
        (gradient,) = torch.autograd.grad(out.sum(), qkv)
        assert gradient.shape == qkv.shape and gradient.isfinite().all(), 'gradient not finite'


def _network_case(rng: random.Random) -> None:
    shape = rng.choice(
        [(rng.choice([1, 2]), 3, rng.randrange(1, 30), rng.randrange(1, 30)), (1, 4, 8, 8), (3, 8, 8), (0, 3, 8, 8)]
    )
    lq = _values(shape, rng).float()
    try:
        with torch.no_grad():
            sr, mask = network()(lq, return_mask=True)
    except ValueError:
        return
    assert sr.shape == (shape[0], 3, 2 * shape[2], 2 * shape[3]) and mask.dtype == torch.bool
    assert sr.isfinite().all(), 'not finite'


KINDS = {
    'options': options_case,
    'pictures': picture_case,
    'tiff': tiff_case,
    'weights': weights_case,
    'metadata': metadata_case,
    'tensors': tensor_case,
}


def quiet() -> None:
    """No log lines of basicsr's builders, no warnings about broken pictures."""
    logging.disable(logging.WARNING)
    warnings.simplefilter('ignore')


@contextlib.contextmanager
def _limits():
    """TimeoutError where a case computes for more than SECONDS or hangs, MemoryError where the process grew by more
    than BYTES."""

    def interrupt(number, frame):
        raise TimeoutError(f'more than {SECONDS} s' if number == signal.SIGPROF else f'hangs for {WAIT} s')

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    timers = {signal.ITIMER_PROF: (signal.SIGPROF, SECONDS), signal.ITIMER_REAL: (signal.SIGALRM, WAIT)}
    for timer, (number, seconds) in timers.items():
        signal.signal(number, interrupt)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    if grown > BYTES:
        raise MemoryError(f'{grown / 2**30:.1f} GiB')


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cases', type=int, default=10_000, help='in all')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--first', type=int, default=0, help='number of the first case')
    parser.add_argument('--only', choices=KINDS, help='one kind instead of all in turn')
    args = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    kinds = [args.only] if args.only else list(KINDS)
    workplace()
    network()(torch.zeros(1, 3, 8, 8)).sum().backward()  # torch's first step takes its time
    done, found, start = Counter(), {}, time.monotonic()
    for i in range(args.first, args.first + args.cases):
        kind = kinds[i % len(kinds)]
        case = i if args.only else i // len(kinds)
        done[kind] += 1
        try:
            with _limits():
                KINDS[kind](random.Random(f'{args.seed} {kind} {case}'))
        except Exception as e:
            where = traceback.extract_tb(e.__traceback__)[-1]
            found.setdefault((kind, type(e).__name__, where.filename, where.lineno), (case, traceback.format_exc()))
    for (kind, *_), (case, text) in found.items():
        print(f'--- {kind} {case} (--only {kind} --seed {args.seed} --first {case} --cases 1)\n{text}')
    counts = ', '.join(f'{n} {kind}' for kind, n in done.items())
    print(
        f'{sum(done.values())} cases ({counts}) in {time.monotonic() - start:.0f} s: {len(found)} different failures.'
    )
    return bool(found)


if __name__ == '__main__':
    sys.exit(main())
