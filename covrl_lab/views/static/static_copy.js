// Hides the copies that stand before a live panel, also those that are drawn anew.

export default { render({ model, el }) {
  const hide = () => {
    let child = el.closest(".jp-OutputArea-child");
    for (let k = 0; child && k < model.get("outputs"); k++) {
      child = child.previousElementSibling;
      if (child) child.style.display = "none";
    }
  };
  const start = () => {
    if (!el.isConnected) return setTimeout(start, 50);
    hide();
    const area = el.closest(".jp-OutputArea");
    if (area) new MutationObserver(hide).observe(area, { childList: true });
  };
  start();
} };
