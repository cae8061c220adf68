"""What a stage does on a GPU, tried where there is none: on a device that computes on the CPU and is as strict as CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from asrkit.config import from_dict
from asrkit.data.alignment import Segments
from asrkit.data.batch import Batch
from asrkit.data.manifests import open_cuts, write_cuts
from asrkit.data.masked_batches import masked
from asrkit.data.sequences import SequenceBatch
from asrkit.errors import UserError
from asrkit.methods.pretraining import PretrainConfig, pretraining_loss
from asrkit.models import SIZES, AsrModel, ModelSpec
from asrkit.models.asr import tapped
from asrkit.models.registry import build
from asrkit.models.spec import PretrainedEncoderSpec
from asrkit.nn.dropout import Dropout
from asrkit.nn.masks import SpanMasks
from asrkit.run_dir import WEIGHTS
from asrkit.training import checkpoint, distributed, update
from asrkit.training.asr_loss import LossConfig, asr_loss
from asrkit.training.asynchronous import shards
from asrkit.training.config import TrainingConfig, resolve_precision
from asrkit.training.contexts import AttentionDropoutConfig
from asrkit.training.step import BatchStream, LossOutput, StepResult, TrainTask, compute_gradients
from asrkit.training.stopping import Stopping
from helpers.aligned import SHAPE
from helpers.commands import asrkit, quick, sets
from helpers.pretend_gpu import GPU, Counts, pretend_gpu
from helpers.run_dirs import metrics
from helpers.small_runs import write_encoder
from helpers.tones import data, make_corpus

# A state is loaded into parameters that torch takes for ones without numbers.
pytestmark = pytest.mark.filterwarnings("ignore:.*copying from a non-meta parameter:UserWarning")

COMMANDS = ("asrkit.training.distributed", "asrkit.decoding.recognizer", "asrkit.stages.align")


@contextmanager
def a_gpu() -> Iterator[Counts]:
    """``--device cuda`` is the pretended GPU."""
    with pytest.MonkeyPatch.context() as patch, pretend_gpu() as counts:
        for module in COMMANDS:
            patch.setattr(f"{module}.choose_device", lambda name: torch.device("cpu") if name == "cpu" else GPU)
        yield counts


@pytest.fixture(autouse=True)
def one_dropout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both devices draw as a GPU does; a CPU's own way draws other numbers."""

    def forward(module: Dropout, x: torch.Tensor) -> torch.Tensor:
        padded = functional.pad(x, (0, 0, 0, -x.shape[-2] % 8)) if x.ndim > 1 else x  # by attention, on a GPU
        return functional.dropout(padded, module.p, module.training)[..., : x.shape[-2], :]

    monkeypatch.setattr(Dropout, "forward", forward)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two manifests, a parent with attention in a sub-model, and a pretrained encoder."""
    folder = tmp_path_factory.mktemp("gpu")
    make_corpus(folder, 8, language="en")
    make_corpus(folder, 3, seed=1, name="dev", language="en")
    asrkit("train-backbone", *data(folder), "--out", folder / "parent", *quick(*SHAPE))
    write_encoder(folder / "encoder", {"objective": {"groups": 1, "entries": 2, "code_dim": 4, "final_dim": 4}})
    return folder


def short(*settings: str) -> list[str]:
    return quick(*settings, "training.steps=2")


def on_both(folder: Path, tmp_path: Path, *words: object) -> Counts:
    """Run a stage on the CPU and on the GPU; weights and metrics must be the same."""
    asrkit(*words, "--device", "cpu", "--out", tmp_path / "cpu")
    with a_gpu() as counts:
        asrkit(*words, "--device", "cuda", "--out", tmp_path / "gpu")
    same_run(tmp_path / "cpu", tmp_path / "gpu")
    return counts


def same_run(expected: Path, found: Path) -> None:
    weights, others = load_file(expected / WEIGHTS), load_file(found / WEIGHTS)
    # Attention and the lattice take another way there.
    torch.testing.assert_close(others, weights, rtol=1e-3, atol=1e-5)
    for row, same in zip(metrics(expected), metrics(found), strict=True):
        assert row.pop("timing") and same.pop("timing") and same == pytest.approx(row, rel=1e-4)


JOINT = ["model.attention_dropout.probability=0.5", "model.attention_heads=2", "model.attention_dropout.per=utterance"]
ENCODER = [
    "model.size=tiny", "model.dim=16", "model.num_layers=2", "model.feedforward_dim=16", "model.kernel_size=3", "training.steps=2",
    "model.attention_dropout.probability=0.5", "contexts.train=[full,'chunk=4,left=8']", "data.num_workers=0",
    "training.tensorboard=false", "training.precision=float32", "training.log_every=1", "quantizer.entries=8",
]  # fmt: skip
STAGES: dict[str, list[object]] = {
    "train-backbone": ["train-backbone", *short(*SHAPE)],
    "adamw, accumulated, attention dropped": [
        "train-backbone", *short(*SHAPE, *JOINT, "training.optimizer.name=adamw", "training.accumulate=2"),
    ],
    "joint contexts": [
        "train-backbone",
        *short(*SHAPE, "contexts.train=[full,'chunk=4,left=8']", "contexts.sampling=joint",
               "contexts.distillation_scale=0.1", "contexts.distillation_delay=1", "loss.am_scale=0.1", "loss.topology=regular"),
    ],
    "add-submodel": ["add-submodel", "--from", "parent", "--name", "near", "--context", "chunk=4,left=8", *short("submodel.heads=2")],
    "prune": ["prune", "--from", "parent", "--sparsity", "2:4", "--shots", 2, *short("schedule.score=activation")],
    "supernet": [
        "supernet", "--from", "parent", "--sparsity", 0.4, "--lasso", 1,
        *quick("training.steps=3", "growth.interval=1", "growth.kind=cubic", "growth.times=2", "growth.score=adam", "growth.monotone=false",
               "members.sparsities=[0.2]", "distillation.scale=0.1"),
    ],
    "qat": ["qat", "--from", "parent", "--bits", 4, "--act-bits", 8, "--teacher", "parent", *short("quantization.weights.clip=search")],
    "qat, bits by layer": ["qat", "--from", "parent", "--budget", 0.99, "--only", "joiner", *short()],
    "distill": [
        "distill", "--teacher", "parent", "--weight", "student-teacher",
        *short(*SHAPE, "model.dim=24", "teacher.ctc_scale=0.3", "teacher.encoder_scale=0.1", "teacher.classes=all", "teacher.input=clean"),
    ],
    "pretrain": ["pretrain", *sets(*ENCODER, "mask.distractors_from=all", "loss.penalty_scale=1", "loss.gradient_scale=0.1")],
    "of an encoder": ["train-backbone", "--from", "encoder", *short("pretrained.frozen_steps=1", "tokenizer.vocab_size=18")],
    "mwer": ["sequence-train", "--from", "parent", *short("search_every=2", "l2=0.1", "hypotheses.add_reference=true")],
    "mwer of CTC, searched once": ["sequence-train", "--from", "parent", "--cache", *short("head=ctc")],
    "sampled-mbr": ["sequence-train", "--from", "parent", "--criterion", "sampled-mbr", *short()],
    "sampled-mbr of CTC": ["sequence-train", "--from", "parent", "--criterion", "sampled-mbr", *short("head=ctc", "smoothing=0")],
}  # fmt: skip


QUICK_STAGES = ("train-backbone", "distill")  # the others take more than a moment


@pytest.mark.parametrize(
    "stage", [stage if stage in QUICK_STAGES else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
)
def test_a_stage_is_the_same_on_a_gpu(folder: Path, tmp_path: Path, stage: str) -> None:
    words = [folder / word if word in ("parent", "encoder") else word for word in STAGES[stage]]
    on_both(folder, tmp_path, *words, *data(folder))


@pytest.mark.slow
def test_a_resumed_run_is_the_same_on_a_gpu(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train-backbone", *quick(*SHAPE, "training.optimizer.warm_up_steps=1"), *data(folder)]
    asrkit(*words, "--device", "cpu", "--out", tmp_path / "cpu")
    with a_gpu():
        stopped: list[object] = []

        def once(*state: Any) -> None:
            checkpoint.save_state(*state)
            if not stopped:
                stopped.append(state)
                raise KeyboardInterrupt

        monkeypatch.setattr(update, "save_state", once)
        with pytest.raises((KeyboardInterrupt, AssertionError)):
            asrkit(*words, "--device", "cuda", "--out", tmp_path / "gpu")
        asrkit(*words, "--device", "cuda", "--out", tmp_path / "gpu")
    assert stopped
    same_run(tmp_path / "cpu", tmp_path / "gpu")


@pytest.mark.parametrize("shape", ["lstm", "transformer"])
def test_language_models(folder: Path, tmp_path: Path, shape: str) -> None:
    (tmp_path / "text").write_text("alpha bravo\ncarol delta alpha\nbravo bravo\n" * 20)
    small = ["model.dim=16", "model.num_layers=1", "vocab_size=20", "training.tensorboard=false", "training.steps=2"]
    settings = sets(*small, f"model.architecture={shape}", "training.precision=float32")
    on_both(folder, tmp_path, "train-lm", "--text", tmp_path / "text", *settings)


@pytest.mark.slow
def test_pseudo_labels_and_posteriors_on_disk(folder: Path, tmp_path: Path) -> None:
    cached = ["--teacher", folder / "parent", "--cache", tmp_path / "cache", *short(*SHAPE, "teacher.ctc_scale=0")]
    on_both(folder, tmp_path / "cached", "distill", *cached, *still(), *data(folder))
    cuts = [cut for cut in open_cuts(folder / "train.jsonl.gz")]
    for cut in cuts[::2]:
        cut.supervisions = [replace(cut.supervisions[0], text="")]
    write_cuts(tmp_path / "half.jsonl.gz", cuts)
    half = ["--manifest", tmp_path / "half.jsonl.gz", "--max-duration", 20, "--labels", "teacher"]
    half += ["--tokenizer", folder / "parent" / "tokenizer.model"]
    on_both(
        folder,
        tmp_path / "labels",
        "distill",
        "--teacher",
        folder / "parent",
        *half,
        *short(*SHAPE, "teacher.ctc_scale=0"),
    )


def still() -> list[str]:
    return sets("data.augment.speed=0", "data.augment.volume_db=0")


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [["--method", "greedy", "--method", "beam", "--method", "ctc"], ["--chunk", 4, "--left", 8]]
)
def test_decoding(folder: Path, tmp_path: Path, how: list[object]) -> None:
    results = {}
    for device in ("cpu", "cuda"):
        words = ["evaluate", "--from", folder / "parent", "--manifest", folder / "dev.jsonl.gz", *how, "--json"]
        with a_gpu():
            asrkit(*words, "--device", device, "--out", tmp_path / device)
        files = sorted(path for path in (tmp_path / device).rglob("utterances.jsonl"))
        results[device] = [path.read_text() for path in files]
    assert results["cpu"] and results["cpu"] == results["cuda"]


@pytest.mark.slow
def test_a_live_stream_and_alignments(folder: Path, tmp_path: Path) -> None:
    audio = folder / "dev" / "0.wav"
    aligned = ["align", "--from", folder / "parent", "--manifest", folder / "dev.jsonl.gz", *sets("bad_cuts=skip")]
    texts = {}
    for device in ("cpu", "cuda"):
        with a_gpu():
            said = asrkit("transcribe", audio, "--from", folder / "parent", "--stream", "--fast", "--device", device)
            asrkit(*aligned, "--device", device, "--out", tmp_path / f"{device}.jsonl.gz")
        texts[device] = said, [cut.to_dict() for cut in open_cuts(tmp_path / f"{device}.jsonl.gz")]
    assert texts["cpu"] == texts["cuda"]


def test_the_pretended_device_is_strict() -> None:
    with pretend_gpu() as counts:
        there = torch.ones(3, device=GPU)
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device"):
            torch.arange(3) * there
        with pytest.raises(RuntimeError, match="same device"):
            torch.ones(3)[there.long()]
        with pytest.raises(TypeError):
            there.numpy()
        assert (there + torch.tensor(1.0)).device == GPU and there[torch.tensor([0, 2])].shape == (2,)
        counts.waits.clear()
        assert float(there.sum()) == 3.0 and there.cpu().tolist() == [1.0, 1.0, 1.0]
        assert sum(counts.waits.values()) == 2
        torch.ones(3).pin_memory().to(GPU, non_blocking=True)
        assert sum(counts.waits.values()) == 2
        torch.ones(3).to(GPU, non_blocking=True)
        torch.ones(3).pin_memory().to(GPU)
        assert sum(counts.waits.values()) == 4


class _Cuda:
    """torch.cuda as far as it is asked for a device, as strict as the real one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, count: int) -> None:
        self.current: int | None = None
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", self.set_device)

    def set_device(self, device: torch.device | int) -> None:
        index = device if isinstance(device, int) else device.index
        if index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        self.current = index


@pytest.mark.parametrize("name, expected", [("auto", 0), ("cuda", 0), ("cuda:1", 1), ("cpu", None)])
def test_one_process_takes_its_gpu(monkeypatch: pytest.MonkeyPatch, name: str, expected: int | None) -> None:
    cuda = _Cuda(monkeypatch, 2)
    with distributed.join_world(name) as world:
        assert cuda.current == expected
        assert world.device == torch.device("cpu" if expected is None else f"cuda:{expected}")


@pytest.mark.parametrize(
    "name, expected, backend",
    [("auto", "cuda:1", "nccl"), ("cuda", "cuda:1", "nccl"), ("cuda:0", "cuda:0", "gloo"), ("cpu", "cpu", "gloo")],
)
def test_the_second_of_two_processes(monkeypatch: pytest.MonkeyPatch, name: str, expected: str, backend: str) -> None:
    _Cuda(monkeypatch, 2)
    asked = _two_processes(monkeypatch)
    with distributed.join_world(name) as world:
        assert (world.rank, world.size, world.device) == (1, 2, torch.device(expected))
    assert asked == [backend]


def test_fewer_gpus_than_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    _Cuda(monkeypatch, 1)
    _two_processes(monkeypatch)
    with (
        pytest.raises(UserError, match=r"2 processes on a machine with 1 GPU\(s\); .*--device cuda:0"),
        distributed.join_world("auto"),
    ):
        pass


def _two_processes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This is the second; returns the list of the backends asked for."""
    asked: list[str] = []
    for name, value in {"WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **_: asked.append(backend))
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    return asked


def small_batch() -> Batch:
    symbols, names = torch.randint(2, 20, (2, 5)), ["a", "b"]
    lens, symbol_lens = torch.tensor([60, 50]), torch.tensor([5, 4])
    return Batch(torch.randn(2, 60, 80), lens, names, ["", ""], ["", ""], [0.6, 0.5], symbols, symbol_lens)


def a_step(
    path: Path, make: Callable[[], nn.Module], loss: Callable[[Any, Any, int], LossOutput], batch: Batch
) -> Counts:
    """What the third step launched and waited for; the first makes the optimizer's state."""
    settings = from_dict(TrainingConfig, {"precision": "float32", "tensorboard": False, "steps": 9}, "test")
    batches: Any = SimpleNamespace(slices=1, plan=SimpleNamespace(steps_per_epoch=1))
    with pretend_gpu() as counts:
        task = TrainTask(make(), loss, batches)
        updater = update.Updater(task, path, settings, 1, distributed.World(0, 1, GPU), lambda *_: None)
        there = batch.to(GPU)
        for number in range(3):
            counts.waits.clear()
            counts.launches.clear()
            result = compute_gradients(task, updater.model, {number: (there, 0.0)}, [number], 1, updater.arithmetic)
            updater.apply(result)
            updater.finish_step(0, Stopping())
    return counts


TINY = {"dim": 16, "num_layers": 2, "feedforward_dim": 16, "kernel_size": 3, "subsampling_channels": [2, 2]}


class _Source:
    """Batches that note which were made."""

    slices = 1

    def __init__(self) -> None:
        self.made: list[int] = []

    def __getitem__(self, number: int) -> Batch:
        self.made.append(number)
        return small_batch()


def test_the_next_batch_is_copied_while_the_gpu_works() -> None:
    for device, ahead in ((torch.device("cpu"), []), (GPU, [1])):
        source: Any = _Source()
        with pretend_gpu() as counts:
            stream = BatchStream(source, range(2), 0, device)
            batch, _ = stream[0]
            assert batch.features.device == device and source.made == [0]
            stream.fetch()
            stream.fetch()
            assert source.made == [0, *ahead]
            assert torch.equal(stream[1][0].symbol_lens.cpu(), small_batch().symbol_lens) and source.made == [0, 1]
            stream.fetch()  # there is no other
            counts.waits.pop("aten::_to_copy", None)  # of this test's comparison
        assert not counts.waits


def test_no_copy_to_a_gpu_is_waited_for() -> None:
    one = torch.ones(2, dtype=torch.int64)
    batches: list[Any] = [
        small_batch(),
        masked(small_batch(), from_dict(PretrainConfig, {}, "test").mask, np.random.default_rng(0)),
        replace(small_batch(), segments={"phones": Segments(one, one, one)}, clean=torch.ones(2, 3, 80)),
        SequenceBatch(torch.ones(2, 3, dtype=torch.int64), one, ["a", "b"]),
    ]
    with pretend_gpu() as counts:
        for batch in batches:
            there = batch.to(GPU)
            assert there.symbols.device == GPU
        assert not counts.waits


def torch_loss(model: AsrModel, batch: Batch, step: int) -> LossOutput:
    return asr_loss(model, batch, step, LossConfig(backend="torch"))


def test_a_step_waits_for_the_device_once(tmp_path: Path) -> None:
    """The gradient's norm, by which the step is made or skipped; lengths are known from the loader."""
    spec = from_dict(ModelSpec, {"vocab_size": 20, "encoder": TINY, "predictor": {"dim": 8}, "joiner_dim": 16}, "test")
    assert a_step(tmp_path, lambda: AsrModel(spec), torch_loss, small_batch()).waits == {"aten::_local_scalar_dense": 1}


SUBMODEL: dict[str, Any] = {
    "submodels": {"joint": {"kind": "attention", "layers": [0, 1], "dim": 16, "heads": 2}},
    "variants": {"backbone": {"submodels": []}, "joint": {"submodels": ["joint"]}},
    "variant": "joint",
    "languages": ["en", "fr"],
}


def test_attention_dropout_languages_and_masks_wait_for_nothing(tmp_path: Path) -> None:
    """What they draw or look up on the CPU is queued like any other copy."""
    content = {"vocab_size": 20, "encoder": TINY, "predictor": {"dim": 8}, "joiner_dim": 16, **SUBMODEL}
    spec = from_dict(ModelSpec, content, "test")
    dropped = AttentionDropoutConfig(probability=0.5, per="utterance")

    def make() -> AsrModel:
        model = AsrModel(spec)
        model.encoder.masks = SpanMasks(torch.zeros(16), (0.1, 2), (0.1, 2))
        return model

    def loss(model: AsrModel, batch: Batch, step: int) -> LossOutput:
        return asr_loss(model, batch, step, LossConfig(backend="torch"), attention_dropout=dropped)

    batch = replace(small_batch(), languages=["en", "fr"])
    assert a_step(tmp_path, make, loss, batch).waits == {"aten::_local_scalar_dense": 1}


def test_taps_have_the_frames_of_the_output() -> None:
    """A GPU fills the frames up to a multiple of 8 on the way."""
    content = {"vocab_size": 20, "encoder": TINY, "predictor": {"dim": 8}, "joiner_dim": 16, **SUBMODEL}
    model, batch = (
        AsrModel(from_dict(ModelSpec, content, "test")).eval(),
        replace(small_batch(), languages=["en", "fr"]),
    )
    with pretend_gpu(), torch.no_grad():
        model, there = model.to(GPU), batch.to(GPU)
        with tapped(model, [0]) as taps:
            out, _ = model.encode(there.features, there.feature_lens, languages=model.language_ids(batch.languages))
        assert taps[0].shape == out.shape == (2, 14, 16)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_auto_is_what_a_gpu_computes_in(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    """torch says of GPUs that they support bfloat16 which only emulate it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    assert resolve_precision(TrainingConfig(), torch.device("cuda:0")) == dtype


class Scaler:
    """Of a GPU: it halves its scale at each overflow, and wants to have scaled the losses."""

    def __init__(self) -> None:
        self.factor, self.scaled = 2.0**16, False

    def scale(self, losses: torch.Tensor) -> torch.Tensor:
        self.scaled = True
        return losses

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        assert self.scaled, "_scale is None"

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def update(self) -> None:
        self.factor /= 2

    def get_scale(self) -> float:
        return self.factor

    def state_dict(self) -> dict[str, Any]:
        return {}


def updater_in_float16(path: Path, monkeypatch: pytest.MonkeyPatch, *more: Any) -> update.Updater:
    monkeypatch.setattr(update, "resolve_precision", lambda *_: torch.float16)
    monkeypatch.setattr(update, "make_scaler", Scaler)
    settings = TrainingConfig(tensorboard=False, max_skipped_in_a_row=5)
    batches: Any = SimpleNamespace(slices=1, plan=SimpleNamespace(steps_per_epoch=1))
    task = TrainTask(nn.Linear(2, 1), lambda *_: LossOutput(torch.zeros(1), 1.0), batches)
    return update.Updater(task, path, settings, 1, distributed.World(0, 1, torch.device("cpu")), lambda *_: None, *more)


def step_result(value: float) -> StepResult:
    gradients: list[torch.Tensor | None] = [torch.full((1, 2), value), torch.full((1,), value)]
    return StepResult(gradients, count=1.0, audio=1.0, finite=[(["a"], torch.tensor([True]))])


def test_gradients_that_are_never_finite_end_a_run_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scaler lowers its scale until it cannot be the cause; then the steps count as skipped."""
    updater = updater_in_float16(tmp_path, monkeypatch)
    assert updater.arithmetic.scale is not None
    updater.arithmetic.scale(torch.zeros(1))
    with pytest.raises(UserError, match="not finite for 5 steps in a row"):
        for _ in range(40):
            updater.apply(step_result(float("nan")))
    assert 17 <= updater.step < 30


def test_gradients_of_replicas_are_not_unscaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updater = updater_in_float16(tmp_path, monkeypatch, False)
    weight = updater.model.get_parameter("weight")
    before = weight.detach().clone()
    updater.apply(step_result(float("nan")))
    assert torch.equal(weight, before) and updater.progress.skipped_in_a_row == 1
    updater.set_rate()
    updater.apply(step_result(1.0))
    assert not torch.equal(weight, before)


def test_shards_get_optimizer_states_of_the_cpu() -> None:
    with pretend_gpu():
        state = shards._on_cpu({"sum": torch.ones(3, device=GPU), "step": 4})
    assert state["step"] == 4 and torch.equal(state["sum"], torch.ones(3))


@pytest.mark.slow
def test_a_step_of_small_launches_few_operators_however_long_the_audio(tmp_path: Path) -> None:
    """At most 1,250 with 20 symbols an utterance: none of its loops goes over frames, utterances or parameters. A usual batch has
    1,141 (docs/results.md); one as short as this has some more in torch 1.13."""
    spec = from_dict(ModelSpec, {"vocab_size": 20, **SIZES["small"]}, "test")
    launches = []
    for frames in (120, 240):
        symbols, lens = torch.randint(2, 20, (2, 20)), torch.tensor([frames, frames - 10])
        batch = Batch(
            torch.randn(2, frames, 80), lens, ["a", "b"], ["", ""], ["", ""], [1, 1], symbols, torch.tensor([20, 18])
        )
        launches.append(a_step(tmp_path / str(frames), lambda: AsrModel(spec), torch_loss, batch).launches)
    assert launches[0] == launches[1]
    assert sum(launches[0].values()) <= 1250, launches[0].most_common(20)


def test_a_step_of_pretraining_waits_for_the_device_once(tmp_path: Path) -> None:
    """The gradient's norm: how much is hidden is known from the loader."""
    settings = from_dict(PretrainConfig, {"loss": {"penalty_scale": 1.0, "gradient_scale": 0.1}}, "test")
    content = {"encoder": TINY, "objective": {"groups": 2, "entries": 4, "code_dim": 8, "final_dim": 8}}
    spec = from_dict(PretrainedEncoderSpec, content, "test")
    batch = masked(small_batch(), settings.mask, np.random.default_rng(0))
    counts = a_step(tmp_path, lambda: build(spec), partial(pretraining_loss, settings=settings), batch)
    assert counts.waits == {"aten::_local_scalar_dense": 1}
