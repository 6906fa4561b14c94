"""Other lightweight networks at ×4 beside ours on the CPU: seconds, peak memory, PSNR on Set5 with weights at hand.

    python benchmarks/peers.py [--size 180 320] [--runs 3] [--compile-seconds 25] [--quick]

The others are spandrel's and basicsr's classes in their published light configurations, with random weights except
ATD-light, which takes ours. Each runs as the fastest of: as it is, channels_last, torch.compile (where it compiles in
time). The peak is that of a first forward in a process of its own, not compiled, minus what was there after loading.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import alternate, as_image, image_pairs, machine, median, photograph, table
from torch import nn

from ppsr.errors import UserError
from ppsr.metrics import psnr
from ppsr.ops import dispatch, use_backend
from ppsr.weights import load_model

SCALE, WEIGHTS, SET5 = 4, 'PPATDLight_x4', Path('datasets/Set5/HR')
SLOW = 5.0  # seconds: what takes longer runs once in the alternation
OURS = {'ATDLight': False, 'PPATDLight': True}  # with Pure-Pass?
PEERS = ('ATD-light, published', 'SwinIR-light', 'SPAN', 'OmniSR', 'SAFMN', 'HAT-S')
FLOOR = 'bicubic'
# PSNR on Urban100 ×4 in the papers, trained on DIV2K: ATD (arXiv 2401.08209), SwinIR as the ATD paper prints it, OmniSR
# (result.tex of its authors' repository). What is missing here was not to be had in a source that could be read.
PUBLISHED = {'ATD-light, published': 26.97, 'SwinIR-light': 26.47, 'OmniSR': 26.64}
NEAR = 0.1  # dB: what nobody sees in a picture


class _Bicubic(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, scale_factor=SCALE, mode='bicubic')


def _atd() -> nn.Module:
    from spandrel.architectures.ATD import ATD

    net = ATD(
        embed_dim=48, depths=(6,) * 4, num_heads=(4,) * 4, window_size=16, category_size=128, num_tokens=64,
        reducted_dim=8, convffn_kernel_size=7, mlp_ratio=1, upscale=SCALE, upsampler='pixelshuffledirect',
    )  # fmt: skip
    given, own = load_model(WEIGHTS, pure_pass=False).state_dict(), net.state_dict()
    net.load_state_dict({name: given.get(name, value) for name, value in own.items()})
    return net


def _build(name: str) -> nn.Module:
    """A peer, in eval mode."""
    torch.manual_seed(0)
    if name == FLOOR:
        return _Bicubic()
    if name == 'SwinIR-light':
        from basicsr.archs.swinir_arch import SwinIR

        return SwinIR(
            embed_dim=60, depths=(6,) * 4, num_heads=(6,) * 4, window_size=8, mlp_ratio=2, upscale=SCALE,
            upsampler='pixelshuffledirect',
        ).eval()  # fmt: skip
    try:
        from spandrel.architectures.HAT import HAT
        from spandrel.architectures.OmniSR import OmniSR
        from spandrel.architectures.SAFMN import SAFMN
        from spandrel.architectures.SPAN import SPAN
    except ImportError as e:
        raise UserError("The peers are spandrel's classes: pip install spandrel.") from e
    builders = {
        'ATD-light, published': _atd,
        'SPAN': lambda: SPAN(num_in_ch=3, num_out_ch=3, feature_channels=48, upscale=SCALE),
        'OmniSR': lambda: OmniSR(num_feat=64, res_num=5, block_num=1, window_size=8, up_scale=SCALE),
        'SAFMN': lambda: SAFMN(dim=36, n_blocks=8, ffn_scale=2.0, upscaling_factor=SCALE),
        'HAT-S': lambda: HAT(
            embed_dim=144, depths=(6,) * 6, num_heads=(6,) * 6, window_size=16, compress_ratio=24, squeeze_factor=24,
            overlap_ratio=0.5, mlp_ratio=2, upscale=SCALE,
        ),
    }  # fmt: skip
    return builders[name]().eval()


def _runner(name: str, variant: str, multiple: int = 16):
    """lq -> sr (1, 3, 4h, 4w): padded by reflection to a size that every peer takes, cropped again."""
    if name.split(', ')[0] in OURS:
        arch, backend = name.split(', ')
        net = load_model(WEIGHTS, pure_pass=OURS[arch])
    else:
        backend, net = None, _build(name)
        multiple = 1 if name == FLOOR else multiple
        if variant == 'channels_last':
            net = net.to(memory_format=torch.channels_last)
        if variant == 'torch.compile':
            net = torch.compile(net)

    def run(lq: torch.Tensor) -> torch.Tensor:
        h, w = lq.shape[2:]
        if backend is None:
            lq = nn.functional.pad(lq, (0, -w % multiple, 0, -h % multiple), mode='reflect')
            if variant == 'channels_last':
                lq = lq.contiguous(memory_format=torch.channels_last)
        with torch.no_grad(), use_backend(backend):
            return net(lq)[..., : SCALE * h, : SCALE * w]

    return run


def _peak() -> int:
    """KiB of this process's peak resident set; not ru_maxrss, which a child takes over from who started it."""
    with open('/proc/self/status') as status:
        return next(int(line.split()[1]) for line in status if line.startswith('VmHWM'))


def measure(name: str, variant: str, height: int, width: int) -> dict:
    """In a process of its own: GiB of the first forward, seconds of the second (of the first where that is long)."""
    run, lq = _runner(name, variant), photograph('coffee', height, width)
    before = _peak()
    start = time.perf_counter()
    run(lq)
    seconds = time.perf_counter() - start
    gib = (_peak() - before) / 2**20
    if seconds < SLOW or variant == 'torch.compile':
        start = time.perf_counter()
        run(lq)
        seconds = time.perf_counter() - start
    return {'seconds': seconds, 'gib': gib}


def _apart(arguments: list, limit: float | None = None) -> dict | None:
    """measure(*arguments) in a process of its own; None where that fails or takes longer than `limit` seconds."""
    code = f'import json, peers; print(json.dumps(peers.measure(*json.loads({json.dumps(arguments)!r}))))'
    process = subprocess.Popen(
        [sys.executable, '-c', code], env={**os.environ, 'TORCHINDUCTOR_COMPILE_THREADS': '1',
        'PYTHONPATH': os.pathsep.join([str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')])},
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compiler that it started, too
        process.communicate()
        return None
    return json.loads(out.splitlines()[-1]) if process.returncode == 0 else None


def _set5(run) -> float:
    pairs = list(image_pairs(SET5, SCALE))
    return sum(psnr(as_image(run(lq)[0]), gt, SCALE) for _, lq, gt in pairs) / len(pairs)


def summary(rows: list[dict]) -> str:
    """What to take for which purpose, by rule from the measured rows (name, seconds, gib) and the papers' PSNR.

    The floor is left out, and our networks count with the PSNR that the paper of ATD gives for what they compute.
    """
    nets = [row for row in rows if row['name'] != FLOOR]
    fastest, least = min(nets, key=lambda r: r['seconds']), min(nets, key=lambda r: r['gib'])
    lines = [
        f'- The fastest: {fastest["name"]} ({fastest["seconds"]:.2f} s).',
        f'- The least memory: {least["name"]} ({least["gib"]:.2f} GiB).',
    ]
    known = [row for row in nets if published(row['name'])]
    if known:
        best = max(published(row['name']) for row in known)
        good = min((r for r in known if published(r['name']) >= best - NEAR), key=lambda r: r['seconds'])
        lines.append(
            f'- Quality: the fastest within {NEAR} dB of the best PSNR that a paper gives here ({best:.2f} dB): '
            f'{good["name"]} ({good["seconds"]:.2f} s), as trained there; for weights at hand see the PSNR on Set5.'
        )
        quicker = [row for row in known if row['seconds'] < good['seconds']]
        lines += [
            f'- Quality for less time: {row["name"]}, {best - published(row["name"]):.2f} dB below it in '
            f'{row["seconds"] / good["seconds"]:.2f} of the time.'
            for row in quicker
        ]
    unknown = [row['name'] for row in nets if not published(row['name'])]
    if unknown:
        lines.append(f'- No published PSNR at hand, so no word about quality: {", ".join(unknown)}.')
    ours = [row for row in nets if row['name'].split(', ')[0] in OURS]
    others = sorted((row for row in nets if row not in ours), key=lambda r: r['seconds'])
    if ours and others:
        mine = min(ours, key=lambda r: r['seconds'])
        times = ', '.join(f'{mine["seconds"] / r["seconds"]:.2f} of the time of {r["name"]}' for r in others)
        lines.append(f'- {mine["name"]}, the fastest of ours, takes {times}.')
    return '\n'.join(lines)


def published(name: str) -> float | None:
    """The paper's PSNR on Urban100 ×4; of ATD-light for both of ours, of which one skips what is pure."""
    return PUBLISHED.get(PEERS[0] if name.split(', ')[0] in OURS else name)


def report(height: int, width: int, runs: int, limit: float, names: tuple[str, ...] = PEERS) -> str:
    """The table and what it says."""
    backends = [name for name in ('native', 'torch') if dispatch.available(name) is None]
    ours = [f'{arch}, {backend}' for arch in OURS for backend in backends]
    lq, found, failed = photograph('coffee', height, width), {}, []
    _build('SPAN')  # a missing spandrel is said before anything is measured
    for name in (*ours, *names, FLOOR):
        variants = {'as it is': _apart([name, 'as it is', height, width])}
        if variants['as it is'] is None:
            failed.append(name)
            continue
        if name in names:
            variants['channels_last'] = _apart([name, 'channels_last', height, width])
            variants['torch.compile'] = _apart([name, 'torch.compile', height, width], limit)
        worked = {variant: result for variant, result in variants.items() if result}
        best = min(worked, key=lambda v: worked[v]['seconds'])
        gib = worked['as it is' if best == 'torch.compile' else best]['gib']
        found[name] = {'name': name, 'variant': best, 'gib': gib, 'seconds': worked[best]['seconds']}
    slow = [name for name, row in found.items() if row['seconds'] > SLOW]
    runners = {name: _runner(name, row['variant']) for name, row in found.items()}
    cases = {name: lambda name=name: runners[name](lq) for name in found}
    seconds = alternate({name: cases[name] for name in found if name not in slow}, runs)
    seconds |= alternate({name: cases[name] for name in slow}, 1, warmup=0)
    rows = []
    for name, row in found.items():
        row['seconds'] = median(seconds[name])
        weights = name in (*ours, FLOOR, PEERS[0]) and SET5.is_dir()
        quality = f'{_set5(_runner(name, "as it is")):.2f} dB' if weights else '–'
        rows.append([name, row['variant'], f'{row["seconds"]:.2f} s', f'{row["gib"]:.2f} GiB', quality])
        rows[-1].append(f'{PUBLISHED[name]:.2f} dB' if name in PUBLISHED else '–')
    lines = [f'## Beside other networks, {width}×{height} → ×4', '']
    lines += [table(['', 'variant', 'seconds', 'peak', 'PSNR, Set5', 'published, Urban100'], rows), '']
    lines += ['What to take for which purpose:', '', summary(list(found.values()))]
    if slow:
        lines += ['', f'Run once, for they take more than {SLOW:.0f} s: {", ".join(slow)}.']
    if failed:
        lines += ['', f'Did not run: {", ".join(failed)}.']
    return '\n'.join([*lines, ''])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--size', type=int, nargs=2, default=[180, 320], metavar=('H', 'W'))
    parser.add_argument('--runs', type=int, default=3)
    parser.add_argument('--compile-seconds', type=float, default=25, help='what takes longer is not compiled')
    parser.add_argument('--quick', action='store_true', help='48×64, one run, SPAN and SAFMN only')
    args = parser.parse_args()
    print(machine(), '\n')
    try:
        if args.quick:
            print(report(48, 64, 1, args.compile_seconds, ('SPAN', 'SAFMN')))
        else:
            print(report(*args.size, args.runs, args.compile_seconds))
    except UserError as e:
        sys.exit(str(e))
