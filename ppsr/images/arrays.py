"""Images as arrays: (H, W, C) uint8 or uint16, and as tensors: (1, 3, H, W) float32 in [0, 1]."""

import numpy as np
import torch
from torch import Tensor

__all__ = ['LUMA', 'MODES', 'as_rgb', 'to_8_bits', 'to_image', 'to_tensor', 'turn']

MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}  # channels -> mode
LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601, from RGB to gray


def to_8_bits(pixels: np.ndarray) -> np.ndarray:
    """uint16 samples rounded to the nearest of 8 bits (65535 becomes 255); uint8 as it is."""
    return pixels if pixels.dtype == np.uint8 else ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 1 to 4) uint8 or uint16 -> (H, W, 3) uint8; transparency over white."""
    pixels = to_8_bits(pixels)
    colour = pixels[..., :-1] if pixels.shape[2] in (2, 4) else pixels
    colour = np.broadcast_to(colour, (*colour.shape[:2], 3))
    if pixels.shape[2] in (2, 4):
        alpha = pixels[..., -1:].astype(np.float32) / 255
        colour = np.rint(colour * alpha + 255 * (1 - alpha)).astype(np.uint8)
    return np.ascontiguousarray(colour)


def to_tensor(image: np.ndarray) -> Tensor:
    """uint8 RGB (H, W, 3) -> float32 (1, 3, H, W) in [0, 1]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))[None].to(torch.float32) / 255


def to_image(tensor: Tensor) -> np.ndarray:
    """(1, C, H, W) in [0, 1], of any floating type -> uint8 (H, W, C), clipped and rounded."""
    return (tensor[0].detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright pixels from stored ones and the EXIF orientation (1 to 8; anything else counts as 1)."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    flip_rows = orientation in (3, 4, 7, 8)
    flip_columns = orientation in (2, 3, 6, 7)
    return np.array(pixels[:: -1 if flip_rows else 1, :: -1 if flip_columns else 1])  # a copy that can be written to
