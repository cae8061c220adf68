"""What is found in a large manifest is remembered by its digest, and what is not read before training is checked as it is read."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse.cut import Cut
from lhotse.serialization import deserialize_item
from torch import Tensor

from asrkit.data import checks, cut_audio, manifests, remembered
from asrkit.data import tokenizer_texts as tokenizer_texts_module
from asrkit.data.bucketing import BucketPlan
from asrkit.data.checks import find_bad_cuts
from asrkit.data.cut_audio import feature_statistics
from asrkit.data.cut_table import CutTable, row_of, row_of_json
from asrkit.data.manifest_schema import check_cut, without_nulls
from asrkit.data.manifests import make_cut, open_cuts, write_cuts
from asrkit.data.text.tokenizer import train_tokenizer
from asrkit.data.tokenizer_texts import tokenizer_texts
from asrkit.data.train_batches import DataConfig, TrainBatches
from asrkit.errors import UserError
from helpers.commands import finish, quick, sets
from helpers.tones import make_corpus, rewrite

COUNT = 12


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small manifest that counts as large, and nothing remembered."""
    monkeypatch.setenv("ASRKIT_CACHE", str(tmp_path / "cache"))
    for module in (manifests, checks):
        monkeypatch.setattr(module, "WORTH", COUNT)
    yield make_corpus(tmp_path, COUNT)
    manifests._OPENED.clear()


def _opened(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[CutTable, int]:
    """The cuts as a new process opens them, and how many lines were checked."""
    manifests._OPENED.clear()
    count, parse = [0], manifests._parse_line

    def counted(line: str, need_text: bool) -> object:
        count[0] += 1
        return parse(line, need_text)

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "_parse_line", counted)
        return open_cuts(path), count[0]


def test_a_manifest_is_checked_once(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, checked = _opened(manifest, monkeypatch)
    again, not_checked = _opened(manifest, monkeypatch)
    assert (checked, not_checked) == (COUNT, 0) and list(first) == list(again)
    for name, values in vars(first.columns).items():
        np.testing.assert_array_equal(values, getattr(again.columns, name))
    (file,) = (tmp_path / "cache" / "checks").iterdir()
    assert file.stat().st_size < 2000
    other = tmp_path / "other.jsonl.gz"
    write_cuts(other, list(first)[:-1] + list(make_and_open(tmp_path)))
    assert _opened(other, monkeypatch)[1] == COUNT, "other bytes are checked"
    assert _opened(manifest, monkeypatch)[1] == 0
    monkeypatch.setattr(remembered, "FORMAT", remembered.FORMAT + 1)
    assert _opened(manifest, monkeypatch)[1] == COUNT, "another version's result does not count"


def make_and_open(folder: Path) -> CutTable:
    return open_cuts(make_corpus(folder, 1, 5, "more"))


@pytest.mark.parametrize("damage", [lambda b: b[:-9], lambda b: b"", lambda b: b[:-40] + bytes([b[-40] ^ 1]) + b[-39:]])
def test_a_damaged_file_counts_as_not_there(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: object
) -> None:
    cuts = list(_opened(manifest, monkeypatch)[0])
    (file,) = (tmp_path / "cache" / "checks").iterdir()
    file.write_bytes(damage(file.read_bytes()))  # type: ignore[operator]
    again, checked = _opened(manifest, monkeypatch)
    assert checked == COUNT and list(again) == cuts and _opened(manifest, monkeypatch)[1] == 0


def test_a_cache_that_cannot_be_written_changes_nothing(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASRKIT_CACHE", str(manifest))  # a file
    assert [_opened(manifest, monkeypatch)[1] for _ in range(2)] == [COUNT, COUNT]


def _noted_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of cuts whose audio is read from now on."""
    read: list[str] = []
    real = checks.read_samples

    def noted(cut: Cut) -> Tensor:
        read.append(cut.id)
        return real(cut)

    monkeypatch.setattr(checks, "read_samples", noted)
    return read


def test_audio_is_read_once_until_it_changes(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = _noted_reads(monkeypatch)
    table = open_cuts(manifest)
    path = Path(table[3].recording.sources[0].source)
    assert find_bad_cuts(table, read_audio=True) == [] and len(read) == COUNT
    assert find_bad_cuts(table, read_audio=True, first=2) == [] and len(read) == COUNT
    sound, rate = soundfile.read(path)
    soundfile.write(path, 0 * sound, rate)
    os.utime(path, ns=(0, 0))
    for _ in range(2):
        assert [finding.kind for finding in find_bad_cuts(table, read_audio=True)] == ["silent"]
    assert len(read) == 2 * COUNT
    path.unlink()
    assert [finding.kind for finding in find_bad_cuts(table, read_audio=True)] == ["unreadable"]


def test_only_some_cuts_of_a_large_manifest_are_read(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = _noted_reads(monkeypatch)
    assert find_bad_cuts(open_cuts(manifest), read_audio=True, first=3) == []
    assert read == ["train-0", "train-5", "train-11"]


def test_texts_are_tokenized_once(manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = open_cuts(manifest)
    tokenizer = train_tokenizer(["alpha bravo"], "char", 30, tmp_path / "t" / "tokenizer.model")
    findings = find_bad_cuts(table, tokenizer)
    assert findings and {finding.kind for finding in findings} == {"characters"}
    monkeypatch.setattr(tokenizer, "cannot_spell", None)
    assert find_bad_cuts(table, tokenizer) == findings


def _batches(manifest: Path, folder: Path) -> TrainBatches:
    table = open_cuts(manifest)
    tokenizer = train_tokenizer(map(table.text_of, range(COUNT)), "char", 30, folder / "t" / "tokenizer.model")
    data = DataConfig(max_duration=10.0, num_buckets=1)
    return TrainBatches(table, BucketPlan(table.durations, 8.0, 1, 1, 3), 1, data, tokenizer, None, 3)


def test_a_bad_cut_met_in_training_is_named_and_replaced_or_ends_it(manifest: Path, tmp_path: Path) -> None:
    batches = _batches(manifest, tmp_path)
    before = [batches[number] for number in range(6)]
    for row in (4, 7):
        Path(batches.table[row].recording.sources[0].source).unlink()
    with pytest.raises(UserError, match=r"cut train-(4|7): unreadable: no file .*bad_cuts=skip"):
        [batches[number] for number in range(batches.plan.steps_per_epoch)]
    batches.skip_bad = True
    after = [batches[number] for number in range(6)]
    named = {cut_id for batch in after for cut_id in batch.left_out}
    assert named == {"train-4", "train-7"} and all(
        "no file" in why for batch in after for why in batch.left_out.values()
    )
    for old, new in zip(before, after, strict=True):
        assert len(old.cut_ids) == len(new.cut_ids) and not {"train-4", "train-7"} & {*new.cut_ids}
        good = [row for row, cut_id in enumerate(old.cut_ids) if cut_id not in ("train-4", "train-7")]
        assert [new.cut_ids[row] for row in good] == [old.cut_ids[row] for row in good]
    for row in range(COUNT):
        Path(batches.table[row].recording.sources[0].source).unlink(missing_ok=True)
    with pytest.raises(UserError, match="12 cuts in a row cannot be read"):
        batches[0]


@given(st.lists(st.floats(0.5, 20.0), min_size=1, max_size=20), st.data())
@settings(max_examples=40, deadline=None)
def test_cuts_alike_are_all_others_the_next_shorter_first(durations: list[float], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(durations) - 1))
    alike = list(BucketPlan(np.array(durations), 30.0, 3, 1, 0).alike(index))
    assert sorted([*alike, index]) == list(range(len(durations)))
    if min(durations) < durations[index]:
        assert durations[alike[0]] == max(length for length in durations if length < durations[index]) or (
            durations[alike[0]] == durations[index]
        )


@pytest.mark.slow
def test_a_training_goes_on_without_the_cuts_that_it_cannot_read(manifest: Path, tmp_path: Path) -> None:
    Path(open_cuts(manifest)[4].recording.sources[0].source).unlink()
    words = ["train-backbone", "--manifest", manifest, "--out", tmp_path / "run", "--max-duration", 8]
    small = quick("model.size=tiny", "model.num_layers=1", "tokenizer.vocab_size=18", "data.check_first=2")
    refused = finish(*words, *small)
    assert refused.code == 1 and "cut train-4: unreadable: no file" in refused.err
    for workers in (0, 1):
        run = ["--out", tmp_path / f"run-{workers}"]
        done = finish(*words, *run, *small, *sets("bad_cuts=skip", f"data.num_workers={workers}", "training.steps=6"))
        assert done.code == 0 and done.err.count("left out: cut train-4: unreadable") == 1, done.err
    logs = [(tmp_path / f"run-{workers}" / "metrics.jsonl").read_text() for workers in (0, 1)]
    assert logs[0].count('"step"') == logs[1].count('"step"') == 6


def test_statistics_are_measured_once_until_the_audio_changes(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cut_audio, "WORTH", COUNT)
    read: list[str] = []
    real = cut_audio.cut_features

    def noted(cut: Cut) -> Tensor:
        read.append(cut.id)
        return real(cut)

    monkeypatch.setattr(cut_audio, "cut_features", noted)
    table = open_cuts(manifest)
    assert CutTable.joined([table]).digest == table.digest
    first, again = feature_statistics(table), feature_statistics(table)
    assert len(read) == COUNT and all(map(torch.equal, first, again))
    feature_statistics(table.take(np.arange(COUNT)))
    assert len(read) == 2 * COUNT, "other cuts than those of the manifest are not remembered"
    path = Path(table[3].recording.sources[0].source)
    sound, rate = soundfile.read(path)
    soundfile.write(path, 0.5 * sound, rate)
    os.utime(path, ns=(0, 0))
    assert not torch.equal(feature_statistics(table)[0], first[0]) and len(read) == 3 * COUNT


def test_what_nobody_uses_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASRKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(remembered, "MOST", 2)

    def know(name: str) -> bool:
        return remembered.recall("kind", [name]) is not None

    def set_age(days: float) -> None:
        for path in remembered.folder().iterdir():
            os.utime(path, (path.stat().st_mtime - 86400 * days,) * 2)

    for name in "abc":
        remembered.remember("kind", [name], {"x": np.arange(3)})
        set_age(1)
    assert [know(name) for name in "abc"] == [False, True, True]
    set_age(remembered.UNUSED_DAYS - 1)
    assert know("b")
    set_age(2)
    assert know("b")  # it was used a moment ago
    set_age(0)
    remembered.remember("kind", ["d"], {"x": np.arange(3)})
    assert [know(name) for name in "bcd"] == [True, False, True]


def test_what_cannot_be_marked_as_used_is_still_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that several machines read and one writes."""
    monkeypatch.setenv("ASRKIT_CACHE", str(tmp_path))
    remembered.remember("kind", ["a"], {"x": np.arange(3)})

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    known = remembered.recall("kind", ["a"])
    assert known is not None and known["x"].tolist() == [0, 1, 2]


def test_nothing_is_kept_of_a_manifest_that_nobody_has(manifest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = set(manifests._OPENED)  # of tests whose cuts are still there
    table = open_cuts(manifest)
    part, unpack = table.without({"train-0"}), manifests._unpacked
    del table
    with monkeypatch.context() as patch:
        patch.setattr(manifests, "_unpacked", None)  # it is not read again as long as a part of it is there
        assert len(open_cuts(manifest)) == len(part) + 1 == COUNT
    del part
    gc.collect()
    assert others.issuperset(manifests._OPENED) and unpack is manifests._unpacked
    assert len(open_cuts(manifest)) == COUNT


def test_a_tokenizer_s_sample_has_every_character(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = open_cuts(manifest)
    texts = [table.text_of(row) for row in range(COUNT)]
    assert tokenizer_texts(table, None) == tokenizer_texts(table, COUNT) == texts
    rewrite(
        manifest, lambda number, cut: cut["supervisions"][0].update(text="alpha ñ" if number in (4, 7) else "alpha")
    )
    table = open_cuts(manifest)
    monkeypatch.setattr(tokenizer_texts_module, "PART", 3)
    for parts in (1, 10**9):  # in several processes, and in one
        monkeypatch.setattr(tokenizer_texts_module, "MANY_PARTS", parts)
        assert tokenizer_texts(table, 3) == ["alpha", "alpha", "alpha", "alpha ñ"]


def test_texts_are_checked_at_a_glance_as_one_by_one(tmp_path: Path) -> None:
    texts = ["alpha bravo", "alphä", "", "  alpha\tbravo ", "aaaa", "<blk>", "bravo " * 40]
    tokenizer = train_tokenizer(["alpha bravo", "a b"], "char", 30, tmp_path / "t" / "tokenizer.model")
    tokens = tokenizer.encode_all(texts)
    assert tokens == list(map(tokenizer.encode, texts))
    assert tokenizer.spelled(texts, tokens) == [tokenizer.cannot_spell(text) is None for text in texts]
    assert tokenizer.spelled([], tokenizer.encode_all([])) == []


_VALUES = st.sampled_from(
    [0, 1, 2, 0.5, 1.00003, 2.7, -0.5, "en", "", " ", None, "two words", [0], [0, 1], {}, {"shape": [1]}, []]
)
_PATHS = st.sampled_from(
    [
        *(["start"], ["duration"], ["channel"], ["custom"], ["features"], ["type"], ["recording"], ["unknown"]),
        *(["supervisions"], ["custom", "x"], ["recording", "duration"], ["recording", "transforms"], ["recording", "x"]),
        *(["recording", "channel_ids"], ["recording", "sources", 0, "x"], ["recording", "sources", 0, "channels"]),
        *(["supervisions", 0, name] for name in ("start", "duration", "text", "language", "custom", "alignment", "x", "id")),
        ["supervisions", 0, "custom", "x"],
    ]
)  # fmt: skip


@given(st.lists(st.tuples(_PATHS, _VALUES), max_size=3), st.sampled_from(["en", None]), st.floats(0.1, 4))
@settings(max_examples=300, deadline=None)
def test_a_row_of_json_is_that_of_the_cut(
    changes: list[tuple[list[Any], Any]], language: str | None, end: float
) -> None:
    """What lhotse would refuse has no row of JSON either."""
    samples = round(end * 16000)
    made = make_cut(
        "a", Path("a"), sampling_rate=16000, num_samples=samples, text="b", language=language, custom={"x": 1}
    )
    data = without_nulls(made.to_dict())
    assert row_of_json(data) is not None
    for path, value in changes:
        target = data
        for name in path[:-1]:
            try:
                target = target[name]
            except (KeyError, IndexError, TypeError):
                target = {}
        if isinstance(target, dict):
            target[path[-1]] = deepcopy(value)  # the values drawn are shared; one in itself is no JSON
    data = without_nulls(data)
    if check_cut(data):
        return
    known = row_of_json(deepcopy(data))
    if known is not None:
        assert known == row_of(deserialize_item(deepcopy(data)))
