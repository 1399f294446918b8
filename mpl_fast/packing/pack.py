"""The pack command: plan, write every shard, publish; or one part of it on one of many machines."""

import sys
import time
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from mpl_fast.atomic import write_json, write_text
from mpl_fast.data.manifest import MANIFEST, load_manifest
from mpl_fast.errors import DataError, OutputError, output_errors
from mpl_fast.first_few import counted, first_few
from mpl_fast.packing.options import ImageOptions, Json, PackOptions
from mpl_fast.packing.plan.make_plan import RECORD_BYTES, TABLE_BYTES
from mpl_fast.packing.plan.prepare import check_options, plan_to, warn
from mpl_fast.packing.plan.table import TABLE, ShardRow, open_table, origin_of
from mpl_fast.packing.publish.existing_pack import changed_options, check_existing, require_same
from mpl_fast.packing.publish.finish import finish, unfinished_shards
from mpl_fast.packing.publish.out_folder import OutFolder, open_out_folder
from mpl_fast.packing.write.image_check import NO_IMAGE
from mpl_fast.packing.write.pool import Job, run_jobs
from mpl_fast.packing.write.progress import Progress
from mpl_fast.packing.write.ray_engine import run_ray
from mpl_fast.packing.write.shard_job import run_job
from mpl_fast.packing.write.shard_receipt import Remark, receipt_path

_LISTED = 10  # bad images in one line; more have a line each


def pack(options: PackOptions) -> Json:
    """Write records as `options` describe; return the manifest, or of a part what it did.

    Raises DataError for sources and images, ConfigError for options, OutputError for the output
    folder, UserError for a worker that died. Then, and after an interrupt, finished shards are
    kept beside the plan for the next run, and no file of this run has its final name.
    """
    started = time.monotonic()
    check_options(options)
    with open_out_folder(options.out, shared=options.part is not None, lock=options.lock) as folder:
        if options.part is not None:
            return _pack_part(folder, options, options.part)
        _plan(folder, options)
        if folder.pack_files() and not options.force:
            return _keep_existing(folder, options)
        with output_errors(folder.path):
            _write(folder, _shards(folder), options)
            return publish_pack(folder, started)


def publish_pack(folder: OutFolder, started: float) -> Json:
    """Finish a work folder that has all shards, and rename its files to their final names."""
    manifest = finish(folder.work)
    manifest["totals"]["seconds"] = round(time.monotonic() - started, 3)
    write_json(folder.work / MANIFEST, manifest)
    folder.publish()
    return manifest


def finish_parts(out: Path, *, lock: bool = True) -> Json:
    """Finish a folder whose parts were packed one by one; return the manifest.

    Raises DataError that names the missing shards.
    """
    started = time.monotonic()
    if not out.is_dir():
        raise DataError(f"{out}: no such folder; pack its parts first")
    with open_out_folder(out, lock=lock) as folder, output_errors(out):
        if not (folder.work / TABLE).exists():
            if MANIFEST in folder.pack_files():
                return {"already_complete": True, **load_manifest(out)}
            raise DataError(f"{out}: holds no plan; pack its parts first (pack --part 1/2 ...)")
        return publish_pack(folder, started)


def _shards(folder: OutFolder) -> list[ShardRow]:
    with open_table(folder.work / TABLE) as table:
        return table.shards()


def _changed_options(folder: OutFolder, options: PackOptions) -> str:
    """Return the options that differ from those of the plan, in one line."""
    with open_table(folder.work / TABLE) as table:
        return changed_options(table.options(), options.planned())


def _plan(folder: OutFolder, options: PackOptions) -> None:
    """Make the plan; keep those finished shards of an interrupted run that it contains too."""
    new = folder.work / "plan.new"
    with output_errors(folder.path):
        plan_to(new, options)
        finished = folder.finished()
        with open_table(new) as table:
            shards = table.shards() if finished else []
        kept = {shard.file for shard in shards} - set(unfinished_shards(folder.work, shards))
        lost = sorted(set(finished) - kept)
        if lost and not options.force:
            of = counted(len(finished), "finished shard")
            if changed := _changed_options(folder, options):
                raise OutputError(
                    f"{folder.path}: holds an unfinished pack with other options ({changed}), and "
                    f"{len(lost)} of its {of} would be lost; go on with those, choose another "
                    "--out, or --force"
                )
            warn([f"packed again: {len(lost)} of {of}: {first_few(lost, 1)}"])
        for name in lost:
            receipt_path(folder.work, name).unlink()
            (folder.work / name).unlink(missing_ok=True)
        new.replace(folder.work / TABLE)


def _keep_existing(folder: OutFolder, options: PackOptions) -> Json:
    """Keep the finished pack in the folder if it is the planned one; pack broken shards again."""
    with open_table(folder.work / TABLE) as table:
        manifest, broken = check_existing(folder, table, options.planned())
        shards = [shard for shard in table.shards() if shard.file in broken]
    if not broken:
        folder.clear_work()
    else:
        with output_errors(folder.path):
            _write(folder, shards, options)
            require_same(folder, manifest, broken)
            (folder.work / TABLE).unlink()  # the finished table stays where it is
            write_text(folder.work / MANIFEST, (folder.path / MANIFEST).read_text(encoding="utf-8"))
            folder.publish()
    return {"already_complete": True, "mended": broken, **manifest}


def _pack_part(folder: OutFolder, options: PackOptions, part: tuple[int, int]) -> Json:
    number, parts = part
    files = folder.pack_files()
    if MANIFEST in files and not options.force:
        manifest = load_manifest(folder.path)
        if not changed_options(manifest.get("options", {}), options.planned()):
            return {"already_complete": True, **manifest}
    if files and not options.force:
        what = "a finished pack" if MANIFEST in files else f"{files[0]} of an unknown pack"
        raise OutputError(f"{folder.path}: holds {what}; choose another --out, or --force")
    busy = f"part {number}/{parts} is being packed by another make_rec"
    with output_errors(folder.path), folder.locked(f"part-{number}-of-{parts}", busy):
        with folder.locked("plan"):
            _plan_once(folder, options)
        everything = _shards(folder)
        shards = [shard for shard in everything if shard.number % parts == number - 1]
        try:
            _write(folder, shards, options)
        except DataError as error:
            raise DataError(
                f"{error} (then run this part with --force while no other is being packed: it "
                "plans anew and keeps the shards that fit; run the others again as well, with the "
                "same options and without --force)"
            ) from error
        missing = unfinished_shards(folder.work, everything)
    return {
        "part": f"{number}/{parts}",
        "shards": [shard.file for shard in shards],
        "shards_missing": missing,
    }


def _plan_once(folder: OutFolder, options: PackOptions) -> None:
    """Make the plan unless another part has; then compare its options only.

    --force makes it again when no other part is being packed; finished shards that the new plan
    contains too are kept.
    """
    if not (folder.work / TABLE).exists():
        _plan(folder, options)
        return
    if options.force:
        with folder.exclusive() as alone:
            if alone:  # nobody writes shards of the old plan
                _plan(folder, options)
                return
    if changed := _changed_options(folder, options):
        raise OutputError(
            f"{folder.path}: the parts of this pack have other options ({changed}); use those, "
            "another --out, or --force while no other part is being packed"
        )


def _write(folder: OutFolder, shards: Sequence[ShardRow], options: PackOptions) -> None:
    """Write every shard that is missing; DataError lists all faulty images."""
    missing = set(unfinished_shards(folder.work, shards))
    todo = [shard for shard in shards if shard.file in missing]
    if options.image.short_side is None:  # else the size is not known before
        size, records = sum(s.bytes for s in todo), sum(s.records for s in todo)
        folder.require_space(int(1.05 * (size + (RECORD_BYTES + TABLE_BYTES) * records)))
    how, write = (options.image, options.read_threads), partial(run_job, lock=options.lock)
    jobs = [
        Job(shard.file, shard.bytes, partial(write, folder.work, shard, *how), shard.records)
        for shard in shards
    ]
    images, size = sum(s.records for s in shards), sum(s.bytes for s in shards)
    with Progress("packed", images, size, None if options.quiet else sys.stderr) as progress:
        if options.engine == "ray" and jobs:  # else no cluster is needed
            remarks = run_ray(jobs, progress.update)
        else:
            remarks = run_jobs(jobs, options.processes, progress.update)
    _require_usable(folder, (remark for job in remarks for remark in job), options.image)


def _require_usable(folder: OutFolder, remarks: Iterable[Remark], how: ImageOptions) -> None:
    """DataError that lists the faulty images, unless they may be skipped."""
    # With "fail", shards that an earlier run finished with --on-bad skip may lack images.
    refused = {"failed", "skipped"} if how.on_bad == "fail" else {"failed"}
    with open_table(folder.work / TABLE) as table:
        sources = table.sources()
        faults, convertible = [], False
        for remark in remarks:
            if remark.action in refused and (record := table.record(remark.id)):
                faults.append(f"{origin_of(sources[record.source], record)}: {remark.reason}")
                convertible |= how.on_bad == "fail" and remark.reason not in NO_IMAGE
    if faults:
        every = sorted(set(faults))
        listed = first_few(every, _LISTED, "; ")
        if len(every) > _LISTED:
            warn(every)
            listed = "those in the lines above"
        convert = "--on-bad convert" + ("" if how.check == "decode" else " --check decode")
        if folder.finished():  # their options would be others
            convert += " --force, which packs finished shards again"
        skip = "--on-bad skip, which keeps every finished shard"
        if how.on_bad == "convert" and folder.finished():
            skip = (
                "--on-bad skip --force, which also leaves out what could be converted, and packs "
                "finished shards again"
            )
        or_convert = f", or make JPEGs of what can be decoded of them with {convert}"
        raise DataError(
            f"{counted(len(every), 'image')} cannot be used, nothing was published: "
            f"{listed}; repair or remove them, or leave them out with "
            f"{skip}{or_convert if convertible else ''}"
        )
