"""Images in, tokens out: the VQ tokenizer, its training, the image reader and the token cache.

ST-AR (arXiv 2509.15185) models an image as a raster sequence of VQ codes x = q(I). This file is q and what
surrounds it: the VQ model (LlamaGen's, arXiv 2406.06525, and a small one in the same code), its training,
reading image sets, the ten crops that serve as views, and the cache of codes that train.py reads. The last
section before the command line holds what all scripts share: devices, processes and files.

    python tokenizer.py train --data shapes --image-size 32 --out tokenizer.pt

`--subset assets/tiny-imagenet-20.txt` keeps the class folders listed there, and so do the other scripts.
Shapes in comments: N images, B batch, V crops of an image, S side in pixels, h x w the code grid, T = h w
tokens, D code size.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import posixpath
import re
import shutil
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError
from torch import nn
from tqdm import tqdm

# ---- The VQ model: LlamaGen's structure and parameter names (vq_model.py) ----------------------------------

@dataclass(frozen=True)
class VQConfig:
    """Structure of a tokenizer; the defaults are LlamaGen's vq_ds16."""
    codebook_size: int = 16384
    codebook_dim: int = 8
    ch: int = 128  # channels at full resolution
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # per level; each level but the last halves the side
    res_blocks: int = 2  # per encoder level; a decoder level has one more
    z_channels: int = 256
    groups: int = 32  # of the GroupNorms
    attention: bool = True  # at the last level and in the middle

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.ch_mult) - 1)

VQ_DS4 = VQConfig(codebook_size=1024, ch=16, ch_mult=(1, 2, 4), res_blocks=1, z_channels=64, groups=8,
                  attention=False)  # convolutions alone, so that one training serves every image size


def check_image_size(size: int, config: VQConfig) -> None:
    """Raise ValueError for a side in pixels that does not give whole codes."""
    if size % config.downsample:
        raise ValueError(f"image size {size} is no multiple of the tokenizer's factor {config.downsample}.")


class ResnetBlock(nn.Module):
    """Two normalised convolutions beside a shortcut, (B, cin, h, w) -> (B, cout, h, w)."""

    def __init__(self, cin: int, cout: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)  # our choice: start as the identity, which gains .5 dB in 300 steps
        self.nin_shortcut = nn.Conv2d(cin, cout, 1) if cin != cout else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class AttnBlock(nn.Module):
    """Single-head self-attention over the h w places."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # each (B, c, hw)
        weights = torch.softmax(q.mT @ k * q.shape[1] ** -0.5, dim=-1)  # (B, hw of q, hw of k)
        return x + self.proj_out((v @ weights.mT).view_as(x))


class Downsample(nn.Module):
    """(B, c, h, w) -> (B, c, h / 2, w / 2)."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # LlamaGen: zeros right and below only


class Upsample(nn.Module):
    """(B, c, h, w) -> (B, c, 2 h, 2 w)."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, then a change of resolution where there is one."""

    def __init__(self, cin: int, cout: int, blocks: int, attention: bool, groups: int):
        super().__init__()
        self.res = nn.ModuleList(ResnetBlock(cin if i == 0 else cout, cout, groups) for i in range(blocks))
        self.attn = nn.ModuleList(AttnBlock(cout, groups) for _ in range(blocks if attention else 0))
        self.downsample = self.upsample = nn.Identity()  # Encoder and Decoder put theirs in these places

    def forward(self, x):
        for i, block in enumerate(self.res):
            x = block(x)
            if self.attn:
                x = self.attn[i](x)
        return self.upsample(self.downsample(x))


def _middle(c: int, config: VQConfig) -> nn.ModuleList:
    attention = [AttnBlock(c, config.groups)] if config.attention else []
    return nn.ModuleList([ResnetBlock(c, c, config.groups), *attention, ResnetBlock(c, c, config.groups)])


class Encoder(nn.Module):
    """float (B, 3, S, S) -> (B, z_channels, h, w)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            cin = config.ch if i == 0 else widths[i - 1]
            level = Level(cin, width, config.res_blocks, config.attention and i == last, config.groups)
            if i != last:
                level.downsample = Downsample(width)
            self.conv_blocks.append(level)
        self.mid = _middle(widths[-1], config)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in (*self.conv_blocks, *self.mid):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, z_channels, h, w) -> float (B, 3, S, S), about [-1, 1]."""

    def __init__(self, config: VQConfig):
        super().__init__()
        widths = [config.ch * m for m in reversed(config.ch_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.z_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], config)
        self.conv_blocks = nn.ModuleList()
        for i, width in enumerate(widths):
            cin = widths[max(i - 1, 0)]
            level = Level(cin, width, config.res_blocks + 1, config.attention and i == 0, config.groups)
            if i != last:
                level.upsample = Upsample(width)
            self.conv_blocks.append(level)
        self.norm_out = nn.GroupNorm(config.groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.conv_in(z)
        for block in (*self.mid, *self.conv_blocks):
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class VectorQuantizer(nn.Module):
    """The nearest of n codes on the unit sphere (LlamaGen: latents, codes normalised at every use)."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)
        self.embedding.weight.data = F.normalize(self.embedding.weight.data, dim=-1)
        self.register_buffer("codebook_used", torch.zeros(65536))  # in LlamaGen's files; not read here

    def codebook(self) -> torch.Tensor:
        """(n, D), unit rows."""
        return F.normalize(self.embedding.weight, dim=-1)

    @staticmethod
    def nearest(z: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """For each row of z (M, D) the index of the nearest of codes (n, D), int64 (M,).

        |z|^2 + |e|^2 - 2 z e. Both norms are 1 and could be left out. They are kept so that rounding, and
        with it the choice between equally near codes, is LlamaGen's.
        """
        norms = (codes ** 2).sum(1)
        # On a CPU a piece of the distances fits into the processor's cache; a GPU takes larger pieces
        rows = max(2 ** 19 // len(codes), 1) if z.device.type == "cpu" else 2 ** 16
        return torch.cat([((part ** 2).sum(1, keepdim=True) + norms - 2 * part @ codes.T).min(1).indices
                          for part in z.split(rows)])

    def forward(self, z):
        """(B, D, h, w) -> quantised latents (B, D, h, w), straight-through; indices (B, T); loss.

        LlamaGen: loss = mean (z_q - sg z)^2 + 0.25 mean (sg z_q - z)^2, the second being the commitment.
        """
        z = F.normalize(z.movedim(1, -1), dim=-1)  # (B, h, w, D)
        codes = self.codebook()
        indices = self.nearest(z.detach().flatten(0, 2), codes.detach()).view(z.shape[:-1])
        z_q = F.embedding(indices, codes)  # (B, h, w, D)
        loss = F.mse_loss(z_q, z.detach()) + 0.25 * F.mse_loss(z, z_q.detach())
        z_q = z + (z_q - z).detach()
        return z_q.movedim(-1, 1), indices.flatten(1), loss

    @torch.no_grad()
    def restart(self, dead: torch.Tensor, latents: torch.Tensor) -> None:
        """Move the codes marked in `dead` (n,) bool onto random ones of `latents` (M, D)."""
        chosen = torch.randint(len(latents), (int(dead.sum()),), device=latents.device)
        self.embedding.weight[dead] = F.normalize(latents[chosen], dim=-1)


class VQModel(nn.Module):
    """LlamaGen's image tokenizer: encoder, quantizer, decoder."""

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder, self.quantize = Encoder(config), Decoder(config), VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.z_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.z_channels, 1)

    def latents(self, x: torch.Tensor) -> torch.Tensor:
        """float (B, 3, S, S) in [-1, 1] -> what is quantised, (B, D, h, w)."""
        return self.quant_conv(self.encoder(x))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """float (B, 3, S, S) in [-1, 1] -> codes (B, T) int64, raster order."""
        return self.quantize(self.latents(x))[1]

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """codes (B, T) of a square grid -> float (B, 3, S, S), about [-1, 1]."""
        side = math.isqrt(codes.shape[1])
        z_q = self.quantize.codebook()[codes].unflatten(1, (side, side))  # (B, h, w, D)
        return self.decoder(self.post_quant_conv(z_q.movedim(-1, 1)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """float (B, 3, S, S) -> reconstruction of the same shape, codes (B, T), codebook loss."""
        z_q, indices, loss = self.quantize(self.latents(x))
        return self.decoder(self.post_quant_conv(z_q)), indices, loss


def save_tokenizer(path: str | Path, vq: VQModel) -> None:
    """Write the tokenizer and its config to `path`."""
    content = {"model": vq.state_dict(), "vq_config": asdict(vq.config)}
    write_file(path, lambda file: torch.save(content, file))


def load_tokenizer(path: str | Path, device="cpu") -> VQModel:
    """A tokenizer in eval mode from our own file or from LlamaGen's published vq_ds16_c2i.pt, strictly.

    Raises FileNotFoundError or ValueError, in one sentence, if `path` is no such file.
    """
    path = shipped(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}; name a file, such as a run's tokenizer.pt, or "
                                "train one: python tokenizer.py train")
    content = read_weights(path)
    state = find_weights(content, "quantize.embedding.weight")
    if not state:
        found = "a transformer" if find_weights(content, "tok_embeddings.weight") else "something else"
        raise ValueError(f"{path} holds {found}; expected a VQ tokenizer, such as vq_ds16_c2i.pt.")
    check_finite(path, state)
    with reading(path, "tokenizer of the structure that it names, else of vq_ds16"):
        codes, D = state["quantize.embedding.weight"].shape
        vq = VQModel(VQConfig(**content.get("vq_config", dict(codebook_size=codes, codebook_dim=D))))
        vq.load_state_dict(state)
    return vq.eval().requires_grad_(False).to(device)


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch TF32 off on a GPU: with its 10 bits, latents between two codes would get the other one."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


AT_A_TIME = 2 ** 20  # pixels that go through the tokenizer together


def in_pieces(vq: VQModel, pixels: torch.Tensor, function: Callable) -> torch.Tensor:
    """Apply `function` to pixels uint8 (N, S, S, 3), some at a time, as float (B, 3, S, S) where `vq` is.

    Returns the results, joined, on the CPU. They are computed in full float32, with one exception: for
    LlamaGen's vq_ds16 a GPU may use TF32 in convolutions, as in LlamaGen's own extractor, because it is
    several times as fast.
    """
    device = next(vq.parameters()).device
    chunks = pixels.split(max(AT_A_TIME // pixels.shape[1] ** 2, 1))
    with torch.no_grad(), nullcontext() if vq.config == VQConfig() else full_precision():
        return torch.cat([function(to_float(chunk.to(device))).cpu() for chunk in chunks])


def encode_pixels(vq: VQModel, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (N, S, S, 3) -> codes (N, T) int64, on the CPU."""
    return in_pieces(vq, pixels, vq.encode)


def reconstruct(vq: VQModel, pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (N, S, S, 3) -> what its codes keep of it, the same shape, on the CPU."""
    return in_pieces(vq, pixels, lambda x: to_uint8(vq.decode(vq.encode(x))))


# ---- Training the tokenizer --------------------------------------------------------------------------------

class Perceptual(nn.Module):
    """Judges what looks alike: float (B, 3, S, S) in [-1, 1] -> features of four stages, class logits (B, K).

    A small VGG that first learns the images' classes and is then frozen. our choice: it stands in for LPIPS
    (arXiv 1801.03924) in LlamaGen's recipe, whose VGG comes with weights that we do not have. It shares
    neither structure nor weights with fid.py's classifier: a tokenizer must not be trained on what it is
    measured by.
    """

    def __init__(self, classes: int):
        def convolution(cin, cout, stride):
            return [nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]

        super().__init__()
        self.stages = nn.ModuleList([nn.Sequential(*convolution(3, 32, 1))])
        for width in (64, 128, 256):
            halve, refine = convolution(width // 2, width, 2), convolution(width, width, 1)
            self.stages.append(nn.Sequential(*halve, *refine))
        self.head = nn.Linear(256, classes)

    def forward(self, x):
        features = []
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features, self.head(x.mean((2, 3)))


def perceptual_loss(net: Perceptual, reconstruction: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """How different two images (B, 3, S, S) look to a frozen `net`, in [0, 2]: LPIPS without learned weights.

    The squared distance of feature vectors of unit length, averaged over places, then over the stages.
    """
    with torch.no_grad():
        targets = net(x)[0]
    distances = [(F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(1).mean()
                 for a, b in zip(net(reconstruction)[0], targets)]
    return torch.stack(distances).mean()


class Crops:
    """Random crops and flips of at most 100,000 images, which stay in the memory of `device`."""

    def __init__(self, images: ImageSet, size: int, seed: int, device):
        self.rng = np.random.default_rng(seed)
        self.size, self.side = size, int(size * 1.1)  # a tenth larger, so that crops can move
        chosen, pixels = self.rng.permutation(len(images))[:100_000], []
        for rows in progress(np.array_split(chosen, len(chosen) // 1000 + 1), "reading images", leave=False):
            pixels += read_pixels(images, rows, lambda image: np.asarray(center_crop(image, self.side)))
        if images.unreadable and rank_and_world()[0] == 0:
            print(f"!! {len(images.unreadable):,} of {len(images):,} {images.split} images are left out: "
                  f"{' '.join(images.unreadable[:3])}")
        kept = [i for i, p in enumerate(pixels) if p is not None]
        self.pixels = torch.from_numpy(np.stack([pixels[i] for i in kept])).to(device)  # (N, side, side, 3)
        self.labels = torch.from_numpy(images.labels[chosen[kept]]).to(device)  # (N,)

    def draw(self, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """float (B, 3, S, S) in [-1, 1], all cut at one random place and all flipped or none; labels (B,)."""
        rows = torch.from_numpy(self.rng.integers(len(self.pixels), size=batch)).to(self.pixels.device)
        (y, x), flip = self.rng.integers(self.side - self.size + 1, size=2), self.rng.integers(2)
        crop = self.pixels[:, y:y + self.size, x:x + self.size][rows]
        crop = to_float(crop.flip(2) if flip else crop)
        return crop.contiguous(memory_format=torch.channels_last), self.labels[rows]


def train_perceptual(crops: Crops, classes: int, steps: int, batch: int = 64) -> Perceptual:
    """Teach a `Perceptual` the classes of `crops`: SGD with one cycle, cross-entropy with label smoothing."""
    net = Perceptual(classes).to(crops.pixels.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.2)
    for _ in progress(range(steps), "learning what looks alike"):
        x, labels = crops.draw(batch)
        loss = F.cross_entropy(net(x)[1], labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def train_tokenizer(images: ImageSet, size: int, config: VQConfig = VQ_DS4, steps: int = 1000,
                    batch: int = 32, lr: float = 2e-3, seed: int = 0, device="cpu") -> VQModel:
    """Train a tokenizer on random (size, size) crops and flips of `images`, at most 100,000 of them.

    Loss: mean squared error + codebook and commitment loss + `perceptual_loss`, whose net is trained first,
    for half as many steps: LlamaGen's recipe without its adversarial part (see docs/tokenizer.md).
    Adam, warm-up over 5 % of the steps, cosine to zero. Codes that go unused are restarted on latents of the
    current batch during the first three quarters. Raises ValueError for a size the codes do not divide.
    """
    check_image_size(size, config)
    torch.manual_seed(seed)
    crops = Crops(images, size, seed, device)
    net = train_perceptual(crops, len(images.classes), max(steps // 2, 10))
    vq = VQModel(config).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(vq.parameters(), lr=lr, betas=(0.9, 0.95))
    used = torch.zeros(config.codebook_size, dtype=torch.bool, device=device)  # since the last restart
    for step in (bar := progress(range(steps), "training tokenizer")):
        x, _ = crops.draw(batch)
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        optimizer.param_groups[0]["lr"] = lr * min((step + 1) / (0.05 * steps), cosine)
        reconstruction, codes, codebook_loss = vq(x)
        loss = F.mse_loss(reconstruction, x) + codebook_loss + perceptual_loss(net, reconstruction, x)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        used[codes.flatten()] = True
        if step % 25 == 0 and step < 0.75 * steps:  # at step 0, too: so codes start where the data are
            with torch.no_grad():
                vq.quantize.restart(~used, vq.latents(x).movedim(1, -1).flatten(0, 2))
            used.zero_()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    return vq.eval().requires_grad_(False)


def evaluate_tokenizer(vq: VQModel, pixels: torch.Tensor) -> dict[str, float]:
    """On uint8 (N, S, S, 3): PSNR in dB, averaged over images; share of codes used; perplexity exp(H)."""
    def mean_squares(x):  # (B, 3, S, S) -> (B,), of errors in [0, 1]
        return ((vq.decode(vq.encode(x)).clamp(-1, 1) - x) / 2).square().flatten(1).mean(1)

    psnr = -10 * in_pieces(vq, pixels, mean_squares).log10()  # (N,)
    counts = torch.bincount(encode_pixels(vq, pixels).flatten(), minlength=vq.config.codebook_size)
    p = counts / counts.sum()
    entropy = -torch.xlogy(p, p).sum()  # nats
    return {"psnr": psnr.mean().item(), "usage": (p > 0).float().mean().item(),
            "perplexity": entropy.exp().item()}


def held_out_pixels(images: ImageSet, size: int, count: int) -> torch.Tensor:
    """Centre crops of `count` evenly spaced images, uint8 (N, S, S, 3). Raises what `read_pixels` raises."""
    rows = np.linspace(0, len(images) - 1, min(count, len(images))).astype(int)
    pixels = read_pixels(images, rows, lambda image: np.asarray(center_crop(image, size)))
    return torch.from_numpy(np.stack([p for p in pixels if p is not None]))


def find_tokenizer(settings, images: ImageSet, device) -> Path:
    """The file that train.py's `settings` ask for: "shipped", "train" (now, if it was not yet) or a file."""
    if settings.tokenizer == "shipped":  # docs/tokenizer.md says how they were trained
        print("Tokenizer: the shipped one, trained at 32 px; --tokenizer train makes one for these images.")
        return Path("assets", "tokenizer-shapes.pt" if images.source == "shapes" else "tokenizer-32px.pt")
    if settings.tokenizer != "train":
        return Path(settings.tokenizer)
    config = replace(VQ_DS4, codebook_size=settings.codes)
    size, steps = settings.image_size, settings.tokenizer_steps
    # "perceptual" names the recipe of `train_tokenizer`; another recipe needs another word
    key = digest(["perceptual", images.fingerprint, size, steps, asdict(config)])[:8]
    path = Path(settings.cache) / f"tokenizer-{Path(images.source).stem}-{size}px-{key}.pt"
    if not path.exists():
        save_tokenizer(path, train_tokenizer(images, size, config, steps, device=device))
    return path


# ---- Images in: folders, zips and the built-in shapes behind one reader ------------------------------------

IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")  # others stay closed: EPS runs Ghostscript
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff")
VALIDATION = ("val", "valid", "validation", "dev", "eval", "test", "testing")  # the first that is there
# in trainA and test_set, but not in valley
SPLIT = re.compile("(?<![a-zA-Z])(?i:train(ing)?|val(id|idation)?|test(ing)?|dev|eval)(set)?(?![a-z])")


@dataclass(frozen=True)
class ImageSet:
    """One split of an image set: names and labels in memory, pixels decoded on demand by `read`."""
    source: str  # what the user named: a path, or "shapes"
    split: str  # "train" or "val"
    names: list[str]  # N file names inside the source
    labels: np.ndarray  # (N,) int64, indices into `classes`
    classes: list[str]  # class names in label order
    fingerprint: str  # 16 hex digits over names and sizes of the files, a zip's checksums, and labels
    read: Callable[[int], Image.Image]  # i -> RGB image; raises ValueError naming a file it cannot decode
    summary: str = ""  # what was found, for people
    unreadable: list[str] = field(default_factory=list)  # a sentence for each image that could not be read

    def __len__(self) -> int:
        return len(self.names)


def open_images(source: str | Path, split: str = "train", subset: str | Path = "") -> ImageSet:
    """Open the "train" or "val" split of a folder, of a zip (read in place), or of the built-in set "shapes".

    Layouts, in the order tried: Tiny ImageNet (val/val_annotations.txt), ImageNet (train/<class>/* and, if
    present, val/<class>/*; other usual names of the two will do), plain class folders (<class>/*). Where
    there are no validation images a fixed tenth of each class, at most 50 images, is held out. `subset` is a
    text file that lists the class folders to keep, one per line. The topmost folder is the class, and classes
    are numbered by sorted folder name, as in torchvision.
    Raises FileNotFoundError, OSError or ValueError, in one sentence, if nothing usable is there.
    """
    if not str(source):
        raise ValueError("--data is empty (a variable that is not set?); name a folder, a zip, or: shapes.")
    if str(source) == "shapes":
        if subset:
            raise ValueError("the built-in shapes have no class folders to choose from; leave --subset out.")
        return _shapes(split)
    files, read_bytes = list_files(shipped(source))
    images = [name for name in sorted(files) if is_image(name)]

    def table(name):  # the lines of a text file, split at tabs
        lines = read_bytes(name).decode(errors="replace").splitlines() if name in files else []
        return [line.split("\t") for line in lines if "\t" in line]

    annotations = {f"val/images/{row[0]}": row[1] for row in table("val/val_annotations.txt")}
    training, validation = _by_class(source, images, annotations)
    if len(training) < 2:
        raise ValueError(f"{source} holds {len(images)} image(s), {len(training)} in class folders; at least "
                         "2 are needed, laid out as <class>/*.jpg or train/<class>/*.jpg.")
    chosen_by = ""
    if subset:
        chosen_by = f" (of {len(set(training.values())):,}: those in {subset})"
        text = shipped(subset).read_text("utf-8-sig", "replace")  # some editors begin with an invisible mark
        kept = {line.strip() for line in text.splitlines()} - {""}
        if unknown := sorted(kept - set(training.values())):
            raise ValueError(f"the subset {subset} lists {unknown[0]!r}, of which {source} has no images.")
        if not kept:
            raise ValueError(f"the subset {subset} lists no class folder.")
        training, validation = ({name: folder for name, folder in part.items() if folder in kept}
                                for part in (training, validation))
    if not validation:
        validation = _hold_out(training)
        training = {name: folder for name, folder in training.items() if name not in validation}
    if not validation:
        raise ValueError(f"{source} has one image of each class, so that none can be held out; add images.")

    folders = sorted(set(training.values()))
    if unknown := sorted(set(validation.values()) - set(folders)):
        raise ValueError(f"{source} has validation images of class {unknown[0]!r}, but no training images of "
                         "it; name both alike, or move the validation images away.")
    chosen = training if split == "train" else validation
    names = sorted(chosen)
    titles = {row[0]: row[1].split(",")[0] for row in table("words.txt")}
    classes = [titles.get(folder) or folder for folder in folders]
    number = {folder: i for i, folder in enumerate(folders)}
    labels = np.array([number[chosen[name]] for name in names], dtype=np.int64)
    others = len(files.keys() - training.keys() - validation.keys())
    summary = (f"{source}: {len(training):,} training and {len(validation):,} held-out images of "
               f"{len(classes):,} classes{chosen_by}; {others:,} other files left out")
    return ImageSet(str(source), split, names, labels, classes,
                    digest([(name, *files[name], int(label)) for name, label in zip(names, labels)]),
                    lambda i: decode_image(read_bytes(names[i]), f"{source}/{names[i]}"), summary)


def is_image(name: str) -> bool:
    """Whether a file of this name should hold an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def _by_class(source, images: list[str], annotations: dict[str, str]) -> tuple[dict, dict]:
    """{image: class folder} of the training images, and of the validation images if there are any.

    Raises ValueError where a split would be taken for a class, or where validation images would be passed
    over in silence because they do not lie in class folders.
    """
    tops = {}  # {folder: the images below it}
    for name in images:
        if "/" in name:
            tops.setdefault(name.partition("/")[0], []).append(name)
    splits = {top.lower(): top for top in tops}  # how val is spelt here: val, Val, VAL

    if len(tops) == 1 and any("/" not in name for name in images):
        raise ValueError(f"{source} has images beside the folder {min(tops)}/; name that folder instead, or "
                         "move them away.")

    def by_class(split):
        found = {}
        for name in tops.get(split, []):
            folders = [folder for folder in name.split("/")[1:-1] if folder not in ("images", split)]
            if folders:
                found[name] = folders[0]
        return found

    training = by_class(splits.get("train")) or by_class(splits.get("training"))
    if not training:  # plain class folders
        # for each image the folders around it that are called like a split, such as trainA or test_set
        alike = [[*filter(SPLIT.search, name.split("/")[:-1])] for name in images]
        if 2 * sum(map(bool, alike)) > len(images) or splits.keys() & {*VALIDATION}:
            told = " and ".join(sorted({folders[0] for folders in alike if folders}))
            raise ValueError(f"{source} has {told} where class folders are expected; name the folder that "
                             "holds the images as train/<class>/*.jpg and val/<class>/*.jpg, or as "
                             "<class>/*.jpg, or lay them out so.")
        return {name: top for top, names in tops.items() for name in names}, {}
    # The annotations may still be there although somebody has sorted the images into class folders
    if annotated := annotations.keys() & set(images):
        if missing := sorted(annotations.keys() - annotated):
            raise ValueError(f"{source} lists {missing[0]!r} in its annotations but does not hold it.")
        return training, annotations
    for top in filter(None, map(splits.get, VALIDATION)):
        validation = by_class(top)
        if flat := len(tops[top]) - len(validation):
            raise ValueError(f"{source} has {flat:,} images in {top}/ outside of class folders; sort them "
                             f"into {top}/<class>/, or move {top}/ away: a tenth of the training images is "
                             "then held out.")
        return training, validation
    return training, {}


def list_files(path: Path) -> tuple[dict[str, tuple[int, int | None]], Callable[[str], bytes]]:
    """{posix name: (size in bytes, CRC-32)} of the files in a folder or zip, and a function that reads one.

    A zip knows its CRCs; those of a folder are None. Folders around everything are left out of the names;
    hidden files and __MACOSX are left out altogether.
    Raises FileNotFoundError, OSError or ValueError, as does the function, for what cannot be read.
    """
    def fail(error):  # without it os.walk skips a folder that it may not read, and says nothing
        raise error

    files, archive = {}, None
    if path.is_dir():
        for folder, folders, names in os.walk(path, onerror=fail, followlinks=True):
            folders[:] = [name for name in folders if not _hidden(name)]  # the others are not entered
            inside = os.path.relpath(folder, path).replace(os.sep, "/")
            for name in names:
                if not _hidden(name):
                    size = os.path.getsize(os.path.join(folder, name))
                    files[f"{inside}/{name}".removeprefix("./")] = size, None
    elif path.is_file():
        with reading(path, "complete zip of images (other archives have to be unpacked)"):
            archive = zipfile.ZipFile(path)
        for info in archive.infolist():
            if not info.is_dir() and not _hidden(info.filename):
                files[info.filename] = info.file_size, info.CRC
    else:
        raise FileNotFoundError(f"{path} does not exist; name a folder or a zip of images, or shapes.")
    # What stands above all class folders, such as the one folder that a zip holds, is no part of the names
    above = [posixpath.dirname(posixpath.dirname(name)) for name in files if is_image(name)]
    top = posixpath.join(posixpath.commonpath(above or [""]), "")

    def read(name):
        with reading(f"{path}/{name}", "readable file"):
            return archive.read(top + name) if archive else (path / (top + name)).read_bytes()

    return {name[len(top):]: mark for name, mark in files.items() if name.startswith(top)}, read


def _hidden(name: str) -> bool:
    """Whether a file is left out: hidden ones, such as .ipynb_checkpoints, and __MACOSX."""
    return any(part.startswith(".") and part != "." or part == "__MACOSX" for part in name.split("/"))


def _hold_out(training: dict[str, str]) -> dict[str, str]:
    """A fixed tenth of each class, at most 50 images, at least 1 where a class has two."""
    names_of: dict[str, list[str]] = {}
    for name in sorted(training):
        names_of.setdefault(training[name], []).append(name)
    rng = np.random.default_rng(0)
    return {name: folder for folder, names in sorted(names_of.items())
            for name in rng.permutation(names)[:min(50, max(len(names) // 10, 1))].tolist() if len(names) > 1}


def decode_image(data: bytes, name: str) -> Image.Image:
    """The RGB image that a file of this name holds, upright; 16-bit grey keeps its upper 8 bits.

    Raises ValueError, in one sentence, if it holds none, or floating-point numbers.
    """
    with reading(name, "readable image"):
        try:
            image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        except UnidentifiedImageError:
            raise ValueError(f"none of {', '.join(IMAGE_FORMATS)}") from None
        with suppress(Exception):  # a broken EXIF block is ignored; broken pixels are found below
            ImageOps.exif_transpose(image, in_place=True)  # LlamaGen leaves photographs on their side
        if image.mode == "F":
            raise ValueError("numbers of unknown range")
        if image.mode.startswith("I"):
            image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


def _outlines() -> dict[str, list[np.ndarray]]:
    """Class name -> outlines in the unit disc, (points, 2); a second outline is a hole in the first."""
    t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    circle = np.stack([np.cos(t), np.sin(t)], 1)
    heart = np.stack([16 * np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t))], 1) / 17
    star = circle[::6] * np.where(np.arange(10) % 2, 0.42, 1)[:, None]
    cross = np.array([(-.3, -1), (.3, -1), (.3, -.3), (1, -.3), (1, .3), (.3, .3)])
    arrow = np.array([(0, -1), (.8, 0), (.3, 0), (.3, 1), (-.3, 1), (-.3, 0), (-.8, 0)])
    return {"circle": [circle], "ring": [circle, circle * 0.55],
            "crescent": [circle, circle * 0.8 + (0.4, 0)],
            "half disc": [circle[:31] - (0, 0.4)], "triangle": [circle[5::20]], "square": [circle[7::15]],
            "hexagon": [circle[::10]], "star": [star], "cross": [np.concatenate([cross, -cross])],
            "heart": [heart], "arrow": [arrow], "bar": [np.array([(-1, -.3), (1, -.3), (1, .3), (-1, .3)])]}


_SHAPES = _outlines()
_PALETTE = [(213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (240, 228, 66), (240, 240, 240)]


def draw_shape(label: int, seed: tuple[int, ...], size: int = 64) -> Image.Image:
    """One image of the built-in set: shape `label` (0 ... 11) at a random place, size, tilt and colour.

    A function of its arguments alone. Colours are drawn independently of the class, from one small palette.
    """
    rng = np.random.default_rng(seed)
    scale, tilt = rng.uniform(0.22, 0.36), rng.uniform(-0.45, 0.45)
    centre = rng.uniform(0.36, 0.64, size=2)
    turn = np.array([[math.cos(tilt), math.sin(tilt)], [-math.sin(tilt), math.cos(tilt)]])
    foreground = _PALETTE[rng.integers(len(_PALETTE))]
    dark, light = rng.integers(20, 70, size=3), rng.integers(60, 120, size=3)
    ramp = np.linspace(0, 1, 4 * size)[:, None, None]
    background = np.broadcast_to((1 - ramp) * dark + ramp * light, (4 * size, 4 * size, 3)).astype(np.uint8)
    mask = Image.new("L", (4 * size, 4 * size))
    for fill, outline in zip((255, 0), _SHAPES[list(_SHAPES)[label]]):
        points = (outline @ turn * scale + centre) * 4 * size
        ImageDraw.Draw(mask).polygon([tuple(point) for point in points.tolist()], fill=fill)
    image = Image.composite(Image.new("RGB", mask.size, foreground), Image.fromarray(background), mask)
    return image.resize((size, size), Image.BOX)  # drawn at four times the size: smooth edges


def _shapes(split: str) -> ImageSet:
    count, code = {"train": (4800, 0), "val": (600, 1)}[split]
    labels = np.arange(count, dtype=np.int64) % len(_SHAPES)
    return ImageSet("shapes", split, [f"{split}/{i:05d}" for i in range(count)], labels, list(_SHAPES),
                    digest(["shapes", 1, split, count]), lambda i: draw_shape(int(labels[i]), (code, i)),
                    f"shapes: 4,800 training and 600 held-out images of {len(_SHAPES)} classes, drawn here")


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """Resize so that the shorter side is `size`, then cut the central square, as ADM and LlamaGen do."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def ten_crops(image: Image.Image, size: int, ratio: float) -> np.ndarray:
    """The ten crops LlamaGen tokenises: corners and centre of the image, then the same five of its mirror.

    The image is first centre-cropped to int(size * ratio) pixels. Returns uint8 (10, S, S, 3).
    """
    side = int(size * ratio)
    pixels = np.asarray(center_crop(image, side))
    far, mid = side - size, round((side - size) / 2)  # round half to even, as torchvision's TenCrop does
    corners = [(0, 0), (0, far), (far, 0), (far, far), (mid, mid)]
    return np.stack([p[y:y + size, x:x + size] for p in (pixels, pixels[:, ::-1]) for y, x in corners])


def all_crops(image: Image.Image, size: int, ratios: tuple[float, ...]) -> np.ndarray:
    """uint8 (V, S, S, 3): ten crops for each of `ratios`; the centre crop alone if there are none."""
    if not ratios:
        return np.asarray(center_crop(image, size))[None]
    return np.concatenate([ten_crops(image, size, ratio) for ratio in ratios])


def read_pixels(images: ImageSet, rows: Iterable[int], transform: Callable) -> list[np.ndarray | None]:
    """[transform(image i) for i in rows], read in threads; None stands for an image that cannot be read.

    Raises ValueError, naming one image, as soon as more than 1 % of all `images` cannot be read.
    """
    def read(i):
        try:
            image = images.read(i)
        except ValueError as error:
            if str(error) not in images.unreadable:
                images.unreadable.append(str(error))
            if 100 * len(images.unreadable) > len(images):
                raise ValueError(f"more than 1 % of the {len(images):,} images cannot be read: "
                                 f"{images.unreadable[0]}") from None
            return None
        return transform(image)

    with ThreadPoolExecutor() as pool:  # Pillow decodes and resizes outside Python's lock
        return list(pool.map(read, rows))


def to_float(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) in [-1, 1]."""
    return pixels.movedim(-1, 1).float() / 127.5 - 1


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """float (B, 3, S, S) in [-1, 1] -> uint8 (B, S, S, 3), truncated as LlamaGen's sampler does."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).movedim(1, -1)


TINY_IMAGENET = ("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "data/tiny-imagenet-200.zip",
                 248_100_043, "md5:90528d7ca1a48142e341f4ef8d21d0de")  # as `download` takes them


def find_images(data: str) -> str:
    """`data` if it is given, else Tiny ImageNet in data/, downloaded if need be, else the built-in "shapes".

    The shapes stand in where there is no network. A banner says so, and the caller has to record it.
    """
    path = TINY_IMAGENET[1]
    if data or shipped(path).exists():
        return data or path
    try:
        download(*TINY_IMAGENET)
        return path
    except (ValueError, OSError) as error:
        bar = "!" * 100
        print(f"\n{bar}\n!! No Tiny ImageNet: {error}\n!! Put it at {path}, or name images with --data.\n"
              f"!! This run uses the built-in SHAPES instead: a demonstration, not evidence.\n{bar}\n")
        return "shapes"


# ---- The token cache: tokens.npy uint16 (N, V, T), labels.npy int64 (N,), meta.json ------------------------

PART_IMAGES = 1000  # in a part file, at most: a killed encoding loses the part that it was at
PART_BYTES = 2 ** 27  # of the crops of a part, at most
UNREADABLE = 65535  # fills the row of an image that cannot be read; its label becomes -1


class TokenCache(NamedTuple):
    """An opened cache. Rows with label -1 are images that could not be read."""
    tokens: np.ndarray  # (N, V, T) uint16, memory-mapped
    labels: np.ndarray  # (N,) int64
    meta: dict  # see `cache_meta`


def cache_meta(images: ImageSet, vq: VQModel, size: int, ratios: tuple[float, ...]) -> dict:
    """What a cache is made of, wherever the images lie; two caches with equal meta hold equal tokens."""
    return {"split": images.split, "images": images.fingerprint, "tokenizer": fingerprint(vq),
            "image_size": size, "crop_ratios": list(ratios),
            "shape": [len(images), max(10 * len(ratios), 1), (size // vq.config.downsample) ** 2],
            "codebook_size": vq.config.codebook_size, "classes": images.classes}


def token_cache(images: ImageSet, vq: VQModel, size: int, ratios: tuple[float, ...],
                root: str | Path) -> TokenCache:
    """The codes of ten crops of every image for each of `ratios`; of the centre crop alone if there are none.

    They are read from a folder below `root` whose name says what it holds. If it is not there yet, the images
    are encoded first: under torchrun each process encodes every WORLD_SIZE-th part into a file of its own,
    and rank 0 joins these files and writes meta.json last, for which the others wait. A killed encoding goes
    on where it was, with any number of processes, and two jobs may encode the same cache at once.
    Raises ValueError if codes and image size do not fit, as `read_pixels` does, or for a damaged cache.
    """
    check_image_size(size, vq.config)
    if vq.config.codebook_size > UNREADABLE:
        raise ValueError(f"the cache stores codes in 16 bits; {vq.config.codebook_size} codes do not fit.")
    meta, N, (rank, world) = cache_meta(images, vq, size, ratios), len(images), rank_and_world()
    folder = Path(root) / f"{len(images.classes)}-classes-{images.split}-{size}px-{digest(meta)[:8]}"
    finished = folder / "meta.json"
    if not finished.exists():
        count = max(min(PART_IMAGES, PART_BYTES // (3 * size ** 2 * meta["shape"][1])), 1)  # images in a part
        parts = [(range(start, min(start + count, N)), folder / "parts" / f"{start:09d}.npy")
                 for start in range(0, N, count)]
        try:
            _encode(parts[rank::world], images, vq, size, ratios)
            while not finished.exists():  # process 0 joins the parts when all are there, and the others wait
                if rank == 0 and all(part.exists() for _, part in parts):
                    _join(folder, parts, images, meta)
                time.sleep(0.1)
        except OSError:
            if not finished.exists():
                raise  # else another job has joined the parts and deleted them meanwhile
    with reading(folder, "token cache of these images (delete it, and it is encoded again)"):
        tokens, labels = np.load(folder / "tokens.npy", mmap_mode="r"), np.load(folder / "labels.npy")
        if list(tokens.shape) != meta["shape"]:
            raise ValueError(f"tokens.npy has the shape {tokens.shape}")
    bad = np.flatnonzero(labels < 0)
    if rank == 0 and len(bad):
        print(f"!! {len(bad):,} {images.split} images are left out of {folder}, since they could not be "
              f"read; the first is {images.names[bad[0]]}.")
    return TokenCache(tokens, labels, meta)


def _encode(parts: list[tuple[range, Path]], images: ImageSet, vq: VQModel, size: int,
            ratios: tuple[float, ...]) -> None:
    """Write those of `parts`, (rows of `images`, file) each, that are missing."""
    blank = np.zeros((max(10 * len(ratios), 1), size, size, 3), np.uint8)  # (V, S, S, 3)
    missing = [(rows, part) for rows, part in parts if not part.exists()]
    crops = read_ahead(read_pixels(images, rows, lambda image: all_crops(image, size, ratios))
                       for rows, _ in missing)
    total = sum(len(rows) for rows, _ in missing)
    what = f"encoding {Path(images.source).name} {images.split}"
    with progress(desc=what, total=total, unit="image") as bar:
        for (rows, part), found in zip(missing, crops):
            pixels = np.stack([blank if image is None else image for image in found])  # (B, V, S, S, 3)
            codes = encode_pixels(vq, torch.from_numpy(pixels).flatten(0, 1)).unflatten(0, pixels.shape[:2])
            codes[[image is None for image in found]] = UNREADABLE
            write_file(part, lambda file: np.save(file, codes.numpy().astype(np.uint16)))  # (B, V, T)
            bar.update(len(rows))


def _join(folder: Path, parts: list[tuple[range, Path]], images: ImageSet, meta: dict) -> None:
    """Write tokens.npy, labels.npy and, last, meta.json; then the parts are deleted."""
    labels = images.labels.copy()

    def write(file):
        header = {"descr": "<u2", "fortran_order": False, "shape": tuple(meta["shape"])}
        np.lib.format.write_array_header_1_0(file, header)
        for rows, part in parts:  # memory does not grow with the number of images
            codes = np.load(part)
            bad = codes[:, 0, 0] == UNREADABLE
            labels[rows.start:rows.stop][bad] = -1
            codes[bad] = 0
            file.write(codes.tobytes())
        if 100 * (labels < 0).sum() > len(labels):  # each process has only seen its own
            raise ValueError(f"more than 1 % of the images for {folder} cannot be read; get them again and "
                             "delete that folder.")

    write_file(folder / "tokens.npy", write)
    write_file(folder / "labels.npy", lambda file: np.save(file, labels))
    write_file(folder / "meta.json", lambda file: file.write(json.dumps(meta, indent=1).encode()))
    shutil.rmtree(folder / "parts", ignore_errors=True)


# ---- What all scripts share: processes, devices, memory, files ---------------------------------------------

def rank_and_world() -> tuple[int, int]:
    """This process's (rank, number of processes) as torchrun tells it; (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def choose_device(name: str = "") -> torch.device:
    """The device called `name`: cpu, cuda or cuda:N; by default cuda where there is a GPU that works.

    Under torchrun "cuda" is the GPU number LOCAL_RANK, one for each process of a machine.
    Raises ValueError, in one sentence, if there is no such device or this torch cannot use it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ValueError(f"--device {name}: write cpu, cuda or cuda:N. Apple's GPUs (mps) are untested here: "
                         "their kernels differ; on a CPU the preset tiny takes 10 to 25 minutes.")
    if name == "cpu":
        return torch.device("cpu")
    index = name.partition(":")[2]
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if index and rank_and_world()[1] > 1:
        raise ValueError(f"--device {name} puts all processes on one GPU; write cuda to give each its own.")
    number = int(index or os.environ.get("LOCAL_RANK", 0))
    if number >= count:
        raise ValueError(f"--device {name} asks for GPU {number}, but this machine has {count} that torch "
                         "can use; use --device cpu, or start fewer processes.")
    device = torch.device("cuda", number)
    torch.cuda.set_device(number)
    try:
        torch.ones(1, device=device).add_(1)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"this torch cannot compute on GPU {number}, {torch.cuda.get_device_name(number)}; "
                         "install one that was built for it, as pytorch.org describes, or use --device cpu "
                         f"({str(error).splitlines()[0]}).") from None
    return device


def progress(iterable: Iterable | None = None, desc: str = "", total: int | None = None, **settings) -> tqdm:
    """A tqdm bar on rank 0 alone; without a terminal, as in a batch job's log, it writes once a minute.

    To be used as `for x in progress(...)` or `with progress(...)`, which close it before an error is printed.
    """
    if not sys.stderr.isatty():
        settings |= dict(mininterval=60, maxinterval=60)
    return tqdm(iterable, desc, total, disable=rank_and_world()[0] != 0, **settings)


def read_ahead(batches: Iterable) -> Iterator:
    """The items of `batches`; the next one is read in a thread while the caller works on this one."""
    items = iter(batches)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, None)  # None marks the end
        while (item := following.result()) is not None:
            following = pool.submit(next, items, None)
            yield item


def within(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], float]:
    """A type for argparse: an int or a float, as `kind` says, finite and in [low, high]."""
    def read(text):
        try:
            value = kind(text)
            fits = math.isfinite(value) and low <= value <= high
        except (ValueError, OverflowError):
            fits = False
        if not fits:
            bounds = [f"at least {low:g}"] * (low > -math.inf) + [f"at most {high:g}"] * (high < math.inf)
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {noun} {' and '.join(bounds)}".rstrip())
        return value
    return read


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that the memory is full; torch has a class of its own for that only on GPUs."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and bool(re.search("out of memory|allocate memory", str(error))))


def run_script(main: Callable, goes_on: str) -> None:
    """Run a script's `main`, which a user's mistake ends in one sentence.

    goes_on  what to say after Ctrl-C of the work that was interrupted
    """
    try:
        main()
    except (ValueError, OSError) as error:  # the user's mistakes; everything else deserves its traceback
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    except KeyboardInterrupt:
        print(f"Stopped. {goes_on}")
        sys.exit(130)


@contextmanager
def enough_memory(remedy: str) -> Iterator[None]:
    """Too little memory, of the GPU or the machine, becomes one ValueError that ends in `remedy`.

    Also a decorator: of each script's main.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        amount = re.search(r" to allocate [\d.]+ \w+", str(error))
        raise ValueError(f"too little memory{amount[0] if amount else ''}; {remedy}.") from None


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other processes out of `folder`, which is created if need be; the lock ends with this process.

    Where the system or the disk has no locks, a warning is all. Raises ValueError, in one sentence, if
    another process holds the lock, OSError if the folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            import fcntl  # not on Windows
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another process is at work in {folder}; wait, or choose another.") from None
        except (ImportError, OSError) as error:
            print(f"!! {folder} cannot be locked: start no second job there ({error}).")
        yield


def write_file(path: str | Path, write: Callable) -> None:
    """Call `write(file)` on a temporary file beside `path`, then rename it: `path` is never half-written.

    A link stays a link, what it points to is replaced. Raises OSError in one sentence if that fails (no space
    left, no permission); an older `path` then stays.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())  # before the rename, in case the power fails
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise OSError(f"cannot write {path}; free some space or choose another place ({error}).") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_output(path: str | Path) -> None:
    """Raise OSError, saying why, if `write_file(path, ...)` cannot work; to be called before the work."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is a folder or a device; name a file to write.")
    there = next(parent for parent in path.parents if parent.exists())
    try:  # permissions alone would not tell of a read-only or full disk, or of too long a name
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", suffix=".tmp", dir=there) as file:
            file.write(bytes(4096))
    except OSError as error:
        raise OSError(f"cannot write {path}; choose another place ({error.strerror}).") from None


@contextmanager
def reading(path: str | Path, kind: str) -> Iterator[None]:
    """Whatever is raised while `path` is read becomes a ValueError: it is damaged or no `kind`.

    Only too little memory is not the file's fault and goes on as it is.
    """
    try:
        yield
    except Exception as error:  # damaged files make the libraries raise exceptions of every class
        if is_out_of_memory(error):
            raise
        reason, lines = type(error).__name__, str(error).strip().splitlines()
        if isinstance(error, pickle.PickleError):  # torch's advice would be to let the file run code
            reason += ": if it holds objects beside weights, save its state_dict alone"
        elif lines:
            said = lines[-1].strip()[:200].rstrip(".")
            reason = said if type(error) is ValueError else f"{reason}: {said}"
        raise ValueError(f"{path} is damaged or no {kind}; get it or write it again ({reason}).") from None


class Foreign:
    """Stands in for an object beside the weights whose class torch does not trust; nothing of it is kept."""

    def __init__(self, *_):
        pass

    def __setstate__(self, _):
        pass


def read_weights(path: str | Path) -> dict:
    """The dictionary that torch.save wrote to `path`, on the CPU, memory-mapped; nothing in it can run code.

    Raises FileNotFoundError, or ValueError if the file is damaged or holds something else.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}.")
    with reading(path, "file of weights"):
        zipped = zipfile.is_zipfile(path)  # all but files from before torch 1.6
        # Other people's files hold numpy scalars, paths or settings of their own beside the weights. Instead
        # of trusting those classes we put an empty one in their place. torch 2.5 cannot: it refuses the file.
        unsafe = getattr(torch.serialization, "get_unsafe_globals_in_checkpoint", lambda path: [])
        with torch.serialization.safe_globals([argparse.Namespace]):  # in LlamaGen's training files
            foreign = [(Foreign, name) for name in (unsafe(path) if zipped else [])]
            with torch.serialization.safe_globals(foreign):
                content = torch.load(path, map_location="cpu", weights_only=True,
                                     mmap=zipped and os.name != "nt")  # Windows cannot replace a mapped file
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no dictionary of weights; of a whole model save the state_dict().")
    return content


def find_weights(content: dict, known: str) -> dict:
    """The state dict in a file's `content` that has a weight called `known`; {} if there is none.

    It is `content` itself or below one of the usual names. What stands before all names is taken off, such as
    "module." (several GPUs), and "_orig_mod." (torch.compile) wherever it stands.
    """
    for state in (*map(content.get, ("model", "module", "state_dict", "model_state_dict", "ema")), content):
        for name in state if isinstance(state, dict) else ():
            if str(name).endswith(known):
                before = name.removesuffix(known)
                return {name.removeprefix(before).replace("_orig_mod.", ""): weight
                        for name, weight in state.items()}
    return {}


def check_finite(path: str | Path, weights: dict) -> None:
    """Raise ValueError unless `weights`, read from `path`, are {name: tensor of finite numbers}."""
    with reading(path, "file of weights"):
        for name, value in weights.items():
            if not (torch.is_tensor(value) and value.is_floating_point() and value.float().isfinite().all()):
                raise ValueError(f"{name} holds nan, inf or no floats; did its training diverge?")


def shipped(path: str | Path) -> Path:
    """`path` if it exists, else the same path below the folder of the scripts if that exists."""
    beside = Path(__file__).parent / path
    return beside if beside.exists() and not Path(path).exists() else Path(path)


def download(url: str, path: str | Path, size: int, digest: str) -> None:
    """Download `url`, `size` bytes, to `path`; nothing happens if `path` exists.

    `digest` is a name in hashlib and the checksum: "md5:90ab...". Raises ValueError if the server is silent
    for 15 seconds or sends something else, OSError if `path` cannot be written.
    """
    name, _, expected = digest.partition(":")
    checksum = hashlib.new(name)

    def chunks():
        try:
            with urllib.request.urlopen(url, timeout=15) as response:
                while chunk := response.read(1 << 20):
                    yield chunk
        except OSError as error:  # of the network: an error of the disk is not raised in here
            raise ValueError(f"{url} cannot be fetched ({error}).") from None

    def receive(file):
        with progress(desc=f"downloading {Path(path).name}", total=size, unit="B", unit_scale=True) as bar:
            for chunk in chunks():
                file.write(chunk)
                checksum.update(chunk)
                bar.update(len(chunk))
        if checksum.hexdigest() != expected:
            raise ValueError(f"{url} sent {file.tell():,} bytes that are not the {size:,} expected ones.")

    if not Path(path).exists():
        write_file(path, receive)


def digest(value) -> str:
    """16 hex digits over a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def fingerprint(module: nn.Module) -> str:
    """16 hex digits over the weights of a tokenizer or any other module."""
    sha = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name != "quantize.codebook_used":  # a statistic of LlamaGen's training, no weight
            sha.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
    return sha.hexdigest()[:16]


# ---- Command line ------------------------------------------------------------------------------------------

@enough_memory("lower --image-size or --batch")
def main(argv: list[str] | None = None) -> None:
    """Run the command line; None: this process's own. Raises ValueError or OSError for a user's mistake."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("command", choices=["train"], help="train a tokenizer")
    add("--data", required=True, help="folder or zip of images, or: shapes")
    add("--subset", default="", help="file that lists the class folders to keep, one per line")
    add("--image-size", type=within(int, 1, 2048), default=32, help="side of the square crops, pixels")
    add("--out", required=True, help="tokenizer file to write")
    add("--steps", type=within(int, 1, 10 ** 9), default=1000, help="training steps")
    add("--batch", type=within(int, 1, 10 ** 5), default=32, help="images per step")
    add("--codes", type=within(int, 2, UNREADABLE), default=1024, help="codebook size")
    add("--seed", type=within(int, 0, 2 ** 63 - 1), default=0)
    add("--device", default="", help="cpu, cuda or cuda:N; default: cuda if there is one")
    args = parser.parse_args(argv)
    if rank_and_world()[0] > 0:
        return  # under torchrun one process trains
    device = choose_device(args.device)
    check_output(args.out)
    if Path(args.out).resolve() in (Path(args.data).resolve(), Path(args.subset).resolve()):
        raise ValueError(f"{args.out} is an input and would be overwritten; choose another name.")
    images, held_out = (open_images(args.data, split, args.subset) for split in ("train", "val"))
    print(images.summary)
    config = replace(VQ_DS4, codebook_size=args.codes)
    vq = train_tokenizer(images, args.image_size, config, args.steps, args.batch, seed=args.seed,
                         device=device)
    save_tokenizer(args.out, vq)
    pixels = held_out_pixels(held_out, args.image_size, 1000)
    quality = evaluate_tokenizer(vq, pixels)
    print(f"{args.out}: PSNR {quality['psnr']:.2f} dB, {quality['usage']:.1%} of {args.codes} codes used, "
          f"perplexity {quality['perplexity']:.0f} on {len(pixels)} held-out images")


if __name__ == "__main__":
    run_script(main, "A tokenizer in training is lost; the same command starts again.")
