"""``ppsr study``: equal terms for every network, nothing trained twice, a table of means and deviations."""

import itertools

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.paper import study

OPTIONS = {
    'name': 'study',
    'scale': 2,
    'num_gpu': 0,
    'seeds': [0, 1],
    'common': dict(embed_dim=8, depths=[1], num_heads=[2], window_size=8, category_size=16, num_tokens=8),
    'networks': {
        'dense': {'type': 'ATDLight'},
        'camixer': {'type': 'CAMixerATDLight', 'camixer_ratio': 0.5},
        'pure': {'type': 'PPATDLight'},
    },
    'train': {
        'ema_decay': 0.5,
        'optim_g': {'type': 'AdamW', 'lr': 1e-3, 'betas': [0.9, 0.9]},
        'scheduler': {'type': 'MultiStepLR', 'milestones': [2], 'gamma': 0.5},
        'total_iter': 3,
        'warmup_iter': 1,
        'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
    },
}

NAN = torch.full((1, 3, 16, 16), torch.nan)


@pytest.fixture
def options(tmp_path, monkeypatch):
    """The path of an options file beside its images; results go to tmp_path/results."""
    random = np.random.default_rng(0)
    for folder, size in (('train', (30, 36)), ('test', (24, 28))):
        (tmp_path / folder).mkdir()
        for i in range(2):
            image = random.integers(0, 255, (*size, 3), dtype=np.uint8)
            image[:, : size[1] // 2] = 90
            Image.fromarray(image).save(tmp_path / folder / f'{i}.png')
    monkeypatch.chdir(tmp_path)
    data = {'train': ['train'], 'test': ['test'], 'lq_size': 8, 'batch_size': 2}
    path = tmp_path / 'study.yml'
    path.write_text(yaml.safe_dump(OPTIONS | {'data': data}, sort_keys=False))
    return path


def change(path, **entries):
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | entries, sort_keys=False))


def test_patches_depend_on_the_seed_only_and_fit_together():
    random = np.random.default_rng(0)
    lq = random.integers(0, 255, (12, 15, 3), dtype=np.uint8)
    pairs = [(lq, lq.repeat(2, 0).repeat(2, 1)), (lq[:4], lq[:8])]  # the second holds no patch
    one, same, other = ([*itertools.islice(study.patches(pairs, 2, 6, 3, seed), 8)] for seed in (5, 5, 6))
    assert all(torch.equal(a[key], b[key]) for a, b in zip(one, same) for key in ('lq', 'gt'))
    assert not torch.equal(one[0]['lq'], other[0]['lq'])
    for batch in one:
        assert batch['lq'].shape == (3, 3, 6, 6) and batch['gt'].shape == (3, 3, 12, 12)
        assert torch.equal(batch['gt'][..., ::2, ::2], batch['lq'])  # flips and transpose alike on both
    assert len({tuple(batch['lq'].flatten().tolist()) for batch in one}) == 8


def test_patches_need_a_large_image():
    image = np.zeros((5, 9, 3), np.uint8)
    with pytest.raises(UserError, match='6×6'):
        next(study.patches([(image, image)], 1, 6, 1, 0))


def test_study_runs_once_and_is_taken_up_again(options, tmp_path, monkeypatch, capsys):
    assert main(['study', '-opt', str(options), '-o', 'docs']) == 0
    told = capsys.readouterr().out
    rows = [line.split()[:2] for line in told.splitlines()[3:]]
    assert rows == [['test', 'bicubic'], ['test', 'dense'], ['test', 'camixer'], ['test', 'pure']]
    assert '3 steps of 2 patches of 8×8' in told and told.count('±') >= 5
    assert {path.suffix for path in (tmp_path / 'docs').iterdir()} == {'.md', '.csv', '.tex'}
    saved = sorted(path.name for path in (tmp_path / 'results' / 'study').glob('*.safetensors'))
    assert saved == [f'{label}_{seed}.safetensors' for label in ('camixer', 'dense', 'pure') for seed in (0, 1)]

    monkeypatch.setattr(study, '_run_one', lambda *_: pytest.fail('trained again'))
    assert main(['study', '-opt', str(options)]) == 0
    assert capsys.readouterr().out == told
    change(options, seeds=[0, 1, 2])
    with pytest.raises(pytest.fail.Exception, match='trained again'):
        main(['study', '-opt', str(options)])


def test_networks_with_equal_parameters_start_equal_and_see_the_same(options, tmp_path, monkeypatch):
    opt = study.load_study(options)
    seen = {}
    feed = study.patches

    def watched(*args):
        for batch in feed(*args):
            seen.setdefault(label, []).append(batch['lq'].sum().item())
            yield batch

    monkeypatch.setattr(study, 'patches', watched)
    opt['train']['optim_g']['lr'] = 0.0
    pairs = study._read(['train'], 2)['train']
    states = {}
    for label in ('dense', 'pure', 'camixer'):
        net, seconds = study._train(opt, label, 0, pairs, tmp_path)
        states[label] = net.state_dict()
        assert seconds > 0 and not net.training
    assert seen['dense'] == seen['pure'] == seen['camixer'] and len(seen['dense']) == 3
    assert all(torch.equal(states['dense'][name], states['pure'][name]) for name in states['dense'])
    assert opt == study.load_study(options) | {'train': opt['train']}


def test_training_learns(options, tmp_path):
    opt = study.load_study(options)
    pairs = study._read(['train'], 2)['train']
    errors = []
    for steps in (1, 60):
        opt['train'] |= {'total_iter': steps, 'ema_decay': 0}
        net, _ = study._train(opt, 'pure', 0, pairs, tmp_path)
        records = [study.evaluate(net, lq, gt)['psnr'] for lq, gt in pairs]
        errors.append(sum(records) / len(records))
    assert errors[1] > errors[0] + 1


def test_table_by_hand():
    opt = {
        'scale': 4,
        'seeds': [1, 2],
        'networks': {'a': {}, 'b': {}},
        'train': {'total_iter': 10},
        'data': {'batch_size': 4, 'lq_size': 32},
    }

    def one(psnr):
        test = {'psnr': psnr, 'pure': 0.25, 'macs': 2e9, 'seconds': 0.5}
        return {'parameters': 1000, 'train_seconds': 60.0, 'test': {'Set5': test}}

    found = {('a', 1): one(30.0), ('a', 2): one(31.0), ('b', 1): one(30.1), ('b', 2): one(31.3)}
    found['bicubic', 0] = {'test': {'Set5': {'psnr': 28.0, 'ssim': 0.8}}}
    table = study.study_table(opt, found)
    assert table.cells()[1:] == [
        ['Set5', 'a', '1,000', '25.0', '2.000', '0.500', '30.500 ± 0.707', ''],
        ['Set5', 'b', '1,000', '25.0', '2.000', '0.500', '30.700 ± 0.849', '+0.200 ± 0.141'],
    ]


@pytest.mark.parametrize(
    ('keys', 'value', 'words'),
    [
        ('seeds', 5, 'seeds must be a list, each a whole number'),
        ('seeds', ['a'], 'seeds must be a list'),
        ('seeds', [-1], 'seeds must be a list'),
        ('seeds', [1.5], 'seeds must be a list'),
        ('num_gpu', 'x', "num_gpu must be a whole number from 0 to 1024 or auto, not 'x'"),
        ('num_gpu', -1, 'num_gpu must be a whole number'),
        ('name', 5, '5 becomes a file name'),
        ('common', [], 'common must be a mapping of options, not []'),
        ('common', {'embed_dimm': 8}, "takes no option 'embed_dimm' (did you mean embed_dim?)"),
        ('networks', {}, 'networks must be a mapping'),
        ('networks:bicubic', {'type': 'ATDLight'}, "networks → 'bicubic' is the name of another row"),
        ('networks:dense:upscale', 3, 'networks → dense → upscale is 3 but the scale of the study 2'),
        ('data:lq_size', 0, 'data → lq_size must be a whole number from 1 to 4096, not 0'),
        ('data:lq_size', 1.5, 'data → lq_size must be a whole number'),
        ('data:batch_size', 0, 'data → batch_size must be a whole number'),
        ('data:batch_size', 'a', 'data → batch_size must be a whole number'),
        ('data:batch_size', 10**9, 'data → batch_size must be a whole number'),
        ('train:warmup_iters', 3, "train: unknown option 'warmup_iters' (did you mean warmup_iter?)"),
        ('train:ema_decay', 2, 'train → ema_decay must be a number of at least 0 and below 1, not 2'),
        ('train:total_iter', 0, 'train → total_iter must be a whole number'),
        (
            'train:teacher',
            {'weights': 'x.pth', 'cache': 'y'},
            'teacher → cache: a study keeps no answers; leave it out',
        ),
    ],
    ids=str,
)
def test_options_of_the_study_are_checked_as_those_of_a_training(options, keys, value, words):
    opt = yaml.safe_load(options.read_text())
    node, *rest = opt, *keys.split(':')
    for key in rest[:-1]:
        node = node[key]
    node[rest[-1]] = value
    options.write_text(yaml.safe_dump(opt))
    with pytest.raises(UserError) as e:
        study.load_study(options)
    assert words in str(e.value) and '\n' not in str(e.value)


def test_settings_of_a_network_win_over_common_ones(options):
    change(options, networks={'small': {'type': 'ATDLight', 'embed_dim': 4}, 'other': {'type': 'ATDLight'}})
    networks = study.load_study(options)['networks']
    assert [network['embed_dim'] for network in networks.values()] == [4, 8]


def test_losses_that_are_not_finite_are_noted(options, tmp_path, monkeypatch):
    """And no error but the one sentence that the training ends with."""
    opt = study.load_study(options)
    opt['train'] |= {'max_nonfinite': 2}
    monkeypatch.setattr(study, 'patches', lambda *_: itertools.repeat({'lq': torch.zeros(1, 3, 8, 8), 'gt': NAN}))
    with pytest.raises(UserError, match='not finite 2 times'):
        study._train(opt, 'dense', 0, [], tmp_path)
    assert len((tmp_path / 'nonfinite.jsonl').read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ('entries', 'named'),
    [
        (dict(colour=3), 'colour'),
        (dict(seeds=[0, 0]), 'seeds'),
        (dict(networks={'x': {'type': 'Unheard'}}), 'Unheard'),
        (dict(networks={'../x': {'type': 'ATDLight'}}), '../x'),
        (dict(name='a/b'), 'a/b'),
        (dict(data={'train': ['train'], 'test': ['test'], 'lq_size': 8}), 'batch_size'),
        (dict(data={'train': ['nowhere'], 'test': ['test'], 'lq_size': 8, 'batch_size': 1}), 'nowhere'),
    ],
    ids=['unknown', 'seeds', 'network', 'label', 'name', 'missing', 'folder'],
)
def test_mistakes_are_named(options, capsys, entries, named):
    change(options, **entries)
    assert main(['study', '-opt', str(options)]) == 2
    assert named in capsys.readouterr().err


def test_the_shipped_study_can_be_built():
    from support import REPOSITORY

    opt = study.load_study(REPOSITORY / 'options' / 'study.yml')
    assert [network['type'] for network in opt['networks'].values()] == ['ATDLight', 'CAMixerATDLight', 'PPATDLight']
