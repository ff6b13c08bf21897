"""What a model understands: linear probe by step and layer, attention, consistency.

ST-AR (arXiv 2509.15185) argues from what the features of an autoregressive model know. This file draws those
figures for any number of runs side by side, and measures what the paper shows by eye. The model is frozen and
sees the null class throughout: under an image's own class the label would leak into every feature. The
paper's figures, and what draws them here (Fig. 3, the method, is in the table of losses.py):

    Fig. 1a, 2, 5, 7   probe.draw_attention   where the current token looks
    Fig. 1b, 4         probe.draw_probe       linear probe by step
    Fig. 1c            probe.draw_codes       codes that change when the crop moves
    Fig. 6             sample.save_samples    generated images

    python probe.py runs/tiny-ar runs/tiny --out figures                # pictures and probe.json
    python probe.py runs/tiny-ar runs/tiny --out figures --layers all   # also the layer x step table
    python probe.py c2i_B_256.pt --vq vq_ds16_c2i.pt --data IMAGENET    # LlamaGen's checkpoint

Step s is position s - 1: it has seen the class and s - 1 tokens, the last being its own. Layer n is the
output of the n-th block. Shapes in comments: N images, B batch, V crops, T tokens, L layers, S = 8 steps, C
width, G features probed side by side, H settings tried, K classes, g x g the token grid.
"""

import argparse
import json
import math
import tempfile
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import sample
import tokenizer
from model import Transformer

# ---- Runs --------------------------------------------------------------------------------------------------

class Subject(NamedTuple):
    """What is probed: a frozen model with the images and codes it belongs to."""
    name: str
    model: Transformer
    depth: int  # the layer whose numbers stand for the model: its contrast depth, or the middle
    vq: tokenizer.VQModel
    train: tokenizer.TokenCache  # (N, V, T), crops
    held_out: tokenizer.TokenCache  # (N, 1, T), centre crops
    images: tokenizer.ImageSet  # the pixels of `held_out`
    ratio: float  # the first crop ratio
    origin: dict  # for probe.json: kind of weights, step and seed of the training, digests, images


def open_subject(path: Path, args: argparse.Namespace, device: torch.device) -> Subject:
    """A run folder or a checkpoint file, with its tokenizer, images and caches; missing caches are written.

    Raises FileNotFoundError or ValueError, in one sentence, for parts that are missing or do not fit
    together.
    """
    trained = sample.open_trained(path, args.vq, args.ema, args.image_size, device)
    name, model, vq, config = trained.name, trained.model, trained.vq, trained.config
    data = config.get("data") if args.data is None else args.data
    subset = config.get("subset", "") if args.subset is None else args.subset
    if data is None:
        raise ValueError(f"{path} does not name its images; add --data.")
    size = model.config.grid * vq.config.downsample
    ratios = tuple(config.get("crop_ratios", (1.1,)))
    caches = []
    for split, crops in (("train", ratios), ("val", ())):
        images = tokenizer.open_images(data, split, subset)
        meta = tokenizer.cache_meta(images, vq, size, crops)
        known = trained.data if split == "train" else {}
        for key, value in meta.items():  # where the images lie is not among them
            if value != known.get(key, value):
                raise ValueError(f"{path} was trained with {key} {str(known[key])[:40]}; {data} has "
                                 f"{str(value)[:50]}: they do not fit.")
        root = args.cache or config.get("cache", "cache")
        caches.append(tokenizer.token_cache(images, vq, size, crops, root))
    origin = trained.origin | {"data": str(data), "subset": subset, "images_digest": caches[0].meta["images"]}
    depth = config.get("depth", model.config.n_layer // 2)
    return Subject(name, model, depth, vq, *caches, images, ratios[0], origin)


def check_subjects(subjects: list[Subject]) -> None:
    """Raise ValueError, in one sentence, for models that one picture cannot compare."""
    first = subjects[0]
    for other in subjects[1:]:
        a, b = first.model.config.num_tokens, other.model.config.num_tokens
        if a != b:
            raise ValueError(f"{first.name} has {a} tokens per image, {other.name} has {b}: probe them "
                             "apart.")
        a, b = first.held_out.meta, other.held_out.meta
        if (a["images"], a["image_size"]) != (b["images"], b["image_size"]):
            raise ValueError(f"{first.name} knows {first.images.source} at {a['image_size']} px, "
                             f"{other.name} other images, {other.images.source} at {b['image_size']} px: "
                             "probe them apart.")
    if len({subject.name for subject in subjects}) < len(subjects):
        raise ValueError("two runs have the same name; rename one folder for the legends.")


def layer_numbers(subject: Subject, wanted: list[str]) -> list[int]:
    """The layers named on the command line; none: its depth. Raises ValueError if one does not exist."""
    last = subject.model.config.n_layer
    existing = {str(n): n for n in range(1, last + 1)}
    if wanted == ["all"]:
        return list(existing.values())
    if not all(word in existing for word in wanted):
        raise ValueError(f"{subject.name} has layers 1 ... {last}, or all; not {' '.join(wanted)}.")
    return [existing[word] for word in wanted] or [subject.depth]


def choose(cache: tokenizer.TokenCache, count: int, seed: int, at_least: int = 2) -> np.ndarray:
    """A fixed random subset of `count` readable images (0: all), int64 rows of the cache.

    Raises ValueError, in one sentence, if there are fewer than `at_least`.
    """
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(cache.labels >= 0))[:count or None]
    if len(rows) < at_least:
        raise ValueError(f"{len(rows)} images of the {cache.meta['split']} split are too few: at least "
                         f"{at_least} are needed for {len(cache.meta['classes'])} classes.")
    return rows


# ---- Features ----------------------------------------------------------------------------------------------

def eight_steps(num_tokens: int) -> list[int]:
    """T/8, 2T/8 ... T, the steps of Figures 1b and 4."""
    return [max(num_tokens * i // 8, 1) for i in range(1, 9)]


def empty_features(folder: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """Zeros, float16 `shape`, in a nameless file in `folder`, mapped into memory: the disk limits their size.

    The zeros are written: a disk without room raises OSError now, in one sentence. Found out later, through
    mapped memory, it would kill the interpreter.
    """
    bytes_each = 2 * math.prod(shape[1:])
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.writelines(repeat(bytes(bytes_each), shape[0]))
            file.flush()
            return torch.from_numpy(np.memmap(file, np.float16, "r+", shape=shape))
    except OSError as error:
        raise OSError(f"{folder} has no room for {shape[0] * bytes_each / 1e9:.3f} GB of features ({error}); "
                      "free some, or choose another --out, or fewer --train-images or --layers.") from None


@torch.no_grad()
def extract(model: Transformer, tokens: np.ndarray, layers: list[int], folder: Path,
            classes: torch.Tensor | None = None, batch: int = 64) -> torch.Tensor:
    """Features of `layers` at eight steps, and their mean over all positions: float16 (N, 9 L, C), by layer.

    tokens (N, T) codes; classes (N,) int64, to show a leak: otherwise the null class. One forward serves all
    layers and steps, and goes no deeper than the last of them. Errors and `folder` as in `empty_features`.
    """
    (N, T), device = tokens.shape, model.output.weight.device
    if classes is None:
        classes = torch.full((N,), model.config.num_classes)
    positions = torch.tensor(eight_steps(T), device=device) - 1
    features = empty_features(folder, (N, 9 * len(layers), model.config.dim))
    for rows in tokenizer.progress(torch.arange(N).split(batch), "features", leave=False):
        inputs = torch.from_numpy(tokens[rows.numpy(), :-1].astype(np.int64)).to(device)
        hidden = model(inputs, classes[rows].to(device), layers=tuple(layers), head=False).hidden
        parts = [part for n in layers for part in (hidden[n][:, positions], hidden[n].mean(1, keepdim=True))]
        features[rows[0]:rows[-1] + 1] = torch.cat(parts, 1).clamp(-6e4, 6e4).half().cpu()
    return features


# ---- Linear probe ------------------------------------------------------------------------------------------

# MAE trains for 90 epochs. The problem is convex, and these reach the same accuracy: see test_all.py
EPOCHS, BATCH = 20, 256
SETTINGS = [(rate, decay) for rate in (0.01, 0.03, 0.1) for decay in (0.0, 1e-3, 1e-2)]  # to choose from


class Probes(nn.Module):
    """G x H linear classifiers behind a BatchNorm without affine (MAE): (B, G, C) -> logits (G, B, H, K)."""

    def __init__(self, G: int, C: int, H: int, K: int):
        super().__init__()
        self.shape = (H, K)
        self.norm = nn.BatchNorm1d(G * C, eps=1e-6, affine=False)
        self.weight = nn.Parameter(torch.zeros(G, C, H * K))
        self.bias = nn.Parameter(torch.zeros(G, 1, H * K))

    def forward(self, x):
        x = self.norm(x.flatten(1)).view_as(x).transpose(0, 1)  # (G, B, C)
        return torch.baddbmm(self.bias, x, self.weight).unflatten(-1, self.shape)


def fit(features: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, settings: torch.Tensor,
        num_classes: int, device) -> Probes:
    """Train G x H probes at once on `rows` of features (N, G, C) and labels (N,): SGD with momentum 0.9.

    settings (G, H, 2): learning rate, which falls to zero along half a cosine, and weight decay of each
    probe. The probes share batches and nothing else: no number depends on which others are computed beside
    it.
    """
    (G, H, _), g = settings.shape, torch.Generator().manual_seed(0)
    probes = Probes(G, features.shape[2], H, num_classes).to(device)
    rate, decay = settings.to(device).repeat_interleave(num_classes, 1)[:, None].unbind(-1)  # (G, 1, H K)
    weights = list(probes.parameters())
    speeds = [torch.zeros_like(w) for w in weights]
    batches = math.ceil(len(rows) / BATCH)
    for epoch in tokenizer.progress(range(EPOCHS), f"{G * H} probes", leave=False):
        order = rows[torch.randperm(len(rows), generator=g)]
        for i, chunk in enumerate(order.tensor_split(batches)):
            logits = probes(features[chunk].to(device).float())
            target = labels[chunk].to(device)[None, :, None].expand(logits.shape[:3])
            # a sum over probes, whose gradients do not depend on each other, of means over images
            loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="sum") / len(chunk)
            fall = 0.5 + 0.5 * math.cos(math.pi * (epoch + i / batches) / EPOCHS)
            for w, v, gradient in zip(weights, speeds, torch.autograd.grad(loss, weights)):
                v.mul_(0.9).add_(gradient).add_(decay * w.detach())
                w.data.sub_(fall * rate * v)
    return probes.eval()


@torch.no_grad()
def evaluate(probes: Probes, features: torch.Tensor, labels: torch.Tensor,
             rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of `rows` each probe gets right, and its cross-entropy summed over them: (G, H) each."""
    device, correct, loss = probes.weight.device, 0, 0
    for chunk in rows.split(BATCH):
        logits = probes(features[chunk].to(device).float())  # (G, B, H, K)
        target = labels[chunk].to(device)[None, :, None].expand(logits.shape[:3])
        correct = correct + (logits.argmax(-1) == target).sum(1)
        loss = loss + F.cross_entropy(logits.movedim(-1, 1), target, reduction="none").sum(1)
    return correct.cpu(), loss.cpu()


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n independent images."""
    z, p = 1.959964, correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def linear_probe(train: torch.Tensor, labels: torch.Tensor, images: torch.Tensor, test: torch.Tensor,
                 test_labels: torch.Tensor, num_classes: int, device="cpu") -> list[dict]:
    """One result per feature: accuracy on `test`, its interval, and the settings chosen.

    train (N, G, C), labels (N,), images (N,): which image a row is a crop of; test (N', G, C), test_labels
    (N',). Learning rate and weight decay are chosen per feature on a tenth of the TRAINING images, with all
    their crops, by cross-entropy, which is less noisy than accuracy; then the probe is trained again on all
    of them. The test images are looked at once.
    """
    everyone = images.unique()
    everyone = everyone[torch.randperm(len(everyone), generator=torch.Generator().manual_seed(1))]
    aside = torch.isin(images, everyone[:max(len(everyone) // 10, 1)])
    every_setting = torch.tensor(SETTINGS).expand(train.shape[1], -1, 2)  # (G, H, 2)
    tried = fit(train, labels, (~aside).nonzero()[:, 0], every_setting, num_classes, device)
    best = evaluate(tried, train, labels, aside.nonzero()[:, 0])[1].argmin(1)  # (G,)
    best_setting = torch.tensor(SETTINGS)[best][:, None]  # (G, 1, 2)
    final = fit(train, labels, torch.arange(len(train)), best_setting, num_classes, device)
    n = len(test)
    correct = evaluate(final, test, test_labels, torch.arange(n))[0][:, 0].tolist()
    return [{"accuracy": count / n, "interval": wilson(count, n), "n": n, "learning_rate": SETTINGS[i][0],
             "weight_decay": SETTINGS[i][1]} for count, i in zip(correct, best)]


def probe_subject(subject: Subject, layers: list[int], args: argparse.Namespace) -> list[dict]:
    """`linear_probe` of a model, with "layer" and "step" (a number, or "mean") in each result."""
    K, (_, V, T) = len(subject.train.meta["classes"]), subject.train.tokens.shape
    rows = choose(subject.train, args.train_images, args.seed, K)
    test_rows = choose(subject.held_out, 0, args.seed, K)
    crops = np.random.default_rng(args.seed).random((len(rows), V)).argsort(1)[:, :args.crops]
    tokens = subject.train.tokens[rows[:, None], crops].reshape(-1, T)
    train = extract(subject.model, tokens, layers, args.out)
    test = extract(subject.model, subject.held_out.tokens[test_rows, 0], layers, args.out)
    images = torch.from_numpy(rows).repeat_interleave(crops.shape[1])
    labels = torch.from_numpy(subject.train.labels)[images]
    test_labels = torch.from_numpy(subject.held_out.labels)[test_rows]
    device = subject.model.output.weight.device
    results = linear_probe(train, labels, images, test, test_labels, K, device)
    where = [(n, s) for n in layers for s in (*eight_steps(T), "mean")]
    return [{"layer": n, "step": s, **result} for (n, s), result in zip(where, results)]


# ---- Attention ---------------------------------------------------------------------------------------------

MASSES = ("class", "itself", "neighbours", "elsewhere")


@torch.no_grad()
def attention_maps(model: Transformer, tokens: np.ndarray, batch: int = 4) -> Iterator[torch.Tensor]:
    """Yield the attention of the next `batch` images, mean over heads: (B, L, T, T). tokens (N, T) codes."""
    device = model.output.weight.device
    for chunk in np.array_split(tokens, math.ceil(len(tokens) / batch)):
        inputs = torch.from_numpy(chunk[:, :-1].astype(np.int64)).to(device)
        classes = torch.full((len(chunk),), model.config.num_classes, device=device)
        out = model(inputs, classes, layers=(model.config.n_layer,), head=False, return_attention=True)
        yield torch.stack([weights.mean(1) for weights in out.attention], 1).cpu()


def attention_numbers(weights: torch.Tensor, grid: int) -> dict[str, list[float]]:
    """Where attention (L, T, T) goes, per layer, mean over the queries 1 ... T - 1: Observation 1 as numbers.

    Shares, 1 in all: of the class token, of the query's own token, of its 8-neighbourhood without itself
    (four of the eight are in the past), of all others. "distance": between query and key on the token grid,
    in tokens, averaged over the attention that does not go to the class.
    LlamaGen: the class token's logit is always 0, so its share is 1 / (1 + sum exp(other logits)): it tells
    how far the others lie below 0, and nothing about the class.
    """
    cell = torch.arange(weights.shape[-1] - 1)  # of position 1 + cell
    places = torch.stack([cell // grid, cell % grid], 1).float()  # (T - 1, 2)
    apart = (places[:, None] - places).abs()  # (T - 1, T - 1, 2), rows and columns between query and key
    reach = apart.amax(-1)  # 0: the same token, 1: a neighbour
    seen = weights[:, 1:, 1:]  # (L, T - 1, T - 1)

    def share(of):
        return (seen * of).sum(-1).mean(1).tolist()

    distance = (seen * apart.norm(dim=-1)).sum((1, 2)) / seen.sum((1, 2))
    return {"class": weights[:, 1:, 0].mean(1).tolist(), "itself": share(reach == 0),
            "neighbours": share(reach == 1), "elsewhere": share(reach > 1), "distance": distance.tolist()}


def even_distance(num_tokens: int) -> float:
    """The "distance" of `attention_numbers` if a query looked at all that it can see alike."""
    evenly = torch.ones(num_tokens, num_tokens).tril() / torch.arange(1, num_tokens + 1)[:, None]
    return attention_numbers(evenly[None], math.isqrt(num_tokens))["distance"][0]


# ---- Consistency -------------------------------------------------------------------------------------------

SHIFTS = (0, 1, 2, 4, 8)  # pixels


@torch.no_grad()
def crops_and_codes(subject: Subject, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seven crops of held-out images, uint8 (N, 7, S, S, 3), and their codes (N, 7, T).

    Crops 0 and 1: upper left and lower right of the ten crops, the farthest apart without a mirror. From 2
    on: moved to the right by `SHIFTS`.
    """
    size = subject.held_out.meta["image_size"]

    def cut(image):
        wide = np.asarray(tokenizer.center_crop(image, size + max(SHIFTS)))
        top = max(SHIFTS) // 2
        moved = [wide[top:top + size, shift:shift + size] for shift in SHIFTS]
        return np.stack([*tokenizer.ten_crops(image, size, subject.ratio)[[0, 3]], *moved])

    crops = tokenizer.read_pixels(subject.images, rows.tolist(), cut)
    pixels = np.stack([crop for crop in crops if crop is not None])
    codes = tokenizer.encode_pixels(subject.vq, torch.from_numpy(pixels).flatten(0, 1))
    return pixels, codes.numpy().reshape(*pixels.shape[:2], -1)


def consistency(features: torch.Tensor) -> dict[str, float]:
    """Mean cosine of features (N, 2, S, C) of two crops at eight steps: Observations 2 and 3 as numbers.

    "steps": two steps of one crop; "crops": two crops at one step; "images": two images at one step. The last
    is what the others are to be compared with: all features share directions that say nothing about an
    image.
    """
    h = F.normalize(features.float(), dim=-1)
    N, _, S, _ = h.shape
    steps = torch.einsum("nvsc,nvtc->st", h, h) / (2 * N)  # (S, S), ones on the diagonal
    images = torch.einsum("nsc,msc->nm", h[:, 0], h[:, 0]) / S  # (N, N), likewise
    return {"steps": (steps.sum().item() - S) / (S * (S - 1)),
            "crops": (h[:, 0] * h[:, 1]).sum(-1).mean().item(),
            "images": (images.sum().item() - N) / (N * (N - 1))}


# ---- Pictures ----------------------------------------------------------------------------------------------

BLUE = np.array([0, 114, 178])  # sample.COLOURS[0]


def montage(cells: list[list[Image.Image]], rows: list[str], columns: list[tuple[str, str]],
            title: str) -> Image.Image:
    """Rows of equal pictures with a label before each row and two lines of text above each column."""
    font, (w, h) = ImageFont.load_default(24), (side + 4 for side in cells[0][0].size)
    left = 24 + max(int(font.getlength(row)) for row in rows)
    width = max(left + len(columns) * w, int(font.getlength(title)) + 30)
    image = Image.new("RGB", (width, 114 + len(rows) * h), "white")
    draw = ImageDraw.Draw(image)
    draw.text((10, 32), title, "black", font, anchor="ls")
    for x, (upper, lower) in zip(range(left, width, w), columns):
        draw.text((x, 72), upper, "black", font, anchor="ls")
        draw.text((x + w / 2, 104), lower, "black", font, anchor="ms")
    for y, label, line in zip(range(114, image.height, h), rows, cells):
        draw.text((left - 10, y + h / 2), label, "black", font, anchor="rm")
        for x, picture in zip(range(left, width, w), line):
            image.paste(picture, (x, y))
    return image


def heat_map(panels: dict[str, dict[str, list[float]]], columns: list[str], title: str,
             digits: int = 1) -> Image.Image:
    """Tables {name: {row: values}} side by side, in cells from white (smallest value) to blue (largest)."""
    values = [value for table in panels.values() for line in table.values() for value in line]
    low, span, font = min(values), max(max(values) - min(values), 1e-9), ImageFont.load_default(24)

    def cell(value):
        share = (value - low) / span
        colour = tuple((255 + share * (BLUE - 255)).astype(int).tolist())
        image = Image.new("RGB", (70 if len(columns) > 5 else 136, 44), colour)
        place, ink = (image.width / 2, 22), "white" if share > 0.6 else "black"
        ImageDraw.Draw(image).text(place, f"{value:.{digits}f}", ink, font, "mm")
        return image

    names = dict.fromkeys(row for table in panels.values() for row in table)  # models may differ in depth
    blank = [Image.new("RGB", cell(low).size, "white")] * len(columns)
    cells = [sum(([*map(cell, table[row])] if row in table else blank for table in panels.values()), [])
             for row in names]
    heads = [(name if column == columns[0] else "", column) for name in panels for column in columns]
    return montage(cells, list(names), heads, title)


def tinted(pixels: np.ndarray, weights: np.ndarray, current: int = -1) -> Image.Image:
    """An image (S, S, 3) in pale grey, blue where `weights` (g, g) in [0, 1] are high; `current` in red."""
    side = 144
    grey = 90 + np.asarray(Image.fromarray(pixels).convert("L").resize((side, side)))[..., None] * (165 / 255)
    alpha = Image.fromarray((weights * 190).astype(np.uint8)).resize((side, side), Image.NEAREST)
    alpha = np.asarray(alpha)[..., None] / 255
    image = Image.fromarray((grey * (1 - alpha) + BLUE * alpha).astype(np.uint8))
    if current >= 0:
        y, x = (k * side / len(weights) for k in divmod(current, len(weights)))
        end = side / len(weights) - 1
        ImageDraw.Draw(image).rectangle([x, y, x + end, y + end], outline="red", width=max(int(end / 5), 2))
    return image


def draw_probe(subjects: list[Subject], results: dict[str, dict]) -> dict[str, Image.Image]:
    """Figures 1b and 4: accuracy by step at each model's depth, with 95 % bands; and by layer where known."""
    T = subjects[0].model.config.num_tokens
    curves, bands, tables, widest = {}, {}, {}, 0.0
    for subject in subjects:
        table: dict[str, list[float]] = {}
        halves: dict[str, list[float]] = {}
        for r in results[subject.name]["probe"]:
            low, high = r["interval"]
            table.setdefault(f"layer {r['layer']}", []).append(100 * r["accuracy"])
            halves.setdefault(f"layer {r['layer']}", []).append(50 * (high - low))
        *by_step, pooled = table[f"layer {subject.depth}"]
        legend = f"{subject.name} (mean-pooled {pooled:.1f})"
        curves[legend] = list(zip(eight_steps(T), by_step))
        bands[legend] = halves[f"layer {subject.depth}"][:-1]
        tables[subject.name] = table
        widest = max(widest, *sum(halves.values(), []))
    curves["chance"] = [(s, 100 / len(subjects[0].train.meta["classes"])) for s in eight_steps(T)]
    plot = sample.line_plot(curves, "bands: 95 %", f"step of {T}", "linear probe, top-1 %", bands)
    pictures = {"probe": plot}
    if any(len(table) > 1 for table in tables.values()):
        columns = [*map(str, eight_steps(T)), "mean"]
        title = f"Linear probe, top-1 %, by layer and step, ±{widest:.1f}"
        pictures["layers"] = heat_map(tables, columns, title)
    return pictures


def draw_numbers(subjects: list[Subject], results: dict[str, dict]) -> dict[str, Image.Image]:
    """Attention distance and mass, cosines: Observations 1 to 3 as plots and tables."""
    distance, mass, cosine = {}, {}, {}
    for subject in subjects:
        attention = results[subject.name]["attention"]
        distance[subject.name] = list(enumerate(attention["distance"], 1))
        by_layer = zip(*(attention[kind] for kind in MASSES))
        mass[subject.name] = {f"layer {n}": line for n, line in enumerate(by_layer, 1)}
        cosine[subject.name] = list(results[subject.name]["cosine"].values())
    even = even_distance(subjects[0].model.config.num_tokens)
    deepest = max(subject.model.config.n_layer for subject in subjects)
    distance["even"] = [(n, even) for n in range(1, deepest + 1)]
    kinds = ["steps", "crops", "images"]
    return {"distance": sample.line_plot(distance, "", "layer", "attention distance, tokens"),
            "mass": heat_map(mass, list(MASSES), "Share of the attention by kind of key", 2),
            "cosine": heat_map({"": cosine}, kinds, "Mean cosine between features of different", 3)}


def draw_attention(subjects: list[Subject], args: argparse.Namespace) -> Image.Image:
    """Figures 1a, 2, 5 and 7: where the current token looks, models side by side, by image and layer."""
    held_out = subjects[0].held_out
    T, grid = subjects[0].model.config.num_tokens, subjects[0].model.config.grid
    steps = args.map_steps or [max(T * i // 4, 2) for i in range(1, 5)]
    rows = args.map_images or choose(held_out, 3, args.seed).tolist()
    if not all(2 <= s <= T for s in steps) or not all(0 <= row < len(held_out.tokens) for row in rows):
        raise ValueError(f"--map-steps lie in 2 ... {T}, --map-images in 0 ... {len(held_out.tokens) - 1}.")
    fewest = min(subject.model.config.n_layer for subject in subjects)  # models may differ in depth
    blocks, columns = [], []
    for subject in subjects:
        layers, block = layer_numbers(subject, args.map_layers)[:fewest], []
        attended = torch.cat(list(attention_maps(subject.model, subject.held_out.tokens[rows, 0])))
        for row, maps in zip(rows, attended):
            pixels = tokenizer.center_crop(subject.images.read(row), held_out.meta["image_size"])
            seen = F.pad(maps[..., 1:], (0, 1))  # without the class
            seen = seen / seen.amax(-1, keepdim=True).clamp_min(1e-12)
            seen = seen.unflatten(-1, (grid, grid)).numpy()  # (L, T, g, g)
            block += [[tinted(np.asarray(pixels), seen[n - 1, s - 1], s - 2) for s in steps] for n in layers]
        blocks.append(block)
        head = f"{subject.name}, layer {layers[0]}" if len(layers) == 1 else subject.name
        columns += [(head if s == steps[0] else "", f"step {s}") for s in steps]
    labels = [f"layer {n}" if len(layers) > 1 else "" for n in layers] * len(rows)
    cells = [sum(line, []) for line in zip(*blocks)]
    return montage(cells, labels, columns, "Attention of the current token (red)")


def draw_codes(subject: Subject, changed: dict[int, float], rows: np.ndarray) -> Image.Image:
    """Figure 1c: which codes change when the crop moves by some pixels."""
    pixels, codes = crops_and_codes(subject, rows)
    codes = codes.reshape(*codes.shape[:2], subject.model.config.grid, -1)
    cells = [[tinted(p, c != line[2]) for p, c in zip(crops[2:], line[2:])]
             for crops, line in zip(pixels, codes)]
    columns = [("", "0 px")] + [("", f"{shift} px: {100 * share:.0f} %") for shift, share in changed.items()]
    return montage(cells, [""] * len(cells), columns, "Codes that change (blue) when the crop moves")


# ---- Command line ------------------------------------------------------------------------------------------

def measure(subject: Subject, args: argparse.Namespace) -> dict:
    """All numbers of one model, as probe.json keeps them. Asserts that the model did not move."""
    before = tokenizer.fingerprint(subject.model)
    layers = sorted({subject.depth, *layer_numbers(subject, args.layers)})
    results = subject.origin | {"layer": subject.depth, "probe": probe_subject(subject, layers, args)}
    rows = choose(subject.held_out, args.images, args.seed)
    maps = attention_maps(subject.model, subject.held_out.tokens[rows, 0])
    mean = sum(weights.sum(0) for weights in maps) / len(rows)  # (L, T, T)
    results["attention"] = attention_numbers(mean, subject.model.config.grid)
    codes = crops_and_codes(subject, rows)[1]  # (N, 7, T)
    pairs = codes[:, :2].reshape(-1, codes.shape[2])
    features = extract(subject.model, pairs, [subject.depth], args.out)[:, :8]
    results["cosine"] = consistency(features.unflatten(0, (-1, 2)))
    changed = (codes[:, 3:] != codes[:, 2:3]).mean((0, 2))
    results["codes_changed"] = dict(zip(SHIFTS[1:], changed.tolist()))
    results["images"] = len(codes)  # of attention, cosine and codes_changed
    assert tokenizer.fingerprint(subject.model) == before, "the probe moved the backbone"
    return results


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; values out of range are refused (SystemExit)."""
    within = tokenizer.within
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders or checkpoints (.pt), LlamaGen's too")
    add("--out", type=Path, default=Path("figures"), help="folder for the results")
    add("--layers", nargs="+", default=[], help="layers to probe, or: all (default: the contrast depth)")
    add("--train-images", type=within(int, 0), default=10_000, help="to learn the probe from; 0: all")
    add("--crops", type=within(int, 1), default=2, help="crops of each of these images, of ten or twenty")
    add("--images", type=within(int, 2), default=200, help="held-out ones for the other numbers")
    add("--map-images", type=within(int, 0), nargs="+", help="held-out images to draw (default: three)")
    add("--map-steps", type=within(int, 2), nargs="+", help="steps to draw (default: four)")
    add("--map-layers", nargs="+", default=[], help="layers whose attention to draw, or: all")
    add("--data", help="folder or zip of images (default: the run's)")
    add("--subset", help="file of class folders to keep, one a line; '': all (default: the run's)")
    add("--vq", help="tokenizer file (default: the run's)")
    add("--cache", help="folder for token caches (default: the run's)")
    add("--image-size", type=within(int, 16, 4096), default=256, help="of a checkpoint that does not tell")
    add("--ema", action="store_true", help="the teacher's weights instead of the student's")
    add("--seed", type=within(int, 0, 2 ** 62), default=0, help="of the choice of images and crops")
    add("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    return parser.parse_args(argv)


@tokenizer.enough_memory("lower --train-images or --images, or probe fewer --layers")
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run it.

    Raises ValueError or OSError, in one sentence, for a user's mistake.
    """
    if tokenizer.rank_and_world()[0] > 0:
        return  # one process does it all, as in fid.py
    args = parse_arguments(argv)
    tokenizer.check_output(args.out / "probe.json")
    device = tokenizer.choose_device(args.device)
    subjects = [open_subject(path, args, device) for path in args.runs]
    check_subjects(subjects)
    for subject in subjects:
        layer_numbers(subject, args.layers)
    args.out.mkdir(parents=True, exist_ok=True)
    pictures = {"attention": draw_attention(subjects, args)}
    results = {subject.name: measure(subject, args) for subject in subjects}
    settings = {key: value for key, value in vars(args).items() if key not in ("runs", "out")}
    settings |= {"epochs": EPOCHS, "batch": BATCH, "device": device.type}
    text = json.dumps({"settings": settings, "runs": results}, indent=1).encode()
    tokenizer.write_file(args.out / "probe.json", lambda file: file.write(text))
    pictures |= draw_probe(subjects, results) | draw_numbers(subjects, results)
    three = choose(subjects[0].held_out, 3, args.seed)
    pictures["codes"] = draw_codes(subjects[0], results[subjects[0].name]["codes_changed"], three)
    for name, picture in pictures.items():
        sample.save_image(args.out / f"{name}.png", picture)
    for subject in subjects:
        print(f"{subject.name}, {subject.origin['weights']} weights, layer {subject.depth}: step, top-1 %, "
              "95 % interval")
        for r in results[subject.name]["probe"]:
            if r["layer"] == subject.depth:
                low, high = (100 * end for end in r["interval"])
                print(f"{r['step']:>6} {100 * r['accuracy']:5.1f}  {low:.1f} ... {high:.1f}")
    print(f"{args.out}: probe.json and " + ", ".join(f"{name}.png" for name in pictures))


if __name__ == "__main__":
    tokenizer.run_script(main, "The same command starts again.")
