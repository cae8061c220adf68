"""Pretraining: its loss against loops, what the encoder may see, what is trained by what, when a codebook is called collapsed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from asrkit.config import from_dict
from asrkit.data.batch import Batch
from asrkit.data.masked_batches import MaskedBatch, masked
from asrkit.methods import pretraining
from asrkit.methods.pretraining import (
    CollapseWatch,
    PretrainConfig,
    TemperatureConfig,
    gumbel_temperature,
    predict,
    pretraining_loss,
)
from asrkit.models.pretrained import PretrainedEncoder
from asrkit.models.registry import build
from asrkit.models.spec import ContrastiveSpec, PretrainedEncoderSpec
from asrkit.nn.context import FULL, Context
from asrkit.training.optim import OptimizerConfig
from asrkit.training.step import LossOutput

SHAPE = {
    "dim": 16,
    "num_layers": 2,
    "feedforward_dim": 16,
    "kernel_size": 5,
    "subsampling_channels": [2, 2],
    "dropout": 0,
}
ATTENTION: dict[str, Any] = {
    "submodels": {"joint": {"kind": "attention", "layers": [0, 1], "dim": 8, "heads": 2, "dropout": 0}},
    "variants": {"backbone": {}, "joint": {"submodels": ["joint"]}},
    "variant": "joint",
}


def make_model(attention: bool = False, dim: int = 16, entries: int = 6, seed: int = 0) -> PretrainedEncoder:
    objective = {"groups": 2, "entries": entries, "code_dim": 8, "final_dim": 12}
    content = {"encoder": {**SHAPE, "dim": dim}, "objective": objective, **(ATTENTION if attention else {})}
    torch.manual_seed(seed)
    return build(from_dict(PretrainedEncoderSpec, content, "test"))


def settings_of(**groups: Any) -> PretrainConfig:
    content = {"mask": {"distractors": 9}, "loss": {"feature_dropout": 0}}
    for name, values in groups.items():
        content[name] = {**content.get(name, {}), **values}
    return from_dict(PretrainConfig, content, "test")


def make_batch(settings: PretrainConfig, lens: tuple[int, ...] = (170, 131), seed: int = 0) -> MaskedBatch:
    torch.manual_seed(seed)
    names = [str(row) for row in range(len(lens))]
    features = torch.randn(len(lens), max(lens), 80)
    batch = Batch(features, torch.tensor(lens), names, names, names, [length / 100 for length in lens])
    return masked(batch, settings.mask, np.random.default_rng(seed))


def slow_loss(model: PretrainedEncoder, batch: MaskedBatch, settings: PretrainConfig) -> tuple[list[float], float]:
    """The contrastive loss of each utterance and the diversity loss in evaluation mode, frame by frame, each utterance alone."""
    encoder, objective, distractors_from = model.encoder, model.objective, settings.mask.distractors_from
    assert objective is not None
    losses, probabilities = [], []
    for row, length in enumerate(batch.feature_lens.tolist()):
        y, lens = encoder.embed(batch.features[row : row + 1, :length], torch.tensor([length]))
        hidden = batch.hidden[row].tolist()
        x = y.clone()
        for frame in hidden:
            x[0, frame] = objective.mask
        encoded = encoder.layers(x, lens, model.submodels_of())[0]
        choices = hidden if distractors_from == "hidden" else list(range(y.shape[1]))
        targets = []
        for frame in choices:
            logits = objective.quantizer.logits(y[0, frame]).view(2, -1)
            probabilities.append(logits.softmax(-1))
            entries = [objective.quantizer.codebooks[group, int(logits[group].argmax())] for group in range(2)]
            targets.append(objective.project_target(torch.cat(entries)))
        total = 0.0
        for number, frame in enumerate(hidden):
            mine = targets[choices.index(frame)]
            others = [targets[index] for index in batch.distractors[row, number].tolist()]
            kept = [mine, *(other for other in others if not torch.allclose(other, mine, atol=1e-7))]
            context = objective.project_context(encoded[frame])
            scores = torch.stack([torch.cosine_similarity(context, target, dim=0) for target in kept])
            total -= float((scores / settings.loss.temperature).log_softmax(0)[0])
        losses.append(total)
    mean = torch.stack(probabilities).mean(0)
    used = sum(math.exp(-float((mean[group] * mean[group].log()).sum())) for group in range(2))
    return losses, (mean.numel() - used) / mean.numel()


@torch.no_grad()
@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("distractors_from", ["hidden", "all"])
def test_the_loss_is_that_of_a_loop(attention: bool, distractors_from: str) -> None:
    settings = settings_of(mask={"distractors_from": distractors_from})
    model, batch = make_model(attention).eval(), make_batch(settings)
    output = pretraining_loss(model, batch, 0, settings)
    losses, diversity = slow_loss(model, batch, settings)
    torch.testing.assert_close(output.losses, torch.tensor(losses), rtol=1e-4, atol=1e-4)
    assert output.count == batch.hidden.numel() == output.metrics["contrastive"].divisor
    assert output.regularizer is not None and float(output.regularizer) == pytest.approx(0.1 * diversity, abs=1e-6)
    assert float(output.metrics["contrastive"].total) == pytest.approx(sum(losses), rel=1e-4)


def test_the_regularizer_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the precision around it: in bfloat16 the shares of all codes come out as ones that are used alike."""
    seen: list[tuple[Tensor, Tensor | None]] = []
    original = pretraining.diversity_loss

    def spy(probabilities: Tensor, counted: Tensor | None) -> Tensor:
        seen.append((probabilities, counted))
        return original(probabilities, counted)

    monkeypatch.setattr(pretraining, "diversity_loss", spy)
    settings = settings_of(mask={"distractors_from": "all"})
    model = make_model()
    with torch.autocast("cpu", torch.bfloat16):
        made = pretraining_loss(model, make_batch(settings), 0, settings)
    ((probabilities, counted),) = seen
    assert counted is not None
    assert float(made.metrics["diversity"].total) == float(original(probabilities, counted).detach())


@torch.no_grad()
def test_a_fresh_encoder_knows_nothing() -> None:
    """Near log(101), less what distractors with the code of the target take away."""
    settings = settings_of(mask={"distractors": 100})
    model, batch = make_model(dim=64, entries=320).train(), make_batch(settings, (1500, 1500))
    made = predict(model, batch, 2.0, settings, None, FULL)
    choices = made.logits.isfinite().sum(-1)
    expected = float(choices.double().log().mean())
    loss = float(-made.logits.log_softmax(-1)[..., 0].mean())
    assert math.log(101) - 0.5 < expected <= math.log(101) and loss == pytest.approx(expected, abs=0.35)


@torch.no_grad()
@pytest.mark.parametrize("context", [FULL, Context(4, 8)])
def test_hidden_frames_are_seen_by_the_targets_alone(context: Context) -> None:
    """Other sound in what only hidden frames see changes what they are compared with, and no context."""
    settings = settings_of()
    model, batch = make_model(attention=True).eval(), make_batch(settings, (170,))
    frames = set(batch.hidden[0].tolist())
    own = [f for f in range(170) if all(t in frames for t in range(max(0, (f - 3) // 4), min(f // 4, 40) + 1))]
    assert len(own) > 20
    contexts: list[Tensor] = []

    def keep(module: Any, given: Any, output: Tensor) -> None:
        contexts.append(output)

    assert model.objective is not None
    model.objective.project_context.register_forward_hook(keep)
    made = [predict(model, batch, 1.0, settings, None, context)]
    batch.features[0, own] += 1.0
    made.append(predict(model, batch, 1.0, settings, None, context))
    assert torch.equal(contexts[0], contexts[1])
    assert not torch.equal(made[0].probabilities, made[1].probabilities)


@torch.no_grad()
def test_a_streaming_context_sees_no_later_chunk() -> None:
    settings = settings_of()
    model, batch = make_model(attention=True).eval(), make_batch(settings, (400,))
    context, contexts = Context(8, 16), list[Tensor]()
    assert model.objective is not None
    model.objective.project_context.register_forward_hook(lambda module, given, output: contexts.append(output))
    predict(model, batch, 1.0, settings, None, context)
    batch.features[0, 4 * 48 + 3 :] += 1.0  # what the chunks from frame 48 on see, and no earlier one
    predict(model, batch, 1.0, settings, None, context)
    before = batch.hidden[0] < 48
    assert torch.equal(contexts[0][:, before], contexts[1][:, before])
    assert not torch.equal(contexts[0][:, ~before], contexts[1][:, ~before])


def gradients(settings: PretrainConfig, context: list[str] | None = None) -> tuple[LossOutput, dict[str, Tensor]]:
    """Of a step in training mode with the same random numbers."""
    model, batch = make_model(attention=True).train(), make_batch(settings)
    torch.manual_seed(5)
    output = pretraining_loss(model, batch, 0, settings)
    assert output.regularizer is not None
    (output.losses.sum() + output.regularizer * output.count).backward()
    return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_everything_is_trained() -> None:
    output, found = gradients(settings_of())
    assert found.keys() == {name for name, _ in make_model(attention=True).named_parameters()}
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in found.values())
    assert output.losses.shape == (2,)


def test_the_gradient_scale_is_of_the_subsampling_before_its_norm() -> None:
    plain, one = gradients(settings_of())
    scaled, tenth = gradients(settings_of(loss={"gradient_scale": 0.1}))
    assert torch.equal(plain.losses, scaled.losses)
    for name, gradient in one.items():
        is_scaled = name.startswith("encoder.subsampling.") and ".norm." not in name
        torch.testing.assert_close(tenth[name], gradient * (0.1 if is_scaled else 1.0), rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_penalty_is_the_mean_square_before_the_norm_of_frames_that_are_there() -> None:
    settings = settings_of(loss={"penalty_scale": 10.0})
    model, batch = make_model().eval(), make_batch(settings)
    output = pretraining_loss(model, batch, 0, settings)
    squares, total = 0.0, 0
    for row, length in enumerate(batch.feature_lens.tolist()):
        given: list[Tensor] = []
        handle = model.encoder.subsampling.out.register_forward_hook(lambda module, x, z, given=given: given.append(z))
        model.encoder.embed(batch.features[row : row + 1, :length], torch.tensor([length]))
        handle.remove()
        squares, total = squares + float(given[0].square().sum()), total + given[0].numel()
    assert float(output.metrics["penalty"].total) == pytest.approx(squares / total, rel=1e-4)
    without = pretraining_loss(model, batch, 0, settings_of())
    assert output.regularizer is not None and without.regularizer is not None
    assert float(output.regularizer - without.regularizer) == pytest.approx(10 * squares / total, rel=1e-4)


def test_the_temperature_falls_as_in_the_paper() -> None:
    paper = TemperatureConfig(decay=0.999995)
    assert [gumbel_temperature(step, 400_000, paper) for step in (0, 1)] == [2.0, 2.0 * 0.999995]
    assert gumbel_temperature(277_000, 400_000, paper) > 0.5 == gumbel_temperature(278_000, 400_000, paper)
    for steps in (400_000, 1000):  # by default at the same shares of any run
        for share in (0.0, 0.1, 0.5, 0.9):
            at = gumbel_temperature(round(share * 400_000), 400_000, paper)
            assert gumbel_temperature(round(share * steps), steps, TemperatureConfig()) == pytest.approx(at, rel=0.01)


def test_the_defaults_are_those_of_the_paper() -> None:
    settings = PretrainConfig()
    assert (settings.quantizer.groups, settings.quantizer.entries, settings.mask.distractors) == (2, 320, 100)
    assert (settings.loss.temperature, settings.loss.diversity_scale) == (0.1, 0.1)
    assert settings.data.crop == pytest.approx(250_000 / 16_000, abs=0.03)
    assert settings.training.optimizer == OptimizerConfig(
        name="adamw", learning_rate=5e-4, warm_up_share=0.08, decay="linear", final_fraction=0.0
    )


def test_a_collapse_is_warned_of_once() -> None:
    watch = CollapseWatch(100, ContrastiveSpec(groups=2, entries=320, code_dim=8, final_dim=8))
    said = [watch(step, {"perplexity": used}) for step, used in [
        (5, 2.0), (9, 2.0),  # as every run begins
        (10, 2.0), (20, 2.5), (30, 40.0), (40, 9.9), (50, 2.1), (60, 2.2), (70, 2.0),
    ]]  # fmt: skip
    warned = [line for line in said if line is not None]
    assert said.index(warned[0]) == 7 and len(warned) == 1
    assert warned[0].startswith(
        "step 60: the codebooks have collapsed: of 640 entries the targets use 2.2 (perplexity)"
    )
    assert "loss.diversity_scale" in warned[0]
    small = CollapseWatch(100, ContrastiveSpec(groups=2, entries=4, code_dim=8, final_dim=8))
    assert [small(step, {"perplexity": 2.1}) for step in range(50, 60)] == [None] * 10 and small(60, {}) is None
