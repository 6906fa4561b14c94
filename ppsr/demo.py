"""The main job, small: prepare data, test the shipped weights, train from them, test again, draw what happened."""

import signal
import time
from pathlib import Path

from basicsr.metrics import calculate_metric

from ppsr.archs.build import build_masked
from ppsr.archs.masked import MaskedNetwork
from ppsr.data.bicubic import imresize_bicubic
from ppsr.images import decode_rgb, read_picture, write_file
from ppsr.shipped import options_file
from ppsr.weights import resolve

__all__ = ['run_demo']

OPTIONS = 'options/demo.yml'
COLUMNS = ('PSNR', 'SSIM', 'pure pixels', 'GMACs', 'GMACs saved')


def run_demo() -> signal.Signals | None:
    """Run the demo in the current folder (datasets/, experiments/, results/); prints where it is, ends with a table.

    Returns:
        None, or the signal that ended the training early.

    Raises:
        UserError: scikit-image's photographs are not there, or something cannot be written.
    """
    from ppsr.data.demo import make_demo_data
    from ppsr.training.test import test_pipeline
    from ppsr.training.train import train_pipeline

    start = time.time()
    _say(1, 'Data: photographs that scikit-image ships, LR by exact bicubic')
    make_demo_data('datasets')

    _say(2, 'Test: bicubic and the shipped weights on photographs that they have not seen')
    shipped = _options('demo_shipped', resolve())
    dataset = next(iter(shipped['datasets'].values()))
    rows = {'bicubic ×4': _bicubic(dataset, shipped)}
    rows['PP-ATD-light ×4, shipped weights'] = test_pipeline(shipped)[dataset['name']]

    _say(3, f'Train: a few steps from these weights, with {OPTIONS}')
    opt = _options('demo', None)
    steps = opt['train']['total_iter']
    stopped_by = train_pipeline(opt, options_file(OPTIONS))
    if stopped_by is not None:
        return stopped_by

    _say(4, 'Test: the weights just trained')
    trained = _options('demo_trained', Path('experiments', 'demo', 'models', 'net_g_latest.pth'))
    rows[f'PP-ATD-light ×4, {steps} steps later'] = test_pipeline(trained)[dataset['name']]

    _say(5, 'Draw: enlarged pictures and masks')
    pictures = _draw(
        dataset, build_masked(trained['network_g']), Path(trained['path']['visualization'], dataset['name'])
    )

    print(
        f'\nHeld-out photographs ({dataset["name"]}), means; PSNR and SSIM on Y. {time.time() - start:.0f} s in all.\n'
    )
    print(_table(rows))
    print(f'\nEnlarged pictures: {trained["path"]["visualization"]}/{dataset["name"]}')
    print(f'Mask overlays and comparisons: {pictures}')
    print(f'Trained weights and log: {opt["path"]["experiments_root"]}')
    return None


def _say(step: int, text: str) -> None:
    print(f'\n[{step}/5] {text}', flush=True)


def _options(name: str, weights: Path | None) -> dict:
    """Options of the training (no weights given), or of a test of these weights on the validation set."""
    from ppsr.data.checks import check_datasets
    from ppsr.training.options import load_options

    force = []
    if weights is not None:
        force = ['datasets:train=~', f'name={name}', f'path:pretrain_network_g={weights}', 'val:save_img=true']
    opt = load_options(options_file(OPTIONS), is_train=weights is None, force_yml=force)
    check_datasets(opt)
    return opt


def _bicubic(dataset: dict, opt: dict) -> dict[str, float]:
    """Metrics of MATLAB's bicubic enlargement, the means over the data set."""
    sums = dict.fromkeys(opt['val']['metrics'], 0.0)
    paths = sorted(Path(dataset['dataroot_lq']).glob('*.png'))
    for path in paths:
        sr = imresize_bicubic(decode_rgb(path), opt['scale'], up=True)
        gt = decode_rgb(Path(dataset['dataroot_gt'], path.name))[: sr.shape[0], : sr.shape[1]]
        for metric, options in opt['val']['metrics'].items():
            sums[metric] += calculate_metric({'img': sr[..., ::-1], 'img2': gt[..., ::-1]}, dict(options))
    return {metric: value / len(paths) for metric, value in sums.items()}


def _draw(dataset: dict, net: MaskedNetwork, enlarged: Path) -> Path:
    """An overlay of the mask and a comparison for every picture, beside the enlarged ones."""
    from ppsr.pictures.visualize import comparison, mask_overlay, network_mask, panels

    folder = enlarged.parent / f'{dataset["name"]}_masks'
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(dataset['dataroot_lq']).glob('*.png')):
        lq = read_picture(path).pixels
        sr = read_picture(next(enlarged.glob(f'{path.stem}_*.png'))).pixels
        gt = read_picture(Path(dataset['dataroot_gt'], path.name)).pixels[: sr.shape[0], : sr.shape[1]]
        pure = network_mask(lq, net.pure_pass, net.multiple)
        write_file(folder / f'{path.stem}_mask.png', mask_overlay(lq, pure, net.pure_pass))
        bicubic = imresize_bicubic(lq, sr.shape[0] // lq.shape[0], up=True)
        write_file(folder / f'{path.stem}_comparison.png', panels(comparison(lq, bicubic, sr, pure, net.pure_pass, gt)))
    return folder


def _table(rows: dict[str, dict[str, float]]) -> str:
    def cells(values: dict[str, float]) -> list[str]:
        result = [f'{values["psnr"]:.2f} dB', f'{values["ssim"]:.4f}']
        if 'gmacs' not in values:
            return [*result, '–', '–', '–']
        return [
            *result,
            f'{values["pure_percent"]:.1f} %',
            f'{values["gmacs"]:.2f}',
            f'{values["gmacs_saved_percent"]:.1f} %',
        ]

    lines = [['', *COLUMNS], *([name, *cells(values)] for name, values in rows.items())]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return '\n'.join(
        line[0].ljust(widths[0]) + ''.join('  ' + c.rjust(w) for c, w in zip(line[1:], widths[1:])) for line in lines
    )
