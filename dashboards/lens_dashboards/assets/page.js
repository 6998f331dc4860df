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
    openPoint(clicks) {
      // Points that stand for a head carry its link as the last of their customdata.
      const clicked = (window.dash_clientside.callback_context.triggered || [])[0];
      const point = clicked && clicked.value && clicked.value.points && clicked.value.points[0];
      const data = point && [].concat(point.customdata || []);
      const link = data && data[data.length - 1];
      return typeof link === "string" && link.startsWith("/run/") ? link : window.dash_clientside.no_update;
    },
    chooseEdges(step, steps, shown) {
      return steps && steps[step] && steps[step] !== shown ? steps[step] : window.dash_clientside.no_update;
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

  // Dash gives the thumb of a slider and the file input of an upload no name.
  new MutationObserver(() => {
    for (const thumb of document.querySelectorAll(".control.slider [role=slider]:not([aria-label])")) {
      thumb.setAttribute("aria-label", thumb.closest(".control").querySelector("label, legend").textContent);
    }
    document.querySelector("#circuit-file input:not([aria-label])")?.setAttribute("aria-label", "Circuit file");
  }).observe(document.documentElement, { childList: true, subtree: true });

  document.addEventListener("click", (event) => {
    const target = event.target;
    if (!(target instanceof HTMLElement)) return;
    if (target.id === "copy-link") copy(target, window.location.href);
    if (target.dataset.figure) figureMenu(target, target.dataset.figure);
    if (target.classList.contains("copy-code")) copy(target, target.parentElement.querySelector("code").textContent);
  });

  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLElement && event.target.closest("input, textarea, select, [contenteditable]");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const link = { n: "next-head", p: "previous-head" }[event.key];
    if (link) document.getElementById(link)?.click();
  });

  async function figureMenu(button, kind) {
    const box = button.closest(".figure"), plot = box.querySelector(".js-plotly-plot");
    if (!plot || !plot._fullData) return;
    const name = `attention-lens-${box.querySelector(".dash-graph").id.replace(/[^\w-]+/g, "-")}`;
    if (kind === "full") {
      if (document.fullscreenElement) await document.exitFullscreen();
      else await box.requestFullscreen();
      window.Plotly.Plots.resize(plot);
    } else if (kind === "png" || kind === "svg") {
      await window.Plotly.downloadImage(plot, { format: kind, scale: kind === "png" ? 2 : 1, filename: name });
    } else if (kind === "csv") {
      save(csvOf(plot._fullData), "text/csv", `${name}.csv`);
    } else {
      save(JSON.stringify({ data: plot.data, layout: plot.layout }), "application/json", `${name}.json`);
    }
  }

  /* The numbers of a figure, one row a point: trace, x, y, z, and the ends of its interval. */
  function csvOf(traces) {
    const rows = [["trace", "x", "y", "z", "high", "low", "text"]];
    for (const trace of traces) {
      const name = trace.name || "", x = trace.x || [], y = trace.y || [], words = trace.text;
      const text = (...at) => { let found = words; for (const i of at) found = found && typeof found === "object" ? found[i] : ""; return typeof found === "object" ? "" : found ?? ""; };
      if (trace.z) {
        for (let i = 0; i < trace.z.length; i += 1) {
          for (let j = 0; j < trace.z[i].length; j += 1) rows.push([name, x[j] ?? j, y[i] ?? i, trace.z[i][j], "", "", text(i, j)]);
        }
      } else {
        const ends = trace.error_y || {};
        const length = Math.max(x.length, y.length);
        for (let i = 0; i < length; i += 1) {
          const up = ends.visible && ends.array ? y[i] + ends.array[i] : "";
          const down = ends.visible && (ends.arrayminus || ends.array) ? y[i] - (ends.arrayminus || ends.array)[i] : "";
          rows.push([name, x[i] ?? i, y[i] ?? "", "", up, down, text(i)]);
        }
      }
    }
    const cell = (value) => (/[",\n]/.test(String(value ?? "")) ? `"${String(value).replaceAll('"', '""')}"` : String(value ?? ""));
    return rows.map((row) => row.map(cell).join(",")).join("\n") + "\n";
  }

  function save(text, type, name) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type }));
    link.download = name;
    link.click();
    URL.revokeObjectURL(link.href);
  }

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
