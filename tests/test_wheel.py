"""A wheel, installed where no clone is: weights and options files come with it, and the commands work in any folder."""

import os
import shutil
import subprocess
import sys
import zipfile

import cv2
import numpy as np
import pytest
from support import REPOSITORY

from ppsr.shipped import options_file
from ppsr.version import __version__
from ppsr.weights import DEFAULT_MODEL

# one process for all: each start takes seconds
COMMANDS = """
from ppsr_command import main
assert main(['doctor']) == 0
assert main(['upscale', '-i', 'p.png', '-o', 'out.png']) == 0
assert main(['complexity', '-opt', 'options/test/camixer_atd_light_x3.yml']) == 0

# what the demo does, with fewer steps and pictures
from ppsr.data import demo
demo.VAL = {'coffee.png': (0, 0, 64, 64)}
demo.make_demo_data('datasets')
short = ['train:total_iter=1', 'datasets:train:num_worker_per_gpu=0', 'num_gpu=0', 'val:val_freq=1']
assert main(['train', '-opt', 'options/demo.yml', '--force_yml', *short]) == 0
"""


def call(*command, cwd, **environment) -> str:
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', *map(str, command)],
        cwd=cwd,
        env=os.environ | {'OMP_NUM_THREADS': '1', **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """Built from the files that git knows, as they are now: nothing that lies about in the clone helps. Without a
    compiler, which saves most of a minute, and is a way to install that has to work as well."""
    folder = tmp_path_factory.mktemp('wheel')
    listed = subprocess.run(['git', 'ls-files', '-co', '--exclude-standard'], cwd=REPOSITORY, capture_output=True)
    if listed.returncode:
        pytest.skip('not a clone: which files belong to the package is not known here')
    for name in listed.stdout.decode().splitlines():
        source, target = REPOSITORY / name, folder / 'source' / name
        if source.is_file() and name.split('/')[0] not in ('tests', 'docs', 'benchmarks'):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target)
    build = ('-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '--no-index', '-w', folder, '.')
    call(*build, cwd=folder / 'source', CC='false')
    (found,) = folder.glob('*.whl')
    shutil.rmtree(folder / 'source')
    return found


@pytest.mark.slow
def test_a_wheel_has_all_that_the_commands_need(wheel, tmp_path):
    names = zipfile.ZipFile(wheel).namelist()
    assert (
        f'ppsr/pretrained_models/{DEFAULT_MODEL}.safetensors' in names and 'ppsr/options/test/atd_light_x2.yml' in names
    )
    site, elsewhere = tmp_path / 'site', tmp_path / 'elsewhere'
    elsewhere.mkdir()
    # beside the packages of this environment, before its own ppsr
    call('-m', 'pip', 'install', '-q', '--no-deps', '--no-index', '--target', site, wheel, cwd=elsewhere)

    assert (
        call(site / 'bin' / 'ppsr', '--version', cwd=elsewhere, PYTHONPATH=str(site)).strip() == f'ppsr {__version__}'
    )
    cv2.imwrite(str(elsewhere / 'p.png'), np.random.default_rng(0).integers(0, 256, (17, 20, 3), np.uint8))
    said = call('-c', COMMANDS, cwd=elsewhere, PYTHONPATH=str(site))
    assert f'{DEFAULT_MODEL}  {site / "ppsr" / "pretrained_models"}' in said and 'total' in said
    assert cv2.imread(str(elsewhere / 'out.png')).shape == (68, 80, 3)
    trained = elsewhere / 'experiments' / 'demo'
    assert (trained / 'models' / 'net_g_latest.pth').is_file() and 'psnr' in next(trained.glob('*.log')).read_text()
    assert not (site / 'experiments').exists()


def test_options_are_the_shipped_ones_only_where_there_are_no_others(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert options_file('options/demo.yml') == str(REPOSITORY / 'options' / 'demo.yml')
    for other in ('demo.yml', './demo.yml', 'options/none.yml', 'options/../options/demo.yml', 'options', '', 'a\0b'):
        assert options_file(other) == other
    (tmp_path / 'options').mkdir()
    (tmp_path / 'options' / 'demo.yml').touch()
    assert options_file('options/demo.yml') == 'options/demo.yml'
