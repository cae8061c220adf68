"""What teachers add to a student's loss: routing by language, and the weight of each utterance."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asrkit.config import from_dict, to_dict
from asrkit.data.batch import Batch
from asrkit.errors import UserError
from asrkit.losses.distillation import counted_nodes, node_divergence
from asrkit.losses.transducer import gather_pruned, transducer_loss
from asrkit.methods.distillation.cache import CachedOutputs, compute_arcs
from asrkit.methods.distillation.config import DistillationConfig, WeightConfig
from asrkit.methods.distillation.loss import Distillation, build_loss, distillation_loss
from asrkit.methods.distillation.teacher_outputs import TeacherOutputs
from asrkit.methods.distillation.teachers import ANY, Teacher, Teachers, open_teachers, route
from asrkit.methods.distillation.weights import scheduled_weight, weights_of
from asrkit.models import AsrModel, ModelSpec
from asrkit.nn.context import FULL, parse_context
from asrkit.run_dir import read_yaml, write_yaml
from asrkit.training.asr_loss import LossConfig, LossOutput, asr_loss, forward_losses
from asrkit.training.config import TrainingConfig
from asrkit.training.contexts import ContextsConfig
from asrkit.training.session import StageConfig
from helpers.small_runs import SUBMODELS, write_run

LOSS = LossConfig(backend="torch", warm_up_steps=0)
LANGUAGES = ["en", "fr", "en", "it"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Teacher]]:
    """A teacher of English, two of French, one for all the rest; with sub-models, and of other sizes."""
    folder = tmp_path_factory.mktemp("runs")
    runs = {
        "en": [write_run(folder / "en", layers=2)],
        "fr": [write_run(folder / "fr", SUBMODELS, layers=2), write_run(folder / "wide", {"joiner_dim": 24})],
        ANY: [write_run(folder / "all")],
    }
    opened = open_teachers(runs)
    for number, one in enumerate(teacher for several in opened.values() for teacher in several):
        torch.manual_seed(number)
        for parameter in one.model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return opened


@pytest.fixture
def student(teachers: dict[str, list[Teacher]]) -> AsrModel:
    torch.manual_seed(99)
    return AsrModel(teachers[ANY][0].model.spec).train()


def batch(vocab: int = 20, languages: list[str] = LANGUAGES) -> Batch:
    generator = torch.Generator().manual_seed(5)
    size = len(languages)
    features = torch.randn(size, 90, 80, generator=generator)
    return Batch(
        features,
        torch.tensor([90, 83, 61, 70])[:size],
        [str(number) for number in range(size)],
        [""] * size,
        languages,
        [0.9] * size,
        torch.randint(2, vocab, (size, 6), generator=generator),
        torch.tensor([6, 5, 3, 4])[:size],
        features + 0.1 * torch.randn(size, 90, 80, generator=generator),
    )


def rows_of(batch: Batch, rows: list[int]) -> Batch:
    tensors = {
        name: getattr(batch, name)[rows] for name in ("features", "feature_lens", "symbols", "symbol_lens", "clean")
    }
    lists: dict[str, Any] = {
        name: [getattr(batch, name)[row] for row in rows] for name in ("cut_ids", "texts", "languages", "durations")
    }
    return replace(batch, **tensors, **lists)


def taught(
    student: AsrModel,
    teachers: Teachers,
    batch: Batch,
    step: int = 0,
    steps: int = 10,
    context: str = "full",
    **options: Any,
) -> LossOutput:
    teaching = from_dict(DistillationConfig, {**to_dict(DistillationConfig()), **options}, "teacher")
    torch.manual_seed(3)
    distillation = Distillation(teachers, teaching)
    return distillation_loss(student, distillation, batch, step, LOSS, parse_context(context), steps)


def plain(student: AsrModel, batch: Batch) -> LossOutput:
    torch.manual_seed(3)
    return asr_loss(student, batch, 0, LOSS)


def alone(teacher: Teacher) -> Teachers:
    return {ANY: [teacher]}


CONSTANT = {"kind": "constant"}


def test_each_utterance_has_the_teacher_of_its_language(teachers: Teachers, student: AsrModel) -> None:
    assert [(rows, len(several)) for rows, several in route(teachers, LANGUAGES)] == [([0, 2], 1), ([1], 2), ([3], 1)]
    assert route({ANY: teachers[ANY], "en": teachers[ANY]}, LANGUAGES) == [([0, 1, 2, 3], teachers[ANY])]


@pytest.mark.parametrize("lattice", ["pruned", "full"])
@pytest.mark.parametrize("classes", ["three", "all"])
@pytest.mark.parametrize("kind", ["constant", "student-teacher"])
def test_a_mixed_batch_is_the_sum_of_its_languages(
    teachers: Teachers, student: AsrModel, lattice: str, classes: str, kind: str
) -> None:
    student.eval()  # dropout draws for a whole batch
    options: dict[str, Any] = {"lattice": lattice, "classes": classes, "weight": {"kind": kind}, "ctc_scale": 0.5}
    whole = taught(student, teachers, batch(), **options)
    for rows in ([0, 2], [1], [3]):
        part = taught(student, teachers, rows_of(batch(), rows), **options)
        torch.testing.assert_close(part.losses, whole.losses[rows], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole.losses, plain(student, batch()).losses)


def test_the_constant_weight_is_that_of_the_paper_bit_for_bit(teachers: Teachers, student: AsrModel) -> None:
    """loss + beta * KL (arXiv 2011.06110, equation 8)."""
    (guide,) = teachers["en"]
    found = taught(student, alone(guide), batch(), scale=0.3, ctc_scale=0.0, weight=CONSTANT, input="shared")
    torch.manual_seed(3)
    own = forward_losses(student, batch(), 0, LOSS, None, FULL, None)
    assert own.transducer is not None
    model, b = guide.model, batch()
    with torch.no_grad():
        encoded = model.joiner.project_encoder(model.encode(b.features, b.feature_lens)[0])
        predicted = model.joiner.project_predictor(model.predictor(model.predictor.contexts_of(b.symbols)))
        logits = model.joiner(*gather_pruned(encoded, predicted, own.transducer.ranges))
    kl = node_divergence(
        own.transducer.logits, logits, b.symbols, own.transducer.ranges, own.encoder_out_lens, own.symbol_lens
    )
    assert torch.equal(found.losses, own.losses + 0.3 * kl)


def test_the_temperature_is_that_of_ctc_too(teachers: Teachers, student: AsrModel) -> None:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), summed over an utterance's frames."""
    (teacher,) = teachers["en"]
    student.eval()
    options: dict[str, Any] = {
        "scale": 0.0,
        "ctc_scale": 0.5,
        "weight": CONSTANT,
        "input": "shared",
        "temperature": 3.0,
    }
    found = taught(student, alone(teacher), batch(), **options)
    with torch.no_grad():
        both = [model.encode(batch().features, batch().feature_lens) for model in (student, teacher.model)]
        q, p = (
            (model.ctc_log_probs(out) / 3).softmax(-1)
            for model, (out, _) in zip((student, teacher.model), both, strict=True)
        )
    kl = (p * (p / q).log()).sum(-1)
    sums = torch.stack([row[:length].sum() for row, length in zip(kl, both[0][1].tolist(), strict=True)])
    torch.testing.assert_close(found.losses, plain(student, batch()).losses + 0.5 * 9 * sums, rtol=1e-5, atol=1e-4)


def test_weight_nothing_is_plain_training_bit_for_bit(teachers: Teachers, student: AsrModel) -> None:
    expected = plain(student, batch()).losses
    assert torch.equal(taught(student, teachers, batch(), scale=0.0, ctc_scale=0.0).losses, expected)
    nothing = {"kind": "piecewise", "points": [[0, 0.0]]}
    assert torch.equal(taught(student, teachers, batch(), weight=nothing).losses, expected)


def test_a_teacher_that_is_the_student_teaches_nothing(teachers: Teachers) -> None:
    (guide,) = teachers[ANY]
    student = AsrModel(guide.model.spec)
    student.load_state_dict(guide.model.state_dict())
    student.eval()
    for lattice in ("pruned", "full"):
        for classes in ("three", "all"):
            found = taught(student, alone(guide), batch(), input="shared", lattice=lattice, classes=classes, scale=5.0)
            assert float(found.metrics["kd_lattice"].total) == pytest.approx(0.0, abs=1e-3)
            torch.testing.assert_close(found.losses, plain(student, batch()).losses, rtol=1e-4, atol=1e-3)


def test_teachers_get_no_gradient_and_do_not_drop_out(teachers: Teachers, student: AsrModel) -> None:
    found = taught(student, teachers, batch())
    found.losses.sum().backward()
    for several in teachers.values():
        for teacher in several:
            assert not teacher.model.training
            assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert student.joiner.out.weight.grad is not None
    assert {"kd_lattice", "kd_weight", "kd_teacher_loss", "kd_ctc"} <= set(found.metrics)


def test_several_teachers_teach_their_mean(teachers: Teachers, student: AsrModel) -> None:
    student.eval()
    one, other = teachers["fr"]
    common: dict[str, Any] = {"weight": CONSTANT, "ctc_scale": 0.0, "classes": "all", "scale": 1.0}
    parts = [float(taught(student, {ANY: several}, batch(), **common).metrics["kd_lattice"].total) for several in ([one], [other], [one, other])]  # fmt: skip
    # KL is convex in the teacher, so the mean is nearer than they are on the average.
    assert parts[2] < (parts[0] + parts[1]) / 2
    twice = taught(student, {ANY: [one, one]}, batch(), **common)
    assert float(twice.metrics["kd_lattice"].total) == pytest.approx(parts[0], rel=1e-4)
    # The loss that weighs is the mean of theirs.
    losses = [taught(student, {ANY: several}, batch()).metrics["kd_teacher_loss"].total for several in ([one], [other], [one, other])]  # fmt: skip
    torch.testing.assert_close(losses[2], (losses[0] + losses[1]) / 2)


def test_the_teachers_loss_is_its_own(teachers: Teachers, student: AsrModel) -> None:
    (guide,) = teachers["en"]
    b, model = batch(), guide.model
    with torch.no_grad():
        encoder_out, lens = model.encode(b.features, b.feature_lens)
        predicted = model.predictor(model.predictor.contexts_of(b.symbols))
        expected = transducer_loss(
            model.joiner.project_encoder(encoder_out),
            model.joiner.project_predictor(predicted),
            model.joiner,
            model.simple_encoder(encoder_out),
            model.simple_predictor(predicted),
            b.symbols,
            lens,
            b.symbol_lens,
            backend="torch",
            topology="modified",
        ).pruned
    found = taught(student, alone(guide), b, input="shared").metrics["kd_teacher_loss"].total
    torch.testing.assert_close(found, expected.sum())


def test_which_input_and_which_context_the_teacher_has(teachers: Teachers, student: AsrModel) -> None:
    (guide,) = teachers["en"]
    student.eval()
    totals = {
        float(
            distillation_loss(
                student,
                Distillation(
                    alone(guide),
                    DistillationConfig(input=given, context=context, weight=WeightConfig(kind="constant")),
                ),
                batch(),
                0,
                LOSS,
                parse_context("chunk=2,left=2"),
                10,
            )
            .losses.detach()
            .sum()
        )
        for given in get_args(Literal["clean", "shared"])
        for context in get_args(Literal["own", "same"])
    }
    assert len(totals) == 4


def test_convex_gives_up_its_share_of_the_pruned_loss(teachers: Teachers, student: AsrModel) -> None:
    student.eval()
    common: dict[str, Any] = {"weight": CONSTANT, "ctc_scale": 0.0, "scale": 0.25}
    added = taught(student, teachers, batch(), **common)
    convex = taught(student, teachers, batch(), combination="convex", **common)
    own = forward_losses(student, batch(), 0, LOSS, None, FULL, None)
    torch.testing.assert_close(added.losses - convex.losses, 0.25 * own.pruned)
    with pytest.raises(UserError, match="at most 1"):
        taught(student, teachers, batch(), combination="convex", scale=2.0)


def test_mean_and_temperature(teachers: Teachers, student: AsrModel) -> None:
    student.eval()
    (guide,) = teachers["en"]
    common: dict[str, Any] = {"weight": CONSTANT, "ctc_scale": 0.0, "scale": 1.0, "lattice": "full"}
    whole, mean = (
        taught(student, alone(guide), batch(), reduction=reduction, **common) for reduction in ("sum", "mean")
    )
    base = plain(student, batch()).losses
    lens = torch.div(batch().feature_lens - 3, 4, rounding_mode="floor")
    torch.testing.assert_close(
        (mean.losses - base) * lens * (batch().symbol_lens + 1), whole.losses - base, rtol=1e-3, atol=1e-2
    )
    # Hot posteriors are all alike: T^2 KL tends to a constant, and does not vanish.
    hot, hotter = (
        float(
            taught(student, alone(guide), batch(), classes="all", temperature=t, **common).metrics["kd_lattice"].total
        )
        for t in (50.0, 200.0)
    )
    assert hot == pytest.approx(hotter, rel=0.1) and hot > 0.1


losses = st.floats(0.0, 1e4)
KINDS = st.sampled_from(["token", "frame", "sum"])


def ratio(student: float, teacher: float, **options: Any) -> float:
    lens = torch.tensor([4]), torch.tensor([20])
    config = WeightConfig(kind=options.pop("kind", "student-teacher"), **options)
    return float(weights_of(config, 0, 10, torch.tensor([student]), torch.tensor([teacher]), *lens))


@settings(deadline=None, max_examples=50)
@given(losses, losses, st.floats(1.0, 1e3), KINDS)
def test_the_ratio_rises_with_the_student_and_falls_with_the_teacher(
    student: float, teacher: float, more: float, per: Any
) -> None:
    assert ratio(student + more, teacher, per=per) > ratio(student, teacher, per=per)
    assert ratio(student + 1.0, teacher + more, per=per) < ratio(student + 1.0, teacher, per=per)
    assert ratio(0.0, teacher, per=per) == 0.0
    assert ratio(student, 1e12, per=per) < 1e-6
    assert ratio(student, teacher + more, kind="teacher-loss", per=per) < ratio(student, teacher, kind="teacher-loss", per=per)  # fmt: skip


def test_what_the_losses_are_measured_per() -> None:
    assert ratio(8.0, 12.0, per="token") == pytest.approx(2.0 / 4.0)
    assert ratio(8.0, 12.0, per="frame") == pytest.approx(0.4 / 1.6)
    assert ratio(8.0, 12.0, per="sum") == pytest.approx(8.0 / 13.0)
    assert ratio(8.0, 12.0, per="sum", clamp=(0.7, 2.0)) == pytest.approx(0.7)
    assert ratio(100.0, 0.0, per="sum", clamp=(0.7, 2.0)) == pytest.approx(2.0)


def test_through_the_weight_flows_what_the_formula_says(teachers: Teachers, student: AsrModel) -> None:
    """Gradients with and without ``detach`` differ by KL * grad(L_student) / (1 + L_teacher)."""
    student.eval()
    (guide,) = teachers["en"]
    one = rows_of(batch(), [0])
    common: dict[str, Any] = {"scale": 1.0, "ctc_scale": 0.0}
    grads = []
    for detach in (True, False):
        student.zero_grad()
        found = taught(student, alone(guide), one, weight={"kind": "student-teacher", "per": "sum", "detach": detach}, **common)  # fmt: skip
        found.losses.sum().backward()
        grads.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in student.parameters()])
    student.zero_grad()
    own = forward_losses(student, one, 0, LOSS, None, FULL, None)
    assert own.transducer is not None
    own.transducer.pruned.sum().backward()
    factor = found.metrics["kd_lattice"].total / (1 + found.metrics["kd_teacher_loss"].total)
    for with_detach, without, parameter in zip(*grads, student.parameters(), strict=True):
        expected = torch.zeros_like(parameter) if parameter.grad is None else factor * parameter.grad
        torch.testing.assert_close(without - with_detach, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["linear", "exponential"])
def test_decays_reach_their_ends_and_never_rise(kind: Any) -> None:
    config = WeightConfig(kind=kind, start=2.0, end=0.5, from_step=3, to_step=13)
    values = [scheduled_weight(config, step, 30) for step in range(30)]
    assert values[3] == pytest.approx(2.0) and values[13] == pytest.approx(0.5)
    assert set(values[:4]) == {2.0} and set(values[13:]) == {values[13]}
    assert all(a > b for a, b in pairwise(values[3:14]))
    assert values[8] == pytest.approx(1.25 if kind == "linear" else 1.0)
    whole = WeightConfig(kind=kind, start=2.0, end=0.5)
    assert scheduled_weight(whole, 29, 30) == pytest.approx(0.5) and scheduled_weight(whole, 0, 30) == 2.0
    assert scheduled_weight(whole, 0, 1) == 2.0


def test_piecewise() -> None:
    config = WeightConfig(kind="piecewise", points=[(0, 1.0), (5, 0.5), (9, 0.0)])
    assert [scheduled_weight(config, step, 30) for step in (0, 4, 5, 8, 9, 29)] == [1.0, 1.0, 0.5, 0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"kind": "linear", "start": 0.1, "end": 0.2}, "cannot rise"),
        ({"kind": "exponential", "end": 0.0}, "never reaches 0"),
        ({"kind": "linear", "from_step": 5, "to_step": 5}, "must be greater than from_step"),
        ({"kind": "piecewise"}, "needs points"),
        ({"kind": "piecewise", "points": [[0, 0.5], [3, 0.6]]}, "must not"),
        ({"clamp": [2.0, 1.0]}, "minimum, maximum"),
        ({"start": -1.0}, "greater than or equal to 0"),
    ],
)
def test_weights_that_make_no_sense(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        from_dict(WeightConfig, options, "weight")


def test_other_frame_rates_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path / "run")
    monkeypatch.setattr("asrkit.methods.distillation.teachers.load_model", _eighths)
    with pytest.raises(UserError, match="one encoder frame per 8 feature frames"):
        open_teachers({"en": [path]})


def test_teachers_without_the_head_that_teaches_are_refused(tmp_path: Path) -> None:
    """Their last training counts, whatever was done to them since."""
    path = write_run(tmp_path / "run")
    entry = read_yaml(path / "lineage.yaml")[-1]
    digests = {name: value for name, value in entry.items() if name.endswith("sha256")}

    def refused(losses: list[list[str]], **options: Any) -> tuple[str, ...]:
        trained = [{"stage": "train-backbone", "losses": each} for each in losses]
        write_yaml(path / "lineage.yaml", [*trained, {"stage": "quantize", **digests}])
        teaching = from_dict(DistillationConfig, {**to_dict(DistillationConfig()), **options}, "teacher")
        try:
            Distillation(open_teachers({"en": [path]}), teaching).check(
                StageConfig(loss=LOSS, training=TrainingConfig(steps=10))
            )
        except UserError as error:
            return error.lines
        return ()

    assert refused([]) == refused([["transducer", "ctc"]]) == refused([["ctc"], ["transducer", "ctc"]]) == ()
    (said,) = refused([["transducer", "ctc"], ["transducer"]])
    assert "was trained without CTC; set teacher.ctc_scale=0" in said
    assert refused([["transducer"]], ctc_scale=0.0) == ()
    (said,) = refused([["transducer", "ctc"], ["ctc"]])
    assert "was trained without a transducer" in said
    assert len(refused([["ctc"]], scale=0.0)) == 1 and refused([["ctc"]], scale=0.0, weight=CONSTANT) == ()


def test_a_weight_of_losses_needs_a_transducer(teachers: Teachers, student: AsrModel) -> None:
    ctc_only = LossConfig(transducer_scale=0.0)
    with pytest.raises(UserError, match="compares transducers"):
        build_loss(student.spec, ctc_only, ContextsConfig(), Distillation(teachers, DistillationConfig()))
    teaching = DistillationConfig(weight=WeightConfig(kind="constant"), ctc_scale=0.5)
    found = build_loss(student.spec, ctc_only, ContextsConfig(), Distillation(teachers, teaching))(student, batch(), 0)
    assert "kd_ctc" in found.metrics and "kd_lattice" not in found.metrics


def _eighths(run: Any) -> AsrModel:
    from asrkit.models import load_model

    model = load_model(run)
    model.subsampling = 8
    return model


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(-3, 3), st.integers(1, 4), st.integers(0, 10**6))
def test_what_is_stored_is_what_the_teachers_say(teachers: Teachers, delay: int, width: int, seed: int) -> None:
    """Up to float16, at any nodes."""
    b = batch()
    lens = torch.div(b.feature_lens - 3, 4, rounding_mode="floor")
    common = (b.languages, b.features, b.feature_lens, b.symbols, b.symbol_lens, lens)
    live = TeacherOutputs(teachers, *common, delay=delay)
    arcs = compute_arcs(teachers, b)
    assert [mine.shape for mine in arcs] == [(2, int(t), int(u) + 1) for t, u in zip(lens, b.symbol_lens, strict=True)]
    kept = CachedOutputs(arcs, b.symbol_lens, lens, delay)
    generator = torch.Generator().manual_seed(seed)
    ranges = torch.randint(0, 8 - width, (4, 7, 1), generator=generator) + torch.arange(width)
    nodes = counted_nodes(ranges, lens - 3, b.symbol_lens)
    one, other = (lesson.node_log_probs(slice(3, 10), ranges).exp()[nodes] for lesson in (live, kept))
    torch.testing.assert_close(one, other, rtol=0, atol=2e-3)
    # The live loss is over the teacher's pruned lattice, which is the whole when it is wide enough.
    whole = LossConfig(backend="torch", prune_range=7)
    torch.testing.assert_close(
        live.transducer_losses(whole)[[0, 2, 3]], kept.transducer_losses(whole)[[0, 2, 3]], rtol=5e-3, atol=5e-3
    )


def test_encoders_are_met_in_the_teachers_space(teachers: Teachers, student: AsrModel) -> None:
    student.eval()
    (guide,) = teachers[ANY]
    common: dict[str, Any] = {"scale": 0.0, "ctc_scale": 0.0, "encoder_scale": 1.0, "weight": CONSTANT}
    same = AsrModel(guide.model.spec)
    same.load_state_dict(guide.model.state_dict())
    same.eval()
    assert float(taught(same, alone(guide), batch(), input="shared", **common).metrics["kd_encoder"].total) < 1e-6
    spec = to_dict(student.spec)
    spec["encoder"]["dim"] = 24
    wider = AsrModel(from_dict(ModelSpec, spec, "test")).eval()
    Distillation(teachers, DistillationConfig(encoder_scale=1.0)).attach(wider)
    names = {teacher.name for several in teachers.values() for teacher in several}
    assert set(wider.teacher_maps) == names and len(names) == 4
    found = taught(wider, teachers, batch(), **common)
    found.losses.sum().backward()
    for teacher_map in wider.teacher_maps.values():
        (gradient, _) = (parameter.grad for parameter in teacher_map.parameters())
        assert gradient is not None and float(gradient.abs().sum()) > 0
    Distillation(teachers, DistillationConfig(encoder_scale=1.0)).attach(student)
    assert not len(student.teacher_maps)  # as wide as every teacher
