// Building a recipe: the YAML is the recipe, the form a view of it that the page's process makes, the plan beside both.

import { ask, order } from "./api.js";
import { button, facts, find, make, show, table, tell } from "./dom.js";
import { goTo, markLines, setText, startEditor } from "./editor.js";

const PAUSE_MS = 250;
const DRAFT = "mergemill-draft";
const OPTIONS = ["out", "memory", "workers", "threads", "shard_size", "seed"];
const yaml = find("yaml");
let start = null;
let shelf = null;
let form = null;
let busy = null;
let waiting = 0;
let edits = Promise.resolve();
let ready = false;

export async function startBuild(told) {
  start = told;
  yaml.value = sessionStorage.getItem(DRAFT) ?? "";
  startEditor(start, () => shelf ?? [], lookSoon);
  for (const name of OPTIONS) find(name).addEventListener("input", lookSoon);
  find("filter").addEventListener("input", showShelf);
  find("hub").addEventListener("click", searchHub);
  find("other-add").addEventListener("click", () => { if (find("other").value.trim()) addModel(find("other").value.trim()); });
  find("other").addEventListener("keydown", (event) => { if (event.key === "Enter") find("other-add").click(); });
  find("form").addEventListener("submit", (event) => event.preventDefault());
  find("form").addEventListener("change", writeForm);
  find("go").addEventListener("submit", merge);
  find("save").addEventListener("click", save);
  find("open").addEventListener("change", open);
  if (!start.pictures) {
    find("report").checked = false;
    find("report").disabled = true;
    find("report-line").append(make("span", { class: "quiet" }, "needs mergemill[report]"));
  }
  find("hub").disabled = !start.hub;
  await Promise.all([listModels(), look()]);
}

export const setRecipe = (text) => { setText(text); lookSoon(); };

export async function listModels() {
  const found = await ask("models");
  if (JSON.stringify(found) === JSON.stringify(shelf)) return; // what is there stays, which may be about to be clicked
  shelf = found;
  find("known").replaceChildren(...shelf.map((each) => make("option", { value: each.path })));
  showShelf();
}

function showShelf() {
  const wanted = find("filter").value.trim().toLowerCase();
  const found = (shelf ?? []).filter((each) => each.path.toLowerCase().includes(wanted));
  const rows = found.map((each) => showModel(each.path, each.kind));
  const none = shelf?.length ? "No folder is called so." : `No model lies below ${start.root} yet; put one there, or name another below.`;
  find("shelf").replaceChildren(...(rows.length ? rows : [make("li", { class: "quiet" }, none)]));
}

const showModel = (path, kind) => make("li", {},
  make("span", {}, path, " ", make("span", { class: "quiet" }, kind)),
  button("Add", () => addModel(path), { "aria-label": `Add ${path}` }),
  button("Base", () => setBase(path), { "aria-label": `Take ${path} as the base` }),
  button("What is it", () => showFacts(path), { "aria-label": `What is ${path}` }));

async function searchHub() {
  const wanted = find("filter").value.trim();
  if (!wanted) { tell("Write into Find what to search the Hub for."); find("filter").focus(); return; }
  tell("Searching the Hub…");
  try {
    const hits = await ask("hub", { words: wanted });
    tell(`The Hub has ${hits.length} that fit best.`);
    find("shelf").replaceChildren(...hits.map((each) => showModel(each.path, each.kind)));
  } catch (error) { tell(error.message); }
}

async function showFacts(path) {
  const place = find("facts");
  place.hidden = false;
  place.replaceChildren(make("p", { class: "quiet" }, `${path}: reading headers…`));
  let inner;
  try { inner = facts(await ask("facts", { model: path })); } catch (error) { inner = make("p", { class: "wrong" }, error.message); }
  place.replaceChildren(make("h3", {}, path), inner, button("Close", () => { place.hidden = true; }));
}

const addModel = (path) => edit(`${path} is added.`, () => {
  form.merge_method ||= form.base_model ? "task_arithmetic" : "linear";
  const parameters = Object.fromEntries(listRequired(form.merge_method).map((name) => [name, "0.5"]));
  form.models.push({ model: path, parameters, place: null });
});

// To linear, which is where the form begins, a base is one model more, and wants a weight too.
const setBase = (path) => edit(`${path} is the base.`, () => {
  form.base_model = path;
  if (form.merge_method === "linear") form.merge_method = "task_arithmetic";
  form.models = form.models.filter((each) => each.model !== path);
});

const findMethod = (name) => start.methods.find((each) => each.name === name);
const listRequired = (name) => (findMethod(name)?.parameters ?? []).filter((each) => each.required && each.per_model).map((each) => each.name);

function lookSoon() {
  sessionStorage.setItem(DRAFT, yaml.value);
  clearTimeout(waiting);
  ready = false;
  find("plan-state").textContent = "…";
  waiting = setTimeout(look, PAUSE_MS);
}

const options = () => Object.fromEntries(OPTIONS.map((name) => [name, find(name).value]));

// Looks at the text as it is now; an answer to an older text is dropped.
async function look() {
  clearTimeout(waiting);
  waiting = 0;
  busy?.abort();
  busy = new AbortController();
  const mine = busy;
  sessionStorage.setItem(DRAFT, yaml.value);
  try {
    const told = await order("look", { text: yaml.value, ...options() }, mine.signal);
    if (mine === busy) showLook(told);
  } catch (error) {
    if (error.name === "AbortError") return;
    find("plan-state").textContent = "";
    show(find("plan"), make("p", { class: "wrong" }, error.message));
  }
}

function showLook(told) {
  form = told.form;
  find("why-no-form").hidden = Boolean(form);
  find("why-no-form").textContent = `The form cannot show this recipe: ${told.why_no_form}. Write it into the YAML: plan, merge and result are the same.`;
  drawForm();
  drawFaults(told.error);
  drawPlan(told);
  ready = Boolean(told.plan) && !told.option_error;
  find("merge").disabled = !ready;
  find("report-line").hidden = Boolean(told.plan) && !told.plan.reportable;
  find("go-error").textContent = told.option_error ?? "";
}

function drawFaults(error) {
  markLines(error ? error.faults.map((each) => each.line) : []);
  const lines = (error?.faults ?? []).map((each) => make("div", { class: "fault" },
    make("p", { class: "wrong" },
      button(`Line ${each.line}`, () => goTo(each.line, each.column, each.width)), each.words),
    each.text ? make("pre", { class: "fault", tabindex: 0, role: "region", "aria-label": `Line ${each.line}` },
      `${each.text}\n${" ".repeat(each.column)}${"^".repeat(Math.max(1, each.width))}`) : null));
  show(find("faults"), lines);
}

function drawPlan(told) {
  find("plan-state").textContent = told.plan ? "can be merged" : told.empty ? "" : "cannot be merged yet";
  find("plan-state").className = told.plan ? "good" : "quiet";
  if (told.empty) { show(find("plan"), make("p", { class: "quiet" }, "Choose models, or write a recipe: what it reads, writes and needs is shown here.")); return; }
  if (!told.plan) { show(find("plan"), make("p", { class: "wrong" }, told.error.message)); return; }
  const rows = told.plan.sources.map((each) => [each.model, each.read, each.use]);
  show(find("plan"),
    told.plan.warnings.length ? make("ul", { class: "plain warn" }, told.plan.warnings.map((text) => make("li", {}, text))) : null,
    facts(told.plan.facts), make("h3", {}, "Models"), table(["model", "read", "tensors"], rows, "Models of the plan"),
    told.plan.tokens.length ? make("details", {}, make("summary", {}, "Tokens"),
      make("pre", { tabindex: 0, role: "region", "aria-label": "Tokens" }, told.plan.tokens.join("\n"))) : null);
}

// The form is drawn anew from the recipe; what has the focus keeps it, and what is being typed there.
function drawForm() {
  const place = find("form");
  place.hidden = !form;
  if (!form) { find("method-help").hidden = true; return; }
  const before = place.contains(document.activeElement) ? document.activeElement : null;
  const method = findMethod(form.merge_method);
  const names = start.methods.map((each) => each.name);
  if (form.merge_method && !method) names.unshift(form.merge_method);
  const methods = make("select", { id: "f-merge_method" }, make("option", { value: "" }, "choose one"), names.map((name) =>
    make("option", { value: name, selected: name === form.merge_method }, name)));
  const dtypes = ["", ...start.dtypes, ...(start.dtypes.includes(form.dtype) ? [] : [form.dtype])].filter((each, i) => each || !i);
  const shared = (method?.parameters ?? []).filter((each) => !each.per_model);
  const each = (method?.parameters ?? []).filter((one) => one.per_model);
  place.replaceChildren(
    make("div", { class: "fields" },
      field("Method", methods),
      field("Base model", make("input", { id: "f-base_model", value: form.base_model, list: "known", spellcheck: "false" })),
      field("dtype", make("select", { id: "f-dtype" }, dtypes.map((name) =>
        make("option", { value: name, selected: name === form.dtype }, name || "as the models")))),
      field("Vocabulary", make("input", { id: "f-tokenizer_source", value: form.tokenizer_source, list: "known", placeholder: "as the models; union, base" }))),
    ...form.models.map((row, i) => drawRow(row, i, each)),
    make("fieldset", {}, make("legend", {}, "Parameters for all models"), drawParameters("p", shared, form.parameters, each)),
    make("p", { class: "quiet" }, form.others.length ? `In the YAML alone: ${form.others.join(", ")}.` : ""));
  if (before) refocus(before, find(before.id));
  drawHelp(method);
}

function refocus(before, now) {
  if (!now) return;
  now.focus();
  if (now.tagName !== "INPUT" || before.value === before.defaultValue) return;
  now.value = before.value;
  now.setSelectionRange(before.selectionStart, before.selectionEnd);
}

const field = (text, input) => make("div", {}, make("label", { for: input.id }, text), input);

function drawRow(row, i, parameters) {
  const model = make("input", { id: `m-${i}`, value: row.model, list: "known", spellcheck: "false", "aria-label": `Model ${i + 1}` });
  return make("fieldset", {}, make("legend", {}, `Model ${i + 1}`),
    make("div", { class: "line" }, model, button("Remove", () => removeModel(i), { "aria-label": `Remove model ${i + 1}` })),
    drawParameters(`m-${i}`, parameters, row.parameters, []));
}

// One field for each parameter of the method, and for each other that the recipe gives, which may be a mistake.
function drawParameters(prefix, parameters, given, spared) {
  const known = parameters.map((each) => each.name);
  const more = Object.keys(given).filter((name) => !known.includes(name));
  const hint = (each) => each.default !== null ? `${each.default}` : each.required ? "required" : "none";
  const fields = [
    ...parameters.map((each) => [each.name, hint(each), each.range]),
    ...more.map((name) => [name, "", spared.find((each) => each.name === name)?.range ?? null]),
  ].map(([name, shown, range]) => field(range ? `${name} (${range})` : name, make("input", {
    id: `${prefix}-${name}`, value: given[name] ?? "", placeholder: shown, "data-parameter": name, autocomplete: "off", spellcheck: "false",
  })));
  return fields.length ? make("div", { class: "fields" }, fields) : make("p", { class: "quiet" }, "None.");
}

const removeModel = (i) => edit(`Model ${i + 1} is removed.`, () => form.models.splice(i, 1));

// One field is taken over at a time, so that what was typed into the YAML meanwhile stays.
function writeForm(event) {
  const { id, value, dataset } = event.target;
  const [kind, i] = id.split("-");
  edit("", () => {
    const holder = kind === "m" ? form.models[Number(i)] : form;
    if (!holder) return;
    if (dataset.parameter) holder.parameters[dataset.parameter] = value;
    else if (kind === "m") holder.model = value;
    else form[i] = value;
  });
}

// Edits of the form follow one another, each made to the form of the text as it is then.
function edit(said, change) {
  edits = edits.then(async () => {
    if (!form || waiting) await look();
    if (!form) { tell("The form cannot show this recipe; write it into the YAML."); return; }
    change();
    const told = await order("write", { text: yaml.value, form });
    setText(told.text);
    tell(said);
    await look();
  }).catch((error) => tell(error.message));
}

function drawHelp(method) {
  const place = find("method-help");
  place.hidden = !method;
  if (!method) return;
  const rows = method.parameters.map((each) => [
    each.name, each.type + (each.per_model ? ", per model" : ""), each.required ? "required" : each.default ?? "none", each.range ?? "",
  ]);
  place.querySelector("summary").textContent = `About ${method.name}`;
  show(place.querySelector("div"), make("p", {}, method.title), method.formula ? make("p", {}, make("code", {}, method.formula)) : null,
    facts(method.facts), make("h3", {}, "Parameters"), table(["name", "type", "default", "range"], rows, `Parameters of ${method.name}`));
}

async function merge(event) {
  event.preventDefault();
  if (waiting) await look();
  if (!ready) return;
  find("merge").disabled = true;
  find("go-error").textContent = "";
  try {
    const told = await order("merge", { text: yaml.value, ...options(), report: find("report").checked });
    location.hash = `#run=${told.id}`;
  } catch (error) { find("go-error").textContent = error.message; }
  find("merge").disabled = !ready;
}

function save() {
  const address = URL.createObjectURL(new Blob([yaml.value], { type: "application/yaml" }));
  make("a", { href: address, download: "recipe.yml" }).click();
  URL.revokeObjectURL(address);
}

async function open() {
  const file = find("open").files[0];
  if (file && file.size <= 1 << 20) setRecipe(await file.text());
  find("open").value = "";
}
