"""Weight files: there and back, and what is refused."""

import os
import pickle

import pytest
import torch

from ppsr.archs import ATDLight, PPATDLight
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
        (['-i', 'plain.pth', '-o', 'x.pth', '--category-size', '0'], 'category_size'),
    ):
        assert main(['convert', *arguments]) == 2, arguments
        said = capsys.readouterr().err
        assert message in said and 'Traceback' not in said
    assert not os.path.exists('executed') and not os.path.exists('x.pth')
