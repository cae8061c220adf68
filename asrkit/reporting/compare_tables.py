"""Comparisons for a terminal: a table of all, and for each what it means in words and where the difference comes from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.table import Table

from asrkit.reporting.compare import LEVEL, Comparison, Part
from asrkit.reporting.tables import percent, plain_table, points

FEW_GROUPS = 10
WHOLE = {"speaker": "speakers", "utterance": "utterances", "language": "languages"}


def probability(p: float | None) -> str:
    """``0.034``; ``<0.001`` below; a dash of None."""
    return "-" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """A row for the baseline and one for each system compared with it."""
    first = comparisons[0]
    numbers = ["WER %", "change", "95 % interval", "p", "p Holm", "sub", "ins", "del", "better", "worse", "same"]
    table = plain_table(f"{first.words} words in {first.utterances} utterances", "system", numbers=numbers)
    table.add_column("significant")
    table.add_row(_seeds(first.baseline, first.baseline_seeds), percent(first.baseline_wer))
    for row in comparisons:
        table.add_row(
            _seeds(row.system, row.seeds),
            percent(row.wer),
            points(row.difference),
            " to ".join(map(points, row.interval_95)),
            probability(row.p_value),
            probability(row.p_holm),
            *map(points, (row.substitutions, row.insertions, row.deletions)),
            *map(str, (row.wins, row.losses, row.ties)),
            "yes" if row.significant else "no",
            style="bold" if row.significant else None,
        )
    table.caption = (
        f"change, sub, ins, del: points of WER from {first.baseline}, below 0 is better; the interval "
        f"resamples {first.groups} {WHOLE[first.by]}\nbetter, worse, same: utterances with fewer, more, as many errors"
    )
    table.caption_justify = "left"
    return table


def _seeds(name: str, count: int) -> str:
    return name if count == 1 else f"{name} ({count} seeds)"


def explain(row: Comparison) -> Iterator[str]:
    """What a comparison says, in sentences."""
    size = abs(100 * row.difference)
    better = "fewer" if row.difference < 0 else "more"
    p = row.p_value
    spread = f"{_either_way(row.interval_95)} (95 % interval, other {WHOLE[row.by]} of this kind)"
    chance = f"equally good systems differ this much or more in {_per_cent(p)} of test sets (p {probability(p)})"
    heading = f"{row.system} makes {size:.2f} {better} errors in 100 words than {row.baseline}"
    if row.significant:
        yield f"{heading}; the difference is significant:"
    elif row.difference == 0:
        yield f"{row.system} makes as many errors as {row.baseline}:"
    elif row.p_holm < LEVEL:
        yield f"{heading}; that is significant here, but may not hold for other {WHOLE[row.by]}:"
    else:
        yield f"{heading}; the difference is not significant:"
    yield f"  the difference is {spread};"
    same = probability(row.p_holm) == probability(p)
    yield f"  {chance}" + (
        "." if same else f"; corrected for all systems compared here, p is {probability(row.p_holm)}."
    )
    if row.equivalence is not None:
        low, high = row.equivalence.interval_90
        margin = 100 * row.equivalence.margin
        shown = "are the same" if row.equivalence.shown else "have not been shown to be the same"
        yield (
            f"  They {shown} within {margin:g} point{'' if margin == 1 else 's'} "
            f"(90 % interval {points(low)} to {points(high)}, p {probability(row.equivalence.p)})."
        )
    if row.groups < FEW_GROUPS:
        yield (
            f"  Only {row.groups} {WHOLE[row.by]}, which makes the interval wide"
            + ("." if row.by == "utterance" else "; --by utterance asks about other utterances of the same ones.")
        )


def _either_way(interval: tuple[float, float]) -> str:
    ends = [f"{abs(100 * end):.2f} {'fewer' if end < 0 else 'more'}" for end in interval]
    return f"between {ends[0]} and {ends[1]}"


def _per_cent(p: float) -> str:
    return "less than 0.1 %" if p < 0.001 else f"{100 * p:.1f} %"


def part_tables(row: Comparison) -> Iterator[Table]:
    """Where the difference comes from: lengths, languages, speakers, words, utterances; those that changed."""
    yield _rates("by length", row.lengths)
    if len(row.languages) > 1:
        yield _rates("by language", row.languages)
    if len(row.speakers) > 1:
        yield _rates("by speaker", sorted(row.speakers, key=lambda part: part.change))
    yield _errors("words (+: inserted)", row.improved_words, row.worsened_words)
    yield _errors("utterances", row.improved_utterances, row.worsened_utterances)


def _rates(title: str, parts: Sequence[Part]) -> Table:
    table = plain_table(title, "part", numbers=("words", "baseline %", "WER %", "change"))
    for part in parts:
        rates = [errors / part.words if part.words else None for errors in (part.baseline_errors, part.errors)]
        change = points(part.change / part.words) if part.words else f"{part.change:+g} errors"
        table.add_row(part.name or "unknown", str(part.words), *map(percent, rates), change)
    return table


def _errors(title: str, improved: Sequence[Part], worsened: Sequence[Part]) -> Table:
    table = plain_table(title, "better", numbers=("errors",))
    table.add_column("worse")
    table.add_column("errors", justify="right", no_wrap=True)
    for index in range(max(len(improved), len(worsened))):
        cells = []
        for parts in (improved, worsened):
            part = parts[index] if index < len(parts) else None
            cells += ["", ""] if part is None else [part.name, f"{part.baseline_errors:g} to {part.errors:g}"]
        table.add_row(*cells)
    return table
