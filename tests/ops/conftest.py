"""Fixtures of the operators' tests."""

import pytest
import torch


@pytest.fixture(autouse=True, scope='module')
def _one_thread():
    # these tensors are tiny: two threads would wait for each other, for very long on a busy machine
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
