"""Receipt of a finished shard: a small file beside the .rec file, from which the pack is completed.

It holds what the table and the manifest need of the shard, so that no .rec file is read again.
"""

import io
import json
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_fast.atomic import write_bytes
from mpl_fast.errors import DataError
from mpl_fast.untrusted import json_value, npz_arrays

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLUMNS = {"ids": "<u4", "offsets": "<u8", "lengths": "<u4", "sizes": "<u4", "crc32": "<u4"}

# What numpy, zipfile and zlib raise for one flipped bit or another.
_DAMAGE = (
    *(OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError),
    *(zipfile.BadZipFile, zlib.error, MemoryError),
)


def receipt_path(work: Path, shard_file: str) -> Path:
    """Return where the receipt of a shard is stored."""
    return work / f"{shard_file}.done"


@dataclass(frozen=True)
class Remark:
    """An image that was not simply copied, or not packed at all."""

    id: int
    reason: str
    action: str  # "failed", "skipped" or "converted"


@dataclass(frozen=True, kw_only=True)
class ShardReceipt:
    """Contents of one complete .rec file; arrays have one entry per written record, in order."""

    file: str
    content: str  # ShardRow.content and ShardRow.stamps of the plan that it was written from
    stamps: str
    size: int  # bytes
    checksum: str  # crc32 of the file
    bytes_in: int  # of the images in their sources
    multipart: int  # records that contain the magic word and are split into parts
    reencoded: int  # images that were resized or converted
    rotated: int  # re-encoded images whose EXIF orientation (not applied) was dropped
    ids: "NDArray[np.uint32]"
    offsets: "NDArray[np.uint64]"  # of the frames in the file
    lengths: "NDArray[np.uint32]"  # of the framed records, bytes
    sizes: "NDArray[np.uint32]"  # of the images, bytes
    crc32: "NDArray[np.uint32]"  # of the images
    remarks: list[Remark] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write the receipt atomically."""
        import numpy as np  # late: --help must not wait for it

        fields = {name: value for name, value in vars(self).items() if name not in COLUMNS}
        fields["remarks"] = [asdict(remark) for remark in self.remarks]
        header = np.frombuffer(json.dumps(fields).encode(), np.uint8)
        columns = [np.asarray(getattr(self, name), kind) for name, kind in COLUMNS.items()]
        content = io.BytesIO()
        np.savez(content, header, *columns)
        write_bytes(path, content.getvalue())

    @staticmethod
    def load(path: Path) -> "ShardReceipt":
        """Return what save wrote; DataError when the file is missing or damaged."""
        try:
            stored = npz_arrays(path)
            fields = json_value(stored["arr_0"].tobytes())
            columns = {name: stored[f"arr_{1 + at}"] for at, name in enumerate(COLUMNS)}
            remarks = [Remark(**remark) for remark in fields.pop("remarks")]
            return ShardReceipt(**fields, **columns, remarks=remarks)
        except _DAMAGE as error:
            raise DataError(f"{path}: damaged ({error}); delete it and pack again") from error
