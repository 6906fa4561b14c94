"""Small pictures in threads of one core: what comes out, is said and is counted is that of one after another."""

import contextlib
import threading
import time

import numpy as np
import pytest
import torch
from picture_cases import Repeat, noise, png
from PIL import Image
from support import needs_kernels

from ppsr.archs import ATDLight, PPATDLight
from ppsr.errors import UserError
from ppsr.images import from_pil
from ppsr.ops import use_backend
from ppsr.pictures import memory, side_by_side
from ppsr.pictures.batch import plan_jobs, run_jobs
from ppsr.pictures.side_by_side import SMALL, groups, in_order, stream
from ppsr.pictures.upscaler import Upscaler


@pytest.fixture
def upscaler(tiny):
    torch.manual_seed(0)
    return Upscaler(PPATDLight(**tiny), device='cpu')


def small(n, height=20, width=33):
    pictures = [noise(height, width, 3, seed=i) for i in range(n)]
    for picture in pictures:
        picture[: height // 2] = 90  # something is pure
    return pictures


@needs_kernels
def test_order_while_later_ones_are_ready_first_and_one_core_each(two_threads):
    def work(i, say):
        time.sleep(0.05 if i % 2 == 0 else 0)
        say(str(i))
        return i, torch.get_num_threads(), threading.current_thread() is threading.main_thread()

    said = []
    results = in_order(work, range(9), 2, lambda sentence: said.append((sentence, threading.current_thread())))
    assert list(results) == [(i, 1, False) for i in range(9)]
    assert said == [(str(i), threading.main_thread()) for i in range(9)]
    assert torch.get_num_threads() == 2
    elsewhere = []
    thread = threading.Thread(target=lambda: elsewhere.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert elsewhere == [2]  # nothing of the process was set


@needs_kernels
def test_an_exception_in_one_thread_comes_in_its_turn_and_ends_the_others(two_threads):
    begun, got, said, threads = [], [], [], threading.active_count()

    def work(i, say):
        begun.append(i)
        say(str(i))
        if i == 3:
            raise ZeroDivisionError(i)
        return i

    with pytest.raises(ZeroDivisionError):
        got.extend(in_order(work, range(100), 2, said.append))  # extend keeps what came before the exception
    assert got == [0, 1, 2] and said == ['0', '1', '2', '3']
    assert len(begun) < 10 and threading.active_count() == threads


@needs_kernels
def test_left_early_nothing_more_is_begun(two_threads):
    begun, threads = [], threading.active_count()
    with contextlib.closing(in_order(lambda i, say: begun.append(i), range(100), 2, print)) as results:
        next(results)
    assert len(begun) < 10 and threading.active_count() == threads


@needs_kernels
@pytest.mark.parametrize(('arch', 'dtype'), [(ATDLight, 'fp32'), (PPATDLight, 'fp32'), (PPATDLight, 'bf16')])
def test_bit_for_bit_those_of_single_calls(two_threads, pools, tiny, arch, dtype):
    torch.manual_seed(0)
    upscaler = Upscaler(arch(**tiny), device='cpu', dtype=dtype)
    pictures = [*small(4), noise(5, 1, 4), noise(1, 70, dtype=np.uint16), noise(40, 17, 1, dtype=np.float32), *small(2)]
    alone = [upscaler(picture) for picture in pictures]
    stats = upscaler.stats
    together = upscaler.upscale_many(pictures)
    assert pools == [2]
    assert [a.dtype for a in alone] == [b.dtype for b in together]
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))
    assert upscaler.stats.output_size == stats.output_size and upscaler.stats.gmacs == stats.gmacs


@needs_kernels
def test_few_and_many_large_and_unknown(two_threads, pools, upscaler):
    def runs(sizes):
        return [(run, workers) for run, workers in groups(upscaler, range(len(sizes)), sizes.__getitem__)]

    tiny, large = (10, 10), (SMALL + 1, 1)
    assert runs([]) == []
    assert runs([tiny]) == [([0], 1)]
    assert runs([tiny] * 4) == [([0, 1, 2, 3], 2)]
    assert runs([tiny] * 3) == [([0, 1], 2), ([2], 1)]  # all cores for the last
    assert runs([tiny, tiny, large, None, tiny, tiny]) == [([0, 1], 2), ([2, 3], 1), ([4, 5], 2)]
    torch.set_num_threads(8)
    assert runs([tiny] * 3) == [([0, 1, 2], 1)]
    assert runs([tiny] * 5) == [([0, 1, 2, 3, 4], 5)]
    assert [(len(run), workers) for run, workers in runs([tiny] * 21)] == [(21, 8)]
    assert [(len(run), workers) for run, workers in runs([tiny] * 20)] == [(16, 8), (4, 1)]
    assert upscaler.upscale_many([]) == [] and len(upscaler.upscale_many(small(1))) == 1
    assert pools == []


@needs_kernels
def test_of_a_stream_no_more_is_taken_than_there_are_threads(two_threads, upscaler, monkeypatch):
    def run(count, size=(90, 160), each=0):
        numbers = iter(range(count))
        items, workers = stream(upscaler, numbers, size, each)
        taken = count - len(list(numbers))
        return list(items)[:taken], workers, taken

    assert run(9) == ([0, 1], 2, 2) and run(2) == ([0, 1], 2, 2)
    assert run(1) == ([0], 1, 1) and run(0) == ([], 1, 0)  # all cores for a single one
    assert run(9, (SMALL + 1, 1)) == ([0], 1, 1)
    one = side_by_side._bytes(upscaler, (90, 160))
    monkeypatch.setattr(memory, 'free_memory', lambda device: 3 * one / 0.85)
    assert run(9, each=0.4 * one)[1] == 2 and run(9, each=0.6 * one)[1] == 1
    torch.set_num_threads(8)
    monkeypatch.undo()
    assert [run(count)[1] for count in (4, 5, 8, 9)] == [1, 5, 8, 8]


@needs_kernels
def test_only_where_results_and_memory_are_sure(two_threads, upscaler, monkeypatch, tiny):
    def workers(upscaler, held=0):
        ((_, workers),) = groups(upscaler, range(40), lambda _: (90, 160), held)
        return workers

    assert workers(upscaler) == 2
    assert workers(Upscaler(Repeat(), device='cpu')) == 1  # somebody else's network
    with use_backend('torch'):
        assert workers(upscaler) == 1
    with torch.autocast('cpu', torch.bfloat16):
        assert workers(upscaler) == 1
    with monkeypatch.context() as patch:
        patch.setenv('PPSR_BACKEND', 'nonsense')
        assert workers(upscaler) == 1
    one = side_by_side._bytes(upscaler, (90, 160))
    monkeypatch.setattr(memory, 'free_memory', lambda device: 2.1 * one / 0.85)
    assert workers(upscaler) == 2 and workers(upscaler, held=one) == 1
    monkeypatch.setattr(memory, 'free_memory', lambda device: 1.9 * one / 0.85)
    assert workers(upscaler) == 1
    torch.set_num_threads(8)
    monkeypatch.setattr(memory, 'free_memory', lambda device: 5.5 * one / 0.85)
    assert workers(upscaler) == 5
    monkeypatch.setattr(memory, 'free_memory', lambda device: 4.5 * one / 0.85)
    assert workers(upscaler) == 1  # half of the cores would have nothing to do
    torch.set_num_threads(1)
    monkeypatch.undo()
    assert workers(upscaler) == 1


@needs_kernels
def test_the_first_that_fails_is_named(two_threads, pools, upscaler):
    pictures = small(6)
    pictures[2] = np.full((4, 4), 7.0)
    pictures[4] = 'nowhere.png'
    with pytest.raises(UserError, match=r'^Picture 3 of 6: A float array must lie in \[0, 1\]'):
        upscaler.upscale_many(pictures)
    assert pools == [2]


def test_what_is_no_picture_is_told_and_left_alone(two_threads, upscaler, tmp_path):
    file = png(tmp_path / 'a.png', small(1)[0]).open('rb')
    for image in (file.fileno(), True, None, b'a.png', Image.new('RGB', (0, 5))):
        with pytest.raises(UserError, match='^Picture 1 of 1: '):
            upscaler.upscale_many([image])
    assert file.read(4) == b'\x89PNG'  # a number may be somebody's open file


@needs_kernels
def test_files_messages_and_failures_are_those_of_one_after_another(two_threads, pools, upscaler, tmp_path, capfd):
    folder = tmp_path / 'in'
    for i, pixels in enumerate(small(7)):
        png(folder / f'{i}.png', pixels)
    whole = (folder / '0.png').read_bytes()
    (folder / '3.png').write_bytes(whole[: len(whole) // 2])  # its header is right
    png(folder / '5.png', noise(9, 9, 4))  # JPEG refuses its alpha

    def run(threads, name):
        torch.set_num_threads(threads)
        plan = plan_jobs([str(folder)], str(tmp_path / name), ext='jpg', save_mask=True)
        summary = run_jobs(upscaler, plan, progress=False)
        files = {path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())}
        said = capfd.readouterr().err.replace(str(tmp_path / name), '')
        return (
            files,
            said,
            [(s.input_size, s.gmacs) for s in summary.done],
            [f.replace(str(tmp_path / name), '') for f in summary.failed],
        )

    one, two = run(1, 'one'), run(2, 'two')
    assert pools == [2]
    assert one == two
    files, said, done, failed = two
    assert len(files) == 10 and len(done) == 5 and ['3.png' in f for f in failed] == [True, False]
    assert said.index('3.png') < said.index('5_out.jpg')


@needs_kernels
def test_one_pillow_image_twice(two_threads, pools, upscaler, tmp_path):
    from PIL import Image

    path = png(tmp_path / 'a.png', small(1)[0])
    with Image.open(path) as image:
        results = upscaler.upscale_many([image, image, path, path])
    assert pools == [2]
    assert all(np.array_equal(from_pil(r).pixels, from_pil(results[0]).pixels) for r in results)
