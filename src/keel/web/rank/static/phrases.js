// What the page says, to the eye and to a screen reader.

import { placeOf } from "./order.js";

const ORDINALS = ["first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth"];
const NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];
const SHORT = ["1st", "2nd", "3rd", "4th", "5th", "6th", "7th", "8th", "9th"];

const list = (words) => new Intl.ListFormat("en").format(words);
const capital = (text) => text[0].toUpperCase() + text.slice(1);

export const name = (answer) => `Answer ${answer + 1}`;

// "2nd" or "2nd, tied"; nothing for an answer that is not ranked. Of two answers: "Better" or "Tie".
export function label(places, answer, count) {
  const at = placeOf(places, answer);
  if (at < 0) return "";
  if (count === 2) return places.length === 1 ? "Tie" : ["Better", ""][at];
  return places[at].length > 1 ? `${SHORT[at]}, tied` : SHORT[at];
}

// "Answer 3 is now second of four, tied with answer 1."
export function describe(places, answer, count) {
  const at = placeOf(places, answer);
  if (at < 0) return `${name(answer)} is not ranked.`;
  const others = places[at].filter((other) => other !== answer).map((other) => `answer ${other + 1}`);
  const tie = others.length ? `, tied with ${list(others)}` : "";
  return `${name(answer)} is now ${ORDINALS[at]} of ${NUMBERS[count]}${tie}.`;
}

export function missing(number) {
  if (!number) return "All answers are ranked; you can submit.";
  return `${capital(NUMBERS[number])} answer${number > 1 ? "s are" : " is"} not ranked yet.`;
}
