/* Every head of a model as a small picture on one canvas: float32 block mass, coloured by the logarithm. */
(function () {
  "use strict";

  const FLOOR = 1e-6;
  const LEFT = 34, TOP = 22, GAP = 3;

  class Atlas {
    constructor(root, config) {
      this.config = config;
      this.palette = window.lensBlockMap.paletteOf(config.palette);
      this.chosen = null;
      this.root = root;
      root.replaceChildren();
      delete root.dataset.ready;
      this.canvas = document.createElement("canvas");
      this.canvas.tabIndex = 0;
      this.canvas.setAttribute("role", "img");
      this.canvas.setAttribute("aria-label", "Attention maps, being loaded");
      this.summary = document.createElement("p");
      this.summary.className = "small";
      this.summary.setAttribute("aria-live", "polite");
      this.summary.textContent = "Loading the picture of every head…";
      root.append(this.canvas, this.summary);
      this.canvas.addEventListener("pointermove", (event) => this.choose(this.at(event)));
      this.canvas.addEventListener("pointerleave", () => this.choose(null));
      this.canvas.addEventListener("click", (event) => this.open(this.at(event)));
      this.canvas.addEventListener("keydown", (event) => this.onKey(event));
      window.addEventListener("resize", () => this.draw());
      this.start();
    }

    async start() {
      const { run, prompt, variant } = this.config;
      const answer = await fetch(`/api/run/${encodeURIComponent(run)}/atlas/${encodeURIComponent(prompt)}?variant=${variant}`);
      if (!answer.ok) {
        const problem = document.createElement("p");
        problem.className = "problem";
        problem.textContent = `The atlas cannot be shown: ${await answer.text()}`;
        this.root.replaceChildren(problem);
        return;
      }
      this.shape = JSON.parse(answer.headers.get("X-Raster"));
      this.paint(new Float32Array(await answer.arrayBuffer()));
      this.draw();
      this.describe();
      this.root.dataset.ready = `${this.shape.layers} ${this.shape.heads}`;
    }

    /* All pictures side by side in one image of one pixel a cell. */
    paint(values) {
      const { layers, heads, rows, columns } = this.shape;
      const image = new ImageData(heads * columns, layers * rows);
      const pixels = new Uint32Array(image.data.buffer);
      const low = Math.log10(FLOOR);
      let i = 0;
      for (let layer = 0; layer < layers; layer += 1) {
        for (let head = 0; head < heads; head += 1) {
          for (let row = 0; row < rows; row += 1) {
            let at = (layer * rows + row) * heads * columns + head * columns;
            for (let column = 0; column < columns; column += 1, i += 1, at += 1) {
              const value = values[i];
              if (Number.isNaN(value)) continue;
              const share = value <= FLOOR ? 0 : 1 - Math.log10(Math.min(value, 1)) / low;
              pixels[at] = this.palette[Math.round(share * 255)];
            }
          }
        }
      }
      this.picture = document.createElement("canvas");
      this.picture.width = image.width;
      this.picture.height = image.height;
      this.picture.getContext("2d").putImageData(image, 0, 0);
    }

    side() {
      const width = Math.max(280, this.root.clientWidth) - LEFT;
      return Math.max(10, Math.min(150, width / this.shape.heads - GAP));
    }

    draw() {
      if (!this.picture || !this.canvas.isConnected) return;
      const { layers, heads, rows, columns } = this.shape;
      const side = this.side(), pitch = side + GAP;
      const ratio = window.devicePixelRatio || 1;
      const width = LEFT + heads * pitch, height = TOP + layers * pitch;
      this.canvas.width = width * ratio;
      this.canvas.height = height * ratio;
      this.canvas.style.width = `${width}px`;
      this.canvas.style.height = `${height}px`;
      const g = this.canvas.getContext("2d");
      g.setTransform(ratio, 0, 0, ratio, 0, 0);
      g.fillStyle = "#fff";
      g.fillRect(0, 0, width, height);
      g.imageSmoothingEnabled = columns > side * ratio;
      g.font = "11px Inter, 'Helvetica Neue', Arial, sans-serif";
      g.textBaseline = "middle";
      for (let layer = 0; layer < layers; layer += 1) {
        const y = TOP + layer * pitch;
        g.fillStyle = "#4a5462";
        g.textAlign = "right";
        g.fillText(String(this.shape.numbers[layer]), LEFT - 6, y + side / 2);
        for (let head = 0; head < heads; head += 1) {
          const x = LEFT + head * pitch;
          g.fillStyle = "#f4f5f7";
          g.fillRect(x, y, side, side);
          g.drawImage(this.picture, head * columns, layer * rows, columns, rows, x, y, side, side);
        }
      }
      g.fillStyle = "#4a5462";
      g.textAlign = "center";
      const every = Math.ceil(22 / pitch);
      for (let head = 0; head < heads; head += every) g.fillText(String(head), LEFT + head * pitch + side / 2, TOP / 2);
      if (this.chosen) {
        g.strokeStyle = "#c2410c";
        g.lineWidth = 2;
        g.strokeRect(LEFT + this.chosen.head * pitch - 1, TOP + this.chosen.layer * pitch - 1, side + 2, side + 2);
      }
    }

    at(event) {
      if (!this.shape) return null;
      const box = this.canvas.getBoundingClientRect();
      const pitch = this.side() + GAP;
      const head = Math.floor((event.clientX - box.left - LEFT) / pitch);
      const layer = Math.floor((event.clientY - box.top - TOP) / pitch);
      const inside = head >= 0 && layer >= 0 && head < this.shape.heads && layer < this.shape.layers;
      return inside ? { layer, head } : null;
    }

    /* A head by the model's own number of its layer; `layer` is a row of the picture. */
    name(head) {
      return `L${this.shape.numbers[head.layer]}H${head.head}`;
    }

    choose(head) {
      const name = (one) => (one ? this.name(one) : "");
      if (name(head) === name(this.chosen)) return;
      this.chosen = head;
      this.canvas.style.cursor = head ? "pointer" : "default";
      this.draw();
      this.describe();
    }

    describe() {
      const { layers, heads } = this.shape;
      const all = `${layers} layers of ${heads} heads.`;
      const text = this.chosen ? this.name(this.chosen) : all;
      this.summary.textContent = text;
      this.canvas.setAttribute("aria-label", `Attention maps of ${all} ${this.chosen ? text : ""}`);
    }

    open(head) {
      if (!head) return;
      const { run, prompt, variant } = this.config;
      const search = new URLSearchParams({ prompt });
      if (variant !== "raw") search.set("variant", variant);
      const link = `/run/${encodeURIComponent(run)}/head/${this.shape.numbers[head.layer]}/${head.head}?${search}`;
      window.lensGo(link);
    }

    onKey(event) {
      if (!this.shape) return;
      const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
      if (step) {
        const from = this.chosen || { layer: 0, head: -step[1] };
        const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));
        this.choose({ layer: clamp(from.layer + step[0], this.shape.layers), head: clamp(from.head + step[1], this.shape.heads) });
      } else if (event.key === "Enter") {
        this.open(this.chosen);
      } else {
        return;
      }
      event.preventDefault();
    }
  }

  window.lensAtlas = { mount: (root, config) => new Atlas(root, config) };
})();
