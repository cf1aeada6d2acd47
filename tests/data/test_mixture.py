"""Mixtures: the ratio at every moment, no row twice within a pass, budgets, one tokenizer, refusals."""

import itertools
import json
import pickle
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stableqat.data import TextDataModule, text
from stableqat.data.budget import Budget
from stableqat.data.holdout import document_hash, hash_cutoff
from stableqat.data.mixture import Mixture, interleaving
from stableqat.data.order import EvaluationOrder, TrainingLoader, TrainingOrder
from stableqat.data.prepare.command import tokenize
from stableqat.data.tokenizer import train_bpe
from stableqat.errors import UserError

shares = st.lists(st.integers(1, 40), min_size=1, max_size=6)
seeds = st.integers(0, 2**63 - 1)


@st.composite
def mixtures(draw, repeat=True):
    """Sources of a few rows each, at any ratio, and an epoch that may visit them several times."""
    ratios = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    rows = [draw(st.integers(3, 30)) for _ in ratios]
    size = draw(st.integers(1, 120)) if repeat else None
    return Mixture(rows, ratios, size)


def sources_of(mixture, order):
    """The source of each index into the sources laid end to end."""
    return np.searchsorted(np.cumsum(mixture.rows), order, side="right")


@given(shares, st.integers(1, 300))
def test_every_prefix_has_the_ratio_to_less_than_a_row(shares, length):
    pattern = interleaving(shares, length)
    for source, share in enumerate(shares):
        taken = np.cumsum(pattern == source)
        meant = np.arange(1, length + 1) * share / sum(shares)
        assert np.abs(taken - meant).max() < 1


@given(shares)
def test_the_pattern_is_periodic_and_no_source_waits_needlessly(shares):
    period = sum(shares)
    pattern = interleaving(shares, 3 * period)
    assert (pattern.reshape(3, period) == pattern[:period]).all()
    assert Counter(pattern[:period].tolist()) == dict(enumerate(shares))


@given(st.data())
def test_without_a_budget_an_epoch_is_what_the_scarcest_source_allows(data):
    ratios = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=5))
    rows = [data.draw(st.integers(0, 200)) for _ in ratios]
    mixture = Mixture(rows, ratios)
    taken = np.stack([np.cumsum(interleaving(ratios, sum(rows) + 1) == s) for s in range(len(rows))], axis=1)
    enough = (taken <= rows).all(axis=1)
    assert mixture.size == int(enough.sum()) == (len(enough) if enough.all() else int(enough.argmin()))
    assert mixture.size <= sum(rows)


@given(mixtures(), seeds, st.integers(0, 3))
def test_an_epoch_holds_the_ratio_and_repeats_no_row_within_a_pass(mixture, seed, epoch):
    order = mixture.order(seed, epoch)
    assert len(order) == mixture.size
    sources = sources_of(mixture, order)
    assert (sources == interleaving(mixture.shares, mixture.size)).all()
    for source, rows in enumerate(mixture.rows):
        drawn = order[sources == source]
        assert len(drawn) == mixture.counts[source]
        passes = [drawn[start : start + rows].tolist() for start in range(0, len(drawn), rows)]
        assert all(len(set(each)) == len(each) for each in passes)
        assert all(set(each) == set(passes[0]) for each in passes[:-1])


@given(mixtures(repeat=False), seeds)
def test_an_epoch_without_a_budget_visits_no_row_twice(mixture, seed):
    order = mixture.order(seed, 0)
    assert len(set(order.tolist())) == len(order)


def test_each_pass_and_each_source_has_its_own_permutation():
    mixture = Mixture([50, 50], [1, 1], 300)
    drawn = []
    for epoch in range(2):
        order = mixture.order(7, epoch)
        sources = sources_of(mixture, order)
        for source in (0, 1):
            rows = order[sources == source] - 50 * source
            drawn += [tuple(rows[start : start + 50].tolist()) for start in (0, 50, 100)]
    assert len(drawn) == len(set(drawn)) == 12
    assert all(sorted(rows) == list(range(50)) for rows in drawn)


@given(mixtures(), seeds, st.integers(1, 120))
def test_a_position_s_row_does_not_depend_on_the_budget(mixture, seed, less):
    shorter = Mixture(mixture.rows, mixture.shares, min(less, mixture.size))
    assert (shorter.order(seed, 0) == mixture.order(seed, 0)[: shorter.size]).all()


@given(mixtures(), st.integers(1, 4), st.integers(1, 4), seeds)
def test_a_step_s_rows_do_not_depend_on_the_number_of_processes(mixture, world, batch, seed):
    if mixture.size < world * batch:
        mixture = Mixture(mixture.rows, mixture.shares, world * batch)

    def taken(batch, rank=0, world=1):
        order = TrainingOrder(mixture, batch, seed=seed, rank=rank, world_size=world)
        return [[index for *_, index in keys] for keys in order]

    ranks = [taken(batch, rank, world) for rank in range(world)]
    together = [[i for row in zip(*step, strict=True) for i in row] for step in zip(*ranks, strict=True)]
    assert together == taken(world * batch)
    visited = [index for step in together for index in step]
    assert visited == mixture.order(seed, 0)[: len(visited)].tolist()
    assert mixture.size - len(visited) < world * batch


@given(mixtures(), seeds)
def test_overfitting_stays_with_the_same_few_rows(mixture, seed):
    few = mixture.first(max(1, mixture.size // 3))
    order = few.order(seed, 0)
    assert set(order.tolist()) == set(few.order(seed, 1).tolist())
    starts = np.cumsum([0, *mixture.rows])
    for start, stop, count in zip(starts, starts[1:], few.counts, strict=False):
        rows = set(order[(order >= start) & (order < stop)].tolist())
        assert rows == set(range(start, start + min(count, stop - start)))


def test_ratios_mean_what_is_written():
    assert Mixture([10, 10], [0.67, 0.33]).shares == [67, 33]
    assert Mixture([10, 10], [2.0, 6]).shares == [1, 3]


def test_a_source_alone_is_as_it_was_before_there_were_mixtures():
    """Checkpoints and results of earlier runs stay what they are."""
    assert Mixture([10]).order(17, 2).tolist() == [8, 6, 0, 4, 3, 1, 9, 2, 5, 7]
    loader = TrainingLoader([], TrainingOrder(Mixture([10]), 2, seed=3))
    loader.load_state_dict({"epoch": 1, "consumed": 4, "seed": 3, "size": 10})
    assert loader.order.position == (1, 4)


@pytest.mark.parametrize(
    ("mixture", "seed", "says"),
    [
        (Mixture([8, 9], [1, 1], 12), 4, "data seed is 3, this run's is 4"),
        (Mixture([8, 9], [1, 1], 14), 3, "number of training samples per epoch is 12, this run's is 14"),
        (Mixture([8, 9], [2, 1], 12), 3, "ratio of sources is 1:1, this run's is 2:1"),
        (Mixture([9, 8], [1, 1], 12), 3, "number of samples of each source is 8:9, this run's is 9:8"),
        (Mixture([12]), 3, "ratio of sources is 1:1, this run's is 1"),
    ],
)
def test_another_mixture_budget_or_seed_does_not_resume(mixture, seed, says):
    saved = TrainingLoader([], TrainingOrder(Mixture([8, 9], [1, 1], 12), 2, seed=3)).state_dict()
    TrainingLoader([], TrainingOrder(Mixture([8, 9], [0.5, 0.5], 12), 4, seed=3)).load_state_dict(saved)
    with pytest.raises(
        UserError, match=f"^cannot resume: the checkpoint's {says} .*model.init_from RUN"
    ) as refused:
        TrainingLoader([], TrainingOrder(mixture, 2, seed=seed)).load_state_dict(saved)
    assert ("earlier stableqat held out other samples" in str(refused.value)) == ("number of" in says)


@pytest.mark.parametrize(
    ("written", "number"),
    [
        ("20M", 20_000_000),
        ("1.5B", 1_500_000_000),
        ("1.5g", 1_500_000_000),
        ("20_000_000", 20_000_000),
        (300_000, 300_000),
        ("300k", 300_000),
        ("2e9", 2_000_000_000),
        ("0.1B", 100_000_000),
    ],
)
def test_numbers_of_tokens_as_users_write_them(written, number):
    assert Budget(written).tokens == number


@pytest.mark.parametrize("written", ["", "many", "M", "-5", "0", "0.1", "1.5 billion", "1,000", 0, -3, "inf"])
def test_what_is_no_number_of_tokens(written):
    with pytest.raises(UserError, match=r"^tokens: must be a number such as 300000, 20M or 1\.5B, not "):
        Budget(written)


# -- real files ---------------------------------------------------------------------------------


def document(number):
    """Random digits, so that every row is another."""
    draw = random.Random(number)
    return f"{number} " + " ".join(f"{draw.getrandbits(48):x}" for _ in range(17))


def write(path, numbers):
    path.write_text("".join(json.dumps({"text": document(n)}) + "\n" for n in numbers))
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Two raw sources, the second three times the first; both tokenized; the first with another tokenizer."""
    folder = tmp_path_factory.mktemp("sources")
    found = {
        "small": write(folder / "small.jsonl", range(100)),
        "large": write(folder / "large.jsonl", range(1000, 1300)),
        "tokenizer": str(folder / "tokenizer"),
        "other": str(folder / "other"),
    }
    train_bpe([document(n) for n in range(50)], 300).save_pretrained(found["tokenizer"])
    train_bpe([document(n) for n in range(50)], 280).save_pretrained(found["other"])
    for name, source, tokenizer in [
        ("small-set", "small", "tokenizer"),
        ("large-set", "large", "tokenizer"),
        ("other-set", "small", "other"),
    ]:
        found[name] = str(folder / name)
        settings = {"tokenizer": found[tokenizer], "block_size": 24, "num_proc": 1}
        tokenize(input=found[source], out=found[name], validation_fraction=0.1, **settings)
    return found


@pytest.fixture
def make(tmp_path):
    def module(source, **options):
        options = {"block_size": 16, "batch_size": 4, "seed": 0} | options
        data = TextDataModule(source, cache_dir=str(tmp_path / "cache"), **options)
        data.setup("fit")
        return data

    return module


def rows_of(data, split):
    """Each source's rows of a split, as tuples."""
    return [
        [tuple(splits[split].sample(i)["input_ids"].tolist()) for i in range(len(splits[split]))]
        for splits in data._packed.values()
    ]


def seen(loader):
    return [tuple(row) for batch in loader for row in batch["input_ids"].tolist()]


@pytest.mark.parametrize("kinds", [("small", "large"), ("small-set", "large-set"), ("small", "large-set")])
def test_an_epoch_takes_from_raw_and_tokenized_sources_at_the_ratio(files, make, kinds):
    named = {} if kinds[1].endswith("set") else {"tokenizer": files["tokenizer"]}
    data = make({files[kinds[0]]: 1, files[kinds[1]]: 2}, **named)
    small, large = (Counter(rows) for rows in rows_of(data, "train"))
    rows = seen(data.train_dataloader())
    taken = Counter(rows)
    assert not small.keys() & large.keys()
    of_small = sum(taken[row] for row in small)
    assert of_small + sum(taken[row] for row in large) == len(rows) == data.mixture.size // 4 * 4
    assert abs(of_small - len(rows) / 3) < 1
    assert sum(small.values()) - of_small <= 2  # the scarcest source is used up but for the last steps
    assert not (taken - small - large)  # no row more often than it is there


def test_a_budget_is_kept_to_the_row(files, make):
    data = make({files["small-set"]: 1, files["large-set"]: 1}, tokens="1_617", batch_size=1)
    assert data.mixture.size == len(data.train_dataloader()) == 1617 // 16
    rows = seen(data.train_dataloader())
    small = set(rows_of(data, "train")[0])
    assert [row in small for row in rows] == [True, False] * 50 + [True]
    alone = make(files["large-set"], tokens=1616, batch_size=1)
    assert len(seen(alone.train_dataloader())) == 101


def test_repeat_goes_round_again_in_a_new_order(files, make):
    data = make({files["small-set"]: 1, files["large-set"]: 1}, tokens="64k", repeat=True, batch_size=1)
    rows, (small, large) = seen(data.train_dataloader()), map(Counter, rows_of(data, "train"))
    drawn = [row for row in rows if row in small]
    once = sum(small.values())
    assert 1.5 * once < len(drawn) == 2000
    assert Counter(drawn[:once]) == small
    assert drawn[:100] != drawn[once : once + 100]
    assert not Counter(row for row in rows if row in large) - large


def test_validation_holds_all_and_shows_all_soon(files, make):
    data = make({files["small-set"]: 5, files["large-set"]: 1})
    small, large = rows_of(data, "validation")
    rows = data.splits["validation"]
    order = list(EvaluationOrder(len(rows), 4))
    got = [tuple(row) for keys in order for row in rows[keys]["input_ids"].tolist()]
    assert Counter(got) == Counter(small + large)
    assert got == [tuple(row) for batch in data.val_dataloader() for row in batch["input_ids"].tolist()]
    first = got[:16]  # at their sizes, whatever the training's ratio
    assert abs(sum(row in set(small) for row in first) - 16 * len(small) / len(got)) <= 1


def test_one_bpe_learns_from_all_raw_sources_evenly(files, make, monkeypatch):
    learned = []

    def spy(texts, size):
        learned.append([int(each.split()[0]) for each in texts])
        return train_bpe([document(n) for n in range(50)], size)

    monkeypatch.setattr(text, "train_bpe", spy)
    data = make({files["small"]: 1, files["large"]: 1}, vocab_size=300)
    assert {number >= 1000 for number in learned[0]} == {True, False}
    assert len(learned[0]) == sum(
        document_hash(document(n)) >= hash_cutoff(0.05) for n in (*range(100), *range(1000, 1300))
    )
    assert data.tokenizer_source is None
    monkeypatch.setattr(text, "_BPE_MAX_BYTES", data._documents[files["small"]].splits["train"].data.nbytes)
    numbers = [int(each.split()[0]) for each in data._training_texts()]
    assert 80 < len(numbers) <= 100
    assert 0.4 < sum(number < 1000 for number in numbers) / len(numbers) < 0.6
    assert max(numbers) > 1290  # even within a source


def test_tokenized_sources_are_mapped_not_copied(files, make):
    data = make({files["small-set"]: 1, files["large-set"]: 1})
    rows = data.splits["train"]
    size = sum(part.num_tokens for part in rows.parts) * 4
    assert size > 100_000
    assert len(pickle.dumps(rows)) < size / 10
    keys = [(0, 0, 5), (0, 0, len(rows) - 1)]
    assert (pickle.loads(pickle.dumps(rows))[keys]["input_ids"] == rows[keys]["input_ids"]).all()
    assert all(not chunk.flags.owndata for part in rows.parts for chunk in part.chunks)


def test_workers_read_the_same_rows(files, make):
    source = {files["small-set"]: 1, files["large-set"]: 3}
    assert seen(make(source).train_dataloader()) == seen(make(source, num_workers=2).train_dataloader())


def test_a_place_is_exact_within_an_epoch(files, make):
    source, options = {files["small-set"]: 1, files["large-set"]: 1}, {"tokens": "5k"}
    whole = seen(make(source, **options).train_dataloader())
    first = make(source, **options)
    batches = iter(first.train_dataloader())
    head = [tuple(row) for _ in range(7) for row in next(batches)["input_ids"].tolist()]
    other = make(source, batch_size=2, **options)
    other.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
    tail = seen(other.train_dataloader())[: len(whole) - len(head)]
    assert head + tail == whole


LARGER = (
    r"^tokens {} is more than the data allows without repetition, {} \(\S*small-set has {}\): "
    "lower tokens, or "
)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ({}, {}, r"^source {} is empty: name sources and their ratios$"),
        ({"small": 0}, {}, r"^source \S*small.jsonl: its ratio 0 must be a number above 0$"),
        ({"small": 1, "large": -1}, {}, r"^source \S*large.jsonl: its ratio -1 must be"),
        ({"small": float("nan")}, {}, "its ratio nan must be"),
        ({"small": float("inf")}, {}, "its ratio inf must be"),
        ("{a: 1, b: x}", {}, r"^source {a: 1, b: x} must give each source a number"),
        (
            {"small-set": 1, "other-set": 1},
            {},
            r"^\S*other-set was .* than \S*small-set, and .* --tokenizer \S*small-set/tokenizer$",
        ),
        ({"small-set": 1, "large": 1}, {"tokenizer": "other"}, "small-set was made with another tokenizer"),
        ({"small": 1, "large": 1}, {"name": "x"}, "^name x is the configuration of one Hub data set"),
        ({"small": 1, "/no/file.jsonl": 1}, {}, "^no such data file or folder: /no/file.jsonl$"),
        ("small-set", {"tokens": "lots"}, "^tokens: must be a number such as"),
        ("small-set", {"tokens": 15}, "^tokens 15 is less than a row of block_size 16: raise it$"),
        ("small-set", {"repeat": True}, "^repeat true needs a number of tokens to stop at: set tokens$"),
        ("small-set", {"tokens": "20k"}, LARGER.format(20000, r"(\d+)", r"\1")),
        (
            {"large-set": 1, "small-set": 3},
            {"tokens": "32k"},
            LARGER.format(32000, r"\d+", r"\d+ of its share of 24000"),
        ),
    ],
)
def test_refused_with_one_line(files, make, source, options, says):
    if isinstance(source, dict):
        source = {files.get(name, name): ratio for name, ratio in source.items()}
    if "tokenizer" in options:
        options = {"tokenizer": files[options["tokenizer"]]}
    with pytest.raises(UserError, match=says) as caught:
        make(files.get(source, source) if isinstance(source, str) else source, **options)
    assert "\n" not in str(caught.value)


def test_a_budget_that_the_data_allows_is_one_row_less_than_what_is_refused(files, make):
    source = {files["small-set"]: 1, files["large-set"]: 2}
    most = make(source).mixture.size
    assert make(source, tokens=16 * most).mixture.size == most
    with pytest.raises(UserError, match=f"tokens {16 * (most + 1)} .* without repetition, {16 * most} "):
        make(source, tokens=16 * (most + 1))
    assert make(source, tokens=16 * (most + 1), repeat=True).mixture.size == most + 1


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 5))
def test_an_evaluation_s_first_batches_have_every_source(batches, size):
    from stableqat.data.text_rows import MixedRows

    class Part(list):
        sample = list.__getitem__
        hold_conversations = False

    parts = [Part([(s, i) for i in range(count)]) for s, count in enumerate((40, 400, 4))]
    rows = MixedRows(parts, spread=True)
    got = [rows.sample(i) for i in range(len(rows))]
    assert sorted(got) == sorted(itertools.chain(*parts))
    first = got[: batches * size]
    for source, part in enumerate(parts):
        assert abs(sum(s == source for s, _ in first) - len(first) * len(part) / len(got)) <= 1.5
