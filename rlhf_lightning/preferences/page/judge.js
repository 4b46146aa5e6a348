// The flow of the page: who judges, the item, the judgement, feedback, the next item.

import { button, by, get, identity, make, newId, post, read, write } from "./api.js";
import { letter, promptOf } from "./item.js";
import { KEYS as PAIR_KEYS, pairs } from "./pairs.js";
import { KEYS as RANKING_KEYS, ranking } from "./ranking.js";
import { KEYS as RATING_KEYS, rating } from "./rating.js";

const TASKS = {
  pairs: { view: pairs, keys: PAIR_KEYS, title: "Which answer is better?" },
  ranking: { view: ranking, keys: RANKING_KEYS, title: "Rank the answers" },
  rating: { view: rating, keys: RATING_KEYS, title: "Rate the answers" },
};
const OTHER_KEYS = { s: "Skip", f: "Flag", c: "Comment", u: "Undo", e: "show all of long answers", "g": "Guidelines", "?": "these keys" };

const me = identity();
let study;
let view = null; // what is on the screen: its parts and keys
let item = null;
let busy = false;
let clock = { spent: 0, since: null }; // milliseconds in which the item was in view

start();

async function start() {
  study = await reached(() => get("/api/study"));
  prepare();
  const known = me.annotator && (!study.annotators || study.annotators.includes(me.annotator));
  if (known && (!study.token_needed || me.token)) return begin();
  if (study.token_needed) return message("This address lacks a token", "Open the address that you were sent.");
  askName();
}

/** Tries until the server answers. */
async function reached(ask) {
  for (;;) {
    try {
      const found = await ask();
      notice(null);
      return found;
    } catch (error) {
      if (!(error instanceof TypeError)) throw error;
      notice("The server cannot be reached. Trying again …");
      await new Promise((done) => setTimeout(done, 1500));
    }
  }
}

function prepare() {
  by("guide").hidden = !study.guidelines;
  by("guidelines").innerHTML = study.guidelines ?? ""; // made by the server, with all HTML of the file escaped
  by("guide").addEventListener("click", () => by("guide-dialog").showModal());
  by("help").addEventListener("click", () => by("help-dialog").showModal());
  by("skip").addEventListener("click", () => judge({ value: null, skip: true }));
  by("undo").addEventListener("click", undo);
  by("write").addEventListener("click", () => openComment(by("comment-row").hidden));
  by("flag").addEventListener("click", () => {
    by("reason").value = "";
    by("flag-dialog").showModal();
  });
  by("flag-dialog").addEventListener("close", () => {
    const reason = by("reason").value.trim();
    if (by("flag-dialog").returnValue === "flag" && reason) judge({ value: null, flag: reason });
    by("flag-dialog").returnValue = "";
  });
  for (const [key, what] of Object.entries({ ...TASKS[study.task].keys, ...OTHER_KEYS })) {
    by("keys").append(make("dt", {}, make("kbd", {}, key.length === 1 ? key.toUpperCase() : key)), make("dd", {}, what));
  }
  by("shortcuts").checked = localStorage.getItem("shortcuts") !== "off";
  by("shortcuts").addEventListener("change", () => localStorage.setItem("shortcuts", by("shortcuts").checked ? "on" : "off"));
  document.addEventListener("keydown", pressed);
  document.addEventListener("visibilitychange", tick);
}

function askName() {
  const names = study.annotators;
  const field = names
    ? make("select", { id: "name", required: true }, make("option", { value: "" }, "Choose …"), ...names.map((name) => make("option", {}, name)))
    : make("input", { id: "name", required: true, maxlength: 64, autocomplete: "username", pattern: ".*\\S.*" });
  const form = make("form", { class: "name" }, make("label", { for: "name" }, "Your name"), field, make("button", { class: "choice" }, "Begin"));
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    me.annotator = field.value.trim();
    write("identity", me);
    begin();
  });
  by("main").replaceChildren(make("h2", {}, "Who are you?"), form);
  field.focus();
}

async function begin() {
  by("who").textContent = me.annotator;
  const pending = read("pending"); // a judgement that was on its way when the page was closed
  try {
    if (pending?.body.annotator === me.annotator) await send(pending.path, pending.body);
    show(await reached(() => get(`/api/next?annotator=${encodeURIComponent(me.annotator)}`, me.token)));
  } catch (error) {
    return failed(error);
  }
  if (study.guidelines && !read("guided")) {
    write("guided", true);
    by("guide-dialog").showModal();
  }
}

/** Shows what the server asks next. */
function show(found, before = null, comment = null) {
  progress(found);
  by("undo").disabled = !found.undoable;
  by("comment").value = comment ?? "";
  openComment(Boolean(comment), false);
  item = found.item;
  by("actions").hidden = false;
  for (const id of ["skip", "flag", "write"]) by(id).hidden = item === null;
  if (item === null) return ended(found);
  const task = TASKS[study.task];
  view = task.view(study, item, before, (value) => judge({ value }), say);
  by("main").replaceChildren(promptOf(item), make("h2", {}, task.title), view.body);
  by("choices").replaceChildren(...view.choices);
  clock = { spent: 0, since: document.hidden ? null : performance.now() };
  window.scrollTo(0, 0);
  by("main").focus({ preventScroll: true });
}

function progress({ phase, progress: { done, quota, left } }) {
  by("phase").textContent = { calibration: "Calibration", judging: "Judge answers", waiting: "Waiting", done: "All done" }[phase];
  by("progress").hidden = false;
  by("bar").value = done + left ? done / (done + left) : 1;
  by("counts").textContent = quota === null ? `${done} done, about ${left} left` : `${done} of ${quota}`;
}

function ended({ phase, progress: { done } }) {
  view = null;
  by("choices").replaceChildren();
  if (phase === "waiting") {
    by("main").replaceChildren(make("section", { class: "end" }, make("h2", {}, "Others have the last items on their screens"), make("p", {}, "This page asks again every few seconds.")));
    setTimeout(async () => {
      if (view || busy || item) return; // an undo has brought an item back
      show(await reached(() => get(`/api/next?annotator=${encodeURIComponent(me.annotator)}`, me.token)));
    }, 10000);
    return;
  }
  by("main").replaceChildren(
    make("section", { class: "end" }, make("h2", {}, "All done, thank you"), make("p", {}, `You gave ${done} judgements. There is nothing left to judge for you now.`)),
  );
  say("All done, thank you");
}

/** Sends a judgement, and shows what follows. */
async function judge(what) {
  if (busy || item === null) return;
  tick();
  const comment = by("comment").value.trim() || null;
  const body = { client_id: newId(), annotator: me.annotator, ask: item.ask, comment, seconds: Math.round(clock.spent) / 1000, ...what };
  try {
    const found = await send("/api/judgements", body);
    say(what.value ? "Saved" : what.flag ? "Flagged" : "Skipped");
    if (found.feedback) feedback(found);
    else show(found.next);
  } catch (error) {
    failed(error);
  }
}

async function undo() {
  if (busy || by("undo").disabled) return;
  try {
    const found = await send("/api/undo", { client_id: newId(), annotator: me.annotator });
    show(found, found.value, found.comment);
    say("Undone: judge it again");
  } catch (error) {
    failed(error);
  }
}

/** One request at a time. What is under way is remembered, so that a reload does not lose it. */
async function send(path, body) {
  busy = true;
  document.body.classList.add("busy");
  write("pending", { path, body });
  try {
    const found = await post(path, body, me.token, (why) => notice(`Not saved yet: ${why}. Trying again …`));
    notice(null);
    return found;
  } finally {
    write("pending", null);
    busy = false;
    document.body.classList.remove("busy");
  }
}

/** After a calibration item: what the gold judgement is, and why. */
function feedback({ feedback: { right, gold, explanation }, next }) {
  const go = button("Continue", null, () => show(next), { class: "choice next" });
  view = { buttons: [], enter: go };
  item = null;
  for (const id of ["skip", "flag", "write"]) by(id).hidden = true;
  const box = make(
    "section",
    { class: `feedback ${right ? "right" : "wrong"}`, tabindex: "-1" },
    make("h2", {}, right ? "As expected" : "Not as expected"),
    make("p", {}, `The expected judgement: ${inWords(gold)}.`),
    explanation ? make("p", { class: "text", dir: "auto" }, explanation) : null,
  );
  by("main").prepend(box);
  by("choices").replaceChildren(make("div", { class: "row" }, go));
  window.scrollTo(0, 0);
  box.focus({ preventScroll: true });
  say(right ? "As expected" : "Not as expected");
}

function inWords(gold) {
  if (gold.choice) return { a: "A is better", b: "B is better", tie: "a tie", both_bad: "both are bad" }[gold.choice];
  if (gold.ranks) {
    const ranked = gold.ranks.map((rank, place) => [rank, letter(place)]).filter(([rank]) => rank !== null).sort(([a], [b]) => a - b);
    return ranked.map(([rank, name]) => `${name} at place ${rank}`).join(", ");
  }
  return gold.ratings.map((one, place) => `${letter(place)}: ${Object.entries(one).map(([name, value]) => `${name} ${value}`).join(", ")}`).join("; ");
}

function failed(error) {
  notice(error.status ? error.message : String(error));
  if (error.status === 409 || error.status === 400) {
    get(`/api/next?annotator=${encodeURIComponent(me.annotator)}`, me.token).then((found) => show(found), () => {});
  } else if (error.status === 401) message("The token does not fit", "Open the address that you were sent.");
}

function message(title, text) {
  by("main").replaceChildren(make("section", { class: "end" }, make("h2", {}, title), make("p", {}, text)));
  by("actions").hidden = true;
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !by("shortcuts").checked) return;
  if (document.querySelector("dialog[open]") || event.target.closest("input:not([type=radio]), textarea, select")) return;
  if (event.key === "Enter") {
    if (event.target.closest("button, summary, a") || !view?.enter || view.enter.disabled) return;
    event.preventDefault();
    return view.enter.click();
  }
  if (view?.key?.(event)) return event.preventDefault();
  const key = event.key.toLowerCase();
  const fixed = [...document.querySelectorAll("header [data-key], .others [data-key]")];
  const arrows = event.target.closest("input[type=radio]") ? {} : view?.arrows; // in a radio group, arrows choose there
  const pressedOne = arrows?.[event.key] ?? [...(view?.buttons ?? []), ...fixed].find((one) => one?.dataset.key === key);
  if (!pressedOne || pressedOne.disabled || pressedOne.hidden || !pressedOne.offsetParent) return;
  event.preventDefault();
  pressedOne.click();
}

function openComment(open, focus = true) {
  by("comment-row").hidden = !open;
  by("write").setAttribute("aria-expanded", String(open));
  if (open && focus) by("comment").focus();
}

/** Counts the time in which the item was in view. */
function tick() {
  const now = performance.now();
  if (clock.since !== null) clock.spent += now - clock.since;
  clock.since = document.hidden ? null : now;
}

function say(text) {
  by("said").textContent = text;
}

function notice(text) {
  by("notice").hidden = text === null;
  by("notice").textContent = text ?? "";
}
