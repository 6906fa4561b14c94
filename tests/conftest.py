"""Shared fixtures."""

import logging
import os
import signal
import sys

import hypothesis
import pytest
import torch
from support import TINY

import ppsr  # noqa: F401, registers archs and models
from ppsr.ops import native
from ppsr.pictures import side_by_side
from ppsr.runtime import threads

hypothesis.settings.register_profile('ppsr', deadline=None, derandomize=True, max_examples=30)
hypothesis.settings.load_profile('ppsr')

os.environ.setdefault('PPSR_NO_TUNING', '1')  # main() in a test must not flush this process's denormals

# as in a terminal: a shell that starts the tests in the background has Ctrl-C ignored, nohup has hang-ups ignored, and
# children inherit that
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_logger():
    """basicsr sets its logger up once in a process, by what the first caller wants (rank 1: errors only): every test
    has one that nobody has touched."""
    logger, known = logging.getLogger('basicsr'), sys.modules['basicsr.utils.logger'].initialized_logger
    before = dict(known), logger.level, logger.propagate, logger.disabled, list(logger.handlers)
    yield
    known.clear()
    known.update(before[0])
    logger.setLevel(before[1])
    logger.propagate, logger.disabled, logger.handlers[:] = before[2:]


@pytest.fixture
def tiny() -> dict:
    """Constructor arguments of a network that runs in milliseconds (the one of golden_tiny_x2)."""
    return dict(TINY)


@pytest.fixture
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def two_threads():
    with threads(2):
        yield


@pytest.fixture
def pools(monkeypatch):
    """Numbers of threads that were started for small pictures."""
    seen, pool = [], side_by_side.ThreadPoolExecutor

    def watched(workers, *args, **kwargs):
        seen.append(workers)
        return pool(workers, *args, **kwargs)

    monkeypatch.setattr(side_by_side, 'ThreadPoolExecutor', watched)
    return seen


@pytest.fixture(params=['baseline', 'avx2', 'avx512'])
def target(request):
    """Each instruction set of the compiled kernels that this processor has."""
    if not native.set_target(request.param):
        pytest.skip(f'this processor has no {request.param}')
    yield request.param
    native.set_target(None)
