// Operations on an unfinished ranking, as pure functions. `places` is a list from best to worst. Each place is a list of
// responses, which are numbered from 0 in the order shown. Responses in one place tie; those in no place are not ranked.

export const without = (places, response) =>
  places.map((place) => place.filter((other) => other !== response)).filter((place) => place.length);

export const placeOf = (places, response) => places.findIndex((place) => place.includes(response));

export const append = (places, response) => [...without(places, response), [response]];

export const tieWith = (places, response, other) =>
  without(places, response).map((place) => (place.includes(other) ? [...place, response].sort() : place));

// Insert a response just above `other`, or join its tie if `other` is not the first response in its place.
export function before(places, response, other) {
  const rest = without(places, response);
  const at = placeOf(rest, other);
  return rest[at][0] === other ? rest.toSpliced(at, 0, [response]) : tieWith(places, response, other);
}

// Move up (by = -1) or down (by = 1): out of a tie, else past the next place. An unranked response becomes the last.
export function move(places, response, by) {
  const at = placeOf(places, response);
  if (at < 0) return append(places, response);
  const tied = places[at].length > 1;
  const to = tied ? at + Math.max(by, 0) : Math.min(Math.max(at + by, 0), places.length - 1);
  return without(places, response).toSpliced(to, 0, [response]);
}

// Tie a response with the place above, or an unranked response with the last place. A tied response leaves its tie.
export function toggleTie(places, response) {
  const at = placeOf(places, response);
  if (at < 0) return places.length ? tieWith(places, response, places.at(-1)[0]) : places;
  if (places[at].length > 1) return move(places, response, 1);
  return at ? tieWith(places, response, places[at - 1][0]) : places;
}

// 1 is best, equal numbers tie, null is not ranked.
export const toRanks = (places, count) =>
  Array.from({ length: count }, (_, response) => placeOf(places, response) + 1 || null);

export const fromRanks = (ranks) =>
  [...new Set(ranks.filter((rank) => rank !== null))]
    .sort((a, b) => a - b)
    .map((rank) => ranks.flatMap((other, response) => (other === rank ? [response] : [])));
