"""``ppsr train --processes N``: what torch starts is spoken for by one, and stops and goes on like one."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from processes import Process
from tiny_training import Training, assert_same_weights, free_port, options, write_options, write_pairs

from ppsr.training import processes as module
from ppsr.training.processes import suggestion

HEAD = 'import os, signal, sys, time\nrank = os.environ["RANK"]\n'


def program(tmp_path, body: str, count: int = 2, environment=None, patience=30) -> Process:
    """`count` processes that run a few lines of Python, which need no torch."""
    script = tmp_path / 'program.py'
    script.write_text(HEAD + body)
    run = f'from ppsr.training import processes as p\np.PATIENCE = {patience}\n'
    run += f'raise SystemExit(p.start_processes([{sys.executable!r}, {str(script)!r}], {count}))'
    return Process(run, cwd=tmp_path, environment=environment)


def test_processes_are_told_what_torchrun_tells(tmp_path):
    names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR OMP_NUM_THREADS'
    body = f'open(rank, "w").write(" ".join(os.environ[n] for n in "{names}".split()))\nprint("said", rank)'
    run = program(tmp_path, body, 3, {'OMP_NUM_THREADS': '5'})
    assert run.wait() == 0
    assert [(tmp_path / str(rank)).read_text() for rank in range(3)] == [f'{r} {r} 3 3 127.0.0.1 5' for r in range(3)]
    assert run.stdout == b'said 0\n'
    assert program(tmp_path, body, 2, {'OMP_NUM_THREADS': ''}).wait() == 0
    assert (tmp_path / '0').read_text().endswith(f' {max(1, module.cores() // 2)}')


def test_an_error_of_all_is_told_once(tmp_path):
    run = program(tmp_path, 'print("ppsr: error: no such file.", file=sys.stderr)\nsys.exit(2)')
    assert run.wait() == 2
    assert run.stderr == b'ppsr: error: no such file.\n'


def test_a_traceback_of_another_process_is_shown(tmp_path):
    run = program(
        tmp_path, 'if rank == "1":\n    raise ZeroDivisionError("of mine")\nsys.exit("ppsr: error: process 1 failed.")'
    )
    assert run.wait() == 1
    text = run.stderr.decode()
    assert text.startswith('ppsr: error: process 1 failed.\nppsr: process 1:\nTraceback')
    assert text.endswith('ZeroDivisionError: of mine\n')


def test_a_killed_process_ends_all(tmp_path):
    body = 'if rank == "1":\n    os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)'
    run, start = program(tmp_path, body, patience=0.2), time.monotonic()
    assert run.wait() == 128 + signal.SIGKILL
    assert time.monotonic() - start < 30
    assert b'ppsr: error: process 1 was ended by SIGKILL, and the others with it' in run.stderr


WAITING = """
def stop(number, frame):
    time.sleep(0.3 * (1 - int(rank)))  # the first one still saves
    print("stopped", rank, flush=True)
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
open(rank, "w").close()
while True:
    time.sleep(0.01)
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_signals_reach_all_and_the_slowest_is_waited_for(tmp_path, number):
    run = program(tmp_path, WAITING)
    run.until(lambda: (tmp_path / '0').exists() and (tmp_path / '1').exists())
    os.kill(run.pid, number)
    assert run.wait() == 128 + number
    assert run.stdout == b'stopped 0\n' and run.stderr == b''


def test_a_second_interrupt_kills(tmp_path):
    body = 'signal.signal(signal.SIGINT, lambda *_: open("noted" + rank, "w").close())\n'
    body += 'open(rank, "w").close()\ntime.sleep(60)'
    run = program(tmp_path, body)
    run.until(lambda: (tmp_path / '0').exists() and (tmp_path / '1').exists())
    os.kill(run.pid, signal.SIGINT)
    run.until(lambda: (tmp_path / 'noted0').exists() and (tmp_path / 'noted1').exists())
    os.kill(run.pid, signal.SIGINT)
    assert run.wait() == 130
    assert run.stderr == b'ppsr: interrupted.\n'


@pytest.mark.parametrize(
    'cores, batch, expected',
    [(2, 2, (2, 1)), (2, 3, None), (8, 4, (4, 1)), (6, 4, (4, 1)), (1, 4, None), (16, 1, None)],
)
def test_suggestion(monkeypatch, cores, batch, expected):
    monkeypatch.setattr(module, 'cores', lambda: cores)
    monkeypatch.setattr(module.torch, 'get_num_threads', lambda: 64)
    text = suggestion(batch)
    if expected is None:
        assert text is None
    else:
        count, each = expected
        assert f'--processes {count}' in text and f'batch_size_per_gpu={each} ' in text


def test_mistakes_are_told_before_anything_starts(tmp_path):
    write_pairs(tmp_path / 'data', 2)
    write_options(tmp_path, options(tmp_path / 'data'))
    for arguments, said in [
        (['--processes', '2', '--launcher', 'pytorch'], '--processes starts the processes itself'),
        (['--processes', '0'], 'not a whole number from 1'),
        (['--processes', '2', '--force_yml', 'datasets:train:batch_size_per_gpu=0'], 'batch_size_per_gpu'),
    ]:
        run = Training(tmp_path, *arguments)
        assert run.wait() == 2
        assert said in run.text and len(run.text.splitlines()) == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_stopped_and_resumed_like_torchrun_bit_for_bit(tmp_path):
    """Two processes by one command, ended with SIGTERM and resumed, train what two of torchrun's train at one go."""
    write_pairs(tmp_path / 'data', 7)
    opt = options(tmp_path / 'data', train__total_iter=24, logger__print_freq=1)
    for name in ('torchrun', 'ours'):
        write_options(tmp_path / name, opt)
    environment = {'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    pair = [
        Training(
            tmp_path / 'torchrun',
            '--launcher',
            'pytorch',
            environment=environment | {'RANK': str(rank), 'LOCAL_RANK': str(rank)},
            output=f'output{rank}.txt',
        )
        for rank in range(2)
    ]
    assert [process.wait() for process in pair] == [0, 0]
    command = [sys.executable, '-m', 'ppsr', 'train', '-opt', 'options.yml', '--processes', '2']
    texts = []
    for arguments in ([], ['--auto_resume']):
        output = tmp_path / f'output{len(texts)}.txt'
        with open(output, 'w') as file:
            run = subprocess.Popen(
                [*command, *arguments],
                cwd=tmp_path / 'ours',
                stdout=file,
                stderr=file,
                env=os.environ | {'OMP_NUM_THREADS': '1'},
            )
        if not arguments:
            end = time.monotonic() + 120
            while not re.search(r'iter: +5\b', output.read_text()):
                assert run.poll() is None and time.monotonic() < end, output.read_text()
                time.sleep(0.02)
            run.send_signal(signal.SIGTERM)
        code = run.wait(120)
        texts.append(output.read_text())
        assert code == (0 if arguments else 143), texts[-1]
    assert texts[0].count('ppsr: stopped by SIGTERM') == 1 and 'Traceback' not in texts[0]
    assert '2 processes with 2 pictures each, a batch of 4 in all' in texts[0]
    assert_same_weights(tmp_path / 'ours', tmp_path / 'torchrun')
