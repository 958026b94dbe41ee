"""``vtk demo``: a LLaVA answers with all its visual tokens and with the ones that a method keeps, timed in one run."""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from vtkernels import zoo
from vtkernels.zoo.measure import Cost, measure

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


@dataclass(frozen=True)
class Prompt:
    """One question about the picture: the processor's inputs, and the right answer where it is known."""

    inputs: dict[str, Tensor]
    text: str = ""
    right: str | None = None


@dataclass(frozen=True)
class Subject:
    """A model, a picture or a video's frames, and questions about them; the last question is the one that is timed.

    ``decode`` turns ids into text; None when the text means nothing.
    """

    model: Any
    pictures: list[Image.Image]
    prompts: list[Prompt]
    new_tokens: int
    decode: Callable[[Tensor], str] | None = None
    note: str = ""


@dataclass
class Measured:
    """One row of the timing table."""

    tokens: int
    costs: list[Cost] = field(default_factory=list)

    def milliseconds(self, name: str) -> float:
        return statistics.median(getattr(cost, name) for cost in self.costs) * 1e3


def main(console: Console, subject: Subject, methods: list[str], keep: int, rounds: int, out: Path) -> None:
    transformers.utils.logging.set_verbosity_error()
    if subject.note:
        console.print(subject.note)
    attach: dict[str, Callable[[], Any]] = {"all tokens": contextlib.nullcontext}
    for name in methods:
        attach[name] = functools.partial(zoo.apply, subject.model, name, keep)
    results: dict[str, Measured] = {}
    answers: dict[str, list[str]] = {}
    kept: dict[str, Tensor] = {}  # bool [images, patches]
    grid = (0, 0)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=(rounds + 1) * len(attach))
        for turn in range(rounds + 1):  # the first turn warms up and answers
            for name, attached in attach.items():
                with attached() as handle:
                    if turn == 0 and subject.decode is not None:
                        answers[name] = [answer(subject, prompt) for prompt in subject.prompts]
                    inputs = subject.prompts[-1].inputs
                    cost = measure(subject.model, inputs, subject.new_tokens)
                    if turn == 0:
                        results[name] = Measured(tokens=inputs["input_ids"].shape[1])
                    else:
                        results[name].costs.append(cost)
                    if handle is not None:
                        kept[name], grid = handle.last.owner.cpu() >= 0, handle.last.grid
                        results[name].tokens = handle.last.tokens_after[0]
                progress.advance(task)

    if answers:
        console.print(answers_table(subject, answers))
    console.print(timing_table(results, subject.model))
    vision_share = results["all tokens"].milliseconds("vision") / results["all tokens"].milliseconds("prefill")
    console.print(
        f"The vision tower is {vision_share:.0%} of the untouched prefill and stays: no pruning after it can make the "
        f"prefill more than {1 / vision_share:.1f}x faster."
    )
    draw(subject.pictures, kept, grid, out)
    console.print(f"wrote {out}: the kept patches of {', '.join(kept)}")


def device_of(name: str) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def embedded_subject(image: Path | None, question: str | None, video: bool, seed: int, device: torch.device) -> Subject:
    """The embedded model, on a held-out scene or video with a question of every task, or on the caller's picture."""
    from vtkernels.zoo import embedded

    model, processor = embedded.load(device=device)
    if image is None:
        (picture,), asked = embedded.drawn(1, video, seed)
    else:
        picture, asked = Image.open(image).convert("RGB"), []
    texts = [(question, None)] if question else [(q.text, q.answer) for q in asked]
    texts = texts or [("describe the picture.", None)]
    prompts = [Prompt(embedded.ask(processor, [picture], [text], device), text, right) for text, right in texts]
    longest = prompts[-1].right
    return Subject(
        model=model,
        pictures=picture if isinstance(picture, list) else [picture],
        prompts=prompts,
        new_tokens=16 if longest is None else len(processor.tokenizer(longest).input_ids),
        decode=lambda ids: processor.decode(ids, skip_special_tokens=True),
        note="The embedded model, on a scene that its training never saw." if image is None else "",
    )


def random_subject(image: Path | None, new_tokens: int, device: torch.device) -> Subject:
    """A LLaVA with random weights, and the inputs that LLaVA-1.5's processor would make."""
    picture = load_picture(image)
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
    inputs = {"input_ids": ids.to(device), "pixel_values": pixel_values.to(device)}
    note = (
        "[yellow]Random weights at CLIP-L/336 geometry: timings and the selection are real, and there is no text.[/] "
        "The embedded model and --model PATH answer."
    )
    return Subject(model, [picture], [Prompt(inputs)], new_tokens, note=note)


def checkpoint_subject(
    path: Path, image: Path | None, question: str | None, new_tokens: int, device: torch.device
) -> Subject:
    """A local checkpoint, and its processor's inputs for the question."""
    if not path.exists():
        raise OSError(f"no checkpoint at {path}")
    picture, question = load_picture(image), question or "What is in this picture?"
    processor = transformers.AutoProcessor.from_pretrained(path, local_files_only=True)
    model: Any = transformers.AutoModelForImageTextToText.from_pretrained(path, local_files_only=True, dtype="auto")
    if processor.chat_template:
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    else:
        prompt = f"USER: <image>\n{question} ASSISTANT:"
    inputs = processor(images=picture, text=prompt, return_tensors="pt").to(device, model.dtype)
    return Subject(
        model=model.to(device).eval(),
        pictures=[picture],
        prompts=[Prompt(dict(inputs), question)],
        new_tokens=new_tokens,
        decode=lambda ids: processor.decode(ids, skip_special_tokens=True),
    )


def load_picture(path: Path | None) -> Image.Image:
    if path is not None:
        return Image.open(path).convert("RGB")
    import skimage.data

    return Image.fromarray(skimage.data.astronaut())


@torch.inference_mode()
def answer(subject: Subject, prompt: Prompt) -> str:
    """The greedy answer, as long as the model makes it."""
    assert subject.decode is not None
    length = prompt.inputs["input_ids"].shape[1]
    ids = subject.model.generate(**prompt.inputs, max_new_tokens=max(64, subject.new_tokens), do_sample=False)
    return subject.decode(ids[0, length:]).strip()


def answers_table(subject: Subject, answers: dict[str, list[str]]) -> Table:
    known = any(prompt.right is not None for prompt in subject.prompts)
    table = Table(title="answers", show_lines=True)
    for heading in ("question", *(["right"] if known else []), *answers):
        table.add_column(heading, overflow="fold")
    for index, prompt in enumerate(subject.prompts):
        given = [answers[name][index] for name in answers]
        if prompt.right is not None:
            given = [prompt.right, *(f"[{'green' if a == prompt.right else 'red'}]{a}[/]" for a in given)]
        table.add_row(prompt.text, *given)
    return table


def timing_table(results: dict[str, Measured], model: Any) -> Table:
    device = model.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    attention = model.config.text_config._attn_implementation
    title = f"{type(model).__name__} on {where}, {model.dtype}, attention: {attention}"
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, title=title)
    headings = (
        "method",
        "tokens",
        "prefill\nms",
        "vision\nms",
        "decode\nms",
        "KV\nMiB",
        "prefill\nspeed-up",
        "decode\nspeed-up",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "method" else "right", no_wrap=True)
    base = results["all tokens"]
    for name, r in results.items():
        speedups = {n: base.milliseconds(n) / r.milliseconds(n) for n in ("prefill", "decode")}
        table.add_row(
            name,
            str(r.tokens) if r is base else f"{base.tokens} -> {r.tokens}",
            f"{r.milliseconds('prefill'):.1f}",
            f"{r.milliseconds('vision'):.1f}",
            f"{r.milliseconds('decode'):.2f}",
            f"{r.costs[0].kv_bytes / 2**20:.2f}",
            *("" if r is base else f"{speedups[n]:.2f}x" for n in speedups),
        )
    return table


def draw(pictures: list[Image.Image], kept: dict[str, Tensor], grid: tuple[int, int], out: Path) -> None:
    """Each picture as the encoder sees it, and below it for each method the same with the dropped patches dimmed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height, width = grid
    cell = 14
    # One picture: the methods side by side. A video: its frames side by side, the methods one below the other.
    down, across = (1, 1 + len(kept)) if len(pictures) == 1 else (1 + len(kept), len(pictures))
    side = 4 if len(pictures) == 1 else 2
    figure, axes = plt.subplots(down, across, figsize=(side * across, (side + 0.4) * down), squeeze=False)
    axes = axes.reshape(1 + len(kept), len(pictures))
    for index, picture in enumerate(pictures):
        view = np.asarray(picture.resize((width * cell, height * cell), Image.Resampling.BICUBIC)) / 255
        axes[0, index].imshow(view)
        for axis, patches in zip(axes[1:, index], kept.values(), strict=True):
            mask = patches[index].numpy().reshape(height, width).repeat(cell, 0).repeat(cell, 1)[..., None]
            axis.imshow(view * (0.22 + 0.78 * mask))
    titles = [f"all {height * width} tokens", *(f"{name}: {int(i[0].sum())} kept" for name, i in kept.items())]
    for axis, title in zip(axes[:, 0], titles, strict=True):
        axis.set_title(title)
    for axis in axes.flat:
        axis.axis("off")
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
