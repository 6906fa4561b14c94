"""Figures from the papers, to print beside measured ones: PSNR / SSIM on Y, crop = scale.

Sources: ATD-light from ATD (CVPR 2024); ATD-light v2 from arXiv 2603.02581 (TPAMI 2026); CAMixerSR from CAMixerSR (CVPR
2024); SwinIR-light as cited there. The PSNR tables of the Pure-Pass paper were not readable for us: :func:`quality`
answers None for them, and nothing is guessed.
"""

__all__ = ['Published', 'cost', 'others', 'quality']

from typing import NamedTuple

SETS = ('Set5', 'Set14', 'BSD100', 'Urban100', 'Manga109')


class Published(NamedTuple):
    """A pair of figures, PSNR in dB and SSIM."""

    psnr: float
    ssim: float


_QUALITY = {
    ('ATD-light', 2): '38.29/.9616 34.10/.9217 32.39/.9023 33.27/.9375 39.52/.9789',
    ('ATD-light', 3): '34.74/.9300 30.68/.8485 29.32/.8109 29.17/.8709 34.60/.9506',
    ('ATD-light', 4): '32.63/.8998 28.89/.7886 27.79/.7440 26.97/.8107 31.48/.9198',
    ('ATD-light v2', 2): '38.33/.9618 34.11/.9224 32.40/.9025 33.36/.9387 39.54/.9788',
    ('ATD-light v2', 3): '34.75/.9302 30.71/.8489 29.33/.8113 29.26/.8726 34.61/.9508',
    ('ATD-light v2', 4): '32.59/.8997 28.96/.7895 27.79/.7440 27.04/.8127 31.52/.9203',
    ('CAMixerSR', 4): '32.51/.8988 28.82/.7870 27.72/.7416 26.63/.8012 31.18/.9166',
    ('SwinIR-light', 4): '32.44/.8976 28.77/.7858 27.69/.7406 26.47/.7980 30.92/.9151',
}
# parameters, and GMACs at a 1280×720 output where published
_COST = {
    ('ATD-light', 2): (753_000, None),
    ('ATD-light', 3): (760_000, None),
    ('ATD-light', 4): (769_000, None),
    ('ATD-light v2', 2): (761_000, None),
    ('ATD-light v2', 3): (767_000, None),
    ('ATD-light v2', 4): (776_000, None),
    ('CAMixerSR', 4): (765_000, 53.8),
    ('SwinIR-light', 4): (930_000, 61.7),
}


def quality(method: str, scale: int, data_set: str) -> Published | None:
    """Published PSNR and SSIM, or None where we have none."""
    row = _QUALITY.get((method, scale))
    if row is None or data_set not in SETS:
        return None
    psnr, ssim = row.split()[SETS.index(data_set)].split('/')
    return Published(float(psnr), float(ssim))


def cost(method: str, scale: int) -> tuple[int | None, float | None]:
    """Published parameters, and GMACs at a 1280×720 output; None where we have none."""
    return _COST.get((method, scale), (None, None))


def others(scale: int) -> list[str]:
    """Methods that the tables do not measure, with published figures at this scale."""
    return [method for method, at in _QUALITY if at == scale and not method.startswith(('ATD-light', 'SwinIR-light'))]
