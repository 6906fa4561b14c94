"""PSNR and SSIM as the benchmarks have them: basicsr's functions on RGB arrays, called here and nowhere else."""

import numpy as np
from basicsr.metrics import calculate_psnr, calculate_ssim

__all__ = ['SSIM_WINDOW', 'psnr', 'psnr_ssim']

SSIM_WINDOW = 11  # side of SSIM's Gaussian window: what is smaller has no SSIM


def psnr_ssim(image: np.ndarray, gt: np.ndarray, crop: int) -> tuple[float | None, float | None]:
    """PSNR in dB and SSIM of the Y channel, `crop` pixels off each side.

    Args:
        image, gt: uint8 RGB (H, W, 3), of one shape.
        crop: the scale, in the benchmarks' protocol.

    Returns:
        Each of them None where the image is too small for it: nothing left, or less than SSIM's 11×11 window.
    """
    side = min(gt.shape[:2]) - 2 * crop
    bgr = image[..., ::-1], gt[..., ::-1]  # as basicsr has images
    ssim = float(calculate_ssim(*bgr, crop, test_y_channel=True)) if side >= SSIM_WINDOW else None
    return psnr(image, gt, crop), ssim


def psnr(image: np.ndarray, gt: np.ndarray, crop: int) -> float | None:
    """As :func:`psnr_ssim`, without SSIM, which takes most of the time."""
    if min(gt.shape[:2]) <= 2 * crop:
        return None
    return float(calculate_psnr(image[..., ::-1], gt[..., ::-1], crop, test_y_channel=True))
