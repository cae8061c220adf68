"""Which context to decode in, from what the user asked for and what the variant was trained in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from asrkit.errors import UserError
from asrkit.nn.context import FULL, Context

# For a stream by a variant that was never trained for one: 640 ms at once, 2.56 s of attention before.
UNTRAINED_STREAM = Context(chunk=16, left=64)


@dataclass(frozen=True)
class ContextChoice:
    """``--mode full``, or ``--chunk`` and ``--left``; none of them is the first context trained.

    streaming: only a streaming one will do; left open, it is the first such one trained, else ``UNTRAINED_STREAM``.
    """

    full: bool = False
    chunk: int | None = None
    left: int | None = None
    streaming: bool = False

    def contradictions(self) -> list[str]:
        """What contradicts itself, whatever the model."""
        findings = []
        if self.full and self.chunk is not None:
            findings.append(f"--mode full and --chunk {self.chunk} contradict each other; drop one")
        if self.full and self.streaming:
            findings.append("--stream and --mode full contradict each other; give --chunk instead, or neither")
        if self.left is not None and self.chunk is None:
            findings.append(f"--left {self.left} is the number of frames before a chunk; give --chunk too")
        if self.chunk is not None and self.chunk < 1:
            findings.append(f"--chunk {self.chunk}: must be at least 1 (frames of 40 ms)")
        if self.left is not None and self.left < 0:
            findings.append(f"--left {self.left}: must be at least 0 (frames of 40 ms)")
        return findings

    def among(self, trained: Sequence[Context], attends: bool, where: str) -> Context:
        """The context to decode in.

        ``--chunk`` without ``--left`` takes the left context trained with that chunk. Without attention (``attends``
        False) the left context has no effect, and one that was never trained is 0.

        Raises:
            UserError: the options contradict each other, or the left context cannot be known.
        """
        if findings := self.contradictions():
            raise UserError.of(findings)
        if self.full:
            return FULL
        if self.chunk is None:
            fitting = [context for context in trained if context.streaming or not self.streaming]
            return fitting[0] if fitting else UNTRAINED_STREAM
        if self.left is not None:
            return Context(self.chunk, self.left)
        for context in trained:
            if context.chunk == self.chunk:
                return context
        if not attends:
            return Context(self.chunk, 0)
        raise UserError(
            f"{where} was trained in {listed(trained)}, not in chunks of {self.chunk}; "
            "choose one of these, or give with --left the number of frames before the chunk that attention sees"
        )


def was_trained(context: Context, trained: Sequence[Context], attends: bool) -> bool:
    """Whether a variant was trained in ``context``; the left context only counts where there is attention."""
    return context in trained or (not attends and context.chunk in [other.chunk for other in trained])


def listed(contexts: Sequence[Context]) -> str:
    """``full; chunk=16,left=64``."""
    return "; ".join(map(str, contexts))


def export_context(
    trained: Sequence[Context], attends: bool, choice: ContextChoice, where: str, warn: Callable[[str], None]
) -> Context:
    """The context to export in: full, or the streaming one of ``choice``; only a kind the variant was trained for.

    Raises:
        UserError: the variant was never trained in this kind, or the left context cannot be known.
    """
    if not choice.streaming:
        if FULL not in trained:
            raise UserError(f"{where} was trained in {listed(trained)} only, not in full context; give --streaming")
        return FULL
    if not any(context.streaming for context in trained):
        raise UserError(
            f"{where} was trained in full context only, so it cannot stream: its convolutions and attention would lack "
            "the future frames they were trained with; train it with --set 'contexts.train=[full,\"chunk=16,left=64\"]'"
        )
    context = choice.among(trained, attends, where)
    if not was_trained(context, trained, attends):
        warn(f"{where} was never trained in context {context}, only in {listed(trained)}; expect more errors")
    return context
