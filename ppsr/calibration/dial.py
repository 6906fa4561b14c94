"""The dial from exact to fast: a wish, and the setting of a curve that fulfils it."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from ppsr.calibration.curve import Curve, Point, curve_of
from ppsr.errors import UserError
from ppsr.weights import load_model, read_checkpoint, resolve

__all__ = ['EXACT', 'Choice', 'Wish', 'choose', 'load_as_wished']

LARGEST_LOSS = 10  # dB; beyond, nobody would call it a picture of the same network


@dataclass(frozen=True)
class Wish:
    """What the user asks for: one of the three.

    Attributes:
        max_loss: dB that may be lost against the dense network.
        percent: on so many percent of the images of the calibration; None: in their mean.
        saving: percent of the multiply-adds to be saved.
        exact: nothing is exempt.
    """

    max_loss: float | None = None
    percent: float | None = None
    saving: float | None = None
    exact: bool = False

    @classmethod
    def of(cls, max_loss: float | str | None = None, saving: float | None = None, exact: bool = False) -> 'Wish | None':
        """A wish from what the user said; None where that is nothing.

        Args:
            max_loss: dB, or as text 'dB@percent'.

        Raises:
            UserError: more than one wish, or a number out of its range.

        >>> Wish.of('0.05@95')
        Wish(max_loss=0.05, percent=95.0, saving=None, exact=False)
        """
        given = [n for n, v in (('max_loss', max_loss), ('saving', saving), ('exact', exact or None)) if v is not None]
        if len(given) > 1:
            raise UserError(f'{" and ".join(given)} are two wishes; give one of max_loss, saving and exact.')
        if max_loss is not None:
            loss, at, percent = str(max_loss).partition('@')
            return cls(
                max_loss=_number('max_loss', loss, 0, LARGEST_LOSS, max_loss),
                percent=_number('max_loss', percent, 1, 100, max_loss) if at else None,
            )
        if saving is not None:
            return cls(saving=_number('saving', saving, 0, 100, saving))
        return cls(exact=True) if exact else None

    @property
    def name(self) -> str:
        """The option that said it."""
        return 'exact' if self.exact else 'saving' if self.saving is not None else 'max_loss'

    def __str__(self) -> str:
        if self.exact:
            return 'exact'
        if self.saving is not None:
            return f'{self.saving:g} % saved'
        where = 'in the mean' if self.percent is None else f'on {self.percent:g} % of the images'
        return f'at most {self.max_loss:g} dB lost {where}'


EXACT = Wish(exact=True)


def _number(name: str, text, low: float, high: float, given) -> float:
    try:
        value = math.nan if isinstance(text, bool) else float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not low <= value <= high:
        form = ', or dB@percent such as 0.05@95' if name == 'max_loss' else ' percent'
        ends = f'from 0 to {LARGEST_LOSS} dB' if name == 'max_loss' else f'from {low} to {high}'
        raise UserError(f'{name} must be a number {ends}{form}, not {str(given)[:40]!r}.')
    return value


@dataclass(frozen=True)
class Choice:
    """What was asked and what was chosen.

    Attributes:
        wish: what was asked.
        point: the setting chosen, with what it lost and saved in the calibration; None: dense.
        curve: from which; None where none is needed.
    """

    wish: Wish
    point: Point | None
    curve: Curve | None = None

    def __str__(self) -> str:
        asked = f'Asked: {self.wish}. Chosen: '
        if self.point is None:
            why = '' if self.wish.exact else ' (no setting that was measured saves anything and loses so little)'
            return f'{asked}dense, nothing is exempt{why}.'
        estimated = ', estimated' if self.curve.against != 'ground truth' else ''
        percent = self.wish.percent
        among = '' if percent is None else f', at most {self.point.loss_at(percent):.4f} dB on {percent:g} % of them'
        return (
            f'{asked}{self.point}. Mean over {self.curve.images} images ({self.curve.data}): {self.point.loss:.4f} dB '
            f'lost{estimated}{among}; {self.point.saved:.1%} of the multiply-adds saved.'
        )


def choose(wish: Wish, curve: Curve | None = None, where: str = 'the curve') -> Choice:
    """The setting that saves most of those that lose no more than asked, or loses least of those that save enough.

    Args:
        curve: may be left out for an exact wish.
        where: what an error names as the place of the curve.

    Raises:
        UserError: no setting saves so much.
    """
    if wish.exact:
        return Choice(wish, None)
    if wish.saving is not None:
        enough = [point for point in curve.points if 100 * point.saved >= wish.saving]
        if not enough:
            most = max(point.saved for point in curve.points)
            raise UserError(f'{where}: no setting that was measured saves {wish.saving:g} %; the most is {most:.1%}.')
        return Choice(wish, min(enough, key=lambda point: point.loss), curve)
    fitting = [
        point
        for point in curve.points
        if point.saved > 0 and (point.loss if wish.percent is None else point.loss_at(wish.percent)) <= wish.max_loss
    ]
    return Choice(wish, max(fitting, key=lambda point: point.saved, default=None), curve)


def load_as_wished(
    wish: Wish | None,
    path_or_name: str | os.PathLike | None = None,
    *,
    pure_pass: bool = True,
    settings: Mapping | None = None,
    **options,
) -> tuple[nn.Module, Choice | None]:
    """A network as :func:`ppsr.load_model` loads it, with the setting that a wish chooses from the weights' curve.

    Args:
        wish: None: as `pure_pass` and `settings` say.
        path_or_name, pure_pass, settings, **options: of :func:`ppsr.load_model`.

    Returns:
        The network, and what was chosen; None without a wish.

    Raises:
        UserError: no such weights, or they do not fit; `pure_pass` or `settings` choose what is exempt, too; the
            weights have no curve, or no setting in it fulfils the wish.
    """
    choice, settings = None, dict(settings or {})
    if wish is not None:
        given = [name for name in settings if name.startswith('pp_')]  # none was what the curve was measured with
        if given or not pure_pass:
            other = given[0].removeprefix('pp_') if given else 'no Pure-Pass'
            raise UserError(f'{wish.name} chooses what is exempt, and so does {other}; leave one of them out.')
        curve = None if wish.exact else curve_of(read_checkpoint(resolve(path_or_name)))
        choice = choose(wish, curve, str(path_or_name))
        pure_pass = choice.point is not None
        settings |= choice.point.settings if pure_pass else {}
    return load_model(path_or_name, pure_pass=pure_pass, settings=settings, **options), choice
