"""Medians, and ratios to each peer of the same round."""

from collections.abc import Mapping, Sequence
from typing import Any

from tools.bench_input.clock import Key, Round, summary
from tools.bench_input.contestants import Contestant

Json = dict[str, Any]
TARGETS = {("weak", "dali"): 1.6, ("both", "dali-mpl"): 1.3}  # on a CPU, times a peer


def rows(contestants: Sequence[Contestant], found: Mapping[Key, list[Round]]) -> list[Json]:
    """One row a contestant; a ratio is the median over the rounds, not a ratio of medians."""
    made = []
    for one in contestants:
        mine = found[one.task, one.name]
        row: Json = {
            "task": one.task,
            "name": one.name,
            "images_per_s": summary([turn.images_per_s for turn in mine]),
            "cpu_us_per_image": summary([turn.cpu_us for turn in mine]),
            "against": {
                peer.name: _against(mine, found[peer.task, peer.name])
                for peer in contestants
                if peer.peer and peer.task == one.task and not one.peer
            },
        }
        if (one.task, one.name) in TARGETS:
            row["target"] = TARGETS[one.task, one.name]
        made.append(row)
    return made


def _against(mine: Sequence[Round], peers: Sequence[Round]) -> Json:
    """How many times a peer's rate, and how many times less of the CPU."""
    pairs = list(zip(mine, peers, strict=True))
    return {
        "speedup": summary([own.images_per_s / other.images_per_s for own, other in pairs]),
        "cpu_saving": summary([other.cpu_us / own.cpu_us for own, other in pairs]),
    }


def table(made: Sequence[Json]) -> str:
    """Markdown: one line a contestant and peer."""
    lines = [
        "| views | contestant | images/s | CPU us/image | peer | x its images/s | x less CPU "
        "| target |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in made:
        measured = [_text(row["images_per_s"], 0), _text(row["cpu_us_per_image"], 0)]
        for peer, ratios in (row["against"] or {"": {}}).items():
            cells = [row["task"], row["name"], *measured, peer]
            cells += [_text(ratios[key], 2) if ratios else "" for key in ("speedup", "cpu_saving")]
            lines.append(f"| {' | '.join(cells)} | {row.get('target', '')} |")
    return "\n".join(lines)


def _text(numbers: Json, digits: int) -> str:
    return "{median:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(**numbers, d=digits)
