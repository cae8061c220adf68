"""Real speech anyone can get: the telephone prompts of Debian's archive, one speaker for each of five languages.

The packages are asterisk-core-sounds-XX (the texts) and asterisk-core-sounds-XX-g722 (16 kHz), CC-BY-SA-3.0 (it, ru: CC-BY-3.0).
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soundfile
from lhotse.cut import Cut

from asrkit.data.corpora.debian import ELSEWHERE, fetch_packages, members_of
from asrkit.data.corpora.record import already_made, begin, write_record
from asrkit.data.manifests import make_cut, write_cuts
from asrkit.data.text.normalization import SPLITS, TextError, as_written, normalize, split_of
from asrkit.disk import atomic_write
from asrkit.errors import UserError
from asrkit.frames import SAMPLE_RATE

LANGUAGES = ("en", "es", "fr", "it", "ru")
MAX_CHARACTERS_A_SECOND = 25  # the fastest of these speakers says 22
SILENCE_PEAK = 1e-3  # -60 dBFS
RULES = 2  # counts up when what is kept, or how it is written, changes
RECORD = "prompts.json"  # written last: its presence says that the folder is complete


@dataclass(frozen=True)
class Dropped:
    """An utterance that is not in the manifests, and why."""

    cut_id: str
    reason: str
    text: str


@dataclass
class Prompts:
    """What the folder holds: cuts by split and the utterances left out."""

    cuts: dict[str, list[Cut]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    dropped: list[Dropped] = field(default_factory=list)


def fetch_prompts(
    languages: Sequence[str],
    out: Path,
    *,
    cache: Path | None = None,
    style: str = "words",
    dev: float = 0.1,
    test: float = 0.1,
    say: Callable[[str], None] = print,
) -> Prompts | None:
    """Make OUT/{train,dev,test}.jsonl.gz (and one set a language) and OUT/audio/LANG/*.flac, 16 kHz mono.

    Returns:
        What was made, or None where ``out`` already holds exactly this.

    Raises:
        UserError: an unknown language, no apt-get, a failed download, a damaged package; ``out`` holds another train.jsonl.gz.
    """
    languages = sorted(set(languages))
    if unknown := [language for language in languages if language not in LANGUAGES]:
        raise UserError(f"--lang {', '.join(unknown)}: there are prompts in {', '.join(LANGUAGES)}; {ELSEWHERE}")
    wanted = {"rules": RULES, "languages": languages, "text": style, "dev": dev, "test": test}
    record, made = out / RECORD, out / "train.jsonl.gz"
    if already_made(record, wanted, made, replace=True):
        return None
    names = [f"asterisk-core-sounds-{language}{kind}" for language in languages for kind in ("", "-g722")]
    packages = fetch_packages(names, cache or out / "packages", say)
    begin(record, made)
    prompts = Prompts()
    for language, texts, sounds in zip(languages, packages[::2], packages[1::2], strict=True):
        say(f"{language}: decoding {sounds.name}")
        _add_language(prompts, language, texts, sounds, out, style=style, dev=dev, test=test)
    for split, cuts in prompts.cuts.items():
        if split != "train":
            write_cuts(out / f"{split}.jsonl.gz", cuts)
        for language in languages if len(languages) > 1 else ():
            write_cuts(
                out / f"{split}-{language}.jsonl.gz", (c for c in cuts if c.supervisions[0].language == language)
            )
    with atomic_write(out / "dropped.tsv") as temporary:
        lines = ["id\treason\ttext", *(f"{d.cut_id}\t{d.reason}\t{d.text}" for d in prompts.dropped)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_cuts(made, prompts.cuts["train"])  # last: where it is, the others are
    write_record(record, wanted)
    return prompts


def _add_language(
    prompts: Prompts, language: str, texts: Path, sounds: Path, out: Path, *, style: str, dev: float, test: float
) -> None:
    listing = f"core-sounds-{language}.txt.gz"
    listings = [content for name, content in members_of(texts) if name.endswith(listing)]
    if not listings:
        raise UserError(f"{texts}: holds no {listing}; delete the file, so that it is downloaded again")
    try:
        raw_texts = parse_listing(gzip.decompress(listings[0]).decode("utf-8-sig"))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(
            f"{texts}: {listing} is damaged ({error}); delete the file, so that it is downloaded again"
        ) from error
    recordings = {}
    for name, content in members_of(sounds):
        if name.endswith(".g722"):  # ./usr/share/asterisk/sounds/en_US_f_Allison/digits/1.g722
            voice, _, prompt = name.partition("/sounds/")[2].removesuffix(".g722").partition("/")
            recordings[prompt] = (voice, content)

    def read(prompt: str) -> tuple[str, Cut] | Dropped:
        cut_id, raw_text = _cut_id(language, prompt), raw_texts.get(prompt, "")
        if prompt not in raw_texts:
            return Dropped(cut_id, "no text", "")
        if prompt not in recordings:
            return Dropped(cut_id, "no recording", raw_text)
        if any(other in raw_text for other in raw_texts if "-" in other and len(other) > 8):
            return Dropped(cut_id, "two prompts on one line", raw_text)
        try:
            text = as_written(raw_text) if style == "raw" else normalize(raw_text, language)
        except TextError as error:
            return Dropped(cut_id, error.reason, raw_text)
        if language == "ru" and re.search("[A-Za-z]", text):
            return Dropped(cut_id, "Latin letters", raw_text)  # names spelled in English
        voice, content = recordings[prompt]
        samples = decode_g722(content)
        if np.abs(samples.astype(np.int32)).max(initial=0) < SILENCE_PEAK * 2**15:
            return Dropped(cut_id, "silent", raw_text)
        if len(text) > MAX_CHARACTERS_A_SECOND * len(samples) / SAMPLE_RATE:
            return Dropped(cut_id, "too much text for the recording", raw_text)  # "a beep", and the like
        audio = out / "audio" / language / f"{cut_id.removeprefix(language + '-')}.flac"
        with atomic_write(audio) as temporary:
            soundfile.write(temporary, samples, SAMPLE_RATE, format="FLAC")
        return split_of(text, dev, test), make_cut(
            cut_id,
            audio,
            sampling_rate=SAMPLE_RATE,
            num_samples=len(samples),
            text=text,
            language=language,
            speaker=voice,
            custom={"raw_text": raw_text},
        )

    with ThreadPoolExecutor() as pool:  # libsndfile and the disk work outside Python's lock
        for made in pool.map(read, sorted({*raw_texts, *recordings})):
            if isinstance(made, Dropped):
                prompts.dropped.append(made)
            else:
                prompts.cuts[made[0]].append(made[1])


def _cut_id(language: str, prompt: str) -> str:
    return f"{language}-{prompt.replace('/', '_')}"


def parse_listing(text: str) -> dict[str, str]:
    """The texts by prompt name, from lines ``name: text``; a line that starts with ``;`` is a comment."""
    texts = {}
    for line in text.splitlines():
        name, colon, prompt = line.partition(":")
        if colon and not line.startswith(";"):
            texts[name.strip()] = prompt.strip().removeprefix(f"{name}:").strip()  # one line has its name twice
    return texts


def decode_g722(content: bytes) -> np.ndarray:
    """(num_samples,) int16 at 16 kHz from G.722 at 64 kbit/s, which holds two samples a byte."""
    from G722 import G722

    return np.array(G722(SAMPLE_RATE, 64000).decode(content), dtype=np.int16)
