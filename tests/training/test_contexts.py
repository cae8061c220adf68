"""What a stage trains in: contexts, attention dropout, in-place distillation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.config import from_dict, resolve
from asrkit.data.batch import Batch
from asrkit.errors import UserError
from asrkit.models import AsrModel, ModelSpec
from asrkit.nn.masks import SpanMasks
from asrkit.stages.train_backbone import TrainBackboneConfig
from asrkit.training.asr_loss import LossConfig, asr_loss, check_losses
from asrkit.training.contexts import AttentionDropoutConfig, ContextsConfig, draw_gates
from asrkit.training.start import BackboneConfig, model_spec

LOSS = LossConfig(backend="torch")
STREAMING = "chunk=2,left=3"


def small_model(dropout: float = 0.0) -> AsrModel:
    torch.manual_seed(0)
    spec: dict[str, Any] = {
        "vocab_size": 11,
        "encoder": {"dim": 16, "num_layers": 3, "feedforward_dim": 24, "kernel_size": 5, "dropout": dropout},
        "predictor": {"dim": 12},
        "joiner_dim": 14,
        "submodels": {"joint": {"kind": "attention", "layers": [0, 1, 2], "dim": 16, "heads": 2, "dropout": dropout}},
        "variants": {"backbone": {}, "joint": {"submodels": ["joint"]}},
    }
    return AsrModel(from_dict(ModelSpec, spec, "test")).train()


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(
        torch.randn(2, 80, 80, generator=generator),
        torch.tensor([80, 61]),
        ["a", "b"],
        ["", ""],
        ["", ""],
        [0.8, 0.6],
        torch.tensor([[2, 3, 4], [5, 5, 0]]),
        torch.tensor([3, 2]),
    )


def loss_of(model: AsrModel, **options: Any) -> torch.Tensor:
    return asr_loss(model, batch(), 5, LOSS, **options).losses


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
    st.sampled_from(["layer", "model"]),
    st.sampled_from(["batch", "utterance"]),
    st.booleans(),
    st.integers(0, 1000),
)
def test_gates(probability: float, over: Any, per: Any, rescale: bool, seed: int) -> None:
    torch.manual_seed(seed)
    gates = draw_gates(AttentionDropoutConfig(probability=probability, over=over, per=per, rescale=rescale), 4, 3)
    assert gates is not None and gates.shape == (4, 3 if per == "utterance" else 1)
    kept = 1 / (1 - probability) if rescale and probability < 1 else 1.0
    assert all(gate in (0.0, pytest.approx(kept)) for gate in gates.flatten().tolist())
    if over == "model":
        assert bool((gates == gates[:1]).all())
    if probability == 1:
        assert not gates.any()


def test_the_gates_rate_is_that_asked_for() -> None:
    torch.manual_seed(0)
    settings = AttentionDropoutConfig(probability=0.3, per="utterance")
    mean = float(torch.stack([draw_gates(settings, 6, 10) for _ in range(200)]).mean())  # type: ignore[misc]
    assert mean == pytest.approx(0.7, abs=0.02)  # 12,000 draws: 5 standard deviations
    assert draw_gates(AttentionDropoutConfig(probability=0), 6, 10) is None


def test_dropping_all_attention_is_the_backbone_and_none_the_conformer() -> None:
    model = small_model()
    always = AttentionDropoutConfig(probability=1.0)
    loss = loss_of(model, variant="joint", attention_dropout=always)
    assert torch.equal(loss, loss_of(model, variant="backbone"))
    loss.sum().backward()
    assert all(p.grad is None for p in model.encoder.submodels.parameters())
    never = loss_of(model, variant="joint", attention_dropout=AttentionDropoutConfig(probability=0))
    assert torch.equal(never, loss_of(model, variant="joint"))
    assert not torch.equal(never, loss)
    # In evaluation nothing is drawn.
    model.eval()
    assert torch.equal(loss_of(model, variant="joint", attention_dropout=always), loss_of(model, variant="joint"))


def test_joint_training_adds_both_contexts_and_the_distillation() -> None:
    model = small_model()
    full, streaming = (
        loss_of(model, contexts=ContextsConfig(train=[text]), variant="joint") for text in ("full", STREAMING)
    )
    assert not torch.allclose(full, streaming)
    both = ContextsConfig(train=["full", STREAMING], sampling="joint")
    torch.testing.assert_close(loss_of(model, contexts=both, variant="joint"), full + streaming)
    distilled = ContextsConfig(train=["full", STREAMING], sampling="joint", distillation_scale=0.5)
    output = asr_loss(model, batch(), 5, LOSS, distilled, "joint")
    torch.testing.assert_close(
        output.losses.sum(), (full + streaming).sum() + 0.5 * output.metrics["distillation"].total
    )
    assert float(output.metrics["distillation"].total) > 0
    assert {"pruned", "streaming_pruned", "distillation"} <= set(output.metrics)
    later = ContextsConfig(train=["full", STREAMING], sampling="joint", distillation_scale=0.5, distillation_delay=1)
    assert not torch.allclose(output.losses, loss_of(model, contexts=later, variant="joint"))


def test_both_passes_of_joint_training_hide_the_same_frames() -> None:
    """So that the teacher never guesses at a frame that the student sees: masks are drawn once for both, and not kept for the next batch."""
    model = small_model()
    model.encoder.masks = SpanMasks(torch.zeros(16), (0.3, 3), (0.2, 2))
    drawn = []
    draw = model.encoder.masks._draw
    model.encoder.masks._draw = lambda x: drawn.append(draw(x)) or drawn[-1]  # type: ignore[method-assign, func-returns-value]
    for batches in (1, 2):
        loss_of(model, contexts=ContextsConfig(train=["full", STREAMING], sampling="joint"))
        assert len(drawn) == batches


def test_distillation_teaches_the_streaming_pass_alone() -> None:
    """The gradient of loss + scale * divergence differs from that of the loss by what the student gets: a full pass
    made of detached outputs teaches the same."""
    model = small_model()
    base = ContextsConfig(train=["full", STREAMING], sampling="joint")
    with_teacher = ContextsConfig(train=["full", STREAMING], sampling="joint", distillation_scale=1.0)
    grads = []
    for contexts in (base, with_teacher):
        model.zero_grad(set_to_none=True)
        loss_of(model, contexts=contexts, variant="joint").sum().backward()
        grads.append([p.grad.clone() for p in model.encoder.parameters() if p.grad is not None])
    assert any(not torch.equal(a, b) for a, b in zip(*grads, strict=True))
    # What both passes see alike cannot differ: one chunk over all of it, no convolution to look ahead.
    spec = {**small_spec_of(model), "encoder": {**small_spec_of(model)["encoder"], "kernel_size": 1}}
    same = AsrModel(from_dict(ModelSpec, spec, "test")).train()
    alike = ContextsConfig(train=["full", "chunk=100,left=0"], sampling="joint", distillation_scale=1.0)
    assert float(asr_loss(same, batch(), 5, LOSS, alike, "joint").metrics["distillation"].total) < 1e-4


def small_spec_of(model: AsrModel) -> dict[str, Any]:
    from asrkit.config import to_dict

    return {**to_dict(model.spec), "encoder": {**to_dict(model.spec)["encoder"], "dropout": 0.0}}


def test_random_contexts_are_drawn_from_the_list() -> None:
    model = small_model().eval()
    choices = ["full", STREAMING, "chunk=1,left=0"]
    alone = [loss_of(model, contexts=ContextsConfig(train=[text]), variant="joint") for text in choices]
    seen = set()
    for seed in range(30):
        torch.manual_seed(seed)
        found = loss_of(model, contexts=ContextsConfig(train=choices), variant="joint")
        seen.add(next(number for number, loss in enumerate(alone) if torch.equal(loss, found)))
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["contexts.train=[half]"], "write full, or chunk=16,left=64"),
        (["contexts.train=[full]", "contexts.sampling=joint"], "at least one streaming context"),
        (["contexts.distillation_scale=1"], "needs contexts.sampling=joint"),
        (["model.attention_dropout.probability=1.5"], "less than or equal to 1"),
    ],
)
def test_contradictions_are_refused(overrides: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        resolve(TrainBackboneConfig, None, overrides)


def test_distillation_without_a_transducer_is_refused() -> None:
    contexts = ContextsConfig(train=["full", STREAMING], sampling="joint", distillation_scale=1.0)
    with pytest.raises(UserError, match="transducer_scale is 0"):
        check_losses(contexts, LossConfig(transducer_scale=0))


def test_nothing_to_learn_is_refused() -> None:
    nothing = LossConfig(transducer_scale=0, ctc_scale=0)
    with pytest.raises(UserError, match="there is nothing to learn"):
        check_losses(ContextsConfig(), nothing)
    check_losses(ContextsConfig(), nothing, others=True)


def test_the_spec_of_each_way_to_train() -> None:
    alone = model_spec(BackboneConfig(size="tiny"), 50)
    assert not alone.submodels and list(alone.variants) == ["backbone"]
    contexts = ContextsConfig(train=["left=64,chunk=16", "full"])
    for probability, default in ((0.0, "joint"), (0.5, "backbone")):
        dropout = AttentionDropoutConfig(probability=probability)
        spec = model_spec(BackboneConfig(size="tiny", attention_dropout=dropout), 50, contexts)
        assert spec.variant == default and spec.submodels["joint"].layers == [0, 1, 2, 3, 4]
        assert spec.variants["joint"].contexts == ["chunk=16,left=64", "full"]
