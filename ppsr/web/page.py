"""The page: a picture in, before and after with a slider, the mask, what was saved, and the file to take away.

Everything happens on this machine: no analytics, no sharing, no fonts or scripts of other hosts. What the page offers
is offered to whoever reaches its address, so that limits are kept here and not in the browser.
"""

import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ppsr.archs.masked import mask_module
from ppsr.errors import UserError
from ppsr.extras import need
from ppsr.images import as_rgb, read_header, to_8_bits, write_file
from ppsr.pictures.upscaler import Upscaler
from ppsr.pictures.visualize import enlarge_nearest, mask_overlay
from ppsr.weights import list_pretrained

__all__ = ['Limits', 'Result', 'enlarge', 'make_page', 'serve']

AUTOMATIC = 'of the factor'  # weights
AS_SHIPPED, MAX_LOSS, SAVING, EXACT = 'as the paper says', 'at most so many mdB lost', 'so many percent saved', 'exact'
FACTORS = (2, 3, 4)
SHOWN = 2048  # pixels of a side of what the slider shows; of larger results the middle

logger = logging.getLogger('ppsr')


@dataclass(frozen=True)
class Limits:
    """What one visitor may ask for.

    Attributes:
        upload: bytes of a file.
        megapixels: of a picture, before it is enlarged.
    """

    upload: int = 64 * 2**20
    megapixels: float = 4.0


@dataclass(frozen=True)
class Result:
    """Files of one picture.

    Attributes:
        before, after: what the slider shows, of one size.
        mask: overlay of the mask, or None.
        file: the enlarged picture as it is, PNG.
        text: what was done, Markdown.
    """

    before: Path
    after: Path
    mask: Path | None
    file: Path
    text: str


def enlarge(
    source: Path,
    folder: Path,
    weights: str | Path | None = None,
    factor: float | None = None,
    how: Mapping | None = None,
    limits: Limits = Limits(),
    device: str = 'auto',
    max_memory: str | None = None,
    on_tile=None,
) -> Result:
    """Enlarge one picture into files of a new folder.

    Args:
        source: the picture; its name gives that of the result.
        folder: the results lie in a new folder in it.
        weights, factor, device, max_memory: as for :meth:`Upscaler.from_pretrained`.
        how: its `max_loss`, `saving` or `exact`.
        limits: on the size of the picture.
        on_tile: is called with (tiles done, tiles in all).

    Raises:
        UserError: too large, not a picture, or anything else that the upscaler says.
    """
    source = Path(source)
    if source.stat().st_size > limits.upload:
        raise UserError(f'{source.name} has more than the {limits.upload / 2**20:g} MiB that this page takes.')
    height, width = read_header(source).upright
    if width * height > 1e6 * limits.megapixels:
        raise UserError(
            f'{source.name} has {width}×{height} pixels; this page takes {limits.megapixels:g} megapixels (start it '
            'with --max-megapixels to allow more, or use ppsr upscale).'
        )
    said: list[str] = []
    options = dict(how or {}, device=device, outscale=factor, max_memory=max_memory, say=said.append)
    upscaler = Upscaler.from_pretrained(weights, **options)
    folder = Path(tempfile.mkdtemp(dir=folder))
    picture = upscaler.read(source)
    file = folder / f'{source.stem}_out.png'
    stats = upscaler.upscale_file(picture, file, on_tile=on_tile)
    said[:0] = [f'{note[:1].upper()}{note[1:]}.' for note in picture.notes]

    after = as_rgb(to_8_bits(upscaler.read(file).pixels))
    before = np.asarray(Image.fromarray(as_rgb(to_8_bits(picture.pixels))).resize(after.shape[1::-1], Image.BICUBIC))
    shown = [_save(folder / f'{name}.png', _middle(image)) for name, image in (('before', before), ('after', after))]
    mask = None
    if stats.mask is not None:
        overlay = mask_overlay(picture.pixels, stats.mask, mask_module(upscaler.net))
        mask = _save(folder / 'mask.png', enlarge_nearest(overlay, max(1, min(4, SHOWN // max(overlay.shape[:2])))))
    return Result(*shown, mask, file, _describe(upscaler, stats, said))


def _describe(upscaler: Upscaler, stats, said: list[str]) -> str:
    lines = [
        f'{stats.input_size[0]}×{stats.input_size[1]} → {stats.output_size[0]}×{stats.output_size[1]} in '
        f'{stats.seconds:.1f} s.'
    ]
    if stats.mask is not None:
        lines.append(f'{stats.pure_share:.1%} of the pixels are pure; {stats.saved_share:.1%} of the work was saved.')
    else:
        lines.append('Nothing was exempt.')
    if upscaler.choice is not None:
        lines.append(str(upscaler.choice))
    if max(stats.output_size) > SHOWN:
        lines.append(f'The slider shows the middle, {SHOWN} pixels a side at most; the file is whole.')
    return '\n\n'.join([*lines, *said])


def _middle(image: np.ndarray) -> np.ndarray:
    top, left = (max(0, side - SHOWN) // 2 for side in image.shape[:2])
    return image[top : top + SHOWN, left : left + SHOWN]


def _save(path: Path, image: np.ndarray) -> Path:
    write_file(path, np.ascontiguousarray(image))
    return path


def wish_of(kind: str, amount: float) -> dict:
    """The dial's wish of what the page says."""
    if kind == MAX_LOSS:
        return {'max_loss': amount / 1000}
    if kind == SAVING:
        return {'saving': amount}
    return {'exact': True} if kind == EXACT else {}


def make_page(
    folder: Path,
    files: Mapping[str, Path] | None = None,
    limits: Limits = Limits(),
    device: str = 'auto',
    max_memory: str | None = None,
):
    """The Gradio page.

    Args:
        folder: for results; whoever makes the page removes it.
        files: further weights beside the shipped ones, by the name that the page shows.
        limits, device, max_memory: as for :func:`enlarge`.

    Raises:
        UserError: Gradio is not installed.
    """
    (gr,) = need('web', 'ppsr web', 'gradio')
    busy = threading.Lock()  # Gradio's limit is on its queue alone
    known: dict[str, Path | None] = {AUTOMATIC: None} | list_pretrained() | dict(files or {})

    def run(upload, weights, factor, kind, amount, progress=gr.Progress()):  # noqa: B008, Gradio's way
        if upload is None:
            raise gr.Error('Choose a picture first.', print_exception=False)
        if None in (weights, factor, kind):  # the page cannot say so, a program that talks to it can
            raise gr.Error('Choose weights, a factor and how fast.', print_exception=False)
        try:
            progress(0, desc='enlarging')
            path, scale = known[weights], None if known[weights] else float(factor)
            with busy:
                result = enlarge(
                    Path(upload),
                    folder,
                    path,
                    scale,
                    wish_of(kind, float(amount or 0)),
                    limits,
                    device,
                    max_memory,
                    lambda done, total: progress(done / total, desc=f'tile {done} of {total}'),
                )
        except UserError as error:
            said = str(error).replace(upload, Path(upload).name)  # where files lie here is no visitor's business
            raise gr.Error(said if path is None else said.replace(str(path), weights), print_exception=False) from None
        except Exception as error:
            logger.exception('ppsr web: a picture failed')
            raise gr.Error('This failed for a reason of the program; its terminal says more.') from error
        paths = result.before, result.after, result.mask, result.file
        before, after, mask, file = (None if path is None else str(path) for path in paths)
        return (before, after), mask, file, result.text

    with gr.Blocks(title='ppsr', analytics_enabled=False, delete_cache=(3600, 86400)) as page:
        gr.Markdown('# ppsr\nEnlarges a picture on this machine; nothing leaves it.')
        with gr.Row():
            with gr.Column(scale=1):
                upload = gr.File(label='picture', elem_id='upload')
                weights = gr.Dropdown(list(known), value=AUTOMATIC, label='weights')
                factor = gr.Dropdown([str(f) for f in FACTORS], value='4', label='factor (weights: of the factor)')
                kinds = [AS_SHIPPED, MAX_LOSS, SAVING, EXACT]
                kind = gr.Radio(kinds, value=AS_SHIPPED, label='how fast (×4 weights)')
                amount = gr.Number(20, label='mdB, or percent', minimum=0, maximum=10000)
                button = gr.Button('Enlarge', variant='primary', elem_id='enlarge')
                text = gr.Markdown(elem_id='text')
                file = gr.File(label='result', interactive=False, elem_id='result')
            with gr.Column(scale=3):
                slider = gr.ImageSlider(label='before and after', interactive=False, format='png', elem_id='slider')
                label = 'mask: what is coloured was exempt'
                mask = gr.Image(label=label, interactive=False, format='png', buttons=['download'])  # no 'share'
        inputs, outputs = [upload, weights, factor, kind, amount], [slider, mask, file, text]
        for component in inputs:
            component.async_move_resource_to_block_cache = _uploaded
        button.click(run, inputs, outputs, concurrency_limit=1, api_name='enlarge')
    # no way around the queue, which holds 20; whoever makes the page is its only caller
    return page.queue(max_size=20, api_open=False)


async def _uploaded(path: str | Path | None) -> str | None:
    """A file of a visitor's message, which has been uploaded before. Gradio would download one that is an address: the
    visitor's wish, but it would be this machine that asks other hosts."""
    (gr,) = need('web', 'ppsr web', 'gradio')
    if path is not None and '://' in str(path):
        raise gr.Error('This page takes uploaded pictures, no addresses.', print_exception=False)
    return None if path is None else str(path)


def serve(
    host: str,
    port: int,
    files: Mapping[str, Path] | None = None,
    limits: Limits = Limits(),
    device: str = 'auto',
    max_memory: str | None = None,
    browser: bool = False,
) -> None:
    """Serve the page until the process is told to end; uploads and results are removed then.

    Raises:
        UserError: the address cannot be served, or Gradio is not installed.
    """
    _check_address(host, port)
    with tempfile.TemporaryDirectory(prefix='ppsr-web-') as folder:
        os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'  # these are read when Gradio is imported
        os.environ['HF_HUB_DISABLE_TELEMETRY'] = '1'
        os.environ['GRADIO_TEMP_DIR'] = folder
        os.environ['NO_PROXY'] = os.environ['no_proxy'] = '*'  # Gradio asks its own page whether it is there
        (gr,) = need('web', 'ppsr web', 'gradio')
        # results lie where Gradio keeps uploads: no second copy, and both are gone after a day
        page = make_page(Path(folder), files, limits, device, max_memory)
        fonts = dict(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])  # none of another host
        try:
            page.launch(
                server_name=f'[{host}]' if ':' in host else host,
                server_port=port,
                share=False,
                inbrowser=browser,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=limits.upload,
                theme=gr.themes.Default(**fonts),
                footer_links=[],
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
            )
            print(f'http://{"[" + host + "]" if ":" in host else host}:{port} (Ctrl-C ends it)', flush=True)
            page.block_thread()
        except OSError as error:
            raise UserError(f'{host}:{port} cannot be served ({error.strerror or error}).') from error
        finally:
            _deaf()  # terminals and launchers say it twice, and the files have to go
            page.close(verbose=False)


def _deaf() -> None:
    if threading.current_thread() is threading.main_thread():
        for name in ('SIGINT', 'SIGTERM', 'SIGHUP'):  # the last one is not on Windows
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)


def _check_address(host: str, port: int) -> None:
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:  # the second: no name of a host can be so
        reason = (getattr(error, 'strerror', None) or str(error)).lower()
        raise UserError(f'{host}:{port} cannot be served ({reason}); choose another --host or --port.') from None
