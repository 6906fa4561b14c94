"""CAMixerATDLight: which windows get attention, in training and in evaluation; gradients; the cost counted."""

import copy
import math

import pytest
import torch

import ppsr.archs.camixer_atd_light_arch as camixer
from ppsr.archs import CAMixerATDLight

TINY = dict(
    upscale=2,
    embed_dim=8,
    depths=[2, 1],
    num_heads=[2, 2],
    window_size=4,
    category_size=16,
    num_tokens=8,
    reducted_dim=4,
    convffn_kernel_size=3,
)


def tiny(**options) -> CAMixerATDLight:
    torch.manual_seed(0)
    net = CAMixerATDLight(**TINY, **options)
    with torch.no_grad():  # away from the symmetric start: scores, offsets and maps that mean something
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return net


def mixer_and_input(ratio=0.5, images=2, height=12, width=8, seed=0):
    """A CAMixer of windows of 4×4 on a map of 3×2 windows."""
    torch.manual_seed(seed)
    mixer = camixer.CAMixer(dim=8, window_size=4, num_heads=2, ratio=ratio).double()
    return mixer, torch.randn(images, height, width, 8).double(), torch.randn(images, height, width, 2).double()


def test_windows_are_row_major_and_come_back():
    x = torch.arange(2 * 4 * 6).view(2, 4, 6, 1)
    windows = camixer.to_windows(x, 2)
    assert windows.shape == (2, 6, 4, 1)
    assert windows[0, 1].flatten().tolist() == [2, 3, 8, 9]  # rows 0–1, columns 2–3
    assert windows[0, 3].flatten().tolist() == [12, 13, 18, 19]  # the second row of windows begins
    assert torch.equal(camixer.from_windows(windows, 4, 6, 2), x)


def test_displaced_reading_is_bilinear_and_stops_at_the_border():
    x = torch.arange(12.0).view(1, 3, 4, 1).repeat(1, 2, 1, 1)[:, :4]  # rows 0–3, 4–7, 8–11, 0–3
    window = torch.tensor([[3, 0]])  # of 2×2 windows of 2×2 tokens: bottom right, top left
    still = camixer.read_displaced(x, torch.zeros(1, 2, 4, 2), window, 2)
    assert still[0, 0].flatten().tolist() == [10, 11, 2, 3]
    assert still[0, 1].flatten().tolist() == [0, 1, 4, 5]
    right = camixer.read_displaced(x, torch.tensor([0.0, 0.5]).expand(1, 2, 4, 2), window, 2)
    assert right[0, 0].flatten().tolist() == [10.5, 11, 2.5, 3]
    down = camixer.read_displaced(x, torch.tensor([1.0, 0.0]).expand(1, 2, 4, 2), window, 2)
    assert down[0, 1].flatten().tolist() == [4, 5, 8, 9]


@pytest.mark.parametrize('ratio', [0, 0.1, 0.3, 0.5, 1])
def test_evaluation_keeps_exactly_the_best_windows(ratio):
    mixer, y, condition = mixer_and_input(ratio)
    mixer.eval()
    _, mask = mixer(y, condition)
    assert mask.sum(1).tolist() == [math.ceil(ratio * 6)] * 2
    _, scores, _, _ = mixer.predictor(mixer.wv(y), condition)
    preference = scores[..., 0] - scores[..., 1]
    for kept, preferred in zip(mask.bool(), preference):
        if kept.any() and not kept.all():
            assert preferred[kept].min() > preferred[~kept].max()


def test_count_of_windows_does_not_suffer_from_rounding():
    mixer = camixer.CAMixer(8, 4, 2, ratio=0.07)
    assert 0.07 * 100 > 7  # in binary
    assert [mixer.num_kept(n) for n in (1, 14, 15, 100)] == [1, 1, 2, 7]


def test_equal_scores_go_to_the_first_windows():
    mixer, y, condition = mixer_and_input(0.5)
    mixer.eval()
    torch.nn.init.zeros_(mixer.predictor.scores[-1].weight)
    _, mask = mixer(y, condition)
    assert mask.tolist() == [[1, 1, 1, 0, 0, 0]] * 2


@pytest.mark.parametrize('window', range(6))
def test_training_and_evaluation_mask_the_same_window(window, monkeypatch):
    """The window that the mask names is the one whose tokens get attention, in both modes, at the same place."""
    mixer, y, condition = mixer_and_input(ratio=1 / 6)
    wanted = torch.zeros(2, 6, dtype=torch.float64)
    wanted[:, window] = 1

    def scores_of(v, condition, original=mixer.predictor.forward):
        hidden, _, channel, spatial = original(v, condition)
        return hidden, torch.stack([wanted, -wanted], -1), channel, spatial

    monkeypatch.setattr(mixer.predictor, 'forward', scores_of)
    monkeypatch.setattr(camixer.F, 'gumbel_softmax', lambda scores, hard: scores.clamp(min=0))
    # attention answers with a mark; behind it nothing but the mask's own placement
    monkeypatch.setattr(mixer, 'attend', lambda y, window, queries, values, hidden: torch.full_like(values, 100.0))
    seen = {}
    mixer.near = mixer.far = mixer.proj = torch.nn.Identity()
    monkeypatch.setattr(camixer.F, 'gelu', torch.zeros_like)
    for training in (True, False):
        out, mask = mixer.train(training)(y, condition)
        assert torch.equal(mask, wanted), 'the mask returned'
        seen[training] = out == 100
    assert torch.equal(seen[True], seen[False])
    row, column = divmod(window, 2)
    drawn = torch.zeros(2, 12, 8, 8, dtype=torch.bool)
    drawn[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = True
    assert torch.equal(seen[False], drawn)


def test_with_the_same_mask_both_modes_compute_the_same(monkeypatch):
    mixer, y, condition = mixer_and_input(0.5)
    evaluated, mask = mixer.eval()(y, condition)
    monkeypatch.setattr(camixer.F, 'gumbel_softmax', lambda scores, hard: torch.stack([mask, 1 - mask], -1))
    trained, _ = mixer.train()(y, condition)
    torch.testing.assert_close(trained, evaluated, rtol=0, atol=1e-12)
    assert not torch.allclose(mixer.eval()(y.flip(1), condition)[0], evaluated)


def test_attention_is_computed_for_kept_windows_only(monkeypatch):
    mixer, y, condition = mixer_and_input(0.5)
    mixer.eval()
    sizes = []
    attention = camixer.F.scaled_dot_product_attention
    monkeypatch.setattr(
        camixer.F, 'scaled_dot_product_attention', lambda q, k, v: sizes.append(q.shape) or attention(q, k, v)
    )
    mixer(y, condition)
    assert sizes == [(2 * 3, 2, 16, 4)]
    mixer.ratio = 0
    mixer(y, condition)
    assert len(sizes) == 1


def test_an_image_does_not_depend_on_its_batch():
    net, x = tiny().double().eval(), torch.rand(3, 3, 9, 13).double()
    with torch.no_grad():
        together, alone = net(x), torch.cat([net(image[None]) for image in x])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize('ratio', [0, 0.5, 1])
@pytest.mark.parametrize('size', [(1, 1), (7, 10)])
def test_network_evaluates_deterministically_at_any_size(ratio, size):
    net, x = tiny(camixer_ratio=ratio).eval(), torch.rand(1, 3, *size)
    with torch.no_grad():
        first, mask = net(x, return_mask=True)
        assert torch.equal(first, net(x))
    assert first.shape == (1, 3, 2 * size[0], 2 * size[1]) and first.isfinite().all()
    assert mask is None
    with pytest.raises(RuntimeError, match='training mode'):
        net.auxiliary_losses()


def test_gradients_reach_every_parameter():
    net = tiny().train()
    loss = net(torch.rand(2, 3, 12, 12)).square().mean() + net.auxiliary_losses()['ratio']
    loss.backward()
    without = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a shift of a whole row before a softmax changes nothing
    assert all(name.endswith('norm3.bias') for name in without)


def test_gradient_reaches_the_scores_from_the_image_alone():
    net = tiny().train()
    net(torch.rand(2, 3, 12, 12)).square().mean().backward()
    assert all(mixer.predictor.scores[0].weight.grad.abs().sum() > 0 for mixer in net.mixers())


def test_ratio_loss_is_the_mean_of_squares_over_the_layers():
    net = tiny(camixer_ratio=0.25).train()
    net._masks = [torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 0.0]])]
    assert net.auxiliary_losses()['ratio'].item() == (0.5**2 + 0) / 2


@pytest.mark.parametrize('ratio', [0.25, 0.75])
def test_training_pulls_the_mean_mask_to_the_ratio(ratio):
    torch.manual_seed(0)
    options = TINY | dict(depths=[1], num_heads=[2], camixer_ratio=ratio)
    net, x = CAMixerATDLight(**options).train(), torch.rand(4, 3, 16, 16)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    shares = []
    for _ in range(60):
        optimizer.zero_grad()
        net(x)
        shares.append(torch.stack([mask.mean() for mask in net._masks]).mean().item())
        net.auxiliary_losses()['ratio'].backward()
        optimizer.step()
    assert abs(sum(shares[:5]) / 5 - 0.5) < 0.12
    assert abs(sum(shares[-15:]) / 15 - ratio) < 0.08


def test_checkpointing_computes_the_same():
    grads = []
    for use_checkpoint in (False, True):
        net = tiny(use_checkpoint=use_checkpoint).double().train()
        torch.manual_seed(1)
        x = torch.rand(1, 3, 8, 8).double()
        (net(x).square().mean() + net.auxiliary_losses()['ratio']).backward()
        grads.append([p.grad for p in net.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=1e-12)


def test_copies_and_checkpoints_are_made_after_a_training_step():
    net = tiny().train()
    net(torch.rand(1, 3, 8, 8))
    twin = copy.deepcopy(net)
    assert not any('mask' in name for name in net.state_dict())
    with pytest.raises(RuntimeError, match='training mode'):
        twin.auxiliary_losses()
    assert net.auxiliary_losses()['ratio'] >= 0


@pytest.mark.parametrize('value', [-0.1, 1.5, 'half', True, None])
def test_a_ratio_that_is_none_is_refused(value):
    with pytest.raises(ValueError, match='camixer_ratio'):
        CAMixerATDLight(**TINY, camixer_ratio=value)


def test_published_size_has_more_parameters_than_atd_light():
    assert sum(p.numel() for p in CAMixerATDLight(upscale=4).parameters()) == 1_007_714 > 768_792


def test_bfloat16_autocast_trains():
    net = tiny().train()
    with torch.autocast('cpu', torch.bfloat16):
        out = net(torch.rand(1, 3, 8, 8))
        loss = out.float().square().mean() + net.auxiliary_losses()['ratio']
    loss.backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
