"""graph: a decoding graph for CTC, of an n-gram model, a list of sentences, or what sequence-train trained against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from asrkit.data.text.tokenizer import Tokenizer, single_spaces
from asrkit.decoding.graph_compiler import graph_of_pieces, graph_of_sentences, graph_of_words
from asrkit.decoding.graph_search import k2_for_graphs
from asrkit.decoding.phrases import read_lines
from asrkit.disk import occupied, sha256_of
from asrkit.errors import UserError
from asrkit.export.directory import is_exported, open_exported
from asrkit.methods.sequence.denominator import FILE, load_denominator
from asrkit.models.ctc_graph import CtcGraph, GraphRecord, save_graph
from asrkit.models.ngram.arpa import UNKNOWN
from asrkit.models.ngram.automaton import load_ngram, symbols_of_pieces
from asrkit.models.registry import NGRAM, spec_of, spec_of_kind
from asrkit.run_dir import ARPA, TOKENIZER, open_run

SHOWN = 20  # sentences that an error names


def make_graph(run_path: Path, out: Path, *, lm: Path | None = None, text: Path | None = None) -> GraphRecord:
    """Write the graph's directory ``out``; what it is, as its record says.

    Args:
        run_path: the recognizer, as a run directory or exported: the graph is about the tokens of its tokenizer.
        lm: an n-gram model of word pieces or words. Words that the tokenizer cannot spell are left out and in the record.
        text: a list of sentences, which are all that the graph accepts. Without both, the denominator of the run.

    Raises:
        UserError: everything that does not fit together, or there is no k2.
    """
    findings = occupied(out)
    if lm is not None and text is not None:
        findings.append("--lm and --text: a graph is made from one of them; drop the other")
    tokenizer = _tokenizer_of(run_path)
    if findings:
        raise UserError.of(findings)
    if lm is not None:
        graph, facts = _of_ngram(lm, tokenizer)
    elif text is not None:
        graph, facts = _of_text(text, tokenizer)
    else:
        graph, facts = _of_denominator(run_path)
    facts |= {"vocab_size": tokenizer.vocab_size, "tokenizer_sha256": sha256_of(tokenizer.path)}
    return save_graph(out, graph, facts)


def _tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a recognizer."""
    if is_exported(path):
        open_exported(path)
        return Tokenizer.load(path / TOKENIZER)
    run = open_run(path)
    spec_of(run)
    return Tokenizer.load(run.tokenizer_path)


def _of_ngram(path: Path, tokenizer: Tokenizer) -> tuple[CtcGraph, dict[str, Any]]:
    k2, run = k2_for_graphs(), open_run(path)
    spec = spec_of_kind(run, NGRAM)
    facts = {"source": "lm", "origin": str(path), "origin_sha256": sha256_of(path / ARPA), "unit": spec.unit}
    facts |= {"order": spec.order, "words": 0, "not_spelled": []}
    if spec.unit == "bpe":
        if sha256_of(run.tokenizer_path) != sha256_of(tokenizer.path):
            raise UserError(
                f"{path}: its tokenizer is not the recognizer's; train one with "
                f"`asrkit train-lm --kind ngram --tokenizer {tokenizer.path}`"
            )
        lm = load_ngram(path / ARPA, symbols_of_pieces(tokenizer))
        return graph_of_pieces(k2, lm, tokenizer), facts
    lm = load_ngram(path / ARPA)
    words = {number: word for number, word in enumerate(lm.symbols) if number > 0 and word != UNKNOWN}
    spelled = {number: tokenizer.encode(word) for number, word in words.items() if not tokenizer.cannot_spell(word)}
    if not spelled:
        raise UserError(
            f"{path}: the tokenizer of the model can spell none of its words; train one on texts in the model's language"
        )
    facts |= {"words": len(spelled), "not_spelled": [word for number, word in words.items() if number not in spelled]}
    return graph_of_words(k2, lm, spelled, tokenizer), facts


def _of_text(path: Path, tokenizer: Tokenizer) -> tuple[CtcGraph, dict[str, Any]]:
    k2 = k2_for_graphs()
    lines = read_lines(path, "sentence")
    sentences = {single_spaces(line): number for number, line in enumerate(lines, start=1) if line.strip()}
    findings = [
        f"{path}:{number}: {reason}"
        for sentence, number in sentences.items()
        if (reason := tokenizer.cannot_spell(sentence)) is not None
    ]
    if not sentences:
        findings = [f"{path}: has no sentence; write one per line"]
    if findings:
        more = [f"and {len(findings) - SHOWN} more lines"] if len(findings) > SHOWN else []
        raise UserError.of([*findings[:SHOWN], *more])
    graph = graph_of_sentences(k2, [tokenizer.encode(sentence) for sentence in sentences], tokenizer.vocab_size)
    words = {word for sentence in sentences for word in sentence.split()}
    facts = {"source": "text", "origin": str(path), "origin_sha256": sha256_of(path), "unit": "word"}
    return graph, facts | {"order": 0, "words": len(words), "not_spelled": []}


def _of_denominator(path: Path) -> tuple[CtcGraph, dict[str, Any]]:
    """What the run trained against, with the scores it had there."""
    if not (path / FILE).is_file():
        raise UserError(f"{path}: has no denominator graph of sequence-train; give --lm or --text")
    denominator, digest = load_denominator(path)
    graph = CtcGraph(denominator.arcs, denominator.scores)
    if not denominator.scores.any():
        raise UserError(
            f"{path}: was trained with lattice.denominator.lm_scale=0, without an n-gram, so there is none to decode with; "
            "give --lm or --text"
        )
    facts = {"source": "denominator", "origin": str(path), "origin_sha256": digest, "unit": "bpe"}
    return graph, facts | {"order": 0, "words": 0, "not_spelled": []}
