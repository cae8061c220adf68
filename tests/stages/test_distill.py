"""distill: whole runs, and what it refuses."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch
from lhotse import CutSet
from safetensors.torch import load_file

from asrkit.data.batch import evaluation_batches
from asrkit.data.cut_audio import cut_features
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import make_cut, open_cuts, text_of, write_cuts
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.decoding.recognizer import load_recognizer
from asrkit.decoding.search import decode
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.methods.distillation.features import FeatureCache, WhisperTeacher
from asrkit.models import load_model
from asrkit.models.compression import compressed_layers
from asrkit.run_dir import open_run, write_yaml
from asrkit.training.distributed import World
from asrkit.training.run_writer import read_sealed, write_untrained_run
from helpers.commands import TORCHRUN, TWO, asrkit, killed, launched, quick
from helpers.outside import SENTENCES, WHISPER, speech, whisper_model
from helpers.run_dirs import metrics, model_of, weights_equal
from helpers.tones import RATE, copied, data, make_corpus, rewrite

SHAPE = ["model.size=tiny", "model.num_layers=2", "model.dim=32", "model.feedforward_dim=48"]
SMALLER = ["model.size=tiny", "model.num_layers=1", "model.dim=16", "model.feedforward_dim=24", "model.joiner_dim=24"]


def speak(number: int, cut: dict[str, Any]) -> None:
    cut["supervisions"][0]["language"] = ("en", "fr", "it")[number % 3]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cuts of three languages."""
    folder = tmp_path_factory.mktemp("corpus")
    rewrite(make_corpus(folder, 12), speak)
    rewrite(make_corpus(folder, 4, seed=1, name="dev"), speak)
    return folder


@pytest.fixture(scope="module")
def teacher(corpus: Path) -> Path:
    run = corpus / "teacher"
    shape = (*SHAPE, "tokenizer.vocab_size=18", "model.attention_dropout.probability=0")
    asrkit("train-backbone", *data(corpus), "--out", run, *quick(*shape))
    return run


@pytest.fixture(scope="module")
def second(corpus: Path, teacher: Path) -> Path:
    """Another teacher of the same tokenizer, quantized."""
    run = corpus / "second"
    asrkit("quantize", "--from", teacher, "--bits", 4, "--out", run)
    return run


@pytest.fixture(scope="module")
def student(corpus: Path, teacher: Path, second: Path) -> Path:
    run = corpus / "student"
    asrkit("distill", "--teacher", f"en={teacher}", "--teacher", f"fr={second}", "--teacher", f"fr={teacher}",
           "--teacher", f"*={second}", *data(corpus), "--out", run, *quick(*SMALLER))  # fmt: skip
    return run


def test_a_new_student_of_its_own_size(corpus: Path, teacher: Path, second: Path, student: Path) -> None:
    made, run = model_of(student), open_run(student)
    assert (made.spec.encoder.dim, made.spec.joiner_dim, made.spec.submodels) == (16, 24, {})
    assert sha256_of(run.tokenizer_path) == sha256_of(open_run(teacher).tokenizer_path)
    assert run.config["stage"] == "distill" and run.config["teacher"]["weight"]["kind"] == "student-teacher"
    assert run.config["teachers"]["fr"] == {str(p): sha256_of(p / "model.safetensors") for p in (second, teacher)}
    assert [entry["stage"] for entry in run.lineage] == ["distill"]
    assert str(teacher / "model.safetensors") in run.lineage[-1]["manifests"]
    rows = [row for row in metrics(student) if "kd_lattice" in row]
    assert len(rows) == 4
    assert all(
        row["kd_lattice"] > 0 and row["kd_weight"] > 0 and row["kd_teacher_loss"] > 0 and "kd_ctc" in row
        for row in rows
    )
    asrkit("evaluate", "--from", student, "--manifest", corpus / "dev.jsonl.gz")


@pytest.mark.slow
def test_a_student_that_was_trained_before(corpus: Path, teacher: Path, student: Path, tmp_path: Path) -> None:
    run = tmp_path / "again"
    asrkit("distill", "--from", student, "--teacher", teacher, "--weight", "constant", *data(corpus), "--out", run,
           *quick("teacher.lattice=full", "teacher.classes=all"))  # fmt: skip
    assert model_of(run).spec == model_of(student).spec and not weights_equal(run, student)
    found = open_run(run)
    assert [entry["stage"] for entry in found.lineage] == ["distill", "distill"]
    assert found.config["from"] == str(student) and found.config["loss"]["warm_up_steps"] == 0
    assert found.config["training"]["optimizer"]["name"] == "adamw"
    assert all(row["kd_weight"] == pytest.approx(1.0) for row in metrics(run) if "kd_weight" in row)


@pytest.fixture(scope="module")
def sparse(corpus: Path, teacher: Path) -> Path:
    run = corpus / "sparse"
    asrkit("prune", "--from", teacher, "--sparsity", "2:4", *data(corpus), "--out", run, *quick("training.steps=1"))
    return run


@pytest.mark.slow
def test_a_sparse_student_stays_sparse(corpus: Path, teacher: Path, sparse: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asrkit("distill", "--from", sparse, "--teacher", teacher, *data(corpus), "--out", run, *quick("training.steps=2"))
    layers = compressed_layers(model_of(run))
    assert layers and all(bool((layer.weight[~layer.mask] == 0).all()) for layer in layers.values())


@pytest.mark.slow
def test_a_quantized_student_of_a_sparse_teacher(corpus: Path, second: Path, sparse: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    asrkit("distill", "--from", second, "--teacher", sparse, *data(corpus), "--out", run, *quick("training.steps=2"))
    spec = model_of(run).spec
    assert spec.compression and spec == model_of(second).spec and not weights_equal(run, second)
    assert any(row.get("kd_lattice", 0) > 0 for row in metrics(run))


@pytest.mark.slow
def test_killed_and_resumed_is_the_uninterrupted_run(corpus: Path, teacher: Path, second: Path, student: Path, tmp_path: Path) -> None:  # fmt: skip
    run = tmp_path / "again"
    words = ["distill", "--teacher", f"en={teacher}", "--teacher", f"fr={second}", "--teacher", f"fr={teacher}",
             "--teacher", f"*={second}", *data(corpus), "--out", run, *quick(*SMALLER)]  # fmt: skip
    killed("step 2:", *words)
    assert not (run / "done").exists()
    asrkit(*words)
    assert weights_equal(run, student)


@pytest.mark.slow
def test_two_processes_equal_one_with_two_parts(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    common = ["distill", "--teacher", teacher, "--manifest", corpus / "train.jsonl.gz", "--max-duration", "10"]
    still = ("training.steps=2", "model.dropout=0", "model.predictor_dropout=0", *SMALLER)
    launched(TWO, *common, "--out", tmp_path / "two", *quick(*still))
    asrkit(*common, "--out", tmp_path / "one", *quick(*still, "training.accumulate=2"))
    one, two = (open_run(tmp_path / name).weights() for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_teacher_of_another_tokenizer_that_spells_alike(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    """Characters of one language and of all: other numbers, the same labels."""
    chars = ("tokenizer.kind=char", "training.steps=1", *SMALLER)
    few = copied(corpus, tmp_path / "few.jsonl.gz", _reword("alpha bravo"))
    more = copied(corpus, tmp_path / "more.jsonl.gz", _by_language)
    asrkit("train-backbone", "--manifest", few, "--out", tmp_path / "few", *quick(*chars))
    common = ["--teacher", f"fr={tmp_path / 'few'}", "--teacher", f"*={tmp_path / 'many'}", "--manifest", more]
    asrkit("train-backbone", "--manifest", more, "--out", tmp_path / "many", *quick(*chars))
    said = asrkit("distill", *common, "--out", tmp_path / "run", *quick(*SMALLER), code=1)
    assert "different tokenizers" in said and not (tmp_path / "run").exists()
    said = asrkit("distill", *common, "--out", tmp_path / "run", *quick(*chars), code=1)
    assert "set teacher.ctc_scale=0" in said and str(tmp_path / "few") in said
    asrkit("distill", *common, "--out", tmp_path / "run", *quick(*chars, "teacher.ctc_scale=0"))
    assert any(row.get("kd_lattice", 0) > 0 for row in metrics(tmp_path / "run"))
    # In pieces of several letters the labels differ: the cuts are named.
    other = [*common[:1], f"fr={tmp_path / 'few'}", "--teacher", f"*={teacher}", *common[4:]]
    said = asrkit("distill", *other, "--out", tmp_path / "no", *quick(*chars, "teacher.ctc_scale=0"), code=1)
    assert "texts differently from the student's, or lacks characters of them: cuts train-0" in said
    assert not (tmp_path / "no").exists()


def test_a_teacher_that_lacks_a_character_is_refused(corpus: Path, tmp_path: Path) -> None:
    """An unknown character by itself is spelled alike, but teaches as <unk>."""
    few, more = (copied(corpus, tmp_path / f"{text}.jsonl.gz", _reword(text)) for text in ("bravo", "bravd"))
    for manifest, out in ((few, "few"), (more, "more")):
        chars = quick("tokenizer.kind=char", "training.steps=1", *SMALLER)
        asrkit("train-backbone", "--manifest", manifest, "--out", tmp_path / out, *chars)
    words = ["--teacher", tmp_path / "few", "--tokenizer", tmp_path / "more" / "tokenizer.model", "--manifest", more]
    said = asrkit("distill", *words, "--out", tmp_path / "run", *quick("teacher.ctc_scale=0", *SMALLER), code=1)
    assert "segments 12 texts differently from the student's, or lacks characters of them: cuts train-0" in said
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def ctc_only(corpus: Path, teacher: Path) -> Path:
    """A teacher whose transducer never learned, rounded after its training."""
    run = corpus / "ctc-only"
    files = ["--tokenizer", teacher / "tokenizer.model", "--manifest", corpus / "train.jsonl.gz", "--out", run]
    asrkit("train-backbone", *files, *quick(*SHAPE, "loss.transducer_scale=0", "loss.ctc_scale=1", "training.steps=1"))
    asrkit("quantize", "--from", run, "--bits", 8, "--out", corpus / "ctc-only-int8")
    return corpus / "ctc-only-int8"


@pytest.mark.parametrize("words", [["distill"], ["qat", "--bits", "8"], ["prune", "--sparsity", "2:4"]])
def test_a_transducer_that_never_learned_does_not_teach(
    corpus: Path, teacher: Path, ctc_only: Path, tmp_path: Path, words: list[str]
) -> None:
    files = ["--from", teacher, "--teacher", ctc_only, *data(corpus), "--out", tmp_path / "run"]
    said = asrkit(*words, *files, *quick(), code=1)
    assert f"--teacher {ctc_only}: was trained without a transducer" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def _reword(text: str) -> Any:
    def change(number: int, cut: dict[str, Any]) -> None:
        cut["supervisions"][0]["text"] = text

    return change


def _by_language(number: int, cut: dict[str, Any]) -> None:
    cut["supervisions"][0]["text"] = "bravo alpha" if number % 3 == 1 else "delta carol"


REFUSED: list[tuple[list[str], Iterable[str], str]] = [
    (["--teacher", "en=exp/none"], [], "--teacher en=exp/none: no such run directory"),
    (["--teacher", "en={teacher}"], [], "no teacher for the languages fr (4 cuts), it (4 cuts); add --teacher"),
    (["--teacher", "{teacher}", "--weight", "teacher"], [], "weight.kind"),
    (["--teacher", "{teacher}"], ["teacher.scale=-1"], "teacher.scale"),
    (["--teacher", "{teacher}", "--weight", "linear"], ["teacher.weight.from_step=4"], "teacher.weight.from_step=4"),
    (["--teacher", "{teacher}", "--from", "{teacher}", "--size", "tiny"], [], "already has its shape"),
    (["--teacher", "{teacher}", "--from", "{teacher}"], ["tokenizer.kind=char"], "already has one"),
    (["--teacher", "{teacher}", "--variant", "joint"], [], "works with --from only"),
    (["--teacher", "{teacher}"], ["loss.transducer_scale=0"], "distillation compares transducers"),
    (["--teacher", "en={teacher}"], ["data.augment.join=0.5"], "each teacher knows only its own"),
    (["--teacher", "{teacher}"], ["contexts.sampling=joint", "contexts.train=[full,'chunk=4,left=8']"], "one context"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "settings", "complaint"), REFUSED)
def test_refusals_are_one_line(
    corpus: Path, teacher: Path, tmp_path: Path, words: list[str], settings: list[str], complaint: str
) -> None:
    given = [word.replace("{teacher}", str(teacher)) for word in words]
    said = asrkit("distill", *given, *data(corpus), "--out", tmp_path / "run", *quick(*settings), code=1)
    lines = said.strip().splitlines()
    assert len(lines) == 1 and complaint in lines[0], said
    assert not (tmp_path / "run").exists()


def test_all_findings_at_once(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    def change(number: int, cut: dict[str, Any]) -> None:
        if number in (2, 5):
            cut["supervisions"][0]["language"] = None

    silent = copied(corpus, tmp_path / "silent.jsonl.gz", change)
    words = ["distill", "--teacher", f"en={teacher}", "--manifest", silent, "--out", tmp_path / "run", *quick()]
    said = asrkit(*words, code=1).strip().splitlines()
    assert (
        len(said) == 2 and "fr (4 cuts)" in said[0] and "2 cuts without a language, such as train-2, train-5" in said[1]
    )
    said = asrkit("distill", "--teacher", "fr=exp/a", "--teacher", "it=exp/b", *words[3:], code=1).strip().splitlines()
    assert len(said) == 2 and "exp/a" in said[0] and "exp/b" in said[1]


@pytest.mark.slow
def test_posteriors_are_kept_and_the_teachers_run_once(
    corpus: Path, teacher: Path, second: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    common = ["--teacher", teacher, "--teacher", f"fr={second}", *data(corpus)]
    stored = [*common, "--cache", store]
    # Nothing random but the first weights, so that live and stored teachers can be compared.
    still = (
        "data.augment.spec_augment=null", "data.augment.volume_db=0", "model.dropout=0", "model.predictor_dropout=0", *SMALLER
    )  # fmt: skip
    live = ("data.augment.speed=0", "teacher.ctc_scale=0")
    said = asrkit("distill", *stored, "--out", tmp_path / "one", *quick(*still))
    assert "stored the posteriors of 12 utterances" in said
    files = {path: path.stat().st_mtime_ns for path in store.iterdir()}
    assert len(files) == 3
    assert "stored the posteriors" not in asrkit("distill", *stored, "--out", tmp_path / "two", *quick(*still))
    assert {path: path.stat().st_mtime_ns for path in store.iterdir()} == files
    assert weights_equal(tmp_path / "one", tmp_path / "two")
    asrkit("distill", *common, "--out", tmp_path / "live", *quick(*still, *live))
    for mine, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "live"), strict=True):
        for name in {"kd_lattice", "kd_weight", "kd_teacher_loss", "pruned"} & mine.keys():
            # The stored teacher's loss is over the whole lattice, the live one's over its pruned band.
            assert mine[name] == pytest.approx(theirs[name], rel=0.02), name
    # The same directory for other teachers, and what it cannot know.
    said = asrkit("distill", "--teacher", teacher, *data(corpus), "--cache", store, "--out", tmp_path / "no", *quick(*SMALLER), code=1)  # fmt: skip
    assert "holds the posteriors of other teachers or another tokenizer (teachers.fr" in said
    said = asrkit("distill", *stored, "--out", tmp_path / "no", *quick("data.augment.speed=0.1", "teacher.classes=all"), code=1)  # fmt: skip
    assert said.count("\n") == 2 and "set data.augment.speed=0.0" in said and "set teacher.classes=three" in said
    assert not (tmp_path / "no").exists()
    # A flipped byte is not trained on; posteriors whose digest was never written are computed again.
    (posteriors,) = store.glob("*.safetensors")
    whole = bytearray(posteriors.read_bytes())
    posteriors.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    said = asrkit("distill", *stored, "--out", tmp_path / "no", *quick(*still), code=1)
    assert f"{posteriors}: is damaged (digest " in said and not (tmp_path / "no").exists()
    posteriors.with_suffix(".sha256").unlink()
    said = asrkit("distill", *stored, "--out", tmp_path / "again", *quick(*still, "training.steps=1"))
    assert "stored the posteriors of 12 utterances" in said and posteriors.read_bytes() == whole


# The command with a second process that looks at the directory while the first is about to write there.
LATE = """
import os, time
from pathlib import Path
from asrkit.cli import main
from asrkit.methods.distillation import cache, caches
opened, write_yaml = caches.PosteriorCache, cache.write_yaml
def late(*arguments):
    time.sleep(int(os.environ["RANK"]))
    return opened(*arguments)
def slow(path, content):
    path.parent.mkdir()
    (path.parent / "half").touch()
    time.sleep(3)
    (path.parent / "half").unlink()
    write_yaml(path, content)
caches.PosteriorCache, cache.write_yaml = late, slow
main()
"""


@pytest.mark.slow
def test_two_processes_share_the_listening(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "late.py").write_text(LATE)
    launched([*TORCHRUN, str(tmp_path / "late.py")], "distill", "--teacher", teacher, "--manifest", corpus / "train.jsonl.gz", "--max-duration", "10",
             "--cache", tmp_path / "store", "--out", tmp_path / "two", *quick("training.steps=1", *SMALLER))  # fmt: skip
    files = list((tmp_path / "store").glob("*.safetensors"))
    assert [len(load_file(file)) for file in files] == [6, 6]


def _hush(number: int, cut: dict[str, Any]) -> None:
    if number % 2:
        cut["supervisions"][0]["text"] = ""
    if number == 3:
        cut["supervisions"] = []


@pytest.mark.slow
def test_cuts_without_text_are_labeled_by_their_teacher(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    half = copied(corpus, tmp_path / "half.jsonl.gz", _hush)
    words = ["--manifest", half, "--max-duration", 20, "--out", tmp_path / "run", *quick(*SMALLER, "training.steps=2")]
    said = asrkit("distill", "--teacher", biased(teacher, tmp_path / "some", 2.0), *words, code=1)
    assert "the text is empty" in said and "no supervision" in said
    said = asrkit("distill", "--teacher", f"en={teacher}", "--teacher", f"fr={teacher}", "--teacher", f"it={teacher}",
                  "--labels", "teacher", *words, code=1)  # fmt: skip
    assert "1 cuts without a language, such as train-3" in said and not (tmp_path / "run").exists()
    said = asrkit("distill", "--teacher", tmp_path / "some", "--labels", "teacher", *words)
    assert "the teachers transcribed 6 utterances that have no text" in said
    given = {cut.id: text_of(cut) for cut in CutSet.from_file(corpus / "train.jsonl.gz")}
    labeled = {cut.id: cut for cut in CutSet.from_file(tmp_path / "run" / "labeled-0.jsonl.gz")}
    assert labeled.keys() == given.keys()
    model = load_recognizer(tmp_path / "some").model
    for cut_id, cut in labeled.items():
        number = int(cut_id.split("-")[1])
        if number % 2 == 0:
            assert text_of(cut) == given[cut_id]
            continue
        features = cut_features(cut)[None]
        tokenizer = Tokenizer(open_run(teacher).tokenizer_path)
        lens = torch.tensor([features.shape[1]])
        (hypothesis,) = decode(model, features, lens, "beam", special_ids=tokenizer.special_ids)
        assert text_of(cut) == tokenizer.decode(hypothesis.tokens) != ""
        assert cut.supervisions[0].custom["labeled_by"] == "teacher"


@pytest.mark.slow
def test_resumed_with_texts_and_posteriors_of_the_teacher(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    """What was heard before the run was killed is not heard again, and the run ends as if it had not been."""
    half = copied(corpus, tmp_path / "half.jsonl.gz", _hush)
    words = ["--teacher", biased(teacher, tmp_path / "some", 2.0), "--labels", "teacher", "--cache", tmp_path / "store"]
    words = ["distill", *words, *data(corpus), "--manifest", half, *quick(*SMALLER), "--out"]
    killed("step 2:", *words, tmp_path / "parted")
    assert not (tmp_path / "parted" / "done").exists()
    again = asrkit(*words, tmp_path / "parted")
    assert "transcribed" not in again and "stored the posteriors" not in again
    asrkit(*words, tmp_path / "whole")
    assert weights_equal(tmp_path / "parted", tmp_path / "whole")


@pytest.mark.parametrize(("towards_blank", "reason"), [(50.0, "transcript is empty"), (-50.0, "its tokens need")])
def test_labels_that_cannot_be_used_are_left_out(
    corpus: Path, teacher: Path, tmp_path: Path, towards_blank: float, reason: str
) -> None:
    half = copied(corpus, tmp_path / "half.jsonl.gz", _hush)
    deaf = biased(teacher, tmp_path / "deaf", towards_blank)
    said = asrkit("distill", "--teacher", deaf, "--labels", "teacher", "--manifest", half, "--out", tmp_path / "run",
                  *quick(*SMALLER, "training.steps=1"))  # fmt: skip
    assert said.count(reason) == 6
    assert len(read_sealed(tmp_path / "run" / "left_out.yaml")) == 6


def biased(teacher: Path, out: Path, towards_blank: float) -> Path:
    """The teacher with the joiner's bias for the blank set to a value."""
    run = open_run(teacher)
    model = load_model(run)
    with torch.no_grad():
        model.joiner.out.bias[0] = towards_blank
    return write_untrained_run(out, run, "test", {}, model)


def test_encoders_of_other_widths_are_met_through_maps_that_are_not_kept(
    corpus: Path, teacher: Path, tmp_path: Path
) -> None:
    words = ["distill", "--teacher", teacher, *data(corpus)]
    asrkit(*words, "--out", tmp_path / "run", *quick(*SMALLER, "teacher.encoder_scale=1"))
    assert all(row["kd_encoder"] > 0 for row in metrics(tmp_path / "run") if "kd_lattice" in row)
    assert not any(name.startswith("teacher_maps") for name in open_run(tmp_path / "run").weights())
    state = load_file(tmp_path / "run" / "state" / "latest.safetensors")
    assert state["model.teacher_maps.0.weight"].shape == (32, 16)
    # The maps learn, and are part of what a run resumes from.
    assert not torch.equal(state["model.teacher_maps.0.weight"], state["average.teacher_maps.0.weight"])


@pytest.mark.slow
def test_sound_in_a_shar_directory_is_heard_once_too(corpus: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "shar").mkdir()
    CutSet.from_file(corpus / "train.jsonl.gz").to_shar(tmp_path / "shar", fields={"recording": "wav"}, shard_size=6)
    words = ["distill", "--teacher", teacher, "--manifest", tmp_path / "shar", "--cache", tmp_path / "store"]
    settings = quick(*SMALLER, "training.steps=1")
    assert "stored the posteriors of 12 utterances" in asrkit(*words, "--out", tmp_path / "one", *settings)
    assert "stored the posteriors" not in asrkit(*words, "--out", tmp_path / "two", *settings)
    asrkit(*words[:5], "--labels", "teacher", "--out", tmp_path / "labeled", *settings)
    asrkit("evaluate", "--from", tmp_path / "one", "--manifest", tmp_path / "shar")


def _english(number: int, cut: dict[str, Any]) -> None:
    cut["supervisions"][0]["language"] = "en"


@pytest.mark.slow
def test_whisper_teaches_by_its_frames(
    corpus: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone and beside a run directory; its frames are computed once, and the linear map is not kept."""
    whisper_model()
    manifest = copied(corpus, tmp_path / "train.jsonl.gz", _english)
    common = ["--manifest", manifest, "--max-duration", 20, "--cache", tmp_path / "store"]
    said = asrkit(
        "distill", "--teacher", WHISPER, *common, "--out", tmp_path / "one", *quick("tokenizer.vocab_size=18", *SMALLER)
    )
    assert "stored Whisper's frames of 12 utterances" in said
    (file,) = (tmp_path / "store" / "whisper-features").glob("*.safetensors")
    frames = load_file(file)
    assert len(frames) == 12 and all(
        tensor.dtype == torch.float16 and tensor.shape[1] == 384 for tensor in frames.values()
    )
    rows = [row for row in metrics(tmp_path / "one") if "kd_features" in row]
    assert len(rows) == 4 and all(0 < row["kd_features"] < 2 and row["kd_weight"] == pytest.approx(1.0) for row in rows)
    assert not any("teacher_maps" in name for name in load_file(tmp_path / "one" / "model.safetensors"))
    asrkit("evaluate", "--from", tmp_path / "one", "--manifest", manifest)

    # Other texts, the same sound: nothing is encoded again. The run directory knows its loss, so the weight may adapt to it.
    monkeypatch.setattr("asrkit.decoding.external.whisper.WhisperRecognizer.encode", None)
    rewrite(manifest, _reword("alpha bravo"))
    asrkit("distill", "--teacher", WHISPER, "--teacher", teacher, "--manifest", manifest, "--max-duration", 20,
           "--cache", tmp_path / "store", "--out", tmp_path / "both",
           *quick("teacher.features_distance=l1", *SMALLER), "--weight", "student-teacher")  # fmt: skip
    rows = [row for row in metrics(tmp_path / "both") if "kd_features" in row]
    assert rows and all(row["kd_features"] > 0 and row["kd_lattice"] > 0 and row["kd_teacher_loss"] > 0 for row in rows)


@pytest.mark.slow
def test_the_frames_that_the_student_is_compared_with(corpus: Path, tmp_path: Path) -> None:
    """A map that gives Whisper's own frames is at no distance, at 2 where it gives their opposite; padding does not count."""
    whisper_model()
    table = CutTable(list(open_cuts(corpus / "train.jsonl.gz"))[:3])
    cache = FeatureCache(tmp_path / "store", WhisperTeacher.find(WHISPER))
    assert list(cache.fill(table, World(0, 1, torch.device("cpu")))) == [3]
    cache.open(table)
    (batch,) = evaluation_batches([table[index] for index in range(3)], 100.0)
    lens = torch.tensor(batch.encoder_frames)
    assert cache.width == 384 and [len(tensor) for tensor in cache.tensors(batch)] == batch.encoder_frames
    own = torch.nn.utils.rnn.pad_sequence([tensor.float() for tensor in cache.tensors(batch)], batch_first=True)
    padded = torch.cat([own, torch.randn(3, 2, 384)], dim=1)
    torch.testing.assert_close(cache.distances(padded, lens, batch, "cosine", 0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(cache.distances(-padded, lens, batch, "cosine", 0), 2.0 * lens, atol=1e-3, rtol=0)
    assert bool((cache.distances(padded, lens, batch, "l1", 1) > 0.1).all())


@pytest.mark.slow
def test_whisper_labels_what_it_teaches(tmp_path: Path) -> None:
    whisper_model()
    cuts = []
    for number in range(2):
        soundfile.write(tmp_path / f"{number}.wav", speech(number).numpy(), RATE)
        cuts.append(
            make_cut(
                str(number), tmp_path / f"{number}.wav", sampling_rate=RATE, num_samples=len(speech(number)), text=None
            )
        )
    write_cuts(tmp_path / "raw.jsonl.gz", cuts)
    shape = ("tokenizer.kind=char", 'contexts.train=["chunk=4,left=0"]', "training.steps=1", *SMALLER)
    asrkit(
        "distill",
        "--teacher",
        WHISPER,
        "--labels",
        "teacher",
        "--manifest",
        tmp_path / "raw.jsonl.gz",
        "--out",
        tmp_path / "run",
        *quick(*shape),
    )
    labeled = [text_of(cut) for cut in open_cuts(tmp_path / "run" / "labeled-0.jsonl.gz")]
    assert labeled[0] == SENTENCES[0] and labeled[1].endswith("new messages in your mailbox")


def test_what_whisper_cannot_teach(corpus: Path, tmp_path: Path) -> None:
    whisper_model()
    words = ["distill", "--teacher", WHISPER, *data(corpus), "--out", tmp_path / "no"]
    said = asrkit(*words, "--set", "data.augment.speed=0.1", "--set", "data.augment.join=0.1", code=1)
    assert said.count("\n") == 2 and "set data.augment.speed=0, not 0.1" in said and "set data.augment.join=0" in said
    assert "Whisper has none in the student's tokens" in asrkit(*words, "--weight", "teacher-loss", code=1)
    said = asrkit(*words, "--set", "training.steps=1", "--set", "tokenizer.vocab_size=18", code=1)
    assert "knows English only, not fr; choose a multilingual model, such as whisper:tiny (4 cuts)" in said
    assert not (tmp_path / "no").exists()
    said = asrkit(
        "distill",
        "--teacher",
        f"en={WHISPER}",
        "--teacher",
        "sherpa-onnx:dir",
        *data(corpus),
        "--out",
        tmp_path / "no",
        code=1,
    )
    assert (
        "Whisper teaches all languages it knows; write --teacher whisper:tiny.en" in said
        and "asrkit label --with sherpa-onnx:dir" in said
    )
    store = tmp_path / "store" / "whisper-features"
    store.mkdir(parents=True)
    write_yaml(store / "cache.yaml", {"whisper": "another", "layer": "last", "frames": "mean of 2"})
    with pytest.raises(UserError, match="holds the features of other teachers"):
        FeatureCache(store, WhisperTeacher.find(WHISPER))
