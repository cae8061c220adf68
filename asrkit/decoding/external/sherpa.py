"""Any directory that sherpa-onnx loads, as a recognizer: its kind is known from its files."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from asrkit.decoding.external.interface import SHERPA, Transcription, identify
from asrkit.errors import UserError, clip
from asrkit.extras import require

WORKER = Path(__file__).with_name("sherpa_worker.py")
TAIL_SECONDS = 0.66  # of silence after a stream whose encoder does not say how much it looks ahead
# Parts by what their names contain; the first that fits. One file without any of these words is a model by itself.
ROLES = ("uncached_decode", "cached_decode", "preprocess", "encode", "decode", "joiner")


class Kind(NamedTuple):
    """How sherpa-onnx makes a recognizer: its constructor, the role of each file argument, and further arguments."""

    constructor: str
    files: Mapping[str, str]
    more: Mapping[str, Any] = {}
    methods: tuple[str, ...] = ("greedy",)
    online: bool = False


_TRANSDUCER = {"encoder": "encode", "decoder": "decode", "joiner": "joiner"}
_MODEL = {"model": "model"}
_BOTH = ("greedy", "beam")
TRANSDUCERS = {
    "transducer": Kind("from_transducer", _TRANSDUCER, methods=_BOTH),
    "nemo transducer": Kind("from_transducer", _TRANSDUCER, {"model_type": "nemo_transducer"}),
    "streaming transducer": Kind("from_transducer", _TRANSDUCER, methods=_BOTH, online=True),
}
MOONSHINE = Kind(
    "from_moonshine",
    {
        "preprocessor": "preprocess",
        "encoder": "encode",
        "uncached_decoder": "uncached_decode",
        "cached_decoder": "cached_decode",
    },
)
# Encoder and decoder, by the beginning of the encoder's ``model_type``; EncDecMultiTaskModel is Canary.
PAIRS = {
    "whisper": Kind("from_whisper", {"encoder": "encode", "decoder": "decode"}),
    "paraformer": Kind("from_paraformer", {"encoder": "encode", "decoder": "decode"}, online=True),
    "EncDecMultiTaskModel": Kind("from_nemo_canary", {"encoder": "encode", "decoder": "decode"}),
}
# One model, by the beginning of its ``model_type``: whole utterances, and streams.
SINGLES = {
    "zipformer2": Kind("from_zipformer_ctc", _MODEL, methods=("ctc",)),
    "EncDec": Kind("from_nemo_ctc", _MODEL, methods=("ctc",)),
    "wenet": Kind("from_wenet_ctc", _MODEL, methods=("ctc",)),
    "telespeech": Kind("from_telespeech_ctc", _MODEL, methods=("ctc",)),
    "dolphin": Kind("from_dolphin_ctc", _MODEL, methods=("ctc",)),
    "sense_voice": Kind("from_sense_voice", _MODEL),
    "paraformer": Kind("from_paraformer", {"paraformer": "model"}),
}
STREAMING_SINGLES = {
    "zipformer2": Kind("from_zipformer2_ctc", _MODEL, methods=("ctc",), online=True),
    "EncDec": Kind("from_nemo_ctc", _MODEL, methods=("ctc",), online=True),
    "wenet": Kind("from_wenet_ctc", _MODEL, methods=("ctc",), online=True),
}
LAST_SECONDS = 5.0  # that a process may take to end by itself
WITH_STATES = 3  # inputs from which on a model has states beside the sound and its length


@dataclass(frozen=True)
class Model:
    """A directory as sherpa-onnx takes it. tail: seconds of silence after a stream."""

    kind: Kind
    files: Mapping[str, Path]
    tokens: Path
    tail: float

    def arguments(self, method: str, beam: int, threads: int) -> dict[str, Any]:
        """Of the constructor."""
        named = {argument: str(self.files[role]) for argument, role in self.kind.files.items()}
        search = {"greedy": "greedy_search", "beam": "modified_beam_search"}
        # Only a transducer has a choice.
        search_options = (
            {"decoding_method": search[method], "max_active_paths": beam} if "beam" in self.kind.methods else {}
        )
        return {**named, "tokens": str(self.tokens), "num_threads": threads, **search_options, **self.kind.more}


def find_model(spec: str, method: str | None = None) -> Model:
    """The files of ``sherpa-onnx:DIR`` and what they are; of a directory that also has a CTC model, ``method`` says which is meant.

    Raises:
        UserError: it is no directory of a model, or of a kind that is not known.
    """
    path = Path(spec.removeprefix(SHERPA))
    if not path.is_dir():
        raise UserError(f"{spec}: no such directory; give the directory that holds a model for sherpa-onnx")
    tokens = sorted(path.glob("*tokens.txt"))
    # asrkit exports a language model beside the recognizer.
    graphs = sorted(set(path.glob("*.onnx")) - {path / "lm.onnx"})
    if not graphs or len(tokens) != 1:
        count = "no tokens.txt" if not tokens else f"{len(tokens)} files *tokens.txt"
        raise UserError(
            f"{spec}: is not a model for sherpa-onnx ({len(graphs)} files *.onnx, {count}); give the directory that holds its model and tokens.txt"
        )
    files = _by_role(spec, graphs)
    single, transducer = "model" in files, {"encode", "decode", "joiner"} <= set(files)
    if method == "ctc" and single and transducer:
        files = {"model": files["model"]}
    elif transducer:
        files.pop("model", None)
    main = files.get("encode", files.get("model"))
    if main is None:
        raise UserError(
            f"{spec}: has neither an encoder nor a whole model, only {', '.join(files)}; give the directory of a complete model"
        )
    inputs, metadata = _describe(spec, main)
    kind = _kind(spec, files, inputs, metadata)
    window = metadata.get("T", "")
    tail = (int(window) + 1) / 100 if window.isdecimal() else TAIL_SECONDS
    return Model(kind, files, tokens[0], tail)


def _by_role(spec: str, graphs: Sequence[Path]) -> dict[str, Path]:
    """Each role's file. Of two that differ by their precision the float one is taken (our choice)."""
    roles: dict[str, list[Path]] = {}
    for graph in graphs:
        role = next((role for role in ROLES if role in graph.name.lower()), "model")
        roles.setdefault(role, []).append(graph)
    findings = []
    for role, several in roles.items():
        precise = [graph for graph in several if not any(word in graph.name for word in ("int8", "fp16", "uint8"))]
        roles[role] = precise or several
        if len(roles[role]) > 1:
            names = ", ".join(graph.name for graph in roles[role])
            findings.append(f"{spec}: several files for the same part ({names}); leave only one of them there")
    if findings:
        raise UserError.of(findings)
    return {role: several[0] for role, several in roles.items()}


def _describe(spec: str, graph: Path) -> tuple[list[str], dict[str, str]]:
    """The names of a graph's inputs, and its metadata."""
    onnx = require("onnx", for_=spec)
    try:
        model = onnx.load(str(graph), load_external_data=False)
    except Exception as error:  # protobuf's errors, and those of the file
        raise UserError(f"{graph}: is not an ONNX file ({clip(error)}); fetch it again") from error
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in weights]
    return inputs, {entry.key: entry.value for entry in model.metadata_props}


def _kind(spec: str, files: Mapping[str, Path], inputs: Sequence[str], metadata: Mapping[str, str]) -> Kind:
    model_type, streams = metadata.get("model_type", ""), len(inputs) >= WITH_STATES
    if {"encode", "decode", "joiner"} <= set(files):
        nemo = "audio_signal" in inputs or model_type.startswith("EncDec")
        return TRANSDUCERS["streaming transducer" if streams else "nemo transducer" if nemo else "transducer"]
    if set(MOONSHINE.files.values()) <= set(files):
        return MOONSHINE
    if {"encode", "decode"} <= set(files):
        table = PAIRS
    else:
        table = STREAMING_SINGLES if streams and not model_type.startswith("sense_voice") else SINGLES
    for beginning, kind in table.items():
        if model_type.startswith(beginning) and set(kind.files.values()) <= set(files):
            return kind
    raise UserError(
        f"{spec}: is of a kind that asrkit does not know ({', '.join(sorted(path.name for path in files.values()))}, "
        f"model_type {clip(model_type) or 'not given'}); known are {', '.join([*TRANSDUCERS, 'moonshine', *PAIRS, *SINGLES])}"
    )


class SherpaRecognizer:
    """A directory that sherpa-onnx loads, in a process of its own; see ``TextRecognizer``.

    Raises:
        UserError: see ``find_model``; sherpa-onnx refuses the model; the model has no such search.
    """

    max_seconds: float | None = None

    def __init__(
        self, spec: str, method: str | None = None, beam: int = 4, device: str = "auto", threads: int | None = None
    ) -> None:
        require("sherpa", for_=spec)
        if device not in ("auto", "cpu"):
            raise UserError(f"--device {device}: sherpa-onnx runs on the CPU here; use auto or cpu")
        model = find_model(spec, method)
        method = method or model.kind.methods[0]
        if method not in model.kind.methods:
            raise UserError(
                f"{spec}: this model is searched by {' or '.join(model.kind.methods)}, not {method}; change --method"
            )
        self.search = method
        self.name, self.beam = spec, beam if method == "beam" else None
        self.context = "streaming" if model.kind.online else "full"
        self.device, self.threads = "cpu", threads or 1
        self.sha256, self.num_bytes = identify([*model.files.values(), model.tokens])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``close``
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors
        )
        job = {
            "online": model.kind.online,
            "constructor": model.kind.constructor,
            "arguments": model.arguments(method, beam, self.threads),
            "tail": model.tail,
        }
        self._ask(json.dumps(job).encode() + b"\n")

    def check_language(self, language: str) -> str | None:
        """See ``TextRecognizer``: a directory does not say what it knows."""
        return None

    def transcribe(self, waves: Sequence[Tensor], languages: Sequence[str]) -> list[Transcription]:
        """See ``TextRecognizer``."""
        header = json.dumps([len(wave) for wave in waves]).encode() + b"\n"
        answers = self._ask(header, *(wave.float().contiguous().numpy().tobytes() for wave in waves))
        results = []
        for (text, log_probs), language in zip(answers, languages, strict=True):
            confidence = min(1.0, math.exp(sum(log_probs) / len(log_probs))) if log_probs else None
            results.append(Transcription(" ".join(text.split()), confidence, language))
        return results

    def close(self) -> None:
        """End the process."""
        if self._process.stdin is not None:
            with suppress(OSError):  # it has ended already
                self._process.stdin.close()
        try:
            self._process.wait(timeout=LAST_SECONDS)
        except subprocess.TimeoutExpired:  # it still decodes what nobody waits for any more
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._errors.close()

    def _ask(self, *parts: bytes) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(OSError):  # it has ended; what it wrote says why
            for part in parts:
                self._process.stdin.write(part)
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            lines = self._errors.read().decode(errors="replace").strip().splitlines()
            reason = clip(lines[-1]) if lines else "without a word"
            raise UserError(
                f"{self.name}: sherpa-onnx ended with code {code} ({reason}); check that the files belong together"
            )
        return json.loads(line)
