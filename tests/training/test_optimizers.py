"""Muon with AdamW: which parameter goes where, steps, rates, states."""

import copy

import pytest
import torch
from torch import nn

from ppsr.errors import UserError
from ppsr.training.optimizers import MuonAdamW, muon_for, muon_parameters

needs_muon = pytest.mark.skipif(not hasattr(torch.optim, 'Muon'), reason='this torch has no Muon')


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 6)
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, x):
        y = self.norm(self.depthwise(self.conv(x)).permute(0, 2, 3, 1)) @ self.table.T
        return self.linear(y[..., :4])


def train(net, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        net(torch.randn(2, 3, 8, 8, generator=generator)).square().mean().backward()
        optimizer.step()


def test_matrices_are_weights_of_linear_layers_and_of_convolutions_that_mix_channels():
    assert muon_parameters(Small()) == {'conv.weight', 'linear.weight'}
    assert muon_parameters(nn.Linear(2, 2)) == {'weight'}


@needs_muon
def test_a_kernel_moves_as_the_matrix_that_it_is_seen_as_and_the_rest_as_adamw_moves_it():
    net = Small()
    before = copy.deepcopy(net)
    optimizer = muon_for(net, 0.01, {'lr': 0.002, 'betas': (0.8, 0.9)}, momentum=0.9)
    train(net, optimizer, 1)
    grads = {name: p.grad for name, p in net.named_parameters()}

    kernel = nn.Parameter(before.conv.weight.detach().flatten(1).clone())
    kernel.grad = grads['conv.weight'].flatten(1)
    torch.optim.Muon([kernel], 0.01, weight_decay=0, momentum=0.9, adjust_lr_fn='match_rms_adamw').step()
    size = (kernel - before.conv.weight.flatten(1)).norm()
    assert (net.conv.weight.flatten(1) - kernel).norm() < 0.01 * size  # torch's own rounds to bfloat16
    # the step is the orthogonalised gradient: all its singular values are near 1, times the rate and the adjustment
    step = (net.conv.weight - before.conv.weight).detach().flatten(1) / (0.01 * 0.2 * 27**0.5)
    assert torch.linalg.svdvals(step).sub(1).abs().max() < 0.5

    others = {name: nn.Parameter(p.detach().clone()) for name, p in before.named_parameters()}
    others = {name: p for name, p in others.items() if name not in muon_parameters(net)}
    for name, p in others.items():
        p.grad = grads[name]
    torch.optim.AdamW(others.values(), 0.002, betas=(0.8, 0.9), weight_decay=0).step()
    for name, p in net.named_parameters():
        if name in others:
            assert torch.equal(p, others[name]), name


@needs_muon
@pytest.mark.parametrize('nesterov', [True, False])
@pytest.mark.parametrize('adjust', ['original', 'match_rms_adamw', 'spectral_unclamped'])
def test_matrices_of_a_shape_together_move_as_torch_moves_each(monkeypatch, adjust, nesterov):
    """Against torch's own, kept from rounding to bfloat16: wide, tall and square ones, two of each, several steps."""
    monkeypatch.setattr(torch.Tensor, 'bfloat16', torch.Tensor.clone)
    torch.manual_seed(0)
    shapes = 2 * [(4, 9), (9, 4), (5, 5)]
    ours = [nn.Parameter(torch.randn(*shape)) for shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    settings = dict(lr=0.1, weight_decay=0.1, momentum=0.9, nesterov=nesterov, adjust_lr_fn=adjust)
    optimizers = MuonAdamW(ours, [], adamw={}, **settings), torch.optim.Muon(theirs, **settings)
    for _ in range(3):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        ours[0].grad = theirs[0].grad = None
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    state = optimizers[0].parts['muon'].state_dict()['state']
    for i, other in optimizers[1].state_dict()['state'].items():
        torch.testing.assert_close(state[i], other)


@needs_muon
def test_rates_of_the_groups_reach_both_parts():
    net = Small()
    optimizer = muon_for(net, 0.01, {'lr': 0.002})
    assert [group['lr'] for group in optimizer.param_groups] == [0.01, 0.002]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.0)
    before = copy.deepcopy(net.state_dict())
    train(net, optimizer, 1)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    scheduler.base_lrs = [0.0, 0.001]
    scheduler.lr_lambdas = [lambda i: 1.0] * 2
    scheduler.step()
    train(net, optimizer, 1)
    moved = {name for name, value in net.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == {name for name, _ in net.named_parameters()} - muon_parameters(net)


@needs_muon
def test_frozen_parameters_are_nobodys_and_what_has_no_gradient_stays():
    net = Small()
    for p in (net.table, net.conv.weight):
        p.requires_grad = False
    optimizer = muon_for(net, 0.01)
    mine = {id(p) for group in optimizer.param_groups for p in group['params']}
    assert id(net.table) not in mine and id(net.conv.weight) not in mine and id(net.linear.weight) in mine
    assert optimizer.param_groups[1]['lr'] == 0.01  # of AdamW, where nothing else is said
    before = net.linear.weight.detach().clone()
    optimizer.step()
    assert torch.equal(net.linear.weight, before)


@needs_muon
def test_goes_on_bit_for_bit_from_its_state(tmp_path):
    net = Small()
    optimizer = muon_for(net, 0.01, {'lr': 0.002})
    train(net, optimizer, 3)
    torch.save([net.state_dict(), optimizer.state_dict()], tmp_path / 'state')
    train(net, optimizer, 3, seed=1)

    again = Small()
    other = muon_for(again, 0.5, {'lr': 0.5})
    weights, state = torch.load(tmp_path / 'state', weights_only=True)
    again.load_state_dict(weights)
    other.load_state_dict(state)
    assert [group['lr'] for group in other.param_groups] == [0.01, 0.002]
    train(again, other, 3, seed=1)
    for (name, value), expected in zip(again.state_dict().items(), net.state_dict().values()):
        assert torch.equal(value, expected), name


@needs_muon
def test_states_of_others_are_refused():
    net = Small()
    optimizer = muon_for(net, 0.01)
    with pytest.raises(ValueError, match='not one of Muon'):
        optimizer.load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())
    with pytest.raises(ValueError, match='not one of Muon'):
        optimizer.load_state_dict(muon_for(nn.Linear(2, 2, bias=False), 0.01).state_dict())


def test_an_older_torch_says_so(monkeypatch):
    monkeypatch.delattr(torch.optim, 'Muon', raising=False)
    with pytest.raises(UserError, match='needs torch 2.9 or newer'):
        MuonAdamW([], list(nn.Linear(2, 2).parameters()), 0.01, {})
