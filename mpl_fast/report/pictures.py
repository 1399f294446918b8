"""Images of a pack as pictures of a page: thumbnails, one sheet of many, and training views."""

import base64
import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from mpl_fast.data.split_images import SplitImages

THUMBNAIL = 128  # pixels of the longer side
TILE = 44  # pixels of the sides of a sheet's tiles
ACROSS = 48  # tiles in a row of it


def thumbnail(encoded: bytes, side: int = THUMBNAIL) -> Image.Image:
    """The whole image, at most `side` pixels wide and high."""
    image = Image.open(io.BytesIO(encoded))
    image.draft("RGB", (side, side))  # decodes a JPEG at a fraction of its size
    picture = image.convert("RGB")
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def reduced(pixels: NDArray[np.uint8]) -> Image.Image:
    """The picture of ``(H, W, 3)`` pixels, at most as large as a thumbnail."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    return picture


def sheet(images: Sequence[tuple[SplitImages, int]]) -> Image.Image:
    """Square tiles of many images, given as splits and places, row by row."""
    rows = -(-len(images) // ACROSS)
    whole = Image.new("RGB", (ACROSS * TILE, rows * TILE))
    for tile, (split, place) in enumerate(images):
        square = ImageOps.fit(thumbnail(split.image(place), 2 * TILE), (TILE, TILE))
        row, column = divmod(tile, ACROSS)
        whole.paste(square, (column * TILE, row * TILE))
    return whole


def jpeg(picture: Image.Image, quality: int = 82) -> NDArray[np.uint8]:
    """The bytes of a picture as JPEG."""
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=quality, optimize=True)
    return np.frombuffer(out.getvalue(), np.uint8)


def uri_of(encoded: bytes) -> str:
    """A JPEG as the text of a ``data:`` address."""
    return f"data:image/jpeg;base64,{base64.b64encode(encoded).decode()}"


def data_uri(picture: Image.Image, quality: int = 82) -> str:
    """A picture as the text of a ``data:`` address, in JPEG."""
    return uri_of(jpeg(picture, quality).tobytes())
