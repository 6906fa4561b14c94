"""Runs that are interrupted, and the command."""

import functools
import os
import resource
import signal
import sys

import pytest

av = pytest.importorskip('av')

from processes import Process  # noqa: E402
from video_cases import clip, moving, read, wait_in_the_eighth_frame  # noqa: E402

from ppsr.archs import PPATDLight  # noqa: E402
from ppsr.cli import main  # noqa: E402
from ppsr.pictures.upscaler import Upscaler  # noqa: E402
from ppsr.weights import save_checkpoint  # noqa: E402

FRAMES, SEGMENT = 10, 3


@pytest.fixture
def command(tmp_path, tiny):
    """The command on a clip, without the output."""
    weights = tmp_path / 'in' / 'tiny.safetensors'
    weights.parent.mkdir()
    save_checkpoint(weights, PPATDLight(**tiny).state_dict(), {'type': 'PPATDLight', **tiny})
    source = clip(tmp_path / 'in' / 'a.mp4', moving(FRAMES), sound='aac')
    words = ['video', '-i', source, '--model-path', weights, '--device', 'cpu', '--segment', SEGMENT]
    return [*map(str, words), '-o']


@pytest.fixture
def computed(monkeypatch):
    """Counts the frames that are enlarged in this process."""
    frames, real = [], Upscaler.upscale_with_stats

    def counted(self, *args, **options):
        frames.append(args)
        return real(self, *args, **options)

    monkeypatch.setattr(Upscaler, 'upscale_with_stats', counted)
    return frames


def _begin(command, target):
    """A process that has done two runs of frames and hangs in the third, and its hidden folder."""
    process = Process([*command, target], prepare=functools.partial(wait_in_the_eighth_frame, 600))
    process.until(lambda: b'waiting' in process.stderr)
    assert process.alive, process.stderr
    (folder,) = target.parent.glob('.ppsr-video-*')
    return process, folder


def test_a_killed_run_goes_on_where_it_was_and_gives_the_same_file(tmp_path, command, computed, capsys):
    whole, target = tmp_path / 'whole.mp4', tmp_path / 'b.mp4'
    assert main([*command, str(whole)]) == 0
    assert len(computed) == FRAMES
    process, folder = _begin(command, target)
    assert main([*command, str(target)]) == 2  # while it works
    assert 'unfinished b.mp4 is in use by process' in capsys.readouterr().err
    process.kill()
    assert not target.exists() and folder.is_dir()
    computed.clear()
    assert main([*command, str(target)]) == 0
    assert len(computed) == FRAMES - 2 * SEGMENT
    said = capsys.readouterr()
    assert '6 frames are done; going on' in said.err and '6 of them by an earlier run' in said.out
    assert target.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ['b.mp4', 'in', 'whole.mp4']


def test_ctrl_c_says_how_to_go_on_and_a_damaged_part_is_made_again(tmp_path, command, computed, capsys):
    target = tmp_path / 'b.mp4'
    process, folder = _begin(command, target)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert b'6 frames of b.mp4 are done; the same command goes on from there.' in process.stderr
    assert not target.exists() and sorted(os.listdir(folder)) == ['000000.npz', '000001.npz', 'about.json']

    second = folder / '000001.npz'
    data = second.read_bytes()
    second.write_bytes(data[: len(data) // 2] + bytes(8) + data[len(data) // 2 + 8 :])
    assert main([*command, str(target), '--crf', '20']) == 0  # other frames: nothing of it can be used
    assert f'{folder} holds parts of b.mp4 with other options' in capsys.readouterr().err
    assert len(computed) == FRAMES and folder.is_dir()
    computed.clear()
    assert main([*command, str(target), '--overwrite']) == 0
    assert len(computed) == FRAMES - SEGMENT and not folder.exists()
    assert len(read(target)[0]) == FRAMES


def test_what_exists_is_kept_unless_told_otherwise(tmp_path, command, computed, capsys):
    target = tmp_path / 'b.mp4'
    target.write_text('made earlier')
    assert main([*command, str(target)]) == 0
    assert 'b.mp4 exists and is kept (--overwrite replaces it)' in capsys.readouterr().out
    assert target.read_text() == 'made earlier' and computed == []
    assert main([*command, str(target), '--overwrite', '--end', '0:00:00.1', '-t', '24', '--tile-overlap', '8']) == 0
    assert '3 frames of 96×64' in capsys.readouterr().out
    assert len(read(target)[0]) == 3


def _no_large_files():
    resource.setrlimit(resource.RLIMIT_FSIZE, (15_000, 15_000))


def test_a_full_disk_is_a_sentence_and_what_is_done_stays(tmp_path, command):
    target = tmp_path / 'b.mp4'
    process = Process([*command, target], prepare=_no_large_files)
    assert process.wait() == 2
    lines = process.stderr.decode().splitlines()
    assert lines[-1] == f'ppsr: error: {target} cannot be written: File too large.'
    assert f'{FRAMES} frames of b.mp4 are done; the same command goes on from there.' in lines
    assert not target.exists() and sorted(path.name for path in tmp_path.iterdir() if path.name[0] != '.') == ['in']
    assert main([*command, str(target)]) == 0
    assert len(read(target)[0]) == FRAMES


def test_words_that_are_wrong(tmp_path, command, capsys, monkeypatch):
    for words, sentence in (
        (['--start', 'soon'], 'no time; give seconds, MM:SS or HH:MM:SS'),
        (['--start', '1:75'], 'no time; give seconds, MM:SS or HH:MM:SS'),
        (['--crf', '64'], 'not a number from 0 to 63'),
        (['--start', '3', '--end', '2'], '--start 0:00:03 is not before --end 0:00:02'),
        (['--leave-out', 'music'], 'no stream music; --leave-out takes audio, subtitles, or numbers from 0 to 1'),
        (['-s', '1000'], 'not a number from 0.01 to 100'),
    ):
        assert main([*command, str(tmp_path / 'b.mp4'), *words]) == 2
        assert sentence in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, 'av', None)
    assert main([*command, str(tmp_path / 'b.mp4')]) == 2
    assert "pip install 'ppsr[video]'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['in']
