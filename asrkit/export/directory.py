"""An exported directory on disk: what ``export`` writes, and the runtime, the evaluator and the client read.

encoder.onnx, decoder.onnx, joiner.onnx   the transducer
ctc.onnx                                  the same encoder with the CTC head
tokens.txt, tokenizer.model               ids to pieces for the client, text to ids for asrkit
export.yaml                               what it is and where it is from, with sizes and digests of the files above
README.md                                 the commands that run it
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from asrkit.config import config, from_dict
from asrkit.errors import UserError
from asrkit.models.spec import ContextText
from asrkit.nn.context import Context, parse_context
from asrkit.run_dir import EXPORT, read_yaml, sha256_of

README = "README.md"


@config
class FileRecord:
    """A file of the directory; ``parameters`` counts the numbers in an ONNX file's tensors."""

    bytes: int
    sha256: str
    parameters: int | None = None


@config
class DifferenceRecord:
    """How far an output of onnxruntime lies from torch's: absolute, beside torch's largest magnitude."""

    max: float
    mean: float
    magnitude: float


@config
class ParityRecord:
    """What the check before publishing found."""

    tolerance: float
    heard: list[str]
    outputs: dict[str, DifferenceRecord]
    tokens: dict[str, int]


@config
class RunRecord:
    """The run directory that was exported."""

    path: str
    weights_sha256: str
    lineage: list[dict[str, Any]]


@config
class Exported:
    """export.yaml.

    context: full, or the chunk and left context every streaming file is fixed to. state_size: numbers in a stream's
    state, 0 where there is none.
    """

    format: Literal["onnx"] = "onnx"
    configuration: str
    submodels: list[str]
    context: ContextText
    vocab_size: int
    context_size: int
    joiner_dim: int
    state_size: int
    sample_rate: int
    opset: int
    files: dict[str, FileRecord]
    parity: ParityRecord
    run: RunRecord
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def parsed_context(self) -> Context:
        return parse_context(self.context)


def is_exported(path: Path) -> bool:
    """Whether a directory was written by ``export``; anything else may be a run directory."""
    return (path / EXPORT).is_file()


def open_exported(path: Path) -> Exported:
    """Read an exported directory and check its files against export.yaml.

    Raises:
        UserError: files are missing or differ from what was exported; all findings at once.
    """
    content = read_yaml(path / EXPORT)
    if not isinstance(content, dict):
        raise UserError(f"{path / EXPORT}: holds no export; the file is damaged, export again")
    exported = from_dict(Exported, content, str(path / EXPORT))
    findings = []
    for name, record in exported.files.items():
        if not (path / name).is_file():
            findings.append(f"{path / name}: is missing; restore it or export again")
        elif (found := sha256_of(path / name)) != record.sha256:
            findings.append(
                f"{path / name}: digest {found[:12]} differs from {record.sha256[:12]} in {EXPORT}; "
                "the file is truncated, edited or of another export: restore it or export again"
            )
    if findings:
        raise UserError.of(findings)
    return exported
