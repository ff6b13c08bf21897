"""Train ST-AR (arXiv 2509.15185), or its plain autoregressive baseline, on the codes of an image set.

Everything that is missing is made on the way: images are found or downloaded, the tokenizer is trained, the codes
of ten crops per image are cached. The losses are in losses.py, the model in model.py; here is the loop.

    python train.py --preset nano                                       # built-in images, minutes on a CPU
    torchrun train.py --preset tiny                                     # Tiny ImageNet at 32 px
    torchrun --nproc-per-node 8 train.py --preset small --losses ar     # the baseline; also ar+mim, ar+mim+view ...
    python train.py --preset tiny --resume                              # go on where a run stopped

Shapes in comments: B images, V views of each, T tokens, K positions, C width.
"""

import argparse
import copy
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import losses
import sample
import tokenizer
from model import SIZES, ModelConfig, Transformer, load_checkpoint, load_model, save_checkpoint

# ------------------------------------------------------------------------------------------------------------
# Settings
# ------------------------------------------------------------------------------------------------------------


@dataclass
class Config:
    """Every setting of a run. Each field is a flag, its comment the help text; a preset changes the defaults."""
    name: str = ""  # run folder below runs/; default: the preset, with the losses if not all are on
    # data
    data: str = ""  # folder or zip of images, or: shapes; default: Tiny ImageNet, downloaded to data/
    tokenizer: str = ""  # tokenizer file; default: train one for these images
    tokenizer_steps: int = 1500  # training steps of that tokenizer
    tokenizer_batch: int = 32  # images per such step
    codes: int = 1024  # codebook size of that tokenizer
    image_size: int = 32  # side of the square crops, pixels
    crop_ratios: tuple[float, ...] = (1.1,)  # ten crops of the image enlarged by each of these are the views
    cache: str = "cache"  # folder for tokenizers and token caches
    skip_corrupt: bool = False  # leave unreadable images out, naming them
    # model
    model: str = "tiny"  # a row of model.SIZES
    dropout: float = 0.1  # of tokens, attention and feed-forward outputs
    init: str = ""  # checkpoint to start from, ours or LlamaGen's
    # method
    losses: str = "ar+mim+step+view"  # ar, plus any of mim, step, view
    views: int = 2  # views of each image in a batch (V)
    mask_ratio: float = 0.25  # share of the keys hidden from the student (r); only if mim is on
    positions: int = 4  # positions sampled for the contrastive losses (K)
    depth: int = 3  # the block whose output they compare
    alpha: float = 1.0  # weight of L_MIM
    beta: float = 0.5  # weight of (L_step + L_view) / 2
    temperature: float = 0.2  # of InfoNCE; the paper prints none
    ema: float = 0.99  # decay of the teacher (m)
    ema_ramp: bool = True  # raise the decay to 1 along half a cosine, for runs far shorter than the paper's
    class_dropout: float = 0.1  # share of labels replaced by the null class, for guidance
    # optimisation
    epochs: int = 50  # passes over the images
    steps: int = 0  # optimizer steps, instead of epochs
    batch: int = 256  # images per step, over all processes
    accumulate: int = 1  # micro-batches per step; negatives then come from the micro-batch
    base_lr: float = 1e-3  # learning rate per 256 images; the rate is base_lr * batch / 256
    warmup: int = 100  # steps of linear warm-up
    schedule: str = "cosine"  # cosine (to 5 % of the rate) or constant
    weight_decay: float = 0.05  # of matrices, embeddings included
    beta1: float = 0.9  # of AdamW
    beta2: float = 0.95  # of AdamW; the paper prints 0.05, a typo for LlamaGen's value
    clip: float = 1.0  # largest gradient norm
    # run
    seed: int = 0  # of everything random
    device: str = ""  # cuda or cpu; default: cuda if there is one
    compile: bool = True  # torch.compile on cuda
    log_every: int = 10  # steps between lines of metrics.jsonl
    eval_every: int = 500  # steps between validation losses
    eval_images: int = 2000  # validation images used for them
    sample_every: int = 2000  # steps between sample grids
    samples: int = 40  # images in a sample grid; 0: none
    sample_cfg: float = 2.0  # guidance scale of the sample grid
    save_every: int = 500  # steps between checkpoints


PAPER = dict(image_size=256, crop_ratios=(1.1, 1.05), ema=0.9999, ema_ramp=False, base_lr=1e-4, warmup=0,
             schedule="constant", epochs=50, batch=256, samples=8, sample_cfg=4.0, save_every=5000, eval_every=5000,
             sample_every=5000)
PRESETS = {
    "nano": dict(data="shapes", model="nano", depth=2, codes=256, tokenizer_steps=400, steps=600, batch=32,
                 base_lr=1.6e-2, warmup=50, eval_every=100, eval_images=200, sample_every=300, save_every=100),
    "tiny": dict(batch=512, base_lr=5e-4, warmup=500),
    "small": dict(model="small", depth=6, image_size=64, ema=0.996, base_lr=8e-4, warmup=1000),
    "B": dict(model="B", depth=6, **PAPER),
    "L": dict(model="L", depth=18, **PAPER),  # paper: layer 18 of 24, although it calls it the middle
    "XL": dict(model="XL", depth=18, **PAPER),
}
# a CPU cannot run these schedules; what it runs instead, said loudly
ON_CPU = {
    "tiny": dict(steps=700, batch=24, base_lr=2.1e-2, warmup=50, dropout=0.0, eval_every=175, eval_images=250,
                 sample_every=350, save_every=100),
    "small": dict(steps=300, batch=8, base_lr=3.2e-2, warmup=50, dropout=0.0, eval_every=100, eval_images=50,
                  sample_every=150, save_every=50),
}


def parse_arguments(argv: list[str]) -> tuple[Config, dict, bool]:
    """The config, the flags given by hand and whether to resume. The flags are the fields of `Config`."""
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     argument_default=argparse.SUPPRESS)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="defaults of everything below")
    parser.add_argument("--resume", action="store_true", default=False, help="go on where the run stopped")
    for field in fields(Config):
        how = dict(type=field.type)
        if field.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif field.name == "crop_ratios":
            how = dict(type=float, nargs="*")
        shown = field.default if field.default != "" else "none"
        parser.add_argument("--" + field.name.replace("_", "-"), **how,
                            help=f"{comments[field.name]} (default {shown})".replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    preset, resume = given.pop("preset"), given.pop("resume")
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    defaults = PRESETS[preset] | {"device": device}
    if device == "cpu" and preset in ON_CPU and not resume:
        defaults |= ON_CPU[preset]
        if "epochs" in given:
            defaults.pop("steps")
        if tokenizer.rank_and_world()[0] == 0:
            print(f"No GPU: {preset} runs a shortened schedule, " + ", ".join(f"{k} {v}" for k, v in ON_CPU[preset].items()))
    config = Config(**defaults | given)
    config.crop_ratios = tuple(config.crop_ratios)
    if not config.name:
        config.name = preset if config.losses == Config.losses else f"{preset}-{config.losses.replace('+', '-')}"
    return config, given, resume


def check_config(config: Config, world: int) -> None:
    """Raise ValueError, in one sentence, for settings that cannot work."""
    terms = config.losses.split("+")
    layers = SIZES.get(config.model, (0,))[0]
    wrong = {
        f"--model {config.model}: choose one of {', '.join(SIZES)}": not layers,
        f"--losses {config.losses}: write ar, or ar plus some of mim, step, view, as in ar+mim":
            terms[0] != "ar" or not set(terms[1:]) <= {"mim", "step", "view"} or len(set(terms)) < len(terms),
        f"--mask-ratio {config.mask_ratio} must lie in [0, 1)": not 0 <= config.mask_ratio < 1,
        f"--depth {config.depth}: model {config.model} has layers 1 ... {layers}": not 1 <= config.depth <= layers,
        f"--views {config.views}: the view loss compares at least 2": "view" in terms and config.views < 2,
        f"--views {config.views}: an image has {10 * len(config.crop_ratios)} crops, ten per crop ratio":
            not 1 <= config.views <= 10 * len(config.crop_ratios),
        f"--crop-ratios {config.crop_ratios}: enlargements are at least 1": min(config.crop_ratios, default=0) < 1,
        f"--positions {config.positions}: the step loss compares at least 2": "step" in terms and config.positions < 2,
        f"--batch {config.batch} must be a multiple of {world} process(es) x {config.accumulate} micro-batches":
            config.accumulate < 1 or config.batch < 1 or config.batch % (world * config.accumulate) != 0,
        f"--batch {config.batch} on {world} process(es) leaves no other image as a negative":
            bool({"step", "view"} & set(terms)) and config.batch // config.accumulate < 2,
        f"--schedule {config.schedule}: choose cosine or constant": config.schedule not in ("cosine", "constant"),
        f"--ema {config.ema}, --class-dropout {config.class_dropout} and --dropout {config.dropout} lie in [0, 1]":
            not all(0 <= value <= 1 for value in (config.ema, config.class_dropout, config.dropout)),
        "--temperature, --base-lr and --clip must be positive": min(config.temperature, config.base_lr, config.clip) <= 0,
        "--device cuda: there is no CUDA device here": config.device == "cuda" and not torch.cuda.is_available(),
    }
    for sentence, is_wrong in wrong.items():
        if is_wrong:
            raise ValueError(sentence + ".")


# ------------------------------------------------------------------------------------------------------------
# Processes and data
# ------------------------------------------------------------------------------------------------------------


def meet(device: str) -> tuple[int, int, torch.device, dist.Store]:
    """(rank, processes, this process's device, a store they share). No process group yet.

    Rank 0 may be busy with the tokenizer for an hour before training starts. A key in the store can be waited for
    as long as that; a collective would time out.
    """
    rank, world = tokenizer.rank_and_world()
    device = torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.HashStore() if world == 1 else next(iter(dist.rendezvous("env://")))[0]
    return rank, world, device, store


def wait_for(store: dist.Store, key: str) -> str:
    """The value rank 0 puts under `key`, however long that takes."""
    store.wait([key], timedelta(days=30))
    return store.get(key).decode()


def prepare(config: Config, rank: int, device: torch.device, store: dist.Store):
    """Find the images, find or train the tokenizer, write the caches: (tokenizer, training cache, held-out cache).

    Rank 0 decides and trains, all encode. Settles `config.data`, `config.tokenizer` and, for the fallback to shapes,
    `config.name`. Raises ValueError or OSError for data that cannot be used.
    """
    if rank == 0:
        data = tokenizer.find_images(config.data)
        path = config.tokenizer or str(tokenizer.ready_tokenizer(
            config.cache, tokenizer.open_images(data), config.image_size, config.codes, config.tokenizer_steps,
            config.tokenizer_batch, device, config.skip_corrupt))
        store.set("prepared", json.dumps([data, path, data != config.data and data == "shapes"]))
    config.data, config.tokenizer, fallback = json.loads(wait_for(store, "prepared"))
    config.name += "-shapes" if fallback else ""
    vq = tokenizer.load_tokenizer(config.tokenizer, device)
    caches = []
    for split, ratios in (("train", config.crop_ratios), ("val", ())):
        images = tokenizer.open_images(config.data, split)
        meta = tokenizer.cache_meta(images, vq, config.image_size, ratios)
        folder = tokenizer.cache_folder(config.cache, meta)
        tokenizer.build_cache(folder, images, vq, config.image_size, ratios, skip_corrupt=config.skip_corrupt)
        if rank == 0:
            store.set(split, "encoded")
        wait_for(store, split)
        caches.append(tokenizer.load_cache(folder, meta))
    return vq, *caches


def seed_of(*key: int) -> int:
    """A seed that is a function of `key` alone: randomness has no state to save, and all processes agree."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@lru_cache(maxsize=2)
def image_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which one epoch visits the images, int64 (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, 0, epoch))).numpy()


class Batch(NamedTuple):
    """What one process computes a (micro-)step on."""
    tokens: torch.Tensor  # (B, V, T) int64
    classes: torch.Tensor  # (B,) int64, the null class where the label was dropped
    key_mask: torch.Tensor  # (B V, T) bool
    positions: torch.Tensor  # (K,) int64


def draw_batch(config: Config, cache: tokenizer.TokenCache, rows: np.ndarray, step: int, part: int, parts: int) -> Batch:
    """Slice `part` of `parts` of the global batch of `step`, on the CPU.

    Views, label drops, masks and positions are drawn for the GLOBAL batch, so that any number of processes and
    micro-batches sees the same. Labels are dropped once per image: student, teacher and both views see the same
    class, or the teacher would leak it.
    """
    B, V, T = config.batch, config.views, cache.tokens.shape[2]
    epoch, i = divmod(step, len(rows) // B)
    images = rows[image_order(config.seed, epoch, len(rows))[i * B:(i + 1) * B]]  # all different
    g = torch.Generator().manual_seed(seed_of(config.seed, 1, step))
    views = torch.rand(B, cache.tokens.shape[1], generator=g).argsort(1)[:, :V].numpy()  # V different crops
    dropped = torch.rand(B, generator=g) < config.class_dropout
    key_mask = losses.sample_key_mask(B * V, T, config.mask_ratio, g)
    positions = losses.sample_positions(T, config.positions, g)

    mine = slice(part * B // parts, (part + 1) * B // parts)
    tokens = torch.from_numpy(cache.tokens[images[mine, None], views[mine]].astype(np.int64))  # (B, V, T)
    classes = torch.from_numpy(cache.labels[images[mine]]).masked_fill(dropped[mine], len(cache.meta["classes"]))
    return Batch(tokens, classes, key_mask.view(B, V, T)[mine].flatten(0, 1), positions)


# ------------------------------------------------------------------------------------------------------------
# The training step: Figure 3 of the paper
# ------------------------------------------------------------------------------------------------------------


class Student(nn.Module):
    """The model and its projector as one module, so that DDP averages the gradients of both."""

    def __init__(self, model: Transformer, depth: int, contrast: bool):
        super().__init__()
        self.model, self.depth = model, depth
        self.projector = losses.projector(model.config.dim) if contrast else None

    def forward(self, tokens, classes, key_mask, positions):
        """(B, T-1), (B,), (B, T) or None, (K,) -> logits (B, T, V), last hidden states (B, T, C), z (B, K, C)."""
        last = self.model.config.n_layer
        logits, hidden, _ = self.model(tokens, classes, key_mask=key_mask, layers=(self.depth, last))
        z = self.projector(hidden[self.depth][:, positions]) if self.projector is not None else None  # Eq. 5
        return logits, hidden[last], z


def compute_losses(student: nn.Module, teacher: nn.Module, batch: Batch, config: Config,
                   rank: int) -> dict[str, torch.Tensor]:
    """{"loss": Eq. 8, "loss_ar": its first term, ...} on one batch, with the accuracies to log beside it."""
    on, V = config.losses.split("+"), config.views
    mask_on, contrast_on = "mim" in on, "step" in on or "view" in on
    tokens = batch.tokens.flatten(0, 1)  # (B V, T): all views in one batch
    inputs, classes = tokens[:, :-1], batch.classes.repeat_interleave(V)  # [c, x_1 ... x_{T-1}]

    logits, last, z = student(inputs, classes, batch.key_mask if mask_on else None, batch.positions)
    terms, log = {"ar": losses.ar_loss(logits, tokens)}, {}  # Eq. 2, under the mask of Eq. 3
    if mask_on or contrast_on:
        layers = [config.depth] * contrast_on + [SIZES[config.model][0]] * mask_on
        with torch.no_grad():  # no gradient, no mask, no dropout, and no logits needed
            h = teacher(inputs, classes, layers=layers, head=False).hidden
    if mask_on:
        terms["mim"] = losses.mim_loss(last, h[layers[-1]])  # Eq. 4
    if contrast_on:
        def by_slot(x):  # (B V, K, C) -> (V, K, B, C)
            return x.unflatten(0, (-1, V)).permute(1, 2, 0, 3)

        z, h = by_slot(z), losses.gather_images(by_slot(h[config.depth][:, batch.positions]), dim=2)
        for name, loss in (("step", losses.step_loss), ("view", losses.view_loss)):  # Eqs. 6 and 7
            if name in on:
                terms[name], log[f"acc_{name}"] = loss(z, h, config.temperature, rank * z.shape[2])
        log["acc_label"] = losses.label_accuracy(losses.gather_images(batch.classes, dim=0))
        log["negatives"] = torch.tensor(h.shape[2] - 1.0)
    log |= {f"loss_{name}": term for name, term in terms.items()}
    return log | {"loss": losses.total_loss(terms, config.alpha, config.beta)}  # Eq. 8


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Linear warm-up, then constant (LlamaGen) or half a cosine down to 5 %."""
    rate = config.base_lr * config.batch / 256 * min(1, (step + 1) / max(config.warmup, 1))
    if config.schedule == "constant":
        return rate
    return rate * (0.05 + 0.95 * (1 + math.cos(math.pi * step / steps)) / 2)


def peak_memory(device: torch.device) -> float:
    """Largest memory in use so far, GB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 30 if sys.platform == "darwin" else 2 ** 20)


def ema_decay(config: Config, step: int, steps: int) -> float:
    """paper: constant 0.9999, which needs some 10^5 steps. our choice for short runs: ramp to 1 as BYOL does."""
    if not config.ema_ramp:
        return config.ema
    return 1 - (1 - config.ema) * (1 + math.cos(math.pi * step / steps)) / 2


@torch.no_grad()
def validation_loss(model: Transformer, cache: tokenizer.TokenCache, count: int, rank: int, world: int) -> float:
    """L_AR in nats per token on the centre crops of `count` held-out images, unmasked; the same on all processes."""
    rows = np.flatnonzero(cache.labels >= 0)
    rows = rows[np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)][rank::world]
    device, total = next(model.parameters()).device, torch.zeros(2, dtype=torch.float64)
    model.eval()
    for chunk in np.array_split(rows, math.ceil(len(rows) / 64)) if len(rows) else []:
        tokens = torch.from_numpy(cache.tokens[chunk, 0].astype(np.int64)).to(device)
        logits = model(tokens[:, :-1], torch.from_numpy(cache.labels[chunk]).to(device)).logits
        total += torch.tensor([losses.ar_loss(logits, tokens).item() * len(chunk), len(chunk)])
    model.train()
    if world > 1:
        total = total.to(device)
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


# ------------------------------------------------------------------------------------------------------------
# The run
# ------------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """What a run consists of."""
    config: Config
    folder: Path  # runs/<name>
    rank: int
    world: int  # processes
    device: torch.device
    vq: tokenizer.VQModel
    cache: tokenizer.TokenCache
    held_out: tokenizer.TokenCache
    student: Student
    teacher: Transformer
    optimizer: torch.optim.Optimizer
    start: int  # steps done before
    steps: int  # to do in all


def read_run(config: Config, given: dict) -> tuple[Config, dict]:
    """The config and checkpoint of the run that --resume goes on with; the run's settings stand.

    Raises FileNotFoundError if there is none, ValueError for a flag that contradicts it.
    """
    run = Path("runs") / config.name
    if not (run / "checkpoint.pt").is_file():
        there = ", ".join(sorted(path.parent.name for path in Path("runs").glob("*/checkpoint.pt"))) or "none"
        raise FileNotFoundError(f"nothing to resume at {run}; runs with a checkpoint: {there}. Choose with --name.")
    checkpoint = load_checkpoint(run / "checkpoint.pt")
    saved = Config(**checkpoint["config"])
    for name, value in given.items():
        if name in ("data", "cache", "device", "compile", "log_every"):  # where and how, not what
            setattr(saved, name, value)
        elif getattr(saved, name) != value:
            raise ValueError(f"{run} runs with {name} = {getattr(saved, name)}, not {value}; a resumed run keeps "
                             "its settings. Start another one with --name.")
    if (run / "tokenizer.pt").exists():
        saved.tokenizer = str(run / "tokenizer.pt")
    return saved, checkpoint


def refuse_existing(config: Config) -> None:
    """Raise ValueError if there is a run of this name."""
    if (Path("runs") / config.name / "checkpoint.pt").exists():
        raise ValueError(f"runs/{config.name} exists; go on with it (--resume), or choose another --name.")


def set_up(config: Config, given: dict, resume: bool) -> Run:
    """Everything before the first step, from data to models; also joins the processes."""
    rank, world, device, store = meet(config.device)
    config, checkpoint = read_run(config, given) if resume else (config, None)
    check_config(config, world)
    if rank == 0 and not resume:
        refuse_existing(config)
    vq, cache, held_out = prepare(config, rank, device, store)
    if rank == 0 and not resume:
        refuse_existing(config)  # again: without network the name has changed
    images = int((cache.labels >= 0).sum())
    if images < config.batch:
        raise ValueError(f"{config.data} has {images} training images, fewer than --batch {config.batch}.")

    torch.manual_seed(config.seed)
    model = Transformer(ModelConfig(
        *SIZES[config.model], vocab_size=cache.meta["codebook_size"], num_classes=len(cache.meta["classes"]),
        num_tokens=cache.tokens.shape[2], dropout=config.dropout))
    if config.init:
        first, _ = load_model(config.init, image_size=config.image_size)
        if replace(first.config, dropout=config.dropout) != model.config:
            raise ValueError(f"--init {config.init} is {first.config}, but this run needs {model.config}.")
        model.load_state_dict(first.state_dict())
    student = Student(model, config.depth, "step" in config.losses or "view" in config.losses).to(device)
    teacher = copy.deepcopy(model).eval().requires_grad_(False)
    matrices = [p for p in student.parameters() if p.ndim >= 2]  # LlamaGen decays these, embeddings included,
    vectors = [p for p in student.parameters() if p.ndim < 2]  # but neither norms nor biases
    groups = [dict(params=matrices, weight_decay=config.weight_decay), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
    if checkpoint:
        if checkpoint["data"] != cache.meta:
            raise ValueError(f"runs/{config.name} was trained on other codes than those of {config.data}: other "
                             "images, or another tokenizer.")
        model.load_state_dict(checkpoint["model"])
        teacher.load_state_dict(checkpoint["ema"])
        student.projector.load_state_dict(checkpoint["projector"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                world_size=world)
    return Run(config, Path("runs") / config.name, rank, world, device, vq, cache, held_out, student, teacher,
               optimizer, checkpoint["step"] if checkpoint else 0, config.steps or config.epochs * (images // config.batch))


def open_folder(run: Run) -> None:
    """Make the run folder, or cut the metrics of a resumed run back to its checkpoint."""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "config.json").write_text(json.dumps(asdict(run.config), indent=1))
    metrics = run.folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if run.start and metrics.exists() else []
    metrics.write_text("".join(line for line in lines if json.loads(line)["step"] <= run.start))
    if sum(p.numel() for p in run.vq.parameters()) < 5e6:  # a copy, so that a moved run still samples
        tokenizer.save_tokenizer(run.folder / "tokenizer.pt", run.vq)


def save(run: Run, step: int) -> None:
    """Write runs/<name>/checkpoint.pt: all that --resume, sample.py and probe.py need."""
    save_checkpoint(run.folder / "checkpoint.pt", {
        "model": run.student.model.state_dict(), "ema": run.teacher.state_dict(),
        "projector": run.student.projector.state_dict(), "optimizer": run.optimizer.state_dict(), "step": step,
        "config": asdict(run.config), "model_config": asdict(run.student.model.config), "data": run.cache.meta})


def report(run: Run, line: dict) -> None:
    """Append one line to metrics.jsonl; if it brings a validation loss, redraw loss.png."""
    metrics = run.folder / "metrics.jsonl"
    with open(metrics, "a") as file:
        file.write(json.dumps(line) + "\n")
    if "val_nll" in line:
        lines = [json.loads(text) for text in metrics.read_text().splitlines()]
        titles = {"loss_ar": "training, masked" if "mim" in run.config.losses else "training", "val_nll": "held out"}
        series = {title: [(line["step"], line[key]) for line in lines if key in line] for key, title in titles.items()}
        plot = tokenizer.line_plot(series, f"{run.config.name}: next-token loss", "step", "nats per token")
        tokenizer.save_image(run.folder / "loss.png", plot)


def write_samples(run: Run, step: int) -> None:
    """Write runs/<name>/samples/<step>.png, from the same classes and random numbers at every step."""
    names, model = run.cache.meta["classes"], run.student.model.eval()
    classes = [i * len(names) // run.config.samples % len(names) for i in range(run.config.samples)]
    sample.save_samples(run.folder / "samples" / f"{step:07d}.png", model, run.vq, classes, names, run.config.seed,
                        cfg=run.config.sample_cfg)
    model.train()


def catch_signals() -> list[int]:
    """The list in which SIGINT (Ctrl-C) and SIGTERM are noted from now on; the fourth ends the process as usual."""
    caught: list[int] = []

    def note(number, frame):
        caught.append(number)
        if len(caught) == 3:
            signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


def mean_over_processes(run: Run, sums: dict[str, torch.Tensor], count: int, stop: bool) -> tuple[dict, bool]:
    """{name: sum / count}, averaged over the processes, and whether any of them wants to stop."""
    values = torch.stack([*(sum.to(run.device) for sum in sums.values()), torch.tensor(float(stop), device=run.device)])
    if run.world > 1:
        dist.all_reduce(values)
    *means, stops = values.tolist()
    return {name: mean / count / run.world for name, mean in zip(sums, means)}, stops > 0


def train_step(run: Run, forward: nn.Module, teacher: nn.Module, rows: np.ndarray, step: int) -> dict[str, torch.Tensor]:
    """One optimizer step, from the draw to the EMA update; returns what to log."""
    config, parts, sums = run.config, run.config.accumulate, {}
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, step, run.steps)
    torch.manual_seed(seed_of(config.seed, 2, step, run.rank))  # dropout
    for part in range(parts):
        batch = draw_batch(config, run.cache, rows, step, run.rank * parts + part, run.world * parts)
        batch = Batch(*(x.to(run.device, non_blocking=True) for x in batch))
        wait = run.world > 1 and part < parts - 1  # DDP averages gradients once per step
        with forward.no_sync() if wait else nullcontext(), \
                torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"):
            log = compute_losses(forward, teacher, batch, config, run.rank)
        (log["loss"] / parts).backward()
        sums = {name: sums.get(name, 0) + value.detach() / parts for name, value in log.items()}
    sums["grad_norm"] = nn.utils.clip_grad_norm_(run.student.parameters(), config.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    losses.update_ema(run.teacher, run.student.model, ema_decay(config, step, run.steps))  # towards the new theta
    return sums


def train(run: Run) -> None:
    """All steps of a run, its logs, validation, pictures and checkpoints; SIGINT or SIGTERM saves and leaves."""
    config, model = run.config, run.student.model
    rows = np.flatnonzero(run.cache.labels >= 0)  # the images that could be read
    forward = DistributedDataParallel(run.student, broadcast_buffers=False) if run.world > 1 else run.student
    teacher = run.teacher
    if run.device.type == "cuda" and config.compile:
        forward, teacher = torch.compile(forward), torch.compile(teacher)
    if run.rank == 0:
        open_folder(run)
        save(run, run.start)
    caught, sums, count, clock = catch_signals(), {}, 0, time.time()
    bar = tqdm(range(run.start, run.steps), config.name, run.steps, initial=run.start, disable=run.rank != 0)
    for step in bar:
        log = train_step(run, forward, teacher, rows, step)
        sums, count, done = {name: sums.get(name, 0) + value for name, value in log.items()}, count + 1, step + 1

        def due(every):
            return done % every == 0 or done == run.steps

        stop = bool(caught) and run.world == 1
        line = {"step": done}
        if due(config.log_every):
            means, stop = mean_over_processes(run, sums, count, bool(caught))
            tokens = count * config.batch * config.views * run.cache.tokens.shape[2]
            line |= means | {"lr": learning_rate(config, step, run.steps), "ema": ema_decay(config, step, run.steps),
                             "tokens_per_second": tokens / (time.time() - clock), "memory_gb": peak_memory(run.device)}
            bar.set_postfix_str(f"ar {line['loss_ar']:.3f}, {line['tokens_per_second']:,.0f} tok/s, "
                                f"{line['memory_gb']:.1f} GB")
            sums, count, clock = {}, 0, time.time()
        if due(config.eval_every):
            line["val_nll"] = validation_loss(model, run.held_out, config.eval_images, run.rank, run.world)
        if run.rank == 0:
            if len(line) > 1:
                report(run, line)
            if due(config.save_every) or stop:
                save(run, done)
            if config.samples and due(config.sample_every):
                write_samples(run, done)
        if stop and done < run.steps:
            bar.close()
            if run.rank == 0:
                print(f"Stopped and saved after step {done}. Go on with: python train.py --resume --name {config.name}")
            sys.exit(130)
    if run.rank == 0:
        print(f"Done: {run.folder}/ has checkpoint.pt, metrics.jsonl, loss.png and samples/.")


def main() -> None:
    """Parse the command line and run it."""
    config, given, resume = parse_arguments(sys.argv[1:])
    run = set_up(config, given, resume)
    train(run)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # the user's mistakes; everything else deserves its traceback
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # before the first step
        print("Stopped. The same command goes on: tokenizer and encoded images are kept.")
        sys.exit(130)
