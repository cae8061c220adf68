"""distill-lm: language models teach the encoder's frames through heads that exist only in training (arXiv 2110.10429).

The paper's model is a hybrid system whose main output is trained on the labels of aligned frames. Here the main output is the recognizer:
its own loss (transducer and CTC) takes the place of the cross-entropy with the labels. A supervised frame head, trained on the aligned
labels as in the paper, can be added; its accuracy on the dev cuts is the number in the paper's table.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from asrkit.data.alignment import Annotator
from asrkit.data.text.units import UNITS, Unit
from asrkit.data.train_batches import TrainBatches
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.methods.distillation.loss import build_loss
from asrkit.methods.lm_distillation.config import DistillLmConfig
from asrkit.methods.lm_distillation.loss import accuracy_of, lm_distillation_loss, with_heads
from asrkit.methods.lm_distillation.teachers import (
    SUPERVISED,
    LmTeacher,
    check_alignments,
    check_dev,
    inventories_of,
    listed,
    load_lm_teacher,
)
from asrkit.models import AsrModel, load_model
from asrkit.models.surgery import rebuild, with_variant
from asrkit.run_dir import WEIGHTS, open_run
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import fine_tune
from asrkit.training.step import TrainTask


def distill_lm(
    parent: Path,
    lms: Mapping[str, Path],
    manifest: Path,
    out: Path,
    settings: DistillLmConfig,
    *,
    dev: Path | None = None,
    device: str = "auto",
    command: str = "",
) -> Path:
    """Train the model of ``parent`` with language models as teachers, or resume an interrupted run; returns ``out``.

    Args:
        lms: run directories of train-lm, by the name of their head; a name that is a unit must be that of the model.
        manifest: cuts with alignments in the units of the language models, as ``align`` writes them.

    Raises:
        UserError: an unusable parent, language model, alignment or combination of settings, manifests, out.
        Interrupted: stopped by a signal, state saved.
    """
    source = open_run(parent)
    origin = load_model(source)
    teachers = {name: load_lm_teacher(path) for name, path in lms.items()}
    unit = _check(settings, teachers, lms, origin)
    if dev is not None and unit is not None:
        check_dev(dev, unit)
    return fine_tune(
        "distill-lm",
        source,
        manifest,
        out,
        settings,
        partial(build_task, settings, parent, lms, unit),
        entry={"lms": {name: {"path": str(p), "weights_sha256": sha256_of(p / WEIGHTS)} for name, p in lms.items()}},
        files={f"lm {name}": path / WEIGHTS for name, path in lms.items()},
        prepare=partial(_check_alignments, settings, teachers, unit),
        other_losses=True,
        dev=dev,
        device=device,
        command=command,
    )


def build_task(
    settings: DistillLmConfig, parent: Path, lms: Mapping[str, Path], unit: Unit | None, batches: TrainBatches
) -> TrainTask:
    """The model with a head for each language model, and its loss; see ``TaskRecipe``.

    Args:
        unit: the unit of the supervised head; None if there is no such head.
    """
    origin = load_model(open_run(parent))
    teachers = {name: load_lm_teacher(path) for name, path in lms.items()}
    inventories = inventories_of(teachers, unit, batches.table)
    # LST mixes the posteriors into the labels of the supervised head, so it needs no other head.
    heads = inventories if settings.mode == "mtl" else {SUPERVISED: inventories[SUPERVISED]}
    base = with_variant(origin.spec, settings.variant, settings.contexts.train)
    model = rebuild(with_heads(base, heads, settings.heads), origin, new=("heads.",))
    annotator = Annotator(inventories, settings.repeats, settings.silence == "previous")
    batches.annotate = annotator
    models = {name: teacher.model for name, teacher in teachers.items()}
    plain = build_loss(base, settings.loss, settings.contexts)
    return TrainTask(
        model,
        lambda model, batch, step: lm_distillation_loss(model, models, batch, step, settings, plain),
        batches,
        dev_metrics=None if unit is None else accuracy_of(annotator, settings),
    )


def _check_alignments(
    settings: DistillLmConfig,
    teachers: Mapping[str, LmTeacher],
    unit: Unit | None,
    run: RunWriter,
    batches: TrainBatches,
) -> None:
    """Refuse cuts whose alignments are missing or have other units; if cuts without are allowed, name them."""
    tokenizers = {name: t.tokenizer for name, t in teachers.items() if t.inventory.unit == "bpe"}
    inventories = inventories_of(teachers, unit, batches.table)
    unaligned = check_alignments(batches.table, inventories, tokenizers, settings.unaligned)
    for missing_unit, cut_ids in unaligned.items():
        run.note(f"{run.path}: {listed(cut_ids)} have no {missing_unit} alignment and train the recognizer alone")


def _check(
    settings: DistillLmConfig, teachers: Mapping[str, LmTeacher], lms: Mapping[str, Path], origin: AsrModel
) -> Unit | None:
    """Refuse settings and language models that do not fit together; returns the unit of the supervised head."""
    findings = []
    if not teachers:
        findings.append("there is no language model to learn from; add one: --lm phone=exp/lm-phone")
    for name, teacher in teachers.items():
        unit = teacher.inventory.unit
        if name in UNITS and name != unit:
            findings.append(f"--lm {name}={lms[name]}: is a language model of {unit} units; name it {unit}")
        if name == SUPERVISED:
            findings.append(f"--lm {name}: this name belongs to the head on the labels; choose another")
    for name, head in settings.heads.items():
        if name == SUPERVISED:
            if head.weight is not None:
                findings.append(f"heads.{name}.weight: is for heads of language models; set supervised_scale instead")
        elif name not in teachers:
            findings.append(f"heads.{name}: there is no --lm of that name; choose from {', '.join(teachers)}")
        elif settings.mode == "lst":
            findings.append(
                f"heads.{name}: --mode lst has no head for the language model; set heads.{SUPERVISED} instead"
            )
        if head.layer is not None and head.layer >= len(origin.encoder.blocks):
            findings.append(
                f"heads.{name}.layer={head.layer}: is out of range; the encoder has layers 0 to {len(origin.encoder.blocks) - 1}"
            )
    if settings.contexts.sampling == "joint":
        findings.append("distillation uses one context per batch; set contexts.sampling=random")
    if (join := settings.data.augment.join) > 0:
        findings.append(f"data.augment.join={join}: a language model would read two sentences as one; set it to 0")
    unit_of_labels = settings.supervised
    if settings.mode == "lst" and teachers:
        if len(teachers) > 1:
            findings.append("--mode lst mixes one language model into the labels; pass one --lm, or use --mode mtl")
        (first, *_) = teachers.values()
        if unit_of_labels not in (None, first.inventory.unit):
            findings.append(
                f"--mode lst: labels of {unit_of_labels} units cannot be mixed with posteriors over {first.inventory.unit} units; "
                "leave out --supervised, or use --mode mtl"
            )
        unit_of_labels = first.inventory.unit
    if settings.supervised_scale != DistillLmConfig().supervised_scale and unit_of_labels is None:
        findings.append("supervised_scale: there is no supervised head; add one with --supervised UNIT")
    if SUPERVISED in settings.heads and unit_of_labels is None:
        findings.append(f"heads.{SUPERVISED}: there is no supervised head; add one with --supervised UNIT")
    if findings:
        raise UserError.of(findings)
    return unit_of_labels
