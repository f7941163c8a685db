"""The FLUX.2 VAE against diffusers' with small random weights, and against i1's latents."""

import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from skimage import data

from pipeline.errors import EvenmixError
from tests import golden_i1
from tests.vllm_shim import sitecustomize  # noqa: F401 - lets torchvision be imported
from train.config import TrainConfig
from train.flux2_vae import (
    FILE,
    QUERIES_AT_A_TIME,
    Flux2Codec,
    attend,
    denormalise,
    load_flux2_codec,
    normalise,
)


@pytest.fixture(scope="module", autouse=True)
def _exact_products() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def reference() -> Any:
    """diffusers' class, each weight random, those that begin as ones and zeros too."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2

    torch.manual_seed(0)
    vae = AutoencoderKLFlux2(block_out_channels=(32, 64, 64, 96)).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
        golden = golden_i1.load("flux2_latents")
        vae.bn.running_mean.copy_(torch.from_numpy(golden["in/running_mean"]))
        vae.bn.running_var.copy_(torch.from_numpy(golden["in/running_var"]))
        # As in a trained VAE, some variances are so small that they are cut.
        vae.quant_conv.bias[32:36] -= 40
    return vae


@pytest.fixture(scope="module")
def folder(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, as the Hub has it."""
    path = tmp_path_factory.mktemp("model")
    reference.save_pretrained(path / "vae")
    return path


@pytest.fixture(scope="module")
def codec(folder: Path) -> Flux2Codec:
    return load_flux2_codec(str(folder))


# Compiled once for all tests.
@pytest.fixture(scope="module")
def posterior(codec: Flux2Codec) -> Any:
    return partial(jax.jit(codec.posterior), codec.params)


@pytest.fixture(scope="module")
def encode(codec: Flux2Codec) -> Any:
    return partial(jax.jit(codec.encode), codec.params)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    """Two crops of a photograph, not square."""
    astronaut: np.ndarray = data.astronaut()  # type: ignore[no-untyped-call]
    return np.stack([astronaut[50:82, 200:248], astronaut[100:132, 180:228]])


def expected_moments(reference: Any, pictures: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    import torch

    x = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        posterior = reference.encode(x).latent_dist
    mean, log_variance = (y.permute(0, 2, 3, 1).numpy() for y in (posterior.mean, posterior.logvar))
    return mean, log_variance


def test_the_posterior_is_that_of_diffusers(
    reference: Any, posterior: Any, pictures: np.ndarray
) -> None:
    mean, log_variance = posterior(pictures)
    expected_mean, expected_log_variance = expected_moments(reference, pictures)
    assert mean.shape == (2, 4, 6, 32)
    np.testing.assert_allclose(mean, expected_mean, atol=2e-5)
    np.testing.assert_allclose(log_variance, expected_log_variance, atol=2e-5)
    assert np.all(log_variance[..., :4] == -30)


def test_latents_are_drawn_with_a_key_for_each_sample(
    codec: Flux2Codec, posterior: Any, encode: Any, pictures: np.ndarray
) -> None:
    keys = jax.random.split(jax.random.key(3), 2)
    drawn = encode(pictures, keys)
    mean, log_variance = posterior(pictures)
    noise = np.stack([jax.random.normal(key, (4, 6, 32)) for key in keys])
    statistics = (codec.params["mean"], codec.params["variance"])
    latents = denormalise(drawn, *statistics)
    np.testing.assert_allclose(latents, mean + np.exp(log_variance / 2) * noise, atol=1e-5)
    turned = encode(pictures[::-1], keys[::-1])
    np.testing.assert_allclose(turned, drawn[::-1], atol=2e-5)

    means = encode(pictures)
    np.testing.assert_allclose(means, normalise(mean, *statistics), atol=1e-6)


def test_pictures_are_those_of_diffusers(
    reference: Any, codec: Flux2Codec, pictures: np.ndarray
) -> None:
    import torch

    mean, _ = expected_moments(reference, pictures)
    with torch.no_grad():
        decoded = reference.decode(torch.from_numpy(mean).permute(0, 3, 1, 2)).sample
    expected = np.clip((decoded.permute(0, 2, 3, 1).numpy() + 1) * 127.5, 0, 255)
    latents = normalise(jnp.asarray(mean), codec.params["mean"], codec.params["variance"])
    found = jax.jit(codec.decode)(codec.params, latents)
    assert found.dtype == np.uint8
    assert expected.std() > 10
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, atol=0.501)


def test_bfloat16_is_near(folder: Path, encode: Any, pictures: np.ndarray) -> None:
    rough = load_flux2_codec(str(folder), dtype="bfloat16")
    latents = encode(pictures)
    error = jax.jit(rough.encode)(rough.params, pictures) - latents
    assert 0.002 < float(error.std() / latents.std()) < 0.03


def test_latents_are_normalised_as_i1s() -> None:
    golden = golden_i1.load("flux2_latents")
    statistics = [jnp.asarray(golden[f"in/running_{name}"]) for name in ("mean", "var")]
    latents = jnp.asarray(golden_i1.channels_last(golden["in/latents"]))
    found = normalise(latents, *statistics)
    np.testing.assert_allclose(found, golden_i1.channels_last(golden["out/normalised"]), atol=1e-6)
    back = denormalise(found, *statistics)
    np.testing.assert_allclose(back, latents, atol=1e-5)


def test_attention_in_chunks_is_attention_without_the_whole_matrix() -> None:
    positions, width = 4 * QUERIES_AT_A_TIME + 24, 4
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(key, (2, positions, width)) for key in keys)
    whole = jax.nn.dot_product_attention(*(x[:, :, None] for x in (q, k, v)))[:, :, 0]
    compiled = jax.jit(attend).lower(q, k, v).compile()
    np.testing.assert_allclose(compiled(q, k, v), whole, atol=1e-5)
    memory: Any = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < 2 * 4 * positions**2


def test_a_file_that_is_not_the_vaes_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvenmixError, match=r"has no vae/diffusion_pytorch_model\.safetensors"):
        load_flux2_codec(str(tmp_path))

    file = tmp_path / FILE
    shutil.copytree(folder / "vae", file.parent)
    tensors = load_file(file)
    scaled = {"bn.running_mean": 2 * tensors["bn.running_mean"]}
    save_file(tensors | scaled, file)
    with pytest.raises(EvenmixError, match="scales its latents otherwise"):
        load_flux2_codec(str(tmp_path))

    del tensors["bn.running_var"]
    tensors["encoder.conv_in.weight"] = np.zeros((32, 4, 3, 3), np.float32)
    tensors["encoder.extra"] = np.zeros(1, np.float32)
    save_file(tensors, file)
    with pytest.raises(EvenmixError) as caught:
        load_flux2_codec(str(tmp_path))
    assert "is of another model: it lacks bn.running_var; it has unknown encoder.extra" in str(
        caught.value
    )
    assert "encoder.conv_in.weight (32, 4, 3, 3) instead of (32, 3, 3, 3)" in str(caught.value)

    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(EvenmixError, match="is damaged or no safetensors file"):
        load_flux2_codec(str(tmp_path))


def test_it_is_configured_by_a_folder(folder: Path) -> None:
    settings: dict[str, Any] = {
        "mixture": "m",
        "output": "o",
        "resolution": 64,
        "steps": 1,
        "batch_size": 1,
        "model": {"hidden_size": 16, "depth": 3, "num_heads": 2},
        "text": {"encoder": "bytes", "num_tokens": 4, "embed_dim": 8},
        "latent": {"encoder": "flux2", "weights": str(folder)},
    }
    config = TrainConfig.model_validate(settings)
    shape = config.model_config_for(config.latent_codec())
    assert (shape.input_size, shape.in_channels) == (8, 32)
    assert "weights" not in config.identity()["latent"]

    settings["model"]["patch_size"] = 1
    with pytest.raises(ValueError, match=r"72 is no multiple of 16, which the FLUX.2 VAE needs"):
        TrainConfig.model_validate(settings | {"resolution": 72})
