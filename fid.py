"""FID, sFID, IS, precision and recall in torch; every table says how it was measured.

Definitions are those of ADM's evaluation suite (Dhariwal & Nichol, arXiv 2105.05233; openai/guided-diffusion,
evaluations/evaluator.py), which the paper uses, on the InceptionV3 weights released with
mseitzer/pytorch-fid. Inception says little about small images. For those `--features classifier` trains a
small classifier on the real images and measures in its features; these numbers are called FD-c and so on,
never FID.

    python fid.py --real data/tiny-imagenet-200.zip --fake out.npz --json scores.json
    python fid.py --real VIRTUAL_imagenet256_labeled.npz --fake samples.npz --weights inception.pth
    python fid.py --real FOLDER_OF_IMAGES --fake ANOTHER_FOLDER --resize pytorch-fid
    python fid.py --real shapes --fake out.npz real-half --features classifier

The row `real-half` is what a perfect generator would get: real images scored against other real images, as
many as the samples where there are enough. A model of tokens, however, draws no better than its tokenizer
decodes. There are two ways to see how much that costs:

    python fid.py --real shapes --fake out.npz reconstructions --vq runs/nano --features classifier
    python fid.py --real shapes --fake out.npz real-half --reference reconstructions --vq runs/nano \
        --features classifier

The first adds a row, the floor: real images, encoded and decoded. The second compares with decoded real
images, in features of a classifier trained on them, so that only the generator's own error is left.

References: FID Heusel et al. 1706.08500, sFID Nash et al. 2103.03841, IS Salimans et al. 1606.03498,
precision and recall Kynkaanniemi et al. 1904.06991. Shapes in comments: N images, B batch, H x W pixels, D
features, K classes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.special
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tokenizer import (ImageSet, VQModel, center_crop, check_image_size, check_output, choose_device,
                       decode_image, digest, download, enough_memory, fingerprint,
                       full_precision, is_image, list_files, load_tokenizer, open_images, progress,
                       rank_and_world, read_ahead, read_pixels, read_weights, reading, reconstruct,
                       run_script, to_float, within, write_file)

# ---- The measures: pure functions on arrays ----------------------------------------------------------------

def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet (Wasserstein-2) distance of two Gaussians, (D,) and (D, D) each (Heusel et al., Eq. 6).

        d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

    With S1 = A A^T and S2 = B B^T the last trace is the sum of the singular values of A^T B, for any such A
    and B. This needs no complex numbers and no matrix square root.
    Raises ValueError if the shapes differ or a matrix is not a finite covariance.
    """
    check_gaussian(mu1, sigma1)
    check_gaussian(mu2, sigma2)
    if np.shape(mu1) != np.shape(mu2):
        raise ValueError(f"statistics of {len(mu1)} and of {len(mu2)} features do not compare.")
    M = _factor(sigma1).T @ _factor(sigma2)  # (rank 1, rank 2)
    M = M if M.shape[0] <= M.shape[1] else M.T  # the larger Gram matrix would only add zeros
    trace = np.sqrt(np.linalg.eigvalsh(M @ M.T).clip(0)).sum()
    difference = np.asarray(mu1, np.float64) - np.asarray(mu2, np.float64)
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def check_gaussian(mu: np.ndarray, sigma: np.ndarray) -> None:
    """Raise ValueError unless mu (D,) and sigma (D, D) are a mean and a covariance: finite and symmetric."""
    if (np.ndim(mu) != 1 or np.shape(sigma) != (len(mu), len(mu)) or not np.isfinite(mu).all()
            or not np.isfinite(sigma).all() or abs(sigma - sigma.T).max() > 1e-6 * abs(sigma).max()):
        raise ValueError(f"a mean of shape {np.shape(mu)} and a covariance of shape {np.shape(sigma)} must "
                         "be finite, (D,) and symmetric (D, D); compute the statistics again.")


def _factor(sigma: np.ndarray) -> np.ndarray:
    """A (D, rank) with A A^T = sigma (D, D), positive semi-definite: Cholesky with pivoting, float64."""
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(np.asarray(sigma, np.float64), lower=1)
    A = np.zeros((len(sigma), rank))
    A[pivots - 1] = np.tril(lower)[:, :rank]
    if abs(np.trace(sigma) - np.square(A).sum()) > 1e-6 * abs(np.trace(sigma)):
        raise ValueError("a covariance matrix has negative eigenvalues; compute the statistics again.")
    return A


def expected_distance(sigma: np.ndarray, n1: int, n2: int) -> float:
    """The Frechet distance to expect of two samples, n1 and n2 of one Gaussian of covariance sigma (D, D).

        E d^2 = (1/n1 + 1/n2) (5/4 sum_i s_i + 1/2 sum_ij s_i s_j / (s_i + s_j)) + O(1/n^2)

    with the eigenvalues s of sigma. This is the bias: what a perfect generator scores. It follows from the
    variances of the mean, s_i / n, and of the covariance, s_i s_j (1 + [i = j]) / n, with the distance to
    second order in both. It holds for n1 and n2 above D or so.
    """
    s = np.linalg.eigvalsh(sigma).clip(1e-30)
    pairs = s[:, None] * s / (s[:, None] + s)  # (D, D)
    return float((1 / n1 + 1 / n2) * (1.25 * s.sum() + 0.5 * pairs.sum()))


def inception_score(probabilities: np.ndarray) -> float:
    """exp(mean KL(p(y|x) || p(y))) of one split, from (N, K) probabilities (Salimans et al.).

    Between 1 and K. 0 log 0 = 0, where ADM's code gives nan.
    """
    p = np.asarray(probabilities, np.float64)
    return np.exp(scipy.special.rel_entr(p, p.mean(0)).sum(1).mean())


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3, block: int = 500) -> tuple[float, float]:
    """Share of fakes (N2, D) in the reals' manifold, of reals (N1, D) in the fakes' (Kynkaanniemi et al.).

    A manifold is the union of balls around its samples that reach to their k-th neighbour, themselves not
    counted. Exact in float64, where ADM's code rounds to float16; `block` rows of distances at a time, which
    take 8 block max(N1, N2) bytes. Raises ValueError if a side has k images or fewer.
    """
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} images on both sides.")

    def radii(x):  # of each row the squared distance to its k-th neighbour; the first is the row itself
        return torch.cat([_squared_distances(rows, x).kthvalue(k + 1).values for rows in x.split(block)])

    real, fake = torch.as_tensor(real).double(), torch.as_tensor(fake).double()
    radius_real, radius_fake = radii(real), radii(fake)
    precise = 0
    covered = torch.zeros(len(real), dtype=torch.bool)
    for rows, radius in zip(fake.split(block), radius_fake.split(block)):
        distance = _squared_distances(rows, real)  # (block, N1)
        precise += (distance <= radius_real).any(1).sum().item()
        covered |= (distance <= radius[:, None]).any(0)
    return precise / len(fake), covered.double().mean().item()


def _squared_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(n, D), (m, D) -> (n, m); mere rounding becomes 0, so that copies of an image are at distance 0."""
    norms = a.square().sum(1)[:, None] + b.square().sum(1)
    distance = torch.addmm(norms, a, b.T, alpha=-2)
    return distance.masked_fill_(distance < norms.mul_(1e-13), 0)


# ---- Feature statistics, streamed --------------------------------------------------------------------------

SPLIT = 5000  # images behind one Inception Score
CONVENTION = 50_000  # samples behind a published FID; ADM's precision and recall take 10,000 real images


class Features(NamedTuple):
    """What an extractor returns for B images."""
    pool: torch.Tensor  # (B, D) float32, of the pool layer
    spatial: torch.Tensor | None  # (B, 2023) float32, Inception only
    probabilities: torch.Tensor  # (B, K) float64


class Moments:
    """Mean and covariance of a stream of vectors, in float64, on the device the vectors come from."""

    def __init__(self):
        self.count = self.sum = self.outer = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in (B, D) vectors."""
        x = x.double()
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """mu (D,) and sigma (D, D), normalised by N - 1 as np.cov does."""
        mean = self.sum / self.count
        sigma = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return mean.cpu().numpy(), sigma.cpu().numpy()


@dataclass
class Statistics:
    """What the measures need to know of a side, one of the two sets of images that are compared."""
    moments: dict[str, np.ndarray]  # mu, sigma and, for Inception, mu_s, sigma_s
    features: np.ndarray | None = None  # (n, D) float32: evenly spaced images, for precision and recall
    score: float | None = None  # inception score
    agreement: float | None = None  # share of images whose most probable class is their label


def feature_statistics(side: Side, extract: Callable[[np.ndarray], Features], batch: int = 64,
                       keep: int = 10_000) -> Statistics:
    """One pass over the images of a side. Of the features, those of at most `keep` images stay in memory.

    Statistics that came with the file are used instead of computed ones, as ADM does with its reference
    files. Errors as reading the side raises.
    """
    if side.batches is None:
        return Statistics(side.statistics)
    N = side.count
    kept = np.zeros(N, bool)
    kept[np.linspace(0, N - 1, min(keep, N)).astype(int)] = True  # evenly spaced
    pool, spatial, features = Moments(), Moments(), []
    probabilities, scores = [], []  # of the split that is being filled; of the full ones
    done = hits = 0
    for pixels in progress(read_ahead(side.batches(batch)), side.name, math.ceil(N / batch), leave=False):
        rows = slice(done, done + len(pixels))
        done += len(pixels)
        found = extract(pixels)
        pool.add(found.pool)
        if found.spatial is not None:
            spatial.add(found.spatial)
        features.append(found.pool.cpu().numpy()[kept[rows]])
        if side.labels is not None:
            hits += (found.probabilities.argmax(1).cpu().numpy() == side.labels[rows]).sum()
        for row in found.probabilities.cpu().numpy():
            probabilities.append(row)
            if len(probabilities) == SPLIT:
                scores.append(inception_score(np.stack(probabilities)))
                probabilities.clear()
    if probabilities:  # ADM: a shorter last split counts like the others
        scores.append(inception_score(np.stack(probabilities)))

    moments = dict(zip(("mu", "sigma"), pool.result()))
    if spatial.count:
        moments |= dict(zip(("mu_s", "sigma_s"), spatial.result()))
    agreement = None if side.labels is None else hits / N
    return Statistics(moments | side.statistics, np.concatenate(features), float(np.mean(scores)), agreement)


def compare(real: Statistics, fake: Statistics, suffix: str = "") -> dict[str, float | None]:
    """The row of a table; None where a side lacks what a measure needs. `suffix` "-c": of a classifier."""
    def frechet(*names):  # of a mean and a covariance
        if all(name in side.moments for side in (real, fake) for name in names):
            return frechet_distance(*(side.moments[name] for side in (real, fake) for name in names))
        return None

    precision = recall = None
    if real.features is not None and fake.features is not None:
        precision, recall = precision_recall(real.features, fake.features)
    if suffix:
        return {f"FD{suffix}": frechet("mu", "sigma"), f"IS{suffix}": fake.score,
                f"precision{suffix}": precision, f"recall{suffix}": recall, "class agreement": fake.agreement}
    return {"FID": frechet("mu", "sigma"), "sFID": frechet("mu_s", "sigma_s"), "IS": fake.score,
            "precision": precision, "recall": recall}


# ---- InceptionV3 of 2015-12-05, as FID has always used it (Szegedy et al., arXiv 1512.00567) ---------------

class ConvNorm(nn.Module):
    """A convolution without bias, then batch norm and ReLU. The kernel is k x k or (k, l).

    The input is padded to keep its size, unless the convolution strides or `pad` is off.
    """

    def __init__(self, cin, cout, kernel, stride=1, pad=True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions side by side, then a pooled one; outputs are concatenated in this order.

    A chain is a name and its steps, (width, kernel[, stride]) each; the last step may be a list of two that
    both read the same input. The pooled one is "avg" or "max" followed by a 1 x 1 convolution to `width`, or
    "halve", a strided max alone, with width 0.
    """

    def __init__(self, cin, chains, pool, width):
        super().__init__()
        self.pool, self.chains, self.width = pool, [], width or cin
        for chain, steps in chains.items():
            names, c = [], cin  # names of the steps, as lists of one or two
            for i, step in enumerate(steps, 1):
                name = chain if len(steps) == 1 else f"{chain}_{i}"
                fork = {f"{name}a": step[0], f"{name}b": step[1]} if isinstance(step, list) else {name: step}
                for part, shape in fork.items():
                    self.add_module(part, ConvNorm(c, *shape))
                names.append(list(fork))
                c = sum(shape[0] for shape in fork.values())
            self.chains.append(names)
            self.width += c
        self.branch_pool = ConvNorm(cin, width, 1) if width else nn.Identity()

    def forward(self, x):
        outputs = []
        for chain in self.chains:
            h = [x]
            for names in chain:
                h = [self.get_submodule(name)(h[0]) for name in names]
            outputs += h
        if self.pool == "avg":  # TensorFlow's average does not count the padding
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 1, 1) if self.pool == "max" else F.max_pool2d(x, 3, 2)
        return torch.cat([*outputs, self.branch_pool(pooled)], 1)


def _block_a(width):  # 35 x 35
    return {"branch1x1": [(64, 1)], "branch5x5": [(48, 1), (64, 5)],
            "branch3x3dbl": [(64, 1), (96, 3), (96, 3)]}, "avg", width


def _block_c(c):  # 17 x 17
    row, column = (1, 7), (7, 1)
    return {"branch1x1": [(192, 1)], "branch7x7": [(c, 1), (c, row), (192, column)],
            "branch7x7dbl": [(c, 1), (c, column), (c, row), (c, column), (192, row)]}, "avg", 192


def _block_e(pool):  # 8 x 8
    fork = [(384, (1, 3)), (384, (3, 1))]  # two convolutions that read the same input
    return {"branch1x1": [(320, 1)], "branch3x3": [(384, 1), fork],
            "branch3x3dbl": [(448, 1), (384, 3), fork]}, pool, 192


_MIXED = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64),
    "Mixed_6a": ({"branch3x3": [(384, 3, 2)], "branch3x3dbl": [(64, 1), (96, 3), (96, 3, 2)]}, "halve", 0),
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": ({"branch3x3": [(192, 1), (320, 3, 2)],
                  "branch7x7x3": [(192, 1), (192, (1, 7)), (192, (7, 1)), (192, 3, 2)]}, "halve", 0),
    "Mixed_7b": _block_e("avg"),
    "Mixed_7c": _block_e("max"),  # a mistake of 2015: the released network has a maximum here
}


class InceptionV3(nn.Module):
    """float (B, 3, 299, 299) in [-1, 1] -> pool3 (B, 2048), spatial (B, 2023).

    Parameter names are those of pt_inception-2015-12-05-6726825d.pth. The spatial features are the first 7
    channels of TensorFlow's mixed_6/conv, the first branch of Mixed_6d, in TensorFlow's order: 17 x 17
    places, channels last.
    """

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = ConvNorm(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = ConvNorm(32, 32, 3, pad=False)
        self.Conv2d_2b_3x3 = ConvNorm(32, 64, 3)
        self.Conv2d_3b_1x1 = ConvNorm(64, 80, 1)
        self.Conv2d_4a_3x3 = ConvNorm(80, 192, 3, pad=False)
        width = 192
        for name, parts in _MIXED.items():
            self.add_module(name, Mixed(width, *parts))
            width = self.get_submodule(name).width
        self.fc = nn.Linear(2048, 1008)

    def forward(self, x):
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (B, 64, 147, 147)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))  # (B, 192, 71, 71)
        x = F.max_pool2d(x, 3, 2)  # (B, 192, 35, 35)
        for name in _MIXED:
            x = self.get_submodule(name)(x)  # 5: (B, 288, 35, 35), 6: (B, 768, 17, 17), 7: (B, 2048, 8, 8)
            if name == "Mixed_6d":
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)  # of the first branch
        return x.mean((2, 3)), spatial


def resize_adm(x: torch.Tensor, size: int = 299) -> torch.Tensor:
    """float (B, 3, H, W) -> (B, 3, size, size) as TensorFlow 1's ResizeBilinear: src = dst * in / size.

    Neither half-pixel centres nor align_corners nor antialias, so that no F.interpolate does it; the
    operations are in TensorFlow's order and in float32.
    """
    for axis in (3, 2):
        length = x.shape[axis]
        scale = float(np.float32(length) / np.float32(size))  # TensorFlow's, rounded to float32
        source = torch.arange(size, device=x.device, dtype=torch.float32) * scale
        low = source.floor().long()
        high = (low + 1).clamp(max=length - 1)
        weight = (source - low).view(-1, *[1] * (3 - axis))  # along `axis`
        a, b = x.index_select(axis, low), x.index_select(axis, high)
        x = a + (b - a) * weight
    return x


INCEPTION_NAME = "pt_inception-2015-12-05-6726825d.pth"
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_NAME}"
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"


def load_inception(weights: str | None, cache: str | Path, resize: str = "adm",
                   device="cpu") -> tuple[InceptionV3, str]:
    """InceptionV3 with the weights in a file (by default downloaded once to `cache`), and its protocol line.

    Raises ValueError if the download fails, or if the file is truncated or of another network, and
    FileNotFoundError or OSError if there is no such file or it cannot be written.
    """
    path = Path(weights or Path(cache) / INCEPTION_NAME)
    if not weights:
        try:
            download(INCEPTION_URL, path, 95_628_359, f"sha256:{INCEPTION_SHA256}")
        except ValueError as error:
            raise ValueError(f"no weights of InceptionV3; fetch them elsewhere and name them with --weights, "
                             f"or use --features classifier ({error})") from None
    state, model = read_weights(path), InceptionV3()
    with reading(path, "file of FID's InceptionV3"):
        model.load_state_dict(state)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    features = f"features: InceptionV3 with weights of sha256 {sha[:16]}, resize {resize}, float32"
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), features


def inception_extractor(model: InceptionV3, resize: str = "adm", device="cpu") -> Callable:
    """uint8 (B, H, W, 3) -> Features: D = 2048, 2023 spatial ones, K = 1008 probabilities.

    `resize` "adm" is TensorFlow's bilinear and (x - 128) / 128; "pytorch-fid" is half-pixel bilinear and
    x / 127.5 - 1.
    """
    @torch.no_grad()
    def extract(pixels):
        x = torch.from_numpy(pixels).to(device).movedim(-1, 1).float()
        if resize == "adm":
            x = (resize_adm(x) - 128) / 128
        else:
            x = F.interpolate(x, (299, 299), mode="bilinear", align_corners=False) / 127.5 - 1
        with full_precision():
            pool, spatial = model(x.contiguous(memory_format=torch.channels_last))
        logits = pool @ model.fc.weight.T  # ADM: without the bias
        return Features(pool, spatial, logits.double().softmax(1))
    return extract


# ---- In-domain features: a small residual classifier of the real images ------------------------------------

class ResidualBlock(nn.Module):
    """(B, cin, h, w) -> (B, cout, h / 2, w / 2), rounded up."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride=2, padding=1, bias=False)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1, bias=False)
        self.skip = nn.Conv2d(cin, cout, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(cout), nn.BatchNorm2d(cout)

    def forward(self, x):
        h = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(h + self.skip(F.avg_pool2d(x, 2, ceil_mode=True)))


class Classifier(nn.Module):
    """float (B, 3, S, S) in [-1, 1] -> features (B, 256) and logits (B, K)."""

    def __init__(self, classes: int, size: int):
        super().__init__()
        stride = max(size // 32, 1)  # images of 32 px and more leave the stem with 32 x 32 to 63 x 63 places
        self.stem = nn.Conv2d(3, 32, 2 * stride + 1, stride, padding=stride, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(ResidualBlock(32, 64), ResidualBlock(64, 128), ResidualBlock(128, 256))
        self.head = nn.Linear(256, classes)

    def forward(self, x):
        features = self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))
        return features, self.head(features)


def train_classifier(side: Side, steps: int, batch: int = 64, device="cpu") -> Classifier:
    """SGD with one cycle on images `in_memory`, flipped and shifted by up to an eighth.

    On one CPU it gives the same classifier again.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(len(side.classes), side.size[0])
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.2)
    batches = read_ahead(training_batches(side, steps, batch))
    bar = progress(batches, "training the classifier", steps)
    for step, (pixels, labels) in enumerate(bar):
        x = to_float(torch.from_numpy(pixels).to(device))
        loss = F.cross_entropy(model(x)[1], torch.from_numpy(labels).to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval().requires_grad_(False)


def training_batches(side: Side, steps: int, batch: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Flipped and shifted images uint8 (B, S, S, 3) and labels (B,); each epoch is one permutation."""
    rng = np.random.default_rng(0)
    order, size = np.zeros(0, np.int64), side.size[0]
    shift = size // 8
    for _ in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(side.count)])
        rows, order = order[:batch], order[batch:]
        pixels = np.pad(side.pixels[rows], ((0, 0), (shift, shift), (shift, shift), (0, 0)), "reflect")
        places = rng.integers(2 * shift + 1, size=(batch, 2))
        flips = rng.choice([1, -1], size=batch)
        crops = [p[y:y + size, x:x + size][:, ::flip] for p, (y, x), flip in zip(pixels, places, flips)]
        yield np.stack(crops), side.labels[rows]


def find_classifier(side: Side, held_out: Side, steps: int, cache: str | Path, device="cpu") -> Path:
    """The file in `cache` of the classifier of `side`, which is trained first if it is not there.

    The file also says how it was made and how often it is right on `held_out`. Sides that are `in_memory`
    have a fingerprint of their pixels, so that a classifier of other pixels is never taken.
    """
    K, size = len(side.classes), side.size[0]
    made_of = digest([side.fingerprint, held_out.fingerprint, size, steps])
    path = Path(cache) / f"classifier-{K}-classes-{size}px-{made_of[:8]}.pt"
    if not path.exists():
        check_output(path)
        model = train_classifier(side, steps, device=device)
        accuracy = feature_statistics(held_out, classifier_extractor(model, device)).agreement
        content = {"model": {name: value.cpu() for name, value in model.state_dict().items()},
                   "classes": side.classes, "size": size,
                   "made": f"trained for {steps:,} steps on {side.count:,} images of {side.name} "
                           f"({side.fingerprint}) at {size} px; right on {accuracy:.1%} of "
                           f"{held_out.count:,} held-out ones; {K} classes"}
        write_file(path, lambda file: torch.save(content, file))
    return path


def load_classifier(path: str | Path, side: Side, device="cpu") -> tuple[Classifier, str]:
    """The classifier that `find_classifier` wrote to `path`, for images like those of `side`; its protocol.

    Raises FileNotFoundError, or ValueError if the file holds none or one of other classes or another size.
    """
    saved = read_weights(path)
    with reading(path, "classifier of fid.py"):
        model = Classifier(len(saved["classes"]), saved["size"])
        model.load_state_dict(saved["model"])
        features = f"features: classifier {fingerprint(model)}, {saved['made']}"
        if saved["classes"] != side.classes or saved["size"] != side.size[0]:
            raise ValueError(f"it knows other classes, or another size, than those of {side.name}")
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), features


def classifier_extractor(model: Classifier, device="cpu") -> Callable:
    """uint8 (B, S, S, 3) -> Features: D = 256, no spatial ones, probabilities over the classes trained on."""
    @torch.no_grad()
    def extract(pixels):
        with full_precision():
            pool, logits = model(to_float(torch.from_numpy(pixels).to(device)))
        return Features(pool, None, logits.double().softmax(1))
    return extract


# ---- What is compared: images as a stream, or statistics ---------------------------------------------------

@dataclass(frozen=True)
class Side:
    """Images of one size, read as a stream, or earlier statistics, or both (ADM's reference files)."""
    name: str
    fingerprint: str  # 16 hex digits
    count: int | None  # N; None where a statistics file does not say
    size: tuple[int, int] | None = None  # H, W in pixels; None for statistics alone
    batches: Callable[[int], Iterator[np.ndarray]] | None = None  # batch size -> uint8 (B, H, W, 3), in order
    labels: np.ndarray | None = None  # (N,) int
    classes: list[str] | None = None  # names in label order
    protocol: dict = field(default_factory=dict)  # how the images or statistics were made
    statistics: dict = field(default_factory=dict)  # mu (D,), sigma (D, D), mu_s, sigma_s
    pixels: np.ndarray | None = None  # uint8 (N, H, W, 3), of images `in_memory`


def image_side(images: ImageSet, size: int | None = None, rows: np.ndarray | None = None) -> Side:
    """The images of `rows` (by default all) in that order; with `size` each is centre-cropped to it.

    Raises ValueError if an image cannot be read; `batches` also does if their sizes differ.
    """
    order = np.arange(len(images)) if rows is None else rows
    shape = (size, size) if size else images.read(0).size[::-1]

    def pixels(image):
        return np.asarray(center_crop(image, size) if size else image)

    def batches(batch):
        for start in range(0, len(order), batch):
            crops = read_pixels(images, order[start:start + batch], pixels)
            if images.unreadable:  # read_pixels lets one in a hundred pass
                raise ValueError(f"a score leaves no image out: {images.unreadable[0]}")
            if {crop.shape[:2] for crop in crops} != {shape}:  # (H, W)
                raise ValueError(f"{images.source} holds images of different sizes; make them equal "
                                 "(--image-size N does it for --real).")
            yield np.stack(crops)

    protocol = {"centre-cropped to": f"{size} px"} if size else {}
    if rows is None:  # tells whether validation images have a folder or are held out of the training images
        protocol["files"] = f"{images.names[0]} to {images.names[-1]}"
    side = Side(f"{images.source} {images.split}".strip(), images.fingerprint, len(order), shape, batches,
                protocol=protocol)
    return replace(side, labels=images.labels[order], classes=images.classes) if images.classes else side


def in_memory(side: Side, vq: VQModel | None = None) -> Side:
    """The same images, read once and kept: 3 H W bytes each.

    Their fingerprint is that of the pixels, labels and classes, so that a picture which was replaced under
    the same name is noticed. With a tokenizer `vq` each is encoded and decoded, and the fingerprint is also
    the tokenizer's. Errors as reading the side raises.
    """
    pixels, done, sha = np.empty((side.count, *side.size, 3), np.uint8), 0, hashlib.sha256()
    total = math.ceil(side.count / 256)
    for crops in progress(side.batches(256), f"reading {side.name}", total, leave=False):
        sha.update(crops)
        pixels[done:done + len(crops)] = reconstruct(vq, torch.from_numpy(crops)).numpy() if vq else crops
        done += len(crops)
    labels = None if side.labels is None else side.labels.tolist()
    content, name = [sha.hexdigest(), labels, side.classes], side.name
    if vq:
        content.append(fingerprint(vq))
        name += f" decoded by tokenizer {fingerprint(vq)}"
    return replace(side, name=name, fingerprint=digest(content), pixels=pixels,
                   batches=lambda batch: (pixels[i:i + batch] for i in range(0, len(pixels), batch)))


def mixed(count: int) -> np.ndarray:
    """0 ... count - 1 in a fixed random order.

    Inception Scores are taken over runs of 5,000 consecutive images. In the order of their folders those
    would be images of a few classes.
    """
    return np.random.default_rng(0).permutation(count)


def open_folder(source: str) -> ImageSet:
    """Every image below a folder or in a zip, in order of name, whatever the layout; without labels."""
    files, read_bytes = list_files(Path(source))
    names = sorted(filter(is_image, files))
    if not names:
        raise ValueError(f"{source} holds no images.")
    return ImageSet(source, "", names, np.zeros(len(names), np.int64), [],
                    digest([(name, files[name]) for name in names]),
                    lambda i: decode_image(read_bytes(names[i]), f"{source}/{names[i]}"))


def open_real(args: argparse.Namespace) -> ImageSet:
    """The training images that tokenizer.open_images finds in --real, or all of a folder without classes."""
    classifier = args.features == "classifier"
    try:
        images = open_images(args.real, "train", args.subset)
        if len(images.classes) == 1 and (classifier or not args.subset):
            raise ValueError(f"{args.real} has one class alone; a classifier needs two.")
        return images
    except ValueError:
        if classifier or args.subset:
            raise
        images = open_folder(args.real)
        if len({name.rpartition("/")[0] for name in images.names}) > 1:
            raise  # the sentence that says what is wrong with its folders
        return images


def open_samples(name: str) -> Side:
    """What --fake names: an .npz, or a folder or zip of images. Errors as `npz_side`, `image_side`."""
    if name.endswith(".npz"):
        return npz_side(name)
    images = open_folder(name)
    return image_side(images, rows=mixed(len(images)))


def npz_side(path: str | Path) -> Side:
    """ADM's .npz: images `arr_0` uint8 (N, H, W, 3), labels `arr_1` (N,) int; or statistics; or both.

    Two more arrays are understood where sample.py wrote them: `protocol`, a JSON string, and `classes`, the
    class names in label order. Pixels are streamed from the file, in its order.
    Raises FileNotFoundError, or ValueError if the file is damaged or its arrays are not as above.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file.")
    with reading(path, ".npz file of samples or statistics"), np.load(path) as file:
        arrays = {key: file[key] for key in file.files if key != "arr_0"}
        statistics = {key: arrays[key] for key in ("mu", "sigma", "mu_s", "sigma_s") if key in arrays}
        for which in ("", "_s"):
            if f"mu{which}" in arrays:
                check_gaussian(arrays[f"mu{which}"], arrays[f"sigma{which}"])
        protocol, labels = dict(json.loads(str(arrays.get("protocol", "{}")))), arrays.get("arr_1")
        classes = arrays["classes"].tolist() if "classes" in arrays else None
        side = Side(str(path), digest([(info.filename, info.CRC) for info in file.zip.infolist()]),
                    None, None, None, labels, classes, protocol, statistics)
        if "arr_0" not in file.files:
            if not statistics:
                raise ValueError("it holds neither images, arr_0, nor statistics, mu and sigma")
            return side
        with file.zip.open("arr_0.npy") as pixels:
            shape, fortran, dtype = _read_header(pixels)
        if dtype != np.uint8 or fortran or shape[3:] != (3,):
            raise ValueError(f"{dtype} images {shape} where uint8 (N, H, W, 3) in C order is needed")
        if labels is not None and labels.shape != shape[:1]:
            raise ValueError(f"{shape[0]} images but labels of shape {labels.shape}")
    return replace(side, count=shape[0], size=shape[1:3], batches=lambda batch: _npz_batches(path, batch))


def _read_header(file) -> tuple:
    """Shape, order and type of the .npy in `file`, which is left at the first element."""
    np.lib.format.read_magic(file)
    return np.lib.format.read_array_header_1_0(file)


def _npz_batches(path, batch):
    with reading(path, ".npz file"), np.load(path) as file, file.zip.open("arr_0.npy") as pixels:
        (N, H, W, _), *_ = _read_header(pixels)
        for start in range(0, N, batch):
            count = min(batch, N - start)
            data = bytearray(pixels.read(count * H * W * 3))  # torch warns of bytes: it may not write them
            yield np.frombuffer(data, np.uint8).reshape(count, H, W, 3)


def the_floor(images: ImageSet, size: int, vq: VQModel, counts: list[int]) -> Side:
    """The row `reconstructions`, the floor: evenly spaced images, encoded and decoded.

    They are as many as the samples, of which there are `counts`, where there are enough images.
    """
    count = min([len(images), *counts])
    rows = np.linspace(0, len(images) - 1, count).astype(int)[mixed(count)]
    side = in_memory(image_side(images, size, rows), vq)
    return replace(side, name="reconstructions (the floor)", protocol={"made of": side.name})


def real_halves(images: ImageSet, size: int | None, vq: VQModel | None, counts: list[int]) -> tuple:
    """The row `real-half`: a random half of the images; and what it is scored against: the other images.

    The half has as many images as the samples, of which there are `counts`, where it has enough of them. Its
    labels are left out: a classifier of these images has seen them.
    """
    order = mixed(len(images))
    count = min([len(images) // 2, *counts])
    sides = [image_side(images, size, rows) for rows in (order[:count], order[count:])]
    half, others = [in_memory(side, vq) for side in sides] if vq else sides
    about = {"scored against": f"the other {others.count:,} images of {others.name}"}
    return replace(half, name="real-half", labels=None, protocol=about), others


def common_size(images: ImageSet | None, sides: list[Side], asked: int | None) -> int | None:
    """The side in pixels to which real `images` are cut, that of all `sides`; None: they stay as they are.

    Raises ValueError if sizes differ. Images without classes are cut only to a size that is `asked` for.
    """
    if images and not images.classes:
        sides = [*sides, image_side(images, asked)]
    sizes = {side.size for side in sides if side.size} | ({(asked, asked)} if asked else set())
    if len(sizes) > 1:
        told = " and ".join(f"{W} x {H}" for H, W in sorted(sizes))
        raise ValueError(f"images of different sizes, {told}, do not compare; sample again at one size, or "
                         "let --image-size cut real ones that are no .npz.")
    if not images or not images.classes or not sizes:
        return asked
    (H, W), = sizes
    if H != W:
        raise ValueError(f"real images are cut to squares, the samples are {W} x {H}; sample squares, or "
                         "name an .npz with --real.")
    return H


def check_labels(side: Side, real: Side) -> None:
    """Raise ValueError if the samples of `side` say that they are of other classes than the images `real`."""
    labels = [0] if side.labels is None else side.labels
    if side.classes not in (None, real.classes) or min(labels) < 0 or max(labels) >= len(real.classes):
        raise ValueError(f"{side.name} has samples of other classes than those of {real.name}.")


# ---- The table and its protocol ----------------------------------------------------------------------------

def protocol_lines(real: Side, fakes: list[Side], features: str) -> list[str]:
    """What the numbers were measured on and how: one line a side, one for the features."""
    lines = []
    for role, side in [("real", real), *(("fake", side) for side in fakes)]:
        count = "an unknown number of" if side.count is None else f"{side.count:,}"
        size = f" of {side.size[1]} x {side.size[0]}" if side.size else ""
        line = f"{role}: {side.name}, {count} images{size}, fingerprint {side.fingerprint}"
        if side.statistics:
            package = "ADM's suite" if "resize adm" in features else "pytorch-fid"
            line += f"; covariances from the file's own statistics, taken for those of {package} (--resize)"
        made = [f"{key} {value}" for key, value in side.protocol.items()]
        if role == "fake" and not made:
            made = ["guidance, temperature, student or teacher: not recorded in the file"]
        lines.append("; ".join([line, ", ".join(made)]) if made else line)
    return [*lines, features,
            "precision, recall: k = 3, float64, on at most 10,000 real and 50,000 fake images, evenly spaced"]


def warning_lines(real: Side, fakes: list[Side], features: str) -> list[str]:
    """Reasons to distrust or not to compare the numbers of a table."""
    lines = [f"warning: {side.name} has {side.count:,} images, under 2,048: the distance is biased upwards"
             for side in (real, *fakes) if side.count is not None and side.count < 2048]
    if odd := sorted({side.count for side in fakes if side.count != CONVENTION}, key=str):
        counts = ", ".join("unknown" if count is None else f"{count:,}" for count in odd)
        lines.append(f"warning: sample counts of {counts} instead of the usual {CONVENTION:,}: not "
                     "comparable with published numbers, nor with each other unless equal")
    if real.batches is None:
        lines.append(f"warning: {real.name} holds statistics alone; precision and recall need its images")
    if "Inception" in features and INCEPTION_SHA256[:16] not in features:
        lines.append("warning: these are not the published Inception weights; the numbers compare only with "
                     "each other")
    return lines


def format_table(rows: dict[str, dict[str, float | None]]) -> str:
    """{name: {measure: value}} -> aligned text; "-" where there is no value."""
    measures, width = list(next(iter(rows.values()))), max(map(len, rows))
    lines = [" " * width + "".join(f"{measure:>17}" for measure in measures)]
    for name, row in rows.items():
        # adding 0.0 turns -0.0, which would be printed with its sign, into 0.0
        cells = ["-" if value is None else f"{round(value, 4) + 0.0:.4f}" for value in row.values()]
        lines.append(name.ljust(width) + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


# ---- Command line ------------------------------------------------------------------------------------------

REAL_ROWS = ("real-half", "reconstructions")  # rows of --fake that are made of --real's images


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; None: the program's own. Raises ValueError or OSError for flags that do not fit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--real", required=True, help="folder, zip, shapes, or .npz of images or statistics")
    add("--fake", nargs="+", required=True, metavar="FILE",
        help=".npz, folder or zip of samples; real-half: one half of the real images, scored against the "
        "other; reconstructions: real images encoded and decoded by --vq, the floor")
    add("--reference", choices=["originals", "reconstructions"], default="originals",
        help="compare with real images as they are, or encoded and decoded by --vq")
    add("--vq", help="the tokenizer of the reconstructions: a file or a run folder")
    add("--subset", default="", help="file with class folders of --real, one a line")
    add("--image-size", type=within(int, 8, 4096),
        help="centre-crop real images, pixels (default: to the fakes' size)")
    add("--features", choices=["inception", "classifier"], default="inception",
        help="inception for FID; classifier, trained on the real images, for small ones")
    add("--resize", choices=["adm", "pytorch-fid"], default="adm",
        help="how images are resized to 299 px, and were for a file of statistics")
    add("--weights", help="InceptionV3's weights (default: downloaded once into --cache)")
    add("--classifier", help="file of a classifier of an earlier table, instead of a new one")
    add("--classifier-steps", type=within(int, 10, 1e7), default=1200, help="training steps of 64 images")
    add("--cache", default="cache", help="folder for weights and trained classifiers")
    add("--json", help="file to which to write the table, protocol and warnings")
    add("--batch", type=within(int, 1, 100_000), default=64, help="images at a time; changes no score")
    add("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    args = parser.parse_args(argv)

    classifier, decoded = args.features == "classifier", args.reference == "reconstructions"
    if "" in (args.real, *args.fake):
        raise ValueError("--real or --fake is empty (a variable that is not set?); name a file or a folder.")
    if args.real.endswith(".npz") and (classifier or decoded or args.subset
                                       or set(args.fake) & set(REAL_ROWS)):
        raise ValueError(f"{args.real} is an .npz: real-half, reconstructions, --subset and --features "
                         "classifier need a folder or a zip of images as --real.")
    if decoded and "reconstructions" in args.fake:
        raise ValueError("reconstructions cannot be fakes and the reference at once; leave one out.")
    if bool(args.vq) != (decoded or "reconstructions" in args.fake):
        raise ValueError("--vq and reconstructions, in --fake or --reference, go together; give both.")
    if args.classifier and not classifier:
        raise ValueError("--classifier goes with --features classifier; leave it out.")
    if args.vq and Path(args.vq).is_dir():
        args.vq = f"{args.vq}/tokenizer.pt"
    if args.json:
        if not args.json.endswith(".json"):  # it could also be somebody's samples
            raise ValueError(f"--json {args.json}: name a file that ends in .json.")
        check_output(args.json)
    return args


@enough_memory("lower --batch, or score fewer images")
def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print the table with its protocol, write what was asked for.

    Raises ValueError or OSError, in one sentence, for what a user can mend.
    """
    if rank_and_world()[0] > 0:
        return  # one process does it all; more of them, under torchrun, would write the same files
    args = parse_args(argv)
    device, classifier = choose_device(args.device), args.features == "classifier"

    # Open both sides first, so that what does not fit together is found before the long work.
    vq = load_tokenizer(args.vq, device) if args.vq else None
    samples = {name: open_samples(name) for name in args.fake if name not in REAL_ROWS}
    images = None if args.real.endswith(".npz") else open_real(args)
    # the sides whose images are as they are; those of --real, unless it is an .npz, are cut to the same size
    given = [*samples.values()] if images else [npz_side(args.real), *samples.values()]
    if args.resize != "adm" and any("mu_s" in side.statistics for side in given):
        raise ValueError("a file with mu_s holds statistics of ADM's suite: leave --resize out.")
    size = common_size(images, given, args.image_size)
    if images and not size and (vq or classifier):
        size = min(images.read(0).size)
    if vq:
        check_image_size(size, vq.config)
    decode = vq if args.reference == "reconstructions" else None
    real = image_side(images, size) if images else given[0]

    # The network in whose features they are compared.
    if classifier:
        for side in given:
            check_labels(side, real)
        real = in_memory(real, decode)
        path = args.classifier
        if not path:
            held_out = in_memory(image_side(open_images(args.real, "val", args.subset), size), decode)
            path = find_classifier(real, held_out, args.classifier_steps, args.cache, device)
        model, features = load_classifier(path, real, device)
        extract, suffix = classifier_extractor(model, device), "-c"
    else:
        model, features = load_inception(args.weights, args.cache, args.resize, device)
        extract, suffix = inception_extractor(model, args.resize, device), ""
        real = in_memory(real, decode) if decode else real

    # One row for each of --fake.
    reference = feature_statistics(real, extract, args.batch)
    rows, fakes, notes = {}, [], []
    counts = [side.count for side in samples.values() if side.count]
    for name in args.fake:
        side, others, theirs = samples.get(name), real, reference
        if name == "reconstructions":
            side = the_floor(images, size, vq, counts)
        elif name == "real-half":
            side, others = real_halves(images, size, decode, counts)
            theirs = feature_statistics(others, extract, args.batch)
        rows[side.name] = compare(theirs, feature_statistics(side, extract, args.batch, CONVENTION), suffix)
        fakes.append(side)
        if classifier:
            bias = expected_distance(reference.moments["sigma"], side.count, others.count)
            notes.append(f"{side.name}: FD-c of two samples of one distribution, {side.count:,} and "
                         f"{others.count:,} images, would be about {bias:.3f}")

    if classifier:
        notes += [f"classifier: {path}; --classifier uses it again",
                  "-c and class agreement are its own: compare them with each other, never with FID"]
    protocol, warnings = protocol_lines(real, fakes, features) + notes, warning_lines(real, fakes, features)
    print("\n".join([format_table(rows), *protocol, *warnings]))
    if args.json:
        scores = {"scores": rows, "protocol": protocol, "warnings": warnings, "settings": vars(args)}
        write_file(args.json, lambda file: file.write(json.dumps(scores, indent=1).encode()))


if __name__ == "__main__":
    run_script(main, "The same command starts again.")
