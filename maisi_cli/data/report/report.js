// The viewer of a report: planes on canvases of our own, and the 3D view where NiiVue and WebGL 2 are there.
(() => {
  "use strict";

  const find = (id) => document.getElementById(id);
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];
  const run = JSON.parse(find("run").textContent);

  // How a plane is cut: the axis across it, the axes of its columns and rows, and its sides. Columns and rows run against
  // the axes (RAS+): the patient's right is on the viewer's left, anterior and superior are up.
  const PLANES = {
    axial: { across: 2, columns: 0, rows: 1, sides: ["R", "L", "A", "P"] },
    coronal: { across: 1, columns: 0, rows: 2, sides: ["R", "L", "S", "I"] },
    sagittal: { across: 0, columns: 1, rows: 2, sides: ["A", "P", "S", "I"] },
  };
  const BODY = 200;
  const WHEEL_STEP = 50; // of deltaY: less than one notch of a mouse, several movements of a touchpad
  const KEEP = 4; // unpacked samples
  const BONES = [150, 500], SKIN = [-600, 100]; // HU at which the 3D view begins and ends to show
  const CROSS = "rgba(99, 188, 217, 0.55)";

  const state = { number: -1, sample: null, volume: null, at: [0, 0, 0], low: 0, high: 1, opacity: 0.45, overlay: true, only: 0 };
  const views = {};
  const unpacked = new Map();

  // --- the page ---------------------------------------------------------------------------------------------

  function element(name, attributes = {}, ...content) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...content);
    return made;
  }

  function segments(box, group, names, chosen, choose) {
    all("label", box).forEach((label) => label.remove());
    names.forEach((name) => {
      const input = element("input", { type: "radio", name: group, value: name });
      input.checked = name === chosen;
      input.addEventListener("change", () => choose(name));
      box.append(element("label", {}, input, element("span", {}, name)));
    });
  }

  function remembered(key, value) {
    try {
      if (value === undefined) return localStorage.getItem(key);
      localStorage.setItem(key, value);
    } catch { /* no storage for files in this browser */ }
    return null;
  }

  function theme(name) {
    if (name === "light" || name === "dark") document.documentElement.dataset.theme = name;
    else delete document.documentElement.dataset.theme;
  }

  function startTheme() {
    const known = remembered("maisi-report-theme") || "auto";
    theme(known);
    all("#theme input").forEach((input) => {
      input.checked = input.value === known;
      input.addEventListener("change", () => { theme(input.value); remembered("maisi-report-theme", input.value); });
    });
  }

  // --- volumes ----------------------------------------------------------------------------------------------

  async function unpack(id, format) {
    const text = atob(find(id).textContent);
    const bytes = new Uint8Array(text.length);
    for (let k = 0; k < text.length; k++) bytes[k] = text.charCodeAt(k);
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream(format));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  async function load(number) {
    if (!unpacked.has(number)) {
      const volume = { image: null, label: null };
      for (const kind of run.samples[number].kinds) {
        const bytes = await unpack(`${kind}-${number}`, "deflate");
        if (kind === "label") volume.label = bytes;
        else {
          const n = bytes.length / 2, values = new Int16Array(n);
          for (let k = 0; k < n; k++) values[k] = bytes[k] | (bytes[n + k] << 8);
          volume.image = values;
        }
      }
      unpacked.set(number, volume);
      if (unpacked.size > KEEP) unpacked.delete(unpacked.keys().next().value);
    }
    return unpacked.get(number);
  }

  const index = (at) => at[0] + state.sample.size[0] * (at[1] + state.sample.size[1] * at[2]);

  // --- planes -----------------------------------------------------------------------------------------------

  function startPlane(figure) {
    const name = figure.dataset.plane, title = name[0].toUpperCase() + name.slice(1);
    const canvas = element("canvas", { tabindex: "0", role: "slider", "aria-label": `${title} plane`, "aria-orientation": "vertical" });
    const slider = element("input", { type: "range", min: "1", step: "1", "aria-label": `${title} slice` });
    const count = element("output");
    figure.append(element("div", { class: "view" }, canvas), element("figcaption", {}, element("span", {}, title), slider, count));
    const view = { name, figure, canvas, slider, count, grey: element("canvas"), tint: element("canvas"), fit: null, wheel: 0, dirty: false };
    views[name] = view;

    canvas.addEventListener("wheel", (event) => {
      if (event.ctrlKey || !state.volume) return;
      event.preventDefault();
      view.wheel += event.deltaY * (event.deltaMode === 1 ? WHEEL_STEP : 1);
      const steps = Math.trunc(view.wheel / WHEEL_STEP);
      if (!steps) return;
      view.wheel = event.deltaMode === 0 && Math.abs(event.deltaY) < WHEEL_STEP ? view.wheel - steps * WHEEL_STEP : 0;
      scroll(name, -Math.sign(steps));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const last = state.sample ? state.sample.size[PLANES[name].across] : 0;
      const step = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 10, PageDown: -10, Home: -last, End: last }[event.key];
      if (step === undefined || event.ctrlKey || event.metaKey || event.altKey) return;
      event.preventDefault();
      scroll(name, step);
    });
    slider.addEventListener("input", () => move(PLANES[name].across, Number(slider.value) - 1));
    canvas.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      canvas.focus({ preventScroll: true });
      canvas.setPointerCapture(event.pointerId);
      cross(view, event);
    });
    canvas.addEventListener("pointermove", (event) => {
      if (event.buttons & 1) cross(view, event);
      else tell(voxel(view, event));
    });
    canvas.addEventListener("pointerleave", () => tell(state.at));
    new ResizeObserver(() => refresh(view)).observe(canvas);
  }

  function scroll(name, step) {
    const { across } = PLANES[name];
    move(across, state.at[across] + step);
  }

  function move(axis, place) {
    if (!state.volume) return;
    state.at[axis] = Math.min(state.sample.size[axis] - 1, Math.max(0, place));
    update();
  }

  // The voxel under the pointer, null beside the picture.
  function voxel(view, event) {
    if (!view.fit || !state.volume) return null;
    const plane = PLANES[view.name], { size } = state.sample, box = view.canvas.getBoundingClientRect();
    const ratio = view.canvas.width / box.width;
    const column = Math.floor((((event.clientX - box.left) * ratio - view.fit.x) / view.fit.width) * size[plane.columns]);
    const row = Math.floor((((event.clientY - box.top) * ratio - view.fit.y) / view.fit.height) * size[plane.rows]);
    if (column < 0 || row < 0 || column >= size[plane.columns] || row >= size[plane.rows]) return null;
    const at = [...state.at];
    at[plane.columns] = size[plane.columns] - 1 - column;
    at[plane.rows] = size[plane.rows] - 1 - row;
    return at;
  }

  function cross(view, event) {
    const at = voxel(view, event);
    if (!at) return;
    state.at = at;
    update();
  }

  function refresh(view) {
    if (view.dirty) return;
    view.dirty = true;
    requestAnimationFrame(() => { view.dirty = false; draw(view); });
  }

  function update() {
    Object.values(views).forEach((view) => {
      const { across } = PLANES[view.name], n = state.sample.size[across], number = state.at[across] + 1;
      view.slider.max = n;
      view.slider.value = number;
      view.count.textContent = `${number} of ${n}`;
      view.figure.dataset.slice = number;
      for (const [key, value] of [["valuemin", 1], ["valuemax", n], ["valuenow", number], ["valuetext", `slice ${number} of ${n}`]])
        view.canvas.setAttribute(`aria-${key}`, value);
      refresh(view);
    });
    tell(state.at);
  }

  function draw(view) {
    if (!state.volume) return;
    const plane = PLANES[view.name], { size, spacing } = state.sample, { image, label } = state.volume;
    const width = size[plane.columns], height = size[plane.rows], stride = [1, size[0], size[0] * size[1]];
    const start = state.at[plane.across] * stride[plane.across];
    const across = stride[plane.columns], down = stride[plane.rows];
    const grey = new ImageData(width, height), scale = 255 / (state.high - state.low);
    const cut = label && state.overlay ? new Uint8Array(width * height) : null;
    for (let row = 0, pixel = 0; row < height; row++) {
      let voxel = start + (height - 1 - row) * down + (width - 1) * across;
      for (let column = 0; column < width; column++, pixel++, voxel -= across) {
        const level = image ? (image[voxel] - state.low) * scale : 0;
        grey.data[4 * pixel] = grey.data[4 * pixel + 1] = grey.data[4 * pixel + 2] = level;
        grey.data[4 * pixel + 3] = 255;
        if (cut) cut[pixel] = label[voxel];
      }
    }
    const { canvas } = view;
    const ratio = window.devicePixelRatio || 1, pen = canvas.getContext("2d");
    canvas.width = Math.max(1, Math.round(canvas.clientWidth * ratio));
    canvas.height = Math.max(1, Math.round(canvas.clientHeight * ratio));
    const mm = [width * spacing[plane.columns], height * spacing[plane.rows]];
    const zoom = Math.min((canvas.width - 8 * ratio) / mm[0], (canvas.height - 8 * ratio) / mm[1]);
    const fit = view.fit = { width: Math.max(1, Math.round(mm[0] * zoom)), height: Math.max(1, Math.round(mm[1] * zoom)) };
    fit.x = Math.floor((canvas.width - fit.width) / 2);
    fit.y = Math.floor((canvas.height - fit.height) / 2);
    pen.imageSmoothingEnabled = true;
    pen.imageSmoothingQuality = "high";
    const place = (sheet, pixels) => {
      sheet.width = pixels.width; sheet.height = pixels.height;
      sheet.getContext("2d").putImageData(pixels, 0, 0);
      pen.drawImage(sheet, fit.x, fit.y, fit.width, fit.height);
    };
    place(view.grey, grey);
    if (cut) place(view.tint, tinted(cut, width, height, fit.width, fit.height, !image));
    annotate(pen, view, plane, zoom, ratio);
  }

  // The colours of a slice of labels on the pixels of the screen: each takes the label that weighs most among the four
  // voxels around it, so borders run smoothly and are one pixel thin.
  function tinted(cut, width, height, wide, high, alone) {
    const pixels = new ImageData(wide, high), ids = new Uint8Array(pixels.width * pixels.height);
    for (let y = 0, k = 0; y < pixels.height; y++) {
      const row = Math.min(height - 1, Math.max(0, ((y + 0.5) * height) / pixels.height - 0.5));
      const top = Math.floor(row), bottom = Math.min(height - 1, top + 1), v = row - top;
      for (let x = 0; x < pixels.width; x++, k++) {
        const column = Math.min(width - 1, Math.max(0, ((x + 0.5) * width) / pixels.width - 0.5));
        const left = Math.floor(column), right = Math.min(width - 1, left + 1), u = column - left;
        const a = cut[top * width + left], b = cut[top * width + right], c = cut[bottom * width + left], d = cut[bottom * width + right];
        if (a === b && a === c && a === d) { ids[k] = a; continue; }
        const wa = (1 - u) * (1 - v), wb = u * (1 - v), wc = (1 - u) * v, wd = u * v;
        const fa = wa + (b === a ? wb : 0) + (c === a ? wc : 0) + (d === a ? wd : 0), fb = wb + (c === b ? wc : 0) + (d === b ? wd : 0);
        const fc = wc + (d === c ? wd : 0);
        ids[k] = fa >= fb && fa >= fc && fa >= wd ? a : fb >= fc && fb >= wd ? b : fc >= wd ? c : d;
      }
    }
    const table = [0, 1].map((edge) => Float32Array.from({ length: 256 }, (_, id) => (id ? 255 * opacityOf(id, edge === 1, alone) : 0)));
    for (let y = 0, k = 0; y < pixels.height; y++) {
      for (let x = 0; x < pixels.width; x++, k++) {
        const id = ids[k];
        if (!id) continue;
        const edge = (x > 0 && ids[k - 1] !== id) || (y > 0 && ids[k - pixels.width] !== id)
          || (x < pixels.width - 1 && !ids[k + 1]) || (y < pixels.height - 1 && !ids[k + pixels.width]);
        const known = run.labels[id], colour = id === BODY ? [150, 160, 176] : known ? known[1] : [200, 200, 200];
        pixels.data[4 * k] = colour[0]; pixels.data[4 * k + 1] = colour[1]; pixels.data[4 * k + 2] = colour[2];
        pixels.data[4 * k + 3] = table[edge ? 1 : 0][id];
      }
    }
    return pixels;
  }

  function opacityOf(id, edge, alone) {
    if (id === BODY && state.only !== BODY) return edge ? 0.5 * state.opacity : alone ? 0.16 : 0;
    const full = alone ? Math.max(state.opacity, 0.85) : state.opacity;
    const shown = edge ? Math.min(1, 1.9 * full) : full;
    if (!state.only) return shown;
    return id === state.only ? Math.min(1, shown + 0.2) : 0.15 * shown;
  }

  function annotate(pen, view, plane, zoom, ratio) {
    const { size } = state.sample, { fit, canvas } = view;
    const x = fit.x + ((size[plane.columns] - 0.5 - state.at[plane.columns]) / size[plane.columns]) * fit.width;
    const y = fit.y + ((size[plane.rows] - 0.5 - state.at[plane.rows]) / size[plane.rows]) * fit.height;
    const gap = 9 * ratio;
    pen.strokeStyle = CROSS;
    pen.lineWidth = ratio;
    pen.beginPath();
    for (const [from, to] of [[fit.x, x - gap], [x + gap, fit.x + fit.width]]) if (to > from) { pen.moveTo(from, y); pen.lineTo(to, y); }
    for (const [from, to] of [[fit.y, y - gap], [y + gap, fit.y + fit.height]]) if (to > from) { pen.moveTo(x, from); pen.lineTo(x, to); }
    pen.stroke();

    pen.font = `${12 * ratio}px system-ui, sans-serif`;
    const write = (text, left, top, align, base) => {
      pen.textAlign = align; pen.textBaseline = base;
      pen.lineWidth = 3 * ratio; pen.strokeStyle = "rgba(0, 0, 0, 0.8)"; pen.strokeText(text, left, top);
      pen.fillStyle = "#dfe5ea"; pen.fillText(text, left, top);
    };
    const edge = 8 * ratio, [left, right, top, bottom] = plane.sides;
    write(left, edge, canvas.height / 2, "left", "middle");
    write(right, canvas.width - edge, canvas.height / 2, "right", "middle");
    write(top, canvas.width / 2, edge, "center", "top");
    write(bottom, canvas.width / 2, canvas.height - edge, "center", "bottom");

    const length = [5, 10, 20, 50, 100, 200].filter((mm) => mm * zoom < canvas.width / 4).pop();
    if (!length) return;
    const end = canvas.width - edge - 4 * ratio, line = canvas.height - edge - 4 * ratio;
    pen.fillStyle = "rgba(0, 0, 0, 0.8)"; pen.fillRect(end - length * zoom - ratio, line - 2 * ratio, length * zoom + 2 * ratio, 4 * ratio);
    pen.fillStyle = "#dfe5ea"; pen.fillRect(end - length * zoom, line - ratio, length * zoom, 2 * ratio);
    write(`${length} mm`, end - (length * zoom) / 2, line - 5 * ratio, "center", "bottom");
  }

  function tell(at) {
    if (!state.volume) return;
    const here = at || state.at, { size, full, ct } = state.sample, { image, label } = state.volume;
    const say = (of, text) => { find("readout").querySelector(`[data-of="${of}"]`).textContent = text; };
    say("place", `voxel ${here.map((k, axis) => Math.floor(((k + 0.5) * full[axis]) / size[axis])).join(", ")}`);
    say("value", image ? `${image[index(here)]}${ct ? " HU" : ""}` : "");
    const id = label ? label[index(here)] : 0;
    say("label", label ? (id ? `${run.labels[id] ? run.labels[id][0] : "label"} (${id})` : "no label") : "");
  }

  // --- windows, overlay, labels -----------------------------------------------------------------------------

  let presets = [], chosen = null;

  function startWindows() {
    const { ct, range, auto } = state.sample;
    presets = ct ? [...run.windows, ["Full", ...range]] : [["Auto", ...auto], ["Full", ...range]];
    if (!presets.some(([name]) => name === chosen)) chosen = presets[0][0];
    segments(find("windows"), "window", presets.map(([name]) => name), chosen, windowNamed);
    windowNamed(chosen);
  }

  function windowNamed(name) {
    const preset = presets.find(([each]) => each === name);
    if (!preset) return;
    chosen = name;
    all("#windows input").forEach((input) => { input.checked = input.value === name; });
    setWindow(preset[1], preset[2]);
    find("level").value = Math.round((state.low + state.high) / 2);
    find("width").value = Math.round(state.high - state.low);
  }

  function setWindow(low, high) {
    state.low = low;
    state.high = Math.max(high, low + 1e-3);
    Object.values(views).forEach(refresh);
  }

  function typedWindow() {
    const level = Number(find("level").value), width = Number(find("width").value);
    if (!find("level").value || !Number.isFinite(level) || !(width >= 1)) return;
    all("#windows input").forEach((input) => { input.checked = false; });
    setWindow(level - width / 2, level + width / 2);
  }

  function setOpacity(percent) {
    state.opacity = percent / 100;
    document.querySelector("#overlay output").textContent = `${percent} %`;
    Object.values(views).forEach(refresh);
  }

  function listLabels() {
    const { labels } = state.sample, list = find("label-list");
    const rows = labels.filter(([id]) => id !== BODY).sort((one, other) => other[1] - one[1]).concat(labels.filter(([id]) => id === BODY));
    list.replaceChildren(...rows.map(([id, ml]) => {
      const [name, colour] = run.labels[id], swatch = element("i", { class: "swatch" });
      swatch.style.background = `rgb(${colour.join(" ")})`;
      const button = element("button", { type: "button", "aria-pressed": "false", "data-label": id }, swatch, element("span", {}, name),
        element("small", {}, ml >= 10 ? `${Math.round(ml)} ml` : `${ml.toFixed(1)} ml`));
      button.addEventListener("click", () => single(id));
      return element("li", {}, button);
    }));
    find("labels-count").textContent = rows.length;
    find("labels").hidden = !rows.length;
  }

  function single(id) {
    state.only = state.only === id ? 0 : id;
    all("#label-list button").forEach((button) => button.setAttribute("aria-pressed", String(Number(button.dataset.label) === state.only)));
    const middle = state.only ? middleOf(id) : null;
    if (middle) state.at = middle;
    update();
    if (solid.kind === "Labels") showSolid();
  }

  // The voxel of a label that lies nearest to the mean of all of them.
  function middleOf(id) {
    const { label } = state.volume, { size } = state.sample, sum = [0, 0, 0];
    let count = 0, best = Infinity, found = null;
    const each = (visit) => {
      for (let z = 0, k = 0; z < size[2]; z++) for (let y = 0; y < size[1]; y++) for (let x = 0; x < size[0]; x++, k++) if (label[k] === id) visit(x, y, z);
    };
    each((x, y, z) => { sum[0] += x; sum[1] += y; sum[2] += z; count++; });
    each((x, y, z) => {
      const far = (x - sum[0] / count) ** 2 + (y - sum[1] / count) ** 2 + (z - sum[2] / count) ** 2;
      if (far < best) { best = far; found = [x, y, z]; }
    });
    return found;
  }

  // --- the 3D view ------------------------------------------------------------------------------------------

  const solid = { viewer: null, failed: false, kind: null, turn: 0 };

  function saySolid(text) {
    find("solid-say").textContent = text;
    find("solid-say").hidden = !text;
    find("solid").dataset.state = text ? "words" : "view";
  }

  // The samples' grid as a NIfTI file, which is what NiiVue reads.
  function nifti(values, { code, bits, intent = 0 }) {
    const { size, spacing } = state.sample, file = new ArrayBuffer(352 + values.byteLength), header = new DataView(file);
    const short = (at, value) => header.setInt16(at, value, true), float = (at, value) => header.setFloat32(at, value, true);
    header.setInt32(0, 348, true);
    [3, ...size, 1, 1, 1, 1].forEach((value, k) => short(40 + 2 * k, value));
    short(68, intent); short(70, code); short(72, bits);
    [1, ...spacing, 1, 1, 1, 1].forEach((value, k) => float(76 + 4 * k, value));
    float(108, 352); float(112, 1);
    header.setUint8(123, 2); short(254, 1);
    spacing.forEach((mm, k) => { float(280 + 16 * k + 4 * k, mm); float(280 + 16 * k + 12, (-(size[k] - 1) / 2) * mm); });
    [0x6e, 0x2b, 0x31, 0].forEach((value, k) => header.setUint8(344 + k, value));
    new Uint8Array(file, 352).set(new Uint8Array(values.buffer, values.byteOffset, values.byteLength));
    return file;
  }

  function labelColours() {
    const ids = [0, ...state.sample.labels.map(([id]) => id)], map = { R: [], G: [], B: [], A: [], I: ids, labels: ids.map(String) };
    ids.forEach((id) => {
      const colour = run.labels[id] ? run.labels[id][1] : [0, 0, 0];
      const seen = id !== 0 && (state.only ? id === state.only : id !== BODY);
      map.R.push(colour[0]); map.G.push(colour[1]); map.B.push(colour[2]); map.A.push(seen ? 255 : 0);
    });
    return map;
  }

  async function startSolid() {
    if (solid.viewer || solid.failed) return;
    const probe = element("canvas").getContext("webgl2");
    if (!probe) {
      solid.failed = true;
      saySolid("No 3D view: this browser offers no WebGL 2 here. The planes work without it.");
      return;
    }
    probe.getExtension("WEBGL_lose_context")?.loseContext();
    const script = element("script");
    script.textContent = new TextDecoder().decode(await unpack("niivue", "gzip"));
    document.head.append(script);
    const viewer = new window.niivue.Niivue({
      backColor: [0, 0, 0, 1], show3Dcrosshair: false, isColorbar: false, isOrientCube: false, dragAndDropEnabled: false,
      isOrientationTextVisible: false, crosshairWidth: 0, loadingText: "", logLevel: "error", isResizeCanvas: true,
      viewModeHotKey: "", clipPlaneHotKey: "", cycleClipPlaneHotKey: "",
    });
    await viewer.attachToCanvas(find("gl"));
    viewer.setSliceType(4);
    viewer.setRenderAzimuthElevation(160, 12);
    await viewer.setVolumeRenderIllumination(0.6);
    solid.viewer = viewer;
  }

  function solidKinds() {
    const { kinds, ct } = state.sample;
    return [...(kinds.includes("label") ? ["Labels"] : []), ...(kinds.includes("image") ? (ct ? ["Bones", "Skin"] : ["Image"]) : [])];
  }

  async function showSolid() {
    if (!state.volume) return;
    const turn = ++solid.turn, kinds = solidKinds();
    if (!kinds.includes(solid.kind)) solid.kind = kinds[0];
    segments(find("solid-kind"), "solid", kinds, solid.kind, (kind) => { solid.kind = kind; showSolid(); });
    try {
      await startSolid();
      if (!solid.viewer || turn !== solid.turn) return;
      const { viewer, kind } = solid, { image, label } = state.volume, { NVImage } = window.niivue;
      const made = kind === "Labels"
        ? await NVImage.new(nifti(label, { code: 2, bits: 8, intent: 1002 }), "labels.nii", "gray", 1)
        : await NVImage.new(nifti(image, { code: 4, bits: 16 }), "image.nii", kind === "Skin" ? "ct_surface" : "gray", 1);
      if (turn !== solid.turn) return;
      if (kind === "Labels") made.setColormapLabel(labelColours());
      else [made.cal_min, made.cal_max] = { Bones: BONES, Skin: SKIN, Image: state.sample.auto }[kind];
      while (viewer.volumes.length) viewer.removeVolume(viewer.volumes[0]);
      viewer.addVolume(made);
      viewer.updateGLVolume();
      saySolid("");
    } catch (error) {
      solid.failed = true;
      saySolid(`No 3D view: ${error.message || error}. The planes work without it.`);
    }
  }

  // --- samples ----------------------------------------------------------------------------------------------

  async function show(number) {
    if (number < 0 || number >= run.samples.length || number === state.number) return;
    state.number = number;
    const sample = run.samples[number], whole = sample.kinds.length > 0 && typeof DecompressionStream === "function";
    all("#cards button").forEach((button) => button.setAttribute("aria-pressed", String(Number(button.dataset.sample) === number)));
    all("[data-of]").forEach((part) => { if (/^\d+$/.test(part.dataset.of)) part.hidden = Number(part.dataset.of) !== number; });
    for (const id of ["tools", "planes", "readout"]) find(id).hidden = !whole;
    find("labels").hidden = true;
    state.volume = null;
    still(number, whole);
    if (whole) {
      const volume = await load(number);
      if (number !== state.number) return;
      Object.assign(state, { sample, volume, only: 0, at: [...sample.start] });
      find("windows").hidden = !volume.image;
      all(".field:not(.wide)").forEach((field) => { field.hidden = !volume.image; });
      find("overlay").hidden = !volume.label || !volume.image;
      if (volume.image) startWindows();
      listLabels();
      update();
      setTimeout(showSolid, 50); // the planes first
    }
    document.documentElement.dataset.ready = number;
  }

  // What is shown of a sample that is no volume here.
  function still(number, whole) {
    const box = find("still"), picture = document.querySelector(`#cards button[data-sample="${number}"] img`);
    box.hidden = whole;
    if (whole) return;
    const why = run.samples[number].kinds.length ? "This browser cannot unpack the volume: it has no DecompressionStream."
      : picture ? "This sample is here as a picture only." : "There is nothing to show of this sample: its files are missing or damaged.";
    box.replaceChildren(...(picture ? [picture.cloneNode()] : []), element("p", { class: "faint" }, why));
  }

  function startKeys() {
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches('input[type="number"], textarea')) return;
      const key = event.key.toLowerCase();
      if (key === "n" || key === "p") show(state.number + (key === "n" ? 1 : -1));
      else if (key === "o" && state.volume) { state.overlay = !state.overlay; Object.values(views).forEach(refresh); }
      else if (/^[1-9]$/.test(key) && state.volume && state.volume.image) windowNamed((presets[Number(key) - 1] || [])[0]);
    });
  }

  startTheme();
  all(".plane[data-plane]").forEach(startPlane);
  all("#cards button").forEach((button) => button.addEventListener("click", () => show(Number(button.dataset.sample))));
  all("[data-go]").forEach((link) => link.addEventListener("click", () => show(Number(link.dataset.go))));
  for (const id of ["level", "width"]) find(id).addEventListener("input", typedWindow);
  find("opacity").addEventListener("input", (event) => setOpacity(Number(event.target.value)));
  startKeys();
  show(0);
})();
