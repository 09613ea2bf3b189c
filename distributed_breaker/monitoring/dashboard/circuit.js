// The page of one circuit: why it is so, what comes next, and what was.

import { Changes } from "./changes.js";
import { h, mark, say, setMark } from "./dom.js";
import { countdown, drawBadges, drawSpark, spark } from "./tile.js";
import {
  STATE_WORDS,
  clock,
  duration,
  evidenceOf,
  explain,
  number,
  share,
  shownState,
  sourceOf,
  span,
} from "./words.js";

const AGAIN = 2000; // ms between two requests at least, however often the circuit changes
const SHARES = ["failure_rate", "slow_call_rate", "jitter"];
const SECONDS = [
  "window",
  "slow_call_duration",
  "open_interval",
  "open_interval_max",
  "permit_lease",
];

export class CircuitPage {
  element = h("article", { class: "page circuit" });
  #app;
  #name = "";
  #said = null; // the server's answer
  #away = false; // the store was, when the server answered
  #parts = null;
  #asked = 0;
  #timer = 0;

  constructor(app) {
    this.#app = app;
  }

  show({ name }) {
    if (name === this.#name && this.#said) return;
    this.#name = name;
    this.#said = null;
    this.#parts = null;
    this.element.replaceChildren(
      this.#back(),
      h("h1", {}, name),
      h("p", { class: "shown" }, "Loading …"),
    );
    this.#ask();
  }

  hide() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#name = "";
  }

  update({ changed }) {
    if (!changed.has(this.#name)) return;
    this.#drawTile();
    if (this.#timer) return;
    this.#timer = setTimeout(() => this.#ask(), Math.max(0, this.#asked + AGAIN - Date.now()));
  }

  tick(now) {
    const tile = this.#app.fleet.tiles.get(this.#name);
    if (!this.#parts || !tile) return;
    const { text, left } = countdown(tile, now);
    say(this.#parts.next, text);
    this.#parts.bar.style.transform = `scaleX(${left.toFixed(4)})`;
    say(this.#parts.since, tile.since ? `for ${span((now - Date.parse(tile.since)) / 1000)}` : "");
    this.#explain(now);
  }

  async #ask() {
    clearTimeout(this.#timer);
    this.#timer = 0;
    this.#asked = Date.now();
    const name = this.#name;
    let problem = "";
    try {
      const answer = await fetch(`circuits/${encodeURIComponent(name)}`);
      const said = await answer.json();
      if (name !== this.#name) return;
      if (answer.ok) this.#take(said);
      else problem = said.error ?? `The server answered ${answer.status}.`;
    } catch {
      if (name !== this.#name) return;
      problem = "The server can't be reached.";
    }
    if (this.#said) this.#draw();
    else
      this.element.replaceChildren(
        this.#back(),
        h("h1", {}, name),
        h("p", { class: "banner bad" }, problem),
      );
  }

  /** While the store is away nobody knows the fleet's counts and log: those from before stay. */
  #take(said) {
    const { store, transitions } = this.#app.fleet;
    this.#away = !store.reachable;
    if (!this.#away) this.#said = said;
    else {
      const seen = transitions.filter((transition) => transition.circuit === said.name);
      this.#said = { history: seen, ...this.#said, health: said.health, policy: said.policy };
      this.#said.metrics ??= said.metrics;
    }
  }

  // ------------------------------------------------------------------ the parts

  #back() {
    return h("a", { class: "back", href: "#/" }, "← All circuits");
  }

  #frame() {
    const parts = {
      mark: mark("closed"),
      state: h("strong", { class: "state" }),
      since: h("span", { class: "since" }),
      next: h("span", { class: "next" }),
      bar: h("i", {}),
      badges: h("span", { class: "badges" }),
      why: h("div", { class: "why" }),
      facts: h("dl", { class: "terms" }),
      traffic: h("h2"),
      spark: spark(),
      figures: h("dl", { class: "numbers" }),
      details: h("div", { class: "details" }),
      act: h(
        "button",
        { type: "button", onclick: () => this.#app.act({ circuit: this.#name }) },
        "Actions…",
      ),
    };
    this.element.replaceChildren(
      this.#back(),
      h(
        "header",
        { class: "title" },
        parts.mark,
        h("h1", {}, this.#name),
        h("span", { class: "act aside" }, parts.act),
      ),
      h("p", { class: "now" }, parts.state, parts.since, parts.badges, parts.next),
      h("span", { class: "until" }, parts.bar),
      h(
        "div",
        { class: "pair" },
        h("section", { class: "card" }, h("h2", {}, "What is going on"), parts.why),
        h("section", { class: "card" }, h("h2", {}, "Now"), parts.facts),
      ),
      h("section", { class: "card wide" }, parts.traffic, parts.spark, parts.figures),
      parts.details,
    );
    return parts;
  }

  #draw() {
    this.#parts ??= this.#frame();
    const { metrics } = this.#said;
    const numbers = [
      ["Calls", number(metrics.total_requests)],
      ["Failed", `${number(metrics.failed_requests)} (${share(metrics.failure_rate)})`],
      ["Refused", number(metrics.rejected_requests)],
      ["Slow", number(metrics.slow_requests)],
      ["By fallbacks", number(metrics.fallback_requests)],
      ["Trips", number(metrics.trips)],
      ["Probes", number(metrics.probes)],
      ["Mean", duration(metrics.average_response_time)],
      ["p50", duration(metrics.p50_response_time)],
      ["p95", duration(metrics.p95_response_time)],
      ["p99", duration(metrics.p99_response_time)],
      ["Last success", clock(metrics.last_success_time)],
      ["Last failure", clock(metrics.last_failure_time)],
      ["Late results", number(metrics.late_requests)],
      ["Outcomes dropped", number(metrics.dropped_requests)],
    ];
    say(this.#parts.traffic, `Traffic${this.#before()}`);
    this.#parts.figures.replaceChildren(...terms(numbers));
    this.#parts.facts.replaceChildren(...terms(this.#facts()));
    this.#parts.details.replaceChildren(this.#history(), this.#reporters(), this.#policy());
    this.#drawTile();
  }

  #drawTile() {
    const tile = this.#app.fleet.tiles.get(this.#name) ?? this.#said?.health;
    if (!this.#parts || !tile) return;
    const state = shownState(tile);
    setMark(this.#parts.mark, state);
    this.element.dataset.state = state;
    say(this.#parts.state, STATE_WORDS[state]);
    drawBadges(this.#parts.badges, tile);
    drawSpark(this.#parts.spark, tile.spark, tile.spark_bad);
    this.tick(this.#app.fleet.now());
  }

  /** Only what changes is written, so that a selection and a screen reader's place stay. */
  #explain(now) {
    if (!this.#said) return;
    const lines = explain(this.#said, now);
    const { why } = this.#parts;
    while (why.childElementCount > lines.length) why.lastElementChild.remove();
    while (why.childElementCount < lines.length) why.append(h("p"));
    lines.forEach((line, i) => say(why.children[i], line));
  }

  #facts() {
    const { health } = this.#said;
    const { probes, window } = health;
    return [
      [
        "Decided by",
        {
          shadow: "this process's shadow",
          quarantine: "this process's quarantine",
          override: "an operator",
        }[sourceOf(health)] ?? "the fleet",
      ],
      ["The fleet's state", STATE_WORDS[health.shared_state] ?? "not known"],
      ["Permits out", number(probes.out)],
      ["Probes succeeded", `${number(probes.successes)} of ${probes.needed ?? "?"}`],
      ["Failed recoveries", number(health.attempt ?? 0)],
      ["Bad outcomes in a row", number(health.run)],
      ["In the window", evidenceOf(window) || "no call"],
      ["Processes that report", number(health.reporters.length)],
      health.mirror_age != null && ["Age of the mirror", `${health.mirror_age.toFixed(1)} s`],
    ].filter(Boolean);
  }

  #history() {
    const { history } = this.#said;
    const table = new Changes({ across: false });
    table.draw(history);
    const content = history.length
      ? h("div", { class: "scroll" }, table.element)
      : h("p", { class: "empty" }, this.#away ? "Not known." : "It has never changed its state.");
    return h("section", { class: "card wide" }, h("h2", {}, `History${this.#before()}`), content);
  }

  #before() {
    return this.#away ? ", as it was known before Redis went away" : "";
  }

  #reporters() {
    const { reporters } = this.#said.health;
    const rows = reporters.map((reporter) =>
      h(
        "tr",
        {},
        h("td", { class: "id" }, reporter.id),
        h("td", { class: "num" }, number(reporter.bad)),
        h("td", { class: "num" }, number(reporter.run)),
        h("td", {}, clock(reporter.last)),
      ),
    );
    const table = h(
      "table",
      {},
      h(
        "thead",
        {},
        h(
          "tr",
          {},
          ...["Process", "Bad", "In a row", "Last heard"].map((name, i) =>
            h("th", { scope: "col", class: i === 1 || i === 2 ? "num" : "" }, name),
          ),
        ),
      ),
      h("tbody", {}, ...rows),
    );
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Who reports"),
      rows.length
        ? h("div", { class: "scroll" }, table)
        : h("p", { class: "empty" }, "No process has reported lately."),
    );
  }

  #policy() {
    const { health, policy } = this.#said;
    const pairs = Object.entries(policy ?? {}).filter(
      ([, value]) => value != null && typeof value !== "object",
    );
    const rows = pairs.map(([name, value]) => [name.replaceAll("_", " "), numberOf(name, value)]);
    const differs =
      health.policy_mismatch &&
      h(
        "p",
        { class: "banner warn" },
        "Processes offer different policies for this circuit. These numbers hold; breakers doctor says which differ.",
      );
    return h(
      "section",
      { class: "card" },
      h("h2", {}, "Policy"),
      differs,
      rows.length
        ? h("dl", { class: "terms" }, ...terms(rows))
        : h("p", { class: "empty" }, "None is known."),
    );
  }
}

const terms = (pairs) =>
  pairs.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));

/** A number of the policy with its unit. */
function numberOf(name, value) {
  if (SHARES.includes(name)) return share(value);
  return SECONDS.includes(name) ? `${value} s` : String(value);
}
