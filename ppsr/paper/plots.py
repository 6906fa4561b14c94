"""Plots as a paper has them: PNG to look at, PDF to print; colours that colour-blind readers tell apart (Okabe–Ito),
and never colour alone."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib import style as styles
from matplotlib.figure import Figure  # not pyplot: it would choose a backend for the whole process
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator
from torch import nn

from ppsr.atomic import atomic_path
from ppsr.paper import complexity, scopes
from ppsr.paper.purity import Share

__all__ = ['COLOURS', 'STYLE', 'heat_map', 'quality_against_cost', 'save', 'saving_against_share', 'share_by_data_set']

COLOURS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000', '#888888')
MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X', 'h')
STYLE = {
    'font.size': 9,
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.grid': True,
    'grid.color': '#DDDDDD',
    'axes.axisbelow': True,
    'legend.frameon': False,
    'pdf.fonttype': 42,
}
FRAMED = {'axes.grid': False, 'axes.spines.top': True, 'axes.spines.right': True}


def save(figure: Figure, path: Path) -> None:
    """Write a figure as .png and .pdf ; the same figure gives the same bytes."""
    for suffix, metadata in (('.png', {'Software': None}), ('.pdf', {'CreationDate': None})):
        with atomic_path(path.with_name(path.name + suffix)) as temporary:
            figure.savefig(temporary, dpi=200, metadata=metadata)


def quality_against_cost(path: Path, scale: int, families: dict[str, list[str]], varied: dict, records: dict) -> None:
    """PSNR against GMACs, one panel per data set: families of the variants in `varied`, and the rivals in `records`."""
    names = list(dict.fromkeys(name for _, name in varied))
    rivals = [label for label, name in records if name == names[0] and label not in ('ATD-light', 'PP-ATD-light')]
    with styles.context(['default', STYLE]):
        figure = Figure((3.2 * len(names), 3.4), layout='constrained')
        axes = figure.subplots(1, len(names), squeeze=False)
        for axis, name in zip(axes[0], names):
            groups = {
                family: [varied[label, name] for label in labels if (label, name) in varied]
                for family, labels in families.items()
            }
            groups |= {label: [records[label, name]] for label in rivals if 'macs' in records[label, name][0]}
            for i, (family, members) in enumerate(groups.items()):
                points = [
                    (mean(r['macs'] for r in found) / 1e9, mean(r['psnr'] for r in found))
                    for found in members
                    if 'psnr' in found[0]
                ]
                if points:
                    style = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], s=34, zorder=3)
                    axis.scatter(*zip(*points), label=family, edgecolors='white', linewidths=0.5, **style)
            axis.set(title=name, xlabel='GMACs per image (mean)')
            axis.margins(0.12)
            axis.ticklabel_format(useOffset=False)
        axes[0][0].set_ylabel(f'PSNR on Y, ×{scale} (dB)')
        handles, labels = axes[0][0].get_legend_handles_labels()  # the first data set has every variant
        figure.legend(
            handles, labels, loc='outside lower center', ncols=min(len(labels), 2 * len(names)), handletextpad=0.2
        )
        save(figure, path)


def saving_against_share(path: Path, scale: int, net: nn.Module, records: dict[str, list[dict]]) -> None:
    """Share of the multiply-adds saved against the share of pure pixels, one point per image, and the bound."""
    with styles.context(['default', STYLE]):
        figure = Figure((5.0, 3.6), layout='constrained')
        axis = figure.subplots()
        for i, (name, found) in enumerate(records.items()):
            points = [(100 * r['exempt'], 100 * (1 - r['macs'] / r['dense'])) for r in found]
            style = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], s=18, alpha=0.8, zorder=3)
            axis.scatter(*zip(*points), label=name, linewidths=0, **style)
        # multiply-adds per pixel do not depend on the size once an image has more than category_size pixels
        bound = 100 * complexity.largest_saving(net, *complexity.static_size(scale))
        axis.plot([0, 100], [0, bound], color='#000000', linewidth=1, label='bound: share × AC-MSA attention')
        axis.axhline(bound, color='#666666', linewidth=1, linestyle='--', label=f'every pixel pure: {bound:.1f} %')
        axis.set(xlim=(0, 100), ylim=(0, bound * 1.15), xlabel='pure tokens of an image, its padding included (%)')
        axis.set_ylabel(f'multiply-adds saved, ×{scale} (%)')
        axis.legend(loc='lower right', fontsize=8)
        save(figure, path)


def share_by_data_set(path: Path, scale: int, records: dict[str, list[dict]]) -> None:
    """Share of pure pixels by data set: every image, the quartiles, the mean."""
    with styles.context(['default', STYLE]):
        figure = Figure((1.5 + 1.1 * len(records), 3.4), layout='constrained')
        axis = figure.subplots()
        values = [[100 * r['pure'] for r in found] for found in records.values()]
        axis.boxplot(
            values,
            widths=0.5,
            showfliers=False,
            showmeans=True,
            medianprops=dict(color=COLOURS[1], linewidth=1.5),
            meanprops=dict(marker='D', markerfacecolor=COLOURS[0], markeredgecolor='white', markersize=7),
        )
        spread = np.random.default_rng(0)
        for place, shares in enumerate(values, 1):
            x = place + spread.uniform(-0.17, 0.17, len(shares))
            axis.scatter(x, shares, s=7, color='#888888', linewidths=0, zorder=2)
        means = [mean(shares) for shares in values]
        labels = [f'{name}\nmean {m:.1f} %' for name, m in zip(records, means)]
        axis.set_xticks(range(1, len(labels) + 1), labels)
        axis.set(ylim=(0, 100), ylabel=f'pure pixels of an image, ×{scale} (%)')
        axis.grid(axis='x', visible=False)
        save(figure, path)


def heat_map(
    path: Path,
    scale: int,
    centers: Sequence[int],
    windows: Sequence[int],
    images: dict[str, list[dict[tuple[int, int], Share]]],
) -> None:
    """Share of pure pixels for each K and w, one panel per data set; the default is framed."""
    with styles.context(['default', STYLE, FRAMED]):
        figure = Figure((3.4 * len(images) + 0.6, 3.2), layout='constrained')
        axes = figure.subplots(1, len(images), squeeze=False)
        for axis, (name, found) in zip(axes[0], images.items()):
            values = np.array([[100 * mean(i[k, w].fused for i in found) for w in windows] for k in centers])
            picture = axis.imshow(values, cmap='viridis', vmin=0, vmax=100, aspect='auto')
            for (row, column), value in np.ndenumerate(values):
                colour = 'black' if value > 55 else 'white'
                axis.text(column, row, f'{value:.0f}', ha='center', va='center', color=colour, fontsize=7.5)
            if 8 in centers and 5 in windows:
                corner = (windows.index(5) - 0.5, centers.index(8) - 0.5)
                axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=COLOURS[1], linewidth=2))
            axis.set_xticks(range(len(windows)), windows)
            axis.set_yticks(range(len(centers)), centers)
            axis.set(title=name, xlabel='window w (LR pixels)')
        axes[0][0].set_ylabel('colour centres K')
        figure.colorbar(picture, ax=axes[0].tolist(), label=f'pure pixels, ×{scale} (%)', shrink=0.9)
        save(figure, path)


def masks_and_scopes(path: Path, scale: int, found: dict[str, dict[str, dict[str, list[dict]]]]) -> None:
    """PSNR against dense over what is saved of the multiply-adds and of the seconds, with standard errors over the
    images: a row of panels for each weights and measure, a column for each data set; :mod:`ppsr.paper.scopes` says
    what is in `found`. Filled: window attention exempt, too; open: category attention alone."""
    names = list(dict.fromkeys(name for sets in found.values() for name in sets))
    families = list(dict.fromkeys(family for family, _ in scopes.MASKS.values()))
    panels = [(label, what) for label in found for what in ('macs', 'seconds')]
    with styles.context(['default', STYLE]):
        figure = Figure((max(6.6, 3.2 * len(names) + 0.4), 2.6 * len(panels) + 0.8), layout='constrained')
        axes = figure.subplots(len(panels), len(names), squeeze=False, sharey=True)
        for row, (label, what) in zip(axes, panels):
            for axis, name in zip(row, names):
                settings = found[label][name]
                dense, drawn = settings[scopes.DENSE], {}
                for setting, records in settings.items():
                    scope, _, mask = setting.partition(': ')
                    if mask:
                        point = scopes.percent_less(records, dense, what), *scopes.from_dense(records, dense)
                        drawn.setdefault((scopes.MASKS[mask][0], scope), []).append(point)
                for (family, scope), points in drawn.items():
                    i, is_wide = families.index(family), 'window' in scope
                    saved, change, errors = zip(*points)
                    axis.errorbar(
                        saved,
                        change,
                        [error or 0 for error in errors],
                        color=COLOURS[i % len(COLOURS)],
                        marker=MARKERS[i % len(MARKERS)],
                        markerfacecolor=COLOURS[i % len(COLOURS)] if is_wide else 'white',
                        markersize=5,
                        linewidth=1,
                        elinewidth=0.8,
                        label=family if is_wide else None,
                    )
                axis.axhline(0, color='#666666', linewidth=0.8)
                axis.set_yscale('symlog', linthresh=20)  # a random mask loses fifty times as much as a good one
                axis.yaxis.set_major_locator(FixedLocator((-1000, -300, -100, -50, -20, -10, 0, 10, 20)))
                axis.yaxis.set_major_formatter('{x:+.0f}')
                axis.set(title=f'{name}, {label}', xlabel=f'{"multiply-adds" if what == "macs" else "time"} saved (%)')
                axis.title.set_fontsize(8)
            row[0].set_ylabel(f'PSNR from dense, ×{scale} (mdB)')
        handles, labels = axes[0][0].get_legend_handles_labels()
        title = 'filled: window and category attention exempt; open: category attention alone'
        figure.legend(handles, labels, loc='outside lower center', ncols=3, title=title, title_fontsize=8)
        save(figure, path)
