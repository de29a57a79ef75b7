"""The library is a stack: imports point downwards only, and looking at runs needs no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "covrl_lab"
LAYERS = """
types files config intervals prompts data lora tree models plan objectives methods world estimators sampling
scoring coherence evaluation traces tokens trainer figures token_view curves panels monitor
compare reporting live sweeps ablation variance speed benchmark __main__
""".split()
TORCH_FREE = """
types files config intervals data traces tokens figures token_view curves panels monitor reporting compare
sweeps ablation
plan speed benchmark
""".split()
PRESENT = [name for name in LAYERS if (PACKAGE / f"{name}.py").exists()]


def own_imports(name: str) -> set[str]:
    """Modules of the library that a module imports, at its top, in a function or for type checking only."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            path = "." * node.level + (node.module or "")
            inside = path.removeprefix("covrl_lab").lstrip(".")
            if path.startswith((".", "covrl_lab")):
                found |= {inside.split(".")[0]} if inside else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("covrl_lab.")}
    return found


def test_every_module_has_its_place():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules <= set(LAYERS), "give the new module a place in LAYERS"


@pytest.mark.parametrize("name", PRESENT)
def test_imports_point_downwards(name):
    below = LAYERS[: LAYERS.index(name)]
    upwards = {other for other in own_imports(name) if other in LAYERS and other not in below}
    assert not upwards, f"{name} imports {upwards}"


def test_the_parser_sees_imports():
    """Guards the test above against passing because it finds nothing."""
    assert {"config", "models", "objectives", "types"} <= own_imports("trainer")
    assert "types" in own_imports("data") and "trainer" in own_imports("__main__")


def test_looking_at_runs_never_imports_torch():
    modules = [name for name in TORCH_FREE if name in PRESENT]
    assert {"types", "config", "traces"} <= set(modules)
    # One process: a module that imported torch would be named, the ones before it cleared.
    code = "import sys\nimport covrl_lab\n"
    for name in modules:
        code += (
            f"import covrl_lab.{name}\nassert not {{'torch', 'transformers'}} & set(sys.modules), '{name}'\n"
        )
    code += (
        "covrl_lab.load_run, covrl_lab.RunConfig, covrl_lab.ConfigError\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_top_level_names_resolve():
    import covrl_lab

    for name in covrl_lab.__all__:
        assert getattr(covrl_lab, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        covrl_lab.nothing  # noqa: B018
