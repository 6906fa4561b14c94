"""Weight files: reading safely, writing whole, saying what does not fit."""

import pickle
from collections import OrderedDict

import pytest
import safetensors
import torch

from ppsr.archs import ATDLight, PPATDLight
from ppsr.errors import UserError
from ppsr.weights import (
    guess_config,
    list_pretrained,
    load_into,
    load_model,
    read_checkpoint,
    resolve,
    save_checkpoint,
)


@pytest.fixture
def net(tiny):
    return PPATDLight(**tiny, pp_num_centers=6)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_safetensors_carry_configuration_and_facts(tmp_path, net, tiny):
    config = {'type': 'PPATDLight', **tiny, 'pp_num_centers': 6, 'pp_shift': None}
    path = tmp_path / 'a.safetensors'
    save_checkpoint(path, net.state_dict(), config, {'iterations': 7, 'data': 'T91'})
    checkpoint = read_checkpoint(path)
    assert equal(checkpoint.state_dict, net.state_dict())
    assert checkpoint.config == config and checkpoint.facts == {'iterations': 7, 'data': 'T91'}
    loaded = load_model(path)
    assert isinstance(loaded, PPATDLight) and not loaded.training and loaded.pure_pass.num_centers == 6
    lq = torch.rand(1, 3, 9, 11)
    assert torch.equal(loaded(lq), net(lq))


def test_pure_pass_can_be_switched_off_and_on(tmp_path, net, tiny):
    save_checkpoint(tmp_path / 'pp.safetensors', net.state_dict(), {'type': 'PPATDLight', **tiny, 'pp_fuse': False})
    assert type(load_model(tmp_path / 'pp.safetensors', pure_pass=False)) is ATDLight
    save_checkpoint(tmp_path / 'atd.safetensors', net.state_dict(), {'type': 'ATDLight', **tiny})
    assert type(load_model(tmp_path / 'atd.safetensors', arch='PPATDLight')) is PPATDLight


def test_which_key_is_taken(tmp_path):
    a, b, c = ({'x': torch.full((1,), float(i))} for i in range(3))
    path = tmp_path / 'x.pth'
    torch.save({'params': a, 'params_ema': b}, path)
    assert read_checkpoint(path).key == 'params_ema' and read_checkpoint(path).state_dict['x'] == 1
    assert read_checkpoint(path, 'params').state_dict['x'] == 0
    torch.save({'params': a}, path)
    assert read_checkpoint(path, 'params_ema').key == 'params'
    torch.save(OrderedDict(('module.' + k, v) for k, v in c.items()), path)
    assert read_checkpoint(path).key == '' and read_checkpoint(path).state_dict['x'] == 2


def test_derivable_buffers_are_dropped(tmp_path, net):
    published = net.state_dict() | {'relative_position_index_SA': torch.zeros(64, 64, dtype=torch.long)}
    torch.save({'params_ema': published}, tmp_path / 'x.pth')
    assert equal(read_checkpoint(tmp_path / 'x.pth').state_dict, net.state_dict())
    save_checkpoint(tmp_path / 'y.pth', published)
    assert 'relative_position_index_SA' not in torch.load(tmp_path / 'y.pth')['params_ema']


def test_configuration_is_guessed_from_the_shapes(net, tiny):
    config = guess_config(net.state_dict())
    assert config == {'type': 'ATDLight', **tiny, 'category_size': 128, 'mlp_ratio': 1.0}
    with pytest.raises(UserError, match='not those of an ATD-light network'):
        guess_config({'conv.weight': torch.zeros(3)})


class Evil:
    def __reduce__(self):
        import os

        return os.system, ('touch executed',)


def broken_files(folder) -> dict:
    files = {name: folder / name for name in ('code.pth', 'empty.pth', 'text.pth', 'list.pth', 'x.safetensors')}
    files['code.pth'].write_bytes(pickle.dumps({'params': Evil()}, protocol=2))
    files['empty.pth'].touch()
    files['text.pth'].write_text('weights')
    torch.save([torch.zeros(1)], files['list.pth'])
    files['x.safetensors'].write_bytes(b'\xff' * 100)
    files['none.pth'] = folder / 'none.pth'
    files['other.pth'] = folder / 'other.pth'
    torch.save({'epoch': 3}, files['other.pth'])
    files['code_zip.pth'] = folder / 'code_zip.pth'
    torch.save({'params': Evil()}, files['code_zip.pth'])
    return files


@pytest.mark.parametrize(
    'name, words',
    [
        ('code.pth', 'refused, because it holds more than weights'),
        ('code_zip.pth', 'refused, because it holds more than weights'),
        ('empty.pth', 'not a weight file'),
        ('text.pth', 'not a weight file'),
        ('list.pth', 'holds a list'),
        ('other.pth', 'no parameters under'),
        ('x.safetensors', 'not a readable safetensors file'),
        ('none.pth', 'no such weight file'),
    ],
)
def test_what_is_not_weights_is_refused_and_nothing_runs(tmp_path, monkeypatch, name, words):
    monkeypatch.chdir(tmp_path)
    path = broken_files(tmp_path)[name]
    with pytest.raises(UserError, match=words) as e:
        read_checkpoint(path)
    assert str(path) in str(e.value)
    assert not (tmp_path / 'executed').exists()


def test_another_scale_is_named(tmp_path, net, tiny):
    save_checkpoint(tmp_path / 'x2.safetensors', net.state_dict())
    checkpoint = read_checkpoint(tmp_path / 'x2.safetensors')
    assert checkpoint.scale == 2
    other = ATDLight(**(tiny | {'upscale': 4}))
    with pytest.raises(UserError, match='weights for ×2, but the network is ×4'):
        load_into(other, checkpoint)
    left_out = load_into(other, checkpoint, strict=False)
    assert len(left_out) == 2 and all('upsample.0' in line for line in left_out)
    assert torch.equal(other.conv_first.weight, net.conv_first.weight)


def test_a_mismatch_names_the_keys(net, tiny):
    from ppsr.weights import Checkpoint

    state = dict(net.state_dict())
    state['surprise'] = state.pop('norm.weight')
    state['norm.bias'] = torch.zeros(3)
    with pytest.raises(UserError) as e:
        load_into(net, Checkpoint(state, path='x.pth'))
    for word in ('norm.bias is (3,) in the file and (16,) in the network', '1 missing: norm.weight', 'surprise'):
        assert word in str(e.value)


def test_a_failed_write_leaves_the_old_file(tmp_path, net, monkeypatch):
    path = tmp_path / 'a.safetensors'
    save_checkpoint(path, {'x': torch.zeros(1)})
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(safetensors.torch, 'save_file', full)
    with pytest.raises(UserError, match='No space left'):
        save_checkpoint(path, {'x': torch.ones(1)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match='.safetensors or .pth'):
        save_checkpoint(tmp_path / 'a.bin', {})


def test_the_shipped_weights_load_by_name():
    assert 'PPATDLight_x4_cpu' in list_pretrained()
    checkpoint = read_checkpoint(resolve('PPATDLight_x4_cpu'))
    assert (
        checkpoint.config['type'] == 'PPATDLight' and checkpoint.scale == 4 and 'short' in checkpoint.facts['summary']
    )
    net = load_model()
    assert sum(p.numel() for p in net.parameters()) == 768_792
    with pytest.raises(UserError, match='PPATDLight_x4_cpu'):
        resolve('no_such_model')
    with pytest.raises(UserError, match='not a registered arch'):
        load_model(arch='NoArch')
