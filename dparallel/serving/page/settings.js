
// ---- how a model decodes -----------------------------------------------------------------------
const declared = JSON.parse($("declared").textContent);

// What a user changed of a checkpoint's own decoding, and the controls for it.
class Settings {
  constructor(root) {
    this.part = (name) => root.querySelector(name);
    this.given = {};
    const [slide, exact] = [this.part(".slide"), this.part(".exact")];
    slide.addEventListener("input", () => { exact.value = slide.value; this.give(this.main, slide.value); });
    exact.addEventListener("change", () => this.give(this.main, exact.value, true));
    this.part(".defaults").addEventListener("click", () => { this.given = {}; this.draw(); });
  }

  use(model) {
    this.model = model;
    this.given = {};
    this.draw();
  }

  // An empty text takes a setting back.
  give(name, text, redraw = false) {
    if (text === "") delete this.given[name];
    else this.given[name] = Number.isNaN(Number(text)) ? text : Number(text);
    if (name === "mode") delete this.given.rule;
    if (name === "mode" || name === "rule") {
      for (const rule of Object.values(declared.rules)) for (const key in rule.parameters) delete this.given[key];
    }
    if (redraw) this.draw();
    else this.drawSummary();
  }

  // The rules that the model can follow in a mode; a schedule of forward passes fits some modes only.
  rules(mode) {
    const known = this.model.rules.filter((rule) => rule in declared.rules);
    return declared.modes[mode].scheduled ? known : known.filter((rule) => !declared.rules[rule].scheduled);
  }

  // All settings in force, with those of the rule in `parameters`.
  get effective() {
    const own = this.model.decoding;
    const mode = this.given.mode ?? own.mode, { fixed, usual } = declared.modes[mode];
    let rule = fixed.rule ?? this.given.rule ?? (mode === own.mode ? own.rule : usual.rule ?? own.rule);
    if (!this.rules(mode).includes(rule)) rule = declared.rule;
    const gen_length = this.given.gen_length ?? own.gen_length;
    const block_length = declared.rules[rule].whole_response ? gen_length
      : fixed.block_length ?? this.given.block_length ?? own.block_length;
    const blocks = Math.max(1, Math.floor(gen_length / block_length));
    const parameters = {};
    for (const [name, parameter] of Object.entries(declared.rules[rule].parameters)) {
      let value = this.given[name] ?? (rule === own.rule ? own[name] : null) ?? parameter.default;
      value ??= parameter.whole ? gen_length : parameter.most === null ? 1 : 0.9 * parameter.most;
      if (name === "steps") value = Math.max(1, Math.round(Math.min(value, gen_length) / blocks)) * blocks;
      parameters[name] = value;
    }
    return { mode, rule, gen_length, block_length, blocks, temperature: this.given.temperature ?? own.temperature, parameters };
  }

  // The fields of a request: only what differs from the checkpoint's own decoding, so that this applies.
  get fields() {
    const { mode, rule, parameters } = this.effective, { fixed } = declared.modes[mode];
    const sent = { ...this.given };
    const replaced = "rule" in sent || "mode" in sent;
    if (replaced && !("rule" in fixed)) Object.assign(sent, { rule }, parameters);
    if ("steps" in parameters && !("steps" in fixed) && Object.keys(sent).length) sent.steps = parameters.steps;
    if (declared.rules[rule].whole_response || "block_length" in fixed) delete sent.block_length;
    return sent;
  }

  // The parameter of the rule that the slider moves.
  get main() {
    return Object.keys(declared.rules[this.effective.rule].parameters)[0];
  }

  draw() {
    const { mode, rule, gen_length, block_length, blocks, temperature, parameters } = this.effective;
    const { fixed } = declared.modes[mode], name = this.main;
    const row = this.part(".parameter");
    row.hidden = name === undefined || "rule" in fixed;
    if (!row.hidden) this.drawSlider(name, declared.rules[rule].parameters[name], parameters[name], gen_length, blocks);
    const fields = [];
    if (this.model.modes.length > 1) fields.push(this.choice("mode", this.model.modes, mode));
    if (!("rule" in fixed)) fields.push(this.choice("rule", this.rules(mode), rule));
    fields.push(this.number("gen_length", gen_length, { min: 1 }));
    if (!declared.rules[rule].whole_response && !("block_length" in fixed)) {
      fields.push(this.number("block_length", block_length, { min: 1 }));
    }
    for (const [other, parameter] of Object.entries(declared.rules[rule].parameters).slice(1)) {
      fields.push(this.number(other, parameters[other], { min: parameter.least, step: "any", title: parameter.meaning }));
    }
    fields.push(this.number("temperature", temperature, { min: 0, step: "any" }));
    this.part(".fields").replaceChildren(...fields);
    this.drawSummary();
  }

  drawSlider(name, parameter, value, gen_length, blocks) {
    const [slide, exact, label] = [this.part(".slide"), this.part(".exact"), this.part(".name")];
    const least = parameter.whole ? blocks : parameter.least;
    const most = parameter.most ?? (parameter.whole ? gen_length : Math.max(2, 4 * (parameter.default ?? 0), 2 * value));
    // Before the value, which they would round.
    Object.assign(slide, { min: least, max: most, step: parameter.whole ? blocks : 0.01 });
    slide.value = exact.value = String(Number(value.toFixed(6)));
    exact.min = least;
    label.textContent = name;
    slide.setAttribute("aria-label", `${name}: ${parameter.meaning}`);
    exact.setAttribute("aria-label", `${name}, exactly`);
    this.part(".meaning").textContent = parameter.meaning;
  }

  drawSummary() {
    const { mode, rule, gen_length, block_length } = this.effective;
    const changed = Object.keys(this.given).length > 0;
    const parts = [mode === "sequential" ? rule : `${mode}, ${rule}`, `${gen_length} tokens`];
    if (block_length > 1 && block_length < gen_length) parts.push(`blocks of ${block_length}`);
    this.part(".decoding summary").textContent = `Decoding: ${parts.join(", ")}${changed ? ", changed" : ""}`;
    this.part(".defaults").disabled = !changed;
  }

  labelled(name, control) {
    const field = element("label", "", name.replaceAll("_", " "));
    control.name = name;
    control.addEventListener("change", () => {
      this.give(name, control.value, true);
      this.part(`[name="${name}"]`)?.focus(); // drawn anew
    });
    field.append(control);
    return field;
  }

  choice(name, options, chosen) {
    const select = element("select");
    select.append(...options.map((option) => element("option", "", option)));
    select.value = chosen;
    return this.labelled(name, select);
  }

  number(name, value, attributes) {
    return this.labelled(name, Object.assign(element("input"), { type: "number", ...attributes, value }));
  }
}
