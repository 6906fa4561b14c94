"""Checkpoints: models and training states written whole or not at all, found again, and pruned.

A checkpoint of iteration n is ``models/net_g_<n>.pth`` and then ``training_states/<n>.state``, in BasicSR's format: the
state is written last, so a state that is there has its weights. Reading executes nothing (``weights_only=True``).
"""

import io
import math
import os
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
    'newest_model',
    'prune',
    'random_state',
    'read_state',
    'remove_leftovers',
    'restore_random_state',
    'write',
]

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
        UserError: missing, unreadable, holding more than numbers, or not a training state in one of its parts.
    """
    if not os.path.isfile(path):
        raise UserError(f'training state {path} does not exist.')
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as e:  # damaged bytes make torch raise nearly anything
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200].rstrip('.')
        raise UserError(f'training state {path} cannot be read: {reason}.') from e
    if wrong := _wrong_in_state(state):
        raise UserError(f'{path} is not a training state: {wrong}.')
    return state


def _wrong_in_state(state) -> str | None:
    """What is not as :meth:`PurePassSRModel.save` or BasicSR writes it, in words; None when all is."""
    if not isinstance(state, dict):
        return f'it holds a {type(state).__name__}'
    for key in ('epoch', 'iter'):
        if not _is_count(state.get(key)):
            return f'{key} is not a whole number of at least 0'
    for key, needs in (('optimizers', ('state', 'param_groups')), ('schedulers', ('last_epoch',))):
        entries = state.get(key)
        if not isinstance(entries, list) or not all(isinstance(e, dict) and set(needs) <= e.keys() for e in entries):
            return f'{key} is not a list of their states'
    for optimizer in state['optimizers']:
        groups, moments = optimizer['param_groups'], optimizer['state']
        fits = isinstance(groups, list) and all(isinstance(g, dict) and _is_list(g.get('params')) for g in groups)
        if not fits or not isinstance(moments, dict) or not all(isinstance(m, dict) for m in moments.values()):
            return 'optimizers are not states of optimizers'
    if not all(_is_count(scheduler['last_epoch']) for scheduler in state['schedulers']):
        return 'last_epoch of a scheduler is not a whole number of at least 0'
    # from here on: what BasicSR's states do not have
    position = state.get('position')
    if position:
        counts = isinstance(position, dict) and all(_is_count(position.get(k)) for k in ('batch', 'global_batch'))
        validated = counts and 'validated_at' in position and position['validated_at']
        if not counts or position['global_batch'] < 1 or not (validated is None or _is_count(validated)):
            return 'position does not say where in its epoch the training was'
    records = state.get('best_metric_results') or {}
    if not isinstance(records, dict) or not all(isinstance(of_set, dict) for of_set in records.values()):
        return 'best_metric_results are not records by data set'
    if not all(_is_record(record) for of_set in records.values() for record in of_set.values()):
        return 'best_metric_results hold what is no record'
    if not _is_count(state.get('nonfinite', 0)):
        return 'nonfinite is not a whole number of at least 0'
    scaler = state.get('scaler') or {}
    if not isinstance(scaler, dict) or not all(_is_number(value) for value in scaler.values()):
        return 'scaler is not the state of a gradient scaler'
    random_states = state.get('random_states') or []
    if not _is_list(random_states) or not all(isinstance(s, dict) for s in random_states):
        return 'random_states are not states of generators'
    return None


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple))


def _is_record(record) -> bool:
    return (
        isinstance(record, dict)
        and record.get('better') in ('higher', 'lower')
        and isinstance(record.get('val'), (int, float))
        and isinstance(record.get('iter'), int)
    )


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


def newest_model(models: str | Path) -> Path | None:
    """The weights of the last checkpoint."""
    files = _numbered(models, '.pth')
    return files[-1] if files else None


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
