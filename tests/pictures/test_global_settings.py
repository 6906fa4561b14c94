"""What a user's program has set in the libraries that we call changes no result, and is as it was afterwards."""

import contextlib
import io
import warnings

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from support import TINY

from ppsr.archs import PPATDLight
from ppsr.data.bicubic import imresize_bicubic
from ppsr.images import decode_rgb, write_picture
from ppsr.metrics import psnr_ssim
from ppsr.pictures.upscaler import Upscaler
from ppsr.weights import save_checkpoint


@contextlib.contextmanager
def attribute(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
        assert getattr(owner, name) == value  # not ours to change
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def called(function, value, before):
    function(value)
    try:
        yield
    finally:
        function(before)


@contextlib.contextmanager
def cv2_without_threads_and_vectors():
    threads, optimized = cv2.getNumThreads(), cv2.useOptimized()
    cv2.setNumThreads(0)
    cv2.setUseOptimized(False)
    try:
        yield
    finally:
        cv2.setNumThreads(threads)
        cv2.setUseOptimized(optimized)


@contextlib.contextmanager
def warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        yield


def new_precision(*path):
    """torch's setting since 2.9, for all of it or for a part."""
    owner = torch.backends
    for name in path:
        owner = getattr(owner, name, None)
    if not hasattr(owner, 'fp32_precision'):
        pytest.skip('torch has this since 2.9')
    return attribute(owner, 'fp32_precision', 'bf16')


SETTINGS = {
    'default dtype float64': lambda: called(torch.set_default_dtype, torch.float64, torch.float32),
    'default dtype bfloat16': lambda: called(torch.set_default_dtype, torch.bfloat16, torch.float32),
    'default device meta': lambda: called(torch.set_default_device, 'meta', None),
    'with torch.device(meta)': lambda: torch.device('meta'),
    'matrix products medium': lambda: called(torch.set_float32_matmul_precision, 'medium', 'highest'),
    'products in bfloat16': lambda: new_precision('mkldnn', 'matmul'),
    'convolutions in bfloat16': lambda: new_precision('mkldnn', 'conv'),
    'no mkldnn': lambda: attribute(torch.backends.mkldnn, 'enabled', False),
    'autocast': lambda: torch.autocast('cpu', torch.bfloat16),
    'no gradients': torch.no_grad,
    'inference mode': torch.inference_mode,
    'deterministic algorithms': lambda: called(torch.use_deterministic_algorithms, True, False),
    'anomaly detection': torch.autograd.detect_anomaly,
    'cudnn.benchmark': lambda: attribute(torch.backends.cudnn, 'benchmark', True),
    'cudnn.deterministic': lambda: attribute(torch.backends.cudnn, 'deterministic', True),
    'one thread more': lambda: called(torch.set_num_threads, torch.get_num_threads() + 1, torch.get_num_threads()),
    'cv2': cv2_without_threads_and_vectors,
    'MAX_IMAGE_PIXELS': lambda: attribute(Image, 'MAX_IMAGE_PIXELS', 10),
    'LOAD_TRUNCATED_IMAGES': lambda: attribute(ImageFile, 'LOAD_TRUNCATED_IMAGES', True),
    'MAXBLOCK': lambda: attribute(ImageFile, 'MAXBLOCK', 2**20),
    'numpy raises': lambda: np.errstate(all='raise'),
    'warnings are errors': warnings_are_errors,
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A weight file; pictures with a flat part, one of them with transparency."""
    folder, noise = tmp_path_factory.mktemp('settings'), np.random.default_rng(0)
    torch.manual_seed(0)
    net = PPATDLight(**TINY)
    for parameter in net.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_checkpoint(folder / 'x.safetensors', net.state_dict(), {'type': 'PPATDLight', **TINY})
    pixels = noise.integers(0, 256, (37, 45, 4), np.uint8)
    pixels[:20, :25] = (200, 30, 40, 255)
    for name, form in (('x.png', 'PNG'), ('x.jpg', 'JPEG'), ('x.webp', 'WEBP'), ('x.tif', 'TIFF')):
        kept = pixels if form in ('PNG', 'TIFF') else np.ascontiguousarray(pixels[..., :3])
        for kind, part in (('x', kept), ('small', kept[12:24, 16:30])):  # small: one tile, partly flat
            with open(folder / f'{kind}{name[1:]}', 'wb') as file:
                write_picture(file, form, part.shape, part.dtype, [part])
    return folder


def results(folder) -> dict:
    """Pictures and numbers, from files to files."""
    upscaler = Upscaler.from_pretrained(folder / 'x.safetensors', device='cpu', outscale=1.7, tile=24, tile_overlap=8)
    found = {}
    for name in ('x.png', 'x.jpg', 'x.webp', 'x.tif'):
        found[f'{name}: read'] = upscaler.read(folder / name).pixels
        found[f'{name}: of a data set'] = decode_rgb(folder / name)
    found['x.png'], stats = upscaler.upscale_with_stats(found['x.png: read'])
    found['x.png: mask'], found['x.png: mask alone'] = stats.mask, upscaler.mask(found['x.png: read'])
    for form in ('jpg', 'png', 'webp', 'tif'):
        upscaler.upscale_file(folder / 'small.webp', folder / f'out.{form}')
        found[f'written {form}'] = np.frombuffer((folder / f'out.{form}').read_bytes(), np.uint8)
    stream = io.BytesIO()
    upscaler.upscale_file(folder / 'small.tif', stream)
    found['stream'] = np.frombuffer(stream.getvalue(), np.uint8)
    gt = decode_rgb(folder / 'x.jpg')
    lq = imresize_bicubic(gt[:36, :44], 2)
    found['bicubic'] = lq
    found['scores'] = np.array(psnr_ssim(imresize_bicubic(lq, 2, up=True), gt[:36, :44], 2))
    return found


@pytest.fixture(scope='module')
def expected(folder):
    return results(folder)


@pytest.mark.parametrize('setting', SETTINGS)
def test_results_are_those_of_a_process_where_nothing_was_set(folder, expected, setting):
    with SETTINGS[setting]():
        found = results(folder)
    assert expected['x.png: mask'].any() and not expected['x.png: mask'].all()
    # cv2 adds up in another order without vectors: basicsr's SSIM differs in its last bits, no picture does
    np.testing.assert_allclose(found.pop('scores'), expected['scores'], rtol=1e-12)
    for name, value in found.items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
