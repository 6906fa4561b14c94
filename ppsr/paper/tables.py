"""The paper's tables from what is at hand: rivals, ablations and controls, measured; published figures beside them.

Never an invented figure: a cell says 'no weights', 'no data' or 'not available' where there is none.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

import torch
from tqdm import tqdm

from ppsr.archs import (
    ATDLight,
    ATDLightV2,
    CAMixerATDLight,
    PPATDLight,
    PPATDLightV2,
    PPSwinIRLight,
    SwinIRLight,
)
from ppsr.archs.build import build_masked, dense_variant
from ppsr.atomic import atomic_path
from ppsr.data.benchmark import BENCHMARKS, find_images, read_lq
from ppsr.data.layout import Source
from ppsr.errors import UserError
from ppsr.generated import section_names, write_section
from ppsr.locks import Lock
from ppsr.paper import complexity, plots, published, scopes
from ppsr.paper.measure import Cache, Method, file_hash, measure
from ppsr.paper.purity import Share, shares
from ppsr.paper.report import Table
from ppsr.training.options import read_network
from ppsr.version import __version__
from ppsr.weights import load_into, read_checkpoint, resolve

__all__ = [
    'ablation_methods',
    'benchmark_table',
    'control_methods',
    'cost_table',
    'make',
    'methods_of',
    'variant_table',
]

NOT_AVAILABLE, NO_WEIGHTS, NO_DATA = 'not available', 'no weights', 'no data'
BICUBIC, DENSE, PURE_PASS = 'bicubic', ATDLight.title, PPATDLight.title
RIVALS = {
    cls.title: cls.__name__
    for cls in (ATDLight, CAMixerATDLight, PPATDLight, ATDLightV2, PPATDLightV2, SwinIRLight, PPSwinIRLight)
}
# K and w of the heat map
GRID_CENTERS, GRID_WINDOWS = (2, 4, 6, 8, 12, 16, 32), (2, 3, 4, 5, 6, 8, 12, 16)
# ablations: what is changed of the default, one thing at a time
CHANGES = {
    'fusion off': {'pp_fuse': False},
    'K = 4': {'pp_num_centers': 4},
    'K = 16': {'pp_num_centers': 16},
    'K = 32': {'pp_num_centers': 32},
    'w = 3': {'pp_window_size': 3},
    'w = 4': {'pp_window_size': 4},
    'w = 8': {'pp_window_size': 8},
    'shift 1': {'pp_shift': 1},
    'dynamic centres': {'pp_mask': 'dynamic'},
    'gradient, g < 0.03': {'pp_mask': 'gradient', 'pp_threshold': 0.03},
    'gradient, g < 0.05': {'pp_mask': 'gradient', 'pp_threshold': 0.05},
    'gradient, g < 0.07': {'pp_mask': 'gradient', 'pp_threshold': 0.07},
    'variance, σ < 0.05': {'pp_mask': 'variance', 'pp_threshold': 0.05},
    'variance, σ < 0.07': {'pp_mask': 'variance', 'pp_threshold': 0.07},
    'variance, σ < 0.10': {'pp_mask': 'variance', 'pp_threshold': 0.1},
    'colour and σ < 0.07': {'pp_mask': 'both', 'pp_threshold': 0.07},
    'bypass': {'pp_compensation': 'bypass'},
    'zero': {'pp_compensation': 'zero'},
}
CONTROLS = {'lowest gradient': 'gradient', 'lowest variance': 'variance', 'random': 'random'}

OWN_SECTION = re.compile(r'(benchmarks|controls|ablations|scopes|purity)_x\d+')  # of the README

Records = dict[tuple[str, str], list[dict]]


def methods_of(scale: int, weights: Sequence[str | Path], options: Sequence[Path] = ()) -> list[Method]:
    """The methods of a scale: bicubic, the rivals as published, and the networks of further options files.

    Args:
        weights: weight files. 'LABEL=FILE' is for the network of that label alone; of the others a network gets the
            first that says it was made for its type, or else the first that fits.

    Raises:
        UserError: an options file or a weight file that cannot be used.
    """
    networks = {label: {'type': kind, 'upscale': scale} for label, kind in RIVALS.items()}
    for path in options:
        name, network = read_network(path)
        label = name or Path(path).stem
        if label in networks or label == BICUBIC:
            raise UserError(f'options file {path}: the name {label!r} is taken by another row of the tables.')
        if network.get('upscale', 4) == scale:
            networks[label] = network
    own: dict[str, list[Path]] = {}
    for entry in weights:
        label, _, path = str(entry).partition('=')
        own.setdefault(label if label in networks else '', []).append(Path(path if label in networks else entry))
    methods = [Method(BICUBIC, scale)]
    for label, network in networks.items():
        found = (_first_fitting(network, own.get(key, [])) for key in (label, ''))
        methods.append(Method(label, scale, network, next(filter(None, found), None)))
    return methods


def _first_fitting(network: dict, weights: Sequence[Path]) -> Path | None:
    net = build_masked(network)
    fitting, of_its_type = [], []
    for path in weights:
        checkpoint = read_checkpoint(resolve(path))
        try:
            load_into(net, checkpoint)
        except UserError:
            continue  # of another arch or scale: somebody else's row
        fitting.append(checkpoint.path)
        if (checkpoint.config or {}).get('type') == network['type']:
            of_its_type.append(checkpoint.path)
    return next(iter(of_its_type + fitting), None)


def ablation_methods(base: Method) -> list[Method]:
    """The dense network, the default and each change, all on the weights of `base` (PP-ATD-light)."""
    changed = [replace(base, label=label, network=base.network | change) for label, change in CHANGES.items()]
    return [*control_methods(base)[:2], *changed]


def control_methods(base: Method) -> list[Method]:
    """The dense network, the default, and each control, all on the weights of `base` (PP-ATD-light)."""
    controls = [replace(base, label=label, control=control) for label, control in CONTROLS.items()]
    return [
        replace(base, label='dense', network=dense_variant(base.network)),
        replace(base, label='default'),
        *controls,
    ]


def _families() -> dict[str, list[str]]:
    """Variants that share a colour in a plot."""
    settings = [label for label, change in CHANGES.items() if 'pp_compensation' not in change]
    compensations = [label for label in CHANGES if label not in settings]
    families = {'dense': ['dense'], 'default': ['default'], 'K, w, shift, fusion': settings}
    return families | {'compensation': compensations} | {label: [label] for label in CONTROLS}


def _mean(records: list[dict], what: str) -> float | None:
    return mean(record[what] for record in records) if records and what in records[0] else None


def _percent_less(records: list[dict]) -> float | None:
    """Mean saving of a data set in percent of its dense multiply-adds."""
    return 100 * (1 - _mean(records, 'macs') / _mean(records, 'dense')) if 'macs' in records[0] else None


def cost_table(methods: Sequence[Method]) -> Table:
    """Parameters and GMACs at 1280×720 of the networks among the methods, the published ones beside them."""
    rows = []
    for method in methods:
        if method.network is None:
            continue
        net = method.build()
        size = complexity.static_size(method.scale)
        ends = [sum(complexity.uniform_macs(net, *size, pure).values()) / 1e9 for pure in (False, True)]
        bound = complexity.largest_saving(net, *size)
        parameters, gmacs = published.cost(method.label, method.scale)
        rows.append(
            [f'×{method.scale}', method.label, complexity.count_parameters(net), *ends, 100 * bound if bound else None]
            + [parameters or NOT_AVAILABLE, gmacs or NOT_AVAILABLE]
        )
    for scale in sorted({method.scale for method in methods}):
        for other in published.others(scale):
            rows.append([f'×{scale}', other, *['not built here'] * 3, None, *published.cost(other, scale)])
    return Table(
        ['scale', 'method', 'parameters', 'GMACs', 'GMACs, all pure', 'bound (%)']
        + ['parameters, published', 'GMACs, published'],
        rows,
        ['', '', ',', '.2f', '.2f', '.2f', ',', '.1f'],
        'Parameters and multiply-adds for a 1280×720 output',
    )


def benchmark_table(scale: int, methods: Sequence[Method], records: Records) -> Table:
    """One row per data set and method: cost and quality, measured and published."""
    rows = []
    networks = {method.label: method.build() for method in methods if method.network is not None}
    parameters = {label: complexity.count_parameters(net) for label, net in networks.items()}
    masked = [label for label, net in networks.items() if net.pure_pass is not None]
    for name in [*BENCHMARKS, *(sorted({name for _, name in records} - {*BENCHMARKS}))]:
        of_dense = _mean(records.get((DENSE, name), []), 'macs')
        for method in methods:
            found = records.get((method.label, name), [])
            gmacs = _mean(found, 'macs')
            missing = NO_WEIGHTS if found else NO_DATA
            against = 100 * (gmacs / of_dense - 1) if gmacs and of_dense else None
            pure = _mean(found, 'pure') if method.label in masked else None
            row = [name, method.label, parameters.get(method.label)]
            row += [gmacs / 1e9 if gmacs else NO_DATA if method.network else None, against]
            row += [100 * pure if pure is not None else None]
            row += [_mean(found, 'psnr') or missing, _mean(found, 'ssim') or missing]
            rows.append(row + _published(method.label, scale, name))
        for other in published.others(scale):
            rows.append([name, other, *[None] * 4, *['not measured'] * 2, *_published(other, scale, name)])
    return Table(
        ['data set', 'method', 'parameters', 'GMACs', 'against ATD-light (%)', 'pure (%)', 'PSNR (dB)', 'SSIM']
        + ['PSNR, published', 'SSIM, published'],
        rows,
        ['', '', ',', '.2f', '+.2f', '.2f', '.3f', '.4f', '.2f', '.4f'],
        f'×{scale}: means over the images of a data set',
    )


def _published(label: str, scale: int, name: str) -> list:
    return list(published.quality(label, scale, name) or (NOT_AVAILABLE, NOT_AVAILABLE))


def variant_table(caption: str, methods: Sequence[Method], records: Records) -> Table:
    """One row per data set and variant: exempt tokens, saving, quality, and the difference from the dense network."""
    rows = []
    for name in dict.fromkeys(name for _, name in records):
        dense = records['dense', name]
        for method in methods:
            found = records[method.label, name]
            row = [name, method.label, 100 * _mean(found, 'exempt'), _percent_less(found)]
            row += [_mean(found, 'psnr'), _mean(found, 'ssim')]
            differences = [1000 * (one['psnr'] - other['psnr']) for one, other in zip(found, dense)]
            error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
            rows.append([*row, mean(differences), error] if method.label != 'dense' else [*row, None, None])
    return Table(
        ['data set', 'variant', 'exempt (%)', 'saved (%)', 'PSNR (dB)', 'SSIM', 'from dense (mdB)', 'std. error (mdB)'],
        rows,
        ['', '', '.2f', '.2f', '.4f', '.5f', '+.1f', '.1f'],
        caption,
        [
            'exempt: share of the tokens of the padded image, mean. saved: of the multiply-adds of the dense network, '
            'together over the data set. from dense: mean over the images of the difference in PSNR, in thousandths '
            'of a dB, with its standard error.'
        ],
    )


def _grid(data_sets: dict[str, list[Source]], scale: int) -> dict[str, list[dict[tuple[int, int], Share]]]:
    total = sum(map(len, data_sets.values()))
    with tqdm(total=total, desc=f'×{scale} K and w', unit='image', leave=False, disable=None) as progress:
        found = {}
        for name, sources in data_sets.items():
            for source in sources:
                image = shares(read_lq(source.path, scale), GRID_CENTERS, GRID_WINDOWS)
                found.setdefault(name, []).append(image)
                progress.update()
    return found


def _grid_table(scale: int, images: dict[str, list[dict[tuple[int, int], Share]]]) -> Table:
    def share(of: list[dict[tuple[int, int], Share]], k: int, w: int) -> float:
        return 100 * mean(image[k, w].fused for image in of)

    rows = [[name, k, *(share(of, k, w) for w in GRID_WINDOWS)] for name, of in images.items() for k in GRID_CENTERS]
    return Table(
        ['data set', 'K', *(f'w = {w}' for w in GRID_WINDOWS)],
        rows,
        ['', '', *['.1f'] * len(GRID_WINDOWS)],
        f'×{scale}: share of pure pixels in percent with fusion, mean over the images',
    )


def _write(folder: Path, name: str, text: str) -> None:
    with atomic_path(folder / name) as temporary:
        temporary.write_text(text, encoding='utf-8')


def _write_table(folder: Path, name: str, table: Table) -> None:
    _write(folder, f'{name}.md', table.markdown())
    _write(folder, f'{name}.csv', table.csv())
    _write(folder, f'{name}.tex', table.latex(f'tab:{name}'))


def make(
    data: str | Path,
    output: str | Path,
    cache: str | Path,
    weights: Sequence[str | Path],
    scales: Sequence[int] = (2, 3, 4),
    options: Sequence[Path] = (),
    ablate_on: Sequence[str] | None = None,
    command: str = 'ppsr tables',
) -> list[str]:
    """Measure what is not in the cache, and write all tables and plots.

    Args:
        data: folder with the benchmarks, in any layout that ``ppsr prepare`` knows.
        output: folder for .md, .csv, .tex, .png and .pdf files and a README.md that shows them, in
            sections between which lines of a hand stay.
        cache: file of the records; one run at a time writes into it.
        weights: weight files (:func:`methods_of`).
        scales: of the tables.
        options: options files whose networks become further rows.
        ablate_on: data sets of the ablations, made where there are weights of PP-ATD-light; None = all. Controls
            are on all data sets; an empty list makes neither.
        command: what to name in the README as the way these were made.

    Returns:
        The names of the sections written.

    Raises:
        UserError: another run has the cache, no images, files or names that cannot be used, a folder that cannot be
            written.
    """
    with Lock(f'{cache}.lock', f'The cache {cache}'):
        return _make(Path(output), Cache(cache), data, weights, scales, options, ablate_on, command)


def _make(folder, records_file, data, weights, scales, options, ablate_on, command) -> list[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f'{folder}: the folder cannot be made ({e.strerror or e}).') from e
    everything, sections = [], []
    for scale in scales:
        data_sets = find_images(data, scale)
        unknown = [name for name in ablate_on or () if name not in data_sets]
        if unknown:
            raise UserError(f'ablations on {unknown[0]}: there is none in {data}, only {", ".join(data_sets)}.')
        varied_sets = {name: images for name, images in data_sets.items() if ablate_on is None or name in ablate_on}
        methods = methods_of(scale, weights, options)
        everything += methods
        records = measure(methods, data_sets, records_file, f'×{scale} benchmarks')
        _write_table(folder, f'benchmarks_x{scale}', benchmark_table(scale, methods, records))
        found = [(f'benchmarks_x{scale}', f'Benchmarks ×{scale}')]
        base = next(method for method in methods if method.label == PURE_PASS)
        found += _pure_pass_plots(folder, scale, base, records)
        if varied_sets and base.weights is not None:
            found += _variants(folder, scale, base, data_sets, varied_sets, records, records_file)
        found += _scopes(folder, scale, weights, data_sets if varied_sets else {}, records_file)
        if varied_sets:
            grid = _grid(varied_sets, scale)
            _write_table(folder, f'purity_x{scale}', _grid_table(scale, grid))
            plots.heat_map(folder / f'purity_grid_x{scale}', scale, GRID_CENTERS, GRID_WINDOWS, grid)
            found += [(f'purity_x{scale}', f'Pure pixels by K and w, ×{scale}'), (f'purity_grid_x{scale}.png', '')]
        sections += found
    _write_table(folder, 'cost', cost_table(everything))
    sections.insert(0, ('cost', 'Cost'))
    _write_readme(folder, sections, everything, command)
    return [name for name, _ in sections]


def _variants(
    folder: Path, scale: int, base: Method, all_sets: dict, varied_sets: dict, benchmarks: Records, cache: Cache
) -> list[tuple[str, str]]:
    """Controls on all data sets, ablations on some; a plot of both."""
    controls, changes = control_methods(base), ablation_methods(base)
    records = measure(controls, all_sets, cache, f'×{scale} controls')
    caption = f'×{scale}: the mask of Pure-Pass, and others that exempt exactly as many tokens of each image'
    _write_table(folder, f'controls_x{scale}', variant_table(caption, controls, records))
    varied = measure(changes, varied_sets, cache, f'×{scale} ablations')
    caption = f'×{scale}: PP-ATD-light with one thing changed at a time (default: K = 8, w = 5, shift 2, value)'
    _write_table(folder, f'ablations_x{scale}', variant_table(caption, changes, varied))
    plot = f'psnr_gmacs_x{scale}'
    plots.quality_against_cost(folder / plot, scale, _families(), records | varied, benchmarks)
    return [
        (f'controls_x{scale}', f'Controls ×{scale}: which pixels are exempt'),
        (f'ablations_x{scale}', f'Ablations ×{scale}'),
        (f'{plot}.png', ''),
    ]


def _scopes(
    folder: Path, scale: int, weights: Sequence[str | Path], data_sets: dict, cache: Cache
) -> list[tuple[str, str]]:
    """Masks and scopes, for weights with a stand-in for window attention."""
    files = scopes.files_with_stand_in(weights, scale)
    data_sets = {name: sources for name, sources in data_sets.items() if name in scopes.SETS}
    if not files or not data_sets:
        return []
    name, found = f'scopes_x{scale}', scopes.measure_scopes(files, data_sets, scale, cache)
    _write_table(folder, name, scopes.scope_table(found, scale))
    plots.masks_and_scopes(folder / name, scale, found)
    return [(name, f'Masks and scopes ×{scale}'), (f'{name}.png', '')]


def _pure_pass_plots(folder: Path, scale: int, base: Method, records: Records) -> list[tuple[str, str]]:
    own = {name: found for (label, name), found in records.items() if label == base.label}
    net = base.build()
    plots.saving_against_share(folder / f'saving_share_x{scale}', scale, net, own)
    plots.share_by_data_set(folder / f'pure_share_x{scale}', scale, own)
    return [(f'pure_share_x{scale}.png', ''), (f'saving_share_x{scale}.png', '')]


def _write_readme(folder: Path, sections: list[tuple[str, str]], methods: list[Method], command: str) -> None:
    """The README in sections (:mod:`ppsr.generated`): what a hand wrote between them stays, figures of an older run do
    not."""
    path = folder / 'README.md'
    if not path.exists():
        _write(folder, path.name, '# Tables\n')
    texts, table = {'made': _made(methods, command)}, 'made'
    for name, title in sections:
        if name.endswith('.png'):
            texts[table] += f'\n\n![{name[:-4]}]({name})'
        else:
            table = name
            texts[table] = f'## {title}\n\n{(folder / f"{name}.md").read_text(encoding="utf-8").rstrip()}'
    older = [name for name in section_names(path) if OWN_SECTION.fullmatch(name) and name not in texts]
    for name, text in {**texts, **dict.fromkeys(older, 'The command above did not make this part.')}.items():
        write_section(path, name, text)


def _made(methods: list[Method], command: str) -> str:
    lines = [f'Made by `{command}` (ppsr {__version__}, torch {torch.__version__}).', '']
    for path in dict.fromkeys(m.weights for m in methods if m.weights is not None):
        rows = ', '.join(f'{m.label} ×{m.scale}' for m in methods if m.weights == path)
        summary = read_checkpoint(path).facts.get('summary', '')
        lines.append(f'Weights of {rows}: {path.name} (SHA-256 {file_hash(path)[:12]}…). {summary}'.rstrip())
    lines += ['', 'Low-resolution images are made from the HR images by the exact bicubic; PSNR and SSIM on Y, ']
    lines[-1] += 'crop = scale, whole images, 8 bits. Multiply-adds: [docs/flops.md](../flops.md). Each table is '
    lines[-1] += 'also there as `.csv` and `.tex`, each plot as `.pdf`.'
    return '\n'.join(lines)
