"""What holds for every command, taken from the one list of them: numbers have ranges, options said twice add up or are
refused, and no state of the standard streams and no signal makes a traceback."""

import argparse
import os
import signal
import subprocess
import sys
import time

import pytest
from processes import Process
from support import REPOSITORY

from ppsr.cli import COMMANDS, build_parser, main
from ppsr.cli.numbers import Number


def options(command: str) -> list[argparse.Action]:
    """The options of a command that take values."""
    top = build_parser(command)
    sub = next(action for action in top._actions if isinstance(action, argparse._SubParsersAction)).choices[command]
    return [action for action in sub._actions if action.option_strings and action.nargs != 0]


def words(action: argparse.Action, value: str | None = None) -> list[str]:
    """The option with as many values as it wants."""
    if value is None:
        value = str(action.type.low) if isinstance(action.type, Number) else next(iter(action.choices or ['1']))
    return [action.option_strings[-1], *([value] * (action.nargs if isinstance(action.nargs, int) else 1))]


@pytest.mark.parametrize('command', COMMANDS)
def test_every_number_has_a_range(command, capsys):
    for action in options(command):
        assert action.type not in (int, float), f'{action.option_strings}: give it a ppsr.cli.numbers.Number'
        if not isinstance(action.type, Number):
            continue
        low, high = action.type.low, action.type.high
        for bad in (f'{low - 1:g}', f'{high * 2:.0f}', '9' * 400, 'nan', 'inf', '1e999', 'ten', ''):
            assert main([command, *words(action, bad)]) == 2
            said = capsys.readouterr().err
            assert said.startswith('ppsr: error: ') and said.count('\n') == 1 and len(said) < 300
            assert action.option_strings[-1] in said and 'number from' in said
        kind = type(low)
        assert action.type(str(low)) == low and action.type(str(high)) == high and kind is type(action.type(str(high)))


@pytest.mark.parametrize('command', COMMANDS)
def test_options_said_twice_add_up_or_are_refused(command, capsys):
    every = options(command)
    for action in every:
        needed = [word for other in every if other.required and other is not action for word in words(other)]
        line = [command, *needed, *words(action), *words(action)]
        if action.nargs in ('+', '*'):
            found = getattr(build_parser(command).parse_args(line), action.dest)
            once = getattr(build_parser(command).parse_args([command, *needed, *words(action)]), action.dest)
            assert len(once) == 1 and found == once * 2  # and nothing of the default values
        else:
            assert main(line) == 2
            said = capsys.readouterr().err
            assert action.option_strings[-1] in said and 'given twice' in said and said.count('\n') == 1


def test_a_line_is_parsed_anew_each_time():
    for _ in range(2):
        args = build_parser('upscale').parse_args(['upscale', '-i', 'a', '-o', 'b', '-i', 'c', 'd'])
        assert args.input == ['a', 'c', 'd'] and args.output == 'b'


# ----------------------------------------------------------------------------------------------------------- streams


STREAMS = {
    '>/dev/full': 'No space left on device',
    '>&-': 'Standard output is closed',
    '2>&-': '',
    '2>/dev/full': '',
    '<&-': '',
}


@pytest.mark.parametrize('shell', STREAMS)
def test_streams_that_are_full_or_closed(shell):
    """From start to end of a real interpreter, as a shell starts it."""
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY)}
    command = ['bash', '-c', f'exec "$@" {shell}', 'bash', sys.executable, '-m', 'ppsr_command', '--help']
    done = subprocess.run(command, env=environment, capture_output=True, timeout=120)
    _check_streams(shell, done.returncode, done.stderr.decode())


@pytest.mark.parametrize('shell', STREAMS)
def test_streams_that_are_full_or_closed_under_a_command(shell):
    process = Process(['doctor'], shell=shell)
    _check_streams(shell, process.wait(), process.stderr.decode())


def _check_streams(shell, code, error):
    said = STREAMS[shell]
    assert error.count('\n') == bool(said) and said.lower() in error.lower(), error
    assert code == bool(said)


def test_head_is_no_error():
    done = subprocess.run(
        ['bash', '-c', f'set -o pipefail; {sys.executable} -m ppsr_command --help | head -c 1'],
        env=os.environ | {'PYTHONPATH': str(REPOSITORY)},
        capture_output=True,
        timeout=60,
    )
    assert done.stderr == b'' and done.stdout == b'u'


@pytest.mark.parametrize('encoding', ['ascii', 'latin-1', 'cp1252', 'utf-8:strict'])
def test_every_sign_can_be_shown(encoding):
    code = """
import os, sys, ppsr_command
ppsr_command._open_streams()
print('4×4 – Größe 写 µ ≥', os.fsdecode(b'caf\\xe9'))
print('×', file=sys.stderr)
"""
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY), 'PYTHONIOENCODING': encoding}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, timeout=60)
    text = done.stdout.decode(encoding.split(':')[0])
    assert done.returncode == 0, done.stderr
    expected = {
        'ascii': '4x4 - Gr\\xf6\\xdfe \\u5199 \\xb5 >= caf\\udce9',
        'latin-1': '4×4 - Größe \\u5199 µ >= caf\\udce9',
        'cp1252': '4×4 – Größe \\u5199 µ >= caf\\udce9',
        'utf-8:strict': '4×4 – Größe 写 µ ≥ caf\\udce9',
    }
    assert text == expected[encoding] + '\n'


def test_help_of_every_command_on_an_ascii_terminal():
    code = """
import ppsr_command
ppsr_command._open_streams()
for command in ppsr_command.COMMANDS:
    assert ppsr_command.main([command, '--help']) == 0
assert ppsr_command.main(['doctor']) == 0
"""
    process = Process(code, encoding='ascii')
    assert process.wait() == 0 and process.stderr == b'', process.stderr
    assert all(f'usage: ppsr {command} ' in process.stdout.decode('ascii') for command in COMMANDS)


def test_help_needs_no_torch():
    """Seconds, for a list of words."""
    code = """
import sys, ppsr_command
for line in (['--help'], ['--version'], ['uspcale'], []):
    ppsr_command.main(line)
assert not {'torch', 'basicsr', 'numpy', 'ppsr'} & sys.modules.keys(), sys.modules.keys()
"""
    environment = os.environ | {'PYTHONPATH': str(REPOSITORY)}
    done = subprocess.run([sys.executable, '-c', code], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------- signals


@pytest.fixture
def waiting_command(monkeypatch):
    """`ppsr doctor` sends this process the signals it is given, and would go on if nothing came of it."""
    from ppsr.cli import doctor

    def command(*numbers):
        def run(args):
            for number in numbers:
                os.kill(os.getpid(), number)
            time.sleep(0.01)
            return 0

        monkeypatch.setattr(doctor, 'run', run)
        return main(['doctor'])

    return command


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_signals_unwind(waiting_command, number, capsys):
    before = signal.getsignal(number)
    assert waiting_command(number) == 128 + number
    said = capsys.readouterr().err
    assert said.startswith('ppsr: ') and said.count('\n') == 1
    assert signal.getsignal(number) is before


def test_nohup_is_respected(waiting_command):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert waiting_command(signal.SIGHUP) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_the_machine_refuses_is_a_sentence(monkeypatch, capsys):
    from ppsr.cli import doctor

    for error, said in (
        (OSError(24, 'Too many open files'), 'ppsr: error: Too many open files.\n'),
        (PermissionError(13, 'Permission denied', 'x/y'), 'ppsr: error: x/y: Permission denied.\n'),
    ):

        def run(args, error=error):
            raise error

        monkeypatch.setattr(doctor, 'run', run)
        assert main(['doctor']) == 1
        assert capsys.readouterr().err == said


# ------------------------------------------------------------------------------------------------------------- names


HOSTILE = {
    'missing': 'missing/x.png',
    'too long': 'n' * 300,
    'empty': '',
    'no UTF-8': os.fsdecode(b'caf\xe9.yml'),
    'below a file': 'file/x.safetensors',
    'a folder': 'folder',
    'a NUL': 'a\0b.png',
}


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('kind', HOSTILE)
def test_any_name_of_a_file_is_one_sentence(command, kind, tmp_path, monkeypatch, capsys):
    """Whatever an option that takes a text is given, beside values for the others that lead nowhere."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder').mkdir()
    every = options(command)
    for action in every:
        if isinstance(action.type, Number) or action.choices:
            continue
        needed = [word for other in every if other.required and other is not action for word in words(other, 'missing')]
        code = main([command, *needed, *words(action, HOSTILE[kind])])
        said = capsys.readouterr().err
        assert code in (1, 2) and said.startswith('ppsr: error: ') and said.count('\n') == 1 and len(said) < 1000, said
    assert [path.name for path in tmp_path.rglob('*') if not path.is_dir()] == ['file']


def test_interrupted_while_modules_are_imported(tmp_path):
    """Ctrl-C in the first seconds, before there is a command to tell it."""
    code = """
import sys, ppsr_command
def interrupted(name):
    raise KeyboardInterrupt
ppsr_command.importlib.import_module = interrupted
ppsr_command.entry(['upscale'])
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert (done.returncode, done.stderr) == (130, 'ppsr: interrupted.\n')
