"""The depthwise convolution of ATD's feed-forward network with what stands beside it: u + GELU(conv(u)).

The definition is the last line of :func:`depthwise_mix`. Where the kernels may take over
(:mod:`ppsr.ops.eligibility`), ``ppsr::depthwise_mix`` does the same in one pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from ppsr.ops.eligibility import are_plain, kernels_take, kernels_teach
from ppsr.ops.native import call, ready, require
from ppsr.ops.training_layers import depthwise_training
from ppsr.ops.workspace import empty

__all__ = ['depthwise_mix']

MIN_CHANNELS = 16  # of the kernel


@torch.library.custom_op('ppsr::depthwise_mix', mutates_args=(), device_types='cpu')
def _depthwise_mix(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    channels, kernel = u.shape[-1], weight.shape[-1]
    require(u.dim() == 4 and channels >= MIN_CHANNELS and bias.numel() == channels, 'maps (B, H, W, C ≥ 16)')
    require(weight.shape == (channels, 1, kernel, kernel) and kernel % 2 == 1, 'a depthwise weight, square and odd')
    u, weight, bias = ready(u, weight, bias)
    out = empty(u, u.shape)
    call('ppsr_depthwise', u, weight, bias, out, *u.shape, kernel)
    return out


@_depthwise_mix.register_fake
def _(u, weight, bias):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@register_flop_formula(torch.ops.ppsr.depthwise_mix)
def _depthwise_flops(u_shape, weight_shape, *args, **kwargs) -> int:
    return 2 * torch.Size(u_shape).numel() * weight_shape[-1] ** 2


def depthwise_mix(u: Tensor, conv: nn.Conv2d) -> Tensor:
    """u + GELU(conv(u)) with a depthwise convolution, odd kernel, zeros around the map; (B, H, W, C) -> the same."""
    channels, side = u.shape[-1], conv.kernel_size[0]
    expected = dict(
        groups=channels, in_channels=channels, out_channels=channels, kernel_size=(side, side), stride=(1, 1)
    )
    expected |= dict(padding=(side // 2, side // 2), dilation=(1, 1), padding_mode='zeros')
    fits = are_plain(nn.Conv2d, conv) and side % 2 == 1 and all(getattr(conv, k) == v for k, v in expected.items())
    if fits and channels >= MIN_CHANNELS and kernels_take(u, conv.weight, conv.bias):
        return torch.ops.ppsr.depthwise_mix(u, conv.weight, conv.bias)
    if fits and kernels_teach(u, conv.weight, conv.bias):
        return depthwise_training(u, conv.weight, conv.bias)
    return u + F.gelu(conv(u.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
