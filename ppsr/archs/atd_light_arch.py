"""ATD-light: adaptive token dictionary for lightweight super-resolution, and its Pure-Pass version PP-ATD-light.

ATD: Zhang et al., "Transcending the Limit of Local Window: Advanced Super-Resolution Transformer with Adaptive Token
Dictionary", CVPR 2024, arXiv 2401.08209. Pure-Pass: Wu et al., arXiv 2510.01997. Written from the papers; parameter
names are those of the published checkpoints, which load with strict=True.

Read top to bottom: attention branches → layer → group → network. Shapes: B images, H×W map, N = H·W tokens, C channels,
M dictionary tokens. Tokens stay in (B, H, W, C) order throughout; convolutions see the same memory as channels_last.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppsr.masks.pure_pass import PurePass
from ppsr.ops.category_attention import COMPENSATIONS, category_attention
from ppsr.ops.category_attention import attention_macs as category_macs
from ppsr.ops.layers import (
    Similarity,
    depthwise_mix,
    dictionary_attention,
    dictionary_refinement,
    linear_add,
    norm_linear,
)
from ppsr.ops.window_attention import attention_macs as window_macs
from ppsr.ops.window_attention import window_attention
from ppsr.registry import register

__all__ = ['ATDLight', 'PPATDLight']

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K
MAX_LOGIT_SCALE = math.log(100)

PUBLISHED_BUFFER = 'relative_position_index_SA'

# Multiply-adds of a network by part. One convention everywhere (docs/flops.md): each product of a matrix product or a
# convolution counts once, the input is padded as the network pads it, every executed operator counts.
PARTS = ('shallow', 'qkv', 'window', 'dictionary', 'category', 'ffn', 'convolutions', 'upsampler')


class WindowAttention(nn.Module):
    """SW-MSA: attention inside shifted windows with a learned relative position bias, then a projection."""

    def __init__(self, dim: int, window_size: int, num_heads: int):
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, qkv: Tensor, shift: int, *add: Tensor) -> Tensor:
        """qkv (B, H, W, 3C) -> (B, H, W, C), plus what is to be added, up to two maps"""
        x = window_attention(
            qkv,
            self.relative_position_bias_table,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift=shift,
        )
        return linear_add(x, self.proj, *add)


class DictionaryAttention(nn.Module):
    """ATD-CA: every token attends to the M tokens of the dictionary by cosine similarity (ATD, eq. 4–6)."""

    def __init__(self, dim: int, num_tokens: int, reducted_dim: int):
        super().__init__()
        self.num_tokens = num_tokens
        self.scale = nn.Parameter(torch.full((num_tokens,), 0.5))
        self.wq = nn.Linear(dim, reducted_dim)
        self.wk = nn.Linear(dim, reducted_dim)
        self.wv = nn.Linear(dim, dim)

    def forward(self, q: Tensor, td: Tensor) -> tuple[Tensor, Tensor, Similarity]:
        """q = wq(tokens) (B, N, r), dictionary td (B, M, C) -> output (B, N, C), category (B, N), their similarity"""
        scale = 1 + self.scale.clamp(0, 1) * math.log(self.num_tokens)
        k = F.normalize(self.wk(td), dim=-1) * scale[:, None]
        return dictionary_attention(q, k, self.wv(td))


class CategoryAttention(nn.Module):
    """AC-MSA: attention among tokens of like category; pure tokens are exempt (ATD, sec. 3.3; Pure-Pass)."""

    compensation = 'value'  # PPATDLight sets its own

    def __init__(self, dim: int, num_heads: int, category_size: int):
        super().__init__()
        self.num_heads, self.category_size = num_heads, category_size
        self.logit_scale = nn.Parameter(torch.full((1, 1), math.log(10)))
        self.proj = nn.Linear(dim, dim)

    def forward(self, qkv: Tensor, category: Tensor, pure: Tensor | None, *add: Tensor) -> Tensor:
        """qkv (B, N, 3C), category (B, N), pure (B, N) bool or None -> (B, N, C), plus what is to be added"""
        x = category_attention(
            qkv,
            category,
            self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp(),
            num_heads=self.num_heads,
            category_size=self.category_size,
            pure=pure,
            compensation=self.compensation,
        )
        if pure is None or self.compensation == 'value':
            return linear_add(x, self.proj, *add)
        # 'bypass' and 'zero' skip the projection, too: x already holds what a pure token gets
        if torch.compiler.is_compiling():  # a number of rows that depends on the data would break the graph
            x = torch.where(pure[..., None], x, self.proj(x))
        else:
            x = x.masked_scatter(~pure[..., None], self.proj(x[~pure]).to(x.dtype))
        return sum(add, start=x)


class ConvFFN(nn.Module):
    """x + W₂(u + GELU(DWConv(u))) with u = GELU(W₁ norm(x)): a feed-forward network that sees its k×k neighbourhood."""

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        depthwise = nn.Conv2d(hidden_dim, hidden_dim, kernel_size, padding=kernel_size // 2, groups=hidden_dim)
        self.dwconv = nn.Module()  # the two levels are in the published parameter names; only the weights are used
        self.dwconv.depthwise_conv = nn.Sequential(depthwise, nn.GELU())
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor, norm: nn.LayerNorm) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)"""
        (u,) = norm_linear(x, norm, self.fc1, gelu=True)
        return linear_add(depthwise_mix(u, self.dwconv.depthwise_conv[0]), self.fc2, x)


class ATDLayer(nn.Module):
    """One transformer layer: x + SW-MSA + ATD-CA + AC-MSA, then + ConvFFN; refines the dictionary on the way out."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int,
        category_size: int,
        num_tokens: int,
        reducted_dim: int,
        convffn_kernel_size: int,
        mlp_ratio: float,
        refines: bool,
    ):
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.wqkv = nn.Linear(dim, 3 * dim)  # one projection for both self-attentions
        self.attn_win = WindowAttention(dim, window_size, num_heads)
        self.attn_atd = DictionaryAttention(dim, num_tokens, reducted_dim)
        self.attn_aca = CategoryAttention(dim, num_heads, category_size)
        self.convffn = ConvFFN(dim, int(dim * mlp_ratio), convffn_kernel_size)
        self.refines = refines  # the last layer of a group has nobody to hand the dictionary to
        if refines:
            self.norm3 = nn.InstanceNorm1d(num_tokens, affine=True)
            self.sigma = nn.Parameter(torch.zeros(num_tokens, 1))

    def forward(self, x: Tensor, td: Tensor, pure: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map x (B, H, W, C), dictionary td (B, M, C), pure (B, N) bool or None -> next x, next td"""
        qkv, q = norm_linear(x, self.norm1, self.wqkv, self.attn_atd.wq)
        x_atd, category, similarity = self.attn_atd(q.flatten(1, 2), td)
        x_cross = self.attn_aca(qkv.flatten(1, 2), category, pure, x_atd)  # what tokens get from far away
        x = self.attn_win(qkv, self.shift, x, x_cross.view(x.shape))
        x = self.convffn(x, self.norm2)
        if self.refines:
            td = self.refine(x.flatten(1, 2), td, similarity)
        return x, td

    def refine(self, x: Tensor, td: Tensor, similarity: Similarity) -> Tensor:
        """Adaptive dictionary refinement (ATD, eq. 7–8): each entry moves towards the tokens that resemble it."""
        keep = torch.sigmoid(self.sigma)
        return keep * td + (1 - keep) * dictionary_refinement(similarity, x, self.norm3)


class ATDGroup(nn.Module):
    """The layers of one group around a dictionary of their own."""

    layer_class = ATDLayer  # a relative of the network may bring its own, here and below

    def __init__(self, dim: int, depth: int, num_tokens: int, window_size: int, use_checkpoint: bool, **layer):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.td = nn.Parameter(torch.rand(num_tokens, dim))
        self.layers = nn.ModuleList(
            self.layer_class(
                dim=dim,
                num_tokens=num_tokens,
                window_size=window_size,
                shift=window_size // 2 * (i % 2),
                refines=i < depth - 1,
                **layer,
            )
            for i in range(depth)
        )
        trunc_normal_(self.td, std=0.02)

    def forward(self, x: Tensor, pure: Tensor | None) -> Tensor:
        # a copy per image and no view: under no_grad FlopCounterMode stumbles over views of parameters
        td = self.td.repeat(x.shape[0], 1, 1)
        for layer in self.layers:
            if self.use_checkpoint and torch.is_grad_enabled():
                x, td = checkpoint(layer, x, td, pure, use_reentrant=False)
            else:
                x, td = layer(x, td, pure)
        return x


class ResidualGroup(nn.Module):
    """A group, a 3×3 convolution, and the way around both."""

    group_class = ATDGroup

    def __init__(self, dim: int, **group):
        super().__init__()
        self.residual_group = self.group_class(dim, **group)
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)

    def forward(self, x: Tensor, pure: Tensor | None) -> Tensor:
        y = self.residual_group(x, pure)
        return x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Only the LayerNorm behind the first convolution; a module because the published parameter names have one."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


def relative_position_index(window_size: int) -> Tensor:
    """Row of the relative position bias table for each query and key of a window.

    Returns:
        (S, S) int64 for the S = window_size² tokens of a window: query (y, x) and key (y', x') use the row
        (y − y' + w − 1)·(2w − 1) + x − x' + w − 1.
    """
    line = torch.arange(window_size)
    y, x = (part.flatten() for part in torch.meshgrid(line, line, indexing='ij'))
    down, right = (part[:, None] - part[None, :] + window_size - 1 for part in (y, x))
    return down * (2 * window_size - 1) + right


def mirror_pad(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) at the bottom and right to a multiple, mirrored with the edge pixel repeated (as published)."""

    def index(size: int) -> Tensor:
        i = torch.arange(-(-size // multiple) * multiple, device=x.device) % (2 * size)
        return torch.where(i < size, i, 2 * size - 1 - i)

    h, w = x.shape[-2:]
    if h % multiple:
        x = x.index_select(-2, index(h))
    if w % multiple:
        x = x.index_select(-1, index(w))
    return x


@register(ARCH_REGISTRY)
class ATDLight(nn.Module):
    """ATD-light, the published network; the defaults are its published configuration at ×4 (768,792 parameters).

    Args:
        upscale: 2, 3, 4 or any factor ≥ 1.
        in_chans: 3 (RGB).
        img_size: accepted because option files of ATD have it; the network takes any size.
        embed_dim: C.
        depths: layers of each group.
        num_heads: heads of each group.
        window_size: side of the SW-MSA windows.
        category_size: tokens of an AC-MSA group.
        num_tokens: M, entries of the dictionary of each group.
        reducted_dim: channels of the query and key of ATD-CA.
        convffn_kernel_size: odd.
        img_range: 1.0, the value range of the images.
        mlp_ratio: hidden channels of the ConvFFN over C.
        upsampler: 'pixelshuffledirect', pixel shuffle in one step.
        resi_connection: '1conv'.
        use_checkpoint: recompute each layer in the backward pass (torch.utils.checkpoint): less memory, more time.

    Shape: (B, 3, H, W) RGB in [0, 1], any H and W ≥ 1 -> (B, 3, upscale·H, upscale·W). An image's output does not
    depend on the others of its batch.

    Raises:
        ValueError: a value that is not supported, named.
    """

    group_class = ResidualGroup

    def __init__(
        self,
        upscale: int = 4,
        in_chans: int = 3,
        img_size: int = 64,
        embed_dim: int = 48,
        depths: Sequence[int] = (6, 6, 6, 6),
        num_heads: Sequence[int] = (4, 4, 4, 4),
        window_size: int = 16,
        category_size: int = 128,
        num_tokens: int = 64,
        reducted_dim: int = 8,
        convffn_kernel_size: int = 7,
        img_range: float = 1.0,
        mlp_ratio: float = 1,
        upsampler: str = 'pixelshuffledirect',
        resi_connection: str = '1conv',
        use_checkpoint: bool = False,
    ):
        super().__init__()
        _require(in_chans == 3, 'in_chans', in_chans, '3 (RGB)')
        _require(img_range == 1, 'img_range', img_range, '1.0 (images in [0, 1])')
        _require(upsampler == 'pixelshuffledirect', 'upsampler', upsampler, "'pixelshuffledirect'")
        _require(resi_connection == '1conv', 'resi_connection', resi_connection, "'1conv'")
        _require(convffn_kernel_size % 2 == 1, 'convffn_kernel_size', convffn_kernel_size, 'an odd number')
        _require(len(depths) == len(num_heads), 'num_heads', num_heads, f'one number for each of depths={list(depths)}')
        for heads in num_heads:
            _require(heads > 0 and embed_dim % heads == 0, 'num_heads', heads, f'a divisor of embed_dim={embed_dim}')
        sizes = dict(
            upscale=upscale,
            img_size=img_size,
            embed_dim=embed_dim,
            window_size=window_size,
            category_size=category_size,
            num_tokens=num_tokens,
            reducted_dim=reducted_dim,
        )
        for name, size in sizes.items():
            _require(isinstance(size, int) and size > 0, name, size, 'a positive integer')

        self.upscale, self.window_size = upscale, window_size
        self.register_buffer('mean', torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(3, embed_dim, 3, padding=1)
        self.patch_embed = PatchEmbed(embed_dim)
        self.layers = nn.ModuleList(
            self.group_class(
                embed_dim,
                depth=depth,
                num_heads=heads,
                window_size=window_size,
                category_size=category_size,
                num_tokens=num_tokens,
                reducted_dim=reducted_dim,
                convffn_kernel_size=convffn_kernel_size,
                mlp_ratio=mlp_ratio,
                use_checkpoint=use_checkpoint,
            )
            for depth, heads in zip(depths, num_heads)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(embed_dim, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))
        self.apply(_init_weights)

    def pure_mask(self, lq: Tensor) -> Tensor | None:
        """Mask of the pure pixels of padded images, or None where the network exempts none (this one)."""
        return None

    def body(self, y: Tensor, pure: Tensor | None) -> Tensor:
        """All groups: (B, H', W', C) shallow features, mask of the pure tokens (B, H'·W') or None -> (B, H', W', C)"""
        for group in self.layers:
            y = group(y, pure)
        return y

    def forward(self, x: Tensor, return_mask: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """(B, 3, H, W) -> (B, 3, sH, sW); with `return_mask` also the mask used, (B, H', W') bool."""
        if x.dim() != 4 or x.shape[1] != 3 or 0 in x.shape:
            raise ValueError(f'the network takes (B, 3, H, W) with B, H, W ≥ 1, got {tuple(x.shape)}')
        h, w = x.shape[-2:]
        x = mirror_pad(x, self.window_size)
        mask = self.pure_mask(x)  # once per image, for every layer
        pure = None if mask is None else mask.flatten(1)
        mean = self.mean.to(x.dtype)

        shallow = self.conv_first((x - mean).contiguous(memory_format=torch.channels_last))
        y = self.body(self.patch_embed(shallow.permute(0, 2, 3, 1)), pure)
        y = self.norm(y).permute(0, 3, 1, 2)
        sr = self.upsample(shallow + self.conv_after_body(y)) + mean
        sr = sr[..., : h * self.upscale, : w * self.upscale]
        return (sr, mask) if return_mask else sr

    def macs(self, height: int, width: int, pure: Tensor | None = None) -> dict[str, int]:
        """Multiply-adds by part (:data:`PARTS`) for images of height × width LQ pixels.

        Args:
            height, width: of the LQ images, before padding.
            pure: (B, H', W') bool, the masks that :meth:`forward` used: counts these B images. None: one image in
                the dense network.
        """
        s = self.window_size
        batch, n = 1 if pure is None else pure.shape[0], (-(-height // s) * s) * (-(-width // s) * s)
        active = [n] * batch if pure is None else (n - pure.flatten(1).sum(1)).tolist()
        c, total = self.conv_first.out_channels, batch * n
        macs = dict.fromkeys(PARTS, 0)
        macs['shallow'] = total * 3 * c * 9
        macs['convolutions'] = total * c * c * 9 * (len(self.layers) + 1)
        macs['upsampler'] = total * c * self.upsample[0].out_channels * 9
        for layer in (layer for group in self.layers for layer in group.residual_group.layers):
            atd, aca, ffn = layer.attn_atd, layer.attn_aca, layer.convffn
            m, r = atd.num_tokens, atd.wq.out_features
            hidden, kernel = ffn.fc1.out_features, ffn.dwconv.depthwise_conv[0].kernel_size[0]
            projected = batch * n if aca.compensation == 'value' else sum(active)
            macs['qkv'] += total * c * 3 * c
            macs['window'] += window_macs(total, c, s) + total * c * c
            macs['dictionary'] += total * (c * r + r * m + m * c) + batch * m * c * (r + c)
            if layer.refines:
                macs['dictionary'] += total * m * c
            macs['category'] += category_macs(active, c, aca.category_size) + projected * c * c
            macs['ffn'] += total * hidden * (2 * c + kernel**2)
        return macs

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # the published code and spandrel keep this table as a buffer and ask for it; here it is not needed to compute
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + PUBLISHED_BUFFER] = relative_position_index(self.window_size)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # it follows from window_size: files with and without it load strictly
        state_dict.pop(prefix + PUBLISHED_BUFFER, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


@register(ARCH_REGISTRY)
class PPATDLight(ATDLight):
    """PP-ATD-light: ATD-light in which pure pixels are exempt from AC-MSA. Same weights, same parameter names.

    Without a pure pixel the network is ATD-light exactly; when all are pure AC-MSA attends to nothing.

    Args:
        pp_num_centers: K, number of colour centres of the mask (:class:`ppsr.PurePass`).
        pp_window_size: w, side of the windows of the mask.
        pp_shift: offset of the second grid; None = half the window.
        pp_fuse: cross-shift mask fusion.
        pp_compensation: what a pure token gets instead of attention: 'value' its own value vector through the
            projection; 'bypass' the value vector without the projection; 'zero' nothing.
        **kwargs: those of :class:`ATDLight`.

    Raises:
        ValueError: a value that is not supported, named.
    """

    def __init__(
        self,
        pp_num_centers: int = 8,
        pp_window_size: int = 5,
        pp_shift: int | None = None,
        pp_fuse: bool = True,
        pp_compensation: str = 'value',
        **kwargs,
    ):
        super().__init__(**kwargs)
        _require(pp_compensation in COMPENSATIONS, 'pp_compensation', pp_compensation, ', '.join(COMPENSATIONS))
        self.pure_pass = PurePass(pp_num_centers, pp_window_size, pp_shift, pp_fuse)
        for group in self.layers:
            for layer in group.residual_group.layers:
                layer.attn_aca.compensation = pp_compensation

    def pure_mask(self, lq: Tensor) -> Tensor:
        """(B, 3, H', W') padded images -> (B, H', W') bool, True = pure."""
        return self.pure_pass(lq)

    def macs(self, height: int, width: int, pure: Tensor | None = None) -> dict[str, int]:
        macs = super().macs(height, width, pure)
        if pure is not None:  # the dense network computes no mask
            macs['mask'] = pure.numel() * 3 * self.pure_pass.num_centers
        return macs


def _require(condition: bool, name: str, value, supported: str) -> None:
    if not condition:
        raise ValueError(f'{name}={value!r} is not supported; it must be {supported}.')


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
