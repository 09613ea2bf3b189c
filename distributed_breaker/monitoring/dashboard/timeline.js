// The page of transitions across circuits. One lane a circuit, in the order in which they first
// opened: a failure that spreads is a staircase.

import { Changes, evidence, linkTo, stepOf, whoAndWhy } from "./changes.js";
import { h, mark, say } from "./dom.js";
import { isSame } from "./fleet.js";
import { causeOf, clock, plural, span } from "./words.js";

const RANGES = [300, 900, 3600, 21600, 86400, 604800]; // s
const RANGE_WORDS = ["5 minutes", "15 minutes", "1 hour", "6 hours", "1 day", "7 days"];
const STEPS = [15, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400];
const PIXELS = 800; // of a track; a lesser shift isn't seen
const LISTED = 200; // transitions
const CASCADE_GAP = 30000; // ms between two trips of one cascade at most
const CASCADE_SIZE = 3; // circuits

const opens = (transition) => transition.to === "open" && transition.from !== "half_open";

/** Runs of trips that followed each other closely, in at least three circuits; the newest first. */
function cascades(transitions) {
  const trips = transitions
    .filter(opens)
    .toSorted((a, b) => Date.parse(a.time) - Date.parse(b.time));
  const found = [];
  let run = [];
  const end = () => {
    const circuits = [...new Set(run.map((trip) => trip.circuit))];
    if (circuits.length >= CASCADE_SIZE)
      found.unshift({ start: Date.parse(run[0].time), end: Date.parse(run.at(-1).time), circuits });
    run = [];
  };
  for (const trip of trips) {
    if (run.length && Date.parse(trip.time) - Date.parse(run.at(-1).time) > CASCADE_GAP) end();
    run.push(trip);
  }
  end();
  return found;
}

/** The lanes between two times: of each circuit its transitions there, the oldest first, and the
 *  state in which it was before them. That a circuit was made is no news of it. */
function lanes(transitions, start) {
  const byCircuit = new Map();
  for (const transition of transitions) {
    if (transition.cause === "created") continue;
    if (!byCircuit.has(transition.circuit)) byCircuit.set(transition.circuit, []);
    byCircuit.get(transition.circuit).unshift(transition);
  }
  const found = [];
  for (const [circuit, all] of byCircuit) {
    const inside = all.filter((transition) => Date.parse(transition.time) >= start);
    if (!inside.length) continue;
    const first = inside.find(opens) ?? inside[0];
    found.push({
      circuit,
      transitions: inside,
      before: inside[0].from ?? "closed",
      first: Date.parse(first.time),
    });
  }
  return found.sort((a, b) => a.first - b.first || (a.circuit < b.circuit ? -1 : 1));
}

export class Timeline {
  #app;
  #range = 0; // s
  #start = 0;
  #end = 0;
  #tips = new WeakMap(); // element of a point → its transition
  #drawn = "";

  constructor(app) {
    this.#app = app;
    this.range = h(
      "select",
      {
        id: "range",
        "aria-label": "How far back",
        onchange: () => app.replace(`#/timeline?range=${this.range.value}`),
      },
      ...RANGES.map((value, i) => h("option", { value }, `last ${RANGE_WORDS[i]}`)),
    );
    this.news = h("div", { class: "cascades" });
    this.axis = h("div", { class: "axis", "aria-hidden": "true" });
    this.shades = h("div", { class: "shades", "aria-hidden": "true" });
    this.lanes = h("ol", { class: "lanes" });
    this.tip = h("div", { class: "tip", id: "tip", role: "tooltip", hidden: true });
    this.changes = new Changes({ across: true });
    this.empty = h("p", { class: "shown" });
    this.chart = h("div", { class: "chart" }, this.axis, this.shades, this.lanes, this.tip);
    this.list = h(
      "section",
      { class: "card wide" },
      h("h2", {}, "As a list"),
      h("div", { class: "scroll" }, this.changes.element),
    );
    this.element = h(
      "div",
      { class: "page timeline" },
      h(
        "header",
        { class: "title" },
        h("h1", {}, "Timeline"),
        h("span", { class: "aside" }, this.range),
      ),
      this.empty,
      this.news,
      this.chart,
      this.list,
    );
    for (const type of ["pointerover", "focusin"])
      this.lanes.addEventListener(type, (event) => this.#showTip(event.target.closest("a.at")));
    for (const type of ["pointerleave", "focusout"])
      this.lanes.addEventListener(type, () => this.#showTip(null));
    this.element.addEventListener(
      "keydown",
      (event) => event.key === "Escape" && this.#showTip(null),
    );
  }

  show({ params }) {
    const range = Number(params.get("range"));
    this.#range = RANGES.includes(range) ? range : 0;
    this.#drawn = "";
    this.update();
  }

  hide() {}

  update() {
    const { transitions } = this.#app.fleet;
    const key = `${transitions.length} ${transitions[0]?.circuit} ${transitions[0]?.time}`;
    if (key !== this.#drawn) {
      this.#drawn = key;
      this.changes.draw(transitions.slice(0, LISTED));
      this.#draw();
    }
  }

  /** The right edge is now: everything moves a little. */
  tick() {
    const moved = (this.#app.fleet.now() - this.#end) / (this.#end - this.#start);
    if (moved > 1 / PIXELS && this.tip.hidden) this.#draw();
  }

  // ------------------------------------------------------------------ lanes

  #draw() {
    const { fleet } = this.#app;
    this.#end = fleet.now();
    const range = this.#range || fitting(fleet.transitions, this.#end);
    this.range.value = range;
    this.#start = this.#end - range * 1000;
    const found = lanes(fleet.transitions, this.#start);
    this.chart.hidden = !found.length;
    this.list.hidden = !fleet.transitions.length;
    say(
      this.empty,
      found.length
        ? ""
        : fleet.known
          ? "No circuit has changed its state in this time."
          : "Waiting for the first data …",
    );
    this.empty.hidden = Boolean(found.length);
    this.#drawAxis(range);
    this.#drawCascades(cascades(fleet.transitions).filter(({ end }) => end >= this.#start));
    const focused = this.#tips.get(document.activeElement);
    this.lanes.replaceChildren(...found.map((lane) => this.#lane(lane)));
    if (!focused) return;
    const points = [...this.lanes.querySelectorAll(".at")];
    points.find((point) => isSame(this.#tips.get(point), focused))?.focus({ preventScroll: true });
  }

  #place(ms) {
    return Math.min(100, Math.max(0, (100 * (ms - this.#start)) / (this.#end - this.#start)));
  }

  #lane({ circuit, transitions, before }) {
    const track = h("span", { class: "track" });
    let from = this.#start;
    let state = before;
    const segment = (to) => {
      const piece = h("i", { class: "piece", "data-state": state });
      piece.style.left = `${this.#place(from)}%`;
      piece.style.width = `${this.#place(to) - this.#place(from)}%`;
      track.append(piece);
    };
    const points = [];
    for (const transition of transitions) {
      const at = Date.parse(transition.time);
      segment(at);
      from = at;
      state = transition.to;
      points.push(this.#point(transition, at));
    }
    segment(this.#end);
    track.append(...points);
    return h(
      "li",
      { class: "lane" },
      h("a", { class: "whose", href: linkTo(circuit), title: circuit }, circuit),
      track,
    );
  }

  #point(transition, at) {
    const words = `${clock(transition.time)} ${transition.circuit}: ${stepOf(transition)}, ${causeOf(transition.cause)}`;
    const point = h(
      "a",
      {
        class: "at",
        href: linkTo(transition.circuit),
        "aria-label": words,
        "aria-describedby": "tip",
      },
      mark(transition.to),
    );
    point.style.left = `${this.#place(at)}%`;
    this.#tips.set(point, transition);
    return point;
  }

  #drawAxis(range) {
    const step = (STEPS.find((candidate) => range / candidate <= 7) ?? STEPS.at(-1)) * 1000;
    const offset = new Date().getTimezoneOffset() * 60000;
    const ticks = [];
    for (
      let at = Math.ceil((this.#start - offset) / step) * step + offset;
      at < this.#end;
      at += step
    ) {
      const date = new Date(at);
      const text =
        step >= 86400000
          ? date.toLocaleDateString("en-GB", { day: "numeric", month: "short" })
          : date.toLocaleTimeString(
              "en-GB",
              step < 60000 ? {} : { hour: "2-digit", minute: "2-digit" },
            );
      const tick = h("span", { class: "tick" }, h("span", {}, text));
      tick.style.left = `${this.#place(at)}%`;
      ticks.push(tick);
    }
    this.axis.replaceChildren(...ticks);
  }

  #drawCascades(found) {
    this.shades.replaceChildren(
      ...found.map(({ start, end }) => {
        const shade = h("i", {});
        shade.style.left = `${this.#place(start)}%`;
        shade.style.width = `${Math.max(0.4, this.#place(end) - this.#place(start))}%`;
        return shade;
      }),
    );
    this.news.replaceChildren(
      ...found
        .slice(0, 3)
        .map(({ start, end, circuits }) =>
          h(
            "p",
            {},
            h("strong", {}, `Cascade at ${clock(new Date(start).toISOString())}: `),
            `${plural(circuits.length, "circuit")} opened within ${span(Math.ceil((end - start) / 1000))}. First `,
            h("a", { href: linkTo(circuits[0]) }, circuits[0]),
            ", then ",
            ...circuits
              .slice(1, 4)
              .flatMap((name, i) => [i ? ", " : "", h("a", { href: linkTo(name) }, name)]),
            circuits.length > 4 ? ` and ${circuits.length - 4} more.` : ".",
          ),
        ),
    );
  }

  // ------------------------------------------------------------------ words

  #showTip(point) {
    this.tip.hidden = !point;
    if (!point) return;
    const transition = this.#tips.get(point);
    const lines = [
      `${clock(transition.time)}: ${stepOf(transition)}`,
      causeOf(transition.cause),
      whoAndWhy(transition),
      evidence(transition),
    ];
    this.tip.replaceChildren(
      h("b", {}, transition.circuit),
      ...lines.filter(Boolean).map((line) => h("p", {}, line)),
    );
    const chart = this.chart.getBoundingClientRect();
    const box = point.getBoundingClientRect();
    const width = this.tip.offsetWidth;
    const left = Math.min(Math.max(0, box.left - chart.left - width / 2), chart.width - width);
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${box.bottom - chart.top + 4}px`;
  }
}

/** The least range that shows the last transitions together. */
function fitting(transitions, now) {
  const newest = transitions[0] ? (now - Date.parse(transitions[0].time)) / 1000 : 0;
  return RANGES.slice(1).find((range) => newest < range * 0.8) ?? RANGES.at(-1);
}
