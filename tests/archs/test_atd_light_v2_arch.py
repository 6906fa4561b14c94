"""What ATDLightV2 has of its own: constants of the weights that inference keeps, and weights told from the first
version's. All else is tested with the first version, in test_atd_light_arch.py."""

import copy
import pickle

import pytest
import torch
from torch import nn

from ppsr.archs import ATDLight, ATDLightV2, PPATDLightV2
from ppsr.archs.atd_light_v2_arch import ATDLayerV2

LQ = torch.rand(2, 3, 9, 13, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net(tiny) -> ATDLightV2:
    return ATDLightV2(**tiny).eval()


@pytest.fixture
def computed(monkeypatch) -> list:
    """Grows by an element whenever a layer makes something of its dictionary."""
    calls, original = [], ATDLayerV2.entries

    def counted(self, td):
        calls.append(self)
        return original(self, td)

    monkeypatch.setattr(ATDLayerV2, 'entries', counted)
    return calls


def fresh(net: nn.Module, lq=LQ) -> torch.Tensor:
    """What a network gives that has kept nothing: one with the same weights, just built."""
    with torch.no_grad():
        return copy.deepcopy(net)(lq)


def test_the_dictionary_is_read_once_and_the_result_is_the_same(net, computed):
    with torch.no_grad():
        first = net(LQ)
        assert len(computed) == 4  # layers
        assert torch.equal(net(LQ), first) and torch.equal(net(LQ.flip(0)), first.flip(0))
    with torch.inference_mode():
        assert torch.equal(net(LQ), first)
    assert len(computed) == 4
    assert torch.allclose(net(LQ).detach(), first, atol=1e-5)
    assert len(computed) == 8  # where gradients are wanted it is new each time


def test_what_inference_mode_kept_serves_elsewhere(net):
    with torch.inference_mode():
        expected = net(LQ).clone()
    with torch.no_grad():
        assert torch.equal(net(LQ), expected)
    net(LQ).mean().backward()
    assert torch.allclose(net(LQ).detach(), expected, atol=1e-5)


def through_data(parameter):  # as BasicSR's moving average writes; no version tells of it
    parameter.data.mul_(0.5).add_(0.01)


def in_place(parameter):
    with torch.no_grad():
        parameter.add_(0.01)


def another_storage(parameter):
    parameter.data = parameter.data * 0.5 + 0.01


@pytest.mark.parametrize('change', [through_data, in_place, another_storage])
@pytest.mark.parametrize(
    'name',
    ['td', *(f'layers.1.{part}' for part in ('attn_atd.scale', 'attn_atd.wk.weight', 'attn_atd.wk.bias'))]
    + [f'layers.0.{part}' for part in ('attn_atd.wv.weight', 'attn_atd.wv.bias', 'fc_td.weight', 'fc_td.bias')],
)
def test_it_is_never_stale(net, name, change):
    with torch.no_grad():
        before = net(LQ)
        change(net.layers[1].residual_group.get_parameter(name))
        after = net(LQ)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh(net))


def test_training_steps_reach_it(tiny):
    net = ATDLightV2(**tiny)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    for _ in range(2):
        with torch.no_grad():
            net(LQ)
        optimizer.zero_grad()
        net(LQ).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        assert torch.equal(net(LQ), fresh(net))


def test_it_follows_dtype_and_loading(net, tiny):
    with torch.no_grad():
        single = net(LQ)
        double = net.double()(LQ.double())
        assert double.dtype == torch.float64 and (double - single).abs().max() < 1e-4
        assert torch.equal(net.float()(LQ), single)
        other = ATDLightV2(**tiny).eval()
        net.load_state_dict(other.state_dict())
        assert torch.equal(net(LQ), other(LQ))
        with torch.autocast('cpu', dtype=torch.bfloat16):
            net(LQ)
        assert torch.equal(net(LQ), other(LQ))
        assert net.to('meta')(LQ.to('meta')).is_meta


def test_copies_and_files_carry_nothing_of_it(net, computed):
    state = net.state_dict().keys()
    with torch.no_grad():
        expected = net(LQ)
        assert net.state_dict().keys() == state
        for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
            computed.clear()
            assert torch.equal(other(LQ), expected) and len(computed) == 4


def test_an_adapter_is_asked_each_time(net):
    """Whatever stands in a linear layer's place may change its mind without a parameter that shows it."""

    class Adapter(nn.Module):
        gain = 1.0

        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.gain * self.layer(x)

    layer = net.layers[0].residual_group.layers[0]
    with torch.no_grad():
        plain = net(LQ)
        layer.fc_td = Adapter(layer.fc_td)
        assert torch.equal(net(LQ), plain)
        layer.fc_td.gain = 2.0
        assert not torch.equal(net(LQ), plain)


def test_weights_of_the_two_versions_are_told_apart(tiny):
    first, second = ATDLight(**tiny).state_dict(), PPATDLightV2(**tiny, dim_ffn_td=5).state_dict()
    assert ATDLightV2.config_from(first) is None and ATDLight.config_from(second) is None
    found = ATDLightV2.config_from(second)
    assert found == tiny | {'dim_ffn_td': 5, 'category_size': 128, 'mlp_ratio': 1.0}


@pytest.mark.parametrize('value', [0, '4', 2.5], ids=repr)
def test_dim_ffn_td_is_checked(value):
    with pytest.raises(ValueError, match='dim_ffn_td'):
        ATDLightV2(dim_ffn_td=value)
