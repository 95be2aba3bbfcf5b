const trace = JSON.parse(document.getElementById("trace").textContent);
const area = $("replay") ?? document; // where keys move through a decoding: in a longer page, one section
const state = { row: 0, done: 0, view: "step", timer: null }; // done: forwards that have run
let chips = []; // one per response position
let map = null; // geometry of the heat map

// The rows as they are drawn, with what the page has besides.
const words = trace.words.map((text, index) => ({ text, end: trace.ends.includes(index) }));
trace.rows = trace.rows.map((given) => {
  const decoding = trace.decodings[given.decoding];
  const row = newRow(given.words.length, { revises: decoding.mode === "revising", readings: trace.readings });
  for (const forward of given.forwards) addForward(row, { ...forward, words: forward.words.map((index) => words[index]) });
  // Without a prediction: given, or filled in at an early stop, or behind an end token, there also over others.
  row.held.forEach((tokens, offset) => {
    const word = words[given.words[offset]], step = given.commit_step[offset];
    if (tokens.at(-1)?.word !== word) tokens.push({ word, p: given.confidence[offset], step, filled: true });
  });
  row.over = true;
  return { ...given, ...row, words: given.words.map((index) => words[index]), decoding };
});
const revising = trace.rows.some((row) => row.revises);
const describe = (offset) => chipInWords(trace.rows[state.row], offset, state.done);
const describeReading = (offset, forward) => cellInWords(trace.rows[state.row], offset, forward);

// ---- page --------------------------------------------------------------------------------------
function showRow(index) {
  state.row = index;
  const row = trace.rows[index];
  $("row").value = index;
  $("subject").textContent = row.subject;
  $("subject").hidden = !row.subject;
  pairs($("settings"), Object.entries(row.decoding).map(([name, value]) => [name, String(value)]));
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
    const piece = word.end ? "∎" : row.pieces[offset];
    const parts = newChip(), { chip } = parts;
    // The final word, unseen, keeps the place as wide as it will be: nothing moves in the replay.
    chip.prepend(element("span", "ghost", wordText(word)));
    chip.addEventListener("pointermove", (event) => tip(event, describe(offset)));
    chip.addEventListener("pointerleave", () => tip());
    $("response").append(word.end || /^\s/.test(piece) ? " " : "\u200b", chip); // where a line may break
    if (!word.end && piece.includes("\n")) $("response").append(element("br"));
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
  chips.forEach((parts, offset) => drawChip(parts, row, offset, state.done, state.view));
  drawStatus(row);
  $("legend").replaceChildren(...chipLegend(row, state.view));
  drawMap();
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

function drawMap() {
  if (!trace.rows.length) return;
  const row = trace.rows[state.row];
  const blockLength = row.commit_step.some((step) => step < 0) ? Infinity : row.decoding.block_length; // gaps have their own blocks
  map = drawHeatMap($("map"), row, state.done, blockLength);
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
$("map-legend").append(...mapLegend(revising, trace.readings));
$("row").addEventListener("change", (event) => { pause(); showRow(Number(event.target.value)); });
$("play").addEventListener("click", play);
$("time").addEventListener("input", (event) => jump(Number(event.target.value)));
for (const radio of document.getElementsByName("view")) {
  radio.addEventListener("change", () => { state.view = radio.value; show(state.done); });
}
$("map").addEventListener("click", (event) => { const cell = cellAt(event, $("map"), map); if (cell.inside) jump(cell.forward + 1); });
$("map").addEventListener("pointermove", (event) => {
  const cell = cellAt(event, $("map"), map);
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
