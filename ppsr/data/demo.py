"""The demo's data sets, from the photographs that scikit-image ships inside its package: nothing is downloaded.

``demo_train`` has ten pictures (photographs and photographed textures), ``demo_val`` three others, in the usual layout
(:mod:`ppsr.data.layout`). The two halves of scikit-image's stereo pair show one scene and are both for training.
"""

import importlib.util
from pathlib import Path

from ppsr.data.layout import DataSetFolders, Source
from ppsr.data.prepare import prepare_dataset
from ppsr.errors import UserError
from ppsr.images import decode_rgb, list_images, write_png

__all__ = ['TRAIN', 'VAL', 'make_demo_data']

TRAIN = (
    'brick.png',
    'camera.png',
    'coins.png',
    'grass.png',
    'gravel.png',
    'hubble_deep_field.jpg',
    'moon.png',
    'motorcycle_left.png',
    'motorcycle_right.png',
    'rocket.jpg',
)
# (top, left, height, width) of what is taken: small enough that a CPU validates in seconds, with the subject in it
VAL = {
    'astronaut.png': (0, 64, 400, 400),
    'chelsea.png': (0, 0, 300, 448),
    'coffee.png': (0, 100, 400, 400),
}


def make_demo_data(root: str | Path, scale: int = 4) -> None:
    """Make ``<root>/demo_train`` and ``<root>/demo_val``: HR and exact LR. What is already there is left alone.

    Raises:
        UserError: this scikit-image lacks one of the photographs, or the disk is full or may not be written.
    """
    spec = importlib.util.find_spec('skimage')
    if spec is None or spec.origin is None:
        raise UserError('The demo takes its photographs from scikit-image: pip install scikit-image.')
    photographs = Path(spec.origin).parent / 'data'
    missing = sorted({*TRAIN, *VAL} - set(list_images(photographs)))
    if missing:
        raise UserError(f'{photographs} lacks {", ".join(missing)}: install scikit-image from PyPI (0.19 to 0.26).')
    for name, boxes in (('demo_train', dict.fromkeys(TRAIN)), ('demo_val', VAL)):
        folders = DataSetFolders(Path(root) / name)
        try:
            folders.hr.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f'{folders.hr} cannot be made: {error.strerror}.') from error
        sources = []
        for file_name, box in boxes.items():
            source = Source(Path(file_name).stem, folders.hr / f'{Path(file_name).stem}.png')
            if not source.path.exists():
                img = decode_rgb(photographs / file_name)
                if box is not None:
                    top, left, height, width = box
                    img = img[top : top + height, left : left + width]
                write_png(source.path, img)
            sources.append(source)
        prepare_dataset(folders, sources, [scale])
