"""SwinIR-light, and PP-SwinIR-light: Pure-Pass on a network that has window attention alone.

SwinIR: Liang et al., "SwinIR: Image Restoration Using Swin Transformer", ICCV workshops 2021, arXiv 2108.10257.
Parameter names are those of basicsr's and the published SwinIR, whose lightweight weights load with strict=True.

Read top to bottom: block → group → network; window attention, the frame and the meaning of the shapes are in
:mod:`ppsr.archs.atd_layers`.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from timm.layers import drop_path
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ppsr.archs.atd_layers import (
    WindowAttention,
    WindowNetwork,
    mlp_ratio_of,
    relative_position_index,
)
from ppsr.archs.masked import AS_PUBLISHED, PurePassOptions, PurePassSettings, reflect_pad, require
from ppsr.archs.window_compensation import ExemptingLayer, StandIn
from ppsr.ops.linear import linear_add, norm_linear
from ppsr.ops.some_linear import linear_some, norm_linear_some, of_windows_that_ask
from ppsr.ops.stand_in import linear_stand_in
from ppsr.ops.workspace import empty
from ppsr.registry import register

__all__ = ['PPSwinIRLight', 'SwinIRLight']

INDEX, MASK = 'relative_position_index', 'attn_mask'


class SwinAttention(WindowAttention):
    """Window attention with a projection to queries, keys and values of its own."""

    def __init__(self, dim: int, window_size: int, num_heads: int):
        super().__init__(dim, window_size, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + INDEX] = relative_position_index(self.window_size)  # other programs ask for it

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.pop(prefix + INDEX, None)  # it follows from window_size
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SwinBlock(ExemptingLayer):
    """x + window attention, then + MLP, each of a LayerNorm."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int,
        shift: int,
        mlp_ratio: float,
        drop_path_rate: float,
        pure_pass: PurePassSettings,
    ):
        super().__init__(dim, pure_pass.scope, pure_pass.window_compensation)
        self.shift, self.drop_path_rate = shift, drop_path_rate
        self.norm1 = nn.LayerNorm(dim)
        self.attn = SwinAttention(dim, window_size, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Module()  # only the weights are used
        self.mlp.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.mlp.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    def forward(self, x: Tensor, pure: Tensor | None) -> Tensor:
        """Map x (B, H, W, C), pure (B, N) bool or None -> next x"""
        stand_in = None if self.training else self.in_one(pure, self.attn.qkv, self.attn)
        if stand_in is not None:
            x = self.attend_where_asked(x, pure.view(x.shape[:3]), stand_in)
            (u,) = norm_linear(x, self.norm2, self.mlp.fc1, gelu=True)
            return linear_add(u, self.mlp.fc2, x)
        (qkv,) = norm_linear(x, self.norm1, self.attn.qkv)
        exemption = self.exemption(x, self.norm1, qkv, pure)
        if self.training and self.drop_path_rate > 0:
            x = x + drop_path(self.attn(qkv, self.shift, **exemption), self.drop_path_rate, True)
            (u,) = norm_linear(x, self.norm2, self.mlp.fc1, gelu=True)
            return x + drop_path(self.mlp.fc2(u), self.drop_path_rate, True)
        x = self.attn(qkv, self.shift, x, **exemption)
        (u,) = norm_linear(x, self.norm2, self.mlp.fc1, gelu=True)
        return linear_add(u, self.mlp.fc2, x)

    def attend_where_asked(self, x: Tensor, pure: Tensor, stand_in: StandIn) -> Tensor:
        """x + window attention with `stand_in` for it at the pure tokens, pure (B, H, W): queries and projections are
        computed for the others alone, keys and values where one of those may read them."""
        asking, heard = ~pure, of_windows_that_ask(pure, self.attn.window_size, self.shift)
        qkv, _ = norm_linear_some(x, self.norm1, self.attn.qkv, None, asking, heard)
        near = self.attn.attend(qkv, self.shift, pure, fill=False)
        out = linear_stand_in(empty(x, x.shape), pure, x, self.norm1, *stand_in[:2], x, **stand_in.seen())
        return linear_some(out, near, self.attn.proj, asking, x)

    def window_example(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = self.norm1(x)
        return z, self.attn.attend(self.attn.qkv(z), self.shift)

    def macs(self, tokens: int, active: list[int], heard: int) -> dict[str, int]:
        """Multiply-adds by part for images of so many tokens, of which `active` of each image are not exempt; `heard`
        of all images are in windows that hold one of these."""
        c, every = self.norm1.normalized_shape[0], len(active) * tokens
        return {
            **self.macs_in_one(tokens, active, heard, self.attn),
            'ffn': every * 2 * c * self.mlp.fc1.out_features,
        }

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        state_dict.pop(prefix + MASK, None)  # which tokens were neighbours before the shift: for one size of image
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SwinGroup(nn.Module):
    """Blocks one after another."""

    def __init__(self, blocks: Sequence[nn.Module], use_checkpoint: bool):
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, pure: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        for block in self.blocks:
            if self.use_checkpoint and torch.is_grad_enabled():
                x = checkpoint(block, x, pure, use_reentrant=False)
            else:
                x = block(x, pure)
        return x, []


@register(ARCH_REGISTRY)
class SwinIRLight(WindowNetwork):
    """SwinIR-light, the published network; the defaults are its published configuration at ×4 (929,628 parameters).

    Args:
        upscale: 2, 3, 4 or any factor ≥ 1.
        in_chans: 3 (RGB).
        img_size: accepted because option files of SwinIR have it; the network takes any size.
        embed_dim: C.
        depths: blocks of each group.
        num_heads: heads of each group.
        window_size: side of the windows; every second block shifts them by half of it.
        img_range: 1.0, the value range of the images.
        mlp_ratio: hidden channels of the MLP over C.
        drop_path_rate: stochastic depth in training: share of the images of a batch that skip a branch, rising from 0
            at the first block to this at the last.
        upsampler: 'pixelshuffledirect', pixel shuffle in one step.
        resi_connection: '1conv'.
        use_checkpoint: recompute each block in the backward pass (torch.utils.checkpoint): less memory, more time.
        pure_pass: settings of a mask, for relatives of the network that have one.

    Shape: (B, 3, H, W) RGB in [0, 1], any H and W ≥ 1 -> (B, 3, upscale·H, upscale·W). What is no multiple of
    window_size is padded at the bottom and right by reflection, as basicsr's SwinIRModel does.

    Raises:
        ValueError: a value that is not supported, named.
    """

    title = 'SwinIR-light'
    scopes = ('window',)
    parts = ('shallow', 'qkv', 'window', 'ffn', 'convolutions', 'upsampler')
    derived_buffers = (INDEX, MASK)

    def __init__(
        self,
        upscale: int = 4,
        in_chans: int = 3,
        img_size: int = 64,
        embed_dim: int = 60,
        depths: Sequence[int] = (6, 6, 6, 6),
        num_heads: Sequence[int] = (6, 6, 6, 6),
        window_size: int = 8,
        img_range: float = 1.0,
        mlp_ratio: float = 2,
        drop_path_rate: float = 0.1,
        upsampler: str = 'pixelshuffledirect',
        resi_connection: str = '1conv',
        use_checkpoint: bool = False,
        pure_pass: PurePassSettings | None = None,
    ):
        require(0 <= drop_path_rate < 1, 'drop_path_rate', drop_path_rate, 'a number of at least 0 and below 1')
        rates = iter(torch.linspace(0, drop_path_rate, sum(depths), device='cpu').tolist())

        def group_fn(depth: int, heads: int) -> nn.Module:
            blocks = [
                SwinBlock(
                    embed_dim,
                    heads,
                    window_size,
                    shift=window_size // 2 * (i % 2),
                    mlp_ratio=mlp_ratio,
                    drop_path_rate=next(rates),
                    pure_pass=pure_pass or AS_PUBLISHED,
                )
                for i in range(depth)
            ]
            return SwinGroup(blocks, use_checkpoint)

        super().__init__(
            upscale=upscale,
            in_chans=in_chans,
            img_size=img_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            img_range=img_range,
            upsampler=upsampler,
            resi_connection=resi_connection,
            group_fn=group_fn,
            group_norm=False,
            pure_pass=pure_pass,
        )

    def every_layer(self) -> Iterator[nn.Module]:
        for group in self.layers:
            yield from group.residual_group.blocks

    def pad(self, lq: Tensor) -> Tensor:
        return reflect_pad(lq, self.multiple)

    @classmethod
    def config_from(cls, state_dict: Mapping[str, Tensor]) -> dict | None:
        """The lightweight SwinIR alone: the others have another upsampler or other convolutions behind their groups."""
        block = 'layers.{}.residual_group.blocks.{}.'
        try:
            depths, heads, table = [], [], state_dict[block.format(0, 0) + 'attn.relative_position_bias_table']
            while f'layers.{len(depths)}.conv.weight' in state_dict:
                group, norm = len(depths), block + 'norm1.weight'
                depths.append(sum(norm.format(group, j) in state_dict for j in range(len(state_dict))))
                table = state_dict[block.format(group, 0) + 'attn.relative_position_bias_table']
                heads.append(table.shape[1])
            dim, outputs = state_dict['conv_first.weight'].shape[0], state_dict['upsample.0.weight'].shape[0]
            if 'conv_last.weight' in state_dict or 'conv_after_body.weight' not in state_dict:
                return None
            return {
                'upscale': round((outputs / 3) ** 0.5),
                'embed_dim': dim,
                'depths': depths,
                'num_heads': heads,
                'window_size': (round(table.shape[0] ** 0.5) + 1) // 2,
                'mlp_ratio': mlp_ratio_of(state_dict[block.format(0, 0) + 'mlp.fc1.weight'].shape[0], dim),
            }
        except (KeyError, IndexError, ZeroDivisionError):
            return None


@register(ARCH_REGISTRY)
class PPSwinIRLight(PurePassOptions, SwinIRLight):
    """PP-SwinIR-light: SwinIR-light in which pure pixels are exempt from window attention. Same weights, same parameter
    names; beside them what is learned to stand in for the attention.

    Without a pure pixel the network is SwinIR-light exactly; when all are pure there is no attention at all.

    Args:
        pp_scope: ['window'], all that there is to be exempt from.
        pp_window_compensation: 'value' is the default here: attention among 8×8 tokens is hardly dearer than 'linear'.
        **kwargs: those of :class:`~ppsr.archs.masked.PurePassOptions` and of :class:`SwinIRLight`.
    """

    title = 'PP-SwinIR-light'
    dense_arch = 'SwinIRLight'
    not_options = (*PurePassOptions.of_category, *SwinIRLight.not_options)

    def __init__(self, pp_scope: Sequence[str] = ('window',), pp_window_compensation: str = 'value', **kwargs):
        super().__init__(pp_scope=pp_scope, pp_window_compensation=pp_window_compensation, **kwargs)
