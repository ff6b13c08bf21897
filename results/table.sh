#!/usr/bin/env bash
# results/runs.jsonl -> results/README.md, the table in README.md, assets/probe.png
#
#     bash results/table.sh
#
# Runs are named VARIANT-STEPS-sSEED; of two lines of one run the later counts. A mean over seeds stands with half of
# its 95 % interval (Student's t), a difference to AR is taken seed by seed. One seed: no interval.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=. python - <<'EOF'
import json
import math
import re
from pathlib import Path

import numpy as np
import scipy.stats

import sample

NAMES = {"ar": "AR", "mim": "+ MIM", "mim-step": "+ MIM + step", "mim-view": "+ MIM + view",
         "step-view": "+ step + view", "all": "**all (ST-AR)**"}
runs = {}  # (steps, variant) -> {seed: line}
for line in map(json.loads, open("results/runs.jsonl")):
    variant, steps, seed = re.fullmatch(r"(.+)-(\d+)-s(\d+)", line["run"]).groups()
    runs.setdefault((int(steps), variant), {})[int(seed)] = line


def curve(line, layer=None):
    """The probe's accuracy in % at the eight steps, of one layer (the run's own)."""
    layer = layer or line["layer"]
    return [100 * r["accuracy"] for r in line["probe"] if r["layer"] == layer and r["step"] != "mean"]


def pooled(line):
    return [100 * r["accuracy"] for r in line["probe"] if r["layer"] == line["layer"] and r["step"] == "mean"][0]


def score(reference, cfg, measure):
    factor = 100 if measure == "class agreement" else 1
    return lambda line: factor * line["scores"][reference][f"cfg{cfg}"][measure]


UNDERSTANDING = {  # column: (value of a line, decimals)
    "last step": (lambda line: curve(line)[-1], 1), "best step": (lambda line: max(curve(line)), 1),
    "mean of steps": (lambda line: np.mean(curve(line)), 1), "mean-pooled": (pooled, 1),
    "best layer, last step": (
        lambda line: max(curve(line, layer)[-1] for layer in {r["layer"] for r in line["probe"]}), 1),
    "held-out loss": (lambda line: line["metrics"]["val_nll"], 3),
    "minutes": (lambda line: line["train_minutes"], 1)}
MEASURES = {"FD-c": 3, "IS-c": 2, "precision-c": 3, "recall-c": 3, "class agreement": 1}


def scores(reference, cfgs=(1, 2)):
    return {f"{measure}, cfg {cfg}": (score(reference, cfg, measure), decimals)
            for cfg in cfgs for measure, decimals in MEASURES.items()}


def mean_and_half(values):
    """Mean, and half of its 95 % interval; 0 for one value."""
    n = len(values)
    half = scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else 0.0
    return float(np.mean(values)), float(half)


def cell(values, decimals, sign=""):
    mean, half = mean_and_half(values)
    return f"{mean:{sign}.{decimals}f}" + (f" ± {half:.{decimals}f}" if len(values) > 1 else "")


def table(steps, columns):
    """A Markdown table: a row per variant, then the difference of ST-AR to AR."""
    known = [variant for count, variant in runs if count == steps]
    order = [*(name for name in NAMES if name in known), *sorted(set(known) - set(NAMES))]
    text = ["| | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for variant in order:
        seeds = runs[steps, variant]
        cells = [cell([value(line) for line in seeds.values()], decimals)
                 for value, decimals in columns.values()]
        text.append(f"| {NAMES.get(variant, variant)} | {len(seeds)} | " + " | ".join(cells) + " |")
    if "ar" in known and "all" in known:
        a, b = runs[steps, "ar"], runs[steps, "all"]
        both = sorted(a.keys() & b.keys())
        cells = [cell([value(b[seed]) - value(a[seed]) for seed in both], decimals, "+")
                 for value, decimals in columns.values()]
        text.append(f"| *ST-AR - AR, by seed* | {len(both)} | " + " | ".join(cells) + " |")
    return "\n".join(text)


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


lengths = sorted({steps for steps, _ in runs})
most = max(lengths, key=lambda steps: sum(len(seeds) for (count, _), seeds in runs.items() if count == steps))
ABOUT = """Written by `bash results/table.sh` from runs.jsonl: one JSON line per run, with its command, commit,
seed, versions, minutes and every number. `bash results/run.sh` trains, probes, samples and scores a run. Twenty
classes of Tiny ImageNet (assets/tiny-imagenet-20.txt) at 32 px, shipped tokenizer, CPU preset `tiny` at other
`--steps`, student weights, one thread per run, two runs side by side on two cores. Probe: top-1 in %, under the
null class, on 1,000 held-out images, the contrast layer (2 of 4) unless said. Samples: 5,000 per run and guidance
scale. ± is half of a 95 % interval over seeds."""
text = ["# Results", ABOUT]
for steps in lengths:
    text += [f"## {steps:,} steps", "Understanding", table(steps, UNDERSTANDING),
             "Samples against decoded real codes", table(steps, scores("reconstructions")),
             "Samples against originals", table(steps, scores("originals"))]
real = bounds(next(iter(runs[most, "ar"].values())))
text += ["## Real images", real]
Path("results/README.md").write_text("\n\n".join(text) + "\n")

brief = {name: UNDERSTANDING[name] for name in ("last step", "mean of steps", "mean-pooled", "held-out loss")}
sampled = scores("reconstructions")
brief |= {name: sampled[name] for name in ("FD-c, cfg 1", "FD-c, cfg 2", "IS-c, cfg 2", "class agreement, cfg 2")}
start, end = "<!-- results/table.sh writes from here -->", "<!-- to here -->"
before, rest = Path("README.md").read_text().split(start)
after = rest.split(end)[1]
Path("README.md").write_text("\n\n".join([before + start, table(most, brief), real, end + after]))

curves, bands = {}, {}
for variant, name in (("ar", "AR"), ("all", "ST-AR")):
    points = [mean_and_half(values) for values in zip(*map(curve, runs[most, variant].values()))]
    curves[name] = [(8 * i, mean) for i, (mean, _) in enumerate(points, 1)]
    bands[name] = [half for _, half in points]
title = f"{most:,} steps, {len(runs[most, 'all'])} seeds, 95 % bands"
plot = sample.line_plot(curves, title, "step of 64", "linear probe, top-1 %", bands)
sample.save_image("assets/probe.png", plot)
print(f"results/README.md, README.md, assets/probe.png: {sum(map(len, runs.values()))} runs")
EOF
