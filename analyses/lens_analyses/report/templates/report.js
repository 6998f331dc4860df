"use strict";
(() => {
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const options = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

  function draw(element, name) {
    const figure = payload.figures[name];
    if (!figure) return;
    Plotly.react(element, figure.data, { ...figure.layout, template: payload.template }, options);
  }

  const grid = document.getElementById("grid");
  const kind = document.getElementById("grid-kind");
  const metrics = [...document.querySelectorAll(".grid-metric")];

  function showGrid() {
    for (const label of document.querySelectorAll(".metric-of")) label.hidden = label.dataset.kind !== kind.value;
    const metric = metrics.find((select) => select.dataset.kind === kind.value);
    draw(grid, `grid/${kind.value}/${metric.value}`);
    document.getElementById("grid-definition").textContent = metric.selectedOptions[0].dataset.definition;
  }
  kind.addEventListener("change", () => {
    const before = metrics.find((select) => select.offsetParent !== null);
    const after = metrics.find((select) => select.dataset.kind === kind.value);
    if (before && [...after.options].some((option) => option.value === before.value)) after.value = before.value;
    showGrid();
  });
  for (const select of metrics) select.addEventListener("change", showGrid);
  showGrid();
  for (const element of document.querySelectorAll("[data-figure]")) draw(element, element.dataset.figure);

  for (const table of document.querySelectorAll("table.sortable")) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      const button = heading.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const down = heading.getAttribute("aria-sort") !== "descending" && (column > 0 || heading.hasAttribute("aria-sort"));
        for (const other of headings) other.removeAttribute("aria-sort");
        heading.setAttribute("aria-sort", down ? "descending" : "ascending");
        const key = (row) => {
          const text = row.cells[column].dataset.value;
          return text === "" ? (down ? -Infinity : Infinity) : Number(text);
        };
        const rows = [...table.tBodies[0].rows].sort((a, b) => (down ? key(b) - key(a) : key(a) - key(b)) || 0);
        table.tBodies[0].append(...rows);
      });
    });
  }
})();
