"""Strings to token ids, the only place: frames, heads, item fragments, sequence prompts, questions, training rows.

What comes from data, what comes from a prompt file and what is an identifier are encoded apart, so that no text can
spell a control or identifier token, and what is trained is token for token what is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from genrec.errors import IdentifierError, PromptError
from genrec.identifiers import Identifiers
from genrec.prompts import ItemRef, Prompt, Segment

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

IGNORE = -100  # The label of a token that carries no loss.
_SYSTEM, _USER, _ANSWER = "\ue000system\ue001", "\ue000user\ue001", "\ue000answer\ue001"


@dataclass(frozen=True)
class Frame:
    """Token ids of the chat template around the blocks of a prompt, as rendered once.

    A prompt reads ``before_system``, system, ``before_user``, user, ``before_answer``, answer, ``after_answer``.
    ``before_user`` follows the system block directly; a prompt without one has an empty ``before_system``.
    """

    before_system: list[int]
    before_user: list[int]
    before_answer: list[int]
    after_answer: list[int]


@dataclass(frozen=True)
class Span:
    """A run of tokens of one origin (``frame``, ``template``, ``data``, ``identifier``) and the text it stands for."""

    kind: str
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Row:
    """One training row. ``labels`` is ``ids`` where there is loss and ``IGNORE`` elsewhere; both int32 [tokens].

    ``weights`` float32 [tokens] multiply the loss of each label; None: all are 1.
    """

    ids: np.ndarray
    labels: np.ndarray
    weights: np.ndarray | None = None


def plain_tokenizer(tokenizer: PreTrainedTokenizerFast) -> Tokenizer:
    """A copy of the tokenizer's backend that knows no added token, truncates and pads nothing, adds no begin or end.

    What it encodes is text and nothing else, whatever the text spells.
    """
    from tokenizers import Tokenizer

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(backend))


def _control(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Token ids that no text may hold: control tokens, and identifier tokens that were added."""
    added = {index for token, index in tokenizer.get_added_vocab().items()}
    return (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}


def text_encoder(tokenizer: PreTrainedTokenizerFast) -> Callable[[str], list[int]]:
    """What encodes plain text: never into a control or identifier token, whatever the text spells."""
    plain, control = plain_tokenizer(tokenizer), _control(tokenizer)

    def encode(text: str) -> list[int]:
        ids = plain.encode(text, add_special_tokens=False).ids
        if control.isdisjoint(ids):
            return list(ids)
        # A vocabulary that holds its control tokens as ordinary pieces (SentencePiece does) finds them in text.
        single = (plain.encode(character, add_special_tokens=False).ids for character in text)
        return [index for ids in single for index in ids if index not in control]

    return encode


def text_tokens(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> list[list[str]]:
    """Plain texts as tokens, spelled as in the vocabulary: what the scheme "title" makes identifiers from."""
    encode = text_encoder(tokenizer)
    return [tokenizer.convert_ids_to_tokens(encode(text)) for text in texts]


def add_identifier_tokens(tokenizer: PreTrainedTokenizerFast, identifiers: Identifiers) -> None:
    """Add the identifiers' new tokens to ``tokenizer``, special and not normalised; those that it has already stay.

    Raises:
        IdentifierError: A token of the base's own vocabulary is spelled like an identifier token.
    """
    from tokenizers import AddedToken

    known = tokenizer.get_added_vocab()
    own = set(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False))
    clash = next((token for token in identifiers.vocabulary if token in own and token not in known), None)
    if clash is not None:
        raise IdentifierError(f"the base's own vocabulary holds {clash!r}, which names an item here. Rename the token.")
    new = [token for token in identifiers.vocabulary if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new], special_tokens=True)


def make_frame(tokenizer: PreTrainedTokenizerFast, *, system: bool) -> Frame:
    """Render the tokenizer's chat template around placeholders and encode what stands between them.

    A template that refuses the system role gets the system block at the beginning of the user's message. A tokenizer
    without a chat template gets its begin token (if it has one) and line breaks.

    Raises:
        PromptError: The chat template cannot be rendered, or drops or repeats a message.
    """

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    if tokenizer.chat_template is None:
        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        return Frame(begin if system else [], encode("\n") if system else begin, encode("\n"), end)

    def render(messages: list[dict[str, str]], header: bool) -> str:
        try:
            return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header))
        except Exception as error:  # Templates raise jinja2's TemplateError, or whatever their author chose.
            raise PromptError(f"the base's chat template cannot be rendered: {error}") from error

    asked = [{"role": "system", "content": _SYSTEM}] if system else []
    asked = [*asked, {"role": "user", "content": _USER}]
    try:
        text = render(asked, True)
    except PromptError:
        if not system:
            raise
        asked = [{"role": "user", "content": f"{_SYSTEM}\n\n{_USER}"}]
        text = render(asked, True)
    closed = render([*asked, {"role": "assistant", "content": _ANSWER}], False)
    marks = [_SYSTEM, _USER] if system else [_USER]
    if any(text.count(mark) != 1 for mark in marks) or closed.count(_ANSWER) != 1:
        raise PromptError("the base's chat template drops or repeats a message, so no prompt can be built on it.")
    before_system = ""
    if system:
        before_system, text = text.split(_SYSTEM)
    before_user, before_answer = text.split(_USER)
    after_answer = closed.split(_ANSWER)[1]
    return Frame(*(encode(part) for part in (before_system, before_user, before_answer, after_answer)))


def kept_from(lengths: Sequence[int] | np.ndarray, budget: int) -> int:
    """Index of the oldest event that is kept when events of these token ``lengths`` are cut to ``budget`` tokens.

    Whole events only, oldest cut first; ``len(lengths)`` where not even the newest fits.
    """
    total = np.cumsum(np.asarray(lengths, dtype=np.int64)[::-1])
    return len(total) - int(np.searchsorted(total, budget, side="right"))


class Fragments:
    """Token ids of items one after another in a table, each encoded when it is first asked for; any thread may ask.

    Args:
        n_items: Of the catalogue.
        encode: Item index -> its token ids, int32, at least one.
    """

    def __init__(self, n_items: int, encode: Callable[[int], np.ndarray]) -> None:
        self._encode = encode
        self._length = np.full(n_items, -1, dtype=np.int64)
        self._begin = np.zeros(n_items, dtype=np.int64)
        self._ids = np.empty(0, dtype=np.int32)
        self._end = 0
        self._lock = Lock()

    def lengths(self, items: np.ndarray) -> np.ndarray:
        """int64 [n]: tokens of each of ``items``."""
        found = self._length[items]
        if len(found) and found.min() < 0:
            for item in np.unique(np.asarray(items)[found < 0]).tolist():
                self._add(item)
            found = self._length[items]
        return found

    def join(self, items: np.ndarray) -> np.ndarray:
        """int32: the token ids of ``items``, in their order."""
        lengths = self.lengths(items)
        ends = np.cumsum(lengths)
        places = np.repeat(self._begin[items] - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
        return self._ids[places]

    def _add(self, item: int) -> None:
        ids = self._encode(item)
        with self._lock:
            if self._length[item] >= 0:
                return
            end = self._end + len(ids)
            if end > len(self._ids):
                grown = np.empty(max(2 * len(self._ids), end), dtype=np.int32)
                grown[: self._end] = self._ids[: self._end]
                self._ids = grown
            self._ids[self._end : end] = ids
            self._begin[item], self._end = self._end, end
            self._length[item] = len(ids)  # Last: who sees it may read the rest.


class Tokenization:
    """A tokenizer with identifier tokens, and a catalogue: what turns histories and items into token ids.

    Args:
        tokenizer: With the identifier tokens added (``add_identifier_tokens``).
        identifiers: The identifiers of the items of ``items``, in the same order.
        items: The catalogue; its columns are what prompts may read.
        max_length: Tokens of a prompt together with its answer, at most.
        frames: Stored frames, ``system`` for prompts with that block and ``user`` for those without; a frame that is
            not in it is rendered when it is first needed.

    Attributes:
        tokens: int32 [items, longest identifier], token ids of each item's identifier, padded with -1.
        lengths: int32 [items], tokens of each identifier.
        encode: Plain text -> token ids: never a control or identifier token, whatever the text spells.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        identifiers: Identifiers,
        items: pl.DataFrame,
        *,
        max_length: int,
        frames: Mapping[str, Frame] | None = None,
    ) -> None:
        if list(identifiers.item_ids) != items["item_id"].to_list():
            raise IdentifierError("identifiers and catalogue list different items, or the same in another order.")
        self.tokenizer = tokenizer
        self.identifiers = identifiers
        self.items = items
        self.max_length = max_length
        self.frames: dict[str, Frame] = dict(frames or {})
        vocabulary = tokenizer.get_vocab()
        used = dict.fromkeys(token for tokens in identifiers.tokens for token in tokens)
        missing = next((token for token in used if token not in vocabulary), None)
        if missing is not None:
            raise IdentifierError(
                f"the tokenizer does not know the identifier token {missing!r}: the identifiers were made for another."
            )
        control = _control(tokenizer)
        borrowed = used.keys() - set(identifiers.vocabulary)
        wrong = next((token for token in sorted(borrowed) if vocabulary[token] in control), None)
        if wrong is not None:
            raise IdentifierError(f"the control token {wrong!r} stands in an identifier. Make the identifiers again.")
        self.lengths = np.array([len(tokens) for tokens in identifiers.tokens], dtype=np.int32)
        self.tokens = np.full((len(items), int(self.lengths.max(initial=1))), -1, dtype=np.int32)
        for index, tokens in enumerate(identifiers.tokens):
            self.tokens[index, : len(tokens)] = [vocabulary[token] for token in tokens]
        self.encode = text_encoder(tokenizer)
        self._fragments: dict[str, Fragments] = {}
        self._heads: dict[str, np.ndarray] = {}
        self._named: dict[int, Span] = {}

    def identifier(self, item: int) -> np.ndarray:
        """int32 token ids of one item's identifier."""
        return self.tokens[item, : self.lengths[item]]

    def frame(self, prompt: Prompt) -> Frame:
        """The frame of a prompt: the stored one, or rendered now and kept. Only its first block matters."""
        first = "system" if "system" in prompt.blocks else "user"
        if first not in self.frames:
            self.frames[first] = make_frame(self.tokenizer, system=first == "system")
        return self.frames[first]

    def frames_table(self) -> dict[str, dict[str, list[int]]]:
        """All frames rendered so far as plain lists, for ``frames.json``."""
        return {name: asdict(frame) for name, frame in sorted(self.frames.items())}

    def item(self, index: int) -> dict[str, Any]:
        """What a prompt may read of an item: its columns, and ``identifier``."""
        return {**self.items.row(index, named=True), "identifier": ItemRef(index)}

    def _spans(self, segments: Sequence[Segment]) -> list[Span]:
        spans = []
        for segment in segments:
            if segment.kind == "identifier":
                if segment.item not in self._named:
                    ids = self.identifier(segment.item).tolist()
                    self._named[segment.item] = Span("identifier", self.tokenizer.decode(ids), ids)
                spans.append(self._named[segment.item])
            else:
                spans.append(Span(segment.kind, segment.text, self.encode(segment.text)))
        return spans

    def _block(self, prompt: Prompt, block: str, variables: Mapping[str, Any]) -> list[Span]:
        return self._spans(prompt.render(block, **variables)) if block in prompt.blocks else []

    def _frame_span(self, ids: list[int]) -> list[Span]:
        return [Span("frame", self.tokenizer.decode(ids), ids)] if ids else []

    def head(
        self,
        prompt: Prompt,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        **variables: Any,
    ) -> list[Span]:
        """Everything before the history or the answer: frame, system and user blocks, up to the assistant's header.

        Columns of ``user`` and of ``context`` that the prompt reads and that are not given are None, which a prompt
        renders as no text.
        """
        frame = self.frame(prompt)
        variables["user"] = dict.fromkeys(prompt.reads["user"]) | dict(user or {})
        variables["context"] = dict.fromkeys(prompt.reads["context"]) | dict(context or {})
        return [
            *self._frame_span(frame.before_system),
            *self._block(prompt, "system", variables),
            *self._frame_span(frame.before_user),
            *self._block(prompt, "user", variables),
            *self._frame_span(frame.before_answer),
        ]

    def head_ids(
        self, prompt: Prompt, user: Mapping[str, Any] | None = None, context: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """int32 token ids of the head of a sequence prompt, encoded once where it reads neither user nor context.

        Raises:
            PromptError: The head leaves no room for an identifier.
        """
        fixed = not (prompt.reads["user"] or prompt.reads["context"])
        if fixed and prompt.hash in self._heads:
            return self._heads[prompt.hash]
        ids = _ids(self.head(prompt, user, context))
        if len(ids) + self.tokens.shape[1] > self.max_length:
            raise PromptError(
                f"prompt {prompt.name}: its head takes {len(ids)} tokens, and max_length is {self.max_length}, which "
                "leaves no room for an item. Shorten the head or raise max_length."
            )
        if fixed:
            self._heads[prompt.hash] = ids
        return ids

    def fragment_spans(self, prompt: Prompt, item: int) -> list[Span]:
        """One event of a sequence prompt: the item's identifier, then whatever its block ``item`` adds."""
        return self._spans(prompt.render("item", item=self.item(item)))

    def fragments(self, prompt: Prompt) -> Fragments:
        """The events of a sequence prompt as token ids, each item encoded once."""
        found = self._fragments.get(prompt.hash)
        if found is None:
            made = Fragments(len(self.items), lambda item: _ids(self.fragment_spans(prompt, item)))
            found = self._fragments.setdefault(prompt.hash, made)
        return found

    def fragment_lengths(self, prompt: Prompt, history: np.ndarray) -> np.ndarray:
        """int64 [events]: tokens of each event of a history."""
        return self.fragments(prompt).lengths(history)

    def history_budget(self, head: np.ndarray) -> int:
        """Tokens left for the history between a head and the longest identifier."""
        return self.max_length - len(head) - self.tokens.shape[1]

    def sequence(
        self,
        prompt: Prompt,
        history: np.ndarray,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """The inference prompt of a sequence prompt: head, then as much of the newest history as fits. int32 [tokens].

        Args:
            prompt: A sequence prompt.
            history: int [events], item indices, oldest first; may be empty.
            user: Columns of the users table that the head may read.
            context: What is known of the choice that is to be predicted (query, hour, ...), which the head may read.
        """
        return self.sequences(prompt, [history], [user], [context])[0]

    def sequences(
        self,
        prompt: Prompt,
        histories: Sequence[np.ndarray],
        users: Sequence[Mapping[str, Any] | None],
        contexts: Sequence[Mapping[str, Any] | None] | None = None,
    ) -> list[np.ndarray]:
        """``sequence`` of many users; what is done for each of them alone is little."""
        told: Sequence[Mapping[str, Any] | None] = [None] * len(users) if contexts is None else contexts
        heads = [self.head_ids(prompt, user, context) for user, context in zip(users, told, strict=True)]
        budgets = np.array([self.history_budget(head) for head in heads], dtype=np.int64)
        # An event has a token at least; spares looking at the rest.
        newest = [history[-max(budget, 1) :] for history, budget in zip(histories, budgets.tolist(), strict=True)]
        counts = np.array([len(history) for history in newest], dtype=np.int64)
        items = np.concatenate([np.empty(0, dtype=np.int64), *newest]).astype(np.int64)
        fragments, owner = self.fragments(prompt), np.repeat(np.arange(len(counts)), counts)
        lengths = fragments.lengths(items)
        begins = np.concatenate([[0], np.cumsum(lengths)])
        # As ``kept_from``: an event stays where it and all after it fit.
        kept = begins[np.cumsum(counts)][owner] - begins[:-1] <= budgets[owner]
        ids = fragments.join(items[kept])
        sizes = np.bincount(owner[kept], weights=lengths[kept], minlength=len(counts)).astype(np.int64)
        ends = np.cumsum(sizes)
        bounds = zip(heads, (ends - sizes).tolist(), ends.tolist(), strict=True)
        return [np.concatenate([head, ids[begin:end]]) for head, begin, end in bounds]

    def sequence_row(
        self,
        prompt: Prompt,
        window: np.ndarray,
        *,
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        skip: int = 0,
        weights: np.ndarray | None = None,
    ) -> Row:
        """The training row of a sequence prompt: the loss lies on every identifier from event ``skip`` on.

        The row before the identifier of event j is the inference prompt of the events before j, where the head is the
        same for all of them: ``context`` is that of the last event. The last event is its identifier alone, since
        nothing after it is predicted. ``weights`` are those of the events.
        """
        events = np.asarray(window, dtype=np.int64)
        fragments, before = self.fragments(prompt), events[:-1]
        head, last = self.head_ids(prompt, user, context), self.identifier(int(events[-1]))
        sizes = np.concatenate([[len(head)], fragments.lengths(before), [len(last)]])
        ids = np.concatenate([head, fragments.join(before), last]).astype(np.int32)
        # An event begins with its identifier, of which every token is trained.
        begin, width = np.cumsum(sizes)[:-1][skip:], self.lengths[events[skip:]]
        trained = np.repeat(begin - np.cumsum(width) + width, width) + np.arange(width.sum())
        labels = np.full(len(ids), IGNORE, dtype=np.int32)
        labels[trained] = ids[trained]
        spread = None if weights is None else np.repeat(np.concatenate([[1], weights]), sizes).astype(np.float32)
        return Row(ids, labels, spread)

    def question(
        self,
        prompt: Prompt,
        item: int,
        *,
        history: Sequence[int] | np.ndarray = (),
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        event: Mapping[str, Any] | None = None,
        room: int = 0,
    ) -> tuple[list[Span], list[Span]]:
        """Spans of a question prompt: everything up to the assistant's header, and the answer.

        The oldest events of the history are left out, whole, until question and answer fit ``max_length``. An answer
        that is not one whole identifier ends with the chat template's end of turn, which the model learns to write
        too; an identifier ends by itself.

        Args:
            prompt: A question prompt.
            item: Index of the item that the question is about, or that came next.
            history: int [events], item indices, oldest first.
            user: Columns of the users table that the prompt may read.
            context: What is known of the choice of ``item`` before it is made (query, hour, ...).
            event: What the log says of the interaction with ``item``: columns that the answer may read.
            room: Tokens left for the answer, at least: the longest of all, so that where the history is cut does not
                tell a short answer from a long one.

        Raises:
            PromptError: Question and answer are longer than ``max_length`` even without a history.
        """
        answer = self._block(prompt, "assistant", {"item": self.item(item), "event": dict(event or {})})
        if prompt.subject == "event":  # Encoded in one piece, so that its text alone says which tokens it has.
            answer = self._spans([Segment("data", "".join(span.text for span in answer))])
        if [span.kind for span in answer] != ["identifier"]:
            answer = [*answer, *self._frame_span(self.frame(prompt).after_answer)]
        return self._asked(prompt, item, history, user, context, max(room, _size(answer))), answer

    def question_ids(
        self,
        prompt: Prompt,
        item: int,
        *,
        room: int,
        history: Sequence[int] | np.ndarray = (),
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
    ) -> np.ndarray:
        """int32 token ids of a question alone, up to the assistant's header. Arguments and errors of ``question``."""
        return _ids(self._asked(prompt, item, history, user, context, room))

    def question_size(self, prompt: Prompt, item: int, history: Sequence[int] | np.ndarray) -> int:
        """Tokens of a question with the whole of a history, fitting or not; without columns of a user or a context."""
        events = [self.item(int(event)) for event in history]
        return _size(self.head(prompt, item=self.item(item), history=events))

    def _asked(
        self,
        prompt: Prompt,
        item: int,
        history: Sequence[int] | np.ndarray,
        user: Mapping[str, Any] | None,
        context: Mapping[str, Any] | None,
        room: int,
    ) -> list[Span]:
        """Everything up to the assistant's header, with the newest events that leave ``room`` tokens for the answer."""
        about, budget = self.item(item), self.max_length - room
        if prompt.subject == "item":
            question = self.head(prompt, user, context, item=about)
        else:
            question = []
            newest: list[dict[str, Any]] = []  # Oldest first, as far as looked at.
            # The question grows with its history, so the most events that fit are found by doubling, then bisection,
            # which looks at not much more than fits.
            kept, above = 0, len(history) + 1
            while above - kept > 1:
                middle = (kept + above) // 2 if above <= len(history) else min(max(2 * kept, 16), len(history))
                unseen = history[len(history) - middle : len(history) - len(newest)]
                newest = [*(self.item(int(event)) for event in unseen), *newest]
                asked = self.head(prompt, user, context, item=about, history=newest[len(newest) - middle :])
                if _size(asked) <= budget:
                    question, kept = asked, middle
                else:
                    above = middle
            if kept == 0:
                question = self.head(prompt, user, context, item=about, history=[])
        if _size(question) > budget:
            raise PromptError(
                f"prompt {prompt.name}, item {about['item_id']!r}: question and answer take "
                f"{_size(question) + room} tokens, and max_length is {self.max_length}. Raise max_length, or "
                "shorten the text: {{ item.title | truncate(200) }}."
            )
        return question

    def answer_ids(self, prompt: Prompt, text: str) -> np.ndarray:
        """int32 token ids of an answer that is plain text, as it is trained: with the end of turn."""
        return np.array([*self.encode(text), *self.frame(prompt).after_answer], dtype=np.int32)

    def answer_room(self, prompt: Prompt, texts: Iterable[str]) -> int:
        """Tokens of the longest of the answers ``texts``: ``room`` of ``question``."""
        return max((len(self.answer_ids(prompt, text)) for text in set(texts)), default=0)

    def question_row(
        self,
        prompt: Prompt,
        item: int,
        *,
        history: Sequence[int] | np.ndarray = (),
        user: Mapping[str, Any] | None = None,
        context: Mapping[str, Any] | None = None,
        event: Mapping[str, Any] | None = None,
        room: int = 0,
    ) -> Row:
        """The training row of a question prompt: the loss lies on the answer. Arguments and errors of ``question``."""
        question, answer = self.question(
            prompt, item, history=history, user=user, context=context, event=event, room=room
        )
        asked, answered = _ids(question), _ids(answer)
        labels = np.concatenate([np.full(len(asked), IGNORE, dtype=np.int32), answered])
        return Row(np.concatenate([asked, answered]), labels)


def event_answers(prompt: Prompt, events: pl.DataFrame) -> list[str]:
    """The answer of a question about each of ``events``, as text; "" where it is not asked.

    It is not asked where a column that the answer reads is empty, or where the answer is.
    """
    reads = [column for column in events.columns if column in prompt.reads["event"]]
    told: dict[tuple[Any, ...], str] = {}
    answers = []
    for values in events.select(reads).iter_rows() if reads else [()] * events.height:
        if values not in told:
            row = dict(zip(reads, values, strict=True))
            asked = not any(value is None for value in values)
            told[values] = "".join(part.text for part in prompt.render("assistant", event=row)) if asked else ""
        answers.append(told[values])
    return answers


def _size(spans: Sequence[Span]) -> int:
    return sum(len(span.ids) for span in spans)


def _ids(spans: Sequence[Span]) -> np.ndarray:
    return np.array([index for span in spans for index in span.ids], dtype=np.int32)
