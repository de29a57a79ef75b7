// Draws every figure of a report from the JSON block behind its place.
for (const block of document.querySelectorAll('script[type="application/json"]')) {
  const figure = JSON.parse(block.textContent);
  Plotly.newPlot(block.previousElementSibling, figure.data, figure.layout,
    { ...saving(Plotly), responsive: true });
}
