// Judging a pair: one press on A, B, Tie or Both bad. A strength and criteria may be chosen before.

import { button, make } from "./api.js";
import { answersOf, cardsOf } from "./item.js";

const STRENGTHS = ["slightly", "clearly", "much"];
export const KEYS = {
  "a or ←": "A is better",
  "b or →": "B is better",
  t: "Tie",
  x: "Both bad",
  "1 2 3": "how much better, before A or B",
};
const CHOICES = [
  ["A", "a", "a"],
  ["B", "b", "b"],
  ["Tie", "t", "tie"],
  ["Both bad", "x", "both_bad"],
];

/** The view of a pair. `done(value)` is called with the judgement; `before` is one that was taken back. */
export function pairs(study, item, before, done) {
  let strength = before?.strength ?? null;
  const { cards, long } = cardsOf(item);
  const criteria = study.criteria.map((name) => criterion(name, before?.criteria?.[name]));

  const levels = STRENGTHS.map((text, place) =>
    button(text, String(place + 1), () => set(strength === place + 1 ? null : place + 1), { class: "strength" }),
  );
  function set(value) {
    strength = value;
    levels.forEach((level, place) => level.setAttribute("aria-pressed", String(strength === place + 1)));
  }
  set(strength);

  function choose(choice) {
    const value = { choice, strength: choice === "a" || choice === "b" ? strength : null };
    if (criteria.length) {
      value.criteria = Object.fromEntries(criteria.map(({ name, chosen }) => [name, chosen()]).filter(([, of]) => of));
    }
    done(value);
  }

  const choices = CHOICES.map(([text, key, choice]) =>
    button(text, key, () => choose(choice), { class: before?.choice === choice ? "choice before" : "choice" }),
  );
  const answers = answersOf(cards, long, "side");
  return {
    body: make("div", {}, answers.element, criteria.length ? make("div", { class: "criteria" }, ...criteria.map((c) => c.element)) : null),
    choices: [
      make("div", { class: "row" }, ...choices),
      make("div", { class: "row strengths", role: "group", "aria-label": "How much better" }, make("span", {}, "better by how much:"), ...levels),
    ],
    buttons: [...choices, ...levels, answers.unfold],
    arrows: { ArrowLeft: choices[0], ArrowRight: choices[1] },
  };
}

function criterion(name, before) {
  const id = `criterion-${name}`;
  const radios = [
    ["a", "A"],
    ["tie", "Tie"],
    ["b", "B"],
  ].map(([value, text]) => {
    const radio = make("input", { type: "radio", name: id, value });
    radio.checked = before === value;
    return [radio, make("label", {}, radio, ` ${text}`)];
  });
  return {
    name,
    chosen: () => radios.find(([radio]) => radio.checked)?.[0].value,
    element: make("fieldset", {}, make("legend", {}, name), ...radios.map(([, label]) => label)),
  };
}
