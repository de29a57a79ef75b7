"""train writes runs, views read runs, runs know neither; torch lives in train and theory."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "covrl_lab"
MODULES = {path.relative_to(PACKAGE).with_suffix("").as_posix(): path for path in PACKAGE.rglob("*.py")}
FORBIDDEN = {"train": {"views"}, "views": {"train", "theory"}, "runs": {"train", "views", "theory"}}
# (module, module it may import, only inside functions): why.
EXCEPTIONS = {
    ("train/sharing", "views/report"): "a shared run takes its report along",
    ("views/ablation", "train/plan"): "Estimate runs a short measurement of a step",
    ("views/ablation", "train/builtin_tasks"): "the task field offers the names of all tasks",
    ("views/ablation", "train/models"): "refuses a model that does not exist before a run fails",
    ("views/ablation", "train/tasks"): "refuses a task that does not exist before a run fails",
    ("views/explorer", "train/opening"): "Show prompt rebuilds the prompts of a trace",
    ("views/bench", "train/policy"): "the prompt bench loads the adapter of a checkpoint",
    ("views/bench", "train/sharing"): "the prompt bench takes adapters from the Hub",
    ("views/bench", "train/probe"): "the prompt bench asks a live model",
}
LONGEST_MODULE, LONGEST_CLASS = 450, 200  # lines


def imports(name):
    """(imported module, whether at module level) of a module; what is imported for type checking is not."""

    def walk(node, top):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name.replace("covrl_lab.", "").replace(".", "/"), top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = ["covrl_lab", *name.split("/")][: -node.level] if node.level else []
            path = "/".join([*parts, *(node.module or "").split(".")]).strip("/")
            path = path.removeprefix("covrl_lab").strip("/")
            inner = [f"{path}/{alias.name}".strip("/") for alias in node.names]
            yield from ((one if one in MODULES else path, top) for one in inner)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in ast.iter_child_nodes(node):
            yield from walk(child, top and not inside)

    return set(walk(ast.parse(MODULES[name].read_text(encoding="utf-8")), True))


@pytest.mark.parametrize("name", sorted(MODULES))
def test_wings_import_only_what_they_may(name):
    wing = name.split("/")[0]
    for other, top in imports(name):
        if other.split("/")[0] in FORBIDDEN.get(wing, ()):
            assert (name, other) in EXCEPTIONS, f"{name} imports {other}"
            assert not top, f"{name} imports {other} at module level; import it inside a function"
        if other.split("/")[0] == "torch" and top:
            assert wing in ("train", "theory"), f"{name} imports torch"


def test_every_exception_is_used():
    used = {(name, other) for name in MODULES for other, _ in imports(name)}
    assert set(EXCEPTIONS) <= used


@pytest.mark.parametrize("name", sorted(MODULES))
def test_modules_and_classes_stay_short(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_MODULE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno - node.lineno < LONGEST_CLASS, node.name


def test_looking_at_runs_never_imports_torch():
    heavy = {"torch", "transformers", "lark"}  # lark: the grammar that jsonschema builds from 4.25 on, in seconds
    code = "import sys\nfrom importlib import import_module\n"
    for name in sorted(MODULES):
        if name.split("/")[0] in ("runs", "views"):
            module = f"covrl_lab.{name.replace('/', '.').removesuffix('.__init__')}"
            code += f"import_module('{module}')\n"
            code += f"assert not {heavy} & set(sys.modules), '{name}'\n"
    code += "from covrl_lab import ConfigError, PromptBench, RunConfig, load_run, report\n"
    code += "assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


WINDOWS = """
import multiprocessing.context, os, signal, sys
from importlib import import_module
# These packages know Windows, but in other files than those that are imported here.
import IPython, covrl_lab.train.trainer, datasets, distributed, platformdirs.unix, psutil, submitit
for name in [name for name in sys.modules if name.startswith("covrl_lab")]:
    del sys.modules[name]
for owner, names in (
    (signal, "SIGHUP SIGKILL SIGALRM SIGUSR1"),
    (os, "fork geteuid getuid killpg mkfifo setsid"),
    (multiprocessing.context._concrete_contexts, "fork forkserver"),
):
    for name in names.split():
        owner.pop(name) if isinstance(owner, dict) else delattr(owner, name)
sys.modules |= dict.fromkeys(("fcntl", "grp", "pwd", "resource", "termios"))
for name in sys.argv[1:]:
    try:
        import_module(name)
    except BaseException as error:
        print(f"{name}: {error!r}")
"""


@pytest.mark.slow
def test_everything_imports_without_what_windows_lacks():
    """Of the package and of all test files; the quick tests run on Windows, too."""
    own = [f"covrl_lab.{name.replace('/', '.').removesuffix('.__init__')}" for name in MODULES if name != "__main__"]
    names = [path.stem for path in Path(__file__).parent.glob("*.py")] + own
    command = [sys.executable, "-c", WINDOWS, *names]
    paths = os.pathsep.join(map(str, (PACKAGE.parent, Path(__file__).parent)))
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_public_names_resolve():
    import covrl_lab

    for name in covrl_lab.__all__:
        assert getattr(covrl_lab, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        covrl_lab.nothing  # noqa: B018
