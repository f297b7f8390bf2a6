"""How big and how tangled gn_det is, in numbers: one column for each checkout.

    python benchmarks/house.py                                   # this checkout
    python benchmarks/house.py --against ../before               # another one beside it, with time and memory of a step
    python benchmarks/house.py --against ../before --tests       # and the CPU time of `make test` in both (minutes)

Step time: two processes train the quickstart's model on generated images and take turns, a block of iterations each,
so that a busy machine slows both alike. CPU time is the number to trust there; wall time is beside it.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import tokenize
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

Measures = dict[str, Any]

# ---------------------------------------------------------------------------------------------------- read from source


@cache
def imported(path: Path) -> tuple[tuple[str, bool], ...]:
    """Names that a file imports, with whether that happens inside a function.

    ``import a`` gives ``a``; ``from a import b`` gives ``a`` and ``a.b``. TYPE_CHECKING imports count.
    """

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from ((alias.name, inside) for alias in child.names)
            elif isinstance(child, ast.ImportFrom) and child.module:
                yield child.module, inside
                yield from ((f"{child.module}.{alias.name}", inside) for alias in child.names)
            else:
                yield from walk(child, inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)))

    return tuple(walk(ast.parse(path.read_text(encoding="utf-8")), False))


@cache
def modules(root: Path) -> dict[str, Path]:
    """Dotted name -> file of every module of gn_det in a checkout."""
    found = {}
    for path in (root / "gn_det").rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def graph(root: Path) -> dict[str, set[str]]:
    """Module of gn_det -> modules of gn_det that it imports; of ``from a import b`` the submodule where b is one."""
    files = modules(root)
    edges = {}
    for name, path in files.items():
        names = {n for n, _ in imported(path)}
        takes = {n.rpartition(".")[0] for n in names - files.keys()}  # packages from whose __init__ something is taken
        only_submodules = {n.rpartition(".")[0] for n in names & files.keys()} - takes
        edges[name] = (names & files.keys()) - only_submodules - {name}
    return edges


def circles(root: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    edges = graph(root)

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        stack = [start]
        while stack:
            new = edges[stack.pop()] - seen
            seen |= new
            stack += new
        return seen

    reach = {module: reached(module) for module in edges}
    found = {frozenset(other for other in reach[module] if module in reach[other]) for module in edges}
    return sorted(sorted(circle) for circle in found if circle)


def hiding_imports(root: Path) -> list[str]:
    """Imports inside functions that would close a circle at the top of the file."""
    files, together = modules(root), circles(root)
    return sorted(
        f"{name} -> {target}"
        for circle in together
        for name in circle
        for target, inside in set(imported(files[name]))
        if inside and target in circle and target != name
    )


def repeated_stems(root: Path) -> list[str]:
    """File names used more than once in gn_det, without ``__init__`` and outside ``cli``."""
    paths = [p for p in modules(root).values() if not p.stem.startswith("__") and p.parent.name != "cli"]
    return sorted(stem for stem, count in Counter(p.stem for p in paths).items() if count > 1)


def code_lines(path: Path) -> int:
    """Lines with code: no blanks, comments or docstrings."""
    text = path.read_text(encoding="utf-8")
    lines: set[int] = set()
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    docs = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docs)


def size(root: Path) -> Measures:
    paths = list(modules(root).values())
    tests = sum(len(p.read_text(encoding="utf-8").splitlines()) for p in (root / "tests").rglob("*.py"))
    return {
        "lines of gn_det": sum(len(p.read_text(encoding="utf-8").splitlines()) for p in paths),
        "lines of code (no blanks, comments, docstrings)": sum(map(code_lines, paths)),
        "files": len(paths),
        "lines of tests": tests,
        "repeated file names": repeated_stems(root),
        "import circles": [" + ".join(circle) for circle in circles(root)],
        "imports inside functions that hide a circle": hiding_imports(root),
    }


# ------------------------------------------------------------------------------------------ run in a process of its own


def declarations(root: Path, keys: set[str]) -> dict[str, int]:
    """Key -> places in the rooms of the config that say something about it.

    A place is an assignment ``cfg.KEY = ...`` in defaults.py, or a table at the top of a module that names the key.
    """
    found = dict.fromkeys(keys, 0)
    paths = [*(root / "gn_det" / "config").glob("*.py"), root / "gn_det" / "detectron2" / "config.py"]
    for path in paths:
        for statement in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                constants = (node.value for node in ast.walk(statement) if isinstance(node, ast.Constant))
                names = {value for value in constants if isinstance(value, str)}
            elif path.stem == "defaults":
                targets = [node.targets[0] for node in ast.walk(statement) if isinstance(node, ast.Assign)]
                names = {ast.unparse(target).partition(".")[2] for target in targets}
            else:
                continue
            for key in names & keys:
                found[key] += 1
    return found


def key_measures() -> Measures:
    """Of the gn_det on the path: how many keys, and which take nonsense."""
    from gn_det.config import get_cfg, load_config
    from gn_det.errors import UserError

    def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in node.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    found = dict(leaves(get_cfg()))
    unchecked = []
    for key, value in found.items():
        for text in nonsense(value):
            try:
                load_config("gn_fpn.yaml", [key, text])
            except UserError:
                continue
            if key != "SEED":  # negative: any
                unchecked.append(f"{key} {text}")
    return {"keys": sorted(found), "keys that take nonsense": unchecked}


def nonsense(value: Any) -> tuple[str, ...]:
    """Words of the command line that no key of this type can mean."""
    if isinstance(value, bool):
        return ("7",)
    if isinstance(value, (int, float)):
        return ("-987654321", "1e300", "nan")
    if isinstance(value, str):
        return ("a\0b", "x" * 100_000)
    return ("[-987654321]", "['nonsense\\0']")


def _train(folder: Path, steps: int, workers: int = 0) -> None:
    """Train the quickstart's model on generated images until a hook ends the process."""
    from gn_det.cli import main
    from gn_det.data.shapes import make_shapes

    source = make_shapes(folder / "shapes", "train", 32)
    words = ["train", "--engine", "embedded", "--config", "quickstart.yaml", "--output", str(folder / "run")]
    words += ["--train-json", source.json_file, "--train-images", source.image_root, "SOLVER.MAX_ITER", str(steps)]
    words += ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", str(workers), "TEST.EVAL_PERIOD", "0"]
    words += ["SOLVER.CHECKPOINT_PERIOD", str(steps)]
    raise SystemExit(main(words))


def iteration_measures(folder: Path) -> Measures:
    """Files of gn_det called in this process by one training iteration that writes neither metrics nor a checkpoint."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    package = os.path.dirname(sys.modules["gn_det"].__file__ or "") if "gn_det" in sys.modules else ""
    if not package:
        import gn_det

        package = os.path.dirname(gn_det.__file__)
    files: set[str] = set()
    done = 0

    def profile(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(package):
            files.add(os.path.relpath(frame.f_code.co_filename, package).replace(os.sep, "/"))

    def after_step(*_: Any) -> None:
        nonlocal done
        done += 1
        if done == 5:
            sys.setprofile(profile)
        if done == 6:
            sys.setprofile(None)
            outside = sorted(f for f in files if f.split("/")[0] not in ("modeling", "data"))
            layers = ("kernels", "norm.py")  # what the model consists of, too
            _answer(
                {
                    "files crossed by one iteration": sorted(files),
                    "of these outside modeling and data": outside,
                    "and outside norm and kernels": [f for f in outside if f.split("/")[0] not in layers],
                }
            )
            os._exit(0)

    register_optimizer_step_post_hook(after_step)
    _train(folder, 1000, workers=1)
    raise AssertionError("the run ended before its sixth step")


def take_turns(folder: Path, block: int, threads: int) -> None:
    """Train; after every ``block`` steps report the time they took and wait for a line on standard input."""
    import time

    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    torch.set_num_threads(threads)
    done = 0
    started = (0.0, 0.0)

    def after_step(*_: Any) -> None:
        nonlocal done, started
        done += 1
        if done % block:
            return
        cpu, wall = time.process_time() - started[0], time.perf_counter() - started[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        _answer({"cpu": cpu / block, "wall": wall / block, "peak": peak})
        if not sys.stdin.readline().strip():
            os._exit(0)
        started = time.process_time(), time.perf_counter()

    register_optimizer_step_post_hook(after_step)
    _train(folder, 10**6)


_MARK = "house-json:"


def _answer(measures: Measures) -> None:
    print(_MARK + json.dumps(measures), file=sys.__stdout__, flush=True)


def _child(root: Path, *words: object) -> subprocess.Popen[str]:
    """This script in a fresh interpreter that imports gn_det from the checkout ``root``."""
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, __file__, "--child", *map(str, words)]
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)


def _read(child: subprocess.Popen[str]) -> Measures:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith(_MARK):
            return dict(json.loads(line.removeprefix(_MARK)))
    raise SystemExit(f"a child process ended with {child.wait()} before it had measured")


def measure(root: Path, folder: Path) -> Measures:
    """Everything but times, of one checkout."""
    with _child(root, "keys") as child:
        keys = _read(child)
    with _child(root, "iteration", folder) as child:
        crossed = _read(child)
    declared = declarations(root, set(keys["keys"]))
    return {
        **size(root),
        "config keys": len(keys["keys"]),
        "places where a key is declared, at most": max(declared.values()),
        "keys declared in two places or more": sorted(key for key, places in declared.items() if places > 1),
        "nonsense values that a key takes": keys["keys that take nonsense"],
        **crossed,
    }


def step_times(roots: list[Path], folder: Path, *, rounds: int, block: int, threads: int) -> list[Measures]:
    """CPU and wall time of a training step and peak memory of each checkout, measured in turns."""
    children = [_child(root, "turns", folder / str(i), block, threads) for i, root in enumerate(roots)]
    taken: list[list[Measures]] = [[] for _ in roots]
    for child in children:
        _read(child)  # the first block: imports, data, warm-up
    for number in range(rounds):
        for index in range(len(children)) if number % 2 else reversed(range(len(children))):
            child = children[index]
            assert child.stdin is not None
            child.stdin.write("go\n")
            child.stdin.flush()
            taken[index].append(_read(child))
    for child in children:
        assert child.stdin is not None
        child.stdin.close()
        child.wait()
    return [
        {
            "step, ms of CPU": [round(1000 * block["cpu"], 2) for block in blocks],
            "step, ms of wall time": [round(1000 * block["wall"], 2) for block in blocks],
            "peak memory, MiB": round(blocks[-1]["peak"], 1),
        }
        for blocks in taken
    ]


def suite_time(root: Path) -> float:
    """CPU minutes of what `make test` runs, all its processes together."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "worksteal"]
    env = {**os.environ, "PYTHONPATH": str(root)}
    status = subprocess.run(command, cwd=root, env=env, check=False, stdout=subprocess.DEVNULL).returncode
    if status:
        print(f"{root}: pytest ended with {status}", file=sys.stderr)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60


def table(names: list[str], columns: list[Measures]) -> str:
    """Markdown; a list is shown by its length, times by their median."""

    def cell(value: Any) -> str:
        if isinstance(value, list):
            return f"{statistics.median(value):.2f}" if value and isinstance(value[0], float) else str(len(value))
        return f"{value:,}" if isinstance(value, int) else str(value)

    lines = [f"| measure | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for measure_name in columns[0]:
        lines.append(f"| {measure_name} | {' | '.join(cell(c[measure_name]) for c in columns)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout, measured first")
    parser.add_argument("--rounds", type=int, default=12, help="blocks of each checkout in the timing; 0: no timing")
    parser.add_argument("--block", type=int, default=5, help="training steps in a block")
    parser.add_argument("--threads", type=int, default=1, help="torch threads while timing")
    parser.add_argument("--tests", action="store_true", help="also run the tests and report their CPU time")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything, with all names, as JSON")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        job, *words = args.child
        if job == "keys":
            _answer(key_measures())
        elif job == "iteration":
            iteration_measures(Path(words[0]))
        else:
            take_turns(Path(words[0]), int(words[1]), int(words[2]))
        return
    roots = [*([args.against.resolve()] if args.against else []), ROOT]
    names = ["before", "now"][-len(roots) :]
    with tempfile.TemporaryDirectory() as folder:
        columns = [measure(root, Path(folder) / f"iteration{i}") for i, root in enumerate(roots)]
        if args.against and args.rounds:
            options = {"rounds": args.rounds, "block": args.block, "threads": args.threads}
            for column, times in zip(columns, step_times(roots, Path(folder), **options)):
                column.update(times)
    for column, root in zip(columns, roots):
        if args.tests:
            column["CPU time of the tests, minutes"] = round(suite_time(root), 2)
    print(table(names, columns))
    if "peak memory, MiB" in columns[-1]:
        for kind in ("CPU", "wall time"):
            before, now = (column[f"step, ms of {kind}"] for column in columns)
            ratios = sorted(b / a for a, b in zip(before, now))
            median, spread = statistics.median(ratios), (ratios[len(ratios) // 4], ratios[-1 - len(ratios) // 4])
            print(f"Step by {kind}, now / before: {median:.3f} (half of the pairs {spread[0]:.3f} to {spread[1]:.3f})")
        print(f"Memory, now / before: {columns[1]['peak memory, MiB'] / columns[0]['peak memory, MiB']:.3f}")
    if args.output:
        args.output.write_text(json.dumps(dict(zip(names, columns)), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
