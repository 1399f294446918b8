"""Who takes part in the benchmark of packing: the command of each, and the check of its work."""

import argparse
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tools.bench_rec.apart import apart
from tools.bench_rec.counts import Counts, count

TOOLS = Path(__file__).resolve().parents[1]
MAKE_REC: list[Any] = [sys.executable, TOOLS / "make_rec.py"]
OUT = "{out}"  # in a command: its output folder
NUMBER = "{number}"  # in a command: which repetition it is
SHORT_SIDE = 480
KEPT_SIDE = round(1.1 * SHORT_SIDE)  # our --min-shrink: what is hardly larger keeps its bytes
# What is made smaller: pictures that all have to be, and photographs as ImageNet has them.
SHRUNK = {"short": ("large", ""), "photos": ("photographs", "-photos")}
SHARDS = 8  # of 250 MB at 2 GB of images; so that two workers share the work evenly
SHRINK = ("--quality", 90)
PEERS = {"webdataset": "webdataset", "mds": "mosaicml-streaming", "im2rec": "mxnet"}  # packages
Check = Callable[[Path, str], str]  # (output folder, what was printed) -> what is wrong, or ""


class Bench(NamedTuple):
    """One measurement: what was asked for, the temporary folder, and what was found out."""

    options: argparse.Namespace
    folder: Path
    versions: dict[str, str]  # of the peers' packages that are installed
    data: dict[str, Counts]  # the data sets, by name


class Contestant(NamedTuple):
    """What is measured, and how its work is checked."""

    name: str
    group: str  # pass, short, photos, verify, plan or start
    command: list[Any]
    check: Check
    given: Path | None = None  # a folder whose files have to be in the output folder before


def all_contestants(bench: Bench) -> list[Contestant]:
    """Return all that are installed, in the order in which they run."""
    return [*_writers(bench), *_im2rec(bench), *_ours(bench), *_readers(bench)]


def im2rec_tool(bench: Bench) -> list[Any]:
    """Return the start of im2rec's command line; it lies in MXNet's package."""
    environment = bench.options.peers / "mxnet"
    [tool] = environment.glob("lib/python*/site-packages/mxnet/tools/im2rec.py")
    return [environment / "bin" / "python", tool]


def pack_command(source: Path, out: Any, *arguments: Any) -> list[Any]:
    """Return our command line."""
    layout = ["--labeled", "10%", "--layout", "shared", "--shards", SHARDS]
    return [*MAKE_REC, "pack", "--src", source, "--out", out, *layout, *arguments]


def _writers(bench: Bench) -> list[Contestant]:
    """The yardstick, tar, and the peers whose writer is called by a few lines of Python."""
    source, writer = bench.folder / "images", TOOLS / "bench_rec" / "write.py"
    tar = ["tar", "-cf", f"{OUT}/images.tar", "-C", source, "."]
    found = [
        Contestant("copy", "pass", [sys.executable, writer, "copy", source, OUT], _same(bench)),
        Contestant("tar", "pass", tar, _same(bench, "tar")),
    ]
    for name in ("webdataset", "mds"):
        if PEERS[name] in bench.versions:
            python = bench.options.peers / "streams" / "bin" / "python"
            command = [python, writer, name, source, OUT]
            found.append(Contestant(name, "pass", command, _same(bench, name)))
    command = [sys.executable, writer, "codecs", bench.folder / "large", OUT]
    return [*found, Contestant("codecs-480", "short", command, _ended_well)]


def _im2rec(bench: Bench) -> list[Contestant]:
    """MXNet's tool. Its list of the images is made before, by itself, outside of its time."""
    if PEERS["im2rec"] not in bench.versions:
        return []
    tool, folder = im2rec_tool(bench), bench.folder
    found = []
    for threads in bench.options.im2rec_threads.split(","):
        how = ["--pass-through", "--num-thread", threads]
        command = [*tool, f"{OUT}/train", folder / "images", *how]
        check, given = _same(bench, "rec"), folder / "images.lst"
        found.append(Contestant(f"im2rec-n{threads}", "pass", command, check, given))
    for group, (data, ending) in SHRUNK.items():
        command = [*tool, f"{OUT}/train", folder / data, "--resize", SHORT_SIDE, *SHRINK]
        check = _shrunk(bench, data, enlarged=True)
        name = f"im2rec-{SHORT_SIDE}{ending}"
        found.append(Contestant(name, group, command, check, folder / f"{data}.lst"))
    return [*found, Contestant("im2rec-help", "start", [*tool, "--help"], _ended_well)]


def _ours(bench: Bench) -> list[Contestant]:
    """tools/make_rec.py as a command, with one worker and with two."""
    found = []
    for way in ("none", "header", "decode"):
        for jobs in (1, 2):
            command = pack_command(bench.folder / "images", OUT, "--check", way, "-j", jobs)
            found.append(Contestant(f"ours-{way}-j{jobs}", "pass", command, _same(bench, "rec")))
    for group, (data, ending) in SHRUNK.items():
        for jobs in (1, 2):
            how = ["--short-side", SHORT_SIDE, *SHRINK, "-j", jobs]
            command = pack_command(bench.folder / data, OUT, *how)
            name = f"ours-{SHORT_SIDE}{ending}-j{jobs}"
            check = _shrunk(bench, data, enlarged=False)
            found.append(Contestant(name, group, command, check))
    return [*found, Contestant("ours-help", "start", [*MAKE_REC, "--help"], _ended_well)]


def _readers(bench: Bench) -> list[Contestant]:
    """Our commands that read a finished pack, and the plan of a very long tar."""
    rows, pack = bench.options.rows, bench.folder / "members.pack"

    def counted(out: Path, printed: str) -> str:
        return "" if str(rows) in printed.replace(",", "") else f"the plan does not say {rows}"

    def labeled(out: Path, printed: str) -> str:
        lines = (pack / "train_label.lst").read_bytes().count(b"\n")
        return "" if lines == round(rows / 100) else f"{lines} of {rows} rows are labeled"

    verify = [*MAKE_REC, "verify", bench.folder / "pack", "-j", 1]
    tar = bench.folder / "members.tar"
    listing = pack_command(tar, OUT, "--check", "none", "--dry-run")
    resplit = [*MAKE_REC, "resplit", pack, "--labeled", "1%", "--split-seed", NUMBER]
    return [
        Contestant("verify", "verify", verify, _ended_well),
        Contestant("verify-deep", "verify", [*verify, "--deep"], _ended_well),
        Contestant("list", "plan", listing, counted),
        Contestant("resplit", "plan", resplit, labeled),
    ]


def _ended_well(out: Path, printed: str) -> str:
    return ""  # the exit code, looked at for all, tells everything


def _same(bench: Bench, kind: str = "copy") -> Check:
    """Return the check that every image was written once, byte for byte."""

    def check(out: Path, printed: str) -> str:
        found, given = _counted(kind, out, bench.folder / "images"), bench.data["images"]
        return "" if found == given else f"wrote {found}, not {given}"

    return check


def _shrunk(bench: Bench, data: str, *, enlarged: bool) -> Check:
    """Return the check that every image was written, larger ones with the wanted short side."""

    def check(out: Path, printed: str) -> str:
        found, given = _counted("rec", out, out), bench.data[data]
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
        return apart(count, kind, out, source)
    except (OSError, ValueError, struct.error) as error:
        return f"what cannot be read ({error})"
