"""ATD-light: adaptive token dictionary for lightweight super-resolution, and its Pure-Pass version PP-ATD-light.

ATD: Zhang et al., "Transcending the Limit of Local Window: Advanced Super-Resolution Transformer with Adaptive Token
Dictionary", CVPR 2024, arXiv 2401.08209. Pure-Pass: Wu et al., arXiv 2510.01997. Written from the papers; parameter
names are those of the published checkpoints, which load with strict=True.

Read top to bottom: layer → group → network; the branches of a layer and the frame are in
:mod:`ppsr.archs.atd_layers`, with the meaning of the shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from ppsr.archs.atd_layers import ATDNetwork, AttentionLayer, DictionaryGroup, config_from_shapes
from ppsr.archs.masked import PurePassOptions, PurePassSettings
from ppsr.ops.dictionary import Similarity, dictionary_refinement
from ppsr.registry import register

__all__ = ['ATDLight', 'PPATDLight']


class ATDLayer(AttentionLayer):
    """One transformer layer; refines the dictionary on the way out.

    Args:
        refines: the last layer of a group has nobody to hand the dictionary to.
        **layer: those of :class:`~ppsr.archs.atd_layers.AttentionLayer`.
    """

    def __init__(self, num_tokens: int, refines: bool, **layer):
        super().__init__(num_tokens=num_tokens, scales=num_tokens, max_scale=1, learned_scale=True, **layer)
        self.refines = refines
        if refines:
            self.norm3 = nn.InstanceNorm1d(num_tokens, affine=True)
            self.sigma = nn.Parameter(torch.zeros(num_tokens, 1))

    def forward(self, x: Tensor, td: Tensor, pure: Tensor | None) -> tuple[Tensor, Tensor]:
        """Map x (B, H, W, C), dictionary td (B, M, C), pure (B, N) bool or None -> next x, next td"""
        x, _, similarity = self.attend(x, *self.attn_atd.keys_and_values(td), pure)
        x = self.convffn(x, self.norm2)
        if self.refines:
            td = self.refine(x.flatten(1, 2), td, similarity)
        return x, td

    def refine(self, x: Tensor, td: Tensor, similarity: Similarity) -> Tensor:
        """Adaptive dictionary refinement (ATD, eq. 7–8): each entry moves towards the tokens that resemble it."""
        keep = torch.sigmoid(self.sigma)
        return keep * td + (1 - keep) * dictionary_refinement(similarity, x, self.norm3)

    def macs(self, tokens: int, active: list[int], heard: int) -> dict[str, int]:
        macs, images, (r, c) = super().macs(tokens, active, heard), len(active), self.attn_atd.wk.weight.shape
        keys_and_values, refinement = r + c, tokens if self.refines else 0
        macs['dictionary'] += images * self.attn_atd.num_tokens * c * (keys_and_values + refinement)
        return macs


class ATDGroup(DictionaryGroup):
    """The layers of one group around a dictionary of their own, which they refine."""

    def differences(self, i: int, depth: int) -> dict:
        return {'refines': i < depth - 1}

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
        layer_fn, group_fn: make a layer from the arguments of :class:`ATDLayer`, a group from those of
            :class:`ATDGroup`, for relatives of the network.
        group_norm: a LayerNorm follows each group, for relatives of the network.

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
        group_fn: Callable[..., nn.Module] = ATDGroup,
        group_norm: bool = False,
    ):
        def make_group(depth: int, heads: int) -> nn.Module:
            return group_fn(
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
            group_fn=make_group,
            group_norm=group_norm,
            pure_pass=pure_pass,
        )

    @classmethod
    def config_from(cls, state_dict: Mapping[str, Tensor]) -> dict | None:
        config = config_from_shapes(state_dict)
        return config if config and 'dim_ffn_td' not in config else None


@register(ARCH_REGISTRY)
class PPATDLight(PurePassOptions, ATDLight):
    """PP-ATD-light: ATD-light in which pure pixels are exempt from AC-MSA and, with `pp_scope`, from SW-MSA. Same
    weights, same parameter names; beside them what is learned to stand in for the attention inside windows.

    Without a pure pixel the network is ATD-light exactly; when all are pure the attentions of the scope attend to
    nothing.

    Args:
        **kwargs: those of :class:`~ppsr.archs.masked.PurePassOptions` and of :class:`ATDLight`.
    """

    title = 'PP-ATD-light'
    dense_arch = 'ATDLight'
