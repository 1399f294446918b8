"""The page: a Jinja template that escapes every value, with its style and script inside."""

import base64
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from mpl_fast import atomic
from mpl_fast.errors import ConfigError, OutputError, output_errors
from mpl_fast.report.figures import Chart

MARKER = "<!-- written by mpl_fast tools/report.py -->"
FOLDER = Path(__file__).parent
LARGE = 560  # pixels, above which a figure is scrolled on a narrow screen


class Table(NamedTuple):
    """Cells of a table; the first `texts` columns are text, the others numbers."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""
    texts: int = 1

    @property
    def bare(self) -> "Table":
        """The same without the caption."""
        return self._replace(caption="")


class Drawn(NamedTuple):
    """A chart as the template takes it."""

    title: str
    text: str
    svg: Markup
    wide: bool


def drawn(chart: Chart) -> Drawn:
    """The chart with its SVG."""
    svg = chart.svg()
    width = float(svg.split('viewBox="', 1)[1].split('"', 1)[0].split()[2])
    pixels = width * 96 / 72
    label = Markup('<svg role="img" aria-label="{}" class="{}" style="--w:{:.0f}px"').format(
        f"{chart.title}: {chart.text}", "large" if pixels > LARGE else "", pixels
    )
    # matplotlib escapes the text of a figure.
    return Drawn(chart.title, chart.text, label + Markup(svg[len("<svg") :]), chart.wide)


def check_out(out: Path, force: bool) -> None:
    """Raises `ConfigError` for a name that is no page's, or a file there that is no report."""
    if out.suffix.lower() not in (".html", ".htm") or out.is_dir():
        raise ConfigError(f"--out {out}: must name a file that ends in .html")
    try:
        if not out.absolute().parent.is_dir():
            raise ConfigError(f"--out {out}: its folder does not exist")
        if force or not out.exists():
            return
        with out.open("rb") as file:
            ours = MARKER.encode() in file.read(400)
    except OSError as error:
        raise OutputError(f"--out {out}: {error.strerror}") from error
    if not ours:
        raise OutputError(f"--out {out} exists and is no report: take another name, or --force")


def render(values: dict[str, Any]) -> str:
    """The page with these values of the template's names."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER), autoescape=True, undefined=jinja2.StrictUndefined
    )
    style, script = ((FOLDER / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    fixed = {"marker": Markup(MARKER), "css": Markup(style), "script": Markup(script)}
    return environment.get_template("page.html").render(**values, **fixed, script_hash=digest)


def write(out: Path, page: str) -> None:
    """Replaces the file as a whole."""
    with output_errors(out):
        atomic.write_text(out, page)
