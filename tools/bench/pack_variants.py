"""The variants of the packing benchmark: the command of each, and the check of what it wrote."""

import argparse
import struct
import sys
from collections.abc import Callable
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
# What is made smaller: pictures that all have to be, and photographs as ImageNet has them.
SHRUNK = {"short": ("large", ""), "photos": ("photographs", "-photos")}
SHARDS = 8  # of 250 MB at 2 GB of images; so that two workers share the work evenly
SHRINK = ("--quality", 90)
PEERS = {"webdataset": "webdataset", "mds": "mosaicml-streaming", "im2rec": "mxnet"}  # packages
Check = Callable[[Path, str], str]  # (output folder, what was printed) -> what is wrong, or ""


class Setting(NamedTuple):
    """Of one run of the benchmark."""

    options: argparse.Namespace
    folder: Path  # a temporary one
    versions: dict[str, str]  # of the peers' packages that are installed
    data: dict[str, Counts]  # the data sets, by name


def ended_well(out: Path, printed: str) -> str:
    """The exit code, which is looked at for all, says everything."""
    return ""


class Variant(NamedTuple):
    """What is measured, and how its work is checked."""

    name: str
    group: str  # pass, short, photos, verify, plan or start
    command: list[Any]
    check: Check = ended_well
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
    source = setting.folder / "images"

    def writer(python: Any, kind: str, name: str, group: str, data: Path, check: Check) -> Variant:
        return Variant(name, group, [python, WRITER, kind, data, OUT], check, own_clock=True)

    tar = ["tar", "-cf", f"{OUT}/images.tar", "-C", source, "."]
    found = [
        writer(sys.executable, "copy", "copy", "pass", source, _same(setting, "copy")),
        Variant("tar", "pass", tar, _same(setting, "tar")),
    ]
    for name in ("webdataset", "mds"):
        if PEERS[name] in setting.versions:
            python = setting.options.peers / "streams" / "bin" / "python"
            found.append(writer(python, name, name, "pass", source, _same(setting, name)))
    large, name = setting.folder / "large", f"codecs-{SHORT_SIDE}"
    return [*found, writer(sys.executable, "codecs", name, "short", large, ended_well)]


def _im2rec(setting: Setting) -> list[Variant]:
    """MXNet's tool. Its list of the images is made before, by itself, outside of its time."""
    if PEERS["im2rec"] not in setting.versions:
        return []
    tool, folder = im2rec_tool(setting), setting.folder
    found = []
    for threads in setting.options.im2rec_threads.split(","):
        how = ["--pass-through", "--num-thread", threads]
        command = [*tool, f"{OUT}/train", folder / "images", *how]
        check, given = _same(setting, "rec"), folder / "images.lst"
        found.append(Variant(f"im2rec-n{threads}", "pass", command, check, given))
    for group, (data, ending) in SHRUNK.items():
        command = [*tool, f"{OUT}/train", folder / data, "--resize", SHORT_SIDE, *SHRINK]
        check = _shrunk(setting, data, enlarged=True)
        name = f"im2rec-{SHORT_SIDE}{ending}"
        found.append(Variant(name, group, command, check, folder / f"{data}.lst"))
    return [*found, Variant("im2rec-help", "start", [*tool, "--help"])]


def _ours(setting: Setting) -> list[Variant]:
    """tools/make_rec.py as a command, with one worker and with two."""
    found = []
    for way in ("none", "header", "decode"):
        for jobs in (1, 2):
            command = pack_command(setting.folder / "images", OUT, "--check", way, "-j", jobs)
            found.append(Variant(f"ours-{way}-j{jobs}", "pass", command, _same(setting, "rec")))
    for group, (data, ending) in SHRUNK.items():
        for jobs in (1, 2):
            how = ["--short-side", SHORT_SIDE, *SHRINK, "-j", jobs]
            command = pack_command(setting.folder / data, OUT, *how)
            check = _shrunk(setting, data, enlarged=False)
            found.append(Variant(f"ours-{SHORT_SIDE}{ending}-j{jobs}", group, command, check))
    return [*found, Variant("ours-help", "start", [*MAKE_REC, "--help"])]


def _readers(setting: Setting) -> list[Variant]:
    """Our commands that read a finished pack, and the plan of a very long tar."""
    rows, pack = setting.options.rows, setting.folder / "members.pack"

    def planned(out: Path, printed: str) -> str:
        right = str(rows) in printed.replace(",", "")
        return "" if right else f"{rows} does not stand in the plan"

    def labeled(out: Path, printed: str) -> str:
        lines = (pack / "train_label.lst").read_bytes().count(b"\n")
        return "" if lines == round(rows / 100) else f"{lines} of {rows} rows are labeled"

    verify = [*MAKE_REC, "verify", setting.folder / "pack", "-j", 1]
    tar = setting.folder / "members.tar"
    listing = pack_command(tar, OUT, "--check", "none", "--dry-run")
    resplit = [*MAKE_REC, "resplit", pack, "--labeled", "1%", "--split-seed", NUMBER]
    return [
        Variant("verify", "verify", verify),
        Variant("verify-deep", "verify", [*verify, "--deep"]),
        Variant("list", "plan", listing, planned),
        Variant("resplit", "plan", resplit, labeled),
    ]


def _same(setting: Setting, kind: str) -> Check:
    """The check that every image was written once, byte for byte."""

    def check(out: Path, printed: str) -> str:
        found, given = _counted(kind, out, setting.folder / "images"), setting.data["images"]
        return "" if found == given else f"wrote {found}, not {given}"

    return check


def _shrunk(setting: Setting, data: str, *, enlarged: bool) -> Check:
    """The check that every image was written, larger ones with the short side `SHORT_SIDE`."""

    def check(out: Path, printed: str) -> str:
        found, given = _counted("rec", out, out), setting.data[data]
        if not isinstance(found, Counts) or found.images != given.images:
            return f"wrote {found}, not {given.images} images"
        smallest, largest = found.short_sides
        least = SHORT_SIDE if enlarged else min(SHORT_SIDE, given.short_sides[0])
        most = SHORT_SIDE if enlarged else KEPT_SIDE
        right = smallest == least and most >= largest >= min(SHORT_SIDE, given.short_sides[1])
        return "" if right else f"wrote {found}"

    return check


def _counted(kind: str, out: Path, source: Path) -> Counts | str:
    try:
        return count(kind, out, source)
    except (OSError, ValueError, struct.error) as error:
        return f"what cannot be read ({error})"
