"""quantize, qat and prune: what they promise of the weights they write, and their refusals."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from asrkit.data.batch import Batch
from asrkit.methods.bit_allocation import choose_bits, measure
from asrkit.models import AsrModel
from asrkit.models.compression import LayerChoice, choose_layers, compressed_layers
from asrkit.models.sizes import sizes
from asrkit.nn.compression import CompressedLinear, find_mask
from asrkit.nn.compression_config import Mask, WeightQuantization
from asrkit.run_dir import open_run
from asrkit.training.asr_loss import LossConfig, asr_loss
from helpers.commands import TORCHRUN, TWO, asrkit, killed, launched, quick
from helpers.run_dirs import metrics, model_of, weights_equal
from helpers.tones import data, make_corpus

SHAPE = [
    "model.size=tiny", "model.num_layers=2", "model.dim=32", "model.feedforward_dim=48", "tokenizer.vocab_size=18",
    "model.attention_dropout.probability=0",
]  # fmt: skip


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    make_corpus(folder, 12)
    make_corpus(folder, 4, seed=1, name="dev")
    return folder


@pytest.fixture(scope="module")
def parent(corpus: Path) -> Path:
    """A small Conformer: every kind of linear layer is in it."""
    run = corpus / "parent"
    asrkit("train-backbone", *data(corpus), "--out", run, *quick(*SHAPE))
    return run


@pytest.fixture(scope="module")
def sparse(corpus: Path, parent: Path) -> Path:
    run = corpus / "sparse"
    asrkit("prune", "--from", parent, "--sparsity", "2:4", "--shots", 2, *data(corpus), "--out", run, *quick())
    return run


def outputs(model: AsrModel) -> torch.Tensor:
    features = torch.randn(2, 90, 80, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.ctc_log_probs(model.encode(features, torch.tensor([90, 70]))[0])


def test_quantize_rounds_the_weights_and_nothing_else(parent: Path, tmp_path: Path) -> None:
    asrkit("quantize", "--from", parent, "--bits", 4, "--out", tmp_path / "q")
    before, after = model_of(parent), model_of(tmp_path / "q")
    layers = compressed_layers(after)
    assert {path.split(".")[0] for path in layers} == {"encoder"} and len(layers) > 10
    assert all(torch.equal(tensor, after.state_dict()[name]) for name, tensor in before.state_dict().items())
    for path, layer in layers.items():
        codes = layer.codes()
        assert codes.codes.abs().max() == 7
        plain = before.get_submodule(path)
        assert isinstance(plain, torch.nn.Linear)
        plain.weight.data.copy_(codes.weights())
    torch.testing.assert_close(outputs(before), outputs(after), rtol=1e-3, atol=1e-3)
    assert not torch.equal(outputs(model_of(parent)), outputs(after))
    asrkit("quantize", "--from", parent, "--bits", 8, "--only", "ctc_head", "--out", tmp_path / "h")
    assert list(compressed_layers(model_of(tmp_path / "h"))) == ["ctc_head"]


@pytest.mark.parametrize(
    "how",
    [
        ["--bits", "4", "--act-bits", "8"],
        ["--bits", "2", "--set", "quantization.weights.symmetric=false", "--set", "quantization.weights.scale=block",
         "--set", "quantization.weights.block_size=16"],
        ["--bits", "8", "--from-scratch", "--set", "quantization.layers.first=1"],
    ],
)  # fmt: skip
def test_qat_trains_what_it_will_run(corpus: Path, parent: Path, tmp_path: Path, how: list[str]) -> None:
    run = tmp_path / "qat"
    asrkit("qat", "--from", parent, *data(corpus), "--out", run, *quick(), *how)
    model = model_of(run)
    layers = compressed_layers(model)
    bits = int(how[1])
    assert layers and all(layer.how.weights is not None and layer.how.weights.bits == bits for layer in layers.values())
    if "--from-scratch" in how:
        assert not any(".blocks.1." in path for path in layers) and any(".blocks.0." in path for path in layers)
        (before, after) = (open_run(path).weights() for path in (parent, run))
        assert torch.equal(before["encoder.normalize.mean"], after["encoder.normalize.mean"])
        name = "encoder.blocks.1.conv.out.weight"
        assert float((before[name] - after[name]).abs().mean()) > 0.5 * float(before[name].abs().mean())
    asrkit("evaluate", "--from", run, "--manifest", corpus / "dev.jsonl.gz")
    config = open_run(run).config
    assert config["stage"] == "qat" and config["quantization"]["weights"]["bits"] == bits


def test_pruning_leaves_two_of_four_and_they_stay_pruned(parent: Path, sparse: Path) -> None:
    model = model_of(sparse)
    layers = compressed_layers(model)
    assert len(layers) == len(
        [m for p, m in model.named_modules() if isinstance(m, torch.nn.Linear) and p.startswith("encoder")]
    )
    for layer in layers.values():
        groups = layer.mask.view(layer.out_features, -1, 4)
        assert bool((groups.sum(-1) == 2).all())
        assert bool((layer.weight[~layer.mask] == 0).all())
    before = model_of(parent)
    moved = [p for p, layer in layers.items() if not torch.equal(layer.weight, before.get_submodule(p).weight)]  # type: ignore[arg-type]
    assert moved


@pytest.mark.slow
def test_masks_are_frozen_after_the_last_shot(corpus: Path, parent: Path, sparse: Path, tmp_path: Path) -> None:
    """A run of two shots that ends right after them has the masks of one that trained on."""
    short = tmp_path / "short"
    asrkit("prune", "--from", parent, "--sparsity", "2:4", "--shots", 2, *data(corpus), "--out", short, *quick(),
           "--set", "training.steps=2", "--set", "training.optimizer.decay=constant")  # fmt: skip
    whole = tmp_path / "whole"
    asrkit("prune", "--from", parent, "--sparsity", "2:4", "--shots", 2, *data(corpus), "--out", whole, *quick(),
           "--set", "training.optimizer.decay=constant")  # fmt: skip
    first, last = model_of(short), model_of(whole)
    for path, layer in compressed_layers(first).items():
        other = last.get_submodule(path)
        assert isinstance(other, CompressedLinear) and torch.equal(layer.mask, other.mask), path


@pytest.mark.slow
def test_integers_on_a_pruned_model(corpus: Path, sparse: Path, tmp_path: Path) -> None:
    run = tmp_path / "both"
    asrkit("qat", "--from", sparse, "--bits", 4, "--teacher", sparse, *data(corpus), "--out", run, *quick())
    before, after = compressed_layers(model_of(sparse)), compressed_layers(model_of(run))
    for path, layer in after.items():
        assert torch.equal(layer.mask, before[path].mask)
        assert bool((layer.codes().codes[~layer.mask] == 0).all()) and bool((layer.weight[~layer.mask] == 0).all())
    assert any("kd_lattice" in row for row in metrics(run))
    # The published account of int4 with 2:4: 9.375 % of what is compressed.
    layers = after.values()
    weights = sum(layer.weight.numel() for layer in layers)
    rest = sum(4 * (layer.out_features + layer.bias.numel()) for layer in layers)
    others = sum(row["float_bytes"] for row in sizes(model_of(run)).values()) - sum(
        4 * (layer.weight.numel() + layer.bias.numel()) for layer in layers
    )
    assert sum(row["bytes"] for row in sizes(model_of(run)).values()) == pytest.approx(
        0.09375 * 4 * weights + rest + others, abs=8
    )
    said = asrkit(
        "quantize", "--from", sparse, "--bits", 2, "--set", "weights.symmetric=false", "--out", tmp_path / "no", code=1
    )
    assert "no exact zero" in said and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_masks_and_integers_in_one_fine_tuning(corpus: Path, parent: Path, sparse: Path, tmp_path: Path) -> None:
    """As US20250078815A1 has it; what comes out is of the kind and size that prune and then qat make."""
    words = ["qat", "--from", parent, "--bits", 4, "--sparsity", "2:4", *data(corpus)]
    once, often = tmp_path / "once", tmp_path / "often"
    asrkit(*words, "--out", once, *quick("training.steps=1"))
    weights = open_run(parent).weights()
    for path, layer in compressed_layers(model_of(once)).items():  # the masks are those of the parent's weights
        assert torch.equal(layer.mask, find_mask(weights[f"{path}.weight"].abs(), Mask(keep=2, group=4))), path
    asrkit(*words, "--shots", 2, "--out", often, *quick())
    layers = compressed_layers(model_of(often))
    for layer in layers.values():
        assert layer.how.weights is not None and layer.how.weights.bits == 4
        assert bool((layer.mask.view(layer.out_features, -1, 4).sum(-1) == 2).all())
        assert not layer.weight[~layer.mask].any() and not layer.codes().codes[~layer.mask].any()
        assert layer.codes().codes.abs().max() == 7
    asrkit("qat", "--from", sparse, "--bits", 4, *data(corpus), "--out", tmp_path / "after", *quick())
    assert set(compressed_layers(model_of(tmp_path / "after"))) == set(layers)
    assert sizes(model_of(often)) == sizes(model_of(tmp_path / "after"))
    assert open_run(often).lineage[-1]["masks_final_before_step"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("score", ["magnitude", "activation"])
def test_everything_learns_in_a_step_that_finds_masks(corpus: Path, parent: Path, tmp_path: Path, score: str) -> None:
    """Scores by activation take a pass without gradients first, whose bfloat16 copies of the weights must not serve training."""
    run = tmp_path / "one"
    asrkit("prune", "--from", parent, *data(corpus), "--out", run,
           *quick(f"schedule.score={score}", "training.steps=1", "training.precision=bfloat16", "training.average_decay=0",
                 "training.optimizer.warm_up_steps=0"))  # fmt: skip
    before, after = open_run(parent).weights(), open_run(run).weights()
    still = {name for name, tensor in before.items() if tensor.is_floating_point() and torch.equal(tensor, after[name])}
    assert still <= {"encoder.normalize.mean", "encoder.normalize.std", "encoder.normalize.scale"}, still


@pytest.mark.slow
def test_pruned_weights_decay_by_the_formula(corpus: Path, parent: Path, tmp_path: Path) -> None:
    """SR-STE adds decay / 2 times their squares to a step's loss, however many frames and parts the step has."""
    losses = {}
    for kind in ("plain", "sr"):
        asrkit("prune", "--from", parent, "--shots", 2, *data(corpus), "--out", tmp_path / kind,
               *quick(f"schedule.straight_through={kind}", "schedule.decay=0.1", "training.accumulate=2", "training.log_every=1",
                     "training.precision=float32"))  # fmt: skip
        losses[kind] = metrics(tmp_path / kind)[0]["loss"]
    model = model_of(parent)
    pruned = 0.0
    for path in compressed_layers(model_of(tmp_path / "sr")):
        weight = model.get_submodule(path).weight.detach()  # type: ignore[operator, union-attr]
        mask = find_mask(weight.abs(), Mask(keep=2, group=4))
        pruned += float((weight * ~mask).square().sum())
    assert pruned > 1
    assert losses["sr"] - losses["plain"] == pytest.approx(0.1 / 2 * pruned, rel=1e-3)


@pytest.mark.slow
def test_prune_from_scratch(corpus: Path, parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "anew"
    asrkit("prune", "--from", parent, "--from-scratch", "--only", "encoder", *data(corpus), "--out", run, *quick())
    before, after = open_run(parent).weights(), open_run(run).weights()
    assert torch.equal(before["encoder.normalize.mean"], after["encoder.normalize.mean"])
    name = "joiner.out.weight"
    assert float((before[name] - after[name]).abs().mean()) > 0.5 * float(before[name].abs().mean())
    for path, layer in compressed_layers(model_of(run)).items():
        assert not path.startswith("encoder.submodels.")
        assert bool((layer.mask.view(layer.out_features, -1, 4).sum(-1) == 2).all())


def test_what_is_left_is_quantized_later(parent: Path, tmp_path: Path) -> None:
    """The joiner after the encoder; but nothing twice."""
    asrkit("quantize", "--from", parent, "--bits", 4, "--out", tmp_path / "encoder")
    asrkit("quantize", "--from", tmp_path / "encoder", "--bits", 8, "--only", "joiner", "--out", tmp_path / "both")
    layers = compressed_layers(model_of(tmp_path / "both"))
    bits = {(path.split(".")[0], layer.how.weights.bits) for path, layer in layers.items() if layer.how.weights}
    assert bits == {("encoder", 4), ("joiner", 8)}
    said = asrkit("quantize", "--from", tmp_path / "encoder", "--out", tmp_path / "again", code=1)
    assert "quantized already" in said and not (tmp_path / "again").exists()


def test_blocks_little_by_little(corpus: Path, parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "blocks"
    asrkit("prune", "--from", parent, "--sparsity", 0.36, "--block", "8x1", "--schedule", "iterative", *data(corpus), "--out", run,
           *quick("layers.indivisible=skip", "schedule.score=activation"))  # fmt: skip
    for layer in compressed_layers(model_of(run)).values():
        blocks = layer.mask.view(-1, 8, layer.in_features)
        assert bool((blocks.all(1) | ~blocks.any(1)).all())
        kept, number = int(blocks.all(1).sum()), blocks.shape[0] * blocks.shape[2]
        assert kept == number - round(0.36 * number)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_masks(corpus: Path, parent: Path, sparse: Path, tmp_path: Path) -> None:
    run = tmp_path / "again"
    words = ["prune", "--from", parent, "--sparsity", "2:4", "--shots", 2, *data(corpus), "--out", run, *quick()]
    killed("step 2", *words)
    assert not (run / "done").exists()
    asrkit(*words)
    assert weights_equal(run, sparse)


@pytest.mark.slow
def test_bits_within_a_budget(corpus: Path, parent: Path, tmp_path: Path) -> None:
    run = tmp_path / "mixed"
    parts = [word for part in ("encoder", "submodels", "joiner", "ctc_head") for word in ("--only", part)]
    words = ["qat", "--from", parent, "--budget", "25%", *parts, *data(corpus), "--out", run, *quick()]
    said = asrkit(*words)
    model = model_of(run)
    rows = sizes(model).values()
    stored, plain = (sum(row[key] for row in rows) for key in ("bytes", "float_bytes"))
    assert stored <= 0.25 * plain
    bits = {path: layer.how.weights.bits for path, layer in compressed_layers(model).items() if layer.how.weights}
    assert len(set(bits.values())) > 1
    for path, layer_bits in bits.items():
        assert f"{path}: {layer_bits} bits (increase in loss if only this layer is quantized: 8 bits" in said
    # The bits are in bits.yaml, so a resumed run does not choose them again.
    before = (run / "model.yaml").read_bytes()
    (run / "done").unlink()
    assert "increase in loss" not in asrkit(*words) and (run / "model.yaml").read_bytes() == before
    refused = asrkit(
        "qat", "--from", parent, "--budget", "1%", *data(corpus), "--out", tmp_path / "no", *quick(), code=1
    )
    assert "even with 2 bits" in refused and not (tmp_path / "no").exists()


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_the_steps_down_that_cost_least_are_taken(data: st.DataObject) -> None:
    names = [f"layer{number}" for number in range(data.draw(st.integers(1, 5)))]
    costs, sizes_of = {}, {}
    for name in names:
        four, two = (data.draw(st.floats(0, 1)) for _ in range(2))
        costs[name] = {8: 0.0, 4: four, 2: four + two}
        weights = data.draw(st.integers(1, 1000))
        sizes_of[name] = {bits: weights * bits / 8 for bits in (8, 4, 2)}
    least, most = (sum(sizes_of[name][bits] for name in names) for bits in (2, 8))
    allowed = data.draw(st.floats(least, most))
    chosen = choose_bits(costs, sizes_of, allowed)
    assert sum(sizes_of[name][bits] for name, bits in chosen.items()) <= allowed + 1e-6
    if allowed == most:
        assert set(chosen.values()) == {8}
    # A layer that costs nothing goes down before one that costs something for as many bytes.
    free = dict(costs, **{names[0]: {8: 0.0, 4: 0.0, 2: 0.0}})
    same = {name: sizes_of[names[0]] for name in names}
    tight = sum(row[8] for row in same.values()) - 1e-9
    if all(costs[name][4] > 0 for name in names[1:]):
        assert choose_bits(free, same, tight)[names[0]] < 8


def test_measuring_leaves_the_model_alone(parent: Path) -> None:
    model = model_of(parent)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layers = choose_layers(model, LayerChoice(include=["*.conv.out"]))
    batch = Batch(
        torch.randn(2, 80, 80), torch.tensor([80, 61]), ["a", "b"], ["", ""], ["", ""], [0.8, 0.6],
        torch.tensor([[2, 3, 4], [5, 5, 0]]), torch.tensor([3, 2]),
    )  # fmt: skip
    loss = LossConfig(backend="torch")
    costs = measure(
        model,
        layers,
        WeightQuantization(),
        lambda m, b, s: asr_loss(cast(AsrModel, m), b, s, loss),
        [batch],
    )
    assert set(costs) == {"encoder.blocks.0.conv.out", "encoder.blocks.1.conv.out"}
    assert all(set(row) == {8, 4, 2} and abs(row[8]) < 0.1 for row in costs.values())
    assert any(row[2] != 0 for row in costs.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["qat", "--budget", "little"], "write a share of the float size"),
        (["qat", "--budget", "nan"], "write a share of the float size"),
        (["qat", "--budget", "inf%"], "write a share of the float size"),
        (["qat", "--budget", "-5%"], "write a share of the float size"),
        (["prune", "--sparsity", "2:5"], "groups of 5 do not divide"),
        (["prune", "--sparsity", "5:4"], "cannot keep 5 of 4"),
        (["prune", "--sparsity", "half"], "write N:M, such as 2:4"),
        (["prune", "--sparsity", "2:4", "--block", "8x1"], "needs a share"),
        (["prune", "--sparsity", "0.5", "--block", "7x1"], "blocks of 7x1 do not divide"),
        (["prune", "--shots", "50"], "training.steps is 4"),
        (["prune", "--schedule", "cubic"], "an N:M mask has a fixed share"),
        (["prune", "--variant", "none"], "there are backbone, joint"),
        (["qat", "--bits", "3"], "Input should be 2, 4 or 8"),
        (["qat", "--bits", "4", "--set", "quantization.weights.scale=block"], "no multiple of block_size 64"),
        (["qat", "--only", "tail"], "layers.only"),
        (["qat", "--set", "quantization.layers.include=[nothing]"], "nothing matches no linear layer"),
        (["qat", "--teacher", "nowhere"], "nowhere"),
        (["qat", "--set", "quantization.bits={'encoder.block.*': 8}"], "encoder.block.* matches no layer that is to be quantized"),
        (["qat", "--set", "quantization.bits={'joiner.*': 8}"], "joiner.* matches no layer that is to be quantized"),
        (["qat", "--budget", "30%", "--set", "quantization.weights.bits=2"], "leave out quantization.bits, weights.bits"),
        (["qat", "--set", "quantization.layers.first=99"], "the encoder has 2 blocks"),
        (["qat", "--bits", "2", "--act-bits", "8", "--set", "quantization.weights.symmetric=false"], "need symmetric"),
        (["prune", "--sparsity", "0.99", "--block", "8x16"], "is all of them"),
        (["qat", "--bits", "4", "--budget", "30%"], "use one of them"),
        (["qat", "--budget", "30%", "--set", "quantization.bits={'*': 8}"], "leave out quantization.bits"),
        (["qat", "--set", "quantization.weights.scale=block", "--set", "quantization.weights.block_size=7",
          "--set", "quantization.layers.indivisible=skip"], "nothing would be quantized"),
        (["prune", "--sparsity", "2:7", "--set", "layers.indivisible=skip"], "nothing would be pruned"),
        (["prune", "--sparsity", "0.5", "--schedule", "iterative", "--shots", "3"], "ignores schedule.shots"),
        (["prune", "--set", "schedule.straight_through=plain"], "raise schedule.shots"),
        (["qat", "--sparsity", "2:4", "--budget", "30%"], "--budget and --sparsity"),
        (["qat", "--sparsity", "2:4", "--shots", "50"], "training.steps is 4"),
        (["qat", "--sparsity", "2:5"], "groups of 5 do not divide"),
        (["qat", "--sparsity", "2:4", "--bits", "2", "--set", "quantization.weights.symmetric=false"], "no exact zero"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_leave_nothing(
    corpus: Path, parent: Path, tmp_path: Path, words: list[str], complaint: str
) -> None:
    command, *options = words
    said = asrkit(command, "--from", parent, *data(corpus), "--out", tmp_path / "run", *quick(), *options, code=1)
    assert complaint in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_nothing_is_published_before_the_masks_are_final(corpus: Path, parent: Path, tmp_path: Path) -> None:
    """The share grows until the last step but one, and dev is measured at every step: the best of before does not count."""
    run = tmp_path / "late"
    asrkit("prune", "--from", parent, "--sparsity", 0.75, "--schedule", "cubic", "--shots", 3, *data(corpus), "--out", run,
           *quick("training.evaluate_every=1", "training.save_every=1"))  # fmt: skip
    assert open_run(run).lineage[-1]["step"] >= 3
    for layer in compressed_layers(model_of(run)).values():
        assert int((~layer.mask).sum()) == round(0.75 * layer.mask.numel())
        assert bool((layer.weight[~layer.mask] == 0).all())


WATCH = """
import hashlib, os, sys
from pathlib import Path
from asrkit.cli import main
from asrkit.models.compression import compressed_layers
from asrkit.methods import pruning

found = pruning.update_masks

def update_masks(model, step, *others):
    found(model, step, *others)
    masks = b"".join(layer.mask.numpy().tobytes() for layer in compressed_layers(model).values())
    Path(os.environ["FOUND"], os.environ["RANK"]).write_text(hashlib.sha256(masks).hexdigest())

pruning.update_masks = update_masks
if os.environ["SUMMED"] == "no":
    pruning.all_sum = lambda tensor: tensor
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("summed", ["yes", "no"])
def test_two_processes_find_the_same_masks(corpus: Path, parent: Path, tmp_path: Path, summed: str) -> None:
    """Each hears other utterances: scores by activation are of both together, or the masks would differ."""
    (tmp_path / "watch.py").write_text(WATCH)
    (tmp_path / "found").mkdir()
    words = ["prune", "--from", parent, *data(corpus), "--out", tmp_path / "run",
             *quick("schedule.score=activation", "training.steps=1")]  # fmt: skip
    launched([*TORCHRUN, str(tmp_path / "watch.py")], *words, FOUND=str(tmp_path / "found"), SUMMED=summed)
    masks = {(tmp_path / "found" / rank).read_text() for rank in "01"}
    assert len(masks) == (1 if summed == "yes" else 2)


@pytest.mark.slow
def test_contexts_are_recorded_and_idle_submodels_stay(corpus: Path, parent: Path, tmp_path: Path) -> None:
    """Two processes with AdamW's decay: what no process trains is left alone."""
    run = tmp_path / "two"
    words = ["prune", "--from", parent, "--variant", "backbone", *data(corpus), "--out", run,
             *quick("schedule.score=activation", "contexts.train=[full,'chunk=4,left=8']", "training.steps=2")]  # fmt: skip
    launched(TWO, *words)
    before, after = open_run(parent).weights(), open_run(run).weights()
    idle = [name for name in before if name.startswith("encoder.submodels.")]
    assert idle and all(torch.equal(before[name], after[name]) for name in idle)
    spec = open_run(run).model_spec
    assert spec["variant"] == "backbone"
    assert spec["variants"]["backbone"]["contexts"] == ["full", "chunk=4,left=8"]
    assert spec["variants"]["joint"]["contexts"] == ["full"]


@pytest.mark.slow
def test_submodels_and_compression(corpus: Path, parent: Path, sparse: Path, tmp_path: Path) -> None:
    said = asrkit(
        "submodel", "extract", "--from", sparse, "--name", "joint", "--out", tmp_path / "j.safetensors", code=1
    )
    assert "before `asrkit prune`" in said
    asrkit("submodel", "remove", "--from", sparse, "--name", "joint", "--out", tmp_path / "less")
    assert not any("submodels" in path for path in compressed_layers(model_of(tmp_path / "less")))
    asrkit("add-submodel", "--from", sparse, "--name", "more", "--init", "joint", *data(corpus), "--out", tmp_path / "more",
           *quick("training.steps=1"))  # fmt: skip
    weights = open_run(tmp_path / "more").weights()
    assert "encoder.submodels.more.layers.0.out.weight" in weights
    assert "encoder.submodels.more.layers.0.out.mask" not in weights


def test_a_teacher_of_other_tokens_is_refused(corpus: Path, parent: Path, tmp_path: Path) -> None:
    other = [setting if "vocab_size" not in setting else "tokenizer.kind=unigram" for setting in SHAPE]
    asrkit(
        "train-backbone",
        *data(corpus),
        "--out",
        tmp_path / "other",
        *quick(*other, "tokenizer.vocab_size=18", "training.steps=1"),
    )
    said = asrkit(
        "qat",
        "--from",
        parent,
        "--teacher",
        tmp_path / "other",
        *data(corpus),
        "--out",
        tmp_path / "run",
        *quick(),
        code=1,
    )
    assert "another tokenizer" in said


def test_what_is_quantized_or_pruned_is_not_so_again(corpus: Path, parent: Path, sparse: Path, tmp_path: Path) -> None:
    asrkit("quantize", "--from", parent, "--out", tmp_path / "q")
    for command in ("qat", "prune"):
        said = asrkit(command, "--from", tmp_path / "q", *data(corpus), "--out", tmp_path / "run", *quick(), code=1)
        assert "quantized already" in said
    said = asrkit("prune", "--from", sparse, *data(corpus), "--out", tmp_path / "run", *quick(), code=1)
    assert "pruned already" in said


@pytest.mark.slow
def test_training_on_keeps_what_the_model_is(corpus: Path, parent: Path, sparse: Path, tmp_path: Path) -> None:
    """train-backbone --from: tokenizer, statistics, masks and idle sub-models stay; the other weights move a little."""
    still = quick("training.optimizer.learning_rate=1e-6")
    asrkit("train-backbone", "--from", sparse, *data(corpus), "--out", tmp_path / "on", *still)
    before, after = model_of(sparse), model_of(tmp_path / "on")
    assert open_run(sparse).tokenizer_path.read_bytes() == open_run(tmp_path / "on").tokenizer_path.read_bytes()
    assert before.spec == after.spec
    for path, layer in compressed_layers(after).items():
        assert torch.equal(layer.mask, compressed_layers(before)[path].mask)
        assert not layer.weight[~layer.mask].any()
    moved = [name for name, tensor in before.state_dict().items() if not torch.equal(tensor, after.state_dict()[name])]
    assert len(moved) > 20 and not any("normalize" in name or name.endswith(".mask") for name in moved)
    assert all(torch.allclose(before.state_dict()[name], after.state_dict()[name], atol=1e-4) for name in moved)
    assert [entry["stage"] for entry in open_run(tmp_path / "on").lineage] == [
        "train-backbone", "prune", "train-backbone"
    ]  # fmt: skip
    backbone = ["--from", parent, "--variant", "backbone"]
    asrkit("train-backbone", *backbone, *data(corpus), "--out", tmp_path / "backbone", *still)
    idle = model_of(tmp_path / "backbone")
    assert idle.spec.variant == "backbone"
    for name, tensor in model_of(parent).state_dict().items():
        if name.startswith("encoder.submodels."):
            assert torch.equal(tensor, idle.state_dict()[name]), name
    said = asrkit(
        "submodel", "extract", "--from", tmp_path / "backbone", "--name", "joint", "--out", tmp_path / "j", code=1
    )
    assert "train-backbone trained the backbone" in said and not (tmp_path / "j").exists()
    # Trained together again, the two fit.
    joint = ["--from", tmp_path / "backbone", "--variant", "joint", *data(corpus)]
    asrkit("train-backbone", *joint, "--out", tmp_path / "joint", *quick("training.steps=1"))
    asrkit("submodel", "extract", "--from", tmp_path / "joint", "--name", "joint", "--out", tmp_path / "j")


def test_training_on_refuses_what_a_new_model_is_told(corpus: Path, parent: Path, tmp_path: Path) -> None:
    words = ["--from", parent, "--tokenizer", parent / "tokenizer.model", *data(corpus), "--out", tmp_path / "no"]
    said = asrkit("train-backbone", *words, *quick("model.size=tiny", "tokenizer.kind=char"), code=1)
    lines = said.strip().splitlines()
    assert (
        len(lines) == 3
        and "--tokenizer" in lines[0]
        and "tokenizer: " in lines[1]
        and "already has its shape" in lines[2]
    )
    said = asrkit("train-backbone", *data(corpus), "--variant", "joint", "--out", tmp_path / "no", *quick(), code=1)
    assert said.count("\n") == 1 and "works with --from only" in said and not (tmp_path / "no").exists()


@pytest.mark.slow
def test_training_on_is_resumed(corpus: Path, sparse: Path, tmp_path: Path) -> None:
    words = ["train-backbone", "--from", sparse, *data(corpus), *quick()]
    asrkit(*words, "--out", tmp_path / "whole")
    killed("step 2", *words, "--out", tmp_path / "parted")
    asrkit(*words, "--out", tmp_path / "parted")
    assert weights_equal(tmp_path / "whole", tmp_path / "parted")
