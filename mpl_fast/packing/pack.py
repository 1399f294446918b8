"""Packing: list the sources and plan, write each shard on its own, finish with the manifest."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mpl_fast.data.manifest import MANIFEST, load_manifest
from mpl_fast.errors import ConfigError, DataError, OutputError, output_errors
from mpl_fast.packing.first_few import first_few
from mpl_fast.packing.options import ImageOptions, PackOptions
from mpl_fast.packing.plan.make_plan import RECORD_BYTES, TABLE_BYTES, make_plan
from mpl_fast.packing.plan.table import TABLE, ShardRow, Table, place, reading
from mpl_fast.packing.publish.existing_pack import ExistingPack, changes, examine
from mpl_fast.packing.publish.finish import (
    describe_duplicates,
    describe_left_out,
    finish,
    unfinished,
)
from mpl_fast.packing.publish.out_folder import OutFolder
from mpl_fast.packing.publish.split_files import write_text
from mpl_fast.packing.sources.archives import Spools
from mpl_fast.packing.sources.source import Source, open_source
from mpl_fast.packing.write.progress import Progress
from mpl_fast.packing.write.ray_engine import run_ray
from mpl_fast.packing.write.workers import Jobs, run_local

Json = dict[str, Any]
LISTED = 10  # bad images in one line; more have a line each


def pack(options: PackOptions) -> Json:
    """Write the records that options ask for; return the manifest, or what a part did.

    Raises DataError for sources and images, ConfigError for options, OutputError for the output
    folder, UserError for a worker that died. Then, and on an interrupt, shards that are finished
    are kept beside the plan for the next run, and no file of this run has its final name.
    """
    started = time.monotonic()
    check_options(options)
    with OutFolder(options.out, shared=options.part is not None) as folder:
        if options.part is not None:
            return _pack_part(folder, options, options.part)
        _plan(folder, options)
        if folder.holdings() and not options.force:
            with reading(folder.work / TABLE) as table:
                held = examine(folder, table, options.planned())
            if not held.broken:
                folder.discard()
            else:
                _mend(folder, options, held)
            return {"already_complete": True, "mended": held.broken, **held.manifest}
        with reading(folder.work / TABLE) as table:
            shards = table.shards()
        with output_errors(folder.path):
            _write(folder, shards, options)
            return conclude(folder, options.image, started)


def conclude(folder: OutFolder, image_options: ImageOptions, started: float) -> Json:
    """Finish a folder whose shards are all written, and give everything its place."""
    created = datetime.now(timezone.utc).isoformat()
    manifest = finish(folder.work, image_options)
    manifest["created"] = created
    manifest["totals"]["seconds"] = round(time.monotonic() - started, 3)
    with reading(folder.work / TABLE) as table:
        left_out = describe_left_out(table, manifest)
    warn([left_out, describe_duplicates(manifest["duplicates"])])
    write_text(folder.work / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    folder.publish()
    return manifest


def finish_parts(out: Path) -> Json:
    """Finish a folder whose parts were packed one by one; return the manifest.

    DataError names the shards that are missing.
    """
    started = time.monotonic()
    if not out.is_dir():
        raise DataError(f"{out}: no such folder; pack its parts first")
    with OutFolder(out) as folder, output_errors(out):
        if not (folder.work / TABLE).exists():
            if MANIFEST in folder.holdings():
                return {"already_complete": True, **load_manifest(out)}
            raise DataError(f"{out}: holds no plan; pack its parts first (pack --part 1/2 ...)")
        with reading(folder.work / TABLE) as table:
            image_options = stored_image_options(table)
        return conclude(folder, image_options, started)


def stored_image_options(table: Table) -> ImageOptions:
    """Return the image_options that a plan was made with."""
    options = table.options()
    return ImageOptions(**{item.name: options[item.name] for item in fields(ImageOptions)})


def warn(lines: Sequence[str]) -> None:
    """Write warnings for the user; an empty line is none."""
    for line in filter(None, lines):
        print(f"make_rec: warning: {line}", file=sys.stderr, flush=True)


def check_options(options: PackOptions) -> None:
    """Refuse what can be refused before anything is created."""
    try:
        out = options.out.resolve()
        if options.out.exists() and not options.out.is_dir():
            raise OutputError(f"--out {options.out}: is a file, not a folder")
    except (OSError, RuntimeError) as error:  # of links in a circle
        raise OutputError(f"--out {options.out}: {_reason(error)}") from error
    if options.val_labels and options.val is None:
        raise ConfigError(f"--val-labels {options.val_labels}: there is no --val that needs them")
    for name, specs in (("--src", options.src), ("--val", (options.val,))):
        for spec in specs:
            if spec == "":
                raise ConfigError(f"{name}: its value is empty; give a folder or an archive")
            if spec and _lies_in(out, name, spec):
                raise ConfigError(f"--out {options.out}: lies inside the source {spec}")


def _lies_in(out: Path, name: str, spec: str) -> bool:
    try:
        path = Path(spec).resolve()
        return path.is_dir() and (out == path or path in out.parents)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{name} {spec}: {_reason(error)}") from error


def _reason(error: OSError | RuntimeError) -> str:
    return (isinstance(error, OSError) and error.strerror) or str(error)


def open_sources(options: PackOptions, work: Path) -> tuple[list[Source], Source | None]:
    """Return the training sources and the validation source; compressed ones are unpacked."""

    def say(line: str) -> None:
        if not options.quiet:
            print(f"make_rec: {line}", file=sys.stderr, flush=True)

    spools = Spools(work, say)
    train = [
        open_source(spec, root=options.root, labels=options.labels, spools=spools)
        for spec in options.src
    ]
    val = (
        open_source(options.val, root=options.root, labels=options.val_labels, spools=spools)
        if options.val is not None
        else None
    )
    return train, val


def plan_to(path: Path, options: PackOptions) -> None:
    """Write the plan to path, which lies in a work folder."""
    train, val = open_sources(options, path.parent)
    warn(make_plan(path, train, val, options.split, options.image, options.planned()))


def _plan(folder: OutFolder, options: PackOptions) -> None:
    """Make the plan, and keep of an interrupted run what is in this plan too."""
    new = folder.work / "plan.new"
    with output_errors(folder.path):
        plan_to(new, options)
        finished = folder.finished()
        if finished:
            with reading(new) as table:
                keeps = set(finished) - set(unfinished(folder.work, table.shards()))
                keeps &= {shard.file for shard in table.shards()}
            lost = sorted(set(finished) - keeps)
            if lost and not options.force:
                _require_same_options(folder, options, len(lost), len(finished))
                warn(
                    [
                        f"{len(lost)} of {len(finished)} finished shards are packed again: "
                        f"{first_few(lost, 1)}"
                    ]
                )
            for name in lost:
                (folder.work / f"{name}.done").unlink()
                (folder.work / name).unlink(missing_ok=True)
        new.replace(folder.work / TABLE)


def _require_same_options(folder: OutFolder, options: PackOptions, lost: int, of: int) -> None:
    with reading(folder.work / TABLE) as table:
        changed = changes(table.options(), options.planned())
    if changed:
        raise OutputError(
            f"{folder.path}: holds an unfinished pack with other options ({changed}), and {lost} "
            f"of its {of} finished shards would be lost; go on with those, choose another --out, "
            "or --force"
        )


def _pack_part(folder: OutFolder, options: PackOptions, part: tuple[int, int]) -> Json:
    number, parts = part
    held = folder.holdings()
    if MANIFEST in held and not options.force:
        manifest = load_manifest(folder.path)
        if not changes(manifest.get("options", {}), options.planned()):
            return {"already_complete": True, **manifest}
    if held and not options.force:
        what = "a finished pack" if MANIFEST in held else f"{held[0]} of an unknown pack"
        raise OutputError(f"{folder.path}: holds {what}; choose another --out, or --force")
    with (
        output_errors(folder.path),
        folder.held(
            f"part-{number}-of-{parts}",
            f"part {number}/{parts} is being packed by another make_rec",
        ),
    ):
        with folder.held("plan"):
            _plan_once(folder, options)
        with reading(folder.work / TABLE) as table:
            everything = table.shards()
        shards = [shard for shard in everything if shard.number % parts == number - 1]
        try:
            _write(folder, shards, options)
        except DataError as error:
            raise DataError(
                f"{error} (then run this part with --force while no other is being packed: it "
                "plans anew and keeps the shards that fit; run the others again as well, with the "
                "same options and without --force)"
            ) from error
        missing = unfinished(folder.work, everything)
    return {
        "part": f"{number}/{parts}",
        "shards": [shard.file for shard in shards],
        "shards_missing": missing,
    }


def _plan_once(folder: OutFolder, options: PackOptions) -> None:
    """Make the plan unless another part has: then only its options are compared.

    --force makes it anew when no other part is at work; finished shards stay that are in it, too.
    """
    path = folder.work / TABLE
    if not path.exists():
        _plan(folder, options)
        return
    if options.force:
        with folder.alone() as alone:
            if alone:  # nobody is at work by the old plan
                _plan(folder, options)
                return
    with reading(path) as table:
        changed = changes(table.options(), options.planned())
    if changed:
        raise OutputError(
            f"{folder.path}: the parts of this pack have other options ({changed}); use those, "
            "another --out, or --force while no other part is being packed"
        )


def _write(folder: OutFolder, shards: Sequence[ShardRow], options: PackOptions) -> None:
    """Write every shard that is not there yet; DataError lists every faulty image."""
    if not shards:
        return
    missing = set(unfinished(folder.work, shards))
    todo = [shard for shard in shards if shard.file in missing]
    records, size = (sum(getattr(s, name) for s in todo) for name in ("records", "bytes"))
    if options.image.short_side is None:  # else nobody knows before
        folder.require_space(int(1.05 * (size + (RECORD_BYTES + TABLE_BYTES) * records)))
    jobs = Jobs(folder.work, shards, options.image, options.read_threads)
    images, size = (sum(getattr(s, name) for s in shards) for name in ("records", "bytes"))
    progress = None if options.quiet else Progress("packed", images, size, sys.stderr)
    tell = progress.update if progress else lambda images, size: None
    try:
        if options.engine == "ray":
            remarks = run_ray(jobs, tell)
        else:
            remarks = run_local(jobs, options.processes, tell)
    finally:
        if progress:
            progress.close()
    faults = []
    # A shard that an earlier run finished with --on-bad skip may lack images.
    refused = {"failed", "skipped"} if options.image.on_bad == "fail" else {"failed"}
    with reading(folder.work / TABLE) as table:
        sources = table.sources()
        for remark in (remark for job in remarks for remark in job):
            record = table.record(remark.id)
            if remark.action in refused and record is not None:
                faults.append(f"{place(sources[record.source], record)}: {remark.reason}")
    if faults:
        every = sorted(set(faults))
        if len(every) > LISTED:
            warn(every)
        raise DataError(
            f"{len(every)} images cannot be used, nothing was published: "
            f"{first_few(every, LISTED, '; ')}; mend or remove them, or leave them out with "
            "--on-bad skip, which keeps every finished shard"
        )


def _mend(folder: OutFolder, options: PackOptions, held: ExistingPack) -> None:
    """Pack the broken shards of a finished pack again; they have to become what they were."""
    with reading(folder.work / TABLE) as table:
        shards = [shard for shard in table.shards() if shard.file in held.broken]
    with output_errors(folder.path):
        _write(folder, shards, options)
        held.require_equal(folder)
        (folder.work / TABLE).unlink()  # the finished table stays in its place
        write_text(folder.work / MANIFEST, (folder.path / MANIFEST).read_text(encoding="utf-8"))
        folder.publish()
