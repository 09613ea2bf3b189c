// The tiles of one group. With thousands of circuits only the rows near the screen are in the page:
// what an update costs then depends on the screen, and not on the fleet.

import { arrange, h } from "./dom.js";
import { Tile } from "./tile.js";

const AHEAD = 600; // px above and below the screen

/** What all grids have in common at the moment: columns, px of a row, and what is near the screen.
 *  `list` is one of them, whose style says so. */
export function measured(list) {
  const style = getComputedStyle(list);
  return {
    columns: style.gridTemplateColumns.split(" ").length,
    row: parseFloat(style.gridAutoRows) + parseFloat(style.rowGap),
    top: -AHEAD,
    bottom: innerHeight + AHEAD,
  };
}

export class Grid {
  element = h("ul", { class: "tiles" });
  #tiles = [];
  #shown = new Map(); // name → Tile in the page
  #fleet;

  constructor(fleet) {
    this.#fleet = fleet;
  }

  /** These circuits, in this order; `place` must follow. */
  set(tiles) {
    this.#tiles = tiles;
  }

  /** Take the room of all of them; without `view` all will be in the page, and take it themselves. */
  reserve(view) {
    const height = view ? `${Math.ceil(this.#tiles.length / view.columns) * view.row}px` : "";
    if (this.element.style.height !== height) this.element.style.height = height;
  }

  /** Put into the page what is near the screen.  `top` is where the list begins, in px of the screen. */
  place(view, top) {
    let tiles = this.#tiles;
    let before = 0;
    if (view) {
      const rows = Math.ceil(tiles.length / view.columns);
      const within = (row) => Math.max(0, Math.min(rows, row));
      before = within(Math.floor((view.top - top) / view.row));
      const after = within(Math.ceil((view.bottom - top) / view.row));
      tiles = tiles.slice(before * view.columns, after * view.columns);
    }
    const padding = before ? `${before * view.row}px` : "";
    if (this.element.style.paddingTop !== padding) this.element.style.paddingTop = padding;
    const gone = new Map(this.#shown);
    const elements = tiles.map((tile) => {
      gone.delete(tile.name);
      return this.#tile(tile).element;
    });
    for (const name of gone.keys()) this.#shown.delete(name);
    arrange(this.element, elements);
  }

  #tile(tile) {
    let shown = this.#shown.get(tile.name);
    if (!shown) {
      this.#shown.set(tile.name, (shown = new Tile(tile)));
      this.#draw(shown, tile);
    }
    return shown;
  }

  #draw(shown, tile) {
    shown.draw(tile, this.#fleet.now(), this.#fleet.last.get(tile.name));
  }

  /** Draw those that have changed. */
  update(changed) {
    const { tiles } = this.#fleet;
    for (const [name, shown] of this.#shown)
      if (changed.has(name) && tiles.has(name)) this.#draw(shown, tiles.get(name));
  }

  tick(now) {
    for (const shown of this.#shown.values()) shown.tick(now);
  }
}
