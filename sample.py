"""Checkpoints in, images out: sampling (temperature, top-k, top-p, guidance, KV cache), grids and plots.

ST-AR (arXiv 2509.15185) does not change sampling; this is LlamaGen's (arXiv 2406.06525, generate.py), token
for token.

    python sample.py runs/tiny --classes 3 7 7 --cfg 2.0 --seed 0                      # a captioned grid
    python sample.py runs/tiny-ar runs/tiny --classes 0 5 9 --cfg 2 --out side.png     # runs below each other
    python sample.py runs/tiny --reconstruct                                           # what the codes keep
    torchrun --nproc-per-node 8 sample.py runs/tiny --num-images 50000 --npz out.npz   # for fid.py
    python sample.py c2i_L_256.pt --vq vq_ds16_c2i.pt --classes 207 360 --cfg 4.0 --top-k 2000

Shapes in comments: B images, T tokens, codes (how many there are), S side in pixels.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

import tokenizer
from model import SIZES, ModelConfig, Transformer

# ---- Tokens ------------------------------------------------------------------------------------------------

def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set the logits (B, codes) outside the top k, then outside the nucleus of mass p, to -inf.

    LlamaGen: top_k 0 keeps all, ties with the k-th stay; the nucleus is taken of what top-k left, and the
    token that crosses p is kept.
    """
    if top_k > 0:
        threshold = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(descending=True)
        beyond = ordered.softmax(-1).cumsum(-1) > top_p
        beyond = torch.cat([torch.zeros_like(beyond[:, :1]), beyond[:, :-1]], 1)  # keep the crossing one
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    return logits


@dataclass
class KVCache:
    """Keys and values of all layers for the first `length` positions of a batch that is being generated."""
    k: torch.Tensor  # (L, B, H, T, D)
    v: torch.Tensor
    length: int = 0

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store k and v (B, H, t, D) behind `length`; returns all keys and values so far, (B, H, s, D)."""
        end = self.length + k.shape[2]
        self.k[layer, :, :, self.length:end] = k
        self.v[layer, :, :, self.length:end] = v
        return self.k[layer, :, :, :end], self.v[layer, :, :, :end]


def new_cache(model: Transformer, batch: int) -> KVCache:
    """A KV cache of zeros for `batch` sequences, in the weights' dtype and on their device."""
    c = model.config
    shape = (c.n_layer, batch, c.n_head, c.num_tokens, c.head_dim)
    return KVCache(*(model.output.weight.new_zeros(shape) for _ in range(2)))


def next_logits(model: Transformer, classes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from the tokens known so far, (B, p), to the next one's logits (B, codes); `classes` (B,).

    To be called with p = 0, 1, 2 ...: earlier keys and values are cached, only the new position is run.
    """
    cache = new_cache(model, len(classes))
    return lambda known: model(known, classes, cache=cache).logits[:, -1]


def decode_step(model: Transformer, tokens: torch.Tensor, position: torch.Tensor,
                cache: KVCache) -> torch.Tensor:
    """Logits (B, codes) float32 of `position` (1,) > 0, whose input is `tokens` (B,).

    What the model computes with a cache, but no shape depends on the position: a GPU can compile and record
    this once for all positions.
    """
    def extend(layer, k, v):  # (B, H, 1, D) each -> all T places, (B, H, T, D)
        cache.k[layer].index_copy_(2, position, k)
        cache.v[layer].index_copy_(2, position, v)
        return cache.k[layer], cache.v[layer]

    x = model.tok_embeddings(tokens)[:, None]  # (B, 1, C)
    allowed = model.causal[position][None, None]  # (1, 1, 1, T): hides what is not yet in the cache
    for n, layer in enumerate(model.layers):
        x, _ = layer(x, model.rope[position], allowed, partial(extend, n), False)
    return model.output(model.norm(x))[:, -1].float()


def next_logits_as_graph(model: Transformer, classes: torch.Tensor,
                         decode: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    """`next_logits` for CUDA: a step, `decode`, is recorded as a CUDA graph and replayed for each token.

    decode  `decode_step`, compiled or not. A replay launches all its kernels at once, on the same memory: so
            its inputs are copied into place, and the logits are those of the latest call only
    """
    cache = new_cache(model, len(classes))
    first = model(classes.new_empty(len(classes), 0), classes, cache=cache).logits[:, -1]
    token, position = torch.zeros_like(classes), torch.ones_like(classes[:1])
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles; what it stores at position 1 the first replay overwrites
        decode(model, token, position, cache)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode(model, token, position, cache)

    def replay(known, cache=cache):  # bound only to stay alive: a graph knows addresses, not tensors
        if known.shape[1] == 0:
            return first
        token.copy_(known[:, -1])
        position.fill_(known.shape[1])
        graph.replay()
        return logits

    return replay


@torch.no_grad()
def generate(model: Transformer, classes: torch.Tensor, *, cfg: float = 1.0, cfg_interval: int = -1,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             generator: torch.Generator | None = None, decode: Callable | None = None) -> torch.Tensor:
    """Codes (B, T) int64 for `classes` (B,) int64, from a model in eval mode.

    cfg           guidance scale s: logits = u + s (c - u), u under the null class; guidance is off at s <= 1
    cfg_interval  LlamaGen: guide the first cfg_interval + 2 tokens only; -1 guides all
    temperature   divides the logits; 0 takes the likeliest token
    generator     on the model's device; the default is torch's global one
    decode        on CUDA, a compiled `decode_step`: see `next_logits_as_graph`
    """
    B, T, guided = len(classes), model.config.num_tokens, cfg > 1
    if guided:  # the second half of the batch runs the same tokens under the null class
        classes = torch.cat([classes, torch.full_like(classes, model.config.num_classes)])
    step = next_logits_as_graph(model, classes, decode) if decode else next_logits(model, classes)
    tokens = torch.empty(B, T, dtype=torch.long, device=classes.device)
    for p in range(T):
        known = tokens[:, :p]
        logits = step(torch.cat([known, known]) if guided else known)
        if guided:
            conditional, unconditional = logits.chunk(2)
            inside = cfg_interval < 0 or p < cfg_interval + 2  # LlamaGen counts from 0 at the second token
            logits = unconditional + (conditional - unconditional) * cfg if inside else conditional
        if temperature == 0:
            tokens[:, p] = logits.argmax(-1)
            continue
        logits = logits / max(temperature, 1e-5)  # LlamaGen's bound: no overflow
        probabilities = filter_logits(logits, top_k, top_p).softmax(-1)
        # argmax of p / Exp(1) is a draw from p; torch.multinomial does the same, after checks for which the
        # host would wait at every token
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        tokens[:, p] = (probabilities / noise).argmax(-1)
    return tokens


# ---- Pictures: grids, line plots, reconstructions ----------------------------------------------------------

# Okabe and Ito's palette: told apart by colour-blind readers
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]


def save_image(path: str | Path, image: Image.Image) -> None:
    """Write `image` as PNG, through `tokenizer.write_file`."""
    tokenizer.write_file(path, lambda file: image.save(file, "PNG"))


def image_grid(pixels: np.ndarray, columns: int, captions: list[str] | None = None) -> Image.Image:
    """uint8 (N, S, S, 3) -> one picture, row by row, small images enlarged to 96 pixels, captions below."""
    N, gap, line = len(pixels), 4, 16 if captions else 0
    rows = math.ceil(N / columns)
    cell = max(96, pixels.shape[1])
    grid = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + line + gap) + gap), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for i, image in enumerate(pixels):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (cell + line + gap)
        grid.paste(Image.fromarray(image).resize((cell, cell), Image.LANCZOS), (x, y))
        if captions:
            text = " ".join(captions[i].split())  # a name may hold a newline
            while text and draw.textlength(text, font) > cell:
                text = text[:-1]
            draw.text((x + cell / 2, y + cell + 1), text, "black", font, anchor="ma")
    return grid


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= min((1, 2, 2.5, 5, 10), key=lambda m: abs((high - low) / (m * step) - 5))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_plot(series: dict[str, list[tuple[float, float]]], title: str, x_label: str, y_label: str,
              bands: dict[str, list[float]] = {}, width: int = 640, height: int = 400,
              log_x: bool = False) -> Image.Image:
    """A plain line plot of {name: [(x, y), ...]} with a legend, drawn at twice the size; nan is left out.

    bands  {name: half width of the shaded band around each of its points}, for as many names as have one
    log_x  a logarithmic x axis, marked where the points are
    """
    rows = {name: [(x, y, half) for (x, y), half in zip(points, bands.get(name, [math.nan] * len(points)))
                   if math.isfinite(y)] for name, points in series.items()}
    points = sum(rows.values(), []) or [(0.0, 0.0, math.nan)]
    xs = sorted({x for x, _, _ in points})
    scale = math.log if log_x else float
    x0, x1 = scale(xs[0]), scale(xs[-1])
    ends = [y + side * (half if math.isfinite(half) else 0) for _, y, half in points for side in (-1, 1)]
    y0, y1 = min(ends), max(ends)
    x1 = max(x1, x0 + 1e-9)
    margin = 0.06 * (y1 - y0) or 0.5
    y0, y1 = y0 - margin, y1 + margin
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    left, right, top, bottom = 140, 2 * width - 40, 80, 2 * height - 110

    def place(x, y):
        across, up = (scale(x) - x0) / (x1 - x0), (y - y0) / (y1 - y0)
        return left + across * (right - left), bottom - up * (bottom - top)

    for y in _ticks(y0, y1):
        level = place(xs[0], y)[1]
        draw.line([(left, level), (right, level)], "#DDDDDD", 2)
        draw.text((left - 12, level), f"{y:g}", "black", font, anchor="rm")
    for x in xs if log_x else filter(float.is_integer, map(float, _ticks(x0, x1))):  # else x is a count
        draw.text((place(x, y0)[0], bottom + 10), f"{x:g}", "black", font, anchor="ma")
    for colour, line in zip(COLOURS * 4, rows.values()):
        band = [point for point in line if math.isfinite(point[2])]
        if len(band) > 1:  # lines lie above all bands, and bands shine through others
            mask = Image.new("L", image.size)
            edges = [place(x, y + half) for x, y, half in band]
            edges += [place(x, y - half) for x, y, half in reversed(band)]
            ImageDraw.Draw(mask).polygon(edges, 50)
            image.paste(colour, mask=mask)
    draw.line([(left, top), (left, bottom), (right, bottom)], "black", 3)
    for colour, line in zip(COLOURS * 4, rows.values()):
        places = [place(x, y) for x, y, _ in line]
        if len(places) > 1:
            draw.line(places, colour, 5, joint="curve")
        for x, y in places if len(places) < 30 else []:
            draw.ellipse([x - 7, y - 7, x + 7, y + 7], colour)
    _write_around(image, (left, right, top, bottom), list(series), title, x_label, y_label)
    return image


def _write_around(image: Image.Image, frame: tuple[int, int, int, int], names: list[str], title: str,
                  x_label: str, y_label: str) -> None:
    """Title, legend and axis labels of a line plot whose axes are `frame`."""
    left, right, top, bottom = frame
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    room, small = right - left, font
    while small.size > 8 and sum(small.getlength(name) + 24 for name in (title, *names)) > room:
        small = ImageFont.load_default(small.size - 1)  # many or long names
    x = right
    for colour, name in reversed(list(zip(COLOURS * 4, names))):
        x -= small.getlength(name) + 24
        draw.text((x, 66), name, colour, small, anchor="ls")
    draw.text((left, 66), title, "black", small, anchor="ls")
    draw.text(((left + right) / 2, image.height - 20), x_label, "black", font, anchor="ms")
    side = Image.new("L", (bottom - top, 40))
    ImageDraw.Draw(side).text(((bottom - top) / 2, 20), y_label, 255, font, anchor="mm")
    image.paste("black", (8, top), side.rotate(90, expand=True))


def stacked(blocks: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, a line of text above each."""
    line = 22
    height = sum(line + block.height for _, block in blocks)
    image = Image.new("RGB", (max(block.width for _, block in blocks), height), "white")
    draw, font, y = ImageDraw.Draw(image), ImageFont.load_default(15), 0
    for title, block in blocks:
        draw.text((4, y + line), title, "black", font, anchor="ld")
        image.paste(block, (0, y + line))
        y += line + block.height
    return image


def reconstruction_grid(vq: tokenizer.VQModel, pixels: torch.Tensor) -> Image.Image:
    """uint8 (N, S, S, 3) -> a picture of pairs of rows: ten originals, and below them what the codes keep."""
    again = tokenizer.reconstruct(vq, pixels)
    pairs = [half for a, b in zip(pixels.split(10), again.split(10)) for half in (a, b)]
    return image_grid(torch.cat(pairs).numpy(), min(10, len(pixels)))


def save_reconstructions(path: str | Path, vq: tokenizer.VQModel, data: str, subset: str,
                         size: int) -> None:
    """Write `reconstruction_grid` of twenty held-out images of `data`, (size, size) pixels, as PNG."""
    images = tokenizer.open_images(data, "val", subset)
    pixels = tokenizer.held_out_pixels(images, size, 20)
    save_image(path, reconstruction_grid(vq, pixels))


def save_curves(path: Path, metrics: Path) -> None:
    """Write as PNG what a run's metrics.jsonl holds of losses and accuracies, over the step."""
    lines = [json.loads(text) for text in metrics.read_text().splitlines()]
    plots = []
    for names in (("loss_ar", "val_nll"), ("loss_mim", "loss_step", "loss_view"),
                  ("acc_step", "acc_view", "acc_label")):
        curves = {name: [(line["step"], line[name]) for line in lines if name in line] for name in names}
        curves = {name: points for name, points in curves.items() if points}
        if curves:
            plots.append(np.asarray(line_plot(curves, metrics.parent.name, "step", "", height=300)))
    save_image(path, Image.fromarray(np.concatenate(plots)))


# ---- Images ------------------------------------------------------------------------------------------------

def sample_images(model: Transformer, vq: tokenizer.VQModel, classes: torch.Tensor, seed: int,
                  resize_to: int = 0, **settings) -> np.ndarray:
    """uint8 (B, S, S, 3) for `classes` (B,), a function of its arguments; `settings` are `generate`'s.

    resize_to  side of the images, pixels; 0: as decoded. LlamaGen scores 384 px models at 256 px this way
    """
    device = model.output.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    codes = generate(model, classes.to(device), generator=generator, **settings)
    parts = []
    for chunk in codes.split(16):
        with torch.no_grad():
            pixels = vq.decode(chunk)  # (16, 3, S, S), about [-1, 1]
        if resize_to:
            pixels = F.interpolate(pixels, (resize_to, resize_to), mode="bicubic")  # LlamaGen: no antialias
        parts.append(tokenizer.to_uint8(pixels))
    return torch.cat(parts).cpu().numpy()


def sample_grid(model: Transformer, vq: tokenizer.VQModel, classes: list[int], names: list[str], seed: int,
                **settings) -> Image.Image:
    """A picture of one image per entry of `classes`, ten in a row, captioned with their names."""
    pixels = sample_images(model, vq, torch.tensor(classes), seed, **settings)
    return image_grid(pixels, min(10, len(classes)), [names[c] for c in classes])


def save_samples(path: Path, model: Transformer, vq: tokenizer.VQModel, count: int, names: list[str],
                 seed: int, **settings) -> None:
    """Write `sample_grid` of `count` images, their classes spread evenly, as PNG."""
    classes = [i * len(names) // count for i in range(count)]
    save_image(path, sample_grid(model, vq, classes, names, seed, **settings))


def mixed_labels(count: int, num_classes: int) -> torch.Tensor:
    """Labels (count,) int64 in one fixed mixed order: blocks that hold every class once, each shuffled.

    So any first n images are balanced, and so is each part that an Inception Score takes as a split; the
    label at a place does not depend on `count`.
    """
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randperm(num_classes, generator=g) for _ in range(math.ceil(count / num_classes))]
    return torch.cat(blocks)[:count]


def read_part(path: Path) -> np.ndarray:
    """Images that `save_npz` wrote."""
    with tokenizer.reading(path, "part of an .npz"):
        return np.load(path)


def save_npz(path: Path, model: Transformer, vq: tokenizer.VQModel, names: list[str], count: int, batch: int,
             seed: int, protocol: dict, decode: Callable | None = None, **settings) -> None:
    """Write `count` images in the order of `mixed_labels` to an .npz in ADM's layout.

    arr_0 uint8 (N, S, S, 3), arr_1 labels int64 (N,), `classes` their names in label order (K,), and
    `protocol`, a JSON string of how the images were made: what the caller says of model and tokenizer, and
    every sampling setting.

    The batch that begins with image i draws from seed + i: files that are to share no noise need seeds at
    least `count` apart. Under torchrun each process makes every WORLD_SIZE-th batch and rank 0 joins them; no
    process group is needed, the images do not depend on the number of processes, and a killed run goes on
    where it was: its parts are named after the protocol, so that those of other weights or settings are never
    taken.
    Raises ValueError, in one sentence, while another run writes the same file.
    """
    rank, world = tokenizer.rank_and_world()
    labels = mixed_labels(count, model.config.num_classes)
    protocol = json.dumps(protocol | settings | {"seed": seed, "batch": batch, "num": count}, sort_keys=True)
    folder = path.with_name(f".{path.name}.parts")
    parts = [folder / f"{tokenizer.digest(protocol)}-{start:07d}.npy" for start in range(0, count, batch)]
    with tokenizer.locked(folder) if rank == 0 else nullcontext():
        for i in tokenizer.progress(range(rank, len(parts), world), "sampling", unit="batch"):
            if not parts[i].exists():
                start = i * batch
                pixels = sample_images(model, vq, labels[start:start + batch], seed + start, decode=decode,
                                       **settings)
                tokenizer.write_file(parts[i], lambda file: np.save(file, pixels))
        if rank == 0:
            while not all(part.exists() for part in parts):
                time.sleep(0.2)
            images = np.concatenate([read_part(part) for part in parts])
            arrays = dict(arr_0=images, arr_1=labels.numpy(), classes=np.array(names), protocol=protocol)
            tokenizer.write_file(path, lambda file: np.savez(file, **arrays))
            shutil.rmtree(folder, ignore_errors=True)  # network disks keep a locked file until it is closed


# ---- Checkpoints: {"model": student, "ema": teacher, "config": run config, ...} ----------------------------

def load_checkpoint(path: str | Path, whole: bool = False) -> dict:
    """The content of a checkpoint file, ours or LlamaGen's; a bare state dict as {"model": state dict}.

    With `whole` it must be ours, with all that a run needs to go on.
    Raises FileNotFoundError, or ValueError for another kind of file or weights that are not finite.
    """
    content = tokenizer.read_weights(path)
    if "tok_embeddings.weight" in content:
        content = {"model": content}
    wrong = [name for name in ("model", "ema", "projector", "optimizer", "config", "data", "model_config")
             if not isinstance(content.get(name, None if whole else {}), dict)]
    step = content.get("step", -1 if whole else 0)
    if wrong or not isinstance(step, int) or step < 0:
        raise ValueError(f"{path} lacks {(wrong or ['step'])[0]}, or what it has there cannot be used.")
    state = content.get("model", {})
    if "cls_embedding.embedding_table.weight" not in state:
        raise ValueError(f"{path} holds a VQ tokenizer or something else, no class-conditional transformer.")
    for name in ("model", "ema", "projector"):
        tokenizer.check_finite(path, content.get(name, {}))
    return content


def load_model(path: str | Path, ema: bool = False, image_size: int = 256,
               device="cpu") -> tuple[Transformer, dict]:
    """A transformer in eval mode and the rest of its checkpoint. Strict: every tensor must fit.

    `ema` chooses the teacher's weights. Width, depth, vocabulary and classes are read off the tensors; the
    rest is in our checkpoints' "model_config". For LlamaGen's, heads are read off `SIZES`, the token count
    off "freqs_cis" or "args" where they are present, else off `image_size` (downsampling 16).
    Raises FileNotFoundError, or ValueError if `path` is no such file or lacks EMA weights.
    """
    content = load_checkpoint(path)
    if ema and "ema" not in content:
        raise ValueError(f"{path} has no EMA weights; leave out --ema.")
    state = dict(content["ema" if ema else "model"])
    table = state.pop("freqs_cis", None)  # a stray attribute in some of LlamaGen's files
    with tokenizer.reading(path, "transformer of ours or LlamaGen's"):
        vocab_size, dim = state["tok_embeddings.weight"].shape
        n_layer = len({name.split(".")[1] for name in state if name.startswith("layers.")})
        num_classes = len(state["cls_embedding.embedding_table.weight"]) - 1
        if "model_config" in content:
            settings = content["model_config"]
        else:
            heads = [n_head for layers, n_head, width in SIZES.values() if (layers, width) == (n_layer, dim)]
            if not heads:
                raise ValueError(f"{n_layer} layers of width {dim} are none of LlamaGen's sizes")
            args = vars(content.get("args", argparse.Namespace()))
            side = args.get("image_size", image_size) // args.get("downsample_size", 16)
            settings = dict(n_head=heads[0], num_tokens=len(table) - 1 if table is not None else side ** 2)
        read = dict(n_layer=n_layer, dim=dim, vocab_size=vocab_size, num_classes=num_classes)
        config = ModelConfig(**settings | read)
        if min(asdict(config).values()) < 0:
            raise ValueError(f"{config} has a number below 0")
        model = Transformer(config)
        model.load_state_dict(state)
    rest = {key: value for key, value in content.items() if key not in ("model", "ema")}
    return model.eval().to(device), rest


class Trained(NamedTuple):
    """A trained model and what belongs to it."""
    name: str
    model: Transformer
    vq: tokenizer.VQModel
    classes: list[str]  # names in label order
    config: dict  # the run's settings; empty for LlamaGen's files
    data: dict  # `tokenizer.cache_meta` of its training images; empty for LlamaGen's files
    origin: dict  # for protocols: name, kind of weights, step and seed of the training, digests


def open_trained(path: Path, vq_path: str | Path | None, ema: bool, image_size: int, device) -> Trained:
    """The model of a run folder or checkpoint file, with its tokenizer (`vq_path`, or the run's own).

    Raises FileNotFoundError or ValueError, in one sentence, if they are missing or do not belong together.
    """
    file = path / "checkpoint.pt" if path.is_dir() or not (path.suffix or path.exists()) else path
    model, rest = load_model(file, ema, image_size, device)
    config, data, copy = rest.get("config", {}), rest.get("data", {}), file.with_name("tokenizer.pt")
    if not vq_path and config:
        vq_path = copy if copy.exists() else config["tokenizer"]
    if not vq_path:
        raise ValueError(f"{file} does not name its tokenizer; add --vq FILE.")
    vq = tokenizer.load_tokenizer(vq_path, device)
    if vq.config.codebook_size != model.config.vocab_size:
        raise ValueError(f"{vq_path} has {vq.config.codebook_size} codes, but {file} was trained on "
                         f"{model.config.vocab_size}: they do not belong together.")
    found = tokenizer.fingerprint(vq)
    if data.get("tokenizer", found) != found:
        raise ValueError(f"{vq_path} is tokenizer {found}, but {file} was trained with {data['tokenizer']}.")
    name = file.parent.resolve().name if file.name == "checkpoint.pt" else path.stem
    origin = {"model": name, "weights": "ema" if ema else "student",
              "step": rest.get("step", rest.get("steps")),  # LlamaGen's name is the second
              "training_seed": config.get("seed"), "weights_digest": tokenizer.fingerprint(model),
              "tokenizer_digest": found}
    names = data.get("classes", [f"class {c}" for c in range(model.config.num_classes)])
    return Trained(name, model, vq, names, config, data, origin)


# ---- Command line ------------------------------------------------------------------------------------------

def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU that computes in bfloat16; Ampere is the first."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def to_bfloat16(model: Transformer) -> Transformer:
    """Round the weights, in place, and thereby the cache; `model.to` would round the rotary table as well."""
    for p in model.parameters():
        p.data = p.data.bfloat16()
    return model


@torch.no_grad()
def compiled_decode(model: Transformer, rows: int) -> Callable:
    """`decode_step`, compiled for a batch of `rows`; as it is, and said, where that cannot be done."""
    tokens = torch.zeros(rows, dtype=torch.long, device=model.output.weight.device)
    decode = torch.compile(decode_step)
    try:
        decode(model, tokens, torch.ones_like(tokens[:1]), new_cache(model, rows))
    except Exception as error:  # no C compiler for Triton, a GPU too old for it ...: they share no class
        reason = str(error).strip().split("\n")[0][:100]
        print(f"Sampling goes on uncompiled and slower: torch.compile failed ({reason}).", file=sys.stderr)
        return decode_step
    return decode


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; what contradicts itself is refused (SystemExit)."""
    within = tokenizer.within
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders or checkpoints (.pt), LlamaGen's too")
    add("--vq", help="tokenizer file (default: the run's)")
    add("--classes", type=int, nargs="+", help="one image for each of these (default: 20 or all)")
    add("--out", type=Path, help="the picture (default: samples.png or reconstructions.png)")
    add("--reconstruct", action="store_true", help="draw what the codes keep of held-out images instead")
    add("--data", help="with --reconstruct: folder or zip of images (default: the run's)")
    add("--subset", help="with --reconstruct: file of class folders to keep, one a line")
    add("--npz", type=Path, help="write images as .npz in ADM's layout instead of a picture")
    add("--num-images", type=within(int, 1, 10 ** 7), help="with --npz: how many, class-balanced")
    add("--batch", type=within(int, 1, 10 ** 5), help="with --npz: images at once (default: 100)")
    add("--resize-to", type=within(int, 1, 4096), default=0, help="side of the images (default: as decoded)")
    add("--cfg", type=within(float, 1, 1e4), default=1.0, help="guidance scale; 1: none")
    add("--cfg-interval", type=within(int, -1), default=-1, help="guide this many + 2 tokens; -1: all")
    add("--temperature", type=within(float, 0), default=1.0, help="0: the likeliest token")
    add("--top-k", type=within(int, 0), default=0, help="0: all codes")
    add("--top-p", type=within(float, 0, 1), default=1.0, help="1: all codes")
    add("--seed", type=within(int, 0, 2 ** 62), default=0)
    add("--image-size", type=within(int, 16, 4096), default=256, help="of a checkpoint that does not tell")
    add("--ema", action="store_true", help="the teacher's weights instead of the student's")
    add("--precision", choices=["bf16", "fp32"], default="", help="default: bf16 if a GPU has it")
    add("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    args = parser.parse_args(argv)

    for wrong, sentence in (
        (bool(args.npz) != bool(args.num_images), "--num-images and --npz go together"),
        (args.npz and (args.classes or args.out or args.reconstruct),
         "--npz holds all classes in one file: no --classes, --out or --reconstruct beside it"),
        (args.batch and not args.npz, "--batch goes with --npz"),
        ((args.data, args.subset) != (None, None) and not args.reconstruct,
         "--data and --subset go with --reconstruct"),
        (args.classes and args.reconstruct, "--reconstruct takes no --classes"),
        (len(args.runs) > 1 and (args.npz or args.reconstruct), "--npz and --reconstruct take one run"),
    ):
        if wrong:
            parser.error(sentence)
    return args


def runs_grid(trained: list[Trained], classes: list[int] | None, seed: int, settings: dict) -> Image.Image:
    """Samples of one or several models for equal `classes` and an equal seed.

    By default 20 classes, spread evenly, or all if there are fewer.

    Raises ValueError if a model does not know one of the classes.
    """
    known = min(len(one.classes) for one in trained)
    shown = min(known, 20)
    classes = classes or [i * known // shown for i in range(shown)]
    if bad := [c for c in classes if not 0 <= c < known]:
        names = " and ".join(one.name for one in trained)
        raise ValueError(f"class {bad[0]} does not exist; those of {names} are 0 ... {known - 1}.")
    grids = [(one.name, sample_grid(one.model, one.vq, classes, one.classes, seed, **settings))
             for one in trained]
    return grids[0][1] if len(grids) == 1 else stacked(grids)


def draw_reconstructions(path: Path, one: Trained, data: str | None, subset: str | None) -> None:
    """`save_reconstructions` of a run's held-out images, or of those in `data`."""
    if data is None and not one.config:
        raise ValueError(f"{one.name} does not name its images; add --data.")
    if data is None:
        data, subset = one.config["data"], one.config["subset"] if subset is None else subset
    size = one.model.config.grid * one.vq.config.downsample
    save_reconstructions(path, one.vq, data, subset or "", size)


@tokenizer.enough_memory("lower --batch or --num-images, or draw fewer --classes at a time")
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run it.

    Raises ValueError or OSError, in one sentence, for a user's mistake.
    """
    args = parse_arguments(argv)
    if args.npz:
        path = args.npz if args.npz.suffix == ".npz" else Path(f"{args.npz}.npz")
    else:
        path = args.out or Path("reconstructions.png" if args.reconstruct else "samples.png")
    tokenizer.check_output(path)
    if not args.npz and path.suffix.lower() != ".png":  # it could also be somebody's checkpoint
        raise ValueError(f"--out {path}: pictures are PNG files; call it {path.with_suffix('.png')}.")
    device = tokenizer.choose_device(args.device)
    trained = [open_trained(run, args.vq, args.ema, args.image_size, device) for run in args.runs]
    if args.reconstruct:
        draw_reconstructions(path, trained[0], args.data, args.subset)
        print(f"{path}: held-out images, and below each what the codes of {trained[0].name} keep of it")
        return
    precision = args.precision or ("bf16" if has_bfloat16(device) else "fp32")  # LlamaGen: bf16
    if precision == "bf16":
        for one in trained:
            to_bfloat16(one.model)
    keys = ("cfg", "cfg_interval", "temperature", "top_k", "top_p", "resize_to")
    settings = {key: getattr(args, key) for key in keys}
    if args.npz:
        one = trained[0]
        batch = min(args.batch or 100, args.num_images)
        rows = 2 * batch if args.cfg > 1 else batch
        decode = compiled_decode(one.model, rows) if device.type == "cuda" else None
        protocol = one.origin | {"precision": precision, "device": device.type}
        save_npz(path, one.model, one.vq, one.classes, args.num_images, batch, args.seed, protocol, decode,
                 **settings)
        said = f"{args.num_images} images of {len(one.classes)} classes"
    else:
        save_image(path, runs_grid(trained, args.classes, args.seed, settings))
        said = "samples"
    if tokenizer.rank_and_world()[0] == 0:
        print(f"{path}: {said} from {', '.join(one.name for one in trained)}, "
              f"{'ema' if args.ema else 'student'} weights in {precision}, seed {args.seed},",
              ", ".join(f"{key} {value}" for key, value in settings.items()))


if __name__ == "__main__":
    tokenizer.run_script(main, "The same command goes on with an .npz.")
