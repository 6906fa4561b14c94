"""Weight files: there and back, and what is refused."""

import contextlib
import os
import pickle
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ppsr.archs import ATDLight, ATDLightV2, PPATDLight, PPATDLightV2
from ppsr.cli import main
from ppsr.convert import convert
from ppsr.errors import UserError
from ppsr.weights import load_model, read_checkpoint, save_checkpoint


@pytest.fixture
def plain(tmp_path, tiny):
    """A checkpoint as BasicSR and the published ATD-light write it: no configuration, a derivable buffer."""
    state = ATDLight(**tiny).state_dict()
    state['relative_position_index_SA'] = torch.zeros(64, 64, dtype=torch.long)
    path = tmp_path / 'plain.pth'
    torch.save({'params': {k: v + 1 for k, v in state.items()}, 'params_ema': state}, path)
    return path


def same(a, b):
    a, b = ({k: v for k, v in state.items() if k != 'relative_position_index_SA'} for state in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_there_and_back(tmp_path, plain, tiny, capsys):
    new, back = tmp_path / 'new.safetensors', tmp_path / 'back.pth'
    arguments = ['convert', '-i', str(plain), '-o', str(new), '--arch', 'PPATDLight']
    assert main([*arguments, '--category-size', '16']) == 0
    said = capsys.readouterr().out
    assert "under 'params_ema'" in said and 'embed_dim: 16' in said and 'category_size: 16' in said
    state = read_checkpoint(plain).state_dict
    found = read_checkpoint(new)
    assert same(found.state_dict, state) and found.config['type'] == 'PPATDLight'
    assert {name: found.config[name] for name in tiny} == tiny
    assert isinstance(load_model(new), PPATDLight)
    assert main(['convert', '-i', str(new), '-o', str(back)]) == 0
    content = torch.load(back, weights_only=True)
    assert list(content) == ['params_ema'] and same(content['params_ema'], state)


def test_the_converted_network_computes_the_same(tmp_path, plain, tiny):
    list(convert(plain, tmp_path / 'new.safetensors', category_size=16))
    net = ATDLight(**tiny).eval()
    net.load_state_dict(read_checkpoint(plain).state_dict)
    lq = torch.rand(1, 3, 9, 10)
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path / 'new.safetensors')(lq), net(lq))


def test_the_versions_are_told_apart_by_their_keys(tmp_path, tiny, capsys):
    source, target = tmp_path / 'v2.pth', tmp_path / 'v2.safetensors'
    state = ATDLightV2(**tiny, dim_ffn_td=3).state_dict()
    torch.save({'params': state}, source)
    assert main(['convert', '-i', str(source), '-o', str(target), '--category-size', '16']) == 0
    said = capsys.readouterr().out
    assert 'type: ATDLightV2' in said and 'dim_ffn_td: 3' in said
    assert type(load_model(target)) is ATDLightV2 and same(load_model(target).state_dict(), state)
    assert type(load_model(target, arch='PPATDLightV2')) is PPATDLightV2
    assert main(['convert', '-i', str(source), '-o', str(tmp_path / 'x.pth'), '--arch', 'PPATDLight']) == 2
    said = capsys.readouterr().err
    assert 'weights of ATDLightV2 do not run as PPATDLight, but as ATDLightV2 or PPATDLightV2' in said
    assert not (tmp_path / 'x.pth').exists()


def test_key_and_facts(tmp_path, plain, tiny):
    target = tmp_path / 'x.safetensors'
    list(convert(plain, target, key='params'))
    assert same(read_checkpoint(target).state_dict, read_checkpoint(plain, 'params').state_dict)
    state = read_checkpoint(plain).state_dict
    save_checkpoint(target, state, {'type': 'ATDLight', **tiny}, {'iterations': 1600})
    lines = list(convert(target, tmp_path / 'y.safetensors'))
    assert any('iterations: 1600' in line for line in lines)
    assert read_checkpoint(tmp_path / 'y.safetensors').facts == {'iterations': 1600}
    with pytest.raises(UserError, match="no 'params'"):
        list(convert(target, tmp_path / 'z.pth', key='params'))


def test_a_curve_is_told_in_a_line(tmp_path, plain, tiny):
    point = {'scope': ['category'], 'mask': 'gradient', 'threshold': 0.05, 'losses': [0.125, 0.25], 'saved': 0.1}
    curve = {'data': 'Some', 'against': 'ground truth', 'points': [point]}
    source, state = tmp_path / 'x.safetensors', read_checkpoint(plain).state_dict
    for fact, line in ((curve, '1 settings on 2 images of Some, against ground truth'), ({'a': 1}, "{'a': 1}")):
        save_checkpoint(source, state, {'type': 'ATDLight', **tiny}, {'calibration': fact})
        target = tmp_path / f'{len(line)}.safetensors'
        assert f'  calibration: {line}' in list(convert(source, target))
        assert read_checkpoint(target).facts == {'calibration': fact}


def test_pure_pass_weights_become_plain_and_portable(tmp_path, tiny):
    """`--arch ATDLight` records no setting of Pure-Pass; an old file without the published buffer gains it."""
    state = PPATDLight(**tiny).state_dict()
    del state['relative_position_index_SA']
    half = {name: value.half() for name, value in state.items()}
    source, target = tmp_path / 'pp.safetensors', tmp_path / 'atd.safetensors'
    save_checkpoint(source, half, {'type': 'PPATDLight', **tiny, 'pp_num_centers': 6, 'pp_fuse': False})
    assert main(['convert', '-i', str(source), '-o', str(target), '--arch', 'ATDLight']) == 0
    found = read_checkpoint(target)
    assert found.config == {'type': 'ATDLight', **tiny} and same(found.state_dict, half)
    assert type(load_model(target)) is ATDLight
    assert 'relative_position_index_SA' in safetensors.torch.load_file(target)
    assert main(['convert', '-i', str(target), '-o', str(tmp_path / 'back.safetensors'), '--arch', 'PPATDLight']) == 0
    assert type(load_model(tmp_path / 'back.safetensors')) is PPATDLight


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_a_full_disk_is_one_sentence(tmp_path, plain, capsys, monkeypatch, suffix):
    import ppsr.weights

    @contextlib.contextmanager
    def full_disk(path):
        yield Path('/dev/full')

    monkeypatch.setattr(ppsr.weights, 'atomic_path', full_disk)
    target = tmp_path / f'x{suffix}'
    assert main(['convert', '-i', str(plain), '-o', str(target)]) == 2
    assert 'cannot be written (No space left on device)' in capsys.readouterr().err and not target.exists()


class Evil:
    def __reduce__(self):
        return os.mkdir, ('executed',)


def test_what_is_refused(tmp_path, plain, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'evil.pth').write_bytes(pickle.dumps({'params_ema': Evil()}, protocol=2))
    (tmp_path / 'text.pth').write_text('no weights')
    torch.save({'params_ema': {'weight': torch.zeros(3)}}, tmp_path / 'other.pth')
    state = read_checkpoint(plain).state_dict
    torch.save({'params_ema': {k: v for k, v in state.items() if k != 'norm.bias'}}, tmp_path / 'short.pth')
    for arguments, message in (
        (['-i', 'nothing.pth', '-o', 'x.pth'], 'no such weight file'),
        (['-i', 'evil.pth', '-o', 'x.pth'], 'refused'),
        (['-i', 'text.pth', '-o', 'x.pth'], 'not a weight file'),
        (['-i', 'other.pth', '-o', 'x.pth'], 'not those of an ATD-light'),
        (['-i', 'short.pth', '-o', 'x.pth'], 'norm.bias'),
        (['-i', 'plain.pth', '-o', 'x.bin'], 'safetensors or .pth'),
        (['-i', 'plain.pth', '-o', 'text.pth'], 'exists already'),
        (['-i', 'plain.pth', '-o', 'x.pth', '--arch', 'Nonsense'], 'not a registered arch'),
        (['-i', 'plain.pth', '-o', 'x.pth', '--category-size', '0'], '--category-size'),
    ):
        assert main(['convert', *arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert message in said and 'Traceback' not in said
    assert not os.path.exists('executed') and not os.path.exists('x.pth')
