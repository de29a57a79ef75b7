// What a figure's tool bar saves: a PNG of twice the size, or an SVG.
const saving = (plotly) => ({
  displaylogo: false,
  showSendToCloud: false, // a button that uploads the figure, on by default
  toImageButtonOptions: { format: "png", scale: 2 },
  modeBarButtonsToAdd: [{
    name: "svg",
    title: "Download plot as an SVG",
    icon: plotly.Icons.disk,
    click: (plot) => plotly.downloadImage(plot, { format: "svg", filename: "newplot", width: null, height: null }),
  }],
});

