"""Recognition while the sound comes in: samples to features, features to chunks, chunks to text that grows.

Shapes: B streams, T feature frames of 10 ms, T' encoder frames of 40 ms, c encoder frames of a chunk, J joiner
dimension, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from asrkit.data.features import LOG_EPS, NUM_MEL_BINS, OnlineFbank
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import AcousticModel, EncoderOutput
from asrkit.decoding.hypothesis import Hypothesis
from asrkit.decoding.search import NBestSearch, search_n_best
from asrkit.decoding.words import Word, timed_words
from asrkit.frames import (
    ENCODER_SHIFT,
    LOOK_AHEAD_MS,
    SAMPLE_RATE,
    SUBSAMPLING,
    count_encoder_frames,
    count_window,
)
from asrkit.nn.context import Context


class StreamingModel(AcousticModel, Protocol):
    """An acoustic model that also runs chunk by chunk; the caches are its own affair."""

    @property
    def context(self) -> Context:
        """A streaming one: ``chunk`` is c."""

    def start(self, batch: int = 1) -> Any:
        """The caches of ``batch`` streams before their first chunk."""

    def step(self, features: Tensor, caches: Any, frame_lens: Tensor | None = None) -> tuple[EncoderOutput, Any]:
        """The next chunk, (B, 4 c + 3, 80), to c encoder frames and the caches after it.

        Chunks advance by 4 c feature frames. Where a stream ends within the chunk, ``frame_lens`` (B,) says how many
        of its c frames there are; what the others hold is not used.
        """


@dataclass(frozen=True)
class Endpoint:
    """When an utterance is over: ``pause`` seconds without a new symbol, or ``longest`` seconds in all.

    The encoder goes on as if nothing had happened; only the search starts afresh, so its work stays bounded.
    """

    pause: float = 1.0
    longest: float = 20.0


@dataclass(frozen=True)
class Partial:
    """What is known of an utterance at ``time``: its whole text so far, which may still change unless it is ``final``.

    time: seconds of sound that it needed. start: seconds at which the utterance began.
    words: of a final text, each with the time its first piece was emitted.
    """

    text: str
    final: bool
    time: float
    start: float
    words: list[Word] = field(default_factory=list)


class ChunkEncoder:
    """Feature frames of one stream, as they come, to encoder frames, chunk by chunk."""

    def __init__(self, model: StreamingModel) -> None:
        if model.context.chunk is None:
            raise ValueError("the model must be in a streaming context")
        self.model, self.chunk = model, model.context.chunk
        self._caches = model.start(1)
        self._waiting = torch.zeros(0, NUM_MEL_BINS)

    def accept(self, features: Tensor) -> Iterator[EncoderOutput]:
        """(T, 80) to each chunk they complete: c frames."""
        self._waiting = torch.cat([self._waiting, features])
        while len(self._waiting) >= count_window(self.chunk):
            yield self._step(self.chunk)

    def finish(self) -> Iterator[EncoderOutput]:
        """The frames of the last, incomplete chunk, if there are any: fewer than c."""
        remaining = count_encoder_frames(len(self._waiting))
        if remaining > 0:
            missing = count_window(self.chunk) - len(self._waiting)
            self._waiting = pad(self._waiting, (0, 0, 0, missing), value=LOG_EPS)
            yield self._step(remaining)

    def _step(self, valid: int) -> EncoderOutput:
        window = self._waiting[None, : count_window(self.chunk)]
        encoded, self._caches = self.model.step(window, self._caches, torch.tensor([valid]))
        self._waiting = self._waiting[SUBSAMPLING * self.chunk :]
        ctc = encoded.ctc_log_probs
        return EncoderOutput(
            encoded.joiner_in[:, :valid], encoded.lens.clamp(max=valid), None if ctc is None else ctc[:, :valid]
        )


class StreamingRecognizer:
    """One stream of sound to growing text.

    The frames of the current utterance are kept and searched again after each chunk, by the very search that decodes
    whole recordings; so a text is final in the same words as if it had been decoded at once.

    Args:
        search: the best hypotheses of encoder frames; each utterance begins a sentence. None: greedy.
        endpoint: when an utterance is over; None is a second's pause, or 20 seconds.
        unfinished: the search of an utterance that goes on; None: ``search``.
        ctc: the search is of CTC, which holds a piece over several frames. Cut there, it would be said again; so an utterance ends with a chunk
            whose last frame is a blank, or when it is twice as long as ``longest`` (our choice).
    """

    def __init__(
        self,
        model: StreamingModel,
        tokenizer: Tokenizer,
        search: NBestSearch | None = None,
        endpoint: Endpoint | None = None,
        unfinished: NBestSearch | None = None,
        ctc: bool = False,
    ) -> None:
        greedy = partial(search_n_best, model, method="greedy", special_ids=tokenizer.special_ids)
        self.tokenizer, self.search, self.unfinished = tokenizer, search or greedy, unfinished
        self.endpoint, self.ctc = endpoint or Endpoint(), ctc
        self._features, self._encoder, self._blank = OnlineFbank(), ChunkEncoder(model), model.blank
        self._utterance: list[EncoderOutput] = []
        self._samples = 0
        self._frames = 0  # encoder frames of the whole stream
        self._start = 0  # the one the current utterance began at
        self._shown = ""

    def accept(self, samples: Tensor) -> Iterator[Partial]:
        """(num_samples,) float32 at 16 kHz to what they change: a text that grew, or one that is final."""
        self._samples += len(samples)
        for encoded in self._encoder.accept(self._features.accept(samples)):
            yield from self._advance(encoded)

    def finish(self) -> Iterator[Partial]:
        """The end of the sound: what its last moments change, and the final text."""
        for encoded in chain(self._encoder.accept(self._features.finish()), self._encoder.finish()):
            yield from self._advance(encoded)
        if self._shown:
            yield self._partial(self._searched(self.search), final=True, time=self._samples / SAMPLE_RATE)
            self._forget()

    def _advance(self, encoded: EncoderOutput) -> Iterator[Partial]:
        """What one more chunk of encoder frames changes."""
        self._utterance.append(encoded)
        self._frames += encoded.joiner_in.shape[1]
        hypothesis = self._searched(self.unfinished or self.search)
        length = self._frames - self._start
        quiet = length - (hypothesis.frames[-1] + 1 if hypothesis.frames else 0)
        # A chunk is known when the last sample its frames need has arrived.
        time = min(self._frames * ENCODER_SHIFT + LOOK_AHEAD_MS / 1000, self._samples / SAMPLE_RATE)
        text = self.tokenizer.decode(hypothesis.tokens)
        holds = self.ctc and self._holds_a_piece(encoded)
        paused = quiet * ENCODER_SHIFT >= self.endpoint.pause and not holds
        if paused or length * ENCODER_SHIFT >= self.endpoint.longest * (2 if holds else 1):
            if text or self._shown:
                whole = hypothesis if self.unfinished is None else self._searched(self.search)
                yield self._partial(whole, final=True, time=time)
            self._forget()
        elif text != self._shown:
            self._shown = text
            yield self._partial(hypothesis, final=False, time=time)

    def _holds_a_piece(self, encoded: EncoderOutput) -> bool:
        """Whether the likeliest symbol of the last frame is no blank."""
        return encoded.ctc_log_probs is not None and int(encoded.ctc_log_probs[0, -1].argmax()) != self._blank

    def _searched(self, search: NBestSearch) -> Hypothesis:
        """The best hypothesis of the current utterance."""
        joiner_in = torch.cat([part.joiner_in for part in self._utterance], dim=1)
        ctc = [part.ctc_log_probs for part in self._utterance if part.ctc_log_probs is not None]
        lens = torch.tensor([joiner_in.shape[1]], device=joiner_in.device)
        return search(EncoderOutput(joiner_in, lens, torch.cat(ctc, dim=1) if ctc else None))[0][0]

    def _partial(self, hypothesis: Hypothesis, final: bool, time: float) -> Partial:
        start = self._start * ENCODER_SHIFT
        words = timed_words(hypothesis, self.tokenizer, start) if final else []
        return Partial(self.tokenizer.decode(hypothesis.tokens), final, round(time, 3), round(start, 3), words)

    def _forget(self) -> None:
        """Begin another utterance with the next frame."""
        self._utterance, self._start, self._shown = [], self._frames, ""
