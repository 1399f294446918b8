"""Commands of make_rec: from parsed options to a result, as JSON or as lines of text."""

import argparse
import json
import sys
from dataclasses import fields
from pathlib import Path

from mpl_fast.errors import ConfigError
from mpl_fast.packing.check.info import info, info_lines, per_class
from mpl_fast.packing.check.load_pack import load_pack
from mpl_fast.packing.check.lookup import extract, locate, save
from mpl_fast.packing.check.verify import verify
from mpl_fast.packing.dry_run import dry_run
from mpl_fast.packing.options import (
    ImageOptions,
    Json,
    PackOptions,
    SplitOptions,
    image_option_errors,
)
from mpl_fast.packing.pack import finish_parts, pack
from mpl_fast.packing.resplit import resplit
from mpl_fast.packing.write.progress import Progress

Result = Json | list[str]  # JSON to print, or lines of text


def run_pack(known: argparse.Namespace) -> Result:
    """Pack, or with --dry-run return the plan."""
    options = _pack_options(known)
    if known.dry_run:
        planned = dry_run(options)
        return planned if known.json else _dry_run_lines(planned)
    done = pack(options)
    return done if known.json else _pack_lines(options, done)


def run_finish(known: argparse.Namespace) -> Result:
    """Finish a pack whose parts are all there."""
    manifest = finish_parts(known.out)
    if known.json:
        return manifest
    if manifest.get("already_complete"):
        return [_complete(known.out)]
    return _summary(str(known.out), manifest, finished=True)


def run_resplit(known: argparse.Namespace) -> Result:
    """Draw the labeled images again."""
    manifest = resplit(
        known.out,
        labeled=known.labeled,
        split_seed=known.split_seed,
        balance=known.balance,
        unlabeled=known.unlabeled,
    )
    return manifest if known.json else _split_lines(manifest["splits"])


def run_verify(known: argparse.Namespace) -> Result:
    """Check every byte of a pack; DataError after all damage was printed."""
    if known.j < 1:
        raise ConfigError(f"-j {known.j}: must be at least 1")
    totals = load_pack(known.out)["totals"]
    quiet = known.quiet or known.json
    stream = None if quiet else sys.stderr
    with Progress("verified", totals["images"], totals["bytes_out"], stream) as progress:
        report = verify(known.out, deep=known.deep, processes=known.j, progress=progress.update)
    if report.problems and not quiet:
        print("\n".join(report.lines()))
    elif report.problems and known.json:
        print(json.dumps(report.as_json(), indent=1))
    report.require_sound()
    return report.as_json() if known.json else report.lines()


def run_info(known: argparse.Namespace) -> Result:
    """Return what a folder contains."""
    found = info(known.out)
    return found if known.json else info_lines(found)


def run_locate(known: argparse.Namespace) -> Result:
    """Find the record at a position that DALI printed."""
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
    given = vars(known)
    image = ImageOptions(**{item.name: given[item.name] for item in fields(ImageOptions)})
    split = SplitOptions(**{item.name: given[item.name] for item in fields(SplitOptions)})
    wrong = image_option_errors(image)
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
        split=split,
        image=image,
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
        return [_complete(options.out)]
    return _summary(str(options.out), done)


def _complete(out: Path) -> str:
    return f"{out}: already complete, nothing to do; verify checks every byte"


def _summary(out: str, manifest: Json, *, finished: bool = False) -> list[str]:
    """Return the summary of a pack; if it was only finished, without its speed."""
    # An image may be in two .rec files.
    actions = [action for _, action in {(r["source"], r["action"]) for r in manifest["bad"]}]
    changed = [
        f"{actions.count(action)} images were {action}; the manifest names them"
        for action in sorted(set(actions))
    ]
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
    splits = manifest["splits"]
    lines = [
        f"{line}, {len(split['shards'])} shards"
        for line, split in zip(_split_lines(splits), splits.values(), strict=True)
    ]
    return [*lines, *changed, whole if finished else whole + speed]


def _dry_run_lines(planned: Json) -> list[str]:
    shards = planned["shards"]
    sizes = [shard["bytes"] for shard in shards]
    read, written = planned["bytes_in"] / 1e9, planned["bytes_out_at_most"] / 1e9
    return [
        *_split_lines(planned["splits"]),
        f"{len(shards)} shards of {min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f} MB: "
        f"{shards[0]['file']} ... {shards[-1]['file']}",
        f"{planned['out']}: {planned['images']} records, {planned['classes']} classes, "
        f"{read:.3f} GB read, at most {written:.3f} GB written, {planned['seconds_at_least']} s "
        "and more (from a sample; the disk is not in it)",
        "dry run: nothing was written",
    ]


def _split_lines(splits: Json) -> list[str]:
    return [
        f"{name}: {split['records']} records, {per_class(split)}" for name, split in splits.items()
    ]
