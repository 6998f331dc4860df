/* Tables of many rows: drawn here from `data-table`, since a component for each cell takes seconds.
   {head: [{text, title, link, sort}], rows: [{cells: [text or [text, link, title]], marked}], rowHeads}; texts go in as text. */
(function () {
  "use strict";

  function draw(place) {
    const { head, rows, rowHeads } = JSON.parse(place.dataset.table);
    const table = document.createElement("table");
    const top = table.createTHead().insertRow();
    for (const column of head) {
      const cell = document.createElement("th");
      cell.scope = "col";
      if (column.title) cell.title = column.title;
      if (column.sort) cell.setAttribute("aria-sort", column.sort);
      cell.append(column.link ? anchor(column.text, column.link) : column.text);
      top.append(cell);
    }
    const body = table.createTBody();
    for (const { cells, marked } of rows) {
      const row = body.insertRow();
      if (marked) row.className = "marked";
      for (const value of cells) {
        const [text, link, title] = Array.isArray(value) ? value : [value];
        const cell = document.createElement(rowHeads && !row.cells.length ? "th" : "td");
        if (cell.tagName === "TH") cell.scope = "row";
        if (title) cell.title = title;
        cell.append(link ? anchor(text, link) : text);
        row.append(cell);
        if (/^[-+–]?[\d.,]+(e[-+]?\d+)?$/.test(cell.textContent)) cell.className = "number";
      }
    }
    place.replaceChildren(table);
  }

  function anchor(text, link) {
    const made = document.createElement("a");
    made.href = link;
    made.textContent = text;
    return made;
  }

  // A link of a table changes the page as those of the other components do.
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element && event.target.closest("[data-table] a");
    if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    window.lensGo(link.getAttribute("href"));
  });

  new MutationObserver((changes) => {
    for (const change of changes) {
      if (change.type === "attributes") draw(change.target);
      for (const added of change.addedNodes) {
        if (!(added instanceof Element)) continue;
        for (const place of [added, ...added.querySelectorAll("[data-table]")]) if (place.dataset.table) draw(place);
      }
    }
  }).observe(document.documentElement, { childList: true, subtree: true, attributeFilter: ["data-table"] });
})();
