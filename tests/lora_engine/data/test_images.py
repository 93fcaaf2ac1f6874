from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile

from lora_engine.data.images import encode_png, open_image, write_image
from lora_engine.errors import DataError


def noise(width: int = 24, height: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(1).integers(0, 256, (height, width, 3), dtype=np.uint8))


def bomb(path: Path, width: int, height: int) -> Path:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + kind + content + zlib.crc32(kind + content).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([1, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    row = bytes(1 + (width + 7) // 8)
    rows = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    return path


def test_truncated_images_are_not_padded(tmp_path: Path) -> None:
    path = tmp_path / "whole.jpg"
    noise().save(path, quality=95)
    assert open_image(path).size == (24, 16)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_format_outside_the_list_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "drawing.png"
    noise().save(path, format="PPM")
    with pytest.raises(DataError, match="Allowed: PNG, JPEG, WEBP, AVIF, BMP, TIFF, GIF"):
        open_image(path)


def test_the_format_is_detected_by_the_content(tmp_path: Path) -> None:
    path = tmp_path / "really-a-jpeg.PNG"
    noise().save(path, format="JPEG")
    assert open_image(path).size == (24, 16)


@pytest.mark.parametrize(("width", "height"), [(9_000, 9_000), (13_000, 13_000), (50_000, 20_000)])
def test_a_small_file_with_many_pixels_is_refused_before_decoding(tmp_path: Path, width: int, height: int) -> None:
    path = bomb(tmp_path / "bomb.png", width, min(height, 2))
    content = bytearray(path.read_bytes())
    content[20:24] = height.to_bytes(4)
    content[29:33] = zlib.crc32(bytes(content[12:29])).to_bytes(4)
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="64,000,000"):
        open_image(path)


def test_the_limit_itself_is_allowed(tmp_path: Path) -> None:
    path = bomb(tmp_path / "flat.png", 100, 50)
    assert open_image(path, max_pixels=5_000).size == (100, 50)
    with pytest.raises(DataError, match="100 x 50 = 5,000 pixels"):
        open_image(path, max_pixels=4_999)


def test_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    values = np.array([[0, 20_000, 65_535]], dtype=np.uint16)
    Image.fromarray(values).save(path)
    assert np.asarray(open_image(path))[0].tolist() == [[0] * 3, [78] * 3, [255] * 3]


def test_transparency_is_composited_over_white(tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    Image.fromarray(np.array([[[255, 0, 0, 0], [255, 0, 0, 255]]], dtype=np.uint8)).save(path)
    assert np.asarray(open_image(path))[0].tolist() == [[255, 255, 255], [255, 0, 0]]


def test_transparency_of_a_palette_is_composited_over_white(tmp_path: Path) -> None:
    path = tmp_path / "palette.png"
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(path, transparency=0)
    assert np.asarray(open_image(path))[0].tolist() == [[255, 255, 255], [0, 0, 255]]


def test_the_exif_orientation_is_applied(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    image = Image.new("RGB", (24, 16), (255, 255, 255))
    image.paste((0, 0, 0), (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(path, exif=exif, quality=95)
    upright = open_image(path)
    assert upright.size == (16, 24)
    assert np.asarray(upright)[:6].mean() < 20 < 200 < np.asarray(upright)[12:].mean()


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.png"
    noise().save(outside)
    inside = tmp_path / "images"
    inside.mkdir()
    (inside / "link.png").symlink_to(outside)
    with pytest.raises(DataError, match=r"link\.png: is a link that leads out of the folder"):
        open_image(inside / "link.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF"])
def test_no_mutated_file_raises_anything_but_a_data_error(tmp_path: Path, kind: str) -> None:
    buffer = io.BytesIO()
    noise().save(buffer, format=kind)
    complete, rng, path = buffer.getvalue(), np.random.default_rng(5), tmp_path / "mutant"
    refused = 0
    count = 150 if kind in {"PNG", "JPEG", "WEBP"} else 40
    for _ in range(count):
        content = bytearray(complete[: int(rng.integers(1, len(complete) + 1))])
        for position in rng.integers(0, len(content), 3):
            content[position] = int(rng.integers(256))
        path.write_bytes(bytes(content))
        try:
            assert open_image(path).mode == "RGB"
        except DataError:
            refused += 1
    assert refused > count / 2


def test_written_images_have_no_metadata_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010E] = "taken at home"
    exif.get_ifd(0x8825)[1] = "N"
    noise().save(tmp_path / "tagged.jpg", exif=exif, quality=95, comment=b"secret")
    image = open_image(tmp_path / "tagged.jpg")
    write_image(tmp_path / "clean.png", image)
    content = (tmp_path / "clean.png").read_bytes()
    assert content == encode_png(image)
    assert [kind for kind in (b"eXIf", b"tEXt", b"iTXt", b"zTXt", b"tIME", b"iCCP", b"pHYs") if kind in content] == []
    assert b"secret" not in content
    assert b"home" not in content


@pytest.mark.parametrize("kind", ["AVIF", "BMP", "TIFF", "GIF"])
def test_still_images_of_other_formats_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "image.png"
    Image.new("RGB", (24, 16), (200, 30, 60)).save(path, format=kind)
    pixels = np.asarray(open_image(path)).astype(int)
    assert pixels.shape == (16, 24, 3)
    assert np.abs(pixels - [200, 30, 60]).max() <= 3


def test_sixteen_bit_tiff_is_scaled_and_floating_point_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 20_000, 65_535]], dtype=np.uint16)).save(tmp_path / "deep.tif")
    assert np.asarray(open_image(tmp_path / "deep.tif"))[0].tolist() == [[0] * 3, [78] * 3, [255] * 3]
    Image.fromarray(np.array([[0.0, 0.5]], dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="has floating-point values"):
        open_image(tmp_path / "float.tif")


def swapped_profile() -> bytes:
    """sRGB with red and blue exchanged, under another name."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exchanged = profile.replace(b"rXYZ", b"tmp_").replace(b"bXYZ", b"rXYZ").replace(b"tmp_", b"bXYZ")
    return exchanged.replace("sRGB".encode("utf-16-be"), "odd!".encode("utf-16-be"))


def gray_cmyk_profile() -> bytes:
    """A profile that gives every CMYK value the gray of L* = 50."""
    identity = b"".join(round(65536 * (row == column)).to_bytes(4) for row in range(3) for column in range(3))
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes([128, 128, 128]) * 16 + ramp * 3
    header = bytearray(128)
    header[0:4] = (128 + 4 + 12 + len(table)).to_bytes(4)
    header[8:12] = b"\x02\x40\x00\x00"
    header[12:24] = b"prtrCMYKLab "
    header[36:40] = b"acsp"
    header[68:80] = bytes.fromhex("0000f6d6000100000000d32d")
    return bytes(header) + (1).to_bytes(4) + b"A2B0" + (144).to_bytes(4) + len(table).to_bytes(4) + table


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_are_those_of_the_profile(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "profile.png"
    image = Image.new("RGB", (8, 8), (250, 60, 10))
    image = image.quantize(2) if mode == "P" else image.convert(mode)
    image.save(path, icc_profile=swapped_profile())
    assert np.abs(np.asarray(open_image(path)).astype(int) - [10, 60, 250]).max() <= 4


def test_cmyk_is_converted_by_its_profile(tmp_path: Path) -> None:
    image = Image.new("CMYK", (8, 8), (255, 0, 0, 0))
    image.save(tmp_path / "profile.tif", icc_profile=gray_cmyk_profile())
    image.save(tmp_path / "plain.tif")
    assert np.abs(np.asarray(open_image(tmp_path / "profile.tif")).astype(int) - 119).max() <= 3
    assert np.asarray(open_image(tmp_path / "plain.tif"))[0, 0].tolist() == [0, 255, 255]


def test_a_broken_profile_is_reported_and_ignored(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "broken.png"
    Image.new("RGB", (8, 8), (250, 60, 10)).save(path, icc_profile=b"not a profile at all")
    assert np.asarray(open_image(path))[0, 0].tolist() == [250, 60, 10]
    assert "broken.png has a color profile that cannot be used" in caplog.text


def test_a_profile_of_another_kind_of_color_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "other.png"
    Image.new("RGB", (8, 8), (250, 60, 10)).save(path, icc_profile=gray_cmyk_profile())
    assert np.asarray(open_image(path))[0, 0].tolist() == [250, 60, 10]
