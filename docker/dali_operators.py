"""Fails if the installed DALI lacks an operator that the pipelines of mpl_fast/data call."""

import re
import sys
from operator import attrgetter
from pathlib import Path

from nvidia import dali

files = (Path(__file__).resolve().parents[1] / "mpl_fast" / "data").glob("*.py")
called = {name for file in files for name in re.findall(r"\bfn\.([a-z_.]+)\(", file.read_text())}
lacking = []
for name in sorted(called):
    try:
        attrgetter(name)(dali.fn)
    except AttributeError:
        lacking.append(name)
if lacking:
    sys.exit(f"DALI {dali.__version__} lacks {', '.join(lacking)}: install DALI 2.4 or later")
