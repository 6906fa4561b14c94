"""Options files: read safely, checked before anything is built, completed as BasicSR's parser would.

The format is BasicSR's. What differs: YAML is loaded with the safe loader, ``--force_yml`` values are YAML and not
evaluated, and a mistake is one sentence (:class:`ppsr.errors.UserError`) instead of a traceback an hour later.
"""

import inspect
import math
import random
import re
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, METRIC_REGISTRY, MODEL_REGISTRY

from ppsr.errors import UserError
from ppsr.tiling import DEFAULT_OVERLAP, check_tiles

__all__ = ['check_network', 'load_options', 'network_arguments', 'read_yaml']

PLAIN_NAME = re.compile(r'[\w+@=,.-]*[\w+@=,-][\w+@=,.-]*')  # becomes a folder or file name: no separators, not '..'
VAL_KEYS = ('val_freq', 'save_img', 'suffix', 'pbar', 'metrics', 'tile', 'tile_overlap')
PATH_KEYS = ('pretrain_network_g', 'param_key_g', 'strict_load_g', 'resume_state', 'ignore_resume_networks')
TRAIN_KEYS = ('total_iter', 'warmup_iter', 'ema_decay', 'optim_g', 'scheduler', 'pixel_opt', 'perceptual_opt')
TRAIN_KEYS += ('auxiliary_weights', 'grad_clip_norm', 'amp', 'max_nonfinite')
LOGGER_KEYS = ('print_freq', 'save_checkpoint_freq', 'keep_last', 'use_tb_logger', 'wandb')
AMP = ('bf16', 'fp16')
MAX_ENTRIES = 100_000  # far more than any options file has
REQUIRED = {
    'name': str,
    'model_type': str,
    'scale': int,
    'num_gpu': (int, str),
    'datasets': dict,
    'network_g': dict,
    'network_g:type': str,
    'path': dict,
}
REQUIRED_TRAIN = {
    'datasets:train': dict,
    'datasets:train:batch_size_per_gpu': int,
    'datasets:train:num_worker_per_gpu': int,
    'datasets:train:gt_size': int,
    'train': dict,
    'train:total_iter': (int, float),
    'train:optim_g': dict,
    'train:optim_g:type': str,
    'train:optim_g:lr': (int, float),
    'train:scheduler': dict,
    'train:scheduler:type': str,
    'logger': dict,
    'logger:print_freq': (int, float),
    'logger:save_checkpoint_freq': (int, float),
}
REQUIRED_TEST = {'val': dict}


def read_yaml(path: str | Path) -> dict:
    """A YAML file that holds a mapping, loaded with the safe loader.

    Raises:
        UserError: missing, empty, not YAML, or not a mapping.
    """
    try:
        text = Path(path).read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else 'it is not a text file'
        raise UserError(f'options file {path} cannot be read: {reason}.') from e
    try:
        opt = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as e:
        where = getattr(e, 'problem_mark', None)
        line = f', line {where.line + 1}' if where else ''
        problem = getattr(e, 'problem', None) or str(e).splitlines()[0]
        raise UserError(f'options file {path}{line} is not valid YAML: {problem}.') from e
    if opt is None:
        raise UserError(f'options file {path} is empty; start from one of options/*.yml.')
    if not isinstance(opt, dict):
        raise UserError(f'options file {path} holds a {type(opt).__name__}, not a mapping of options.')
    return opt


def network_arguments(cls: type) -> dict[str, inspect.Parameter]:
    """Constructor arguments of a network by name, those that ``**kwargs`` hands on to its base classes included."""
    arguments = {}
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
        for p in parameters:
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                arguments.setdefault(p.name, p)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return arguments


def check_network(network: dict, where: str = 'network_g') -> None:
    """Refuse a network type that is not registered, and arguments that it does not take.

    Raises:
        UserError: naming the key and what there is instead.
    """
    kind = network.get('type')
    if kind not in ARCH_REGISTRY:
        ours = [name for name, cls in ARCH_REGISTRY if cls.__module__.startswith('ppsr.')]
        raise UserError(f'{where}: type: {kind!r} is not a registered arch; those of ppsr are {", ".join(ours)}.')
    arguments = network_arguments(ARCH_REGISTRY.get(kind))
    for key in network:
        if key != 'type' and key not in arguments:
            raise UserError(f'{where}: {kind} takes no option {key!r}; it takes {", ".join(arguments)}.')


def _force(opt: dict, entries: Sequence[str]) -> None:
    for entry in entries:
        keys, equals, value = entry.partition('=')
        *parents, last = keys.strip().split(':')
        node = opt
        for key in parents:
            node = node.get(key) if isinstance(node, dict) else None
        if not equals or not last or not isinstance(node, dict):
            raise UserError(f'--force_yml {entry!r}: write key=value or section:key=value with an existing section.')
        try:
            node[last] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise UserError(f'--force_yml {entry!r}: the value is not valid YAML.') from e


def _check_tree(opt: dict, path: str | Path) -> None:
    """Refuse what no options file needs and BasicSR's code would stumble over: keys that are not text, and aliases that
    unfold without end (`a: &a [*a]`) or into more than memory holds."""
    waiting, seen = [opt], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > MAX_ENTRIES:
            raise UserError(f'options file {path} unfolds into more than {MAX_ENTRIES} entries; are its aliases right?')
        if isinstance(node, dict):
            for key in node:
                if not isinstance(key, str):
                    raise UserError(f'options file {path}: the key {key!r} is not text; put it in quotes.')
            waiting.extend(node.values())
        elif isinstance(node, (list, tuple, set)):
            waiting.extend(node)


def _require(opt: dict, required: dict, path: str | Path) -> None:
    for keys, kind in required.items():
        node = opt
        for key in keys.split(':'):
            node = node.get(key) if isinstance(node, dict) else None
        if node is None:
            raise UserError(f'options file {path} lacks {keys.replace(":", " → ")}.')
        if not isinstance(node, kind) or (isinstance(node, bool) and kind is not bool):
            names = ' or '.join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
            hint = ' (YAML reads 1e-4 as text: write 1.0e-4)' if isinstance(node, str) and float in _tuple(kind) else ''
            raise UserError(f'options file {path}: {keys.replace(":", " → ")} must be {names}, not {node!r}{hint}.')


def _tuple(kind) -> tuple:
    return kind if isinstance(kind, tuple) else (kind,)


def _known(section: dict, known: Sequence[str], where: str) -> None:
    for key in section:
        if key not in known:
            raise UserError(f'{where}: unknown option {key!r}; known are {", ".join(known)}.')


def _plain(value, where: str) -> None:
    if not isinstance(value, str) or not PLAIN_NAME.fullmatch(value):
        raise UserError(f'{where}: {value!r} becomes a file name; use letters, digits and _ + @ = , . - only.')


def load_options(
    path: str | Path,
    is_train: bool,
    force_yml: Sequence[str] = (),
    debug: bool = False,
    auto_resume: bool = False,
    root: str | Path = '.',
) -> dict:
    """Options of a training or test run, checked and completed.

    Args:
        path: the YAML file.
        is_train: training or testing.
        force_yml: 'section:key=value' entries that change the file's values.
        debug: BasicSR's debug mode: 'debug_' before the name, everything every 8 iterations.
        auto_resume: resume from the newest training state of this name.
        root: experiments/, results/ and tb_logger/ are made in this folder.

    Returns:
        The options as BasicSR's models and data sets expect them. ``dist``, ``rank`` and ``world_size`` say one
        process; :func:`ppsr.training.distributed.init_dist` changes them.

    Raises:
        UserError: anything wrong that can be seen without building a network or opening an image.
    """
    opt = read_yaml(path)
    _force(opt, force_yml)
    _check_tree(opt, path)
    _require(opt, REQUIRED | (REQUIRED_TRAIN if is_train else REQUIRED_TEST), path)
    _plain(opt['name'], f'options file {path}: name')
    check_network(opt['network_g'], f'options file {path}: network_g')
    if opt['model_type'] not in MODEL_REGISTRY:
        raise UserError(f'options file {path}: model_type: {opt["model_type"]!r} is not a registered model.')
    own = network_arguments(ARCH_REGISTRY.get(opt['network_g']['type'])).get('upscale')
    upscale = opt['network_g'].get('upscale', opt['scale'] if own is None else own.default)
    if upscale != opt['scale']:
        raise UserError(f'options file {path}: scale is {opt["scale"]} but network_g → upscale is {upscale}.')
    opt['val'] = _checked_val(opt.get('val'), is_train, path)
    _known(opt['path'], PATH_KEYS, f'options file {path}: path')

    if opt['num_gpu'] == 'auto':
        opt['num_gpu'] = torch.cuda.device_count()
    if not isinstance(opt['num_gpu'], int) or opt['num_gpu'] < 0:
        raise UserError(f'options file {path}: num_gpu must be a number or auto, not {opt["num_gpu"]!r}.')
    if opt['num_gpu'] > torch.cuda.device_count():
        raise UserError(
            f'options file {path}: num_gpu is {opt["num_gpu"]}, but {torch.cuda.device_count()} are visible to torch; '
            'write num_gpu: auto, or 0 for the CPU.'
        )
    _at_least(opt, 'manual_seed', 0, f'options file {path}', int)
    if opt.get('manual_seed') is None:
        opt['manual_seed'] = random.randint(1, 10000)
    if debug and not opt['name'].startswith('debug'):
        opt['name'] = 'debug_' + opt['name']
    opt.update(is_train=is_train, auto_resume=auto_resume, dist=False, rank=0, world_size=1, root_path=str(root))
    _complete_datasets(opt, is_train, path)
    _complete_paths(opt, Path(root), is_train)
    if is_train:
        _check_training(opt, path)
        opt['train']['total_iter'] = int(opt['train']['total_iter'])
        opt['logger'].setdefault('use_tb_logger', False)
        if 'debug' in opt['name']:
            opt['logger'].update(print_freq=1, save_checkpoint_freq=8)
            if opt['val'] is not None:
                opt['val']['val_freq'] = 8
    return opt


def _checked_val(val: dict | None, is_train: bool, path) -> dict | None:
    if val is None:
        return None
    if not isinstance(val, dict):
        raise UserError(f'options file {path}: val must be a mapping, not {val!r}.')
    _known(val, VAL_KEYS, f'options file {path}: val')
    if is_train and not isinstance(val.get('val_freq'), (int, float)):
        raise UserError(f'options file {path}: val → val_freq must be a number, not {val.get("val_freq")!r}.')
    if not isinstance(val.get('metrics') or {}, dict):
        raise UserError(f'options file {path}: val → metrics must be a mapping of metrics, not {val["metrics"]!r}.')
    for name, metric in (val.get('metrics') or {}).items():
        _check_metric(metric, f'options file {path}: val → metrics → {name}')
    for key in ('tile', 'tile_overlap'):
        if val.get(key) is None:
            val.pop(key, None)
        elif type(val[key]) is not int:
            raise UserError(f'options file {path}: val → {key} must be a number of LR pixels, not {val[key]!r}.')
    if 'tile' in val:
        check_tiles(val['tile'], val.get('tile_overlap', DEFAULT_OVERLAP))
    val.setdefault('save_img', False)
    val.setdefault('suffix', None)
    if val['suffix'] is not None:
        _plain(val['suffix'], f'options file {path}: val → suffix')
    return val


def _check_metric(metric, where: str) -> None:
    if not isinstance(metric, dict) or not isinstance(metric.get('type'), str):
        raise UserError(f'{where} must be a mapping with a type.')
    if metric['type'] not in METRIC_REGISTRY:
        known = ', '.join(name for name, _ in METRIC_REGISTRY)
        raise UserError(f'{where}: type: {metric["type"]!r} is not a registered metric; those there are {known}.')
    arguments = inspect.signature(METRIC_REGISTRY.get(metric['type'])).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in arguments.values()):
        _known(metric, ['type', 'better', *arguments], where)
    if metric.get('better', 'higher') not in ('higher', 'lower'):
        raise UserError(f'{where}: better must be higher or lower, not {metric["better"]!r}.')


def _check_training(opt: dict, path) -> None:
    where, train, logger = f'options file {path}', opt['train'], opt['logger']
    _known(logger, LOGGER_KEYS, f'{where}: logger')
    if MODEL_REGISTRY.get(opt['model_type']).__module__.startswith('ppsr.'):  # other packages' models have their own
        _known(train, TRAIN_KEYS, f'{where}: train')
    dataset = opt['datasets']['train']
    _at_least(train, 'total_iter', 1, f'{where}: train')
    _at_least(train, 'grad_clip_norm', None, f'{where}: train')
    _at_least(train, 'max_nonfinite', 1, f'{where}: train', int)
    _at_least(train, 'ema_decay', 0, f'{where}: train')
    if (train.get('ema_decay') or 0) >= 1:
        raise UserError(f'{where}: train → ema_decay must be below 1, not {train["ema_decay"]!r}.')
    _at_least(train, 'warmup_iter', -1, f'{where}: train')
    if isinstance(train.get('pixel_opt'), dict):
        _at_least(train['pixel_opt'], 'loss_weight', 0, f'{where}: train → pixel_opt')
    for key in ('print_freq', 'save_checkpoint_freq'):
        _at_least(logger, key, 1, f'{where}: logger')
    _at_least(logger, 'keep_last', 1, f'{where}: logger', int)
    _at_least(dataset, 'batch_size_per_gpu', 1, f'{where}: datasets → train', int)
    _at_least(dataset, 'num_worker_per_gpu', 0, f'{where}: datasets → train', int)
    _at_least(dataset, 'dataset_enlarge_ratio', None, f'{where}: datasets → train')
    if opt['val'] is not None:
        _at_least(opt['val'], 'val_freq', 1, f'{where}: val')
    if train.get('amp') is not None and train['amp'] not in AMP:
        raise UserError(
            f'{where}: train → amp must be one of {", ".join(AMP)}, or ~ for float32, not {train["amp"]!r}.'
        )


def _at_least(section: dict, key: str, least: float | None, where: str, kind=(int, float)) -> None:
    """A number that is there has to be finite and at least `least`, or positive where that is None."""
    value = section.get(key)
    if value is None:
        return
    fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
    if not fits or (value <= 0 if least is None else value < least):
        wanted = 'above 0' if least is None else f'of at least {least}'
        raise UserError(f'{where} → {key} must be a{" whole" if kind is int else ""} number {wanted}, not {value!r}.')


def _complete_datasets(opt: dict, is_train: bool, path) -> None:
    phases = ('train', 'val') if is_train else ('test', 'val')
    # --force_yml datasets:test_4=~ leaves a data set out
    opt['datasets'] = {phase: dataset for phase, dataset in opt['datasets'].items() if dataset is not None}
    for phase, dataset in opt['datasets'].items():
        where = f'options file {path}: datasets → {phase}'
        kind = str(phase).split('_')[0]
        if kind not in phases:
            raise UserError(f'{where}: a data set here is called {" or ".join(phases)} (and val_2, …).')
        if not isinstance(dataset, dict):
            raise UserError(f'{where} must be a mapping, not {dataset!r}.')
        if not isinstance(dataset.get('type'), str) or dataset['type'] not in DATASET_REGISTRY:
            raise UserError(f'{where}: type: {dataset.get("type")!r} is not a registered data set.')
        dataset.setdefault('name', phase)
        _plain(dataset['name'], f'{where}: name')
        dataset.setdefault('io_backend', {'type': 'disk'})
        dataset.update(phase=kind, scale=opt['scale'])
        for key in ('dataroot_gt', 'dataroot_lq', 'meta_info_file'):
            if isinstance(dataset.get(key), str):
                dataset[key] = str(Path(dataset[key]).expanduser())


def _complete_paths(opt: dict, root: Path, is_train: bool) -> None:
    paths = opt['path']
    for key in ('pretrain_network_g', 'resume_state'):
        if paths.get(key) is not None:
            if not isinstance(paths[key], str):
                raise UserError(f'path → {key} must be the path of a file, not {paths[key]!r}.')
            paths[key] = str(Path(paths[key]).expanduser())
    ignored = paths.get('ignore_resume_networks')
    if ignored is not None and not isinstance(ignored, list):
        raise UserError(f'path → ignore_resume_networks must be a list of networks, not {ignored!r}.')
    paths.setdefault('param_key_g', 'params_ema')
    if is_train:
        folder = root / 'experiments' / opt['name']
        paths['experiments_root'] = str(folder)
        paths['models'] = str(folder / 'models')
        paths['training_states'] = str(folder / 'training_states')
    else:
        folder = root / 'results' / opt['name']
        paths['results_root'] = str(folder)
    paths['log'] = str(folder)
    paths['visualization'] = str(folder / 'visualization')
