"""Several processes (gloo, CPU) do together what one does alone, and do not outlive each other."""

import functools
import json
import os
import signal
import subprocess
import time

import pytest
import torch
from tiny_training import (
    Training,
    assert_same_weights,
    free_port,
    options,
    torchrun,
    weights,
    write_options,
    write_pairs,
)

from ppsr.archs import PPATDLight
from ppsr.errors import UserError
from ppsr.training import checkpoints
from ppsr.training.distributed import init_dist
from ppsr.weights import save_checkpoint

FOUR = dict(datasets__train__batch_size_per_gpu=4, datasets__train__dataset_enlarge_ratio=4)
TWO = dict(datasets__train__batch_size_per_gpu=2, datasets__train__dataset_enlarge_ratio=4)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    write_pairs(folder, 7)
    return folder


def pair_of_processes(folder, *arguments, prepare=None) -> list[Training]:
    """Two processes as torchrun would start them, without its start-up time."""
    environment = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    return [
        Training(
            folder,
            '--launcher',
            'pytorch',
            *arguments,
            prepare=prepare,
            environment=environment | {'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            output=f'output{rank}.txt',
        )
        for rank in range(2)
    ]


def wait(processes, code=0):
    codes = [process.wait() for process in processes]
    assert codes == [code] * len(processes), '\n'.join(process.text for process in processes)


def gradient_recorder(folder):
    """Write down the gradients that the first optimizer step sees."""
    step = torch.optim.AdamW.step

    def recording_step(self, *args, **kwargs):
        name = f'{folder}/gradients{os.environ.get("RANK", "")}.pt'
        if not os.path.exists(name):
            torch.save([p.grad.clone() for group in self.param_groups for p in group['params']], name)
        return step(self, *args, **kwargs)

    torch.optim.AdamW.step = recording_step


def _same_flat_pictures():
    """Every process gets what the first one does."""
    from ppsr.models import pure_pass_sr_model as model

    pictures = model.flat_pictures
    model.flat_pictures = lambda options, seed, iteration, rank: pictures(options, seed, iteration)


def _record_with_the_same_flat_pictures(folder):
    _same_flat_pictures()
    gradient_recorder(folder)


@pytest.mark.parametrize('unused', [False, True])
def test_losses_beside_the_batch_are_averaged_once(data, tmp_path, unused):
    """Where all processes see the same one-colour pictures, their gradient is that of one process."""
    flat = dict(train__flat_opt={'sides': [8, 8], 'pixels': 256}, train__total_iter=1, logger__save_checkpoint_freq=4)
    for name, batch in (('one', FOUR), ('two', TWO)):
        opt = options(data, **batch, **flat, val=None) | {'find_unused_parameters': unused}
        write_options(tmp_path / name, opt)
    record = [functools.partial(_record_with_the_same_flat_pictures, str(tmp_path / name)) for name in ('one', 'two')]
    wait([Training(tmp_path / 'one', prepare=record[0]), *pair_of_processes(tmp_path / 'two', prepare=record[1])])
    expected = torch.load(tmp_path / 'one/gradients.pt')
    for rank in range(2):
        for f, e in zip(torch.load(tmp_path / f'two/gradients{rank}.pt'), expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-6 * float(e.abs().max()) + 1e-9)


def test_processes_that_draw_differently_train_the_same_weights(data, tmp_path):
    opt = options(data, train__total_iter=6, logger__save_checkpoint_freq=6, val=None)
    opt['network_g'] |= {'pp_mask': 'both', 'pp_scope': ['category', 'window']}
    opt['train'] |= {'pp_probability': 0.6, 'pp_paper_probability': 0.3, 'pp_threshold_range': [0.05, 0.5]}
    for name in ('a', 'b'):  # twice the same
        write_options(tmp_path / name, opt)
        wait(pair_of_processes(tmp_path / name))
    assert_same_weights(tmp_path / 'a', tmp_path / 'b')


def best(folder) -> dict:
    state = checkpoints.read_state(folder / 'experiments/run/training_states/4.state')
    return state['best_metric_results']['val']


def test_two_processes_equal_one(data, tmp_path):
    """2 × batch 2 against 1 × batch 4: gradients, validation means over an odd number of images, weights."""
    short = dict(train__total_iter=4, val__val_freq=2, logger__save_checkpoint_freq=4)
    (tmp_path / 'one').mkdir()
    (tmp_path / 'two').mkdir()
    write_options(tmp_path / 'one', options(data, **FOUR, **short))
    write_options(tmp_path / 'two', options(data, **TWO, **short))
    record = [functools.partial(gradient_recorder, str(tmp_path / name)) for name in ('one', 'two')]
    alone = Training(tmp_path / 'one', prepare=record[0])
    wait([alone, *pair_of_processes(tmp_path / 'two', prepare=record[1])])

    expected = torch.load(tmp_path / 'one/gradients.pt')
    for rank in range(2):
        found = torch.load(tmp_path / f'two/gradients{rank}.pt')
        assert len(found) == len(expected)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-6 * float(e.abs().max()) + 1e-9)
    # after a few optimizer steps rounding has grown, but the pictures are the same to the eye of any metric
    one, two = best(tmp_path / 'one'), best(tmp_path / 'two')
    assert one.keys() == two.keys() == {'psnr', 'pure_percent', 'gmacs', 'gmacs_saved_percent'}
    for name in one:
        assert two[name]['val'] == pytest.approx(one[name]['val'], rel=1e-3), name


def test_validation_is_split_and_its_means_are_the_same(data, tmp_path):
    """From the same weights, so exactly comparable; 7 images over 2 processes."""
    folders = [tmp_path / name for name in ('one', 'two')]
    for folder, batch in zip(folders, (FOUR, TWO)):
        still = dict(train__optim_g__lr=0.0, train__total_iter=1, val__val_freq=1, logger__save_checkpoint_freq=1)
        write_options(folder, options(data, **batch, **still))
    alone = Training(folders[0])
    pair = pair_of_processes(folders[1])
    wait([alone, *pair])
    assert_same_weights(folders[1], folders[0])
    lines = [[line for line in p.text.splitlines() if line.startswith('\t # ')] for p in (alone, pair[0])]
    assert len(lines[0]) == 4
    assert lines[0] == lines[1]
    assert 'psnr' not in pair[1].text  # the second process says nothing


def test_stopped_and_resumed_bit_for_bit(data, tmp_path):
    """SIGTERM reaches only one process; both stop after the same iteration, and go on as if nothing had been.

    With a teacher, whose answers each process has made a part of, and its features."""
    folders = [tmp_path / name for name in ('through', 'stopped')]
    opt = options(data, **TWO, train__total_iter=8)
    net = PPATDLight(**{name: value for name, value in opt['network_g'].items() if name != 'type'})
    save_checkpoint(tmp_path / 'teacher.safetensors', net.state_dict(), opt['network_g'])
    opt['train']['teacher'] = {'weights': str(tmp_path / 'teacher.safetensors'), 'features': True, 'cache': 'answers'}
    for folder in folders:
        write_options(folder, opt)
    wait(pair_of_processes(folders[0]))
    processes = pair_of_processes(folders[1], prepare=_second_process_is_told_to_stop)
    wait(processes, 128 + signal.SIGTERM)
    assert 'after iteration 3' in processes[0].text
    wait(pair_of_processes(folders[1], '--auto_resume'))
    assert_same_weights(folders[1], folders[0])
    assert len(list(folders[0].glob('answers/teacher_*/*.npy'))) == 7


def _second_process_is_told_to_stop():
    from ppsr.models import PurePassSRModel

    original = PurePassSRModel.optimize_parameters

    def step(self, iteration):
        if os.environ['RANK'] == '1' and iteration == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, iteration)

    PurePassSRModel.optimize_parameters = step


def _first_process_gets_pure_patches():
    """Every pixel of the first process's batches is pure, none of the second's."""
    from ppsr.archs.atd_light_arch import PPATDLight

    pure = os.environ['RANK'] == '0'
    PPATDLight.pure_mask = lambda self, lq: torch.full((lq.shape[0], *lq.shape[2:]), pure)


@pytest.mark.parametrize(
    'compensation, scope',
    [*((c, ['category']) for c in ('value', 'bypass', 'zero')), ('value', ['category', 'window'])],
    ids=['value', 'bypass', 'zero', 'window'],
)
def test_all_pure_on_one_process_only(data, tmp_path, compensation, scope):
    """No parameter may go without a gradient: DistributedDataParallel would wait for it or fail."""
    changes = dict(train__total_iter=3, network_g__pp_compensation=compensation, network_g__pp_scope=scope, val=None)
    write_options(tmp_path, options(data, **TWO, **changes))
    wait(pair_of_processes(tmp_path, prepare=_first_process_gets_pure_patches))
    assert all(value.isfinite().all() for value in weights(tmp_path).values())


def _nan_in_the_second_process():
    from ppsr.models import PurePassSRModel

    original = PurePassSRModel._losses

    def losses(self):
        scale = float('nan') if os.environ['RANK'] == '1' else 1.0
        return {name: loss * scale for name, loss in original(self).items()}

    PurePassSRModel._losses = losses


def test_nan_in_one_process_skips_the_step_in_all(data, tmp_path):
    write_options(tmp_path, options(data, **TWO, train__total_iter=6, train__max_nonfinite=2))
    processes = pair_of_processes(tmp_path, prepare=_nan_in_the_second_process)
    wait(processes, 2)
    assert 'was not finite 2 times' in processes[0].text
    lines = (tmp_path / 'experiments/run/nonfinite.jsonl').read_text().splitlines()
    noted = [json.loads(line) for line in lines]
    assert [n['iter'] for n in noted] == [1, 2]
    losses = [process['losses']['l_pix'] for process in noted[0]['processes']]
    assert losses[0] != 'nan' and losses[1] == 'nan'
    assert len(noted[0]['processes'][1]['lq_path']) == 2


def _first_process_fails(where):
    """With an error that nobody has foreseen."""
    if os.environ['RANK'] != '0':
        return
    from ppsr.models import PurePassSRModel

    owner, name = {
        'checkpoint': (PurePassSRModel, '_write_checkpoint'),
        'validation': (PurePassSRModel, '_as_images'),
    }[where]

    def fail(*args, **kwargs):
        raise ZeroDivisionError('of the first process alone')

    setattr(owner, name, fail)


@pytest.mark.parametrize('where', ['checkpoint', 'validation'])
def test_whatever_fails_in_the_first_process_ends_all(data, tmp_path, where):
    """The others wait for nothing, and say what happened; the first one's traceback is for whoever mends it."""
    write_options(tmp_path, options(data, **TWO, train__total_iter=4, val__val_freq=2))
    first, second = pair_of_processes(tmp_path, prepare=functools.partial(_first_process_fails, where))
    assert (first.wait(60), second.wait(60)) == (1, 2), first.text + second.text
    assert 'ZeroDivisionError: of the first process alone' in first.text
    error = [line for line in second.text.splitlines() if line.startswith('ppsr: error')]
    assert error == ['ppsr: error: process 0 failed (ZeroDivisionError: of the first process alone).']
    assert 'Traceback' not in second.text


# ---------------------------------------------------------------------------------------------------- torchrun, really


def test_torchrun_trains_and_ends_when_a_process_dies(data, tmp_path):
    """The command of the documentation: it trains, validates and saves; one process is killed: all end in a minute."""
    write_options(tmp_path, options(data, **TWO, train__total_iter=1_000_000))
    run = torchrun(tmp_path, env=os.environ | {'OMP_NUM_THREADS': '1'})
    end = time.monotonic() + 120
    while not (victims := _children(run.pid)) or 'iter:      16' not in (tmp_path / 'output.txt').read_text():
        assert time.monotonic() < end and run.poll() is None, (tmp_path / 'output.txt').read_text()
        time.sleep(0.1)
    assert (tmp_path / 'experiments/run/training_states/12.state').is_file()
    os.kill(victims[1], signal.SIGKILL)
    killed_at = time.monotonic()
    assert run.wait(60) != 0
    while any(os.path.exists(f'/proc/{pid}') for pid in victims):
        assert time.monotonic() - killed_at < 60
        time.sleep(0.1)


def _children(pid: int) -> list[int]:
    with open(f'/proc/{pid}/task/{pid}/children') as file:
        return [int(child) for child in file.read().split()]


# --------------------------------------------------------------------------------------------------- launchers' errors


def test_torchrun_needs_no_launcher_option(monkeypatch):
    for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('TORCHELASTIC_RUN_ID', 'none')
    monkeypatch.setenv('WORLD_SIZE', '1')
    init_dist({'num_gpu': 0}, 'none')  # alone: nothing to join
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(UserError, match='--launcher pytorch: RANK'):
        init_dist({'num_gpu': 0}, 'none')


def test_launcher_without_its_environment_is_a_user_error(monkeypatch):
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'SLURM_PROCID', 'SLURM_NTASKS'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match='start with torchrun'):
        init_dist({'num_gpu': 0}, 'pytorch')
    with pytest.raises(UserError, match='start with srun'):
        init_dist({'num_gpu': 0}, 'slurm')


def test_slurm_names_the_first_node(monkeypatch):
    """SLURM's variables become torchrun's; the first host of the job is the meeting point."""
    for name in ('RANK', 'WORLD_SIZE', 'MASTER_ADDR', 'MASTER_PORT', 'LOCAL_RANK'):
        monkeypatch.delenv(name, raising=False)
    slurm = {'SLURM_NTASKS': '4', 'SLURM_PROCID': '3', 'SLURM_LOCALID': '1', 'SLURM_NODELIST': 'node[7-8]'}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    hosts = subprocess.CompletedProcess([], 0, stdout='node7\nnode8\n')
    monkeypatch.setattr(subprocess, 'run', lambda command, **_: hosts)
    joined = []
    monkeypatch.setattr(torch.distributed, 'init_process_group', lambda **kwargs: joined.append(kwargs))
    monkeypatch.setattr(torch.distributed, 'get_rank', lambda: int(os.environ['RANK']))
    monkeypatch.setattr(torch.distributed, 'get_world_size', lambda: int(os.environ['WORLD_SIZE']))
    opt = {'num_gpu': 0}
    init_dist(opt, 'slurm')
    assert joined == [{'backend': 'gloo'}]
    assert opt == {'num_gpu': 0, 'dist': True, 'rank': 3, 'world_size': 4}
    assert (os.environ['MASTER_ADDR'], os.environ['LOCAL_RANK']) == ('node7', '1')
