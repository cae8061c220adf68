"""Comparisons of systems whose every error is known."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest

from asrkit.config import from_dict, to_dict
from asrkit.errors import UserError
from asrkit.reporting.compare import Comparison, Part, System, compare, default_unit, reference_differences
from asrkit.reporting.compare_tables import comparison_table, explain, part_tables
from asrkit.reporting.console import PlainConsole
from asrkit.reporting.evaluations import matched
from asrkit.reporting.significance import paired_bootstrap
from asrkit.reporting.wer import Scored

TEXTS = ["please hold the line", "call forward on", "the line", "please call the office again today now", ""]


def system(name: str, *hypotheses: list[str], speakers: str = "") -> System:
    """One system, of a seed for each list of hypotheses; ``speakers`` has a letter for each utterance."""
    seeds = [
        tuple(
            Scored(f"cut-{index}", ref, hyp, "en" if index < 3 else "fr", speakers[index] if speakers else "")
            for index, (ref, hyp) in enumerate(zip(TEXTS, texts, strict=True))
        )
        for texts in hypotheses
    ]
    return System(name, tuple(seeds))


BASELINE = ["please hold line", "call forward on", "a line", "please call the office again today now", "hello"]
BETTER = ["please hold the line", "call forward on", "the line now", "please call office again today now", ""]


def test_a_comparison_by_hand() -> None:
    """The baseline deletes `the`, takes `the` for `a`, inserts `hello`; the other inserts `now` and deletes `the`."""
    (row,) = compare(system("a", BASELINE), [system("b", BETTER)])
    assert (row.baseline, row.system, row.utterances, row.words) == ("a", "b", 5, 16)
    assert row.baseline_wer == pytest.approx(3 / 16) and row.wer == pytest.approx(2 / 16)
    assert row.difference == pytest.approx(-1 / 16)
    assert (row.substitutions, row.insertions, row.deletions) == pytest.approx((-1 / 16, 0, 0))
    assert (row.wins, row.losses, row.ties) == (2, 1, 2)  # cut-2 has one error of another kind in both
    assert (row.by, row.groups, row.speakers) == ("utterance", 5, [])
    errors = np.array([[1, 0, 1, 0, 1], [0, 0, 1, 1, 0]])
    estimate = paired_bootstrap(errors[:1], errors[1:], np.array([4, 3, 2, 7, 0]))
    assert row.interval_95 == estimate.interval() and row.p_bootstrap == estimate.p_value
    # cut-0: -1; cut-2, of two words, is one segment: 0; cut-3: +1; cut-4: -1. With any signs the sum is as far from 0.
    assert row.segments == 4 and row.p_mapsswe == 1.0 and not row.significant
    assert [(part.name, part.words, part.baseline_errors, part.errors) for part in row.languages] == [
        ("en", 9, 2, 1),
        ("fr", 7, 1, 1),
    ]
    assert {part.name: (part.words, part.baseline_errors, part.errors) for part in row.lengths} == {
        "no words": (0, 1, 0),
        "1-5 words": (9, 2, 1),
        "6-10 words": (7, 0, 1),
    }
    words = [
        Part(name="+hello", words=0, baseline_errors=1, errors=0),
        Part(name="the", words=3, baseline_errors=2, errors=1),
    ]
    assert row.improved_words == words
    assert [part.name for part in row.worsened_words] == ["+now"]
    assert [part.name for part in row.improved_utterances] == ["cut-0", "cut-4"]
    assert [part.name for part in row.worsened_utterances] == ["cut-3"]
    assert from_dict(Comparison, to_dict(row), "it") == row


def test_exchanged_systems_and_equal_ones() -> None:
    first, second = system("a", BASELINE), system("b", BETTER)
    (forward,), (back,) = compare(first, [second]), compare(second, [first])
    assert forward.difference == -back.difference and forward.p_bootstrap == back.p_bootstrap
    assert forward.p_mapsswe == back.p_mapsswe
    assert (forward.wins, forward.losses, forward.ties) == (back.losses, back.wins, back.ties)
    assert [part.name for part in forward.improved_words] == [part.name for part in back.worsened_words]
    (same,) = compare(first, [first], margin=0.01)
    assert (same.difference, same.p_bootstrap, same.p_mapsswe, same.interval_95) == (0, 1, 1, (0, 0))
    assert same.equivalence is not None and same.equivalence.shown and not same.significant


def many(name: str, missed: int, count: int = 120) -> System:
    """Utterances of five words, of which the first word is missed in the first ``missed``."""
    utterances = [
        Scored(
            f"{index}",
            "one two three four five",
            "two three four five" if index < missed else "one two three four five",
        )
        for index in range(count)
    ]
    return System(name, (tuple(utterances),))


def test_significance_is_corrected_for_the_number_of_systems() -> None:
    baseline = many("a", 0)
    (alone,) = compare(baseline, [many("b", 6)])
    assert alone.p_mapsswe == pytest.approx(2 / 2**6) and alone.significant
    rows = compare(baseline, [many("b", 6), many("c", 0), many("d", 60)])
    assert rows[0].p_holm == pytest.approx(2 * 2 / 2**6) and not rows[0].significant
    assert not rows[1].significant and rows[2].significant and rows[2].p_mapsswe == 0.0


def test_equivalence_wants_enough_words() -> None:
    (row,) = compare(many("a", 60), [many("b", 62)], margin=0.01)
    assert row.difference == pytest.approx(2 / 600)
    assert row.equivalence is not None and row.equivalence.shown
    assert max(map(abs, row.equivalence.interval_90)) < 0.01
    (row,) = compare(many("a", 4, 8), [many("b", 5, 8)], margin=0.01)
    assert row.equivalence is not None and not row.equivalence.shown


def test_speakers_are_drawn_where_they_are_known() -> None:
    named = system("a", BASELINE, speakers="ssttu")
    assert default_unit(named.utterances) == "speaker"
    (row,) = compare(named, [system("b", BETTER, speakers="ssttu")])
    assert (row.by, row.groups) == ("speaker", 3)
    assert [(part.name, part.words, part.errors) for part in row.speakers] == [("s", 7, 0), ("t", 9, 2), ("u", 0, 0)]
    (row,) = compare(named, [system("b", BETTER, speakers="ssttu")], by="utterance")
    assert (row.by, row.groups) == ("utterance", 5) and len(row.speakers) == 3
    (row,) = compare(named, [system("b", BETTER)], by="language")
    assert (row.by, row.groups) == ("language", 2)


@pytest.mark.parametrize("speakers", ["", "sssss", "ssssu"])
def test_utterances_are_drawn_where_there_are_no_two_speakers(speakers: str) -> None:
    """cut-4, without words, is no second speaker's."""
    assert default_unit(system("a", BASELINE, speakers=speakers).utterances) == "utterance"


def test_one_unknown_speaker_is_one_too_many() -> None:
    utterances = system("a", BASELINE, speakers="ssttu").utterances
    assert default_unit((*utterances[:4], replace(utterances[4], speaker=""))) == "utterance"


def test_groups_that_show_nothing_are_refused() -> None:
    with pytest.raises(UserError, match="--by speaker: not every utterance names its speaker"):
        compare(system("a", BASELINE), [system("b", BETTER)], by="speaker")
    with pytest.raises(UserError, match="--by speaker: the test set has 1 with words"):
        compare(system("a", BASELINE, speakers="ssssu"), [system("b", BETTER)], by="speaker")


def test_several_seeds() -> None:
    (row,) = compare(system("a", BASELINE, BASELINE), [system("b", BETTER, BASELINE, BETTER)])
    assert (row.baseline_seeds, row.seeds) == (2, 3)
    assert row.wer == pytest.approx((2 + 3 + 2) / 3 / 16) and row.difference == pytest.approx(-(2 / 3) / 16)
    assert row.p_mapsswe is None and row.segments is None and row.p_holm == row.p_bootstrap
    assert [part.errors for part in row.improved_words] == pytest.approx([1 / 3, 4 / 3])


def test_references_that_differ_are_named() -> None:
    one = system("a", BASELINE).utterances
    other = (replace(one[0], ref="hold on"), *one[1:4], Scored("cut-9", "more", "more"))
    assert reference_differences(one, tuple(reversed(one))) == []
    lines = ["cut cut-0: 'please hold the line' and 'hold on'", "cut cut-4 is only in the first"]
    assert reference_differences(one, other) == [*lines, "cut cut-9 is only in the second"]
    with pytest.raises(UserError, match="a and b were not evaluated on the same references .*only in the first"):
        matched([System("a", (one,)), System("b", (other,))])
    with pytest.raises(UserError, match="a: two cuts have the same id"):
        matched([System("a", ((*one, one[0]),)), System("b", (other,))])
    with pytest.raises(UserError, match="a cut occurs twice"):
        matched([System("a", (one,)), System("b", ((*one, one[0]),))])


def test_order_does_not_matter_and_speakers_are_shared() -> None:
    first, second = system("a", BASELINE), system("b", BETTER, speakers="ssttu")
    turned = System("b", (tuple(reversed(second.utterances)),))
    aligned = matched([first, turned])
    assert [one.cut_id for one in aligned[1].utterances] == [one.cut_id for one in first.utterances]
    assert [one.speaker for one in aligned[0].utterances] == list("ssttu")
    assert [one.hyp for one in aligned[1].utterances] == BETTER


def shown(rows: list[Comparison]) -> str:
    console = PlainConsole(width=200, record=True, file=io.StringIO())
    console.print(comparison_table(rows))
    for row in rows:
        for table in part_tables(row):
            console.print(table)
    return console.export_text()


def test_the_tables_and_the_words() -> None:
    rows = compare(many("a", 60), [many("b[x]", 0)])
    text = shown(rows)
    assert "b[x]" in text and "-10.00" in text and "yes" in text and "<0.001" in text and "120 utterances" in text
    sentences = "\n".join(explain(rows[0]))
    assert "b[x] makes 10.00 fewer errors in 100 words than a; the difference is significant" in sentences
    assert "in less than 0.1 % of test sets" in sentences
    rows = compare(system("a", BASELINE, speakers="ssttu"), [system("b", BETTER)], margin=0.01)
    sentences = "\n".join(explain(rows[0]))
    assert "b makes 6.25 fewer errors in 100 words than a; the difference is not significant" in sentences
    assert "They have not been shown to be the same within 1 point " in sentences
    assert "Only 3 speakers" in sentences
    assert "6-10 words" in shown(rows)
