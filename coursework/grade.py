"""Grade part A: each function alone, by the project's own tests, with hidden numbers.

    python coursework/grade.py ../mine              # a table, a sentence for each function that fails
    python coursework/grade.py ../mine --seed 123   # with the same hidden numbers as before

One function at a time is taken from the student's folder and put among the project's own, so that a mistake
costs its points once. Each is graded in a process of its own, which may take a minute. That guards against
mistakes, not against malice: run what strangers hand in where it can do no harm.
"""

import argparse
import ast
import contextlib
import importlib
import inspect
import io
import multiprocessing
import random
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from start import FUNCTIONS, PROJECT, find

sys.path.insert(0, str(PROJECT))  # losses, train and test_all are the project's, not the student's
SECONDS = 60  # for each function, starting Python included
TESTS = {  # "checks": coursework/checks.py; all others are in test_all.py
    "sample_key_mask": ["test_key_masks", "checks.mask_is_the_generators"],
    "mim_loss": ["test_mim_loss", "test_losses_are_float32_under_autocast",
                 "test_ema_and_no_gradient_for_the_teacher"],
    "info_nce": ["test_info_nce_is_the_double_loop", "test_losses_are_float32_under_autocast",
                 "test_ema_and_no_gradient_for_the_teacher"],
    "step_loss": ["test_step_and_view_losses_are_equations_6_and_7"],
    "view_loss": ["test_step_and_view_losses_are_equations_6_and_7"],
    "update_ema": ["test_ema_and_no_gradient_for_the_teacher"],
    "Objective.forward": ["checks.what_each_loss_runs", "test_which_loss_runs_what",
                          "test_each_position_predicts_the_next_token", "test_losses_of_a_batch_by_hand"],
}


class Wrong(Exception):
    """Something is wrong that needs no test to be seen."""


class Ear(io.StringIO):
    """Hears what is printed, but remembers only the beginning."""

    def write(self, text):
        return super().write(text) if self.tell() < 200 else len(text)


def put_in(folder: Path, name: str) -> None:
    """Put the student's function in the place of the project's, with those that it calls and only it has."""
    script, _ = FUNCTIONS[name]
    path, module = folder / script, importlib.import_module(Path(script).stem)
    if not path.exists():
        raise Wrong(f"there is no {script} in this folder.")
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    function = find(tree, name)
    if function is None:
        raise Wrong(f"{script} has no such function any more.")
    others = {node.name: node for node in tree.body
              if isinstance(node, ast.FunctionDef) and not hasattr(module, node.name)}
    taken = [function]
    for part in taken:  # grows on the way
        for node in ast.walk(part):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                raise Wrong(f"imports something in line {node.lineno}; use what {script} imports at its top.")
            if isinstance(node, ast.Name) and node.id in others:
                taken.append(others.pop(node.id))
    exec(compile(ast.Module(taken, []), str(path), "exec"), vars(module))
    if "." in name:
        owner, method = name.split(".")
        setattr(getattr(module, owner), method, getattr(module, method))


def sentence(error: BaseException, folder: Path, test: str) -> str:
    """What is wrong, in one line."""
    said = " ".join(str(error).split())
    if type(error).__name__ == "BdbQuit":
        return "stops in the debugger; take breakpoint() out."
    if isinstance(error, NotImplementedError):
        return "is not written yet."
    if isinstance(error, SyntaxError):
        return f"cannot be read: line {error.lineno}: {error.msg}."
    if isinstance(error, (Wrong, AssertionError)):
        return said or f"fails {test}, which stands in test_all.py."
    lines = [f"line {frame.lineno} of {Path(frame.filename).name}"
             for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == folder]
    return f"raises {type(error).__name__} in {lines[-1] if lines else test}: {said}"


def judge(folder: Path, name: str, seed: int) -> tuple[bool, str]:
    """Whether a student's function passes, and what to say of it. Leaves it among the project's own."""
    import checks
    import test_all
    test, expected = "", checks.form_of_result(name)
    try:
        put_in(folder, name)
        form = checks.form_of_result(name)
        for key in expected:  # "" where the result is no dictionary
            if key not in form:
                raise Wrong(f"does not return {key}.")
            if form[key] != expected[key]:
                raise Wrong(f"returns {key} {form[key]}; expected {expected[key]}.".replace("  ", " "))
        for test in TESTS[name]:
            call = getattr(checks if test.startswith("checks") else test_all, test.split(".")[-1])
            call()  # with the numbers that it has in the project
            if "seed" in inspect.signature(call).parameters:
                call(seed=seed)  # with hidden ones
    except BaseException as error:  # a student's sys.exit() as well
        return False, sentence(error, folder, test)
    return True, ""


def judge_alone(folder: Path, name: str, seed: int, answer) -> None:
    """`judge` in a process of its own, which sends the result to the connection `answer`."""
    import torch
    torch.set_num_threads(1)
    ear = Ear()
    with contextlib.redirect_stdout(ear), contextlib.redirect_stderr(ear):
        passed, said = judge(folder, name, seed)
    printed = ear.getvalue().strip()[:30]
    answer.send((passed, said + f" It prints {printed!r}; take that out." * bool(printed)))


def grade(folder: Path, seed: int) -> Iterator[tuple[str, bool, str]]:
    """For each function in a folder: its name, whether it passes, what to say of it."""
    import test_all  # here, so that processes which are forked have it already
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    for name in FUNCTIONS:
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=judge_alone, args=(folder.resolve(), name, seed, there), daemon=True)
        process.start()
        there.close()
        try:
            passed, said = here.recv() if here.poll(SECONDS) else (False, f"runs for over {SECONDS} s.")
        except EOFError:
            passed, said = False, "ends the whole process, without a result."
        process.kill()
        process.join()
        yield name, passed, said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="each with a student's losses.py and train.py")
    parser.add_argument("--seed", type=int, default=random.randrange(1, 10 ** 6), help="of hidden numbers")
    args = parser.parse_args()
    for folder in args.folders:
        if folder.is_file():
            parser.error(f"{folder} is a file; name the folder that it lies in.")
        print(folder)
        total = 0
        for name, passed, said in grade(folder, args.seed):
            points = FUNCTIONS[name][1]
            total += points * passed
            print(f"{points * passed:4d} of {points:3d}  {name}  {said.strip()}".rstrip(), flush=True)
        print(f"{total:4d} of 100  (hidden numbers: --seed {args.seed})\n")


if __name__ == "__main__":
    main()
