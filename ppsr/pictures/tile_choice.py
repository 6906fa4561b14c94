"""How large the tiles of a picture may be: what is asked for, and what the memory allows."""

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from ppsr.errors import UserError
from ppsr.pictures import memory

__all__ = ['TileChoice', 'largest_tile']

# A network is only measured when this many bytes per input pixel do not fit; three times what PP-ATD-light at ×4 was
# measured to need (docs/upscale.md).
SURELY_ENOUGH = 16 * 1024
SAFETY = 1.25  # on the measured bytes per pixel
SHARE_OF_FREE = 0.85  # of the memory that is free or allowed; the rest is for the holes that a heap gets
MAX_CALL = 2**23  # input pixels of one network call: tensors stay below 2³¹ elements, which all kernels can index


class TileChoice:
    """Chooses the tiles for one network, in any number of threads.

    Args:
        device: of the network.
        multiple: what the network pads its input to (:func:`ppsr.tiling.multiple_of`).
    """

    def __init__(self, device: torch.device, multiple: int):
        self.device, self.multiple = device, multiple
        self._bytes_per_pixel: float | None = None
        self._measuring = threading.Lock()

    def __getstate__(self) -> dict:
        """For pickle and copy: everything but the lock."""
        return {name: value for name, value in vars(self).items() if name != '_measuring'}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._measuring = threading.Lock()

    def choose(
        self,
        size: tuple[int, int],
        wish: int | None,
        overlap: int,
        fixed: float,
        per_row: float,
        max_memory: int | None,
        run: Callable[[Tensor], object],
    ) -> int:
        """The tile asked for, unless a memory limit forbids it; without a wish, the largest that memory allows.

        Args:
            size: (H, W) of the picture, in input pixels.
            wish: side of the tiles, 0 = the whole picture, None = none.
            overlap: of the tiles.
            fixed: bytes beside the network, whatever the tile.
            per_row: bytes beside the network per input row of a tile.
            max_memory: bytes that may be in use; None = what is free.
            run: calls the network on a (1, 3, h, w) float32 tensor in [0, 1], to see what it needs.

        Returns:
            Side of the tiles, 0 = the whole picture.

        Raises:
            UserError: not even the smallest sensible tiles fit.
        """
        if wish is not None and max_memory is None:
            return wish
        largest = self._largest(size, overlap, fixed, per_row, max_memory, run)
        return wish if wish is not None and (largest == 0 or 0 < wish <= largest) else largest

    def budget(self, max_memory: int | None) -> float:
        """Bytes that may be planned with: of what is free, and of what `max_memory` leaves."""
        free = memory.free_memory(self.device)
        if max_memory is not None:
            free = min(free, max_memory - memory.used_memory(self.device))
        return SHARE_OF_FREE * free

    def smaller(self, tile: int, overlap: int, side: int) -> int:
        """The tile to try after the memory did not suffice; `side` is the longer one of the picture.

        Raises:
            UserError: there is no smaller one.
        """
        before = min(tile or side, side)
        tile = before // 2 // self.multiple * self.multiple
        if tile <= overlap:
            raise UserError(
                f'Out of memory even with tiles of {before} pixels; close other programs, or use a smaller '
                'tile overlap.'
            )
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
        return tile

    def _largest(
        self, size: tuple[int, int], overlap: int, fixed: float, per_row: float, max_memory: int | None, run: Callable
    ) -> int:
        """0 (the whole picture) if the memory allows it, else the side of the largest tile that it allows."""
        height, width = size
        budget = self.budget(max_memory)
        room = budget - fixed
        area = height * width
        if area <= MAX_CALL and area * SURELY_ENOUGH <= room:
            return 0
        per_pixel = self._measured(run)
        # padding to whole windows counts in small or narrow images
        multiple = self.multiple
        padded = -(-height // multiple) * multiple * (-(-width // multiple) * multiple)
        if area <= MAX_CALL and padded * per_pixel <= room:
            return 0
        most = int(MAX_CALL**0.5) // multiple * multiple
        tile = min(largest_tile(room, per_pixel, per_row, overlap, multiple), most)
        if tile <= 0:
            smallest = -(-(2 * overlap) // multiple) * multiple + multiple
            missing = smallest**2 * per_pixel + smallest * per_row - room
            raise UserError(
                f'{width}×{height} pixels need {memory.gib(budget + missing)} of memory at least, and '
                f'{memory.gib(budget)} are free or allowed; allow more, write --ext png or tiff, or take a smaller '
                'picture.'
            )
        return tile

    def _measured(self, run: Callable[[Tensor], object]) -> float:
        with self._measuring:
            if self._bytes_per_pixel is None:
                self._bytes_per_pixel = SAFETY * memory.measure_bytes_per_pixel(run, self.device)
            return self._bytes_per_pixel


def largest_tile(allowed: float, per_pixel: float, per_row: float, overlap: int, multiple: int) -> int:
    """The largest tile with tile²·per_pixel + tile·per_row ≤ allowed, a multiple of `multiple`; 0 = none makes sense.

    Args:
        allowed: bytes.
        per_pixel: bytes that the network needs per input pixel.
        per_row: bytes per input row of a tile (:func:`ppsr.tiling.accumulator_bytes`).
        overlap: of the tiles; a tile of less than 2·overlap + multiple would compute everything many times.
        multiple: what the network pads its input to.
    """
    if allowed <= 0:
        return 0
    tile = int((math.sqrt(per_row**2 + 4 * per_pixel * allowed) - per_row) / (2 * per_pixel)) // multiple * multiple
    return tile if tile >= 2 * overlap + multiple else 0
