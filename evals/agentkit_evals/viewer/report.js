"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const trials = data.trials || [];
const byId = new Map(trials.map((trial) => [trial.id, trial]));
const $ = (id) => document.getElementById(id);

/** Create an element. Children that are not elements become text, so model output is never parsed as HTML. */
function h(name, attributes, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key === "onclick" || key === "ontoggle") element[key] = value;
    else if (value !== null && value !== undefined && value !== false) element.setAttribute(key, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}
/** Text with its control tokens as labels, because many fonts lack `｜` and `▁`. */
const CONTROL = /(<?\/?｜[^｜<>\n]{0,60}｜[A-Za-z_]*>?|<\/?think>)/g;
const control = (text) => h("span", { class: "control", title: text }, text.replaceAll("｜", "|").replaceAll("▁", "_"));
function labelled(text) {
  return String(text).split(CONTROL).map((part, i) => (i % 2 ? control(part) : part)).filter((part) => part !== "");
}
const seconds = (s) => (s === null || s === undefined ? "–" : s < 1 ? `${Math.round(s * 1000)} ms` : `${s.toFixed(1)} s`);
const plural = (n, word) => `${n.toLocaleString("en")} ${word}${n === 1 ? "" : "s"}`;

/* Theme: light, dark, or the system setting. */
const remember = (value) => { try { localStorage.setItem("agentkit-theme", value); } catch { /* file: pages may have no storage */ } };
const remembered = () => { try { return localStorage.getItem("agentkit-theme"); } catch { return null; } };
const theme = remembered() || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
document.documentElement.dataset.theme = theme;
$("theme").onclick = () => {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next;
  remember(next);
};

/* Tables sortable by every column: a row is {by: sort keys, element}. */
function sortable(table, rows) {
  let column = null, down = false;
  const heads = [...table.tHead.rows[0].cells];
  const draw = () => table.tBodies[0].replaceChildren(...rows.map((row) => row.element));
  heads.forEach((head, i) => {
    const name = head.textContent;
    head.replaceChildren(h("button", { type: "button", onclick: () => {
      down = column === i && !down;
      column = i;
      const key = (row) => row.by[i];
      rows.sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y), "en", { numeric: true });
        return down ? -order : order;
      });
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      draw();
    } }, name));
  });
  draw();
}
function trialRow(trial) {
  const short = (text) => (text === null ? "–" : text.length > 300 ? `${text.slice(0, 300)}…` : text);
  const text = (value) => h("td", { title: value }, labelled(short(value)));
  const number = (value) => h("td", { class: "number" }, value === null ? "–" : value);
  return {
    by: [trial.kind, trial.id, trial.family, trial.instruction, trial.answer, trial.expected, trial.reward, trial.usage.turns, trial.usage.sampled_tokens, trial.agent_s],
    element: h("tr", {}, h("td", {}, h("i", { class: `square ${trial.kind}` }), data.legend[trial.kind]), h("td", {}, h("a", { href: `#${encodeURIComponent(trial.id)}` }, trial.id)),
      h("td", {}, trial.family), text(trial.instruction), text(trial.answer), text(trial.expected), number(trial.reward === null ? null : String(+trial.reward.toFixed(4))),
      number(trial.usage.turns), number(trial.usage.sampled_tokens), number(trial.agent_s.toFixed(2))),
  };
}
if ($("trials")) sortable($("trials"), trials.map(trialRow));
function runRow(run) {
  const cell = (value) => h("td", { title: value }, value);
  const number = (value) => h("td", { class: "number" }, value);
  return {
    by: [run.created, run.run, run.suite, run.model, run.mean, run.solved, run.trials, run.tokens, run.state],
    element: h("tr", {}, cell(run.created.replace("T", " ").replace("+00:00", " UTC")), h("td", {}, h("a", { href: run.report }, run.run)), cell(run.suite), cell(run.model),
      number(run.score), number(run.solved), number(run.trials), number(run.tokens.toLocaleString("en")), cell(run.state)),
  };
}
if ($("runs")) sortable($("runs"), data.runs.map(runRow));
$("download").onclick = () => {
  const plain = trials.map(({ turns, ...trial }) => ({ ...trial, turns: (turns || []).map(({ segments, ...turn }) => turn) }));
  const content = data.comparison || (data.runs ? { ...data.about, runs: data.runs } : { ...data.about, trials: plain });
  const address = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
  h("a", { href: address, download: `${data.about.name}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
};

/* The list of trials. */
const haystack = new Map(trials.map((trial) => [trial.id, JSON.stringify([trial.id, trial.instruction, trial.answer, trial.error,
  (trial.turns || []).map((turn) => [turn.reasoning, turn.text, turn.calls.map((call) => [call.name, call.arguments, call.result])])]).toLowerCase()]));
let shown = [];
function list() {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  shown = trials.filter((trial) => (!$("outcome").value || trial.kind === $("outcome").value)
    && (!$("family").value || trial.family === $("family").value)
    && words.every((word) => haystack.get(trial.id).includes(word)));
  $("list").replaceChildren(...shown.map((trial) => h("li", {}, h("a", { href: `#${trial.id}`, "data-id": trial.id },
    h("i", { class: `square ${trial.kind}`, title: data.legend[trial.kind] }), h("span", { title: trial.id }, trial.id),
    h("small", {}, trial.turns ? plural(trial.turns.length, "turn") : "–")))));
  if (!shown.length) $("list").append(h("li", { class: "empty" }, "No trial matches."));
  mark();
}
function mark() {
  if (!$("list")) return;
  const current = decodeURIComponent(location.hash.slice(1));
  for (const link of $("list").querySelectorAll("a")) {
    if (link.dataset.id === current) { link.setAttribute("aria-current", "true"); link.scrollIntoView({ block: "nearest" }); }
    else link.removeAttribute("aria-current");
  }
}

/* One trial. */
function block(who, ...children) { return h("div", { class: "block" }, h("div", { class: "who" }, who), ...children); }
function fold(title, open, ...children) { return h("details", { class: "block", open: open ? "" : null }, h("summary", {}, title), ...children); }

function timeline(trial) {
  const total = Math.max(trial.agent_s, ...trial.turns.map((turn) => turn.end), 0.001);
  const place = (start, end) => `left:${(100 * start / total).toFixed(3)}%;width:${(100 * (end - start) / total).toFixed(3)}%`;
  return [h("div", { class: "timeline", role: "img", "aria-label": "Model above, tools below, over time" },
    trial.turns.flatMap((turn) => [
      h("i", { style: place(turn.start, turn.generated), title: `turn ${turn.turn + 1}: model, ${seconds(turn.generated - turn.start)}` }),
      turn.calls.filter((call) => call.start !== null).map((call) => h("i", { class: `run${call.failed ? " failed" : ""}`,
        style: place(call.start, call.end ?? call.start), title: `${call.name}: ${seconds((call.end ?? call.start) - call.start)}` })),
    ].flat())),
  h("div", { class: "timeline-legend" }, h("span", {}, "model above, tools below"), h("span", {}, seconds(total)))];
}

function readArguments(text) {
  try {
    const value = JSON.parse(text);
    if (value && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
      return h("dl", { class: "args" }, Object.entries(value).flatMap(([key, item]) =>
        [h("dt", {}, key), h("dd", {}, labelled(typeof item === "string" ? item : JSON.stringify(item)))]));
    }
  } catch { /* not JSON: show as is */ }
  return h("pre", {}, labelled(text));
}

function tokens(segments, limit = 400) {
  const strip = h("div", { class: "tokens" });
  const all = segments.flatMap(([kind, ids, logprobs]) => ids.map((id, i) => [kind, id, logprobs ? logprobs[i] : null]));
  const draw = (from, to) => all.slice(from, to).forEach(([kind, id, logprob]) => {
    const text = data.pieces[id] ?? `⟨${id}⟩`;
    const surprise = logprob === null ? 0 : Math.min(1, -logprob / 4);
    strip.append(h("span", { class: kind, style: `--surprise:${surprise.toFixed(3)}`,
      title: `id ${id}, ${kind}${logprob === null ? "" : `, p ${Math.exp(logprob).toFixed(4)}, logprob ${logprob.toFixed(4)}`}` },
    labelled(text.replaceAll("\n", "↵\n"))), "\u200b");
  });
  draw(0, limit);
  if (all.length > limit) {
    const more = h("span", { class: "more", onclick: () => { more.remove(); draw(limit, all.length); } }, `… ${all.length - limit} more`);
    strip.append(more);
  }
  return strip;
}
function tokenFold(title, segments) {
  if (!segments.length) return null;
  let drawn = false;
  const fold = h("details", { class: "block", ontoggle: () => { if (!drawn) { drawn = true; fold.append(tokens(segments)); } } }, h("summary", {}, title));
  return fold;
}

function turnView(turn) {
  const sampled = turn.tokens.sampled, forced = turn.tokens.forced, took = turn.generated - turn.start;
  return h("section", { class: "turn" },
    h("header", {}, h("span", {}, h("b", {}, `Turn ${turn.turn + 1}`), turn.think ? " · thinking" : " · direct"),
      h("span", {}, `${plural(turn.tokens.prompt, "token")} fed · ${sampled} sampled${forced ? ` · ${forced} forced` : ""} · ${seconds(took)}${took > 0 && sampled ? ` · ${(sampled / took).toFixed(0)} tokens/s` : ""}${turn.cost ? ` · ${turn.cost}` : ""}`)),
    turn.reasoning ? h("div", { class: "block thought" }, h("div", { class: "who" }, "Reasoning"), h("pre", {}, labelled(turn.reasoning))) : null,
    turn.text ? block("Text", h("pre", {}, labelled(turn.text))) : null,
    turn.calls.map((call) => h("div", { class: `tool call${call.failed ? " failed" : ""}` },
      h("div", { class: "head" }, h("code", {}, call.name), h("span", {}, `${call.early ? "started early · " : ""}${call.duration === null ? "not run" : seconds(call.duration)}`)),
      readArguments(call.arguments), call.result === null ? null : h("pre", { class: call.failed ? "error" : null }, labelled(call.result)))),
    turn.notes.map((note) => h("p", { class: "note" }, note)),
    tokenFold(`Tokens of this turn (${plural(turn.tokens.prompt + sampled + forced, "id")})`, turn.segments));
}

function show(trial) {
  const meta = (name, value) => (value === null ? null : h("span", {}, `${name} `, h("b", {}, value)));
  $("trial").replaceChildren(...[
    h("h3", {}, trial.task, trial.epoch ? ` · epoch ${trial.epoch + 1}` : "", h("span", { class: `badge ${trial.kind}` }, data.legend[trial.kind])),
    h("div", { class: "meta" }, meta("family", trial.family), trial.phrasing ? meta("phrasing", trial.phrasing + (trial.held_out ? " (held out)" : "")) : null,
      trial.verifier === null ? null : meta("reward", trial.reward === null ? "not scored" : String(trial.reward)), meta("ended", trial.status || "did not start"),
      trial.verifier === null ? null : meta("sandbox", trial.backend || "none"), meta("turns", trial.usage.turns), meta("calls", trial.usage.calls),
      meta("tokens", `${trial.usage.prompt_tokens} fed, ${trial.usage.sampled_tokens} sampled, ${trial.usage.thinking_tokens} of them thinking`),
      meta("forced ids", trial.usage.forced_tokens), meta("cost", trial.cost), meta("agent", seconds(trial.agent_s)),
      ...(trial.verifier === null ? [] : [meta("setup", seconds(trial.setup_s)), meta("verifier", seconds(trial.verify_s))])),
    block("Task", h("pre", { class: "instruction" }, labelled(trial.instruction))),
    Object.keys(trial.files).length ? fold(`Files (${Object.keys(trial.files).length})`, false,
      Object.entries(trial.files).map(([path, text]) => h("div", { class: "tool call" }, h("div", { class: "head" }, h("code", {}, path)), h("pre", {}, text)))) : null,
    trial.system ? fold("System message", false, h("pre", {}, trial.system)) : null,
    trial.error ? h("pre", { class: "error" }, trial.error) : null,
    ...(trial.turns ? [...timeline(trial), ...trial.turns.map(turnView)] : [h("p", { class: "note" }, "No trajectory: the agent did not start.")]),
    ...trial.notes.map((note) => h("p", { class: "note" }, note)),
    block("Answer", h("pre", {}, labelled(trial.answer ?? "(none)"))),
    trial.expected === null ? null : block("Expected", h("pre", {}, trial.expected)),
    ...(trial.verifier === null ? [] : [block("Verifier", h("pre", { class: trial.kind === "solved" ? null : "error" }, `${trial.verifier_output || "(no output)"}`)),
      h("details", { class: "block" }, h("summary", {}, "Verifier command"), h("pre", {}, trial.verifier))])].filter(Boolean));
  mark();
}

function open() {
  const trial = byId.get(decodeURIComponent(location.hash.slice(1)));
  if (trial) { show(trial); return true; }
  return false;
}
addEventListener("hashchange", () => { if (open()) $("trial").scrollIntoView({ block: "nearest" }); });
if ($("list")) for (const id of ["search", "outcome", "family"]) $(id).addEventListener("input", list);
addEventListener("keydown", (event) => {
  if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) || event.metaKey || event.ctrlKey || event.altKey) return;
  const step = { j: 1, k: -1 }[event.key];
  if (!step || !shown.length) return;
  const at = shown.findIndex((trial) => trial.id === decodeURIComponent(location.hash.slice(1)));
  const next = shown[Math.min(shown.length - 1, Math.max(0, at + step))];
  location.hash = next.id;
});
if ($("list")) list();
if (!open() && trials.length) show(trials.find((trial) => trial.kind !== "solved") || trials[0]);
