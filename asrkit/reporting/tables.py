"""Results as tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from asrkit.reporting.console import PlainConsole
from asrkit.reporting.results import manifest_name


def plain_table(title: str, *columns: str, numbers: Sequence[str] = ()) -> Table:
    """A table that fits 80 columns: texts on the left, numbers on the right."""
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def percent(rate: float | None) -> str:
    """``12.34`` of 0.1234; a dash where there is no rate."""
    return "-" if rate is None else f"{100 * rate:.2f}"


def points(difference: float) -> str:
    """``-2.10`` of -0.021: points of WER, with the sign."""
    return f"{100 * difference:+.2f}"


def table_console() -> PlainConsole:
    """Standard output as a console that cuts no column off, in a file or in a narrow terminal."""
    return PlainConsole(width=max(PlainConsole().width, 140))


def latency(milliseconds: float | None) -> str:
    """``677.5 ms``; a dash for a context that waits for the end."""
    return "-" if milliseconds is None else f"{milliseconds:g} ms"


def evaluation_table(results: Sequence[dict[str, Any]]) -> Table:
    """One block a method: a row for each language, where there are several, and the total.

    Where words are aligned, the total row has how late they were emitted, in milliseconds.
    """
    first = results[0]
    timed = first["emission_latency"] is not None
    numbers = ["cuts", "words", "WER %", "95 %", "sub", "ins", "del", "CER %", *["late ms", "90 %"] * timed, "RTF"]
    point = f"{first['variant']}, {first['context']}"
    if first["latency_ms"] is not None:
        point += f", latency {latency(first['latency_ms'])}"
    table = plain_table(f"{first['manifest']} by {first['run']} ({point})", "method", "lang", numbers=numbers)
    for result in results:
        languages = result["languages"]
        rows = list(languages.items()) if len(languages) > 1 else []
        for language, counts in rows:
            table.add_row(result["method"], language or "unknown", *_cells(counts), *[""] * (3 if timed else 1))
        name = "all" if rows else next(iter(languages), "")
        late = [_rounded(result["emission_latency"][key]) for key in ("mean_ms", "p90_ms")] if timed else []
        speed = f"{result['real_time_factor']:.4f}"
        table.add_row(
            result["method"], name, *_cells(result["total"]), *late, speed, style="bold", end_section=bool(rows)
        )
    threads = f", {first['threads']} thread(s)" if first["device"] == "cpu" else ""
    table.caption = f"RTF: seconds, features included, per second of audio ({first['device']}{threads})"
    if timed:
        table.caption += (
            "\nlate ms, 90 %: from the end of a rightly recognized word until it is known; mean, 90th percentile"
        )
    table.caption_justify = "left"
    return table


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


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
    """Stages, variants, sub-models, parts and evaluations of a run, as ``describe_run`` gives them."""
    tables = [_stages(description)]
    if description["variants"]:
        tables.append(_variants(description))
    if description["submodels"]:
        tables.append(_submodels(description))
    tables.append(_parts(description))
    if description["compression"]:
        tables.append(_compression(description["compression"]))
    if description["evaluations"]:
        tables.append(_evaluations(description))
    return tables


def _compression(compression: dict[str, Any]) -> Table:
    """Bytes of each part as stored for use, beside those of float32."""
    table = plain_table("stored for use", "part", "bits", numbers=("kept %", "float bytes", "bytes", "of float %"))
    rows = compression["parts"]
    for row in rows:
        kept = f"{100 * row['kept'] / row['weights']:.1f}" if row["weights"] else "-"
        _size_row(table, row["part"], ", ".join(map(str, row["bits"])) or "float", kept, [row])
    _size_row(table, "all", "", "", rows)
    stayed = compression["float_layers"]
    table.caption = (
        f"linear layers in float: {', '.join(stayed) or 'none'}; convolutions, norms and embeddings always are"
    )
    table.caption_justify = "left"
    return table


def _size_row(table: Table, part: str, bits: str, kept: str, rows: Sequence[dict[str, Any]]) -> None:
    stored, plain = (sum(row[key] for row in rows) for key in ("bytes", "float_bytes"))
    table.add_row(part, bits, kept, f"{plain:,}", f"{stored:,}", f"{100 * stored / plain:.1f}")


def _stages(description: dict[str, Any]) -> Table:
    table = plain_table("stages", "stage", "created", "metrics", numbers=("step", "seconds"))
    for entry in description["stages"]:
        metrics = ", ".join(_metric(name, value) for name, value in (entry.get("metrics") or {}).items())
        texts = (entry.get("stage"), entry.get("created"), metrics, entry.get("step"), entry.get("seconds"))
        table.add_row(*("-" if text in (None, "") else str(text) for text in texts))
    return table


def _metric(name: str, value: Any) -> str:
    """Error rates are fractions in files, percents on the screen, as in the tables."""
    if name.endswith(("wer", "cer")) and isinstance(value, int | float):
        return f"{name} {100 * value:.2f} %"
    return f"{name} {_number(value)}"


def _variants(description: dict[str, Any]) -> Table:
    """A line for each trained context beside a line for each manifest measured, whichever are more."""
    table = plain_table("variants", "variant", "sub-models", numbers=("parameters", "bytes"))
    for column in ("trained in", "latency", "best WER %", "on"):
        table.add_column(column)
    for row in description["variants"]:
        name = f"{row['variant']} (default)" if row["default"] else row["variant"]
        if off := [what for what in ("masks", "integers") if not row[what]]:
            name += f" without {' and '.join(off)}"
        best = [(percent(entry["wer"]), _where(entry)) for entry in row["best"]] or [("-", "")]
        table.add_row(
            name,
            ", ".join(row["submodels"]) or "-",
            f"{row['parameters']:,}",
            f"{row['bytes']:,}",
            "\n".join(entry["context"] for entry in row["contexts"]),
            "\n".join(latency(entry["latency_ms"]) for entry in row["contexts"]),
            "\n".join(rate for rate, _ in best),
            "\n".join(where for _, where in best),
        )
    table.caption = "parameters, bytes: of what runs, as stored for use; the pruning joiner, which only serves training, is left out"
    table.caption_justify = "left"
    return table


def _where(entry: dict[str, Any]) -> str:
    return f"{manifest_name(entry['manifest'])} {_digest(entry)} ({entry['context']}, {entry['search']})"


def _digest(row: dict[str, Any]) -> str:
    """The beginning of the manifest's digest, as result directories are named."""
    return "-" if row["manifest_sha256"] is None else str(row["manifest_sha256"])[:8]


def _submodels(description: dict[str, Any]) -> Table:
    table = plain_table(
        "sub-models", "sub-model", "kind", "layers", "position", "context", numbers=("dim", "parameters")
    )
    for row in description["submodels"]:
        dim = str(row["dim"]) if row["heads"] is None else f"{row['dim']} / {row['heads']} heads"
        texts = (row["submodel"], row["kind"], _ranges(row["layers"]), row["position"], row["context"], dim)
        table.add_row(*texts, f"{row['parameters']:,}")
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """``0-2, 5`` of 0, 1, 2, 5."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else str(part[0]) for part in parts)


def _parts(description: dict[str, Any]) -> Table:
    table = plain_table("parameters, statistics included", "part", numbers=("parameters", "bytes"))
    for part in description["parts"]:
        table.add_row(part["part"], f"{part['parameters']:,}", f"{part['bytes']:,}")
    table.add_section()
    table.add_row("all", f"{description['parameters']:,}", f"{description['bytes']:,}", style="bold")
    return table


def _evaluations(description: dict[str, Any]) -> Table:
    numbers = ("words", "WER %", "CER %", "late ms", "RTF")
    columns = ("manifest", "digest", "variant", "context", "search", "weights")
    table = plain_table("evaluations", *columns, numbers=numbers)
    for row in description["evaluations"]:
        late = _rounded((row["emission_latency"] or {}).get("mean_ms"))
        rates = (percent(row["wer"]), percent(row["cer"]), late, f"{row['real_time_factor']:.4f}")
        weights = "these" if row["current"] else "earlier"
        texts = (row["manifest"], _digest(row), row["variant"], row["context"], row["search"], weights)
        table.add_row(*texts, str(row["words"]), *rates)
    return table


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def summary_table(rows: Sequence[dict[str, Any]]) -> Table:
    """What a chain of stages achieved, as ``summarize_runs`` gives it."""
    compared = any(row["comparison"] is not None for row in rows)
    numbers = ("WER %", *("change",) * compared, "CER %", "words", "bytes", "seconds", "RTF")
    table = plain_table("summary", "stage", "variant", "context", "manifest", "digest", "search", numbers=numbers)
    for row in rows:
        table.add_row(
            *(row[key] for key in ("stage", "variant", "context", "manifest")),
            _digest(row),
            row["search"],
            percent(row["wer"]),
            *([_change(row["comparison"])] if compared else []),
            percent(row["cer"]),
            str(row["words"]),
            f"{row['bytes']:,}",
            "-" if row["seconds"] is None else f"{row['seconds']:.0f}",
            f"{row['real_time_factor']:.4f}",
        )
    if compared:
        table.caption = (
            "change: points of WER from the baseline on the same manifest by the same search, below 0 is better\n"
            "*: significant, as `asrkit compare` says (its interval leaves out 0, and p, corrected for all rows, is below 0.05)"
        )
        table.caption_justify = "left"
    return table


def _change(comparison: dict[str, Any] | None) -> str:
    """``-2.10 *``: points of WER, marked where it is significant; a dash where nothing was compared."""
    if comparison is None:
        return "-"
    return f"{points(comparison['difference'])} {'*' if comparison['significant'] else ' '}"
