"""Item <-> identifier: the token tuple that names one item. Always a prefix-free bijection, whatever the scheme."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import ArrayLike, NDArray
from scipy import sparse

from genrec import semantic_ids
from genrec.errors import ConfigError, IdentifierError, UnknownIdError, closest, suggestion
from genrec.files import new_file, text_hash

Tokens = tuple[str, ...]
Titles = Sequence[Sequence[str]]  # The title of each item as tokens.
Matrix = NDArray[np.floating]

LONGEST_TITLE = 32  # Tokens of a title that an identifier of the scheme "title" keeps.
_TITLE_END = "<|title_end|>"
_TITLE_NUMBERS = [f"<|title_{digit}|>" for digit in range(256)]
_TITLE_OWN = {_TITLE_END, *_TITLE_NUMBERS}


def _atomic(
    taken: list[Tokens], m: int, vectors: Matrix | None, titles: Titles | None, levels: int, codes: int, seed: int
) -> list[Tokens]:
    """One token per item: the most accurate where data is small, and one decoding step."""
    used = {token for tokens in taken for token in tokens}
    free = (token for number in count(len(taken)) if (token := f"<|item_{number}|>") not in used)
    return [(token,) for token in islice(free, m)]


def _semantic(
    taken: list[Tokens], m: int, vectors: Matrix | None, titles: Titles | None, levels: int, codes: int, seed: int
) -> list[Tokens]:
    """Residual k-means codes of the vectors, so that similar items share a prefix; for more items the nearest free."""
    if vectors is None:
        raise ConfigError(
            "semantic identifiers are made from vectors, and none were given. Pass vectors=, or choose "
            'the scheme "atomic" or "random".'
        )
    if not taken:
        return _spell(semantic_ids.codes(vectors, levels=levels, codes=codes, seed=seed))
    n = len(taken)
    return _spell(semantic_ids.extend(_codes(taken), vectors[:n], vectors[n:], codes=codes))


def _random(
    taken: list[Tokens], m: int, vectors: Matrix | None, titles: Titles | None, levels: int, codes: int, seed: int
) -> list[Tokens]:
    """Distinct code tuples drawn uniformly: what semantic identifiers are to be compared with."""
    n, given = len(taken), _codes(taken) if taken else None
    if given is not None:
        levels, codes = given.shape[1], max(codes, int(given.max()) + 1)
    semantic_ids.check_room(n + m, levels, codes)
    powers = codes ** np.arange(levels - 1, -1, -1)
    used = np.empty(0, dtype=np.int64) if given is None else given @ powers
    drawn = np.random.default_rng([seed, n] if n else seed).choice(codes**levels, n + m, replace=False)
    return _spell(drawn[~np.isin(drawn, used)][:m, None] // powers % codes)


def _title(
    taken: list[Tokens], m: int, vectors: Matrix | None, titles: Titles | None, levels: int, codes: int, seed: int
) -> list[Tokens]:
    """The first ``LONGEST_TITLE`` tokens of the title, and a terminator, which no title can spell.

    Items whose titles are equal up to there are numbered in catalogue order: the first has no number, the others have
    theirs before the terminator, in digits of base 256, so that any catalogue needs at most 257 new tokens.
    """
    if titles is None:
        raise ConfigError(
            "title identifiers are spelled in the tokens of a base, and none were given. Set identifiers.scheme = "
            '"title" in a recipe, which names its base, or pass base=.'
        )
    if len(titles) != m:
        raise ConfigError(f"{m} items need as many titles in tokens of the base, found {len(titles)}.")
    return _spell_titles(titles, taken)


def _spell_titles(titles: Titles, taken: Iterable[Tokens]) -> list[Tokens]:
    """An identifier for each title, in order, and none of ``taken``."""
    used, seen = set(taken), Counter[Tokens]()
    result = []
    for title in titles:
        kept = tuple(title[:LONGEST_TITLE])
        if not _TITLE_OWN.isdisjoint(kept):
            own = next(token for token in kept if token in _TITLE_OWN)
            raise IdentifierError(f"the tokenizer makes {own!r} of plain text, which ends titles here.")
        while (tokens := _numbered(kept, seen[kept])) in used:
            seen[kept] += 1
        used.add(tokens)
        result.append(tokens)
    return result


def _numbered(title: Tokens, number: int) -> Tokens:
    digits = []
    while number:
        number, digit = divmod(number, len(_TITLE_NUMBERS))
        digits.append(_TITLE_NUMBERS[digit])
    return (*title, *reversed(digits), _TITLE_END)


# From the identifiers that are there already and the number of new items to those of the new ones; vectors are of all
# items, the old ones first, titles of the new ones. Those that are there stay as they are.
SCHEMES: dict[str, Callable[[list[Tokens], int, Matrix | None, Titles | None, int, int, int], list[Tokens]]] = {
    "atomic": _atomic,
    "semantic": _semantic,
    "title": _title,
    "random": _random,
}
FROM_VECTORS = ("semantic",)  # What may have learnt of interactions through them.


@dataclass(frozen=True)
class Identifiers:
    """The identifiers of a catalogue; item index = position in ``item_ids``.

    Attributes:
        scheme: How they were made.
        item_ids: The user's own item ids, all different.
        tokens: One non-empty tuple per item, all different, none the beginning of another.
        fitted_on: Hash of the training histories behind the vectors that they were made from; empty where they were
            made from no interactions.

    Raises:
        IdentifierError: The above does not hold; two offending items are named.

    Examples:
        >>> made = Identifiers.build("atomic", ["tea-1", "pot-1"])
        >>> made.tokens
        [('<|item_0|>',), ('<|item_1|>',)]
        >>> made.extend(["cup-1"]).tokens[:2] == made.tokens  # Identifiers stay.
        True
        >>> Identifiers.build("random", ["tea-1", "pot-1"], levels=2, codes=4).summary()["items_by_length"]
        {2: 2}
    """

    scheme: str
    item_ids: list[str]
    tokens: list[Tokens]
    fitted_on: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "item_ids", list(self.item_ids))
        object.__setattr__(self, "tokens", [tuple(t) for t in self.tokens])
        if len(self.item_ids) != len(self.tokens):
            raise IdentifierError(
                f"{len(self.item_ids)} items but {len(self.tokens)} identifiers. Every item needs one."
            )
        first: dict[str, int] = {}
        for row, item_id in enumerate(self.item_ids):
            if first.setdefault(item_id, row) != row:
                raise IdentifierError(
                    f"item id {item_id!r} stands at rows {first[item_id]} and {row} of the catalogue. "
                    "Item ids must be all different; remove one of the two rows."
                )
            if not self.tokens[row] or not all(self.tokens[row]):
                raise IdentifierError(
                    f"item {item_id!r} (row {row}) has the identifier {self.tokens[row]!r}. "
                    "An identifier is one or more non-empty tokens."
                )
        # In lexicographic order whatever begins with an identifier follows it directly.
        order = sorted(range(len(self.tokens)), key=self.tokens.__getitem__)
        for a, b in pairwise(order):
            short, long = self.tokens[a], self.tokens[b]
            if long[: len(short)] == short:
                what = "is also that of" if len(short) == len(long) else f"begins that ({''.join(long)}) of"
                raise IdentifierError(
                    f"the identifier {''.join(short)} of item {self.item_ids[a]!r} {what} item "
                    f"{self.item_ids[b]!r}. Identifiers must tell all items apart; build them again."
                )

    @classmethod
    def build(
        cls,
        scheme: str,
        item_ids: Sequence[str],
        vectors: ArrayLike | None = None,
        *,
        titles: Titles | None = None,
        levels: int = 3,
        codes: int = 256,
        seed: int = 0,
        fitted_on: str = "",
    ) -> Identifiers:
        """Make identifiers for a catalogue, by ``extend`` of none. Deterministic under ``seed``.

        Under "atomic" and "title", items that are appended to a catalogue leave the identifiers of the others as they
        are.

        Args:
            scheme: A key of ``SCHEMES``.
            item_ids: n item ids, all different.
            vectors: float [n, d], finite; read by "semantic" alone.
            titles: The title of each item as tokens of the base (``tokenization.text_tokens``); read by "title" alone.
            levels: Codes per identifier of "semantic" and "random".
            codes: Different codes per level; codes ** levels must be at least n.
            seed: Of k-means, or of the drawing.
            fitted_on: Hash of the training histories behind the vectors; kept where they are read.

        Raises:
            ConfigError: Unknown scheme, no vectors or titles where they are needed, or codes ** levels < n.
            IdentifierError: Item ids that repeat.
        """
        return cls(scheme, [], []).extend(
            item_ids, vectors=vectors, titles=titles, levels=levels, codes=codes, seed=seed, fitted_on=fitted_on
        )

    def extend(
        self,
        item_ids: Sequence[str],
        *,
        vectors: ArrayLike | None = None,
        titles: Titles | None = None,
        levels: int = 3,
        codes: int = 256,
        seed: int = 0,
        fitted_on: str = "",
    ) -> Identifiers:
        """Identifiers for the items here and, after them, for new ones; those that are here stay as they are.

        "atomic" gives new tokens, "title" the title's tokens, told apart from those that are there, "random" codes
        drawn from the free ones, and "semantic" the nearest free codes (``semantic_ids.extend``).

        Args:
            item_ids: m new item ids, none of which is here.
            vectors: float [n + m, d], of old and new items, made in one way; read by "semantic" alone.
            titles: The titles of the new items as tokens; read by "title" alone.
            levels: Codes per identifier of "semantic" and "random", where none are here; else they have as many.
            codes: Different codes per level of "semantic" and "random", at least what is used here.
            seed: Of the drawing of "random", and of k-means where no identifiers are here.
            fitted_on: Hash of the training histories behind the vectors; kept where they are read.

        Raises:
            ConfigError: Unknown scheme, no vectors or titles where they are needed, or more items than identifiers.
            IdentifierError: An item that is here already, or codes that are not spelled as ``build`` spells them.
        """
        new: list[Tokens] = []
        if item_ids or not self.item_ids:  # Nothing to add to what is here asks for nothing.
            if self.scheme not in SCHEMES:
                raise ConfigError(f"unknown identifier scheme {self.scheme!r}. {suggestion(self.scheme, SCHEMES)}")
            matrix = None if vectors is None else _matrix(vectors, len(self.item_ids) + len(item_ids))
            new = SCHEMES[self.scheme](self.tokens, len(item_ids), matrix, titles, levels, codes, seed)
        kept = fitted_on if self.scheme in FROM_VECTORS else ""
        return Identifiers(self.scheme, [*self.item_ids, *item_ids], [*self.tokens, *new], kept)

    @cached_property
    def index(self) -> dict[str, int]:
        """The index of each item id."""
        return {item_id: number for number, item_id in enumerate(self.item_ids)}

    def indices(self, items: Sequence[str], where: str) -> NDArray[np.int32]:
        """Item ids as int32 item indices.

        Raises:
            UnknownIdError: An item that is not here, with the closest one; ``where`` names the catalogue.
            TypeError: Something that cannot be an id.
        """
        try:
            return np.array([self.index[item] for item in items], dtype=np.int32)
        except KeyError:
            unknown = next(item for item in items if item not in self.index)
            hint = closest(unknown, self.index, f"It has {len(self.index)} items.")
            raise UnknownIdError(f"item {unknown!r} is not in the catalogue of {where}. {hint}") from None

    def summary(self, items: Sequence[str] = ()) -> dict[str, Any]:
        """Scheme, counts, and the identifiers of ``items``, as plain values.

        Raises:
            UnknownIdError: One of ``items`` is not among them.
        """
        chosen = self.indices(items, "these identifiers")
        first = Counter(tokens[0] for tokens in self.tokens)
        lengths = Counter(map(len, self.tokens))
        return {
            "scheme": self.scheme,
            "items": len(self.item_ids),
            "tokens_in_vocabulary": len(self.vocabulary),
            "items_by_length": dict(sorted(lengths.items())),
            "first_tokens": len(first),
            "most_items_on_a_first_token": max(first.values(), default=0),
            "fitted_on": self.fitted_on,
            "hash": self.hash,
            **{item: "".join(self.tokens[index]) for item, index in zip(items, chosen.tolist(), strict=True)},
        }

    @cached_property
    def vocabulary(self) -> list[str]:
        """The tokens that a base gets anew, in a fixed order: atomic by item, codes level by level, each by number.

        Only tokens that some item uses: rows without an item would take part in the softmax. Under "title" these are
        the terminator and the numbers; the tokens of the titles are the base's own and stay as they are.
        """
        if self.scheme == "atomic":
            return list(dict.fromkeys(token for tokens in self.tokens for token in tokens))
        if self.scheme == "title":
            return sorted({token for tokens in self.tokens for token in tokens} & _TITLE_OWN, key=_by_number)
        depth = max(map(len, self.tokens), default=0)
        levels = [{t[level] for t in self.tokens if len(t) > level} for level in range(depth)]
        return list(dict.fromkeys(token for level in levels for token in sorted(level, key=_by_number)))

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of scheme, item ids and identifiers, in order."""
        parts = [part for i, t in zip(self.item_ids, self.tokens, strict=True) for part in (i, str(len(t)), *t)]
        return text_hash(self.scheme, *parts)

    def token_vectors(self, vectors: ArrayLike) -> NDArray[np.float32]:
        """What the embedding row of each new token is started from: the mean vector of the items that use it.

        Args:
            vectors: float [n_items, d].

        Returns:
            float32 [len(vocabulary), d], in the order of ``vocabulary``.
        """
        matrix = _matrix(vectors, len(self.item_ids))
        row = {token: index for index, token in enumerate(self.vocabulary)}
        pairs = [(row[token], item) for item, tokens in enumerate(self.tokens) for token in set(tokens) & row.keys()]
        rows, items = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        share = 1.0 / np.bincount(rows, minlength=len(row))[rows]
        mean = sparse.csr_matrix((share, (rows, items)), shape=(len(row), len(self.item_ids)))
        return np.asarray(mean @ matrix, dtype=np.float32)

    def save(self, path: Path) -> None:
        """Write Parquet (columns item_id, tokens; the scheme in the file's metadata), whole or not at all."""
        table = pl.DataFrame(
            {"item_id": self.item_ids, "tokens": [list(t) for t in self.tokens]},
            schema={"item_id": pl.String, "tokens": pl.List(pl.String)},
        )
        with new_file(Path(path)) as temporary:
            table.write_parquet(temporary, metadata={"scheme": self.scheme, "fitted_on": self.fitted_on})

    @classmethod
    def load(cls, path: Path) -> Identifiers:
        """Read what ``save`` wrote, and check it. Raises IdentifierError when the file is missing, foreign or wrong."""
        path = Path(path)
        if not path.is_file():
            raise IdentifierError(f"there are no identifiers at {path}. Make them with `genrec ids build`.")
        try:
            table = pl.read_parquet(path)
            noted = pl.read_parquet_metadata(path)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise IdentifierError(
                f"{path} cannot be read as Parquet: {error}. Make it with `genrec ids build`."
            ) from error
        scheme = noted.get("scheme")
        expected = {"item_id": pl.String(), "tokens": pl.List(pl.String)}
        if scheme is None or dict(table.schema) != expected:
            raise IdentifierError(
                f"{path} is not a file of identifiers: expected the columns item_id (string) and tokens "
                f"(list of strings) and the scheme in its metadata, found {dict(table.schema)} and "
                f"scheme {scheme!r}. Make it with `genrec ids build`."
            )
        if table["item_id"].null_count() or table["tokens"].null_count() or table["tokens"].explode().null_count():
            raise IdentifierError(f"{path} holds a missing item id or token. Make it again with `genrec ids build`.")
        return cls(
            scheme,
            table["item_id"].to_list(),
            [tuple(t) for t in table["tokens"].to_list()],
            noted.get("fitted_on", ""),
        )


def _spell(codes: NDArray[np.integer]) -> list[Tokens]:
    """``<|a_12|><|b_5|>``: the letter is the level."""
    return [tuple(f"<|{chr(ord('a') + level)}_{code}|>" for level, code in enumerate(row)) for row in codes.tolist()]


def _codes(identifiers: Sequence[Tokens]) -> NDArray[np.int64]:
    """int64 [n, levels]: the codes that ``_spell`` spelled."""
    rows = [[_by_number(token)[0] for token in tokens] for tokens in identifiers]
    found = np.array(rows, dtype=np.int64) if len({len(row) for row in rows}) == 1 else None
    if found is None or _spell(found) != list(identifiers):
        raise IdentifierError(
            "these identifiers are not codes as `genrec ids build` spells them (<|a_12|><|b_5|>), so none can be "
            "added. Build them again for all items."
        )
    return found


def _by_number(token: str) -> tuple[int, str]:
    digits = re.search(r"\d+", token)
    return (int(digits[0]) if digits else -1, token)


def _matrix(vectors: ArrayLike, n_items: int) -> NDArray[np.float64]:
    matrix = np.asarray(vectors, dtype=np.float64)
    if matrix.ndim != 2 or len(matrix) != n_items:
        raise IdentifierError(
            f"{n_items} items need vectors of shape [{n_items}, d], found {list(matrix.shape)}. "
            "Build the features from the same catalogue as the identifiers."
        )
    return matrix
