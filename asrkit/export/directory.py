"""An exported directory on disk: what ``export`` writes, and the runtime, the evaluator and the client read.

encoder.onnx, decoder.onnx, joiner.onnx   the transducer (.pt as TorchScript)
ctc.onnx                                  the same encoder with the CTC head
tokens.txt, tokenizer.model               ids to pieces for the client, text to ids for asrkit
export.yaml                               what it is and where it is from, with sizes and digests of the files above
report.json                               what was measured of it, where that was asked for
README.md                                 the commands that run it, in the form of a model card
.gitattributes                            keeps large files apart where the directory is pushed to a model hub
"""

from __future__ import annotations

import tarfile
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from asrkit.config import config, from_dict
from asrkit.errors import UserError
from asrkit.models.spec import ContextText
from asrkit.nn.context import Context, parse_context
from asrkit.run_dir import EXPORT, read_yaml, sha256_of

README, REPORT = "README.md", "report.json"
Format = Literal["onnx", "torchscript"]
SUFFIXES: dict[Format, str] = {"onnx": ".onnx", "torchscript": ".pt"}


@config
class FileRecord:
    """A file of the directory; ``tensors`` has the bytes of an ONNX file's tensors, by part of the model."""

    bytes: int
    sha256: str
    tensors: dict[str, int] | None = None


@config
class PartRecord:
    """Bytes of a part of the model: as stored, by the account of ``asrkit info``, and as float32."""

    stored: int
    counted: int
    float32: int


@config
class DifferenceRecord:
    """How far an output of the exported file lies from torch's: absolute, beside torch's largest magnitude.

    ``tolerance`` is for ``measure``, in units of the magnitude.
    """

    max: float
    mean: float
    magnitude: float
    measure: Literal["max", "mean"] = "max"
    tolerance: float = 0.0


@config
class TokenRecord:
    """Tokens a search found in torch, and how many of them it found otherwise in the exported files."""

    tokens: int
    differing: int


@config
class ParityRecord:
    """What the check before publishing found."""

    heard: list[str]
    outputs: dict[str, DifferenceRecord]
    tokens: dict[str, TokenRecord]


@config
class RunRecord:
    """The run directory that was exported."""

    path: str
    weights_sha256: str
    lineage: list[dict[str, Any]]


@config
class Exported:
    """export.yaml.

    context: full, or the chunk and left context every streaming file is fixed to. language: the one the files hear, of a model
    with languages. state_size: numbers in a stream's state, 0 where there is none. quantize: what made integers of float
    weights at export, without training. parts: of an ONNX export, the transducer's three files and the CTC head. client: the
    oldest sherpa-onnx that runs the files, where older ones run others.
    """

    format: Format = "onnx"
    variant: str
    submodels: list[str]
    context: ContextText
    language: str | None = None
    vocab_size: int
    context_size: int
    joiner_dim: int
    state_size: int
    sample_rate: int
    opset: int | None
    compression: str
    quantize: str | None = None
    dequantized: bool = False
    files: dict[str, FileRecord]
    parts: dict[str, PartRecord]
    parity: ParityRecord
    client: str | None = None
    run: RunRecord
    license: str | None = None
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


def pack_directory(path: Path, pack: Path, name: str) -> None:
    """Put an exported directory into an uncompressed tar file, under ``name``; the same files give the same bytes."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() else 0o644
        return entry

    with tarfile.open(pack, "w") as archive:
        archive.add(path, name, recursive=False, filter=plain)
        for file in sorted(path.iterdir()):
            archive.add(file, f"{name}/{file.name}", filter=plain)
