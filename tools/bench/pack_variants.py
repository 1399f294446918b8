"""The variants of the packing benchmark: the command of each, and the check of what it wrote."""

import argparse
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

from tools.bench.machine import ROOT
from tools.bench.pack_readers import Counts, count

MAKE_REC: list[Any] = [sys.executable, ROOT / "tools" / "make_rec.py"]
WRITER = ROOT / "tools" / "bench" / "pack_writers.py"
OUT = "{out}"  # in a command: its output folder
NUMBER = "{number}"  # in a command: another in each round
SHORT_SIDE = 480
KEPT_SIDE = round(1.1 * SHORT_SIDE)  # our --min-shrink: what is hardly larger keeps its bytes
# Pictures that all have to be made smaller, and photographs as ImageNet has them: group, data, end.
SHRUNK = (("short", "large", ""), ("photos", "photographs", "-photos"))
SHRINK = ("--quality", 90)
SHARDS = 8  # of 250 MB at 2 GB of images; so that two workers share the work evenly
PEERS = {"webdataset": "webdataset", "mds": "mosaicml-streaming", "im2rec": "mxnet"}  # packages


class Group(NamedTuple):
    """Variants that do the same work."""

    data: str  # the data set whose images and bytes are counted
    read: tuple[str, ...]  # what is brought into the page cache
    base: str  # of the ratios


GROUPS = {
    "pass": Group("images", ("images",), "copy"),
    "short": Group("large", ("large",), f"im2rec-{SHORT_SIDE}"),
    "photos": Group("photographs", ("photographs",), f"im2rec-{SHORT_SIDE}-photos"),
    "verify": Group("images", ("pack",), ""),
    "plan": Group("members", ("members.tar", "members.pack"), ""),
    "start": Group("", (), ""),
}


class Setting(NamedTuple):
    """Of one run of the benchmark."""

    options: argparse.Namespace
    folder: Path  # a temporary one
    versions: dict[str, str]  # of the peers' packages that are installed
    data: dict[str, Counts]  # the data sets, by name


class Variant(NamedTuple):
    """What is measured."""

    name: str
    group: str  # of GROUPS
    command: list[Any]
    written: str = ""  # what the output folder is read back as, see `pack_readers.count`
    given: Path | None = None  # a folder whose files have to be in the output folder before
    own_clock: bool = False  # it prints its own seconds, without start, import and listing


def all_variants(setting: Setting) -> list[Variant]:
    """All that are installed."""
    return [*_writers(setting), *_im2rec(setting), *_ours(setting), *_readers(setting)]


def im2rec_tool(setting: Setting) -> list[Any]:
    """The start of im2rec's command line; it lies in MXNet's package."""
    environment = setting.options.peers / "mxnet"
    [tool] = environment.glob("lib/python*/site-packages/mxnet/tools/im2rec.py")
    return [environment / "bin" / "python", tool]


def pack_command(source: Path, out: Any, *arguments: Any) -> list[Any]:
    """Our command line."""
    layout = ["--labeled", "10%", "--layout", "shared", "--shards", SHARDS]
    return [*MAKE_REC, "pack", "--src", source, "--out", out, *layout, *arguments]


def _writers(setting: Setting) -> list[Variant]:
    """A plain copy, tar, and the peers whose writer is called by a few lines of Python."""
    images, large = setting.folder / "images", setting.folder / "large"
    tar = ["tar", "-cf", f"{OUT}/images.tar", "-C", images, "."]
    copy = [sys.executable, WRITER, "copy", images, OUT]
    codecs = [sys.executable, WRITER, "codecs", large, OUT]
    found = [
        Variant("copy", "pass", copy, "copy", own_clock=True),
        Variant("tar", "pass", tar, "tar"),
        Variant(f"codecs-{SHORT_SIDE}", "short", codecs, own_clock=True),
    ]
    for name in ("webdataset", "mds"):
        if PEERS[name] in setting.versions:
            python = setting.options.peers / "streams" / "bin" / "python"
            command = [python, WRITER, name, images, OUT]
            found.append(Variant(name, "pass", command, name, own_clock=True))
    return found


def _im2rec(setting: Setting) -> list[Variant]:
    """MXNet's tool. Its list of the images is made before, by itself, outside of its time."""
    if PEERS["im2rec"] not in setting.versions:
        return []
    tool, folder = im2rec_tool(setting), setting.folder
    found = [Variant("im2rec-help", "start", [*tool, "--help"])]
    for threads in (1, 2, 4):
        how = ["--pass-through", "--num-thread", threads]
        command = [*tool, f"{OUT}/train", folder / "images", *how]
        found.append(Variant(f"im2rec-n{threads}", "pass", command, "rec", folder / "images.lst"))
    for group, data, end in SHRUNK:
        command = [*tool, f"{OUT}/train", folder / data, "--resize", SHORT_SIDE, *SHRINK]
        listed = folder / f"{data}.lst"
        found.append(Variant(f"im2rec-{SHORT_SIDE}{end}", group, command, "rec", listed))
    return found


def _ours(setting: Setting) -> list[Variant]:
    """tools/make_rec.py as a command, with one worker and with two."""
    work = [
        (f"ours-{check}", "pass", "images", ("--check", check))
        for check in ("none", "header", "decode")
    ] + [
        (f"ours-{SHORT_SIDE}{end}", group, data, ("--short-side", SHORT_SIDE, *SHRINK))
        for group, data, end in SHRUNK
    ]
    found = [
        Variant(
            f"{name}-j{jobs}",
            group,
            pack_command(setting.folder / data, OUT, *how, "-j", jobs),
            "rec",
        )
        for name, group, data, how in work
        for jobs in (1, 2)
    ]
    return [*found, Variant("ours-help", "start", [*MAKE_REC, "--help"])]


def _readers(setting: Setting) -> list[Variant]:
    """Our commands that read a finished pack, and the plan of a very long tar."""
    folder = setting.folder
    verify = [*MAKE_REC, "verify", folder / "pack", "-j", 1]
    listing = pack_command(folder / "members.tar", OUT, "--check", "none", "--dry-run")
    resplit = [*MAKE_REC, "resplit", folder / "members.pack", "--labeled", "1%"]
    return [
        Variant("verify", "verify", verify),
        Variant("verify-deep", "verify", [*verify, "--deep"]),
        Variant("list", "plan", listing),
        Variant("resplit", "plan", [*resplit, "--split-seed", NUMBER]),
    ]


def difference(setting: Setting, variant: Variant, out: Path, printed: str) -> str:
    """What is wrong with the output of a command that ended well; empty if nothing is."""
    rows = setting.options.rows
    if variant.name == "list":
        return "" if str(rows) in printed.replace(",", "") else f"{rows} is not in the plan"
    if variant.name == "resplit":
        listing = setting.folder / "members.pack" / "train_label.lst"
        lines = listing.read_bytes().count(b"\n")
        return "" if lines == round(rows / 100) else f"{lines} of {rows} rows are labeled"
    if not variant.written:
        return ""
    given = setting.data[GROUPS[variant.group].data]
    try:
        found = count(variant.written, out, setting.folder / "images")
    except (OSError, ValueError, struct.error) as error:
        return f"wrote what cannot be read ({error})"
    if variant.group == "pass":  # every image once, byte for byte
        return "" if found == given else f"wrote {found}, not {given}"
    if found.images != given.images:
        return f"wrote {found}, not {given.images} images"
    right = _has_short_side(found, given, enlarged=variant.name.startswith("im2rec"))
    return "" if right else f"wrote {found}"


def _has_short_side(found: Counts, given: Counts, *, enlarged: bool) -> bool:
    """Whether larger images have `SHORT_SIDE`, or keep their size if they are hardly larger."""
    (smallest, largest), (least, most) = found.short_sides, given.short_sides
    if enlarged:
        return smallest == largest == SHORT_SIDE
    return smallest == min(SHORT_SIDE, least) and min(SHORT_SIDE, most) <= largest <= KEPT_SIDE
