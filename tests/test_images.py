"""Pictures: what is read, how it looks afterwards, and what is refused."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    RLELossless,
)

from encoders.images import pixels, read_picture
from retrieval.errors import InputError, NotAnImage, TooLarge
from retrieval.types import Picture

RAMP = np.array([[0, 1000], [2000, 4000]], np.uint16)


def saved(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **how)
    return out.getvalue()


def grey(values: NDArray[Any]) -> bytes:
    return saved(Image.fromarray(values))


def looks(source: bytes | Path, **how: Any) -> list[Any]:
    seen: list[Any] = np.asarray(read_picture(source, **how).pixels).tolist()
    return seen


def dicom(values: NDArray[Any] = RAMP, syntax: UID = ExplicitVRLittleEndian, **elements: Any) -> bytes:
    data = dataset(values, **elements)
    data.file_meta.TransferSyntaxUID = syntax
    return written(data)


def dataset(values: NDArray[Any], **elements: Any) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1.1")
    meta.MediaStorageSOPInstanceUID = UID("1.2.3")
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    colour = values.ndim == 3 and values.shape[-1] == 3
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.PatientName = "Doe^Jane"
    data.Rows, data.Columns = values.shape[:2] if colour else values.shape[-2:]
    data.SamplesPerPixel = 3 if colour else 1
    data.PhotometricInterpretation = "RGB" if colour else "MONOCHROME2"
    if colour:
        data.PlanarConfiguration = 0
    data.BitsAllocated = data.BitsStored = values.dtype.itemsize * 8
    data.HighBit = data.BitsStored - 1
    data.PixelRepresentation = int(values.dtype.kind == "i")
    if values.ndim == 3 and not colour:
        data.NumberOfFrames = len(values)
    data.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    return data


def written(data: FileDataset) -> bytes:
    out = io.BytesIO()
    data.save_as(out, enforce_file_format=True)
    return out.getvalue()


# ---- photographs


def test_a_kind_is_told_by_content_not_by_name(tmp_path: Path) -> None:
    image = Image.new("RGB", (3, 2), (200, 0, 0))
    for kind in ("JPEG", "PNG", "WEBP"):
        path = tmp_path / f"{kind}.txt"
        path.write_bytes(saved(image, kind))
        picture = read_picture(path)
        assert (picture.pixels.mode, picture.pixels.size, picture.path) == ("RGB", (3, 2), str(path))


def test_a_picture_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by 90 degrees
    lying = saved(Image.fromarray(np.array([[0, 255]], np.uint8)), "PNG", exif=exif)
    assert looks(lying) == [[0], [255]]


def test_transparent_pixels_lie_on_white() -> None:
    icon = Image.fromarray(np.array([[[0, 0, 0, 0], [0, 0, 0, 255], [10, 20, 30, 255]]], np.uint8))
    assert looks(saved(icon)) == [[[255] * 3, [0] * 3, [10, 20, 30]]]
    assert looks(saved(Image.fromarray(np.array([[[9, 0], [9, 255]]], np.uint8), "LA"))) == [[255, 9]]


def test_sixteen_bits_keep_their_contrast() -> None:
    assert looks(grey(RAMP)) == [[0, 64], [128, 255]]
    assert looks(grey(np.full((2, 2), 4000, np.uint16))) == [[0, 0], [0, 0]]


def test_a_palette_and_a_one_bit_picture_are_read() -> None:
    paletted = Image.new("P", (1, 1))
    paletted.putpalette([7, 8, 9])
    assert looks(saved(paletted)) == [[[7, 8, 9]]]
    assert looks(saved(Image.new("1", (1, 1), 1))) == [[255]]


def test_one_pixel_is_a_picture() -> None:
    picture = read_picture(saved(Image.new("RGB", (1, 1), (1, 2, 3))))
    assert picture.pixels.size == Image.open(io.BytesIO(picture.thumbnail)).size == (1, 1)


def test_the_thumbnail_is_a_png_of_at_most_512_and_always_the_same() -> None:
    content = saved(Image.effect_noise((700, 1400), 50), "JPEG")
    first, second = read_picture(content), read_picture(content)
    small = Image.open(io.BytesIO(first.thumbnail))
    assert (small.format, small.size) == ("PNG", (256, 512))
    assert (first.thumbnail, first.digest) == (second.thumbnail, second.digest)


def test_the_digest_is_of_the_bytes() -> None:
    import hashlib

    content = grey(RAMP)
    assert read_picture(content).digest == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    ("content", "seems"),
    [
        (b"", "an empty file"),
        (b"<!DOCTYPE html><html>not found</html>", "a text page"),
        (b"  <html></html>", "a text page"),
        (b"\x89PNG\r\n\x1a\n", "truncated or damaged"),
        (b"RIFF\0\0\0\0WEBP", "truncated or damaged"),
        (b"GIF89a" + b"\0" * 40, "another kind"),
        (b"%PDF-1.7", "another kind"),
        (b"\x00\x01\x02", "no picture"),
        (b"x" * 400, "no picture"),
    ],
)
def test_what_is_no_picture_is_refused_by_what_it_seems(content: bytes, seems: str) -> None:
    with pytest.raises(NotAnImage, match=seems):
        read_picture(content)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_a_truncated_picture_is_refused(kind: str, share: float) -> None:
    content = saved(Image.effect_noise((64, 64), 90), kind)
    with pytest.raises(NotAnImage):
        read_picture(content[: int(len(content) * share)])


def test_flipped_bytes_never_raise_anything_else() -> None:
    draw = np.random.default_rng(0)
    for content in (saved(Image.effect_noise((40, 40), 90), "JPEG"), dicom(), grey(RAMP)):
        for _ in range(60):
            damaged = bytearray(content)
            for at in draw.integers(0, len(content), 4):
                damaged[at] = int(draw.integers(256))
            try:
                read_picture(bytes(damaged), max_pixels=10**6)
            except InputError:
                continue


def test_a_bomb_is_refused_before_it_is_decoded() -> None:
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + header
    png = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    png += struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    with pytest.raises(TooLarge, match="20000 x 20000 pixels; at most 64,000,000"):
        read_picture(png)


def test_the_limit_is_the_operators() -> None:
    with pytest.raises(TooLarge, match="at most 3"):
        read_picture(grey(RAMP), max_pixels=3)
    assert read_picture(grey(RAMP), max_pixels=4).pixels.size == (2, 2)


def test_a_missing_picture_is_named_without_its_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^picture 'gone.png' cannot be read") as caught:
        read_picture(tmp_path / "gone.png")
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(InputError):
        read_picture(tmp_path)


# ---- DICOM


def test_dicom_is_told_by_content(tmp_path: Path) -> None:
    for name in ("film.dcm", "film", "film.jpg"):
        (tmp_path / name).write_bytes(dicom())
        assert looks(tmp_path / name) == [[0, 64], [128, 255]]


def test_dicom_without_preamble_is_read() -> None:
    assert looks(dicom()[132:]) == [[0, 64], [128, 255]]  # the file meta comes first
    data = dataset(RAMP)
    for implicit in (True, False):
        out = io.BytesIO()
        bare = Dataset(data)
        bare.save_as(out, implicit_vr=implicit, little_endian=True, enforce_file_format=False)
        assert looks(out.getvalue()) == [[0, 64], [128, 255]]


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_other_plain_transfer_syntaxes_are_read(syntax: UID) -> None:
    assert looks(dicom(syntax=syntax)) == [[0, 64], [128, 255]]


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless])
def test_compressed_dicom_is_read(syntax: UID) -> None:
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    data = dataset(values)
    data.compress(syntax)
    assert looks(written(data)) == looks(dicom(values))


def test_jpeg_inside_dicom_is_read() -> None:
    values = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    data = dataset(values, PixelData=encapsulate([saved(Image.fromarray(values), "JPEG", quality=95)]))
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    seen = np.array(looks(written(data)), int)
    assert np.abs(seen - np.array(looks(dicom(values)), int)).max() <= 4


def test_a_frame_that_claims_to_be_larger_than_its_header_is_refused() -> None:
    jpeg = bytearray(saved(Image.new("L", (8, 8)), "JPEG"))
    at = jpeg.find(b"\xff\xc0")
    jpeg[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    data = dataset(np.zeros((8, 8), np.uint8), PixelData=encapsulate([bytes(jpeg)]))
    data["PixelData"].VR = "OB"
    data.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    with pytest.raises(TooLarge, match="60000 x 60000"):
        read_picture(written(data))


def test_inverted_films_are_turned_over() -> None:
    assert looks(dicom(PhotometricInterpretation="MONOCHROME1")) == [[255, 191], [128, 0]]


def test_slope_and_intercept_come_before_the_window() -> None:
    shifted = dicom(RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=3000, WindowWidth=8001)
    assert looks(shifted) == [[0, 64], [128, 255]]


def test_a_window_clips() -> None:
    assert looks(dicom(WindowCenter=1500.5, WindowWidth=1001)) == [[0, 0], [255, 255]]
    assert looks(dicom(WindowCenter=[1500.5, 2000], WindowWidth=[1001, 4000])) == [[0, 0], [255, 255]]


def test_window_functions_are_those_of_the_standard() -> None:
    exact = dicom(WindowCenter=2000, WindowWidth=4000, VOILUTFunction="LINEAR_EXACT")
    assert looks(exact) == [[0, 64], [128, 255]]
    sigmoid = looks(dicom(WindowCenter=2000, WindowWidth=4000, VOILUTFunction="SIGMOID"))
    assert sigmoid == [[30, 69], [128, 225]]


def test_a_useless_window_is_passed_over() -> None:
    assert looks(dicom(WindowCenter=10, WindowWidth=0)) == [[0, 64], [128, 255]]


def test_a_voi_table_is_looked_up() -> None:
    table = Dataset()
    table.LUTDescriptor = [4, 0, 12]
    table.LUTData = struct.pack("<4H", 0, 819, 1638, 4095)
    table["LUTData"].VR = "OW"
    values = np.array([[0, 1], [2, 3]], np.uint16)
    assert looks(dicom(values, VOILUTSequence=[table])) == [[0, 51], [102, 255]]


def test_padding_does_not_stretch_the_range() -> None:
    values = np.array([[-2000, 0], [500, 1000]], np.int16)
    data = dataset(values)
    data.add_new("PixelPaddingValue", "SS", -2000)
    assert looks(written(data)) == [[0, 0], [128, 255]]


def test_the_middle_frame_stands_for_a_series() -> None:
    series = np.stack([np.array([[0, n]], np.uint8) for n in (10, 20, 30)])
    assert looks(dicom(series, WindowCenter=128, WindowWidth=256, VOILUTFunction="LINEAR_EXACT")) == [[0, 20]]
    wide = looks(dicom(series, WindowCenter=128, WindowWidth=256, VOILUTFunction="LINEAR_EXACT"), frames="all")
    assert wide == [[0, 10, 0, 20], [0, 30, 0, 0]]


def test_colour_in_dicom_stays_colour() -> None:
    assert looks(dicom(np.array([[[1, 2, 3]]], np.uint8))) == [[[1, 2, 3]]]


def test_annotations_burned_in_are_refused_unless_allowed() -> None:
    content = dicom(BurnedInAnnotation="YES")
    with pytest.raises(InputError, match="burned into its pixels"):
        read_picture(content)
    assert read_picture(content, allow_burned_in=True).pixels.size == (2, 2)
    assert read_picture(dicom(BurnedInAnnotation="NO")).pixels.size == (2, 2)


def test_nothing_that_names_a_patient_is_kept() -> None:
    picture = read_picture(dicom())
    assert b"Doe" not in picture.thumbnail
    assert not picture.pixels.info
    assert "Doe" not in repr(picture)


def test_dicom_without_pixels_is_refused() -> None:
    data = dataset(RAMP)
    del data.PixelData
    with pytest.raises(NotAnImage, match="without pixels"):
        read_picture(written(data))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.98])
def test_truncated_dicom_is_refused(share: float) -> None:
    content = dicom(np.zeros((64, 64), np.uint16))
    with pytest.raises(NotAnImage):
        read_picture(content[: int(len(content) * share)])


def test_a_dicom_bomb_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(TooLarge):
        read_picture(dicom(Rows=60_000, Columns=60_000))


def test_a_deflated_bomb_is_inflated_no_further_than_a_picture_needs() -> None:
    with pytest.raises(TooLarge, match="deflated"):
        read_picture(dicom(np.zeros((2048, 2048), np.uint16), DeflatedExplicitVRLittleEndian), max_pixels=10_000)


# ---- pictures that are read already


def test_pixels_come_from_any_source(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(grey(RAMP))
    wanted = looks(path)
    stored = Picture("digest", b"", None, str(path))
    for source in (path, path.read_bytes(), read_picture(path), stored):
        assert np.asarray(pixels(source)).tolist() == wanted
    with pytest.raises(InputError, match="without its pixels"):
        pixels(Picture("digest", b"", None))
