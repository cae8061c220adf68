"""Cuts by index: their JSON text as it lies in the manifest, so that a million cuts stay a few hundred megabytes, are shared by
all loader processes without copies, and any one is reached at once.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from lhotse import SupervisionSegment
from lhotse.cut import Cut, MixedCut, MonoCut
from lhotse.serialization import deserialize_item
from lhotse.utils import add_durations

from asrkit.data.manifest_schema import without_nulls

# Of a cut: seconds, hash of its id, language of its first supervision, whether it is plain.
Row = tuple[float, int, str, bool]


@dataclass(frozen=True)
class Columns:
    """What is known of N cuts without reading their JSON.

    durations: (N,) float64, seconds. hashes: (N,) uint64, of their ids. languages: (N,) int32, the index of the first supervision's
    language among ``names``; the empty string is none.
    plain: (N,) bool: a cut of one channel that lies within its recording, with one supervision, which lies within the cut
        and has words. Nothing is wrong with such a cut but perhaps its duration, its language, its characters or its audio.
    """

    durations: np.ndarray
    hashes: np.ndarray
    languages: np.ndarray
    plain: np.ndarray
    names: tuple[str, ...]

    @classmethod
    def of(cls, cuts: Iterable[Cut]) -> Columns:
        """Those of cuts, each of which has a supervision."""
        return cls.of_rows(map(row_of, cuts))

    @classmethod
    def of_rows(cls, rows: Iterable[Row]) -> Columns:
        """Those of cuts, from what ``row_of`` or ``row_of_json`` says of each."""
        durations, hashes, languages, plain = zip(*listed, strict=True) if (listed := list(rows)) else ((), (), (), ())
        names = {name: number for number, name in enumerate(dict.fromkeys(languages))}
        return cls(
            np.array(durations, dtype=np.float64),
            np.array(hashes, dtype=np.uint64),
            np.array([names[name] for name in languages], dtype=np.int32),
            np.array(plain, dtype=bool),
            tuple(names),
        )

    def take(self, rows: np.ndarray) -> Columns:
        """Those of some of the cuts."""
        return Columns(self.durations[rows], self.hashes[rows], self.languages[rows], self.plain[rows], self.names)

    @staticmethod
    def joined(parts: Sequence[Columns]) -> Columns:
        """Those of all cuts of ``parts``, in order."""
        names = tuple(dict.fromkeys(name for part in parts for name in part.names))
        numbers = {name: number for number, name in enumerate(names)}
        languages = [np.array([numbers[name] for name in part.names], np.int32)[part.languages] for part in parts]
        return Columns(
            np.concatenate([part.durations for part in parts]),
            np.concatenate([part.hashes for part in parts]),
            np.concatenate(languages),
            np.concatenate([part.plain for part in parts]),
            names,
        )


def hash_of(cut_id: str) -> int:
    """64 bits that tell ids apart; ids with equal hashes have to be compared."""
    return int.from_bytes(hashlib.blake2b(cut_id.encode(), digest_size=8).digest(), "little")


def row_of(cut: Cut) -> Row:
    """What ``Columns`` know of a cut that has a supervision."""
    return cut.duration, hash_of(cut.id), cut.supervisions[0].language or "", _is_plain(cut)


def _is_plain(cut: Cut) -> bool:
    if not isinstance(cut, MonoCut) or len(cut.supervisions) != 1:
        return False
    (supervision,) = cut.supervisions
    within = cut.recording is None or cut.end <= cut.recording.duration
    spoken = 0 <= supervision.start < cut.duration and supervision.end > 0
    return within and spoken and bool((supervision.text or "").strip())


# All that the JSON object of a cut over a part of a recording may have, so that lhotse takes every value as it is.
_CUT_KEYS = {"id", "type", "start", "duration", "channel", "supervisions", "recording", "custom"}
_RECORDING_KEYS = {"id", "sources", "sampling_rate", "num_samples", "duration", "channel_ids"}
_SOURCE_KEYS = {"type", "channels", "source"}
_SUPERVISION_KEYS = {
    *("id", "recording_id", "start", "duration", "channel", "text", "language", "speaker", "gender", "custom"),
}


def row_of_json(data: Mapping[str, Any]) -> Row | None:
    """``row_of`` of a cut's JSON object without the cut, which takes three times as long; None where that has to be made.

    Args:
        data: an object in which ``check_cut`` finds nothing wrong, without nulls.
    """
    if data["type"] != "MonoCut" or not data.keys() <= _CUT_KEYS or "recording" not in data:
        return None
    recording, supervisions = data["recording"], data.get("supervisions", ())
    if len(supervisions) != 1 or not recording.keys() <= _RECORDING_KEYS:
        return None
    (supervision,) = supervisions
    if not supervision.keys() <= _SUPERVISION_KEYS or not supervision.get("text", "").strip():
        return None
    if not all(source.keys() <= _SOURCE_KEYS for source in recording["sources"]):
        return None
    for custom in (data.get("custom", {}), supervision.get("custom", {})):
        if any(isinstance(value, dict) for value in custom.values()):
            return None  # perhaps an array or a recording
    duration = data["duration"]
    within = add_durations(data["start"], duration, sampling_rate=recording["sampling_rate"]) <= recording["duration"]
    spoken = (
        0 <= supervision["start"] < duration and round(supervision["start"] + supervision["duration"], ndigits=8) > 0
    )
    return duration, hash_of(data["id"]), supervision.get("language", ""), within and spoken


def with_supervision(cut: Cut) -> Cut:
    """The cut, with one supervision without words if it has none."""
    if not cut.supervisions:
        recording = cut.recording_id if cut.has_recording and not isinstance(cut, MixedCut) else cut.id
        cut.supervisions = [SupervisionSegment(cut.id, recording, 0, cut.duration, text="")]
    return cut


class CutTable(Sequence[Cut]):
    """Cuts by index, in constant time and without a Python object for each; every access makes a new object.

    Args:
        cuts: read once, in order; one without a supervision is given one without words.

    Attributes:
        columns: what is known of the cuts without reading them.
        digest: of the manifest that it holds, whole and in order; None for other tables.
    """

    def __init__(self, cuts: Iterable[Cut] = ()) -> None:
        listed = list(map(with_supervision, cuts))
        lines = [json.dumps(cut.to_dict(), ensure_ascii=False).encode() for cut in listed]
        ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        starts = np.concatenate([np.zeros(min(1, len(ends)), np.int64), ends[:-1]])
        self._fill([np.frombuffer(b"".join(lines), dtype=np.uint8)], starts, ends, None, Columns.of(listed))

    def _fill(
        self,
        texts: list[np.ndarray],
        starts: np.ndarray,
        ends: np.ndarray,
        parts: np.ndarray | None,
        columns: Columns,
        digest: str | None = None,
    ) -> None:
        self._texts, self._starts, self._ends, self._parts = texts, starts, ends, parts
        self.columns, self.digest = columns, digest

    @classmethod
    def of_lines(
        cls, text: np.ndarray, starts: np.ndarray, ends: np.ndarray, columns: Columns, digest: str
    ) -> CutTable:
        """The cuts of a manifest's lines, text[start:end] of (bytes,) uint8, which are known to be cuts."""
        table = cls.__new__(cls)
        table._fill([text], starts, ends, None, columns, digest)
        return table

    @classmethod
    def joined(cls, tables: Sequence[CutTable]) -> CutTable:
        """All cuts of ``tables``, in order, without a copy of their text."""
        if len(tables) == 1:
            return tables[0]
        table = cls.__new__(cls)
        offsets = np.cumsum([0, *(len(one._texts) for one in tables)])
        table._fill(
            [text for one in tables for text in one._texts],
            np.concatenate([one._starts for one in tables]),
            np.concatenate([one._ends for one in tables]),
            np.concatenate([one._part_numbers() + offset for one, offset in zip(tables, offsets[:-1], strict=True)]),
            Columns.joined([one.columns for one in tables]),
        )
        return table

    def _part_numbers(self) -> np.ndarray:
        return np.zeros(len(self), np.int64) if self._parts is None else self._parts

    def take(self, rows: np.ndarray) -> CutTable:
        """Some of the cuts, without a copy of their text."""
        table = CutTable.__new__(CutTable)
        parts = None if self._parts is None else self._parts[rows]
        table._fill(self._texts, self._starts[rows], self._ends[rows], parts, self.columns.take(rows))
        return table

    def without(self, cut_ids: Collection[str]) -> CutTable:
        """The table without the cuts of these ids."""
        rows = self.rows_of(cut_ids)
        return self.take(np.delete(np.arange(len(self)), rows)) if len(rows) else self

    def rows_of(self, cut_ids: Collection[str]) -> np.ndarray:
        """The indices of the cuts of these ids, ascending."""
        hashes = np.fromiter(map(hash_of, cut_ids), np.uint64, len(cut_ids))
        rows = np.flatnonzero(np.isin(self.columns.hashes, hashes))
        return rows[[self._object(row)["id"] in cut_ids for row in rows.tolist()]] if len(rows) else rows

    @property
    def durations(self) -> np.ndarray:
        """(N,) seconds."""
        return self.columns.durations

    @property
    def languages(self) -> set[str]:
        """The languages of the cuts' first supervisions; the empty string is none."""
        return {self.columns.names[number] for number in np.unique(self.columns.languages)}

    def text_of(self, row: int) -> str:
        """All supervisions' texts of a cut, in order of time, joined by a space."""
        if self.columns.plain[row]:
            return str(self._object(row)["supervisions"][0]["text"])
        return text_of(self[row])

    def __len__(self) -> int:
        return len(self._ends)

    def _object(self, row: int) -> Any:
        """The JSON object of a cut."""
        text = self._texts[0 if self._parts is None else self._parts[row]]
        line = text[self._starts[row] : self._ends[row]].tobytes().decode()
        return without_nulls(json.loads(line)) if "null" in line else json.loads(line)

    @overload
    def __getitem__(self, index: int) -> Cut: ...
    @overload
    def __getitem__(self, index: slice) -> CutTable: ...
    def __getitem__(self, index: int | slice) -> Cut | CutTable:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return with_supervision(deserialize_item(self._object(index)))

    def __iter__(self) -> Iterator[Cut]:
        return (self[row] for row in range(len(self)))


def spread(count: int, most: int) -> np.ndarray:
    """At most ``most`` of the rows 0 to ``count`` - 1, ascending and evenly spread."""
    return np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))


def text_of(cut: Cut) -> str:
    """All supervisions' texts of a cut, in order of time, joined by a space."""
    return " ".join(s.text or "" for s in sorted(cut.supervisions, key=lambda s: s.start))
