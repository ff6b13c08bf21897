#!/usr/bin/env bash
# One line of results: train a run, probe it, sample it, score it, and append all numbers to results/runs.jsonl.
#
#     bash results/run.sh NAME [flags of train.py]       # as each line's "command"
#     DATA=PACK.zip bash results/run.sh NAME ...          # other images than data/tiny-imagenet-200.zip
#     DEVICE=cuda SUBSET= bash results/run.sh NAME ...    # on a GPU, all classes
#     PRESET=nano bash results/run.sh NAME ...            # the built-in images
#
# From the top folder of a clone. SUBSET lists the classes, by default twenty; without it all are taken. What is there
# already is not made again, so that a stopped line goes on. CFGS are the guidance scales, NUM the samples at each,
# CLASSIFIER_STEPS the training of the classifier that scores them. A line made with changed code holds the change as
# "diff".
set -euo pipefail
name=$1
shift
data=${DATA:-data/tiny-imagenet-200.zip}
subset=${SUBSET-assets/tiny-imagenet-20.txt}
preset=${PRESET:-tiny}
[ "$preset" != nano ] || data=shapes subset=
device=${DEVICE:-cpu}
steps=${CLASSIFIER_STEPS:-1200}
out=results/work/$name
mkdir -p "$out"

if [ ! -f "$out/trained" ]; then
  start=$SECONDS
  resume=$([ ! -f "runs/$name/checkpoint.pt" ] || echo --resume)
  python train.py --preset "$preset" --device "$device" --name "$name" --data "$data" --subset "$subset" \
    "$@" $resume
  echo "$([ -n "$resume" ] || echo $((SECONDS - start)))" > "$out/trained"
fi
[ -f "$out/probe.json" ] || python probe.py "runs/$name" --layers all --out "$out" --device "$device"
for cfg in ${CFGS:-1 1.25 1.5 2 3}; do
  [ ! -f "$out/cfg$cfg.npz" ] || continue
  rm -f "$out"/{reconstructions,originals}.json  # scores without these samples
  python sample.py "runs/$name" --npz "$out/cfg$cfg.npz" --num-images "${NUM:-5000}" --cfg "$cfg" --seed 0 \
    --device "$device"
done
score() {  # REFERENCE, then more rows
  reference=$1
  shift
  [ -f "$out/$reference.json" ] ||
    python fid.py --real "$data" --subset "$subset" --features classifier --classifier-steps "$steps" \
      --vq "runs/$name" --reference "$reference" --fake "$out"/cfg*.npz held-out "$@" --device "$device" \
      --json "$out/$reference.json"
}
score reconstructions
score originals reconstructions

PYTHONPATH=. python - "$name" "$out" "$data" "$@" <<'EOF'
import contextlib, datetime, fcntl, json, os, pathlib, platform, subprocess, sys
import numpy, torch
import train
name, out, data, *flags = sys.argv[1:]
out, run = pathlib.Path(out), pathlib.Path("runs", name)
metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
config = json.loads((run / "config.json").read_text())
seconds = (out / "trained").read_text().strip()  # empty if training was stopped in between
probe = json.loads((out / "probe.json").read_text())["runs"][name]
scores = {}
for reference in ("reconstructions", "originals"):
    table = json.loads((out / f"{reference}.json").read_text())["scores"]
    scores[reference] = {pathlib.Path(row).stem.split(" ")[0]: values for row, values in table.items()}
with contextlib.ExitStack() as held:  # the teacher's held-out loss; metrics.jsonl has the student's
    resume = ["--resume", "--device", os.environ.get("DEVICE", "cpu"), "--name", name, "--data", data]
    finished = train.set_up(*train.parse_arguments(resume), held)
    finished.objective.student.load_state_dict(finished.objective.teacher.state_dict())
    teacher_nll = train.validation_loss(finished)

def git(*words):
    return subprocess.run(["git", *words], capture_output=True, text=True).stdout.strip()

settings = [f"{key}={os.environ[key]}" for key in ("PRESET", "DEVICE", "SUBSET", "CLASSIFIER_STEPS", "NUM")
            if key in os.environ]
device = finished.device
line = {"run": name, "command": " ".join([*settings, "bash results/run.sh", name, *flags]), "seed": config["seed"],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "commit": git("rev-parse", "--short", "HEAD"), "diff": git("diff", "HEAD", "--", "*.py"),
        "date": str(datetime.date.today()), "torch": torch.__version__, "numpy": numpy.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(),
        "train_minutes": round(int(seconds) / 60, 1) if seconds else None, "losses": config["losses"],
        "steps": metrics[-1]["step"], "metrics": metrics[-1], "teacher_nll": teacher_nll,
        "val_nll": {str(m["step"]): m["val_nll"] for m in metrics if "val_nll" in m},
        "layer": probe["layer"], "probe": probe["probe"], "attention": probe["attention"],
        "cosine": probe["cosine"], "codes_changed": probe["codes_changed"], "scores": scores}
with open("results/runs.jsonl", "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps(line) + "\n")
EOF
