import random

import pytest

from hncse_ray.corpus import sentences_or_runs, split_sentences
from hncse_ray.corpus.sentences import count_words, pack_passages

CASES = {
    "plain": ["One thing is told.", "Is it?", "It is!", "Yes."],
    "abbreviations": [
        "Dr. Smith met J. R. Jones, e.g. on Monday.",
        "See Fig. 3 and eqs. (2) vs. (4).",
        "The U.S. Army came.",
    ],
    "decimals": ["It is 3.5 mm, or 1.2.3 of it.", "In 1999.", "Then 2. was.", "Next."],
    "quotes": ['"Why?" he asked.', "(It was so.)", "“Never!”", "So be it."],
    "lower case": ["the flow is slow .", "the wake is not .", "it grows e.g. here.", "and there."],
    "upper case": ["A STUDY OF LIBRARIES.", "THE AIM IS TOLD."],
    "paragraphs": ["A heading", "A sentence without end", "and another."],
    "chinese": ["这是第一句。", "这是第二句！", "对吗？", "「对。」", "完"],
    "hindi": ["यह एक है।", "वह दो है।"],
    "arabic": ["هل هذا هو؟", "نعم."],
}


@pytest.mark.parametrize("name", CASES)
def test_sentences_end_where_they_end(name):
    between = {"paragraphs": "\n\n", "chinese": ""}.get(name, " ")
    assert split_sentences(between.join(CASES[name])) == CASES[name]


def test_the_pieces_are_the_text_but_for_blanks():
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(
            rng.choice(["a", "B", ".", "?", " ", "\n", "。", "1", "e.g. ", '"', "Dr. ", "…"]) for _ in range(60)
        )
        assert "".join("".join(split_sentences(text)).split()) == "".join(text.split())
    assert split_sentences(" \n ") == split_sentences("") == []


@pytest.mark.parametrize("marks", ["." * 1_000_000, "!?" * 500_000, "." + ")" * 1_000_000])
def test_a_long_run_of_marks_is_looked_at_once(marks):
    """Looked at from each of its marks, it would take days."""
    assert split_sentences(f"One{marks}two. Three") == [f"One{marks}two.", "Three"]
    assert split_sentences(f"One{marks} Two") == [f"One{marks}", "Two"]


def test_words_are_counted_also_without_blanks():
    assert count_words("one two  three") == 3
    assert count_words("这是第一句") == 3
    assert count_words("") == 0


def test_passages_are_few_full_and_even():
    lengths = [random.Random(i).randint(3, 40) for i in range(200)]
    sentences = [" ".join([f"s{i}"] * n) for i, n in enumerate(lengths)]
    passages = pack_passages(sentences, 100)
    assert " ".join(passages) == " ".join(sentences)
    sizes = [count_words(passage) for passage in passages]
    assert max(sizes) <= 100
    assert min(sizes) >= 50
    assert len(passages) <= 1.25 * sum(lengths) / 100
    assert pack_passages([], 100) == []


def test_a_text_without_sentence_ends_is_parted_into_runs_of_words() -> None:
    words = [f"word{i}" for i in range(27)]
    assert sentences_or_runs(" ".join(words)) == [" ".join(words[:12]), " ".join(words[12:])]
    assert sentences_or_runs(" ".join(words[:15])) == [" ".join(words[:15])]
    assert sentences_or_runs("One two three. So " + " ".join(words)) == ["One two three.", "So " + " ".join(words)]
    assert "".join(sentences_or_runs("字" * 60)).replace(" ", "") == "字" * 60
    assert len(sentences_or_runs("字" * 60)) > 1
