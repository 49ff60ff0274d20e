"""What nobody meant to type: Hypothesis strategies for names, values and overrides, shared by the fuzz tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hncse_ray.config import OBJECTIVES, Settings

_KEYS = [
    f"{section}.{name}"
    for section, field in Settings.model_fields.items()
    for cls in (OBJECTIVES.values() if section == "objective" else [field.annotation])
    for name in cls.model_fields  # type: ignore[union-attr]
]
# Nothing that is absolute or leads upwards: a test writes where it stands.
_ODD = [
    *(
        "",
        " ",
        "-",
        "--",
        ".",
        "~no-such-user",
        "~no-such-user/x",
        ",",
        "a,b",
        "a,,b",
        "package:",
        "package:x/y",
        "owner/name",
    ),
    *("a/b/c", "é", "\udce9", "\u2028", "\ufeff", "a" * 300, "a" * 5000, "'", '"', '"a', "[", "[]", "[a, b]", "{"),
    *("{}", "{a: b}", "*", "&a", "!!int 3", "%20", "?", "#", "a #b", "=", "a=b", "null", "none", "None", "true", "off"),
    *("0", "-1", "1", "2", "007", "1_000", "12:30", "0x10", "1e3", "1e400", "-1e400", ".nan", ".inf", "nan", "9" * 400),
    *("1e-400", "0.5", "hybrid", "info_nce", "text", "jsonl", "hub", "auto", "stsb", "pairs", "linear", "[bold]"),
]


def harmless(text: str) -> bool:
    """Whether a text, taken for a path, stays below the folder that the test stands in."""
    return not text.strip("'\"[{ ").startswith(("/", "~")) and ".." not in text or text.startswith("~no-such-user")


def texts(longest: int = 12) -> st.SearchStrategy[str]:
    """What can be typed in a shell: any characters but NUL, and bytes that are no UTF-8."""
    plain = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=longest)
    signs = st.text("[]{}:,'\"#&*!|>%@-=_.eE0123456789 an\n\t", max_size=longest)
    numbers = (st.integers().map(str), st.floats().map(str))
    return st.one_of(st.sampled_from(_ODD), plain, signs, *numbers).filter(harmless)


def overrides() -> st.SearchStrategy[str]:
    """``section.key=value``, most of them with a key that there is."""
    keys = st.one_of(st.sampled_from(_KEYS), st.sampled_from([*Settings.model_fields]), texts())
    words = st.sampled_from(
        ["run.storage_path", "corpus.path", "corpus.subset", "encoder.model", "cluster.pool_labels.a"]
    )
    return st.one_of(*(st.builds("{}={}".format, key, texts()) for key in (keys, words)), texts())


def trees() -> st.SearchStrategy[Any]:
    """What a YAML file may hold, with the words of recipes and search spaces among its keys."""
    words = [*Settings.model_fields, *_KEYS, "parameters", "first", "uniform", "int", "categorical", "step", "when"]
    words += [key.partition(".")[2] for key in _KEYS]
    leaves = st.one_of(texts(), st.none(), st.booleans(), st.integers(), st.floats())
    keys = st.one_of(st.sampled_from(words), texts())
    return st.recursive(leaves, lambda t: st.lists(t, max_size=3) | st.dictionaries(keys, t, max_size=4), max_leaves=12)


def try_out(check: Callable[[Any], None], examples: int, strategy: st.SearchStrategy[Any]) -> None:
    """Run a check on so many examples, always the same ones."""
    allowed = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None, suppress_health_check=allowed)
    @given(strategy)
    def run(drawn: Any) -> None:
        check(drawn)

    run()
