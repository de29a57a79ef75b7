"""Which test files are slow or run alone, and fixtures that several files share.

Imports torch inside fixtures only: pytest-xdist's own process and most files of views need none.
"""

import os

import pytest
from helpers import make_trainer, move_adapter

# Of files that drive a browser one runs at a time, and so it is with those that start kernels and grids: two at once
# would time out.
BROWSER = """
    test_browser test_browser_ablation test_browser_details test_browser_evaluations test_browser_live
    test_browser_panels test_browser_views test_explorer test_mixing test_monitor test_report
""".split()
KERNELS = "test_benchmark test_nbval test_packaging test_sweep test_train_notebook".split()
# `make quick` leaves these out, besides: they train for minutes, load many models, or start many processes. In other
# files it leaves out the single tests that are marked slow, as they take seconds.
SLOW = [name for name in BROWSER + KERNELS if name not in ("test_explorer", "test_mixing")]
SLOW += """
    test_bench test_card test_checkpoints test_disk test_embedded test_gpu_check test_hostile test_methods test_owner
    test_panels test_ranks test_scorer test_sharing test_trainer
""".split()

# Before torch is imported; processes that a test starts inherit it, so that their numbers are the same.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
# bitsandbytes asks for compiled functions when it is imported, a fifth of that time, and none is called on a CPU.
os.environ["TORCHDYNAMO_DISABLE"] = "1"


def pytest_ignore_collect(collection_path, config):
    """`make quick` does not import the slow files either: seconds, in each worker."""
    if config.option.markexpr == "not slow" and collection_path.stem in SLOW:
        return True


def pytest_collection_modifyitems(items):
    """Mark slow files; what takes longest comes first."""
    for item in items:
        if item.path.stem in SLOW:
            item.add_marker("slow")
    items.sort(key=lambda item: (item.path.stem not in KERNELS, item.path.stem not in BROWSER))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file stays in one worker, so that its fixtures are made once; so do all of BROWSER, and all of KERNELS."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            name = nodeid.split(".py::")[0].split("/")[-1]
            return "browser" if name in BROWSER else "kernels" if name in KERNELS else name

    return ByFile(config, log)


@pytest.fixture(scope="session")
def tiny_policies():
    """name -> float32 policy whose output depends visibly on its context.

    The adapter is not zero, so that gradients reach both of its factors. The output head is random and not
    tied to the embedding, else the most likely next token would mostly be the last one again.
    """
    import torch

    from covrl_lab.train.models import load_policy

    cache = {}

    def get(name="tiny"):
        if name not in cache:
            policy = load_policy(name, quantization="none", dtype="float32", lora_rank=4)
            generator = move_adapter(policy, seed=1, scale=0.1)
            with torch.no_grad():
                head = 0.25 * torch.randn(policy.head.weight.shape, generator=generator)
            policy.head.weight = torch.nn.Parameter(head.to(policy.device), requires_grad=False)
            cache[name] = policy
        return cache[name]

    return get


@pytest.fixture(scope="session")
def tiny_policy(tiny_policies):
    return tiny_policies()


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """The uninterrupted run that others are compared with."""
    import torch

    torch.manual_seed(123)  # the global generator must not matter
    return make_trainer(tmp_path_factory.mktemp("reference") / "run").run()


@pytest.fixture
def no_model(monkeypatch):
    """Fails a test that loads a model before everything has been checked."""

    def loaded(*args, **kwargs):
        pytest.fail("a model was loaded before everything had been checked")

    monkeypatch.setattr("covrl_lab.train.opening.load_policy", loaded)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
