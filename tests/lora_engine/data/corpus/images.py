"""Odd image files: formats, modes, names, links, devices, bombs."""

from __future__ import annotations

import os

import numpy as np
from PIL import Image, ImageCms

from tests.lora_engine.data.conftest import make_image
from tests.lora_engine.data.corpus.build import Case, Content, Unused, Used, encode, flat_png, link, outside, pipe, png

_IMAGE = make_image(20, 16)
_DEEP = Image.fromarray(np.arange(320, dtype=np.uint16).reshape(16, 20) * 200)


def one(content: Content, outcome: Used | Unused | None = None, name: str = "a.png", shown: str | None = None) -> Case:
    """The image beside a good one, which is always used."""
    return Case(
        {"good.jpg": encode(make_image(20, 16, 99), "JPEG"), name: content},
        {"good.jpg": Used(), shown or name: outcome or Used()},
    )


def moving(kind: str) -> bytes:
    # Pillow keeps options of the last format in an image.
    first, second = (Image.new("RGB", (16, 16), color) for color in ("red", "blue"))
    return encode(first, kind, save_all=True, append_images=[second])


def turned(number: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = number
    return encode(_IMAGE, "JPEG", exif=exif)


IMAGES: dict[str, Case] = {
    # Formats, by content
    **{
        f"a {kind}": one(encode(_IMAGE, kind), name=f"a.{kind.lower()}")
        for kind in ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
    },
    "a JPEG that is named PNG": one(encode(_IMAGE, "JPEG")),
    "no ending": one(png(), name="a"),
    "an unknown ending": one(png(), name="a.xyz"),
    "JPEG 2000": one(encode(_IMAGE, "JPEG2000"), Unused("is not a readable image")),
    "PPM": one(encode(_IMAGE, "PPM"), Unused("is not a readable image")),
    "ICO": one(encode(_IMAGE, "ICO"), Unused("is not a readable image")),
    "EPS": one(encode(_IMAGE, "EPS"), Unused("is not a readable image")),
    "PDF": one(encode(_IMAGE, "PDF"), Unused("is not a readable image"), name="a.pdf"),
    "SVG": one("<svg onload='alert(1)'/>", Unused("is not a readable image"), name="a.svg"),
    "HTML": one("<script>alert(1)</script>", Unused("is not a readable image")),
    "HEIC without its reader": one(
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40),
        Unused("is HEIC|is not a readable image|is broken"),
        name="a.heic",
    ),
    # Modes
    "gray": one(encode(_IMAGE.convert("L"), "PNG")),
    "black and white": one(encode(_IMAGE.convert("1"), "PNG")),
    "palette": one(encode(_IMAGE.quantize(8), "PNG")),
    "palette with transparency": one(encode(_IMAGE.quantize(8), "PNG", transparency=0)),
    "gray with alpha": one(encode(_IMAGE.convert("LA"), "PNG")),
    "alpha": one(encode(_IMAGE.convert("RGBA"), "PNG")),
    "16-bit gray": one(encode(_DEEP, "PNG")),
    "16-bit TIFF": one(encode(_DEEP, "TIFF"), name="a.tif"),
    "CMYK JPEG": one(encode(_IMAGE.convert("CMYK"), "JPEG")),
    "CMYK TIFF": one(encode(_IMAGE.convert("CMYK"), "TIFF"), name="a.tif"),
    "YCbCr TIFF": one(encode(_IMAGE.convert("YCbCr"), "TIFF", compression="jpeg"), name="a.tif"),
    "floating point": one(
        encode(Image.fromarray(np.zeros((4, 4), dtype=np.float32)), "TIFF"),
        Unused("has floating-point values"),
        name="a.tif",
    ),
    "a broken profile": one(encode(_IMAGE, "PNG", icc_profile=b"no profile")),
    "an sRGB profile": one(
        encode(_IMAGE, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    ),
    **{f"EXIF orientation {number}": one(turned(number)) for number in (3, 6, 8, 99)},
    "progressive": one(encode(_IMAGE, "JPEG", progressive=True)),
    "a second image of a phone": one(moving("MPO"), name="a.jpg"),
    # Several images
    **{f"moving {kind}": one(moving(kind), Unused("is animated")) for kind in ("GIF", "WEBP", "PNG", "AVIF")},
    "two pages": one(moving("TIFF"), Unused("has 2 pages"), name="a.tif"),
    # Sizes
    "one pixel": one(png(1, 1, 1)),
    "very wide": one(png(1, 3_000, 1)),
    "65,000 x 8 pixels": one(flat_png(65_000, 8, 8)),
    "no width": one(flat_png(0, 8), Unused("is not a readable image|is broken")),
    "a bomb of 81 million pixels": one(flat_png(9_000, 9_000), Unused("64,000,000")),
    "a bomb of 169 million pixels": one(flat_png(13_000, 13_000), Unused("64,000,000")),
    "a bomb of 2,500 million pixels": one(flat_png(50_000, 50_000), Unused("64,000,000")),
    "a PNG with few of its rows": one(flat_png(100, 100)),
    # Damage
    "empty": one(b"", Unused("is not a readable image")),
    "text": one("no image", Unused("is not a readable image")),
    "a header alone": one(png()[:20], Unused("is not a readable image|is broken")),
    "half a PNG": one(png()[:300], Unused("is broken")),
    "half a JPEG": one(encode(_IMAGE, "JPEG")[:600], Unused("is broken"), name="a.jpg"),
    "half a WebP": one(encode(_IMAGE, "WEBP")[:200], Unused("is broken|is not a readable image"), name="a.webp"),
    "half an AVIF": one(encode(_IMAGE, "AVIF")[:200], Unused("is broken|is not a readable image"), name="a.avif"),
    "zeros": one(bytes(1_000), Unused("is not a readable image")),
    "bytes after the end": one(png() + b"PK\x03\x04 more"),
    "a wrong checksum": one(png()[:40] + b"x" + png()[41:], Unused("is not a readable image|is broken")),
    "a pickle": one(b"\x80\x04cos\nsystem\n", Unused("is not a readable image")),
    # Names
    "a new line": one(png(), name="a\nb.png", shown="a\\nb.png"),
    "an escape sequence": one(png(), name="a\x1b[31m.png", shown="a\\x1b[31m.png"),
    "a reversed direction": one(png(), name="a\u202egnp.exe", shown="a\\u202egnp.exe"),
    "bytes that are no text": one(png(), name=os.fsdecode(b"a\xff.png"), shown="a\\udcff.png"),
    "blanks and quotes": one(png(), name="a 'b\" $(id);.png"),
    "a leading dash": one(png(), name="-rf.png"),
    "a long name": one(png(), name="x" * 250 + ".png"),
    "many folders": one(png(), name="/".join("d" * 40) + "/a.png"),
    "capitals in the ending": one(png(), name="A.PNG"),
    "hidden": Case({"b.png": None, ".a.png": None, ".git/c.png": None}, {"b.png": Used()}),
    "leftovers of systems": Case({"b.png": None, "Thumbs.db": b"x", "__MACOSX/b.png": b"x"}, {"b.png": Used()}),
    # Links and devices
    "a link out of the folder": one(outside("secret.png", png()), Unused("leads out of the folder")),
    "a link to a device": one(link("/dev/zero"), Unused("leads out of the folder")),
    "a link to /proc": one(link("/proc/self/environ"), Unused("leads out of the folder")),
    "a link to a folder elsewhere": one(link("/etc"), Unused("leads out of the folder")),
    "a link to itself": one(link("a.png"), Unused("cannot be read")),
    "a link to nothing": one(link("gone.png"), Unused("cannot be read")),
    "a pipe": one(pipe, Unused("is not a regular file")),
    "a link in the folder": Case(
        {"b.png": None, "a.png": link("b.png")}, {"a.png": Used(), "b.png": Unused("duplicate of a.png")}
    ),
    # Duplicates and masks
    "the same bytes": Case(
        {"a.png": png(1), "b.png": png(1)}, {"a.png": Used(), "b.png": Unused("duplicate of a.png")}
    ),
    "a mask": Case({"a.png": None, "a.mask.png": None}, {"a.png": Used(has_mask=True)}),
    "a mask of another size": Case(
        {"a.png": None, "b.png": None, "a.mask.png": png(1, 8, 8)},
        {"a.png": Unused("its mask a.mask.png has 8 x 8"), "b.png": Used()},
        {"a.mask.png": "no used image has that name"},
    ),
    "a broken mask": Case(
        {"a.png": None, "b.png": None, "masks/a.png": b"no"},
        {"a.png": Unused("its mask masks/a.png is not a readable"), "b.png": Used()},
        {"masks/a.png": "no used image"},
    ),
    "two masks": Case(
        {"a.png": None, "b.png": None, "a.mask.png": None, "masks/a.png": None},
        {"a.png": Unused("has 2 masks"), "b.png": Used()},
        {"a.mask.png": "no used image", "masks/a.png": "no used image"},
    ),
    "a mask of no image": Case(
        {"b.png": None, "a-masklabel.png": None}, {"b.png": Used()}, {"a-masklabel.png": "is a mask by its name"}
    ),
}
