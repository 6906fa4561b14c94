"""Tiny trainings for tests: options, pictures, and processes that start fast and can be killed."""

import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from processes import Process

REPOSITORY = Path(__file__).resolve().parent.parent


def write_pairs(folder: Path, count: int, size: int = 24, scale: int = 2) -> None:
    """Folders hr/ and lr/ of `count` pictures each: smooth noise."""
    rng = np.random.default_rng(0)
    for kind in ('hr', 'lr'):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for i in range(count):
        cells = rng.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
        hr = Image.fromarray(cells).resize((size * scale, size * scale), Image.Resampling.BICUBIC)
        hr.save(folder / 'hr' / f'{i:03}.png')
        hr.resize((size, size), Image.Resampling.BICUBIC).save(folder / 'lr' / f'{i:03}.png')


def options(data: Path, **changes) -> dict:
    """Options of a training of seconds; `changes` are 'section__key=value'."""
    opt = {
        'name': 'run',
        'model_type': 'PurePassSRModel',
        'scale': 2,
        'num_gpu': 0,
        'manual_seed': 7,
        'datasets': {
            'train': {
                'type': 'PairedSRDataset',
                'dataroot_gt': str(data / 'hr'),
                'dataroot_lq': str(data / 'lr'),
                'gt_size': 32,
                'batch_size_per_gpu': 2,
                'num_worker_per_gpu': 0,
                'dataset_enlarge_ratio': 3,
            },
            'val': {'type': 'PairedSRDataset', 'dataroot_gt': str(data / 'hr'), 'dataroot_lq': str(data / 'lr')},
        },
        'network_g': {
            'type': 'PPATDLight',
            'upscale': 2,
            'embed_dim': 16,
            'depths': [1],
            'num_heads': [2],
            'window_size': 8,
            'category_size': 16,
            'num_tokens': 8,
            'reducted_dim': 4,
            'convffn_kernel_size': 5,
        },
        'path': {},
        'train': {
            'total_iter': 16,
            'ema_decay': 0.9,
            'optim_g': {'type': 'AdamW', 'lr': 1e-3},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [6, 12], 'gamma': 0.5},
            'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
        },
        'val': {'val_freq': 8, 'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2}}},
        'logger': {'print_freq': 4, 'save_checkpoint_freq': 4},
    }
    for keys, value in changes.items():
        *sections, last = keys.split('__')
        node = opt
        for section in sections:
            node = node[section]
        node[last] = value
    return opt


def write_options(folder: Path, opt: dict) -> Path:
    """Write options as YAML into the folder that the training is to run in."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / 'options.yml'
    path.write_text(yaml.safe_dump(opt, sort_keys=False))
    return path


class Training(Process):
    """``ppsr train`` in a process of its own, and a group of its own, in `folder`, which holds options.yml.

    Args:
        folder: working directory.
        arguments: after -opt.
        prepare, environment: as of :class:`processes.Process`.
        output: file in `folder` that gets what it prints.
    """

    def __init__(self, folder: Path, *arguments: str, prepare=None, environment=None, output='output.txt'):
        self.output = folder / output
        self.output.write_text('')
        super().__init__(
            ['train', '-opt', 'options.yml', *arguments],
            cwd=folder,
            environment=environment,
            shell=f'> {output} 2>&1',
            group=True,
            prepare=prepare,
        )

    @property
    def text(self) -> str:
        return self.output.read_text() if self.output.exists() else ''

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Return when the output holds `text`, or the process has ended."""
        self.until(lambda: text in self.text, seconds)


def weights(folder: Path, name: str = 'net_g_latest.pth') -> dict[str, torch.Tensor]:
    """Trained parameters and their EMA, flat."""
    content = torch.load(folder / 'experiments' / 'run' / 'models' / name, weights_only=True)
    return {f'{key}.{n}': value for key, state in content.items() for n, value in state.items()}


def assert_same_weights(found: Path, expected: Path, name: str = 'net_g_latest.pth') -> None:
    """Bit for bit."""
    found, expected = weights(found, name), weights(expected, name)
    assert found.keys() == expected.keys()
    different = [n for n in expected if not torch.equal(found[n], expected[n])]
    assert not different, f'{len(different)} of {len(expected)} tensors differ, first {different[0]}'


def torchrun(folder: Path, *arguments: str, processes: int = 2, **popen) -> subprocess.Popen:
    """``torchrun ppsr/train.py`` as a user types it; output.txt gets what it prints."""
    command = [sys.executable, '-m', 'torch.distributed.run', f'--nproc_per_node={processes}', '--master_port']
    command += [str(free_port()), str(REPOSITORY / 'ppsr' / 'train.py'), '-opt', 'options.yml']
    with open(folder / 'output.txt', 'a') as output:
        return subprocess.Popen(
            [*command, '--launcher', 'pytorch', *arguments], cwd=folder, stdout=output, stderr=output, **popen
        )


def free_port() -> int:
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]
