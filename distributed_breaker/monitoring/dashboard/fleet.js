// What the server has said of the fleet, and who wants to hear of it. It draws nothing.

import { shownState } from "./words.js";

const TRANSITIONS = 500;
// What needs a person first: calls are refused, then only some pass, then all do without protection.
const RANKS = { open: 0, forced_open: 1, half_open: 2, forced_closed: 5, closed: 7, disabled: 8 };

/** How much a circuit needs attention; the smallest first. */
function rankOf(tile) {
  const rank = RANKS[shownState(tile)] ?? 6;
  if (rank > 3 && tile.source === "quarantine") return 3;
  if (rank > 4 && tile.source === "shadow" && tile.shared_state && tile.shared_state !== tile.state)
    return 4;
  if (rank > 6 && tile.enabled && (tile.policy_mismatch || tile.suspects?.length)) return 6;
  return rank;
}

/** What decides where a circuit is shown, and whether it passes a filter. */
function placeOf(tile) {
  return [tile.rank, tile.service, shownState(tile), tile.source, tile.policy_mismatch].join();
}

/** Whether two are the same transition, told twice. */
export function isSame(a, b) {
  return a.circuit === b.circuit && a.time === b.time && a.generation === b.generation;
}

export class Fleet extends EventTarget {
  tiles = new Map();
  transitions = []; // newest first
  last = new Map(); // of each circuit its last transition
  store = { reachable: true, problem: null };
  overall = "";
  admin = false;
  environment = "";
  namespace = "";
  known = false; // something has arrived
  heard = 0; // ms of this clock when something last arrived
  changed = new Set(); // names, since the last take()
  moved = true; // circuits came, went or changed their place, since the last take()
  #ahead = 0;

  /** The time at the server, in ms since the epoch. Countdowns go by it. */
  now() {
    return Date.now() + this.#ahead;
  }

  /** Everything, at the start and from time to time. */
  takeFleet(message) {
    this.#ahead = -Infinity;
    const { tiles, timeline } = message;
    const present = new Set(tiles.map((tile) => tile.name));
    const gone = [...this.tiles.keys()].filter((name) => !present.has(name));
    this.admin = Boolean(message.admin);
    this.environment = message.environment ?? "";
    this.namespace = message.namespace ?? "";
    this.transitions = timeline ?? [];
    this.last = new Map(
      this.transitions.toReversed().map((transition) => [transition.circuit, transition]),
    );
    this.known = true;
    this.#take({ ...message, gone });
    this.dispatchEvent(new CustomEvent("timeline"));
  }

  /** Circuits that changed. */
  takeTiles(message) {
    this.#take(message);
  }

  takeTransition(transition) {
    this.heard = Date.now();
    if (this.transitions.some((known) => isSame(known, transition))) return;
    this.transitions.unshift(transition);
    this.last.set(transition.circuit, transition);
    this.transitions.length = Math.min(this.transitions.length, TRANSITIONS);
    this.dispatchEvent(new CustomEvent("transition", { detail: transition }));
    this.dispatchEvent(new CustomEvent("timeline"));
  }

  /** What has changed since this was last asked. */
  take() {
    const { changed, moved } = this;
    this.changed = new Set();
    this.moved = false;
    return { changed, moved };
  }

  #take({ at, store, overall_status: overall, tiles, gone }) {
    this.heard = Date.now();
    // The least delayed message says best how far the clocks are apart.
    this.#ahead = Math.max(this.#ahead, Date.parse(at) - Date.now());
    this.store = store ?? this.store;
    this.overall = overall ?? this.overall;
    for (const tile of tiles ?? []) {
      const before = this.tiles.get(tile.name);
      tile.rank = rankOf(tile);
      this.tiles.set(tile.name, tile);
      this.changed.add(tile.name);
      this.moved ||= !before || placeOf(before) !== placeOf(tile);
    }
    for (const name of gone ?? []) {
      this.tiles.delete(name);
      this.changed.add(name);
      this.moved = true;
    }
    this.dispatchEvent(new CustomEvent("change"));
  }
}
