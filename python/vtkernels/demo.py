"""``vtk demo``: a LLaVA answers with all its visual tokens and with the ones that a method keeps, timed in one run."""

from __future__ import annotations

import contextlib
import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from vtkernels import zoo

# CLIP-L/336 as in LLaVA-1.5 and a decoder small enough for a laptop: 0.30 + 0.47 billion parameters.
VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
TEXT: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32064,
}
IMAGE_TOKEN = 32000
PROMPT_LENGTH = 44  # text tokens of LLaVA-1.5's template with a short question


@dataclass
class Measured:
    """One row of the table: medians over the rounds, milliseconds."""

    tokens: int
    kv_bytes: int = 0
    prefill: list[float] = field(default_factory=list)
    vision: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    answer: str = ""


def main(
    console: Console,
    image_path: Path | None,
    checkpoint: Path | None,
    methods: list[str],
    keep: int,
    question: str,
    new_tokens: int,
    rounds: int,
    device_name: str,
    out: Path,
) -> None:
    device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device_name == "auto" else device_name)
    transformers.utils.logging.set_verbosity_error()
    picture = load_picture(image_path)
    with console.status("loading the model"):
        if checkpoint is None:
            model, inputs, decode_text = random_model(picture, device)
        else:
            model, inputs, decode_text = checkpoint_model(checkpoint, picture, question, device)
    if checkpoint is None:
        console.print(
            "[yellow]Random weights at CLIP-L/336 geometry: timings and the selection are real, the text is not.[/] "
            "Give --model PATH for answers."
        )

    attach: dict[str, Callable[[], Any]] = {"all tokens": contextlib.nullcontext}
    for name in methods:
        attach[name] = functools.partial(zoo.apply, model, name, keep)
    results: dict[str, Measured] = {}
    kept: dict[str, Tensor] = {}
    grid = (0, 0)
    with torch.inference_mode(), Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=(rounds + 1) * len(attach))
        for turn in range(rounds + 1):  # the first turn warms up
            for name, attached in attach.items():
                with attached() as handle:
                    run_once(model, inputs, new_tokens, results, name, decode_text, record=turn > 0)
                    if handle is not None:
                        kept[name], grid = handle.last.indices[0].cpu(), handle.last.grid
                        results[name].tokens = handle.last.tokens_after[0]
                progress.advance(task)

    console.print(table_of(results, model, device))
    vision_share = statistics.median(results["all tokens"].vision) / statistics.median(results["all tokens"].prefill)
    console.print(
        f"The vision tower is {vision_share:.0%} of the untouched prefill and stays: no pruning after it can make the "
        f"prefill more than {1 / vision_share:.1f}x faster."
    )
    for name, result in results.items():
        if result.answer:
            console.print(f"[bold]{name}[/]: {result.answer}", highlight=False)
    draw(picture, kept, grid, out)
    console.print(f"wrote {out}: the kept patches of {', '.join(kept)}")


def load_picture(path: Path | None) -> Image.Image:
    if path is not None:
        return Image.open(path).convert("RGB")
    import skimage.data

    return Image.fromarray(skimage.data.astronaut())


def random_model(picture: Image.Image, device: torch.device) -> tuple[Any, dict[str, Tensor], None]:
    """A LLaVA with random weights, and the inputs that LLaVA-1.5's processor would make."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**TEXT, bos_token_id=1, eos_token_id=None, pad_token_id=0),
        image_token_index=IMAGE_TOKEN,
        image_seq_length=576,
    )
    with torch.device(device):
        model = transformers.LlavaForConditionalGeneration(config).eval()
    side = VISION["image_size"]
    pixels = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    mean, std = (np.array(v, dtype=np.float32) for v in ((0.481, 0.458, 0.408), (0.269, 0.261, 0.276)))
    pixel_values = torch.from_numpy(((pixels - mean) / std).transpose(2, 0, 1).copy())[None]
    text = torch.randint(3, 32000, (PROMPT_LENGTH,), generator=torch.Generator().manual_seed(0))
    ids = torch.cat([torch.tensor([1]), text[:34], torch.full((576,), IMAGE_TOKEN), text[34:]])[None]
    return model, {"input_ids": ids.to(device), "pixel_values": pixel_values.to(device)}, None


def checkpoint_model(
    path: Path, picture: Image.Image, question: str, device: torch.device
) -> tuple[Any, dict[str, Tensor], Callable[[list[int]], str]]:
    """A local checkpoint, its processor's inputs for the question, and its detokenizer."""
    if not path.exists():
        raise OSError(f"no checkpoint at {path}")
    processor = transformers.AutoProcessor.from_pretrained(path, local_files_only=True)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, local_files_only=True, dtype="auto")
    if processor.chat_template:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    else:
        prompt = f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(images=picture, text=prompt, return_tensors="pt").to(device, model.dtype)
    return model.to(device).eval(), dict(inputs), lambda ids: processor.decode(ids, skip_special_tokens=True)


def run_once(
    model: Any,
    inputs: dict[str, Tensor],
    new_tokens: int,
    results: dict[str, Measured],
    name: str,
    decode_text: Callable[[list[int]], str] | None,
    record: bool,
) -> None:
    """One prefill and ``new_tokens`` greedy steps; the prompt is one row without padding, so no mask is needed."""
    prompt = {name: value for name, value in inputs.items() if name != "attention_mask"}
    result = results.setdefault(name, Measured(tokens=inputs["input_ids"].shape[1]))
    vision: list[float] = []
    hooks = [
        model.model.vision_tower.register_forward_pre_hook(lambda *_: vision.append(_now(model.device))),
        model.model.vision_tower.register_forward_hook(lambda *_: vision.append(_now(model.device))),
    ]
    begin = _now(model.device)
    out = model(**prompt, use_cache=True, logits_to_keep=1)
    prefill = _now(model.device) - begin
    for hook in hooks:
        hook.remove()

    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
    kv_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    ids = [token.item()]
    begin = _now(model.device)
    for _ in range(new_tokens - 1):
        out = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        ids.append(token.item())
    decode = (_now(model.device) - begin) / max(1, new_tokens - 1)
    result.kv_bytes = kv_bytes
    if record:
        result.prefill.append(prefill * 1e3)
        result.vision.append((vision[1] - vision[0]) * 1e3)
        result.decode.append(decode * 1e3)
    if decode_text is not None:
        result.answer = decode_text(ids).strip()


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def table_of(results: dict[str, Measured], model: Any, device: torch.device) -> Table:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    attention = model.config.text_config._attn_implementation
    table = Table(title=f"{type(model).__name__} on {where}, {model.dtype}, attention: {attention}")
    for heading in ("method", "tokens", "prefill ms", "vision", "decode ms", "KV MiB", "prefill", "decode"):
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    base = results["all tokens"]
    median = statistics.median
    for name, r in results.items():
        table.add_row(
            name,
            str(r.tokens) if r is base else f"{base.tokens} -> {r.tokens}",
            f"{median(r.prefill):.0f}",
            f"{median(r.vision):.0f}",
            f"{median(r.decode):.1f}",
            f"{r.kv_bytes / 2**20:.1f}",
            "" if r is base else f"{median(base.prefill) / median(r.prefill):.2f}x",
            "" if r is base else f"{median(base.decode) / median(r.decode):.2f}x",
        )
    return table


def draw(picture: Image.Image, kept: dict[str, Tensor], grid: tuple[int, int], out: Path) -> None:
    """The picture as the encoder sees it, and for each method the same with the dropped patches dimmed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height, width = grid
    cell = 14
    view = np.asarray(picture.resize((width * cell, height * cell), Image.Resampling.BICUBIC)) / 255
    figure, axes = plt.subplots(1, 1 + len(kept), figsize=(4 * (1 + len(kept)), 4.4), squeeze=False)
    axes[0, 0].imshow(view)
    axes[0, 0].set_title(f"all {height * width} tokens")
    for axis, (name, indices) in zip(axes[0, 1:], kept.items(), strict=True):
        mask = np.zeros(height * width)
        mask[indices.numpy()] = 1
        mask = mask.reshape(height, width).repeat(cell, 0).repeat(cell, 1)[..., None]
        axis.imshow(view * (0.22 + 0.78 * mask))
        axis.set_title(f"{name}: {len(indices)} kept")
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
