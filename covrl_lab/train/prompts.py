"""Prior, posterior and answer templates as token ids.

Each piece of text between two seams is encoded once, and pieces are joined as ids: a decoded trace that is encoded
again may have other tokens. The answer is always scored after the *prior* context.

few_shot (base and small models)           chat (``<think>`` or ``<thinking>``, and ``<answer>`` tags)

    Question: x1                               user: instruction, x
    Reasoning: z1                              assistant, prior:     <think> z </think>
    Answer: y1                                 assistant, posterior: The answer is y. ... <think> z </think>
    Question: x                                then, scored in the prior context:
    Reasoning: z                                  <answer | > y </answer>
    Answer: | y

A few-shot trace ends with the first token that holds a newline, a chat trace with ``</think>``. A chat turn also ends
with what the template puts behind an assistant's words: base models know no other end of text than their own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..files import readable
from ..types import ConfigError, Demonstration, Example, Prompt
from .presets import ChatPreset

PLAIN = ChatPreset()
INSTRUCTION = (
    "Answer the question. Reason step by step between <think> and </think>, "
    "then give only the final answer between <answer> and </answer>.\n\n"
)


@dataclass(frozen=True)
class Style:
    """The text around question x, trace z and answer y."""

    name: str
    prior: Callable[[str], list[str]]  # of x: pieces from the end of the shared prefix to the start of the trace
    posterior: Callable[[str, str], list[str]]  # of x and y, likewise
    seam: str  # between trace and answer
    answer: Callable[[str], str]  # of y: with its terminator
    trace_end: str  # text that ends a trace as soon as it appears
    answer_end: str


FEW_SHOT = Style(
    name="few_shot",
    prior=lambda x: [f"Question: {x}\n", "Reasoning:"],
    posterior=lambda x, y: [f"Question: {x}\n", f"The answer is {y}.\n", "Reasoning:"],
    seam="Answer:",
    answer=lambda y: f" {y}\n",
    trace_end="\n",
    answer_end="\n",
)


def chat_style(tag: str) -> Style:
    """Chat prompts whose reasoning stands between ``<tag>`` and ``</tag>``."""
    # The seam is cut inside the tag, and the answer starts with "> ": no tokenizer we tried merges across that cut.
    return Style(
        name="chat",
        prior=lambda x: [f"<{tag}>\n"],
        posterior=lambda x, y: [f"The answer is {y}. I now write the reasoning that leads to it.\n", f"<{tag}>\n"],
        seam="\n<answer",
        answer=lambda y: f"> {y} </answer>",
        trace_end=f"</{tag}>",
        answer_end="</answer>",
    )


class Prompter:
    """Turns examples into the ids of a ``Prompt``, for one tokenizer, task and style.

    style: "few_shot", "chat" or "auto": few-shot where there are demonstrations, else chat where the tokenizer has
    a chat template, else few-shot without demonstrations. Raises ConfigError for "chat" without a template.
    chat: think tag, system prompt and, for "chat" with a tokenizer that has none, the template.
    """

    def __init__(
        self,
        tokenizer: Any,
        demonstrations: Sequence[Demonstration] = (),
        style: str = "auto",
        chat: ChatPreset = PLAIN,
    ) -> None:
        if style == "chat" and chat.template and getattr(tokenizer, "chat_template", None) is None:
            tokenizer.chat_template = chat.template
        has_template = getattr(tokenizer, "chat_template", None) is not None
        if style == "auto":
            style = "few_shot" if demonstrations or not has_template else "chat"
        if style == "chat" and not has_template:
            raise ConfigError("prompt_style='chat' needs a tokenizer with a chat template; use 'few_shot'")
        self.tokenizer, self.style = tokenizer, chat_style(chat.think_tag) if style == "chat" else FEW_SHOT
        self.demonstrations, self._chat = tuple(demonstrations), chat
        a = self._ids("a")
        self._prefixed = tokenizer.decode(a + a) != "aa"  # SentencePiece puts a space before every text
        self.seam = tuple(self._encode(self.style.seam))
        self.stop_ids = self._turn_end() if style == "chat" else frozenset()
        # What all few-shot prompts start with. Llama's and Gemma's tokenizers start a text with BOS, Qwen's do not.
        first, *more = tokenizer("a")["input_ids"]
        self._prior_root = [first] if more and first == tokenizer.bos_token_id else []
        self._posterior_root = list(self._prior_root)
        for d in self.demonstrations:  # on one line each: a newline ends a trace and an answer
            question, trace, answer = (" ".join(text.split()) for text in (d.question, d.trace, d.answer))
            tail = [f" {trace}\n", FEW_SHOT.seam, FEW_SHOT.answer(answer)]
            self._prior_root += self._encode(*FEW_SHOT.prior(question), *tail)
            self._posterior_root += self._encode(*FEW_SHOT.posterior(question, answer), *tail)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _encode(self, *pieces: str) -> list[int]:
        """Each piece's own ids, as they stand in the middle of a text."""
        before = "\n" if self._prefixed else ""  # the space is put before the newline, which no token holds on
        return [i for piece in pieces for i in self._ids(before + piece)[len(self._ids(before)) :]]

    def _render(self, messages: list[dict[str, str]], **options: bool) -> str:
        system = [{"role": "system", "content": self._chat.system}] if self._chat.system else []
        remedy = "leave out system_prompt" if system else "use prompt_style='few_shot'"
        with readable("the model's chat template", remedy):
            return self.tokenizer.apply_chat_template(system + messages, tokenize=False, **options)

    def _turn_end(self) -> frozenset[int]:
        """The special token that ends an assistant's turn in the chat template, if there is one."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "42"}]
        tail = self._ids(self._render(turns).rpartition("42")[2].strip())
        return frozenset(tail[:1]) & frozenset(getattr(self.tokenizer, "added_tokens_decoder", ()))

    def _chat_root(self, question: str) -> list[int]:
        tag = self._chat.think_tag
        content = INSTRUCTION.replace("think>", f"{tag}>")
        for d in self.demonstrations:
            content += f"{d.question}\n<{tag}>\n{d.trace}\n</{tag}>\n<answer> {d.answer} </answer>\n\n"
        text = self._render([{"role": "user", "content": content + question}], add_generation_prompt=True)
        # Reasoning models' templates may open the thinking themselves; ours opens it in both contexts.
        return self._ids(text.rstrip().removesuffix("<think>") if text.rstrip().endswith("<think>") else text)

    def check_answer(self, example: Example) -> None:
        """Raise ``ConfigError`` for an answer that holds its own end."""
        style, y = self.style, example.answer.strip()
        if style.answer_end in y:
            raise ConfigError(
                f"the answer of example {example.place!r} contains {style.answer_end!r}, which ends an answer "
                f"in prompt_style={style.name!r}; " + ("use 'chat'" if style is FEW_SHOT else "rewrite that answer")
            )

    def answer(self, example: Example) -> list[int]:
        """The ids of the reference answer with its terminator."""
        return self._encode(self.style.answer(example.answer.strip()))

    def __call__(self, example: Example) -> Prompt:
        """The ids of one example's contexts, seam and answer. Raises as ``check_answer`` does."""
        self.check_answer(example)
        style, x, y = self.style, example.question, example.answer.strip()
        if style is FEW_SHOT:
            prior_root, posterior_root = self._prior_root, self._posterior_root
            x = x.replace("\n", " ")
        else:
            prior_root = posterior_root = self._chat_root(x)
        answer = self.answer(example)
        return Prompt(
            prior=tuple(prior_root + self._encode(*style.prior(x))),
            posterior=tuple(posterior_root + self._encode(*style.posterior(x, y))),
            seam=self.seam,
            answer=tuple(answer),
            empty_trace=tuple(self._encode(style.trace_end)),
            answer_core=self._core(answer, y),
        )

    def _core(self, ids: list[int], answer: str) -> tuple[bool, ...]:
        """Which tokens of a wrapped answer hold some of its own text."""
        read = [self.tokenizer.decode(ids[:i]) for i in range(len(ids) + 1)]
        start = read[-1].find(answer)
        if start < 0:  # a tokenizer that does not give the text back
            return (True,) * len(ids)
        # From the first token that goes into the answer to the one that completes it; a character may take several.
        return tuple(len(after) > start and not before[start:].startswith(answer) for before, after in pairwise(read))

    def fitting(self, example: Example, max_trace_tokens: int, max_context: int, max_answer_tokens: int = 0) -> Prompt:
        """An example's prompt. ConfigError if it does not fit the model's context (tokens) with trace and answer."""
        prompt = self(example)
        answer = len(prompt.seam) + max(len(prompt.answer), max_answer_tokens)
        longest = max(len(prompt.posterior), len(prompt.prior) + answer)
        if longest + max_trace_tokens > max_context:
            raise ConfigError(
                f"example {example.place!r} needs {longest} prompt and answer tokens plus {max_trace_tokens} "
                f"trace tokens, more than the model's context of {max_context}; shorten the questions, "
                "use fewer demonstrations, or lower max_trace_tokens"
            )
        return prompt

    def ends(self, ids: Sequence[int], end: str) -> bool:
        """Whether the last of ``ids`` completes the text ``end`` (looks at the tail only)."""
        return end in self.tokenizer.decode(list(ids[-12:]))

    def trace_text(self, ids: Sequence[int]) -> str:
        """Decoded trace without its end marker."""
        return self.tokenizer.decode(list(ids)).split(self.style.trace_end)[0].strip()

    def answer_text(self, ids: Sequence[int]) -> str:
        """Decoded answer without its wrapper."""
        text = self.tokenizer.decode(list(ids)).split(self.style.answer_end)[0].strip()
        # Only the chat answer starts with its tag's bracket; a few-shot answer may itself be ">".
        return text if self.style is FEW_SHOT else text.removeprefix(">").strip()
