"""The recipes: Makefiles run dry, scripts convert the public layouts, variants train."""

from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asrkit.config import from_dict, resolve
from asrkit.data.manifests import open_cuts, speaker_of, text_of
from asrkit.methods.distillation.config import WeightConfig
from asrkit.methods.lm_distillation.config import DistillLmConfig
from asrkit.methods.pretraining import PretrainConfig
from asrkit.methods.sequence.config import SequenceTrainConfig
from asrkit.methods.supernet.config import SupernetConfig
from asrkit.stages.add_submodel import AddSubModelConfig
from asrkit.stages.distill import DistillConfig
from asrkit.stages.pretrain import pretrain
from asrkit.stages.prune import PruneConfig
from asrkit.stages.qat import QatConfig
from asrkit.stages.train_backbone import TrainBackboneConfig, train_backbone
from asrkit.stages.train_lm import TrainLmConfig
from helpers.tones import make_corpus

RECIPES = Path(__file__).parents[2] / "recipes"
CONFIGS = sorted(RECIPES.glob("*/*.yaml"))


def make(recipe: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "-C", str(recipe), "--no-print-directory", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def script(path: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RECIPES / path), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def rows(tsv: Path) -> list[dict[str, str]]:
    with open(tsv, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


@pytest.fixture
def recipe(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of the recipe, without what a user's own runs left in it."""
    skip = shutil.ignore_patterns("data", "exp", "download*")
    shutil.copytree(RECIPES / request.param, tmp_path / request.param, ignore=skip)
    for shared in RECIPES.glob("*.mk"):
        shutil.copy(shared, tmp_path)
    return tmp_path / request.param


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_variant_is_valid(path: Path) -> None:
    stages = {
        "modular": (AddSubModelConfig, PruneConfig, QatConfig),
        "later": (
            AddSubModelConfig,
            DistillConfig,
            DistillLmConfig,
            PruneConfig,
            QatConfig,
            SequenceTrainConfig,
            SupernetConfig,
            TrainBackboneConfig,
        ),
        "compress": (PruneConfig, QatConfig),
        "pretrain": (PretrainConfig,),
        "student": (TrainBackboneConfig, DistillConfig),
        "texts-lm": (TrainLmConfig,),
    }
    for settings in stages.get(path.stem, (TrainBackboneConfig,)):
        resolve(settings, path)


# How many models each target writes.
TARGETS = {
    "prompts": {"all": 5, "five": 1, "modular": 7, "compress": 20, "lm": 6, "lm-fresh": 7, "taught": 12, "hour": 2},
    "fsdd": {"all": 2, "compress": 20},
    "minilibrispeech": {
        "all": 1,
        "attention": 2,
        "conformer": 2,
        "streaming": 2,
        "distill": 4,
        "sequence": 6,
        "adaptive": 7,
        "language": 6,
        "dual": 5,
        "modular": 5,
        "supernet": 6,
        "outside": 3,
        "pretraining": 8,
        "pretrained-supernet": 12,
        "compress": 20,
        "compare": 5,
        "claims": 55,
    },
}
# Models that a target needs and does not evaluate: the demo has, or it compares others.
UNEVALUATED = {
    "lm": {"exp/backbone"},
    "lm-fresh": {"exp/backbone", "exp/fresh"},
    "distill": {"exp/backbone", "exp/attention"},
    "sequence": {"exp/backbone"},
    "adaptive": {"exp/backbone", "exp/longer"},
    "language": {"exp/backbone"},
    "dual": {"exp/backbone"},
    "modular": {"exp/backbone"},
    "supernet": {"exp/backbone", "exp/streaming-early"},
    "outside": {"exp/backbone"},
    "pretraining": {"exp/backbone", "exp/pretrained"},
    "pretrained-supernet": {"exp/backbone", "exp/pretrained", "exp/tuned-all", "exp/fresh-all"},
    "claims": {"exp/half", "exp/pretrained"},
}


@pytest.mark.parametrize(
    ("recipe", "target"),
    [(recipe, target) for recipe, targets in TARGETS.items() for target in targets],
    indirect=["recipe"],
)
def test_the_targets_run_dry(recipe: Path, target: str) -> None:
    """What a target reads it has written before, and what it has trained it evaluates."""
    outcome = make(recipe, "-n", target, "ASRKIT=/opt/bin/asrkit", "NPROC=1", "SEED=7")
    assert outcome.returncode == 0, outcome.stderr
    planned = outcome.stdout.replace("\\\n", " ").splitlines()
    lines = [line.strip() for line in planned if "/opt/bin/asrkit" in line and not line.startswith("echo")]
    assert lines
    written: set[str] = set()
    evaluated: set[str] = set()
    links = [line.split()[-2:] for line in planned if line.startswith("ln -sfn")]
    same = {link: str(Path(run).relative_to(recipe)) for run, link in links}
    outside = {"whisper:tiny.en", "../minilibrispeech/exp/backbone"}  # of a package, and of another recipe
    for line in lines:
        for option in ("--from", "--teacher"):
            if f" {option} " in line:
                for words in line.split(f" {option} ")[1:]:
                    read = words.split()[0].split("=")[-1]
                    assert same.get(read, read) in written | outside, line
                    if " evaluate " in line:
                        evaluated.add(same.get(read, read))
        if " --out " in line and not any(
            f" {word} " in line for word in ("data", "align", "train-lm", "tune", "summary", "report")
        ):
            written.add(line.split(" --out ")[1].split()[0])
    assert len(written) == TARGETS[recipe.name][target]
    assert evaluated == written - UNEVALUATED.get(target, set())
    reading = [line for line in lines if any(f" {word} " in line for word in ("train-backbone", "distill", "evaluate"))]
    assert all(" --manifest " in line for line in reading)
    for line in reading:
        if " evaluate " not in line:
            assert " --out " in line and " --dev " in line and " --config " in line, line
    assert all((recipe / line.split("--config ")[1].split()[0]).is_file() for line in lines if "--config " in line)


@pytest.mark.parametrize("recipe", ["fsdd", "speechocean762", "minilibrispeech", "librispeech"], indirect=True)
def test_the_whole_chain_runs_dry(recipe: Path) -> None:
    outcome = make(recipe, "-n", "ASRKIT=/opt/bin/asrkit", "NPROC=1")
    assert outcome.returncode == 0, outcome.stderr
    trained = [line for line in outcome.stdout.splitlines() if line.startswith("/opt/bin/asrkit train-backbone ")]
    assert trained and "/opt/bin/asrkit evaluate" in outcome.stdout
    for line in trained:
        assert (recipe / line.split("--config ")[1].split()[0]).is_file()


@pytest.mark.parametrize("recipe", ["prompts"], indirect=True)
def test_the_yardstick_is_asked_for(recipe: Path) -> None:
    planned = make(recipe, "-n", "YARDSTICK=1", "ASRKIT=/opt/bin/asrkit").stdout
    assert "/opt/bin/asrkit evaluate --from whisper:tiny.en --manifest data/prompts/test.jsonl.gz" in planned
    (summary,) = [line for line in planned.splitlines() if "/opt/bin/asrkit summary" in line]
    assert "exp/onnx $(ls -d exp/whisper/test-* 2> /dev/null) --out exp/summary.json" in summary
    for words in ([], ["YARDSTICK=0"]):
        assert "whisper" not in make(recipe, "-n", *words, "ASRKIT=/opt/bin/asrkit").stdout
    # Without it, the table comes all the same.
    (recipe / "data" / "prompts").mkdir(parents=True)
    (recipe / "data" / "prompts" / "train.jsonl.gz").touch()
    done = make(recipe, "exp/whisper/test.done", "YARDSTICK=1", "ASRKIT=false")
    assert done.returncode == 0 and "the table is without it" in done.stdout
    assert not (recipe / "exp" / "whisper" / "test.done").exists()


@pytest.mark.parametrize("recipe", ["kathleen"], indirect=True)
def test_students_of_labels_and_of_texts_differ_in_nothing_else(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "own.tsv").touch()
    planned = make(
        recipe, "-n", f"TSV={tmp_path / 'own.tsv'}", "PARENT=/runs/parent", "ASRKIT=/opt/bin/asrkit", "SEED=3"
    ).stdout
    trained = [line.split() for line in planned.splitlines() if "train-backbone" in line or " distill " in line]
    options = [dict(zip(words[2::2], words[3::2], strict=True)) for words in trained]
    manifests = [option.pop("--manifest") for option in options]
    assert manifests == ["data/train.jsonl.gz", "data/labeled.jsonl.gz", "data/labeled.jsonl.gz"]
    assert [option.pop("--out") for option in options] == ["exp/true", "exp/labeled", "exp/taught"]
    assert (options[2].pop("--teacher"), options[2].pop("--cache")) == ("whisper:tiny.en", "data/cache")
    assert options[0] == options[1] == options[2] and options[0]["--from"] == "/runs/parent"
    assert resolve(DistillConfig, recipe / "student.yaml").data.augment.speed == 0


@pytest.mark.parametrize("recipe", ["fsdd"], indirect=True)
def test_a_finished_run_is_not_started_again(recipe: Path) -> None:
    done = recipe / "exp" / "own" / "done"
    done.parent.mkdir(parents=True)
    done.touch()
    for part in ("train", "dev", "test"):
        (recipe / "data" / "own").mkdir(parents=True, exist_ok=True)
        (recipe / "data" / "own" / f"{part}.jsonl.gz").touch()  # newer than the run
    planned = make(recipe, "-n", "own").stdout
    assert "train-backbone" not in planned
    assert "evaluate" in planned


@pytest.mark.parametrize("recipe", ["fsdd", "speechocean762", "minilibrispeech"], indirect=True)
def test_a_tsv_takes_the_place_of_the_corpus(recipe: Path, tmp_path: Path) -> None:
    tsv = tmp_path / "transcripts.tsv"
    tsv.touch()
    planned = make(recipe, "-n", f"TSV={tsv}").stdout
    assert "git clone" not in planned and "lhotse" not in planned
    assert str(tsv) in planned


@pytest.mark.parametrize("recipe", ["fsdd", "speechocean762"], indirect=True)
def test_a_model_of_other_speech_is_trained_on(recipe: Path) -> None:
    planned = make(recipe, "-n", "FROM=/runs/other", "EXP=exp/from", "ASRKIT=/opt/bin/asrkit").stdout
    trained = [line for line in planned.splitlines() if " train-backbone " in line]
    assert trained
    for line in trained:
        assert " --from /runs/other --config from.yaml " in line
        assert " --out exp/from/" in line


@pytest.mark.parametrize("recipe", ["librispeech"], indirect=True)
def test_librispeech_parts_sizes_and_processes_are_choices(recipe: Path) -> None:
    arguments = ("SIZE=small", "NPROC=8", "TRAIN_PARTS=train-clean-100", "ASRKIT=/opt/bin/asrkit")
    planned = make(recipe, "-n", *arguments).stdout
    assert "train-other-500" not in planned
    train = next(line for line in planned.splitlines() if "train-backbone" in line)
    assert train.startswith(
        "/opt/bin/torchrun --rdzv_backend c10d --rdzv_endpoint localhost:0 --nproc_per_node 8 --redirects 1 --tee 1 "
        "-m asrkit train-backbone"
    )
    assert "--manifest data/train-clean-100.jsonl.gz --dev data/dev-clean+dev-other.jsonl.gz" in train
    assert "--config small.yaml --out exp/small" in train


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["minilibrispeech"], indirect=True)
def test_mini_librispeech_splits_from_the_public_layout(recipe: Path, tmp_path: Path) -> None:
    """Four training speakers are the dev set, and the official dev set is the test set; texts are in lower case."""
    corpus, random = tmp_path / "LibriSpeech", np.random.default_rng(0)
    for part, speakers in (("train-clean-5", ("1088", "1737", "32", "3272", "1867")), ("dev-clean-2", ("84",))):
        for speaker in speakers:
            folder = corpus / part / speaker / "1"
            folder.mkdir(parents=True)
            soundfile.write(folder / f"{speaker}-1-0000.flac", random.normal(0.0, 0.1, 8000), 16000)
            (folder / f"{speaker}-1.trans.txt").write_text(f"{speaker}-1-0000 AS YOU KNOW\n")
    done = make(recipe, "data", f"CORPUS={corpus}", f"ASRKIT={Path(sys.executable).parent / 'asrkit'}")
    assert done.returncode == 0, done.stderr
    again = ("SPLIT=speakers", "DATA=resplit", f"ASRKIT={Path(sys.executable).parent / 'asrkit'}")
    done = make(recipe, "data", f"CORPUS={corpus}", *again)
    assert done.returncode == 0, done.stderr
    speakers_of: dict[str, list[set[str | None]]] = {"data": [], "resplit": []}
    for data, found in speakers_of.items():
        for name in ("train", "dev", "test"):
            cuts = list(open_cuts(recipe / data / f"{name}.jsonl.gz"))
            found.append({speaker_of(cut) for cut in cuts})
            assert {text_of(cut) for cut in cuts} == {"as you know"}
    assert speakers_of == {
        "data": [{"1088", "3272", "1867"}, {"1737", "32"}, {"84"}],
        "resplit": [{"1088"}, {"1737", "32"}, {"1867"}],  # 3272 is left out
    }


@pytest.mark.parametrize("recipe", ["minilibrispeech"], indirect=True)
def test_training_from_nothing_also_hears_the_training_texts_in_short(recipe: Path, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path / "corpus", 12)
    written = tmp_path / "clauses.txt"
    done = script("minilibrispeech/clauses.py", corpus, "--words", 4, "--out", written)
    assert done.returncode == 0, done.stderr
    texts = [text_of(cut).split() for cut in open_cuts(corpus)]
    assert {len(text) for text in texts} >= {2, 3, 5}  # too short, as it is, and a fifth word that is left out
    assert written.read_text().splitlines() == [" ".join(text[:4]) for text in texts if len(text) >= 3]
    for target in ("exp/backbone/done", "exp/conformer/done", "exp/student/done"):
        trained = [line for line in make(recipe, "-n", target).stdout.splitlines() if " train-backbone " in line]
        assert trained and all("'data.also=[data/spoken/train.jsonl.gz]'" in line for line in trained[-1:])


def test_logged_weights_become_a_schedule(tmp_path: Path) -> None:
    """Of means that rise by chance, too, which no schedule may."""
    logged = [(25, 1.5), (50, 1.6), (75, 1.2), (100, 1.25), (125, 1.0)]
    lines = [{"step": step, "kd_weight": weight} for step, weight in logged]
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in [*lines, {"step": 125}]))
    points = json.loads(script("minilibrispeech/weights.py", tmp_path).stdout)
    assert points == [[0, 1.55], [25, 1.55], [50, 1.225], [75, 1.225], [100, 1.0]]
    from_dict(WeightConfig, {"kind": "piecewise", "points": points}, "test")


def test_fsdd_splits_from_the_public_layout(tmp_path: Path) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for speaker in ("jackson", "george", "lucas"):
        for index in (0, 4, 5, 7):
            (recordings / f"3_{speaker}_{index}.wav").touch()
    for split in ("own", "speakers"):
        arguments = ("--recordings", recordings, "--split", split, "--out", tmp_path / f"{split}.tsv")
        assert script("fsdd/make_tsv.py", *arguments).returncode == 0
    own = {row["id"]: row for row in rows(tmp_path / "own.tsv")}
    assert {row["text"] for row in own.values()} == {"three"}
    assert [own[f"lucas_3_{index}"]["split"] for index in (0, 4, 5, 7)] == ["test", "test", "dev", "train"]
    assert all(Path(row["path"]).is_file() for row in own.values())
    by_speaker = {row["speaker"]: row["split"] for row in rows(tmp_path / "speakers.tsv")}
    assert by_speaker == {"jackson": "train", "george": "dev", "lucas": "test"}
    # The TSV of one split is a source for the other.
    again = ("--tsv", tmp_path / "own.tsv", "--split", "speakers", "--out", tmp_path / "again.tsv")
    assert script("fsdd/make_tsv.py", *again).returncode == 0
    assert sorted(map(str, rows(tmp_path / "again.tsv"))) == sorted(map(str, rows(tmp_path / "speakers.tsv")))


def test_speechocean762_from_the_public_layout(tmp_path: Path) -> None:
    for part, speakers in (("train", ("0001", "0003")), ("test", ("0005",))):
        folder = tmp_path / part
        folder.mkdir()
        ids = {f"{speaker}0011": speaker for speaker in speakers}
        scp = [f"{i}\tWAVE/SPEAKER{speaker}/{i}.WAV" for i, speaker in ids.items()]
        (folder / "wav.scp").write_text("\n".join(scp) + "\n")
        (folder / "text").write_text("".join(f"{i}\tWE CALL IT BEAR\n" for i in ids))
        (folder / "utt2spk").write_text("".join(f"{i}\t{speaker}\n" for i, speaker in ids.items()))
    assert script("speechocean762/make_tsv.py", tmp_path, "--out", tmp_path / "out.tsv").returncode == 0
    found = rows(tmp_path / "out.tsv")
    assert [(row["speaker"], row["split"]) for row in found] == [
        ("0001", "dev"),
        ("0003", "train"),
        ("0005", "test"),
    ]
    assert found[0]["text"] == "we call it bear"
    assert found[0]["path"] == str(tmp_path / "WAVE" / "SPEAKER0001" / "00010011.WAV")


@pytest.mark.parametrize(
    ("path", "arguments"),
    [("fsdd/make_tsv.py", ("--split", "own", "--recordings")), ("speechocean762/make_tsv.py", ())],
)
def test_another_folder_is_refused_in_one_line(tmp_path: Path, path: str, arguments: tuple[str, ...]) -> None:
    outcome = script(path, *arguments, tmp_path, "--out", tmp_path / "out.tsv")
    assert outcome.returncode == 1
    assert outcome.stderr.count("\n") == 1 and str(tmp_path) in outcome.stderr
    assert not (tmp_path / "out.tsv").exists()


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight two-second recordings of noise with texts, as a manifest."""
    from lhotse import CutSet, MonoCut, Recording, SupervisionSegment

    folder = tmp_path_factory.mktemp("generated")
    random = np.random.default_rng(0)
    cuts = []
    for index in range(8):
        path = folder / f"noise-{index}.wav"
        soundfile.write(path, random.normal(0.0, 0.1, 32000), 16000)
        recording = Recording.from_file(path, recording_id=path.stem)
        text = ["the quick brown fox", "jumps over the lazy dog"][index % 2]
        segment = SupervisionSegment(path.stem, path.stem, 0.0, 2.0, text=text, language="en")
        cuts.append(MonoCut(path.stem, 0.0, 2.0, channel=0, recording=recording, supervisions=[segment]))
    CutSet.from_cuts(cuts).to_file(folder / "train.jsonl.gz")
    return folder / "train.jsonl.gz"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [path for path in CONFIGS if path.stem not in ("pretrain", "texts-lm")],
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_every_variant_trains(path: Path, generated: Path, tmp_path: Path) -> None:
    """Two steps; wide models at two layers, which keeps every width and saves the memory."""
    small = ["training.steps=2", "training.tensorboard=false", "data.max_duration=8", "data.num_workers=0"]
    shallow = ["model.num_layers=2"] if path.stem in ("medium", "large") else []
    settings = resolve(TrainBackboneConfig, path, [*small, *shallow, "training.precision=float32"])
    parent = None
    if path.stem == "tuned":
        parent = tmp_path / "pretrained"
        pretrain(
            generated,
            parent,
            resolve(PretrainConfig, path.with_stem("pretrain"), [*small, "training.precision=float32"]),
            device="cpu",
        )
    train_backbone(generated, tmp_path / "run", settings, parent=parent, device="cpu")
    assert (tmp_path / "run" / "done").is_file()
    assert (tmp_path / "run" / "model.safetensors").stat().st_size > 0
