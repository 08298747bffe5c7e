"""Reading an image file: whatever its kind and depth, it becomes red, green and blue of 8 bits, upright.

Training, evaluation and prediction read images by the same function, so that they see the same pixels.
"""
import io
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageFile, ImageOps
from torch import Tensor

try:
    from torchcodec.decoders import decode_jpeg
except (ImportError, OSError, RuntimeError):  # not installed, or made for another PyTorch
    decode_jpeg = None

# Formats whose files of mode 'I' (32 bits) hold values of 16 bits; in those of other formats they can have any range.
SIXTEEN_BITS = ('PNG', 'PPM')
BITS_PER_SAMPLE = 258  # tag of TIFF
SMALL = 2 ** 13  # bytes: Pillow decodes such a JPEG in the time that it takes to read the header before torchcodec can


class BadImage(ValueError):
    """An image that cannot be read; says which one, and why."""

    def __init__(self, message: str):
        # Raised anew where a loading process raised it, with the traceback in front: the sentence is enough.
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


def decode(data: bytes) -> Image.Image:
    """An image file -> an image of mode 'RGB', upright.

    Values of 16 bits are divided by 257, so that black and white stay what they are. What is transparent becomes white.

    Raises:
        ValueError: The values have no range that is known: floating-point numbers, integers of 32 bits.
        Exception: Whatever Pillow raises for a file that it can't read.
    """
    with Image.open(io.BytesIO(data)) as image:
        file, image = image, ImageOps.exif_transpose(image)
    if image.mode.startswith('I;16') or image.mode == 'I' and file.format in SIXTEEN_BITS:
        white = largest_value(file)
        values = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((values * 255 + white // 2) // white).astype(np.uint8))
    if image.mode in ('I', 'F'):
        kind = 'floating-point numbers' if image.mode == 'F' else 'integers of 32 bits'
        raise ValueError(f'its values are {kind}, of which it is not known what is white: save it with 8 or 16 bits')
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def decode_pixels(data: bytes) -> Tensor:
    """The same as (3, H, W) uint8: JPEGs by torchcodec where it is installed, which is faster, to the same numbers.

    The channels of a pixel are next to each other in memory, which resizing is fast for.
    """
    pixels = decode_upright_jpeg(data) if decode_jpeg and len(data) > SMALL else None
    return torch.from_numpy(np.array(decode(data))).permute(2, 0, 1) if pixels is None else pixels


def decode_upright_jpeg(data: bytes) -> Tensor | None:
    """None where Pillow is to decode it, or to say what is wrong with it."""
    with Image.open(io.BytesIO(data)) as image:  # reads the header alone
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
        if image.format != 'JPEG' or image.mode not in ('RGB', 'L') or is_turned:
            return None
    try:
        return decode_jpeg(data)
    except RuntimeError:
        return None


def largest_value(file: ImageFile.ImageFile) -> int:
    """What is white in a file of 16 bits. Pillow leaves values of 12 bits as they are in TIFF alone."""
    bits = file.tag_v2.get(BITS_PER_SAMPLE, (16,))[0] if file.format == 'TIFF' else 16
    return 2 ** bits - 1


def suffixes() -> set[str]:
    """Those of image files that Pillow reads. Others it only writes, or knows as films and containers."""
    return {
        suffix for suffix, format in Image.registered_extensions().items()
        if format in Image.OPEN and Image.MIME.get(format, '').startswith('image/')}


def read_file(path: Path) -> Image.Image:
    """The image in a file, see `decode`.

    Raises:
        BadImage: It can't be read.
    """
    try:
        return decode(path.read_bytes())
    except Exception as error:  # Pillow's plugins raise what they like
        raise BadImage(f'image {path} cannot be decoded: {error}') from error
