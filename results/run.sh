#!/usr/bin/env bash
# One line of results: train a run, probe it, sample it, score it, and append what was measured to results/runs.jsonl.
#
#     bash results/run.sh NAME [flags of train.py]        # as the lines of results/lines.txt
#     DATA=tiny-imagenet-20.zip bash results/run.sh ...   # other images, or a pack of the same
#
# Run from the top folder of a clone. DATA is a folder or a zip with Tiny ImageNet's layout; the classes are the twenty of
# assets/tiny-imagenet-20.txt. A run that exists is not trained again, so that a stopped line goes on where it was.
set -euo pipefail
name=$1; shift
data=${DATA:-data/tiny-imagenet-200.zip}
list=assets/tiny-imagenet-20.txt
out=results/work/$name
mkdir -p "$out"
training=(--preset tiny --device cpu --name "$name" --data "$data" --subset "$list" "$@")
start=$SECONDS
if [ ! -f "$out/trained" ]; then
  if [ -f "runs/$name/checkpoint.pt" ]; then training+=(--resume); fi
  python train.py "${training[@]}"
  echo $((SECONDS - start)) > "$out/trained"
fi
[ -f "$out/probe.json" ] || python probe.py "runs/$name" --layers all --out "$out"
for cfg in ${CFGS:-1 2}; do
  [ -f "$out/cfg$cfg.npz" ] || python sample.py "runs/$name" --npz "$out/cfg$cfg.npz" --num-images "${NUM:-5000}" --cfg "$cfg" --seed 0
done
fakes=("$out"/cfg*.npz)
for reference in reconstructions originals; do
  [ -f "$out/$reference.json" ] || python fid.py --real "$data" --subset "$list" --features classifier --vq "runs/$name" \
    --reference "$reference" --fake "${fakes[@]}" held-out $([ $reference = originals ] && echo reconstructions) \
    --json "$out/$reference.json"
done
python - "$name" "$out" "$@" <<'EOF'
import datetime, fcntl, json, pathlib, platform, subprocess, sys
import numpy, torch
name, out, *flags = sys.argv[1:]
out, run = pathlib.Path(out), pathlib.Path("runs", name)
metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
config = json.loads((run / "config.json").read_text())
probe = json.loads((out / "probe.json").read_text())["runs"][name]
scores = {}
for reference in ("reconstructions", "originals"):
    table = json.loads((out / f"{reference}.json").read_text())["scores"]
    scores[reference] = {pathlib.Path(row).stem.split(" ")[0]: values for row, values in table.items()}
line = {"run": name, "command": " ".join(["bash results/run.sh", name, *flags]), "seed": config["seed"],
        "commit": subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": str(datetime.date.today()), "torch": torch.__version__, "numpy": numpy.__version__,
        "python": platform.python_version(), "threads": torch.get_num_threads(),
        "train_minutes": round(int((out / "trained").read_text()) / 60, 1), "losses": config["losses"],
        "steps": metrics[-1]["step"], "metrics": metrics[-1],
        "val_nll": {str(m["step"]): m["val_nll"] for m in metrics if "val_nll" in m},
        "layer": probe["layer"], "probe": probe["probe"], "attention": probe["attention"], "cosine": probe["cosine"],
        "scores": scores}
with open("results/runs.jsonl", "a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write(json.dumps(line) + "\n")
EOF
