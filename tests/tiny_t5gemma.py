"""A tiny T5Gemma with random weights, saved by transformers, and a tokenizer of Gemma's kind."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from tests.vllm_shim import sitecustomize  # noqa: F401 - lets torchvision be imported

HIDDEN, LAYERS, WINDOW = 32, 3, 3
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
MERGES = [("r", "e"), ("re", "d"), ("▁", "f"), ("▁f", "o"), ("▁fo", "x"), ("▁", "red")]
LETTERS = [chr(code) for code in range(ord("a"), ord("z") + 1)] + ["▁", "<", ">", "."]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
VOCABULARY = [*SPECIAL, *BYTES, *LETTERS, *("".join(pair) for pair in MERGES)]


def tiny_model() -> Any:
    """Return a T5Gemma of encoder and decoder, whose logits reach the cap and whose norms scale."""
    import torch
    from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration

    half = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 6,
        "sliding_window": WINDOW,
    }
    whole: dict[str, Any] = {
        "encoder": half,
        "decoder": half,
        "vocab_size": len(VOCABULARY),
        "tie_word_embeddings": False,
        "attn_implementation": "eager",  # the only one with the soft cap
    }
    torch.manual_seed(0)
    model: Any = T5GemmaForConditionalGeneration(T5GemmaConfig(**whole))
    model.eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            scale = 3 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
            weight.normal_(0, scale * weight.shape[-1] ** -0.5)
    return model


def tiny_tokenizer() -> Tokenizer:
    """Return a BPE with bytes to fall back on, as Gemma's."""
    tokenizer = Tokenizer(
        BPE(
            {token: number for number, token in enumerate(VOCABULARY)},
            MERGES,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" "), "merged_with_previous")
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", SPECIAL.index("<bos>"))]
    )
    return tokenizer


def save(model: Any, folder: Path, **settings: Any) -> Path:
    """Write a checkpoint as it lies on the Hub; ``settings`` are those of save_pretrained."""
    model.save_pretrained(folder, **settings)
    tiny_tokenizer().save(str(folder / "tokenizer.json"))
    described = {"tokenizer_class": "GemmaTokenizer", "pad_token": "<pad>", "bos_token": "<bos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    return folder
