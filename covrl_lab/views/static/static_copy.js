// Hides the copies that stand before a live panel, also those that are drawn anew; names its sliders for screen readers.

export default { render({ model, el }) {
  const hide = () => {
    let child = el.closest(".jp-OutputArea-child");
    for (let k = 0; child && k < model.get("outputs"); k++) {
      child = child.previousElementSibling;
      if (child) child.style.display = "none";
    }
  };
  const name = () => {
    for (const handle of el.parentElement?.querySelectorAll(".noUi-handle:not([aria-label])") ?? []) {
      handle.ariaLabel = handle.closest(".widget-slider")?.querySelector(".widget-label")?.textContent || "value";
    }
  };
  const start = () => {
    if (!el.isConnected) return setTimeout(start, 50);
    hide();
    name();
    const area = el.closest(".jp-OutputArea");
    if (area) new MutationObserver(hide).observe(area, { childList: true });
    new MutationObserver(name).observe(el.parentElement, { childList: true, subtree: true });
  };
  start();
} };
