// The lead's page: how far the study is, whether people agree, and who needs help.

import { by, get, identity, make } from "./api.js";

const EVERY = 5000; // milliseconds between two looks
const me = identity();
const LEVELS = { nominal: "as words", ordinal: "as an order", interval: "as numbers" };

look();

async function look() {
  try {
    show(await get("/api/lead", me.token));
    notice(null);
  } catch (error) {
    notice(error.status ? error.message : "The server cannot be reached. Trying again …");
    if (error.status === 401) return;
  }
  setTimeout(look, EVERY);
}

function show(found) {
  const { all, complete } = found.items;
  by("bar").value = all ? complete / all : 0;
  by("counts").textContent = `${complete} of ${all} items have all their judgements; ${found.judgements} judgements`;
  const focused = document.activeElement?.id;
  by("main").replaceChildren(
    section("Agreement", agreement(found.alpha)),
    section("Annotators", annotators(found.annotators)),
    section("Flags", flags(found.flags)),
  );
  if (focused) by(focused)?.focus();
}

function section(title, ...content) {
  return make("section", { "aria-label": title }, make("h2", {}, title), ...content);
}

function agreement(alpha) {
  const levels = Object.keys(LEVELS).filter((level) => alpha[level]);
  if (levels.every((level) => alpha[level].value === null)) {
    return make("p", {}, "Agreement shows when two people have judged the same items.");
  }
  const rows = levels.map((level) => [`Krippendorff's alpha, ${level} (${LEVELS[level]})`, number(alpha[level].value), String(alpha[level].items)]);
  return make("div", {}, table("agreement", ["measure", "value", "items"], rows), make("p", {}, meaning(alpha.nominal?.value ?? null)));
}

function meaning(value) {
  if (value === null) return "";
  if (value >= 0.8) return "People agree well: 1 would be always, 0 is what chance gives.";
  if (value >= 0.667) return "People agree enough for tentative conclusions: 1 would be always, 0 is what chance gives.";
  if (value >= 0.4) return "People disagree often. Look at flags and comments, sharpen the guideline, and calibrate again.";
  return "People agree little more than by chance, or less. Stop and sharpen the guideline before more is judged.";
}

function annotators(found) {
  const names = Object.keys(found);
  if (!names.length) return make("p", {}, "Nobody has judged yet.");
  const head = ["annotator", "judged", "skipped", "flagged", "seconds", "gold right", "same twice", "chose left"];
  const rows = names.map((name) => {
    const of = found[name];
    return [
      of.calibrated === false ? `${name} (in calibration)` : name,
      String(of.done), String(of.skipped), String(of.flagged),
      of.seconds == null ? "–" : of.seconds.toFixed(1),
      share(of.gold_accuracy), share(of.self_agreement), share(of.left_share),
    ];
  });
  const notes = names.flatMap((name) => advice(name, found[name])).map((text) => make("li", {}, text));
  return make("div", {}, table("annotators", head, rows), notes.length ? make("ul", {}, ...notes) : null);
}

function advice(name, of) {
  const found = [];
  if (of.gold_accuracy != null && of.gold_accuracy < 0.7) found.push(`${name} misses hidden gold items: talk about the guideline.`);
  if (of.self_agreement != null && of.self_agreement < 0.7) found.push(`${name} often judges the same pair otherwise when it is swapped.`);
  if (of.left_share != null && of.done >= 20 && Math.abs(of.left_share - 0.5) > 0.2) {
    found.push(`${name} prefers the ${of.left_share > 0.5 ? "left" : "right"} side.`);
  }
  return found;
}

function flags(found) {
  if (!found.length) return make("p", {}, "No item is flagged.");
  return table("flags", ["item", "annotator", "reason"], found.map(({ item, annotator, reason }) => [item, annotator, reason]));
}

function table(id, head, rows) {
  const cells = (row) => row.map((text, at) => make(at ? "td" : "th", at ? { dir: "auto" } : { scope: "row", dir: "auto" }, text));
  const body = make("tbody", {}, ...rows.map((row) => make("tr", {}, ...cells(row))));
  const header = make("thead", {}, make("tr", {}, ...head.map((text) => make("th", { scope: "col" }, text))));
  return make("div", { class: "scroll", id, tabindex: "0", role: "region", "aria-label": `Table: ${id}` }, make("table", {}, header, body));
}

function number(value) {
  return value === null ? "–" : value.toFixed(3);
}

function share(value) {
  return value == null ? "–" : `${Math.round(value * 100)}%`;
}

function notice(text) {
  by("notice").hidden = text === null;
  by("notice").textContent = text ?? "";
}
