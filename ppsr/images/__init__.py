"""Images: as arrays and tensors (:mod:`arrays`), read (:mod:`decode`), written (:mod:`encode`, :mod:`png`)."""

from ppsr.images.arrays import LUMA, MODES, as_rgb, to_8_bits, to_image, to_tensor, turn
from ppsr.images.decode import (
    decode_rgb,
    describe_conversion,
    from_pil,
    image_size,
    read_header,
    read_picture,
    to_pil,
)
from ppsr.images.encode import atomic_file, check_format, losses, write_file, write_picture, write_png
from ppsr.images.formats import FORMATS, IMAGE_SUFFIXES, format_of, is_special, list_images
from ppsr.images.picture import MAX_PIXELS, Header, Picture

__all__ = [
    'FORMATS',
    'IMAGE_SUFFIXES',
    'LUMA',
    'MODES',
    'MAX_PIXELS',
    'Header',
    'Picture',
    'as_rgb',
    'atomic_file',
    'check_format',
    'decode_rgb',
    'describe_conversion',
    'format_of',
    'from_pil',
    'image_size',
    'is_special',
    'list_images',
    'losses',
    'read_header',
    'read_picture',
    'to_8_bits',
    'to_image',
    'to_pil',
    'to_tensor',
    'turn',
    'write_file',
    'write_picture',
    'write_png',
]
