"""``ppsr upscale``"""

import argparse
import sys

import torch

from ppsr.archs.masked import SCOPES
from ppsr.cli.numbers import PIXELS, THRESHOLD, Number
from ppsr.device import resolve_device
from ppsr.errors import UserError
from ppsr.pictures.memory import free_memory, parse_size
from ppsr.pictures.upscaler import OUTSCALES, Upscaler


def add_weights_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose a network; shared by ``upscale``, ``compare`` and ``export``."""
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument('-n', '--model', metavar='NAME', help='shipped weights by name (default: of the scale wanted)')
    weights.add_argument('--model-path', metavar='FILE', help='weights file (.safetensors, .pth)')
    parser.add_argument(
        '--arch',
        help='run the weights as this arch; PPATDLight (PPATDLightV2) runs a plain ATD-light (v2) with Pure-Pass',
    )
    parser.add_argument('--no-pure-pass', action='store_true', help='exempt nothing: the dense network')
    parser.add_argument('--mask', metavar='NAME', help="which pixels are pure: colour (the paper's), gradient, …")
    parser.add_argument('--threshold', type=THRESHOLD, metavar='T', help='of gradient (0.05), variance and both (0.07)')
    parser.add_argument('--scope', nargs='+', choices=SCOPES, help='attentions that pure pixels are exempt from')


def add_dial_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose how fast; shared by ``upscale``, ``compare``, ``video`` and ``export``."""
    dial = parser.add_mutually_exclusive_group()
    dial.add_argument(
        '--max-loss',
        metavar='DB[@PERCENT]',
        help='fastest setting that loses at most so much against dense: in the mean over the images that the weights '
        'were calibrated on, or on so many percent of them (0.05@95)',
    )
    dial.add_argument(
        '--saving', type=Number(0.0, 100.0), metavar='PERCENT', help='best setting that saves so much of the work'
    )
    dial.add_argument('--exact', action='store_true', help='dense, as --no-pure-pass')


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """The options that choose a network and how it runs; shared by ``upscale`` and ``compare``."""
    add_weights_options(parser)
    add_dial_options(parser)
    parser.add_argument(
        '-t', '--tile', type=PIXELS, help='tile side in input pixels; 0 = never cut (default: from memory)'
    )
    parser.add_argument('--tile-overlap', type=PIXELS, default=32, metavar='N', help='shared pixels (default: 32)')
    parser.add_argument('--max-memory', metavar='SIZE', help='never use more, e.g. 4G (RAM, or GPU memory)')
    parser.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:N (default: auto)')
    parser.add_argument('--dtype', default='fp32', choices=('fp32', 'bf16', 'fp16'), help='precision (default: fp32)')


def chosen_network(args) -> dict:
    """What :func:`add_weights_options` chose: arguments of :func:`ppsr.load_model` and of Upscaler.from_pretrained."""
    given = {name: getattr(args, name) for name in ('mask', 'threshold', 'scope')}
    given = {name: value for name, value in given.items() if value is not None}
    if args.no_pure_pass and given:
        raise UserError(
            f'--{next(iter(given))} says how pixels are exempt, --no-pure-pass exempts none; leave one out.'
        )
    return dict(
        path_or_name=args.model_path if args.model is None else args.model,
        arch=args.arch,
        pure_pass=not args.no_pure_pass,
        settings={f'pp_{name}': value for name, value in given.items()},
    )


def make_upscaler(args, quiet: bool = False, **options):
    """An Upscaler from the options of :func:`add_network_options`; what the dial chose is printed."""
    upscaler = Upscaler.from_pretrained(
        **chosen_network(args),
        max_loss=args.max_loss,
        saving=args.saving,
        exact=args.exact,
        device=args.device,
        dtype=args.dtype,
        tile=args.tile,
        tile_overlap=args.tile_overlap,
        max_memory=args.max_memory,
        **options,
    )
    if upscaler.choice is not None and not quiet:
        print(upscaler.choice, file=sys.stderr)
    return upscaler


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '-i',
        '--input',
        nargs='+',
        required=True,
        metavar='INPUT',
        help="pictures, folders, globs, or '-' for standard input",
    )
    parser.add_argument(
        '-o', '--output', required=True, help="folder; for one picture also a file name, or '-' for standard output"
    )
    parser.add_argument(
        '-s',
        '--outscale',
        type=Number(*OUTSCALES),
        help='factor of the result (default: 4, or that of -n); the weights are those of that scale where there are',
    )
    parser.add_argument('--suffix', default='out', help="NAME becomes NAME_SUFFIX; '' for none (default: out)")
    parser.add_argument('--ext', default='auto', choices=('auto', 'png', 'jpg', 'webp', 'tiff'), help='output format')
    parser.add_argument('--quality', type=Number(1, 100), default=95, help='of JPEG and WebP (default: 95)')
    parser.add_argument('-r', '--recursive', action='store_true', help='descend into folders, keeping their tree')
    parser.add_argument('--overwrite', action='store_true', help='redo outputs that exist (default: skip them)')
    parser.add_argument('--save-mask', action='store_true', help='write NAME_mask.png beside each output')
    add_network_options(parser)


def run(args) -> int:
    from ppsr.pictures.batch import STREAM, plan_jobs, run_jobs
    from ppsr.pictures.sharing import join_crew

    with join_crew() as crew:
        if crew.size > 1:
            if STREAM in (*args.input, args.output):
                raise UserError("'-' is one stream, which processes cannot share; start one process, without torchrun.")
            _take_share(args, crew.local_rank, crew.local_size)
        plan = crew.from_first(
            lambda: plan_jobs(args.input, args.output, args.suffix, args.ext, args.recursive, args.save_mask)
        )
        upscaler = make_upscaler(args, quiet=not crew.is_first, outscale=args.outscale)
        if upscaler.outscale != upscaler.scale and crew.is_first:
            made = f'The network enlarges ×{upscaler.scale}; Lanczos makes ×{upscaler.outscale:g} of it.'
            print(made, file=sys.stderr)
        summary = run_jobs(upscaler, plan, args.quality, args.overwrite, crew=crew)
    if not crew.is_first:
        return 0  # the first one tells what failed here, too; torchrun would end the others
    print(summary, file=sys.stderr if args.output == '-' else sys.stdout)
    return 1 if summary.failed else 0


def _take_share(args, rank: int, processes: int) -> None:
    """One GPU, or one part of the memory, for each of the processes of this machine."""
    if args.device in ('auto', 'cuda') and torch.cuda.is_available():
        args.device = f'cuda:{rank % torch.cuda.device_count()}'
        processes = -(-processes // torch.cuda.device_count())  # on this GPU
    if processes > 1:
        room = free_memory(resolve_device(args.device)) if args.max_memory is None else parse_size(args.max_memory)
        args.max_memory = str(room // processes)
