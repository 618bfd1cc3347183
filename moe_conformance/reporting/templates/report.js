"use strict";
// The state of the page is its address: filters, the difference of two runs, and the result that is open.
const FILTERS = ["engine", "column", "class", "stage", "verdict", "q", "from", "to"];
const PAGE = 100; // results, or faults, that "More" adds
const $ = (id) => document.getElementById(id);
let data, rows, expanded = new Set(), shown = PAGE, shownFaults = 20, found = [], opener = { list: "results" };

/** An element with these attributes and children; text is never taken for markup. */
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== undefined && value !== false) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== "" && child !== undefined));
  return made;
}

/** Lets the browser draw and answer between two long steps. */
const pause = () => new Promise((resolve) => setTimeout(resolve));

async function unpack() {
  const letters = atob($("data").textContent), bytes = new Uint8Array(letters.length);
  for (let place = 0; place < letters.length; place++) bytes[place] = letters.charCodeAt(place);
  await pause();
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
}

const state = () => new URLSearchParams(location.hash.slice(1));

/** The address with these values instead; an empty one is left out. */
function address(changes) {
  const next = state();
  for (const [key, value] of Object.entries(changes)) value ? next.set(key, value) : next.delete(key);
  return "#" + next;
}

const verdictOf = (row) => data.verdicts[rows.verdict[row]];
const caseOf = (row) => data.cases[rows.case[row]];
const tone = (verdict) => (verdict.badness === 2 ? "bad" : verdict.badness || verdict.name === "known_failure" ? "warn" : verdict.name === "pass" ? "good" : "none");
const words = (verdict) => `${verdict.mark} ${verdict.name.replaceAll("_", " ")}`;
const keyOf = (row) => `${rows.column[row]}/${rows.case[row]}/${rows.check[row]}`;

/** Whether a row passes what the address asks for. */
function filter(asked) {
  const text = (asked.get("q") || "").toLowerCase();
  const has = (list, read) => text && list.map((item) => read(item).toLowerCase().includes(text));
  const inCase = has(data.cases, (item) => item.id), inCheck = has(data.checks, String), inMessage = has(data.messages, String);
  const [engine, column, group, stage, verdict] = FILTERS.map((name) => asked.get(name));
  const clause = asked.get("clause");
  const columns = data.columns.map((item) => (!engine || item.engine === engine) && (!column || item.label === column));
  const cases = data.cases.map((item) => (!group || item.class === group) && (!stage || item.stage === stage)
    && (!clause || data.clauses[item.clause]?.id === clause));
  const verdicts = data.verdicts.map((item) => !verdict || verdict === item.name || (verdict === "any failure" && item.badness > 0));
  return (row, anyVerdict) => columns[rows.column[row]] && cases[rows.case[row]] && (anyVerdict || verdicts[rows.verdict[row]])
    && (!text || inCase[rows.case[row]] || inCheck[rows.check[row]] || inMessage[rows.message[row]]);
}

/** Rows of two runs that differ: [row or undefined, verdict before, verdict after, is it worse]; as `moe-conformance diff`. */
function difference(from, to, passes) {
  const worst = (run) => {
    const best = new Map();
    for (let row = 0; row < rows.case.length; row++) {
      const column = data.columns[rows.column[row]];
      if (column.run !== run || !passes(row, true)) continue;
      const key = `${column.engine}/${rows.case[row]}/${rows.check[row]}`, other = best.get(key);
      if (other === undefined || verdictOf(row).badness > verdictOf(other).badness) best.set(key, row);
    }
    return best;
  };
  const before = worst(from), after = worst(to), changes = [];
  for (const key of new Set([...before.keys(), ...after.keys()])) {
    const old = before.has(key) ? verdictOf(before.get(key)) : null, now = after.has(key) ? verdictOf(after.get(key)) : null;
    if (old === now) continue;
    const isWorse = now === null || !now.judged ? old !== null && old.judged : now.badness > (old === null ? 1 : old.badness);
    changes.push({ row: after.get(key) ?? before.get(key), old, now, isWorse });
  }
  return changes.sort((one, other) => other.isWorse - one.isWorse);
}

function options(select, values, all) {
  select.replaceChildren(element("option", { value: "" }, all), ...values.map((value) => element("option", { value }, value)));
}

function fillForm() {
  const form = document.forms[0];
  const unique = (list) => [...new Set(list)];
  const classes = unique(data.cases.map((item) => item.class));
  options(form.engine, unique(data.columns.map((item) => item.engine)), "all");
  options(form.column, data.columns.map((item) => item.label), "all");
  options(form.class, [...data.order.filter((name) => classes.includes(name)), ...classes.filter((name) => !data.order.includes(name))], "all");
  options(form.stage, unique(data.cases.map((item) => item.stage)).sort(), "all");
  const there = new Set(rows.verdict);
  options(form.verdict, ["any failure", ...data.verdicts.filter((_, place) => there.has(place)).map((item) => item.name)], "all");
  options(form.from, data.runs, "no run");
  options(form.to, data.runs, "no run");
  let waiting;
  const take = (field) => { clearTimeout(waiting); location.hash = address({ [field.name]: field.value }); };
  form.addEventListener("input", (event) => {
    clearTimeout(waiting);
    if (event.target === form.q) waiting = setTimeout(take, 200, form.q);
  });
  form.addEventListener("change", (event) => take(event.target));
  form.addEventListener("reset", (event) => { event.preventDefault(); location.hash = ""; });
  // Enter in the search goes on to what it found.
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    take(form.q);
    setTimeout(() => document.querySelector("#results a")?.focus());
  });
}

/** Counts of the four kinds, and of what failed in each. */
const empty = () => ({ all: [0, 0, 0, 0], bad: [0, 0, 0, 0] });

function table(passes) {
  const cells = new Map(), columns = new Set();
  const count = (group, column, row) => {
    if (!cells.has(group)) cells.set(group, new Map());
    const line = cells.get(group);
    if (!line.has(column)) line.set(column, empty());
    const cell = line.get(column);
    cell.all[rows.kind[row]]++;
    if (verdictOf(row).badness) cell.bad[rows.kind[row]]++;
  };
  for (let row = 0; row < rows.case.length; row++) {
    if (!passes(row)) continue;
    const item = caseOf(row), column = rows.column[row];
    columns.add(column);
    count(item.class, column, row);
    count("\0all", column, row);
    if (expanded.has(item.class) && item.clause >= 0) count(`${item.class}\0${item.clause}`, column, row);
  }
  const listed = [...columns].sort((one, other) => one - other);
  const line = (group, head, kind, link) => element("tr", { class: kind, "data-group": group }, head, ...listed.map((column) => {
    const cell = cells.get(group).get(column);
    return element("td", {}, cell ? element("a", { href: address({ ...link, column: data.columns[column].label, open: "" }) }, ...spelled(cell)) : "-");
  }));
  const body = element("tbody");
  const classes = [...cells.keys()].filter((name) => !name.includes("\0"));
  const ordered = [...data.order.filter((name) => cells.has(name)), ...classes.filter((name) => !data.order.includes(name))];
  for (const name of ordered) {
    const button = element("button", { type: "button", "aria-expanded": String(expanded.has(name)) }, name);
    button.addEventListener("click", () => {
      expanded.delete(name) || expanded.add(name);
      show();
      document.querySelector(`tr[data-group="${CSS.escape(name)}"] button`)?.focus();
    });
    body.append(line(name, element("th", { scope: "row" }, button), "class", { class: name, clause: "" }));
    if (!expanded.has(name)) continue;
    data.clauses.forEach((clause, place) => {
      const group = `${name}\0${place}`;
      if (cells.has(group)) body.append(line(group, element("th", { scope: "row", title: clause.text }, clause.id), "clause", { class: name, clause: clause.id }));
    });
  }
  if (ordered.length > 1) body.append(line("\0all", element("th", { scope: "row" }, "all"), "total", {}));
  const head = element("thead", {}, element("tr", {}, element("th", { scope: "col" }, "class"),
    ...listed.map((column) => element("th", { scope: "col", title: data.columns[column].label }, data.columns[column].label))));
  $("table").replaceChildren(...(ordered.length ? [head, body] : []));
  return cells.get("\0all") || new Map();
}

/** What a cell says, in words: colour only repeats it. */
function spelled(cell) {
  const [must, should, known, away] = cell.all, said = [];
  if (must) said.push(element("span", { class: `must ${cell.bad[0] ? "bad" : "good"}` }, `${cell.bad[0] ? "✗" : "✓"} ${cell.bad[0]}/${must}`));
  if (should) said.push(element("small", { class: cell.bad[1] ? "warn" : undefined }, `${cell.bad[1] ? "~ " : ""}should ${cell.bad[1]}/${should}`));
  if (known) said.push(element("small", {}, `${known} known`));
  if (away) said.push(element("small", {}, `${away} not judged`));
  return said;
}

function faultList(passes) {
  const hits = new Map();
  for (let row = 0; row < rows.case.length; row++) {
    const fault = rows.fault[row];
    if (fault < 0 || !passes(row)) continue;
    hits.has(fault) ? hits.get(fault).push(row) : hits.set(fault, [row]);
  }
  const numbers = [...hits.keys()].sort((one, other) => one - other);
  $("h-faults").textContent = `Distinct faults: ${numbers.length}`;
  $("faults").replaceChildren(...numbers.slice(0, shownFaults).map((number) => {
    const own = hits.get(number), row = own[0], verdict = verdictOf(row);
    const cases = new Set(own.map((each) => rows.case[each])).size;
    const columns = [...new Set(own.map((each) => data.columns[rows.column[each]].label))];
    const title = data.faults[number].replace(/^[^:]*: /, "");
    return element("li", { class: verdict.badness === 2 ? "must" : "should" },
      element("p", {}, element("span", { class: `badge ${tone(verdict)}` }, words(verdict)), " ", element("strong", {}, title)),
      element("p", { class: "quiet" }, `${cases} case${cases > 1 ? "s" : ""} of ${columns.join(", ")}; of `,
        element("a", { href: address({ open: nameOf(row) }) }, caseOf(row).id), ":"),
      element("pre", { tabindex: "0" }, data.messages[rows.message[row]]));
  }));
  const left = numbers.length - shownFaults;
  $("more-faults").hidden = left <= 0;
  $("more-faults").textContent = `Show more of ${left} others`;
  $("faults-section").hidden = !numbers.length;
}

/** How a row is named in the address: whole names, for the numbers are of one file. */
const nameOf = (row) => [caseOf(row).id, data.checks[rows.check[row]], data.columns[rows.column[row]].label].join("/");

function resultList(asked, passes) {
  const [from, to] = [asked.get("from"), asked.get("to")];
  if (from && to) {
    found = difference(from, to, passes);
    $("results").className = "changes";
    const worse = found.filter((change) => change.isWorse).length;
    $("h-results").textContent = `From ${from} to ${to}: ${found.length} changed, ${worse} worse`;
  } else {
    found = [];
    $("results").className = "";
    for (let row = 0; row < rows.case.length; row++) if (passes(row)) found.push({ row });
    const badness = (change) => verdictOf(change.row).badness;
    found.sort((one, other) => badness(other) - badness(one));
    $("h-results").textContent = `Results: ${found.length}`;
  }
  listResults(0);
}

function listResults(from) {
  const items = found.slice(from, shown).map(({ row, old, now, isWorse }) => {
    const verdict = verdictOf(row);
    const change = `${old ? old.name : "absent"} → ${now ? now.name : "absent"}`.replaceAll("_", " ");
    const mark = isWorse === undefined ? words(verdict) : `${isWorse ? "▼ worse:" : "▲"} ${change}`;
    const colour = isWorse === undefined ? tone(verdict) : isWorse ? "bad" : "good";
    return element("li", {}, element("a", { href: address({ open: nameOf(row) }) },
      element("span", { class: `badge ${colour}`, title: mark }, mark), element("span", {}, data.columns[rows.column[row]].label),
      element("span", {}, caseOf(row).id), element("span", { class: "quiet" }, data.checks[rows.check[row]])));
  });
  from ? $("results").append(...items) : $("results").replaceChildren(...items);
  $("more").hidden = found.length <= shown;
  $("more").textContent = `Show ${Math.min(PAGE, found.length - shown)} more of ${found.length - shown}`;
}

function section(title, ...children) {
  return [element("h3", {}, title), ...children];
}

/** The open result: clause, inputs, got and want, threads, how to rerun, and what the others made of it. */
function openCase(name) {
  const dialog = $("case");
  if (!name) { if (dialog.open) dialog.close(); return; }
  let row = -1;
  for (let each = 0; each < rows.case.length && row < 0; each++) if (caseOf(each).id === name.split("/")[0] && nameOf(each) === name) row = each;
  const close = element("button", { type: "button", autofocus: "" }, "Close");
  close.addEventListener("click", () => dialog.close());
  if (row < 0) {
    $("case-inside").replaceChildren(element("header", {}, element("h2", { id: "case-title" }, `no result ${name}`), close));
  } else {
    const item = caseOf(row), column = data.columns[rows.column[row]], clause = data.clauses[item.clause], verdict = verdictOf(row);
    const rerun = `moe-conformance run --engine ${column.asked} --case ${item.id}`;
    const copy = element("button", { type: "button" }, "Copy");
    copy.addEventListener("click", () => navigator.clipboard?.writeText(rerun).then(() => { copy.textContent = "Copied"; }, () => { copy.textContent = "Select it"; }));
    const others = [];
    for (let each = 0; each < rows.case.length; each++) if (rows.case[each] === rows.case[row] && rows.check[each] === rows.check[row] && each !== row) others.push(each);
    $("case-inside").replaceChildren(
      element("header", {}, element("div", {}, element("h2", { id: "case-title" }, item.id), element("p", { class: "quiet" }, data.checks[rows.check[row]])), close),
      element("p", {}, element("span", { class: `badge ${tone(verdict)}` }, words(verdict)), ` ${column.label}${column.device ? ` on ${column.device}` : ""}, ${rows.ms[row]} ms`),
      ...(data.messages[rows.message[row]] ? section("Got, want and bound", element("pre", { tabindex: "0" }, data.messages[rows.message[row]])) : []),
      ...section("Clause", element("p", {}, clause ? `${item.level}: ${clause.text}` : "This suite has no such case: it is of another version or another suite."),
        element("p", { class: "quiet" }, `${item.class}, stage ${item.stage}${clause ? `, clause ${clause.id}, tier ${item.tier}` : ""}${item.lenient ? `; SHOULD, for ${item.lenient}` : ""}`)),
      ...(item.recipe?.length ? section("Inputs", element("pre", { tabindex: "0" }, item.recipe.join("\n"))) : []),
      ...(clause?.threads.length ? section("Threads", element("p", {}, ...clause.threads.flatMap(([text, link]) =>
        [link ? element("a", { href: link, rel: "noreferrer" }, text) : text, "  "]))) : []),
      ...(clause ? section("Rerun", element("div", { class: "command" }, element("pre", {}, rerun), copy)) : []),
      ...(others.length ? section("The same of others", ...others.slice(0, 60).map((each) => element("p", {},
        element("span", { class: `badge ${tone(verdictOf(each))}` }, words(verdictOf(each))), " ",
        element("a", { href: address({ open: nameOf(each) }) }, data.columns[rows.column[each]].label)))) : []));
  }
  if (!dialog.open) dialog.showModal();
  close.focus();
}

let drawn;
/** Draw what the address asks for; what only opens a result leaves the lists as they are. */
function show() {
  const asked = state(), name = asked.get("open");
  const now = new URLSearchParams(asked);
  now.delete("open");
  const key = `${now}|${[...expanded]}`;
  if (drawn !== key) {
    drawn = key;
    shown = PAGE;
    shownFaults = 20;
    const form = document.forms[0];
    for (const each of FILTERS) if (form[each].value !== (asked.get(each) || "") && !(each === "q" && document.activeElement === form.q)) form[each].value = asked.get(each) || "";
    const passes = filter(asked);
    chips(table(passes), asked);
    faultList(passes);
    resultList(asked, passes);
  }
  openCase(name);
}

function chips(columns, asked) {
  const sum = empty();
  for (const cell of columns.values()) for (let kind = 0; kind < 4; kind++) { sum.all[kind] += cell.all[kind]; sum.bad[kind] += cell.bad[kind]; }
  const [must, should, known, away] = sum.all;
  const said = [`${sum.bad[0] ? "✗" : "✓"} ${sum.bad[0]} of ${must} MUST failed`, `${sum.bad[1]} of ${should} SHOULD broken`, `${known} known`, `${away} not judged`];
  const clause = asked.get("clause") ? [element("b", {}, `clause ${asked.get("clause")} `, element("a", { href: address({ clause: "" }) }, "all clauses"))] : [];
  $("chips").replaceChildren(...said.map((text) => element("b", {}, text)), ...clause);
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || $("case").open) return;
  if (/INPUT|SELECT/.test(event.target.tagName)) return;
  if (event.key === "/") { event.preventDefault(); document.querySelector(".filterbox").open = true; document.forms[0].q.focus(); }
  const step = { j: 1, ArrowDown: 1, k: -1, ArrowUp: -1 }[event.key];
  const links = [...$("results").querySelectorAll("a")], place = links.indexOf(document.activeElement);
  if (step && (place >= 0 || event.key.length === 1)) { event.preventDefault(); links[Math.max(0, Math.min(links.length - 1, place + step))]?.focus(); }
}

function theme() {
  const button = $("theme"), all = ["system", "light", "dark"];
  let now = "system";
  try { now = localStorage.getItem("moe-conformance-theme") || now; } catch { /* a page from disk may have no storage */ }
  const set = () => {
    document.documentElement.style.colorScheme = now === "system" ? "" : now;
    button.textContent = `Theme: ${now}`;
  };
  button.addEventListener("click", () => {
    now = all[(all.indexOf(now) + 1) % 3];
    try { localStorage.setItem("moe-conformance-theme", now); } catch { /* as above */ }
    set();
  });
  set();
}

async function start() {
  theme();
  data = await unpack();
  await pause();
  rows = data.rows;
  fillForm();
  // On a phone the table comes first; wider, the filters are always there.
  document.querySelector(".filterbox").open = !matchMedia("(max-width: 46rem)").matches;
  $("more").addEventListener("click", () => { const from = shown; shown += PAGE; listResults(from); });
  $("more-faults").addEventListener("click", () => { shownFaults += PAGE; faultList(filter(state())); });
  $("case").addEventListener("close", () => {
    if (state().get("open")) history.replaceState(null, "", address({ open: "" }));
    [...document.querySelectorAll(`#${opener.list} a`)].find((link) => link.getAttribute("href") === opener.link)?.focus();
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest("#results a, #faults a");
    if (link) opener = { list: link.closest("[id]").id, link: link.getAttribute("href") };
  });
  document.addEventListener("keydown", keys);
  addEventListener("hashchange", show);
  $("app").hidden = false;
  await pause();
  show();
  $("app").setAttribute("aria-busy", "false");
}

start().catch((error) => { document.body.append(element("p", { class: "trouble", role: "alert" }, `! This page could not be shown: ${error}`)); });
