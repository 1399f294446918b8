"""What one finished shard tells the end of the packing: a small file beside the .rec file."""

import io
import json
import os
import zipfile
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mpl_fast.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

COLUMNS = {"ids": "<u4", "offsets": "<u8", "lengths": "<u4", "sizes": "<u4", "crc32": "<u4"}

# What numpy and zipfile raise for one flipped bit or another, beside their own errors.
_DAMAGES = (ValueError, KeyError, TypeError, RuntimeError, zlib.error)


@dataclass(frozen=True)
class Remark:
    """An image that was not simply copied: why, and what was done."""

    id: int
    reason: str
    action: str  # "failed", "skipped" or "converted"


@dataclass(frozen=True, kw_only=True)
class ShardReceipt:
    """One complete .rec file; the arrays have one entry a record that was written, in order."""

    file: str
    content: str  # ShardRow.content and ShardRow.stamps of the plan that it was written from
    stamps: str
    size: int  # bytes
    sha256: str
    bytes_in: int  # of the images in their sources
    multipart: int  # records that hold the magic word and are cut into parts
    reencoded: int  # images that were made smaller or converted
    rotated: int  # re-encoded images whose EXIF orientation (not applied) was dropped
    ids: "NDArray[np.uint32]"
    offsets: "NDArray[np.uint64]"  # of the frames in the file
    lengths: "NDArray[np.uint32]"  # of the framed records, bytes
    sizes: "NDArray[np.uint32]"  # of the images, bytes
    crc32: "NDArray[np.uint32]"  # of the images
    remarks: list[Remark] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write to path: complete and on disk, or not at all."""
        import numpy as np

        fields = {name: value for name, value in vars(self).items() if name not in COLUMNS}
        fields["remarks"] = [asdict(remark) for remark in self.remarks]
        header = np.frombuffer(json.dumps(fields).encode(), np.uint8)
        columns = [np.asarray(getattr(self, name), kind) for name, kind in COLUMNS.items()]
        content = io.BytesIO()
        np.savez(content, header, *columns)
        temporary = path.with_name(path.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(content.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)

    @staticmethod
    def load(path: Path) -> "ShardReceipt":
        """Return what save wrote; DataError when the file is damaged."""
        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as stored:
                fields = json.loads(stored["arr_0"].tobytes())
                columns = {name: stored[f"arr_{1 + at}"] for at, name in enumerate(COLUMNS)}
            remarks = [Remark(**remark) for remark in fields.pop("remarks")]
            return ShardReceipt(**fields, **columns, remarks=remarks)
        except (OSError, EOFError, zipfile.BadZipFile, *_DAMAGES) as error:
            raise DataError(f"{path}: damaged ({error}); delete it and pack again") from error


def sync_file(path: Path) -> None:
    """Wait until the content of path is on disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Wait until what was created, renamed and removed in folder is on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
