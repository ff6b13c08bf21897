"""results/runs.jsonl -> results/README.md, the tables in README.md,
assets/{probe,guidance,lengths,time,sweeps,distance}.png

    python results/table.py

Runs are named VARIANT-STEPS-sSEED; of two lines of one run the later counts. A mean over seeds stands with half of
its 95 % interval (Student's t), a difference is taken seed by seed. Of two seeds both values stand: their interval
says little.
"""
import os
import sys
import json
import math
import re
from pathlib import Path

import numpy as np
import scipy.stats
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
os.chdir(ROOT)
sys.path.insert(0, str(ROOT))

import probe
import sample

LOSSES = {"ar": "AR", "mim": "+ MIM", "mim-step": "+ MIM + step", "mim-view": "+ MIM + view",
          "step-view": "+ step + view", "all": "**all (ST-AR)**",  # the rows of the paper's Table 3
          "mask-10-k-16": "all, r = 0.1, K = 16"}  # and one of ours
MAIN, LONG, AR, ALL, LIGHTER = 2000, 16000, LOSSES["ar"], LOSSES["all"], LOSSES["mask-10-k-16"]
GPU, GPU_PREFIX = 9750, "200-"  # runs of the preset `tiny` as it is on a GPU: 50 epochs of all 200 classes
NAMED = (("ar", "AR"), ("all", "ST-AR"))
# The paper's Tables 4, 5, 6: {title: (axis, {setting: (variant, the paper's FID)})}; "all" is the paper's choice
SWEEPS = {
    "Mask ratio (the paper's Table 4)": ("hidden keys, %", {
        10: ("mask-10", math.nan), 15: ("mask-15", 28.62), 25: ("all", 26.58), 35: ("mask-35", 26.36),
        45: ("mask-45", 27.50)}),
    "Depth of the contrast (Table 5)": ("quarter of the layers", {
        1: ("depth-1", 27.34), 2: ("all", 26.58), 3: ("depth-3", 28.76), 4: ("depth-4", 29.45)}),
    "Positions K (Table 6)": ("K", {
        2: ("k-2", 27.50), 4: ("all", 26.58), 8: ("k-8", 26.54), 16: ("k-16", 25.78)})}
runs = {}  # (steps, variant) -> {seed: line}
for line in map(json.loads, open("results/runs.jsonl")):
    variant, steps, seed = re.fullmatch(r"(.+)-(\d+)-s(\d+)", line["run"]).groups()
    runs.setdefault((int(steps), variant), {})[int(seed)] = line


# ---- Columns: {name: (value of a line, decimals)} ----

def curve(line, layer=None):
    """The probe's accuracy in % at the eight steps, of one layer (the run's own)."""
    layer = layer or line["layer"]
    return [100 * r["accuracy"] for r in line["probe"] if r["layer"] == layer and r["step"] != "mean"]


def pooled(line):
    return [100 * r["accuracy"] for r in line["probe"] if r["layer"] == line["layer"] and r["step"] == "mean"][0]


def guided(line, reference="reconstructions"):
    """{guidance scale: scores} of one line."""
    return {float(row[3:]): values for row, values in line["scores"][reference].items() if row.startswith("cfg")}


for seeds in runs.values():  # the guidance scale with the lowest FD-c against decoded real codes, mean over seeds
    shared = set.intersection(*(set(guided(line)) for line in seeds.values()))
    best = min(sorted(shared), key=lambda cfg: sum(guided(line)[cfg]["FD-c"] for line in seeds.values()))
    for line in seeds.values():
        line["best_cfg"] = best


def score(measure, cfg, reference="reconstructions"):
    factor = 100 if measure == "class agreement" else 1
    return lambda line: factor * guided(line, reference)[cfg or line["best_cfg"]][measure]


UNDERSTANDING = {
    "last position": (lambda line: curve(line)[-1], 1), "best position": (lambda line: max(curve(line)), 1),
    "mean of eight": (lambda line: np.mean(curve(line)), 1), "mean-pooled": (pooled, 1),
    "best layer, last position": (
        lambda line: max(curve(line, layer)[-1] for layer in {r["layer"] for r in line["probe"]}), 1),
    "held-out loss": (lambda line: line["metrics"]["val_nll"], 3),
    "the teacher's": (lambda line: line.get("teacher_nll", math.nan), 3)}
MEASURES = {"FD-c": 3, "IS-c": 2, "precision-c": 3, "recall-c": 3, "class agreement": 1}


def scores(cfg, reference):
    """Columns of one guidance scale, or with None of each row's best."""
    scale = {"cfg": (lambda line: line["best_cfg"], 2)} if cfg is None else {}
    return scale | {name: (score(name, cfg, reference), decimals) for name, decimals in MEASURES.items()}


brief = {name: UNDERSTANDING[name] for name in ("last position", "mean of eight", "mean-pooled", "held-out loss")}
for measure, cfg in (("FD-c", 1), ("FD-c", 1.5), ("IS-c", 1.5), ("class agreement", 1.5)):
    brief[f"{measure}, cfg {cfg}"] = score(measure, cfg), MEASURES[measure]


# ---- Tables ----

def mean_and_half(values):
    """Mean, and half of its 95 % interval; 0 for one value."""
    n = len(values)
    half = scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else 0.0
    return float(np.mean(values)), float(half)


def cell(values, decimals, sign=""):
    if not np.isfinite(values).all():  # not measured
        return ""
    if len(values) == 2:
        return ", ".join(f"{value:{sign}.{decimals}f}" for value in values)
    mean, half = mean_and_half(values)
    return f"{mean:{sign}.{decimals}f}" + (f" ± {half:.{decimals}f}" if len(values) > 1 else "")


def table(rows, columns, against=None):
    """A Markdown table of {name: {seed: line}}, and below it each row's difference to the row `against`."""
    def written(title, seeds, cells):
        return f"| {title} | {seeds} | " + " | ".join(cells) + " |"

    text = ["| | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, seeds in rows.items():
        text.append(written(name, len(seeds), [cell([value(line) for line in seeds.values()], decimals)
                                               for value, decimals in columns.values()]))
    for name, seeds in rows.items() if against else ():
        both = sorted(seeds.keys() & rows[against].keys())
        if name != against and both:
            title = f"*{name.strip('*')}, less {against.strip('*')}*"
            text.append(written(title, len(both), [
                cell([value(seeds[seed]) - value(rows[against][seed]) for seed in both], decimals, "+")
                for value, decimals in columns.values()]))
    return "\n".join(text)


def samples_of(rows, against=None, cfgs=(1, None), references=("reconstructions",)):
    """Titled tables of samples, for each reference and guidance scale (None: each row's best)."""
    text = []
    for reference in references:
        for cfg in cfgs:
            how = "the best guidance scale of each row" if cfg is None else f"guidance {cfg:g}"
            what = "decoded real codes" if reference == "reconstructions" else "originals"
            text += [f"Samples at {how}, against {what}", table(rows, scores(cfg, reference), against)]
    return text


def bounds(line):
    """What real images score: the same in every line, as it belongs to the images and the tokenizer."""
    rows = {"held-out images, decoded (against decoded real codes)": line["scores"]["reconstructions"]["held-out"],
            "**the floor**: training images, decoded (against originals)":
                line["scores"]["originals"]["reconstructions"],
            "held-out images (against originals)": line["scores"]["originals"]["held-out"]}
    text = ["| real images | " + " | ".join(MEASURES) + " |", "|---" * (len(MEASURES) + 1) + "|"]
    for name, row in rows.items():
        values = [f"{row[m] * (100 if m == 'class agreement' else 1):.{d}f}" for m, d in MEASURES.items()]
        text.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(text)


def pulls(path):
    """The table of results/gradients.jsonl."""
    terms, text = ("ar", "mim", "step", "view"), []
    text = ["| run | after step | share of AR | MIM | step | view | cosine with AR: MIM | step | view | norm of all |",
            "|---" * 10 + "|"]
    for d in map(json.loads, open(path)):
        cells = [f"{d[t]['share']:.2f}" if t in d else "" for t in terms]
        cells += [f"{d[t]['cosine_with_ar']:+.2f}" if t in d else "" for t in terms[1:]]
        text.append(f"| {d['run']} | {d['after']:,} | " + " | ".join(cells) + f" | {d['whole_norm']:.2f} |")
    return "\n".join(text)


# ---- results/README.md ----

table3 = {name: runs[MAIN, variant] for variant, name in LOSSES.items() if (MAIN, variant) in runs}
text = ["# Results", """Written by `bash results/table.sh` from runs.jsonl: one JSON line per run, with its command,
commit, seed, versions, minutes and every number. `bash results/run.sh` trains, probes, samples and scores a run.
Twenty classes of Tiny ImageNet (assets/tiny-imagenet-20.txt) at 32 px, shipped tokenizer, CPU preset `tiny` at other
`--steps`, unless said; student weights, one thread per run, two runs side by side on two cores. Probe: top-1 in %,
under the null class, on 1,000 held-out images, the contrast layer (2 of 4) unless said, at eight of the 64 positions
(probe.py and the paper call them steps). Samples: 5,000 per run and guidance scale; 1.25 only for AR and all losses
after 8,000 steps, for all rows after 16,000 and for the runs on the GPU, so that the best scale of other rows is the
best without it. ± is half of a 95 % interval over seeds; differences are taken seed by seed (the same order of data,
initial weights and masks). All lines of twenty classes are scored by one classifier (right on 71.4 % of decoded
held-out images), but for `small`, of 16,000 steps seed 2, r = 0.1 and "AR again", and second seeds of mask ratio and
K, by one that was trained again on another processor (70.9 %). Lines with `--compile` in their command differ from
what they would be without by rounding only. What questions.md calls a change of code stands in the line as "diff",
for `git apply` on its commit.""",
        f"## Each loss: {MAIN:,} steps (the paper's Table 3)", "Understanding", table(table3, UNDERSTANDING, AR),
        *samples_of(table3, AR, references=("reconstructions", "originals"))]
LONGER = "AR, 1.3 times the steps"
equal = {AR: table3[AR], LONGER: runs[2600, "ar"], **{LOSSES[v]: runs[MAIN, v] for v in ("step-view", "all")}}
text += ["## Equal time", "A step of ST-AR takes as long as 1.3 of AR's, one without MIM a little less.",
         table(equal, UNDERSTANDING, LONGER), *samples_of(equal, LONGER)]
lengths = sorted(steps for steps, variant in runs if variant == "all" and (steps, "ar") in runs)
for steps in lengths:
    if steps != MAIN:
        rows = {name: runs[steps, v] for v, name in LOSSES.items() if (steps, v) in runs}
        if steps == LONG:
            rows.pop(LIGHTER)  # below, as another classifier scored it
        cfgs = (1, 1.5, None) if steps > MAIN else (1, 1.5)
        text += [f"## Length: {steps:,} steps", table(rows, UNDERSTANDING, AR), *samples_of(rows, AR, cfgs)]
lighter = {AR: runs[LONG, "ar-again"] | {2: runs[LONG, "ar"][2]}, LIGHTER: runs[LONG, "mask-10-k-16"]}
text += [f"## A lighter mask and more positions: {LONG:,} steps",
         "AR's seeds 0 and 1 were trained and scored once more (`ar-again`), so that one classifier scores all.",
         table(lighter, UNDERSTANDING, AR), *samples_of(lighter, AR, (1, 1.25, 1.5))]
text += ["## Size: 800 steps", "`nano` has 0.64M parameters, `tiny` 5.6M, `small` 22.0M in 12 layers; one seed."]
for size in ("nano", "tiny", "small"):
    rows = {f"`{size}`, {name}": runs[800, f"{size}-{variant}"] for variant, name in NAMED}
    text += [table(rows, brief, f"`{size}`, AR")]
gpu = {name: runs[GPU, GPU_PREFIX + v] for v, name in LOSSES.items() if (GPU, GPU_PREFIX + v) in runs}
text += ["## All of Tiny ImageNet on a GPU: the preset `tiny` as it is",
         """200 classes, 5.7M parameters, 9,750 steps of 512 images x 2 crops (50 epochs) in bfloat16 on an
H200, on which four runs trained at once; alone it trains 3.8 million tokens a second. 10,000 samples per guidance
scale, 10,000 held-out images. The classifier had 12,000 steps, because there are ten times the classes: these do not
compare with those of twenty. The probe learns from 10,000 training images; chance is 0.5. Of the run with r = 0.1 the
samples were drawn and scored on a CPU, in float32.""",
         table(gpu, UNDERSTANDING, AR), *samples_of(gpu, AR, (1, 1.25, 1.5, 2)), bounds(gpu[AR][0])]
text += ["## The CPU preset `tiny` as it is: 5,000 steps", table({ALL: runs[5000, "all"]}, UNDERSTANDING)]
shapes = {name: runs[600, f"shapes-{v}"] for v, name in LOSSES.items() if (600, f"shapes-{v}") in runs}
text += ["## The preset `nano` as it is: 600 steps of drawn shapes",
         "Each seed with a tokenizer of its own ([questions.md](questions.md)), which the held-out losses depend on; "
         "12 classes, 600 held-out images.",
         table(shapes, UNDERSTANDING, AR), *samples_of(shapes, AR, (1, 1.5)), bounds(shapes[AR][0])]
pair = {variant: {seed: line for seed, line in seeds.items() if seed < 2}
        for (steps, variant), seeds in sorted(runs.items()) if steps == MAIN and 0 in seeds}
first = {variant: {0: seeds[0]} for variant, seeds in pair.items()}
text += ["## Mask ratio, depth, positions (the paper's Tables 4, 5, 6)",
         "Seed 0, for some also 1; in brackets the paper's FID. The probe reads the layer that the contrast works "
         "on. Expectations and answers: [questions.md](questions.md).",
         "![FD-c and the paper's FID, relative to the paper's choice](../assets/sweeps.png)"]
for title, (_, settings) in SWEEPS.items():
    text += [title, table({f"{setting} ({fid})".replace(" (nan)", ""): pair[variant]
                           for setting, (variant, fid) in settings.items()}, brief)]
swept = {variant for _, settings in SWEEPS.values() for variant, _ in settings.values()}
rows = {LOSSES.get(variant, variant): first[variant]
        for variant in ("ar", "all", *sorted(first.keys() - LOSSES.keys() - swept))}
text += ["## Questions", f"{MAIN:,} steps, seed 0; what each changes, what we expected and what came of it: "
         "[questions.md](questions.md).", table(rows, UNDERSTANDING), *samples_of(rows, cfgs=(1, 1.5))]
text += ["## Gradients", "`bash results/gradients.sh`: of each weighted term, on the blocks that all of them "
         "reach; its share of the summed norms, its cosine with that of L_AR, and the norm of a whole step's "
         "gradient, which is clipped at 1.", pulls("results/gradients.jsonl")]
real = bounds(next(iter(runs[MAIN, "ar"].values())))
text += ["## Real images", real]
Path("results/README.md").write_text("\n\n".join(text) + "\n")

# ---- README.md ----

def between(text, mark, new):
    """README's `text` with `new` between the comments that say "table.sh writes `mark`" and "to here"."""
    start, end = f"<!-- table.sh writes {mark} -->", "<!-- to here -->"
    before, rest = text.split(start)
    return f"{before}{start}\n\n{new}\n\n{end}{rest.split(end, 1)[1]}"


SHORT = {"probe, last position": brief["last position"], "class agreement": (score("class agreement", 1), 1),
         "FD-c": (score("FD-c", 1), 2), "FD-c, cfg 1.25": (score("FD-c", 1.25), 2),
         "FD-c, cfg 1.5": (score("FD-c", 1.5), 2), "held-out loss": (brief["held-out loss"][0], 2)}
short = ["| AR → ST-AR | " + " | ".join(SHORT) + " |", "|---" * (len(SHORT) + 1) + "|"]
for title, ar, star in (
        ("All of Tiny ImageNet: 200 classes, 5.7M parameters, 50 epochs on a GPU, two seeds", gpu[AR], gpu[ALL]),
        ("Twenty classes: 0.64M parameters, 51 epochs on a CPU, three seeds", runs[LONG, "ar"], runs[LONG, "all"]),
        ("the same with `--mask-ratio .1 --positions 16`, AR scored again", lighter[AR], lighter[LIGHTER])):
    means = [[f"{np.mean([value(line) for line in seeds.values()]):.{decimals}f}" for seeds in (ar, star)]
             for value, decimals in SHORT.values()]
    short.append(f"| {title} | " + " | ".join(map(" → ".join, means)) + " |")

gain = table({AR: table3[AR], ALL: table3[ALL]}, brief, AR).splitlines()[-1]
held_out = runs[MAIN, "ar"][0]["scores"]["reconstructions"]["held-out"]
held_out = (f"| *held-out real images* | | | | | | {held_out['FD-c']:.3f} | {held_out['FD-c']:.3f} | "
            f"{held_out['IS-c']:.2f} | {100 * held_out['class agreement']:.1f} |")
readme = between(Path("README.md").read_text(), "the summary", "\n".join(short))
Path("README.md").write_text(between(readme, "Table 3", "\n".join((table(table3, brief), gain, held_out))))

# ---- Pictures ----

FIFTY_EPOCHS = {f"twenty classes, {LONG:,} steps, CPU": {name: runs[LONG, v] for v, name in NAMED},
                f"Tiny ImageNet, {GPU:,} steps, GPU": {name: runs[GPU, GPU_PREFIX + v] for v, name in NAMED}}
panels = []
for title, rows in FIFTY_EPOCHS.items():
    lines, bands = {}, {}
    for name, seeds in rows.items():
        steps = [list(values) for values in zip(*map(curve, seeds.values()))]
        lines[name] = [(8 * i, np.mean(values)) for i, values in enumerate(steps, 1)]
        bands[name] = [mean_and_half(v)[1] if len(v) > 2 else np.ptp(v) / 2 for v in steps]  # 2: from seed to seed
    panels.append(sample.line_plot(lines, title, "position", "probe, top-1 %", bands, width=480, height=300))
sample.save_image("assets/probe.png", Image.fromarray(np.concatenate(panels, 1)))

panels = []
for (title, rows), more in zip(FIFTY_EPOCHS.items(), (lighter, gpu)):
    lines = {}
    for name, seeds in (rows | {"r = 0.1, K = 16": more[LIGHTER]}).items():
        points = [{cfg: (100 * row["class agreement"], row["FD-c"]) for cfg, row in guided(line).items()}
                  for line in seeds.values()]
        shared = sorted(set.intersection(*map(set, points)))  # guidance scales
        lines[name] = [tuple(np.mean([seed[cfg] for seed in points], 0)) for cfg in shared]
    real_row = next(iter(rows["AR"].values()))["scores"]["reconstructions"]["held-out"]
    lines["real images"] = [(100 * real_row["class agreement"], real_row["FD-c"])]
    panels.append(sample.line_plot(lines, title, "class agreement, %", "FD-c", width=480, height=300))
sample.save_image("assets/guidance.png", Image.fromarray(np.concatenate(panels, 1)))

panels = []
for title, rows in FIFTY_EPOCHS.items():
    lines = {name: list(enumerate(np.mean([line["attention"]["distance"] for line in seeds.values()], 0), 1))
             for name, seeds in rows.items()}
    lines["spread evenly"] = [(n, probe.even_distance(64)) for n, _ in lines["AR"]]
    panels.append(sample.line_plot(lines, title, "layer", "tokens away", width=480, height=300))
sample.save_image("assets/distance.png", Image.fromarray(np.concatenate(panels, 1)))

last, loss, free, guided_15 = (brief[name][0] for name in (
    "last position", "held-out loss", "FD-c, cfg 1", "FD-c, cfg 1.5"))
panels, against_ar = [], {  # of a line and AR's of the same length and seed
    "probe, last position, top-1 %": lambda line, ar: last(line),
    "held-out loss less AR's, nats": lambda line, ar: loss(line) - loss(ar),
    "FD-c / AR's, no guidance": lambda line, ar: free(line) / free(ar),
    "FD-c / AR's, guidance 1.5": lambda line, ar: guided_15(line) / guided_15(ar)}
for label, value in against_ar.items():
    lines, bands = {}, {}
    for variant, name in (*NAMED, ("step-view", "without MIM")):
        lines[name], bands[name] = [], []
        for steps in lengths:
            seeds, ar = runs.get((steps, variant), {}), runs[steps, "ar"]
            if both := sorted(seeds.keys() & ar.keys()):
                mean, half = mean_and_half([value(seeds[seed], ar[seed]) for seed in both])
                lines[name].append((steps / 1000, mean))
                bands[name].append(half if len(both) > 2 else math.nan)
    panels.append(sample.line_plot(lines, "", "thousand steps", label, bands, width=480, height=300, log_x=True))
rows = [np.concatenate(panels[:2], 1), np.concatenate(panels[2:], 1)]
sample.save_image("assets/lengths.png", Image.fromarray(np.concatenate(rows)))

panels, measured = [], {"probe, last position, top-1 %": last, "held-out loss, nats": loss,
                        "FD-c, no guidance": free, "FD-c, guidance 1.5": guided_15}
for label, value in measured.items():
    lines, bands = {}, {}
    for variant, name, cost in (("ar", "AR", 1), ("all", "ST-AR", 4 / 3), ("mask-10-k-16", "r = 0.1, K = 16", 4 / 3)):
        there = [steps for steps in (MAIN, 2600, 8000, LONG) if (steps, variant) in runs]
        found = [mean_and_half([value(line) for line in runs[steps, variant].values()]) for steps in there]
        lines[name] = [(cost * steps / 1000, mean) for steps, (mean, _) in zip(there, found)]
        bands[name] = [half for _, half in found]
    panels.append(sample.line_plot(lines, "", "time, in thousand steps of AR", label, bands, width=480, height=300))
rows = [np.concatenate(panels[:2], 1), np.concatenate(panels[2:], 1)]
sample.save_image("assets/time.png", Image.fromarray(np.concatenate(rows)))

panels = []
for axis, paper in SWEEPS.values():
    chosen = [fid for variant, fid in paper.values() if variant == "all"][0]
    lines = {"the paper's FID": [(setting, fid / chosen) for setting, (_, fid) in paper.items()]}
    for cfg in (1, 1.5):
        value = score("FD-c", cfg)
        lines[f"FD-c, cfg {cfg:g}"] = [(setting, value(first[variant][0]) / value(first["all"][0]))
                                       for setting, (variant, _) in paper.items()]
    panels.append(sample.line_plot(lines, "", axis, "relative to the paper's choice", width=480, height=300))
sample.save_image("assets/sweeps.png", Image.fromarray(np.concatenate(panels, 1)))
print(f"results/README.md, README.md, assets/: {sum(map(len, runs.values()))} runs")
