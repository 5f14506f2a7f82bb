import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from tokar.data import images
from tokar.data.images import BadImageError, centre_crop, decode, decode_into, encode, resize_shorter
from tokar.errors import UserError

WHITE_ON_HALF = np.array([255, 127, 127], dtype=np.uint8)


def test_simplejpeg_and_pillow_agree_bit_for_bit(make):
    pytest.importorskip("simplejpeg")
    for seed in range(20):
        rng = np.random.default_rng(seed)
        height, width = rng.integers(9, 70, 2)
        data = make.save(make.picture(seed, height, width), quality=int(rng.integers(30, 100)), progressive=bool(seed % 2))
        np.testing.assert_array_equal(decode(data, "simplejpeg"), decode(data, "pil"))


def test_the_fast_path_fills_the_batch_or_says_no(make):
    pytest.importorskip("simplejpeg")
    data, batch = make.save(make.picture(3)), np.zeros((2, 24, 24, 3), dtype=np.uint8)
    assert decode_into(data, batch[1])
    np.testing.assert_array_equal(batch[1], decode(data, "pil"))
    assert not batch[0].any()
    assert not decode_into(make.save(make.picture(3, 30, 24)), batch[0])
    assert not decode_into(make.save(make.picture(3, 12, 24)), batch[0])
    assert not decode_into(make.save(make.picture(3), "PNG"), batch[0])
    assert not decode_into(data, batch[0], "pil")


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_grey(make, format):
    grey = Image.fromarray(make.picture(1)).convert("L")
    pixels = decode(make.save(grey, format))
    assert pixels.shape == (24, 24, 3)
    assert (pixels == pixels[:, :, :1]).all()
    np.testing.assert_allclose(pixels[:, :, 0].astype(int), np.asarray(grey), atol=12 if format == "JPEG" else 0)


def test_transparency_is_composited_on_white():
    rgba = np.zeros((2, 2, 4), dtype=np.uint8)
    rgba[..., 0], rgba[0, 0, 3], rgba[0, 1, 3], rgba[1, :, 3] = 255, 0, 128, 255
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "PNG")
    pixels = decode(buffer.getvalue())
    np.testing.assert_array_equal(pixels[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(pixels[0, 1], WHITE_ON_HALF)
    np.testing.assert_array_equal(pixels[1, 0], [255, 0, 0])


def test_a_transparent_palette_colour_is_white(make):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 1), 1)
    pixels = decode(make.save(image, "PNG", transparency=0))
    np.testing.assert_array_equal(pixels[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(pixels[1, 1], [200, 0, 0])


def test_cmyk(make):
    cmyk = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    pixels = decode(make.save(cmyk))
    assert pixels.shape == (16, 16, 3)
    assert pixels[..., 0].min() > 240
    assert pixels[..., 1:].max() < 15


def test_sixteen_bits_keep_their_high_byte(make):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    pixels = decode(make.save(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(pixels[0, :, 1], [0, 0, 1, 128, 255])


def test_float_images_are_refused(make):
    with pytest.raises(BadImageError, match="without a fixed range"):
        decode(make.save(Image.fromarray(np.ones((4, 4), dtype=np.float32)), "TIFF"))


@pytest.mark.parametrize(("orientation", "turns"), [(1, 0), (3, 2), (6, 3), (8, 1)])
@pytest.mark.parametrize("decoder", ["auto", "pil"])
def test_exif_rotation_is_applied(make, orientation, turns, decoder):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = make.picture(2, 16, 32)
    data = make.save(upright, exif=exif)
    plain = decode(make.save(upright), decoder)
    np.testing.assert_array_equal(decode(data, decoder), np.rot90(plain, turns))
    if orientation != 1:
        assert not decode_into(data, np.zeros((16, 32, 3), dtype=np.uint8))


def test_mirrored_exif_orientations(make):
    upright = make.picture(2, 16, 32)
    plain = decode(make.save(upright))
    expected = {2: plain[:, ::-1], 4: plain[::-1], 5: plain.swapaxes(0, 1), 7: plain[::-1, ::-1].swapaxes(0, 1)}
    for orientation, pixels in expected.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        np.testing.assert_array_equal(decode(make.save(upright, exif=exif)), pixels)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: b"", "empty"),
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[: len(data) // 2] + b"\xff\xd9", "truncated"),
        (lambda data: b"this is a text file, not an image", "not an image"),
        (lambda data: b"\xff\xd8\xff\xe0 not really", "not an image|broken"),
    ],
    ids=["zero-byte", "truncated", "missing part", "text", "jpeg magic only"],
)
def test_broken_jpegs_are_refused(make, damage, message):
    pytest.importorskip("simplejpeg")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)  # most bytes are pixels, few header
    with pytest.raises(BadImageError, match=message):
        decode(damage(make.save(noise)))


def test_broken_pngs_are_refused(make):
    data = make.save(make.picture(1), "PNG")
    for damaged in (data[: len(data) // 2], data[:60] + bytes(40) + data[100:]):
        with pytest.raises(BadImageError, match="broken"):
            decode(damaged)


def test_harmless_jpeg_oddities_are_read_by_pillow(make):
    data = make.save(make.picture(1))
    odd = data[:-2] + b"aaaa" + data[-2:]
    np.testing.assert_array_equal(decode(odd), decode(odd, "pil"))


def _png_header(width, height):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"")


@pytest.mark.parametrize("side", [9_500, 60_000])
def test_decompression_bombs_are_refused_from_their_header(side):
    with pytest.raises(BadImageError, match="more than 89,478,485 pixels"):
        decode(_png_header(side, side))


def test_jpeg_bombs_are_refused_before_decoding(make, monkeypatch):
    data = make.save(make.picture(1, 40, 40))
    monkeypatch.setattr(images, "MAX_PIXELS", 1599)
    for decoder in ("auto", "pil"):
        with pytest.raises(BadImageError, match="more than 1,599 pixels"):
            decode(data, decoder)


def test_a_missing_decoder_is_refused(monkeypatch):
    monkeypatch.setattr(images, "HAS_SIMPLEJPEG", False)
    with pytest.raises(UserError, match="pip install simplejpeg"):
        images.check_decoder("simplejpeg")
    with pytest.raises(UserError, match="unknown decoder"):
        images.check_decoder("turbo")


def test_without_simplejpeg_pillow_reads_the_same(make, monkeypatch):
    data = make.save(make.picture(4))
    expected = decode(data)
    monkeypatch.setattr(images, "HAS_SIMPLEJPEG", False)
    np.testing.assert_array_equal(decode(data), expected)


def _adm_reference(picture, size):
    """The published rule, by its words: halve with box filters, then one bicubic resize, then the middle."""
    image = Image.fromarray(picture)
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), resample=Image.BOX)
    scale = size / min(image.size)
    image = np.array(image.resize(tuple(round(side * scale) for side in image.size), resample=Image.BICUBIC))
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


@pytest.mark.parametrize("shape", [(100, 61), (31, 47), (257, 130), (16, 16), (17, 40)])
def test_resize_and_crop_follow_adm(make, shape):
    picture = make.picture(5, *shape)
    np.testing.assert_array_equal(centre_crop(resize_shorter(picture, 16), 16), _adm_reference(picture, 16))


def test_png_and_webp_round_trip(make):
    picture = make.picture(6)
    np.testing.assert_array_equal(decode(encode(picture, "png")), picture)
    for format in ("jpeg", "webp"):
        assert np.abs(decode(encode(picture, format, 95)).astype(int) - picture).mean() < 4
