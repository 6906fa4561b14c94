"""``ppsr tables``: records that are remembered, controls of the same share, cells without figures, files written."""

import csv
import json
import os

import numpy as np
import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from PIL import Image

from ppsr.archs import PPATDLight
from ppsr.archs.build import network_arguments
from ppsr.cli import main
from ppsr.data.benchmark import find_images
from ppsr.data.bicubic import imresize_bicubic
from ppsr.errors import UserError
from ppsr.generated import section_names
from ppsr.locks import Lock
from ppsr.masks.controls import SCORES, local_variance
from ppsr.paper import measure, published, tables
from ppsr.paper.report import Table
from ppsr.weights import save_checkpoint

CHANGES = dict(tables.CHANGES)  # the real ones
TINY_NETWORK = dict(depths=[1], num_heads=[2], embed_dim=8, window_size=8, category_size=16, num_tokens=8)


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    """Networks, ablations and grids of a size for tests; the code is that of the full ones."""
    monkeypatch.setattr(tables, 'CHANGES', {'fusion off': {'pp_fuse': False}, 'zero': {'pp_compensation': 'zero'}})
    monkeypatch.setattr(tables, 'GRID_CENTERS', (4, 8))
    monkeypatch.setattr(tables, 'GRID_WINDOWS', (3, 5))
    methods_of = tables.methods_of

    def tiny(network, where=''):
        takes = network_arguments(ARCH_REGISTRY.get(network['type']))
        return original({name: value for name, value in TINY_NETWORK.items() if name in takes} | network, where)

    def small(scale, weights, options=()):
        monkeypatch.setattr(tables, 'build_masked', tiny)
        return methods_of(scale, weights, options)

    original = tables.build_masked
    monkeypatch.setattr(tables, 'methods_of', small)
    monkeypatch.setattr(measure, 'build_masked', tiny)


@pytest.fixture
def data(tmp_path):
    random = np.random.default_rng(0)
    for name, count in (('Set14', 1), ('Set5', 2)):
        folder = tmp_path / 'datasets' / name / 'HR'
        folder.mkdir(parents=True)
        for i in range(count):
            image = random.integers(0, 255, (40, 48, 3), dtype=np.uint8)
            image[:, :24] = 90
            Image.fromarray(image).save(folder / f'{name}_{i}.png')
    return tmp_path / 'datasets'


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / 'pp.safetensors'
    config = {'type': 'PPATDLight', 'upscale': 2, **TINY_NETWORK}
    save_checkpoint(path, PPATDLight(upscale=2, **TINY_NETWORK).state_dict(), config)
    return path


# ---------------------------------------------------------------- the cache


def test_cache_remembers_and_survives_a_cut_line(tmp_path):
    path = tmp_path / 'folder' / 'cache.jsonl'
    cache = measure.Cache(path)
    cache.put('a', {'psnr': 1.5})
    cache.put('b', {'psnr': 2.5})
    path.write_text(path.read_text()[:-5])  # as an interruption leaves it
    again = measure.Cache(path)
    assert again.get('a') == {'psnr': 1.5} and again.get('b') is None
    again.put('c', {'psnr': 3.5})
    assert measure.Cache(path).get('c') == {'psnr': 3.5}


def test_key_depends_on_options_weights_image_scale_and_control(data, weights, tmp_path):
    one, other = sorted((data / 'Set5' / 'HR').iterdir())
    base = measure.Method('a', 2, {'type': 'PPATDLight'}, weights)
    changed = tmp_path / 'other.safetensors'
    changed.write_bytes(weights.read_bytes() + b' ')
    keys = [
        base.key(one),
        base.key(other),
        measure.Method('a', 3, base.network, weights).key(one),
        measure.Method('a', 2, base.network | {'pp_fuse': False}, weights).key(one),
        measure.Method('a', 2, base.network, changed).key(one),
        measure.Method('a', 2, base.network).key(one),
        measure.Method('a', 2, base.network, weights, 'random').key(one),
    ]
    assert len(set(keys)) == len(keys)
    assert measure.Method('another name', 2, base.network, weights).key(one) == keys[0]


def test_a_measured_image_is_not_computed_again(data, weights, tmp_path, monkeypatch):
    cache, images = measure.Cache(tmp_path / 'cache.jsonl'), find_images(data, 2)
    method = measure.Method('PP', 2, {'type': 'PPATDLight', 'upscale': 2}, weights)
    first = measure.measure([method], images, cache)
    monkeypatch.setattr(measure, '_one', lambda *_: pytest.fail('computed again'))
    assert measure.measure([method], images, measure.Cache(tmp_path / 'cache.jsonl')) == first
    assert list(first) == [('PP', 'Set5'), ('PP', 'Set14')] and len(first['PP', 'Set5']) == 2


# ---------------------------------------------------------------- controls and records


@pytest.mark.parametrize('control', list(SCORES))
def test_controls_skip_as_many_pixels_of_each_image(control):
    lq = torch.rand(2, 3, 20, 20)
    lq[0, :, :, :12] = 0.4
    base = {'type': 'PPATDLight', 'upscale': 2, 'pp_num_centers': 6}
    pure, other = (measure.Method('', 2, base, None, c).build().pure_mask(lq) for c in ('', control))
    assert torch.equal(other.flatten(1).sum(1), pure.flatten(1).sum(1))
    assert other.shape == pure.shape and other.dtype == torch.bool
    assert torch.equal(other, pure) is (control == 'variance')  # in this picture the flat pixels are the pure ones


def test_variance_control_takes_the_flattest_pixels():
    lq = torch.rand(1, 3, 12, 12)
    lq[..., :6] = 0.4
    score = local_variance(lq)
    assert (score[..., :4] == 0).all()  # two columns away from the noise the 5×5 neighbourhood is flat
    assert (score[..., 4:] > 0).all()
    whole = lq[0, :, 3:8, 5:10].double()
    variance = whole.var(dim=(1, 2), unbiased=False).sum().item()
    assert score[0, 5, 7].item() / (25 * 65535) ** 2 == pytest.approx(
        variance, rel=1e-4
    )  # pixels are rounded to 1/65535


def test_bicubic_and_network_records(data, weights, tmp_path):
    images = find_images(data / 'Set14', 2)
    methods = [measure.Method('bicubic', 2), measure.Method('dry', 2, {'type': 'PPATDLight', 'upscale': 2})]
    methods.append(measure.Method('PP', 2, methods[1].network, weights))
    found = measure.measure(methods, images, measure.Cache(tmp_path / 'cache.jsonl'))
    gt = np.asarray(Image.open(data / 'Set14' / 'HR' / 'Set14_0.png'))
    bicubic = imresize_bicubic(imresize_bicubic(gt, 2), 2, up=True)
    assert found['bicubic', 'Set14'] == [measure.quality(bicubic, gt, 2)]
    (dry,), (pp,) = found['dry', 'Set14'], found['PP', 'Set14']
    assert 'psnr' not in dry and dry.items() <= pp.items()
    assert 0 < pp['pure'] < 1 and pp['macs'] < pp['dense'] and 5 < pp['psnr'] < 60 and -1 < pp['ssim'] < 1


def test_quality_of_a_constant_error():
    gt = np.full((20, 20, 3), 100, np.uint8)
    sr = gt.copy()
    sr[4:16, 4:16] += 10  # gray: Y changes by 10·(65.481 + 128.553 + 24.966)/255
    found = measure.quality(sr, gt, 4)
    assert found['psnr'] == pytest.approx(20 * np.log10(255 / (10 * 219 / 255)), abs=0.05)
    assert measure.quality(gt, gt, 4)['ssim'] == pytest.approx(1)


# ---------------------------------------------------------------- tables


def test_published_figures():
    assert published.quality('ATD-light', 4, 'Urban100') == (26.97, 0.8107)
    assert published.quality('ATD-light', 2, 'Manga109') == (39.52, 0.9789)
    assert published.quality('ATD-light v2', 4, 'Urban100') == (27.04, 0.8127)
    assert published.cost('CAMixerSR', 4) == (765_000, 53.8)
    assert published.quality('PP-ATD-light', 4, 'Set5') is None  # the paper's table was not readable
    assert published.quality('CAMixer-ATD-light', 4, 'Set5') is None
    assert published.others(4) == ['CAMixerSR'] and published.others(2) == []


def test_weights_go_to_the_networks_they_fit(weights):
    found = {method.label: method.weights for method in tables.methods_of(2, [weights])}
    second = {'ATD-light v2': None, 'PP-ATD-light v2': None}
    first = {'ATD-light': weights, 'CAMixer-ATD-light': None, 'PP-ATD-light': weights}
    others = {'SwinIR-light': None, 'PP-SwinIR-light': None}
    assert found == {'bicubic': None} | first | second | others
    assert not any(method.weights for method in tables.methods_of(4, [weights]))


def test_weights_of_the_own_type_come_first(weights, tmp_path):
    dense = tmp_path / 'dense.safetensors'
    net = PPATDLight(upscale=2, **TINY_NETWORK)
    save_checkpoint(dense, net.state_dict(), {'type': 'ATDLight', 'upscale': 2, **TINY_NETWORK})
    found = {method.label: method.weights for method in tables.methods_of(2, [weights, dense])}
    assert (found['ATD-light'], found['PP-ATD-light']) == (dense, weights)


def test_weights_may_be_given_to_a_label(weights, tmp_path):
    bare = tmp_path / 'x=2.pth'  # a BasicSR file does not say what it was made for
    save_checkpoint(bare, PPATDLight(upscale=2, **TINY_NETWORK).state_dict())
    other = tmp_path / 'other.pth'
    save_checkpoint(other, PPATDLight(upscale=2, **TINY_NETWORK).state_dict())
    found = {m.label: m.weights for m in tables.methods_of(2, [other, f'PP-ATD-light={bare}'])}
    assert (found['ATD-light'], found['PP-ATD-light']) == (other, bare)
    assert tables.methods_of(2, [bare])[1].weights == bare


def test_the_command_is_told_without_places_of_one_machine():
    from ppsr.cli.tables import _without_places

    words = [
        'tables',
        '--data',
        'datasets',
        '-o',
        '/home/me/out',
        '-opt',
        'a.yml',
        '--cache',
        '/tmp/c.jsonl',
        '--ablations',
    ]
    assert _without_places(words) == ['tables', '--data', 'datasets', '-opt', 'a.yml', '--ablations']
    assert _without_places(['tables', '--cache=/tmp/c.jsonl', '--output=/home/me']) == ['tables']


def test_all_files_are_written_and_say_what_is_missing(data, weights, tmp_path, capsys):
    output = tmp_path / 'tables'
    command = ['tables', '--data', str(data), '--weights', str(weights), '-o', str(output), '--scales', '2', '4']
    assert main([*command, '--cache', str(tmp_path / 'cache.jsonl')]) == 0
    assert str(output) in capsys.readouterr().out
    rows = {}
    for scale in (2, 4):
        with open(output / f'benchmarks_x{scale}.csv', newline='') as file:
            rows[scale] = {(row['data set'], row['method']): row for row in csv.DictReader(file)}
    assert rows[2]['Urban100', 'PP-ATD-light']['PSNR (dB)'] == 'no data'
    assert rows[4]['Set5', 'PP-ATD-light']['PSNR (dB)'] == 'no weights'
    assert rows[2]['Set5', 'CAMixer-ATD-light']['SSIM'] == 'no weights'
    assert rows[2]['Set5', 'PP-ATD-light']['PSNR, published'] == 'not available'
    assert rows[2]['Set5', 'ATD-light']['PSNR, published'] == '38.29'
    assert rows[4]['Set5', 'CAMixerSR']['SSIM'] == 'not measured'
    records = [json.loads(line)['record'] for line in (tmp_path / 'cache.jsonl').read_text().splitlines()]
    assert sum('psnr' in record for record in records) == 3 * (1 + 1 + 6) + 3  # ×2, and bicubic ×4
    measured = rows[2]['Set14', 'PP-ATD-light']
    assert float(measured['PSNR (dB)']) > 5 and float(measured['against ATD-light (%)']) < 0
    with open(output / 'ablations_x2.csv', newline='') as file:
        ablations = list(csv.DictReader(file))
    assert [row['variant'] for row in ablations] == ['dense', 'default', 'fusion off', 'zero'] * 2
    with open(output / 'controls_x2.csv', newline='') as file:
        controls = list(csv.DictReader(file))
    assert [row['variant'] for row in controls] == [
        'dense',
        'default',
        'lowest gradient',
        'lowest variance',
        'random',
    ] * 2
    exempt = {row['variant']: row['exempt (%)'] for row in ablations[:4] + controls[:5]}
    assert exempt['default'] == exempt['random'] == exempt['lowest variance'] != exempt['fusion off']
    assert not (output / 'ablations_x4.csv').exists()
    readme = (output / 'README.md').read_text()
    for name in ('psnr_gmacs_x2', 'pure_share_x2', 'saving_share_x4', 'purity_grid_x4'):
        assert f'({name}.png)' in readme
        assert Image.open(output / f'{name}.png').size[0] > 600 and (output / f'{name}.pdf').stat().st_size > 1000
    assert 'pp.safetensors' in readme and '## Ablations ×2' in readme
    assert '\\toprule' in (output / 'cost.tex').read_text()


def test_masks_that_see_flatness_have_rows(weights, monkeypatch):
    """Each on the weights of the default, with its own mask and threshold: what is flat within it is exempt."""
    monkeypatch.setattr(tables, 'CHANGES', CHANGES)
    base = measure.Method('PP-ATD-light', 2, {'type': 'PPATDLight', 'upscale': 2, **TINY_NETWORK}, weights)
    methods = {method.label: method for method in tables.ablation_methods(base)}
    lq = torch.full((1, 3, 32, 32), 0.2)  # quarters of one colour, nearly flat, rougher, and noise
    spread = torch.where(torch.rand(16, 16) < 0.5, -1, 1) * torch.ones(3, 1, 1)
    lq[0, :, :16, 16:], lq[0, :, 16:, :16] = 0.5 + 0.035 * spread, 0.5 + 0.047 * spread  # σ 0.061 and 0.081
    lq[0, :, 16:, 16:] = torch.rand(3, 16, 16)
    expected = {  # which quarters are pure, but for their borders
        'dynamic centres': None,
        'variance, σ < 0.05': (True, False, False),
        'variance, σ < 0.07': (True, True, False),
        'variance, σ < 0.10': (True, True, True),
        'colour and σ < 0.07': None,
    }
    for label, quarters in expected.items():
        net = methods[label].build()
        mask = net.mask_of(lq)
        assert mask[:, 4:12, 4:12].all() and not mask[:, 20:28, 20:28].any(), label
        if quarters:
            found = mask[:, 4:12, 4:12].all(), mask[:, 4:12, 20:28].all(), mask[:, 20:28, 4:12].all()
            assert tuple(map(bool, found)) == quarters, label
    both, colour, flat = (
        methods[label].build().mask_of(lq) for label in (*list(expected)[4:], 'default', 'variance, σ < 0.07')
    )
    assert torch.equal(both, colour & flat)


def test_without_ablations(data, tmp_path):
    """And into a README that somebody has written in; what an older run gave there is not left standing."""
    output = tmp_path / 'tables'
    output.mkdir()
    older = ''.join(
        f'<!-- begin {name} -->\nof before\n<!-- end {name} -->\n' for name in ('benchmarks_x3', 'ablations_x3')
    )
    (output / 'README.md').write_text(f'# By hand\n\n{older}\nAlso by hand: ×3.\n', encoding='utf-8')
    command = ['tables', '--data', str(data), '--ablations', '--scales', '3', '-o', str(output)]
    assert main([*command, '--cache', str(tmp_path / 'c.jsonl')]) == 0
    assert not list(output.glob('purity*')) and (output / 'benchmarks_x3.md').exists()
    readme = (output / 'README.md').read_text(encoding='utf-8')
    assert readme.startswith('# By hand\n\n<!-- begin benchmarks_x3 -->\n## Benchmarks ×3\n')
    assert '\nAlso by hand: ×3.\n' in readme and 'of before' not in readme
    assert section_names(output / 'README.md') == ['benchmarks_x3', 'ablations_x3', 'made', 'cost']


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (['--data', 'nowhere'], 'nowhere'),
        (['--weights', 'nothing.pth'], 'nothing.pth'),
        (['--scales', '0'], '--scales'),
        (['--ablations', 'Set6'], 'Set6'),
        (['-opt', 'nothing.yml'], 'nothing.yml'),
    ],
    ids=['data', 'weights', 'scales', 'ablations', 'options'],
)
def test_bad_arguments(data, tmp_path, capsys, arguments, named):
    command = ['tables', '-o', str(tmp_path / 'o'), '--cache', str(tmp_path / 'c.jsonl')]
    if '--data' not in arguments:
        command += ['--data', str(data)]
    assert main([*command, *arguments]) == 2
    assert named in capsys.readouterr().err


def test_a_cache_without_an_end_is_refused(data, tmp_path):
    with pytest.raises(UserError, match='/dev/zero is no regular file'):
        measure.Cache('/dev/zero')
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(UserError, match='is no regular file'):
        tables.make(data, tmp_path / 'o', tmp_path / 'pipe', [], [3], ablate_on=[])


def test_one_run_at_a_time_has_the_cache(data, tmp_path):
    cache, output = tmp_path / 'c.jsonl', tmp_path / 'o'
    with Lock(f'{cache}.lock', 'x'), pytest.raises(UserError, match=f'^The cache {cache} is in use by process'):
        tables.make(data, output, cache, [], [3], ablate_on=[])
    assert not output.exists() and not cache.exists()


def test_a_row_needs_a_name_of_its_own(tmp_path):
    path = tmp_path / 'mine.yml'
    path.write_text('name: bicubic\nnetwork_g: {type: ATDLight, upscale: 2}\n')
    with pytest.raises(UserError, match='bicubic'):
        tables.methods_of(2, [], [path])


@pytest.mark.parametrize(
    ('text', 'words'),
    [
        ('seed: 5', "unknown option 'seed'"),
        ('name: a/b', 'name'),
        ('scale: 3', 'scale is 3 but network_g → upscale is 2'),
        ('train: {total_iters: 5}', "train: unknown option 'total_iters'"),
        ('logger: {print_freq: 0, save_checkpoint_freq: 1}', 'logger → print_freq'),
        ('datasets: {train: {type: PairedSRDataset, dataroot_gt: 5}}', 'datasets → train'),
        ('datasets: {test_1: {type: PairedSRDataset, dataroot_gt: a, dataroot_lq: b, use_flip: true}}', 'use_flip'),
        ('val: {save_img: "no"}', 'val → save_img'),
        ('path: {pretrain_network: x.pth}', "path: unknown option 'pretrain_network'"),
    ],
)
def test_options_files_are_held_against_the_schema_of_a_training(tmp_path, text, words):
    path = tmp_path / 'mine.yml'
    path.write_text(f'network_g: {{type: ATDLight, upscale: 2}}\n{text}\n')
    with pytest.raises(UserError, match=words):
        tables.methods_of(2, [], [path])


# ---------------------------------------------------------------- how a table is written

TABLE = Table(['name', 'dB', 'n'], [['a_1', 1.234, 1000], ['50 %', 'no weights', None]], ['', '.2f', ','], 'A', ['B.'])


def test_table_as_text():
    assert TABLE.text().splitlines() == [
        'A',
        'name          dB      n',
        '----  ----------  -----',
        'a_1         1.23  1,000',
        '50 %  no weights',
        'B.',
    ]


def test_table_as_markdown():
    lines = TABLE.markdown().splitlines()
    assert lines[2:6] == [
        '| name | dB | n |',
        '| --- | ---: | ---: |',
        '| a_1 | 1.23 | 1,000 |',
        '| 50 % | no weights |  |',
    ]


def test_table_as_csv_comes_back():
    assert list(csv.reader(TABLE.csv().splitlines())) == [
        ['name', 'dB', 'n'],
        ['a_1', '1.23', '1000'],
        ['50 %', 'no weights', ''],
    ]


def test_table_as_latex():
    latex = TABLE.latex('tab:x')
    assert r'a\_1 & 1.23 & 1,000 \\' in latex and r'50 \% & no weights &  \\' in latex
    assert r'\begin{tabular}{lrr}' in latex and r'\caption{A B.}' in latex and r'\label{tab:x}' in latex
    assert latex.count(r'\midrule') == 1
