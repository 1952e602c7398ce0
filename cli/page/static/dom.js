// Making elements: texts are texts, whatever they hold.

export const find = (id) => document.getElementById(id);

export function make(name, given = {}, ...inner) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...inner.flat(Infinity).filter((each) => each !== null && each !== undefined && each !== ""));
  return made;
}

export const button = (text, act, given = {}) => make("button", { type: "button", onclick: act, ...given }, text);

export const facts = (pairs) => make("dl", {}, pairs.map(([name, value]) => [make("dt", {}, name), make("dd", {}, value)]));

// A table that can be scrolled to the side; columns of `less` are left out where it is narrow.
export function table(heads, rows, label, less = []) {
  const mark = (i) => ({ "data-less": less.includes(i) });
  const head = make("tr", {}, heads.map((text, i) => make("th", { scope: "col", ...mark(i) }, text)));
  const body = rows.map((cells) => make("tr", {}, cells.map((cell, i) => make("td", mark(i), cell))));
  return make("div", { class: "wide", tabindex: 0, role: "region", "aria-label": label },
    make("table", {}, make("thead", {}, head), make("tbody", {}, body)));
}

export function tell(text) { find("told").textContent = text; }

// Replaces what is shown only where it differs, so that focus, selection and a screen reader are left alone.
export function show(place, ...inner) {
  const made = make("div", {}, ...inner);
  if (made.innerHTML !== place.innerHTML) place.replaceChildren(...made.childNodes);
}
