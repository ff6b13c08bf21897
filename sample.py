"""Images out: generation (temperature, top-k, top-p, classifier-free guidance, KV cache), grids and plots.

ST-AR (arXiv 2509.15185) does not change sampling; this is LlamaGen's (arXiv 2406.06525, generate.py), token
for token.

    python sample.py runs/tiny --classes 3 7 7 --cfg 2.0 --seed 0                      # a captioned grid
    python sample.py runs/tiny-ar runs/tiny --classes 0 5 9 --cfg 2 --out side.png     # runs below each other
    python sample.py runs/tiny --reconstruct                                           # what the codes keep
    torchrun --nproc-per-node 8 sample.py runs/tiny --num-images 50000 --npz out.npz   # for fid.py
    python sample.py --gpt c2i_L_256.pt --vq vq_ds16_c2i.pt --classes 207 360 --cfg 4.0 --top-k 2000

Shapes in comments: B images, T tokens, V vocabulary, S side in pixels.
"""

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import tokenizer
from model import Transformer, load_model

# ---- Tokens ------------------------------------------------------------------------------------------------

def filter_logits(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Set the logits (B, V) outside the top k, then outside the nucleus of mass p, to -inf.

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


def next_logits(model: Transformer, classes: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from the tokens known so far, (B, p), to the logits (B, V) of the next, for `classes` (B,).

    To be called with p = 0, 1, 2 ...: earlier keys and values are cached, only the new position is run.
    """
    cache = model.new_cache(len(classes))
    return lambda known: model(known, classes, cache=cache).logits[:, -1]


def next_logits_as_graph(model: Transformer, classes: torch.Tensor,
                         decode: Callable) -> Callable[[torch.Tensor], torch.Tensor]:
    """`next_logits` for CUDA: a step, `decode`, is recorded as a CUDA graph and replayed for each token.

    decode  model.decode, compiled or not. A replay launches all its kernels at once, on the same memory: so
            its inputs are copied into place, and the logits are those of the latest call only
    """
    cache = model.new_cache(len(classes))
    first = model(classes.new_empty(len(classes), 0), classes, cache=cache).logits[:, -1]
    token, position = torch.zeros_like(classes), torch.ones_like(classes[:1])
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # compiles; what it stores at position 1 the first replay overwrites
        decode(token, position, cache)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = decode(token, position, cache)

    def replay(known):
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
    decode        on CUDA, a compiled `model.decode`: see `next_logits_as_graph`
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
            inside = cfg_interval < 0 or p < cfg_interval + 2
            logits = unconditional + (conditional - unconditional) * cfg if inside else conditional
        if temperature == 0:
            tokens[:, p] = logits.argmax(-1)
            continue
        probabilities = filter_logits(logits / temperature, top_k, top_p).softmax(-1)
        # torch.multinomial's own draw, without its checks, for which the host would wait at every token
        noise = torch.empty_like(probabilities).exponential_(generator=generator)
        tokens[:, p] = (probabilities / noise).argmax(-1)
    return tokens


# ---- Pictures: grids, line plots, reconstructions ----------------------------------------------------------

# Okabe and Ito's palette: told apart by colour-blind readers
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999"]


def save_image(path: str | Path, image: Image.Image) -> None:
    """Write `image` as PNG, through `tokenizer.write_file`."""
    tokenizer.write_file(path, lambda file: image.save(file, "PNG"))


def image_grid(pixels: np.ndarray, columns: int, captions: list[str] | None = None,
               cell: int = 96) -> Image.Image:
    """uint8 (N, S, S, 3) -> one picture, row by row, each image enlarged to `cell` pixels, captions below."""
    N, gap, line = len(pixels), 4, 16 if captions else 0
    rows = math.ceil(N / columns)
    cell = max(cell, pixels.shape[1])
    grid = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + line + gap) + gap), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(11)
    for i, image in enumerate(pixels):
        x, y = gap + i % columns * (cell + gap), gap + i // columns * (cell + line + gap)
        grid.paste(Image.fromarray(image).resize((cell, cell), Image.LANCZOS), (x, y))
        if captions:
            text = captions[i]
            while text and draw.textlength(text, font) > cell:
                text = text[:-1]
            draw.text((x + cell / 2, y + cell + 1), text, "black", font, anchor="ma")
    return grid


def _ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= min((m for m in (1, 2, 2.5, 5, 10)), key=lambda m: abs((high - low) / (m * step) - 5))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def line_plot(series: dict[str, list[tuple[float, float]]], title: str, x_label: str, y_label: str,
              width: int = 640, height: int = 400) -> Image.Image:
    """A plain line plot of {name: [(x, y), ...]} with a legend, drawn at twice the size; nan leaves a gap."""
    series = {name: [(x, y) for x, y in points if math.isfinite(y)] for name, points in series.items()}
    xs, ys = ([point[i] for points in series.values() for point in points] or [0.0] for i in (0, 1))
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    x1, pad = max(x1, x0 + 1e-9), 0.06 * (y1 - y0) or 0.5
    y0, y1 = y0 - pad, y1 + pad
    image = Image.new("RGB", (2 * width, 2 * height), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    left, right, top, bottom = 140, 2 * width - 40, 80, 2 * height - 110

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (right - left), bottom - (y - y0) / (y1 - y0) * (bottom - top)

    for y in _ticks(y0, y1):
        draw.line([place(x0, y), place(x1, y)], "#DDDDDD", 2)
        draw.text((left - 12, place(x0, y)[1]), f"{y:g}", "black", font, anchor="rm")
    for x in _ticks(x0, x1):
        draw.text((place(x, y0)[0], bottom + 10), f"{x:g}", "black", font, anchor="ma")
    draw.line([(left, top), (left, bottom), (right, bottom)], "black", 3)
    for colour, (name, points) in zip(COLOURS * 4, series.items()):
        places = [place(x, y) for x, y in points]
        if len(places) > 1:
            draw.line(places, colour, 5, joint="curve")
        for x, y in places if len(places) < 30 else []:
            draw.ellipse([x - 7, y - 7, x + 7, y + 7], colour)
    x = right
    for colour, name in reversed(list(zip(COLOURS * 4, series))):
        x -= draw.textlength(name, font) + 24
        draw.text((x, 66), name, colour, font, anchor="ls")
    draw.text((left, 66), title, "black", font, anchor="ls")
    draw.text(((left + right) / 2, 2 * height - 20), x_label, "black", font, anchor="ms")
    side = Image.new("L", (bottom - top, 40))
    ImageDraw.Draw(side).text(((bottom - top) / 2, 20), y_label, 255, font, anchor="mm")
    image.paste("black", (8, top), side.rotate(90, expand=True))
    return image


@torch.no_grad()
def reconstruction_grid(vq: tokenizer.VQModel, pixels: torch.Tensor) -> Image.Image:
    """uint8 (N, S, S, 3) -> a picture of pairs of rows: ten originals, and below them what the codes keep."""
    device = next(vq.parameters()).device
    again = tokenizer.to_uint8(vq.decode(vq.encode(tokenizer.to_float(pixels.to(device))))).cpu()
    pairs = [half for a, b in zip(pixels.split(10), again.split(10)) for half in (a, b)]
    return image_grid(torch.cat(pairs).numpy(), min(10, len(pixels)))


def save_reconstructions(path: str | Path, vq: tokenizer.VQModel, settings) -> None:
    """`reconstruction_grid` of twenty held-out images; `settings` has data, image_size and skip_corrupt."""
    images = tokenizer.open_images(settings.data, "val")
    pixels = tokenizer.held_out_pixels(images, settings.image_size, 20, settings.skip_corrupt)
    save_image(path, reconstruction_grid(vq, pixels))


# ---- Images ------------------------------------------------------------------------------------------------

def sample_images(model: Transformer, vq: tokenizer.VQModel, classes: torch.Tensor, seed: int,
                  **settings) -> np.ndarray:
    """uint8 (B, S, S, 3) for `classes` (B,), a function of its arguments; `settings` are `generate`'s."""
    device = model.output.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    codes = generate(model, classes.to(device), generator=generator, **settings)
    with torch.no_grad():
        return tokenizer.to_uint8(torch.cat([vq.decode(part) for part in codes.split(16)])).cpu().numpy()


def save_samples(path: Path, model: Transformer, vq: tokenizer.VQModel, classes: list[int], names: list[str],
                 seed: int, **settings) -> None:
    """Write a grid of one image per entry of `classes`, captioned with its name."""
    pixels = sample_images(model, vq, torch.tensor(classes), seed, **settings)
    grid = image_grid(pixels, min(10, len(classes)), [names[c] for c in classes])
    save_image(path, grid)


def save_npz(path: Path, model: Transformer, vq: tokenizer.VQModel, count: int, batch: int, seed: int,
             protocol: dict, **settings) -> None:
    """Write `count` class-balanced images to an .npz in ADM's layout.

    arr_0 uint8 (N, S, S, 3), arr_1 labels int64 (N,), and `protocol`, a JSON string with every sampling
    setting.

    Under torchrun each process makes every WORLD_SIZE-th batch and rank 0 joins them; no process group is
    needed, the images do not depend on the number of processes, and a killed run goes on where it was.
    """
    rank, world = tokenizer.rank_and_world()
    labels = torch.arange(count) * model.config.num_classes // count  # class-balanced, in class order
    protocol |= settings | {"seed": seed, "batch": batch, "num": count}
    protocol = json.dumps(protocol, sort_keys=True)
    folder = path.with_name(f".{path.name}-{tokenizer.digest(protocol)}")
    parts = [folder / f"{start:07d}.npy" for start in range(0, count, batch)]
    for part in tqdm(parts[rank::world], "sampling", disable=rank != 0, unit="batch"):
        if not part.exists():
            start = int(part.stem)
            pixels = sample_images(model, vq, labels[start:start + batch], seed + start, **settings)
            tokenizer.write_file(part, lambda file: np.save(file, pixels))
    if rank == 0:
        while not all(part.exists() for part in parts):
            time.sleep(0.2)
        images = np.concatenate([np.load(part) for part in parts])
        arrays = dict(arr_0=images, arr_1=labels.numpy(), protocol=protocol)
        tokenizer.write_file(path, lambda file: np.savez(file, **arrays))
        for part in parts:
            part.unlink()
        folder.rmdir()


def open_run(args: argparse.Namespace) -> tuple[Transformer, tokenizer.VQModel, list[str], str]:
    """(model, tokenizer, class names, name) of a run folder or of two files, as the command line names them.

    Raises FileNotFoundError or ValueError, in one sentence, if they are missing or do not belong together.
    """
    path = Path(args.run) / "checkpoint.pt" if args.run else Path(args.gpt)
    model, rest = load_model(path, args.ema, args.image_size, args.device)
    vq_path = args.vq or (Path(args.run) / "tokenizer.pt" if args.run else "")
    if not args.vq and "config" in rest and not Path(vq_path).exists():
        vq_path = rest["config"]["tokenizer"]
    vq = tokenizer.load_tokenizer(vq_path, args.device)
    if vq.config.codebook_size != model.config.vocab_size:
        raise ValueError(f"{vq_path} has {vq.config.codebook_size} codes, but {path} was trained on "
                         f"{model.config.vocab_size}: they do not belong together.")
    data = rest.get("data", {})
    if data.get("tokenizer", (found := tokenizer.fingerprint(vq))) != found:
        raise ValueError(f"{vq_path} is tokenizer {found}, but {path} was trained with {data['tokenizer']}.")
    names = data.get("classes", [f"class {c}" for c in range(model.config.num_classes)])
    return model, vq, names, rest.get("config", {}).get("name") or path.stem


def main() -> None:
    """Parse the command line and run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", nargs="?", help="run folder, as in runs/tiny")
    parser.add_argument("--gpt", help="LlamaGen checkpoint, instead of a run folder")
    parser.add_argument("--vq", help="tokenizer file (default: the run's)")
    parser.add_argument("--classes", type=int, nargs="+", help="one image for each of these (default: 20)")
    parser.add_argument("--num", "--num-images", type=int, help="with --npz: how many images, class-balanced")
    parser.add_argument("--npz", type=Path, help="write images for fid.py here instead of a grid")
    parser.add_argument("--out", type=Path, default="samples.png", help="grid to write (default samples.png)")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance scale; 1: none")
    parser.add_argument("--cfg-interval", type=int, default=-1, help="guide N + 2 tokens only; -1: all")
    parser.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="0: all codes")
    parser.add_argument("--top-p", type=float, default=1.0, help="1: all codes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=100, help="images at once, with --npz")
    parser.add_argument("--image-size", type=int, default=256, help="of a --gpt that does not tell")
    parser.add_argument("--ema", action="store_true", help="the teacher's weights instead of the student's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if bool(args.run) == bool(args.gpt) or (args.gpt and not args.vq):
        parser.error("name a run folder, or --gpt FILE and --vq FILE")
    if bool(args.npz) != bool(args.num):
        parser.error("--num and --npz go together")
    if min(args.temperature, args.top_k) < 0 or not 0 < args.top_p <= 1 or min(args.batch, args.num or 1) < 1:
        parser.error("needed: temperature >= 0, 0 < top-p <= 1, top-k >= 0, batch and num >= 1")

    model, vq, names, name = open_run(args)
    keys = ("cfg", "cfg_interval", "temperature", "top_k", "top_p")
    settings = {key: getattr(args, key) for key in keys}
    if args.npz:
        protocol = {"model": name, "weights": "ema" if args.ema else "student"}
        save_npz(args.npz, model, vq, args.num, args.batch, args.seed, protocol, **settings)
        return
    count = model.config.num_classes
    classes = args.classes or [i * count // min(count, 20) for i in range(min(count, 20))]
    if bad := [c for c in classes if not 0 <= c < count]:
        raise ValueError(f"class {bad[0]} does not exist: {name} knows 0 ... {count - 1}.")
    save_samples(args.out, model, vq, classes, names, args.seed, **settings)
    print(f"{args.out}: {len(classes)} images from {name}, {'ema' if args.ema else 'student'} weights, "
          f"seed {args.seed},", ", ".join(f"{key} {value}" for key, value in settings.items()))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # the user's mistakes; everything else deserves its traceback
        sys.exit(f"sample.py: {error}")
