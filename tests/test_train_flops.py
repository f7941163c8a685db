"""The FLOP model against counts: by hand, of the programs that run, and i1's own."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from train.encoders import ByteTextEncoder, PixelCodec
from train.flops import flop_per_picture, flux2_flop, network_flop, t5gemma_flop
from train.flux2_vae import FLUX2_VAE, Autoencoder
from train.model import ModelConfig, abstract_params, velocity_fn
from train.t5gemma import T5GEMMA_2B, encode, parameter_shapes

TINY = ModelConfig(
    input_size=4,
    image_resolution=8,
    in_channels=3,
    hidden_size=8,
    depth=3,
    num_heads=2,
    text_embed_dim=6,
    text_num_tokens=3,
)
# Of the last block's text: its output projection, queries and MLP, and what it attends to.
TINY_UNREAD = 2 * (3 * (64 + 64 + 504) + 2 * 3 * 7 * 8)


def flop_of(jaxpr: Any) -> int:
    """Count the matrix products and convolutions of a program."""
    total = 0
    for equation in jaxpr.eqns:
        out = equation.outvars[0].aval
        if equation.primitive.name == "dot_general":
            left = equation.invars[0].aval.shape
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * out.size * int(np.prod([left[axis] for axis in contracted]))
        elif equation.primitive.name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            channels_out = out.shape[equation.params["dimension_numbers"].out_spec[1]]
            total += 2 * out.size * kernel.size // channels_out
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            if hasattr(inner, "eqns"):
                total += times * flop_of(getattr(inner, "jaxpr", inner))
    return total


def test_a_tiny_network_counted_by_hand() -> None:
    """4 image tokens, 3 text tokens, width 8; the MLP's inner width is 21."""
    mlp = 8 * 42 + 21 * 8
    projections = 8 * 24 + 8 * 8
    ends = 2 * 4 * 12 * 8
    adapter = 3 * 6 * 8 + 2 * (3 * (projections + mlp) + 2 * 3 * 3 * 8)
    blocks = 3 * (7 * (projections + mlp) + 2 * 7 * 7 * 8)
    skip = 7 * 16 * 8
    assert network_flop(TINY) == 2 * (ends + adapter + blocks + skip) - TINY_UNREAD == 45_472
    # The encoders without weights do no products.
    codec, encoder = PixelCodec(2), ByteTextEncoder(3, 6)
    assert flop_per_picture(TINY, encoder, codec) == 3 * 45_472


def test_the_network_does_the_products_that_are_counted() -> None:
    latents, caption = jnp.zeros((1, 4, 4, 3)), jnp.zeros((1, 3, 6))
    inputs = (latents, caption, jnp.ones((1, 3)), jnp.zeros(1, bool), jnp.zeros(1))
    program = jax.make_jaxpr(velocity_fn(TINY))(abstract_params(TINY), *inputs)
    assert flop_of(program.jaxpr) == network_flop(TINY)


def test_t5gemma_does_the_products_that_are_counted() -> None:
    layers = {"num_hidden_layers": 2, "layer_types": ("full_attention",) * 2}
    config = T5GEMMA_2B.model_copy(update=layers)
    outside, layer = parameter_shapes(config)
    params: Any = {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in outside.items()}
    params["layers"] = {
        name: jax.ShapeDtypeStruct((2, *shape), "float32") for name, shape in layer.items()
    }
    ids, mask = jnp.zeros((1, 16), jnp.int32), jnp.ones((1, 16), bool)
    program = jax.make_jaxpr(partial(encode, config=config))(params, ids, mask)
    assert flop_of(program.jaxpr) == t5gemma_flop(config, 16)


def test_the_vae_does_the_products_that_are_counted() -> None:
    def moments(pictures: jax.Array) -> jax.Array:
        vae = Autoencoder(FLUX2_VAE, nnx.Rngs(0))
        return vae.quant_conv(vae.encoder(pictures))

    program = jax.make_jaxpr(moments)(jnp.zeros((1, 32, 32, 3)))
    assert flop_of(program.jaxpr) == flux2_flop(FLUX2_VAE.encoder_widths, 32)


@pytest.mark.parametrize(("resolution", "published"), [(256, 6.3), (512, 15.2), (1024, 59.3)])
def test_i1_3b_costs_what_its_training_is_known_to_have_cost(
    resolution: int, published: float
) -> None:
    """The published figures have three digits."""
    config = ModelConfig(resolution // 8, resolution, 32, 2016, 29, 28, 2304, 256)
    flop = (
        3 * network_flop(config)
        + t5gemma_flop(T5GEMMA_2B, 256)
        + flux2_flop(FLUX2_VAE.encoder_widths, resolution)
    )
    assert flop / 1e12 == pytest.approx(published, rel=0.005)
