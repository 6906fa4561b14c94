"""The curve of a weight file: for each setting of Pure-Pass the quality lost and the multiply-adds saved on pictures.

``ppsr calibrate`` measures it and writes it into the facts of the file. Files are other people's: what is read is held
against the sections below.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Annotated

from ppsr.archs.masked import AS_PUBLISHED, SCOPES
from ppsr.errors import UserError
from ppsr.schema import Choice, Number, Section, Several, Text, check, show
from ppsr.weights import Checkpoint

__all__ = ['AGAINST', 'KEY', 'Curve', 'Point', 'curve_of']

KEY = 'calibration'  # among the facts
MASKS = ('colour', 'gradient', 'variance')  # those that have been measured
AGAINST = ('ground truth', 'dense output')
MOST = 10_000  # images, and settings


class _Settings(Section):
    scope: Annotated[list, Several(Choice(*SCOPES), most=len(SCOPES)), 'attentions that pure pixels are exempt from']
    mask: Annotated[str, Choice(*MASKS), 'which pixels are pure']
    threshold: Annotated[float | None, Number(above=0, most=2), 'of a mask of flatness'] = None
    losses: Annotated[list, Several(Number(-100, 100), most=MOST), 'dB against dense, of each image']
    saved: Annotated[float, Number(-1, 1), 'share of the multiply-adds, mean over the images']

    @classmethod
    def together(cls, values, where):
        if (values['mask'] == 'colour') != (values['threshold'] is None):
            raise UserError(f'{where} has a mask {values["mask"]} with the threshold {values["threshold"]}.')


class _Curve(Section):
    data: Annotated[str, Text(), 'the images, in words']
    against: Annotated[str, Choice(*AGAINST), 'what PSNR was measured against']
    points: list

    @classmethod
    def together(cls, values, where):
        if not values['data'].isprintable():  # goes to a terminal
            raise UserError(f'{where} → data must be printable text, not {show(values["data"])}.')


@dataclass(frozen=True)
class Point:
    """One setting, and what it did on the images of the calibration.

    Attributes:
        scope: attentions that pure pixels are exempt from.
        mask: name of the mask.
        threshold: of a mask that has one.
        losses: PSNR of the dense network minus that of this setting, in dB, for each image.
        saved: share of the dense multiply-adds, mean over the images.
    """

    scope: tuple[str, ...]
    mask: str
    threshold: float | None
    losses: tuple[float, ...] = field(repr=False)  # hundreds of numbers in what `print(upscaler.stats)` shows
    saved: float

    @property
    def loss(self) -> float:
        """Mean over the images, dB."""
        return mean(self.losses)

    def loss_at(self, percent: float) -> float:
        """The loss that at least so many percent of the images do not exceed, dB."""
        allowed = int((1 - percent / 100) * len(self.losses) + 1e-9)  # images that may exceed it
        return sorted(self.losses)[len(self.losses) - 1 - allowed]

    @property
    def settings(self) -> dict:
        """The options of a network that runs so."""
        settings = {'pp_mask': self.mask, 'pp_threshold': self.threshold, 'pp_scope': list(self.scope)}
        if 'window' in self.scope:
            settings['pp_window_compensation'] = 'linear'
        if self.mask != 'colour':  # what the file says of its colour mask is not for this one
            for name in ('num_centers', 'window_size', 'shift', 'fuse'):
                settings[f'pp_{name}'] = getattr(AS_PUBLISHED, name)
        return settings

    def __str__(self) -> str:
        below = '' if self.threshold is None else f' below {self.threshold:g}'
        return f'mask {self.mask}{below}, {" and ".join(self.scope)} attention exempt'


@dataclass(frozen=True)
class Curve:
    """All settings that were measured.

    Attributes:
        data: the images, in words.
        against: one of `AGAINST`: what PSNR was measured against. Without ground truth losses are estimated.
        points: each on the same images.
    """

    data: str
    against: str
    points: tuple[Point, ...] = field(repr=False)

    @property
    def images(self) -> int:
        return len(self.points[0].losses)

    def as_fact(self) -> dict:
        """For the facts of a weight file."""
        return asdict(self)

    @classmethod
    def from_fact(cls, fact, where: str) -> 'Curve':
        """Read what :meth:`as_fact` wrote.

        Raises:
            UserError: it is not that.
        """
        found = check(_Curve, fact, where)
        if not isinstance(found['points'], list) or not 0 < len(found['points']) <= MOST:
            raise UserError(f'{where} → points must be a list of measured settings.')
        read = [check(_Settings, point, f'{where} → points → {i}') for i, point in enumerate(found['points'])]
        if len({len(point['losses']) for point in read}) > 1:
            raise UserError(f'{where}: its points are not all of the same images.')
        points = (Point(**p | {'scope': tuple(p['scope']), 'losses': tuple(p['losses'])}) for p in read)
        return cls(found['data'], found['against'], tuple(points))


def curve_of(checkpoint: Checkpoint) -> Curve:
    """The curve of a weight file.

    Raises:
        UserError: it has none, or one that is damaged.
    """
    fact = checkpoint.facts.get(KEY) if isinstance(checkpoint.facts, Mapping) else None
    if fact is None:
        raise UserError(
            f'{checkpoint.path}: has no curve to choose a setting from; measure one with ppsr calibrate, or name the '
            'setting with --mask, --threshold and --scope.'
        )
    return Curve.from_fact(fact, f'{checkpoint.path}: its {KEY}')
