"""What a training step does with numbers: NaN, clipping, reduced precision; and the data that it is given."""

import json
import math

import pytest
import torch
from basicsr.models import build_model
from tiny_training import options, write_options, write_pairs
from torch.utils.data import Dataset

from ppsr.errors import UserError
from ppsr.training.loader import TrainBatches
from ppsr.training.options import load_options
from ppsr.weights import load_model


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Networks this small gain nothing from threads, and lose much where the machine is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    write_pairs(folder, 4)
    return folder


@pytest.fixture
def make_model(data, tmp_path):
    """Build the model of a training run with some options changed."""

    def make(**changes):
        torch.manual_seed(0)
        opt = load_options(write_options(tmp_path, options(data, **changes)), is_train=True, root=tmp_path)
        (tmp_path / 'experiments/run').mkdir(parents=True, exist_ok=True)
        return build_model(opt)

    return make


def batch(seed: int = 0, size: int = 16) -> dict:
    g = torch.Generator().manual_seed(seed)
    gt = torch.rand(2, 3, size // 2, size // 2, generator=g).repeat_interleave(4, -1).repeat_interleave(4, -2)
    lq = torch.nn.functional.avg_pool2d(gt, 2)
    return {'lq': lq, 'gt': gt, 'lq_path': ['a.png', 'b.png']}


def step(model, iteration=1, data=None):
    model.feed_data(data or batch())
    model.optimize_parameters(iteration)


def parameters(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.net_g.parameters()])


# --------------------------------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize('bad', [math.nan, math.inf])
def test_step_is_skipped_and_the_batch_written_down(make_model, tmp_path, bad):
    model = make_model()
    step(model)
    before, ema = parameters(model), torch.cat([p.flatten() for p in model.net_g_ema.parameters()])
    moments = model.optimizer_g.state_dict()['state'][0]['step'].clone()
    broken = batch()
    broken['gt'][0, 0, 0, 0] = bad
    step(model, 2, broken)
    assert torch.equal(parameters(model), before)
    assert torch.equal(torch.cat([p.flatten() for p in model.net_g_ema.parameters()]), ema)
    assert model.optimizer_g.state_dict()['state'][0]['step'] == moments
    (line,) = (tmp_path / 'experiments/run/nonfinite.jsonl').read_text().splitlines()
    noted = json.loads(line)
    assert noted == {'iter': 2, 'processes': [{'losses': {'l_pix': str(bad)}, 'lq_path': ['a.png', 'b.png']}]}
    step(model, 3)  # and on it goes
    assert not torch.equal(parameters(model), before)


def test_gradient_that_is_not_finite_is_caught_too(make_model):
    """The loss is fine, its derivative is not: sqrt at 0."""
    model = make_model()
    before = parameters(model)
    model.cri_pix = lambda output, gt: (output - output.detach()).abs().sum().sqrt()
    step(model)
    assert model.log_dict['l_pix'] == 0
    assert torch.equal(parameters(model), before)
    assert model.nonfinite == 1


def test_training_stops_after_max_nonfinite(make_model):
    model = make_model(train__max_nonfinite=3)
    broken = batch()
    broken['gt'].fill_(math.nan)
    step(model, 1, broken)
    step(model, 2)  # a good one in between does not reset the count
    step(model, 3, broken)
    with pytest.raises(UserError, match='not finite 3 times, last at iteration 4.*max_nonfinite'):
        step(model, 4, broken)


# ----------------------------------------------------------------------------------------------------------- clipping


def test_gradients_are_clipped_to_the_norm(make_model):
    """With plain SGD at learning rate 1 the step is the gradient: its length is the norm asked for."""
    sgd = {'type': 'SGD', 'lr': 1.0}
    free, clipped = make_model(train__optim_g=sgd), make_model(train__optim_g=sgd, train__grad_clip_norm=1e-3)
    moved = []
    for model in (free, clipped):
        before = parameters(model).double()
        step(model)
        moved.append(parameters(model).double() - before)
    assert moved[0].norm() > 1e-2
    assert moved[1].norm() == pytest.approx(1e-3, rel=1e-2)
    cosine = torch.nn.functional.cosine_similarity(*moved, dim=0)
    assert cosine == pytest.approx(1, abs=1e-4)
    assert clipped.log_dict['grad_norm'] == pytest.approx(float(moved[0].norm()), rel=1e-3)


# -------------------------------------------------------------------------------------------------- reduced precision


@pytest.mark.parametrize('amp', [None, 'bf16', 'fp16'])
def test_learns(make_model, amp):
    """Overfits one batch: the loss falls to well under half; weights and EMA stay float32."""
    model = make_model(train__amp=amp, train__optim_g__lr=4e-3)
    step(model)
    first = model.log_dict['l_pix']
    for iteration in range(2, 61):
        step(model, iteration)
    assert model.log_dict['l_pix'] < 0.4 * first
    assert model.nonfinite == 0
    assert {p.dtype for p in model.net_g.parameters()} == {torch.float32}


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_network_runs_in_the_precision_asked_for(make_model, amp):
    model = make_model(train__amp=amp)
    seen = set()
    model.net_g.layers[0].conv.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    step(model)
    assert seen == {{'bf16': torch.bfloat16, 'fp16': torch.float16}[amp]}
    assert model.output.dtype == torch.float32


def test_fp16_scaler_is_part_of_the_state(make_model, tmp_path):
    model = make_model(train__amp='fp16')
    for folder in ('models', 'training_states'):
        (tmp_path / 'experiments/run' / folder).mkdir()
    step(model)
    model.scaler.update(123.0)
    model.save(epoch=0, current_iter=1)
    resumed = make_model(train__amp='fp16')
    resumed.resume_training(torch.load(tmp_path / 'experiments/run/training_states/1.state', weights_only=True))
    assert resumed.scaler.get_scale() == 123


def test_half_precision_inference_error():
    """Autocast inference of the shipped weights stays near float32 (on real pictures: docs/reliability.md)."""
    net = load_model()
    x = torch.rand(1, 3, 8, 8).repeat_interleave(4, -1).repeat_interleave(4, -2)
    with torch.no_grad():
        expected = net(x)
        for dtype, bound in ((torch.float16, 0.005), (torch.bfloat16, 0.04)):
            with torch.autocast('cpu', dtype):
                error = (net(x).float() - expected).abs()
            assert error.isfinite().all(), dtype
            assert error.mean() < bound, dtype


def test_state_of_another_optimizer_is_a_user_error(make_model, tmp_path):
    model = make_model()
    for folder in ('models', 'training_states'):
        (tmp_path / 'experiments/run' / folder).mkdir()
    step(model)
    model.save(epoch=0, current_iter=1)
    state = torch.load(tmp_path / 'experiments/run/training_states/1.state', weights_only=True)
    state['optimizers'][0]['param_groups'][0]['params'].pop()
    other = make_model()
    other.opt['path']['resume_state'] = '1.state'
    with pytest.raises(UserError, match='1.state does not fit these options'):
        other.resume_training(state)


def test_a_state_that_basicsr_wrote_is_resumed(make_model):
    model = make_model()
    step(model)
    plain = {
        'epoch': 1,
        'iter': 1,
        'optimizers': [model.optimizer_g.state_dict()],
        'schedulers': [model.schedulers[0].state_dict()],
    }
    other = make_model()
    other.resume_training(plain)
    assert other.optimizer_g.state_dict()['state'][0]['step'] == 1
    assert other.best_metric_results == {}


# ------------------------------------------------------------------------------------------------------------ options


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(train__warmup_iters=5), "train: unknown option 'warmup_iters'"),
        (dict(logger__save_freq=5), "logger: unknown option 'save_freq'"),
        (dict(logger__keep_last=0), 'logger → keep_last must be a whole number from 1 to 1000000000, not 0'),
        (dict(logger__save_checkpoint_freq=0), 'logger → save_checkpoint_freq must be a whole number from 1'),
        (dict(train__grad_clip_norm=-1), 'train → grad_clip_norm must be a number above 0'),
        (dict(train__max_nonfinite=1.5), 'train → max_nonfinite must be a whole number'),
        (dict(train__amp='float16'), 'train → amp must be one of bf16, fp16'),
        (dict(train__total_iter=math.nan), 'train → total_iter must be a whole number from 1 to 1000000000, not nan'),
        (dict(datasets__train__batch_size_per_gpu=0), 'batch_size_per_gpu must be a whole number from 1'),
        (dict(val__val_freq=0), 'val → val_freq must be a whole number from 1'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else '',
)
def test_options_that_cannot_work_are_refused(data, tmp_path, changes, message):
    path = write_options(tmp_path, options(data, **changes))
    with pytest.raises(UserError, match=message):
        load_options(path, is_train=True, root=tmp_path)


# --------------------------------------------------------------------------------------------------------------- data


class Numbers(Dataset):
    """Gives its index and what the generators of Python, numpy and torch draw."""

    def __init__(self, length: int = 7):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        import random

        import numpy as np

        if index == 99:
            raise UserError('99.png is broken.')
        return {'index': index, 'draws': torch.tensor([random.random(), np.random.rand(), float(torch.rand(()))])}


def batches(rank=0, world_size=1, dataset=None, **changes) -> TrainBatches:
    dataset_opt = {'name': 'numbers', 'batch_size_per_gpu': 4 // world_size, 'num_worker_per_gpu': 0}
    dataset_opt |= {'dataset_enlarge_ratio': 3} | changes
    opt = {'manual_seed': 3, 'scale': 4, 'num_gpu': 0, 'dist': world_size > 1, 'rank': rank, 'world_size': world_size}
    return TrainBatches(dataset or Numbers(), dataset_opt, opt)


def flat(loaded) -> list:
    return [(int(i), *map(float, d)) for b in loaded for i, d in zip(b['index'], b['draws'])]


def test_epoch_can_start_anywhere():
    whole = flat(batches().epoch(2))
    assert len(whole) == 20  # 21 samples, the last batch would not be full
    for start in range(6):
        assert flat(batches().epoch(2, start)) == whole[4 * start :]


def test_samples_do_not_depend_on_workers_or_on_what_was_drawn_before():
    expected = flat(batches().epoch(0))
    torch.rand(5)
    assert flat(batches(num_worker_per_gpu=2).epoch(0)) == expected


def test_every_sample_draws_anew():
    """basicsr seeds its workers alike in every epoch; here no two draws of a training are the same."""
    draws = [sample[1:] for epoch in range(3) for sample in flat(batches().epoch(epoch))]
    assert len(set(draws)) == len(draws)
    assert flat(batches().epoch(0)) != flat(batches().epoch(1))


def test_drawings_take_the_place_of_a_share_of_the_batches():
    changes = dict(dataset_enlarge_ratio=60, synthetic_graphics=0.25, gt_size=64)
    whole = list(batches(**changes).epoch(1))
    drawn = [number for number, batch in enumerate(whole) if 'index' not in batch]
    assert len(whole) == 105 and 15 <= len(drawn) <= 40
    assert {tuple(whole[n]['lq'].shape) for n in drawn} == {(4, 3, 16, 16), (8, 3, 8, 8)}
    # the others are what they would have been, and every start and any number of processes give the same
    plain = list(batches(dataset_enlarge_ratio=60).epoch(1))
    assert all(torch.equal(b['draws'], p['draws']) for b, p in zip(whole, plain) if 'index' in b)
    later = list(batches(**changes).epoch(1, drawn[3]))
    assert all(torch.equal(a['gt'], whole[n]['gt']) for n, a in enumerate(later, drawn[3]) if n in drawn)
    both = [list(batches(rank, 2, **changes).epoch(1)) for rank in (0, 1)]
    for n in drawn:
        assert torch.equal(torch.stack([b[n]['gt'] for b in both], 1).flatten(0, 1), whole[n]['gt'])
    assert sum('index' not in batch for batch in batches(**changes).epoch(2)) != len(drawn)


def test_epoch_deals_every_image_equally():
    counts = torch.bincount(torch.tensor([index for index, *_ in flat(batches(batch_size_per_gpu=1).epoch(0))]))
    assert counts.tolist() == [3] * 7


def test_two_processes_see_together_what_one_sees():
    one = [flat([b]) for b in batches().epoch(1)]
    two = [[flat([b]) for b in batches(rank, 2).epoch(1)] for rank in range(2)]
    for together, first, second in zip(one, *two):
        assert sorted(together) == sorted(first + second)


def test_global_generators_are_left_alone():
    before = torch.get_rng_state()
    list(batches().epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize('workers', [0, 2])
def test_broken_image_is_one_sentence_from_workers_too(workers):
    with pytest.raises(UserError) as raised:
        list(batches(dataset=Numbers(100), num_worker_per_gpu=workers).epoch(0))
    assert str(raised.value) == '99.png is broken.'


def test_too_small_a_data_set_is_refused():
    with pytest.raises(UserError, match='an epoch has 3 samples and a batch 4'):
        batches(dataset=Numbers(3), dataset_enlarge_ratio=1)


@pytest.mark.parametrize(('mode', 'message'), [('cpu', 'is not one of'), ('cuda', 'needs a GPU and pin_memory')])
def test_prefetch_modes_that_do_not_work_are_refused(mode, message):
    with pytest.raises(UserError, match=message):
        batches(prefetch_mode=mode)
