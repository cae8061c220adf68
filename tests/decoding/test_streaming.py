"""Recognition while the sound comes in: the same features, the same frames, the same text as all at once."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import tracemalloc
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from asrkit.data.batch import evaluation_batches
from asrkit.data.features import LOG_EPS, OnlineFbank, OnlineResample, fbank, load_samples, resample
from asrkit.data.manifests import make_cut, open_cuts, write_cuts
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.acoustic import EncoderOutput, TorchAcousticModel
from asrkit.decoding.choice import ContextChoice
from asrkit.decoding.latency import emission_ms
from asrkit.decoding.live import file_blocks, pcm_blocks
from asrkit.decoding.recognizer import load_recognizer
from asrkit.decoding.search import METHODS, Method, search_n_best
from asrkit.decoding.streaming import ChunkEncoder, Endpoint, Partial, StreamingModel, StreamingRecognizer
from asrkit.nn.context import Context
from asrkit.reporting.live import CLEAR_LINE, show_final, show_partial
from asrkit.run_dir import TOKENIZER
from asrkit.stages.evaluate import evaluate
from asrkit.stages.transcribe import transcribe_stream
from helpers.clock import set_clock
from helpers.commands import ONE, finish, standard_input
from helpers.small_runs import SUBMODELS, noise, write_run

NEVER = Endpoint(pause=1e9, longest=1e9)
RATE = 16000


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone with sub-models and several variants, ``near`` the one trained last."""
    return write_run(tmp_path_factory.mktemp("exp") / "points", SUBMODELS, layers=2)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cuts that end anywhere in a chunk of 4 frames: 16-bit recordings at 16 kHz, one of a single frame."""
    folder, random, cuts = tmp_path_factory.mktemp("data"), np.random.default_rng(3), []
    for number, samples in enumerate([RATE, 1200, 23987, 2 * RATE + 640, 2 * RATE + 1280, 2 * RATE + 1920, 7000]):
        path = folder / f"{number}.wav"
        soundfile.write(path, noise(random, samples), RATE, subtype="PCM_16")
        cuts.append(make_cut(f"cut-{number}", path, sampling_rate=RATE, num_samples=samples, text="one two"))
    write_cuts(folder / "test.jsonl.gz", cuts)
    return folder / "test.jsonl.gz"


def blocks(samples: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """``samples`` in blocks of these sizes, again and again."""
    begin = number = 0
    while begin < len(samples):
        yield samples[begin : begin + sizes[number % len(sizes)]]
        begin += sizes[number % len(sizes)]
        number += 1


def recognizing(
    model: StreamingModel, tokenizer: Tokenizer, method: Method = "greedy", endpoint: Endpoint | None = None
) -> StreamingRecognizer:
    run = partial(search_n_best, model, method=method, special_ids=tokenizer.special_ids)
    return StreamingRecognizer(model, tokenizer, run, endpoint)


def listen(stream: StreamingRecognizer, samples: Tensor, sizes: list[int] | None = None) -> list[Partial]:
    heard = [event for block in blocks(samples, sizes or [1600]) for event in stream.accept(block)]
    return heard + list(stream.finish())


sizes_of_blocks = st.lists(st.integers(1, 3000), min_size=1, max_size=6)


@pytest.mark.slow
@settings(deadline=None, max_examples=30)
@given(st.integers(0, 3000), sizes_of_blocks, st.integers(0, 100))
def test_features_online_are_those_of_the_whole(length: int, sizes: list[int], seed: int) -> None:
    samples = torch.from_numpy(noise(np.random.default_rng(seed), length))
    online, parts, received = OnlineFbank(), [torch.zeros(0, 80)], 0
    for block in blocks(samples, sizes):
        parts.append(online.accept(block))
        received += len(block)
        # As soon as the last sample a frame sees is there, and not before.
        assert sum(map(len, parts)) == max(0, (received - 280) // 160 + 1)
    parts.append(online.finish())
    torch.testing.assert_close(torch.cat(parts), fbank(samples), rtol=1e-4, atol=1e-4)


@given(
    st.sampled_from([8000, 11025, 16000, 22050, 44100, 48000, 96000]),
    st.integers(1, 20000),
    sizes_of_blocks,
    st.integers(0, 10),
)
@settings(max_examples=60, deadline=None)
def test_resampling_online_is_that_of_the_whole(rate: int, length: int, sizes: list[int], seed: int) -> None:
    samples = torch.rand(length, generator=torch.Generator().manual_seed(seed)) - 0.5
    online = OnlineResample(rate)
    found = [online.accept(block) for block in blocks(samples, sizes)]
    torch.testing.assert_close(torch.cat([*found, online.finish()]), resample(samples, rate), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_long_file_is_streamed_in_little_memory(tmp_path: Path) -> None:
    samples = noise(np.random.default_rng(0), 60 * 44100)
    soundfile.write(tmp_path / "stereo.flac", np.stack([samples, 0.5 * samples], axis=1), 44100)
    whole = load_samples(tmp_path / "stereo.flac")
    tracemalloc.start()
    begin = 0
    for block in file_blocks(tmp_path / "stereo.flac", paced=False):
        torch.testing.assert_close(block, whole[begin : begin + len(block)], rtol=1e-5, atol=1e-6)
        begin += len(block)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert begin == len(whole) and peak < 1e6 < 8 * len(samples)


@pytest.mark.parametrize("chunk", [1, 4, 7])
def test_a_chunk_is_known_with_the_very_sample_it_needs(points: Path, chunk: int) -> None:
    """What ``emission_ms`` says of a frame, and the encoder does."""
    context = Context(chunk, 8)
    recognizer = load_recognizer(points, context=context)
    assert isinstance(recognizer.model, TorchAcousticModel)
    samples, online, encoder = torch.zeros(20000), OnlineFbank(), ChunkEncoder(recognizer.model)
    frame = given_out = 0
    while frame < 3 * chunk:
        needed = round(emission_ms(frame, context) * RATE / 1000)
        assert list(encoder.accept(online.accept(samples[given_out : needed - 1]))) == []
        (encoded,) = encoder.accept(online.accept(samples[needed - 1 : needed]))
        assert encoded.joiner_in.shape[1] == chunk
        frame, given_out = frame + chunk, needed


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("variant", ["backbone", "near", "wide", "all"])
def test_a_stream_ends_in_the_text_of_evaluate(
    points: Path, manifest: Path, tmp_path: Path, variant: str, method: Method
) -> None:
    choice = ContextChoice(chunk=4, left=8)
    (evaluation,) = evaluate(points, manifest, methods=[method], variant=variant, context=choice, out=tmp_path)
    recognizer = load_recognizer(points, variant=variant, context=choice)
    random, texts = np.random.default_rng(0), {}
    for cut in open_cuts(manifest):
        stream = recognizing(recognizer.model, recognizer.tokenizer, method, NEVER)
        heard = listen(stream, torch.from_numpy(cut.load_audio()[0]), random.integers(1, 9000, 5).tolist())
        assert [event.final for event in heard] == [False] * (len(heard) - 1) + [True] * bool(heard)
        assert [event.time for event in heard] == sorted(event.time for event in heard)
        texts[cut.id] = heard[-1].text if heard else ""
    assert texts == {utterance.cut_id: utterance.hyp for utterance in evaluation.utterances}
    assert sum(bool(text) for text in texts.values()) >= 5


@pytest.mark.slow
def test_blocks_and_the_future_change_nothing(points: Path) -> None:
    """However the sound is cut into blocks, and whatever follows, the events until then are the same."""
    recognizer = load_recognizer(points)
    random = np.random.default_rng(5)
    start, one, two = (torch.from_numpy(noise(random, length)) for length in (3 * RATE, RATE, RATE))

    def events(samples: Tensor, sizes: list[int]) -> list[Partial]:
        return listen(recognizing(recognizer.model, recognizer.tokenizer), samples, sizes)

    first = events(torch.cat([start, one]), [1600])
    assert first == events(torch.cat([start, one]), [37, 5000, 1])
    second = events(torch.cat([start, two]), [1600])
    assert first != second
    early = [[event for event in found if event.time <= 3.0] for found in (first, second)]
    assert early[0] == early[1] and len(early[0]) >= 5


class Loudness:
    """A streaming model that needs no torch module, as an exported one would not: loud frames say a letter, quiet ones
    nothing. Its caches count chunks, so that losing them shows."""

    vocab_size, context_size, blank = 20, 2, 0
    context = Context(4, 0)

    def __init__(self, letters: list[int]) -> None:
        self.letters = letters  # of each frame, again and again

    def encode(self, features: Tensor, feature_lens: Tensor, languages: Sequence[str] | None = None) -> EncoderOutput:
        raise NotImplementedError

    def predict(self, contexts: Tensor) -> Tensor:
        return torch.zeros(len(contexts), self.vocab_size)

    def join(self, encoded: Tensor, predicted: Tensor) -> Tensor:
        return encoded

    def start(self, batch: int = 1) -> int:
        return 0

    def step(self, features: Tensor, caches: int, frame_lens: Tensor | None = None) -> tuple[EncoderOutput, int]:
        assert features.shape == (1, 19, 80) and frame_lens is not None
        loud = features[0, 3:19:4].mean(dim=1) > LOG_EPS / 2
        logits = torch.full((1, 4, self.vocab_size), -9.0)
        for frame in range(4):
            letter = self.letters[(4 * caches + frame) % len(self.letters)]
            logits[0, frame, letter if loud[frame] else self.blank] = 9.0
        return EncoderOutput(logits, frame_lens, logits.log_softmax(-1)), caches + 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_pause_ends_an_utterance(points: Path, method: Method) -> None:
    tokenizer = Tokenizer.load(points / TOKENIZER)
    letters = [tokenizer.encode(letter)[-1] for letter in "quatre"]
    # 2 s of nothing, 1 s of sound, 0.5 s of nothing, which is no pause yet, 1 s of sound, 2 s of nothing, 0.3 s of sound
    parts = [(0, 2.0), (1, 1.0), (0, 0.5), (1, 1.0), (0, 2.0), (1, 0.3)]
    random = np.random.default_rng(0)
    sound = [on * random.uniform(-0.5, 0.5, round(seconds * RATE)) for on, seconds in parts]
    samples = torch.from_numpy(np.concatenate(sound).astype(np.float32))
    heard = listen(recognizing(Loudness(letters), tokenizer, method), samples)
    first, second = [event for event in heard if event.final]
    assert first.start < 2.0 and 4.5 + 1.0 < first.time < 4.5 + 1.0 + 0.4  # a second after the sound, to a chunk
    assert first.start < second.start < 6.5 and second.time == pytest.approx(6.8)
    assert len(second.text) < 10 < len(first.text)
    assert 1.9 < first.words[0].start < 2.2 and 6.4 < second.words[0].start < 6.7
    for event in heard:  # a partial text belongs to its own utterance
        assert (event.start, event.final) in ((first.start, False), (second.start, False)) or event.final
    sooner = listen(recognizing(Loudness(letters), tokenizer, method, Endpoint(pause=0.3)), samples)
    assert len([event for event in sooner if event.final]) == 3


def test_an_utterance_has_an_end_however_long_one_speaks(points: Path) -> None:
    tokenizer = Tokenizer.load(points / TOKENIZER)
    letters = [tokenizer.encode(letter)[-1] for letter in "quatre"]
    samples = torch.from_numpy(np.random.default_rng(0).uniform(-0.5, 0.5, 10 * RATE).astype(np.float32))
    endpoint = Endpoint(longest=2.0)
    found = [
        event for event in listen(recognizing(Loudness(letters), tokenizer, endpoint=endpoint), samples) if event.final
    ]
    assert [round(event.start, 2) for event in found] == [0.0, 2.08, 4.16, 6.24, 8.32]  # whole chunks of 160 ms
    whole = listen(recognizing(Loudness(letters), tokenizer, endpoint=NEVER), samples)[-1]
    assert "".join(event.text for event in found) == whole.text


def test_a_piece_that_ctc_holds_is_not_said_twice(points: Path) -> None:
    """The end of 2 s lies in the middle of a piece that is held over 13 frames, and the next blank comes after it."""
    tokenizer = Tokenizer.load(points / TOKENIZER)
    q, u = (tokenizer.encode(letter)[-1] for letter in "qu")
    letters = [0] * 40 + [q] * 4 + [u] * 13 + [0] * 3 + [q] * 20 + [0] * 20
    samples = torch.from_numpy(np.random.default_rng(0).uniform(-0.5, 0.5, 4 * RATE).astype(np.float32))

    def finals(model: Loudness) -> list[Partial]:
        search = partial(search_n_best, model, method="ctc", special_ids=tokenizer.special_ids)
        stream = StreamingRecognizer(model, tokenizer, search, Endpoint(9.0, 2.0), ctc=True)
        return [event for event in listen(stream, samples) if event.final]

    whole = listen(recognizing(Loudness(letters), tokenizer, "ctc", NEVER), samples)[-1]
    said = finals(Loudness(letters))
    assert "".join(event.text for event in said) == whole.text and [event.start for event in said] == [0.0, 2.4]
    assert [event.start for event in finals(Loudness([q]))] == [
        0.0
    ]  # a piece without end: only at twice the length, 4 s


def test_pcm_comes_in_any_bytes() -> None:
    samples = np.random.default_rng(0).integers(-32768, 32767, 5000).astype("<i2")
    samples[:2] = -1025, 0  # the bytes of an MP3's first frame, but for its bit rate
    reader, writer = os.pipe()
    parts = pcm_blocks(reader)
    received = []
    data = samples.tobytes()
    for begin, end in ((0, 1), (1, 2), (2, 5), (5, 4001), (4001, 10000)):
        os.write(writer, data[begin:end])
        if end > 1:
            received.append(next(parts))
    os.write(writer, b"x")  # half a sample
    os.close(writer)
    received += list(parts)
    os.close(reader)
    torch.testing.assert_close(torch.cat(received), torch.from_numpy(samples.astype(np.float32) / 32768))


def test_a_source_stops_when_told(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(RATE), RATE)
    told = iter([False, False, True])
    assert sum(map(len, file_blocks(tmp_path / "a.wav", False, lambda: next(told)))) == 3200
    reader, writer = os.pipe()
    told = iter([False, True])
    assert list(pcm_blocks(reader, lambda: next(told))) == []  # nothing is ever written
    os.close(reader)
    os.close(writer)


def test_a_terminal_shows_the_end_of_a_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("COLUMNS", "11")
    screen, file = Terminal(), io.StringIO()
    for out in (screen, file):
        show_partial(out, 1.25, "ein zwei drei 日本")
        show_final(out, 2.5, "ein zwei drei 日本")
    assert screen.getvalue() == f"{CLEAR_LINE} drei 日本{CLEAR_LINE}    2.50  ein zwei drei 日本\n"
    assert file.getvalue() == "    1.25  partial  ein zwei drei 日本\n    2.50  final    ein zwei drei 日本\n"


def test_a_text_moves_no_terminal() -> None:
    """A stranger's tokenizer may have such a piece."""
    file = io.StringIO()
    for show in (show_partial, show_final):
        show(file, 1.0, "\x1b]0;owned\x07")
    assert "\x1b" not in file.getvalue() and file.getvalue().count("owned") == 2


def test_a_long_text_is_printed_whole() -> None:
    """An hour is a line of more characters than an error may have."""
    file = io.StringIO()
    show_final(file, 1.0, "word " * 2000)
    assert file.getvalue().count("word") == 2000


def test_the_command_streams_files(points: Path, manifest: Path, tmp_path: Path) -> None:
    paths = [Path(cut.recording.sources[0].source) for cut in open_cuts(manifest)][2:4]
    words = ("transcribe", "--from", points, "--stream", "--fast", *paths, "--pause", 9, tmp_path / "missing.wav")
    code, out, err = finish(*words)
    assert code == 1 and err == f"error: {tmp_path / 'missing.wav'}: no such file\n"
    lines = out.splitlines()
    headings = [number for number, line in enumerate(lines) if line.endswith(".wav:")]
    assert [lines[number] for number in headings] == [f"{path}:" for path in paths]
    marks = [line.split()[1] for line in lines if not line.endswith(".wav:")]
    assert marks.count("final") == 2 and marks[-1] == "final" and marks.count("partial") >= 4
    code, out, err = finish(*words, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 1 and rows[-1] == {
        "path": str(tmp_path / "missing.wav"),
        "error": f"{tmp_path / 'missing.wav'}: no such file",
    }
    finals = [row for row in rows if row.get("final")]
    (evaluation,) = evaluate(points, manifest, out=tmp_path)
    assert [row["text"] for row in finals] == [utterance.hyp for utterance in evaluation.utterances[2:4]]
    assert [row["path"] for row in finals] == list(map(str, paths))
    assert [word["text"] for word in finals[0]["words"]] == finals[0]["text"].split()


def test_a_stream_of_a_variant_never_trained_for_it(points: Path, manifest: Path) -> None:
    path = next(iter(open_cuts(manifest))).recording.sources[0].source
    words = ("transcribe", "--from", points, "--stream", "--fast", path)
    code, out, err = finish(*words, "--variant", "wide")
    assert (
        code == 0
        and out
        and "warning" in err
        and "wide was never trained in context chunk=16,left=64, only in full" in err
    )
    # `all` was first trained in full context, but in a streaming one too.
    code, out, err = finish(*words, "--variant", "all")
    assert code == 0 and out and err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--stream", "--mode", "full", "a.wav"], "--stream and --mode full contradict each other"),
        (["--stream", "--timestamps", "a.wav"], "--stream and --timestamps do not go together"),
        (["-"], "standard input needs --stream"),
        (["--fast", "a.wav"], "--fast needs --stream"),
        (["--pause", "2", "a.wav"], "--pause needs --stream"),
        (["--stream", "-", "-"], "standard input can be read only once"),
        (["--left", "4", "a.wav"], "give --chunk too"),
        (["--variant", "far", "--stream", "a.wav"], "there are backbone, near, wide, all"),
    ],
)
def test_options_that_do_not_go_together(points: Path, words: list[str], said: str) -> None:
    code, out, err = finish("transcribe", "--from", points, *words)
    assert code == 1 and out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1


def test_transcribe_in_a_variant_and_context(points: Path, manifest: Path, tmp_path: Path) -> None:
    path = next(iter(open_cuts(manifest))).recording.sources[0].source
    (evaluation,) = evaluate(points, manifest, variant="wide", context=ContextChoice(chunk=8, left=4), out=tmp_path)
    words = ("transcribe", "--from", points, path, "--variant", "wide", "--chunk", "8", "--left", "4")
    code, out, err = finish(*words)
    assert code == 0 and out == f"{path}: {evaluation.utterances[0].hyp}\n"
    assert err.startswith("warning: ") and "never trained" in err


def start(*words: object, **options: Any) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*ONE, *map(str, words)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_standard_input_is_raw_pcm(points: Path, manifest: Path, tmp_path: Path) -> None:
    """The same text from a pipe, in a process of its own, as from evaluate."""
    cut = list(open_cuts(manifest))[3]
    (evaluation,) = evaluate(points, manifest, out=tmp_path)
    samples = (cut.load_audio()[0] * 32768).round().astype("<i2").tobytes()
    process = start("transcribe", "--from", points, "--stream", "--json", "--pause", "9", "-", stdin=subprocess.PIPE)
    out, err = process.communicate(samples, timeout=120)
    assert process.returncode == 0, err
    rows = [json.loads(line) for line in out.splitlines()]
    assert rows[-1]["final"] and rows[-1]["text"] == evaluation.utterances[3].hyp
    assert {row["path"] for row in rows} == {"-"}


@pytest.mark.parametrize(
    ("sent", "said"),
    [
        (b"", "-: the audio is empty"),
        (b"x", "-: the audio is empty"),
        (b"RIFF\0\0\0\0WAVE", "-: begins with RIFF, so it is a file with a header"),
        (b"fLaC\0\0\0\0", "-: begins with fLaC, so it is a file with a header"),
        (b"OggS\0\0\0\0", "-: begins with OggS, so it is a file with a header"),
        (b"ID3\4\0\0\0\0", "-: begins with ID3, so it is a file with a header"),
        (b"\xff\xfb\x90\x64\0\0", "-: begins with a frame of MP3, so it is a file with a header"),
        (b"\xff\xf3\x84\xc4\0\0", "-: begins with a frame of MP3, so it is a file with a header"),
    ],
)
def test_standard_input_that_is_not_raw_pcm(points: Path, sent: bytes, said: str) -> None:
    with standard_input(sent):
        code, out, err = finish("transcribe", "--from", points, "--stream", "-")
    assert code == 1 and out == ""
    assert err.startswith(f"error: {said}") and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("source", ["file", "pipe"])
def test_ctrl_c_keeps_what_was_heard(points: Path, tmp_path: Path, source: str) -> None:
    """Interrupted in the middle of a minute, or while a pipe says nothing: the text so far is finished."""
    samples = noise(np.random.default_rng(4), 60 * RATE)
    soundfile.write(tmp_path / "long.wav", samples, RATE)
    audio = tmp_path / "long.wav" if source == "file" else "-"
    process = start("transcribe", "--from", points, "--stream", "--pause", "99", audio, stdin=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    if source == "pipe":
        process.stdin.write((samples[:RATE] * 32768).astype("<i2").tobytes())
        process.stdin.flush()
    first = process.stdout.readline()
    assert b"partial" in first
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130 and err == b"", err
    *others, last = out.decode().splitlines()
    assert "final" in last and not any("final" in line for line in others)


def test_a_file_is_paced(points: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that only sleeping moves, the last block of a second comes after a second."""
    now = [100.0]
    set_clock(
        monkeypatch,
        "asrkit.decoding.live",
        monotonic=lambda: now[0],
        sleep=lambda seconds: now.__setitem__(0, now[0] + seconds),
    )
    soundfile.write(tmp_path / "a.wav", noise(np.random.default_rng(0), RATE + 800), RATE)
    came = [now[0] for _ in file_blocks(tmp_path / "a.wav", True)]
    assert came == pytest.approx([*np.arange(100.1, 101.05, 0.1), 101.05])
    assert now[0] == pytest.approx(101.05)
    list(file_blocks(tmp_path / "a.wav", False))
    assert now[0] == pytest.approx(101.05)


def test_other_files_are_not_begun_after_a_stop(points: Path, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", noise(np.random.default_rng(0), RATE), RATE)
    heard = transcribe_stream(points, [tmp_path / "a.wav", tmp_path / "b.wav"], paced=False, stopped=lambda: True)
    assert list(heard) == []


def test_batches_of_streams_of_different_age(points: Path, manifest: Path) -> None:
    """``step`` of several streams at once gives what each gives alone."""
    from asrkit.models.encoder import join_streams

    recognizer = load_recognizer(points, context=Context(4, 8))
    model = recognizer.model
    assert isinstance(model, TorchAcousticModel)
    (batch,) = evaluation_batches(list(open_cuts(manifest))[2:4], 100.0)
    windows = batch.features[:, :35].unfold(1, 19, 16).transpose(2, 3)  # (B, 2, 19, 80)
    old, old_caches = model.step(windows[:1, 0], model.start(1))
    old, _ = model.step(windows[:1, 1], old_caches)
    new, _ = model.step(windows[1:, 0], model.start(1))
    both, _ = model.step(torch.stack([windows[0, 1], windows[1, 0]]), join_streams([old_caches, model.start(1)]))
    torch.testing.assert_close(both.joiner_in, torch.cat([old.joiner_in, new.joiner_in]), rtol=1e-4, atol=1e-5)
    assert both.lens.tolist() == [4, 4]
