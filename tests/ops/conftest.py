"""Fixtures of the operators' tests."""

import concurrent.futures
import multiprocessing

import pytest
import torch

from ppsr.runtime import threads


@pytest.fixture(autouse=True, scope='module')
def _one_thread():
    # these tensors are tiny: two threads would wait for each other, for very long on a busy machine
    with threads(1):
        yield


@pytest.fixture(name='threads')
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope='session')
def interpreter():
    """interpreter(function, *args): the result of a function of a module, called in a process in which Triton's
    kernels are interpreted: Triton decides that on import."""
    with (
        pytest.MonkeyPatch.context() as patch,
        concurrent.futures.ProcessPoolExecutor(
            1, multiprocessing.get_context('spawn'), initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
    ):
        patch.setenv('TRITON_INTERPRET', '1')
        pool.submit(int).result()  # the process starts here, and inherits the environment
        patch.undo()
        yield lambda function, *args: pool.submit(function, *args).result()
