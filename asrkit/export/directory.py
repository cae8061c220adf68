"""An exported directory on disk: what ``export`` writes, and the runtime, the evaluator and the client read.

encoder.onnx, decoder.onnx, joiner.onnx   the transducer (.pt as TorchScript)
ctc.onnx                                  the same encoder with the CTC head
tokens.txt, tokenizer.model               ids to pieces for the client, text to ids for asrkit
bpe.vocab                                 pieces and their scores, with which the client splits hotwords
lm.onnx, lodr.fst                         language models of the client's beam search, with --lm and --lodr
report.json                               what was measured of it, with --report
export.yaml                               what it is and where it is from, with the digests of the files above and its own
README.md                                 the commands that run it, in the form of a model card
.gitattributes                            keeps large files apart where the directory is pushed to a model hub

README.md and .gitattributes have no digest: nothing reads them but people and the hub, and a card is meant to be edited.
"""

from __future__ import annotations

import tarfile
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from asrkit.config import Positive, config, digest, from_dict, to_dict
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.models.spec import ContextText
from asrkit.nn.context import Context, parse_context
from asrkit.run_dir import EXPORT, TOKENIZER, TOKENS, check_lineage, read_yaml, write_yaml

ENCODER, DECODER, JOINER, CTC = "encoder", "decoder", "joiner", "ctc"
FILES = (ENCODER, DECODER, JOINER, CTC)  # without their suffix
README, ATTRIBUTES, REPORT, BPE_VOCAB = "README.md", ".gitattributes", "report.json", "bpe.vocab"
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
class LmRecord:
    """The language models of a transducer's beam search: path and digest of each, lm and lodr, and their weights.

    uses_lm: whether they count at every token (streaming) or only at the end, as the client does it. beam: hypotheses it keeps.
    """

    sources: dict[str, dict[str, str]]
    lm_scale: float
    lodr_scale: float
    beam: Positive = 4
    uses_lm: Literal["fusion", "rescore"]


@config
class Exported:
    """export.yaml.

    context: full, or the chunk and left context every streaming file is fixed to. language: the one the files recognize, of a
    model with languages. state_size: numbers in a stream's state, 0 where there is none. quantize: what rounded float weights
    to integers at export, without training. parts: of an ONNX export, the transducer's three files and the CTC head. client: the
    oldest sherpa-onnx that runs the files, where not all tested ones do. options: those of the command, but where its results
    went. sha256: of everything else in the file, as canonical JSON.
    """

    format: Format = "onnx"
    variant: str
    submodels: list[str]
    context: ContextText
    language: str | None = None
    vocab_size: Positive
    context_size: Positive
    joiner_dim: Positive
    state_size: Annotated[int, Field(ge=0)]
    sample_rate: Positive
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
    lm: LmRecord | None = None
    versions: dict[str, str] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def parsed_context(self) -> Context:
        return parse_context(self.context)


def is_exported(path: Path) -> bool:
    """Whether a directory was written by ``export``; anything else may be a run directory."""
    return (path / EXPORT).is_file()


def save_exported(path: Path, exported: Exported) -> None:
    """Write export.yaml into ``path``, under a digest of its own."""
    content = to_dict(exported)
    content.pop("sha256")
    write_yaml(path / EXPORT, content | {"sha256": digest(content)})


def record_of(path: Path, tensors: dict[str, int] | None = None) -> FileRecord:
    """What export.yaml says of a file."""
    return FileRecord(bytes=path.stat().st_size, sha256=sha256_of(path), tensors=tensors)


def open_exported(path: Path) -> Exported:
    """Read an exported directory and check its files against export.yaml, and that against its own digest.

    Raises:
        UserError: files are missing or differ from what was exported; all findings at once.
    """
    content = read_yaml(path / EXPORT)
    if not isinstance(content, dict):
        raise UserError(f"{path / EXPORT}: holds no export; the file is damaged, export again")
    exported = from_dict(Exported, content, str(path / EXPORT))
    check_lineage(exported.run.lineage, path / EXPORT)
    # Exports of before the digest was there have none.
    if exported.sha256 not in (None, digest({key: value for key, value in content.items() if key != "sha256"})):
        raise UserError(f"{path / EXPORT}: its content differs from its own digest; restore it or export again")
    suffix = SUFFIXES[exported.format]
    findings = [
        f"{path / EXPORT}: lists no {name}; restore it or export again"
        for name in (*(f"{file}{suffix}" for file in FILES), TOKENS, TOKENIZER)
        if name not in exported.files
    ]
    for name, record in exported.files.items():
        if Path(name).name != name:
            findings.append(f"{path / EXPORT}: {name!r} is not the name of a file in this directory; export again")
        elif not (path / name).is_file():
            findings.append(f"{path / name}: is missing; restore it or export again")
        elif (sha256 := sha256_of(path / name)) != record.sha256:
            findings.append(
                f"{path / name}: digest {sha256[:12]} differs from {record.sha256[:12]} in {EXPORT}; "
                "the file is truncated, edited or from another export: restore it or export again"
            )
    if findings:
        raise UserError.of(findings)
    return exported


def finished_without_pack(out: Path, options: dict[str, Any], weights_sha256: str) -> Exported | None:
    """The export that ``out`` holds already, if it was made of these weights with these ``options``.

    A process that is killed after the directory appeared and before its tar did leaves it so.

    Raises:
        UserError: ``out`` holds an export that is damaged.
    """
    if not is_exported(out):
        return None
    exported = open_exported(out)
    same = exported.options == options and exported.run.weights_sha256 == weights_sha256
    return exported if same else None


def pack_directory(path: Path, packed: Path, pack: Path, name: str) -> None:
    """Put the files of an export into an uncompressed tar file, in a folder ``name``; the same files give the same bytes.

    What else lies in the directory, such as evaluations with their texts, stays out of it.

    Args:
        packed: where to write it, which will be ``pack``.

    Raises:
        UserError: it cannot be written.
    """

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        entry.mode = 0o755 if entry.isdir() else 0o644
        return entry

    try:
        with tarfile.open(packed, "w") as archive:
            archive.add(path, name, recursive=False, filter=plain)
            for file in sorted({EXPORT, README, ATTRIBUTES, *open_exported(path).files}):
                if file in (README, ATTRIBUTES) and not (path / file).is_file():
                    continue  # people may remove them
                archive.add(path / file, f"{name}/{file}", recursive=False, filter=plain)
    except OSError as error:
        raise UserError(f"{pack}: cannot write ({error.strerror or error}); choose another --pack") from error
