"""Large images in tiles: overlapping, blended, and handed on in bands of rows, so that no large buffer is ever needed.

One way for all who tile: :func:`tiled_bands` is the generator behind ``ppsr upscale``; :func:`tiled_forward` collects
it into one tensor for ``val.tile`` of the BasicSR model.

A network with a mask is run tile by tile with the mask of the tile, and :class:`Totals` adds up what was really used.
ATD's categories span everything that the network sees at once, so tiles change its result a little (docs/upscale.md
has the measured difference); a network that only looks `r` pixels around is reproduced exactly when
``overlap // 4 >= r``.

How two neighbours share their `overlap`: a quarter on either side is thrown away, because there a tile has seen an edge
that the image does not have; the half in the middle is faded over with weights that are strictly positive.
"""

import numbers
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ppsr.archs.masked import as_masked
from ppsr.errors import UserError

__all__ = [
    'DEFAULT_OVERLAP',
    'RepeatedTiles',
    'Totals',
    'count_tiles',
    'run_network',
    'tile_starts',
    'tiled_bands',
    'tiled_forward',
    'tiled_mask',
]

DEFAULT_OVERLAP = 32
MAX_TILE = 2**20
USUAL_MULTIPLE = 16  # of other people's networks: whole windows of most, and no harm to the rest


@dataclass
class Totals:
    """What the network did for one batch of images, added up over the tiles.

    Attributes:
        mask: (B, H, W) bool on the CPU, True = pure, put together from the masks that the tiles really used; None for
            a network that exempts nothing.
        macs: multiply-adds that were done (tiles overlap, so a tiled run does more than a whole one).
        dense_macs: multiply-adds of the same tiles with nothing exempted.
        tiles: network calls.
    """

    mask: Tensor | None = None
    macs: int = 0
    dense_macs: int = 0
    tiles: int = field(default=0)

    @property
    def pure_share(self) -> float:
        """Share of pure pixels, 0 to 1; 0 for a network without a mask."""
        return 0.0 if self.mask is None else self.mask.count_nonzero().item() / self.mask.numel()

    @property
    def saved_share(self) -> float:
        """Share of the dense multiply-adds that were saved, 0 to 1."""
        return 1 - self.macs / self.dense_macs if self.dense_macs else 0.0


def check_tiles(tile: int, overlap: int) -> None:
    """Refuse a tile size and an overlap that do not go together (UserError)."""
    if not isinstance(tile, numbers.Integral) or not 0 <= tile <= MAX_TILE:
        raise UserError(f'tile={tile!r} is not a tile size; give pixels of the input, or 0 for no tiles.')
    if not isinstance(overlap, numbers.Integral) or not 0 <= overlap <= MAX_TILE:
        raise UserError(f'The tile overlap must be a number of pixels, 0 or more, got {overlap!r}.')
    if tile and overlap >= tile:
        raise UserError(f'The tile overlap ({overlap}) must be smaller than the tile ({tile}).')


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """First pixels of the tiles along one side; every tile has min(tile, size) pixels, the last ends with the image.

    >>> tile_starts(100, 40, 8)
    [0, 32, 60]
    >>> tile_starts(30, 40, 8)
    [0]
    """
    if size <= tile:
        return [0]
    return [*range(0, size - tile, tile - overlap), size - tile]


def count_tiles(height: int, width: int, tile: int, overlap: int) -> int:
    """Tiles of an image; tile 0 = one."""
    return 1 if tile == 0 else len(tile_starts(height, tile, overlap)) * len(tile_starts(width, tile, overlap))


def blend_weights(size: int, tile: int, overlap: int, scale: int) -> list[Tensor]:
    """Weights of the tiles along one side, in pixels of the output.

    Returns:
        For each tile of :func:`tile_starts` a (min(tile, size)·scale,) float32: 0 in the margin that is thrown away,
        strictly positive elsewhere; at every pixel of the image the weights of all tiles add up to 1.
    """
    starts, length = tile_starts(size, tile, overlap), min(tile, size) * scale
    margin = overlap // 4 * scale
    fade = overlap * scale - 2 * margin
    ramp = (torch.arange(length, dtype=torch.float64, device='cpu') - margin + 1).clamp(0, fade + 1) / (fade + 1)
    weights = []
    for start in starts:
        weight = torch.ones(length, dtype=torch.float64, device='cpu')
        if start > 0:
            weight = weight * ramp
        if start < starts[-1]:
            weight = weight * ramp.flip(0)
        weights.append(weight)
    total = torch.zeros(size * scale, dtype=torch.float64, device='cpu')
    for start, weight in zip(starts, weights):
        total[start * scale :][:length] += weight
    return [(w / total[start * scale :][:length]).float() for start, w in zip(starts, weights)]


def run_network(net, lq: Tensor, totals: Totals) -> tuple[Tensor, Tensor | None]:
    """One call of the network, counted in `totals`.

    `net` is a :class:`~ppsr.archs.MaskedNetwork`; any other module that maps (B, 3, h, w) to (B, 3, s·h, s·w) works
    too and counts no multiply-adds.

    Returns:
        sr (B, 3, s·h, s·w), and the mask (B, h, w) or None.
    """
    totals.tiles += 1
    contract = as_masked(net)
    if contract is None:
        return net(lq), None
    sr, mask = net(lq, return_mask=True)
    batch, (height, width) = lq.shape[0], lq.shape[-2:]
    dense = batch * sum(contract.macs(height, width).values())
    totals.dense_macs += dense
    totals.macs += dense if mask is None else sum(contract.macs(height, width, mask).values())
    return sr, None if mask is None else mask[:, :height, :width]


class RepeatedTiles:
    """Remembers the tiles of one image, so that those of the next that have the same pixels are not computed again.

    What the network makes of a tile depends on nothing but the tile's pixels, its share of the overlaps included, so
    what is taken from memory equals what would have been computed, bit for bit. One frame's results are held in host
    memory, in the precision in which the network gave them.

    Attributes:
        tiles: that were asked for.
        reused: of them, those that were taken from memory.
        macs: multiply-adds that the latter would have taken.
    """

    def __init__(self):
        self.tiles, self.reused, self.macs = 0, 0, 0
        self._last: list[tuple[Tensor, Tensor, Tensor | None, int]] = []

    def around(self, run: Callable[..., tuple[Tensor, Tensor | None]]) -> Callable[..., tuple[Tensor, Tensor | None]]:
        """`run` of :func:`tiled_bands` for one image, compared with the one before; totals count what is computed."""
        before, self._last = self._last[::-1], []

        def run_new(net, lq: Tensor, totals: Totals) -> tuple[Tensor, Tensor | None]:
            earlier = before.pop() if before else None  # frees the tiles of before one by one
            self.tiles += 1
            if earlier is not None and earlier[0].shape == lq.shape and torch.equal(earlier[0], lq):
                self.reused += 1
                self.macs += earlier[3]
            else:
                macs = totals.macs
                sr, mask = run(net, lq, totals)
                earlier = lq, sr.cpu(), None if mask is None else mask.cpu(), totals.macs - macs
            self._last.append(earlier)
            return earlier[1], earlier[2]

        return run_new


def tiled_bands(
    net,
    read: Callable[[slice, slice], Tensor],
    size: tuple[int, int],
    scale: int,
    tile: int = 0,
    overlap: int = DEFAULT_OVERLAP,
    totals: Totals | None = None,
    on_tile: Callable[[], None] | None = None,
    run: Callable[..., tuple[Tensor, Tensor | None]] = run_network,
) -> Iterator[Tensor]:
    """Run the network on an image tile by tile; the finished rows come in bands from the top down.

    Args:
        net: see :func:`run_network`.
        read: read(rows, columns) -> (B, 3, h, w) on the network's device: the image may lie anywhere.
        size: (H, W) of the image, in pixels.
        scale: of the network.
        tile: side of a tile in input pixels; 0 = the whole image at once.
        overlap: input pixels that neighbours share.
        totals: counts what was done.
        on_tile: called after each tile.
        run: runs the network on one tile; a wrapper of :func:`run_network`.

    Yields:
        (B, 3, rows, scale·W) float32 on the CPU (one tile: as the network gave it, on its device); valid until the
        next is asked for. The rows of all bands together are scale·H.

    Raises:
        UserError: tile and overlap do not go together.
    """
    check_tiles(tile, overlap)
    totals = Totals() if totals is None else totals
    on_tile = on_tile or (lambda: None)
    height, width = size
    tile = tile or max(size)
    if height <= tile and width <= tile:
        sr, totals.mask = run(net, read(slice(0, height), slice(0, width)), totals)
        totals.mask = None if totals.mask is None else totals.mask.cpu()
        on_tile()
        yield sr
        return

    tile_h, tile_w = min(tile, height), min(tile, width)
    tops, lefts = tile_starts(height, tile, overlap), tile_starts(width, tile, overlap)
    weights_y = blend_weights(height, tile, overlap, scale)
    weights_x = blend_weights(width, tile, overlap, scale)
    window: Tensor | None = None  # accumulates the output rows of the current row of tiles
    for top, weight_y, next_top in zip(tops, weights_y, [*tops[1:], height]):
        for left, weight_x in zip(lefts, weights_x):
            rows, columns = slice(top, top + tile_h), slice(left, left + tile_w)
            sr, mask = run(net, read(rows, columns), totals)
            if window is None:
                window = torch.zeros(*sr.shape[:2], tile_h * scale, width * scale, dtype=torch.float32, device='cpu')
            sr = sr.detach().to('cpu', torch.float32)
            # in the margin the weight is 0 and the tile is not looked at: 0·NaN would be NaN
            keep_y, keep_x = _support(weight_y), _support(weight_x)
            part = sr[..., keep_y, keep_x] * weight_y[keep_y, None] * weight_x[keep_x]
            target = window[..., left * scale : (left + tile_w) * scale]
            target[..., keep_y, keep_x] += part
            if mask is not None:
                if totals.mask is None:
                    totals.mask = torch.zeros(mask.shape[0], height, width, dtype=torch.bool, device='cpu')
                _put_mask(totals.mask, mask, rows, columns, overlap)
            on_tile()
        finished = (next_top - top) * scale
        yield window[..., :finished, :]
        if next_top < height:
            remaining = window.shape[-2] - finished
            for row in range(0, remaining, finished):  # in steps of the shift: source and target never overlap
                stop = min(row + finished, remaining)
                window[..., row:stop, :] = window[..., row + finished : stop + finished, :]
            window[..., remaining:, :] = 0


def _support(weight: Tensor) -> slice:
    """The range where a weight is positive."""
    positive = weight.nonzero()
    return slice(int(positive[0]), int(positive[-1]) + 1)


def _put_mask(whole: Tensor, mask: Tensor, rows: slice, columns: slice, overlap: int) -> None:
    """Enter a tile's mask: from the middle of the overlap on; a later tile overwrites an earlier one there."""
    inner_y, inner_x = (slice(overlap // 2 if side.start else 0, side.stop - side.start) for side in (rows, columns))
    whole[:, rows, columns][:, inner_y, inner_x] = mask.cpu()[:, inner_y, inner_x]


def tiled_mask(
    mask_of: Callable[[Tensor], Tensor],
    read: Callable[[slice, slice], Tensor],
    size: tuple[int, int],
    tile: int = 0,
    overlap: int = DEFAULT_OVERLAP,
) -> Tensor:
    """The mask that :func:`tiled_bands` puts together, without running the network.

    Args:
        mask_of: (B, 3, h, w) -> (B, ≥ h, ≥ w) bool, the mask that the network uses for a tile.
        read, size, tile, overlap: as there.

    Returns:
        (B, H, W) bool on the CPU.
    """
    check_tiles(tile, overlap)
    height, width = size
    tile_h, tile_w = min(tile or height, height), min(tile or width, width)
    whole = None
    for top in tile_starts(height, tile_h, overlap):
        for left in tile_starts(width, tile_w, overlap):
            rows, columns = slice(top, top + tile_h), slice(left, left + tile_w)
            mask = mask_of(read(rows, columns))[:, :tile_h, :tile_w]
            if whole is None:
                whole = torch.zeros(mask.shape[0], height, width, dtype=torch.bool, device='cpu')
            _put_mask(whole, mask, rows, columns, overlap)
    return whole


def tiled_forward(
    net,
    lq: Tensor,
    tile: int = 0,
    overlap: int = DEFAULT_OVERLAP,
    on_tile: Callable[[], None] | None = None,
    scale: int | None = None,
) -> tuple[Tensor, Totals]:
    """The network on a batch of images, in tiles; whole when tile is 0 or the images are no larger than a tile.

    Args:
        net: see :func:`run_network`.
        lq: (B, 3, H, W) in [0, 1], on any device: tiles are moved to the network's, one at a time.
        tile, overlap: side of a tile and shared pixels, in input pixels.
        on_tile: called after each tile.
        scale: of the network; None = `net.upscale`.

    Returns:
        sr (B, 3, s·H, s·W) on the device of `lq`, and the :class:`Totals` of the batch.

    Raises:
        UserError: tile and overlap do not go together.
    """
    parameter = next(net.parameters(), lq)
    totals = Totals()
    bands = tiled_bands(
        net,
        lambda rows, columns: lq[..., rows, columns].to(parameter.device),
        tuple(lq.shape[-2:]),
        net.upscale if scale is None else scale,
        tile,
        overlap,
        totals,
        on_tile,
    )
    # every band is copied at once: the generator reuses its buffer
    return torch.cat([band.to(lq.device, copy=True) for band in bands], dim=-2), totals


def multiple_of(net) -> int:
    """What the sides of a network's input are padded to; :data:`USUAL_MULTIPLE` for networks that do not say."""
    contract = as_masked(net)
    return USUAL_MULTIPLE if contract is None else contract.multiple


def accumulator_bytes(width: int, scale: int) -> int:
    """Bytes that :func:`tiled_bands` holds per input row of a tile, in host memory."""
    return 4 * 3 * scale * scale * width
