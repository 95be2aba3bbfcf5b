"use strict";
const trace = JSON.parse(document.getElementById("trace").textContent);
const $ = (id) => document.getElementById(id);
const area = $("replay") ?? document; // where keys move through a decoding: in a longer page, one section
const state = { row: 0, done: 0, view: "step", timer: null }; // done: forwards that have run
let chips = []; // one per response position
let map = null; // geometry of the heat map

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
const wordText = (word) => (trace.ends.includes(word) ? "∎" : visible(trace.words[word]));
const percent = (p) => `${(100 * p).toFixed(1)} %`;
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const nfe = (row) => row.forwards.length;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

// A row as looked up while drawing: per forward a Map from position to what was read there, and per position
// the tokens that it held one after the other. `before` is the token that a forward found there.
for (const row of trace.rows) {
  row.held = row.words.map(() => []);
  row.read = row.forwards.map((forward, step) => {
    const at = new Map();
    forward.offsets.forEach((offset, i) => {
      const reading = {
        word: forward.words[i], p: forward.probability[i], entropy: forward.entropy[i],
        commit: forward.commit[i] === 1, before: row.held[offset].at(-1),
      };
      at.set(offset, reading);
      if (reading.commit) row.held[offset].push({ word: reading.word, p: reading.p, step, before: reading.before });
    });
    return at;
  });
  // Filled in without a prediction: at an early stop, or behind an end token, there also over other tokens.
  row.held.forEach((tokens, offset) => {
    const word = row.words[offset], step = row.commit_step[offset];
    if (tokens.at(-1)?.word !== word) tokens.push({ word, p: row.confidence[offset], step, filled: true });
  });
  row.revises = trace.decodings[row.decoding].mode === "revising";
}
const revising = trace.rows.some((row) => row.revises);
// The token that a position holds after `done` forwards; undefined while it is masked.
const holding = (row, offset, done) => row.held[offset].findLast((token) => token.step < done);
const isChange = (reading) => reading.commit && reading.before !== undefined;

// ---- page --------------------------------------------------------------------------------------
function pairs(list, entries) {
  list.replaceChildren(...entries.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", "", name), element("dd", "", value));
    return pair;
  }));
}

function showRow(index) {
  state.row = index;
  const row = trace.rows[index];
  $("row").value = index;
  $("subject").textContent = row.subject;
  $("subject").hidden = !row.subject;
  pairs($("settings"), Object.entries(trace.decodings[row.decoding]).map(([name, value]) => [name, String(value)]));
  const sure = row.confidence.filter((_, offset) => !row.held[offset].at(-1).filled);
  pairs($("summary"), [
    ["forwards (NFE)", nfe(row)],
    ["tokens", row.num_tokens],
    ["tokens per forward (TPF)", (row.num_tokens / nfe(row)).toFixed(2)],
    ["mean confidence", percent(sure.reduce((sum, p) => sum + p, 0) / sure.length)],
    ["lowest confidence", percent(Math.min(...sure))],
    ...(row.revises && trace.readings
      ? [["changes of committed tokens", row.read.flatMap((at) => [...at.values()].filter(isChange)).length]] : []),
  ]);
  $("prompt").textContent = row.prompt;
  $("time").max = nfe(row);
  $("response").replaceChildren();
  chips = row.words.map((word, offset) => {
    const end = trace.ends.includes(word);
    const piece = end ? "∎" : row.pieces[offset];
    const chip = element("span", "token");
    // The final word, unseen, keeps the place as wide as it will be: nothing moves in the replay.
    const parts = { chip, face: element("span", "face"), note: element("span", "note") };
    chip.append(element("span", "ghost", wordText(word)), parts.face, parts.note);
    chip.addEventListener("pointermove", (event) => tip(event, describe(offset)));
    chip.addEventListener("pointerleave", () => tip());
    $("response").append(end || /^\s/.test(piece) ? " " : "\u200b", chip); // where a line may break
    if (!end && piece.includes("\n")) $("response").append(element("br"));
    return parts;
  });
  show(nfe(row));
}

function show(done) {
  const row = trace.rows[state.row];
  state.done = Math.max(0, Math.min(nfe(row), done));
  $("time").value = state.done;
  $("time").setAttribute("aria-valuetext", `${state.done} of ${nfe(row)} forwards done`);
  $("clock").textContent = state.done ? `forward ${state.done} of ${nfe(row)}` : "before the first";
  chips.forEach(drawChip);
  drawStatus(row);
  drawLegend(row);
  drawMap();
}

function drawChip({ chip, face, note }, offset) {
  const row = trace.rows[state.row];
  const token = holding(row, offset, state.done);
  const reading = state.done > 0 && !token ? row.read[state.done - 1].get(offset) : undefined;
  chip.className = "token";
  face.style.background = face.style.color = "";
  if (token) {
    const { fill, ink } = token.filled
      ? { fill: "var(--fixed)", ink: "var(--muted)" }
      : state.view === "step" ? stepColour(token.step / Math.max(1, nfe(row) - 1)) : confidenceColour(token.p);
    face.style.background = fill;
    face.style.color = ink;
    face.textContent = wordText(token.word);
    note.textContent = token.filled ? "" : (state.view === "step" ? token.step + 1 : Math.round(100 * token.p)) + (token.before ? "↻" : "");
    if (token.before) chip.classList.add("changed");
    if (token.step === state.done - 1 && state.done < nfe(row)) chip.classList.add("new");
  } else {
    chip.classList.add("masked");
    if (reading) chip.classList.add("read");
    face.textContent = reading ? wordText(reading.word) : "·";
    note.textContent = reading ? `${Math.round(100 * reading.p)}%` : "";
  }
}

function drawStatus(row) {
  const masked = row.words.filter((_, offset) => !holding(row, offset, state.done)).length;
  if (state.done === 0) {
    $("status").textContent = `All ${plural(masked, "position")} are masked.`;
    return;
  }
  const read = [...row.read[state.done - 1].values()];
  const entropy = read.reduce((sum, each) => sum + each.entropy, 0) / read.length;
  const filled = row.held.filter((tokens) => tokens.at(-1).filled && tokens.at(-1).step === state.done - 1).length;
  $("status").textContent =
    (trace.readings ? `Read ${plural(read.length, row.revises ? "position" : "masked position")}, mean entropy ${entropy.toFixed(2)} nats; committed ` : "Committed ") +
    plural(read.filter((each) => each.commit && !isChange(each)).length, "token") +
    (row.revises && trace.readings ? `, changed ${plural(read.filter(isChange).length, "committed token")}` : "") +
    (filled ? `, filled ${filled} with end-of-text` : "") + `; ${masked} still masked.`;
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

function drawLegend(row) {
  $("legend").replaceChildren(
    state.view === "step"
      ? scale("forward 1", String(nfe(row)), stepColour)
      : scale("confidence at commit 0 %", "100 %", confidenceColour),
    element("span", "", state.view === "step" ? `small number: forward that ${row.revises ? "last changed" : "committed"} it` : "small number: confidence in %"),
    ...(row.revises && trace.readings ? [element("span", "", "↻ and a dashed line: another token was committed there before")] : []),
    ...(trace.readings ? [element("span", "", "italic: still masked, likeliest token and its probability")] : []),
    element("span", "", "∎ end of text"),
  );
}

const verb = (row, token) => (token.before ? "changed" : row.revises && !trace.readings ? "last changed" : "committed");
const was = (token) => (token.before ? `\nbefore: “${wordText(token.before.word)}”, by forward ${token.before.step + 1}` : "");

function describe(offset) {
  const row = trace.rows[state.row];
  const token = holding(row, offset, state.done);
  if (token) {
    const how = token.filled
      ? `filled in at forward ${token.step + 1}, behind the end`
      : `${verb(row, token)} by forward ${token.step + 1}${was(token)}\nconfidence ${percent(token.p)}`;
    return `“${wordText(token.word)}”\nposition ${offset + 1}, ${how}`;
  }
  return describeReading(offset, state.done - 1);
}

function describeReading(offset, forward) {
  const row = trace.rows[state.row];
  const reading = forward < 0 ? undefined : row.read[forward].get(offset);
  if (reading) {
    return `“${wordText(reading.word)}”\nposition ${offset + 1}, forward ${forward + 1}` +
      `\nprobability ${percent(reading.p)}` + (trace.readings ? `, entropy ${reading.entropy.toFixed(2)} nats` : "") +
      (reading.commit ? `\n${verb(row, reading)}${was(reading)}` : reading.before ? "\nunchanged" : "");
  }
  const where = `position ${offset + 1}`;
  if (forward < 0) return `${where}\nmasked`;
  const token = holding(row, offset, forward);
  if (token) return `“${wordText(token.word)}”\n${where}, ${verb(row, token)} by forward ${token.step + 1}`;
  return `${where}, forward ${forward + 1}\nmasked${trace.readings ? ", not read" : ""}`;
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
function drawMap() {
  if (!trace.rows.length) return;
  const row = trace.rows[state.row];
  const columns = row.words.length, rows = nfe(row);
  const canvas = $("map"), ratio = devicePixelRatio || 1;
  const width = canvas.clientWidth;
  const left = 44, top = 18, right = 84;
  const cellWidth = (width - left - right) / columns;
  const cellHeight = Math.max(3, Math.min(22, cellWidth, 560 / rows));
  const height = top + rows * cellHeight + 4;
  map = { left, top, cellWidth, cellHeight, columns, rows };
  canvas.style.height = `${height}px`;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const style = getComputedStyle(document.documentElement);
  const [ink, muted, line, fixed] = ["--ink", "--muted", "--line", "--fixed"].map((name) => style.getPropertyValue(name));
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  pen.font = `11px ${style.getPropertyValue("--mono")}`;
  const gap = cellHeight > 6 ? 1 : 0;
  const most = Math.max(1, ...row.read.map((at) => [...at.values()].filter((each) => each.commit).length));

  // 1. Cells: read, read and committed (a dot) or changed (a ring), or fixed before.
  row.read.forEach((at, forward) => {
    const y = top + forward * cellHeight;
    let commits = 0;
    for (let offset = 0; offset < columns; offset++) {
      const x = left + offset * cellWidth;
      const reading = at.get(offset);
      if (!reading && !holding(row, offset, forward)) continue;
      const { fill, ink: dot } = reading ? confidenceColour(reading.p) : { fill: fixed };
      pen.fillStyle = fill;
      pen.fillRect(x, y, cellWidth - gap, cellHeight - gap);
      if (!reading?.commit) continue;
      commits += 1;
      const size = Math.max(0.8, Math.min(cellWidth, cellHeight) * (isChange(reading) ? 0.3 : 0.16));
      pen.fillStyle = pen.strokeStyle = dot;
      pen.lineWidth = size / 2;
      pen.beginPath();
      pen.arc(x + (cellWidth - gap) / 2, y + (cellHeight - gap) / 2, size, 0, 2 * Math.PI);
      if (isChange(reading)) pen.stroke();
      else pen.fill();
    }
    // 2. Beside each forward: its number and how many tokens it committed.
    const bar = (right - 40) * commits / most;
    pen.fillStyle = muted;
    pen.globalAlpha = 0.55;
    pen.fillRect(width - right + 8, y + cellHeight * 0.2, bar, Math.max(1, cellHeight * 0.5));
    pen.globalAlpha = 1;
    const every = Math.ceil(13 / cellHeight);
    pen.textBaseline = "middle";
    if (forward % every === 0 || forward === state.done - 1) {
      const current = forward === state.done - 1;
      if (!current && Math.abs(forward - state.done + 1) < every) return;
      pen.fillStyle = current ? ink : muted;
      pen.textAlign = "right";
      pen.fillText(String(forward + 1), left - 8, y + cellHeight / 2);
      pen.textAlign = "left";
      pen.fillText(String(commits), width - right + 12 + bar, y + cellHeight / 2);
    }
  });

  // 3. Block borders, captions and the forward shown.
  pen.fillStyle = muted;
  pen.textAlign = "left";
  pen.textBaseline = "alphabetic";
  for (let start = 0; start < columns; start += trace.decodings[row.decoding].block_length) {
    const x = left + start * cellWidth;
    pen.fillStyle = muted;
    pen.fillText(String(start + 1), x, top - 6);
    if (start === 0) continue;
    pen.fillStyle = line;
    pen.fillRect(x - gap / 2 - 0.5, top - 4, 1, rows * cellHeight + 4);
  }
  pen.fillStyle = muted;
  pen.fillText("committed", width - right + 8, top - 6);
  if (state.done > 0) {
    pen.strokeStyle = ink;
    pen.lineWidth = 1.5;
    pen.strokeRect(left - 2, top + (state.done - 1) * cellHeight - 1.5, columns * cellWidth + 3, cellHeight + 2);
  }
  canvas.setAttribute("aria-label",
    `Heat map of ${rows} forwards by ${columns} positions, coloured by the probability of the likeliest token; ` +
    `forward ${state.done} is shown. Use the slider to move between forwards.`);
}

function cellAt(event) {
  const box = $("map").getBoundingClientRect();
  const offset = Math.floor((event.clientX - box.left - map.left) / map.cellWidth);
  const forward = Math.floor((event.clientY - box.top - map.top) / map.cellHeight);
  return { offset, forward, inside: offset >= 0 && offset < map.columns && forward >= 0 && forward < map.rows };
}

// ---- time --------------------------------------------------------------------------------------
function play() {
  if (state.timer) return pause();
  const total = nfe(trace.rows[state.row]);
  if (state.done === total) show(0);
  $("play").textContent = "Pause";
  $("status").setAttribute("aria-live", "off"); // not one announcement per forward
  state.timer = setInterval(() => {
    show(state.done + 1);
    if (state.done >= total) pause();
  }, Math.max(60, Math.min(600, 12000 / total)));
}

function pause() {
  clearInterval(state.timer);
  state.timer = null;
  $("play").textContent = "Play";
  $("status").setAttribute("aria-live", "polite");
}

function jump(done) {
  pause();
  show(done);
}

// ---- wiring ------------------------------------------------------------------------------------
$("chooser").hidden = trace.rows.length < 2;
trace.rows.forEach((row, index) => {
  const option = element("option", "", row.label);
  option.value = index;
  $("row").append(option);
});
$("map-legend").append(
  scale("probability 0 %", "100 %", confidenceColour),
  swatch("dot", "committed by this forward", confidenceColour(0.9).fill),
  ...(revising && trace.readings ? [swatch("ring", "changed by this forward", confidenceColour(0.9).fill)] : []),
  swatch("fixed", "committed before"),
  swatch("unread", trace.readings ? "not read" : "still masked"),
);
$("row").addEventListener("change", (event) => { pause(); showRow(Number(event.target.value)); });
$("play").addEventListener("click", play);
$("time").addEventListener("input", (event) => jump(Number(event.target.value)));
for (const radio of document.getElementsByName("view")) {
  radio.addEventListener("change", () => { state.view = radio.value; show(state.done); });
}
$("map").addEventListener("click", (event) => { const cell = cellAt(event); if (cell.inside) jump(cell.forward + 1); });
$("map").addEventListener("pointermove", (event) => {
  const cell = cellAt(event);
  tip(cell.inside ? event : undefined, cell.inside ? describeReading(cell.offset, cell.forward) : "");
});
$("map").addEventListener("pointerleave", () => tip());
area.addEventListener("keydown", (event) => {
  if (event.altKey || event.ctrlKey || event.metaKey || event.target === $("row")) return;
  if (event.target.name === "view" && event.key !== "Home" && event.key !== "End") return; // arrows choose there
  const moves = { ArrowLeft: state.done - 1, ArrowRight: state.done + 1, Home: 0, End: Infinity };
  if (event.key in moves) jump(moves[event.key]);
  else if (event.key === " ") play();
  else return;
  event.preventDefault();
});
addEventListener("resize", drawMap);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
if (trace.rows.length) showRow(0);
