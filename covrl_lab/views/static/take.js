// Buttons whose text the kernel makes: a file to save, or a line to copy.

function element(tag, values) {
  return Object.assign(document.createElement(tag), values);
}

function render({ model, el }) {
  const line = element("code", { role: "status" });
  let asked = false; // by this view of the widget
  const ask = (wanted) => ((asked = true), model.send({ wanted }));
  for (const textContent of model.get("labels")) {
    const className = "jupyter-button widget-button";
    el.append(element("button", { className, textContent, style: "width: auto; margin: 0 6px 0 0", onclick: () => ask(textContent) }));
  }
  el.append(line);
  model.on("msg:custom", ([name, text]) => {
    if (!asked) return;
    asked = false;
    line.textContent = name ? "" : text; // to be read where a page may not copy
    if (!name) return navigator.clipboard?.writeText(text).catch(() => {});
    const href = URL.createObjectURL(new Blob([text]));
    element("a", { href, download: name }).click();
    setTimeout(() => URL.revokeObjectURL(href), 1000);
  });
}

export default { initialize, render };
