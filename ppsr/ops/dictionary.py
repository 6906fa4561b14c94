"""Attention between the tokens of an image and a dictionary, and the refinement of the dictionary (ATD, sec. 3.2).

The definitions are `_similarity` and the last lines of :func:`dictionary_attention` and :func:`dictionary_refinement`.
Where the kernels may take over (:mod:`ppsr.ops.eligibility`), ``ppsr::dictionary_attention`` and
``ppsr::dictionary_refinement`` do the same and never hold the similarities of all tokens.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ppsr.ops.eligibility import are_plain, kernels_take, kernels_teach
from ppsr.ops.native import call, ready, require
from ppsr.ops.training_layers import dictionary_training, refinement_training
from ppsr.ops.workspace import empty

__all__ = ['Similarity', 'dictionary_attention', 'dictionary_refinement']

LOG2_E = 1.4426950408889634


class Similarity(NamedTuple):
    """Similarity of N tokens to the M entries of a dictionary: softmax over the entries of q·kᵀ/|q|."""

    q: Tensor  # (B, N, r)
    k: Tensor  # (B, M, r), normalised, times the scale of each entry
    matrix: Tensor | None  # (B, N, M), or None: the kernels compute it where they need it


@torch.library.custom_op('ppsr::dictionary_attention', mutates_args=(), device_types='cpu')
def _dictionary_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    batch, n, rank = q.shape
    require(k.shape == (batch, v.shape[1], rank) and v.shape[0] == batch, 'q (B, N, r), k (B, M, r), v (B, M, C)')
    out, category = empty(q, (batch, n, v.shape[2])), empty(q, (batch, n), torch.int64)
    q, k, v = ready(q, k * LOG2_E, v)  # the kernels take powers of 2
    call('ppsr_dictionary_attention', q, k, v, out, category, batch, n, rank, *v.shape[1:])
    return out, category


@_dictionary_attention.register_fake
def _(q, k, v):
    return q.new_empty(*q.shape[:2], v.shape[2]), q.new_empty(q.shape[:2], dtype=torch.int64)


@torch.library.custom_op('ppsr::dictionary_refinement', mutates_args=(), device_types='cpu')
def _dictionary_refinement(q: Tensor, k: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    batch, entries, rank = k.shape
    n, channels = x.shape[1:]
    require(q.shape == (batch, n, rank) and x.shape[0] == batch, 'q (B, N, r), k (B, M, r), x (B, N, C)')
    require(weight.numel() == bias.numel() == entries, 'a normalisation of M entries')
    out = x.new_empty(batch, entries, channels)
    tensors = ready(q, k * LOG2_E, x, weight, bias)
    call('ppsr_dictionary_refinement', *tensors, out, eps, batch, n, rank, entries, channels)
    return out


@_dictionary_refinement.register_fake
def _(q, k, x, weight, bias, eps):
    return x.new_empty(*k.shape[:2], x.shape[2])


@register_flop_formula(torch.ops.ppsr.dictionary_attention)
def _attention_flops(q_shape, k_shape, v_shape, *args, **kwargs) -> int:
    batch, n, rank = q_shape
    return 2 * batch * n * k_shape[1] * (rank + v_shape[2])


@register_flop_formula(torch.ops.ppsr.dictionary_refinement)
def _refinement_flops(q_shape, k_shape, x_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(x_shape).numel() * k_shape[1]  # the similarity is an old one, though it is computed again


def _similarity(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax(F.normalize(q, dim=-1) @ k.transpose(-2, -1), dim=-1)


def dictionary_attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Similarity]:
    """Every token attends to the entries of a dictionary by cosine similarity (ATD, eq. 4–6).

    Args:
        q: (B, N, r), not normalised.
        k: (B, M, r), normalised and scaled; or (M, r), the same for all images.
        v: (B, M, C) or (M, C), like k.

    Returns:
        similarity·v (B, N, C); category of each token, the entry that resembles it most, (B, N) int64; the similarity.
    """
    if k.dim() == 2:  # which image a token is from makes no difference then
        out, category, (_, _, matrix) = dictionary_attention(q.flatten(0, 1)[None], k[None], v[None])
        matrix = None if matrix is None else matrix.view(*q.shape[:2], -1)
        similarity = Similarity(q, k.expand(q.shape[0], -1, -1), matrix)
        return out.view(*q.shape[:2], -1), category.view(q.shape[:2]), similarity
    if q.shape[0] == k.shape[0] == v.shape[0]:
        if kernels_take(q, k, v):
            return *torch.ops.ppsr.dictionary_attention(q, k, v), Similarity(q, k, None)
        if kernels_teach(q, k, v):
            out, category, matrix = dictionary_training(q, k, v)
            return out, category, Similarity(q, k, matrix)
    matrix = _similarity(q, k)
    return matrix @ v, matrix.argmax(-1), Similarity(q, k, matrix)


def dictionary_refinement(similarity: Similarity, x: Tensor, norm: nn.InstanceNorm1d) -> Tensor:
    """Mean of the tokens x (B, N, C) for each entry, weighted by how they resemble it (ATD, eq. 7–8) -> (B, M, C).

    The weights are the softmax over the tokens of the similarity, normalised per entry over the tokens.
    """
    q, k, matrix = similarity
    fits = are_plain(nn.InstanceNorm1d, norm) and not norm.track_running_stats and norm.num_features == k.shape[1]
    fits = fits and x.shape[:2] == q.shape[:2]
    if matrix is None:
        if fits and kernels_take(x, norm.weight, norm.bias):
            return torch.ops.ppsr.dictionary_refinement(q, k, x, norm.weight, norm.bias, norm.eps)
        matrix = _similarity(q, k)
    elif fits and x.shape[1] > 1 and kernels_teach(matrix, x, norm.weight, norm.bias):
        return refinement_training(matrix, x, norm)
    return torch.softmax(norm(matrix.transpose(1, 2)), dim=-1) @ x
