"""Quality and cost of a method on test images, one record per image, remembered on disk.

A record is found again by the hash of what it depends on: the network's options, its weights, the mask that controls
use, the image file and the scale. So an interrupted run goes on where it was, and nothing is computed twice.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from ppsr.archs.build import build_masked
from ppsr.data.benchmark import read_pair
from ppsr.data.bicubic import imresize_bicubic
from ppsr.data.layout import Source
from ppsr.errors import UserError
from ppsr.images import is_special, to_image, to_tensor
from ppsr.metrics import SSIM_WINDOW, psnr_ssim
from ppsr.paper.complexity import image_cost
from ppsr.weights import load_into, read_checkpoint

__all__ = [
    'Cache',
    'Method',
    'evaluate',
    'file_hash',
    'measure',
    'quality',
]

MEANING = 1  # of a record; raise it when a record comes to mean something else


class Cache:
    """Records by key in a file of JSON lines that only grows. A line that an interruption cut off is ignored.

    Raises:
        UserError: the file cannot be read or written.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._records: dict[str, dict] = {}
        if is_special(path):
            raise UserError(f'{path} is no regular file; name another for the cache.')
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            text = self.path.read_text(encoding='utf-8') if self.path.exists() else ''
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f'{self.path}: this cache cannot be read ({e}); delete it or name another.') from e
        self._whole = not text or text.endswith('\n')
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._records[entry['key']] = entry['record']
            except (ValueError, KeyError, TypeError):
                continue

    @staticmethod
    def key(**what) -> str:
        """Hash of what a record depends on."""
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def get(self, key: str) -> dict | None:
        return self._records.get(key)

    def put(self, key: str, record: dict) -> None:
        line = json.dumps({'key': key, 'record': record}) + '\n'
        try:
            with open(self.path, 'a', encoding='utf-8') as file:
                file.write(line if self._whole else '\n' + line)
        except OSError as e:
            raise UserError(f'{self.path}: the cache cannot be written ({e.strerror or e}).') from e
        self._whole, self._records[key] = True, record


@lru_cache(maxsize=4096)
def _file_hash(path: Path, size: int, modified: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def file_hash(path: str | Path) -> str:
    """SHA-256 of a file's contents."""
    path = Path(path).resolve()
    status = path.stat()
    return _file_hash(path, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True)
class Method:
    """Something that enlarges images: bicubic, or a network with or without weights.

    Attributes:
        label: its name in tables.
        scale: of the enlargement.
        network: type and arguments as in an options file; None is bicubic.
        weights: file with its weights; None: parameters and multiply-adds can be told, quality cannot.
        control: score (:data:`ppsr.masks.controls.SCORES`) of a mask of the same share that takes the place of the
            network's own.
        about: anything worth a column.
    """

    label: str
    scale: int
    network: dict | None = None
    weights: Path | None = None
    control: str = ''
    about: dict = field(default_factory=dict)

    def build(self) -> nn.Module | None:
        """The network, with its weights where there are some, in eval mode; None for bicubic."""
        if self.network is None:
            return None
        network = self.network
        if self.control:
            same_share = {'type': 'same_share', 'score': self.control, 'of': network.get('pp_mask', 'colour')}
            network = network | {'pp_mask': same_share}
        net = build_masked(network, self.label)
        if self.weights is not None:
            load_into(net, read_checkpoint(self.weights))
        return net

    def key(self, image: Path) -> str:
        return Cache.key(
            meaning=MEANING,
            scale=self.scale,
            network=self.network,
            weights=self.weights and file_hash(self.weights),
            control=self.control,
            image=file_hash(image),
        )


def quality(sr: np.ndarray, gt: np.ndarray, scale: int) -> dict[str, float]:
    """PSNR in dB and SSIM (:func:`ppsr.metrics.psnr_ssim`), crop = scale; images are uint8 RGB (H, W, 3).

    Raises:
        UserError: too small for SSIM's window once cropped.
    """
    psnr, ssim = psnr_ssim(sr, gt, scale)
    if ssim is None:
        least = SSIM_WINDOW + 2 * scale
        raise UserError(
            f'An image of {gt.shape[1]}×{gt.shape[0]} pixels is too small for SSIM at ×{scale}; '
            f'give images of at least {least}×{least}.'
        )
    return {'psnr': psnr, 'ssim': ssim}


def evaluate(net: nn.Module, lq: np.ndarray, gt: np.ndarray | None) -> dict[str, float]:
    """The record of one image, uint8 RGB (H, W, 3): its cost, and its quality where there is a `gt`."""
    x = to_tensor(lq).to(next(net.parameters()).device)
    cost = image_cost(net, x)
    record = {'pure': cost.pure, 'exempt': cost.exempt, 'macs': cost.total, 'dense': cost.dense}
    if gt is not None:
        with torch.inference_mode():
            sr = to_image(net(x))
        record |= quality(sr, gt, net.upscale)
    return record


def _one(method: Method, net: nn.Module | None, image: Path) -> dict:
    lq, gt = read_pair(image, method.scale)
    if net is None:
        return quality(imresize_bicubic(lq, method.scale, up=True), gt, method.scale)
    return evaluate(net, lq, gt if method.weights is not None else None)


def measure(
    methods: Iterable[Method], data_sets: dict[str, list[Source]], cache: Cache, description: str = ''
) -> dict[tuple[str, str], list[dict]]:
    """Records of every method on every image, from the cache where it has them.

    Returns:
        (label, data set) -> one record per image, in the order of the data set: 'psnr' (dB) and 'ssim' where there
        are weights; for networks 'pure' and 'exempt' (shares of pixels and of padded tokens), 'macs' and 'dense'.
    """
    methods = list(methods)
    found: dict[tuple[str, str], list[dict]] = {}
    total = len(methods) * sum(map(len, data_sets.values()))
    with tqdm(total=total, desc=description, unit='image', leave=False, disable=None) as progress:
        for method in methods:
            net = None
            for name, sources in data_sets.items():
                progress.set_postfix_str(f'{method.label}, {name}')
                records = found.setdefault((method.label, name), [])
                for source in sources:
                    key = method.key(source.path)
                    record = cache.get(key)
                    if record is None:
                        net = net or method.build()
                        record = _one(method, net, source.path)
                        cache.put(key, record)
                    records.append(record)
                    progress.update()
    return found
