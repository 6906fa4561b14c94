"""A network and a mask from outside of the package: the commands work on them, and nobody else had to change."""

import csv
import json

import numpy as np
import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from PIL import Image
from tiny_training import options, write_options, write_pairs
from torch import nn

from ppsr.archs import MaskedNetwork
from ppsr.archs.build import build_network, config_from
from ppsr.archs.masked import PurePassOptions, as_masked
from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.images import decode_rgb, to_tensor
from ppsr.masks import PixelMask, build_mask, register_mask
from ppsr.training import test as testing
from ppsr.training.options import load_options
from ppsr.weights import save_checkpoint


@register_mask('toy_bright')
class ToyBright(PixelMask):
    """Pixels whose green is above a level."""

    period = 1

    def __init__(self, level: float = 0.5):
        super().__init__()
        self.level = level

    def forward(self, lq):
        return lq[:, 1] > self.level

    def macs(self, height, width):
        return height * width


class ToyBase(MaskedNetwork):
    """Nearest enlargement of a 3×3 convolution; exempt pixels are passed on as they are."""

    def __init__(self, upscale: int = 2, pure_pass=None):
        super().__init__(upscale, 4, None if pure_pass is None else pure_pass.build_mask())
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def restore(self, x, mask):
        y = self.conv(x)
        y = y if mask is None else torch.where(mask[:, None], x, y)
        return nn.functional.interpolate(y, scale_factor=self.upscale)

    def count(self, height, width, mask):
        return {'convolution': 81 * (mask.numel() - int(mask.sum()))}


@pytest.fixture
def registered(monkeypatch):
    class ToyNet(PurePassOptions, ToyBase):
        title = 'Toy'

        @classmethod
        def config_from(cls, state_dict):
            return {'upscale': 2} if set(state_dict) == {'conv.weight', 'conv.bias'} else None

    ARCH_REGISTRY.register(ToyNet)
    yield {'type': 'ToyNet', 'upscale': 2, 'pp_mask': {'type': 'toy_bright', 'level': 0.4}}
    del ARCH_REGISTRY._obj_map['ToyNet']


def _pure_share(net, path):
    return net.mask_of(to_tensor(decode_rgb(path))).float().mean().item()


@pytest.fixture
def picture(tmp_path):
    pixels = np.zeros((9, 13, 3), np.uint8)
    pixels[:, :6, 1] = 200  # green: 54 of 117 pixels
    Image.fromarray(pixels).save(tmp_path / 'lq.png')
    return tmp_path / 'lq.png'


def test_train_and_test(tmp_path, monkeypatch, registered):
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path, 2)
    opt = options(tmp_path, network_g=registered, train__total_iter=4, val__val_freq=4)
    write_options(tmp_path, opt)
    assert main(['train', '-opt', 'options.yml']) == 0
    (log,) = (tmp_path / 'experiments' / 'run').glob('train*.log')
    text = log.read_text()
    assert 'ToyNet' in text and 'pure_percent' in text and 'gmacs_saved_percent' in text

    trained = 'experiments/run/models/net_g_latest.pth'
    forced = ['datasets:train=~', f'path:pretrain_network_g={trained}', 'val:save_img=true']
    assert main(['test', '-opt', 'options.yml', '--force_yml', *forced]) == 0
    (log,) = (tmp_path / 'results' / 'run').glob('test*.log')
    assert 'ToyNet' in log.read_text() and 'pure_percent' in log.read_text()
    assert len(list((tmp_path / 'results').rglob('*.png'))) == 2

    opt['path']['pretrain_network_g'], opt['name'] = trained, 'again'
    del opt['datasets']['train']
    write_options(tmp_path, opt)
    (means,) = testing.test_pipeline(load_options(tmp_path / 'options.yml', is_train=False)).values()
    net = build_network(registered)
    share = np.mean([_pure_share(net, path) for path in sorted((tmp_path / 'lr').glob('*.png'))])
    assert 0 < means['pure_percent'] < 100 and means['pure_percent'] == pytest.approx(100 * share)


def test_upscale_and_overlay(tmp_path, picture, registered):
    net = build_network(registered)
    save_checkpoint(tmp_path / 'toy.safetensors', net.state_dict(), registered | {'pp_mask': 'toy_bright'})
    out = tmp_path / 'out'
    command = ['upscale', '-i', str(picture), '-o', str(out), '--model-path', str(tmp_path / 'toy.safetensors')]
    assert main([*command, '--arch', 'ToyNet', '--device', 'cpu', '--save-mask']) == 0
    assert Image.open(out / 'lq_out.png').size == (26, 18)
    overlay = np.asarray(Image.open(out / 'lq_out_mask.png'))  # the tint of the mask, over the pure pixels alone
    level = net.pure_pass.level
    pure = np.asarray(Image.open(picture))[..., 1] / 255 > level
    assert overlay.shape == (9, 13, 3) and overlay[pure].any(-1).all() and not overlay[~pure].any()
    config = config_from(net.state_dict())
    assert config == {'type': 'ToyNet', 'upscale': 2}


def test_mask_draws_it(tmp_path, picture):
    command = ['mask', '-i', str(picture), '-o', str(tmp_path / 'mask.png'), '--mask', 'toy_bright', '--zoom', '1']
    assert main(command) == 0
    overlay = np.asarray(Image.open(tmp_path / 'mask.png'))
    assert overlay.shape == (9, 13, 3) and overlay[:, :6].any(2).all() and not overlay[:, 6:].any()


def test_complexity_counts_the_mask_really_used(tmp_path, picture, registered, capsys):
    (tmp_path / 'toy.yml').write_text(json.dumps({'network_g': registered}))
    command = ['complexity', '-opt', str(tmp_path / 'toy.yml'), '--data', str(tmp_path), '--lq', '--format', 'json']
    assert main(command) == 0
    (found,) = json.loads(capsys.readouterr().out)['dynamic'].values()
    # padded to 12×16, mirrored: green in columns 0–5 of all rows
    assert found['macs']['mean'] == 81 * 12 * 10 + 12 * 16 and found['dense_macs']['mean'] == 81 * 12 * 16
    assert found['pure']['mean'] == pytest.approx(54 / 117)


def test_tables_have_a_row_for_it(tmp_path, registered):
    folder = tmp_path / 'data' / 'Set5' / 'HR'
    folder.mkdir(parents=True)
    Image.fromarray(np.full((24, 24, 3), 200, np.uint8)).save(folder / 'bright.png')
    (tmp_path / 'toy.yml').write_text(json.dumps({'name': 'mine', 'network_g': registered}))
    save_checkpoint(tmp_path / 'toy.pth', build_network(registered).state_dict())
    command = ['tables', '--data', str(tmp_path / 'data'), '-opt', str(tmp_path / 'toy.yml'), '--scales', '2']
    command += ['--ablations', '--weights', str(tmp_path / 'toy.pth'), '-o', str(tmp_path / 'o')]
    assert main([*command, '--cache', str(tmp_path / 'c.jsonl')]) == 0
    with open(tmp_path / 'o' / 'benchmarks_x2.csv', newline='') as file:
        rows = {(row['data set'], row['method']): row for row in csv.DictReader(file)}
    assert rows['Set5', 'mine']['pure (%)'] == '100.00' and float(rows['Set5', 'mine']['PSNR (dB)']) > 0


def test_dense_is_the_network_without_its_mask(registered):
    lq = torch.rand(1, 3, 5, 7)
    net, dense = build_network(registered), build_network(registered, dense=True)
    dense.load_state_dict(net.state_dict())
    _, mask = net(lq, return_mask=True)
    assert mask.any() and torch.equal(mask, net.mask_of(lq)) and dense.mask_of(lq) is None
    same = dense(lq) == net(lq)
    assert not same.all() and same[..., (~mask[:, :5, :7]).repeat_interleave(2, 1).repeat_interleave(2, 2)[0]].all()


def test_what_a_mask_or_a_network_refuses(registered):
    with pytest.raises(ValueError, match="'nothing' is not a registered mask"):
        build_mask('nothing')
    with pytest.raises(ValueError, match="takes no 'num_centers'"):
        build_mask('toy_bright', num_centers=3)
    with pytest.raises(UserError, match='takes no option'):
        build_network(registered | {'pure_pass': 3})
    with pytest.raises(KeyError, match='already registered'):
        register_mask('toy_bright')(type('Other', (ToyBright,), {}))
    assert as_masked(nn.Conv2d(3, 3, 1)) is None
