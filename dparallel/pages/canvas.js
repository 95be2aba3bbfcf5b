"use strict";
// The drawing of canvases that fill: the tokens, and the map of all forward passes and positions.
//
// A word is { text, end }; `end` marks the end of a response. A row is a decoding:
//   revises   whether committed tokens may change
//   readings  whether all predictions of its forwards are known, or only the tokens that they committed
//   over      whether no forward follows
//   read      per forward a Map from position to what was read there: { word, p, entropy, commit, before }
//   commits   per forward what it committed or changed, each as [position, reading]
//   held      per position the tokens that it held one after the other: { word, p, step, before, filled }
// `before` is the token that a forward found at a position; a token is `filled` in without a prediction, and text that
// was given has step -1. A row is drawn after `done` of its forwards.
const $ = (id) => document.getElementById(id);

function newRow(positions, { revises = false, readings = true } = {}) {
  return { revises, readings, over: false, read: [], commits: [], held: Array.from({ length: positions }, () => []) };
}

// `forward` has, each with an entry for every position read: offsets, words, probability, commit, entropy or not.
function addForward(row, forward) {
  const step = nfe(row), at = new Map();
  forward.offsets.forEach((offset, i) => {
    const reading = {
      word: forward.words[i], p: forward.probability[i], entropy: forward.entropy?.[i],
      commit: Boolean(forward.commit[i]), before: row.held[offset].at(-1),
    };
    at.set(offset, reading);
    if (reading.commit) row.held[offset].push({ word: reading.word, p: reading.p, step, before: reading.before });
  });
  row.read.push(at);
  row.commits.push([...at].filter(([, reading]) => reading.commit));
}

const nfe = (row) => row.read.length;
// The token that a position holds after `done` forwards; undefined while it is masked.
const holding = (row, offset, done) => row.held[offset].findLast((token) => token.step < done);
const isGiven = (token) => token.step < 0;
const isChange = (reading) => reading.commit && reading.before !== undefined;

// ---- colours -----------------------------------------------------------------------------------
// Both ramps change lightness steadily, so that they also read in grey and with any colour vision.
const onTop = (lightness) => (lightness < 0.57 ? "#fff" : "#000");
function stepColour(share) { // first forward: deep violet; last: yellow
  const lightness = 0.42 + 0.48 * share;
  return { fill: `oklch(${lightness} 0.125 ${295 - 195 * share})`, ink: onTop(lightness) };
}
function confidenceColour(p) { // 0: amber, through rose, 1: blue
  const lightness = 0.86 - 0.4 * p;
  return { fill: `oklch(${lightness} 0.135 ${80 - 175 * p})`, ink: onTop(lightness) };
}
const gradient = (colour) =>
  `linear-gradient(90deg in oklab, ${[0, 0.25, 0.5, 0.75, 1].map((x) => colour(x).fill).join(", ")})`;

// ---- words -------------------------------------------------------------------------------------
const visible = (text) => text.replace(/\n/g, "↵").replace(/\t/g, "⇥").trim() || (text ? "␣" : "◌");
const wordText = (word) => (word.end ? "∎" : visible(word.text));
const percent = (p) => `${(100 * p).toFixed(1)} %`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function pairs(list, entries) {
  list.replaceChildren(...entries.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    return pair;
  }));
}

// ---- tokens ------------------------------------------------------------------------------------
function newChip() {
  const parts = { chip: element("span", "token"), face: element("span", "face"), note: element("span", "note") };
  parts.chip.append(parts.face, parts.note);
  return parts;
}

// `view` is what colours mean: "step", the forward that committed a token, or "confidence".
function drawChip({ chip, face, note }, row, offset, done, view) {
  const token = holding(row, offset, done);
  const reading = done > 0 && !token ? row.read[done - 1].get(offset) : undefined;
  let names = "token", fill = "", ink = "", text = "·", small = "";
  if (token) {
    ({ fill, ink } = isGiven(token) ? { fill: "", ink: "" } : token.filled
      ? { fill: "var(--fixed)", ink: "var(--muted)" }
      : view === "step" ? stepColour(token.step / Math.max(1, nfe(row) - 1)) : confidenceColour(token.p));
    text = wordText(token.word);
    if (!token.filled) small = (view === "step" ? token.step + 1 : Math.round(100 * token.p)) + (token.before ? "↻" : "");
    if (token.before) names += " changed";
    if (token.step === done - 1 && !isGiven(token) && !(row.over && done === nfe(row))) names += " new";
  } else {
    names += " masked";
    if (reading) {
      names += " read";
      text = wordText(reading.word);
      small = `${Math.round(100 * reading.p)}%`;
    }
  }
  const look = `${names}|${fill}|${text}|${small}`; // most tokens look as before
  if (chip.look === look) return;
  chip.look = look;
  chip.className = names;
  face.style.background = fill;
  face.style.color = ink;
  face.textContent = text;
  note.textContent = small;
}

function scale(from, to, colour) {
  const entry = element("span", "", from);
  const bar = element("i", "scale");
  bar.style.background = gradient(colour);
  entry.append(bar, to);
  return entry;
}

function swatch(className, text, fill) {
  const entry = element("span");
  const box = element("i", `swatch ${className}`);
  if (fill) box.style.background = fill;
  entry.append(box, text);
  return entry;
}

function chipLegend(row, view) {
  return [
    view === "step"
      ? scale("forward 1", String(nfe(row)), stepColour)
      : scale("confidence at commit 0 %", "100 %", confidenceColour),
    element("span", "", view === "step" ? `small number: forward that ${row.revises ? "last changed" : "committed"} it` : "small number: confidence in %"),
    ...(row.revises && row.readings ? [element("span", "", "↻ and a dashed line: another token was committed there before")] : []),
    ...(row.readings ? [element("span", "", "italic: still masked, likeliest token and its probability")] : []),
    element("span", "", "∎ end of text"),
  ];
}

function mapLegend(revises, readings) {
  return [
    scale("probability 0 %", "100 %", confidenceColour),
    swatch("dot", "committed by this forward", confidenceColour(0.9).fill),
    ...(revises && readings ? [swatch("ring", "changed by this forward", confidenceColour(0.9).fill)] : []),
    swatch("fixed", "committed before"),
    swatch("unread", readings ? "not read" : "still masked"),
  ];
}

// ---- in words ----------------------------------------------------------------------------------
const verb = (row, token) => (token.before ? "changed" : row.revises && !row.readings ? "last changed" : "committed");
const was = (token) => (token.before ? `\nbefore: “${wordText(token.before.word)}”, by forward ${token.before.step + 1}` : "");

function chipInWords(row, offset, done) {
  const token = holding(row, offset, done);
  if (!token) return cellInWords(row, offset, done - 1);
  const how = isGiven(token) ? "given" : token.filled
    ? `filled in at forward ${token.step + 1}, behind the end`
    : `${verb(row, token)} by forward ${token.step + 1}${was(token)}\nconfidence ${percent(token.p)}`;
  return `“${wordText(token.word)}”\nposition ${offset + 1}, ${how}`;
}

function cellInWords(row, offset, forward) {
  const reading = forward < 0 ? undefined : row.read[forward].get(offset);
  if (reading) {
    return `“${wordText(reading.word)}”\nposition ${offset + 1}, forward ${forward + 1}` +
      `\nprobability ${percent(reading.p)}` + (reading.entropy === undefined ? "" : `, entropy ${reading.entropy.toFixed(2)} nats`) +
      (reading.commit ? `\n${verb(row, reading)}${was(reading)}` : reading.before ? "\nunchanged" : "");
  }
  const where = `position ${offset + 1}`;
  const token = holding(row, offset, Math.max(0, forward));
  if (token && isGiven(token)) return `“${wordText(token.word)}”\n${where}, given`;
  if (forward < 0) return `${where}\nmasked`;
  if (token) return `“${wordText(token.word)}”\n${where}, ${verb(row, token)} by forward ${token.step + 1}`;
  return `${where}, forward ${forward + 1}\nmasked${row.readings ? ", not read" : ""}`;
}

function tip(event, text) {
  const box = $("tip");
  box.hidden = !event;
  if (!event) return;
  box.textContent = text;
  box.style.left = `${Math.min(event.clientX + 14, innerWidth - box.offsetWidth - 8)}px`;
  const below = event.clientY + 18;
  box.style.top = `${below + box.offsetHeight > innerHeight ? event.clientY - box.offsetHeight - 12 : below}px`;
}

// ---- heat map ----------------------------------------------------------------------------------
// The cells of the map as an image with a pixel each; colours are parsed a hundred times, not once a cell.
function cellPixels(row, fixed) {
  const palette = newImage(102, 1), pen = palette.getContext("2d", { willReadFrequently: true });
  for (let shade = 0; shade <= 101; shade++) {
    pen.fillStyle = shade <= 100 ? confidenceColour(shade / 100).fill : fixed;
    pen.fillRect(shade, 0, 1, 1);
  }
  const colours = new Uint32Array(pen.getImageData(0, 0, 102, 1).data.buffer);
  const columns = row.held.length, rows = Math.max(1, nfe(row));
  const image = new ImageData(Math.max(1, columns), rows), cells = new Uint32Array(image.data.buffer);
  row.held.forEach(([first], offset) => {
    for (let forward = first ? first.step + 1 : rows; forward < rows; forward++) cells[forward * columns + offset] = colours[101];
  });
  row.read.forEach((at, forward) => {
    for (const [offset, reading] of at) cells[forward * columns + offset] = colours[Math.round(100 * reading.p)];
  });
  const drawn = newImage(image.width, rows);
  drawn.getContext("2d").putImageData(image, 0, 0);
  return drawn;
}

const newImage = (width, height) => Object.assign(document.createElement("canvas"), { width, height });

// Draws one line per forward and returns the geometry; `tallest` is the height in pixels that it is given.
function drawHeatMap(canvas, row, done, blockLength, tallest = 560) {
  const columns = row.held.length, rows = nfe(row), ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const left = 44, top = 18, right = 84;
  const cellWidth = (width - left - right) / columns;
  const cellHeight = Math.max(3, Math.min(22, cellWidth, tallest / rows));
  const height = top + rows * cellHeight + 4;
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const style = getComputedStyle(document.documentElement);
  const [ink, muted, line, fixed] = ["--ink", "--muted", "--line", "--fixed"].map((name) => style.getPropertyValue(name));
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = `11px ${style.getPropertyValue("--mono")}`;
  const gap = cellHeight > 6 ? 1 : 0;

  // 1. Cells, a pixel each: read, or fixed before; then the gaps between them.
  pen.imageSmoothingEnabled = false;
  pen.drawImage(cellPixels(row, fixed), left, top, columns * cellWidth, rows * cellHeight);
  for (let offset = 1; gap && offset <= columns; offset++) pen.clearRect(left + offset * cellWidth - gap, top, gap, rows * cellHeight);
  for (let forward = 1; gap && forward <= rows; forward++) pen.clearRect(left, top + forward * cellHeight - gap, columns * cellWidth, gap);

  // 2. What each forward committed (a dot) or changed (a ring).
  const most = Math.max(1, ...row.commits.map((found) => found.length));
  row.commits.forEach((found, forward) => {
    const y = top + forward * cellHeight;
    for (const [offset, reading] of found) {
      const size = Math.max(0.8, Math.min(cellWidth, cellHeight) * (isChange(reading) ? 0.3 : 0.16));
      pen.fillStyle = pen.strokeStyle = confidenceColour(reading.p).ink;
      pen.lineWidth = size / 2;
      pen.beginPath();
      pen.arc(left + offset * cellWidth + (cellWidth - gap) / 2, y + (cellHeight - gap) / 2, size, 0, 2 * Math.PI);
      if (isChange(reading)) pen.stroke();
      else pen.fill();
    }
    // 3. Beside each forward: its number and how many tokens it committed.
    const bar = (right - 40) * found.length / most;
    pen.fillStyle = muted;
    pen.globalAlpha = 0.55;
    pen.fillRect(width - right + 8, y + cellHeight * 0.2, bar, Math.max(1, cellHeight * 0.5));
    pen.globalAlpha = 1;
    const every = Math.ceil(13 / cellHeight);
    pen.textBaseline = "middle";
    if (forward % every === 0 || forward === done - 1) {
      const current = forward === done - 1;
      if (!current && Math.abs(forward - done + 1) < every) return;
      pen.fillStyle = current ? ink : muted;
      pen.textAlign = "right";
      pen.fillText(String(forward + 1), left - 8, y + cellHeight / 2);
      pen.textAlign = "left";
      pen.fillText(String(found.length), width - right + 12 + bar, y + cellHeight / 2);
    }
  });

  // 4. Block borders, captions and the forward shown.
  pen.fillStyle = muted;
  pen.textAlign = "left";
  pen.textBaseline = "alphabetic";
  for (let start = 0; start < columns; start += blockLength) {
    const x = left + start * cellWidth;
    pen.fillStyle = muted;
    pen.fillText(String(start + 1), x, top - 6);
    if (start === 0) continue;
    pen.fillStyle = line;
    pen.fillRect(x - gap / 2 - 0.5, top - 4, 1, rows * cellHeight + 4);
  }
  pen.fillStyle = muted;
  pen.fillText("committed", width - right + 8, top - 6);
  if (done > 0) {
    pen.strokeStyle = ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(left - 2, top + (done - 1) * cellHeight - 1.5, columns * cellWidth + 3, cellHeight + 2);
  }
  canvas.setAttribute("aria-label",
    `Heat map of ${rows} forwards by ${columns} positions, coloured by the probability of the likeliest token; ` +
    `forward ${done} is shown. Use the slider to move between forwards.`);
  return { left, top, cellWidth, cellHeight, columns, rows };
}

function cellAt(event, canvas, map) {
  const box = canvas.getBoundingClientRect();
  const offset = Math.floor((event.clientX - box.left - map.left) / map.cellWidth);
  const forward = Math.floor((event.clientY - box.top - map.top) / map.cellHeight);
  return { offset, forward, inside: offset >= 0 && offset < map.columns && forward >= 0 && forward < map.rows };
}
