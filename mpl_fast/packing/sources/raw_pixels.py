"""Lossless image files from raw pixels."""

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mpl_fast.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def png(pixels: "NDArray[np.uint8]") -> bytes:
    """Return (height, width) gray or (height, width, 3) RGB pixels as a PNG."""
    import cv2  # late: the command line's --help must not wait for it
    import numpy as np

    # OpenCV's order is blue first.
    ordered = np.ascontiguousarray(pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    done, encoded = cv2.imencode(".png", ordered)
    if not done:
        raise DataError(f"pixels of shape {pixels.shape} cannot be encoded")
    return bytes(encoded)


def pieces(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the bytes of all blocks in pieces of one size, but for the last one."""
    rest = b""
    for block in blocks:
        content = rest + block
        whole = len(content) // size * size if size else 0
        for at in range(0, whole, size or 1):
            yield content[at : at + size]
        rest = content[whole:]
    if rest:
        yield rest
