"""Split a response into segments, which are scored separately."""

import re

SPACED = ".!?\u2024\u2026\ufe52"
"""Characters that end a sentence only before a space. Inside words and numbers they mean something else (3.14,
node.js)."""
UNSPACED = (
    "\u0589\u061d-\u061f\u06d4\u0700-\u0702\u07f9\u0837\u0839\u083d\u083e\u0964\u0965\u104a\u104b\u1362\u1367\u1368"
    "\u166e\u1735\u1736\u17d4\u17d5\u1803\u1809\u1944\u1945\u1aa8-\u1aab\u1b4e\u1b4f\u1b5a\u1b5b\u1b5e\u1b5f\u1b7d-\u1b7f"
    "\u1c3b\u1c3c\u1c7e\u1c7f\u203c\u203d\u2047-\u2049\u2cf9-\u2cfb\u2e2e\u2e3c\u2e53\u2e54\u3002\ua4ff\ua60e\ua60f\ua6f3\ua6f7\ua876\ua877"
    "\ua8ce\ua8cf\ua92f\ua9c8\ua9c9\uaa5d-\uaa5f\uaaf0\uaaf1\uabeb\ufe12\ufe15\ufe16\ufe56\ufe57\uff01\uff1f\uff61"
    "\u037e"  # the Greek question mark
)
"""The other characters with Unicode's property Sentence_Terminal (UAX #44, PropList.txt of Unicode 16, first plane).
They end a sentence before any character (UAX #29, rule SB11), since Chinese and Japanese put no space there."""
CLOSING = (
    "\"')\\]}\u00bb\u2019\u201d\u203a\u3009\u300b\u300d\u300f\u3011\u3015\u3017\u301e\u301f\uff09\uff3d\uff5d\uff63"
)
TURNED = "\u00ab\u2018\u201c\u2039"
"""Quotation marks that close in some languages and open in others. Before a space they close."""
SENTENCE = re.compile(
    rf".+?(?:[{SPACED}]+[{CLOSING}{TURNED}]*(?=\s|$)"
    rf"|(?:[{UNSPACED}]|\uff0e(?!\d))[{SPACED}{UNSPACED}\uff0e]*[{CLOSING}]*|$)\s*",
    re.DOTALL,
)


def split_segments(text: str, segments: str) -> list[str]:
    """Split a response into segments whose concatenation is the response. An empty response is one empty segment.

    Args:
        segments: "sentence", or a delimiter, which is part of the segment that it ends.
    """
    if segments == "sentence":
        texts = [match for match in SENTENCE.findall(text) if match]
    else:
        pieces = text.split(segments)
        texts = [piece + segments for piece in pieces[:-1]] + ([pieces[-1]] if pieces[-1] else [])
    return texts or [""]
