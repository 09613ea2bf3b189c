// Transitions as a table; on a phone each row is a card.

import { arrange, h, mark } from "./dom.js";
import { STATE_WORDS, causeOf, clock, evidenceOf, reporterOf, saidOf } from "./words.js";

/** Who and why: what its maker said, and which process saw it. */
export const whoAndWhy = ({ detail }) =>
  [saidOf(detail), reporterOf(detail)].filter(Boolean).join(" — ");
export const evidence = ({ window, run, reporters }) => evidenceOf(window, run, reporters);
export const linkTo = (name) => `#/circuit/${encodeURIComponent(name)}`;
export const stepOf = ({ from, to }) => `${STATE_WORDS[from] ?? "new"} → ${STATE_WORDS[to] ?? to}`;

const COLUMNS = {
  When: (t) => h("time", { datetime: t.time, title: t.time }, clock(t.time)),
  Circuit: (t) => h("a", { href: linkTo(t.circuit) }, t.circuit),
  Change: (t) => h("span", { class: "change" }, mark(t.to), h("span", {}, stepOf(t))),
  Cause: (t) => causeOf(t.cause),
  "Who and why": whoAndWhy,
  Evidence: evidence,
};

/** A table of transitions across circuits, or of one whose name need not be said in each row. */
export class Changes {
  #columns;
  #rows = new WeakMap();
  #body = h("tbody");

  constructor({ across }) {
    this.#columns = Object.entries(COLUMNS).filter(([name]) => across || name !== "Circuit");
    const heads = this.#columns.map(([name]) => h("th", { scope: "col" }, name));
    this.element = h(
      "table",
      { class: "cards changes" },
      h("thead", {}, h("tr", {}, ...heads)),
      this.#body,
    );
  }

  draw(transitions) {
    arrange(
      this.#body,
      transitions.map((transition) => this.#row(transition)),
    );
  }

  #row(transition) {
    if (!this.#rows.has(transition)) {
      const cells = this.#columns.map(([name, content]) =>
        h("td", { "data-label": name }, content(transition)),
      );
      this.#rows.set(transition, h("tr", {}, ...cells));
    }
    return this.#rows.get(transition);
  }
}
