"""Write the tables and the pictures of the recorded runs.

    python results/table.py

Reads results/runs.jsonl, one line per run, and results/gradients.jsonl. Fills the tables of results/README.md
and README.md, between the lines `<!-- results/table.py writes NAME -->` and `<!-- to here -->`, and draws
assets/{probe,guidance,lengths,sweeps,distance}.png. All else on the two pages is written by hand.
"""

import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import scipy.stats
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import probe
import sample

NAMES = {"ar": "AR", "mim": "+ MIM", "mim-step": "+ MIM + step", "mim-view": "+ MIM + view",
         "step-view": "+ step + view", "all": "**ST-AR**",  # the rows of the paper's Table 3, and one of ours
         "mask-10-k-16": "ST-AR, r = .1, K = 16"}
AR, STAR, LIGHTER = NAMES["ar"], NAMES["all"], NAMES["mask-10-k-16"]
# The paper's Tables 4, 5 and 6: {name: (axis, {setting: (variant, the paper's FID)})}; "all": its choice
SWEEPS = {
    "mask ratio": ("hidden keys, %", {10: ("mask-10", math.nan), 15: ("mask-15", 28.62), 25: ("all", 26.58),
                                      35: ("mask-35", 26.36), 45: ("mask-45", 27.50)}),
    "depth": ("quarter of the layers", {1: ("depth-1", 27.34), 2: ("all", 26.58), 3: ("depth-3", 28.76),
                                        4: ("depth-4", 29.45)}),
    "positions": ("K", {2: ("k-2", 27.50), 4: ("all", 26.58), 8: ("k-8", 26.54), 16: ("k-16", 25.78)})}


# ---- Columns: {heading: (value of a line, decimals)} -------------------------------------------------------

def curve(line: dict, layer: int | None = None) -> list[float]:
    """The probe's accuracy in % at the eight positions, of one layer (default: that of the contrast)."""
    layer = layer or line["layer"]
    return [100 * row["accuracy"] for row in line["probe"] if row["layer"] == layer and row["step"] != "mean"]


def pooled(line: dict) -> float:
    """The probe's accuracy in % on features averaged over all positions."""
    return next(100 * row["accuracy"] for row in line["probe"]
                if row["layer"] == line["layer"] and row["step"] == "mean")


def held_out_loss(line: dict) -> float:
    """Next-token loss on held-out images, nats per token."""
    return line["metrics"]["val_nll"]


def guided(line: dict, reference: str = "reconstructions") -> dict[float, dict]:
    """{guidance scale: scores} of a line, against decoded real images or against "originals"."""
    return {float(name[3:]): row for name, row in line["scores"][reference].items() if name.startswith("cfg")}


def score(measure: str, cfg: float, reference: str = "reconstructions"):
    """A function from a line to one score; nan where nothing was sampled at this guidance scale."""
    factor = 100 if measure == "class agreement" else 1
    return lambda line: factor * guided(line, reference).get(cfg, {}).get(measure, math.nan)


def classifier(line: dict) -> str:
    """The classifier that scored a line: its digest or, in older lines, how often it is right."""
    if "classifiers" in line:
        return line["classifiers"]["reconstructions"]
    return f"{line['scores']['reconstructions']['held-out']['class agreement']:.4f}"


RUNS = {}  # (steps, variant) -> {seed: line}, of two lines of one run the later
CLASSIFIERS = {}  # classifier -> the first line that it scored
for text in (ROOT / "results/runs.jsonl").read_text().splitlines():
    one = json.loads(text)
    variant, steps, seed = re.fullmatch(r"(.+)-(\d+)-s(\d+)", one["run"]).groups()
    RUNS.setdefault((int(steps), variant), {})[int(seed)] = one
    CLASSIFIERS.setdefault(classifier(one), one)
LETTERS = dict(zip(CLASSIFIERS, "ABCDEFGHIJKLMNOPQRSTUVWXYZ"))

UNDERSTANDING = {
    "last position": (lambda line: curve(line)[-1], 1),
    "best position": (lambda line: max(curve(line)), 1),
    "mean of eight": (lambda line: np.mean(curve(line)), 1),
    "mean-pooled": (pooled, 1),
    "best layer": (lambda line: max(curve(line, row["layer"])[-1] for row in line["probe"]), 1),
    "held-out loss": (held_out_loss, 3),
    "per image": (lambda line: 64 * held_out_loss(line), 1)}  # all runs have 64 tokens
BRIEF = {name: UNDERSTANDING[name]
         for name in ("last position", "mean of eight", "mean-pooled", "held-out loss")}
BRIEF |= {"classifier": (lambda line: LETTERS[classifier(line)], None), "FD-c": (score("FD-c", 1), 3),
          "FD-c, cfg 1.5": (score("FD-c", 1.5), 3),
          "to originals, cfg 1.5": (score("FD-c", 1.5, "originals"), 3),
          "class agreement, cfg 1.5": (score("class agreement", 1.5), 1)}


def samples_at(cfg: float) -> dict:
    """The columns of samples drawn at one guidance scale."""
    return {"classifier": BRIEF["classifier"], "FD-c": (score("FD-c", cfg), 3),
            "FD-c to originals": (score("FD-c", cfg, "originals"), 3), "IS-c": (score("IS-c", cfg), 2),
            "precision-c": (score("precision-c", cfg), 3), "recall-c": (score("recall-c", cfg), 3),
            "class agreement": (score("class agreement", cfg), 1)}


# ---- Tables ------------------------------------------------------------------------------------------------

def mean_and_half(values: list[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; 0 for one value."""
    n = len(values)
    half = scipy.stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / math.sqrt(n) if n > 1 else 0.0
    return float(np.mean(values)), float(half)


def cell(values: list, decimals: int | None, sign: str = "") -> str:
    """Mean ± half interval, or both of two values: their interval says little. Text has no decimals."""
    if decimals is None:
        return "".join(values)
    if not np.isfinite(values).all():  # not measured
        return ""
    if len(values) == 2:
        return ", ".join(f"{value:{sign}.{decimals}f}" for value in values)
    mean, half = mean_and_half(values)
    return f"{mean:{sign}.{decimals}f}" + (f" ± {half:.{decimals}f}" if len(values) > 1 else "")


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines).replace("|  |", "| |")


def table(rows: dict[str, dict[int, dict]], columns: dict, against: str = "") -> str:
    """A table of {name: {seed: line}}; below it each row's difference to the row `against`, seed by seed."""
    text = []
    for name, seeds in rows.items():
        lines = [line for _, line in sorted(seeds.items())]
        text.append([name, len(seeds), *(cell([value(line) for line in lines], decimals)
                                         for value, decimals in columns.values())])
    for name, seeds in rows.items() if against else ():
        both = sorted(seeds.keys() & rows[against].keys())
        if name != against and both:
            text.append([f"*{name.strip('*')}, less {against.strip('*')}*", len(both)])
            for value, decimals in columns.values():
                differences = [] if decimals is None else [
                    value(seeds[seed]) - value(rows[against][seed]) for seed in both]
                text[-1].append(cell(differences, decimals, "+"))
    return markdown(["", "seeds", *columns], text)


def samples(rows: dict[str, dict[int, dict]], cfgs: tuple[float, ...], against: str = "") -> str:
    """For each guidance scale a table of the rows that were sampled at it."""
    parts = []
    for cfg in cfgs:
        sampled = {name: seeds for name, seeds in rows.items()
                   if all(cfg in guided(line) for line in seeds.values())}
        parts += [f"Samples at guidance {cfg:g}" if cfg > 1 else "Samples without guidance",
                  table(sampled, samples_at(cfg), against)]
    return "\n\n".join(parts)


def whole(rows: dict[str, dict[int, dict]], cfgs: tuple[float, ...], against: str) -> str:
    """The table of understanding, then those of samples."""
    return table(rows, UNDERSTANDING, against) + "\n\n" + samples(rows, cfgs, against)


def variants(steps: int, prefix: str = "") -> dict[str, dict[int, dict]]:
    """The rows of NAMES that were run for so many steps."""
    return {name: RUNS[steps, prefix + v] for v, name in NAMES.items() if (steps, prefix + v) in RUNS}


def minutes() -> str:
    """What a step of ST-AR costs: recorded minutes of training, for each seed, and ST-AR's over AR's."""
    rows = []
    for title, steps, prefix in (
            ("2,000 steps, eager", 2000, ""), ("8,000 steps, compiled", 8000, ""),
            ("16,000 steps, compiled", 16000, ""), ("200 classes, on a GPU", 9750, "200-")):
        ar, star = ([line["train_minutes"] for _, line in sorted(RUNS[steps, prefix + v].items())]
                    for v in ("ar", "all"))
        rows.append([title, *(", ".join(map(str, values)) for values in (ar, star)),
                     ", ".join(f"{b / a:.2f}" for a, b in zip(ar, star))])
    return markdown(["", "AR, minutes", "ST-AR, minutes", "ratio"], rows)


def perfect(steps: int, prefix: str, reference: str) -> float:
    """FD-c of real images that went through the tokenizer: what a perfect model of its codes would score.

    As few images as are held out of the twenty classes would have a distance by their number alone; there one
    half of the training images is scored against the other. With 200 classes 10,000 are held out.
    """
    scores = RUNS[steps, prefix + "ar"][0]["scores"]
    if reference == "originals":
        return scores["originals"]["reconstructions"]["FD-c"]
    if prefix == "200-":
        return scores["reconstructions"]["held-out"]["FD-c"]
    half = json.loads((ROOT / "results/real-half.json").read_text())  # written by fid.py
    return half["scores"]["real-half"]["FD-c"]


def real_images() -> str:
    """What each classifier says of real images."""
    rows = []
    for key, line in CLASSIFIERS.items():
        scored = sum(classifier(other) == key for seeds in RUNS.values() for other in seeds.values())
        decoded, originals = (line["scores"][reference] for reference in ("reconstructions", "originals"))
        kind = "held-out" if "held-out" in decoded else "real-half"  # which has no labels
        agreement = decoded[kind]["class agreement"]
        rows.append([LETTERS[key], scored, kind, "" if agreement is None else f"{100 * agreement:.1f}",
                     f"{decoded[kind]['FD-c']:.3f}", f"{decoded[kind]['IS-c']:.2f}",
                     f"{originals[kind]['FD-c']:.3f}", f"{originals['reconstructions']['FD-c']:.3f}"])
    return markdown(["classifier", "runs scored", "images", "class agreement", "FD-c", "IS-c",
                     "originals: FD-c", "decoded to originals: FD-c"], rows)


def gradients() -> str:
    """The table of gradients.jsonl."""
    terms, rows = ("ar", "mim", "step", "view"), []
    for line in map(json.loads, (ROOT / "results/gradients.jsonl").read_text().splitlines()):
        rows.append([f"{line['after']:,}", *(f"{line[term]['share']:.2f}" for term in terms),
                     *(f"{line[term]['cosine_with_ar']:+.2f}" for term in terms[1:]),
                     f"{line['whole_norm']:.2f}"])
    return markdown(["after step", "share of AR", "MIM", "step", "view", "cosine with AR: MIM", "step",
                     "view", "norm of all"], rows)


def summary() -> str:
    """The table of README.md: means over seeds, without their intervals."""
    columns = {"probe, last position": (lambda line: curve(line)[-1], 0), "probe, mean-pooled": (pooled, 0),
               "class agreement": (score("class agreement", 1), 0), "held-out loss": (held_out_loss, 2),
               "FD-c": (score("FD-c", 1.25), 2), "FD-c to originals": (score("FD-c", 1.25, "originals"), 2)}
    rows = []
    for title, steps, prefix in (("200 classes", 9750, "200-"), ("20 classes", 16000, "")):
        for variant in ("ar", "all"):
            seeds = RUNS[steps, prefix + variant].values()
            means = [f"{np.mean([value(line) for line in seeds]):.{decimals}f}"
                     for value, decimals in columns.values()]
            rows.append([f"{title}, {NAMES[variant].strip('*')}", *means])
        held_out = RUNS[steps, prefix + "ar"][0]["scores"]["reconstructions"]["held-out"]
        rows.append([f"{title}, *real images*", "", "", f"{100 * held_out['class agreement']:.0f}", "",
                     f"{perfect(steps, prefix, 'reconstructions'):.2f}",
                     f"{perfect(steps, prefix, 'originals'):.2f}"])
    return markdown(["", *columns], rows)


def tables() -> dict[str, str]:
    """{name: text} of everything that stands in results/README.md between two marks."""
    three = variants(2000)
    equal = {AR: three[AR], "AR, 2,600 steps": RUNS[2600, "ar"], "+ step + view": three["+ step + view"],
             STAR: three[STAR]}
    long = variants(16000)
    long.pop(LIGHTER)  # scored by another classifier, and compared with AR runs that it scored, too
    again = {AR: RUNS[16000, "ar-again"] | {2: RUNS[16000, "ar"][2]}, LIGHTER: RUNS[16000, "mask-10-k-16"]}
    gpu = variants(9750, "200-")
    pair = {AR: gpu[AR], STAR: gpu[STAR]}  # the lighter mask was sampled in another precision
    text = {"each loss": whole(three, (1, 1.5), AR), "equal time": whole(equal, (1, 1.5), "AR, 2,600 steps"),
            "minutes": minutes(), "500 steps": whole(variants(500), (1, 1.5), AR),
            "8,000 steps": whole(variants(8000), (1, 1.25, 1.5), AR),
            "16,000 steps": whole(long, (1, 1.25, 1.5), AR),
            "32,000 steps": whole(variants(32000), (1, 1.25, 1.5), AR),
            "lighter mask": whole(again, (1, 1.25, 1.5), AR),
            "200 classes": table(gpu, UNDERSTANDING, AR) + "\n\n" + samples(pair, (1, 1.25, 1.5, 2), AR),
            "tiny on a CPU": table({STAR: RUNS[5000, "all"]}, UNDERSTANDING),
            "shapes": whole(variants(600, "shapes-"), (1, 1.5), AR),
            "real images": real_images(), "gradients": gradients()}
    sizes = {f"`{size}`, {name}": RUNS[800, f"{size}-{v}"] for size in ("nano", "tiny", "small")
             for v, name in (("ar", "AR"), ("all", "ST-AR"))}
    text["size"] = table(sizes, BRIEF)
    pairs = {v: {seed: line for seed, line in seeds.items() if seed < 2}
             for (steps, v), seeds in RUNS.items() if steps == 2000}
    for name, (_, settings) in SWEEPS.items():
        text[name] = table({f"{setting} ({fid})".replace(" (nan)", ""): pairs[v]
                            for setting, (v, fid) in settings.items()}, BRIEF)
    swept = {v for _, settings in SWEEPS.values() for v, _ in settings.values()}
    asked = ("ar", "all", *sorted(pairs.keys() - NAMES.keys() - swept))
    text["questions"] = table({NAMES.get(v, v): {0: pairs[v][0]} for v in asked}, BRIEF)
    return text


def fill(page: str, texts: dict[str, str]) -> None:
    """Write each text between its two marks on a page; SystemExit, naming the mark, if they are not there."""
    path = ROOT / page
    content = path.read_text()
    for name, text in texts.items():
        start, end = f"<!-- results/table.py writes {name} -->", "<!-- to here -->"
        before, found, rest = content.partition(start)
        between, ended, after = rest.partition(end)
        if not found or not ended or "<!--" in between:  # the last: the end of another table
            raise SystemExit(f"{page} has no line {start} with a line {end} below it; add both, and the "
                             "table will stand between them.")
        content = f"{before}{start}\n\n{text}\n\n{end}{after}"
    path.write_text(content)


# ---- Pictures ----------------------------------------------------------------------------------------------

FIFTY_EPOCHS = {"20 classes, 16,000 steps": (16000, ""), "200 classes, 9,750 steps": (9750, "200-")}
PAIR = {"AR": "ar", "ST-AR": "all"}


def draw(name: str, grid: list[list[Image.Image]]) -> None:
    """Write rows of plots of one size as one picture in assets/."""
    pixels = np.concatenate([np.concatenate(list(map(np.asarray, row)), 1) for row in grid])
    sample.save_image(ROOT / "assets" / name, Image.fromarray(pixels))


def plot(lines: dict, title: str, x_label: str, y_label: str, **style) -> Image.Image:
    """A line plot of the size that all panels have."""
    return sample.line_plot(lines, title, x_label, y_label, width=480, height=300, **style)


def draw_probe() -> None:
    """The probe's accuracy by position, and dashed that of mean-pooled features; bands as in `cell`."""
    panels = []
    for title, (steps, prefix) in FIFTY_EPOCHS.items():
        lines, bands, dashed = {}, {}, {}
        for name, variant in PAIR.items():
            seeds = list(RUNS[steps, prefix + variant].values())
            places = [list(values) for values in zip(*map(curve, seeds))]  # eight positions, of all seeds
            lines[name] = [(8 * i, np.mean(values)) for i, values in enumerate(places, 1)]
            bands[name] = [mean_and_half(values)[1] if len(values) > 2 else np.ptp(values) / 2
                           for values in places]  # of two seeds: from one to the other
            dashed[name] = [(x, np.mean([pooled(line) for line in seeds])) for x in (8, 64)]
        panels.append(plot(lines, title, "position", "probe, top-1 %", bands=bands, dashed=dashed))
    draw("probe.png", [panels])


def draw_guidance() -> None:
    """FD-c over class agreement at the guidance scales, to both references, seeds thin and their mean thick.

    One classifier scored all of a panel: of the twenty classes seeds 0 and 1. Dashed: what real images score.
    """
    grid = []
    for reference, what in (("reconstructions", "decoded"), ("originals", "originals")):
        panels = []
        for title, (steps, prefix) in FIFTY_EPOCHS.items():
            thin, floor = {}, perfect(steps, prefix, reference)
            for name, variant in PAIR.items():
                scales = [sorted(guided(RUNS[steps, prefix + variant][seed], reference).items())
                          for seed in (0, 1)]
                thin[name] = [[(100 * row["class agreement"], row["FD-c"]) for _, row in rows]
                              for rows in scales]
            lines = {name: [tuple(point) for point in np.mean(seeds, 0)] for name, seeds in thin.items()}
            places = [x for line in lines.values() for x, _ in line]
            dashed = {"real images": [(min(places), floor), (max(places), floor)]}
            panels.append(plot(lines | {"real images": []}, title, "class agreement, %", f"FD-c to {what}",
                               thin=thin, dashed=dashed))
        grid.append(panels)
    draw("guidance.png", grid)


def draw_distance() -> None:
    """How far a query looks, by layer."""
    panels = []
    for title, (steps, prefix) in FIFTY_EPOCHS.items():
        lines = {}
        for name, variant in PAIR.items():
            seeds = RUNS[steps, prefix + variant].values()
            lines[name] = list(enumerate(np.mean([line["attention"]["distance"] for line in seeds], 0), 1))
        lines["spread evenly"] = [(layer, probe.even_distance(64)) for layer, _ in lines["AR"]]
        panels.append(plot(lines, title, "layer", "tokens away"))
    draw("distance.png", [panels])


def draw_lengths() -> None:
    """What ST-AR gives and costs over the length of training; compared with AR seed by seed."""
    last = UNDERSTANDING["last position"][0]
    measured = [
        ("", "probe, last position, top-1 %", lambda line, ar: last(line)),
        ("", "held-out loss less AR's, nats", lambda line, ar: held_out_loss(line) - held_out_loss(ar))]
    for reference, what in (("reconstructions", "decoded"), ("originals", "originals")):
        for cfg in (1, 1.5):
            distance = score("FD-c", cfg, reference)
            measured.append((f"to {what}, " + ("guidance 1.5" if cfg > 1 else "no guidance"), "FD-c / AR's",
                             lambda line, ar, distance=distance: distance(line) / distance(ar)))
    panels = []
    for title, label, value in measured:
        lines, bands = {}, {}
        for name, variant in (PAIR | {"without MIM": "step-view"}).items():
            lines[name], bands[name] = [], []
            for steps in (500, 2000, 8000, 16000, 32000):
                seeds, ar = RUNS.get((steps, variant), {}), RUNS[steps, "ar"]
                if seeds:
                    mean, half = mean_and_half([value(line, ar[seed]) for seed, line in seeds.items()])
                    lines[name].append((steps / 1000, mean))
                    bands[name].append(half)
        panels.append(plot(lines, title, "thousand steps", label, bands=bands, log_x=True))
    draw("lengths.png", [panels[:2], panels[2:4], panels[4:]])


def draw_sweeps() -> None:
    """FD-c of seed 0 and the paper's FID over mask ratio, depth and K."""
    panels = []
    for axis, settings in SWEEPS.values():
        chosen = next(fid for variant, fid in settings.values() if variant == "all")
        lines = {"the paper's FID": [(setting, fid / chosen) for setting, (_, fid) in settings.items()]}
        for cfg in (1, 1.5):
            value = score("FD-c", cfg)
            lines[f"FD-c, cfg {cfg:g}"] = [
                (setting, value(RUNS[2000, variant][0]) / value(RUNS[2000, "all"][0]))
                for setting, (variant, _) in settings.items()]
        panels.append(plot(lines, "", axis, "relative to the paper's choice"))
    draw("sweeps.png", [panels])


def main() -> None:
    """Everything that is made of the recorded runs; SystemExit if a page lacks a mark."""
    for picture in (draw_probe, draw_guidance, draw_distance, draw_lengths, draw_sweeps):
        picture()
    fill("results/README.md", tables())
    fill("README.md", {"this": summary()})


if __name__ == "__main__":
    main()
