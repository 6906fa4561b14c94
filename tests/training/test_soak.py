"""One model instance for a long time, and from many threads: memory stays flat, results stay those of a fresh one."""

import threading

import numpy as np
import psutil
import pytest
import torch

from ppsr.archs import PPATDLight
from ppsr.pictures.upscaler import Upscaler

INPUTS = 500
WARM_UP = 150
SIZES = [(8, 8), (24, 9), (5, 31), (16, 16), (1, 1), (33, 20), (40, 40)]


@pytest.fixture
def net(tiny):
    torch.manual_seed(1)
    return PPATDLight(**tiny).eval()


def picture(i: int) -> np.ndarray:
    height, width = SIZES[i % len(SIZES)]
    cells = np.random.default_rng(i % 29).integers(0, 256, (height, width, 3), np.uint8)
    return cells if i % 2 else np.maximum(cells, 250)  # every other one nearly all pure


def test_500_alternating_inputs(net, tiny, one_thread):
    """Memory within 5 % after warm-up; every 25th result equals that of an instance that has seen nothing before."""
    upscaler = Upscaler(net, device='cpu')
    process, memory = psutil.Process(), []
    for i in range(INPUTS):
        result = upscaler(picture(i))
        if i >= WARM_UP:
            memory.append(process.memory_info().rss)
        if i % 25 == 0:
            fresh = PPATDLight(**tiny)
            fresh.load_state_dict(net.state_dict())
            np.testing.assert_array_equal(Upscaler(fresh, device='cpu')(picture(i)), result)
    assert max(memory) < 1.05 * min(memory), f'{min(memory) >> 20} to {max(memory) >> 20} MiB'
    assert memory[-1] < 1.05 * memory[0]


def test_8_threads_share_one_upscaler(net, one_thread):
    pictures = [picture(i) for i in range(len(SIZES) * 2)]
    upscaler = Upscaler(net, device='cpu')
    expected = [upscaler(p) for p in pictures]
    failures, ready = [], threading.Barrier(8)

    def work(number: int) -> None:
        ready.wait()
        try:
            for i in np.random.default_rng(number).permutation(len(pictures)):
                np.testing.assert_array_equal(upscaler(pictures[i]), expected[i])
                assert upscaler.stats.input_size == pictures[i].shape[1::-1]  # each thread sees its own
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


def test_training_and_inference_alternate(net, one_thread):
    """Buffers that a backend keeps between calls must not leak from one use into the other."""
    x = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        expected = net(x)
    for size in (8, 24, 40):
        net(torch.rand(2, 3, size, size)).sum().backward()
        with torch.no_grad():
            torch.testing.assert_close(net(x), expected, rtol=0, atol=0)
