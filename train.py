"""Train ST-AR (arXiv 2509.15185), or its plain autoregressive baseline, on the codes of an image set.

Whatever is missing is made on the way: the images are found or downloaded, a tokenizer is taken or trained,
and the codes of each image's crops, ten per crop ratio, are cached. The model is in model.py, the losses are
in losses.py. This file brings them together: settings, batches, the training step, the loop and, at the end,
`main`.

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
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
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
Natural = Annotated[int, 0, math.inf]
Positive = Annotated[float, 1e-12, math.inf]
Weight = Annotated[float, 0, math.inf]
Share = Annotated[float, 0, 1]


@dataclass
class Config:
    """Every setting of a run. A field is a flag, its comment the help text; a preset changes the defaults."""
    preset: str = "tiny"  # the defaults of all settings below
    name: str = ""  # run folder below runs/; default: the preset, with the losses if not all are on
    # data
    data: str = ""  # folder or zip of images, or shapes, which are drawn; default: Tiny ImageNet, fetched
    subset: str = ""  # text file with the class folders to keep, one per line; default: all
    tokenizer: str = "train"  # a file, or shipped (with the code), or train (one for these images)
    tokenizer_steps: Count = 20000  # training steps of that tokenizer
    codes: Annotated[int, 2, 65535] = 1024  # codebook size of that tokenizer
    image_size: Annotated[int, 8, 4096] = 32  # side of the square crops, pixels
    crop_ratios: Annotated[float, 1, 10] = (1.1,)  # the image is enlarged by each, and ten crops are taken
    cache: str = "cache"  # folder for tokenizers and token caches
    # model
    model: str = "tiny"  # a row of model.SIZES
    dropout: Annotated[float, 0, 0.9] = 0.1  # LlamaGen: of tokens, attention and feed-forward outputs
    # method
    losses: str = "ar+mim+step+view"  # the terms of Eq. 8
    views: Count = 2  # paper: views of each image in a batch (V)
    mask_ratio: Annotated[float, 0, 0.99] = 0.25  # paper: share of keys hidden from the student (r), with mim
    positions: Count = 4  # paper: positions sampled for the contrastive losses (K)
    depth: Count = 3  # the block that the contrastive losses compare; paper: the middle one
    alpha: Weight = 1.0  # paper: weight of L_MIM
    beta: Weight = 0.5  # paper: weight of (L_step + L_view) / 2
    temperature: Annotated[float, 1e-3, 1e3] = 0.2  # our choice: of InfoNCE; the paper prints none
    ema: Share = 0.99  # decay of the teacher (m); paper: 0.9999
    ema_ramp: bool = True  # our choice for short runs: raise the decay to 1 along half a cosine
    class_dropout: Share = 0.1  # LlamaGen: share of labels made the null class, for guidance
    # optimisation
    epochs: Count = 50  # passes over the images, each without the last batch if that is not a full one
    steps: Natural = 0  # optimizer steps; 0: as many as the epochs take
    batch: Count = 256  # LlamaGen: images per step, over all processes
    accumulate: Count = 1  # micro-batches per step; the negatives of an image are in its micro-batch
    base_lr: Positive = 1e-3  # the learning rate is base_lr * batch / 256
    warmup: Natural = 100  # steps of linear warm-up
    schedule: str = "cosine"  # cosine (down to 5 %) or constant
    weight_decay: Weight = 0.05  # LlamaGen: decay of matrices, embeddings included
    clip: Positive = 1.0  # LlamaGen: largest gradient norm
    # run
    seed: Annotated[int, 0, 2 ** 32 - 1] = 0  # of everything random but tokenizer and held-out images
    device: str = ""  # cpu, cuda or cuda:N; default: cuda if there is one
    compile: bool = True  # torch.compile; by default on a GPU, and for tiny on a CPU
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
    "nano": dict(data="shapes", tokenizer="shipped", codes=256, model="nano", depth=2, steps=2000, batch=32,
                 base_lr=2e-3 * 256 / 32, warmup=50, save_every=100, eval_images=200),  # a rate of 2e-3
    "tiny": dict(tokenizer="shipped", batch=512, base_lr=5e-4, warmup=500, save_every=2000),
    "small": dict(tokenizer="shipped", image_size=64, model="small", depth=6, ema=0.996, base_lr=8e-4,
                  warmup=1000),
    "B": PAPER | dict(model="B"),
    "L": PAPER | dict(model="L", depth=18),  # paper: layer 18 of 24, although it calls it the middle
    "XL": PAPER | dict(model="XL", depth=18),
}
CHOICES = {"preset": list(PRESETS), "model": list(SIZES), "schedule": ["cosine", "constant"],
           "losses": ["ar", "ar+mim", "ar+step", "ar+view", "ar+mim+step", "ar+mim+view", "ar+step+view",
                      Config.losses]}
TWENTY = "assets/tiny-imagenet-20.txt"  # classes of Tiny ImageNet: a tenth of the time to encode
ON_CPU = {  # what these presets change on a CPU, where they would take days
    "tiny": dict(subset=TWENTY, model="nano", depth=2, dropout=0.0, steps=5000, batch=32, compile=True,
                 base_lr=2e-3 * 256 / 32, warmup=100, save_every=500, eval_images=1000),
    "small": dict(subset=TWENTY, dropout=0.0, steps=300, batch=8, base_lr=1e-3 * 256 / 8, warmup=50,
                  save_every=100, eval_images=50),
}


def parse_arguments(argv: list[str] | None) -> tuple[Config, dict, bool]:
    """(config, flags given by hand, whether to resume). Raises SystemExit or ValueError for a bad flag."""
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     usage="train.py [--preset NAME] [--resume] [--SETTING VALUE ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resume", action="store_true", default=False, help="go on where the run stopped")
    # The comment behind each field of Config is its help text
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.M))
    by_preset = set().union(*PRESETS.values(), *ON_CPU.values())
    for field in fields(Config):
        if field.type is bool:
            how = dict(action=argparse.BooleanOptionalAction)
        elif field.type is str:
            how = dict(choices=CHOICES.get(field.name))
        else:  # Annotated[int, 1, inf]: the kind, the lowest and the highest value
            how = dict(type=tokenizer.within(field.type.__origin__, *field.type.__metadata__))
        if isinstance(field.default, tuple):
            how["nargs"] = "+"
        default = "by preset, see PRESETS in train.py" if field.name in by_preset else field.default
        text = comments[field.name] + (f" (default: {default})" if default != "" else "")
        parser.add_argument("--" + field.name.replace("_", "-"), help=text.replace("%", "%%"), **how)
    given = vars(parser.parse_args(argv))
    resume = given.pop("resume")
    if "crop_ratios" in given:
        given["crop_ratios"] = tuple(given["crop_ratios"])
    if "epochs" in given:  # counts, even where a preset names a number of steps
        given.setdefault("steps", 0)

    preset = given.get("preset", Config.preset)
    device = tokenizer.choose_device(given.get("device", "")).type
    settings = PRESETS[preset] | {"device": device, "compile": device == "cuda"}
    if device == "cpu":
        settings |= ON_CPU.get(preset, {})
    if "data" in given:  # the subset of a preset lists classes of Tiny ImageNet
        settings["subset"] = ""
    if given.keys() & {"codes", "tokenizer_steps"}:  # these ask for a tokenizer of one's own
        settings["tokenizer"] = "train"
    config = Config(**settings | given)
    if not config.name:
        config.name = preset if config.losses == Config.losses else "-".join([preset, *config.terms])
    if not re.fullmatch(r"\w[\w.+-]{0,99}", config.name):
        raise ValueError(f"--name {config.name!r} is a folder in runs/: use letters, digits, . _ + and -.")
    return config, given, resume


def check_config(c: Config, world: int) -> None:
    """Raise ValueError for settings that are not possible together."""
    n_layer, _, _ = SIZES[c.model]
    on, crops = c.terms, 10 * len(c.crop_ratios)
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
    """A seed that depends on `key` alone, so that no random state has to be saved.

    key[1] says what it is for: 0 the order of images, 1 a batch, 2 dropout.
    """
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@lru_cache(maxsize=2)
def image_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which one epoch visits the images, int64 (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, 0, epoch))).numpy()


class Batch(NamedTuple):
    """What one process needs for one step."""
    tokens: torch.Tensor  # (B, V, T) int64
    classes: torch.Tensor  # (B,) int64, the null class where the label was dropped
    key_mask: torch.Tensor  # (B, V, T) bool, True where a key is hidden from the student
    positions: torch.Tensor  # (K,) int64

    def chunk(self, count: int) -> list["Batch"]:
        """`count` micro-batches of B / count images, at the same positions."""
        parts = zip(self.tokens.chunk(count), self.classes.chunk(count), self.key_mask.chunk(count))
        return [Batch(*part, self.positions) for part in parts]


def draw_batch(config: Config, cache: tokenizer.TokenCache, step: int, rank: int, world: int) -> Batch:
    """The part of process `rank` of `world` in the batch of `step`, on the CPU.

    Views, label drops, masks and positions are drawn for the whole batch and then sliced, so that any number
    of processes sees the same.
    our choice: a label is dropped once per image, for student, teacher and all views alike; otherwise a
    student under the null class would be matched to features that contain the label.
    """
    B_all, V, T = config.batch, config.views, cache.tokens.shape[2]
    rows = np.flatnonzero(cache.labels >= 0)  # the images that could be read
    epoch, i = divmod(step, len(rows) // B_all)  # the i-th batch of its epoch
    order = image_order(config.seed, epoch, len(rows))
    images = rows[order[i * B_all:(i + 1) * B_all]]  # (B_all,), none twice: every negative is another image
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
    one graph of networks and losses, in which the logits, the largest tensor, are never stored in float32.
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
    left = (1 + math.cos(math.pi * step / steps)) / 2 if config.ema_ramp else 1  # falls from 1 to 0
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


class Run(NamedTuple):
    """What a run consists of."""
    config: Config
    rank: int
    world: int  # processes
    device: torch.device
    dtype: torch.dtype | None  # of the networks, under autocast; None: float32 without autocast
    vq: tokenizer.VQModel
    cache: tokenizer.TokenCache  # all crops of the training images
    held_out: tokenizer.TokenCache  # centre crops of the others
    objective: Objective
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # of the loss in float16; else it does nothing
    start: int  # steps done before
    steps: int  # to do in all


def backward(run: Run, objective: nn.Module, batch: Batch, average: bool) -> dict[str, torch.Tensor]:
    """Add the gradients of one micro-batch to those already there; returns what `Objective.forward` does.

    objective  run.objective, or what DDP and torch.compile have made of it
    average    whether DDP averages the gradients over all processes, which is needed once per step
    """
    local = objective.no_sync() if run.world > 1 and not average else nullcontext()
    with local:
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype is not None):
            values = objective(*batch)
        run.scaler.scale(values["loss"] / run.config.accumulate).backward()
    return values


def train_step(run: Run, objective: nn.Module, batch: Batch, step: int) -> dict[str, torch.Tensor]:
    """One optimizer step, the EMA update included; returns what to log. `objective`: see `backward`.

    Nothing in here makes the CPU wait for the GPU.
    """
    config, optimizer, scaler, log = run.config, run.optimizer, run.scaler, {}
    for group in optimizer.param_groups:  # a function of the step: resuming needs no state of a scheduler
        group["lr"] = learning_rate(config, step, run.steps)
    torch.manual_seed(seed_of(config.seed, 2, step, run.rank))  # dropout
    for number, piece in enumerate(batch.chunk(config.accumulate), 1):
        values = backward(run, objective, piece, average=number == config.accumulate)
        log = {name: log.get(name, 0) + value.detach() / config.accumulate for name, value in values.items()}
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(run.objective.parameters(), config.clip)
    # float16 gradients that overflow are infinite: GradScaler skips that step, so its norm is logged as 0
    log["grad_norm"] = norm.where(norm.isfinite(), 0) if scaler.is_enabled() else norm
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    decay = ema_decay(config, step, run.steps)
    losses.update_ema(run.objective.teacher, run.objective.student, decay)  # after theta has moved
    return log


# ---- The loop ----------------------------------------------------------------------------------------------

def train(run: Run, caught: list[int]) -> None:
    """All steps of a run, with logs, validation, pictures and checkpoints.

    caught  the signals received so far: as soon as there is one, save and exit
    Raises ValueError for a value that is not finite, before anything is saved.
    """
    config, folder, objective = run.config, run.config.folder, run.objective
    if run.world > 1:
        objective = DistributedDataParallel(objective, gradient_as_bucket_view=True)
    if config.compile and run.start < run.steps:
        objective = compiled(run, objective, load_batch(run, run.start))
    batches = tokenizer.read_ahead(load_batch(run, step) for step in range(run.start, run.steps))
    bar = tokenizer.progress(batches, config.name, run.steps, initial=run.start)
    done, history, clock = run.start, [], time.perf_counter()
    for batch in bar:
        history.append(train_step(run, objective, batch, done))
        done += 1
        due = done % config.save_every == 0 or done == run.steps
        stop = bool(caught) and run.world == 1  # several processes stop at the same step: see `signals`
        if not (due or stop or done % config.log_every == 0):
            continue
        # Means over the steps since the last line and over all processes; here the host waits for the device
        totals = sum(torch.stack(list(log.values())) for log in history)  # (names,)
        signals = torch.tensor(float(len(caught)), device=run.device)  # of all processes together
        if run.world > 1:
            dist.all_reduce(totals)
            dist.all_reduce(signals)
        stop = signals.item() > 0
        means = (totals.double() / len(history) / run.world).tolist()
        line = {"step": done} | dict(zip(history[0], means))
        line["lr"] = run.optimizer.param_groups[0]["lr"]
        if "acc_label" in line:
            line["negatives"] = config.batch // config.accumulate - 1
        tokens = len(history) * config.batch * config.views * run.cache.tokens.shape[2]
        line["tokens_per_second"] = tokens / (time.perf_counter() - clock)
        if run.device.type == "cuda":
            line["memory_gb"] = torch.cuda.max_memory_allocated() / 2 ** 30
        if due:
            line["val_nll"] = validation_loss(run)
        if bad := [name for name, value in line.items() if not math.isfinite(value)]:
            raise ValueError(f"{bad[0]} is not finite at step {done}; {folder}/checkpoint.pt is from before "
                             "that. Start again under another --name, with a lower --base-lr or a longer "
                             "--warmup.")
        if run.rank == 0:
            speed = f"{line['tokens_per_second']:,.0f} tokens/s"
            bar.set_postfix_str(f"ar {line['loss_ar']:.3f}, {speed}", refresh=False)
            with open(folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
            if due or stop:
                save(run, done)
            if due:  # last, since a picture that cannot be written must not cost the checkpoint
                sample.save_curves(folder / "loss.png", folder / "metrics.jsonl")
        if stop:
            break
        history, clock = [], time.perf_counter()  # validation and saving are not part of the speed
    if run.world > 1:
        dist.barrier()  # a stopped process exits with 130, and torchrun would end process 0 while it saves
    if run.rank == 0:
        print(f"Done: {folder}/ holds checkpoint.pt, metrics.jsonl and the pictures." if done == run.steps
              else f"Saved after step {done}. To go on: python train.py --resume --name {config.name}")
    if done < run.steps:
        sys.exit(130)  # as for Ctrl-C


def load_batch(run: Run, step: int) -> Batch:
    """The batch of `step` on this process's device; from pinned memory a copy does not hold up the host."""
    batch = draw_batch(run.config, run.cache, step, run.rank, run.world)
    if run.device.type == "cuda":
        batch = Batch(*(x.pin_memory() for x in batch))
    return Batch(*(x.to(run.device, non_blocking=True) for x in batch))


def compiled(run: Run, objective: nn.Module, batch: Batch) -> nn.Module:
    """`objective` through torch.compile; if that fails for any reason, a sentence, and `objective` as it is.

    It is tried on a micro-batch of `batch`. Nothing changes by that: the gradients are discarded, and dropout
    is seeded anew in each step. With several processes a failure is a ValueError instead, because the others
    may already be waiting for this one's images.
    """
    piece = batch.chunk(run.config.accumulate)[0]
    if run.rank == 0:
        print("Compiling the model, which takes a minute or two; --no-compile leaves it out.", flush=True)
    try:
        if run.device.type == "cpu" and torch.__version__ < (2, 7):  # PyTorch's issue 147848
            raise RuntimeError("before torch 2.7 it gets gradients wrong on one thread of a CPU")
        fast = torch.compile(objective)
        backward(run, fast, piece, average=False)["loss"].item()  # waits for the device
    except Exception as error:  # no compiler, no Triton, an old GPU ...
        failed = f"torch.compile fails here ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        if run.world > 1:
            raise ValueError(f"{failed}; add --no-compile.") from None
        print(f"!! {failed}: training without it, slower.")
        fast = objective
    run.optimizer.zero_grad()
    return fast


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """L_AR on the centre crops of held-out images, nothing hidden, nats per token; equal on all processes."""
    cache, model = run.held_out, run.objective.student.eval()
    rows = np.flatnonzero(cache.labels >= 0)
    rows = np.random.default_rng(0).permutation(rows)[:run.config.eval_images]  # the same ones every time
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


def states(run: Run) -> dict:
    """All that changes in training, under its name in a checkpoint."""
    objective = run.objective
    return {"model": objective.student, "ema": objective.teacher, "projector": objective.projector,
            "optimizer": run.optimizer, "scaler": run.scaler}


def save(run: Run, step: int) -> None:
    """Write checkpoint.pt, all that --resume and the other scripts need, and a grid of samples if wanted."""
    config, student, data = run.config, run.objective.student, run.cache.meta
    content = {name: part.state_dict() for name, part in states(run).items()}
    content |= {"step": step, "config": asdict(config), "data": data, "model_config": asdict(student.config)}
    tokenizer.write_file(config.folder / "checkpoint.pt", lambda file: torch.save(content, file))
    if config.samples and step > 0:
        sample.save_samples(config.folder / "samples" / f"{step:07d}.png", student.eval(), run.vq,
                            config.samples, data["classes"], config.seed, cfg=config.sample_cfg)
        student.train()


# ---- Starting and resuming ---------------------------------------------------------------------------------

def resumed_config(config: Config, given: dict, begun: dict) -> Config:
    """The settings with which a run was begun, except for those `given` by hand that are allowed to change.

    Raises ValueError if another one is given.
    """
    if begun.keys() != asdict(config).keys():  # not the settings that this file knows
        raise ValueError(f"{config.folder} was begun by another version of train.py; go on with that.")
    before = replace(Config(**begun), name=config.name, device=config.device,
                     tokenizer=str(config.folder / "tokenizer.pt"))
    if given.get("tokenizer") in ("shipped", "train"):  # it lies in the folder now
        given = given | {"tokenizer": before.tokenizer}
    may_change = {"compile", "data", "subset", "tokenizer", "cache", "log_every"}
    if before.schedule == "constant" and not before.ema_ramp:
        may_change |= {"epochs", "steps"}  # no step depends on how many there are
    for name in given:
        if name not in may_change and getattr(before, name) != given[name]:
            why = " and its learning rate or EMA decay follows that" if name in ("epochs", "steps") else ""
            raise ValueError(f"{config.folder} has {name} = {getattr(before, name)}, not {given[name]}{why}; "
                             "choose another --name for new settings.")
    return replace(before, **given)


@contextmanager
def noted_signals() -> Iterator[list[int]]:
    """A list of the signals that arrive inside: Ctrl-C, and those with which batch systems end a job."""
    caught, before = [], {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        kind = getattr(signal, name, None)  # Windows lacks the last two
        if kind and signal.getsignal(kind) != signal.SIG_IGN:  # what is ignored stays so, for nohup
            before[kind] = signal.signal(kind, lambda number, frame: caught.append(number))
    try:
        yield caught
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def ending_together() -> Iterator[None]:
    """A decorator of main: if another process has failed, wait until torchrun ends this one, too.

    Otherwise the sentence of the one that failed would be lost among the others' tracebacks.
    """
    try:
        yield
    except RuntimeError:  # what a collective raises when another process has gone
        if dist.is_initialized():
            time.sleep(5)
        raise


def from_first(make: Callable):
    """What `make()` returns in process 0, for all processes."""
    rank, world = tokenizer.rank_and_world()
    box = [make() if rank == 0 else None]
    if world > 1:
        dist.broadcast_object_list(box)
    return box[0]


def open_folder(run: Run) -> None:
    """Fill runs/<name> for a new run, or cut the metrics of a resumed one back to its checkpoint.

    Raises ValueError if metrics.jsonl is damaged.
    """
    config, folder = run.config, run.config.folder
    metrics, kept = folder / "metrics.jsonl", ""
    if run.start == 0:  # a new run, or one that was stopped before its first step was saved
        tokenizer.save_tokenizer(folder / "tokenizer.pt", run.vq)  # a run that is moved still samples
        sample.save_reconstructions(folder / "reconstructions.png", run.vq, config.data, config.subset,
                                    config.image_size)
        save(run, 0)
    elif metrics.exists():
        with tokenizer.reading(metrics, "list of metrics"):
            lines = metrics.read_text().splitlines(keepends=True)
            kept = "".join(line for line in lines if json.loads(line)["step"] <= run.start)
    tokenizer.write_file(metrics, lambda file: file.write(kept.encode()))
    settings = json.dumps(asdict(config), indent=1)
    tokenizer.write_file(folder / "config.json", lambda file: file.write(settings.encode()))


@tokenizer.enough_memory("raise --accumulate in a new run, or lower --batch, --image-size or --model")
@ending_together()
def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`, by default the process's own.

    Raises ValueError or OSError for a user's mistake, SystemExit for argparse's, or after a signal.
    """
    # Settings, and the processes that torchrun has started
    config, given, resume = parse_arguments(argv)
    rank, world = tokenizer.rank_and_world()
    device = tokenizer.choose_device(config.device)
    if world > 1:  # the others wait for up to a day: process 0 may train a tokenizer or write gigabytes
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    checkpoint = {"step": 0}
    if resume:
        checkpoint = tokenizer.read_weights(config.folder / "checkpoint.pt")
        if not {"optimizer", "config", "data"} <= checkpoint.keys():
            raise ValueError(f"{config.folder}/checkpoint.pt holds weights alone: no run can go on from it.")
        config = resumed_config(config, given, checkpoint["config"])
    check_config(config, world)
    data = from_first(lambda: tokenizer.find_images(config.data))
    if data == "shapes" and not config.data:  # in place of Tiny ImageNet, as the run's name then says
        config = replace(config, subset="", name=config.name + "-shapes")
    config.data = data

    # The run's folder: process 0 alone writes to it
    if rank == 0 and not resume and (config.folder / "checkpoint.pt").exists():
        raise ValueError(f"{config.folder} exists; go on with it (--resume), delete it or choose another "
                         "--name.")
    with tokenizer.locked(config.folder) if rank == 0 else nullcontext():
        # Images, tokenizer, codes
        images = tokenizer.open_images(data, "train", config.subset)
        held_out_images = tokenizer.open_images(data, "val", config.subset)
        config.tokenizer = str(from_first(lambda: tokenizer.find_tokenizer(config, images, device)))
        vq = tokenizer.load_tokenizer(config.tokenizer, device)
        meta = tokenizer.cache_meta(images, vq, config.image_size, config.crop_ratios)
        if changed := [key for key in meta if resume and meta[key] != checkpoint["data"].get(key)]:
            raise ValueError(f"{config.folder} was trained on other codes (another {', '.join(changed)}); "
                             "name its images and tokenizer with --data, --subset and --tokenizer.")
        cache = tokenizer.token_cache(images, vq, config.image_size, config.crop_ratios, config.cache)
        held_out = tokenizer.token_cache(held_out_images, vq, config.image_size, (), config.cache)
        readable, T = int((cache.labels >= 0).sum()), cache.tokens.shape[2]
        steps = config.steps or readable // config.batch * config.epochs
        if readable < config.batch:
            raise ValueError(f"{data} has {readable} training images, fewer than --batch {config.batch}.")
        if checkpoint["step"] > steps:
            raise ValueError(f"{config.folder} has done {checkpoint['step']} steps, more than {steps}.")
        if config.positions >= T:
            raise ValueError(f"--positions {config.positions}: an image has {T - 1} after the class.")

        # Student, teacher, optimizer
        torch.manual_seed(config.seed)
        student = Transformer(ModelConfig(
            *SIZES[config.model], vocab_size=meta["codebook_size"], num_classes=len(images.classes),
            num_tokens=T, dropout=config.dropout))
        objective = Objective(config, student).to(device)  # it also makes the teacher, a copy of the student
        optimizer = make_optimizer(objective, config)
        dtype = None
        if device.type == "cuda":  # Ampere is the first with bfloat16; float16 needs the loss scaled
            bfloat16 = from_first(lambda: sample.has_bfloat16(device))  # one for all processes
            dtype = torch.bfloat16 if bfloat16 else torch.float16
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        run = Run(config, rank, world, device, dtype, vq, cache, held_out, objective, optimizer, scaler,
                  checkpoint["step"], steps)
        if resume:
            with tokenizer.reading(config.folder / "checkpoint.pt", "checkpoint of this model"):
                for name, part in states(run).items():
                    if checkpoint[name]:  # the scaler's is empty unless it was in use
                        part.load_state_dict(checkpoint[name])

        # The loop
        if rank == 0:
            size = sum(p.numel() for p in student.parameters()) / 1e6
            print(f"On a {'GPU' if device.type == 'cuda' else 'CPU'} --preset {config.preset} trains model "
                  f"{config.model} ({size:.2f}M parameters) on {readable:,} images of {len(images.classes)} "
                  f"classes ({', '.join(images.classes[:3])} ...) for {steps:,} steps of {config.batch} "
                  "images.")
            open_folder(run)
        with noted_signals() as caught:
            train(run, caught)
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    tokenizer.run_script(main, "The same command goes on; an unfinished download or tokenizer begins again.")
