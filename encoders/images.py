"""The only place that reads pixels: JPEG, PNG, WebP and DICOM, told by content, to an upright 8-bit picture.

Of a DICOM file only its pixels are kept: no name, no number, no date leaves this module. What a header claims is
checked before anything is decoded, so that a small file cannot ask for gigabytes.
"""

from __future__ import annotations

import hashlib
import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from retrieval.errors import BackendError, InputError, NotAnImage, TooLarge
from retrieval.types import ImageSource, Picture

Frames = Literal["middle", "all"]

THUMBNAIL = 512  # px, longest side
MAX_PIXELS = 64_000_000
MOSAIC = 64  # frames of a series that `frames="all"` lays side by side, spread evenly
READABLE = "JPEG, PNG, WebP or DICOM"
PAPER = (255, 255, 255)  # what shows through transparent pixels

# The limit is checked here, before decoding, and names the operator's own figure.
Image.MAX_IMAGE_PIXELS = None
# A picture with odd metadata is still a picture, and what libraries say of it may quote values.
warnings.filterwarnings("ignore", module=r"(PIL|pydicom)\b")
logging.getLogger("pydicom").setLevel(logging.CRITICAL)


def read_picture(
    source: Path | bytes,
    *,
    frames: Frames = "middle",
    max_pixels: int = MAX_PIXELS,
    allow_burned_in: bool = False,
) -> Picture:
    """Decode a picture.

    frames: of a DICOM series, its middle frame, or all of them in one mosaic (up to 64, spread evenly).
    Raises NotAnImage for what is no readable picture, TooLarge beyond `max_pixels`, InputError where there is no
    such file or where a DICOM file says that text is burned into its pixels.
    """
    content = source if isinstance(source, bytes) else _content(source)
    if _is_dicom(content):
        image = _Dicom(content, max_pixels, allow_burned_in).image(frames)
    else:
        image = _photograph(content, max_pixels)
    path = None if isinstance(source, bytes) else str(source)
    return Picture(hashlib.sha256(content).hexdigest(), _thumbnail(image), image, path)


def pixels(image: ImageSource) -> Image.Image:
    """The decoded picture, mode L or RGB. A stored picture comes without pixels and is read again from its path."""
    if not isinstance(image, Picture):
        return pixels(read_picture(image))
    if isinstance(image.pixels, Image.Image):
        return image.pixels
    if image.path is not None:
        return pixels(read_picture(Path(image.path)))
    raise InputError("this picture came without its pixels: send the picture itself")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"picture {path.name!r} cannot be read: {error.strerror}") from error


def smaller(png: bytes, side: int) -> bytes:
    """A rendered picture again, its longest side at most `side` px: for lists that show many at once."""
    with Image.open(io.BytesIO(png), formats=["PNG"]) as image:
        return _thumbnail(image, side)


def _thumbnail(image: Image.Image, side: int = THUMBNAIL) -> bytes:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    small.save(out, "PNG", compress_level=3)
    return out.getvalue()


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise TooLarge(f"a picture of {width} x {height} pixels; at most {max_pixels:,} are read")


# ---- JPEG, PNG, WebP


def _photograph(content: bytes, max_pixels: int) -> Image.Image:
    try:
        image = Image.open(io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"])
        _check_size(*image.size, max_pixels)
        image.load()
        return _eight_bit(ImageOps.exif_transpose(image))
    except TooLarge:
        raise
    except MemoryError as error:
        raise BackendError("not enough memory to decode a picture; lower LIGHTBOX_MAX_PIXELS") from error
    except Exception as error:  # decoders raise nearly everything on damaged bytes
        raise NotAnImage(f"{_seems(content)}; expected a readable {READABLE} file") from error


def _seems(content: bytes) -> str:
    head = content[:512].lstrip().lower()
    if not content:
        return "an empty file"
    if head.startswith((b"<!doctype", b"<html", b"<?xml", b"<svg")):
        return "a text page (HTML or XML)"
    if head.startswith((b"\xff\xd8", b"\x89png", b"riff")):
        return "a truncated or damaged picture"
    if head.startswith((b"gif8", b"bm", b"ii*\0", b"mm\0*", b"%pdf")):
        return "a file of another kind (GIF, BMP, TIFF or PDF)"
    return "bytes that are no picture"


def _eight_bit(image: Image.Image) -> Image.Image:
    """Any mode to L or RGB: sixteen-bit greys stretched over what they hold, transparent pixels on white paper."""
    if image.mode.startswith(("I", "F")):
        return _grey(_stretched(np.asarray(image, np.float64)))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        see_through = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*PAPER, 255))
        flat = Image.alpha_composite(paper, see_through).convert("RGB")
        return flat.convert("L") if image.mode in ("LA", "La", "L") else flat
    return image.convert("L") if image.mode in ("1", "L") else image.convert("RGB")


def _grey(shares: NDArray[np.float64]) -> Image.Image:
    """(H, W) in [0, 1] to a picture of mode L."""
    return Image.fromarray(np.rint(np.clip(shares, 0.0, 1.0) * 255).astype(np.uint8))


def _stretched(values: NDArray[np.float64], held: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Values from darkest to brightest as shares of that range; `held` marks those that count."""
    inside = values if held is None or not held.any() else values[held]
    low, high = float(inside.min()), float(inside.max())
    return (values - low) / (high - low) if high > low else np.zeros_like(values)


# ---- DICOM


def _is_dicom(content: bytes) -> bool:
    """By the magic word after the preamble; without a preamble, by a first element of group 2 or 8."""
    if content[128:132] == b"DICM":
        return True
    group, element = struct.unpack("<HH", content[:4]) if len(content) >= 16 else (0, 0)
    vr = content[4:6]
    known = vr in (b"UL", b"OB", b"UI", b"CS", b"DA", b"TM", b"SH", b"LO") or content[6:8] == b"\0\0"
    return group in (0x0002, 0x0008) and element < 0x0100 and known


DEFLATED = b"1.2.840.10008.1.2.1.99"


class _Dicom:
    """The pixels of one DICOM file."""

    def __init__(self, content: bytes, max_pixels: int, allow_burned_in: bool) -> None:
        self._max_pixels = max_pixels
        with _decoding("DICOM"):
            _check_deflated(content, max_pixels)
            self._data = _dataset(content)
            self._check_header(allow_burned_in)

    def image(self, frames: Frames) -> Image.Image:
        with _decoding("DICOM"):
            count = int(self._data.get("NumberOfFrames") or 1)
            if frames == "middle" or count == 1:
                return self._frame(count // 2)
            chosen = np.unique(np.linspace(0, count - 1, min(count, MOSAIC)).round().astype(int))
            _check_size(self._data.Columns * len(chosen), self._data.Rows, self._max_pixels)
            return _mosaic([self._frame(int(index)) for index in chosen])

    def _check_header(self, allow_burned_in: bool) -> None:
        data = self._data
        if "PixelData" not in data and "FloatPixelData" not in data and "DoubleFloatPixelData" not in data:
            raise NotAnImage("a DICOM file without pixels; expected an image object")
        _check_size(int(data.Columns), int(data.Rows), self._max_pixels)
        burned_in = str(data.get("BurnedInAnnotation", "")).strip().upper() == "YES"
        if burned_in and not allow_burned_in:
            raise InputError(
                "the DICOM file says that annotations are burned into its pixels (they may name the patient); "
                "mask them, or set LIGHTBOX_ALLOW_BURNED_IN=1"
            )

    def _frame(self, index: int) -> Image.Image:
        from pydicom.pixels.utils import pixel_array

        data = self._data
        self._check_codestream(index)
        values = pixel_array(data, index=index)
        kind = str(data.PhotometricInterpretation)
        if kind == "PALETTE COLOR":
            return _palette(values, data)
        if values.ndim == 3:
            return Image.fromarray(_bytes_of(values, data))
        shares = _window(values, data)
        return _grey(1.0 - shares if kind == "MONOCHROME1" else shares)

    def _check_codestream(self, index: int) -> None:
        """A compressed frame has a size of its own, which the decoder would obey."""
        if not self._data.file_meta.TransferSyntaxUID.is_encapsulated:
            return
        from pydicom.encaps import get_frame

        count = int(self._data.get("NumberOfFrames") or 1)
        size = _codestream_size(get_frame(self._data.PixelData, index, number_of_frames=count))
        if size is not None:
            _check_size(*size, self._max_pixels)


@contextmanager
def _decoding(kind: str) -> Iterator[None]:
    """What pydicom and the codecs raise, as NotAnImage; their messages may hold values, so they stay in the cause."""
    try:
        yield
    except InputError:
        raise
    except MemoryError as error:
        raise BackendError("not enough memory to decode a picture; lower LIGHTBOX_MAX_PIXELS") from error
    except Exception as error:
        raise NotAnImage(f"a truncated or damaged {kind} file; expected a readable {READABLE} file") from error


def _dataset(content: bytes) -> Any:
    """The file's elements. Without a preamble or file meta, the transfer syntax is what the bytes suggest."""
    import pydicom
    from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

    data = pydicom.dcmread(io.BytesIO(content), force=True)
    if getattr(data, "file_meta", None) is None:
        data.file_meta = pydicom.dataset.FileMetaDataset()
    if "TransferSyntaxUID" not in data.file_meta:
        implicit = data.original_encoding[0]
        data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else ExplicitVRLittleEndian
    return data


def _check_deflated(content: bytes, max_pixels: int) -> None:
    """A deflated file says nothing of its true size: inflate it no further than a picture may need."""
    if content[128:132] != b"DICM" or DEFLATED not in content[:1024]:
        return
    (length,) = struct.unpack("<L", content[140:144])  # of the file meta, its first element
    limit = 8 * max_pixels + 2**20
    if len(zlib.decompressobj(-zlib.MAX_WBITS).decompress(content[144 + length :], limit + 1)) > limit:
        raise TooLarge(f"a deflated DICOM file of more than {limit:,} bytes; at most {max_pixels:,} pixels are read")


def _codestream_size(frame: bytes) -> tuple[int, int] | None:
    """Width and height that a JPEG, JPEG-LS or JPEG 2000 frame claims; None where it is none of them."""
    start = frame.find(b"\xff\x4f\xff\x51", 0, 256)
    if start >= 0:
        width, height = struct.unpack(">LL", frame[start + 8 : start + 16])
        return int(width), int(height)
    at = 2 if frame[:2] == b"\xff\xd8" else len(frame)
    while at + 9 <= len(frame) and frame[at] == 0xFF:
        marker, length = frame[at + 1], int.from_bytes(frame[at + 2 : at + 4], "big")
        if marker in _START_OF_FRAME:
            height, width = struct.unpack(">HH", frame[at + 5 : at + 9])
            return width, height
        at += 1 if marker == 0xFF else 2 + length
    return None


_START_OF_FRAME = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}  # 0xF7 is JPEG-LS


def _palette(values: NDArray[Any], data: Any) -> Image.Image:
    from pydicom.pixels.processing import apply_color_lut

    coloured = apply_color_lut(values, data)
    bits = 16 if coloured.dtype.itemsize > 1 else 8
    return Image.fromarray((coloured >> (bits - 8)).astype(np.uint8)[..., :3])


def _bytes_of(values: NDArray[Any], data: Any) -> NDArray[np.uint8]:
    """(H, W, 3) samples to eight bits; pydicom has turned YBR into RGB."""
    surplus = max(0, int(data.BitsStored) - 8)
    return np.ascontiguousarray((values >> surplus).astype(np.uint8)[..., :3])


def _window(stored: NDArray[Any], data: Any) -> NDArray[np.float64]:
    """(H, W) stored values to shares of brightness: modality LUT, then VOI LUT or window, else their full range."""
    from pydicom.pixels.processing import apply_modality_lut, apply_voi

    values = np.asarray(apply_modality_lut(stored, data), np.float64)
    if _items(data, "VOILUTSequence"):
        return _shares_of_lut(np.asarray(apply_voi(values.astype(np.int64), data)), data)
    window = _window_of(data)
    if window is None:
        return _stretched(values, _held(stored, data))
    centre, width, how = window
    if how == "SIGMOID":
        return np.asarray(1.0 / (1.0 + np.exp(np.clip(-4.0 * (values - centre) / width, -60, 60))))
    if how == "LINEAR" and width > 1:  # PS3.3 C.11.2.1.2.1
        centre, width = centre - 0.5, width - 1.0
    return (values - centre) / width + 0.5


def _window_of(data: Any) -> tuple[float, float, str] | None:
    """Centre, width and function of the first window, None where there is no usable one."""
    try:
        centre, width = (float(_first(data[name].value)) for name in ("WindowCenter", "WindowWidth"))
    except (KeyError, TypeError, ValueError):
        return None
    if not np.isfinite([centre, width]).all() or width <= 0:
        return None
    return centre, width, str(data.get("VOILUTFunction") or "LINEAR").upper()


def _shares_of_lut(values: NDArray[Any], data: Any) -> NDArray[np.float64]:
    bits = int(data.VOILUTSequence[0].LUTDescriptor[2])
    return np.asarray(values / (2.0 ** (bits if bits in range(8, 17) else 16) - 1.0))


def _held(stored: NDArray[Any], data: Any) -> NDArray[np.bool_] | None:
    """Which pixels belong to the picture, None where all do: padding would stretch the range."""
    padding = data.get("PixelPaddingValue")
    if padding is None:
        return None
    limit = data.get("PixelPaddingRangeLimit", padding)
    low, high = sorted((int(padding), int(limit)))
    return (stored < low) | (stored > high)


def _items(data: Any, name: str) -> int:
    found = data.get(name)
    return len(found) if found is not None else 0


def _first(value: Any) -> Any:
    return value[0] if hasattr(value, "__len__") and not isinstance(value, str) else value


def _mosaic(frames: list[Image.Image]) -> Image.Image:
    """Frames in reading order, in a grid as square as it goes."""
    across = int(np.ceil(np.sqrt(len(frames))))
    down = -(-len(frames) // across)
    width, height = frames[0].size
    sheet = Image.new(frames[0].mode, (across * width, down * height))
    for n, frame in enumerate(frames):
        sheet.paste(frame, (n % across * width, n // across * height))
    return sheet
