/* The page: sections from the data, in the order in which one asks. */
const CHARTS = {
  Evaluation: [
    ["Held-out pass@k", "evals", /^eval\/pass@\d+$/, "Of the held-out problems. Bands: 95 % over problems and answers; of a mean over seeds, over seeds."],
    ["Held-out pass@1 by level", "evals", /^eval\/pass@1\/.+/, "Mean over the level's problems."],
    ["Held-out test loss", "evals", /^eval\/loss$/, "1 - pass@1."],
    ["Held-out problems gained and lost", "evals", /^eval\/(gained|lost)_frac$/, "Against the first evaluation."],
    ["Held-out answer length", "evals", /^eval\/length_mean$/, "Tokens."],
  ],
  Learning: [
    ["Reward", "steps", /^reward\/mean$/, "Mean over the step's judged rollouts."],
    ["Parts of the reward", "steps", /^reward\/(?!mean$|std|solved_frac|unjudged|length_bonus)[^/]+$/, "Before their weights.", 2],
    ["Rollouts solved", "steps", /^reward\/solved_frac$/, "With the full reward. Band: 95 % over prompts and answers."],
    ["pass@k of training prompts", "steps", /^rollouts\/pass@\d+$/, "Without help. Bands: 95 % over prompts."],
    ["Entropy", "steps", /^policy\/entropy$/, "Nats a trained token."],
    ["KL to the reference", "steps", /^policy\/kl_(ref|start)$/, "Nats a trained token."],
    ["Answer length", "steps", /^rollouts\/length_(mean|p\d+)$/, "Tokens."],
    ["Answers cut at the limit", "steps", /^rollouts\/truncated_frac$/, "Share of the rollouts."],
    ["Groups with differing rewards", "steps", /^groups\/(spread|all_solved|none_solved)_frac$/, "Groups without teach nothing in most algorithms."],
    ["Capability", "steps", /^capability\/(gain|sharpening|lost_frac)$/, "On tasks met before: newly solved, solved more often, lost."],
    ["Concentration", "steps", /^capability\/concentration$/, "pass@1 over pass@k: 1 where what can be solved is always solved."],
    ["Newly solved tasks", "steps", /^explore\/newly_solved$/, "Solved without help, after failing in every try before."],
    ["Learning rate", "steps", /^optim\/lr$/, ""],
  ],
  Health: [
    ["Gradient norm", "steps", /^optim\/grad_norm$|^critic\/grad_norm$/, "Before clipping."],
    ["Trainer against generator", "steps", /^mismatch\/logp_diff_(mean|p99)$/, "Difference of log-probs before the first update, nats: rounding, if all is well."],
    ["KL between generator and trainer", "steps", /^mismatch\/k3$|^mismatch\/age_\d+\/k3$/, "Nats a token."],
    ["Effective sample size", "steps", /^mismatch\/ess_frac$|^guided\/ess_frac$/, "Of importance weights; 1 where nothing differs."],
    ["Canary", "steps", /^canary\/logp_diff_(mean|max)$/, "Trainer against generator on a fixed prompt after each weight sync."],
    ["Ratio to the behaviour policy", "steps", /^policy\/ratio_max$/, "Largest of the step."],
    ["Clipped tokens", "steps", /^policy\/clipped_frac$/, "Share whose gradient the clip removed."],
    ["Rollouts without a verdict", "steps", /^reward\/unjudged\/.+/, ""],
    ["Gradient noise scale", "steps", /^noise\/scale$/, "Critical batch, in prompts."],
    ["BroRL's mass balance", "steps", /^mass\/(sampled_correct|sampled_incorrect|unsampled)$/, "Terms of the change of correct mass; unsampled below 0 costs what was not seen."],
  ],
  Cost: [
    ["Seconds of a step", "steps", /^time\/step_s$/, ""],
    ["Tokens of a step", "steps", /^tokens\/(generated|trained|discarded)$/, ""],
    ["FLOPs of a step by purpose", "steps", /^flops\/(?!total|six_nt).+/, ""],
    ["Utilisation", "steps", /^mfu\/.+/, "Share of the device's peak."],
    ["Memory", "steps", /^memory\/peak_gib$/, "GiB, largest of any phase."],
  ],
};
const T = [, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131];
const setting = { axis: "step", smooth: 0, seeds: false, run: 0 };
const order = (a, b) => a.localeCompare(b, "en", { numeric: true });

function start(data) {
  const { runs, arms } = data, several = runs.length > 1;
  const main = document.getElementById("main");
  const nav = document.getElementById("nav");
  document.getElementById("about").textContent = `${runs.map((run) => `${run.name}: ${run.state}`).slice(0, 4).join("; ")}${runs.length > 4 ? "; ..." : ""}. Made ${data.made}.`;
  setting.smooth = runs.some((run) => run.steps.x.step.length > 200) ? 0.8 : 0;
  setting.seeds = arms.length > new Set(arms).size;
  const ink = (i) => colour(i);

  function section(title, ...kids) {
    const id = title.toLowerCase().replace(/[^a-z]+/g, "-");
    main.append(h("section", { "aria-labelledby": id }, h("h2", { id, tabindex: -1 }, title), ...kids));
    nav.append(h("a", { href: `#${id}` }, title));
  }

  /* One figure of all runs, or of all arms with seeds together. */
  function seriesOf(part, name) {
    const found = runs.map((run, i) => {
      const y = run[part].figures[name];
      return y && { name: several ? run.name : name, ink: ink(i), dash: dash(i), x: run[part].x[setting.axis] || run[part].x.step, y, band: (run[part].bands || {})[name] || null, arm: arms[i], named: several };
    });
    if (!setting.seeds) return found.filter(Boolean);
    return [...new Set(arms)].map((arm, i) => together(found.filter((one) => one && one.arm === arm), arms.filter((one) => one === arm).length, i)).filter(Boolean);
  }

  function together(group, seeds, i) {
    if (group.length < 2) return group[0] ? { ...group[0], ink: ink(i), dash: dash(i) } : null;
    const length = Math.min(...group.map((one) => one.y.length)), x = [], y = [], band = [];
    for (let j = 0; j < length; j++) {
      const values = group.map((one) => one.y[j]).filter((value) => value !== null);
      x.push(group.reduce((sum, one) => sum + one.x[j], 0) / group.length);
      if (values.length < 2) { y.push(values[0] ?? null); band.push(null); continue; }
      const mean = values.reduce((a, b) => a + b, 0) / values.length;
      const half = (T[values.length - 1] || 1.96) * Math.sqrt(values.reduce((sum, value) => sum + (value - mean) ** 2, 0) / (values.length - 1) / values.length);
      y.push(mean);
      band.push([mean - half, mean + half]);
    }
    return { name: `${group[0].name.replace(/[-_ ]?(s|seed)?[-_]?\d+$/, "") || group[0].name}, ${seeds} seeds`, ink: ink(i), dash: dash(i), x, y, band, named: true };
  }

  const xName = () => setting.axis;
  const common = { xName, smooth: () => setting.smooth };
  const namesOf = (part, pattern) => [...new Set(runs.flatMap((run) => Object.keys(run[part].figures)))].filter((name) => pattern.test(name) && runs.some((run) => (run[part].figures[name] || []).some((y) => y !== null))).sort(order);

  function charts(list) {
    const found = [];
    for (const [title, part, pattern, help, least] of list) {
      const names = namesOf(part, pattern);
      if (names.length < (least || 1)) continue;
      const smooth = part === "evals" ? () => 0 : common.smooth;
      if (!several) found.push(lineChart({ ...common, smooth, title, help, series: () => names.map((name, i) => ({ ...seriesOf(part, name)[0], name: tail(name), ink: ink(i), dash: dash(i), named: names.length > 1 })) }));
      else for (const name of ends(names)) found.push(lineChart({ ...common, smooth, title: names.length > 1 ? `${title}: ${tail(name)}` : title, help, series: () => seriesOf(part, name) }));
    }
    return found.length ? h("div", { class: "grid" }, found) : h("p", { class: "soft" }, "Nothing was logged.");
  }
  const tail = (name) => name.replace(/^[a-z]+\//, "");
  const ends = (names) => (names.length > 2 ? [names[0], names[names.length - 1]] : names);

  /* What is shown of one run at a time. */
  const perRun = [];
  const ofRun = (build) => { const box = h("div", {}); const make = () => box.replaceChildren(...[build(runs[setting.run], setting.run)].flat()); perRun.push(make); make(); return box; };

  section("Summary", several ? comparison(runs) : facts(runs[0].summary));
  section("Alarms", runs.map((run) => alarmsOf(run, several)));
  section("Evaluation", charts(CHARTS.Evaluation));
  section("Learning", charts(CHARTS.Learning));
  section("Scaling", fitsOf(data.fits));
  section("Difficulty and curriculum", ofRun((run) => curriculum(run)), charts([["Reported by the curriculum", "steps", /^curriculum\//, ""]].filter(() => namesOf("steps", /^curriculum\//).length)));
  section("Exploration", ofRun((run) => funnelsOf(run)));
  section("Health", charts(CHARTS.Health));
  section("Time and cost", ofRun((run) => phases(run, data.outside)), charts(CHARTS.Cost));
  section("Rollouts", ofRun((run, i) => (run.rollouts.step.length ? rolloutBrowser(i, run.rollouts) : h("p", { class: "soft" }, "No rollouts were written (logging.samples_per_step)."))));
  section("Recipe", recipes(data));
  section("Every figure", anyFigure());

  function anyFigure() {
    const every = [...namesOf("steps", /./).map((name) => ["steps", name]), ...namesOf("evals", /./).map((name) => ["evals", name])];
    if (!every.length) return h("p", { class: "soft" }, "Nothing was logged.");
    const place = h("div", {});
    const pick = h("select", { "aria-label": "figure", onchange: () => show() }, every.map(([, name], i) => h("option", { value: i }, name)));
    const show = () => {
      const [part, name] = every[pick.value], [unit, meaning] = data.info[name] || ["", ""];
      place.replaceChildren(lineChart({ ...common, title: name, help: `${meaning}${unit ? ` [${unit}]` : ""}`, wide: true, series: () => seriesOf(part, name) }));
    };
    pick.value = Math.max(0, every.findIndex(([, name]) => name === "optim/lr"));
    show();
    return [h("p", {}, h("label", {}, "Figure", pick)), place];
  }

  controls();
  function controls() {
    const box = document.getElementById("controls");
    const axes = ["step", "tokens", "FLOPs", "hours"].filter((axis) => runs.some((run) => run.steps.x[axis]));
    const axis = h("select", { "aria-label": "horizontal axis", onchange: () => { setting.axis = axis.value; redrawAll(); } }, axes.map((name) => h("option", {}, name)));
    const smooth = h("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: setting.smooth, oninput: () => { setting.smooth = +smooth.value; redrawAll(); } });
    box.append(h("label", {}, "by", axis), h("label", {}, "smooth", smooth));
    if (setting.seeds) box.append(h("label", {}, h("input", { type: "checkbox", checked: true, onchange: (event) => { setting.seeds = event.target.checked; redrawAll(); } }), "mean over seeds"));
    if (several) {
      const run = h("select", { onchange: () => { setting.run = +run.value; perRun.forEach((make) => make()); } }, runs.map((one, i) => h("option", { value: i }, one.name)));
      box.append(h("label", {}, "details of", run));
    }
  }
}

function value(cell) {
  return typeof cell === "number" ? fmt(cell) : cell;
}

function facts(rows) {
  return h("dl", { class: "facts" }, rows.map(([what, cell, remark, pair]) => h("div", {}, h("dt", {}, what),
    h("dd", { class: typeof cell === "number" || /^[\d:.%]+$/.test(cell) ? null : "words" }, value(cell), h("small", {}, pair ? `${fmt(pair[0], 3)} to ${fmt(pair[1], 3)}, ${remark}` : remark)))));
}

function comparison(runs) {
  const what = [...new Set(runs.flatMap((run) => run.summary.map((row) => row[0])))];
  const rows = runs.map((run) => {
    const by = new Map(run.summary.map((row) => [row[0], row]));
    return [run.name, run.state, ...what.map((name) => { const row = by.get(name); return !row ? "-" : row[3] ? `${fmt(row[1])} (${fmt(row[3][0], 3)} to ${fmt(row[3][1], 3)})` : value(row[1]) ?? "-"; })];
  });
  return h("div", { class: "scroll card", tabindex: 0, role: "region", "aria-label": "Runs side by side" }, tableOf({ head: ["run", "state", ...what], rows }));
}

function alarmsOf(run, several) {
  const name = several ? `${run.name}: ` : "";
  if (!run.alarms.length) return h("p", {}, h("span", { class: "fine" }, "\u2713 "), `${name}none of ${run.rules.length} alarms was raised (${run.rules.join(", ")}).`);
  return run.alarms.map((alarm) => h("article", { class: "alarm" }, h("h3", {}, `${name}${alarm.title}`),
    h("p", {}, `Step ${alarm.step}: ${alarm.said} ${alarm.active ? "It still holds at the newest step." : "It does not hold at the newest step."}`), h("p", {}, h("b", {}, "What to do: "), alarm.advice)));
}

function fitsOf(fits) {
  return [fits.note ? h("p", { class: "soft" }, fits.note) : null,
    h("div", { class: "grid" }, (fits.every || []).map((fit) => h("article", { class: "card fit" }, h("h3", {}, fit.title), fit.formula ? h("p", { class: "soft" }, fit.formula) : null,
      fit.estimates.length ? h("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `${fit.title}, estimates` }, tableOf({ head: ["what", "value", "95 %", "meaning"], rows: fit.estimates })) : null,
      fit.lines.map((line) => h("p", { class: "small" }, line)),
      fit.images.map(([alt, data]) => h("img", { src: data, alt })))))];
}

function curriculum(run) {
  const chosen = run.chosen;
  if (!chosen) return h("p", { class: "soft" }, "What each step chose was not written (chosen.jsonl).");
  const rows = ["never", ...[...Array(10).keys()].map((i) => (i === 0 ? "<10%" : `${i * 10}%`)), "always"];
  const band = (table, low, high) => table.map((row) => row && [row[low], row[high]]);
  const quantiles = (table, label) => () => [{ name: label, named: true, ink: colour(0), x: chosen.x, y: table.map((row) => row && row[3]), band: band(table, 1, 5) }];
  const plain = { xName: () => "step" };
  const names = Object.keys(chosen.sources);
  return h("div", { class: "grid" },
    heatChart({ title: "Success of the chosen tasks", wide: true, help: "How often a step's tasks were solved, in the tries of that step; darker: more of the step's tasks. What was never or always solved teaches nothing by itself.", x: chosen.x, to: chosen.to, cells: chosen.bins, rows, xName: "step" }),
    lineChart({ ...plain, title: "Success, median", help: "Band: from the 10th to the 90th percentile of the step's tasks.", floor: 0, series: quantiles(chosen.success, "median success") }),
    chosen.difficulty.some((row) => row) ? lineChart({ ...plain, title: "Difficulty of the chosen tasks", help: "Median, and from the 10th to the 90th percentile; larger is harder.", series: quantiles(chosen.difficulty, "median difficulty") }) : null,
    names.length > 1 ? stackChart({ title: "Sources", help: "Where a step's tasks came from.", x: chosen.x, xName: "step", parts: names.map((name, i) => ({ name, ink: colour(i), y: chosen.sources[name] })) }) : null);
}

function funnelsOf(run) {
  if (!run.funnels.length) return h("p", { class: "soft" }, "Nothing was logged.");
  const cards = run.funnels.map(({ title, stages }) => h("article", { class: "card" }, h("h3", {}, title), h("div", { class: "funnel" }, stages.map(([label, number]) => {
    const share = stages[0][1] ? number / stages[0][1] : 0;
    return [h("div", {}, label), h("div", { class: "track" }, h("div", { class: "fill", style: { width: `${Math.min(Math.max(share, 0), 1) * 100}%` } }), h("div", { class: "number" }, `${fmt(number)}  (${(share * 100).toFixed(share < 0.1 ? 1 : 0)}%)`))];
  }))));
  if (run.levels.length) cards.push(h("article", { class: "card" }, h("h3", {}, "Answers under a hint, by level"), tableOf({ head: ["level", "passed"], rows: run.levels })));
  return h("div", { class: "grid" }, cards);
}

function phases(run, outside) {
  const figures = run.steps.figures, x = run.steps.x.step;
  const names = Object.keys(figures).filter((name) => /^time\/.+_s$/.test(name) && name !== "time/step_s" && !outside.includes(name.slice(5, -2)));
  const sum = (name) => figures[name].reduce((a, b) => a + (b || 0), 0);
  const sorted = names.sort((a, b) => sum(b) - sum(a));
  const width = Math.ceil(x.length / 200), columns = [...Array(Math.ceil(x.length / width)).keys()];
  const binned = (name) => columns.map((i) => figures[name].slice(i * width, (i + 1) * width).reduce((a, b) => a + (b || 0), 0));
  const shown = sorted.slice(0, 7), rest = sorted.slice(7);
  const parts = shown.map((name, i) => ({ name: name.slice(5, -2), ink: colour(i), y: binned(name) }));
  if (rest.length) parts.push({ name: "the rest", ink: colour(7), y: columns.map((i) => rest.reduce((all, name) => all + binned(name)[i], 0)) });
  const whole = Object.entries(run.phases).sort((a, b) => b[1] - a[1]), inside = whole.filter(([name]) => !outside.includes(name)).reduce((all, [, seconds]) => all + seconds, 0);
  const peaks = (run.memory || {}).peak_gib || {}, known = Object.keys(peaks).length > 0;
  return h("div", { class: "grid" },
    sorted.length && x.length ? stackChart({ title: "Where a step's time goes", help: "Share of the step by phase.", x: columns.map((i) => x[i * width]), parts, xName: "step" }) : null,
    h("article", { class: "card" }, h("h3", {}, "Seconds by phase, whole run"), h("div", { class: "scroll" }, tableOf({ head: ["phase", "seconds", "share of steps", ...(known ? ["peak GiB"] : [])], rows: whole.map(([name, seconds]) => [name, seconds, outside.includes(name) ? "outside" : `${((seconds / (inside || 1)) * 100).toFixed(1)}%`, ...(known ? [peaks[name] === undefined ? "-" : +peaks[name].toFixed(2)] : [])]) }, "full"))));
}

function recipes({ runs, diff }) {
  const found = [];
  if (runs.length > 1) {
    found.push(h("h3", {}, "What differs"), diff.length ? h("div", { class: "scroll card", tabindex: 0, role: "region", "aria-label": "Fields that differ" }, tableOf({ head: ["field", ...runs.map((run) => run.name)], rows: diff })) : h("p", { class: "soft" }, "Nothing."));
  }
  for (const run of runs) {
    found.push(h("details", {}, h("summary", {}, `Recipe of ${run.name}, every field`), h("div", { class: "scroll", tabindex: 0 }, h("pre", { class: "recipe" }, run.recipe || "not there"))));
    if (Object.keys(run.versions).length) found.push(h("details", {}, h("summary", {}, `Versions of ${run.name}`), tableOf({ head: ["package", "version"], rows: Object.entries(run.versions) })));
  }
  return found;
}

unpack("data").then(start).then(() => { document.documentElement.dataset.ready = String(Math.round(performance.now())); }).catch((error) => {
  document.getElementById("main").prepend(h("p", { class: "alarm" }, `This page could not be drawn (${error.message}). It needs a browser of 2023 or later.`));
  throw error;
});
