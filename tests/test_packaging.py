"""pyproject.toml, environment.yml, constraints.txt and the commit hooks agree on packages and versions."""

import ast
import os
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata

import pytest
import yaml
from helpers import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def parse(lines):
    """Requirement lines as {canonical name: specifier}, without the project's reference to itself."""
    requirements = [Requirement(line) for line in lines]
    names = [canonicalize_name(r.name) for r in requirements]
    assert len(set(names)) == len(names), "a package is named twice"
    return {n: r.specifier for n, r in zip(names, requirements, strict=True) if n != PROJECT["name"]}


def pins():
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    parsed = parse(line for line in lines if line and not line.startswith("#"))
    pinned = {}
    for name, specifier in parsed.items():
        (clause,) = specifier
        assert clause.operator == "==" and "*" not in clause.version, name
        pinned[name] = clause.version
    return pinned


def test_environment_names_the_packages_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
    (pip,) = [entry["pip"] for entry in environment["dependencies"] if isinstance(entry, dict)]
    options = [line for line in pip if line.startswith("-")]
    assert options == ["-c constraints.txt", "-e ."]
    lines = [line for line in pip if line not in options]
    assert parse(lines) == parse(PROJECT["dependencies"] + EXTRAS["notebooks"] + EXTRAS["tests"])


@pytest.mark.parametrize("group", ["core", *EXTRAS])
def test_every_direct_dependency_is_pinned_within_its_bounds(group):
    pinned = pins()
    for name, bounds in parse(PROJECT["dependencies"] if group == "core" else EXTRAS[group]).items():
        assert len(bounds) > 0, f"{name} has no lower bound"
        assert name in pinned, f"{name} is not in constraints.txt"
        assert bounds.contains(pinned[name]), f"{name}=={pinned[name]} is outside {bounds}"


def test_the_core_dependencies_bring_every_import_of_the_package():
    """An import's package is one of them, or one of them requires it: the commands run from a plain install.

    But for reasoning-gym, which tasks of that name ask for: a part of it is built where it is installed.
    """
    core = set(parse(PROJECT["dependencies"]))
    given = core | {
        canonicalize_name(needed.name)
        for name in core
        for needed in map(Requirement, metadata.requires(name) or [])
        if not needed.marker or needed.marker.evaluate({"extra": ""})
    }
    packages, imported = metadata.packages_distributions(), set()
    for path in (ROOT / "covrl_lab").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            imported |= {name.partition(".")[0] for name in names} - sys.stdlib_module_names
    assert {"plotly", "papermill", "torch"} <= imported
    assert {name for name in imported if not given & set(map(canonicalize_name, packages[name]))} == {"reasoning_gym"}


def test_torch_pin_has_no_build_tag():
    # A tag such as +cpu would refuse the CUDA build.
    assert pins()["torch"] == "2.13.0"


def test_commit_hooks_use_the_pinned_tools():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]
    pinned = pins()
    tools = parse({line for hook in hooks for line in hook["additional_dependencies"]})
    for name, specifier in tools.items():
        assert str(specifier) == f"=={pinned[name]}"


TINY = [
    *("--model=tiny", "--quantization=none", "--dtype=float32", "--steps=2", "--demonstrations=1"),
    *("--questions_per_step=2", "--rollouts_per_question=2", "--max_trace_tokens=6", "--eval_questions=2"),
]
EVERY_MODULE = """
import importlib, pathlib, pkgutil, sys
import covrl_lab
assert pathlib.Path(covrl_lab.__file__).is_relative_to(sys.argv[1]), covrl_lab.__file__
for module in pkgutil.walk_packages(covrl_lab.__path__, "covrl_lab."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""


def test_an_installed_wheel_trains_sweeps_and_reports_without_the_checkout(tmp_path):
    source, wheels, site, work = (tmp_path / name for name in ("source", "wheels", "site", "work"))
    work.mkdir()
    # A copy, so that building leaves nothing in the checkout.
    kept = ["pyproject.toml", "README.md", "LICENSE", "covrl_lab", "notebooks/03_train.ipynb"]
    files = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", *kept],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout.splitlines()  # fmt: skip
    for name in files:
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}

    def run(*command):
        done = subprocess.run(
            [sys.executable, *map(str, command)], cwd=work, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    pip = ("-m", "pip", "--no-input", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", wheels, source)
    (wheel,) = wheels.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "covrl_lab/notebooks/03_train.ipynb" in names and "covrl_lab/views/static/plot.js" in names
    assert {"covrl_lab/configs/covrl-7b.yaml", "covrl_lab/train/presets.yaml"} <= set(names)
    assert not [name for name in names if not name.startswith(("covrl_lab/", "covrl_lab-", "covrl_lab_"))]
    assert len([name for name in names if name.endswith(".ipynb")]) == 1
    assert wheel.stat().st_size < 1_000_000
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel)

    environment["PYTHONPATH"] = str(site)
    run("-c", EVERY_MODULE, site)
    command = site / "bin" / "covrl-lab"
    run(command, "train", *TINY, "--run_dir=run")
    assert (work / "run" / "metrics.jsonl").read_text("utf-8").count("\n") == 2
    run(command, "sweep", "grid", *TINY, "--grid=seed=0,1", "--workers=1")
    assert len(list(work.glob("grid/*/done.json"))) == 2
    assert "Appended to: " in run(command, "evaluate", "run", "--eval_questions=3")
    assert "Qwen/Qwen2.5-7B (nf4) on RTX 4090" in run(command, "plan", "--config=covrl-7b", "--device=rtx4090")
    assert "Report: " in run(command, "report", "run")
    assert (work / "run" / "report.html").exists()
