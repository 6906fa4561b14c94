"""Enlarging pictures: kinds of input, memory, precision, threads, and the command with everything that can go wrong."""

import dataclasses
import doctest
import errno
import io
import os
import pickle
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from processes import Process
from torch import nn

from ppsr import tiling
from ppsr.archs import ATDLight, PPATDLight
from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.images import read_picture, write_file
from ppsr.pictures import memory, upscaler
from ppsr.pictures.batch import STREAM, Job, plan_jobs
from ppsr.pictures.upscaler import Upscaler, resize_bands
from ppsr.weights import save_checkpoint

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


class Repeat(nn.Upsample):
    """A stand-in that repeats every pixel: what comes out is known."""

    def __init__(self, upscale: int = 2):
        super().__init__(scale_factor=upscale)
        self.upscale = upscale


class Blur(nn.Module):
    """A stand-in that looks around: colour bleeds as in a real network."""

    upscale = 2

    def forward(self, x):
        return nn.functional.interpolate(nn.functional.avg_pool2d(x, 5, 1, 2, count_include_pad=False), scale_factor=2)


def noise(*shape, dtype=np.uint8, seed=0):
    values = np.random.default_rng(seed).random(shape)
    return values.astype(dtype) if np.dtype(dtype).kind == 'f' else (values * np.iinfo(dtype).max).astype(dtype)


def repeat(array, factor=2):
    return array.repeat(factor, 0).repeat(factor, 1)


@pytest.fixture
def fast():
    return Upscaler(Repeat(), device='cpu')


@pytest.fixture
def weights(tmp_path, tiny):
    """A tiny PP-ATD-light with its configuration, as a file."""
    path = tmp_path / 'weights' / 'tiny.safetensors'
    save_checkpoint(path, PPATDLight(**tiny).state_dict(), {'type': 'PPATDLight', **tiny})
    return path


# ------------------------------------------------------------------------------------------------------ the class


@pytest.mark.parametrize('dtype', [np.uint8, np.uint16, np.float32, np.float64])
@pytest.mark.parametrize('shape', [(5, 7), (5, 7, 1), (5, 7, 3), (1, 1), (1, 1, 3), (3, 90, 3)], ids=str)
def test_arrays_come_back_as_they_went_in(fast, shape, dtype):
    image = noise(*shape, dtype=dtype)
    result = fast(image)
    assert result.dtype == dtype and result.shape == (2 * shape[0], 2 * shape[1], *shape[2:])
    # gray passes through RGB and back: the luma weights add up to 1 within rounding
    np.testing.assert_allclose(result, repeat(image), atol=1e-6 if np.dtype(dtype).kind == 'f' else 0)


def test_non_contiguous_arrays(fast):
    image = noise(10, 14, 3)[::2, ::-2]
    np.testing.assert_array_equal(fast(image), repeat(image))


@pytest.mark.parametrize('mode', ['L', 'LA', 'RGB', 'RGBA', 'P', 'I;16'])
def test_pillow_images_come_back_as_pillow_images(fast, mode):
    image = Image.fromarray(noise(6, 5, dtype=np.uint16)) if mode == 'I;16' else Image.new(mode, (5, 6))
    image.info.update(icc_profile=SRGB, dpi=(300, 300))
    result = fast(image)
    assert result.size == (10, 12) and result.mode == {'P': 'RGB'}.get(mode, mode)
    assert result.info['icc_profile'] == SRGB and result.info['dpi'] == (300, 300)


def test_a_path_gives_a_pillow_image(fast, tmp_path):
    pixels = noise(6, 5, 3)
    write_file(tmp_path / 'x.png', pixels)
    result = fast(str(tmp_path / 'x.png'))
    np.testing.assert_array_equal(np.asarray(result), repeat(pixels))
    write_file(tmp_path / 'deep.png', noise(6, 5, 3, dtype=np.uint16))
    with pytest.raises(UserError, match='upscale_file'):
        fast(tmp_path / 'deep.png')


@pytest.mark.parametrize(
    'image, message',
    [
        (np.zeros((0, 5), np.uint8), 'no pixels'),
        (np.zeros((5, 0, 3), np.uint8), 'no pixels'),
        (np.zeros((5, 5, 5), np.uint8), 'H, W'),
        (np.zeros(5, np.uint8), 'H, W'),
        (np.zeros((5, 5), np.int64), 'int64'),
        (np.full((5, 5), 255.0), r'\[0, 1\]'),
        (np.full((5, 5), np.nan), r'\[0, 1\]'),
        (Image.new('RGB', (0, 5)), 'no pixels'),
        (b'bytes', 'path'),
    ],
)
def test_what_is_no_picture_is_refused(fast, image, message):
    with pytest.raises(UserError, match=message):
        fast(image)


def test_hidden_colours_do_not_bleed_into_the_edge():
    image = np.zeros((20, 20, 4), np.uint8)
    image[...] = (0, 255, 0, 0)  # invisible green …
    image[5:15, 5:15] = (200, 0, 0, 255)  # … around visible red
    result = Upscaler(Blur(), device='cpu')(image)
    visible = result[..., 3] > 0
    assert visible.sum() >= 400 and (result[visible][:, :3] == (200, 0, 0)).all()
    assert (result[:6, :, 3] == 0).all() and (result[14:26, 14:26, 3] == 255).all()


@pytest.mark.parametrize('alpha', [0, 255])
def test_flat_alpha_stays_flat(fast, alpha):
    image = noise(9, 9, 4)
    image[..., 3] = alpha
    assert (fast(image)[..., 3] == alpha).all()


def test_alpha_is_that_of_the_picture_at_every_band(fast):
    alpha = np.repeat(np.linspace(0, 255, 200).astype(np.uint8)[:, None], 8, 1)
    result = fast(np.dstack([alpha, alpha]))[..., 1]
    assert (np.diff(result[:, 4].astype(int)) >= 0).all()  # a ramp: no step back where bands meet
    assert np.abs(result.astype(int) - np.asarray(Image.fromarray(alpha).resize((16, 400), Image.BICUBIC))).max() <= 1


@pytest.mark.parametrize('outscale', [0.3, 1, 1.5, 3, 2.0001])
def test_another_factor_is_lanczos_after_the_network(outscale):
    image = noise(70, 30, 3)
    result = Upscaler(Repeat(), device='cpu', outscale=outscale, tile=16, tile_overlap=3)(image)
    size = (round(30 * outscale), round(70 * outscale))
    # Pillow rounds 8-bit images between its two passes: the reference is computed in float
    channels = [Image.fromarray(repeat(image)[..., c].astype(np.float32)).resize(size, Image.LANCZOS) for c in range(3)]
    np.testing.assert_allclose(result, np.rint(np.dstack(channels).clip(0, 255)), atol=1)


@pytest.mark.parametrize('outscale', [0, -1, float('nan'), float('inf'), 10**400, 1e-300, '2', 2j, [2]], ids=str)
def test_a_factor_that_is_none_is_refused(outscale):
    with pytest.raises(UserError, match='outscale must be a number from 0.01 to 100') as error:
        Upscaler(Repeat(), device='cpu', outscale=outscale)
    assert len(str(error.value)) < 120


@pytest.mark.parametrize('target', [(33, 31), (200, 111), (90, 35), (1, 1), (91, 70)], ids=str)
def test_resizing_in_bands_is_resizing(target):
    image = noise(90, 70, 2, dtype=np.float32)
    whole = [Image.fromarray(np.ascontiguousarray(image[..., c])).resize(target[::-1], Image.LANCZOS) for c in (0, 1)]
    bands = resize_bands(iter([image[:7], image[7:8], image[8:60], image[60:]]), (90, 70), target)
    np.testing.assert_allclose(np.concatenate(list(bands)), np.dstack(whole), atol=1e-5)


def test_stats(tiny):
    net = PPATDLight(**tiny)
    up = Upscaler(net, device='cpu', tile=0)
    assert up.stats is None
    image = noise(20, 30, 3)
    image[:, :15] = 128
    result, stats = up.upscale_with_stats(image)
    assert up.stats is stats and result.shape == (40, 60, 3)
    lq = torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255
    with torch.inference_mode():
        sr, mask = net(lq, return_mask=True)
    np.testing.assert_array_equal(stats.mask, mask[0, :20, :30].numpy())
    assert stats.pure_share == pytest.approx(mask[0, :20, :30].double().mean().item()) and stats.pure_share > 0.3
    assert stats.gmacs * 1e9 == pytest.approx(sum(net.macs(20, 30, mask).values()))
    assert stats.dense_gmacs > stats.gmacs > 0 and 0 < stats.saved_share < 1 and stats.seconds > 0
    assert (stats.input_size, stats.output_size, stats.tile, stats.tiles) == ((30, 20), (60, 40), 0, 1)
    np.testing.assert_array_equal(result, (sr.clamp(0, 1) * 255).round()[0].permute(1, 2, 0).numpy())


def test_threads_share_one_upscaler(tiny):
    up = Upscaler(PPATDLight(**tiny), device='cpu', tile=24, tile_overlap=8)
    images = [noise(20 + 3 * i, 30, 3, seed=i) for i in range(6)]
    expected = [up(image) for image in images]

    def work(i):
        result = up(images[i])
        return result, up.stats

    with ThreadPoolExecutor(4) as pool:
        for i, (result, stats) in enumerate(pool.map(work, range(6))):
            np.testing.assert_array_equal(result, expected[i])
            assert stats.input_size == (30, 20 + 3 * i)  # of the call of this thread


def test_the_network_is_put_into_eval_mode_and_gets_no_gradient(tiny):
    net = PPATDLight(**tiny).train()
    up = Upscaler(net, device='cpu')
    up(noise(8, 8, 3))
    assert not net.training and all(p.grad is None for p in net.parameters())


# ----------------------------------------------------------------------------------------------- memory, precision


def test_no_tiles_while_memory_allows(fast, monkeypatch):
    monkeypatch.setattr(memory, 'free_memory', lambda device: 10 * 2**30)
    fast(noise(50, 60, 3))
    assert fast.stats.tile == 0 and fast.stats.tiles == 1


def test_tiles_from_the_memory_that_is_free(monkeypatch):
    net = Repeat()
    up = Upscaler(net, device='cpu', tile_overlap=8)
    measured = 1000.0
    monkeypatch.setattr(memory, 'measure_bytes_per_pixel', lambda run, device: measured)
    image = noise(300, 400, 3)
    monkeypatch.setattr(memory, 'free_memory', lambda device: 60 * 2**20)
    np.testing.assert_array_equal(up(image), repeat(image))
    small = up.stats.tile
    assert 0 < small < 300 and measured * small**2 < 60 * 2**20
    monkeypatch.setattr(memory, 'free_memory', lambda device: 100 * 2**20)
    up(image)
    assert small < up.stats.tile
    monkeypatch.setattr(memory, 'free_memory', lambda device: 2**20)
    with pytest.raises(UserError, match='at least'):
        up(image)


def test_max_memory_limits_the_process(monkeypatch):
    monkeypatch.setattr(memory, 'measure_bytes_per_pixel', lambda run, device: 1000.0)
    monkeypatch.setattr(memory, 'free_memory', lambda device: 100 * 2**30)
    monkeypatch.setattr(memory, 'used_memory', lambda device: 500 * 2**20)
    image = noise(300, 400, 3)
    up = Upscaler(Repeat(), device='cpu', max_memory='560M', tile_overlap=8)
    up(image)
    assert 0 < up.stats.tile < 300
    with pytest.raises(UserError, match='allowed'):
        Upscaler(Repeat(), device='cpu', max_memory='400M')(image)
    with pytest.raises(UserError, match='amount of memory'):
        Upscaler(Repeat(), device='cpu', max_memory='lots')


@pytest.mark.parametrize('tile, used', [(0, None), (200, None), (64, 64), (None, None)])
def test_a_memory_limit_is_kept_whatever_tile_is_asked_for(monkeypatch, tile, used):
    monkeypatch.setattr(memory, 'measure_bytes_per_pixel', lambda run, device: 1000.0)
    monkeypatch.setattr(memory, 'used_memory', lambda device: 500 * 2**20)
    said, image = [], noise(300, 400, 3)
    up = Upscaler(Repeat(), device='cpu', max_memory='530M', tile=tile, tile_overlap=8, say=said.append)
    np.testing.assert_array_equal(up(image), repeat(image))
    assert 0 < up.stats.tile < 200 and up.stats.tile == (used or up.stats.tile)
    assert len(said) == (tile in (0, 200))


def test_too_little_memory_to_open_the_picture(tmp_path):
    write_file(tmp_path / 'x.png', noise(50, 60, 3))
    with pytest.raises(UserError, match='to be opened'):
        Upscaler(Repeat(), device='cpu', max_memory='10M')(tmp_path / 'x.png')
    with open(tmp_path / 'x.png', 'rb') as file, pytest.raises(UserError, match='to be opened'):
        Upscaler(Repeat(), device='cpu', max_memory='10M').read(file)


@pytest.mark.parametrize('form', ['png', 'tiff', 'ppm', 'jpg'])
def test_a_named_pipe_is_read_once_with_a_memory_limit_too(tmp_path, form):
    path, pipe, pixels = tmp_path / f'x.{form}', tmp_path / 'pipe', noise(20, 30, 3)
    Image.fromarray(pixels).save(path)
    os.mkfifo(pipe)
    writer = subprocess.Popen(['cp', str(path), str(pipe)])
    try:
        found = Upscaler(Repeat(), device='cpu', max_memory='64G').read(pipe).pixels
    finally:
        writer.kill()
        writer.wait()
    np.testing.assert_array_equal(found, read_picture(path).pixels)


@pytest.mark.parametrize('way', [memory._peak_rss, memory._sampled_peak_rss])
def test_bytes_per_pixel_are_measured(monkeypatch, way):
    def run(lq):  # 4000 bytes per pixel, held at once for a moment
        kept = torch.ones(1000 * lq.shape[-1] * lq.shape[-2])
        time.sleep(0.1)
        return kept

    monkeypatch.setattr(memory, '_peak_rss', way)
    assert 3600 < memory.measure_bytes_per_pixel(run, torch.device('cpu')) < 5000


class Hungry(Repeat):
    """Runs out of memory, as PyTorch says it, with more than `limit` pixels."""

    limit = 900

    def forward(self, x):
        if x.shape[-1] * x.shape[-2] > self.limit:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"
            )
        return super().forward(x)


def test_out_of_memory_tries_smaller_tiles_and_says_so(tmp_path):
    said, image = [], noise(100, 90, 3)
    up = Upscaler(Hungry(), device='cpu', tile_overlap=4, say=said.append)
    np.testing.assert_array_equal(up(image), repeat(image))
    assert len(said) == 2 and 'the whole image: trying 48' in said[0] and 'tiles of 48: trying 16' in said[1]
    assert up.stats.tile == 16
    up.upscale_file(_png(tmp_path / 'x.png', image), tmp_path / 'y.png')
    np.testing.assert_array_equal(read_picture(tmp_path / 'y.png').pixels, repeat(image))
    up.net.limit = 10
    with pytest.raises(UserError, match='even with tiles'):
        up(image)


def test_other_errors_are_not_taken_for_lack_of_memory():
    class Wrong(Repeat):
        def forward(self, x):
            raise RuntimeError('shape mismatch')

    with pytest.raises(RuntimeError, match='shape mismatch'):
        Upscaler(Wrong(), device='cpu')(noise(4, 4, 3))


def test_a_result_that_is_not_finite_is_refused():
    class Broken(Repeat):
        def forward(self, x):
            return super().forward(x) * float('nan')

    with pytest.raises(UserError, match='not finite'):
        Upscaler(Broken(), device='cpu')(noise(4, 4, 3))


def test_overflow_in_half_precision_falls_back_to_fp32():
    class Overflows(Repeat):
        def forward(self, x):
            return super().forward(x) / (0 if torch.is_autocast_enabled('cpu') else 1)

    said, image = [], noise(4, 4, 3)
    up = Upscaler(Overflows(), device='cpu', dtype='bf16', say=said.append)
    np.testing.assert_array_equal(up(image), repeat(image))
    assert len(said) == 1 and 'fp32' in said[0]


def test_bf16_is_close_to_fp32(tiny):
    net, image = ATDLight(**tiny), noise(16, 16, 3)
    exact = Upscaler(net, device='cpu')(image).astype(int)
    assert np.abs(Upscaler(net, device='cpu', dtype='bf16')(image) - exact).max() <= 4


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(dtype='fp16'), 'fp16 needs a GPU'),
        (dict(dtype='int8'), 'not a precision'),
        (dict(dtype=torch.float64), 'not supported'),
        (dict(device='abacus'), 'not a device'),
        (dict(device='meta'), 'not supported'),
        (dict(device='cuda:99'), 'does not exist'),
        (dict(tile=8), 'smaller than the tile'),
        (dict(tile=-1), 'tile'),
        (dict(tile='32'), 'tile'),
        (dict(tile=1.5), 'tile'),
        (dict(tile_overlap='8'), 'overlap'),
        (dict(max_memory='9' * 400), 'amount of memory'),
        (dict(max_memory=-1), 'amount of memory'),
        (dict(max_memory=10**400), 'amount of memory'),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        Upscaler(Repeat(), **{'device': 'cpu', **options})


def test_extreme_shapes(fast):
    wide = noise(1, 30_000, 3)
    np.testing.assert_array_equal(Upscaler(Repeat(), device='cpu', tile=512)(wide), repeat(wide))
    np.testing.assert_array_equal(fast(wide[:, :1]), repeat(wide[:, :1]))


# ------------------------------------------------------------------------------------------------------- planning


def _png(path, pixels=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, noise(6, 5, 3) if pixels is None else pixels)
    return path


def test_names_of_outputs(tmp_path):
    for name in ('a.jpg', 'b.png', 'c.bmp', 'sub/d.tif', '.hidden.png', 'notes.txt'):
        (tmp_path / 'in' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'in' / name).touch()

    def targets(*inputs, output='out', **options):
        plan = plan_jobs([str(tmp_path / i) for i in inputs], str(tmp_path / output), **options)
        return [str(job.target.relative_to(tmp_path)) for job in plan.jobs]

    assert targets('in') == ['out/a_out.jpg', 'out/b_out.png', 'out/c_out.png']
    assert targets('in', recursive=True) == ['out/a_out.jpg', 'out/b_out.png', 'out/c_out.png', 'out/sub/d_out.tif']
    assert targets('in/*.[jp][pn]g', suffix='', ext='webp') == ['out/a.webp', 'out/b.webp']
    assert targets('in/**/*.tif') == ['out/d_out.tif']
    assert targets('in/a.jpg', output='result.png') == ['result.png']
    assert targets('in/a.jpg', 'in/a.jpg', 'in') == ['out/a_out.jpg', 'out/b_out.png', 'out/c_out.png']
    assert plan_jobs(['-'], '-').jobs == [Job(STREAM, STREAM)]
    assert targets('in', output='in') == ['in/a_out.jpg', 'in/b_out.png', 'in/c_out.png']
    (tmp_path / 'in' / 'a_out.jpg').touch()  # the result of an earlier run is no input
    assert targets('in', output='in') == ['in/a_out.jpg', 'in/b_out.png', 'in/c_out.png']
    (tmp_path / 'in' / 'out').mkdir()
    (tmp_path / 'in' / 'out' / 'a_out.jpg').touch()
    assert 'in/out/out/a_out_out.jpg' not in targets('in', output='in/out', recursive=True)


@pytest.mark.parametrize(
    'inputs, output, options, message',
    [
        (['nothing.png'], 'out', {}, 'does not exist'),
        (['*.gif'], 'out', {}, 'matches no file'),
        (['empty'], 'out', {}, 'no pictures'),
        (['a.png', 'b.png'], 'x.png', {}, 'one output'),
        (['a.png', 'b.png'], '-', {}, 'one output'),
        (['a.png', 'a.jpg'], 'out', {'ext': 'png'}, 'made of a.jpg and of a.png'),
        (['a.png'], '.', {'suffix': ''}, 'is an input'),
        (['a.png'], 'a.png', {}, 'is an input'),
        (['a.png', 'a_out.png'], '.', {}, 'is an input'),
        (['a.png'], 'out', {'suffix': '../x'}, 'separator'),
        (['a.png'], 'out', {'ext': 'bmp'}, 'extension'),
    ],
)
def test_plans_that_would_lose_something_are_refused(tmp_path, monkeypatch, inputs, output, options, message):
    monkeypatch.chdir(tmp_path)
    for name in ('a.png', 'b.png', 'a.jpg', 'a_out.png'):
        (tmp_path / name).touch()
    (tmp_path / 'empty').mkdir()
    with pytest.raises(UserError, match=message):
        plan_jobs(inputs, output, **options)


# ---------------------------------------------------------------------------------------------------- the command


def test_command_on_a_folder_with_all_kinds_of_files(tmp_path, weights, capsys):
    source, out = tmp_path / 'in', tmp_path / 'out'
    _png(source / 'rgb.png')
    _png(source / 'deep.png', noise(6, 5, 3, dtype=np.uint16))
    _png(source / 'alpha.png', noise(6, 5, 4))
    _png(source / 'sub' / 'gray.png', noise(6, 5, 1))
    _png(source / 'one.tiff', noise(1, 1, 2, dtype=np.uint16))
    _png(source / 'panorama.webp', noise(3, 300, 3))
    Image.new('CMYK', (9, 8)).save(source / 'cmyk.jpg', dpi=(200, 200))
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'lime', 'blue')]
    frames[0].save(source / 'moving.gif', save_all=True, append_images=frames[1:])
    (source / 'text.png').write_text('no picture')
    (source / 'empty.jpg').touch()
    arguments = ['upscale', '-i', str(source), '-o', str(out), '--model-path', str(weights), '-r', '--device', 'cpu']
    assert main(arguments) == 1  # two files failed, all others are there
    said = capsys.readouterr()
    assert 'text.png is not a picture' in said.err and 'empty.jpg is empty' in said.err
    assert 'CMYK converted to RGB' in said.err and 'moving.gif: first of' in said.err
    assert '8 images enlarged' in said.out and '2 failed' in said.out and 'GMACs' in said.out and 'pure' in said.out
    expected = {
        'rgb_out.png': (12, 10, 3),
        'deep_out.png': (12, 10, 3),
        'alpha_out.png': (12, 10, 4),
        'sub/gray_out.png': (12, 10, 1),
        'one_out.tiff': (2, 2, 2),
        'panorama_out.webp': (6, 600, 3),
        'cmyk_out.jpg': (16, 18, 3),
        'moving_out.png': (16, 16, 3),
    }
    found = {str(path.relative_to(out)): read_picture(path) for path in out.rglob('*') if path.is_file()}
    assert {name: picture.pixels.shape for name, picture in found.items()} == expected
    assert found['deep_out.png'].pixels.dtype == found['one_out.tiff'].pixels.dtype == np.uint16
    assert found['cmyk_out.jpg'].dpi == (200, 200)


def test_command_skips_what_exists_and_overwrites_on_demand(tmp_path, weights, capsys):
    a, b, out = _png(tmp_path / 'a.png'), _png(tmp_path / 'b.png'), tmp_path / 'out'
    (out / 'a_out.png').parent.mkdir()
    (out / 'a_out.png').write_text('made earlier')
    arguments = ['upscale', '-i', str(a), str(b), '-o', str(out), '--model-path', str(weights)]
    assert main(arguments) == 0
    assert (out / 'a_out.png').read_text() == 'made earlier' and read_picture(out / 'b_out.png').pixels.shape[0] == 12
    assert '1 image enlarged' in (said := capsys.readouterr().out) and '1 skipped' in said
    assert main([*arguments, '--overwrite']) == 0
    assert read_picture(out / 'a_out.png').pixels.shape == (12, 10, 3)


def test_command_with_mask_factor_and_format(tmp_path, weights, capsys):
    image = _png(tmp_path / 'a.png', noise(20, 10, 4))
    code = main(
        ['upscale', '-i', str(image), '-o', str(tmp_path / 'o'), '--model-path', str(weights), '-s', '1.5', '--ext']
        + ['tiff', '--suffix', 'big', '--save-mask', '-t', '16', '--tile-overlap', '4']
    )
    assert code == 0 and 'Lanczos makes ×1.5' in capsys.readouterr().err
    assert read_picture(tmp_path / 'o' / 'a_big.tiff').pixels.shape == (30, 15, 4)
    assert read_picture(tmp_path / 'o' / 'a_big_mask.png').pixels.shape == (20, 10, 3)


def test_command_from_standard_input_to_standard_output(weights):
    file = io.BytesIO()
    Image.fromarray(noise(6, 5, 3)).save(file, 'JPEG')
    process = Process(['upscale', '-i', '-', '-o', '-', '--model-path', weights], input=file.getvalue())
    assert process.wait() == 0, process.stderr.decode()
    image = Image.open(io.BytesIO(process.stdout))
    assert image.format == 'PNG' and image.size == (10, 12)
    assert b'1 image enlarged' in process.stderr


def test_quality_and_transparency_of_jpeg(tmp_path, weights, capsys):
    image, clear = _png(tmp_path / 'a.png', noise(40, 40, 3)), _png(tmp_path / 'clear.png', noise(6, 5, 4))
    sizes = []
    for quality in ('20', '95'):
        target = tmp_path / f'{quality}.jpg'
        arguments = ['upscale', '-i', str(image), '-o', str(target), '--model-path', str(weights)]
        assert main([*arguments, '--quality', quality]) == 0
        sizes.append(target.stat().st_size)
    assert sizes[0] < sizes[1]
    arguments = ['upscale', '-i', str(clear), '-o', str(tmp_path), '--ext', 'jpg', '--model-path', str(weights)]
    assert main(arguments) == 1
    assert 'transparency' in capsys.readouterr().err and not (tmp_path / 'clear_out.jpg').exists()


def test_a_30000_pixel_wide_picture_into_a_jpeg_is_refused_before_the_work(tmp_path, weights, capsys):
    wide = _png(tmp_path / 'wide.png', np.zeros((1, 33_000, 3), np.uint8))
    arguments = ['upscale', '-i', str(wide), '-o', str(tmp_path), '--ext', 'jpg', '--model-path', str(weights)]
    assert main(arguments) == 1
    assert 'at most 65,535' in capsys.readouterr().err


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, weights, capsys, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, 'No space left on device')

    image = _png(tmp_path / 'a.png')
    monkeypatch.setattr(os, 'fsync', full)
    arguments = ['upscale', '-i', str(image), '-o', str(tmp_path / 'o'), '--model-path', str(weights)]
    assert main(arguments) == 1
    assert 'disk is full' in capsys.readouterr().err and os.listdir(tmp_path / 'o') == []


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_no_half_file_and_resumes(tmp_path, weights, monkeypatch, number):
    for name in 'abc':
        _png(tmp_path / 'in' / f'{name}.png')
    arguments = ['upscale', '-i', str(tmp_path / 'in'), '-o', str(tmp_path / 'o'), '--model-path', str(weights)]
    run, calls = upscaler.run_network, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return run(*args)

    monkeypatch.setattr(upscaler, 'run_network', interrupted)
    assert main(arguments) == 128 + number
    assert os.listdir(tmp_path / 'o') == ['a_out.png']
    assert main(arguments) == 0 and len(calls) == 4  # b and c; a is not done again
    assert sorted(os.listdir(tmp_path / 'o')) == ['a_out.png', 'b_out.png', 'c_out.png']


class Evil:
    def __reduce__(self):
        return os.mkdir, ('executed',)


@pytest.mark.parametrize(
    'options, message',
    [
        (['--model', 'no_such_model'], 'no_such_model'),
        (['--model-path', 'nothing.pth'], 'nothing.pth'),
        (['--model-path', 'evil.pth'], 'refused'),
        (['--dtype', 'fp16', '--device', 'cpu'], 'fp16 needs a GPU'),
        (['--max-memory', 'lots'], 'amount of memory'),
        (['--arch', 'NoSuchArch'], 'NoSuchArch'),
        (['-t', '16', '--tile-overlap', '16'], 'smaller than the tile'),
    ],
)
def test_mistakes_are_sentences_with_exit_code_2(tmp_path, weights, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'evil.pth').write_bytes(pickle.dumps({'params_ema': Evil()}, protocol=2))
    _png(tmp_path / 'a.png')
    own = [] if '--model-path' in options or '--model' in options else ['--model-path', str(weights)]
    assert main(['upscale', '-i', 'a.png', '-o', 'out', *own, *options]) == 2
    said = capsys.readouterr().err
    assert message in said and 'Traceback' not in said
    assert not (tmp_path / 'executed').exists() and not (tmp_path / 'out').exists()


@pytest.mark.parametrize('factor', ['0', '-2', 'four', 'nan', 'inf', '1e-300', '9' * 400])
def test_a_wrong_factor_is_refused(capsys, factor):
    assert main(['upscale', '-i', 'a.png', '-o', 'out', '-s', factor]) == 2
    said = capsys.readouterr().err
    assert 'is not a number from 0.01 to 100' in said and len(said) < 200


def test_pure_pass_on_plain_weights_and_dense_on_ours(tmp_path, tiny, capsys):
    plain = tmp_path / 'plain.safetensors'
    save_checkpoint(plain, ATDLight(**tiny).state_dict(), {'type': 'ATDLight', **tiny})
    image = _png(tmp_path / 'a.png', np.full((16, 16, 3), 90, np.uint8))
    out = ['upscale', '-i', str(image), '-o', str(tmp_path / 'o'), '--overwrite', '--model-path', str(plain)]
    assert main(out) == 0 and 'pure' not in capsys.readouterr().out
    assert main([*out, '--arch', 'PPATDLight']) == 0 and '100.0% of the pixels pure' in capsys.readouterr().out
    assert main([*out, '--arch', 'PPATDLight', '--no-pure-pass']) == 0 and 'pure' not in capsys.readouterr().out


def test_it_works_out_of_the_box(tmp_path):
    up = Upscaler.from_pretrained(device='cpu')
    small = noise(4, 5, 3)
    assert up(small).shape == (16, 20, 3) and up.scale == 4
    # enlarging an image that is flat must give that colour, about; at its edge the network sees zeros beside it
    flat = np.full((24, 24, 3), 120, np.uint8)
    assert np.abs(up(flat)[32:-32, 32:-32].astype(int) - 120).max() <= 5
    assert up.stats.pure_share == 1 and dataclasses.is_dataclass(up.stats)


def test_documented_examples_run():
    for module in (upscaler, tiling, memory):
        assert doctest.testmod(module).failed == 0
    results = doctest.testfile('../../docs/upscale.md')
    assert results.attempted > 4 and results.failed == 0


@pytest.mark.parametrize('version', [1, 2])
def test_the_limit_of_every_control_group_above_counts(tmp_path, version):
    """SLURM and systemd put the limit deeper than the root, and the process deeper still."""
    limit, used, cached = {
        1: ('memory.limit_in_bytes', 'memory.usage_in_bytes', 'total_inactive_file'),
        2: ('memory.max', 'memory.current', 'inactive_file'),
    }[version]
    root = tmp_path / 'cgroup'
    base = root / 'memory' if version == 1 else root
    (tmp_path / 'self').write_text({1: '3:cpu:/x\n5:cpu,memory:/job/step/task\n', 2: '0::/job/step/task\n'}[version])
    (base / 'job/step/task').mkdir(parents=True)
    assert memory._cgroup_room(tmp_path / 'self', root) == float('inf')
    for folder, most, now, files in (('.', 'max', 0, 0), ('job', 1000, 700, 50), ('job/step', 5000, 0, 0)):
        (base / folder / limit).write_text(f'{most}\n')
        (base / folder / used).write_text(f'{now}\n')
        (base / folder / 'memory.stat').write_text(f'anon 1\n{cached} {files}\n')
    assert memory._cgroup_room(tmp_path / 'self', root) == 350
    (base / 'job/step/task' / limit).write_text('90')
    (base / 'job/step/task' / used).write_text('10')
    (base / 'job/step/task/memory.stat').write_text('')
    assert memory._cgroup_room(tmp_path / 'self', root) == 80
    assert memory._cgroup_room(tmp_path / 'nothing', root) == float('inf')
