"""submodel: look at the sub-models of a run, take them out, put them in, and name combinations of them. Nothing learns."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from asrkit.config import digest, from_dict, to_dict
from asrkit.errors import UserError
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.asr import spec_of
from asrkit.models.digests import ENCODER, SUBMODELS, backbone_digest, tensors_digest
from asrkit.models.spec import BACKBONE, NAME, SubModelSpec, VariantSpec
from asrkit.nn.context import parse_context
from asrkit.run_dir import WEIGHTS, RunDir, atomic_write, occupied, open_run
from asrkit.training.run_writer import write_untrained_run

# What the header of an extracted sub-model says it is; another layout will be another number.
KIND = "asrkit sub-model 1"


@dataclass(frozen=True)
class Derived:
    """What a command wrote, what it changed, and what may not be as expected."""

    out: Path
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Extracted:
    """A sub-model on its own. ``variants`` are those it was alone in; ``decoder_sha256`` is of all that is not encoder.

    ``tensors`` are named from the sub-model on: ``layers.0.query.weight``.
    """

    name: str
    spec: SubModelSpec
    variants: dict[str, VariantSpec]
    backbone_sha256: str
    decoder_sha256: str
    lineage: list[dict[str, Any]]
    tensors: dict[str, Tensor]


def describe_submodels(path: Path) -> dict[str, Any]:
    """The sub-models and variants of a run, as plain data.

    Raises:
        UserError: the directory is incomplete or damaged.
    """
    run = open_run(path)
    spec = spec_of(run)
    with safe_open(run.path / WEIGHTS, framework="pt") as file:
        sizes = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (no iteration)
    submodels = [
        {
            "name": name,
            **to_dict(part),
            "parameters": sum(size for key, size in sizes.items() if key.startswith(_prefix(name))),
            "variants": [key for key, used in spec.variants.items() if name in used.submodels],
        }
        for name, part in spec.submodels.items()
    ]
    variants = {name: to_dict(part) for name, part in spec.variants.items()}
    return {
        "path": str(path),
        "submodels": submodels,
        "variants": variants,
        "variant": spec.variant,
    }


def remove_submodel(parent: Path, name: str, out: Path, *, command: str = "") -> Derived:
    """``parent`` without the sub-model and without the variants that used it, written to ``out``.

    Raises:
        UserError: no such run or sub-model, or ``out`` is taken.
    """
    run = open_run(parent)
    model = load_model(run)
    spec = model.spec
    _refuse([*occupied(out), *_unknown("--name", [name], spec, parent)])
    gone = [key for key, used in spec.variants.items() if name in used.submodels]
    content = to_dict(spec)
    del content["submodels"][name]
    content["compression"] = {
        path: how for path, how in content["compression"].items() if not path.startswith(_prefix(name))
    }
    for key in gone:
        del content["variants"][key]
    notes = [f"removed sub-model {name}" + (f" and what used it: {', '.join(gone)}" if gone else "")]
    if spec.variant in gone:
        content["variants"].setdefault(BACKBONE, to_dict(VariantSpec()))
        content["variant"] = BACKBONE
        notes.append(f"the default variant was {spec.variant} and is now {BACKBONE}")
    used = {part for variant in content["variants"].values() for part in variant["submodels"]}
    for idle in [part for part in content["submodels"] if part not in used]:
        notes.append(_idle(idle, out))
    smaller = _rebuild(content, {key: t for key, t in model.state_dict().items() if not key.startswith(_prefix(name))})
    write_untrained_run(out, run, "submodel remove", {"name": name}, smaller, extra={"submodel": name}, command=command)
    return Derived(out, notes)


def extract_submodel(parent: Path, name: str, out: Path) -> Derived:
    """One sub-model of ``parent`` as one file, with all that ``attach_submodel`` needs to put it back.

    Raises:
        UserError: no such run or sub-model, or ``out`` is there already.
    """
    run = open_run(parent)
    model = load_model(run)
    spec, tensors = model.spec, model.state_dict()
    taken = [f"{out}: exists already; choose another --out"] if out.exists() else []
    _refuse([*taken, *_unknown("--name", [name], spec, parent), *_compressed(spec, parent), *_left_behind(name, run)])
    mine = {key.removeprefix(_prefix(name)): t for key, t in tensors.items() if key.startswith(_prefix(name))}
    alone = {key: to_dict(used) for key, used in spec.variants.items() if used.submodels == [name]}
    content = {
        "name": name,
        "spec": to_dict(spec.submodels[name]),
        "variants": alone,
        "backbone_sha256": backbone_digest(tensors),
        "decoder_sha256": _decoder_digest(tensors),
        "tensors_sha256": tensors_digest(mine.items()),
        "lineage": run.lineage,
    }
    header = {"kind": KIND, "content": json.dumps(content), "sha256": digest(content)}
    with atomic_write(out) as temporary:
        try:
            save_file({key: tensor.contiguous() for key, tensor in mine.items()}, temporary, header)
        except SafetensorError as error:  # it wraps the operating system's error in its own
            raise OSError(None, str(error)) from error
    size = sum(tensor.numel() for tensor in mine.values())
    notes = [f"sub-model {name}: {size:,} parameters, variants {', '.join(alone) or 'none'}"]
    if not alone:
        notes.append(f"{name} is in no variant by itself; once attached, `asrkit submodel combine` names one")
    return Derived(out, notes)


def _left_behind(name: str, run: RunDir) -> list[str]:
    """That the backbone was trained on without the sub-model since the two were last trained together."""
    stage = None
    for entry in run.lineage:
        if name in entry.get("idle_submodels", []):
            stage = entry["stage"]
        elif name in entry.get("trained_submodels", []):
            stage = None
    if stage is None:
        return []
    return [f"--name {name}: {stage} trained the backbone of {run.path} on without it; extract it from the run before"]


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
    part = read_submodel(file)
    new = part.name if name is None else name
    variants = {
        key if new == part.name else new if key == part.name else f"{new}-{key}": to_dict(used) | {"submodels": [new]}
        for key, used in part.variants.items()
    }
    findings = [*occupied(out), *_compressed(spec, parent)]
    if part.backbone_sha256 != (mine := backbone_digest(tensors)):
        findings.append(
            f"{file}: sub-model {part.name} was trained on backbone {part.backbone_sha256[:12]}, but {parent} has "
            f"backbone {mine[:12]}; attach it to a run with its own backbone, or train one with `asrkit add-submodel`"
        )
    if not NAME.fullmatch(new):
        findings.append(f"--name {new}: a name is letters, digits, - and _, a letter first")
    for key in dict.fromkeys((new, *variants)):
        if key in spec.submodels or key in spec.variants:
            kind = "sub-model" if key in spec.submodels else "variant"
            findings.append(f"{parent}: has a {kind} {key} already; call the new sub-model otherwise with --name")
    _refuse(findings)
    content = to_dict(spec)
    content["submodels"][new] = to_dict(part.spec)
    content["variants"] |= variants
    larger = _rebuild(content, tensors | {_prefix(new) + key: tensor for key, tensor in part.tensors.items()})
    write_untrained_run(
        out,
        run,
        "submodel attach",
        {"name": new},
        larger,
        inputs={"file": file},
        extra={"submodel": new, "backbone_sha256": mine, "submodel_lineage": part.lineage},
        command=command,
    )
    notes = [f"attached sub-model {new}, variants {', '.join(variants) or 'none'}"]
    notes.append(f"the default variant is still {spec.variant}" if variants else _idle(new, out))
    warnings = []
    if part.decoder_sha256 != _decoder_digest(tensors):
        warnings.append(
            f"{file}: sub-model {part.name} was trained with other weights of predictor, joiner or CTC head than "
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
    for repeated in sorted({part for part in submodels if submodels.count(part) > 1}):
        findings.append(f"--submodel {repeated}: is named {submodels.count(repeated)} times; name it once")
    wanted = []
    for text in contexts:
        try:
            wanted.append(str(parse_context(text)))
        except ValueError as error:
            findings.append(f"--context: {error}")
    _refuse(findings)
    trained = {part: _trained_contexts(spec, part) for part in submodels}
    if not wanted:
        first, *others = trained.values()
        wanted = [text for text in first if all(text in other for other in others)]
    if not wanted:
        each = "; ".join(f"{part} in {', '.join(texts) or 'none'}" for part, texts in trained.items())
        raise UserError(f"{parent}: no context that all were trained in ({each}); name one with --context")
    warnings = [
        f"{parent}: sub-model {part} was never trained in context {text}, but in {', '.join(texts) or 'none'}; "
        "expect more errors"
        for part, texts in trained.items()
        for text in wanted
        if text not in texts
    ]
    content = to_dict(spec)
    content["variants"][variant] = {"submodels": list(submodels), "contexts": wanted}
    settings = {"variant": variant, "submodels": list(submodels), "contexts": wanted}
    write_untrained_run(out, run, "submodel combine", settings, _rebuild(content, model.state_dict()), command=command)
    notes = [
        f"variant {variant}: {', '.join(submodels)}; contexts {'; '.join(wanted)}",
        f"the default variant is still {spec.variant}",
    ]
    return Derived(out, notes, warnings)


def read_submodel(file: Path) -> Extracted:
    """Read what ``extract_submodel`` wrote.

    Raises:
        UserError: there is no such file, it is something else, or it is damaged.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; --file takes what `asrkit submodel extract` writes")
    try:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 (no iteration)
        if header.get("kind") != KIND:
            raise UserError(
                f"{file}: is no sub-model ({header.get('kind', 'of unknown kind')}, not {KIND}); "
                "--file takes what `asrkit submodel extract` writes"
            )
        content = json.loads(header["content"])
        if digest(content) != header["sha256"] or tensors_digest(tensors.items()) != content["tensors_sha256"]:
            raise ValueError("its digests differ from its content")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{file}: is damaged or no sub-model ({reason}); extract it again") from error
    return Extracted(
        content["name"],
        from_dict(SubModelSpec, content["spec"], str(file)),
        {key: from_dict(VariantSpec, used, str(file)) for key, used in content["variants"].items()},
        content["backbone_sha256"],
        content["decoder_sha256"],
        content["lineage"],
        tensors,
    )


def _prefix(name: str) -> str:
    """What the weights of a sub-model begin with."""
    return f"{SUBMODELS}{name}."


def _decoder_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of everything outside the encoder: what the sub-model's frames are read with."""
    return tensors_digest((name, tensor) for name, tensor in tensors.items() if not name.startswith(ENCODER))


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
    return [
        f"{option} {name}: {parent} has no such sub-model; it has {there}"
        for name in names
        if name not in spec.submodels
    ]


def _refuse(findings: Sequence[str]) -> None:
    if findings:
        raise UserError.of(findings)


def _idle(name: str, out: Path) -> str:
    return f"sub-model {name} is in no variant; name one with `asrkit submodel combine --from {out}`"


def _trained_contexts(spec: ModelSpec, name: str) -> list[str]:
    """The contexts of every variant a sub-model is in, each once, in order."""
    every = [text for used in spec.variants.values() if name in used.submodels for text in used.contexts]
    return list(dict.fromkeys(every))


def _rebuild(content: dict[str, Any], tensors: Mapping[str, Tensor]) -> AsrModel:
    """The model of a changed spec with exactly these weights."""
    model = AsrModel(from_dict(ModelSpec, content, "model"))
    model.load_state_dict(dict(tensors), strict=True)
    return model.eval()
