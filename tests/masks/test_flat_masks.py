"""Masks beside the paper's: gradient, variance, dynamic, both."""

import pytest
import torch
import torch.nn.functional as F

from ppsr.masks import build_mask, list_masks
from ppsr.masks.dynamic import cluster_pixels
from ppsr.masks.gradient import Gradient, local_gradient
from ppsr.masks.pure_pass import PurePass, classify_pixels
from ppsr.masks.variance import Variance, local_variance

NAMES = ['gradient', 'variance', 'dynamic', 'both']


def flat_and_noisy(height=37, width=29, batch=1) -> torch.Tensor:
    """8-bit images, flat in soft steps on the left, noise on the right."""
    steps = (torch.arange(height) // 9 / 8).view(1, 1, height, 1).expand(batch, 3, height, width)
    noise = torch.rand(batch, 3, height, width) * torch.linspace(0, 0.8, width).clamp(min=0.1).sub(0.1)
    return (steps * 0.8 + noise).clamp(0, 1).mul(255).round() / 255


def test_local_variance_by_the_definition():
    lq = torch.rand(2, 3, 9, 11)
    integers = (lq.double() * 65535).round()
    windows = F.pad(integers, (2, 2, 2, 2), mode='replicate').unfold(2, 5, 1).unfold(3, 5, 1).flatten(4)
    expected = 25**2 * windows.var(-1, unbiased=False).sum(1)
    found = local_variance(lq)
    assert found.dtype == torch.float64 and torch.equal(found, found.round())
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_variance_by_hand():
    """One white pixel of 25 in one channel: the variance is 1/25 − 1/625 = 0.0384, σ = 0.19596."""
    lq = torch.zeros(1, 3, 9, 9)
    lq[0, 0, 4, 4] = 1
    near = torch.zeros(9, 9, dtype=torch.bool)
    near[2:7, 2:7] = True
    assert torch.equal(Variance(0.1959)(lq)[0], ~near) and Variance(0.1960)(lq).all()
    corner = torch.zeros(1, 3, 9, 9)
    corner[0, :, 0, 0] = 1  # the edge is repeated: 9 of the 25 around it are white, and the channels add up
    assert not Variance((3 * (9 / 25 - (9 / 25) ** 2)) ** 0.5 - 1e-6)(corner)[0, 0, 0]
    assert Variance((3 * (9 / 25 - (9 / 25) ** 2)) ** 0.5 + 1e-6)(corner)[0, 0, 0]


def test_local_gradient_by_the_definition():
    lq = torch.rand(2, 3, 9, 11)
    padded = F.pad((lq.double() * 65535).round(), (1, 1, 1, 1), mode='replicate')
    shifted = [padded[..., y : y + 9, x : x + 11] for y, x in ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))]
    own = sum((other - shifted[0]).square().sum(1) for other in shifted[1:])
    around = F.pad(own[:, None], (1, 1, 1, 1), mode='replicate')[:, 0].unfold(1, 3, 1).unfold(2, 3, 1).sum((3, 4))
    expected = 9 * own + around
    found = local_gradient(lq)
    assert found.dtype == torch.float64 and torch.equal(found, expected)
    one_row, one_pixel = local_gradient(lq[..., :1, :]), local_gradient(lq[..., :1, :1])
    assert one_row.shape == (2, 1, 11) and one_row.all() and not one_pixel.any()


def test_gradient_by_hand():
    """One pixel of (0.3, 0, 0.4) on black, 0.5 from each of its neighbours. Mean squared distances are 0.25 for it
    and 0.0625 for each of the four; all five lie in the 3×3 around it, so it gets (0.25 + 0.5 / 9) / 2 = 0.391². A
    neighbour has itself, the middle and two other neighbours in its 3×3, (0.0625 + 0.4375 / 9) / 2 = 0.2357²; a
    diagonal pixel has the middle and two, (0.375 / 9) / 2 = 0.1443²; one two pixels away one, 0.0589²."""
    lq = torch.zeros(1, 3, 7, 7)
    lq[0, :, 3, 3] = torch.tensor([0.3, 0, 0.4])
    away = torch.tensor([[(y - 3) ** 2 + (x - 3) ** 2 for x in range(7)] for y in range(7)])
    for threshold, exempt in ((0.39, away > 0), (0.236, away > 0), (0.235, away > 1), (0.145, away > 1)):
        assert torch.equal(Gradient(threshold)(lq)[0], exempt)
    assert torch.equal(Gradient(0.144)(lq)[0], away > 2) and Gradient(0.392)(lq).all()


@pytest.mark.parametrize('kind', [Variance, Gradient])
def test_higher_thresholds_exempt_more_and_a_constant_image_is_all_flat(kind):
    lq = flat_and_noisy()
    masks = [kind(threshold)(lq) for threshold in (0.02, 0.05, 0.1, 0.2, 2)]
    assert all((a <= b).all() for a, b in zip(masks, masks[1:])) and masks[-1].all()
    shares = [mask.float().mean().item() for mask in masks]
    assert shares == sorted(set(shares))
    assert kind(1e-9)(torch.full((1, 3, 8, 8), 0.3)).all()


def test_dynamic_centres_are_means_and_ties_go_to_the_lowest():
    """Two colours of the image near two of the paper's centres: they become the centres, whatever the batch."""
    lq = torch.full((1, 3, 10, 10), 0.2)
    lq[..., 5:] = torch.tensor([0.8, 0.7, 0.1]).view(3, 1, 1)
    labels, centers = cluster_pixels(lq, num_centers=8, iterations=4)
    assert len(labels.unique()) == 2
    for side in (slice(0, 5), slice(5, 10)):
        (label,) = labels[0, :, side].unique()
        torch.testing.assert_close(centers[0, label].float(), lq[0, :, 0, side.start], rtol=0, atol=1 / 65535)
    none, fixed = cluster_pixels(lq, iterations=0)
    assert torch.equal(none, classify_pixels(lq))


def test_dynamic_lowers_the_distance_at_each_iteration():
    lq = torch.rand(1, 3, 40, 40)
    distances = []
    for iterations in range(6):
        labels, centers = cluster_pixels(lq, 8, iterations)
        distances.append((lq.double() - centers[0][labels[0]].permute(2, 0, 1)[None]).square().sum().item())
    assert all(b <= a * (1 + 1e-6) for a, b in zip(distances, distances[1:])) and distances[-1] < 0.9 * distances[0]


def test_both_is_the_intersection():
    lq = flat_and_noisy()
    mask = build_mask('both', threshold=0.05, num_centers=6, window_size=4)
    colour, flat = PurePass(6, 4)(lq), Variance(0.05)(lq)
    assert torch.equal(mask(lq), colour & flat) and 0 < mask(lq).sum() < min(colour.sum(), flat.sum())
    assert mask.macs(7, 9) == PurePass(6, 4).macs(7, 9) + Variance().macs(7, 9)


@pytest.mark.parametrize('name', NAMES)
def test_an_images_mask_is_its_own(name):
    mask, lq = build_mask(name), flat_and_noisy(batch=3)
    assert name in list_masks() and not list(mask.parameters()) and not mask.state_dict()
    together = mask(lq)
    assert (
        together.dtype == torch.bool and together.shape == (3, *lq.shape[2:]) and 0 < together.sum() < together.numel()
    )
    for i in range(3):
        assert torch.equal(mask(lq[i : i + 1])[0], together[i])
    assert torch.equal(mask(lq.double()), together)  # 8-bit values are on the grid of the integers in any dtype
    assert torch.equal(mask(lq.contiguous(memory_format=torch.channels_last)), together)
    assert mask.macs(20, 30) > 0 and mask.macs(40, 30) == 2 * mask.macs(20, 30)
    assert mask.tint(lq).shape == lq.shape


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('shape', [(1, 1), (1, 7), (3, 2), (0, 5)])
def test_tiny_images(name, shape):
    assert build_mask(name)(torch.rand(2, 3, *shape)).shape == (2, *shape)


@pytest.mark.parametrize('name', NAMES)
def test_bands_show_what_the_whole_image_shows(name):
    mask, lq = build_mask(name), flat_and_noisy(41, 20)
    if mask.period is None:
        assert name == 'dynamic'  # its centres come from the whole image
        return
    period, whole = mask.period, mask(lq)
    for first in range(period, 41 - 2 * period, period):
        band = mask(lq[..., first - period : first + 2 * period, :])
        assert torch.equal(band[:, period : 2 * period], whole[:, first : first + period])


@pytest.mark.parametrize('name', NAMES)
def test_the_device_does_not_matter(name):
    if not torch.cuda.is_available():
        pytest.skip('no CUDA device')
    mask, lq = build_mask(name), flat_and_noisy(200, 300, batch=2)
    assert torch.equal(mask(lq.cuda()).cpu(), mask(lq))


@pytest.mark.parametrize(
    'name, settings',
    [
        ('variance', {'threshold': 0}),
        ('variance', {'threshold': 3}),
        ('variance', {'threshold': float('nan')}),
        ('variance', {'threshold': True}),
        ('variance', {'window_size': 4}),
        ('variance', {'num_centers': 8}),
        ('gradient', {'threshold': 0}),
        ('gradient', {'threshold': float('inf')}),
        ('gradient', {'window_size': 5}),
        ('both', {'threshold': -1}),
        ('both', {'num_centers': 0}),
        ('dynamic', {'num_centers': 0}),
        ('dynamic', {'iterations': -1}),
        ('dynamic', {'shift': 5}),
        ('dynamic', {'threshold': 0.1}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(ValueError):
        build_mask(name, **settings)


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize(
    'lq', [torch.zeros(1, 4, 8, 8), torch.zeros(3, 8, 8), torch.zeros(1, 3, 8, 8, dtype=torch.int64)]
)
def test_other_tensors_are_refused(name, lq):
    with pytest.raises(ValueError, match='must be'):
        build_mask(name)(lq)


@pytest.mark.parametrize('name', NAMES)
def test_what_is_not_finite_stays_where_it_is(name):
    lq = flat_and_noisy()
    lq[0, :, 3, 3] = torch.tensor([float('nan'), float('inf'), -float('inf')])
    assert build_mask(name)(lq).shape == (1, 37, 29)
