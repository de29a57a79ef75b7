"""A run as others use it: adapter, model card, report and more, in a folder or on the Hugging Face Hub.

A folder that ``share`` wrote is a checkpoint for the prompt bench; what it put on the Hub is that, and can be
evaluated, as "hub:OWNER/NAME".
"""

import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFType, GGUFWriter, Keys, get_tensor_name_map
from huggingface_hub import HfApi
from huggingface_hub.utils import HFValidationError, validate_repo_id
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

from .. import __version__
from ..config import RunConfig
from ..files import check_checksums, read_object, readable, refuse_links
from ..runs.folder import SHARED, Run, load_run, step_file, write_parquet
from ..types import ConfigError
from .cards import EMBEDDED_ON_HUB, NO_SETTINGS, model_card, trace_card, versions
from .checkpoints import stored_step
from .embedded import EMBEDDED, quiet
from .models import load_config, load_policy

HUB = "hub:"
# model_type of transformers -> llama.cpp's architecture, and whether rotary positions turn neighbouring rows of a head
# there: transformers turns row i of a head together with row i + size / 2.
LLAMA_CPP = {
    "llama": (MODEL_ARCH.LLAMA, True),
    "mistral": (MODEL_ARCH.LLAMA, True),
    "qwen2": (MODEL_ARCH.QWEN2, False),
    "qwen3": (MODEL_ARCH.QWEN3, False),
    "gemma3_text": (MODEL_ARCH.GEMMA3, False),
    "phi3": (MODEL_ARCH.PHI3, False),
}


def share(
    run: Run | str | Path,
    out: str | Path,
    *,
    step: int | None = None,
    merged: bool = False,
    gguf: bool = False,
    traces: bool = False,
    private: bool = False,
) -> str:
    """Share a run's adapter with a model card and its report; returns the folder, or the address on the Hub.

    out      a folder that does not exist yet, or "hub:OWNER/NAME", with the token of ``hf auth login``
    step     of a stored checkpoint; None: the last
    merged   also the merged model, for plain transformers
    gguf     also the adapter for llama.cpp
    traces   also all stored traces, as a data set with a card; on the Hub it is OWNER/NAME-traces
    private  make new, private repositories; existing ones are refused

    Raises ConfigError, before a model loads where it can.
    """
    run = (run if isinstance(run, Run) else load_run(run)).forgiving()
    checkpoint = step_file(run.path / "checkpoints", stored_step(run, step), "")
    config = RunConfig.load(run.path / "config.json")
    if traces and not run.steps:
        raise ConfigError(f"{str(run.path)!r} holds no traces; leave out traces")
    repo = _repository(str(out)) if str(out).startswith(HUB) else None
    _asked("whoami", "log in with: hf auth login; or share to a folder") if repo else _check_folder(Path(out), private)
    if gguf and (kind := load_config(config.model).get_text_config().model_type) not in LLAMA_CPP:
        raise ConfigError(f"gguf knows models of type {', '.join(LLAMA_CPP)}, not {kind!r}; leave it out")
    refuse_links(checkpoint)
    check_checksums(checkpoint)
    work = Path(tempfile.mkdtemp(prefix=".share-", dir=None if repo else Path(out).absolute().parent))
    try:
        folder, wanted = work / "shared", {"merged": merged, "adapter.gguf": gguf, "traces": traces}
        folder.mkdir()
        _write(run, config, checkpoint, folder, repo or Path(out).name, [file for file in wanted if wanted[file]])
        if not repo:
            folder.rename(out)
    except BaseException:
        shutil.rmtree(work)
        raise
    where = _upload(repo, folder, private) if repo else str(out)
    shutil.rmtree(work)
    return where


def fetch(name: str | Path) -> Path:
    """The run folder of a name: itself, or ``runs/hub/OWNER/NAME``, made of what "hub:OWNER/NAME" shares.

    Raises ConfigError where the Hub cannot be reached, or there is no adapter that ``share`` wrote.
    """
    if not str(name).startswith(HUB):
        return Path(name)
    repo, files = _repository(str(name)), ("adapter_config.json", "adapter_model.safetensors", SHARED)
    remedy = "check the name and the network, or download the files and name their folder"
    folder = Path(_asked("snapshot_download", remedy, repo_id=repo, allow_patterns=list(files)))
    remedy = f"a repository that share wrote holds {', '.join(files)}"
    with readable(f"what {str(name)!r} shares", remedy):
        run, known = Path("runs", "hub", *repo.split("/")), read_object(folder / SHARED, remedy)
        checkpoint = step_file(run / "checkpoints", int(known["step"]), "")
        shutil.rmtree(run / "checkpoints", ignore_errors=True)  # what was shared before
        checkpoint.mkdir(parents=True)
        for file in files[:2]:
            shutil.copyfile(folder / file, checkpoint / file)
        RunConfig.from_dict(known["settings"] | {"run_dir": str(run)}).save(run / "config.json")
    return run


def _write(run: Run, config: RunConfig, checkpoint: Path, folder: Path, name: str, extras: Sequence[str]) -> None:
    """Everything that is shared of a checkpoint, with ``extras`` besides, into ``folder``."""
    step = int(checkpoint.name.removeprefix("step_"))
    if "traces" in extras:  # before the card, which says what was damaged
        frame = run.traces()
        (folder / "traces").mkdir()
        write_parquet(frame, folder / "traces" / "data" / "train-00000-of-00001.parquet")
        trace_card(config, name, len(frame)).save(folder / "traces" / "README.md")
    with readable(f"the adapter in {str(checkpoint)!r}"):
        state = load_file(checkpoint / "adapter_model.safetensors")
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    adapter = read_object(checkpoint / "adapter_config.json")
    if config.model == EMBEDDED:
        adapter["base_model_name_or_path"] = EMBEDDED_ON_HUB
    settings = {key: value for key, value in config.to_dict().items() if key not in NO_SETTINGS}
    about = {"step": step, "settings": settings, "versions": versions()}
    for file, values in (("adapter_config.json", adapter), (SHARED, about)):
        (folder / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    model_card(run, config, step, name, extras).save(folder / "README.md")
    from ..views.report import report  # a shared run takes its page along

    report(run, folder / "report.html")
    if "adapter.gguf" in extras:
        family = load_config(config.model).get_text_config()
        write_gguf(folder / "adapter.gguf", state, adapter["lora_alpha"], family)
    if "merged" in extras:
        _merge(config, folder)
    for path in folder.rglob("*.safetensors"):  # safetensors lets their owner alone read them
        path.chmod(0o644)


def write_gguf(path: Path, state: Mapping[str, torch.Tensor], alpha: float, family: PretrainedConfig) -> None:
    """The adapter ``state`` (PEFT's names) as a GGUF file of kind "adapter", which llama.cpp loads beside a base."""
    arch, pairs = LLAMA_CPP[family.model_type]
    names, heads = get_tensor_name_map(arch, family.num_hidden_layers), {}
    if pairs:
        heads = {"q_proj": family.num_attention_heads, "k_proj": family.num_key_value_heads}
    writer = GGUFWriter(path, MODEL_ARCH_NAMES[arch])
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for key, value in sorted(state.items()):
        module, factor, _ = key.removeprefix("base_model.model.").rsplit(".", 2)
        if factor == "lora_B" and (count := heads.get(module.rpartition(".")[2])):  # (out, r): halves to pairs
            value = value.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        writer.add_tensor(f"{names[module]}.weight.{factor.lower()}", value.float().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merge(config: RunConfig, folder: Path) -> None:
    """Write ``folder/merged``: the adapter in ``folder`` added to the base, which is not quantised."""
    dtype = config.dtype.replace("auto", "bfloat16")  # as most models are stored
    base = load_policy(config.model, quantization="none", dtype=dtype, lora_rank=0, device="cpu")
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
        PeftModel.from_pretrained(base.model, str(folder)).merge_and_unload().save_pretrained(folder / "merged")
        base.tokenizer.save_pretrained(folder / "merged")


def _check_folder(out: Path, private: bool) -> None:
    """ConfigError where ``out`` cannot become a folder."""
    if private:
        raise ConfigError("private is for the Hub: write OUT as hub:OWNER/NAME, or leave it out")
    if out.exists() or out.is_symlink():
        raise ConfigError(f"{str(out)!r} exists; choose a folder that does not")
    if not (parent := out.parent).is_dir():
        raise ConfigError(f"the folder {str(parent)!r} does not exist; make it, or write hub:OWNER/NAME for the Hub")


def _repository(name: str) -> str:
    """OWNER/NAME of ``name`` on the Hub. ConfigError where it has another form."""
    repo = name.removeprefix(HUB)
    with suppress(HFValidationError):
        validate_repo_id(repo)
        if repo.count("/") == 1:
            return repo
    raise ConfigError(f"{name!r} must have the form hub:OWNER/NAME")


def _asked(method: str, remedy: str, **arguments: Any) -> Any:
    """What the Hub answers to a method of ``HfApi``."""
    with readable("the Hub", remedy, "refuses"):  # the network, its rules, the token
        return getattr(HfApi(library_name="covrl_lab", library_version=__version__), method)(**arguments)


def _upload(repo: str, folder: Path, private: bool) -> str:
    """Make the repositories and upload ``folder``; where that fails, the folder stays. The model's address."""
    remedy, addresses = f"what was made stays in {str(folder)!r}", []
    for kind, name, path in (("model", repo, folder), ("dataset", f"{repo}-traces", folder / "traces")):
        if path.is_dir():
            target = {"repo_id": name, "repo_type": kind}
            # An existing repository keeps its visibility: it will not do where a private one is wanted.
            made = _asked("create_repo", remedy, **target, private=private or None, exist_ok=not private)
            addresses.append(str(made))
            _asked("upload_folder", remedy, **target, folder_path=path, ignore_patterns="traces/*")
    return addresses[0]
