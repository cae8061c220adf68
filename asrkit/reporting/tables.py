"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def _table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    """A table that fits 80 columns: texts on the left, numbers on the right."""
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def percent(rate: float | None) -> str:
    """``12.34`` of 0.1234; a dash where there is no rate."""
    return "-" if rate is None else f"{100 * rate:.2f}"


def table_console() -> Console:
    """Standard output as a console that cuts no column off, in a file or in a narrow terminal."""
    console = Console()
    return Console(width=max(console.width, 120))


def evaluation_table(results: Sequence[dict[str, Any]]) -> Table:
    """One block a method: a row for each language, where there are several, and the total."""
    numbers = ("cuts", "words", "WER %", "95 %", "sub", "ins", "del", "CER %", "RTF")
    table = _table(f"{results[0]['manifest']} by {results[0]['run']}", "method", "lang", numbers=numbers)
    for result in results:
        languages = result["languages"]
        rows = list(languages.items()) if len(languages) > 1 else []
        for language, counts in rows:
            table.add_row(result["method"], language or "unknown", *_cells(counts), "")
        name = "all" if rows else next(iter(languages), "")
        speed = f"{result['real_time_factor']:.4f}"
        table.add_row(result["method"], name, *_cells(result["total"]), speed, style="bold", end_section=bool(rows))
    threads = f", {results[0]['threads']} thread(s)" if results[0]["device"] == "cpu" else ""
    table.caption = f"RTF: seconds, features included, per second of audio ({results[0]['device']}{threads})"
    table.caption_justify = "left"
    return table


def _cells(counts: dict[str, Any]) -> list[str]:
    interval = counts["wer_95"]
    return [
        str(counts["utterances"]),
        str(counts["words"]),
        percent(counts["wer"]),
        "-" if interval is None else f"{percent(interval[0])}-{percent(interval[1])}",
        str(counts["substitutions"]),
        str(counts["insertions"]),
        str(counts["deletions"]),
        percent(counts["cer"]),
    ]


def run_tables(description: dict[str, Any]) -> list[Table]:
    """Stages, parts and evaluations of a run, as ``describe_run`` gives them."""
    stages = _table("stages", "stage", "created", "metrics", numbers=("step", "seconds"))
    for entry in description["stages"]:
        metrics = ", ".join(f"{name} {_number(value)}" for name, value in (entry.get("metrics") or {}).items())
        texts = (entry.get("stage"), entry.get("created"), metrics, entry.get("step"), entry.get("seconds"))
        stages.add_row(*("-" if text in (None, "") else str(text) for text in texts))
    parts = _table("parameters, statistics included", "part", numbers=("parameters", "bytes"))
    for part in description["parts"]:
        parts.add_row(part["part"], f"{part['parameters']:,}", f"{part['bytes']:,}")
    parts.add_section()
    parts.add_row("all", f"{description['parameters']:,}", f"{description['bytes']:,}", style="bold")
    tables = [stages, parts]
    if description["evaluations"]:
        numbers = ("words", "WER %", "CER %", "RTF")
        scores = _table("evaluations", "manifest", "method", "weights", numbers=numbers)
        for row in description["evaluations"]:
            rates = (percent(row["wer"]), percent(row["cer"]), f"{row['real_time_factor']:.4f}")
            weights = "these" if row["current"] else "earlier"
            scores.add_row(row["manifest"], row["method"], weights, str(row["words"]), *rates)
        tables.append(scores)
    return tables


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summary_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What a chain of stages achieved, as ``summarise_runs`` gives it."""
    numbers = ("WER %", "CER %", "words", "bytes", "seconds", "RTF")
    table = _table("summary", "stage", "configuration", "manifest", "method", numbers=numbers)
    for row in rows:
        table.add_row(
            *(row[key] for key in ("stage", "configuration", "manifest", "method")),
            percent(row["wer"]),
            percent(row["cer"]),
            str(row["words"]),
            f"{row['bytes']:,}",
            f"{row['seconds']:.0f}",
            f"{row['real_time_factor']:.4f}",
        )
    return table
