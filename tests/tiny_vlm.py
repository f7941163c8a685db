"""Real checkpoints of under a million random weights each, made offline in a second.

vLLM serves them on a CPU as it serves the published ones. Their captions are noise. There are two
families that have little in common: Qwen3-VL takes pictures of any size, and more tokens for larger
ones; LLaVA is a CLIP, whose every picture is a square of one size, in front of a Llama. Made by
`python -m tests.tiny_vlm FOLDER [--family NAME]`, a process of its own, since transformers needs
tests/vllm_shim.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

# Five times transformers' default, so that captions depend on the picture.
_WEIGHT_STD = 0.1

_CORPUS = [
    "A photograph of an astronaut in an orange suit beside a model of the shuttle.",
    "Describe the image in detail using one paragraph.",
    "A cup of coffee on a saucer, a cat that looks at the camera, coins on a table.",
]

# Qwen3-VL

_QWEN_SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]

_QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}"
    "{% else %}<|vision_start|><|image_pad|><|vision_end|>{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tiny_qwen3_vl(folder: Path) -> None:
    """Write a Qwen3-VL into `folder`; the same bytes every time."""
    tokenizer = _qwen_tokenizer()
    tokenizer.save_pretrained(folder)
    _qwen_model(tokenizer).save_pretrained(folder)
    patches = {
        "processor_class": "Qwen3VLProcessor",
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 65536, "longest_edge": 16777216},
    }
    for name, processor in {
        "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
    }.items():
        (folder / name).write_text(json.dumps(patches | processor))


def _qwen_tokenizer() -> Any:
    return Qwen2Tokenizer(
        tokenizer_object=_bpe(_QWEN_SPECIAL_TOKENS),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=_QWEN_SPECIAL_TOKENS,
        chat_template=_QWEN_CHAT_TEMPLATE,
        model_max_length=4096,
    )


def _qwen_model(tokenizer: Any) -> Any:
    token_id = tokenizer.convert_tokens_to_ids
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "initializer_range": _WEIGHT_STD,
            "max_position_embeddings": 4096,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [4, 6, 6],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 4,
            "patch_size": 16,
            "out_hidden_size": 128,
            "initializer_range": _WEIGHT_STD,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
    )
    return _random(
        Qwen3VLForConditionalGeneration,
        config,
        eos_token_id=token_id("<|im_end|>"),
        pad_token_id=token_id("<|endoftext|>"),
    )


# LLaVA

_LLAVA_SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]

_LLAVA_CHAT_TEMPLATE = (
    "<s>{% for message in messages %}"
    "{% if message.role == 'system' %}{{ message.content }} "
    "{% else %}{{ message.role | upper }}: "
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>\n{% endif %}"
    "{% endfor %}{% endif %} {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

_CLIP_PX, _CLIP_PATCH_PX = 112, 14  # 64 tokens a picture


def make_tiny_llava(folder: Path) -> None:
    """Write a LLaVA 1.5 into `folder`; the same bytes every time."""
    tokenizer = _llava_tokenizer()
    tokenizer.save_pretrained(folder)
    _llava_model(tokenizer).save_pretrained(folder)
    _name_weights_as_published(folder / "model.safetensors")
    clip = {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": _CLIP_PX},
        "crop_size": {"height": _CLIP_PX, "width": _CLIP_PX},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(clip))
    processor = {
        "processor_class": "LlavaProcessor",
        "patch_size": _CLIP_PATCH_PX,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    }
    (folder / "processor_config.json").write_text(json.dumps(processor))


def _llava_tokenizer() -> Any:
    make_tokenizer: Any = PreTrainedTokenizerFast
    return make_tokenizer(
        tokenizer_object=_bpe(_LLAVA_SPECIAL_TOKENS),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        chat_template=_LLAVA_CHAT_TEMPLATE,
        model_max_length=4096,
    )


def _llava_model(tokenizer: Any) -> Any:
    token_id = tokenizer.convert_tokens_to_ids
    config = LlavaConfig(
        text_config={
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "initializer_range": _WEIGHT_STD,
            "max_position_embeddings": 4096,
        },
        vision_config={
            "model_type": "clip_vision_model",
            "num_hidden_layers": 3,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_attention_heads": 4,
            "image_size": _CLIP_PX,
            "patch_size": _CLIP_PATCH_PX,
            "initializer_factor": 5.0,
        },
        image_token_index=token_id("<image>"),
        image_seq_length=(_CLIP_PX // _CLIP_PATCH_PX) ** 2,
    )
    return _random(
        LlavaForConditionalGeneration,
        config,
        bos_token_id=token_id("<s>"),
        eos_token_id=token_id("</s>"),
        pad_token_id=token_id("<pad>"),
    )


def _name_weights_as_published(path: Path) -> None:
    """Give CLIP's weights the names of the published LLaVAs, which vLLM reads.

    transformers 5 reads these too, but writes shorter ones.
    """
    weights = {
        name.replace("vision_tower.", "vision_tower.vision_model."): weight
        for name, weight in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


# Both


def _bpe(special_tokens: list[str]) -> Any:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(_CORPUS, vocab_size=512, special_tokens=special_tokens)
    return tokenizer._tokenizer


def _random(model_class: Any, config: Any, **generation: int) -> Any:
    """Return a model of random weights; `generation` are ids of its special tokens."""
    torch.manual_seed(0)
    model = model_class(config).to(torch.bfloat16)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    return model


FAMILIES = {"qwen3_vl": make_tiny_qwen3_vl, "llava": make_tiny_llava}
"""What writes a checkpoint of each family into a folder."""


def main() -> None:
    """Write a checkpoint of one family."""
    parser = argparse.ArgumentParser(description="make a tiny vision-language model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=FAMILIES, default="qwen3_vl")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    FAMILIES[options.family](options.folder)


if __name__ == "__main__":
    main()
