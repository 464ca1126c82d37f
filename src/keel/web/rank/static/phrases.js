// Texts of the page, visible and for screen readers.

import { placeOf } from "./order.js";

const ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"];
const NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
const SHORT = ["1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th"];

const list = (words) => new Intl.ListFormat("en").format(words);
const capital = (text) => text[0].toUpperCase() + text.slice(1);

export const name = (response) => `Response ${response + 1}`;

// "2nd" or "2nd, tied"; empty for an unranked response. With two responses: "Better" or "Tie".
export function label(places, response, count) {
  const at = placeOf(places, response);
  if (at < 0) return "";
  if (count === 2) return places.length === 1 ? "Tie" : ["Better", ""][at];
  return places[at].length > 1 ? `${SHORT[at]}, tied` : SHORT[at];
}

// "Response 3 is now second of four, tied with response 1."
export function describe(places, response, count) {
  const at = placeOf(places, response);
  if (at < 0) return `${name(response)} is not ranked.`;
  const others = places[at].filter((other) => other !== response).map((other) => `response ${other + 1}`);
  const tie = others.length ? `, tied with ${list(others)}` : "";
  return `${name(response)} is now ${ORDINALS[at]} of ${NUMBERS[count]}${tie}.`;
}

export function missing(number) {
  if (!number) return "All responses are ranked; you can submit.";
  return `${capital(NUMBERS[number])} response${number > 1 ? "s are" : " is"} not ranked yet.`;
}
