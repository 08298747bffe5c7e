"""recipes/_images.py: images of every kind and depth keep what they show, or are refused."""
import io
import pickle

import _images
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.worker import ExceptionWrapper

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
COLOURS = np.stack([RAMP, RAMP.T, RAMP[::-1]], -1)


def encode(image, format='PNG', **kwargs):
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def pixels(data):
    image = _images.decode(data)
    assert image.mode == 'RGB'
    return np.asarray(image)


def gray(values):
    return np.repeat(values[..., None], 3, -1)


def orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'PPM', 'JPEG2000'])
def test_gray_images_of_16_bits_keep_their_content(format):
    file = encode(Image.fromarray(RAMP.astype(np.uint16) * 257), format)
    np.testing.assert_array_equal(pixels(file), gray(RAMP))


def test_values_of_16_bits_are_rounded():
    values = np.array([[0, 128, 129, 32767, 65406, 65407, 65535]], np.uint16)
    assert pixels(encode(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 1, 127, 254, 255, 255]


def test_big_endian_tiffs_are_read():
    image = Image.fromarray((RAMP.astype('>u2') * 257).astype('>u2'))
    assert image.mode == 'I;16B'
    np.testing.assert_array_equal(pixels(encode(image, 'TIFF')), gray(RAMP))


def test_values_of_12_bits_are_scaled_by_what_is_white_in_them():
    """Two values in three bytes, which Pillow reads and does not write."""
    packed = np.array([[0xfff000 >> 16, 0xfff000 >> 8 & 255, 0], [0x80, 0x0f, 0xff]], np.uint8).tobytes()
    entries = [(256, 4, 2), (257, 4, 2), (258, 3, 12), (259, 3, 1), (262, 3, 1), (273, 4, 122), (277, 3, 1),
               (278, 4, 2), (279, 4, len(packed))]
    header = b'II*\0' + (8).to_bytes(4, 'little') + len(entries).to_bytes(2, 'little')
    for tag, kind, value in entries:
        header += tag.to_bytes(2, 'little') + kind.to_bytes(2, 'little') + (1).to_bytes(4, 'little')
        header += value.to_bytes(4, 'little')
    file = (header + bytes(4)).ljust(122, b'\0') + packed
    assert pixels(file)[..., 0].tolist() == [[255, 0], [128, 255]]


@pytest.mark.parametrize('dtype, said', [(np.int32, 'integers of 32 bits'), (np.float32, 'floating-point numbers')])
def test_values_whose_range_nobody_knows_are_refused(dtype, said):
    with pytest.raises(ValueError, match=f'its values are {said}.* save it with 8 or 16 bits'):
        _images.decode(encode(Image.fromarray(RAMP.astype(dtype)), 'TIFF'))


@pytest.mark.parametrize('mode, format', [('1', 'PNG'), ('L', 'PNG'), ('P', 'PNG'), ('RGB', 'PNG'), ('CMYK', 'TIFF')])
def test_images_of_8_bits_and_fewer_are_as_pillow_converts_them(mode, format):
    image = Image.fromarray(COLOURS).convert(mode)
    np.testing.assert_array_equal(pixels(encode(image, format)), np.asarray(image.convert('RGB')))


@pytest.mark.parametrize('mode', ['RGBA', 'LA', 'P'])
def test_what_is_transparent_is_white_whatever_colour_it_hides(mode):
    image = Image.new('RGBA', (8, 8))  # black, and nothing of it to be seen
    image.paste((0, 0, 0, 255), (2, 2, 6, 6))
    expected = np.full((8, 8, 3), 255)
    expected[2:6, 2:6] = 0
    np.testing.assert_array_equal(pixels(encode(image.convert(mode))), expected)


def test_images_are_turned_upright():
    image = Image.fromarray(RAMP[:4, :6])
    exif = orientation(6)  # rotate by 90 degrees
    np.testing.assert_array_equal(pixels(encode(image, exif=exif)), gray(np.rot90(RAMP[:4, :6], -1)))


@pytest.mark.parametrize('fast, mode, options', [
    (True, 'RGB', {}), (True, 'RGB', dict(subsampling=0)), (True, 'RGB', dict(progressive=True)), (True, 'L', {}),
    (True, 'RGB', dict(exif=orientation(1))), (False, 'RGB', dict(exif=orientation(6))), (False, 'CMYK', {}),
    (False, 'RGB', dict(format='PNG')),
])
def test_torchcodecs_pixels_are_pillows(fast, mode, options, monkeypatch):
    data = encode(Image.fromarray(COLOURS).resize((65, 45)).convert(mode), **dict(dict(format='JPEG'), **options))
    by_pillow = _images.decode(data)
    decode_jpeg, calls = _images.decode_jpeg, []
    if decode_jpeg is None:
        pytest.skip('torchcodec is not installed')
    monkeypatch.setattr(_images, 'SMALL', 0)
    monkeypatch.setattr(_images, 'decode_jpeg', lambda data: calls.append(data) or decode_jpeg(data))
    found = _images.decode_pixels(data)
    assert found.dtype == torch.uint8 and bool(calls) == fast
    np.testing.assert_array_equal(found.permute(1, 2, 0), by_pillow)
    monkeypatch.setattr(_images, 'decode_jpeg', None)
    assert torch.equal(_images.decode_pixels(data), found)


@pytest.mark.parametrize('damage, error', [
    (lambda data: data[:len(data) // 2], 'truncated'),
    (lambda data: data[:-2], 'truncated'),
    (lambda data: data[:len(data) // 2] + b'\xff' * 50 + data[len(data) // 2 + 50:], 'broken data stream'),
    (lambda data: data[:2], 'cannot identify'),
    (lambda data: b'', 'cannot identify'),
])
def test_pillow_says_what_is_wrong_with_a_jpeg(damage, error, monkeypatch):
    monkeypatch.setattr(_images, 'SMALL', 0)
    with pytest.raises(OSError, match=error):
        _images.decode_pixels(damage(encode(Image.fromarray(COLOURS).resize((320, 240)), 'JPEG')))


def test_a_network_for_gray_images_sees_the_gray_values():
    np.testing.assert_array_equal(_images.decode(encode(Image.fromarray(RAMP))).convert('L'), RAMP)


def test_only_images_that_pillow_reads_have_a_suffix():
    found = _images.suffixes()
    assert {'.png', '.jpg', '.jpeg', '.webp', '.tif', '.tiff', '.bmp', '.gif', '.ppm', '.avif'} <= found
    assert not {'.pdf', '.h5', '.hdf', '.mpg', '.mpeg', '.eps', '.grib', '.txt'} & found


def test_an_error_of_a_loading_process_is_one_sentence():
    try:
        raise _images.BadImage('row 3: cannot be decoded')
    except _images.BadImage:
        wrapped = ExceptionWrapper(where='in DataLoader worker process 0')
    with pytest.raises(_images.BadImage) as caught:
        wrapped.reraise()
    assert str(caught.value) == 'row 3: cannot be decoded'
    assert str(pickle.loads(pickle.dumps(caught.value))) == 'row 3: cannot be decoded'
