"""The loss of sequence training: a sequence criterion, smoothed by the recognizer's own loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from asrkit.data.batch import Batch
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.lattices import graph_lattice
from asrkit.losses.ctc import ctc_log_probs_of
from asrkit.losses.sequence import expected_errors, outer_gradient_loss, sampled_errors
from asrkit.methods.sequence.config import SequenceTrainConfig
from asrkit.methods.sequence.denominator import Denominator
from asrkit.methods.sequence.hypotheses import (
    errors_of,
    find_n_best,
    sample_ctc,
    sample_transducer,
    transducer_log_probs,
    with_reference,
)
from asrkit.methods.sequence.lattices import k2_for_lattices, outer
from asrkit.methods.sequence.search_cache import SearchCache
from asrkit.models.asr import AsrModel
from asrkit.nn.context import Context
from asrkit.training.asr_loss import ForwardPass, forward_losses
from asrkit.training.contexts import drawn
from asrkit.training.step import LossOutput, Metric

SEARCHER = "searcher"  # under ``AsrModel.snapshots``: the weights that hypotheses and lattices are searched with
Part = tuple[Tensor, dict[str, Metric]]  # the loss of each utterance (B,), and what to log


@dataclass(frozen=True)
class SequenceLoss:
    """The loss of a stage: a pure function of (model, batch on the device, step) but for torch's generator.

    contexts: those to train in. graph: the denominator, of lattice criteria. start: the trained weights at the start, by name, if
    their distance counts. cache: what was searched before the training.
    """

    settings: SequenceTrainConfig
    contexts: list[Context]
    tokenizer: Tokenizer
    graph: Denominator | None = None
    start: Mapping[str, Tensor] | None = None
    cache: SearchCache | None = None
    _fsas: dict[torch.device, Any] = field(default_factory=dict, repr=False)  # the denominator on each device
    _starts: dict[torch.device, dict[str, Tensor]] = field(default_factory=dict, repr=False)  # and ``start``

    def __call__(self, model: AsrModel, batch: Batch, step: int) -> LossOutput:
        settings, context, weight = self.settings, drawn(self.contexts), self.settings.smoothing_weight
        # A batch in which nobody speaks has no column of symbols; the criteria have at least one.
        batch = replace(batch, symbols=F.pad(batch.symbols, (0, int(batch.symbols.shape[1] == 0))))
        smoothed = settings.loss if weight > 0 else replace(settings.loss, ctc_scale=0.0, transducer_scale=0.0)
        own = forward_losses(model, batch, step, smoothed, settings.variant, context, None)
        searcher, found = model, own.encoder_out.detach()
        if settings.search_every > 1:
            searcher, found = self._older(model, batch, context)
        if self.graph is not None:
            losses, metrics = self._lattice_criterion(self.graph, model, batch, own, searcher, found)
        elif settings.criterion == "mwer":
            losses, metrics = self._n_best_criterion(model, batch, own, searcher, found)
        else:
            losses, metrics = self._sampled_criterion(model, batch, own)
        age = step % settings.search_every if self.cache is None else step
        metrics["lattice_age"] = Metric(float(age), 1.0)
        regularizer = None
        if self.start is not None:
            device = own.losses.device
            if device not in self._starts:
                self._starts[device] = {name: weight.to(device) for name, weight in self.start.items()}
            regularizer = settings.l2 / 2 * squared_distance(model, self._starts[device])
        frames = float(batch.num_encoder_frames)
        return LossOutput(losses + weight * own.losses, frames, {**own.metrics, **metrics}, regularizer)

    def _older(self, model: AsrModel, batch: Batch, context: Context) -> tuple[AsrModel, Tensor]:
        """The model with the weights of the last renewal, and its encoder's output (B, T', D)."""
        searcher = model.snapshots[SEARCHER]
        assert isinstance(searcher, AsrModel)
        languages = model.language_ids(batch.languages)
        with torch.no_grad():
            found, _ = searcher.encode(
                batch.features, batch.feature_lens, self.settings.variant, context, languages=languages
            )
        return searcher, found

    @property
    def _special_ids(self) -> Sequence[int]:
        return sorted(self.tokenizer.special_ids)

    def _n_best_criterion(
        self, model: AsrModel, batch: Batch, own: ForwardPass, searcher: AsrModel, found: Tensor
    ) -> Part:
        settings, head, lens = self.settings, self.settings.trained_head, own.encoder_out_lens
        if self.cache is not None:
            n_best = self.cache.n_best(batch.cut_ids, lens.device)
        else:
            n_best = find_n_best(searcher, head, found, lens, settings.hypotheses.beam, self._special_ids)
        first = n_best.scores.shape[1]
        if settings.hypotheses.add_reference:
            n_best = with_reference(n_best, batch.symbols, batch.symbol_lens)
        if head == "ctc":
            log_probs = ctc_log_probs_of(model.ctc_log_probs(own.encoder_out), lens, n_best.tokens, n_best.lens)
        else:
            log_probs = transducer_log_probs(model, own.encoder_out, lens, n_best.tokens, n_best.lens, settings.loss)
        valid = (n_best.scores > -torch.inf) & (log_probs != -torch.inf)
        errors, total = self._errors(n_best.tokens, n_best.lens, batch)
        risk = expected_errors(settings.hypotheses.scale * log_probs, errors, valid)
        metrics = {
            "expected_errors": Metric(risk.expected.sum(), total),
            "one_best_errors": Metric(errors[:, 0].sum(), total),
            "oracle_errors": Metric(_least(errors[:, :first], valid[:, :first]).sum(), total),
            "hypotheses": Metric(valid.sum(), float(len(valid))),
        }
        # A score that is NaN counts as a hypothesis that is not there; the loss has to say so.
        return torch.where(log_probs.isnan().any(dim=1), torch.nan, risk.loss), metrics

    def _sampled_criterion(self, model: AsrModel, batch: Batch, own: ForwardPass) -> Part:
        paths, lens = self.settings.hypotheses.paths, own.encoder_out_lens
        if self.settings.trained_head == "ctc":
            log_probs = model.ctc_log_probs(own.encoder_out)
            tokens, token_lens, log_w = sample_ctc(log_probs, lens, paths, model.blank, self._special_ids)
        else:
            tokens, token_lens, log_w = sample_transducer(model, own.encoder_out, lens, paths, self._special_ids)
        errors, total = self._errors(tokens, token_lens, batch)
        risk = sampled_errors(log_w, errors)
        metrics = {
            "expected_errors": Metric(risk.expected.sum(), total),
            "oracle_errors": Metric(errors.amin(dim=1).sum(), total),
            "hypotheses": Metric(_distinct(tokens), float(len(tokens))),
        }
        return risk.loss, metrics

    def _errors(self, tokens: Tensor, lens: Tensor, batch: Batch) -> tuple[Tensor, float]:
        unit = self.settings.hypotheses.unit
        errors, total = errors_of(tokens, lens, batch.texts, batch.symbols, batch.symbol_lens, self.tokenizer, unit)
        return errors, float(total)

    def _lattice_criterion(
        self,
        graph: Denominator,
        model: AsrModel,
        batch: Batch,
        own: ForwardPass,
        searcher: AsrModel,
        found: Tensor,
    ) -> Part:
        k2, how, criterion = k2_for_lattices(), self.settings.lattice, self.settings.criterion
        outputs, lens = model.ctc_log_probs(own.encoder_out), own.encoder_out_lens.clamp(min=1)
        if self.cache is not None:
            lattice = self.cache.lattice(k2, batch.cut_ids, outputs.device)
        else:
            searched = outputs if searcher is model else searcher.ctc_log_probs(found)
            if outputs.device not in self._fsas:
                self._fsas[outputs.device] = graph.fsa(k2, outputs.device)
            lattice = graph_lattice(k2, self._fsas[outputs.device], searched, lens, how.kappa, how.denominator)
        priors = outputs.new_zeros(len(lens))
        if how.denominator.lm_scale > 0:
            texts = zip(batch.symbols.tolist(), batch.symbol_lens.tolist(), strict=True)
            priors = outputs.new_tensor([graph.log_prob(ids[:length]) for ids, length in texts])
        result = outer(criterion, k2, lattice, outputs, lens, batch.symbols, batch.symbol_lens, how, priors)
        frames, utterances = float(batch.num_encoder_frames), float(len(batch.cut_ids))
        names = {"smbr": ("accuracy", frames), "mpe": ("token_accuracy", utterances)}
        name, count = names.get(criterion, ("log_posterior", utterances))
        metrics = {
            name: Metric(result.objective.sum(), count),
            "frame_accuracy": Metric(result.correct, frames),
            "rejected_frames": Metric(result.rejected, frames),
            "no_path": Metric((~result.counts).sum(), None),
            "arcs": Metric(float(result.arcs), frames),
        }
        return outer_gradient_loss(result.objective, result.derivative, outputs), metrics


def _least(errors: Tensor, valid: Tensor) -> Tensor:
    """The fewest errors of each utterance's hypotheses, (B,)."""
    return torch.where(valid, errors, torch.inf).amin(dim=1).nan_to_num(posinf=0.0)


def _distinct(tokens: Tensor) -> Tensor:
    """How many different rows the paths (B, N, U) of all utterances have."""
    same = (tokens.unsqueeze(2) == tokens.unsqueeze(1)).all(dim=3)  # (B, N, N)
    return (~same.tril(-1).any(dim=2)).sum()


def squared_distance(model: AsrModel, start: Mapping[str, Tensor]) -> Tensor:
    """The sum of the squared differences of the trained weights from those of ``start``, on the same device."""
    parts = [(weight - start[name]).square().sum() for name, weight in model.named_parameters() if name in start]
    return torch.stack(parts).sum()
