"""The operators between the self-attentions under the name that they had before each got a file of its own."""

from ppsr.ops.depthwise import depthwise_mix
from ppsr.ops.dictionary import Similarity, dictionary_attention, dictionary_refinement
from ppsr.ops.linear import linear_add, norm_linear

__all__ = [
    'Similarity',
    'depthwise_mix',
    'dictionary_attention',
    'dictionary_refinement',
    'linear_add',
    'norm_linear',
]
