"""What teachers say of one batch, from their models or from disk.

Shapes: B batch, T' encoder frames, U symbols, S positions, C classes (3 or V), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asrkit.losses.distillation import (
    Classes,
    Distance,
    delayed,
    encoder_distance,
    mean_log_probs,
    node_log_probs,
)
from asrkit.losses.transducer import gather_pruned, transducer_loss
from asrkit.methods.distillation.teachers import Teacher, Teachers, route
from asrkit.nn.context import Context, parse_context
from asrkit.training.asr_loss import LossConfig


@dataclass(frozen=True)
class _Heard:
    """What one teacher makes of the utterances (N of them) it teaches."""

    teacher: Teacher
    symbols: Tensor  # (N, U)
    symbol_lens: Tensor  # (N,)
    encoder_out: Tensor  # (N, T', D)
    delayed_out: Tensor  # (N, T', D)
    encoder_out_lens: Tensor  # (N,)
    predicted: Tensor  # (N, U + 1, P)
    joiner_in: tuple[Tensor, Tensor]  # (N, T', J) of the delayed frames, (N, U + 1, J)


class TeacherOutputs:
    """What the teachers say of a batch: every answer has the batch's own order of utterances, and no gradient.

    Args:
        features: (B, T, 80), what they hear; feature_lens (B,).
        symbols: (B, U), the student's; symbol_lens, encoder_out_lens (B,): how much of the lattice there is.
        context: the one to hear in; None is each teacher's own, the first its variant was trained in.
        delay: by how many encoder frames the teachers are behind.
    """

    @torch.no_grad()
    def __init__(
        self,
        teachers: Teachers,
        languages: list[str],
        features: Tensor,
        feature_lens: Tensor,
        symbols: Tensor,
        symbol_lens: Tensor,
        encoder_out_lens: Tensor,
        *,
        classes: Classes = "three",
        temperature: float = 1.0,
        delay: int = 0,
        context: Context | None = None,
    ) -> None:
        self.classes: Classes = classes
        self.temperature = temperature
        self._groups: list[tuple[Tensor, list[_Heard]]] = []
        for places, several in route(teachers, languages):
            rows = torch.tensor(places, device=features.device)
            heard = []
            for teacher in several:
                model = teacher.model.to(features.device)
                own = parse_context(model.spec.variants[model.spec.variant].contexts[0])
                told = model.language_ids([languages[place] for place in places])
                encoder_out, _ = model.encode(features[rows], feature_lens[rows], None, context or own, languages=told)
                later = delayed(encoder_out, encoder_out_lens[rows], delay)
                theirs = teacher.symbols(symbols[rows])
                predicted = model.predictor(model.predictor.contexts_of(theirs))
                joiner_in = (model.joiner.project_encoder(later), model.joiner.project_predictor(predicted))
                heard.append(
                    _Heard(
                        teacher,
                        theirs,
                        symbol_lens[rows],
                        encoder_out,
                        later,
                        encoder_out_lens[rows],
                        predicted,
                        joiner_in,
                    )
                )
            self._groups.append((rows, heard))

    def node_log_probs(self, frames: slice, ranges: Tensor) -> Tensor:
        """At the nodes ``ranges`` (B, c, S) of the ``frames``: log-probabilities (B, c, S, C)."""

        def of(heard: _Heard, rows: Tensor) -> Tensor:
            encoded, predicted = heard.joiner_in
            logits = heard.teacher.model.joiner(*gather_pruned(encoded[:, frames], predicted, ranges[rows]))
            with torch.autocast(logits.device.type, enabled=False):
                return node_log_probs(
                    logits,
                    heard.symbols,
                    ranges[rows],
                    heard.symbol_lens,
                    self.classes,
                    self.temperature,
                )

        return self._gather(of)

    def ctc_log_probs(self) -> Tensor:
        """(B, T', V)"""
        return self._gather(lambda heard, rows: heard.teacher.model.ctc_log_probs(heard.delayed_out))

    def transducer_losses(self, loss: LossConfig) -> Tensor:
        """Each utterance's pruned transducer loss (B,), on the teacher's own lattice; the mean of several teachers'."""

        def of(heard: _Heard, rows: Tensor) -> Tensor:
            model = heard.teacher.model
            return transducer_loss(
                model.joiner.project_encoder(heard.encoder_out),
                heard.joiner_in[1],
                model.joiner,
                model.simple_encoder(heard.encoder_out),
                model.simple_predictor(heard.predicted),
                heard.symbols,
                heard.encoder_out_lens,
                heard.symbol_lens,
                prune_range=loss.prune_range,
                lm_scale=loss.lm_scale,
                am_scale=loss.am_scale,
                backend=loss.backend,
                topology=loss.topology,
            ).pruned

        return self._gather(of, lambda losses: torch.stack(losses).mean(dim=0))

    def encoder_distances(self, encoder_out: Tensor, maps: nn.ModuleDict, kind: Distance) -> Tensor:
        """How far the student's encoder frames (B, T', D), mapped where there is a map, are from the teachers': (B,)."""
        total = encoder_out.new_zeros(len(encoder_out), dtype=torch.float32)
        for rows, several in self._groups:
            for heard in several:
                mine = encoder_out[rows]
                if heard.teacher.name in maps:
                    mine = maps[heard.teacher.name](mine)
                far = encoder_distance(mine, heard.delayed_out, heard.encoder_out_lens, kind)
                total = total.index_add(0, rows, far / len(several))
        return total

    @torch.no_grad()
    def _gather(
        self, of: Callable[[_Heard, Tensor], Tensor], mean: Callable[[list[Tensor]], Tensor] = mean_log_probs
    ) -> Tensor:
        """What ``of`` says of each group's rows, the mean of its teachers, in the batch's order."""
        said = [(rows, mean([of(heard, rows) for heard in several])) for rows, several in self._groups]
        if len(said) == 1:
            return said[0][1]
        answer = said[0][1].new_empty(sum(len(rows) for rows, _ in said), *said[0][1].shape[1:])
        for rows, part in said:
            answer[rows] = part
        return answer
