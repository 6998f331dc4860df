"use strict";
const lensPage = (() => {
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const options = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

  function draw(element, name) {
    const figure = payload.figures[name];
    if (!figure) return;
    Plotly.react(element, figure.data, { ...figure.layout, template: payload.template }, options);
  }
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
  return { draw, payload };
})();
