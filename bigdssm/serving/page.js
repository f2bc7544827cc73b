"use strict";
// The page of one model, or of two models side by side; their APIs have different path prefixes.
const FEW_VALUES = 24;  // up to this many are check boxes; more are a text field
const $ = id => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
let sides = [""];
let lastRequest = 0;  // answers of superseded requests are dropped
let lastBody = null;  // of the displayed query; null for similar documents

async function call(path, options) {
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error || response.statusText);
  return answer;
}
const post = (path, body) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

// ----- the form

function addDatalist(id, values) {
  document.body.append(make("datalist", { id }, ...values.map(value => make("option", { value }))));
}

function input(name, placeholder, list, type = "text") {
  const element = make("input", { name, placeholder, type, autocomplete: "off" });
  if (type === "number") element.step = "any";
  if (list) element.setAttribute("list", list);
  return element;
}

// The name of a feature's input, which is also its parameter in the address.
const RESERVED = ["user", "history", "now", "filter", "similar"];
const inputName = feature => RESERVED.includes(feature) ? `feature:${feature}` : feature;

function field(name, placeholder, list) {
  $("fields").append(make("label", {}, name, input(name, placeholder, list)));
}

function choice(name, { type, values, least, most }) {
  if (type === "numeric") {
    const bounds = [input(`least:${name}`, least, null, "number"), " to ", input(`most:${name}`, most, null, "number")];
    bounds[0].ariaLabel = `${name} from`;
    bounds[2].ariaLabel = `${name} to`;
    return make("fieldset", {}, make("legend", {}, name), ...bounds);
  }
  if (values.length > FEW_VALUES) {
    addDatalist(`values:${name}`, values);
    return make("label", {}, name, input(`one:${name}`, values[0], `values:${name}`));
  }
  const boxes = values.map(value =>
    make("label", {}, make("input", { type: "checkbox", name: `one:${name}`, value }), value));
  return make("fieldset", {}, make("legend", {}, name), ...boxes);
}

const quoted = text => /^[\w.+-]+$/.test(text) ? text : JSON.stringify(text);

function filterOf(form) {
  const conditions = [];
  const names = [...new Set([...form.keys()])];
  for (const key of names.filter(name => name.startsWith("one:"))) {
    const values = form.getAll(key).map(value => value.trim()).filter(Boolean).map(quoted);
    const name = quoted(key.slice(4));
    if (values.length) conditions.push(values.length === 1 ? `${name} = ${values[0]}` : `${name} in (${values.join(", ")})`);
  }
  for (const [prefix, sign] of [["least:", ">="], ["most:", "<="]]) {
    for (const key of names.filter(name => name.startsWith(prefix) && form.get(name))) {
      conditions.push(`${quoted(key.slice(prefix.length))} ${sign} ${form.get(key)}`);
    }
  }
  const text = form.get("filter")?.trim();
  if (text) conditions.push(conditions.length ? `(${text})` : text);
  return conditions.join(" and ");
}

function currentRequest() {
  const form = new FormData($("ask"));
  const filter = filterOf(form);
  const entries = [...form].filter(([name, value]) => value.trim() && name !== "filter" && !/^(one|least|most):/.test(name));
  const { user, history, now, ...given } = Object.fromEntries(entries);
  const features = Object.fromEntries(Object.entries(given).map(([name, value]) => [name.replace(/^feature:/, ""), value]));
  const body = {};
  if (user) body.user = user;
  if (now) body.now = Number(now);
  if (Object.keys(features).length) body.features = features;
  if (history) body.events = history.split(";").filter(title => title.trim()).map(item => ({ item }));
  if (filter) body.filter = filter;
  return { body, title: [...entries.map(([, value]) => value), ...(filter ? [filter] : [])].join(" · ") };
}

// ----- answers

function timesOf(found, waited) {
  const parts = [`${found.documents.length} documents in ${waited.toFixed(1)} ms`, `server ${found.total_ms.toFixed(1)} ms`];
  if (found.encode_ms !== undefined) {
    parts.push(found.cached ? "from the cache" :
      `encoding ${found.encode_ms.toFixed(1)} ms, index ${found.search_ms.toFixed(1)} ms`);
  }
  return parts.join(" · ");
}

function historyOf(found) {
  const user = found.unknown_user ? "the user is unknown" : "";
  const unknown = found.unknown_events ? `${found.unknown_events} unknown documents` : "";
  const history = found.history?.length ? `History, newest first: ${found.history.join("; ")}` : "";
  return [user, history, unknown].filter(Boolean).join(" · ");
}

// The change of a document's rank relative to the other answer.
function moved(rank, other) {
  if (other === undefined) return "only here";
  return other === rank ? "=" : other > rank ? `▲${other - rank}` : `▼${rank - other}`;
}

function row(side, entry, others) {
  const cells = [make("td", { className: "number" }, String(entry.rank)), make("td", { className: "number" }, entry.score.toFixed(4))];
  const other = others?.get(entry.key);
  if (others) cells.push(make("td", { className: "number" }, moved(entry.rank, other)));
  const act = make("td", { className: "do" });
  cells.push(make("td", {}, entry.title), make("td", { className: "key" }, entry.key), act);
  const line = make("tr", { tabIndex: -1, className: others && other === undefined ? "only" : "" }, ...cells);
  Object.assign(line.dataset, { side, key: entry.key });
  if (lastBody) act.append(make("button", { type: "button", tabIndex: -1, onclick: () => why(line) }, "why"), " ");
  act.append(make("a", { href: `?similar=${encodeURIComponent(entry.key)}` }, "nearest"));
  return line;
}

function fill(side, found, others) {
  const number = { className: "number" };
  const head = make("tr", {}, make("th", number, "#"), make("th", number, "score"),
    ...(others ? [make("th", number, "other")] : []),
    make("th", {}, "document"), make("th", { className: "key" }, "key"), make("th"));
  $(`documents${side}`).replaceChildren(head, ...found.documents.map(entry => row(side, entry, others)));
}

const ranks = found => new Map(found.documents.map(({ key, rank }) => [key, rank]));

function sharedBy(first, second) {
  const keys = new Set(second.map(({ key }) => key));
  return `${first.filter(({ key }) => keys.has(key)).length} of ${first.length} in both`;
}

async function show(title, send) {
  const number = ++lastRequest;
  const started = performance.now();
  $("status").className = "";
  $("status").textContent = "…";
  document.body.ariaBusy = "true";
  const answers = await Promise.all(sides.map(side =>
    send(side).then(found => ({ found, waited: performance.now() - started }), error => ({ error }))));
  if (number !== lastRequest) return;
  const both = answers.length === 2 && answers.every(({ found }) => found);
  for (const [i, { found, error, waited }] of answers.entries()) {
    const note = sides.length > 1 ? $(`note${sides[i]}`) : $("status");
    note.classList.toggle("error", Boolean(error));
    note.textContent = error ? error.message : timesOf(found, waited);
    if (error) $(`documents${sides[i]}`).replaceChildren();
    else fill(sides[i], found, both ? ranks(answers[1 - i].found) : null);
  }
  if (sides.length > 1) $("status").textContent = both ? sharedBy(...answers.map(({ found }) => found.documents)) : "";
  const { found } = answers[0];
  $("title").textContent = found?.of ? `Nearest to ${found.of}` : title;
  $("history").textContent = found ? historyOf(found) : "";
  document.body.ariaBusy = "false";
  if ($("ask").contains(document.activeElement)) go(lines()[0]);
}

function similar(key) {
  lastBody = null;
  return show("", side => call(`${side}/api/similar?key=${encodeURIComponent(key)}`));
}

function search() {
  const { body, title } = currentRequest();
  lastBody = body;
  return show(title, side => post(`${side}/api/search`, body));
}

// ----- explanations

function nearTo(title, near) {
  return near.length === 0 ? [] : [title, make("ul", {}, ...near.map(([name, cosine]) =>
    make("li", {}, make("meter", { value: Math.max(0, cosine) }), `${cosine.toFixed(2)} ${name}`)))];
}

const openWhy = line => line.nextElementSibling?.classList.contains("why") ? line.nextElementSibling : null;

async function why(line) {
  if (openWhy(line)) return openWhy(line).remove();
  const cell = make("td", { colSpan: line.cells.length, ariaBusy: "true" }, "…");
  line.after(make("tr", { className: "why" }, cell));
  try {
    const found = await post(`${line.dataset.side}/api/why`, { ...lastBody, answer: line.dataset.key });
    const parts = [
      ...nearTo("Similar documents of the history:", found.history.map(({ title, cosine }) => [title, cosine])),
      ...nearTo("Similar words of the query:", found.words.map(({ word, cosine }) => [word, cosine])),
    ];
    cell.replaceChildren(...(parts.length ? parts : ["The query has no history and no text to compare it with."]));
  } catch (error) {
    cell.replaceChildren(make("span", { className: "error" }, error.message));
  }
  cell.ariaBusy = "false";
}

// ----- keys

const lines = (side = sides[0]) => [...document.querySelectorAll("tr[data-key]")].filter(line => line.dataset.side === side);
const go = line => line?.focus();

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const at = document.activeElement;
  const line = at?.closest?.("tr[data-key]");
  const typing = at?.matches?.("input, summary");
  const handled = () => event.preventDefault();
  if (event.key === "/" && !typing) {
    handled();
    $("fields").querySelector("input")?.focus();
  } else if (event.key === "Escape") {
    if (line && openWhy(line)) openWhy(line).remove();
    else if (line) $("fields").querySelector("input")?.focus();
    else at?.blur();
  } else if (typing) {
    return;
  } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    handled();
    const all = lines(line?.dataset.side);
    const next = line ? all.indexOf(line) + (event.key === "ArrowDown" ? 1 : -1) : 0;
    go(all[Math.max(0, Math.min(next, all.length - 1))]);
  } else if (line && sides.length > 1 && (event.key === "ArrowLeft" || event.key === "ArrowRight")) {
    handled();
    const position = lines(line.dataset.side).indexOf(line);
    const other = lines(sides[event.key === "ArrowLeft" ? 0 : 1]);
    go(other[Math.min(position, other.length - 1)]);
  } else if (line && at === line && event.key === "Enter" && lastBody) {
    handled();
    why(line);
  }
}

// ----- start

const described = ({ documents, index, model }) =>
  `${documents.toLocaleString()} documents · ${index} index · model ${model.slice(0, 12)}`;

function answer(side, about) {
  const parts = [make("h3", {}, side ? "Second model" : "Served model"), make("p", { className: "note" }, described(about)),
    make("p", { id: `note${side}`, className: "note" })];
  $("answers").append(make("section", {}, ...(sides.length > 1 ? parts : []), make("table", { id: `documents${side}` })));
}

async function begin() {
  const about = await call("/api/about");
  if (about.second) {
    sides = ["", "/second"];
    $("answers").className = "two";
    $("sides").hidden = false;
  } else $("about").textContent = described(about);
  answer("", about);
  if (about.second) answer("/second", await call("/second/api/about"));
  if (about.users) {
    field("user", about.list_users ? "choose a user" : "the id of a user", "users");
    if (about.list_users) addDatalist("users", await call("/api/users"));
  }
  if (about.history) field("history", "titles, separated by semicolons");
  if (about.now) field("now", "time of the request, in the unit of the events");
  for (const [name, type] of Object.entries(about.features)) field(inputName(name), type);
  const filters = Object.entries(about.filters);
  if (filters.length) {
    const example = filters.map(([name, { type }]) => `${name} ${type === "numeric" ? ">= …" : "= …"}`).join(" and ");
    $("choices").append(...filters.map(([name, choices]) => choice(name, choices)), make("label", {}, "filter", input("filter", example)));
    $("filters").hidden = false;
  }
  $("ask").onsubmit = event => {
    event.preventDefault();
    const values = [...new FormData($("ask"))].filter(([, value]) => value.trim());
    history.replaceState(null, "", `?${new URLSearchParams(values)}`);  // so that back and reload repeat the query
    search();
  };
  document.addEventListener("keydown", pressed);
  const typed = new URLSearchParams(location.search);  // /?words=running+shoes and /?similar=key search on load
  for (const one of document.querySelectorAll("#ask input")) {
    if (one.type === "checkbox") one.checked = typed.getAll(one.name).includes(one.value);
    else one.value = typed.get(one.name) ?? "";
  }
  $("filters").open = [...document.querySelectorAll("#choices input")].some(one => one.type === "checkbox" ? one.checked : one.value);
  if (typed.has("similar")) await similar(typed.get("similar"));
  else if (typed.size) await search();
}
begin().catch(error => { $("status").className = "error"; $("status").textContent = error.message; })
  .finally(() => { document.body.ariaBusy = "false"; });
