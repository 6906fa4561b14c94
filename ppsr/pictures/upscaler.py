"""Enlarge pictures: :class:`Upscaler` for Python, and what ``ppsr upscale`` is made of.

A picture passes through in bands of rows: tiles of the network's input are read from the picture in host memory, the
network's rows are resized if another factor is wanted, alpha is added, samples are rounded, and the rows are written.
Only the picture itself and a band are in memory at a time (JPEG and WebP collect the result, arrays are the result).
"""

import contextlib
import copy
import dataclasses
import logging
import numbers
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ppsr.archs.masked import as_masked, mask_module
from ppsr.calibration import Choice, Wish, load_as_wished
from ppsr.device import DTYPES, in_precision, resolve_device, resolve_dtype, torch_as_it_comes
from ppsr.errors import UserError
from ppsr.images import (
    MODES,
    Header,
    Picture,
    atomic_file,
    check_format,
    format_of,
    from_pil,
    losses,
    read_header,
    read_picture,
    to_pil,
    write_picture,
)
from ppsr.ops.dispatch import no_bf16
from ppsr.pictures import memory
from ppsr.pictures.bands import resize_bands, split_alpha, to_numpy, with_alpha, working_bytes
from ppsr.pictures.side_by_side import groups, in_order
from ppsr.pictures.tile_choice import TileChoice
from ppsr.tiling import (
    DEFAULT_OVERLAP,
    RepeatedTiles,
    Totals,
    accumulator_bytes,
    check_tiles,
    count_tiles,
    multiple_of,
    run_network,
    tiled_bands,
    tiled_mask,
)
from ppsr.weights import default_model

__all__ = ['DTYPES', 'Stats', 'Upscaler', 'resolve_device', 'resolve_dtype']

OUTSCALES = (0.01, 100.0)  # factors that make sense; beyond, only numbers that nobody meant

READ_BYTES = 12  # per pixel while a picture is decoded: Pillow's copy and ours

logger = logging.getLogger('ppsr')


@dataclass(frozen=True)
class Stats:
    """What one enlargement did.

    Attributes:
        input_size, output_size: (width, height) in pixels.
        pure_share: share of the input's pixels that were exempted as pure, 0 to 1.
        gmacs: 10⁹ multiply-adds of the network that were done.
        dense_gmacs: what the same tiles take with nothing exempted.
        seconds: wall-clock, from pixels to pixels (file: with reading and writing).
        tile: side of the tiles in input pixels, 0 = the image was not cut.
        tiles: number of network calls.
        mask: (H, W) bool, True = pure, or None for a network without a mask.
        choice: what was asked for and which setting was chosen, where the dial did (:mod:`ppsr.calibration.dial`).
    """

    input_size: tuple[int, int]
    output_size: tuple[int, int]
    pure_share: float
    gmacs: float
    dense_gmacs: float
    seconds: float
    tile: int
    tiles: int
    mask: np.ndarray | None = dataclasses.field(repr=False, default=None)
    choice: Choice | None = None

    @property
    def saved_share(self) -> float:
        """Share of the dense multiply-adds that was saved, 0 to 1."""
        return 1 - self.gmacs / self.dense_gmacs if self.dense_gmacs else 0.0


class Upscaler:
    """Enlarges pictures with a network.

    Args:
        net: maps (1, 3, h, w) in [0, 1] to (1, 3, s·h, s·w) and has `upscale` = s; see :meth:`from_pretrained`.
            It is put on the device and into eval mode, and holds no state of a call: one Upscaler serves any number of
            threads.
        device: 'auto' (a GPU if there is one), 'cpu', 'cuda', 'cuda:1'.
        dtype: 'fp32'; 'bf16' or 'fp16' under autocast on a GPU; 'bf16' on a CPU with AVX512-BF16, in the kernels of
            ppsr alone (:func:`ppsr.ops.native.bf16`). Another CPU computes 'bf16' in fp32 and says so.
        outscale: factor of the result, 0.01 to 100; None = the network's. Another factor than the network's is
            reached by Lanczos resizing of the network's result.
        tile: side of the tiles in input pixels; 0 = never cut; None = cut only if memory demands it.
        tile_overlap: input pixels that neighbouring tiles share.
        max_memory: bytes that may be in use: by the process (CPU), or on the GPU; or text like '4G'. None = what is
            free.
        say: receives sentences that the user should read (a smaller tile was tried, …); default: the log 'ppsr'.

    Raises:
        UserError: a value that makes no sense, or that this machine cannot do.

    >>> import numpy as np, torch
    >>> class Double(torch.nn.Upsample):  # a stand-in: doubles every pixel
    ...     upscale = 2
    >>> upscaler = Upscaler(Double(scale_factor=2), device='cpu')
    >>> upscaler(np.array([[0, 255]], np.uint8))
    array([[  0,   0, 255, 255],
           [  0,   0, 255, 255]], dtype=uint8)
    >>> upscaler.stats.output_size
    (4, 2)
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        device: str | torch.device = 'auto',
        dtype: str | torch.dtype = 'fp32',
        outscale: float | None = None,
        tile: int | None = None,
        tile_overlap: int = DEFAULT_OVERLAP,
        max_memory: int | str | None = None,
        say: Callable[[str], None] = logger.warning,
    ):
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        if self.dtype == torch.bfloat16 and self.device.type == 'cpu' and (reason := no_bf16()) is not None:
            say(f'bf16 is not faster here, so this is computed in fp32: {reason}.')
            self.dtype = torch.float32
        self.net = net.to(self.device).eval()
        self.scale = int(net.upscale)
        self.outscale = _number('outscale', self.scale if outscale is None else outscale, *OUTSCALES)
        check_tiles(0 if tile is None else tile, tile_overlap)
        self.tile, self.tile_overlap = tile, tile_overlap
        self.max_memory = None if max_memory is None else memory.parse_size(max_memory)
        self.say = say
        self.choice: Choice | None = None  # of from_pretrained
        self._tiles = TileChoice(self.device, multiple_of(net))
        self.__setstate__({})

    def __getstate__(self) -> dict:
        """For pickle and copy: everything but what belongs to this process's threads."""
        return {name: value for name, value in vars(self).items() if name != '_last'}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._last = threading.local()

    @classmethod
    def from_pretrained(
        cls,
        path_or_name: str | os.PathLike | None = None,
        *,
        arch: str | None = None,
        pure_pass: bool = True,
        settings: Mapping | None = None,
        max_loss: float | str | None = None,
        saving: float | None = None,
        exact: bool = False,
        device: str | torch.device = 'auto',
        **options,
    ) -> 'Upscaler':
        """An Upscaler with weights from a file or of the package.

        How fast is said by one of `max_loss`, `saving` and `exact`, or by `settings`; the first two are looked up in
        what ``ppsr calibrate`` measured for these weights (:attr:`Upscaler.choice` says what was chosen).

        Args:
            path_or_name: a weights file, or a name of :func:`ppsr.weights.list_pretrained`; None = the shipped weights
                of the scale `outscale`, or of the next larger one (:func:`ppsr.weights.default_model`).
            arch: PPATDLight runs a plain ATD-light checkpoint with Pure-Pass; None = as the file says.
            pure_pass: False runs the network with nothing exempted.
            settings: options of the network in place of those in the file, e.g. {'pp_scope': ['category', 'window']}.
            max_loss: the fastest setting that loses at most so many dB of PSNR against the dense network, in the mean
                over the images of the calibration; 'dB@percent' on so many percent of them, such as '0.05@95'.
            saving: the setting that loses least of those that save so many percent of the multiply-adds.
            exact: nothing is exempt.
            device, **options: as for the class.

        Raises:
            UserError: no such weights, or they do not fit; wishes that exclude each other, or that these weights have
                nothing measured for.
        """
        device = resolve_device(device)
        if path_or_name is None:
            outscale = options.get('outscale')
            path_or_name = default_model(outscale if isinstance(outscale, (int, float)) else None)
        wish = Wish.of(max_loss, saving, exact)
        net, choice = load_as_wished(
            wish, path_or_name, arch=arch, pure_pass=pure_pass, device=device, settings=settings
        )
        made = cls(net, device=device, **options)
        made.choice = choice
        return made

    @property
    def stats(self) -> Stats | None:
        """Of the last call that finished in the calling thread; None before the first."""
        return getattr(self._last, 'stats', None)

    def __call__(self, image):
        """Enlarge one picture; :meth:`upscale_with_stats` without the statistics (they stay in :attr:`stats`)."""
        return self.upscale_with_stats(image)[0]

    def upscale_with_stats(
        self,
        image,
        on_tile: Callable[[int, int], None] | None = None,
        repeated: RepeatedTiles | None = None,
    ):
        """Enlarge one picture.

        Args:
            image: a path, a Pillow image, or an array: (H, W), (H, W, 1 | 2 | 3 | 4), RGB order, alpha last and not
                premultiplied; uint8, uint16, or float in [0, 1].
            on_tile: called with (tiles done, tiles in all).
            repeated: what it remembers of the last picture is not computed again, and not counted in the statistics.

        Returns:
            The picture and its :class:`Stats`. An array gives an array of the same kind and dtype, a Pillow image and
            a path give a Pillow image (mode L, LA, RGB, RGBA or I;16).

        Raises:
            UserError: not a picture, or it does not fit into the memory allowed.
        """
        start = time.perf_counter()
        if isinstance(image, np.ndarray):
            pixels, finish = _check_array(image), lambda out: out.reshape(*out.shape[:2], *image.shape[2:])
        else:
            if isinstance(image, Image.Image):
                picture = from_pil(image)
            elif isinstance(image, (str, os.PathLike)):
                picture = self.read(image)
            else:
                raise UserError(f'Give a path, a Pillow image or a numpy array, not {type(image).__name__}.')
            pixels, finish = picture.pixels, lambda out: to_pil(dataclasses.replace(picture, pixels=out))
            if picture.pixels.dtype == np.uint16:
                to_pil(picture)  # 16-bit colour is refused before the work, not after it

        height, width, channels = self._output_shape(pixels.shape)
        result_bytes = height * width * channels * pixels.itemsize

        def collect(bands: Iterable[np.ndarray]) -> np.ndarray:
            result, row = np.empty((height, width, channels), pixels.dtype), 0
            for band in bands:
                result[row : row + len(band)] = band
                row += len(band)
            return result

        result, stats = self._enlarge(pixels, collect, result_bytes, on_tile, repeated)
        return finish(result), self._remember(stats, start)

    def upscale_many(self, images: Iterable) -> list:
        """Enlarge many pictures; on a CPU small ones side by side, a core for each (:mod:`ppsr.pictures.side_by_side`).

        Args:
            images: of any kinds and sizes that :meth:`upscale_with_stats` takes.

        Returns:
            What a call for each would return, bit for bit, in their order; :attr:`stats` is that of the last.

        Raises:
            UserError: the first that cannot be enlarged, and why.
        """
        images = list(images)
        sizes = [_size_of(image) for image in images]
        held = 0.0
        for image, size in zip(images, sizes):
            if size is not None:
                pixels = image.nbytes if isinstance(image, np.ndarray) else 8 * size[0] * size[1]  # 4 × 16 bits
                held += pixels * self.outscale**2
        results = []

        def enlarge(i: int, say: Callable[[str], None] | None = None):
            try:
                return (self if say is None else self.for_small(say)).upscale_with_stats(images[i])
            except UserError as error:
                raise UserError(f'Picture {i + 1} of {len(images)}: {error}') from error

        for indices, workers in groups(self, range(len(images)), sizes.__getitem__, held):
            if workers > 1:
                outcomes = in_order(enlarge, indices, workers, self.say)
            else:
                outcomes = (enlarge(i) for i in indices)
            with contextlib.closing(outcomes):
                for result, stats in outcomes:
                    results.append(result)
                    self._last.stats = stats
        return results

    def upscale_file(
        self,
        source: str | os.PathLike | BinaryIO | Picture,
        target: str | os.PathLike | BinaryIO,
        quality: int = 95,
        on_tile: Callable[[int, int], None] | None = None,
    ) -> Stats:
        """Enlarge a file (or binary stream, or Picture) into a file (or, as PNG, into a binary stream).

        Bit depth, ICC profile and resolution are kept; the EXIF orientation is applied. The target appears only when
        it is complete, and replaces an older one then.

        Args:
            source, target: the target's extension says the format: .png, .jpg, .webp, .tif.
            quality: 1 to 100, of JPEG and WebP.
            on_tile: called with (tiles done, tiles in all).

        Raises:
            UserError: unreadable, unwritable, too large for the format or the memory.
        """
        start = time.perf_counter()
        stream = hasattr(target, 'write')
        form = 'PNG' if stream else format_of(target)
        quality = int(_number('quality', quality, 1, 100))
        picture = source if isinstance(source, Picture) else self.read(source)
        shape = self._output_shape(picture.pixels.shape)
        check_format(form, shape[1], shape[0], shape[2], str('standard output' if stream else target))
        named = not stream and isinstance(source, (str, os.PathLike))
        if named and Path(target).exists() and os.path.samefile(source, target):
            raise UserError(f'{target} is the input itself; choose another name.')

        for loss in losses(picture, form):
            self.say(f'{"standard output" if stream else target}: {loss}.')

        def write(bands: Iterable[np.ndarray]) -> None:
            # a stream cannot be taken back, so it is only written to when the picture is complete
            with tempfile.TemporaryFile() if stream else atomic_file(target) as file:
                about = picture.icc, picture.dpi, quality, picture.colour
                write_picture(file, form, shape, picture.pixels.dtype, bands, *about)
                if stream:
                    file.seek(0)
                    shutil.copyfileobj(file, target)

        # Pillow keeps 4 bytes a pixel (1 or 2 of gray); the WebP encoder makes copies of its own
        collected = {'JPEG': 4, 'WEBP': 16}.get(form, 0) * shape[0] * shape[1]
        _, stats = self._enlarge(picture.pixels, write, collected, on_tile)
        return self._remember(stats, start)

    def read(self, source: str | os.PathLike | BinaryIO) -> Picture:
        """Read a picture if the memory allowed is enough for that; UserError otherwise."""
        return read_picture(source, before=self._check_memory)

    def _check_memory(self, header: Header, name: str) -> None:
        if self.max_memory is None or self.device.type != 'cpu':
            return
        needed = memory.used_memory(self.device) + READ_BYTES * header.width * header.height
        if needed > self.max_memory:
            allowed = memory.gib(self.max_memory)
            raise UserError(f'{name} needs {memory.gib(needed)} of memory to be opened, and {allowed} are allowed.')

    def _remember(self, stats: Stats, start: float) -> Stats:
        self._last.stats = dataclasses.replace(stats, seconds=time.perf_counter() - start, choice=self.choice)
        return self._last.stats

    def _output_shape(self, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        height, width = (max(1, round(side * self.outscale)) for side in shape[:2])
        return height, width, shape[2]

    @property
    def has_mask(self) -> bool:
        """Whether the network exempts pixels."""
        return mask_module(self.net) is not None

    def mask(self, pixels: np.ndarray) -> np.ndarray | None:
        """The mask that enlarging this picture uses, tile for tile, without enlarging it.

        Args:
            pixels: (H, W, 1 to 4) uint8, uint16 or float in [0, 1], as for :meth:`upscale_with_stats`.

        Returns:
            (H, W) bool, True = pure; None for a network that exempts nothing.

        Raises:
            UserError: not a picture.
        """
        if not self.has_mask:
            return None
        pixels = _check_array(pixels)
        tile = self._choose_tile(pixels.shape, 0)
        colour, _, peak = split_alpha(pixels)
        with torch.inference_mode(), torch_as_it_comes():
            mask = tiled_mask(self._mask_of, self._reader(colour, peak), pixels.shape[:2], tile, self.tile_overlap)
        return mask[0].numpy()

    def for_frames(self, shape: tuple[int, int, int], held: int, tile: int | None = None) -> 'Upscaler':
        """An Upscaler with the same network that cuts all pictures of one size in the same way, whatever memory is free
        when their turn comes.

        Args:
            shape: (H, W, C) of the pictures.
            held: bytes that the caller holds from one picture to the next, the result included.
            tile: side of the tiles, 0 = never cut; None = chosen now, as for one picture.

        Raises:
            UserError: the memory allowed is not enough for any tile.
        """
        made = copy.copy(self)
        made.tile = self._choose_tile(shape, held) if tile is None else tile
        made.max_memory = None
        return made

    def for_small(self, say: Callable[[str], None]) -> 'Upscaler':
        """An Upscaler with the same network for pictures that the memory surely suffices for: it does not look."""
        made = copy.copy(self)
        made.tile, made.max_memory, made.say = self.tile or 0, None, say
        return made

    def memory_budget(self) -> float:
        """Bytes that may be planned with now."""
        return self._tiles.budget(self.max_memory)

    @property
    def multiple(self) -> int:
        """What the network pads both sides of its input to."""
        return self._tiles.multiple

    def _mask_of(self, lq: Tensor) -> Tensor:
        return as_masked(self.net).mask_of(lq)

    # ------------------------------------------------------------------------------------------------- the work

    def _enlarge(
        self, pixels: np.ndarray, consume: Callable, result_bytes: int, on_tile, repeated: RepeatedTiles | None = None
    ) -> tuple[object, Stats]:
        """Feed the enlarged rows to `consume`; on running out of memory once more with smaller tiles."""
        tile = self._choose_tile(pixels.shape, result_bytes)
        height, width = pixels.shape[:2]
        while True:
            totals, done = Totals(), 0
            total = count_tiles(height, width, tile, self.tile_overlap)

            def count() -> None:
                nonlocal done
                done += 1
                if on_tile is not None:
                    on_tile(done, total)  # noqa: B023 (called in this turn of the loop only)

            try:
                result = consume(self._rows(pixels, tile, totals, count, repeated))
                break
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
            # outside of the except block: the traceback would keep the tensors alive
            side = max(height, width)
            tried = f'tiles of {tile}' if 0 < tile < side else 'the whole image'
            tile = self._tiles.smaller(tile, self.tile_overlap, side)
            self.say(f'Out of memory with {tried}: trying {tile}.')
        out = self._output_shape(pixels.shape)
        mask = None if totals.mask is None else totals.mask[0].numpy()
        gmacs, dense = totals.macs / 1e9, totals.dense_macs / 1e9
        tile = 0 if total == 1 else tile
        size, out_size = (width, height), (out[1], out[0])
        return result, Stats(size, out_size, totals.pure_share, gmacs, dense, 0.0, tile, totals.tiles, mask)

    def _rows(
        self,
        pixels: np.ndarray,
        tile: int,
        totals: Totals,
        on_tile: Callable[[], None],
        repeated: RepeatedTiles | None = None,
    ) -> Iterator[np.ndarray]:
        """The result in bands (rows, W', C), in the dtype of `pixels`."""
        height, width, _ = pixels.shape
        colour, alpha, peak = split_alpha(pixels)
        read = self._reader(colour, peak)
        run = self._run if repeated is None else repeated.around(self._run)
        bands = tiled_bands(self.net, read, (height, width), self.scale, tile, self.tile_overlap, totals, on_tile, run)
        rows = to_numpy(bands, gray=colour.shape[2] == 1)
        size, source = self._output_shape(pixels.shape)[:2], (height * self.scale, width * self.scale)
        if size != source:
            rows = resize_bands(rows, source, size)
        if alpha is not None:
            rows = with_alpha(rows, alpha, peak, size)
        for band in rows:
            np.clip(band, 0, 1, out=band)
            yield np.rint(band * peak).astype(pixels.dtype) if peak > 1 else band.astype(pixels.dtype)

    def _reader(self, colour: np.ndarray, peak: int) -> Callable[[slice, slice], Tensor]:
        """read(rows, columns) -> (1, 3, h, w) float32 in [0, 1] on the network's device."""

        def read(rows: slice, columns: slice) -> Tensor:
            part = np.ascontiguousarray(colour[rows, columns].transpose(2, 0, 1), np.float32) / np.float32(peak)
            return torch.from_numpy(part).to(self.device).expand(3, -1, -1)[None]

        return read

    def _run(self, net: nn.Module, lq: Tensor, totals: Totals) -> tuple[Tensor, Tensor | None]:
        """One network call in the precision chosen; a result that is not finite is never handed on."""
        half = self.dtype != torch.float32
        with torch.inference_mode(), torch_as_it_comes():
            with in_precision(self.dtype, self.device):
                sr, mask = run_network(net, lq, totals)
            if not torch.isfinite(sr).all() and half:
                self.say(f'{self.dtype} overflowed: computing this part in fp32.')
                sr, mask = run_network(net, lq, Totals())
            if not torch.isfinite(sr).all():
                raise UserError('The network gives values that are not finite; its weights are damaged.')
        return sr, mask

    def _choose_tile(self, shape: tuple[int, int, int], result_bytes: int) -> int:
        """The tile for a picture of this shape; `result_bytes` are what it makes the caller hold until the end."""
        size, fixed, per_row = shape[:2], 0.0, 0.0
        if self.device.type == 'cpu':  # else the network has a memory of its own
            fixed = result_bytes + working_bytes(shape, self.scale, self.outscale)
            per_row = accumulator_bytes(size[1], self.scale)
        tile = self._tiles.choose(
            size,
            self.tile,
            self.tile_overlap,
            fixed,
            per_row,
            self.max_memory,
            run=lambda lq: self._run(self.net, lq, Totals()),
        )
        if self.tile is not None and tile != self.tile:
            self.say(f'{memory.gib(self.max_memory)} are enough for tiles of {tile} pixels: these are used.')
        return tile


def _number(name: str, value, low: float, high: float) -> float:
    """A number within a range; UserError for anything else that a caller passes."""
    try:
        number = float(value) if isinstance(value, numbers.Real) else None
    except OverflowError:
        number = None
    if number is None or not low <= number <= high:
        shown = repr(value) if len(repr(value)) < 40 else f'{repr(value)[:30]}…'
        raise UserError(f'{name} must be a number from {low:g} to {high:g}, got {shown}.')
    return number


def _size_of(image) -> tuple[int, int] | None:
    """(H, W) of what can be enlarged; None where that is told when its turn comes."""
    if isinstance(image, np.ndarray):
        return image.shape[:2] if image.ndim in (2, 3) and image.size else None
    if isinstance(image, Image.Image):
        return (image.height, image.width) if image.height * image.width else None
    if not isinstance(image, (str, os.PathLike)):  # a number is no name, but an open file that reading would close
        return None
    try:
        return read_header(image).upright if os.path.isfile(image) else None
    except (UserError, ValueError):  # a NUL in the name
        return None


def _check_array(image: np.ndarray) -> np.ndarray:
    """(H, W, C) view of an array that can be enlarged."""
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in MODES):
        raise UserError(f'An array must be (H, W) or (H, W, 1 to 4), got {image.shape}.')
    if 0 in image.shape:
        raise UserError(f'The array has no pixels: {image.shape}.')
    if image.dtype in (np.uint8, np.uint16):
        return image.reshape(*image.shape[:2], -1)
    if image.dtype.kind != 'f':
        raise UserError(f'An array must be uint8, uint16 or float in [0, 1], got {image.dtype}.')
    low, high = image.min(), image.max()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails, too
        raise UserError(f'A float array must lie in [0, 1], this one has {low:g} to {high:g}.')
    return image.clip(0, 1).reshape(*image.shape[:2], -1)
