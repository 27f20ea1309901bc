"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const one = (selector, root = document) => root.querySelector(selector);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  /** Make an element of HTML; texts are set as texts, never as markup. */
  function make(name, attributes = {}, ...inside) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...inside);
    return made;
  }
  function makeSvg(name, attributes = {}, ...inside) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...inside);
    return made;
  }

  // ---- commands -------------------------------------------------------------------------------------------------
  for (const button of all(".copy")) {
    button.addEventListener("click", () => {
      const area = make("textarea");
      area.value = button.dataset.copy;
      document.body.append(area);
      area.select();
      document.execCommand("copy"); // the clipboard API is refused to pages that are opened from disk
      area.remove();
      button.textContent = "Copied";
    });
  }

  // ---- tables that sort -----------------------------------------------------------------------------------------
  const valueOf = (row, column) => {
    const text = row.cells[column]?.dataset.v ?? "";
    const number = text === "" ? NaN : Number(text);
    return [text, number];
  };
  function sortable(table, onSorted = () => {}) {
    const headers = all("thead th", table);
    const body = one("tbody", table);
    headers.forEach((header, column) => {
      const button = make("button", { type: "button", class: "sort" }, ...header.childNodes);
      header.replaceChildren(button);
      button.addEventListener("click", () => {
        const down = header.getAttribute("aria-sort") === "ascending" ||
          (header.classList.contains("number") && !header.hasAttribute("aria-sort"));
        for (const other of headers) other.removeAttribute("aria-sort");
        header.setAttribute("aria-sort", down ? "descending" : "ascending");
        const rows = [...body.rows].map((row) => [row, ...valueOf(row, column)]);
        const isMissing = ([, text]) => text === "";
        const numeric = rows.every((entry) => isMissing(entry) || !Number.isNaN(entry[2]));
        rows.sort((a, b) => {
          if (isMissing(a) || isMissing(b)) return isMissing(a) - isMissing(b); // last, whichever way
          const order = numeric ? a[2] - b[2] : a[1].localeCompare(b[1], "en", { numeric: true });
          return down ? -order : order;
        });
        body.append(...rows.map(([row]) => row));
        onSorted();
      });
    });
  }
  for (const table of all("table.sortable")) sortable(table);

  // ---- charts ---------------------------------------------------------------------------------------------------
  const shown = (value) => value === null || value === undefined ? "\u2013"
    : Math.abs(value) >= 1000 || Number.isInteger(value) ? value.toLocaleString("en")
    : Math.abs(value) < 0.001 && value !== 0 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  for (const plot of all(".plot")) {
    const chart = data.charts[Number(plot.dataset.chart)];
    const figure = plot.parentElement;
    const svg = one("svg", plot);
    const xs = [...new Set(chart.series.flatMap((line) => line.points.map(([x]) => x)))].sort((a, b) => a - b);
    if (!xs.length) continue;
    const cursor = makeSvg("line", { class: "cursor", y1: chart.top, y2: chart.bottom });
    svg.append(cursor);
    let at = xs.length - 1;
    const nearest = (points, x) => points.reduce((best, point) =>
      best === null || Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best, null);
    const show = (index) => {
      at = Math.max(0, Math.min(xs.length - 1, index));
      const x = xs[at];
      const place = chart.left + (x - chart.x[0]) / (chart.x[1] - chart.x[0]) * (chart.right - chart.left);
      cursor.setAttribute("x1", place);
      cursor.setAttribute("x2", place);
      one(".at", figure).textContent = `${chart.label}: ${shown(x)}`;
      chart.series.forEach((line, number) => {
        const point = nearest(line.points, x);
        const room = (xs[xs.length - 1] - xs[0]) / Math.max(1, xs.length - 1) * 1.01;
        one(`output[data-line="${number}"]`, figure).textContent =
          point !== null && Math.abs(point[0] - x) <= room ? shown(point[1]) : "\u2013";
      });
    };
    const find = (event) => {
      const box = svg.getBoundingClientRect();
      const across = (event.clientX - box.left) / box.width * 640;
      const x = chart.x[0] + (across - chart.left) / (chart.right - chart.left) * (chart.x[1] - chart.x[0]);
      show(xs.reduce((best, value, index) => Math.abs(value - x) < Math.abs(xs[best] - x) ? index : best, 0));
    };
    svg.addEventListener("pointermove", find);
    svg.addEventListener("pointerdown", find);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -1e9, End: 1e9 }[event.key];
      if (step === undefined) return;
      event.preventDefault();
      event.stopPropagation();
      show(at + step);
    });
    if (chart.start !== null) show(xs.reduce((best, value, index) =>
      Math.abs(value - chart.start) < Math.abs(xs[best] - chart.start) ? index : best, 0));
  }

  // ---- images ---------------------------------------------------------------------------------------------------
  const list = document.getElementById("list");
  if (!list) return;
  const body = one("tbody", list);
  const tools = one(".tools");
  const viewer = document.getElementById("viewer");
  const hasPictures = data.items.some((item) => item.w || item.targets);
  tools.hidden = false;
  viewer.hidden = !hasPictures;
  if (!hasPictures) one(".split").classList.add("alone");
  const visible = () => [...body.rows].filter((row) => !row.hidden);
  sortable(list, () => gallery());

  const NAMES = { image: "image", map: "probability", disagreement: "disagreement", truth: "truth", found: "prediction", missed: "missed", false: "false", ...data.names };
  const inWords = (note) => note.replace(/^(\w+): /, (all, layer) => layer in NAMES ? `${NAMES[layer]}: ` : all);
  const DRAWN = ["truth", "found", "missed", "false"]; // masks; the others are pictures
  const ORDER = ["image", "map", "disagreement", ...DRAWN];
  const opacity = { image: 1, map: 0, disagreement: 0, truth: 1, found: 1, missed: 1, false: 1 };
  const isOn = { image: true, map: false, disagreement: false, truth: true, found: true, missed: true, false: true };
  const used = ORDER.filter((layer) => data.items.some((item) => item[layer]));

  const filters = makeSvg("svg", { width: 0, height: 0, "aria-hidden": "true", style: "position:absolute" });
  const tint = (id, red, green, blue, alpha) => {
    const transfer = makeSvg("feComponentTransfer");
    [["R", red], ["G", green], ["B", blue], ["A", alpha]].forEach(([channel, table]) =>
      transfer.append(makeSvg(`feFunc${channel}`, { type: "table", tableValues: table })));
    const matrix = makeSvg("feColorMatrix", { type: "matrix", values: "1 0 0 0 0 0 1 0 0 0 0 0 1 0 0 1 0 0 0 0" });
    return makeSvg("filter", { id, "color-interpolation-filters": "sRGB", x: 0, y: 0, width: 1, height: 1 }, matrix, transfer);
  };
  filters.append(
    tint("tint-map", "0.17 0.2 0.23 0.5 0.85", "0.06 0.25 0.49 0.85 1", "0.33 0.7 0.87 0.6 0.36", "0 0.25 0.65 0.85 1"),
    tint("tint-disagreement", "0.85 0.84 0.84", "0.3 0.1 0", "0.7 0.6 0.56", "0 0.75 1 1 1"),
    tint("tint-found", "1 1", "0.86 0.86", "0 0", "0 0.45 0.6 0.7 0.7"), // masks too fine for outlines, in their colours
    tint("tint-truth", "0 0", "0.86 0.86", "1 1", "0 0.45 0.6 0.7 0.7"),
    tint("tint-missed", "1 1", "0.16 0.16", "0.1 0.1", "0 0.45 0.6 0.7 0.7"),
    tint("tint-false", "0.05 0.05", "0.2 0.2", "1 1", "0 0.45 0.6 0.7 0.7"),
  );
  document.body.append(filters);

  /** Draw an image's layers, as groups of one SVG in px of the image. */
  function draw(item, parts) {
    return parts.filter((layer) => item[layer]).map((layer) => {
      if (DRAWN.includes(layer) && !item[layer].startsWith("data:")) {
        const path = (kind) => makeSvg("path", { class: kind, d: item[layer], "fill-rule": "evenodd" });
        return makeSvg("g", { class: layer, "data-layer": layer }, path("fill"), path("rim"), path("edge"));
      }
      const picture = makeSvg("image", { href: item[layer], width: item.w, height: item.h, preserveAspectRatio: "none" });
      if (layer !== "image") picture.setAttribute("filter", `url(#tint-${layer})`);
      return makeSvg("g", { "data-layer": layer }, picture);
    });
  }

  const name = make("span", { class: "name", "aria-live": "polite" });
  const svg = makeSvg("svg", { role: "img", preserveAspectRatio: "xMidYMid meet" });
  const bar = make("i");
  const barText = make("span");
  const scale = make("div", { class: "scale" }, barText, bar);
  const canvas = make("div", { class: "canvas", tabindex: "0", role: "group", "aria-label": "Image with its layers" }, svg, scale);
  const about = make("p", { class: "facts-of" });
  const warnings = make("div");
  const targets = make("div", { class: "scroll targets" });
  const beside = make("div", { class: "beside" });
  const layers = make("fieldset", { class: "layers" });
  const button = (text, label, act) => {
    const made = make("button", { type: "button", "aria-label": label, title: label }, text);
    made.addEventListener("click", act);
    return made;
  };
  let current = null;
  let view = { x: 0, y: 0, w: 1, h: 1 };
  let box = null;

  const step = (by) => {
    const rows = visible();
    if (!rows.length) return;
    const index = rows.findIndex((row) => row === current);
    select(rows[Math.max(0, Math.min(rows.length - 1, index < 0 ? 0 : index + by))], true);
  };
  viewer.append(
    make("div", { class: "bar" }, name,
      button("\u2190", "previous", () => step(-1)), button("\u2192", "next", () => step(1)),
      button("\u2212", "zoom out", () => zoom(1 / 1.4)), button("+", "zoom in", () => zoom(1.4)), button("whole", "whole image", () => whole())),
    canvas, layers, make("p", { class: "keys" }), about, warnings, targets, beside);
  one(".keys", viewer).append(...["\u2190", "\u2192"].map((key) => make("kbd", {}, key)), " previous, next  ",
    make("kbd", {}, "+"), " ", make("kbd", {}, "\u2212"), " ", make("kbd", {}, "0"), " zoom  ",
    make("kbd", {}, "1"), "\u2026", make("kbd", {}, String(used.length)), " layers on and off");

  used.forEach((layer, index) => {
    const check = make("input", { type: "checkbox", "data-layer": layer });
    check.checked = isOn[layer];
    const slider = make("input", { type: "range", min: 0, max: 100, step: 5, value: opacity[layer] * 100 || 70, "aria-label": `opacity of ${NAMES[layer]}`, "data-layer": layer });
    opacity[layer] = Number(slider.value) / 100;
    check.addEventListener("change", () => { isOn[layer] = check.checked; paint(); });
    slider.addEventListener("input", () => { opacity[layer] = Number(slider.value) / 100; isOn[layer] = check.checked = opacity[layer] > 0; paint(); });
    layers.append(make("label", {}, check, make("span", { class: `swatch ${layer}` }), `${index + 1} ${NAMES[layer]}`, slider));
  });

  function paint() {
    for (const group of all("g[data-layer]", svg)) {
      const layer = group.dataset.layer;
      group.setAttribute("opacity", isOn[layer] ? opacity[layer] : 0);
    }
  }
  function frame() {
    svg.setAttribute("viewBox", `${view.x} ${view.y} ${view.w} ${view.h}`);
    const item = current && data.items[Number(current.dataset.i)];
    scale.hidden = !(item && item.mpp);
    if (scale.hidden) return;
    const umPerPx = item.mpp * view.w / Math.max(1, canvas.clientWidth);
    const most = umPerPx * canvas.clientWidth / 4;
    const power = 10 ** Math.floor(Math.log10(most));
    const length = [5, 2, 1].map((factor) => factor * power).find((value) => value <= most) ?? power;
    bar.style.width = `${length / umPerPx}px`;
    barText.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} \u00b5m`;
  }
  const MOST_ZOOM = 40;
  const EDGE = 0.006; // of the image, around it: lines along its border show both their rims
  function whole() {
    const item = data.items[Number(current.dataset.i)];
    const [w, h] = [item.w || 1, item.h || 1];
    view = { x: -EDGE * w, y: -EDGE * h, w: (1 + 2 * EDGE) * w, h: (1 + 2 * EDGE) * h };
    frame();
  }
  function zoom(by, place = [0.5, 0.5]) {
    const item = data.items[Number(current.dataset.i)];
    const w = Math.min((1 + 2 * EDGE) * item.w, Math.max(item.w / MOST_ZOOM, view.w / by));
    const h = w * item.h / item.w;
    view = { x: view.x + (view.w - w) * place[0], y: view.y + (view.h - h) * place[1], w, h };
    keepInside(item);
  }
  function keepInside(item) {
    const [left, top] = [EDGE * item.w, EDGE * item.h];
    view.x = Math.max(-left, Math.min(item.w + left - view.w, view.x));
    view.y = Math.max(-top, Math.min(item.h + top - view.h, view.y));
    frame();
  }
  const placeOf = (event) => {
    const frameBox = svg.getBoundingClientRect();
    return [(event.clientX - frameBox.left) / frameBox.width, (event.clientY - frameBox.top) / frameBox.height];
  };
  svg.addEventListener("wheel", (event) => { event.preventDefault(); zoom(event.deltaY < 0 ? 1.2 : 1 / 1.2, placeOf(event)); }, { passive: false });
  svg.addEventListener("dblclick", (event) => zoom(2, placeOf(event)));
  let drag = null;
  svg.addEventListener("pointerdown", (event) => { drag = placeOf(event); svg.setPointerCapture(event.pointerId); });
  svg.addEventListener("pointerup", () => { drag = null; });
  svg.addEventListener("pointermove", (event) => {
    if (!drag || !current) return;
    const [x, y] = placeOf(event);
    view.x += (drag[0] - x) * view.w;
    view.y += (drag[1] - y) * view.h;
    drag = [x, y];
    keepInside(data.items[Number(current.dataset.i)]);
  });

  function select(row, scroll = false) {
    if (current) { current.classList.remove("current"); current.removeAttribute("aria-current"); }
    current = row;
    row.classList.add("current");
    row.setAttribute("aria-current", "true");
    if (scroll) row.scrollIntoView({ block: "nearest" });
    const item = data.items[Number(row.dataset.i)];
    const title = row.cells[0].dataset.v;
    name.textContent = title;
    svg.setAttribute("aria-label", `${title}, with ${used.filter((layer) => item[layer]).map((layer) => NAMES[layer]).join(", ") || "no picture"}`);
    svg.replaceChildren(...draw(item, used));
    box = makeSvg("rect", { class: "box" });
    svg.append(box);
    const [w, h] = item.w ? [item.w, item.h] : [16, 9];
    canvas.style.aspectRatio = `${w} / ${h}`;
    canvas.style.maxWidth = `${88 * w / h}vh`; // no higher than the window
    canvas.classList.toggle("missing", !item.image);
    canvas.dataset.missing = item.image ? "" : "no picture of it";
    const headers = all("thead th", list).slice(1).map((header) => header.textContent);
    about.textContent = row.classList.contains("failed") ? "" : [...row.cells].slice(1)
      .map((cell, index) => `${headers[index]} ${cell.textContent}`).concat(item.mpp_note ? [item.mpp_note] : []).join("  \u00b7  ");
    const notes = [...(row.classList.contains("failed") ? [row.cells[1].textContent] : []), ...(item.notes ?? []).map(inWords)];
    warnings.replaceChildren(...notes.map((text) => make("p", { class: "warn" }, text)));
    listTargets(item);
    beside.replaceChildren(...(item.beside ?? []).map(([title, source]) =>
      make("figure", {}, make("h3", {}, title), make("img", { src: source, alt: `${title} of ${name.textContent}` }))));
    paint();
    whole();
  }
  function listTargets(item) {
    targets.replaceChildren();
    if (!item.targets?.length) return;
    const head = make("tr", {}, ...[["target", ""], ...data.targets].map(([text, title]) => make("th", { scope: "col", class: "number", title }, text)));
    const rows = item.targets.map((target) => {
      const row = make("tr", target.box ? { tabindex: "0" } : {}, ...target.texts.map((text) => make("td", { class: "number" }, text)));
      if (!target.box || !item.w) return row;
      const [x0, y0, x1, y1] = target.box;
      const mark = () => {
        for (const other of all("tr.current", targets)) other.classList.remove("current");
        row.classList.add("current");
        for (const [key, value] of Object.entries({ x: x0, y: y0, width: x1 - x0, height: y1 - y0 })) box.setAttribute(key, value);
      };
      const go = () => {
        mark();
        const w = Math.min((1 + 2 * EDGE) * item.w, Math.max(item.w / MOST_ZOOM, x1 - x0, (y1 - y0) * item.w / item.h) * 2.2);
        const h = w * item.h / item.w;
        view = { x: (x0 + x1 - w) / 2, y: (y0 + y1 - h) / 2, w, h };
        keepInside(item);
      };
      row.addEventListener("mouseenter", mark);
      row.addEventListener("focus", mark);
      row.addEventListener("click", go);
      row.addEventListener("keydown", (event) => { if (event.key === "Enter") go(); });
      return row;
    });
    if (item.targets_note) targets.append(make("p", { class: "note" }, item.targets_note));
    targets.append(make("table", {}, make("thead", {}, head), make("tbody", {}, ...rows)));
  }

  body.addEventListener("click", (event) => { const row = event.target.closest("tr"); if (row) select(row); });
  document.addEventListener("keydown", (event) => {
    if (event.target.matches('input[type="search"], select, textarea') || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.matches('input[type="range"]') && event.key.startsWith("Arrow")) return;
    const number = Number(event.key);
    if (event.key === "ArrowRight" || event.key === "j") step(1);
    else if (event.key === "ArrowLeft" || event.key === "k") step(-1);
    else if (event.key === "+" || event.key === "=") zoom(1.4);
    else if (event.key === "-") zoom(1 / 1.4);
    else if (event.key === "0") whole();
    else if (number >= 1 && number <= used.length) one(`input[type="checkbox"][data-layer="${used[number - 1]}"]`, layers).click();
    else return;
    event.preventDefault();
  });

  // ---- finding --------------------------------------------------------------------------------------------------
  const find = document.getElementById("find");
  const tag = document.getElementById("tag");
  function filter() {
    const wanted = find.value.trim().toLowerCase();
    for (const row of body.rows) {
      const tags = row.dataset.tags.split("\u001f");
      row.hidden = (wanted && !row.textContent.toLowerCase().includes(wanted)) || (tag.value !== "" && !tags.includes(tag.value));
    }
    const rows = visible();
    document.getElementById("shown").textContent = `${rows.length} of ${body.rows.length}`;
    gallery();
    if (rows.length && !rows.includes(current)) select(rows[0]);
  }
  find.addEventListener("input", filter);
  tag.addEventListener("change", filter);

  // ---- all of them ----------------------------------------------------------------------------------------------
  const sheet = make("div", { class: "gallery", hidden: "" });
  one(".split").after(sheet);
  if (hasPictures) {
    const toggle = make("button", { type: "button", "aria-pressed": "false" }, "Contact sheet");
    toggle.addEventListener("click", () => {
      sheet.hidden = !sheet.hidden;
      one(".split").hidden = !sheet.hidden;
      one(".split").style.display = sheet.hidden ? "" : "none";
      sheet.style.display = sheet.hidden ? "none" : "";
      toggle.setAttribute("aria-pressed", String(!sheet.hidden));
      gallery();
    });
    tools.append(toggle);
    sheet.style.display = "none";
  }
  const drawWhenSeen = "IntersectionObserver" in window ? new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) { entry.target.fill(); drawWhenSeen.unobserve(entry.target); }
  }, { rootMargin: "400px" }) : null;
  function gallery() {
    if (!sheet || sheet.hidden) return;
    const shownLayers = used.filter((layer) => isOn[layer]);
    sheet.replaceChildren(...visible().map((row) => {
      const item = data.items[Number(row.dataset.i)];
      const picture = makeSvg("svg", { viewBox: `0 0 ${item.w || 16} ${item.h || 9}`, "aria-hidden": "true" });
      picture.fill = () => {
        picture.append(...draw(item, shownLayers));
        for (const group of all("g[data-layer]", picture)) group.setAttribute("opacity", opacity[group.dataset.layer]);
      };
      const card = make("button", { type: "button" }, picture, make("span", {}, row.classList.contains("failed") ? `${row.cells[0].dataset.v}: ${row.cells[1].textContent}` : row.cells[0].dataset.v));
      card.addEventListener("click", () => { one("button[aria-pressed]", tools).click(); select(row, true); });
      if (drawWhenSeen) drawWhenSeen.observe(picture); else picture.fill();
      return card;
    }));
  }
  window.addEventListener("beforeprint", () => { for (const picture of all("svg", sheet)) if (!picture.hasChildNodes()) picture.fill?.(); });
  window.addEventListener("resize", frame);
  filter();
})();
