"""The samples and the features of a cut: the one way from a manifest to numbers, for checks as for training.

Files are read by libsndfile alone. lhotse's own choice of decoders calls a shell for NIST SPHERE and asks ffmpeg for what
libsndfile does not know.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from lhotse import Features, Recording
from lhotse.audio.backend import LibsndfileBackend, set_current_audio_backend
from lhotse.cut import Cut, MixedCut, MonoCut, MultiCut
from lhotse.utils import compute_num_samples
from torch import Tensor

from asrkit.config import digest
from asrkit.data.cut_table import CutTable, spread
from asrkit.data.features import NUM_MEL_BINS, can_resample, fbank, resample
from asrkit.data.manifest_schema import check_source, recordings_in
from asrkit.data.remembered import WORTH, recall, remember
from asrkit.data.shar import loaded
from asrkit.errors import UserError, clip
from asrkit.frames import FRAME_SHIFT, SAMPLE_RATE, count_features

TOLERANCE = 0.02  # seconds a file may be shorter than its manifest says, as decoders differ
SILENCE_PEAK = 1e-3  # -60 dBFS
FBANKS = ("kaldi-fbank", "kaldifeat-fbank", "fbank")  # what lhotse calls Kaldi's log-mel features
FRAME_TOLERANCE = 2  # feature frames
MANY = 50_000  # cuts, of which fewer are looked at for the statistics of features

set_current_audio_backend(LibsndfileBackend())


class CutError(UserError):
    """A cut that cannot be read; ``kind`` and ``detail`` are those of a finding of `asrkit data check`."""

    def __init__(self, cut_id: str, kind: str, detail: str) -> None:
        super().__init__(f"cut {clip(cut_id)}: {kind}: {detail}")
        self.cut_id, self.kind, self.detail = cut_id, kind, detail

    def __reduce__(self) -> tuple[type[CutError], tuple[str, str, str]]:
        return CutError, (self.cut_id, self.kind, self.detail)  # a loader process hands it on


def cut_samples(cut: Cut) -> Tensor:
    """The audio of a cut: (num_samples,) float32, mono, 16 kHz.

    Raises:
        CutError: the audio cannot be read.
    """
    return resample(read_samples(cut), cut.sampling_rate)


def read_samples(cut: Cut) -> Tensor:
    """The audio of a cut at its own rate: (num_samples,) float32, the mean of the channels it chooses.

    Raises:
        CutError: ``unreadable``, ``rate`` (the file's is not the manifest's, or is odd), ``truncated``, ``values`` (not finite).
    """
    if not cut.has_recording:
        raise CutError(cut.id, "unreadable", "it has no recording")
    if not can_resample(cut.sampling_rate):
        raise CutError(
            cut.id,
            "rate",
            f"{cut.sampling_rate} samples a second take too much memory to resample; convert it to 16 kHz",
        )
    try:
        whole = loaded(cut, "recording")
        for kind, source in _sources(whole):
            check_source(kind, source)
            if kind == "file" and not Path(source).is_file():  # nor is a pipe or a device, which might never end
                raise CutError(cut.id, "unreadable", f"no file {clip(source)}; import again where the audio is")
        samples = _read_plain(whole) if _is_plain(whole) else whole.load_audio()
    except CutError:
        raise
    except Exception as error:  # libsndfile's and lhotse's are of many kinds
        raise CutError(cut.id, "unreadable", _reason(error)) from error
    if samples is None or samples.size == 0:
        raise CutError(cut.id, "unreadable", "the audio holds no samples")
    if not np.isfinite(samples).all():
        raise CutError(cut.id, "values", "the audio holds values that are not finite")
    return torch.from_numpy(np.ascontiguousarray(samples)).float().mean(dim=0)


def check_sound(cut: Cut, samples: Tensor) -> None:
    """
    Raises:
        CutError: ``silent``.
    """
    if samples.abs().max() < SILENCE_PEAK:
        raise CutError(cut.id, "silent", f"the peak lies below -60 dBFS{_other_channels(cut)}")


def _other_channels(cut: Cut) -> str:
    """A hint, where a cut points to one channel of several."""
    if not isinstance(cut, MonoCut) or cut.recording.num_channels < 2:
        return ""
    return f" in channel {cut.channel}, the one this cut points to, of {cut.recording.num_channels}"


def _reason(error: Exception) -> str:
    """What a library says, without the objects that lhotse prints after it."""
    first: BaseException | None = error
    while first is not None:  # lhotse copies libsndfile's error without its number, and cannot print the copy
        if isinstance(first, soundfile.LibsndfileError) and isinstance(first.code, int):
            return clip(first)
        first = first.__context__
    if "internal Lhotse's error" in str(error) or "Requested more audio" in str(error):
        return "its length is not what the manifest says; import it again"
    return clip(str(error).partition("[extra info]")[0]) or type(error).__name__


def _recordings(cut: Cut) -> Iterator[Recording]:
    if isinstance(cut, MixedCut):
        for track in cut.tracks:
            yield from _recordings(track.cut)
    elif getattr(cut, "recording", None) is not None:
        yield cut.recording


def _sources(cut: Cut) -> Iterator[tuple[str, Any]]:
    """Type and source of all that is read of a cut, of the recordings within its transforms too."""
    for recording in _recordings(cut):
        yield from ((source.type, source.source) for source in recording.sources)
    for nested in recordings_in(_transforms(cut)):
        yield from ((source["type"], source["source"]) for source in nested["sources"])


def _transforms(cut: Cut) -> list[Any]:
    """The transforms of a cut and of its recordings, as JSON."""
    every = [transform for recording in _recordings(cut) for transform in recording.transforms or []]
    every += getattr(cut, "transforms", None) or []
    return [transform if isinstance(transform, dict) else transform.to_dict() for transform in every]


def _is_plain(cut: Cut) -> bool:
    """Whether the cut is a stretch of one file, or of bytes in memory, as it is; lhotse does the rest."""
    return (
        isinstance(cut, MonoCut | MultiCut)
        and not cut.recording.transforms
        and len(cut.recording.sources) == 1
        and cut.recording.sources[0].type in ("file", "memory")
    )


def _read_plain(cut: MonoCut | MultiCut) -> np.ndarray:
    """(channels, num_samples); lhotse's own reading does not notice another rate."""
    (source,), rate = cut.recording.sources, cut.recording.sampling_rate
    if source.type == "memory":
        name, file = "its bytes", io.BytesIO(source.source)
    else:
        name, file = clip(source.source), source.source
    wanted = cut.channel if isinstance(cut.channel, list) else [cut.channel]
    if missing := [channel for channel in wanted if channel not in source.channels]:
        raise CutError(cut.id, "unreadable", f"channel {missing[0]} is not among those of its recording")
    with soundfile.SoundFile(file) as audio:
        if audio.samplerate != rate:
            raise CutError(
                cut.id, "rate", f"{name} is at {audio.samplerate} Hz, the manifest says {rate}; import again"
            )
        if audio.channels != len(source.channels):
            detail = f"{name} has {audio.channels} channels, the manifest says {len(source.channels)}; import again"
            raise CutError(cut.id, "unreadable", detail)
        first, length = compute_num_samples(cut.start, rate), compute_num_samples(cut.duration, rate)
        if first:  # an MP3 decoder that is sent to its beginning makes other samples than one that starts there
            audio.seek(min(first, audio.frames))
        samples = audio.read(length, dtype="float32", always_2d=True).T
    if samples.shape[1] == 0:
        raise CutError(cut.id, "unreadable", "the audio holds no samples")
    missing_samples = length - samples.shape[1]
    if missing_samples > rate * TOLERANCE:
        detail = f"{name} ends {missing_samples / rate:.2f} s early; restore the file or import again"
        raise CutError(cut.id, "truncated", detail)
    if missing_samples > 0:  # as lhotse fills it up
        samples = np.pad(samples, ((0, 0), (0, missing_samples)), mode="reflect")
    return samples[[source.channels.index(channel) for channel in wanted]]


def cut_features(cut: Cut) -> Tensor:
    """(T, 80) features of a cut: stored ones where the manifest has them, else from its audio.

    Raises:
        CutError: unreadable audio, or features of another kind.
    """
    return stored_features(cut) if cut.has_features else fbank(cut_samples(cut))


def stored_features(cut: Cut) -> Tensor:
    """(T, 80) features that are stored beside the audio, which are then what a model is trained on.

    Raises:
        CutError: ``unreadable``, ``features`` (another kind, rate or dimension), ``truncated``, ``values`` (not finite).
    """
    for manifest in _features(cut):
        if problem := _other_kind(manifest):
            raise CutError(cut.id, "features", f"{problem}; compute them with lhotse's Fbank of 80 bins, or drop them")
        if (path := _file_of(manifest)) is not None and not path.is_file():
            raise CutError(cut.id, "unreadable", f"no file {clip(path)} of stored features; restore it, or drop them")
    try:
        features = np.asarray(loaded(cut, "features").load_features())
    except Exception as error:  # lhotse raises many kinds
        raise CutError(cut.id, "unreadable", f"its stored features: {_reason(error)}") from error
    if features.ndim != 2 or features.shape[1] != NUM_MEL_BINS:
        shape = " x ".join(map(str, features.shape))
        raise CutError(
            cut.id, "features", f"the stored features are {shape}, not T x {NUM_MEL_BINS}; compute them again"
        )
    expected = count_features(cut.duration)
    if abs(len(features) - expected) > FRAME_TOLERANCE:
        raise CutError(
            cut.id,
            "truncated",
            f"{len(features)} stored feature frames for {cut.duration:.2f} s, not {expected}; compute them again",
        )
    if not np.isfinite(features).all():
        raise CutError(cut.id, "values", "the stored features hold values that are not finite")
    return torch.from_numpy(np.array(features, dtype=np.float32))


def files_of(cut: Cut) -> Iterator[tuple[str, int, int]]:
    """The files that a cut is read from: name, size in bytes and time of the last change; -1 where there is none."""
    names = [source.source for one in _recordings(cut) for source in one.sources if source.type == "file"]
    names += [str(path) for one in _features(cut) if (path := _file_of(one)) is not None]
    for name in names:
        try:
            status = os.stat(name)
            yield str(name), status.st_size, status.st_mtime_ns
        except OSError:
            yield str(name), -1, -1


def _features(cut: Cut) -> Iterator[Features]:
    if isinstance(cut, MixedCut):
        for track in cut.tracks:
            yield from _features(track.cut)
    elif isinstance(getattr(cut, "features", None), Features):
        yield cut.features


def _file_of(manifest: Features) -> Path | None:
    """The file that stored features are in; None for those in memory or in a Shar directory."""
    if manifest.storage_type == "shar" or manifest.storage_type.startswith("memory"):
        return None
    whole = str(manifest.storage_path)
    return Path(f"{whole}/{manifest.storage_key}" if manifest.storage_type.endswith("_files") else whole)


def _other_kind(manifest: Features) -> str | None:
    """Why stored features are not those that audio would give."""
    if manifest.type not in FBANKS:
        return f"the stored features are {clip(manifest.type, 40)}, not log-mel energies"
    if manifest.num_features != NUM_MEL_BINS:
        return f"the stored features have {manifest.num_features} bins, not {NUM_MEL_BINS}"
    if abs(manifest.frame_shift - FRAME_SHIFT) > 1e-6:
        return f"the stored features come every {1000 * manifest.frame_shift:g} ms, not every {1000 * FRAME_SHIFT:g}"
    if manifest.sampling_rate != SAMPLE_RATE:
        return f"the stored features are of audio at {manifest.sampling_rate} Hz, not {SAMPLE_RATE}"
    return None


def fingerprint(table: CutTable, rows: np.ndarray) -> str:
    """A digest of the names, sizes and times of the files of some cuts: what was found in them holds as long as they do not change."""
    return digest([[*files_of(table[row])] for row in rows.tolist()])


def feature_statistics(table: CutTable, skip_bad: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each mel bin over some cuts, evenly spread: (80,), (80,). Those of a large manifest are remembered.

    Of many cuts fewer are taken, so that a training starts soon: 500 utterances are an hour of speech.

    Raises:
        CutError: a cut that cannot be read, unless ``skip_bad``; none that can.
    """
    rows = spread(len(table), 2000 if len(table) < MANY else 500)
    if not table.digest or len(table) < WORTH:
        return _statistics(table, rows, skip_bad)
    # Another torch may round otherwise, and a run is the same wherever it starts.
    key = [table.digest, fingerprint(table, rows), str(skip_bad), str(torch.__version__)]
    if (known := recall("statistics", key)) is None:
        mean, std = _statistics(table, rows, skip_bad)
        known = {"mean": mean.numpy(), "std": std.numpy()}
        remember("statistics", key, known)
    return torch.from_numpy(known["mean"]), torch.from_numpy(known["std"])


def _statistics(table: CutTable, rows: np.ndarray, skip_bad: bool) -> tuple[Tensor, Tensor]:
    count = 0
    total = torch.zeros(NUM_MEL_BINS, dtype=torch.float64)
    squares = torch.zeros(NUM_MEL_BINS, dtype=torch.float64)
    for row in rows.tolist():
        try:
            features = cut_features(table[row]).double()
        except CutError:
            if not skip_bad:
                raise
            continue
        count += len(features)
        total += features.sum(0)
        squares += features.square().sum(0)
    if not count:
        raise CutError(table[0].id, "unreadable", "nor can any other cut be read; run `asrkit data check`")
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp(min=1e-4).sqrt().float()
