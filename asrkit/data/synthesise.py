"""Synthetic speech by espeak-ng, to train on beside real speech when there is little of it. Never test data.

espeak-ng comes in the wheel ``espeakng-loader`` (GPL-3, hence the optional extra ``synth``): a shared library with its
data, called through ctypes. Voice, rate and pitch are drawn for each utterance from (seed, number).
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from lhotse.cut import Cut

from asrkit.data.features import SAMPLE_RATE, resample
from asrkit.data.manifests import make_cut
from asrkit.data.text import TextError, normalise
from asrkit.errors import UserError

# espeak-ng's own names: voices of a language, and the variants that make each of them another speaker.
VOICES = {
    "en": ["en-us", "en-gb", "en-gb-x-rp", "en-029"],
    "es": ["es", "es-419"],
    "fr": ["fr-fr", "fr-be", "fr-ch"],
    "it": ["it"],
    "ru": ["ru"],
}
VARIANTS = ["", "+f1", "+f2", "+f3", "+f4", "+f5", "+m1", "+m2", "+m3", "+m4", "+m5", "+m6", "+m7", "+Annie",
            "+belinda", "+Alicia", "+linda", "+steph", "+Andrea", "+anika"]  # fmt: skip
_RATE, _PITCH, _RANGE = 1, 3, 4  # espeak_PARAMETER
_SYNCHRONOUS, _UTF8 = 2, 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """espeak-ng in this process; one voice at a time.

    Raises:
        UserError: the wheel is not installed.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise UserError("synthetic speech needs espeak-ng: pip install 'asrkit[synth]'") from error
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        self._pieces: list[np.ndarray] = []
        self._receive = _CALLBACK(self._keep)  # held: the library calls it as long as it lives
        self.sample_rate: int = self._library.espeak_Initialize(
            _SYNCHRONOUS, 0, str(espeakng_loader.get_data_path()).encode(), 0)
        if self.sample_rate <= 0:
            raise UserError("espeak-ng does not start; reinstall espeakng-loader")
        self._library.espeak_SetSynthCallback(self._receive)

    def _keep(self, samples: ctypes._Pointer, count: int, events: object) -> int:
        if samples and count > 0:
            self._pieces.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, rate: int, pitch: int, pitch_range: int) -> np.ndarray:
        """Speak ``text``: float32 samples at ``sample_rate``; ``rate`` in words a minute, the others 0 to 100."""
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice}; `espeak-ng --voices` lists them")
        for parameter, value in ((_RATE, rate), (_PITCH, pitch), (_RANGE, pitch_range)):
            self._library.espeak_SetParameter(parameter, value, 0)
        self._pieces.clear()
        encoded = text.encode()
        self._library.espeak_Synth(encoded, len(encoded) + 1, 0, 1, 0, _UTF8, None, None)
        self._library.espeak_Synchronize()
        if not self._pieces:
            return np.zeros(0, np.float32)
        return np.concatenate(self._pieces).astype(np.float32) / 32768.0


def synthesise(texts: Sequence[str], language: str, folder: Path, *, minutes: float, voices: Sequence[str] = (),
               telephone: bool = False, seed: int = 1, advance: Callable[[float], None] = lambda seconds: None) -> list[Cut]:
    """Speak ``texts`` in turn, again and again in other voices, until ``minutes`` are full; FLACs below ``folder``.

    Args:
        voices: espeak-ng voice names, as ``en-us+f3``; by default all variants of the language's voices.
        telephone: limit the band to 4 kHz, as an 8 kHz line does.
        advance: called with the seconds of each utterance.

    Raises:
        UserError: no text, an unknown voice, espeak-ng missing.
    """
    if not texts:
        raise UserError("nothing to say: no text is left; give more --text or fewer --exclude")
    engine = Espeak()
    every = list(voices) or [voice + variant for voice in VOICES.get(language, [language]) for variant in VARIANTS]
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    cuts: list[Cut] = []
    seconds, number = 0.0, 0
    while seconds < minutes * 60:
        random = np.random.default_rng((seed, number))
        text, voice = texts[number % len(texts)], every[random.integers(len(every))]
        samples = torch.from_numpy(engine.say(
            text, voice, int(random.integers(120, 200)), int(random.integers(25, 80)), int(random.integers(25, 80))))
        number += 1
        if len(samples) < engine.sample_rate // 5:
            if number > 10 * len(texts) and not cuts:
                raise UserError(f"espeak-ng says nothing in {language}; is it one of its languages?")
            continue
        samples = resample(samples, engine.sample_rate)
        if telephone:
            samples = resample(resample(samples, SAMPLE_RATE, 8000), 8000, SAMPLE_RATE)
        path = folder / "audio" / f"{language}-{number:06d}.flac"
        soundfile.write(path, samples.numpy(), SAMPLE_RATE)
        cuts.append(make_cut(
            f"synthetic-{language}-{number:06d}", path, sampling_rate=SAMPLE_RATE, num_samples=len(samples),
            text=text, language=language, speaker=f"espeak-{voice}"))
        seconds += cuts[-1].duration
        advance(cuts[-1].duration)
    return cuts


def remix(texts: Sequence[str], count: int, seed: int, max_words: int = 14) -> list[str]:
    """``count`` new word sequences, each word drawn from those that follow its predecessor in ``texts``.

    They give known words other neighbours, within the manner of the texts. Fewer come back when the texts hold no
    more different ones.
    """
    random = np.random.default_rng(seed)
    followers: dict[str, list[str]] = {}
    for text in texts:
        words = ["", *text.split(), ""]
        for word, after in zip(words, words[1:], strict=False):
            followers.setdefault(word, []).append(after)
    found: dict[str, None] = {}
    for _ in range(20 * count):
        words, word = [], ""
        while len(words) < max_words and (word := str(random.choice(followers[word]))):
            words.append(word)
        if words:
            found[" ".join(words)] = None
        if len(found) == count:
            break
    return list(found)


def sentences(raw: str, language: str, shortest: int = 3, longest: int = 12) -> Iterable[str]:
    """Normalised sentences of ``shortest`` to ``longest`` words from running text; those that cannot be spelled are left."""
    for part in re.split(r'[.!?;:%"()\[\]]|--|\n\s*\n', raw):
        try:
            text = normalise(" ".join(part.split()), language)
        except TextError:
            continue
        if shortest <= len(text.split()) <= longest:
            yield text
