"""`python -m tools.studies` lists the studies."""

import pytest

from tests.tiny_run import ROOT
from tools.studies.__main__ import NAMES, main


def test_every_study_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    folder = ROOT / "tools" / "studies"
    packages = {file.parent.name for file in folder.glob("*/__main__.py")}
    modules = {file.stem for file in folder.glob("*.py")} - {"__main__", "command"}
    assert set(NAMES) == packages | modules
    for arguments in ([], ["--help"]):
        assert main(arguments) == 0
        listed = capsys.readouterr().out
        assert all(f"  {name} " in listed for name in NAMES)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("moons", "there is no study moons"),
        ("ablation", "write python -m tools.studies.ablation"),
    ],
)
def test_an_argument_is_an_error(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([argument]) == 2
    assert capsys.readouterr().err.startswith(f"tools.studies: error: {message}\nusage: ")
