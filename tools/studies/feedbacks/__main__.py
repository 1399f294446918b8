"""Error and cost of each feedback: python -m tools.studies.feedbacks --out DIR"""

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

from mpl_fast.errors import ConfigError
from tools.studies import command

SMOKE = {"problems": 3, "drawn": 2, "draws": 8, "rounds": 3}
ABOUT = """Compares the teacher's gradient of every feedback of Meta Pseudo Labels with the exact
meta-gradient on random tiny problems, counts the passes of a step and times it on a CPU. Writes
feedbacks.json and feedbacks.md."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and writes the files."""
    command.main("feedbacks", lambda: run(parse(arguments)))


def run(chosen: argparse.Namespace) -> None:
    """The measurements of a checked command line."""
    amounts = SMOKE if chosen.smoke else {name: getattr(chosen, name) for name in SMOKE}
    if amounts["drawn"] > amounts["problems"]:
        raise ConfigError(
            f"--drawn {amounts['drawn']} is more than --problems {amounts['problems']}"
        )
    command.prepare(chosen.out)
    import torch

    from tools.studies.feedbacks import measure
    from tools.studies.feedbacks.problems import KINDS
    from tools.studies.feedbacks.report import Results, as_json, as_markdown

    options = measure.Options(**amounts, scale=chosen.scale, seed=chosen.seed)
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    began, near = time.perf_counter(), {}

    def progress(text: str) -> None:
        print(f"{time.perf_counter() - began:5.0f} s  {text}", flush=True)

    for name, kind in KINDS.items():
        if name != "off":
            near[name] = {u: measure.nearness(kind, u, options) for u in options.sizes}
            cosines = ", ".join(f"{row.cosine:+.2f}" for row in near[name].values())
            progress(f"{kind.title}: cosine {cosines}")
    passes = {name: measure.passes(kind) for name, kind in KINDS.items()}
    times = measure.seconds(options)
    progress(f"{options.rounds} rounds timed")
    results = Results(near, passes, times, torch.get_num_threads())
    contents: dict[str, command.Content] = {
        "feedbacks.json": as_json(results, options),
        "feedbacks.md": as_markdown(results, options),
    }
    print(*command.write(chosen.out, contents), sep="\n")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = command.Parser(prog="feedbacks", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    for name, least, default, words in (
        ("problems", 1, 60, "random problems"),
        ("drawn", 2, 10, "of these with drawn labels"),
        ("draws", 2, 80, "draws of labels in each of these"),
        ("rounds", 2, 25, "steps of each feedback that are timed"),
        ("seed", 0, 0, "of all random numbers"),
    ):
        kind = command.at_least(least)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{words} ({default})")
    parser.add_argument(
        "--scale",
        type=_above_0,
        default=2.0,
        help="multiplies the networks' initial weights: the larger, the more confident (2)",
    )
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs")
    return parser.parse_args(arguments)


def _above_0(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number above 0, not {text!r}")
    return value


if __name__ == "__main__":
    main()
