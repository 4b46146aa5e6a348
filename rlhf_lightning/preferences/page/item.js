// Shows an item's prompt and answers as text.

import { make } from "./api.js";

const LONG = 1600; // letters, and LINES lines, from which an answer is folded
const LINES = 24;
const ROLES = { user: "User", assistant: "Assistant", system: "System", developer: "Developer", tool: "Tool" };

/** Text with characters that cannot be seen made visible: controls, and marks that turn the direction around. */
export function visible(text) {
  return text
    .replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0)))
    .replace(/[\u007f-\u009f\u202a-\u202e\u2066-\u2069\ufeff]/g, (c) => `[U+${c.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}]`);
}

/** The prompt as turns of a conversation. */
export function promptOf(item) {
  const turns = item.prompt.map((turn) =>
    make("div", { class: `turn ${turn.role}` }, make("h2", { class: "role" }, ROLES[turn.role] ?? turn.role), textOf(turn.content)),
  );
  return make("section", { class: "prompt", "aria-label": "Prompt" }, ...turns);
}

/** A paragraph that keeps spaces and lines, and finds its direction by itself. */
export function textOf(text) {
  return text === ""
    ? make("p", { class: "text empty" }, "(empty)")
    : make("p", { class: "text", dir: "auto" }, visible(text));
}

/** Whether an answer is folded at first. */
export function isLong(text) {
  return text.length > LONG || text.split("\n", LINES + 1).length > LINES;
}

/** A, B, ... Z, AA, AB, ... */
export function letter(place) {
  return place < 26 ? String.fromCharCode(65 + place) : letter(Math.floor(place / 26) - 1) + letter(place % 26);
}

/** The names under which answers are shown. */
export function letters(count) {
  return Array.from({ length: count }, (_, place) => letter(place));
}

/**
 * A card for each answer. All long answers fold and unfold together, so that no side looks shorter.
 * `under(place)` gives what stands below an answer's text.
 */
export function cardsOf(item, under = () => null) {
  const long = item.answers.some(isLong);
  const cards = item.answers.map((text, place) => {
    const name = letters(item.answers.length)[place];
    const id = `answer-${place}`;
    return make(
      "section",
      { class: "card", "aria-labelledby": id },
      make("h3", { id }, `Answer ${name}`),
      make("div", { class: "folding" }, textOf(text)),
      under(place),
    );
  });
  return { cards, long };
}

/** The cards beside each other, with a button that folds and unfolds all of them. */
export function answersOf(cards, long, layout) {
  const box = make("div", { class: `answers ${layout}${long ? " folded" : ""}` }, ...cards);
  if (!long) return { element: box, unfold: null };
  const toggle = make("button", { type: "button", class: "unfold", "data-key": "e", "aria-expanded": "false" });
  const say = (folded) => {
    toggle.setAttribute("aria-expanded", String(!folded));
    toggle.replaceChildren(folded ? "Show all " : "Show less ", make("kbd", { "aria-hidden": "true" }, "E"));
  };
  toggle.addEventListener("click", () => say(box.classList.toggle("folded")));
  say(true);
  return { element: make("div", {}, box, toggle), unfold: toggle };
}
