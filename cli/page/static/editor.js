// The YAML as text: line numbers, lines that are wrong, and completion of what can stand there.

import { find, make } from "./dom.js";

const yaml = find("yaml");
const gutter = find("gutter");
const words = find("words");
let bad = new Set();
let at = -1;
let choices = [];
let catalogue = { methods: [], keys: {}, dtypes: [], entry_keys: [] };
let models = () => [];

export function startEditor(known, list, changed) {
  catalogue = known;
  models = list;
  yaml.addEventListener("input", () => { paint(); complete(false); changed(); });
  yaml.addEventListener("scroll", () => { gutter.scrollTop = yaml.scrollTop; close(); });
  yaml.addEventListener("keydown", onKey);
  yaml.addEventListener("blur", () => setTimeout(close, 150));
  new ResizeObserver(paint).observe(yaml);
  paint();
}

export function setText(text) {
  if (yaml.value === text) return;
  yaml.value = text;
  close();
  paint();
}

export function markLines(lines) {
  bad = new Set(lines);
  paint();
  yaml.setAttribute("aria-invalid", bad.size ? "true" : "false");
}

export function goTo(line, column, width) {
  const before = yaml.value.split("\n").slice(0, line - 1).reduce((sum, each) => sum + each.length + 1, 0);
  yaml.focus();
  yaml.setSelectionRange(before + column, before + column + width);
  yaml.scrollTop = Math.max(0, (line - 4) * lineHeight());
}

function paint() {
  const count = yaml.value.split("\n").length;
  gutter.replaceChildren(...Array.from({ length: count }, (_, i) =>
    [make("span", bad.has(i + 1) ? { class: "bad" } : {}, String(i + 1)), "\n"]).flat());
  gutter.scrollTop = yaml.scrollTop;
}

const lineHeight = () => parseFloat(getComputedStyle(yaml).lineHeight);

function onKey(event) {
  if (event.ctrlKey && event.key === " ") { event.preventDefault(); complete(true); return; }
  if (words.hidden) return;
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (step) { event.preventDefault(); select((at + step + choices.length) % choices.length); }
  else if ((event.key === "Enter" || event.key === "Tab") && at >= 0) { event.preventDefault(); take(at); }
  else if (event.key === "Escape") { event.preventDefault(); close(); }
}

// What can stand at the caret: [text, note] pairs, and the beginning of it that is written already.
export function listChoices(text, known, list) {
  const line = text.slice(text.lastIndexOf("\n") + 1);
  const method = known.methods.find((each) => each.name === /^merge_method:\s*["']?([\w-]+)/m.exec(text)?.[1]);
  let found = /^\s*(?:-\s*)?merge_method:\s*([\w-]*)$/.exec(line);
  if (found) return [found[1], known.methods.map((each) => [each.name, each.inputs])];
  found = /^\s*(?:dtype|out_dtype):\s*(\w*)$/.exec(line);
  if (found) return [found[1], known.dtypes.map((each) => [each, ""])];
  found = /(?:model|base_model|delta_base):\s*([^\s,{}"']*)$/.exec(line);
  if (found) return [found[1], list().map((each) => [each.path, each.kind])];
  found = /^tokenizer_source:\s*(\S*)$/.exec(line);
  if (found) return [found[1], [["union", ""], ["base", ""], ...list().map((each) => [each.path, each.kind])]];
  found = /parameters:\s*\{(?:.*,)?\s*(\w*)$/.exec(line) ?? (isBelowParameters(text) && /^\s+(\w*)$/.exec(line));
  if (found) {
    const own = method ? method.parameters : [];
    return [found[1], own.map((each) => [`${each.name}: `, each.range ?? each.type])];
  }
  found = /^\s+-\s+\{?(\w*)$/.exec(line) ?? /^\s*-\s+\{.*,\s*(\w*)$/.exec(line) ?? /^\s+(\w*)$/.exec(line);
  if (found) return [found[1], known.entry_keys.map((each) => [`${each}: `, ""])];
  found = /^(\w*)$/.exec(line);
  return found ? [found[1], Object.entries(known.keys).map(([key, said]) => [`${key}: `, said.split(/[.:;]/)[0]])] : ["", []];
}

function isBelowParameters(text) {
  const lines = text.split("\n").slice(0, -1);
  const indent = /^\s*/.exec(text.slice(text.lastIndexOf("\n") + 1))[0].length;
  for (const line of lines.reverse()) {
    if (!line.trim()) continue;
    if (/^[\s-]*/.exec(line)[0].length < indent) return /^[\s-]*parameters:\s*$/.test(line);
  }
  return false;
}

function complete(asked) {
  if (yaml.selectionStart !== yaml.selectionEnd) { close(); return; }
  const [begun, all] = listChoices(yaml.value.slice(0, yaml.selectionStart), catalogue, models);
  if (!asked && begun.length < 1) { close(); return; }
  choices = all.filter(([text]) => text.startsWith(begun) && text.trim().replace(/:$/, "") !== begun).slice(0, 40);
  if (!choices.length) { close(); return; }
  words.replaceChildren(...choices.map(([text, note], i) => make("li", {
    role: "option", id: `word-${i}`, "aria-selected": "false", onmousedown: (event) => { event.preventDefault(); take(i); },
  }, text.trim().replace(/:$/, ""), note ? make("small", {}, note) : null)));
  words.begun = begun;
  place();
  words.hidden = false;
  select(0);
}

function place() {
  const before = yaml.value.slice(0, yaml.selectionStart).split("\n");
  const size = getComputedStyle(yaml);
  const across = gutter.offsetWidth + before.at(-1).length * parseFloat(size.fontSize) * 0.6 - yaml.scrollLeft;
  words.style.top = `${before.length * lineHeight() + parseFloat(size.paddingTop) - yaml.scrollTop + 2}px`;
  words.style.left = `${Math.max(0, Math.min(across, yaml.offsetWidth - 200))}px`;
}

function select(i) {
  at = i;
  [...words.children].forEach((each, j) => each.setAttribute("aria-selected", String(i === j)));
  words.children[i]?.scrollIntoView({ block: "nearest" });
  yaml.setAttribute("aria-activedescendant", `word-${i}`);
}

function take(i) {
  const text = choices[i][0];
  const start = yaml.selectionStart - words.begun.length;
  yaml.setRangeText(text, start, yaml.selectionStart, "end");
  close();
  yaml.dispatchEvent(new Event("input"));
  close();
}

function close() {
  words.hidden = true;
  at = -1;
  yaml.removeAttribute("aria-activedescendant");
}
