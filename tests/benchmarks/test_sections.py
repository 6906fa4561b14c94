"""The benchmarks that docs/performance.md is made of, at sizes at which they say nothing but that they work."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip('skimage', reason='its photographs are what is measured on')
SCRIPTS = Path(__file__).parents[2] / 'benchmarks'


@pytest.fixture
def script(monkeypatch):
    """A benchmark as a module; its neighbours, whose names are common words, are forgotten again."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    names = {path.stem for path in SCRIPTS.glob('*.py')}
    before = {name: sys.modules.pop(name) for name in names & set(sys.modules)}
    yield importlib.import_module
    for name in names & set(sys.modules):
        del sys.modules[name]
    sys.modules.update(before)
    torch.set_grad_enabled(True)


@pytest.mark.slow
@pytest.mark.parametrize('section', ['forward', 'savings-window', 'training-step'])
def test_a_section_is_written_with_its_command_and_time(script, monkeypatch, tmp_path, section):
    page = tmp_path / 'performance.md'
    monkeypatch.setattr('sys.argv', ['performance.py', '--quick', '-o', str(page), '--only', section])
    script('performance').main()
    text = page.read_text()
    assert f'<!-- begin {section} -->\nMade by `python benchmarks/performance.py --quick' in text
    assert f'| `{section}` |' in text.split('<!-- begin time -->')[1]
    assert 'ATDLight' in text.split('Made by')[1]


def test_quick_figures_do_not_go_into_the_docs(script, monkeypatch, capsys):
    monkeypatch.setattr('sys.argv', ['performance.py', '--quick'])
    with pytest.raises(SystemExit):
        script('performance').main()
    assert '--quick wants -o' in capsys.readouterr().err


def test_minutes_of_sections_are_added_up(script, tmp_path):
    page = tmp_path / 'page.md'
    page.write_text(
        '<!-- begin forward -->\nMade by `x` in 1.5 minutes on a machine.\n<!-- end forward -->\n'
        '<!-- begin memory -->\nMade by `x` in 0.7 minutes on a machine.\n<!-- end memory -->\n'
        '<!-- begin old -->\nMade by `x` in 9.0 minutes on a machine.\n<!-- end old -->\n'
    )
    assert '| together | 2.2 |' in script('performance').add_up(page)


@pytest.mark.parametrize(
    'name, lacks', [('SPAN', (0, 0)), ('SAFMN', (0, 4)), ('OmniSR', (0, 0)), ('SwinIR-light', (0, 4))]
)
def test_a_peer_is_padded_only_to_what_it_needs(script, name, lacks):
    pytest.importorskip('spandrel')
    peers = script('peers')
    _, padding = peers.network(name)
    assert padding(320, 180) == lacks
    run, _ = peers.runner(name, peers.CHANNELS_LAST)
    assert run(torch.rand(1, 3, 18, 20)).shape == (1, 3, 72, 80)


def test_merged_convolutions_of_span_give_the_same(script):
    from spandrel.architectures.SPAN import SPAN

    peers, lq = script('peers'), torch.rand(1, 3, 10, 12)
    torch.manual_seed(0)  # as peers does
    plain = SPAN(num_in_ch=3, num_out_ch=3, feature_channels=48, upscale=4).eval()
    merged, _ = peers.network('SPAN')
    with torch.no_grad():
        assert torch.equal(merged(lq), plain(lq))
    assert sum(p.numel() for p in merged.parameters()) < sum(p.numel() for p in plain.parameters()) / 4


def test_what_to_take_follows_from_the_rows(script):
    rows = [
        {'name': 'SAFMN', 'seconds': 0.2, 'gib': 0.1, 'psnr': None},
        {'name': 'SwinIR-light', 'seconds': 3.0, 'gib': 0.5, 'psnr': None},
        {'name': 'ATDLight, native', 'seconds': 2.0, 'gib': 0.3, 'psnr': 32.2},
        {'name': 'bicubic, torch', 'seconds': 0.01, 'gib': 0.01, 'psnr': 28.0},
    ]
    text = script('peers').summary(rows)
    assert 'Speed above all: SAFMN (0.20 s' in text
    assert 'for each: 26.97 dB: ATDLight, native (2.00 s' in text
    assert 'at least as good and faster: SwinIR-light (3.00 s' in text
    assert 'no word here about quality: SAFMN' in text
    assert 'nothing else to download: ATDLight, native (2.00 s, 0.30 GiB), 32.20 dB on Set5' in text
    assert 'bicubic' not in text


@pytest.mark.slow
def test_the_published_class_differs_by_its_sort_alone(script):
    pytest.importorskip('spandrel')
    assert float(script('peers').sorting_note(32, 32).rstrip('.').split(' by ')[-1]) < 1e-12
