"""Train ST-AR (arXiv 2509.15185), or its plain autoregressive baseline, on the codes of an image set.

Whatever is missing is made on the way: images are found or downloaded, a tokenizer is trained, the codes of
each image's crops, ten per crop ratio, are cached. The model is in model.py, the losses are in losses.py;
here is the loop.

    python train.py --preset nano                                   # built-in images, minutes on a CPU
    python train.py --preset tiny                                   # Tiny ImageNet at 32 px
    python train.py --preset tiny --losses ar                       # the baseline; or ar+mim, ar+mim+view ...
    python train.py --preset tiny --resume                          # go on where a run stopped
    torchrun --nproc-per-node 8 train.py --preset small             # torchrun only for several processes

Choices are tagged "paper:", "LlamaGen:" (its train_c2i.py) or "our choice:". Shapes in comments: B images of
this process, V views of each, T tokens, K positions, C width.
"""

import argparse
import copy
import inspect
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import Field, asdict, dataclass, fields, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import losses
import sample
import tokenizer
from model import SIZES, ModelConfig, Transformer

# ---- Settings ----------------------------------------------------------------------------------------------

Count = Annotated[int, 1, math.inf]  # a number, the lowest and the highest value that its flag accepts
Weight = Annotated[float, 0, math.inf]


@dataclass
class Config:
    """Every setting of a run. A field is a flag, its comment the help text; a preset changes the defaults."""
    preset: str = "tiny"  # the defaults of all settings below
    name: str = ""  # run folder below runs/; default: the preset, with the losses if not all are on
    # data
    data: str = ""  # folder or zip of images, or: shapes; default: Tiny ImageNet, downloaded to data/
    subset: str = ""  # text file with the class folders to keep, one per line; default: all
    tokenizer: str = "train"  # a file, or: shipped (with the code), or: train (one for these images)
    tokenizer_steps: Count = 20000  # training steps of that tokenizer
    codes: Annotated[int, 2, 65535] = 1024  # codebook size of that tokenizer
    image_size: Annotated[int, 8, 4096] = 32  # side of the square crops, pixels
    crop_ratios: Annotated[float, 1, 10] = (1.1,)  # the image enlarged by each gives ten crops, the views
    cache: str = "cache"  # folder for tokenizers and token caches
    # model
    model: str = "tiny"  # a row of model.SIZES
    dropout: Annotated[float, 0, 0.9] = 0.1  # LlamaGen: of tokens, attention and feed-forward outputs
    init: str = ""  # checkpoint to start from, ours or LlamaGen's
    # method
    losses: str = "ar+mim+step+view"  # the terms of Eq. 8
    views: Count = 2  # paper: views of each image in a batch (V)
    mask_ratio: Annotated[float, 0, 0.99] = 0.25  # paper: share of keys hidden from the student (r), with mim
    positions: Count = 4  # paper: positions sampled for the contrastive losses (K)
    depth: Count = 3  # the block that the contrastive losses compare; paper: the middle one
    alpha: Weight = 1.0  # paper: weight of L_MIM
    beta: Weight = 0.5  # paper: weight of (L_step + L_view) / 2
    temperature: Annotated[float, 1e-3, 1e3] = 0.2  # our choice: of InfoNCE; the paper prints none
    ema: Annotated[float, 0, 1] = 0.99  # decay of the teacher (m); paper: 0.9999
    ema_ramp: bool = True  # our choice for short runs: raise the decay to 1 along half a cosine
    class_dropout: Annotated[float, 0, 1] = 0.1  # LlamaGen: share of labels made the null class, for guidance
    # optimisation
    epochs: Count = 50  # passes over the images, each without the last batch if that is not a full one
    steps: Annotated[int, 0, math.inf] = 0  # optimizer steps; 0: as many as the epochs take
    batch: Count = 256  # LlamaGen: images per step, over all processes
    accumulate: Count = 1  # micro-batches per step; negatives then come from the micro-batch
    base_lr: Annotated[float, 1e-12, math.inf] = 1e-3  # the learning rate is base_lr * batch / 256
    warmup: Annotated[int, 0, math.inf] = 100  # steps of linear warm-up
    schedule: str = "cosine"  # cosine (down to 5 %) or constant
    weight_decay: Weight = 0.05  # LlamaGen: of matrices, embeddings included
    clip: Annotated[float, 1e-6, math.inf] = 1.0  # LlamaGen: largest gradient norm
    # run
    seed: Annotated[int, 0, 2 ** 32 - 1] = 0  # of everything random but tokenizer and held-out images
    device: str = ""  # cpu, cuda or cuda:N; default: cuda if there is one
    compile: bool = True  # torch.compile; a CPU only does it when asked to
    log_every: Count = 10  # steps between lines of metrics.jsonl
    save_every: Count = 500  # steps between checkpoints, validation losses and sample grids
    eval_images: Count = 2000  # held-out images for the validation loss
    samples: Annotated[int, 0, 1000] = 40  # images in a sample grid; 0: none
    sample_cfg: Annotated[float, 1, 100] = 2.0  # guidance scale of the sample grid

    @property
    def terms(self) -> list[str]:
        """The terms of Eq. 8 that are on: "ar" and any of "mim", "step", "view"."""
        return self.losses.split("+")

    @property
    def contrast(self) -> bool:
        """Whether any contrastive loss is on."""
        return "step" in self.terms or "view" in self.terms

    @property
    def folder(self) -> Path:
        return Path("runs", self.name)


PAPER = dict(ema=0.9999, ema_ramp=False, depth=6,  # paper: these, and Config's defaults tagged so
             image_size=256, crop_ratios=(1.1, 1.05), base_lr=1e-4, warmup=0, schedule="constant",  # LlamaGen
             samples=8, sample_cfg=4.0, save_every=5000)  # our choice
PRESETS = {
    "nano": dict(data="shapes", codes=256, tokenizer_steps=400, model="nano", depth=2, steps=600, batch=32,
                 base_lr=2e-3 * 256 / 32, warmup=50, save_every=100, eval_images=200),  # a rate of 2e-3
    "tiny": dict(tokenizer="shipped", batch=512, base_lr=5e-4, warmup=500),
    "small": dict(tokenizer="shipped", image_size=64, model="small", depth=6, ema=0.996, base_lr=8e-4,
                  warmup=1000),
    "B": PAPER | dict(model="B"),
    "L": PAPER | dict(model="L", depth=18),  # paper: layer 18 of 24, although it calls it the middle
    "XL": PAPER | dict(model="XL", depth=18),
}
CHOICES = {"preset": list(PRESETS), "model": list(SIZES), "schedule": ["cosine", "constant"],
           "losses": ["ar", "ar+mim", "ar+step", "ar+view", "ar+mim+step", "ar+mim+view", "ar+step+view",
                      Config.losses]}
TWENTY = str(Path(__file__).with_name("assets") / "tiny-imagenet-20.txt")  # a tenth of the time to encode
ON_CPU = {  # what a CPU runs instead, said loudly; the subset is that of Tiny ImageNet, not of --data
    "tiny": dict(subset=TWENTY, model="nano", depth=2, dropout=0.0, steps=5000, batch=32,
                 base_lr=2e-3 * 256 / 32, warmup=100, save_every=500, eval_images=1000),
    "small": dict(subset=TWENTY, dropout=0.0, steps=300, batch=8, base_lr=1e-3 * 256 / 8, warmup=50,
                  save_every=100, eval_images=50),
}


def add_flag(parser: argparse.ArgumentParser, field: Field, comment: str) -> None:
    """Give `parser` the flag of one field of `Config`."""
    defaults = [str(field.default)] if field.default != "" else []
    defaults += [f"{name} {preset[field.name]}" for name, preset in PRESETS.items() if field.name in preset]
    text = f"{comment} (default {', '.join(defaults)})" if defaults else comment
    if field.type is bool:
        how = dict(action=argparse.BooleanOptionalAction)
    elif field.type is str:
        how = dict(choices=CHOICES.get(field.name))
    else:
        how = dict(type=tokenizer.within(field.type.__origin__, *field.type.__metadata__))
    if isinstance(field.default, tuple):
        how["nargs"] = "+"
    parser.add_argument("--" + field.name.replace("_", "-"), help=text.replace("%", "%%"), **how)


def parse_arguments(argv: list[str] | None) -> tuple[Config, dict, bool]:
    """(config, flags given by hand, whether to resume). Raises SystemExit or ValueError for a bad flag."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     usage="train.py [--preset NAME] [--resume] [--SETTING VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", default=False, help="go on where the run stopped")
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.M))
    for field in fields(Config):
        add_flag(parser, field, comments[field.name])
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    if "crop_ratios" in given:
        given["crop_ratios"] = tuple(given["crop_ratios"])

    preset = given.get("preset", Config.preset)
    device = tokenizer.choose_device(given.get("device", "")).type
    smaller = ON_CPU.get(preset, {}) if device == "cpu" and not resume else {}
    settings = PRESETS[preset] | {"device": device, "compile": device == "cuda"} | smaller
    if smaller and "data" in given:  # the subset is one of Tiny ImageNet
        settings["subset"] = ""
    if given.keys() & {"codes", "tokenizer_steps"}:  # these ask for a tokenizer of one's own
        settings["tokenizer"] = "train"
    if "epochs" in given:
        settings["steps"] = 0
    config = Config(**settings | given)
    if smaller and tokenizer.rank_and_world()[0] == 0:
        used = {name: getattr(config, name) for name in smaller if name not in given}
        print(f"!! On a CPU --preset {preset} is smaller and shorter: {used}")
    if not config.name:
        all_on = config.losses == Config.losses
        config.name = preset if all_on else f"{preset}-{config.losses.replace('+', '-')}"
    if not re.fullmatch(r"\w[\w.+-]{0,99}", config.name):
        raise ValueError(f"--name {config.name!r} is a folder in runs/: use letters, digits, . _ + and -.")
    return config, given, resume


def check_config(c: Config, world: int) -> None:
    """Raise ValueError for settings that are not possible together."""
    on, n_layer, crops = c.terms, SIZES[c.model][0], 10 * len(c.crop_ratios)
    for wrong, sentence in (
        (c.depth > n_layer, f"--depth {c.depth}: model {c.model} has layers 1 ... {n_layer}"),
        (c.views > crops, f"--views {c.views}: an image has {crops} crops"),
        ("view" in on and c.views < 2, "the view loss compares at least 2 --views"),
        ("step" in on and c.positions < 2, "the step loss compares at least 2 --positions"),
        (c.batch % (world * c.accumulate) > 0,
         f"--batch {c.batch} must be a multiple of {world} process(es) x {c.accumulate} micro-batch(es)"),
        (c.contrast and c.batch < 2 * c.accumulate, "step and view loss compare at least 2 images at a time"),
        (c.image_size > 64 and not (c.data and c.tokenizer not in ("shipped", "train")),
         f"--image-size {c.image_size} needs --data DIR, ImageNet's, and --tokenizer vq_ds16_c2i.pt, "
         "published at huggingface.co/FoundationVision/LlamaGen"),
    ):
        if wrong:
            raise ValueError(sentence + ".")


# ---- Batches -----------------------------------------------------------------------------------------------

def seed_of(*key: int) -> int:
    """A seed made of `key` alone: no state to save. key[1] says of what: 0 order, 1 batch, 2 dropout."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@lru_cache(maxsize=2)
def image_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which one epoch visits the images, int64 (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, 0, epoch))).numpy()


class Batch(NamedTuple):
    """What one process computes with in one step."""
    tokens: torch.Tensor  # (B, V, T) int64
    classes: torch.Tensor  # (B,) int64, the null class where the label was dropped
    key_mask: torch.Tensor  # (B, V, T) bool, True where a key is hidden from the student
    positions: torch.Tensor  # (K,) int64


def draw_batch(config: Config, cache: tokenizer.TokenCache, step: int, rank: int, world: int) -> Batch:
    """The part of process `rank` of `world` in the batch of `step`, on the CPU.

    Views, label drops, masks and positions are drawn for the whole batch and then sliced, so that any number
    of processes sees the same.
    our choice: a label is dropped once per image, for student, teacher and all views alike; else a student
    under the null class would be matched to features that contain the label.
    """
    B_all, V, T = config.batch, config.views, cache.tokens.shape[2]
    rows = np.flatnonzero(cache.labels >= 0)  # the images that could be read
    epoch, i = divmod(step, len(rows) // B_all)
    images = rows[image_order(config.seed, epoch, len(rows))[i * B_all:(i + 1) * B_all]]  # all different
    g = torch.Generator().manual_seed(seed_of(config.seed, 1, step))
    crops = torch.rand(B_all, cache.tokens.shape[1], generator=g).argsort(1)[:, :V].numpy()  # the V views
    dropped = torch.rand(B_all, generator=g) < config.class_dropout
    key_mask = losses.sample_key_mask(B_all * V, T, config.mask_ratio, g)
    positions = losses.sample_positions(T, config.positions, g)

    B = B_all // world
    mine = slice(rank * B, (rank + 1) * B)
    tokens = torch.from_numpy(cache.tokens[images[mine, None], crops[mine]].astype(np.int64))  # (B, V, T)
    null = len(cache.meta["classes"])
    classes = torch.from_numpy(cache.labels[images[mine]]).masked_fill(dropped[mine], null)
    return Batch(tokens, classes, key_mask.view(B_all, V, T)[mine], positions)


# ---- The training step: Figure 3 of the paper --------------------------------------------------------------

class Objective(nn.Module):
    """Student, projector and teacher, and what a step makes of them: Eq. 8 on a batch.

    One module, so that DDP averages the gradients of model and projector together, and torch.compile makes
    one graph of networks and losses, which never stores the logits, the largest tensor, in float32.
    """

    def __init__(self, config: Config, student: Transformer):
        super().__init__()
        self.config = config
        self.student = student
        self.projector = losses.projector(student.config.dim) if config.contrast else nn.Identity()
        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)  # no dropout, ever

    def forward(self, tokens, classes, key_mask, positions) -> dict[str, torch.Tensor]:
        """The four parts of a `Batch` -> {"loss": Eq. 8, "loss_ar": its first term, ..., "acc_step": ...}."""
        V, depth, last = self.config.views, self.config.depth, self.student.config.n_layer
        mim_on, step_on, view_on = (term in self.config.terms for term in ("mim", "step", "view"))
        tokens = tokens.flatten(0, 1)  # (B V, T): all views in one batch
        inputs = tokens[:, :-1], classes.repeat_interleave(V)  # x_1 ... x_{T-1} and c, of each view

        mask = key_mask.flatten(0, 1) if mim_on else None  # our choice: hide keys exactly when L_MIM is on
        logits, features, _ = self.student(*inputs, key_mask=mask, layers=(depth, last))
        terms, log = {"ar": losses.ar_loss(logits, tokens)}, {}  # Eq. 2, under the mask of Eq. 3
        if mim_on or self.config.contrast:
            with torch.no_grad():  # no key masked, no gradient, no logits; blocks as far as needed
                layers = (depth, last) if mim_on else (depth,)
                targets = self.teacher(*inputs, layers=layers, head=False).hidden
        if mim_on:
            terms["mim"] = losses.mim_loss(features[last], targets[last])  # Eq. 4
        if self.config.contrast:
            def by_slot(x):  # (B V, K, C) -> (V, K, B, C)
                return x.unflatten(0, (-1, V)).permute(1, 2, 0, 3)

            z = by_slot(self.projector(features[depth][:, positions]))  # (V, K, B, C), Eq. 5
            target = losses.gather_images(by_slot(targets[depth][:, positions]), dim=2)  # (V, K, B_all, C)
            tau = self.config.temperature
            if step_on:  # Eq. 6
                terms["step"], log["acc_step"] = losses.step_loss(z, target, tau)
            if view_on:  # Eq. 7
                terms["view"], log["acc_view"] = losses.view_loss(z, target, tau)
            log["acc_label"] = losses.label_accuracy(losses.gather_images(classes, dim=0))
        total = losses.total_loss(terms, self.config.alpha, self.config.beta)  # Eq. 8
        return {"loss": total} | {f"loss_{name}": term for name, term in terms.items()} | log


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Constant (LlamaGen) or half a cosine down to 5 % (our choice); times a ramp while warming up."""
    rate = config.base_lr * config.batch / 256 * min(1, (step + 1) / max(config.warmup, 1))
    cosine = 0.05 + 0.95 * ((1 + math.cos(math.pi * step / steps)) / 2)
    return rate if config.schedule == "constant" else rate * cosine


def ema_decay(config: Config, step: int, steps: int) -> float:
    """paper: constant 0.9999, which takes some 10^5 steps. our choice for short runs: BYOL's ramp to 1."""
    left = (1 + math.cos(math.pi * step / steps)) / 2 if config.ema_ramp else 1
    return 1 - (1 - config.ema) * left


def make_optimizer(objective: Objective, config: Config) -> torch.optim.Optimizer:
    """AdamW over student and projector.

    LlamaGen: matrices are decayed, embeddings included, norms and biases are not; beta2 = 0.95 (the paper
    prints 0.05 beside "same setting as LlamaGen": a typo).
    """
    trained = [p for p in objective.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.ndim >= 2], weight_decay=config.weight_decay),
              dict(params=[p for p in trained if p.ndim < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


# ---- Starting and resuming ---------------------------------------------------------------------------------

class Run(NamedTuple):
    """What a run consists of."""
    config: Config
    rank: int
    world: int  # processes
    device: torch.device
    bfloat16: bool  # whether to run the networks in it, under autocast
    vq: tokenizer.VQModel
    cache: tokenizer.TokenCache
    held_out: tokenizer.TokenCache
    objective: Objective
    optimizer: torch.optim.Optimizer
    start: int  # steps done before
    steps: int  # to do in all


def refuse_used_folder(config: Config) -> None:
    """Raise ValueError or OSError if a new run cannot be written to its folder."""
    if any((config.folder / name).exists() for name in ("checkpoint.pt", "previous.pt", "metrics.jsonl")):
        raise ValueError(f"{config.folder} exists; go on with it (--resume), delete it or choose another "
                         "--name.")
    tokenizer.check_output(config.folder / "checkpoint.pt")


def read_checkpoint(folder: Path) -> dict:
    """The latest checkpoint in `folder`. Raises FileNotFoundError or ValueError if it is of no use."""
    path, previous = folder / "checkpoint.pt", folder / "previous.pt"
    if not path.exists() and not previous.exists():
        there = sorted(other.parent.name for other in Path("runs").glob("*/checkpoint.pt"))
        raise FileNotFoundError(f"nothing to resume in {folder}; --name can be one of {there}.")
    try:
        return sample.load_checkpoint(path, whole=True)
    except (ValueError, OSError) as error:
        if previous.exists():
            raise ValueError(f"{error} The checkpoint before it is kept: rename {previous} to checkpoint.pt "
                             "and resume.") from None
        raise


def resumed_config(config: Config, given: dict, checkpoint: dict) -> Config:
    """The settings that the run began with; ValueError if those given by hand or the tokenizer are others."""
    folder, begun = config.folder, checkpoint["config"]
    kinds = {field.name: type(field.default) for field in fields(Config)}
    if begun.keys() != kinds.keys() or not all(isinstance(begun[name], kinds[name]) for name in kinds):
        raise ValueError(f"{folder} was begun by another version of train.py; go on with that.")
    saved = replace(Config(**begun), name=config.name, device=config.device, compile=config.compile)
    may_change = {"data", "subset", "tokenizer", "cache", "log_every"}
    for name in given.keys() - may_change:
        if getattr(saved, name) != given[name]:
            raise ValueError(f"{folder} has {name} = {getattr(saved, name)}, not {given[name]}; choose "
                             "another --name for new settings.")
    saved = replace(saved, **given)
    if given.get("tokenizer") in (None, "shipped", "train"):  # made already
        own = folder / "tokenizer.pt"
        saved.tokenizer = str(own) if own.exists() else begun["tokenizer"]
    vq = tokenizer.load_tokenizer(saved.tokenizer)
    if tokenizer.fingerprint(vq) != checkpoint["data"].get("tokenizer"):
        raise ValueError(f"{saved.tokenizer} is not the tokenizer that {folder} was trained with; name that "
                         "with --tokenizer FILE.")
    return saved


def check_data(config: Config, cache: tokenizer.TokenCache, checkpoint: dict) -> None:
    """Raise ValueError if there are too few images or positions, or other codes than the run began with."""
    images, behind = int((cache.labels >= 0).sum()), cache.tokens.shape[2] - 1
    if images < config.batch:
        raise ValueError(f"{config.data} has {images} training images, fewer than --batch {config.batch}.")
    if config.positions > behind:
        raise ValueError(f"--positions {config.positions}: an image has {behind} behind the class.")
    before = checkpoint.get("data", cache.meta)
    if others := [key for key in cache.meta if str(cache.meta[key]) != str(before.get(key))]:
        raise ValueError(f"{config.folder} was trained on other data than {config.data} gives now (another "
                         f"{', '.join(others)}); name its images with --data.")


def load_state(path: str | Path, part: nn.Module | torch.optim.Optimizer, state: dict) -> None:
    """Give `part`, a module or an AdamW, the `state` read from `path`; ValueError if it does not fit."""
    with tokenizer.reading(path, f"file for this {type(part).__name__}"):
        if isinstance(part, nn.Module):
            part.load_state_dict(state)
            return
        part.load_state_dict(part.state_dict() | {"state": state["state"]})  # its settings stay
        trained = [p for group in part.param_groups for p in group["params"]]
        for p in trained if part.state else []:  # empty before the first step; torch compares nothing of it
            shapes = {name: value.shape for name, value in part.state[p].items()}
            if shapes != {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}:
                raise ValueError("an optimizer state of another structure")


class Prepared(NamedTuple):
    """What `prepare` found or made."""
    data: str  # the images: a folder, a zip, or "shapes"
    subset: str  # the list of their classes to keep, or ""
    tokenizer: str  # file
    suffix: str  # of the run's name: "-shapes" where they stand in for Tiny ImageNet, else ""
    vq: tokenizer.VQModel
    train: tokenizer.TokenCache  # all crops of the training images
    held_out: tokenizer.TokenCache  # centre crops alone


def prepare(settings, device: torch.device, store) -> Prepared:
    """From image set to token caches, as train.py needs them; `settings` has the fields of its Config.

    Rank 0 finds the images and trains the tokenizer if there is none; all processes encode. They agree
    through `store`, in which a key can be waited for without limit.
    Raises ValueError or OSError, in one sentence, for data that cannot be used.
    """
    rank = tokenizer.rank_and_world()[0]

    def from_first(key, make):  # what rank 0 makes, for all processes
        if rank == 0:
            store.set(key, json.dumps(make()))
        store.wait([key], timedelta(days=30))
        return json.loads(store.get(key))

    def find():
        data = tokenizer.find_images(settings.data)
        stand_in = data == "shapes" != settings.data
        subset = "" if stand_in else settings.subset
        images = tokenizer.open_images(data, "train", subset)
        print(images.summary)
        path = str(tokenizer.find_tokenizer(settings, images, device))
        return data, subset, path, "-shapes" if stand_in else ""

    data, subset, path, suffix = from_first("found", find)
    vq = tokenizer.load_tokenizer(path, device)
    images, held_out = (tokenizer.open_images(data, split, subset) for split in ("train", "val"))
    size = settings.image_size
    if rank == 0 and settings.tokenizer in ("shipped", "train"):
        tokenizer.print_quality(path, vq, held_out, size)
    train = tokenizer.token_cache(images, vq, size, settings.crop_ratios, settings.cache)
    return Prepared(data, subset, path, suffix, vq, train,
                    tokenizer.token_cache(held_out, vq, size, (), settings.cache))


def set_up(config: Config, given: dict, resume: bool, held: ExitStack) -> Run:
    """Everything before the first step, from data to models; also joins the processes.

    Rank 0 locks the run's folder until `held` is closed. Raises ValueError or OSError for a user's mistake.
    """
    rank, world = tokenizer.rank_and_world()
    device = tokenizer.choose_device(config.device)
    # no process group yet: rank 0 may train a tokenizer for an hour; a key can be waited for that long
    store = dist.HashStore() if world == 1 else next(iter(dist.rendezvous("env://")))[0]
    checkpoint, init = {}, None
    if resume:
        if rank == 0 and config.folder.is_dir():
            held.enter_context(tokenizer.locked(config.folder))
        checkpoint = read_checkpoint(config.folder)
        config = resumed_config(config, given, checkpoint)
    elif rank == 0:
        refuse_used_folder(config)
    check_config(config, world)
    if config.init and not resume:
        init = sample.load_model(config.init, image_size=config.image_size)[0]
    found = prepare(config, device, store)
    cache = found.train
    config = replace(config, data=found.data, subset=found.subset, tokenizer=found.tokenizer,
                     name=config.name + found.suffix * (not resume))
    check_data(config, cache, checkpoint)
    if rank == 0 and not resume:
        held.enter_context(tokenizer.locked(config.folder))
        refuse_used_folder(config)  # again: prepare may have renamed the run, or another has come first

    torch.manual_seed(config.seed)
    student = Transformer(ModelConfig(
        *SIZES[config.model], vocab_size=cache.meta["codebook_size"], num_classes=len(cache.meta["classes"]),
        num_tokens=cache.tokens.shape[2], dropout=config.dropout))
    if init is not None:
        if replace(init.config, dropout=config.dropout) != student.config:
            raise ValueError(f"--init {config.init} is {init.config}, but this run needs {student.config}.")
        student.load_state_dict(init.state_dict())
    objective = Objective(config, student).to(device)
    optimizer = make_optimizer(objective, config)
    if resume:
        for part, name in ((student, "model"), (objective.teacher, "ema"),
                           (objective.projector, "projector"), (optimizer, "optimizer")):
            load_state(config.folder / "checkpoint.pt", part, checkpoint[name])
    if world > 1:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    bfloat16 = sample.has_bfloat16(device)
    if device.type == "cuda" and rank == 0 and not bfloat16:
        print("!! This GPU is too old for bfloat16 (Ampere is the first): training in float32, slower.")
    steps_per_epoch = int((cache.labels >= 0).sum()) // config.batch
    return Run(config, rank, world, device, bfloat16, found.vq, cache, found.held_out, objective, optimizer,
               checkpoint.get("step", 0), config.steps or config.epochs * steps_per_epoch)


# ---- The loop ----------------------------------------------------------------------------------------------

def batches(run: Run) -> Iterator[Batch]:
    """This process's batches of all steps to come, on its device: no step waits for its batch."""
    def prepared(step):
        batch = draw_batch(run.config, run.cache, step, run.rank, run.world)
        if run.device.type == "cuda":  # from pinned memory a copy does not hold up the host
            batch = Batch(*(x.pin_memory() for x in batch))
        return Batch(*(x.to(run.device, non_blocking=True) for x in batch))

    return tokenizer.read_ahead(map(prepared, range(run.start, run.steps)))


def train_step(run: Run, forward: nn.Module, batch: Batch, step: int) -> dict[str, torch.Tensor]:
    """One optimizer step, the EMA update included; returns what to log. `forward` wraps run.objective.

    Nothing in here waits for the device.
    """
    config, micro, log = run.config, run.config.accumulate, {}
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, step, run.steps)
    torch.manual_seed(seed_of(config.seed, 2, step, run.rank))  # dropout
    pieces = zip(batch.tokens.chunk(micro), batch.classes.chunk(micro), batch.key_mask.chunk(micro))
    for number, piece in enumerate(pieces, 1):
        with forward.no_sync() if run.world > 1 and number < micro else nullcontext():  # average once
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.bfloat16):
                values = forward(*piece, batch.positions)
            (values["loss"] / micro).backward()
        log = {name: log.get(name, 0) + value.detach() / micro for name, value in values.items()}
    log["grad_norm"] = nn.utils.clip_grad_norm_(run.objective.parameters(), config.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    decay = ema_decay(config, step, run.steps)
    losses.update_ema(run.objective.teacher, run.objective.student, decay)  # after theta has moved
    return log


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """L_AR on the centre crops of held-out images, nothing hidden, nats per token; equal on all processes."""
    cache, model = run.held_out, run.objective.student.eval()
    rows = np.random.default_rng(0).permutation(np.flatnonzero(cache.labels >= 0))[:run.config.eval_images]
    total = torch.zeros((), device=run.device)
    for i in range(run.rank * 64, len(rows), run.world * 64):
        chunk = rows[i:i + 64]
        tokens = torch.from_numpy(cache.tokens[chunk, 0].astype(np.int64)).to(run.device)
        logits = model(tokens[:, :-1], torch.from_numpy(cache.labels[chunk]).to(run.device)).logits
        total += losses.ar_loss(logits, tokens) * len(chunk)
    model.train()
    if run.world > 1:
        dist.all_reduce(total)
    return (total / len(rows)).item()


def summarise(run: Run, history: list[dict], done: int, stop: bool) -> tuple[dict[str, float], bool]:
    """Logs of the steps up to `done` -> {name: mean over steps and processes}; and whether one wants to stop.

    Here the host waits for the device. Raises ValueError naming the first step and value that is not finite.
    """
    names, first = list(history[0]), done - len(history) + 1
    values = torch.stack([torch.stack(list(log.values())) for log in history])  # (steps, names)
    stops = values.new_tensor(float(stop))
    if run.world > 1:
        dist.all_reduce(values)
        dist.all_reduce(stops)
    if bad := (~values.isfinite()).nonzero().tolist():
        step, name = bad[0]
        raise diverged(run, f"{names[name]} of step {first + step}")
    sums = sum(values).tolist()
    return {name: total / len(history) / run.world for name, total in zip(names, sums)}, stops.item() > 0


def diverged(run: Run, what: str) -> ValueError:
    """What ends a run before it saves anything that is not finite."""
    return ValueError(f"{what} is not finite; {run.config.folder}/checkpoint.pt is from before that. Start "
                      "again under another --name, with a lower --base-lr or a longer --warmup.")


def save(run: Run, step: int) -> None:
    """Write checkpoint.pt, all that --resume and the other scripts need, then a grid of samples if wanted.

    The checkpoint before it is kept as previous.pt.
    """
    config, student, path = run.config, run.objective.student, run.config.folder / "checkpoint.pt"
    content = {
        "model": student.state_dict(), "ema": run.objective.teacher.state_dict(),
        "projector": run.objective.projector.state_dict(), "optimizer": run.optimizer.state_dict(),
        "step": step, "config": asdict(config), "data": run.cache.meta,
        "model_config": asdict(student.config)}
    if path.exists():  # copied, not renamed: whenever a kill comes, checkpoint.pt is whole
        with open(path, "rb") as last:
            tokenizer.write_file(path.with_name("previous.pt"), lambda file: shutil.copyfileobj(last, file))
    tokenizer.write_file(path, lambda file: torch.save(content, file))
    if config.samples and step > 0:
        grid = path.with_name("samples") / f"{step:07d}.png"
        sample.save_samples(grid, student.eval(), run.vq, config.samples, run.cache.meta["classes"],
                            config.seed, cfg=config.sample_cfg)
        student.train()


def open_folder(run: Run) -> None:
    """Fill runs/<name> for a new run, or cut the metrics of a resumed one back to its checkpoint.

    Raises ValueError if a line of metrics.jsonl is damaged.
    """
    folder, metrics, kept = run.config.folder, run.config.folder / "metrics.jsonl", []
    before = metrics.read_text(errors="replace") if metrics.exists() else ""
    for text in before.splitlines(keepends=True):
        try:
            if text.endswith("\n") and json.loads(text)["step"] <= run.start:  # a kill may leave half a line
                kept.append(text)
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{metrics} is damaged; delete this line of it: {text.strip()[:60]!r}") from None
    if not (folder / "checkpoint.pt").exists():
        if sum(p.numel() for p in run.vq.parameters()) < 5e6:  # so that a run that is moved still samples
            tokenizer.save_tokenizer(folder / "tokenizer.pt", run.vq)
            sample.save_reconstructions(folder / "reconstructions.png", run.vq, run.config.data,
                                        run.config.subset, run.config.image_size)
        save(run, 0)
    tokenizer.write_file(metrics, lambda file: file.write("".join(kept).encode()))
    settings = json.dumps(asdict(run.config), indent=1).encode()
    tokenizer.write_file(folder / "config.json", lambda file: file.write(settings))


def wrapped(run: Run) -> nn.Module:
    """run.objective: in DDP if there are several processes, and compiled if that is wanted and possible."""
    forward = run.objective
    if run.world > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True, broadcast_buffers=False)
    # Triton needs a C compiler, on a CPU Inductor one of C++
    variable, *names = ("CC", "gcc", "clang") if run.device.type == "cuda" else ("CXX", "g++", "clang++")
    compiler = os.environ.get(variable) or any(map(shutil.which, names))
    if run.config.compile and compiler:
        return torch.compile(forward)
    if run.config.compile and run.rank == 0:
        print("!! torch.compile needs a compiler (install gcc and g++): training without it, slower.")
    return forward


def train(run: Run, caught: list[int]) -> None:
    """All steps of a run, with logs, validation, pictures, checkpoints; a signal makes it save and exit."""
    config, forward = run.config, wrapped(run)
    if run.rank == 0:
        open_folder(run)
    tokens_per_step = config.batch * config.views * run.cache.tokens.shape[2]
    bar = tokenizer.progress(batches(run), config.name, run.steps, initial=run.start)
    history = []  # what the steps since the last line logged
    done, stop = run.start, False
    for batch in bar:
        history.append(train_step(run, forward, batch, done))
        done += 1
        if done == run.start + 1:  # the first step compiles: wait for it, and leave it out of the speed
            history[0]["loss"].item()
            since, clock = done, time.time()
        due = done % config.save_every == 0 or done == run.steps
        asked = bool(caught) and run.world == 1  # several processes agree in `summarise`
        if not (due or asked or done % config.log_every == 0):
            continue
        means, stop = summarise(run, history, done, bool(caught))
        line = {"step": done} | means | {"lr": run.optimizer.param_groups[0]["lr"]}
        if "acc_label" in line:
            line["negatives"] = config.batch // config.accumulate - 1
        if done > since:
            line["tokens_per_second"] = (done - since) * tokens_per_step / (time.time() - clock)
        if run.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 2 ** 30
        if due:
            line["val_nll"] = validation_loss(run)
            if not math.isfinite(line["val_nll"]):
                raise diverged(run, f"the held-out loss after step {done}")
        if run.rank == 0:
            speed = line.get("tokens_per_second", 0)
            bar.set_postfix_str(f"ar {line['loss_ar']:.3f}, {speed:,.0f} tokens/s", refresh=False)
            with open(config.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
            if due:
                sample.save_curves(config.folder / "loss.png", config.folder / "metrics.jsonl")
            if due or stop:
                save(run, done)
        if stop:
            break
        history, since, clock = [], done, time.time()  # nor are validation, saving and pictures in the speed
    if run.world > 1:
        dist.barrier()  # or torchrun, seeing others leave, would kill rank 0 while it saves
    if run.rank == 0 and done == run.steps:
        print(f"Done: {config.folder}/ holds checkpoint.pt, metrics.jsonl and the pictures.")
    elif run.rank == 0:
        print(f"Saved after step {done}. To go on: train.py --resume --name {config.name}")
    if done < run.steps:
        sys.exit(130)  # as for Ctrl-C


@tokenizer.enough_memory("raise --accumulate in a new run, or lower --batch, --image-size or --model")
def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`, by default the process's own.

    Raises ValueError or OSError for a user's mistake, SystemExit for argparse's, or after a signal.
    """
    with ExitStack() as held:
        run = set_up(*parse_arguments(argv), held)
        caught = []  # a signal is noted, and obeyed between two steps
        for kind in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(kind, lambda number, frame: caught.append(number))
            held.callback(signal.signal, kind, before)
        try:
            train(run, caught)
        except RuntimeError:
            if run.world > 1:
                time.sleep(5)  # if another process has died, torchrun ends this one too, by SIGTERM
                if caught:
                    raise ConnectionError("another process of this run died; --resume goes on from the last "
                                          f"checkpoint in {run.config.folder}.") from None
            raise
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    tokenizer.run_script(main, "The same command goes on; an unfinished download or tokenizer begins again.")
