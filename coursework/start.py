"""Make a student's copy of the project: with the functions of part A emptied, or with one bug of part C.

    python coursework/start.py ../mine             # part A: the bodies are empty, the docstrings are left
    python coursework/start.py ../puzzle --bug 3   # part C: everything is there, but something is wrong
"""

import argparse
import ast
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parent
FUNCTIONS = {  # part A, in the order in which to write them: (script, points)
    "sample_key_mask": ("losses.py", 10),
    "mim_loss": ("losses.py", 10),
    "info_nce": ("losses.py", 20),
    "step_loss": ("losses.py", 15),
    "view_loss": ("losses.py", 10),
    "update_ema": ("losses.py", 10),
    "Objective.forward": ("train.py", 25),
}
HOLE = {"Objective.forward": ("inputs", "total")}  # only what stands between these two assignments is taken out


def find(tree: ast.Module, name: str) -> ast.FunctionDef:
    """The definition of a function, or of a method written "Class.method". Raises ValueError if it is missing."""
    node = tree
    for part in name.split("."):
        node = next((child for child in node.body if getattr(child, "name", "") == part), None)
        if node is None:
            raise ValueError(f"has no {name} any more.")
    return node


def emptied(source: str, name: str) -> str:
    """`source` with the body of one function replaced by `raise NotImplementedError`."""
    function, lines = find(ast.parse(source), name), source.splitlines(keepends=True)
    first, last = function.body[0].end_lineno, function.end_lineno  # the docstring is the first statement
    if name in HOLE:
        ends = {node.targets[0].id: node for node in function.body
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
        above, below = HOLE[name]
        first, last = ends[above].end_lineno, ends[below].lineno - 1
    indent = " " * function.body[0].col_offset
    lines[first:last] = [f"{indent}raise NotImplementedError\n"]
    return "".join(lines)


def replaced(source: str, old: str, new: str) -> str:
    """`source` with `old`, which must be there exactly once, replaced by `new`."""
    if source.count(old) != 1:
        raise ValueError(f"the project has changed: {old!r} is there {source.count(old)} times, not once.")
    return source.replace(old, new)


def copy_project(folder: Path) -> None:
    """The scripts and what they need, in a new folder. Raises FileExistsError if the folder exists."""
    folder.mkdir(parents=True)
    (folder / "assets").mkdir()
    for pattern in ("*.py", "requirements.txt", "assets/*.pt", "assets/*.txt"):
        for path in PROJECT.glob(pattern):
            shutil.copy(path, folder / path.relative_to(PROJECT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the copy; must not exist yet")
    parser.add_argument("--bug", type=int, help="the number of a bug of part C, instead of empty functions")
    args = parser.parse_args()
    if args.folder.exists():
        parser.error(f"{args.folder} exists; choose another folder, so that no work is overwritten.")
    if args.bug is None:
        changes = [(script, name, None) for name, (script, _) in FUNCTIONS.items()]
    else:
        from bugs import BUGS
        if args.bug not in BUGS:
            parser.error(f"--bug is one of {', '.join(map(str, BUGS))}.")
        changes = BUGS[args.bug]
    copy_project(args.folder)
    for script, old, new in changes:
        path = args.folder / script
        source = path.read_text(encoding="utf-8")
        path.write_text(emptied(source, old) if new is None else replaced(source, old, new), encoding="utf-8")
    print(f"{args.folder} is ready: {'part A' if args.bug is None else f'bug {args.bug} of part C'}.")


if __name__ == "__main__":
    main()
