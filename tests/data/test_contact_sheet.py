"""The command contact_sheet.py: a PNG of views, and one line for bad input."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from mpl_fast.config import DataConfig
from mpl_fast.data.contact_sheet import contact_sheet as write_sheet
from mpl_fast.data.manifest import read_manifest
from mpl_fast.errors import run_command
from tests.data.numbered_images import pack_folder
from tools import contact_sheet

TOOL = Path(__file__).resolve().parents[2] / "tools" / "contact_sheet.py"
GREEN = (0, 200, 0)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three green images of 120 x 60 pixels."""
    base = tmp_path_factory.mktemp("sheet")
    folder = base / "images" / "lawn"
    folder.mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (120, 60), GREEN).save(folder / f"{number}.png")
    return pack_folder(folder.parent, base / "rec", labeled="1").root


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    """Runs the command in this process: exit code and lines of stderr."""
    with mock.patch("sys.argv", ["contact_sheet.py", *arguments]):
        try:
            run_command("contact_sheet", contact_sheet.main)
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
    return code, capsys.readouterr().err.splitlines()


@pytest.mark.slow
def test_sheet_shows_original_and_views(records: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    options = ["--images", "2", "--draws", "3", "--data.image-size", "100"]
    done = subprocess.run(
        [sys.executable, TOOL, records, "--out", out, *options], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(out)
    assert done.stderr.startswith("warning: strong views can be all gray: at data.magnitude 17")
    sheet = np.asarray(Image.open(out)).astype(int)
    tile, gap, title, name = 100, 6, 26, 14
    assert sheet.shape == (title + 2 * (tile + gap + name), gap + 5 * (tile + gap), 3)
    assert (sheet[:title] < 128).any()  # the titles are written
    for row in range(2):
        top = title + row * (tile + gap + name)
        original, weak = (sheet[top : top + tile, left : left + tile] for left in (6, 112))
        assert np.abs(original[26:74] - GREEN).max() <= 1  # 100 x 50, in the middle
        assert (original[:24] == 255).all()
        assert np.abs(weak - GREEN).max() <= 1


def test_titles_stand_below_the_rows(records: Path, tmp_path: Path) -> None:
    """Beside the class, and cut where the sheet ends."""
    manifest, drawn = read_manifest(records), []

    def noted(self: ImageDraw.ImageDraw, at: tuple[int, int], text: str, *rest: object) -> None:
        drawn.append((at[0] + ImageFont.load_default(11).getlength(text), text))

    with mock.patch.object(ImageDraw.ImageDraw, "text", noted):
        for title in ("", "Rasen", "grass of any kind, " * 9):
            given = replace(manifest, titles=(title,))
            out, config = tmp_path / "sheet.png", DataConfig(image_size=96)
            write_sheet(config, given, out, images=1, draws=1, seed=0)
    width = Image.open(out).width
    texts = [text for _, text in drawn if text.startswith("lawn")]
    assert texts[:2] == ["lawn", "lawn (Rasen)"]
    assert texts[2].startswith("lawn (grass of any kind, grass of") and texts[2].endswith("...")
    assert all(end < width for end, _ in drawn) and len(texts[2]) > 40


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("missing --out TMP/x.png", 4, "no such folder of records"),
        ("REC --out TMP/x.png --images 4", 2, "has only 3 records"),
        ("REC --out TMP/nowhere/x.png", 2, "folder does not exist"),
        ("missing --out TMP/x.nothing", 2, "must name a file that ends in .png"),
        ("missing --out TMP/folder.png", 2, "must name a file that ends in .png"),
        (f"missing --out TMP/{'x' * 300}.png", 2, "File name too long"),
        ("REC --out TMP/link.png --images 1 --draws 1", 3, "No such file"),
        ("REC --out TMP/x.png --data.image-size 1", 2, "at least 8"),
        ("REC --out TMP/x.png --data.policy none", 2, "data.policy"),
        ("REC --out TMP/x.png --draw 3", 2, "unknown option --draw"),
    ],
)
def test_bad_input_is_one_line(
    records: Path,
    tmp_path: Path,
    arguments: str,
    code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere" / "x.png")
    given = arguments.replace("REC", str(records)).replace("TMP", str(tmp_path)).split()
    ended, errors = command(capsys, *given)
    assert ended == code
    assert words in errors[-1]
    assert not any("Traceback" in line for line in errors)
    assert not (tmp_path / "x.png").exists()
