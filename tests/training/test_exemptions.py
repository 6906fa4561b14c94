"""Batches that run dense, in the paper's setting and in the network's own: shares, thresholds, gradients."""

import pytest
import torch
from support import TINY
from torch import nn

from ppsr.archs import ATDLight, CAMixerATDLight, PPATDLight
from ppsr.archs.masked import AS_PUBLISHED
from ppsr.errors import UserError
from ppsr.training.exemptions import Exemptions

BOTH = ('category', 'window')
RECIPE = {'pp_probability': 0.65, 'pp_paper_probability': 0.15, 'pp_threshold_range': [0.05, 0.13]}


def network(**changes):
    return PPATDLight(**TINY | {'pp_mask': 'variance', 'pp_scope': BOTH} | changes)


def first_layer(net):
    return net.layers[0].residual_group.layers[0]


def test_shares_and_thresholds():
    torch.manual_seed(0)
    net = network()
    own, exemptions, seen, thresholds = net.pure_pass, Exemptions(RECIPE, net), [], []
    for _ in range(2000):
        with exemptions.draw():
            mask, scope = net.pure_pass, first_layer(net).scope
            seen.append('dense' if mask is None else f'{mask.name} {"+".join(scope)}')
            thresholds += [mask.threshold] if seen[-1].startswith('variance') else []
        assert net.pure_pass is own and first_layer(net).scope == BOTH
    shares = {kind: seen.count(kind) / len(seen) for kind in seen}
    assert shares == pytest.approx(
        {'variance category+window': 0.5, 'colour category': 0.15, 'dense': 0.35}, abs=0.035
    )  # three standard errors
    assert 0.05 <= min(thresholds) < 0.052 and 0.128 < max(thresholds) <= 0.13
    assert sum(thresholds) / len(thresholds) == pytest.approx(0.09, abs=0.003)


def test_without_the_options_nothing_is_drawn():
    net = network()
    state = torch.get_rng_state()
    with Exemptions({}, net).draw():
        assert net.pure_pass.threshold == 0.07
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('mask', [None, 'colour'], ids=['dense', 'paper'])
def test_each_setting_is_that_of_the_network_made_for_it(mask):
    """Outputs in training mode bit for bit, every parameter with a gradient, and back again after an error."""
    lq = torch.rand(2, 3, 16, 24)
    lq[0, :, :, :12] = 0.3
    net = network(use_checkpoint=True).train()
    alone = (ATDLight if mask is None else PPATDLight)(**TINY)
    alone.load_state_dict({k: v for k, v in net.state_dict().items() if '.comp.' not in k})
    mask = None if mask is None else AS_PUBLISHED.build_mask()
    with pytest.raises(RuntimeError, match='stop'), net.exempting(mask, ['category']):
        output = net(lq)
        output.square().mean().backward()
        raise RuntimeError('stop')
    assert torch.equal(output, alone(lq)) and not torch.equal(output, net(lq))
    for name, p in net.named_parameters():
        assert p.grad.isfinite().all() and ('.comp.' not in name or not p.grad.any())


def test_what_a_network_has_nothing_for_is_refused():
    for scope, message in ((BOTH, 'without a stand-in'), ((), 'pp_scope'), (('colour',), 'pp_scope')):
        with pytest.raises(ValueError, match=message), network(pp_scope=['category']).exempting(None, scope):
            raise AssertionError
    for net in (ATDLight(**TINY), CAMixerATDLight(**TINY), nn.Conv2d(3, 3, 1)):
        with pytest.raises(UserError, match='has no mask; leave these options out'):
            Exemptions(RECIPE, net)
    with pytest.raises(UserError, match="pp_threshold_range: the mask 'colour' has no threshold"):
        Exemptions(RECIPE, network(pp_mask='colour'))
    assert Exemptions({'pp_probability': 0.5}, network(pp_mask='colour')).is_drawn
