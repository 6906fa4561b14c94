"""What the settings of our networks may be: types and ranges, the same for options files, weight files and Python.

Weight files are other people's: their configuration is held against this before anything is built, so that a number in
a file cannot ask for all memory there is. What goes together with what, the constructors say.
"""

from collections.abc import Mapping

from ppsr.archs.masked import SCOPES
from ppsr.archs.window_compensation import WINDOW_COMPENSATIONS
from ppsr.errors import UserError
from ppsr.masks import list_masks, settings_of
from ppsr.schema import Choice, Kind, Number, Several, Truth, Whole, show

__all__ = ['MASK_SETTINGS', 'SETTINGS', 'check_settings']

DIMENSION = Whole(1, 1024)


class MaskName(Kind):
    """A registered mask; or a mapping with its type and settings that it takes, within the ranges of MASK_SETTINGS."""

    words = 'the name of a registered mask, or a mapping with its type and settings'

    def read(self, value, where):
        own = dict(value) if isinstance(value, Mapping) else {'type': value}
        name = own.get('type')
        if name not in list_masks():
            raise ValueError(f'registered are {", ".join(list_masks())}')
        takes = settings_of(name)
        for key, setting in own.items():
            if key != 'type' and takes is not None and key not in takes:
                raise ValueError(f'the mask {name!r} takes no {show(key)}; it takes {", ".join(takes) or "nothing"}')
            kind, optional = MASK_SETTINGS.get(key, (None, False))
            if kind is not None and not (optional and setting is None):
                own[key] = kind(setting, f'{where} → {key}')
        return own if isinstance(value, Mapping) else value


# by name of the constructor's argument; a kind and whether ~ is a value, too
SETTINGS: dict[str, tuple[Kind, bool]] = {
    'upscale': (Whole(1, 16), False),
    'in_chans': (Choice(3), False),
    'img_size': (Whole(1, 65536), False),
    'embed_dim': (DIMENSION, False),
    'depths': (Several(Whole(1, 64), most=64), False),
    'num_heads': (Several(Whole(1, 1024), most=64), False),
    'window_size': (Whole(1, 64), False),
    'category_size': (Whole(1, 65536), False),
    'num_tokens': (Whole(1, 4096), False),
    'reducted_dim': (DIMENSION, False),
    'dim_ffn_td': (DIMENSION, False),
    'convffn_kernel_size': (Whole(1, 31), False),
    'img_range': (Number(1, 1), False),
    'mlp_ratio': (Number(above=0, most=16), False),
    'drop_path_rate': (Number(0, below=1), False),
    'upsampler': (Choice('pixelshuffledirect'), False),
    'resi_connection': (Choice('1conv'), False),
    'use_checkpoint': (Truth(), False),
    'pp_num_centers': (Whole(1, 4096), False),
    'pp_window_size': (Whole(1, 1024), False),
    'pp_shift': (Whole(0, 1024), True),
    'pp_fuse': (Truth(), False),
    'pp_threshold': (Number(above=0, most=2), True),
    'pp_compensation': (Choice('value', 'bypass', 'zero'), False),
    'pp_mask': (MaskName(), False),
    'pp_scope': (Several(Choice(*SCOPES), most=len(SCOPES)), False),
    'pp_window_compensation': (Choice(*WINDOW_COMPENSATIONS), False),
    'camixer_ratio': (Number(0, 1), False),
}

# the same for the mapping that pp_mask may be; masks of other packages have settings of their own
MASK_SETTINGS: dict[str, tuple[Kind, bool]] = {
    **{name: SETTINGS[f'pp_{name}'] for name in ('num_centers', 'window_size', 'shift', 'fuse', 'threshold')},
    'iterations': (Whole(0, 100), False),
}


def check_settings(network: Mapping, where: str = 'network_g') -> dict:
    """The settings of a network of ours, checked.

    Args:
        network: `type` and constructor arguments, whose names have been checked.
        where: what a message names as the place of the mistake.

    Raises:
        UserError: a value of another type or out of its range.
    """
    checked = {}
    for key, value in network.items():
        kind, optional = SETTINGS.get(key, (None, False))
        if kind is not None and not (optional and value is None):
            value = kind(value, f'{where} → {key}')
        checked[key] = value
    depths, heads = checked.get('depths'), checked.get('num_heads')
    if depths and heads and len(depths) != len(heads):
        raise UserError(f'{where} → num_heads must have a number for each of depths {show(depths)}, not {show(heads)}.')
    return checked
