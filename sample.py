"""Checkpoints in, images out: sampling (temperature, top-k, top-p, guidance, KV cache), grids and plots.

ST-AR (arXiv 2509.15185) does not change sampling; this is LlamaGen's (arXiv 2406.06525, generate.py), token
for token.

    python sample.py runs/tiny --classes 3 7 7 --cfg 2.0 --seed 0                      # a captioned grid
    python sample.py pretrained/ar pretrained/st-ar                                    # runs below each other
    torchrun --nproc-per-node 8 sample.py runs/tiny --num-images 50000 --npz out.npz   # for fid.py
    python sample.py c2i_L_256.pt --vq vq_ds16_c2i.pt --classes 207 360 --cfg 4.0 --top-k 2000

Shapes in comments: B images, T tokens, codes (how many there are), S side in pixels; in the KV cache L
layers, H heads, D head size, t positions of this call, s positions so far.
"""

import argparse
import json
import math
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
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
    token with which the sum exceeds p is kept.
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


class KVCache:
    """Keys and values of all layers for the first `length` positions of `batch` sequences being generated.

    They have the dtype of the weights and are on their device.
    """

    def __init__(self, model: Transformer, batch: int):
        c = model.config
        self.kv = model.output.weight.new_zeros(c.n_layer, 2, batch, c.n_head, c.num_tokens, c.head_dim)
        self.length = 0

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Store k and v (B, H, t, D) behind `length`; returns all so far, (2, B, H, s, D)."""
        end = self.length + k.shape[2]
        self.kv[layer, :, :, :, self.length:end] = torch.stack([k, v])
        return self.kv[layer, :, :, :, :end]


def next_logits(model: Transformer, classes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from the tokens known so far, (B, p), to the next one's logits (B, codes); `classes` (B,).

    To be called with p = 0, 1, 2 ...: earlier keys and values are cached, only the new position is run.
    """
    cache = KVCache(model, len(classes))
    return lambda known: model(known, classes, cache=cache).logits[:, -1]


@torch.no_grad()
def generate(model: Transformer, classes: torch.Tensor, *, cfg: float = 1.0, cfg_interval: int = -1,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
             generator: torch.Generator | None = None, begin: Callable = next_logits) -> torch.Tensor:
    """Codes (B, T) int64 for `classes` (B,) int64, from a model in eval mode.

    cfg           guidance scale s: logits = u + s (c - u), u under the null class; guidance is off at s <= 1
    cfg_interval  LlamaGen: guide the first cfg_interval + 2 tokens only; -1 guides all
    temperature   divides the logits; 0 takes the likeliest token
    generator     on the model's device; the default is torch's global one
    begin         `next_logits`, or what `recorded` made of it for a GPU
    """
    B, T, guided = len(classes), model.config.num_tokens, cfg > 1
    if guided:  # the second half of the batch runs the same tokens under the null class
        classes = torch.cat([classes, torch.full_like(classes, model.config.num_classes)])
    logits_after = begin(model, classes)
    tokens = torch.empty(B, T, dtype=torch.long, device=classes.device)
    for p in range(T):
        known = tokens[:, :p]
        logits = logits_after(torch.cat([known, known]) if guided else known)
        if guided:
            conditional, unconditional = logits.chunk(2)
            # LlamaGen always guides the first token, and counts the others from 0 to cfg_interval
            inside = cfg_interval < 0 or p < cfg_interval + 2
            logits = unconditional + (conditional - unconditional) * cfg if inside else conditional
        if temperature == 0:
            tokens[:, p] = logits.argmax(-1)
            continue
        logits = logits / max(temperature, 1e-5)  # LlamaGen's bound: no overflow
        probabilities = filter_logits(logits, top_k, top_p).softmax(-1)
        # The argmax of p / Exp(1) is a draw from p. torch.multinomial does the same, but after checks for
        # which the CPU would have to wait for the GPU at every token.
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        tokens[:, p] = (probabilities / noise).argmax(-1)
    return tokens


# ---- The same on a GPU, one position recorded once and replayed for each token -----------------------------

def decode_step(model: Transformer, tokens: torch.Tensor, position: torch.Tensor,
                cache: KVCache) -> torch.Tensor:
    """Logits (B, codes) float32 of `position` (1,) > 0, whose input is `tokens` (B,).

    This is what the model computes with a cache, but no shape depends on the position, so that a GPU can
    compile and record it once for all positions.
    """
    def extend(layer, k, v):  # (B, H, 1, D) each -> all T positions, (2, B, H, T, D)
        return cache.kv[layer].index_copy_(3, position, torch.stack([k, v]))

    x = model.tok_embeddings(tokens)[:, None]  # (B, 1, C)
    allowed = model.causal[position][None, None]  # (1, 1, 1, T): hides what is not yet in the cache
    for n, layer in enumerate(model.layers):
        x, _ = layer(x, model.rope[position], allowed, partial(extend, n), False)
    return model.output(model.norm(x))[:, -1].float()


@torch.no_grad()
def recorded(model: Transformer, rows: int) -> Callable:
    """`next_logits` for CUDA and at most `rows` sequences: `decode_step`, compiled and recorded as a graph.

    A CUDA graph launches all kernels of a step at once. They always work on the same memory: so inputs are
    copied to where the graph reads them, and the logits are those of the latest call only. Where
    torch.compile fails, the step is recorded as it is, and a line says so.
    """
    cache = KVCache(model, rows)
    token = torch.zeros(rows, dtype=torch.long, device=model.output.weight.device)
    position = torch.ones_like(token[:1])
    try:  # the first call compiles; a recording may not
        step = torch.compile(decode_step)
        step(model, token, position, cache)
    except Exception as error:  # no C compiler, a GPU too old for Triton ...: there is no common class
        reason = str(error).strip().split("\n")[0][:100]
        print(f"Sampling goes on uncompiled and slower: torch.compile failed ({reason}).", file=sys.stderr)
        step = decode_step
        step(model, token, position, cache)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step(model, token, position, cache)

    def begin(model, classes):
        B = len(classes)
        classes = F.pad(classes, (0, rows - B))  # a last, smaller batch: rows of class 0 fill it up
        cache.length = 0  # what the cache holds of another batch is hidden or overwritten
        first = model(classes[:, None][:, :0], classes, cache=cache).logits[:B, -1]

        def logits_after(known):
            if known.shape[1] == 0:
                return first
            token[:B] = known[:, -1]
            position.fill_(known.shape[1])
            graph.replay()
            return logits[:B]

        return logits_after

    return begin


# ---- Checkpoints in. Ours hold {"model": student, "ema": teacher, "config": settings, ...} -----------------

CLASS_TABLE = "cls_embedding.embedding_table.weight"  # a weight that only a class-conditional model has


def load_model(path: str | Path, ema: bool = False, image_size: int = 256,
               device="cpu") -> tuple[Transformer, dict]:
    """A transformer in eval mode and the rest of its checkpoint. Strict: every tensor must fit.

    `ema` chooses the teacher's weights. Width, depth, vocabulary and classes are read off the tensors; the
    rest is in our checkpoints' "model_config". For LlamaGen's, heads are read off `SIZES`, the token count
    off "freqs_cis" or "args" where they are present, else off `image_size` (downsampling 16).
    Raises FileNotFoundError, or ValueError if `path` is no such file or lacks the weights asked for.
    """
    rest = tokenizer.read_weights(path)
    names = ", ".join(map(str, rest))[:100]
    teacher = {"ema": rest.pop("ema", None)}
    state = tokenizer.find_weights(teacher if ema else rest, CLASS_TABLE)
    if not state:
        raise ValueError(f"{path} holds no {'EMA ' if ema else ''}weights of a class-conditional transformer "
                         f"(but: {names}); name a run folder or its checkpoint.pt.")
    tokenizer.check_finite(path, state)
    with tokenizer.reading(path, "transformer of ours or LlamaGen's"):
        table = state.pop("freqs_cis", None)  # a stray attribute in some of LlamaGen's files
        vocab_size, dim = state["tok_embeddings.weight"].shape
        n_layer = len({name.split(".")[1] for name in state if name.startswith("layers.")})
        settings = rest.get("model_config")
        if not isinstance(settings, dict):
            heads = [n_head for layers, n_head, width in SIZES.values() if (layers, width) == (n_layer, dim)]
            if not heads:
                raise ValueError(f"{n_layer} layers of width {dim} are none of LlamaGen's sizes")
            args = rest.get("args")
            args = args if isinstance(args, dict) else getattr(args, "__dict__", {})
            side = args.get("image_size", image_size) // args.get("downsample_size", 16)
            settings = dict(n_head=heads[0], num_tokens=side ** 2 if table is None else len(table) - 1)
        settings = settings | dict(n_layer=n_layer, dim=dim, vocab_size=vocab_size,
                                   num_classes=len(state[CLASS_TABLE]) - 1)
        model = Transformer(ModelConfig(**settings))
        model.load_state_dict(state)
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

    Raises FileNotFoundError or ValueError, in one sentence, if one is missing or if they do not belong
    together.
    """
    file = path / "checkpoint.pt" if path.is_dir() else path
    model, rest = load_model(file, ema, image_size, device)
    ours = isinstance(rest.get("model_config"), dict)  # others may mean other things by "config" and "data"
    config, data = (rest.get(key, {}) if ours else {} for key in ("config", "data"))
    if not vq_path and config:
        beside = file.with_name("tokenizer.pt")
        vq_path = beside if beside.exists() else config.get("tokenizer")
    if not vq_path:
        raise ValueError(f"{file} does not name its tokenizer; add --vq FILE.")
    vq = tokenizer.load_tokenizer(vq_path, device)
    if vq.config.codebook_size != model.config.vocab_size:
        raise ValueError(f"{vq_path} has {vq.config.codebook_size} codes, but {file} was trained on "
                         f"{model.config.vocab_size}: they do not belong together.")
    vq_digest = tokenizer.fingerprint(vq)
    if data.get("tokenizer", vq_digest) != vq_digest:
        raise ValueError(f"{vq_path} is tokenizer {vq_digest}, but {file} was trained with "
                         f"{data['tokenizer']}.")
    name = file.parent.resolve().name if file.name == "checkpoint.pt" else path.stem
    step = rest.get("step", rest.get("steps"))  # LlamaGen's name is the second
    origin = {"model": name, "weights": "ema" if ema else "student",
              "step": step if isinstance(step, int) else None, "training_seed": config.get("seed"),
              "weights_digest": tokenizer.fingerprint(model), "tokenizer_digest": vq_digest}
    names = data.get("classes", [f"class {c}" for c in range(model.config.num_classes)])
    return Trained(name, model, vq, names, config, data, origin)


# ---- Images out --------------------------------------------------------------------------------------------

def sample_images(model: Transformer, vq: tokenizer.VQModel, classes: torch.Tensor, seed: int,
                  resize_to: int = 0, **settings) -> np.ndarray:
    """uint8 (B, S, S, 3) for `classes` (B,), a function of its arguments; `settings` are those of `generate`.

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


def mixed_labels(count: int, num_classes: int) -> torch.Tensor:
    """Labels (count,) int64 in one fixed mixed order: blocks that hold every class once, each shuffled.

    So the first n images are balanced for every n, and so is each part that an Inception Score takes as a
    split; the label of an image does not depend on `count`.
    """
    g = torch.Generator().manual_seed(0)
    blocks = [torch.randperm(num_classes, generator=g) for _ in range(math.ceil(count / num_classes))]
    return torch.cat(blocks)[:count]


def save_npz(path: Path, one: Trained, count: int, batch: int, seed: int, precision: str,
             **settings) -> None:
    """Write `count` images in the order of `mixed_labels` to an .npz in ADM's layout.

    arr_0 uint8 (N, S, S, 3), arr_1 labels int64 (N,), `protocol`, a JSON string of how the images were made
    (model, tokenizer and every sampling setting), and, where they are known, `classes`, the names of the
    classes in label order.

    The batch that begins with image i draws from seed + i: two files share no noise if their seeds differ by
    at least `count`. Under torchrun each process makes every WORLD_SIZE-th batch and rank 0 joins them; no
    process group is needed, and the images do not depend on the number of processes. Each batch is a file of
    its own at first, so that a killed run goes on where it was. These parts are named after the protocol:
    those of other weights or settings are never taken.
    Raises ValueError if another process joined these parts meanwhile, OSError if there is no space.
    """
    rank, world = tokenizer.rank_and_world()
    device = one.model.output.weight.device.type
    labels = mixed_labels(count, one.model.config.num_classes)
    how = dict(precision=precision, device=device, seed=seed, batch=batch, num=count)
    protocol = json.dumps(one.origin | settings | how, sort_keys=True)
    folder = path.with_name(f".{path.name}.parts")
    parts = [folder / f"{tokenizer.digest(protocol)}-{start:07d}.npy" for start in range(0, count, batch)]
    rows = 2 * batch if settings["cfg"] > 1 else batch
    begin = recorded(one.model, rows) if device == "cuda" else next_logits
    for i in tokenizer.progress(range(rank, len(parts), world), "sampling", unit="batch"):
        if not parts[i].exists():
            start = i * batch
            pixels = sample_images(one.model, one.vq, labels[start:start + batch], seed + start, begin=begin,
                                   **settings)
            tokenizer.write_file(parts[i], lambda file: np.save(file, pixels))
    if rank != 0:
        return
    while not all(part.exists() for part in parts):
        if not parts[0].exists():  # this process wrote it: another one has joined and removed the parts
            raise ValueError(f"another process wrote {path} at the same time; give each its own --npz.")
        time.sleep(0.2)

    def join(file):  # what np.savez writes, but with one part in memory at a time
        with zipfile.ZipFile(file, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as array:
                shape = (count, *np.load(parts[0]).shape[1:])
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(array, header)
                for part in parts:
                    array.write(np.load(part).tobytes())
            names = dict(classes=one.classes) if one.data else {}  # else they are invented
            for name, value in dict(arr_1=labels.numpy(), **names, protocol=protocol).items():
                with archive.open(f"{name}.npy", "w") as array:
                    np.save(array, value)

    tokenizer.write_file(path, join)
    shutil.rmtree(folder, ignore_errors=True)  # network disks may keep a file that is still open elsewhere


# ---- Pictures ----------------------------------------------------------------------------------------------

# Okabe and Ito's palette, which colour-blind readers can tell apart
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]


def save_image(path: str | Path, image: Image.Image) -> None:
    """Write `image` as PNG, through `tokenizer.write_file`."""
    tokenizer.write_file(path, lambda file: image.save(file, "PNG"))


def image_grid(pixels: np.ndarray, columns: int, captions: list[str] | None = None,
               title: str = "") -> Image.Image:
    """uint8 (N, S, S, 3) -> one picture, row by row, small images enlarged to 96 pixels.

    captions, if there are any, stand below the images, the title above all.
    """
    gap, cell, top = 4, max(96, pixels.shape[1]), 22 if title else 0
    across, down = cell + gap, cell + gap + (16 if captions else 0)  # from one image to the next
    height = top + gap + math.ceil(len(pixels) / columns) * down
    grid = Image.new("RGB", (gap + columns * across, height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    draw.text((4, top), title, "black", ImageFont.load_default(15), anchor="ld")
    for i, image in enumerate(pixels):
        x, y = gap + i % columns * across, top + gap + i // columns * down
        grid.paste(Image.fromarray(image).resize((cell, cell), Image.LANCZOS), (x, y))
        if captions:
            text = " ".join(captions[i].split())  # a name may hold a newline
            while text and draw.textlength(text, font) > cell:
                text = text[:-1]
            draw.text((x + cell / 2, y + cell + 1), text, "black", font, anchor="ma")
    return grid


def sample_grid(model: Transformer, vq: tokenizer.VQModel, classes: list[int], names: list[str], seed: int,
                title: str = "", **settings) -> Image.Image:
    """A picture of one image per entry of `classes`, ten in a row, captioned with their names."""
    pixels = sample_images(model, vq, torch.tensor(classes), seed, **settings)
    return image_grid(pixels, min(10, len(classes)), [names[c] for c in classes], title)


def spread(count: int, known: int) -> list[int]:
    """`count` classes, spread evenly over those that are `known`."""
    return [i * known // count for i in range(count)]


def save_samples(path: Path, model: Transformer, vq: tokenizer.VQModel, count: int, names: list[str],
                 seed: int, **settings) -> None:
    """Write `sample_grid` of `count` images, their classes spread evenly, as PNG."""
    save_image(path, sample_grid(model, vq, spread(count, len(names)), names, seed, **settings))


def save_reconstructions(path: str | Path, vq: tokenizer.VQModel, data: str, subset: str, size: int) -> None:
    """Write twenty held-out images of `data`, (size, size) pixels, as PNG; below each what its codes keep."""
    pixels = tokenizer.held_out_pixels(tokenizer.open_images(data, "val", subset), size, 20)
    again = tokenizer.reconstruct(vq, pixels)
    rows = [row for pair in zip(pixels.split(10), again.split(10)) for row in pair]
    save_image(path, image_grid(torch.cat(rows).numpy(), min(10, len(pixels))))


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


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers between `low` and `high`."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= min((1, 2, 2.5, 5, 10), key=lambda m: abs((high - low) / (m * step) - 5))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_plot(series: dict, title: str, x_label: str, y_label: str, bands: dict = {}, width: int = 640,
              height: int = 400, log_x: bool = False, dashed: dict = {}, thin: dict = {}) -> Image.Image:
    """A plain line plot of {name: [(x, y), ...]} with a legend, drawn at twice the size; nan is left out.

    bands   {name: half width of the shaded band around each of its points}, for as many names as have one
    log_x   a logarithmic x axis, marked where the points are
    dashed  {name: [(x, y), ...]}, one more line in the colour of that name, dashed
    thin    {name: [[(x, y), ...], ...]}, more lines in the colour of that name, such as its single seeds
    """
    def finite(points):  # (n, 2); x as the axis has it
        points = np.array(points, float).reshape(-1, 2)
        points = points[np.isfinite(points[:, 1])]
        return np.stack([np.log(points[:, 0]) if log_x else points[:, 0], points[:, 1]], 1)

    lines = [(name, finite(line), "thin") for name in thin for line in thin[name]]  # below the others
    lines += [(name, finite(line), "dashed") for name, line in dashed.items()]
    lines += [(name, finite(line), "solid") for name, line in series.items()]
    outlines = {}
    for name, halves in bands.items():
        edges = [[(x, y + side * half) for (x, y), half in zip(series[name], halves)] for side in (1, -1)]
        outlines[name] = np.concatenate([finite(edges[0]), finite(edges[1])[::-1]])
    points = np.concatenate([*(line for _, line, _ in lines), *outlines.values()])
    low, high = points.min(0), points.max(0)
    margin = 0.06 * (high[1] - low[1]) or 0.5
    # a single x would divide by zero in `place`
    low, high = low - [0, margin], high + [1e-9 * (low[0] == high[0]), margin]
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    left, right, top, bottom = 140, 2 * width - 40, 80, 2 * height - 110  # of the frame, in pixels
    colours = dict(zip(series, COLOURS * 4))

    def place(points):  # pixels
        across, up = ((points - low) / (high - low)).T
        return list(zip(left + across * (right - left), bottom - up * (bottom - top)))

    for y in ticks(low[1], high[1]):
        level = place([(low[0], y)])[0][1]
        draw.line([(left, level), (right, level)], "#DDDDDD", 2)
        draw.text((left - 12, level), f"{y:g}", "black", font, anchor="rm")
    marks = ticks(low[0], high[0])
    whole = [x for x in marks if float(x).is_integer()] or marks
    for x in sorted({*points[:, 0]}) if log_x else whole:
        label = f"{math.exp(x) if log_x else x:g}"
        draw.text((place([(x, 0)])[0][0], bottom + 10), label, "black", font, anchor="ma")
    for name, outline in outlines.items():  # all bands before any line, or they would hide it
        if len(outline) > 2:
            mask = Image.new("L", image.size)  # so that bands shine through each other
            ImageDraw.Draw(mask).polygon(place(outline), 50)
            image.paste(colours[name], mask=mask)
    draw.line([(left, top), (left, bottom), (right, bottom)], "black", 3)
    for name, line, kind in lines:
        places = place(line)
        if kind == "dashed":
            for start, end in zip(places, places[1:]):
                marks = np.linspace(start, end, 2 * max(round(math.dist(start, end) / 28), 1))
                for a, b in zip(marks[::2], marks[1::2]):
                    draw.line([*a, *b], colours[name], 4)
        elif len(places) > 1:
            draw.line(places, colours[name], 5 if kind == "solid" else 2, joint="curve")
        for x, y in places if kind == "solid" and len(places) < 30 else []:
            draw.ellipse([x - 7, y - 7, x + 7, y + 7], colours[name])

    small = font
    while small.size > 8 and sum(small.getlength(name) + 24 for name in (title, *series)) > right - left:
        small = ImageFont.load_default(small.size - 1)  # many or long names
    draw.text((left, 66), title, "black", small, anchor="ls")
    x = right
    for name in reversed(series):
        x -= small.getlength(name) + 24
        draw.text((x, 66), name, colours[name], small, anchor="ls")
    draw.text(((left + right) / 2, image.height - 20), x_label, "black", font, anchor="ms")
    side = Image.new("L", (bottom - top, 40))
    ImageDraw.Draw(side).text(((bottom - top) / 2, 20), y_label, 255, font, anchor="mm")
    image.paste("black", (8, top), side.rotate(90, expand=True))
    return image


# ---- Command line ------------------------------------------------------------------------------------------

def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a GPU that computes in bfloat16; Ampere is the first."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def to_bfloat16(model: Transformer) -> None:
    """Round the weights in place; the KV cache follows. `model.to` would round the rotary table, too."""
    for p in model.parameters():
        p.data = p.data.bfloat16()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line. Raises SystemExit for flags that contradict each other."""
    within = tokenizer.within
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders or checkpoints (.pt), LlamaGen's too")
    add("--vq", help="tokenizer file (default: the run's)")
    add("--classes", type=within(int, 0), nargs="+", help="class numbers, one image each (default: up to 20)")
    add("--out", type=Path, help="the picture (default: samples.png)")
    add("--npz", type=Path, help="write images as .npz in ADM's layout instead of a picture")
    add("--num-images", type=within(int, 1, 10 ** 7), help="with --npz: how many, class-balanced")
    add("--batch", type=within(int, 1, 10 ** 5), default=100, help="with --npz: images at a time")
    add("--resize-to", type=within(int, 1, 4096), default=0, help="side of the images (default: as decoded)")
    add("--cfg", type=within(float, 1, 1e4), default=1.0, help="guidance scale; 1: none")
    add("--cfg-interval", type=within(int, -1), default=-1, help="guide the first N + 2 tokens only; -1: all")
    add("--temperature", type=within(float, 0), default=1.0, help="0: the likeliest token")
    add("--top-k", type=within(int, 0), default=0, help="0: all codes")
    add("--top-p", type=within(float, 0, 1), default=1.0, help="1: all codes")
    add("--seed", type=within(int, 0, 2 ** 62), default=0, help="of the draws")
    add("--image-size", type=within(int, 16, 4096), default=256, help="for checkpoints that do not store it")
    add("--ema", action="store_true", help="the teacher's weights instead of the student's")
    add("--precision", choices=["bf16", "fp32"], help="default: bf16 if a GPU has it")
    add("--device", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    args = parser.parse_args(argv)

    for wrong, sentence in (
        (bool(args.npz) != bool(args.num_images), "--num-images and --npz go together"),
        (args.npz and (args.out or args.classes), "--npz takes no --out and no --classes"),
        (args.npz and args.runs[1:], "--npz takes one run"),
    ):
        if wrong:
            parser.error(sentence)
    return args


@tokenizer.enough_memory("lower --batch or --num-images, or draw fewer --classes at a time")
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run it.

    Raises ValueError or OSError, in one sentence, for a user's mistake.
    """
    args = parse_arguments(argv)
    path = args.npz or args.out or Path("samples.png")
    if args.npz and path.suffix != ".npz":
        path = Path(f"{path}.npz")
    if not args.npz and path.suffix.lower() != ".png":  # it could also be somebody's checkpoint
        raise ValueError(f"--out {path}: pictures are PNG files; call it {path.with_suffix('.png')}.")
    tokenizer.check_output(path)
    device = tokenizer.choose_device(args.device)
    runs = [open_trained(run, args.vq, args.ema, args.image_size, device) for run in args.runs]
    names = " and ".join(run.name for run in runs)

    precision = args.precision or ("bf16" if has_bfloat16(device) else "fp32")  # LlamaGen: bf16
    if precision == "bf16":
        for run in runs:
            to_bfloat16(run.model)
    keys = ("cfg", "cfg_interval", "temperature", "top_k", "top_p", "resize_to")
    settings = {key: getattr(args, key) for key in keys}
    if args.npz:
        batch = min(args.batch, args.num_images)
        save_npz(path, runs[0], args.num_images, batch, args.seed, precision, **settings)
    else:
        known = min(len(run.classes) for run in runs)
        classes = args.classes or spread(min(known, 20), known)
        if max(classes) >= known:
            raise ValueError(f"class {max(classes)} does not exist; those of {names} are 0 ... {known - 1}.")
        grids = []
        for run in runs:
            title = run.name if len(runs) > 1 else ""
            grid = sample_grid(run.model, run.vq, classes, run.classes, args.seed, title, **settings)
            grids.append(np.asarray(grid))
        save_image(path, Image.fromarray(np.concatenate(grids)))  # below each other
    if tokenizer.rank_and_world()[0] == 0:
        said = ", ".join(f"{key} {value}" for key, value in settings.items())
        print(f"{path}: {args.num_images or len(classes)} images from {names}, "
              f"{'ema' if args.ema else 'student'} weights in {precision}, seed {args.seed}, {said}")


if __name__ == "__main__":
    tokenizer.run_script(main, "An unfinished .npz goes on with the same command.")
