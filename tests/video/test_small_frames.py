"""Small frames side by side: the file, the figures, the sentences and what is kept are those of one after another."""

import dataclasses
import signal
import threading
from fractions import Fraction

import numpy as np
import pytest
import torch

av = pytest.importorskip('av')

from processes import Process  # noqa: E402
from support import needs_kernels  # noqa: E402
from video_cases import cartoon, clip, moving, read, samples, wait_in_the_eighth_frame  # noqa: E402

from ppsr.archs import PPATDLight  # noqa: E402
from ppsr.cli import main  # noqa: E402
from ppsr.errors import UserError  # noqa: E402
from ppsr.pictures import memory  # noqa: E402
from ppsr.pictures.upscaler import Upscaler  # noqa: E402
from ppsr.runtime import threads  # noqa: E402
from ppsr.video import enlarge, upscale_video  # noqa: E402
from ppsr.weights import save_checkpoint  # noqa: E402

pytestmark = [needs_kernels, pytest.mark.usefixtures('two_threads')]


@pytest.fixture
def said():
    return []


@pytest.fixture
def upscaler(tiny, said):
    torch.manual_seed(0)
    return Upscaler(PPATDLight(**tiny), device='cpu', say=said.append)


@pytest.fixture
def computed(monkeypatch):
    """(H, W, C) pictures that are enlarged, and whether in another thread."""
    pictures, real = [], Upscaler.upscale_with_stats

    def counted(self, image, **options):
        pictures.append((image, threading.current_thread() is not threading.main_thread()))
        return real(self, image, **options)

    monkeypatch.setattr(Upscaler, 'upscale_with_stats', counted)
    return pictures


def alone(run):
    with threads(1):
        return run()


def figures(stats):
    return dataclasses.replace(stats, seconds=0.0)


def content(path):
    """Times and samples."""
    times, frames, _ = read(path)
    return times, [[plane.tobytes() for plane in samples(frame)] for frame in frames]


def both(upscaler, source, folder, **options):
    """Statistics, the same of one after another and of side by side; their frames are equal."""
    one, two = folder / 'one.mkv', folder / 'two.mkv'
    stats = alone(lambda: upscale_video(upscaler, source, one, codec='ffv1', **options))
    together = upscale_video(upscaler, source, two, codec='ffv1', **options)
    assert figures(stats) == figures(together)
    assert content(one) == content(two) and content(two)[0] == content(source)[0]
    return together


@pytest.mark.parametrize('case', ['noise', 'gray', 'resized', 'one segment each'])
def test_bit_for_bit_in_order(tmp_path, upscaler, pools, computed, case):
    upscaler.outscale = 1.5 if case == 'resized' else 2.0
    pictures = moving(11)
    pictures[3][:16] = pictures[7][:] = 90  # much is pure, and takes less time
    times = [20, 21, 25, 26, 30, 31, 33, 100, 101, 102, 103]
    options = dict(codec='ffv1', pix_fmt='gray', options={}) if case == 'gray' else {}
    source = clip(tmp_path / 'a.mkv', pictures, times=times, unit=Fraction(1, 1000), **options)
    stats = both(upscaler, source, tmp_path, segment=1 if case == 'one segment each' else 4)
    assert pools == [2] and [aside for _, aside in computed] == [False] * 11 + [True] * 11
    assert stats.frames == 11 and stats.repeated == 0 and stats.tiles == 11 and stats.gmacs == stats.full_gmacs > 0


def test_what_repeats_is_enlarged_once(tmp_path, upscaler, pools, computed, monkeypatch):
    monkeypatch.setattr(enlarge, 'MOST_REPEATED', 4)  # stills are handed on in parts
    pictures = [*cartoon(6, (32, 48)), *(11 * cartoon(1, (32, 48))), *cartoon(4, (32, 48))]
    source = clip(tmp_path / 'a.mkv', pictures)
    stats = both(upscaler, source, tmp_path, segment=5)
    new = 3 + 1 + 1  # the still is the first of what follows
    assert pools == [2] and len(computed) == 2 * new
    assert (stats.frames, stats.repeated, stats.tiles, stats.reused) == (21, 21 - new, 21, 21 - new)
    assert stats.gmacs / stats.full_gmacs == pytest.approx(new / 21, rel=0.01)


def test_other_samples_of_the_same_colours_repeat(tmp_path, upscaler, pools, computed):
    """Darker than black is black."""
    frames = []
    for luma in (16, 12, 12, 40, 30, 14):
        frame = av.VideoFrame(48, 32, 'gray')
        np.frombuffer(frame.planes[0], np.uint8)[:] = luma
        frames.append(frame)
    source = clip(tmp_path / 'a.mkv', frames, codec='ffv1', pix_fmt='gray', options={}, tags={'color_range': 1})
    stats = both(upscaler, source, tmp_path)
    assert pools == [2] and len(computed) == 2 * 4 and stats.repeated == 2


def broken(monkeypatch, picture, error):
    """Upscaling this one raises."""
    real = Upscaler.upscale_with_stats

    def run(self, image, **options):
        if np.array_equal(image, picture):
            self.say('It is about to fail.')
            raise error
        return real(self, image, **options)

    monkeypatch.setattr(Upscaler, 'upscale_with_stats', run)


def test_an_error_in_the_middle_is_the_same_and_what_is_before_it_is_kept(
    tmp_path, upscaler, said, pools, computed, monkeypatch
):
    source = clip(tmp_path / 'a.mkv', moving(12))
    whole = tmp_path / 'whole.mkv'
    upscale_video(upscaler, source, whole, segment=3, codec='ffv1')
    with enlarge.Source(source, print) as video:
        eighth = [frame.rgb() for frame in video.frames()][7]
    threads, outcomes = threading.active_count(), []
    for name, run in (('one', alone), ('two', lambda run: run())):
        target = tmp_path / name / 'b.mkv'
        with monkeypatch.context() as patch:
            broken(patch, eighth, UserError('The network gives values that are not finite.'))
            with pytest.raises(UserError, match='^The network gives values that are not finite.$'):
                run(lambda: upscale_video(upscaler, source, target, segment=3, codec='ffv1'))  # noqa: B023
        (folder,) = target.parent.iterdir()
        outcomes.append((said.copy(), sorted(path.name for path in folder.glob('*.npz'))))
        said.clear()
        assert upscale_video(upscaler, source, target, segment=3, codec='ffv1').resumed == 6
        assert said.pop() == '6 frames are done; going on.'
        assert content(target) == content(whole)
    assert outcomes[0] == outcomes[1]
    sentences, segments = outcomes[1]
    assert sentences[0] == 'It is about to fail.' and sentences[1].startswith('6 frames of b.mkv are done')
    assert len(sentences) == 2 and len(segments) == 2
    assert threading.active_count() == threads


def test_what_cannot_be_read_comes_in_its_turn(tmp_path, upscaler, said, pools):
    """The sixth frame has another size; it is read while the third is being enlarged."""
    source = tmp_path / 'a.h264'
    parts = [clip(tmp_path / f'{n}', moving(5, size), container='h264') for n, size in enumerate([(32, 48), (48, 64)])]
    source.write_bytes(b''.join(part.read_bytes() for part in parts))
    sentences = []
    for name, run in (('one', alone), ('two', lambda run: run())):
        target = tmp_path / name / 'b.mp4'
        with pytest.raises(UserError, match=r'from 48×32 to 64×48 pixels; .*--start 0:00:00.2\.$') as error:
            run(lambda: upscale_video(upscaler, source, target, segment=1))  # noqa: B023
        sentences.append((str(error.value), *said))
        said.clear()
    assert pools == [2] and sentences[0] == sentences[1]
    assert sentences[0][1].startswith('5 frames of b.mp4 are done')


def test_memory_for_one_is_for_one(tmp_path, tiny, pools, monkeypatch):
    source = clip(tmp_path / 'a.mkv', moving(3))
    one = enlarge.side_by_side._bytes(Upscaler(PPATDLight(**tiny), device='cpu'), (32, 48))
    monkeypatch.setattr(memory, 'used_memory', lambda device: 0)
    for times, expected in ((1.5, []), (4.0, [2])):
        upscaler = Upscaler(PPATDLight(**tiny), device='cpu', max_memory=int(times * one))
        assert upscale_video(upscaler, source, tmp_path / f'{times}.mp4').tile == 0
        assert pools == expected


def test_tiles_and_single_frames_go_one_after_another(tmp_path, upscaler, pools, computed):
    source = clip(tmp_path / 'a.mkv', cartoon(3, (48, 64)))
    upscaler.tile, upscaler.tile_overlap = 32, 8
    stats = upscale_video(upscaler, source, tmp_path / 'b.mp4')
    assert stats.tiles == 3 * 6 and stats.reused > 6  # of the third frame those that did not change, too
    upscaler.tile = 64  # as large as a frame
    assert upscale_video(upscaler, source, tmp_path / 'c.mp4', end=Fraction(1, 24)).frames == 1
    assert pools == [] and not any(aside for _, aside in computed)
    upscale_video(upscaler, source, tmp_path / 'd.mp4')
    assert pools == [2]


def test_where_memory_did_not_suffice_the_rest_goes_one_after_another(
    tmp_path, upscaler, said, pools, computed, monkeypatch
):
    source = clip(tmp_path / 'a.mkv', moving(11))
    upscaler.tile_overlap = 8
    real, calls = Upscaler._run, []

    def short(self, net, lq, totals):
        calls.append(lq.shape)
        if len(calls) == 3:
            raise MemoryError
        return real(self, net, lq, totals)

    monkeypatch.setattr(Upscaler, '_run', short)
    stats = upscale_video(upscaler, source, tmp_path / 'b.mp4')
    assert said == ['Out of memory with the whole image: trying 24.']
    asides = [aside for _, aside in computed]
    assert pools == [2] and 3 <= asides.index(False) <= 8 and not any(asides[asides.index(False) :])
    assert stats.frames == 11 == len(read(tmp_path / 'b.mp4')[0]) and stats.tiles > 11 + 5 * asides.count(False)


def test_interrupted_nothing_more_is_begun_and_the_next_run_goes_on(tmp_path, upscaler, said, pools, computed):
    source = clip(tmp_path / 'a.mkv', moving(16))
    whole, target, threads = tmp_path / 'whole.mkv', tmp_path / 'b.mkv', threading.active_count()
    alone(lambda: upscale_video(upscaler, source, whole, segment=3, codec='ffv1'))
    real, handed = enlarge.Encoder.frame, []

    def interrupted(*args):
        handed.append(args)
        if len(handed) == 8:
            raise KeyboardInterrupt
        return real(*args)

    computed.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(enlarge.Encoder, 'frame', interrupted)
        with pytest.raises(KeyboardInterrupt):
            upscale_video(upscaler, source, target, segment=3, codec='ffv1')
    assert 8 <= len(computed) <= 8 + 2 * 2 and threading.active_count() == threads
    assert said.pop() == '6 frames of b.mkv are done; the same command goes on from there.' and not target.exists()
    assert upscale_video(upscaler, source, target, segment=3, codec='ffv1').resumed == 6
    assert content(target) == content(whole) and pools == [2, 2]


def _two_threads_and_a_slow_eighth_frame():
    torch.set_num_threads(2)
    wait_in_the_eighth_frame(3)


def test_ctrl_c_while_the_command_waits_for_a_frame(tmp_path, tiny, capsys):
    weights, target = tmp_path / 'in' / 'tiny.safetensors', tmp_path / 'b.mp4'
    weights.parent.mkdir()
    save_checkpoint(weights, PPATDLight(**tiny).state_dict(), {'type': 'PPATDLight', **tiny})
    source = clip(tmp_path / 'in' / 'a.mkv', moving(16))
    command = ['video', '-i', source, '--model-path', weights, '--device', 'cpu', '--segment', '3', '-o', target]
    process = Process(command, prepare=_two_threads_and_a_slow_eighth_frame)
    process.until(lambda: b'waiting' in process.stderr and [*tmp_path.glob('.ppsr-video-*/000001.npz')])
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert b'frames of b.mp4 are done; the same command goes on from there.' in process.stderr
    assert not target.exists()
    assert main(list(map(str, command))) == 0
    assert '6 frames are done; going on' in capsys.readouterr().err
    assert len(read(target)[0]) == 16
