"""Distillation: what the teacher adds to the loss, which teachers are taken, and its answers on the disk."""

import errno
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from basicsr.archs.srvgg_arch import SRVGGNetCompact
from basicsr.models import build_model
from tiny_training import options, write_options, write_pairs
from torch import nn

from ppsr.archs import ATDLight, PPATDLight
from ppsr.cli import main
from ppsr.data import PairedSRDataset
from ppsr.errors import UserError
from ppsr.training import teacher as module
from ppsr.training.options import load_options
from ppsr.training.teacher import Answers, Teacher, features_loss, fill_cache, groups_of
from ppsr.weights import save_checkpoint

OPTIONS = {'loss_weight': 0.5, 'cache': None, 'tile': 256, 'features': False, 'features_weight': 1.0}
ALONE = {'rank': 0, 'world_size': 1}
NETWORK = options(Path('unused'))['network_g']


pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    write_pairs(folder, 3)
    return folder


def write_teacher(path, **changes):
    """Weights of a network like the student's, with some settings changed."""
    torch.manual_seed(5)
    config = NETWORK | {'type': 'ATDLight'} | changes
    net = {'ATDLight': ATDLight, 'PPATDLight': PPATDLight}[config['type']](
        **{name: value for name, value in config.items() if name != 'type'}
    )
    save_checkpoint(path, net.state_dict(), config)
    return path


@pytest.fixture
def weights(tmp_path):
    return write_teacher(tmp_path / 'teacher.safetensors')


@pytest.fixture
def make_model(data, tmp_path, weights):
    def make(**changes):
        torch.manual_seed(0)
        teacher = {'weights': str(weights)} | changes
        opt = load_options(write_options(tmp_path, options(data, train__teacher=teacher)), True, root=tmp_path)
        return build_model(opt)

    return make


def batch(seed: int = 0) -> dict:
    gt = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).repeat_interleave(4, -1)
    gt = gt.repeat_interleave(4, -2)
    return {'lq': F.avg_pool2d(gt, 2), 'gt': gt, 'lq_path': ['a.png', 'b.png']}


def step(model, iteration=1, data=None):
    model.feed_data(data or batch())
    model.optimize_parameters(iteration)


# ------------------------------------------------------------------------------------------------ the losses


def test_the_distance_to_its_answers_is_a_term_of_the_loss(make_model, weights):
    model = make_model(loss_weight=0.25)
    teacher = Teacher(OPTIONS | {'weights': weights}, 2)
    before = [p.clone() for p in model.teacher.net.parameters()]
    with torch.no_grad():
        expected = 0.25 * (model.net_g(batch()['lq']) - teacher(batch()['lq'])).abs().mean()
    step(model)
    assert list(model.log_dict) == ['l_pix', 'l_teacher']
    assert model.log_dict['l_teacher'] == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.equal(p, b) and p.grad is None for p, b in zip(model.teacher.net.parameters(), before))
    first = [make_model(), make_model(loss_weight=0, features=True, features_weight=0.001)][0]
    step(first)
    assert first.log_dict['l_teacher'] == pytest.approx(2 * expected.item(), rel=1e-5)


def test_cached_answers_take_the_place_of_the_teacher(make_model):
    model = make_model(loss_weight=1.0)
    model.teacher = lambda lq: pytest.fail('the teacher was asked')
    step(model, data=batch() | {'teacher': batch()['gt']})
    assert model.log_dict['l_teacher'] == pytest.approx(model.log_dict['l_pix'])


def test_a_group_learns_alone_what_the_teachers_does(weights, tmp_path):
    """The error by hand, and a gradient that no other group has a part in."""
    two = dict(depths=[1, 1], num_heads=[2, 2])
    teacher = Teacher(OPTIONS | {'weights': write_teacher(tmp_path / 'two.safetensors', **two)}, 2)
    torch.manual_seed(1)
    student = PPATDLight(**{name: value for name, value in (NETWORK | two).items() if name != 'type'})
    lq = batch()['lq']
    answer, maps = teacher.with_maps(lq)
    torch.testing.assert_close(answer, teacher(lq), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(maps[0][1], maps[1][0], rtol=0, atol=0)
    assert [tuple(m.shape) for pair in maps for m in pair] == [(2, 16, 16, 16)] * 4
    loss = features_loss(student, lq, maps)
    mask = student(lq, return_mask=True)[1].flatten(1)
    expected = [
        ((group(given, mask)[0] - found) ** 2).sum() / ((found - given) ** 2).sum()
        for group, (given, found) in zip(student.layers, maps)
    ]
    torch.testing.assert_close(loss, sum(expected) / 2, rtol=1e-4, atol=0)
    loss.backward()
    first = [p.grad.clone() for p in student.layers[0].parameters()]
    with torch.no_grad():
        for p in student.layers[1].parameters():
            p.mul_(1.5)
    student.zero_grad()
    features_loss(student, lq, maps).backward()
    for p, before in zip(student.layers[0].parameters(), first):
        torch.testing.assert_close(p.grad, before, rtol=1e-4, atol=1e-7)
    assert all(p.grad is None for p in student.upsample.parameters())


def test_groups_of_the_teacher_itself_have_nothing_to_learn(weights):
    teacher = Teacher(OPTIONS | {'weights': weights}, 2)
    lq = batch()['lq']
    assert features_loss(teacher.net, lq, teacher.with_maps(lq)[1]) < 1e-8
    assert not any(g._forward_hooks or g._forward_pre_hooks for g in groups_of(teacher.net))


@pytest.mark.parametrize('amp', [None, 'fp16'])
def test_features_are_learned_beside_the_rest(make_model, amp):
    model = make_model(features=True, features_weight=0.1)
    model.amp_dtype = {None: None, 'fp16': torch.float16}[amp]
    model.scaler = torch.amp.GradScaler('cpu', enabled=amp == 'fp16')
    losses = []
    for i in range(1, 31):
        step(model, i, batch(i % 4))
        losses.append(model.log_dict['l_features'])
    assert list(model.log_dict) == ['l_pix', 'l_teacher', 'l_features']
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


# ------------------------------------------------------------------------------------------------ which teacher


class Evil:
    def __reduce__(self):
        return open, ('ran', 'w')


def other_scale(folder, teacher):
    teacher['weights'] = str(write_teacher(folder / 'x3.safetensors', upscale=3))


def missing(folder, teacher):
    teacher['weights'] = str(folder / 'nothing.pth')


def no_weights(folder, teacher):
    (folder / 'teacher.pth').write_bytes(b'no weights')
    teacher['weights'] = str(folder / 'teacher.pth')


def with_code(folder, teacher):
    torch.save({'params': Evil()}, folder / 'teacher.pth')
    teacher['weights'] = str(folder / 'teacher.pth')


def unknown(folder, teacher):
    torch.save({'params': {'a.weight': torch.zeros(3, 3)}}, folder / 'teacher.pth')
    teacher['weights'] = str(folder / 'teacher.pth')


def without_spandrel(folder, teacher):
    unknown(folder, teacher)


def other_groups(folder, teacher):
    weights = write_teacher(folder / 'two.safetensors', depths=[1, 1], num_heads=[2, 2])
    teacher.update(weights=str(weights), features=True)


def no_groups(folder, teacher):
    compact(folder / 'teacher.pth')
    teacher.update(weights=str(folder / 'teacher.pth'), features=True)


def gray(folder, teacher):
    compact(folder / 'teacher.pth', num_in_ch=1, num_out_ch=1)
    teacher['weights'] = str(folder / 'teacher.pth')


def nothing_to_learn(folder, teacher):
    teacher['loss_weight'] = 0


def cache_is_a_file(folder, teacher):
    (folder / 'cache').write_text('')
    teacher['cache'] = str(folder / 'cache')


def compact(path, **changes):
    """Weights of a small network that spandrel knows and ppsr does not."""
    torch.manual_seed(3)
    net = SRVGGNetCompact(**dict(num_in_ch=3, num_out_ch=3, num_feat=8, num_conv=2, upscale=2) | changes)
    torch.save({'params': net.state_dict()}, path)
    return net.eval()


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        (other_scale, 'x3.safetensors enlarges ×3 and this training ×2'),
        (missing, 'nothing.pth: no such weight file'),
        (no_weights, 'not a weight file'),
        (with_code, 'refused, because it holds more than weights'),
        (unknown, 'is of a network that neither ppsr nor spandrel'),
        (without_spandrel, "pip install 'ppsr[teacher]'"),
        (other_groups, 'has 2 groups of 16 channels and windows of 8 and network_g 1 groups of 16'),
        (no_groups, 'has no groups of ATD-light and network_g 1 groups'),
        (gray, 'takes 1 channels and gives 1; a teacher takes and gives RGB'),
        (nothing_to_learn, 'teaches nothing'),
        (cache_is_a_file, 'cannot be made (Not a directory)'),
    ],
    ids=lambda value: getattr(value, '__name__', ''),
)
def test_teachers_that_do_not_fit_are_refused_and_nothing_is_run(
    data, tmp_path, weights, capfd, monkeypatch, change, words
):
    monkeypatch.chdir(tmp_path)
    if change is without_spandrel:
        monkeypatch.setitem(sys.modules, 'spandrel', None)
    teacher = {'weights': str(weights)}
    change(tmp_path, teacher)
    older = tmp_path / 'experiments/run/models/net_g_latest.pth'
    older.parent.mkdir(parents=True)
    older.write_bytes(b'precious')
    write_options(tmp_path, options(data, train__teacher=teacher, train__total_iter=1, val=None))
    assert main(['train', '-opt', 'options.yml']) == 2
    error = capfd.readouterr().err
    last = error[error.index('ppsr: error') :]
    assert words in last and last.count('\n') == 1 and 'Traceback' not in error
    assert older.read_bytes() == b'precious' and not (tmp_path / 'ran').exists()
    assert [path.name for path in (tmp_path / 'experiments').iterdir()] == ['run']


@pytest.mark.parametrize('key', ['params', 'state_dict'])
def test_networks_of_spandrel_teach(tmp_path, data, key, make_model):
    net = compact(tmp_path / 'teacher.pth')
    torch.save({key: net.state_dict(), 'epoch': 3}, tmp_path / 'teacher.pth')
    teacher = Teacher(OPTIONS | {'weights': tmp_path / 'teacher.pth'}, 2)
    lq = batch()['lq'][..., :15, :13]
    with torch.no_grad():
        torch.testing.assert_close(teacher(lq), net(lq).clamp(0, 1))
    model = make_model(weights=str(tmp_path / 'teacher.pth'))
    step(model)
    assert model.log_dict['l_teacher'] > 0


def test_where_memory_does_not_suffice_it_works_in_tiles(weights):
    teacher = Teacher(OPTIONS | {'weights': weights, 'tile': 0}, 2)
    lq = torch.rand(1, 3, 8, 8).repeat_interleave(20, -1).repeat_interleave(20, -2)  # 160 × 160
    whole, forward, sizes = teacher(lq), teacher.net.forward, []

    def small_memory(x, *args, **kwargs):
        sizes.append(x.shape[-1])
        if x.shape[-1] > 100:
            raise torch.OutOfMemoryError('CUDA out of memory')
        return forward(x, *args, **kwargs)

    teacher.net.forward = small_memory
    tiled = teacher(lq)
    assert sizes == [160, *[80] * 9]
    assert (tiled - whole).abs().mean() < 0.02
    sizes.clear()
    assert torch.equal(teacher(lq), tiled) and sizes == [80] * 9  # it has learned
    teacher.net.forward = lambda *args, **kwargs: (_ for _ in ()).throw(MemoryError())
    with pytest.raises(UserError, match='memory does not suffice for .* on 64×64 pixels'):
        teacher(lq)


# ------------------------------------------------------------------------------------------------ its answers


class Nearest(nn.Module):
    """Repeats every pixel: its answer to a patch is the patch of its answer, however that is turned."""

    upscale = 2

    def __init__(self):
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, lq):
        return self.one * lq.repeat_interleave(2, -1).repeat_interleave(2, -2)


@pytest.fixture
def nearest(weights):
    teacher = Teacher(OPTIONS | {'weights': weights}, 2)
    teacher.net, teacher.asked = Nearest(), 0
    forward = teacher.net.forward

    def counting(lq):
        teacher.asked += 1
        return forward(lq)

    teacher.net.forward = counting
    return teacher


def dataset(folder, **changes):
    opt = {'name': 'd', 'phase': 'train', 'scale': 2, 'gt_size': 32, 'io_backend': {'type': 'disk'}}
    return PairedSRDataset(opt | {'dataroot_gt': str(folder / 'hr'), 'dataroot_lq': str(folder / 'lr')} | changes)


LOGGER = logging.getLogger('test')


def test_answers_are_cropped_and_turned_as_the_patches_are(data, tmp_path, nearest, caplog):
    caplog.set_level(logging.INFO)
    train = dataset(data)
    plain = [_seeded(train, i) for i in range(3)]
    assert 'teacher' not in plain[0]
    fill_cache(Answers(tmp_path / 'cache', nearest), nearest, train, ALONE, LOGGER)
    assert nearest.asked == 3
    assert 'answers to 3 images take 0.0 MB in' in caplog.text and '0 are there, 3 are made now' in caplog.text
    turned = set()
    for seed in range(20):
        item = _seeded(train, seed)
        expected = item['lq'].repeat_interleave(2, -1).repeat_interleave(2, -2)
        torch.testing.assert_close(item['teacher'], expected, rtol=0, atol=2**-11)
        assert item['teacher'].dtype == torch.float32 and item['teacher'].shape == item['gt'].shape
        turned.add(tuple(item['teacher'][0, 0].tolist()))
    assert len(turned) > 10
    for i, before in enumerate(plain):  # the patches are those that they would be without
        assert all(torch.equal(_seeded(train, i)[key], before[key]) for key in ('lq', 'gt'))


def _seeded(train, seed):
    import random

    random.seed(seed)
    return train[seed % 3]


def test_only_what_is_missing_is_made_and_what_is_half_written_made_anew(data, tmp_path, nearest, caplog):
    caplog.set_level(logging.INFO)
    shutil.copytree(data, tmp_path / 'data')
    train = dataset(tmp_path / 'data')
    answers = Answers(tmp_path / 'cache', nearest)
    fill_cache(answers, nearest, train, ALONE, LOGGER)
    files = [answers.path(train.pairs.read(i)[0]) for i in range(3)]
    content = files[0].read_bytes()
    files[0].write_bytes(content[:1000])
    files[1].write_bytes(b'')
    old, new = (answers.folder / f'.ppsr-{age}.part.npy' for age in ('old', 'new'))
    for path in (old, new):
        path.write_bytes(b'')
    os.utime(old, (0, 0))
    nearest.asked = 0
    fill_cache(answers, nearest, train, ALONE, LOGGER)
    assert nearest.asked == 2 and files[0].read_bytes() == content and '1 are there, 2 are made now' in caplog.text
    assert not old.exists() and new.exists()  # the latter may be another training's
    shutil.copy(tmp_path / 'data/lr/001.png', tmp_path / 'data/lr/002.png')  # another image: another answer
    shutil.copy(tmp_path / 'data/hr/001.png', tmp_path / 'data/hr/002.png')
    fill_cache(answers, nearest, train, ALONE, LOGGER)
    assert nearest.asked == 2 and '3 are there, 0 are made now' in caplog.text
    files[1].unlink()
    with pytest.raises(UserError, match='answer to .*001.png is no longer in .*, or not whole; start again'):
        train[1]
    assert (
        Answers(tmp_path / 'cache', Teacher(OPTIONS | {'weights': nearest.path, 'tile': 64}, 2)).folder
        != answers.folder
    )


def test_a_full_disk_is_a_sentence_and_what_is_there_stays(data, tmp_path, nearest, monkeypatch):
    train, answers = dataset(data), Answers(tmp_path / 'cache', nearest)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda path: usage._replace(free=20000))
    with pytest.raises(UserError, match='would grow by 0.0 MB and 0.0 MB are free there; name a folder'):
        fill_cache(answers, nearest, train, ALONE, LOGGER)
    assert nearest.asked == 0 and train.answers is None
    monkeypatch.undo()
    save, count = np.save, []

    def full(*args):
        count.append(1)
        if len(count) == 2:
            raise OSError(errno.ENOSPC, 'No space left on device')
        save(*args)

    monkeypatch.setattr(module.np, 'save', full)
    with pytest.raises(UserError, match=r'cannot be written \(No space left on device\); what is there is used'):
        fill_cache(answers, nearest, train, ALONE, LOGGER)
    assert len(list(answers.folder.iterdir())) == 1
    nearest.asked = 0
    fill_cache(answers, nearest, train, ALONE, LOGGER)
    assert nearest.asked == 2 and len(list(answers.folder.iterdir())) == 3


def test_other_data_sets_have_no_cache(tmp_path, nearest):
    with pytest.raises(UserError, match='works with data sets of type PairedSRDataset, not list'):
        fill_cache(Answers(tmp_path, nearest), nearest, [1], ALONE, LOGGER)
