"""The page of a report in a browser, its numbers, and what it says where something is missing."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpl_fast.data.manifest import read_manifest
from mpl_fast.distributed import DistEnv
from mpl_fast.errors import DataError, UserError
from mpl_fast.inference.trained import load
from mpl_fast.report import runs as run_records
from mpl_fast.report.command import Wanted, write_report
from mpl_fast.report.predictions import Network, Predictions
from mpl_fast.report.verdict import findings
from mpl_fast.training.build import eval_loader
from tests.tiny_run import ROOT, arguments, run_here, train_here, write_digits
from tests.training.test_bad_input import offsets, relabel

pytestmark = pytest.mark.slow
HOSTILE = {
    "0": b"<script>window.ran=1<!--",
    "1": b'"onmouseover="window.ran=1',
    "2": b"=HYPERLINK(1)",
    "3": b"not utf-8 \xff",
    "4": b"<img src=x onerror=window.ran=1>",
    "5": b"$x_1$ & {{ 7 * 7 }}",
}
SECTIONS = ["summary", "curves", "confusion", "classes", "calibration", "pseudo", "mistakes"]
SECTIONS += ["views", "features", "speed", "config"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run whose classes have names that a page must escape."""
    folder = tmp_path_factory.mktemp("hostile")
    write_digits(folder / "images")
    for split in ("train", "val"):
        for digit, name in HOSTILE.items():
            path = folder / "images" / split
            (path / digit).rename(path / os.fsdecode(name))
    command = [sys.executable, ROOT / "tools" / "make_rec.py", "pack", "--quiet"]
    command += ["--src", folder / "images" / "train", "--val", folder / "images" / "val"]
    command += ["--labeled", "20", "--out", folder / "rec"]
    subprocess.run([str(part) for part in command], check=True)
    done = train_here(*arguments(folder / "run", folder / "rec"))
    assert done.returncode == 0, done.stderr
    environment = json.loads((folder / "run" / "env.json").read_text())
    environment["git_commit"] = "</script><script>window.ran=1</script>"
    (folder / "run" / "env.json").write_text(json.dumps(environment))
    return folder / "run"


@pytest.fixture(scope="module")
def report(run: Path) -> Path:
    """Its page, by the command."""
    from tools.report import main

    out = run.parent / "report.html"
    done = run_here(main, [str(run), "--out", str(out), "--figures", str(run.parent / "figures")])
    assert done.returncode == 0, done.stderr
    assert re.search(r"report\.html \(\d\.\d MB\)\n$", done.stdout)
    return out


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next(filter(None, map(shutil.which, names)), None)
    if not found:
        pytest.skip("needs chromium, chromium-browser or google-chrome")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


def test_page_in_a_browser(report: Path, chromium: Any) -> None:
    for width, scheme in ((1400, "light"), (400, "dark")):
        page, problems = _opened(chromium, report, width, scheme)
        assert [p for p in problems if not p.startswith(("file:", "data:"))] == []
        assert page.evaluate("typeof window.ran") == "undefined"
        assert page.evaluate("document.documentElement.scrollWidth") == width
        empty = "!document.getElementById(id)?.querySelector('svg, img, table, .card')"
        assert page.evaluate(f"ids => ids.filter(id => {empty})", SECTIONS) == []
        assert page.locator(".missing").count() == 0
        for name in HOSTILE.values():
            text = name.decode("utf-8", "backslashreplace")
            assert page.locator("#classes td", has_text=text).count() == 1, text
        colors = page.evaluate("[...document.querySelectorAll('svg text')].map(t => "
                               "getComputedStyle(t).fill)")  # fmt: skip
        assert set(colors) <= {"rgb(26, 29, 33)" if scheme == "light" else "rgb(230, 233, 236)"}
        _hover(page)
        page.close()


def _opened(chromium: Any, report: Path, width: int, scheme: str) -> tuple[Any, list[str]]:
    """The page, and all that it printed, asked, raised or requested."""
    page = chromium.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("dialog", lambda dialog: problems.append(dialog.message))
    page.on("request", lambda request: problems.append(request.url))
    page.goto(report.as_uri())
    return page, problems


def _hover(page: Any) -> None:
    """The point under the pointer has its image and its names; arrow keys go on."""
    assert page.locator("#tip").is_hidden()
    points = json.loads(page.locator("#points").text_content())
    x, y, truth, *_ = min(point for point in points["points"] if not point[5])
    left, top, scale = page.evaluate("""() => {
        const svg = document.querySelector("#map svg");
        svg.scrollIntoView({block: "center", behavior: "instant"});
        const area = svg.getBoundingClientRect();
        return [area.left, area.top, area.width / svg.viewBox.baseVal.width];
    }""")
    page.wait_for_timeout(100)  # the scroll event, which hides a tip
    page.mouse.move(left + x * scale, top + y * scale)
    page.locator("#tip").wait_for(state="visible", timeout=10_000)
    assert points["names"][truth] in page.locator("#tip").inner_text()
    image = page.locator("#tip i").evaluate("e => getComputedStyle(e).backgroundImage")
    assert image.startswith('url("data:image/jpeg;base64,')
    before = page.locator("#tip").inner_text(), page.locator("#tip").bounding_box()
    page.locator("#map svg").press("ArrowRight")
    assert (page.locator("#tip").inner_text(), page.locator("#tip").bounding_box()) != before


def test_numbers_are_those_of_the_logits(run: Path, report: Path) -> None:
    trained = load(run)
    manifest = read_manifest(trained.config.data.root)
    batches = eval_loader(trained.config, manifest, DistEnv(0, 1, trained.device))
    parts = [(trained.logits(images)[:n], labels[:n]) for images, labels, n in batches]
    logits, labels = (torch.cat(column).double() for column in zip(*parts, strict=True))
    labels = labels.long()
    p, rows = logits.softmax(1), torch.arange(len(labels))
    target = torch.nn.functional.one_hot(labels, 10)
    found = Network(run, (), print).predictions("val", 0, 2000)
    assert found.labels.tolist() == labels.tolist()
    assert found.nll == pytest.approx(-p[rows, labels].log().numpy(), rel=1e-4)
    assert found.brier == pytest.approx(float((p - target).square().sum(1).mean()), rel=1e-4)
    assert found.confidence == pytest.approx(p.amax(1).numpy(), rel=1e-4)
    summary = json.loads((run / "summary.json").read_text())
    top1, saves = summary["top1"], summary["checkpoint_seconds"]
    assert 100 * found.hits.mean() == pytest.approx(top1)
    assert f"{top1:.2f} %" in report.read_text()
    assert f"{saves:.1f} s beside the training time" in report.read_text()
    assert found.features.shape == (50, 64) and list(found.places) == list(range(50))


def test_labels_of_no_class_are_one_line(run: Path, tmp_path: Path) -> None:
    rec = Path(shutil.copytree(run.parent / "rec", tmp_path / "rec"))
    relabel(rec / "val.rec", {*sorted(offsets(rec / "val.idx"))[:3]}, 77.0)
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "report_cache", ignore_errors=True)
    network = Network(copy, ["--data.root", str(rec)], print)
    with pytest.raises(DataError, match=f"^{rec}: 3 labels of split val are not those of classes"):
        network.predictions("val", 0, 10)


def test_a_second_report_computes_nothing(run: Path, report: Path) -> None:
    files = {file: file.stat().st_mtime_ns for file in (run / "report_cache").iterdir()}
    lines, before = list[str](), report.read_bytes()
    write_report([run, run / ".." / run.name], Wanted(report), lines.append)
    assert len(lines) == 1 and lines[0].startswith(str(report))
    assert report.read_bytes() == before
    assert {file: file.stat().st_mtime_ns for file in (run / "report_cache").iterdir()} == files


def test_figures_for_papers(run: Path, report: Path) -> None:
    written = {file.name for file in (run.parent / "figures").iterdir()}
    names = {name.removesuffix(".png") for name in written if name.endswith(".png")}
    assert {"confusion", "reliability", "feature_map", "mistakes", "views"} <= names
    assert written == {f"{name}.{kind}" for name in names for kind in ("png", "pdf")}


def test_without_records_or_checkpoint(run: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "r.html", list[str]()
    write_report([run], Wanted(out, options=("--data.root", str(tmp_path / "gone"))), lines.append)
    text = out.read_text()
    assert "gone: no such folder of records" in text and "curve" in text
    assert 'id="points"' not in text
    other = tmp_path / "other"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("checkpoints", "report_cache"))
    write_report([other], Wanted(out), lines.append)
    assert "Validation top-1 (%)" in out.read_text()
    assert "holds no usable checkpoint" in out.read_text()
    (other / "metrics.jsonl").unlink()
    with pytest.raises(DataError, match="nothing to show yet"):
        write_report([other], Wanted(out), lines.append)


def test_what_is_refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine.html"
    mine.write_text("<p>mine</p>")
    for out, why in (
        (mine, "is no report"),
        (tmp_path / "page.txt", r"ends in \.html"),
        (tmp_path / "none" / "page.html", "folder does not exist"),
        (Path("/proc/page.html"), "/proc"),  # where even root cannot write
    ):
        with pytest.raises(UserError, match=why):
            write_report([run], Wanted(out))
    out = tmp_path / "page.html"
    with pytest.raises(UserError, match="pionts"):
        write_report([run], Wanted(out, options=("--pionts", "5")))
    with pytest.raises(UserError, match="/proc"):
        write_report([run], Wanted(out, figures=Path("/proc")))
    with monkeypatch.context() as changed:
        changed.setenv("RANK", "0")
        changed.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match="without torchrun"):
            write_report([run], Wanted(out))
    assert not out.exists()
    assert mine.read_text() == "<p>mine</p>"
    write_report([run], Wanted(mine, force=True, points=0, unlabeled=0), lambda _: None)
    assert "mine" not in mine.read_text()[:100]


def test_runs_of_one_recipe_are_one_curve(run: Path, report: Path, tmp_path: Path) -> None:
    def copy(name: str, change: Callable[[str], str]) -> run_records.Run:
        shutil.copytree(run, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints"))
        config = tmp_path / name / "config.yaml"
        config.write_text(change(config.read_text()))
        return run_records.read(tmp_path / name)

    first = copy("mpl_seed0", lambda text: text)
    second = copy("mpl_seed1", lambda text: text.replace("seed: 0", "seed: 1"))
    other = copy("wide", lambda text: text.replace("wrn_10_1", "wrn_10_2"))
    groups = run_records.grouped([first, second, other])
    assert [group.name for group in groups] == ["mpl", "wide"]
    assert run_records.differences(groups) == [("model.name", ["wrn_10_1", "wrn_10_2"])]
    second.curves["eval/top1"] = [(s, v + 10) for s, v in first.curves["eval/top1"]]
    band = groups[0].band("eval/top1")
    assert band is not None
    steps, mean, least, most = band
    assert list(steps) == [4, 6]
    assert mean - least == pytest.approx([5, 5]) and most - least == pytest.approx([10, 10])


def _predicted(right: int, of: int, confidence: float) -> Predictions:
    labels = np.zeros(of, np.int32)
    guesses = np.ones((of, 2), np.int32)
    guesses[:right, 0] = 0
    sure = np.full((of, 2), confidence, np.float32)
    none = np.zeros(of, np.float32)
    return Predictions(labels, guesses, sure, none, none, labels[:0], np.zeros((0, 2)))


def test_a_verdict_holds_its_numbers(run: Path) -> None:
    record = run_records.read(run)
    record.curves["data_wait"] = [(step, 0.12) for step in (2, 4, 6)]
    record.curves["mask_rate"] = [(step, 0.3) for step in (2, 4, 6)]
    found = findings(record, _predicted(60, 100, 0.9), _predicted(99, 100, 0.9), None)
    texts = [finding.text for finding in found]
    assert texts[0].startswith("Overfits: 99.0 % of the labeled training images are right and 60.0")
    assert any(text.startswith("Low share: only 30.0 % of the unlabeled") for text in texts)
    assert any(text.startswith("Input-bound: 12.0 %") for text in texts)
    assert any("confidence is 90.0 %, accuracy 60.0 %" in text for text in texts)
    record.curves["mask_rate"] = [(6, 0.9)]
    good = findings(record, _predicted(97, 100, 0.96), _predicted(99, 100, 0.9), None)
    assert good[0].text == "No limit stands out in the numbers of this run."


def test_verdicts_of_few_images_and_early_ends(run: Path) -> None:
    """A difference that chance can give is no limit."""
    record = run_records.read(run)
    found = {f.text: f.kind for f in findings(record, _predicted(8, 10, 0.9),
                                              _predicted(92, 100, 0.9), None)}  # fmt: skip
    assert not any(text.startswith(("Overfits", "Generalizes", "Overconf")) for text in found)
    assert any(text.startswith("Few validation images: with 10, the 95 %") for text in found)
    unlabeled = _predicted(8, 10, 0.9)
    assert not any("Wrong pseudo" in f.text for f in findings(record, None, None, unlabeled))
    many = findings(record, None, None, _predicted(700, 1000, 0.9))
    assert many[0].text.startswith("Wrong pseudo labels: 30.0 % of the 1,000 unlabeled images")
    early = replace(record, config=replace(record.config, steps=9))
    assert findings(early, None, None, None)[0].text == "Not finished: step 6 of 9 (67 %)."
    early.summary["stopped_early"] = True
    texts = [finding.text for finding in findings(early, None, None, None)]
    assert "Ended early by patience, after step 6 of 9." in texts


def test_a_missing_extra_is_named() -> None:
    hidden = "import sys; sys.modules['jinja2'] = None; sys.argv[1:] = ['run', '--out', 'p.html'];"
    code = f"{hidden} from mpl_fast.errors import run_command; from tools.report import main;"
    done = subprocess.run(
        [sys.executable, "-c", f"{code} run_command('report', main)"],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 1 and "pip install 'mpl_fast[report]'" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
