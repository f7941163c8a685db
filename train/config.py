"""The configuration of a training run: one TOML file, checked as a whole before any work."""

from typing import Any, Literal

from pydantic import Field, model_validator

from pipeline.config_file import Section, load_toml
from train.encoders import ByteTextEncoder, LatentCodec, PixelCodec, TextEncoder
from train.model import ModelConfig


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


class TextConfig(Section):
    """``[text]``: the text encoder, and how often a caption is dropped for guidance."""

    encoder: Literal["bytes"]
    num_tokens: int = Field(gt=0)
    embed_dim: int = Field(gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)


class LatentConfig(Section):
    """``[latent]``: what turns pictures into latents."""

    encoder: Literal["pixels"]
    downsampling: int = Field(gt=0)


class OptimiserConfig(Section):
    """``[optimiser]``: Adam, clipping and the moving average; the defaults are i1's."""

    learning_rate: float = Field(default=1e-4, gt=0)
    b1: float = Field(default=0.9, ge=0, lt=1)
    b2: float = Field(default=0.95, ge=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    mu_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)


class TrainConfig(Section):
    """The whole file."""

    mixture: str
    output: str
    resolution: int = Field(gt=0)
    steps: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    seed: int = Field(default=0, ge=0)
    time_shift: float = Field(default=1.0, gt=0)
    log_every_steps: int = Field(default=10, gt=0)
    checkpoint_every_steps: int = Field(default=1000, gt=0)
    loader_threads: int = Field(default=2, gt=0)
    evaluation_samples: int = Field(default=512, ge=0)
    model: NetworkConfig
    text: TextConfig
    latent: LatentConfig
    optimiser: OptimiserConfig = OptimiserConfig()

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
        return self

    def text_encoder(self) -> TextEncoder:
        """Return the text encoder that ``[text]`` names."""
        return ByteTextEncoder(self.text.num_tokens, self.text.embed_dim)

    def latent_codec(self) -> LatentCodec:
        """Return the codec that ``[latent]`` names."""
        return PixelCodec(self.latent.downsampling)

    def model_config_for(self, codec: LatentCodec) -> ModelConfig:
        """Return the shape of the network for these pictures."""
        return ModelConfig(
            input_size=self.resolution // codec.downsampling,
            image_resolution=self.resolution,
            in_channels=codec.channels,
            text_embed_dim=self.text.embed_dim,
            text_num_tokens=self.text.num_tokens,
            **self.model.model_dump(),
        )

    def identity(self) -> dict[str, Any]:
        """Return the settings on which the weights depend: those a resumed run must share."""
        free = {"mixture", "output", "steps", "log_every_steps", "checkpoint_every_steps"}
        return self.model_dump(exclude=free | {"loader_threads", "evaluation_samples"})


def load_config(url: str, **overrides: str | int | None) -> TrainConfig:
    """Read a configuration; overrides that are not None replace top-level values.

    Raises:
        EvenmixError: the file is missing or wrong; all mistakes are in the one message.
    """
    return load_toml(url, TrainConfig, overrides)
