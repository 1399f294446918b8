"""The two-moons study: python -m tools.studies.two_moons --out DIR"""

import argparse
import difflib
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mpl_fast.errors import ConfigError
from tools.studies import command

ABOUT = """Does feedback help? Labels only, MPL with each feedback and SMPL on two moons with six
labels, over many label draws and initial weights, paired. Writes two_moons.json, two_moons.md and
two_moons.png."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the study and writes its files."""
    command.main("two_moons", lambda: run(_parse(arguments)))


def run(chosen: argparse.Namespace) -> None:
    """The study of a checked command line."""
    import matplotlib  # noqa: F401  if it is missing, fail before the training
    import torch

    from tools.studies.two_moons.data import Options
    from tools.studies.two_moons.figure import draw
    from tools.studies.two_moons.report import as_json, as_markdown
    from tools.studies.two_moons.training import study
    from tools.studies.two_moons.variants import VARIANTS, with_baselines

    names = with_baselines(_known(chosen.variants, list(VARIANTS)))
    amounts = {name: getattr(chosen, name) for name in ("draws", "inits", "steps", "seed")}
    options = Options(**amounts, labels=chosen.labels)
    command.prepare(chosen.out)
    # A warning of torch's forward-mode differentiation about itself.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.jit")
    torch.set_num_threads(1)  # the tensors are small: more threads only wait for each other
    results = study(names, options, partial(print, flush=True))
    contents: dict[str, command.Content] = {
        "two_moons.json": as_json(results, options),
        "two_moons.md": as_markdown(results, options),
        "two_moons.png": lambda path: draw(results, options, path),
    }
    print(*command.write(chosen.out, contents), sep="\n")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = command.Parser(prog="two_moons", description=ABOUT, allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the three files")
    add("--draws", type=command.at_least(2), default=20, help="label draws (20)")
    add("--inits", type=command.at_least(1), default=10, help="initial weights for each (10)")
    add("--steps", type=command.at_least(1), default=1000, help="training steps (1000)")
    add("--seed", type=command.at_least(0), default=0, help="of all random numbers (0)")
    add(
        "--labels",
        choices=("spread", "random"),
        default="spread",
        help="the six labels: spread along the moons as published, or any six points (spread)",
    )
    add(
        "--variants",
        default="",
        metavar="A,B",
        help="only these, and what they are compared with (all)",
    )
    return parser.parse_args(arguments)


def _known(text: str, names: list[str]) -> list[str]:
    """The variants of a comma-separated list; all if it is empty."""
    named = [name for name in text.replace(" ", "").split(",") if name]
    for name in named:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
            raise ConfigError(f"--variants: {name!r} does not exist; {hint}")
    return named or names


if __name__ == "__main__":
    main()
