"""docs/your_own_network.md: its example runs as it stands there, and keeps what the text promises."""

import re

import pytest
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from flop_counter import flop_counter
from support import REPOSITORY

from ppsr.archs.build import build_network
from ppsr.weights import load_model, save_checkpoint


@pytest.fixture
def example(capsys):
    """What the example defines, and what it prints."""
    text = (REPOSITORY / 'docs' / 'your_own_network.md').read_text('utf-8')
    (code,) = re.findall(r'```python\n(.*?)```', text, re.DOTALL)
    space = {'__name__': 'example'}
    exec(compile(code, 'docs/your_own_network.md', 'exec'), space)
    yield space, capsys.readouterr().out
    del ARCH_REGISTRY._obj_map['PPTinySR']


def test_it_runs_and_saves(example):
    space, said = example
    assert said.startswith('(1, 3, 160, 224), ')
    pure, saved = map(int, re.findall(r'(\d+)%', said))
    assert pure > 30 and saved > 5


def test_the_count_is_that_of_what_is_executed(example):
    space, _ = example
    for compensation in ('value', 'mean', 'linear'):
        net = space['PPTinySR'](pp_mask='variance', pp_window_compensation=compensation).eval()
        with torch.no_grad(), flop_counter() as counter:
            _, mask = net(space['lq'], return_mask=True)
        macs = net.macs(40, 56, mask)
        assert 0 < mask.float().mean() < 1
        assert 2 * (sum(macs.values()) - macs['mask']) == counter.get_total_flops()


def test_without_a_pure_pixel_it_is_the_network_itself(example):
    space, _ = example
    net, dense = space['PPTinySR']().eval(), space['TinySR']().eval()
    dense.load_state_dict(net.state_dict())
    noise = torch.rand(1, 3, 15, 19)
    with torch.no_grad():
        output, mask = net(noise, return_mask=True)
        assert not mask.any() and torch.equal(output, dense(noise))


def test_files_and_options_know_it(example, tmp_path):
    space, _ = example
    net = build_network({'type': 'PPTinySR', 'upscale': 2, 'pp_window_compensation': 'linear'})
    config = {'type': 'PPTinySR', 'upscale': 2}
    save_checkpoint(tmp_path / 'tiny.safetensors', net.state_dict(), config)
    loaded = load_model(tmp_path / 'tiny.safetensors', arch='PPTinySR')
    assert loaded.blocks[0].comp is not None and not [name for name in loaded.state_dict() if 'comp.' in name]


@pytest.mark.parametrize(
    'page', sorted(REPOSITORY.glob('docs/*.md')) + [REPOSITORY / 'README.md'], ids=lambda p: p.name
)
def test_examples_import_basicsr_behind_ppsr(page):
    """Alone basicsr does not import on today's torchvision; here it has been imported long before."""
    for block in re.findall(r'^```python\n(.*?)^```', page.read_text('utf-8'), re.MULTILINE | re.DOTALL):
        imported = re.findall(r'^(?:>>> )?(?:import|from) (\w+)', block, re.MULTILINE)
        assert 'basicsr' not in imported or 'ppsr' in imported[: imported.index('basicsr')]
