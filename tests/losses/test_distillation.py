"""The divergence of two transducers on one lattice, against loops over its nodes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.losses.distillation import (
    counted_nodes,
    delayed,
    divergence,
    encoder_distance,
    frame_divergence,
    full_lattice_divergence,
    mean_log_probs,
    node_divergence,
    node_log_probs,
)


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


GOLDEN: dict[str, Any] = {
    "student": torch.tensor([0.0, 1.0, 2.0, -1.0], dtype=torch.float64).view(1, 1, 1, 4),
    "teacher": torch.tensor([1.0, 0.0, 2.0, 0.5], dtype=torch.float64).view(1, 1, 1, 4),
    "symbols": torch.tensor([[2]]),
    "ranges": torch.zeros(1, 1, 1, dtype=torch.int64),
    "encoder_out_lens": torch.tensor([1]),
    "symbol_lens": torch.tensor([1]),
}


def test_golden_values() -> None:
    student = GOLDEN["student"].clone().requires_grad_()
    common = {key: GOLDEN[key] for key in ("symbols", "ranges", "symbol_lens")}
    for logits, expected in (
        (student, [0.643914, 0.087144, 0.268942]),
        (GOLDEN["teacher"], [0.579259, 0.213097, 0.207644]),
    ):
        found = node_log_probs(logits, **common).exp().flatten().tolist()
        assert found == pytest.approx(expected, abs=1e-6)
    three = node_divergence(**{**GOLDEN, "student": student})
    (grad,) = torch.autograd.grad(three.sum(), student)
    assert float(three.detach()) == pytest.approx(0.0755419890, abs=1e-9)
    assert grad.flatten().tolist() == pytest.approx([-0.1259529855, 0.0539904436, 0.0646557299, 0.0073068120], abs=1e-9)
    assert float(node_divergence(**GOLDEN, classes="all")) == pytest.approx(0.2227615685, abs=1e-9)


seeds = st.integers(0, 10**6)


def both_log_probs(made: dict[str, Any], classes: Any = "three") -> tuple[torch.Tensor, torch.Tensor]:
    """The student's and the teacher's."""
    common = (made["symbols"], made["ranges"], made["symbol_lens"], classes)
    return node_log_probs(made["student"], *common), node_log_probs(made["teacher"], *common)


@settings(deadline=None, max_examples=25)
@given(seeds, st.integers(3, 7))
def test_three_classes_are_never_further_apart_than_all(seed: int, vocab: int) -> None:
    made = lattice(2, 4, 3, 3, vocab, seed)
    three, every = (node_divergence(**made, classes=classes) for classes in ("three", "all"))  # type: ignore[arg-type]
    assert bool((three <= every + 1e-9).all())
    if vocab == 3:  # blank, next symbol and one other are all there is, but for the last row
        made["symbol_lens"] = torch.full((2,), 3)
        inner = counted_nodes(made["ranges"], made["encoder_out_lens"], made["symbol_lens"], "drop")
        parts = [both_log_probs(made, classes) for classes in ("three", "all")]
        torch.testing.assert_close(*(divergence(found, expected, inner) for found, expected in parts))


@settings(deadline=None, max_examples=25)
@given(seeds, st.sampled_from(["three", "all"]))
def test_gradients_sum_to_nothing_and_constants_change_nothing(seed: int, classes: Any) -> None:
    made = lattice(2, 4, 3, 2, 6, seed)
    student = made["student"].clone().requires_grad_()
    found = node_divergence(**{**made, "student": student}, classes=classes)
    (grad,) = torch.autograd.grad(found.sum(), student)
    assert float(grad.sum(-1).abs().max()) < 1e-9
    moved = node_divergence(**{**made, "student": made["student"] + torch.randn(2, 4, 2, 1)}, classes=classes)
    torch.testing.assert_close(moved, found.detach(), rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_the_gradient_is_the_formulas(seed: int) -> None:
    """P_k (1 - Pt_c / Ps_c) for a token k of class c; P_k - Pt_k in the full form (equation 3)."""
    made = lattice(1, 1, 1, 2, 6, seed)
    made |= {"ranges": torch.tensor([[[0]]]), "encoder_out_lens": torch.tensor([1]), "symbol_lens": torch.tensor([1])}
    made |= {who: made[who][:, :, :1] for who in ("student", "teacher")}
    student = made["student"].clone().requires_grad_()
    three, every = (
        torch.autograd.grad(node_divergence(**{**made, "student": student}, classes=classes).sum(), student)[0].flatten()  # type: ignore[arg-type]
        for classes in ("three", "all")
    )  # fmt: skip
    found, expected = (made[who].flatten().softmax(0) for who in ("student", "teacher"))
    torch.testing.assert_close(every, found - expected)
    symbol = int(made["symbols"][0, 0])
    others = [k for k in range(6) if k not in (0, symbol)]
    for members in ([0], [symbol], others):
        share = found[members] * (1 - expected[members].sum() / found[members].sum())
        torch.testing.assert_close(three[members], share, rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(seeds)
def test_which_other_symbol_it_is_does_not_matter(seed: int) -> None:
    """Logits of symbols that are neither blank nor next are swapped among themselves."""
    made = lattice(1, 4, 1, 2, 6, seed)
    made["symbols"], made["symbol_lens"] = torch.tensor([[2]]), torch.tensor([1])
    order = torch.tensor([0, 4, 2, 5, 1, 3])
    torch.testing.assert_close(
        node_divergence(**{**made, "student": made["student"][..., order]}), node_divergence(**made)
    )


@settings(deadline=None, max_examples=25)
@given(seeds, st.sampled_from(["three", "all"]), st.sampled_from(["forward", "reverse"]))
def test_padding_changes_nothing(seed: int, classes: Any, direction: Any) -> None:
    made = lattice(3, 5, 4, 3, 6, seed)

    def of(**made: Any) -> torch.Tensor:
        nodes = counted_nodes(made["ranges"], made["encoder_out_lens"], made["symbol_lens"])
        return divergence(*both_log_probs(made, classes), nodes, direction)

    together = of(**made)
    for row in range(3):
        frames = int(made["encoder_out_lens"][row])
        cropped = {"student", "teacher", "ranges"}
        alone = of(**{k: v[row : row + 1, :frames] if k in cropped else v[row : row + 1] for k, v in made.items()})
        torch.testing.assert_close(alone[0], together[row])


def test_reverse_swaps_the_two_and_drop_leaves_out_the_last_row() -> None:
    made = lattice(2, 5, 3, 3, 6, 4)
    nodes = counted_nodes(made["ranges"], made["encoder_out_lens"], made["symbol_lens"])
    student, teacher = both_log_probs(made)
    torch.testing.assert_close(divergence(student, teacher, nodes, "reverse"), divergence(teacher, student, nodes))
    inner = counted_nodes(made["ranges"], made["encoder_out_lens"], made["symbol_lens"], "drop")
    assert bool((inner <= nodes).all())
    assert torch.equal(nodes & ~inner, nodes & (made["ranges"] == made["symbol_lens"].view(-1, 1, 1)))


@settings(deadline=None, max_examples=20)
@given(
    seeds, st.integers(1, 3), st.integers(1, 7), st.integers(1, 4), st.integers(1, 9),
    st.sampled_from(["three", "all"]), st.sampled_from([1.0, 2.0]),
)  # fmt: skip
def test_the_full_lattice_in_chunks_is_the_full_lattice(
    seed: int, batch: int, frames: int, symbols: int, chunk: int, classes: Any, temperature: float
) -> None:
    """Value and every gradient, those of the joiner's weights included."""
    made = lattice(batch, frames, symbols, symbols + 1, 6, seed)
    ranges = torch.arange(symbols + 1).expand(batch, frames, -1)
    made["teacher"] = made["teacher"][:, :, : symbols + 1]
    generator = torch.Generator().manual_seed(seed)
    encoder, predictor = (
        torch.randn(batch, size, 5, generator=generator, dtype=torch.float64, requires_grad=True)
        for size in (frames, symbols + 1)
    )
    out = torch.nn.Linear(5, 6, dtype=torch.float64)

    def joiner(encoder: torch.Tensor, predictor: torch.Tensor) -> torch.Tensor:
        return out(torch.tanh(encoder + predictor))

    common = (made["symbols"], ranges, made["symbol_lens"], classes, temperature)
    expected = node_log_probs(made["teacher"], *common)
    nodes = counted_nodes(ranges, made["encoder_out_lens"], made["symbol_lens"])
    whole = divergence(node_log_probs(joiner(encoder.unsqueeze(2), predictor.unsqueeze(1)), *common), expected, nodes)
    chunked = full_lattice_divergence(
        encoder, predictor, joiner, lambda frames, ranges: expected[:, frames], made["symbols"], made["encoder_out_lens"],
        made["symbol_lens"], classes=classes, temperature=temperature, chunk=chunk,
    )  # fmt: skip
    torch.testing.assert_close(chunked, whole)
    leaves = [encoder, predictor, *out.parameters()]
    for one, other in zip(*(torch.autograd.grad(x.sum(), leaves) for x in (chunked, whole)), strict=True):
        torch.testing.assert_close(one, other)


def most_allocated(chunk: int, vocab: int, trace: Path) -> int:
    """The most bytes that tensors take at once, forwards and backwards through the lattice of one utterance."""
    encoder, predictor = torch.randn(1, 24, 8, requires_grad=True), torch.randn(1, 21, 8, requires_grad=True)
    out = torch.nn.Linear(8, vocab)
    symbols, lens = torch.randint(1, vocab, (1, 20)), torch.tensor([20])

    def joiner(encoder: torch.Tensor, predictor: torch.Tensor) -> torch.Tensor:
        return out(torch.tanh(encoder + predictor))

    def expected(frames: slice, ranges: torch.Tensor) -> torch.Tensor:
        logits = joiner(encoder[:, frames].unsqueeze(2) + 1, predictor.unsqueeze(1))
        return node_log_probs(logits, symbols, ranges, lens)

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        full_lattice_divergence(
            encoder, predictor, joiner, expected, symbols, torch.tensor([24]), lens, chunk=chunk
        ).sum().backward()
    profile.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]"]
    return max(totals) - min(totals)


@pytest.mark.slow
def test_memory_is_that_of_a_chunk(tmp_path: Path) -> None:
    """A few times the logits of one chunk, whatever the vocabulary; not of the lattice."""
    for vocab in (200, 2000):
        frame = 21 * vocab * 4  # bytes of the logits of one frame
        assert most_allocated(1, vocab, tmp_path / "trace.json") < 6 * frame
        assert most_allocated(24, vocab, tmp_path / "trace.json") > 24 * frame


def test_delay() -> None:
    frames = torch.arange(6.0).view(1, 6, 1).repeat(2, 1, 1)
    lens = torch.tensor([6, 4])
    assert delayed(frames, lens, 2)[..., 0].tolist() == [[0, 0, 0, 1, 2, 3], [0, 0, 0, 1, 2, 3]]
    assert delayed(frames, lens, -2)[0, :, 0].tolist() == [2, 3, 4, 5, 5, 5]
    assert delayed(frames, lens, -2)[1, :4, 0].tolist() == [2, 3, 3, 3]
    assert delayed(frames, lens, 0) is frames


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from(["mse", "l2", "l1", "cosine"]))
def test_encoder_distances(seed: int, kind: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    found, expected = (torch.randn(2, 4, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    lens = torch.tensor([4, 2])
    sums = []
    for b in range(2):
        total = 0.0
        for t in range(int(lens[b])):
            x, y = found[b, t].tolist(), expected[b, t].tolist()
            squared = sum((p - q) ** 2 for p, q in zip(x, y, strict=True))
            lengths = math.sqrt(sum(p * p for p in x) * sum(q * q for q in y))
            cosine = sum(p * q for p, q in zip(x, y, strict=True)) / lengths
            sizes = sum(abs(p - q) for p, q in zip(x, y, strict=True))
            total += {"mse": squared / 3, "l2": math.sqrt(squared), "l1": sizes / 3, "cosine": 1 - cosine}[kind]
        sums.append(total)
    torch.testing.assert_close(
        encoder_distance(found, expected, lens, kind), torch.tensor(sums, dtype=torch.float64), rtol=1e-5, atol=1e-5
    )
    same = found.clone().requires_grad_()
    (grad,) = torch.autograd.grad(encoder_distance(same, found, lens, kind).sum(), same)
    assert bool(grad.isfinite().all()) and float(grad.abs().max()) < 1e-6


def test_the_mean_of_several() -> None:
    logits = torch.randn(3, 2, 4, dtype=torch.float64)
    parts = list(logits.log_softmax(-1))
    torch.testing.assert_close(mean_log_probs(parts).exp(), logits.softmax(-1).mean(0))
    assert mean_log_probs(parts[:1]) is parts[0]


@pytest.mark.parametrize("margin", [5.0, 20.0, 60.0, 200.0])
def test_a_student_sure_of_itself_still_learns_the_rest(margin: float) -> None:
    """The rest's probability is e^-margin of the student's: value and gradient in float32 equal those of float64, and a loop's."""
    student = torch.tensor([margin, 0.0, 0.3, -0.5, 0.1]).view(1, 1, 1, 5).requires_grad_()
    teacher = torch.tensor([0.2, 0.7, 0.1, -0.3, 0.4]).view(1, 1, 1, 5)
    rest: dict[str, Any] = {"symbols": torch.tensor([[1]]), "ranges": torch.zeros(1, 1, 1, dtype=torch.int64)}
    rest |= {"encoder_out_lens": torch.tensor([1]), "symbol_lens": torch.tensor([1])}
    loss = node_divergence(student, teacher, **rest)
    (grad,) = torch.autograd.grad(loss.sum(), student)

    exact = student.detach().double().flatten().requires_grad_()
    p = teacher.double().flatten().log_softmax(0)
    classes = [[1], [0], [2, 3, 4]]
    expected = sum(
        p[k].logsumexp(0).exp() * (p[k].logsumexp(0) - (exact[k].logsumexp(0) - exact.logsumexp(0))) for k in classes
    )
    (exact_grad,) = torch.autograd.grad(expected, exact)  # type: ignore[arg-type]
    torch.testing.assert_close(loss[0].double(), expected, rtol=1e-5, atol=0.0)  # type: ignore[arg-type]
    torch.testing.assert_close(grad.flatten().double(), exact_grad, rtol=1e-5, atol=1e-7)
    assert float(grad.flatten()[2]) < -0.1  # where a bound was, it had none


def test_the_three_classes_are_one_and_the_rest_after_the_last_symbol_is_all_but_the_blank() -> None:
    made = lattice(2, 5, 3, 3, 6, 7)
    found = node_log_probs(made["student"], made["symbols"], made["ranges"], made["symbol_lens"]).exp()
    last = made["ranges"] >= made["symbol_lens"].view(-1, 1, 1)
    torch.testing.assert_close(found.sum(-1)[~last], torch.ones(int((~last).sum()), dtype=torch.float64))
    torch.testing.assert_close(found[last][:, 2], 1 - made["student"].softmax(-1)[last][:, 0])


@settings(deadline=None, max_examples=20)
@given(seeds, st.sampled_from([1.0, 0.5, 3.0]), st.sampled_from(["forward", "reverse"]))
def test_the_frames_divergence_is_that_of_tempered_logits(seed: int, temperature: float, direction: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(2, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    lens = torch.tensor([4, 2])
    found = frame_divergence(student.log_softmax(-1), teacher.log_softmax(-1), lens, direction, temperature)
    sums = []
    for b in range(2):
        total = 0.0
        for t in range(int(lens[b])):
            q, p = ((x[b, t] / temperature).softmax(0).tolist() for x in (student, teacher))
            p, q = (q, p) if direction == "reverse" else (p, q)
            total += sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
        sums.append(total)
    torch.testing.assert_close(found, torch.tensor(sums, dtype=torch.float64))
