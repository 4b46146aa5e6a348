// Judging by ratings: a number from 1 to 5 for each answer and criterion.

import { button, make } from "./api.js";
import { answersOf, cardsOf, letters } from "./item.js";

export const KEYS = { "1 to 5": "rate, and go on to the next line", "↑ ↓": "the line before, the next line", Enter: "Next" };

/** The view of an item to rate. `done(value)` is called with the ratings; `before` are ones that were taken back. */
export function rating(study, item, before, done) {
  const names = study.criteria.length ? study.criteria : ["overall"];
  const lines = [];
  const { cards, long } = cardsOf(item, (place) => {
    const mine = names.map((name) => line(study.scale, place, item.answers.length, name, before?.ratings[place]?.[name], chosen));
    lines.push(...mine);
    return make("div", { class: "ratings" }, ...mine.map((one) => one.element));
  });
  const next = button("Next", null, submit, { class: "choice next" });
  const answers = answersOf(cards, long, "side");
  let active = 0;

  function chosen(one) {
    go(lines.indexOf(one) + 1);
  }
  function go(place) {
    active = Math.max(0, Math.min(place, lines.length - 1));
    lines.forEach((one, at) => one.element.classList.toggle("active", at === active));
    next.disabled = lines.some((one) => one.value() === null);
  }
  function submit() {
    const ratings = item.answers.map(() => ({}));
    for (const one of lines) ratings[one.place][one.name] = one.value();
    done({ ratings });
  }
  go(lines.findIndex((one) => one.value() === null));

  return {
    body: answers.element,
    choices: [make("div", { class: "row" }, next)],
    buttons: [answers.unfold],
    enter: next,
    key(event) {
      const number = Number(event.key);
      if (Number.isInteger(number) && number >= study.scale[0] && number <= study.scale[1]) {
        lines[active].set(number);
        lines[Math.min(active, lines.length - 1)].element.scrollIntoView({ block: "nearest" });
        return true;
      }
      if (event.key === "ArrowUp" || event.key === "ArrowDown") {
        go(active + (event.key === "ArrowUp" ? -1 : 1));
        lines[active].element.scrollIntoView({ block: "nearest" });
        return true;
      }
      return false;
    },
  };
}

function line(scale, place, count, name, before, chosen) {
  const [low, high] = scale;
  const radios = [];
  for (let number = low; number <= high; number++) {
    const radio = make("input", { type: "radio", name: `rating-${place}-${name}`, value: number });
    radio.checked = before === number;
    radio.addEventListener("change", () => chosen(one));
    radios.push(radio);
  }
  const hint = { [low]: "worst", [high]: "best" };
  const labels = radios.map((radio) => {
    const number = Number(radio.value);
    return make("label", {}, radio, make("span", {}, String(number)), hint[number] ? make("span", { class: "quiet" }, ` ${hint[number]}`) : null);
  });
  const title = `${name}, answer ${letters(count)[place]}`;
  const one = {
    place,
    name,
    element: make("fieldset", { "aria-label": title }, make("legend", {}, name), make("div", { class: "scale" }, ...labels)),
    value: () => Number(radios.find((radio) => radio.checked)?.value) || null,
    set(number) {
      radios[number - low].checked = true;
      chosen(one);
    },
  };
  return one;
}
