// A ranking in the making, as pure functions: `places` from best to worst, each a list of answers (numbers from 0 in
// the shown order). Two answers in one place are a tie; an answer in no place is not ranked yet.

export const without = (places, answer) =>
  places.map((place) => place.filter((other) => other !== answer)).filter((place) => place.length);

export const placeOf = (places, answer) => places.findIndex((place) => place.includes(answer));

export const append = (places, answer) => [...without(places, answer), [answer]];

export const tieWith = (places, answer, other) =>
  without(places, answer).map((place) => (place.includes(other) ? [...place, answer].sort() : place));

// Just above `other`: a place of its own, unless that is in the middle of a tie, which it then joins.
export function before(places, answer, other) {
  const rest = without(places, answer);
  const at = placeOf(rest, other);
  return rest[at][0] === other ? rest.toSpliced(at, 0, [answer]) : tieWith(places, answer, other);
}

// Up (by = -1) or down (1): out of a tie, else past the next place. An answer that is not ranked becomes the last.
export function move(places, answer, by) {
  const at = placeOf(places, answer);
  if (at < 0) return append(places, answer);
  const tied = places[at].length > 1;
  const to = tied ? at + Math.max(by, 0) : Math.min(Math.max(at + by, 0), places.length - 1);
  return without(places, answer).toSpliced(to, 0, [answer]);
}

// Ties an answer with the place above (one that is not ranked: with the last place); one that is tied leaves its tie.
export function toggleTie(places, answer) {
  const at = placeOf(places, answer);
  if (at < 0) return places.length ? tieWith(places, answer, places.at(-1)[0]) : places;
  if (places[at].length > 1) return move(places, answer, 1);
  return at ? tieWith(places, answer, places[at - 1][0]) : places;
}

// 1 is best, equal numbers tie, null is not ranked.
export const toRanks = (places, count) =>
  Array.from({ length: count }, (_, answer) => placeOf(places, answer) + 1 || null);

export const fromRanks = (ranks) =>
  [...new Set(ranks.filter((rank) => rank !== null))]
    .sort((a, b) => a - b)
    .map((rank) => ranks.flatMap((other, answer) => (other === rank ? [answer] : [])));
