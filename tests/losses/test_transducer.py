"""The transducer loss: against a sum over alignments written out, against k2, and its properties."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from asrkit.errors import UserError
from asrkit.losses import transducer
from asrkit.losses.lattice import by_diagonals, by_rows
from asrkit.losses.transducer import (
    Backend,
    Topology,
    fits,
    full_loss,
    gather_pruned,
    prune_ranges,
    pruned_loss,
    range_needed,
    simple_loss,
    transducer_loss,
    warm_up_scales,
)

VOCAB = 6
few_examples = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(autouse=True, params=[by_diagonals, by_rows], ids=["by diagonals", "by rows"], scope="module")
def _each_walk(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test here holds for the walk that CPUs take and for the one that GPUs take."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transducer, "sum_lattice", request.param)
        yield


class Case:
    """Random utterances of unequal lengths; frames and symbols are the longest ones."""

    def __init__(self, seed: int, batch: int, frames: int, symbols: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)

        def lengths(low: int, high: int) -> Tensor:
            lens = torch.randint(low, high + 1, (batch,), generator=generator)
            lens[0] = high
            return lens

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).mul(2).requires_grad_()

        self.normal = normal
        self.encoder_out_lens = lengths(1, frames)
        self.symbol_lens = lengths(0, symbols)
        self.symbols = torch.randint(1, VOCAB, (batch, symbols), generator=generator)
        self.encoder_logits = normal(batch, frames, VOCAB)
        self.predictor_logits = normal(batch, symbols + 1, VOCAB)
        self.full_logits = normal(batch, frames, symbols + 1, VOCAB)
        self.batch, self.frames, self.num_symbols = batch, frames, symbols
        self.lens = (self.encoder_out_lens, self.symbol_lens)

    def simple(self, backend: Backend = "torch", lm_scale: float = 0.25, am_scale: float = 0.0) -> tuple[Tensor, ...]:
        return simple_loss(
            self.encoder_logits, self.predictor_logits, self.symbols, *self.lens, lm_scale, am_scale, backend
        )

    def ranges(self, prune_range: int, backend: Backend = "torch") -> Tensor:
        _, px_grad, py_grad = self.simple(backend)
        return prune_ranges(px_grad, py_grad, *self.lens, prune_range, backend)


def cases(dtype: torch.dtype = torch.float64, k2: bool = False) -> st.SearchStrategy[Case]:
    """Small lattices; with k2 those it takes: at least one symbol, at least as many frames as symbols."""

    def build(seed: int, batch: int, frames: int, symbols: int) -> Case:
        return Case(seed, batch, max(frames, symbols) if k2 else frames, symbols, dtype)

    return st.builds(
        build, st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 12), st.integers(1 if k2 else 0, 9)
    )


def weighted_grads(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients of a sum in which every utterance has another weight."""
    return torch.autograd.grad((loss * torch.arange(1, len(loss) + 1)).sum(), inputs)


def sum_over_alignments(log_probs: list, symbols: list[int], first: list[int], width: int) -> float:
    """-log of the sum over all placements of the symbols in the frames; log_probs[t][u][v], plain Python."""
    total, frames, num_symbols = 0.0, len(log_probs), len(symbols)
    for places in itertools.combinations_with_replacement(range(frames), num_symbols):
        score, u, kept = 0.0, 0, True
        for t in range(frames):
            while True:
                kept = kept and first[t] <= u < first[t] + width
                if u == num_symbols or places[u] != t:
                    break
                score += log_probs[t][u][symbols[u]]
                u += 1
            score += log_probs[t][u][0]
        total += math.exp(score) if kept else 0.0
    return -math.log(total)


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 4), st.integers(2, 6))
@few_examples
def test_losses_equal_the_sum_over_alignments(seed: int, frames: int, symbols: int, prune_range: int) -> None:
    case = Case(seed, 3, frames, symbols)
    log_probs = case.full_logits.log_softmax(3)
    ranges = case.ranges(prune_range)
    index = ranges.unsqueeze(3).expand(-1, -1, -1, VOCAB)
    full = full_loss(case.full_logits, case.symbols, *case.lens, backend="torch")
    pruned = pruned_loss(case.full_logits.gather(2, index), case.symbols, ranges, *case.lens, "torch")
    simple_logits = case.encoder_logits.unsqueeze(2) + case.predictor_logits.unsqueeze(1)
    simple = case.simple(lm_scale=0.0)[0]
    for b, (t, u) in enumerate(zip(*(lens.tolist() for lens in case.lens), strict=True)):
        y = case.symbols[b, :u].tolist()
        everything = [0] * t
        assert full[b].item() == pytest.approx(
            sum_over_alignments(log_probs[b, :t].tolist(), y, everything, u + 1), rel=1e-9
        )
        assert simple[b].item() == pytest.approx(
            sum_over_alignments(simple_logits[b, :t].log_softmax(2).tolist(), y, everything, u + 1), rel=1e-9
        )
        assert pruned[b].item() == pytest.approx(
            sum_over_alignments(log_probs[b, :t].tolist(), y, ranges[b, :t, 0].tolist(), ranges.shape[2]),
            rel=1e-9,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_everything_equals_k2(dtype: torch.dtype) -> None:
    pytest.importorskip("k2")
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4

    def check(name: str, torch_values: Tensor, k2_values: Tensor) -> None:
        assert torch_values.dtype == k2_values.dtype, name
        torch.testing.assert_close(
            torch_values, k2_values, rtol=tolerance, atol=tolerance, msg=lambda m: f"{name}: {m}"
        )

    @given(cases(dtype, k2=True), st.integers(2, 6), st.sampled_from([(0.25, 0.0), (0.0, 0.0), (0.2, 0.3)]))
    @example(Case(7, 4, 150, 40, dtype), 5, (0.25, 0.0))
    @few_examples
    def compare(case: Case, prune_range: int, scales: tuple[float, float]) -> None:
        loss, px_grad, py_grad = case.simple("torch", *scales)
        k2_loss, k2_px_grad, k2_py_grad = case.simple("k2", *scales)
        check("simple loss", loss, k2_loss)
        inputs = (case.encoder_logits, case.predictor_logits)
        found = [px_grad, py_grad, *weighted_grads(loss, *inputs)]
        wanted = [k2_px_grad, k2_py_grad, *weighted_grads(k2_loss, *inputs)]
        for name, a, b in zip(("px", "py", "encoder", "predictor"), found, wanted, strict=True):
            check(f"simple {name} gradient", a, b)

        ranges = prune_ranges(k2_px_grad, k2_py_grad, *case.lens, prune_range, "torch")
        assert torch.equal(ranges, prune_ranges(k2_px_grad, k2_py_grad, *case.lens, prune_range, "k2"))

        logits = case.normal(*ranges.shape, VOCAB)
        losses = [pruned_loss(logits, case.symbols, ranges, *case.lens, backend) for backend in ("torch", "k2")]
        check("pruned loss", *losses)
        check("pruned gradient", *(weighted_grads(loss, logits)[0] for loss in losses))

        losses = [full_loss(case.full_logits, case.symbols, *case.lens, backend) for backend in ("torch", "k2")]
        check("full loss", *losses)
        check("full gradient", *(weighted_grads(loss, case.full_logits)[0] for loss in losses))

    compare()


@pytest.mark.slow
def test_gradients_equal_finite_differences() -> None:
    case = Case(3, 3, 5, 3)
    ranges = case.ranges(2)
    encoder, predictor = case.normal(3, 5, 2), case.normal(3, 4, 2)
    weight = case.normal(2, VOCAB).detach()
    args = (case.symbols, *case.lens)

    def pruned(encoder: Tensor, predictor: Tensor) -> Tensor:
        enc, dec = gather_pruned(encoder, predictor, ranges)
        return pruned_loss((enc + dec).tanh() @ weight, case.symbols, ranges, *case.lens, "torch")

    def simple(encoder_logits: Tensor, predictor_logits: Tensor) -> Tensor:
        return simple_loss(encoder_logits, predictor_logits, *args, 0.25, 0.1, "torch")[0]

    assert torch.autograd.gradcheck(pruned, (encoder, predictor))
    assert torch.autograd.gradcheck(simple, (case.encoder_logits, case.predictor_logits))
    assert torch.autograd.gradcheck(lambda logits: full_loss(logits, *args, "torch"), (case.full_logits,))


@given(cases())
@few_examples
def test_a_range_of_all_symbols_is_the_full_loss(case: Case) -> None:
    ranges = case.ranges(case.num_symbols + 2)
    assert torch.equal(ranges, torch.arange(case.num_symbols + 1).expand_as(ranges))
    losses = (
        pruned_loss(case.full_logits, case.symbols, ranges, *case.lens, "torch"),
        full_loss(case.full_logits, case.symbols, *case.lens, "torch"),
    )
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(weighted_grads(loss, case.full_logits)[0] for loss in losses))


@given(cases(), st.integers(2, 6))
@few_examples
def test_ranges_start_at_zero_never_go_back_nor_leave_a_gap_and_reach_the_end(case: Case, prune_range: int) -> None:
    ranges = case.ranges(prune_range)
    width = ranges.shape[2]
    starts = ranges[:, :, 0]
    assert torch.equal(ranges, starts.unsqueeze(2) + torch.arange(width))
    assert ranges.min() >= 0 and ranges.max() <= case.num_symbols
    assert (starts[:, 0] == 0).all()
    steps = starts.diff(dim=1)
    assert ((steps >= 0) & (steps < max(width, 2))).all()
    for b, (t, u) in enumerate(zip(*(lens.tolist() for lens in case.lens), strict=True)):
        assert (starts[b, t - 1 :] == max(0, u - width + 1)).all()


@given(cases())
@few_examples
def test_arc_posteriors_are_probabilities(case: Case) -> None:
    _, px_grad, py_grad = case.simple()
    for b, (t, u) in enumerate(zip(*(lens.tolist() for lens in case.lens), strict=True)):
        torch.testing.assert_close(py_grad[b].sum(0), (torch.arange(case.frames) < t).double())
        torch.testing.assert_close(px_grad[b].sum(1), (torch.arange(case.num_symbols) < u).double())
    for grad in (px_grad, py_grad):
        assert ((grad >= 0) & (grad <= 1)).all() and not grad.requires_grad


@given(cases())
@few_examples
def test_simple_loss_ignores_a_constant_added_to_a_frame_or_a_position(case: Case) -> None:
    shifted = simple_loss(
        case.encoder_logits + 3 * case.normal(case.batch, case.frames, 1),
        case.predictor_logits + 3 * case.normal(case.batch, case.num_symbols + 1, 1),
        case.symbols,
        *case.lens,
        0.2,
        0.3,
        "torch",
    )
    for found, expected in zip(shifted, case.simple(lm_scale=0.2, am_scale=0.3), strict=True):
        torch.testing.assert_close(found, expected)


@given(cases())
@few_examples
def test_padding_has_no_influence_and_no_gradient(case: Case) -> None:
    t, u = case.encoder_out_lens, case.symbol_lens
    dead = (torch.arange(case.frames) >= t.unsqueeze(1)).unsqueeze(2) | (
        torch.arange(case.num_symbols + 1) > u.unsqueeze(1)
    ).unsqueeze(1)
    loss = full_loss(case.full_logits, case.symbols, *case.lens, "torch")
    other = full_loss(case.full_logits.masked_fill(dead.unsqueeze(3), 7.0), case.symbols, *case.lens, "torch")
    assert torch.equal(loss, other)
    assert (weighted_grads(loss, case.full_logits)[0][dead] == 0).all()


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(5, 40), st.integers(2, 5))
@few_examples
def test_losses_are_finite_with_few_frames(seed: int, frames: int, symbols: int, prune_range: int) -> None:
    case = Case(seed, 3, frames, symbols, torch.float32)
    ranges = case.ranges(prune_range, "auto")
    t, u = case.lens
    assert ((ranges.shape[2] - 1) * t >= u).all()
    logits = case.normal(*ranges.shape, VOCAB)
    loss = case.simple("auto")[0] + pruned_loss(logits, case.symbols, ranges, *case.lens)
    assert loss.isfinite().all() and (loss > 0).all()
    assert weighted_grads(loss, logits)[0].isfinite().all()


@given(cases(torch.float32), st.sampled_from([1e2, 1e4]))
@few_examples
def test_nothing_is_nan_with_extreme_logits(case: Case, scale: float) -> None:
    loss, px_grad, py_grad = simple_loss(
        case.encoder_logits * scale,
        case.predictor_logits * scale,
        case.symbols,
        *case.lens,
        0.25,
        0.1,
        "torch",
    )
    ranges = prune_ranges(px_grad, py_grad, *case.lens, 3, "torch")
    logits = case.normal(*ranges.shape, VOCAB)
    pruned = pruned_loss(logits * scale, case.symbols, ranges, *case.lens, "torch")
    grads = weighted_grads(loss + pruned, case.encoder_logits, case.predictor_logits, logits)
    for value in (loss, px_grad, py_grad, pruned, *grads):
        assert value.isfinite().all()


def test_an_utterance_has_the_same_loss_alone_as_in_a_batch() -> None:
    case = Case(8, 4, 20, 12)
    ranges = case.ranges(14)
    loss = pruned_loss(case.full_logits, case.symbols, ranges, *case.lens, "torch")
    for b, (t, u) in enumerate(zip(*(lens.tolist() for lens in case.lens), strict=True)):
        alone = case.full_logits[b : b + 1, :t, : u + 1], case.symbols[b : b + 1, :u]
        lens = (case.encoder_out_lens[b : b + 1], case.symbol_lens[b : b + 1])
        torch.testing.assert_close(full_loss(*alone, *lens, "torch"), loss[b : b + 1])


def test_an_impossible_symbol_gives_an_infinite_loss_and_no_nan() -> None:
    case = Case(5, 2, 6, 4)
    with torch.no_grad():
        case.full_logits[0, :, 2, case.symbols[0, 2]] = -math.inf
    loss = full_loss(case.full_logits, case.symbols, *case.lens, "torch")
    assert loss.isinf().tolist() == [True, False]
    grad = weighted_grads(loss, case.full_logits)[0]
    assert (grad[0] == 0).all() and grad[1].isfinite().all() and (grad[1] != 0).any()


@given(cases(), st.integers(2, 6), st.sampled_from(["regular", "modified"]), st.floats(0.0, 0.3))
@few_examples
def test_both_walks_agree_where_arcs_are_impossible(case: Case, width: int, topology: Topology, share: float) -> None:
    """-inf anywhere; by rows, sums of blanks are subtracted from each other, which must not cost the rest its precision."""
    ranges = case.ranges(width)
    wide = torch.arange(case.num_symbols + 1).expand(1, 1, -1)
    for kept in (ranges, wide):
        shape = (case.batch, case.frames, kept.shape[2])
        px, py = (
            case.normal(*shape)
            .detach()
            .sub(3)
            .masked_fill(case.normal(*shape).ge(0) & (torch.rand(shape) < share), -math.inf)
            for _ in range(2)
        )
        lattice = (px, py, kept[:, :, 0], case.num_symbols, *case.lens, topology)
        for found, expected in zip(by_rows(*lattice), by_diagonals(*lattice), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


def test_a_number_that_is_none_makes_the_utterance_s_loss_none() -> None:
    case = Case(5, 2, 6, 4)
    with torch.no_grad():
        case.full_logits[0, 2] = math.nan
    loss = full_loss(case.full_logits, case.symbols, *case.lens, "torch")
    assert loss.isnan().tolist() == [True, False]


@given(cases(), st.sampled_from(["regular", "modified"]))
@few_examples
def test_the_range_needed_is_the_smallest_that_reaches_the_end(case: Case, topology: Topology) -> None:
    """With it, and not with less, each utterance that has an alignment has one within the range."""
    frames, symbols = (lens.tolist() for lens in case.lens)
    needed = range_needed(frames, symbols, topology)
    longest = needed - 1 if topology == "regular" else 1
    possible = fits(topology, *case.lens).tolist()
    assert all(longest * t >= u for t, u, fine in zip(frames, symbols, possible, strict=True) if fine)
    assert needed == 2 or any((longest - 1) * t < u for t, u in zip(frames, symbols, strict=True))


def saved_bytes(frames: int, symbols: int, prune_range: int) -> int:
    """What autograd keeps of the pruned path for its backward, each storage once."""
    case = Case(1, 2, frames, symbols, torch.float32)
    encoder, predictor = case.normal(2, frames, 16), case.normal(2, symbols + 1, 16)
    weight = case.normal(16, VOCAB)
    ranges = case.ranges(prune_range)
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        enc, dec = gather_pruned(encoder, predictor, ranges)
        loss = pruned_loss((enc + dec).tanh() @ weight, case.symbols, ranges, *case.lens, "torch")
    assert loss.requires_grad
    return sum(tensor.numel() * tensor.element_size() for tensor in kept.values())


def test_memory_of_the_pruned_path_grows_with_the_range_not_with_the_symbols() -> None:
    assert saved_bytes(100, 80, 5) < 1.1 * saved_bytes(100, 20, 5)
    assert 1.7 < saved_bytes(100, 80, 10) / saved_bytes(100, 80, 5) < 2.1


@pytest.mark.parametrize("backend", ["torch", "k2"])
def test_bfloat16_autocast_gives_a_float32_loss(backend: Backend) -> None:
    if backend == "k2":
        pytest.importorskip("k2")
    case = Case(2, 3, 12, 6, torch.float32)
    linear = torch.nn.Linear(8, VOCAB)
    inputs = (case.normal(3, 12, 8), case.normal(3, 7, 8))
    joiner_dtypes = []

    def joiner(enc: Tensor, dec: Tensor) -> Tensor:
        logits = linear((enc + dec).tanh())
        joiner_dtypes.append(logits.dtype)
        return logits

    def run(cast: torch.dtype) -> Tensor:
        simple, pruned, *_ = transducer_loss(
            inputs[0].to(cast),
            inputs[1].to(cast),
            joiner,
            case.encoder_logits.to(cast),
            case.predictor_logits.to(cast),
            case.symbols,
            *case.lens,
            prune_range=4,
            backend=backend,
        )
        assert simple.dtype == pruned.dtype == torch.float32
        return simple + pruned

    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = run(torch.bfloat16)
    assert joiner_dtypes == [torch.bfloat16]
    loss.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (*inputs, linear.weight))
    torch.testing.assert_close(loss, run(torch.float32), rtol=0.05, atol=0.1)


def test_the_combined_loss_is_its_parts() -> None:
    case = Case(4, 3, 15, 8)
    encoder, predictor = case.normal(3, 15, VOCAB), case.normal(3, 9, VOCAB)
    simple, pruned, *_ = transducer_loss(
        encoder,
        predictor,
        torch.add,
        case.encoder_logits,
        case.predictor_logits,
        case.symbols,
        *case.lens,
        prune_range=3,
        backend="torch",
    )
    ranges = case.ranges(3)
    enc, dec = gather_pruned(encoder, predictor, ranges)
    assert enc.shape == dec.shape == (*ranges.shape, VOCAB)
    assert torch.equal(enc[1, 2, 0], encoder[1, 2])
    assert torch.equal(dec[2, 9], predictor[2, ranges[2, 9]])
    assert torch.equal(simple, case.simple()[0])
    assert torch.equal(pruned, pruned_loss(enc + dec, case.symbols, ranges, *case.lens, "torch"))


def test_warm_up_scales_go_to_their_final_values() -> None:
    assert warm_up_scales(0, 2000) == (1.0, 0.1)
    assert warm_up_scales(1000, 2000) == pytest.approx((0.75, 0.55))
    assert warm_up_scales(2000, 2000) == warm_up_scales(9999, 2000) == (0.5, 1.0)
    assert warm_up_scales(0, 0) == (0.5, 1.0)


def test_a_range_that_keeps_no_symbol_is_refused() -> None:
    with pytest.raises(UserError, match="prune_range 1"):
        Case(0, 1, 3, 2).ranges(1)


def test_a_backend_that_is_not_there_is_refused() -> None:
    try:
        import k2  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="loss.backend=k2: needs k2, which is not installed"):
            Case(0, 1, 3, 2).simple("k2")
    else:
        assert Case(0, 1, 3, 2).simple("k2")[0].isfinite().all()


def sum_over_modified_alignments(log_probs: list, symbols: list[int], first: list[int], width: int) -> float:
    """As sum_over_alignments, each frame taking either one symbol or blank."""
    total, frames, num_symbols = 0.0, len(log_probs), len(symbols)
    for places in itertools.combinations(range(frames), num_symbols):
        score, u, kept = 0.0, 0, True
        for t in range(frames):
            kept = kept and first[t] <= u < first[t] + width
            if u < num_symbols and places[u] == t:
                score += log_probs[t][u][symbols[u]]
                u += 1
            else:
                score += log_probs[t][u][0]
        total += math.exp(score) if kept else 0.0
    return -math.log(total) if total else math.inf


def modified_case(seed: int, batch: int, frames: int, symbols: int, dtype: torch.dtype = torch.float64) -> Case:
    """A case in which every utterance has a frame for each of its symbols."""
    case = Case(seed, batch, max(frames, symbols), symbols, dtype)
    case.symbol_lens = torch.minimum(case.symbol_lens, case.encoder_out_lens)
    case.lens = (case.encoder_out_lens, case.symbol_lens)
    return case


@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(0, 5), st.integers(2, 6))
@few_examples
def test_modified_losses_equal_the_sum_over_alignments(seed: int, frames: int, symbols: int, prune_range: int) -> None:
    case = modified_case(seed, 3, frames, symbols)
    log_probs = case.full_logits.log_softmax(3)
    simple, px_grad, py_grad = simple_loss(
        case.encoder_logits, case.predictor_logits, case.symbols, *case.lens, 0.0, 0.0, "torch", "modified"
    )
    ranges = prune_ranges(px_grad, py_grad, *case.lens, prune_range, "torch", "modified")
    steps = ranges[:, :, 0].diff(dim=1)
    assert ((steps >= 0) & (steps <= 1)).all() and (ranges[:, 0, 0] == 0).all()
    index = ranges.unsqueeze(3).expand(-1, -1, -1, VOCAB)
    full = full_loss(case.full_logits, case.symbols, *case.lens, "torch", "modified")
    pruned = pruned_loss(case.full_logits.gather(2, index), case.symbols, ranges, *case.lens, "torch", "modified")
    simple_logits = case.encoder_logits.unsqueeze(2) + case.predictor_logits.unsqueeze(1)
    for b, (t, u) in enumerate(zip(*(lens.tolist() for lens in case.lens), strict=True)):
        y, everything = case.symbols[b, :u].tolist(), [0] * t
        rows = log_probs[b, :t].tolist()
        assert full[b].item() == pytest.approx(sum_over_modified_alignments(rows, y, everything, u + 1), rel=1e-9)
        expected = sum_over_modified_alignments(simple_logits[b, :t].log_softmax(2).tolist(), y, everything, u + 1)
        assert simple[b].item() == pytest.approx(expected, rel=1e-9)
        expected = sum_over_modified_alignments(rows, y, ranges[b, :t, 0].tolist(), ranges.shape[2])
        assert pruned[b].item() == pytest.approx(expected, rel=1e-9)
        # every real frame is left by one arc
        torch.testing.assert_close(px_grad[b].sum(0) + py_grad[b].sum(0), (torch.arange(case.frames) < t).double())


@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 9), st.integers(2, 6))
@few_examples
def test_modified_losses_equal_k2(seed: int, frames: int, symbols: int, prune_range: int) -> None:
    pytest.importorskip("k2")
    case = modified_case(seed, 3, frames, symbols)
    inputs = (case.encoder_logits, case.predictor_logits)
    results = []
    for backend in ("torch", "k2"):
        simple, px_grad, py_grad = simple_loss(*inputs, case.symbols, *case.lens, 0.25, 0.0, backend, "modified")
        full = full_loss(case.full_logits, case.symbols, *case.lens, backend, "modified")
        gradients = (*weighted_grads(simple, *inputs), *weighted_grads(full, case.full_logits))
        results.append((simple, px_grad, py_grad, full, *gradients))
    for torch_values, k2_values in zip(*results, strict=True):
        torch.testing.assert_close(torch_values, k2_values, rtol=1e-9, atol=1e-9)
    _, px_grad, py_grad = results[1][:3]
    ranges = prune_ranges(px_grad, py_grad, *case.lens, prune_range, "torch", "modified")
    assert torch.equal(ranges, prune_ranges(px_grad, py_grad, *case.lens, prune_range, "k2", "modified"))
    logits = case.normal(*ranges.shape, VOCAB)
    losses = [pruned_loss(logits, case.symbols, ranges, *case.lens, backend, "modified") for backend in ("torch", "k2")]
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(*(weighted_grads(loss, logits)[0] for loss in losses), rtol=1e-9, atol=1e-9)


def test_more_symbols_than_frames_have_no_modified_alignment() -> None:
    case = Case(3, 2, 3, 5)
    case.encoder_out_lens, case.symbol_lens = torch.tensor([3, 3]), torch.tensor([5, 2])
    loss = full_loss(case.full_logits, case.symbols, case.encoder_out_lens, case.symbol_lens, "torch", "modified")
    assert loss[0] == math.inf and bool(loss[1].isfinite())
    (gradient,) = torch.autograd.grad(loss[1], case.full_logits)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize(
    "topology, expected", [("regular", [True, True, True, False]), ("modified", [True, True, False, False])]
)
def test_what_fits_is_what_has_a_finite_loss(topology: Topology, expected: list[bool]) -> None:
    """Three frames hold five symbols in the regular topology alone; without a frame there is no alignment at all."""
    frames, symbols = torch.tensor([3, 3, 3, 0]), torch.tensor([2, 3, 5, 0])
    assert fits(topology, frames, symbols).tolist() == expected
    case = Case(3, 3, 3, 5)
    loss = full_loss(case.full_logits, case.symbols, frames[:3], symbols[:3], "torch", topology)
    assert loss.isfinite().tolist() == expected[:3]
