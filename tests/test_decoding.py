from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genrec.decoding import BeamSearch, Searches, Trie
from genrec.errors import DecodingError, IdentifierError

LONGEST, CODES = 4, 5


def padded(identifiers: list[tuple[int, ...]]) -> np.ndarray:
    table = np.full((len(identifiers), max(map(len, identifiers))), -1, dtype=np.int32)
    for row, identifier in zip(table, identifiers, strict=True):
        row[: len(identifier)] = identifier
    return table


def random_catalogue(rng: np.random.Generator, n: int) -> list[tuple[int, ...]]:
    """Distinct, prefix-free identifiers of unequal length, in random order."""
    kept: list[tuple[int, ...]] = []
    for _ in range(n):
        new = tuple(int(t) for t in rng.integers(0, CODES, rng.integers(1, LONGEST + 1)))
        if not any(new[: len(old)] == old or old[: len(new)] == new for old in kept):
            kept.append(new)
    return kept


catalogues = st.builds(
    lambda seed, n: random_catalogue(np.random.default_rng(seed), n), st.integers(0, 2**32), st.integers(1, 60)
)


class Model:
    """Log-probabilities that depend on the prompt and the whole prefix."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def logprob(self, prompt: int, prefix: tuple[int, ...], token: int) -> float:
        logits = np.random.default_rng([self.seed, prompt, *prefix]).normal(size=CODES + 1)
        return float(logits[token] - np.log(np.exp(logits).sum()))

    def score(self, prompt: int, identifier: tuple[int, ...]) -> float:
        return sum(self.logprob(prompt, identifier[:i], token) for i, token in enumerate(identifier))


def run(search: BeamSearch, model: Model) -> BeamSearch:
    prefixes, prompts = [()] * len(search.owner), search.numbers.tolist()
    while not search.done:
        rows, tokens = search.candidates()
        search.advance(
            np.array(
                [model.logprob(prompts[search.owner[r]], prefixes[r], t) for r, t in zip(rows, tokens, strict=True)]
            )
        )
        prefixes = [(*prefixes[p], int(t)) for p, t in zip(search.parent, search.token, strict=True)]
    return search


def naive(model: Model, prompt: int, identifiers: dict[int, tuple[int, ...]], beams: int) -> list[tuple[float, int]]:
    """Beam search in plain Python: best ``beams`` among finished and open prefixes at every step."""
    live, done = {(): 0.0}, []
    while live:
        grown = {}
        for prefix, score in live.items():
            for token in {i[len(prefix)] for i in identifiers.values() if i[: len(prefix)] == prefix}:
                grown[(*prefix, token)] = score + model.logprob(prompt, prefix, token)
        ends = {identifier: item for item, identifier in identifiers.items()}
        pool = sorted([*((-s, p) for p, s in grown.items()), *((-s, identifiers[i]) for s, i in done)])[:beams]
        done = [(-s, ends[p]) for s, p in pool if p in ends]
        live = {p: -s for s, p in pool if p not in ends}
    return sorted(done, key=lambda pair: (-pair[0], pair[1]))


class TestTrie:
    @given(catalogues)
    def test_leaves_are_the_identifiers(self, identifiers: list[tuple[int, ...]]) -> None:
        trie = Trie.build(padded(identifiers))
        found = {}
        stack: list[tuple[int, tuple[int, ...]]] = [(0, ())]
        while stack:
            node, prefix = stack.pop()
            lo, hi = (int(bound[0]) for bound in trie.interval(np.array([node])))
            below = {i for i, identifier in enumerate(identifiers) if identifier[: len(prefix)] == prefix}
            assert set(trie.items[lo:hi].tolist()) == below
            rows, tokens, children = trie.children(np.array([node]))
            assert tokens.tolist() == sorted(set(tokens.tolist()))
            assert not rows.any()
            assert bool(trie.is_leaf(np.array([node]))[0]) == (not len(children))
            if not len(children):
                found[int(trie.items[lo])] = prefix
            stack += [(int(c), (*prefix, int(t))) for c, t in zip(children, tokens, strict=True)]
        assert found == dict(enumerate(identifiers))
        assert trie.max_length == max(map(len, identifiers))
        assert trie.n_items == len(identifiers)
        assert np.array_equal(trie.items[trie.position], np.arange(trie.n_items))

    def test_children_of_many_nodes(self) -> None:
        trie = Trie.build(np.array([[1, 5], [2, 3], [1, 4], [2, 9]]))
        rows, tokens, nodes = trie.children(np.array([2, 0, 1, 3]))
        assert rows.tolist() == [0, 0, 1, 1, 2, 2]
        assert tokens.tolist() == [3, 9, 1, 2, 4, 5]
        assert trie.token[nodes].tolist() == tokens.tolist()

    def test_a_million_items_fit_in_32_mb(self) -> None:
        codes = np.unique(np.random.default_rng(0).integers(0, 256, (1_000_100, 4), dtype=np.int32), axis=0)[:1_000_000]
        trie = Trie.build(codes)
        assert sum(array.nbytes for array in (trie.token, trie.first_child, trie.lo, trie.items)) <= 32e6

    def test_tokens_too_wide_to_pack(self) -> None:
        rng = np.random.default_rng(0)
        identifiers = [tuple(row) for row in rng.integers(0, 2**31 - 2, (50, 4)).tolist()]
        trie = Trie.build(padded(identifiers))
        assert [identifiers[i] for i in trie.items] == sorted(identifiers)

    def test_hash_and_immutability(self) -> None:
        a, b, c = (Trie.build(np.array(x)) for x in ([[1, 2], [1, 3]], [[1, 2], [1, 3]], [[1, 3], [1, 2]]))
        assert a.hash == b.hash != c.hash
        with pytest.raises(ValueError, match="read-only"):
            a.token[0] = 1

    @pytest.mark.parametrize(
        ("table", "message"),
        [
            ([[1, 2], [3, 4], [1, 2]], r"items 0 and 2 have one identifier: \(1, 2\)"),
            ([[1, 2], [1, -1]], r"items 1 and 0 have identifiers, one the beginning of the other: \(1,\) and \(1, 2\)"),
            ([[1, 2, 3], [1, -1, -1], [0, -1, -1]], "one the beginning"),
            ([[5], [5]], "have one identifier"),
            ([[1, 2], [-1, -1]], "item 1 is empty or padded"),
            ([[1, -1, 2]], "item 0 is empty or padded"),
            ([[1, -2]], "must lie in"),
            (np.zeros((0, 3), dtype=np.int32), "must be integers"),
            ([1, 2], "must be integers"),
            ([[1.0]], "must be integers"),
        ],
    )
    def test_refuses(self, table: object, message: str) -> None:
        with pytest.raises(IdentifierError, match=message):
            Trie.build(np.array(table))


class TestBeamSearch:
    @settings(max_examples=60)
    @given(catalogues, st.integers(0, 2**32), st.integers(1, 12))
    def test_equals_a_naive_search(self, identifiers: list[tuple[int, ...]], seed: int, beams: int) -> None:
        model, trie = Model(seed), Trie.build(padded(identifiers))
        found = run(BeamSearch(trie, 2, beams), model).result()
        for prompt in range(2):
            expected = naive(model, prompt, dict(enumerate(identifiers)), beams)
            n = len(expected)
            assert found.items[prompt, :n].tolist() == [item for _, item in expected]
            np.testing.assert_allclose(found.scores[prompt, :n], [score for score, _ in expected], atol=1e-5)
            assert (found.items[prompt, n:] == -1).all()

    @settings(max_examples=60)
    @given(catalogues, st.integers(0, 2**32), st.data())
    def test_restrictions_with_all_beams_are_exact(
        self, identifiers: list[tuple[int, ...]], seed: int, data: st.DataObject
    ) -> None:
        n, items = 3, st.integers(-1, len(identifiers) - 1)
        lists = st.lists(
            st.none() | st.lists(items, max_size=40).map(np.array).map(lambda a: a.astype(int)), min_size=n, max_size=n
        )
        allowed = data.draw(
            st.none() | st.lists(st.booleans(), min_size=len(identifiers), max_size=len(identifiers)).map(np.array)
        )
        blocked, only = data.draw(st.none() | lists), data.draw(st.none() | lists)
        model, trie = Model(seed), Trie.build(padded(identifiers))
        search = BeamSearch(trie, n, 100, allowed, blocked, only)
        assert len(search.candidates()[0]) >= len(search.owner)
        found = run(search, model).result()
        for prompt in range(n):
            open_items = set(range(len(identifiers)))
            if allowed is not None:
                open_items &= set(np.flatnonzero(allowed).tolist())
            if blocked is not None and blocked[prompt] is not None:
                open_items -= set(blocked[prompt].tolist())
            if only is not None and only[prompt] is not None:
                open_items &= set(only[prompt].tolist())
            scores = {item: model.score(prompt, identifiers[item]) for item in open_items}
            expected = sorted(open_items, key=lambda item: (-scores[item], item))
            assert found.items[prompt, : len(expected)].tolist() == expected
            assert (found.items[prompt, len(expected) :] == -1).all()
            np.testing.assert_allclose(found.scores[prompt, : len(expected)], [scores[i] for i in expected], atol=1e-5)
            assert found.reasons[prompt] is not None

    def test_restrictions_prune_before_the_beam_is_cut(self) -> None:
        trie = Trie.build(np.array([[0, 0], [0, 1], [1, 0], [1, 1]]))
        search = BeamSearch(trie, 1, 1, blocked=[np.array([0, 1])])
        assert search.candidates()[1].tolist() == [1]
        search.advance(np.array([-9.0]))
        assert search.candidates()[1].tolist() == [0, 1]
        search.advance(np.array([-2.0, -1.0]))
        assert search.result().items.tolist() == [[3]]

    def test_ties_go_to_the_lower_item(self) -> None:
        trie = Trie.build(np.array([[4], [3], [2], [1]]))
        search = BeamSearch(trie, 1, 2)
        search.candidates()
        search.advance(np.full(4, -1.0))
        assert search.result().items.tolist() == [[0, 1]]

    def test_reasons(self) -> None:
        trie = Trie.build(np.array([[1], [2], [3]]))
        model = Model(0)
        assert run(BeamSearch(trie, 1, 3), model).result().reasons == [None]
        assert "the catalogue has only 3 items" in str(run(BeamSearch(trie, 1, 4), model).result().reasons[0])
        found = run(BeamSearch(trie, 2, 2, only=[np.array([2]), np.array([], dtype=int)]), model).result()
        assert found.items.tolist() == [[2, -1], [-1, -1]]
        assert "the restrictions leave only 1 items" in str(found.reasons[0])
        assert "no item is allowed" in str(found.reasons[1])
        nothing = BeamSearch(trie, 1, 2, allowed=np.zeros(3, dtype=bool))
        assert nothing.done
        assert nothing.result().items.tolist() == [[-1, -1]]

    def test_no_prompts(self) -> None:
        search = BeamSearch(Trie.build(np.array([[1], [2]])), 0, 5)
        assert search.done
        assert search.result().items.shape == (0, 2)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_not_finite_names_the_prompt(self, value: float) -> None:
        search = BeamSearch(Trie.build(np.array([[1], [2]])), 2, 1, numbers=np.array([7, 9]))
        search.candidates()
        with pytest.raises(DecodingError, match=r"prompt 9: .* not finite"):
            search.advance(np.array([-1.0, -1.0, -1.0, value]))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"num_beams": 0}, "num_beams must be 1 .. 65536, not 0"),
            ({"num_beams": 65_537}, "num_beams"),
            ({"allowed": np.ones(3, dtype=bool)}, r"allowed must be bool \[2\]"),
            ({"allowed": np.ones(2)}, "allowed must be bool"),
            ({"blocked": [np.array([2])]}, "blocked must hold item indices 0 .. 1, found 2 .. 2"),
            ({"only": [np.array([-2])]}, "only must hold"),
            ({"only": []}, "only has 0 lists for 1 prompts"),
        ],
    )
    def test_refuses(self, arguments: dict, message: str) -> None:
        with pytest.raises(DecodingError, match=message):
            BeamSearch(Trie.build(np.array([[1], [2]])), 1, **{"num_beams": 1, **arguments})


class TestSearches:
    @given(catalogues, st.integers(0, 2**32), st.integers(1, 8), st.lists(st.integers(0, 3), min_size=6, max_size=6))
    def test_batches_of_a_call_find_what_one_search_finds(
        self, identifiers: list[tuple[int, ...]], seed: int, beams: int, batch_of: list[int]
    ) -> None:
        trie, model, rng = Trie.build(padded(identifiers)), Model(seed), np.random.default_rng(seed)
        n, items = len(batch_of), len(identifiers)
        allowed = rng.random(items) < 0.8
        blocked = [None if rng.random() < 0.3 else rng.integers(-1, items, 3) for _ in range(n)]
        only = [None if rng.random() < 0.6 else rng.integers(-1, items, 4) for _ in range(n)]
        searches = Searches(n, trie, beams, allowed, blocked, only)
        for number in set(batch_of):
            batch = np.flatnonzero(np.array(batch_of) == number)
            searches.keep(batch, run(searches.of(batch), model))
        whole = run(BeamSearch(trie, n, beams, allowed, blocked, only), model).result()
        np.testing.assert_array_equal(searches.beams.items, whole.items)
        np.testing.assert_array_equal(searches.beams.scores, whole.scores)
        assert searches.beams.reasons == whole.reasons

    def test_prompts_of_no_batch_have_no_items(self) -> None:
        searches = Searches(2, Trie.build(padded([(0,), (1,)])), 3, None, None, None)
        assert searches.of(np.array([1])).n_allowed.tolist() == [2]
        beams = searches.beams
        assert (beams.items.dtype, beams.scores.dtype) == (np.int32, np.float32)
        assert (beams.items.tolist(), beams.scores.tolist()) == ([[-1, -1]] * 2, [[-np.inf] * 2] * 2)
        assert beams.reasons == [None, None]


class TestSavedTrie:
    def test_what_is_mapped_is_what_was_saved(self, tmp_path: Path) -> None:
        for seed in range(20):
            one_each = [(token,) for token in range(CODES)]  # Identifiers of one token, as `atomic` makes them.
            identifiers = random_catalogue(np.random.default_rng(seed), 50) if seed else one_each
            built = Trie.build(padded(identifiers))
            built.save(tmp_path / "trie")  # The name stays as given, and a file that is there is replaced.
            mapped = Trie.load(tmp_path / "trie")
            assert (mapped.hash, mapped.max_length) == (built.hash, built.max_length)
            for name in ("token", "first_child", "lo", "items", "position"):
                found, expected = getattr(mapped, name), getattr(built, name)
                assert found.dtype == expected.dtype == np.int32
                assert np.array_equal(found, expected)
            model = Model(seed)
            found, expected = (run(BeamSearch(trie, 2, 5), model).result() for trie in (mapped, built))
            assert np.array_equal(found.items, expected.items)
        assert isinstance(np.load(tmp_path / "trie", mmap_mode="r"), np.memmap)
        base = mapped.token
        while not isinstance(base, np.memmap) and base.base is not None:
            base = base.base
        assert isinstance(base, np.memmap)
        with pytest.raises(ValueError, match="read-only"):
            mapped.token[0] = 1
        assert [path.name for path in tmp_path.iterdir()] == ["trie"]

    def test_no_byte_can_be_lost_or_changed(self, tmp_path: Path) -> None:
        path, cut = tmp_path / "trie.npy", tmp_path / "cut"
        Trie.build(np.array([[1, 5], [2, 3], [1, 4]])).save(path)
        content = path.read_bytes()
        for length in range(len(content)):
            cut.write_bytes(content[:length])
            with pytest.raises(IdentifierError, match="Save the trie again"):
                Trie.load(cut)
        start = len(content) - 4 * (16 + 6 + 7 + 6 + 3)
        for place in range(start, len(content)):
            if start + 20 <= place < start + 32:
                continue  # Unused numbers of the header.
            cut.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(IdentifierError, match="Save the trie again"):
                Trie.load(cut)

    def test_foreign_files_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "trie.npy"
        with pytest.raises(IdentifierError, match="there is no trie at"):
            Trie.load(path)
        with pytest.raises(IdentifierError, match="is no trie"):
            Trie.load(tmp_path)
        for content in (np.arange(100, dtype=np.int32), np.zeros(100), np.zeros((10, 10), dtype=np.int32), np.array(1)):
            np.save(path, content)
            with pytest.raises(IdentifierError, match="is no trie"):
                Trie.load(path)
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
        with pytest.raises(IdentifierError, match="is no trie"):
            Trie.load(path)
        with open(path, "wb") as file:
            np.savez(file, a=np.zeros(3))
        with pytest.raises(IdentifierError, match="is no trie"):
            Trie.load(path)
        path.write_text("item_id,title\n")
        with pytest.raises(IdentifierError, match="is no trie"):
            Trie.load(path)


class TestMasks:
    @settings(max_examples=150)
    @given(st.integers(0, 2**32), st.sampled_from([1, 2, 63, 64, 65, 127, 128, 300]))
    def test_candidates_are_the_children_with_an_open_item(self, seed: int, n_items: int) -> None:
        """At every step, against all identifiers one by one; lists are shared, doubled, padded, dense or empty."""
        rng = np.random.default_rng(seed)
        numbers = rng.choice(CODES**LONGEST, n_items, replace=False)
        codes = numbers[:, None] // CODES ** np.arange(LONGEST) % CODES
        table = np.concatenate([codes, np.full((n_items, 1), -1)], axis=1)
        table[np.arange(n_items), rng.integers(2, LONGEST + 1, n_items)] = CODES + 1  # An end mark, at unequal depth.
        for row in table:
            row[int(np.argmax(row == CODES + 1)) + 1 :] = -1
        table = table[np.unique(table, axis=0, return_index=True)[1]]
        rng.shuffle(table)
        n, trie, model = 4, Trie.build(table), Model(seed)

        def draw(share: float) -> np.ndarray | None:
            some = np.flatnonzero(rng.random(len(table)) < share)
            return rng.permutation(np.concatenate([some, some[:3], [-1]])) if rng.random() < 0.8 else None

        share = float(rng.choice([0.0, 0.02, 0.5, 0.97, 1.0]))
        common = draw(share)
        allowed = None if rng.random() < 0.3 else rng.random(len(table)) < max(share, 0.5)
        blocked = None if rng.random() < 0.3 else [draw(1 - share), common, common, draw(share)]
        only = None if rng.random() < 0.3 else [common, draw(share), common, draw(1 - share)]
        opened = np.ones((n, len(table)), dtype=bool) if allowed is None else np.tile(allowed, (n, 1))
        for prompt in range(n):
            if only is not None and only[prompt] is not None:
                opened[prompt] &= np.isin(np.arange(len(table)), only[prompt])
            if blocked is not None and blocked[prompt] is not None:
                opened[prompt] &= ~np.isin(np.arange(len(table)), blocked[prompt])

        search = BeamSearch(trie, n, int(rng.integers(1, 8)), allowed, blocked, only)
        assert search.n_allowed.tolist() == opened.sum(axis=1).tolist()
        shared, shut, alone = search.restrictions()
        rebuilt = np.ones((n, len(table)), dtype=bool) if shared is None else np.tile(shared, (n, 1))
        rebuilt[shut] = False
        rebuilt[search.has_only] = False
        rebuilt[alone] = True
        assert np.array_equal(rebuilt, opened[:, trie.items])
        prefixes: list[tuple[int, ...]] = [()] * len(search.owner)
        waiting, last = [], np.arange(len(search.owner))
        while not search.done:
            rows, tokens = search.candidates()
            found = sorted((*prefixes[r], int(search.owner[r]), int(t)) for r, t in zip(rows, tokens, strict=True))
            expected = []
            for owner, prefix in zip(search.owner.tolist(), prefixes, strict=True):
                below = (table[:, : len(prefix)] == prefix).all(axis=1) & opened[owner]
                expected += [(*prefix, owner, int(t)) for t in np.unique(table[below, len(prefix)])]
            assert found == sorted(expected)
            # Every live beam that is reached later stands in what goes ahead, with its own parent above it.
            if waiting:
                level = waiting.pop(0)
                place = level.find(search.owner, search.node)
                assert level.owner[place].tolist() == search.owner.tolist()
                assert level.node[place].tolist() == search.node.tolist()
                assert level.token[place].tolist() == search.token.tolist()
                assert level.parent[place].tolist() == last[search.parent].tolist()
            elif prefixes[0]:
                first, *waiting = search.ahead(3)
                if waiting:
                    width = np.bincount(np.concatenate([level.owner for level in (first, *waiting)])).max()
                    assert width <= 3 * search.num_beams
                place = np.arange(len(search.node))
            else:
                place = np.arange(len(search.node))
            last = place
            pairs = zip(rows, tokens, strict=True)
            search.advance(np.array([model.logprob(search.owner[r], prefixes[r], min(t, CODES)) for r, t in pairs]))
            prefixes = [(*prefixes[p], int(t)) for p, t in zip(search.parent, search.token, strict=True)]

    def test_levels_go_ahead_where_nothing_branches_any_more(self) -> None:
        # Below 0: three chains of 3; below 1: a chain and a node with 9 children, each of which goes on.
        chains = [(0, i, 2, 3, 4) for i in range(3)] + [(1, 0, 2, 3, 4)] + [(1, 1, i, 3, 4) for i in range(9)]
        trie = Trie.build(np.array(chains))
        for items, sizes in ((range(3), [1, 3, 3, 3]), (range(4), [2, 4, 4, 4]), (range(13), [2, 5])):
            search = BeamSearch(trie, 1, 4, only=[np.array(items)])
            search.candidates()
            search.advance(np.zeros(len(search.candidates()[0])))
            assert [len(level.node) for level in search.ahead(100)] == sizes
        search = BeamSearch(trie, 1, 4, only=[np.arange(3)])
        search.advance(np.zeros(len(search.candidates()[0])))
        assert [len(level.node) for level in search.ahead(1)] == [1, 3]

    def test_one_prompt_that_branches_holds_the_others_back(self) -> None:
        """The forward is as wide as the prompt with the most nodes, so totals over prompts decide nothing."""
        busy = [(10 + i, j, k, 0) for i in range(4) for j in range(9) for k in range(2)]
        chains = [(i, 0, 0, 0) for i in range(10)] + busy
        trie = Trie.build(np.array(chains))
        quiet = [np.arange(4)] * 30
        for only, levels in ((quiet, 3), ([*quiet, np.arange(10, len(chains))], 1)):
            search = BeamSearch(trie, len(only), 4, only=only)
            search.advance(np.zeros(len(search.candidates()[0])))
            assert len(search.ahead(3)) == levels

    def test_rows_of_one_array_are_restrictions_of_their_own(self) -> None:
        trie = Trie.build(np.arange(6)[:, None])
        search = BeamSearch(trie, 3, 6, only=np.array([[0, 1], [2, 3], [4, -1]]), blocked=np.array([[0], [5], [-1]]))
        rows, tokens = search.candidates()
        assert list(zip(search.owner[rows].tolist(), tokens.tolist(), strict=True)) == [(0, 1), (1, 2), (1, 3), (2, 4)]
