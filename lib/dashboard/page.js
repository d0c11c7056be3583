// Choices, search, focus and words. Charts are the Vega-Lite specifications of lib/dashboard/charts.yaml: here
// they only get their data. Text from the board is set as text, never as HTML.

const board = JSON.parse(document.getElementById("board").textContent);
const $ = (id) => document.getElementById(id);
const [LAYERS, HEADS] = board.shape;
const SITES = Array.from({ length: LAYERS * HEADS }, (_, i) => [Math.floor(i / HEADS), i % HEADS]);
const measureOf = Object.fromEntries(board.measures.map((m) => [m.key, m]));
const chosen = { layer: 0, head: 0, measure: "writes", case: 0, prompt: "control", edit: 0, change: false };

// Numbers: every array has the axes state, layer, head; a layer that an edit leaves alone is stored once.

const KINDS = { f4: Float32Array, i4: Int32Array, u2: Uint16Array, u1: Uint8Array };
const unpacked = {};

function numbers(name, state, layer, head) {
  const array = board.arrays[name];
  if (!unpacked[name]) {
    const text = atob(array.data), bytes = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) bytes[i] = text.charCodeAt(i);
    unpacked[name] = new KINDS[array.kind](bytes.buffer);
  }
  const start = (array.at[state][layer] * HEADS + head) * array.size;
  return unpacked[name].subarray(start, start + array.size);
}

const dot = (values, weights) => values.reduce((sum, v, i) => sum + v * weights[i], 0);
const known = (values) => Array.from(values).filter((v) => !Number.isNaN(v));
const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
const theCase = () => board.cases[chosen.case];
const isMean = () => chosen.prompt in theCase().means;
const prompt = () => theCase().prompts[chosen.prompt];

/** A head's value of a measure under the choices: a number, null where there is none, or the text of a role. */
function value(key, state, [layer, head]) {
  const own = board.arrays[key] ? key : `${key}/${theCase().name}`;
  if (!board.arrays[own]) return null;
  const found = numbers(own, state, layer, head), by = measureOf[key].by;
  if (measureOf[key].kind === "role") return measureOf[key].labels[found[0] + (key === "value" ? 0 : 1)];
  if (by === "prompt") return isMean() ? dot(found, theCase().means[chosen.prompt]) : found[chosen.prompt];
  if (by === "fact") {
    if (isMean()) return mean(known(found));
    return Number.isNaN(found[prompt().fact]) ? null : found[prompt().fact];
  }
  return key === "relation" ? Math.max(...found) : found[0];
}

/** What the grid shows of a head: the value with the chosen edit, or what the edit changes of it. */
function shown(site) {
  const now = value(chosen.measure, chosen.edit, site);
  if (!changes()) return now;
  const before = value(chosen.measure, 0, site);
  return now === null || before === null ? null : now - before;
}

const changes = () => chosen.change && chosen.edit > 0 && measureOf[chosen.measure].kind !== "role";
const signed = () => changes() || measureOf[chosen.measure].kind === "signed";

// Words

const name = ([layer, head]) => `L${layer + 1} H${head}`;
const short = ([layer, head]) => `L${layer + 1}H${head}`;
const words = (text) => text.replaceAll("_", " ");
/** Two decimals; three where two would hide what is there; none from a hundred on. Never a minus zero. */
function number(v, digits = Math.abs(v) >= 100 ? 0 : Math.abs(v) < 0.095 ? 3 : 2) {
  const text = v.toFixed(digits);
  return Number(text) === 0 ? "0" : text.replace("-", "−");
}
const plus = (v, digits) => (Number(v.toFixed(digits ?? 3)) > 0 ? "+" : "") + number(v, digits);
const share = (v) => `${(100 * v).toFixed(v && Math.abs(v) < 0.1 ? 1 : 0)}\u00a0%`.replace("-", "−");
const ordinal = (n) => n + (["th", "st", "nd", "rd"][n % 100 > 10 && n % 100 < 14 ? 0 : n % 10] ?? "th");
const p = (v) => (v < 0.0015 ? "p\u00a0≤\u00a00.001" : `p\u00a0=\u00a0${v.toFixed(3)}`);

function said(key, v, { change = false } = {}) {
  if (v === null) return "none";
  const { kind, unit } = measureOf[key];
  if (kind === "role") return words(v);
  const text = change || kind === "signed" ? plus(v) : number(v);
  return unit ? `${text} ${unit}` : text;
}

function element(tag, options = {}, ...children) {
  const { class: style, ...rest } = options;
  const made = document.createElement(tag);
  if (style) made.className = style;
  for (const [key, v] of Object.entries(rest)) made.setAttribute(key, v);
  made.append(...children.filter((c) => c !== null && c !== undefined));
  return made;
}

const token = (text, style = "") => element("span", { class: `token ${style}` }, text.replace(/^ /, "·").replaceAll("\n", "↵"));
const editTitle = (i = chosen.edit) => board.states[i].title;

// The address: #L10H8&measure=...&case=...&prompt=...&edit=...&change=1

const promptName = (i) => {
  const { template, fact } = theCase().prompts[i];
  return `${template}/${theCase().facts[fact].subject}`;
};

function address() {
  const parts = [
    `measure=${chosen.measure}`, `case=${encodeURIComponent(theCase().name)}`,
    `prompt=${encodeURIComponent(isMean() ? chosen.prompt : promptName(chosen.prompt))}`,
    `edit=${board.states[chosen.edit].key}`, ...(chosen.change ? ["change=1"] : []),
  ];
  return `#${short([chosen.layer, chosen.head])}&${parts.join("&")}`;
}

/** Reads the address into the choices; what it does not name stays. Returns a sentence on what does not exist. */
function read(hash) {
  let text = hash.slice(1), trouble = "";
  try { text = decodeURIComponent(text); } catch { return "The address is damaged."; }
  const site = /^L(\d+) ?H(\d+)(?=&|$)/i.exec(text);
  if (site) {
    const [layer, head] = [Number(site[1]) - 1, Number(site[2])];
    if (layer >= 0 && layer < LAYERS && head < HEADS) Object.assign(chosen, { layer, head });
    else trouble = `There is no ${name([layer, head])}: layers go from 1 to ${LAYERS}, heads from 0 to ${HEADS - 1}. `;
  }
  const wanted = new URLSearchParams(hash.slice(1).replace(/^[^&]*&?/, ""));
  const pick = (key, list, of) => {
    if (!wanted.has(key)) return undefined;
    const at = list.findIndex((x) => of(x) === wanted.get(key));
    if (at < 0) trouble += `There is no ${key} “${wanted.get(key)}” here. `;
    return at < 0 ? undefined : at;
  };
  const measure = pick("measure", board.measures, (m) => m.key);
  if (measure !== undefined) chosen.measure = board.measures[measure].key;
  const other = pick("case", board.cases, (c) => c.name);
  if (other !== undefined && other !== chosen.case) Object.assign(chosen, { case: other, prompt: "control" });
  if (wanted.get("prompt") in theCase().means) chosen.prompt = wanted.get("prompt");
  else chosen.prompt = pick("prompt", theCase().prompts.map((_, i) => i), promptName) ?? chosen.prompt;
  chosen.edit = pick("edit", board.states, (s) => s.key) ?? chosen.edit;
  if (wanted.has("measure")) chosen.change = wanted.get("change") === "1";
  return trouble;
}

/** A choice: into the address (a step back for heads only), and shown. */
function choose(change, { step = false } = {}) {
  Object.assign(chosen, change);
  history[step ? "pushState" : "replaceState"](null, "", address());
  show();
}

// Charts

const views = {};

function draw(slot, spec, data, { signals = {}, patch = null, key = "" } = {}) {
  const box = $(slot), theme = document.documentElement.dataset.theme;
  const wanted = [spec, theme, key].join();
  const previous = views[slot]?.ready ?? Promise.resolve(null);
  const ready = previous.catch(() => null).then(async (old) => {
    if (old && views[slot].shows === wanted) {
      for (const [k, v] of Object.entries(signals)) old.view.signal(k, v);
      await old.view.data("rows", data).runAsync();
      return old;
    }
    old?.finalize();
    const made = structuredClone(board.specs[spec]);
    made.datasets = { rows: data };
    for (const param of made.params ?? []) if (param.name in signals) param.value = signals[param.name];
    patch?.(made);
    const drawn = await vegaEmbed(box, made, {
      actions: false, renderer: "svg", ast: true, config: board.themes[theme], tooltip: { theme },
    });
    box.querySelector("svg")?.setAttribute("aria-hidden", "true");
    box.querySelector("svg")?.setAttribute("focusable", "false");
    views[slot].shows = wanted;
    return drawn;
  });
  views[slot] = { ...views[slot], ready };
  return ready;
}

// The grid

let layout = "";
let matching = new Set();

function geometry() {
  const width = $("grid-box").clientWidth - 64;
  const wide = width / LAYERS >= 18;
  const [across, down] = wide ? [LAYERS, HEADS] : [HEADS, LAYERS];
  const x = Math.max(wide ? 18 : 22, Math.min(60, Math.floor(width / across)));
  return { wide, across, down, x, y: wide ? Math.max(26, Math.min(34, Math.round(360 / down))) : 25 };
}

const cellOf = (site) => $(`cell-${short(site)}`);

/** The cells that mouse, keyboard and screen reader use, laid over the chart. */
function makeCells({ wide, across, down }) {
  const rows = Array.from({ length: down }, (_, r) => {
    const cells = Array.from({ length: across }, (_, c) => {
      const site = wide ? [c, r] : [r, c];
      const cell = element("div", { role: "gridcell", id: `cell-${short(site)}`, tabindex: "-1" });
      cell.site = site;
      return cell;
    });
    return element("div", { role: "row" }, ...cells);
  });
  $("grid").replaceChildren(...rows);
}

async function showGrid() {
  const g = geometry(), measure = measureOf[chosen.measure], role = measure.kind === "role";
  if (layout !== JSON.stringify([g.wide])) {
    layout = JSON.stringify([g.wide]);
    makeCells(g);
  }
  const values = SITES.map(shown), marks = theCase().marks;
  const scale = role ? [] : SITES.flatMap((site) =>
    changes() ? [shown(site)] : board.states.map((_, s) => value(chosen.measure, s, site))).filter((v) => v !== null);
  const high = Math.max(1e-9, ...scale.map(Math.abs));
  const data = SITES.map((site, i) => ({
    layer: site[0] + 1, head: site[1], value: values[i], mark: marks[short(site)] ?? "",
    shade: matching.has(short(site)) ? 1 : 0.13,
  }));
  SITES.forEach((site, i) => {
    const cell = cellOf(site), current = site[0] === chosen.layer && site[1] === chosen.head;
    const mark = { K: ", knowledge head", S: ", suppressor" }[marks[short(site)]] ?? "";
    const faded = matching.has(short(site)) ? "" : ", not among the found";
    cell.setAttribute("aria-label", `${name(site)}, ${said(chosen.measure, values[i], { change: changes() })}${mark}${faded}`);
    cell.setAttribute("aria-selected", String(current));
    if (!$("grid").contains(document.activeElement)) cell.tabIndex = current ? 0 : -1;
  });
  const spec = `grid ${chosen.measure}${changes() ? " change" : ""} ${g.wide ? "wide" : "tall"}`;
  const drawn = await draw("grid-chart", spec, data, {
    signals: role ? {} : { high },
    key: `${g.x},${g.y}`,
    patch: (made) => Object.assign(made, { width: { step: g.x }, height: { step: g.y } }),
  });
  const [left, top] = drawn.view.origin(), padding = drawn.view.padding();
  const box = $("grid-chart");
  Object.assign($("grid").style, { left: `${box.offsetLeft + padding.left + left}px`, top: `${box.offsetTop + padding.top + top}px` });
  for (const cell of document.querySelectorAll("#grid [role=gridcell]")) {
    cell.style.width = `${g.x}px`;
    cell.style.height = `${g.y}px`;
  }
}

function readout(site) {
  const roles = ["seeks", "advertises", "value"].map((k) => words(value(k, chosen.edit, site)));
  $("readout").textContent = `${name(site)}: ${said(chosen.measure, shown(site), { change: changes() })}. ` +
    `Query seeks ${roles[0]}, key advertises ${roles[1]}, value ${roles[2]}.`;
}

function walk(event) {
  const cell = event.target.closest("[role=gridcell]");
  if (!cell) return;
  const { wide } = geometry(), [layer, head] = cell.site;
  const [row, column] = wide ? [head, layer] : [layer, head];
  const [rows, columns] = wide ? [HEADS, LAYERS] : [LAYERS, HEADS];
  const to = {
    ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
    Home: [event.ctrlKey ? 0 : row, 0], End: [event.ctrlKey ? rows - 1 : row, columns - 1],
    PageUp: [0, column], PageDown: [rows - 1, column],
  }[event.key];
  if (event.key === "Enter" || event.key === " ") choose({ layer, head }, { step: true });
  else if (to && to[0] >= 0 && to[0] < rows && to[1] >= 0 && to[1] < columns) {
    const site = wide ? [to[1], to[0]] : to;
    cell.tabIndex = -1;
    cellOf(site).tabIndex = 0;
    cellOf(site).focus();
  } else if (!to) return;
  event.preventDefault();
}

// Search and filters

const haystack = (site) => {
  const mark = { K: "knowledge head", S: "suppressor" }[theCase().marks[short(site)]] ?? "";
  const [seeks, advertises, does] = ["seeks", "advertises", "value"].map((k) => words(value(k, chosen.edit, site)));
  return `seeks ${seeks}, advertises ${advertises}, ${does}, ${mark}`.toLowerCase();
};

function fits(site, terms) {
  const [l, h] = [`l${site[0] + 1}`, `h${site[1]}`];
  return terms.every((t) => (/^(l\d+)?(h\d+)?$/.test(t) ? [l, h, l + h].includes(t) : haystack(site).includes(t)));
}

function search() {
  const text = $("search").value.toLowerCase().replaceAll("_", " ");
  const terms = text.replace(/layer\s*(\d+)/g, "l$1").replace(/head\s+(\d+)/g, "h$1").split(/[\s,]+/).filter(Boolean);
  const [key, label] = $("role").value.split(":");
  const role = measureOf[chosen.measure].kind === "role";
  const values = SITES.map(shown), size = (v) => (signed() ? Math.abs(v) : v);
  const most = role ? 1 : Math.max(1e-9, ...values.filter((v) => v !== null).map(size));
  const least = role ? 0 : Number($("least").value) * most;
  $("least").disabled = role;
  $("least-label").classList.toggle("off", role);
  $("least-text").textContent = role ? "for measures with numbers" : said(chosen.measure, least).replace("+", "") +
    (signed() ? ", up or down" : "");
  const kept = SITES.map((site, i) => ({ site, v: values[i] })).filter(({ site, v }) =>
    fits(site, terms) && (!key || value(key, chosen.edit, site) === label) && (!least || (v !== null && size(v) >= least)));
  matching = new Set(kept.map(({ site }) => short(site)));
  if (!role) kept.sort((a, b) => size(b.v ?? -1) - size(a.v ?? -1));
  const all = kept.length === SITES.length;
  $("matches").textContent = `${all ? `All ${SITES.length}` : `${kept.length} of ${SITES.length}`} heads` +
    (kept.length > 12 ? (role ? ", the first 12:" : ", the 12 strongest:") : kept.length ? ":" : ". Loosen the search.");
  $("ranking").replaceChildren(...kept.slice(0, 12).map(({ site, v }) => {
    const current = site[0] === chosen.layer && site[1] === chosen.head;
    const link = element("a", { href: `#${short(site)}`, ...(current ? { "aria-current": "true" } : {}) },
      element("span", {}, name(site)), element("span", {}, said(chosen.measure, v, { change: changes() })));
    return element("li", {}, link);
  }));
}

// The chosen head

function compare(make) {
  const before = make(0), after = chosen.edit ? make(chosen.edit) : null;
  const cell = (text, small) => element("td", {}, element("b", {}, text), small ? element("small", {}, small) : null);
  return [cell(...before), ...(after ? [cell(...after)] : [])];
}

function rank(key, state, site) {
  const own = Math.abs(value(key, state, site) ?? 0);
  return 1 + SITES.filter((other) => Math.abs(value(key, state, other) ?? 0) > own).length;
}

function showRoles(site) {
  const [layer, head] = site;
  const of = (state) => Object.fromEntries(
    board.role_numbers.map((k, i) => [k, numbers("role_numbers", state, layer, head)[i]]));
  const chance = board.chance;
  const whose = isMean() ? { failing: "failing prompts", control: "controls that tell" }[chosen.prompt] : "the chosen prompt";
  const strength = (key, unit) => (s) => {
    const v = value(key, s, site);
    return v === null ? ["none", "the fact is told: nothing to bring back"]
      : [`${plus(v)} ${unit}`, `${ordinal(rank(key, s, site))} of ${SITES.length} by size; ${key === "patching" && isMean() ? "untold facts" : whose}`];
  };
  const rows = [
    ["Query seeks", (s) => [words(value("seeks", s, site)),
      `best type ${plus(of(s).seeks_effect)} SD above the mean word, ${p(of(s).seeks_p)}`]],
    ["Key advertises", (s) => [words(value("advertises", s, site)),
      `best type ${plus(of(s).advertises_effect)} SD above the mean word, ${p(of(s).advertises_p)}`]],
    ["Value channel", (s) => [words(value("value", s, site)),
      `a word's own logit ${plus(of(s).copy_score)} SD, ${p(of(s).copy_p)}`]],
    ["Relation map", (s) => {
      const [raw, enriched] = numbers("relation", s, layer, head);
      return [`${share(of(s).relation_score)} of ${board.studied} countries`,
        `bare embedding ${share(raw)}, enriched ${share(enriched)}; ${p(of(s).relation_p)}`];
    }],
    ["QK overlap", (s) => {
      const v = value("qk_overlap", s, site);
      const where = v > chance.high ? "above" : v < chance.low ? "below" : "within";
      return [number(v), `${where} chance: ${number(chance.mean)} (${number(chance.low)} to ${number(chance.high)})`];
    }],
    ["K-norm", (s) => [number(value("k_norm", s, site)), `${ordinal(rank("k_norm", s, site))} of ${SITES.length}`]],
    ["Contribution", strength("writes", "logits")],
    ["Answer − competitor", strength("pushes", "logits")],
    ["Patching effect", strength("patching", "of the lost margin")],
  ];
  const titles = ["", "Untouched", ...(chosen.edit ? [editTitle()] : [])];
  $("roles").replaceChildren(
    element("thead", {}, element("tr", {}, ...titles.map((t) => element(t ? "th" : "td", t ? { scope: "col" } : {}, t)))),
    element("tbody", {}, ...rows.map(([title, make]) =>
      element("tr", {}, element("th", { scope: "row" }, title), ...compare(make)))));
}

function showPoints(site) {
  const key = chosen.measure === "pushes" ? "pushes" : "writes", c = theCase();
  const of = (s) => numbers(`${key}/${c.name}`, s, ...site);
  const rows = [], fact = (i) => `${c.facts[i].subject} → ${c.facts[i].answer}`;
  c.prompts.forEach((q, i) => {
    const row = { fact: fact(q.fact), order: q.fact, prompt: board.texts[q.text].text, told: q.told[0] ? "told" : "not told" };
    if (q.control) rows.push({ ...row, kind: "control prompts", value: of(0)[i] });
    else {
      rows.push({ ...row, kind: "failing prompt", value: of(0)[i] });
      if (chosen.edit) rows.push({ ...row, kind: "failing prompt, edited", value: of(chosen.edit)[i] });
    }
  });
  $("points-text").textContent = `${measureOf[key].title}, in logits, on every prompt of the case` +
    (chosen.edit ? `; edited: ${editTitle()}.` : ".");
  const failing = c.facts.map((_, i) => of(0)[i]), edited = c.facts.map((_, i) => of(chosen.edit)[i]);
  const controls = c.facts.map((_, i) => mean(c.prompts.flatMap((q, j) => (q.control && q.fact === i ? [of(0)[j]] : []))));
  $("points").setAttribute("aria-label", `Contribution of ${name(site)} by prompt: mean over failing prompts ` +
    `${plus(mean(failing))} logits, over control prompts ${plus(mean(controls))}` +
    (chosen.edit ? `, over failing prompts with the edit ${plus(mean(edited))}.` : "."));
  const titles = ["Fact", "Controls, mean", "Failing", ...(chosen.edit ? ["Failing, edited"] : [])];
  $("points-table").replaceChildren(
    element("thead", {}, element("tr", {}, ...titles.map((t, i) => element("th", { scope: "col", class: i ? "number" : "" }, t)))),
    element("tbody", {}, ...c.facts.map((_, i) => element("tr", {}, element("th", { scope: "row" }, fact(i)),
      ...[controls[i], failing[i], ...(chosen.edit ? [edited[i]] : [])].map((v) => element("td", { class: "number" }, plus(v)))))));
  return draw("points", chosen.edit ? "points edited" : "points", rows, {
    key: c.name, patch: (made) => Object.assign(made, { height: 24 * c.facts.length }),
  });
}

/** The prompt to look at, and its counterpart: the failing one beside a control that tells the same fact. */
function prompts() {
  const c = theCase(), one = isMean() ? c.failing[0] : chosen.prompt;
  const fact = c.prompts[one].fact;
  const first = c.prompts[one].control ? fact : one;
  return [first, c.prompts[one].control ? one : c.told_by[fact][0]];
}

function pattern(text, state, [layer, head]) {
  const { tokens, start } = board.texts[text], all = numbers("patterns", state, layer, head), rows = [];
  let at = start;
  for (let q = 0; q < tokens.length; q++)
    for (let k = 0; k <= q; k++) rows.push({ query: `${q} ${tokens[q]}`, key: `${k} ${tokens[k]}`, weight: all[at++] / 255, q, k });
  return rows;
}

async function showAttention(site) {
  const c = theCase(), states = chosen.edit ? [0, chosen.edit] : [0];
  const [failing, control] = prompts();
  const panels = [...states.map((s) => [failing, s]), ...(chosen.edit ? [] : [[control, 0]])];
  if (chosen.edit && c.prompts[chosen.prompt]?.control) panels.splice(0, 2, [control, 0], [control, chosen.edit]);
  const boxes = panels.map(([i, s], n) => {
    const q = c.prompts[i], { tokens, text } = board.texts[q.text];
    const last = pattern(q.text, s, site).filter((r) => r.q === tokens.length - 1).sort((a, b) => b.weight - a.weight);
    const most = last.filter((r, i) => !i || (i < 3 && r.weight >= 0.01)).map((r) => `“${tokens[r.k]}” ${share(r.weight)}`);
    const rest = Math.max(0, Math.round(100 * (1 - last.reduce((sum, r) => sum + r.weight, 0))));  // of rounded parts
    if (s && board.states[s].layer === null) most.push(`the sink before the text ${rest} %`);
    const words = element("figcaption", {}, element("b", {}, q.control ? "Control" : "Failing", s ? `, ${editTitle(s)}` : ", untouched"),
      element("br"), text, " → ", element("b", {}, q.top[s]), q.told[s] ? " (told)" : " (not told)", element("br"),
      `The last token looks at ${most.join(", ")}.`);
    const chart = element("div", { id: `attention-${n}`, role: "img", "aria-label": `Attention of ${name(site)} on “${text}”` });
    return element("figure", {}, words, element("div", { class: "scroll", tabindex: "0", role: "region",
      "aria-label": `Attention pattern ${n + 1}` }, chart));
  });
  for (const n of [0, 1]) { (await views[`attention-${n}`]?.ready)?.finalize(); delete views[`attention-${n}`]; }
  $("attention").replaceChildren(...boxes);
  const longest = Math.max(...panels.map(([i]) => board.texts[c.prompts[i].text].tokens.length));
  const step = Math.max(15, Math.min(32, Math.floor(300 / longest)));
  await Promise.all(panels.map(([i, s], n) => draw(`attention-${n}`, "attention", pattern(c.prompts[i].text, s, site),
    { patch: (made) => Object.assign(made, { width: { step }, height: { step } }) })));
}

function showTokens(site) {
  const c = theCase(), fact = isMean() ? null : c.facts[prompt().fact];
  const source = fact ? fact.source : board.facts + chosen.case;
  const answers = fact ? [fact.answer] : c.facts.map((f) => f.answer);
  const list = (state, way) => Array.from({ length: board.top }, (_, i) => {
    const at = (source * 2 + way) * board.top + i;
    return [board.words[numbers("tokens", state, ...site)[at]], numbers("token_scores", state, ...site)[at]];
  });
  const differs = chosen.edit && board.arrays.tokens.at[chosen.edit][site[0]] !== board.arrays.tokens.at[0][site[0]];
  const tables = [0, 1].map((way) => {
    const columns = [list(0, way), ...(differs ? [list(chosen.edit, way)] : [])];
    const titles = differs ? ["untouched", editTitle()] : [];
    const cells = (i) => columns.flatMap((rows) => {
      const [text, score] = rows[i];
      const own = answers.some((a) => text.trim() && a.startsWith(text.trim()));
      return [element("td", {}, token(text, own ? "answer" : ""), own ? " ✓" : null), element("td", { class: "number" }, plus(score, 1))];
    });
    return element("table", {}, element("caption", {}, way ? "Suppresses" : "Promotes"),
      titles.length ? element("thead", {}, element("tr", {}, ...titles.map((t) => element("th", { scope: "col", colspan: "2" }, t)))) : null,
      element("tbody", {}, ...Array.from({ length: board.top }, (_, i) => element("tr", {}, ...cells(i)))));
  });
  $("tokens").replaceChildren(...tables);
  $("tokens").classList.toggle("stacked", Boolean(differs));
  const whose = fact ? `the embedding of “${fact.subject}”` : `the subjects of the case, on average`;
  $("tokens-text").textContent = `Without input: ${whose}, enriched by the first MLP, through this head's value and output ` +
    "matrices and the unembedding. Standard deviations over the vocabulary; · is a leading space, ✓ an answer of the case." +
    (chosen.edit && !differs ? ` ${editTitle()} leaves this channel as it is.` : "");
  const ranks = (s) => c.facts.map((f) => numbers("answer_ranks", s, ...site)[f.source]);
  const before = ranks(0), after = differs ? ranks(chosen.edit) : null;
  $("ranks").textContent = "Rank of each answer: " + c.facts.map((f, i) =>
    `${f.answer} ${before[i].toLocaleString("en")}${after ? ` → ${after[i].toLocaleString("en")}` : ""}`).join(", ") + ".";
}

function showNorms(site) {
  const rows = [0, ...(chosen.edit ? [chosen.edit] : [])].flatMap((s) => board.types.map((type, i) => ({
    type: words(type), norm: numbers("k_norm_by_type", s, ...site)[i], state: s ? "edited" : "untouched",
  })));
  const loudest = rows.slice(0, board.types.length).reduce((a, b) => (b.norm > a.norm ? b : a));
  $("norms").setAttribute("aria-label", `K-norm of ${name(site)} by token type, largest for ${loudest.type}: ${number(loudest.norm)}.`);
  return draw("norms", chosen.edit ? "norms edited" : "norms", rows);
}

function tags(site) {
  const out = board.cases.flatMap((c) => {
    const mark = { K: "knowledge head", S: "suppressor" }[c.marks[short(site)]];
    return mark ? [`${mark}, ${c.title}`] : [];
  });
  if (chosen.edit && board.states[chosen.edit].layer === site[0]) out.push(`in the edited layer`);
  return out.map((text) => element("span", { class: "tag" }, text));
}

function summary(site) {
  const [seeks, advertises, does] = ["seeks", "advertises", "value"].map((k) => words(value(k, chosen.edit, site)));
  const m = measureOf[chosen.measure], finding = theCase().finding;
  const what = { copies: "copies the word that it reads", suppresses: "suppresses the word that it reads",
    "maps relation": "turns countries into their capitals", neither: "neither copies nor suppresses" }[does];
  let text = `${name(site)}: its query seeks ${seeks === "none" ? "no type" : seeks}, its key advertises ` +
    `${advertises === "none" ? "no type" : advertises}, its value channel ${what}.`;
  if (m.kind !== "role") {
    const v = value(chosen.measure, chosen.edit, site);
    text += v === null ? ` ${m.title}: none here.` : ` ${m.title}: ${said(chosen.measure, v)}, ` +
      `${ordinal(rank(chosen.measure, chosen.edit, site))} of ${SITES.length}` + (chosen.edit ? ` with the edit ${editTitle()}` : "") +
      (chosen.edit ? ` (untouched: ${said(chosen.measure, value(chosen.measure, 0, site))}).` : ".");
  }
  if (finding?.knowledge_head === name(site)) text += ` Chapter 2 names it the case's knowledge head: the failure is ` +
    `“${finding.failure_kind}”, confidence ${finding.confidence}.`;
  if (board.ablated.knowledge_head === name(site)) text += ` Taken away (resampled), it costs the answer ${number(-board.ablated.head_effect)} logits ` +
    `(${number(-board.ablated.head_interval[1])} to ${number(-board.ablated.head_interval[0])}) on control prompts, says chapter 5.`;
  return text;
}

function showHead() {
  const site = [chosen.layer, chosen.head];
  $("head-title").textContent = name(site);
  $("tags").replaceChildren(...tags(site));
  $("link").href = address();
  $("said").textContent = summary(site);
  showRoles(site);
  showTokens(site);
  return Promise.all([showPoints(site), showAttention(site), showNorms(site)]);
}

// Everything

function showChoices() {
  const c = theCase(), m = measureOf[chosen.measure];
  $("measure").value = chosen.measure;
  $("case").value = String(chosen.case);
  const option = (v, text) => element("option", { value: String(v) }, text);
  const failing = c.prompts.flatMap((q, i) => (q.control ? [] : [option(i, board.texts[q.text].text)]));
  const control = c.prompts.flatMap((q, i) => (q.control ? [option(i, board.texts[q.text].text)] : []));
  $("prompt").replaceChildren(
    option("control", `mean: controls that tell (${c.failing.length} facts)`),
    option("failing", `mean: failing prompts (${c.failing.length} facts)`),
    element("optgroup", { label: `failing: ${c.template}` }, ...failing),
    element("optgroup", { label: "controls" }, ...control));
  $("prompt").value = String(chosen.prompt);
  $("edit").value = String(chosen.edit);
  $("change").checked = chosen.change;
  $("change").disabled = chosen.edit === 0 || m.kind === "role";
  $("change").parentElement.classList.toggle("off", $("change").disabled);
  $("grid-title").textContent = `${m.title}${changes() ? `, change by the edit ${editTitle()}` : chosen.edit ? `, with the edit ${editTitle()}` : ""}`;
  $("measure-text").textContent = m.text + (m.by === "weights" ? "" : m.by === "fact" ? " Case: " + c.title + "." : ` Case: ${c.title}; ` +
    (isMean() ? $("prompt").selectedOptions[0].textContent + "." : `prompt: ${board.texts[prompt().text].text}`));
  const told = (s) => c.prompts.filter((q) => !q.control && q.told[s]).length;
  const edit = board.states[chosen.edit];
  $("told").textContent = `Case “${c.title}”: “${c.template}” tells ${told(0)} of ${c.facts.length} facts` +
    (c.left_out ? ` (${c.left_out} more of the case are not shown)` : "") + " on the untouched model" +
    (chosen.edit ? `, ${told(chosen.edit)} with the edit ${edit.title} (${edit.text}).` : ".") +
    (isMean() ? "" : ` “${board.texts[prompt().text].text}” is followed by “${prompt().top[0]}”` +
      (chosen.edit ? `, with the edit by “${prompt().top[chosen.edit]}”.` : "."));
}

let trouble = "";

async function show() {
  showChoices();
  search();
  readout([chosen.layer, chosen.head]);
  document.body.setAttribute("aria-busy", "true");
  const drawn = Promise.all([showGrid(), showHead()]);
  if (trouble) $("said").textContent = trouble + $("said").textContent;
  await drawn;
  document.body.setAttribute("aria-busy", "false");
}

function fill() {
  const options = (list, text) => list.map((x, i) => element("option", { value: x.key ?? String(i) }, text(x)));
  const measures = (by, title) => element("optgroup", { label: title },
    ...options(board.measures.filter((m) => (m.by === "weights") === by), (m) => m.title));
  $("measure").replaceChildren(measures(false, "on prompts"), measures(true, "from the weights alone"));
  $("case").replaceChildren(...board.cases.map((c, i) => element("option", { value: String(i) }, c.title)));
  $("edit").replaceChildren(...board.states.map((s, i) => element("option", { value: String(i) }, s.title)));
  const group = (key, title) => element("optgroup", { label: title },
    ...measureOf[key].labels.map((x) => element("option", { value: `${key}:${x}` }, words(x))));
  $("role").replaceChildren(element("option", { value: "" }, "any"), group("seeks", "query seeks"),
    group("advertises", "key advertises"), group("value", "value channel"));
}

function setTheme(theme, keep) {
  document.documentElement.dataset.theme = theme;
  $("theme").textContent = theme === "dark" ? "Light colours" : "Dark colours";
  if (keep) try { localStorage.setItem("heads-theme", theme); } catch { /* a file may have no storage */ }
}

/** Inside a page of the book that may be read from here (not from a file), its colours are followed. */
function followBook() {
  let root;
  try { root = parent === window ? null : parent.document.documentElement; } catch { return null; }
  if (!root?.dataset.theme) return null;
  new MutationObserver(() => { setTheme(root.dataset.theme, false); show(); })
    .observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  return root.dataset.theme;
}

function start() {
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let kept = followBook();
  try { kept ??= localStorage.getItem("heads-theme"); } catch { /* the same */ }
  setTheme(kept ?? (dark.matches ? "dark" : "light"), false);
  dark.addEventListener("change", () => { setTheme(dark.matches ? "dark" : "light", false); show(); });
  $("theme").addEventListener("click", () => {
    setTheme(document.documentElement.dataset.theme === "dark" ? "light" : "dark", true);
    show();
  });
  fill();
  const first = theCase().finding?.knowledge_head.match(/L(\d+) H(\d+)/);
  if (first) Object.assign(chosen, { layer: Number(first[1]) - 1, head: Number(first[2]) });
  trouble = read(location.hash);
  const on = (id, change) => $(id).addEventListener("change", (e) => choose(change(e.target)));
  on("measure", (x) => ({ measure: x.value }));
  on("case", (x) => ({ case: Number(x.value), prompt: isMean() ? chosen.prompt : "control" }));
  on("prompt", (x) => ({ prompt: x.value in theCase().means ? x.value : Number(x.value) }));
  on("edit", (x) => ({ edit: Number(x.value) }));
  on("change", (x) => ({ change: x.checked }));
  for (const id of ["search", "least", "role"]) $(id).addEventListener("input", () => { search(); showGrid(); });
  const grid = $("grid");
  grid.addEventListener("keydown", walk);
  grid.addEventListener("click", (e) => {
    const site = e.target.closest("[role=gridcell]")?.site;
    if (!site) return;
    choose({ layer: site[0], head: site[1] }, { step: true });
    if (innerWidth <= 600) $("head").scrollIntoView();
  });
  grid.addEventListener("pointerover", (e) => { if (e.target.site) readout(e.target.site); });
  grid.addEventListener("focusin", (e) => { if (e.target.site) readout(e.target.site); });
  grid.addEventListener("pointerleave", () => readout([chosen.layer, chosen.head]));
  // A link to a head: its address names the head alone, and the other choices stay.
  document.addEventListener("click", (e) => {
    const link = e.target.closest?.("a[href^='#L']");
    if (!link || e.ctrlKey || e.metaKey || e.shiftKey) return;
    e.preventDefault();
    trouble = read(link.getAttribute("href"));
    choose({}, { step: true });
    trouble = "";
  });
  for (const [id, to] of [["back", "grid-title"], ["skip", "grid-title"]])
    $(id).addEventListener("click", (e) => { e.preventDefault(); $(to).scrollIntoView(); $(to).focus(); });
  addEventListener("hashchange", () => { trouble = read(location.hash); show(); trouble = ""; });
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(showGrid, 150); });
  show();
  trouble = "";
}

start();
