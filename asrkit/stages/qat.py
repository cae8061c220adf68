"""qat: quantisation-aware training with native integer operations.

In every forward pass the chosen layers' weights, and on demand their inputs, become integers and the products are those of
integers; the gradient passes the rounding straight through (arXiv 2203.15952, US20230298569A1). Masks of a pruned parent
stay, and prune comes before quantise (arXiv 2312.08553, US20250078815A1).
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from asrkit.config import config
from asrkit.models import AsrModel, load_model
from asrkit.models.compress import QuantisationConfig, quantised_spec, rebuilt, with_configuration
from asrkit.run_dir import WEIGHTS, open_run
from asrkit.training.finetune import FineTuneConfig, Prepared, fine_tune, load_teacher
from asrkit.training.masks import keep_pruned
from asrkit.training.objective import TeacherConfig, loss_of_a_stage
from asrkit.training.run import RunWriter


@config
class QatConfig(FineTuneConfig):
    """Everything qat can be told; config.yaml of the run holds it with every default written out.

    ``from_scratch``: begin with new weights, as the paper does, and not with the parent's; its shape, features' statistics
    and tokenizer are taken over. ``configuration``: the one to train, None for the parent's default.
    """

    configuration: str | None = None
    quantisation: QuantisationConfig = field(default_factory=QuantisationConfig)
    from_scratch: bool = False
    teacher: TeacherConfig = field(default_factory=TeacherConfig)


def qat(
    parent: Path,
    manifest: Path,
    out: Path,
    settings: QatConfig,
    *,
    teacher: Path | None = None,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Train the quantised model of ``parent``, or go on with a run that was interrupted; returns ``out``.

    Args:
        teacher: run directory of a model, such as the float parent, that teaches besides.

    Raises:
        UserError: an unusable parent, layers that cannot be quantised so, a teacher of another kind, manifests, out.
        Interrupted: stopped by a signal, state saved.
    """
    source = open_run(parent)
    origin = load_model(source)
    active = origin.submodels_of(settings.configuration)
    spec = with_configuration(quantised_spec(origin, settings.quantisation, active), settings.configuration)
    guide = None if teacher is None else load_teacher(teacher, origin)

    def prepare(run: RunWriter) -> Prepared:
        model = rebuilt(spec, origin)
        if settings.from_scratch:
            fresh = AsrModel(spec).state_dict()
            kept = {name for name, _ in model.named_buffers()}
            model.load_state_dict({name: t for name, t in fresh.items() if name not in kept}, strict=False)
        layers = [how for how in spec.compression.values() if how.weights is not None]
        bits = sorted({how.weights.bits for how in layers if how.weights is not None}, reverse=True)
        run.note(f"{run.path}: {len(layers)} layers with weights of {', '.join(map(str, bits))} bits")
        return Prepared(
            model=model,
            loss=loss_of_a_stage(spec, settings.loss, settings.contexts, guide, settings.teacher),
            after_step=keep_pruned,
        )

    return fine_tune(
        "qat",
        source,
        manifest,
        out,
        settings,
        prepare,
        inputs={"teacher": None if teacher is None else teacher / WEIGHTS},
        dev=dev,
        device=device,
        command=command,
    )
