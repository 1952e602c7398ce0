// Asking the page's process: with the token, which is kept by this tab alone and sent in a header.

const KEY = "mergemill-token";

export function takeToken() {
  const given = new URLSearchParams(location.hash.slice(1)).get("token");
  if (given) {
    keepToken(given);
    history.replaceState(null, "", location.pathname + "#build");
  }
}

export function keepToken(token) { sessionStorage.setItem(KEY, token); }

export class Refused extends Error {
  constructor(told, status) {
    super(told.message);
    this.faults = told.faults ?? [];
    this.status = status;
  }
}

async function request(path, options) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(KEY) ?? ""}`, ...options.headers };
  let answer;
  try {
    answer = await fetch(`/api/${path}`, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused({ message: "the page’s process does not answer; runs go on without it" }, 0);
  }
  const told = await answer.json().catch(() => ({ message: `no JSON, but status ${answer.status}` }));
  if (!answer.ok) throw new Refused(told, answer.status);
  return told;
}

export const ask = (path, given = {}, signal) => request(`${path}?${new URLSearchParams(given)}`, { signal });

export const order = (path, given, signal) => request(path, {
  method: "POST", signal, headers: { "Content-Type": "application/json" }, body: JSON.stringify(given),
});
