"""The Python API: an adapter, an engine, and histories in; items with titles and scores out."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
import polars as pl

from genrec import recommendations, tables
from genrec.adapter import Adapter
from genrec.asking import History, Row, Rows, beams_for, counted, histories_of, listed, one_each, read_frame
from genrec.config import VllmOptions
from genrec.dataset import Dataset
from genrec.decoding import Beams, Bools, Ints, Trie, check_request
from genrec.engines import Engine
from genrec.errors import AdapterError, ConfigError, UnknownIdError, closest
from genrec.loading import EngineName, check_engine, model_engine
from genrec.memory import Memory, dtype_of, memory
from genrec.prompts import Prompt, changes
from genrec.recommendations import Recommendation, Recommendations
from genrec.restrictions import predicate
from genrec.tokenization import Tokenization

if TYPE_CHECKING:
    import torch

    from genrec.explanations import Explanation


class Recommender:
    """A loaded adapter that answers. Any number of threads may ask one at once.

    Attributes:
        adapter: What was loaded; its ``prompt`` is the one that is used.
        engine: What runs the model.
        tokenization: What makes prompts.
        trie: The legal identifiers.
        index: Item id -> item index.
        exclude_seen: Whether items of a history are left out of its list, unless a call says otherwise; as the
            data set that the adapter was trained on says.

    Examples:
        >>> rec = Recommender.load("adapters/shop")
        >>> [item.rank for item in rec.recommend(["i3", "i4"], k=3)]
        [1, 2, 3]
        >>> rec.recommend(["i3", "i4"], allowed=["i3", "i5"]).reason  # Seen items are left out, too.
        'the restrictions leave only 1 items'
        >>> len(rec.recommend(user_ids=["u0", "u1"]))
        2
        >>> rec.score(["i3", "i4"], ["i5", "i9"]).shape
        (2,)
        >>> rec.recommend(["i3", "i99"])
        Traceback (most recent call last):
        ...
        genrec.errors.UnknownIdError: item 'i99' is not in the catalogue of adapters/shop. Did you mean 'i9'?
    """

    def __init__(self, adapter: Adapter, engine: Engine, tokenization: Tokenization) -> None:
        self.adapter = adapter
        self.engine = engine
        self.tokenization = tokenization
        self.trie = Trie.build(self.tokenization.tokens)
        self.exclude_seen = adapter.exclude_seen
        self.item_ids = list(adapter.identifiers.item_ids)
        self.index = adapter.identifiers.index
        self.titles = adapter.items["title"].to_list()
        self._own = adapter.prompt  # As trained.
        self._file: Path | None = None  # What ``reload`` reads.
        self._users: tuple[Any, Dataset] | None = None  # The data set asked last, by what it was.
        self._directions: np.ndarray | None = None

    def __repr__(self) -> str:
        trial = ", not as trained" if self.not_as_trained else ""
        return (
            f"Recommender({self.adapter.path}: {self.adapter.tuning}, {counted(len(self.item_ids), 'item', 'items')}, "
            f"prompt {self.adapter.prompt.name}, {type(self.engine).__name__}{trial})"
        )

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        engine: EngineName = "local",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        vllm: VllmOptions | None = None,
        prompt: str | Path | Prompt | None = None,
        untrained: bool = False,
    ) -> Recommender:
        """Load an adapter folder. How much memory that takes is said before the weights are read.

        Args:
            path: The adapter's folder.
            engine: ``local`` runs the model; ``vllm`` has vLLM run it in processes of its own, which ``close`` ends;
                ``dummy`` runs none and returns pseudo-random items, for trying a job.
            device: Where the model runs, as PyTorch names it; vLLM chooses for itself.
            dtype: Of the weights: a dtype of PyTorch or its name, or ``auto``, that in which they were written.
            vllm: How vLLM runs, where it is the engine.
            prompt: Another file of the prompt that the adapter recommends with; see ``with_prompt``.
            untrained: Use ``prompt`` even if the model was trained with another one.

        Raises:
            AdapterError: The folder is no adapter, was changed since training, or its base is missing; or it was
                trained with another prompt.
            ConfigError: An unknown engine, device or dtype, more memory than there is, or vLLM is not installed.
            EngineError: vLLM did not start.
            PromptError: ``prompt`` breaks the contract of prompts.
        """
        check_engine(engine, device)
        from genrec.engines.dummy import DummyEngine

        adapter = Adapter.load(path)
        dtype = dtype_of(adapter, dtype)
        tokenization = adapter.tokenization()
        loaded = cls(adapter, DummyEngine(len(tokenization.tokenizer)), tokenization)
        if prompt is not None:
            loaded = loaded.with_prompt(prompt, untrained=untrained)
        return loaded.with_model(engine=engine, device=device, dtype=dtype, vllm=vllm)

    @classmethod
    def memory(cls, path: str | Path, dtype: str | torch.dtype = "float32") -> Memory:
        """How much memory ``load`` would take. The tables are read for it, and no weights.

        Raises:
            AdapterError, ConfigError: As ``load``.
        """
        loaded = cls.load(path, engine="dummy")
        return memory(loaded.adapter, loaded.tokenization, loaded.trie, dtype_of(loaded.adapter, dtype))

    def with_model(
        self,
        *,
        engine: EngineName = "local",
        device: str | torch.device = "cpu",
        dtype: str | torch.dtype = "float32",
        vllm: VllmOptions | None = None,
    ) -> Recommender:
        """The same, answered by the adapter's model. Arguments and errors as in ``load``."""
        check_engine(engine, device)
        answering = copy(self)
        if engine != "dummy":
            wanted = dtype_of(self.adapter, dtype)
            answering.engine = model_engine(engine, self.adapter, self.tokenization, self.trie, device, wanted, vllm)
            answering._directions = None
        return answering

    def close(self) -> None:
        """End the processes of the engine ``vllm``, once every recommender that shares them is closed.

        Copies made by ``with_prompt`` and ``with_items`` have the same engine, and end with it. Others have nothing to
        end.
        """
        if (close := getattr(self.engine, "close", None)) is not None:
            close()

    def with_items(self, items: pl.DataFrame) -> Recommender:
        """The same with other columns of the items, such as today's titles and stock; ids and their order stay."""
        old = self.tokenization
        tokenization = Tokenization(old.tokenizer, old.identifiers, items, max_length=old.max_length, frames=old.frames)
        changed = copy(self)  # Identifiers, and so the trie, stay.
        changed.adapter, changed.tokenization = replace(self.adapter, items=items), tokenization
        changed.titles = items["title"].to_list()
        return changed

    # Prompts

    @property
    def not_as_trained(self) -> bool:
        """Whether it reads another prompt than the adapter was trained with, so that its lists are but a trial."""
        return self.adapter.prompt.contract != self._own.contract

    def with_prompt(self, prompt: str | Path | Prompt, *, untrained: bool = False) -> Recommender:
        """The same with another prompt to recommend with, on the same model.

        Args:
            prompt: A file or a loaded prompt. One that differs from the adapter's in comments alone is the same.
            untrained: Use it even if the model was trained with another one, for trying what a change would read like;
                ``not_as_trained`` tells.

        Raises:
            AdapterError: The model was trained with another prompt (the message has the difference), or it is no
                sequence prompt, or reads a column that the items lack.
            PromptError: It breaks the contract of prompts.
        """
        changed = copy(self)
        changed.adapter = self._with_prompt(prompt, untrained)
        changed._file = None if isinstance(prompt, Prompt) else Path(prompt)
        return changed

    def reload(self, path: str | Path | None = None, *, untrained: bool = False) -> None:
        """Read the prompt file again, in place: calls that run end with the old prompt, later ones have the new one.

        Args:
            path: The file; unset: the one that ``load``, ``with_prompt`` or ``reload`` was given last.
            untrained: As in ``with_prompt``.

        Raises:
            AdapterError, PromptError: As ``with_prompt``; the old prompt stays.
            ConfigError: No file was named yet.
        """
        file = self._file if path is None else Path(path)
        if file is None:
            raise ConfigError(f"{self.adapter.path} reads its own prompt, and no file was named. Write reload(path).")
        self.adapter, self._file = self._with_prompt(file, untrained), file

    def _with_prompt(self, prompt: str | Path | Prompt, untrained: bool) -> Adapter:
        """The adapter with a prompt in the place of the one that it recommends with."""
        adapter, own = self.adapter, self._own
        where = prompt.name if isinstance(prompt, Prompt) else str(prompt)
        prompt = prompt if isinstance(prompt, Prompt) else Prompt.load(prompt)
        if prompt.kind != own.kind:
            raise AdapterError(
                f"{where} is a {prompt.kind} prompt, and an adapter recommends with a {own.kind} prompt."
            )
        if prompt.contract != own.contract and not untrained:
            name = str(adapter.path / "prompts" / f"{own.name}.jinja")
            told = changes(own, prompt, name, where)
            raise AdapterError(
                f"{where} is not the prompt that {adapter.path} was trained with:\n{told}\n"
                "Leave prompt out to keep the adapter's own, or train again with the changed one: genrec train. "
                "untrained=True (--untrained) tries it all the same."
            )  # fmt: skip
        for problem in prompt.check(item_columns=adapter.items.columns):
            raise AdapterError(f"{where}:{problem}")
        self.tokenization.frame(prompt)  # Now, since making one is nothing for many threads at once.
        first = next(iter(adapter.prompts))
        return replace(adapter, prompts={**adapter.prompts, first: prompt})

    # Items and prompts as the engine takes them

    def indices(self, items: History) -> np.ndarray:
        """Item ids -> int32 item indices.

        Raises:
            ConfigError: Anything but a list of item ids.
            UnknownIdError: An item that the adapter does not know (None and NaN are such), with the closest one.
        """
        items = sorted(items, key=str) if isinstance(items, set | frozenset) else listed(items, "items")
        try:
            return self.adapter.identifiers.indices(items, str(self.adapter.path))
        except TypeError:  # It cannot be hashed.
            wrong = next(item for item in items if not isinstance(item, str))
            raise ConfigError(f"an item id is a text, found {wrong!r}.") from None

    def _prompts(self, histories: Sequence[np.ndarray], users: Rows | None, contexts: Rows | None) -> list[Any]:
        who, told = one_each(users, "users", len(histories)), one_each(contexts, "contexts", len(histories))
        return self.tokenization.sequences(self.adapter.prompt, histories, who, told)

    def search(
        self,
        histories: Sequence[np.ndarray],
        k: int,
        *,
        num_beams: int | None = None,
        exclude_seen: bool | None = None,
        users: Rows | None = None,
        contexts: Rows | None = None,
        allowed: Bools | None = None,
        blocked: Sequence[Ints | None] | None = None,
        only: Sequence[Ints | None] | None = None,
    ) -> Beams:
        """``recommend`` on item indices and arrays: the best ``k`` of each history.

        Restrictions hold within the decoder, so that a list is short only where fewer than ``k`` items are left, and
        they all hold together. Other arguments as in ``recommend``.

        Args:
            allowed: bool [n_items]; the items that may come out in any list.
            blocked: Per history item indices that may not come out, beside those that it holds where seen items are
                left out, or None.
            only: Per history the item indices that alone may come out, or None for all. Histories that are given the
                very same array share the memory of the restriction where nothing else tells them apart.

        Raises:
            ConfigError: ``k`` or ``num_beams`` out of range, or another number of users or contexts than of histories.
            DecodingError: A restriction is not one for each history, or holds something that is no item index.
        """
        beams = beams_for(k, num_beams)
        check_request(len(histories), beams, blocked, only)
        if self.exclude_seen if exclude_seen is None else exclude_seen:
            shut: Sequence[Ints | None] = [None] * len(histories) if blocked is None else blocked
            blocked = [
                history if more is None else np.concatenate([history, more])
                for history, more in zip(histories, shut, strict=True)
            ]
        prompts = self._prompts(histories, users, contexts)
        found = self.engine.beam_search(prompts, self.trie, beams, allowed, blocked, only)
        # A reason is why fewer than ``beams`` came, and told only where fewer than k did.
        full = (found.items[:, :k] >= 0).sum(axis=1) == k
        reasons = [None if enough else reason for enough, reason in zip(full, found.reasons, strict=True)]
        return Beams(found.items[:, :k], found.scores[:, :k], reasons)

    # Lists

    @overload
    def recommend(  # type: ignore[overload-overlap]  # A text is a sequence of texts, too.
        self, histories: str | History, k: int = 10, *, num_beams: int | None = None, exclude_seen: bool | None = None,
        where: str | None = None, allowed: History | None = None, blocked: History | None = None,
        users: Row | Rows | None = None, contexts: Row | Rows | None = None, data: str | Path | Dataset | None = None,
    ) -> Recommendations: ...  # fmt: skip
    @overload
    def recommend(
        self, histories: Sequence[History], k: int = 10, *, num_beams: int | None = None,
        exclude_seen: bool | None = None, where: str | None = None, allowed: History | None = None,
        blocked: History | None = None, users: Rows | None = None, contexts: Rows | None = None,
        data: str | Path | Dataset | None = None,
    ) -> list[Recommendations]: ...  # fmt: skip
    @overload
    def recommend(
        self, histories: None = None, k: int = 10, *, user_ids: History, num_beams: int | None = None,
        exclude_seen: bool | None = None, where: str | None = None, allowed: History | None = None,
        blocked: History | None = None, users: Rows | None = None, contexts: Rows | None = None,
        data: str | Path | Dataset | None = None,
    ) -> list[Recommendations]: ...  # fmt: skip
    def recommend(
        self,
        histories: str | History | Sequence[History] | None = None,
        k: int = 10,
        *,
        user_ids: History | None = None,
        num_beams: int | None = None,
        exclude_seen: bool | None = None,
        where: str | None = None,
        allowed: History | None = None,
        blocked: History | None = None,
        users: Row | Rows | None = None,
        contexts: Row | Rows | None = None,
        data: str | Path | Dataset | None = None,
    ) -> Recommendations | list[Recommendations]:
        """The best ``k`` items for each history, best first; fewer where fewer are allowed.

        Args:
            histories: A list of item ids, oldest first, is one history; a list of such lists is many (``[]`` is none,
                and ``[[]]`` is an empty one, which the prompt's head answers); a text is the id of a user of ``data``.
                None and NaN within a history are unknown items. A set has no order, and is refused.
            k: Items per history.
            user_ids: Users of ``data``, in the place of ``histories``: their whole histories and their columns.
            num_beams: Beams of the search; unset: ``max(50, 2 * k)``. Atomic identifiers are exact with any number.
            exclude_seen: Leave out the items of the history; unset: as the data set says.
            where: Only items for which this holds, an SQL expression over item columns such as ``market = 'DE'``.
            allowed: Only these items.
            blocked: None of these items.
            users: Per history the columns of the users table that the prompt's head may read; of one history a mapping
                does. Those that are not given are those of ``data`` for its users, else empty.
            contexts: The same of what is known of this very choice: ``{"query": "tea", "hour": 18}``.
            data: A data set or its folder; the one that the adapter was trained on where it is not given.

        Returns:
            One list for one history or user, else a list of them. All restrictions hold together, and hold within the
            search: a list is short only where fewer than ``k`` items are left, and then has its ``reason``.

        Raises:
            UnknownIdError: An item or a user that nobody knows.
            ConfigError: ``k`` or ``num_beams`` out of range, a ``where`` that is none, or other arguments amiss.
        """
        one = isinstance(histories, str)
        if (histories is None) == (user_ids is None):
            raise ConfigError("recommend takes histories or user_ids, one of the two. Write recommend([id, id]).")
        given: Sequence[History]
        if histories is None or isinstance(histories, str):
            if isinstance(user_ids, str):
                raise ConfigError(f"user_ids is the text {user_ids!r}. Write recommend({user_ids!r}) for one user.")
            ids = [histories] if user_ids is None else listed(user_ids, "user_ids", "user ids")
            given, users = self._of_data(ids, one_each(users, "users", len(ids)), data)
        else:
            given, one = histories_of(histories)
            if one and not any(isinstance(item, str) and item in self.index for item in given[0]):
                self._refuse_users(given[0])
        asked = [self.indices(history) for history in given]
        masks = self.masks(where, allowed, blocked)
        found = self.search(
            asked, k, num_beams=num_beams, exclude_seen=exclude_seen,
            users=one_each(users, "users", len(given)), contexts=one_each(contexts, "contexts", len(given)),
            allowed=np.logical_and.reduce([*masks.values()]) if masks else None,
        )  # fmt: skip
        lists = [self._list(*told) for told in zip(found.items, found.scores, found.reasons, strict=True)]
        return lists[0] if one else lists

    def _refuse_users(self, history: History) -> None:
        """Refuse a history of nothing but unknown items, which may be users; no data set is read to tell."""
        try:
            self.indices(history)
        except UnknownIdError as error:
            kept = self._users
            users = kept is not None and all(one in kept[1].user_index for one in history)
            hint = f"These are users: write user_ids={list(history)!r}." if users else "Users go in user_ids=[...]."
            raise UnknownIdError(f"{error} {hint}") from None

    def _list(self, items: np.ndarray, scores: np.ndarray, reason: str | None = None) -> Recommendations:
        told = zip(items.tolist(), scores.tolist(), strict=True)
        return Recommendations(
            tuple(
                Recommendation(rank, self.item_ids[item], self.titles[item], float(score))
                for rank, (item, score) in enumerate(told, start=1)
                if item >= 0
            ),
            reason,
        )

    def masks(self, where: str | None, allowed: History | None, blocked: History | None) -> dict[str, Bools]:
        """The items that each restriction of a call lets through, bool [n_items], by its name; none that is not given.

        Arguments and errors as in ``recommend``.
        """
        masks = {} if where is None else {"where": predicate(where, self.adapter.items)}
        if allowed is not None:
            masks["allowed"] = self.among(self.indices(allowed))
        if blocked is not None:
            masks["blocked"] = ~self.among(self.indices(blocked))
        return masks

    def among(self, items: np.ndarray) -> Bools:
        """bool [n_items]: whether an item is one of the item indices ``items``."""
        mask = np.zeros(len(self.item_ids), dtype=bool)
        mask[items] = True
        return mask

    def recommend_frame(
        self,
        frame: Any,
        k: int = 10,
        *,
        num_beams: int | None = None,
        exclude_seen: bool | None = None,
        where: str | None = None,
        allowed: History | None = None,
        blocked: History | None = None,
        data: str | Path | Dataset | None = None,
    ) -> Any:
        """``recommend`` of a data frame.

        Args:
            frame: A Polars, pandas or Arrow table with ``history``, lists of item ids, oldest first (null, of pandas
                None or NaN in the place of a list, is an empty history; within one it is an unknown item); or with
                ``user_id`` alone, for whole histories and columns from ``data``. Other columns are those of the user
                that the prompt's head may read, and ``context``, structs, is what it may read of each choice.
            k, num_beams, exclude_seen, where, allowed, blocked, data: As in ``recommend``, for all rows.

        Returns:
            A table of the same kind (of a lazy one an eager one): ``user_id`` (where there is none ``row``, from 0),
            ``rank``, ``item_id``, ``title``, ``score`` and ``reason`` (why a list is short, or null); a row per item,
            and one without an item for an empty list.

        Raises:
            DataError: A column is missing, or is of another type.
            UnknownIdError, ConfigError: As ``recommend``.
        """
        table, answering = tables.as_polars(frame, "users"), copy(self)  # Of one prompt, whoever reloads.
        ids, given, users, contexts = read_frame(table, answering.adapter.prompt)
        if given is None:
            given, users = self._of_data(ids, users, data)
        lists = answering.recommend(
            given, k, num_beams=num_beams, exclude_seen=exclude_seen, where=where, allowed=allowed,
            blocked=blocked, users=users, contexts=contexts,
        ) if given else []  # fmt: skip
        made = recommendations.frame(lists, ids)
        if isinstance(frame, pl.DataFrame | pl.LazyFrame):
            return made
        return made.to_pandas() if type(frame).__module__.split(".")[0] == "pandas" else made.to_arrow()

    def score(
        self, history: History, items: History, *, user: Row | None = None, context: Row | None = None
    ) -> np.ndarray:
        """float64 [items]: the score that ``recommend`` would give each of ``items`` after ``history``.

        This ranks candidates that somebody else has chosen: the order of the scores is the order of the list.
        """
        asked = self._prompts([self.indices(listed(history, "history"))], [user], [context])[0]
        answers = [self.tokenization.identifier(int(item)) for item in self.indices(listed(items, "items"))]
        return self.engine.score([asked] * len(answers), answers)

    def similar(self, item: str, k: int = 10) -> Recommendations:
        """The ``k`` items most like ``item``, by the cosine of what the model has learnt of them.

        That is the row of an item's identifier token in the model's embedding; of an identifier of several tokens (all
        schemes but ``atomic``) the mean of their rows, so that semantic IDs with common codes are alike by design.

        Raises:
            UnknownIdError: An item that the adapter does not know.
            ConfigError: ``k`` out of range, or an engine without a model.
        """
        beams_for(k, None)
        if not isinstance(item, str):
            raise ConfigError(f"similar takes one item id, a text, found {item!r}. Write similar('id').")
        directions, place = self._item_directions(), int(self.indices([item])[0])
        cosine = directions @ directions[place]
        cosine[place] = -np.inf
        order = np.argsort(-cosine, kind="stable")[: min(k, len(cosine) - 1)]
        others = counted(len(order), "other item", "other items")
        reason = None if len(order) == k else f"the catalogue has only {others}"
        return self._list(order, cosine[order], reason)

    def _item_directions(self) -> np.ndarray:
        """float32 [n_items, width]: unit vectors, made once."""
        if self._directions is None:
            model = getattr(self.engine, "model", None)
            if model is None:
                name = type(self.engine).__name__
                raise ConfigError(f"similar needs a model, and {name} has none. Load with engine='local'.")
            weight, tokens = model.get_input_embeddings().weight.detach(), self.tokenization.tokens
            total = np.zeros((len(tokens), weight.shape[1]), dtype=np.float32)
            for level in range(tokens.shape[1]):
                there = np.flatnonzero(tokens[:, level] >= 0)
                total[there] += weight[tokens[there, level].astype(np.int64)].float().cpu().numpy()
            self._directions = total / np.maximum(np.linalg.norm(total, axis=1, keepdims=True), 1e-12)
        return self._directions

    def prompt(self, history: History, *, user: Row | None = None, context: Row | None = None) -> str:
        """The prompt of a history as the model reads it: its tokens, spelled."""
        asked = self._prompts([self.indices(listed(history, "history"))], [user], [context])[0]
        return str(self.tokenization.tokenizer.decode(asked))

    def why(
        self, history: str | History, item: str, *, data: str | Path | Dataset | None = None, **options: Any
    ) -> Explanation:
        """Why an item is in the list of a history, or is not: see ``genrec.explanations.explain`` for the options.

        Args:
            history: A list of item ids; or, as in ``recommend``, a user of ``data``, with the whole history and the
                columns that the data set has; those that ``user`` tells go before.
            item: The item id asked about.
            data: A data set or its folder; the one that the adapter was trained on where it is not given.
        """
        from genrec.explanations import explain

        if isinstance(history, str):
            (history,), (options["user"],) = self._of_data([history], [options.get("user")], data)
        return explain(copy(self), history, item, **options)  # Of one prompt, whoever reloads.

    # Users of a data set

    def user_history(
        self, user: str, data: str | Path | Dataset | None = None
    ) -> tuple[list[str], dict[str, Any] | None]:
        """The whole history of a user of a data set, and the user's columns.

        Args:
            user: A user id.
            data: A data set or its folder; the one that the adapter was trained on where it is not given.

        Raises:
            UnknownIdError: A user that the data set does not know.
        """
        loaded, name = self._asked_last(data)
        known = loaded.user_index
        if not isinstance(user, Hashable) or user not in known:
            hint = closest(user, known, f"It has {len(known)} users.")
            if isinstance(user, str) and user in self.index:
                hint = f"It is an item: a history is a list, [{user!r}]."
            raise UnknownIdError(f"user {user!r} is not in {name}. {hint}")
        history, row, _ = loaded.of_user(known[user])
        return history, row

    def _of_data(
        self, user_ids: Iterable[Any], users: Rows | None, data: str | Path | Dataset | None
    ) -> tuple[list[History], Rows]:
        """Whole histories and columns of users of a data set; what ``users`` tell goes before what it says."""
        known = [self.user_history(user, data) for user in user_ids]
        told = zip(known, one_each(users, "users", len(known)), strict=True)
        return [history for history, _ in known], [{**(row or {}), **(more or {})} for (_, row), more in told]

    def _asked_last(self, data: str | Path | Dataset | None) -> tuple[Dataset, str]:
        """A data set and its name; the last one that was asked is kept until its folder changes."""
        if isinstance(data, Dataset):
            stamp: Any = data
            name = str(data.manifest.get("name"))
        else:
            folder = self.adapter.data_folder if data is None else Path(data)
            note, name = folder / "manifest.json", str(folder)
            stamp = folder, note.stat().st_mtime_ns if note.is_file() else None
        kept = self._users
        if kept is None or kept[0] != stamp:
            self._users = kept = stamp, data if isinstance(data, Dataset) else Dataset.load(folder)
        return kept[1], name
