"""Options of commands that decode with language models and hotwords."""

from __future__ import annotations

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
HotwordsScore = Annotated[float | None, fusion(help="Added for each token of a hotword. [default: 1.5]")]
Tuned = Annotated[
    Path | None,
    fusion("--decoding", help="File that `asrkit tune` wrote: beam, weights and models. Other options override it."),
]


def fusion_options(
    tuned: Path | None, beam: int | None, lm_rescore: bool, parts: dict[str, Path | None], settings: dict[str, Any]
) -> tuple[int, FusionRequest | None]:
    """The beam and the request: the given options override those of --decoding; None if there are none.

    Raises:
        UserError: a line for each value out of range.
    """
    settings = given({**settings, "lm_use": "rescore" if lm_rescore else None})
    if tuned is None and not settings and not any(parts.values()):
        return beam or 4, None
    from asrkit.config import resolve
    from asrkit.decoding.fusion import FusionConfig, FusionRequest
    from asrkit.decoding.tuned import overridden, read_tuned
    from asrkit.errors import UserError

    found = None if tuned is None else read_tuned(tuned)
    base = FusionRequest() if found is None else found.request
    names = {"lm": ("lm_scale", "lm_use"), "lodr": ("lodr_scale",), "hotwords": ("hotwords_score",)}
    findings = [
        f"--{'lm-rescore' if key == 'lm_use' else key.replace('_', '-')}: has no effect without --{name}"
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
    return beam or (4 if found is None else found.beam), overridden(base, resolved, parts)
