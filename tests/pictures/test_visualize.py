"""Masks and comparisons: the right colours, the right numbers, captions inside of the picture."""

import os

import numpy as np
import pytest
import torch

from ppsr.archs import PPATDLight
from ppsr.archs.masked import mirror_pad
from ppsr.cli import main
from ppsr.data.bicubic import imresize_bicubic
from ppsr.errors import UserError
from ppsr.images import as_rgb, read_picture, write_file
from ppsr.masks.pure_pass import PurePass
from ppsr.pictures import visualize
from ppsr.pictures.compare import compare, psnr_ssim, table
from ppsr.pictures.upscaler import Upscaler
from ppsr.pictures.visualize import Panel, comparison, difference, mask_overlay, network_mask, panels
from ppsr.weights import save_checkpoint


def blocks(height=40, width=60, seed=0):
    """Flat blocks of random colours, with a noisy strip."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (-(-height // 20), -(-width // 20), 3)).repeat(20, 0).repeat(20, 1)[:height, :width]
    image[:, :7] = rng.integers(0, 256, image[:, :7].shape)
    return image.astype(np.uint8)


@pytest.mark.parametrize('size', [(40, 60), (1, 1), (3, 50), (37, 4), (48, 32)], ids=str)
@pytest.mark.parametrize('window, shift', [(5, None), (4, 1), (7, 6)])
@pytest.mark.parametrize('band', [5, 16, 1000])
def test_the_mask_shown_is_the_mask_used(monkeypatch, size, window, shift, band):
    monkeypatch.setattr(visualize, 'BAND_ROWS', band)
    rgb, pure_pass = blocks(*size), PurePass(8, window, shift)
    lq = torch.from_numpy(rgb).permute(2, 0, 1)[None].float() / 255
    expected = pure_pass(mirror_pad(lq, 16))[0, : size[0], : size[1]].numpy()
    np.testing.assert_array_equal(network_mask(rgb, pure_pass, 16), expected)


def test_overlay_tints_pure_pixels_in_the_colour_of_their_label():
    image = np.zeros((2, 3, 3), np.uint8)
    image[0] = (200, 20, 20)  # red: centre 0 is (0.9, 0.09, 0.09)
    image[1] = (20, 200, 200)  # cyan: centre 4 of 8
    pure = np.array([[True, True, False], [True, False, False]])
    overlay = mask_overlay(image, pure)
    luma = 0.299 * 200 + 0.701 * 20
    tint = visualize.TINT
    assert overlay[0, 0].tolist() == pytest.approx(
        [(1 - tint) * luma + tint * c * 255 for c in (0.9, 0.09, 0.09)], abs=1
    )
    assert overlay[1, 0, 0] < overlay[1, 0, 1] == overlay[1, 0, 2]
    assert overlay[0, 2].tolist() == pytest.approx([0.6 * luma] * 3, abs=1)  # not pure: gray, darker
    with pytest.raises(UserError, match='mask is'):
        mask_overlay(image, pure[:1])


def test_as_rgb():
    gray = np.full((1, 1, 1), 65535, np.uint16)
    assert as_rgb(gray).tolist() == [[[255, 255, 255]]]
    assert as_rgb(np.array([[[10, 0]]], np.uint8)).tolist() == [[[255, 255, 255]]]  # invisible: white paper
    assert as_rgb(np.array([[[10, 20, 30, 255]]], np.uint8)).tolist() == [[[10, 20, 30]]]


def test_difference_is_in_gray_levels():
    a, b = np.zeros((1, 2, 3), np.uint8), np.array([[[3, 0, 0], [255, 255, 255]]], np.uint8)
    assert difference(a, b).tolist() == [[1.0, 255.0]] == difference(b, a).tolist()


@pytest.mark.parametrize('size', [(30, 40), (3, 200), (100, 4)], ids=str)
@pytest.mark.parametrize('with_gt', [True, False])
def test_captions_lie_inside_of_the_picture_and_apart(monkeypatch, size, with_gt):
    """The picture is white at its edges, so nothing is cut off, and all captions have a place of their own."""
    figures = []

    class Kept(visualize.Figure):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(visualize, 'Figure', Kept)
    lq = blocks(*size)
    large = lq.repeat(2, 0).repeat(2, 1)
    details = {'bicubic': '27.312 dB / 0.8012', 'sr': '28.312 dB / 0.8112'}
    pure = np.ones(size, bool)
    pictures = comparison(lq, large, large, pure, None, large if with_gt else None, 'PP-ATD-light', details)
    assert [p.title for p in pictures if p.title != 'Ground truth'] == [
        'Input',
        'Bicubic',
        'PP-ATD-light',
        'Difference',
        'Pure pixels',
    ]
    drawn = panels(pictures, 'photo.png, ×2')
    assert drawn.dtype == np.uint8 and drawn.shape[1] == 1920
    figure = figures[0]
    boxes = [figure._suptitle.get_window_extent()]
    boxes += [axis.title.get_window_extent() for axis in figure.axes[: len(pictures)]]
    height, width = drawn.shape[:2]
    for i, box in enumerate(boxes):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert all(axis.title.get_fontsize() >= 14 for axis in figure.axes[: len(pictures)])


def test_crop_shows_a_part_of_every_panel():
    lq = blocks()
    large = lq.repeat(2, 0).repeat(2, 1)
    for panel in comparison(lq, large, large, np.ones((40, 60), bool), crop=(10, 5, 20, 15)):
        assert panel.image.shape[:2] == (30, 40)
        if panel.title in ('Input', 'Bicubic'):
            np.testing.assert_array_equal(panel.image, large[10:40, 20:60])


def test_panels_of_one_picture():
    assert panels([Panel(blocks(), 'Alone')], columns=3, width=4).shape[1] == 480


@pytest.fixture
def weights(tmp_path, tiny):
    path = tmp_path / 'tiny.safetensors'
    save_checkpoint(path, PPATDLight(**tiny).state_dict(), {'type': 'PPATDLight', **tiny})
    return path


def test_compare_measures_by_the_benchmark_protocol(tiny):
    gt = blocks(46, 62)
    lq = imresize_bicubic(gt, 2)
    up = Upscaler(PPATDLight(**tiny), device='cpu')
    bicubic, ours = compare(lq, {'ours': up}, np.pad(gt, ((0, 1), (0, 0), (0, 0))))
    assert bicubic.psnr == pytest.approx(psnr_ssim(imresize_bicubic(lq, 2, up=True), gt, 2)[0])
    assert bicubic.stats is None and ours.stats.gmacs > 0 and ours.image.shape == gt.shape
    text = table([bicubic, ours])
    assert f'{bicubic.psnr:.3f}' in text and f'{ours.stats.pure_share:.1%}' in text
    assert compare(lq, {'ours': up})[0].psnr is None
    for wrong in (gt[:-3], gt[:, :-1], lq):
        with pytest.raises(UserError, match='ground truth has'):
            compare(lq, {'ours': up}, wrong)
    assert psnr_ssim(gt[:3, :3], gt[:3, :3], 2) == (None, None)


def test_compare_command(tmp_path, weights, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gt = blocks(46, 62)
    write_file(tmp_path / 'hr.png', gt)
    write_file(tmp_path / 'lr.png', imresize_bicubic(gt, 2))
    arguments = ['compare', '-i', 'lr.png', '--model-path', str(weights), '--device', 'cpu']
    assert main([*arguments, '--gt', 'hr.png', '--dense']) == 0
    said = capsys.readouterr().out
    assert 'PP-ATD-light, dense' in said and 'lr_compare.png written' in said
    assert read_picture('lr_compare.png').pixels.shape[1] == 1920
    assert main([*arguments, '--no-pure-pass', '--crop', '3', '4', '10', '8', '-o', 'dense.png']) == 0
    for wrong, message in (
        (['--crop', '30', '0', '10', '10'], 'not inside'),
        (['-o', 'lr.png'], 'input itself'),
        (['-o', 'x.txt'], 'cannot write'),
        (['--gt', 'nothing.png'], 'does not exist'),
        (['--dense', '--no-pure-pass'], 'exempts nothing'),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_mask_command(tmp_path, capsys):
    write_file(tmp_path / 'in' / 'flat.png', np.full((10, 12, 3), 100, np.uint8))
    write_file(tmp_path / 'in' / 'noise.png', np.random.default_rng(0).integers(0, 256, (10, 12, 3)).astype(np.uint8))
    (tmp_path / 'in' / 'text.png').write_text('no picture')
    arguments = ['mask', '-i', str(tmp_path / 'in'), '-o', str(tmp_path / 'out'), '--zoom', '3']
    assert main(arguments) == 1
    said = capsys.readouterr()
    assert 'flat.png: 100.00% pure' in said.out and 'noise.png: 0.00% pure' in said.out
    assert 'Mean of 2 images: 50.00% pure' in said.out and 'text.png is not a picture' in said.err
    assert read_picture(tmp_path / 'out' / 'flat_mask.png').pixels.shape == (30, 36, 3)
    assert main(arguments) == 1 and 'exists already' in capsys.readouterr().out
    again = [*arguments, '--overwrite']
    assert main([*again, '--mask', 'variance', '--threshold', '0.01']) == 1
    assert 'flat.png: 100.00% pure' in (said := capsys.readouterr().out) and 'noise.png: 0.00% pure' in said
    assert main([*again, '--mask', 'both', '--threshold', '2']) == 1  # by colour, then
    assert 'noise.png: 0.00% pure' in capsys.readouterr().out
    assert main([*again, '--mask', 'variance', '--threshold', '2']) == 1
    assert 'noise.png: 100.00% pure' in capsys.readouterr().out
    for wrong in (
        ['--mask', 'variance', '--threshold', '3'],
        ['--threshold', '0.1'],
        ['--mask', 'variance', '--shift', '1'],
    ):
        assert main([*again, *wrong]) == 2
        assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert main([*arguments, '--window-size', '0']) == 2
    assert main([*arguments, '--zoom', '0']) == 2


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('title', ['price_$5_$6.png', '$\\frac{', os.fsdecode(b'caf\xe9.png'), '写真.png', 'a\nb'])
def test_a_caption_may_be_any_file_name(title):
    plain = panels([Panel(blocks(), 'Alone')], 'x' * len(title), columns=3, width=4)
    drawn = panels([Panel(blocks(), 'Alone')], title, columns=3, width=4)
    assert drawn.shape[1] == plain.shape[1] and (drawn[:40] < 128).any()  # something is written there


def test_pictures_do_not_depend_on_the_users_matplotlib():
    import matplotlib

    expected = panels([Panel(blocks(), 'Alone', 'detail')], 'title', width=4)
    settings = {'font.size': 30, 'figure.facecolor': 'red', 'text.usetex': True, 'image.interpolation': 'bicubic'}
    with matplotlib.rc_context(settings):
        np.testing.assert_array_equal(panels([Panel(blocks(), 'Alone', 'detail')], 'title', width=4), expected)
