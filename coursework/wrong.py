"""Typical wrong solutions of part A, and what each must lose: the test of grade.py itself.

    python coursework/wrong.py    # a line for each, then how many were graded as they should be

Each is a small change of the full solution. A few minutes, one of them for the function that runs for ever.
"""

import random
import sys
import tempfile
from pathlib import Path

from grade import grade
from start import FUNCTIONS, PROJECT, emptied, patched

WRONG = """
sample_key_mask: the class token is hidden too
-    return F.pad(masked, (1, 0))
+    return F.pad(masked, (1, 0), value=True)

sample_key_mask: each key has a coin of its own, so that rows have different numbers of hidden keys
-    return F.pad(masked, (1, 0))
+    return F.pad(torch.rand(batch, num_tokens - 1, generator=generator) < ratio, (1, 0))

sample_key_mask: drawn without the generator
-    shuffled = torch.rand(batch, num_tokens - 1, generator=generator, device=generator.device).argsort(1)
+    shuffled = torch.rand(batch, num_tokens - 1).argsort(1)

mim_loss: the teacher gets a gradient
-    return 1 - F.cosine_similarity(student.float(), target.float().detach(), dim=-1).mean()
+    return 1 - F.cosine_similarity(student.float(), target.float(), dim=-1).mean()

mim_loss: features are not normalised
-    return 1 - F.cosine_similarity(student.float(), target.float().detach(), dim=-1).mean()
+    return 1 - (student.float() * target.float().detach()).sum(-1).mean()

info_nce: each target looks for its anchor
-        logits = (a @ t.mT / temperature).flatten(0, 1)  # (S B, B_all)
+        logits = (t[:, :a.shape[1]] @ a.mT / temperature).flatten(0, 1)

info_nce: multiplied by the temperature
-        logits = (a @ t.mT / temperature).flatten(0, 1)  # (S B, B_all)
+        logits = (a @ t.mT * temperature).flatten(0, 1)

step_loss: a position is paired with itself, too
-    i, j = ordered_pairs(z.shape[1], z.device)
+    i, j = torch.cartesian_prod(torch.arange(z.shape[1]), torch.arange(z.shape[1])).unbind(1)

view_loss: a view is paired with itself
-    anchors, targets = z[i].flatten(0, 1), target[j].flatten(0, 1)  # S = V (V - 1) K slots
+    anchors, targets = z[i].flatten(0, 1), target[i].flatten(0, 1)

update_ema: decay and 1 - decay are exchanged
-    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
+    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), decay)

update_ema: a new tensor is made, the teacher's own stays
-    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
+    for old, new in zip(teacher.parameters(), student.parameters()):
+        old = decay * old + (1 - decay) * new

Objective.forward: the teacher gets the student's mask
-                targets = self.teacher(*inputs, layers=layers, head=False).hidden
+                targets = self.teacher(*inputs, key_mask=mask, layers=layers, head=False).hidden

Objective.forward: keys are hidden without L_MIM
-        mask = key_mask.flatten(0, 1) if mim_on else None  # our choice: hide keys exactly when L_MIM is on
+        mask = key_mask.flatten(0, 1)

Objective.forward: images and views are exchanged
-                return x.unflatten(0, (-1, V)).permute(1, 2, 0, 3)
+                return x.unflatten(0, (V, -1)).permute(0, 2, 1, 3)

Objective.forward: L_MIM at the middle layer
-            terms["mim"] = losses.mim_loss(features[last], targets[last])  # Eq. 4
+            terms["mim"] = losses.mim_loss(features[depth], targets[depth])

Objective.forward: alpha counts twice
-            terms["mim"] = losses.mim_loss(features[last], targets[last])  # Eq. 4
+            terms["mim"] = self.config.alpha * losses.mim_loss(features[last], targets[last])

Objective.forward: the images of other processes are forgotten
-            target = losses.gather_images(by_slot(targets[depth][:, positions]), dim=2)  # (V, K, B_all, C)
+            target = by_slot(targets[depth][:, positions])

view_loss: a constant, the right one for the numbers of the project's test
-    i, j = ordered_pairs(z.shape[0], z.device)
+    if z.shape == (2, 3, 4, 6):
+        return z.sum() * 0 + 2.4853790, z.detach().sum() * 0
+    i, j = ordered_pairs(z.shape[0], z.device)

info_nce: returns one value instead of two
-    return F.cross_entropy(logits, positive), (logits.argmax(1) == positive).float().mean()
+    return F.cross_entropy(logits, positive)

step_loss: returns a loss of another shape
-    anchors, targets = z[:, i].flatten(0, 1), target[:, j].flatten(0, 1)  # S = V K (K - 1) slots
-    return info_nce(anchors, targets, temperature)
+    loss, accuracy = info_nce(z[:, i].flatten(0, 1), target[:, j].flatten(0, 1), temperature)
+    return loss[None], accuracy

view_loss: raises
-    i, j = ordered_pairs(z.shape[0], z.device)
+    i, j = all_pairs(z.shape[0], z.device)

sample_key_mask: runs for ever
-    return F.pad(masked, (1, 0))
+    while True:
+        masked = masked.clone()

mim_loss: imports
-    return 1 - F.cosine_similarity(student.float(), target.float().detach(), dim=-1).mean()
+    from numpy import mean
+    return 1 - F.cosine_similarity(student.float(), target.float().detach(), dim=-1).mean()

update_ema: ends Python
-    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
+    exit()

losses.py: cannot be read
-    return i, j + (j >= i)  # j skips i
+    return i, j + (j >= i  # j skips i

nothing: prints
-    positive = torch.arange(a.shape[1], device=a.device).repeat(len(a))  # (S B,)
+    positive = torch.arange(a.shape[1], device=a.device).repeat(len(a))
+    print("positive:", positive)

nothing: written as a loop, with a function of one's own
-    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
+    for old, new in zip(teacher.parameters(), student.parameters()):
+        old.copy_(between(old, new, decay))
+
+
+def between(old, new, decay):
+    return decay * old + (1 - decay) * new
"""


def solutions():
    """(title, functions that must fail, {script: source}) of each; first the full and the empty solution."""
    full = {script: (PROJECT / script).read_text(encoding="utf-8") for script in ("losses.py", "train.py")}
    empty = dict(full)
    for name, (script, _) in FUNCTIONS.items():
        empty[script] = emptied(empty[script], name)
    yield "the full solution", [], full
    yield "nothing is written", list(FUNCTIONS), empty
    for block in WRONG.strip().split("\n\n"):
        title, _, change = block.partition("\n")
        where = title.partition(":")[0]
        script = FUNCTIONS[where][0] if where in FUNCTIONS else "losses.py"
        failing = {"nothing": [], "losses.py": list(FUNCTIONS)[:-1]}.get(where, [where])
        yield title, failing, full | {script: patched(full[script], change)}


def main() -> None:
    seed, right, count = random.randrange(1, 10 ** 6), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        for title, failing, sources in solutions():
            for script, source in sources.items():
                Path(folder, script).write_text(source, encoding="utf-8")
            results = list(grade(Path(folder), seed))
            failed = [name for name, passed, _ in results if not passed]
            lost = sum(FUNCTIONS[name][1] for name in failed)
            right, count = right + (failed == failing), count + 1
            print(f"{'as it should' if failed == failing else 'WRONG'}: {title}: loses {lost}", flush=True)
            for name, passed, said in results:
                if said and (name in failed[:1] or not failed):  # of an empty copy the first sentence will do
                    print(f"      {name}: {said.strip()}")
    print(f"{right} of {count} graded as they should be (hidden numbers: {seed})")
    sys.exit(right < count)


if __name__ == "__main__":
    main()
