import copy
import json
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from support import TINY

from ppsr.archs import ATDLight, CAMixerATDLight, MaskedNetwork, PPATDLight
from ppsr.errors import UserError
from ppsr.weights import save_checkpoint

hub = pytest.importorskip('huggingface_hub')


def test_there_and_back(tmp_path):
    net = PPATDLight(**TINY, pp_num_centers=5, pp_mask={'type': 'both', 'threshold': 0.05}).eval()
    assert net.save_pretrained(tmp_path / 'folder') is None
    assert sorted(path.name for path in (tmp_path / 'folder').iterdir()) == [
        'README.md',
        'config.json',
        'model.safetensors',
    ]
    again = PPATDLight.from_pretrained(tmp_path / 'folder')
    assert type(again) is PPATDLight and not again.training
    assert again.configuration == net.configuration == json.loads((tmp_path / 'folder' / 'config.json').read_text())
    lq = torch.rand(1, 3, 9, 12)
    with torch.inference_mode():
        assert torch.equal(again(lq), net(lq))
    assert type(MaskedNetwork.from_pretrained(tmp_path / 'folder')) is PPATDLight
    assert type(ATDLight.from_pretrained(tmp_path / 'folder')) is ATDLight
    settings = PPATDLight.from_pretrained(tmp_path / 'folder', pp_mask='colour', pp_num_centers=7).pure_pass
    assert settings.num_centers == 7
    card = hub.ModelCard.load(tmp_path / 'folder' / 'README.md')
    assert card.data.library_name == 'ppsr' and 'from ppsr.archs import PPATDLight' in card.text


def test_configuration_follows_the_network():
    net = PPATDLight(**TINY)
    assert net.configuration['type'] == 'PPATDLight' and net.configuration['convffn_kernel_size'] == 5
    assert copy.deepcopy(net).configuration == pickle.loads(pickle.dumps(net)).configuration == net.configuration
    dense = net.exempt_nothing().configuration
    assert dense['type'] == 'ATDLight' and not any(name.startswith('pp_') for name in dense)
    assert CAMixerATDLight(**TINY, camixer_ratio=0.25).configuration['camixer_ratio'] == 0.25


def test_shipped_weights_and_files(tmp_path):
    assert PPATDLight.from_pretrained('PPATDLight_x2').upscale == 2
    save_checkpoint(tmp_path / 'x.pth', ATDLight(**TINY).state_dict())
    assert type(PPATDLight.from_pretrained(tmp_path / 'x.pth')) is PPATDLight


@pytest.mark.parametrize(
    'config, words',
    [
        ({'type': 'os.system'}, 'names the network'),
        ({'type': 'PPATDLight', 'layer_fn': 'eval'}, 'no setting'),
        ({'type': 'PPATDLight', 'embed_dim': 10**9}, 'embed_dim'),
    ],
)
def test_a_folder_cannot_choose_code_or_memory(tmp_path, config, words):
    PPATDLight(**TINY).save_pretrained(tmp_path)
    state = safetensors.torch.load_file(tmp_path / 'model.safetensors')
    safetensors.torch.save_file(state, tmp_path / 'model.safetensors', {'config': json.dumps(config)})
    with pytest.raises(UserError, match=words):
        MaskedNetwork.from_pretrained(tmp_path)


def test_what_is_not_there_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match='without model.safetensors'):
        PPATDLight.from_pretrained(tmp_path)
    with pytest.raises(UserError, match=r'no folder, .* PPATDLight_x4.*\), and no name of a repository'):
        PPATDLight.from_pretrained('PPATDLight_x9')

    def offline(name, file, **kwargs):
        assert (name, file, kwargs['revision']) == ('owner/name', 'model.safetensors', 'v1')
        raise hub.errors.LocalEntryNotFoundError('no connection')

    monkeypatch.setattr(hub, 'hf_hub_download', offline)
    with pytest.raises(UserError, match=r'owner/name: no such folder here, .*\(no connection\)'):
        PPATDLight.from_pretrained('owner/name', revision='v1')


def test_a_repository_is_downloaded(tmp_path, monkeypatch):
    PPATDLight(**TINY).save_pretrained(tmp_path)
    monkeypatch.setattr(hub, 'hf_hub_download', lambda name, file, **kwargs: str(tmp_path / file))
    assert PPATDLight.from_pretrained('owner/name').upscale == 2


def test_without_the_package(tmp_path):
    script = f"""if True:
        import sys
        sys.modules['huggingface_hub'] = None
        from ppsr.archs import PPATDLight
        from ppsr.errors import UserError
        net = PPATDLight.from_pretrained('PPATDLight_x2')
        for attempt in (lambda: net.save_pretrained({str(tmp_path)!r}), lambda: net.from_pretrained('a/b')):
            try:
                attempt()
            except UserError as error:
                print(error)
    """
    result = subprocess.run([sys.executable, '-W', 'ignore', '-c', script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("pip install 'ppsr[hub]'") == 2 and not list(tmp_path.iterdir())
