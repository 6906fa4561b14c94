"""Weight files: reading safely, writing whole, saying what does not fit."""

import json
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors
import torch
from processes import Process
from support import TINY

from ppsr import weights
from ppsr.archs import ATDLight, PPATDLight
from ppsr.archs.build import build_network
from ppsr.convert import convert
from ppsr.errors import UserError
from ppsr.weights import (
    DEFAULT_MODEL,
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


def equal(found: dict, state: dict) -> bool:
    """What was read is what the network holds, but for the table that follows from its window size."""
    state = {name: value for name, value in state.items() if name != 'relative_position_index_SA'}
    return found.keys() == state.keys() and all(torch.equal(found[k], state[k]) for k in found)


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


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_the_published_buffer_is_written_and_not_asked_for(tmp_path, net, suffix):
    """The published code registers it and loads strictly; files without it, as ours once were, load strictly here."""
    path, window = tmp_path / f'x{suffix}', 8
    save_checkpoint(path, net.state_dict())
    raw = torch.load(path, weights_only=True)['params_ema'] if suffix == '.pth' else safetensors.torch.load_file(path)
    expected = torch.empty(window**2, window**2, dtype=torch.long)
    for i in range(window**2):
        for j in range(window**2):
            down, right = i // window - j // window, i % window - j % window
            expected[i, j] = (down + window - 1) * (2 * window - 1) + right + window - 1
    assert torch.equal(raw['relative_position_index_SA'], expected)
    assert equal(read_checkpoint(path).state_dict, net.state_dict())
    for state in (raw, read_checkpoint(path).state_dict):
        PPATDLight(**TINY).load_state_dict(state, strict=True)


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_spandrel_takes_what_is_written_and_gives_the_same(tmp_path, monkeypatch, scale, suffix):
    """chaiNNer, ComfyUI and others load weights with it. In float64, since a near-tie of categories may flip in
    float32, and with a stable sort there as here: its own leaves the order within a category to chance."""
    spandrel = pytest.importorskip('spandrel')
    sort = torch.sort
    monkeypatch.setattr(torch, 'sort', lambda x, dim=-1, stable=False: sort(x, dim=dim, stable=True))
    config = dict(depths=[2], num_heads=[4], upscale=scale, category_size=128)  # else it guesses another category_size
    net = PPATDLight(**config).eval()
    for parameter in net.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_checkpoint(tmp_path / f'x{suffix}', net.state_dict(), {'type': 'PPATDLight', **config})
    theirs = spandrel.ModelLoader(device='cpu').load_from_file(tmp_path / f'x{suffix}')
    assert (theirs.architecture.id, theirs.scale) == ('ATD', scale) and 'light' in theirs.tags
    ours = load_model(tmp_path / f'x{suffix}', pure_pass=False, dtype=torch.float64)
    lq = torch.rand(1, 3, 20, 37, dtype=torch.float64)
    with torch.inference_mode():
        found, expected = ours(lq), theirs.model.double().eval()(lq)
    assert found.std() > 0.05
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


def test_configuration_is_guessed_from_the_shapes(net, tiny):
    config = guess_config(net.state_dict())
    assert config == {'type': 'ATDLight', **tiny, 'category_size': 128, 'mlp_ratio': 1.0}
    with pytest.raises(UserError, match='not those of an ATD-light network'):
        guess_config({'conv.weight': torch.zeros(3)})


@pytest.mark.parametrize('dim, hidden', [(60, 123), (48, 48), (60, 1), (7, 1023)])
def test_the_guessed_ratio_gives_the_hidden_width(tiny, dim, hidden):
    """60 · (123 / 60) is 122.99999999999999."""
    state = ATDLight(**tiny | dict(embed_dim=dim, num_heads=[1, 1], mlp_ratio=(hidden + 0.5) / dim)).state_dict()
    net = ATDLight(**{name: value for name, value in guess_config(state).items() if name != 'type'})
    assert net.layers[0].residual_group.layers[0].convffn.fc1.out_features == hidden
    net.load_state_dict(state)


def test_a_file_of_the_shipped_name_is_taken_by_its_path_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = DEFAULT_MODEL
    (tmp_path / name).write_text('nothing')
    (tmp_path / 'other').write_text('nothing')
    assert resolve(name) == resolve() == list_pretrained()[name]
    assert resolve(f'./{name}').samefile(tmp_path / name) and resolve(tmp_path / name) == tmp_path / name
    assert resolve('other').samefile(tmp_path / 'other')
    with pytest.raises(UserError, match=f'no such weight file, and the shipped weights are called .*{name}'):
        resolve(f'{name}.safetensors')


class Evil:
    def __reduce__(self):

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


@pytest.mark.parametrize(
    'weights, network, words',
    [
        ('ATDLight', 'ATDLightV2', 'weights of ATDLight, but the network is ATDLightV2; set type: ATDLight, or'),
        ('ATDLight', 'PPATDLightV2', 'weights of ATDLight, but the network is PPATDLightV2; set type: PPATDLight, or'),
        ('PPATDLightV2', 'PPATDLight', 'weights of ATDLightV2, but the network is PPATDLight; set type: PPATDLightV2'),
        ('ATDLightV2', 'ATDLight', 'weights of ATDLightV2, but the network is ATDLight; set type: ATDLightV2, or'),
        ('ATDLight', 'CAMixerATDLight', 'weights of ATDLight, but the network is CAMixerATDLight'),
        (
            'ATDLightV2',
            'PPATDLightV2 of other sizes',
            'set num_heads: [2, 2] (not [4, 4]), dim_ffn_td: 4 (not 5), or name other weights',
        ),
    ],
)
def test_weights_of_another_network_are_named_and_what_to_set(tmp_path, tiny, weights, network, words):
    kind, *other = network.split(' ', 1)
    path = tmp_path / 'x.pth'
    save_checkpoint(path, build_network({'type': weights, **tiny}).state_dict())
    settings = tiny | ({'num_heads': [4, 4], 'dim_ffn_td': 5} if other else {})
    with pytest.raises(UserError) as e:
        load_into(build_network({'type': kind, **settings}), read_checkpoint(path))
    assert words in str(e.value) and str(e.value).startswith(f'{path}: weights of') and str(e.value).count('. ') == 0


@pytest.mark.parametrize('weights, arch', [('ATDLight', 'PPATDLightV2'), ('PPATDLightV2', 'ATDLight')])
def test_an_arch_of_other_weights_is_refused(tmp_path, tiny, weights, arch):
    state, config = build_network({'type': weights, **tiny}).state_dict(), {'type': weights, **tiny}
    save_checkpoint(tmp_path / 'x.pth', state)
    save_checkpoint(tmp_path / 'x.safetensors', state, config)
    kin = 'ATDLightV2 or PPATDLightV2' if weights == 'PPATDLightV2' else 'ATDLight or PPATDLight'
    for name in ('x.pth', 'x.safetensors'):
        with pytest.raises(UserError, match=f'do not run as {arch}, but as {kin}'):
            load_model(tmp_path / name, arch=arch)


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

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(UserError, match='No space left'):
        save_checkpoint(path, {'x': torch.ones(1)})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    with pytest.raises(UserError, match='.safetensors or .pth'):
        save_checkpoint(tmp_path / 'a.bin', {})


@pytest.mark.parametrize('outscale, scale', [(None, 4), (2, 2), (1.5, 2), (2.5, 4), (8, 4)])
def test_a_factor_takes_the_weights_of_its_scale_or_of_the_next_larger_one(monkeypatch, outscale, scale):
    names = ('PPATDLight_x2', 'PPATDLight_x4', 'PPATDLight_x16_trial', 'ATDLight_x3')
    monkeypatch.setattr(weights, 'list_pretrained', lambda: dict.fromkeys(names, Path('file')))
    assert weights.default_model(outscale) == f'PPATDLight_x{scale}'


def test_the_shipped_weights_load_by_name():
    assert 'PPATDLight_x4' in list_pretrained()
    checkpoint = read_checkpoint(resolve('PPATDLight_x4'))
    assert (
        checkpoint.config['type'] == 'PPATDLight'
        and checkpoint.scale == 4
        and 'not the published model' in checkpoint.facts['summary']
    )
    net = load_model()
    assert sum(p.numel() for p in net.parameters()) == 768_792
    with pytest.raises(UserError, match='PPATDLight_x4'):
        resolve('no_such_model')
    with pytest.raises(UserError, match='not a registered arch'):
        load_model(arch='NoArch')


# ------------------------------------------------------------------------------------------------- hostile weight files


def described_as(folder, config) -> Path:
    """A small, whole file with this configuration in its metadata, as text or as what becomes JSON."""
    metadata = {'config': config if isinstance(config, str) else json.dumps(config)}
    safetensors.torch.save_file({'conv_first.weight': torch.zeros(16, 3, 3, 3)}, folder / 'x.safetensors', metadata)
    return folder / 'x.safetensors'


@pytest.mark.parametrize(
    'config, words',
    [
        ({'type': 'SpyNet', 'load_path': 'evil.bin'}, "names the network 'SpyNet'; a weight file may name ATDLight"),
        ({'type': 'VGGFeatureExtractor', 'vgg_type': 'vgg11'}, 'names the network'),
        ({'type': 'os.system'}, 'names the network'),
        ({'type': 'ATDLight', 'load_path': 'evil.bin'}, "has 'load_path', which is no setting"),
        ({'type': 'ATDLight', 'self': 1}, "has 'self'"),
        ({'type': 'ATDLight', 'embed_dim': 10**9}, 'embed_dim must be a whole number from 1 to 1024'),
        ({'type': 'ATDLight', 'embed_dim': '48'}, 'embed_dim must be'),
        ({'type': 'ATDLight', 'mlp_ratio': -1}, 'mlp_ratio must be'),
        ('{"type": "ATDLight", "mlp_ratio": Infinity}', 'mlp_ratio must be'),
        ('{"type": "ATDLight", "mlp_ratio": NaN}', 'mlp_ratio must be'),
        ({'type': 'ATDLight', 'window_size': 10**6}, 'window_size must be'),
        ({'type': 'ATDLight', 'num_tokens': 10**9}, 'num_tokens must be'),
        ({'type': 'ATDLight', 'upscale': 10**9}, 'upscale must be'),
        ({'type': 'ATDLight', 'category_size': 10**30}, 'category_size must be'),
        ({'type': 'ATDLight', 'convffn_kernel_size': -1}, 'convffn_kernel_size must be'),
        ({'type': 'ATDLight', 'convffn_kernel_size': 4}, 'convffn_kernel_size'),
        ({'type': 'ATDLight', 'depths': [10**7, 2], 'num_heads': [1, 1]}, 'depths must be'),
        ({'type': 'ATDLight', 'depths': [64] * 64, 'num_heads': [1] * 64}, 'asks for 4096 layers'),
        ({'type': 'ATDLight', 'depths': 6}, 'depths must be'),
        ({'type': 'ATDLight', 'depths': [1], 'num_heads': [1], 'embed_dim': 1024}, 'does not fit ATDLight'),
        ({'type': 'PPATDLight', 'pp_num_centers': 10**9}, 'pp_num_centers must be'),
        ({'type': 'PPATDLight', 'pp_window_size': 5.5}, 'pp_window_size must be'),
        ({'type': 'PPATDLight', 'pp_window_size': True}, 'pp_window_size must be'),
        ({'type': 'PPATDLight', 'pp_shift': 1.5}, 'pp_shift must be'),
        ({'type': 'PPATDLight', 'pp_fuse': 'no'}, 'pp_fuse must be'),
        ({'type': 'PPATDLight', 'pp_mask': 'os.system'}, 'pp_mask must be'),
        ({'type': 'PPATDLight', 'pp_mask': ['colour']}, 'pp_mask must be'),
        ({'type': 'PPATDLight', 'pp_mask': {'num_centers': 8}}, 'pp_mask must be'),
        ({'type': 'PPATDLight', 'pp_mask': {'type': 'colour', 'load_path': 'x'}}, "pp_mask has 'load_path'"),
        ({'type': 'PPATDLight', 'pp_mask': {'type': 'colour', 'iterations': 3}}, "'colour' takes no 'iterations'"),
        ({'type': 'PPATDLight', 'pp_mask': {'type': 'colour', 'num_centers': 10**9}}, 'pp_mask → num_centers must be'),
        ({'type': 'PPATDLight', 'pp_mask': {'type': 'dynamic', 'iterations': 10**9}}, 'pp_mask → iterations must be'),
        ({'type': 'PPATDLight', 'pp_mask': {'type': 'dynamic', 'iterations': 1.5}}, 'pp_mask → iterations must be'),
        ({'type': 'PPATDLight', 'pp_mask': {'type': 'dynamic', 'window_size': True}}, 'pp_mask → window_size must be'),
        ({'type': 'PPATDLight', 'pp_mask': {'type': 'variance', 'threshold': 3}}, 'pp_mask → threshold must be'),
        ({'type': 'PPATDLight', 'pp_mask': {'type': 'variance', 'threshold': None}}, 'threshold must be'),
        ({'type': 'PPATDLight', 'pp_mask': {'type': 'variance', 'window_size': 4}}, 'window_size must be'),
        ({'type': ['ATDLight']}, "not a network configuration with a 'type'"),
        ('[' * 200_000, 'not a readable safetensors file'),
        ('{"type": ' + '9' * 10_000 + '}', 'not a readable safetensors file'),
    ],
    ids=lambda value: str(value)[:80],
)
def test_a_file_chooses_neither_code_nor_memory(tmp_path, config, words):
    """Nothing is built of what a file only claims; all of it is one sentence."""
    path = described_as(tmp_path, config)
    for run in (lambda: load_model(path), lambda: list(convert(path, tmp_path / 'y.pth'))):
        with pytest.raises(UserError, match=re.escape(words)):
            run()
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_user_names_stays_free_but_not_what_a_file_tells_it(tmp_path):
    """--arch may name anybody's network; the file's settings are held against ours all the same."""
    path = described_as(tmp_path, {'type': 'ATDLight', 'load_path': 'evil.bin'})
    with pytest.raises(UserError, match='load_path'):
        load_model(path, arch='SpyNet')
    path = described_as(tmp_path, {'type': 'ATDLight', 'embed_dim': 16})
    with pytest.raises(UserError, match='SpyNet'):
        load_model(path, arch='SpyNet')


def strange_tensors() -> dict:
    x = torch.zeros(16, 3, 3, 3)
    return {
        'sparse': (x.to_sparse(), 'is sparse_coo'),
        'quantized': (torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), 'is quantized'),
        'meta': (x.to('meta'), 'is without data'),
        'expanded': (torch.zeros(1).expand(16000, 300, 300, 30), 'claims to be (16000, 300, 300, 30)'),
        'complex': (x.to(torch.complex64), 'is torch.complex64 in the file and torch.float32 in the network'),
        'bool': (x.bool(), 'is torch.bool in the file'),
        'integer': (x.int(), 'is torch.int32 in the file'),
        'text': ('zeros', "found: 'conv_first.weight'"),
    }


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('kind', strange_tensors())
def test_tensors_that_are_no_weights_are_refused(tmp_path, net, kind):
    value, words = strange_tensors()[kind]
    state = net.state_dict() | {'conv_first.weight': value}
    torch.save({'params': state}, tmp_path / 'x.pth')
    with pytest.raises(UserError, match=re.escape(words)):
        load_into(net, read_checkpoint(tmp_path / 'x.pth'))


def test_many_tensors_on_the_same_bytes_are_refused(tmp_path):
    x = torch.zeros(1000)
    torch.save({str(i): x for i in range(2000)}, tmp_path / 'x.pth')
    with pytest.raises(UserError, match='claim to be more than the 4,000 bytes'):
        read_checkpoint(tmp_path / 'x.pth')
    torch.save({'a': x, 'b': x}, tmp_path / 'tied.pth')
    assert set(read_checkpoint(tmp_path / 'tied.pth').state_dict) == {'a', 'b'}


def test_keys_that_are_no_text_are_refused(tmp_path):
    torch.save({1: torch.zeros(3)}, tmp_path / 'x.pth')
    with pytest.raises(UserError, match='found: 1'):
        read_checkpoint(tmp_path / 'x.pth')


def test_a_zip_bomb_is_refused_before_it_unpacks(tmp_path):
    torch.save({'x': torch.zeros(1_000_000)}, tmp_path / 'x.pth')
    with zipfile.ZipFile(tmp_path / 'x.pth') as plain, zipfile.ZipFile(tmp_path / 'bomb.pth', 'w', 8) as bomb:
        for name in plain.namelist():
            bomb.writestr(name, plain.read(name))
    assert (tmp_path / 'bomb.pth').stat().st_size < 20_000
    with pytest.raises(UserError, match='claims to hold more'):
        read_checkpoint(tmp_path / 'bomb.pth')


def test_facts_do_not_write_to_the_terminal(tmp_path, net, tiny):
    save_checkpoint(
        tmp_path / 'x.safetensors',
        net.state_dict(),
        {'type': 'ATDLight', **tiny},
        {'by\x1b[2J': '\x1b]0;x\x07\nlie: 1'},
    )
    lines = list(convert(tmp_path / 'x.safetensors', tmp_path / 'y.safetensors'))
    assert all(line.isprintable() for line in lines) and any('\\x1b[2J' in line for line in lines)


@pytest.mark.parametrize('setting', [None, 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'])
def test_commands_unpickle_nothing_whatever_the_default_of_torch(tmp_path, setting):
    """basicsr's own loads, too: SpyNet's, named in the user's options, leaves `weights_only` to torch."""
    torch.save({'params': Evil()}, tmp_path / 'evil.bin')
    (tmp_path / 'o.yml').write_text('network_g: {type: SpyNet, load_path: evil.bin}')
    environment = {setting: '1'} if setting else {}
    process = Process(['complexity', '-opt', 'o.yml'], cwd=tmp_path, environment=environment)
    assert process.wait() == 2 and not (tmp_path / 'executed').exists(), process.stdout + process.stderr
    assert b'network_g: SpyNet cannot be built: Weights only load failed' in process.stderr
    assert b'Traceback' not in process.stderr


@pytest.mark.parametrize('dtype, device', [(torch.bfloat16, None), (torch.float64, None), (torch.float32, 'meta')])
def test_weights_do_not_depend_on_torchs_defaults(dtype, device):
    expected = load_model().state_dict()
    try:
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        net = load_model()
        assert torch.get_default_dtype() == dtype  # stays as it was
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for name, value in net.state_dict().items():
        assert value.dtype == expected[name].dtype and value.device.type == 'cpu', name
        assert torch.equal(value, expected[name]), name
