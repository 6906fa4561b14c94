"""Options files: the shipped ones load; every mistake is one sentence that names what is wrong."""

import copy
import importlib.util
import runpy
from pathlib import Path

import pytest
import yaml
from basicsr.archs import build_network
from support import REPOSITORY

from ppsr.archs.build import network_arguments
from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.training.options import load_options, read_yaml

# study.yml describes several trainings and is read by `ppsr study`
SHIPPED = sorted(path for path in (REPOSITORY / 'options').rglob('*.yml') if path.name != 'study.yml')


def is_training(path: Path) -> bool:
    return path.parent.name != 'test'


@pytest.mark.parametrize('path', SHIPPED, ids=lambda p: str(p.relative_to(REPOSITORY / 'options')))
def test_shipped_options_are_accepted(path):
    opt = load_options(path, is_training(path), ['num_gpu=0'])
    assert opt['scale'] == opt['network_g']['upscale']
    assert all(dataset['scale'] == opt['scale'] for dataset in opt['datasets'].values())


def test_shipped_options_are_what_the_template_gives():
    files = runpy.run_path(str(REPOSITORY / 'options' / 'make.py'))['files']()
    by_hand = {
        'demo.yml',
        'study.yml',
        'pp_atd_light_x2_cpu.yml',
        'pp_atd_light_x3_cpu.yml',
        'pp_atd_light_x4_window.yml',
    }
    committed = {
        path.relative_to(REPOSITORY / 'options').as_posix() for path in (REPOSITORY / 'options').rglob('*.yml')
    }
    assert files.keys() == committed - by_hand
    changed = [name for name, text in files.items() if (REPOSITORY / 'options' / name).read_text('utf-8') != text]
    assert not changed, 'run python options/make.py'


def test_the_docs_are_what_the_schema_says():
    from ppsr.training.document import document

    assert (REPOSITORY / 'docs' / 'options.md').read_text('utf-8') == document(), 'run python -m ppsr.training.document'


def test_published_schedule_is_in_the_options():
    published = {  # milestones at ×2 and ×4, batch, autocast
        'atd_light': (
            [250_000, 400_000, 450_000, 475_000, 490_000],
            [150_000, 200_000, 225_000, 240_000],
            32,
            None,
        ),
        'atd_light_v2': (
            [250_000, 400_000, 450_000, 480_000],
            [125_000, 200_000, 225_000, 240_000],
            64,
            'fp16',
        ),
    }
    for name in ('pp_atd_light', 'atd_light', 'pp_atd_light_v2', 'atd_light_v2'):
        at_x2, at_x4, batch, amp = published[name.removeprefix('pp_')]
        x2, x4 = (load_options(REPOSITORY / f'options/{name}_x{s}.yml', True) for s in (2, 4))
        assert (x2['train']['total_iter'], x4['train']['total_iter']) == (500_000, 250_000)
        assert x2['train']['scheduler']['milestones'] == at_x2
        assert x4['train']['scheduler']['milestones'] == at_x4
        assert x2['train']['amp'] == x4['train']['amp'] == amp
        assert (x2['train']['warmup_iter'], x4['train']['warmup_iter']) == (20_000, 10_000)
        assert (x2['train']['optim_g']['lr'], x4['train']['optim_g']['lr']) == (5e-4, 2e-4)
        assert x4['path']['pretrain_network_g'] == f'experiments/{name}_x2/models/net_g_latest.pth'
        for scale, opt in ((2, x2), (4, x4)):
            train = opt['datasets']['train']
            assert (train['gt_size'], train['batch_size_per_gpu']) == (64 * scale, batch)
            optimizer = {'type': 'AdamW', 'weight_decay': 0, 'betas': [0.9, 0.9]}
            assert opt['train']['optim_g'].items() >= optimizer.items()
            assert opt['train']['ema_decay'] == 0.999


def test_published_schedule_of_swinir_is_in_the_options():
    for name in ('pp_swinir_light', 'swinir_light'):
        x2, x4 = (load_options(REPOSITORY / f'options/{name}_x{s}.yml', True) for s in (2, 4))
        assert (x2['train']['total_iter'], x4['train']['total_iter']) == (500_000, 250_000)
        assert x2['train']['scheduler']['milestones'] == [250_000, 400_000, 450_000, 475_000]
        assert x4['train']['scheduler']['milestones'] == [125_000, 200_000, 225_000, 237_500]
        for lr, opt in ((2e-4, x2), (1e-4, x4)):
            adam = {'type': 'Adam', 'lr': lr, 'weight_decay': 0, 'betas': [0.9, 0.999]}
            assert opt['train']['optim_g'].items() >= adam.items() and opt['train']['warmup_iter'] == -1
            assert opt['datasets']['train']['batch_size_per_gpu'] == 64
            assert opt['datasets']['train']['gt_size'] == 64 * opt['scale']


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
        ('scale', '4', "scale must be a whole number from 1 to 16, not '4' (write it without quotes)"),
        ('scale', 3, 'scale is 3 but network_g → upscale is 4'),
        ('network_g:type', KeyError, 'network_g lacks type'),
        ('network_g:type', 'ATDHeavy', "'ATDHeavy' is not a registered arch"),
        ('network_g:pp_windowsize', 5, "takes no option 'pp_windowsize'"),
        ('network_g', [1], 'network_g must be a mapping of options, not [1]'),
        ('model_type', 'SRGANModel2', 'not a registered model'),
        ('datasets', {}, 'lacks datasets → train'),
        ('datasets:train:type', 'NoSet', "type: 'NoSet' is not one of PairedSRDataset, PairedImageDataset"),
        ('datasets:evaluation', {'type': 'PairedSRDataset'}, 'is called train or val'),
        ('datasets:val:name', 'a/b', 'becomes a file name'),
        ('train:optim_g:lr', '2e-4', 'write 1.0e-4'),
        ('train:total_iter', KeyError, 'train lacks total_iter'),
        ('val:val_freq', KeyError, 'val lacks val_freq'),
        ('val:tiles', 64, "unknown option 'tiles'"),
        ('val:metrics:psnr', 3, 'val → metrics → psnr must be a mapping of options with a type, not 3'),
        ('val:suffix', '../x', 'becomes a file name'),
        ('val:tile', '64', "val → tile must be a whole number from 0 to 1000000, not '64' (write it without quotes)"),
        ('val:tile', -1, 'val → tile must be a whole number from 0 to 1000000, not -1'),
        ('path:save_to', '/etc', "unknown option 'save_to'"),
        ('num_gpu', 99, 'visible to torch'),
        ('num_gpu', 'all', "num_gpu must be a whole number from 0 to 1024 or auto, not 'all'"),
    ],
    ids=str,
)
def test_mistakes_are_named(tmp_path, options, keys, value, words):
    with pytest.raises(UserError) as e:
        load_options(write(tmp_path, edit(options, keys, value)), is_train=True)
    assert words in str(e.value)
    assert '\n' not in str(e.value)


ADAMW, STEPS = {'type': 'AdamW', 'lr': 1e-3}, {'type': 'MultiStepLR', 'milestones': [6]}
COSINE = {'type': 'CosineAnnealingRestartLR', 'periods': [100, 100], 'restart_weights': [1, 1]}


@pytest.mark.parametrize(
    'keys, value, words',
    [
        # keys that nobody reads
        ('manual_sed', 3, "unknown option 'manual_sed' (did you mean manual_seed?)"),
        ('network_gg', {}, "unknown option 'network_gg' (did you mean network_g?)"),
        ('find_unused_paramters', True, 'did you mean find_unused_parameters?'),
        ('datasets:train:use_flip', False, "datasets → train: unknown option 'use_flip' (did you mean use_hflip?)"),
        ('datasets:train:meta_info', 'x.txt', 'did you mean meta_info_file?'),
        ('datasets:val:dataroot_qt', 'x', 'did you mean dataroot_'),
        ('datasets:val:gt_size', 64, "datasets → val: unknown option 'gt_size'"),
        ('path:pretrain_network_d', 'x.pth', "path: unknown option 'pretrain_network_d'"),
        ('network_g:embed_dimm', 8, "takes no option 'embed_dimm' (did you mean embed_dim?)"),
        ('train:optim_g', ADAMW | {'capturable': True}, "train → optim_g: unknown option 'capturable'"),
        ('train:scheduler', STEPS | {'gama': 0.5}, 'did you mean gamma?'),
        # truth values
        ('datasets:train:use_hflip', 'no', "use_hflip must be true or false, not 'no' (write it without quotes)"),
        ('network_g:pp_fuse', 'no', 'network_g → pp_fuse must be true or false'),
        ('val:save_img', 1, 'val → save_img must be true or false, not 1'),
        # numbers
        ('manual_seed', 99999999999, 'manual_seed must be a whole number from 0 to 2147483647'),
        ('scale', True, 'scale must be a whole number'),
        ('num_gpu', -1, 'num_gpu must be a whole number from 0 to 1024 or auto, not -1'),
        ('datasets:train:batch_size_per_gpu', 10**9, 'batch_size_per_gpu must be a whole number from 1 to 65536'),
        ('train:optim_g:lr', float('inf'), 'train → optim_g → lr must be a number from 0 to 100, not inf'),
        ('train:optim_g:betas', [0.9, 1], 'betas must be a list of 2, each a number of at least 0 and below 1'),
        ('train:scheduler:gamma', 'a', "gamma must be a number above 0 and at most 1, not 'a'"),
        ('train:scheduler:gamma', float('nan'), 'gamma must be a number above 0 and at most 1, not nan'),
        ('train:scheduler:restart_weights', ['a'], 'restart_weights must be a list, each a number'),
        ('train:scheduler:restart_weights', [1, 1], 'restart_weights must have 1 numbers, one for each of restarts'),
        ('train:ema_decay', 2, 'ema_decay must be a number of at least 0 and below 1, not 2'),
        ('train:warmup_iter', 10**4000, 'warmup_iter must be a whole number'),
        ('network_g:embed_dim', 10**9, 'embed_dim must be a whole number from 1 to 1024'),
        ('network_g:depths', [10_000_000, 2], 'depths must be a list, each a whole number from 1 to 64'),
        ('network_g:depths', [6], 'num_heads must have a number for each of depths [6]'),
        ('network_g:pp_num_centers', 10**9, 'pp_num_centers must be a whole number from 1 to 4096'),
        ('network_g:pp_window_size', 5.5, 'pp_window_size must be a whole number'),
        ('network_g:pp_shift', 1.5, 'pp_shift must be a whole number'),
        ('network_g:mlp_ratio', float('inf'), 'mlp_ratio must be a number above 0'),
        # types that do not exist, or do something else
        ('train:optim_g:type', 'Adamw', "optim_g → type: 'Adamw' is not one of Adam, AdamW"),
        ('train:optim_g:type', None, 'optim_g lacks type'),
        ('train:scheduler:type', 'StepLR', "scheduler → type: 'StepLR' is not one of MultiStepLR"),
        ('train:scheduler', COSINE | {'periods': [0, 0]}, 'periods must be a list'),
        ('train:scheduler', COSINE, 'periods end after 200 iterations, before total_iter 250000'),
        ('train:pixel_opt:reduction', 'none', "reduction must be one of mean, sum, not 'none'"),
        (
            'train:pixel_opt',
            {'type': 'GANLoss', 'gan_type': 'lsgan'},
            "pixel_opt → type: 'GANLoss' is not one of L1Loss",
        ),
        ('train:pixel_opt', None, 'train lacks a loss'),
        (
            'train:perceptual_opt',
            {'type': 'PerceptualLoss', 'layer_weights': {'conv9': 1}},
            "'conv9' is no layer of vgg19",
        ),
        (
            'train:perceptual_opt',
            {'type': 'PerceptualLoss', 'layer_weights': {'conv1_1': 1}, 'criterion': 'l2'},
            'l1, fro',
        ),
        ('train:teacher', {'weights': 'PPATDLight_x4', 'features': True}, None),
        ('train:teacher', {}, 'train → teacher lacks weights'),
        ('train:teacher', 'PPATDLight_x4', "teacher must be a mapping of options, not 'PPATDLight_x4'"),
        ('train:teacher', {'weights': 'x.pth', 'tile': 16}, 'teacher → tile 16 must be larger than the overlap of 32'),
        ('train:flat_opt', {}, None),
        ('train:flat_opt', {'sides': [48, 12]}, 'flat_opt → sides must name the least side first, not [48, 12]'),
        ('train:flat_opt', {'sides': 16}, 'flat_opt → sides must be a list of 2, each a whole number from 1 to 4096'),
        ('train:flat_opt', True, 'train → flat_opt must be a mapping of options, not True'),
        ('train:auxiliary_weights', 5, 'auxiliary_weights must be a mapping of names to values'),
        ('train:auxiliary_weights', {'ratio': 'a'}, 'auxiliary_weights → ratio must be a number'),
        ('datasets:train:type', 'FFHQDataset', "'FFHQDataset' is not one of PairedSRDataset"),
        ('datasets:train:type', 'SingleImageDataset', "'SingleImageDataset' is not one of"),
        ('datasets:train:io_backend', {'type': 'memcached'}, 'io_backend → type must be one of disk, lmdb'),
        ('datasets:val:filename_tmpl', '{}{}', 'filename_tmpl must be the name of an LQ image'),
        ('datasets:val:filename_tmpl', '{0.__class__}', 'filename_tmpl must be the name of an LQ image'),
        ('datasets:val_2:name', 'Set5', "'Set5' is that of val, too"),
        ('datasets:train_2', {}, 'is called train or val'),
        ('val:metrics:psnr:type', 'calculate_psnr_pt', "'calculate_psnr_pt' is not one of calculate_psnr"),
        ('val:metrics:psnr:crop_border', KeyError, 'val → metrics → psnr lacks crop_border'),
        ('val:metrics:psnr:better', 'more', 'better must be one of higher, lower'),
        ('val:tile_overlap', 5, None),
        ('val:tile', 32, 'tile_overlap 32 must be smaller than tile 32'),
        ('logger:wandb', 5, 'logger → wandb must be a mapping of options, not 5'),
        ('logger:wandb', 'foo', "logger → wandb must be a mapping of options, not 'foo'"),
        ('logger:wandb', {'projekt': 'x'}, 'did you mean project?'),
        ('path:pretrain_network_g', 5, 'pretrain_network_g must be the path of a file or folder, not 5'),
        ('path:ignore_resume_networks', 'network_g', 'ignore_resume_networks must be a list'),
    ],
    ids=str,
)
def test_keys_types_and_ranges(tmp_path, options, keys, value, words):
    path = write(tmp_path, edit(options, keys, value))
    if words is None:
        load_options(path, True)
        return
    with pytest.raises(UserError) as e:
        load_options(path, is_train=True)
    assert words in str(e.value)
    assert '\n' not in str(e.value) and len(str(e.value)) < 800


@pytest.mark.parametrize(
    'text, words',
    [
        ('a: 1\nb: 2\na: 3\n', "the key 'a' stands twice in one mapping, in lines 1 and 3"),
        ('a: {b: 1, c: 2,\n "b": 3}\n', "the key 'b' stands twice in one mapping, in lines 1 and 2"),
        ('- x\n- k: 1\n  k: 1\n', "the key 'k' stands twice in one mapping, in lines 2 and 3"),
    ],
    ids=['top', 'flow', 'in a list'],
)
def test_a_key_stands_once(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        read_yaml(write(tmp_path, text))


def test_merged_keys_are_no_duplicates_and_dates_are_text(tmp_path):
    text = 'a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}\nc: 2020-99-99\n'
    assert read_yaml(write(tmp_path, text)) == {'a': {'x': 1, 'y': 2}, 'b': {'x': 3, 'y': 2}, 'c': '2020-99-99'}


@pytest.mark.skipif(not Path('/dev/zero').exists(), reason='no /dev/zero')
def test_a_file_without_end():
    with pytest.raises(UserError, match='too large'):
        read_yaml('/dev/zero')


@pytest.mark.parametrize(
    'entry', ['manual_seed=2020-99-99', 'name=' + '[' * 5000, 'name=' + '9' * 5000, 'x: y', 'a=b: c: d']
)
def test_odd_forced_values(tmp_path, options, entry):
    with pytest.raises(UserError) as e:
        load_options(write(tmp_path, options), True, [entry])
    assert '\n' not in str(e.value) and len(str(e.value)) < 400


def test_defaults_are_filled_in(tmp_path, options):
    options['train']['optim_g'] = {'type': 'SGD', 'lr': 1}
    options['train']['total_iter'] = 1e3
    del options['datasets']['val']['name'], options['train']['ema_decay']
    opt = load_options(write(tmp_path, options), True, root=tmp_path)
    expected = {'type': 'SGD', 'lr': 1, 'weight_decay': 0, 'momentum': 0, 'dampening': 0, 'nesterov': False}
    assert opt['train']['optim_g'] == expected
    assert type(opt['train']['total_iter']) is int and opt['train']['ema_decay'] == 0
    assert opt['datasets']['val']['name'] == 'val' and opt['datasets']['val']['filename_tmpl'] == '{}'


def test_models_and_data_sets_of_other_packages_have_their_own_keys(tmp_path, options):
    """A GAN of basicsr: registered as it is; RealESRNetModel and its data set: under basicsr's suffix."""
    options |= {'model_type': 'ESRGANModel', 'network_d': {'type': 'VGGStyleDiscriminator', 'num_in_ch': 3}}
    options['path'] |= {'pretrain_network_d': '~/d.pth', 'strict_load_d': True}
    options['train']['optim_g']['type'] = 'Adam'
    options['train'] |= {'optim_d': {'type': 'Adam', 'lr': 1e-4}, 'gan_opt': {'type': 'GANLoss'}, 'net_d_iters': 1}
    opt = load_options(write(tmp_path, options), True)
    assert opt['network_d']['num_in_ch'] == 3 and opt['train']['optim_d']['type'] == 'Adam'
    assert opt['path']['pretrain_network_d'] == str(Path.home() / 'd.pth')
    assert opt['train']['optim_g'] == options['train']['optim_g']  # no defaults of ours

    options |= {'model_type': 'RealESRNetModel', 'queue_size': 180}
    options['datasets']['train'] |= {'type': 'RealESRGANDataset', 'blur_kernel_size': 21}
    opt = load_options(write(tmp_path, options), True)
    assert opt['queue_size'] == 180 and opt['datasets']['train']['blur_kernel_size'] == 21

    options['train']['total_iter'] = 0  # what the training loop reads itself is checked
    with pytest.raises(UserError, match='total_iter'):
        load_options(write(tmp_path, options), True)


@pytest.mark.parametrize(
    'model, changes, words',
    [
        ('SRModel', {}, "train → optim_g → type must be Adam, not 'AdamW'"),
        ('SRModel', {'train:optim_g': {'lr': 1}}, 'train → optim_g has to be there'),
        ('SRModel', {'train:scheduler:type': 'StepLR'}, "scheduler → type: 'StepLR' is not one of MultiStepLR"),
        ('SRModel', {'network_g': None}, 'network_g has to be there'),
        ('SRGANModel', {}, 'network_d has to be there, a mapping with a type: SRGANModel needs it'),
        ('SRGANModel', {'network_d': {'type': 'VGGStyleDiscriminator'}}, 'train → optim_d has to be there'),
    ],
)
def test_what_models_of_basicsr_need(tmp_path, options, model, changes, words):
    options['model_type'] = model
    for keys, value in changes.items():
        edit(options, keys, value)
    with pytest.raises(UserError, match=words):
        load_options(write(tmp_path, options), True)


def test_losses_and_metrics_of_other_packages(tmp_path, options, monkeypatch):
    from basicsr.utils.registry import LOSS_REGISTRY, METRIC_REGISTRY

    class EdgeLoss:
        def __init__(self, radius, loss_weight=1.0):
            pass

    def calculate_edges(img, img2, radius=2):
        pass

    monkeypatch.setitem(LOSS_REGISTRY._obj_map, 'EdgeLoss', EdgeLoss)
    monkeypatch.setitem(METRIC_REGISTRY._obj_map, 'calculate_edges', calculate_edges)
    options['train']['pixel_opt'] = {'type': 'EdgeLoss', 'radius': 3}
    options['val']['metrics'] = {'edges': {'type': 'calculate_edges', 'better': 'lower'}}
    opt = load_options(write(tmp_path, options), True)
    assert opt['train']['pixel_opt'] == {'type': 'EdgeLoss', 'radius': 3}
    assert opt['val']['metrics'] == {'edges': {'type': 'calculate_edges', 'better': 'lower'}}
    for keys, words in (('train:pixel_opt:radios', 'did you mean radius?'), ('val:metrics:edges:img', "option 'img'")):
        with pytest.raises(UserError) as e:
            load_options(write(tmp_path, edit(copy.deepcopy(options), keys, 1)), True)
        assert words in str(e.value)
    del options['train']['pixel_opt']['radius']
    with pytest.raises(UserError, match='pixel_opt lacks radius'):
        load_options(write(tmp_path, options), True)


def test_images_without_ground_truth_have_no_psnr(tmp_path, options):
    single = {'type': 'SingleImageDataset', 'dataroot_lq': 'x'}
    options = {key: options[key] for key in ('name', 'model_type', 'scale', 'network_g', 'val')}
    options |= {'datasets': {'test': single}}
    with pytest.raises(UserError, match='psnr compares with a ground truth, which data set test'):
        load_options(write(tmp_path, options), False)
    options['val'] |= {'metrics': {'niqe': {'type': 'calculate_niqe', 'crop_border': 4}}}
    assert load_options(write(tmp_path, options), False)['val']['metrics']['niqe']['better'] == 'lower'


def test_loggers_that_are_not_installed(tmp_path, options, monkeypatch):
    find = importlib.util.find_spec
    missing = {'wandb'}
    monkeypatch.setattr('importlib.util.find_spec', lambda name, *rest: None if name in missing else find(name, *rest))
    options['logger']['wandb'] = {'project': 'x'}
    with pytest.raises(UserError, match='pip install wandb'):
        load_options(write(tmp_path, options), True)
    options['logger'] |= {'wandb': None}
    missing.add('tensorboard')
    with pytest.raises(UserError, match='pip install tensorboard'):
        load_options(write(tmp_path, options), True)
    options['logger'] |= {'wandb': {'project': 'x'}, 'use_tb_logger': False}
    with pytest.raises(UserError, match='set use_tb_logger: true'):
        load_options(write(tmp_path, options), True)


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
        'network_g:num_heads=[2, 2]',
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
