"""The first model of a stage that makes a new one or trains one further: its shape, initial weights and tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from asrkit.config import Advanced, Positive, Probability, Share, config, field_types, from_dict, to_dict
from asrkit.data.augment import AugmentConfig
from asrkit.data.batch import Batch
from asrkit.data.cut_audio import feature_statistics
from asrkit.data.cut_table import CutTable
from asrkit.data.text.tokenizer import Tokenizer, TokenizerKind, train_tokenizer
from asrkit.data.tokenizer_texts import tokenizer_texts
from asrkit.data.train_batches import DataConfig, TrainBatches
from asrkit.disk import sha256_of
from asrkit.errors import UserError
from asrkit.models import SIZES, AsrModel, ModelSpec, load_model
from asrkit.models.registry import ENCODER, build, load_encoder, spec_of
from asrkit.models.spec import BACKBONE, Languages, PredictorSpec, PretrainedEncoderSpec, Size, VariantSpec
from asrkit.models.surgery import rebuild, recognizer_of, recognizer_spec, with_norms_per_mode, with_variant
from asrkit.nn.context import FULL
from asrkit.nn.masks import SpanMasks
from asrkit.run_dir import TOKENIZER, WEIGHTS, RunDir, open_run
from asrkit.training.checkpoint import saved_slices
from asrkit.training.config import TrainingConfig
from asrkit.training.contexts import AttentionDropoutConfig, ContextsConfig
from asrkit.training.distributed import broadcast_object
from asrkit.training.optim import OptimizerConfig
from asrkit.training.run_writer import RunWriter
from asrkit.training.session import FineTuneConfig, StageConfig, copy_tokenizer
from asrkit.training.step import LossOutput

Loss = Callable[[AsrModel, Batch, int], LossOutput]
JOINT = "joint"  # the sub-model that trains together with the backbone


@config
class TokenizerConfig:
    """The tokenizer trained from the manifest when none is given."""

    kind: TokenizerKind = "bpe"
    """Tokens: bpe or unigram word pieces, or char for single characters."""
    vocab_size: Annotated[int, Field(ge=4)] = 500
    """Number of tokens, blank included. Fewer suit little text; char uses as many as there are characters."""
    max_texts: Advanced[Positive | None] = 200_000
    """Use at most this many texts, spread evenly over the manifests, and a few more if these lack a character (our choice); null uses all."""


@config
class EncoderConfig:
    """Shape of a new encoder: a Conformer without attention (arXiv 2005.08100), unless its attention is asked for."""

    size: Size | None = None
    """Preset shape: tiny, small, medium or large; null is small. Any other field that is set replaces the preset's value."""
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
    norms: Literal["shared", "per_mode"] = "shared"
    """shared uses the same gains and biases in every context; per_mode gives each norm a second pair for streaming
    (arXiv 2010.06030). With --from, per_mode starts the second pair as a copy, and shared keeps what the model has."""
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
class BackboneConfig(EncoderConfig):
    """Shape of a new model: an encoder and its transducer.

    The language vector is usual practice; adding it after the subsampling, starting from zeros, is our choice.
    """

    predictor_dim: Positive | None = None
    """Width of the predictor; null takes the preset's."""
    predictor_dropout: Probability = 0.1
    """Dropout in the predictor."""
    context_size: Positive = 2
    """Number of previous tokens the predictor sees."""
    joiner_dim: Positive | None = None
    """Width of the joiner; null takes the preset's."""
    languages: Languages = field(default_factory=list)
    """Languages the model takes as an input, such as [en, fr]: the encoder learns a vector for each and adds it to
    every frame. Empty: the model has no language input."""


@config
class SpanMaskConfig:
    """What is hidden between the encoder's two halves while a pretrained encoder is fine-tuned (arXiv 2006.11477, section
    4.3), in place of SpecAugment."""

    time_probability: Share = 0.1
    """Probability that a frame of 40 ms begins a hidden span; 0 hides none. The paper has 0.05 to 0.075 for each 20 ms,
    the more the less there is to learn from."""
    time_length: Positive = 5
    """Frames of 40 ms in a hidden span: 200 ms, as the paper's 10 frames of 20 ms."""
    channel_probability: Share = 0.008
    """Probability that a channel begins a span that is set to 0 in a whole utterance; 0 zeroes none. Our choice."""
    channel_length: Positive = 16
    """Channels in such a span: about a twelfth of the width of a small encoder, as the paper's 64 of 768."""


@config
class FromEncoderConfig:
    """How a recognizer is made of a pretrained encoder (arXiv 2006.11477, section 4.3)."""

    frozen_steps: Annotated[int, Field(ge=0)] | None = None
    """First steps, in which only the new parts (predictor, joiner, heads) are trained; null is a tenth of all, the
    learning rate's warm-up (our choice; the paper has 10,000 steps)."""
    freeze_embed: bool = True
    """Whether the subsampling in front of the blocks keeps its weights to the end, as the paper's feature encoder
    does."""
    masks: SpanMaskConfig | None = field(default_factory=SpanMaskConfig)
    """What is hidden in training; null hides nothing."""


@config
class StartConfig(StageConfig):
    """Settings of a stage that makes a new model or trains one further."""

    model: BackboneConfig = field(default_factory=BackboneConfig)
    """Shape of a new model."""
    tokenizer: TokenizerConfig | None = None
    """The tokenizer trained from the manifest for a new model; null uses bpe with 500 tokens, or the one given by
    --tokenizer."""
    pretrained: FromEncoderConfig = field(default_factory=FromEncoderConfig)
    """How a recognizer is made of a pretrained encoder; only where --from is one."""
    variant: str | None = None
    """Variant to train, with --from; null trains the model's default."""


@dataclass(frozen=True)
class Parent:
    """A trained model to start from. ``spec`` is its spec with the variant and the contexts to train."""

    run: RunDir
    spec: ModelSpec | PretrainedEncoderSpec

    @property
    def is_encoder(self) -> bool:
        """Whether it is a pretrained encoder, of which a recognizer is made."""
        return isinstance(self.spec, PretrainedEncoderSpec)

    def languages(self, settings: StartConfig) -> list[str]:
        """Languages that the model to train takes as an input."""
        return self.spec.languages if isinstance(self.spec, ModelSpec) else settings.model.languages

    def tokenizer(self, given: Path | None) -> Path | None:
        """The tokenizer of the model to train: the parent's, or for an encoder the ``given`` one, None where it is to be made."""
        return given if self.is_encoder else self.run.tokenizer_path


def usual_settings(parent: Path | None) -> StageConfig:
    """The defaults of a stage for a new model, or for the run directory of the model it starts from.

    A pretrained encoder gets the tri-stage rate of arXiv 2006.11477; that its peak is the usual one of a trained model, where the
    paper's is 2e-5 to 1e-4 for models of 95 M parameters and more, is our choice. Its own masks take the place of SpecAugment.

    Raises:
        UserError: an unusable run directory.
    """
    if parent is None:
        return StageConfig()
    if open_run(parent).kind != ENCODER:
        return FineTuneConfig()
    optimizer = OptimizerConfig(
        name="adamw", learning_rate=5e-4, warm_up_share=0.1, hold_share=0.4, decay="linear", final_fraction=0.0
    )
    data = DataConfig(augment=AugmentConfig(spec_augment=None))
    return StageConfig(data=data, training=TrainingConfig(optimizer=optimizer))


def config_entry(settings: StartConfig, parent: Parent | None) -> dict[str, Any]:
    """For config.yaml: the settings that apply, and the model that training starts from."""
    content = to_dict(settings)
    if parent is None:
        del content["pretrained"]
        return content
    start = {"from": str(parent.run.path), "from_weights_sha256": sha256_of(parent.run.path / WEIGHTS)}
    if parent.is_encoder:
        content["model"] = {
            key: value for key, value in content["model"].items() if key not in field_types(EncoderConfig)
        }
        return start | content
    added = ["norms"] * (settings.model.norms == "per_mode")
    if settings.model.attention_dropout.probability < 1:
        added += [key for key in content["model"] if key.startswith("attention_")]
    kept = {key: value for key, value in content.items() if key not in ("model", "tokenizer", "pretrained")}
    return start | kept | ({"model": {key: content["model"][key] for key in added}} if added else {})


def check_start(
    settings: StartConfig, parent: Path | None, tokenizer: Path | None, *, attention: bool = True
) -> list[str]:
    """Findings about options for a new model that are used with a trained one, and the other way round.

    Args:
        attention: whether the stage can add attention to a trained model.
    """
    findings = []
    encoder = parent is not None and open_run(parent).kind == ENCODER
    if parent is not None and not encoder:
        if tokenizer is not None:
            findings.append(
                f"--tokenizer {tokenizer}: a trained model already has a tokenizer; leave out --tokenizer or --from"
            )
        if settings.tokenizer is not None:
            findings.append("tokenizer: a trained model already has one; leave out --set tokenizer.* or --from")
        findings += _check_model(settings, parent, attention)
    if encoder:
        findings += _check_encoder_start(settings)
    elif settings.pretrained != FromEncoderConfig():
        findings.append(
            "pretrained: says how a recognizer is made of a pretrained encoder; give one with --from, or leave out "
            "--set pretrained.*"
        )
    if parent is None:
        findings += idle_attention(settings.model)
    if parent is None and settings.variant is not None:
        findings.append(
            f"--variant {settings.variant}: works with --from only, because a new model has no variants to choose from; leave it out"
        )
    return findings


def idle_attention(model: EncoderConfig) -> list[str]:
    """A finding about the shape of attention that a new model would not have."""
    usual = EncoderConfig()
    names = [
        name
        for name in ("attention_dim", "attention_heads", "attention_position")
        if getattr(model, name) != getattr(usual, name)
    ]
    if not names or model.attention_dropout.probability < 1:
        return []
    return [
        f"{', '.join(f'model.{name}' for name in names)}: without attention in training there is none to shape; set "
        "model.attention_dropout.probability below 1, or leave it out"
    ]


def _check_model(settings: StartConfig, parent: Path, addable: bool) -> list[str]:
    """Findings about settings of the model for a trained one, to which attention can be added, and norms for streaming; nothing else of
    its shape changes."""
    shape, usual = settings.model, BackboneConfig()
    attention = {"attention_dropout", "attention_dim", "attention_heads", "attention_position"}
    added = addable and shape.attention_dropout.probability < 1
    fixed = set(field_types(BackboneConfig)) - {"norms"} - (attention if added else set())
    findings = []
    if set_here := sorted(name for name in fixed if getattr(shape, name) != getattr(usual, name)):
        findings.append(
            f"model.{set_here[0]}: a trained model already has its shape; leave out {', '.join(f'model.{name}' for name in set_here)}, or "
            + ("--from; model.attention_dropout.probability below 1 adds attention" if addable else "--from")
        )
    if not added:
        return findings
    has = JOINT in spec_of(open_run(parent)).submodels
    sizes = ("attention_dim", "attention_heads", "attention_position")
    if has and any(getattr(shape, name) != getattr(usual, name) for name in sizes):
        findings.append(
            f"{', '.join(f'model.{name}' for name in sizes)}: {parent} already has attention ({JOINT}); leave them out"
        )
    if settings.variant is not None:
        findings.append(
            f"--variant {settings.variant}: model.attention_dropout trains the variant {JOINT}, on top of the default one; leave it out"
        )
    return findings


def _check_encoder_start(settings: StartConfig) -> list[str]:
    """Findings about settings that do not fit a pretrained encoder."""
    findings, usual = [], EncoderConfig()
    if set_here := [
        name for name in field_types(EncoderConfig) if getattr(settings.model, name) != getattr(usual, name)
    ]:
        findings.append(
            f"model.{set_here[0]}: the pretrained encoder already has its shape; leave out "
            f"{', '.join(f'model.{name}' for name in set_here)}, or --from"
        )
    frozen, steps = settings.pretrained.frozen_steps, settings.training.steps
    if frozen is not None and frozen >= steps:
        findings.append(
            f"pretrained.frozen_steps is {frozen}, but training.steps is {steps}, so the encoder would never be trained; "
            "train longer, or lower it"
        )
    return findings


def open_parent(path: Path, settings: StartConfig) -> Parent:
    """Open the run directory of a model to train further: of a recognizer, or of a pretrained encoder to make one of.

    Raises:
        UserError: an unusable run directory, or one that lacks the variant.
    """
    run = open_run(path)
    variant, contexts = settings.variant, settings.contexts.train
    if run.kind == ENCODER:
        return Parent(run, with_variant(load_encoder(run).spec, variant, contexts))
    return Parent(run, with_variant(load_model(run).spec, variant, contexts))


def first_model(settings: StartConfig, parent: Path | None, out: Path, batches: TrainBatches) -> tuple[AsrModel, str]:
    """The model at the start of training, and the variant to train.

    Args:
        parent: run directory of a model to train further, or of an encoder to make one of; None makes a new one.
        out: the run directory. If it holds a state, the weights of that state will replace those of the model.
    """
    if parent is None:
        resumed = saved_slices(out) is not None
        model = new_model(settings.model, settings.contexts, batches, with_statistics=not resumed)
        return model, trained_variant(settings.model)
    run = open_run(parent)
    if run.kind == ENCODER:
        encoder = load_encoder(run)
        shape = with_variant(encoder.spec, settings.variant, settings.contexts.train)
        spec = with_transducer(shape, settings.model, batches.tokenizer.vocab_size)
        model = recognizer_of(encoder, spec)
        model.encoder.subsampling.requires_grad_(not settings.pretrained.freeze_embed)
        masks, objective = settings.pretrained.masks, encoder.objective
        if masks is not None:
            vector = torch.zeros(spec.encoder.dim) if objective is None else objective.mask.detach()
            time = (masks.time_probability, masks.time_length)
            model.encoder.masks = SpanMasks(vector, time, (masks.channel_probability, masks.channel_length))
        return model, spec.variant
    origin = load_model(run)
    if settings.model.norms == "per_mode":
        origin = with_norms_per_mode(origin)
    spec = with_variant(origin.spec, settings.variant, settings.contexts.train)
    if dropped_attention(settings, parent) is None:
        return rebuild(spec, origin), spec.variant
    model = rebuild(with_attention(spec, settings.model), origin, new=(f"encoder.submodels.{JOINT}.",))
    if JOINT not in spec.submodels:
        model.encoder.submodels[JOINT].silence()  # type: ignore[operator]
    return model, JOINT


def steps_of_new_parts(settings: StartConfig, parent: Path | None) -> int:
    """The first steps, in which only the new parts of a recognizer made of a pretrained encoder are trained; 0 for any other."""
    if parent is None or open_run(parent).kind != ENCODER:
        return 0
    frozen = settings.pretrained.frozen_steps
    return settings.training.steps // 10 if frozen is None else frozen


def new_parts_first(settings: StartConfig, parent: Path | None, loss: Loss) -> Loss:
    """The loss of a recognizer that is made of a pretrained encoder: the encoder is not trained in the first steps, while the new
    parts find their way. Any other loss stays as it is.

    The encoder then has no gradients at all, so that the optimizer leaves it as it is, to the last bit.
    """
    steps = steps_of_new_parts(settings, parent)
    if steps == 0:
        return loss

    def of_step(model: AsrModel, batch: Batch, step: int) -> LossOutput:
        if step >= steps:
            return loss(model, batch, step)
        trained = [weight for weight in model.encoder.parameters() if weight.requires_grad]
        for weight in trained:
            weight.requires_grad_(False)
        try:
            return loss(model, batch, step)
        finally:
            for weight in trained:
                weight.requires_grad_(True)

    return of_step


def check_languages_present(settings: StartConfig, parent: Parent | None, cuts: CutTable) -> None:
    """Check that the training cuts contain all languages of a new model.

    Raises:
        UserError: some languages have no cuts.
    """
    if (parent is not None and not parent.is_encoder) or not settings.model.languages:
        return
    if missing := sorted({*settings.model.languages} - cuts.languages):
        raise UserError(
            f"model.languages: no training cut is in {', '.join(missing)}; leave these languages out, or add cuts"
        )


def model_spec(settings: BackboneConfig, vocab_size: int, contexts: ContextsConfig | None = None) -> ModelSpec:
    """The full spec of a preset with the overrides of ``settings``, to be trained in ``contexts``."""
    encoder = encoder_spec(settings, (contexts or ContextsConfig()).train)
    return with_transducer(encoder, settings, vocab_size, SIZES[settings.size or "small"])


def encoder_spec(settings: EncoderConfig, contexts: Sequence[str] | None = None) -> PretrainedEncoderSpec:
    """The spec of a preset's encoder with the overrides of ``settings``, to be trained in ``contexts``.

    Raises:
        UserError: sizes that do not fit together.
    """
    preset: dict[str, Any] = SIZES[settings.size or "small"]["encoder"]  # type: ignore[assignment]
    shape = {
        key: getattr(settings, key) or preset[key] for key in ("dim", "num_layers", "feedforward_dim", "kernel_size")
    }
    trained = VariantSpec(contexts=list(contexts or [str(FULL)]))
    variants = {BACKBONE: to_dict(trained)}
    submodels = {}
    if settings.attention_dropout.probability < 1:
        variants[JOINT] = {**to_dict(trained), "submodels": [JOINT]}
        submodels[JOINT] = _joint(settings, shape["num_layers"], shape["dim"])
    return from_dict(
        PretrainedEncoderSpec,
        {
            "encoder": {
                **shape,
                "subsampling_channels": settings.subsampling_channels,
                "dropout": settings.dropout,
                "norms": settings.norms,
            },
            "submodels": submodels,
            "variants": variants,
            # If attention is dropped, the aim is the backbone; if it never is, the aim is the whole model.
            "variant": JOINT if settings.attention_dropout.probability == 0 else BACKBONE,
        },
        "model",
    )


def _joint(settings: EncoderConfig, num_layers: int, dim: int) -> dict[str, Any]:
    """The spec of attention in every layer, as plain values."""
    return {
        "kind": "attention",
        "layers": list(range(num_layers)),
        "position": settings.attention_position,
        "dim": settings.attention_dim or dim,
        "heads": settings.attention_heads,
        "dropout": settings.dropout,
    }


def with_attention(spec: ModelSpec, settings: EncoderConfig) -> ModelSpec:
    """A trained model's spec with the sub-model joint, attention in every layer on top of the default variant, and a variant of that
    name; a model that has it keeps it. The default stays, unless attention is never dropped."""
    content = to_dict(spec)
    if JOINT not in spec.submodels:
        content["submodels"][JOINT] = _joint(settings, spec.encoder.num_layers, spec.encoder.dim)
        own = content["variants"][spec.variant]
        content["variants"][JOINT] = own | {"submodels": [*own["submodels"], JOINT]}
    else:
        content["variants"][JOINT]["contexts"] = content["variants"][spec.variant]["contexts"]
    if settings.attention_dropout.probability == 0:
        content["variant"] = JOINT
    return from_dict(ModelSpec, content, "model")


def dropped_attention(settings: StartConfig, parent: Path | None) -> AttentionDropoutConfig | None:
    """How attention is dropped in training; None for a trained model whose settings do not mention it: its attention stays."""
    dropout = settings.model.attention_dropout
    return dropout if parent is None or dropout.probability < 1 else None


def with_transducer(
    encoder: PretrainedEncoderSpec, settings: BackboneConfig, vocab_size: int, preset: Mapping[str, Any] | None = None
) -> ModelSpec:
    """The spec of a recognizer on an encoder.

    Args:
        preset: has the widths that ``settings`` does not; None takes the preset with an encoder of that width, else the width itself.
    """
    dim = encoder.encoder.dim
    if preset is None:
        presets: dict[int, Mapping[str, Any]] = {one["encoder"]["dim"]: one for one in SIZES.values()}  # type: ignore[index, misc]
        preset = presets.get(dim, {"predictor": {"dim": dim}, "joiner_dim": dim})
    predictor = PredictorSpec(
        dim=settings.predictor_dim or preset["predictor"]["dim"],
        context_size=settings.context_size,
        dropout=settings.predictor_dropout,
    )
    return recognizer_spec(
        encoder, vocab_size, predictor, settings.joiner_dim or preset["joiner_dim"], settings.languages
    )


def new_model(
    settings: BackboneConfig, contexts: ContextsConfig, batches: TrainBatches, *, with_statistics: bool
) -> AsrModel:
    """An untrained model, whose attention adds nothing yet; ``with_statistics`` measures the features of the training cuts."""
    model = build(model_spec(settings, batches.tokenizer.vocab_size, contexts))
    for attention in model.encoder.submodels.values():
        attention.silence()  # type: ignore[operator]
    if with_statistics:
        mean, std = feature_statistics(batches.table, batches.skip_bad)
        model.encoder.normalize.mean.copy_(mean)
        model.encoder.normalize.std.copy_(std)
    return model


def trained_variant(settings: EncoderConfig) -> str:
    """The variant that a new model is trained in: with attention, unless attention is always dropped."""
    return JOINT if settings.attention_dropout.probability < 1 else BACKBONE


def make_tokenizer(run: RunWriter, given: Path | None, cuts: CutTable, settings: TokenizerConfig) -> Tokenizer:
    """The run's tokenizer: the one that exists already, else a copy of the given one, else one trained on the texts."""
    if given is not None:
        return copy_tokenizer(given, run)
    path = run.path / TOKENIZER
    if run.world.is_main and not path.is_file():
        texts = tokenizer_texts(cuts, settings.max_texts)
        train_tokenizer(texts, settings.kind, settings.vocab_size, path)
    broadcast_object(run.world, None)  # the others read it only once it is there
    return Tokenizer(path)
