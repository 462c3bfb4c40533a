"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const get = (id) => document.getElementById(id);
  const state = { row: 0, map: 0, head: 0, at: null, pinned: false };
  const decoded = new Map();  // pictures of at most CACHE numbers together, the latest last
  const CACHE = 3e7, MANY = 1e7, LABELS = 48, SMALL = 96;

  function make(tag, parent, text = "", className = "") {
    const element = document.createElement(tag);
    element.textContent = text;
    if (className) element.className = className;
    if (parent) parent.append(element);
    return element;
  }

  const row = () => data.rows[state.row];
  const map = () => row().maps[state.map];

  // A picture: numbers of T x S cells, square roots of their size relative to the largest, with a sign.
  async function picture(r, m, h) {
    const one = data.rows[r].maps[m];
    if (h === one.heads.length) return mean(r, m);
    const key = `${r} ${m} ${h}`;
    if (!decoded.has(key)) {
      const head = one.heads[h];
      let bytes = Uint8Array.from(atob(head.data), (c) => c.charCodeAt(0));
      if (one.packed) {
        const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
        bytes = new Uint8Array(await new Response(stream).arrayBuffer());
      }
      const whole = one.bits === 16 ? new Int16Array(bytes.buffer) : new Int8Array(bytes.buffer);
      const top = one.bits === 16 ? 32767 : 127;
      const values = new Float32Array(whole.length);
      for (let i = 0; i < whole.length; i++) {
        const root = whole[i] / top;
        values[i] = root * Math.abs(root) * head.largest;
      }
      keep(key, { values, largest: head.largest });
    }
    return decoded.get(key);
  }

  async function mean(r, m) {
    const key = `${r} ${m} mean`;
    if (!decoded.has(key)) {
      const one = data.rows[r].maps[m];
      const values = new Float32Array(one.shape[0] * one.shape[1]);
      for (let h = 0; h < one.heads.length; h++) {
        const part = (await picture(r, m, h)).values;
        for (let i = 0; i < values.length; i++) values[i] += Math.abs(part[i]) / one.heads.length;
      }
      keep(key, { values, largest: values.reduce((a, b) => Math.max(a, b), 0) });
    }
    return decoded.get(key);
  }

  function keep(key, found) {
    decoded.set(key, found);
    let total = [...decoded.values()].reduce((sum, one) => sum + one.values.length, 0);
    for (const [name, old] of decoded) {
      if (total <= CACHE || old === found) break;
      decoded.delete(name);
      total -= old.values.length;
    }
  }

  const variable = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (share) => `rgba(${variable(share < 0 ? "--minus" : "--plus")}, ${shade(share)})`;
  const shade = (share) => Math.sqrt(Math.min(1, Math.abs(share)));
  const number = (value) => value === 0 ? "0" : Math.abs(value) >= 0.001 && Math.abs(value) < 1000
    ? String(Number(value.toPrecision(3))) : value.toExponential(1);
  const PIECE = /^(.*) (\d)\/(\d)$/s;  // a piece of a character, and its place

  // What a token looks like: pieces of a character show it once, line ends and lonely spaces have a sign.
  function visible(token) {
    const piece = token.match(PIECE);
    if (piece) return piece[2] === "1" ? piece[1] : "\u00b7";
    return token.replace(/\n/g, "\u21b5\n").replace(/\t/g, "\u21e5").replace(/^ +$/, (s) => "\u2423".repeat(s.length));
  }
  const quoted = (token) => {
    const piece = token.match(PIECE);
    return `\u201c${visible(piece ? piece[1] : token).replace(/\n/g, "")}\u201d${piece ? ` ${piece[2]}/${piece[3]}` : ""}`;
  };

  function fill(select, names, chosen) {
    select.textContent = "";
    names.forEach((name, i) => { make("option", select, name).value = i; });
    select.value = chosen;
    select.parentElement.hidden = names.length < 2;
  }

  const mapName = (one) => {
    const side = row().maps.some((other) => other.stack !== one.stack) ? `${one.stack} ` : "";
    return `${side}layer ${one.layer}${one.part === "cross" ? ", to the source" : ""}: ${one.variant}` +
      (row().texts[one.query].name.startsWith("window") ? ` (${row().texts[one.query].name})` : "");
  };

  function chooseRow(r) {
    Object.assign(state, { row: r, at: null, pinned: false });
    const cross = row().maps.findLastIndex((one) => one.part === "cross");
    state.map = cross >= 0 ? cross : row().maps.length - 1;
    get("shown").textContent = row().shown;
    get("shown").hidden = !row().shown;
    fill(get("map"), row().maps.map(mapName), state.map);
    chooseMap(state.map);
    contributed(0);
    thumbnails();
  }

  function chooseMap(m, h = null) {
    state.map = m;
    const one = map();
    const names = one.heads.map((head) => head.name);
    if (names.length > 1) names.push("mean size over all");
    state.head = h === null ? names.length - 1 : h;
    state.at = null;
    state.pinned = false;
    get("map").value = m;
    fill(get("head"), names, state.head);
    get("own").checked = Math.max(...one.shape) > 64;
    get("how").textContent = `${one.kind}; ${one.how}.`;
    text();
    draw();
    show({ t: one.shape[0] - 1 });
  }

  // The text: of a map to the own text one line of tokens, of cross-attention the target and the source.
  let asking = [], answering = [];
  function text() {
    const one = map(), query = row().texts[one.query], key = row().texts[one.key];
    const same = one.query === one.key;
    get("lines").textContent = "";
    asking = [];
    answering = [];
    const chip = (parent, token, said, classes) => {
      const span = make("span", parent, "", classes);
      const shown = classes.includes("apart") || token.trim() || /\n/.test(token) ? visible(token) : token;
      if (said) make("rt", make("ruby", span, shown), said);
      else span.textContent = shown;
      span.title = token.match(PIECE) ? `a piece of a character: ${quoted(token)}` : "";
      return span;
    };
    const line = (name) => {
      make("p", get("lines"), name, "name");
      const found = make("div", get("lines"), "", "tokens");
      found.tabIndex = 0;
      found.addEventListener("keydown", step);
      return found;
    };
    const apart = (text) => text.says.some((said) => said) && !text.writes ? " apart" : "";
    if (same && query.writes) {
      const found = line(query.name);
      answering = query.tokens.map((token, s) => chip(found, token, "", s ? "ask" : ""));
      const end = query.says[query.says.length - 1];
      asking = [...answering.slice(1), ...(query.says.length === query.tokens.length ? [chip(found, end, "", "ask")] : [])];
      asking.forEach((span, t) => { if (t >= query.written) span.classList.add("written"); });
    } else if (same) {
      const found = line(query.name);
      if (apart(query)) found.classList.add("marked");
      asking = answering = query.tokens.map((token, t) => chip(found, token, query.says[t], `ask${apart(query)}`));
    } else {
      const found = line(`${query.name}: ${query.writes ? "what is written" : "what is read"}`);
      const words = query.writes ? query.says : query.tokens;
      asking = words.map((token) => chip(found, token, "", "ask apart"));
      const other = line(key.name);
      answering = key.tokens.map((token) => chip(other, token, "", "ask apart"));
      answering.forEach((span, s) => listen(span, { s }));
    }
    asking.forEach((span, t) => listen(span, { t }));
    get("hint").textContent = query.writes && same
      ? "Point at a token: what it rests on is shaded, which stands before it. Click to keep it; arrow keys move on."
      : "Point at a token: what it rests on is shaded. Click to keep it; arrow keys move on.";
    get("numbers").textContent = "";
  }

  function listen(span, at) {
    span.addEventListener("mouseenter", () => { if (!state.pinned) show(at); });
    span.addEventListener("click", () => {
      const again = state.pinned && JSON.stringify(state.at) === JSON.stringify(at);
      state.pinned = !again;
      show(at);
    });
  }

  function step(event) {
    const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!move || state.at?.t === undefined) return;
    event.preventDefault();
    state.pinned = true;
    show({ t: Math.max(0, Math.min(map().shape[0] - 1, state.at.t + move)) });
  }

  const asked = (t) => { const q = row().texts[map().query]; return q.writes ? q.says[t] : q.tokens[t]; };

  async function show(at) {
    state.at = at;
    const one = map(), { values } = await picture(state.row, state.map, state.head);
    if (state.at !== at || one !== map()) return;
    const [T, S] = one.shape, back = at.s !== undefined;
    const found = [];
    for (let i = 0; i < (back ? T : S); i++) found.push(values[back ? i * S + at.s : at.t * S + i]);
    const largest = found.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
    for (const span of [...asking, ...answering]) { span.style.background = ""; span.classList.remove("at"); }
    const targets = back ? asking : answering;
    found.forEach((value, i) => { if (value && targets[i]) targets[i].style.background = colour(0.8 * value / largest); });
    (back ? answering[at.s] : asking[at.t])?.classList.add("at");
    const order = found.map((_, i) => i).filter((i) => found[i]).sort((a, b) => Math.abs(found[b]) - Math.abs(found[a]));
    const numbers = get("numbers"), keys = row().texts[one.key].tokens;
    numbers.textContent = "";
    make("b", numbers, back ? quoted(keys[at.s]) : quoted(asked(at.t) ?? ""));
    make("span", numbers, back ? " is what these rest on:" : ` (position ${at.t}) rests on:`);
    for (const i of order.slice(0, 12)) make("span", numbers, `${quoted(back ? asked(i) : keys[i])} ${number(found[i])}`);
    const rest = order.slice(12).reduce((sum, i) => sum + Math.abs(found[i]), 0);
    if (rest) make("span", numbers, `${order.length - 12} more: ${number(rest)}`, "more");
  }

  // The map: T x S cells; where there are more of them than pixels, the largest of those that share one.
  let drawn = null;
  async function draw() {
    const one = map(), r = state.row, m = state.map, h = state.head;
    const found = await picture(r, m, h);
    if (one !== map() || h !== state.head) return;
    const [T, S] = one.shape, labelled = Math.max(T, S) <= LABELS;
    const room = Math.max(160, get("box").clientWidth - 2);
    const font = 13, names = row().texts[one.key].tokens, asks = Array.from({ length: T }, (_, t) => asked(t) ?? "");
    const canvas = get("canvas"), pen = canvas.getContext("2d");
    pen.font = `${font}px ${getComputedStyle(document.body).fontFamily}`;
    const size = (list) => Math.min(150, Math.max(...list.map((name) => pen.measureText(visible(name).trim()).width)) + 10);
    const left = labelled ? size(asks) : 0;
    const cell = labelled ? Math.max(15, Math.min(28, Math.floor((room - left) / S))) : 0;
    const upright = size(names) - 10 <= cell;
    const top = labelled ? (upright ? 22 : size(names)) : 0;
    const width = cell ? cell * S : Math.min(room, Math.max(S, 320)), height = cell ? cell * T : Math.round(width * T / S);
    const scale = window.devicePixelRatio || 1;
    canvas.width = (left + width) * scale;
    canvas.height = (top + height) * scale;
    canvas.style.width = `${left + width}px`;
    canvas.style.height = `${top + height}px`;
    paint(pen, found, one.shape, [left * scale, top * scale, width * scale, height * scale], get("own").checked);
    pen.scale(scale, scale);
    pen.strokeStyle = variable("--line");
    pen.strokeRect(left + .5, top + .5, width - 1, height - 1);
    if (labelled) {
      pen.font = `${font}px ${getComputedStyle(document.body).fontFamily}`;
      pen.fillStyle = variable("--ink");
      pen.textBaseline = "middle";
      pen.textAlign = "right";
      asks.forEach((name, t) => pen.fillText(visible(name).trim(), left - 6, top + (t + .5) * cell, left - 6));
      pen.textAlign = upright ? "center" : "left";
      names.forEach((name, s) => {
        pen.save();
        pen.translate(left + (s + .5) * cell, top - (upright ? 10 : 6));
        if (!upright) pen.rotate(-Math.PI / 2);
        pen.fillText(visible(name).trim(), 0, 0, upright ? cell : top - 6);
        pen.restore();
      });
    }
    drawn = { found, left, top, width, height };
    canvas.setAttribute("aria-label", `${mapName(one)}: ${T} by ${S} tokens`);
    get("legend").textContent = `Rows: ${row().texts[one.query].writes ? "the token that is written" : "the token"}. ` +
      `Columns: what was read. Shade: the square root of the size, ` +
      (get("own").checked ? "relative to the largest of its row" : `relative to the largest, ${number(found.largest)}`) +
      (one.signed ? "; blue is positive, orange negative." : ".");
  }

  function paint(pen, found, [T, S], [x, y, w, h], own) {
    const wide = Math.max(1, Math.round(w)), high = Math.max(1, Math.round(h));
    const image = pen.createImageData(wide, high);
    const inks = ["--plus", "--minus", "--paper"].map((name) => variable(name));
    const [plus, minus] = inks.slice(0, 2).map((ink) => ink.split(",").map(Number));
    const probe = document.createElement("canvas").getContext("2d");
    probe.fillStyle = inks[2];
    probe.fillRect(0, 0, 1, 1);
    const paper = probe.getImageData(0, 0, 1, 1).data;
    const tops = new Float32Array(T).fill(found.largest || 1);
    if (own) for (let t = 0; t < T; t++) {
      let top = 0;
      for (let s = 0; s < S; s++) top = Math.max(top, Math.abs(found.values[t * S + s]));
      tops[t] = top || 1;
    }
    for (let py = 0; py < high; py++) {
      const t0 = Math.floor(py * T / high), t1 = Math.max(t0 + 1, Math.floor((py + 1) * T / high));
      for (let px = 0; px < wide; px++) {
        const s0 = Math.floor(px * S / wide), s1 = Math.max(s0 + 1, Math.floor((px + 1) * S / wide));
        let best = 0;
        for (let t = t0; t < t1; t++) for (let s = s0; s < s1; s++) {
          const share = found.values[t * S + s] / tops[t];
          if (Math.abs(share) > Math.abs(best)) best = share;
        }
        const ink = best < 0 ? minus : plus, a = shade(best), at = 4 * (py * wide + px);
        for (let c = 0; c < 3; c++) image.data[at + c] = paper[c] + (ink[c] - paper[c]) * a;
        image.data[at + 3] = 255;
      }
    }
    pen.putImageData(image, Math.round(x), Math.round(y));
  }

  function place(event) {
    const { left, top, width, height } = drawn, [T, S] = map().shape;
    const s = Math.floor((event.offsetX - left) * S / width), t = Math.floor((event.offsetY - top) * T / height);
    return s >= 0 && t >= 0 && s < S && t < T ? [t, s] : null;
  }

  function point(event) {
    const at = drawn && place(event);
    if (!at) return;
    const [t, s] = at, value = drawn.found.values[t * map().shape[1] + s];
    get("tip").textContent = `${quoted(asked(t) ?? "")} (${t}) on ${quoted(row().texts[map().key].tokens[s])} (${s}): ${number(value)}`;
  }

  // What each token contributes to the answer, for a method.
  function contributed(chosen) {
    const found = row().contributions;
    get("contributions").hidden = !found.length;
    if (!found.length) return;
    fill(get("method"), found.map((one) => one.name), chosen);
    const { says, tokens, values } = found[chosen], box = get("shares");
    const largest = values.reduce((a, b) => Math.max(a, Math.abs(b)), 0) || 1;
    get("of").textContent = `${says} Blue speaks for it, orange against it.`;
    get("share").textContent = "Point at a token for its number.";
    box.textContent = "";
    tokens.forEach((token, i) => {
      const span = make("span", box, token.trim() || /\n/.test(token) ? visible(token) : token, "ask");
      if (values[i]) span.style.background = colour(0.8 * values[i] / largest);
      span.addEventListener("mouseenter", () => { get("share").textContent = `${quoted(token)} (${i}): ${number(values[i])}`; });
    });
  }

  // All pictures small, where they are not too many numbers.
  async function thumbnails() {
    const box = get("all"), r = state.row;
    box.textContent = "";
    const cells = row().maps.reduce((sum, one) => sum + one.heads.length * one.shape[0] * one.shape[1], 0);
    const many = cells > MANY || row().maps.reduce((sum, one) => sum + one.heads.length, 0) > 200;
    get("many").hidden = !many;
    if (many) return;
    for (const [m, one] of row().maps.entries()) for (let h = 0; h < one.heads.length; h++) {
      const button = make("button", box);
      button.type = "button";
      button.dataset.key = `${m} ${h}`;
      const canvas = make("canvas", button), [T, S] = one.shape, scale = window.devicePixelRatio || 1;
      const w = SMALL, high = Math.max(12, Math.min(2 * SMALL, Math.round(SMALL * T / S)));
      canvas.width = w * scale;
      canvas.height = high * scale;
      canvas.style.width = `${w}px`;
      canvas.style.height = `${high}px`;
      make("span", button, `${mapName(one)}, ${one.heads[h].name}`);
      button.addEventListener("click", () => { chooseMap(m, h); mark(); get("box").scrollIntoView({ block: "nearest" }); });
      const found = await picture(r, m, h);
      if (r !== state.row) return;
      paint(canvas.getContext("2d"), found, one.shape, [0, 0, w * scale, high * scale], false);
    }
    mark();
  }

  function mark() {
    for (const button of get("all").children) button.setAttribute("aria-pressed", button.dataset.key === `${state.map} ${state.head}`);
  }

  get("row").addEventListener("change", (event) => chooseRow(Number(event.target.value)));
  get("map").addEventListener("change", (event) => { chooseMap(Number(event.target.value)); mark(); });
  get("head").addEventListener("change", (event) => {
    state.head = Number(event.target.value);
    draw();
    mark();
    if (state.at) show(state.at);
  });
  get("method").addEventListener("change", (event) => contributed(Number(event.target.value)));
  get("own").addEventListener("change", draw);
  get("canvas").addEventListener("mousemove", point);
  get("canvas").addEventListener("click", (event) => {
    const at = drawn && place(event);
    if (at) { state.pinned = true; show({ t: at[0] }); point(event); }
  });
  const redraw = () => { draw(); contributed(Number(get("method").value)); thumbnails(); if (state.at) show(state.at); };
  let timer = 0;
  window.addEventListener("resize", () => { clearTimeout(timer); timer = setTimeout(draw, 150); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  fill(get("row"), data.rows.map((one, i) => `${i + 1}: ${one.label}`), 0);
  chooseRow(0);
})();
