"""Scoring: the packed tree gives the numbers and gradients of a plain forward of each sequence alone.

Tolerances are float32 rounding: errors of some 1e-7 relative in each sum, sums in another order for packed
and plain matrices, logits of about 10. The gaps are about 1e-5 on a CPU; the tolerances are ten times that.
"""

import copy
import dataclasses
import logging
import math
import random
import warnings
from types import SimpleNamespace

import pytest
import torch
from helpers import TINIES, unpacked
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from covrl_lab.train import scoring
from covrl_lab.train import tree as tree_module
from covrl_lab.train.models import load_tokenizer
from covrl_lab.train.policy import CACHE_NAMES, Policy
from covrl_lab.train.prompts import Prompter
from covrl_lab.train.sampling import generate
from covrl_lab.train.scoring import packed_tokens, trace_logprobs
from covrl_lab.train.tree import BLOCK, FlexTree, TreeAttention, build_tree, count_nodes, final_logits, run_tree
from covrl_lab.types import ConfigError, Demonstration, Example, TraceBatch

LOGPROB_TOLERANCE = 1e-4  # nats a token
GRADIENT_TOLERANCE = 1e-4  # of a parameter's gradient norm

VOCABULARY = len(load_tokenizer("tiny"))
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 1024,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Windows shorter than any prompt here. Qwen 2 windows layer 1 only.
FAMILIES = {
    "qwen2": (Qwen2ForCausalLM, Qwen2Config, {}),
    "qwen2-window": (
        Qwen2ForCausalLM,
        Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "phi3": (Phi3ForCausalLM, Phi3Config, {"sliding_window": None}),
    "phi3-window": (Phi3ForCausalLM, Phi3Config, {"sliding_window": 8}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 8.0}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.0625}),
    "mistral-window": (MistralForCausalLM, MistralConfig, {"sliding_window": 8}),
}


@pytest.fixture(scope="module")
def policies(tiny_policies):
    """name -> float32 policy with an adapter that is not zero."""
    cache = {}

    def get(name):
        if name in TINIES:
            return tiny_policies(name)
        if name not in cache:
            model_class, config_class, extra = FAMILIES[name]
            with torch.random.fork_rng():
                torch.manual_seed(3)
                model = model_class(config_class(**SIZES, **extra))
                lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers by an old name
                    model = get_peft_model(model.requires_grad_(False), lora).eval()
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.data.normal_(0, 0.1)
            cache[name] = Policy(model, load_tokenizer("tiny"), name)
        return cache[name]

    return get


def trace_batch(traces, group_size):
    rows = [torch.tensor(z) for z in traces]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor([len(z) for z in traces])[:, None]
    flags = torch.ones(len(traces), dtype=torch.bool)
    return TraceBatch(ids=ids, mask=mask, from_prior=flags, finished=flags, group_size=group_size)


@pytest.fixture(scope="module")
def prompts():
    prompter = Prompter(load_tokenizer("tiny"), [Demonstration("2+3?", "it is five", "5")])
    return [prompter(Example("a", "the hat?", "seven")), prompter(Example("b", "4+4?", "8"))]


@pytest.fixture(scope="module")
def batch():
    """Two groups of four random traces: ragged, of one token, repeated, and one that starts another."""
    draw = random.Random(0)
    long = [draw.randrange(3, VOCABULARY) for _ in range(23)]
    other = [draw.randrange(3, VOCABULARY) for _ in range(7)]
    return trace_batch([long, [42], other, long, [17], long[:5], [17], other], group_size=4)


def alone(policy, context, continuation, temperature):
    """Log-probabilities of a continuation from one plain forward of the whole model on one sequence."""
    ids = torch.tensor([[*context, *continuation]], device=policy.device)
    logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[0]
    logp = torch.log_softmax(logits.double() / temperature, dim=-1)
    return torch.stack([logp[len(context) - 1 + t, token] for t, token in enumerate(continuation)])


def by_hand(policy, prompts, batch, temperature):
    """{"prior", "posterior", "answer"}: for each rollout its token log-probabilities, one forward each."""
    out = {"prior": [], "posterior": [], "answer": []}
    for i in range(len(batch)):
        p, z = prompts[i // batch.group_size], batch.ids[i, : int(batch.mask[i].sum())].tolist()
        out["prior"].append(alone(policy, p.prior, z, temperature))
        out["posterior"].append(alone(policy, p.posterior, z, temperature))
        out["answer"].append(alone(policy, [*p.prior, *z, *p.seam], p.answer, 1.0))
    return out


def unpadded(scores, batch):
    masks = {"prior": batch.mask, "posterior": batch.mask, "answer": scores.answer_mask.cpu()}
    out = {}
    for name, mask in masks.items():
        values = getattr(scores, name).cpu()
        assert bool((values[~mask] == 0).all()), f"{name}: padding is not exactly 0"
        out[name] = [row[keep] for row, keep in zip(values, mask, strict=True)]
    return out


def weighted(rows):
    """A scalar in which each token has a weight of its own."""
    flat = torch.cat([row for name in ("prior", "posterior", "answer") for row in rows[name]])
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(len(flat), generator=generator, dtype=torch.float64)
    return (weights.to(flat.device) * flat.double()).sum()


def gradients(policy, loss):
    names, parameters = zip(*policy.trainable(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))


def assert_same_rows(ours, theirs):
    for name in ("prior", "posterior", "answer"):
        for i, (a, b) in enumerate(zip(ours[name], theirs[name], strict=True)):
            assert a.shape == b.shape, (name, i)
            gap = float((a.cpu().double() - b.cpu().double()).abs().max().detach())
            assert gap < LOGPROB_TOLERANCE, (name, i, gap)


def assert_same_gradients(ours, theirs):
    for name, gradient in theirs.items():
        assert float(gradient.norm()) > 1e-3, f"{name}: the test sees no gradient"
        gap = float((ours[name] - gradient).norm() / gradient.norm())
        assert gap < GRADIENT_TOLERANCE, (name, gap)


# --- packed, padded and one sequence at a time
@pytest.mark.parametrize("name", [*TINIES, *FAMILIES])
def test_packed_equals_padded_equals_one_by_one(policies, prompts, batch, name):
    policy, temperature = policies(name), 0.7
    expected = by_hand(policy, prompts, batch, temperature)
    reference = gradients(policy, weighted(expected))
    for scorer in (policy, unpacked(policy)):
        rows = unpadded(trace_logprobs(scorer, prompts, batch, temperature=temperature), batch)
        assert_same_rows(rows, expected)
        assert_same_gradients(gradients(policy, weighted(rows)), reference)
    # These sizes give the tolerance its meaning.
    assert 2 < -float(torch.cat(expected["prior"]).mean().detach()) < 30


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TINIES, *FAMILIES])
def test_blocks_of_attention_change_nothing(policies, prompts, batch, name, monkeypatch):
    policy = policies(name)
    monkeypatch.setattr(tree_module, "BLOCK", 1024)  # more than there are nodes
    whole = unpadded(trace_logprobs(policy, prompts, batch), batch)
    reference = gradients(policy, weighted(whole))
    monkeypatch.setattr(tree_module, "BLOCK", 7)
    for direct in (0, 512):  # with the fused kernel, from plain products
        monkeypatch.setattr(tree_module, "MAX_MATMUL_KEYS", direct)
        rows = unpadded(trace_logprobs(policy, prompts, batch), batch)
        assert_same_rows(rows, whole)
        assert_same_gradients(gradients(policy, weighted(rows)), reference)


@pytest.mark.parametrize("width", [256, 1024])
def test_long_paths_are_left_to_the_fused_kernel(policies, width):
    """It never holds a block's attention weights; a mask of three dimensions would keep PyTorch from it."""
    policy, kernels = policies("tiny"), []

    class Kernels(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            kernels.append("flash_attention" in op.name())
            return op(*args, **(kwargs or {}))

    tree = build_tree([[7 + i % 200 for i in range(width)]])
    with Kernels():
        run_tree(policy, tree)
    layers, parts = policy.decoder.config.num_hidden_layers, TreeAttention(tree, policy).keys
    assert [keys.shape[1] for keys in parts] == list(range(2 * BLOCK, width + 1, 2 * BLOCK))
    assert sum(kernels) == (layers * len(parts) if width > tree_module.MAX_MATMUL_KEYS else 0)


@pytest.mark.parametrize("name", [*TINIES, *FAMILIES])
@torch.no_grad()  # the kernel has no backward pass on a CPU
def test_flex_attention_gives_the_same_scores(policies, prompts, batch, name, monkeypatch):
    policy = policies(name)
    expected = unpadded(trace_logprobs(policy, prompts, batch), batch)
    monkeypatch.setattr(policy, "flex", True)
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    calls, kernel = [], tree_module.flex_attention
    monkeypatch.setattr(tree_module, "flex_attention", lambda *a, **k: calls.append(k) or kernel(*a, **k))
    tree_module._flex_kernel.cache_clear()
    assert_same_rows(unpadded(trace_logprobs(policy, prompts, batch), batch), expected)
    tree_module._flex_kernel.cache_clear()
    assert len(calls) == policy.decoder.config.num_hidden_layers


@pytest.mark.parametrize("window", [None, 8, 150])
def test_the_blocks_that_flex_attention_computes_are_the_ones_needed(policies, window):
    """Also those that its backward pass goes through, which a CPU does not run; and few sizes of trees."""
    draw = random.Random(4)
    for branches in (3, 40, 120):
        root = [draw.randrange(1000) for _ in range(100)]
        tree = build_tree([root + [draw.randrange(1000) for _ in range(draw.randint(1, 40))] for _ in range(branches)])
        flex = FlexTree(tree, policies("tiny"))
        mask, n = flex.mask(window), flex.size
        node = torch.arange(n)
        seen = mask.mask_mod(0, 0, node[:, None], node[None])
        ancestors = torch.zeros(n, n, dtype=torch.bool)
        for i in range(len(tree)):
            ancestors[i, torch.cat([tree.path(i), node[i : i + 1]])[-(window or n) :]] = True
        ancestors[node[len(tree) :], node[len(tree) :]] = True  # padding
        assert torch.equal(seen, ancestors)
        needed = ancestors.view(n // 128, 128, n // 128, 128).any(3).any(1)
        computed = mask.to_dense()[0, 0].bool()
        assert bool(computed[needed].all()) and (window or torch.equal(computed, needed))
        backward = torch.zeros_like(computed)
        for key, (count, index) in enumerate(zip(mask.q_num_blocks[0, 0], mask.q_indices[0, 0], strict=True)):
            backward[index[:count].long(), key] = True
        assert torch.equal(backward, computed)
        assert len(tree) <= n == tree_module.padded_size(len(tree))
    sizes = [tree_module.padded_size(k) for k in range(1, 16_385)]
    assert all(k <= size < max(k + 256, 1.25 * k) for k, size in enumerate(sizes, 1)) and len(set(sizes)) < 30


def test_no_memory_for_the_first_test_is_no_reason_to_stop_packing(policies, monkeypatch):
    def fails(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tree_module, "run_tree", fails)
    with pytest.raises(ConfigError, match="'tiny' leaves no memory"):
        tree_module.enable_packing(policies("tiny"))


def test_work_of_attention_grows_with_depth_and_not_with_the_tree(policies):
    """A root of 100 tokens with 300 branches of 20: keys a query, and no mask of nodes squared."""
    draw = random.Random(4)
    root = [draw.randrange(1000) for _ in range(100)]
    tree = build_tree([root + [draw.randrange(1000) for _ in range(20)] for _ in range(300)])
    assert len(tree) > 6000
    attention = TreeAttention(tree, policies("tiny"))
    blocks, computed = len(attention.order), sum(keys.numel() for keys in attention.keys)
    assert computed <= blocks * (BLOCK + 120) and (blocks - 1) * BLOCK < len(tree) <= blocks * BLOCK
    assert sum(mask.numel() for mask in attention.masks(None, 1)) == BLOCK * computed < len(tree) ** 2 / 20
    assert all(keys.shape[1] <= BLOCK + 120 for keys in attention.keys)


class TestModelsThatCannotPack:
    """Gemma 2 caps attention scores, Bloom knows no position ids: they fall back to padded rows."""

    @pytest.fixture(scope="class", params=["gemma2", "bloom"])
    def policy(self, request):
        sizes = {**SIZES, "head_dim": 16, "sliding_window": 64, "attn_logit_softcapping": 2.0}
        bloom = {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4}
        logger = logging.getLogger("covrl_lab.train.tree")
        lines, handler = [], logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logger.addHandler(handler)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            if request.param == "gemma2":
                model = Gemma2ForCausalLM(Gemma2Config(**sizes, attn_implementation="eager"))
            else:
                model = BloomForCausalLM(BloomConfig(**bloom, initializer_range=0.1))
            model.requires_grad_(False).eval()
            policy = Policy(model, load_tokenizer("tiny"), request.param)
        logger.removeHandler(handler)
        (line,) = lines
        assert request.param in line and "padded rows are used" in line
        assert not policy.packs
        return policy

    @torch.no_grad()
    def test_scores_are_those_of_one_sequence_at_a_time(self, policy, prompts, batch):
        rows = unpadded(trace_logprobs(policy, prompts, batch, temperature=0.7), batch)
        assert_same_rows(rows, by_hand(policy, prompts, batch, 0.7))

    def test_greedy_rows_are_those_of_one_sequence_at_a_time(self, policy, prompts):
        contexts = [list(prompts[0].prior), list(prompts[1].posterior), list(prompts[1].prior)]
        ids, _, _ = generate(policy, contexts, max_tokens=8, ended=lambda z: len(z) == 3 and z[0] % 2)
        for context, z in zip(contexts, ids, strict=True):
            for token in z:
                logits = policy.causal_lm(torch.tensor([context]), use_cache=False).logits[0, -1]
                assert float(logits.max() - logits[token]) < 1e-4
                context.append(token)


def test_the_self_test_of_packing_reads_ordinary_words(monkeypatch):
    """Of special tokens that are all alike, as SmolLM2's first ones almost are, a wrong neighbour would not be seen."""

    def no_tree(self, query, key, value, scaling, layer):
        dot = torch.nn.functional.scaled_dot_product_attention
        return dot(query, key, value, is_causal=True, scale=scaling).transpose(1, 2)

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = MistralForCausalLM(MistralConfig(**SIZES | {"num_key_value_heads": 4})).requires_grad_(False).eval()
    model.get_input_embeddings().weight[:32] = model.get_input_embeddings().weight[32].clone()
    assert Policy(model, load_tokenizer("tiny"), "alike").packs
    with monkeypatch.context() as patch:
        patch.setattr(TreeAttention, "__call__", no_tree)
        assert not Policy(model, load_tokenizer("tiny"), "alike").packs
    model.get_input_embeddings().weight[VOCABULARY // 2] = 0  # rows that no rounding explains: other words are tried
    assert Policy(model, load_tokenizer("tiny"), "alike").packs
    monkeypatch.setattr(TreeAttention, "__call__", no_tree)
    assert not Policy(model, load_tokenizer("tiny"), "alike").packs


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("form", [copy.copy, unpacked])
@torch.no_grad()
def test_a_decoder_takes_its_cache_by_the_new_or_the_old_name(tiny_policies, prompts, monkeypatch, form, name):
    """Transformers 5.24 renamed it. The installed version knows one name only, so both are put around it here."""
    policy, contexts, calls = tiny_policies("tiny"), [list(prompts[0].prior), list(prompts[1].posterior)], []
    limits = {"max_tokens": 8, "ended": lambda ids: False}
    expected = generate(form(policy), contexts, **limits)[0]
    forward, installed = policy.decoder.forward, policy.cache_name

    def call(ids, kept, arguments):
        calls.append(kept)
        output = forward(ids, **(arguments | {installed: kept}))  # what comes by the installed name is lost
        given = dict.fromkeys(("hidden_states", "attentions", *CACHE_NAMES)) | {name: getattr(output, installed)}
        return SimpleNamespace(last_hidden_state=output.last_hidden_state, **given)

    def new(input_ids, cache=None, **arguments):
        return call(input_ids, cache, arguments)

    def old(input_ids, past_key_values=None, **arguments):
        return call(input_ids, past_key_values, arguments)

    monkeypatch.setattr(policy.decoder, "forward", new if name == "cache" else old)
    renamed = form(Policy(policy.model, policy.tokenizer, "renamed"))
    assert renamed.cache_name == name
    assert generate(renamed, contexts, **limits)[0] == expected
    assert len([kept for kept in calls if kept is not None]) >= 7


def test_windows_matter_at_these_lengths(policies, prompts, batch, monkeypatch):
    """The windowed families above would not notice a missing window on shorter sequences."""
    policy = policies("phi3-window")
    assert policy.decoder.config.sliding_window == 8 < min(len(p.prior) for p in prompts)
    with torch.no_grad():
        windowed = trace_logprobs(policy, prompts, batch)
        monkeypatch.setattr(policy.decoder.config, "sliding_window", None)
        full = trace_logprobs(policy, prompts, batch)
    assert float((full.prior - windowed.prior).abs().max()) > 0.01


def test_without_posterior(policies, prompts, batch):
    policy = policies("tiny")
    both, prior_only = (
        trace_logprobs(policy, prompts, batch),
        trace_logprobs(policy, prompts, batch, posterior=False),
    )
    assert prior_only.posterior is None
    torch.testing.assert_close(prior_only.prior, both.prior, atol=LOGPROB_TOLERANCE, rtol=0)
    torch.testing.assert_close(prior_only.answer, both.answer, atol=LOGPROB_TOLERANCE, rtol=0)


def test_no_gradient_mode_gives_the_same_numbers(policies, prompts, batch):
    policy = policies("tiny")
    with torch.no_grad():
        plain = trace_logprobs(policy, prompts, batch)
    assert not plain.prior.requires_grad
    torch.testing.assert_close(plain.prior, trace_logprobs(policy, prompts, batch).prior.detach(), atol=1e-5, rtol=0)


# --- what is scored, and where
def test_the_ids_that_reach_the_model(policies, prompts, batch, monkeypatch):
    """Sampled ids appear unchanged in all three contexts, and answers follow the prior context only."""
    seen = []

    def spy(sequences):
        seen.extend(map(tuple, sequences))
        return build_tree(sequences)

    monkeypatch.setattr(scoring, "build_tree", spy)
    with torch.no_grad():
        trace_logprobs(policies("tiny"), prompts, batch)
    expected = []
    for i in range(len(batch)):
        p, z = prompts[i // 4], tuple(batch.ids[i][batch.mask[i]].tolist())
        whole = [p.prior + z, p.posterior + z, p.prior + z + p.seam + p.answer]
        expected += [ids[:-1] for ids in whole]  # after the last nothing is predicted
    assert sorted(seen) == sorted(expected)
    tokenizer = policies("tiny").tokenizer
    changed = [s for s in seen if tuple(tokenizer.encode(tokenizer.decode(s))) != s]
    assert changed  # decoding and encoding again would have scored other tokens


def test_answers_see_the_prior_prompt_and_not_the_posterior(policies, prompts, batch):
    policy = policies("tiny")
    with torch.no_grad():
        base = trace_logprobs(policy, prompts, batch)
        hint = [dataclasses.replace(p, posterior=(*p.posterior[:-3], 9, 9, 9)) for p in prompts]
        changed_posterior = trace_logprobs(policy, hint, batch)
        question = [dataclasses.replace(p, prior=(*p.prior[:-3], 9, 9, 9)) for p in prompts]
        changed_prior = trace_logprobs(policy, question, batch)
    torch.testing.assert_close(changed_posterior.answer, base.answer, atol=LOGPROB_TOLERANCE, rtol=0)
    torch.testing.assert_close(changed_posterior.prior, base.prior, atol=LOGPROB_TOLERANCE, rtol=0)
    torch.testing.assert_close(changed_prior.posterior, base.posterior, atol=LOGPROB_TOLERANCE, rtol=0)
    first = (slice(None), 0)
    assert bool(((changed_prior.answer - base.answer)[first].abs() > 1e-3).all())
    assert bool(((changed_posterior.posterior - base.posterior)[first].abs() > 1e-3).all())


def test_temperature_changes_traces_and_never_answers(policies, prompts, batch):
    policy = policies("tiny")
    with torch.no_grad():
        cold, warm = (trace_logprobs(policy, prompts, batch, temperature=t) for t in (0.5, 2.0))
    torch.testing.assert_close(cold.answer, warm.answer, atol=0, rtol=0)
    for name in ("prior", "posterior"):
        assert bool(((getattr(cold, name) - getattr(warm, name)).abs().cpu()[batch.mask] > 1e-4).all())


@pytest.mark.parametrize("packed", [True, False])
def test_scored_length_is_answer_length(policies, prompts, batch, packed):
    with torch.no_grad():
        scores = trace_logprobs(policies("tiny") if packed else unpacked(policies("tiny")), prompts, batch)
    lengths = [len(prompts[i // 4].answer) for i in range(8)]
    assert lengths[0] != lengths[-1]
    assert scores.answer_mask.sum(1).tolist() == lengths
    assert tuple(scores.prior.shape) == tuple(batch.mask.shape)
    assert bool((scores.answer.cpu()[scores.answer_mask.cpu()] < 0).all())


def test_duplicated_traces_score_the_same(policies, prompts, batch):
    with torch.no_grad():
        scores = trace_logprobs(policies("tiny"), prompts, batch)
    for name in ("prior", "posterior", "answer"):
        values = getattr(scores, name)
        assert torch.equal(values[0], values[3]) and torch.equal(values[4], values[6])


def test_head_chunks_change_nothing(policies, prompts, batch, monkeypatch):
    policy = policies("tiny")
    whole = unpadded(trace_logprobs(policy, prompts, batch), batch)
    reference = gradients(policy, weighted(whole))
    sizes, logits = [], scoring.final_logits
    monkeypatch.setitem(scoring.MAX_LOGITS_BYTES, "cpu", 3 * 4 * VOCABULARY)
    monkeypatch.setattr(scoring, "final_logits", lambda policy, x: sizes.append(len(x)) or logits(policy, x))
    rows = unpadded(trace_logprobs(policy, prompts, batch), batch)
    # Each distinct (context, token) is scored once: rollouts 3 and 6 repeat others, 5 starts one.
    contexts = set()
    for i in range(len(batch)):
        p, z = prompts[i // 4], tuple(batch.trace(i))
        contexts |= {(c + z[:t], token) for c in (p.prior, p.posterior) for t, token in enumerate(z)}
        answer = enumerate(p.answer)
        contexts |= {(p.prior + z + p.seam + p.answer[:t], token, "answer") for t, token in answer}
    total = len(contexts)
    assert max(sizes) == 3 and sum(sizes) == total
    assert_same_rows(rows, whole)
    assert_same_gradients(gradients(policy, weighted(rows)), reference)
    assert sum(sizes) == total  # the backward pass needs no logits


def test_final_logit_soft_cap(policies, prompts, batch, monkeypatch):
    """Gemma 2's cap, which its model applies after the head."""
    policy = policies("tiny-gemma3")
    monkeypatch.setattr(policy.causal_lm.config, "final_logit_softcapping", 2.0)
    capped = unpadded(trace_logprobs(policy, prompts, batch, temperature=1.5), batch)
    expected = by_hand(policy, prompts, batch, 1.5)
    assert_same_rows(capped, expected)
    assert_same_gradients(gradients(policy, weighted(capped)), gradients(policy, weighted(expected)))
    # log-probabilities cannot be lower than logits within +-2 allow
    assert float(torch.cat(capped["answer"]).detach().min()) > -4 - math.log(VOCABULARY)


def test_logits_on_cuda_are_never_bfloat16():
    """Seen on tensors without content, as no card is needed for those. A CPU rounds as the model's own head does."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            result = operation(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and not operation.is_view:
                made.add(result.dtype)
            return result

    def logits(device):
        head = torch.nn.Linear(8, 9, bias=False, dtype=torch.bfloat16)
        for name, parameter in head.named_parameters():
            setattr(head, name, torch.nn.Parameter(torch.ones_like(parameter, device=device)))
        policy = SimpleNamespace(head=head, causal_lm=SimpleNamespace(config=None))
        hidden = torch.ones(4, 8, dtype=torch.bfloat16, device=device)
        made.clear()
        with torch.no_grad(), Seen():
            return final_logits(policy, hidden)

    made = set()
    with FakeTensorMode():
        found = logits("cuda")
    assert found.shape == (4, 9) and found.dtype == torch.float32 and made == {torch.float32}
    found = logits("cpu")
    assert torch.equal(found, found.bfloat16().float()) and torch.bfloat16 in made


def test_packing_shares_what_is_common(prompts, batch):
    packed, padded = packed_tokens(prompts, batch)
    sequences = []
    for i in range(len(batch)):
        p, z = prompts[i // 4], batch.trace(i)
        sequences += [[*p.prior, *z], [*p.posterior, *z], [*p.prior, *z, *p.seam, *p.answer]]
    assert padded == sum(map(len, sequences))
    assert packed == len({tuple(s[:k]) for s in sequences for k in range(1, len(s))})
    assert packed < padded / 4
    assert packed_tokens(prompts, batch, posterior=False)[0] < packed


# --- the tree itself
def test_tree_worked_by_hand():
    #  0:5 - 1:6 - 2:7
    #          \ - 3:8 - 4:7
    #  5:6 - 6:7
    tree = build_tree([[5, 6, 7], [5, 6, 8, 7], [6, 7], [5, 6]])
    assert tree.ids.tolist() == [5, 6, 7, 8, 7, 6, 7]
    assert tree.position.tolist() == [0, 1, 2, 2, 3, 0, 1]
    assert [path.tolist() for path in tree.paths] == [[0, 1, 2], [0, 1, 3, 4], [5, 6], [0, 1]]
    attends = [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5], [5, 6]]
    assert [[*tree.path(node).tolist(), node] for node in range(7)] == attends
    assert tree.end.tolist() == [5, 5, 3, 5, 5, 7, 7]
    assert len(tree) == count_nodes([[5, 6, 7], [5, 6, 8, 7], [6, 7], [5, 6]]) == 7


def test_tree_nodes_are_the_distinct_prefixes():
    draw = random.Random(1)
    for _ in range(20):
        sequences = [[draw.randrange(3) for _ in range(draw.randint(1, 6))] for _ in range(9)]
        tree = build_tree(sequences)
        prefix_of = {}
        for sequence, path in zip(sequences, tree.paths, strict=True):
            assert tree.ids[path].tolist() == sequence
            for depth, node in enumerate(path.tolist()):
                assert prefix_of.setdefault(node, tuple(sequence[: depth + 1])) == tuple(sequence[: depth + 1])
        prefixes = [prefix_of[node] for node in range(len(tree))]
        assert len(set(prefixes)) == len(prefixes) == count_nodes(sequences)
        assert tree.position.tolist() == [len(prefix) - 1 for prefix in prefixes]
        for i, prefix in enumerate(prefixes):
            above = [prefix[: len(other)] == other for other in prefixes]
            assert [j <= i < end for j, end in enumerate(tree.end.tolist())] == above
            assert [*tree.path(i).tolist(), i] == [j for j, is_above in enumerate(above) if is_above]


@pytest.mark.parametrize("name", [*TINIES, "phi3-window"])
@torch.no_grad()
def test_a_branch_sees_its_own_path_and_nothing_else(policies, name):
    """Poison: other tokens everywhere off the path change nothing; one other token on it does."""
    policy, draw = policies(name), random.Random(2)
    root = [draw.randrange(3, VOCABULARY) for _ in range(6)]
    branches = [[draw.randrange(3, VOCABULARY) for _ in range(n)] for n in (9, 4, 14)]
    tree = build_tree([*(root + b for b in branches), branches[0]])
    clean = run_tree(policy, tree)
    for path in tree.paths:
        off = torch.ones(len(tree), dtype=torch.bool)
        off[path] = False
        ids = torch.where(off, (tree.ids + 1 + torch.arange(len(tree))) % (VOCABULARY - 3) + 3, tree.ids)
        assert bool((ids != tree.ids)[off].float().mean() > 0.9)
        poisoned = run_tree(policy, dataclasses.replace(tree, ids=ids))
        torch.testing.assert_close(poisoned[path], clean[path], atol=1e-5, rtol=1e-5)
        if name == "tiny":  # full attention: each node on the path reaches its end
            for node in path.tolist():
                ids = tree.ids.clone()
                ids[node] = (ids[node] + 50) % (VOCABULARY - 3) + 3
                changed = run_tree(policy, dataclasses.replace(tree, ids=ids))
                assert float((changed[path[-1]] - clean[path[-1]]).abs().max()) > 1e-3


def test_a_model_that_does_more_to_its_logits_is_refused(policies, monkeypatch):
    """As a layer between hidden states and head would: log-probabilities of something that is not the model."""
    policy = policies("granite")
    monkeypatch.setattr(policy.causal_lm.config, "logits_scaling", 1.0)  # forgets the model's own factor of 8
    scaled = policy.causal_lm.forward
    monkeypatch.setattr(policy.causal_lm, "forward", lambda *a, **k: _divided(scaled(*a, **k), 8.0))
    with pytest.raises(ConfigError, match="'granite' changes its logits in a way that covrl_lab does not know"):
        tree_module.check_logits(policy)


def _divided(output, factor):
    output.logits = output.logits / factor
    return output
