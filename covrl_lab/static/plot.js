// A plotly figure redrawn in place, by the plotly.js that JupyterLab's plotly renderer left in the page.

const later = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

async function load(model) {
  for (let k = 0; !window.Plotly && k < 20; k++) await later(100); // a figure beside this one may bring it
  if (window.Plotly) return window.Plotly;
  return new Promise((resolve) => {
    model.on("msg:custom", (message) => {
      const script = document.createElement("script");
      script.textContent = message.source;
      document.head.append(script);
      resolve(window.Plotly);
    });
    model.send({ wanted: "plotly.js" });
  });
}

async function render({ model, el }) {
  const plot = document.createElement("div");
  plot.className = "covrl-plot";
  el.style.width = "100%";
  el.append(plot);
  window.covrlPlotly ??= load(model); // once a page
  const plotly = await window.covrlPlotly;
  const draw = () => {
    if (!model.get("figure")) return;
    const { data, layout } = JSON.parse(model.get("figure"));
    plotly.react(plot, data, { ...layout, autosize: true });
  };
  model.on("change:figure", draw);
  draw();
  // Its first width is a guess: widgets are drawn before they stand in the page.
  const fit = new ResizeObserver(() => plot.offsetWidth && plot.layout && plotly.Plots.resize(plot));
  fit.observe(el);
  return () => {
    fit.disconnect();
    plotly.purge(plot);
  };
}

export default { render };
