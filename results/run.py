"""Make one row of the results: train a run, probe it, sample it, score the samples, add a line to runs.jsonl.

    python results/run.py ar-2000-s0 --losses ar                        # on a CPU: twenty classes
    python results/run.py all-8000-s1 --guidance 1 1.25 1.5 2
    python results/run.py 200-all-9750-s0 --device cuda --samples 10000 --classifier-steps 12000
    python results/run.py shapes-all-600-s0 --preset nano

A row is called VARIANT-STEPS-sSEED: steps and seed are taken from there. Flags that are not named below go to
train.py, which finds the images or fetches them. The run stands in runs/NAME/, its samples and scores in
results/work/NAME/. What is there already is not made again, so the same command goes on after a stop.
"""

import argparse
import datetime
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import tokenizer


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of a row, and those for train.py."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="VARIANT-STEPS-sSEED")
    parser.add_argument("--device", default="", help="cpu, cuda or cuda:N (default: cuda if there is a GPU)")
    parser.add_argument("--guidance", nargs="+", default=["1", "1.25", "1.5"], help="scales to sample at")
    parser.add_argument("--samples", type=int, default=5000, help="how many at each scale")
    parser.add_argument("--classifier-steps", type=int, default=1200, help="training of the one that scores")
    args, flags = parser.parse_known_args(argv)
    if not (named := re.fullmatch(r"\w[\w.+-]*-(\d+)-s(\d+)", args.name)):
        parser.error(f"{args.name} is not VARIANT-STEPS-sSEED, as in ar-2000-s0")
    args.steps, args.seed = named.groups()
    args.device = args.device or tokenizer.choose_device("").type
    return args, flags


def script(name: str, *arguments) -> None:
    """Run one of the scripts; where it fails it has said why, and this ends, too."""
    done = subprocess.run([sys.executable, ROOT / name, *map(str, arguments)])
    if done.returncode:
        raise SystemExit(done.returncode)


def git(*words: str) -> str:
    """What git prints, with its last newline: a diff without it cannot be applied."""
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout


def make(args: argparse.Namespace, flags: list[str], work: Path) -> None:
    """Train, probe, sample and score; leaves trained.json, probe.json and a .json of scores in `work`."""
    run, device = Path("runs", args.name), ["--device", args.device]
    if not (work / "trained.json").exists():
        resume = ["--resume"] if (run / "checkpoint.pt").exists() else []  # stopped: its time is not known
        started = time.time()
        script("train.py", "--name", args.name, *device, *flags, "--steps", args.steps, "--seed", args.seed,
               *resume)
        minutes = None if resume else round((time.time() - started) / 60, 1)
        (work / "trained.json").write_text(json.dumps(minutes))
    if not (work / "probe.json").exists():
        script("probe.py", run, "--layers", "all", "--out", work, *device)

    samples = [work / f"cfg{scale}.npz" for scale in args.guidance]
    for scale, path in zip(args.guidance, samples):
        if not path.exists():
            for scores in work.glob("scores-*.json"):  # they lack these samples
                scores.unlink()
            script("sample.py", run, "--npz", path, "--num-images", args.samples, "--cfg", scale, *device)
    config = json.loads((run / "config.json").read_text())
    images = ["--real", tokenizer.find_images(config["data"]), "--subset", config["subset"]]
    for reference, more in (("reconstructions", []), ("originals", ["reconstructions"])):
        path = work / f"scores-{reference}.json"
        if not path.exists():
            script("fid.py", *images, "--reference", reference, "--fake", *samples, "real-half", *more,
                   "--features", "classifier", "--classifier-steps", args.classifier_steps, "--vq", run,
                   "--json", path, *device)


def line_of(args: argparse.Namespace, flags: list[str], work: Path) -> dict:
    """The line of a finished row: how it was made, and every number."""
    run = Path("runs", args.name)
    config = json.loads((run / "config.json").read_text())
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    probed = json.loads((work / "probe.json").read_text())["runs"][args.name]
    scores, classifiers = {}, {}
    for reference in ("reconstructions", "originals"):
        found = json.loads((work / f"scores-{reference}.json").read_text())
        scores[reference] = {Path(row).stem.split(" ")[0]: values for row, values in found["scores"].items()}
        classifiers[reference] = re.search(r"features: classifier (\w+)", "\n".join(found["protocol"]))[1]
    command = ["python", "results/run.py", args.name, "--device", args.device, "--guidance", *args.guidance,
               "--samples", str(args.samples), "--classifier-steps", str(args.classifier_steps), *flags]
    on_gpu = args.device.startswith("cuda")
    return {"run": args.name, "command": shlex.join(command), "seed": config["seed"],
            "device": torch.cuda.get_device_name(args.device) if on_gpu else "cpu",
            "commit": git("rev-parse", "--short", "HEAD").strip(), "diff": git("diff", "HEAD", "--", "*.py"),
            "date": str(datetime.date.today()), "torch": torch.__version__, "numpy": numpy.__version__,
            "python": platform.python_version(), "threads": torch.get_num_threads(),
            "train_minutes": json.loads((work / "trained.json").read_text()), "losses": config["losses"],
            "steps": metrics[-1]["step"], "metrics": metrics[-1],
            "val_nll": {str(line["step"]): line["val_nll"] for line in metrics if "val_nll" in line},
            **{key: probed[key] for key in ("layer", "probe", "attention", "cosine", "codes_changed")},
            "classifiers": classifiers, "scores": scores}


def main(argv: list[str] | None = None) -> None:
    """Make the row that the command line names and append its line to results/runs.jsonl."""
    args, flags = parse_arguments(argv)
    work = ROOT / "results/work" / args.name
    work.mkdir(parents=True, exist_ok=True)
    make(args, flags, work)
    with open(ROOT / "results/runs.jsonl", "a") as file:  # one write, so that two rows do not mix
        file.write(json.dumps(line_of(args, flags, work)) + "\n")


if __name__ == "__main__":
    main()
