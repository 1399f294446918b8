"""Lists the studies of the documents: python -m tools.studies"""

import sys
from collections.abc import Sequence

from mpl_fast.errors import run_command

NAMES = {
    "ablation": "variants of a config, trained with the same seeds and compared in pairs",
    "cifar": "algorithms on CIFAR-10 with equal numbers of FLOPs, over draws of the labels",
    "feedbacks": "the feedback's gradient, beside the derivative that it estimates",
    "two_moons": "the feedbacks' accuracy on two moons with few labels",
}


def main(arguments: Sequence[str]) -> int:
    """Prints the list; returns 2 for arguments, which belong behind a study's name."""
    help_wanted = not arguments or arguments[0] in ("-h", "--help")
    out = sys.stdout if help_wanted else sys.stderr
    if not help_wanted:
        known = "write python -m tools.studies." if arguments[0] in NAMES else "there is no study "
        print(f"tools.studies: error: {known}{arguments[0]}", file=out)
    print("usage: python -m tools.studies.NAME [options]\n", file=out)
    print("\n".join(f"  {name:<12}{text}" for name, text in NAMES.items()), file=out)
    return 0 if help_wanted else 2


if __name__ == "__main__":
    run_command("tools.studies", lambda: main(sys.argv[1:]))
