"""What metrics.jsonl of several runs holds, as one picture: a panel for each quantity, a line for each run.

    python coursework/curves.py runs/healthy runs/puzzle-3    # writes curves.png
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sample  # the project's, wherever this is started

PANELS = ["loss_ar", "val_nll", "loss_mim", "loss_step", "loss_view", "grad_norm",
          "acc_step", "acc_view", "acc_label"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("--out", type=Path, default=Path("curves.png"))
    args = parser.parse_args()
    runs = {}
    for run in args.runs:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
        runs[run.name] = [json.loads(line) for line in text.splitlines()]
    panels = []
    for panel in PANELS:
        curves = {name: [(line["step"], line[panel]) for line in lines if panel in line]
                  for name, lines in runs.items()}
        panels.append(np.asarray(sample.line_plot(curves, panel, "step", "", width=450, height=280)))
    rows = [np.concatenate(panels[i:i + 3], 1) for i in range(0, len(panels), 3)]
    picture = Image.fromarray(np.concatenate(rows))
    picture.resize((picture.width // 2, picture.height // 2), Image.LANCZOS).quantize(64).save(args.out)


if __name__ == "__main__":
    main()
