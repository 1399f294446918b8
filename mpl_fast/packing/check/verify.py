"""The verify command: checks every file and record of a finished pack and lists all damage."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mpl_fast.data.manifest import CLASSES
from mpl_fast.errors import DataError
from mpl_fast.first_few import first_few
from mpl_fast.packing.check.listing_check import check_split, check_table
from mpl_fast.packing.check.load_pack import load_pack
from mpl_fast.packing.check.shard_check import Problem, check_shard, file_fault
from mpl_fast.packing.write.pool import Job, run_jobs


@dataclass(frozen=True)
class Report:
    """What was checked, and all problems."""

    root: Path
    deep: bool
    shards: int
    records: int
    bytes: int
    seconds: float
    problems: tuple[Problem, ...]

    def as_json(self) -> dict[str, Any]:
        """Return the report as values of JSON."""
        return {
            "folder": str(self.root),
            "deep": self.deep,
            "sound": not self.problems,
            "shards": self.shards,
            "records": self.records,
            "bytes": self.bytes,
            "seconds": round(self.seconds, 3),
            "problems": [problem.as_json() for problem in self.problems],
        }

    def lines(self) -> list[str]:
        """Return the report as text: every problem, then what was checked."""
        rate = self.bytes / max(self.seconds, 1e-9)
        how = "decoded every image of" if self.deep else "compared with their checksums"
        counted = f"{self.records} records in {self.shards} .rec files ({self.bytes / 1e9:.3f} GB)"
        what = f"{how} {counted}" if self.deep else f"{counted} {how}"
        found = self._count() if self.problems else "all is sound"
        end = f"{what} in {self.seconds:.1f} s ({rate / 1e6:.0f} MB/s): {found}"
        return [*map(str, self.problems), end]

    def require_sound(self) -> None:
        """DataError with the first problems and the remedy, if there are any."""
        if not self.problems:
            return
        files = list(dict.fromkeys(problem.file for problem in self.problems))
        shards = [file for file in files if file.endswith(".rec")]
        remedy = (
            f"delete {first_few(shards, 3)} and run its pack command again (info shows the "
            "options): only that is packed anew"
            if shards == files and not all(problem.undecodable for problem in self.problems)
            else "delete the folder's files and pack again"
        )
        listed = first_few(map(str, self.problems), 3, "; ")
        raise DataError(f"{self.root}: {self._count()}: {listed}; {remedy}")

    def _count(self) -> str:
        return "1 problem" if len(self.problems) == 1 else f"{len(self.problems)} problems"


def verify(
    root: Path, *, deep: bool, processes: int, progress: Callable[[int, int], None]
) -> Report:
    """Check every file of a finished folder; deep also decodes every image.

    progress is called a few times a second with the records and bytes done. Damage is listed in
    the report. Raises DataError when there is no finished pack, UserError when a worker dies.
    """
    started = time.monotonic()
    manifest = load_pack(root)
    shards, problems = check_table(root, manifest)
    fault = file_fault(root, CLASSES, "sha256", manifest["classes"]["sha256"])
    if fault:
        problems.append(Problem(CLASSES, fault))
    entries = manifest["shards"]
    jobs = [
        Job(
            entry["file"],
            entry["bytes"],
            partial(check_shard, root, entry, shards.get(entry["file"]), deep),
        )
        for entry in entries
    ]
    jobs += [
        Job(split["lst"], 0, partial(check_split, root, name, bool(shards)))
        for name, split in manifest["splits"].items()
    ]
    for found in run_jobs(jobs, processes, progress):
        problems += found
    return Report(
        root=root,
        deep=deep,
        shards=len(entries),
        records=sum(entry["records"] for entry in entries),
        bytes=sum(entry["bytes"] for entry in entries),
        problems=tuple(problems),
        seconds=time.monotonic() - started,
    )
