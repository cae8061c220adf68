"""Pretraining by wav2vec 2.0 (arXiv 2006.11477) on log-mel features: its settings, its loss, what is measured, and what to watch for.

The place of the paper's feature encoder is taken by ``Encoder.embed`` (log-mel, two convolutions, a projection, a norm), that of
its Transformer by ``Encoder.layers``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from lhotse.cut import Cut
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from asrkit.config import NonNegative, Positive, Probability, config
from asrkit.data.masked_batches import MaskConfig, MaskedBatch, MaskedBatches, PretrainDataConfig, held_out_batches
from asrkit.losses.contrastive import (
    code_shares,
    contrastive_logits,
    contrastive_nll,
    diversity_loss,
    perplexity,
    told_apart,
)
from asrkit.methods.supernet.config import SelfPruningConfig
from asrkit.methods.supernet.loss import drawn_member, member_metrics
from asrkit.models.encoder import Encoder
from asrkit.models.pretrained import PretrainedEncoder
from asrkit.models.spec import ContrastiveSpec
from asrkit.nn.context import Context
from asrkit.training.config import TrainingConfig
from asrkit.training.contexts import AttentionDropoutConfig, TrainedContexts, drawn, drawn_gates
from asrkit.training.datasets import bucket_plan, open_tables
from asrkit.training.dev_eval import even_subset
from asrkit.training.optim import OptimizerConfig
from asrkit.training.session import AudioStageConfig
from asrkit.training.start import EncoderConfig
from asrkit.training.step import LossOutput, Metric

DECAY_SHARE = 0.69  # of the steps: when 0.999995 a step takes the paper's Base model from 2.0 to 0.5 in its 400,000
COLLAPSED, COLLAPSED_SHARE = (
    5.0,
    0.25,
)  # perplexity of a codebook below which hardly anything is left to tell apart, and at most
# which share of its entries that is


@config
class QuantizerConfig:
    """What the targets are made of: entries of several codebooks, side by side (the paper's Base model)."""

    groups: Positive = 2
    """Codebooks."""
    entries: Annotated[int, Field(ge=2)] = 320
    """Entries of each codebook."""
    code_dim: Positive = 256
    """Width of a target before its projection; each codebook has an equal share of it."""
    final_dim: Positive = 256
    """Width in which contexts and targets are compared."""


@config
class TemperatureConfig:
    """Temperature of the Gumbel softmax, through which the quantizer is trained."""

    start: Annotated[float, Field(gt=0)] = 2.0
    """Temperature of the first step."""
    end: Annotated[float, Field(gt=0)] = 0.5
    """Lowest temperature; the paper's Large model has 0.1."""
    decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor of each step; the paper's is 0.999995. null reaches `end` after 69 % of the steps, as that does in the
    paper's 400,000 (our choice)."""


@config
class PretrainLossConfig:
    """The contrastive loss and what is added to it."""

    temperature: Annotated[float, Field(gt=0)] = 0.1
    """What cosines are divided by."""
    diversity_scale: NonNegative = 0.1
    """Weight of the diversity loss. Raise it if the perplexity stays low."""
    feature_dropout: Probability = 0.1
    """Dropout of the frames that the targets are made of."""
    penalty_scale: NonNegative = 0.0
    """Weight of the mean square of the subsampling's output before its norm. The paper's Base model has 10, for its
    feature encoder without norms; its Large model none, as here."""
    gradient_scale: Annotated[float, Field(ge=0.0, le=1.0)] = 1.0
    """Factor of the gradients of the subsampling before its norm. The paper's Base model has 0.1, its Large model 1."""


@config
class PretrainConfig(AudioStageConfig):
    """Settings of pretrain (arXiv 2006.11477). config.yaml of the run holds them all."""

    model: EncoderConfig = field(default_factory=EncoderConfig)
    """Shape of a new encoder."""
    variant: str | None = None
    """Variant to train, with --from; null trains the encoder's default."""
    contexts: TrainedContexts = field(default_factory=TrainedContexts)
    """How much of the recording each frame sees in training."""
    data: PretrainDataConfig = field(default_factory=PretrainDataConfig)
    """Batches and where their cuts come from."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """What is hidden, and what it is distinguished from."""
    supernet: SelfPruningConfig | None = None
    """How masks are found meanwhile, for a supernet that keeps them; null finds none."""
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    """What the targets are made of."""
    temperature: TemperatureConfig = field(default_factory=TemperatureConfig)
    """Temperature of the quantizer in training."""
    loss: PretrainLossConfig = field(default_factory=PretrainLossConfig)
    """The training loss."""
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            keep="last",
            optimizer=OptimizerConfig(
                name="adamw", learning_rate=5e-4, warm_up_share=0.08, decay="linear", final_fraction=0.0
            ),
        )
    )
    """Length of the run, logging, precision and optimizer. The last weights are kept: a codebook that is hardly used has
    a low loss, so the best dev loss is no sign of a good encoder (our choice)."""


def masked_batches(
    mask: MaskConfig, manifest: Path, data: PretrainDataConfig, out: Path, slices: int, seed: int
) -> MaskedBatches:
    """The batches of a run; see ``TaskRecipe.open_batches``."""
    table, noise = open_tables(manifest, data, out)
    plan = bucket_plan(np.minimum(table.durations, data.crop), data, slices, seed)
    return MaskedBatches(table, plan, slices, data, mask, noise, seed)


def in_its_contexts(settings: PretrainConfig, model: PretrainedEncoder, variant: str | None) -> PretrainConfig:
    """The settings with the contexts that a model's variant is to be trained in, where they do not say."""
    name = model.spec.variant if variant is None else variant
    return replace(settings, contexts=TrainedContexts(train=model.spec.variants[name].contexts))


def gumbel_temperature(step: int, steps: int, settings: TemperatureConfig) -> float:
    """The quantizer's temperature in ``step`` (from 0) of ``steps``."""
    decay = settings.decay
    if decay is None:
        return float(
            max(settings.end, settings.start * (settings.end / settings.start) ** (step / (DECAY_SHARE * steps)))
        )
    return float(max(settings.end, settings.start * decay**step))


@dataclass(frozen=True)
class Prediction:
    """logits (B, M, 1 + K), the own target's first. probabilities (B, S, G, V) and codes (B, S, G) of the targets, of which
    ``counted`` (B, S) bool count; None is all. penalty (): the mean square of the subsampling's output, 0 where not asked for."""

    logits: Tensor
    probabilities: Tensor
    codes: Tensor
    counted: Tensor | None
    penalty: Tensor


def predict(
    model: PretrainedEncoder,
    batch: MaskedBatch,
    temperature: float,
    settings: PretrainConfig,
    variant: str | None,
    context: Context,
    gates: Tensor | None = None,
) -> Prediction:
    """One pass: hidden frames are replaced before the blocks, and their contexts compared with targets made of the frames as they
    were. The objective is computed in float32 whatever the precision around it."""
    encoder, objective, loss = model.encoder, model.objective, settings.loss
    assert objective is not None
    submodels = model.select(variant)
    with _subsampled(encoder, loss.gradient_scale) as outputs:
        x, lens = encoder.embed(batch.features, batch.feature_lens, context)
    frames = torch.arange(x.shape[1], device=x.device)
    counted = None if settings.mask.distractors_from == "hidden" else frames < lens.unsqueeze(1)
    places = batch.hidden.unsqueeze(-1).expand(-1, -1, x.shape[2])
    y = x.gather(1, places) if counted is None else x
    hidden = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device).scatter(1, batch.hidden, True)
    x = torch.where(hidden.unsqueeze(-1), objective.mask.to(x.dtype), x)
    encoded = encoder.layers(x, lens, submodels, context, gates).gather(1, places)
    own = batch.hidden
    if counted is None:
        own = torch.arange(own.shape[1], device=own.device).expand(own.shape)
    with torch.autocast(x.device.type, enabled=False):
        quantized = objective.quantizer(F.dropout(y.float(), loss.feature_dropout, model.training), temperature)
        logits = contrastive_logits(
            objective.project_context(encoded.float()),
            objective.project_target(quantized.vectors),
            quantized.codes,
            own,
            batch.distractors,
            loss.temperature,
        )
        penalty = logits.new_zeros(())
        if loss.penalty_scale > 0:
            squares = outputs[0].float().square().mean(-1) * (frames < lens.unsqueeze(1))
            penalty = squares.sum() / batch.num_encoder_frames
    return Prediction(logits, quantized.probabilities, quantized.codes, counted, penalty)


@contextmanager
def _subsampled(encoder: Encoder, gradient_scale: float) -> Iterator[list[Tensor]]:
    """Yield a list that holds, after ``embed``, the subsampling's output before its norm; gradients into it are scaled."""
    outputs: list[Tensor] = []

    def before_norm(norm: nn.Module, given: tuple[Tensor, bool]) -> tuple[Tensor, bool]:
        x, streaming = given
        if gradient_scale < 1:
            x = x.detach() + gradient_scale * (x - x.detach())  # plus an exact zero
        outputs.append(x)
        return x, streaming

    handle = encoder.subsampling.norm.register_forward_pre_hook(before_norm)  # type: ignore[arg-type, unused-ignore]
    try:
        yield outputs
    finally:
        handle.remove()


def pretraining_loss(
    model: PretrainedEncoder,
    batch: MaskedBatch,
    step: int,
    settings: PretrainConfig,
    variant: str | None = None,
    attention_dropout: AttentionDropoutConfig | None = None,
) -> LossOutput:
    """The contrastive loss of each utterance, (B,), and the diversity loss and penalty as the regularizer; the count is of hidden
    frames, so that the weights of all three are those of the paper. Context and attention dropout are drawn by torch's generator on
    the CPU."""
    metrics: dict[str, Metric] = {}
    hidden, supernet = float(batch.hidden.numel()), settings.supernet
    if supernet is not None:
        variant = drawn_member(supernet, step)
    gates = drawn_gates(model, attention_dropout, batch)
    context = drawn(settings.contexts.choices)
    temperature = gumbel_temperature(step, settings.training.steps, settings.temperature)
    made = predict(model, batch, temperature, settings, variant, context, gates)
    losses = contrastive_nll(made.logits)
    with torch.autocast(losses.device.type, enabled=False):
        diversity = diversity_loss(made.probabilities, made.counted)
        used = perplexity(code_shares(made.codes, made.probabilities.shape[-1], made.counted))
    regularizer = settings.loss.diversity_scale * diversity + settings.loss.penalty_scale * made.penalty
    if supernet is not None:
        metrics |= member_metrics({str(variant): Metric(losses.detach().sum(), hidden)})
        metrics["sparsity"] = Metric(supernet.growth.sparsity_at(step, supernet.sparsity), 1.0)
    metrics |= {
        "contrastive": Metric(losses.detach().sum(), hidden),
        "accuracy": Metric(told_apart(made.logits.detach()).sum(), hidden),
        "perplexity": Metric(used, 1.0),
        "diversity": Metric(diversity.detach(), 1.0),
        "masked": Metric(hidden, float(batch.num_encoder_frames)),
        "temperature": Metric(temperature, 1.0),
    }
    if settings.loss.penalty_scale > 0:
        metrics["penalty"] = Metric(made.penalty.detach(), 1.0)
    return LossOutput(losses, hidden, metrics, regularizer)


def dev_contrast(
    cuts: Sequence[Cut], settings: PretrainConfig, variant: str | None
) -> Callable[[nn.Module], dict[str, float]]:
    """A function from a model to its contrastive loss on held-out cuts, of which always the same frames are hidden, in the first
    context it is trained in, without noise; the share that is recognized; and the perplexity of the codes of all of them together."""
    subset = even_subset(cuts, settings.dev_max_cuts)

    @torch.no_grad()
    def measure(model: nn.Module) -> dict[str, float]:
        assert isinstance(model, PretrainedEncoder) and model.objective is not None
        device = model.objective.mask.device
        sums = torch.zeros(3, dtype=torch.float64, device=device)
        shares: Tensor | None = None
        for batch in held_out_batches(subset, settings.data, settings.mask, settings.seed):
            made = predict(model, batch.to(device), 1.0, settings, variant, settings.contexts.choices[0])
            right, count = told_apart(made.logits).sum(), made.logits.shape[0] * made.logits.shape[1]
            sums += torch.stack([contrastive_nll(made.logits).sum().double(), right.double(), right.new_tensor(count)])
            of_batch = count * code_shares(made.codes, made.probabilities.shape[-1], made.counted)
            shares = of_batch if shares is None else shares + of_batch
        assert shares is not None
        loss, right, total = sums.tolist()
        used = perplexity(shares / total)
        return {"contrastive": loss / total, "accuracy": right / total, "perplexity": float(used)}

    return measure


class CollapseWatch:
    """Warns of codebooks that are hardly used for long: see ``TrainTask.watch``.

    Our choice: a perplexity below 5 for each codebook, or a quarter of a small one, in three logged lines in a row, from a tenth of
    the steps on. Every run begins with few codes in use. A resumed run counts the lines anew.
    """

    def __init__(self, steps: int, quantizer: ContrastiveSpec) -> None:
        self._from, self._most = steps // 10, quantizer.groups * quantizer.entries
        self._low = quantizer.groups * min(COLLAPSED, COLLAPSED_SHARE * quantizer.entries)
        self._in_a_row = 0

    def __call__(self, step: int, means: Mapping[str, float]) -> str | None:
        """The warning, if this line is the third one."""
        used = means.get("perplexity", float("inf"))
        self._in_a_row = self._in_a_row + 1 if step >= self._from and used < self._low else 0
        if self._in_a_row != 3:
            return None
        return (
            f"step {step}: the codebooks have collapsed: of {self._most} entries the targets use {used:.1f} (perplexity), so there is "
            "hardly anything to tell apart; start a new run with a higher loss.diversity_scale or a lower "
            "training.optimizer.learning_rate"
        )
