"""The weight of each utterance's distillation loss: constant, by schedule, or from the losses of student and teacher
(US20220309340A1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from asrkit.methods.distillation.config import WeightConfig


def weights_of(
    settings: WeightConfig,
    step: int,
    steps: int,
    student_loss: Tensor,
    teacher_loss: Tensor,
    symbol_lens: Tensor,
    encoder_out_lens: Tensor,
) -> Tensor:
    """The weight of each utterance, (B,), from the transducer losses, (B,); ``steps`` is the length of the training."""
    if settings.needs_teacher_loss:
        if settings.per != "sum":
            lens = (symbol_lens if settings.per == "token" else encoder_out_lens).clamp(min=1)
            student_loss, teacher_loss = student_loss / lens, teacher_loss / lens
        if settings.detach:
            student_loss = student_loss.detach()
        weights = 1 / (1 + teacher_loss.detach())
        if settings.kind == "student-teacher":
            weights = student_loss * weights
    else:
        weights = torch.full_like(student_loss.detach(), scheduled_weight(settings, step, steps))
    return weights if settings.clamp is None else weights.clamp(*settings.clamp)


def scheduled_weight(settings: WeightConfig, step: int, steps: int) -> float:
    """The weight for kinds that depend only on the step."""
    if settings.kind == "constant":
        return 1.0
    if settings.kind == "piecewise":
        return [weight for first, weight in settings.points if first <= step][-1]
    last = steps - 1 if settings.to_step is None else settings.to_step
    done = min(1.0, max(0.0, (step - settings.from_step) / max(1, last - settings.from_step)))
    if settings.kind == "linear":
        return settings.start + done * (settings.end - settings.start)
    return settings.start ** (1 - done) * settings.end**done
