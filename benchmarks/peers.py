"""Other networks at ×4 beside ours on the CPU, float32: seconds, peak memory, PSNR on Set5 with the weights at hand.

    python benchmarks/peers.py [--size 180 320] [--runs 3] [--compile-seconds 300] [--only SPAN SAFMN …]

The others are built as spandrel builds them from a weight file of their published configuration, padded to what
spandrel says that they need; SwinIR-light is basicsr's class. Their weights are random but for ATD-light, which takes
ours. SPAN's convolutions are merged once, not in every forward. Each peer is first tried in a process of its own: as it
is, channels_last, and the faster of the two under torch.compile (with frozen weights). The fastest way runs in the
alternation, and its peak is shown: of one forward, minus what was there before it. Linux only.
"""

import argparse
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import alternate, as_image, image_pairs, machine, median, photograph, table
from torch import nn

from ppsr.errors import UserError
from ppsr.metrics import psnr
from ppsr.ops import dispatch, use_backend
from ppsr.weights import load_model

SCALE, WEIGHTS = 4, 'PPATDLight_x4'
ENOUGH = 5.0  # seconds of trying one way of running
AS_IS, CHANNELS_LAST, COMPILED = 'as it is', 'channels_last', 'torch.compile'
OURS = {'ATDLight': False, 'PPATDLight': True}  # with Pure-Pass?
ATD, FLOOR = 'ATD-light, published', 'bicubic, torch'
NOT_AT_HAND = {
    'ESC': 'neither spandrel nor basicsr has its class; PLKSR, by the same authors, stands for large kernels'
}


class _Bicubic(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, scale_factor=SCALE, mode='bicubic')


@dataclass(frozen=True)
class Peer:
    """How a network of others is made, and what it is known for.

    Attributes:
        build: makes it with random weights.
        published: PSNR on Set5 and on Urban100 ×4, trained on DIV2K; None: in no source that could be read.
        multiple: of what the sizes must be; None: what runs is spandrel's network from these weights, and it says so.
    """

    build: Callable[[], nn.Module]
    published: tuple[float, float] | None = None
    multiple: int | None = None


def _of_spandrel(architecture: str, **options) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        return getattr(importlib.import_module(f'spandrel.architectures.{architecture}'), architecture)(**options)

    return build


def _swinir() -> nn.Module:
    from basicsr.archs.swinir_arch import SwinIR

    return SwinIR(
        embed_dim=60, depths=(6,) * 4, num_heads=(6,) * 4, window_size=8, mlp_ratio=2, upscale=SCALE,
        upsampler='pixelshuffledirect',
    )  # fmt: skip


# Published PSNR: ATD-light by its paper (arXiv 2401.08209), SwinIR-light as that prints it, OmniSR by result.tex of its
# authors' repository.
PEERS = {
    ATD: Peer(lambda: load_model(WEIGHTS, pure_pass=False), (32.63, 26.97)),
    'SwinIR-light': Peer(_swinir, (32.44, 26.47), multiple=8),
    'SPAN': Peer(_of_spandrel('SPAN', num_in_ch=3, num_out_ch=3, feature_channels=48, upscale=SCALE)),
    'OmniSR': Peer(
        _of_spandrel('OmniSR', num_feat=64, res_num=5, block_num=1, window_size=8, up_scale=SCALE), (32.49, 26.64)
    ),
    'SAFMN': Peer(_of_spandrel('SAFMN', dim=36, n_blocks=8, ffn_scale=2.0, upscaling_factor=SCALE)),
    'PLKSR-tiny': Peer(
        _of_spandrel(
            'PLKSR', dim=64, n_blocks=12, kernel_size=13, split_ratio=0.25, ccm_type='DCCM', use_ea=False,
            upscaling_factor=SCALE,
        )
    ),
    'HAT-S': Peer(
        _of_spandrel(
            'HAT', embed_dim=144, depths=(6,) * 6, num_heads=(6,) * 6, window_size=16, compress_ratio=24,
            squeeze_factor=24, overlap_ratio=0.5, mlp_ratio=2, upscale=SCALE,
        )
    ),
    FLOOR: Peer(_Bicubic, multiple=1),
}  # fmt: skip


def published(name: str) -> tuple[float, float] | None:
    """PSNR on Set5 and Urban100 ×4 by the paper; of ATD-light for our ATDLight, which computes the same."""
    if name.startswith('PPATDLight'):
        return None  # the tables of the paper of Pure-Pass were not to be read
    return PEERS[ATD if name.split(', ')[0] in OURS else name].published


def _merge(net: nn.Module) -> None:
    """Put SPAN's merged convolutions in place of the branches that they stand for."""
    for name, child in net.named_children():
        if hasattr(child, 'update_params'):
            child.update_params()
            setattr(net, name, child.eval_conv)
        else:
            _merge(child)


def network(name: str) -> tuple[nn.Module, Callable[[int, int], tuple[int, int]]]:
    """A peer, and what a picture of (width, height) lacks to the right and below for it.

    Raises:
        UserError: spandrel is not installed.
    """
    torch.manual_seed(0)
    peer = PEERS[name]
    try:
        net = peer.build()
        from spandrel import ModelLoader, SizeRequirements

        if peer.multiple is None:
            descriptor = ModelLoader(device='cpu').load_from_state_dict(net.state_dict())
            net, padding = descriptor.model, descriptor.size_requirements.get_padding
        else:
            padding = SizeRequirements(multiple_of=peer.multiple).get_padding
    except ImportError as e:
        raise UserError(f"The peers are spandrel's classes ({e}): pip install spandrel.") from e
    _merge(net)
    return net.eval().requires_grad_(False), padding


def runner(name: str, way: str = AS_IS) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    """lq (1, 3, h, w) -> sr (1, 3, 4h, 4w), by a peer or by one of ours ('ATDLight, native'); and its parameters."""
    backend, padding = None, lambda width, height: (0, 0)
    if name.split(', ')[0] in OURS:
        arch, backend = name.split(', ')
        net = load_model(WEIGHTS, pure_pass=OURS[arch])
    else:
        net, padding = network(name)
    parameters = sum(p.numel() for p in net.parameters())
    channels_last = CHANNELS_LAST in way
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    if COMPILED in way:
        net = torch.compile(net, dynamic=False, options={'freezing': True})

    def run(lq: torch.Tensor) -> torch.Tensor:
        h, w = lq.shape[2:]
        right, below = padding(w, h)
        if right or below:
            lq = nn.functional.pad(lq, (0, right, 0, below), mode='reflect')
        if channels_last:
            lq = lq.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), use_backend(backend):
            return net(lq)[..., : SCALE * h, : SCALE * w]

    return run, parameters


def _kib(field: str) -> int:
    """KiB of this process's resident set: VmRSS, now; VmHWM, the peak."""
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))


def measure(name: str, way: str, height: int, width: int) -> dict:
    """In a process of its own: GiB of one forward, seconds of the fastest of a few."""
    (run, _), lq = runner(name, way), photograph('coffee', height, width)
    if COMPILED in way:
        run(lq), run(lq)  # what a first forward changes in a module, a second may compile again
        ctypes.CDLL(None).malloc_trim(0)  # what the compiler freed
    before = _kib('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # the peak starts at what is resident now
    ((first,),) = alternate({'': lambda: run(lq)}, 1, warmup=0).values()
    gib = (_kib('VmHWM') - before) / 2**20
    seconds = [first]
    while sum(seconds) < ENOUGH and len(seconds) < 6:
        seconds += alternate({'': lambda: run(lq)}, 1, warmup=0)['']
    return {'seconds': min(seconds), 'gib': gib}


def apart(arguments: list, limit: float | None = None) -> dict | None:
    """measure(*arguments) in a process of its own; None where that fails or takes longer than `limit` seconds."""
    code = f'import json, peers; print(json.dumps(peers.measure(*json.loads({json.dumps(arguments)!r}))))'
    process = subprocess.Popen(
        [sys.executable, '-c', code],
        env={
            **os.environ,
            'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, errors = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compilers that it started, too
        process.communicate()
        return None
    if process.returncode:
        print(f'  {arguments}: {errors.strip().splitlines()[-1]}', file=sys.stderr)
        return None
    return json.loads(out.splitlines()[-1])


def _quality(name: str, folder: Path) -> float:
    """Mean PSNR on Y of a folder of HR images."""
    run, _ = runner(name)
    pairs = list(image_pairs(folder, SCALE))
    return sum(psnr(as_image(run(lq)[0]), gt, SCALE) for _, lq, gt in pairs) / len(pairs)


def sorting_note(height: int = 48, width: int = 64) -> str:
    """How far the published class is from ours on the same weights, with its own sort and with a stable one."""
    (net, _), ours = network(ATD), load_model(WEIGHTS, pure_pass=False).double()
    lq, sort, differences = photograph('coffee', height, width).double(), torch.sort, []
    net = net.double()
    with torch.no_grad(), use_backend('reference'):
        expected = ours(lq)
        for keep in (False, True):
            try:
                if keep:
                    torch.sort = lambda x, dim=-1, **_: sort(x, dim=dim, stable=True)
                differences.append((net(lq) - expected).abs().max().item())
            finally:
                torch.sort = sort
    return (
        f'{ATD}, takes the weights of ours and sorts its tokens by category with an unstable sort, ours with a stable '
        f'one. Which equal ones meet in a group then differs: by up to {differences[0]:.4f} of the full range in '
        f'float64; with a stable sort in its place by {differences[1]:.0e}.'
    )


def summary(rows: list[dict]) -> str:
    """What to take for which purpose, by rule from measured rows: name, seconds, gib, and psnr or None.

    The floor is left out, and who is named for quality is so as trained by the authors.
    """
    nets = sorted((row for row in rows if row['name'] != FLOOR), key=lambda r: r['seconds'])
    named = {row['name']: f'{row["name"]} ({row["seconds"]:.2f} s, {row["gib"]:.2f} GiB)' for row in nets}
    lines = [
        f'- Speed above all: {named[nets[0]["name"]]}.',
        f'- The least memory: {named[min(nets, key=lambda r: r["gib"])["name"]]}.',
    ]
    front, beaten = [], []
    for row in nets:
        known = published(row['name'])
        if known:
            (front if not front or known[1] > published(front[-1]['name'])[1] else beaten).append(row)
    if front:
        steps = '; '.join(f'{published(row["name"])[1]:.2f} dB: {named[row["name"]]}' for row in front)
        lines.append(f'- Quality, by the published PSNR on Urban100, the fastest for each: {steps}.')
    if beaten:
        names = ', '.join(named[row['name']] for row in beaten)
        lines.append(f'- Not for speed or quality, since one of these is at least as good and faster: {names}.')
    ours = [row for row in nets if row['name'].split(', ')[0] in OURS]
    unknown = [named[row['name']] for row in nets if not published(row['name']) and row not in ours]
    if unknown:
        lines.append(f'- No published PSNR at hand, so no word here about quality: {", ".join(unknown)}.')
    if ours:
        shipped = f', {ours[0]["psnr"]:.2f} dB on Set5' if ours[0]['psnr'] is not None else ''
        lines.append(
            f'- With the weights of this package, nothing else to download: {named[ours[0]["name"]]}{shipped}.'
        )
        others = [row for row in nets if row not in ours]
        times = ', '.join(f'{ours[0]["seconds"] / row["seconds"]:.2f} times that of {row["name"]}' for row in others)
        lines += [f'- The time of {ours[0]["name"]} is {times}.'] if others else []
    return '\n'.join(lines)


def report(height: int, width: int, runs: int, limit: float, names: list[str] | None = None) -> str:
    """The table and what it says.

    Args:
        limit: seconds after which torch.compile is given up.
        names: of the peers (default: all).

    Raises:
        UserError: spandrel is not installed.
    """
    peers = list(PEERS) if names is None else names
    backends = [name for name in ('native', 'torch') if dispatch.available(name) is None]
    for name in peers:
        network(name)  # a missing package is said before anything is measured
    rows, failed, slow, lq = [], [], [], photograph('coffee', height, width)
    for name in (*(f'{arch}, {backend}' for arch in OURS for backend in backends), *peers):
        start, ways = time.perf_counter(), {AS_IS: apart([name, AS_IS, height, width])}
        if ways[AS_IS] is None:
            failed.append(name)
            continue
        if name in PEERS and name != FLOOR:
            ways[CHANNELS_LAST] = apart([name, CHANNELS_LAST, height, width])
            last = ways[CHANNELS_LAST] and ways[CHANNELS_LAST]['seconds'] < ways[AS_IS]['seconds']
            compiled = f'{CHANNELS_LAST}, {COMPILED}' if last else COMPILED
            ways[compiled] = apart([name, compiled, height, width], limit)
            slow += [name] if ways[compiled] is None else []
        ways = {way: result for way, result in ways.items() if result}
        way = min(ways, key=lambda w: ways[w]['seconds'])
        rows.append({'name': name, 'way': way, 'gib': ways[way]['gib'], 'psnr': None})
        tried = ', '.join(f'{way} {result["seconds"]:.2f} s' for way, result in ways.items())
        print(f'  {name}: {tried} ({time.perf_counter() - start:.0f} s)', file=sys.stderr, flush=True)

    runners = {row['name']: runner(row['name'], row['way']) for row in rows}
    seconds = alternate({name: lambda run=run: run(lq) for name, (run, _) in runners.items()}, runs)
    set5 = Path(os.environ.get('PPSR_DATA', 'datasets')) / 'Set5' / 'HR'
    lines = []
    for row in rows:
        name, known = row['name'], published(row['name'])
        row['seconds'] = median(seconds[name])
        if set5.is_dir() and (name not in PEERS or name in (ATD, FLOOR)):
            row['psnr'] = _quality(name, set5)
        cells = [
            name,
            row['way'],
            f'{runners[name][1] / 1000:.0f}K',
            f'{row["seconds"]:.3f} s',
            f'{row["gib"]:.2f} GiB',
        ]
        cells.append('not at hand' if row['psnr'] is None else f'{row["psnr"]:.2f} dB')
        lines.append([*cells, *(f'{x:.2f} dB' for x in known)] if known else [*cells, '–', '–'])
    header = ['', 'fastest as', 'parameters', 'median', 'peak', 'PSNR, Set5', 'published, Set5', 'published, Urban100']
    text = [f'## Beside other networks, {width}×{height} → ×4', '', table(header, lines), '']
    text += ['What to take for which purpose:', '', summary(rows), '']
    if ATD in peers:
        text += [sorting_note(), '']
    text += [f'Not at hand: {name} ({why}).' for name, why in NOT_AT_HAND.items()]
    text += [f'torch.compile failed or took more than {limit:.0f} s: {", ".join(slow)}.'] if slow else []
    text += [f'Did not run: {", ".join(failed)}.'] if failed else []
    return '\n'.join([*text, ''])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, nargs=2, default=[180, 320], metavar=('H', 'W'))
    parser.add_argument('--runs', type=int, default=3)
    parser.add_argument('--compile-seconds', type=float, default=300, help='what takes longer is not compiled')
    parser.add_argument('--only', nargs='+', choices=list(PEERS), help='beside ours (default: all)')
    args = parser.parse_args()
    print(machine(), '\n')
    try:
        print(report(*args.size, args.runs, args.compile_seconds, args.only))
    except UserError as e:
        sys.exit(str(e))
