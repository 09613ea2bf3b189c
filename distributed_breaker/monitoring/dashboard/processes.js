// The page of the fleet's processes: who follows, who decides alone, who is sick.

import { h, say } from "./dom.js";
import { clock, number, plural, span } from "./words.js";

const EVERY = 5000; // ms
const COLUMNS = [
  "Process",
  "Service",
  "Condition",
  "Mirror age",
  "Circuits",
  "Version",
  "Configuration",
  "Started",
  "Seen",
];

export class Processes {
  #app;
  #asked = 0;
  #shown = false;

  constructor(app) {
    this.#app = app;
    this.note = h("p", { class: "shown", role: "status" }, "Loading …");
    this.body = h("tbody");
    this.table = h(
      "div",
      { class: "scroll", hidden: true },
      h(
        "table",
        { class: "cards" },
        h("thead", {}, h("tr", {}, ...COLUMNS.map((name) => h("th", { scope: "col" }, name)))),
        this.body,
      ),
    );
    this.element = h(
      "div",
      { class: "page processes" },
      h("h1", {}, "Processes"),
      this.note,
      this.table,
    );
  }

  show() {
    this.#shown = true;
    this.#ask();
  }

  hide() {
    this.#shown = false;
  }

  update() {}

  tick() {
    if (Date.now() - this.#asked >= EVERY) this.#ask();
  }

  async #ask() {
    this.#asked = Date.now();
    try {
      const answer = await fetch("processes");
      if (!answer.ok) throw new Error(`The server answered ${answer.status}.`);
      const { processes } = await answer.json();
      if (this.#shown) this.#draw(processes);
    } catch (error) {
      // fetch says nothing that helps when nobody answers.
      say(this.note, error instanceof TypeError ? "The server can't be reached." : error.message);
    }
  }

  #draw(processes) {
    if (!this.#app.fleet.store.reachable) {
      // What was known stays; nobody can tell what is so now.
      say(this.note, "Redis can't be reached, so nothing new is known of the processes.");
      return;
    }
    const now = this.#app.fleet.now();
    const sick = processes.filter((process) => conditions(process).length);
    const rank = (process) => -conditions(process).length;
    processes.sort(
      (a, b) => rank(a) - rank(b) || (`${a.service}${a.id}` < `${b.service}${b.id}` ? -1 : 1),
    );
    const versions = new Set(processes.map((process) => process.version).filter(Boolean));
    const several =
      versions.size > 1
        ? ` ${versions.size} versions are running: ${[...versions].join(", ")}.`
        : "";
    const well = sick.length
      ? `${number(sick.length)} of them need a look.`
      : "All follow the fleet.";
    say(
      this.note,
      processes.length
        ? `${plural(processes.length, "process", "processes")}. ${well}${several}`
        : "No process has announced itself yet.",
    );
    this.table.hidden = !processes.length;
    this.body.replaceChildren(...processes.map((process) => row(process, now)));
  }
}

/** What is wrong with a process, in words. */
function conditions(process) {
  const found = [];
  if (process.degraded) found.push("decides alone");
  if (process.quarantined?.length) found.push(`in quarantine: ${process.quarantined.join(", ")}`);
  if (process.policy_mismatch?.length)
    found.push(`other policy: ${process.policy_mismatch.join(", ")}`);
  return found;
}

function row(process, now) {
  const ago = (iso) => (iso ? `${span((now - Date.parse(iso)) / 1000)} ago` : "–");
  const found = conditions(process);
  const condition = found.length
    ? found.map((words) => h("span", { class: "badge", "data-kind": "quarantine" }, words))
    : ["follows"];
  const cells = [
    h(
      "span",
      {},
      h("b", {}, `${process.host}:${process.pid}`),
      h("small", { class: "id" }, process.id),
      process.role && h("span", { class: "badge" }, process.role),
    ),
    process.service ?? "–",
    h("span", { class: "badges" }, ...condition),
    process.mirror_age == null ? "–" : `${process.mirror_age.toFixed(1)} s`,
    process.circuits == null ? "–" : number(Number(process.circuits.length ?? process.circuits)),
    [process.version, process.python && `Python ${process.python}`].filter(Boolean).join(", ") ||
      "–",
    process.config_version == null ? "–" : `version ${process.config_version}`,
    h(
      "time",
      { datetime: process.started_at, title: process.started_at },
      clock(process.started_at),
    ),
    ago(process.seen_at),
  ];
  return h(
    "tr",
    { class: found.length ? "sick" : "" },
    ...cells.map((cell, i) => h("td", { "data-label": COLUMNS[i] }, cell)),
  );
}
