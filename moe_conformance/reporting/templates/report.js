"use strict";
// The state of the page is its address: filters, the difference of two runs, and the result that is open.
// `data` is what reporting/page.py has packed; a row is a number, and `rows.case[row]` its place in `data.cases`.

const FILTERS = ["engine", "column", "class", "stage", "verdict", "q", "from", "to"];
const PAGE = 100; // results that "More" adds
const FAULTS = 20; // faults that are shown at first
let data, rows;
let expanded = new Set(); // classes that show their clauses
let found = []; // what is listed: { row }, or a change of it
let shown = PAGE, shownFaults = FAULTS;

const $ = (id) => document.getElementById(id);
const state = () => new URLSearchParams(location.hash.slice(1));
const form = () => document.forms[0];

/** Lets the browser draw and answer between two long steps. */
const pause = () => new Promise((resolve) => setTimeout(resolve));

/** An element with these attributes and children; text is never taken for markup. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

async function unpack() {
  const letters = atob($("data").textContent), bytes = new Uint8Array(letters.length);
  for (let place = 0; place < letters.length; place++) bytes[place] = letters.charCodeAt(place);
  await pause();
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

/** The address with these values instead; an empty one is left out. */
function address(changes) {
  const next = state();
  for (const [key, value] of Object.entries(changes)) value ? next.set(key, value) : next.delete(key);
  return `#${next}`;
}

// Rows -----------------------------------------------------------------------------------------------------------

const verdictOf = (row) => data.verdicts[rows.verdict[row]];
const caseOf = (row) => data.cases[rows.case[row]];
const checkOf = (row) => data.checks[rows.check[row]];
const columnOf = (row) => data.columns[rows.column[row]];
const messageOf = (row) => data.messages[rows.message[row]];

/** How a row is named in the address: by whole names, for numbers are those of one file. */
const nameOf = (row) => [caseOf(row).id, checkOf(row), columnOf(row).label].join("/");

function tone(verdict) {
  if (verdict.badness === 2) return "bad";
  if (verdict.badness || verdict.name === "known_failure") return "warn";
  return verdict.name === "pass" ? "good" : "none";
}

/** A verdict by mark and word; its colour only repeats them. */
function badge(verdict) {
  return element("span", { class: `badge ${tone(verdict)}` }, `${verdict.mark} ${verdict.name.replaceAll("_", " ")}`);
}

/** Whether a row, or with `anyVerdict` its case and column, is what the address asks for. */
function filter(asked) {
  const text = (asked.get("q") || "").toLowerCase();
  const having = (list) => text && list.map((item) => item.toLowerCase().includes(text));
  const inCase = having(data.cases.map((item) => item.id)), inCheck = having(data.checks);
  const inMessage = having(data.messages);
  const [engine, label, group, clause, stage, verdict] =
    ["engine", "column", "class", "clause", "stage", "verdict"].map((name) => asked.get(name));
  const columns = data.columns.map((item) => (!engine || item.engine === engine) && (!label || item.label === label));
  const cases = data.cases.map((item) => (!group || item.class === group) && (!stage || item.stage === stage)
    && (!clause || data.clauses[item.clause]?.id === clause));
  const verdicts = data.verdicts.map((item) => !verdict || verdict === item.name
    || (verdict === "any failure" && item.badness > 0));
  return (row, anyVerdict = false) => columns[rows.column[row]] && cases[rows.case[row]]
    && (anyVerdict || verdicts[rows.verdict[row]])
    && (!text || inCase[rows.case[row]] || inCheck[rows.check[row]] || inMessage[rows.message[row]]);
}

/** What differs between two runs, worse first, by the rules of reporting/stream.py. */
function difference(from, to, passes) {
  const worst = (run) => {
    const kept = new Map();
    for (let row = 0; row < rows.case.length; row++) {
      if (columnOf(row).run !== run || !passes(row, true)) continue;
      const key = `${columnOf(row).engine}/${rows.case[row]}/${rows.check[row]}`, other = kept.get(key);
      if (other === undefined || verdictOf(row).badness > verdictOf(other).badness) kept.set(key, row);
    }
    return kept;
  };
  const before = worst(from), after = worst(to), changes = [];
  for (const key of new Set([...before.keys(), ...after.keys()])) {
    const old = before.has(key) ? verdictOf(before.get(key)) : null;
    const now = after.has(key) ? verdictOf(after.get(key)) : null;
    if (old === now) continue;
    const isJudged = now !== null && now.judged, least = old === null ? 1 : old.badness;
    const isWorse = isJudged ? now.badness > least : old !== null && old.judged;
    changes.push({ row: after.get(key) ?? before.get(key), old, now, isWorse });
  }
  return changes.sort((one, other) => other.isWorse - one.isWorse);
}

// The form -------------------------------------------------------------------------------------------------------

/** Classes in the order of the contract, others behind them. */
function inOrder(classes) {
  const others = classes.filter((name) => !data.order.includes(name));
  return [...data.order.filter((name) => classes.includes(name)), ...others];
}

function fillForm() {
  const unique = (list) => [...new Set(list)];
  const fill = (name, values, all) => form()[name].replaceChildren(
    element("option", { value: "" }, all), ...values.map((value) => element("option", { value }, value)));
  const verdicts = new Set(rows.verdict);
  fill("engine", unique(data.columns.map((item) => item.engine)), "all");
  fill("column", data.columns.map((item) => item.label), "all");
  fill("class", inOrder(unique(data.cases.map((item) => item.class))), "all");
  fill("stage", unique(data.cases.map((item) => item.stage)).sort(), "all");
  const named = data.verdicts.filter((_, place) => verdicts.has(place)).map((item) => item.name);
  fill("verdict", ["any failure", ...named], "all");
  fill("from", data.runs, "no run");
  fill("to", data.runs, "no run");
}

function listen() {
  let waiting;
  const take = (field) => {
    clearTimeout(waiting);
    location.hash = address({ [field.name]: field.value });
  };
  form().addEventListener("input", (event) => {
    clearTimeout(waiting);
    if (event.target === form().q) waiting = setTimeout(take, 200, form().q);
  });
  form().addEventListener("change", (event) => take(event.target));
  form().addEventListener("reset", (event) => {
    event.preventDefault();
    location.hash = "";
  });
  // Enter in the search goes on to what it found.
  form().addEventListener("submit", (event) => {
    event.preventDefault();
    take(form().q);
    setTimeout(() => document.querySelector("#results a")?.focus());
  });
  $("more").addEventListener("click", () => {
    shown += PAGE;
    listResults(shown - PAGE);
  });
  $("more-faults").addEventListener("click", () => {
    shownFaults += PAGE;
    faultList(filter(state()));
  });
  $("case").addEventListener("close", () => {
    if (state().get("open")) history.replaceState(null, "", address({ open: "" }));
  });
  document.addEventListener("keydown", keys);
  addEventListener("hashchange", show);
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("case").open) return;
  if (/INPUT|SELECT/.test(event.target.tagName)) return;
  if (event.key === "/") {
    event.preventDefault();
    document.querySelector(".filterbox").open = true;
    form().q.focus();
  }
  const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
  const links = [...$("results").querySelectorAll("a")], place = links.indexOf(document.activeElement);
  // Arrows scroll the page until a result is chosen.
  if (!step || (place < 0 && event.key.length > 1)) return;
  event.preventDefault();
  links[Math.max(0, Math.min(links.length - 1, place + step))]?.focus();
}

// The table ------------------------------------------------------------------------------------------------------

/** Counts of the kinds of reporting/tables.py, and of what failed of each. */
const empty = () => ({ all: data.kinds.map(() => 0), bad: data.kinds.map(() => 0) });
const EVERY = "\0all";

/** Group -> column -> counts; a group is a class, a clause of one that is expanded, or EVERY. */
function count(passes) {
  const cells = new Map();
  const add = (group, row) => {
    if (!cells.has(group)) cells.set(group, new Map());
    const line = cells.get(group), column = rows.column[row];
    if (!line.has(column)) line.set(column, empty());
    line.get(column).all[rows.kind[row]]++;
    if (verdictOf(row).badness) line.get(column).bad[rows.kind[row]]++;
  };
  for (let row = 0; row < rows.case.length; row++) {
    if (!passes(row)) continue;
    const item = caseOf(row);
    add(item.class, row);
    add(EVERY, row);
    if (expanded.has(item.class) && item.clause >= 0) add(`${item.class}\0${item.clause}`, row);
  }
  return cells;
}

function table(cells) {
  const columns = [...(cells.get(EVERY) || new Map()).keys()].sort((one, other) => one - other);
  const classes = inOrder([...cells.keys()].filter((name) => !name.includes("\0")));
  const line = (group, kind, head, link) => element("tr", { class: kind, "data-group": group }, head,
    ...columns.map((column) => {
      const cell = cells.get(group).get(column);
      if (!cell) return element("td", {}, "-");
      const href = address({ ...link, column: data.columns[column].label, open: "" });
      return element("td", {}, element("a", { href }, ...spelled(cell)));
    }));
  const body = element("tbody");
  for (const name of classes) {
    body.append(line(name, "class", element("th", { scope: "row" }, expander(name)), { class: name, clause: "" }));
    data.clauses.forEach((clause, place) => {
      const group = `${name}\0${place}`, head = element("th", { scope: "row", title: clause.text }, clause.id);
      if (cells.has(group)) body.append(line(group, "clause", head, { class: name, clause: clause.id }));
    });
  }
  if (classes.length > 1) body.append(line(EVERY, "total", element("th", { scope: "row" }, "all"), {}));
  const heads = columns.map((column) => data.columns[column].label);
  const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "class"),
    ...heads.map((label) => element("th", { scope: "col", title: label }, label))));
  $("table").replaceChildren(...(classes.length ? [head, body] : []));
}

/** What a class is opened to its clauses by. */
function expander(name) {
  const button = element("button", { type: "button", "aria-expanded": String(expanded.has(name)) }, name);
  button.addEventListener("click", () => {
    expanded.delete(name) || expanded.add(name);
    show();
    document.querySelector(`tr[data-group="${CSS.escape(name)}"] button`)?.focus();
  });
  return button;
}

/** What a cell says; colour only repeats it. */
function spelled({ all: [must, should, known, away, absent], bad: [failed, broken] }) {
  const said = [];
  const [colour, mark] = failed ? ["bad", "✗"] : ["good", "✓"];
  if (must) said.push(element("span", { class: `must ${colour}` }, `${mark} ${failed}/${must}`));
  const text = `should ${broken}/${should}`;
  if (should) said.push(broken ? element("small", { class: "warn" }, `~ ${text}`) : element("small", {}, text));
  if (known) said.push(element("small", {}, `${known} known`));
  if (away) said.push(element("small", {}, `${away} not judged`));
  if (absent) said.push(element("small", {}, `${absent} absent`));
  return said;
}

/** The sums of the table, in words. */
function sums(cells, asked) {
  const { all, bad } = empty();
  for (const cell of (cells.get(EVERY) || new Map()).values()) {
    for (let kind = 0; kind < all.length; kind++) {
      all[kind] += cell.all[kind];
      bad[kind] += cell.bad[kind];
    }
  }
  const said = [
    `${bad[0] ? "✗" : "✓"} ${bad[0]} of ${all[0]} MUST failed`, `${bad[1]} of ${all[1]} SHOULD broken`,
    `${all[2]} known`, `${all[3]} not judged`, `${all[4]} absent`,
  ].map((text) => element("b", {}, text));
  if (asked.get("clause")) {
    const back = element("a", { href: address({ clause: "" }) }, "all clauses");
    said.push(element("b", {}, `clause ${asked.get("clause")} `, back));
  }
  $("chips").replaceChildren(...said);
}

// Faults and results ---------------------------------------------------------------------------------------------

function faultList(passes) {
  const hits = new Map();
  for (let row = 0; row < rows.case.length; row++) {
    const fault = rows.fault[row];
    if (fault < 0 || !passes(row)) continue;
    hits.has(fault) ? hits.get(fault).push(row) : hits.set(fault, [row]);
  }
  const numbers = [...hits.keys()].sort((one, other) => one - other), left = numbers.length - shownFaults;
  $("faults-section").hidden = !numbers.length;
  $("h-faults").textContent = `Distinct faults: ${numbers.length}`;
  $("faults").replaceChildren(...numbers.slice(0, shownFaults).map((number) => fault(number, hits.get(number))));
  $("more-faults").hidden = left <= 0;
  $("more-faults").textContent = `Show ${Math.min(PAGE, left)} more of ${left}`;
}

function fault(number, hits) {
  const row = hits[0], verdict = verdictOf(row);
  const link = element("a", { href: address({ open: nameOf(row) }) }, caseOf(row).id);
  const cases = new Set(hits.map((each) => rows.case[each])).size;
  const columns = [...new Set(hits.map((each) => columnOf(each).label))];
  return element("li", { class: verdict.badness === 2 ? "must" : "should" },
    element("p", {}, badge(verdict), " ", element("strong", {}, data.faults[number])),
    element("p", { class: "quiet" }, `${cases} case${cases > 1 ? "s" : ""} of ${columns.join(", ")}; of `, link, ":"),
    element("pre", { tabindex: "0" }, messageOf(row)));
}

function resultList(asked, passes) {
  const [from, to] = [asked.get("from"), asked.get("to")], isDifference = Boolean(from && to);
  if (isDifference) {
    found = difference(from, to, passes);
    const worse = found.filter((change) => change.isWorse).length;
    $("h-results").textContent = `From ${from} to ${to}: ${found.length} changed, ${worse} worse`;
  } else {
    found = [];
    for (let row = 0; row < rows.case.length; row++) if (passes(row)) found.push({ row });
    found.sort((one, other) => verdictOf(other.row).badness - verdictOf(one.row).badness);
    $("h-results").textContent = `Results: ${found.length}`;
  }
  $("results").className = isDifference ? "changes" : "";
  listResults(0);
}

/** Lists what was found, from this place as far as is shown. */
function listResults(from) {
  const items = found.slice(from, shown).map((item) => {
    const row = item.row, said = item.isWorse === undefined ? badge(verdictOf(row)) : change(item);
    const parts = [columnOf(row).label, caseOf(row).id].map((text) => element("span", {}, text));
    const check = element("span", { class: "quiet" }, checkOf(row));
    return element("li", {}, element("a", { href: address({ open: nameOf(row) }) }, said, ...parts, check));
  });
  from ? $("results").append(...items) : $("results").replaceChildren(...items);
  const left = found.length - shown;
  $("more").hidden = left <= 0;
  $("more").textContent = `Show ${Math.min(PAGE, left)} more of ${left}`;
}

function change({ old, now, isWorse }) {
  const said = `${old ? old.name : "not run"} → ${now ? now.name : "not run"}`.replaceAll("_", " ");
  return element("span", { class: `badge ${isWorse ? "bad" : "good"}` }, `${isWorse ? "▼ worse:" : "▲"} ${said}`);
}

// One result -----------------------------------------------------------------------------------------------------

function openCase(name) {
  const dialog = $("case");
  if (!name) {
    if (dialog.open) dialog.close();
    return;
  }
  const row = rows.case.findIndex((_, each) => name.startsWith(caseOf(each).id) && nameOf(each) === name);
  const close = element("button", { type: "button" }, "Close");
  close.addEventListener("click", () => dialog.close());
  const title = element("h2", { id: "case-title" }, row < 0 ? `This page has no result ${name}` : caseOf(row).id);
  const about = element("p", { class: "quiet" }, row < 0 ? "" : checkOf(row));
  const head = element("header", {}, element("div", {}, title, about), close);
  $("case-inside").replaceChildren(head, ...(row < 0 ? [] : details(row)));
  if (!dialog.open) dialog.showModal();
  close.focus();
}

function details(row) {
  const item = caseOf(row), column = columnOf(row), clause = data.clauses[item.clause];
  const where = `${column.label}${column.device && ` on ${column.device}`}, ${rows.ms[row]} ms`;
  const made = [element("p", {}, badge(verdictOf(row)), ` ${where}`)];
  const section = (title, ...children) => made.push(element("h3", {}, title), ...children);
  if (messageOf(row)) section("Got, want and bound", element("pre", { tabindex: "0" }, messageOf(row)));
  if (clause) {
    const lenient = item.lenient && `; SHOULD, for ${item.lenient}`;
    const place = `${item.class}, stage ${item.stage}, clause ${clause.id}, tier ${item.tier}${lenient}`;
    section("Clause", element("p", {}, `${item.level}: ${clause.text}`), element("p", { class: "quiet" }, place));
    if (item.recipe.length) section("Inputs", element("pre", { tabindex: "0" }, item.recipe.join("\n")));
    if (clause.threads.length) section("Threads", element("p", {}, ...clause.threads.flatMap(thread)));
    const seed = column.seed ? ` --seed ${column.seed}` : "";
    section("Rerun", command(`moe-conformance run --engine ${column.asked} --case ${item.id}${seed}`));
    if (item.repro && ["fail", "broken_should"].includes(verdictOf(row).name))
      section("Script for a bug report", command(`moe-conformance repro ${item.id} --engine ${column.asked}${seed}`));
  } else {
    section("Clause", element("p", {}, `This suite has no such case. Class ${item.class}, stage ${item.stage}.`));
  }
  const others = [];
  for (let each = 0; each < rows.case.length; each++) {
    const isSame = rows.case[each] === rows.case[row] && rows.check[each] === rows.check[row];
    if (isSame && each !== row) others.push(each);
  }
  if (others.length) section("The same of others", ...others.slice(0, PAGE).map((each) => element("p", {},
    badge(verdictOf(each)), " ", element("a", { href: address({ open: nameOf(each) }) }, columnOf(each).label))));
  return made;
}

function thread([text, link]) {
  return [link ? element("a", { href: link, rel: "noreferrer" }, text) : text, "  "];
}

function command(text) {
  const copy = element("button", { type: "button" }, "Copy");
  copy.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
      copy.textContent = "Copied";
    } catch { // a page from disk may not be allowed to
      copy.textContent = "Select it";
    }
  });
  return element("div", { class: "command" }, element("pre", {}, text), copy);
}

// The whole ------------------------------------------------------------------------------------------------------

let drawn;

/** Draw what the address asks for; opening a result leaves the lists as they are. */
function show() {
  const asked = state(), name = asked.get("open");
  const lists = new URLSearchParams(asked);
  lists.delete("open");
  const key = `${lists}|${[...expanded]}`;
  if (drawn !== key) {
    drawn = key;
    shown = PAGE;
    shownFaults = FAULTS;
    for (const each of FILTERS) {
      const isTyping = each === "q" && document.activeElement === form().q;
      if (!isTyping) form()[each].value = asked.get(each) || "";
    }
    const passes = filter(asked), cells = count(passes);
    table(cells);
    sums(cells, asked);
    faultList(passes);
    resultList(asked, passes);
  }
  openCase(name);
}

function theme() {
  const all = ["system", "light", "dark"], key = "moe-conformance-theme";
  let now = "system";
  try { // a page from disk may have no storage
    now = localStorage.getItem(key) || now;
  } catch {}
  const set = () => {
    document.documentElement.style.colorScheme = now === "system" ? "" : now;
    $("theme").textContent = `Theme: ${now}`;
  };
  $("theme").addEventListener("click", () => {
    now = all[(all.indexOf(now) + 1) % all.length];
    try {
      localStorage.setItem(key, now);
    } catch {}
    set();
  });
  set();
}

async function start() {
  theme();
  data = await unpack();
  rows = data.rows;
  await pause();
  fillForm();
  listen();
  // On a phone the table comes first.
  document.querySelector(".filterbox").open = !matchMedia("(max-width: 46rem)").matches;
  $("app").hidden = false;
  await pause();
  show();
  $("app").setAttribute("aria-busy", "false");
}

start().catch((error) => {
  document.body.append(element("p", { class: "trouble", role: "alert" }, `! This page could not be shown: ${error}`));
});
