"""``ppsr compare``"""

import os
from pathlib import Path

from ppsr.archs.build import title_of
from ppsr.archs.masked import mask_module
from ppsr.cli.numbers import PIXELS
from ppsr.cli.upscale import add_network_options, make_upscaler
from ppsr.errors import UserError
from ppsr.images import as_rgb, format_of, read_picture, write_file


def configure(parser) -> None:
    parser.add_argument('-i', '--input', required=True, metavar='LQ', help='the small picture')
    parser.add_argument('--gt', help='its ground truth: PSNR and SSIM are measured (Y, scale pixels cropped)')
    parser.add_argument('-o', '--output', metavar='FILE', help='picture to write (default: INPUT_compare.png)')
    parser.add_argument('--dense', action='store_true', help='also run with nothing exempted: what Pure-Pass costs')
    parser.add_argument(
        '--crop',
        type=PIXELS,
        nargs=4,
        metavar=('X', 'Y', 'W', 'H'),
        help='show this part (input pixels); all is measured',
    )
    add_network_options(parser)


def run(args) -> int:
    from ppsr.pictures.compare import compare, table
    from ppsr.pictures.visualize import comparison, panels

    output = Path(args.output or f'{Path(args.input).stem}_compare.png')
    format_of(output)
    for source in filter(None, (args.input, args.gt)):
        if output.exists() and os.path.exists(source) and os.path.samefile(source, output):
            raise UserError(f'{output} is an input itself; choose another --output.')
    lq = as_rgb(read_picture(args.input).pixels)
    gt = None if args.gt is None else as_rgb(read_picture(args.gt).pixels)
    if args.crop:
        x, y, width, height = args.crop
        if min(x, y) < 0 or min(width, height) < 1 or x + width > lq.shape[1] or y + height > lq.shape[0]:
            raise UserError(f'--crop {x} {y} {width} {height} is not inside the input ({lq.shape[1]}×{lq.shape[0]}).')

    upscaler = make_upscaler(args)
    name, mask = title_of(upscaler.net), mask_module(upscaler.net)
    upscalers = {name: upscaler}
    if args.dense:
        if args.no_pure_pass or mask is None:
            raise UserError('--dense compares with a network that runs Pure-Pass; this one exempts nothing.')
        for option in ('mask', 'threshold', 'scope', 'max_loss', 'saving', 'exact'):
            setattr(args, option, None)
        args.no_pure_pass = True
        upscalers[f'{name}, dense'] = make_upscaler(args)
    results = compare(lq, upscalers, gt)
    print(table(results))

    bicubic, ours = results[:2]
    if gt is not None:
        gt = gt[: ours.image.shape[0], : ours.image.shape[1]]
    details = {'bicubic': bicubic.detail, 'sr': ours.detail}
    pictures = comparison(
        lq, bicubic.image, ours.image, ours.stats.mask, mask, gt, name, details, args.crop and tuple(args.crop)
    )
    write_file(output, panels(pictures, f'{Path(args.input).name}, ×{upscaler.scale}'))
    print(f'{output} written.')
    return 0
