"""evaluate: decode a manifest, count the errors, and write what a person and a script want to know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from asrkit.config import digest as content_digest
from asrkit.config import to_dict
from asrkit.data.checks import decodable_cuts
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import digest_of
from asrkit.data.parallel import ALONE, Workers
from asrkit.decoding.choice import ContextChoice
from asrkit.decoding.domain import Domain, Search, make_search
from asrkit.decoding.evaluation import Decoded, decode_cuts, decoding_record, result_of
from asrkit.decoding.nbest import bad_temperature, no_confidence
from asrkit.decoding.recognizer import Recognizer, load_recognizer
from asrkit.decoding.search import BEAMS, CTC_GRAPH, Method
from asrkit.decoding.transcripts import SUBTITLES, Format, render
from asrkit.errors import UserError
from asrkit.reporting.evaluation_files import Evaluation, directories_for, write_evaluation
from asrkit.reporting.results import (
    EVALUATION,
    DecodingRecord,
    manifest_name,
)

T = TypeVar("T")


def evaluate(
    run_path: Path,
    manifest: Path,
    *,
    methods: Sequence[Method] = ("greedy",),
    beam: int = 4,
    variant: str | None = None,
    context: ContextChoice | None = None,
    max_duration: float = 200.0,
    device: str = "auto",
    threads: int | None = None,
    workers: Workers = ALONE,
    out: Path | None = None,
    domain: Domain | None = None,
    calibrate_on: Path | None = None,
    temperature: float | None = None,
    formats: Sequence[Format] = (),
) -> list[Evaluation]:
    """Decode ``manifest`` with a trained model by each of ``methods`` and write the results.

    Each method has its directory, ``<out>/<manifest>-<digest>-<variant>-<context>-<method>``, by default in
    ``<run>/evaluation``; the digest is the manifest's, so that manifests of one name have results of their own. A search that uses
    a language model and the like, or a graph, has the digest of all that in its name too, and so has a calibration. A streaming
    context is decoded chunk by chunk, as on a device. An utterance with an empty reference is decoded too: every word
    recognized in it is an insertion.

    Args:
        variant: the active sub-models; None is the one the last stage trained.
        context: None is the first the variant was trained in.
        max_duration: seconds of padded audio decoded at once.
        threads: of torch; None leaves what is set.
        workers: who reads and decodes; several processes have one thread each, and their seconds add up.
        domain: what the search has beside the model: a graph, which takes the place of ``methods``, language models and the like.
        calibrate_on: a manifest whose references the temperature of confidences is fitted to; None takes ``temperature``, or 1.
        formats: in which hypotheses are also written.

    Raises:
        UserError: everything wrong with the run directory, the manifest and the options, before any decoding.
    """
    if threads is not None and workers.several:
        raise UserError(f"--threads: each process of {workers} computes with one thread; leave --threads out")
    if threads is not None:
        torch.set_num_threads(threads)
    domain, choice = domain or Domain(), context or ContextChoice()
    names = [CTC_GRAPH] if domain.graph is not None else list(dict.fromkeys(methods))
    findings = _contradictions(names, beam, domain, choice, calibrate_on, temperature, formats)
    recognizer = _gather(findings, lambda: load_recognizer(run_path, device, variant, choice, names))
    searches = _searches(findings, recognizer, names, beam, domain)
    checked = _gather(findings, lambda: _cuts(manifest, recognizer, workers))
    dev = None if calibrate_on is None else _gather(findings, partial(_cuts, calibrate_on, recognizer, workers))
    findings += _cannot_share(workers, recognizer, domain)
    if findings or recognizer is None or checked is None:
        raise UserError.of(list(dict.fromkeys(findings)))
    cuts, warnings = checked
    digest = digest_of(manifest)
    warnings = [*warnings, *_fitted_here(manifest, digest, calibrate_on)]
    records, directories = {}, {}
    for name, search in searches.items():
        records[name] = decoding_record(domain.fusion, search.fusion, manifest, digest)
        label = _name(manifest, digest, recognizer, search, name, beam, records[name][0])
        label += _confidence_name(calibrate_on, temperature)
        directories[name] = (out or run_path / EVALUATION) / label
    with directories_for(directories.values()):
        fitted = {} if dev is None else decode_cuts(recognizer, dev[0], searches, max_duration, workers)
        decoded = decode_cuts(recognizer, cuts, searches, max_duration, workers)
    evaluations = []
    for name, search in searches.items():
        done = decoded[name]
        confidence = None
        if search.confident:
            confidence = done.set_confidences(_temperature(fitted.get(name), temperature), calibrate_on)
        record, tuned_here = records[name]
        about: dict[str, Any] = {"run": str(run_path), "manifest": str(manifest), "manifest_sha256": digest}
        about |= {"method": name, "beam": beam if name in BEAMS else None, "decoding": record, "confidence": confidence}
        about["threads"] = torch.get_num_threads() if not workers.several else 1
        result = result_of(recognizer, cuts, done, search, about, [*warnings, *tuned_here])
        transcripts = done.transcripts({cut.id: cut.duration for cut in cuts}, recognizer.tokenizer)
        more = {f"hypotheses.{form}": render(transcripts, form) for form in formats}
        evaluations.append(write_evaluation(directories[name], result, done.scored, more))
    return evaluations


def _temperature(dev: Decoded | None, chosen: float | None) -> float:
    """Of the confidences: the one fitted to ``dev``, the ``chosen`` one, or 1, which leaves them as they are."""
    if dev is not None:
        return dev.temperature()
    return 1.0 if chosen is None else chosen


def _cannot_share(workers: Workers, recognizer: Recognizer | None, domain: Domain) -> list[str]:
    """Why several processes, or those of a cluster, cannot decode."""
    findings = []
    if domain.graph is not None and workers.ray_address is not None:
        findings.append("--ray-address: k2's graphs cannot be sent to other machines; use --jobs with --graph")
    if workers.several and recognizer is not None and recognizer.device.type != "cpu":
        findings.append(
            f"{workers}: several processes decode on the CPU only; add --device cpu, or leave {workers.options} out"
        )
    return findings


def _fitted_here(manifest: Path, digest: str, calibrate_on: Path | None) -> list[str]:
    """A warning where the temperature was fitted to the very manifest that is decoded."""
    if calibrate_on is None or digest_of(calibrate_on) != digest:
        return []
    return [f"{manifest}: the confidences were fitted to these very cuts, so they look better than they are"]


def _contradictions(
    names: Sequence[str],
    beam: int,
    domain: Domain,
    choice: ContextChoice,
    calibrate_on: Path | None,
    temperature: float | None,
    formats: Sequence[Format],
) -> list[str]:
    """What is wrong with the options, whatever the model."""
    findings = [f"--beam {beam}: must be at least 1"] if beam < 1 else []
    findings += [*choice.contradictions(), *domain.findings(names)]
    options = {"--calibrate": calibrate_on, "--confidence-temperature": temperature}
    for option in (option for option, value in options.items() if value is not None):
        findings += [line for name in names if (line := no_confidence(option, name))]
    findings += bad_temperature(temperature)
    if calibrate_on is not None and temperature is not None:
        findings.append("--calibrate and --confidence-temperature: the first fits the second; drop one of them")
    findings += [
        f"--format {form}: is for one recording; use txt, json, ctm or stm" for form in formats if form in SUBTITLES
    ]
    return findings


def _searches(
    findings: list[str],
    recognizer: Recognizer | None,
    names: Sequence[str],
    beam: int,
    domain: Domain,
) -> dict[str, Search]:
    """The search of each name; what is wrong with one is added to ``findings``."""
    made: dict[str, Search] = {}
    if recognizer is None:
        return made
    for name in names:
        search = _gather(findings, partial(make_search, recognizer, name, beam, domain))
        made |= {} if search is None else {name: search}
    return made


def _cuts(manifest: Path, recognizer: Recognizer | None, workers: Workers) -> tuple[CutTable, list[str]]:
    """The cuts, and warnings about them; without a recognizer they are checked as far as possible."""
    if recognizer is None:
        return decodable_cuts(manifest, (), None, workers)
    languages = recognizer.languages if recognizer.language is None else [recognizer.language]
    return decodable_cuts(manifest, languages, recognizer.tokenizer, workers)


def _gather(findings: list[str], action: Callable[[], T]) -> T | None:
    """Do ``action``; the lines of a UserError are added to ``findings``, so that all checks report together."""
    try:
        return action()
    except UserError as error:
        findings += error.lines
        return None


def _confidence_name(calibrate_on: Path | None, temperature: float | None) -> str:
    """What the name of a result's directory says of its confidences: the manifest's digest, or the temperature."""
    if calibrate_on is not None:
        return f"-calibrated-{digest_of(calibrate_on)[:8]}"
    return "" if temperature is None else f"-temperature{temperature:g}"


def _name(
    manifest: Path,
    digest: str,
    recognizer: Recognizer,
    search: Search,
    method: str,
    beam: int,
    record: DecodingRecord | None,
) -> str:
    """``test-3f2a9c01-near-chunk16-left64-beam4``, ``test-3f2a9c01-backbone-full-ctc-graph-hlg-0.5-7d0c21fa``: a result's directory.

    The digest at the end is that of what was searched with, wherever it lies: graphs may be called the same."""
    parts = [manifest_name(str(manifest)), digest[:8], recognizer.variant]
    parts += [str(recognizer.context).replace("=", "").replace(",", "-")]
    parts += [f"{method}{beam}" if method in BEAMS else method]
    if search.graph is not None:
        parts += [Path(search.graph.path).resolve().name, f"{search.graph.scale:g}"]
        parts += [content_digest({**to_dict(search.graph), "path": ""})[:8]]
    parts += [] if record is None else [content_digest(to_dict(record))[:8]]
    return "-".join(parts)
