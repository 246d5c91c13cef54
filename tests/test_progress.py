from __future__ import annotations

import pytest

from genrec import progress


def work() -> None:
    with progress.bar("training", 3) as advance:
        advance()
        advance(2, note="loss 1.5")
    progress.say("kept [bold]step 3")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Standard error looks like a terminal to Rich, whatever the tests run in."""
    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")


@pytest.fixture
def no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("terminal")
def test_standard_error_alone(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    out, err = capsys.readouterr()
    assert out == ""
    for text in ("training", "3/3", "loss 1.5", "kept [bold]step 3"):
        assert text in err


@pytest.mark.usefixtures("no_terminal")
def test_no_bar_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    work()
    assert capsys.readouterr() == ("", "kept [bold]step 3\n")


@pytest.mark.usefixtures("terminal")
def test_quiet(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "quiet", True)
    work()
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("no_terminal")
def test_an_error_passes_through(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="7"), progress.bar("training", 3):
        raise ValueError("7")
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("no_terminal")
def test_lines_in_the_place_of_a_bar_tell_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 5.0, 20.0, 30.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with progress.bar("training", 40) as advance:
        advance(4)
        advance(6, note="loss 1.5")
        advance(30)
    assert capsys.readouterr() == ("", "training: 10 of 40, 0:01:15 left loss 1.5\n")
