/* Page /jobs: the form, the queue and the log, drawn from /api/jobs. Texts go in as text, never as markup. */
(function () {
  "use strict";

  const WORDS = {
    queued: "waiting", running: "running", success: "done", partial: "stopped",
    error: "failed", cancelled: "cancelled", lost: "interrupted",
  };
  const ACTIVE = ["queued", "running"];
  const AGAIN = { partial: "resume", cancelled: "resume", lost: "resume", error: "try again" };
  const LABELS = {
    "what": "analysis", "model.name": "model", "prompts.text_name": "text", "prompts.tokens": "tokens of each prompt",
    "prompts.copied": "copied prompts", "prompts.copied_length": "tokens of a copied prompt", "analysis.n": "prompts of the task",
    "analysis.length": "tokens of a window", "analysis.steps": "integration steps",
  };
  let timer = null;
  let shownLog = null;
  let form = [];

  function make(tag, properties, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(properties || {})) {
      if (value === undefined || value === null) continue;
      if (name in element && name !== "list") element[name] = value;
      else element.setAttribute(name, value);
    }
    element.append(...children.filter((child) => child !== null && child !== undefined));
    return element;
  }

  async function ask(path, body) {
    const options = body === undefined ? {} : {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    };
    const answer = await fetch(`/api/jobs${path}`, options);
    const data = await answer.json();
    if (!answer.ok) throw new Error(data.error || `the server answered ${answer.status}`);
    return data;
  }
  window.lensAskDesk = ask; // other pages have buttons too

  function notice(text, kind) {
    const place = document.getElementById("jobs-notice");
    if (place) place.replaceChildren(...(text ? [make("div", { className: `banner ${kind}` }, text)] : []));
  }

  /* the form */

  function input(field) {
    const id = `job-${field.name.replace(".", "-")}`;
    const start = field.start ?? "";
    const hint = field.default === null || field.default === undefined ? "" : String(field.default);
    if (field.kind === "choice") {
      const none = field.default === null ? [make("option", { value: "" }, "as usual")] : [];
      const options = [...none, ...field.choices.map((one) => make("option", { value: one, selected: one === start }, one))];
      return [id, make("select", { id, name: field.name }, ...options)];
    }
    if (field.kind === "boolean") {
      const options = [["", `as usual (${field.default})`], ["true", "true"], ["false", "false"]];
      return [id, make("select", { id, name: field.name }, ...options.map(([value, text]) => make("option", { value }, text)))];
    }
    const element = make("input", {
      id, name: field.name, value: start, placeholder: hint, autocomplete: "off",
      type: field.kind === "integer" ? "number" : "text", min: field.least, max: field.most,
    });
    if (!field.choices.length) return [id, element];
    element.setAttribute("list", `${id}-known`);
    const known = make("datalist", { id: `${id}-known` }, ...field.choices.map((value) => make("option", { value })));
    return [id, element, known];
  }

  function row(field) {
    const [id, ...parts] = input(field);
    const words = LABELS[field.name] || field.name.replace(/^.*\./, "").replace(/_/g, " ");
    parts[0].setAttribute("aria-describedby", `${id}-help`);
    return make("div", { className: "job-field", "data-whats": field.whats.join(" ") },
      make("label", { htmlFor: id }, words), ...parts, make("small", { id: `${id}-help` }, field.help));
  }

  function drawForm(place) {
    const more = make("details", {}, make("summary", {}, "More settings"), ...form.filter((field) => field.more).map(row));
    const problem = make("p", { className: "problem", role: "alert", id: "jobs-problem" });
    const start = make("button", { type: "submit", className: "primary" }, "Start");
    const estimate = make("button", { type: "button" }, "Estimate time and memory");
    const element = make("form", { noValidate: true }, ...form.filter((field) => !field.more).map(row), more, problem,
      make("div", { className: "job-buttons" }, start, estimate));
    const fit = () => {
      const what = element.elements.namedItem("what").value;
      for (const field of element.querySelectorAll(".job-field")) field.hidden = !field.dataset.whats.split(" ").includes(what);
    };
    const send = async (kind) => {
      problem.textContent = "";
      try {
        await ask("", { kind, settings: settings(element) });
        await poll();
        document.getElementById("jobs-list")?.scrollIntoView({ block: "center" }); // the form is longer than a screen
      } catch (error) {
        problem.textContent = error.message;
      }
    };
    element.addEventListener("change", fit);
    /* Words of one's own take the place of what stands in fields that say how the form begins; without them it is put back. */
    const beginnings = form.filter(({ name, start }) => name.startsWith("prompts.") && name !== "prompts.prompt"
      && ![null, undefined, ""].includes(start)).map(({ name }) => element.elements.namedItem(name));
    let stood = null; // while there are such words, [field, what stood in it]
    element.addEventListener("input", ({ target }) => {
      if (target.name !== "prompts.prompt" || Boolean(target.value) === Boolean(stood)) return;
      if (stood) for (const [field, was] of stood) field.value = field.value || was;
      stood = target.value ? beginnings.map((field) => [field, field.value]) : null;
      if (stood) for (const field of beginnings) field.value = "";
    });
    element.addEventListener("submit", (event) => { event.preventDefault(); send("run"); });
    estimate.addEventListener("click", () => send("estimate"));
    fit();
    place.replaceChildren(element);
  }

  function settings(element) {
    const found = {};
    for (const field of form) {
      const given = element.elements.namedItem(field.name);
      if (given.closest(".job-field").hidden || given.value === "") continue;
      if (field.kind === "integer") {
        if (!/^-?\d+$/.test(given.value)) throw new Error(`${field.name} must be a whole number, got ${given.value}`);
        found[field.name] = Number(given.value);
      } else found[field.name] = field.kind === "boolean" ? given.value === "true" : given.value;
    }
    return found;
  }

  /* the queue */

  function size(bytes) {
    return bytes < 1e9 ? `${Math.round(bytes / 1e6)} MB` : `${(bytes / 1e9).toFixed(1)} GB`;
  }

  function time(seconds) {
    return seconds < 100 ? `${Math.max(1, Math.round(seconds))} s` : `${Math.round(seconds / 60)} min`;
  }

  function words(job) {
    if (job.kind === "estimate" && job.result) {
      const one = job.result;
      const longest = Object.entries(one.steps).sort((a, b) => b[1] - a[1]).slice(0, 3);
      const rest = one.what === "profile" ? "" : ` (most for ${longest.map(([name, seconds]) => `${name} ${time(seconds)}`).join(", ")})`;
      return `about ${time(one.seconds)}${rest}, ${size(one.memory)} of memory, ${size(one.disk)} on disk; ${one.prompts} prompts, ${one.tokens} tokens`;
    }
    if (job.status === "success") return `in ${Math.round((new Date(job.ended) - new Date(job.started)) / 1000)} s`;
    return job.error || job.step || "";
  }

  function action(job, name, text) {
    const button = make("button", { type: "button", className: "quiet", "aria-label": `${text} job ${job.id}` }, text);
    button.addEventListener("click", async () => {
      button.disabled = true;
      try {
        await ask(`/${job.id}/${name}`, {});
        poll();
      } catch (error) {
        notice(error.message, "failed");
      }
    });
    return button;
  }

  function line(job) {
    const log = make("button", { type: "button", className: "quiet", "aria-label": `log of job ${job.id}` }, "log");
    log.addEventListener("click", () => { shownLog = shownLog === job.id ? null : job.id; poll(); });
    const bar = job.status === "running" ? make("progress", job.progress === null ? { "aria-label": `job ${job.id}` } : { value: job.progress, max: 1, "aria-label": `job ${job.id}` }) : null;
    const cells = [
      make("td", {}, String(job.id)),
      make("td", {}, make("code", {}, job.command), job.kind === "estimate" ? make("div", { className: "small" }, "estimate only") : null),
      make("td", {}, make("span", { className: `chip ${job.status}` }, WORDS[job.status] || job.status), bar, make("div", { className: "small job-words" }, words(job))),
      make("td", { className: "job-actions" },
        job.run && job.status !== "queued" ? make("a", { href: `/run/${encodeURIComponent(job.run)}`, className: "job-run" }, "open run") : null,
        log,
        ACTIVE.includes(job.status) && !job.cancel ? action(job, "cancel", "cancel") : null,
        AGAIN[job.status] ? action(job, "retry", AGAIN[job.status]) : null),
    ];
    return make("tr", { id: `job-row-${job.id}`, "data-status": job.status }, ...cells);
  }

  function drawList(state) {
    const place = document.getElementById("jobs-list");
    if (!state.jobs.length) {
      place.replaceChildren(make("p", {}, "Nothing waits and nothing was started yet."));
      return;
    }
    const heading = make("thead", {}, make("tr", {}, ...["Job", "Command", "State", "Actions"].map((text) => make("th", { scope: "col" }, text))));
    const focused = document.activeElement && place.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    place.replaceChildren(make("table", { className: "jobs-table" }, heading, make("tbody", {}, ...state.jobs.map(line))));
    if (focused) [...place.querySelectorAll("button")].find((button) => button.getAttribute("aria-label") === focused)?.focus();
  }

  async function drawLog() {
    const place = document.getElementById("jobs-log");
    if (shownLog === null) {
      place.replaceChildren();
      return;
    }
    const { lines } = await ask(`/${shownLog}/log`);
    const text = lines.length ? lines.join("\n") : "nothing said yet";
    const before = place.querySelector("pre");
    if (before && before.textContent === text && place.dataset.job === String(shownLog)) return;
    const log = make("pre", { tabIndex: 0, role: "log", "aria-label": `log of job ${shownLog}` }, text);
    place.dataset.job = String(shownLog);
    place.replaceChildren(make("section", { className: "card job-log" }, make("h2", {}, `Log of job ${shownLog}`), log));
    log.scrollTop = log.scrollHeight;
  }

  async function poll() {
    clearTimeout(timer);
    if (!document.getElementById("jobs-list")) return;
    let wait = 5000;
    try {
      const state = await ask("");
      if (!document.getElementById("jobs-list")) return;
      const active = state.jobs.some((job) => ACTIVE.includes(job.status));
      if (active) wait = 1000;
      notice(state.workers ? "" : `No worker is running, so nothing is computed. Start one: ${state.start}`, "partial");
      drawList(state);
      await drawLog();
    } catch (error) {
      notice(error.message, "partial");
    }
    clearTimeout(timer);
    timer = setTimeout(poll, wait);
  }

  async function mount() {
    shownLog = null;
    try {
      form = await ask("/form");
    } catch (error) {
      notice(error.message, "partial");
      for (const card of document.querySelectorAll(".jobs")) card.hidden = true;
      return;
    }
    drawForm(document.getElementById("jobs-form"));
    await poll();
  }

  window.dash_clientside = window.dash_clientside || {};
  window.dash_clientside.lensJobs = { mount() { mount(); return true; } };
})();
