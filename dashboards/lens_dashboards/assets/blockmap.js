/* The attention map of one head on a canvas: a rectangle of float32 numbers at the sharpest level that
   fits, coloured by the logarithm. Hover shows the number itself, never a colour's.

   The numbers come from a source: {tokens() -> strings, raster({q0, q1, k0, k1, pooling, cells}) -> {rows, columns,
   level, cell, queryCell, query, key, values}, row(query) -> Float32Array}, all of them promises. The dashboard asks
   its server, a file of its own holds them, a notebook asks its kernel. Of cross-attention config.queries are the
   tokens of the rows, and the source's those of the columns. */
(function () {
  "use strict";

  const FLOOR = 1e-6;
  const LEFT = 64, TOP = 34, RIGHT = 86, BOTTOM = 30;
  const NAMED = 64, WIDE_LEFT = 124, WIDE_BOTTOM = 92; // tokens that have room for their names, and that room
  const CELLS = 512; // a side, at most: a small map has fewer pixels, and asks for no more
  const SCALES = [["log", "logarithmic colours"], ["linear", "linear colours"], ["rank", "colours by rank"]];

  class BlockMap {
    constructor(root, config) {
      this.config = config;
      this.source = config.source || serverSource(config);
      this.tokens = [];
      this.query = config.query;
      this.view = null; // {q0, q1, k0, k1} in tokens, what is on the screen
      this.data = null; // {values, rows, columns, cell, query, key, ...}
      this.request = 0;
      this.group = [this]; // maps that share zoom, cursor and query
      this.active = false; // whether the wheel zooms without Ctrl: after a click, until the pointer leaves
      this.palette = paletteOf(config.palette);
      this.build(root);
      this.started = this.start();
    }

    build(root) {
      root.replaceChildren();
      delete root.dataset.ready; // of the map before, where the page kept the element
      root.dataset.prompt = this.config.prompt || "";
      root.dataset.head = `L${this.config.layer}H${this.config.head}`;
      const bar = element("div", "map-bar");
      this.level = element("span", "map-level", "loading…");
      if (this.config.small) bar.append(element("b", "map-name", this.config.title || root.dataset.head));
      this.pooling = element("select", "map-pooling");
      this.pooling.setAttribute("aria-label", "How what a cell holds becomes one number");
      for (const [value, label] of [["max", "largest of each cell"], ["mean", "mean of each cell"]]) {
        const option = element("option", "", label);
        option.value = value;
        this.pooling.append(option);
      }
      this.pooling.addEventListener("change", () => {
        for (const map of this.group) map.pooling.value = this.pooling.value;
        this.fetchAll();
      });
      this.pooling.hidden = Boolean(this.config.held); // a file of its own was pooled when it was written
      this.scale = element("select", "map-pooling map-scale");
      this.scale.setAttribute("aria-label", "Scale of the colours");
      for (const [value, label] of SCALES) {
        const option = element("option", "", label);
        option.value = value;
        this.scale.append(option);
      }
      this.scale.addEventListener("change", () => {
        for (const map of this.group) {
          map.scale.value = this.scale.value;
          if (map.data) { map.paint(); map.draw(); }
        }
      });
      const whole = button("show everything", () => this.showAll());
      const save = button("PNG", () => this.save());
      const table = button("CSV", () => this.saveTable());
      const numbers = button("JSON", () => this.saveNumbers());
      const full = button("full screen", () => (document.fullscreenElement ? document.exitFullscreen() : root.requestFullscreen()));
      full.hidden = !document.fullscreenEnabled;
      bar.append(this.level, this.scale, this.pooling, whole, full, save, table, numbers);
      this.canvas = element("canvas", "map-canvas");
      this.canvas.tabIndex = 0;
      this.canvas.title = "Wheel with Ctrl, or after a click, zooms; drag moves; click shows a row";
      this.canvas.setAttribute("role", "img");
      this.canvas.setAttribute("aria-label", "Attention map, being loaded");
      this.tip = element("div", "map-tip");
      this.tip.hidden = true;
      const frame = element("div", "map-frame");
      frame.append(this.canvas, this.tip);
      this.summary = element("p", "small map-summary");
      this.summary.setAttribute("aria-live", "polite");
      this.row = element("div", "map-row"); // the tokens of a row, in full screen
      const side = element("div", "map-side");
      side.append(this.summary, this.row);
      root.append(bar, frame, side);
      this.canvas.addEventListener("wheel", (event) => this.onWheel(event), { passive: false });
      this.canvas.addEventListener("pointerdown", (event) => this.onDown(event));
      this.canvas.addEventListener("pointermove", (event) => this.onMove(event));
      this.canvas.addEventListener("pointerup", (event) => this.onUp(event));
      this.canvas.addEventListener("pointerleave", () => { this.active = false; this.tip.hidden = true; this.point(null); });
      this.canvas.addEventListener("dblclick", () => this.showAll());
      this.canvas.addEventListener("keydown", (event) => this.onKey(event));
      this.root = root;
      this.onResize = () => {
        if (this.isFull && !this.row.firstChild && this.view) this.shade(this.query ?? this.rows - 1);
        if (!this.isFull) this.row.replaceChildren();
        this.draw();
        if (this.data && this.cells > this.asked) this.later();
      };
      window.addEventListener("resize", this.onResize);
      document.addEventListener("fullscreenchange", this.onResize); // a window that was as large before is not resized
    }

    async start() {
      try {
        this.tokens = await this.source.tokens();
        this.length = this.tokens.length;
        this.queries = this.config.queries || this.tokens;
        this.rows = this.queries.length;
        const w = this.config.window;
        const inside = w && w[1] <= this.rows && w[3] <= this.length;
        this.view = inside ? { q0: w[0], q1: w[1], k0: w[2], k1: w[3] }
                           : { q0: 0, q1: this.rows, k0: 0, k1: this.length };
        this.addSteps();
        await this.fetch();
        if (this.group[0] !== this) return; // one row for all maps of a group
        await this.shade(this.query === null || this.query === undefined ? this.rows - 1 : this.query);
      } catch (error) {
        this.fail(error);
      }
    }

    /* Of a text that the model wrote: how far it had come, token by token, from the prompt alone on. */
    addSteps() {
      const start = this.config.promptTokens, last = this.length - start;
      if (!start || last < 1 || this.steps || this.group[0] !== this) return; // one for all maps of a group
      const label = element("label", "map-steps"), said = element("output", "small");
      this.steps = element("input");
      Object.assign(this.steps, { type: "range", min: 0, max: last, step: 1 });
      this.steps.setAttribute("aria-label", "Tokens that were written");
      const say = () => {
        const at = start + this.steps.valueAsNumber;
        said.textContent = at > start ? `token ${at - start} of ${last}: ${quoted(this.tokens[at - 1])}` : `the prompt, ${start} tokens`;
      };
      const end = this.view.q0 === 0 && this.view.k0 === 0 ? this.view.q1 : this.length;
      this.steps.value = clamp(end - start, 0, last);
      this.steps.addEventListener("input", () => {
        const seen = start + this.steps.valueAsNumber;
        say();
        this.show(0, seen, 0, seen);
        this.shade(seen - 1);
      });
      say();
      label.append("Written ", this.steps, " ", said);
      this.root.querySelector(".map-bar").after(label);
    }

    fail(error) {
      this.root.replaceChildren(element("p", "problem", `The map cannot be shown: ${error.message}`));
    }

    async fetch() {
      const ticket = ++this.request;
      const { q0, q1, k0, k1 } = this.view, cells = this.asked = this.cells;
      let found;
      try {
        found = await this.source.raster({ q0, q1, k0, k1, pooling: this.pooling.value, cells });
      } catch (error) {
        if (ticket === this.request) this.fail(error);
        return;
      }
      if (ticket !== this.request) return;
      this.data = found;
      this.sums = columnMeans(found);
      this.paint();
      this.draw();
      this.describe();
      this.root.dataset.ready = `${found.level} ${found.query} ${found.key}`;
      keepLink(this, this.query);
    }

    get isFull() { return document.fullscreenElement === this.root; }

    /* Cells a side that have a pixel each. */
    get cells() {
      const shrunk = this.config.small && !this.isFull;
      return shrunk ? Math.min(CELLS, Math.ceil(this.config.small * (window.devicePixelRatio || 1))) : CELLS;
    }

    /* Room for the names of tokens of an axis, "q" or "k", where single ones are shown, and few enough. */
    isNamed(axis) {
      const most = this.config.small ? NAMED / 2 : NAMED;
      const cell = this.data && (axis === "q" ? this.data.queryCell : this.data.cell);
      return cell === 1 && this.view[`${axis}1`] - this.view[`${axis}0`] <= most;
    }

    get left() { return this.isNamed("q") ? WIDE_LEFT - (this.config.small ? 34 : 0) : LEFT; }
    get bottom() { return this.isNamed("k") ? WIDE_BOTTOM - (this.config.small ? 20 : 0) : BOTTOM; }

    /* How high each value stands on the scale, 0 to 1, and what is written beside the colours. */
    levels() {
      const { values } = this.data;
      if (this.scale.value === "log") {
        const low = Math.log10(FLOOR);
        return {
          of: (value) => (value <= FLOOR ? 0 : 1 - Math.log10(Math.min(value, 1)) / low),
          marks: [[1, "1"], [2 / 3, "0.01"], [1 / 3, "1e-4"], [0, "≤ 1e-6"]],
        };
      }
      const known = values.filter((value) => !Number.isNaN(value)).sort();
      const most = known.length ? known[known.length - 1] : 1;
      if (this.scale.value === "linear") {
        return { of: (value) => (most > 0 ? value / most : 0), marks: [1, 0.75, 0.5, 0.25, 0].map((share) => [share, format(share * most)]) };
      }
      const last = Math.max(1, known.length - 1);
      const below = (value) => { // how many are smaller
        let a = 0, b = known.length;
        while (a < b) { const middle = (a + b) >> 1; if (known[middle] < value) a = middle + 1; else b = middle; }
        return a;
      };
      return {
        of: (value) => below(value) / last,
        marks: known.length ? [1, 0.75, 0.5, 0.25, 0].map((share) => [share, format(known[Math.round(share * (known.length - 1))])]) : [],
      };
    }

    /* Colours into an image of one pixel a cell; drawing scales it. */
    paint() {
      const { rows, columns, values } = this.data;
      const image = new ImageData(columns, rows);
      const pixels = new Uint32Array(image.data.buffer);
      const levels = this.levels();
      this.marks = levels.marks;
      for (let i = 0; i < values.length; i += 1) {
        const value = values[i];
        if (Number.isNaN(value)) continue; // transparent: nothing can be there
        pixels[i] = this.palette[Math.round(clamp(levels.of(value), 0, 1) * 255)];
      }
      this.picture = document.createElement("canvas");
      this.picture.width = columns;
      this.picture.height = rows;
      this.picture.getContext("2d").putImageData(image, 0, 0);
    }

    size() {
      if (this.isFull) { // as high as the screen; what is left beside it is for the words
        const beside = window.innerWidth >= 900 ? 324 : 0, edge = 20;
        const high = window.innerHeight - this.canvas.parentElement.offsetTop - edge - TOP - this.bottom;
        const side = Math.max(160, Math.min(window.innerWidth - 2 * edge - beside - this.left - RIGHT, high));
        return { width: this.left + side + RIGHT, height: side + TOP + this.bottom, side };
      }
      const width = Math.max(this.config.small ? 200 : 280, this.canvas.parentElement.clientWidth);
      const side = Math.min(width - this.left - RIGHT, this.config.small || 620);
      return { width, height: side + TOP + this.bottom, side };
    }

    /* token position -> pixel of what was drawn last, and back */
    x(key) { return this.left + ((key - this.view.k0) / (this.view.k1 - this.view.k0)) * this.shape.side; }
    y(query) { return TOP + ((query - this.view.q0) / (this.view.q1 - this.view.q0)) * this.shape.side; }
    at(event) {
      if (!this.shape) return { inside: false }; // nothing is drawn yet
      const box = this.canvas.getBoundingClientRect();
      const { side } = this.shape;
      const px = event.clientX - box.left, py = event.clientY - box.top;
      return {
        px, py,
        key: this.view.k0 + ((px - this.left) / side) * (this.view.k1 - this.view.k0),
        query: this.view.q0 + ((py - TOP) / side) * (this.view.q1 - this.view.q0),
        inside: px >= this.left && px < this.left + side && py >= TOP && py < TOP + side,
      };
    }

    draw() {
      if (!this.data || !this.canvas.isConnected) return;
      const { width, height, side } = this.shape = this.size();
      const ratio = window.devicePixelRatio || 1;
      this.canvas.width = width * ratio;
      this.canvas.height = height * ratio;
      this.canvas.style.width = `${width}px`;
      this.canvas.style.height = `${height}px`;
      this.canvas.dataset.plot = `${this.left} ${TOP} ${side}`; // where the map begins, and its side, in pixels
      const g = this.canvas.getContext("2d");
      g.setTransform(ratio, 0, 0, ratio, 0, 0);
      g.fillStyle = "#fff";
      g.fillRect(0, 0, width, height);
      g.save();
      g.beginPath();
      g.rect(this.left, TOP, side, side);
      g.clip();
      g.fillStyle = "#f4f5f7";
      g.fillRect(this.left, TOP, side, side);
      const d = this.data;
      const x0 = this.x(d.key[0]), x1 = this.x(d.key[0] + d.columns * d.cell);
      const y0 = this.y(d.query[0]), y1 = this.y(d.query[0] + d.rows * d.queryCell);
      g.imageSmoothingEnabled = false;
      g.drawImage(this.picture, x0, y0, x1 - x0, y1 - y0);
      if (this.config.promptTokens) this.drawPromptEnd(g, side);
      if (this.query !== null && this.query !== undefined) {
        g.strokeStyle = "#c2410c";
        g.lineWidth = 1.5;
        g.strokeRect(this.left, this.y(this.query), side, Math.max(1, this.y(this.query + 1) - this.y(this.query)));
      }
      if (this.cursor && this.cursor.inside) {
        g.strokeStyle = "rgba(28,36,48,.55)";
        g.lineWidth = 1;
        g.beginPath();
        g.moveTo(this.left, this.cursor.py); g.lineTo(this.left + side, this.cursor.py);
        g.moveTo(this.cursor.px, TOP); g.lineTo(this.cursor.px, TOP + side);
        g.stroke();
      }
      g.restore();
      this.drawEdges(g, side);
      this.drawScale(g, side);
    }

    /* Where the prompt ends and what the model wrote begins. */
    drawPromptEnd(g, side) {
      const x = this.x(this.config.promptTokens), y = this.y(this.config.promptTokens);
      g.save();
      g.strokeStyle = "#c2410c";
      g.setLineDash([5, 4]);
      g.beginPath();
      g.moveTo(this.left, y); g.lineTo(this.left + side, y);
      g.moveTo(x, TOP); g.lineTo(x, TOP + side);
      g.stroke();
      g.restore();
    }

    /* Axes with token positions, and above them what each column holds. */
    drawEdges(g, side) {
      g.font = "11px Inter, 'Helvetica Neue', Arial, sans-serif";
      g.fillStyle = "#4a5462";
      g.strokeStyle = "#c9ced6";
      g.lineWidth = 1;
      g.strokeRect(this.left + .5, TOP + .5, side - 1, side - 1);
      g.textBaseline = "top";
      g.textAlign = "center";
      if (this.isNamed("k")) this.drawKeys(g, side);
      else for (const [t, text] of this.ticks("k", this.config.seconds)) g.fillText(text, this.x(t), TOP + side + 5);
      g.font = "11px Inter, 'Helvetica Neue', Arial, sans-serif";
      g.textAlign = "center";
      g.textBaseline = "top";
      g.fillText(this.config.seconds ? "key (time)" : "key", this.left + side / 2, TOP + side + this.bottom - 13);
      g.textAlign = "right";
      g.textBaseline = "middle";
      if (this.isNamed("q")) this.drawQueries(g, side);
      else for (const [t, text] of this.ticks("q", this.config.queries ? 0 : this.config.seconds)) g.fillText(text, this.left - 6, this.y(t));
      g.save();
      g.translate(12, TOP + side / 2);
      g.rotate(-Math.PI / 2);
      g.textAlign = "center";
      g.fillText("query", 0, 0);
      g.restore();
      const { sums } = this;
      const most = Math.max(...sums, 1e-12);
      g.fillStyle = "#355f8d";
      for (let c = 0; c < sums.length; c += 1) {
        const a = Math.max(this.left, this.x(this.data.key[0] + c * this.data.cell));
        const b = Math.min(this.left + side, this.x(this.data.key[0] + (c + 1) * this.data.cell));
        const h = (sums[c] / most) * (TOP - 8);
        if (b > a) g.fillRect(a, TOP - 2 - h, Math.max(b - a, .75), h);
      }
    }

    /* Places of an axis with what is written there: a position, or of a sound its time. */
    ticks(axis, seconds) {
      const first = this.view[`${axis}0`], last = this.view[`${axis}1`];
      if (!seconds) return ticks(first, last).map((t) => [t, String(t)]);
      return moments(first * seconds, last * seconds, (last - first) * seconds / 6).map(([t, text]) => [t / seconds, text]);
    }

    /* Letters for the tokens of an axis, of which each has so much room. */
    lettersFor(g, room) {
      g.font = `${clamp(Math.floor(room), 7, 12)}px Inter, 'Helvetica Neue', Arial, sans-serif`;
      g.textBaseline = "middle";
      g.textAlign = "right";
    }

    drawQueries(g, side) {
      this.lettersFor(g, side / (this.view.q1 - this.view.q0));
      for (let q = this.view.q0; q < this.view.q1; q += 1) g.fillText(brief(this.queries[q]), this.left - 5, this.y(q + 0.5), this.left - 26);
      g.font = "11px Inter, 'Helvetica Neue', Arial, sans-serif";
    }

    drawKeys(g, side) {
      this.lettersFor(g, side / (this.view.k1 - this.view.k0));
      for (let k = this.view.k0; k < this.view.k1; k += 1) {
        g.save();
        g.translate(this.x(k + 0.5), TOP + side + 5);
        g.rotate(-Math.PI / 2);
        g.fillText(brief(this.tokens[k]), 0, 0, this.bottom - 22);
        g.restore();
      }
    }

    drawScale(g, side) {
      const x = this.left + side + 16;
      for (let i = 0; i < side; i += 1) {
        g.fillStyle = css(this.palette[255 - Math.round((i / side) * 255)]);
        g.fillRect(x, TOP + i, 12, 1.5);
      }
      g.fillStyle = "#4a5462";
      g.textAlign = "left";
      g.textBaseline = "middle";
      for (const [share, text] of this.marks || []) g.fillText(text, x + 16, TOP + (1 - share) * side);
      g.textBaseline = "bottom";
      g.fillText(isExact(this.data) ? "probability" : "block mass", x - 12, TOP - 10);
    }

    describe() {
      const d = this.data;
      const size = d.cell === 1 ? "one token a cell, exact probabilities"
        : d.queryCell !== d.cell ? `a token and ${d.cell} keys a cell, ${d.pooling === "max" ? "largest" : "mean"} probability of each`
        : d.level === "blocks" ? `${d.cell} tokens a cell, block mass`
        : `${d.cell} tokens a cell, ${d.pooling === "max" ? "largest" : "mean"} ${isExact(d) ? "probability" : "block mass"} of each${d.every > 1 ? `, from one of ${d.every} queries` : ""}`;
      const first = d.variant === "sink_excluded" ? ", first token left out"
        : this.config.variant === "sink_excluded" ? "; blocks count the first token, zoom in to leave it out" : "";
      this.level.textContent = size + first;
      this.pooling.hidden = !["pooled", "pixels"].includes(d.level) || Boolean(this.config.held);
      let best = -1;
      for (let i = 0; i < d.values.length; i += 1) {
        if (!(d.values[i] <= (best < 0 ? -1 : d.values[best]))) if (!Number.isNaN(d.values[i])) best = i;
      }
      const row = Math.floor(best / d.columns), column = best % d.columns;
      const text = best < 0 ? "Nothing to see here." :
        `Queries ${d.query[0]} to ${d.query[1] - 1}, keys ${d.key[0]} to ${d.key[1] - 1}. Largest: ` +
        `${format(d.values[best])} from ${this.span("query", row)} to ${this.span("key", column)}.`;
      this.summary.textContent = text;
      this.canvas.setAttribute("aria-label", `Attention map, ${size}${first}. ${text}`);
    }

    span(axis, index) {
      const d = this.data;
      const cell = axis === "key" ? d.cell : d.queryCell;
      const first = d[axis][0] + index * cell;
      const last = Math.min(first + cell, d[axis][1]) - 1;
      const named = axis === "key" ? this.tokens : this.queries;
      return first === last ? `${axis} ${first} ${quoted(named[first])}` : `${axis === "key" ? "keys" : "queries"} ${first} to ${last}`;
    }

    onMove(event) {
      const at = this.at(event);
      if (this.drag) {
        const { q0, q1, k0, k1 } = this.drag.view, { side } = this.shape;
        this.moved = this.moved || Math.abs(at.px - this.drag.px) + Math.abs(at.py - this.drag.py) > 4;
        if (this.moved) this.shift((this.drag.px - at.px) * (k1 - k0) / side, (this.drag.py - at.py) * (q1 - q0) / side, this.drag.view);
      }
      this.point(at);
      this.hover(at);
    }

    /* The cursor, on every map of the group at the same pair of tokens. */
    point(at) {
      for (const map of this.group) {
        map.cursor = at && map.data ? { ...at, px: map.x(at.key), py: map.y(at.query) } : null;
        map.draw();
        if (map !== this) { if (map.cursor) map.hover(map.cursor); else map.tip.hidden = true; }
      }
    }

    /* The same rectangle on the other maps of the group. */
    tell() {
      for (const map of this.group) {
        if (map === this || !map.data) continue;
        map.view = { ...this.view };
        map.draw();
      }
    }

    hover(at) {
      const d = this.data;
      if (!d || !at.inside) { this.tip.hidden = true; return; }
      const row = Math.floor((at.query - d.query[0]) / d.queryCell);
      const column = Math.floor((at.key - d.key[0]) / d.cell);
      if (row < 0 || column < 0 || row >= d.rows || column >= d.columns) { this.tip.hidden = true; return; }
      const value = d.values[row * d.columns + column];
      this.tip.replaceChildren(
        element("b", "", Number.isNaN(value) ? "not visible" : format(value)),
        element("div", "", this.span("query", row)),
        element("div", "", this.span("key", column)),
      );
      this.tip.dataset.value = String(value);
      this.tip.hidden = false;
      const left = at.px + 180 > this.shape.width ? at.px - 190 : at.px + 14;
      this.tip.style.transform = `translate(${left}px, ${at.py + 14}px)`;
    }

    onDown(event) {
      const at = this.at(event);
      if (!at.inside) return;
      this.canvas.setPointerCapture(event.pointerId);
      this.active = true;
      this.drag = { px: at.px, py: at.py, view: { ...this.view } };
      this.moved = false;
    }

    onUp(event) {
      const at = this.at(event);
      if (this.drag && !this.moved && at.inside) {
        this.shade(Math.min(this.rows - 1, Math.max(0, Math.floor(at.query))));
      }
      if (this.drag && this.moved) this.later();
      this.drag = null;
    }

    onWheel(event) {
      if (!event.ctrlKey && !event.metaKey && !this.active) return; // the page scrolls
      event.preventDefault();
      const at = this.at(event);
      if (!at.inside || !this.data) return;
      this.zoom(event.deltaY > 0 ? 1.25 : 0.8, at.query, at.key);
    }

    onKey(event) {
      const v = this.view;
      if (!v) return;
      const step = (v.k1 - v.k0) / 8, down = (v.q1 - v.q0) / 8;
      const moves = { ArrowLeft: [-step, 0], ArrowRight: [step, 0], ArrowUp: [0, -down], ArrowDown: [0, down] };
      if (moves[event.key]) {
        this.shift(...moves[event.key], v);
      } else if (event.key === "+" || event.key === "=" || event.key === "-") {
        this.zoom(event.key === "-" ? 1.5 : 1 / 1.5, (v.q0 + v.q1) / 2, (v.k0 + v.k1) / 2);
      } else if (event.key === "0") {
        this.showAll();
      } else {
        return;
      }
      event.preventDefault();
      this.later();
    }

    shift(keys, queries, from) {
      const width = from.k1 - from.k0, height = from.q1 - from.q0;
      const k0 = clamp(Math.round(from.k0 + keys), 0, this.length - width);
      const q0 = clamp(Math.round(from.q0 + queries), 0, this.rows - height);
      this.view = { q0, q1: q0 + height, k0, k1: k0 + width };
      this.draw();
      this.tell();
    }

    zoom(factor, query, key) {
      const v = this.view;
      const to = (start, end, all, place) => {
        const size = clamp(Math.round((end - start) * factor), Math.min(8, all), all);
        const first = clamp(Math.round(place - ((place - start) / (end - start)) * size), 0, all - size);
        return [first, first + size];
      };
      const [k0, k1] = to(v.k0, v.k1, this.length, key), [q0, q1] = to(v.q0, v.q1, this.rows, query);
      this.view = { q0, q1, k0, k1 };
      this.draw();
      this.later();
      this.tell();
    }

    showAll() { if (this.view) this.show(0, this.rows, 0, this.length); }

    show(q0, q1, k0, k1) {
      this.view = { q0, q1, k0, k1 };
      this.draw();
      this.tell();
      this.fetchAll();
    }

    /* All maps of the group at the same time, which are one request; one without its tokens asks when it has them. */
    fetchAll() { for (const map of this.group) if (map.view) map.fetch(); }

    later() {
      window.clearTimeout(this.group.timer);
      this.group.timer = window.setTimeout(() => this.fetchAll(), 120);
    }

    /* The row of one query over the tokens before it. */
    async shade(query) {
      const strips = [this.config.strip || document.getElementById("strip"), this.isFull && this.row].filter(Boolean);
      if (!strips.length) return;
      if (this.group.length > 1) for (const strip of strips) strip.dataset.head = this.root.dataset.head;
      if (query >= this.rows) query = this.rows - 1;
      for (const map of this.group) { map.query = query; map.draw(); }
      keepLink(this, query);
      let values;
      try {
        values = await this.source.row(query);
      } catch (error) {
        for (const strip of strips) strip.replaceChildren(element("p", "small", `Rows cannot be shown: ${error.message}`));
        return;
      }
      const name = this.group.length > 1 ? `${this.config.title || this.root.dataset.head}: query` : "Query";
      const choose = (q) => this.shade(q);
      for (const strip of strips) {
        if (this.config.queries) drawTwo(strip, this.queries, this.tokens, values, query, choose, name, this.config.seconds);
        else if (this.config.seconds) drawSound(strip, this.tokens, values, query, choose, name, this.config.seconds);
        else drawStrip(strip, this.tokens, values, query, choose, name);
      }
    }

    save() {
      const link = document.createElement("a");
      link.href = this.canvas.toDataURL("image/png");
      link.download = this.fileName("png");
      link.click();
    }

    saveTable() {
      const d = this.data;
      if (!d) return;
      const lines = [`query_start,key_start,cell,${isExact(d) ? "probability" : "block_mass"}`];
      for (let r = 0; r < d.rows; r += 1) {
        for (let c = 0; c < d.columns; c += 1) {
          const value = d.values[r * d.columns + c];
          if (!Number.isNaN(value)) lines.push(`${d.query[0] + r * d.queryCell},${d.key[0] + c * d.cell},${d.cell},${value}`);
        }
      }
      this.saveText(lines.join("\n"), "csv", "text/csv");
    }

    /* The rectangle as it was asked for; what no query may see is null. */
    saveNumbers() {
      if (!this.data) return;
      const { values, ...header } = this.data;
      const rows = Array.from({ length: header.rows }, (_, r) => Array.from(
        values.subarray(r * header.columns, (r + 1) * header.columns), (value) => (Number.isNaN(value) ? null : value)));
      const { run, prompt, layer, head } = this.config;
      this.saveText(JSON.stringify({ run, prompt, layer, head, ...header, values: rows }), "json", "application/json");
    }

    /* A file is named after the run, prompt and head that it shows; a map in a notebook has no run. */
    fileName(ending) {
      const { run, prompt, layer, head } = this.config;
      const shown = [run, prompt, `L${layer}H${head}`].filter(Boolean).join("_");
      return `${shown.replace(/[^\w.-]+/g, "-")}.${ending}`;
    }

    saveText(text, ending, type) {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([text], { type }));
      link.download = this.fileName(ending);
      link.click();
      URL.revokeObjectURL(link.href);
    }

    close() {
      window.removeEventListener("resize", this.onResize);
      document.removeEventListener("fullscreenchange", this.onResize);
      this.request += 1;
    }
  }

  /* Tokens around the strongest keys of a row, each shaded by its probability. */
  function drawStrip(strip, tokens, values, query, choose, name) {
    const reach = 600;
    const first = Math.max(0, Math.min(query - reach + 1, tokens.length - reach));
    const last = Math.min(tokens.length, Math.max(first + reach, query + 1));
    const strongest = strongestOf(values);
    const head = lookedAt(name, query, tokens[query], tokens, values, strongest);
    head.append(". Click a token to make it the query.");
    const body = row("Tokens, shaded by the probability that the query gives them");
    for (let i = first; i < last; i += 1) {
      const token = shaded(i, tokens[i], values[i], i === query ? "token query" : "token");
      token.addEventListener("click", () => choose(i));
      body.append(token);
    }
    const parts = [head, body];
    if (first > 0 || last < tokens.length) {
      parts.push(element("p", "small", `Tokens ${first} to ${last - 1} of ${tokens.length} are shown.`));
    }
    strip.replaceChildren(...parts);
    strip.dataset.query = String(query);
    drawArcs(body, first, query, strongest.map((key) => ({ key, value: values[key] })));
  }

  /* Of cross-attention: the tokens of the target, of which one is chosen, and those of the source as it sees them. */
  function drawTwo(strip, queries, tokens, values, query, choose, name, seconds) {
    const reach = 600, strongest = strongestOf(values);
    const first = Math.max(0, Math.min((strongest[0] || 0) - reach / 2, tokens.length - reach));
    const last = Math.min(tokens.length, first + reach), from = Math.max(0, query - reach / 2), to = Math.min(queries.length, from + reach);
    const head = lookedAt(name, query, queries[query], tokens, values, strongest);
    const target = row("Tokens of the target; a click makes one the query"), source = row("Tokens of the source, shaded by the probability that the query gives them");
    for (let i = from; i < to; i += 1) {
      const token = element("span", i === query ? "token query" : "token", shown(queries[i]));
      token.title = `${i} ${quoted(queries[i])}`;
      token.addEventListener("click", () => choose(i));
      target.append(token);
    }
    if (!seconds) for (let i = first; i < last; i += 1) source.append(shaded(i, tokens[i], values[i], "token"));
    const below = seconds ? timeline(strip, values, seconds) : source;
    const parts = [head, element("h3", "small", "Target: click a token to make it the query"), target, element("h3", "small", seconds ? "Source, in seconds" : "Source"), below];
    if (!seconds && (first > 0 || last < tokens.length)) {
      parts.push(element("p", "small", `Keys ${first} to ${last - 1} of ${tokens.length} are shown.`));
    }
    strip.replaceChildren(...parts);
    strip.dataset.query = String(query);
  }

  /* Of a sound that looks at itself: what one moment looks at; a click makes another the query. */
  function drawSound(strip, tokens, values, query, choose, name, seconds) {
    const head = lookedAt(name, query, tokens[query], tokens, values, strongestOf(values));
    head.append(". Click a moment to make it the query.");
    strip.replaceChildren(head, timeline(strip, values, seconds, query, choose));
    strip.dataset.query = String(query);
  }

  /* Round times of a stretch of sound, at least so many seconds apart, with what is written there. */
  function moments(first, last, least) {
    const step = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 300].find((one) => one >= least) || 600, found = [];
    for (let t = Math.ceil(first / step) * step; t < last; t += step) found.push([t, `${Number(t.toFixed(1))} s`]);
    return found;
  }

  /* Probabilities along the time of a sound, with its seconds below. */
  function timeline(strip, values, seconds, query, choose) {
    const wide = Math.max(280, strip.clientWidth), high = 90, foot = 18, most = Math.max(...values.filter((value) => !Number.isNaN(value)), 1e-12);
    const make = (name, attributes, text) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", name);
      for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
      if (text) made.textContent = text;
      return made;
    };
    const svg = make("svg", { viewBox: `0 0 ${wide} ${high + foot}`, class: "timeline", role: "img",
      "aria-label": `Probability along ${(values.length * seconds).toFixed(1)} seconds, at most ${format(most)}` });
    const x = (place) => (place / values.length) * wide;
    let path = `M0,${high}`;
    values.forEach((value, place) => { const y = high - (Number.isNaN(value) ? 0 : value / most) * (high - 4); path += ` L${x(place).toFixed(1)},${y.toFixed(1)} L${x(place + 1).toFixed(1)},${y.toFixed(1)}`; });
    svg.append(make("path", { d: `${path} L${wide},${high} Z`, fill: "#355f8d" }));
    const whole = values.length * seconds;
    for (const [t, text] of moments(0, whole, (whole * 70) / wide)) {
      svg.append(make("line", { x1: x(t / seconds), x2: x(t / seconds), y1: high, y2: high + 4, stroke: "#4a5462" }));
      svg.append(make("text", { x: x(t / seconds) + 3, y: high + 14, "font-size": 12, fill: "#4a5462" }, text));
    }
    if (query !== undefined) svg.append(make("line", { x1: x(query), x2: x(query), y1: 0, y2: high, stroke: "#c2410c" }));
    if (choose) svg.addEventListener("click", (event) => {
      const box = svg.getBoundingClientRect();
      choose(clamp(Math.floor(((event.clientX - box.left) / box.width) * values.length), 0, values.length - 1));
    });
    return svg;
  }

  const strongestOf = (values) => Array.from(values.keys()).filter((i) => !Number.isNaN(values[i]))
    .sort((a, b) => values[b] - values[a]).slice(0, 5);

  /* Which query looks at which keys, in words. */
  function lookedAt(name, query, said, tokens, values, strongest) {
    const head = element("p", "small");
    head.append(`${name} ${query} `, element("b", "", quoted(said)), " looks at ");
    strongest.forEach((key, rank) => {
      head.append(rank ? ", " : "", element("b", "", quoted(tokens[key])), ` (${key}) ${format(values[key])}`);
    });
    return head;
  }

  function row(label) {
    const body = element("div", "tokens");
    body.tabIndex = 0;
    body.setAttribute("role", "group");
    body.setAttribute("aria-label", label);
    return body;
  }

  /* A token on a ground that is darker the more it holds. */
  function shaded(place, text, value, className) {
    const token = element("span", className, shown(text));
    if (value > 0) {
      const share = Math.sqrt(Math.min(1, value));
      token.style.backgroundColor = `rgba(53, 95, 141, ${share.toFixed(3)})`;
      if (share > 0.55) token.style.color = "#fff";
    }
    token.title = `${place} ${quoted(text)}: ${Number.isNaN(value) || value === undefined ? "not visible" : format(value)}`;
    return token;
  }

  /* Curves from the query to its strongest keys, over the tokens; wider is more. */
  function drawArcs(body, first, query, keys) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    svg.setAttribute("class", "arcs");
    svg.setAttribute("aria-hidden", "true");
    const box = body.getBoundingClientRect();
    const middle = (index) => {
      const token = body.querySelectorAll(".token")[index - first];
      if (!token) return null;
      const at = token.getClientRects()[0];
      return at && { x: at.left - box.left + at.width / 2, y: at.top - box.top + body.scrollTop };
    };
    const from = middle(query);
    for (const { key, value } of keys) {
      const to = middle(key);
      if (!from || !to || key === query || value < 0.01) continue;
      const lift = 10 + Math.min(26, Math.hypot(from.x - to.x, from.y - to.y) / 6);
      const path = document.createElementNS(svg.namespaceURI, "path");
      const top = Math.min(from.y, to.y) - lift;
      path.setAttribute("d", `M${from.x},${from.y} C${from.x},${top} ${to.x},${top} ${to.x},${to.y}`);
      path.setAttribute("stroke-width", String(0.8 + 3.2 * value));
      svg.append(path);
    }
    svg.setAttribute("height", String(body.scrollHeight));
    body.prepend(svg);
  }

  /* The dashboard's server, which computes each rectangle when it is asked for. */
  let lastTokens = {}; // of the prompt that was shown last: its next head has the same
  let ahead = {}; // a rectangle that was asked for while the page of its head is on the way

  function serverSource(c) {
    const url = (kind) => `/api/run/${encodeURIComponent(c.run)}/${kind}/${encodeURIComponent(c.prompt)}`;
    const place = (asked) => [`${url("raster")}/{heads}?${new URLSearchParams({ ...asked, variant: c.variant })}`, `L${c.layer}H${c.head}`];
    const row = (query) => `${url("row")}/${c.layer}/${c.head}/${query}?variant=${c.variant}`;
    return {
      async tokens() {
        const of = `${url("tokens")} ${c.made}`;
        if (lastTokens.of === of) return lastTokens.tokens;
        const tokens = await together(url("tokens"), "", async (answer, all) => {
          const read = await answer.json();
          return all.map(() => read);
        });
        lastTokens = { of, tokens };
        return tokens;
      },
      raster(asked) {
        const [address, head] = place(asked), { of, found } = ahead;
        ahead = {};
        return of === address + head ? found : together(address, head, rasters);
      },
      expect(asked) {
        const [address, head] = place(asked), found = together(address, head, rasters);
        found.catch(() => {}); // the map that takes it says so
        ahead = { of: address + head, found };
      },
      row: async (query) => new Float32Array(await (await ask(row(query))).arrayBuffer()),
    };
  }

  async function ask(address) {
    const answer = await fetch(address);
    if (!answer.ok) throw new Error(await answer.text());
    return answer;
  }

  /* What several maps ask for at the same time, in one request; `read` says what each of them gets. */
  const waiting = new Map();
  function together(address, head, read) {
    return new Promise((resolve, reject) => {
      const mine = { head, resolve, reject };
      if (waiting.has(address)) { waiting.get(address).push(mine); return; }
      const all = [mine];
      waiting.set(address, all);
      window.setTimeout(async () => {
        waiting.delete(address);
        try {
          const found = await read(await ask(address.replace("{heads}", all.map((one) => one.head).join(","))), all);
          all.forEach((one, at) => one.resolve(found[at]));
        } catch (error) {
          for (const one of all) one.reject(error);
        }
      }, 0);
    });
  }

  /* The rectangles of an answer, one head after the other. */
  async function rasters(answer) {
    const numbers = await answer.arrayBuffer();
    let start = 0;
    return JSON.parse(answer.headers.get("X-Raster")).map((header) => {
      const values = new Float32Array(numbers, start, header.rows * header.columns);
      start += values.byteLength;
      return { ...header, values };
    });
  }

  /* A file of its own: one raster of the whole prompt, cut here. */
  function heldSource(held) {
    const bytes = Uint8Array.from(atob(held.values), (sign) => sign.charCodeAt(0));
    const values = new Float32Array(bytes.buffer), { rows, columns, cell, queryCell } = held.header;
    const count = (held.config.queries || held.tokens).length;
    return {
      tokens: async () => held.tokens,
      async raster({ q0, q1, k0, k1 }) {
        const r0 = Math.floor(q0 / queryCell), r1 = Math.min(rows, Math.ceil(q1 / queryCell));
        const c0 = Math.floor(k0 / cell), c1 = Math.min(columns, Math.ceil(k1 / cell));
        const cut = new Float32Array((r1 - r0) * (c1 - c0));
        for (let r = r0; r < r1; r += 1) cut.set(values.subarray(r * columns + c0, r * columns + c1), (r - r0) * (c1 - c0));
        const length = held.tokens.length;
        return {
          ...held.header, values: cut, rows: r1 - r0, columns: c1 - c0,
          query: [r0 * queryCell, Math.min(r1 * queryCell, count)], key: [c0 * cell, Math.min(c1 * cell, length)],
        };
      },
      async row(query) {
        if (held.header.level !== "tokens") throw new Error("this file holds blocks of tokens, not single ones");
        return values.subarray(query * columns, (query + 1) * columns);
      },
    };
  }

  function keepLink(map, query) {
    const { config, view, rows, length } = map;
    const all = view.q0 === 0 && view.k0 === 0 && view.q1 === rows && view.k1 === length;
    if (config.source || map.group[0] !== map) return; // not the dashboard's page, or told by the first of a group
    if (config.wall) {
      const search = new URLSearchParams(window.location.search);
      if (config.wall !== wall || !window.location.pathname.endsWith("/maps")) return;
      for (const name of ["q0", "q1", "k0", "k1"]) if (all) search.delete(name); else search.set(name, view[name]);
      if (query !== null && query !== undefined) search.set("query", query);
      keep(search);
      return;
    }
    const search = new URLSearchParams({ prompt: config.prompt });
    if (!all) for (const name of ["q0", "q1", "k0", "k1"]) search.set(name, view[name]);
    if (query !== null && query !== undefined) search.set("query", query);
    const before = new URLSearchParams(window.location.search);
    const left = !window.location.pathname.endsWith(`/head/${config.layer}/${config.head}`) ||
                 ![null, config.prompt].includes(before.get("prompt"));
    if (left) return; // the address is already that of another map, which is still being drawn
    for (const name of ["pin", "variant", "by"]) if (before.get(name)) search.set(name, before.get(name));
    keep(search);
  }

  function keep(search) {
    if (`?${search}` === window.location.search) return;
    window.history.replaceState(window.history.state, "", `${window.location.pathname}?${search}`);
  }

  function columnMeans(d) {
    const sums = new Float64Array(d.columns), counts = new Float64Array(d.columns);
    for (let r = 0; r < d.rows; r += 1) {
      for (let c = 0; c < d.columns; c += 1) {
        const value = d.values[r * d.columns + c];
        if (!Number.isNaN(value)) { sums[c] += value; counts[c] += 1; }
      }
    }
    return Array.from(sums, (sum, c) => (counts[c] ? sum / counts[c] : 0));
  }

  function ticks(first, last) {
    const rough = (last - first) / 6;
    const power = 10 ** Math.floor(Math.log10(Math.max(rough, 1)));
    const step = Math.max(1, [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) || 10 * power);
    const found = [];
    for (let t = Math.ceil(first / step) * step; t < last; t += step) found.push(t);
    return found;
  }

  function paletteOf(colors) {
    const table = new Uint32Array(256);
    for (let i = 0; i < 256; i += 1) {
      const place = (i / 255) * (colors.length - 1);
      const a = rgb(colors[Math.floor(place)]), b = rgb(colors[Math.min(colors.length - 1, Math.floor(place) + 1)]);
      const mix = a.map((v, c) => Math.round(v + (b[c] - v) * (place - Math.floor(place))));
      table[i] = (255 << 24) | (mix[2] << 16) | (mix[1] << 8) | mix[0];
    }
    return table;
  }

  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const css = (pixel) => `rgb(${pixel & 255},${(pixel >> 8) & 255},${(pixel >> 16) & 255})`;
  const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
  const format = (value) => (value === 0 ? "0" : value >= 0.001 ? value.toPrecision(4) : value.toExponential(3));
  const shown = (token) => token.replace(/\n/g, "⏎").replace(/\t/g, "⇥") || "∅";
  const brief = (token) => { const text = token === undefined ? "" : shown(token); return text.length > 16 ? `${text.slice(0, 15)}…` : text; };
  const isExact = (d) => d.level === "tokens" || d.level === "pixels";
  const quoted = (token) => (token === undefined ? "" : `“${shown(token)}”`);

  function element(tag, className, text) {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function button(text, action) {
    const made = element("button", "quiet", text);
    made.type = "button";
    made.addEventListener("click", action);
    return made;
  }

  /* Several maps of one prompt with one zoom, one cursor and one query. */
  function link(maps) {
    for (const map of maps) map.group = maps;
    return maps;
  }

  let current = null, wall = null;
  window.lensBlockMap = {
    paletteOf,
    heldSource,
    link,
    /* The maps of a page that holds its numbers: one, or several that are linked. */
    open(held, roots) {
      const maps = held.maps.map((one, at) => new BlockMap(roots[at], {
        ...one.config, held: true, small: held.maps.length > 1 ? held.side : 0,
        source: heldSource({ ...one, tokens: held.tokens }),
      }));
      return link(maps);
    },
    make: (root, config) => new BlockMap(root, config),
    mount(root, config) {
      if (current) current.close();
      current = new BlockMap(root, config);
      return current;
    },
    /* Several heads on the page of maps, with one zoom, one cursor and one query. */
    mountWall(root, config) {
      for (const map of (wall && wall.maps) || []) map.close();
      const mine = { maps: [] };
      wall = mine;
      root.replaceChildren();
      mine.maps = link(config.maps.map((one) => {
        const place = element("div", "map");
        root.append(place);
        return new BlockMap(place, { ...one, wall: mine, small: config.side });
      }));
      return mine.maps;
    },
    /* What the map of another head will ask for, while its page is made: it has the zoom of this one. */
    expect(layer, head) {
      if (!current || !current.view || current.config.source) return;
      serverSource({ ...current.config, layer, head }).expect({ ...current.view, pooling: "max", cells: current.cells });
    },
    get current() { return current; },
  };
})();
