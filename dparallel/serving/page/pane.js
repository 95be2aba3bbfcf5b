
// ---- an answer ---------------------------------------------------------------------------------
// What one model answers to one prompt: its text, and the row that is drawn.
class Answer {
  constructor(model) {
    Object.assign(this, { model: model.id, ends: new Set(model.end_token_ids) });
    Object.assign(this, { text: "", row: newRow(0), block_length: 1, usage: null, error: null });
    Object.assign(this, { running: true, forwards: 0, started: performance.now(), elapsed: 0 });
  }

  take(event) {
    this.elapsed = (performance.now() - this.started) / 1000;
    if (event.usage) this.usage = event.usage;
    const choice = event.choices[0];
    if (!choice) return;
    if (choice.decoding) {
      this.row = newRow(choice.decoding.gen_length, { revises: choice.decoding.mode === "revising" });
      this.block_length = choice.decoding.block_length;
    }
    this.text += choice.delta?.content ?? choice.text ?? "";
    const { canvas } = choice;
    if (!canvas) return;
    addForward(this.row, {
      offsets: canvas.positions, probability: canvas.confidences, commit: canvas.committed,
      words: canvas.tokens.map((text, i) => ({ text, end: this.ends.has(canvas.token_ids[i]), id: canvas.token_ids[i] })),
    });
    this.forwards = canvas.forward + 1;
  }

  end(error) {
    this.error = error;
    this.running = false;
    this.row.over = true;
  }

  // Committed tokens up to the end of the response; after `done` forwards of it, or as the server counts them.
  tokens(done) {
    if (this.usage && done >= nfe(this.row)) return this.usage.completion_tokens;
    let count = 0;
    for (let offset = 0; offset < this.row.held.length; offset++) {
      const token = holding(this.row, offset, done);
      count += token ? 1 : 0;
      if (token?.word.end) break;
    }
    return count;
  }

  get seconds() {
    return this.usage?.decode_seconds ?? this.elapsed;
  }

  // The names and texts of the counters, of the first `done` forwards; the times are those of the whole answer.
  counts(done = Infinity) {
    const forwards = Math.min(done, this.usage?.nfe ?? this.forwards), tokens = this.tokens(done);
    const rate = this.tokens(Infinity) / this.seconds;
    const shown = (value, digits) => (Number.isFinite(value) && this.forwards ? value.toFixed(digits) : "–");
    return [
      ["forwards", shown(forwards, 0)],
      ["tokens", shown(tokens, 0)],
      ["per forward", shown(tokens / forwards, 2)],
      ["tokens/s", shown(rate, rate < 10 ? 1 : 0)],
      ["seconds", shown(this.seconds, this.seconds < 10 ? 2 : 1)],
    ];
  }
}

// ---- a pane ------------------------------------------------------------------------------------
const BADGES = ["A", "B"];

// A model with its settings, and the canvas of one of its answers.
class Pane {
  constructor(number) {
    this.number = number;
    this.root = $("pane").content.firstElementChild.cloneNode(true);
    this.part = (name) => this.root.querySelector(name);
    this.settings = new Settings(this.root);
    this.answer = null; // the one shown
    this.done = Infinity; // forwards of it that are shown
    this.view = "step";
    this.chips = [];
    this.map = null;
    this.mapped = 0; // when the map may be drawn next
    const badge = BADGES[number];
    this.root.setAttribute("aria-label", `Model ${badge}`);
    this.root.dataset.badge = this.part(".badge").textContent = badge;
    this.part(".model").setAttribute("aria-label", `Model ${badge}`);
    this.part(".tokens").setAttribute("aria-label", `Canvas ${badge}`);
    const [tokens, canvas, time] = [this.part(".tokens"), this.part(".map"), this.part(".time input")];
    time.setAttribute("aria-label", `Forwards done, canvas ${badge}`);
    time.addEventListener("input", () => this.show(Number(time.value)));
    tokens.addEventListener("pointermove", (event) => {
      const chip = event.target.closest(".token");
      tip(chip && event, chip && chipInWords(this.answer.row, Number(chip.dataset.offset), this.shownForwards));
    });
    tokens.addEventListener("pointerleave", () => tip());
    canvas.addEventListener("pointermove", (event) => {
      const cell = this.cell(event);
      tip(cell && event, cell && cellInWords(this.answer.row, cell.offset, cell.forward));
    });
    canvas.addEventListener("pointerleave", () => tip());
    canvas.addEventListener("click", (event) => {
      const cell = this.cell(event);
      if (cell && !this.answer.running) this.show(cell.forward + 1);
    });
    this.part(".map-part").addEventListener("toggle", () => this.draw());
    this.empty();
  }

  get shownForwards() {
    return Math.min(this.done, nfe(this.answer.row));
  }

  cell(event) {
    const cell = this.map && cellAt(event, this.part(".map"), this.map);
    return cell?.inside ? cell : undefined;
  }

  use(model) {
    this.model = model;
    this.part(".model").value = model.id;
    this.settings.use(model);
  }

  empty() {
    this.answer = this.map = null;
    this.chips = [];
    this.part(".tokens").replaceChildren();
    for (const name of [".time", ".map-part", ".legend"]) this.part(name).hidden = true;
    this.say("");
    this.problem(null);
    pairs(this.part(".counters"), new Answer({ id: "", end_token_ids: [] }).counts());
  }

  say(text) {
    this.part(".state").textContent = text;
  }

  problem(text) {
    this.part(".problem").hidden = !text;
    this.part(".problem").textContent = text ?? "";
  }

  // Send a request and show its answer while it arrives; it ends well, with an error, or by the signal.
  async ask(answer, path, body, signal) {
    this.look(answer);
    try {
      for await (const event of streamed(path, { model: this.model.id, ...body, ...this.settings.fields }, signal)) {
        answer.take(event);
        this.changed(answer);
      }
      answer.end(null);
    } catch (error) {
      answer.end(inWords(error));
      if (error.status === 401) throw error;
    } finally {
      this.changed(answer);
    }
  }

  changed(answer) {
    answer.drawCard();
    if (answer === this.answer) this.soon();
  }

  look(answer) {
    const before = this.answer;
    this.answer = answer;
    before?.drawCard();
    answer.drawCard();
    this.chips = [];
    this.map = null;
    this.part(".tokens").replaceChildren();
    this.show(Infinity);
  }

  show(done) {
    this.done = done;
    this.soon();
  }

  // Several forwards may arrive before the browser draws.
  soon() {
    this.due ??= requestAnimationFrame(() => {
      this.due = undefined;
      this.draw();
    });
  }

  draw() {
    const { answer } = this;
    if (!answer || this.root.hidden) return;
    const { row } = answer, done = this.shownForwards, total = nfe(row);
    if (this.chips.length !== row.held.length) this.newChips();
    this.chips.forEach((parts, offset) => {
      drawChip(parts, row, offset, done, this.view);
      const token = holding(row, offset, done), text = token ? token.word.text : "";
      parts.chip.dataset.token = token ? token.word.id : "";
      parts.chip.classList.toggle("start", offset > 0 && offset % answer.block_length === 0 && answer.block_length > 1);
      parts.chip.classList.toggle("long", text.trim().length > 6);
      parts.chip.classList.toggle("longer", text.trim().length > 9);
    });
    const waits = answer.running && total === 0;
    this.say(waits ? "waiting for a row" : answer.running ? "decoding" : answer.error ? "ended" : "finished");
    this.root.classList.toggle("running", answer.running);
    this.part(".tokens").setAttribute("aria-busy", String(answer.running));
    this.problem(answer.error);
    pairs(this.part(".counters"), answer.counts(this.done));
    this.part(".time").hidden = this.part(".map-part").hidden = this.part(".legend").hidden = total === 0;
    if (total === 0) return;
    const time = this.part(".time input");
    time.disabled = answer.running;
    time.max = total;
    time.value = done;
    time.setAttribute("aria-valuetext", `${done} of ${total} forwards done`);
    this.part(".time output").textContent = `forward ${done} of ${total}`;
    this.part(".legend").replaceChildren(...chipLegend(row, this.view));
    this.drawMap();
  }

  newChips() {
    this.chips = Array.from(this.answer.row.held, (_, offset) => {
      const parts = newChip();
      parts.chip.dataset.offset = offset;
      return parts;
    });
    this.part(".tokens").replaceChildren(...this.chips.map(({ chip }) => chip));
  }

  // While forwards arrive, a large map takes a sixth of the time at most.
  drawMap() {
    const now = performance.now(), { answer } = this;
    if (!this.part(".map-part").open) return;
    if (answer.running && now < this.mapped) return;
    this.map = drawHeatMap(this.part(".map"), answer.row, this.shownForwards, answer.block_length, 300);
    this.mapped = performance.now() + 5 * (performance.now() - now);
  }
}
