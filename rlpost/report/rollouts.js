/* Rollouts: filtered and sorted by columns that are there at once; texts come from compressed parts when they are read. */
async function unpack(id) {
  const node = document.getElementById(id);
  const bytes = Uint8Array.from(atob(node.textContent.trim()), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return JSON.parse(await new Response(stream).text());
}

const parts = new Map();
const partOf = (run, i) => {
  const id = `rollouts-${run}-${i}`;
  if (!parts.has(id)) parts.set(id, unpack(id));
  return parts.get(id);
};
const textOf = async (run, columns, i) => (await partOf(run, Math.floor(i / columns.in_a_part)))[i % columns.in_a_part];

function signedBytes(packed) {
  if (packed === null || packed === undefined) return null;
  if (typeof packed === "number") return () => packed;
  const bytes = Uint8Array.from(atob(packed.bytes), (c) => c.charCodeAt(0));
  return (i) => (i < bytes.length ? (((bytes[i] << 24) >> 24) / 127) * packed.max : null);
}

/* The completion as [text, token number]; numbers of characters are of Unicode's, not of JavaScript's. */
function tokensOf(text, figures) {
  if (!figures || !figures.pieces) return null;
  const letters = Array.from(text), lengths = atob(figures.pieces);
  let at = 0;
  const found = Array.from(lengths, (c, i) => { const n = c.charCodeAt(0); at += n; return [letters.slice(at - n, at).join(""), i]; });
  return at === letters.length ? found : null;
}

/* The numbers of the tokens that a tool wrote. */
function ofTools(turns) {
  const found = new Set();
  let at = 0;
  for (const [writer, n] of turns || []) {
    for (let i = at; writer === "tool" && i < at + n; i++) found.add(i);
    at += n;
  }
  return found;
}

const INKS = {
  advantage: { label: "advantage", high: (rollout) => Math.max(1, rollout.max), signed: true },
  logp_diff: { label: "log-prob, trainer less generator", high: (rollout) => rollout.max || 1, signed: true },
  logp: { label: "surprise (minus log-prob)", high: () => 4, signed: false },
};

function coloured(text, figures, by, turns) {
  const tokens = tokensOf(text, figures), tools = ofTools(turns);
  if (!tokens || (by === "none" && !tools.size)) return [text];
  const values = Object.fromEntries(Object.keys(INKS).map((name) => [name, signedBytes(figures[name])]));
  const value = values[by], tool = (piece) => h("span", { class: "t tool", title: "a tool wrote this: nothing is trained on it" }, piece);
  if (!value) return tokens.map(([piece, i]) => (tools.has(i) ? tool(piece) : piece));
  const max = typeof figures[by] === "number" ? Math.abs(figures[by]) : figures[by].max;
  const high = INKS[by].high({ max });
  return tokens.map(([piece, i]) => {
    if (tools.has(i)) return tool(piece);
    const size = value(i) / high;
    const ink = INKS[by].signed ? (size >= 0 ? "var(--pos)" : "var(--neg)") : "var(--neg)";
    const share = Math.round(Math.min(Math.abs(size), 1) * 70);
    const said = Object.entries(values).filter(([, at]) => at).map(([name, at]) => `${INKS[name].label}: ${fmt(name === "logp" ? -at(i) : at(i), 3)}`);
    return h("span", { class: "t", title: said.join("\n"), style: { backgroundColor: `color-mix(in srgb, ${ink} ${share}%, transparent)` } }, piece);
  });
}

function tokenTable(text, figures, turns) {
  const tokens = tokensOf(text, figures), tools = ofTools(turns);
  if (!tokens) return h("p", {}, "The tokens do not make up the text one by one.");
  const names = Object.keys(INKS).filter((name) => figures[name] !== undefined);
  const values = names.map((name) => signedBytes(figures[name]));
  return tableOf({ head: ["token", "text", ...names.map((name) => INKS[name].label)],
    rows: tokens.map(([piece, i]) => [i + 1, JSON.stringify(piece), ...values.map((at, j) => (tools.has(i) ? "tool" : names[j] === "logp" ? -at(i) : at(i)))]) });
}

function rolloutBrowser(run, columns) {
  const ROW = 44, n = columns.step.length;
  let shown = [], on = -1, ink = "advantage", search = 0;
  const list = h("div", { class: "list", role: "listbox", tabindex: 0, "aria-label": "Rollouts" });
  const space = h("div", {});
  list.append(space);
  const count = h("span", { class: "soft", role: "status" });
  const read = h("div", { class: "card read" }, h("p", { class: "soft" }, "Choose a rollout."));
  const input = (label, type, extra) => [label, h("input", { type, ...extra, oninput: () => apply() })];
  const [, from] = input("", "number", { min: 1, "aria-label": "from step" }), [, to] = input("", "number", { min: 1, "aria-label": "to step" });
  const [, least] = input("", "number", { step: "any", "aria-label": "least reward" }), [, most] = input("", "number", { step: "any", "aria-label": "largest reward" });
  const text = h("input", { type: "search", placeholder: "text or task", "aria-label": "text in problem, answer or task", onchange: () => apply(), oninput: () => later() });
  const choose = (label, names) => h("select", { "aria-label": label, onchange: () => apply() }, h("option", { value: "" }, `any ${label}`), names.map((name, i) => h("option", { value: i }, name)));
  const role = choose("writer", columns.roles), end = choose("ending", columns.ends);
  const order = h("select", { "aria-label": "order", onchange: () => apply() }, ["step, newest first", "step", "reward, best first", "reward, worst first", "longest first", "shortest first"].map((name, i) => h("option", { value: i }, name)));
  let waiting = 0;
  const later = () => { clearTimeout(waiting); waiting = setTimeout(apply, 250); };

  async function apply() {
    const mine = ++search, words = text.value.toLowerCase();
    const number = (node, otherwise) => (node.value === "" ? otherwise : +node.value);
    const [a, b, lo, hi] = [number(from, -Infinity), number(to, Infinity), number(least, null), number(most, null)];
    let found = [];
    for (let i = 0; i < n; i++) {
      const reward = columns.reward[i];
      if (columns.step[i] < a || columns.step[i] > b) continue;
      if ((lo !== null && !(reward !== null && reward >= lo)) || (hi !== null && !(reward !== null && reward <= hi))) continue;
      if ((role.value !== "" && columns.role[i] !== +role.value) || (end.value !== "" && columns.end[i] !== +end.value)) continue;
      found.push(i);
    }
    if (words) {
      const kept = [];
      for (const [done, i] of found.entries()) {
        const one = await textOf(run, columns, i);
        if (mine !== search) return;
        if (done % 2000 === 1999) { count.textContent = `searched ${done + 1} of ${found.length}`; await new Promise((go) => setTimeout(go)); }
        if ([one.prompt, one.completion, one.hint, columns.tasks[columns.task[i]]].some((words_) => words_ && words_.toLowerCase().includes(words))) kept.push(i);
      }
      found = kept;
    }
    const by = [(i) => -columns.step[i], (i) => columns.step[i], (i) => -(columns.reward[i] ?? -Infinity), (i) => columns.reward[i] ?? Infinity, (i) => -columns.tokens[i], (i) => columns.tokens[i]][order.value];
    shown = found.map((i) => [by(i), i]).sort((x, y) => x[0] - y[0] || x[1] - y[1]).map((pair) => pair[1]);
    count.textContent = `${shown.length} of ${n} rollouts`;
    space.style.height = `${shown.length * ROW}px`;
    list.scrollTop = 0;
    paint();
    select(shown.length ? 0 : -1);
  }

  function paint() {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5), last = Math.min(shown.length, first + Math.ceil(list.clientHeight / ROW) + 10);
    const rows = [];
    for (let place = first; place < last; place++) {
      const i = shown[place], reward = columns.reward[i];
      const writer = columns.roles[columns.role[i]];
      const row = h("div", { class: place === on ? "row on" : "row", role: "option", id: `rollout-${run}-${place}`, "aria-selected": String(place === on), "aria-setsize": shown.length, "aria-posinset": place + 1, onclick: () => select(place) },
        h("span", {}, h("b", {}, `step ${columns.step[i]}`), `  reward ${reward === null ? "unjudged" : fmt(reward, 3)}, ${columns.tokens[i]} tokens`, columns.ends[columns.end[i]] === "stop" ? "" : `, ${columns.ends[columns.end[i]]}`, writer === "policy" ? "" : `, ${writer}`),
        h("span", { class: "soft" }, columns.gist[i]));
      row.style.top = `${place * ROW}px`;
      rows.push(row);
    }
    space.replaceChildren(...rows);
    list.setAttribute("aria-activedescendant", on >= first && on < last ? `rollout-${run}-${on}` : "");
  }

  async function select(place) {
    on = place;
    if (place >= 0) {
      if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
      if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
    }
    paint();
    if (place < 0) return read.replaceChildren(h("p", { class: "soft" }, "No rollout is like that."));
    const i = shown[place], one = await textOf(run, columns, i);
    if (on !== place || shown[place] !== i) return;
    const figures = one.figures, known = Object.keys(INKS).filter((name) => figures && figures.pieces && figures[name] !== undefined && figures[name] !== null);
    const reward = columns.reward[i];
    const by = known.includes(ink) ? ink : known[0] || "none";
    const pick = h("select", { "aria-label": "colour tokens by", onchange: () => { ink = pick.value; select(place); } }, [...known, "none"].map((name) => h("option", { value: name, selected: name === by }, name === "none" ? "nothing" : INKS[name].label)));
    const step = (d) => h("button", { type: "button", disabled: place + d < 0 || place + d >= shown.length, onclick: () => select(place + d) }, d < 0 ? "\u2190 previous" : "next \u2192");
    const high = by === "none" ? 0 : INKS[by].high({ max: typeof figures[by] === "number" ? Math.abs(figures[by]) : figures[by].max });
    const table = h("details", {}, h("summary", {}, "Tokens as a table"));
    table.addEventListener("toggle", () => table.open && table.replaceChildren(table.firstChild, h("div", { class: "scroll", tabindex: 0 }, tokenTable(one.completion, figures, one.turns))));
    read.replaceChildren(...[
      h("div", { class: "row-of" }, step(-1), step(1), h("span", { class: "soft" }, `${place + 1} of ${shown.length}`)),
      h("div", {}, h("b", {}, `Step ${columns.step[i]}, reward ${reward === null ? "unjudged" : fmt(reward)}`), h("span", { class: "soft any" }, `  ${columns.tokens[i]} tokens, ${columns.ends[columns.end[i]]}, written by ${columns.roles[columns.role[i]]}${figures && figures.advantage === undefined ? ", not trained on" : ""}, task ${columns.tasks[columns.task[i]]}`)),
      h("h4", {}, "Problem"), h("pre", { class: "text", tabindex: 0 }, one.prompt),
      one.hint ? [h("h4", {}, `Hint of level ${one.level}, which the loss does not see`), h("pre", { class: "text", tabindex: 0 }, one.hint)] : null,
      h("div", { class: "row-of" }, h("h4", {}, one.turns ? "Answer (dotted: a tool wrote it)" : "Answer"), known.length ? h("label", { class: "small" }, "tokens coloured by", pick) : null,
        by === "none" ? null : INKS[by].signed ? h("span", { class: "small soft" }, `-${fmt(high, 3)} `, h("i", { class: "scale" }), ` +${fmt(high, 3)}`) : h("span", { class: "small soft" }, "0 ", h("i", { class: "scale one" }), ` ${fmt(high, 3)} nats`)),
      h("pre", { class: "text", tabindex: 0 }, coloured(one.completion || "", figures, by, one.turns)),
      known.length ? table : h("p", { class: "small soft" }, "Figures of single tokens were not written."),
      h("h4", {}, "Rewards before their weights"),
      tableOf({ head: ["reward", "value"], rows: [...Object.entries(one.parts).map(([name, value]) => [name, value === null ? "unjudged" : value]), ["expected answer", one.answer === null ? "-" : one.answer]] }, "plain"),
    ].flat().filter(Boolean));
  }

  list.addEventListener("scroll", paint, { passive: true });
  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const move = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -1e9, End: 1e9 }[event.key];
    if (!move || !shown.length) return;
    event.preventDefault();
    select(Math.min(Math.max(on + move, 0), shown.length - 1));
  });
  requestAnimationFrame(apply);
  const note = columns.of > n ? h("p", { class: "soft" }, `${n} of ${columns.of} rollouts of samples.jsonl are in this page, those of evenly spaced steps.`) : null;
  return h("div", {}, note,
    h("div", { class: "filters" }, h("label", {}, "steps", from, "to", to), h("label", {}, "reward", least, "to", most), role, end, text, order, count),
    h("div", { class: "reader" }, list, read));
}
