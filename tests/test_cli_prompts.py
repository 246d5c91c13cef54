from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from conftest import Done, Run, rows

from genrec.prompts import Prompt
from genrec.recommender import Recommender

BROKEN = "{% block user %}{{ item.titel }}{% endblock %}\n{% block assistant %}{{ nothing( }}{% endblock %}\n"


def test_prompts_list(run: Run, inside: Path) -> None:
    Path("prompts/broken.jinja").write_text(BROKEN)
    done = run("prompts", "list")
    assert (done.code, done.err) == (0, "")
    found = {row[0]: row[1:] for row in rows(done.out)}
    assert found["prompts/next_item.jinja"] == ["sequence", "", ""]
    assert found["prompts/title_to_item.jinja"] == ["question", "item.title", ""]
    assert found["prompts/broken.jinja"][2].startswith("prompts/broken.jinja:2:")
    assert found["prompts/shop/next_item.jinja"][0] == "sequence"
    listed = {row["path"]: row for row in run("prompts", "list", "--json").json}
    assert listed["prompts/title_to_item.jinja"] == {
        "path": "prompts/title_to_item.jinja",
        "kind": "question",
        "reads": ["item.title"],
        "problem": None,
    }
    assert listed["prompts/broken.jinja"]["problem"] == found["prompts/broken.jinja"][2]


def test_prompts_show(run: Run, workspace: Path) -> None:
    path = workspace / "prompts" / "next_item.jinja"
    assert run("prompts", "show", path) == Done(0, path.read_text(), "")


def test_prompts_check(run: Run, inside: Path) -> None:
    paths = ("prompts/next_item.jinja", "prompts/title_to_item.jinja")
    good = run("prompts", "check", *paths, "--adapter", "adapters/lora")
    assert good == Done(0, "prompts/next_item.jinja: good\nprompts/title_to_item.jinja: good\n", "")
    Path("prompts/broken.jinja").write_text(BROKEN)
    Path("prompts/titel.jinja").write_text(BROKEN.replace("nothing(", "item.identifier"))
    paths = ("prompts/next_item.jinja", "prompts/broken.jinja", "prompts/titel.jinja")
    done = run("prompts", "check", *paths, "--data", "data/tiny")
    assert (done.code, done.err) == (5, "")
    lines = done.out.splitlines()
    assert lines[0].startswith("prompts/next_item.jinja: good (whether it fits")
    assert lines[1].startswith("prompts/broken.jinja:2:")
    assert lines[2].startswith("prompts/titel.jinja:1:")
    assert lines[2].endswith("Did you mean 'title'?")
    told = run("prompts", "check", *paths, "--data", "data/tiny", "--json")
    assert told.code == 5
    assert [len(problems) for problems in told.json.values()] == [0, 1, 1]
    assert told.json["prompts/titel.jinja"][0]["line"] == 1


def test_prompts_check_with_a_tokenizer_says_what_does_not_fit(run: Run, inside: Path) -> None:
    Path("prompts/long.jinja").write_text(
        "{% block user %}" + "Very long. " * 60 + "{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}"
    )
    base = ("--data", "data/tiny", "--base", "adapters/random", "--max-length", 64)
    for given in (base, ("--adapter", "adapters/lora")):
        done = run("prompts", "check", "prompts/long.jinja", "prompts/next_item.jinja", *given)
        assert (done.code, done.err) == (5, "")
        long, good = done.out.splitlines()
        assert long.startswith("prompts/long.jinja:1:")
        assert "max_length is 64" in long
        assert good == "prompts/next_item.jinja: good"
    told = run("prompts", "check", "prompts/long.jinja", "--data", "data/tiny")
    assert told.out == "prompts/long.jinja: good (whether it fits was not checked: add --adapter or --base)\n"


def test_prompts_render(run: Run, workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    adapter = workspace / "adapters" / "lora"
    default = workspace / "prompts" / "next_item.jinja"
    sequence = run("prompts", "render", default, adapter, "--history", "i1, i2")
    rec = Recommender.load(adapter, engine="dummy")
    head = len(rec.tokenization.head_ids(rec.adapter.prompt))
    assert sequence == Done(
        0,
        f"read: {rec.prompt(['i1', 'i2'])}\n"
        f"tokens: {head} head, 2 history, 0 answer, {62 - head} of 64 free; nothing was cut\n"
        'trained: 2 tokens, the identifier of every item; with loss = "answer" that of the last alone\n',
        "",
    )
    question = run("prompts", "render", workspace / "prompts" / "title_to_item.jinja", adapter, "--item", "i3")
    read, answer, _, trained = question.out.splitlines()
    assert read.startswith("read: <|begin|><|user|>")
    assert "Film 3 of series 0" in read
    assert answer == "trained: <|item_3|>"
    assert trained == "trained: 1 token, the answer"
    told = run("prompts", "render", default, adapter, "--user", "u1", "--json").json
    assert told["kind"] == "sequence"
    assert told["history"] == rec.user_history("u1")[0]
    assert told["tokens"]["history"] == len(told["history"])
    assert told["read"][0] == {"kind": "frame", "text": "<|begin|><|user|>", "ids": [1, 3]}
    data = ("--data", workspace / "data" / "tiny", "--base", workspace / "adapters" / "random", "--max-length", 64)
    assert run("prompts", "render", default, *data, "--user", "u1", "--json").json == told


def test_prompts_render_with_context_and_a_warning(run: Run, inside: Path) -> None:
    Path("prompts/now.jinja").write_text(
        "{% block user %}{{ context.hour }}h {{ user.agee }}{% endblock %}{% block item %}{{ item.identifier }}"
        "{% endblock %}"
    )
    done = run("prompts", "render", "prompts/now.jinja", "adapters/lora", "--user", "u1", "--context", "hour=9")
    assert done.code == 0
    assert "<|user|>9h<|end|>" in done.out.replace("9h ", "9h")
    assert done.err.startswith("prompts/now.jinja:1:")
    assert "Did you mean 'age'?" in done.err


def test_prompts_of_an_adapter_whose_data_set_is_elsewhere(run: Run, inside: Path) -> None:
    shutil.move("data/tiny", "elsewhere")
    path, adapter = "prompts/next_item.jinja", "adapters/lora"
    done = run("prompts", "render", path, adapter, "--history", "i1,i2")
    assert done.code == 0
    assert "columns of users and interactions were not checked" in done.err
    assert run("prompts", "render", path, adapter, "--history", "i1,i2", "--data", "elsewhere").err == ""
    assert "good (columns of users and interactions" in run("prompts", "check", path, "--adapter", adapter).out
    assert run("prompts", "check", path, "--adapter", adapter, "--data", "elsewhere").out == f"{path}: good\n"


def test_prompts_render_in_colours(monkeypatch: pytest.MonkeyPatch, run: Run, workspace: Path) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    done = run("prompts", "render", workspace / "prompts" / "item_to_title.jinja", workspace / "adapters" / "lora",
               "--item", "i3")  # fmt: skip
    for colour, text in (("36", "What is the title of "), ("35", "<|item_3|>"), ("32", "Film 3 of series 0")):
        assert f"\x1b[{colour}m{text}\x1b[0m" in done.out
    assert "colours:" in done.out


def test_prompts_diff(run: Run, inside: Path) -> None:
    prompts = ("prompts/next_item.jinja", "prompts/next_item_titles.jinja")
    data = ("--data", "data/tiny", "--base", "adapters/random", "--max-length", 64)
    done = run("prompts", "diff", *prompts, *data, "--users", 6, "--show", 2)
    assert (done.code, done.err) == (0, "")
    shown = [line for line in done.out.splitlines() if line.startswith("user u")]
    assert len(shown) == 2
    assert all("{+" in line and "Film" in line for line in shown)
    table = {row[0]: row[1:] for row in rows(done.out)}
    assert table["head"][2] == "+0.0"
    assert float(table["history"][2]) > 0
    assert "NDCG" not in done.out
    told = run("prompts", "diff", *prompts, "--adapter", "adapters/lora", "--users", 6, "--show", 0)
    assert "tokens, means of 6 users" in told.out
    assert " (not as trained), change " in told.out
    assert not told.out.startswith("user")
    as_json = run("prompts", "diff", *prompts, *data, "--users", 6, "--json").json
    assert len(as_json["pairs"]) == 6
    assert as_json["ndcg"] is None


def test_prompts_new(run: Run, inside: Path) -> None:
    assert run("prompts", "new", "prompts/mine.jinja") == Done(0, "prompts/mine.jinja\n", "")
    shop = run("prompts", "new", "prompts/shop/mine.jinja", "--from", "shop/next_item")
    assert shop.code == 0
    for mine, shipped in (("mine", "next_item"), ("shop/mine", "shop/next_item")):
        text = Path(f"prompts/{mine}.jinja").read_text()
        assert text.startswith(f"{{#-\n  Begun from the shipped prompt {shipped}.")
        assert Prompt.load(f"prompts/{mine}.jinja").contract == Prompt.load(f"prompts/{shipped}.jinja").contract
    checked = run("prompts", "check", "prompts/mine.jinja", "--adapter", "adapters/lora")
    assert checked.out == "prompts/mine.jinja: good\n"
    again = run("prompts", "new", "prompts/mine.jinja", "--from", "shop/next_item")
    assert (again.code, again.out) == (9, "")
    assert "prompts/mine.jinja is there already" in again.err
    assert Path("prompts/mine.jinja").read_text().count("shop") == 0
    assert "Did you mean 'next_item'?" in run("prompts", "new", "x.jinja", "--from", "next_itme").err
    assert run("prompts", "new", "mine.txt").code == 3
