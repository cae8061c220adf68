"""The encoder: a convolutional backbone, sub-models on its layers, and two ways through it: a whole utterance at once,
or chunk by chunk with caches.

Shapes: B batch, T feature frames of 10 ms, T' encoder frames of 40 ms, c frames of a chunk, D model dim, K kernel taps,
A a sub-model's attention dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asrkit.devices import send
from asrkit.frames import RECEPTIVE_FIELD
from asrkit.models.spec import EncoderSpec, FeatureSpec, SubModelSpec
from asrkit.nn.conformer import BackboneBlock, Branch, Subsampling
from asrkit.nn.context import FULL, Context, parse_context, visible
from asrkit.nn.dropout import Dropout
from asrkit.nn.masks import SpanMasks
from asrkit.nn.submodels import Adapter, Attention


class Normalize(nn.Module):
    """Subtract the mean and divide by the deviation of each mel bin, both measured on the training manifest."""

    mean: Tensor
    std: Tensor

    def __init__(self, num_mel_bins: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_mel_bins))
        self.register_buffer("std", torch.ones(num_mel_bins))

    def forward(self, features: Tensor) -> Tensor:
        return (features - self.mean) / self.std


@dataclass(frozen=True)
class Caches:
    """What a stream remembers between chunks; the batch comes first in every tensor, so streams of any age can share one.

    frames (B,) int64: encoder frames seen so far. conv: (B, K // 2, D) a layer. keys, values: (B, left, A) an attention
    module, by sub-model and then layer.
    """

    frames: Tensor
    conv: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def map(self, change: Callable[[Tensor], Tensor]) -> Caches:
        """The same caches with ``change`` applied to each tensor, such as ``lambda x: x[rows]``."""
        groups = (tuple(map(change, group)) for group in (self.conv, self.keys, self.values))
        return Caches(change(self.frames), *groups)

    def tensors(self) -> list[Tensor]:
        """All of them in a fixed order: frames, conv, keys, values."""
        return [self.frames, *self.conv, *self.keys, *self.values]


def join_streams(caches: Sequence[Caches]) -> Caches:
    """One batch of the streams of several."""
    together = [torch.cat(parts) for parts in zip(*(cache.tensors() for cache in caches), strict=True)]
    conv, attention = len(caches[0].conv), len(caches[0].keys)
    bounds = (1, 1 + conv, 1 + conv + attention)
    return Caches(
        together[0],
        tuple(together[bounds[0] : bounds[1]]),
        tuple(together[bounds[1] : bounds[2]]),
        tuple(together[bounds[2] :]),
    )


class SubModel(nn.Module):
    """The modules of one sub-model, by layer."""

    def __init__(self, spec: SubModelSpec, dim: int, per_mode_norm: bool) -> None:
        super().__init__()
        self.spec = spec
        self.context = parse_context(spec.context)
        self.layers = nn.ModuleDict(
            {
                str(layer): Attention(dim, spec.dim, spec.heads, spec.dropout, per_mode_norm)
                if spec.kind == "attention"
                else Adapter(dim, spec.dim, spec.dropout, per_mode_norm)
                for layer in spec.layers
            }
        )

    def silence(self) -> None:
        """Make the sub-model add nothing: the output projections of all its modules are zeroed."""
        for module in self.layers.values():
            module.silence()  # type: ignore[operator]


class Encoder(nn.Module):
    """Features to frames of 40 ms in two halves: ``embed`` (normalize, subsample, language) and ``layers`` (the backbone's blocks,
    with whichever sub-models are active); ``forward`` is both."""

    def __init__(
        self,
        backbone: EncoderSpec,
        features: FeatureSpec,
        submodels: Mapping[str, SubModelSpec] | None = None,
        languages: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.dim, self.kernel_size = backbone.dim, backbone.kernel_size
        per_mode_norm = backbone.norms == "per_mode"
        num_mel_bins = features.num_mel_bins
        self.normalize = Normalize(num_mel_bins)
        self.subsampling = Subsampling(num_mel_bins, backbone.subsampling_channels, backbone.dim, per_mode_norm)
        # One-hot languages times a matrix (num_languages, D). Zeros, and without a random draw: the model begins as one without.
        zeros = torch.zeros(len(languages), backbone.dim)
        self.languages = nn.Embedding.from_pretrained(zeros, freeze=False) if languages else None
        self.dropout = Dropout(backbone.dropout)
        self.blocks = nn.ModuleList(
            BackboneBlock(backbone.dim, backbone.feedforward_dim, backbone.kernel_size, backbone.dropout, per_mode_norm)
            for _ in range(backbone.num_layers)
        )
        self.submodels = nn.ModuleDict(
            {name: SubModel(spec, backbone.dim, per_mode_norm) for name, spec in (submodels or {}).items()}
        )
        # What hides frames in training, of a recognizer made of a pretrained encoder: set by the stage, in no run directory.
        self.masks: SpanMasks | None = None

    def one_draw(self) -> AbstractContextManager[None]:
        """Within, every pass of a batch hides the same frames in training."""
        return nullcontext() if self.masks is None else self.masks.one_draw()

    def forward(
        self,
        features: Tensor,
        feature_lens: Tensor,
        submodels: Sequence[str] = (),
        context: Context = FULL,
        gates: Tensor | None = None,
        languages: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A whole utterance: (B, T, 80), (B,) -> (B, T', D), (B,) with T' = (T - 3) // 4; arguments as for ``embed`` and ``layers``.

        In a streaming context the result is that of ``streaming_step`` chunk by chunk. An utterance of fewer than 7
        frames has no encoder frame; a batch of only such gives T' = 0.
        """
        x, encoder_out_lens = self.embed(features, feature_lens, context, languages)
        if self.masks is not None:
            x = self.masks(x)
        return self.layers(x, encoder_out_lens, submodels, context, gates), encoder_out_lens

    def embed(
        self, features: Tensor, feature_lens: Tensor, context: Context = FULL, languages: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features (B, T, 80), (B,) to what the first block reads, (B, T', D), (B,), each frame from 7 feature frames by itself.

        Args:
            context: whether it is a streaming one chooses between norms, where there is one per mode.
            languages: (B,) int64, the index of each utterance's among those of the spec; None for a model without.
        """
        if features.shape[1] < RECEPTIVE_FIELD:
            return features.new_zeros(len(features), 0, self.dim), torch.zeros_like(feature_lens)
        return self._embed(features, feature_lens, context.streaming, languages)

    def layers(
        self,
        x: Tensor,
        lens: Tensor,
        submodels: Sequence[str] = (),
        context: Context = FULL,
        gates: Tensor | None = None,
        multiple: int | None = None,
    ) -> Tensor:
        """What ``embed`` gave, (B, T', D), (B,), through every block: (B, T', D).

        Args:
            submodels: names of the active ones, in the order they are added.
            gates: (layers, B or 1) on the CPU, factors of what sub-models add in a layer (attention dropout); a layer
                whose factors are all 0 does not compute them.
            multiple: T' is padded to a multiple of it on the way, which changes no frame. None: to one of 8 where a GPU computes
                sub-models, as its fast attention asks of a mask's rows.
        """
        num_frames = x.shape[1]
        if num_frames == 0:
            return x
        if multiple is None:
            multiple = 8 if submodels and x.device.type != "cpu" else 1
        if multiple > 1:
            x = F.pad(x, (0, 0, 0, -num_frames % multiple))
        frames = torch.arange(x.shape[1], device=x.device)
        valid = frames < lens.unsqueeze(1)
        seen = {name: self._seen(name, frames[None], frames[None], valid, context) for name in submodels}
        # Causal convolutions see zeros before the first frame.
        start = x.new_zeros(len(x), self.kernel_size // 2, self.dim) if context.streaming else None
        conv = [start] * len(self.blocks)
        x, _, _ = self._run_blocks(self.dropout(x), valid, submodels, seen, conv, None, gates)
        return x if multiple == 1 else x[:, :num_frames]

    def streaming_step(
        self,
        features: Tensor,
        caches: Caches,
        submodels: Sequence[str] = (),
        frame_lens: Tensor | None = None,
        languages: Tensor | None = None,
    ) -> tuple[Tensor, Caches]:
        """The next chunk of each stream: (B, 4 c + 3, 80) -> (B, c, D) and the caches after it.

        Chunks advance by 4 c feature frames; ``caches`` begin as ``initial_caches`` makes them for the same sub-models.
        Where a stream ends within the chunk, ``frame_lens`` (B,) says how many of its c frames there are. ``languages``
        (B,) as for ``embed``.
        """
        x, _ = self._embed(features, features.new_zeros(1), True, languages)
        offsets = torch.arange(x.shape[1], device=x.device)
        queries = caches.frames.unsqueeze(1) + offsets
        # All True without lengths, as a comparison, so that a traced graph keeps the batch's size open.
        valid = queries >= 0 if frame_lens is None else offsets < frame_lens.unsqueeze(1)
        seen = {}
        if caches.keys:
            left = caches.keys[0].shape[1]
            past = caches.frames.unsqueeze(1) + torch.arange(-left, 0, device=x.device)
            keys, known = torch.cat([past, queries], dim=1), torch.cat([past >= 0, valid], dim=1)
            seen = {name: self._seen(name, queries, keys, known, FULL) for name in submodels}
        attention = list(zip(caches.keys, caches.values, strict=True))
        x, conv, attention = self._run_blocks(x, valid, submodels, seen, list(caches.conv), attention, None)
        keys_after, values_after = (tuple(pair[side] for pair in attention) for side in (0, 1))
        return x, Caches(caches.frames + x.shape[1], tuple(c for c in conv if c is not None), keys_after, values_after)

    def initial_caches(self, batch: int, left: int, submodels: Sequence[str] = ()) -> Caches:
        """The caches of ``batch`` streams before their first chunk, for ``left`` frames of attention before a chunk."""
        weight = self.subsampling.out.weight
        dims = [self._submodel(name).spec.dim for name, _ in self._attention(submodels)]
        past = tuple(weight.new_zeros(batch, left, dim) for dim in dims)
        conv = tuple(weight.new_zeros(batch, self.kernel_size // 2, self.dim) for _ in self.blocks)
        return Caches(torch.zeros(batch, dtype=torch.int64, device=weight.device), conv, past, past)

    def _embed(
        self, features: Tensor, feature_lens: Tensor, streaming: bool, languages: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``embed`` of at least one encoder frame; that each utterance's language is added after the subsampling is our choice."""
        x, lens = self.subsampling(self.normalize(features), feature_lens, streaming)
        if (self.languages is None) != (languages is None):
            raise ValueError("a model with languages takes that of each utterance, one without takes none")
        if self.languages is not None and languages is not None:
            x = x + self.languages(languages).unsqueeze(1)
        return x, lens

    def _run_blocks(
        self,
        x: Tensor,
        valid: Tensor,
        submodels: Sequence[str],
        seen: dict[str, Tensor],
        conv: list[Tensor | None],
        attention: list[tuple[Tensor, Tensor]] | None,
        gates: Tensor | None,
    ) -> tuple[Tensor, list[Tensor | None], list[tuple[Tensor, Tensor]]]:
        """Through every block; histories of None mean that nothing came before and nothing is kept."""
        streaming = conv[0] is not None
        numbers = {module: number for number, module in enumerate(self._attention(submodels))}
        attention_after = list(attention or [])

        def attend(name: str, layer: int, x: Tensor) -> Tensor:
            module, number = self._submodel(name).layers[str(layer)], numbers[name, layer]
            history = None if attention is None else attention[number]
            added, (keys, values) = module(x, seen[name], streaming, history)
            if history is not None:
                size = x.shape[1]
                attention_after[number] = (keys[:, size:], values[:, size:])
            return added

        def branch(name: str, layer: int) -> Branch:
            if self._submodel(name).spec.kind == "attention":
                return partial(attend, name, layer)
            return partial(self._submodel(name).layers[str(layer)], streaming=streaming)

        on_device = None if gates is None else send(gates, x.device)
        conv_after: list[Tensor | None] = []
        for layer, block in enumerate(self.blocks):
            branches: dict[str, list[Branch]] = {"serial": [], "parallel": []}
            gate = None if gates is None else gates[layer]
            if gate is None or bool(gate.any()):
                for name in submodels:
                    if layer in self._submodel(name).spec.layers:
                        added = branch(name, layer)
                        branches[self._submodel(name).spec.position].append(
                            added if on_device is None else partial(_gated, on_device[layer], added)
                        )
            x, history = block(x, ~valid.unsqueeze(-1), conv[layer], **branches)
            conv_after.append(history)
        return x, conv_after, attention_after

    def _submodel(self, name: str) -> SubModel:
        submodel = self.submodels[name]
        assert isinstance(submodel, SubModel)  # for the type checker: a ModuleDict holds any module
        return submodel

    def _attention(self, submodels: Sequence[str]) -> list[tuple[str, int]]:
        """The attention modules of the active sub-models, in the caches' order."""
        active = [(name, self._submodel(name).spec) for name in submodels]
        return [(name, layer) for name, spec in active if spec.kind == "attention" for layer in spec.layers]

    def _seen(self, name: str, queries: Tensor, keys: Tensor, known: Tensor, context: Context) -> Tensor:
        """What a sub-model's attention sees, bool (B, T, S): ``known`` keys (B, S) within both contexts, and itself."""
        near = visible(queries, keys, self._submodel(name).context) & visible(queries, keys, context)
        # A frame of padding, which sees nothing, must not divide by zero.
        itself = queries.unsqueeze(-1) == keys.unsqueeze(-2)
        return (near & known.unsqueeze(1)) | itself


def _gated(gate: Tensor, branch: Branch, x: Tensor) -> Tensor:
    return gate.view(-1, 1, 1) * branch(x)
