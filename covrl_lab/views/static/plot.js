// A plotly figure redrawn in place, by the plotly.js that JupyterLab's plotly renderer left in the page.

const later = (milliseconds) => new Promise((resolve) => setTimeout(resolve, milliseconds));

const PATIENCE = 30000; // milliseconds until another plot asks, too: the kernel that was asked may be gone

async function load(model) {
  model.on("msg:custom", ({ source }) => {
    if (window.Plotly) return;
    const script = document.createElement("script");
    script.textContent = source;
    document.head.append(script);
  });
  const started = Date.now();
  let asked = false;
  // A kernel at work answers when it is done, and a figure beside this one may bring plotly.js: look out for both.
  while (!window.Plotly) {
    await later(100);
    const now = Date.now();
    if (asked || now - started < 2000 || now - (window.covrlAsked ?? 0) < PATIENCE) continue;
    asked = true;
    window.covrlAsked = now; // 5 MB: one answer does for all plots of the page
    model.send({ wanted: "plotly.js" });
  }
  return window.Plotly;
}

async function render({ model, el }) {
  const plot = document.createElement("div");
  plot.className = "covrl-plot";
  el.style.width = "100%";
  el.append(plot);
  const plotly = await load(model);
  // A panel may go away while its plot is drawn: then nobody misses the rest.
  const drawn = (work) => work?.catch((error) => { if (plot._fullLayout) throw error; });
  const draw = () => {
    if (!model.get("figure")) return plotly.purge(plot);
    const { data, layout } = JSON.parse(model.get("figure"));
    drawn(plotly.react(plot, data, { ...layout, autosize: true }, saving(plotly)));
    plot.removeAllListeners("plotly_click");
    plot.on("plotly_click", ({ points: [{ x, y, curveNumber }] }) => model.send({ clicked: { x, y, curve: curveNumber } }));
  };
  model.on("change:figure", draw);
  draw();
  // Its first width is a guess: widgets are drawn before they stand in the page.
  const fit = new ResizeObserver(() => plot.offsetWidth && plot.layout && drawn(plotly.Plots.resize(plot)));
  fit.observe(el);
  return () => {
    fit.disconnect();
    plotly.purge(plot);
  };
}

export default { initialize, render };
