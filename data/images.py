"""Image bytes to pixels: `[H, W, 3]` uint8 RGB whatever the file holds, or a one-line refusal; and the resizing of ADM."""

from __future__ import annotations

import io
import warnings
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..errors import UserError

try:
    import simplejpeg
except ImportError:  # an optional extra: Pillow does its work, slower
    simplejpeg = None

Decoder = Literal["auto", "simplejpeg", "pil"]
Picture = Image.Image
MAX_PIXELS = 89_478_485
"""Larger images are refused as decompression bombs: Pillow's own warning level, a quarter of a gigabyte in 24-bit pixels."""

HAS_SIMPLEJPEG = simplejpeg is not None
EXIF_ORIENTATION = 0x0112
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImageError(UserError):
    """Bytes that are not a usable image."""


def check_decoder(decoder: Decoder) -> None:
    """Refuse a decoder that is not installed.

    Raises:
        UserError: `simplejpeg` is asked for and missing, or the name is unknown.
    """
    if decoder not in ("auto", "simplejpeg", "pil"):
        raise UserError(f"unknown decoder {decoder!r}", fix="choose auto, simplejpeg or pil")
    if decoder == "simplejpeg" and not HAS_SIMPLEJPEG:
        raise UserError("simplejpeg is not installed", fix="pip install simplejpeg, or choose decoder=auto")


def decode(data: bytes, decoder: Decoder = "auto") -> np.ndarray:
    """Pixels of an image file.

    Ordinary JPEGs (grey or YCbCr) take simplejpeg, everything else Pillow; both give the same bits for them. An EXIF
    orientation is applied, transparency is composited on white, 16-bit channels keep their high byte, CMYK goes
    through Pillow's conversion, an animation gives its first frame.

    Args:
        data: the file's bytes.
        decoder: `auto` (simplejpeg where installed), `simplejpeg`, or `pil`. Pillow alone does not notice a JPEG whose
            missing end was replaced by an end marker.

    Returns:
        `[H, W, 3]` uint8 RGB.

    Raises:
        BadImageError: empty, truncated, not an image, or more than `MAX_PIXELS`.
    """
    if decoder != "pil" and HAS_SIMPLEJPEG and data[:3] == b"\xff\xd8\xff" and not _turned(data):
        pixels = _decode_jpeg(data)
        if pixels is not None:
            return pixels
    return np.asarray(to_rgb(open_picture(data)))


def decode_into(data: bytes, out: np.ndarray, decoder: Decoder = "auto") -> bool:
    """Decode a JPEG of exactly the right size into its place in a batch, the fast path.

    Args:
        data: the file's bytes.
        out: `[H, W, 3]` uint8, contiguous; its content is undefined after a False.
        decoder: as in `decode`.

    Returns:
        True if `out` now holds the pixels; False if the image must go through `decode`.
    """
    if decoder == "pil" or not HAS_SIMPLEJPEG or data[:3] != b"\xff\xd8\xff" or data.find(b"Exif\0\0", 0, 65536) >= 0:
        return False
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", False, False, 0, 0, 1.0, out)
    except ValueError:
        return False
    return pixels.shape == out.shape


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    try:
        height, width, colour, _ = simplejpeg.decode_jpeg_header(data)
        _check_pixels(width, height)
        # CMYK and rare colour spaces are Pillow's job
        return simplejpeg.decode_jpeg(data, "RGB") if colour in ("YCbCr", "Gray", "RGB") else None
    except ValueError as error:
        # Pillow would show the missing part in grey; harmless warnings such as extraneous bytes go on to Pillow
        if "remature end" in str(error):
            raise BadImageError("the image is truncated") from error
        return None


def open_picture(data: bytes) -> Picture:
    """A fully loaded Pillow image, in whatever mode the file has.

    Raises:
        BadImageError: empty, truncated, not an image, or more than `MAX_PIXELS`.
    """
    if not data:
        raise BadImageError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            picture = Image.open(io.BytesIO(data))
            _check_pixels(*picture.size)
            picture.load()
    except Image.DecompressionBombError as error:
        raise BadImageError(f"the image has more than {MAX_PIXELS:,} pixels") from error
    except Image.UnidentifiedImageError as error:
        raise BadImageError("not an image that can be read") from error
    except BadImageError:
        raise
    except Exception as error:  # Pillow's parsers raise whatever a damaged file provokes
        raise BadImageError(f"the image is broken ({error})".replace("\n", " ")) from error
    return picture


def to_rgb(picture: Picture) -> Picture:
    """Upright RGB: orientation applied, transparency on white, 16 bits to 8 (high byte), other modes converted.

    Raises:
        BadImageError: pixel values have no fixed range (float or 32-bit integer images).
    """
    turn = _TURN.get(_orientation(picture))
    if picture.mode.startswith("I") or picture.mode == "F":
        rgb = _from_16_bits(picture)
    elif "A" in picture.mode or "a" in picture.mode or "transparency" in picture.info:
        rgba = picture.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    else:
        rgb = picture if picture.mode == "RGB" else picture.convert("RGB")
    return rgb if turn is None else rgb.transpose(turn)


def is_ordinary(data: bytes, picture: Picture) -> bool:
    """The file may be kept as it is: an upright 8-bit RGB JPEG or PNG without transparency."""
    if picture.mode != "RGB" or "transparency" in picture.info or _orientation(picture) != 1:
        return False
    # byte 24 of a PNG is the bit depth: Pillow shows 16-bit colour as RGB too
    return picture.format == "JPEG" or (picture.format == "PNG" and data[24] == 8)


def encode(pixels: np.ndarray, format: Literal["png", "jpeg", "webp"], quality: int = 95) -> bytes:
    """An image file of `[H, W, 3]` uint8 pixels; JPEG without chroma subsampling."""
    buffer = io.BytesIO()
    options: dict[str, Any] = {"png": {}, "jpeg": {"quality": quality, "subsampling": 0}, "webp": {"quality": quality}}[format]
    Image.fromarray(pixels).save(buffer, format, **options)
    return buffer.getvalue()


def resize_shorter(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize so that the shorter side is `size`: halve by box while it is at least 2·size, then bicubic.

    The rule of ADM's data loader (openai/guided-diffusion, `image_datasets.py`), which GigaTok and LlamaGen follow.

    Args:
        pixels: `[H, W, 3]` uint8.
        size: shorter side in pixels.
    """
    if min(pixels.shape[:2]) == size:
        return pixels
    picture = Image.fromarray(pixels)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    target = (round(picture.width * scale), round(picture.height * scale))
    return np.asarray(picture.resize(target, Image.Resampling.BICUBIC))


def centre_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """The middle `[size, size, 3]` of an image; odd margins leave the larger part at the bottom and right (ADM)."""
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadImageError(f"the image has more than {MAX_PIXELS:,} pixels ({width}×{height})")


def _turned(data: bytes) -> bool:
    return b"Exif\0\0" in data[:65536] and _orientation(Image.open(io.BytesIO(data))) != 1


def _orientation(picture: Picture) -> int:
    try:
        return int(picture.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:  # a damaged EXIF block does not make the pixels bad
        return 1


def _from_16_bits(picture: Picture) -> Picture:
    values = np.asarray(picture)
    if values.dtype.kind == "f" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
        raise BadImageError(f"pixel values without a fixed range (mode {picture.mode})")
    return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
