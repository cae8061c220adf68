"""What is exported: one traceable module for each file (named without its suffix), with the names, shapes and metadata the runtime expects.

Inputs and outputs go by position, as sherpa-onnx passes them; names are for people. A streaming encoder carries all its
caches in one flat state, which sherpa-onnx starts at zero and hands from chunk to chunk. Two of the runtime's models
take such a state of any size: the transducer's ``lstm`` and CTC's ``zipformer2``.

Shapes: N utterances or streams, T feature frames of 10 ms, T' encoder frames of 40 ms, c encoder frames of a chunk,
C context size, J joiner dim, V vocabulary, S numbers in a flat state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from asrkit.errors import UserError
from asrkit.export.directory import CTC, DECODER, ENCODER, JOINER
from asrkit.frames import RECEPTIVE_FIELD, SUBSAMPLING, count_window
from asrkit.models.asr import AsrModel
from asrkit.models.encoder import Caches
from asrkit.nn.context import Context, parse_context

# A frame counter lives in a float32 state: whole numbers up to here are exact.
MAX_COUNT = 1 << 24

Head = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Graph:
    """One file to be: ``module`` called with ``example`` gives ``outputs``.

    ``dynamic`` names the axes of inputs and outputs that vary, as torch.onnx.export takes them.
    """

    file: str
    module: nn.Module
    example: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: dict[str, dict[int, str]]
    metadata: dict[str, str] = field(default_factory=dict)


class StateLayout:
    """How the caches of a variant lie in one flat state: (N, S) with the frame counter first.

    Zeros are the caches before the first chunk. The counter would grow for ever, and float32 counts exactly to 2^24
    only; but a mask asks just two things of it: whether ``left`` frames have passed, and the position within the chunks
    of the sub-models that have chunks of their own. So from ``left`` on it turns round with the period of those chunks,
    and every mask stays as it is.

    Raises:
        UserError: the chunks of the sub-models repeat together too rarely to be counted.
    """

    def __init__(self, model: AsrModel, submodels: Sequence[str], left: int) -> None:
        caches = model.encoder.initial_caches(1, left, submodels)
        self.shapes = [tuple(cache.shape[1:]) for cache in caches.tensors()[1:]]
        self.num_conv, self.num_attention = len(caches.conv), len(caches.keys)
        self.size = 1 + sum(math.prod(shape) for shape in self.shapes)
        chunks = [parse_context(model.spec.submodels[name].context).chunk for name in submodels]
        self.left, self.period = left, math.lcm(*(chunk for chunk in chunks if chunk is not None))
        if left + self.period > MAX_COUNT:
            raise UserError(
                f"the chunks of {', '.join(submodels)} fall together only every {self.period} frames, too rarely for "
                "the runtime's float32 state; export fewer sub-models together or train them with the same chunk"
            )

    def unpack(self, state: Tensor) -> Caches:
        """(N, S) to caches."""
        parts, begin = [], 1
        for length, dim in self.shapes:
            part = state[:, begin : begin + length * dim]
            # A reshape to 0 rows means something else in ONNX.
            parts.append(part.reshape(-1, length, dim) if length else part.unsqueeze(-1).expand(-1, -1, dim))
            begin += length * dim
        bounds = (self.num_conv, self.num_conv + self.num_attention)
        conv, keys, values = parts[: bounds[0]], parts[bounds[0] : bounds[1]], parts[bounds[1] :]
        return Caches(state[:, 0].to(torch.int64), tuple(conv), tuple(keys), tuple(values))

    def pack(self, caches: Caches) -> Tensor:
        """Caches to (N, S)."""
        beyond = (caches.frames - self.left).clamp(min=0)
        turns = beyond.div(self.period, rounding_mode="floor")
        count = (caches.frames - turns * self.period).to(torch.float32)
        return torch.cat([count.unsqueeze(1), *(cache.flatten(1) for cache in caches.tensors()[1:])], dim=1)


class WholeUtterance(nn.Module):
    """x (N, T, 80), x_lens (N,) -> the head's output (N, T', ...), T' (N,)."""

    def __init__(self, model: AsrModel, variant: str, head: Head) -> None:
        super().__init__()
        self.model, self.variant, self.head = model, variant, head

    def forward(self, x: Tensor, x_lens: Tensor) -> tuple[Tensor, Tensor]:
        # Too short for one frame, a recording still needs a convolution's window; its length says there is no frame.
        wanted = torch.as_tensor(x.shape[1]).clamp(min=RECEPTIVE_FIELD)
        x = torch.cat([x, x.new_zeros(1, RECEPTIVE_FIELD, x.shape[2]).expand(x.shape[0], -1, -1)], dim=1)[:, :wanted]
        encoder_out, lens = self.model.encode(x, x_lens, self.variant)
        return self.head(encoder_out), lens


class Chunk(nn.Module):
    """x (N, 4 c + 3, 80), state (N, S), missing (N,) -> the head's output (N, c, ...), the next state.

    ``missing`` counts the frames of the chunk beyond the stream's end. The runtime never says so (0): it pads the end
    with silence. Our own decoding does, so that its results are those of the torch model to the last frame.
    """

    def __init__(self, model: AsrModel, variant: str, layout: StateLayout, chunk: int, head: Head) -> None:
        super().__init__()
        self.model, self.variant, self.layout, self.chunk, self.head = model, variant, layout, chunk, head

    def forward(self, x: Tensor, state: Tensor, missing: Tensor) -> tuple[Tensor, Tensor]:
        frame_lens = self.chunk - missing.to(torch.int64)
        encoder_out, caches = self.model.streaming_step(x, self.layout.unpack(state), self.variant, frame_lens)
        return self.head(encoder_out), self.layout.pack(caches)


class LstmStates(nn.Module):
    """A chunk with the states of sherpa-onnx's ``lstm`` model: h (1, N, S) holds the caches, c (1, N, 1) the missing."""

    def __init__(self, step: Chunk) -> None:
        super().__init__()
        self.step = step

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, state = self.step(x, h.squeeze(0), c.squeeze(0).squeeze(1))
        return out, state.unsqueeze(0), c * 0


class Zipformer2States(nn.Module):
    """A chunk with the states of sherpa-onnx's ``zipformer2`` CTC model of one layer.

    cached_key (1, N, S) holds the caches and cached_val1 (1, N, 1) the missing; the runtime wants the others.
    """

    def __init__(self, step: Chunk) -> None:
        super().__init__()
        self.step = step

    def forward(
        self, x: Tensor, key: Tensor, nonlin: Tensor, val1: Tensor, val2: Tensor, conv1: Tensor, conv2: Tensor,
        embed: Tensor, processed: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out, state = self.step(x, key.squeeze(0), val1.squeeze(0).squeeze(1))
        spare = (nonlin * 1, val1 * 0, val2 * 1, conv1 * 1, conv2 * 1, embed * 1)
        return out, state.unsqueeze(0), *spare, processed + self.step.chunk


class Decoder(nn.Module):
    """The last tokens (N, C), -1 for none, to joiner space (N, J)."""

    def __init__(self, model: AsrModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, y: Tensor) -> Tensor:
        return self.model.joiner.project_predictor(self.model.predictor(y))


class Joiner(nn.Module):
    """encoder_out (N, J), decoder_out (N, J) -> logits (N, V)."""

    def __init__(self, model: AsrModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, encoder_out: Tensor, decoder_out: Tensor) -> Tensor:
        return self.model.joiner(encoder_out, decoder_out)


def graphs(model: AsrModel, variant: str, context: Context, comment: str) -> list[Graph]:
    """The four files of a variant: offline in full context, streaming otherwise.

    Raises:
        UserError: this variant cannot stream in the runtime; the message says why.
    """
    about = {"version": "1", "model_author": "asrkit", "comment": comment}
    encoders = (
        _offline(model, variant, about)
        if context.chunk is None
        else _streaming(model, variant, context.chunk, context.left, about)
    )
    tokens = torch.tensor([[-1] * (model.context_size - 1) + [model.blank], [1] * model.context_size])
    joiner_dim = model.joiner.out.in_features
    vectors = torch.zeros(2, joiner_dim)
    return [
        *encoders,
        Graph(
            DECODER,
            Decoder(model),
            (tokens,),
            ("y",),
            ("decoder_out",),
            _batched(0, "y", "decoder_out"),
            {**about, "vocab_size": str(model.vocab_size), "context_size": str(model.context_size)},
        ),
        Graph(
            JOINER,
            Joiner(model),
            (vectors, vectors),
            ("encoder_out", "decoder_out"),
            ("logit",),
            _batched(0, "encoder_out", "decoder_out", "logit"),
            {**about, "joiner_dim": str(joiner_dim)},
        ),
    ]


def _offline(model: AsrModel, variant: str, about: dict[str, str]) -> list[Graph]:
    example = (torch.zeros(2, 95, model.spec.features.num_mel_bins), torch.tensor([95, 61]))
    offline = []
    for file, head, name, kind in (
        (ENCODER, model.joiner.project_encoder, "encoder_out", "zipformer2"),
        (CTC, model.ctc_log_probs, "log_probs", "zipformer2_ctc"),
    ):
        outputs = (name, f"{name}_lens")
        dynamic = {**_batched(0, "x_lens", outputs[1]), "x": {0: "N", 1: "T"}, name: {0: "N", 1: "T_out"}}
        module = WholeUtterance(model, variant, head)
        metadata = {"model_type": kind, **about}
        offline.append(Graph(file, module, example, ("x", "x_lens"), outputs, dynamic, metadata))
    return offline


def _streaming(model: AsrModel, variant: str, chunk: int, left: int, about: dict[str, str]) -> list[Graph]:
    layout = StateLayout(model, model.submodels_of(variant), left)
    window = count_window(chunk)
    x = torch.zeros(2, window, model.spec.features.num_mel_bins)
    sizes = {"T": str(window), "decode_chunk_len": str(SUBSAMPLING * chunk)}
    lstm = LstmStates(Chunk(model, variant, layout, chunk, model.joiner.project_encoder))
    ctc = Zipformer2States(Chunk(model, variant, layout, chunk, model.ctc_log_probs))
    return [
        Graph(
            ENCODER,
            lstm,
            (x, torch.zeros(1, 2, layout.size), torch.zeros(1, 2, 1)),
            ("x", "h", "c"),
            ("encoder_out", "next_h", "next_c"),
            {**_batched(0, "x", "encoder_out"), **_batched(1, "h", "c", "next_h", "next_c")},
            {
                "model_type": "lstm",
                **sizes,
                "num_encoder_layers": "1",
                "d_model": str(layout.size),
                "rnn_hidden_size": "1",
                **about,
            },
        ),
        Graph(
            CTC,
            ctc,
            (x, *zipformer2_states(2, layout.size)),
            ("x", *ZIPFORMER2),
            ("log_probs", *(f"next_{name}" for name in ZIPFORMER2)),
            {
                **_batched(0, "x", "log_probs"),
                **_batched(1, *(n for name in ZIPFORMER2[:4] for n in (name, f"next_{name}"))),
                **_batched(0, *(n for name in ZIPFORMER2[4:] for n in (name, f"next_{name}"))),
            },
            {
                "model_type": "zipformer2",
                **sizes,
                "encoder_dims": "4",
                "query_head_dims": str(layout.size),
                "value_head_dims": "1",
                "num_heads": "1",
                "num_encoder_layers": "1",
                "cnn_module_kernels": "2",
                "left_context_len": "1",
                **about,
            },
        ),
    ]


# The states of a zipformer2 of one layer, in the runtime's order; the batch is axis 1 of the first four, else axis 0.
ZIPFORMER2 = ("key", "nonlin_attn", "val1", "val2", "conv1", "conv2", "embed", "processed_lens")


def zipformer2_states(batch: int, size: int) -> tuple[Tensor, ...]:
    """The states sherpa-onnx starts ``batch`` streams with: zeros, of the shapes its metadata gives them."""
    floats = [(1, batch, size), (1, batch, 1, 3), (1, batch, 1), (1, batch, 1), (batch, 4, 1), (batch, 4, 1)]
    floats.append((batch, 128, 3, 19))
    return (*(torch.zeros(shape) for shape in floats), torch.zeros(batch, dtype=torch.int64))


def _batched(axis: int, *names: str) -> dict[str, dict[int, str]]:
    return {name: {axis: "N"} for name in names}
