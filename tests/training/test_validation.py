"""PurePassSRModel as it validates: metrics and statistics against direct computation, tiles, modes, records."""

import functools
import logging
import math
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from basicsr.data import build_dataloader, build_dataset
from basicsr.metrics import calculate_psnr, calculate_ssim
from basicsr.models import build_model
from basicsr.utils import tensor2img
from support import TINY
from tiny_training import write_options

from ppsr.cli import main
from ppsr.data.bicubic import imresize_bicubic
from ppsr.errors import UserError

SIZES = [(36, 44), (52, 40)]  # HR


@pytest.fixture
def opt(tmp_path):
    rng = np.random.default_rng(0)
    for i, (h, w) in enumerate(SIZES):
        hr = rng.integers(0, 256, (h // 4, w // 4, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        hr[: h // 2] = 40 * i + 30  # a flat half: pure
        for folder, img in (('HR', hr), ('LRbicx2', imresize_bicubic(hr, 2))):
            (tmp_path / folder).mkdir(exist_ok=True)
            cv2.imwrite(str(tmp_path / folder / f'{i}.png'), img)
    metric = {'crop_border': 2, 'test_y_channel': True}
    return {
        'name': 'validation',
        'model_type': 'PurePassSRModel',
        'scale': 2,
        'num_gpu': 0,
        'is_train': False,
        'dist': False,
        'rank': 0,
        'world_size': 1,
        'network_g': {'type': 'PPATDLight', **TINY},
        'path': {'visualization': str(tmp_path / 'visualization')},
        'val': {
            'metrics': {'psnr': {'type': 'calculate_psnr', **metric}, 'ssim': {'type': 'calculate_ssim', **metric}}
        },
    }


def loader_of(tmp_path):
    dataset_opt = {
        'name': 'tiny',
        'type': 'PairedSRDataset',
        'phase': 'val',
        'scale': 2,
        'dataroot_gt': str(tmp_path / 'HR'),
        'dataroot_lq': str(tmp_path / 'LRbicx2'),
        'io_backend': {'type': 'disk'},
    }
    return build_dataloader(build_dataset(dataset_opt), dataset_opt, num_gpu=0, dist=False)


def by_hand(model, loader) -> dict:
    """The same means, written down once more without the model's machinery."""
    net, rows = model.net_g, []
    for data in loader:
        with torch.no_grad():
            sr, mask = net.eval()(data['lq'], return_mask=True)
        h, w = data['lq'].shape[-2:]
        sr, gt = (np.round(x[0].clamp(0, 1).numpy().transpose(1, 2, 0)[..., ::-1] * 255) for x in (sr, data['gt']))
        macs, dense = sum(net.macs(h, w, mask).values()), sum(net.macs(h, w).values())
        rows.append(
            {
                'psnr': calculate_psnr(sr, gt, 2, test_y_channel=True),
                'ssim': calculate_ssim(sr, gt, 2, test_y_channel=True),
                'pure_percent': 100 * mask[:, :h, :w].float().mean().item(),
                'gmacs': macs / 1e9,
                'gmacs_saved_percent': 100 * (1 - macs / dense),
            }
        )
    return {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}


def test_metrics_and_statistics_are_means_over_the_images(opt, tmp_path):
    model, loader = build_model(opt), loader_of(tmp_path)
    model.validation(loader, 7, None, save_img=True)
    assert model.metric_results == pytest.approx(by_hand(model, loader), rel=1e-5)
    assert 10 < model.metric_results['pure_percent'] < 90 and model.metric_results['gmacs_saved_percent'] > 0
    record = model.best_metric_results['tiny']
    assert set(record) == {'psnr', 'ssim', 'pure_percent', 'gmacs', 'gmacs_saved_percent'}
    assert all(record[key]['iter'] == 7 and record[key]['val'] == model.metric_results[key] for key in record)
    saved = sorted((tmp_path / 'visualization' / 'tiny').iterdir())
    assert [path.name for path in saved] == ['0_validation.png', '1_validation.png']
    for path, data in zip(saved, loader):
        with torch.no_grad():
            expected = tensor2img([model.net_g(data['lq'])])  # basicsr's way
        np.testing.assert_array_equal(cv2.imread(str(path)), expected)


def test_best_records_keep_the_best(opt, tmp_path):
    model, loader = build_model(opt), loader_of(tmp_path)
    model.validation(loader, 1, None)
    first = dict(model.metric_results)
    with torch.no_grad():
        model.net_g.upsample[0].bias += 0.5  # ruins every pixel; what is pure stays
    model.validation(loader, 2, None)
    assert model.metric_results['psnr'] < first['psnr']
    record = model.best_metric_results['tiny']
    assert record['psnr']['val'] == first['psnr'] and record['psnr']['iter'] == 1
    assert record['gmacs']['val'] == pytest.approx(first['gmacs'])


@pytest.mark.parametrize('training', [True, False])
def test_the_network_is_left_in_the_mode_it_was_found_in(opt, tmp_path, training):
    model = build_model(opt)
    model.net_g.train(training)
    model.validation(loader_of(tmp_path), 1, None)
    assert model.net_g.training is training


def test_tiles_are_off_by_default_and_cost_what_they_cost(opt, tmp_path):
    loader = loader_of(tmp_path)
    torch.manual_seed(0)
    whole = build_model(opt)
    whole.validation(loader, 1, None)
    opt['val'].update(tile=16, tile_overlap=4)
    torch.manual_seed(0)
    tiled = build_model(opt)
    tiled.validation(loader, 1, None)
    assert tiled.metric_results['psnr'] == pytest.approx(whole.metric_results['psnr'], abs=1.0)
    assert tiled.metric_results['gmacs'] > whole.metric_results['gmacs']  # tiles overlap


def test_tensorboard_and_log_have_the_statistics(opt, tmp_path, caplog):
    written = {}

    class Board:
        def add_scalar(self, name, value, step):
            written[name] = (value, step)

    model = build_model(opt)
    logger = logging.getLogger('basicsr')
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    try:
        model.validation(loader_of(tmp_path), 5, Board())
    finally:
        logger.removeHandler(caplog.handler)
    assert {f'metrics/tiny/{key}' for key in model.metric_results} == set(written)
    assert written['metrics/tiny/gmacs'] == (model.metric_results['gmacs'], 5)
    for key in ('psnr', 'pure_percent', 'gmacs_saved_percent'):
        assert f'# {key}: {model.metric_results[key]:.4f}' in caplog.text


def test_parameters_and_gmacs_are_logged_when_built(opt, caplog):
    logger = logging.getLogger('basicsr')
    logger.setLevel(logging.INFO)
    logger.addHandler(caplog.handler)
    try:
        model = build_model(opt)
    finally:
        logger.removeHandler(caplog.handler)
    gmacs = sum(model.net_g.macs(360, 640).values()) / 1e9
    assert f'22,520 parameters, {gmacs:.2f} GMACs for 1280×720 output (640×360 input)' in caplog.text


def test_another_network_validates_without_statistics(opt, tmp_path):
    opt['network_g'] = {'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
    model = build_model(opt)
    model.validation(loader_of(tmp_path), 1, None)
    assert set(model.metric_results) == {'psnr', 'ssim'}


# ------------------------------------------------------------------------------------------------- what is never scored


def nan_for(model, shape):
    """An output of NaN for the image of this size, through the network's own arithmetic."""
    original = model.net_g.forward

    def forward(x, *args, **kwargs):
        done = original(x, *args, **kwargs)
        out, *rest = done if isinstance(done, tuple) else (done,)
        out = out * math.nan if tuple(x.shape[-2:]) == shape else out
        return (out, *rest) if rest else out

    model.net_g.forward = forward


def test_output_that_is_not_finite_is_named_and_not_scored(opt, tmp_path, caplog):
    """tensor2img would make a number of it: PSNR 5.4 and a picture."""
    model, loader = build_model(opt), loader_of(tmp_path)
    nan_for(model, (26, 20))
    logger = logging.getLogger('basicsr')
    logger.addHandler(caplog.handler)
    try:
        model.validation(loader, 3, None, save_img=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert math.isnan(model.metric_results['psnr']) and math.isnan(model.metric_results['ssim'])
    assert model.metric_results['pure_percent'] > 0  # the mask has nothing to do with it
    assert model.best_metric_results['tiny']['psnr']['iter'] == -1  # NaN is never the best
    (sentence,) = model.unscored
    assert 'LRbicx2/1.png: the output is not finite, though the weights are' in sentence and sentence in caplog.text
    assert [path.name for path in (tmp_path / 'visualization/tiny').iterdir()] == ['0_validation.png']


def test_weights_that_are_not_finite_are_named(opt, tmp_path):
    model, loader = build_model(opt), loader_of(tmp_path)
    with torch.no_grad():
        model.net_g.conv_after_body.weight[0] = math.inf
    model.validation(loader, 3, None)
    assert math.isnan(model.metric_results['psnr'])
    assert len(model.unscored) == 2
    assert all('weights of net_g are not (first conv_after_body.weight)' in line for line in model.unscored)


def test_command_exits_with_an_error(opt, tmp_path, monkeypatch, capfd):
    """`ppsr test` with NaN weights: metric NaN, exit not 0."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    state = build_model(opt).net_g.state_dict()
    torch.save({'params': state}, 'good.pth')
    state['norm.weight'][0] = math.nan
    torch.save({'params': state}, 'nan.pth')
    test = {key: opt[key] for key in ('model_type', 'scale', 'num_gpu', 'network_g', 'val')}
    test |= {'name': 'nan', 'path': {'pretrain_network_g': 'nan.pth'}}
    test['datasets'] = {'test': {**loader_of(tmp_path).dataset.opt, 'name': 'tiny'}}
    for key in ('phase', 'scale', 'io_backend'):
        del test['datasets']['test'][key]
    write_options(tmp_path, test)
    assert main(['test', '-opt', 'options.yml']) == 1
    error = capfd.readouterr().err
    assert 'psnr: nan' in error and '0.png: the output is not finite' in error and 'first norm.weight' in error
    assert error.splitlines()[-1].startswith('ppsr: error: tiny: not every image has a score')
    assert main(['test', '-opt', 'options.yml', '--force_yml', 'path:pretrain_network_g=good.pth']) == 0


def test_metric_that_fails_names_itself_and_the_image(opt, tmp_path):
    opt['val']['metrics'] = {'ssim': {'type': 'calculate_ssim', 'crop_border': 30, 'test_y_channel': True}}
    with pytest.raises(UserError, match=r'val → metrics → ssim, .*LRbicx2/0\.png'):
        build_model(opt).validation(loader_of(tmp_path), 1, None)


@pytest.mark.filterwarnings('ignore::RuntimeWarning')  # numpy's, of the mean of nothing
def test_metric_that_is_no_number_is_told(opt, tmp_path):
    opt['val']['metrics'] = {'psnr': {'type': 'calculate_psnr', 'crop_border': 30, 'test_y_channel': True}}
    model = build_model(opt)
    model.validation(loader_of(tmp_path), 1, None)
    assert math.isnan(model.metric_results['psnr'])
    assert 'LRbicx2/0.png: psnr is not a number' in model.unscored[0]


# ------------------------------------------------------------------------------------------------------ sets kept apart


def test_pictures_of_several_sets_and_subfolders_are_kept_apart(opt, tmp_path):
    """Training: BasicSR's place with one set; a folder for each with several. Subfolders are subfolders."""
    model, dataset = build_model(opt), loader_of(tmp_path).dataset
    root = Path(dataset.opt['dataroot_lq'])
    path = functools.partial(model._image_path, dataset, current_iter=8)
    shown = tmp_path / 'visualization'
    assert path(str(root / 'a.png')) == shown / 'tiny/a_validation.png'
    assert path(str(root / 'sub/a.png')) == shown / 'tiny/sub/a_validation.png'
    model.opt |= {'is_train': True, 'datasets': {'train': {}, 'val': {}}}
    assert path(str(root / 'a.png')) == shown / 'a/a_8.png'
    model.opt['datasets']['val_2'] = {}
    assert path(str(root / 'a.png')) == shown / 'tiny/a/a_8.png'
    assert path('/elsewhere/a.png') == shown / 'tiny/a/a_8.png'
