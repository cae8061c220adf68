"""A run directory on disk: what a stage writes and the next stage, the evaluator and the exporter read.

config.yaml        the stage's resolved configuration
model.yaml         format number, kind (see ``models.registry``) and the model's spec
model.safetensors  the weights to use; an n-gram model has lm.arpa instead
tokenizer.model    sentencepiece model; tokens.txt beside it; kinds without text have none
lineage.yaml       every stage from the first, with digests
metrics.jsonl      one line a logged step
state/             what resuming needs
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from asrkit.disk import atomic_write, sha256_of
from asrkit.errors import UserError, clip
from asrkit.migration import FORMAT, Migrated, migrate
from asrkit.yaml_core import dump_safe, load_safe

if TYPE_CHECKING:
    from torch import Tensor

CONFIG, MODEL, WEIGHTS = "config.yaml", "model.yaml", "model.safetensors"
TOKENIZER, TOKENS, LINEAGE = "tokenizer.model", "tokens.txt", "lineage.yaml"
EXPORT = "export.yaml"  # not of a run directory: what marks an exported model
METRICS, STATE = "metrics.jsonl", "state"
ARPA = "lm.arpa"  # of an n-gram model, which has no weights
DONE = "done"  # is there once the stage has finished
# The files whose digests the last entry of the lineage holds; a run without a tokenizer has none of it.
DIGESTS = {
    "weights_sha256": WEIGHTS,
    "arpa_sha256": ARPA,
    "model_spec_sha256": MODEL,
    "tokenizer_sha256": TOKENIZER,
    "tokens_sha256": TOKENS,
    "config_file_sha256": CONFIG,
}
LATER_DIGESTS = ("tokens_sha256", "config_file_sha256")  # what earlier versions wrote has none of these


MAX_FINDINGS = 5  # of a lineage: more say nothing new


class _Entry(BaseModel):
    """What readers rely on in a stage's entry of the lineage; a stage may add more."""

    model_config = ConfigDict(strict=True, extra="allow")
    stage: str
    command: str = ""
    created: str = ""
    step: int | None = None
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    metrics: dict[str, float | None] | None = None
    manifests: dict[str, str | None] | None = None
    versions: dict[str, str] = {}
    losses: list[str] = []
    trained_submodels: list[str] = []
    idle_submodels: list[str] = []


_LINEAGE: TypeAdapter[list[_Entry]] = TypeAdapter(Annotated[list[_Entry], Field(min_length=1)])


def check_lineage(content: Any, where: Path) -> list[dict[str, Any]]:
    """A lineage as it was read from ``where``, if it is one.

    Raises:
        UserError: a line for each value of another type.
    """
    try:
        _LINEAGE.validate_python(content)
    except ValidationError as error:
        findings = [
            f"{where}: {'.'.join(map(clip, item['loc'])) or 'the lineage'}: {item['msg']} (got {clip(repr(item['input']), 60)})"
            for item in error.errors(include_url=False)[:MAX_FINDINGS]
        ]
        raise UserError(
            *findings, f"{where}: holds no stages; the file is damaged, train again or restore a copy"
        ) from None
    checked: list[dict[str, Any]] = content
    return checked


def read_config(path: Path) -> dict[str, Any]:
    """config.yaml of a run directory.

    Raises:
        UserError: it holds no settings of a stage.
    """
    content = read_yaml(path / CONFIG)
    if not isinstance(content, dict) or not isinstance(content.get("stage"), str):
        raise UserError(
            f"{path / CONFIG}: holds no settings of a stage; the file is damaged, train again or restore a copy"
        )
    return content


def read_yaml(path: Path) -> Any:
    """Parse a YAML file; a syntax error names the file and the line."""
    try:
        return load_safe(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(error).split())}); fix it or make it again") from error


def write_yaml(path: Path, content: Any) -> None:
    """Write ``content`` as YAML, atomically, keys in the order given."""
    with atomic_write(path) as temporary:
        temporary.write_text(dump_safe(content), encoding="utf-8")


@dataclass(frozen=True)
class RunDir:
    """What a finished (or so far best) stage left, whatever version wrote it, in today's words: plain data;
    ``models.load_model`` makes a module of it.

    ``kind``: one of ``models.registry.KINDS``. ``model_spec``: the spec of that kind. ``stored_names``: today's name of each
    tensor in model.safetensors, by its name in the file.
    """

    path: Path
    kind: str
    model_spec: dict[str, Any]
    config: dict[str, Any]
    lineage: list[dict[str, Any]]
    stored_names: dict[str, str] = field(repr=False)

    @property
    def unfinished(self) -> list[str]:
        """A warning where the training was stopped before its last step; [] otherwise."""
        training = self.config.get("training")
        steps = training.get("steps") if isinstance(training, dict) else None
        step = self.lineage[-1].get("step")
        if (self.path / DONE).is_file() or not isinstance(steps, int) or not isinstance(step, int) or step >= steps:
            return []
        return [
            f"{self.path}: its training was stopped at step {step} of {steps}; run the same command again to finish it"
        ]

    @property
    def tokenizer_path(self) -> Path:
        return self.path / TOKENIZER

    @property
    def weights_path(self) -> Path:
        """The file whose digest says which model this is."""
        arpa = self.path / ARPA
        return arpa if arpa.is_file() else self.path / WEIGHTS

    def weights(self) -> dict[str, Tensor]:
        """All tensors of ``model.safetensors``, by parameter name, on the CPU."""
        from safetensors.torch import load_file

        return {self.stored_names[name]: tensor for name, tensor in load_file(self.path / WEIGHTS).items()}

    def tensor_sizes(self) -> dict[str, tuple[int, int]]:
        """By parameter name, how many numbers each tensor has and how many bytes they take, from the file's header alone."""
        return {
            name: (math.prod(shape), math.prod(shape) * _bytes_of(dtype))
            for name, (shape, dtype) in self._header().items()
        }

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """By parameter name, the shape of each tensor, from the file's header alone."""
        return {name: shape for name, (shape, _) in self._header().items()}

    def kept_weights(self) -> dict[str, int]:
        """By path, how many weights the mask of each masked layer leaves."""
        from safetensors import safe_open

        with safe_open(self.path / WEIGHTS, framework="numpy") as file:
            return {
                name.removesuffix(".mask"): int(file.get_tensor(stored).sum())
                for stored, name in self.stored_names.items()
                if name.endswith(".mask")
            }

    def _header(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """By parameter name, the shape of each tensor and safetensors' name of its type."""
        if not self.stored_names:  # n-grams
            return {}
        from safetensors import safe_open

        with safe_open(self.path / WEIGHTS, framework="numpy") as file:
            slices = {name: file.get_slice(stored) for stored, name in self.stored_names.items()}
            return {name: (tuple(tensor.get_shape()), tensor.get_dtype()) for name, tensor in slices.items()}


def _bytes_of(dtype: str) -> int:
    """4 of ``F32``, 1 of ``I8``, 2 of ``BF16``: the digits are bits."""
    return max(1, int("".join(filter(str.isdigit, dtype)) or 8) // 8)


def accepted_digests(entry: dict[str, Any], key: str = "weights_sha256") -> tuple[str | None, ...]:
    """The digests a file of the run may have: a run that dies while it replaces its weights leaves the ones before,
    which are as good."""
    return entry.get(key), entry.get(f"previous_{key}")


def digests_of(path: Path) -> dict[str, str]:
    """The digests of a run directory's files for the last entry of its lineage."""
    return {key: sha256_of(path / name) for key, name in DIGESTS.items() if (path / name).is_file()}


def stored_model(path: Path) -> dict[str, Any]:
    """model.yaml of a run directory as it is on disk.

    Raises:
        UserError: it is damaged, or of a format that this version does not know.
    """
    content = read_yaml(path / MODEL)
    if not isinstance(content, dict):
        raise UserError(f"{path / MODEL}: holds no model; the file is damaged, train again or restore a copy")
    number = content.get("format", 0)
    if not isinstance(number, int) or not 0 <= number <= FORMAT:
        raise UserError(
            f"{path}: is a run directory of format {number}, and this version of asrkit reads formats up to {FORMAT}; "
            "use the version that wrote it, or a newer one"
        )
    return content


def read_model(path: Path, lineage: list[dict[str, Any]] | None = None) -> Migrated:
    """model.yaml of a run directory, and its lineage if given, in the present format.

    Raises:
        UserError: model.yaml is damaged, or of a format that this version does not know.
    """
    content = stored_model(path)
    try:
        migrated = migrate(content, lineage or [])
        if not isinstance(migrated.model["kind"], str) or not isinstance(migrated.model["spec"], dict):
            raise TypeError("kind is no name, or spec holds no keys")
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path / MODEL}: is no model of format {content.get('format', 0)} ({error}); train again or restore a copy"
        ) from error
    return migrated


def open_run(path: Path) -> RunDir:
    """Read a run directory and check it against the digests of its own lineage; one of an earlier format is migrated in memory.

    Raises:
        UserError: files are missing, unreadable, or differ from what the stage wrote, all findings at once; or the directory
            is of a newer format.
    """
    path = Path(path)
    if not path.is_dir():
        others = (
            "; external recognizers work with evaluate, label and distill --teacher only" if ":" in str(path) else ""
        )
        raise UserError(f"{path}: no such run directory; give the --out of a training stage{others}")
    weights = [] if (path / ARPA).is_file() else [WEIGHTS]
    missing = [name for name in (CONFIG, MODEL, *weights, LINEAGE) if not (path / name).is_file()]
    if missing and (path / EXPORT).is_file():
        raise UserError(f"{path}: is an exported model, not a run directory; pass the run it was exported from")
    if missing:
        raise UserError(
            f"{path}: not a complete run directory, missing {', '.join(missing)}; run the training stage to its first checkpoint"
        )
    lineage = check_lineage(read_yaml(path / LINEAGE), path / LINEAGE)
    while findings := _digest_findings(path, lineage[-1]):
        again = check_lineage(read_yaml(path / LINEAGE), path / LINEAGE)
        if again == lineage:
            raise UserError.of(findings)
        lineage = again  # a training has replaced its weights meanwhile
    migrated = read_model(path, lineage)
    return RunDir(
        path,
        migrated.model["kind"],
        migrated.model["spec"],
        read_config(path),
        migrated.lineage,
        {name: migrated.rename(name) for name in (_tensor_names(path / WEIGHTS) if weights else ())},
    )


def _digest_findings(path: Path, entry: dict[str, Any]) -> list[str]:
    """Which files that the lineage has a digest of are missing or differ; weights, n-grams and model.yaml always have one."""
    findings = []
    for key, name in DIGESTS.items():
        expected = entry.get(key)
        if not (path / name).is_file():
            if expected is not None:
                findings.append(f"{path / name}: is missing; restore it or train again")
            continue
        if expected is None and key in LATER_DIGESTS:
            continue
        digest = sha256_of(path / name)
        if digest not in accepted_digests(entry, key):
            findings.append(
                f"{path / name}: digest {digest[:12]} differs from {str(expected)[:12]} in {LINEAGE}; "
                "the file is truncated, edited or of another run: restore it or train again"
            )
    return findings


def _tensor_names(path: Path) -> list[str]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise UserError(f"{path}: not a safetensors file ({error}); restore it") from error
