// The whole fleet in one line: how many circuits are of which kind, and what is wrong first.

import { STATES, number, plural, shownState, sourceOf } from "./words.js";

export const MARKS = {
  shadow: "shadow decides",
  quarantine: "in quarantine",
  mismatch: "policy differs",
};
export const KINDS = [...STATES, ...Object.keys(MARKS)];

/** What a circuit counts as: its state, and what else is to be said of it. */
export function kindsOf(tile) {
  const kinds = [shownState(tile)];
  if (MARKS[sourceOf(tile)]) kinds.push(sourceOf(tile));
  if (tile.policy_mismatch) kinds.push("mismatch");
  return kinds;
}

export function counted(tiles) {
  const counts = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
  for (const tile of tiles) for (const kind of kindsOf(tile)) counts[kind] += 1;
  return counts;
}

const are = (words) => (count) => `${plural(count, "circuit is", "circuits are")} ${words}`;
const HEADLINES = {
  open: are("open"),
  forced_open: are("forced open"),
  half_open: are("recovering"),
  quarantine: are("in quarantine"),
  forced_closed: are("forced closed"),
  mismatch: (count) => `${plural(count, "circuit has", "circuits have")} more than one policy`,
};

/** The line, and of which kind the circuits are that it speaks of (null: of all). */
export function headline(fleet, counts) {
  if (!fleet.known) return { line: "Connecting …", kind: null };
  const all = fleet.tiles.size;
  if (!all) return { line: "No circuits", kind: null };
  const kind = Object.keys(HEADLINES).find((candidate) => counts[candidate]);
  if (kind) return { line: HEADLINES[kind](counts[kind]), kind };
  const word = counts.disabled === all ? "disabled" : "closed";
  return {
    line: all === 1 ? `The one circuit is ${word}` : `All ${number(all)} circuits are ${word}`,
    kind: null,
  };
}
