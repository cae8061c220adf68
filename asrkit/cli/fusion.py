"""Options of commands that decode with language models and hotwords."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from asrkit.cli.options import given

if TYPE_CHECKING:
    from asrkit.decoding.fusion import FusionRequest

fusion = partial(typer.Option, rich_help_panel="Language models and hotwords, for beam searches")

Lm = Annotated[
    Path | None,
    fusion(
        "--lm",
        help="Language model: run directory of train-lm with the model's tokenizer, or an ARPA file. With --graph, ranks n-best texts.",
    ),
]
LmScale = Annotated[float | None, fusion(help="Weight of --lm. [default: 0.3]")]
LmRescore = Annotated[
    bool,
    fusion(
        "--lm-rescore", help="Use --lm only on the hypotheses that the search ends with, as sherpa-onnx does offline."
    ),
]
Lodr = Annotated[
    Path | None,
    fusion("--lodr", help="Low-order n-gram of the training texts to subtract: run directory or ARPA file."),
]
LodrScale = Annotated[float | None, fusion(help="Weight of --lodr. [default: 0.1]")]
LengthBonus = Annotated[float | None, fusion(help="Added to the score for each token. [default: 0]")]
BlankPenalty = Annotated[
    float | None, fusion(help="Subtracted from the blank's logit, against deletions. [default: 0]")
]
Temperature = Annotated[
    float | None, fusion(help="Divides the logits; above 1, the acoustic model counts less. [default: 1]")
]
HotwordsFile = Annotated[
    Path | None,
    fusion("--hotwords", help="File of words and phrases to prefer, one a line; `NAME :2.5` sets the score of one."),
]
HotwordsScore = Annotated[
    float | None, fusion(help="Added for each token of a hotword; half for the first. [default: 1.5]")
]
HotwordsLate = Annotated[
    bool,
    fusion(
        "--hotwords-late", help="Add it after a frame's best tokens are selected, as sherpa-onnx does; finds fewer."
    ),
]
Tuned = Annotated[
    Path | None,
    fusion(
        "--decoding",
        help="File that `asrkit tune` wrote: beam or graph, weights and models. Other options override it.",
    ),
]


@dataclass
class FusionOptions:
    """The options of what a beam search uses in addition to the acoustic model."""

    lm: Lm = None
    lm_scale: LmScale = None
    lm_rescore: LmRescore = False
    lodr: Lodr = None
    lodr_scale: LodrScale = None
    length_bonus: LengthBonus = None
    blank_penalty: BlankPenalty = None
    temperature: Temperature = None
    hotwords: HotwordsFile = None
    hotwords_score: HotwordsScore = None
    hotwords_late: HotwordsLate = False

    @property
    def parts(self) -> dict[str, Path | None]:
        """The files and directories, by option."""
        return {"lm": self.lm, "lodr": self.lodr, "hotwords": self.hotwords}

    @property
    def settings(self) -> dict[str, Any]:
        """The weights that were given, by the field of FusionConfig."""
        names = ("lm_scale", "lodr_scale", "length_bonus", "blank_penalty", "temperature", "hotwords_score")
        uses = {
            "lm_use": "rescore" if self.lm_rescore else None,
            "hotwords_use": "late" if self.hotwords_late else None,
        }
        return given({name: getattr(self, name) for name in names} | uses)


def fusion_request(
    options: FusionOptions, base: FusionRequest | None, graph: Path | None = None
) -> FusionRequest | None:
    """The request: what is given overrides ``base``, that of --decoding; None if there is neither.

    Args:
        graph: one that is given, which need not be that of --decoding either.

    Raises:
        UserError: a line for each value out of range.
    """
    settings, parts = options.settings, options.parts
    if base is None and not settings and not any(parts.values()):
        return None
    from asrkit.config import resolve
    from asrkit.decoding.fusion import FusionConfig, FusionRequest
    from asrkit.decoding.tuned import overridden
    from asrkit.errors import UserError

    base = base or FusionRequest()
    names = {"lm": ("lm_scale", "lm_use"), "lodr": ("lodr_scale",), "hotwords": ("hotwords_score", "hotwords_use")}
    options_of = {"lm_use": "lm-rescore", "hotwords_use": "hotwords-late"}
    findings = [
        f"--{options_of.get(key, key.replace('_', '-'))}: has no effect without --{name}"
        for name, keys in names.items()
        for key in keys
        if key in settings and parts.get(name) is None and getattr(base, name) is None
    ]
    try:
        resolved = resolve(FusionConfig, defaults=base.settings, options=settings)
    except UserError as error:
        raise UserError.of([*findings, *(f"--{line.replace('_', '-', 1)}" for line in error.lines)]) from None
    if findings:
        raise UserError.of(findings)
    return overridden(base, resolved, {**parts, "graph": graph})
