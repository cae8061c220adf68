"""sherpa-onnx itself, on what `asrkit export` writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from asrkit.decoding.search import Method
from asrkit.export.directory import open_exported
from asrkit.export.readme import tail_seconds

CLIENT = """
import json, sys
import numpy, sherpa_onnx, soundfile

job = json.load(sys.stdin)
files = {name: job["path"] + "/" + name + ".onnx" for name in ("encoder", "decoder", "joiner")}
shared = {"tokens": job["path"] + "/tokens.txt", "num_threads": 1}
method = {"greedy": "greedy_search", "beam": "modified_beam_search"}.get(job["method"])

def ids(symbols):
    table = dict(line.rsplit(" ", 1) for line in open(shared["tokens"], encoding="utf-8").read().splitlines())
    return [int(table[symbol.replace(" ", "\\u2581")]) for symbol in symbols]

def waves():
    for path in job["audio"]:
        samples, rate = soundfile.read(path, dtype="float32")
        yield rate, numpy.concatenate([samples, numpy.zeros(int(job["tail"] * rate), dtype=numpy.float32)])

def accept(recognizer):
    streams = []
    for rate, samples in waves():
        streams.append(recognizer.create_stream())
        streams[-1].accept_waveform(rate, samples)
    return streams

if not job["streaming"]:
    make = sherpa_onnx.OfflineRecognizer
    recognizer = (
        make.from_zipformer_ctc(model=job["path"] + "/ctc.onnx", **shared, **job["options"]) if method is None
        else make.from_transducer(**files, **shared, decoding_method=method, **job["options"])
    )
    streams = accept(recognizer)
    recognizer.decode_streams(streams)
    found = [(ids(stream.result.tokens), list(stream.result.timestamps)) for stream in streams]
else:
    make = sherpa_onnx.OnlineRecognizer
    endpoint = {"enable_endpoint_detection": True, "rule3_min_utterance_length": 0.6} if job["endpoint"] else {}
    recognizer = (
        make.from_zipformer2_ctc(model=job["path"] + "/ctc.onnx", **shared, **endpoint, **job["options"]) if method is None
        else make.from_transducer(**files, **shared, **endpoint, decoding_method=method, **job["options"])
    )
    streams = accept(recognizer)
    for stream in streams:
        stream.input_finished()
    sizes, endpoints = [], 0
    while ready := [stream for stream in streams if recognizer.is_ready(stream)]:
        recognizer.decode_streams(ready)
        sizes.append(len(ready))
        for stream in ready:
            if recognizer.is_endpoint(stream):
                endpoints += 1
                recognizer.reset(stream)
    found = [(ids(recognizer.tokens(stream)), recognizer.timestamps(stream)) for stream in streams]
    if job["endpoint"]:
        found = endpoints
    else:
        assert sizes[0] == len(streams) and sizes[-1] == 1, sizes
print(json.dumps(found))
"""


def client(path: Path, audio: list[Path], method: Method, endpoint: bool = False, **options: Any) -> Any:
    """What sherpa-onnx finds: (tokens, seconds) of each recording, or the number of endpoints.

    In a process of its own: a model it does not like ends the process. ``options``: further ones of its recognizer.
    """
    pytest.importorskip("sherpa_onnx", reason="needs sherpa-onnx, which runs what is exported")
    context = open_exported(path).parsed_context
    job = {
        "path": str(path),
        "audio": [str(file) for file in audio],
        "method": method,
        "endpoint": endpoint,
        "options": options,
    }
    job |= {"streaming": context.streaming, "tail": 0.0 if context.chunk is None else tail_seconds(context.chunk)}
    done = subprocess.run([sys.executable, "-c", CLIENT], input=json.dumps(job), capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])
