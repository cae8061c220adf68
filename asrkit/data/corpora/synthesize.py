"""Synthetic speech to train on: espeak-ng reads texts in many voices, or Piper in natural ones. Never for test data.

The extra ``synth`` brings espeak-ng with its data (GPL-3); it is a C library with one global state, called by ctypes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch
from lhotse.augmentation.resample import Resample
from lhotse.cut import Cut

from asrkit.data.corpora.channel import through_a_device
from asrkit.data.corpora.piper import Piper, PiperDraw, voice_files
from asrkit.data.corpora.record import already_made, begin, write_record
from asrkit.data.espeak import UTF8, interrupted_afterwards, load_espeak
from asrkit.data.features import resample
from asrkit.data.manifests import SYNTHETIC, digest_of, language_of, make_cut, open_cuts, text_of, write_cuts
from asrkit.data.parallel import ALONE, Workers, in_processes
from asrkit.data.text.languages import language_names
from asrkit.data.text.normalization import TextError, normalize, sentence_key
from asrkit.disk import check_not_read
from asrkit.errors import UserError
from asrkit.frames import SAMPLE_RATE

VARIANTS = ("", *(f"+f{i}" for i in range(1, 6)), *(f"+m{i}" for i in range(1, 9)))
BASE_VOICES = {"en": ("en-us", "en-us", "en", "en-gb-x-rp")}  # en is British; twice is twice as often
TELEPHONE_RATE = 8000
AT_ONCE = 500  # utterances whose samples are in memory
RECORD = "synthesis.json"
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER


@dataclass(frozen=True)
class Draw:
    """How one utterance is spoken: words per minute, pitch and its range in 0..100 (50 is the voice's own), seed of its noise."""

    voice: str
    rate: int
    pitch: int
    pitch_range: int
    seed: int


# Id, samples, their rate, text, language, how it is spoken, and what draws the rest.
Utterance = tuple[str, np.ndarray, int, str, str, "Draw | PiperDraw", np.random.Generator]


@dataclass
class Synthesized:
    """The cuts made, how many texts they were drawn from, and how many lines were unusable or excluded."""

    cuts: list[Cut]
    texts: int
    unusable: int
    excluded: int


def synthesize(
    sources: Sequence[tuple[Path, str]],
    out: Path,
    *,
    minutes: float,
    seed: int = 0,
    voices: Sequence[str] = (),
    band: str = "wide",
    chains: float = 0.0,
    exclude: Sequence[Path] = (),
    piper: Sequence[Path] | None = None,
    device: float = 0.0,
    workers: Workers = ALONE,
) -> Synthesized | None:
    """Write OUT/train.jsonl.gz and OUT/audio/*.flac: at least ``minutes`` of speech, 16 kHz mono.

    Args:
        sources: (file, language): text with one sentence a line, or a manifest, of which the language's cuts count.
        voices: espeak-ng voices of every language, with a variant (en-us+f2) or, without, in all of VARIANTS.
        band: "wide", or "telephone": nothing above 4 kHz.
        chains: share of the utterances that are new sentences, made of word pairs that occur in the texts.
        exclude: manifests whose sentences must not be said, such as test and dev.
        piper: files of Piper's voices, which speak in place of espeak-ng.
        device: share of the utterances that sound as if a device had recorded them.
        workers: who resamples and encodes.

    Returns:
        What was made, or None where ``out`` already holds exactly this.

    Raises:
        UserError: espeak-ng is missing, an unknown voice, no usable text; ``out`` holds something else.
    """
    wanted = {
        "sources": [[_digest(path), language] for path, language in sources],
        "exclude": [_digest(path) for path in exclude],
        "minutes": minutes,
        "seed": seed,
        "voices": list(voices),
        "band": band,
        "chains": chains,
        **({} if piper is None else {"piper": [_digest(path) for path in voice_files(piper)]}),
        **({} if device == 0 else {"device": device}),
    }
    record, made = out / RECORD, out / "train.jsonl.gz"
    check_not_read(made, [*(path for path, _ in sources), *exclude])
    if already_made(record, wanted, made):
        return None
    speaker: _Engine = _Espeak() if piper is None else Piper(piper)
    unseen = {sentence_key(text_of(cut)) for path in exclude for cut in open_cuts(path)}
    result = Synthesized([], 0, 0, 0)
    lists = []
    for path, language in sources:
        texts, unusable = read_texts(path, language)
        allowed = [text for text in texts if sentence_key(text) not in unseen]
        if not allowed:
            raise UserError(
                f"{path}: no usable text for language {language} ({unusable} lines cannot be read, "
                f"{len(texts)} are excluded); give one sentence a line, or cuts of this language"
            )
        voices_of_language = speaker.voices(language, voices)
        lists.append((language, voices_of_language, allowed))
        result.texts += len(allowed)
        result.unusable += unusable
        result.excluded += len(texts) - len(allowed)

    begin(record, made)
    result.cuts = _speak(speaker, out, _plan(lists, seed, chains, unseen), minutes * 60, seed, band, device, workers)
    write_cuts(made, result.cuts)
    write_record(record, wanted)
    return result


def _digest(path: Path) -> str | None:
    """A file's or a Shar directory's; None of one that is not there, which nothing on record has."""
    return digest_of(path, sound=False) if path.exists() else None


def _speak(
    speaker: _Engine,
    out: Path,
    plan: Iterator[tuple[str, list[str], str]],
    least: float,
    seed: int,
    band: str,
    device: float,
    workers: Workers,
) -> list[Cut]:
    """The first utterances of a plan that last ``least`` seconds together, written to OUT/audio.

    The engine speaks in this process, one utterance after the other, as each leaves espeak-ng in a state that the next one begins
    in; the ``workers`` resample and encode.
    """

    def store(utterance: Utterance) -> Cut:
        return _store(out, *utterance, band, device)

    numbered, cuts, seconds = enumerate(plan), list[Cut](), 0.0
    while seconds < least:
        said: list[Utterance] = []
        while seconds < least and len(said) < AT_ONCE:
            number, (language, voice_names, text) = next(numbered)
            random = np.random.default_rng((seed, number))
            draw = speaker.draw(random, voice_names)
            samples, rate = speaker.say(text, draw)
            seconds += len(samples) / rate
            said.append((f"syn-{language}-{number:06d}", samples, rate, text, language, draw, random))
        cuts += in_processes(store, said, workers, lambda utterance: f"utterance {utterance[0]}", threads=True)
    return cuts


def read_texts(path: Path, language: str) -> tuple[list[str], int]:
    """The different sentences of a text file or manifest in the language, as words, in order; and how many lines were unusable.

    Raises:
        UserError: the file cannot be read.
    """
    if path.is_dir() or path.name.endswith((".jsonl", ".jsonl.gz")):
        cuts, names = open_cuts(path), {*language_names(language)[-1:]}
        tags = {tag for tag in {*map(language_of, cuts)} if not tag or not names.isdisjoint(language_names(tag))}
        lines = [text_of(cut) for cut in cuts if language_of(cut) in tags]
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{path}: cannot read ({error}); give a UTF-8 file with one sentence a line, or a manifest"
            ) from error
    texts: dict[str, None] = {}
    unusable = 0
    for line in filter(str.strip, lines):
        try:
            texts[normalize(line, language)] = None
        except TextError:
            unusable += 1
    return list(texts), unusable


def all_voices(language: str, voices: Sequence[str] = ()) -> list[str]:
    """Voices to draw from: those given, else the language's own; each without a variant in every variant."""
    named = voices or BASE_VOICES.get(language, (language,))
    return [name + variant for name in named for variant in (("",) if "+" in name else VARIANTS)]


def _plan(
    lists: Sequence[tuple[str, list[str], list[str]]], seed: int, chains: float, unseen: set[str]
) -> Iterator[tuple[str, list[str], str]]:
    """Language, voices and text of each utterance, without end: languages in turn, each text once before any comes again."""
    streams = [(language, voices, _sentences(texts, seed, chains, unseen)) for language, voices, texts in lists]
    while True:
        for language, voices, sentences in streams:
            yield language, voices, next(sentences)


def _sentences(texts: list[str], seed: int, chains: float, unseen: set[str]) -> Iterator[str]:
    random = np.random.default_rng((seed, len(texts)))
    made = chain_sentences(texts, random)
    while True:
        for index in random.permutation(len(texts)):
            while random.uniform() < chains:
                text = next(made)
                if sentence_key(text) not in unseen:
                    yield text
            yield texts[index]


def chain_sentences(texts: Iterable[str], random: np.random.Generator, max_words: int = 12) -> Iterator[str]:
    """New sentences without end: words drawn by what follows the word before in ``texts``, ends of sentences included."""
    followers: dict[str, list[str]] = {}
    for text in texts:
        words = ["", *text.split(), ""]
        for word, following in pairwise(words):
            followers.setdefault(word, []).append(following)
    while True:
        words = [""]
        while len(words) <= max_words:
            words.append(followers[words[-1]][random.integers(len(followers[words[-1]]))])
            if not words[-1]:
                break
        yield " ".join(filter(None, words))


def _store(
    out: Path,
    cut_id: str,
    samples: np.ndarray,
    rate: int,
    text: str,
    language: str,
    draw: Draw | PiperDraw,
    random: np.random.Generator,
    band: str,
    device: float,
) -> Cut:
    wave = torch.from_numpy(samples.astype(np.float32) / 2**15)
    wave = resample(wave, rate)
    if band == "telephone":
        wave = _steep(TELEPHONE_RATE, SAMPLE_RATE)(_steep(SAMPLE_RATE, TELEPHONE_RATE)(wave))
    custom: dict[str, Any] = {SYNTHETIC: asdict(draw)}
    if device > 0 and random.uniform() < device:
        changed, custom["device"] = through_a_device(wave.numpy(), random)
        wave = torch.from_numpy(changed)
    wave = wave.clamp(-1, 1)
    audio = out / "audio" / f"{cut_id}.flac"
    audio.parent.mkdir(parents=True, exist_ok=True)
    # Not atomic, as fsync takes longer than all the rest: the manifest, written last, is what makes a file count.
    soundfile.write(audio, wave.numpy(), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return make_cut(
        cut_id,
        audio,
        sampling_rate=SAMPLE_RATE,
        num_samples=len(wave),
        text=text,
        language=language,
        speaker=draw.voice,
        custom=custom,
    )


@cache
def _steep(rate: int, new_rate: int) -> Resample:
    """A resampler with a longer filter than lhotse's default, which lets a third of the band above through."""
    return Resample(rate, new_rate, lowpass_filter_width=64)


class _Engine(Protocol):
    """What speaks. A draw says how one utterance is spoken, and is what ``draw`` gives."""

    def voices(self, language: str, names: Sequence[str]) -> list[str]: ...

    def draw(self, random: np.random.Generator, names: Sequence[str]) -> Any: ...

    def say(self, text: str, draw: Any) -> tuple[np.ndarray, int]: ...


class _Espeak:
    """espeak-ng in this process: one text at a time.

    Raises:
        UserError: the extra is not installed, or a voice is unknown.
    """

    def __init__(self) -> None:
        self._library, self.rate, self._pieces = load_espeak()

    def use(self, voice: str) -> None:
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(
                f"voice {voice}: espeak-ng has none of that name; see its list of languages, such as en-us, fr, it+f2"
            )

    def voices(self, language: str, names: Sequence[str]) -> list[str]:
        """``all_voices``; each is tried.

        Raises:
            UserError: espeak-ng does not have one.
        """
        every = all_voices(language, names)
        for voice in sorted(set(every)):
            self.use(voice)
        return every

    def draw(self, random: np.random.Generator, names: Sequence[str]) -> Draw:
        """How the next utterance is spoken, by one of the voices ``names``."""
        limits = ((130, 211), (25, 81), (25, 81), (0, 1 << 31))
        return Draw(str(random.choice(list(names))), *(int(random.integers(*pair)) for pair in limits))

    def say(self, text: str, draw: Draw) -> tuple[np.ndarray, int]:
        """(num_samples,) int16 and their rate."""
        self.use(draw.voice)
        for parameter, value in ((_RATE, draw.rate), (_PITCH, draw.pitch), (_RANGE, draw.pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(draw.seed))
        self._pieces.clear()
        encoded = text.encode() + b"\0"
        with interrupted_afterwards():
            failed = self._library.espeak_Synth(encoded, len(encoded), 0, 1, 0, UTF8, None, None) != 0
        if failed or not self._pieces:
            raise UserError(
                f"espeak-ng says nothing for '{text}' as {draw.voice}; remove the line or choose another voice"
            )
        return np.concatenate(self._pieces), self.rate
