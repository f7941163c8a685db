"""How many floating-point operations (FLOP) a picture costs, and how many a device can do.

Counted are matrix products and convolutions, 2 m n k each: all linear layers, and the two products
of every attention, over padded text too, also where ``trim_to`` or flash attention leave it out.
Not counted is what is small beside them (norms, softmax, rotations, the optimiser). The backward
pass costs twice the forward one; blocks that are computed again to save memory do not count twice.
The encoders only run forward.

For i1-3B with T5Gemma (256 tokens) and the FLUX.2 VAE this makes 6.30, 15.15 and 59.21 TFLOP a
picture at 256, 512 and 1024 px.
"""

from train.encoders import LatentCodec, TextEncoder
from train.flux2_vae import CHANNELS, ENCODER_BLOCKS, Flux2Codec
from train.model import ModelConfig
from train.t5gemma import T5GemmaConfig, T5GemmaEncoder

PEAK_FLOP_PER_S = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}
"""Peak of a device in bfloat16 without sparsity, by JAX's ``device_kind``; "TPU v5" is v5p.

Source: NVIDIA's data sheets, which give twice as much, with sparsity; Google's pages of each TPU.
"""


def flop_per_picture(config: ModelConfig, encoder: TextEncoder, codec: LatentCodec) -> int | None:
    """Return what a picture costs in training: the network there and back, and both encoders.

    None for another network than i1's, which is not counted here.
    """
    if type(config) is not ModelConfig:
        return None
    total = 3 * network_flop(config)
    if isinstance(encoder, T5GemmaEncoder):
        total += t5gemma_flop(encoder.config, encoder.num_tokens)
    if isinstance(codec, Flux2Codec):
        total += flux2_flop(codec.config.encoder_widths, config.image_resolution)
    return total


def network_flop(config: ModelConfig) -> int:
    """Return what the network costs forward, for one picture and its caption."""
    width, image, text = config.hidden_size, config.grid_size**2, config.text_num_tokens
    inner = int(2 / 3 * int(config.mlp_ratio * width))
    patch = config.patch_size**2 * config.in_channels
    mlp = 3 * width * inner
    projections = 4 * width**2  # queries, keys, values and output
    adapter = text * (config.text_embed_dim * width + 2 * (projections + mlp)) + 2 * (
        _attention(text, width)
    )
    block = (image + text) * (projections + mlp) + _attention(image + text, width)
    skip = (image + text) * 2 * width**2
    # Text that leaves the last block is read by nobody: it is keys and values there, no query.
    unread = text * (2 * width**2 + mlp) + 2 * text * (image + text) * width
    ends = 2 * image * patch * width
    multiplications = ends + adapter + config.depth * block + config.depth // 2 * skip - unread
    return 2 * multiplications


def t5gemma_flop(config: T5GemmaConfig, num_tokens: int) -> int:
    """Return what T5Gemma's encoder costs for one text."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    projections = config.hidden_size * (2 * queries + 2 * keys)
    mlp = 3 * config.hidden_size * config.intermediate_size
    layer = num_tokens * (projections + mlp) + _attention(num_tokens, queries)
    return 2 * config.num_hidden_layers * layer


def flux2_flop(widths: tuple[int, ...], resolution: int) -> int:
    """Return what the VAE's encoder costs for one picture; ``widths`` is finest first."""

    def resnet(width_in: int, width: int) -> int:
        shortcut = width_in * width if width_in != width else 0
        return 9 * width_in * width + 9 * width**2 + shortcut

    positions = resolution**2
    multiplications = positions * 9 * 3 * widths[0]
    width_in = widths[0]
    for level, width in enumerate(widths):
        if level:
            positions //= 4
            multiplications += positions * 9 * width_in**2  # the convolution that halves the sides
        blocks = resnet(width_in, width) + (ENCODER_BLOCKS - 1) * resnet(width, width)
        multiplications += positions * blocks
        width_in = width
    moments = 2 * CHANNELS
    middle = 2 * resnet(width, width) + 4 * width**2
    seam = 9 * width * moments + moments**2
    multiplications += positions * (middle + seam) + _attention(positions, width)
    return 2 * multiplications


def _attention(length: int, width: int) -> int:
    """Return the multiplications of queries with keys, and of weights with values."""
    return 2 * length**2 * width
