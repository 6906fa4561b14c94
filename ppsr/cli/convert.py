"""``ppsr convert``"""

from pathlib import Path

from ppsr.cli.numbers import Number
from ppsr.errors import UserError


def configure(parser) -> None:
    parser.add_argument('-i', '--input', required=True, metavar='FILE', help='weights: .pth or .safetensors')
    parser.add_argument('-o', '--output', required=True, metavar='FILE', help='.safetensors or .pth')
    parser.add_argument('--arch', help='record this arch (default: as the file says, else what its keys are of)')
    parser.add_argument(
        '--category-size', type=Number(1, 2**16), metavar='N', help='where the file does not say (default: 128)'
    )
    parser.add_argument('--key', choices=('params_ema', 'params'), help='which weights of a .pth (default: params_ema)')
    parser.add_argument('--overwrite', action='store_true', help='replace an output that exists')


def run(args) -> int:
    from ppsr.convert import convert

    source, target = Path(args.input), Path(args.output)
    if target.exists() and not args.overwrite:
        raise UserError(f'{target} exists already; choose another name or give --overwrite.')
    for line in convert(source, target, args.arch, args.category_size, args.key):
        print(line)
    return 0
