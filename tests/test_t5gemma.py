"""T5Gemma's encoder against transformers', in both readings, from the files of a checkpoint."""

import copy
import json
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.errors import EvenmixError
from tests.tiny_t5gemma import HIDDEN, VOCABULARY, WINDOW, save, tiny_model
from train.config import TrainConfig
from train.t5gemma import (
    T5GEMMA_2B,
    Params,
    Semantics,
    T5GemmaEncoder,
    draw_t5gemma,
    encode,
    load_t5gemma,
    parameter_shapes,
)

# Shorter, as long as and longer than the window's reach, which is 2 * WINDOW + 1.
LENGTHS = np.array([12, 7, 3, 1, 0])
TOKENS = int(LENGTHS.max())
IDS = np.random.default_rng(0).integers(1, len(VOCABULARY), (len(LENGTHS), TOKENS)).astype(np.int32)
RIGHT_PADDED = np.arange(TOKENS) < LENGTHS[:, None]
LEFT_PADDED = np.ascontiguousarray(RIGHT_PADDED[:, ::-1])
WEIGHT = "model.encoder.layers.1.mlp.up_proj.weight"


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(model, tmp_path_factory.mktemp("t5gemma"))


@pytest.fixture(scope="module")
def encoder(folder: Path) -> T5GemmaEncoder:
    return load_t5gemma(str(folder), num_tokens=8, dtype="float32")


compiled = partial(jax.jit, static_argnames=("config", "semantics"))(encode)


def states(encoder: T5GemmaEncoder, mask: np.ndarray, semantics: Semantics) -> np.ndarray:
    ids = np.where(mask, IDS, 0)
    with jax.default_matmul_precision("highest"):
        return np.asarray(
            compiled(encoder.params, ids, mask, config=encoder.config, semantics=semantics)
        )


def states_of_transformers(model: Any, mask: np.ndarray) -> np.ndarray:
    import torch

    ids = torch.from_numpy(np.where(mask, IDS, 0)).long()
    with torch.inference_mode():
        found = model.get_encoder()(input_ids=ids, attention_mask=torch.from_numpy(mask))
    expected: np.ndarray = found.last_hidden_state.float().numpy()
    return expected


@pytest.mark.parametrize("mask", [RIGHT_PADDED, LEFT_PADDED], ids=["right", "left"])
def test_the_states_are_those_of_transformers(
    model: Any, encoder: T5GemmaEncoder, mask: np.ndarray
) -> None:
    found = states(encoder, mask, "huggingface")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, states_of_transformers(model, mask), atol=3e-5)


def test_in_i1s_reading_the_padding_attends_to_nothing(model: Any, encoder: T5GemmaEncoder) -> None:
    import torch

    found = states(encoder, RIGHT_PADDED, "i1")
    text = states_of_transformers(model, RIGHT_PADDED)[RIGHT_PADDED]
    np.testing.assert_allclose(found[RIGHT_PADDED], text, atol=3e-5)
    without_attention = copy.deepcopy(model)
    for layer in without_attention.get_encoder().layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    padding = states_of_transformers(without_attention, RIGHT_PADDED)[~RIGHT_PADDED]
    np.testing.assert_allclose(found[~RIGHT_PADDED], padding, atol=3e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"attn_logit_softcapping": 1e6},
        {"sliding_window": TOKENS},
        {"sliding_window": WINDOW - 1},
        {"query_pre_attn_scalar": 8.0},
        {"rope_theta": 9_000.0},
        {"rms_norm_eps": 1e-2},
    ],
    ids=str,
)
def test_the_comparison_sees_every_setting(
    model: Any, encoder: T5GemmaEncoder, change: dict[str, float]
) -> None:
    with jax.disable_jit():
        other = encode(
            jax.tree.map(jax.numpy.asarray, encoder.params),
            jax.numpy.asarray(IDS),
            jax.numpy.asarray(RIGHT_PADDED),
            config=encoder.config.model_copy(update=change),
            semantics="huggingface",
        )
    assert np.abs(other - states_of_transformers(model, RIGHT_PADDED))[RIGHT_PADDED].max() > 1e-3


def test_bfloat16_is_nearer_than_all_of_it_in_bfloat16(model: Any, folder: Path) -> None:
    import torch

    encoder = load_t5gemma(str(folder), num_tokens=8)
    layers = encoder.params["layers"]
    assert encoder.params["embed_tokens"].dtype == layers["mlp.up_proj"].dtype == "bfloat16"
    assert encoder.params["norm"].dtype == layers["pre_feedforward_layernorm"].dtype == "float32"
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    exact = states_of_transformers(copy.deepcopy(rounded).to(torch.float32), RIGHT_PADDED)

    def error(found: np.ndarray) -> float:
        difference = np.linalg.norm((found - exact)[RIGHT_PADDED])
        return float(difference / np.linalg.norm(exact[RIGHT_PADDED]))

    ours = error(states(encoder, RIGHT_PADDED, "huggingface"))
    assert 1e-3 < ours < 0.75 * error(states_of_transformers(rounded, RIGHT_PADDED)) < 0.05


def test_a_checkpoint_of_several_files_in_bfloat16_is_the_same(model: Any, tmp_path: Path) -> None:
    import torch

    whole = save(copy.deepcopy(model).to(torch.bfloat16), tmp_path / "whole")
    parts = save(model, tmp_path / "parts", max_shard_size="40KB")
    assert len(list(parts.glob("model-*.safetensors"))) > 3
    from_whole, from_parts = (load_t5gemma(str(x), num_tokens=8).params for x in (whole, parts))
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(a.astype("bfloat16"), b.astype("bfloat16")),
        from_whole,
        from_parts,
    )


def words(ids: np.ndarray, mask: np.ndarray) -> list[str]:
    return [
        " ".join(VOCABULARY[number] if valid else "." for number, valid in zip(*row, strict=True))
        for row in zip(ids, mask, strict=True)
    ]


def test_i1_adds_no_special_tokens_and_pads_at_the_right(encoder: T5GemmaEncoder) -> None:
    ids, mask = encoder.tokenise(["red fox", "", "a fox is a red fox", "é<eos>"])
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert words(ids, mask) == [
        "red ▁fox . . . . . .",
        ". . . . . . . .",
        "a ▁fox ▁ i s ▁ a ▁red",
        "<0xC3> <0xA9> < e o s > .",
    ]
    assert not ids[~mask].any()


def test_the_other_reading_has_the_tokens_of_transformers(folder: Path) -> None:
    from transformers import AutoTokenizer

    texts = ["red fox", "", "a fox is a red fox", "é<eos>"]
    encoder = load_t5gemma(str(folder), num_tokens=8, semantics="huggingface", dtype="float32")
    ids, mask = encoder.tokenise(texts)
    theirs = AutoTokenizer.from_pretrained(folder)
    expected = theirs(texts, max_length=8, padding="max_length", truncation=True)
    np.testing.assert_array_equal(ids, expected["input_ids"])
    np.testing.assert_array_equal(mask, np.array(expected["attention_mask"], bool))
    assert words(ids, mask)[0] == ". . . . . <bos> red ▁fox"


def test_a_text_alone_has_the_states_it_has_in_a_batch(encoder: T5GemmaEncoder) -> None:
    ids, mask = encoder.tokenise(["red fox", "a fox is a red fox"])
    together = encoder.encode(encoder.params, jax.numpy.asarray(ids), jax.numpy.asarray(mask))
    alone = encoder.encode(encoder.params, jax.numpy.asarray(ids[:1]), jax.numpy.asarray(mask[:1]))
    assert together.dtype == np.float32
    assert together.shape == (2, 8, HIDDEN)
    assert mask.sum() == 2 + 8
    np.testing.assert_allclose(together[0], alone[0], atol=1e-5)


def test_an_encoder_may_be_drawn(encoder: T5GemmaEncoder) -> None:
    drawn = draw_t5gemma(encoder.config, seed=0, num_tokens=8)

    def shapes(params: Params) -> Any:
        return jax.tree.map(np.shape, params)

    assert shapes(drawn.params) == shapes(encoder.params)
    spread = drawn.params["layers"]["mlp.up_proj"].astype(np.float32).std()
    assert spread == pytest.approx(HIDDEN**-0.5, rel=0.05)
    _, mask = drawn.tokenise(["a red fox.", "one two three four five six seven eight nine"])
    np.testing.assert_array_equal(mask.sum(axis=1), [4, 8])


def test_the_published_encoder_has_the_published_number_of_weights() -> None:
    outside, layer = parameter_shapes(T5GEMMA_2B)
    in_layers = T5GEMMA_2B.num_hidden_layers * sum(np.prod(shape) for shape in layer.values())
    assert sum(np.prod(shape) for shape in outside.values()) + in_layers == 2_614_341_888


def configuration(folder: Path, **text: Any) -> TrainConfig:
    settings = {"encoder": "t5gemma", "num_tokens": 8, "embed_dim": HIDDEN, "weights": str(folder)}
    return TrainConfig.model_validate(
        {
            "mixture": "m",
            "output": "o",
            "resolution": 8,
            "steps": 2,
            "batch_size": 4,
            "model": {"hidden_size": 16, "depth": 3, "num_heads": 2},
            "text": settings | text,
            "latent": {"encoder": "pixels", "downsampling": 2},
        }
    )


def test_a_configuration_names_it(folder: Path) -> None:
    encoder = configuration(folder, semantics="huggingface", dtype="float32").text_encoder()
    assert isinstance(encoder, T5GemmaEncoder)
    assert (encoder.num_tokens, encoder.embed_dim, encoder.semantics) == (8, HIDDEN, "huggingface")
    assert encoder.params["embed_tokens"].dtype == "float32"
    with pytest.raises(EvenmixError, match=f"text.embed_dim is 8, but the encoder .* is {HIDDEN}"):
        configuration(folder, embed_dim=8).text_encoder()
    with pytest.raises(ValueError, match="weights\n  Extra inputs"):
        configuration(folder, encoder="bytes")


def test_weights_may_move_between_two_runs(folder: Path) -> None:
    assert configuration(folder).identity() == configuration(folder / "elsewhere").identity()
    assert configuration(folder).identity() != configuration(folder, dtype="float32").identity()


def changed(folder: Path, target: Path, change: Any) -> str:
    """Copy a checkpoint with its tensors changed by a function."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return str(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(WEIGHT), "has no tensor layers.1.mlp.up_proj; give all"),
        (
            lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].T.copy()}),
            r"model.safetensors: model.encoder.layers.1.mlp.up_proj.weight is F32 \(32, 48\), "
            r"not floats of \(48, 32\), as the model's configuration has it",
        ),
        (
            lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].astype(np.int8)}),
            r"mlp.up_proj.weight is I8 \(48, 32\), not floats",
        ),
    ],
    ids=["missing", "transposed", "quantised"],
)
def test_a_tensor_that_does_not_fit_is_named(
    folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    with pytest.raises(EvenmixError, match=message):
        load_t5gemma(changed(folder, tmp_path / "changed", change), num_tokens=8)


def edit_encoder(folder: Path, **changes: Any) -> None:
    described = json.loads((folder / "config.json").read_text())
    described["encoder"] |= changes
    (folder / "config.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer.json; give all"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "json is no tokenizer"),
        (
            lambda folder: edit_encoder(folder, vocab_size=100),
            "tokenizer.json has 297 tokens, but config.json only 100",
        ),
        (
            lambda folder: edit_encoder(folder, hidden_activation="silu", head_dim=7),
            "encoder.head_dim: .*multiple of 2; encoder.hidden_activation: .*gelu_pytorch_tanh",
        ),
        (lambda folder: edit_encoder(folder, num_hidden_layers=4), "3 layer_types, 4 layers"),
        (
            lambda folder: edit_encoder(folder, num_key_value_heads=3),
            "multiple of num_key_value_heads",
        ),
        (
            lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'),
            "config.json is of another kind of model: model_type: Input should be 't5gemma'",
        ),
    ],
    ids=["no tokenizer", "bad tokenizer", "vocabulary", "unknown", "layers", "heads", "type"],
)
def test_files_that_do_not_fit_are_named(
    folder: Path, tmp_path: Path, change: Any, message: str
) -> None:
    copied = changed(folder, tmp_path / "changed", lambda tensors: None)
    change(Path(copied))
    with pytest.raises(EvenmixError, match=message):
        load_t5gemma(copied, num_tokens=8)
