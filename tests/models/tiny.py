"""Tiny random LLaVA models and prompts for them: forward in milliseconds."""

from __future__ import annotations

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

from vtkernels import zoo

IMAGE = 99  # the image placeholder's id
VOCAB = 100
PATCH = 14


def pruning_methods() -> list[str]:
    """Those that prune what the encoder gives and do not merge."""
    others = ("vision_layers", "cache")
    return [m.name for m in zoo.methods() if not m.merges and not any(stage in m.stages for stage in others)]


def llava(
    seed: int = 0, *, tower: str = "clip", grid: int = 4, vision_layers: int = 3, text_layers: int = 2, **config
) -> LlavaForConditionalGeneration:
    """A LLaVA with ``grid x grid`` patches. Weights are drawn wide, so that scores and logits are far apart."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": vision_layers,
        "num_attention_heads": 4,
        "image_size": PATCH * grid,
        "patch_size": PATCH,
    }
    vision_config = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}[tower](**vision)
    text_config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=text_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config.setdefault("vision_feature_select_strategy", "default" if tower == "clip" else "full")
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision_config,
            text_config=text_config,
            image_token_index=IMAGE,
            image_seq_length=grid * grid,
            **config,
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    model.generation_config.eos_token_id = None  # every row generates to the end, alone or in a batch
    model.generation_config.pad_token_id = 0
    return model


def prompt(images: int, words: int, tokens_per_image: int, seed: int) -> list[int]:
    """Begin of sequence, then words with the images' placeholders between them."""
    draw = torch.Generator().manual_seed(seed)
    text = torch.randint(3, IMAGE, (words,), generator=draw).tolist()
    ids = [1]
    for index in range(images):
        ids += text[index : index + 1] + [IMAGE] * tokens_per_image
    return ids + text[images:]


def inputs(rows: list[tuple[int, int]], *, grid: int = 4, side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """Processor-like inputs of prompts given as (images, words), padded on ``side``."""
    prompts = [prompt(images, words, grid * grid, seed + index) for index, (images, words) in enumerate(rows)]
    length = max(map(len, prompts))
    ids, mask = [], []
    for tokens in prompts:
        pad = length - len(tokens)
        before, after = (pad, 0) if side == "left" else (0, pad)
        ids.append([0] * before + tokens + [0] * after)
        mask.append([0] * before + [1] * len(tokens) + [0] * after)
    batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    if total := sum(images for images, _ in rows):
        draw = torch.Generator().manual_seed(seed + 1000)
        batch["pixel_values"] = torch.randn(total, 3, PATCH * grid, PATCH * grid, generator=draw)
    return batch


def row(batch: dict[str, torch.Tensor], rows: list[tuple[int, int]], index: int) -> dict[str, torch.Tensor]:
    """One prompt of a batch, alone and unpadded."""
    real = batch["attention_mask"][index].bool()
    first = sum(images for images, _ in rows[:index])
    alone = {
        "input_ids": batch["input_ids"][index][real][None],
        "attention_mask": torch.ones(1, int(real.sum())).long(),
    }
    if rows[index][0]:
        alone["pixel_values"] = batch["pixel_values"][first : first + rows[index][0]]
    return alone


def new_tokens(model, batch: dict[str, torch.Tensor], count: int = 4) -> torch.Tensor:
    """What the model answers greedily: [B, count]."""
    out = model.generate(**batch, max_new_tokens=count, do_sample=False)
    return out[:, batch["input_ids"].shape[1] :]
