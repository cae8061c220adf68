"""Run directories of real, untrained models, and sound for them: they know nothing, but what they emit depends on what
they hear."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from asrkit.config import from_dict
from asrkit.data.text.tokenizer import Tokenizer, train_tokenizer
from asrkit.export.parity import random_log_mel
from asrkit.models import AsrModel, ModelSpec, load_model
from asrkit.models.registry import build, write_model
from asrkit.models.spec import LmSpec, PretrainedEncoderSpec
from asrkit.run_dir import CONFIG, LINEAGE, TOKENIZER, WEIGHTS, digests_of, open_run, read_yaml, write_yaml
from asrkit.training.checkpoint import save_weights

TEXTS = ["the cat sat on the mat", "le chat est sur la table", "one two three", "quatre cinq six"]

# One backbone and several operating points; the last stage trained `near`.
SUBMODELS: dict[str, Any] = {
    "submodels": {
        "near": {"kind": "attention", "layers": [0, 1], "dim": 16, "heads": 2, "context": "chunk=4,left=8"},
        "wide": {"kind": "attention", "layers": [1], "dim": 8, "heads": 2, "position": "parallel"},
        "thin": {"kind": "adapter", "layers": [0], "dim": 4},
    },
    "variants": {
        "backbone": {"submodels": [], "contexts": ["full", "chunk=4,left=0"]},
        "near": {"submodels": ["near"], "contexts": ["chunk=4,left=8", "chunk=8,left=16"]},
        "wide": {"submodels": ["wide"], "contexts": ["full"]},
        "all": {"submodels": ["near", "thin"], "contexts": ["full", "chunk=4,left=8"]},
    },
    "variant": "near",
}


def write_run(path: Path, spec: dict[str, Any] | None = None, layers: int = 1, seed: int = 7) -> Path:
    """Write a run directory with the ``spec``'s sub-models and variants; returns ``path``."""
    tokenizer = train_tokenizer(TEXTS, "char", 100, path / TOKENIZER)
    encoder = {"dim": 16, "num_layers": layers, "feedforward_dim": 16, "kernel_size": 3, "subsampling_channels": [2, 2]}
    shape = {"vocab_size": tokenizer.vocab_size, "encoder": encoder, "predictor": {"dim": 8}, "joiner_dim": 16}
    model_spec = from_dict(ModelSpec, {**shape, **(spec or {})}, "test")
    torch.manual_seed(seed)
    model = AsrModel(model_spec)
    with torch.no_grad():
        for layer in (model.joiner.out, model.ctc_head):
            layer.weight.mul_(20.0)
        model.encoder.normalize.mean.fill_(-8.0)
        model.encoder.normalize.std.fill_(4.0)
    write_yaml(path / CONFIG, {"stage": "train-backbone"})
    write_model(path, model_spec)
    save_weights(path / WEIGHTS, model)
    entry = {
        "stage": "train-backbone",
        "command": "asrkit train-backbone --out run",
        "created": "2024-01-01T00:00:00Z",
        "seconds": 1.5,
        "metrics": {"wer": 0.5},
    }
    write_yaml(path / LINEAGE, [entry | digests_of(path)])
    return path


def write_encoder(path: Path, spec: dict[str, Any] | None = None) -> Path:
    """Write the run directory of a pretrained encoder, with the ``spec``'s sub-models, variants and objective; returns ``path``."""
    shape = {"dim": 16, "num_layers": 2, "feedforward_dim": 16, "kernel_size": 3, "subsampling_channels": [2, 2]}
    encoder_spec = from_dict(PretrainedEncoderSpec, {"encoder": shape, **(spec or {})}, "test")
    torch.manual_seed(7)
    model = build(encoder_spec)
    model.encoder.normalize.mean.fill_(-8.0)
    model.encoder.normalize.std.fill_(4.0)
    path.mkdir(parents=True)
    write_yaml(path / CONFIG, {"stage": "pretrain"})
    write_model(path, encoder_spec)
    save_weights(path / WEIGHTS, model)
    write_yaml(path / LINEAGE, [{"stage": "pretrain", "command": "asrkit pretrain", "seconds": 1.0} | digests_of(path)])
    return path


def noise(random: np.random.Generator, num_samples: int) -> np.ndarray:
    """Noise whose loudness wanders, so that frames differ."""
    loudness = np.repeat(random.uniform(0.001, 0.5, num_samples // 400 + 1), 400)[:num_samples]
    return (loudness * random.uniform(-1, 1, num_samples)).astype(np.float32)


def write_lm_run(path: Path, recognizer: Path, architecture: str = "lstm", seed: int = 0) -> Path:
    """Write the run directory of an untrained language model with strong opinions, of the tokens of the run ``recognizer``."""
    tokenizer = Tokenizer(recognizer / TOKENIZER)
    shape = {"architecture": architecture, "dim": 16, "num_layers": 2, "heads": 2}
    spec = from_dict(LmSpec, {"unit": "bpe", "vocab_size": tokenizer.vocab_size, "shape": shape}, "test")
    torch.manual_seed(seed)
    model = build(spec)
    with torch.no_grad():
        model.out.weight.mul_(10.0)
    write_yaml(path / CONFIG, {"stage": "train-lm"})
    write_model(path, spec)
    tokenizer.copy_to(path / TOKENIZER)
    save_weights(path / WEIGHTS, model)
    write_yaml(path / LINEAGE, [{"stage": "train-lm", "metrics": {}, **digests_of(path)}])
    return path


def write_unsure_run(path: Path) -> Path:
    """Write a run directory of one variant, full and ``chunk=4,left=0``, which is unsure enough for what else a search heeds to
    matter: its logits are small, no token is likely everywhere, and it often begins a word."""
    variants = {"backbone": {"submodels": [], "contexts": ["full", "chunk=4,left=0"]}}
    write_run(path, {"variants": variants, "variant": "backbone"})
    model = load_model(open_run(path))
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        model.joiner.out.weight.mul_(0.3)
        encoded, _ = model.encode(random_log_mel(model, 200), torch.tensor([200] * 3), "backbone")
        contexts = torch.randint(1, model.vocab_size, (147, model.context_size))
        hidden = torch.tanh(
            model.joiner.project_encoder(encoded).flatten(0, 1)
            + model.joiner.project_predictor(model.predictor(contexts))
        )
        model.joiner.out.bias.copy_(-(model.joiner.out.weight @ hidden.mean(dim=0)))  # so that no token is everywhere
        model.joiner.out.bias[0] += 2.0
        model.joiner.out.bias[Tokenizer(path / TOKENIZER).piece_to_id("▁")] += 2.0  # hotwords begin with it
    save_weights(path / WEIGHTS, model)
    write_yaml(path / LINEAGE, [read_yaml(path / LINEAGE)[-1] | digests_of(path)])
    return path
