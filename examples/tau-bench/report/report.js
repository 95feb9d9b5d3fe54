// The reader of episodes, and the theme button. Transcripts are hostile: text reaches the page through textContent only.
"use strict";

const PAGE = 150; // entries of the list that are drawn at a time
const LONG = 400; // characters of a tool's result that are shown unasked
const $ = (id) => document.getElementById(id);
const index = JSON.parse($("index").textContent);
const episodes = index.episodes;
const byId = new Map(episodes.map((episode) => [episode.id, episode]));
const byTask = Map.groupBy ? Map.groupBy(episodes, (episode) => episode.task) : groupBy(episodes);
const unpacked = new Map();
let shown = episodes; // what the filters let through
let drawn = 0;

// ---- Building blocks

function h(name, className, ...children) {
  const element = document.createElement(name);
  if (className) element.className = className;
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

function link(id, ...children) {
  const element = h("a", "", ...children);
  element.href = "#" + id;
  return element;
}

function fold(title, open, ...children) {
  const element = h("details", "fold", h("summary", "", title), ...children);
  element.open = open;
  return element;
}

function button(text, action) {
  const element = h("button", "", text);
  element.type = "button";
  element.disabled = !action;
  if (action) element.addEventListener("click", action);
  return element;
}

function groupBy(all) {
  const groups = new Map();
  for (const one of all) groups.set(one.task, [...(groups.get(one.task) || []), one]);
  return groups;
}

const words = (name) => String(name).replace(/_issue$/, "").replaceAll("_", " ");
const outcome = (good) => h("span", good ? "good mark" : "bad mark", good ? "✓" : "✗", h("span", "sr", good ? " solved" : " failed"));
const list = (value) => (Array.isArray(value) ? value : []);
const number = (value, digits) => (typeof value === "number" ? value.toFixed(digits) : "–");

// "[mms_issue]a|b[PERSONA:Hard]" as its parts; another domain's id stays as it is.
function taskName(task) {
  const id = index.tasks[task];
  const parts = /^\[[^\]]*\](.*?)(?:\[PERSONA:([^\]]*)\])?$/.exec(id);
  if (!parts || !parts[1]) return { id, faults: [id], persona: "" };
  return { id, faults: parts[1].split("|").map(words), persona: parts[2] || "" };
}

// ---- Theme

const THEMES = ["system", "light", "dark"];

function setTheme(name) {
  if (name === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = name;
  $("theme").firstElementChild.textContent = name;
}

function remember(name) {
  try {
    if (name === undefined) return localStorage.getItem("tau2-report-theme");
    localStorage.setItem("tau2-report-theme", name);
  } catch {
    return null; // storage is off: the choice lasts as long as the page
  }
}

function startTheme() {
  let theme = THEMES.includes(remember()) ? remember() : "system";
  setTheme(theme);
  $("theme").hidden = false;
  $("theme").addEventListener("click", () => {
    theme = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
    setTheme(theme);
    remember(theme);
  });
}

// ---- The list

function applyFilters() {
  const form = new FormData($("filters"));
  const want = (name) => form.get(name) || "";
  const text = want("text").trim().toLowerCase();
  shown = episodes.filter((episode) =>
    (want("run") === "" || episode.run === Number(want("run"))) &&
    (want("outcome") === "" || hasOutcome(episode, want("outcome"))) &&
    (want("issue") === "" || episode.issue_type === want("issue")) &&
    (want("end") === "" || episode.end_reason === want("end")) &&
    (text === "" || index.tasks[episode.task].toLowerCase().includes(text)));
  $("count").textContent = `${shown.length} of ${episodes.length} episodes`;
  $("list").replaceChildren();
  drawn = 0;
  drawMore();
}

function hasOutcome(episode, wanted) {
  if (wanted !== "differs") return episode.solved === (wanted === "solved");
  const same = byTask.get(episode.task).filter((other) => other.trial === episode.trial);
  return same.some((other) => other.solved !== episode.solved);
}

function drawMore() {
  const open = current();
  for (const episode of shown.slice(drawn, drawn + PAGE)) $("list").append(entry(episode, open));
  drawn = Math.min(shown.length, drawn + PAGE);
  $("more").hidden = drawn === shown.length;
}

function entry(episode, open) {
  const name = taskName(episode.task);
  const where = [index.runs.length > 1 ? index.runs[episode.run] : null, words(episode.issue_type),
    name.persona, trials(episode) > 1 ? `trial ${episode.trial}` : null, words(episode.end_reason)];
  const element = link(episode.id, outcome(episode.solved), h("span", "faults", name.faults.join(", ")),
    h("span", "", h("span", "sr", "partial score "), number(episode.partial_score, 2)),
    h("span", "note", where.filter(Boolean).join(" · ")));
  if (open && open.id === episode.id) element.setAttribute("aria-current", "true");
  return h("li", "", element);
}

const trials = (episode) => byTask.get(episode.task).filter((other) => other.run === episode.run).length;

// ---- One episode

async function unpack(block) {
  if (!unpacked.has(block)) {
    const packed = Uint8Array.from(atob(document.querySelectorAll("script.block")[block].textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(block, JSON.parse(await new Response(stream).text()));
  }
  return unpacked.get(block);
}

const current = () => byId.get(location.hash.slice(1));

async function show() {
  const episode = current();
  for (const element of $("list").querySelectorAll("[aria-current]")) element.removeAttribute("aria-current");
  if (!episode) {
    $("reader").classList.remove("open");
    $("episode").replaceChildren(h("p", "note", "Choose an episode to read it."));
    return;
  }
  try {
    const blocks = document.querySelectorAll("script.block").length;
    const [part, told] = await Promise.all([unpack(episode.block), unpack(blocks - 1)]);
    if (current() !== episode) return; // another one was opened meanwhile
    $("episode").replaceChildren(...episodeView(episode, part[episode.at], told[episode.told]).filter(Boolean));
  } catch (error) {
    $("episode").replaceChildren(h("p", "warning", `This episode cannot be shown here: ${error.message}`));
  }
  $("reader").classList.add("open");
  while (drawn <= shown.indexOf(episode)) drawMore();
  const marked = $("list").querySelector(`a[href="#${episode.id}"]`);
  if (marked) {
    marked.setAttribute("aria-current", "true");
    marked.scrollIntoView({ block: "nearest" });
  }
  $("episode").focus({ preventScroll: true });
  $("episode").scrollIntoView({ block: "start" });
}

function step(by) {
  const at = shown.indexOf(current());
  return at >= 0 ? shown[at + by] : shown[0];
}

function go(episode) {
  if (episode) location.hash = episode.id;
}

function episodeView(episode, full, told) {
  const name = taskName(episode.task);
  return [
    controls(),
    h("p", "note", [index.runs[episode.run], words(episode.issue_type), name.persona && `persona ${name.persona}`].filter(Boolean).join(" · ")),
    h("h3", "", name.faults.join(", ")),
    h("p", "task note", name.id),
    h("p", "", h("span", episode.solved ? "badge good" : "badge bad", episode.solved ? "✓ Solved" : "✗ Failed"), " ",
      `ended by ${words(episode.end_reason)}`, full.detail ? `: ${full.detail}` : ""),
    facts(episode, full),
    siblings(episode),
    fold(`Checks: ${checksMet(full)}`, true, ...checks(full)),
    toldFold(told),
    dialogue(episode, full),
    controls(),
  ];
}

function controls() {
  const [previous, next] = [step(-1), step(1)];
  const keys = h("span", "note keys", h("kbd", "", "k"), " previous  ", h("kbd", "", "j"), " next  ", h("kbd", "", "Esc"), " list");
  return h("div", "bar", button("Back to the list", () => { location.hash = "episodes"; }),
    button("← Previous", previous && (() => go(previous))), button("Next →", next && (() => go(next))), keys);
}

function facts(episode, full) {
  const pairs = [["reward", number(episode.reward, 1)], ["partial score", number(episode.partial_score, 3)],
    ["agent turns", episode.agent_turns], ["messages", full.steps], ["tool errors", full.tool_errors],
    ["trial", episode.trial], ["seed", full.seed],
    ["tokens", Object.entries(full.tokens).filter(([, count]) => typeof count === "number").map(([name, count]) => `${count.toLocaleString("en")} ${words(name)}`).join(", ") || null]];
  const known = pairs.filter(([, value]) => value !== null && value !== undefined);
  return h("dl", "facts", ...known.map(([name, value]) => h("div", "", h("dt", "", name), h("dd", "", String(value)))));
}

function siblings(episode) {
  const all = byTask.get(episode.task);
  if (all.length < 2) return null;
  const ofRun = (run) => all.filter((other) => other.run === run).map((other) => {
    const element = link(other.id, outcome(other.solved), h("span", "sr", ` trial ${other.trial}`));
    if (other === episode) element.setAttribute("aria-current", "true");
    return element;
  });
  const runs = [...new Set(all.map((other) => other.run))];
  return h("p", "siblings", h("span", "note", "the same task:"), ...runs.map((run) => h("span", "", index.runs[run], " ", ...ofRun(run))));
}

// ---- Checks

function checkRows(full) {
  const found = full.checks || {};
  const actions = list(found.action_checks).map((check) => ({
    met: check.sound,
    text: `${check.requestor === "user" ? "customer" : "agent"}: ${call(check)}`,
    note: check.look_up ? "gold look-up: no credit either way" : check.sound === check.official ? "gold action" : `gold action; tau2's own matcher says ${check.official ? "met" : "not met"}`,
  }));
  const assertions = list(found.env_assertions).map((check, i) => ({
    met: check.met, text: call({ name: check.func_name, ...list(full.assertions)[i] }), note: "assertion on the end state",
  }));
  const communicated = list(found.communicate_checks).map((check) => ({
    met: check.met, text: typeof check.info === "string" ? check.info : JSON.stringify(check.info), note: "to be communicated",
  }));
  return [...actions, ...assertions, ...communicated, ...otherChecks(full.others, list(found.reward_basis))];
}

function otherChecks(others, counts) {
  const rows = list(others.nl_assertions).map((check) => ({ met: check.met, text: String(check.nl_assertion), note: "judged assertion" }));
  if (others.db_check && counts.includes("DB")) rows.push({ met: others.db_check.db_match, text: "database as after the gold actions", note: "database" });
  return rows;
}

function checksMet(full) {
  const rows = checkRows(full);
  return rows.length ? `${rows.filter((row) => row.met).length} of ${rows.length} met` : "none recorded";
}

function checks(full) {
  const basis = list((full.checks || {}).reward_basis).map(words).join(", ");
  const rows = checkRows(full).map((row) =>
    h("li", "", h("span", row.met ? "good mark" : "bad mark", row.met ? "✓ met" : "✗ not met"),
      h("span", "", h("code", "", row.text), h("span", "note", "  " + row.note))));
  return [h("ul", "checks", ...rows), basis ? h("p", "note", `tau2's reward counts: ${basis.toLowerCase()}`) : null].filter(Boolean);
}

function call(made) {
  const pairs = Object.entries(made.arguments && typeof made.arguments === "object" ? made.arguments : {});
  return `${made.name}(${pairs.map(([key, value]) => `${key}=${JSON.stringify(value)}`).join(", ")})`;
}

// ---- What was said

function toldFold(told) {
  const parts = [];
  if (told.ticket) parts.push(h("p", "note", "ticket"), h("p", "told", String(told.ticket)));
  const scenario = told.user_scenario || {};
  const instructions = scenario.instructions && typeof scenario.instructions === "object" ? scenario.instructions : { instructions: scenario.instructions };
  for (const [key, value] of Object.entries({ persona: scenario.persona, ...instructions }))
    if (value && key !== "domain") parts.push(h("p", "note", words(key)), h("p", "told", String(value).trim()));
  return parts.length ? fold("The customer's instructions", false, ...parts) : null;
}

function dialogue(episode, full) {
  if (!full.messages) return h("p", "note", "This result holds no transcript.");
  const calls = full.messages.flatMap((message) => list(message.tool_calls).map((made) => made.id));
  const results = new Map(full.messages.filter((message) => message.role === "tool").map((message) => [message.id, message]));
  const items = full.messages.flatMap((message, i) => {
    if (message.role === "tool") return calls.includes(message.id) ? [] : [callView(message, { name: "(no call)" }, message, i)];
    return messageViews(message, results, i);
  });
  const why = `The episode ended: ${words(episode.end_reason)}${full.detail ? `, ${full.detail}` : ""}`;
  return h("ol", "chat", ...items, h("li", "end", why));
}

function messageViews(message, results, i) {
  const said = message.content ? [saidView(message, i)] : [];
  return [...said, ...list(message.tool_calls).map((made) => callView(message, made, results.get(made.id), i))];
}

const bySide = { user: ["customer", "Customer"], assistant: ["agent", "Agent"] };

function saidView(message, i) {
  const [className, who] = bySide[message.role] || ["agent", message.role];
  return h("li", className, h("p", "who", h("span", "", who), h("span", "", String(i))), h("p", "text", message.content));
}

function callView(message, made, result, i) {
  const customer = (message.role === "tool" ? message.requestor : message.role) === "user";
  const who = customer ? "On the customer’s phone" : "Agent’s tool";
  const pairs = Object.entries(made.arguments && typeof made.arguments === "object" ? made.arguments : {});
  const lines = pairs.map(([key, value]) => `${key}: ${typeof value === "string" ? value : JSON.stringify(value)}`);
  return h("li", customer ? "call customer" : "call agent", h("p", "who", h("span", "", who), h("span", "", String(i))),
    h("h4", "", made.name), lines.length ? h("div", "args", lines.join("\n")) : null, resultView(result));
}

function resultView(result) {
  if (!result) return h("p", "bad", "✗ no result");
  const text = pretty(result.content || "");
  const body = h("pre", "", text || "(empty)");
  const failed = result.error ? h("p", "bad mark", "✗ the tool reported an error") : null;
  if (text.length <= LONG) return h("div", "", failed, body);
  return h("div", "", failed, h("details", "", h("summary", "", `result, ${text.length.toLocaleString("en")} characters`), body));
}

function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 1);
  } catch {
    return text;
  }
}

// ---- Start

function onKey(event) {
  const busy = event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey;
  if (busy || !current()) return;
  if (event.key === "j" || event.key === "ArrowRight") go(step(1));
  if (event.key === "k" || event.key === "ArrowLeft") go(step(-1));
  if (event.key === "Escape") location.hash = "episodes";
}

function describeMarks() {
  for (const mark of document.querySelectorAll("figure [role=graphics-symbol][aria-label]")) {
    const title = document.createElementNS("http://www.w3.org/2000/svg", "title");
    title.textContent = mark.getAttribute("aria-label");
    mark.prepend(title);
  }
}

startTheme();
describeMarks();
$("filters").addEventListener("input", applyFilters);
$("filters").addEventListener("submit", (event) => event.preventDefault());
$("more").addEventListener("click", drawMore);
document.addEventListener("keydown", onKey);
window.addEventListener("hashchange", show);
$("reader").hidden = false;
applyFilters();
show();
