"""Patterns name the files that a shell would find."""

import subprocess
from pathlib import Path

import pytest

from mpl_fast.errors import DataError
from mpl_fast.packing.sources import patterns
from mpl_fast.packing.sources.patterns import matching_files

FILES = ["a-00.tar", "a-01.tar", "a-10.tar", "b-8.tar", "b-9.tar", "b-10.tar", "c.tar"]


@pytest.mark.parametrize(
    "pattern",
    [
        *("*", "a-*.tar", "[ab]-?.tar", "a-{00..01}.tar", "{b-9,c}.tar", "a-{01,00}.tar"),
        *("{a,b}-*.tar", "b-{10..8}.tar", "{c,c}.tar", "a-{0,1}{0..0}.tar"),
        *("{a-00,b-{8,9}}.tar", "{b-{9,8},a-{0{1,0},10},c}.tar", "{{b-{8..9},c},a-{1,0}0}.tar"),
    ],
)
def test_as_in_bash(tmp_path: Path, pattern: str) -> None:
    for name in FILES:
        (tmp_path / name).touch()
    (tmp_path / "a-folder").mkdir()
    line = f"for name in {pattern}; do [ -f $name ] && echo $name; done; true"
    done = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env={"LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=True,
    )
    wanted = [tmp_path / name for name in dict.fromkeys(done.stdout.split())]
    assert wanted
    assert list(matching_files(f"{tmp_path}/{pattern}")) == wanted


def test_most_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit counts what all braces stand for together."""
    monkeypatch.setattr(patterns, "_LIMIT", 100)
    for braces in ("{0..9}{0..9}", "{x,{1..9}{1..11}}"):
        assert matching_files(f"{tmp_path}/{braces}") == ()
    for braces in ("{0..9}{0..10}", "{x,{0..9}{0..9}}", "{0..100}"):
        with pytest.raises(DataError, match=r"stands for more than 100 files$"):
            matching_files(f"{tmp_path}/{braces}")


def test_no_pattern(tmp_path: Path) -> None:
    assert matching_files(str(tmp_path)) == matching_files(f"{tmp_path}/*") == ()
