"""The quantizer: what it chooses, what its gradient is, where noise is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asrkit.nn.quantizer import GumbelQuantizer


def make(seed: int = 0, dim: int = 5, groups: int = 2, entries: int = 3, code_dim: int = 4) -> GumbelQuantizer:
    torch.manual_seed(seed)
    return GumbelQuantizer(dim, groups, entries, code_dim)


def test_it_begins_as_the_source_says() -> None:
    quantizer = make(dim=200, entries=320, code_dim=256)
    weights = quantizer.logits.weight.detach()
    assert float(weights.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(weights.std()) == pytest.approx(1.0, abs=0.01) and not quantizer.logits.bias.any()
    books = quantizer.codebooks.detach()
    assert books.shape == (2, 320, 128) and float(books.min()) >= 0 and float(books.max()) < 1
    assert float(books.mean()) == pytest.approx(0.5, abs=0.01)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.1, 2.0), st.booleans())
def test_the_entries_of_the_largest_logits_are_chosen_to_the_last_bit(
    seed: int, temperature: float, train: bool
) -> None:
    quantizer = make(seed).train(train)
    x = torch.randn(2, 7, 5)
    torch.manual_seed(seed + 1)
    made = quantizer(x, temperature)
    noise = torch.zeros(2, 7, 2, 3)
    if train:  # the very numbers that it drew
        torch.manual_seed(seed + 1)
        noise = -torch.empty(2, 7, 2, 3).exponential_().log()
    logits = quantizer.logits(x).view(2, 7, 2, 3)
    assert torch.equal(made.codes, (logits + noise).argmax(-1))
    for row in range(2):
        for frame in range(7):
            chosen = [quantizer.codebooks[group, made.codes[row, frame, group]] for group in range(2)]
            assert torch.equal(made.vectors[row, frame], torch.cat(chosen))
    torch.testing.assert_close(made.probabilities, logits.softmax(-1))


def test_in_evaluation_there_is_no_noise_and_no_temperature() -> None:
    quantizer, x = make().eval(), torch.randn(40, 5)
    before = torch.get_rng_state()
    one, other = quantizer(x, 2.0), quantizer(x, 0.1)
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(one.vectors, other.vectors)
    quantizer.train()
    noisy = [quantizer(x, 2.0).codes for _ in range(2)]
    assert not torch.equal(*noisy)


def test_noise_is_gumbel() -> None:
    """An entry is chosen as often as the softmax of its logit says, whatever the temperature."""
    quantizer = make(groups=1, code_dim=2).train()
    x = torch.randn(1, 5).expand(30_000, 5)
    for temperature in (0.5, 2.0):
        made = quantizer(x, temperature)
        shares = made.codes.flatten().bincount(minlength=3) / 30_000
        torch.testing.assert_close(shares, made.probabilities[0, 0].detach(), rtol=0, atol=0.015)


def test_the_gradient_is_that_of_the_softmax() -> None:
    """By finite differences of the soft choice, with the same noise."""
    quantizer = make(3).double().train()
    x, weights = torch.randn(6, 5).double(), torch.randn(6, 4).double()

    def soft(logits_bias: Tensor) -> Tensor:
        torch.manual_seed(9)
        logits = (x @ quantizer.logits.weight.t() + logits_bias).view(6, 2, 3)
        noise = -torch.empty_like(logits).exponential_().log()
        shares = ((logits + noise) / 0.7).softmax(-1)
        mixed = torch.einsum("ngv,gvc->ngc", shares, quantizer.codebooks).flatten(-2)
        return (mixed * weights).sum()

    torch.manual_seed(9)
    (quantizer(x, 0.7).vectors * weights).sum().backward()
    assert quantizer.logits.bias.grad is not None
    with torch.no_grad():
        for number in range(6):
            step = torch.zeros(6).double()
            step[number] = 1e-6
            bias = quantizer.logits.bias
            difference = (soft(bias + step) - soft(bias - step)) / 2e-6
            assert float(quantizer.logits.bias.grad[number]) == pytest.approx(float(difference), rel=1e-5, abs=1e-8)


def test_the_codebook_learns_where_it_is_chosen() -> None:
    quantizer = make(4).train()
    made = quantizer(torch.randn(3, 5), 1.0)
    made.vectors.sum().backward()
    gradient = quantizer.codebooks.grad
    assert gradient is not None
    for group in range(2):
        chosen = made.codes[:, group].bincount(minlength=3)
        torch.testing.assert_close(gradient[group], chosen[:, None].expand(3, 2).float())
