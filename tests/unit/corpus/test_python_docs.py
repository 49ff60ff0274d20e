import ast
import logging
import subprocess
import sys
import textwrap

import pytest
from waits import seconds

from hncse_ray.corpus import docstring_sentences, docstrings, documentation_pairs, python_docs
from hncse_ray.errors import DataError


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """Two packages on the path that must never be imported."""
    for name, files in {
        "alpha": {
            "__init__.py": 'raise RuntimeError("imported")',
            "sorting.py": '''
                def argsort(a):
                    """Return the indices that would sort an array."""
                class Tree:
                    """A tree of many nodes."""
                    def depth(self):
                        """Count the levels of the tree."""
                    def _hidden(self):
                        """Not to be seen by anyone."""
                def same(a):
                    """Does the very same thing everywhere."""
                def ok(a):
                    """Short."""
                def main():
                    """Run the whole of program alpha."""
            ''',
            "tests/test_sorting.py": 'def depth():\n    """Shall never be read at all."""',
        },
        "beta": {
            "__init__.py": "",
            "_c.py": '''
                add_docstr(beta.argsort, r"""
                argsort(input, dim=-1, *, stable=False) -> Tensor

                Gives the order of the elements of {input} along a dimension.
                More follows here, for the second sentence.
                """.format(**common))
                add_newdoc("beta", "Tree", ("depth", """depth()

                How far it is from root to leaf."""))
                def same(a):
                    """Does the very same thing, everywhere!"""
                def main():
                    """Start what program beta is about."""
            ''',
            "broken.py": '"""Not a program."""\ndef (',
        },
    }.items():
        for file, source in files.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(textwrap.dedent(source), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("num_processes", [1, 2])
def test_pairs_of_a_small_tree(tree, monkeypatch, num_processes):
    monkeypatch.setattr(python_docs, "CHUNK_BYTES", 1)  # several workers even for so little
    pairs = documentation_pairs(["beta", "alpha"], num_processes)
    assert [(p.name, p.query_package, p.answer_package) for p in pairs] == [
        ("argsort", "beta", "alpha"),
        ("depth", "beta", "alpha"),
    ]
    assert pairs[0].query == "Gives the order of the elements of along a dimension."
    assert pairs[0].answer == "Return the indices that would sort an array."
    assert pairs[1].query == "How far it is from root to leaf."
    assert {p.split for p in pairs} <= {"dev", "test"}
    assert "alpha" not in sys.modules


def test_sentences_of_a_small_tree(tree, monkeypatch):
    monkeypatch.setattr(python_docs, "CHUNK_BYTES", 1)
    sentences = list(docstring_sentences(["alpha", "beta"], 2))
    assert sentences == list(docstring_sentences(["beta", "alpha"], 1))
    assert "Count the levels of the tree." in sentences
    assert "More follows here, for the second sentence." in sentences
    assert not any("never be read" in s or s == "Short." for s in sentences)


def test_a_package_that_is_not_there(tree, monkeypatch, caplog):
    with pytest.raises(DataError, match=r"nunpy: is not an installed.*did you mean 'numpy'"):
        documentation_pairs(["alpha", "nunpy"])
    monkeypatch.setattr(python_docs, "PAIR_PACKAGES", ("alpha", "beta", "never_was"))
    with caplog.at_level(logging.WARNING):
        assert len(documentation_pairs()) == 2
    assert "never_was" in caplog.text


def test_versions_name_the_text(tree):
    (alpha,) = python_docs.package_versions(["alpha"])
    assert python_docs.package_versions(["alpha"]) == [alpha]
    (tree / "alpha" / "more.py").write_text('"""More text than before."""')
    assert python_docs.package_versions(["alpha"]) != [alpha]
    import numpy

    assert python_docs.package_versions(["numpy"]) == [f"numpy=={numpy.__version__}"]


def sentences(doc):
    return list(docstrings.sentences_of(ast.parse(f"def f():\n    {doc!r}")))


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        (
            "Uses :func:`~numpy.sort` and ``b`` of `this page <http://x.y/z>`_ [1]_.",
            ["Uses sort and b of this page."],
        ),
        (
            "One sentence is here. And e.g. another longer one follows.",
            ["One sentence is here.", "And e.g. another longer one follows."],
        ),
        ("A line of prose that\nruns over two lines.", ["A line of prose that runs over two lines."]),
        (
            "See the code below::\n\n    x = this is not prose at all\n\nThis is prose once more.",
            ["This is prose once more."],
        ),
        (
            "Some words before it.\n\n>>> print that is no prose\nnor is its output here\n\nSome words after it.",  # noqa: E501
            ["Some words before it.", "Some words after it."],
        ),
        (
            "Parameters\n----------\nx : array_like of some kind\n    The values that are sorted.",
            ["The values that are sorted."],
        ),
        (
            "Args:\n    x (int): The number of the rows,\n        over all of them.\n    y: Another thing of this kind.",  # noqa: E501
            ["The number of the rows, over all of them.", "Another thing of this kind."],
        ),
        (":param x: the value to be used\n:type x: int or float or str", ["the value to be used"]),
        (
            ".. math::\n\n    a is b or c\n\n.. note:: \n    Mind the gap between them.",
            ["Mind the gap between them."],
        ),
        ("```python\nthis is no prose either\n```\nBut this is prose again.", ["But this is prose again."]),
        ("Too short.", []),
        ("x = 3 + 4 * 5 - 6 and so", []),
        ("1 is the first of all", []),
        (" ".join(["word"] * 61), []),
    ],
)
def test_prose_of_a_docstring(doc, expected):
    assert sentences(doc) == expected


def test_a_worker_never_runs_the_callers_main(tree):
    script = tree / "script.py"  # no `if __name__ == "__main__"` guard
    script.write_text(
        "print('started')\nimport hncse_ray.corpus.python_docs as p\np.CHUNK_BYTES = 1\n"
        "print(len(p.documentation_pairs(['alpha', 'beta'], 2)))\n"
    )
    paths = [str(tree), *filter(None, sys.path)]
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": ":".join(paths)},
        timeout=seconds(60),
    )
    assert done.stdout.split() == ["started", "2"], done.stderr


def test_installed_numpy_and_torch():
    pytest.importorskip("torch")
    pairs = {pair.name: pair for pair in documentation_pairs(["numpy", "torch"])}
    assert pairs["argsort"].answer == "Returns the indices that would sort an array."
    assert "indices that sort a tensor" in pairs["argsort"].query
    assert len(pairs) > 150
    share = sum(pair.split == "dev" for pair in pairs.values()) / len(pairs)
    assert 0.4 < share < 0.6
    assert all(pair.query != pair.answer for pair in pairs.values())
    assert sorted(pairs, key=lambda name: name.replace("_", "").lower()) == list(pairs)
