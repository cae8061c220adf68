"""The divergence of two transducers on one lattice, against loops over its nodes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.losses.distillation import node_divergence


def lattice(batch: int, frames: int, symbols: int, width: int, vocab: int, seed: int) -> dict[str, Any]:
    """Random logits of student and teacher, symbols, ranges (monotone starts), and lengths that differ."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, frames, width, vocab)
    student, teacher = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(1, vocab, (batch, symbols), generator=generator)
    starts = torch.randint(0, symbols + 2 - width, (batch, frames), generator=generator).cummax(1).values
    frame_lens = torch.randint(1, frames + 1, (batch,), generator=generator)
    symbol_lens = torch.randint(0, symbols + 1, (batch,), generator=generator)
    return {
        "student": student,
        "teacher": teacher,
        "symbols": targets,
        "ranges": starts.unsqueeze(2) + torch.arange(width),
        "encoder_out_lens": frame_lens,
        "symbol_lens": symbol_lens,
    }


def slow(
    student: Any, teacher: Any, symbols: Any, ranges: Any, encoder_out_lens: Any, symbol_lens: Any, classes: str
) -> list[float]:
    sums = []
    for b in range(len(student)):
        total = 0.0
        for t in range(int(encoder_out_lens[b])):
            for s in range(ranges.shape[2]):
                u = int(ranges[b, t, s])
                if u > symbol_lens[b]:
                    continue
                p, q = teacher[b, t, s].softmax(0).tolist(), student[b, t, s].softmax(0).tolist()
                if classes == "three":
                    named = [0] + ([int(symbols[b, u])] if u < symbol_lens[b] else [])
                    p, q = ([x[v] for v in named] + [sum(x) - sum(x[v] for v in named)] for x in (p, q))
                total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        sums.append(total)
    return sums


@settings(deadline=None, max_examples=30)
@given(
    st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(3, 6), st.integers(0, 10**6),
    st.sampled_from(["three", "all"]), st.data(),
)  # fmt: skip
def test_equals_a_loop_over_the_nodes(
    batch: int, frames: int, symbols: int, vocab: int, seed: int, classes: Any, data: st.DataObject
) -> None:
    width = data.draw(st.integers(2, symbols + 1))
    made = lattice(batch, frames, symbols, width, vocab, seed)
    found = node_divergence(**made, classes=classes)
    expected = torch.tensor(slow(**made, classes=classes), dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_a_model_learns_nothing_from_itself_and_the_teacher_nothing_at_all() -> None:
    made = lattice(2, 5, 3, 3, 6, 1)
    student = made["student"].float().requires_grad_()
    for classes in ("three", "all"):
        same = node_divergence(**{**made, "student": student, "teacher": student}, classes=classes)  # type: ignore[arg-type]
        assert same.abs().max() < 1e-5
        (grad,) = torch.autograd.grad(same.sum(), student)
        assert grad.abs().max() < 1e-5
    teacher = torch.randn_like(student).requires_grad_()
    node_divergence(**{**made, "student": student, "teacher": teacher}).sum().backward()
    assert teacher.grad is None and student.grad is not None and student.grad.abs().sum() > 0


@pytest.mark.parametrize("classes", ["three", "all"])
def test_gradients(classes: Any) -> None:
    made = lattice(2, 3, 3, 2, 5, 3)
    student = made.pop("student").requires_grad_()
    assert torch.autograd.gradcheck(lambda x: node_divergence(student=x, **made, classes=classes), student)
