"""The contrastive and the diversity loss against loops, and where they must be finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asrkit.losses.contrastive import (
    code_shares,
    contrastive_logits,
    contrastive_nll,
    diversity_loss,
    perplexity,
    told_apart,
)


def drawn(
    seed: int, targets: int = 6, hidden: int = 4, entries: int = 3
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """contexts, targets, codes, own, distractors of 2 utterances; few codes, so that some are equal."""
    torch.manual_seed(seed)
    codes = torch.randint(entries, (2, targets, 2))
    vectors = torch.randn(entries, entries, 5)[codes[..., 0], codes[..., 1]]  # equal codes, equal vectors
    own = torch.stack([torch.randperm(targets)[:hidden] for _ in range(2)])
    distractors = torch.randint(targets - 1, (2, hidden, 7))
    distractors += distractors >= own.unsqueeze(-1)
    return torch.randn(2, hidden, 5), vectors, codes, own, distractors


def slow_losses(
    contexts: Tensor, targets: Tensor, codes: Tensor, own: Tensor, distractors: Tensor, temperature: float
) -> tuple[list[float], list[list[bool]]]:
    """One frame and one distractor at a time."""
    losses, right = [], []
    for row in range(len(contexts)):
        total, told = 0.0, []
        for frame in range(contexts.shape[1]):
            mine = int(own[row, frame])
            scores = [float(torch.cosine_similarity(contexts[row, frame], targets[row, mine], dim=0)) / temperature]
            for other in distractors[row, frame].tolist():
                assert other != mine
                if torch.equal(targets[row, other], targets[row, mine]):
                    continue
                scores.append(
                    float(torch.cosine_similarity(contexts[row, frame], targets[row, other], dim=0)) / temperature
                )
            total += math.log(sum(math.exp(score) for score in scores)) - scores[0]
            told.append(len(scores) > 1 and scores[0] > max(scores[1:]))
        losses.append(total)
        right.append(told)
    return losses, right


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.sampled_from([0.1, 1.0]), st.integers(1, 4))
def test_the_loss_is_that_of_a_loop(seed: int, temperature: float, entries: int) -> None:
    made = drawn(seed, entries=entries)
    logits = contrastive_logits(*made, temperature)
    losses, right = slow_losses(*made, temperature)
    torch.testing.assert_close(contrastive_nll(logits), torch.tensor(losses), rtol=1e-4, atol=1e-4)
    assert told_apart(logits).tolist() == right


def test_a_loss_by_hand() -> None:
    """Cosines of 1 and 0 at a temperature of 1, and a distractor that equals the target, which does not count."""
    contexts = torch.tensor([[[2.0, 0.0]]])
    targets = torch.tensor([[[3.0, 0.0], [0.0, 1.0], [3.0, 0.0]]])
    codes = torch.tensor([[[0], [1], [0]]])
    logits = contrastive_logits(contexts, targets, codes, torch.tensor([[0]]), torch.tensor([[[1, 2, 1]]]), 1.0)
    assert logits.tolist() == [[[1.0, 0.0, float("-inf"), 0.0]]]
    assert float(contrastive_nll(logits)) == pytest.approx(math.log(math.e + 2) - 1)


def test_at_random_the_loss_is_the_logarithm_of_the_choices() -> None:
    torch.manual_seed(0)
    contexts, targets = torch.randn(4, 60, 4096), torch.randn(4, 60, 4096)  # so wide that all cosines are near 0
    own = torch.arange(60).expand(4, 60)
    distractors = torch.randint(59, (4, 60, 100))
    distractors += distractors >= own.unsqueeze(-1)
    codes = torch.arange(60).expand(4, 60).unsqueeze(-1)
    loss = contrastive_nll(contrastive_logits(contexts, targets, codes, own, distractors, 0.1)).sum() / 240
    assert float(loss) == pytest.approx(math.log(101), abs=0.05)


def test_where_all_targets_are_equal_the_loss_is_0_and_nothing_is_told_apart() -> None:
    contexts, targets, codes, own, distractors = drawn(3)
    contexts.requires_grad_()
    targets = targets[:, :1].expand_as(targets).clone().requires_grad_()
    logits = contrastive_logits(contexts, targets, torch.zeros_like(codes), own, distractors, 0.1)
    loss = contrastive_nll(logits)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0] and not told_apart(logits).any()
    assert contexts.grad is not None and targets.grad is not None
    assert bool(contexts.grad.isfinite().all()) and bool(targets.grad.isfinite().all())


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10**6), st.integers(2, 5), st.booleans())
def test_diversity_and_perplexity_are_those_of_loops(seed: int, entries: int, some: bool) -> None:
    torch.manual_seed(seed)
    probabilities = torch.randn(2, 3, 2, entries).mul(3).softmax(-1)
    counted = torch.tensor([[True, True, False], [True, False, False]]) if some else None
    kept = [(row, frame) for row in range(2) for frame in range(3) if counted is None or bool(counted[row, frame])]
    codes, total, used = probabilities.argmax(-1), 0.0, 0.0
    for group in range(2):
        shares = [
            sum(float(probabilities[row, frame, group, v]) for row, frame in kept) / len(kept) for v in range(entries)
        ]
        total += math.exp(-sum(share * math.log(share) for share in shares))
        shares = [sum(int(codes[row, frame, group]) == v for row, frame in kept) / len(kept) for v in range(entries)]
        used += math.exp(-sum(share * math.log(share) for share in shares if share > 0))
    expected = (2 * entries - total) / (2 * entries)
    assert float(diversity_loss(probabilities, counted)) == pytest.approx(expected, abs=1e-5)
    assert float(perplexity(code_shares(codes, entries, counted))) == pytest.approx(used, rel=1e-5)


def test_the_ends_of_the_diversity() -> None:
    uniform = torch.full((1, 4, 2, 320), 1 / 320)
    assert float(diversity_loss(uniform)) == pytest.approx(0.0, abs=1e-5)
    single = torch.zeros(1, 4, 2, 320)
    single[..., 7] = 1.0
    single.requires_grad_()
    loss = diversity_loss(single)
    loss.backward()
    assert (
        float(loss.detach()) == pytest.approx(1 - 2 / 640)
        and single.grad is not None
        and bool(single.grad.isfinite().all())
    )
    assert float(perplexity(code_shares(torch.zeros(2, 5, 2, dtype=torch.int64), 320))) == pytest.approx(2.0)
