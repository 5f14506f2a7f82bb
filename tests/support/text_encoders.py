"""Text encoders of transformers with random weights and a word tokenizer, as folders."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

WORDS = ("<pad>", "</s>", "<unk>", "a", "red", "green", "boat", "dog", "zero", "one")


def write_t5(folder: Path, width: int = 12) -> Path:
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(WORDS), d_model=width, d_kv=4, d_ff=16, num_layers=2, num_heads=2, is_gated_act=True)
    T5EncoderModel(config).save_pretrained(folder)
    return _write_tokenizer(folder)


def write_clip(folder: Path, width: int = 12) -> Path:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(WORDS), hidden_size=width, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=9, eos_token_id=1, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    CLIPTextModel(config).save_pretrained(folder)
    return _write_tokenizer(folder)


def write_clip_model(folder: Path, width: int = 12) -> CLIPModel:
    """Both halves of a CLIP that looks at 224 pixels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": len(WORDS), "max_position_embeddings": 9, "eos_token_id": 1, "bos_token_id": 1}
    vision = {**sizes, "image_size": 224, "patch_size": 112}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    model.save_pretrained(folder)
    _write_tokenizer(folder)
    return model


def _write_tokenizer(folder: Path) -> Path:
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    return folder
