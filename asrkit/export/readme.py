"""README.md of an exported directory: the very commands that run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from asrkit.export.directory import Exported, LmRecord
from asrkit.export.openfst import GRAPH_FST
from asrkit.frames import FRAME_SHIFT, SUBSAMPLING, count_window
from asrkit.nn.context import Context
from asrkit.reporting.tables import percent
from asrkit.yaml_core import dump_safe

_HEAD = """\
---
{card}
---

# Speech recognizer, variant {variant}

{about}
{takes} Run the commands below in this directory.

"""

_SOUND = "Input: mono audio at any sampling rate; the runtime resamples it to 16 kHz."
_FEATURES = """\
Input: log-mel energies of mono audio at 16 kHz, one frame every 10 ms, as Kaldi and kaldi-native-fbank compute them with
80 bins, high_freq -400, snip_edges false, dither 0 and samples in [-1, 1]."""

_CLIENT = """
    pip install sherpa-onnx soundfile

"""

_SCRIPT = """
The files are TorchScript for libtorch (`torch.jit.load`). Tensors are float32 except where the table says int64. sherpa-onnx needs
ONNX files, which `asrkit export` writes by default. N is the number of recordings or streams, T of frames; V is {vocab_size}. `y` holds
the last {context_size} tokens; before the first one these are -1, and 0 (the blank) last.

| file | inputs | outputs |
|---|---|---|
{encoders}
| `decoder.pt` | `y` (N, {context_size}) int64 | `decoder_out` (N, {joiner_dim}) |
| `joiner.pt` | `encoder_out` (N, {joiner_dim}), `decoder_out` (N, {joiner_dim}) | `logit` (N, V) |
"""

_SCRIPT_OFFLINE = """\
| `encoder.pt` | `x` (N, T, 80), `x_lens` (N) int64 | `encoder_out` (N, T', {joiner_dim}), `encoder_out_lens` (N) int64 |
| `ctc.pt` | `x` (N, T, 80), `x_lens` (N) int64 | `log_probs` (N, T', V), `log_probs_lens` (N) int64 |"""

_SCRIPT_STREAMING = """\
| `encoder.pt` | `x` (N, {window}, 80), {lstm} | `encoder_out` (N, {chunk}, {joiner_dim}), {lstm} |
| `ctc.pt` | `x` (N, {window}, 80), {zipformer2} | `log_probs` (N, {chunk}, V), {zipformer2} |"""

_STATES = """
Each chunk has {window} frames and starts {advance} frames after the previous one. States are zeros before the first chunk; after that,
pass those that the previous chunk returned. Pad the last chunk with log(1e-10), and set `c` or `val1` to the number of its {chunk}
encoder frames that lie beyond the end.
"""
_LSTM = "`h` (1, N, {state_size}), `c` (1, N, 1)"
_ZIPFORMER2 = """\
`key` (1, N, {state_size}), `nonlin_attn` (1, N, 1, 3), `val1` (1, N, 1), `val2` (1, N, 1), `conv1` (N, 4, 1), `conv2` (N, 4, 1), \
`embed` (N, 128, 3, 19), `processed_lens` (N) int64"""

_OFFLINE = """\
## Transducer, whole recordings

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

## CTC, whole recordings

As above, but with this recognizer:

```python
recognizer = sherpa_onnx.OfflineRecognizer.from_zipformer_ctc(model="ctc.onnx", tokens="tokens.txt")
```

```sh
sherpa-onnx-offline --zipformer-ctc-model=ctc.onnx --tokens=tokens.txt a.wav
```
"""

_STREAMING = """\
## Transducer, streaming

Chunks are {chunk_ms:.0f} ms long, and a result comes at most {latency_ms:.1f} ms after its sound. The runtime starts a chunk only when
more than {window} feature frames of 10 ms are waiting. So append {tail:.2f} s of silence at the end, or the last words are lost.

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
    stream.accept_waveform(rate, block)  # as it would arrive from a microphone
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

## CTC, streaming

As above, but with this recognizer:

```python
recognizer = sherpa_onnx.OnlineRecognizer.from_zipformer2_ctc(model="ctc.onnx", tokens="tokens.txt")
```

```sh
sherpa-onnx --zipformer2-ctc-model=ctc.onnx --tokens=tokens.txt --left-padding=0 --right-padding={tail:.2f} a.wav
```
"""

_GRAPH = """
## CTC with the graph

`ctc-graph.fst` says what can be recognized and how likely it is. As above, but with this recognizer:

```python
recognizer = sherpa_onnx.{recognizer}(model="ctc.onnx", tokens="tokens.txt", ctc_graph="ctc-graph.fst")
```

```sh
{program} {option}=ctc.onnx --tokens=tokens.txt --ctc-graph=ctc-graph.fst {padding}a.wav
```
"""

_HOTWORDS = """
## Hotwords

To make words and phrases more likely, write them to `hotwords.txt`, one a line, spelled as the model spells them. Then, as in the
first example, but with this recognizer:

```python
recognizer = sherpa_onnx.{recognizer}.from_transducer(
    encoder="encoder.onnx",
    decoder="decoder.onnx",
    joiner="joiner.onnx",
    tokens="tokens.txt",
    decoding_method="modified_beam_search",
    hotwords_file="hotwords.txt",
    hotwords_score=1.5,
    modeling_unit="bpe",
    bpe_vocab="bpe.vocab",
)
```

```sh
{program} --encoder=encoder.onnx --decoder=decoder.onnx --joiner=joiner.onnx --tokens=tokens.txt \\
    --decoding-method=modified_beam_search --hotwords-file=hotwords.txt --hotwords-score=1.5 \\
    --modeling-unit=bpe --bpe-vocab=bpe.vocab {options}a.wav
```
"""

_LM = """
## Language model

As in the first example, but with this recognizer{when}:

```python
recognizer = sherpa_onnx.{recognizer}.from_transducer(
    encoder="encoder.onnx",
    decoder="decoder.onnx",
    joiner="joiner.onnx",
    tokens="tokens.txt",
    decoding_method="modified_beam_search",
    max_active_paths={beam},
    lm="lm.onnx",
    lm_scale={lm_scale:g},{lodr}
)
```

```sh
{program} --encoder=encoder.onnx --decoder=decoder.onnx --joiner=joiner.onnx --tokens=tokens.txt \\
    --decoding-method=modified_beam_search --max-active-paths={beam} --lm=lm.onnx --lm-scale={lm_scale:g} {lodr_options}{options}a.wav
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
{parts}
`export.yaml` has these digests, the full record of the stages below, the versions used, and how closely the files match torch.
{report}
## How it was made

{stages}

{rights}
"""


def tail_seconds(chunk: int) -> float:
    """Seconds of silence the client must append so that it decodes the last chunk: one frame more than a window."""
    return (count_window(chunk) + 1) * FRAME_SHIFT


_PARTS = """
Weights: {compression}.

| part | bytes | as float32 |
|---|---|---|
{rows}
"""

_REPORT = """
## Measured

Word error rate in % on {words} words of `{manifest}`. With {threads} thread of {processor}: real-time factor {rtf:.4f},
{memory:.0f} MB, {median:.1f} ms for {piece} (median), {last:.1f} ms (99th percentile).

| system | greedy | beam 4 |
|---|---|---|
{rows}
"""


def describe(exported: Exported, measured: Mapping[str, Any] | None = None) -> str:
    """The text of README.md; ``measured`` is the content of report.json."""
    context = exported.parsed_context
    about = f"Sub-models: {', '.join(exported.submodels) or 'none, the backbone alone'}. "
    about += f"Context: {exported.context}.\n" if context.streaming else "Context: full, not streaming.\n"
    about += f"Language: {exported.language}.\n" if exported.language else ""
    takes = _SOUND if exported.format == "onnx" else _FEATURES
    text = _HEAD.format(card=_card(exported), variant=exported.variant, about=about, takes=takes)
    if exported.format == "torchscript":
        text += _script(exported)
    elif context.chunk is None:
        text += _client(exported) + _OFFLINE
        if GRAPH_FST in exported.files:
            text += _GRAPH.format(
                recognizer="OfflineRecognizer.from_zipformer_ctc",
                program="sherpa-onnx-offline",
                option="--zipformer-ctc-model",
                padding="",
            )
        text += _HOTWORDS.format(recognizer="OfflineRecognizer", program="sherpa-onnx-offline", options="")
        text += _language_model(exported, "OfflineRecognizer", "sherpa-onnx-offline", "")
    else:
        tail = tail_seconds(context.chunk)
        text += _client(exported) + _STREAMING.format(
            chunk_ms=40 * context.chunk,
            latency_ms=context.latency_ms,
            window=count_window(context.chunk),
            tail=tail,
        )
        padding = f"--left-padding=0 --right-padding={tail:.2f} "
        if GRAPH_FST in exported.files:
            text += _GRAPH.format(
                recognizer="OnlineRecognizer.from_zipformer2_ctc",
                program="sherpa-onnx",
                option="--zipformer2-ctc-model",
                padding=padding,
            )
        text += _HOTWORDS.format(recognizer="OnlineRecognizer", program="sherpa-onnx", options=padding)
        text += _language_model(exported, "OnlineRecognizer", "sherpa-onnx", padding)
    files = (f"| {name} | {record.bytes} | `{record.sha256}` |" for name, record in exported.files.items())
    stages = (f"- {entry.get('stage')}: `{entry.get('command')}`" for entry in exported.run.lineage)
    parts = (f"| {name} | {part.stored} | {part.float32} |" for name, part in exported.parts.items())
    rights = (
        f"License: {exported.license}."
        if exported.license
        else "No license was stated; ask whoever made the model what you may do with it."
    )
    return text + _TAIL.format(
        files="\n".join(files),
        stages="\n".join(stages),
        parts=_PARTS.format(compression=exported.compression, rows="\n".join(parts)) if exported.parts else "",
        report="" if measured is None else _measured(measured, context),
        rights=rights,
    )


def _language_model(exported: Exported, recognizer: str, program: str, options: str) -> str:
    """How to decode with lm.onnx; nothing where there is none."""
    lm = exported.lm
    if lm is None:
        return ""
    scale = client_lodr_scale(lm)
    subtracts = "lodr" in lm.sources
    return _LM.format(
        when="" if lm.uses_lm == "fusion" else "; it weighs the hypotheses that its search ends with",
        recognizer=recognizer,
        program=program,
        options=options,
        beam=lm.beam,
        lm_scale=lm.lm_scale,
        lodr=f'\n    lodr_fst="lodr.fst",\n    lodr_scale={scale:g},' if subtracts else "",
        lodr_options=f"--lodr-fst=lodr.fst --lodr-scale={scale:g} " if subtracts else "",
    )


def client_lodr_scale(lm: LmRecord) -> float:
    """What the client calls lodr_scale: it adds, and for whole recordings it multiplies by lm_scale too."""
    if lm.uses_lm == "fusion" or lm.lm_scale == 0:
        return -lm.lodr_scale
    return -lm.lodr_scale / lm.lm_scale


def _script(exported: Exported) -> str:
    """Inputs and outputs of the TorchScript files."""
    sizes = {
        "vocab_size": exported.vocab_size,
        "context_size": exported.context_size,
        "joiner_dim": exported.joiner_dim,
    }
    chunk, state_size = exported.parsed_context.chunk, exported.state_size
    if chunk is None:
        return _SCRIPT.format(encoders=_SCRIPT_OFFLINE.format(**sizes), **sizes)
    sizes |= {"chunk": chunk, "advance": SUBSAMPLING * chunk, "window": count_window(chunk)}
    states = {"lstm": _LSTM.format(state_size=state_size), "zipformer2": _ZIPFORMER2.format(state_size=state_size)}
    return _SCRIPT.format(encoders=_SCRIPT_STREAMING.format(**sizes, **states), **sizes) + _STATES.format(**sizes)


def _client(exported: Exported) -> str:
    """How to install sherpa-onnx, and which."""
    if exported.client is None:
        return _CLIENT
    return (
        f"{_CLIENT}Weights of 2 bits need sherpa-onnx {exported.client} or newer; for older versions, export with "
        "`--dequantize`.\n\n"
    )


def _card(exported: Exported) -> str:
    """The front matter of a model card, which model hubs read."""
    streaming = ["streaming"] if exported.parsed_context.streaming else []
    content: dict[str, Any] = {
        "library_name": "sherpa-onnx" if exported.format == "onnx" else "torch",
        "pipeline_tag": "automatic-speech-recognition",
        "tags": ["transducer", "ctc", exported.format, *streaming],
    }
    if exported.language:
        content["language"] = exported.language
    if exported.license:
        content["license"] = exported.license
    return dump_safe(content).rstrip()


def _measured(measured: Mapping[str, Any], context: Context) -> str:
    speed, systems = measured["speed"], measured["systems"]
    rows = (
        f"| {name} | {percent(rates['greedy']['wer'])} | {percent(rates['beam']['wer'])} |"
        for name, rates in systems.items()
    )
    return _REPORT.format(
        manifest=PurePath(measured["manifest"]).name,
        words=systems["exported"]["greedy"]["words"],
        threads=speed["threads"],
        processor=speed["processor"],
        rtf=speed["real_time_factor"],
        memory=speed["peak_memory_mb"],
        piece="a chunk" if context.streaming else "10 s of audio",
        median=speed["piece_ms"]["median"],
        last=speed["piece_ms"]["99th"],
        rows="\n".join(rows),
    )
