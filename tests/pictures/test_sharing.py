"""Several processes share the files of one command: each file once, results and summary as of one process."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
import torch.distributed as dist
from processes import Process
from tiny_training import free_port

from ppsr.archs import PPATDLight
from ppsr.errors import UserError
from ppsr.images import write_file
from ppsr.pictures import sharing
from ppsr.pictures.sharing import Alone, Crew, join_crew
from ppsr.pictures.upscaler import Upscaler
from ppsr.weights import save_checkpoint

PICTURES = 7


@pytest.fixture
def folder(tmp_path, tiny):
    save_checkpoint(tmp_path / 'tiny.safetensors', PPATDLight(**tiny).state_dict(), {'type': 'PPATDLight', **tiny})
    (tmp_path / 'in').mkdir()
    for number in range(PICTURES):
        image = np.random.default_rng(number).integers(0, 256, (6 + number, 9, 3), dtype=np.uint8)
        write_file(tmp_path / f'in/{number}.png', image)
    (tmp_path / 'in/damaged.png').write_bytes(b'\x89PNG\r\n\x1a\nnothing more')
    return tmp_path


def command(output):
    return ['upscale', '-i', 'in', '-o', output, '--model-path', 'tiny.safetensors', '--device', 'cpu']


def processes(folder, words, prepare=(None, None)) -> list[Process]:
    """Two processes as torchrun would start them, without its start-up time."""
    shared = {'WORLD_SIZE': '2', 'LOCAL_WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': str(free_port())}
    return [
        Process(words, folder, shared | {'RANK': str(rank), 'LOCAL_RANK': str(rank)}, prepare=prepare[rank])
        for rank in range(2)
    ]


def results(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_two_processes_do_what_one_does(folder):
    alone = Process(command('one'), folder)
    assert alone.wait() == 1  # the damaged one
    first, second = processes(folder, command('two'))
    assert (first.wait(), second.wait()) == (1, 0)
    assert results(folder / 'one') == results(folder / 'two') and len(results(folder / 'two')) == PICTURES
    said, expected = (process.stdout.decode().partition(' s;') for process in (first, alone))
    assert said[0].startswith(f'{PICTURES} images enlarged in ') and said[2].endswith('; 1 failed.\n')
    assert said[2].split('; ')[1:] == expected[2].split('; ')[1:]  # shares and multiply-adds, together
    assert second.stdout == b''
    assert (first.stderr + second.stderr).count(b'Failed: ') == 1
    # everything is there: the next run skips it, and the first process says so once for all
    first, second = processes(folder, command('two'))
    assert (first.wait(), second.wait()) == (1, 0)
    assert b'0 images enlarged in' in first.stdout and f'{PICTURES} skipped'.encode() in first.stdout


def _sleep_over_a_picture():
    upscale_file = Upscaler.upscale_file

    def slow(self, *args, **kwargs):
        print('at it', flush=True)
        time.sleep(1000)
        return upscale_file(self, *args, **kwargs)

    Upscaler.upscale_file = slow


def _wait_a_little():
    upscale_file = Upscaler.upscale_file

    def slow(self, *args, **kwargs):
        time.sleep(0.5)  # the other process gets something to do
        return upscale_file(self, *args, **kwargs)

    Upscaler.upscale_file = slow


def test_a_process_that_dies_is_named_with_its_file(folder):
    first, second = processes(folder, command('out'), (_wait_a_little, _sleep_over_a_picture))
    second.until(lambda: b'at it' in second.stdout)
    second.kill()
    assert first.wait() == 1
    lost = [line for line in first.stderr.decode().splitlines() if 'died' in line]
    assert len(lost) == 1 and lost[0].startswith('Failed: Process 1 on ') and ' is not done.' in lost[0]
    (missing,) = {f'{number}_out.png' for number in range(PICTURES)} - results(folder / 'out').keys()
    assert f'in/{missing[0]}.png' in lost[0]
    assert '2 failed.' in first.stdout.decode()
    assert main_alone(folder) == 1 and len(results(folder / 'out')) == PICTURES  # the same command goes on


def main_alone(folder):
    return Process(command('out'), folder).wait()


def test_mistakes_are_told_by_the_first_and_nobody_waits(folder):
    for words in (command('out')[:2] + ['nowhere'] + command('out')[3:], command('-')):
        both = processes(folder, words)
        assert [process.wait(60) for process in both] == [2, 2]
        said = both[0].stderr.decode()
        assert said.startswith('ppsr: error: ') and 'Traceback' not in said + both[1].stderr.decode()


def test_torchrun_itself(folder):
    launch = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node=2', '--master_port', str(free_port())]
    (folder / 'in/damaged.png').unlink()
    run = subprocess.run(
        [*launch, '-m', 'ppsr', *command('out')],
        cwd=folder,
        env=os.environ | {'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(f'{PICTURES} images enlarged') == 1 and len(results(folder / 'out')) == PICTURES


# ------------------------------------------------------------------------------------------------ one after the other


def in_threads(store, work, size=3):
    found, errors = [None] * size, [None] * size

    def run(rank):
        try:
            found[rank] = work(Crew(store, rank, size))
        except UserError as error:
            errors[rank] = str(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return found, errors


def test_each_job_goes_to_one_process_and_lists_follow_each_other():
    def work(crew):
        mine = []
        for _ in range(2):
            for job in crew.take(range(50)):
                mine.append(job)
                crew.advance(0.5)
        return crew.gather(mine)

    found, errors = in_threads(dist.HashStore(), work)
    assert errors == [None] * 3 and found[1] == found[2] == ([], [])
    parts, lost = found[0]
    assert lost == [] and Counter(sum(parts, [])) == Counter(dict.fromkeys(range(50), 2))


def test_work_of_all_is_added_up():
    found, _ = in_threads(dist.HashStore(), lambda crew: crew.advance(0.25))
    assert sorted(found) == [0.25, 0.5, 0.75]
    alone = Alone()
    assert [alone.advance(0.25), alone.advance(0.25)] == [0.25, 0.5]
    assert list(alone.take('ab')) == ['a', 'b'] and alone.gather(3) == ([3], [])


def test_the_first_answers_or_fails_for_all():
    calls = []

    def answer():
        calls.append(1)
        return len(calls)

    assert (
        in_threads(dist.HashStore(), lambda crew: (crew.from_first(answer), crew.from_first(answer)))[0] == [(1, 2)] * 3
    )

    def refuse():
        raise UserError('no such folder.')

    assert in_threads(dist.HashStore(), lambda crew: crew.from_first(refuse))[1] == ['no such folder.'] * 3


def test_a_silent_machine_counts_as_dead(monkeypatch):
    monkeypatch.setattr(sharing, 'SILENCE', 0.3)
    store = dist.HashStore()
    crew = Crew(store, 0, 2)
    other = Crew(store, 1, 2)
    other._set('who 1', ('elsewhere', 1))
    other._set('at 1', 'a.png')
    other.close()
    assert crew.gather('mine') == (['mine'], ['Process 1 on elsewhere died; a.png is not done.'])
    crew.close()


def test_torchrun_ends_all_when_one_has_died(folder):
    """SIGTERM comes to the others: the first one tells who died over which file, and ends."""
    first, second = processes(folder, command('out'), (_sleep_over_a_picture, _sleep_over_a_picture))
    for process in (first, second):
        process.until(lambda process=process: b'at it' in process.stdout)
    second.kill()
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 128 + signal.SIGTERM
    *_, lost, end = first.stderr.decode().splitlines()
    assert lost.startswith('ppsr: Process 1 on ') and '.png is not done. The same command goes on' in lost
    assert end == 'ppsr: ended by SIGTERM.'


def test_without_a_launcher_there_is_one_process(monkeypatch):
    for name in ('WORLD_SIZE', 'RANK', 'MASTER_ADDR'):
        monkeypatch.delenv(name, raising=False)
    with join_crew() as crew:
        assert crew.size == 1 and crew.is_first
    monkeypatch.setenv('WORLD_SIZE', '2')
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1')
    with pytest.raises(UserError, match='start them with torchrun'), join_crew():
        pass
