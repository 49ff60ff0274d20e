"""Where sentences end: by rules, for text of any language that marks their ends."""

from __future__ import annotations

import re
from collections.abc import Iterator

from hncse_ray.reading import UNPARTED

# An end is a run of marks and what closes behind it. Marks of scripts without blanks end a sentence at once,
# others before a blank; so do empty lines. A run of marks is looked at once, from its beginning: there may be many.
_END = re.compile(
    r"""(?:[。！？｡︒]+[」』”’）)\]〉》】]*\s*)"""
    r"""|(?:(?<![.!?…؟۔।॥։።])[.!?…؟۔।॥։።]++["'”’»)\]]*+\s+)"""
    r"""|(?:\n\s*\n\s*)"""
)
_INITIALS = re.compile(r"[^\W\d_](?:\.[^\W\d_])*")  # J, U.S
_LONGEST_ABBREVIATION = 40  # characters looked back
_OPENING = "\"'“‘«([¿¡"

_NEVER = frozenset(
    "mr mrs ms dr prof st messrs mme mlle hr fr vs cf e.g i.e eg ie viz ca al resp approx gen col lt sgt capt rev hon"
    " gov sen rep w.r.t d.h z.b u.a bzw vgl sog ggf p.ex".split()
)
"""Abbreviations that a sentence goes on behind, whatever follows."""
_NUMBERED = frozenset(
    "no nos nr fig figs eq eqs sec sect vol vols ch chap p pp ref refs tab art op ed eds abb bd s"
    " jan feb mar apr jun jul aug sep sept oct nov dec".split()
)
"""Those that a sentence goes on behind if a number follows."""


def split_sentences(text: str) -> list[str]:
    """Split a text into its sentences.

    A sentence ends with a full stop, a question or an exclamation mark, or their like in other scripts, or at an empty
    line. A full stop does not end one behind an abbreviation, an initial or the number of an item, nor before a small
    letter, unless the text has no capitals or the stop stands alone, as in tokenised text.

    Returns:
        The sentences without blanks at their ends, none empty. Joined, they are the text but for blanks.
    """
    caseless = not any(map(str.isupper, text))
    found, start = [], 0
    for match in _END.finditer(text):
        if _ends(text, start, match, caseless=caseless):
            found.append(text[start : match.end()].strip())
            start = match.end()
    found.append(text[start:].strip())
    return [sentence for sentence in found if sentence]


def _ends(text: str, start: int, match: re.Match[str], *, caseless: bool) -> bool:
    """Return whether a sentence that begins at ``start`` ends with this match."""
    mark, follows = match[0].rstrip(), text[match.end() : match.end() + 2]
    if not follows:
        return True
    if mark[:1] != "." or mark.startswith(".."):
        # Behind "?" or "..." a sentence may go on: »"Why?" he asked«.
        return not (mark[:1] in "?!…." and mark and follows[0].islower() and not caseless)
    before = text[max(start, match.start() - _LONGEST_ABBREVIATION) : match.start()]
    if not before or before[-1].isspace():  # " . ", as tokenised text has it
        return True
    word = before.split()[-1].lstrip(_OPENING)
    if word.lower() in _NEVER or (not caseless and _INITIALS.fullmatch(word)):
        return False
    if word.isdigit() and word == before.strip() and match.start() - start <= len(before):  # the number of an item
        return False
    first = follows.lstrip(_OPENING)[:1]
    if word.lower() in _NUMBERED and (first.isdigit() or follows[0] in "(["):
        return False
    return caseless or not first.islower()


_RUN_WORDS, _FEWEST_WORDS = 12, 4  # of a run, and of the last one
_NO_BLANKS = re.compile(f"[{UNPARTED}]")


def count_words(text: str) -> int:
    """Count words: what blanks part, and two characters of a script that has none (Chinese, Japanese, Thai) as one."""
    unparted = len(_NO_BLANKS.findall(text))
    return len(_NO_BLANKS.sub(" ", text).split()) + (unparted + 1) // 2


def sentences_or_runs(text: str) -> list[str]:
    """Split a text into its sentences, and one that marks no end of any into runs of a dozen words.

    For what must ask a text about itself: lists, keywords and text without punctuation have no sentences.
    """
    sentences = split_sentences(text)
    if len(sentences) > 1 or count_words(text) < _RUN_WORDS + _FEWEST_WORDS:
        return sentences
    runs = list(_cut(" ".join(sentences), _RUN_WORDS))
    return runs if count_words(runs[-1]) >= _FEWEST_WORDS else runs[:-2] + [f"{runs[-2]} {runs[-1]}"]


def pack_passages(sentences: list[str], most_words: int) -> list[str]:
    """Join sentences to passages of at most so many words, of about equal length; a longer sentence is cut."""
    pieces = [piece for sentence in sentences for piece in _cut(sentence, most_words)]
    words = [count_words(piece) for piece in pieces]
    left = sum(words)
    passages: list[str] = []
    held: list[str] = []
    size = 0
    share = _share(left, most_words)
    for piece, more in zip(pieces, words, strict=True):
        if held and (size + more > most_words or size + more / 2 > share):
            passages.append(" ".join(held))
            left -= size
            held, size, share = [], 0, _share(left, most_words)
        held.append(piece)
        size += more
    return [*passages, " ".join(held)] if held else passages


def _share(words: int, most: int) -> float:
    """Words of the next passage, if those left go evenly into as few as possible."""
    return words / max(1, -(-words // most))


def _cut(sentence: str, most: int) -> Iterator[str]:
    """Cut a sentence that is longer than a passage, at blanks where it has any."""
    if count_words(sentence) <= most:
        yield sentence
        return
    held: list[str] = []
    size = 0
    for word in sentence.split():
        long = count_words(word)
        parts = [word] if long <= most else [word[i : i + most] for i in range(0, len(word), most)]
        for part in parts:
            more = count_words(part)
            if size + more > most:
                yield " ".join(held)
                held, size = [], 0
            held.append(part)
            size += more
    yield " ".join(held)
