(() => {
  lensPage.draw(document.getElementById("first-token"), "first_token");
  const choice = document.getElementById("score");
  if (!choice) return;
  function show() {
    for (const kind of ["scatter", "grid"]) lensPage.draw(document.getElementById(kind), `${kind}/${choice.value}`);
    document.getElementById("score-definition").textContent = choice.selectedOptions[0].dataset.definition;
  }
  choice.addEventListener("change", show);
  show();
})();
