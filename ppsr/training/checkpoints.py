"""Checkpoints: models and training states written whole or not at all, found again, and pruned.

A checkpoint of iteration n is ``models/net_g_<n>.pth`` and then ``training_states/<n>.state``, in BasicSR's format: the
state is written last, so a state that is there has its weights. Reading executes nothing (``weights_only=True``).
"""

import io
import random
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch

from ppsr.atomic import atomic_path
from ppsr.errors import UserError
from ppsr.weights import read_checkpoint

__all__ = [
    'find_state',
    'prune',
    'random_state',
    'read_state',
    'remove_leftovers',
    'restore_random_state',
    'write',
]

STATE_KEYS = {'epoch': int, 'iter': int, 'optimizers': list, 'schedulers': list}
_NUMBERED = re.compile(r'(?:net_\w+_)?(\d+)\.(?:state|pth)')


def write(path: str | Path, content: dict) -> None:
    """torch.save, atomically: temporary file, fsync, rename.

    Raises:
        UserError: the disk is full or refuses; what was there before is whole.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)  # to memory first: the only thing that can fail on the disk is then a plain write
    try:
        with atomic_path(path) as temporary:
            temporary.write_bytes(buffer.getbuffer())
    except OSError as e:
        raise UserError(
            f'checkpoint {path} cannot be written ({e.strerror or e}); the earlier ones are whole: make room '
            '(logger → keep_last prunes old ones) and go on with --auto_resume.'
        ) from e


def read_state(path: str | Path) -> dict:
    """A training state, on the CPU; nothing in it is executed.

    Raises:
        UserError: missing, unreadable, holding more than numbers, or not a training state.
    """
    if not Path(path).is_file():
        raise UserError(f'training state {path} does not exist.')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # damaged bytes make torch raise nearly anything
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200].rstrip('.')
        raise UserError(f'training state {path} cannot be read: {reason}.') from e
    fits = isinstance(state, dict) and all(isinstance(state.get(key), kind) for key, kind in STATE_KEYS.items())
    if not fits or state['iter'] < 0 or state['epoch'] < 0:
        raise UserError(f'{path} is not a training state: it lacks {", ".join(STATE_KEYS)}.')
    return state


def find_state(
    states: str | Path, newest: bool, named: str | None, networks: Sequence[str]
) -> tuple[Path, dict, list[str]] | None:
    """The training state to go on from: the named one or the newest of a run; where that is damaged, the one before.

    Args:
        states: folder of the run's training states.
        newest: take the newest one there (--auto_resume).
        named: path.resume_state of the options; used when not `newest` or when there is none yet.
        networks: labels ('g') whose weights have to be readable, too.

    Returns:
        Path and content of the state, and a sentence for each one that was passed over; None to start anew.

    Raises:
        UserError: there are states, but none is usable; or the named one does not exist.
    """
    candidates = _numbered(states, '.state')[::-1] if newest else []
    if not candidates and named:
        named = Path(named)
        if not named.is_file():
            raise UserError(f'path → resume_state: {named} does not exist.')
        match = _NUMBERED.fullmatch(named.name)
        before = [s for s in _numbered(named.parent, '.state') if match and _iteration(s) < int(match[1])]
        candidates = [named, *before[::-1]]
    if not candidates:
        return None
    passed_over = []
    for path in candidates:
        try:
            state = read_state(path)
            for label in networks:
                read_checkpoint(model_of(path, label, state['iter']))
            return path, state, passed_over
        except UserError as e:
            passed_over.append(str(e))
    raise UserError(f'no checkpoint in {candidates[0].parent} is usable: {" ".join(passed_over)}')


def model_of(state: str | Path, label: str, iteration: int) -> Path:
    """Where the weights lie that belong to a training state."""
    return Path(state).parent.parent / 'models' / f'net_{label}_{iteration}.pth'


def prune(models: str | Path, states: str | Path, keep_last: int, keep: Collection[int] = ()) -> None:
    """Delete all checkpoints but the last `keep_last`, and the models of the iterations in `keep` (the best ones)."""
    for state in _numbered(states, '.state')[:-keep_last]:  # states first: one without its model would be of no use
        state.unlink(missing_ok=True)
    kept = {_iteration(state) for state in _numbered(states, '.state')} | set(keep)
    for model in _numbered(models, '.pth'):
        if _iteration(model) not in kept:
            model.unlink(missing_ok=True)


def remove_leftovers(*folders: str | Path) -> None:
    """Remove the temporary files of a run that was killed while it wrote a checkpoint."""
    for folder in folders:
        for path in Path(folder).glob('.*.part.*'):
            path.unlink(missing_ok=True)


def _numbered(folder: str | Path, suffix: str) -> list[Path]:
    """Files of checkpoints, oldest first."""
    files = [path for path in Path(folder).glob(f'*{suffix}') if _NUMBERED.fullmatch(path.name)]
    return sorted(files, key=_iteration)


def _iteration(path: Path) -> int:
    return int(_NUMBERED.fullmatch(path.name)[1])


def random_state() -> dict:
    """State of the generators of Python, numpy and torch (CPU and this process's GPU), of plain numbers and tensors."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        'python': random.getstate(),
        'numpy': (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, gauss),
        'torch': torch.get_rng_state(),
        'cuda': torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def restore_random_state(state: dict) -> None:
    """Undo what happened since :func:`random_state`."""
    version, internal, gauss_next = state['python']
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, *rest = state['numpy']
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'])
    if state['cuda'] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])
