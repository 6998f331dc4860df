/* The page of pictures: where a patch looks, and who looks at it; the mouse or the arrow keys choose the patch. */
window.lensVision = (() => {
  const ALPHA = 0.65;

  function mount(root, config) {
    if (root.dataset.key === JSON.stringify(config)) return;
    root.dataset.key = JSON.stringify(config);
    root.removeAttribute("data-ready");
    const canvases = [...root.querySelectorAll("canvas")], said = root.querySelector(".look-said");
    const picture = new Image();
    let patch = config.patch, last = null, asked = 0;
    picture.onload = () => look(patch);
    picture.src = config.picture;

    function place(canvas) {
      const [height, width] = config.size;
      canvas.width = Math.min(640, Math.max(320, width));
      canvas.height = Math.round(canvas.width * height / width);
      const scale = canvas.width / width, [left, top, right, bottom] = config.box.map(end => end * scale);
      return { left, top, across: (right - left) / config.width, down: (bottom - top) / config.height };
    }

    function color(share) {
      const at = Math.round(Math.min(1, Math.max(0, share)) * (config.palette.length - 1));
      return config.palette[at];
    }

    function draw(values, paths) {
      const count = config.height * config.width;
      canvases.forEach((canvas, which) => {
        const at = place(canvas), pen = canvas.getContext("2d"), own = values.subarray(which * count, (which + 1) * count);
        let most = 0;
        for (const value of own) if (value > most) most = value;
        pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
        pen.globalAlpha = ALPHA;
        for (let cell = 0; cell < count; cell++) {
          if (Number.isNaN(own[cell])) continue;
          pen.fillStyle = color(own[cell] / (most || 1));
          const x = at.left + (cell % config.width) * at.across, y = at.top + Math.floor(cell / config.width) * at.down;
          pen.fillRect(x, y, at.across + 0.5, at.down + 0.5);
        }
        pen.globalAlpha = 1;
        const scale = canvas.width / config.size[1];
        pen.strokeStyle = "#ffffff";
        pen.lineWidth = 3;
        for (const [left, top, right, bottom] of config.boxes)
          pen.strokeRect(left * scale, top * scale, (right - left) * scale, (bottom - top) * scale);
        if (config.path) walk(pen, paths[which].map(([x, y]) => [x * scale, y * scale]));
        pen.strokeStyle = "#c2410c";
        pen.lineWidth = 3;
        pen.strokeRect(at.left + patch[1] * at.across, at.top + patch[0] * at.down, at.across, at.down);
      });
      const best = canvases.map((canvas, which) => {
        let place = 0;
        for (let cell = 0; cell < count; cell++) if (values[which * count + cell] > values[which * count + place]) place = cell;
        return `(${Math.floor(place / config.width)}, ${place % config.width}) ${values[which * count + place].toFixed(4)}`;
      });
      const words = config.way === "key" ? "Most looks at it" : "It looks most";
      said.textContent = config.maps.length > 1
        ? `Patch (${patch[0]}, ${patch[1]}). ${words}: ${config.maps.map((name, which) => `${name} ${best[which]}`).join("; ")}.`
        : `Patch (${patch[0]}, ${patch[1]}) looks most at ${best[0]}; most looks at it ${best[1]}.`;
      root.dataset.patch = patch.join(",");
      root.setAttribute("data-ready", "");
    }

    function walk(pen, stops) {
      pen.strokeStyle = pen.fillStyle = "#1d4ed8";
      pen.lineWidth = 2;
      pen.beginPath();
      for (const [x, y] of stops) pen.lineTo(x, y);
      pen.stroke();
      pen.font = "bold 12px sans-serif";
      pen.textAlign = "center";
      pen.textBaseline = "middle";
      [...stops.entries()].reverse().forEach(([place, [x, y]]) => {
        pen.fillStyle = "#1d4ed8";
        pen.beginPath();
        pen.arc(x, y, 9, 0, 2 * Math.PI);
        pen.fill();
        pen.fillStyle = "#ffffff";
        pen.fillText(place + 1, x, y);
      });
    }

    async function look(next) {
      patch = next;
      const number = ++asked;
      const answer = await fetch(`${config.look}/${patch[0]}/${patch[1]}?${config.query}`);
      if (number !== asked || !root.isConnected) return;
      if (!answer.ok) { said.textContent = await answer.text(); root.setAttribute("data-ready", ""); return; }
      const { paths } = JSON.parse(answer.headers.get("X-Raster"));
      draw(new Float32Array(await answer.arrayBuffer()), paths);
    }

    function under(canvas, event) {
      const box = canvas.getBoundingClientRect(), at = place_of(canvas);
      const x = (event.clientX - box.left) * canvas.width / box.width, y = (event.clientY - box.top) * canvas.height / box.height;
      const row = Math.floor((y - at.top) / at.down), column = Math.floor((x - at.left) / at.across);
      return row >= 0 && row < config.height && column >= 0 && column < config.width ? [row, column] : null;
    }

    function place_of(canvas) {
      const scale = canvas.width / config.size[1], [left, top, right, bottom] = config.box.map(end => end * scale);
      return { left, top, across: (right - left) / config.width, down: (bottom - top) / config.height };
    }

    for (const canvas of canvases) {
      canvas.onmousemove = event => {
        const next = under(canvas, event);
        if (next && String(next) !== String(last)) { last = next; look(next); }
      };
      canvas.onkeydown = event => {
        const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
        if (!step) return;
        event.preventDefault();
        const next = [patch[0] + step[0], patch[1] + step[1]];
        if (next[0] >= 0 && next[0] < config.height && next[1] >= 0 && next[1] < config.width) look(next);
      };
    }
  }

  return { mount };
})();
