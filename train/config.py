"""The configuration of a training run: one TOML file, checked as a whole before any work.

It may build on another; see :mod:`train.recipe`.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config_file import Layer, Section, configure
from pipeline.errors import EvenmixError
from train import flux2_vae
from train.baselines import BaselineConfig, BaselineKind
from train.blocks import Rematerialise
from train.encoders import ByteTextEncoder, LatentCodec, PixelCodec, TextEncoder
from train.model import ModelConfig
from train.prompts import read_prompts
from train.recipe import merge, read_layers
from train.sampling import SamplingConfig
from train.t5gemma import Semantics, load_t5gemma

Precision = Literal["float32", "bfloat16"]

I1S_SAMPLING = SamplingConfig()


class NetworkConfig(Section):
    """``[model]``: the size of the network."""

    hidden_size: int = Field(gt=0, multiple_of=4)
    depth: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    mlp_ratio: float = Field(default=4.0, gt=0)
    patch_size: int = Field(default=2, gt=0)
    rope_theta: float = Field(default=10_000.0, gt=1)

    @model_validator(mode="after")
    def _shape_is_possible(self) -> "NetworkConfig":
        if self.depth % 2 == 0:
            raise ValueError("depth must be odd: as many blocks on the way in as out, and a middle")
        if self.hidden_size % self.num_heads or self.hidden_size // self.num_heads % 4:
            raise ValueError("hidden_size must be num_heads times a multiple of 4")
        return self


class I1NetworkConfig(NetworkConfig):
    """``kind = "i1"``, which is also meant where none is said."""

    kind: Literal["i1"] = "i1"
    depth: int = Field(ge=3)

    def shaped_for(self, **surroundings: Any) -> ModelConfig:
        """Return the shape of the network among its pictures and captions."""
        return ModelConfig(**surroundings, **self.model_dump(exclude={"kind"}))


class BaselineNetworkConfig(NetworkConfig):
    """Another ``kind``: a backbone of i1's controlled experiments; see :mod:`train.baselines`."""

    kind: BaselineKind
    adaln_timestep: bool = True
    adaln_pooled_text: bool = True
    adapter_blocks: int = Field(default=0, ge=0)
    long_skips: bool = True
    sandwich_norms: bool = False

    def shaped_for(self, **surroundings: Any) -> ModelConfig:
        """Return the shape of the network among its pictures and captions."""
        return BaselineConfig(**surroundings, **self.model_dump())


class TextConfig(Section):
    """``[text]``: what all text encoders have, and how often a caption is dropped for guidance.

    A batch, or a part of it, whose texts all fit in one of the lengths of ``trim_to`` is computed
    with no more tokens than that behind the adapter: the same numbers, for less work.
    """

    num_tokens: int = Field(gt=0)
    embed_dim: int = Field(gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    trim_to: list[int] = []

    @model_validator(mode="after")
    def _trims_to_lengths(self) -> "TextConfig":
        lengths = [0, *self.trim_to, self.num_tokens]
        if any(shorter >= longer for shorter, longer in pairwise(lengths)):
            raise ValueError("trim_to must be increasing, each length above 0 and below num_tokens")
        return self


class BytesConfig(TextConfig):
    """``encoder = "bytes"``: no weights."""

    encoder: Literal["bytes"]

    def load(self) -> TextEncoder:
        """Return the encoder."""
        return ByteTextEncoder(self.num_tokens, self.embed_dim)


class T5GemmaTextConfig(TextConfig):
    """``encoder = "t5gemma"``: weights and how they are used; see train.t5gemma.load_t5gemma.

    The default is i1's. No commit of it is pinned here: give one, or a folder of that name.
    """

    encoder: Literal["t5gemma"]
    weights: str = "google/t5gemma-2b-2b-ul2-it"
    revision: str | None = None
    semantics: Semantics = "i1"
    dtype: Precision = "bfloat16"

    def load(self) -> TextEncoder:
        """Return the encoder.

        Raises:
            EvenmixError: its weights cannot be had, or are of another width.
        """
        encoder = load_t5gemma(
            self.weights,
            self.revision,
            num_tokens=self.num_tokens,
            semantics=self.semantics,
            dtype=self.dtype,
        )
        if encoder.embed_dim != self.embed_dim:
            raise EvenmixError(
                f"text.embed_dim is {self.embed_dim}, but the encoder {self.weights} is "
                f"{encoder.embed_dim} wide; correct it"
            )
        return encoder


class PixelsConfig(Section):
    """``[latent]`` with pixels for latents, which needs no weights."""

    encoder: Literal["pixels"]
    downsampling: int = Field(gt=0)

    def load(self) -> LatentCodec:
        """Return the codec."""
        return PixelCodec(self.downsampling)


class Flux2Config(Section):
    """``[latent]`` by the FLUX.2 VAE, i1's if none is named; see train.flux2_vae."""

    encoder: Literal["flux2"]
    weights: str = flux2_vae.REPOSITORY
    revision: str | None = None
    dtype: Precision = "float32"

    @model_validator(mode="before")
    @classmethod
    def _the_default_is_pinned(cls, table: Any) -> Any:
        if isinstance(table, dict) and "weights" not in table:
            return {"revision": flux2_vae.REVISION} | table
        return table

    @property
    def downsampling(self) -> int:
        """Side in pixels of the square that one latent stands for."""
        return flux2_vae.DOWNSAMPLING

    def load(self) -> LatentCodec:
        """Return the codec.

        Raises:
            EvenmixError: its weights cannot be had.
        """
        return flux2_vae.load_flux2_codec(self.weights, self.revision, self.dtype)


class OptimiserConfig(Section):
    """``[optimiser]``: Adam, clipping and the moving average; the defaults are i1's."""

    learning_rate: float = Field(default=1e-4, gt=0)
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.95, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    mu_dtype: Precision = "bfloat16"
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)


class MeshConfig(Section):
    """``[mesh]``: over how many devices a state is spread; see :mod:`train.sharding`."""

    fsdp: int = Field(default=1, gt=0)


class SamplesConfig(Section):
    """``[samples]``: what the averaged weights draw while the run goes on, as `evenmix sample`.

    ``prompts`` is a list, or a file as `evenmix sample` takes it. The noise is the same each time.
    For the other settings see :class:`train.sampling.SamplingConfig`.
    """

    every_steps: int = Field(gt=0)
    prompts: str | Annotated[list[str], Field(min_length=1)]
    guidance: float = Field(default=I1S_SAMPLING.guidance, allow_inf_nan=False)
    rescale: float = Field(default=I1S_SAMPLING.rescale, ge=0, le=1)
    steps: int = Field(default=I1S_SAMPLING.steps, gt=0)
    shift: float = Field(default=I1S_SAMPLING.shift, gt=0, allow_inf_nan=False)

    def load(self) -> list[str]:
        """Return the prompts.

        Raises:
            EvenmixError: their file cannot be read, or has none.
        """
        return read_prompts(Path(self.prompts)) if isinstance(self.prompts, str) else self.prompts

    def settings(self, seed: int) -> SamplingConfig:
        """Return how to sample, with this seed of the noise."""
        return SamplingConfig(self.guidance, self.rescale, self.steps, self.shift, seed)


class TrainConfig(Section):
    """The whole file.

    ``init`` is a file with the weights that a run begins with (see :mod:`train.weights`), or the
    output folder of a run that this one goes on from: with its step, optimiser and average.
    ``precision`` is the type of the activations; ``accumulate`` is the number of parts in which a
    batch is computed, one after the other; ``rematerialise`` is what of a block is computed again
    in the backward pass instead of being kept: nothing, all but matrix products with weights
    (``dots``), or everything. Of the checkpoints the latest are kept, and those of every
    ``keep_every_steps`` for good.
    """

    mixture: str
    output: str
    resolution: int = Field(gt=0)
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    time_shift: float = Field(default=1.0, gt=0)
    log_every_steps: int = Field(default=10, gt=0)
    checkpoint_every_steps: int = Field(default=1000, gt=0)
    keep_every_steps: int | None = Field(default=None, gt=0)
    precision: Precision = "float32"
    accumulate: int = Field(default=1, gt=0)
    rematerialise: Rematerialise = "none"
    loader_threads: int = Field(default=2, gt=0)
    evaluation_samples: int = Field(default=512, ge=0)
    validate_every_steps: int | None = Field(default=None, gt=0)
    init: str | None = None
    model: I1NetworkConfig | BaselineNetworkConfig = Field(discriminator="kind")
    text: BytesConfig | T5GemmaTextConfig = Field(discriminator="encoder")
    latent: PixelsConfig | Flux2Config = Field(discriminator="encoder")
    optimiser: OptimiserConfig = OptimiserConfig()
    mesh: MeshConfig = MeshConfig()
    samples: SamplesConfig | None = None

    @field_validator("model", mode="before")
    @classmethod
    def _kind_is_i1_unless_said(cls, model: Any) -> Any:
        return {"kind": "i1"} | model if isinstance(model, dict) else model

    @model_validator(mode="after")
    def _folders_and_sizes_fit(self) -> "TrainConfig":
        if "://" in self.output:
            raise ValueError(f"output must be a local folder, not {self.output}")
        side = self.latent.downsampling * self.model.patch_size
        if self.resolution % side:
            raise ValueError(
                f"resolution {self.resolution} is no multiple of downsampling times patch_size, "
                f"{side}"
            )
        if self.keep_every_steps and self.keep_every_steps % self.checkpoint_every_steps:
            raise ValueError(
                f"keep_every_steps, {self.keep_every_steps}, must be a multiple of "
                f"checkpoint_every_steps, {self.checkpoint_every_steps}: others have no checkpoint"
            )
        if isinstance(self.latent, Flux2Config) and self.resolution % flux2_vae.PICTURE_MULTIPLE:
            raise ValueError(
                f"resolution {self.resolution} is no multiple of {flux2_vae.PICTURE_MULTIPLE}, "
                "which the FLUX.2 VAE needs"
            )
        return self

    def text_encoder(self) -> TextEncoder:
        """Return the text encoder that ``[text]`` names."""
        return self.text.load()

    def latent_codec(self) -> LatentCodec:
        """Return the codec that ``[latent]`` names."""
        return self.latent.load()

    def model_config_for(self, codec: LatentCodec) -> ModelConfig:
        """Return the shape of the network for these pictures."""
        return self.model.shaped_for(
            input_size=self.resolution // codec.downsampling,
            image_resolution=self.resolution,
            in_channels=codec.channels,
            text_embed_dim=self.text.embed_dim,
            text_num_tokens=self.text.num_tokens,
            dtype=self.precision,
        )

    def identity(self) -> dict[str, Any]:
        """Return the settings on which the weights depend: those a resumed run must share."""
        free = {"mixture", "output", "steps", "log_every_steps", "checkpoint_every_steps"}
        free |= {"loader_threads", "evaluation_samples", "keep_every_steps"}
        free |= {"validate_every_steps", "samples"}
        # These change no more than the order of sums, and in bfloat16 where they are rounded.
        free |= {"accumulate", "mesh", "rematerialise"}
        # Nor does trimming; and where the encoders' weights lie may change.
        parts = {"text": {"weights", "trim_to"}, "latent": {"weights"}}
        return self.model_dump(exclude={**{name: True for name in free}, **parts})


def load_config(name: str, **overrides: str | int | None) -> TrainConfig:
    """Read the configuration of a file, or a recipe; overrides, if not None, replace its values.

    Raises:
        EvenmixError: a file is missing or wrong; all mistakes are in the one message.
    """
    layers = read_layers(name)
    place = layers[0].place
    given = {key: value for key, value in overrides.items() if value is not None}
    layers = [Layer(place, given), *layers]
    return configure(place, merge(layers), TrainConfig, {}, layers)
