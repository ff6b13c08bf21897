"""Make a student's copy of the project: with the functions of part A emptied, or with one bug of part C.

    python coursework/start.py ../mine             # part A: the bodies are empty, the docstrings are left
    python coursework/start.py ../puzzle --bug 3   # part C: everything is there, but something is wrong
"""

import argparse
import ast
import shutil
from pathlib import Path

from bugs import BUGS

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
HOLE = {"Objective.forward": ("inputs", "total")}  # only what stands between these assignments is taken out


def find(tree: ast.Module, name: str) -> ast.FunctionDef | None:
    """The definition of a function, or of a method written "Class.method"; None if there is none."""
    node = tree
    for part in name.split("."):
        children = getattr(node, "body", [])
        node = next((child for child in children if getattr(child, "name", "") == part), None)
    return node


def emptied(source: str, name: str) -> str:
    """`source` with the body of one function replaced by `raise NotImplementedError`.

    Its docstring stays, and what stands directly below it to refuse bad arguments.
    """
    function, lines = find(ast.parse(source), name), source.splitlines(keepends=True)
    kept, *rest = function.body
    while isinstance(rest[0], ast.If) and isinstance(rest[0].body[0], ast.Raise):
        kept = rest.pop(0)
    first, last = kept.end_lineno, function.end_lineno
    if name in HOLE:
        ends = {node.targets[0].id: node for node in rest
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}
        above, below = HOLE[name]
        first, last = ends[above].end_lineno, ends[below].lineno - 1
    lines[first:last] = [" " * kept.col_offset + "raise NotImplementedError\n"]
    return "".join(lines)


def patched(source: str, change: str) -> str:
    """`source` with the lines of `change` that begin with - replaced by those that begin with +."""
    old, new = ("".join(f"{line[1:]}\n" for line in change.splitlines() if line[0] == sign) for sign in "-+")
    if source.count(old) != 1:
        raise ValueError(f"the project has changed; this is there {source.count(old)} times:\n{old}")
    return source.replace(old, new)


def copy_project(folder: Path) -> None:
    """The scripts and what they need, in a new folder. Raises FileExistsError if the folder exists."""
    folder.mkdir(parents=True)
    (folder / "assets").mkdir()
    for pattern in ("*.py", "requirements.txt", "assets/*.pt", "assets/*.txt"):
        for path in PROJECT.glob(pattern):
            shutil.copy(path, folder / path.relative_to(PROJECT))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write the copy; must not exist yet")
    parser.add_argument("--bug", help="the number of a bug of part C, instead of empty functions")
    args = parser.parse_args()
    blocks = [block.partition("\n") for block in BUGS.strip().split("\n\n")]
    changes = [(title.split()[1], change) for title, _, change in blocks if title.split()[0] == args.bug]
    if args.bug is not None and not changes:
        parser.error(f"there is no bug {args.bug}; the last one is {blocks[-1][0].split()[0]}.")
    if args.folder.exists():
        parser.error(f"{args.folder} exists; choose another folder, so that no work is overwritten.")
    copy_project(args.folder)
    if args.bug is None:
        changes = [(script, name) for name, (script, _) in FUNCTIONS.items()]
    for script, change in changes:
        path = args.folder / script
        source = path.read_text(encoding="utf-8")
        change_it = emptied if args.bug is None else patched
        path.write_text(change_it(source, change), encoding="utf-8")
    print(f"{args.folder} is ready: {'part A' if args.bug is None else f'bug {args.bug} of part C'}.")


if __name__ == "__main__":
    main()
