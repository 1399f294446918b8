"""Image files as they should not be, and some that only look odd."""

import base64
import io
import struct
import zlib
from typing import Any

import cv2
import numpy as np
from PIL import Image

HEIGHT, WIDTH = 150, 200
ORIENTATION = 0x0112

# 24 x 16 pixels by libjpeg-turbo's cjpeg, which can write what Pillow and OpenCV cannot:
# `cjpeg -arithmetic -quality 80`, and `cjpeg -sample 3x1 -optimize -quality 80`.
ARITHMETIC = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00smF1_cBL1_cHO2L=cV5DE$j2?`Vr4-60&6c`v66c!d59VH(c8zUSR79c"
    "DjBPJ&)Dk&KsEif%8FeNA{DF534LjeZ|2MP!Z6AB6wC>j<TC@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C"
    "@3f>C@3f>C@3f>C@3f>C@BBQ01*fP5C9kh0U`hb5di}c0sqVZ3IGrg1pyEd1^?Or3<CiG0ucid06zf#0J{$W{{T}"
    "=nCIP7Xz1mqF}Ce=WGri0Z{s%NPs$S=9*-_x>G#>{bk*`biQI>&RQrD)!2j6"
)
ODD_SAMPLING = base64.b85decode(
    "|JeWF01!$>Nk#wx0RR9200961|JwjV00smF1_cBL1_cHO2L=cV5DE$j2?`Vr4-60&6c`v66c!d59VH(c8zUSR79c"
    "DjBPJ&)Dk&KsEif%8FeNA{DF534LjeZ|2MP!Z6AB6wC>j<TC@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C@3f>C"
    "@3f>C@3f>C@3f>C@3f>C@BBH01*fP5C9kh0Wkmq5di}c0sq7R761VO0RR910000000000000FB2mizX84v&g1poj"
    "50000000000000041|l(`|HJ?l0RaI300000000000000000ssB!~hu)00IL600000000000000000smhG6nzI01"
    "N{G00I#M5dc2`%Tu@N7$}{;P{B0K`i2ReChE(IT@2Z7oxf1QH0}C^3MX&WFeK?WRs~Y%X3ziG"
)


def photo(height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Return a smooth picture of many pale colors."""
    noise = np.random.default_rng(0).integers(60, 196, (8, 10, 3), np.uint8)
    return Image.fromarray(cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC))


def encoded(picture: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def with_alpha(picture: Image.Image) -> Image.Image:
    """Return a picture that is transparent at its left side."""
    picture = picture.copy()
    ramp = np.linspace(0, 255, picture.width).astype(np.uint8)
    picture.putalpha(Image.fromarray(np.tile(ramp, (picture.height, 1))))
    return picture


def oriented(image: bytes, orientation: int, order: str = "<") -> bytes:
    """Return a JPEG with an EXIF orientation, as little or big endian."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "IHHHIHH", 8, 1, ORIENTATION, 3, 1, orientation, 0)
    return with_exif(image, mark + entry + bytes(4))


def with_exif(image: bytes, tiff: bytes) -> bytes:
    content = b"Exif\0\0" + tiff
    return image[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + image[2:]


def png_of(chunks: list[tuple[bytes, bytes]]) -> bytes:
    """Return the PNG of (type, content) chunks, with right checksums."""
    number = struct.Struct(">I").pack
    rows = [
        number(len(content)) + kind + content + number(zlib.crc32(kind + content))
        for kind, content in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(rows)


def chunks_of(png: bytes) -> list[tuple[bytes, bytes]]:
    chunks, position = [], 8
    while position < len(png):
        end = position + 8 + int.from_bytes(png[position : position + 4], "big")
        chunks.append((png[position + 4 : position + 8], png[position + 8 : end]))
        position = end + 4
    return chunks


def sized(image: bytes, height: int, width: int) -> bytes:
    """Return a baseline JPEG whose header claims another size."""
    frame = image.index(b"\xff\xc0")
    return image[: frame + 5] + struct.pack(">HH", height, width) + image[frame + 9 :]


def without_adobe_mark(image: bytes) -> bytes:
    start = image.index(b"\xff\xee")
    size = int.from_bytes(image[start + 2 : start + 4], "big")
    return image[:start] + image[start + 2 + size :]


def as_ycck(cmyk: bytes) -> bytes:
    """Return a CMYK JPEG whose Adobe mark says YCCK: the colors change, the format is valid."""
    transform = cmyk.index(b"Adobe") + 11
    return cmyk[:transform] + b"\x02" + cmyk[transform + 1 :]


def _webps(picture: Image.Image) -> dict[str, bytes]:
    return {
        "webp": encoded(picture, "WEBP"),
        "webp lossless": encoded(picture, "WEBP", lossless=True),
        "webp alpha": encoded(with_alpha(picture), "WEBP"),
        "webp lossless alpha": encoded(with_alpha(picture), "WEBP", lossless=True),
        "webp profile": encoded(picture, "WEBP", icc_profile=b"colors"),
        "webp 1x1": encoded(photo(1, 1), "WEBP"),
    }


def _bmps(picture: Image.Image) -> dict[str, bytes]:
    plain = encoded(picture, "BMP")
    flipped = encoded(picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM), "BMP")
    return {
        "bmp": plain,
        "bmp gray": encoded(picture.convert("L"), "BMP"),
        "bmp palette": encoded(picture.convert("P"), "BMP"),
        "bmp 1 bit": encoded(picture.convert("1"), "BMP"),
        "bmp alpha": encoded(with_alpha(picture), "BMP"),
        "bmp from top to bottom": flipped[:22] + struct.pack("<i", -HEIGHT) + flipped[26:],
        "bmp of OS/2": os2_bmp(picture),
    }


def os2_bmp(picture: Image.Image) -> bytes:
    head = struct.pack("<IHHHH", 12, *picture.size, 1, 24)
    return b"BM" + struct.pack("<IHHI", 0, 0, 0, 26) + head + encoded(picture, "BMP")[54:]


def _usable() -> dict[str, bytes]:
    picture = photo()
    jpeg, png = encoded(picture, "JPEG"), encoded(picture, "PNG")
    cmyk = encoded(picture.convert("CMYK"), "JPEG")
    deep = np.asarray(picture)[..., ::-1].astype(np.uint16) * 257  # blue first
    chunks = chunks_of(png)
    tiff = oriented(jpeg, 6)[12:38]
    odd = {
        "jpeg": jpeg,
        "progressive": encoded(picture, "JPEG", progressive=True),
        "gray": encoded(picture.convert("L"), "JPEG"),
        "4:4:4": encoded(picture, "JPEG", subsampling=0),
        "restart markers": encoded(picture, "JPEG", restart_marker_rows=1),
        "arithmetic": ARITHMETIC,
        "cmyk": cmyk,
        "cmyk without mark": without_adobe_mark(cmyk),
        "ycck": as_ycck(cmyk),
        "trailing junk": jpeg + b"junk" * 500,
        "trailing zeros": jpeg + bytes(5000),
        "fill bytes": jpeg[:2] + b"\xff\xff\xff" + jpeg[2:],
        "broken exif offset": with_exif(jpeg, b"II*\0\xff\xff\xff\x7f"),
        "broken exif order": with_exif(jpeg, b"XX*\0\x08\0\0\0"),
        "cut exif": with_exif(jpeg, b"MM"),
        "exif without entries": with_exif(jpeg, b"II*\0\x08\0\0\0\xff\xff"),
        "1x1": encoded(photo(1, 1), "JPEG"),
        "65500x1": encoded(Image.new("RGB", (65500, 1), "teal"), "JPEG"),
        "1x65500": encoded(Image.new("RGB", (1, 65500), "teal"), "JPEG"),
        "12 MP": encoded(photo(3000, 4000), "JPEG"),
        "png": png,
        "png 1x1": encoded(photo(1, 1), "PNG"),
        "png gray": encoded(picture.convert("L"), "PNG"),
        "png 1 bit": encoded(picture.convert("1"), "PNG"),
        "png palette": encoded(picture.convert("P"), "PNG"),
        "png palette alpha": encoded(picture.quantize(16), "PNG", transparency=0),
        "png rgba": encoded(with_alpha(picture), "PNG"),
        "png gray alpha": encoded(with_alpha(picture.convert("L")), "PNG"),
        "png 16 bit": cv2.imencode(".png", deep)[1].tobytes(),
        "png 16 bit gray": cv2.imencode(".png", deep[..., 0])[1].tobytes(),
        "png trailing junk": png + b"junk",
        "png with exif": png_of([chunks[0], (b"eXIf", tiff), *chunks[1:]]),
    }
    odd |= _webps(picture) | _bmps(picture)
    for value in range(2, 9):
        odd[f"exif {value}"] = oriented(jpeg, value, "<>"[value % 2])
    return odd


def _unusable() -> dict[str, tuple[bytes, str]]:
    jpeg, png = encoded(photo(), "JPEG"), encoded(photo(), "PNG")
    webp, bmp = encoded(photo(), "WEBP"), encoded(photo(), "BMP")
    half = len(jpeg) // 2
    scan = jpeg.index(b"\xff\xda")
    chunks = chunks_of(png)
    data = zlib.decompress(b"".join(content for kind, content in chunks if kind == b"IDAT"))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 4
    short = [chunks[0], (b"IDAT", zlib.compress(data[: len(data) // 2])), chunks[-1]]
    huge = struct.pack(">II", 60_000, 60_000) + chunks[0][1][8:]
    no_end, no_chunk = "cut short (no end-of-image mark)", "cut short (no IEND chunk)"
    no_image = "no image by its first bytes"
    return _unfit() | {
        "empty": (b"", "empty file"),
        "text": (b"this is no image\n" * 20, no_image),
        "zero-filled": (bytes(50_000), no_image),
        "half": (jpeg[:half], no_end),
        "no end mark": (jpeg[:-2], no_end),
        "last byte missing": (jpeg[:-1], no_end),
        "header only": (jpeg[:scan], no_end),
        "no data": (jpeg[: scan + 14] + b"\xff\xd9", "premature end of data segment"),
        "half with an end mark": (jpeg[:half] + b"\xff\xd9", "premature end of data segment"),
        "half zeros": (jpeg[:half] + bytes(len(jpeg) - half), no_end),
        "leading junk": (b"junk" + jpeg, no_image),
        "leading newline": (b"\n" + jpeg, no_image),
        "odd sampling": (ODD_SAMPLING, "unusual subsampling of colors"),
        "exif past the end": (
            jpeg[:2] + b"\xff\xe1\xff\xffExif\0\0" + jpeg[2:],
            "damaged JPEG header",
        ),
        "12 bits": (jpeg.replace(b"\xff\xc0\0\x11\x08", b"\xff\xc0\0\x11\x0c"), "precision 12"),
        "larger than its data": (sized(jpeg, 2 * HEIGHT, WIDTH), "premature end of data segment"),
        "smaller than its data": (sized(jpeg, HEIGHT // 2, WIDTH), "extraneous bytes"),
        "huge": (sized(jpeg, 65_500, 65_500), "65500 x 65500 pixels are more than"),
        "png half": (png[: len(png) // 2], no_chunk),
        "png without end": (png[:-12], no_chunk),
        "png last byte missing": (png[:-1], "damaged PNG chunk"),
        "png bit flip": (bytes(flipped), "damaged PNG chunk at byte 33"),
        "png with half its rows": (png_of(short), "OpenCV cannot decode this PNG"),
        "png without data": (png_of([chunks[0], chunks[-1]]), "OpenCV cannot decode this PNG"),
        "png header only": (png[:20], no_chunk),
        "png huge": (png_of([(b"IHDR", huge), *chunks[1:]]), "60000 x 60000 pixels are more"),
        "webp half": (webp[: len(webp) // 2], f" of {len(webp)} bytes)"),
        "webp last byte missing": (webp[:-1], f"cut short ({len(webp) - 1} of "),
        "webp mark only": (b"RIFF\4\0\0\0WEBP", "OpenCV cannot decode this WebP"),
        "bmp half": (bmp[: len(bmp) // 2], "OpenCV cannot decode this BMP"),
        "bmp last byte missing": (bmp[:-1], "OpenCV cannot decode this BMP"),
        "bmp mark only": (b"BM is the beginning of a text", no_image),
    }


def _unfit() -> dict[str, tuple[bytes, str]]:
    """Return kinds of images of which DALI decodes none, or not all."""
    picture, other = photo(), photo().rotate(180)
    frames: dict[str, Any] = {"save_all": True, "append_images": [other]}
    bmp, gif = encoded(picture, "BMP"), encoded(picture, "GIF")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    never, not_always = "which DALI cannot decode", "which DALI cannot always decode"
    return {
        "gif": (gif, f"GIF, {never}"),
        "gif animated": (encoded(picture, "GIF", **frames), f"GIF, {never}"),
        "gif half": (gif[: len(gif) // 2], f"GIF, {never}"),
        "webp animated": (encoded(picture, "WEBP", **frames), f"animated WebP, {not_always}"),
        "webp exif": (encoded(picture, "WEBP", exif=exif), f"WebP with EXIF data, {never}"),
        "bmp 16 bits": (bmp[:28] + b"\x10" + bmp[29:], f"BMP of 16 bits a pixel, {not_always}"),
        "tiff": (encoded(picture, "TIFF"), f"TIFF, {not_always}"),
        "tiff pages": (encoded(picture, "TIFF", **frames), f"TIFF, {not_always}"),
        "tiff float": (encoded(picture.convert("F"), "TIFF"), f"TIFF, {not_always}"),
        "pnm": (encoded(picture, "PPM"), f"PNM, {not_always}"),
        "jpeg 2000": (b"\0\0\0\x0cjP  \r\n\x87\n", f"JPEG 2000, {not_always}"),
        "avif": (b"\0\0\0\x1cftypavif", f"AVIF, {never}"),
        "heic": (b"\0\0\0\x1cftypheic", f"HEIC, {never}"),
    }


USABLE = _usable()
"""Odd images that DALI decodes, and so must the check."""
UNUSABLE = _unusable()
"""(image, part of the fault) of what the check must refuse."""
