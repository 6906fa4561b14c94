"""How a run starts: one at a time in a folder, nothing moved before all is found good, whatever the options file is."""

import importlib.machinery
import os
import re
import sys
import threading
import time
import types

import pytest
import torch
from basicsr.utils import MessageLogger
from basicsr.utils.registry import ARCH_REGISTRY
from tiny_training import options, write_options, write_pairs

from ppsr.cli import main
from ppsr.errors import UserError
from ppsr.locks import Lock
from ppsr.runtime import threads
from ppsr.training import test
from ppsr.training.folders import RunLog, archive, keep_options, make_fresh
from ppsr.training.options import load_options
from ppsr.training.train import train_pipeline


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    write_pairs(folder, 3)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with threads(1):
        yield tmp_path


def short(data, **changes) -> dict:
    quick = dict(train__total_iter=2, val=None, logger__save_checkpoint_freq=2, logger__print_freq=1)
    return options(data, **quick | changes)


def experiments(folder) -> list[str]:
    return sorted(path.name for path in (folder / 'experiments').iterdir())


def test_second_run_is_refused_before_it_moves_anything(data, here, capfd):
    write_options(here, short(data))
    assert main(['train', '-opt', 'options.yml']) == 0
    before = sorted(here.rglob('*'))
    with Lock(here / 'experiments/.run.lock', 'x'):
        capfd.readouterr()
        for resume in ([], ['--auto_resume']):
            assert main(['train', '-opt', 'options.yml', *resume]) == 2
            assert f'experiment experiments/run is in use by process {os.getpid()}' in capfd.readouterr().err
    assert sorted(here.rglob('*')) == before


def test_second_test_is_refused(data, here, capfd):
    opt = short(data)
    opt |= {'name': 'tested', 'val': {}, 'datasets': {'test': opt['datasets']['val']}}
    write_options(here, opt)
    with Lock(here / 'results/.tested.lock', 'x'):
        assert main(['test', '-opt', 'options.yml']) == 2
    assert 'the folder of results results/tested is in use' in capfd.readouterr().err
    assert main(['test', '-opt', 'options.yml']) == main(['test', '-opt', 'options.yml']) == 0
    names = sorted(path.name.split('_archived_')[0] for path in (here / 'results').iterdir())
    assert names == ['tested', 'tested']  # the first one's results are kept, and no lock


def test_own_options_resume_and_start_anew(data, here, capfd):
    """The natural thing to type: the copy that lies in the experiment."""
    write_options(here, short(data))
    assert main(['train', '-opt', 'options.yml']) == 0
    kept = here / 'experiments/run/options.yml'
    text = kept.read_text()
    assert text.startswith('# GENERATE TIME') and (here / 'options.yml').read_text() in text
    assert main(['train', '-opt', str(kept), '--auto_resume', '--force_yml', 'train:total_iter=4']) == 0
    assert kept.read_text() == text
    assert (here / 'experiments/run/training_states/4.state').is_file()
    assert main(['train', '-opt', str(kept)]) == 0  # the file is archived with its experiment, what it says is kept
    assert (here / 'options.yml').read_text() in kept.read_text()
    assert sorted(name.split('_archived_')[0] for name in experiments(here)) == ['run', 'run']


def test_time_left_is_none_in_the_last_iteration(data, here, monkeypatch):
    class Slow(MessageLogger):
        def reset_start_time(self):
            self.start_time = time.time() - 1000

    monkeypatch.setattr('ppsr.training.train.MessageLogger', Slow)
    write_options(here, short(data))
    assert main(['train', '-opt', 'options.yml']) == 0
    (log,) = (here / 'experiments/run').glob('train_run_*.log')
    left = re.findall(r'eta: (.*?), time', log.read_text())
    assert left and left[-1] == '0:00:00' and '0:00:00' not in left[:-1]


@pytest.mark.parametrize('name', ['models', 'training_states'])
def test_options_file_named_like_a_folder_of_the_experiment(data, here, name):
    (here / 'options.yml').write_text(write_options(here, short(data)).read_text())
    (here / 'options.yml').rename(here / name)
    assert main(['train', '-opt', name]) == 0
    assert (here / name).read_text() in (here / 'experiments/run/options.yml').read_text()


def test_options_from_a_pipe(data, here, capfd):
    """`-opt <(…)` can be read once; and what is wrong in it is told with its own name."""
    text = write_options(here, short(data)).read_text()
    os.mkfifo(here / 'pipe')

    def run(text: str) -> int:
        writer = threading.Thread(target=(here / 'pipe').write_text, args=(text,))
        writer.start()
        code = main(['train', '-opt', 'pipe'])
        writer.join()
        return code

    assert run(text) == 0
    assert text in (here / 'experiments/run/options.yml').read_text()
    assert run('name: [') == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert 'options file pipe' in error and 'tmp' not in error


def broken_weights(opt, here):
    (here / 'weights.pth').write_bytes(b'no weights')
    opt['path']['pretrain_network_g'] = str(here / 'weights.pth')


def too_large_batch(opt, here):
    opt['datasets']['train']['batch_size_per_gpu'] = 100


def unknown_loss(opt, here):
    opt['train']['pixel_opt']['reduction'] = 'nonsense'


def bad_schedule(opt, here):
    opt['train']['scheduler']['milestone'] = [1]


def no_wandb(opt, here):
    opt['logger'] |= {'wandb': {'project': 'p'}, 'use_tb_logger': True}


def no_board_for_wandb(opt, here):
    opt['logger'] |= {'wandb': {'project': 'p'}}


def no_tensorboard(opt, here):
    opt['logger']['use_tb_logger'] = True


def wandb_that_does_not_start(opt, here):
    opt['logger'] |= {'wandb': {'project': 'p'}, 'use_tb_logger': True}


def no_vgg(opt, here):
    opt['train']['perceptual_opt'] = {'type': 'PerceptualLoss', 'layer_weights': {'conv1_1': 1.0}}


def _not_logged_in(**kwargs):
    raise ConnectionError('api_key not configured (no-tty).\nCall wandb.login first')


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (broken_weights, ['weights.pth']),
        (too_large_batch, ['batch']),
        (unknown_loss, ['nonsense']),
        (bad_schedule, ['milestone']),
        (no_wandb, ['wandb', 'not installed']),
        (no_board_for_wandb, ['use_tb_logger: true']),
        (no_tensorboard, ['use_tb_logger', 'not installed']),
        (wandb_that_does_not_start, ['wandb', 'api_key not configured', 'wandb login', 'WANDB_MODE=offline']),
        (no_vgg, ['perceptual_opt', 'no network for', 'neither be read nor downloaded']),
    ],
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_whatever_fails_leaves_the_older_run_where_it_is(data, here, capfd, monkeypatch, change, words):
    for name in ('wandb', 'tensorboard', 'torch.utils.tensorboard'):  # as where they are not installed
        monkeypatch.setitem(sys.modules, name, None)
    for name in {no_wandb: ['tensorboard'], wandb_that_does_not_start: ['tensorboard', 'wandb']}.get(change, ()):
        package = types.ModuleType(name)
        package.__spec__ = importlib.machinery.ModuleSpec(name, None)
        package.util, package.init = types.SimpleNamespace(generate_id=lambda: 'x'), _not_logged_in
        monkeypatch.setitem(sys.modules, name, package)
    original = torch.hub.download_url_to_file

    def offline(url, *args, **kwargs):
        raise OSError(f'no network for {url}') if url.startswith('http') else original(url, *args, **kwargs)

    monkeypatch.setattr(torch.hub, 'download_url_to_file', offline)
    monkeypatch.setenv('TORCH_HOME', str(here / 'empty'))
    older = here / 'experiments/run/models/net_g_latest.pth'
    older.parent.mkdir(parents=True)
    older.write_bytes(b'precious')
    opt = short(data)
    change(opt, here)
    write_options(here, opt)
    assert main(['train', '-opt', 'options.yml']) == 2
    error = capfd.readouterr().err
    last = error[error.index('ppsr: error') :]
    assert last.count('\n') == 1 and 'Traceback' not in error
    assert all(word in last for word in words), last
    assert experiments(here) == ['run'] and older.read_bytes() == b'precious'


class LoadsOnItsOwn(torch.nn.Module):
    """A network of another package that leaves it to torch whether a file may run code."""

    def __init__(self, load_path):
        super().__init__()
        torch.load(load_path)


class Evil:
    def __reduce__(self):
        return os.mkdir, ('executed',)


@pytest.mark.parametrize('pipeline', ['train_pipeline', 'test_pipeline'])
@pytest.mark.parametrize('setting', [None, 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'])
def test_from_python_nothing_is_unpickled_either(data, here, monkeypatch, pipeline, setting):
    """And the variables by which that is done are the user's again afterwards."""
    if setting:
        monkeypatch.setenv(setting, '1')
    if 'LoadsOnItsOwn' not in ARCH_REGISTRY:
        ARCH_REGISTRY.register(LoadsOnItsOwn)
    torch.save(Evil(), here / 'evil.pth')
    is_train = pipeline == 'train_pipeline'
    opt = short(data, network_g={'type': 'LoadsOnItsOwn', 'load_path': 'evil.pth'})
    opt |= {} if is_train else {'val': {}, 'datasets': {'test': opt['datasets']['val']}}
    path = write_options(here, opt)
    environment = dict(os.environ)
    opt = load_options(path, is_train)
    with pytest.raises(UserError, match='Weights only load failed'):
        train_pipeline(opt, path) if is_train else test.test_pipeline(opt)
    assert dict(os.environ) == environment
    assert not (here / 'executed').exists()


def test_archives_of_one_second_have_names_of_their_own(tmp_path):
    names = set()
    for content in 'abc':
        (tmp_path / 'run').mkdir()
        (tmp_path / 'run' / content).touch()
        names.add(archive(tmp_path / 'run'))
    assert {path.name for folder in names for path in folder.iterdir()} == set('abc')
    assert archive(tmp_path / 'run') is None


def test_a_folder_that_cannot_be_filled_leaves_the_older_one(tmp_path):
    (tmp_path / 'run').mkdir()

    def full(folder):
        raise OSError('No space left on device')

    with pytest.raises(OSError, match='No space left'):
        make_fresh(tmp_path / 'run', ['models'], full)
    assert [path.name for path in tmp_path.iterdir()] == ['run']
    archived = make_fresh(tmp_path / 'run', ['models'])
    assert archived.is_dir() and (tmp_path / 'run/models').is_dir()


def test_options_keep_their_name_where_it_is_free(tmp_path):
    keep_options(tmp_path / 'x4.yaml', 'scale: 4\n', tmp_path)
    keep_options('/dev/fd/63', 'scale: 2\n', tmp_path)
    assert (tmp_path / 'x4.yaml').read_text().endswith('scale: 4\n')
    assert (tmp_path / 'options.yml').read_text().endswith('scale: 2\n')


def test_log_holds_what_was_said_before_it_had_a_file(tmp_path):
    """And two runs in one process have a file each (basicsr's logger writes into the first for ever)."""
    for name in ('first', 'second'):
        with RunLog(rank=0) as log:
            log.logger.info(f'{name}: early')
            log.open(tmp_path / name)
            log.logger.info(f'{name}: late')
        assert [line.split('INFO: ')[1] for line in (tmp_path / name).read_text().splitlines()] == [
            f'{name}: early',
            f'{name}: late',
        ]
        log.logger.info('after')
    with RunLog(rank=1) as log:
        log.open(tmp_path / 'third')
    assert not (tmp_path / 'third').exists()
