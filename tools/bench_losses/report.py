"""What the measurements came to, as text and as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from tools.bench_losses.contestants import COMPILED, PLAIN

Json = dict[str, Any]
Row = tuple[str, ...]
HEADER: Row = ("loss", "C", "width", "B", "type", "who", "graph us", "p20 to p80", "eager us")
HEADER += ("launches", "extra MB", "minimal MB", "GB/s", "of a copy")
# The baseline is torch.compile of the definition; plain eager is told besides.
BASELINES = {"times_compile": COMPILED, "times_plain": PLAIN}
HEADER += tuple(f"times {who}" for who in BASELINES.values())
COUNTS = ("loss", "C", "B", "type", "who", "launches", "loops", "MB", "minimal MB", "times minimal")


def tables(result: Json, *, markdown: bool) -> str:
    """Everything that is known, a section each."""
    blocks: list[str] = []
    for title, rows in _sections(result):
        heading = f"### {title}" if markdown else title
        lines = _piped(rows) if markdown else _aligned(rows)
        blocks.append("\n".join([heading, "", *lines] if markdown else [heading, *lines]))
    notes = [*_notes(result)]
    blocks.append("\n".join(f"- {note}" for note in notes) if markdown else "\n".join(notes))
    return "\n\n".join(blocks) + "\n"


def ratios(cells: Sequence[Json], copy: float) -> None:
    """Adds to each cell its share of the copy's bandwidth, and its speed against the baselines."""
    timed = [cell for cell in cells if "graph_us" in cell]
    known = {(_key(cell), cell["contestant"]): cell["graph_us"]["median"] for cell in timed}
    for cell in timed:
        cell["share_of_copy"] = cell["gb_per_s"] / copy
        for field, who in BASELINES.items():
            if (_key(cell), who) in known:
                cell[field] = known[_key(cell), who] / cell["graph_us"]["median"]


def _key(cell: Json) -> tuple[Any, ...]:
    return tuple(cell[field] for field in ("loss", "classes", "width", "batch", "dtype"))


def _sections(result: Json) -> Iterable[tuple[str, list[Row]]]:
    cells = result["cells"]
    if result["machine"]["gpu"]:
        # Shapes stand in random order in the JSON: it is the one that they were measured in.
        ordered = sorted(cells, key=_key)
        yield "Loss and gradient", [HEADER, *(_timed(cell) for cell in ordered)]
    else:
        yield "Counted, not timed", [COUNTS, *(_counted(cell) for cell in cells)]
    for one in result.get("sweep", []):
        rows: list[Row] = [("block", "whole row", "warps", "us")]
        for t in one["tried"]:
            shown = f"{t['us']:.1f}" if "us" in t else t["failed"]
            rows.append((str(t["block"]), "yes" if t["single"] else "no", str(t["warps"]), shown))
        yield f"Launch configurations, {one['shape']}", rows


def _timed(cell: Json) -> Row:
    start: Row = (*map(str, (cell["loss"], cell["classes"], cell["width"], cell["batch"])),)
    start += (cell["dtype"], cell["contestant"])
    for word in ("failed", "wrong"):
        if word in cell:
            return _padded((*start, f"{word}: {cell[word][:60]}"))
    if "launches" not in cell:
        return _padded((*start, "not timed"))
    times = cell.get("graph_us")
    return (
        *start,
        f"{times['median']:.1f}" if times else "not capturable" * ("not_capturable" in cell),
        f"{times['p20']:.1f} to {times['p80']:.1f}" if times else "",
        f"{cell['wall_us']:.0f}" if "wall_us" in cell else "",
        str(cell["launches"]),
        f"{cell['extra_bytes'] / 1e6:.1f}",
        f"{cell['minimal_bytes'] / 1e6:.1f}",
        f"{cell['gb_per_s']:.0f}" if times else "",
        f"{100 * cell['share_of_copy']:.0f} %" if "share_of_copy" in cell else "",
        *(f"{cell[field]:.2f}" if field in cell else "" for field in BASELINES),
    )


def _padded(row: Row) -> Row:
    return row + ("",) * (len(HEADER) - len(row))


def _counted(cell: Json) -> Row:
    known = cell["bytes"] is not None
    return (
        *map(str, (cell["loss"], cell["classes"], cell["batch"], cell["dtype"])),
        cell["contestant"],
        str(cell["launches"]),
        str(cell.get("loops", "")),
        f"{cell['bytes'] / 1e6:.1f}" if known else "",
        f"{cell['minimal_bytes'] / 1e6:.1f}",
        f"{cell['times_minimal']:.1f}" if known else "",
    )


def _notes(result: Json) -> Iterable[str]:
    machine = result["machine"]
    yield ", ".join(f"{name} {value}" for name, value in machine.items() if value is not None)
    if "device" in result:
        yield f"STOPPED: {result['device']}"
    for row in result["correctness"]:
        if row["wrong"]:
            yield f"WRONG: {row['shape']}, {row['contestant']}: {row['wrong']}"
    if "copy_gb_per_s" in result:
        yield f"A copy on the device: {result['copy_gb_per_s']:.0f} GB/s read and written."
        cost = result["launch_cost"]
        yield (
            f"A kernel that does nothing: {cost['python_us']:.1f} us from Python, "
            f"{cost['graph_node_us']:.1f} us in a graph."
        )
    if "noise" in result:
        yield f"The same cell twice differs by {100 * result['noise']:.1f} %."
    for one in result.get("sweep", []):
        best = one["best"]
        words = "the table's configuration is the fastest or as fast"
        if not one["confirmed"]:
            words = f"SUGGESTION: {best['block']} columns, {best['warps']} warps" if best else "?"
        yield f"{one['shape']}: {words}."
    if result.get("step", {}).get("share"):
        step = result["step"]
        shares = ", ".join(f"{who} {100 * part:.2f} %" for who, part in step["share"].items())
        yield (
            f"Share of the losses in a ResNet-50 MPL step ({step['step_ms_reference']:.0f} ms with "
            f"plain PyTorch, {step['step_ms_triton']:.0f} ms with the kernels): {shares}."
        )
    for skipped in result["skipped"]:
        yield f"Skipped: {skipped}"
    if result["claim"]:
        yield str(result["claim"])


def _aligned(rows: list[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _piped(rows: list[Row]) -> list[str]:
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], f"|{' --- |' * len(rows[0])}", *lines[1:]]
