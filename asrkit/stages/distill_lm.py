"""distill-lm: language models teach the encoder's frames through heads that only training has (arXiv 2110.10429).

The paper's model is a hybrid one, whose main output is trained on the labels of aligned frames. Here the main output is the recognizer:
its own loss (transducer and CTC) stands in for the labels' cross-entropy, and a supervised frame head, trained on the aligned labels as in
the paper, can be added; its accuracy on the dev cuts is what the paper's table reports.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lhotse import CutSet
from pydantic import Field
from torch import Tensor

from asrkit.config import Advanced, Positive, Share, config, from_dict, to_dict
from asrkit.data.alignment import SILENT, Annotator, Heard, Segments, symbols_of
from asrkit.data.batch import Batch, evaluation_batches
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import open_cuts, text_of
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.text.units import UNITS, Inventory, Unit
from asrkit.data.train_batches import TrainBatches
from asrkit.errors import UserError
from asrkit.losses.lm_distillation import (
    frame_accuracy,
    interpolated_labels,
    label_cross_entropy,
    lm_posteriors,
    multi_task,
    one_hot_silence,
    rearrange,
    soft_cross_entropy,
)
from asrkit.methods.distillation.loss import build_loss
from asrkit.methods.pruning import keep_pruned
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.asr import tapped
from asrkit.models.lm import LanguageModel, load_lm
from asrkit.models.surgery import with_variant
from asrkit.nn.context import parse_context
from asrkit.run_dir import WEIGHTS, open_run, sha256_of
from asrkit.training.asr_loss import LossOutput
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import FineTuneConfig, Prepared, fine_tune

SUPERVISED = "supervised"  # the head trained on the alignment's own labels
SHOWN = 10  # cuts or symbols named in a finding


@config
class HeadConfig:
    """One head on the encoder, taught by a language model (arXiv 2110.10429)."""

    weight: Annotated[float, Field(ge=0.0)] | None = None
    """Weight of the head's loss (w_j); null gives J heads 1/J each, as in the paper."""
    hidden: Positive | None = None
    """Inner width of the head; null takes the encoder's."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Encoder block the head reads, from 0; null is the top one, as in the paper."""


@config
class DistillLmConfig(FineTuneConfig):
    """Settings of distill-lm (arXiv 2110.10429; LST is arXiv 1907.06017). config.yaml of the run holds them all."""

    variant: str | None = None
    """Variant to train; null trains the parent's default."""
    mode: Literal["mtl", "lst"] = "mtl"
    """mtl gives each language model its own head (equation 4 of the paper); lst trains one supervised head whose labels
    are mixed with the posteriors (equation 3), the baseline of the paper."""
    labels: Share = 0.9
    """Share lambda of the recognizer's own loss (mtl), or of the labels (lst). 0.9 is the best of arXiv 1907.06017."""
    temperature: Annotated[float, Field(gt=0.0)] | None = None
    """Temperature the language model's logits are divided by; null is 1 for mtl and 5 for lst, as the paper compares
    them."""
    both_temperatures: Advanced[bool] = False
    """Divide the student's logits by the temperature too. The paper does not."""
    heads: dict[str, HeadConfig] = field(default_factory=dict)
    """Settings of single heads, by the name given in --lm NAME=RUN, or `supervised`."""
    supervised: Unit | None = None
    """Unit of a further head trained on the aligned labels themselves: bpe, phone or senone; null for none. lst always
    has one, of its language model's unit."""
    supervised_scale: Annotated[float, Field(ge=0.0)] = 1.0
    """Weight of the supervised head's loss, beside the recognizer's."""
    silence: Advanced[Literal["ignore", "own", "previous"]] = "ignore"
    """Target of frames between two units: ignore (no target), own (class 0), or previous (the unit before)."""
    repeats: Advanced[Literal["keep", "merge"]] = "keep"
    """keep counts a unit said twice as two; merge takes neighbors with one label for one segment."""
    unaligned: Literal["refuse", "allow"] = "refuse"
    """Cuts without an alignment: refuse to start, or allow them, which then train the recognizer alone."""


@dataclass(frozen=True)
class LmTeacher:
    """A language model, its tokenizer, and the inventory of its units."""

    model: LanguageModel
    tokenizer: Tokenizer
    inventory: Inventory


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
    """Train the model of ``parent`` with language models as teachers, or go on with a run that was interrupted; returns ``out``.

    Args:
        lms: run directories of train-lm, by the name of their head; one named after a unit must be of that unit.
        manifest: cuts with alignments in the units of the language models, as ``align`` writes them.

    Raises:
        UserError: an unusable parent, language model, alignment or combination of settings, manifests, out.
        Interrupted: stopped by a signal, state saved.
    """
    source = open_run(parent)
    origin = load_model(source)
    teachers = {name: _load_teacher(path) for name, path in lms.items()}
    unit = _check(settings, teachers, lms, origin)
    base = with_variant(origin.spec, settings.variant, settings.contexts.train)
    objective = build_loss(base, settings.loss, settings.contexts)
    if dev is not None and unit is not None:
        _check_dev(dev, unit)

    def prepare(run: RunWriter, batches: TrainBatches) -> Prepared:
        inventories = {name: teacher.inventory for name, teacher in teachers.items()}
        inventories |= _supervised_inventory(unit, teachers, batches.table)
        tokenizers = {name: t.tokenizer for name, t in teachers.items() if t.inventory.unit == "bpe"}
        bare = check_alignments(batches.table, inventories, tokenizers, settings.unaligned)
        for missing_unit, cut_ids in bare.items():
            run.note(f"{run.path}: {_listed(cut_ids)} have no {missing_unit} alignment and train the recognizer alone")
        # LST mixes the posteriors into the labels of the supervised head, so that is the only one.
        taught = inventories if settings.mode == "mtl" else {SUPERVISED: inventories[SUPERVISED]}
        spec = with_heads(base, taught, settings.heads)
        model = AsrModel(spec)
        missing, unexpected = model.load_state_dict(origin.state_dict(), strict=False)
        assert not unexpected and all(name.startswith("heads.") for name in missing)
        annotator = Annotator(inventories, settings.repeats, settings.silence == "previous")
        batches.annotate = annotator
        models = {name: teacher.model for name, teacher in teachers.items()}
        measure = None if unit is None else accuracy_of(annotator, settings)
        return Prepared(
            model=model,
            loss=lambda model, batch, step: lm_distillation_loss(model, models, batch, step, settings, objective),
            after_step=keep_pruned,
            measure=measure,
        )

    return fine_tune(
        "distill-lm",
        source,
        manifest,
        out,
        settings,
        prepare,
        content={"lms": {name: {"path": str(p), "weights_sha256": sha256_of(p / WEIGHTS)} for name, p in lms.items()}},
        dev=dev,
        device=device,
        command=command,
    )


def lm_distillation_loss(
    model: AsrModel,
    lms: Mapping[str, LanguageModel],
    batch: Batch,
    step: int,
    settings: DistillLmConfig,
    objective: Callable[[Any, Batch, int], LossOutput],
) -> LossOutput:
    """The recognizer's loss ``objective`` of an annotated batch, and what its heads learn from labels and language models.

    Sums over an utterance's frames, (B,), like the recognizer's own loss: equation 4 for mtl, equation 3 for lst.
    """
    layers = {name: top_or(head.layer, model) for name, head in model.spec.heads.items()}
    with tapped(model, {*layers.values()}) as taps:
        own = objective(model, batch, step)
    logits = {name: model.heads[name](taps[layer]) for name, layer in layers.items()}
    main, parts = own.loss, dict(own.parts)
    counted = {name: counted_frames(segments, settings.silence) for name, segments in batch.segments.items()}
    temperature = settings.temperature or {"mtl": 1.0, "lst": 5.0}[settings.mode]
    student_temperature = temperature if settings.both_temperatures else 1.0
    soft = {
        name: frame_posteriors(lm.to(own.loss.device).eval(), batch.segments[name], temperature)
        for name, lm in lms.items()
    }
    if SUPERVISED in logits:
        labels = frame_labels(batch.segments[SUPERVISED])
        if settings.mode == "lst":
            (posteriors,) = soft.values()
            targets = interpolated_labels(labels, posteriors, settings.labels)
            hard = soft_cross_entropy(logits[SUPERVISED], targets, counted[SUPERVISED], student_temperature)
        else:
            hard = label_cross_entropy(logits[SUPERVISED], labels, counted[SUPERVISED])
        main = main + settings.supervised_scale * hard
        parts[SUPERVISED] = hard.detach().sum()
    if settings.mode == "lst":
        return replace(own, loss=main, parts=parts)
    taught = {
        name: soft_cross_entropy(logits[name], targets, counted[name], student_temperature)
        for name, targets in soft.items()
    }
    chosen = [settings.heads.get(name, HeadConfig()).weight for name in taught]
    shares = torch.tensor([1 / len(taught) if weight is None else weight for weight in chosen], device=main.device)
    loss = multi_task(main, torch.stack(list(taught.values())), shares, settings.labels)
    return replace(own, loss=loss, parts=parts | {f"lm_{name}": each.detach().sum() for name, each in taught.items()})


def frame_posteriors(lm: LanguageModel, segments: Segments, temperature: float) -> Tensor:
    """What the language model expects of each frame's unit given the units before, (B, T', V); silence where there is none."""
    with torch.no_grad():
        logits = lm(segments.symbols)[:, :-1]
    posteriors = lm_posteriors(logits, temperature)
    silent = one_hot_silence(segments.frames, posteriors.shape[-1])
    return torch.where(segments.frames.unsqueeze(-1) >= 0, rearrange(posteriors, segments.frames), silent)


def frame_labels(segments: Segments) -> Tensor:
    """The unit of each frame, (B, T') int64; 0, silence, where there is none."""
    return rearrange(segments.symbols, segments.frames).masked_fill(segments.frames < 0, 0)


def counted_frames(segments: Segments, silence: str) -> Tensor:
    """Which frames a head learns from, (B, T') bool: those of units, and of silence where that is a class of its own."""
    return segments.frames >= (SILENT if silence == "own" else 0)


def with_heads(spec: ModelSpec, inventories: Mapping[str, Inventory], settings: Mapping[str, HeadConfig]) -> ModelSpec:
    """The spec with a head for each inventory."""
    heads = {}
    for name, inventory in inventories.items():
        own = settings.get(name, HeadConfig())
        hidden = own.hidden or spec.encoder.dim
        heads[name] = {"unit": inventory.unit, "classes": inventory.size, "hidden": hidden, "layer": own.layer}
    return from_dict(ModelSpec, {**to_dict(spec), "heads": heads}, "heads")


def top_or(layer: int | None, model: AsrModel) -> int:
    """The number of the block a head hangs on."""
    return len(model.encoder.blocks) - 1 if layer is None else layer


def accuracy_of(annotator: Annotator, settings: DistillLmConfig) -> Callable[[Any, CutSet], dict[str, float]]:
    """A function from a model and aligned cuts to the supervised head's frame accuracy, as the paper reports it."""
    labeled = replace(annotator, inventories={SUPERVISED: annotator.inventories[SUPERVISED]})

    @torch.no_grad()
    def measure(model: AsrModel, cuts: CutSet) -> dict[str, float]:
        every = list(cuts)
        chosen = {cut.id: cut for cut in every[:: -(-len(every) // settings.dev_max_cuts)]}
        name = model.spec.variant
        context = parse_context(model.spec.variants[name].contexts[0])
        layer = top_or(model.spec.heads[SUPERVISED].layer, model)
        place = next(model.parameters()).device
        right, total = 0, 0
        for batch in evaluation_batches(list(chosen.values()), settings.data.max_duration):
            lens = batch.feature_lens.tolist()
            heard = [[Heard(chosen[cut_id], length)] for cut_id, length in zip(batch.cut_ids, lens, strict=True)]
            segments = labeled(heard)[SUPERVISED].to(place)
            moved = batch.to(place)
            with tapped(model, [layer]) as taps:
                told = model.language_ids(moved.languages)
                model.encode(moved.features, moved.feature_lens, name, context, languages=told)
            found = frame_accuracy(
                model.heads[SUPERVISED](taps[layer]), frame_labels(segments), counted_frames(segments, settings.silence)
            )
            right, total = right + found[0], total + found[1]
        return {"frame_accuracy": right / max(1, total)}

    return measure


def check_alignments(
    table: CutTable, inventories: Mapping[str, Inventory], tokenizers: Mapping[str, Tokenizer], unaligned: str
) -> dict[Unit, list[str]]:
    """Refuse training cuts whose alignment is missing, or of other units than the language models'.

    Returns the ids of the cuts without an alignment, by unit, where these are allowed.

    Args:
        tokenizers: of the language models of bpe, by name: the pieces of an alignment must be those it parts the text into.

    Raises:
        UserError: which cuts, which units.
    """
    bare: dict[Unit, dict[str, None]] = {}
    strange: dict[str, dict[str, None]] = {}
    otherwise: dict[str, list[str]] = {}
    for index in range(len(table)):
        cut = table[index]
        for name, inventory in inventories.items():
            symbols = symbols_of(cut, inventory.unit)
            if symbols is None:
                bare.setdefault(inventory.unit, {})[cut.id] = None
            else:
                strange.setdefault(name, {}).update((s, None) for s in symbols if s not in inventory)
                if name in tokenizers and symbols != tokenizers[name].pieces(text_of(cut)):
                    otherwise.setdefault(name, []).append(cut.id)
    without = {unit: list(cut_ids) for unit, cut_ids in bare.items()}
    findings = []
    if unaligned == "refuse":
        findings += [
            f"{_listed(cut_ids)} have no {unit} alignment; run asrkit align --unit {unit}, "
            "or let them train the recognizer alone with --set unaligned=allow"
            for unit, cut_ids in without.items()
        ]
    else:
        aligned = {inventories[name].unit for name in strange}
        findings += [
            f"no cut has a {unit} alignment for a head to learn from; run asrkit align --unit {unit}"
            for unit in without
            if unit not in aligned
        ]
    for name, missing in strange.items():
        # What the supervised head cannot know, the language model of its unit does not know either.
        if missing and name != SUPERVISED:
            findings.append(
                f"--lm {name}: does not know {len(missing)} of the alignments' {inventories[name].unit} units, such as "
                f"{' '.join(list(missing)[:SHOWN])}; it must have been trained on the units that align wrote"
            )
    for name, cut_ids in otherwise.items():
        findings.append(
            f"--lm {name}: its tokenizer parts {len(cut_ids)} texts otherwise than their bpe alignments, cuts "
            f"{', '.join(cut_ids[:SHOWN])}; train it with the tokenizer they were aligned with (train-lm --tokenizer)"
        )
    if findings:
        raise UserError.of(findings)
    return without


def _listed(cut_ids: Sequence[str]) -> str:
    return f"{len(cut_ids)} cuts ({', '.join(cut_ids[:SHOWN])}{', ...' if cut_ids[SHOWN:] else ''})"


def _load_teacher(path: Path) -> LmTeacher:
    run = open_run(path)
    model = load_lm(run).requires_grad_(False)
    tokenizer = Tokenizer(run.tokenizer_path)
    return LmTeacher(model, tokenizer, Inventory.of(tokenizer, model.spec.unit))


def _check(
    settings: DistillLmConfig, teachers: Mapping[str, LmTeacher], lms: Mapping[str, Path], origin: AsrModel
) -> Unit | None:
    """Refuse settings and language models that do not go together; returns the supervised head's unit."""
    findings = []
    if not teachers:
        findings.append("give a language model to learn from: --lm phone=exp/lm-phone")
    for name, teacher in teachers.items():
        unit = teacher.inventory.unit
        if name in UNITS and name != unit:
            findings.append(f"--lm {name}={lms[name]}: is a language model of {unit} units, not of {name}")
        if name == SUPERVISED:
            findings.append(f"--lm {name}: is the name of the head on the labels; choose another")
    for name, head in settings.heads.items():
        if name not in teachers and name != SUPERVISED:
            findings.append(f"heads.{name}: there is no --lm of that name; there are {', '.join(teachers)}")
        if head.layer is not None and head.layer >= len(origin.encoder.blocks):
            findings.append(
                f"heads.{name}.layer={head.layer}: the encoder has layers 0 to {len(origin.encoder.blocks) - 1}"
            )
    if settings.contexts.sampling == "joint":
        findings.append("language models teach one context a batch; use contexts.sampling=random")
    if (join := settings.data.augment.join) > 0:
        findings.append(f"data.augment.join={join}: a language model would read two sentences as one; set it to 0")
    unit_of_labels = settings.supervised
    if settings.mode == "lst" and teachers:
        if len(teachers) > 1:
            findings.append("--mode lst mixes one language model into the labels; give one --lm, or --mode mtl")
        (first, *_) = teachers.values()
        if unit_of_labels not in (None, first.inventory.unit):
            findings.append(
                f"--mode lst: labels of {unit_of_labels} units cannot be mixed with posteriors over {first.inventory.unit} units; "
                "leave --supervised out, or use --mode mtl"
            )
        unit_of_labels = first.inventory.unit
    if SUPERVISED in settings.heads and unit_of_labels is None:
        findings.append(f"heads.{SUPERVISED}: there is no such head; say its unit with --supervised")
    if findings:
        raise UserError.of(findings)
    return unit_of_labels


def _supervised_inventory(
    unit: Unit | None, teachers: Mapping[str, LmTeacher], table: CutTable
) -> dict[str, Inventory]:
    """What the supervised head tells apart: a language model's units where it is of the same unit, else those of the alignments."""
    if unit is None:
        return {}
    for teacher in teachers.values():
        if teacher.inventory.unit == unit:
            return {SUPERVISED: teacher.inventory}
    symbols = {symbol for index in range(len(table)) for symbol in symbols_of(table[index], unit) or ()}
    return {SUPERVISED: Inventory(sorted(symbols), unit)}


def _check_dev(dev: Path, unit: Unit) -> None:
    """Refuse dev cuts that no frame accuracy can be measured on."""
    bare = [cut.id for cut in open_cuts(dev) if symbols_of(cut, unit) is None]
    if bare:
        raise UserError(
            f"{dev}: {len(bare)} cuts have no {unit} alignment to measure the supervised head on: "
            f"{', '.join(bare[:SHOWN])}; run asrkit align --unit {unit} on it too"
        )
