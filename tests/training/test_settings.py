"""Settings of a new model and of its loss reach what they are for."""

from __future__ import annotations

import pytest
import torch

from asrkit.config import resolve
from asrkit.data.batch import Batch
from asrkit.errors import UserError
from asrkit.models import AsrModel
from asrkit.stages.train_backbone import TrainBackboneConfig
from asrkit.training.asr_loss import LossConfig, asr_loss
from asrkit.training.start import model_spec

SMALL = ["model.size=tiny", "model.dim=16", "model.num_layers=2", "model.feedforward_dim=16", "model.kernel_size=3"]


def test_attention_of_a_new_model_has_the_shape_asked_for() -> None:
    asked = ["attention_dropout.probability=0.5", "attention_dim=8", "attention_heads=2", "attention_position=parallel"]
    settings = resolve(TrainBackboneConfig, None, [*SMALL, *(f"model.{setting}" for setting in asked)])
    joint = model_spec(settings.model, 10).submodels["joint"]
    assert (joint.dim, joint.heads, joint.position, joint.layers) == (8, 2, "parallel", [0, 1])


def test_the_simple_loss_counts_as_its_scale_says() -> None:
    torch.manual_seed(0)
    model = AsrModel(model_spec(resolve(TrainBackboneConfig, None, SMALL).model, 10)).eval()
    symbols, lens = torch.tensor([[1, 2, 3]]), torch.tensor([3])
    batch = Batch(torch.randn(1, 60, 80), torch.tensor([60]), ["cut"], ["text"], [""], [0.6], symbols, lens)
    losses = [
        asr_loss(model, batch, 0, LossConfig(simple_scale=scale, warm_up_steps=0, ctc_scale=0.0, backend="torch"))
        for scale in (0.0, 0.5)
    ]
    grown = losses[1].losses.sum() - losses[0].losses.sum()
    assert float(grown) == pytest.approx(0.5 * float(losses[0].metrics["simple"].total), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (["training.optimizer.weight_decay=0.3"], "weight_decay: works with optimizer.name=adamw only"),
        (["training.optimizer.momentum=0.9"], "momentum: works with optimizer.name=sgd only"),
        (
            ["training.optimizer.warm_up_share=0.6", "training.optimizer.hold_share=0.6"],
            "warm_up_share, hold_share: 0.6 and 0.6 are more than all steps together",
        ),
        (["training.optimizer.name=sgd", "training.optimizer.betas=[0.9,0.9]"], "betas: works with adamw and scaled_adam only"),
        (["data.noise=noise.jsonl.gz"], "noise: is mixed into no cut; set data.augment.noise_probability"),
        (["steps=4"], "steps: unknown key; did you mean training.steps?"),
        (["zzz=4"], "`asrkit config STAGE --all` lists every key"),
    ],
)  # fmt: skip
def test_a_setting_that_nothing_would_read_is_refused(settings: list[str], complaint: str) -> None:
    with pytest.raises(UserError) as refused:
        resolve(TrainBackboneConfig, None, settings)
    assert complaint in "\n".join(refused.value.lines)
