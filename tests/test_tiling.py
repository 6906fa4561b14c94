"""Tiles: nothing uncovered, nothing visible, everything counted."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ppsr.archs import ATDLight, PPATDLight
from ppsr.errors import UserError
from ppsr.tiling import blend_weights, count_tiles, tile_starts, tiled_bands, tiled_forward

TINY = dict(
    upscale=2,
    embed_dim=16,
    depths=[1],
    num_heads=[2],
    window_size=8,
    category_size=16,
    num_tokens=8,
    reducted_dim=4,
    convffn_kernel_size=5,
)


class Local(nn.Module):
    """A network that looks `radius` pixels around and no further."""

    def __init__(self, radius: int, upscale: int = 2):
        super().__init__()
        self.upscale, self.largest = upscale, (0, 0)
        torch.manual_seed(radius)
        self.conv = nn.Conv2d(3, 3 * upscale**2, 2 * radius + 1, padding=radius)

    def forward(self, x):
        self.largest = max(self.largest, tuple(x.shape[-2:]))
        return nn.functional.pixel_shuffle(self.conv(x), self.upscale)


def tiny(arch, seed: int = 0):
    torch.manual_seed(seed)
    return arch(**TINY).eval()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2), st.integers(0, 11), st.integers(8, 30), st.data())
def test_a_local_network_is_reproduced_exactly(height, width, radius, more, tile_more, data):
    overlap = 4 * radius + more
    tile = overlap + tile_more
    net = Local(radius, data.draw(st.integers(1, 3)))
    lq = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height * 61 + width))
    with torch.inference_mode():
        whole = net(lq)
        tiled, totals = tiled_forward(net, lq, tile, overlap)
    torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-6)
    assert totals.tiles == count_tiles(height, width, tile, overlap)
    assert totals.macs == totals.dense_macs == 0 and totals.mask is None and totals.pure_share == 0


@pytest.mark.parametrize('size', [(1, 1), (1, 50), (50, 1), (3, 90), (16, 16), (17, 33)], ids=str)
@pytest.mark.parametrize('tile, overlap', [(16, 0), (16, 5), (17, 12), (13, 7), (64, 32)])
def test_extreme_sizes_and_odd_overlaps(size, tile, overlap):
    net = Local(1)
    lq = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tiled, _ = tiled_forward(net, lq, tile, overlap)
        whole = net(lq)
    assert tiled.shape == whole.shape and torch.isfinite(tiled).all()
    if overlap >= 4:
        torch.testing.assert_close(tiled, whole, rtol=0, atol=2e-6)
    net.largest = (0, 0)
    with torch.inference_mode():
        tiled_forward(net, lq, tile, overlap)
    assert max(net.largest) <= tile  # never more at once than asked for


@given(st.integers(1, 200), st.integers(1, 64), st.data(), st.integers(1, 4))
def test_weights_are_positive_and_add_up_to_one(size, tile, data, scale):
    overlap = data.draw(st.integers(0, tile - 1))
    starts = tile_starts(size, tile, overlap)
    length = min(tile, size)
    assert starts[0] == 0 and starts[-1] + length == size
    assert all(0 < b - a <= tile - overlap for a, b in zip(starts, starts[1:]))
    total, covered = torch.zeros(size * scale), torch.zeros(size * scale, dtype=torch.bool)
    for i, (start, weight) in enumerate(zip(starts, blend_weights(size, tile, overlap, scale))):
        total[start * scale :][: length * scale] += weight
        inner = torch.ones(length * scale, dtype=torch.bool)
        margin = overlap // 4 * scale
        if i > 0:
            inner[:margin] = False
        if i < len(starts) - 1:
            inner[length * scale - margin :] = False
        assert (weight[inner] > 0).all() and (weight[~inner] == 0).all()
        covered[start * scale :][: length * scale] |= inner
    assert covered.all()
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)


def test_what_a_tile_gives_in_its_margin_is_not_looked_at():
    class Edges(nn.Module):  # NaN where a tile ends: 0 · NaN would spread
        upscale = 1

        def forward(self, x):
            y = x.clone()
            y[..., 0, :] = y[..., -1, :] = y[..., :, 0] = y[..., :, -1] = float('nan')
            return y

    lq = torch.rand(1, 3, 40, 40)
    tiled, _ = tiled_forward(Edges(), lq, 16, 8)
    torch.testing.assert_close(tiled[..., 1:-1, 1:-1], lq[..., 1:-1, 1:-1])


def test_bands_come_in_order_and_reading_is_confined_to_tiles():
    net, lq, asked = Local(0), torch.rand(1, 3, 50, 30), []

    def read(rows, columns):
        asked.append((rows, columns))
        return lq[..., rows, columns]

    with torch.inference_mode():
        bands = [band.clone() for band in tiled_bands(net, read, (50, 30), 2, tile=20, overlap=4)]
        torch.testing.assert_close(torch.cat(bands, 2), net(lq))
    assert len(bands) == 3 and len(asked) == count_tiles(50, 30, 20, 4) == 6
    assert all(r.stop - r.start == 20 and c.stop - c.start == 20 for r, c in asked)


def test_statistics_of_the_whole_are_those_of_the_network():
    net = tiny(PPATDLight)
    lq = torch.rand(2, 3, 21, 27, generator=torch.Generator().manual_seed(1))
    lq[0, :, :15] = 0.5
    with torch.inference_mode():
        sr, totals = tiled_forward(net, lq)
        expected, mask = net(lq, return_mask=True)
    torch.testing.assert_close(sr, expected, rtol=0, atol=0)
    assert torch.equal(totals.mask, mask[:, :21, :27]) and 0 < totals.pure_share < 1
    assert totals.macs == sum(net.macs(21, 27, mask).values())
    assert totals.dense_macs == 2 * sum(net.macs(21, 27).values())
    assert 0 < totals.saved_share < 1 and totals.tiles == 1


def test_statistics_of_tiles_add_up():
    net = tiny(PPATDLight)
    lq = torch.rand(1, 3, 40, 24, generator=torch.Generator().manual_seed(1))
    lq[..., 20:, :] = 0.5
    with torch.inference_mode():
        _, totals = tiled_forward(net, lq, tile=24, overlap=8)
        parts = [net(lq[..., top : top + 24, :], return_mask=True)[1] for top in (0, 16)]
    assert totals.tiles == 2
    assert totals.macs == sum(sum(net.macs(24, 24, mask).values()) for mask in parts)
    assert totals.dense_macs == 2 * sum(net.macs(24, 24).values())
    # each pixel's mask is that of the tile on whose side of the overlap's middle it lies
    expected = torch.cat([parts[0][:, :20, :24], parts[1][:, 4:24, :24]], 1)
    assert torch.equal(totals.mask, expected) and totals.mask[:, 25:].all()


def test_a_network_without_mask_counts_dense():
    net = tiny(ATDLight)
    with torch.inference_mode():
        _, totals = tiled_forward(net, torch.rand(1, 3, 20, 20), 12, 4)
    assert totals.mask is None and totals.macs == totals.dense_macs > 0 and totals.saved_share == 0


@pytest.mark.parametrize('tile, overlap', [(-1, 0), (16, 16), (16, 20), (16, -1), (8, 32)])
def test_senseless_tiles_are_refused(tile, overlap):
    with pytest.raises(UserError):
        tiled_forward(Local(0), torch.rand(1, 3, 20, 20), tile, overlap)
