"""The encoders that need no weights: exact inverses, words told apart."""

import jax.numpy as jnp
import numpy as np
import pytest

from train.encoders import ByteTextEncoder, PixelCodec


def similarity(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_pixels_come_back_exactly() -> None:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 8, 3), np.uint8)
    codec = PixelCodec(downsampling=4)
    latents = codec.encode({}, jnp.asarray(pictures))
    assert latents.shape == (3, 4, 2, codec.channels) == (3, 4, 2, 48)
    np.testing.assert_array_equal(codec.decode({}, latents), pictures)


def test_latents_are_scaled_pixels_of_a_square_row_by_row() -> None:
    pictures = np.zeros((1, 4, 4, 3), np.uint8)
    pictures[0, 2, 1] = 255, 51, 0
    latents = PixelCodec(downsampling=2).encode({}, jnp.asarray(pictures))
    np.testing.assert_allclose(latents[0, 1, 0, 3:6], [1.0, -0.6, -1.0], rtol=1e-6)
    assert float(latents.sum()) == pytest.approx(-48 + 2 + 0.4, abs=1e-5)


def test_decoding_clips() -> None:
    latents = jnp.array([-3.0, 3.0, 0.0]).reshape(1, 1, 1, 3)
    np.testing.assert_array_equal(PixelCodec(1).decode({}, latents)[0, 0, 0], [0, 255, 128])


def test_words_are_tokens_and_the_mask_is_at_the_front() -> None:
    encoder = ByteTextEncoder(num_tokens=6, embed_dim=64)
    embeddings, mask = encoder.tokenise(['The "Red" fox.', "", "one two three four five six seven"])
    assert embeddings.shape == (3, 6, 64)
    assert embeddings.dtype == np.float32
    np.testing.assert_array_equal(mask.sum(axis=1), [6, 0, 6])
    encoded = encoder.encode({}, jnp.asarray(embeddings), jnp.asarray(mask))
    np.testing.assert_array_equal(encoded, embeddings)
    assert not embeddings[1].any()
    alone, _ = encoder.tokenise(["red"])
    assert np.mean(alone[0, 0] ** 2) == pytest.approx(1 / 1.5, rel=1e-5)


def test_a_text_has_the_same_embedding_everywhere() -> None:
    embeddings, _ = ByteTextEncoder(2, 8).tokenise(["red é"])
    expected = [[-0.33053046, 0.18018508, 2.01210213], [-1.10635841, -0.31800282, -0.02187411]]
    np.testing.assert_allclose(embeddings[0, :, :3], expected, rtol=1e-5)


def test_words_are_told_apart_and_related_ones_are_near() -> None:
    encoder = ByteTextEncoder(num_tokens=1, embed_dim=2048)
    (red, upper, reddish, blue), _ = encoder.tokenise(["red", "RED", "reddish", "blue"])
    np.testing.assert_array_equal(red, upper)
    assert abs(similarity(red[0], blue[0])) < 0.1
    assert 0.15 < similarity(red[0], reddish[0]) < 0.9


def test_a_word_knows_its_neighbours() -> None:
    encoder = ByteTextEncoder(num_tokens=3, embed_dim=2048)
    (first, second, third), _ = encoder.tokenise(["red letters", "red ground", "blue letters"])
    assert 0.5 < similarity(first[0], second[0]) < 0.95
    assert 0.5 < similarity(first[1], third[1]) < 0.95
