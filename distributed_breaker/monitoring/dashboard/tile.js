// One circuit as a tile: what is wrong, since when, what comes next, and how its calls have gone.

import { linkTo } from "./changes.js";
import { h, mark, s, say, setMark } from "./dom.js";
import {
  STATE_WORDS,
  causeOf,
  duration,
  plural,
  rate,
  saidOf,
  share,
  shownState,
  sourceOf,
  span,
} from "./words.js";

const SAMPLES = 60;
const NEW = 3000; // ms for which a state is news

export class Tile {
  #parts;
  #tile;

  constructor(tile) {
    this.#tile = tile;
    this.link = h("a", { class: "tile", href: linkTo(tile.name) });
    this.link.addEventListener("animationend", () => this.link.classList.remove("changed"));
    this.element = h("li", {}, this.link);
    this.#parts = this.#fill();
  }

  /** Show what is known now; `last` is its last transition, if that is known. */
  draw(tile, now, last) {
    this.#tile = tile;
    const parts = this.#parts;
    const state = shownState(tile);
    const isNew = tile.since && now - Date.parse(tile.since) < NEW;
    if (isNew && this.link.dataset.state !== state) this.link.classList.add("changed");
    this.link.dataset.state = state;
    setMark(parts.mark, state);
    say(parts.state, STATE_WORDS[state]);
    const { text, title } = noteOf(tile, last);
    say(parts.note, text);
    if (parts.note.title !== title) parts.note.title = title;
    drawBadges(parts.badges, tile);
    drawSpark(parts.spark, tile.spark, tile.spark_bad);
    const open = state === "open" || state === "forced_open";
    say(parts.rateLabel, open ? "refused/s" : "calls/s");
    say(parts.rate, rate(open ? tile.rejected_rate : tile.rate));
    say(parts.bad, share(tile.calls ? tile.failure_rate : null));
    parts.bad.classList.toggle("hot", tile.calls > 0 && tile.failure_rate >= 0.1);
    for (const quantile of ["p50", "p95", "p99"]) say(parts[quantile], duration(tile[quantile]));
    this.tick(now);
  }

  /** Let its clocks go on. */
  tick(now) {
    const { since, next, bar } = this.#parts;
    const tile = this.#tile;
    const never = tile.total_requests === 0 && tile.state === "closed";
    say(
      since,
      never ? "never called" : tile.since ? span((now - Date.parse(tile.since)) / 1000) : "",
    );
    const { text, left } = countdown(tile, now);
    say(next, text);
    bar.style.transform = `scaleX(${left.toFixed(4)})`;
  }

  #fill() {
    const parts = {
      mark: mark(shownState(this.#tile)),
      badges: h("span", { class: "badges" }),
      state: h("span", { class: "state" }),
      since: h("span", { class: "since" }),
      next: h("span", { class: "next" }),
      note: h("span", { class: "note" }),
      spark: spark(),
      bar: h("i", {}),
      rateLabel: h("small", {}, "calls/s"),
    };
    const figure = (name, label) =>
      h("span", {}, label, (parts[name] = h("span", { class: "figure" })));
    const small = (text) => h("small", {}, text);
    this.link.append(
      parts.mark,
      h("b", { class: "name" }, ...nameOf(this.#tile)),
      parts.badges,
      h("span", { class: "line" }, parts.state, parts.since, parts.next),
      parts.note,
      parts.spark,
      h(
        "span",
        { class: "figures" },
        figure("rate", parts.rateLabel),
        figure("bad", small("failing")),
        figure("p50", small("p50")),
        figure("p95", small("p95")),
        figure("p99", small("p99")),
      ),
      h("span", { class: "until" }, parts.bar),
    );
    return parts;
  }
}

/** The name; its service is a part of its own, since below a service's heading it isn't shown. */
function nameOf({ name, service }) {
  const prefix = `${service}.`;
  if (!name.startsWith(prefix) || name.length === prefix.length) return [h("span", {}, name)];
  return [h("span", { class: "of-service" }, prefix), h("span", {}, name.slice(prefix.length))];
}

/** Why it is so, in a few words. */
function noteOf(tile, last) {
  const state = shownState(tile);
  const said = last?.to === tile.state ? saidOf(last.detail) : "";
  const title = [causeOf(tile.cause), said].filter(Boolean).join(": ");
  if (state === "half_open") {
    const { successes, needed, out } = tile.probes;
    return { text: `${successes} of ${needed ?? "?"} probes succeeded, ${out} out`, title };
  }
  if (state === "closed" || state === "disabled") {
    if (tile.suspects?.length)
      return {
        text: `only ${plural(tile.suspects.length, "process", "processes")} sees failures`,
        title,
      };
    return { text: "", title: "" };
  }
  return { text: said || causeOf(tile.cause), title };
}

/** The words of the time that is left, and which share of the whole it is. */
export function countdown(tile, now) {
  const state = shownState(tile);
  const end = state.startsWith("forced")
    ? tile.ends_at
    : state === "open"
      ? tile.next_attempt_time
      : null;
  if (!end) return { text: state === "open" ? "until reset" : "", left: 0 };
  const left = (Date.parse(end) - now) / 1000;
  const whole = (Date.parse(end) - Date.parse(tile.since ?? end)) / 1000;
  if (left <= 0) return { text: state === "open" ? "probe due" : "ending", left: 0 };
  const text = span(Math.ceil(left));
  return {
    text: state === "open" ? `probe in ${text}` : `${text} left`,
    left: whole > 0 ? Math.min(1, left / whole) : 0,
  };
}

const BADGES = {
  shadow: ["shadow", "The store can't be asked: this process's own shadow breaker decides."],
  quarantine: [
    "quarantine",
    "The fleet's circuit is closed, but this process alone sees failures.",
  ],
  override: ["override", "An operator has decided."],
  mismatch: ["policy differs", "Processes offer different policies for this circuit."],
};

/** What is to be said of a circuit beside its state. */
export function drawBadges(element, tile) {
  const kinds = [sourceOf(tile), tile.policy_mismatch && "mismatch"].filter(Boolean);
  const key = kinds.join();
  if (element.dataset.key === key) return;
  element.dataset.key = key;
  element.replaceChildren(
    ...kinds.map((kind) =>
      h("span", { class: "badge", "data-kind": kind, title: BADGES[kind][1] }, BADGES[kind][0]),
    ),
  );
}

/** An empty sparkline: calls as columns, what was bad of them in red at their foot. */
export function spark() {
  return s(
    "svg",
    {
      class: "spark",
      viewBox: `0 0 ${SAMPLES} 20`,
      preserveAspectRatio: "none",
      "aria-hidden": "true",
    },
    s("path", { class: "all" }),
    s("path", { class: "bad" }),
  );
}

export function drawSpark(svg, calls = [], bad = []) {
  const most = Math.max(...calls, 1e-9);
  const start = SAMPLES - calls.length;
  let all = "";
  let red = "";
  calls.forEach((value, i) => {
    const share = bad[i] ?? 0;
    // A sample in which everything was refused has no calls, and is to be seen nevertheless.
    const height = Math.max((value / most) * 19, value > 0 ? 1 : 0, share > 0 ? 2.5 : 0);
    const x = start + i + 0.5;
    if (height > 0) all += `M${x} 20v-${height.toFixed(1)}`;
    if (share > 0) red += `M${x} 20v-${Math.max(height * share, 1.5).toFixed(1)}`;
  });
  svg.firstChild.setAttribute("d", all);
  svg.lastChild.setAttribute("d", red);
}
