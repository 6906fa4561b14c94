"""The depthwise convolution with its neighbours: the compiled kernel against the definition in float64."""

import pytest
from layer_kernels import assert_close, kernel_and_definition, needs_native, random, randomise
from torch import nn

from ppsr.ops.depthwise import depthwise_mix


# channels, kernel, map: narrower than the kernel, broken vectors, several strips of columns
@needs_native
@pytest.mark.parametrize(
    'channels, kernel, size',
    [(48, 7, (17, 70)), (36, 5, (9, 8)), (24, 3, (3, 40)), (20, 9, (12, 12)), (16, 7, (2, 3)), (17, 7, (5, 33))],
)
def test_depthwise_mix(target, channels, kernel, size):
    u = random(2, *size, channels)
    conv = randomise(nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels))
    assert_close(*kernel_and_definition(lambda d, m: depthwise_mix(u.to(d), m), conv))
