"""The outputs of teachers for one batch.

Shapes: B batch, T' encoder frames, U symbols, S positions, C classes (3 or V), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from asrkit.devices import send
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
class _Forward:
    """One teacher's forward pass over the N utterances that it teaches."""

    teacher: Teacher
    symbols: Tensor  # (N, U)
    symbol_lens: Tensor  # (N,)
    encoder_out: Tensor  # (N, T', D)
    delayed_out: Tensor  # (N, T', D)
    encoder_out_lens: Tensor  # (N,)
    predicted: Tensor  # (N, U + 1, P)
    joiner_in: tuple[Tensor, Tensor]  # (N, T', J) of the delayed frames, (N, U + 1, J)


class TeacherOutputs:
    """The teachers' outputs for a batch, in the order of its utterances and without gradients.

    Args:
        features: (B, T, 80), the teachers' input; feature_lens (B,).
        symbols: (B, U), the student's; symbol_lens, encoder_out_lens (B,): the size of each lattice.
        context: the context to run in; None is each teacher's own, the first its variant was trained in.
        delay: encoder frames by which the teachers are delayed.
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
        self._groups: list[tuple[Tensor, list[_Forward]]] = []
        for indices, several in route(teachers, languages):
            rows = send(torch.tensor(indices), features.device)
            forwards = []
            for teacher in several:
                model = teacher.model.to(features.device)
                own = parse_context(model.spec.variants[model.spec.variant].contexts[0])
                language_ids = model.language_ids([languages[index] for index in indices])
                encoder_out, _ = model.encode(
                    features[rows], feature_lens[rows], None, context or own, languages=language_ids
                )
                later = delayed(encoder_out, encoder_out_lens[rows], delay)
                teacher_symbols = teacher.symbols(symbols[rows])
                predicted = model.predictor(model.predictor.contexts_of(teacher_symbols))
                joiner_in = (model.joiner.project_encoder(later), model.joiner.project_predictor(predicted))
                forwards.append(
                    _Forward(
                        teacher,
                        teacher_symbols,
                        symbol_lens[rows],
                        encoder_out,
                        later,
                        encoder_out_lens[rows],
                        predicted,
                        joiner_in,
                    )
                )
            self._groups.append((rows, forwards))

    def node_log_probs(self, frames: slice, ranges: Tensor) -> Tensor:
        """At the nodes ``ranges`` (B, c, S) of the ``frames``: log-probabilities (B, c, S, C)."""

        def of(forward: _Forward, rows: Tensor) -> Tensor:
            encoded, predicted = forward.joiner_in
            logits = forward.teacher.model.joiner(*gather_pruned(encoded[:, frames], predicted, ranges[rows]))
            with torch.autocast(logits.device.type, enabled=False):
                return node_log_probs(
                    logits,
                    forward.symbols,
                    ranges[rows],
                    forward.symbol_lens,
                    self.classes,
                    self.temperature,
                )

        return self._gather(of)

    def ctc_log_probs(self) -> Tensor:
        """(B, T', V)"""
        return self._gather(lambda forward, rows: forward.teacher.model.ctc_log_probs(forward.delayed_out))

    def transducer_losses(self, loss: LossConfig) -> Tensor:
        """Each utterance's pruned transducer loss (B,), on the teacher's own lattice; the mean of several teachers'."""

        def of(forward: _Forward, rows: Tensor) -> Tensor:
            model = forward.teacher.model
            return transducer_loss(
                model.joiner.project_encoder(forward.encoder_out),
                forward.joiner_in[1],
                model.joiner,
                model.simple_encoder(forward.encoder_out),
                model.simple_predictor(forward.predicted),
                forward.symbols,
                forward.encoder_out_lens,
                forward.symbol_lens,
                prune_range=loss.prune_range,
                lm_scale=loss.lm_scale,
                am_scale=loss.am_scale,
                backend=loss.backend,
                topology=loss.topology,
            ).pruned

        return self._gather(of, lambda losses: torch.stack(losses).mean(dim=0))

    def encoder_distances(self, encoder_out: Tensor, maps: nn.ModuleDict, kind: Distance) -> Tensor:
        """Distance of the student's encoder frames (B, T', D), mapped if there is a map, from the teachers', (B,)."""
        total = encoder_out.new_zeros(len(encoder_out), dtype=torch.float32)
        for rows, several in self._groups:
            for forward in several:
                student_out = encoder_out[rows]
                if forward.teacher.name in maps:
                    student_out = maps[forward.teacher.name](student_out)
                distance = encoder_distance(student_out, forward.delayed_out, forward.encoder_out_lens, kind)
                total = total.index_add(0, rows, distance / len(several))
        return total

    @torch.no_grad()
    def _gather(
        self, of: Callable[[_Forward, Tensor], Tensor], mean: Callable[[list[Tensor]], Tensor] = mean_log_probs
    ) -> Tensor:
        """``of`` for each group's rows, averaged over its teachers, in the order of the batch."""
        parts = [(rows, mean([of(forward, rows) for forward in several])) for rows, several in self._groups]
        if len(parts) == 1:
            return parts[0][1]
        output = parts[0][1].new_empty(sum(len(rows) for rows, _ in parts), *parts[0][1].shape[1:])
        for rows, part in parts:
            output[rows] = part
        return output
