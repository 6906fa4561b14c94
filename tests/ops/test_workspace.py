"""Memory that inference uses again."""

import os
import signal
import threading

import numpy as np
import pytest
import torch

import ppsr
from ppsr.archs import PPATDLight
from ppsr.ops import native, workspace

if native.unavailable_reason():
    pytest.skip(native.unavailable_reason(), allow_module_level=True)


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch):
    monkeypatch.setattr(workspace, 'LEAST', 1)  # small networks, too
    workspace.free()
    yield
    workspace.free()


@pytest.fixture
def net(tiny):
    torch.manual_seed(0)
    return PPATDLight(**tiny, pp_scope=('category', 'window')).eval()


def pictures(count, side=24):
    return [torch.rand(1, 3, side + i, side, generator=torch.Generator().manual_seed(i)) for i in range(count)]


def plainly(net, x, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(workspace, '_use_count', None)  # as where torch does not have it
        return net(x)


@torch.no_grad()
def test_memory_is_used_again_and_results_are_the_same_bits(net, monkeypatch):
    (x,) = pictures(1)
    expected = plainly(net, x, monkeypatch)
    assert workspace.held() == 0
    assert torch.equal(net(x), expected)
    held = workspace.held()
    assert held > 0
    assert torch.equal(net(x), expected) and workspace.held() == held  # no new block
    one_layer = 24 * 24 * 8 * net.conv_first.out_channels * 4  # bytes of all maps that a layer makes, about
    assert held < 3 * one_layer  # not that of all layers
    assert ppsr.free_workspace() == held and workspace.held() == 0


@torch.inference_mode()
def test_what_somebody_keeps_is_not_overwritten(net):
    kept = []
    for module in net.modules():
        module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    one, two = pictures(2)
    net(one)
    kept[:] = [t for t in kept if isinstance(t, torch.Tensor)]
    copies = [t.clone() for t in kept]
    for _ in range(2):
        net.forward(two)
    assert len(copies) > 20 and all(map(torch.equal, copies, kept))


@torch.no_grad()
def test_results_are_not_in_it(net):
    one, two = pictures(2)
    sr = net(one)
    copy = sr.clone()
    net(two)
    assert torch.equal(sr, copy) and workspace.free() and workspace.held() == 0


@torch.no_grad()
def test_it_is_bounded(net, monkeypatch):
    images = pictures(4, 16)
    expected = [plainly(net, x, monkeypatch) for x in images]
    net(images[0])
    monkeypatch.setattr(workspace, 'MOST', workspace.held() // 2)
    workspace.free()
    for _ in range(2):
        for x, right in zip(images, expected):
            assert torch.equal(net(x), right)
            assert workspace.held() <= workspace.MOST


def test_threads_do_not_get_in_each_others_way(net):
    images = pictures(4)
    with torch.no_grad():
        expected = [net(x) for x in images]
    wrong, start = [], threading.Barrier(len(images))

    def work(x, right):
        start.wait()
        with torch.no_grad():
            wrong.extend(i for i in range(10) if not torch.equal(net(x), right))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(images, expected)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_training_has_nothing_of_it(net):
    (x,) = pictures(1)
    net(x).mean().backward()
    assert workspace.held() == 0
    with workspace.reuse():  # nor have tensors without data
        assert workspace.empty(torch.empty(4, device='meta'), (8, 8)).device.type == 'meta'
    assert workspace.held() == 0


@torch.no_grad()
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning', 'ignore::DeprecationWarning')
def test_a_trace_records_nothing_of_it(net):
    (x,) = pictures(1)
    x[..., :9] = 0.3  # something is pure
    expected = net(x)
    workspace.free()
    assert torch.equal(torch.jit.trace(net, x, check_trace=False)(x), expected) and workspace.held() == 0


@torch.no_grad()
def test_the_measure_of_memory_begins_with_nothing_held(net):
    from ppsr.pictures.memory import release_heap

    net(*pictures(1))
    assert workspace.held()
    release_heap()
    assert workspace.held() == 0


def sevens():
    with workspace.reuse():
        return workspace.empty(torch.empty(0), (1000,)).fill_(7)


HOLDERS = {  # what may be all that is left of a tensor, and the numbers in it
    'view': (lambda t: t[3:10], lambda view: view),
    'detached': (lambda t: t.detach(), lambda tensor: tensor),
    'other dtype': (lambda t: t.view(torch.int32), lambda tensor: tensor.view(torch.float32)),
    'numpy': (lambda t: t.numpy()[::2], torch.as_tensor),
    'memoryview': (lambda t: memoryview(t.numpy()), np.asarray),
    'dlpack': (torch.utils.dlpack.to_dlpack, torch.utils.dlpack.from_dlpack),
    'storage': (lambda t: t.untyped_storage(), lambda storage: torch.empty(0).set_(storage, 0, (1000,), (1,))),
    'shared': (lambda t: t.share_memory_()[:3], lambda view: view),
}


@pytest.mark.parametrize('name', HOLDERS)
def test_memory_is_not_used_again_while_anything_holds_it(name):
    keep, read = HOLDERS[name]
    kept = keep(sevens())
    with workspace.reuse():
        workspace.empty(torch.empty(0), (1000,)).fill_(9)
    assert (torch.as_tensor(read(kept)) == 7).all()
    del kept
    workspace.free()
    assert workspace.held() == 0


def test_memory_that_an_autograd_graph_keeps_is_not_used_again():
    factor = torch.ones(1, requires_grad=True)
    product = (sevens() * factor).sum()
    with workspace.reuse():
        workspace.empty(torch.empty(0), (1000,)).fill_(9)
    product.backward()
    assert factor.grad == 7000


def test_what_another_process_reads_is_not_overwritten():
    """A tensor that was sent lives on where it was received."""
    tensor = sevens()
    handle = tensor.share_memory_().untyped_storage()._share_fd_cpu_()  # what a torch.multiprocessing queue sends
    there = torch.UntypedStorage._new_shared_fd_cpu(*handle)
    del tensor
    with workspace.reuse():
        workspace.empty(torch.empty(0), (1000,)).fill_(9)
    assert (torch.empty(0).set_(there, 0, (1000,), (1,)) == 7).all()


def test_an_interruption_that_asks_for_memory_does_not_wait_for_itself(monkeypatch):
    """A signal handler or a finalizer may run in the middle of it, in the same thread."""
    sevens()
    use_count, found = workspace._use_count, []

    def interrupted(address):
        if len(found) < 3:
            found.append(1)
            found.append((workspace.free(), workspace.held() > 0, sevens()))
        return use_count(address)

    monkeypatch.setattr(workspace, '_use_count', interrupted)
    one = sevens()
    assert found[1][:2] == (0, True) and found[1][2].data_ptr() != one.data_ptr()
    del one
    assert workspace.free() > 0  # as before


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_a_forked_process_begins_anew():
    kept = sevens()
    with workspace._lock:  # as if another thread held it
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)
            held, other = workspace.held(), sevens()
            right = held == 0 and (kept == 7).all() and other.data_ptr() != kept.data_ptr()
            os._exit(0 if right and workspace.held() > 0 else 1)
    assert os.waitpid(pid, 0)[1] == 0 and workspace.held() > 0
