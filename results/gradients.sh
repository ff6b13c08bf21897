#!/usr/bin/env bash
# Do the losses pull against each other? At five points of one run: the gradient of each weighted term of Eq. 8 on the
# blocks that all of them reach (1 ... depth), its size and its cosine with that of L_AR, over 16 batches at once.
#
#     bash results/gradients.sh NAME [flags of train.py]     # appends a line per point to results/gradients.jsonl
#
# From the top folder of a clone; DATA as in run.sh. Nothing is left in runs/ but an empty folder.
set -euo pipefail
PYTHONPATH=. python - "$@" <<'EOP'
import contextlib, json, os, sys
import torch
import train
name, *flags = sys.argv[1:]
data = os.environ.get("DATA", "data/tiny-imagenet-200.zip")
argv = ["--preset", "tiny", "--device", "cpu", "--name", name, "--data", data,
        "--subset", "assets/tiny-imagenet-20.txt", "--steps", "2000", *flags]


def pulls(run, step):
    """{term: gradient of alpha, beta included on the shared blocks, flat}, and the mean norm of a whole step's."""
    config, objective = run.config, run.objective
    weights = {"ar": 1, "mim": config.alpha, "step": config.beta / 2, "view": config.beta / 2}
    shared = list(objective.student.layers[:config.depth].parameters())
    everything = [p for p in objective.parameters() if p.requires_grad]
    sums, norms = {term: 0 for term in config.terms}, []
    for i in range(16):
        values = objective(*train.draw_batch(config, run.cache, step + i, 0, 1))
        for term in config.terms:
            found = torch.autograd.grad(weights[term] * values[f"loss_{term}"], shared, retain_graph=True)
            sums[term] = sums[term] + torch.cat([g.flatten() for g in found]) / 16
        whole = torch.autograd.grad(values["loss"], everything)
        norms.append(torch.cat([g.flatten() for g in whole]).norm().item())
    return sums, sum(norms) / len(norms)


with contextlib.ExitStack() as held:
    run = train.set_up(*train.parse_arguments(argv), held)
    forward, points = train.wrapped(run), [run.steps * part // 100 for part in (2, 10, 25, 50, 95)]
    for step, batch in enumerate(train.batches(run)):
        if step in points:
            pull, norm = pulls(run, step)
            total = sum(g.norm() for g in pull.values())
            line = {"run": name, "flags": flags, "after": step, "whole_norm": norm, "clip": run.config.clip}
            for term, g in pull.items():
                cosine = torch.cosine_similarity(g, pull["ar"], dim=0)
                line[term] = {"norm": g.norm().item(), "share": (g.norm() / total).item(),
                              "cosine_with_ar": cosine.item()}
            if "step" in pull and "view" in pull:
                line["cosine_step_view"] = torch.cosine_similarity(pull["step"], pull["view"], dim=0).item()
            print(json.dumps(line), flush=True)
            with open("results/gradients.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        train.train_step(run, forward, batch, step)
        if step == points[-1]:
            break
EOP
