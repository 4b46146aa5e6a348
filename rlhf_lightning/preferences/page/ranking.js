// Judging by a ranking: the best on top, by drag, buttons or keys; answers may tie or be left out.

import { button, make } from "./api.js";
import { answersOf, cardsOf, letters } from "./item.js";

export const KEYS = {
  "↑ ↓": "choose an answer",
  "Shift ↑ ↓": "move it up or down",
  "1 to 9": "give it this place",
  "=": "tie it with the one above, or end the tie",
  Delete: "leave it out",
  Enter: "Next",
};

/** The order of the answers: from the best, each perhaps tied with the one before; the rest is not ranked. */
export class Order {
  constructor(count, ranks) {
    this.count = count;
    const all = Array.from({ length: count }, (_, answer) => answer);
    const ranked = all.filter((answer) => ranks?.[answer] != null).sort((a, b) => ranks[a] - ranks[b]);
    this.ranked = ranked.map((answer, at) => ({ answer, tied: at > 0 && ranks[answer] === ranks[ranked[at - 1]] }));
  }

  at(answer) {
    return this.ranked.findIndex((entry) => entry.answer === answer);
  }

  /** Takes an answer out. Who was tied with it alone is tied with nobody. */
  remove(answer) {
    const at = this.at(answer);
    if (at < 0) return;
    const [gone] = this.ranked.splice(at, 1);
    if (!gone.tied && this.ranked[at]) this.ranked[at].tied = false;
  }

  /** Puts an answer before the one at this place, tied with nobody. */
  place(answer, at) {
    this.remove(answer);
    const to = Math.max(0, Math.min(at, this.ranked.length));
    if (this.ranked[to]) this.ranked[to].tied = false;
    this.ranked.splice(to, 0, { answer, tied: false });
  }

  move(answer, by) {
    const at = this.at(answer);
    this.place(answer, at < 0 ? this.ranked.length : at + by);
  }

  tie(answer) {
    const at = this.at(answer);
    if (at > 0) this.ranked[at].tied = !this.ranked[at].tied;
  }

  /** A rank for each answer, 1 for the best; null for those that are not ranked. */
  ranks() {
    const found = Array(this.count).fill(null);
    let rank = 0;
    for (const { answer, tied } of this.ranked) found[answer] = tied ? rank : ++rank;
    return found;
  }
}

/** The view of a ranking. `done(value)` is called with the ranks; `before` is a ranking that was taken back. */
export function ranking(study, item, before, done, say) {
  const names = letters(item.answers.length);
  const order = new Order(names.length, before?.ranks);
  const parts = [];
  const { cards, long } = cardsOf(item, (answer) => {
    const part = controls(names[answer], (act) => change(answer, act));
    parts.push(part);
    return part.element;
  });
  const divider = make("p", { class: "divider" }, "Not ranked: drag answers above this line, or press Add");
  const next = button("Next", null, () => done({ ranks: order.ranks() }), { class: "choice next" });
  const answers = answersOf(cards, long, "list");
  const list = cards[0].parentNode;
  let active = 0;

  const acts = {
    add: (answer) => order.place(answer, order.ranked.length),
    up: (answer) => order.move(answer, -1),
    down: (answer) => order.move(answer, 1),
    tie: (answer) => order.tie(answer),
    remove: (answer) => order.remove(answer),
  };
  function change(answer, act, ...more) {
    (acts[act] ?? act)(answer, ...more);
    active = answer;
    show();
    const rank = order.ranks()[answer];
    say(rank === null ? `Answer ${names[answer]} is not ranked` : `Answer ${names[answer]} is at place ${rank}`);
  }
  function show() {
    const focused = document.activeElement;
    const ranks = order.ranks();
    const rest = cards.map((_, answer) => answer).filter((answer) => ranks[answer] === null);
    list.replaceChildren(...order.ranked.map(({ answer }) => cards[answer]), divider, ...rest.map((answer) => cards[answer]));
    divider.hidden = rest.length === 0;
    cards.forEach((card, answer) => {
      const at = order.at(answer);
      parts[answer].show(ranks[answer], at, order.ranked.length, at > 0 && order.ranked[at].tied);
      card.classList.toggle("active", answer === active);
      card.classList.toggle("unranked", ranks[answer] === null);
    });
    next.disabled = order.ranked.length < 2;
    if (list.contains(focused)) focused.focus();
  }
  function step(by) {
    const shown = [...list.children].filter((child) => child !== divider);
    const at = shown.indexOf(cards[active]) + by;
    active = cards.indexOf(shown[Math.max(0, Math.min(at, shown.length - 1))]);
    show();
    cards[active].scrollIntoView({ block: "nearest" });
    say(`Answer ${names[active]}`);
  }
  cards.forEach((card, answer) => {
    card.addEventListener("focusin", () => {
      if (active !== answer) {
        active = answer;
        cards.forEach((other) => other.classList.toggle("active", other === card));
      }
    });
    draggable(card, parts[answer].handle, list, divider, (at) => change(answer, at === null ? "remove" : (a) => order.place(a, at)));
  });
  show();

  return {
    body: answers.element,
    choices: [make("div", { class: "row" }, next)],
    buttons: [answers.unfold],
    enter: next,
    key(event) {
      const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
      if (by && event.shiftKey) change(active, by < 0 ? "up" : "down");
      else if (by) step(by);
      else if (event.key === "=") change(active, "tie");
      else if (event.key === "Delete" || event.key === "Backspace") change(active, "remove");
      else if (/^[1-9]$/.test(event.key)) change(active, (answer) => order.place(answer, Number(event.key) - 1));
      else return false;
      cards[active].scrollIntoView({ block: "nearest" });
      return true;
    },
  };
}

function controls(name, act) {
  const handle = make("span", { class: "handle", "aria-hidden": "true", title: "Drag" }, "⠿");
  const place = make("strong", { class: "place" });
  const named = (text, what) => make("button", { type: "button", "aria-label": `${text} ${name}`, onclick: () => act(what) }, text);
  const [add, up, down, tie, remove] = [named("Add", "add"), named("Up", "up"), named("Down", "down"), named("Tie", "tie"), named("Remove", "remove")];
  return {
    handle,
    element: make("div", { class: "controls" }, handle, place, add, up, down, tie, remove),
    show(rank, at, count, tied) {
      place.textContent = rank === null ? "not ranked" : `place ${rank}`;
      add.hidden = rank !== null;
      for (const one of [up, down, tie, remove]) one.hidden = rank === null;
      up.disabled = at === 0;
      down.disabled = at === count - 1;
      tie.disabled = at === 0;
      tie.title = "Tie with the one above";
      tie.setAttribute("aria-pressed", String(tied));
    },
  };
}

/** Lets a card be dragged by its handle. `drop` gets the place among the ranked cards, or null below the divider. */
function draggable(card, handle, list, divider, drop) {
  handle.addEventListener("pointerdown", (start) => {
    start.preventDefault();
    handle.setPointerCapture(start.pointerId);
    card.classList.add("dragged");
    const where = (event) => {
      const shown = [...list.children].filter((child) => child !== card && !child.hidden);
      return shown.find((child) => event.clientY < child.getBoundingClientRect().top + child.offsetHeight / 2) ?? null;
    };
    const mark = (event) => {
      const before = where(event);
      for (const child of list.children) child.classList.toggle("target", child === before);
    };
    const end = (event) => {
      handle.removeEventListener("pointermove", mark);
      card.classList.remove("dragged");
      for (const child of list.children) child.classList.remove("target");
      if (event.type !== "pointerup") return;
      const before = where(event);
      const shown = [...list.children].filter((child) => child !== card);
      const at = before === null ? shown.length : shown.indexOf(before);
      const line = shown.indexOf(divider);
      drop(divider.hidden || at <= line ? at : null);
    };
    handle.addEventListener("pointermove", mark);
    handle.addEventListener("pointerup", end, { once: true });
    handle.addEventListener("pointercancel", end, { once: true });
  });
}
