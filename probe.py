"""What a model understands: linear probe by position and layer, attention, consistency.

ST-AR (arXiv 2509.15185) argues from what the features of an autoregressive model know. This file draws those
figures for any number of runs side by side, and measures what the paper shows by eye. The model is frozen and
sees the null class throughout: under an image's own class the label would leak into every feature. The
paper's figures, and what draws them here (Fig. 3, the method, is in the table of losses.py):

    Fig. 1a, 2, 5, 7   probe.draw_attention   where the current token looks
    Fig. 1b, 4         probe.draw_probe       linear probe by position
    Fig. 1c            probe.draw_codes       codes that change when the crop moves
    Fig. 6             sample.save_samples    generated images

    python probe.py runs/tiny-ar runs/tiny --out figures                # pictures and probe.json
    python probe.py runs/tiny-ar runs/tiny --out figures --layers all   # every layer instead of one
    python probe.py c2i_B_256.pt --vq vq_ds16_c2i.pt --data IMAGENET    # LlamaGen's checkpoint

Position p has seen the class and p tokens, the last being its own, and predicts the next one. The paper
counts positions from 1 and calls them steps: its step s is position s - 1. The pictures and "step" in
probe.json count like the paper. Layer n is the output of the n-th block. Shapes in comments: N images, B
batch, V crops, T tokens, L layers, C width, G features probed side by side, H settings tried, K classes,
P positions, g x g the token grid.
"""

import argparse
import json
import math
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

import sample
import tokenizer
from model import Output, Transformer

# ---- What is measured --------------------------------------------------------------------------------------

class Subject(NamedTuple):
    """What is probed: a frozen model with the images and codes it belongs to."""
    name: str
    model: Transformer
    vq: tokenizer.VQModel
    depth: int  # the layer reported for the model: its contrast depth, or the middle
    layers: list[int]  # the layers to probe, `depth` among them
    train: tokenizer.TokenCache  # (N, V, T), crops
    held_out: tokenizer.TokenCache  # (N, 1, T), centre crops
    images: tokenizer.ImageSet  # the images of `held_out`
    ratio: float  # the first crop ratio
    origin: dict  # for probe.json: kind of weights, step and seed of the training, digests, images


def measure(subject: Subject, args: argparse.Namespace) -> dict:
    """All numbers of one model, as probe.json keeps them. Asserts that the model did not move.

    args  train_images, crops, images and seed, see `parse_arguments`
    Raises ValueError, in one sentence, if there are too few images.
    """
    model, train, held_out = subject.model, subject.train, subject.held_out
    before = tokenizer.fingerprint(model)
    results = subject.origin | {"layer": subject.depth}

    # Linear probe: learned from crops of training images, tested on the centre crops of all held-out images.
    K = len(train.meta["classes"])
    _, V, T = train.tokens.shape
    rows, test_rows = choose(train, args.train_images, args.seed), choose(held_out, 0, args.seed)
    # of each image some of its V crops, all different
    crops = np.random.default_rng(args.seed).random((len(rows), V)).argsort(1)[:, :args.crops]
    images = torch.from_numpy(rows).repeat_interleave(crops.shape[1])  # the image that each crop is of
    labels = torch.from_numpy(train.labels)[images]
    test_labels = torch.from_numpy(held_out.labels)[test_rows]
    features = extract(model, train.tokens[rows[:, None], crops].reshape(-1, T), subject.layers)
    test_features = extract(model, held_out.tokens[test_rows, 0], subject.layers)
    probed = linear_probe(features, labels, images, test_features, test_labels, K, model.output.weight.device)
    where = product(subject.layers, [*(p + 1 for p in eight_positions(T)), "mean"])
    results["probe"] = [{"layer": n, "step": step} | numbers for (n, step), numbers in zip(where, probed)]

    # Attention: averaged over held-out images.
    rows = choose(held_out, args.images, args.seed)
    maps = attention_maps(model, held_out.tokens[rows, 0])
    mean = sum(weights.sum(0) for weights in maps) / len(rows)  # (L, T, T)
    results["attention"] = attention_numbers(mean, model.config.grid)

    # Consistency: of two crops of the same images, and of their codes as the crop moves.
    codes = crops_and_codes(subject, rows)[1]  # (N, 7, T): two distant crops, one unmoved, four moved
    pairs = extract(model, codes[:, :2].reshape(-1, T), [subject.depth])[:, :8]  # (2 N, 8, C), no mean
    results["cosine"] = consistency(pairs.unflatten(0, (-1, 2)))
    changed = (codes[:, 3:] != codes[:, 2:3]).mean((0, 2))  # each moved crop against the unmoved one
    results["codes_changed"] = dict(zip(SHIFTS[1:], changed.tolist()))
    results["images"] = len(codes)  # of attention, cosine and codes_changed
    assert tokenizer.fingerprint(model) == before, "the probe moved the backbone"
    return results


def choose(cache: tokenizer.TokenCache, count: int, seed: int) -> np.ndarray:
    """A fixed random subset of `count` readable images (0: all), int64 rows of the cache.

    Raises ValueError, in one sentence, if there are fewer than two.
    """
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(cache.labels >= 0))[:count or None]
    if len(rows) < 2:
        raise ValueError(f"{len(rows)} images of the {cache.meta['split']} split are too few; take more.")
    return rows


# ---- Features ----------------------------------------------------------------------------------------------

def eight_positions(num_tokens: int) -> list[int]:
    """The positions of Figures 1b and 4, eight that are evenly spaced: T/8 - 1, 2T/8 - 1 ... T - 1."""
    return [max(num_tokens * i // 8, 1) - 1 for i in range(1, 9)]


def run_frozen(model: Transformer, tokens: np.ndarray, **wanted) -> Output:
    """What the model makes of codes (B, T) under the null class: the features or the attention `wanted`."""
    inputs = torch.from_numpy(tokens[:, :-1].astype(np.int64)).to(model.output.weight.device)
    null = torch.full_like(inputs[:, 0], model.config.num_classes)
    return model(inputs, null, head=False, **wanted)


@torch.no_grad()
def extract(model: Transformer, tokens: np.ndarray, layers: list[int], batch: int = 64) -> torch.Tensor:
    """Features of `layers` at eight positions, and their mean over all: float16 (N, 9 L, C), by layer.

    tokens (N, T) codes. One forward pass gives all layers and positions; blocks after the last layer asked
    for are not run.
    """
    positions = eight_positions(tokens.shape[1])
    features = torch.empty(len(tokens), 9 * len(layers), model.config.dim, dtype=torch.float16)
    for start in tokenizer.progress(range(0, len(tokens), batch), "features", leave=False):
        hidden = run_frozen(model, tokens[start:start + batch], layers=tuple(layers)).hidden
        parts = []
        for n in layers:
            parts += [hidden[n][:, positions], hidden[n].mean(1, keepdim=True)]
        features[start:start + batch] = torch.cat(parts, 1).clamp(-6e4, 6e4)  # float16 ends at 65,504
    return features


# ---- Linear probe ------------------------------------------------------------------------------------------

# MAE trains for 90 epochs. The problem is convex, and 20 reach the same accuracy: see test_all.py.
EPOCHS, BATCH = 20, 256
SETTINGS = [(rate, decay) for rate in (0.01, 0.03, 0.1) for decay in (0.0, 1e-3, 1e-2)]  # to choose from


class Probes(nn.Module):
    """G x H linear classifiers, each behind a BatchNorm without affine (MAE)."""

    def __init__(self, G: int, C: int, H: int, K: int):
        super().__init__()
        self.shape = (H, K)
        self.norm = nn.BatchNorm1d(G * C, eps=1e-6, affine=False)
        self.weight = nn.Parameter(torch.zeros(G, C, H * K))
        self.bias = nn.Parameter(torch.zeros(G, 1, H * K))

    def forward(self, x, labels):
        """features (B, G, C), labels (B,) -> logits (G, B, H, K) and the cross-entropy of each (G, B, H)."""
        x = self.norm(x.flatten(1)).view_as(x).transpose(0, 1)  # (G, B, C)
        logits = torch.baddbmm(self.bias, x, self.weight).unflatten(-1, self.shape)
        target = labels[:, None].expand(logits.shape[:3])
        loss = F.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none")
        return logits, loss.view_as(target)


def fit(features: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor, settings: torch.Tensor,
        num_classes: int, device) -> Probes:
    """Train G x H probes at once on `rows` of features (N, G, C) and labels (N,): SGD with momentum 0.9.

    settings (G, H, 2): learning rate, which falls to zero along half a cosine, and weight decay of each
    probe. The probes share their batches and nothing else, so that no number depends on which others are
    trained beside it.
    """
    (G, H, _), g = settings.shape, torch.Generator().manual_seed(0)
    probes = Probes(G, features.shape[2], H, num_classes).to(device)
    # one column for each class of each of the H settings
    rate, decay = settings.to(device).repeat_interleave(num_classes, 1)[:, None].unbind(-1)  # (G, 1, H K)
    weights = list(probes.parameters())
    speeds = [torch.zeros_like(w) for w in weights]
    batches = math.ceil(len(rows) / BATCH)
    for epoch in tokenizer.progress(range(EPOCHS), f"{G * H} probes", leave=False):
        order = rows[torch.randperm(len(rows), generator=g)]
        for i, chunk in enumerate(order.tensor_split(batches)):
            loss = probes(features[chunk].to(device).float(), labels[chunk].to(device))[1]
            # the mean over images, and the sum over probes, whose gradients do not depend on each other
            gradients = torch.autograd.grad(loss.sum() / len(chunk), weights)
            fall = 0.5 + 0.5 * math.cos(math.pi * (epoch + i / batches) / EPOCHS)
            for w, v, gradient in zip(weights, speeds, gradients):
                v.mul_(0.9).add_(gradient).add_(decay * w.detach())
                w.data.sub_(fall * rate * v)  # in place: autograd has no part in this
    return probes.eval()


@torch.no_grad()
def evaluate(probes: Probes, features: torch.Tensor,
             labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How many of N images each probe gets right, and its cross-entropy summed over them: (G, H) each."""
    device, correct, total = probes.weight.device, 0, 0
    for x, target in zip(features.split(BATCH), labels.split(BATCH)):
        target = target.to(device)
        logits, loss = probes(x.to(device).float(), target)
        correct += (logits.argmax(-1) == target[:, None]).sum(1)
        total += loss.sum(1)
    return correct.cpu(), total.cpu()


def linear_probe(train: torch.Tensor, labels: torch.Tensor, images: torch.Tensor, test: torch.Tensor,
                 test_labels: torch.Tensor, num_classes: int, device="cpu") -> list[dict]:
    """One result per feature: accuracy on `test`, its interval, and the settings chosen.

    train (N, G, C), labels (N,), images (N,): which image a row is a crop of; test (N', G, C), test_labels
    (N',). Learning rate and weight decay are chosen per feature on a tenth of the TRAINING images, with all
    their crops, by cross-entropy, which is less noisy than accuracy; then the probe is trained again on all
    of them. The test images are used once, at the end.
    """
    shuffled = images.unique()
    shuffled = shuffled[torch.randperm(len(shuffled), generator=torch.Generator().manual_seed(1))]
    aside = torch.isin(images, shuffled[:max(len(shuffled) // 10, 1)])
    settings = torch.tensor(SETTINGS)  # (H, 2)
    tried = fit(train, labels, (~aside).nonzero()[:, 0], settings.expand(train.shape[1], -1, 2), num_classes,
                device)
    _, losses = evaluate(tried, train[aside], labels[aside])  # (G, H)
    best = losses.argmin(1)  # (G,)
    final = fit(train, labels, torch.arange(len(train)), settings[best][:, None], num_classes, device)
    correct, _ = evaluate(final, test, test_labels)  # (G, 1)
    n = len(test)
    return [{"accuracy": count / n, "interval": wilson(count, n), "n": n, "learning_rate": SETTINGS[i][0],
             "weight_decay": SETTINGS[i][1]} for count, i in zip(correct[:, 0].tolist(), best)]


def wilson(correct: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n independent images."""
    z, p = 1.959964, correct / n
    middle, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


# ---- Attention ---------------------------------------------------------------------------------------------

@torch.no_grad()
def attention_maps(model: Transformer, tokens: np.ndarray, batch: int = 4) -> Iterator[torch.Tensor]:
    """Yield the attention of the next `batch` images, mean over heads: (B, L, T, T). tokens (N, T) codes."""
    for chunk in np.array_split(tokens, math.ceil(len(tokens) / batch)):
        out = run_frozen(model, chunk, layers=(model.config.n_layer,), return_attention=True)
        yield torch.stack([weights.mean(1) for weights in out.attention], 1).cpu()


def attention_numbers(weights: torch.Tensor, grid: int) -> dict[str, list[float]]:
    """Where attention (L, T, T) goes, per layer, mean over the queries 1 ... T - 1: Observation 1 as numbers.

    Shares, 1 in all: of the class token, of the query's own token, of its 8-neighbourhood without itself
    (four of the eight are in the past), of all others. "distance": between query and key on the token grid,
    in tokens, averaged over the attention that does not go to the class.
    LlamaGen: the class token's logit is always 0, so its share is 1 / (1 + sum exp(other logits)): it tells
    how far the others lie below 0, and nothing about the class.
    """
    cell = torch.arange(weights.shape[-1] - 1)  # the place on the grid of the token at position 1 + cell
    places = torch.stack([cell // grid, cell % grid], 1).float()  # (T - 1, 2)
    apart = (places[:, None] - places).abs()  # (T - 1, T - 1, 2), rows and columns between query and key
    reach = apart.amax(-1)  # 0: the same token, 1: a neighbour
    seen = weights[:, 1:, 1:]  # (L, T - 1, T - 1)

    shares = {kind: (seen * which).sum(-1).mean(1).tolist() for kind, which in
              (("itself", reach == 0), ("neighbours", reach == 1), ("elsewhere", reach > 1))}
    distance = (seen * apart.norm(dim=-1)).sum((1, 2)) / seen.sum((1, 2))
    return {"class": weights[:, 1:, 0].mean(1).tolist()} | shares | {"distance": distance.tolist()}


def even_distance(num_tokens: int) -> float:
    """The "distance" of `attention_numbers` if every query attended equally to all that it can see."""
    evenly = torch.ones(num_tokens, num_tokens).tril() / torch.arange(1, num_tokens + 1)[:, None]
    return attention_numbers(evenly[None], math.isqrt(num_tokens))["distance"][0]


# ---- Consistency -------------------------------------------------------------------------------------------

SHIFTS = (0, 1, 2, 4, 8)  # pixels


def crops_and_codes(subject: Subject, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seven crops of held-out images, uint8 (N, 7, S, S, 3), and their codes, int64 (N, 7, T).

    Crops 0 and 1: upper left and lower right of the ten crops, the two that are farthest apart and not
    mirrored. From 2 on: moved to the right by `SHIFTS`.
    """
    size = subject.held_out.meta["image_size"]

    def cut(image):
        wide = np.asarray(tokenizer.center_crop(image, size + max(SHIFTS)))
        top = max(SHIFTS) // 2
        moved = [wide[top:top + size, shift:shift + size] for shift in SHIFTS]
        return np.stack([*tokenizer.ten_crops(image, size, subject.ratio)[[0, 3]], *moved])

    pixels = np.stack(tokenizer.read_pixels(subject.images, rows.tolist(), cut))
    codes = tokenizer.encode_pixels(subject.vq, torch.from_numpy(pixels).flatten(0, 1))
    return pixels, codes.unflatten(0, (-1, 7)).numpy()


def consistency(features: torch.Tensor) -> dict[str, float]:
    """Mean cosine of features (N, 2, P, C) of two crops at P positions: Observations 2 and 3 as numbers.

    "steps": two positions of one crop; "crops": two crops at one position; "images": two images at one
    position. The last is what the others are to be compared with: all features share directions that say
    nothing about an image.
    """
    h = F.normalize(features.float(), dim=-1)
    N, _, P, _ = h.shape
    steps = torch.einsum("nvpc,nvqc->pq", h, h) / (2 * N)  # (P, P), ones on the diagonal
    images = torch.einsum("npc,mpc->nm", h[:, 0], h[:, 0]) / P  # (N, N), likewise
    return {"steps": (steps.sum().item() - P) / (P * (P - 1)),
            "crops": (h[:, 0] * h[:, 1]).sum(-1).mean().item(),
            "images": (images.sum().item() - N) / (N * (N - 1))}


# ---- Pictures ----------------------------------------------------------------------------------------------

BLUE = np.array([0, 114, 178])  # sample.COLOURS[0]


def draw_probe(subjects: list[Subject], results: dict[str, dict]) -> Image.Image:
    """Figures 1b and 4: accuracy by position at each model's depth, with 95 % bands; dashed: mean-pooled."""
    T, K = subjects[0].model.config.num_tokens, len(subjects[0].train.meta["classes"])
    steps = [p + 1 for p in eight_positions(T)]
    curves, pooled, bands = {}, {}, {}
    for subject in subjects:
        *at_steps, mean = [r for r in results[subject.name]["probe"] if r["layer"] == subject.depth]
        curves[subject.name] = [(r["step"], 100 * r["accuracy"]) for r in at_steps]
        bands[subject.name] = [50 * np.ptp(r["interval"]) for r in at_steps]  # half of the interval's width
        pooled[subject.name] = [(s, 100 * mean["accuracy"]) for s in steps]
    curves["chance"] = [(s, 100 / K) for s in steps]
    return sample.line_plot(curves, "dashed: mean-pooled, bands: 95 %", f"position of {T}, counted from 1",
                            "linear probe, top-1 %", bands, dashed=pooled)


def draw_distance(subjects: list[Subject], results: dict[str, dict]) -> Image.Image:
    """Attention distance by layer: Observation 1 as a plot."""
    curves = {name: list(enumerate(numbers["attention"]["distance"], 1)) for name, numbers in results.items()}
    even = even_distance(subjects[0].model.config.num_tokens)
    deepest = max(subject.model.config.n_layer for subject in subjects)
    curves["even"] = [(n, even) for n in range(1, deepest + 1)]
    return sample.line_plot(curves, "", "layer", "attention distance, tokens")


def draw_attention(subjects: list[Subject], rows: np.ndarray) -> Image.Image:
    """Figures 1a, 2, 5 and 7: where the current token looks, models side by side, by image and layer."""
    T, grid = subjects[0].model.config.num_tokens, subjects[0].model.config.grid
    positions = [max(T * i // 4, 2) - 1 for i in range(1, 5)]  # not position 0, which sees the class alone
    cells, labels = [], []
    for row in rows.tolist():
        image = tokenizer.center_crop(subjects[0].images.read(row), subjects[0].held_out.meta["image_size"])
        maps = [next(attention_maps(one.model, one.held_out.tokens[[row], 0]))[0] for one in subjects]
        for layers in zip(*(one.layers for one in subjects)):  # without the last ones of a deeper model
            line = []
            for (weights, n), p in product(zip(maps, layers), positions):
                seen = weights[n - 1, p, 1:]  # (T - 1,), without the class
                # key p stands at the place of its token, x_p; the last place has no key
                seen = F.pad(seen / seen.max().clamp_min(1e-12), (0, 1)).view(grid, grid)
                line.append(tinted(np.asarray(image), seen.numpy(), p - 1))  # x_p, the current token
            cells.append(line)
            labels.append("layer " + ", ".join(map(str, layers)))
    return montage(cells, labels, [one.name for one in subjects], [f"position {p + 1}" for p in positions],
                   "Attention of the current token (red)")


def draw_codes(subject: Subject, rows: np.ndarray, changed: dict[int, float]) -> Image.Image:
    """Figure 1c: which codes change when the crop moves by some pixels, and how many do on average."""
    pixels, codes = crops_and_codes(subject, rows)
    # crop 2 is the one that did not move
    moved = (codes != codes[:, 2:3]).reshape(*pixels.shape[:2], subject.model.config.grid, -1)  # (N, 7, g, g)
    cells = [[tinted(*pair) for pair in zip(*image)] for image in zip(pixels[:, 2:], moved[:, 2:])]
    columns = ["0 px"] + [f"{shift} px: {100 * share:.0f} %" for shift, share in changed.items()]
    return montage(cells, [""] * len(cells), [""], columns, "Codes that change (blue) when the crop moves")


def tinted(pixels: np.ndarray, weights: np.ndarray, current: int = -1) -> Image.Image:
    """An image (S, S, 3) in pale grey, blue where `weights` (g, g) in [0, 1] are high; `current` in red."""
    side = 144
    # from 90 to 255: pale, so that blue and red stand out
    grey = 90 + np.asarray(Image.fromarray(pixels).convert("L").resize((side, side)))[..., None] * (165 / 255)
    alpha = Image.fromarray((weights * 190).astype(np.uint8)).resize((side, side), Image.NEAREST)
    alpha = np.asarray(alpha)[..., None] / 255
    image = Image.fromarray((grey * (1 - alpha) + BLUE * alpha).astype(np.uint8))
    if current >= 0:
        y, x = (k * side / len(weights) for k in divmod(current, len(weights)))
        end = side / len(weights) - 1
        ImageDraw.Draw(image).rectangle([x, y, x + end, y + end], outline="red", width=max(int(end / 5), 2))
    return image


def montage(cells: list[list[Image.Image]], rows: list[str], panels: list[str], columns: list[str],
            title: str) -> Image.Image:
    """Rows of equal pictures in panels side by side, which have the same columns; with the names of all."""
    font, (w, h) = ImageFont.load_default(24), (side + 4 for side in cells[0][0].size)
    left = 24 + max(int(font.getlength(row)) for row in rows)
    width = max(left + len(cells[0]) * w, int(font.getlength(title)) + 30)
    image = Image.new("RGB", (width, 114 + len(rows) * h), "white")
    draw = ImageDraw.Draw(image)
    draw.text((10, 32), title, "black", font, anchor="ls")
    for i, column in enumerate(columns * len(panels)):
        draw.text((left + (i + 0.5) * w, 104), column, "black", font, anchor="ms")
    for i, panel in enumerate(panels):
        draw.text((left + i * len(columns) * w, 72), panel, "black", font, anchor="ls")
    for j, (row, line) in enumerate(zip(rows, cells)):
        draw.text((left - 10, 114 + (j + 0.5) * h), row, "black", font, anchor="rm")
        for i, picture in enumerate(line):
            image.paste(picture, (left + i * w, 114 + j * h))
    return image


# ---- Command line ------------------------------------------------------------------------------------------

def open_subject(path: Path, args: argparse.Namespace, device: torch.device) -> Subject:
    """A run folder or a checkpoint file, with its tokenizer, images and caches; missing caches are written.

    Raises FileNotFoundError or ValueError, in one sentence, for parts that are missing or do not fit
    together.
    """
    trained = sample.open_trained(path, args.vq, args.ema, args.image_size, device)
    model, vq, config = trained.model, trained.vq, trained.config
    depth = config.get("depth", model.config.n_layer // 2)
    layers = list(range(1, model.config.n_layer + 1)) if args.layers == "all" else [depth]

    data = config.get("data") if args.data is None else args.data
    subset = config.get("subset", "") if args.subset is None else args.subset
    if data is None:
        raise ValueError(f"{path} does not name its images; add --data.")
    if data == "" and args.data is None:  # Tiny ImageNet, as for train.py, but no other images instead
        data = tokenizer.TINY_IMAGENET[1]
        try:
            if not tokenizer.shipped(data).exists():
                tokenizer.download(*tokenizer.TINY_IMAGENET)
        except (ValueError, OSError) as error:
            raise ValueError(f"{path} was trained on Tiny ImageNet: put it at {data}, or name it with "
                             f"--data; {error}") from None
    size, ratios = model.config.grid * vq.config.downsample, tuple(config.get("crop_ratios", (1.1,)))
    root = args.cache or config.get("cache", "cache")
    images = tokenizer.open_images(data, "train", subset)
    if len(images.classes) < 2:
        raise ValueError(f"{data} has one class alone, so that a probe has nothing to tell apart.")
    for key, value in tokenizer.cache_meta(images, vq, size, ratios).items():
        known = trained.data.get(key, value)
        if value != known:
            raise ValueError(f"{path} was trained with {key} {str(known)[:40]}; {data} has "
                             f"{str(value)[:50]}: they do not fit.")
    train = tokenizer.token_cache(images, vq, size, ratios, root)
    images = tokenizer.open_images(data, "val", subset)
    held_out = tokenizer.token_cache(images, vq, size, (), root)
    origin = trained.origin | {"data": str(data), "subset": subset, "images_digest": train.meta["images"]}
    return Subject(trained.name, model, vq, depth, layers, train, held_out, images, ratios[0], origin)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line; values out of range are refused (SystemExit)."""
    within = tokenizer.within
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", type=Path, help="run folders or checkpoints (.pt), LlamaGen's too")
    add("--out", type=Path, default=Path("figures"), help="folder for the results")
    add("--layers", choices=["all"], help="probe all layers (default: the contrast depth alone)")
    add("--train-images", type=within(int, 0), default=10_000, help="to train the probe on; 0: all")
    add("--crops", type=within(int, 1), default=2, help="crops of each of these images, of ten or twenty")
    add("--images", type=within(int, 2), default=200, help="held-out images for all other numbers")
    add("--data", help="folder or zip of images (default: the run's)")
    add("--subset", help="file of class folders to keep, one a line; '': all (default: the run's)")
    add("--vq", help="tokenizer file (default: the run's)")
    add("--cache", help="folder for token caches (default: the run's)")
    add("--image-size", type=within(int, 16, 4096), default=256, help="of checkpoints that do not store it")
    add("--ema", action="store_true", help="the teacher's weights instead of the student's")
    add("--seed", type=within(int, 0, 2 ** 62), default=0, help="of the choice of images and crops")
    add("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is one)")
    return parser.parse_args(argv)


@tokenizer.enough_memory("lower --train-images, --crops or --images, or probe fewer --layers")
def main(argv: list[str] | None = None) -> None:
    """Parse the command line and run it.

    Raises ValueError or OSError, in one sentence, for a user's mistake.
    """
    args = parse_arguments(argv)
    tokenizer.check_output(args.out / "probe.json")
    device = tokenizer.choose_device(args.device)
    subjects = [open_subject(path, args, device) for path in args.runs]
    if tokenizer.rank_and_world()[0] > 0:
        return  # under torchrun all processes encode images; the first one does the rest
    first = subjects[0]
    for other, key in product(subjects[1:], ("images", "image_size", "shape")):
        a, b = first.held_out.meta[key], other.held_out.meta[key]
        if a != b:
            raise ValueError(f"{first.name} and {other.name} differ in their {key}, {a} and {b}: probe them "
                             "separately.")
    if len({subject.name for subject in subjects}) < len(subjects):
        raise ValueError("two runs have the same name; rename one folder, as legends show the names.")

    results = {subject.name: measure(subject, args) for subject in subjects}
    settings = vars(args) | {"epochs": EPOCHS, "batch": BATCH, "device": device.type}
    text = json.dumps({"settings": settings, "runs": results}, indent=1, default=str).encode()
    tokenizer.write_file(args.out / "probe.json", lambda file: file.write(text))

    three = choose(first.held_out, 3, args.seed)
    pictures = {"probe": draw_probe(subjects, results), "distance": draw_distance(subjects, results),
                "attention": draw_attention(subjects, three),
                "codes": draw_codes(first, three, results[first.name]["codes_changed"])}
    for name, picture in pictures.items():
        sample.save_image(args.out / f"{name}.png", picture)

    for subject in subjects:
        weights, probed = subject.origin["weights"], results[subject.name]["probe"]
        print(f"{subject.name}, {weights} weights: linear probe, top-1 %, at eight positions; mean-pooled")
        for n in subject.layers:
            *at_steps, mean = [f"{100 * r['accuracy']:.1f}" for r in probed if r["layer"] == n]
            print(f"  layer {n}: {' '.join(at_steps)}; {mean}")
    print(f"{args.out}: probe.json and " + ", ".join(f"{name}.png" for name in pictures))


if __name__ == "__main__":
    tokenizer.run_script(main, "The same command starts again.")
