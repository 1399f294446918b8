"""Packing: list the sources and plan, write each shard on its own, finish with the manifest."""

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mpl_fast.data.manifest import (
    MANIFEST,
    check_texts,
    file_names,
    load_manifest,
    read_manifest,
)
from mpl_fast.errors import ConfigError, DataError, OutputError, output_errors
from mpl_fast.packing.archives import Archives
from mpl_fast.packing.finish import finish
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.out_folder import OutFolder
from mpl_fast.packing.plan import Division, Plan, make_plan
from mpl_fast.packing.progress import Progress
from mpl_fast.packing.shard import ShardResult
from mpl_fast.packing.sources import Source, find_place, read_source
from mpl_fast.packing.workers import write_shards

_TEXT_BYTES = 200  # about what a record adds besides its image: frame, header, .idx and .lst rows
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What `make_rec.py pack` was asked for; src and val are DIR, ARCHIVE or ARCHIVE:FOLDER."""

    src: str
    out: Path
    val: str | None = None
    division: Division = field(default_factory=Division)
    processes: int = 1
    force: bool = False
    quiet: bool = False


def pack(options: PackOptions) -> list[str]:
    """Write the records that options ask for; return the lines of a summary for the user.

    Raises DataError for sources and images, ConfigError for options, OutputError for the output
    folder. Then, and on an interrupt, no file of this run has its final name; only an error while
    the files get their names leaves some, and the same run again finishes them.
    """
    started = datetime.now(timezone.utc)
    clock = time.monotonic()
    _check_options(options)
    with OutFolder(options.out) as folder, Archives(folder.path, _say(options)) as archives:
        train = read_source(find_place(options.src), archives)
        val = read_source(find_place(options.val), archives) if options.val is not None else None
        plan = make_plan(train, val, options.division)
        _warn(train, val, plan)
        if folder.holdings() and not options.force:
            _require_same(folder, options, plan, max(s.modified for s in (train, val or train)))
            return [f"{folder.path}: already complete, nothing to do"]
        with output_errors(folder.path):
            results = _write(folder, plan, options)
            manifest = finish(folder, plan, results, _options_json(options))
            seconds = time.monotonic() - clock
            manifest["created"] = started.isoformat()
            manifest["totals"]["seconds"] = round(seconds, 3)
            folder.write_text(MANIFEST, json.dumps(manifest, indent=1) + "\n")
            folder.publish(file_names(manifest))
        return _summary(folder.path, manifest)


def _check_options(options: PackOptions) -> None:
    """Refuse what can be refused before anything is created."""
    division = options.division
    for name, value in (("--shards", division.shards), ("-j", options.processes)):
        if value < 1:
            raise ConfigError(f"{name} {value}: must be at least 1")
    for name, spec in (("--src", options.src), ("--val", options.val)):
        if spec == "":
            raise ConfigError(f"{name}: its value is empty; give a folder or an archive")
    with output_errors(options.out):
        out = options.out.resolve()
        if options.out.exists() and not options.out.is_dir():
            raise OutputError(f"--out {options.out}: is a file, not a folder")
    for spec in (options.src, options.val):
        if spec is None:
            continue
        path = find_place(spec).path.resolve()
        if out == path or path in out.parents:
            raise ConfigError(f"--out {options.out}: lies inside the source {spec}")


def _say(options: PackOptions) -> Callable[[str], None]:
    def say(line: str) -> None:
        if not options.quiet:
            print(f"make_rec: {line}", file=sys.stderr, flush=True)

    return say


def _warn(train: Source, val: Source | None, plan: Plan) -> None:
    warnings = [*train.warnings, *(val.warnings if val else [])]
    if val is not None:
        absent = len(plan.classes) - len({image.class_name for image in val.images})
        if absent:
            warnings.append(f"{val.place.spec}: has no image of {absent} of the classes")
    for line in warnings:
        print(f"make_rec: warning: {line}", file=sys.stderr, flush=True)


def _require_same(folder: OutFolder, options: PackOptions, plan: Plan, modified: float) -> None:
    """Return when the folder holds this very pack; OutputError for anything else.

    Of the records only the size is looked at, all other files are compared with their sha256.
    """
    remedy = "choose another --out, or --force to replace it"
    if MANIFEST not in folder.holdings():
        raise OutputError(
            f"{folder.path}: holds {folder.holdings()[0]} of an unknown pack; {remedy}"
        )
    try:
        read_manifest(folder.path)
        check_texts(folder.path, load_manifest(folder.path))
    except DataError as error:
        raise OutputError(f"{folder.path}: holds a damaged pack ({error}); {remedy}") from error
    old = load_manifest(folder.path)
    if old.get("plan_sha256") != plan.digest():
        new_options, old_options = _options_json(options), old["options"]
        changed = [
            f"{name} was {old_options.get(name)}, now {value}"
            for name, value in new_options.items()
            if value != old_options.get(name)
        ]
        what = ", ".join(changed) or "its source's files were others"
        raise OutputError(f"{folder.path}: holds another pack ({what}); {remedy}")
    if modified > datetime.fromisoformat(old["created"]).timestamp():
        raise OutputError(f"{folder.path}: its source changed after it was packed; {remedy}")


def _write(folder: OutFolder, plan: Plan, options: PackOptions) -> list[ShardResult]:
    """Write every shard of plan under its temporary name; DataError lists every faulty image."""
    sizes = [image.size for shard in plan.shards for image in shard.images]
    folder.require_space(int(1.05 * (sum(sizes) + _TEXT_BYTES * len(sizes))))
    progress = None if options.quiet else Progress(len(sizes), sum(sizes), sys.stderr)
    jobs = [(shard, folder.temporary(shard.file)) for shard in plan.shards]
    try:
        results = write_shards(
            jobs, options.processes, progress.update if progress else lambda images, size: None
        )
    finally:
        if progress:
            progress.close()
    faults = _faults(plan, results, options)
    if faults:
        listed = first_few(faults, between="; ")
        raise DataError(f"{len(faults)} images cannot be used, nothing was kept: {listed}")
    return results


def _faults(plan: Plan, results: Sequence[ShardResult], options: PackOptions) -> list[str]:
    """Return `image: reason` once for each faulty image, named so that it can be found."""
    faults = set()
    remaining = iter(results)
    for split in plan.splits:
        spec = (options.val if split.name == "val" else options.src) or ""
        in_folder = Path(spec).is_dir()
        for _ in split.shards:
            for image, reason in next(remaining).faults:
                faults.add(f"{image.path if in_folder else f'{spec}: {image.key}'}: {reason}")
    return sorted(faults)


def _options_json(options: PackOptions) -> Json:
    return {"src": options.src, "val": options.val, **asdict(options.division)}


def _summary(root: Path, manifest: Json) -> list[str]:
    lines = []
    for name, split in manifest["splits"].items():
        size = sum(shard["bytes"] for shard in split["shards"])
        low, high = split["per_class_min"], split["per_class_max"]
        lines.append(
            f"{name}: {split['records']} records, {low if low == high else f'{low} to {high}'} "
            f"a class, {size} bytes, {len(split['shards'])} shards"
        )
    totals = manifest["totals"]
    rate = totals["images"] / max(totals["seconds"], 1e-3)
    lines.append(
        f"{root}: {totals['images']} records, {manifest['classes']['n']} classes, "
        f"{totals['bytes_out']} bytes, {totals['seconds']:.1f} s, {rate:.0f} images/s"
    )
    return lines
