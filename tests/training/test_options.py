"""Options files: the shipped ones load; every mistake is one sentence that names what is wrong."""

from pathlib import Path

import pytest
import yaml
from basicsr.archs import build_network
from support import REPOSITORY

from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.training.options import load_options, network_arguments, read_yaml

# study.yml describes several trainings and is read by `ppsr study`
SHIPPED = sorted(path for path in (REPOSITORY / 'options').rglob('*.yml') if path.name != 'study.yml')


def is_training(path: Path) -> bool:
    return path.parent.name != 'test'


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: str(p.relative_to(REPOSITORY / 'options')))
def test_shipped_options_are_accepted(path):
    opt = load_options(path, is_training(path), ['num_gpu=0'])
    assert opt['scale'] == opt['network_g']['upscale']
    assert all(dataset['scale'] == opt['scale'] for dataset in opt['datasets'].values())


def test_published_schedule_is_in_the_options():
    for name in ('pp_atd_light', 'atd_light'):
        x2, x4 = (load_options(REPOSITORY / f'options/{name}_x{s}.yml', True) for s in (2, 4))
        assert (x2['train']['total_iter'], x4['train']['total_iter']) == (500_000, 250_000)
        assert x2['train']['scheduler']['milestones'] == [250_000, 400_000, 450_000, 475_000, 490_000]
        assert x4['train']['scheduler']['milestones'] == [150_000, 200_000, 225_000, 240_000]
        assert (x2['train']['warmup_iter'], x4['train']['warmup_iter']) == (20_000, 10_000)
        assert (x2['train']['optim_g']['lr'], x4['train']['optim_g']['lr']) == (5e-4, 2e-4)
        assert x4['path']['pretrain_network_g'] == f'experiments/{name}_x2/models/net_g_latest.pth'
        for scale, opt in ((2, x2), (4, x4)):
            train = opt['datasets']['train']
            assert (train['gt_size'], train['batch_size_per_gpu']) == (64 * scale, 32)
            assert opt['train']['optim_g'] | {'lr': 0} == {
                'type': 'AdamW',
                'lr': 0,
                'weight_decay': 0,
                'betas': [0.9, 0.9],
            }
            assert opt['train']['ema_decay'] == 0.999


def test_arguments_of_a_network_include_those_of_its_base():
    from ppsr.archs import PPATDLight

    arguments = network_arguments(PPATDLight)
    assert {'upscale', 'category_size', 'use_checkpoint', 'pp_fuse', 'pp_compensation'} <= set(arguments)
    assert not {'self', 'kwargs'} & set(arguments)


def test_an_options_file_of_atd_needs_only_its_type_changed():
    published = {  # the keys of ATD's own option files
        'type': 'ATD',
        'upscale': 4,
        'in_chans': 3,
        'img_size': 64,
        'embed_dim': 48,
        'depths': [6, 6, 6, 6],
        'num_heads': [4, 4, 4, 4],
        'window_size': 16,
        'category_size': 128,
        'num_tokens': 64,
        'reducted_dim': 8,
        'convffn_kernel_size': 7,
        'img_range': 1.0,
        'mlp_ratio': 1,
        'upsampler': 'pixelshuffledirect',
        'resi_connection': '1conv',
        'use_checkpoint': False,
    }
    small = {'embed_dim': 8, 'depths': [1], 'num_heads': [2]}
    for kind in ('ATDLight', 'PPATDLight'):
        assert build_network(published | {'type': kind} | small).upscale == 4


@pytest.fixture
def options(tmp_path) -> dict:
    """A valid options file as a dictionary, to be broken by a test."""
    return yaml.safe_load((REPOSITORY / 'options' / 'pp_atd_light_x4.yml').read_text())


def write(tmp_path, opt) -> Path:
    path = tmp_path / 'broken.yml'
    path.write_text(opt if isinstance(opt, str) else yaml.safe_dump(opt))
    return path


def edit(opt: dict, keys: str, value) -> dict:
    *parents, last = keys.split(':')
    node = opt
    for key in parents:
        node = node[key]
    if value is KeyError:
        del node[last]
    else:
        node[last] = value
    return opt


@pytest.mark.parametrize(
    'keys, value, words',
    [
        ('name', KeyError, 'lacks name'),
        ('name', '../../etc', 'becomes a file name'),
        ('name', '..', 'becomes a file name'),
        ('scale', KeyError, 'lacks scale'),
        ('scale', '4', "scale must be int, not '4'"),
        ('scale', 3, 'scale is 3 but network_g → upscale is 4'),
        ('network_g:type', KeyError, 'lacks network_g → type'),
        ('network_g:type', 'ATDHeavy', "'ATDHeavy' is not a registered arch"),
        ('network_g:pp_windowsize', 5, "takes no option 'pp_windowsize'"),
        ('network_g', [1], 'network_g must be dict'),
        ('model_type', 'SRGANModel2', 'not a registered model'),
        ('datasets', {}, 'lacks datasets → train'),
        ('datasets:train:type', 'NoSet', 'not a registered data set'),
        ('datasets:evaluation', {'type': 'PairedSRDataset'}, 'is called train or val'),
        ('datasets:val:name', 'a/b', 'becomes a file name'),
        ('train:optim_g:lr', '2e-4', 'write 1.0e-4'),
        ('train:total_iter', KeyError, 'lacks train → total_iter'),
        ('val:val_freq', KeyError, 'val_freq must be a number'),
        ('val:tiles', 64, "unknown option 'tiles'"),
        ('val:metrics:psnr', 3, 'must be a mapping with a type'),
        ('val:suffix', '../x', 'becomes a file name'),
        ('val:tile', '64', 'val → tile must be a number of LR pixels'),
        ('val:tile', -1, 'tile=-1'),
        ('path:save_to', '/etc', "unknown option 'save_to'"),
        ('num_gpu', 99, 'visible to torch'),
        ('num_gpu', 'all', 'must be a number or auto'),
    ],
    ids=str,
)
def test_mistakes_are_named(tmp_path, options, keys, value, words):
    with pytest.raises(UserError) as e:
        load_options(write(tmp_path, edit(options, keys, value)), is_train=True)
    assert words in str(e.value)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'text, words',
    [
        ('', 'is empty'),
        ('- a\n- b\n', 'holds a list'),
        ('a: [1', 'not valid YAML'),
        ('a: !!python/object/apply:os.system ["echo hacked"]', 'not valid YAML'),
        ('\0', 'not valid YAML'),
    ],
    ids=['empty', 'list', 'unclosed', 'code', 'zero byte'],
)
def test_files_that_are_no_options(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        read_yaml(write(tmp_path, text))


def test_missing_file_and_binary_file(tmp_path):
    with pytest.raises(UserError, match='cannot be read: No such file'):
        read_yaml(tmp_path / 'none.yml')
    (tmp_path / 'image.yml').write_bytes(b'\x89PNG\xff\xfe')
    with pytest.raises(UserError, match='not a text file'):
        read_yaml(tmp_path / 'image.yml')


def test_force_yml(tmp_path, options):
    path = write(tmp_path, options)
    force = [
        'train:ema_decay=0.5',
        'name=other',
        'datasets:val_2=~',
        'network_g:depths=[2, 2]',
        'path:pretrain_network_g=~',
    ]
    opt = load_options(path, True, force)
    assert opt['train']['ema_decay'] == 0.5 and opt['name'] == 'other' and 'val_2' not in opt['datasets']
    assert opt['network_g']['depths'] == [2, 2]
    for entry in ('train:ema_decay', 'nowhere:x=1', '=3', 'train:optim_g=[', 'network_g:depth=3'):
        with pytest.raises(UserError):
            load_options(path, True, [entry])


def test_force_yml_runs_no_code(tmp_path, options):
    target = tmp_path / 'made'
    with pytest.raises(UserError, match='becomes a file name'):
        load_options(write(tmp_path, options), True, [f'name=__import__("pathlib").Path("{target}").touch()'])
    assert not target.exists()


def test_debug_mode_and_paths(tmp_path, options):
    opt = load_options(write(tmp_path, options), True, debug=True, root=tmp_path)
    assert opt['name'] == 'debug_pp_atd_light_x4'
    assert (opt['val']['val_freq'], opt['logger']['print_freq'], opt['logger']['save_checkpoint_freq']) == (8, 1, 8)
    assert opt['path']['models'] == str(tmp_path / 'experiments' / opt['name'] / 'models')


def test_num_gpu_auto_without_a_gpu(tmp_path, options, monkeypatch):
    monkeypatch.setattr('torch.cuda.device_count', lambda: 0)
    assert load_options(write(tmp_path, options), True)['num_gpu'] == 0


@pytest.mark.parametrize('command', ['train', 'test'])
def test_the_command_line_says_one_sentence_and_exits_with_2(tmp_path, options, command, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options['datasets'] = {'train': options['datasets']['train'], 'val': options['datasets']['val']}
    options['datasets']['train' if command == 'train' else 'val'].update(
        dataroot_gt='no/such/folder', dataroot_lq='no/such/folder'
    )
    force = ['--force_yml', 'datasets:train=~'] if command == 'test' else []
    assert main([command, '-opt', str(write(tmp_path, options)), *force]) == 2
    error = capsys.readouterr().err
    assert error.startswith('ppsr: error: ') and error.count('\n') == 1 and 'no/such/folder' in error
    assert not (tmp_path / 'experiments').exists() and not (tmp_path / 'results').exists()
