"use strict";
// The page of one model, or of two that answer the same query: they differ in the path that their API lies under.
const FEW_VALUES = 24;  // that are boxes to tick, not names to type
const $ = id => document.getElementById(id);
const made = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
let sides = [""];
let asking = 0;  // an answer that comes when something else has been asked is not shown
let lastBody = null;  // of the query that is shown, none where it is a document

async function call(path, options) {
  const response = await fetch(path, options);
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error || response.statusText);
  return answer;
}
const post = (path, body) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });

// ----- the form

function offered(id, values) {
  document.body.append(made("datalist", { id }, ...values.map(value => made("option", { value }))));
}

function input(name, placeholder, list, type = "text") {
  const typed = made("input", { name, placeholder, type, autocomplete: "off" });
  if (type === "number") typed.step = "any";
  if (list) typed.setAttribute("list", list);
  return typed;
}

function field(name, placeholder, list) {
  $("fields").append(made("label", {}, name, input(name, placeholder, list)));
}

function choice(name, { type, values, least, most }) {
  if (type === "numeric") {
    const bounds = [input(`least:${name}`, least, null, "number"), " to ", input(`most:${name}`, most, null, "number")];
    bounds[0].ariaLabel = `${name} from`;
    bounds[2].ariaLabel = `${name} to`;
    return made("fieldset", {}, made("legend", {}, name), ...bounds);
  }
  if (values.length > FEW_VALUES) {
    offered(`values:${name}`, values);
    return made("label", {}, name, input(`one:${name}`, values[0], `values:${name}`));
  }
  const boxes = values.map(value =>
    made("label", {}, made("input", { type: "checkbox", name: `one:${name}`, value }), value));
  return made("fieldset", {}, made("legend", {}, name), ...boxes);
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
  if (form.get("filter")?.trim()) conditions.push(form.get("filter").trim());
  return conditions.join(" and ");
}

function asked() {
  const form = new FormData($("ask"));
  const filter = filterOf(form);
  const entries = [...form].filter(([name, value]) => value.trim() && name !== "filter" && !/^(one|least|most):/.test(name));
  const { user, history, ...features } = Object.fromEntries(entries);
  const body = {};
  if (user) body.user = user;
  if (Object.keys(features).length) body.features = features;
  if (history) body.events = history.split(";").filter(title => title.trim()).map(item => ({ item }));
  if (filter) body.filter = filter;
  return { body, said: [...entries.map(([, value]) => value), ...(filter ? [filter] : [])].join(" · ") };
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
  const unknown = found.unknown_events ? `${found.unknown_events} not found among the documents` : "";
  const history = found.history?.length ? `History, newest first: ${found.history.join("; ")}` : "";
  return [history, unknown].filter(Boolean).join(" · ");
}

// How a document stands here against where it stands in the other answer.
function moved(rank, other) {
  if (other === undefined) return "only here";
  return other === rank ? "=" : other > rank ? `▲${other - rank}` : `▼${rank - other}`;
}

function row(side, entry, others) {
  const cells = [made("td", { className: "number" }, String(entry.rank)), made("td", { className: "number" }, entry.score.toFixed(4))];
  const other = others?.get(entry.key);
  if (others) cells.push(made("td", { className: "number" }, moved(entry.rank, other)));
  const act = made("td", { className: "do" });
  cells.push(made("td", {}, entry.title), made("td", { className: "key" }, entry.key), act);
  const line = made("tr", { tabIndex: -1, className: others && other === undefined ? "only" : "" }, ...cells);
  Object.assign(line.dataset, { side, key: entry.key });
  if (lastBody) act.append(made("button", { type: "button", tabIndex: -1, onclick: () => why(line) }, "why"), " ");
  act.append(made("a", { href: `?similar=${encodeURIComponent(entry.key)}` }, "nearest"));
  return line;
}

function fill(side, found, others) {
  const number = { className: "number" };
  const head = made("tr", {}, made("th", number, "#"), made("th", number, "score"),
    ...(others ? [made("th", number, "other")] : []),
    made("th", {}, "document"), made("th", { className: "key" }, "key"), made("th"));
  $(`documents${side}`).replaceChildren(head, ...found.documents.map(entry => row(side, entry, others)));
}

const ranks = found => new Map(found.documents.map(({ key, rank }) => [key, rank]));

function sharedBy(first, second) {
  const keys = new Set(second.map(({ key }) => key));
  return `${first.filter(({ key }) => keys.has(key)).length} of ${first.length} in both`;
}

async function show(what, ask) {
  const number = ++asking;
  const started = performance.now();
  $("status").className = "";
  $("status").textContent = "…";
  document.body.ariaBusy = "true";
  const answers = await Promise.all(sides.map(side =>
    ask(side).then(found => ({ found, waited: performance.now() - started }), error => ({ error }))));
  if (number !== asking) return;
  const both = answers.length === 2 && answers.every(({ found }) => found);
  for (const [place, { found, error, waited }] of answers.entries()) {
    const said = sides.length > 1 ? $(`said${sides[place]}`) : $("status");
    said.classList.toggle("error", Boolean(error));
    said.textContent = error ? error.message : timesOf(found, waited);
    if (error) $(`documents${sides[place]}`).replaceChildren();
    else fill(sides[place], found, both ? ranks(answers[1 - place].found) : null);
  }
  if (sides.length > 1) $("status").textContent = both ? sharedBy(...answers.map(({ found }) => found.documents)) : "";
  const { found } = answers[0];
  $("title").textContent = found?.of ? `Nearest to ${found.of}` : what;
  $("history").textContent = found ? historyOf(found) : "";
  document.body.ariaBusy = "false";
  if ($("ask").contains(document.activeElement)) go(lines()[0]);
}

function similar(key) {
  lastBody = null;
  return show("", side => call(`${side}/api/similar?key=${encodeURIComponent(key)}`));
}

function search() {
  const { body, said } = asked();
  lastBody = body;
  return show(said, side => post(`${side}/api/search`, body));
}

// ----- why a document

function nearTo(title, near) {
  return near.length === 0 ? [] : [title, made("ul", {}, ...near.map(([name, cosine]) =>
    made("li", {}, made("meter", { value: Math.max(0, cosine) }), `${cosine.toFixed(2)} ${name}`)))];
}

const openWhy = line => line.nextElementSibling?.classList.contains("why") ? line.nextElementSibling : null;

async function why(line) {
  if (openWhy(line)) return openWhy(line).remove();
  const cell = made("td", { colSpan: line.cells.length, ariaBusy: "true" }, "…");
  line.after(made("tr", { className: "why" }, cell));
  try {
    const found = await post(`${line.dataset.side}/api/why`, { ...lastBody, answer: line.dataset.key });
    const parts = [
      ...nearTo("Near to what the history holds:", found.history.map(({ title, cosine }) => [title, cosine])),
      ...nearTo("Near to the words:", found.words.map(({ word, cosine }) => [word, cosine])),
    ];
    cell.replaceChildren(...(parts.length ? parts : ["The query has no history and no text to compare it with."]));
  } catch (error) {
    cell.replaceChildren(made("span", { className: "error" }, error.message));
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
    const place = lines(line.dataset.side).indexOf(line);
    const other = lines(sides[event.key === "ArrowLeft" ? 0 : 1]);
    go(other[Math.min(place, other.length - 1)]);
  } else if (line && at === line && event.key === "Enter" && lastBody) {
    handled();
    why(line);
  }
}

// ----- the beginning

const described = ({ documents, index, model }) =>
  `${documents.toLocaleString()} documents · ${index} index · model ${model.slice(0, 12)}`;

function answer(side, about) {
  const parts = [made("h3", {}, side ? "Beside it" : "The model served"), made("p", { className: "said" }, described(about)),
    made("p", { id: `said${side}`, className: "said" })];
  $("answers").append(made("section", {}, ...(sides.length > 1 ? parts : []), made("table", { id: `documents${side}` })));
}

async function begin() {
  const about = await call("/api/about");
  if (about.beside) {
    sides = ["", "/beside"];
    $("answers").className = "two";
    $("sides").hidden = false;
  } else $("about").textContent = described(about);
  answer("", about);
  if (about.beside) answer("/beside", await call("/beside/api/about"));
  if (about.users) {
    field("user", "choose a user", "users");
    offered("users", await call("/api/users"));
  }
  if (about.history) field("history", "titles, parted by semicolons");
  for (const [name, type] of Object.entries(about.features)) field(name, type);
  const filters = Object.entries(about.filters);
  if (filters.length) {
    const example = filters.map(([name, { type }]) => `${name} ${type === "numeric" ? ">= …" : "= …"}`).join(" and ");
    $("choices").append(...filters.map(([name, choices]) => choice(name, choices)), made("label", {}, "filter", input("filter", example)));
    $("filters").hidden = false;
  }
  $("ask").onsubmit = event => {
    event.preventDefault();
    const said = [...new FormData($("ask"))].filter(([, value]) => value.trim());
    history.replaceState(null, "", `?${new URLSearchParams(said)}`);  // back and reload ask again
    search();
  };
  document.addEventListener("keydown", pressed);
  const typed = new URLSearchParams(location.search);  // /?words=running+shoes asks at once, /?similar=key too
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
