"use strict";
const lensPage = (() => {
  const payload = JSON.parse(document.getElementById("payload").textContent);
  const options = { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"] };

  function draw(element, name) {
    const figure = payload.figures[name];
    if (!figure) return;
    Plotly.react(element, figure.data, { ...figure.layout, template: payload.template }, options);
  }
  // What is folded has no size yet: it is drawn when it is first seen.
  const seen = (element) => [...document.querySelectorAll("details:not([open])")].every((fold) => !fold.contains(element));
  function drawSeen() {
    for (const element of document.querySelectorAll("[data-figure]:not(.drawn)")) {
      if (!seen(element)) continue;
      element.classList.add("drawn");
      draw(element, element.dataset.figure);
    }
  }
  drawSeen();
  document.addEventListener("toggle", drawSeen, true);
  for (const element of document.querySelectorAll("[data-picture]")) {
    const figure = payload.figures[element.dataset.picture];
    Plotly.react(element, figure.data, { ...figure.layout, template: payload.template }, { staticPlot: true });
  }

  function unfold(element) {
    for (let fold = element?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
    const own = element?.querySelector(":scope > details.fold");
    if (own) own.open = true;
  }
  const linked = () => location.hash.length > 1 && unfold(document.getElementById(decodeURIComponent(location.hash.slice(1))));
  window.addEventListener("hashchange", linked);
  linked();
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details.fold:not([open])")];
    for (const fold of folded) fold.open = true;
    drawSeen();
  });
  window.addEventListener("afterprint", () => { for (const fold of folded) fold.open = false; });

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
