// The runs, one of them as it goes on, and what came of it.

import { ask, order } from "./api.js";
import { button, facts, find, make, show, table, tell } from "./dom.js";
import { setRecipe } from "./build.js";

const LIVE_MS = 1000; // between two looks at first, then
const LATER_MS = 2000;
const FIRST = 10; // looks
const IDLE_MS = 5000; // at what does not change
let timer = 0;
let shown = "";
let result = null;
let lost = false; // the page's process did not answer last

export function stopWatching() { clearTimeout(timer); shown = ""; result = null; }

// Asks again while the page is looked at; nothing is asked in a tab that is hidden.
async function repeat(key, work, count = 0) {
  if (shown !== key) return;
  let live = false;
  if (!document.hidden) {
    try {
      live = await work();
      if (lost) tell("");
      lost = false;
    } catch (error) {
      if (shown === key) tell(error.message);
      lost = true;
    }
  }
  if (shown === key) timer = setTimeout(() => repeat(key, work, count + 1), live ? (count < FIRST ? LIVE_MS : LATER_MS) : IDLE_MS);
}

document.addEventListener("visibilitychange", () => { if (!document.hidden && shown) wake?.(); });
let wake = null;

function watch(key, work) {
  stopWatching();
  shown = key;
  wake = () => { clearTimeout(timer); repeat(key, work); };
  repeat(key, work);
}

export const showRuns = () => watch("runs", async () => {
  const told = await ask("runs");
  const rows = told.map((run) => [
    make("a", { href: `#run=${run.id}` }, run.title), { merge: "merge", compare: "comparison", push: "to the Hub", search: "search" }[run.kind],
    said(run), run.kind === "merge" ? run.bytes : "", run.since ? new Date(run.since * 1000).toLocaleString() : "",
  ]);
  show(find("list"), rows.length ? table(["what", "kind", "state", "done", "since"], rows, "Runs below this folder", [1])
    : make("p", { class: "quiet" }, "Nothing was merged below this folder yet."));
  return told.some((run) => run.live);
});

const said = (run) => make("span", { class: { failed: "wrong", finished: "good", unfinished: "warn" }[run.state] ?? "" },
  run.live && run.state === "finished" ? "finished; its report is being made" : run.said + (run.live && run.share ? ` ${Math.floor(100 * run.share)} %` : ""));

export const showRun = (id) => watch(`run=${id}`, async () => {
  const run = await ask("run", { id });
  find("run-head").textContent = { merge: "Merge into ", compare: "Comparison of ", push: "To the Hub: ", search: "Search in " }[run.kind] + run.title;
  const done = run.kind === "merge" && run.state === "finished";
  if (done && (!result || result.id !== id)) result = { id, ...await ask("result", { id }) };
  if (shown !== `run=${id}`) return false;
  draw(run, done ? result : null);
  return run.live;
});

function draw(run, came) {
  const place = find("watch");
  if (place.dataset.run !== run.id) {
    place.dataset.run = run.id;
    place.replaceChildren(...["state", "acts", "fault", "came", "notes"].map((name) => make("div", { id: `w-${name}` })));
    find("w-state").setAttribute("aria-live", "polite");
    find("w-fault").setAttribute("role", "alert");
  }
  drawState(run);
  drawActs(run);
  show(find("w-fault"), run.error ? make("p", { class: "wrong" }, run.error) : null,
    run.command ? make("p", { class: "quiet" }, "On the command line it goes on with: ", make("code", {}, run.command)) : null);
  if (came) drawResult(run, came); else find("w-came").replaceChildren();
  drawNotes(run);
}

function drawState(run) {
  const live = run.live && run.state !== "finished";
  const number = (name, value) => value ? make("span", {}, make("span", { class: "quiet" }, `${name} `), make("b", {}, value)) : null;
  show(find("w-state"), make("p", {}, said(run)),
    run.kind === "merge" && run.parts ? make("progress", { value: run.share, max: 1, "aria-label": `Done of ${run.title}` }) : null,
    live && run.state === "starting" ? make("progress", { "aria-label": "Starting" }) : null,
    make("div", { class: "numbers" }, number("bytes", run.bytes), number("parts", run.parts), number("rate", live && run.rate),
      number("left", live && run.left), number("workers", live && run.workers)),
    run.dashboard ? make("p", {}, make("a", { href: run.dashboard, rel: "noreferrer" }, "Dask’s dashboard")) : null);
}

function drawActs(run) {
  const stopped = !run.live && ["unfinished", "failed"].includes(run.state);
  const wanted = [
    run.live && run.state !== "cancelling" && run.state !== "finished" ? ["Cancel", "cancel"] : null,
    stopped && run.ours ? [run.kind === "merge" ? "Resume" : "Try again", "resume"] : null,
    stopped && (run.ours || run.kind === "merge") ? [run.kind === "merge" ? "Give up, and remove what is there" : "Remove from the list", "abort"] : null,
    run.report && !run.live ? [run.kind === "search" ? "Open its plots" : "Open the report", "show"] : null,
    run.kind === "merge" && run.state === "finished" ? ["Compare it", "compare"] : null,
    run.recipe ? ["Build from this recipe", "again"] : null,
  ].filter(Boolean);
  const place = find("w-acts");
  const key = JSON.stringify([run.id, wanted]);
  if (place.dataset.key === key) return;
  place.dataset.key = key;
  const focused = place.contains(document.activeElement);
  place.className = "acts";
  place.replaceChildren(...wanted.map(([text, act]) => button(text, (event) => doAct(act, run, event.target))));
  if (focused) (place.querySelector("button") ?? find("run-head")).focus();
}

async function doAct(act, run, pressed) {
  if (act === "again") { setRecipe(run.recipe); location.hash = "#build"; return; }
  if (act === "compare") { find("second").value = run.out; location.hash = "#runs"; tell("Name what it is compared with, and compare."); return; }
  if (act === "show") { await openReport(run); return; }
  if (act === "abort" && run.kind === "merge" && !confirm(`Remove what the unfinished merge has left in ${run.out}?`)) return;
  pressed.disabled = true;
  try {
    await order(act, { id: run.id });
    tell({ cancel: "It is asked to end.", resume: "It goes on.", abort: "It is removed." }[act]);
    if (act === "abort") { location.hash = "#runs"; return; }
  } catch (error) { tell(error.message); }
  pressed.disabled = false;
  wake?.();
}

// The tab is opened at once, while a click allows it, and led to an address that is good once.
async function openReport(run) {
  const tab = window.open("about:blank", "_blank");
  try {
    const told = await order("show", { id: run.id });
    if (tab) tab.location = told.address; else location.assign(told.address);
  } catch (error) { tab?.close(); tell(error.message); }
}

function drawNotes(run) {
  const place = find("w-notes");
  if (!place.childNodes.length) {
    place.append(make("details", { open: run.state !== "finished" }, make("summary", {}, "Log"),
      make("pre", { id: "w-log", tabindex: 0, role: "region", "aria-label": "Log" })),
      make("details", {}, make("summary", {}, "Recipe and driver"), make("div", { id: "w-facts" }),
        make("pre", { id: "w-recipe", tabindex: 0, role: "region", "aria-label": "Recipe" })));
  }
  const log = find("w-log");
  if (log.textContent !== run.log) {
    const below = log.scrollTop + log.clientHeight > log.scrollHeight - 20;
    log.textContent = run.log || "It was not started here, so its log is elsewhere.";
    if (below) log.scrollTop = log.scrollHeight;
  }
  find("w-recipe").textContent = run.recipe;
  find("w-recipe").hidden = !run.recipe;
  show(find("w-facts"), facts(run.facts));
}

function drawResult(run, came) {
  const place = find("w-came");
  const key = `${run.id} ${run.report}`;
  if (place.dataset.key === key && place.childNodes.length) return;
  place.dataset.key = key;
  const commit = run.committed;
  place.replaceChildren(
    commit ? make("section", { class: "card" }, make("h2", {}, "Result"), facts(commit.facts),
      [...commit.faults, ...commit.warnings].length ? make("ul", { class: "plain warn" }, [...commit.faults, ...commit.warnings].map((text) => make("li", {}, text))) : null,
      commit.changed.length ? [make("h3", {}, "Changed most, as a share of the base"), table(["tensor", "change"], commit.changed, "Changed most")] : null,
      commit.routing ? [make("h3", {}, "Routing"), make("p", {}, "Of the prompts, by layer: for how many an expert of their own is picked, and each expert is the first choice. The condition tells how hard the rows of the router are to tell apart; above 5 is much."),
        table(commit.routing.heads, commit.routing.rows, "Routing")] : null) : "",
    make("section", { class: "card" }, make("h2", {}, "Use it"), came.uses.map((each) => [make("h3", {}, each.title), snippet(each)])),
    came.files.length ? make("details", { class: "card" }, make("summary", {}, "Files"), table(["file", "size"], came.files, "Files")) : "",
    came.card ? make("details", { class: "card" }, make("summary", {}, "Model card"), make("pre", { tabindex: 0, role: "region", "aria-label": "Model card" }, came.card)) : "",
    run.out.startsWith("hf://") ? "" : pushForm(run));
}

const snippet = (each) => make("div", { class: "uses" }, make("pre", { tabindex: 0, role: "region", "aria-label": each.title }, each.text),
  button("Copy", async () => { await navigator.clipboard.writeText(each.text); tell(`Copied: ${each.title}`); }, { "aria-label": `Copy: ${each.title}` }));

function pushForm(run) {
  const name = make("input", { id: "push-name", placeholder: "org/name", autocomplete: "off", spellcheck: "false" });
  const open = make("input", { id: "push-public", type: "checkbox" });
  const wrong = make("p", { class: "wrong", role: "alert" });
  return make("section", { class: "card" }, make("h2", {}, "Publish on the Hub"),
    make("form", { onsubmit: async (event) => {
      event.preventDefault();
      wrong.textContent = "";
      try {
        const told = await order("push", { id: run.id, repository: name.value, public: open.checked });
        location.hash = `#run=${told.id}`;
      } catch (error) { wrong.textContent = error.message; }
    } },
    make("div", { class: "line" }, make("label", { for: "push-name" }, "Repository"), name, make("button", {}, "Publish")),
    make("p", { class: "tick" }, open, make("label", { for: "push-public" }, "Let everybody see it")),
    make("p", { class: "quiet" }, "By the token that hf auth login has left on the page’s machine; it is never shown here."), wrong));
}

export function startRuns() {
  find("compare").addEventListener("submit", async (event) => {
    event.preventDefault();
    find("compare-error").textContent = "";
    try {
      const told = await order("compare", Object.fromEntries(["first", "second", "base"].map((name) => [name, find(name).value])));
      location.hash = `#run=${told.id}`;
    } catch (error) { find("compare-error").textContent = error.message; }
  });
}
