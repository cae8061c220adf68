"""The first model of a stage that makes a new one or trains one further: its shape, initial weights and tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from lhotse.cut import Cut
from pydantic import Field

from asrkit.config import Advanced, Positive, Probability, config, from_dict, to_dict
from asrkit.data.cut_audio import feature_statistics
from asrkit.data.manifests import language_of, text_of
from asrkit.data.text.tokenizer import Tokenizer, TokenizerKind, train_tokenizer
from asrkit.data.train_batches import TrainBatches
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.models import SIZES, AsrModel, ModelSpec, load_model
from asrkit.models.spec import BACKBONE, Languages, Size, VariantSpec
from asrkit.models.surgery import rebuild, with_variant
from asrkit.nn.context import FULL
from asrkit.run_dir import TOKENIZER, WEIGHTS, RunDir, open_run
from asrkit.training.checkpoint import saved_slices
from asrkit.training.contexts import AttentionDropoutConfig, ContextsConfig
from asrkit.training.distributed import broadcast_object
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import StageConfig, copy_tokenizer

JOINT = "joint"  # the sub-model that trains together with the backbone


@config
class TokenizerConfig:
    """The tokenizer trained from the manifest when none is given."""

    kind: TokenizerKind = "bpe"
    """Tokens: bpe or unigram word pieces, or char for single characters."""
    vocab_size: Annotated[int, Field(ge=4)] = 500
    """Number of tokens, blank included. Fewer suit little text; char uses as many as there are characters."""


@config
class BackboneConfig:
    """Shape of a new model: a Conformer without attention (arXiv 2005.08100) and its transducer.

    The language vector is usual practice; adding it after the subsampling, starting from zeros, is our choice.
    """

    size: Size = "small"
    """Preset shape: tiny, small, medium or large. Any other field that is set replaces the preset's value."""
    dim: Positive | None = None
    """Width of the encoder's blocks; null takes the preset's."""
    num_layers: Positive | None = None
    """Number of encoder blocks; null takes the preset's."""
    feedforward_dim: Positive | None = None
    """Inner width of each feed-forward module; null takes the preset's."""
    kernel_size: Positive | None = None
    """Taps of each convolution over time, in encoder frames of 40 ms; odd. null takes the preset's."""
    subsampling_channels: tuple[Positive, Positive] = (8, 32)
    """Channels of the two convolutions that reduce 100 feature frames a second to 25."""
    dropout: Probability = 0.1
    """Dropout in the encoder's blocks. Raise it for little data."""
    predictor_dim: Positive | None = None
    """Width of the predictor; null takes the preset's."""
    predictor_dropout: Probability = 0.1
    """Dropout in the predictor."""
    context_size: Positive = 2
    """Number of previous tokens the predictor sees."""
    joiner_dim: Positive | None = None
    """Width of the joiner; null takes the preset's."""
    norms: Advanced[Literal["shared", "per_mode"]] = "shared"
    """shared uses the same gains and biases in every context; per_mode gives each norm a second pair for streaming
    (arXiv 2010.06030)."""
    languages: Languages = field(default_factory=list)
    """Languages the model takes as an input, such as [en, fr]: the encoder learns a vector for each and adds it to
    every frame. Empty: the model has no language input."""
    attention_dropout: AttentionDropoutConfig = field(default_factory=AttentionDropoutConfig)
    """How often attention is dropped while the backbone trains; by default there is no attention."""
    attention_dim: Positive | None = None
    """Width of the attention's queries, keys and values; null takes the encoder's. Only with
    attention_dropout.probability below 1."""
    attention_heads: Positive = 4
    """Attention heads of the sub-model joint. Only with attention_dropout.probability below 1."""
    attention_position: Literal["serial", "parallel"] = "serial"
    """Where the sub-model joint attaches: serial (before the convolution) or parallel (beside it). Only with
    attention_dropout.probability below 1."""


@config
class StartConfig(StageConfig):
    """Settings of a stage that makes a new model or trains one further."""

    model: BackboneConfig = field(default_factory=BackboneConfig)
    """Shape of a new model."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer trained from the manifest for a new model; null uses bpe with 500 tokens, or the one given by
    --tokenizer."""
    variant: str | None = None
    """Variant to train, with --from; null trains the model's default."""


@dataclass(frozen=True)
class Parent:
    """A trained model to start from. ``spec`` is its spec with the variant and the contexts to train."""

    run: RunDir
    model: AsrModel
    spec: ModelSpec


def config_entry(settings: StartConfig, parent: Parent | None) -> dict[str, Any]:
    """For config.yaml: the settings that apply, and the model that training starts from."""
    content = to_dict(settings)
    if parent is None:
        return content
    start = {"from": str(parent.run.path), "from_weights_sha256": sha256_of(parent.run.path / WEIGHTS)}
    return start | {key: value for key, value in content.items() if key not in ("model", "tokenizer")}


def check_start(settings: StartConfig, parent: Path | None, tokenizer: Path | None) -> list[str]:
    """Findings about options for a new model that are used with a trained one, and the other way round."""
    findings = []
    if parent is not None and tokenizer is not None:
        findings.append(
            f"--tokenizer {tokenizer}: a trained model already has a tokenizer; leave out --tokenizer or --from"
        )
    if parent is not None and settings.tokenizer is not None:
        findings.append("tokenizer: a trained model already has one; leave out --set tokenizer.* or --from")
    if parent is not None and settings.model != BackboneConfig():
        findings.append(
            "model: a trained model already has its shape, and its attention is not dropped; "
            "leave out the size and --set model.*, or --from"
        )
    if parent is None and settings.variant is not None:
        findings.append(
            f"--variant {settings.variant}: works with --from only, because a new model has no variants to choose from; leave it out"
        )
    return findings


def open_parent(path: Path, settings: StartConfig) -> Parent:
    """Load the model of a run directory to train it further.

    Raises:
        UserError: an unusable run directory, or one that lacks the variant.
    """
    run = open_run(path)
    model = load_model(run)
    return Parent(run, model, with_variant(model.spec, settings.variant, settings.contexts.train))


def first_model(settings: StartConfig, parent: Path | None, out: Path, batches: TrainBatches) -> tuple[AsrModel, str]:
    """The model at the start of training, and the variant to train.

    Args:
        parent: run directory of a model to train further; None makes a new one.
        out: the run directory. If it holds a state, the weights of that state will replace those of the model.
    """
    if parent is not None:
        origin = open_parent(parent, settings)
        return rebuild(origin.spec, origin.model), origin.spec.variant
    resumed = saved_slices(out) is not None
    model = new_model(settings.model, settings.contexts, batches, with_statistics=not resumed)
    return model, trained_variant(settings.model)


def check_languages_present(settings: StartConfig, parent: Parent | None, cuts: Iterable[Cut]) -> None:
    """Check that the training cuts contain all languages of a new model.

    Raises:
        UserError: some languages have no cuts.
    """
    if parent is not None or not settings.model.languages:
        return
    if missing := sorted({*settings.model.languages} - {language_of(cut) for cut in cuts}):
        raise UserError(
            f"model.languages: no training cut is in {', '.join(missing)}; leave these languages out, or add cuts"
        )


def model_spec(settings: BackboneConfig, vocab_size: int, contexts: ContextsConfig | None = None) -> ModelSpec:
    """The full spec of a preset with the overrides of ``settings``, to be trained in ``contexts``."""
    preset: dict[str, Any] = SIZES[settings.size]
    encoder = {
        key: getattr(settings, key) or preset["encoder"][key]
        for key in ("dim", "num_layers", "feedforward_dim", "kernel_size")
    }
    trained = VariantSpec(contexts=(contexts or ContextsConfig()).train or [str(FULL)])
    variants = {BACKBONE: to_dict(trained)}
    submodels = {}
    if settings.attention_dropout.probability < 1:
        variants[JOINT] = {**to_dict(trained), "submodels": [JOINT]}
        submodels[JOINT] = {
            "kind": "attention",
            "layers": list(range(encoder["num_layers"])),
            "position": settings.attention_position,
            "dim": settings.attention_dim or encoder["dim"],
            "heads": settings.attention_heads,
            "dropout": settings.dropout,
        }
    return from_dict(
        ModelSpec,
        {
            "vocab_size": vocab_size,
            "encoder": {
                **encoder,
                "subsampling_channels": settings.subsampling_channels,
                "dropout": settings.dropout,
                "norms": settings.norms,
            },
            "predictor": {
                "dim": settings.predictor_dim or preset["predictor"]["dim"],
                "context_size": settings.context_size,
                "dropout": settings.predictor_dropout,
            },
            "joiner_dim": settings.joiner_dim or preset["joiner_dim"],
            "languages": settings.languages,
            "submodels": submodels,
            "variants": variants,
            # If attention is dropped, the aim is the backbone; if it never is, the aim is the whole model.
            "variant": JOINT if settings.attention_dropout.probability == 0 else BACKBONE,
        },
        "model",
    )


def new_model(
    settings: BackboneConfig, contexts: ContextsConfig, batches: TrainBatches, *, with_statistics: bool
) -> AsrModel:
    """An untrained model, whose attention adds nothing yet; ``with_statistics`` measures the features of the training cuts."""
    model = AsrModel(model_spec(settings, batches.tokenizer.vocab_size, contexts))
    for attention in model.encoder.submodels.values():
        attention.silence()  # type: ignore[operator]
    if with_statistics:
        mean, std = feature_statistics(batches.table)
        model.encoder.normalize.mean.copy_(mean)
        model.encoder.normalize.std.copy_(std)
    return model


def trained_variant(settings: BackboneConfig) -> str:
    """The variant that a new model is trained in: with attention, unless attention is always dropped."""
    return JOINT if settings.attention_dropout.probability < 1 else BACKBONE


def make_tokenizer(run: RunWriter, given: Path | None, cuts: Iterable[Cut], settings: TokenizerConfig) -> Tokenizer:
    """The run's tokenizer: the one that exists already, else a copy of the given one, else one trained on the texts."""
    if given is not None:
        return copy_tokenizer(given, run)
    path = run.path / TOKENIZER
    if run.world.is_main and not path.is_file():
        train_tokenizer((text_of(cut) for cut in cuts), settings.kind, settings.vocab_size, path)
    broadcast_object(run.world, None)  # the others read it only once it is there
    return Tokenizer(path)
