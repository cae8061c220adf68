"""tune: the beam, scales and penalties with the fewest word errors on a dev manifest, by encoding once and decoding many times."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from asrkit.config import from_dict, to_dict
from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.checks import decodable_cuts
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import digest_of, text_of
from asrkit.decoding.acoustic import EncoderOutput
from asrkit.decoding.choice import ContextChoice
from asrkit.decoding.domain import Domain, LoadedDomain, Search, load_domain
from asrkit.decoding.evaluation import score
from asrkit.decoding.fusion import FusedMethod, FusionConfig, FusionRequest, load_fusion
from asrkit.decoding.graph_search import GraphOptions
from asrkit.decoding.recognizer import Recognizer, load_recognizer
from asrkit.decoding.tuned import PARTS, Source, Trial, TunedDecoding, write_tuned
from asrkit.decoding.tuning import Settings, coordinate_search, parse_over, usual_over
from asrkit.disk import check_writable
from asrkit.errors import UserError
from asrkit.reporting.progress import progress
from asrkit.reporting.wer import ErrorCounts, Scored, total_words

# The options by the settings they change; the beam is no setting of either.
FUSION_FIELDS = {
    "lm-scale": "lm_scale",
    "lodr-scale": "lodr_scale",
    "length-bonus": "length_bonus",
    "blank-penalty": "blank_penalty",
    "temperature": "temperature",
    "hotwords-score": "hotwords_score",
}
GRAPH_FIELDS = {
    "graph-scale": "scale",
    "search-beam": "search_beam",
    "output-beam": "output_beam",
    "max-active": "max_active",
}
C = TypeVar("C", FusionConfig, GraphOptions)


def tune(
    run_path: Path,
    manifest: Path,
    out: Path,
    over: str | None = None,
    *,
    domain: Domain | None = None,
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
        over: names of options, with values where others than usual are to be tried; see ``parse_over``. None: ``usual_over``.
        domain: the parts, and the settings to begin with. method: the search: the transducer's, CTC's, or that over the graph.
        note: is called with each setting that was tried and its errors.

    Raises:
        UserError: everything wrong with the run directory, the manifest, the parts and the options, before any decoding.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    domain = domain or Domain()
    request, options = domain.fusion or FusionRequest(), domain.graph_options
    domain = replace(domain, fusion=request)
    values = _values(over, domain, method, out)
    recognizer = load_recognizer(run_path, device, variant, context or ContextChoice(), [method])
    loaded = load_domain(recognizer, domain)
    languages = recognizer.languages if recognizer.language is None else [recognizer.language]
    cuts, warnings = decodable_cuts(manifest, languages, recognizer.tokenizer)
    if not any(text_of(cut).split() for cut in cuts):
        raise UserError(f"{manifest}: has no reference word to count errors by; give other dev cuts")
    for line in [*recognizer.warnings, *warnings]:
        note(f"warning: {line}")
    encoded = _encoded(recognizer, cuts, max_duration)

    def errors(settings: Settings) -> float:
        changed = _with(loaded, request, settings)
        search = changed.search(method, int(settings["beam"]), _changed(options, GRAPH_FIELDS, settings))
        counts = _count(recognizer, encoded, search)
        note(f"{100 * counts.rate:6.2f} %  {', '.join(f'{name} {settings[name]:g}' for name in values)}")
        return counts.rate

    given: dict[str, float] = {"beam": beam}
    given |= {name: float(getattr(request.settings, field)) for name, field in FUSION_FIELDS.items()}
    given |= {name: float(getattr(options, field)) for name, field in GRAPH_FIELDS.items()}
    start: Settings = {name: given[name] for name in dict.fromkeys(["beam", *values])}
    best, tried = coordinate_search(start, values, errors)
    sources = {
        name: Source(**source) for name, source in ({} if loaded.fusion is None else loaded.fusion.sources).items()
    }
    if loaded.use is not None:
        sources["graph"] = Source(path=loaded.use.path, sha256=loaded.use.sha256)
    tuned = TunedDecoding(
        method=method,
        beam=int(best["beam"]),
        settings=_changed(request.settings, FUSION_FIELDS, best),
        graph_options=_changed(options, GRAPH_FIELDS, best),
        **sources,
        recognizer=Source(path=str(run_path), sha256=recognizer.run_weights_sha256),
        tuned_on=Source(path=str(manifest), sha256=digest_of(manifest)),
        wer=min(wer for _, wer in tried),
        words=sum(len(text.split()) for batch, _ in encoded for text in batch.texts),
        trials=[Trial(settings=settings, wer=wer) for settings, wer in tried],
    )
    write_tuned(out, tuned)
    return tuned


def _values(over: str | None, domain: Domain, method: FusedMethod, out: Path) -> dict[str, tuple[float, ...]]:
    """What to try of each option; refuses values that cannot be, and an ``out`` that cannot be written."""
    findings = domain.findings([method])
    try:
        check_writable(out)
    except UserError as error:
        findings += error.lines
    request = domain.fusion or FusionRequest()
    parts = [name for name in PARTS if getattr(request, name) is not None]
    parts += [] if domain.graph is None else ["graph"]
    values: dict[str, tuple[float, ...]] = {}
    try:
        values = parse_over(usual_over(parts) if over is None else over, parts)
        for name, numbers in values.items():
            for number in numbers:
                _changed(request.settings, FUSION_FIELDS, {name: number})
                _changed(domain.graph_options, GRAPH_FIELDS, {name: number})
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


def _with(loaded: LoadedDomain, request: FusionRequest, settings: Settings) -> LoadedDomain:
    """The parts with other settings; hotwords have their score in their automaton, so that is made again."""
    fusion = loaded.fusion
    assert fusion is not None
    changed = replace(fusion, settings=_changed(request.settings, FUSION_FIELDS, settings))
    if changed.hotwords is not None and changed.settings.hotwords_score != fusion.settings.hotwords_score:
        words, recognizer = FusionRequest(changed.settings, hotwords=request.hotwords), loaded.recognizer
        again = load_fusion(words, recognizer.tokenizer, recognizer.device)
        changed = replace(changed, hotwords=again.hotwords)
    return replace(loaded, fusion=changed)


def _count(recognizer: Recognizer, encoded: Sequence[tuple[Batch, EncoderOutput]], search: Search) -> ErrorCounts:
    """The word errors of all batches."""
    scored: list[Scored] = []
    for batch, output in encoded:
        hypotheses = [alternatives[0] for alternatives in search.run(output)]
        scored += score(batch, hypotheses, recognizer.tokenizer)
    return total_words(scored)


def _changed(config: C, fields: Mapping[str, str], settings: Settings) -> C:
    """A configuration with those of the options in ``settings`` that are among its ``fields``.

    Raises:
        UserError: a value is out of range.
    """
    named = {fields[name]: value for name, value in settings.items() if name in fields}
    named |= {name: int(value) for name, value in named.items() if isinstance(getattr(config, name), int)}
    return from_dict(type(config), {**to_dict(config), **named}, "--over")
