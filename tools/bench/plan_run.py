"""Plans and finishes a pack of made images, for `tools.bench.plan`; without PyTorch's memory."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from mpl_fast.packing.options import PackOptions, SplitOptions
from mpl_fast.packing.plan.make_plan import make_plan
from mpl_fast.packing.plan.table import TABLE, ShardRow, open_table
from mpl_fast.packing.publish.finish import finish
from mpl_fast.packing.sources.class_folders import Entry
from mpl_fast.packing.sources.folder import FolderSource
from mpl_fast.packing.sources.source import Request
from mpl_fast.packing.write.shard_receipt import ShardReceipt, receipt_path

CLASSES = 1000
IMAGE = 110_000  # bytes
FRAMED = IMAGE + 32


class MadeFolder(FolderSource):
    """A folder of so many files that need not exist."""

    def __init__(self, folder: Path, rows: int) -> None:
        super().__init__(Request(str(folder), folder, "", None, None, folder, print))
        self._rows = rows

    def _entries(self) -> Iterator[Entry]:
        for number in range(CLASSES):
            name = f"n{number:08d}"
            for at in range(number, self._rows, CLASSES):
                yield Entry._make((f"{name}/{name}_{at}.JPEG", -1, IMAGE, 10**18 + at))


def once(rows: int, work: Path) -> dict[str, float]:
    """Microseconds of CPU an image, and the peak of the memory."""
    with tempfile.TemporaryDirectory(prefix=".bench_plan_", dir=work) as folder:
        out = Path(folder)
        images, pack = out / "images", out / ".pack"
        images.mkdir()
        pack.mkdir()
        how = PackOptions(src=(str(images),), out=out, split=SplitOptions())
        source = MadeFolder(images, rows)
        plan = seconds(lambda: make_plan(pack / TABLE, [source], None, how, warn=lambda _: None))
        with open_table(pack / TABLE) as table:
            for shard in table.shards():
                made_receipt(pack, shard)
        end = seconds(lambda: finish(pack))
    found = dict(zip(("plan", "finish"), (1e6 * plan / rows, 1e6 * end / rows), strict=True))
    # Not getrusage's, which has that of the process before exec.
    state = Path("/proc/self/status").read_text()
    peak = int(state.partition("VmHWM:")[2].split()[0]) / 1024
    return {**found, "both": sum(found.values()), "peak_mib": peak}


def seconds(call: Callable[[], object]) -> float:
    """CPU time."""
    start = time.process_time()
    call()
    return time.process_time() - start


def made_receipt(work: Path, shard: ShardRow) -> None:
    """A shard's receipt and its file, which holds nothing; no two images are equal."""
    ids = np.arange(shard.first_id, shard.first_id + shard.records).astype(np.uint32)
    places = np.arange(shard.records).astype(np.uint64)
    size = shard.records * FRAMED
    with (work / shard.file).open("wb") as file:
        os.truncate(file.fileno(), size)
    ShardReceipt(
        file=shard.file,
        content=shard.content,
        stamps=shard.stamps,
        size=size,
        checksum="0" * 8,
        bytes_in=shard.bytes,
        multipart=0,
        reencoded=0,
        rotated=0,
        ids=ids,
        offsets=places * np.uint64(FRAMED),
        lengths=np.full(shard.records, FRAMED, np.uint32),
        sizes=np.full(shard.records, IMAGE, np.uint32),
        crc32=ids * np.uint32(2654435761),
    ).save(receipt_path(work, shard.file))


if __name__ == "__main__":
    print(json.dumps(once(int(sys.argv[1]), Path(sys.argv[2]))))
