"""What a training state holds against what the options ask: moments are taken over, settings are the options'.

torch's optimizers and schedulers bring their settings along in their state: loaded as it is, a state silently overrides
the options with the learning rate, milestones and so on that it was saved with. Here the options count, and whatever
differs is said.
"""

import warnings
from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ppsr.errors import UserError

__all__ = ['check_type', 'load_optimizer', 'other_settings', 'replay', 'saved_groups']

# not settings: what changes on the way, and how torch's versions and devices compute the same step
_PROGRESS = {'params', 'lr', 'last_epoch', 'verbose', 'base_lrs', 'cumulative_period'}
_IMPLEMENTATION = {'foreach', 'fused', 'capturable', 'differentiable', 'maximize', 'decoupled_weight_decay'}
_AS_LARGE_AS_THE_PARAMETER = {
    'exp_avg',
    'exp_avg_sq',
    'max_exp_avg_sq',
    'momentum_buffer',
    'square_avg',
    'grad_avg',
}
_NAMES = {'initial_lr': 'lr'}  # as the options call them


def other_settings(saved: Mapping, current: Mapping, where: str) -> list[str]:
    """Settings in which a saved optimizer group or scheduler differs from the current one, in words.

    What only one of them has is a matter of torch's version and is no difference.
    """
    return [
        f'{where} → {_NAMES.get(key, key)} {_plain(current[key])} (the state was saved with {_plain(saved[key])})'
        for key in current
        if key not in _PROGRESS and not key.startswith('_') and key in saved
        if _plain(saved[key]) != _plain(current[key])
    ]


def _plain(value):
    if isinstance(value, Counter):
        return sorted(value.elements())
    return list(value) if isinstance(value, (list, tuple)) else value


def check_type(saved: Mapping, current: Mapping, saved_type: str | None, current_type: str, path) -> None:
    """Refuse the moments of another optimizer.

    Args:
        saved, current: their state dictionaries.
        saved_type: class name; None where the state does not say (BasicSR's own), the settings then tell.

    Raises:
        UserError: what the state holds and what the options ask.
    """
    if saved_type is None:
        keys = [set().union(*(group.keys() for group in state['param_groups'])) for state in (saved, current)]
        decoupled = [
            group.get('decoupled_weight_decay') for state in (saved, current) for group in state['param_groups']
        ]
        mixed = len({value for value in decoupled if value is not None}) > 1
        if not mixed and not (keys[0] ^ keys[1]) - _IMPLEMENTATION - _PROGRESS - {'initial_lr'}:
            return
        found = 'another optimizer'
    elif saved_type == current_type:
        return
    else:
        found = saved_type
    raise UserError(
        f'training state {path} holds the moments of {found}, but train → optim_g → type asks for {current_type}: '
        'resume with the optimizer that it was saved with, or start anew from its weights (path → pretrain_network_g).'
    )


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping, keep_settings: bool) -> None:
    """Load the moments of a saved state.

    Args:
        keep_settings: the optimizer keeps the settings and learning rates that it has now; else those of the state are
            taken over with the moments.

    Raises:
        ValueError: the state is that of other parameters.
    """
    groups = [{key: value for key, value in group.items() if key != 'params'} for group in _groups_of(optimizer)]
    _check_moments(optimizer, saved)
    optimizer.load_state_dict(saved)
    for group, settings in zip(_groups_of(optimizer), groups):
        for key, value in settings.items():
            if keep_settings or key not in group:  # a state of another version of torch lacks some
                group[key] = value


def saved_groups(state: Mapping) -> list[dict]:
    """The groups in the state of an optimizer, and in those of the parts that it is made of (Muon with AdamW)."""
    parts = state.get('parts')
    parts = parts.values() if isinstance(parts, Mapping) else ()
    return [*state['param_groups'], *(group for part in parts for group in part['param_groups'])]


def _groups_of(optimizer: torch.optim.Optimizer) -> list[dict]:
    parts = getattr(optimizer, 'parts', {})
    return [*optimizer.param_groups, *(group for part in parts.values() for group in part.param_groups)]


def _check_moments(optimizer: torch.optim.Optimizer, saved: Mapping) -> None:
    if [len(g['params']) for g in saved['param_groups']] != [len(g['params']) for g in optimizer.param_groups]:
        raise ValueError('it holds another number of parameters')
    parameters = [p for group in optimizer.param_groups for p in group['params']]
    numbers = [number for group in saved['param_groups'] for number in group['params']]
    for number, parameter in zip(numbers, parameters):
        for name, value in saved['state'].get(number, {}).items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                continue
            one = isinstance(value, (int, float)) or (isinstance(value, Tensor) and value.numel() == 1)
            none = value is None and name == 'momentum_buffer'  # SGD's before its first step with momentum
            if not none and (name in _AS_LARGE_AS_THE_PARAMETER or not one):
                raise ValueError(f'{name} of parameter {number} does not fit')


def replay(update_learning_rate: Callable[[int], None], iterations: int) -> None:
    """Bring fresh schedulers to where they are after so many iterations."""
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', message='Detected call of `lr_scheduler.step')
        for iteration in range(1, iterations + 1):
            update_learning_rate(iteration)
