// Tokens of one or two traces, coloured by a quantity. Every text is set as text, never as HTML.

const STRONGEST = 0.65; // opacity at the end of a scale: text stays readable on light and dark grounds

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function number(value, unit) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const digits = size !== 0 && size < 0.001 ? value.toExponential(1) : value.toFixed(3);
  return digits.replace(/^-(?=[0.]*$)/, "").replaceAll("-", "−") + (unit ? ` ${unit}` : "");
}

function fill(value, scale) {
  if (value === null || value === undefined) return "";
  const place = ((scale.log ? Math.log(value) : value) - scale.centre) / scale.limit;
  const colour = place < 0 ? scale.low : scale.high;
  return colour && `rgba(${colour}, ${(STRONGEST * Math.min(1, Math.abs(place))).toFixed(3)})`;
}

// The mark of an answer that was judged, in words for screen readers, and the answer.
function verdict({ right, prediction }) {
  if (right === null) return [];
  const mark = element("span", "mark", right ? "✓" : "✗");
  mark.role = "img";
  mark.ariaLabel = mark.title = right ? "right" : "wrong";
  return [" ", mark, element("small", "", "it said "), element("bdi", "", prediction ?? "–")];
}

function rows(trace, t, labels) {
  return Object.entries(labels)
    .filter(([name]) => name in trace.values)
    .map(([name, [label, unit]]) => {
      const value = trace.values[name][t];
      const row = element("div", "row");
      const shown = name === "clipped" && value !== null ? (value ? "yes" : "no") : number(value, unit);
      const cell = element("span", "value", shown);
      cell.dataset.name = name;
      row.append(element("span", "", label), cell);
      return row;
    });
}

function alternatives(trace, t) {
  return Object.entries((trace.alternatives && trace.alternatives[t]) || {}).map(([prompt, list]) => {
    const line = element("div", "alternatives", `${prompt} prompt's first choices: `);
    list.forEach(([text, logprob], k) => {
      line.append(k ? ", " : "", element("code", "", text), ` ${number(logprob, "nats")}`);
    });
    return line;
  });
}

// A star to press and a line of text; "keep" is told what a reader makes of them.
function noting(keep) {
  const star = element("button", "covrl-star");
  const line = element("input", "covrl-note");
  Object.assign(line, { type: "text", placeholder: "note", ariaLabel: "note" });
  line.dataset.lmSuppressShortcuts = "true"; // in JupyterLab a letter would be a command
  star.addEventListener("click", () => keep(star.ariaPressed !== "true", line.value));
  line.addEventListener("change", () => keep(star.ariaPressed === "true" || line.value !== "", line.value)); // a note stars
  line.addEventListener("keydown", ({ key }) => key === "Enter" && line.dispatchEvent(new Event("change"))); // JupyterLab's
  return {
    parts: [star, line],
    fill: ({ starred, note }) => {
      Object.assign(star, { textContent: starred ? "★" : "☆", title: starred ? "Take the star away" : "Star this trace" });
      Object.assign(star, { ariaPressed: String(starred), ariaLabel: "star" });
      if (document.activeElement !== line) line.value = note; // else it is being written
    },
  };
}

function render({ model, el }) {
  const legend = element("div", "covrl-legend");
  const body = element("div", "covrl-traces");
  const detail = element("div", "covrl-detail");
  const tip = element("div", "covrl-tip");
  tip.setAttribute("popover", "manual"); // the top layer: no cell's edge cuts it
  el.classList.add("covrl-tokens");
  el.append(legend, body, detail, tip);
  let spans = []; // per trace, per token
  let current = null; // the selected span
  let notings = []; // per trace, where notes are kept

  function draw() {
    tip.hidePopover();
    notings = model.get("notes").map(({ id }) =>
      noting((starred, note) => {
        model.set("notes", model.get("notes").map((old) => (old.id === id ? { id, starred, note } : old)));
        model.save_changes();
      }),
    );
    spans = model.get("traces").map((trace, i) => {
      const list = element("div", "covrl-list");
      list.setAttribute("role", "listbox");
      list.setAttribute("aria-orientation", "horizontal");
      list.dir = "auto";
      list.setAttribute("aria-label", `${trace.title}, ${trace.tokens.length} tokens`);
      const found = trace.tokens.map((text, t) => {
        const span = element("span", trace.values.clipped?.[t] ? "clipped" : "");
        for (const part of text.split(/([·↵⇥]+)/)) {
          span.append(/^[·↵⇥]/.test(part) ? element("i", "sign", part) : part);
        }
        span.setAttribute("role", "option");
        span.setAttribute("aria-selected", "false");
        span.tabIndex = t ? -1 : 0;
        span.dataset.trace = i;
        span.dataset.token = t;
        list.append(span);
        if (text.endsWith("↵")) list.append(element("br"));
        return span;
      });
      const head = element("h4", `covrl-${trace.source}`, trace.title);
      head.append(...verdict(trace), element("small", "", trace.subtitle));
      const box = element("section", "covrl-trace");
      head.prepend(...(notings[i]?.parts.slice(0, 1) ?? []));
      box.append(head, list, ...(notings[i]?.parts.slice(1) ?? []));
      return { box, found };
    });
    body.replaceChildren(...spans.map(({ box }) => box));
    spans = spans.map(({ found }) => found);
    current = null;
    paint();
    mark();
    fillNotes();
  }

  function fillNotes() {
    model.get("notes").forEach((entry, i) => notings[i]?.fill(entry));
  }

  function paint() {
    const name = model.get("colour");
    const scale = model.get("scales")[name];
    const traces = model.get("traces");
    spans.forEach((found, i) => {
      const values = traces[i].values[name] || [];
      found.forEach((span, t) => {
        span.style.backgroundColor = fill(values[t], scale);
        span.classList.toggle("only", name === "difference" && values.length > 0 && values[t] === null);
      });
    });
    const bar = element("span", "bar");
    const ends = [scale.low, scale.high].map((c) => (c ? `rgba(${c}, ${STRONGEST})` : "transparent"));
    bar.style.background = `linear-gradient(to right, ${ends[0]}, ${scale.low && scale.high ? "transparent, " : ""}${ends[1]})`;
    const missing = !traces.some((trace) => name in trace.values);
    legend.replaceChildren(
      element("b", "", scale.title + (missing ? " (not stored for these traces)" : "")),
      element("span", "end", scale.low_text),
      bar,
      element("span", "end", scale.high_text),
    );
    if (traces.some((trace) => trace.values.clipped?.some((c) => c))) {
      legend.append(element("span", "key", "held back by the clip"));
    }
    if (name === "difference" && !missing) legend.append(element("span", "key only", "in this trace only"));
  }

  function mark() {
    const [i, t] = model.get("selected");
    current?.setAttribute("aria-selected", "false");
    current = spans[i]?.[t] ?? null;
    detail.replaceChildren();
    if (!current) return;
    spans[i].forEach((span) => (span.tabIndex = -1));
    current.tabIndex = 0;
    current.setAttribute("aria-selected", "true");
    const trace = model.get("traces")[i];
    const numbers = rows(trace, t, model.get("labels"));
    const said = numbers.map((row) => `${row.firstChild.textContent} ${row.lastChild.textContent}`);
    current.setAttribute("aria-label", `token ${t + 1}, ${trace.tokens[t]}: ${said.join(", ")}`);
    const head = element("h4", "", "Token “");
    head.append(element("code", "", trace.tokens[t]), "”");
    head.append(element("small", "", `${trace.title}, ${t + 1} of ${trace.tokens.length}`));
    detail.append(head, ...numbers, ...alternatives(trace, t));
    reveal();
  }

  // Scrolls inside the trace's box only: the page stays where it is.
  function reveal() {
    const list = current?.closest(".covrl-list");
    if (!list) return;
    const [outer, inner] = [list, current].map((item) => item.getBoundingClientRect());
    if (inner.top >= outer.top && inner.bottom <= outer.bottom) return;
    list.scrollTop += inner.top - outer.top - list.clientHeight / 2;
  }

  function select(i, t) {
    const span = spans[i]?.[t];
    if (!span) return;
    model.set("selected", [i, t]);
    model.save_changes();
    span.focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest" });
  }

  function neighbourLine(i, t, direction) {
    // The token nearest in x on the next line of text.
    const here = spans[i][t].getBoundingClientRect();
    let line = null;
    let best = t;
    let nearest = Infinity;
    for (let k = t + direction; k >= 0 && k < spans[i].length; k += direction) {
      const box = spans[i][k].getBoundingClientRect();
      if (Math.abs(box.top - here.top) < 4) continue;
      if (line !== null && Math.abs(box.top - line) > 4) break;
      line = box.top;
      if (Math.abs(box.left - here.left) < nearest) [nearest, best] = [Math.abs(box.left - here.left), k];
    }
    return best;
  }

  const place = (event) => {
    const span = event.target.closest?.("[role=option]");
    return span ? [Number(span.dataset.trace), Number(span.dataset.token)] : null;
  };

  body.addEventListener("click", (event) => {
    const at = place(event);
    if (at) select(...at);
  });
  body.addEventListener("keydown", (event) => {
    const at = place(event);
    if (!at) return;
    const [i, t] = at;
    const right = getComputedStyle(spans[i][t].parentElement).direction === "rtl" ? -1 : 1;
    const moves = {
      ArrowRight: () => t + right,
      ArrowLeft: () => t - right,
      Home: () => 0,
      End: () => spans[i].length - 1,
      ArrowUp: () => neighbourLine(i, t, -1),
      ArrowDown: () => neighbourLine(i, t, 1),
      Enter: () => t,
      " ": () => t,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation(); // JupyterLab's own shortcuts
    select(i, moves[event.key]());
  });
  // What is copied is the text of each token that is marked, not the signs for its spaces and line ends.
  body.addEventListener("copy", (event) => {
    if (event.target.closest("input")) return; // a note
    const range = getSelection().getRangeAt(0);
    const around = range.commonAncestorContainer;
    const one = place({ target: around.closest ? around : around.parentElement });
    const marked = [...range.cloneContents().querySelectorAll("[role=option]")].filter((span) => span.textContent);
    const found = one ? [one] : marked.map((span) => place({ target: span }));
    if (!found.length) return;
    const traces = model.get("traces");
    const texts = found.map(([i, t], k) => (k && i !== found[k - 1][0] ? "\n" : "") + traces[i].texts[t]);
    event.clipboardData.setData("text/plain", texts.join(""));
    event.preventDefault();
  });
  body.addEventListener("mouseover", (event) => {
    const at = place(event);
    if (!at) return tip.hidePopover();
    const trace = model.get("traces")[at[0]];
    const lines = rows(trace, at[1], model.get("labels"));
    tip.replaceChildren(element("strong", "", trace.tokens[at[1]]), ...lines, ...alternatives(trace, at[1]));
    tip.showPopover();
    const box = spans[at[0]][at[1]].getBoundingClientRect();
    const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
    tip.style.top = `${below ? box.bottom + 6 : Math.max(0, box.top - 6 - tip.offsetHeight)}px`;
    tip.style.left = `${Math.max(0, Math.min(box.left, innerWidth - tip.offsetWidth - 8))}px`;
  });
  body.addEventListener("mouseleave", () => tip.hidePopover());

  model.on("change:traces", draw);
  model.on("change:notes", fillNotes);
  model.on("change:colour change:scales", paint);
  model.on("change:selected", mark);
  draw();
  new ResizeObserver(reveal).observe(body); // drawn before it stands in the page, where nothing scrolls yet
}

export default { initialize, render };
