"""The command line's frame, `ppsr doctor`, and what the process sets up for itself."""

import importlib
import sys

import pytest
from processes import Process

from ppsr.cli import COMMANDS, main
from ppsr.ops import native


@pytest.mark.parametrize('command', COMMANDS)
def test_every_command_has_help(command, capsys):
    assert main([command, '--help']) == 0
    assert f'ppsr {command}' in capsys.readouterr().out
    module = importlib.import_module(f'ppsr.cli.{command}')
    assert callable(module.configure) and callable(module.run)


@pytest.mark.parametrize('argv', [[], ['uspcale'], ['train'], ['train', '-opt'], ['doctor', '--loud']], ids=str)
def test_wrong_words_exit_with_2(argv, capsys):
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith('ppsr: error: ') and said.count('\n') == 1


def test_doctor_finds_this_installation_well(capsys):
    assert main(['doctor']) == 0
    text = capsys.readouterr().out
    for word in (
        'torch ',
        'basicsr',
        '1.4.2',
        'reference',
        'native',
        'triton',
        'functional_tensor',
        'PPATDLight_x4',
    ):
        assert word in text, word
    if native.unavailable_reason() is None:
        assert f'instruction set {native.target()}, of {", ".join(native.targets())} on this processor' in text
        assert ('bf16: avx512_bf16' in text) == (native.bf16_target() == 'avx512_bf16')
        assert 'bf16: ' in text
    assert text.endswith('All well.\n')


def test_doctor_reports_an_import_that_fails(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, 'basicsr.models', None)
    assert main(['doctor']) == 1
    assert 'IMPORT FAILS' in capsys.readouterr().out


@pytest.mark.parametrize('off', ['', '1'], ids=['tuned', 'switched off'])
def test_the_command_line_tunes_its_process_and_only_that(off):
    code = """
import torch, ppsr.runtime
done = ppsr.runtime.tune_process()
print(len(done), float(torch.tensor([1e-40]) * 1.0) == 0.0)
"""
    process = Process(code, environment={'PPSR_NO_TUNING': off})
    assert process.wait() == 0, process.stderr
    count, flushed = process.stdout.decode().split()
    if off:
        assert (count, flushed) == ('0', 'False')
    else:
        assert int(count) >= 1 and flushed == 'True'
