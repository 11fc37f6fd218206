"use strict";
const study = JSON.parse(document.getElementById("study").textContent);
const byId = (id) => document.getElementById(id);
const views = { welcome: byId("welcome"), asking: byId("asking"), done: byId("done") };
const PAUSE = 250; // milliseconds after an answer in which a second press is taken for the same one

// What this browser keeps: who takes part, votes that the server has not got, and in a file everything.
const kept = {
  name: "dynfuse-study-" + study.study,
  works: true,
  read() {
    try { return JSON.parse(localStorage.getItem(this.name)) || {}; } catch { return {}; }
  },
  write(state) {
    try { localStorage.setItem(this.name, JSON.stringify(state)); this.works = true; } catch { this.works = false; }
  },
};
let state = kept.read();
const save = () => kept.write(state);

function notice(text) {
  byId("notice").textContent = text;
  byId("notice").hidden = !text;
}

// With a server: it draws the questions and keeps the votes; those that it has not got are sent again.
const served = {
  async begin(name) {
    const answer = await this.post("/begin", { participant: state.participant || null, name });
    state = { ...state, participant: answer.participant, name: answer.name, unsent: state.unsent || [] };
    save();
    for (const vote of state.unsent) {
      const question = answer.questions[vote.number];
      if (question) { question.answered = true; question.place = vote.place; }
    }
    this.send();
    return answer.questions;
  },
  vote(number, place, seconds) {
    state.unsent = [...state.unsent.filter((vote) => vote.number !== number), { number, place, seconds }];
    save();
    this.send();
  },
  async send() {
    if (this.sending) return;
    this.sending = true;
    clearTimeout(this.timer);
    try {
      while (state.unsent.length) {
        const vote = state.unsent[0];
        try {
          await this.post("/vote", { participant: state.participant, ...vote });
        } catch (error) {
          if (![400, 404].includes(error.status)) throw error; // a vote that the server will never take does not hold up the others
        }
        state.unsent = state.unsent.filter((other) => other !== vote);
        save();
      }
      notice("");
    } catch (error) {
      const keeps = kept.works ? "Your answers are kept in this browser and sent again." : "Please leave this page open: your answers are sent again.";
      notice(`${error.message} ${keeps}`);
      this.timer = setTimeout(() => this.send(), 3000);
    } finally {
      this.sending = false;
      sendingChanged();
    }
  },
  async post(path, body) {
    let answer;
    try {
      answer = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    } catch {
      throw new Error("The study's server cannot be reached.");
    }
    if (!answer.ok) throw Object.assign(new Error(await answer.text()), { status: answer.status });
    return answer.json();
  },
};

// Without one: the questions are in the page, drawn here, and the votes are saved as a file in the end.
const alone = {
  async begin(name) {
    if (!state.participant) {
      const asked = shuffled(study.questions).slice(0, study.count).map((question) => ({
        question: question.question,
        shown: shuffled(question.sets[Math.floor(chance() * question.sets.length)]),
      }));
      state = { participant: randomNumber(), name, began: now(), asked, votes: {} };
      save();
    }
    if (!kept.works) notice("This browser keeps nothing of this page: save your votes before you close it.");
    const known = new Map(study.questions.map((question) => [question.question, question]));
    return state.asked.map((asked, number) => {
      const question = known.get(asked.question) || { subject: [], style: [], pictures: {}, prompt: "" };
      const vote = state.votes[number];
      return {
        prompt: question.prompt,
        subject: question.subject.map((place) => study.references[place]),
        style: question.style.map((place) => study.references[place]),
        pictures: asked.shown.map((id) => question.pictures[id] || ""),
        answered: Boolean(vote),
        place: vote ? vote.place : null,
      };
    });
  },
  vote(number, place, seconds) {
    state.votes[number] = { place, seconds, at: now() };
    save();
  },
  download() {
    const votes = Object.entries(state.votes).map(([number, vote]) => ({
      ...state.asked[number], place: vote.place, at: vote.at, seconds: vote.seconds,
    }));
    const content = { study: study.study, question: study.question, participant: state.participant, name: state.name, began: state.began, asked: state.asked, votes };
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([JSON.stringify(content, null, 1)], { type: "application/json" }));
    link.download = `votes-${state.participant.slice(0, 6)}.json`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  },
};

const source = study.mode === "served" ? served : alone;
const chance = () => crypto.getRandomValues(new Uint32Array(1))[0] / 2 ** 32;
const randomNumber = () => [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
const now = () => new Date().toISOString().replace(/\.\d+Z$/, "Z");

function shuffled(list) {
  const mixed = [...list];
  for (let last = mixed.length - 1; last > 0; last--) {
    const other = Math.floor(chance() * (last + 1));
    [mixed[last], mixed[other]] = [mixed[other], mixed[last]];
  }
  return mixed;
}

let questions = [];
let number = 0;
let since = 0;
let quietUntil = 0;

function show(view) {
  for (const [name, element] of Object.entries(views)) element.hidden = name !== view;
  views[view].querySelector("h1").focus({ preventScroll: true });
  scrollTo(0, 0);
}

// shown: called when there is something to see, the picture or that there is none.
function picture(address, alternative, shown = () => {}) {
  const image = new Image();
  image.alt = alternative;
  image.draggable = false;
  image.addEventListener("load", () => {
    if (Math.max(image.naturalWidth, image.naturalHeight) <= 160) image.classList.add("tiny");
    const group = image.closest("#pictures");
    if (group && !group.style.getPropertyValue("--shape")) group.style.setProperty("--shape", image.naturalWidth / image.naturalHeight);
    shown();
  });
  image.addEventListener("error", () => {
    const text = document.createElement("p");
    text.className = "broken";
    text.textContent = `${alternative} cannot be loaded.`;
    image.replaceWith(text);
    shown();
  });
  image.src = address;
  return image;
}

function ask(place) {
  number = place;
  const question = questions[number];
  byId("where").textContent = `Question ${number + 1} of ${questions.length}`;
  const progress = views.asking.querySelector("progress");
  progress.max = questions.length;
  progress.value = questions.filter((other) => other.answered).length;
  for (const side of ["subject", "style"]) {
    const several = question[side].length > 1;
    const alternative = side === "subject" ? "The subject" : "The style";
    const row = byId("references").querySelector("." + side);
    row.replaceChildren(
      ...question[side].map((address, index) => picture(address, several ? `${alternative}, picture ${index + 1}` : alternative)),
    );
    row.scrollLeft = 0;
    if (several) row.tabIndex = 0; // the arrow keys scroll it
    else row.removeAttribute("tabindex");
  }
  byId("prompt").textContent = question.prompt ? `“${question.prompt}”` : "";
  byId("prompt").hidden = !question.prompt;
  byId("pictures").style.removeProperty("--shape");
  // All appear at once: what is there first would be looked at first.
  let missing = question.pictures.length;
  byId("pictures").setAttribute("aria-busy", "true");
  const appeared = () => {
    missing -= 1;
    if (missing || number !== place) return;
    byId("pictures").setAttribute("aria-busy", "false");
    since = performance.now();
  };
  byId("pictures").replaceChildren(...question.pictures.map((address, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.setAttribute("aria-pressed", String(question.answered && question.place === index));
    const label = document.createElement("span");
    label.className = "number";
    label.setAttribute("aria-hidden", "true");
    label.textContent = index + 1;
    button.append(picture(address, `Picture ${index + 1}`, appeared), label);
    button.addEventListener("click", () => answer(index));
    return button;
  }));
  byId("back").disabled = number === 0;
  byId("skip").firstChild.textContent = question.answered ? "Next " : "Skip ";
  show("asking");
  since = performance.now();
  const next = questions[number + 1];
  if (next) for (const address of [...next.subject, ...next.style, ...next.pictures]) new Image().src = address;
}

function answer(place) {
  const question = questions[number];
  const loading = byId("pictures").getAttribute("aria-busy") === "true";
  if (performance.now() < quietUntil || (place !== null && (loading || place >= question.pictures.length))) return;
  quietUntil = performance.now() + PAUSE;
  // Going on from a question that has its answer leaves it as it is.
  if (place !== null || !question.answered) {
    question.answered = true;
    question.place = place;
    source.vote(number, place, Math.round(performance.now() - since) / 1000);
  }
  forward();
}

function forward() {
  if (number + 1 < questions.length) ask(number + 1);
  else finish();
}

function back() {
  if (views.done.hidden && number > 0) ask(number - 1);
  else if (!views.done.hidden && questions.length) ask(questions.length - 1);
}

function finish() {
  const chosen = questions.filter((question) => question.answered && question.place !== null).length;
  const skipped = questions.length - chosen;
  const questionsAnswered = `You have answered ${chosen} question${chosen === 1 ? "" : "s"}`;
  views.done.querySelector(".summary").textContent = questionsAnswered + (skipped ? ` and skipped ${skipped}.` : ".");
  byId("download").hidden = study.mode === "served";
  sendingChanged();
  show("done");
}

function sendingChanged() {
  const text = study.mode === "file"
    ? "Save your votes as a file, and send it to whom you have this page from."
    : (state.unsent || []).length ? "Your last answers are being saved ..." : "All of them are saved. You may close this page.";
  views.done.querySelector(".sending").textContent = text;
}

function welcome() {
  const known = Boolean(state.participant);
  views.welcome.querySelector(".count").textContent = study.count;
  views.welcome.querySelector("button.main").textContent = known ? "Go on" : "Begin";
  byId("another").hidden = !known;
  byId("so-far").hidden = !known || study.mode === "served";
  byId("name").value = state.name || "";
  byId("name").disabled = known;
  show("welcome");
}

async function begin() {
  notice("");
  try {
    questions = await source.begin(byId("name").value);
  } catch (error) {
    notice(`${error.message} Please try again.`);
    return;
  }
  const first = questions.findIndex((question) => !question.answered);
  if (first < 0) finish();
  else ask(first);
}

function larger() {
  const pressed = document.body.classList.toggle("larger");
  byId("larger").setAttribute("aria-pressed", String(pressed));
}

byId("start").addEventListener("submit", (event) => { event.preventDefault(); begin(); });
byId("another").addEventListener("click", () => {
  const unsaved = study.mode === "file" ? Object.keys(state.votes || {}).length : (state.unsent || []).length;
  const warning = study.mode === "file" ? "Have they been saved as a file?" : "The server has not got all of them.";
  if (unsaved && !confirm(`The votes in this browser are removed. ${warning}`)) return;
  state = {};
  save();
  welcome();
});
byId("back").addEventListener("click", back);
byId("again").addEventListener("click", back);
byId("skip").addEventListener("click", () => answer(null));
byId("larger").addEventListener("click", larger);
for (const id of ["download", "so-far"]) byId(id).addEventListener("click", () => alone.download());
addEventListener("online", () => study.mode === "served" && state.unsent && served.send());

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat || !views.welcome.hidden) return;
  if (event.key.startsWith("Arrow") && event.target.closest("#references")) return;
  const key = event.key.toLowerCase();
  if (["arrowleft", "backspace", "u"].includes(key)) back();
  else if (views.asking.hidden) return;
  else if (/^[1-4]$/.test(key)) answer(Number(key) - 1);
  else if (key === "s" || key === "arrowright") answer(null);
  else if (key === " " && !(event.target instanceof HTMLButtonElement)) larger();
  else return;
  event.preventDefault();
});

welcome();
