"""Sequence criteria on small models: gradients against sums over all hypotheses, paths and alignments, written out."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from asrkit.config import from_dict
from asrkit.data.text.tokenizer import Tokenizer, train_tokenizer
from asrkit.decoding.lattices import Lattice, graph_lattice
from asrkit.errors import UserError
from asrkit.losses.ctc import ctc_log_probs_of
from asrkit.losses.sequence import expected_errors, sampled_errors
from asrkit.methods.sequence.config import LATTICE, Criterion, DenominatorConfig, LatticeConfig
from asrkit.methods.sequence.denominator import (
    FILE,
    Denominator,
    load_denominator,
    make_denominator,
    save_denominator,
)
from asrkit.methods.sequence.hypotheses import (
    errors_of,
    find_n_best,
    path_log_probs,
    sample_ctc,
    sample_transducer,
    transducer_log_probs,
    with_reference,
)
from asrkit.methods.sequence.lattices import Outer, outer
from asrkit.models import AsrModel, ModelSpec
from asrkit.reporting.wer import Scored
from asrkit.training.asr_loss import LossConfig

EXACT = LossConfig(backend="torch", prune_range=20)  # a band that holds every lattice
SPECIAL = [0, 3]
PLAIN = (1, 2)  # the tokens that can be emitted


def small_model(seed: int, dropout: float = 0.0) -> AsrModel:
    """Four tokens, in double precision; its joiner and CTC head are sharp enough to prefer something."""
    torch.manual_seed(seed)
    encoder = {"dim": 6, "num_layers": 1, "feedforward_dim": 6, "kernel_size": 3, "subsampling_channels": [2, 2]}
    spec = {"vocab_size": 4, "encoder": encoder, "predictor": {"dim": 4, "dropout": dropout}, "joiner_dim": 5}
    model = AsrModel(from_dict(ModelSpec, spec, "test")).double()
    with torch.no_grad():
        for layer in (model.joiner.out, model.ctc_head):
            layer.weight.mul_(3.0)
    return model


def frames_of(lens: Sequence[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(lens), max(lens), 6, dtype=torch.float64, generator=generator), torch.tensor(lens)


def joint_log_probs(model: AsrModel, frame: Tensor, prefix: tuple[int, ...]) -> Tensor:
    context = torch.tensor([(-1, 0, *prefix)[-2:]])
    predicted = model.joiner.project_predictor(model.predictor(context))
    return model.joiner(model.joiner.project_encoder(frame[None]), predicted)[0].log_softmax(0)


def transducer_texts(model: AsrModel, frames: Tensor, symbols: Sequence[int]) -> dict[tuple[int, ...], Tensor]:
    """The probability of every text with at most one symbol a frame, differentiable, path by path."""
    totals: dict[tuple[int, ...], Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for path in itertools.product(symbols, repeat=len(frames)):
        prefix: tuple[int, ...] = ()
        log_prob = torch.zeros((), dtype=torch.float64)
        for frame, token in zip(frames, path, strict=True):
            log_prob = log_prob + joint_log_probs(model, frame, prefix)[token]
            prefix = prefix if token == 0 else (*prefix, token)
        totals[prefix] = totals[prefix] + log_prob.exp()
    return totals


def ctc_texts(log_probs: Tensor, symbols: Sequence[int]) -> dict[tuple[int, ...], Tensor]:
    totals: dict[tuple[int, ...], Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    for path in itertools.product(symbols, repeat=len(log_probs)):
        text = tuple(token for token, _ in itertools.groupby(path) if token != 0)
        scores = [log_probs[t, token] for t, token in enumerate(path)]
        totals[text] = totals[text] + torch.stack(scores).sum().exp()
    return totals


def edits(reference: Sequence[int], hypothesis: Sequence[int]) -> int:
    """Levenshtein's distance, by its definition."""
    if not reference or not hypothesis:
        return len(reference) + len(hypothesis)
    return min(
        edits(reference[1:], hypothesis[1:]) + (reference[0] != hypothesis[0]),
        edits(reference[1:], hypothesis) + 1,
        edits(reference, hypothesis[1:]) + 1,
    )


def gradients(loss: Tensor, model: AsrModel) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


REFERENCES = [(1, 2), (2,)]


def errors_to(tokens: Tensor, lens: Tensor) -> Tensor:
    rows = zip(tokens.tolist(), lens.tolist(), REFERENCES, strict=True)
    return torch.tensor([[edits(r, t[:n]) for t, n in zip(ts, ns, strict=True)] for ts, ns, r in rows]).double()


@pytest.mark.parametrize("head", ["transducer", "ctc"])
@pytest.mark.parametrize("symbols", [(0, 1, 2, 3), (0, 1, 2)])
def test_the_gradient_of_mwer_is_that_of_the_sum_over_all_hypotheses(head: Any, symbols: tuple[int, ...]) -> None:
    """A beam that holds every text; with special tokens the texts without them are renormalized, as the list is."""
    model, (encoder_out, lens) = small_model(1), frames_of([3, 2])
    special = [] if 3 in symbols else SPECIAL
    n_best = find_n_best(model, head, encoder_out, lens, 90, special)
    if head == "ctc":
        log_probs = ctc_log_probs_of(model.ctc_log_probs(encoder_out).double(), lens, n_best.tokens, n_best.lens)
    else:
        log_probs = transducer_log_probs(model, encoder_out, lens, n_best.tokens, n_best.lens, EXACT)
    valid = n_best.scores > -torch.inf
    found = expected_errors(log_probs, errors_to(n_best.tokens, n_best.lens), valid)
    expected = []
    for row, reference in enumerate(REFERENCES):
        frames = encoder_out[row, : lens[row]]
        if head == "ctc":
            texts = ctc_texts(model.ctc_log_probs(frames).double(), symbols)
        else:
            texts = transducer_texts(model, frames, symbols)
        assert len(texts) == int(valid[row].sum())
        total = torch.stack(list(texts.values())).sum()
        if not special:
            assert float(total.detach()) == pytest.approx(1.0, abs=1e-6)
        expected.append(sum(p / total * edits(reference, text) for text, p in texts.items()))
    tolerance = 1e-5 if head == "ctc" else 1e-9  # the CTC head answers in single precision
    risks = torch.stack(expected)  # type: ignore[arg-type]
    torch.testing.assert_close(found.expected, risks.detach(), rtol=tolerance, atol=tolerance)
    weights = torch.tensor([1.0, -2.0]).double()
    for mine, reference_gradient in zip(
        gradients((found.loss * weights).sum(), model), gradients((risks * weights).sum(), model), strict=True
    ):
        torch.testing.assert_close(mine, reference_gradient, rtol=10 * tolerance, atol=10 * tolerance)


def test_hypotheses_have_the_probabilities_of_their_topology() -> None:
    """In the regular topology a frame may hold several symbols."""
    model, (encoder_out, lens) = small_model(2), frames_of([1, 1])
    tokens, token_lens = torch.tensor([[[1, 2], [1, 0]], [[2, 0], [0, 0]]]), torch.tensor([[2, 1], [1, 0]])
    modified = transducer_log_probs(model, encoder_out, lens, tokens, token_lens, EXACT)
    assert modified[0, 0] == -torch.inf and bool(modified.flatten()[1:].isfinite().all())
    assert float(modified[1, 0].detach()) == pytest.approx(float(joint_log_probs(model, encoder_out[1, 0], ())[2]))
    regular = LossConfig(backend="torch", prune_range=20, topology="regular")
    found = transducer_log_probs(model, encoder_out, lens, tokens, token_lens, regular)
    steps = [
        joint_log_probs(model, encoder_out[0, 0], prefix)[token] for prefix, token in (((), 1), ((1,), 2), ((1, 2), 0))
    ]
    assert float(found[0, 0].detach()) == pytest.approx(float(sum(steps)))


def test_the_reference_is_added_where_it_is_not_found() -> None:
    model, (encoder_out, lens) = small_model(1), frames_of([3, 2])
    n_best = find_n_best(model, "transducer", encoder_out, lens, 2, SPECIAL)
    text = n_best.tokens[0, 0, : n_best.lens[0, 0]].tolist()
    symbols = torch.zeros(2, 6, dtype=torch.int64)
    symbols[0, : len(text)] = torch.tensor(text, dtype=torch.int64)
    symbols[1, :2] = torch.tensor([2, 2])
    found = with_reference(n_best, symbols, torch.tensor([len(text), 2]))
    assert found.tokens.shape[1] == 3 and found.scores[:, :2].equal(n_best.scores)
    assert found.scores[0, 2] == -torch.inf  # it was there
    added = found.scores[1, 2] > -torch.inf
    assert bool(added) != (
        (2, 2) in [tuple(t[:n]) for t, n in zip(n_best.tokens[1].tolist(), n_best.lens[1].tolist(), strict=True)]
    )
    assert found.tokens[1, 2].tolist()[:2] == [2, 2] and found.lens[1, 2] == 2


def test_sampled_errors_of_the_transducer_are_unbiased() -> None:
    """The estimate's expectation over all draws from a tiny lattice is the exact gradient of the expected errors."""
    model, (encoder_out, lens) = small_model(3), frames_of([2])
    reference = (1, 2)
    every = torch.tensor(list(itertools.product((0, *PLAIN), repeat=2)))[None]  # (1, 9, 2)
    log_w = path_log_probs(model, encoder_out, lens, every, SPECIAL)[0].double()
    assert float(log_w.exp().sum()) == pytest.approx(1.0, abs=1e-6)
    errors = torch.tensor([edits(reference, [t for t in path if t]) for path in every[0].tolist()]).double()
    exact = gradients((log_w.exp() * errors).sum(), model)
    draws = torch.tensor(list(itertools.product(range(9), repeat=2)))
    probability = log_w[draws].sum(1).exp().detach()
    log_w = path_log_probs(model, encoder_out, lens, every, SPECIAL)[0].double()
    found = gradients((probability * sampled_errors(log_w[draws], errors[draws]).loss).sum(), model)
    for mine, reference_gradient in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, reference_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("head", ["transducer", "ctc"])
def test_sampled_paths_and_their_probabilities(head: str) -> None:
    model, (encoder_out, lens) = small_model(4, dropout=0.5).train(), frames_of([3, 1])
    if head == "ctc":
        log_probs = model.ctc_log_probs(encoder_out).double()
        tokens, token_lens, log_w = sample_ctc(log_probs, lens, 5, 0, SPECIAL)
        plain = log_probs[:, :, (0, *PLAIN)].logsumexp(2)
        assert bool((log_w <= 0).all())
        texts = [ctc_texts(log_probs[row, : lens[row]], (0, *PLAIN)) for row in range(2)]
        for row, path in itertools.product(range(2), range(5)):
            text = tuple(tokens[row, path, : token_lens[row, path]].tolist())
            total = texts[row][text] / plain[row, : lens[row]].sum().exp()
            assert 0 < float(log_w[row, path].exp().detach()) <= float(total.detach()) * (1 + 1e-9)
    else:
        tokens, token_lens, log_w = sample_transducer(model, encoder_out, lens, 5, SPECIAL)
        assert model.predictor.training
    assert tokens.shape[:2] == log_w.shape == (2, 5) and log_w.requires_grad
    for row, path in itertools.product(range(2), range(5)):
        emitted = tokens[row, path, : token_lens[row, path]].tolist()
        assert len(emitted) <= lens[row] and not set(emitted) & set(SPECIAL)


def test_padding_of_paths_counts_nothing() -> None:
    model, (encoder_out, lens) = small_model(4), frames_of([3, 1])
    path = torch.tensor([[[1, 0, 2]], [[2, 0, 0]]])
    together = path_log_probs(model, encoder_out, lens, path, [])
    alone = path_log_probs(model, encoder_out[1:, :1], lens[1:], path[1:, :, :1], [])
    torch.testing.assert_close(together[1:], alone)
    frames = encoder_out[0]
    steps = [joint_log_probs(model, frames[0], ())[1], joint_log_probs(model, frames[1], (1,))[0]]
    steps.append(joint_log_probs(model, frames[2], (1,))[2])
    assert float(together[0, 0].detach()) == pytest.approx(float(sum(steps)), rel=1e-6)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_tokenizer(["ab ba", "b a"], "char", 100, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.mark.parametrize("unit", ["word", "char", "token"])
def test_errors_are_those_of_the_evaluation(tokenizer: Tokenizer, unit: Any) -> None:
    references, hypotheses = ["ab ba", "b"], [["ab", "ab b a", "ab ba"], ["", "b", "a b b"]]
    encoded = [[tokenizer.encode(text) for text in texts] for texts in hypotheses]
    size = max(len(ids) for texts in encoded for ids in texts)
    tokens = torch.tensor([[ids + [0] * (size - len(ids)) for ids in texts] for texts in encoded])
    lens = torch.tensor([[len(ids) for ids in texts] for texts in encoded])
    symbols = torch.nn.utils.rnn.pad_sequence([torch.tensor(tokenizer.encode(t)) for t in references], batch_first=True)
    symbol_lens = torch.tensor([len(tokenizer.encode(text)) for text in references])
    errors, total = errors_of(tokens, lens, references, symbols, symbol_lens, tokenizer, unit)
    scored = [[Scored("cut", ref, text) for text in texts] for ref, texts in zip(references, hypotheses, strict=True)]
    if unit == "token":
        expected = [[edits(tokenizer.encode(one.ref), tokenizer.encode(one.hyp)) for one in row] for row in scored]
        assert total == int(symbol_lens.sum())
    else:
        counts = [[one.words if unit == "word" else one.chars for one in row] for row in scored]
        expected = [[one.errors for one in row] for row in counts]
        assert total == sum(row[0].words for row in counts)
    assert errors.tolist() == expected


# Denominator and lattices.

SENTENCES = [[1, 2, 2], [2, 1], [1], [2, 1, 2, 1]]


def graph(order: int = 2, interpolation: float = 0.3, lm_scale: float = 0.7) -> Denominator:
    how = {"order": order, "interpolation": interpolation, "lm_scale": lm_scale, "max_arcs": 10_000}
    return make_denominator(SENTENCES, from_dict(DenominatorConfig, how, "test"), PLAIN)


def ngram_probability(window: Sequence[int], interpolation: float) -> float:
    """Of the last token after those before it: the relative frequency, interpolated with that after one token less."""
    if not window:
        return 1 / (len(PLAIN) + 1)
    lower = ngram_probability(window[1:], interpolation) if len(window) > 1 else 1 / (len(PLAIN) + 1)
    padded = [[-2, *sentence, -1] for sentence in SENTENCES]
    places = [
        (s, i) for s in padded for i in range(1, len(s)) if s[max(0, i - len(window) + 1) : i] == list(window[:-1])
    ]
    if not places:
        return lower
    share = sum(s[i] == window[-1] for s, i in places) / len(places)
    return interpolation * lower + (1 - interpolation) * share


def ngram_log_prob(text: Sequence[int], order: int, interpolation: float) -> float:
    """With frequencies that are counted for each token anew."""
    padded, total = [-2, *text, -1], 0.0
    for place in range(1, len(padded)):
        probability = ngram_probability(padded[max(0, place - order + 1) : place + 1], interpolation)
        total += math.log(probability) if probability else -math.inf
    return total


@pytest.mark.parametrize("interpolation", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("order", [2, 3])
def test_the_n_gram_has_the_interpolated_frequencies_of_the_texts(order: int, interpolation: float) -> None:
    found, scaled = graph(order, interpolation, 1.0), graph(order, interpolation, 0.4)
    for length in range(5):
        for text in itertools.product(PLAIN, repeat=length):
            expected = ngram_log_prob(text, order, interpolation)
            assert found.log_prob(text) == pytest.approx(expected, rel=1e-5)
            assert scaled.log_prob(text) == pytest.approx(0.4 * expected, rel=1e-5)
    if interpolation < 1:
        probabilities = [
            math.exp(found.log_prob(text)) for n in range(12) for text in itertools.product(PLAIN, repeat=n)
        ]
        assert sum(probabilities) == pytest.approx(1.0, abs=0.05)


def test_only_an_interpolated_graph_has_a_path_for_every_text() -> None:
    texts = [text for length in range(5) for text in itertools.product((*PLAIN, 3), repeat=length)]
    how = from_dict(DenominatorConfig, {"order": 3}, "test")
    assert all(math.isfinite(make_denominator(SENTENCES, how, (*PLAIN, 3)).log_prob(text)) for text in texts)
    assert not all(math.isfinite(graph(3, 0.0).log_prob(text)) for text in texts)


def test_a_graph_that_is_too_large_says_what_would_fit(tmp_path: Path) -> None:
    sentences = [[number % 50 + 1, number % 7 + 1, number % 11 + 1, 1] for number in range(300)]

    def refused(match: str, **how: float) -> None:
        with pytest.raises(UserError, match=match):
            make_denominator(sentences, from_dict(DenominatorConfig, how, "test"), range(1, 61))

    refused(
        r"order 4 over 60 tokens would have \d+ arcs, .*set lattice.denominator.order=2 \(", order=4, max_arcs=9_000
    )
    refused(r"set lattice.denominator.interpolation=0 \(", max_arcs=1_000)
    refused("raise lattice.denominator.max_arcs, or train with criterion mwer", max_arcs=10)
    one = graph()
    (tmp_path / "tokenizer.model").write_text("of this run")
    save_denominator(tmp_path, one, {"order": 2})
    again, digest = load_denominator(tmp_path)
    assert torch.equal(one.arcs, again.arcs) and torch.equal(one.scores, again.scores) and len(digest) == 64
    (tmp_path / "tokenizer.model").write_text("of another")
    with pytest.raises(UserError, match="belongs to another tokenizer"):
        load_denominator(tmp_path)
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-4] + b"xxxx")
    with pytest.raises(UserError, match="missing or damaged"):
        load_denominator(tmp_path)


@pytest.fixture(scope="module")
def k2() -> ModuleType:
    return pytest.importorskip("k2")


def outputs_of(lens: Sequence[int], seed: int, sharpness: float = 1.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    log_probs = sharpness * torch.randn(len(lens), max(lens), 3, generator=generator)
    return log_probs.log_softmax(2), torch.tensor(lens)


WIDE = {"search_beam": 100.0, "output_beam": 100.0, "max_active": 10_000}
TEXTS = [(1, 2), (2, 1, 2, 1), (1,)]
SYMBOLS, SYMBOL_LENS = torch.tensor([[1, 2, 0, 0], [2, 1, 2, 1], [1, 0, 0, 0]]), torch.tensor([2, 4, 1])
LENS = (4, 5, 2)


def lattice_and_outer(
    k2: ModuleType, criterion: Criterion, outputs: Tensor, lens: Tensor, found_by: Tensor | None = None, **how: Any
) -> tuple[Lattice, Outer]:
    settings = from_dict(LatticeConfig, {"denominator": WIDE, "reject_frames": False, **how}, "test")
    fsa = graph().fsa(k2, outputs.device)
    searched = outputs if found_by is None else found_by
    lattice = graph_lattice(k2, fsa, searched, lens, settings.kappa, settings.denominator)
    priors = torch.tensor([graph().log_prob(text) for text in TEXTS])
    return lattice, outer(criterion, k2, lattice, outputs, lens, SYMBOLS, SYMBOL_LENS, settings, priors)


def paths_of(length: int) -> list[tuple[int, ...]]:
    return list(itertools.product((0, *PLAIN), repeat=length))


def collapsed(path: Sequence[int]) -> tuple[int, ...]:
    return tuple(token for token, _ in itertools.groupby(path) if token != 0)


def best_alignment(outputs: Tensor, text: tuple[int, ...]) -> tuple[int, ...]:
    """The likeliest path of a text, of all of them."""
    fitting = [path for path in paths_of(len(outputs)) if collapsed(path) == text]
    return max(fitting, key=lambda path: sum(float(outputs[t, token]) for t, token in enumerate(path)))


def region_of(path: Sequence[int]) -> list[int]:
    """For each frame, which token of the path has begun last, -1 before the first."""
    regions, count = [], -1
    for before, token in zip((0, *path[:-1]), path, strict=True):
        count += token not in (0, before)
        regions.append(count)
    return regions


def accuracy_of(criterion: str, path: Sequence[int], aligned: Sequence[int], blank: float) -> float:
    if criterion == "mpe":
        mine, theirs = region_of(path), region_of(aligned)
        words, truth = collapsed(path), collapsed(aligned)
        earned = 0.0
        for z, token in enumerate(truth):
            frames = [t for t, region in enumerate(theirs) if region == z]
            if token in truth[max(0, z - 2) : z]:  # has to begin anew
                begins = {mine.index(q) for q in range(len(words)) if words[q] == token}
                earned += 2.0 * bool(begins & set(frames[:2]))
            else:
                earned += 2.0 / len(frames) * sum(mine[t] >= 0 and words[mine[t]] == token for t in frames)
        return earned - len(words)
    return sum((blank if t == 0 else 1.0) for t, a in zip(path, aligned, strict=True) if t == a)


def reference_objective(criterion: str, outputs: Tensor, text: tuple[int, ...], how: LatticeConfig) -> Tensor:
    """The objective of one utterance (T, V) over every path of frames, written out; differentiable."""
    outputs = outputs.double()
    aligned = best_alignment(outputs, text)
    scores, accuracies, reference = [], [], []
    for path in paths_of(len(outputs)):
        prior = graph().log_prob(collapsed(path))
        acoustic = how.kappa * torch.stack([outputs[t, token] for t, token in enumerate(path)]).sum()
        if collapsed(path) == text and (how.numerator == "graph" or path == aligned):
            reference.append(acoustic + prior)
        if math.isinf(prior):
            continue
        right = accuracy_of(criterion, path, aligned, how.blank)
        scores.append(acoustic + prior - (how.boost * right if criterion == "bmmi" else 0.0))
        accuracies.append(right)
    if criterion in ("mmi", "bmmi"):
        return torch.stack(reference).logsumexp(0) - torch.stack(scores).logsumexp(0)
    return (torch.stack(scores).softmax(0) * torch.tensor(accuracies).double()).sum()


HOW: list[dict[str, Any]] = [{}, {"kappa": 0.4, "boost": 0.7, "blank": 0.3}, {"numerator": "alignment"}]


@pytest.mark.slow
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("criterion", LATTICE)
def test_objective_and_derivative_are_those_over_all_paths(
    k2: ModuleType, criterion: Criterion, how: dict[str, Any]
) -> None:
    outputs, lens = outputs_of(LENS, 5)
    _, found = lattice_and_outer(k2, criterion, outputs, lens, **how)
    config = from_dict(LatticeConfig, how, "test")
    assert bool(found.counts.all()) and int(found.rejected) == 0
    for row, text in enumerate(TEXTS):
        leaf = outputs[row, : LENS[row]].clone().requires_grad_()
        expected = reference_objective(criterion, leaf, text, config)
        assert float(found.objective[row]) == pytest.approx(float(expected.detach()), abs=1e-4)
        derivative = torch.autograd.grad(expected, leaf)[0]
        torch.testing.assert_close(found.derivative[row, : LENS[row]], derivative, rtol=1e-3, atol=1e-4)
        assert float(found.derivative[row, LENS[row] :].abs().sum()) == 0.0
    sums = found.derivative.sum(dim=2)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-5)
    correct = sum(
        int(outputs[row, t].argmax()) == token
        for row, text in enumerate(TEXTS)
        for t, token in enumerate(best_alignment(outputs[row, : LENS[row]], text))
    )
    assert int(found.correct) == correct


def test_the_derivative_of_mmi_equals_finite_differences(k2: ModuleType) -> None:
    """Of the log ratio of numerator and denominator; and its sum over the tokens of a frame is 0."""
    outputs, lens = outputs_of(LENS, 6)
    found = lattice_and_outer(k2, "mmi", outputs, lens)[1]
    for row, t, v in ((0, 0, 0), (0, 3, 2), (1, 2, 1), (2, 1, 0)):
        moved = []
        for step in (0.05, -0.05):
            other = outputs.clone()
            other[row, t, v] += step
            moved.append(float(lattice_and_outer(k2, "mmi", other, lens)[1].objective[row]))
        assert (moved[0] - moved[1]) / 0.1 == pytest.approx(float(found.derivative[row, t, v]), abs=1e-3)
    torch.testing.assert_close(found.derivative.sum(2), torch.zeros(3, 5), rtol=0, atol=1e-5)


def test_the_toy_of_smbr(k2: ModuleType) -> None:
    """Two paths of scores 0.3 and -0.2 and accuracies 2 and 1: E = 1.6224593312, dE / ds = +-0.2350037."""
    fsas = k2.create_fsa_vec([k2.Fsa(torch.tensor([[0, 1, 1, 0], [0, 1, 2, 0], [1, 2, -1, 0]], dtype=torch.int32))])
    rows = torch.zeros(3, dtype=torch.int64)
    lattice = Lattice(fsas, rows, rows, torch.tensor([1, 2, -1]), torch.zeros(3))
    outputs = torch.tensor([[[0.0, 0.3, -0.2]]], requires_grad=True)
    posterior = lattice.scored(outputs, 1.0).get_arc_post(True, True).exp()
    accuracy = (posterior * torch.tensor([2.0, 1.0, 0.0])).sum()
    assert float(accuracy.detach()) == pytest.approx(1.6224593312, abs=1e-7)
    derivative = torch.autograd.grad(accuracy, outputs)[0][0, 0]
    torch.testing.assert_close(derivative, torch.tensor([0.0, 0.2350037, -0.2350037]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("text", "missing", "frame"), [((1, 1), [1, 0, 0, 0], 2), ((1, 2, 1), [1, 0, 0, 0, 0, 0], 4), ((1, 1), [1, 1, 1, 1], 2)], ids=str
)  # fmt: skip
def test_a_token_held_on_does_not_earn_what_a_repeated_one_is_worth(
    k2: ModuleType, text: tuple[int, ...], missing: list[int], frame: int
) -> None:
    """Saying all of the reference is worth its length; leaving out its repeated token costs one, and the derivative says to put it back."""
    right = [token for word in text for token in (word, 0)]

    def expected(path: list[int], other: list[int]) -> Outer:
        """Of outputs of which nearly all paths are ``path`` or, as a tenth of them, ``other``."""
        outputs = torch.full((1, len(path), 3), 1e-4)
        for t, (likely, less) in enumerate(zip(path, other, strict=True)):
            outputs[0, t, less] = 0.05
            outputs[0, t, likely] = 0.95
        outputs = (outputs / outputs.sum(2, keepdim=True)).log()
        lens, settings = torch.tensor([len(path)]), from_dict(LatticeConfig, {"denominator": WIDE}, "test")
        lattice = graph_lattice(k2, graph().fsa(k2, outputs.device), outputs, lens, 1.0, settings.denominator)
        symbols = torch.tensor([text])
        return outer("mpe", k2, lattice, outputs, lens, symbols, torch.tensor([len(text)]), settings, torch.zeros(1))

    full, lacking = expected(right, right), expected(missing, right)
    assert float(full.objective) == pytest.approx(len(text), abs=0.1)
    assert float(lacking.objective) < len(text) - 0.5
    assert float(lacking.derivative[0, frame, text[-1]]) > 0 or missing[frame] == text[-1]


def test_an_older_lattice_differs_by_its_paths_alone(k2: ModuleType) -> None:
    """Found with other outputs, but wide enough to hold every path, it has the same objective and derivative."""
    outputs, lens = outputs_of(LENS, 7)
    older, _ = outputs_of(LENS, 8)
    for criterion in LATTICE:
        now = lattice_and_outer(k2, criterion, outputs, lens)[1]
        then = lattice_and_outer(k2, criterion, outputs, lens, found_by=older)[1]
        torch.testing.assert_close(now.objective, then.objective, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(now.derivative, then.derivative, rtol=1e-4, atol=1e-5)


def test_frames_without_the_reference_are_rejected(k2: ModuleType) -> None:
    """A lattice so narrow that the unlikely reference is not in it."""
    outputs = torch.full((3, 5, 3), -9.0)
    outputs[:, :, 2] = -0.001
    narrow = {"search_beam": 100.0, "output_beam": 0.5, "max_active": 10_000}
    counts = set()  # the same frames, whatever the criterion
    for criterion in LATTICE:
        kept = lattice_and_outer(k2, criterion, outputs, torch.tensor(LENS), denominator=narrow)[1]
        found = lattice_and_outer(k2, criterion, outputs, torch.tensor(LENS), denominator=narrow, reject_frames=True)[1]
        assert int(kept.rejected) == 0 and int(found.rejected) > 0
        counts.add(int(found.rejected))
        rejected = (found.derivative == 0).all(dim=2) & (kept.derivative != 0).any(dim=2)
        if criterion in ("mmi", "bmmi"):
            assert bool(rejected.any()) and not bool((found.derivative != 0).all(dim=2).any())
        torch.testing.assert_close(found.derivative[~rejected], kept.derivative[~rejected])
    assert len(counts) == 1


def test_an_utterance_without_a_path_does_not_count(k2: ModuleType) -> None:
    """Two frames are too few for four tokens, and a beam that loses the end leaves no path."""
    outputs, _ = outputs_of(LENS, 9)
    lens = torch.tensor([4, 2, 2])
    found = lattice_and_outer(k2, "mmi", outputs, lens)[1]
    assert found.counts.tolist() == [True, False, True]
    assert float(found.objective[1]) == 0.0 and float(found.derivative[1].abs().sum()) == 0.0
    assert found.objective.isfinite().all() and found.derivative.isfinite().all()


@pytest.mark.parametrize("interpolation", [0.0, 0.3])
@pytest.mark.parametrize("order", [2, 3])
def test_the_graph_is_the_composition_with_the_ctc_topology(k2: ModuleType, order: int, interpolation: float) -> None:
    """k2's own composition of the n-gram, whose arcs are the graph's without repeats, gives the same totals."""
    mine = graph(order, interpolation)
    tokens = [(a, s) for a, s in zip(mine.arcs.tolist(), mine.scores.tolist(), strict=True) if a[0] % 2 == 0]
    final = mine.num_states - 1
    lines = [(a // 2, (b if b == final else b - 1) // 2, t, s) for (a, b, t), s in tokens if t != 0]
    rows = [[a, b, t, 0] for a, b, t, _ in sorted(lines)]
    lm = k2.Fsa(torch.tensor(rows, dtype=torch.int32))
    lm.scores = torch.tensor([s for *_, s in sorted(lines)])
    composed = k2.arc_sort(k2.connect(k2.compose(k2.ctc_topo(2), k2.arc_sort(lm))))
    outputs, _ = outputs_of((5, 4), 10)
    dense = k2.DenseFsaVec(outputs, torch.tensor([[0, 0, 5], [1, 0, 4]], dtype=torch.int32))
    totals = [
        k2.intersect_dense_pruned(fsa, dense, 100.0, 100.0, 0, 10_000).get_tot_scores(True, True)
        for fsa in (mine.fsa(k2, outputs.device), composed)
    ]
    torch.testing.assert_close(totals[0], totals[1])


def test_without_a_language_model_mmi_is_ctc(k2: ModuleType) -> None:
    """With lm_scale=0 every path of frames counts alike, and all together have the probability 1."""
    outputs, lens = outputs_of(LENS, 11)
    fsa = graph(lm_scale=0.0).fsa(k2, outputs.device)
    settings = from_dict(LatticeConfig, {"denominator": WIDE}, "test")
    lattice = graph_lattice(k2, fsa, outputs, lens, settings.kappa, settings.denominator)
    found = outer("mmi", k2, lattice, outputs, lens, SYMBOLS, SYMBOL_LENS, settings, torch.zeros(3))
    logits = outputs.clone().requires_grad_()
    log_probs = logits.log_softmax(2)
    ctc = torch.nn.functional.ctc_loss(log_probs.transpose(0, 1), SYMBOLS, lens, SYMBOL_LENS, reduction="none")
    torch.testing.assert_close(found.objective, -ctc.detach(), rtol=1e-4, atol=1e-4)
    expected = torch.autograd.grad(-ctc.sum(), logits)[0]
    valid = torch.arange(outputs.shape[1]) < lens.unsqueeze(1)
    torch.testing.assert_close(found.derivative, expected * valid.unsqueeze(2), rtol=1e-3, atol=1e-4)
