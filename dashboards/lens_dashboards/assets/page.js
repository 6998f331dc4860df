/* Client-side callbacks: links that keep the view, and the keyboard. */
(function () {
  "use strict";

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.lens = {
    keepOverviewLink(metric, variant, group) {
      const search = new URLSearchParams();
      if (group) search.set("group", group);
      if (metric) search.set("metric", metric);
      if (variant && variant !== "raw") search.set("variant", variant);
      window.history.replaceState(window.history.state, "", `${window.location.pathname}?${search}`);
      return search.toString();
    },
    openHead(click, run, group, prompts) {
      if (!click || !click.points || !click.points.length) return window.dash_clientside.no_update;
      const { x, y } = click.points[0];
      return `/run/${encodeURIComponent(run)}/head/${y}/${x}?prompt=${encodeURIComponent(prompts[group] || "")}`;
    },
    mountMap(config) {
      const root = document.getElementById("map");
      if (root && config) window.lensBlockMap.mount(root, config);
      return true;
    },
    mountAtlas(config) {
      const root = document.getElementById("atlas");
      if (root && config) window.lensAtlas.mount(root, config);
      return true;
    },
  };

  document.addEventListener("click", (event) => {
    const target = event.target;
    if (!(target instanceof HTMLElement)) return;
    if (target.id === "copy-link") copy(target, window.location.href);
    if (target.classList.contains("copy-code")) copy(target, target.parentElement.querySelector("code").textContent);
  });

  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLElement && event.target.closest("input, textarea, select, [contenteditable]");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const link = { n: "next-head", p: "previous-head" }[event.key];
    if (link) document.getElementById(link)?.click();
  });

  async function copy(button, text) {
    const before = button.textContent;
    try {
      await navigator.clipboard.writeText(text);
      button.textContent = "copied";
    } catch {
      button.textContent = "cannot copy here";
    }
    window.setTimeout(() => { button.textContent = before; }, 1200);
  }
})();
