"""What is not computed again of a video like a cartoon: frames that repeat, tiles that did not change.

    python benchmarks/video_repetition.py

draws a clip (a still background of flat shapes with a grain, a figure that walks on every second frame, a caption that
changes once), without loss and as libx264 stores it, and enlarges it in tiles of several sizes.
"""

import argparse
import tempfile
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from ppsr.pictures.upscaler import Upscaler
from ppsr.video import upscale_video

SIZE = 192, 108


def pictures(count: int):
    grain = np.random.default_rng(0).integers(-4, 5, (SIZE[1], SIZE[0], 1))
    for n in range(count):
        image = Image.new('RGB', SIZE, (150, 200, 240))
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 70, 192, 108), fill=(90, 160, 80))
        draw.polygon([(20, 70), (60, 20), (100, 70)], fill=(120, 110, 130), outline=(30, 30, 40))
        draw.text((8, 92), 'First line' if n < count // 2 else 'Second line', fill=(255, 255, 255))
        left = 100 + 3 * (n // 2)
        draw.ellipse((left, 40, left + 14, 54), fill=(250, 200, 160), outline=(30, 30, 40))
        draw.rectangle((left + 3, 54, left + 11, 80), fill=(220, 60, 60), outline=(30, 30, 40))
        yield (np.asarray(image) + grain).clip(0, 255).astype(np.uint8)


def write(path: Path, count: int, codec: str, options: dict) -> Path:
    with av.open(str(path), 'w') as out:
        stream = out.add_stream(codec, rate=24, options=options)
        stream.width, stream.height, stream.pix_fmt = *SIZE, 'yuv420p'
        for picture in pictures(count):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, 'rgb24').reformat(format='yuv420p')))
        out.mux(stream.encode(None))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('-n', '--model', default='PPATDLight_x2')
    parser.add_argument('--frames', type=int, default=24)
    parser.add_argument('--tiles', nargs='+', default=['0/0', '96/32', '64/16'], help='tile/overlap')
    args = parser.parse_args()
    print('| input | tile / overlap | repeated frames | tiles not computed again | GMACs | of these in full |')
    print('|---|---|---|---|---|---|')
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, codec, options in (
            ('lossless', 'ffv1', {}),
            ('libx264, crf 18', 'libx264', {'crf': '18'}),
            ('libx264, crf 28', 'libx264', {'crf': '28'}),
        ):
            source = write(folder / f'{name}.mkv', args.frames, codec, options)
            for words in args.tiles:
                tile, overlap = map(int, words.split('/'))
                upscaler = Upscaler.from_pretrained(args.model, tile=tile, tile_overlap=overlap)
                stats = upscale_video(upscaler, source, folder / 'out.mkv')
                cut = f'{tile} / {overlap}' if tile else 'whole'
                print(
                    f'| {name} | {cut} | {stats.repeated} of {stats.frames} | {stats.reused_share:.1%} | '
                    f'{stats.gmacs:.1f} | {stats.full_gmacs:.1f} |',
                    flush=True,
                )


if __name__ == '__main__':
    main()
