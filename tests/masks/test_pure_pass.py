"""The mask against a plain loop, hand-drawn cases and its invariants."""

import colorsys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ppsr import PurePass
from ppsr.masks.pure_pass import classify_pixels, color_centers, pure_mask, window_mask

RED, CYAN = (1.0, 0.0, 0.0), (0.0, 1.0, 1.0)


def paint(h, w, color) -> torch.Tensor:
    return torch.tensor(color).view(1, 3, 1, 1).expand(1, 3, h, w).clone()


def loop_mask(labels: torch.Tensor, window_size: int, offset: int) -> torch.Tensor:
    """The definition: one window after the other."""

    def edges(size):
        first = offset if size >= window_size else 0
        cuts = sorted({0, size, *range(first, size, window_size)})
        return list(zip(cuts, cuts[1:]))

    mask = torch.zeros(labels.shape, dtype=torch.bool)
    for b in range(labels.shape[0]):
        for top, bottom in edges(labels.shape[1]):
            for left, right in edges(labels.shape[2]):
                cell = labels[b, top:bottom, left:right]
                mask[b, top:bottom, left:right] = bool((cell == cell[0, 0]).all())
    return mask


def test_centers_are_uniform_in_hue():
    centers = color_centers(8)
    assert centers.shape == (8, 3) and centers.dtype == torch.float64
    for k, center in enumerate(centers.tolist()):
        h, s, v = colorsys.rgb_to_hsv(*center)
        assert (h, s, v) == pytest.approx((k / 8, 0.9, 0.9))
    assert centers[2].tolist() == pytest.approx([0.495, 0.9, 0.09])  # hue 90°: q = v(1 − s/2)


@given(st.integers(1, 12), st.integers(0, 2**31))
def test_labels_are_the_nearest_center(num_centers, seed):
    lq = torch.rand(1, 3, 7, 5, generator=torch.Generator().manual_seed(seed))
    distance = (lq.double().permute(0, 2, 3, 1)[..., None, :] - color_centers(num_centers)).square().sum(-1)
    labels = classify_pixels(lq, num_centers)
    chosen = distance.gather(-1, labels[..., None])[..., 0]
    assert (chosen - distance.amin(-1)).max() < 1e-4  # the grid of 1/65535 may decide a near-tie


def test_ties_go_to_the_lowest_label():
    # a gray pixel is as far from hue k/8 as from hue −k/8 (green and blue swapped): label 2 or 6, never 6
    gray = torch.linspace(0, 1, 256).view(1, 1, 1, -1).expand(1, 3, 1, -1)
    assert set(classify_pixels(gray).flatten().tolist()) <= {0, 1, 2, 3, 4}


@given(
    st.integers(1, 3),
    st.integers(1, 17),
    st.integers(1, 17),
    st.integers(1, 7).flatmap(lambda w: st.tuples(st.just(w), st.integers(0, w - 1))),
    st.integers(0, 2**31),
)
def test_window_mask_equals_the_loop(b, h, w, window, seed):
    labels = (torch.rand(b, h, w, generator=torch.Generator().manual_seed(seed)) < 0.08).long() * 3
    assert torch.equal(window_mask(labels, *window), loop_mask(labels, *window))


def test_one_color_is_all_pure():
    for size in [(1, 1), (3, 4), (5, 5), (12, 31)]:
        assert PurePass()(paint(*size, RED)).all(), size


def test_two_halves():
    lq = paint(10, 10, RED)
    lq[..., 7:] = torch.tensor(CYAN).view(1, 3, 1, 1)
    # plain grid: columns 5–9 are mixed; grid shifted by 2: columns 2–6 and 7–9 are of one colour each
    plain = PurePass(fuse=False)(lq)[0]
    assert plain[:, :5].all() and not plain[:, 5:].any()
    assert PurePass()(lq).all()


def test_one_pixel_speck():
    lq = paint(15, 15, RED)
    lq[0, :, 7, 7] = torch.tensor(CYAN)
    plain, fused = PurePass(fuse=False)(lq)[0], PurePass()(lq)[0]
    expected = torch.ones(15, 15, dtype=torch.bool)
    expected[5:10, 5:10] = False  # the window that holds it, on the plain grid
    assert torch.equal(plain, expected)
    expected[:] = True
    expected[7:10, 7:10] = False  # 5–9 on the plain grid and 7–11 on the shifted one
    assert torch.equal(fused, expected)


def test_border_windows_stand_for_themselves():
    lq = paint(7, 7, RED)
    lq[0, :, 0, 0] = torch.tensor(CYAN)
    plain = PurePass(fuse=False)(lq)[0]
    assert not plain[:5, :5].any() and plain[5:].all() and plain[:, 5:].all()


def test_image_smaller_than_the_window_is_one_window():
    lq = paint(4, 3, RED)
    assert PurePass()(lq).all()
    lq[0, :, 3, 2] = torch.tensor(CYAN)
    assert not PurePass()(lq).any()


def test_shift_zero_adds_nothing():
    lq = torch.rand(1, 3, 20, 20)
    assert torch.equal(PurePass(shift=0)(lq), PurePass(fuse=False)(lq))


@given(st.integers(0, 2**31))
def test_batch_equals_single_and_channels_last(seed):
    g = torch.Generator().manual_seed(seed)
    lq = (torch.rand(3, 3, 5, 6, generator=g) * 2).round() / 2
    lq = lq.repeat_interleave(4, -1).repeat_interleave(3, -2)  # large flat patches
    mask = pure_mask(lq)
    assert mask.dtype == torch.bool and mask.shape == (3, 15, 24)
    for b in range(3):
        assert torch.equal(mask[b], pure_mask(lq[b : b + 1])[0])
    assert torch.equal(mask, pure_mask(lq.contiguous(memory_format=torch.channels_last)))
    assert torch.equal(mask, pure_mask(lq.double()))


def test_eight_bit_values_are_exact_in_every_dtype():
    values = torch.arange(256).view(1, 1, 1, -1).expand(1, 3, 2, -1) / 255
    assert torch.equal(classify_pixels(values), classify_pixels(values.double()))


def test_no_parameters_and_no_gradient():
    pp = PurePass()
    assert not list(pp.parameters()) and not pp.state_dict()
    assert not pp(torch.rand(1, 3, 8, 8, requires_grad=True)).requires_grad


def test_nan_and_out_of_range_do_not_fail():
    lq = torch.full((1, 3, 6, 6), float('nan'))
    assert PurePass()(lq).shape == (1, 6, 6)
    assert torch.equal(pure_mask(paint(6, 6, RED) * 7 - 3), pure_mask(paint(6, 6, RED)))


@pytest.mark.parametrize(
    'kwargs, word',
    [
        ({'num_centers': 0}, 'num_centers'),
        ({'window_size': 0}, 'window_size'),
        ({'shift': 5}, 'shift'),
        ({'shift': -1}, 'shift'),
    ],
)
def test_bad_settings_are_refused(kwargs, word):
    with pytest.raises(ValueError, match=word):
        PurePass(**kwargs)


@pytest.mark.parametrize('shape', [(3, 8, 8), (1, 4, 8, 8)])
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r'\(B, 3, H, W\)'):
        PurePass()(torch.rand(shape))


def test_integers_are_refused():
    with pytest.raises(ValueError, match='floating point'):
        PurePass()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def test_doctests():
    import doctest

    import ppsr.masks.pure_pass

    results = doctest.testmod(ppsr.masks.pure_pass, extraglobs={'torch': torch})
    assert results.attempted >= 4 and results.failed == 0


@pytest.mark.parametrize('num_centers', [15, 16, 17, 33, 360])
def test_many_centres_are_gone_through_in_parts(num_centers):
    """The label is the nearest centre, the lowest of several, whatever part it is in."""
    lq = torch.randint(0, 256, (2, 3, 6, 5)) / 255
    lq[0, :, 0, 0] = 0.5  # gray is equally far from all centres of a symmetric set, up to rounding
    centers = color_centers(num_centers)
    pixels = (lq.double() * 65535).round() / 65535
    distance = (pixels[:, None] - centers.view(1, -1, 3, 1, 1)).square().sum(2)
    label = classify_pixels(lq, num_centers)
    found = distance.gather(1, label[:, None])[:, 0]
    assert (found - distance.amin(1)).abs().max() < 1e-4 and label.max() >= num_centers // 2


def test_a_window_far_larger_than_the_image_takes_no_more_memory_than_the_image():
    labels = torch.zeros(1, 6, 9, dtype=torch.int64)
    assert window_mask(labels, 10**9, 5 * 10**8).all()
    labels[0, 2, 3] = 1
    assert not window_mask(labels, 10**9).any()
    assert (
        window_mask(labels, 7).tolist()
        == window_mask(torch.nn.functional.pad(labels, (0, 0, 0, 1), value=0), 7)[:, :6].tolist()
    )


@pytest.mark.parametrize('num_centers', [0, 4097, 10**9])
def test_the_number_of_centres_has_a_range(num_centers):
    with pytest.raises(ValueError, match='num_centers must be 1 to 4096'):
        PurePass(num_centers)
