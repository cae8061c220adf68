"""The files of an exported directory as functions of tensors, by onnxruntime on the CPU.

Shapes: N utterances or streams, T feature frames of 10 ms, T' encoder frames of 40 ms, c encoder frames of a chunk,
C context size, J joiner dim, V vocabulary, S numbers in a flat state.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from asrkit.errors import UserError
from asrkit.export.graphs import DECODER, ENCODER, JOINER, zipformer2_states
from asrkit.export.onnx_file import require_onnx


class OnnxModel:
    """The files in ``path``; each is loaded when it is first needed.

    ``encoder`` is a file: encoder.onnx, whose output is in joiner space (J), or ctc.onnx, whose output is
    log-probabilities (V).

    Args:
        threads: of each file; None takes as many as torch has.
    """

    def __init__(self, path: Path, state_size: int = 0, threads: int | None = None) -> None:
        require_onnx()
        self.path, self.state_size = path, state_size
        self._session = cache(lambda file: _open_session(path / file, threads or torch.get_num_threads()))

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
        session = self._session(file)
        names = [info.name for info in session.get_inputs()]
        arrays = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(array) for array in session.run(None, arrays)]


def _open_session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors share no class of their own
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({reason}); install a newer onnxruntime or "
            "export again"
        ) from error
