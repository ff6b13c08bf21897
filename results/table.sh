#!/usr/bin/env bash
# results/runs.jsonl -> the tables of results/README.md and the pictures assets/probe.png and assets/length.png.
#
#     bash results/table.sh
#
# Runs are named VARIANT-STEPS-sSEED. A mean over seeds stands with half of its 95 % interval (Student's t); a difference to AR is
# taken seed by seed. One seed: no interval.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHONPATH=. python - <<'EOF'
import json, math, pathlib, re
import numpy as np, scipy.stats
import sample

# The latest line of a run counts
lines = {line["run"]: line for line in map(json.loads, open("results/runs.jsonl"))}
VARIANTS = {"ar": "AR", "mim": "+ MIM", "mim-step": "+ MIM + step", "mim-view": "+ MIM + view", "step-view": "+ step + view",
            "all": "all (ST-AR)"}
groups = {}
for name, line in lines.items():
    match = re.fullmatch(r"(.+)-(\d+)-s(\d+)", name)
    variant, steps, seed = match[1], int(match[2]), int(match[3])
    groups.setdefault((steps, variant), {})[seed] = line


def steps_of(line):
    """{step: accuracy in %} of the run's own layer, "mean" for mean-pooled features."""
    return {r["step"]: 100 * r["accuracy"] for r in line["probe"] if r["layer"] == line["layer"]}


def single(line):
    return [value for step, value in steps_of(line).items() if step != "mean"]


def score(reference, cfg, measure, factor=1.0):
    return lambda line: factor * line["scores"][reference][f"cfg{cfg}"][measure]


PROBE = {"last step": lambda l: single(l)[-1], "best step": lambda l: max(single(l)), "mean of steps": lambda l: np.mean(single(l)),
         "mean-pooled": lambda l: steps_of(l)["mean"],
         "best layer, last step": lambda l: max(100 * r["accuracy"] for r in l["probe"] if r["step"] == max(single_steps(l))),
         "held-out loss": lambda l: l["metrics"]["val_nll"], "minutes": lambda l: l["train_minutes"]}
SAMPLES = {f"{measure}, cfg {cfg}": score("reconstructions", cfg, measure, 100 if measure == "class agreement" else 1)
           for cfg in (1, 2) for measure in ("FD-c", "IS-c", "precision-c", "recall-c", "class agreement")}
ORIGINALS = {f"{measure}, cfg {cfg}": score("originals", cfg, measure, 100 if measure == "class agreement" else 1)
             for cfg in (1, 2) for measure in ("FD-c", "IS-c", "precision-c", "recall-c", "class agreement")}


def single_steps(line):
    return [step for step in steps_of(line) if step != "mean"]


def digits(name):
    return 3 if name.startswith(("held-out", "FD-c", "precision", "recall")) else 2 if name.startswith("IS") else 1


def mean_and_half(values):
    """Mean and half of the 95 % interval of the mean; nan for one value."""
    half = scipy.stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return float(np.mean(values)), float(half)


def cell(values, places, sign=""):
    mean, half = mean_and_half(values)
    return f"{mean:{sign}.{places}f}" + ("" if math.isnan(half) else f" ± {half:.{places}f}")


def table(steps, columns):
    rows = [(variant, groups[steps, variant]) for variant in [*VARIANTS, *sorted({v for s, v in groups if s == steps} - set(VARIANTS))]
            if (steps, variant) in groups]
    text = ["| | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for variant, seeds in rows:
        values = [cell([f(line) for line in seeds.values()], digits(name)) for name, f in columns.items()]
        text.append(f"| {VARIANTS.get(variant, variant)} | {len(seeds)} | " + " | ".join(values) + " |")
    if {(steps, "ar"), (steps, "all")} <= groups.keys():
        a, b = groups[steps, "ar"], groups[steps, "all"]
        pairs = sorted(a.keys() & b.keys())
        values = [cell([f(b[s]) - f(a[s]) for s in pairs], digits(name), "+") for name, f in columns.items()]
        text.append(f"| *all - AR, seed by seed* | {len(pairs)} | " + " | ".join(values) + " |")
    return "\n".join(text)


def floor(steps):
    """Rows that belong to the images and the tokenizer, not to a run: equal in all lines of equal protocol."""
    line = next(iter(groups[steps, "ar"].values()))
    real, floor = line["scores"]["reconstructions"]["held-out"], line["scores"]["originals"]
    show = lambda row: ", ".join(f"{k} {v:.3f}" for k, v in row.items())
    return (f"- held-out images, decoded, against decoded training images: {show(real)}\n- held-out originals against originals: "
            f"{show(floor['held-out'])}\n- the floor, training images encoded and decoded, against originals: {show(floor['reconstructions'])}")


text = ["# Results\n\nWritten by `bash results/table.sh` from `runs.jsonl`, one JSON line per run, each with its command. Twenty classes of Tiny "
        "ImageNet\n(assets/tiny-imagenet-20.txt) at 32 px, the shipped tokenizer, student weights, 2 CPU cores, one thread per run unless a line "
        "says otherwise.\nProbe: top-1 in % on 1,000 held-out images, own layer unless said. 5,000 samples per run and scale. ± is half a 95 % interval "
        "over seeds."]
for steps in sorted({steps for steps, _ in groups}):
    text.append(f"## {steps:,} steps\n\n### Understanding\n\n{table(steps, PROBE)}\n\n### Samples against decoded real codes\n\n{table(steps, SAMPLES)}\n\n"
                f"### Samples against originals\n\n{table(steps, ORIGINALS)}")
    if (steps, "ar") in groups:
        text.append(floor(steps))
pathlib.Path("results/README.md").write_text("\n\n".join(text) + "\n")

main = max((steps for steps, v in groups if v == "all"), key=lambda s: len(groups[s, "all"]))
curves, bands = {}, {}
for variant in ("ar", "all"):
    runs = [[(s, v) for s, v in steps_of(line).items() if s != "mean"] for line in groups[main, variant].values()]
    name = VARIANTS[variant]
    curves[name] = [(points[0][0], mean_and_half([y for _, y in points])[0]) for points in zip(*runs)]
    bands[name] = [np.nan_to_num(mean_and_half([y for _, y in points])[1]) for points in zip(*runs)]
sample.save_image("assets/probe.png", sample.line_plot(curves, f"{main:,} steps, {len(runs)} seed(s)", "step of 64", "linear probe, top-1 %", bands))
lengths = sorted({steps for steps, v in groups if v == "all"} & {steps for steps, v in groups if v == "ar"})
if len(lengths) > 1:
    plots = {"last step of the probe, %": PROBE["last step"], "held-out loss, nats": PROBE["held-out loss"],
             "FD-c, guidance 2": SAMPLES["FD-c, cfg 2"], "class agreement, guidance 2": SAMPLES["class agreement, cfg 2"]}
    for i, (label, f) in enumerate(plots.items()):
        series = {VARIANTS[v]: [(math.log2(s), mean_and_half([f(l) for l in groups[s, v].values()])[0]) for s in lengths] for v in ("ar", "all")}
        sample.save_image(f"assets/length{i}.png", sample.line_plot(series, label, "log2 of the steps", label))
print(f"results/README.md: {len(lines)} runs")
EOF
