from collections import Counter

import pytest

from hncse_ray.config import CorpusSettings
from hncse_ray.corpus import python_docs, scored_code_pairs
from hncse_ray.corpus.sources import read_examples, source_identity
from hncse_ray.errors import DataError

RAISED = "raise RuntimeError('this was imported')\n"
MODULE = '''
import os

def add_all(numbers, *, start=0):
    """Return the sum of numbers.

    More of it.
    """
    total = start  # a comment
    for number in numbers:
        total += number
    return total

class Box:
    """Hold things of all kinds."""

    @decorated("The decorator says: open the lid")
    def open_it(self):
        """Open the lid of the box."""
        def inner():
            """Stays where it is."""
            return self.lid
        return inner()

    async def shut(self):
        """Shut the box."""
        await self.lid.shut()

    def __len__(self):
        """Return the number of things."""
        return 3

    def _hidden(self):
        """Return what nobody sees here."""
        return 4

    def later(self):
        """Do what a child class does."""
        raise NotImplementedError("later")

    def nothing(self):
        """Do nothing at all here."""
        ...

def odd():
    """Return what is no text \\ud800 at all."""
    return "\\ud800"

def short():
    """Too short."""
    return 1

def untelling():
    """See the other function."""
    return 1

def test_it():
    """Test that it holds things."""
    return 1
'''


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Two packages and a folder; whoever imports one of them fails."""
    files = {
        "alpha/__init__.py": RAISED + MODULE,
        "alpha/tests/test_a.py": MODULE.replace("sum", "product"),
        "alpha/conftest.py": MODULE.replace("sum", "fixture"),
        "beta/__init__.py": RAISED,
        "beta/more.py": MODULE.replace("add_all", "AddAll").replace("sum", "grand total"),
        "own/broken.py": 'def f(:\n    """Break all of this."""',
        "own/.venv/x.py": MODULE,
    }
    files |= {
        f"own/part{i}/m.py": f'def f{i}(x):\n    """Return the number {word} for it."""\n    return x * {i}\n'
        for i, word in enumerate("one two three four five six seven eight nine ten eleven twelve".split())
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def read(**settings):
    counts = Counter()
    return list(read_examples(CorpusSettings(source="python-code", **settings), counts)), dict(counts)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_pairs_are_summaries_and_the_code_without_docstring_comments_and_decorators(tree, monkeypatch, num_processes):
    monkeypatch.setattr(python_docs, "CHUNK_BYTES", 1)  # several workers even for so little
    rows, counts = read(packages=("alpha", "beta"), num_processes=num_processes)
    assert [row.text for row in rows[:3]] == ["Return the sum of numbers.", "Open the lid of the box.", "Shut the box."]
    assert counts == {"read": 8, "undecodable": 2}
    assert rows[0].positive == (
        "def add_all(numbers, *, start=0):\n    total = start\n    for number in numbers:\n        total += number\n"
        "    return total"
    )
    assert rows[1].positive.startswith("def open_it(self):\n\n    def inner():")
    assert rows[2].positive.startswith("async def shut(self):")
    assert rows[0].document == rows[3].document != rows[1].document  # one name in two packages
    assert read(packages=("alpha", "beta"), min_words=4)[1] == {"read": 8, "undecodable": 2, "too_short": 2}


def test_a_folder_is_read_without_tests_and_hidden_folders_and_what_python_cannot_read(tree):
    rows, counts = read(path=str(tree / "own"))
    assert counts == {"read": 12}
    assert rows[0].text == "Return the number one for it."
    assert read(path=(str(tree / "own"), str(tree / "beta" / "more.py")), packages="alpha")[1] == {
        "read": 20,
        "undecodable": 2,
    }
    assert read(path=f"{tree}/own/part*/m.py")[1] == {"read": 12}


def test_held_out_modules_are_scored_on_and_not_trained_on(tree):
    settings = {"path": str(tree / "own"), "held_out": 0.6}
    corpus = CorpusSettings(source="python-code", **settings)
    trained = {row.text for row in read(**settings)[0]}
    dev, test = ({pair.summary for pair in scored_code_pairs(split, (), corpus)} for split in ("dev", "test"))
    assert trained and len(dev) > 1 and len(test) > 1
    assert not trained & dev and not trained & test and not dev & test
    assert len(trained | dev | test) == 12
    everything = CorpusSettings(source="python-code", path=str(tree / "own"))
    assert source_identity(corpus) != source_identity(everything)
    with pytest.raises(DataError, match="only 0 functions"):
        scored_code_pairs(
            "dev", (), CorpusSettings(source="python-code", path=str(tree / "own" / "part1"), held_out=0.01)
        )
    with pytest.raises(DataError, match="holds out all there is, "):
        read(path=str(tree / "own"), held_out=0.999)


def test_other_packages_are_scored_on_a_sample_of_them_from_the_cache(tree, tmp_path, monkeypatch):
    corpus = CorpusSettings(source="python-code", packages="alpha", cache_dir=str(tmp_path / "cache"))
    pairs = scored_code_pairs("test", ("beta",), corpus)
    assert [pair.summary for pair in pairs] == [
        "Return the grand total of numbers.",
        "Open the lid of the box.",
        "Shut the box.",
    ]
    monkeypatch.setattr("hncse_ray.corpus.python_code.read_sources", lambda *_: pytest.fail("read twice"))
    assert scored_code_pairs("test", ("beta",), corpus) == pairs
    two = scored_code_pairs("test", ("beta",), corpus, 2)
    assert len(two) == 2 and set(two) < set(pairs)
    with pytest.raises(DataError, match="evaluation.code_dev: package 'alpha' is both trained and scored on"):
        scored_code_pairs("dev", ("alpha",), corpus)
    with pytest.raises(DataError, match="gone: is not an installed package.*evaluation.code_dev"):
        scored_code_pairs("dev", ("gone",), corpus)


def test_a_corpus_of_code_has_pairs_and_masks_functions_of_one_name(prepare, tree):
    corpus = prepare(source="python-code", packages=("alpha", "beta"), max_length=64)
    assert corpus.has_pairs and not corpus.has_passages
    assert corpus.report.without_positive == 0
    texts = corpus.texts(range(len(corpus)))
    assert len(texts) == 4  # two of them are the same in both packages
    assert corpus.target_texts([0])[0].startswith("def add_all(numbers")
    first, second = texts.index("Return the sum of numbers."), texts.index("Return the grand total of numbers.")
    assert corpus.documents[first] == corpus.documents[second]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"path": "{}/gone"}, "no such file"),
        ({"path": "{}/own/.venv"}, None),
        ({"path": "{}/alpha/tests"}, "has no Python source"),
        ({"path": "{}/text.txt"}, "is no Python source, which ends in .py"),
        ({"packages": "gone"}, "is not an installed package"),
        ({"path": "{}/beta/__init__.py"}, "holds no function whose docstring begins with a sentence"),
    ],
)
def test_what_cannot_be_read(tree, settings, said):
    (tree / "text.txt").write_text("text")
    settings = {name: value.format(tree) for name, value in settings.items()}
    if said is None:
        assert read(**settings)[1] == {"read": 4, "undecodable": 1}
        return
    with pytest.raises(DataError, match=said):
        read(**settings)


def test_settings_that_do_not_fit():
    for settings in ({"positive_column": "a"}, {"unit": "passage"}, {"document_column": "d"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            CorpusSettings(source="python-code", **settings)
    with pytest.raises(ValueError, match="held_out is for python-code"):
        CorpusSettings(source="python-docs", held_out=0.1)
    assert CorpusSettings(source="python-code", repel_within_document=True).has_pairs
