"""sherpa-onnx in a process of its own, since a model it does not like ends the process. Run as a program by ``sherpa``.

Standard input: a line of JSON with the recognizer to make, then for each batch a line of JSON with the numbers of samples and the samples
themselves, float32. Standard output: a line of JSON once the recognizer is ready, and one for each batch: [text, log-probabilities].
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any, BinaryIO

import numpy as np

RATE = 16000


def main() -> None:
    """Serve batches until standard input ends."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the library prints goes to the errors
    requests = sys.stdin.buffer
    job = json.loads(requests.readline())
    import sherpa_onnx

    factory = getattr(
        sherpa_onnx.OnlineRecognizer if job["online"] else sherpa_onnx.OfflineRecognizer, job["constructor"]
    )
    recognizer = factory(**job["arguments"])
    decode = _decode_online if job["online"] else _decode_offline
    print(json.dumps("ready"), file=replies, flush=True)
    while line := requests.readline():
        waves = [_read(requests, count) for count in json.loads(line)]
        print(json.dumps(decode(recognizer, waves, job["tail"])), file=replies, flush=True)


def _read(requests: BinaryIO, count: int) -> np.ndarray:
    return np.frombuffer(requests.read(4 * count), dtype=np.float32)


def _decode_offline(recognizer: Any, waves: list[np.ndarray], tail: float) -> list[Any]:
    streams = []
    for wave in waves:
        streams.append(recognizer.create_stream())
        streams[-1].accept_waveform(RATE, wave)
    recognizer.decode_streams(streams)
    # Older versions have no log-probabilities of offline models.
    return [[stream.result.text, list(getattr(stream.result, "ys_log_probs", []))] for stream in streams]


def _decode_online(recognizer: Any, waves: list[np.ndarray], tail: float) -> list[Any]:
    streams = []
    for wave in waves:
        streams.append(recognizer.create_stream())
        streams[-1].accept_waveform(RATE, wave)
        streams[-1].accept_waveform(RATE, np.zeros(round(tail * RATE), dtype=np.float32))
        streams[-1].input_finished()
    while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
        recognizer.decode_streams(ready)
    return [[recognizer.get_result(stream), list(recognizer.ys_probs(stream))] for stream in streams]


if __name__ == "__main__":
    main()
