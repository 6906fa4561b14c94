"""Inference on the CPU: every backend against the reference, dense against Pure-Pass, and the machine's bound.

    python benchmarks/forward.py [--arch ATDLight] [--size 180 320] [--runs 5] [--backends native torch reference]
    python benchmarks/forward.py --brief --arch ATDLightV2
    python benchmarks/forward.py --savings [--scope category window]
    python benchmarks/forward.py --variants
    python benchmarks/forward.py --target avx2

Weights are random: time does not depend on them beyond which tokens meet in a group. One process, cases in turn,
medians. The reference backend materialises every attention matrix, as the formulas say. Another network is measured
against ATDLight, too.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from common import alternate, machine, median, noise, on, photograph, ratio, table
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from ppsr.archs import ATDLight, ATDLightV2, MaskedNetwork, PPATDLight, PPATDLightV2
from ppsr.archs.masked import SCOPES
from ppsr.ops import dispatch, native, use_backend

PHOTOGRAPHS = ('astronaut', 'chelsea', 'coffee', 'rocket', 'motorcycle_left', 'hubble_deep_field')


ARCHS = {'ATDLight': (ATDLight, PPATDLight), 'ATDLightV2': (ATDLightV2, PPATDLightV2)}


def networks(arch: str, scope: Sequence[str] = ('category',)) -> tuple[MaskedNetwork, MaskedNetwork]:
    """A network and its Pure-Pass version with the same weights."""
    torch.manual_seed(0)
    dense, pp = ARCHS[arch][0]().eval(), ARCHS[arch][1](pp_scope=scope).eval()
    dense.load_state_dict(pp.state_dict())
    return dense, pp


def roofline(dense: MaskedNetwork, height: int, width: int) -> tuple[float, str]:
    """Lower bound of the forward time from measured sgemm and exp throughput of this machine; and how it was found."""
    n = 1024
    a, b = torch.randn(n, n), torch.randn(n, n)
    x = torch.randn(1 << 16).clamp_(-20, 0)  # in the L2 cache
    out, c = torch.empty_like(x), torch.empty(n, n)
    gmacs = n**3 / min(alternate({'': lambda: torch.mm(a, b, out=c)}, 20, 3)['']) / 1e9
    gexps = {'torch': lambda: torch.exp(x, out=out)}
    if dispatch.available('native') is None:  # runs on one thread
        gexps['our own kernel'] = lambda: native.library().ppsr_exp2(x.data_ptr(), out.data_ptr(), x.numel())
    for name, exp in gexps.items():
        seconds = min(alternate({'': lambda exp=exp: [exp() for _ in range(50)]}, 10, 2)['']) / 50
        threads = 1 if name == 'torch' else torch.get_num_threads()
        gexps[name] = x.numel() * threads / seconds / 1e9

    macs = sum(dense.macs(height, width).values()) / 1e9
    s = dense.window_size
    tokens = -(-height // s) * s * (-(-width // s) * s)
    layers = [layer for group in dense.layers for layer in group.residual_group.layers]
    exps = 0
    for layer in layers:
        heads, entries = layer.attn_win.num_heads, layer.attn_atd.num_tokens
        entries *= 2 if hasattr(layer, 'refine') else 1  # ATD-CA, and the refinement of the dictionary
        exps += tokens * (heads * (s * s + layer.attn_aca.category_size) + entries) / 1e9
    bounds = {name: macs / gmacs + exps / throughput for name, throughput in gexps.items()}
    text = f'sgemm {gmacs:.1f} GMAC/s (torch), exp ' + ', '.join(f'{g:.1f} G/s ({name})' for name, g in gexps.items())
    text += f'; the network takes {macs:.1f} GMAC and {exps:.2f} G exponentials: at least '
    text += ', '.join(f'{bound:.2f} s with the exp of {name}' for name, bound in bounds.items())
    return min(bounds.values()), text


def shares(net, lq: torch.Tensor, most: int = 12) -> str:
    """Share of the time by operator, from torch's profiler."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as prof:
        net(lq)
    events = sorted(prof.key_averages(), key=lambda e: -e.self_cpu_time_total)
    total = sum(e.self_cpu_time_total for e in events)
    rows = [
        [f'`{e.key}`', e.count, f'{e.self_cpu_time_total / 1e3:.0f} ms', f'{e.self_cpu_time_total / total:.1%}']
        for e in events[:most]
    ]
    return table(['operator', 'calls', 'time', 'share'], rows)


@torch.no_grad()
def where_report(height: int, width: int, runs: int, backend: str, most: int = 12) -> str:
    """Time by operator of the dense network and of Pure-Pass with both attentions exempt, from torch's profiler."""
    scope, name = ('category', 'window'), 'chelsea'
    dense, pp = networks('ATDLight', scope)
    lq = photograph(name, height, width)
    _, mask = pp(lq, return_mask=True)
    saved = 1 - sum(pp.macs(height, width, mask).values()) / sum(pp.macs(height, width).values())
    times: list[dict[str, list[float]]] = [{}, {}]
    for _ in range(runs):
        for net, of in zip((dense, pp), times):
            with use_backend(backend), profile(activities=[ProfilerActivity.CPU]) as prof:
                net(lq)
            for event in prof.key_averages():
                of.setdefault(event.key, []).append(event.self_cpu_time_total / 1e3)
    before, after = ({key: sum(found) / runs for key, found in of.items()} for of in times)
    left = left_if_time_fell_with_macs(*(macs_by_operator(net, lq, backend) for net in (dense, pp)), before)
    keys = sorted({*before, *after}, key=lambda key: -max(before.get(key, 0), after.get(key, 0)))[:most]
    rows = [[f'`{key}`', f'{before.get(key, 0):.0f} ms', f'{after.get(key, 0):.0f} ms'] for key in keys]
    rows.append(['all', *(f'{sum(of.values()):.0f} ms' for of in (before, after))])
    title = f'## Where the time of Pure-Pass goes, {width}×{height} → ×4'
    text = f'`{name}`, {mask.float().mean():.1%} pure, {saved:.1%} of the multiply-adds saved; means of {runs} runs:'
    lines = [title, '', text, '', table(['operator', 'dense', 'AC-MSA and SW-MSA exempt'], rows), '']
    dense_time, pp_time = (sum(of.values()) for of in (before, after))
    found, possible = (1 - time / dense_time for time in (pp_time, left))
    lines += [
        'If the time of each kind of operator fell exactly as its own multiply-adds do, and nothing were added, '
        f'{left:.0f} ms would be left: {possible:.1%} of the time saved, {possible / saved:.2f} of what is saved in '
        f'multiply-adds. Of that {found / possible:.0%} is reached.',
        '',
    ]
    return '\n'.join(lines)


# Work that Pure-Pass saves some of -> its operators by the clock, and by the counter, which takes linear layers apart.
KINDS = {
    'linear layers': (
        ('ppsr::linear', 'ppsr::norm_linear_some', 'ppsr::linear_some', 'ppsr::linear_stand_in'),
        ('aten::addmm', 'aten::mm'),
    ),
    'window attention': 2 * (('ppsr::window_attention',),),
    'category attention': 2 * (('ppsr::category_attention',),),
}


def macs_by_operator(net: MaskedNetwork, lq: torch.Tensor, backend: str) -> dict[str, int]:
    """Operator -> multiply-adds of a forward pass."""
    with use_backend(backend), FlopCounterMode(display=False) as counter:
        net(lq)
    return {str(packet).replace('.', '::'): flops // 2 for packet, flops in counter.get_flop_counts()['Global'].items()}


def left_if_time_fell_with_macs(dense: dict[str, int], pp: dict[str, int], time: dict[str, float]) -> float:
    """Milliseconds by operator of the dense network -> those that would be left in all, given both networks'
    multiply-adds by operator; what is of none of the KINDS stays as it is."""
    left = sum(time.values())
    for clock, counter in KINDS.values():
        before, after = (sum(macs.get(name, 0) for name in counter) for macs in (dense, pp))
        left -= sum(time.get(name, 0) for name in clock) * (1 - after / before)
    return left


def variants(dense: MaskedNetwork, lq: torch.Tensor, runs: int, best: str) -> str:
    """What else might help on a CPU, against the network as it is: torch.compile, bfloat16."""
    compiled = torch.compile(dense, fullgraph=True)
    half, half_lq = type(dense)().eval(), lq.bfloat16()
    half.load_state_dict(dense.state_dict())
    half.bfloat16()

    def autocast():
        with torch.autocast('cpu', dtype=torch.bfloat16):
            return dense(lq)

    def products():
        with native.bf16():
            return dense(lq)

    cases = {
        f'as it is, {best}': on(best, lambda: dense(lq)),
        **({} if dispatch.no_bf16() else {'bfloat16 products, native': on('native', products)}),
        f'torch.compile, {best}': on(best, lambda: compiled(lq)),
        'as it is, torch': on('torch', lambda: dense(lq)),
        'bfloat16 autocast, torch': on('torch', autocast),
        'bfloat16 weights, torch': on('torch', lambda: half(half_lq)),
    }
    seconds = alternate(cases, runs)
    first = seconds[f'as it is, {best}']
    rows = [[name, f'{median(s):.2f} s', f'{ratio(s, first):.2f}'] for name, s in seconds.items()]
    return table([type(dense).__name__, 'median', f'against {best}'], rows)


def savings(dense: MaskedNetwork, pp: MaskedNetwork, height: int, width: int, runs: int, backend: str) -> str:
    """Time that Pure-Pass saves against multiply-adds that it saves, on photographs and where nothing is pure."""
    rows, totals = [], [0.0, 0.0, 0.0]
    for name in (*PHOTOGRAPHS, None):
        x = photograph(name, height, width) if name else noise(height, width)
        _, mask = pp(x, return_mask=True)
        saved = 1 - sum(pp.macs(height, width, mask).values()) / sum(pp.macs(height, width).values())
        cases = {'pp': on(backend, lambda x=x: pp(x)), 'dense': on(backend, lambda x=x: dense(x))}
        s = alternate(cases, runs if name else 2 * runs, warmup=0)
        less = 1 - ratio(s['pp'], s['dense'])
        if name:
            totals = [a + b for a, b in zip(totals, (mask.float().mean().item(), saved, less))]
        else:
            pure_mean, saved_mean, less_mean = (total / len(PHOTOGRAPHS) for total in totals)
            rows.append(['mean of the photographs', f'{pure_mean:.1%}', f'{saved_mean:.1%}', f'{less_mean:.1%}'])
            rows[-1].append(f'{less_mean / saved_mean:.2f}')
        row = [name or 'noise (nothing pure)', f'{mask.float().mean():.1%}', f'{max(saved, 0):.1%}', f'{less:.1%}']
        rows.append([*row, f'{less / saved:.2f}' if name else ''])
    scope = 'AC-MSA' if pp.layers[0].residual_group.layers[0].comp is None else 'AC-MSA and SW-MSA'
    title = f'{type(pp).__name__} ({scope}) against {type(dense).__name__}, {backend}'
    return table([title, 'pure', 'GMACs saved', 'time saved', 'time/GMACs'], rows)


def report(arch: str, height: int, width: int, runs: int, backends: list[str], brief: bool = False) -> str:
    dense, pp = networks(arch)
    lq = photograph('coffee', height, width)
    torch.set_grad_enabled(False)
    lines = [f'## Forward of {arch}, {width}×{height} → ×4', '']

    best = backends[0]
    cases = {f'{arch}, {name}': on(name, lambda: dense(lq)) for name in backends}
    if arch != 'ATDLight':
        first, _ = networks('ATDLight')
        cases |= {f'ATDLight, {best}': on(best, lambda: first(lq))}
    seconds = alternate(cases, runs)
    bound, text = roofline(dense, height, width)
    slowest = seconds[f'{arch}, {backends[-1]}']
    rows = [
        [name, f'{median(s):.2f} s', f'{1 / ratio(s, slowest):.1f}×', f'{bound / median(s):.0%}']
        for name, s in seconds.items()
    ]
    lines += [table(['', 'median', f'against {backends[-1]}', 'of the lowest bound'], rows), '']
    if arch != 'ATDLight':
        against = ratio(seconds[f'{arch}, {best}'], seconds[f'ATDLight, {best}'])
        lines += [f'{arch} takes {against:.3f} of the time of ATDLight, run by run, {best}.', '']
    lines += [f'The bound of {arch}: {text}.', '']
    if brief:
        return '\n'.join(lines)

    start = time.perf_counter()
    for _ in range(10):
        pp.pure_mask(lq)
    mask_time = (time.perf_counter() - start) / 10
    forward = median(seconds[f'{arch}, {best}'])
    lines += [f'The mask takes {1000 * mask_time:.1f} ms, {mask_time / forward:.2%} of the forward time.', '']
    with_best = on(best, lambda: shares(dense, lq))
    lines += [f'Where the time goes ({arch}, {best}):', '', with_best(), '']
    return '\n'.join(lines)


@torch.no_grad()
def target_report(target: str, height: int, width: int, runs: int) -> str:
    """Native kernels of another instruction set on this processor, against the best that it has."""
    title = f'## The kernels for {target}, {width}×{height} → ×4'
    best = native.target() if dispatch.available('native') is None else None
    if best is None or target not in native.targets():
        return '\n'.join([title, '', f'This processor has no {target}, or the kernels were not built.', ''])

    def with_target(name: str) -> None:
        native.set_target(name)
        dense(lq)

    dense, _ = networks('ATDLight')
    lq = photograph('coffee', height, width)
    try:
        names = dict.fromkeys([best, target])
        seconds = alternate({name: on('native', lambda name=name: with_target(name)) for name in names}, runs)
        rows = []
        for name, s in seconds.items():
            native.set_target(name)
            bound, text = roofline(dense, height, width)
            rows.append(
                [
                    f'ATDLight, {name}',
                    f'{median(s):.2f} s',
                    f'{ratio(s, seconds[best]):.2f}',
                    f'{bound / median(s):.0%}',
                ]
            )
    finally:
        native.set_target(None)
    lines = [title, '', table(['', 'median', f'against {best}', 'of the lowest bound'], rows), '']
    return '\n'.join([*lines, f'The bound with the exp of {target}: {text}.', ''])


@torch.no_grad()
def savings_report(scope: Sequence[str], height: int, width: int, runs: int, backend: str) -> str:
    """What Pure-Pass saves: differences of a few per cent, so many runs."""
    title = f'## What Pure-Pass saves, scope {" ".join(scope)}, {width}×{height} → ×4'
    return '\n'.join([title, '', savings(*networks('ATDLight', scope), height, width, runs, backend), ''])


@torch.no_grad()
def variants_report(height: int, width: int, runs: int, backend: str) -> str:
    title = f'## What else was tried, {width}×{height} → ×4'
    dense, _ = networks('ATDLight')
    return '\n'.join([title, '', variants(dense, photograph('coffee', height, width), runs, backend), ''])


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', default='ATDLight', choices=ARCHS)
    parser.add_argument('--size', type=int, nargs=2, default=[180, 320], metavar=('H', 'W'))
    parser.add_argument('--runs', type=int, default=5)
    usable = [name for name in ('native', 'torch', 'reference') if dispatch.available(name) is None]
    parser.add_argument('--backends', nargs='+', default=usable, choices=usable)
    parser.add_argument('--brief', action='store_true', help='only how long a forward takes')
    parser.add_argument('--savings', action='store_true', help='only what Pure-Pass saves, with the first backend')
    parser.add_argument('--scope', nargs='+', default=['category'], choices=SCOPES, help='of --savings')
    parser.add_argument('--variants', action='store_true', help='only torch.compile and bfloat16 against it')
    parser.add_argument('--target', choices=('avx512', 'avx2', 'baseline'), help='only this instruction set')
    args = parser.parse_args()
    print(machine(), '\n')
    if args.target:
        print(target_report(args.target, *args.size, args.runs))
    elif args.variants:
        print(variants_report(*args.size, args.runs, args.backends[0]))
    elif args.savings:
        with torch.no_grad():
            print(savings(*networks(args.arch, args.scope), *args.size, args.runs, args.backends[0]))
    else:
        print(report(args.arch, *args.size, args.runs, args.backends, args.brief))
