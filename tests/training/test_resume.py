"""Trainings that are killed, stopped and resumed, for real: in processes of their own."""

import errno
import functools
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import time

import pytest
import torch
from tiny_training import Training, assert_same_weights, options, write_options, write_pairs

from ppsr.archs import PPATDLight
from ppsr.errors import UserError
from ppsr.training import checkpoints
from ppsr.training.stopping import StopSignals
from ppsr.weights import save_checkpoint


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    write_pairs(folder, 5)
    return folder


@pytest.fixture(scope='module')
def uninterrupted(data, tmp_path_factory):
    """A training of 16 iterations, 7 in an epoch, that nothing happens to."""
    folder = tmp_path_factory.mktemp('uninterrupted')
    write_options(folder, options(data))
    training = Training(folder)
    assert training.wait() == 0, training.text
    return folder


def states(folder) -> list[int]:
    return sorted(int(path.stem) for path in (folder / 'experiments/run/training_states').glob('[0-9]*.state'))


def last_state(folder) -> dict:
    return checkpoints.read_state(folder / 'experiments/run/training_states' / f'{states(folder)[-1]}.state')


def assert_equal(found, expected, where='state'):
    """Nested dictionaries, lists and tensors, bit for bit."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_equal(found[key], expected[key], f'{where}.{key}')
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, (f, e) in enumerate(zip(found, expected)):
            assert_equal(f, e, f'{where}[{i}]')
    else:
        assert found == expected, where


def assert_like_uninterrupted(folder, uninterrupted):
    assert_same_weights(folder, uninterrupted)
    assert_equal(last_state(folder), last_state(uninterrupted))  # moments, schedule, best metrics, random states, …


# what happens to a process; runs inside it


def die_in_checkpoint(number):
    """SIGKILL while checkpoint file `number` is on the disk under its temporary name only."""
    _at_call(os, 'replace', number, signal.SIGKILL, lambda source, target: str(target).endswith(('.pth', '.state')))


def signal_in_validation(number):
    """SIGTERM while the network runs on validation image `number`."""
    from ppsr.models import PurePassSRModel

    _at_call(PurePassSRModel, 'test', number, signal.SIGTERM)


def signal_in_iteration(number, signal_number):
    from ppsr.models import PurePassSRModel

    _at_call(PurePassSRModel, 'optimize_parameters', number, signal_number)


def hang_up_in_iteration(number):
    """SIGHUP, as from a terminal that is closed; not as under nohup, which these tests may run under."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal_in_iteration(number, signal.SIGHUP)


def kill_a_worker(number):
    """SIGKILL to the loader worker that reads its sample `number`, as a system does that is short of memory."""
    from ppsr.data.paired_sr_dataset import PairedSRDataset

    in_worker = lambda *args: torch.utils.data.get_worker_info() is not None  # noqa: E731
    _at_call(PairedSRDataset, '__getitem__', number, signal.SIGKILL, in_worker)


def _at_call(owner, name, number, signal_number, counts=lambda *args: True):
    original, calls = getattr(owner, name), iter(range(1, number + 1))

    def signalling(*args):
        if counts(*args) and next(calls, None) == number:
            os.kill(os.getpid(), signal_number)
        return original(*args)

    setattr(owner, name, signalling)


def limit_file_size(size):
    """Every write beyond `size` bytes of a file fails, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


# ------------------------------------------------------------------------------------------------- killed and resumed


@pytest.mark.parametrize('workers', [0, 2])
def test_killed_at_random_moments_ends_bit_for_bit_equal(data, uninterrupted, tmp_path, workers):
    rng = random.Random(workers)
    write_options(tmp_path, options(data, datasets__train__num_worker_per_gpu=workers))
    training = Training(tmp_path)
    training.wait_for('Saving models')
    time.sleep(rng.uniform(0, 0.6))  # anywhere: in an iteration, a validation, a checkpoint
    training.signal_group(signal.SIGKILL)
    training.wait()
    assert states(tmp_path) != [] or training.exitcode == -signal.SIGKILL
    # … and in the middle of a checkpoint: once before the model has its name, once before the state has it
    for number in (1, 2):
        before = states(tmp_path)
        training = Training(tmp_path, '--auto_resume', prepare=functools.partial(die_in_checkpoint, number))
        code = training.wait()
        assert code == -signal.SIGKILL or (code, number) == (0, 2), training.text  # 0: one file was left to write
        assert set(before) <= set(states(tmp_path))
        for state in states(tmp_path):  # what is there is whole
            checkpoints.read_state(tmp_path / f'experiments/run/training_states/{state}.state')
    training = Training(tmp_path, '--auto_resume')
    assert training.wait() == 0, training.text
    assert 'Resuming from' in training.text
    assert not list(tmp_path.rglob('*.part*'))  # what the killed ones left is gone
    assert_like_uninterrupted(tmp_path, uninterrupted)


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='this torch has no Muon')
def test_everything_that_is_drawn_goes_on_bit_for_bit(data, tmp_path):
    """Stopped after iteration 5, in the middle of an epoch and between two steps of the rate."""
    muon = {'type': 'Muon', 'lr': 1e-3, 'adamw': {'lr': 5e-4, 'betas': [0.9, 0.95]}}
    opt = options(data, train__optim_g=muon, train__total_iter=10, datasets__train__synthetic_graphics=0.5)
    opt['train']['flat_opt'] = {'sides': [8, 16], 'pixels': 256}
    opt['network_g'] |= {'pp_mask': 'variance', 'pp_scope': ['category', 'window']}
    opt['train'] |= {'pp_probability': 0.7, 'pp_paper_probability': 0.3, 'pp_threshold_range': [0.05, 0.5]}
    network = opt['network_g']
    net = PPATDLight(**{name: value for name, value in network.items() if name != 'type'})
    save_checkpoint(tmp_path / 'teacher.safetensors', net.state_dict(), network)
    opt['train']['teacher'] = {'weights': str(tmp_path / 'teacher.safetensors'), 'features': True, 'cache': 'cache'}
    folders = tmp_path / 'whole', tmp_path / 'stopped'
    for folder in folders:
        write_options(folder, opt)
    assert Training(folders[0]).wait() == 0
    stopped = Training(folders[1], prepare=functools.partial(signal_in_iteration, 5, signal.SIGTERM))
    assert stopped.wait() == 128 + signal.SIGTERM, stopped.text
    assert states(folders[1]) == [4, 5]
    training = Training(folders[1], '--auto_resume')
    assert training.wait() == 0, training.text
    assert_like_uninterrupted(*folders[::-1])


def test_falls_back_to_the_state_before_and_says_so(data, uninterrupted, tmp_path):
    """The newest state is cut short, the model of the one before is missing: iteration 8 it is."""
    write_options(tmp_path, options(data, train__total_iter=16, logger__save_checkpoint_freq=4))
    training = Training(tmp_path)
    assert training.wait() == 0
    folder = tmp_path / 'experiments/run'
    newest = folder / 'training_states/16.state'
    newest.write_bytes(newest.read_bytes()[:1000])
    (folder / 'models/net_g_12.pth').unlink()
    (folder / 'models/net_g_latest.pth').unlink()
    training = Training(tmp_path, '--auto_resume')
    assert training.wait() == 0, training.text
    assert training.text.count('Passed over') == 2
    assert 'iteration 8.' in training.text
    assert_like_uninterrupted(tmp_path, uninterrupted)


# ------------------------------------------------------------------------------------------------------------ stopped


@pytest.mark.parametrize(
    ('happening', 'code', 'stopped_at'),
    [
        (functools.partial(signal_in_iteration, 5, signal.SIGTERM), 128 + signal.SIGTERM, 5),
        (functools.partial(signal_in_iteration, 10, signal.SIGINT), 128 + signal.SIGINT, 10),
        (functools.partial(hang_up_in_iteration, 7), 128 + signal.SIGHUP, 7),
        (functools.partial(signal_in_validation, 3), 128 + signal.SIGTERM, 8),
    ],
    ids=['SIGTERM', 'Ctrl-C', 'SIGHUP', 'SIGTERM in a validation'],
)
def test_signal_saves_a_checkpoint_and_exits_cleanly(data, uninterrupted, tmp_path, happening, code, stopped_at):
    write_options(tmp_path, options(data))
    training = Training(tmp_path, prepare=happening)
    assert training.wait() == code, training.text
    assert states(tmp_path)[-1] == stopped_at
    assert 'a checkpoint is saved; go on with --auto_resume' in training.text
    assert 'Traceback' not in training.text
    training = Training(tmp_path, '--auto_resume')
    assert training.wait() == 0, training.text
    assert_like_uninterrupted(tmp_path, uninterrupted)


def test_signal_to_the_whole_process_group_with_workers(data, uninterrupted, tmp_path):
    """Loader workers get the signal, too, and must not take the training down."""
    write_options(tmp_path, options(data, datasets__train__num_worker_per_gpu=2))
    training = Training(tmp_path)
    training.wait_for('iter:       4')
    training.signal_group(signal.SIGTERM)
    assert training.wait() == 128 + signal.SIGTERM, training.text
    assert 'Traceback' not in training.text
    training = Training(tmp_path, '--auto_resume')
    assert training.wait() == 0, training.text
    assert_like_uninterrupted(tmp_path, uninterrupted)


def test_killed_worker_saves_a_checkpoint_and_is_one_sentence(data, uninterrupted, tmp_path):
    """The worker dies in the fourth batch, which is asked of it when the second has arrived."""
    write_options(tmp_path, options(data, datasets__train__num_worker_per_gpu=1, logger__save_checkpoint_freq=1000))
    training = Training(tmp_path, prepare=functools.partial(kill_a_worker, 8))
    assert training.wait() == 2, training.text
    error = training.text[training.text.index('ppsr: error') :]
    assert error.count('\n') == 1 and 'data set train: a loader worker was killed' in error
    assert 'Traceback' not in training.text
    (stopped_at,) = states(tmp_path)
    assert stopped_at in (1, 2, 3)
    assert f'A checkpoint of iteration {stopped_at} is saved; go on with --auto_resume.' in training.text
    training = Training(tmp_path, '--auto_resume')
    assert training.wait() == 0, training.text
    assert_same_weights(tmp_path, uninterrupted)


@pytest.mark.skipif(not hasattr(signal, 'SIGHUP'), reason='no SIGHUP on this system')
def test_a_terminal_that_closes_is_a_wish_to_stop_unless_nohup_says_otherwise():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with StopSignals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_second_ctrl_c_ends_at_once_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    with StopSignals(several_processes=True) as signals:  # torchrun repeats it
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert signals.received == signal.SIGINT
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# -------------------------------------------------------------------------------------------------------- a full disk


def test_full_disk_stops_with_a_sentence_and_old_checkpoints_whole(data, tmp_path):
    path = write_options(tmp_path, options(data, train__total_iter=8, logger__keep_last=1))
    assert Training(tmp_path).wait() == 0
    folder = tmp_path / 'experiments/run'
    files = [folder / 'models/net_g_8.pth', folder / 'training_states/8.state']
    before = [file.read_bytes() for file in files]
    path.write_text(path.read_text().replace('total_iter: 8', 'total_iter: 16'))
    training = Training(tmp_path, '--auto_resume', prepare=functools.partial(limit_file_size, 50_000))
    assert training.wait() == 2, training.text
    error = training.text[training.text.index('ppsr: error') :]
    assert 'net_g_12.pth cannot be written (File too large)' in error
    assert error.count('\n') == 1
    assert 'Traceback' not in training.text
    assert [file.read_bytes() for file in files] == before
    assert not list(folder.rglob('*.part*'))
    assert states(tmp_path) == [8]


def test_really_full_disk(data, tmp_path):
    """On a file system of 400 KiB, which only root can make."""
    (tmp_path / 'experiments').mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=400k', 'tmpfs', str(tmp_path / 'experiments')]
    if shutil.which('mount') is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip('no file system of its own can be mounted here')
    try:
        write_options(tmp_path, options(data, logger__save_checkpoint_freq=2, val=None))
        training = Training(tmp_path)
        assert training.wait() == 2, training.text
        assert 'net_g_4.pth cannot be written (No space left on device)' in training.text
        assert 'Traceback' not in training.text
        assert states(tmp_path) == [2]
        assert not list(tmp_path.rglob('*.part*'))
    finally:
        subprocess.run(['umount', '-l', mount[-1]], check=True)


def test_write_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / '1.state'
    checkpoints.write(path, {'old': torch.ones(3)})

    def full(handle):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(UserError, match='No space left on device'):
        checkpoints.write(path, {'new': torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ['1.state']
    assert torch.load(path, weights_only=True)['old'].sum() == 3


# ------------------------------------------------------------------------------------------- states: finding, refusing


class Evil:
    def __reduce__(self):
        return os.system, ('touch executed',)


def checkpoint(folder, iteration, **more):
    (folder / 'models').mkdir(parents=True, exist_ok=True)
    (folder / 'training_states').mkdir(exist_ok=True)
    checkpoints.write(folder / f'models/net_g_{iteration}.pth', {'params': {'w': torch.ones(1)}})
    state = {'epoch': 0, 'iter': iteration, 'optimizers': [], 'schedulers': [], **more}
    checkpoints.write(folder / f'training_states/{iteration}.state', state)


def find(folder, newest=True, named=None):
    return checkpoints.find_state(folder / 'training_states', newest, named, ['g'])


def test_newest_is_found_by_number(tmp_path):
    for iteration in (5, 20, 100):
        checkpoint(tmp_path, iteration)
    (tmp_path / 'training_states/.200.x.part.state').write_bytes(b'')
    (tmp_path / 'training_states/best.state').write_bytes(b'')
    path, state, passed_over = find(tmp_path)
    assert (path.name, state['iter'], passed_over) == ('100.state', 100, [])
    path, _, _ = find(tmp_path, newest=False, named=str(tmp_path / 'training_states/20.state'))
    assert path.name == '20.state'
    assert find(tmp_path, newest=False) is None
    assert find(tmp_path / 'elsewhere') is None


def test_states_with_code_in_them_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path, 5)
    checkpoint(tmp_path, 6)
    newest = tmp_path / 'training_states/6.state'
    for evil in (pickle.dumps(Evil()), b'', b'PK\x03\x04', newest.read_bytes()[:-50]):
        newest.write_bytes(evil)
        path, _, passed_over = find(tmp_path)
        assert path.name == '5.state'
        assert len(passed_over) == 1 and '6.state cannot be read' in passed_over[0]
        with pytest.raises(UserError, match='6.state cannot be read'):
            checkpoints.read_state(newest)
    torch.save({'iter': 6, 'epoch': 0, 'optimizers': [Evil()], 'schedulers': []}, newest)
    assert find(tmp_path)[0].name == '5.state'
    assert not (tmp_path / 'executed').exists()


def test_no_usable_state_is_an_error_not_a_fresh_start(tmp_path):
    checkpoint(tmp_path, 5)
    (tmp_path / 'models/net_g_5.pth').unlink()
    with pytest.raises(UserError, match='no checkpoint in .* is usable.*no such weight file'):
        find(tmp_path)
    with pytest.raises(UserError, match='does not exist'):
        find(tmp_path, newest=False, named=str(tmp_path / 'training_states/7.state'))


@pytest.mark.parametrize('content', [{'iter': 1}, [1], {'epoch': 0, 'iter': -1, 'optimizers': [], 'schedulers': []}])
def test_what_is_not_a_training_state_is_refused(tmp_path, content):
    torch.save(content, tmp_path / '1.state')
    with pytest.raises(UserError, match='is not a training state'):
        checkpoints.read_state(tmp_path / '1.state')


def test_prune_keeps_the_last_and_the_best(tmp_path):
    for iteration in (1, 2, 3, 10, 20):
        checkpoint(tmp_path, iteration)
    (tmp_path / 'models/net_g_latest.pth').write_bytes(b'')
    checkpoints.prune(tmp_path / 'models', tmp_path / 'training_states', keep_last=2, keep={2})
    assert sorted(p.name for p in (tmp_path / 'training_states').iterdir()) == ['10.state', '20.state']
    models = sorted(p.name for p in (tmp_path / 'models').iterdir())
    assert models == ['net_g_10.pth', 'net_g_2.pth', 'net_g_20.pth', 'net_g_latest.pth']


def test_random_state_survives_a_file(tmp_path):
    random.random(), torch.rand(1)
    checkpoints.write(tmp_path / 'state', checkpoints.random_state())
    expected = [random.random(), float(torch.rand(1)), float(__import__('numpy').random.rand())]
    checkpoints.restore_random_state(torch.load(tmp_path / 'state', weights_only=True))
    assert [random.random(), float(torch.rand(1)), float(__import__('numpy').random.rand())] == expected
