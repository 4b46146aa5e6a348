// What every page needs of the server: requests, who is asking, and elements made of text.

const HIDDEN = "judge"; // the key of what this tab remembers

/** Who uses the page: from the address's fragment, which browsers do not send, else what this tab remembers. */
export function identity() {
  const given = new URLSearchParams(location.hash.slice(1));
  const known = { ...read("identity"), ...Object.fromEntries(given) };
  write("identity", known);
  if (given.size) history.replaceState(null, "", location.pathname); // nobody reads the token from the screen
  return known;
}

/** What this tab remembers under a name. */
export function read(name) {
  return JSON.parse(sessionStorage.getItem(`${HIDDEN}.${name}`) ?? "null");
}

/** Remembers a value until the tab is closed. */
export function write(name, value) {
  sessionStorage.setItem(`${HIDDEN}.${name}`, JSON.stringify(value));
}

/** The answer to a GET. Throws an Error with the server's words, or a TypeError if it cannot be reached. */
export async function get(path, token) {
  return answer(await fetch(path, { headers: token ? { "X-Token": token } : {} }));
}

/**
 * The answer to a POST. It is sent again until the server has answered, always with the same client id, so that it
 * counts once. `waiting` is called with the reason before each further try.
 */
export async function post(path, body, token, waiting) {
  const headers = { "Content-Type": "application/json", ...(token ? { "X-Token": token } : {}) };
  for (let pause = 500; ; pause = Math.min(pause * 2, 8000)) {
    try {
      const response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body) });
      if (response.status !== 503) return await answer(response);
      waiting((await response.json()).error);
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      waiting("the server cannot be reached");
    }
    await new Promise((done) => setTimeout(done, pause));
  }
}

async function answer(response) {
  const found = await response.json();
  if (response.ok) return found;
  throw Object.assign(new Error(found.error), { status: response.status });
}

/** A new random id. crypto.randomUUID is not there over plain http from another machine; getRandomValues is. */
export function newId() {
  return Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** An element with attributes and children; texts are never read as HTML. */
export function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value != null) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child != null));
  return element;
}

/** A button with a key. Its accessible name is its text alone. */
export function button(text, key, act, attributes = {}) {
  const shown = key ? make("kbd", { "aria-hidden": "true" }, key.toUpperCase()) : null;
  return make("button", { type: "button", "data-key": key, onclick: act, ...attributes }, key ? `${text} ` : text, shown);
}

/** The element with this id. */
export function by(id) {
  return document.getElementById(id);
}
