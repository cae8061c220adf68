"""README.md of an exported directory: the very commands that run it."""

from __future__ import annotations

from asrkit.export.directory import Exported
from asrkit.export.graphs import LOOK_AHEAD

_HEAD = """\
# Speech recogniser, configuration {configuration}

{about}
Input: mono audio of any rate, which the runtime brings to 16 kHz. Run the commands in this directory.

    pip install sherpa-onnx soundfile

"""

_OFFLINE = """\
## Transducer, a whole recording at once

```python
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OfflineRecognizer.from_transducer(
    encoder="encoder.onnx",
    decoder="decoder.onnx",
    joiner="joiner.onnx",
    tokens="tokens.txt",
    decoding_method="greedy_search",  # or "modified_beam_search"
)
samples, rate = soundfile.read("a.wav", dtype="float32", always_2d=True)
stream = recognizer.create_stream()
stream.accept_waveform(rate, samples.mean(axis=1))
recognizer.decode_stream(stream)
print(stream.result.text)
```

The same with the C++ program:

```sh
sherpa-onnx-offline --encoder=encoder.onnx --decoder=decoder.onnx --joiner=joiner.onnx --tokens=tokens.txt a.wav
```

## CTC, a whole recording at once

As above, with

```python
recognizer = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(model="ctc.onnx", tokens="tokens.txt")
```

```sh
sherpa-onnx-offline --zipformer-ctc-model=ctc.onnx --tokens=tokens.txt a.wav
```
"""

_STREAMING = """\
## Transducer, while the sound comes in

Chunks of {chunk_ms:.0f} ms, results {latency_ms:.1f} ms after the sound at the latest. The runtime starts a chunk only when
more than {window} feature frames of 10 ms wait, so at the end the sound needs {tail:.2f} s of silence after it, or its last
words are lost.

```python
import numpy
import sherpa_onnx
import soundfile

recognizer = sherpa_onnx.OnlineRecognizer.from_transducer(
    encoder="encoder.onnx",
    decoder="decoder.onnx",
    joiner="joiner.onnx",
    tokens="tokens.txt",
    decoding_method="greedy_search",  # or "modified_beam_search"
)
samples, rate = soundfile.read("a.wav", dtype="float32", always_2d=True)
stream = recognizer.create_stream()
for block in numpy.array_split(samples.mean(axis=1), max(1, len(samples) * 10 // rate)):
    stream.accept_waveform(rate, block)  # as it would come from a microphone
    while recognizer.is_ready(stream):
        recognizer.decode_stream(stream)
stream.accept_waveform(rate, numpy.zeros(int({tail:.2f} * rate), dtype=numpy.float32))  # tail padding
stream.input_finished()
while recognizer.is_ready(stream):
    recognizer.decode_stream(stream)
print(recognizer.get_result(stream))
```

The same with the C++ program:

```sh
sherpa-onnx --encoder=encoder.onnx --decoder=decoder.onnx --joiner=joiner.onnx --tokens=tokens.txt \\
    --left-padding=0 --right-padding={tail:.2f} a.wav
```

## CTC, while the sound comes in

As above, with

```python
recognizer = sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(model="ctc.onnx", tokens="tokens.txt")
```

```sh
sherpa-onnx --zipformer2-ctc-model=ctc.onnx --tokens=tokens.txt --left-padding=0 --right-padding={tail:.2f} a.wav
```
"""

_TAIL = """
## asrkit

```sh
asrkit transcribe --from . a.wav
asrkit evaluate --from . --manifest test.jsonl.gz
```

## Files

| file | bytes | SHA-256 |
|---|---|---|
{files}

`export.yaml` holds these with all that is known of the stages below, the versions, and how far onnxruntime's numbers
lie from torch's.

## Where it comes from

{stages}

The rights to the model are those its makers give; asrkit adds none.
"""


def tail_seconds(chunk: int) -> float:
    """Silence the client must append so that it decodes the last chunk: one frame more than a window."""
    return (4 * chunk + LOOK_AHEAD + 1) * 0.01


def describe(exported: Exported) -> str:
    """The text of README.md."""
    context = exported.parsed_context
    about = f"Sub-models: {', '.join(exported.submodels) or 'none, the backbone alone'}. "
    about += f"Context: {exported.context}.\n" if context.streaming else "Context: full, not streaming.\n"
    text = _HEAD.format(configuration=exported.configuration, about=about)
    if context.chunk is None:
        text += _OFFLINE
    else:
        text += _STREAMING.format(
            chunk_ms=40 * context.chunk,
            latency_ms=context.latency_ms,
            window=4 * context.chunk + LOOK_AHEAD,
            tail=tail_seconds(context.chunk),
        )
    files = (f"| {name} | {record.bytes} | `{record.sha256}` |" for name, record in exported.files.items())
    stages = (f"- {entry.get('stage')}: `{entry.get('command')}`" for entry in exported.run.lineage)
    return text + _TAIL.format(files="\n".join(files), stages="\n".join(stages))
