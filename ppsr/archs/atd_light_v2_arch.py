"""ATD-light v2: the simpler network that the authors of ATD published in 2026, and its Pure-Pass version.

Zhang et al., arXiv 2603.02581 (TPAMI 2026). Pure-Pass: Wu et al., arXiv 2510.01997. Written from the facts; parameter
names are those of the published checkpoints, which load with strict=True. Checkpoints of the first version
(:mod:`ppsr.archs.atd_light_arch`) do not fit.

Its dictionaries are static. No token refines them, so what the layers make of them (keys and values of the dictionary
attention, a row for the feed-forward network) follows from the weights alone, and inference computes it once.

Read top to bottom: layer → group → network; the branches of a layer and the frame are in
:mod:`ppsr.archs.atd_layers`, with the meaning of the shapes.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from ppsr.archs.atd_layers import AttentionLayer, DictionaryGroup, config_from_shapes
from ppsr.archs.atd_light_arch import ATDLight
from ppsr.archs.masked import PurePassOptions, require
from ppsr.archs.once import OncePerWeights, may_keep
from ppsr.ops.eligibility import are_untouched
from ppsr.registry import register

__all__ = ['ATDLightV2', 'PPATDLightV2']


class Entries(NamedTuple):
    """What a layer makes of the dictionary."""

    k: Tensor  # (M, r), keys of the dictionary attention
    v: Tensor  # (M, C), its values
    rows: Tensor  # (M, dim_ffn_td), what stands in the ConvFFN beside a token of this category


class ATDLayerV2(AttentionLayer):
    """One transformer layer: the feed-forward network sees the category of a token, too.

    Args:
        dim_ffn_td: channels that tell it of the category.
        **layer: those of :class:`~ppsr.archs.atd_layers.AttentionLayer`.
    """

    def __init__(self, dim: int, dim_ffn_td: int, **layer):
        super().__init__(dim=dim, scales=1, max_scale=3, learned_scale=False, row_dim=dim_ffn_td, **layer)
        self.fc_td = nn.Linear(dim, dim_ffn_td)

    def entries(self, td: Tensor) -> Entries:
        """Of dictionary td (M, C)."""
        return Entries(*self.attn_atd.keys_and_values(td), self.fc_td(td))

    def forward(self, x: Tensor, entries: Entries, pure: Tensor | None) -> Tensor:
        """Map x (B, H, W, C), pure (B, N) bool or None -> next x"""
        x, category, _ = self.attend(x, entries.k, entries.v, pure)
        return self.convffn(x, self.norm2, entries.rows, category.view(x.shape[:3]))


class StaticGroup(DictionaryGroup):
    """The layers of one group around a dictionary of their own, which stays as it is."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kept = OncePerWeights()

    def forward(self, x: Tensor, pure: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        for layer, entries in zip(self.layers, self.entries()):
            x = self.call(layer, x, entries, pure)
        return x, []

    def entries(self) -> list[Entries]:
        """Of each layer; kept where nothing but the weights could change them."""

        def compute():  # its type is not written: torch 2.4 compiles no list[…] inside of a function
            return [layer.entries(self.td) for layer in self.layers]

        if not may_keep(self.td):
            return compute()
        sources = [m for layer in self.layers for m in (layer.attn_atd.wk, layer.attn_atd.wv, layer.fc_td)]
        if not are_untouched(nn.Linear, *sources):  # an adapter may have a will of its own
            return compute()
        weights = [parameter for module in sources for parameter in (module.weight, module.bias)]
        return self.kept.get([self.td, *(layer.attn_atd.scale for layer in self.layers), *weights], compute)


@register(ARCH_REGISTRY)
class ATDLightV2(ATDLight):
    """ATD-light v2, the published network; the defaults are its published configuration at ×4 (776,544 parameters).

    Args:
        num_heads: heads of each group.
        num_tokens: M, entries of the dictionary of each group.
        reducted_dim: channels of the query and key of ATD-CA.
        dim_ffn_td: channels that tell the feed-forward network of a token's category.
        **kwargs: those of :class:`ATDLight`.

    Raises:
        ValueError: a value that is not supported, named.
    """

    title = 'ATD-light v2'

    def __init__(
        self,
        num_heads: Sequence[int] = (3, 3, 3, 3),
        num_tokens: int = 128,
        reducted_dim: int = 12,
        dim_ffn_td: int = 4,
        **kwargs,
    ):
        require(isinstance(dim_ffn_td, int) and dim_ffn_td > 0, 'dim_ffn_td', dim_ffn_td, 'a positive integer')
        super().__init__(
            num_heads=num_heads,
            num_tokens=num_tokens,
            reducted_dim=reducted_dim,
            layer_fn=partial(ATDLayerV2, dim_ffn_td=dim_ffn_td),
            group_fn=StaticGroup,
            group_norm=True,
            **kwargs,
        )

    @classmethod
    def config_from(cls, state_dict: Mapping[str, Tensor]) -> dict | None:
        config = config_from_shapes(state_dict)
        return config if config and 'dim_ffn_td' in config else None


@register(ARCH_REGISTRY)
class PPATDLightV2(PurePassOptions, ATDLightV2):
    """PP-ATD-light v2: ATD-light v2 in which pure pixels are exempt from AC-MSA. Same weights, same parameter names.

    Without a pure pixel the network is ATD-light v2 exactly; when all are pure AC-MSA attends to nothing.

    Args:
        **kwargs: those of :class:`~ppsr.archs.masked.PurePassOptions` and of :class:`ATDLightV2`.
    """

    title = 'PP-ATD-light v2'
    dense_arch = 'ATDLightV2'
