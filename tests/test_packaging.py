"""pyproject.toml, environment.yml, constraints.txt and the commit hooks agree on packages and versions."""

import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
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


def test_torch_pin_has_no_build_tag():
    # A tag such as +cpu would refuse the CUDA build.
    assert pins()["torch"] == "2.13.0"


def test_commit_hooks_use_the_pinned_tools():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))["repos"][0]["hooks"]
    pinned = pins()
    tools = parse({line for hook in hooks for line in hook["additional_dependencies"]})
    for name, specifier in tools.items():
        assert str(specifier) == f"=={pinned[name]}"
