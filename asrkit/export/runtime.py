"""The files of an exported directory as functions of tensors, by onnxruntime or TorchScript on the CPU.

Shapes: N utterances or streams, T feature frames of 10 ms, T' encoder frames of 40 ms, c encoder frames of a chunk,
C context size, J joiner dim, V vocabulary, S numbers in a flat state.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asrkit.errors import UserError
from asrkit.export.directory import DECODER, ENCODER, FILES, JOINER, SUFFIXES, Format
from asrkit.export.graphs import zipformer2_states
from asrkit.export.safety import check_onnx, check_operators, checked_script
from asrkit.extras import require
from asrkit.run_dir import EXPORT


class ExportedModel:
    """The ``files`` in ``path``, all loaded at once.

    ``encoder`` is a file: encoder, whose output is in joiner space (J), or ctc, whose output is log-probabilities (V).

    Raises:
        UserError: this version of onnxruntime or torch cannot load a file, or onnxruntime is missing.
    """

    def __init__(self, path: Path, state_size: int = 0, format: Format = "onnx", files: Sequence[str] = FILES) -> None:
        if format == "onnx":
            require("onnxruntime", for_="an exported model")
        self.path, self.state_size, self.format = path, state_size, format
        open_file: Callable[[Path], Callable[..., list[Tensor]]] = OnnxFile if format == "onnx" else _ScriptFile
        self.programs = {file: open_file(path / f"{file}{SUFFIXES[format]}") for file in files}

    def encode(self, encoder: str, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        """Whole utterances: (N, T, 80), (N,) -> (N, T', J or V), (N,)."""
        out, lens = self._run(encoder, x, x_lens)
        return out, lens

    def initial_state(self, batch: int) -> Tensor:
        """The state (1, N, S) of ``batch`` streams before their first chunk."""
        return torch.zeros(1, batch, self.state_size)

    def step(self, encoder: str, x: Tensor, state: Tensor, missing: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """A chunk: (N, 4 c + 3, 80), (1, N, S) -> (N, c, J or V), the next state.

        ``missing`` (N,) counts the frames of the chunk beyond each stream's end.
        """
        batch = len(x)
        lacking = (torch.zeros(batch) if missing is None else missing.to(torch.float32)).view(1, batch, 1)
        if encoder == ENCODER:
            out, state, _ = self._run(encoder, x, state, lacking)
            return out, state
        _, nonlin, _, *spare = zipformer2_states(batch, self.state_size)
        out, state, *_ = self._run(encoder, x, state, nonlin, lacking, *spare)
        return out, state

    def predict(self, contexts: Tensor) -> Tensor:
        """(N, C) int64, -1 for none -> (N, J)."""
        return self._run(DECODER, contexts)[0]

    def join(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        """(N, J), (N, J) -> logits (N, V)."""
        return self._run(JOINER, encoded, predicted)[0]

    def _run(self, file: str, *tensors: Tensor) -> list[Tensor]:
        """By position, as the client passes them."""
        return self.programs[file](*tensors)


class OnnxFile:
    """A file as a function from its inputs to its outputs, by position.

    A fork lacks the threads of its parent, and would wait for them for ever. So a file is loaded without threads of its own, and again,
    with as many as torch has, in each process that runs it with several. A pickle of it is its path.

    Raises:
        UserError: the file reaches out of itself, or onnxruntime cannot load it.
    """

    def __init__(self, path: Path) -> None:
        check_onnx(path)
        self._path = path
        self._sessions = {_NO_THREADS: _open_session(path, 1)}
        self._names = [info.name for info in self._sessions[_NO_THREADS].get_inputs()]

    def __reduce__(self) -> tuple[type[OnnxFile], tuple[Path]]:
        return OnnxFile, (self._path,)

    def _session(self) -> Any:
        threads = torch.get_num_threads()
        key = _NO_THREADS if threads == 1 else (os.getpid(), threads)
        if key not in self._sessions:
            # Another process's session stays, because its end waits for its threads too.
            self._sessions[key] = _open_session(self._path, threads)
            if key != _NO_THREADS:
                self._sessions.pop(_NO_THREADS, None)
        return self._sessions[key]

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        session = self._session()
        try:
            arrays = {name: tensor.numpy() for name, tensor in zip(self._names, tensors, strict=True)}
            return [torch.from_numpy(array) for array in session.run(None, arrays)]
        except Exception as error:  # onnxruntime's errors share no class of their own
            raise UserError(f"{self._path}: does not fit {EXPORT} ({_one_line(error)}); export again") from error


_NO_THREADS = (0, 1)  # in place of a process and its number of threads


class _ScriptFile:
    """The same of a TorchScript file."""

    def __init__(self, path: Path) -> None:
        self._path, archive = path, checked_script(path)
        try:
            self._script: Any = torch.jit.load(archive, map_location="cpu")  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise UserError(
                f"{path}: torch {torch.__version__} cannot load it; export again with this torch"
            ) from error
        check_operators(path, self._script)

    def __reduce__(self) -> tuple[type[_ScriptFile], tuple[Path]]:
        return _ScriptFile, (self._path,)

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        # Optimized, the second call of each batch size takes seconds, and those after it are no faster.
        try:
            with torch.no_grad(), torch.jit.optimized_execution(False):  # type: ignore[no-untyped-call]
                outputs = self._script(*tensors)
        except RuntimeError as error:
            raise UserError(f"{self._path}: does not fit {EXPORT} ({_one_line(error)}); export again") from error
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def run_graph(content: bytes, x: Tensor) -> Tensor:
    """A graph of one input and one output, on ``x``.

    Raises:
        UserError: onnxruntime lacks an operator.
    """
    session = _open_session(content, 1)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def _open_session(model: Path | bytes, threads: int) -> Any:
    onnxruntime = require("onnxruntime", for_="an exported model")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        content = str(model) if isinstance(model, Path) else model
        return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no class of their own
        reason = _one_line(error)
        version = f"onnxruntime {onnxruntime.__version__}"
        if "MatMulNBits" in reason or "matmul_nbits" in reason:
            raise UserError(
                f"{version} multiplies no integer weights of these bits ({reason}); install a newer one, or export "
                "them as float32 with --dequantize"
            ) from error
        raise UserError(
            f"{model if isinstance(model, Path) else 'a layer'}: {version} cannot load it ({reason}); install a newer "
            "onnxruntime or export again"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
