"""`import ppsr` in somebody else's BasicSR project, and what it does to basicsr."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY

from ppsr import compat

# what a BasicSR project's own train.py does, cut down to building the network from options
PROJECT = """
import sys
import {first}
import {second}
import basicsr
from basicsr.archs import build_network
from basicsr.utils.registry import ARCH_REGISTRY, DATASET_REGISTRY, MODEL_REGISTRY

net = build_network({{'type': 'PPATDLight', 'upscale': 2, 'embed_dim': 16, 'depths': [1], 'num_heads': [2]}})
assert 'PurePassSRModel' in MODEL_REGISTRY and 'PairedSRDataset' in DATASET_REGISTRY
import importlib
import ppsr.archs.atd_light_arch
importlib.reload(ppsr.archs.atd_light_arch)  # a second registration replaces the first
for name in [name for name in sys.modules if name.split('.')[0] == 'ppsr']:
    del sys.modules[name]
import ppsr.archs
assert 'PPATDLight' in ARCH_REGISTRY
print(basicsr.__file__)
"""


def run(code: str, cwd: Path) -> subprocess.CompletedProcess:
    env = {'PYTHONPATH': f'{cwd}:{REPOSITORY}', 'PATH': '/usr/bin:/bin', 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code], cwd=cwd, env=env, capture_output=True, text=True, timeout=300
    )


def test_one_import_in_a_project_with_its_own_basicsr(tmp_path):
    """The project vendors basicsr, mended by its authors: there `import basicsr` works before `import ppsr`."""
    vendored = tmp_path / 'basicsr'
    source = Path(importlib.util.find_spec('basicsr').origin).parent
    shutil.copytree(source, vendored, ignore=shutil.ignore_patterns('__pycache__', '*.so', '*.cu', '*.cpp'))
    degradations = vendored / 'data' / 'degradations.py'
    text = degradations.read_text()
    assert 'functional_tensor' in text
    degradations.write_text(text.replace('functional_tensor', 'functional'))
    result = run(PROJECT.format(first='basicsr', second='ppsr'), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().endswith(str(vendored / '__init__.py'))


UNTOUCHED = """
import torch
threads, grad, dtype = torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype()
{project}
assert (threads, grad, dtype) == (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype())
assert float(torch.tensor([1e-40]) * 1.0) != 0.0, 'denormals are flushed'
"""


def test_one_import_in_a_project_on_pypi_basicsr_touches_neither_threads_nor_denormals(tmp_path):
    result = run(UNTOUCHED.format(project=PROJECT.format(first='ppsr', second='basicsr')), tmp_path)
    assert result.returncode == 0, result.stderr
    assert 'site-packages' in result.stdout


def test_no_folder_of_ours_is_called_basicsr():
    assert not list((REPOSITORY / 'ppsr').rglob('basicsr'))


def test_the_work_arounds_say_what_they_are():
    for item in compat.report():
        assert item.why and item.until
        assert item.worked_around or not item.present
    compat.apply()  # twice is once
    assert len(compat.report()) == len({item.name for item in compat.report()})


def test_the_distutils_stand_in_compares_versions(monkeypatch):
    monkeypatch.setattr(compat, '_missing', lambda module: True)
    for name in ('distutils', 'distutils.version'):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert compat._distutils().worked_around
    from distutils.version import LooseVersion

    assert LooseVersion('0.29.1+cu130') >= LooseVersion('0.9.0')
    assert not LooseVersion('0.4') >= LooseVersion('0.13')
    for name in ('distutils', 'distutils.version'):
        monkeypatch.delitem(sys.modules, name)


def test_a_foreign_class_of_our_name_is_an_error():
    from basicsr.utils.registry import Registry

    from ppsr.registry import register

    registry = Registry('test')
    ours = type('Net', (), {'__module__': 'ppsr.archs.x'})
    theirs = type('Net', (), {'__module__': 'other.archs'})
    register(registry)(theirs)
    with pytest.raises(KeyError, match='already registered by other.archs'):
        register(registry)(ours)
    registry = Registry('test')
    register(registry)(ours)
    again = type('Net', (), {'__module__': 'ppsr.archs.x'})
    assert register(registry)(again) is registry.get('Net')


def test_what_the_package_offers():
    import ppsr
    from ppsr.pictures.upscaler import Upscaler
    from ppsr.weights import load_model

    assert ppsr.Upscaler is Upscaler and ppsr.load_model is load_model
    with pytest.raises(AttributeError, match='no attribute'):
        ppsr.nothing  # noqa: B018
