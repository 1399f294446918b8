"""What a measurement of packing came to, as text and as Markdown: medians, ratios, targets."""

from collections.abc import Iterable
from statistics import median
from typing import Any, NamedTuple

Json = dict[str, Any]
GROUPS = {
    "pass": ("Images as they are", "images", "copy"),
    "short": ("Short side 480, quality 90, of larger pictures", "large", "im2rec-480"),
    "photos": ("Short side 480, quality 90, of photographs", "photographs", "im2rec-480-photos"),
    "verify": ("Reading a pack, one worker", "images", ""),
    "plan": ("Very many images", "members", ""),
    "start": ("The start of a command alone", "", ""),
}  # title, data set, base of the ratios
HEADER: tuple[str, ...] = ("", "seconds", "min to max", "whole command", "without start")
HEADER += ("MB/s", "images/s", "images/CPU s", "ratio", "peak MiB")
CLAIMS = ("target", "measured", "wanted", "met")
CLOCK = (
    "The page cache is warm: what a run reads has been read just before. Everything is synced to "
    "the disk within the time. One repetition of every row, and then the next. Seconds are "
    "medians: of copy, codecs, webdataset and mds without start, import and listing, of all others "
    "of the whole command with its start (im2rec without its `--list`). MB are 10^6 bytes of "
    "images read, the ratio is that of the speeds, peak memory is that of the largest process, "
    "with shared pages (webdataset and mds import torch)."
)


class Target(NamedTuple):
    """A claim: value should be at least (or at most) the limit."""

    text: str
    value: float
    limit: float
    at_most: bool = False

    @property
    def line(self) -> tuple[str, ...]:
        """Return the cells of a table."""
        met = self.value <= self.limit if self.at_most else self.value >= self.limit
        sign = "at most" if self.at_most else "at least"
        return (self.text, f"{self.value:.2f}", f"{sign} {self.limit:g}", "yes" if met else "NO")


def table(result: Json) -> str:
    """Return the tables with aligned columns."""
    lines = []
    for title, base, rows in _sections(result):
        lines += [f"{title} (ratio to {base})" if base else title, *_aligned([HEADER, *rows]), ""]
    claims = [target.line for target in targets(result)]
    lines += _aligned([CLAIMS, *claims]) if claims else []
    lines += [f"left out: {name} is not installed (--prepare)" for name in result["left_out"]]
    lines += [f"WRONG: {r['name']}: {r['wrong']}" for r in result["rows"] if r["wrong"]]
    return "\n".join(lines)


def markdown(result: Json) -> str:
    """Return a section for the documentation."""
    machine, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    peers = ", ".join(f"{name} {version}" for name, version in result["peers"].items())
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"{machine['filesystem']}, Linux {machine['kernel']}, Python {machine['python']}, "
        f"{versions}; {machine['tar']}; peers: {peers or 'none'}; commit {machine['commit']}; "
        f"n = {settings['repetitions']}.",
        "",
        CLOCK,
    ]
    for title, base, rows in _sections(result):
        name = f"{title} (ratio to {base})" if base else title
        lines += ["", f"### {name}{_amount(result, title)}", "", *_piped([HEADER, *rows])]
    claims = [target.line for target in targets(result)]
    lines += ["", "### Targets", "", *_piped([CLAIMS, *claims])] if claims else []
    lines += [""]
    lines += [f"Left out, as it was not installed: {name}." for name in result["left_out"]]
    return "\n".join(
        [*lines, "```", *(f"{r['name']}: {r['command']}" for r in result["rows"]), "```\n"]
    )


def targets(result: Json) -> list[Target]:
    """Return every target whose contestants ran."""
    speed = {row["name"]: 1 / _seconds(row) for row in result["rows"] if not row["wrong"]}
    speed["im2rec"] = max((s for n, s in speed.items() if n.startswith("im2rec-n")), default=0)
    pairs: list[tuple[str, str, str, float]] = [
        (f"as it is, ours ({way}, -j 2) / {peer}", f"ours-{way}-j2", peer, limit)
        for way in ("none", "decode")
        for peer, limit in (("copy", 1), ("im2rec", 2), ("webdataset", 5), ("mds", 5))
    ]
    pairs += [
        (f"short side 480, {what}, ours -j {jobs} / {other}", f"{ours}{jobs}", base, limit)
        for what, ours, peer in (
            ("larger pictures", "ours-480-j", "im2rec-480"),
            ("photographs", "ours-480-photos-j", "im2rec-480-photos"),
        )
        for jobs, other, base, limit in ((1, "im2rec", peer, 3), (2, "-j 1", f"{ours}1", 1.85))
    ]
    pairs.append(("the same, ours -j 1 / codecs alone", "ours-480-j1", "codecs-480", 0.9))
    found = [
        Target(text, speed[ours] / speed[other], limit)
        for text, ours, other, limit in pairs
        if speed.get(ours) and speed.get(other)
    ]
    data = result["data"].get("images", {})
    for name, what, scale, limit in (
        ("verify", "bytes", 1e9, 1.0),
        ("verify-deep", "images", 1.0, 800.0),
    ):
        if name in speed:
            unit = "GB/s" if what == "bytes" else "images/s"
            found.append(Target(f"{name}, {unit}", data[what] * speed[name] / scale, limit))
    for name, limit in (("resplit", 10.0), ("list", 60.0)):
        if name in speed:
            text = f"{name} of {result['data']['members']['images']} images, s"
            found.append(Target(text, 1 / speed[name], limit, at_most=True))
    for row in result["rows"]:
        if row.get("memory"):
            text = f"{row['name']}, largest worker, MB"
            peak = row["memory"]["worker_mib"] * 2**20 / 1e6
            found.append(Target(text, peak, 200, at_most=True))
    return found


def _sections(result: Json) -> Iterable[tuple[str, str, list[tuple[str, ...]]]]:
    for group, (title, data, base) in GROUPS.items():
        rows = [row for row in result["rows"] if row["group"] == group]
        if rows:
            known = {row["name"]: _seconds(row) for row in rows if not row["wrong"]}
            size = result["data"].get(data, {})
            cells = [_cells(row, size, known.get(base)) for row in rows]
            yield title, base if base in known else "", cells


def _cells(row: Json, size: Json, base: float | None) -> tuple[str, ...]:
    """Return a row of the table; size are the counts of its data, base the seconds of the base."""
    if row["wrong"] or not row["runs"]:
        return (row["name"], "WRONG", *[""] * (len(HEADER) - 2))
    seconds, every = _seconds(row), [run["seconds"] for run in row["runs"]]
    cpu = median(run["cpu"] for run in row["runs"])
    images, volume = size.get("images"), size.get("bytes")
    return (
        row["name"],
        f"{seconds:.2f}",
        f"{min(every):.2f} to {max(every):.2f}",
        f"{median(run['wall'] for run in row['runs']):.2f}",
        f"{median(run['inside'] for run in row['runs']):.2f}" if "inside" in row["runs"][0] else "",
        f"{volume / seconds / 1e6:.0f}" if volume else "",
        f"{images / seconds:.0f}" if images else "",
        f"{images / cpu:.0f}" if images and cpu else "",
        f"{base / seconds:.2f}" if base else "",
        f"{max(run['peak_mib'] for run in row['runs']):.0f}",
    )


def _amount(result: Json, title: str) -> str:
    for name, data, _ in GROUPS.values():
        counts = result["data"].get(data)
        if name == title and counts:
            size = f", {counts['bytes'] / 1e9:.2f} GB" if counts["bytes"] else ""
            return f": {counts['images']} images{size}"
    return ""


def _seconds(row: Json) -> float:
    return float(median(run["seconds"] for run in row["runs"]))


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if place else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _piped(rows: list[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]
