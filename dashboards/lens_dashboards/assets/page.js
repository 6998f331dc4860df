/* Client-side callbacks: links that keep the view, and the keyboard. */
(function () {
  "use strict";

  /* Another page, as a link of Dash does it. Setting a property of Dash's Location would bring back what
     the link held before a map wrote its zoom there. */
  function go(link) {
    const from = window.location.pathname;
    window.history.pushState({}, "", link);
    window.dispatchEvent(new CustomEvent("_dashprivate_pushstate"));
    if (window.location.pathname !== from) window.scrollTo(0, 0);
  }
  window.lensGo = go;
  const CURVES_AFTER = 150; // ms: who steps through heads is not held up by figures below the map

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.lens = {
    openPoint(clicks) {
      // Points that stand for a head carry its link as the last of their customdata.
      const clicked = (window.dash_clientside.callback_context.triggered || [])[0];
      const point = clicked && clicked.value && clicked.value.points && clicked.value.points[0];
      const data = point && [].concat(point.customdata || []);
      const link = data && data[data.length - 1];
      if (typeof link === "string" && link.startsWith("/run/")) go(link);
      return window.dash_clientside.no_update;
    },
    follow(step) {
      if (step) go(step.link);
      return window.dash_clientside.no_update;
    },
    chooseEdges(step, steps, shown) {
      return steps && steps[step] && steps[step] !== shown ? steps[step] : window.dash_clientside.no_update;
    },
    /* What was chosen in the controls of a page. One that still has the value that it was drawn with was not touched:
       writing it into the link would add a step to the history, from which there is no way back. */
    choose(values, ids, shown, shownIds) {
      const before = Object.fromEntries(shownIds.map((one, at) => [one.shown, JSON.stringify(shown[at])]));
      const touched = ids.map((one, at) => [one.option, values[at]]).filter(([name, value]) => JSON.stringify(value) !== before[name]);
      return touched.length ? Object.fromEntries(touched) : window.dash_clientside.no_update;
    },
    /* Ends when the map is drawn and no other head was asked for, which is what the curves below it wait for. */
    async mountMap(config) {
      const root = document.getElementById("map");
      if (!root || !config) return window.dash_clientside.no_update;
      const map = window.lensBlockMap.mount(root, config), link = window.location.pathname;
      await map.started;
      await new Promise((resolve) => setTimeout(resolve, CURVES_AFTER));
      const stays = window.lensBlockMap.current === map && window.location.pathname === link;
      return stays ? link + window.location.search : window.dash_clientside.no_update;
    },
    mountMaps(config) {
      const wall = document.getElementById("maps");
      if (wall && config) window.lensBlockMap.mountWall(wall, config);
      return true;
    },
    mountVision(config) {
      const root = document.getElementById("vision");
      if (root && config) window.lensVision.mount(root, config);
      return true;
    },
    mountAtlas(config) {
      const root = document.getElementById("atlas");
      if (root && config) window.lensAtlas.mount(root, config);
      return true;
    },
  };

  /* Tabs and history are told apart by the page and the run. */
  function nameTab() {
    const heading = document.querySelector("#page h1"), run = window.location.pathname.match(/^\/run\/([^/]+)/);
    const name = [heading && heading.textContent, run && decodeURIComponent(run[1]), "attention-lens"].filter(Boolean).join(" · ");
    if (document.title !== name) document.title = name;
  }

  // Dash gives the thumb of a slider and the file input of an upload no name, and leads the keyboard to a
  // dropdown through an input that is hidden from readers; here it goes to the button itself.
  new MutationObserver(() => {
    nameTab();
    for (const hidden of document.querySelectorAll(".dash-dropdown-focus-target[tabindex='0']")) {
      hidden.tabIndex = -1;
      hidden.parentElement.querySelector("button.dash-dropdown")?.setAttribute("tabindex", "0");
    }
    for (const thumb of document.querySelectorAll(".control.slider [role=slider]:not([aria-label])")) {
      thumb.setAttribute("aria-label", thumb.closest(".control").querySelector("label, legend").textContent);
    }
    document.querySelector("#circuit-file input:not([aria-label])")?.setAttribute("aria-label", "Circuit file");
    for (const plot of document.querySelectorAll(".js-plotly-plot:not([data-fits])")) {
      if (!plot.on) continue;
      plot.dataset.fits = "";
      plot.on("plotly_afterplot", () => fitTitle(plot));
      fitTitle(plot);
    }
  }).observe(document.documentElement, { childList: true, subtree: true });

  /* The head before or after the one that was asked for last, whose page may still be on its way; none beyond the ends. */
  function headBeside(link) {
    const { layers, heads } = link.parentElement.dataset, known = JSON.parse(layers);
    const found = window.location.pathname.match(/^(.*\/head)\/(\d+)\/(\d+)$/);
    if (!found) return new URL(link.href).pathname;
    const at = known.indexOf(Number(found[2])) * heads + Number(found[3]) + (link.id === "next-head" ? 1 : -1);
    return at < 0 || at >= known.length * heads ? null : `${found[1]}/${known[Math.floor(at / heads)]}/${at % heads}`;
  }

  function stepFrom(link) {
    const there = headBeside(link);
    if (!there) return;
    window.lensBlockMap.expect(...there.split("/").slice(-2));
    go(there + window.location.search);
  }

  // A link that is replaced by that of the next page while it is pressed gets no click.
  let pressed = null;
  const stepAt = (event) => event.target instanceof Element && event.target.closest("#previous-head, #next-head");
  document.addEventListener("pointerdown", (event) => { pressed = event.button === 0 && stepAt(event); }, true);
  document.addEventListener("pointerup", (event) => {
    const link = stepAt(event);
    if (link && pressed && link !== pressed && link.id === pressed.id && !pressed.isConnected) stepFrom(link);
    pressed = null;
  }, true);

  // The next head at the zoom of this one, which only the address knows.
  document.addEventListener("click", (event) => {
    const link = event.target instanceof Element && event.target.closest("#previous-head, #next-head, #maps-chosen a, #pin, .steps #to-maps");
    if (!link || link.tagName !== "A" || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    event.stopPropagation();
    if (link.id.endsWith("-head")) return stepFrom(link);
    const there = new URL(link.href), here = new URLSearchParams(window.location.search);
    for (const name of ["q0", "q1", "k0", "k1", "query"]) {
      if (here.get(name)) there.searchParams.set(name, here.get(name));
    }
    go(there.pathname + there.search);
  }, true);

  document.addEventListener("click", (event) => {
    const target = event.target;
    if (!(target instanceof HTMLElement)) return;
    if (target.id === "copy-link") copy(target, window.location.href);
    if (target.dataset.variant) chooseVariant(target.dataset.variant);
    if (target.dataset.job) startJob(target);
    if (target.dataset.delete) deleteRun(target);
    if (target.dataset.figure) figureMenu(target, target.dataset.figure);
    if (target.classList.contains("copy-code")) copy(target, target.parentElement.querySelector("code").textContent);
  });

  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLElement && event.target.closest("input, textarea, select, [contenteditable]");
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    const link = { n: "next-head", p: "previous-head" }[event.key];
    if (link) document.getElementById(link)?.click();
  });

  async function deleteRun(button) {
    const run = button.dataset.delete;
    if (!window.confirm(`Delete ${run}? The files that the run wrote go.`)) return;
    const problem = document.getElementById("delete-problem");
    if (await isDone(button, problem, "/delete", { run })) button.closest("tr").remove();
  }

  async function startJob(button) {
    const problem = button.parentElement.querySelector(".job-problem");
    if (await isDone(button, problem, "", JSON.parse(button.dataset.job))) go("/jobs");
  }

  /* Whether the desk did what a button asks; why not is said, and the button can be pressed again. */
  async function isDone(button, problem, path, body) {
    button.disabled = true;
    try {
      await window.lensAskDesk(path, body);
      return true;
    } catch (error) {
      problem.textContent = ` ${error.message}`;
      button.disabled = false;
      return false;
    }
  }

  /* What the link holds now, the zoom of a map too, with or without the first token. */
  function chooseVariant(variant) {
    const search = new URLSearchParams(window.location.search);
    search.delete("variant");
    if (variant !== "raw") search.set("variant", variant);
    go(`${window.location.pathname}${search.size ? "?" : ""}${search}`);
  }

  /* Titles of figures go on in a second line where one is too narrow. */
  const MARKUP = /<\/?(br|b|i|em|s|u|sub|sup|span|a)\b[^>]*>/g; // a token such as <0xB1> is text
  const ruler = document.createElement("canvas").getContext("2d");
  function fitTitle(plot) {
    const layout = plot._fullLayout, text = layout && layout.title && layout.title.text;
    if (!text || !plot.clientWidth) return;
    if (plot.fitted !== text) Object.assign(plot, { title: text, top: layout.margin.t });
    ruler.font = `${layout.title.font.size}px ${layout.title.font.family}`;
    const room = plot.clientWidth - layout.margin.l - 12;
    const lines = [""];
    for (const word of plot.title.split(" ")) {
      const longer = `${lines.at(-1)} ${word}`.trim();
      if (lines.at(-1) && ruler.measureText(longer.replace(MARKUP, "")).width > room) lines.push(word);
      else lines[lines.length - 1] = longer;
    }
    const fitted = lines.join("<br>");
    plot.fitted = fitted;
    const legend = plot.querySelector(".legend"), rows = legend && layout.legend.orientation === "h" ? Math.ceil(legend.getBBox().height) : 0;
    const above = layout.legend && layout.legend.y < 0.5 ? 0 : rows;
    if (rows && !above) { // names below take the room that a narrow plot needs
      const box = plot.closest(".dash-graph");
      plot.high ||= box.clientHeight;
      const high = `${plot.high + Math.max(0, rows - 80)}px`;
      if (box.style.height !== high) box.style.height = high;
    }
    const top = Math.max(plot.top + 17 * (lines.length - 1) + (lines.length > 1 ? 6 : 0), above ? 14 + 17 * lines.length + above : 0);
    // Plotly puts the baseline of the first of several lines where the top of a single one would be.
    const pad = lines.length > 1 ? 10 + 0.7 * layout.title.font.size : 10;
    if (fitted !== text || top > layout.margin.t) {
      window.Plotly.relayout(plot, { "title.text": fitted, "title.pad.t": pad, "margin.t": top });
    }
  }

  async function figureMenu(button, kind) {
    const box = button.closest(".figure"), plot = box.querySelector(".js-plotly-plot");
    if (!plot || !plot._fullData) return;
    const name = fileName(box.querySelector(".dash-graph").id);
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

  /* A file is named after the run, the page and the head that it shows: RUN_head_0_3_lag. */
  function fileName(figure) {
    const page = decodeURIComponent(location.pathname).split("/").filter(Boolean);
    if (page[0] === "run") page.shift();
    const shown = figure.startsWith("{") ? Object.values(JSON.parse(figure)).join("-") : figure.replace(/^figure-/, "");
    return [...page, shown].join("_").replace(/[^\w.-]+/g, "-");
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
