"""Options files: read safely, checked before anything is built, completed as BasicSR's parser would.

The format is BasicSR's. What differs: YAML is loaded with the safe loader, a key may stand once, ``--force_yml`` values
are YAML and not evaluated, and a mistake is one sentence (:class:`ppsr.errors.UserError`) instead of a traceback an
hour later. What there is to set is declared in :mod:`ppsr.training.schema`; how to add a key is said there, too.
"""

import importlib.util
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from basicsr.models.base_model import BaseModel
from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY

from ppsr.archs.build import check_network, network_arguments
from ppsr.errors import UserError
from ppsr.schema import check, nothing_required, show
from ppsr.training import schema

__all__ = ['load_options', 'read_network', 'read_yaml']

MAX_ENTRIES = 100_000  # far more than any options file has
MAX_SIZE = 1_000_000  # characters; /dev/zero has more


class _Loader(yaml.SafeLoader):
    """The safe loader, without dates: 2020-01-01 is text, 2020-99-99 no error."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != 'tag:yaml.org,2002:timestamp']
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(path: str | Path) -> dict:
    """A YAML file that holds a mapping, loaded with the safe loader; all keys are text and stand once.

    Raises:
        UserError: missing, empty, too large, not YAML, not a mapping, or a key that is not text or stands twice.
    """
    where = f'options file {path}'
    try:
        with open(path, encoding='utf-8') as file:
            text = file.read(MAX_SIZE + 1)
    except (OSError, ValueError) as e:  # of ValueErrors, text that is none, and paths with zero bytes
        reason = e.strerror if isinstance(e, OSError) else 'it is not a text file'
        raise UserError(f'{where} cannot be read: {reason}.') from e
    if len(text) > MAX_SIZE:
        raise UserError(f'{where} is too large: it has more than {MAX_SIZE} characters.')
    opt = _parse(text, where)
    if opt is None:
        raise UserError(f'{where} is empty; start from one of options/*.yml.')
    if not isinstance(opt, dict):
        raise UserError(f'{where} holds a {type(opt).__name__}, not a mapping of options.')
    _check_tree(opt, where)
    return opt


def _parse(text: str, where: str) -> Any:
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        _refuse_duplicates(node, where)
        return None if node is None else loader.construct_document(node)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError) as e:
        mark = getattr(e, 'problem_mark', None)
        line = f', line {mark.line + 1}' if mark else ''
        problem = getattr(e, 'problem', None) or (str(e).splitlines() or [type(e).__name__])[0]
        raise UserError(f'{where}{line} is not valid YAML: {problem}.') from e


def _refuse_duplicates(root: yaml.Node | None, where: str) -> None:
    """YAML says that a key stands once in a mapping; PyYAML would take the last."""
    waiting, visited = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in visited or not isinstance(node, yaml.CollectionNode):
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting.extend(node.value)
            continue
        lines: dict[tuple[str, str], int] = {}
        for key, value in node.value:
            waiting.extend((key, value))
            if not isinstance(key, yaml.ScalarNode):
                continue
            line, name = key.start_mark.line + 1, (key.tag, key.value)
            if name in lines:
                raise UserError(
                    f'{where}: the key {show(key.value)} stands twice in one mapping, in lines {lines[name]} and '
                    f'{line}; keep one.'
                )
            lines[name] = line


def _check_tree(opt: dict, where: str) -> None:
    """Refuse what no options file needs and BasicSR's code would stumble over: keys that are not text, and aliases that
    unfold without end (`a: &a [*a]`) or into more than memory holds."""
    waiting, seen = [opt], 0
    while waiting:
        node = waiting.pop()
        seen += 1
        if seen > MAX_ENTRIES:
            raise UserError(f'{where} unfolds into more than {MAX_ENTRIES} entries; are its aliases right?')
        if isinstance(node, dict):
            for key in node:
                if not isinstance(key, str):
                    raise UserError(f'{where}: the key {key!r} is not text; put it in quotes.')
            waiting.extend(node.values())
        elif isinstance(node, (list, tuple, set)):
            waiting.extend(node)


def _force(opt: dict, entries: Sequence[str]) -> None:
    for entry in entries:
        where = f'--force_yml {show(entry)}'
        keys, equals, value = entry.partition('=')
        *parents, last = keys.strip().split(':')
        node = opt
        for key in parents:
            node = node.get(key) if isinstance(node, dict) else None
        if not equals or not last or not isinstance(node, dict):
            raise UserError(f'{where}: write key=value or section:key=value with an existing section.')
        node[last] = _parse(value, where)
    _check_tree(opt, '--force_yml')


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
        The options as BasicSR's models and data sets expect them, with the defaults of :mod:`ppsr.training.schema`.
        ``dist``, ``rank`` and ``world_size`` say one process; :func:`ppsr.training.distributed.init_dist` changes them.

    Raises:
        UserError: anything wrong that can be seen without building a network or opening an image.
    """
    where = f'options file {path}'
    opt = read_yaml(path)
    _force(opt, force_yml)
    model, ours = _model(opt, where)
    opt = check(schema.Options if ours else schema.OpenOptions, opt, f'{where}:')

    _check_networks(opt, where)
    _check_devices(opt, where)
    if opt['manual_seed'] is None:
        opt['manual_seed'] = random.randint(1, 10000)
    if debug and not opt['name'].startswith('debug'):
        opt['name'] = 'debug_' + opt['name']
    opt.update(is_train=is_train, auto_resume=auto_resume, dist=False, rank=0, world_size=1, root_path=str(root))
    _complete_datasets(opt, ours, where)
    _complete_sections(opt, ours, where)
    if model is not None and schema.is_basicsr(model):
        _check_basicsr_model(model, opt, where)
    opt['path'] = check(schema.Paths if ours else schema.OpenPaths, opt['path'], f'{where}: path')
    _complete_paths(opt, Path(root))
    return opt


def read_network(path: str | Path) -> tuple[str | None, dict]:
    """The name of the run and ``network_g`` of an options file, for commands that want no more of it. What else stands
    in the file may be incomplete, but is checked as for a training or a test: a mistake there is one here.

    Raises:
        UserError: as :func:`load_options`, but for what is missing beside the network.
    """
    where = f'options file {path}'
    opt = read_yaml(path)
    _, ours = _model(opt, where)
    opt = check(nothing_required(schema.Options if ours else schema.OpenOptions), opt, f'{where}:')
    network, datasets = opt['network_g'], opt['datasets'] or {}
    if network is None:
        raise UserError(f'{where} lacks network_g.')
    _check_networks(opt, where)
    opt['is_train'] = opt['train'] is not None or 'train' in datasets
    for key, dataset in datasets.items():
        if dataset is not None:
            _check_dataset(key, dataset, opt['is_train'], ours, where)
    for key, section in _sections(opt, ours).items():
        if opt[key] is not None:
            check(section, opt[key], f'{where}: {key}')
    check(schema.Paths if ours else schema.OpenPaths, opt['path'], f'{where}: path')
    return opt['name'], network


def _model(opt: dict, where: str) -> tuple[type | None, bool]:
    """The class that ``model_type`` names, and whether it is ours; other packages' models have keys of their own."""
    model = schema.registered(MODEL_REGISTRY, opt.get('model_type'))
    if 'model_type' in opt and model is None:
        raise UserError(f'{where}: model_type: {show(opt["model_type"])} is not a registered model.')
    return model, model is None or model.__module__.startswith('ppsr.')


def _check_networks(opt: dict, where: str) -> None:
    for key in [key for key in opt if key.startswith('network_')]:
        if isinstance(opt[key], dict):
            if 'type' not in opt[key]:
                raise UserError(f'{where}: {key} lacks type, the name of a registered arch.')
            check_network(opt[key], f'{where}: {key}')
    network = opt['network_g']
    if network is None:
        del opt['network_g']
        return
    own = network_arguments(schema.registered(ARCH_REGISTRY, network['type'])).get('upscale')
    upscale = network.get('upscale', opt['scale'] if own is None else own.default)
    if opt['scale'] not in (None, upscale):
        raise UserError(f'{where}: scale is {opt["scale"]} but network_g → upscale is {show(upscale)}.')


def _check_devices(opt: dict, where: str) -> None:
    seen = torch.cuda.device_count()
    if opt['num_gpu'] == 'auto':
        opt['num_gpu'] = seen
    if opt['num_gpu'] > seen:
        raise UserError(
            f'{where}: num_gpu is {opt["num_gpu"]}, but {seen} are visible to torch; write num_gpu: auto, or 0 for '
            'the CPU.'
        )


def _complete_datasets(opt: dict, ours: bool, where: str) -> None:
    # --force_yml datasets:test_4=~ leaves a data set out
    datasets = {phase: dataset for phase, dataset in opt['datasets'].items() if dataset is not None}
    opt['datasets'], names = {}, {}
    for key, dataset in datasets.items():
        phase, dataset = _check_dataset(key, dataset, opt['is_train'], ours, where)
        if phase != 'train':
            if dataset['name'] in names:  # their pictures and records of the best would mix
                raise UserError(
                    f'{where}: datasets → {key} → name: {dataset["name"]!r} is that of {names[dataset["name"]]}, too; '
                    'give it another.'
                )
            names[dataset['name']] = key
        dataset.update(phase=phase, scale=opt['scale'])
        for root in ('dataroot_gt', 'dataroot_lq', 'meta_info_file'):
            if isinstance(dataset.get(root), str):
                dataset[root] = _expanded(dataset[root])
        opt['datasets'][key] = dataset
    if opt['is_train'] and 'train' not in opt['datasets']:
        raise UserError(f'{where} lacks datasets → train.')


def _check_dataset(key: str, dataset: Any, is_train: bool, ours: bool, where: str) -> tuple[str, dict]:
    """(phase, options) of the data set of a key."""
    phases = ('train', 'val') if is_train else ('test', 'val')
    place, phase = f'{where}: datasets → {key}', key.split('_')[0]
    if phase not in phases or (phase == 'train' and key != 'train'):
        raise UserError(f'{place}: a data set here is called {" or ".join(phases)} (and {phases[1]}_2, …).')
    if isinstance(dataset, dict):
        dataset = {'name': key} | dataset
    return phase, schema.dataset_kind(phase == 'train', ours)(dataset, place)


def _sections(opt: dict, ours: bool) -> dict[str, type[schema.Section]]:
    """What train, val and logger are declared as."""
    is_train = opt['is_train']
    if not is_train and isinstance(opt['val'], dict):
        opt['val'].pop('val_freq', None)  # a training's options serve for a test, too
    if ours:
        return {'train': schema.Train, 'val': schema.TrainVal if is_train else schema.Val, 'logger': schema.Logger}
    val = schema.OpenTrainVal if is_train else schema.OpenVal
    return {'train': schema.OpenTrain, 'val': val, 'logger': schema.OpenLogger}


def _complete_sections(opt: dict, ours: bool, where: str) -> None:
    """train, val and logger: a training has to have the first and the last, a test the second; any that is there is
    checked."""
    is_train = opt['is_train']
    for key in ('train', 'logger') if is_train else ('val',):
        if opt[key] is None:
            raise UserError(f'{where} lacks {key}.')
    for key, section in _sections(opt, ours).items():
        if opt[key] is not None:
            opt[key] = check(section, opt[key], f'{where}: {key}')
    without_gt = [d['name'] for d in opt['datasets'].values() if d['type'] == 'SingleImageDataset']
    for name, metric in ((opt['val'] or {}).get('metrics') or {}).items() if without_gt else ():
        if metric['type'] not in schema.WITHOUT_GT:
            raise UserError(
                f'{where}: val → metrics → {name} compares with a ground truth, which data set {without_gt[0]} '
                '(SingleImageDataset) does not have; leave the metric out or take PairedSRDataset.'
            )
    if is_train:
        _check_loggers(opt, where)
        if 'debug' in opt['name']:
            opt['logger'].update(print_freq=1, save_checkpoint_freq=8)
            if opt['val'] is not None:
                opt['val']['val_freq'] = 8
    else:
        for key in ('train', 'logger'):
            if opt[key] is None:
                del opt[key]


def _check_basicsr_model(model: type, opt: dict, where: str) -> None:
    """What basicsr's own models take for granted."""
    gan = 'GAN' in model.__name__
    train = opt.get('train') or {}
    needed = {'network_g': opt}
    if opt['is_train']:
        needed |= {'optim_g': train, 'scheduler': train}
        if gan:
            needed |= {'network_d': opt, 'optim_d': train, 'gan_opt': train}
    for key, section in needed.items():
        place = f'{where}: train → {key}' if section is train else f'{where}: {key}'
        if not isinstance(section.get(key), dict) or 'type' not in section[key]:
            raise UserError(f'{place} has to be there, a mapping with a type: {opt["model_type"]} needs it.')
    if not opt['is_train']:
        return
    if train['scheduler']['type'] not in schema.SCHEDULERS:
        raise UserError(
            f'{where}: train → scheduler → type: {show(train["scheduler"]["type"])} is not one of '
            f'{", ".join(schema.SCHEDULERS)}.'
        )
    if model.get_optimizer is BaseModel.get_optimizer:
        for key, optimizer in train.items():
            if key.startswith('optim_') and isinstance(optimizer, dict) and optimizer.get('type') != 'Adam':
                raise UserError(
                    f'{where}: train → {key} → type must be Adam, not {show(optimizer.get("type"))}: '
                    f"{opt['model_type']} is basicsr's, which knows no other; PurePassSRModel does."
                )


def _check_loggers(opt: dict, where: str) -> None:
    if 'debug' in opt['name']:  # neither is used
        return
    logger = opt['logger']
    wanted = {'tensorboard': logger['use_tb_logger'], 'wandb': bool((logger['wandb'] or {}).get('project'))}
    for package, key in (('tensorboard', 'use_tb_logger'), ('wandb', 'wandb')):
        if wanted[package] and importlib.util.find_spec(package) is None:
            raise UserError(
                f'{where}: logger → {key} needs the package {package}, which is not installed: '
                f'pip install {package}, or leave the option out.'
            )


def _complete_paths(opt: dict, root: Path) -> None:
    paths = opt['path']
    teacher = (opt.get('train') or {}).get('teacher')
    if isinstance(teacher, dict):
        teacher.update(
            {key: _expanded(teacher[key]) for key in ('weights', 'cache') if isinstance(teacher.get(key), str)}
        )
    for key, value in paths.items():
        if isinstance(value, str) and (key == 'resume_state' or key.startswith('pretrain_network_')):
            paths[key] = _expanded(value)
    if opt['is_train']:
        folder = root / 'experiments' / opt['name']
        paths['experiments_root'] = str(folder)
        paths['models'] = str(folder / 'models')
        paths['training_states'] = str(folder / 'training_states')
    else:
        folder = root / 'results' / opt['name']
        paths['results_root'] = str(folder)
    paths['log'] = str(folder)
    paths['visualization'] = str(folder / 'visualization')


def _expanded(path: str) -> str:
    try:
        return str(Path(path).expanduser())
    except RuntimeError:  # ~nobody: no such user
        return path
