"""Errors end a command with one line and an exit code."""

import pytest

from mpl_fast.errors import ConfigError, fail


@pytest.mark.parametrize(("rank", "alone"), [("0", False), ("1", False), ("1", True)])
def test_the_rank_that_prints_an_error_ends_first(
    rank: str, alone: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise torchrun may end it before it has printed."""
    waited: list[float] = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr("time.sleep", waited.append)
    error = ConfigError("wrong")
    error.alone = alone
    with pytest.raises(SystemExit) as ended:
        fail("train", error)
    prints = rank == "0" or alone
    assert ended.value.code == 2 and bool(waited) is not prints
    assert capsys.readouterr().err == ("train: error: wrong\n" if prints else "")
