"""distill-lm: what its heads learn and leave alone, the runs it makes, and how they go on."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from asrkit.config import from_dict
from asrkit.data.alignment import Annotator, PerturbedCut, symbols_of
from asrkit.data.batch import Batch
from asrkit.data.bucketing import BucketPlan
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import open_cuts, write_cuts
from asrkit.data.text.tokenizer import Tokenizer
from asrkit.data.train_batches import DataConfig, TrainBatches
from asrkit.disk import sha256_of
from asrkit.methods.distillation.loss import build_loss
from asrkit.methods.lm_distillation.config import DistillLmConfig
from asrkit.methods.lm_distillation.loss import (
    counted_frames,
    frame_labels,
    frame_posteriors,
    lm_distillation_loss,
    with_heads,
)
from asrkit.methods.lm_distillation.teachers import SUPERVISED, check_alignments, load_lm_teacher
from asrkit.models import AsrModel, load_model
from asrkit.models.lm import LanguageModel
from asrkit.nn.context import FULL
from asrkit.run_dir import MODEL, WEIGHTS, open_run, read_yaml, write_yaml
from asrkit.training.asr_loss import LossConfig
from asrkit.training.contexts import ContextsConfig
from helpers.aligned import make_aligned_corpus
from helpers.commands import asrkit, launched, quick, sets
from helpers.run_dirs import metrics, weights_equal

pytest.importorskip("espeakng_loader")
pytestmark = (
    pytest.mark.slow
)  # for what they share: a recognizer and three language models, trained until they know something
UNITS = ("bpe", "phone", "senone")
SMALL_LM = sets("model.dim=16", "model.num_layers=1", "training.steps=20", "training.tensorboard=false", "held_out=0",
                "training.optimizer.warm_up_steps=5", "training.precision=float32")  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Aligned manifests, the parent that aligned them, and a language model of each unit."""
    folder = tmp_path_factory.mktemp("lm")
    parent = make_aligned_corpus(folder)
    units = ["--unit", "bpe", "--unit", "phone", "--unit", "senone", *sets("senones.number=30", "senones.smallest=10")]
    train, dev = folder / "aligned.jsonl.gz", folder / "aligned-dev.jsonl.gz"
    asrkit("align", "--from", parent, "--manifest", folder / "train.jsonl.gz", "--out", train, *units)
    tree = ["--senones", folder / "aligned.senones.yaml"]
    asrkit("align", "--from", parent, "--manifest", folder / "dev.jsonl.gz", "--out", dev, *units, *tree)
    for unit in UNITS:
        own = {"bpe": ["--tokenizer", parent / "tokenizer.model"], "senone": tree}.get(unit, [])
        asrkit("train-lm", "--manifest", train, "--unit", unit, "--out", folder / f"lm-{unit}", *own, *SMALL_LM)
    return folder


def lm_options(corpus: Path, *units: str) -> list[str]:
    return [word for unit in units for word in ("--lm", f"{unit}={corpus / f'lm-{unit}'}")]


def distill(corpus: Path, out: Path, *more: object, code: int = 0, steps: int = 4) -> str:
    files = ["--from", corpus / "parent", "--manifest", corpus / "aligned.jsonl.gz", "--out", out, "--max-duration", 20]
    return asrkit("distill-lm", *files, *quick(f"training.steps={steps}"), *more, code=code)


class Setup:
    """A model with heads, language models and an annotated batch, in this process."""

    def __init__(
        self, corpus: Path, units: tuple[str, ...], augment: dict[str, Any] | None = None, **settings: Any
    ) -> None:
        self.settings = from_dict(DistillLmConfig, settings, "test")
        run = open_run(corpus / "parent")
        teachers = {unit: load_lm_teacher(corpus / f"lm-{unit}") for unit in units}
        self.lms: dict[str, LanguageModel] = {unit: teacher.model for unit, teacher in teachers.items()}
        inventories = {unit: teacher.inventory for unit, teacher in teachers.items()}
        if self.settings.supervised is not None:
            inventories[SUPERVISED] = load_lm_teacher(corpus / f"lm-{self.settings.supervised}").inventory
        origin = load_model(run)
        heads = inventories if self.settings.mode == "mtl" else {SUPERVISED: inventories[SUPERVISED]}
        torch.manual_seed(1)
        self.model = AsrModel(with_heads(origin.spec, heads, self.settings.heads)).eval()
        self.model.load_state_dict(origin.state_dict(), strict=False)
        table = CutTable(open_cuts(corpus / "aligned.jsonl.gz"))
        data = from_dict(DataConfig, {"augment": augment or {"speed": 0.1}}, "test")
        batches = TrainBatches(table, BucketPlan(table.durations, 20.0, 1, 1, 1), 1, data, Tokenizer(run.tokenizer_path), None, 1)  # fmt: skip
        batches.annotate = Annotator(inventories, self.settings.repeats, self.settings.silence == "previous")
        self.batch: Batch = batches[0]
        self.objective = build_loss(origin.spec, LossConfig(backend="torch"), ContextsConfig())

    def loss(self) -> torch.Tensor:
        output = lm_distillation_loss(self.model, self.lms, self.batch, 0, self.settings, self.objective)
        assert output.losses.shape == (len(self.batch.cut_ids),) and output.losses.isfinite().all()
        return output.losses.sum()

    def gradients(self) -> dict[str, torch.Tensor]:
        self.model.zero_grad(set_to_none=True)
        self.loss().backward()
        return {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}


def test_frames_of_a_batch_are_the_encoders(corpus: Path) -> None:
    """Perturbed recordings too: as many as the encoder gives, and labels on most of them."""
    setup = Setup(corpus, ("phone",))
    _, lens = setup.model.encode(setup.batch.features, setup.batch.feature_lens, None, FULL)
    frames = setup.batch.segments["phone"].frames
    assert frames.shape[1] == int(lens.max())
    for row, length in enumerate(lens.tolist()):
        assert (frames[row, :length] != -2).all() and (frames[row, length:] == -2).all()
        assert float((frames[row, :length] >= 0).float().mean()) > 0.8


def test_silence_around_a_recording_has_no_label(corpus: Path) -> None:
    """Silence before and after each recording is not part of any unit; the units keep their order and lengths."""
    plain, padded = (
        Setup(corpus, ("phone",), {"speed": 0.0, "silence": seconds, "spec_augment": None}).batch
        for seconds in (0.0, 1.0)
    )
    assert plain.cut_ids == padded.cut_ids and int(padded.feature_lens.max()) > int(plain.feature_lens.max())
    lens = torch.div(padded.feature_lens - 3, 4, rounding_mode="floor").tolist()
    for row, length in enumerate(lens):
        one, other = plain.segments["phone"].frames[row], padded.segments["phone"].frames[row, :length]
        counts = [torch.bincount(frames[frames >= 0], minlength=20) for frames in (one, other)]
        assert int((counts[0] - counts[1]).abs().max()) <= 1
        silent = padded.features[row, 2:][: 4 * length].reshape(length, -1).amax(dim=1) < -8.0
        assert not bool((silent & (other >= 0)).any())


def test_all_to_the_labels_or_none(corpus: Path) -> None:
    """lambda 1: the language models' heads get nothing and the recognizer what it gets without them; lambda 0: the reverse."""
    setup = Setup(corpus, UNITS, supervised="phone", labels=1.0, supervised_scale=0.0)
    found = setup.gradients()
    setup.model.zero_grad(set_to_none=True)
    setup.objective(setup.model, setup.batch, 0).losses.sum().backward()
    for name, parameter in setup.model.named_parameters():
        if name.startswith("heads."):
            assert bool((found[name] == 0).all()), name
        else:
            assert torch.equal(found[name], parameter.grad), name  # type: ignore[arg-type]
    found = Setup(corpus, UNITS, supervised="phone", labels=0.0).gradients()
    for name, gradient in found.items():
        taught = name.startswith(("encoder.", "heads.")) and not name.startswith(f"heads.{SUPERVISED}")
        # Some of the encoder's are 0 either way, such as those of filters whose ReLU is shut.
        assert taught or bool((gradient == 0).all()), name
    assert all(float(found[f"heads.{unit}.out.weight"].abs().sum()) > 0 for unit in UNITS)


def test_several_language_models_add_up(corpus: Path) -> None:
    weights = {"bpe": 0.2, "phone": 0.5, "senone": 0.3}
    heads = {name: {"weight": weight} for name, weight in weights.items()}
    together = Setup(corpus, UNITS, labels=0.0, heads=heads)
    alone = []
    for unit in UNITS:
        one = Setup(corpus, (unit,), labels=0.0, heads={unit: heads[unit]})
        one.model.heads[unit].load_state_dict(together.model.heads[unit].state_dict())
        alone.append(one.loss())
    torch.testing.assert_close(together.loss(), torch.stack(alone).sum())
    # By default each has the same share.
    even = Setup(corpus, UNITS, labels=0.0)
    each = [
        Setup(corpus, UNITS, labels=0.0, heads={u: {"weight": float(u == unit)} for u in UNITS}).loss()
        for unit in UNITS
    ]
    torch.testing.assert_close(even.loss(), torch.stack(each).mean())


def test_the_loss_frame_by_frame(corpus: Path) -> None:
    """Equation 4 with a supervised head, and 3, in loops: the language model asked for each segment by itself."""
    for mode in ("mtl", "lst"):
        setup = Setup(corpus, ("phone",), supervised="phone", labels=0.3, mode=mode, temperature=2.0, silence="own")
        taps = setup.model.encode(setup.batch.features, setup.batch.feature_lens, None, FULL)[0]
        segments, lm = setup.batch.segments["phone"], setup.lms["phone"]
        own = setup.objective(setup.model, setup.batch, 0).losses
        expected = []
        with torch.no_grad():
            logits = {name: head(taps).log_softmax(-1) for name, head in setup.model.heads.items()}
            for row in range(len(own)):
                hard, soft = 0.0, 0.0
                for t, number in enumerate(segments.frames[row].tolist()):
                    if number < -1:
                        continue
                    target = torch.zeros(lm.spec.vocab_size)
                    label = 0
                    if number == -1:
                        target[0] = 1.0
                    else:
                        label = int(segments.symbols[row, number])
                        target = (lm(segments.symbols[row : row + 1, :number])[0, -1] / 2.0).softmax(-1)
                    hard -= float(logits[SUPERVISED][row, t, label])
                    soft -= float((target * logits["phone" if mode == "mtl" else SUPERVISED][row, t]).sum())
                mixed = 0.3 * (float(own[row]) + hard) + 0.7 * soft
                expected.append(mixed if mode == "mtl" else float(own[row]) + 0.3 * hard + 0.7 * soft)
        torch.testing.assert_close(float(setup.loss().detach()), sum(expected), rtol=1e-4, atol=1e-2)


def test_language_models_are_frozen_and_silence_has_three_ways(corpus: Path) -> None:
    setup = Setup(corpus, ("senone",), labels=0.5)
    before = {name: tensor.clone() for name, tensor in setup.lms["senone"].state_dict().items()}
    setup.gradients()
    assert all(parameter.grad is None for parameter in setup.lms["senone"].parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in setup.lms["senone"].state_dict().items())
    counts = {}
    for silence in ("ignore", "own", "previous"):
        batch = Setup(corpus, ("senone",), {"silence": 0.5}, silence=silence).batch
        counts[silence] = int(counted_frames(batch.segments["senone"], silence).sum())
        silent = (batch.segments["senone"].frames == -1) & counted_frames(batch.segments["senone"], silence)
        targets = frame_posteriors(setup.lms["senone"], batch.segments["senone"], 1.0)
        assert bool((targets[silent][:, 0] == 1).all()) and bool(
            (frame_labels(batch.segments["senone"])[silent] == 0).all()
        )
        torch.testing.assert_close(targets.sum(-1), torch.ones(targets.shape[:2]))
    assert counts["ignore"] < counts["previous"] <= counts["own"]


def test_a_head_on_a_lower_block_teaches_nothing_above(corpus: Path) -> None:
    found = Setup(corpus, ("phone",), labels=0.0, heads={"phone": {"layer": 0, "hidden": 7}}).gradients()
    assert found["heads.phone.hidden.weight"].shape[0] == 7
    above = [gradient for name, gradient in found.items() if name.startswith("encoder.blocks.1.")]
    below = [gradient for name, gradient in found.items() if name.startswith("encoder.blocks.0.")]
    assert above and all(bool((gradient == 0).all()) for gradient in above)
    assert any(float(gradient.abs().sum()) > 0 for gradient in below)


def test_units_of_the_others_do_not_shape_the_supervised_head(corpus: Path) -> None:
    shapes = []
    for units in (("phone",), ("bpe", "senone")):
        state = Setup(corpus, units, supervised="phone").model.heads[SUPERVISED].state_dict()
        shapes.append({name: tensor.shape for name, tensor in state.items()})
    assert shapes[0] == shapes[1]


@pytest.fixture(scope="module")
def taught(corpus: Path) -> Path:
    """A run with every language model and a supervised head, trained until that head has learned something."""
    run = corpus / "kd_lattice"
    more = sets("training.optimizer.learning_rate=0.01", "training.optimizer.warm_up_steps=5", "training.keep=last",
                "training.average_decay=0.9", "training.evaluate_every=60")  # fmt: skip
    dev = ["--dev", corpus / "aligned-dev.jsonl.gz"]
    distill(corpus, run, *lm_options(corpus, *UNITS), "--lambda", 0.5, "--supervised", "phone", *dev, *more, steps=60)
    return run


def test_a_run_learns_labels_and_posteriors(taught: Path) -> None:
    run = open_run(taught)
    assert run.lineage[-1]["stage"] == "distill-lm" and run.lineage[-1]["metrics"]["frame_accuracy"] > 0.5
    assert set(run.model_spec["heads"]) == {*UNITS, SUPERVISED}
    rows = metrics(taught)
    logged = [row for row in rows if "lm_phone" in row]
    for name in ("lm_bpe", "lm_phone", "lm_senone", SUPERVISED):
        assert logged[-1][name] < logged[0][name]
    assert any("dev_frame_accuracy" in row for row in rows)


def test_heads_are_left_behind(corpus: Path, taught: Path, tmp_path: Path) -> None:
    """Whoever loads the run sees the recognizer alone: the same outputs, the same exported files, another stage's run."""
    bare = tmp_path / "bare"
    shutil.copytree(taught, bare)
    content = read_yaml(bare / MODEL)
    write_yaml(bare / MODEL, {**content, "spec": {**content["spec"], "heads": {}}})
    from safetensors.torch import load_file, save_file

    kept = {name: t for name, t in load_file(bare / WEIGHTS).items() if not name.startswith("heads.")}
    assert len(kept) < len(load_file(bare / WEIGHTS))
    save_file(kept, bare / WEIGHTS)
    lineage = read_yaml(bare / "lineage.yaml")
    lineage[-1] |= {"weights_sha256": sha256_of(bare / WEIGHTS), "model_spec_sha256": sha256_of(bare / MODEL)}
    write_yaml(bare / "lineage.yaml", lineage)
    with_them, without = load_model(open_run(taught)), load_model(open_run(bare))
    assert with_them.spec == without.spec and not with_them.spec.heads
    features, lens = torch.randn(2, 90, 80), torch.tensor([90, 70])
    with torch.no_grad():
        outputs = [m.ctc_log_probs(m.encode(features, lens)[0]) for m in (with_them, without)]
    assert torch.equal(*outputs)

    told = [json.loads(asrkit("info", path, "--json")) for path in (taught, bare)]
    assert told[0]["variants"] == told[1]["variants"]
    extra = {part["part"] for part in told[0]["parts"]} - {part["part"] for part in told[1]["parts"]}
    assert extra == {f"head {name} (training only)" for name in (*UNITS, SUPERVISED)}

    asrkit(
        "quantize", "--from", taught, "--bits", 8, "--only", "encoder", "--only", "ctc_head", "--out", tmp_path / "int8"
    )
    after = open_run(tmp_path / "int8")
    assert not after.model_spec["heads"] and not any(name.startswith("heads.") for name in after.weights())
    assert "distill-lm" in [entry["stage"] for entry in after.lineage]
    asrkit("evaluate", "--from", taught, "--manifest", corpus / "dev.jsonl.gz")


def test_exported_files_know_of_no_head(taught: Path, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    asrkit("export", "--from", taught, "--out", tmp_path / "with")
    run = tmp_path / "bare"
    shutil.copytree(taught, run)
    content = read_yaml(run / MODEL)
    write_yaml(run / MODEL, {**content, "spec": {**content["spec"], "heads": {}}})
    lineage = read_yaml(run / "lineage.yaml")
    lineage[-1]["model_spec_sha256"] = sha256_of(run / MODEL)
    write_yaml(run / "lineage.yaml", lineage)
    asrkit("export", "--from", run, "--out", tmp_path / "without")
    for path in sorted((tmp_path / "with").glob("*.onnx")):
        digests = []
        for folder in ("with", "without"):
            graph = onnx.load(tmp_path / folder / path.name).graph
            assert not any("heads" in tensor.name for tensor in graph.initializer)
            digests.append(hashlib.sha256(graph.SerializeToString(deterministic=True)).hexdigest())
        assert digests[0] == digests[1], path.name


def test_lst_has_one_head(corpus: Path, tmp_path: Path) -> None:
    distill(
        corpus,
        tmp_path / "lst",
        *lm_options(corpus, "phone"),
        "--mode",
        "lst",
        "--dev",
        corpus / "aligned-dev.jsonl.gz",
    )
    run = open_run(tmp_path / "lst")
    assert list(run.model_spec["heads"]) == [SUPERVISED] and run.model_spec["heads"][SUPERVISED]["unit"] == "phone"
    assert "frame_accuracy" in run.lineage[-1]["metrics"]


def test_a_supervised_head_of_a_unit_without_a_language_model(corpus: Path, tmp_path: Path) -> None:
    distill(corpus, tmp_path / "kd", *lm_options(corpus, "bpe"), "--supervised", "phone")
    heads = open_run(tmp_path / "kd").model_spec["heads"]
    assert (heads["bpe"]["unit"], heads[SUPERVISED]["unit"]) == ("bpe", "phone")
    assert heads[SUPERVISED]["classes"] == load_lm_teacher(corpus / "lm-phone").inventory.size


INTERRUPTED = """
import os, signal, sys
from asrkit.stages import distill_lm
from asrkit.cli import app
plain = distill_lm.lm_distillation_loss
def taught(model, lms, batch, step, settings, objective):
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return plain(model, lms, batch, step, settings, objective)
distill_lm.lm_distillation_loss = taught
app()
"""


@pytest.mark.slow
def test_interrupted_and_resumed_equals_uninterrupted(corpus: Path, tmp_path: Path) -> None:
    more = [*lm_options(corpus, "phone", "bpe"), "--supervised", "senone"]
    distill(corpus, tmp_path / "whole", *more)
    files = ["--from", corpus / "parent", "--manifest", corpus / "aligned.jsonl.gz", "--out", tmp_path / "parted"]
    words = ["distill-lm", *files, "--max-duration", 20, *quick("training.steps=4"), *more]
    launched([sys.executable, "-c", INTERRUPTED], *words, code=143)
    distill(corpus, tmp_path / "parted", *more)
    assert weights_equal(tmp_path / "whole", tmp_path / "parted")


def test_cuts_without_alignment(corpus: Path, tmp_path: Path) -> None:
    """Refused by id; or they train the recognizer alone."""
    cuts = list(open_cuts(corpus / "aligned.jsonl.gz"))
    for cut in cuts[:2]:
        cut.supervisions[0].alignment.pop("phone")
    manifest = tmp_path / "partly.jsonl.gz"
    write_cuts(manifest, cuts)
    more = [*lm_options(corpus, "phone"), "--manifest", manifest]
    said = distill(corpus, tmp_path / "kd", *more, code=1)
    assert f"2 cuts ({cuts[0].id}, {cuts[1].id}) have no phone alignment; run" in said
    assert not (tmp_path / "kd").exists()
    said = distill(corpus, tmp_path / "kd", *more, "--set", "unaligned=allow", "--supervised", "phone")
    assert f"2 cuts ({cuts[0].id}, {cuts[1].id}) have no phone alignment and train the recognizer alone" in said
    inventories = {"phone": load_lm_teacher(corpus / "lm-phone").inventory}
    check_alignments(CutTable(cuts), inventories, {}, "allow")
    annotated = Annotator(inventories)([[PerturbedCut(cuts[0], 83)]])["phone"]
    assert bool((annotated.frames == -2).all()) and not bool(counted_frames(annotated, "own").any())


def test_a_head_needs_an_alignment(corpus: Path, tmp_path: Path) -> None:
    """Allowed or not: where no cut has one, nothing would ever teach the head."""
    files = ["--manifest", corpus / "train.jsonl.gz", "--set", "unaligned=allow", "--supervised", "senone"]
    said = distill(corpus, tmp_path / "kd", *lm_options(corpus, "phone"), *files, code=1)
    for unit in ("phone", "senone"):
        assert f"no cut has a {unit} alignment for a head to learn from; run asrkit align --unit {unit}" in said
    assert said.count("error: ") == 2 and not (tmp_path / "kd").exists()


def test_pieces_of_another_tokenizer_are_refused(corpus: Path, tmp_path: Path) -> None:
    """Every piece of the alignments is one of this language model's too, but it would part the texts otherwise."""
    many = tmp_path / "lm"
    files = ["--manifest", corpus / "aligned.jsonl.gz", "--unit", "bpe", "--out", many]
    asrkit("train-lm", *files, *SMALL_LM, *sets("vocab_size=40"))
    cuts = list(open_cuts(corpus / "aligned.jsonl.gz"))
    inventory = load_lm_teacher(many).inventory
    assert all(symbol in inventory for cut in cuts for symbol in symbols_of(cut, "bpe") or ())
    said = distill(corpus, tmp_path / "kd", "--lm", f"bpe={many}", code=1)
    assert (
        f"--lm bpe: its tokenizer segments {len(cuts)} texts differently from their bpe alignments: cuts {cuts[0].id},"
        in said
    )
    assert "train-lm --tokenizer" in said and not (tmp_path / "kd").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--lm", "phone={lm-bpe}"], "is a language model of bpe units; name it bpe"),
        (["--lm", "{lm-phone}"], "write NAME=RUN"),
        (["--lm", "phone=nowhere"], "no such run directory"),
        (["--lm", "phone={parent}"], "is a recognizer, not a language model; train one with `asrkit train-lm`"),
        (["--lm", "phone={lm-phone}", "--set", "labels=1.5"], "less than or equal to 1"),
        (["--lm", "phone={lm-phone}", "--lm", "phone={lm-phone}"], "the same name occurs twice"),
        (["--lm", "phone={lm-phone}", "--lm", "bpe={lm-bpe}", "--mode", "lst"], "pass one --lm"),
        (["--lm", "phone={lm-phone}", "--mode", "lst", "--supervised", "bpe"], "cannot be mixed"),
        (["--lm", "phone={lm-phone}", "--set", "heads.phone.layer=9"], "layers 0 to 1"),
        (["--lm", "phone={lm-phone}", "--set", "data.augment.join=0.3"], "data.augment.join=0.3"),
        (["--lm", "phone={lm-phone}", "--set", "heads.other.layer=0"], "no --lm of that name"),
        (["--lm", "phone={lm-phone}", "--set", "heads.supervised.layer=0"], "--supervised"),
        (["--lm", "phone={lm-phone}", "--supervised", "phone", "--set", "heads.supervised.weight=1"], "set supervised_scale instead"),
        (["--lm", "phone={lm-phone}", "--set", "supervised_scale=3"], "add one with --supervised UNIT"),
        (["--lm", "phone={lm-phone}", "--mode", "lst", "--set", "heads.phone.layer=0"], "set heads.supervised instead"),
        (["--lm", "x={other}"], "does not know"),
        (["--lm", "x={other}", "--supervised", "phone"], "error: --lm x: does not know"),
        (["--lm", "phone={lm-phone}", "--supervised", "phone", "--dev", "{dev.jsonl.gz}"], "cuts have no phone alignment"),
    ],
)  # fmt: skip
def test_bad_input_ends_in_a_line(corpus: Path, tmp_path: Path, words: list[str], complaint: str) -> None:
    names = ("lm-bpe", "lm-phone", "parent", "other", "dev.jsonl.gz")
    filled = [word for word in words]
    for name in names:
        filled = [word.replace(f"{{{name}}}", str(corpus / name)) for word in filled]
    if "other" in words[1] and not (corpus / "other").exists():
        (corpus / "few.txt").write_text("alpha bravo\n" * 4)
        asrkit(
            "train-lm",
            "--text",
            corpus / "few.txt",
            "--unit",
            "phone",
            "--language",
            "en",
            "--out",
            corpus / "other",
            *SMALL_LM,
        )
    said = distill(corpus, tmp_path / "kd", *filled, code=1)
    assert (
        complaint in said and "Traceback" not in said and all(line.startswith("error: ") for line in said.splitlines())
    )
    assert "--lm supervised" not in said and not (tmp_path / "kd").exists()


def test_a_share_beyond_one_is_refused_by_its_name(corpus: Path, tmp_path: Path) -> None:
    said = distill(corpus, tmp_path / "kd", *lm_options(corpus, "phone"), "--lambda", 1.5, code=2)
    assert "--lambda" in said and not (tmp_path / "kd").exists()


def test_each_command_has_only_its_own_options(tmp_path: Path) -> None:
    files = ["--manifest", tmp_path / "m.jsonl.gz", "--out", tmp_path / "out"]
    for words, says in (
        (["distill-lm", "--lm", "bpe=exp/lm", "--from", "exp/a", "--teacher", "exp/b"], "No such option: --teacher"),
        (["distill", "--teacher", "exp/a", "--lambda", 0.5], "No such option: --lambda"),
        (["distill-lm", "--lm", "bpe=exp/lm"], "Missing option '--from'"),
        (["distill-lm", "--from", "exp/a"], "Missing option '--lm'"),
        (["distill"], "Missing option '--teacher'"),
    ):
        assert says in asrkit(*words, *files, code=2)
    for words, says in (
        (["--lm", "exp/lm"], "--lm exp/lm: write NAME=RUN"),
        (["--lm", "a=exp/x", "--lm", "a=exp/y"], "--lm: the same name occurs twice"),
    ):
        said = asrkit("distill-lm", "--from", "exp/a", *files, *words, code=1)
        assert f"error: {says}" in said and len(said.splitlines()) == 1
    assert not any(tmp_path.iterdir())
