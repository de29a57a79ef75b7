"""What a shared run is to others: plain PEFT, llama.cpp's file, the Hub, and readers of its cards."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from helpers import HOSTILE, adapter_change, assert_one_sentence, lines, text_ids, text_logits
from huggingface_hub import DatasetCard, ModelCard
from markdown_it import MarkdownIt
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from covrl_lab import ConfigError, RunConfig, load_policy, load_run, share
from covrl_lab.__main__ import main
from covrl_lab.defaults import METHOD_DEFAULTS, METHOD_SETTINGS
from covrl_lab.runs.folder import SHARED, TRACE_COLUMNS
from covrl_lab.train.benchmark import evaluate_checkpoint
from covrl_lab.train.cards import NO_SETTINGS, PAPERS, loading, model_card
from covrl_lab.train.policy import load_adapter
from covrl_lab.train.probe import open_source
from covrl_lab.views.bench import PromptBench, find_source

ROUNDING = 1e-5  # float32: the same numbers added in another order; logits here are a few nats


@pytest.fixture(scope="module")
def run(reference):
    return reference.run_dir


@pytest.fixture(scope="module")
def shared(run, tmp_path_factory):
    """The run of ``reference``, shared with all there is."""
    folder = tmp_path_factory.mktemp("share") / "ours"
    assert share(run, folder, merged=True, gguf=True, traces=True) == str(folder)
    return folder


@pytest.fixture(scope="module")
def policy(run):
    """The run's own policy at its last checkpoint."""
    source = find_source(run)
    return open_source(source.config, source.checkpoints[8])[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The base model as a folder of transformers."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    policy = load_policy("tiny", quantization="none", dtype="float32", lora_rank=0)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def logits(model, policy):
    with torch.no_grad():
        return model(text_ids(policy), use_cache=False).logits


def sections(card):
    """heading -> rows of its table, cells without their code signs."""
    found = {}
    for part in card.text.split("\n## "):
        rows = [
            re.findall(r"(?<=\| )`?([^|`]*)`?(?= \|)", line) for line in part.splitlines() if line.startswith("| ")
        ]
        found[part.splitlines()[0]] = rows[2:]
    return found


# --- the model as others load it


def test_the_adapter_loads_in_plain_peft(shared, policy, base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    before = logits(plain, policy)
    adapted = PeftModel.from_pretrained(plain, str(shared))
    expected = text_logits(policy)
    assert (logits(adapted, policy) - expected).abs().max() < ROUNDING < 1e-2 < (before - expected).abs().max()


def test_the_merged_model_is_the_policy(shared, policy):
    merged = AutoModelForCausalLM.from_pretrained(shared / "merged")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert (logits(merged, policy) - text_logits(policy)).abs().max() < ROUNDING
    text = "What is 12 + 3?\n"
    assert AutoTokenizer.from_pretrained(shared / "merged")(text).input_ids == policy.tokenizer(text).input_ids


def executed(source, folder, monkeypatch):
    monkeypatch.chdir(folder)
    names = {}
    exec(source, names)
    return names["model"]


def test_the_cards_code_gives_the_runs_policy(shared, policy, monkeypatch):
    (source,) = re.findall(r"```python\n(.*?)\n```", (shared / "README.md").read_text(), re.DOTALL)
    model = executed(source, shared.parent, monkeypatch)
    assert (logits(model, policy) - text_logits(policy)).abs().max() < ROUNDING


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_the_cards_code_for_other_models(shared, base, quantization, monkeypatch):
    config = RunConfig(model=str(base), quantization=quantization, dtype="float32", lora_rank=4)
    model = executed(loading(config, shared.name), shared.parent, monkeypatch)
    ours = load_policy(str(base), quantization=quantization, dtype="float32", lora_rank=4)
    load_adapter(ours, shared)
    for module in model.modules():  # else bitsandbytes computes in bfloat16 on CPUs that can, whatever it is told
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert (logits(model, ours) - text_logits(ours)).abs().max() < ROUNDING


# --- llama.cpp


def halves(rows, heads):
    """Rows of q or k as llama.cpp keeps them, put back: of a head, row 2 i is transformers' i, 2 i + 1 is i + d / 2."""
    size, found = len(rows) // heads, np.empty_like(rows)
    for row in range(len(rows)):
        head, place = divmod(row, size)
        found[head * size + place // 2 + (place % 2) * (size // 2)] = rows[row]
    return found


LLAMA_NAMES = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
LLAMA_NAMES |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}


def gguf_tensors(path):
    return {tensor.name: np.array(tensor.data) for tensor in GGUFReader(path).tensors}


def test_the_gguf_file_holds_the_adapters_tensors(shared):
    reader, state = GGUFReader(shared / "adapter.gguf"), load_file(shared / "adapter_model.safetensors")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "adapter" and fields["adapter.type"] == "lora"
    assert fields["general.architecture"] == "llama" and fields["adapter.lora.alpha"] == 32
    tensors, heads = gguf_tensors(shared / "adapter.gguf"), {"q_proj": 4, "k_proj": 2}
    assert len(tensors) == len(state) == 2 * 2 * 7
    moved = 0
    for key, value in state.items():
        _, layer, module, factor = re.fullmatch(r"(.*)\.layers\.(\d+)\.\w+\.(\w+)\.lora_([AB])\.weight", key).groups()
        found = tensors[f"blk.{layer}.{LLAMA_NAMES[module]}.weight.lora_{factor.lower()}"]
        if factor == "B" and module in heads:
            moved += not np.array_equal(found, value.numpy())
            found = halves(found, heads[module])
        assert found.dtype == np.float32 and np.array_equal(found, value.numpy()), key
    assert moved == 4


def test_transformers_reads_llama_cpps_order_as_ours(shared):
    """transformers undoes the same permutation when it loads a whole model from a GGUF file."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    undo = LlamaTensorProcessor(config={"num_attention_heads": 4, "num_key_value_heads": 2}).process
    tensors, state = gguf_tensors(shared / "adapter.gguf"), load_file(shared / "adapter_model.safetensors")
    for short, module in (("q", "q_proj"), ("k", "k_proj")):
        name = f"blk.1.attn_{short}.weight.lora_b"
        expected = state[f"base_model.model.model.layers.1.self_attn.{module}.lora_B.weight"]
        assert np.array_equal(undo(tensors[name], name).weights, expected.numpy())


@pytest.mark.parametrize(("model", "arch"), [("tiny-qwen3", "qwen3"), ("tiny-gemma3", "gemma3")])
def test_other_architectures_keep_their_rows(tiny_policies, model, arch, tmp_path):
    from covrl_lab.train.policy import _adapter_state
    from covrl_lab.train.sharing import write_gguf

    policy = tiny_policies(model)
    state = {key: value.clone() for key, value in _adapter_state(policy).items()}
    write_gguf(tmp_path / "x.gguf", state, 8, policy.causal_lm.config.get_text_config())
    assert GGUFReader(tmp_path / "x.gguf").fields["general.architecture"].contents() == arch
    expected = state["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"].numpy()
    assert np.array_equal(gguf_tensors(tmp_path / "x.gguf")["blk.0.attn_q.weight.lora_b"], expected)


# --- the cards


def test_the_card_names_every_setting_and_the_results(shared, run):
    card, config = ModelCard.load(shared / "README.md"), RunConfig.load(run / "config.json")
    found, usual = sections(card), RunConfig(method=config.method)
    settings = {name: (value, changed) for name, value, changed in found["Settings"]}
    others = {name for defaults in METHOD_DEFAULTS.values() for name in defaults} | {
        "kl_gradient",
        "unfinished_penalty",
    }
    others -= METHOD_SETTINGS[config.method]
    for field in dataclasses.fields(RunConfig):
        value = getattr(config, field.name)
        if field.name in NO_SETTINGS or value is None or field.name in others:
            assert field.name not in settings
        else:
            text = value if isinstance(value, str) else json.dumps(value)
            assert settings[field.name] == (text, "yes" * (value != getattr(usual, field.name))), field.name
    assert (
        len(settings) > 40 and settings["learning_rate"] == ("0.005", "yes") and settings["kl_weight"] == ("0.3", "")
    )
    assert {"covrl_lab", "peft", "transformers", "torch"} <= {name for name, _ in found["Written with"]}
    for words in ("8 of 8 steps, seed 3", "`tiny`", "`covrl_published`", "Licence of the base model: not stated"):
        assert words in card.text

    first, last = (r for r in lines(run / "evaluations.jsonl") if r["step"] in (0, 8))
    for row, cells in zip((first, last), found["Results"], strict=True):
        interval = f"{row['accuracy']:.1%} ({row['accuracy_low']:.1%} to {row['accuracy_high']:.1%})"
        assert cells[1] == str(row["step"]) and cells[2] == interval and cells[4] == f"{row['answer_logprob']:.2f}"
    accuracy, sampled = card.data.eval_results
    assert (accuracy.dataset_name, accuracy.metric_value) == ("arithmetic", last["accuracy"])
    assert accuracy.metric_args["high_95"] == last["accuracy_high"] and accuracy.metric_args["questions"] == 3
    assert sampled.metric_type == "avg_at_k" and card.data.base_model is None
    assert card.data.to_dict()["library_name"] == "peft"


def made_up(folder, **config):
    """A run folder of two evaluations of two sets."""
    folder.mkdir(parents=True)
    RunConfig(**{"model": "tiny", "eval_task": "gsm8k, hf/a/b*4"} | config).save(folder / "config.json")
    rows = []
    for step, shares in ((0, (0.2, 0.1, 0.3)), (40, (0.5, 0.4, 0.6))):
        rows.append({"step": step})
        for name, accuracy in zip(("", "gsm8k/", "hf/a/b/"), shares, strict=True):
            own = {"accuracy": accuracy, "accuracy_low": accuracy - 0.1, "accuracy_high": accuracy + 0.1}
            own |= {"eval_questions": 20, "eval_finished_share": 1.0, "eval_trace_tokens": 9.0}
            own |= {"avg_at_k": 0.25, "avg_at_k_low": 0.2, "avg_at_k_high": 0.3} if name == "hf/a/b/" else {}
            rows[-1] |= {f"{name}{key}": value for key, value in own.items()}
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = [{"step": step, "seconds": 1.0, "finished_share": 0.1} for step in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    return load_run(folder)


def test_sets_stand_on_their_own_in_card_and_report(tmp_path):
    from covrl_lab import accuracy_table

    run = made_up(tmp_path / "run")
    card = model_card(run, RunConfig.load(run.path / "config.json"), 40, "ours", [])
    rows = [row[:3] for row in sections(card)["Results"]]
    shown = [("average", 20, 50), ("gsm8k", 10, 40), ("hf/a/b", 30, 60)]
    assert rows == [
        [name, str(step), f"{share}.0% ({share - 10}.0% to {share + 10}.0%)"]
        for name, *shares in shown
        for step, share in zip((0, 40), shares, strict=True)
    ]
    found = {(r.dataset_name, r.metric_type): r.metric_value for r in card.data.eval_results}
    assert found == {("gsm8k", "accuracy"): 0.4, ("hf/a/b", "accuracy"): 0.6, ("hf/a/b", "avg_at_k"): 0.25}
    assert "only 10&#37; of the traces end" in card.text  # an alarm
    assert not model_card(run, RunConfig.load(run.path / "config.json"), 30, "ours", []).data.eval_results

    head, *rows = re.findall("<tr>(.*?)</tr>", accuracy_table(run.evaluations))
    cells = [re.findall(">([^<>]+)<", row.replace("<b>", "").replace("</b>", "")) for row in rows]
    assert cells == [
        ["average over 2 sets"],
        ["0", "20% (10% to 30%)", "100%", "9.0", "20", "–"],
        ["40", "50% (40% to 60%)", "100%", "9.0", "20", "–"],
        ["gsm8k"],
        ["0", "10% (0% to 20%)", "100%", "9.0", "20", "–"],
        ["40", "40% (30% to 50%)", "100%", "9.0", "20", "–"],
        ["hf/a/b"],
        ["0", "30% (20% to 40%)", "100%", "9.0", "20", "25% (20% to 30%)"],
        ["40", "60% (50% to 70%)", "100%", "9.0", "20", "25% (20% to 30%)"],
    ]
    assert "avg@k (95% interval)" in head


def test_the_licence_is_the_base_models_own(tmp_path, base):
    run = made_up(tmp_path / "run")

    def licence(model):
        card = model_card(run, RunConfig(model=model), 40, "ours", ["merged"])
        return card.data.license, re.search("Licence of the base model: (.*)", card.text)[1], card

    own = shutil.copytree(base, tmp_path / "model")
    assert licence(str(own))[:2] == (None, "not stated.")
    (own / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    assert licence(str(own))[:2] == ("mit", "`mit`.")
    (own / "README.md").write_text("---\nlicense: [\n---\n# x\n")
    assert licence(str(own))[:2] == (None, "not stated.")
    known, shown, card = licence("smollm2-135m")
    assert (known, shown) == ("apache-2.0", "`apache-2.0`.") and card.data.base_model.startswith("HuggingFaceTB/")
    assert "*unquantised* base" in card.text  # the default is NF4


class _Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.text = set(), set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        assert tag == "a" or not attributes or (tag, attributes[0][0]) == ("code", "class"), (tag, attributes)
        self.links |= {value for _, value in attributes if tag == "a"}

    def handle_data(self, data):
        self.text.append(data)


TAGS = set("h1 h2 p table thead tbody tr th td code pre a ul li em".split())


@pytest.mark.parametrize("text", [t for t in HOSTILE if len(t) <= 1000 and "\0" not in t], ids=lambda t: repr(t)[:30])
def test_a_hostile_text_stays_text_in_a_card(text, tmp_path, offline):
    """Rendered with raw HTML allowed, a card has no element and no link but its own, and its metadata are whole."""
    run = made_up(tmp_path / "run")
    config = RunConfig(model=text, task=f"hf/{text}", system_prompt=text)
    card = model_card(run, config, 40, text, ["merged", "traces"])
    markdown = MarkdownIt("commonmark", {"html": True}).enable("table")
    page = _Page(markdown.render(card.text))
    assert page.tags <= TAGS and page.links == {"https://arxiv.org/abs/2512.12576"}
    (cells,) = re.findall("<td><code>system_prompt</code></td>\n(.*?)</tr>", markdown.render(card.text), re.DOTALL)
    value, changed = [line.strip() for line in "".join(_Page(cells).text).strip("\n").splitlines()]
    assert value.strip() in (text.strip(), json.dumps(text)[1:-1].strip()) and changed == "yes"
    again = ModelCard(str(card))
    assert again.data.datasets == [text] and again.data.tags[-1] == "covrl"
    assert again.data.model_name == text and set(again.data.to_dict()) <= set(
        "base_model datasets library_name pipeline_tag tags model-index license".split()
    )
    compile(loading(config, text), "card", "exec")


def test_traces_are_a_data_set_whose_columns_are_described(shared, run, tmp_path):
    from datasets import load_dataset

    found = load_dataset(str(shared / "traces"), cache_dir=str(tmp_path), split="train")
    expected = load_run(run).traces()
    assert found.num_rows == len(expected) == 8 * 12
    for name in ("trace", "source", "step", "logp", "reward", "token_ids"):
        assert list(found[name]) == [list(v) if isinstance(v, np.ndarray) else v for v in expected[name]], name
    assert found.column_names == list(TRACE_COLUMNS)
    card = DatasetCard.load(shared / "traces" / "README.md")
    assert all(f"| `{name}` | " in card.text for name in found.column_names) and "nats" in card.text
    assert set(PAPERS) == set(METHOD_DEFAULTS)


# --- from a folder or the Hub


def test_a_shared_folder_is_a_checkpoint(shared, policy, tmp_path):
    source = find_source(shared)
    assert source.checkpoints == {8: shared} and source.config.lora_rank == 4 and source.config.run_dir != "run"
    assert adapter_change(open_source(source.config, shared)[0]) == adapter_change(policy)
    bench = PromptBench(checkpoint=shared, k=1, max_tokens=4)
    assert [step for _, step in bench.step.options] == [8]
    bench.generate.click()
    bench.wait(120)
    assert "done" in bench.message.value and list(bench.frames) == ["before training", "after training"]

    other = shutil.copytree(shared, tmp_path / "other")
    about = json.loads((other / SHARED).read_text())
    for changed, words in (
        (about | {"settings": about["settings"] | {"lora_alpha": 8}}, "lora_alpha=32"),
        (about | {"settings": about["settings"] | {"alhpa": 8}}, "unknown setting 'alhpa'"),
        ({"step": 8}, "cannot be read"),
        (None, "without covrl_lab.json"),
    ):
        (other / SHARED).write_text(json.dumps(changed)) if changed else (other / SHARED).unlink()
        with pytest.raises(ConfigError, match=re.escape(words)) as caught:
            open_source(find_source(other).config, other)
        assert_one_sentence(str(caught.value))


class FakeHub:
    """Stands in for HfApi: keeps what it is asked, and what the uploaded folders held."""

    def __init__(self, fails=()):
        self.calls, self.files, self.fails = [], {}, fails

    def __call__(self, **arguments):
        self.made = arguments
        return self

    def _asked(self, name, **arguments):
        self.calls.append((name, arguments))
        if name in self.fails:
            raise OSError("409 Client Error.\n\nYou already created this")

    def whoami(self):
        self._asked("whoami")

    def create_repo(self, **arguments):
        self._asked("create_repo", **arguments)
        return f"https://hub.invalid/{arguments['repo_id']}"

    def upload_folder(self, folder_path, ignore_patterns, **arguments):
        self._asked("upload_folder", **arguments)
        names = [p.relative_to(folder_path).as_posix() for p in folder_path.rglob("*") if p.is_file()]
        kept = ignore_patterns.removesuffix("*")
        self.files[arguments["repo_id"]] = {n: (folder_path / n).read_bytes() for n in names if not n.startswith(kept)}

    def snapshot_download(self, repo_id, allow_patterns):
        self._asked("snapshot_download", repo_id=repo_id)
        return str(self.holds)


def test_the_hub_gets_a_model_and_a_data_set_and_no_token(run, shared, monkeypatch, tmp_path):
    secret = "hf_s3cr3tS3cr3t"
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hub = FakeHub()
    monkeypatch.setattr("covrl_lab.train.sharing.HfApi", hub)
    assert share(run, "hub:someone/ours", traces=True, gguf=True) == "https://hub.invalid/someone/ours"
    assert [name for name, _ in hub.calls] == ["whoami", *["create_repo", "upload_folder"] * 2]
    kinds = [(a["repo_id"], a["repo_type"]) for name, a in hub.calls if name == "create_repo"]
    assert kinds == [("someone/ours", "model"), ("someone/ours-traces", "dataset")]
    assert all(a["exist_ok"] and a["private"] is None for name, a in hub.calls if name == "create_repo")
    model, data = hub.files["someone/ours"], hub.files["someone/ours-traces"]
    assert set(model) == {"README.md", "adapter.gguf", "adapter_config.json", "adapter_model.safetensors"} | {
        "report.html",
        SHARED,
    }
    assert set(data) == {"README.md", "data/train-00000-of-00001.parquet"}
    assert load_file(shared / "adapter_model.safetensors").keys() and b"someone/ours" in model["README.md"]
    texts = [*model.values(), *data.values(), repr(hub.calls).encode(), repr(hub.made).encode()]
    assert not any(secret.encode() in text for text in texts) and not list(tmp_path.iterdir())


def test_a_failed_upload_says_why_and_loses_nothing(run, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    hub = FakeHub(fails=["create_repo"])
    monkeypatch.setattr("covrl_lab.train.sharing.HfApi", hub)
    with pytest.raises(ConfigError, match="409 Client Error. You already created this.*stays in") as caught:
        share(run, "hub:someone/ours", private=True)
    assert_one_sentence(str(caught.value))
    assert hub.calls[-1][1]["private"] and not hub.calls[-1][1]["exist_ok"]
    kept = re.search("stays in '(.*)'", str(caught.value))[1]
    assert load_file(f"{kept}/adapter_model.safetensors")
    hub.fails = ["whoami"]
    with pytest.raises(ConfigError, match="hf auth login"):
        share(run, "hub:someone/ours")


def test_what_the_hub_holds_is_asked_and_evaluated(shared, policy, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub = FakeHub()
    monkeypatch.setattr("covrl_lab.train.sharing.HfApi", hub)
    hub.holds = shared
    bench = PromptBench(checkpoint="hub:someone/ours", k=1, max_tokens=4)
    assert not hub.calls  # before the click
    bench.generate.click()
    bench.wait(60)
    assert "done" in bench.message.value and len(bench.frames) == 2
    assert torch.equal(text_logits(bench._policy), text_logits(policy))
    with pytest.raises(SystemExit, match="^0$"):
        main(["evaluate", "hub:someone/ours", "--eval_questions", "2"])
    kept = tmp_path / "runs" / "hub" / "someone" / "ours"
    (line,) = lines(kept / "benchmarks.jsonl")
    assert line["step"] == 8 and line["eval_questions"] == 2
    assert load_run(kept).benchmarks["step"].tolist() == [8]
    # An earlier step that is shared later is what counts from then on.
    about = json.loads((shared / SHARED).read_text())
    hub.holds = shutil.copytree(shared, tmp_path / "earlier")
    (tmp_path / "earlier" / SHARED).write_text(json.dumps(about | {"step": 6}))
    with pytest.raises(SystemExit, match="^0$"):
        main(["evaluate", "hub:someone/ours", "--eval_questions", "2"])
    assert load_run(kept).benchmarks["step"].tolist() == [8, 6]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hub:someone", "'hub:someone' must have the form hub:OWNER/NAME"),
        ("hub:someone/away", "409 Client Error.*; check the name and the network, or download the files and name"),
        ("hub:someone/empty", "cannot be read .*; a repository that share wrote holds adapter_config.json"),
    ],
)
def test_what_the_hub_does_not_give_is_one_sentence(name, words, monkeypatch, tmp_path, no_model):
    monkeypatch.chdir(tmp_path)
    hub = FakeHub(fails=["snapshot_download"] if "away" in name else [])
    monkeypatch.setattr("covrl_lab.train.sharing.HfApi", hub)
    hub.holds = tmp_path
    for ask in (find_source, lambda name: evaluate_checkpoint(name, {})):
        with pytest.raises(ConfigError, match=words) as caught:
            ask(name)
        assert_one_sentence(str(caught.value))
    assert not list(tmp_path.iterdir())


# --- wrong input


@pytest.mark.parametrize(
    ("out", "options", "words"),
    [
        ("there", {}, "exists; choose a folder that does not"),
        ("none/x", {}, "does not exist; make it, or write hub:OWNER/NAME"),
        ("new", {"step": 7}, "has no checkpoint of step 7; it has [6, 8]"),
        ("new", {"private": True}, "private is for the Hub"),
        ("hub:name", {}, "must have the form hub:OWNER/NAME"),
        ("hub:a/b/c", {}, "must have the form hub:OWNER/NAME"),
        ("hub:a/../b", {}, "must have the form hub:OWNER/NAME"),
        ("hub:", {}, "must have the form hub:OWNER/NAME"),
    ],
)
def test_what_cannot_be_shared_is_one_sentence(run, out, options, words, tmp_path, no_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(ConfigError, match=re.escape(words)) as caught:
        share(run, out, **options)
    assert_one_sentence(str(caught.value))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_run_that_cannot_be_shared_is_one_sentence(run, tmp_path, monkeypatch):
    def refused(folder, words, **options):
        with pytest.raises(ConfigError, match=words) as caught:
            share(folder, tmp_path / "new", **options)
        assert_one_sentence(str(caught.value))
        assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".share*"))

    refused(tmp_path, "is not a run folder")
    refused(made_up(tmp_path / "made").path, "holds no checkpoint yet")
    own = shutil.copytree(run, tmp_path / "run")
    with monkeypatch.context() as patch:
        kind = SimpleNamespace(get_text_config=lambda: SimpleNamespace(model_type="mamba"))
        patch.setattr("covrl_lab.train.sharing.load_config", lambda name: kind)
        refused(own, "gguf knows models of type llama, .*, not 'mamba'", gguf=True)
    shutil.rmtree(own / "traces")
    refused(own, "holds no traces", traces=True)
    adapter = own / "checkpoints" / "step_00008" / "adapter_model.safetensors"
    content = adapter.read_bytes()
    adapter.write_bytes(content[:-1] + b"x")
    refused(own, "is damaged: its SHA-256")
    adapter.write_bytes(content)
    about = adapter.with_name("adapter_config.json").rename(tmp_path / "elsewhere.json")
    adapter.with_name("adapter_config.json").symlink_to(about)
    refused(own, "adapter_config.json' is a link")
    adapter.with_name("adapter_config.json").unlink()
    about.rename(adapter.with_name("adapter_config.json"))

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("covrl_lab.train.sharing._merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        share(own, tmp_path / "new", merged=True)
    assert not (tmp_path / "new").exists() and not list(tmp_path.glob(".share*"))


def test_the_command(run, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["share", str(run), str(tmp_path / "ours"), "--step", "6"])
    assert ended.value.code == 0 and "ours" in capsys.readouterr().out
    assert json.loads((tmp_path / "ours" / SHARED).read_text())["step"] == 6
    assert "6 of 8 steps" in (tmp_path / "ours" / "README.md").read_text()
    for arguments, words in (
        (["--steps", "6"], "unknown setting 'steps'; did you mean 'step'?"),
        (["--step", "x"], "invalid int value"),
        ([], "exists; choose a folder"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(["share", str(run), str(tmp_path / "ours"), *arguments])
        error = capsys.readouterr().err
        assert ended.value.code == 2 and words in error and error.count("\n") == 1
