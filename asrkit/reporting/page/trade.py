"""What accuracy costs: word error rate against bytes and against time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from asrkit.reporting.page.figures import MARKERS, color, panel, svg
from asrkit.reporting.page.systems import Measured, TestSet, described

KILO = 1000


def draw_trade(tests: TestSet) -> list[str]:
    """WER with its 95 % interval against bytes and against the real-time factor, as SVG; one point a system."""
    axes: list[tuple[str, Callable[[Measured], float | None]]] = [
        ("kilobytes", lambda one: None if one.bytes is None else one.bytes / KILO),
        ("real-time factor", lambda one: one.result.real_time_factor or None),  # 0: nobody measured it
    ]
    return [drawn for label, value in axes if (drawn := _panel(tests.systems, label, value))]


def _panel(systems: Sequence[Measured], label: str, value: Callable[[Measured], float | None]) -> str:
    models = list(dict.fromkeys(one.model.name for one in systems))
    with panel(f"WER % against {label}", 5.2, 3.8) as (figure, axes):
        titles, drawn = {}, False
        for number, one in enumerate(systems):
            wer, x = one.result.total.wer, value(one)
            if wer is None:
                continue
            hue = models.index(one.model.name)
            if x is None:  # a yardstick of unknown size
                axes.axhline(100 * wer, color=color(hue), linestyle=":", label=one.label, gid=f"trade-{label}-{number}")
            else:
                low, high = one.result.total.wer_95 or (wer, wer)
                axes.errorbar(
                    [x],
                    [100 * wer],
                    [[100 * max(0.0, wer - low)], [100 * max(0.0, high - wer)]],
                    color=color(hue),
                    linewidth=1,
                    alpha=0.35,
                )
                axes.plot([x], [100 * wer], MARKERS[hue % len(MARKERS)], color=color(hue), markersize=8 if one.main else 5,
                          fillstyle="full" if one.main else "none", label=one.model.name if one.main else None,
                          gid=f"trade-{label}-{number}")  # fmt: skip
                drawn = True
            titles[f"trade-{label}-{number}"] = described(one)
        if not drawn:
            return ""
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_plain))  # matplotlib's own labels are formulas
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0, 7.0)))
        axes.set_xlabel(label)
        figure.legend(loc="outside lower center", ncols=3)
        return svg(figure, f"Word error rate against {label}. {'; '.join(titles.values())}", titles)


def _plain(value: float, position: int) -> str:
    return f"{value:,.10g}"
