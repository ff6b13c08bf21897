"""The broken copies of part C, for start.py --bug N. If you are to find them, do not read on.

Each is a change that raises no error and that somebody could make in good faith. What it is, and which sign
gives it away, is in solutions.md.
"""

BUGS = """
1 losses.py
-        logits = (a @ t.mT / temperature).flatten(0, 1)  # (S B, B_all)
+        logits = (a @ t.mT * temperature).flatten(0, 1)  # (S B, B_all)

2 model.py
-            allowed = allowed & ~key_mask[:, None, None, :]  # (B, 1, t, s): Eq. 3
+            allowed = allowed & ~key_mask[:, None, :, None]  # (B, 1, t, s): Eq. 3

3 losses.py
-    return F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
+    return F.cross_entropy(logits[:, 1:].flatten(0, 1).float(), tokens[:, :-1].flatten())

4 train.py
-        self.teacher = copy.deepcopy(student).eval().requires_grad_(False)  # no dropout, ever
+        self.teacher = copy.deepcopy(student).eval()  # no dropout, ever

4 train.py
-            with torch.no_grad():  # no key masked, no gradient, no logits; blocks as far as needed
-                layers = (depth, last) if mim_on else (depth,)
-                targets = self.teacher(*inputs, layers=layers, head=False).hidden
+            # no key masked, no logits; blocks as far as needed
+            layers = (depth, last) if mim_on else (depth,)
+            targets = self.teacher(*inputs, layers=layers, head=False).hidden

4 losses.py
-    return 1 - F.cosine_similarity(student.float(), target.float().detach(), dim=-1).mean()
+    return 1 - F.cosine_similarity(student.float(), target.float(), dim=-1).mean()

5 train.py
-    classes = torch.from_numpy(cache.labels[images[mine]]).masked_fill(dropped[mine], null)
+    classes = torch.from_numpy(cache.labels[images[mine]])

5 train.py
-        logits, features, _ = self.student(*inputs, key_mask=mask, layers=(depth, last))
+        dropped = torch.rand(len(classes), device=classes.device) < self.config.class_dropout
+        seen = classes.masked_fill(dropped, self.student.config.num_classes).repeat_interleave(V)
+        logits, features, _ = self.student(inputs[0], seen, key_mask=mask, layers=(depth, last))

6 train.py
-    scaler.step(optimizer)
-    scaler.update()
-    optimizer.zero_grad()
-    decay = ema_decay(config, step, run.steps)
-    losses.update_ema(run.objective.teacher, run.objective.student, decay)  # after theta has moved
+    decay = ema_decay(config, step, run.steps)
+    losses.update_ema(run.objective.teacher, run.objective.student, decay)
+    scaler.step(optimizer)
+    scaler.update()
+    optimizer.zero_grad()

7 losses.py
-    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - decay)
+    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), decay)
"""
