from __future__ import annotations

import re
import sys

import pytest

from genrec import cli, errors
from genrec.errors import GenrecError

ERRORS = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, GenrecError)]
KINDS = [error for error in ERRORS if GenrecError in error.__bases__]


def test_exit_codes_are_distinct() -> None:
    codes = [kind.exit_code for kind in [GenrecError, *KINDS]]
    assert len(set(codes)) == len(codes) == 10
    assert not {0, 2} & set(codes)  # Success, and the command line's own code for wrong usage.


@pytest.mark.parametrize("error", ERRORS)
def test_exit_code_is_documented(error: type[GenrecError]) -> None:
    assert (error.__doc__ or "").endswith(f"Exit code {error.exit_code}.")
    kind = next((kind for kind in KINDS if issubclass(error, kind)), GenrecError)
    assert error.exit_code == kind.exit_code


def test_epilog_names_every_exit_code() -> None:
    named = re.findall(r"(\d+) [a-z]", str(cli.app.info.epilog))
    assert [int(code) for code in named] == sorted({0, 2, 130} | {error.exit_code for error in ERRORS})


@pytest.mark.parametrize("error", ERRORS)
def test_command_line_exits_with_it(
    error: type[GenrecError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def app() -> None:
        raise error("what, and where")

    monkeypatch.setattr(cli, "app", app)
    monkeypatch.setattr(sys, "argv", ["genrec"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == error.exit_code
    assert capsys.readouterr() == ("", "error: what, and where\n")


def test_suggestion_names_the_closest_or_the_first_twenty() -> None:
    assert errors.suggestion("titel", ["title", "brand"]) == "Did you mean 'title'?"
    assert errors.suggestion("userId", ["item_id", "user_id"]) == "Did you mean 'user_id'?"
    assert errors.suggestion("zzz", ["b", "a"]) == "Known: a, b."
    assert errors.suggestion("zzz", []) == "Known: none."
    numbers = [f"{number:02}" for number in range(20)]
    assert errors.suggestion("zzz", numbers) == f"Known: {', '.join(numbers)}."
    assert errors.suggestion("zzz", [*numbers, "20"]) == f"Known: {', '.join(numbers)}, ..."
