"""submodel: take the sub-models of a run out, put them in, and name combinations of them. Nothing learns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from asrkit.disk import occupied
from asrkit.errors import UserError
from asrkit.models import ModelSpec, load_model
from asrkit.models.digests import backbone_digest
from asrkit.models.spec import BACKBONE, NAME, VariantSpec
from asrkit.models.submodel_file import decoder_digest, left_behind, prefix, read_submodel, take_out, write_submodel
from asrkit.models.surgery import rebuild
from asrkit.nn.context import parse_context
from asrkit.run_dir import open_run
from asrkit.training.run_writer import write_untrained_run


@dataclass(frozen=True)
class Derived:
    """What a command wrote, what it changed, and what may not be as expected."""

    out: Path
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def remove_submodel(parent: Path, name: str, out: Path, *, command: str = "") -> Derived:
    """``parent`` without the sub-model and without the variants that used it, written to ``out``.

    Raises:
        UserError: no such run or sub-model, or ``out`` is taken.
    """
    run = open_run(parent)
    model = load_model(run)
    spec = model.spec
    _refuse([*occupied(out), *_unknown("--name", [name], spec, parent)])
    gone = [key for key, variant in spec.variants.items() if name in variant.submodels]
    variants = {key: variant for key, variant in spec.variants.items() if key not in gone}
    notes = [f"removed sub-model {name}" + (f" and what used it: {', '.join(gone)}" if gone else "")]
    default = spec.variant
    if default in gone:
        variants.setdefault(BACKBONE, VariantSpec())
        default = BACKBONE
        notes.append(f"the default variant was {spec.variant} and is now {BACKBONE}")
    submodels = {key: submodel for key, submodel in spec.submodels.items() if key != name}
    used = {submodel for variant in variants.values() for submodel in variant.submodels}
    notes += [_idle(submodel, out) for submodel in submodels if submodel not in used]
    compression = {path: how for path, how in spec.compression.items() if not path.startswith(prefix(name))}
    smaller = rebuild(
        replace(spec, submodels=submodels, variants=variants, variant=default, compression=compression),
        model,
        drop=(prefix(name),),
    )
    write_untrained_run(out, run, "submodel remove", {"name": name}, smaller, extra={"submodel": name}, command=command)
    return Derived(out, notes)


def extract_submodel(parent: Path, name: str, out: Path) -> Derived:
    """One sub-model of ``parent`` as one file, with all that ``attach_submodel`` needs to put it back.

    Raises:
        UserError: no such run or sub-model, or ``out`` is there already.
    """
    run = open_run(parent)
    model = load_model(run)
    spec = model.spec
    taken = [f"{out}: exists already; choose another --out"] if out.exists() else []
    if (stage := left_behind(name, run.lineage)) is not None:
        taken.append(
            f"--name {name}: {stage} trained the backbone of {parent} on without it; extract it from the run before"
        )
    _refuse([*taken, *_unknown("--name", [name], spec, parent), *_compressed(spec, parent)])
    submodel = take_out(model, name, run.lineage)
    write_submodel(out, submodel)
    size = sum(tensor.numel() for tensor in submodel.tensors.values())
    notes = [f"sub-model {name}: {size:,} parameters, variants {', '.join(submodel.variants) or 'none'}"]
    if not submodel.variants:
        notes.append(f"{name} is in no variant by itself; once attached, `asrkit submodel combine` names one")
    return Derived(out, notes)


def attach_submodel(parent: Path, file: Path, out: Path, *, name: str | None = None, command: str = "") -> Derived:
    """``parent`` with the sub-model of ``file`` and its variants, written to ``out``; the default stays.

    Args:
        name: to call it otherwise; the variant of its old name is renamed with it, others begin with the new one.

    Raises:
        UserError: no such run, the file is none or damaged, it is of another backbone, a name is taken, or ``out`` is.
    """
    run = open_run(parent)
    model = load_model(run)
    spec, tensors = model.spec, model.state_dict()
    submodel = read_submodel(file)
    new = submodel.name if name is None else name
    variants = {_renamed(key, submodel.name, new): replace(v, submodels=[new]) for key, v in submodel.variants.items()}
    findings = [*occupied(out), *_compressed(spec, parent)]
    if submodel.backbone_sha256 != (backbone := backbone_digest(tensors)):
        findings.append(
            f"{file}: sub-model {submodel.name} was trained on backbone {submodel.backbone_sha256[:12]}, but {parent} has "
            f"backbone {backbone[:12]}; attach it to a run with its own backbone, or train one with `asrkit add-submodel`"
        )
    if not NAME.fullmatch(new):
        findings.append(f"--name {new}: a name is letters, digits, - and _, a letter first")
    for key in dict.fromkeys((new, *variants)):
        if key in spec.submodels or key in spec.variants:
            kind = "sub-model" if key in spec.submodels else "variant"
            findings.append(f"{parent}: has a {kind} {key} already; give the new sub-model another name with --name")
    _refuse(findings)
    added = {prefix(new) + key: tensor for key, tensor in submodel.tensors.items()}
    larger = replace(spec, submodels={**spec.submodels, new: submodel.spec}, variants={**spec.variants, **variants})
    write_untrained_run(
        out,
        run,
        "submodel attach",
        {"name": new},
        rebuild(larger, tensors | added),
        inputs={"file": file},
        extra={"submodel": new, "backbone_sha256": backbone, "submodel_lineage": submodel.lineage},
        command=command,
    )
    notes = [f"attached sub-model {new}, variants {', '.join(variants) or 'none'}"]
    notes.append(f"the default variant is still {spec.variant}" if variants else _idle(new, out))
    warnings = []
    if submodel.decoder_sha256 != decoder_digest(tensors):
        warnings.append(
            f"{file}: sub-model {submodel.name} was trained with other weights of predictor, joiner or CTC head than "
            f"{parent} has; evaluate the result"
        )
    return Derived(out, notes, warnings)


def combine_submodels(
    parent: Path,
    variant: str,
    submodels: Sequence[str],
    out: Path,
    *,
    contexts: Sequence[str] = (),
    command: str = "",
) -> Derived:
    """``parent`` with one more variant: several sub-models at once, added in the order given; the default stays.

    Args:
        contexts: those it is meant for, the first by default; none are those that each of the sub-models was trained in.

    Raises:
        UserError: no such run or sub-model, the name is taken or none, a context is none, or ``out`` is taken.
    """
    run = open_run(parent)
    model = load_model(run)
    spec = model.spec
    findings = [*occupied(out), *_unknown("--submodel", submodels, spec, parent)]
    if variant in spec.variants:
        findings.append(f"{parent}: has a variant {variant} already; choose another --variant")
    if not NAME.fullmatch(variant):
        findings.append(f"--variant {variant}: a name is letters, digits, - and _, a letter first")
    for repeated in sorted({name for name in submodels if submodels.count(name) > 1}):
        findings.append(f"--submodel {repeated}: is named {submodels.count(repeated)} times; name it once")
    wanted = []
    for text in contexts:
        try:
            wanted.append(str(parse_context(text)))
        except ValueError as error:
            findings.append(f"--context: {error}")
    _refuse(findings)
    trained = {name: spec.contexts_of(name) for name in submodels}
    if not wanted:
        first, *others = trained.values()
        wanted = [text for text in first if all(text in other for other in others)]
    if not wanted:
        each = "; ".join(f"{name} in {', '.join(texts) or 'none'}" for name, texts in trained.items())
        raise UserError(f"{parent}: no context that all were trained in ({each}); name one with --context")
    warnings = [
        f"{parent}: sub-model {name} was never trained in context {text}, but in {', '.join(texts) or 'none'}; "
        "expect more errors"
        for name, texts in trained.items()
        for text in wanted
        if text not in texts
    ]
    combined = replace(spec.variants[spec.variant], submodels=list(submodels), contexts=wanted)
    settings = {"variant": variant, "submodels": list(submodels), "contexts": wanted}
    more = rebuild(replace(spec, variants={**spec.variants, variant: combined}), model)
    write_untrained_run(out, run, "submodel combine", settings, more, command=command)
    notes = [
        f"variant {variant}: {', '.join(submodels)}; contexts {'; '.join(wanted)}",
        f"the default variant is still {spec.variant}",
    ]
    return Derived(out, notes, warnings)


def _renamed(variant: str, old: str, new: str) -> str:
    """What a variant is called once its sub-model is: the one of its name is renamed with it, others begin with the new name."""
    if new == old:
        return variant
    return new if variant == old else f"{new}-{variant}"


def _compressed(spec: ModelSpec, parent: Path) -> list[str]:
    """Why a sub-model cannot leave or join a model whose encoder is masked or quantized: it belongs to that very encoder,
    whose integers are not in its digest."""
    if not any(path.startswith("encoder.") for path in spec.compression):
        return []
    return [
        f"{parent}: is pruned or quantized; extract and attach sub-models before `asrkit prune`, `qat` or `quantize`"
    ]


def _unknown(option: str, names: Sequence[str], spec: ModelSpec, parent: Path) -> list[str]:
    """A finding for each name that is no sub-model."""
    there = ", ".join(spec.submodels) or "none"
    missing = [name for name in names if name not in spec.submodels]
    return [f"{option} {name}: {parent} has no such sub-model; it has {there}" for name in missing]


def _refuse(findings: Sequence[str]) -> None:
    if findings:
        raise UserError.of(findings)


def _idle(name: str, out: Path) -> str:
    return f"sub-model {name} is in no variant; name one with `asrkit submodel combine --from {out}`"
