"""Key-value contexts: the benchmark's prompt, splits, sizes, files and their mistakes; and when an answer is right."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.task_files import words, write

from lrope_gguf.errors import LropeError
from lrope_search import task_config
from lrope_search.sample import SPLITS
from lrope_search.tasks import KeyValueTask, TokenLimit, make_task
from lrope_search.tasks.answers import holds, normalize
from lrope_search.tasks.mix import mixed
from lrope_search.tasks.settings import TASKS
from lrope_search.tasks.task import Context, Probe, places


def record(n: int, n_pairs: int = 12) -> dict[str, Any]:
    pairs = [[f"key-{n}-{i}", f"value-{n}-{i}"] for i in range(n_pairs)]
    return {"ordered_kv_records": pairs, "key": pairs[3][0], "value": pairs[3][1]}


def pairs_of(context: Context) -> list[tuple[str, str]]:
    data = context.prefix[context.prefix.index("{") : context.prefix.rindex("}") + 1]
    return json.loads(data, object_pairs_hook=list)


def test_the_prompt_is_the_benchmarks(tmp_path: Path) -> None:
    pairs = [["a1", "v1"], ["b2", "v2"], ["c3", "v3"]]
    path = write(tmp_path / "kv.jsonl", [{"ordered_kv_records": pairs, "key": "b2", "value": "v2"}] * 3)
    context = KeyValueTask(probes=3, data=path).context("test", 0)
    assert context.prefix + context.probes[1].question == (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        '{"a1": "v1",\n "b2": "v2",\n "c3": "v3"}\n\nKey: "b2"\nCorresponding value:'
    )
    assert [probe.answer for probe in context.probes] == ["v1", "v2", "v3"]
    assert [probe.depth for probe in context.probes] == [0.0, 0.5, 1.0]


SETTINGS = (
    st.integers(1, 15), st.integers(0, 40), st.integers(0, 2**32), st.sampled_from(SPLITS), st.integers(0, 1000),
)  # fmt: skip


@given(*SETTINGS)
def test_jittered_probes_stand_one_in_each_stratum(n: int, more: int, seed: int, split: str, index: int) -> None:
    context = KeyValueTask(n + more, probes=n, seed=seed).context(split, index)
    found = {key: place for place, (key, _) in enumerate(pairs_of(context))}
    where = [found[probe.question.split('"')[1]] for probe in context.probes]
    assert [probe.depth for probe in context.probes] == [place / max(n + more - 1, 1) for place in where]
    for i, place in enumerate(where):
        assert i * (n + more) // n <= place < (i + 1) * (n + more) // n
    assert KeyValueTask(n + more, probes=n, seed=seed).context(split, index) == context


def test_jittered_probes_reach_all_places_alike_and_differ_by_split_context_and_seed() -> None:
    counts = np.zeros(12)
    seen = set()
    for seed in range(2):
        for split in SPLITS:
            for index in range(300):
                where = places(split, index, 12, 5, seed, "jittered")
                counts[[place for place, _ in where]] += 1
                seen.add((split, seed, tuple(where)))
    assert len({where for _, _, where in seen}) > 50
    # strata of 2, 2, 3, 2 and 3 places
    expected = 1800 / np.repeat([2, 2, 3, 2, 3], [2, 2, 3, 2, 3])
    np.testing.assert_allclose(counts, expected, rtol=0.15)
    firsts = {split: [places(split, i, 1000, 1, 0, "jittered")[0][0] for i in range(50)] for split in SPLITS}
    assert len({tuple(first) for first in firsts.values()}) == len(SPLITS)


@given(*SETTINGS)
def test_even_probes_ask_for_the_pairs_at_their_depths(n: int, more: int, seed: int, split: str, index: int) -> None:
    depths, n_pairs = n, n + more
    context = KeyValueTask(n_pairs, probes=depths, positions="even", seed=seed).context(split, index)
    pairs = pairs_of(context)
    assert len(pairs) == len(dict(pairs)) == n_pairs
    asked = []
    for i, probe in enumerate(context.probes):
        assert probe.depth == pytest.approx(i / (depths - 1) if depths > 1 else 0.0)
        where = round(probe.depth * (n_pairs - 1))
        assert (probe.question, probe.answer) == (f'Key: "{pairs[where][0]}"\nCorresponding value:', pairs[where][1])
        asked.append(where)
    assert len(set(asked)) == depths


@given(st.integers(11, 60), st.integers(0, 2**32))
def test_numbers_as_identifiers(n_pairs: int, seed: int) -> None:
    task = KeyValueTask(n_pairs, seed=seed, identifiers="number")
    for context in (task.context("validation", 3), task.calibration()):
        pairs = pairs_of(context)
        assert len(dict(pairs)) == len(pairs)
        assert all(re.fullmatch("[1-9][0-9]{3}", key) and re.fullmatch("[1-9][0-9]{2}", value) for key, value in pairs)


@pytest.mark.parametrize(("name", "kind"), [("words", "word"), ("numbers", "number")])
def test_pairs_of_one_kind_are_a_task_of_their_own(name: str, kind: str) -> None:
    """Of the same questions as `kv` with these identifiers, so that several kinds can be asked in one search."""
    config = task_config(name, keys=20, probes=3, seed=4)
    task, other = (make_task(one) for one in (config, task_config("kv", keys=20, probes=3, seed=4, identifiers=kind)))
    assert task.context("test", 1) == other.context("test", 1) and task.name == config.name == name
    assert task.calibration() == other.calibration()
    assert TASKS[name].from_json(config.to_json()) == config
    mix = mixed([make_task(task_config(one, keys=20)) for one in ("words", "numbers", "kv")])
    leads = {context.task: context.lead for context in (mix.context("search", i) for i in range(3))}
    assert leads == {"words": "=", "numbers": ' "', "kv": ' "'}
    with pytest.raises(LropeError, match=f"identifiers: --task {name} does not use it"):
        task_config(name, identifiers="word")
    with pytest.raises(LropeError, match=r"too few for 4 probes"):
        make_task(task_config(name, keys=3, probes=4))


def test_identifiers_are_refused_where_they_mean_nothing(tmp_path: Path) -> None:
    data = write(tmp_path / "kv.jsonl", [record(n) for n in range(10)])
    for options in ({"identifiers": "words"}, {"identifiers": "number", "data": data}):
        with pytest.raises(LropeError, match=r"kv\.identifiers"):
            KeyValueTask(12, **options)
    with pytest.raises(LropeError, match="--keys 9001"):
        KeyValueTask(9001, identifiers="number")


@pytest.mark.parametrize("name", ["kv.jsonl", "kv.jsonl.gz"])
def test_a_files_records_are_shuffled_into_disjoint_splits(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, [record(n) for n in range(20)])

    def keys(task: KeyValueTask, split: str) -> list[str]:
        return [pairs_of(task.context(split, i))[0][0] for i in range(task.size(split) or 0)]

    task = KeyValueTask(data=path, seed=1)
    splits = [keys(task, split) for split in SPLITS]
    assert [len(split) for split in splits] == [10, 4, 6]
    assert sorted(key for split in splits for key in split) == sorted(f"key-{n}-0" for n in range(20))
    assert splits == [keys(KeyValueTask(data=path, seed=1), split) for split in SPLITS]
    assert splits != [keys(KeyValueTask(data=path, seed=2), split) for split in SPLITS]


def test_keys_takes_the_first_pairs_of_each_record(tmp_path: Path) -> None:
    path = write(tmp_path / "kv.jsonl", [record(n, 12) for n in range(10)])
    whole, part = (KeyValueTask(n, probes=4, data=path).context("search", 2) for n in (None, 5))
    assert len(pairs_of(whole)) == 12
    assert pairs_of(part) == pairs_of(whole)[:5]
    assert part.probes[-1].answer == pairs_of(part)[4][1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"kv\.jsonl:2: not a key-value record"),
        ("[1]", r"kv\.jsonl:2: not a key-value record"),
        ("[" * 100_000, r"kv\.jsonl:2: not a key-value record"),
        ('{"ordered_kv_records": [["a\\ud800", "b"]]}', r"kv\.jsonl:2: not a key-value record"),
        ({"key": "a"}, r"kv\.jsonl:2: not a key-value record .*ordered_kv_records"),
        ({"ordered_kv_records": [["a", "b", "c"]] * 12}, r"kv\.jsonl:2: not a key-value record"),
        ({"ordered_kv_records": [["a", 1]] * 12}, r"kv\.jsonl:2: a key or value is not text"),
        ({"ordered_kv_records": [["a", "b"]] * 12}, r"kv\.jsonl:2: a key occurs twice"),
        (record(1, 11), r"kv\.jsonl:2: has 11 pairs, fewer than --keys 12"),
    ],
)
def test_a_bad_record_is_named_by_its_line(tmp_path: Path, line: Any, message: str) -> None:
    path = write(tmp_path / "kv.jsonl", [record(0), line, record(2)])
    with pytest.raises(LropeError, match=message) as caught:
        KeyValueTask(12, data=path)
    assert "\n" not in str(caught.value)


def test_unusable_files_and_numbers_are_refused(tmp_path: Path) -> None:
    zipped = write(tmp_path / "kv.jsonl.gz", [record(n) for n in range(50)]).read_bytes()
    short = json.dumps(record(0, 8)).encode() + b"\n"
    for name, content, message in [
        ("none.jsonl", None, "No such file"),
        ("empty.jsonl", b"", "has no records"),
        ("latin.jsonl", b'{"\xe9": 1}\n', r"latin\.jsonl: cannot read"),
        ("cut.jsonl.gz", zipped[: len(zipped) // 2], r"cut\.jsonl\.gz: cannot read"),
        ("bad.jsonl.gz", zipped[:100] + bytes(100) + zipped[200:], r"bad\.jsonl\.gz: cannot read"),
        ("short.jsonl", short, "fewer pairs than the 11 probes"),
        ("two.jsonl", short * 2, r"two\.jsonl: has only 2 contexts .* one each"),
    ]:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(LropeError, match=message):
            KeyValueTask(data=tmp_path / name, probes=8 if name == "two.jsonl" else 11)
    for probes, message in ((11, "--keys 10: too few for 11 probes"), (0, "probes 0")):
        with pytest.raises(LropeError, match=message):
            KeyValueTask(10, probes=probes)


def test_the_sizes_of_splits(tmp_path: Path) -> None:
    pair = '{"ordered_kv_records": [["a\\ud83d\\ude00", "b"]]}'  # a surrogate pair is text, half of one is not
    few = KeyValueTask(data=write(tmp_path / "kv.jsonl", [pair] * 3), probes=1)
    assert [few.size(split) for split in SPLITS] == [1, 1, 1] and few.context("test", 0).probes[0].answer
    task = KeyValueTask(data=write(tmp_path / "kv.jsonl", [record(n) for n in range(10)]))
    with pytest.raises(LropeError, match="5 test contexts asked for, but of its 10 records 3 are for test"):
        task.context("test", 4)


def size(context: Context) -> int:
    return max(words(context.prefix + probe.question) for probe in context.probes)


@given(st.integers(120, 3000), st.integers(0, 2**32), st.sampled_from(["uuid", "number"]), st.sampled_from(SPLITS))
def test_as_many_pairs_as_fit_into_the_tokens(tokens: int, seed: int, kind: str, split: str) -> None:
    limit = TokenLimit(tokens, words)
    task = KeyValueTask(probes=5, seed=seed, identifiers=kind, limit=limit)
    context = task.context(split, 1)
    n = len(pairs_of(context))
    more = KeyValueTask(n + 1, probes=5, seed=seed, identifiers=kind).context(split, 1)
    assert size(context) <= tokens < size(more)
    assert context == KeyValueTask(n, probes=5, seed=seed, identifiers=kind).context(split, 1)
    assert context == KeyValueTask(probes=5, seed=seed, identifiers=kind, limit=limit).context(split, 1)


def test_tokens_that_no_context_has(tmp_path: Path) -> None:
    with pytest.raises(LropeError, match="--context-tokens 50: 11 pairs alone take"):
        KeyValueTask(probes=11, limit=TokenLimit(50, words)).context("test", 0)
    with pytest.raises(LropeError, match="--context-tokens 5: one pair alone takes"):
        KeyValueTask(limit=TokenLimit(5, words)).context("test", 0)
    data = write(tmp_path / "kv.jsonl", [record(n) for n in range(10)])
    part = KeyValueTask(data=data, probes=4, limit=TokenLimit(100, words)).context("search", 0)
    assert size(part) <= 100 and 4 < len(pairs_of(part)) < 12
    with pytest.raises(LropeError, match=r"--context-tokens 400: 12 pairs take only .* of .*kv\.jsonl has no more"):
        KeyValueTask(data=data, probes=4, limit=TokenLimit(400, words)).context("search", 0)
    with pytest.raises(LropeError, match=r"--context-tokens 200000: 9000 pairs .* no more such keys"):
        KeyValueTask(identifiers="number", limit=TokenLimit(200_000, words)).context("search", 0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Who", "who"), ("An apple, a day;\tthe\nend!", "apple day end"),
        ("Theatre of A.B. Marx", "theatre of ab marx"), ("A", ""), ("*", ""),
        ("Wilhelm Conrad Röntgen", "wilhelm conrad röntgen"),
    ],
)  # fmt: skip
def test_normalized_texts(text: str, expected: str) -> None:
    assert normalize(text) == expected


@given(st.text(max_size=40))
def test_normalizing_again_changes_no_punctuation_or_blank(text: str) -> None:
    once = normalize(text)
    assert not set(once) & set("!,.;'\"") and "  " not in once and once == once.strip()


def test_any_wording_will_do() -> None:
    probe = Probe(0.5, "?", "Wilhelm Röntgen", ("W. C. Röntgen",))
    assert probe.answered_by("It was wilhelm röntgen.") and probe.answered_by("W. C. RÖNTGEN")
    assert not probe.answered_by("Röntgen")
    assert not probe.answered_by("WC Röntgen")
    loose = Probe(0.5, "?", "Wilhelm Röntgen", ("W. C. Röntgen", "The"), normalized=True)
    assert loose.answered_by("it was the W.C. Röntgen") is False  # without punctuation: wc
    assert loose.answered_by("it was W. C. the Röntgen")
    assert not loose.answered_by("the end")
    assert not holds("C", ["C++"]) and holds("C", ["C++"], normalized=True)


STEPS = st.lists(st.integers(0, 30), min_size=1, max_size=80)


@given(STEPS, st.integers(1, 5), st.integers(0, 85), st.integers(-3, 3))
def test_the_largest_size_that_fits_is_found(steps: list[int], low: int, near: int, beside: int) -> None:
    tokens = [0] * low + [5 + total for total in itertools.accumulate(steps)]  # of sizes 0, 1, ...
    high = len(tokens) - 1
    limit = tokens[min(near, high)] + beside
    found = TokenLimit(limit, len).largest(lambda size: "x" * tokens[size], low, high)
    fitting = [size for size in range(low, high + 1) if tokens[size] <= limit]
    assert found == ((fitting[-1], tokens[fitting[-1]]) if fitting else (0, tokens[low]))


@pytest.mark.parametrize(("per_item", "limit"), [(63, 8192), (63, 131_072), (2, 1_000_000), (400, 100_000)])
def test_a_long_prompt_is_counted_a_few_times(per_item: int, limit: int) -> None:
    calls = []

    def prompt(size: int) -> str:
        calls.append(size)
        return "x" * (40 + per_item * size + size // 7 % 3)

    assert TokenLimit(limit, len).largest(prompt, 11, limit)[0] == pytest.approx((limit - 40) / per_item, abs=2)
    assert len(calls) <= 7
