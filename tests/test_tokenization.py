from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from genrec import base
from genrec.decoding import Trie
from genrec.engines.local import LocalEngine
from genrec.errors import IdentifierError, PromptError
from genrec.identifiers import LONGEST_TITLE, Identifiers
from genrec.prompts import Prompt
from genrec.tokenization import (
    IGNORE,
    Fragments,
    Frame,
    Tokenization,
    add_identifier_tokens,
    event_answers,
    kept_from,
    make_frame,
    text_tokens,
)
from genrec.windows import windows

TITLES = ["Toy Story (1995)", "红楼梦 第一回", 'The "Last" Film', "Amélie 👩‍👧", "", "Toy Toy Toy", "a\nb", "Ωmega"]
ITEMS = pl.DataFrame(
    {
        "item_id": [f"i{number}" for number in range(len(TITLES))],
        "title": TITLES,
        "brand": ["Pixar", "", "x", None, "Pixar", "y", "z", "w"],
    }
)
USER = {"user_id": "u1", "age": 33, "city": "Wien <|end|> </s>"}
EVENT = {"timestamp": 7, "rating": 4.0}

# ---- Three families of tokenizers, and one of single characters ------------------------------------------------------

SENTENCE_PIECES = ["<unk>", "<s>", "</s>"]


def byte_level() -> FastTokenizer:
    tokenizer = base.train_tokenizer([*TITLES, "Which item is next? What is the title of it"] * 2, 320)
    tokenizer.chat_template = None
    return tokenizer


def sentence_piece_bpe() -> FastTokenizer:
    """As Llama's: a space mark before each text, bytes for unknown characters, control tokens among the pieces."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    pieces = [*SENTENCE_PIECES, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=pieces, show_progress=False)
    made.train_from_iterator(["Which item is next Toy Story What title"] * 3, trainer)
    table = json.loads(made.to_str())
    table["added_tokens"] = [token for token in table["added_tokens"] if token["content"] in SENTENCE_PIECES]
    table["model"]["ignore_merges"] = True  # So that a text that is a piece becomes it, as in Llama 3.
    return FastTokenizer(
        tokenizer_object=Tokenizer.from_str(json.dumps(table)),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
    )  # fmt: skip


def unigram() -> FastTokenizer:
    """As T5's: the most probable pieces, among which control tokens are found in plain text."""
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=90, special_tokens=SENTENCE_PIECES, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator([*TITLES, "Which item is next What is the title of"] * 3, trainer)
    return FastTokenizer(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>")


def characters() -> FastTokenizer:
    """One token per character, without a begin token."""
    letters = sorted(set("".join(TITLES) + "Which item is next? What is the title of it. Next:|<>_/s"))
    vocabulary = {token: number for number, token in enumerate(["<unk>", "</s>", *letters])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    return FastTokenizer(tokenizer_object=made, unk_token="<unk>", eos_token="</s>", pad_token="</s>")


FAMILIES: dict[str, Callable[[], FastTokenizer]] = {
    "byte-level": byte_level,
    "sentence-piece": sentence_piece_bpe,
    "unigram": unigram,
    "characters": characters,
}
_TURNS = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
TEMPLATES: dict[str, str | None] = {
    "no template": None,
    "template": _TURNS,
    "refuses system": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + _TURNS,
    "default system": "{% if messages[0]['role'] != 'system' %}[system] Be kind.{{ eos_token }}\n{% endif %}" + _TURNS,
}  # fmt: skip
IDENTIFIERS: dict[str, list[tuple[str, ...]]] = {
    "atomic": Identifiers.build("atomic", ITEMS["item_id"].to_list()).tokens,
    "semantic": [(f"<|a_{n // 4}|>", f"<|b_{n // 2 % 2}|>", f"<|c_{n % 2}|>") for n in range(8)],
    "unequal": [
        *[("<|a_0|>",), ("<|a_1|>", "<|b_0|>"), ("<|a_1|>", "<|b_1|>", "<|c_0|>"), ("<|a_1|>", "<|b_1|>", "<|c_1|>")],
        *[("<|a_2|>", "<|b_0|>"), ("<|a_2|>", "<|b_1|>"), ("<|a_3|>",), ("<|b_0|>", "<|a_0|>", "<|a_0|>", "<|a_0|>")],
    ],
}

SHIPPED = [Prompt.load(path) for path in sorted((Path(__file__).parent.parent / "prompts").glob("*.jinja"))]
WITH_TEXT = Prompt.parse(
    "{% block user %}Seen:{% endblock %}{% block item %}{{ item.identifier }} {{ item.title }}; {% endblock %}",
    "with_text",
)
WITH_USER = Prompt.parse(
    "{% block system %}For {{ user.city }}{% endblock %}{% block user %}Age {{ user.age }}{% endblock %}"
    "{% block item %}{{ item.identifier }}{% if item.brand is none %}?{% endif %}{% endblock %}",
    "with_user",
)
HEADLESS = Prompt.parse("{% block item %}{{ item.identifier }}{% endblock %}", "headless")
NEXT_TITLE = Prompt.parse(
    "{% block system %}Librarian.{% endblock %}"
    "{% block user %}{% for past in history %}{{ past.identifier }} {{ past.title }}, {% endfor %}then{% endblock %}"
    "{% block assistant %}{{ item.title }}{% endblock %}",
    "next_title",
)
SEQUENCES = [prompt for prompt in SHIPPED if prompt.kind == "sequence"] + [WITH_TEXT, WITH_USER, HEADLESS]
QUESTIONS = [prompt for prompt in SHIPPED if prompt.kind == "question"] + [NEXT_TITLE]

every_family = pytest.mark.parametrize("family", list(FAMILIES))
every_template = pytest.mark.parametrize("template", list(TEMPLATES))
every_scheme = pytest.mark.parametrize("scheme", list(IDENTIFIERS))


@cache
def backend(family: str) -> FastTokenizer:
    return FAMILIES[family]()


def new_tokenizer(family: str, template: str = "template") -> FastTokenizer:
    """A tokenizer of its own, which a test may add tokens to."""
    made = backend(family)
    names = {name: token for name, token in made.special_tokens_map.items() if isinstance(token, str)}
    tokenizer = FastTokenizer(tokenizer_object=Tokenizer.from_str(made.backend_tokenizer.to_str()), **names)
    tokenizer.chat_template = TEMPLATES[template]
    return tokenizer


@cache
def make(
    family: str, template: str = "template", scheme: str = "atomic", max_length: int = 2000, titles: str = ""
) -> Tokenization:
    """``titles`` (with a bar between) take the place of the first ones."""
    tokenizer, items = new_tokenizer(family, template), ITEMS
    if titles:
        given = titles.split("\x1f")
        items = items.with_columns(title=pl.Series([*given, *TITLES[len(given) :]]))
    identifiers = Identifiers(scheme, items["item_id"].to_list(), IDENTIFIERS[scheme])
    add_identifier_tokens(tokenizer, identifiers)
    return Tokenization(tokenizer, identifiers, items, max_length=max_length)


def concatenated(spans: Sequence[Any]) -> list[int]:
    return [index for span in spans for index in span.ids]


def identifier_starts(tokenization: Tokenization, prompt: Prompt, window: np.ndarray, head: int) -> np.ndarray:
    return head + np.concatenate([[0], np.cumsum(tokenization.fragment_lengths(prompt, window))])[: len(window)]


# ---- What is trained is what is read ---------------------------------------------------------------------------------


@every_family
@every_template
@every_scheme
def test_a_row_before_each_identifier_is_the_inference_prompt(family: str, template: str, scheme: str) -> None:
    for prompt in SEQUENCES:
        check_sequence_row(make(family, template, scheme), prompt, np.array([1, 0, 5, 3, 4, 7, 2, 6, 0]))


def check_sequence_row(tokenization: Tokenization, prompt: Prompt, history: np.ndarray) -> None:
    row = tokenization.sequence_row(prompt, history, user=USER)
    head = tokenization.head_ids(prompt, USER)
    starts = identifier_starts(tokenization, prompt, history, len(head))
    expected = np.full(len(row.ids), IGNORE)
    for position, (item, start) in enumerate(zip(history, starts, strict=True)):
        identifier = tokenization.identifier(int(item))
        np.testing.assert_array_equal(row.ids[:start], tokenization.sequence(prompt, history[:position], USER))
        np.testing.assert_array_equal(row.ids[start : start + len(identifier)], identifier)
        expected[start : start + len(identifier)] = identifier
    np.testing.assert_array_equal(row.labels, expected)
    assert len(row.ids) == starts[-1] + len(identifier)
    assert row.ids.dtype == row.labels.dtype == np.int32


@every_family
@every_template
@every_scheme
def test_a_question_row_is_the_question_and_its_answer(family: str, template: str, scheme: str) -> None:
    for prompt in QUESTIONS:
        check_question_row(make(family, template, scheme), prompt)


def check_question_row(tokenization: Tokenization, prompt: Prompt) -> None:
    history = () if prompt.subject == "item" else np.array([2, 5])
    question, answer = tokenization.question(prompt, 1, history=history, user=USER, event=EVENT)
    row = tokenization.question_row(prompt, 1, history=history, user=USER, event=EVENT)
    size = len(concatenated(answer))
    alone = tokenization.question_ids(prompt, 1, room=size, history=history, user=USER)
    assert alone.tolist() == concatenated(question)
    assert row.ids.tolist() == concatenated(question) + concatenated(answer)
    assert row.labels.tolist() == [IGNORE] * len(concatenated(question)) + concatenated(answer)
    ends = [span.kind for span in answer]
    if "identifier" in ends:
        assert concatenated(answer) == tokenization.identifier(1).tolist()
    else:
        assert ends == ["data", "frame"]
        assert answer[0].text == {"click": "yes", "rating": "4"}.get(prompt.name, TITLES[1])
        assert tokenization.answer_ids(prompt, answer[0].text).tolist() == concatenated(answer)
        assert answer[1].ids == tokenization.frame(prompt).after_answer
        assert tokenization.tokenizer.eos_token_id in answer[1].ids


def test_answers_of_events_are_asked_where_their_columns_are_not_empty() -> None:
    events = pl.DataFrame({"timestamp": [1, 2, 3, 4, 5], "rating": [5.0, None, 1.0, 4.0, 5.0]})
    named = {prompt.name: prompt for prompt in SHIPPED}
    assert event_answers(named["click"], events) == ["yes", "", "no", "yes", "yes"]
    assert event_answers(named["rating"], events) == ["5", "", "1", "4", "5"]
    empty = Prompt.parse(
        "{% block user %}{{ item.title }}{% endblock %}"
        "{% block assistant %}{% if event.rating > 4 %} much {{ event.timestamp }} {% endif %}{% endblock %}",
        "empty",
    )
    assert event_answers(empty, events) == ["much 1", "", "", "", "much 5"]
    absent = Prompt.parse(
        "{% block user %}{{ item.title }}{% endblock %}"
        '{% block assistant %}{{ "no" if event.price is defined else "new" }}{% endblock %}',
        "absent",
    )
    assert event_answers(absent, events) == ["new"] * 5


def test_where_a_history_is_cut_does_not_tell_the_answer() -> None:
    prompt = Prompt.parse(
        "{% block user %}{% for past in history %}{{ past.identifier }}{% endfor %}{{ item.identifier }}?{% endblock %}"
        "{% block assistant %}{{ event.word }}{% endblock %}",
        "word",
    )
    tokenization, history = make(next(iter(FAMILIES)), max_length=60), np.tile([2, 5, 1], 30)
    words = ["a", "a rather long answer"]
    room = tokenization.answer_room(prompt, words)
    assert room == len(tokenization.answer_ids(prompt, words[1])) > len(tokenization.answer_ids(prompt, words[0]))
    asked = [
        concatenated(tokenization.question(prompt, 0, history=history, event={"word": word}, room=room)[0])
        for word in words
    ]
    assert asked[0] == asked[1] == tokenization.question_ids(prompt, 0, room=room, history=history).tolist()
    assert len(asked[0]) == 60 - room
    with pytest.raises(PromptError, match=r"prompt word, item 'i0': question and answer take \d+ tokens"):
        tokenization.question(prompt, 0, event={"word": "long " * 40})


@cache
def model(family: str, scheme: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(make(family, scheme=scheme).tokenizer), hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).double().eval()


@every_family
@every_scheme
def test_one_training_forward_scores_what_the_engine_scores(family: str, scheme: str) -> None:
    tokenization, network = make(family, scheme=scheme), model(family, scheme)
    engine = LocalEngine(network)
    history = np.array([1, 0, 3, 4, 2])
    for prompt in [*SEQUENCES, *QUESTIONS]:
        if prompt.kind == "sequence":
            row = tokenization.sequence_row(prompt, history, user=USER)
            starts = identifier_starts(tokenization, prompt, history, len(tokenization.head_ids(prompt, USER)))
            answers = [tokenization.identifier(int(item)) for item in history]
            prompts = [tokenization.sequence(prompt, history[:event], USER) for event in range(len(history))]
        else:
            row = tokenization.question_row(prompt, 2, user=USER, event=EVENT)
            asked, answer = tokenization.question(prompt, 2, user=USER, event=EVENT)
            prompts, answers = [np.array(concatenated(asked))], [np.array(concatenated(answer))]
            starts = np.array([len(prompts[0])])
        with torch.no_grad():
            logits = network(torch.tensor(row.ids[None].astype(np.int64))).logits[0]
        logprobs = logits.log_softmax(-1).numpy()
        trained = np.flatnonzero(row.labels != IGNORE)
        picked = logprobs[trained - 1, row.labels[trained]]
        expected = [
            picked[(trained >= start) & (trained < start + len(answer))].sum()
            for start, answer in zip(starts, answers, strict=True)
        ]
        np.testing.assert_allclose(engine.score(prompts, answers), expected, atol=1e-9)
        np.testing.assert_allclose(sum(expected), picked.sum(), atol=1e-9)


@every_scheme
@pytest.mark.parametrize("prompt", [WITH_TEXT, HEADLESS], ids=lambda prompt: prompt.name)
@settings(max_examples=30)
@given(
    history=st.lists(st.integers(0, len(TITLES) - 1), min_size=1, max_size=25),
    room=st.integers(0, 60),
    first=st.integers(0, 25),
)
def test_windows_are_cut_as_inference_cuts(
    scheme: str, prompt: Prompt, history: list[int], room: int, first: int
) -> None:
    whole = make("byte-level", scheme=scheme)
    longest = whole.fragment_lengths(prompt, np.arange(len(TITLES))).max()
    size = len(whole.head_ids(prompt)) + longest + room + whole.tokens.shape[1]
    tokenization = Tokenization(whole.tokenizer, whole.identifiers, ITEMS, max_length=size)
    budget = tokenization.history_budget(tokenization.head_ids(prompt))
    lengths = tokenization.fragment_lengths(prompt, np.array(history))
    for start, stop, skip in windows(lengths, budget, first):
        row = tokenization.sequence_row(prompt, np.array(history[start:stop]), skip=skip)
        assert len(row.ids) <= size
        ends = np.cumsum(row.labels != IGNORE)
        for event in range(start + skip, stop):
            before = tokenization.sequence(prompt, np.array(history[start:event]))
            assert kept_from(lengths[start:event], budget) == 0
            np.testing.assert_array_equal(row.ids[: len(before)], before)
            assert row.labels[len(before)] == tokenization.identifier(history[event])[0]
            assert ends[len(before) - 1] == whole.lengths[history[start + skip : event]].sum()


def test_the_words_of_the_prompt_stand_in_the_chat_template_of_the_tokenizer() -> None:
    for template in ("template", "default system"):
        tokenization = make("byte-level", template)
        tokenizer = tokenization.tokenizer
        for prompt, messages in (
            (WITH_TEXT, [{"role": "user", "content": "Seen:"}]),
            (WITH_USER, [{"role": "system", "content": "For Wien"}, {"role": "user", "content": "Age 3"}]),
        ):
            spans = tokenization.head(prompt, {"city": "Wien", "age": 3})
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            assert "".join(span.text for span in spans) == text
            assert tokenizer.decode(concatenated(spans)) == text
    assert "Be kind." in tokenizer.decode(tokenization.head_ids(WITH_TEXT))
    assert "Be kind." not in tokenizer.decode(tokenization.head_ids(WITH_USER, USER))


def test_a_template_that_refuses_system_gets_it_in_the_users_message() -> None:
    tokenization = make("byte-level", "refuses system")
    text = tokenization.tokenizer.decode(tokenization.head_ids(WITH_USER, {"city": "Wien", "age": 3}))
    assert text == "[user] For Wien\n\nAge 3<|end|>\n[assistant] "
    tokenizer = new_tokenizer("byte-level")
    tokenizer.chat_template = "{{ raise_exception('broken') }}"
    with pytest.raises(PromptError, match="cannot be rendered: broken"):
        make_frame(tokenizer, system=False)


@pytest.mark.parametrize(
    "template",
    [
        "{% for turn in messages %}{% if turn['role'] != 'system' %}{{ turn['content'] }}{% endif %}{% endfor %}",
        "{% for turn in messages %}{{ turn['content'] }}{{ turn['content'] }}{% endfor %}",
        "{{ messages[0]['content'] }}",
    ],
)  # fmt: skip
def test_a_template_that_drops_or_repeats_a_message_is_refused(template: str) -> None:
    tokenizer = new_tokenizer("byte-level")
    tokenizer.chat_template = template
    with pytest.raises(PromptError, match="drops or repeats"):
        make_frame(tokenizer, system=True)


def test_without_a_template_there_are_begin_end_and_line_breaks() -> None:
    tokenizer = new_tokenizer("byte-level", "no template")
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    assert make_frame(tokenizer, system=False) == Frame([], [begin], line, [end])
    assert make_frame(tokenizer, system=True) == Frame([begin], line, line, [end])
    assert make_frame(new_tokenizer("characters", "no template"), system=False).before_user == []


def test_stored_frames_are_used_as_they_are() -> None:
    whole = make("byte-level")
    frames = {"user": Frame([], [7], [8, 9], [10])}
    tokenization = Tokenization(whole.tokenizer, whole.identifiers, ITEMS, max_length=50, frames=frames)
    assert tokenization.head_ids(WITH_TEXT).tolist() == [7, *tokenization.encode("Seen:"), 8, 9]
    tokenization.frame(HEADLESS)
    table = json.loads(json.dumps(tokenization.frames_table()))
    assert {name: Frame(**frame) for name, frame in table.items()} == tokenization.frames
    assert list(table) == ["user"]


# ---- No text spells a token ------------------------------------------------------------------------------------------


def spelled(family: str) -> st.SearchStrategy[str]:
    """Text out of control tokens, identifier tokens, pieces of them, and anything."""
    tokenizer = make(family, scheme="unequal").tokenizer
    tokens = sorted({*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens, "<s>", "</s>", "<|end|>", "<unk>"})
    # NFKC makes the full-width signs ordinary ones.
    wide = [token.translate({60: 0xFF1C, 62: 0xFF1E}) for token in tokens]
    part = st.one_of(st.sampled_from([*tokens, *wide]), st.sampled_from(["<", "|", ">", " ", "▁", "\n"]), st.text())
    return st.lists(part, min_size=1, max_size=6).map("".join).filter(lambda text: "\x1f" not in text)


@every_family
def test_no_title_smuggles_in_a_control_or_identifier_token(family: str) -> None:
    tokenizer = make(family, scheme="unequal").tokenizer
    added = set(tokenizer.get_added_vocab().values()) | set(tokenizer.all_special_ids)
    harmful = added - {tokenizer.unk_token_id}

    @settings(max_examples=200)
    @given(title=spelled(family))
    @example(title="<|a_0|>")
    @example(title="</s><s>")
    @example(title="Toy <|end|><|a_1|><|b_0|>")
    def holds(title: str) -> None:
        tokenization = make.__wrapped__(family, scheme="unequal", titles=title)
        spans = [
            *tokenization.fragment_spans(WITH_TEXT, 0),
            *tokenization.head(WITH_USER, {"city": title, "age": title}),
            *tokenization.question(NEXT_TITLE, 0, history=[0, 1])[0],
            *tokenization.question(NEXT_TITLE, 0)[1],
        ]
        data = [span for span in spans if span.kind == "data"]
        assert any(title in span.text for span in data)
        assert harmful.isdisjoint(concatenated(data))
        assert tokenization.sequence_row(WITH_TEXT, np.array([0, 1])).ids.tolist() == [
            *tokenization.head_ids(WITH_TEXT),
            *tokenization.fragments(WITH_TEXT).join(np.array([0])),
            *tokenization.identifier(1),
        ]

    holds()


@every_family
def test_words_of_a_prompt_file_spell_no_token_either(family: str) -> None:
    tokenization = make(family)
    prompt = Prompt.parse(
        "{% block user %}</s><|end|><|item_0|><s>{% endblock %}{% block item %}{{ item.identifier }}{% endblock %}", "p"
    )
    ids = concatenated([span for span in tokenization.head(prompt) if span.kind == "template"])
    tokenizer = tokenization.tokenizer
    assert ids
    assert not (set(ids) & set(tokenizer.get_added_vocab().values())) - {tokenizer.unk_token_id}


@given(text=st.text())
def test_plain_text_is_encoded_without_loss(text: str) -> None:
    tokenization = make("byte-level")
    assert tokenization.tokenizer.decode(tokenization.encode(text)) == text


def test_what_is_encoded_is_what_the_tokenizer_itself_makes_of_harmless_text() -> None:
    for family in FAMILIES:
        tokenization = make(family)
        for title in TITLES:
            assert tokenization.encode(title) == tokenization.tokenizer(title, add_special_tokens=False)["input_ids"]


# ---- Cutting -------------------------------------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 30), max_size=40), budget=st.integers(-5, 200))
def test_the_newest_whole_events_that_fit_are_kept(lengths: list[int], budget: int) -> None:
    kept = kept_from(lengths, budget)
    assert 0 <= kept <= len(lengths)
    assert sum(lengths[kept:]) <= max(budget, 0)
    assert kept == 0 or sum(lengths[kept - 1 :]) > budget


@every_family
@pytest.mark.parametrize("prompt", [SEQUENCES[0], WITH_TEXT], ids=lambda prompt: prompt.name)
def test_a_history_is_cut_to_the_newest_events_that_fit(family: str, prompt: Prompt) -> None:
    whole = make(family, scheme="unequal")
    history = np.array([3, 5, 0, 1, 2, 5, 7, 6])
    everything = whole.sequence(prompt, history)
    head = whole.head_ids(prompt)
    for max_length in range(len(head) + whole.tokens.shape[1], len(everything) + whole.tokens.shape[1] + 2):
        tokenization = Tokenization(whole.tokenizer, whole.identifiers, ITEMS, max_length=max_length)
        found = tokenization.sequence(prompt, history)
        assert len(found) + whole.tokens.shape[1] <= max_length
        start = kept_from(whole.fragment_lengths(prompt, history), max_length - len(head) - whole.tokens.shape[1])
        kept = [span.ids for item in history[start:] for span in whole.fragment_spans(prompt, item)]
        expected = np.concatenate([head, *kept])
        np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(found, everything)


@every_family
@pytest.mark.parametrize("prompt", [HEADLESS, WITH_TEXT, WITH_USER], ids=lambda prompt: prompt.name)
def test_sequences_of_many_users_are_those_of_each(family: str, prompt: Prompt) -> None:
    whole = make(family, scheme="unequal")
    longest = len(whole.head_ids(prompt, USER)) + 4 * whole.tokens.shape[1]
    tokenization = Tokenization(whole.tokenizer, whole.identifiers, ITEMS, max_length=longest)
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, len(TITLES), size).astype(np.int32) for size in (0, 1, 2, 3, 50, 5, 0)]
    users = [USER, None, USER, {}, None, USER, None]
    found = tokenization.sequences(prompt, histories, users)
    for history, user, ids in zip(histories, users, found, strict=True):
        head = tokenization.head_ids(prompt, user)
        start = kept_from(tokenization.fragment_lengths(prompt, history), tokenization.history_budget(head))
        expected = [*head, *(token for item in history[start:] for span in whole.fragment_spans(prompt, int(item))
                             for token in span.ids)]  # fmt: skip
        assert ids.tolist() == expected
        assert ids.dtype == np.int32
    assert tokenization.sequences(prompt, [], []) == []


@settings(max_examples=100)
@given(
    table=st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=5), min_size=1, max_size=12),
    asked=st.lists(st.lists(st.integers(0, 11), max_size=8), max_size=6),
)
def test_fragments_are_joined_as_they_are_and_encoded_once(table: list[list[int]], asked: list[list[int]]) -> None:
    encoded: list[int] = []

    def encode(item: int) -> np.ndarray:
        encoded.append(item)
        return np.array(table[item], dtype=np.int32)

    fragments = Fragments(len(table), encode)
    for items in asked:
        chosen = np.array([item % len(table) for item in items], dtype=np.int64)
        assert fragments.lengths(chosen).tolist() == [len(table[item]) for item in chosen]
        found = fragments.join(chosen)
        assert found.dtype == np.int32
        assert found.tolist() == [token for item in chosen for token in table[item]]
    assert len(encoded) == len(set(encoded))


def test_threads_that_share_fragments_read_the_same() -> None:
    rng = np.random.default_rng(0)
    table = [rng.integers(0, 1000, 1 + item % 7).astype(np.int32) for item in range(3000)]
    for _ in range(5):
        fragments = Fragments(len(table), lambda item: table[item].copy())
        asked = [rng.integers(0, len(table), 2000) for _ in range(8)]
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(fragments.join, asked))
        for items, ids in zip(asked, found, strict=True):
            np.testing.assert_array_equal(ids, np.concatenate([table[item] for item in items]))


@every_family
@every_template
def test_an_empty_history_is_the_head_alone(family: str, template: str) -> None:
    tokenization = make(family, template)
    for prompt in SEQUENCES:
        for empty in (np.array([], dtype=np.int32), np.array([])):
            found = tokenization.sequence(prompt, empty, USER)
            assert found.tolist() == concatenated(tokenization.head(prompt, USER))
            assert len(found) > 0
            assert found.dtype == np.int32


def test_a_head_reads_the_user_and_prints_nothing_for_what_is_missing() -> None:
    tokenization = make("byte-level")
    decode = tokenization.tokenizer.decode
    assert "Age 33" in decode(tokenization.head_ids(WITH_USER, USER))
    assert "Age 7" in decode(tokenization.head_ids(WITH_USER, {"age": 7}))
    for nobody in (None, {}, {"age": None}):
        assert "Age<|end|>" in decode(tokenization.head_ids(WITH_USER, nobody))


def test_a_head_that_leaves_no_room_is_refused() -> None:
    whole = make("byte-level", scheme="unequal")
    room = len(whole.head_ids(WITH_TEXT)) + whole.tokens.shape[1]
    fits = Tokenization(whole.tokenizer, whole.identifiers, ITEMS, max_length=room)
    assert fits.sequence(WITH_TEXT, np.array([0, 1])).tolist() == whole.head_ids(WITH_TEXT).tolist()
    tight = Tokenization(whole.tokenizer, whole.identifiers, ITEMS, max_length=room - 1)
    with pytest.raises(PromptError, match=f"with_text: its head takes .* max_length is {room - 1}"):
        tight.sequence(WITH_TEXT, np.array([0, 1]))


@every_family
def test_the_history_of_a_question_is_cut_to_the_budget(family: str) -> None:
    whole = make(family)
    history = [1, 3, 0, 5, 2, 7]
    all_of_it = len(whole.question_row(NEXT_TITLE, 6, history=history).ids)
    least = len(whole.question_row(NEXT_TITLE, 6).ids)
    assert least < all_of_it
    for max_length in range(least, all_of_it + 1, 7):
        tokenization = Tokenization(whole.tokenizer, whole.identifiers, ITEMS, max_length=max_length)
        row = tokenization.question_row(NEXT_TITLE, 6, history=history)
        sizes = [len(whole.question_row(NEXT_TITLE, 6, history=history[start:]).ids) for start in range(7)]
        start = next(start for start, size in enumerate(sizes) if size <= max_length)
        expected = whole.question_row(NEXT_TITLE, 6, history=history[start:])
        np.testing.assert_array_equal(row.ids, expected.ids)
        np.testing.assert_array_equal(row.labels, expected.labels)
    tight = Tokenization(whole.tokenizer, whole.identifiers, ITEMS, max_length=least - 1)
    with pytest.raises(PromptError, match=f"next_title, item 'i6': question and answer take {least} tokens"):
        tight.question(NEXT_TITLE, 6, history=history)


PARTING = Prompt.parse(  # An item that adds nothing between items that do, and text between two events.
    "{% block user %}{% for past in history %}{% if past.title != 'Heat' %}{{ past.title }}"
    "{% if not loop.last %}, {% endif %}{% endif %}{% endfor %}?{% endblock %}"
    "{% block assistant %}{{ item.identifier }}{% endblock %}",
    "parting",
)


@settings(max_examples=150)
@given(
    prompt=st.sampled_from([NEXT_TITLE, PARTING]),
    history=st.lists(st.integers(0, len(ITEMS) - 1), max_size=90),
    room=st.integers(0, 300),
)
def test_the_history_of_a_question_is_as_long_as_trying_every_length_says(
    prompt: Prompt, history: list[int], room: int
) -> None:
    whole = make("byte-level")
    sizes = [whole.question_size(prompt, 6, history[start:]) for start in range(len(history) + 1)]
    assert sizes == sorted(sizes, reverse=True)  # It grows with its history; else there is no one answer.
    tokenization = Tokenization(whole.tokenizer, whole.identifiers, ITEMS, max_length=sizes[-1] + room)
    start = next(start for start, size in enumerate(sizes) if size <= sizes[-1] + room)
    found = tokenization.question_ids(prompt, 6, room=0, history=np.array(history, dtype=np.int32))
    expected = whole.head(prompt, item=whole.item(6), history=[whole.item(event) for event in history[start:]])
    assert found.tolist() == concatenated(expected)


def test_a_question_builds_no_more_of_a_history_than_about_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, built = make("byte-level"), Counter[int]()
    tokenization = Tokenization(whole.tokenizer, whole.identifiers, ITEMS, max_length=400)
    plain = tokenization.item

    def counting(index: int) -> dict[str, Any]:
        built[index] += 1
        return plain(index)

    monkeypatch.setattr(tokenization, "item", counting)
    long = tokenization.question_ids(NEXT_TITLE, 6, room=0, history=np.tile([1, 3, 0, 5, 2, 7], 2000))
    kept = int((long == tokenization.identifier(1)[0]).sum())
    assert 0 < kept < 30
    assert built.total() <= 2 + max(16, 2 * 6 * (kept + 1))


# ---- Identifier tokens -----------------------------------------------------------------------------------------------


@every_family
def test_identifier_tokens_are_new_special_and_added_once(family: str) -> None:
    tokenizer = new_tokenizer(family)
    before = len(tokenizer)
    identifiers = Identifiers("semantic", ITEMS["item_id"].to_list(), IDENTIFIERS["semantic"])
    for _ in range(2):
        add_identifier_tokens(tokenizer, identifiers)
        ids = tokenizer.convert_tokens_to_ids(identifiers.vocabulary)
        assert ids == list(range(before, before + len(identifiers.vocabulary)))
        assert len(tokenizer) == before + len(identifiers.vocabulary)
    assert all(tokenizer.added_tokens_decoder[index].special for index in ids)
    assert not any(tokenizer.added_tokens_decoder[index].normalized for index in ids)


def test_a_piece_of_the_base_that_is_spelled_like_an_identifier_is_refused() -> None:
    made = Tokenizer(models.WordLevel({"<unk>": 0, "<|item_1|>": 1}, unk_token="<unk>"))
    tokenizer = FastTokenizer(tokenizer_object=made, unk_token="<unk>")
    with pytest.raises(IdentifierError, match=r"holds '<\|item_1\|>', which names an item"):
        add_identifier_tokens(tokenizer, Identifiers.build("atomic", ["a", "b"]))


def test_identifiers_of_other_items_or_unknown_to_the_tokenizer_are_refused() -> None:
    whole = make("byte-level")
    with pytest.raises(IdentifierError, match="in another order"):
        Tokenization(whole.tokenizer, whole.identifiers, ITEMS.reverse(), max_length=50)
    with pytest.raises(IdentifierError, match=r"does not know the identifier token '<\|item_0\|>'"):
        Tokenization(new_tokenizer("byte-level"), whole.identifiers, ITEMS, max_length=50)


def test_the_table_of_tokens_is_padded() -> None:
    tokenization = make("byte-level", scheme="unequal")
    assert tokenization.lengths.tolist() == [1, 2, 3, 3, 2, 2, 1, 4]
    assert tokenization.tokens.shape == (8, 4)
    for item, tokens in enumerate(IDENTIFIERS["unequal"]):
        row = tokenization.tokens[item]
        assert tokenization.tokenizer.convert_ids_to_tokens(row[row >= 0].tolist()) == list(tokens)
        np.testing.assert_array_equal(tokenization.identifier(item), row[row >= 0])
        assert (row[len(tokens) :] == -1).all()


# ---- Title identifiers -----------------------------------------------------------------------------------------------

LOOK_ALIKES = ["</s>", "<s></s>", "<|end|>", "<|title_end|>", "<|title_1|><|title_end|>", "<unk>", "Toy", "Toy Story"]


def title_tokenization(family: str, template: str = "template", titles: Sequence[str] = TITLES) -> Tokenization:
    tokenizer, items = new_tokenizer(family, template), ITEMS.with_columns(title=pl.Series(titles))
    made = Identifiers.build("title", items["item_id"].to_list(), titles=text_tokens(tokenizer, titles))
    add_identifier_tokens(tokenizer, made)
    return Tokenization(tokenizer, made, items, max_length=2000)


@every_family
@every_template
def test_rows_with_title_identifiers_are_what_is_read(family: str, template: str) -> None:
    for titles in (TITLES, LOOK_ALIKES):
        tokenization = title_tokenization(family, template, titles)
        for prompt in SEQUENCES:
            check_sequence_row(tokenization, prompt, np.array([1, 0, 5, 3, 4, 7, 2, 6, 0]))
    tokenization = title_tokenization(family, template)
    for prompt in QUESTIONS:
        check_question_row(tokenization, prompt)


@every_family
def test_one_training_forward_scores_titles_as_the_engine_does(family: str) -> None:
    tokenization = title_tokenization(family)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenization.tokenizer), hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2, initializer_range=0.3,
    )  # fmt: skip
    network, history = LlamaForCausalLM(config).double().eval(), np.array([1, 0, 3, 4, 2])
    engine, trie = LocalEngine(network), Trie.build(tokenization.tokens)
    for prompt in SEQUENCES:
        row = tokenization.sequence_row(prompt, history, user=USER)
        with torch.no_grad():
            logprobs = network(torch.tensor(row.ids[None].astype(np.int64))).logits[0].log_softmax(-1).numpy()
        trained = np.flatnonzero(row.labels != IGNORE)
        picked = logprobs[trained - 1, row.labels[trained]]
        ends = np.cumsum(tokenization.lengths[history])
        expected = [part.sum() for part in np.split(picked, ends[:-1])]
        asked = [tokenization.sequence(prompt, history[:event], USER) for event in range(len(history))]
        answers = [tokenization.identifier(int(item)) for item in history]
        np.testing.assert_allclose(engine.score(asked, answers), expected, atol=1e-9)
        # Decoding through the trie of unequal depth gives the same number, for every item.
        found = engine.beam_search(asked, trie, len(ITEMS))
        for event, item in enumerate(history):
            place = int(np.flatnonzero(found.items[event] == item)[0])
            np.testing.assert_allclose(found.scores[event, place], expected[event], rtol=1e-6)


@every_family
def test_title_identifiers_add_their_terminator_and_numbers_alone(family: str) -> None:
    tokenizer = new_tokenizer(family)
    before = tokenizer.get_vocab()
    tokenization = title_tokenization(family, titles=["Toy", "Toy", "", "", "Toy Story", "Toy", "红楼梦", "🙂"])
    vocabulary = tokenization.tokenizer.get_vocab()
    new = ["<|title_end|>", "<|title_1|>", "<|title_2|>"]
    assert tokenization.identifiers.vocabulary == new
    assert vocabulary.keys() - before.keys() == set(new)
    assert [vocabulary[token] for token in new] == list(range(len(before), len(before) + 3))
    title = tokenization.encode("Toy")
    assert tokenization.identifier(0).tolist() == [*title, vocabulary[new[0]]]
    assert tokenization.identifier(1).tolist() == [*title, vocabulary[new[1]], vocabulary[new[0]]]
    assert tokenization.identifier(2).tolist() == [vocabulary[new[0]]]
    span = tokenization.fragment_spans(HEADLESS, 1)[0]
    assert (span.kind, span.ids) == ("identifier", tokenization.identifier(1).tolist())
    assert span.text.replace(" ", "") == "Toy<|title_1|><|title_end|>"
    # Ordinary pieces of titles stay ordinary in text.
    assert tokenization.encode("Toy Story") == title_tokenization(family).encode("Toy Story")
    assert tokenization.identifier(4).tolist()[:-1] == tokenization.encode("Toy Story")


@every_family
def test_any_titles_make_a_prefix_free_bijection_and_hold_no_control_token(family: str) -> None:
    tokenizer = new_tokenizer(family)
    control = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids} - {tokenizer.unk_token_id}
    texts = spelled(family) | st.sampled_from([*TITLES, *LOOK_ALIKES, "红楼", "红楼梦", "🙂🙃", "T" * 400, " ", "\n"])

    @settings(max_examples=100)
    @given(st.lists(texts, min_size=len(ITEMS), max_size=len(ITEMS)))
    def holds(titles: list[str]) -> None:
        titles = [*titles[:-1], titles[0]]
        tokenization = title_tokenization(family, titles=titles)
        trie = Trie.build(tokenization.tokens)  # Refuses whatever is no prefix-free bijection.
        assert trie.n_items == len(ITEMS)
        new = set(tokenization.tokenizer.convert_tokens_to_ids(tokenization.identifiers.vocabulary))
        for item, title in enumerate(titles):
            ids = tokenization.identifier(item).tolist()
            kept = tokenization.encode(title)[:LONGEST_TITLE]
            assert ids[: len(kept)] == kept
            assert set(ids[len(kept) :]) <= new
            assert control.isdisjoint(ids)

    holds()


def test_title_identifiers_of_another_tokenizer_are_refused() -> None:
    tokenization, tokenizer = title_tokenization("byte-level"), new_tokenizer("characters")
    add_identifier_tokens(tokenizer, tokenization.identifiers)
    with pytest.raises(IdentifierError, match=r"does not know the identifier token .* made for another"):
        Tokenization(tokenizer, tokenization.identifiers, tokenization.items, max_length=50)
    ids = ITEMS["item_id"].to_list()
    forged = Identifiers("title", ids, [("</s>", f"<|title_{n}|>", "<|title_end|>") for n in range(len(ids))])
    tokenizer = new_tokenizer("unigram")
    add_identifier_tokens(tokenizer, forged)
    with pytest.raises(IdentifierError, match="control token '</s>' stands in an identifier"):
        Tokenization(tokenizer, forged, ITEMS, max_length=50)


TOLD = Prompt.parse(
    "{% block user %}{{ context.query | default('anything') }} at {{ context.hour }}{% endblock %}"
    "{% block item %}{{ item.identifier }}{{ item.title }}{% endblock %}",
    "told",
)


@pytest.mark.parametrize("scheme", ["atomic", "semantic"])
def test_a_head_reads_the_context_of_the_choice(scheme: str) -> None:
    tokenization = make("byte-level", scheme=scheme)
    decode, contexts = tokenization.tokenizer.decode, [{"query": "tea <|end|>", "hour": 18}, None, {"hour": 7}]
    histories = [np.array([0, 1, 2]), np.array([3]), np.array([], dtype=np.int64)]
    found = tokenization.sequences(TOLD, histories, [None] * 3, contexts)
    for history, context, ids in zip(histories, contexts, found, strict=True):
        head = tokenization.head_ids(TOLD, None, context)
        assert ids[: len(head)].tolist() == head.tolist()
        np.testing.assert_array_equal(ids, tokenization.sequence(TOLD, history, None, context))
    assert ["tea" in decode(ids) for ids in found] == [True, False, False]
    assert ["anything at" in decode(ids) for ids in found] == [False, True, True]
    row = tokenization.sequence_row(TOLD, np.array([0, 1, 2, 4]), context=contexts[0], skip=3)
    assert row.ids[: len(found[0])].tolist() == found[0].tolist()
    np.testing.assert_array_equal(np.flatnonzero(row.labels != IGNORE), np.arange(len(found[0]), len(row.ids)))
    asking = Prompt.parse(
        "{% block user %}{{ context.query }}? {{ item.title }}{% endblock %}"
        "{% block assistant %}{{ event.word }}{% endblock %}",
        "asking",
    )
    asked = tokenization.question_ids(asking, 0, room=9, context={"query": "Kanne"})
    assert "Kanne? Toy Story" in decode(asked)
    made = tokenization.question_row(asking, 0, context={"query": "Kanne"}, event={"word": "yes"}, room=9)
    assert made.ids[: len(asked)].tolist() == asked.tolist()
