"""ATD-light: adaptive token dictionary for lightweight super-resolution, and its Pure-Pass version PP-ATD-light.

ATD: Zhang et al., "Transcending the Limit of Local Window: Advanced Super-Resolution Transformer with Adaptive Token
Dictionary", CVPR 2024, arXiv 2401.08209. Pure-Pass: Wu et al., arXiv 2510.01997. Written from the papers; parameter
names are those of the published checkpoints, which load with strict=True.

Read top to bottom: dictionary → layer → group → network; the other branches and the frame are in
:mod:`ppsr.archs.atd_layers`, with the meaning of the shapes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from basicsr.utils.registry import ARCH_REGISTRY
from timm.layers import trunc_normal_
from torch import Tensor, nn

from ppsr.archs.atd_layers import ATDNetwork, CategoryAttention, ConvFFN, LayerStack, WindowAttention, mlp_ratio_of
from ppsr.archs.masked import AS_PUBLISHED, PurePassOptions, PurePassSettings
from ppsr.ops.dictionary import Similarity, dictionary_attention, dictionary_refinement
from ppsr.ops.linear import norm_linear
from ppsr.registry import register

__all__ = ['ATDLight', 'PPATDLight']


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


class ATDLayer(nn.Module):
    """One transformer layer: x + SW-MSA + ATD-CA + AC-MSA, then + ConvFFN; refines the dictionary on the way out.

    Args:
        window_fn: window_fn(dim, window_size, num_heads) makes the branch that looks around a token.
        pure_pass: what exempt tokens get.
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
        refines: bool,
        pure_pass: PurePassSettings = AS_PUBLISHED,
        window_fn: Callable[[int, int, int], nn.Module] = WindowAttention,
    ):
        super().__init__()
        self.shift = shift
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.wqkv = nn.Linear(dim, 3 * dim)  # one projection for both self-attentions
        self.attn_win = window_fn(dim, window_size, num_heads)
        self.attn_atd = DictionaryAttention(dim, num_tokens, reducted_dim)
        self.attn_aca = CategoryAttention(dim, num_heads, category_size, pure_pass.compensation)
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

    def macs(self, tokens: int, active: list[int]) -> dict[str, int]:
        """Multiply-adds by part for images of so many tokens, of which `active` of each image are not exempt."""
        atd, c, images = self.attn_atd, self.wqkv.in_features, len(active)
        m, r = atd.num_tokens, atd.wq.out_features
        per_token = c * r + r * m + m * c + (m * c if self.refines else 0)
        return {
            'qkv': images * tokens * c * 3 * c,
            'window': self.attn_win.macs(images, tokens),
            'dictionary': images * tokens * per_token + images * m * c * (r + c),
            'category': self.attn_aca.macs(images * tokens, active),
            'ffn': self.convffn.macs(images * tokens),
        }


class ATDGroup(LayerStack):
    """The layers of one group around a dictionary of their own, which they refine."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_tokens: int,
        window_size: int,
        use_checkpoint: bool,
        layer_fn: Callable[..., nn.Module] = ATDLayer,
        **layer,
    ):
        td = nn.Parameter(torch.rand(num_tokens, dim))
        layers = [
            layer_fn(
                dim=dim,
                num_tokens=num_tokens,
                window_size=window_size,
                shift=window_size // 2 * (i % 2),
                refines=i < depth - 1,
                **layer,
            )
            for i in range(depth)
        ]
        super().__init__(layers, use_checkpoint)
        self.td = td
        trunc_normal_(self.td, std=0.02)

    def forward(self, x: Tensor, context: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        # a copy per image and no view: under no_grad FlopCounterMode stumbles over views of parameters
        return self.run(x, self.td.repeat(x.shape[0], 1, 1), context)


@register(ARCH_REGISTRY)
class ATDLight(ATDNetwork):
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
        pure_pass: settings of a mask, for relatives of the network that have one.
        layer_fn: makes a layer from the arguments of :class:`ATDLayer`, for relatives of the network.

    Shape: (B, 3, H, W) RGB in [0, 1], any H and W ≥ 1 -> (B, 3, upscale·H, upscale·W). An image's output does not
    depend on the others of its batch.

    Raises:
        ValueError: a value that is not supported, named.
    """

    title = 'ATD-light'

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
        pure_pass: PurePassSettings | None = None,
        layer_fn: Callable[..., nn.Module] = ATDLayer,
    ):
        def group_fn(depth: int, heads: int) -> nn.Module:
            return ATDGroup(
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
                layer_fn=layer_fn if pure_pass is None else partial(layer_fn, pure_pass=pure_pass),
            )

        super().__init__(
            upscale=upscale,
            in_chans=in_chans,
            img_size=img_size,
            embed_dim=embed_dim,
            depths=depths,
            num_heads=num_heads,
            window_size=window_size,
            category_size=category_size,
            num_tokens=num_tokens,
            reducted_dim=reducted_dim,
            convffn_kernel_size=convffn_kernel_size,
            img_range=img_range,
            upsampler=upsampler,
            resi_connection=resi_connection,
            group_fn=group_fn,
            pure_pass=pure_pass,
        )

    @classmethod
    def config_from(cls, state_dict: Mapping[str, Tensor]) -> dict | None:
        """category_size leaves no trace in the parameters: the published 128 is assumed. So are the settings of the
        mask, the defaults."""
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
            return {
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
        except (KeyError, IndexError, ZeroDivisionError):
            return None


@register(ARCH_REGISTRY)
class PPATDLight(PurePassOptions, ATDLight):
    """PP-ATD-light: ATD-light in which pure pixels are exempt from AC-MSA. Same weights, same parameter names.

    Without a pure pixel the network is ATD-light exactly; when all are pure AC-MSA attends to nothing.

    Args:
        **kwargs: those of :class:`~ppsr.archs.masked.PurePassOptions` and of :class:`ATDLight`.
    """

    title = 'PP-ATD-light'
    dense_arch = 'ATDLight'
