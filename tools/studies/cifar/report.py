"""Table and picture of the study of CIFAR-10."""

import statistics
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

from mpl_fast.atomic import atomic_path
from tools.studies import command
from tools.studies.cifar import plan
from tools.studies.cifar.plan import Cell, Json, Row, key_of

ABOUT_TABLE = """Top-1 (%) of the test images at the end of training, by the averaged weights, after
a share of 2.5e15 FLOPs: mean ± standard deviation over draws of the labels (their number). In
brackets: the difference to another row, mean ± standard error over pairs of one draw. To fill an
empty cell: `python -m tools.studies.cifar --src SRC --out DIR --only ROW --compute SHARE`
(mpl_finetuned: `--only mpl mpl_finetuned`; other numbers of labels: `--labels N`)."""


def table(results: Sequence[Json]) -> str:
    """Markdown: top-1 over draws, and the difference to another row in pairs of draws."""
    shares = sorted({*plan.SHARES, *(Fraction(r["share"]) for r in results)})
    lines = []
    for row in plan.ROWS:
        mine = _of(row, results)
        longest = max(mine, key=lambda r: r["flops"], default=None)
        cost = f"{longest['train_seconds']:.0f} s, {longest['flops']:.2g}" if longest else ""
        lines.append([f"`{row.name}`", *(_cell(results, row, share) for share in shares), cost])
    head = ["", *(f"{share}" for share in shares), "longest run: seconds, FLOPs"]
    return "\n".join(command.table(head, lines))


def _of(row: Row, results: Sequence[Json]) -> list[Json]:
    """Those of a row's present settings."""
    wanted = key_of(Cell(row, Fraction(1), 0, 0))
    same = ("row", "settings", "config_sha256")
    return [r for r in results if all(r[key] == wanted[key] for key in same)]


def _cell(results: Sequence[Json], row: Row, share: Fraction) -> str:
    mine, other = (
        {r["draw"]: r["top1"] for r in _of(one, results) if r["share"] == str(share)}
        for one in (row, plan.BY_NAME[row.against])
    )
    if not mine:
        return ""
    text = f"{_spread(list(mine.values()), '.2f')} ({len(mine)})"
    pairs = [mine[draw] - other[draw] for draw in mine if draw in other]
    if pairs and row.name != row.against:
        text += f" [{row.against} {_spread(pairs, '+.2f', len(pairs) ** 0.5)}]"
    return text


def _spread(values: Sequence[float], how: str, divisor: float = 1.0) -> str:
    mean = format(statistics.fmean(values), how)
    return f"{mean} ± {statistics.stdev(values) / divisor:.2f}" if len(values) > 1 else mean


def draw_picture(results: Sequence[Json], out: Path) -> None:
    """Writes cifar.png: the final top-1 over FLOPs, a curve a row, and in pale the course of a run
    with most FLOPs; `results` are those of one number of labels."""
    import matplotlib

    matplotlib.use("Agg")  # no display needed
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8.0, 4.5))
    for number, row in enumerate(plan.ROWS):
        if not (mine := _of(row, results)):
            continue
        points = []
        for share in sorted({r["share"] for r in mine}, key=Fraction):
            found = [r for r in mine if r["share"] == share]
            top1 = [r["top1"] for r in found]
            sd = statistics.stdev(top1) if len(top1) > 1 else 0.0
            points.append((found[0]["flops"], statistics.fmean(top1), sd))
        x, y, bars = zip(*points, strict=True)
        color, marker = f"C{number % 10}", "o" if number < 10 else "s"
        axis.errorbar(x, y, bars, label=row.name, color=color, marker=marker, capsize=2)
        longest = max(mine, key=lambda r: (r["flops"], -r["draw"]))["curve"]
        axis.plot(*zip(*longest, strict=True), color=color, alpha=0.3, linewidth=1)
    axis.set(xlabel="FLOPs", ylabel="test top-1 (%)", xscale="log")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    with atomic_path(out / "cifar.png") as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    pyplot.close(figure)
