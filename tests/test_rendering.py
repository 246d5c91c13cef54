from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest

import genrec
from genrec.errors import ConfigError, DataError, PromptError, UnknownIdError
from genrec.prompts import Prompt
from genrec.recommender import Recommender
from genrec.rendering import Setting, render

AGED = (
    "{% block user %}Age {{ user.age }} at {{ context.hour }}{% endblock %}"
    "{% block item %}{{ item.identifier }}{{ item.brand }}{% endblock %}"
)


@pytest.fixture(scope="module")
def rec(workspace: Path) -> Recommender:
    return Recommender.load(workspace / "adapters" / "lora", engine="dummy")


def text_of(spans: list[Any]) -> str:
    return "".join(span.text for span in spans)


def test_rendered_sequence_is_what_the_model_reads(workspace: Path, rec: Recommender) -> None:
    found = render(workspace / "prompts" / "next_item.jinja", rec.adapter.path, history=["i1", "i2"], item="i3")
    ids = [index for span in found.read for index in span.ids]
    prompt = rec.adapter.prompt
    assert ids == rec.tokenization.sequence(prompt, rec.indices(["i1", "i2"])).tolist()
    assert text_of(found.read) == rec.prompt(["i1", "i2"])
    assert [span.kind for span in found.read] == ["frame", "template", "frame", "identifier", "identifier"]
    assert (found.kind, found.cut, text_of(found.answer)) == ("sequence", 0, "<|item_3|>")
    assert [span.text for span in found.trained] == ["<|item_1|>", "<|item_2|>", "<|item_3|>"]
    head = len(ids) - 2
    assert found.tokens == {"head": head, "history": 2, "answer": 1, "free": 64 - head - 3, "max_length": 64}


def test_rendered_sequence_of_a_user_has_the_columns_and_no_answer(rec: Recommender, tmp_path: Path) -> None:
    path = tmp_path / "aged.jinja"
    path.write_text(AGED)
    history, row = rec.user_history("u2")
    assert row is not None
    found = render(path, rec.adapter.path, user="u2", context={"hour": 9})
    ids = rec.tokenization.sequence(Prompt.load(path), rec.indices(history), row, {"hour": 9})
    assert [index for span in found.read for index in span.ids] == ids.tolist()
    assert f"Age {row['age']} at 9" in found.text
    assert found.answer == []
    assert {span.kind for span in found.read} == {"frame", "template", "data", "identifier"}
    assert f"Age {row['age']} at<|end|>" in render(path, rec.adapter.path, user="u2").text


def test_rendered_sequence_says_how_many_events_were_cut(workspace: Path, rec: Recommender) -> None:
    long = [f"i{number % 24}" for number in range(100)]
    found = render(workspace / "prompts" / "next_item.jinja", rec.adapter.path, history=long)
    kept = [span.text for span in found.read if span.kind == "identifier"]
    assert kept == [f"<|item_{item[1:]}|>" for item in long[found.cut :]]
    assert found.cut == 100 - found.tokens["history"] > 0
    assert found.tokens["free"] == 1  # Room for the next identifier.
    assert text_of(found.read) == rec.prompt(long)
    assert found.history == long
    assert f"cut: the {found.cut} oldest of 100 events (i0, i1, i2, i3, i4, ...)" in found.budget
    assert "nothing was cut" in render(workspace / "prompts" / "next_item.jinja", rec.adapter.path, history=[]).budget


def test_rendered_question_shows_what_is_trained(workspace: Path, rec: Recommender) -> None:
    found = render(workspace / "prompts" / "title_to_item.jinja", rec.adapter.path, item="i5")
    assert found.kind == "question"
    assert '"Film 5 of series 1"' in text_of(found.read)
    assert text_of(found.answer) == "<|item_5|>"
    size = sum(len(span.ids) for span in found.read)
    assert found.tokens == {"head": size, "history": 0, "answer": 1, "free": 64 - size - 1, "max_length": 64}
    last = render(workspace / "prompts" / "title_to_item.jinja", rec.adapter.path, history=["i1", "i5"])
    assert last == found
    title = render(workspace / "prompts" / "item_to_title.jinja", rec.adapter.path, item="i5")
    assert text_of(title.answer) == "Film 5 of series 1<|end|>"
    assert title.trained == title.answer


def test_rendered_question_about_a_history_says_how_many_events_were_cut(rec: Recommender, tmp_path: Path) -> None:
    path = tmp_path / "told.jinja"
    path.write_text(
        "{% block user %}{% for event in history %}{{ event.title }};{% endfor %}{% endblock %}"
        "{% block assistant %}{{ item.identifier }}{% endblock %}"
    )
    events = [f"i{item}" for item in range(14)]
    found = render(path, rec.adapter.path, history=events, item="i20")
    assert found.history == events
    told = [f"Film {item} of series {item // 4};" for item in range(14)]
    assert 0 < found.cut < 14
    assert "".join(told[found.cut :]) in text_of(found.read)
    assert told[found.cut - 1] not in text_of(found.read)
    assert found.tokens["head"] + found.tokens["history"] == sum(len(span.ids) for span in found.read)
    without = render(path, rec.adapter.path, history=[], item="i20")
    assert found.tokens["head"] == without.tokens["head"] == sum(len(span.ids) for span in without.read)
    assert render(path, rec.adapter.path, history=events[:2], item="i20").cut == 0
    assert text_of(render(path, rec.adapter.path, history=events).answer) == "<|item_13|>"


def test_rendered_question_about_an_event(workspace: Path, rec: Recommender, tmp_path: Path) -> None:
    data = genrec.Dataset.load(workspace / "data" / "tiny")
    log = data.interactions.with_columns(rating=1.0 + pl.col("order")).drop("order")
    genrec.Dataset.from_frames(log, data.items, data.users).save(tmp_path / "rated")
    path, adapter = workspace / "prompts" / "rating.jinja", rec.adapter.path
    history, _ = rec.user_history("u7")
    last = render(path, adapter, user="u7", data=tmp_path / "rated")
    assert text_of(last.answer) == f"{len(history)}<|end|>"
    identifiers = [f"<|item_{item[1:]}|>" for item in history]
    assert text_of(last.read).startswith("<|begin|><|user|>" + "".join(identifiers[:-1]) + " Rating of ")
    assert f" {identifiers[-1]}?" in text_of(last.read)
    at = len(history) - 1 - history[::-1].index(history[1])
    second = render(path, adapter, user="u7", item=history[1], data=tmp_path / "rated")
    assert text_of(second.answer) == f"{at + 1}<|end|>"
    assert [span.text for span in second.read if span.kind == "identifier"] == [*identifiers[:at], identifiers[at]]
    with pytest.raises(ConfigError, match=r"rating asks about an interaction of a data set\. Pass --user U\."):
        render(path, adapter, history=history)
    new = next(item for item in rec.item_ids if item not in history)
    with pytest.raises(ConfigError, match=f"user 'u7' has no interaction with item '{new}'"):
        render(path, adapter, user="u7", item=new, data=tmp_path / "rated")
    with pytest.raises(DataError, match=r"rating:\d+:\d+: the table of `event` has no column `rating`"):
        render(path, adapter, user="u7")


def test_a_question_about_an_event_leaves_the_room_that_training_leaves(
    workspace: Path, rec: Recommender, tmp_path: Path
) -> None:
    """That of the longest answer of the log, so that what is cut does not tell a short answer from a long one."""
    data = genrec.Dataset.load(workspace / "data" / "tiny")
    long = pl.col("user_id") == "u1"
    log = data.interactions.with_columns(mood=pl.when(long).then(pl.lit("abc def " * 5)).otherwise(pl.lit("ok")))
    genrec.Dataset.from_frames(log.drop("order"), data.items, data.users, context=["mood"]).save(tmp_path / "moods")
    prompt = Prompt.parse(
        "{% block user %}{% for past in history %}{{ past.title }};{% endfor %}{{ item.identifier }}?{% endblock %}"
        "{% block assistant %}{{ event.mood }}{% endblock %}",
        "mood",
    )
    setting = Setting.of(rec.adapter.path, data=tmp_path / "moods")
    room = rec.tokenization.answer_room(prompt, ["abc def " * 5])
    user = max(data.user_ids[2:], key=lambda one: len(rec.user_history(one)[0]))
    history = rec.indices(rec.user_history(user)[0])
    found = setting.render(prompt, user=user)
    asked = rec.tokenization.question_ids(prompt, int(history[-1]), room=room, history=history[:-1])
    assert [index for span in found.read for index in span.ids] == asked.tolist()
    assert found.cut > 0
    assert found.tokens["free"] >= room - found.tokens["answer"] > 0


def test_an_adapter_whose_data_set_is_elsewhere_renders_all_the_same(workspace: Path, tmp_path: Path) -> None:
    shutil.copytree(workspace / "adapters", tmp_path / "adapters")
    setting = Setting.of(tmp_path / "adapters" / "lora")
    assert setting.columns == (["item_id", "title", "brand"], None, None)
    prompt = Prompt.parse(AGED.replace("item.brand", "item.brnad").replace("user.age", "user.aeg"), "x")
    (known,) = setting.problems(prompt)
    assert "`brnad`" in known.message
    assert setting.render(Prompt.parse(AGED, "x"), history=["i1"]).cut == 0
    for act in (
        lambda: setting.render(prompt, user="u1"),
        lambda: Setting.of(setting.adapter.path if setting.adapter else None, data=tmp_path / "nix"),
    ):
        with pytest.raises(DataError, match="holds no data set"):
            act()


def test_question_needs_an_item(workspace: Path, rec: Recommender) -> None:
    with pytest.raises(ConfigError, match=r"title_to_item asks about an item\. Pass --item ID"):
        render(workspace / "prompts" / "title_to_item.jinja", rec.adapter.path)
    with pytest.raises(UnknownIdError, match="item 'nix'"):
        render(workspace / "prompts" / "title_to_item.jinja", rec.adapter.path, item="nix")


def test_rendering_needs_a_good_prompt(rec: Recommender, tmp_path: Path) -> None:
    (tmp_path / "broken.jinja").write_text("{% block user %}{{ item.title }}")
    with pytest.raises(PromptError, match=r"broken\.jinja:1"):
        render(tmp_path / "broken.jinja", rec.adapter.path, item="i1")


def test_an_edited_prompt_of_the_same_name_gets_the_frame_of_its_own_blocks(workspace: Path, tmp_path: Path) -> None:
    source = (workspace / "prompts" / "next_item.jinja").read_text()
    for name in ("next_item", "other"):
        (tmp_path / f"{name}.jinja").write_text("{% block system %}Be brief.{% endblock %}" + source)
    same, other = (
        render(tmp_path / f"{name}.jinja", workspace / "adapters" / "lora", history=[])
        for name in ("next_item", "other")
    )
    assert same.read == other.read
    assert any("<|system|>" in span.text for span in same.read)


def test_a_data_set_and_a_base_render_as_the_adapter_that_they_will_make(workspace: Path, rec: Recommender) -> None:
    path = workspace / "prompts" / "next_item.jinja"
    trained = render(path, rec.adapter.path, user="u3")
    for base in ("random", "pretrained"):  # The second brings its identifiers.
        name = str(workspace / "adapters" / base)
        assert render(path, data=workspace / "data" / "tiny", base=name, max_length=64, user="u3") == trained
    default = render(path, data=workspace / "data" / "tiny", base=name, user="u3")
    assert default.tokens["max_length"] == 256
    assert default.read == trained.read


def test_setting_needs_an_adapter_or_data_and_base(workspace: Path, rec: Recommender, tmp_path: Path) -> None:
    tiny, base = workspace / "data" / "tiny", str(workspace / "adapters" / "pretrained")
    with pytest.raises(ConfigError, match="--data data/NAME --base smollm2"):
        Setting.of(data=tiny)
    for more in ({"base": base}, {"max_length": 9}):
        with pytest.raises(ConfigError, match="has its own base and max_length"):
            Setting.of(rec.adapter.path, **more)
    log = pl.DataFrame({"user_id": ["a"], "item_id": ["x"]})
    genrec.Dataset.from_frames(log).save(tmp_path / "other")
    with pytest.raises(ConfigError, match="brings identifiers of other items"):
        Setting.of(data=tmp_path / "other", base=base)
    with pytest.raises(UnknownIdError, match=r"item 'I3' is not in the catalogue .*Did you mean 'i3'\?"):
        Setting.of(data=tiny, base=base).indices(["I3"])
    with pytest.raises(ConfigError, match="one of --user and --history"):
        Setting.of(rec.adapter.path).render(rec.adapter.prompt, user="u1", history=["i1"])


def test_case_is_the_last_choice_with_what_was_known_before_it(workspace: Path, rec: Recommender) -> None:
    setting = Setting.of(rec.adapter.path)
    history, row = rec.user_history("u4")
    found = setting.case(Prompt.parse(AGED, "aged"), "u4")
    assert found is not None
    assert row is not None
    assert found.history == history[:-1]
    assert text_of(found.answer) == f"<|item_{history[-1][1:]}|>"
    hour = (setting.dataset.interactions.filter(user_id="u4")["timestamp"][-1] // 3600) % 24
    assert f"Age {row['age']} at {hour}" in found.text


def test_case_that_is_not_asked_about(workspace: Path, rec: Recommender, tmp_path: Path) -> None:
    data = genrec.Dataset.load(workspace / "data" / "tiny")
    last = pl.col("order") == pl.col("order").max().over("user_id")
    log = data.interactions.with_columns(rating=pl.when(last & (pl.col("user_id") == "u1")).then(None).otherwise(4.0))
    genrec.Dataset.from_frames(log.drop("order"), data.items, data.users).save(tmp_path / "rated")
    setting = Setting.of(rec.adapter.path, data=tmp_path / "rated")
    rating = Prompt.load(workspace / "prompts" / "rating.jinja")
    assert setting.case(rating, "u1") is None
    asked = setting.case(rating, "u2")
    assert asked is not None
    assert text_of(asked.answer) == "4<|end|>"


def test_problems_are_those_of_columns_and_room_too(workspace: Path, rec: Recommender) -> None:
    setting = Setting.of(rec.adapter.path)
    assert setting.problems(rec.adapter.prompt) == []
    (missing,) = setting.problems(Prompt.parse(AGED.replace("item.brand", "item.brnad"), "x"))
    assert "`brnad`" in missing.message


def test_html_holds_the_text_escaped_and_its_origins(rec: Recommender) -> None:
    prompt = Prompt.parse(
        "{% block user %}{{ item.title }} <b>{% endblock %}{% block assistant %}{{ item.identifier }}{% endblock %}",
        "x",
    )
    html = render(prompt, rec.adapter.path, item="i3")._repr_html_()
    assert '<span style="color:green">Film 3 of series 0</span>' in html
    assert "&lt;b&gt;" in html
    assert html.index("→") < html.index("&lt;|item_3|&gt;")
