"""``ppsr export``"""

import sys
from pathlib import Path

from ppsr.archs.masked import as_masked
from ppsr.calibration import Wish, load_as_wished
from ppsr.cli.numbers import Number
from ppsr.cli.upscale import add_dial_options, add_weights_options, chosen_network
from ppsr.errors import UserError
from ppsr.extras import need

PICTURES = 5  # for an ExecuTorch program, which does not tell its categories: ties spoil some of them, seldom all


def configure(parser) -> None:
    add_weights_options(parser)
    add_dial_options(parser)
    parser.add_argument('-o', '--output', required=True, metavar='FILE', help='.onnx, or .pte of ExecuTorch')
    parser.add_argument(
        '--format', choices=('onnx', 'executorch'), help="kind of file (default: as the output's ending says)"
    )
    parser.add_argument('--fp16', action='store_true', help='store the weights as float16, a smaller file (ONNX)')
    parser.add_argument(
        '--size',
        nargs=2,
        type=Number(1, 8192),
        metavar=('WIDTH', 'HEIGHT'),
        help='of the pictures, which ExecuTorch has to know (ONNX takes any)',
    )
    parser.add_argument(
        '--check',
        action='store_true',
        help='run the file and compare it with the network; one that exists is not made again without --overwrite',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace an output that exists')


def run(args) -> int:
    target = Path(args.output)
    form = args.format or {'.pte': 'executorch'}.get(target.suffix, 'onnx')
    suffix = {'onnx': '.onnx', 'executorch': '.pte'}[form]
    if target.suffix != suffix:
        raise UserError(f'{target}: a file of {form} is called {suffix}, not {target.suffix or "without ending"}.')
    if target.exists() and not (args.overwrite or args.check):
        raise UserError(f'{target} exists already; choose another name, or give --overwrite, or --check.')
    if form == 'onnx':
        if args.size:
            raise UserError('--size is for ExecuTorch; an ONNX file takes pictures of any size.')
        need('export', 'ppsr export', 'onnx', 'onnxscript', *['onnxruntime'] * args.check)
        return _onnx(args, target)
    if args.fp16 or not args.size:
        raise UserError('a file of executorch needs --size WIDTH HEIGHT and stores float32 weights (no --fp16).')
    return _executorch(args, target)


def _network(args):
    net, choice = load_as_wished(Wish.of(args.max_loss, args.saving, args.exact), **chosen_network(args))
    net = as_masked(net)
    if net is None:
        raise UserError(f'{args.arch} is no network of ppsr (ppsr.archs.MaskedNetwork) and cannot be exported.')
    if choice is not None:
        print(choice, file=sys.stderr)
    return net


def _onnx(args, target: Path) -> int:
    from ppsr.export.check import as_stored, check
    from ppsr.export.onnx_file import export_onnx

    net = _network(args)
    if args.overwrite or not target.exists():
        export_onnx(net, target, half=args.fp16)
        size = f'{target.stat().st_size / 1e6:.1f} MB'
        print(f'{target}: {size}, lq (batch, 3, height, width) in [0, 1] -> sr', flush=True)
    return _report(check(target, as_stored(target, net))) if args.check else 0


def _executorch(args, target: Path) -> int:
    from ppsr.export.check import check
    from ppsr.export.executorch_file import export_executorch, run_executorch

    net, (width, height) = _network(args), args.size
    if args.overwrite or not target.exists():
        export_executorch(net, target, height, width)
        print(f'{target}: {target.stat().st_size / 1e6:.1f} MB, for pictures of {width}×{height}', flush=True)
    return _report(check(target, net, [(1, height, width)] * PICTURES, [run_executorch])) if args.check else 0


def _report(comparisons) -> int:
    """Print the comparisons and what follows from them; the exit code."""
    from ppsr.export.check import TOLERANCE

    good, decided = True, False
    for comparison in comparisons:
        print(comparison, flush=True)
        good, decided = good and comparison.good, decided or comparison.error <= TOLERANCE
    if good and not decided:
        print(f'Not decided: ties of categories hide in each picture whether the file is equal to {TOLERANCE:g}.')
        return 1
    print(f'{"Equal" if good else "NOT equal"} to {TOLERANCE:g} away from category ties.')
    return 0 if good else 1
