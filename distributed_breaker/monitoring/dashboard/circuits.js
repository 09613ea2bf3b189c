// The page of all circuits: headline, filters, and the tiles: first those to look at, then by service.

import { linkTo } from "./changes.js";
import { arrange, h, mark, say } from "./dom.js";
import { Grid, measured } from "./grid.js";
import { KINDS, MARKS, counted, headline, kindsOf } from "./summary.js";
import { STATES, STATE_WORDS, number, plural, rate } from "./words.js";

const FEW = 300; // circuits that may all be in the page, where the browser's own search finds them
const NAMED = 4; // circuits of the headline that are named below it
const WELL = 7; // the least rank that needs nobody's attention
const ATTENTION = "\0"; // sorts before every service, and is none

export class Circuits {
  element;
  #app;
  #filter = { service: "", kinds: new Set(), words: [], sort: "worst" };
  #groups = new Map(); // service → its section, grid and summary
  #count = 0; // circuits that pass the filter
  #placing = false;
  #chips = new Map();

  constructor(app) {
    this.#app = app;
    this.headline = h("h1", { id: "headline" });
    this.subline = h("p", { class: "subline" });
    this.bar = h(
      "div",
      { class: "share", "aria-hidden": "true" },
      ...STATES.map((state) => h("i", { "data-state": state })),
    );
    this.groups = h("div", { class: "groups" });
    this.shown = h("p", { class: "shown", role: "status" });
    this.element = h(
      "div",
      { class: "page circuits" },
      h(
        "section",
        { class: "summary", "aria-labelledby": "headline" },
        this.headline,
        this.subline,
        this.bar,
      ),
      this.#toolbar(),
      this.shown,
      this.groups,
    );
    for (const type of ["scroll", "resize"])
      addEventListener(type, () => this.#placeSoon(), { passive: true });
  }

  // ------------------------------------------------------------------ filters

  #toolbar() {
    const change = () => this.#changeFilter();
    this.search = h("input", {
      type: "search",
      id: "search",
      placeholder: "Find a circuit  ( / )",
      "aria-label": "Find a circuit by its name or cause",
      oninput: change,
    });
    this.service = h("select", { id: "service", "aria-label": "Service", onchange: change });
    this.sort = h(
      "select",
      { id: "sort", "aria-label": "Order", onchange: change },
      h("option", { value: "worst" }, "Worst first"),
      h("option", { value: "name" }, "By name"),
    );
    for (const kind of KINDS) {
      const count = h("span", { class: "count" });
      const chip = h(
        "button",
        {
          type: "button",
          class: "chip",
          "aria-pressed": "false",
          "data-kind": kind,
          onclick: () => this.#toggle(kind),
        },
        STATES.includes(kind) && mark(kind),
        h("span", {}, STATE_WORDS[kind] ?? MARKS[kind]),
        count,
      );
      this.#chips.set(kind, { chip, count });
    }
    const chips = h(
      "div",
      { class: "chips", role: "group", "aria-label": "States" },
      ...[...this.#chips.values()].map((c) => c.chip),
    );
    return h(
      "div",
      { class: "toolbar" },
      chips,
      h("div", { class: "finding" }, this.service, this.sort, this.search),
    );
  }

  #toggle(kind) {
    const { kinds } = this.#filter;
    if (!kinds.delete(kind)) kinds.add(kind);
    this.#changeFilter();
  }

  /** The filter stands in the address, so that it can be shared; the page follows the address. */
  #changeFilter() {
    const params = new URLSearchParams();
    if (this.service.value) params.set("service", this.service.value);
    if (this.#filter.kinds.size) params.set("state", [...this.#filter.kinds].join(","));
    if (this.search.value.trim()) params.set("q", this.search.value.trim());
    if (this.sort.value !== "worst") params.set("sort", this.sort.value);
    this.#app.replace(params.size ? `#/?${params}` : "#/");
  }

  show({ params }) {
    const text = params.get("q") ?? "";
    this.#filter = {
      service: params.get("service") ?? "",
      kinds: new Set((params.get("state") ?? "").split(",").filter((kind) => KINDS.includes(kind))),
      words: text.toLowerCase().split(/\s+/).filter(Boolean),
      sort: params.get("sort") === "name" ? "name" : "worst",
    };
    if (this.search.value.trim() !== text) this.search.value = text;
    this.sort.value = this.#filter.sort;
    for (const [kind, { chip }] of this.#chips)
      chip.setAttribute("aria-pressed", this.#filter.kinds.has(kind));
    this.#order();
  }

  hide() {}

  #passes(tile) {
    const { service, kinds, words } = this.#filter;
    if (service && tile.service !== service) return false;
    if (kinds.size && !kindsOf(tile).some((kind) => kinds.has(kind))) return false;
    if (!words.length) return true;
    const text = `${tile.name} ${tile.kind ?? ""} ${tile.cause ?? ""}`.toLowerCase();
    return words.every((word) => text.includes(word));
  }

  // ------------------------------------------------------------------ tiles

  update({ changed, moved }) {
    if (moved) this.#order();
    else this.#summarise();
    for (const { grid } of this.#groups.values()) grid.update(changed);
  }

  tick(now) {
    for (const { grid } of this.#groups.values()) grid.tick(now);
  }

  /** Which circuits are shown, in which groups and order. */
  #order() {
    const groups = this.#grouped();
    for (const [key, { tiles, all }] of groups) {
      const { grid, summary } = this.#group(key);
      const above = all - tiles.length;
      say(
        summary,
        key === ATTENTION
          ? ""
          : `${plural(all, "circuit")}${above ? `, ${number(above)} above` : ""}`,
      );
      grid.set(tiles);
    }
    for (const key of this.#groups.keys()) if (!groups.has(key)) this.#groups.delete(key);
    arrange(
      this.groups,
      [...groups.keys()].map((key) => this.#groups.get(key).section),
    );
    this.#count = [...groups.values()].reduce((sum, { tiles }) => sum + tiles.length, 0);
    this.#place();
    this.#summarise();
    this.#sayShown();
  }

  /** Put those tiles into the page that are near the screen; all, as long as they are few. */
  #place() {
    if (!this.element.isConnected || !this.#groups.size) return;
    const grids = [...this.#groups.values()].map(({ grid }) => grid);
    const view = this.#count > FEW ? measured(grids[0].element) : null;
    // All room is taken before anything is measured, so that the browser lays out only once.
    for (const grid of grids) grid.reserve(view);
    const tops = view ? grids.map((grid) => grid.element.getBoundingClientRect().top) : [];
    grids.forEach((grid, i) => grid.place(view, tops[i]));
  }

  #placeSoon() {
    if (this.#placing || this.#count <= FEW) return;
    this.#placing = true;
    requestAnimationFrame(() => {
      this.#placing = false;
      this.#place();
    });
  }

  /** What passes the filter, by service; the worst first means that what needs a look comes first. */
  #grouped() {
    const groups = new Map();
    const group = (key) => {
      if (!groups.has(key)) groups.set(key, { tiles: [], all: 0 });
      return groups.get(key);
    };
    const worst = this.#filter.sort === "worst";
    for (const tile of this.#app.fleet.tiles.values()) {
      if (!this.#passes(tile)) continue;
      const home = group(tile.service);
      home.all += 1;
      (worst && tile.rank < WELL ? group(ATTENTION) : home).tiles.push(tile);
    }
    // A service that has nothing to show is named only while nothing is left out.
    if (this.#filtered()) for (const [key, { tiles }] of groups) if (!tiles.length) groups.delete(key);
    const byName = (a, b) => (a.name < b.name ? -1 : 1);
    for (const { tiles } of groups.values())
      tiles.sort((a, b) => (worst && a.rank - b.rank) || byName(a, b));
    return new Map([...groups].sort(([a], [b]) => (a < b ? -1 : 1)));
  }

  #group(key) {
    if (!this.#groups.has(key)) {
      const attention = key === ATTENTION;
      const title = attention ? "To look at" : key;
      const grid = new Grid(this.#app.fleet);
      const summary = h("span", { class: "of" });
      const act =
        !attention &&
        h(
          "button",
          {
            type: "button",
            class: "quiet act",
            "aria-label": `Actions for all of ${key}`,
            onclick: () => this.#app.act({ service: key }),
          },
          "Actions…",
        );
      const section = h(
        "section",
        { class: attention ? "group attention" : "group", "aria-label": title },
        h("header", {}, h("h2", {}, title), summary, act),
        grid.element,
      );
      this.#groups.set(key, { section, grid, summary });
    }
    return this.#groups.get(key);
  }

  // ------------------------------------------------------------------ summary

  #summarise() {
    const { fleet } = this.#app;
    const counts = counted(fleet.tiles.values());
    for (const [kind, { chip, count }] of this.#chips) {
      say(count, number(counts[kind]));
      chip.hidden = !counts[kind] && !this.#filter.kinds.has(kind);
    }
    for (const part of this.bar.children) {
      part.style.flexGrow = counts[part.dataset.state];
      part.hidden = !counts[part.dataset.state];
    }
    const { line, kind } = headline(fleet, counts);
    say(this.headline, line);
    if (kind) this.#name(kind, counts[kind]);
    else this.#sayAll();
    this.element.dataset.overall = fleet.overall;
    this.element.classList.toggle("none", fleet.known && !fleet.tiles.size);
    this.#listServices();
  }

  /** Name the circuits that the headline counts. */
  #name(kind, count) {
    const names = [];
    for (const tile of this.#app.fleet.tiles.values())
      if (kindsOf(tile).includes(kind)) names.push(tile.name);
    const key = `${kind} ${names.join()}`;
    if (this.subline.dataset.key === key) return;
    this.subline.dataset.key = key;
    const links = names
      .sort()
      .slice(0, NAMED)
      .flatMap((name, i) => [i ? ", " : "", h("a", { href: linkTo(name) }, name)]);
    this.subline.replaceChildren(
      ...links,
      count > NAMED ? ` and ${number(count - NAMED)} more` : "",
    );
  }

  #sayAll() {
    const tiles = [...this.#app.fleet.tiles.values()];
    const calls = tiles.reduce((sum, tile) => sum + (tile.rate ?? 0), 0);
    const services = new Set(tiles.map((tile) => tile.service)).size;
    this.subline.dataset.key = "";
    say(this.subline, tiles.length ? `${plural(services, "service")}, ${rate(calls)} calls/s` : "");
  }

  #listServices() {
    const services = new Map();
    for (const { service } of this.#app.fleet.tiles.values())
      services.set(service, (services.get(service) ?? 0) + 1);
    const names = [...services.keys()].sort();
    if (this.#filter.service && !services.has(this.#filter.service))
      names.push(this.#filter.service);
    const key = names.map((name) => `${name} ${services.get(name) ?? 0}`).join("\n");
    if (this.service.dataset.key !== key) {
      this.service.dataset.key = key;
      this.service.replaceChildren(
        h("option", { value: "" }, "All services"),
        ...names.map((name) =>
          h("option", { value: name }, `${name} (${services.get(name) ?? 0})`),
        ),
      );
    }
    this.service.value = this.#filter.service;
  }

  #filtered() {
    const { service, kinds, words } = this.#filter;
    return Boolean(service || kinds.size || words.length);
  }

  #sayShown() {
    const shown = this.#count;
    const { fleet } = this.#app;
    const all = fleet.tiles.size;
    const filtered = this.#filtered();
    const key = [fleet.known, !all, filtered && `${shown} ${all}`].join();
    if (this.shown.dataset.key === key) return;
    this.shown.dataset.key = key;
    this.shown.replaceChildren();
    if (!fleet.known) this.shown.append("Waiting for the first data …");
    else if (!all)
      this.shown.append(
        h("strong", {}, "There are no circuits yet."),
        " One appears here as soon as a process has made it, for instance by ",
        h("code", {}, 'registry.breaker("payments")'),
        ".",
      );
    else if (filtered) {
      const clear = h(
        "button",
        { type: "button", class: "quiet", onclick: () => this.#app.replace("#/") },
        "Show all",
      );
      this.shown.append(
        shown
          ? `${number(shown)} of ${plural(all, "circuit")} shown. `
          : "No circuit is like this. ",
        clear,
      );
    }
    this.shown.hidden = !this.shown.childNodes.length;
  }
}
