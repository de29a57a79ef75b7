// Hides the copies that stand before a live panel.

export default { render({ model, el }) {
  const hide = () => {
    if (!el.isConnected) return setTimeout(hide, 50);
    let child = el.closest(".jp-OutputArea-child");
    for (let k = 0; child && k < model.get("outputs"); k++) {
      child = child.previousElementSibling;
      if (child) child.style.display = "none";
    }
  };
  hide();
} };
