"""What the networks around a token dictionary share: attention branches, ConvFFN, groups, and the frame around them.

Shapes: B images, H×W map, N = H·W tokens, C channels, M dictionary tokens. Tokens stay in (B, H, W, C) order
throughout; convolutions see the same memory as channels_last. Parameter names are those of the published checkpoints.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppsr.archs.masked import AS_PUBLISHED, MaskedNetwork, PurePassSettings, require
from ppsr.archs.window_compensation import ExemptingLayer, LinearInPlace, StandIn
from ppsr.ops.category_attention import attention_macs as category_macs
from ppsr.ops.category_attention import category_attention
from ppsr.ops.depthwise import depthwise_mix
from ppsr.ops.dictionary import Similarity, dictionary_attention
from ppsr.ops.linear import linear_add, norm_linear, norm_linear_beside
from ppsr.ops.some_linear import linear_some, norm_linear_some, of_windows_that_ask
from ppsr.ops.stand_in import linear_stand_in
from ppsr.ops.window_attention import attention_macs as window_macs
from ppsr.ops.window_attention import window_attention
from ppsr.ops.workspace import empty

__all__ = [
    'ATDNetwork',
    'AttentionLayer',
    'CategoryAttention',
    'ConvFFN',
    'DictionaryAttention',
    'DictionaryGroup',
    'LayerStack',
    'ResidualGroup',
    'WindowAttention',
    'WindowNetwork',
    'config_from_shapes',
    'init_weights',
]

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K
MAX_LOGIT_SCALE = math.log(100)

PUBLISHED_BUFFER = 'relative_position_index_SA'

# Multiply-adds of a network by part. One convention everywhere (docs/flops.md): each product of a matrix product or a
# convolution counts once, the input is padded as the network pads it, every executed operator counts.
PARTS = ('shallow', 'qkv', 'window', 'dictionary', 'category', 'ffn', 'convolutions', 'upsampler')


def init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class WindowAttention(nn.Module):
    """SW-MSA: attention inside shifted windows with a learned relative position bias, then a projection."""

    def __init__(self, dim: int, window_size: int, num_heads: int):
        super().__init__()
        self.window_size, self.num_heads = window_size, num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window_size - 1) ** 2, num_heads))
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(
        self,
        qkv: Tensor,
        shift: int,
        *add: Tensor,
        pure: Tensor | None = None,
        compensate: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor:
        """qkv (B, H, W, 3C) -> (B, H, W, C), plus what is to be added, up to two maps; tokens that are `pure`
        (B, H, W) do not ask, and `compensate` gives them something else before the projection"""
        return linear_add(compensate(self.attend(qkv, shift, pure)), self.proj, *add)

    def attend(self, qkv: Tensor, shift: int, pure: Tensor | None = None, fill: bool = True) -> Tensor:
        """:meth:`forward` up to the projection, zeros for pure tokens, or anything (`fill`)."""
        return window_attention(
            qkv,
            self.relative_position_bias_table,
            num_heads=self.num_heads,
            window_size=self.window_size,
            shift=shift,
            pure=pure,
            fill=fill,
        )

    def macs(self, images: int, tokens: int, pure: int = 0) -> int:
        """Multiply-adds for images of so many tokens each, of which `pure` of all images do not ask."""
        c, tokens = self.proj.in_features, images * tokens
        return window_macs(tokens - pure, c, self.window_size) + tokens * c * c


class DictionaryAttention(nn.Module):
    """ATD-CA: every token attends to the M tokens of the dictionary by cosine similarity (ATD, eq. 4–6).

    Args:
        scales: learned σ, one per token of the dictionary (M) or one for all (1).
        max_scale: logits are cos(q, k)·(1 + clamp(σ, 0, max_scale)·ln M).
    """

    def __init__(self, dim: int, num_tokens: int, reducted_dim: int, scales: int, max_scale: float):
        super().__init__()
        self.num_tokens, self.max_scale = num_tokens, max_scale
        self.scale = nn.Parameter(torch.full((scales,), 0.5))
        self.wq = nn.Linear(dim, reducted_dim)
        self.wk = nn.Linear(dim, reducted_dim)
        self.wv = nn.Linear(dim, dim)

    def keys_and_values(self, td: Tensor) -> tuple[Tensor, Tensor]:
        """Dictionary td (…, M, C) -> keys, normalised and scaled (…, M, r), values (…, M, C)"""
        scale = 1 + self.scale.clamp(0, self.max_scale) * math.log(self.num_tokens)
        return F.normalize(self.wk(td), dim=-1) * scale[:, None], self.wv(td)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Similarity]:
        """q = wq(tokens) (B, N, r), keys, values with or without B -> output (B, N, C), category (B, N), similarity"""
        return dictionary_attention(q, k, v)


class CategoryAttention(nn.Module):
    """AC-MSA: attention among tokens of like category; pure tokens are exempt (ATD, sec. 3.3; Pure-Pass).

    Args:
        learned_scale: logits are q·k times a learned number; False: q·k/√d.
        compensation: what pure tokens get.
    """

    def __init__(self, dim: int, num_heads: int, category_size: int, learned_scale: bool, compensation: str):
        super().__init__()
        self.num_heads, self.category_size, self.compensation = num_heads, category_size, compensation
        self.logit_scale = nn.Parameter(torch.full((1, 1), math.log(10))) if learned_scale else None
        self.proj = nn.Linear(dim, dim)

    def scale(self, qkv: Tensor) -> Tensor:
        """What the logits are multiplied by, one element."""
        if self.logit_scale is not None:
            return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()
        wide = torch.float64 if qkv.dtype == torch.float64 else torch.float32
        head_dim = self.proj.in_features // self.num_heads
        return torch.full((1, 1), head_dim**-0.5, dtype=wide, device=qkv.device)

    def forward(self, qkv: Tensor, category: Tensor, pure: Tensor | None, *add: Tensor) -> Tensor:
        """qkv (B, N, 3C), category (B, N), pure (B, N) bool or None -> (B, N, C), plus what is to be added"""
        x = self.attend(qkv, category, pure, self.compensation)
        if pure is None or self.compensation == 'value':
            return linear_add(x, self.proj, *add)
        # 'bypass' and 'zero' skip the projection, too: x already holds what a pure token gets
        if torch.compiler.is_compiling():  # a number of rows that depends on the data would break the graph
            x = torch.where(pure[..., None], x, self.proj(x))
        elif torch.is_grad_enabled():
            x = x.masked_scatter(~pure[..., None], self.proj(x[~pure]).to(x.dtype))
        else:  # as where nothing is pure, to the last bit
            x = linear_some(x.clone(), x, self.proj, ~pure)
        return sum(add, start=x)

    def attend(
        self, qkv: Tensor, category: Tensor, pure: Tensor | None, compensation: str, fill: bool = True
    ) -> Tensor:
        """:meth:`forward` up to the projection, pure tokens compensated in this way, or not at all (`fill`)."""
        return category_attention(
            qkv,
            category,
            self.scale(qkv),
            num_heads=self.num_heads,
            category_size=self.category_size,
            pure=pure,
            compensation=compensation,
            fill=fill,
        )

    @property
    def sees(self) -> tuple[str, ...]:
        """What a pure token's compensation depends on, as in :class:`WindowCompensation`."""
        return () if self.compensation == 'zero' else ('own',)

    def in_place(self, found: LinearInPlace, v: LinearInPlace) -> LinearInPlace:
        """`found` plus what a pure token gets, given what the value vectors are."""
        if self.compensation == 'zero':
            return found
        return found + (v.through(self.proj) if self.compensation == 'value' else v)

    def macs(self, tokens: int, active: list[int]) -> int:
        """Multiply-adds for so many tokens in all, of which `active` of each image are not exempt."""
        c = self.proj.in_features
        projected = tokens if self.compensation == 'value' else sum(active)
        return category_macs(active, c, self.category_size) + projected * c * c


class ConvFFN(nn.Module):
    """x + W₂(u + GELU(DWConv(u))) with u = GELU(W₁ norm(x)): a feed-forward network that sees its k×k neighbourhood.

    Args:
        row_dim: channels of what :meth:`forward` may be given to stand beside u, a row for each category.
    """

    def __init__(self, dim: int, hidden_dim: int, kernel_size: int, row_dim: int = 0):
        super().__init__()
        wide = hidden_dim + row_dim
        self.fc1 = nn.Linear(dim, hidden_dim)
        depthwise = nn.Conv2d(wide, wide, kernel_size, padding=kernel_size // 2, groups=wide)
        self.dwconv = nn.Module()  # the two levels are in the published parameter names; only the weights are used
        self.dwconv.depthwise_conv = nn.Sequential(depthwise, nn.GELU())
        self.fc2 = nn.Linear(wide, dim)

    def forward(
        self, x: Tensor, norm: nn.LayerNorm, rows: Tensor | None = None, category: Tensor | None = None
    ) -> Tensor:
        """(B, H, W, C), rows (M, row_dim) and category (B, H, W) in 0…M − 1 -> (B, H, W, C)"""
        if rows is None:
            (u,) = norm_linear(x, norm, self.fc1, gelu=True)
        else:
            u = norm_linear_beside(x, norm, self.fc1, rows, category)
        return linear_add(depthwise_mix(u, self.dwconv.depthwise_conv[0]), self.fc2, x)

    def macs(self, tokens: int) -> int:
        depthwise = self.dwconv.depthwise_conv[0]
        taps = depthwise.in_channels * depthwise.kernel_size[0] ** 2
        return tokens * (self.fc1.weight.numel() + taps + self.fc2.weight.numel())


class AttentionLayer(ExemptingLayer):
    """x + SW-MSA + ATD-CA + AC-MSA, then + ConvFFN: what a layer has in every version.

    Args:
        scales, max_scale: of :class:`DictionaryAttention`.
        learned_scale: of :class:`CategoryAttention`.
        row_dim: of :class:`ConvFFN`.
        pure_pass: what pure tokens are exempt from, and what they get instead.
        window_fn: window_fn(dim, window_size, num_heads) makes the branch that looks around a token.
    """

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
        scales: int,
        max_scale: float,
        learned_scale: bool,
        row_dim: int = 0,
        pure_pass: PurePassSettings = AS_PUBLISHED,
        window_fn: Callable[[int, int, int], nn.Module] = WindowAttention,
    ):
        super().__init__(dim, pure_pass.scope, pure_pass.window_compensation)
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.wqkv = nn.Linear(dim, 3 * dim)  # one projection for both self-attentions
        self.attn_win = window_fn(dim, window_size, num_heads)
        self.attn_atd = DictionaryAttention(dim, num_tokens, reducted_dim, scales, max_scale)
        self.attn_aca = CategoryAttention(dim, num_heads, category_size, learned_scale, pure_pass.compensation)
        self.convffn = ConvFFN(dim, int(dim * mlp_ratio), convffn_kernel_size, row_dim)

    def attend(self, x: Tensor, k: Tensor, v: Tensor, pure: Tensor | None) -> tuple[Tensor, Tensor, Similarity]:
        """The attentions: map x (B, H, W, C), keys and values of the dictionary, pure (B, N) bool or None -> next x,
        category (B, N), similarity"""
        stand_in = self.in_one(pure, self.wqkv, self.attn_win, self.attn_aca)
        if stand_in is not None:
            return self.attend_where_asked(x, k, v, pure, stand_in)
        qkv, q = norm_linear(x, self.norm1, self.wqkv, self.attn_atd.wq)
        x_atd, category, similarity = self.attn_atd(q.flatten(1, 2), k, v)
        exempt = self.exempt('category', pure)
        x_cross = self.attn_aca(qkv.flatten(1, 2), category, exempt, x_atd).view(x.shape)  # from far away
        x = self.attn_win(qkv, self.shift, x, x_cross, **self.exemption(x, self.norm1, qkv, pure))
        return x, category, similarity

    def attend_where_asked(
        self, x: Tensor, k: Tensor, v: Tensor, pure: Tensor, stand_in: StandIn
    ) -> tuple[Tensor, Tensor, Similarity]:
        """:meth:`attend` with `stand_in` for all that pure tokens are exempt from: queries and projections are computed
        for the others alone, keys and values where one of those may read them."""
        flat, pure = pure, pure.view(x.shape[:3])
        asking, far_too = ~pure, 'category' in self.scope
        if far_too:
            heard = of_windows_that_ask(pure, self.attn_win.window_size, self.shift)
            qkv, q = norm_linear_some(x, self.norm1, self.wqkv, self.attn_atd.wq, asking, heard)
        else:
            qkv, q = norm_linear(x, self.norm1, self.wqkv, self.attn_atd.wq)
        x_cross, category, similarity = self.attn_atd(q.flatten(1, 2), k, v)
        if far_too:
            far = self.attn_aca.attend(qkv.flatten(1, 2), category, flat, 'zero', fill=False)
            x_cross = linear_some(x_cross, far, self.attn_aca.proj, asking.flatten(1), x_cross).view(x.shape)
        else:
            x_cross = self.attn_aca(qkv.flatten(1, 2), category, None, x_cross).view(x.shape)
        near = self.attn_win.attend(qkv, self.shift, pure, fill=False)
        out = linear_stand_in(empty(x, x.shape), pure, x, self.norm1, *stand_in[:2], x, x_cross, **stand_in.seen())
        return linear_some(out, near, self.attn_win.proj, asking, x, x_cross), category, similarity

    def window_example(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.norm1(x)
        return z, self.attn_win.attend(self.wqkv(z), self.shift)

    def macs(self, tokens: int, active: list[int], heard: int) -> dict[str, int]:
        """Multiply-adds by part for images of so many tokens, of which `active` of each image are not exempt; `heard`
        of all images are in windows that hold one of these."""
        atd, c, every = self.attn_atd, self.wqkv.in_features, len(active) * tokens
        m, r = atd.num_tokens, atd.wq.out_features
        return {
            **self.macs_in_one(tokens, active, heard, self.attn_win, self.attn_aca),
            'dictionary': every * (c * r + r * m + m * c),
            'ffn': self.convffn.macs(every),
        }


class LayerStack(nn.Module):
    """Layers one after another.

    Args:
        layers: what they take and give is up to the subclass, and to :meth:`run` where it is used.
        use_checkpoint: recompute each layer in the backward pass.
    """

    def __init__(self, layers: Sequence[nn.Module], use_checkpoint: bool):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.layers = nn.ModuleList(layers)

    def call(self, layer: nn.Module, *args):
        """layer(*args), recomputed in the backward pass if that is asked for."""
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(layer, *args, use_reentrant=False)
        return layer(*args)

    def run(self, x: Tensor, td: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Layers that hand a dictionary on from one to the next: each maps x (B, H, W, C), dictionary, context -> next
        x, next dictionary, and whatever else it finds. -> Next x, and what else the layers found, in order."""
        found = []
        for layer in self.layers:
            x, td, *more = self.call(layer, x, td, context)
            found += more
        return x, found


class DictionaryGroup(LayerStack):
    """The layers of one group and a dictionary of their own, td (M, C)."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_tokens: int,
        window_size: int,
        use_checkpoint: bool,
        layer_fn: Callable[..., nn.Module],
        **layer,
    ):
        td = nn.Parameter(torch.rand(num_tokens, dim))
        layers = [
            layer_fn(
                dim=dim,
                num_tokens=num_tokens,
                window_size=window_size,
                shift=window_size // 2 * (i % 2),
                **self.differences(i, depth),
                **layer,
            )
            for i in range(depth)
        ]
        super().__init__(layers, use_checkpoint)
        self.td = td
        trunc_normal_(self.td, std=0.02)

    def differences(self, i: int, depth: int) -> dict:
        """Further arguments of layer i."""
        return {}


class ResidualGroup(nn.Module):
    """A group, a 3×3 convolution, and the way around both; then a LayerNorm, if there is to be one."""

    def __init__(self, dim: int, group: nn.Module, has_norm: bool = False):
        super().__init__()
        self.residual_group = group
        self.conv = nn.Conv2d(dim, dim, 3, padding=1)
        self.norm = nn.LayerNorm(dim) if has_norm else None

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Map x (B, H, W, C), context for the layers -> next x, what else the layers found"""
        y, found = self.residual_group(x, context)
        x = x + self.conv(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x if self.norm is None else self.norm(x), found


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


def mlp_ratio_of(hidden: int, dim: int) -> float:
    """The ratio r with int(dim · r) == hidden: 123 / 60 is 2.05, and 60 · 2.05 is 122.99999999999999."""
    ratio = hidden / dim
    while int(dim * ratio) < hidden:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


def config_from_shapes(state_dict: Mapping[str, Tensor]) -> dict | None:
    """Constructor arguments that the shapes of an ATD network's weights tell, or None if they are not one's. Those of
    the second version have a `dim_ffn_td`.

    category_size leaves no trace in the parameters: the published 128 is assumed. So are the settings of the mask, the
    defaults.
    """
    layer, group = 'layers.{}.residual_group.layers.{}.', 'layers.{}.conv.weight'
    try:
        groups = sum(group.format(i) in state_dict for i in range(len(state_dict)))
        depths, heads = [], []
        for i in range(groups):
            norm = layer + 'norm1.weight'
            depths.append(sum(norm.format(i, j) in state_dict for j in range(len(state_dict))))
            heads.append(state_dict[layer.format(i, 0) + 'attn_win.relative_position_bias_table'].shape[1])
        first = layer.format(0, 0)
        embed_dim = state_dict['conv_first.weight'].shape[0]
        table = state_dict[first + 'attn_win.relative_position_bias_table'].shape[0]
        config = {
            'upscale': round((state_dict['upsample.0.weight'].shape[0] / 3) ** 0.5),
            'embed_dim': embed_dim,
            'depths': depths,
            'num_heads': heads,
            'window_size': (round(table**0.5) + 1) // 2,
            'category_size': 128,
            'num_tokens': state_dict['layers.0.residual_group.td'].shape[0],
            'reducted_dim': state_dict[first + 'attn_atd.wq.weight'].shape[0],
            'convffn_kernel_size': state_dict[first + 'convffn.dwconv.depthwise_conv.0.weight'].shape[-1],
            'mlp_ratio': mlp_ratio_of(state_dict[first + 'convffn.fc1.weight'].shape[0], embed_dim),
        }
        if first + 'fc_td.weight' in state_dict:
            config['dim_ffn_td'] = state_dict[first + 'fc_td.weight'].shape[0]
        return config
    except (KeyError, IndexError, ZeroDivisionError):
        return None


class WindowNetwork(MaskedNetwork):
    """The frame that SwinIR-light and those after it share: mean, first convolution, LayerNorm, groups, LayerNorm,
    convolution, pixel shuffle in one step.

    Args:
        group_fn: group_fn(depth, num_heads) makes the contents of one :class:`ResidualGroup`.
        group_norm: a LayerNorm follows each group.
        pure_pass: None: the network has no mask.
        **sizes: further sizes that have to be positive, by name.

    The others are those of :class:`ppsr.archs.ATDLight`.

    Attributes:
        parts: of the multiply-adds.

    Raises:
        ValueError: a value that is not supported, named.
    """

    parts: ClassVar[tuple[str, ...]] = PARTS

    def __init__(
        self,
        *,
        upscale: int,
        in_chans: int,
        embed_dim: int,
        depths: Sequence[int],
        num_heads: Sequence[int],
        window_size: int,
        img_range: float,
        upsampler: str,
        resi_connection: str,
        group_fn: Callable[[int, int], nn.Module],
        group_norm: bool,
        pure_pass: PurePassSettings | None,
        **sizes: int,
    ):
        require(in_chans == 3, 'in_chans', in_chans, '3 (RGB)')
        require(img_range == 1, 'img_range', img_range, '1.0 (images in [0, 1])')
        require(upsampler == 'pixelshuffledirect', 'upsampler', upsampler, "'pixelshuffledirect'")
        require(resi_connection == '1conv', 'resi_connection', resi_connection, "'1conv'")
        require(len(depths) == len(num_heads), 'num_heads', num_heads, f'one number for each of depths={list(depths)}')
        for heads in num_heads:
            require(heads > 0 and embed_dim % heads == 0, 'num_heads', heads, f'a divisor of embed_dim={embed_dim}')
        sizes |= dict(upscale=upscale, embed_dim=embed_dim, window_size=window_size)
        for name, size in sizes.items():
            require(isinstance(size, int) and size > 0, name, size, 'a positive integer')
        super().__init__(upscale, window_size, None if pure_pass is None else pure_pass.build_mask())
        self.window_size = window_size
        self.register_buffer('mean', torch.tensor(RGB_MEAN).view(1, 3, 1, 1), persistent=False)
        self.conv_first = nn.Conv2d(3, embed_dim, 3, padding=1)
        self.patch_embed = PatchEmbed(embed_dim)
        self.layers = nn.ModuleList(
            ResidualGroup(embed_dim, group_fn(depth, heads), group_norm) for depth, heads in zip(depths, num_heads)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = nn.Conv2d(embed_dim, embed_dim, 3, padding=1)
        self.upsample = nn.Sequential(nn.Conv2d(embed_dim, 3 * upscale**2, 3, padding=1), nn.PixelShuffle(upscale))
        self.apply(init_weights)

    def body(self, y: Tensor, pure: Tensor | None) -> Tensor:
        """All groups: (B, H', W', C) shallow features, mask of the pure tokens (B, H'·W') or None -> (B, H', W', C)"""
        for group in self.layers:
            y, _ = group(y, pure)
        return y

    def restore(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mean = self.mean.to(x.dtype)
        shallow = self.conv_first((x - mean).contiguous(memory_format=torch.channels_last))
        pure = None if mask is None else mask.flatten(1)
        y = self.body(self.patch_embed(shallow.permute(0, 2, 3, 1)), pure)
        y = self.norm(y).permute(0, 3, 1, 2)
        return self.upsample(shallow + self.conv_after_body(y)) + mean

    def count(self, height: int, width: int, mask: Tensor) -> dict[str, int]:
        images, tokens, c = mask.shape[0], height * width, self.conv_first.out_channels
        active = (tokens - mask.flatten(1).sum(1)).tolist()
        macs = dict.fromkeys(self.parts, 0)
        macs['shallow'] = images * tokens * 3 * c * 9
        macs['convolutions'] = images * tokens * c * c * 9 * (len(self.layers) + 1)
        macs['upsampler'] = images * tokens * c * self.upsample[0].out_channels * 9

        @cache
        def heard(shift: int) -> int:
            return int(of_windows_that_ask(mask, self.window_size, shift).sum())

        for layer in self.every_layer():
            for part, count in layer.macs(tokens, active, heard(layer.shift)).items():
                macs[part] += count
        return macs

    def every_layer(self) -> Iterator[nn.Module]:
        """The layers of all groups, in order."""
        for group in self.layers:
            yield from group.residual_group.layers


class ATDNetwork(WindowNetwork):
    """What is published with a table as a buffer: both versions of ATD-light.

    Args:
        convffn_kernel_size: odd.
        **network: those of :class:`WindowNetwork`.

    Raises:
        ValueError: a value that is not supported, named.
    """

    scopes = ('category', 'window')
    derived_buffers = (PUBLISHED_BUFFER,)

    def __init__(self, *, convffn_kernel_size: int, **network):
        require(convffn_kernel_size % 2 == 1, 'convffn_kernel_size', convffn_kernel_size, 'an odd number')
        super().__init__(**network)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        # the published code and spandrel keep this table as a buffer and ask for it; here it is not needed to compute
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + PUBLISHED_BUFFER] = relative_position_index(self.window_size)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # it follows from window_size: files with and without it load strictly
        state_dict.pop(prefix + PUBLISHED_BUFFER, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
