// The page: the token first, then one of three views, by the address.

import { ask, keepToken, takeToken } from "./api.js";
import { find, tell } from "./dom.js";
import { listModels, startBuild } from "./build.js";
import { showRun, showRuns, startRuns, stopWatching } from "./runs.js";

let begun = false;

function showView(name) {
  for (const each of ["door", "build", "runs", "run"]) find(each).hidden = each !== name;
  for (const link of document.querySelectorAll("nav a")) {
    const here = link.hash === `#${name}` || (name === "run" && link.hash === "#runs");
    if (here) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
}

function route() {
  if (!begun) return;
  const [name, value] = location.hash.slice(1).split("=");
  tell("");
  if (name === "run" && value) { showView("run"); showRun(value); }
  else if (name === "runs") { showView("runs"); showRuns(); }
  else { stopWatching(); showView("build"); listModels().catch((error) => tell(error.message)); }
  document.title = `${{ run: "A run", runs: "Runs" }[name] ?? "Build"} – mergemill`;
}

async function begin() {
  try {
    const start = await ask("start");
    find("root").textContent = start.where ? `${start.root} · ${start.where}` : start.root;
    if (!begun) { await startBuild(start); startRuns(); }
    begun = true;
    route();
  } catch (error) {
    showView("door");
    if (error.status !== 401 || sessionStorage.getItem("mergemill-token")) tell(error.message);
  }
}

find("door").querySelector("form").addEventListener("submit", (event) => {
  event.preventDefault();
  keepToken(find("token").value.trim());
  begin();
});
document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); find("main").focus(); });
window.addEventListener("hashchange", () => {
  if (location.hash.startsWith("#token=")) { takeToken(); begin(); return; }
  route();
  document.querySelector("main > section:not([hidden]) h1").focus(); // where a screen reader goes on
});
takeToken();
begin();
