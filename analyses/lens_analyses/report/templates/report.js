(() => {
  const grid = document.getElementById("grid");
  const kind = document.getElementById("grid-kind");
  const metrics = [...document.querySelectorAll(".grid-metric")];

  function showGrid() {
    for (const label of document.querySelectorAll(".metric-of")) label.hidden = label.dataset.kind !== kind.value;
    const metric = metrics.find((select) => select.dataset.kind === kind.value);
    lensPage.draw(grid, `grid/${kind.value}/${metric.value}`);
    document.getElementById("grid-definition").textContent = metric.selectedOptions[0].dataset.definition;
  }
  kind?.addEventListener("change", () => {
    const before = metrics.find((select) => select.offsetParent !== null);
    const after = metrics.find((select) => select.dataset.kind === kind.value);
    if (before && [...after.options].some((option) => option.value === before.value)) after.value = before.value;
    showGrid();
  });
  for (const select of metrics) select.addEventListener("change", showGrid);
  if (kind) showGrid();

  const dialog = document.getElementById("map-dialog");
  for (const button of document.querySelectorAll(".open-map")) {
    button.addEventListener("click", () => {
      document.getElementById("map-title").textContent = button.closest("figure").querySelector("figcaption").innerText.replace("\n", ", ");
      document.getElementById("map-frame").srcdoc = lensPage.payload.maps[Number(button.dataset.map)];
      dialog.showModal();
    });
  }
  document.getElementById("map-close")?.addEventListener("click", () => dialog.close());
  dialog?.addEventListener("close", () => { document.getElementById("map-frame").srcdoc = ""; });
})();
