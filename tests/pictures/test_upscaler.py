"""The Upscaler: kinds of input, factors, precision, threads."""

import contextlib
import dataclasses
import doctest
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from picture_cases import Blur, Repeat, noise, repeat
from PIL import Image, ImageCms

from ppsr import tiling
from ppsr.archs import ATDLight, PPATDLight
from ppsr.errors import UserError
from ppsr.images import write_file
from ppsr.ops import native, use_backend
from ppsr.ops.dispatch import no_bf16
from ppsr.pictures import memory, upscaler
from ppsr.pictures.upscaler import Upscaler, resize_bands

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB')).tobytes()


@pytest.fixture
def fast():
    return Upscaler(Repeat(), device='cpu')


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


def test_a_result_that_is_not_finite_is_refused():
    class Broken(Repeat):
        def forward(self, x):
            return super().forward(x) * float('nan')

    with pytest.raises(UserError, match='not finite'):
        Upscaler(Broken(), device='cpu')(noise(4, 4, 3))


def test_overflow_in_half_precision_falls_back_to_fp32(monkeypatch):
    class Overflows(Repeat):
        calls = 0

        def forward(self, x):
            self.calls += 1
            return super().forward(x) / (self.calls - 1)  # infinite at first

    monkeypatch.setattr(upscaler, 'no_bf16', lambda: None)
    monkeypatch.setattr(upscaler, 'in_precision', lambda dtype, device: contextlib.nullcontext())
    said, image = [], noise(4, 4, 3)
    up = Upscaler(Overflows(), device='cpu', dtype='bf16', say=said.append)
    np.testing.assert_array_equal(up(image), repeat(image))
    assert len(said) == 1 and 'fp32' in said[0]


def test_bf16_on_a_cpu_that_has_it(tiny):
    if (reason := no_bf16()) is not None:
        pytest.skip(f'no bf16 here: {reason}')
    said, net, image = [], ATDLight(**tiny), noise(16, 16, 3)
    exact, half = (Upscaler(net, device='cpu', dtype=d, say=said.append)(image / 255.0) for d in ('fp32', 'bf16'))
    assert 0 < np.abs(exact - half).max() < 0.02
    assert not said


@pytest.mark.parametrize('missing', ['instructions', 'backend'])
def test_bf16_on_another_cpu_is_fp32_in_a_sentence(tiny, missing):
    said, net, image = [], ATDLight(**tiny), noise(16, 16, 3)
    try:
        if missing == 'instructions' and native.unavailable_reason() is None:
            assert native.set_target('baseline')
        with use_backend('torch' if missing == 'backend' else None):
            half = Upscaler(net, device='cpu', dtype='bf16', say=said.append)(image)
            exact = Upscaler(net, device='cpu')(image)
    finally:
        if native.unavailable_reason() is None:
            native.set_target(None)
    np.testing.assert_array_equal(exact, half)
    assert len(said) == 1 and 'computed in fp32' in said[0] and said[0].count('.') == 1


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
