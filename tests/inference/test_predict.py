"""predict.py on a run of real digits: the evaluation's probabilities, once for each image."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import cv2
import numpy as np
import pytest

import mpl_fast
from mpl_fast.data.manifest import read_manifest
from mpl_fast.data.split_images import SplitImages
from mpl_fast.distributed import DistEnv
from mpl_fast.errors import printable, run_command
from mpl_fast.inference import decoding
from mpl_fast.inference import predict as product
from mpl_fast.inference.parts import Parts
from mpl_fast.packing.write.image_check import find_fault
from mpl_fast.training.build import eval_loader
from tests.packing.packs import make_tar, make_tree, read_split, run
from tests.packing.test_hostile import large_png
from tests.tiny_run import ROOT, environment, run_here
from tools import predict as tool

pytestmark = pytest.mark.slow

Row = dict[str, Any]
LARGE = "good/9/\x1b[31mlarge.png"  # a small file of a large image, with a hostile name


def predict(*arguments: object, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = run_here(lambda: run_command("predict", tool.main), [str(one) for one in arguments])
    assert done.returncode == status, done.stderr
    return done


def rows_of(file: Path) -> dict[str, Row]:
    rows: list[Row] = [json.loads(line) for line in file.read_text().splitlines()]
    assert len({row["image"] for row in rows}) == len(rows)
    return {row["image"]: row for row in rows}


@pytest.fixture(scope="module")
def val(tiny_rec: Path) -> dict[str, bytes]:
    """The held-out digits as class/name and file."""
    images = SplitImages(read_manifest(tiny_rec).splits["val"])
    return {name: images.image(place) for place, name in enumerate(images.names)}


def test_probabilities_of_the_evaluation(
    tiny_trained: Path, tiny_rec: Path, val: dict[str, bytes], tmp_path: Path
) -> None:
    """Of the same images as records, as files and in a tar."""
    trained, manifest = mpl_fast.load(tiny_trained), read_manifest(tiny_rec)
    expected: dict[str, Any] = {}
    names = iter(val)
    for images, _, count in eval_loader(trained.config, manifest, DistEnv(0, 1, trained.device)):
        logits, features = trained.logits_and_features(images)
        for row in range(count):
            expected[next(names)] = logits[row], features[row]
    accuracy = f"top-1 {trained.accuracy['top1']:.2f} % of 50 images with a known label"
    tree = make_tree(tmp_path / "val", val)
    tar = make_tar(tmp_path / "val.tar", [(f"x/{name}", image) for name, image in val.items()])
    for spec in (f"{tiny_rec}:val", tree, f"{tar}:x"):
        out = tmp_path / "out.jsonl"
        done = predict(
            tiny_trained, spec, "--out", out, "--logits", "--features", "--force", "--top-k", 10
        )
        assert done.stdout.splitlines()[-1] == accuracy
        rows = rows_of(out)
        assert rows.keys() == expected.keys()
        for name, (logits, features) in expected.items():
            np.testing.assert_allclose(rows[name]["logits"], logits, atol=1e-5)
            np.testing.assert_allclose(rows[name]["features"], features, atol=1e-5)
            top = logits.softmax(0).sort(descending=True)
            assert rows[name]["label"] == top.indices[0]
            np.testing.assert_allclose(rows[name]["top_probabilities"], top.values, atol=1e-6)
    assert not (tmp_path / "out.jsonl.parts").exists()


def test_bad_images_lose_no_other(
    tiny_trained: Path, val: dict[str, bytes], tmp_path: Path
) -> None:
    """Among others in a batch; those that DALI alone refuses, too."""
    good = {f"good/{name}": image for name, image in val.items()}
    out, clean = tmp_path / "bad.jsonl", tmp_path / "clean.jsonl"
    predict(tiny_trained, make_tree(tmp_path / "clean", good), "--out", clean)
    image = next(iter(val.values()))
    bad = {
        "good/3/empty.jpg": b"",
        "good/4/text.jpg": b"no image\n" * 9,
        "good/5/short.jpg": image[:-20],
        "good/5/gif.jpg": cv2.imencode(".gif", np.zeros((20, 20, 3), np.uint8))[1].tobytes(),
        "good/6/header.jpg": image[:20] + bytes(60) + image[80:],
        "good/7/no_frame.jpg": b"\xff\xd8\xff\xe0\0\x10JFIF\0\1\1\0\0\1\0\1\0\0\xff\xd9",
        "good/8/chunk.png": b"\x89PNG\r\n\x1a\n" + bytes(50) + b"IEND",
        LARGE: large_png(),
    }
    tree = make_tree(tmp_path / "bad", good | bad)
    done = predict(tiny_trained, tree, "--out", out)
    rows = rows_of(out)
    assert [*rows] == sorted(good | bad)
    for name, row in rows_of(clean).items():
        assert abs(row["probability"] - rows[name]["probability"]) < 1e-6
    for name in bad:
        assert rows[name]["error"] and rows[name]["class"] is None, name
        line = f"\npredict: {printable(name)}: {rows[name]['error']}\n"
        assert line in done.stderr
    assert rows["good/3/empty.jpg"]["error"] == "empty file"
    assert rows["good/5/gif.jpg"]["error"] == "GIF, which DALI cannot decode"
    assert rows[LARGE]["error"] == "30000 x 30000 pixels are more than 268435456"
    assert "\x1b" not in done.stderr
    assert f"8 bad images have no prediction but an error in {out}" in done.stderr
    assert "58 images, 8 of them bad" in done.stdout
    check, again = find_fault, tmp_path / "again.jsonl"
    header_only = mock.patch.object(decoding, "find_fault", lambda image, _: check(image, "header"))
    with header_only:  # nothing is suspicious: DALI's own errors lead to the image
        predict(tiny_trained, tree, "--out", again)
    for name, row in rows_of(again).items():
        assert row["class"] == rows[name]["class"], name
    assert "DALI cannot decode it: ..." in rows_of(again)["good/8/chunk.png"]["error"]
    predict(tiny_trained, tree, "--out", out, "--on-bad", "convert", "--force")
    rows = rows_of(out)
    assert rows["good/5/gif.jpg"]["class"] and rows["good/5/short.jpg"]["class"]
    assert rows["good/4/text.jpg"]["error"] and rows[LARGE]["error"]
    predict(tiny_trained, tree, "--out", out, "--max-pixels", 255, "--force", status=4)
    assert {row["error"] for name, row in rows_of(out).items() if name in good} == {
        "16 x 16 pixels are more than 255"
    }
    over = predict(tiny_trained, tree, "--out", out, "--max-pixels", 1 << 29, "--force", status=2)
    assert "--max-pixels 536870912: must be 1 to 268435456" in over.stderr
    none = predict(
        tiny_trained, make_tree(tmp_path / "none", bad), "--out", tmp_path / "x.csv", status=4
    )
    assert "no image can be decoded" in none.stderr and (tmp_path / "x.csv").exists()


KILLED = """
import os, signal
from mpl_fast.inference import parts, predict
from tools.predict import main
write = parts.Parts.write
def write_and_die(self, number, *rest):
    write(self, number, *rest)
    if number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
predict.PART["cpu"], parts.Parts.write = 16, write_and_die
main()
"""


def test_two_ranks_continue_what_one_began(
    tiny_trained: Path, tiny_rec: Path, tmp_path: Path
) -> None:
    """Four parts, of which one rank makes two before it is killed: the same bytes."""
    whole, out = tmp_path / "whole.csv", tmp_path / "out.csv"
    with mock.patch.dict(product.PART, cpu=16):
        predict(tiny_trained, f"{tiny_rec}:val", "--out", whole)
    given = [str(tiny_trained), f"{tiny_rec}:val", "--out", str(out)]
    how: dict[str, Any] = {"capture_output": True, "text": True, "check": False, "cwd": ROOT}
    how["env"] = environment() | {"PYTHONPATH": str(ROOT)}
    killed = subprocess.run([sys.executable, "-c", KILLED, *given], **how)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    parts = tmp_path / "out.csv.parts"
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.npz")}
    assert [*sorted(before)] == ["00000000.npz", "00000001.npz"] and not out.exists()
    other = predict(*given, "--top-k", 2, status=3)
    assert f"{parts} has parts of a prediction with other options" in other.stderr
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, str(ROOT / "tools/predict.py"), *given], **how
    )
    assert done.returncode == 0, done.stderr
    assert "32 images were predicted before" in done.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert len([*csv.DictReader(whole.read_text().splitlines())]) == 50
    assert not parts.exists()


def test_names_that_are_no_text(tiny_trained: Path, val: dict[str, bytes], tmp_path: Path) -> None:
    image = next(iter(val.values()))
    names = ["=HYPERLINK(0).jpg", "+1.jpg", os.fsdecode(b"\xff.jpg"), "<b>.jpg"]
    tree = make_tree(tmp_path / "in", dict.fromkeys(names, image))
    predict(tiny_trained, tree, "--out", tmp_path / "x.csv", "--top-k", 1)
    content = (tmp_path / "x.csv").read_bytes()
    assert b"\n'=HYPERLINK(0).jpg," in content and b"\n'+1.jpg," in content
    assert b"\n\xff.jpg," in content and b"\n<b>.jpg," in content


def kept_of(file: Path) -> dict[str, str]:
    return {row["image"]: row["label"] for row in csv.DictReader(file.read_text().splitlines())}


def test_kept_labels_are_packed(
    tiny_trained: Path, tiny_rec: Path, val: dict[str, bytes], tmp_path: Path
) -> None:
    """A folder of images that have equal names, beside class folders with the same names; then a
    pack of class folders alone."""
    images = [*val.values()]
    pool = make_tree(
        tmp_path / "pool", {f"{at % 3}/{at // 3}.jpg": one for at, one in enumerate(images)}
    )
    labeled = make_tree(
        tmp_path / "labeled", {f"{at}/0.jpg": images[at] + b"x" for at in range(10)}
    )
    out = tmp_path / "pool.jsonl"
    predict(tiny_trained, pool, "--out", out)
    chances = sorted(row["probability"] for row in rows_of(out).values())
    done = predict(tiny_trained, pool, "--out", out, "--keep", chances[25], "--force")
    assert "label_smoothing" not in done.stderr
    sure = {n: row["class"] for n, row in rows_of(out).items() if row["probability"] >= chances[25]}
    lines = kept_of(tmp_path / "pool.kept.csv")
    assert {name: label for name, label in lines.items() if label != "-1"} == sure
    assert f"pool.kept.csv: {len(sure)} kept (" in done.stdout
    assert "class" in done.stderr and f"with a probability of {chances[25]}" in done.stderr
    source = ("--src", labeled, pool, "--unlabeled-src", pool, "--labels")
    run("pack", *source, tmp_path / "pool.kept.csv", "--out", tmp_path / "rec")
    rows = read_split(tmp_path / "rec", "train_label")
    label_of = {image: str(int(label)) for _, label, _, image in rows}
    expected = {(pool / name).read_bytes(): label for name, label in sure.items()}
    expected |= {file.read_bytes(): file.parent.name for file in labeled.rglob("*.jpg")}
    assert label_of == expected
    others = [label for _, label, *_ in read_split(tmp_path / "rec", "train")]
    assert others.count(-1) == 50 - len(sure) and len(others) == 60

    few = ("--keep", chances[0], "--keep-per-class", 2, "--force")
    done = predict(tiny_trained, pool, "--out", out, *few)
    best: dict[str, list[float]] = {}
    for row in rows_of(out).values():
        best.setdefault(row["class"], []).append(row["probability"])
    twice = kept_of(out.with_suffix(".kept.csv"))
    sure_ones = [
        rows_of(out)[name]["probability"] for name, label in twice.items() if label != "-1"
    ]
    expected_chances = [chance for of in best.values() for chance in sorted(of)[-2:]]
    assert sorted(sure_ones) == sorted(expected_chances)
    assert f"{len(sure_ones)} kept" in done.stdout and "--keep-per-class" not in done.stderr
    done = predict(tiny_trained, pool, "--out", out, "--keep", chances[0], "--force")
    assert "a network that is trained on such labels prefers the large classes" in done.stderr
    predict(tiny_trained, pool, "--out", out, "--keep", chances[25], "--force")

    none = predict(tiny_trained, pool, "--out", tmp_path / "none.csv", "--keep", 0.95)
    assert "label_smoothing 0.1, towards probabilities of 0.910" in none.stderr
    assert "none.kept.csv: 0 kept" in none.stdout

    kept_file = tmp_path / "pool.kept.csv"
    predict(tiny_trained, tiny_rec, "--out", out, "--force")
    median = sorted(row["probability"] for row in rows_of(out).values())[30]
    again, kept = (tiny_trained, tiny_rec, "--out", out, "--keep", median), kept_file.read_bytes()
    predict(*again, status=3)
    out.unlink()
    (tmp_path / "pool.jsonl.parts").mkdir()
    (tmp_path / "pool.jsonl.parts/.lock").touch()
    line = predict(*again, status=3).stderr.splitlines()[-1]
    assert f"{kept_file} exists" in line and kept_file.read_bytes() == kept
    kept_file.unlink()
    with mock.patch.object(Parts, "remove", side_effect=KeyboardInterrupt):
        predict(*again, status=130)
    out.unlink()  # as if stopped between the two files
    predict(*again)
    sure = {n: row["class"] for n, row in rows_of(out).items() if row["probability"] >= median}
    truth = SplitImages(read_manifest(tiny_rec).splits["labeled"])
    own = {name: name.partition("/")[0] for name in truth.names}
    train = tiny_rec.parent / "images/train"
    both = ("--src", train, "--unlabeled-src", train, "--labels")
    run("pack", *both, tmp_path / "pool.kept.csv", "--out", tmp_path / "rec2")
    found = {key: int(label) for _, label, key, _ in read_split(tmp_path / "rec2", "train_label")}
    assert found == {f"{c}/{name.partition('/')[2]}": int(c) for name, c in (sure | own).items()}


def test_refused(tiny_trained: Path, tiny_rec: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    (tmp_path / "none").mkdir()
    for arguments, status, fault in (
        ((tmp_path, tiny_rec), 4, "config.yaml does not exist: name a run directory"),
        ((tiny_trained, tmp_path / "none"), 4, "no image found"),
        ((tiny_trained, tmp_path / "gone"), 4, "no such folder or file"),
        ((tiny_trained, f"{tiny_rec}:test"), 4, "has no split 'test': give "),
        ((tiny_trained, tiny_rec, "--keep", 95), 2, "--keep 95.0: must be a probability"),
        ((tiny_trained, tiny_rec, "--keep-per-class", 9), 2, "--keep-per-class is for --keep"),
        ((tiny_trained, tiny_rec, "--keep", 0.3, "--keep-per-class", 0), 2, "must be at least 1"),
        ((tiny_trained, tiny_rec, "--top-q", 9), 2, "unknown option --top_q"),
        ((tiny_trained, tiny_rec, "--checkpoint", "best"), 6, "checkpoint-best"),
    ):
        line = predict(*arguments, "--out", out, status=status).stderr
        assert line.startswith("predict: error: ") and fault in line and line.count("\n") == 1
        assert [file.name for file in tmp_path.iterdir()] == ["none"]
    (tmp_path / "out.csv.parts").mkdir()
    (tmp_path / "out.csv.parts/mine.npz").touch()
    line = predict(tiny_trained, tiny_rec, "--out", out, status=3).stderr
    assert "out.csv.parts is not of a prediction: rename it" in line
    assert (tmp_path / "out.csv.parts/mine.npz").exists()
    (tmp_path / "folder.csv").mkdir()
    done = predict(tiny_trained, tiny_rec, "--out", tmp_path / "folder.csv", "--force", status=3)
    assert "folder.csv is a folder: give another --out" in done.stderr
    out.write_text("mine")
    line = predict(tiny_trained, tiny_rec, "--out", out, status=3).stderr
    assert f"{out} exists: give another --out, or --force to replace it" in line
    assert out.read_text() == "mine"
