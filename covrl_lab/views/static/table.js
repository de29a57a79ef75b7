// A table to sort and to pick rows from. Every text is set as text, never as HTML.

const SIGNS = { true: "yes", false: "no", null: "–" };

function shown(value, digits) {
  if (value === undefined || value === null || typeof value === "boolean") return SIGNS[value ?? null];
  if (typeof value !== "number") return value;
  const text = digits < 0 ? String(Number(value.toPrecision(-digits))) : value.toFixed(digits ?? 0);
  return text.replace(/^-(?=[0.]*$)/, "").replace("-", "−"); // never −0.0
}

// ✓ or ✗, in words for screen readers.
function mark(right) {
  const [textContent, title] = { true: ["✓", "right"], false: ["✗", "wrong"] }[right] ?? ["–", "not known"];
  return Object.assign(document.createElement("span"), { textContent, title, role: "img", ariaLabel: title });
}

// ★ or nothing.
function star(starred) {
  const [textContent, ariaLabel] = starred ? ["★", "starred"] : ["", "not starred"];
  return Object.assign(document.createElement("span"), { textContent, ariaLabel, role: "img" });
}

function render({ model, el }) {
  el.classList.add("covrl-table");
  const scroll = document.createElement("div");
  const note = document.createElement("div");
  const table = document.createElement("table");
  scroll.className = "scroll";
  note.className = "note";
  note.setAttribute("role", "status");
  table.setAttribute("role", "grid");
  scroll.append(table);
  el.append(scroll, note);

  function header() {
    const [by, descending] = model.get("sort");
    const row = document.createElement("tr");
    for (const column of model.get("columns")) {
      const cell = document.createElement("th");
      const button = document.createElement("button");
      const sorted = column.name === by;
      button.textContent = column.label + (sorted ? (descending ? " ▾" : " ▴") : "");
      button.title = column.about || column.label;
      // A title shows under the mouse only: by keyboard the help stands below the table.
      button.addEventListener("focus", () => (note.textContent = column.about || model.get("note")));
      button.addEventListener("blur", () => (note.textContent = model.get("note")));
      button.addEventListener("click", () => {
        model.set("sort", [column.name, sorted ? !descending : column.kind === "number"]);
        model.save_changes();
      });
      cell.scope = "col";
      cell.className = column.kind;
      cell.setAttribute("aria-sort", sorted ? (descending ? "descending" : "ascending") : "none");
      cell.append(button);
      row.append(cell);
    }
    const head = document.createElement("thead");
    head.append(row);
    return head;
  }

  function draw() {
    const focused = table.contains(document.activeElement);
    const body = document.createElement("tbody");
    for (const values of model.get("rows")) {
      const row = document.createElement("tr");
      row.dataset.id = values.id;
      for (const column of model.get("columns")) {
        const cell = document.createElement("td");
        cell.className = column.kind + (column.kind === "source" ? ` covrl-${values[column.name]}` : "");
        const value = values[column.name];
        cell.append(({ mark, star }[column.kind] ?? shown)(value, column.digits));
        if (column.kind === "text") [cell.title, cell.dir] = [value, "auto"];
        row.append(cell);
      }
      body.append(row);
    }
    table.replaceChildren(header(), body);
    table.setAttribute("aria-label", model.get("label"));
    note.textContent = model.get("note");
    choose();
    if (focused) table.querySelector("tr[tabindex='0']")?.focus({ preventScroll: true });
  }

  function choose() {
    const marked = model.get("marked");
    const rows = [...table.tBodies[0].rows];
    rows.forEach((row) => {
      row.setAttribute("aria-selected", marked.includes(row.dataset.id));
      row.tabIndex = -1;
    });
    const entry = rows.find((row) => row.dataset.id === model.get("picked")) ?? rows[0];
    if (entry) entry.tabIndex = 0;
    reveal(rows.find((row) => row.getAttribute("aria-selected") === "true"));
  }

  // Scrolls inside the table's box only: the page stays where it is.
  function reveal(row) {
    if (!row) return;
    const top = table.tHead.offsetHeight; // it stays above the rows
    const [outer, inner] = [scroll, row].map((item) => item.getBoundingClientRect());
    if (inner.top < outer.top + top) scroll.scrollTop += inner.top - outer.top - top;
    else if (inner.bottom > outer.bottom) scroll.scrollTop += inner.bottom - outer.bottom;
  }

  function pick(row) {
    if (!row) return;
    model.set("picked", row.dataset.id);
    model.save_changes();
    row.focus({ preventScroll: true });
    row.scrollIntoView({ block: "nearest" });
  }

  scroll.addEventListener("click", (event) => pick(event.target.closest("tbody tr")));
  scroll.addEventListener("keydown", (event) => {
    const row = event.target.closest("tbody tr");
    if (!row) return;
    const rows = row.parentElement.rows;
    const moves = {
      ArrowDown: row.nextElementSibling,
      ArrowUp: row.previousElementSibling,
      Home: rows[0],
      End: rows[rows.length - 1],
      Enter: row,
      " ": row,
    };
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation(); // JupyterLab's own shortcuts
    pick(moves[event.key]);
  });
  model.on("change:rows change:columns change:sort change:note", draw);
  model.on("change:marked change:picked", choose);
  draw();
  new ResizeObserver(choose).observe(scroll); // drawn before it stands in the page, where nothing scrolls yet
}

export default { initialize, render };
