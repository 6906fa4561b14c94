"""``ppsr video``"""

import argparse
import re
import sys
from fractions import Fraction
from pathlib import Path

from ppsr.cli.numbers import Number
from ppsr.cli.upscale import add_network_options, make_upscaler
from ppsr.extras import need
from ppsr.pictures.batch import exists
from ppsr.pictures.upscaler import OUTSCALES

_TIME = re.compile(r'(?:(?:(\d{1,3}):)?([0-5]?\d):)?(\d{1,7}(?:\.\d{1,9})?)')


def seconds(text: str) -> Fraction:
    """An argparse type: seconds, MM:SS or HH:MM:SS, with fractions.

    >>> seconds('1:02.5')
    Fraction(125, 2)
    """
    found = _TIME.fullmatch(text)
    if found is None or (found[2] is not None and float(found[3]) >= 60):
        raise argparse.ArgumentTypeError(f'{text[:30]!r} is no time; give seconds, MM:SS or HH:MM:SS')
    hours, minutes, rest = (Fraction(part or 0) for part in found.groups())
    return 3600 * hours + 60 * minutes + rest


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('-i', '--input', required=True, metavar='FILE', help='a video')
    parser.add_argument('-o', '--output', required=True, metavar='FILE', help='.mp4, .m4v, .mov, .mkv or .webm')
    parser.add_argument(
        '-s',
        '--outscale',
        type=Number(*OUTSCALES),
        help='factor of the result (default: 4, or that of -n); the weights are those of that scale where there are',
    )
    parser.add_argument('--codec', metavar='NAME', help='libx264, libx265, libsvtav1, … (default: libx264; WebM: VP9)')
    parser.add_argument('--crf', type=Number(0.0, 63.0), metavar='N', help='quality, smaller is better (libx264: 17)')
    parser.add_argument('--preset', metavar='NAME', help="speed of the encoder, in its words (default: the encoder's)")
    parser.add_argument('--pix-fmt', metavar='NAME', help="samples, as yuv420p (default: the input's, where possible)")
    parser.add_argument('--start', type=seconds, metavar='TIME', help='begin here (seconds, MM:SS or HH:MM:SS)')
    parser.add_argument('--end', type=seconds, metavar='TIME', help='end before this time of the input')
    parser.add_argument(
        '--leave-out', nargs='+', default=[], metavar='WHAT', help='audio, subtitles, or numbers of streams'
    )
    parser.add_argument(
        '--segment',
        type=Number(1, 100_000),
        metavar='N',
        help='frames that are kept together, which an interruption costs at most (default: 96)',
    )
    parser.add_argument('--overwrite', action='store_true', help='redo an output that exists (default: keep it)')
    add_network_options(parser)


def run(args) -> int:
    need('video', 'ppsr video', 'av')
    from ppsr.video import check_video, upscale_video

    if exists(args.output) and not args.overwrite:
        print(f'{Path(args.output)} exists and is kept (--overwrite replaces it).')
        return 0
    encoded = {name: getattr(args, name) for name in ('codec', 'crf', 'preset', 'start', 'end')}
    check_video(args.input, args.output, **encoded)  # before the weights are loaded
    upscaler = make_upscaler(args, outscale=args.outscale, say=lambda text: print(text, file=sys.stderr))
    if upscaler.outscale != upscaler.scale:
        print(f'The network enlarges ×{upscaler.scale}; Lanczos makes ×{upscaler.outscale:g} of it.', file=sys.stderr)
    stats = upscale_video(
        upscaler,
        args.input,
        args.output,
        **encoded,
        pix_fmt=args.pix_fmt,
        leave_out=args.leave_out,
        **({} if args.segment is None else {'segment': args.segment}),
    )
    print(stats)
    return 1 if stats.damaged else 0
