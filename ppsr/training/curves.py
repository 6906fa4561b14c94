"""Curves of trainings from their logs: validation and losses over the iterations.

    python -m ppsr.training.curves experiments/pp_atd_light_x4_cpu -o curves.png

takes experiment folders or log files. Logs of one folder are those of one training that was interrupted and went on.
"""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import style as styles
from matplotlib.figure import Figure

from ppsr.atomic import atomic_path
from ppsr.errors import UserError
from ppsr.images import is_special
from ppsr.paper.plots import COLOURS, STYLE

__all__ = ['Curves', 'draw', 'read_log', 'read_training']

FORMATS = ('.png', '.pdf', '.svg')
SMOOTHED = 20  # losses are logged of single batches: their running mean is over this part of them
LEAST_RANGE = 0.01  # of the axis of a metric, as a part of its value
_ITERATION = re.compile(r'\[epoch:\s*\d+, iter:\s*([\d,]+), .*\] (.*)$')
_LOSS = re.compile(r'\b(l_\w+): (\S+)')
_VALIDATION = re.compile(r'INFO: Validation (\S+)$')
_METRIC = re.compile(r'^\t # (\w+): (\S+)')
_OPTION = re.compile(r'^\s+(val_freq|total_iter): (\d+)$')


@dataclass
class Curves:
    """What a log tells.

    Attributes:
        losses: {name: {iteration: value}}, names as in the log (l_pix, …).
        metrics: {(metric, data set): {iteration: value}}.
    """

    losses: dict[str, dict[int, float]] = field(default_factory=dict)
    metrics: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)

    def go_on(self, later: 'Curves') -> None:
        """Add what the log of the resumed training tells; what it tells anew counts."""
        for mine, theirs in ((self.losses, later.losses), (self.metrics, later.metrics)):
            for name, points in theirs.items():
                mine.setdefault(name, {}).update(points)


def read_log(path: str | Path) -> Curves:
    """A log of ``ppsr train`` (BasicSR's format).

    A validation is logged without its iteration: it is the first multiple of val_freq, which the log begins with, that
    is not before the last iteration logged.

    Raises:
        UserError: it cannot be read.
    """
    curves, options, iteration, data_set = Curves(), {}, 0, None
    if is_special(path):
        raise UserError(f'{path} is no regular file; give the log of a training.')
    try:
        lines = Path(path).read_text(encoding='utf-8', errors='replace').splitlines()
    except OSError as e:
        raise UserError(f'{path}: the log cannot be read ({e.strerror or e}).') from e
    for line in lines:
        if found := _ITERATION.search(line):
            iteration = int(found[1].replace(',', ''))
            for name, value in _LOSS.findall(found[2]):
                curves.losses.setdefault(name, {})[iteration] = float(value)
        elif found := _VALIDATION.search(line):
            data_set = found[1]
        elif found := _METRIC.match(line):
            frequency, end = options.get('val_freq', 1), options.get('total_iter', iteration)
            at = min(-(-iteration // frequency) * frequency, end)
            curves.metrics.setdefault((found[1], data_set), {})[at] = float(found[2])
        elif found := _OPTION.match(line):
            options[found[1]] = int(found[2])
    return curves


def read_training(path: str | Path) -> Curves:
    """All logs of an experiment folder in their order, or one log.

    Raises:
        UserError: there is none, or it tells of no iteration.
    """
    path = Path(path)
    logs = sorted(path.glob('train_*.log'), key=lambda log: log.stem[-15:]) if path.is_dir() else [path]
    curves = Curves()
    for log in logs:
        curves.go_on(read_log(log))
    if not curves.losses:
        raise UserError(f'{path}: {"no log here tells" if path.is_dir() else "the log does not tell"} of an iteration.')
    return curves


def draw(trainings: dict[str, Curves], metrics: Sequence[str] = ('psnr',)) -> Figure:
    """A panel for each metric of each validation set, then one for each loss; a colour for each training."""
    shown = [key for curves in trainings.values() for key in curves.metrics if key[0] in metrics]
    losses = [name for curves in trainings.values() for name in curves.losses]
    panels = [*dict.fromkeys(shown), *dict.fromkeys(losses)]
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    with styles.context(['default', STYLE]):
        figure = Figure((3.1 * columns, 2.5 * rows), layout='constrained')
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, panel in zip(axes, panels):
            is_loss = isinstance(panel, str)
            for (name, curves), colour in zip(trainings.items(), COLOURS * len(trainings)):
                points = (curves.losses if is_loss else curves.metrics).get(panel)
                if not points:
                    continue
                x, y = map(np.array, zip(*sorted(points.items())))
                if is_loss:
                    axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.6)
                    axis.plot(x, _running_mean(y), color=colour, linewidth=1.4, label=name)
                else:
                    axis.plot(x, y, color=colour, marker='o', markersize=3, linewidth=1.4, label=name)
            if is_loss:
                axis.set_yscale('log')
            else:
                axis.ticklabel_format(axis='y', useOffset=False)
                low, high = axis.get_ylim()
                if high - low < LEAST_RANGE * abs(low + high) / 2:  # noise is not to look like a slope
                    middle, half = (low + high) / 2, LEAST_RANGE * abs(low + high) / 4
                    axis.set_ylim(middle - half, middle + half)
            axis.set(title=panel if is_loss else f'{panel[1]} {panel[0]}', xlabel='iteration')
        for axis in axes[len(panels) :]:
            axis.remove()
        if len(trainings) > 1:
            handles = {label: h for axis in figure.axes for h, label in zip(*axis.get_legend_handles_labels())}
            figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=len(handles))
    return figure


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Over a SMOOTHED-th of them around each, fewer at the ends."""
    half = len(values) // SMOOTHED // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.maximum(np.arange(len(values)) - half, 0)
    last = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (sums[last] - sums[first]) / (last - first)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('trainings', nargs='+', metavar='TRAINING', help='an experiment folder or a log')
    parser.add_argument('-o', '--output', type=Path, required=True, help=f'the plot: {", ".join(FORMATS)}')
    parser.add_argument('--metrics', nargs='+', default=['psnr'], help='of the validations (default: psnr)')
    args = parser.parse_args()
    try:
        if args.output.suffix not in FORMATS:
            raise UserError(f'{args.output}: a plot is written as {", ".join(FORMATS)}.')
        trainings = {_title(path): read_training(path) for path in args.trainings}
        figure = draw(trainings, args.metrics)
        try:
            with atomic_path(args.output) as temporary:
                metadata = {'.png': {'Software': None}, '.pdf': {'CreationDate': None}, '.svg': {'Date': None}}
                figure.savefig(temporary, dpi=150, metadata=metadata[args.output.suffix])
        except OSError as e:
            raise UserError(f'{args.output}: cannot be written ({e.strerror or e}).') from e
    except UserError as e:
        parser.error(str(e))


def _title(path: str) -> str:
    return Path(path).resolve().stem if Path(path).is_file() else Path(path).resolve().name


if __name__ == '__main__':
    main()
