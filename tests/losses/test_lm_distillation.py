"""What language models teach frames: the formulas of arXiv 2110.10429, and the way from alignments to frames and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import MonoCut, SupervisionSegment
from lhotse.cut import MixedCut, MixTrack
from lhotse.supervision import AlignmentItem

from asrkit.data.alignment import SILENT, UNKNOWN, Annotator, PerturbedCut, items_of
from asrkit.data.text.units import Inventory, write_inventory
from asrkit.frames import encoder_start
from asrkit.losses.lm_distillation import (
    frame_accuracy,
    interpolated_labels,
    lm_posteriors,
    multi_task,
    one_hot_silence,
    rearrange,
    soft_cross_entropy,
)

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(2, 5), st.integers(0, 10**6))


@settings(deadline=None, max_examples=30)
@given(SHAPES)
def test_cross_entropy_of_soft_targets_frame_by_frame(shape: tuple[int, int, int, int]) -> None:
    batch, frames, classes, seed = shape
    torch.manual_seed(seed)
    logits, teacher = torch.randn(2, batch, frames, classes)
    counted = torch.rand(batch, frames) < 0.7
    expected = []
    for b in range(batch):
        total = 0.0
        for t in range(frames):
            if counted[b, t]:
                hot = [math.exp(float(v) / 2.0) for v in teacher[b, t]]
                norm = math.log(sum(math.exp(float(u)) for u in logits[b, t]))
                total -= sum(p / sum(hot) * (float(u) - norm) for p, u in zip(hot, logits[b, t], strict=True))
        expected.append(total)
    found = soft_cross_entropy(logits, lm_posteriors(teacher, 2.0), counted)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_temperature_of_the_teacher() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    torch.testing.assert_close(lm_posteriors(logits), logits.softmax(-1))
    torch.testing.assert_close(lm_posteriors(logits, 1e6), torch.full((4, 7), 1 / 7), rtol=1e-4, atol=1e-5)
    assert not lm_posteriors(logits).requires_grad
    # T only on the teacher is the default; the student's own can be had.
    student, all_frames = torch.randn(1, 4, 7), torch.ones(1, 4, dtype=torch.bool)
    targets = lm_posteriors(logits, 3.0).unsqueeze(0)
    torch.testing.assert_close(
        soft_cross_entropy(student, targets, all_frames, 3.0), soft_cross_entropy(student / 3.0, targets, all_frames)
    )


@settings(deadline=None, max_examples=30)
@given(SHAPES, st.sampled_from([0.0, 0.3, 0.9, 1.0]))
def test_one_interpolated_cross_entropy_is_both(shape: tuple[int, int, int, int], weight: float) -> None:
    """Equation 3 against 2: the divergence form differs by the teacher's entropy alone, so the gradients are the same."""
    batch, frames, classes, seed = shape
    torch.manual_seed(seed)
    logits = torch.randn(batch, frames, classes, requires_grad=True)
    soft = lm_posteriors(torch.randn(batch, frames, classes), 5.0)
    labels, counted = torch.randint(classes, (batch, frames)), torch.rand(batch, frames) < 0.8
    one = soft_cross_entropy(logits, interpolated_labels(labels, soft, weight), counted).sum()
    log_probs = logits.log_softmax(-1)
    hard = -log_probs.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    divergence = (soft * (soft.log() - log_probs)).sum(-1)
    both = ((weight * hard + (1 - weight) * divergence) * counted).sum()
    entropy = -(soft * soft.log()).sum(-1)
    torch.testing.assert_close(one, both + (1 - weight) * (entropy * counted).sum(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        torch.autograd.grad(one, logits, retain_graph=True)[0],
        torch.autograd.grad(both, logits)[0],
        rtol=1e-4,
        atol=1e-5,
    )


def test_the_heads_share_what_the_labels_leave() -> None:
    main, taught = torch.tensor([2.0, 4.0]), torch.tensor([[1.0, 1.0], [3.0, 5.0]])
    shares = torch.tensor([0.5, 0.5])
    torch.testing.assert_close(multi_task(main, taught, shares, 0.9), torch.tensor([2.0, 3.9]))
    assert torch.equal(multi_task(main, taught, shares, 1.0), main)
    # Three heads' loss is the sum of what each alone adds.
    three, weights = torch.rand(3, 2), torch.tensor([0.2, 0.5, 0.3])
    alone = [multi_task(main * 0, three[j : j + 1], weights[j : j + 1], 0.4) for j in range(3)]
    torch.testing.assert_close(multi_task(main, three, weights, 0.4), 0.4 * main + torch.stack(alone).sum(0))


def test_frames_that_are_right() -> None:
    logits = torch.eye(3)[torch.tensor([[0, 1, 2, 2]])]
    counted = torch.tensor([[True, True, True, False]])
    assert frame_accuracy(logits, torch.tensor([[0, 1, 1, 2]]), counted) == (2, 3)


def test_silence_as_a_class() -> None:
    targets = one_hot_silence(torch.zeros(2, 3), 4)
    assert targets.shape == (2, 3, 4) and bool((targets[..., 0] == 1).all()) and float(targets.sum()) == 6


@pytest.fixture(scope="module")
def inventory(tmp_path_factory: pytest.TempPathFactory) -> Inventory:
    return Inventory.of(write_inventory(["a", "b", "c"], tmp_path_factory.mktemp("units") / "tokenizer.model"), "phone")


def make_cut(items: list[tuple[str, float, float]] | None, seconds: float) -> MonoCut:
    alignment = None if items is None else {"phone": [AlignmentItem(*item) for item in items]}
    supervision = SupervisionSegment("s", "r", 0, seconds, text="x", alignment=alignment)
    return MonoCut("cut", 0, seconds, 0, supervisions=[supervision])


ITEMS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=50)
@given(ITEMS, st.booleans(), st.integers(0, 4))
def test_segments_of_a_synthetic_alignment(
    inventory: Inventory, items: list[tuple[str, int, int]], fill: bool, tail: int
) -> None:
    """Frames go back to their labels; every frame of a segment has its posterior; as many steps as segments, repeats included."""
    placed, labels, frame = [], [], 0
    for number, (symbol, length, gap) in enumerate(items):
        placed.append((symbol, round(encoder_start(frame), 3), round(length * 0.04, 2)))
        labels += [number] * length + [number if fill else SILENT] * gap
        frame += length + gap
    labels += [len(items) - 1 if fill else SILENT] * tail
    num_frames = frame + tail
    cut = make_cut(placed, num_frames * 0.04 + 0.03)
    segments = Annotator({"x": inventory}, fill=fill)([[PerturbedCut(cut, 4 * num_frames + 3)]])["x"]
    assert segments.symbols[0].tolist() == inventory.ids([symbol for symbol, *_ in items])
    assert segments.symbol_lens.tolist() == [len(items)]  # a step of the language model for each, true repeats too
    assert segments.frames[0].tolist() == labels
    posteriors = torch.rand(1, len(items), inventory.size)
    of_frames = rearrange(posteriors, segments.frames)
    assert of_frames.shape == (1, num_frames, inventory.size)
    for t, number in enumerate(labels):
        if number >= 0:
            assert torch.equal(of_frames[0, t], posteriors[0, number])
    assert rearrange(segments.symbols, segments.frames)[0].tolist() == [
        segments.symbols[0, max(0, number)] for number in labels
    ]


def test_repeats_are_kept_or_merged(inventory: Inventory) -> None:
    cut = make_cut([("a", 0.0, 0.08), ("a", 0.08, 0.08), ("b", 0.16, 0.04), ("a", 0.2, 0.04)], 0.27)
    kept = Annotator({"x": inventory})([[PerturbedCut(cut, 27)]])["x"]
    assert kept.symbol_lens.tolist() == [4] and kept.frames.tolist() == [[0, 0, 1, 1, 2, 3]]
    merged = Annotator({"x": inventory}, repeats="merge")([[PerturbedCut(cut, 27)]])["x"]
    assert merged.symbol_lens.tolist() == [3] and merged.frames.tolist() == [[0, 0, 0, 0, 1, 2]]


def test_silence_parts_repeats(inventory: Inventory) -> None:
    """As it does in frame labels; where it belongs to the unit before, there is none between them."""
    cut = make_cut([("a", 0.04, 0.08), ("a", 0.16, 0.04), ("a", 0.2, 0.04), ("b", 0.24, 0.04)], 0.31)
    parted = Annotator({"x": inventory}, repeats="merge")([[PerturbedCut(cut, 31)]])["x"]
    assert parted.symbols[0].tolist() == inventory.ids(list("aab"))
    assert parted.frames.tolist() == [[SILENT, 0, 0, SILENT, 1, 1, 2]]
    filled = Annotator({"x": inventory}, repeats="merge", fill=True)([[PerturbedCut(cut, 31)]])["x"]
    assert filled.symbols[0].tolist() == inventory.ids(list("ab"))
    assert filled.frames.tolist() == [[SILENT, 0, 0, 0, 0, 0, 1]]


def test_a_foreign_alignment_labels_the_frames_centered_in_it(inventory: Inventory) -> None:
    """Encoder frame 3 is centered at 155 ms, and frame 4 at 195 ms; no frame between."""
    for start, duration, expected in ((0.145, 0.02, [3]), (0.120, 0.03, []), (0.150, 0.05, [3, 4]), (0.0, 0.036, [0])):
        frames = Annotator({"x": inventory})([[PerturbedCut(make_cut([("a", start, duration)], 0.31), 31)]])[
            "x"
        ].frames[0]
        assert torch.nonzero(frames == 0).flatten().tolist() == expected


def test_alignments_count_from_the_beginning_of_the_recording(inventory: Inventory) -> None:
    """As lhotse keeps them; so the second half of a recording has the labels of its own sound, alone or joined."""
    whole = make_cut([("a", 0.0, 0.4), ("b", 0.4, 0.2), ("c", 0.6, 0.2)], 0.8)
    half = MonoCut("half", 0.4, 0.4, 0, supervisions=[whole.supervisions[0].with_offset(-0.4)])
    frames = Annotator({"x": inventory})([[PerturbedCut(half, 40)]])["x"].frames[0]
    assert frames.tolist() == [1] * 5 + [2] * 4
    mix = MixedCut("mix", [MixTrack(half), MixTrack(whole, offset=0.4)])
    joined = [(item.symbol, round(item.start, 3)) for item in items_of(mix, "phone") or []]
    assert joined == [("a", -0.4), ("b", 0.0), ("c", 0.2), ("a", 0.4), ("b", 0.8), ("c", 1.0)]


def test_units_too_short_for_a_frame_are_still_heard_of(inventory: Inventory) -> None:
    cut = make_cut([("a", 0.0, 0.05), ("b", 0.05, 0.005), ("c", 0.055, 0.065)], 0.15)
    segments = Annotator({"x": inventory})([[PerturbedCut(cut, 15)]])["x"]
    assert segments.symbols[0].tolist() == inventory.ids(["a", "b", "c"])
    assert segments.frames.tolist() == [[0, 2, 2]]


def test_perturbed_joined_and_unaligned_recordings(inventory: Inventory) -> None:
    """Times stretch with the recording; a joined one comes after; what is not aligned is not known, and padding neither."""
    cut = make_cut([("a", 0.0, 0.4), ("b", 0.4, 0.4)], 0.8)
    slow, fast = (
        Annotator({"x": inventory})([[PerturbedCut(cut, length)]])["x"].frames[0].tolist() for length in (163, 43)
    )
    assert slow == [0] * 20 + [1] * 20 and fast == [0] * 5 + [1] * 5
    other = make_cut(None, 0.4)
    both = Annotator({"x": inventory})(
        [[PerturbedCut(cut, 80), PerturbedCut(cut, 83)], [PerturbedCut(other, 40), PerturbedCut(cut, 43)]]
    )["x"]
    assert both.symbols.tolist() == [inventory.ids(list("abab")), [*inventory.ids(list("ab")), 0, 0]]
    assert both.frames[0].tolist() == [0] * 10 + [1] * 10 + [2] * 10 + [3] * 10
    assert both.frames[1].tolist() == [UNKNOWN] * 10 + [0] * 5 + [1] * 5 + [UNKNOWN] * 20


def test_silence_that_was_added_is_silent(inventory: Inventory) -> None:
    """The units keep their place in the recording, however it was stretched and whatever was put around it."""
    cut = make_cut([("a", 0.0, 0.4), ("b", 0.4, 0.4)], 0.8)
    for fill in (False, True):
        annotate = Annotator({"x": inventory}, fill=fill)
        frames = annotate([[PerturbedCut(cut, 40 + 160 + 83, before=40, after=83)]])["x"].frames[0].tolist()
        after = [1 if fill else SILENT] * 20
        assert frames == [SILENT] * 10 + [0] * 20 + [1] * 20 + after
