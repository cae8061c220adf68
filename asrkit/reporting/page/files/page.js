"use strict";
// The report's list of utterances. Every text comes from somebody's files and is put in as text, never as markup.
const SETS = JSON.parse(document.getElementById("report-data").textContent);
const PAGE = 25; // cards shown at once
const SECOND = 220; // width of a second of spectrogram, in pixels
const byId = (id) => document.getElementById(id);

function make(tag, classes, text) {
  const element = document.createElement(tag);
  if (classes) element.className = classes;
  if (text !== undefined) element.textContent = text;
  return element;
}

// ---- tables that are sorted by pressing a heading ----

function sortTable(table, column, heading) {
  const value = (row) => row.cells[column].textContent.trim();
  const number = (text) => Number.parseFloat(text.replaceAll(",", ""));
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  const compared = (a, b) => {
    const [x, y] = [number(value(a)), number(value(b))];
    return Number.isNaN(x) || Number.isNaN(y) ? value(a).localeCompare(value(b)) : x - y;
  };
  rows.sort((a, b) => (down ? -1 : 1) * compared(a, b));
  table.tBodies[0].append(...rows);
}

for (const table of document.querySelectorAll("table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = make("button", "", heading.textContent);
    button.type = "button";
    button.addEventListener("click", () => sortTable(table, column, heading));
    heading.replaceChildren(button);
  });
}

// ---- links into what is folded ----

function unfold() {
  const target = location.hash && byId(decodeURIComponent(location.hash.slice(1)));
  if (target && target.tagName === "DETAILS") target.open = true;
}
addEventListener("hashchange", unfold);
unfold();

let folded = [];
addEventListener("beforeprint", () => {
  folded = [...document.querySelectorAll("details:not([open])")];
  for (const details of folded) details.open = true;
});
addEventListener("afterprint", () => folded.forEach((details) => (details.open = false)));

// ---- the words of several systems under those of the reference ----

// For each place of the reference (and, last, its end): what was put in before it, and what became of its word.
function places(ref, hyp) {
  const made = Array.from({ length: ref.length + 1 }, () => ({ before: [], word: null }));
  let at = 0;
  for (const one of hyp) {
    if (Array.isArray(one)) made[at].before.push(one[0]);
    else made[at++].word = one;
  }
  return made;
}

function words(row, shown) {
  const aligned = shown.map((index) => places(row.ref, row.hyps[index]));
  const table = make("table");
  const reference = table.insertRow();
  reference.append(make("th", "", "reference"));
  const lines = shown.map((index) => {
    const line = table.insertRow();
    const name = make("th", "", set().systems[index].label);
    name.title = name.textContent;
    line.append(name);
    return line;
  });
  const cell = (line, classes, text) => line.append(make("td", classes, text));
  for (let at = 0; at <= row.ref.length; at++) {
    const extra = Math.max(...aligned.map((one) => one[at].before.length));
    for (let number = 0; number < extra; number++) {
      cell(reference, "", "");
      aligned.forEach((one, line) => {
        const word = one[at].before[number];
        cell(lines[line], word === undefined ? "" : "ins", word === undefined ? "" : "+" + word);
      });
    }
    if (at === row.ref.length) break;
    cell(reference, "", row.ref[at]);
    aligned.forEach((one, line) => {
      const word = one[at].word;
      if (word === 1) cell(lines[line], "", row.ref[at]);
      else if (word === 0) cell(lines[line], "del", "–");
      else cell(lines[line], "sub", word);
    });
  }
  return table;
}

// ---- sound ----

let playing = null; // {audio, stop}

function play(row, button, card) {
  if (playing) {
    const same = playing.button === button;
    playing.stop();
    if (same) return;
  }
  const audio = new Audio(row.audio ? "data:audio/mpeg;base64," + row.audio : row.uri);
  const cursor = see(row, card);
  let timer = 0;
  const move = () => {
    if (cursor) cursor.style.left = (100 * audio.currentTime) / row.seconds + "%";
    timer = requestAnimationFrame(move);
  };
  const stop = (said) => {
    cancelAnimationFrame(timer);
    audio.pause();
    playing = null;
    button.textContent = "▶ Play";
    if (said) card.querySelector(".said-of-sound").textContent = said;
  };
  playing = { button, audio, stop };
  button.textContent = "■ Stop";
  audio.addEventListener("ended", () => stop());
  audio.addEventListener("pause", () => playing && playing.audio === audio && stop()); // the end of a stretch
  audio.addEventListener("error", () => stop("This browser cannot play " + (row.path || "the sound") + "."));
  audio.play().then(move, () => {});
}

// Show the spectrogram of a card, if there is one; returns what moves over it.
function see(row, card) {
  if (!row.picture) return null;
  const old = card.querySelector(".cursor");
  if (old) return old;
  const box = make("div", "see");
  const sound = make("div", "sound");
  sound.style.minWidth = Math.round(row.seconds * SECOND) + "px";
  const image = make("img");
  image.src = "data:image/png;base64," + row.picture;
  image.alt = "spectrogram, " + row.seconds + " seconds";
  const cursor = make("div", "cursor");
  sound.append(image);
  const track = (name, classes, items) => {
    sound.append(make("div", "track-name", name));
    const line = make("div", "track " + classes);
    items.forEach(([text, start, end], number) => {
      // Pieces come every 40 ms at most; every other one stands lower, so that both can be read.
      const mark = make("span", end === undefined && number % 2 ? "low" : "", text.replaceAll("▁", "·"));
      mark.title = text + ", " + start.toFixed(2) + " s";
      mark.style.left = (100 * start) / row.seconds + "%";
      if (end !== undefined) mark.style.width = (100 * (end - start)) / row.seconds + "%";
      line.append(mark);
    });
    sound.append(line);
  };
  if (row.said.length) track("said", "said", row.said);
  for (const index of shownSystems()) {
    if (row.emitted[index].length) track("emitted by " + set().systems[index].label, "", row.emitted[index]);
  }
  sound.append(cursor);
  box.append(sound);
  card.append(box);
  return cursor;
}

// ---- the list ----

let limit = PAGE;
const set = () => SETS[byId("set").value || 0];
const first = () => Number(byId("first").value);
const second = () => Number(byId("second").value);

function shownSystems() {
  const main = set().systems.flatMap((system, index) => (system.main ? [index] : []));
  const chosen = byId("all").checked ? main : [];
  return [...new Set([...chosen, second(), first()])].filter((index) => index >= 0).sort((a, b) => a - b);
}

const SORTS = {
  errors: (row) => -row.errors[first()],
  rate: (row) => -row.errors[first()] / Math.max(1, row.ref.length),
  worse: (row) => (second() < 0 ? 0 : row.errors[second()] - row.errors[first()]),
  better: (row) => (second() < 0 ? 0 : row.errors[first()] - row.errors[second()]),
  late: (row) => -(row.late && row.late[first()] !== null ? row.late[first()] : -1e9),
  long: (row) => -(row.seconds || row.ref.length),
  order: () => 0,
};

function texts(row) {
  const heard = row.hyps.flatMap((hyp) => hyp.flatMap((one) => (typeof one === "number" ? [] : one)));
  return [row.id, row.speaker, row.language, row.ref.join(" "), heard.join(" ")].join("\n").toLowerCase();
}

function matching() {
  const wanted = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const language = byId("languages").value;
  const rows = set().utterances.filter((row) => {
    if (language && row.language !== language) return false;
    if (byId("wrong").checked && !shownSystems().some((index) => row.errors[index])) return false;
    if (byId("audible").checked && !row.audio) return false;
    row.texts ??= texts(row);
    return wanted.every((word) => row.texts.includes(word));
  });
  const key = SORTS[byId("sort").value];
  return rows.map((row) => [key(row), row]).sort((a, b) => a[0] - b[0]).map(([, row]) => row);
}

function card(row) {
  const made = make("article", "card");
  const head = make("header");
  const errors = row.errors[first()];
  if (row.audio || row.uri) {
    const button = make("button", "play", "▶ Play");
    button.type = "button";
    button.setAttribute("aria-label", "play " + row.id);
    button.addEventListener("click", () => play(row, button, made));
    head.append(button);
  }
  if (row.picture) {
    const button = make("button", "", "Spectrogram");
    button.type = "button";
    button.addEventListener("click", () => {
      const open = made.querySelector(".see");
      if (open) open.remove();
      else see(row, made);
    });
    head.append(button);
  }
  head.append(make("span", "id", row.id));
  const facts = [errors + (errors === 1 ? " error in " : " errors in ") + row.ref.length + " words"];
  if (row.speaker) facts.push(row.speaker);
  if (row.language) facts.push(row.language);
  if (row.seconds) facts.push(row.seconds.toFixed(1) + " s");
  if (row.late && row.late[first()] !== null) facts.push("words known after " + row.late[first()] + " ms");
  head.append(make("span", "quiet", facts.join(" · ")));
  made.append(head);
  const lines = make("div", "lines");
  lines.append(words(row, shownSystems()));
  made.append(lines);
  const said = make("div", "said-of-sound quiet");
  if (!row.audio && row.path) said.textContent = row.path;
  made.append(said);
  return made;
}

function show() {
  if (playing) playing.stop();
  const rows = matching();
  byId("list").replaceChildren(...rows.slice(0, limit).map(card));
  const left = set().left_out ? "; " + set().left_out + " with fewer errors are not in this report" : "";
  byId("count").textContent =
    rows.length + " of " + set().utterances.length + " utterances, the first " + Math.min(limit, rows.length) + " shown" + left;
  byId("more").hidden = rows.length <= limit;
}

function options(select, entries) {
  select.replaceChildren(
    ...entries.map(([value, text]) => {
      const option = make("option", "", text);
      option.value = value;
      return option;
    }),
  );
}

function choose() {
  const systems = set().systems.map((system, index) => [index, system.label]);
  const main = set().systems.flatMap((system, index) => (system.main ? [index] : []));
  options(byId("first"), systems);
  options(byId("second"), [[-1, "none"], ...systems]);
  byId("first").value = main[main.length - 1];
  byId("second").value = main.length > 1 ? main[0] : -1;
  const languages = [...new Set(set().utterances.map((row) => row.language))].filter(Boolean).sort();
  options(byId("languages"), [["", "all"], ...languages.map((name) => [name, name])]);
  byId("languages-label").hidden = languages.length < 2;
  limit = PAGE;
  show();
}

if (SETS.length) {
  options(byId("set"), SETS.map((one, index) => [index, one.name]));
  byId("set").addEventListener("change", choose);
  for (const name of ["search", "sort", "first", "second", "languages", "all", "wrong", "audible"]) {
    byId(name).addEventListener("input", () => {
      limit = PAGE;
      show();
    });
  }
  byId("tools").addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", () => {
    limit += PAGE;
    show();
  });
  for (const button of document.querySelectorAll("button.word")) {
    button.addEventListener("click", () => {
      byId("search").value = button.dataset.search;
      show();
      byId("errors").scrollIntoView();
    });
  }
  choose();
}
