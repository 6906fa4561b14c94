"""The node folder against a stand-in of what it uses of ComfyUI."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch
from support import REPOSITORY, TINY

from ppsr.archs import PPATDLight
from ppsr.weights import list_pretrained, load_model, save_checkpoint

pytest.importorskip('spandrel')
TYPES = {'IMAGE', 'MASK', 'FLOAT', 'INT', 'BOOLEAN', 'PPSR_MODEL'}


class Interrupted(Exception):
    pass


@pytest.fixture
def comfy(tmp_path, monkeypatch):
    """Modules as ComfyUI has them; `comfy.stop` asks running work to end."""
    folders, comfy = ModuleType('folder_paths'), ModuleType('comfy')
    folders.get_filename_list = lambda kind: [path.name for path in sorted((tmp_path / kind).iterdir())]
    folders.get_full_path_or_raise = lambda kind, name: str(tmp_path / kind / name)
    comfy.model_management, comfy.utils = ModuleType('comfy.model_management'), ModuleType('comfy.utils')
    comfy.stop, comfy.progress = False, []

    def check():
        if comfy.stop:
            raise Interrupted

    class ProgressBar:
        def __init__(self, total):
            self.total = total

        def update(self, value):
            comfy.progress.append((value, self.total))

    comfy.model_management.get_torch_device = lambda: torch.device('cpu')
    comfy.model_management.unet_offload_device = lambda: torch.device('cpu')
    comfy.model_management.throw_exception_if_processing_interrupted = check
    comfy.utils.ProgressBar = ProgressBar
    for module in (folders, comfy, comfy.model_management, comfy.utils):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / 'upscale_models').mkdir()
    return comfy


@pytest.fixture
def nodes(comfy, tmp_path, monkeypatch):
    """The folder, loaded as ComfyUI loads one; with a small network among its files."""
    import spandrel

    monkeypatch.setattr(spandrel, 'MAIN_REGISTRY', spandrel.MAIN_REGISTRY.copy())
    net = PPATDLight(**TINY, pp_num_centers=3)
    save_checkpoint(
        tmp_path / 'upscale_models' / 'tiny.safetensors',
        net.state_dict(),
        {'type': 'PPATDLight', **TINY, 'pp_num_centers': 3},
    )
    folder = REPOSITORY / 'integrations' / 'comfyui'
    spec = importlib.util.spec_from_file_location(
        'nodes_of_ppsr', folder / '__init__.py', submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'nodes_of_ppsr', module)
    spec.loader.exec_module(module)
    yield module.NODE_CLASS_MAPPINGS
    sys.modules.pop('nodes_of_ppsr.nodes', None)


def call(nodes, node, **inputs):
    """As ComfyUI's executor: by FUNCTION, with every required input; a tuple as long as RETURN_TYPES."""
    node = nodes[node]()
    required = node.INPUT_TYPES()['required']
    for key, (kind, *about) in required.items():
        default = kind[0] if isinstance(kind, list) else about[0].get('default') if about else None
        inputs.setdefault(key, default)
    assert set(inputs) == set(required)
    results = getattr(node, node.FUNCTION)(**inputs)
    assert isinstance(results, tuple) and len(results) == len(node.RETURN_TYPES) == len(node.RETURN_NAMES)
    return results


def test_interface(nodes):
    for node in nodes.values():
        kinds = [kind for kind, *_ in node.INPUT_TYPES()['required'].values()]
        assert all(isinstance(kind, list) or kind in TYPES for kind in kinds)
        assert set(node.RETURN_TYPES) <= TYPES and hasattr(node, node.FUNCTION) and node.CATEGORY == 'ppsr'
    names = nodes['PPSRLoadModel'].INPUT_TYPES()['required']['name'][0]
    assert names == [*list_pretrained(), 'tiny.safetensors']


@pytest.mark.parametrize('channels', [3, 4])
def test_load_upscale_mask(nodes, comfy, tmp_path, channels):
    image = torch.rand(2, 9, 14, channels)
    image[:, :, :8, :3] = torch.tensor([0.8, 0.1, 0.1])
    (model,) = call(nodes, 'PPSRLoadModel', name='tiny.safetensors')
    enlarged, share = call(nodes, 'PPSRUpscale', model=model, image=image)
    (mask,) = call(nodes, 'PPSRMask', model=model, image=image)
    net = load_model(tmp_path / 'upscale_models' / 'tiny.safetensors')
    assert net.pure_pass.num_centers == model.pure_pass.num_centers == 3
    with torch.inference_mode():
        expected, pure = net(image[..., :3].permute(0, 3, 1, 2), return_mask=True)
    torch.testing.assert_close(enlarged[..., :3], expected.permute(0, 2, 3, 1).clamp(0, 1))
    assert enlarged.shape == (2, 18, 28, channels) and enlarged.dtype == mask.dtype == torch.float32
    assert torch.equal(mask, pure[:, :9, :14].float()) and mask.any() and not mask.all()
    assert share == pytest.approx(mask.mean().item(), abs=1e-6)
    assert comfy.progress == [(1, 2), (1, 2)]


def test_dense_another_factor_and_tiles(nodes):
    (model,) = call(nodes, 'PPSRLoadModel', name='tiny.safetensors', pure_pass=False)
    image = torch.rand(1, 20, 20, 3)
    enlarged, share = call(nodes, 'PPSRUpscale', model=model, image=image, factor=1.5, tile=16)
    assert enlarged.shape == (1, 30, 30, 3) and share == 0
    assert not call(nodes, 'PPSRMask', model=model, image=image)[0].any()


def test_an_interrupt_ends_the_work(nodes, comfy):
    (model,) = call(nodes, 'PPSRLoadModel', name='tiny.safetensors')
    comfy.stop = True
    with pytest.raises(Interrupted):
        call(nodes, 'PPSRUpscale', model=model, image=torch.rand(1, 9, 9, 3))
