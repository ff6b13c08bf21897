"""Train ST-AR (arXiv 2509.15185), or its plain autoregressive baseline, on the codes of an image set.

Whatever is missing is made on the way: images are found or downloaded, a tokenizer is trained, the codes of
ten crops per image are cached. The model is in model.py, the losses are in losses.py; here is the loop.

    python train.py --preset nano                                     # built-in images, minutes on a CPU
    torchrun train.py --preset tiny                                   # Tiny ImageNet at 32 px
    torchrun --nproc-per-node 8 train.py --preset small --losses ar   # the baseline; or ar+mim, ar+mim+view
    python train.py --preset tiny --resume                            # go on where a run stopped

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
from model import SIZES, ModelConfig, Transformer, load_checkpoint, load_model

# ---- Settings ----------------------------------------------------------------------------------------------

@dataclass
class Config:
    """Every setting of a run. A field is a flag, its comment the help text; a preset changes the defaults."""
    name: str = ""  # run folder below runs/; default: the preset, with the losses if not all are on
    # data
    data: str = ""  # folder or zip of images, or: shapes; default: Tiny ImageNet, downloaded to data/
    subset: str = ""  # file that lists the class folders to keep, one per line; default: all
    tokenizer: str = ""  # tokenizer file; default: train one for these images
    tokenizer_steps: int = 20000  # training steps of that tokenizer
    codes: int = 1024  # codebook size of that tokenizer
    image_size: int = 32  # side of the square crops, pixels
    crop_ratios: tuple[float, ...] = (1.1,)  # the image enlarged by each of these gives ten crops, the views
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
    depth: int = 3  # the block whose outputs they compare
    alpha: float = 1.0  # weight of L_MIM
    beta: float = 0.5  # weight of (L_step + L_view) / 2
    temperature: float = 0.2  # of InfoNCE; the paper prints none
    ema: float = 0.99  # decay of the teacher (m)
    ema_ramp: bool = True  # raise the decay to 1 along half a cosine, for runs far shorter than the paper's
    class_dropout: float = 0.1  # share of labels replaced by the null class, for guidance
    # optimisation
    epochs: int = 50  # passes over the images
    steps: int = 0  # optimizer steps; 0: as many as the epochs take
    batch: int = 256  # images per step, over all processes
    accumulate: int = 1  # micro-batches per step; negatives then come from the micro-batch
    base_lr: float = 1e-3  # learning rate per 256 images; the rate is base_lr * batch / 256
    warmup: int = 100  # steps of linear warm-up
    schedule: str = "cosine"  # cosine (down to 5 %) or constant
    weight_decay: float = 0.05  # of matrices, embeddings included
    clip: float = 1.0  # largest gradient norm
    # run
    seed: int = 0  # of everything random
    device: str = ""  # cuda or cpu; default: cuda if there is one
    compile: bool = True  # torch.compile on cuda
    log_every: int = 10  # steps between lines of metrics.jsonl
    save_every: int = 500  # steps between checkpoints, validation losses and sample grids
    eval_images: int = 2000  # held-out images for the validation loss
    samples: int = 40  # images in a sample grid; 0: none
    sample_cfg: float = 2.0  # guidance scale of the sample grid


PAPER = dict(image_size=256, crop_ratios=(1.1, 1.05), ema=0.9999, ema_ramp=False, base_lr=1e-4, warmup=0,
             schedule="constant", samples=8, sample_cfg=4.0, save_every=5000)  # with the defaults above
PRESETS = {
    "nano": dict(data="shapes", codes=256, tokenizer_steps=400, model="nano", depth=2, steps=600, batch=32,
                 base_lr=1.6e-2, warmup=50, save_every=100, eval_images=200),
    "tiny": dict(batch=512, base_lr=5e-4, warmup=500),
    "small": dict(image_size=64, model="small", depth=6, ema=0.996, base_lr=8e-4, warmup=1000),
    "B": dict(model="B", depth=6, **PAPER),
    "L": dict(model="L", depth=18, **PAPER),  # paper: layer 18 of 24, although it calls it the middle
    "XL": dict(model="XL", depth=18, **PAPER),
}
CHOICES = {"model": list(SIZES), "schedule": ["cosine", "constant"]}
ON_CPU = {  # what a CPU runs instead, said loudly
    "tiny": dict(tokenizer_steps=1500, dropout=0.0, steps=800, batch=24, base_lr=2.1e-2, warmup=50,
                 save_every=200, eval_images=250),
    "small": dict(tokenizer_steps=500, dropout=0.0, steps=300, batch=8, base_lr=3.2e-2, warmup=50,
                  save_every=100, eval_images=50),
}


def parse_arguments(argv: list[str]) -> tuple[Config, dict, bool]:
    """(config, flags given by hand, whether to resume); the flags are the fields of `Config`."""
    comments = dict(re.findall(r"^    (\w+): .*  # (.*)$", inspect.getsource(Config), re.M))
    parser = argparse.ArgumentParser(description=__doc__, argument_default=argparse.SUPPRESS,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="changes the defaults below")
    parser.add_argument("--resume", action="store_true", default=False, help="go on where the run stopped")
    for field in fields(Config):
        how = dict(action=argparse.BooleanOptionalAction) if field.type is bool else \
            dict(type=float, nargs="*") if field.name == "crop_ratios" else \
            dict(type=field.type, choices=CHOICES.get(field.name))
        shown = "" if field.default == "" else f" (default {field.default})"
        parser.add_argument("--" + field.name.replace("_", "-"), **how,
                            help=(comments[field.name] + shown).replace("%", "%%"))
    given = vars(parser.parse_args(argv))
    preset, resume = given.pop("preset"), given.pop("resume")
    given |= {"crop_ratios": tuple(given["crop_ratios"])} if "crop_ratios" in given else {}
    device = given.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    short = ON_CPU.get(preset, {}) if device == "cpu" and not resume else {}
    if short and tokenizer.rank_and_world()[0] == 0:
        print(f"!! No GPU: --preset {preset} runs a shortened schedule: {short}")
    config = Config(**PRESETS[preset] | short | {"device": device} | given)
    config.steps = 0 if "epochs" in given and "steps" not in given else config.steps
    suffix = "" if config.losses == Config.losses else "-" + config.losses.replace("+", "-")
    config.name = config.name or preset + suffix
    return config, given, resume


def check_config(c: Config, world: int) -> None:
    """Raise ValueError, in one sentence, for settings that cannot work."""
    on, layers, crops = c.losses.split("+"), SIZES[c.model][0], 10 * len(c.crop_ratios)
    for wrong, sentence in (
        (on[0] != "ar" or not set(on[1:]) <= {"mim", "step", "view"} or len(set(on)) < len(on),
         f"--losses {c.losses}: write ar, or ar plus some of mim, step, view, as in ar+mim+view"),
        (not 1 <= c.depth <= layers, f"--depth {c.depth}: model {c.model} has layers 1 ... {layers}"),
        (min(c.crop_ratios, default=0) < 1, "--crop-ratios are at least 1, and there is at least one"),
        (not 1 + ("view" in on) <= c.views <= crops,
         f"--views {c.views}: an image has {crops} crops, and the view loss compares at least 2"),
        ("step" in on and c.positions < 2, "the step loss compares at least 2 --positions"),
        (c.accumulate < 1 or c.batch < 1 or c.batch % (world * c.accumulate) > 0,
         f"--batch {c.batch} must be a multiple of {world} process(es) x {c.accumulate} micro-batch(es)"),
        (len(on) > 1 and c.batch < 2 * c.accumulate, "the added losses need 2 images at a time"),
        (not all(0 <= x <= 1 for x in (c.ema, c.class_dropout, c.dropout)),
         "--ema, --class-dropout and --dropout must lie in [0, 1]"),
        (min(c.temperature, c.base_lr, c.clip, c.log_every, c.save_every, c.eval_images) <= 0,
         "--temperature, --base-lr, --clip, --log-every, --save-every and --eval-images must be positive"),
        (c.image_size > 64 and not (c.data and c.tokenizer), "this preset needs --data DIR, ImageNet's, and "
         "--tokenizer vq_ds16_c2i.pt, published at huggingface.co/FoundationVision/LlamaGen"),
        (c.device.startswith("cuda") and not torch.cuda.is_available(), "--device cuda: no CUDA device here"),
    ):
        if wrong:
            raise ValueError(sentence + ".")


# ---- Processes, data, batches ------------------------------------------------------------------------------

def meet(device: str) -> tuple[int, int, torch.device, dist.Store]:
    """(rank, processes, this process's device, a store they share).

    No group yet: rank 0 may train a tokenizer for an hour. A key can be waited for, a collective times out.
    """
    rank, world = tokenizer.rank_and_world()
    device = torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return rank, world, device, dist.HashStore() if world == 1 else next(iter(dist.rendezvous("env://")))[0]


def seed_of(*key: int) -> int:
    """A seed that is a function of `key` alone: randomness has no state to save, and all processes agree."""
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@lru_cache(maxsize=2)
def image_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """The order in which one epoch visits the images, int64 (count,)."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed_of(seed, 0, epoch))).numpy()


class Batch(NamedTuple):
    """What one process computes at a time."""
    tokens: torch.Tensor  # (B, V, T) int64
    classes: torch.Tensor  # (B,) int64, the null class where the label was dropped
    key_mask: torch.Tensor  # (B V, T) bool
    positions: torch.Tensor  # (K,) int64


def draw_batch(config: Config, cache: tokenizer.TokenCache, step: int, part: int, parts: int) -> Batch:
    """Part `part` of `parts` of the batch of `step`, on the CPU.

    Views, label drops, masks and positions are drawn for the whole batch and then sliced, so that any
    number of processes and micro-batches sees the same. A label is dropped once per image: student, teacher
    and both views see the same class, or the teacher would give it away.
    """
    B, V, T = config.batch, config.views, cache.tokens.shape[2]
    rows = np.flatnonzero(cache.labels >= 0)  # the images that could be read
    epoch, i = divmod(step, len(rows) // B)
    images = rows[image_order(config.seed, epoch, len(rows))[i * B:(i + 1) * B]]  # all different
    g = torch.Generator().manual_seed(seed_of(config.seed, 1, step))
    views = torch.rand(B, cache.tokens.shape[1], generator=g).argsort(1)[:, :V].numpy()  # V different crops
    dropped = torch.rand(B, generator=g) < config.class_dropout
    key_mask = losses.sample_key_mask(B * V, T, config.mask_ratio, g)
    positions = losses.sample_positions(T, config.positions, g)

    mine = slice(part * B // parts, (part + 1) * B // parts)
    tokens = torch.from_numpy(cache.tokens[images[mine, None], views[mine]].astype(np.int64))  # (B, V, T)
    null = len(cache.meta["classes"])
    classes = torch.from_numpy(cache.labels[images[mine]]).masked_fill(dropped[mine], null)
    return Batch(tokens, classes, key_mask.view(B, V, T)[mine].flatten(0, 1), positions)


# ---- The training step: Figure 3 of the paper --------------------------------------------------------------

class Student(nn.Module):
    """The model and its projector as one module, so that DDP averages the gradients of both."""

    def __init__(self, model: Transformer, depth: int, contrast: bool):
        super().__init__()
        self.model, self.depth = model, depth
        self.projector = losses.projector(model.config.dim) if contrast else nn.Identity()

    def forward(self, tokens, classes, key_mask, positions):
        """(B, T-1), (B,), (B, T) or None, (K,) -> logits (B, T, V), last hidden (B, T, C), z (B, K, C)."""
        last = self.model.config.n_layer
        logits, hidden, _ = self.model(tokens, classes, key_mask=key_mask, layers=(self.depth, last))
        return logits, hidden[last], self.projector(hidden[self.depth][:, positions])  # z of Eq. 5


def compute_losses(student: nn.Module, teacher: nn.Module, batch: Batch, config: Config,
                   rank: int) -> dict[str, torch.Tensor]:
    """{"loss": Eq. 8, "loss_ar": its first term, ...} on one batch, and what to log beside it."""
    on, V, last = config.losses.split("+"), config.views, SIZES[config.model][0]
    mask_on, contrast_on = "mim" in on, "step" in on or "view" in on
    tokens = batch.tokens.flatten(0, 1)  # (B V, T): all views in one batch
    inputs, classes = tokens[:, :-1], batch.classes.repeat_interleave(V)  # [c, x_1 ... x_{T-1}]

    logits, h_last, z = student(inputs, classes, batch.key_mask if mask_on else None, batch.positions)
    terms, log = {"ar": losses.ar_loss(logits, tokens)}, {}  # Eq. 2, under the mask of Eq. 3
    if mask_on or contrast_on:
        with torch.no_grad():  # no mask, no dropout, no gradient, no logits; blocks as far as needed
            layers = (config.depth, last) if mask_on else (config.depth,)
            h = teacher(inputs, classes, layers=layers, head=False).hidden
    if mask_on:
        terms["mim"] = losses.mim_loss(h_last, h[last])  # Eq. 4
    if contrast_on:
        def by_slot(x):  # (B V, K, C) -> (V, K, B, C)
            return x.unflatten(0, (-1, V)).permute(1, 2, 0, 3)

        z, h = by_slot(z), losses.gather_images(by_slot(h[config.depth][:, batch.positions]), dim=2)
        for name, loss in (("step", losses.step_loss), ("view", losses.view_loss)):  # Eqs. 6 and 7
            if name in on:
                terms[name], log[f"acc_{name}"] = loss(z, h, config.temperature, rank * z.shape[2])
        log["acc_label"] = losses.label_accuracy(losses.gather_images(batch.classes, dim=0))
        log["negatives"] = torch.tensor(h.shape[2] - 1.0)
    total = losses.total_loss(terms, config.alpha, config.beta)  # Eq. 8
    return {"loss": total} | {f"loss_{name}": term for name, term in terms.items()} | log


def learning_rate(config: Config, step: int, steps: int) -> float:
    """Linear warm-up, then constant (LlamaGen) or half a cosine down to 5 %."""
    rate = config.base_lr * config.batch / 256 * min(1, (step + 1) / max(config.warmup, 1))
    decay = (1 + math.cos(math.pi * step / steps)) / 2
    return rate if config.schedule == "constant" else rate * (0.05 + 0.95 * decay)


def ema_decay(config: Config, step: int, steps: int) -> float:
    """paper: constant 0.9999, which takes some 10^5 steps. our choice for short runs: BYOL's ramp to 1."""
    left = (1 + math.cos(math.pi * step / steps)) / 2 if config.ema_ramp else 1
    return 1 - (1 - config.ema) * left


# ---- The run -----------------------------------------------------------------------------------------------

class Run(NamedTuple):
    """What a run consists of."""
    config: Config
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


def read_run(config: Config, given: dict, resume: bool) -> tuple[Config, dict]:
    """(config, checkpoint) of the run to go on with, whose settings stand; (config, {}) for a new run.

    Raises FileNotFoundError or ValueError if there is nothing to resume, or the run contradicts or exists.
    """
    path = Path("runs", config.name, "checkpoint.pt")
    if not resume:
        if path.exists() and tokenizer.rank_and_world()[0] == 0:
            raise ValueError(f"{path.parent} exists; go on with it (--resume) or choose another --name.")
        return config, {}
    if not path.is_file():
        there = sorted(other.parent.name for other in Path("runs").glob("*/checkpoint.pt"))
        raise FileNotFoundError(f"nothing to resume in {path.parent}; --name can be one of {there}.")
    checkpoint = load_checkpoint(path)
    saved = Config(**checkpoint["config"])
    if path.with_name("tokenizer.pt").exists():
        saved.tokenizer = str(path.with_name("tokenizer.pt"))
    saved.device, free = config.device, {"data", "tokenizer", "cache", "compile", "log_every"}
    for name in given.keys() - free:
        if getattr(saved, name) != given[name]:
            raise ValueError(f"{path.parent} has {name} = {getattr(saved, name)}, not {given[name]}; choose "
                             "another --name for new settings.")
    return replace(saved, **given), checkpoint


def set_up(config: Config, given: dict, resume: bool) -> Run:
    """Everything before the first step, from data to models; also joins the processes."""
    rank, world, device, store = meet(config.device)
    config, checkpoint = read_run(config, given, resume)
    check_config(config, world)
    found = tokenizer.prepare(config, device, store)
    vq, cache, held_out = found.vq, found.train, found.held_out
    config = replace(config, data=found.data, subset=found.subset, tokenizer=found.tokenizer,
                     name=config.name + found.suffix)
    read_run(config, given, resume)  # again, as prepare may have renamed the run
    images = int((cache.labels >= 0).sum())
    if images < config.batch:
        raise ValueError(f"{config.data} has {images} training images, fewer than --batch {config.batch}.")
    draw_batch(config, cache, 0, 0, 1)  # refuses an impossible mask ratio or K now rather than later

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
    vectors = [p for p in student.parameters() if p.ndim < 2]  # but no norms and no biases
    optimizer = torch.optim.AdamW([dict(params=matrices, weight_decay=config.weight_decay),
                                   dict(params=vectors, weight_decay=0.0)],
                                  betas=(0.9, 0.95), fused=True)  # the paper prints beta2 = 0.05, a typo
    if checkpoint:
        if checkpoint["data"] != cache.meta:
            raise ValueError(f"runs/{config.name} was trained on other codes than {config.data} gives: other "
                             "images or another tokenizer.")
        model.load_state_dict(checkpoint["model"])
        teacher.load_state_dict(checkpoint["ema"])
        student.projector.load_state_dict(checkpoint["projector"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    if world > 1:
        dist.init_process_group(store=store, rank=rank, world_size=world)  # NCCL on GPUs, gloo on CPUs
    return Run(config, rank, world, device, vq, cache, held_out, student, teacher, optimizer,
               checkpoint.get("step", 0), config.steps or config.epochs * (images // config.batch))


def train_step(run: Run, forward: nn.Module, teacher: nn.Module, step: int) -> dict[str, torch.Tensor]:
    """One optimizer step, from the draw to the EMA update; returns what to log."""
    config, parts, log = run.config, run.config.accumulate, {}
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(config, step, run.steps)
    torch.manual_seed(seed_of(config.seed, 2, step, run.rank))  # dropout
    for part in range(parts):
        batch = draw_batch(config, run.cache, step, run.rank * parts + part, run.world * parts)
        batch = Batch(*(x.to(run.device) for x in batch))
        with forward.no_sync() if run.world > 1 and part < parts - 1 else nullcontext():  # average once
            with torch.autocast(run.device.type, torch.bfloat16, enabled=run.device.type == "cuda"):
                values = compute_losses(forward, teacher, batch, config, run.rank)
            (values["loss"] / parts).backward()
        log = {name: log.get(name, 0) + value.detach() / parts for name, value in values.items()}
    log["grad_norm"] = nn.utils.clip_grad_norm_(run.student.parameters(), config.clip)
    run.optimizer.step()
    run.optimizer.zero_grad()
    losses.update_ema(run.teacher, run.student.model, ema_decay(config, step, run.steps))  # after theta moved
    return log


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """L_AR on the centre crops of held-out images, unmasked, in nats per token; the same on all processes."""
    cache, model = run.held_out, run.student.model.eval()
    rows = np.random.default_rng(0).permutation(np.flatnonzero(cache.labels >= 0))[:run.config.eval_images]
    total = torch.zeros(2, device=run.device)
    for i in range(run.rank * 64, len(rows), run.world * 64):
        chunk = rows[i:i + 64]
        tokens = torch.from_numpy(cache.tokens[chunk, 0].astype(np.int64)).to(run.device)
        logits = model(tokens[:, :-1], torch.from_numpy(cache.labels[chunk]).to(run.device)).logits
        total += torch.stack([losses.ar_loss(logits, tokens), total.new_ones(())]) * len(chunk)
    model.train()
    if run.world > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def mean_over_processes(run: Run, log: dict, count: int, stop: bool) -> tuple[dict[str, float], bool]:
    """Sums over `count` steps -> {name: mean over steps and processes}, and whether one wants to stop."""
    values = torch.stack([torch.as_tensor(x).float().to(run.device) for x in (*log.values(), stop)])
    if run.world > 1:
        dist.all_reduce(values)
    *sums, stops = values.tolist()
    return {name: total / count / run.world for name, total in zip(log, sums)}, stops > 0


def report(run: Run, line: dict) -> None:
    """Append one line to metrics.jsonl; with a validation loss also redraw loss.png."""
    folder = Path("runs", run.config.name)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    if "val_nll" in line:
        lines = [json.loads(text) for text in (folder / "metrics.jsonl").read_text().splitlines()]
        curves = {title: [(line["step"], line[key]) for line in lines if key in line]
                  for key, title in (("loss_ar", "training"), ("val_nll", "held out, unmasked"))}
        plot = sample.line_plot(curves, f"{run.config.name}: next-token loss", "step", "nats per token")
        sample.save_image(folder / "loss.png", plot)


def save(run: Run, step: int) -> None:
    """Write checkpoint.pt, all that --resume and the other scripts need, then a sample grid."""
    folder, config, model = Path("runs", run.config.name), run.config, run.student.model
    content = {
        "model": model.state_dict(), "ema": run.teacher.state_dict(),
        "projector": run.student.projector.state_dict(), "optimizer": run.optimizer.state_dict(),
        "step": step, "config": asdict(config), "model_config": asdict(model.config), "data": run.cache.meta}
    tokenizer.write_file(folder / "checkpoint.pt", lambda file: torch.save(content, file))
    if config.samples and step > run.start:
        names, path = run.cache.meta["classes"], folder / "samples" / f"{step:07d}.png"
        classes = [i * len(names) // config.samples for i in range(config.samples)]
        sample.save_samples(path, model.eval(), run.vq, classes, names, config.seed, cfg=config.sample_cfg)
        model.train()


def open_folder(run: Run) -> None:
    """Make runs/<name>, or cut the metrics of a resumed run back to its checkpoint."""
    folder = Path("runs", run.config.name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(asdict(run.config), indent=1))
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True) if run.start and metrics.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # a kill may leave half a line
    metrics.write_text("".join(line for line in whole if json.loads(line)["step"] <= run.start))
    if sum(p.numel() for p in run.vq.parameters()) < 5e6:  # so that a run that is moved still samples
        tokenizer.save_tokenizer(folder / "tokenizer.pt", run.vq)
        sample.save_reconstructions(folder / "reconstructions.png", run.vq, run.config)
    save(run, run.start)


def peak_memory(device: torch.device) -> float:
    """Largest memory in use so far, GB: of the GPU's allocator, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20  # Linux counts kilobytes


def train(run: Run) -> None:
    """All steps of a run, with logs, validation, pictures and checkpoints; a signal saves and leaves."""
    config, forward, teacher = run.config, run.student, run.teacher
    if run.world > 1:
        forward = DistributedDataParallel(forward, broadcast_buffers=False)
    if run.device.type == "cuda" and config.compile:
        forward, teacher = torch.compile(forward), torch.compile(teacher)
    if run.rank == 0:
        open_folder(run)
    caught = []  # a signal is noted, and obeyed between two steps
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *signal_and_frame: caught.append(signal_and_frame))
    sums, count, clock = {}, 0, time.time()
    bar = tqdm(range(run.start, run.steps), config.name, run.steps, initial=run.start, disable=run.rank != 0)
    for step in bar:
        log = train_step(run, forward, teacher, step)
        sums, count = {name: sums.get(name, 0) + value for name, value in log.items()}, count + 1
        done, last = step + 1, step + 1 == run.steps
        line, stop = {"step": done}, bool(caught) and run.world == 1
        if done % config.log_every == 0 or last:
            means, stop = mean_over_processes(run, sums, count, bool(caught))
            speed = count * config.batch * config.views * run.cache.tokens.shape[2] / (time.time() - clock)
            line |= means | {"lr": run.optimizer.param_groups[0]["lr"], "tokens_per_second": speed,
                             "memory_gb": peak_memory(run.device)}
            bar.set_postfix_str(f"ar {line['loss_ar']:.3f}, {speed:,.0f} tok/s, {line['memory_gb']:.1f} GB")
            sums, count, clock = {}, 0, time.time()
        due = done % config.save_every == 0 or last
        if due:
            line["val_nll"] = validation_loss(run)
        if run.rank == 0:
            if len(line) > 1:
                report(run, line)
            if due or stop:
                save(run, done)
            if stop and not last:
                print(f"Saved after step {done}. To go on: python train.py --resume --name {config.name}")
        if stop and not last:
            sys.exit(130)
    if run.rank == 0:
        print(f"Done: runs/{config.name}/ holds checkpoint.pt, metrics.jsonl and the pictures.")


def main() -> None:
    """Parse the command line and run it."""
    train(set_up(*parse_arguments(sys.argv[1:])))
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # the user's mistakes; everything else deserves its traceback
        sys.exit(f"train.py: {error}")
    except KeyboardInterrupt:  # before the first step
        print("Stopped. The same command goes on from here: tokenizer and encoded images are kept.")
        sys.exit(130)
