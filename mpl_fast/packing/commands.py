"""Commands of make_rec: from parsed options to a result, as JSON or as lines of text."""

import argparse
import json
import sys
from pathlib import Path

from mpl_fast.errors import ConfigError, output_errors, printable
from mpl_fast.first_few import counted
from mpl_fast.packing.check.info import info, info_lines, per_class
from mpl_fast.packing.check.load_pack import load_pack
from mpl_fast.packing.check.lookup import extract, locate, save
from mpl_fast.packing.check.verify import verify
from mpl_fast.packing.dry_run import dry_run
from mpl_fast.packing.options import (
    CLASS_ORDERS,
    DEFAULT_LABELED,
    DRAWN,
    ImageOptions,
    Json,
    PackOptions,
    SplitOptions,
    image_option_errors,
    options_from,
)
from mpl_fast.packing.pack import finish_parts, pack
from mpl_fast.packing.publish.existing_pack import changed_options
from mpl_fast.packing.resplit import resplit
from mpl_fast.packing.write.progress import Progress

Result = tuple[Json, list[str]]  # the same result twice: JSON to print, and lines of text


def run_pack(known: argparse.Namespace) -> Result:
    """Pack, or with --dry-run return the plan."""
    options = _pack_options(known)
    if known.dry_run:
        planned = dry_run(options)
        return planned, _dry_run_lines(planned)
    done = pack(options)
    return done, _part_lines(known.out, done) if "part" in done else _pack_lines(known.out, done)


def run_finish(known: argparse.Namespace) -> Result:
    """Finish a pack whose parts are all there."""
    manifest = finish_parts(known.out, lock=known.lock)
    return manifest, _pack_lines(known.out, manifest, speed=False)


def run_resplit(known: argparse.Namespace) -> Result:
    """Draw the labeled images again."""
    old = load_pack(known.out)
    given = {name: getattr(known, name) for name in DRAWN}
    drawn = {name: value for name, value in given.items() if value is not None}
    manifest = resplit(known.out, drawn, lock=known.lock)
    lines = _split_lines(manifest["splits"], old["splits"])
    changed = changed_options(old["options"], manifest["options"])
    return manifest, [*lines, f"options: {changed or 'as before'}"]


def run_verify(known: argparse.Namespace) -> Result:
    """Check every byte of a pack; DataError after all damage was printed."""
    if known.j < 1:
        raise ConfigError(f"-j {known.j}: must be at least 1")
    totals = load_pack(known.out)["totals"]
    quiet = known.quiet or known.json
    stream = None if quiet else sys.stderr
    with Progress("verified", totals["images"], totals["bytes_out"], stream) as progress:
        report = verify(known.out, deep=known.deep, processes=known.j, progress=progress.update)
    if report.problems and known.json:
        print(json.dumps(report.as_json(), indent=1))
    elif report.problems and not quiet:
        print("\n".join(map(printable, report.lines())))
    report.require_sound()
    return report.as_json(), report.lines()


def run_info(known: argparse.Namespace) -> Result:
    """Return what a folder contains."""
    found = info(known.out, classes=known.classes)
    return found, info_lines(found)


def run_locate(known: argparse.Namespace) -> Result:
    """Find the record at a position that DALI printed."""
    found = locate(known.out, " ".join(known.where))
    return found.as_json(), found.lines()


def run_extract(known: argparse.Namespace) -> Result:
    """Write the image of a record to a file, or to standard output."""
    found, image = extract(known.out, known.what)
    if str(known.to) == "-" and known.json:
        raise ConfigError("--to - writes the image to standard output: there is no room for --json")
    if str(known.to) == "-":
        with output_errors(Path("standard output")):
            sys.stdout.buffer.write(image)
        return {}, []
    path = known.to or Path(Path(found.image).name)
    save(image, path, force=known.force)
    return {"file": str(path), **found.as_json()}, [str(path), *found.lines()]


def _pack_options(known: argparse.Namespace) -> PackOptions:
    given = vars(known) | {"src": tuple(known.src), "processes": known.j}
    given["unlabeled_src"] = tuple(known.unlabeled_src)
    if known.labeled is None:
        given["labeled"] = DEFAULT_LABELED[bool(known.unlabeled_src)]
    given["class_order"] = known.class_order or CLASS_ORDERS[0]
    given["quiet"] = known.quiet or known.json
    given["image"] = options_from(ImageOptions, given)
    given["split"] = options_from(SplitOptions, given)
    wrong = image_option_errors(given["image"])
    for name, value in (("--shards", known.shards), ("-j", known.j)):
        if value is not None and value < 1:
            wrong.append(f"{name} {value}: must be at least 1")
    if known.read_threads < 0:
        wrong.append(f"--read-threads {known.read_threads}: must be 0 or more")
    if wrong:
        raise ConfigError("; ".join(wrong))
    return options_from(PackOptions, given)


def _part_lines(out: Path, done: Json) -> list[str]:
    missing = len(done["shards_missing"])
    written = counted(len(done["shards"]), "shard is", "shards are")
    return [
        f"part {done['part']}: {written} written",
        f"{counted(missing, 'shard of another part is', 'shards of other parts are')} missing"
        if missing
        else f"every shard is there; now: make_rec.py finish {out}",
    ]


def _pack_lines(out: Path, manifest: Json, *, speed: bool = True) -> list[str]:
    """Return the summary of a pack."""
    if manifest.get("mended"):
        return [f"{out}: packed again: {', '.join(manifest['mended'])}"]
    if manifest.get("already_complete"):
        return [f"{out}: already complete, nothing to do; verify checks every byte"]
    # An image may be in two .rec files.
    actions = [action for _, action in {(r["source"], r["action"]) for r in manifest["bad"]}]
    changed = [
        f"{counted(actions.count(action), 'image was', 'images were')} {action}; the manifest "
        f"names {'it' if actions.count(action) == 1 else 'them'}"
        for action in sorted(set(actions))
    ]
    totals, splits = manifest["totals"], manifest["splits"]
    whole = (
        f"{out}: {counted(totals['images'], 'record')}, "
        f"{counted(manifest['classes']['n'], 'class', 'classes')}, "
        f"{totals['bytes_out']} bytes in {counted(len(manifest['shards']), 'shard')}"
    )
    if speed:
        seconds = max(totals["seconds"], 1e-3)
        whole += (
            f", {totals['seconds']:.1f} s, {totals['images'] / seconds:.0f} images/s, "
            f"{totals['bytes_out'] / seconds / 1e6:.1f} MB/s"
        )
    lines = [
        f"{line}, {counted(len(split['shards']), 'shard')}"
        for line, split in zip(_split_lines(splits), splits.values(), strict=True)
    ]
    return [*lines, *changed, whole, *_no_val_lines(splits)]


def _dry_run_lines(planned: Json) -> list[str]:
    shards = planned["shards"]
    sizes = [shard["bytes"] for shard in shards]
    read, written = planned["bytes_in"] / 1e9, planned["bytes_out_at_most"] / 1e9
    without = "neither the disk nor unpacking is" if planned["unpacked"] else "the disk is not"
    return [
        *_split_lines(planned["splits"]),
        f"{counted(len(shards), 'shard')} of {min(sizes) / 1e6:.1f} to {max(sizes) / 1e6:.1f} MB: "
        f"{shards[0]['file']} ... {shards[-1]['file']}",
        f"{planned['out']}: {counted(planned['images'], 'record')}, "
        f"{counted(planned['classes'], 'class', 'classes')}, {read:.3f} GB read, at most "
        f"{written:.3f} GB written, {planned['seconds_at_least']} s and more (from a sample; "
        f"{without} in it)",
        *_no_val_lines(planned["splits"]),
        f"dry run: nothing was written to {planned['out']}",
    ]


def _no_val_lines(splits: Json) -> list[str]:
    return [] if "val" in splits else ["no validation images: training needs --val"]


def _split_lines(splits: Json, before: Json | None = None) -> list[str]:
    """Return a line for each split; of one that is drawn anew also what it was before."""
    lines = []
    for name, split in splits.items():
        count = counted(split["records"], "record")
        if before and name in ("labeled", "unlabeled"):
            count = f"{counted(before[name]['records'], 'record')} before, {split['records']} now"
        lines.append(f"{name}: {count}, {per_class(split)}")
    return lines
