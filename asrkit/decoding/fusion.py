"""What a beam search uses in addition to the acoustic model: language models, hotwords, and the weight of each.

The score of a hypothesis is its transducer log-probability, plus for each of its tokens
lm_scale * log P_LM - lodr_scale * log P_LODR + length_bonus + what hotwords add. As in the runtime the models are exported to
(sherpa-onnx), and in icefall's recipes, it is added after the best (hypothesis, token) pairs of a frame are chosen, so it costs one
score for each hypothesis instead of one for each token of the vocabulary. Hotwords count before that choice unless they are asked to be
late: a recognizer that makes many errors seldom has their tokens among the best.

Sources: shallow fusion (Gulcehre et al. 2015, arXiv 1503.03535); subtraction of the internal language model as a density ratio
(McDermott et al. 2019, arXiv 2002.11268) by a low-order n-gram, LODR (Zheng et al. 2022, arXiv 2203.16776).

Shapes: N hypotheses of any utterances, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from asrkit.config import NonNegative, config
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.hotwords import Hotwords, read_hotwords
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.models.lm import END, LanguageModel
from asrkit.models.ngram.automaton import Ngram, load_ngram, symbols_of_pieces
from asrkit.models.registry import LM, NGRAM, load_lm, require, spec_of_kind
from asrkit.run_dir import ARPA, TOKENIZER, open_run

FIRST_TOKEN = 0.5  # share of a hotword's score that its first token gets where it counts early (our choice)
State = tuple[Tensor, ...]  # of N hypotheses, each tensor with them first


@config
class FusionConfig:
    """The weights of what a beam search uses in addition to the acoustic model."""

    lm_scale: NonNegative = 0.3
    """Weight of the language model's log-probabilities."""
    lm_use: Literal["fusion", "rescore"] = "fusion"
    """fusion: at every token, in the search; rescore: only at its end, on the hypotheses that are left, with the end of the sentence."""
    lodr_scale: NonNegative = 0.1
    """Weight of the low-order n-gram of the training texts whose log-probabilities are subtracted."""
    length_bonus: Annotated[float, Field(ge=-100, le=100)] = 0.0
    """Added for each token."""
    blank_penalty: NonNegative = 0.0
    """Subtracted from the blank's logit: against deletions."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Divides the logits: above 1, the acoustic model is less sure."""
    hotwords_score: Annotated[float, Field(ge=-100, le=100)] = 1.5
    """Added for each token of a hotword without a score of its own."""
    hotwords_use: Literal["early", "late"] = "early"
    """early: before a frame's best tokens are selected, so that the score can bring a token into the beam, and half as much for a
    phrase's first token, which many other words begin with; late: after that, as sherpa-onnx does, and alike for all tokens. CTC's
    prefix beam search selects among the likeliest tokens of each hypothesis in both cases."""


class TokenScorer(Protocol):
    """What scores tokens one after the other, for many hypotheses at once."""

    def start(self, rows: int) -> State:
        """The state of ``rows`` hypotheses without a token."""

    def step(self, state: State, tokens: Tensor) -> tuple[Tensor, State]:
        """The scores of the next tokens (N,), and the states after them."""

    def end(self, state: State) -> Tensor:
        """The score (N,) of ending here."""


class NgramScorer:
    """log P of an n-gram model; a hypothesis' state is that of the automaton."""

    def __init__(self, model: Ngram) -> None:
        self.model = model

    def start(self, rows: int) -> State:
        return (torch.full((rows,), self.model.start_state, dtype=torch.int64, device=self.model.keys.device),)

    def step(self, state: State, tokens: Tensor) -> tuple[Tensor, State]:
        scores, after = self.model.step(state[0], tokens)
        return scores, (after,)

    def end(self, state: State) -> Tensor:
        return self.model.step(state[0], torch.full_like(state[0], END))[0]


class NeuralScorer:
    """log P of a network of ``train-lm``; a hypothesis' state begins with the log-probabilities (N, V) of what comes next."""

    def __init__(self, model: LanguageModel) -> None:
        self.model = model

    @torch.no_grad()
    def start(self, rows: int) -> State:
        begin = torch.full((1,), END, dtype=torch.int64, device=self.model.out.weight.device)
        logits, state = self.model.step(begin, self.model.start(1))
        return tuple(tensor.expand(rows, *tensor.shape[1:]) for tensor in (logits.log_softmax(dim=1), *state))

    @torch.no_grad()
    def step(self, state: State, tokens: Tensor) -> tuple[Tensor, State]:
        scores = state[0].gather(1, tokens.unsqueeze(1)).squeeze(1)
        logits, after = self.model.step(tokens, state[1:])
        return scores, (logits.log_softmax(dim=1), *after)

    def end(self, state: State) -> Tensor:
        return state[0][:, END]


class HotwordScorer:
    """The bonus of hotwords; at the end, that of a phrase that is not complete is taken back."""

    def __init__(self, hotwords: Hotwords) -> None:
        self.hotwords = hotwords

    def start(self, rows: int) -> State:
        return (torch.zeros(rows, dtype=torch.int64, device=self.hotwords.keys.device),)

    def step(self, state: State, tokens: Tensor) -> tuple[Tensor, State]:
        gains, after = self.hotwords.step(state[0], tokens)
        return gains, (after,)

    def end(self, state: State) -> Tensor:
        return -self.hotwords.scores[state[0]]


@dataclass(frozen=True)
class Fusion:
    """The parts, and how much each counts: the one argument of the searches for all of it.

    sources: for a result: the path and the digest of each part, by the name of its option.
    """

    settings: FusionConfig = field(default_factory=FusionConfig)
    lm: TokenScorer | None = None
    lodr: TokenScorer | None = None
    hotwords: HotwordScorer | None = None
    sources: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def language_models(self) -> list[tuple[TokenScorer, float]]:
        """Each with its weight."""
        parts = ((self.lm, self.settings.lm_scale), (self.lodr, -self.settings.lodr_scale))
        return [(part, weight) for part, weight in parts if part is not None]

    @property
    def in_search(self) -> list[tuple[TokenScorer, float]]:
        """What is scored at every token, each with its weight."""
        models = self.language_models if self.settings.lm_use == "fusion" else []
        return models if self.hotwords is None else [*models, (self.hotwords, 1.0)]

    @property
    def counts_at_end(self) -> bool:
        """Whether whole texts may be ordered otherwise by it: by a language model, or the bonus for each token."""
        return bool(self.language_models) or self.settings.length_bonus != 0

    def start(self, rows: int) -> list[State]:
        """The state of ``rows`` hypotheses without a token, of each part that is scored in the search."""
        return [part.start(rows) for part, _ in self.in_search]

    def logits(self, logits: Tensor, blank: int) -> Tensor:
        """Logits (N, V) with the temperature and the blank penalty."""
        if self.settings.temperature != 1:
            logits = logits / self.settings.temperature
        if self.settings.blank_penalty:
            penalty = logits.new_zeros(logits.shape[1])
            penalty[blank] = self.settings.blank_penalty
            logits = logits - penalty
        return logits

    def log_probs(self, log_probs: Tensor, blank: int) -> Tensor:
        """CTC's log-probabilities (B, T', V) with the same two, renormalized where they change anything."""
        if self.settings.temperature == 1 and not self.settings.blank_penalty:
            return log_probs
        return self.logits(log_probs.flatten(0, 1), blank).log_softmax(dim=1).view(log_probs.shape)

    def boosts(self, states: Sequence[State], blank: int) -> Tensor | None:
        """What hotwords add to each token (N, V) before the best are selected; None: nothing."""
        if self.hotwords is None or self.settings.hotwords_use == "late":
            return None
        gains = self.hotwords.hotwords.all_gains(states[-1][0])
        gains[:, blank] = 0.0
        return gains

    def advance(
        self, states: Sequence[State], parents: Tensor, rows: Tensor, tokens: Tensor
    ) -> tuple[Tensor, list[State]]:
        """What ``tokens`` (M,) add to the ``rows`` (M,) of the hypotheses that grow out of ``parents`` (N,), whose others emit
        nothing, beside what ``boosts`` has added; and the states of all N."""
        gains = torch.full(tokens.shape, self.settings.length_bonus, device=tokens.device)
        after = []
        for (part, weight), state in zip(self.in_search, states, strict=True):
            state = tuple(tensor.index_select(0, parents) for tensor in state)
            if rows.numel():
                scores, changed = part.step(tuple(tensor.index_select(0, rows) for tensor in state), tokens)
                if part is not self.hotwords or self.settings.hotwords_use == "late":
                    gains = gains.add(scores, alpha=weight)
                state = _put(state, rows, changed)
            after.append(state)
        return gains, after

    def end(self, states: Sequence[State], tokens: Tensor, lens: Tensor) -> Tensor:
        """What the end adds (B, K), of hypotheses whose ``tokens`` (B, K, U) are padded beyond ``lens`` (B, K)."""
        total = torch.zeros(lens.numel(), device=lens.device)
        if self.hotwords is not None:
            total = total + self.hotwords.end(states[-1])
        if self.settings.lm_use == "rescore":
            for part, weight in self.language_models:
                total = total + weight * sequence_scores(part, tokens.flatten(0, 1), lens.flatten())
        return total.view(lens.shape)


def sequence_scores(scorer: TokenScorer, tokens: Tensor, lens: Tensor) -> Tensor:
    """The score (N,) of whole sequences and their ends, on the scorer's device; ``tokens`` (N, U) int64 are padded beyond ``lens``
    (N,)."""
    state = scorer.start(len(lens))
    tokens, lens = tokens.to(state[0].device), lens.to(state[0].device)
    total = torch.zeros(lens.shape, device=lens.device)
    for position in range(tokens.shape[1] + 1):
        total = torch.where(lens == position, total + scorer.end(state), total)
        if position < tokens.shape[1]:
            scores, state = scorer.step(state, tokens[:, position])
            total = torch.where(position < lens, total + scores, total)
    return total


def weighted_scores(parts: Sequence[tuple[TokenScorer, float]], tokens: Tensor, lens: Tensor) -> Tensor:
    """The weighted sum (N,) of ``sequence_scores`` by several parts."""
    total = torch.zeros(lens.shape)
    for part, weight in parts:
        total = total + weight * sequence_scores(part, tokens, lens).cpu()
    return total


def _put(state: State, rows: Tensor, changed: State) -> State:
    """The ``state``, a copy that nothing else uses, with ``rows`` changed. Keys and values (4-D) of attention grow at their front."""
    tensors = []
    for before, after in zip(state, changed, strict=True):
        grown = after.shape[2] - before.shape[2] if before.dim() == 4 else 0
        before = pad(before, (0, 0, grown, 0)) if grown > 0 else before
        after = pad(after, (0, 0, -grown, 0)) if grown < 0 else after
        tensors.append(before.index_copy_(0, rows, after))
    return tuple(tensors)


FusedMethod = Literal["beam", "ctc-beam", "ctc-graph"]  # the searches that have a use for a request


@dataclass(frozen=True)
class FusionRequest:
    """What the user asks of a search: where the parts are, and how much each counts.

    lm, lodr: run directories of ``train-lm`` or ARPA files. hotwords: a file. expected: the digest that a part must have, by option,
    that of a graph too.
    tuned_on: path and digest of the manifest that the settings were tuned on. tuned_with: path and digest of the recognizer.
    method: the search that they are for.
    """

    settings: FusionConfig = field(default_factory=FusionConfig)
    lm: Path | None = None
    lodr: Path | None = None
    hotwords: Path | None = None
    expected: Mapping[str, str] = field(default_factory=dict)
    tuned_on: Mapping[str, str] | None = None
    tuned_with: Mapping[str, str] | None = None
    method: FusedMethod = "beam"

    def other_part(self, name: str, path: Path, digest: str) -> list[str]:
        """Why a part is not the one that the settings were tuned with; [] if it is, or they were not tuned."""
        expected = self.expected.get(name, digest)
        if expected == digest:
            return []
        return [
            f"--{name} {path}: is not the one that the decoding was tuned with (digest {digest[:12]}, not {expected[:12]}); "
            "restore that, or tune again"
        ]

    def other_recognizer(self, weights_sha256: str) -> list[str]:
        """Why the settings are not for a recognizer whose run directory has these weights; [] if they are, or were not tuned."""
        if self.tuned_with is None or self.tuned_with["sha256"] == weights_sha256:
            return []
        return [
            f"--decoding: was tuned with the weights of {self.tuned_with['path']} (digest {self.tuned_with['sha256'][:12]}), and this "
            f"recognizer has others ({weights_sha256[:12]}); run `asrkit tune` with it, or give the weights as options"
        ]


def load_fusion(request: FusionRequest, tokenizer: Tokenizer, device: torch.device) -> Fusion:
    """The parts, ready to score the tokens of ``tokenizer``.

    Raises:
        UserError: a part cannot be read, or is of another unit or tokenizer; all findings at once.
    """
    findings: list[str] = []
    parts: dict[str, Any] = {}
    loaders = {
        "lm": lambda path: load_scorer(path, tokenizer, device, "--lm"),
        "lodr": lambda path: load_scorer(path, tokenizer, device, "--lodr"),
        "hotwords": lambda path: _load_hotwords(path, tokenizer, request.settings, device),
    }
    sources: dict[str, dict[str, str]] = {}
    for name, load in loaders.items():
        path = getattr(request, name)
        if path is None:
            continue
        try:
            parts[name], digest = load(path)
            sources[name] = {"path": str(path), "sha256": digest}
            findings += request.other_part(name, path, digest)
        except UserError as error:
            findings += error.lines
    if findings:
        raise UserError.of(findings)
    return Fusion(request.settings, **parts, sources=sources)


def load_scorer(
    path: Path, tokenizer: Tokenizer, device: torch.device, option: str = "--lm"
) -> tuple[TokenScorer, str]:
    """A language model of the tokens of ``tokenizer``, and its digest: a run directory of ``train-lm``, or an ARPA file.

    Raises:
        UserError: it cannot be read, or is of another unit or tokenizer.
    """
    if path.is_file():
        return NgramScorer(load_ngram(path, symbols_of_pieces(tokenizer)).to(device)), sha256_of(path)
    run = open_run(path)
    if run.kind not in (LM, NGRAM):
        require(run, LM)
    unit = spec_of_kind(run, run.kind).unit
    own = f"train one with `asrkit train-lm --unit bpe --tokenizer {tokenizer.path}`"
    if unit != "bpe":
        raise UserError(f"{option} {path}: is of {unit} units, and the recognizer emits word pieces; {own}")
    lm_tokenizer = Tokenizer(run.path / TOKENIZER)
    if symbols_of_pieces(lm_tokenizer) != symbols_of_pieces(tokenizer):
        raise UserError(
            f"{option} {path}: its tokenizer has other pieces ({lm_tokenizer.vocab_size}) than the recognizer's "
            f"({tokenizer.vocab_size}); {own}"
        )
    digest = sha256_of(run.weights_path)
    if run.kind == NGRAM:
        return NgramScorer(load_ngram(run.path / ARPA, symbols_of_pieces(tokenizer)).to(device)), digest
    return NeuralScorer(load_lm(run).to(device)), digest


def _load_hotwords(
    path: Path, tokenizer: Tokenizer, settings: FusionConfig, device: torch.device
) -> tuple[HotwordScorer, str]:
    first = FIRST_TOKEN if settings.hotwords_use == "early" else 1.0
    hotwords = read_hotwords(path, tokenizer, settings.hotwords_score, first)
    return HotwordScorer(hotwords.to(device)), sha256_of(path)
