"""Numbers people can trust: FID, sFID, IS, precision and recall in torch, each printed with its protocol.

Definitions are those of ADM's evaluation suite (Dhariwal & Nichol, arXiv 2105.05233; openai/guided-diffusion,
evaluations/evaluator.py), which the paper uses, on the InceptionV3 weights released with
mseitzer/pytorch-fid. Where those weights are missing, or images so small that Inception says little,
`--features classifier` trains a small classifier on the real images and measures in its features; those
numbers are called FD-c and so on, never FID. One process is enough: under torchrun the others end at once.

    python fid.py --real data/tiny-imagenet-200.zip --fake out.npz --json scores.json
    python fid.py --real VIRTUAL_imagenet256_labeled.npz --fake samples.npz --weights inception.pth
    python fid.py --real data/tiny-imagenet-200.zip --image-size 64 --save-stats tiny-imagenet-64.npz
    python fid.py --real shapes --fake out.npz held-out --features classifier

A model of tokens draws no better than its tokenizer decodes. Two ways to see how much that is:

    python fid.py --real shapes --fake out.npz reconstructions --vq runs/nano --features classifier
    python fid.py --real shapes --fake out.npz held-out --reference reconstructions --vq runs/nano \
        --features classifier

The first adds a row, the floor: real images, encoded and decoded. The second compares with decoded real
images, in features of a classifier trained on them: what is left there is the generator's alone.

References: FID Heusel et al. 1706.08500, sFID Nash et al. 2103.03841, IS Salimans et al. 1606.03498,
precision and recall Kynkaanniemi et al. 1904.06991. Shapes in comments: N images, B batch, H x W pixels, D
features, K classes.
"""

import argparse
import hashlib
import json
import zipfile
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

from tokenizer import (ImageSet, VQModel, center_crop, check_finite, check_image_size, check_output,
                       choose_device, decode_image, digest, download, enough_memory, fingerprint,
                       full_precision, is_image, list_files, load_tokenizer, open_images, progress,
                       rank_and_world, read_ahead, read_pixels, read_weights, reading, reconstruct,
                       run_script, to_float, within, write_file)

# ---- Images: sets of files, and what the tokenizer keeps of them -------------------------------------------

MIN_IMAGES = 4  # on each side: precision and recall look at three neighbours


def open_real(source: str | Path, split: str = "train", subset: str = "") -> ImageSet:
    """tokenizer.open_images for a score: no image may be left out, it would change the number.

    Raises ValueError or OSError, in one sentence, if there is nothing to read or fewer than 4 images.
    """
    images = open_images(source, split, subset)
    if len(images) < MIN_IMAGES:
        raise ValueError(f"{source} has {len(images)} images for {split}; at least {MIN_IMAGES} are needed.")
    return images


def all_images(source: str | Path) -> ImageSet:
    """Every image below a folder or in a zip, in order of name, whatever the layout; without labels.

    Raises FileNotFoundError, or ValueError if there are fewer than 4.
    """
    if not Path(source).exists():
        raise FileNotFoundError(f"{source} does not exist; a folder, a zip or an .npz of images is needed.")
    files, read_bytes = list_files(Path(source))
    names = sorted(filter(is_image, files))
    if len(names) < MIN_IMAGES:
        raise ValueError(f"{source} holds {len(names)} images; at least {MIN_IMAGES} are needed.")
    return ImageSet(str(source), "", names, np.zeros(len(names), np.int64), [],
                    digest([(name, files[name]) for name in names]),
                    lambda i: decode_image(read_bytes(names[i]), f"{source}/{names[i]}"))


def pick(images: ImageSet, rows: np.ndarray) -> ImageSet:
    """The images of `rows` (n,) int, in that order."""
    return replace(images, names=[images.names[i] for i in rows], labels=images.labels[rows],
                   read=lambda i: images.read(rows[i]))


def mixed(images: ImageSet) -> ImageSet:
    """The same images in a fixed random order.

    Inception Scores are taken over runs of 5,000 consecutive images: in the order of their folders those
    would be images of a few classes.
    """
    return pick(images, np.random.default_rng(0).permutation(len(images)))


def evenly_spaced(images: ImageSet, count: int) -> ImageSet:
    """`count` of the images, or all if there are fewer."""
    return pick(images, np.linspace(0, len(images) - 1, min(count, len(images))).astype(int))


def read_all(images: ImageSet, rows, transform: Callable) -> np.ndarray:
    """The images of `rows`, transformed: (B, ...). Raises ValueError if one cannot be read."""
    pixels = read_pixels(images, rows, transform)
    if any(p is None for p in pixels):  # leaving one out would change the score
        raise ValueError(images.unreadable[-1])
    return np.stack(pixels)


def in_memory(images: ImageSet, size: int, vq: VQModel | None = None) -> ImageSet:
    """The (size, size) centre crops of `images`, read once and kept: 3 size^2 bytes each.

    Their fingerprint is that of the pixels, labels and classes: it notices a picture replaced by another of
    the same name. With a tokenizer `vq` each is encoded and decoded, and the fingerprint is also the
    tokenizer's. Raises ValueError if they do not fit into memory or one cannot be read.
    """
    N = len(images)
    try:
        pixels = np.empty((N, size, size, 3), np.uint8)
    except MemoryError:
        raise ValueError(f"{N:,} images of {size} px need {3e-9 * N * size ** 2:.0f} GB of memory; choose "
                         "fewer classes with --subset, or smaller images.") from None
    sha, split = hashlib.sha256(), images.split
    what = f"reading {Path(images.source).name} {images.split}"
    for start in progress(range(0, N, 256), what, leave=False):
        rows = range(start, min(start + 256, N))
        crops = read_all(images, rows, lambda image: np.asarray(center_crop(image, size)))
        sha.update(crops)
        pixels[start:start + 256] = reconstruct(vq, torch.from_numpy(crops)).numpy() if vq else crops
    content = [sha.hexdigest(), images.labels.tolist(), images.classes]
    if vq:
        content.append(fingerprint(vq))
        split += f" decoded by tokenizer {fingerprint(vq)}"
    return replace(images, split=split, fingerprint=digest(content),
                   read=lambda i: Image.fromarray(pixels[i]))


# ---- Sides: what is compared, a stream of images or statistics ---------------------------------------------

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
    protocol: dict = field(default_factory=dict)  # how the images or statistics were made, as their file says
    statistics: dict = field(default_factory=dict)  # mu (D,), sigma (D, D), mu_s, sigma_s


def image_side(images: ImageSet, size: int | None = None) -> Side:
    """A set of images as one side; with `size` every image is centre-cropped to (size, size).

    Raises ValueError if an image cannot be read; reading does, too, and if their sizes differ.
    """
    shape = (size, size) if size else images.read(0).size[::-1]

    def pixels(image):
        if not size and image.size[::-1] != shape:
            raise ValueError(f"{images.source} holds images of different sizes ({shape[1]} x {shape[0]} and "
                             f"{image.width} x {image.height}); make them equal (--image-size N does it for "
                             "--real).")
        return np.asarray(center_crop(image, size) if size else image)

    def batches(batch):
        for start in range(0, len(images), batch):
            rows = range(start, min(start + batch, len(images)))
            yield read_all(images, rows, pixels)

    name = f"{images.source} {images.split}".strip() + (f" centre-cropped to {size} px" if size else "")
    labels, classes = (images.labels, images.classes) if images.classes else (None, None)
    return Side(name, images.fingerprint, len(images), shape, batches, labels, classes)


NPZ_KEYS = ("arr_1", "classes", "protocol", "mu", "sigma", "mu_s", "sigma_s")  # beside the images, arr_0


def npz_side(path: str | Path) -> Side:
    """ADM's .npz: images `arr_0` uint8 (N, H, W, 3), labels `arr_1` (N,) int; or statistics; or both.

    Two more arrays are understood where sample.py or --save-stats wrote them: `protocol`, a JSON string, and
    `classes`, the class names in label order. Pixels are streamed from the file, in its order.
    Raises FileNotFoundError, or ValueError if the file is damaged or its arrays are not as above.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist or is not a file.")
    header = None
    with reading(path, ".npz file"):
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():
                raise ValueError("wrong checksum")
            if "arr_0.npy" in archive.namelist():
                with archive.open("arr_0.npy") as file:
                    header = _read_header(file)
        with np.load(path) as file:
            small = {key: file[key] for key in NPZ_KEYS if key in file.files}
    with reading(path, "file of samples or statistics"):
        protocol = dict(json.loads(str(small.get("protocol", "{}"))))
        classes = small["classes"].astype(str).ravel().tolist() if "classes" in small else None
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            sha.update(chunk)
    side = Side(str(path), sha.hexdigest()[:16], None, protocol=protocol,
                statistics=_checked_statistics(path, small))
    if header is None:
        if not side.statistics:
            raise ValueError(f"{path} holds neither images (arr_0) nor statistics (mu, sigma).")
        count = protocol.get("images")
        return replace(side, count=count if isinstance(count, int) else None)

    shape, fortran, dtype = header
    pictures = len(shape) == 4 and shape[-1] == 3 and shape[0] >= MIN_IMAGES and min(shape) > 0
    if dtype != np.uint8 or not pictures or fortran:
        order = "Fortran" if fortran else "C"
        raise ValueError(f"{path} holds {dtype} images of shape {shape} in {order} order; uint8 (N, H, W, 3) "
                         f"in C order with N at least {MIN_IMAGES} is needed.")
    N, labels = shape[0], small.get("arr_1")
    if labels is not None and (labels.shape != (N,) or labels.dtype.kind not in "iu"):
        raise ValueError(f"{path} has {N} images but labels (arr_1) of shape {labels.shape} and type "
                         f"{labels.dtype}; whole numbers of shape ({N},) are needed.")
    return replace(side, count=N, size=shape[1:3], batches=lambda batch: _npz_batches(path, batch),
                   labels=labels, classes=classes)


def _read_header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, order and type of the .npy in `file`, which is left at the first element."""
    versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    return versions[np.lib.format.read_magic(file)](file)


def _npz_batches(path, batch: int) -> Iterator[np.ndarray]:
    with reading(path, ".npz file"), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        (N, H, W, _), *_ = _read_header(file)
        for start in range(0, N, batch):
            count = min(batch, N - start)
            data = bytearray(file.read(count * H * W * 3))  # torch warns of bytes: it may not write them
            yield np.frombuffer(data, np.uint8).reshape(count, H, W, 3)


def _checked_statistics(path, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    statistics = {}
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if mean not in arrays and covariance not in arrays:
            continue
        mu, sigma = (arrays.get(name, np.zeros(0)) for name in (mean, covariance))
        sound = mu.ndim == 1 and sigma.shape == (len(mu), len(mu)) and len(mu) > 0
        if not sound or any(x.dtype.kind != "f" or not np.isfinite(x).all() for x in (mu, sigma)):
            raise ValueError(f"{path} has statistics {mean} of shape {mu.shape} and {covariance} of shape "
                             f"{sigma.shape} that are not finite numbers of shapes (D,) and (D, D); compute "
                             "them again.")
        statistics |= {mean: mu, covariance: sigma}
    return statistics


def open_samples(name: str) -> Side:
    """What --fake names: an .npz, or a folder or zip of images. Errors as `npz_side`, `all_images`."""
    return npz_side(name) if name.endswith(".npz") else image_side(mixed(all_images(name)))


# ---- The measures: pure functions on arrays ----------------------------------------------------------------

def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet (Wasserstein-2) distance of two Gaussians, (D,) and (D, D) each (Heusel et al., Eq. 6).

        d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)

    With S1 = A A^T and S2 = B B^T the last trace is the sum of the singular values of A^T B, for any such A
    and B. That needs no complex numbers and no matrix square root, and rank-deficient covariances are its
    cheap case. Raises ValueError if the shapes differ or a matrix is not a finite covariance.
    """
    if np.shape(mu1) != np.shape(mu2) or np.shape(sigma1) != np.shape(sigma2):
        raise ValueError(f"statistics of {np.size(mu1)} and of {np.size(mu2)} features do not compare.")
    M = _factor(sigma1).T @ _factor(sigma2)  # (rank 1, rank 2)
    M = M if M.shape[0] <= M.shape[1] else M.T  # the larger Gram matrix would only add zeros
    trace = np.sqrt(np.linalg.eigvalsh(M @ M.T).clip(0)).sum()
    difference = np.asarray(mu1, np.float64) - np.asarray(mu2, np.float64)
    return float(difference @ difference + np.trace(sigma1) + np.trace(sigma2) - 2 * trace)


def _factor(sigma: np.ndarray) -> np.ndarray:
    """A (D, rank) with A A^T = sigma (D, D), positive semi-definite: Cholesky with pivoting, float64."""
    sigma = np.asarray(sigma, np.float64)
    if not np.isfinite(sigma).all() or abs(sigma - sigma.T).max() > 1e-6 * abs(sigma).max():
        raise ValueError("a covariance matrix is not finite or not symmetric; compute the statistics again.")
    lower, pivots, rank, _ = scipy.linalg.lapack.dpstrf(sigma, lower=1)
    A = np.zeros((len(sigma), rank))
    A[pivots - 1] = np.tril(lower)[:, :rank]
    if abs(np.trace(sigma) - np.square(A).sum()) > 1e-6 * abs(np.trace(sigma)):
        raise ValueError("a covariance matrix has negative eigenvalues; compute the statistics again.")
    return A


SPLIT = 5000  # images behind one Inception Score


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

class Features(NamedTuple):
    """What an extractor makes of B images."""
    pool: torch.Tensor  # (B, D) float32
    spatial: torch.Tensor | None  # (B, 2023) float32, Inception only
    probabilities: torch.Tensor  # (B, K) float64


class Moments:
    """Mean and covariance of a stream of vectors, in float64, on the device the vectors come from."""

    def __init__(self):
        self.count = 0

    def add(self, x: torch.Tensor) -> None:
        """Take in (B, D) vectors."""
        x = x.double()
        if self.count == 0:  # differences to the first vector are summed: no cancellation under a large mean
            D = x.shape[1]
            self.first, self.sum, self.outer = x[0].clone(), x.new_zeros(D), x.new_zeros(D, D)
        x = x - self.first
        self.count += len(x)
        self.sum += x.sum(0)
        self.outer.addmm_(x.T, x)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """mu (D,) and sigma (D, D), normalised by N - 1 as np.cov does."""
        mean = self.sum / self.count
        sigma = (self.outer - self.count * torch.outer(mean, mean)) / (self.count - 1)
        return (self.first + mean).cpu().numpy(), sigma.cpu().numpy()


@dataclass
class Statistics:
    """What the measures need to know of one side."""
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
    kept[np.linspace(0, N - 1, min(keep, N)).astype(int)] = True
    pool, spatial, features = Moments(), Moments(), []
    probabilities, scores = [], []  # of the split that is being filled; of the full ones
    done = hits = 0
    batches = progress(read_ahead(side.batches(batch)), side.name, -(-N // batch), unit="batch", leave=False)
    for pixels in batches:
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
    return Statistics(side.statistics or moments, np.concatenate(features), float(np.mean(scores)), agreement)


def compare(real: Statistics, fake: Statistics, suffix: str = "") -> dict[str, float | None]:
    """The row of a table; None where a side lacks what a measure needs. `suffix` "-c": of a classifier."""
    def frechet(*names):  # of a mean and a covariance
        parts = [side.moments.get(name) for side in (real, fake) for name in names]
        return None if any(part is None for part in parts) else frechet_distance(*parts)

    precision = recall = None
    if real.features is not None and fake.features is not None:
        precision, recall = precision_recall(real.features, fake.features)
    if suffix:
        return {f"FD{suffix}": frechet("mu", "sigma"), f"IS{suffix}": fake.score,
                f"precision{suffix}": precision, f"recall{suffix}": recall, "class agreement": fake.agreement}
    return {"FID": frechet("mu", "sigma"), "sFID": frechet("mu_s", "sigma_s"), "IS": fake.score,
            "precision": precision, "recall": recall}


# ---- InceptionV3 of 2015-12-05, as FID has always used it (Szegedy et al., arXiv 1512.00567) ---------------

INCEPTION_URL = ("https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
                 "pt_inception-2015-12-05-6726825d.pth")
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_SIZE = 95_628_359


class ConvNorm(nn.Module):
    """Convolution without bias, batch norm, ReLU; padded to keep the size unless it strides."""

    def __init__(self, cin: int, cout: int, kernel: int | tuple[int, int], stride: int = 1, pad: bool = True):
        super().__init__()
        kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
        padding = tuple(k // 2 for k in kernel) if pad and stride == 1 else 0
        self.conv = nn.Conv2d(cin, cout, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(cout, eps=0.001)

    def forward(self, x):
        return F.relu_(self.bn(self.conv(x)))


class Mixed(nn.Module):
    """Chains of convolutions side by side, then a pooled one; outputs are concatenated in this order.

    A chain is a list of steps (name, width, kernel[, stride]); its last one may be a pair that both read the
    same input. The pooled one is "avg" or "max" followed by a 1 x 1 convolution to `width`, or "halve", a
    strided max alone, with width 0.
    """

    def __init__(self, cin: int, chains: list[list], pool: str, width: int):
        super().__init__()
        self.pool, self.chains, self.width = pool, [], width or cin
        for chain in chains:
            c, names = cin, []
            for step in chain:
                fork = step if isinstance(step, list) else [step]
                for name, *shape in fork:
                    self.add_module(name, ConvNorm(c, *shape))
                names.append([name for name, *_ in fork])
                c = sum(shape[0] for _, *shape in fork)
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
    return [[("branch1x1", 64, 1)], [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
            [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)]], "avg", width


def _block_c(c):  # 17 x 17
    return [[("branch1x1", 192, 1)],
            [("branch7x7_1", c, 1), ("branch7x7_2", c, (1, 7)), ("branch7x7_3", 192, (7, 1))],
            [("branch7x7dbl_1", c, 1), ("branch7x7dbl_2", c, (7, 1)), ("branch7x7dbl_3", c, (1, 7)),
             ("branch7x7dbl_4", c, (7, 1)), ("branch7x7dbl_5", 192, (1, 7))]], "avg", 192


def _block_e(pool):  # 8 x 8
    return [[("branch1x1", 320, 1)],
            [("branch3x3_1", 384, 1), [("branch3x3_2a", 384, (1, 3)), ("branch3x3_2b", 384, (3, 1))]],
            [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3),
             [("branch3x3dbl_3a", 384, (1, 3)), ("branch3x3dbl_3b", 384, (3, 1))]]], pool, 192


_MIXED = {
    "Mixed_5b": _block_a(32), "Mixed_5c": _block_a(64), "Mixed_5d": _block_a(64),
    "Mixed_6a": ([[("branch3x3", 384, 3, 2)],
                  [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)]],
                 "halve", 0),
    "Mixed_6b": _block_c(128), "Mixed_6c": _block_c(160), "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": ([[("branch3x3_1", 192, 1), ("branch3x3_2", 320, 3, 2)],
                  [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, (1, 7)), ("branch7x7x3_3", 192, (7, 1)),
                   ("branch7x7x3_4", 192, 3, 2)]], "halve", 0),
    "Mixed_7b": _block_e("avg"), "Mixed_7c": _block_e("max"),  # max: a slip of 2015 that every FID repeats
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
                spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
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
        weight = (source - low).view(-1, *[1] * (3 - axis))
        a, b = x.index_select(axis, low), x.index_select(axis, high)
        x = a + (b - a) * weight
    return x


def load_inception(weights: str | None, cache: str | Path, resize: str = "adm",
                   device: torch.device | str = "cpu") -> tuple[InceptionV3, str]:
    """InceptionV3 with the weights in a file (by default downloaded once to `cache`), and its protocol line.

    Raises ValueError if the download fails, or if the file is truncated or of another network, and
    FileNotFoundError or OSError if there is no such file or it cannot be written.
    """
    path = Path(weights or Path(cache) / INCEPTION_URL.rsplit("/", 1)[1])
    if not weights:
        try:
            download(INCEPTION_URL, path, INCEPTION_SIZE, "sha256:" + INCEPTION_SHA256)
        except ValueError as error:
            raise ValueError(f"{error} Fetch it elsewhere and name it with --weights, or use --features "
                             "classifier.") from None
    state, model = read_weights(path), InceptionV3()
    own = model.state_dict()  # files saved before torch 0.4.1 lack the counters, which nothing here reads
    state = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")} | state
    wrong = sorted(state.keys() ^ own.keys())
    wrong += [name for name in own.keys() & state.keys()
              if getattr(state[name], "shape", None) != own[name].shape]
    if wrong:
        raise ValueError(f"{path} is not FID's InceptionV3 ({len(wrong)} names or shapes differ, {wrong[0]} "
                         f"first); get {INCEPTION_URL}.")
    check_finite(path, {name: value for name, value in state.items() if value.is_floating_point()})
    model.load_state_dict(state)
    sha = hashlib.sha256(path.read_bytes()).hexdigest()
    features = f"features: InceptionV3 with weights of sha256 {sha[:16]}, resize {resize}, float32"
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), features


def inception_extractor(model: InceptionV3, resize: str = "adm",
                        device: torch.device | str = "cpu") -> Callable[[np.ndarray], Features]:
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
        stride = max(size // 32, 1)  # of 32 px and more the stem leaves 32 x 32 to 63 x 63 places
        self.stem = nn.Conv2d(3, 32, 2 * stride + 1, stride, padding=stride, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.blocks = nn.Sequential(ResidualBlock(32, 64), ResidualBlock(64, 128), ResidualBlock(128, 256))
        self.head = nn.Linear(256, classes)

    def forward(self, x):
        features = self.blocks(F.relu(self.norm(self.stem(x)))).mean((2, 3))
        return features, self.head(features)


def train_classifier(images: ImageSet, size: int, steps: int, batch: int = 64,
                     device: torch.device | str = "cpu") -> Classifier:
    """SGD on images of `size` pixels, one cycle, flips, shifts up to size / 8; the same again on one CPU."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Classifier(len(images.classes), size).to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.2)
    batches = read_ahead(_training_batches(images, size, steps, batch))
    for pixels, labels in (bar := progress(batches, "training the classifier", steps)):
        x = to_float(torch.from_numpy(pixels).to(device))
        loss = F.cross_entropy(model(x)[1], torch.from_numpy(labels).to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if bar.n % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval().requires_grad_(False)


def _training_batches(images, size, steps, batch) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Flipped and shifted crops uint8 (B, S, S, 3) and labels (B,); each epoch is one permutation."""
    rng = np.random.default_rng(0)
    order, shift = np.zeros(0, np.int64), size // 8
    for _ in range(steps):
        while len(order) < batch:
            order = np.concatenate([order, rng.permutation(len(images))])
        rows, order = order[:batch], order[batch:]
        pixels = read_all(images, rows, lambda image: np.asarray(center_crop(image, size)))
        pixels = np.pad(pixels, ((0, 0), (shift, shift), (shift, shift), (0, 0)), "reflect")
        places = rng.integers(2 * shift + 1, size=(batch, 2))
        flips = rng.choice([1, -1], size=batch)
        crops = [p[y:y + size, x:x + size][:, ::flip] for p, (y, x), flip in zip(pixels, places, flips)]
        yield np.stack(crops), images.labels[rows]


def load_classifier(images: ImageSet, held_out: ImageSet, size: int, steps: int, cache: str | Path = "cache",
                    device: torch.device | str = "cpu") -> tuple[Classifier, str]:
    """The classifier of labelled `images` and its protocol line; trained if it is not in `cache`.

    Its accuracy on `held_out` stands in the line. Images that are `in_memory` have the fingerprint of their
    pixels, so that no classifier of other pixels is found. Raises ValueError if the cached file is damaged.
    """
    meta = {"images": images.fingerprint, "held_out": held_out.fingerprint, "classes": images.classes,
            "size": size, "steps": steps}
    path = Path(cache) / f"classifier-{Path(images.source).name}-{size}px-{digest(meta)[:8]}.pt"
    if not path.exists():
        check_output(path)
        model = train_classifier(images, size, steps, device=device)
        extract = classifier_extractor(model, device)
        accuracy = feature_statistics(image_side(held_out, size), extract).agreement
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        write_file(path, lambda file: torch.save({"model": state, "accuracy": float(accuracy),
                                                  "held_out": len(held_out), "meta": meta}, file))
    saved = read_weights(path)
    if str(saved.get("meta")) != str(meta):
        raise ValueError(f"{path} is not the classifier of {images.source}; delete it to train one again.")
    model = Classifier(len(images.classes), size)
    with reading(path, "classifier"):
        model.load_state_dict(saved["model"])
        right = f"{saved['accuracy']:.1%} of {saved['held_out']:,}"
    line = (f"features: classifier {fingerprint(model)}, trained for {steps:,} steps on {len(images):,} "
            f"images of {images.source} {images.split} ({images.fingerprint}) at {size} px; right on "
            f"{right} held-out ones; {len(images.classes)} classes")
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False), line


def classifier_extractor(model: Classifier,
                         device: torch.device | str = "cpu") -> Callable[[np.ndarray], Features]:
    """uint8 (B, S, S, 3) -> Features: D = 256, no spatial ones, probabilities over the classes trained on."""
    @torch.no_grad()
    def extract(pixels):
        with full_precision():
            pool, logits = model(to_float(torch.from_numpy(pixels).to(device)))
        return Features(pool, None, logits.double().softmax(1))
    return extract


# ---- The table and its protocol ----------------------------------------------------------------------------

CONVENTION = 50_000  # samples behind a published FID; ADM's precision and recall have 10,000 reals


def protocol_lines(real: Side, fakes: list[Side], features: str) -> list[str]:
    """What the numbers were measured on and how: one line a side, one for the features."""
    def line(role, side):
        count = "an unknown number of" if side.count is None else f"{side.count:,}"
        size = f" of {side.size[1]} x {side.size[0]}" if side.size else ""
        text = f"{role}: {side.name}, {count} images{size}, fingerprint {side.fingerprint}"
        if side.statistics:
            text += "; covariances from the file's own statistics"
        made = [f"{key} {value}" for key, value in side.protocol.items() if key != "features"]
        if not made and role == "fake":
            made = ["guidance, temperature, student or teacher: not recorded in the file"]
        return "; ".join([text, ", ".join(made)]) if made else text

    return [line("real", real), *(line("fake", side) for side in fakes), features,
            "precision, recall: k = 3, float64, on at most 10,000 real and 50,000 fake images, evenly spaced"]


def warning_lines(real: Side, fakes: list[Side], dims: int) -> list[str]:
    """Reasons to distrust or not to compare the numbers of a table, `dims` being the number of features."""
    lines = []
    for side in {side.fingerprint: side for side in (real, *fakes)}.values():
        if side.count is not None and side.count < 2048:
            rank = "; the covariance is rank-deficient" if side.count <= dims else ""
            lines.append(f"warning: {side.name} has {side.count:,} images, under 2,048: the distance is "
                         f"biased upwards{rank}")
    if odd := sorted({side.count for side in fakes if side.count != CONVENTION}, key=str):
        counts = ", ".join("unknown" if count is None else f"{count:,}" for count in odd)
        lines.append(f"warning: sample counts of {counts} instead of the usual {CONVENTION:,}: not "
                     "comparable with published numbers, nor with each other unless equal")
    if real.batches is None:
        lines.append(f"warning: {real.name} holds statistics alone; precision and recall need its images")
    return lines


def format_table(rows: dict[str, dict[str, float | None]]) -> str:
    """{name: {measure: value}} -> aligned text; "-" where there is no value."""
    def cell(value):
        return "-" if value is None else f"{round(value, 4) + 0.0:.4f}"  # + 0.0: no "-0.0000"

    measures = list(next(iter(rows.values())))
    lines = [["", *measures]] + [[name, *map(cell, row.values())] for name, row in rows.items()]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join([name.ljust(widths[0]), *map(str.rjust, values, widths[1:])])
                     for name, *values in lines)


# ---- Command line ------------------------------------------------------------------------------------------

REAL_ROWS = ("held-out", "reconstructions")  # rows of --fake that are made of --real's images


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; None: the program's own. Raises ValueError for flags that do not go together."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--real", required=True, help="folder, zip, shapes, or .npz of images or statistics")
    parser.add_argument("--fake", nargs="*", default=[], metavar="FILE",
                        help=".npz, folder or zip of samples; held-out: real validation images; "
                        "reconstructions: real images encoded and decoded by --vq, the floor")
    parser.add_argument("--reference", choices=["originals", "reconstructions"], default="originals",
                        help="compare with real images as they are, or encoded and decoded by --vq")
    parser.add_argument("--vq", help="the tokenizer of the reconstructions: a file or a run folder")
    parser.add_argument("--floor-images", type=within(int, MIN_IMAGES, 1e7), default=5000,
                        help="how many, evenly spaced, --fake reconstructions has")
    parser.add_argument("--subset", default="", metavar="FILE", help="class folders of --real, one a line")
    parser.add_argument("--split", choices=["train", "val"], default="train", help="which images of --real")
    parser.add_argument("--image-size", type=within(int, 8, 4096),
                        help="centre-crop real images, pixels (default: to the fakes' size)")
    parser.add_argument("--features", choices=["inception", "classifier"], default="inception")
    parser.add_argument("--resize", choices=["adm", "pytorch-fid"], default="adm", help="to 299 px")
    parser.add_argument("--weights", help="InceptionV3's weights (default: downloaded once into --cache)")
    parser.add_argument("--classifier-steps", type=within(int, 10, 1e7), default=1200,
                        help="training steps of 64 images")
    parser.add_argument("--cache", default="cache", help="folder for weights and trained classifiers")
    parser.add_argument("--save-stats", metavar="FILE", help="write the real side's statistics as .npz")
    parser.add_argument("--json", metavar="FILE", help="write the table, protocol and warnings")
    parser.add_argument("--batch", type=within(int, 1, 100_000), default=64,
                        help="images at once; no number depends on it")
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    args = parser.parse_args(argv)
    args.real = find_npz(args.real)
    args.fake = list(dict.fromkeys(find_npz(name) for name in args.fake))
    check_flags(args, {name for name, value in vars(args).items() if value != parser.get_default(name)})
    return args


def find_npz(name: str) -> str:
    """`name`, or name.npz if only that exists; ValueError if it is empty."""
    if not name:
        raise ValueError("--real or --fake is empty (a variable that is not set?); name a file or a folder.")
    if name in ("shapes", *REAL_ROWS) or Path(name).exists() or not Path(f"{name}.npz").is_file():
        return name
    return f"{name}.npz"


def check_flags(args: argparse.Namespace, given: set[str]) -> None:
    """Raise ValueError or OSError, in one sentence, for flags that do not go together or do nothing.

    `given` are the names of the flags whose values are not the defaults.
    """
    classifier = args.features == "classifier"
    decoded = args.reference == "reconstructions"
    of_images = not args.real.endswith(".npz")
    if not args.fake and not args.save_stats:
        raise ValueError("nothing to do: name samples with --fake, or a file with --save-stats.")
    for row in REAL_ROWS:
        if not of_images and row in (*args.fake, args.reference):
            raise ValueError(f"{row} is made of --real's images and {args.real} is an .npz; name a folder or "
                             "a zip.")
    if classifier and not of_images:
        raise ValueError(f"--features classifier trains on labelled images and {args.real} is an .npz; name "
                         "with --real a folder or a zip with one folder per class, or shapes.")
    if decoded and "reconstructions" in args.fake:
        raise ValueError("reconstructions cannot be fakes and the reference at once; leave one out.")
    if args.split == "val" and "held-out" in args.fake:
        raise ValueError("held-out is what --split val compares with; leave one of the two out.")
    reconstructions = decoded or "reconstructions" in args.fake
    if reconstructions and not args.vq:
        raise ValueError("reconstructions need a tokenizer; name its file or a run folder with --vq.")

    needs = {"vq": ("reconstructions in --fake or --reference", reconstructions),
             "floor_images": ("--fake reconstructions", "reconstructions" in args.fake),
             "subset": ("a folder or a zip as --real", of_images),
             "split": ("a folder or a zip as --real", of_images),
             "image_size": ("a folder or a zip as --real", of_images),
             "weights": ("--features inception", not classifier),
             "resize": ("--features inception", not classifier),
             "save_stats": ("--features inception, a classifier's compare only in one table", not classifier),
             "classifier_steps": ("--features classifier", classifier)}
    for name, (what, there) in needs.items():
        if name in given and not there:
            raise ValueError(f"--{name.replace('_', '-')} works only with {what}; leave it out.")

    if args.save_stats and not args.save_stats.endswith(".npz"):
        raise ValueError(f"--save-stats {args.save_stats}: call it {args.save_stats}.npz, as --real wants.")
    inputs = [args.real, *args.fake, args.weights, args.subset, args.vq and tokenizer_file(args.vq)]
    inputs = {Path(name).resolve() for name in inputs if name}
    for path in (args.save_stats, args.json):
        if path and Path(path).resolve() in inputs:
            raise ValueError(f"{path} is an input and would be overwritten; choose another name.")
        if path:
            check_output(path)
    if args.save_stats and args.json and Path(args.save_stats).resolve() == Path(args.json).resolve():
        raise ValueError(f"--json {args.json} would overwrite --save-stats; choose another name.")


class Opened(NamedTuple):
    """What the command line names, found and fitting together, before any long work."""
    samples: dict[str, Side]  # of --fake, by name, without the rows made of real images
    real: Side | None  # of an .npz
    sets: dict[str, ImageSet]  # of other real images the splits that are needed
    size: int | None  # to which they are centre-cropped, pixels; None: as they are
    vq: VQModel | None


def open_all(args: argparse.Namespace, device: torch.device) -> Opened:
    """Open whatever the command line names; ValueError or OSError, in one sentence, if it does not fit.

    Whether each picture can be read, and has its set's size, is only found where it is.
    """
    classifier = args.features == "classifier"
    samples = {name: open_samples(name) for name in args.fake if name not in REAL_ROWS}
    real, sets = None, {}
    if args.real.endswith(".npz"):
        real = npz_side(args.real)
    else:
        needed = [split for split in ("train", "val") if split == args.split or classifier
                  or (split == "val" and "held-out" in args.fake)]
        sets = {split: open_real(args.real, split, args.subset) for split in needed}
    size = common_size([real, *samples.values()] if real else list(samples.values()), args.image_size)
    if sets and size and size[0] != size[1]:
        raise ValueError(f"real images are cropped to squares, the fakes are {size[1]} x {size[0]}; sample "
                         "squares, or name an .npz with --real.")
    if classifier:
        samples = {name: replace(side, statistics={}) for name, side in samples.items()}
        for side in samples.values():
            check_classes(side, sets["train"])
    vq = load_tokenizer(tokenizer_file(args.vq), device) if args.vq else None
    if sets and not size and (classifier or vq):
        size = (min(sets[args.split].read(0).size),) * 2
    if vq:
        check_image_size(size[0], vq.config)
    return Opened(samples, real, sets, size[0] if size else None, vq)


def common_size(sides: list[Side], asked: int | None) -> tuple[int, int] | None:
    """The (H, W) of all sides and of --image-size; None if nothing tells; ValueError if they differ."""
    names = {side.size: side.name for side in sides if side.size}
    if asked:
        names[asked, asked] = "--image-size"
    if len(names) > 1:
        told = ", ".join(f"{name} ({shape[1]} x {shape[0]})" for shape, name in names.items())
        raise ValueError(f"images of different sizes do not compare: {told}; sample again at one size; "
                         "--image-size crops real ones that are no .npz.")
    return next(iter(names), None)


def tokenizer_file(name: str) -> Path:
    """The file that --vq names: itself, or tokenizer.pt in a run folder. Raises FileNotFoundError."""
    path = Path(name) / "tokenizer.pt" if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer {path}; name a tokenizer's file with --vq.")
    return path


def check_classes(side: Side, images: ImageSet) -> None:
    """Raise ValueError, in one sentence, if a classifier of `images` cannot judge the samples of `side`."""
    if side.size is None:
        raise ValueError(f"--features classifier needs images; {side.name} holds statistics alone.")
    K = len(images.classes)
    if side.classes is not None and side.classes != images.classes:
        differ = sorted(set(side.classes) ^ set(images.classes)) or ["their order"]
        raise ValueError(f"{side.name} was drawn from {len(side.classes)} classes, {images.source} has {K}, "
                         f"and they differ ({differ[0]}); these samples belong to other data.")
    if side.labels is not None and not 0 <= side.labels.min() <= side.labels.max() < K:
        raise ValueError(f"{side.name} has labels {side.labels.min()} to {side.labels.max()}, "
                         f"{images.source} has {K} classes; these samples belong to other data.")


def check_statistics(side: Side, features: str) -> None:
    """Statistics must come from the same features. Those without a protocol are ADM's, hence of --resize adm.

    Raises ValueError naming both sides.
    """
    unmarked = features if "resize adm" in features else "ADM's suite or another package"
    made = side.protocol.get("features", unmarked)
    if side.statistics and made != features:
        raise ValueError(f"the statistics {side.name} were made with {made!r}, the images would be read with "
                         f"{features!r}; use the same --features, --weights and --resize, or the images.")
    for name, D in (("mu", 2048), ("mu_s", 2023)):
        if len(side.statistics.get(name, range(D))) != D:
            raise ValueError(f"{side.name} has statistics of {len(side.statistics[name])} features ({name}), "
                             f"Inception has {D}; these are of another network.")


def read_sides(args: argparse.Namespace, opened: Opened) -> tuple[Side, list[Side], dict[str, ImageSet]]:
    """The real side, the fakes in the order named, and the sets of real images as they are compared.

    Errors as `in_memory` and `image_side` raise.
    """
    samples, real, sets, size, vq = opened
    rows = dict(samples)
    if "reconstructions" in args.fake:
        floor = image_side(in_memory(mixed(evenly_spaced(sets[args.split], args.floor_images)), size, vq))
        rows["reconstructions"] = replace(floor, name="reconstructions (the floor)",
                                          protocol={"made of": floor.name})
    decoded = args.reference == "reconstructions"
    if decoded or args.features == "classifier":
        sets = {split: in_memory(images, size, vq if decoded else None) for split, images in sets.items()}
    if "held-out" in args.fake:
        held_out = image_side(mixed(sets["val"]), size)
        rows["held-out"] = replace(held_out, name="held-out", protocol={"made of": held_out.name})
    return real or image_side(sets[args.split], size), [rows[name] for name in args.fake], sets


@enough_memory("lower --batch, or score fewer images")
def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print the table with its protocol, write what was asked for.

    Raises ValueError or OSError, in one sentence, for what a user can mend.
    """
    if rank_and_world()[0] > 0:
        return  # one process does it all; more of them, under torchrun, would write the same files
    args = parse_args(argv)
    device = choose_device(args.device)
    opened, notes, warnings = open_all(args, device), [], []
    if args.features == "inception":
        model, features = load_inception(args.weights, args.cache, args.resize, device)
        extract, suffix, dims = inception_extractor(model, args.resize, device), "", 2048
        for side in filter(None, (opened.real, *opened.samples.values())):
            check_statistics(side, features)
        if INCEPTION_SHA256[:16] not in features:
            warnings = ["warning: these are not the published Inception weights; the numbers compare only "
                        "with each other"]
        real, fakes, _ = read_sides(args, opened)
    else:
        real, fakes, sets = read_sides(args, opened)
        model, features = load_classifier(sets["train"], sets["val"], opened.size, args.classifier_steps,
                                          args.cache, device)
        extract, suffix, dims = classifier_extractor(model, device), "-c", 256
        notes = ["-c and class agreement are this classifier's: compare them with each other, never with FID"]
        notes += [f"{side.name} has no labels (arr_1), hence no class agreement"
                  for side in fakes if side.labels is None]
    if opened.vq:
        notes.append(f"tokenizer of the reconstructions: {args.vq} ({fingerprint(opened.vq)})")

    reference = feature_statistics(real, extract, args.batch)
    if args.save_stats:
        about = json.dumps({"images": real.count, "source": real.name, "fingerprint": real.fingerprint,
                            "features": features})
        write_file(args.save_stats, lambda file: np.savez(file, **reference.moments, protocol=about))
    rows = {side.name: compare(reference, feature_statistics(side, extract, args.batch, CONVENTION), suffix)
            for side in fakes}
    if rows:
        print(format_table(rows))
    protocol = protocol_lines(real, fakes, features) + notes
    warnings = warning_lines(real, fakes, dims) + warnings
    print("\n".join(protocol + warnings))
    if args.json:
        scores = {"scores": rows, "protocol": protocol, "warnings": warnings, "settings": vars(args)}
        write_file(args.json, lambda file: file.write(json.dumps(scores, indent=1).encode()))


if __name__ == "__main__":
    run_script(main, "The same command starts again.")
