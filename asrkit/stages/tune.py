"""tune: the beam, scales and penalties with the fewest word errors on a dev manifest, by encoding once and decoding many times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from asrkit.config import from_dict, to_dict
from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.checks import decodable_cuts
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import digest_of
from asrkit.decoding.acoustic import EncoderOutput
from asrkit.decoding.choice import ContextChoice
from asrkit.decoding.evaluation import score
from asrkit.decoding.fusion import FusedMethod, Fusion, FusionConfig, FusionRequest, load_fusion
from asrkit.decoding.recognizer import Recognizer, load_recognizer
from asrkit.decoding.search import search
from asrkit.decoding.tuned import PARTS, Source, Trial, TunedDecoding, write_tuned
from asrkit.decoding.tuning import Settings, coordinate_search, parse_over
from asrkit.errors import UserError
from asrkit.reporting.progress import progress
from asrkit.reporting.wer import ErrorCounts, Scored, total_words


def tune(
    run_path: Path,
    manifest: Path,
    out: Path,
    over: str,
    *,
    request: FusionRequest | None = None,
    method: FusedMethod = "beam",
    beam: int = 4,
    variant: str | None = None,
    context: ContextChoice | None = None,
    max_duration: float = 200.0,
    device: str = "auto",
    threads: int | None = None,
    note: Callable[[str], None] = lambda line: None,
) -> TunedDecoding:
    """Try values of the options that ``over`` names, and write the best ones to ``out``.

    Args:
        manifest: cuts to count the errors on; their encoder frames stay in memory.
        over: names of options, with values where others than usual are to be tried; see ``parse_over``.
        request: the parts, and the settings to begin with. method: the search: the transducer's or CTC's.
        note: is called with each setting that was tried and its errors.

    Raises:
        UserError: everything wrong with the run directory, the manifest, the parts and the options, before any decoding.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    request = request or FusionRequest()
    values = _values(over, request, out)
    recognizer = load_recognizer(run_path, device, variant, context or ContextChoice(), [method])
    fusion = load_fusion(request, recognizer.tokenizer, recognizer.device)
    languages = recognizer.languages if recognizer.language is None else [recognizer.language]
    cuts, warnings = decodable_cuts(manifest, languages, recognizer.tokenizer)
    for line in [*recognizer.warnings, *warnings]:
        note(f"warning: {line}")
    encoded = _encoded(recognizer, cuts, max_duration)

    def errors(settings: Settings) -> float:
        how = _with(fusion, request, settings, recognizer)
        counts = _count(recognizer, encoded, method, int(settings["beam"]), how)
        note(f"{100 * counts.rate:6.2f} %  {', '.join(f'{name} {value:g}' for name, value in settings.items())}")
        return counts.rate

    start: Settings = {"beam": beam, **{name: _value(request.settings, name) for name in values if name != "beam"}}
    best, tried = coordinate_search(start, values, errors)
    tuned = TunedDecoding(
        method=method,
        beam=int(best["beam"]),
        settings=_config(request.settings, best),
        **{name: Source(**source) for name, source in fusion.sources.items()},
        recognizer=Source(path=str(run_path), sha256=recognizer.weights_sha256),
        tuned_on=Source(path=str(manifest), sha256=digest_of(manifest)),
        wer=min(wer for _, wer in tried),
        words=sum(len(text.split()) for batch, _ in encoded for text in batch.texts),
        trials=[Trial(settings=settings, wer=wer) for settings, wer in tried],
    )
    write_tuned(out, tuned)
    return tuned


def _values(over: str, request: FusionRequest, out: Path) -> dict[str, tuple[float, ...]]:
    """What to try of each option; refuses values that cannot be, and an ``out`` that cannot be written."""
    findings = [f"{out}: is a directory; choose another --out"] if out.is_dir() else []
    values: dict[str, tuple[float, ...]] = {}
    try:
        values = parse_over(over, [name for name in PARTS if getattr(request, name) is not None])
        for name, numbers in values.items():
            for number in numbers:
                _config(request.settings, {name: number})
    except UserError as error:
        findings += error.lines
    if findings:
        raise UserError.of(findings)
    return values


def _encoded(recognizer: Recognizer, cuts: CutTable, max_duration: float) -> list[tuple[Batch, EncoderOutput]]:
    """Every batch with its encoder frames; the features are not needed any more."""
    encoded = []
    with progress("encoding", sum(cut.duration for cut in cuts), "s of audio") as advance:
        for batch in evaluation_batches(cuts, max_duration):
            output = recognizer.model.encode(batch.features, batch.feature_lens, batch.languages)
            encoded.append(
                (replace(batch, features=batch.features.new_empty(0)), output)
            )  # a part would keep the whole
            advance(sum(batch.durations))
    return encoded


def _with(fusion: Fusion, request: FusionRequest, settings: Settings, recognizer: Recognizer) -> Fusion:
    """The fusion with other settings; hotwords have their score in their automaton, so that is made again."""
    how = replace(fusion, settings=_config(request.settings, settings))
    if how.hotwords is None or how.settings.hotwords_score == fusion.settings.hotwords_score:
        return how
    words = FusionRequest(how.settings, hotwords=request.hotwords)
    return replace(how, hotwords=load_fusion(words, recognizer.tokenizer, recognizer.device).hotwords)


def _count(
    recognizer: Recognizer,
    encoded: Sequence[tuple[Batch, EncoderOutput]],
    method: FusedMethod,
    beam: int,
    fusion: Fusion,
) -> ErrorCounts:
    """The word errors of all batches."""
    scored: list[Scored] = []
    for batch, output in encoded:
        hypotheses = search(recognizer.model, output, method, beam, recognizer.tokenizer.special_ids, fusion)
        scored += score(batch, hypotheses, recognizer.tokenizer)
    return total_words(scored)


def _value(settings: FusionConfig, option: str) -> float:
    return float(getattr(settings, option.replace("-", "_")))


def _config(settings: FusionConfig, changes: Settings) -> FusionConfig:
    """The settings with the options of ``changes``, but for the beam.

    Raises:
        UserError: a value is out of range.
    """
    named = {name.replace("-", "_"): value for name, value in changes.items() if name != "beam"}
    return from_dict(FusionConfig, {**to_dict(settings), **named}, "--over")
