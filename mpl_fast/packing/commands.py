"""The commands of make_rec: from parsed options to the result, as JSON or as lines to read."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

from mpl_fast.errors import ConfigError
from mpl_fast.packing.check.inspection import info, info_lines, load_pack
from mpl_fast.packing.check.lookup import extract, locate, save
from mpl_fast.packing.check.verify import verify
from mpl_fast.packing.dry_run import dry_run
from mpl_fast.packing.options import ImageOptions, PackOptions, SplitOptions, image_option_errors
from mpl_fast.packing.pack import finish_parts, pack
from mpl_fast.packing.resplit import resplit
from mpl_fast.packing.write.progress import Progress

Json = dict[str, Any]
Result = Json | list[str]  # JSON to print, or lines to read


def run_pack(known: argparse.Namespace) -> Result:
    """Pack, or tell what packing would do."""
    options = _pack_options(known)
    if known.dry_run:
        told = dry_run(options)
        return told if known.json else _dry_lines(told)
    done = pack(options)
    return done if known.json else _pack_lines(options, done)


def run_finish(known: argparse.Namespace) -> Result:
    """Finish a pack whose parts are all there."""
    manifest = finish_parts(known.out)
    if known.json:
        return manifest
    if manifest.get("already_complete"):
        return [f"{known.out}: already complete, nothing to do; verify looks at every byte"]
    return _summary(str(known.out), manifest, finished=True)


def run_resplit(known: argparse.Namespace) -> Result:
    """Draw the labeled images anew."""
    manifest = resplit(
        known.out,
        labeled=known.labeled,
        split_seed=known.split_seed,
        balance=known.balance,
        unlabeled=known.unlabeled,
    )
    if known.json:
        return manifest
    return [
        f"{name}: {split['records']} records, {_per_class(split)}"
        for name, split in manifest["splits"].items()
    ]


def run_verify(known: argparse.Namespace) -> Result:
    """Look at every byte of a pack; DataError tells of damage, after all of it was listed."""
    if known.j < 1:
        raise ConfigError(f"-j {known.j}: must be at least 1")
    totals = read_manifest_totals(known.out)
    quiet = known.quiet or known.json
    progress = None if quiet else Progress("verified", *totals, sys.stderr)
    try:
        report = verify(
            known.out,
            deep=known.deep,
            processes=known.j,
            progress=progress.update if progress else lambda records, size: None,
        )
    finally:
        if progress:
            progress.close()
    if report.problems and not quiet:
        print("\n".join(report.lines()))
    elif report.problems and known.json:
        print(json.dumps(report.as_json(), indent=1))
    report.require_sound()
    return report.as_json() if known.json else report.lines()


def read_manifest_totals(root: Path) -> tuple[int, int]:
    """Return the records and bytes of a finished pack."""
    totals = load_pack(root)["totals"]
    return totals["images"], totals["bytes_out"]


def run_info(known: argparse.Namespace) -> Result:
    """Tell what a folder holds."""
    told = info(known.out)
    return told if known.json else info_lines(told)


def run_locate(known: argparse.Namespace) -> Result:
    """Find the record that DALI tells of."""
    found = locate(known.out, " ".join(known.where))
    return found.as_json() if known.json else found.lines()


def run_extract(known: argparse.Namespace) -> Result:
    """Write the image of a record to a file, or to standard output."""
    found, image = extract(known.out, known.what)
    if str(known.to) == "-" and known.json:
        raise ConfigError("--to - writes the image to standard output: there is no room for --json")
    if str(known.to) == "-":
        sys.stdout.buffer.write(image)
        return []
    path = known.to or Path(Path(found.image).name)
    save(image, path, force=known.force)
    return {"file": str(path), **found.as_json()} if known.json else [str(path), *found.lines()]


def _pack_options(known: argparse.Namespace) -> PackOptions:
    image_options = ImageOptions(
        **{item.name: getattr(known, item.name) for item in fields(ImageOptions)}
    )
    wrong = image_option_errors(image_options)
    for name, value in (("--shards", known.shards), ("-j", known.j)):
        if value is not None and value < 1:
            wrong.append(f"{name} {value}: must be at least 1")
    if known.read_threads < 0:
        wrong.append(f"--read-threads {known.read_threads}: must be 0 or more")
    if wrong:
        raise ConfigError("; ".join(wrong))
    return PackOptions(
        src=tuple(known.src),
        out=known.out,
        val=known.val,
        root=known.root,
        labels=known.labels,
        val_labels=known.val_labels,
        split=SplitOptions(
            **{item.name: getattr(known, item.name) for item in fields(SplitOptions)}
        ),
        image=image_options,
        part=known.part,
        engine=known.engine,
        processes=known.j,
        read_threads=known.read_threads,
        force=known.force,
        quiet=known.quiet or known.json,
    )


def _pack_lines(options: PackOptions, done: Json) -> list[str]:
    if "part" in done:
        missing = len(done["shards_missing"])
        lines = [f"part {done['part']}: {len(done['shards'])} shards are written"]
        if missing:
            return [*lines, f"{missing} shards of other parts are missing"]
        return [*lines, f"every shard is there; now: make_rec.py finish {options.out}"]
    if done.get("mended"):
        return [f"{options.out}: packed again: {', '.join(done['mended'])}"]
    if done.get("already_complete"):
        return [f"{options.out}: already complete, nothing to do; verify looks at every byte"]
    return _summary(str(options.out), done)


def _summary(out: str, manifest: Json, *, finished: bool = False) -> list[str]:
    """Return what a pack has become; where it was only finished, its time says nothing."""
    lines = []
    for name, split in manifest["splits"].items():
        lines.append(
            f"{name}: {split['records']} records, {_per_class(split)}, "
            f"{len(split['shards'])} shards"
        )
    # An image may be in two .rec files.
    actions = [action for _, action in {(r["source"], r["action"]) for r in manifest["bad"]}]
    for action in sorted(set(actions)):
        lines.append(f"{actions.count(action)} images were {action}; the manifest names them")
    totals = manifest["totals"]
    seconds = max(totals["seconds"], 1e-3)
    speed = (
        f", {totals['seconds']:.1f} s, {totals['images'] / seconds:.0f} images/s, "
        f"{totals['bytes_out'] / seconds / 1e6:.1f} MB/s"
    )
    whole = (
        f"{out}: {totals['images']} records, {manifest['classes']['n']} classes, "
        f"{totals['bytes_out']} bytes in {len(manifest['shards'])} shards"
    )
    return [*lines, whole if finished else whole + speed]


def _dry_lines(told: Json) -> list[str]:
    lines = [
        f"{name}: {split['records']} records, {_per_class(split)}"
        for name, split in told["splits"].items()
    ]
    shards = told["shards"]
    sizes = [shard["bytes"] for shard in shards]
    return [
        *lines,
        f"{len(shards)} shards of {min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f} MB: "
        f"{shards[0]['file']} ... {shards[-1]['file']}",
        f"{told['out']}: {told['images']} records, {told['classes']} classes, "
        f"{told['bytes_in'] / 1e9:.3f} GB read, at most {told['bytes_out_at_most'] / 1e9:.3f} GB "
        f"written, {told['seconds_at_least']} s and more (from a sample; the disk is not in it)",
        "dry run: nothing was written",
    ]


def _per_class(split: Json) -> str:
    low, high = split["per_class_min"], split["per_class_max"]
    return f"{low if low == high else f'{low} to {high}'} a class"
