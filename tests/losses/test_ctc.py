"""CTC from logits against torch's loss after a log-softmax: values and gradients."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.losses.ctc import ctc_loss


def reference(
    logits: torch.Tensor, symbols: torch.Tensor, lens: torch.Tensor, symbol_lens: torch.Tensor
) -> torch.Tensor:
    log_probs = logits.log_softmax(2).transpose(0, 1)
    return F.ctc_loss(log_probs, symbols, lens, symbol_lens, reduction="none", zero_infinity=True)


@given(st.integers(0, 1 << 30), st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), st.integers(2, 7))
@settings(max_examples=60, deadline=None)
def test_it_is_torch_s_loss(seed: int, batch: int, frames: int, symbols: int, vocab: int) -> None:
    """With repeated symbols, padding, empty texts, and utterances that have no alignment."""
    torch.manual_seed(seed)
    logits = (3 * torch.randn(batch, frames, vocab, dtype=torch.float64)).requires_grad_()
    texts = torch.randint(1, vocab, (batch, symbols))
    lens, symbol_lens = torch.randint(1, frames + 1, (batch,)), torch.randint(0, symbols + 1, (batch,))
    weights = torch.rand(batch, dtype=torch.float64)
    results = []
    for loss in (ctc_loss, reference):
        value = loss(logits, texts, lens, symbol_lens)
        (gradient,) = torch.autograd.grad((weights * value).sum(), logits)
        results.append((value.detach(), gradient))
    torch.testing.assert_close(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@given(st.integers(0, 1 << 30), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_an_utterance_without_a_frame_has_a_loss_and_a_gradient_of_0(seed: int, frames: int) -> None:
    """Beside others, and where no utterance of the batch has one."""
    torch.manual_seed(seed)
    logits = torch.randn(3, frames, 5, requires_grad=True)
    lens, symbol_lens = torch.tensor([0, frames, 0]), torch.tensor([0, 1, 2])
    value = ctc_loss(logits, torch.tensor([[1, 1], [2, 1], [3, 4]]), lens, symbol_lens)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value[0] == value[2] == 0 and (value[1] > 0) == (frames > 0)
    assert not gradient[[0, 2]].any() and gradient[1].any() == (frames > 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, 12, 40).to(dtype).requires_grad_()
    texts, lens, symbol_lens = torch.randint(1, 40, (3, 5)), torch.tensor([12, 9, 11]), torch.tensor([5, 3, 4])
    value = ctc_loss(logits, texts, lens, symbol_lens)
    expected = reference(logits.float(), texts, lens, symbol_lens)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(one.sum(), logits) for one in (value, expected))
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
