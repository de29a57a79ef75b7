"""Text that a page could mistake for its own, as questions and traces of a run folder."""

import json

import pandas as pd

from covrl_lab.runs.folder import load_run, step_file, write_parquet

BAIT = "http://bait.invalid"
HOSTILE = [
    "<script>window.__pwned = 1; alert('script')</script>",
    f"<img src='{BAIT}/img' onerror='window.__pwned = 2'>",
    "</style><style>* { display: none !important }</style>",
    "<svg onload='window.__pwned = 3'><animate onbegin='window.__pwned = 4' attributeName=x dur=1s /></svg>",
    "<a href='javascript:window.__pwned = 5'>click me</a>",
    f"<iframe src='{BAIT}/frame' srcdoc='<script>parent.__pwned = 6</script>'></iframe>",
    "\x1b[31mred\x1b[0m \x1b]8;;http://bait.invalid\x07link\x1b]8;;\x07",
    "\u202eright to left\u202c \u2066isolate\u2069",
    "{{ constructor.constructor('window.__pwned = 7')() }}",
    "${window.__pwned = 8} #{7 * 7} <%= 7 * 7 %>",
    "<b>bold</b><br><i>italic</i> <a href='http://bait.invalid/plotly'>plotly link</a>",
    r"$\href{javascript:window.__pwned=9}{x}$ \(\require{html}\) $$\frac{1}{0}$$",
    "null \x00 byte and \x07 bell and \x08 backspace",
    "W" * 3000,
    '"><script>window.__pwned = 10</script><p title="',
    "' onmouseover='window.__pwned = 11' x='",
    "&lt;script&gt;window.__pwned = 12&lt;/script&gt; &amp; &#60;b&#62;",
    "<!-- comment --> <![CDATA[<script>window.__pwned = 13</script>]]>",
    f"![image]({BAIT}/markdown) [link](javascript:window.__pwned=14) `code`",
    "<math><mtext></table><mglyph><style><img src=x onerror=window.__pwned=15>",
    f"<object data='{BAIT}/object'></object><embed src='{BAIT}/embed'><link href='{BAIT}/css'>",
    "%{y:.2f} <extra></extra> %{customdata[0]} \u200b\ufeff zero width",
    "</textarea></title></script><body onload='window.__pwned = 16'>",
]


def hostile_run(folder):
    """A run folder of one step whose questions, answers, traces and tokens are the strings above."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(
        json.dumps({"model": HOSTILE[0], "alpha": 0.5, "composite_weight": 0.5}), encoding="utf-8"
    )
    rows = []
    for i, question in enumerate(HOSTILE[:8]):
        for source in ("prior", "posterior"):
            count = len(HOSTILE)
            rows.append(
                {
                    "step": 1,
                    "rollout": len(rows),
                    "example_id": f"q{i}",
                    "question": question,
                    "answer": HOSTILE[-1 - i],
                    "source": source,
                    "finished": True,
                    "trace": " ".join(HOSTILE),
                    "tokens": HOSTILE,
                    "token_ids": list(range(count)),
                    "logp": [-0.1 * k for k in range(count)],
                    "logq": [-0.2 * k for k in range(count)],
                    "log_ratio": [0.0] * count,
                    "answer_logp": [-1.0],
                    "reward": -1.0,
                    "advantage": 1.0 if source == "prior" else -1.0,
                    "answer_weight": 1.0,
                }
            )
    write_parquet(pd.DataFrame(rows), step_file(folder / "traces", 1))
    return load_run(folder)
