"""What a training step does with numbers: NaN, clipping, reduced precision; and the data that it is given."""

import json
import logging
import math
import os
import signal

import pytest
import torch
from basicsr.models import build_model
from tiny_training import options, write_options, write_pairs
from torch.utils.data import Dataset

from ppsr.errors import UserError
from ppsr.models.pure_pass_sr_model import first_not_finite
from ppsr.runtime import threads
from ppsr.training.checkpoints import read_state
from ppsr.training.flat import flat_loss, flat_pictures
from ppsr.training.loader import TrainBatches
from ppsr.training.options import load_options
from ppsr.weights import load_model


@pytest.fixture(scope='module', autouse=True)
def one_thread():
    """Networks this small gain nothing from threads, and lose much where the machine is busy."""
    with threads(1):
        yield


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


# ------------------------------------------------------------------------------------------------- one-colour pictures

FLAT = {'loss_weight': 1.0, 'square_weight': 40.0, 'sides': [12, 48], 'pixels': 1536}


def test_flat_pictures_follow_from_seed_iteration_and_process():
    seen, colours, different = set(), set(), 0
    for iteration in range(1, 61):
        pictures = flat_pictures(FLAT, 7, iteration)
        assert torch.equal(pictures, flat_pictures(FLAT, 7, iteration))
        assert (pictures == pictures[..., :1, :1]).all() and ((pictures * 255).round() / 255 == pictures).all()
        count, _, h, w = pictures.shape
        assert count == max(1, 1536 // (h * w))
        other = flat_pictures(FLAT, 7, iteration, rank=1)  # colours of its own, of the same size
        assert other.shape == pictures.shape
        different += not torch.equal(other, pictures)
        seen |= {h, w}
        colours |= {tuple((255 * c).int().tolist()) for c in pictures[..., 0, 0]}
    assert min(seen) < 16 and max(seen) > 44 and min(seen) >= 12 and max(seen) <= 48
    assert different > 50
    corners = {c for c in colours if set(c) <= {0, 255}}
    assert len(corners) == 8 and len(colours - corners) > 60


def test_flat_loss_is_the_error_in_both_measures():
    pictures = torch.full((1, 3, 2, 2), 0.5)
    output = torch.full((1, 3, 4, 4), 0.5)
    output[0, 0, 0, 0] = 0.75
    assert flat_loss(output, pictures, FLAT).item() == pytest.approx((0.25 + 40 * 0.25**2) / 48)
    assert flat_loss(output, pictures, FLAT | {'square_weight': 0, 'loss_weight': 3}).item() == pytest.approx(0.75 / 48)


def test_gradients_of_flat_pictures_are_added_to_those_of_the_batch(make_model, monkeypatch):
    """Alone, together, and as one sum."""
    gradients = {}
    for name, changes in {'batch': {}, 'both': {'train__flat_opt': {}}}.items():
        model = make_model(**changes)
        monkeypatch.setattr(model.optimizer_g, 'step', lambda: None)
        step(model, 5)
        gradients[name] = [p.grad.clone() for p in model.net_g.parameters()]
    assert list(model.log_dict) == ['l_pix', 'l_flat']
    pictures = flat_pictures(FLAT, 7, 5)
    model.net_g.zero_grad()
    loss = flat_loss(model.net_g(pictures), pictures, FLAT)
    assert model.log_dict['l_flat'] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    for p, alone, both in zip(model.net_g.parameters(), gradients['batch'], gradients['both']):
        torch.testing.assert_close(both, alone + p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize('amp', ['bf16', 'fp16'])
def test_flat_pictures_are_learned(make_model, amp):
    model = make_model(train__flat_opt={'sides': [8, 16], 'pixels': 512}, train__amp=amp)
    losses = []
    for i in range(1, 61):
        step(model, i, batch(i))
        losses.append(model.log_dict['l_flat'])
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


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


@pytest.mark.parametrize('rate', [math.inf, math.nan])
def test_ruined_weights_end_the_training_at_once(make_model, tmp_path, rate):
    """Nothing of them is saved; the last finite checkpoint and what was set are named."""
    model = make_model()
    (tmp_path / 'experiments/run/models').mkdir()
    (tmp_path / 'experiments/run/models/net_g_7.pth').touch()
    model.optimizer_g.param_groups[0]['lr'] = rate
    with pytest.raises(UserError) as raised:
        step(model, 2)
    said = [f'learning rate {rate}', "'lr': 0.001", "'gamma': 0.5"]
    for words in [*said, 'iteration 2', 'first conv_first.weight', 'net_g_7.pth']:
        assert words in str(raised.value)
    assert all(p.isfinite().all() for p in model.net_g_ema.parameters())  # never mixed in


def test_weights_that_are_not_finite_are_not_trained(make_model, tmp_path):
    model = make_model()
    state = model.net_g.state_dict()
    state['norm.weight'][3] = math.nan
    torch.save({'params': state}, tmp_path / 'nan.pth')
    with pytest.raises(UserError, match=r'nan\.pth.*norm\.weight'):
        make_model(path__pretrain_network_g=str(tmp_path / 'nan.pth'))


def test_first_not_finite_is_found_and_large_numbers_are_not(make_model):
    net = make_model().net_g
    assert first_not_finite(net) is None
    with torch.no_grad():
        net.norm.bias[0] = 3e38  # its square is not a float32
        assert first_not_finite(net) is None
        for bad in (math.nan, math.inf, -math.inf):
            net.norm.bias[0] = bad
            assert first_not_finite(net) == 'norm.bias'
    assert first_not_finite(torch.nn.ReLU()) is None


def test_without_a_log_a_skipped_step_is_told_all_the_same(make_model):
    """A study has options without folders."""
    model = make_model(train__max_nonfinite=2)
    model.opt['path'].clear()
    broken = batch()
    broken['gt'].fill_(math.nan)
    step(model, 1, broken)
    with pytest.raises(UserError, match='not finite 2 times, last at iteration 2: lower'):
        step(model, 2, broken)


def test_several_gpus_mean_torchrun(make_model):
    model = make_model()
    model.opt['num_gpu'] = 2
    with pytest.raises(UserError, match='torchrun --nproc_per_node=2'):
        model.model_to_device(torch.nn.ReLU())
    model.is_train = False
    assert isinstance(model.model_to_device(torch.nn.ReLU()), torch.nn.ReLU)


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


# ----------------------------------------------------------------------------------------- resuming with other options


def saved_state(model, tmp_path, iterations: int) -> dict:
    for folder in ('models', 'training_states'):
        (tmp_path / 'experiments/run' / folder).mkdir(exist_ok=True)
    for iteration in range(1, iterations + 1):
        model.update_learning_rate(iteration, model.opt['train'].get('warmup_iter', -1))
        step(model, iteration)
    model.save(epoch=0, current_iter=iterations)
    return read_state(tmp_path / f'experiments/run/training_states/{iterations}.state')


def rates(model, iterations) -> list[float]:
    """Learning rates of these iterations."""
    found = []
    for iteration in iterations:
        model.update_learning_rate(iteration, model.opt['train'].get('warmup_iter', -1))
        found += model.get_current_learning_rate()
    return found


CHANGES = {
    'lr': (dict(train__optim_g__lr=2e-3), 'optim_g → lr 0.002 (the state was saved with 0.001)'),
    'milestones': (
        dict(train__scheduler={'type': 'MultiStepLR', 'milestones': [2, 10], 'gamma': 0.5}),
        'scheduler → milestones [2, 10] (the state was saved with [6, 12])',
    ),
    'gamma': (
        dict(train__scheduler={'type': 'MultiStepLR', 'milestones': [6, 12], 'gamma': 0.1}),
        'scheduler → gamma 0.1 (the state was saved with 0.5)',
    ),
    'scheduler': (
        dict(train__scheduler={'type': 'CosineAnnealingRestartLR', 'periods': [40], 'restart_weights': [1]}),
        'scheduler → type CosineAnnealingRestartLR (the state was saved with MultiStepRestartLR)',
    ),
    'warm-up': (dict(train__warmup_iter=6), 'train → warmup_iter 6 (the state was saved with -1)'),
    'decay': (
        dict(train__optim_g={'type': 'AdamW', 'lr': 1e-3, 'weight_decay': 0.5}),
        'optim_g → weight_decay 0.5 (the state was saved with 0.01)',
    ),
}


@pytest.mark.parametrize('case', CHANGES)
@pytest.mark.parametrize('basicsr', [False, True], ids=['our state', "BasicSR's"])
def test_the_options_count_when_resuming_and_what_differs_is_said(make_model, tmp_path, caplog, case, basicsr):
    """Moments come from the state, everything that is set from the options: from here on the learning rates are those
    of a training that had these options from the start."""
    changes, sentence = CHANGES[case]
    state = saved_state(make_model(), tmp_path, 4)
    if basicsr:
        if case == 'warm-up':
            pytest.skip("BasicSR's states do not say it")
        state = {key: state[key] for key in ('epoch', 'iter', 'optimizers', 'schedulers')}
        sentence = sentence if case != 'scheduler' else ''
    through, resumed = make_model(**changes), make_model(**changes)
    logger = logging.getLogger('basicsr')
    logger.addHandler(caplog.handler)
    try:
        resumed.resume_training(state)
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.text.count('Resuming with') == (1 if sentence else 0) and sentence in caplog.text
    assert rates(through, range(1, 17))[4:] == pytest.approx(rates(resumed, range(5, 17)), rel=1e-6)
    group, moments = resumed.optimizer_g.param_groups[0], resumed.optimizer_g.state_dict()['state']
    assert group['weight_decay'] == (0.5 if case == 'decay' else 0.01)
    assert torch.equal(moments[0]['exp_avg'], state['optimizers'][0]['state'][0]['exp_avg'])
    step(resumed, 5)


@pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='torch.optim.Muon came with torch 2.9')
def test_settings_of_both_parts_of_muon_are_the_options(make_model, tmp_path):
    def asking(weight_decay, betas):
        muon = {'type': 'Muon', 'lr': 1e-3, 'weight_decay': weight_decay, 'adamw': {'lr': 1e-3, 'betas': betas}}
        return make_model(train__optim_g=muon)

    state = saved_state(asking(0.25, [0.9, 0.95]), tmp_path, 2)
    resumed = asking(0.5, [0.8, 0.95])
    notes = ' '.join(resumed._resume_optimizers(state, 'a.state'))
    assert 'weight_decay 0.5 (the state was saved with 0.25)' in notes
    assert 'betas [0.8, 0.95] (the state was saved with [0.9, 0.95])' in notes
    parts = {name: part.param_groups[0] for name, part in resumed.optimizer_g.parts.items()}
    assert parts['muon']['weight_decay'] == 0.5 and tuple(parts['adamw']['betas']) == (0.8, 0.95)
    step(resumed, 3)


def test_the_same_options_resume_without_a_word(make_model, tmp_path, caplog):
    state = saved_state(make_model(train__warmup_iter=3), tmp_path, 4)
    resumed = make_model(train__warmup_iter=3)
    logger = logging.getLogger('basicsr')
    logger.addHandler(caplog.handler)
    try:
        resumed.resume_training(state)
    finally:
        logger.removeHandler(caplog.handler)
    assert 'Resuming' not in caplog.text
    assert resumed.optimizer_g.param_groups[0]['lr'] == state['optimizers'][0]['param_groups'][0]['lr']


@pytest.mark.parametrize('kind', ['SGD', 'RMSprop', 'Adam', 'RAdam', 'NAdam'])
def test_another_optimizer_is_refused_by_name(make_model, tmp_path, kind):
    state = saved_state(make_model(), tmp_path, 1)
    other = make_model(train__optim_g={'type': kind, 'lr': 1e-3})
    with pytest.raises(UserError, match=f'holds the moments of AdamW, but .* asks for {kind}'):
        other.resume_training(state)
    del state['optimizer_types']  # a state of BasicSR's
    if kind != 'Adam' or 'decoupled_weight_decay' in state['optimizers'][0]['param_groups'][0]:
        with pytest.raises(UserError, match=f'another optimizer, but .* asks for {kind}'):
            make_model(train__optim_g={'type': kind, 'lr': 1e-3}).resume_training(state)


@pytest.mark.parametrize(
    'moment', [torch.zeros(2, 2), 'x', None, [1.0], 1.0], ids=['shape', 'text', 'none', 'list', 'scalar']
)
def test_moments_of_other_parameters_are_refused(make_model, tmp_path, moment):
    state = saved_state(make_model(), tmp_path, 1)
    state['optimizers'][0]['state'][3]['exp_avg'] = moment
    with pytest.raises(UserError, match='exp_avg of parameter 3 does not fit'):
        make_model().resume_training(state)


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
        (dict(train__pp_probability=1.1), 'train → pp_probability must be a number from 0 to 1'),
        (
            dict(train__pp_probability=0.1, train__pp_paper_probability=0.2),
            'pp_paper_probability 0.2 must not be above',
        ),
        (dict(train__pp_threshold_range=[0.1]), 'train → pp_threshold_range must be a list of 2'),
        (dict(train__pp_threshold_range=[0, 0.1]), 'pp_threshold_range must be a list of 2, each a number above 0'),
        (dict(train__pp_threshold_range=[0.2, 0.1]), 'pp_threshold_range must name the lower end first'),
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


class Deadly(Numbers):
    """Its last image kills the worker that reads it, as a system that is short of memory does."""

    def __getitem__(self, index):
        if index == 6 and torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_killed_worker_is_one_sentence_where_batches_are_asked_for(monkeypatch):
    """Not in the middle of whatever the training does when it happens: that could be half a step."""
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(UserError, match='^data set numbers: a loader worker was killed .* num_worker_per_gpu'):
        for _ in batches(dataset=Deadly(), num_worker_per_gpu=1).epoch(0):
            assert signal.getsignal(signal.SIGCHLD) == before


@pytest.mark.parametrize('error', [ConnectionResetError(104, 'Connection reset by peer'), EOFError()], ids=str)
def test_worker_killed_while_it_hands_over_a_batch(monkeypatch, error):
    """torch then lets through what the broken connection says."""

    def broken(self):
        raise error

    monkeypatch.setattr(torch.utils.data.dataloader._MultiProcessingDataLoaderIter, '_next_data', broken)
    with pytest.raises(UserError, match='^data set numbers: a loader worker was killed'):
        list(batches(num_worker_per_gpu=1).epoch(0))


class Remote(Numbers):
    def __getitem__(self, index):
        raise ConnectionError('the server is gone')


@pytest.mark.parametrize('workers', [0, 1])
def test_a_connection_of_the_data_set_itself_is_no_killed_worker(workers):
    with pytest.raises(ConnectionError, match='the server is gone'):
        list(batches(dataset=Remote(), num_worker_per_gpu=workers).epoch(0))


def test_too_small_a_data_set_is_refused():
    with pytest.raises(UserError, match='an epoch has 3 samples and a batch 4'):
        batches(dataset=Numbers(3), dataset_enlarge_ratio=1)


@pytest.mark.parametrize(('mode', 'message'), [('cpu', 'is not one of'), ('cuda', 'needs a GPU and pin_memory')])
def test_prefetch_modes_that_do_not_work_are_refused(mode, message):
    with pytest.raises(UserError, match=message):
        batches(prefetch_mode=mode)
