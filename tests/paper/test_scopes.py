"""Masks and scopes in ``ppsr tables``: what the rows say, the controls, what is remembered, the plot."""

import csv

import numpy as np
import pytest
import torch
from PIL import Image

from ppsr.archs import PPATDLight
from ppsr.data.benchmark import find_images, read_pair
from ppsr.metrics import psnr
from ppsr.paper import plots, scopes
from ppsr.paper.measure import Cache
from ppsr.pictures.upscaler import Upscaler
from ppsr.weights import save_checkpoint

TINY = dict(upscale=2, depths=[1], num_heads=[2], embed_dim=8, window_size=8, category_size=16, num_tokens=8)


@pytest.fixture
def data_sets(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (('Set5', 3), ('Set14', 1)):
        folder = tmp_path / 'datasets' / name / 'HR'
        folder.mkdir(parents=True)
        for i in range(count):
            image = random.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            image[:, :24] = 90
            Image.fromarray(image).save(folder / f'{name}_{i}.png')
    return find_images(tmp_path / 'datasets', 2)


@pytest.fixture
def files(tmp_path):
    """A trained stand-in, one in closed form, and weights without any."""
    for name, facts in (('fast', {}), ('fitted', {'stand_in': 'fitted'})):
        net = PPATDLight(**TINY, pp_scope=['category', 'window'])
        save_checkpoint(tmp_path / f'{name}.safetensors', net.state_dict(), {'type': 'PPATDLight', **TINY}, facts)
    config = {'type': 'PPATDLight', **TINY}
    save_checkpoint(tmp_path / 'plain.safetensors', PPATDLight(**TINY).state_dict(), config)
    return [tmp_path / f'{name}.safetensors' for name in ('fast', 'fitted', 'plain')]


def test_only_weights_with_a_stand_in_have_rows(files):
    found = scopes.files_with_stand_in([*files[1:], f'PP-ATD-light={files[0]}'], 2)
    assert found == {'fitted (closed form)': files[1], 'fast (trained)': files[0]}
    assert not scopes.files_with_stand_in(files, 4)


def test_rows_are_what_the_settings_do(files, data_sets, tmp_path, monkeypatch):
    cache = tmp_path / 'cache.jsonl'
    weights = scopes.files_with_stand_in(files, 2)
    found = scopes.measure_scopes(weights, data_sets, 2, Cache(cache))
    rows = list(csv.DictReader(scopes.scope_table(found, 2).csv().splitlines()))
    assert len(rows) == 2 * 2 * (1 + 2 * len(scopes.MASKS))
    settings = {'pp_mask': 'variance', 'pp_threshold': 0.07, 'pp_scope': ['category', 'window']}
    for label, path in weights.items():
        fast, dense = Upscaler.from_pretrained(path, settings=settings), Upscaler.from_pretrained(path, exact=True)
        of = {'data set': 'Set5', 'weights': label, 'exempt from': 'category + window', 'mask': 'variance, σ < 0.07'}
        (row,) = (row for row in rows if row.items() >= of.items())
        values = [[], []]
        for source in data_sets['Set5']:
            lq, gt = read_pair(source.path, 2)
            for upscaler, list_of in zip((fast, dense), values):
                list_of.append(psnr(upscaler(lq), gt, 2))
        change = 1000 * np.subtract(*values)
        assert float(row['from dense (mdB)']) == pytest.approx(change.mean(), abs=0.051)
        assert float(row['std. error (mdB)']) == pytest.approx(change.std(ddof=1) / 3**0.5, abs=0.051)
        assert float(row['saved (%)']) == pytest.approx(100 * fast.stats.saved_share, abs=0.051)
        assert float(row['PSNR (dB)']) == pytest.approx(np.mean(values[0]), abs=6e-4)
    exempt = {row['mask']: row['exempt (%)'] for row in rows if row['data set'] == 'Set14' and 'fast' in row['weights']}
    assert exempt['colour (the paper)'] == exempt['random, as many as colour'] != exempt['dynamic'] != '0.0'

    def never(*args):
        raise AssertionError

    monkeypatch.setattr(scopes, '_measure', never)
    assert scopes.measure_scopes(weights, data_sets, 2, Cache(cache)) == found
    plots.masks_and_scopes(tmp_path / 'plot', 2, found)
    with Image.open(tmp_path / 'plot.png') as picture:
        assert picture.width > 800 and len(picture.convert('RGB').getcolors(1 << 20)) > 100


def test_data_sets_are_thinned_evenly(files, data_sets, tmp_path, monkeypatch):
    monkeypatch.setattr(scopes, 'MOST', 2)
    weights = {'fast': files[0]}
    found = scopes.measure_scopes(weights, data_sets, 2, Cache(tmp_path / 'cache.jsonl'))
    assert [len(found['fast'][name][scopes.DENSE]) for name in ('Set5', 'Set14')] == [2, 1]
    assert 'Images: 2 of Set5, 1 of Set14, evenly.' in scopes.scope_table(found, 2).notes[0]


def test_times_are_of_one_run(files, data_sets):
    net = scopes.load_with_stand_in(scopes.read_checkpoint(files[0]))[0]
    with torch.no_grad():
        record = scopes._measure(net, data_sets['Set5'][0].path)
    assert all(0 < one['seconds'] < 60 for one in record.values())
    assert record[scopes.DENSE]['exempt'] == 0 and record[scopes.DENSE]['macs'] == sum(net.macs(20, 24).values())
