"""What of a video is done: runs of encoded frames in a hidden folder beside the output; a later run goes on there."""

import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ppsr.atomic import PREFIX
from ppsr.images import atomic_file
from ppsr.locks import Lock
from ppsr.video.encoder import Packets

__all__ = ['Work', 'describe_file', 'describe_network']

ABOUT = 'about.json'
EDGE = 2**20  # bytes at either end of a file that are looked at


def describe_file(path: Path) -> dict:
    """What tells a file from another: its size, its time, and a digest of both ends."""
    found = os.stat(path)
    digest = hashlib.blake2b(digest_size=16)
    with open(path, 'rb') as file:
        digest.update(file.read(EDGE))
        file.seek(max(0, found.st_size - EDGE))
        digest.update(file.read(EDGE))
    return {'size': found.st_size, 'time': found.st_mtime_ns, 'digest': digest.hexdigest()}


def describe_network(net: nn.Module) -> str:
    """A digest of a network: its structure, the plain settings of its modules, and all parameters."""
    digest = hashlib.blake2b(repr(net).encode(), digest_size=16)
    for name, module in net.named_modules():
        plain = {
            key: value
            for key, value in sorted(vars(module).items())
            if not key.startswith('_') and isinstance(value, (bool, int, float, str, tuple, type(None)))
        }
        digest.update(f'{name} {type(module).__qualname__} {plain}'.encode())
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Work:
    """The folder of one output and one choice of everything that its frames depend on; a context manager that locks it.

    Args:
        target: the output.
        key: everything that the frames depend on; another key is another folder.
        chosen: what may be chosen anew with each run and has to stay as the first run chose it.

    Attributes:
        folder: hidden, beside the output.
        chosen: as the first run chose it.
        others: folders of the same output with another key.

    Raises:
        UserError: another process works at it, or the folder cannot be written.
    """

    def __init__(self, target: Path, key: Mapping, chosen: Mapping):
        text = json.dumps({'output': target.name, **key}, sort_keys=True, default=str)
        name = hashlib.blake2b(text.encode('utf-8', 'surrogateescape'), digest_size=8).hexdigest()
        self.folder = target.parent / f'{PREFIX}video-{name}'
        self._output = os.fsencode(target.name).hex()
        self._lock = Lock(self.folder / 'lock', f'The unfinished {target.name}')
        self.chosen = dict(chosen)

    def __enter__(self) -> 'Work':
        self._lock.acquire()
        try:
            for part in self.folder.glob(f'{PREFIX}*.part*'):  # of a run that was killed
                part.unlink(missing_ok=True)
            about = self._read_about(self.folder)
            if about is None:
                for segment in self.folder.glob('*.npz'):  # without it nobody knows what they are
                    segment.unlink()
                with atomic_file(self.folder / ABOUT) as file:
                    file.write(json.dumps({'output': self._output, 'chosen': self.chosen}).encode())
            else:
                self.chosen = about['chosen']
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *exception) -> None:
        if not any(self.folder.glob('*.npz')):  # nothing that a later run could use
            self.remove()
        self._lock.release()

    def remove(self) -> None:
        """Remove the folder with all in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @staticmethod
    def _read_about(folder: Path) -> dict | None:
        try:
            about = json.loads((folder / ABOUT).read_bytes())
            return about if isinstance(about['chosen'], dict) and isinstance(about['output'], str) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def others(self) -> list[Path]:
        folders = self.folder.parent.glob(f'{PREFIX}video-*')
        named = [(folder, self._read_about(folder)) for folder in folders if folder != self.folder]
        return sorted(folder for folder, about in named if about and about['output'] == self._output)

    def _path(self, index: int) -> Path:
        return self.folder / f'{index:06}.npz'

    def write(self, index: int, packets: Packets, about: Mapping) -> None:
        """Keep a run of frames.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        text = np.frombuffer(json.dumps(dict(about)).encode(), np.uint8)
        with atomic_file(self._path(index)) as file:
            np.savez(file, about=text, **vars(packets))

    def read(self, index: int) -> tuple[Packets, dict] | None:
        """A run of frames with what was written about it; None where there is none, or it is damaged."""
        path = self._path(index)
        try:
            with np.load(path, allow_pickle=False) as found:
                packets = Packets(**{field.name: found[field.name] for field in fields(Packets)})
                return packets, json.loads(found['about'].tobytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            path.unlink(missing_ok=True)
            return None

    def read_all(self) -> Iterator[tuple[Packets, dict]]:
        """All that is there, from the first on."""
        index = 0
        while (found := self.read(index)) is not None:
            yield found
            index += 1
