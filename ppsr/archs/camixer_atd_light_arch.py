"""CAMixer-ATD-light: the rival of PP-ATD-light, ATD-light with a CAMixer in place of window attention.

CAMixer: Wang et al., "CAMixerSR: Only Details Need More 'Attention'", CVPR 2024, arXiv 2402.19289. The Pure-Pass paper
compares itself with it on the same backbone, but publishes only this much: 16×16 windows, no shift, more parameters.
What is our choice is listed in docs/flops.md ("The rival"). Written from the papers.

A CAMixer decides per window: a small predictor scores the windows, the `ratio` of them with the highest scores get
self-attention, the others a cheap product with a spatial attention map. Shapes: B images, H×W map, C channels, n
windows of S = window_size² tokens.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from ppsr.archs.atd_layers import init_weights
from ppsr.archs.atd_light_arch import ATDLayer, ATDLight
from ppsr.archs.masked import require
from ppsr.registry import register

__all__ = ['CAMixer', 'CAMixerATDLight']

SLOPE = 0.1  # of the leaky ReLUs, as in CAMixerSR
CONDITION_CHANNELS = 2
COORDINATES = 2


def to_windows(x: Tensor, size: int) -> Tensor:
    """(B, H, W, C) -> (B, n, S, C): windows in row-major order, tokens in row-major order inside each."""
    x = x.unflatten(2, (-1, size)).unflatten(1, (-1, size))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def from_windows(x: Tensor, height: int, width: int, size: int) -> Tensor:
    """(B, n, S, C) -> (B, H, W, C), the inverse of :func:`to_windows`."""
    x = x.unflatten(2, (size, size)).unflatten(1, (height // size, width // size))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)


class Predictor(nn.Module):
    """From values, a global condition and in-window coordinates: offsets, scores, channel and spatial attention."""

    def __init__(self, dim: int, window_size: int):
        super().__init__()
        self.window_size = window_size
        inputs = dim + CONDITION_CHANNELS + COORDINATES
        hidden, small = max(inputs // 4, 1), max(inputs // 8, 1)
        self.inward = nn.Sequential(nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.LeakyReLU(SLOPE))
        self.offsets = nn.Sequential(nn.Linear(hidden, small), nn.LeakyReLU(SLOPE), nn.Linear(small, 2), nn.Tanh())
        self.scores = nn.Sequential(
            nn.Linear(window_size**2, window_size), nn.LeakyReLU(SLOPE), nn.Linear(window_size, 2)
        )
        self.channel = nn.Sequential(nn.Linear(hidden, dim), nn.Sigmoid())
        self.spatial = nn.Conv2d(hidden, 1, 3, padding=1)

    def forward(self, v: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """v (B, H, W, C), condition (B, H, W, 2) -> what the heads read, and three of their answers.

        Returns:
            hidden (B, n, S, C'), windows, for :meth:`displacement`; scores (B, n, 2), logits of (attend, skip);
            channel attention (B, 1, 1, C) and spatial attention (B, H, W, 1), both in (0, 1).
        """
        batch, h, w, _ = v.shape
        size = self.window_size
        line = torch.linspace(-1, 1, size, device=v.device, dtype=v.dtype)
        coordinates = torch.stack(torch.meshgrid(line, line, indexing='ij'), -1).repeat(h // size, w // size, 1)
        x = self.inward(torch.cat([v, condition.to(v.dtype), coordinates.expand(batch, -1, -1, -1)], -1))
        hidden = to_windows(x, size)
        scores = self.scores(hidden.mean(-1))
        channel = self.channel(x.mean((1, 2), keepdim=True))
        spatial = self.spatial(x.permute(0, 3, 1, 2)).sigmoid().permute(0, 2, 3, 1)
        return hidden, scores, channel, spatial

    def displacement(self, hidden: Tensor) -> Tensor:
        """(…, C') -> (…, 2): how far (y, x) from its token a key is read, in pixels, at most half a window."""
        return self.offsets(hidden) * (self.window_size / 2)


def read_displaced(x: Tensor, displacement: Tensor, window: Tensor, size: int) -> Tensor:
    """Bilinear samples of a map at displaced tokens of some windows; beyond the border the edge pixel.

    Args:
        x: (B, H, W, C).
        displacement: (B, k, S, 2), (y, x) in pixels.
        window: (B, k) int64, which windows.
        size: side of a window.

    Returns:
        (B, k, S, C), dtype of x.
    """
    h, w = x.shape[1:3]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32  # half precision cannot hold coordinates
    inside = torch.arange(size, device=x.device)
    y = (window // (w // size) * size)[..., None] + inside.repeat_interleave(size)
    x_ = (window % (w // size) * size)[..., None] + inside.repeat(size)
    position = torch.stack([x_, y], -1) + displacement.to(wide).flip(-1)  # grid_sample wants (x, y) in (-1, 1)
    grid = (2 * position + 1) / position.new_tensor([w, h]) - 1
    read = F.grid_sample(x.permute(0, 3, 1, 2).to(wide), grid, padding_mode='border', align_corners=False)
    return read.permute(0, 2, 3, 1).to(x.dtype)


class CAMixer(nn.Module):
    """Content-aware mixer (CAMixerSR, sec. 3): attention for the windows that need it, a convolution for all.

    Training: every window is computed both ways, and a hard Gumbel-softmax mask (straight-through gradient) picks.
    Evaluation: exactly ⌈ratio·n⌉ windows of each image, those with the highest scores (ties: the first), get
    attention; nothing of it is computed for the others.
    """

    def __init__(self, dim: int, window_size: int, num_heads: int, ratio: float = 0.5):
        super().__init__()
        self.window_size, self.num_heads, self.ratio = window_size, num_heads, ratio
        self.predictor = Predictor(dim, window_size)
        self.wq = nn.Linear(dim, dim)
        self.wk = nn.Linear(dim, dim)
        self.wv = nn.Linear(dim, dim)
        self.near = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.far = nn.Conv2d(dim, dim, 3, padding=2, dilation=2, groups=dim)
        self.proj = nn.Linear(dim, dim)

    def num_kept(self, windows: int) -> int:
        """How many of an image's windows get attention in evaluation."""
        return min(math.ceil(self.ratio * windows - 1e-9), windows)  # 0.07·100 is 7.000000000000001

    def forward(self, y: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, H, W, C), condition (B, H, W, 2) -> (B, H, W, C), mask (B, n) in {0, 1}, 1 = the window is attended.

        H and W are multiples of window_size. The mask carries gradients in training.
        """
        size, (h, w) = self.window_size, y.shape[1:3]
        v = self.wv(y)
        hidden, scores, channel, spatial = self.predictor(v, condition)
        queries, values, cheap = to_windows(y, size), to_windows(v, size), to_windows(v * spatial, size)
        if self.training:
            mask = F.gumbel_softmax(scores, hard=True)[..., 0]
            window = torch.arange(mask.shape[1], device=y.device).expand_as(mask)
            gate = mask[..., None, None]
            x = gate * self.attend(y, window, queries, values, hidden) + (1 - gate) * cheap
        else:
            preference = scores[..., 0] - scores[..., 1]
            kept = preference.argsort(dim=-1, descending=True, stable=True)[:, : self.num_kept(scores.shape[1])]
            mask = torch.zeros_like(preference).scatter(1, kept, 1)
            image = torch.arange(y.shape[0], device=y.device)[:, None]
            x = cheap
            if kept.shape[1]:
                chosen = (part[image, kept] for part in (queries, values, hidden))
                x = cheap.index_put((image, kept), self.attend(y, kept, *chosen).to(cheap.dtype))
        x = from_windows(x, h, w, size).permute(0, 3, 1, 2)
        x = (F.gelu(self.far(self.near(x))) * channel.permute(0, 3, 1, 2) + x).permute(0, 2, 3, 1)
        return self.proj(x), mask

    def attend(self, y: Tensor, window: Tensor, queries: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
        """Self-attention inside some windows: map y (B, H, W, C), numbers (B, k) and contents (B, k, S, …) of the
        windows -> (B, k, S, C). Keys are made from the map read at displaced places."""
        keys = read_displaced(y, self.predictor.displacement(hidden), window, self.window_size)
        q, k, v = (
            part.flatten(0, 1).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.wq(queries), self.wk(keys), values)
        )
        x = F.scaled_dot_product_attention(q, k, v)
        return x.transpose(1, 2).flatten(2).unflatten(0, window.shape)

    def macs(self, images: int, tokens: int) -> int:
        """Multiply-adds of matrix products and convolutions in evaluation, for images of so many tokens each."""
        p, size = self.predictor, self.window_size
        windows, c, tokens = tokens // size**2, self.proj.in_features, images * tokens
        attended = images * self.num_kept(windows) * size**2
        hidden, small = p.inward[0].out_features, p.offsets[0].out_features
        predictor = tokens * (p.inward[0].in_features * hidden + hidden * 9)
        predictor += images * (windows * (size**3 + 2 * size) + hidden * c) + attended * (hidden * small + 2 * small)
        attention = attended * (2 * c * c + 2 * size**2 * c)
        return predictor + attention + tokens * (2 * c * c + 2 * 9 * c)


class CAMixerLayer(ATDLayer):
    """An ATD layer whose window branch is a CAMixer with projections of its own; wqkv serves AC-MSA alone."""

    def __init__(self, ratio: float, **layer):
        super().__init__(window_fn=partial(CAMixer, ratio=ratio), **layer)

    def forward(self, x: Tensor, td: Tensor, condition: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map x (B, H, W, C), dictionary td (B, M, C), condition (B, H, W, 2) -> next x, next td, mask (B, n)"""
        y = self.norm1(x)
        x_win, mask = self.attn_win(y, condition)
        x_atd, category, similarity = self.attn_atd(
            self.attn_atd.wq(y).flatten(1, 2), *self.attn_atd.keys_and_values(td)
        )
        x_cross = self.attn_aca(self.wqkv(y).flatten(1, 2), category, None, x_atd)
        x = x + x_win + x_cross.view(x.shape)
        x = self.convffn(x, self.norm2)
        if self.refines:
            td = self.refine(x.flatten(1, 2), td, similarity)
        return x, td, mask


@register(ARCH_REGISTRY)
class CAMixerATDLight(ATDLight):
    """CAMixer-ATD-light: a CAMixer replaces the window attention of every layer; the rest is ATD-light.

    Training draws the masks at random and needs a loss that pulls their mean to `camixer_ratio`
    (:meth:`auxiliary_losses`). Evaluation is deterministic: exactly ⌈camixer_ratio·windows⌉ windows per image.

    Args:
        camixer_ratio: share of the windows that get attention, in [0, 1].
        **kwargs: those of :class:`ATDLight`.

    Raises:
        ValueError: a value that is not supported, named.
    """

    title = 'CAMixer-ATD-light'
    auxiliary_weights = {'ratio': 0.1}

    def __init__(self, camixer_ratio: float = 0.5, **kwargs):
        number = isinstance(camixer_ratio, (int, float)) and not isinstance(camixer_ratio, bool)
        require(number and 0 <= camixer_ratio <= 1, 'camixer_ratio', camixer_ratio, 'a number from 0 to 1')
        super().__init__(layer_fn=partial(CAMixerLayer, ratio=camixer_ratio), **kwargs)
        self.camixer_ratio = camixer_ratio
        dim = self.conv_first.out_channels
        hidden = max(dim // 3, 1)
        self.condition = nn.Sequential(
            nn.Linear(dim, hidden), nn.LeakyReLU(SLOPE), nn.Linear(hidden, CONDITION_CHANNELS)
        )
        self.condition.apply(init_weights)
        self._masks: list[Tensor] = []  # of the last training forward, for auxiliary_losses

    def mixers(self) -> list[CAMixer]:
        """The CAMixers of all layers, in order."""
        return [layer.attn_win for group in self.layers for layer in group.residual_group.layers]

    def body(self, y: Tensor, pure: Tensor | None) -> Tensor:
        condition = self.condition(y)  # global: one for every layer
        collected = []
        for group in self.layers:
            y, masks = group(y, condition)
            collected += masks
        self._masks = collected if self.training else []
        return y

    @classmethod
    def config_from(cls, state_dict):
        return None  # the heads leave no trace in the parameters

    def auxiliary_losses(self) -> dict[str, Tensor]:
        """{'ratio': mean over the layers of (share of attended windows − camixer_ratio)²} of the last forward.

        Raises:
            RuntimeError: the last forward was not one in training mode.
        """
        if not self._masks:
            raise RuntimeError('auxiliary_losses needs a forward in training mode before it')
        shares = torch.stack([mask.mean() for mask in self._masks])
        return {'ratio': (shares - self.camixer_ratio).square().mean()}

    def count(self, height: int, width: int, mask: Tensor) -> dict[str, int]:
        """In evaluation: the windows that get attention are as many in every image."""
        macs = super().count(height, width, mask)
        dim, hidden = self.condition[0].in_features, self.condition[0].out_features
        macs['window'] += mask.shape[0] * height * width * hidden * (dim + CONDITION_CHANNELS)
        return macs

    def __getstate__(self):  # copies and pickles do not carry the graph of the last training step
        return {**self.__dict__, '_masks': []}
