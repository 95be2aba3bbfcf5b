
// ---- the conversation --------------------------------------------------------------------------
// A turn is { prompt, answers }: answers by the number of their pane.
const page = { models: [], panes: [], turns: [], stop: null, timer: null };
const inUse = () => page.panes.filter((pane) => !pane.root.hidden);

// The turns that a pane's model has answered there, and the new prompt, as a chat.
function messages(pane, prompt) {
  const system = $("system").value.trim(), chat = system ? [{ role: "system", content: system }] : [];
  for (const turn of page.turns) {
    const answer = turn.answers[pane.number];
    if (!answer?.text || answer.model !== pane.model.id) continue;
    chat.push({ role: "user", content: turn.prompt }, { role: "assistant", content: answer.text });
  }
  return [...chat, { role: "user", content: prompt }];
}

function request(pane, prompt) {
  return pane.model.chat
    ? ["v1/chat/completions", { messages: messages(pane, prompt) }]
    : ["v1/completions", { prompt }];
}

async function send(prompt) {
  endReplay();
  const panes = inUse(), requests = panes.map((pane) => request(pane, prompt));
  const turn = { prompt, answers: {} };
  page.turns.push(turn);
  const shown = element("article", "turn"), question = element("p", "question", prompt);
  shown.append(question);
  for (const pane of panes) {
    turn.answers[pane.number] = new Answer(pane.model);
    shown.append(newCard(pane, turn.answers[pane.number]));
  }
  $("turns").append(shown);
  page.stop = new AbortController();
  drawButtons();
  $("comparison").hidden = true;
  $("turns").scrollTop = $("turns").scrollHeight;
  if (matchMedia("(max-width: 60rem)").matches) $("stage").scrollIntoView();
  const ask = (pane, i) => pane.ask(turn.answers[pane.number], ...requests[i], page.stop.signal);
  let refused = null;
  try {
    if ($("in-turn").checked) {
      for (const [i, pane] of panes.entries()) {
        turn.answers[pane.number].started = performance.now();
        await ask(pane, i);
      }
    } else {
      const ends = await Promise.allSettled(panes.map(ask));
      refused = ends.find((end) => end.status === "rejected")?.reason;
    }
  } catch (error) {
    refused = error;
  }
  for (const pane of panes) {
    const answer = turn.answers[pane.number];
    if (!answer.running) continue;
    answer.end(inWords(refused));
    pane.changed(answer);
  }
  page.stop = null;
  drawButtons();
  compare(turn);
  if (refused?.status === 401) askForKey(refused.message);
  else $("prompt").focus({ preventScroll: true });
}

// An answer in the conversation; `drawCard` brings it up to date.
function newCard(pane, answer) {
  const card = element("div", "answer"), head = element("div", "of"), counts = element("span", "counts");
  const text = element("p", "text"), problem = element("p", "problem"), look = element("button", "look", "canvas");
  card.dataset.badge = BADGES[pane.number];
  look.type = "button";
  look.setAttribute("aria-label", `Show the canvas of ${answer.model}'s answer`);
  look.addEventListener("click", () => { endReplay(); pane.look(answer); });
  head.append(element("span", "badge", BADGES[pane.number]), element("b", "", answer.model), counts, look);
  card.append(head, text, problem);
  answer.drawCard = () => {
    const [forwards, tokens, , rate] = answer.counts().map(([, value]) => value);
    counts.textContent = answer.forwards ? `${forwards} forwards, ${tokens} tokens, ${rate} tokens/s` : "";
    if (text.textContent !== answer.text) text.textContent = answer.text;
    problem.hidden = !answer.error;
    problem.textContent = answer.error ?? "";
    card.classList.toggle("running", answer.running);
    look.hidden = !answer.forwards || pane.answer === answer;
  };
  answer.drawCard();
  return card;
}

// What the second model needed beside the first, where both have finished.
function compare(turn) {
  const [a, b] = [turn.answers[0], turn.answers[1]];
  const both = a?.usage?.nfe && b?.usage?.nfe;
  $("comparison").hidden = !both;
  if (!both) return;
  const names = a.model === b.model ? BADGES : [a.model, b.model];
  const [few, many, less, more] = a.usage.nfe <= b.usage.nfe ? [a, b, ...names] : [b, a, names[1], names[0]];
  const times = many.usage.nfe / few.usage.nfe;
  const rates = [few, many].map((answer) => answer.usage.completion_tokens / answer.usage.decode_seconds);
  const passes = ({ usage: { nfe } }) => `${nfe} forward pass${nfe === 1 ? "" : "es"}`;
  const same = a.text === b.text ? "The texts are the same." : "The texts differ.";
  $("comparison").textContent = (times === 1
    ? `Both took ${passes(few)}. `
    : `${less} took ${passes(few)} where ${more} took ${many.usage.nfe}: ${times.toFixed(1)} times fewer, ` +
      `at ${(rates[0] / rates[1]).toFixed(1)} times the tokens/s. `) + same;
}

// ---- replay ------------------------------------------------------------------------------------
// All canvases from their first forward pass on, at the same pace.
function replay() {
  if (page.timer) return endReplay();
  const panes = inUse().filter((pane) => pane.answer && nfe(pane.answer.row));
  const longest = Math.max(...panes.map((pane) => nfe(pane.answer.row)));
  let done = 0;
  const step = () => {
    for (const pane of panes) pane.show(done);
    if (done++ >= longest) endReplay();
  };
  page.timer = setInterval(step, Math.max(60, Math.min(600, 12000 / longest)));
  $("replay").textContent = "Stop replay";
  step();
}

function endReplay() {
  clearInterval(page.timer);
  page.timer = null;
  $("replay").textContent = "Replay";
  for (const pane of page.panes) if (pane.answer) pane.show(Infinity);
}

// ---- wiring ------------------------------------------------------------------------------------
function drawButtons() {
  const running = page.stop !== null;
  $("send").hidden = running;
  $("stop").hidden = !running;
  $("clear").disabled = running || !page.turns.length;
  $("replay").disabled = running || !page.turns.length;
  $("compare").disabled = running;
  for (const pane of page.panes) pane.part(".model").disabled = running;
  $("turns").setAttribute("aria-busy", String(running));
}

function useTwo(two) {
  page.panes[1].root.hidden = !two;
  $("compare").setAttribute("aria-pressed", String(two));
  $("panes").classList.toggle("two", two);
  $("in-turn-part").hidden = !two;
  $("comparison").hidden = true;
  drawHint();
  for (const pane of page.panes) pane.draw();
}

function drawHint() {
  const alone = [...new Set(inUse().filter((pane) => !pane.model.chat).map((pane) => pane.model.id))];
  $("hint").textContent = alone.length
    ? `Enter sends. ${alone.join(" and ")} ${alone.length > 1 ? "have" : "has"} no chat template: each prompt is continued by itself, without the turns before.`
    : "Enter sends, Shift+Enter starts a line, Esc stops. Each model continues its own answers.";
  $("system-part").hidden = !inUse().some((pane) => pane.model.chat);
}

function clear() {
  endReplay();
  page.turns = [];
  $("turns").replaceChildren();
  $("comparison").hidden = true;
  for (const pane of page.panes) pane.empty();
  drawButtons();
  $("prompt").focus();
}

function askForKey(message) {
  $("key-form").hidden = false;
  $("main").hidden = true;
  $("key-message").textContent = access.key ? message : "";
  access.key = "";
  $("key").focus();
}

async function start() {
  $("problem").hidden = true;
  try {
    page.models = await served();
  } catch (error) {
    if (error.status === 401) return askForKey("The server does not accept this key.");
    $("problem").hidden = false;
    $("problem").textContent = inWords(error);
    return;
  }
  $("key-form").hidden = true;
  $("main").hidden = false;
  if (page.panes.length) return; // the key was asked for once more
  for (const number of [0, 1]) {
    const pane = new Pane(number), select = pane.part(".model");
    select.append(...page.models.map((model) => element("option", "", model.id)));
    select.addEventListener("change", () => { pane.use(page.models[select.selectedIndex]); drawHint(); });
    pane.use(page.models[Math.min(number, page.models.length - 1)]);
    page.panes.push(pane);
    $("panes").append(pane.root);
  }
  useTwo(page.models.length > 1);
  drawButtons();
  $("prompt").focus();
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const prompt = $("prompt").value;
  if (page.stop || !prompt.trim()) return;
  $("prompt").value = "";
  send(prompt);
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
addEventListener("keydown", (event) => { if (event.key === "Escape") page.stop?.abort(); });
$("stop").addEventListener("click", () => page.stop?.abort());
$("clear").addEventListener("click", clear);
$("replay").addEventListener("click", replay);
$("compare").addEventListener("click", () => useTwo(page.panes[1].root.hidden));
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  access.key = $("key").value.trim();
  $("key").value = "";
  start();
});
for (const radio of document.getElementsByName("view")) {
  radio.addEventListener("change", () => {
    for (const pane of page.panes) { pane.view = radio.value; pane.draw(); }
  });
}
const redraw = () => { for (const pane of page.panes) pane.draw(); };
addEventListener("resize", redraw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
start();
