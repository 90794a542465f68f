"""The rule ``measured``: transformers runs the model, and each MoE block with both counts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from support import teacher_forcing, tiny_models
from support.tiny_models import TINY, build

from moescale import api
from moescale.calibrate import runner
from moescale.calibrate.devices import Running
from moescale.calibrate.measure import measure, open_model
from moescale.calibrate.text import MAX_TOKENS, MIN_TOKENS, Text, read_text
from moescale.errors import SourceError, UnsupportedError, UsageError
from moescale.factors.samples import Sample
from moescale.families.architectures import find
from moescale.options import Options
from moescale.planning.decide import make_plan
from moescale.planning.factors import Findings
from moescale.storage.local.source import LocalSource

LENGTH = 32
IDS = torch.randint(3, 90, (4, LENGTH), generator=torch.Generator().manual_seed(5))

NO_TEXT = {
    "qwen3_omni_moe/talker": "does not run on text",
    "dots3_note/vision": "does not run on text",
    "doge": "no separate module for its experts",
    "jetmoe": "no separate module for its experts",
}
"""Why these types cannot be measured."""

ROWS = {entry: find(*entry.split("/")) for entry in TINY}
MEASURED = [e for e, row in ROWS.items() if not (row.fixed or row.no_effect or e in NO_TEXT)]

AFTERWARDS = {"openai_privacy_filter": 2 / 3}
"""The block's multiplier of the routed sum at 2 experts, divided by that at 3."""

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Casting complex values to real"),
    pytest.mark.filterwarnings("ignore:`torch.jit"),
]


def samples(
    source: Path, entry: str, *, max_memory: int | None = None, **options: Any
) -> dict[str, Sample]:
    """Sample every MoE layer of a tiny checkpoint on `IDS`."""
    found: dict[str, Sample] = {}

    def sampler(moe: Any, experts: Any, _: Any) -> Findings:
        config = runner.read_config(source)
        text = Text(tuple(IDS.flatten().tolist()))
        with open_model(source, config, moe, Running(max_memory)) as model:
            measured = measure(model, text, moe, experts)
        found.update({str(layer): sample for layer, sample in measured.items()})
        return Findings(measured)

    options["part"] = entry.partition("/")[2] or None
    make_plan(LocalSource(source), Options(rule="none", **options), None, sampler)
    return found


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Token ids in sequences as long as those of `IDS`."""
    monkeypatch.setattr(runner, "LONGEST", LENGTH)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("entry", MEASURED)
def test_norms_are_those_of_the_blocks_with_both_counts(entry: str, tmp_path: Path) -> None:
    """For every type, the ratio of norms equals that of models loaded with each count."""
    build(entry, tmp_path)
    ratios = [s.before.norm / s.after.norm for s in samples(tmp_path, entry, experts=3).values()]
    norms = teacher_forcing.norms(tmp_path, tmp_path, entry, IDS, (None, 3)).values()
    wanted = [AFTERWARDS.get(entry, 1) * before / after for before, after in norms]
    assert ratios == pytest.approx(wanted, rel=1e-4)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("entry", NO_TEXT)
def test_what_no_text_can_measure_is_refused(entry: str, tmp_path: Path) -> None:
    """Image and audio parts, and experts without a module, are refused with the reason."""
    build(entry, tmp_path)
    with pytest.raises(UnsupportedError, match=NO_TEXT[entry]):
        samples(tmp_path, entry, experts=2)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("entry", ["mixtral", "deepseek_v3", "dbrx"])
def test_the_trained_count_may_be_another_than_the_configs(entry: str, tmp_path: Path) -> None:
    """The hidden states are those of the model with n experts, whatever its config says."""
    build(entry, tmp_path)
    found = samples(tmp_path, entry, experts=3, trained_experts=1).values()
    norms = teacher_forcing.norms(tmp_path, tmp_path, entry, IDS, (1, 3)).values()
    assert [s.before.norm for s in found] == pytest.approx([n for n, _ in norms], rel=1e-4)
    assert [s.after.norm for s in found] == pytest.approx([n for _, n in norms], rel=1e-4)
    assert {(s.before.experts, s.after.experts) for s in found} == {(1, 3)}


@pytest.mark.usefixtures("short")
def test_a_count_for_each_layer_is_that_layers_own(tmp_path: Path) -> None:
    """If the config lists a count for each layer, each layer is measured with its own."""
    build("hunyuan_v1_moe", tmp_path, config={"moe_topk": [2, 1, 3]})
    found = samples(tmp_path, "hunyuan_v1_moe", experts=2)
    assert [s.before.experts for s in found.values()] == [2, 1, 3]
    assert found["0"].before == found["0"].after
    assert found["1"].before.norm != found["1"].after.norm


@pytest.mark.usefixtures("short")
def test_a_router_that_takes_no_other_count_is_noticed(tmp_path: Path) -> None:
    """The check counts what the router really chose, not what the config asked for."""
    build("phimoe", tmp_path)
    with pytest.raises(UnsupportedError, match="sends a token to 2 experts when asked for 1"):
        samples(tmp_path, "phimoe", experts=2, trained_experts=1)


@pytest.mark.usefixtures("short")
def test_samples_hold_what_the_report_shows(tmp_path: Path) -> None:
    """Moments, percentiles by rank and correlation are those of that router's weights."""
    build("mixtral", tmp_path)
    for sample in samples(tmp_path, "mixtral", experts=3).values():
        for moments, k in ((sample.before, 2), (sample.after, 3)):
            assert moments.experts == k == len(moments.ranks)
            assert moments.squared_sum == pytest.approx(1, abs=1e-5)
            assert 1 / k < moments.squares < 1
            assert all(low <= middle <= high for low, middle, high in moments.ranks)
            middles = [middle for _, middle, _ in moments.ranks]
            assert middles == sorted(middles, reverse=True)
        assert sample.correlation is not None
        assert -1 < sample.correlation < 1


@pytest.mark.usefixtures("short")
def test_the_correlation_is_that_of_the_experts_own_outputs(tmp_path: Path) -> None:
    """With equal experts the correlation is 1; the expected norm is then the measured one."""
    build("mixtral", tmp_path, fused=True)
    tensors = tiny_models._read(tmp_path)
    for name, tensor in tensors.items():
        if ".experts." in name:
            tensor.copy_(tensor[:1].expand_as(tensor).clone())
    tiny_models._write(tmp_path, tensors)
    for sample in samples(tmp_path, "mixtral", experts=3).values():
        assert sample.correlation == pytest.approx(1, abs=1e-5)
        assert sample.before.norm == pytest.approx(sample.after.norm, rel=1e-5)


@pytest.mark.usefixtures("short")
def test_a_model_larger_than_the_memory_lies_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With little memory the figures are the same, and the offload folder is removed."""
    source, offload = tmp_path / "source", tmp_path / "offload"
    offload.mkdir()
    build("mixtral", source)
    monkeypatch.setattr(tempfile, "tempdir", str(offload))
    whole = samples(source, "mixtral", experts=3)
    lain: list[str] = []
    forward = runner.forward

    def checked_forward(model: Any, ids: Any) -> None:
        lain.extend(path.name for path in offload.rglob("*.safetensors"))
        assert any(parameter.device.type == "meta" for parameter in model.parameters())
        forward(model, ids)

    monkeypatch.setattr(runner, "forward", checked_forward)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    assert samples(source, "mixtral", experts=3, max_memory=size // 2) == whole
    assert any("experts" in name for name in lain)
    assert not list(offload.iterdir())


def test_no_room_for_what_exceeds_the_memory_is_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The free disk space is checked before the model is loaded."""
    build("mixtral", tmp_path)
    monkeypatch.setattr(runner.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 7}))
    with pytest.raises(SourceError, match=r"max-memory: .* 7 B are free\nFree some space"):
        samples(tmp_path, "mixtral", experts=3, max_memory=1000)


def test_a_model_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    """A missing tensor is not replaced by random values."""
    build("mixtral", tmp_path, fused=True)
    tensors = tiny_models._read(tmp_path)
    del tensors["model.norm.weight"]
    tiny_models._write(tmp_path, tensors)
    with pytest.raises(SourceError, match=r"missing keys: model\.norm\.weight"):
        samples(tmp_path, "mixtral", experts=3)


def in_fp8(folder: Path, config: dict[str, Any]) -> None:
    """Store the matrices of a checkpoint as 8-bit codes with one scale each."""
    stored = {}
    for name, tensor in tiny_models._read(folder).items():
        stored[name] = tensor.to(torch.bfloat16)
        if name.endswith("proj.weight"):
            scale = tensor.abs().max() / 448
            stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
            stored[f"{name}_scale_inv"] = scale.reshape(1, 1)
    tiny_models._write(folder, stored)
    old = json.loads((folder / "config.json").read_text())
    new = {**old, "dtype": "bfloat16", "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(new))


@pytest.mark.usefixtures("short")
def test_fp8_is_measured_as_what_it_stands_for(tmp_path: Path) -> None:
    """The factors are those of the model before quantisation, within its rounding."""
    build("qwen3_moe", tmp_path)
    plain = samples(tmp_path, "qwen3_moe", experts=3).values()
    blocks = {"weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    in_fp8(tmp_path, {"quant_method": "fp8", **blocks})
    found = samples(tmp_path, "qwen3_moe", experts=3).values()
    wanted = [s.before.norm / s.after.norm for s in plain]
    assert [s.before.norm / s.after.norm for s in found] == pytest.approx(wanted, rel=0.02)


@pytest.mark.usefixtures("short")
def test_codes_without_their_scales_are_not_measured(tmp_path: Path) -> None:
    """A format that transformers ignores is refused, and so is one whose library is missing.

    Transformers only warns about an unknown format, and would run the codes as weights.
    """
    build("qwen3_moe", tmp_path)
    in_fp8(tmp_path, {"quant_method": "unheard of"})
    with pytest.raises(UnsupportedError, match=r"down_proj: transformers does not read this quant"):
        samples(tmp_path, "qwen3_moe", experts=3)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="cannot handle the model: "):
        samples(tmp_path, "qwen3_moe", experts=3)


def test_remote_code_is_never_run(tmp_path: Path) -> None:
    """A type that transformers only supports by remote code is refused; no code is imported."""
    build("mixtral", tmp_path)
    config = (tmp_path / "config.json").read_text()
    config = config.replace('"model_type": "mixtral"', '"model_type": "remote_moe"')
    own = '{\n  "auto_map": {"AutoConfig": "remote.Config", "AutoModel": "remote.Model"},'
    (tmp_path / "config.json").write_text(config.replace("{", own, 1))
    (tmp_path / "remote.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UnsupportedError, match=r"'remote_moe' needs remote code, which is never"):
        samples(tmp_path, "mixtral", experts=3, arch="mixtral")
    assert not (tmp_path / "ran").exists()


# The text ------------------------------------------------------------------------------------


def test_bytes_are_tokens_where_the_vocabulary_is_one_of_bytes(tmp_path: Path) -> None:
    """Without a tokeniser, 256 token ids are bytes; only the first 65,536 are used."""
    text, empty = tmp_path / "text", tmp_path / "model"
    empty.mkdir()
    text.write_bytes(bytes(range(256)) * 300)
    found = read_text(text, empty, 256)
    assert found.unit == "bytes"
    assert found.tokens == tuple(bytes(range(256)) * 256)
    assert len(found.tokens) == MAX_TOKENS
    with pytest.raises(UnsupportedError, match="a vocabulary of 32,000 cannot be raw bytes"):
        read_text(text, empty, 32_000)


def test_a_short_text_is_refused(tmp_path: Path) -> None:
    """The error gives the length and the required length."""
    text = tmp_path / "text"
    text.write_bytes(b"a" * (MIN_TOKENS - 1))
    with pytest.raises(UsageError, match=r"has 2,047 bytes, needs 2,048"):
        read_text(text, tmp_path, 256)
    text.write_bytes(b"a" * MIN_TOKENS)
    assert len(read_text(text, tmp_path, 256).tokens) == MIN_TOKENS


LINE = json.dumps({"text": "a" * MIN_TOKENS, "tokens": 17})


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        ("[" * 100_000, "line 4 is not valid JSON"),
        ('{"text": "a \\ud800"}', "the text of line 4 has a lone surrogate"),
        ('{"tokens": [1]}', "line 4 has no field text"),
    ],
)
def test_a_line_of_json_that_is_no_text_is_named(bad: str, why: str, tmp_path: Path) -> None:
    """The error gives the line number in the file; empty lines count."""
    text = tmp_path / "text.jsonl"
    text.write_text(f"{LINE}\n\n{LINE}\n{bad}\n")
    with pytest.raises(UsageError, match=why):
        read_text(text, tmp_path, 256)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_string_of_json_may_hold_what_else_ends_a_line(end: str, tmp_path: Path) -> None:
    """A JSON string may contain U+2028 and the like; a field ``tokens`` may be a plain count."""
    text = tmp_path / "text.JSONL"
    lines = [LINE, json.dumps({"text": "b\u2028\x85c"}, ensure_ascii=False)]
    text.write_text(end.join(lines) + end, encoding="utf-8", newline="")
    assert bytes(read_text(text, tmp_path, 256).tokens) == b"%s\n\n%s" % (
        b"a" * MIN_TOKENS,
        "b\u2028\x85c".encode(),
    )


@pytest.mark.parametrize("tokens", range(MIN_TOKENS, MIN_TOKENS + 300, 7))
def test_what_is_held_back_is_two_sequences_at_least(tokens: int) -> None:
    """One sequence has no standard error; an incomplete sequence goes to the held-back text."""
    some, held_back = Text(tuple(range(tokens)), length=256).split(256, 0.25)
    assert some.tokens + held_back.tokens == tuple(range(tokens))
    assert len(some.tokens) % 256 == 0
    assert tokens / 4 <= len(held_back.tokens) < tokens / 4 + 256
    assert Text((0,) * 20480, length=256).split(256, 0.25)[1].tokens == (0,) * 5120


def test_tokens_in_one_long_row_are_cut_as_a_text_is(tmp_path: Path) -> None:
    """A row may be longer than the model's context."""
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "", "tokens": [1] * 3_000}))
    assert read_text(text, tmp_path, 256).length is None


def with_tokeniser(folder: Path) -> None:
    """A word-level tokeniser that begins every sequence with <s>."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<s>": 0, "<unk>": 1, "a": 2, "é": 3}, unk_token="<unk>"))
    words.pre_tokenizer = WhitespaceSplit()
    words.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>").save_pretrained(folder)


def test_a_text_is_read_with_the_models_own_tokeniser(tmp_path: Path) -> None:
    """The text's tokens are the tokeniser's; its start tokens go before every sequence."""
    text, model = tmp_path / "text.txt", tmp_path / "model"
    model.mkdir()
    with_tokeniser(model)
    text.write_text("a é " * 2_000, encoding="utf-8")
    found = read_text(text, model, 4)
    assert found.tokens == (2, 3) * 2_000
    assert found.start == (0,)
    assert found.unit == "tokens"
    batch = next(runner.batches(found.tokens, found.start, 8))
    assert batch[1].tolist() == [0, 3, 2, 3, 2, 3, 2, 3]
    text.write_bytes(b"a \xff " * 2_000)
    with pytest.raises(UsageError, match=r"is not UTF-8 text \(byte 2\)"):
        read_text(text, model, 4)


def test_a_text_may_be_longer_than_the_tokeniser_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The text is run in pieces, so the library's warning would not help."""
    from transformers import AutoTokenizer, tokenization_utils_base

    said: list[Any] = []
    monkeypatch.setattr(tokenization_utils_base.logger, "warning", lambda *a: said.append(a))
    with_tokeniser(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_max_length": 16}))
    text = tmp_path / "text.txt"
    text.write_text("a " * 3_000)
    assert len(read_text(text, tmp_path, 4).tokens) == 3_000
    assert said == []
    AutoTokenizer.from_pretrained(tmp_path)("a " * 17)
    assert len(said) == 1


@pytest.mark.parametrize("tokens", [100, 128, 129, 1000])
def test_every_token_of_the_text_is_run_once(tokens: int) -> None:
    """All sequences but the last are as long as the context; the batch size is bounded."""
    text = tuple(range(tokens))
    found = list(runner.batches(text, (7777,), 33))
    rows = [row[1:] for batch in found for row in batch.tolist()]
    assert [token for row in rows for token in row] == list(text)
    assert all(batch.numel() <= runner.TOKENS_PER_BATCH for batch in found)
    assert all(row[0] == 7777 for batch in found for row in batch.tolist())


# The rule through the API --------------------------------------------------------------------


def test_a_block_for_a_second_token_gets_the_factor_of_the_last_layer(tmp_path: Path) -> None:
    """Layers that transformers does not run still get a factor, and the provenance says so."""
    source, text = tmp_path / "source", tmp_path / "text"
    build("deepseek_v3", source, mtp=True, config={"vocab_size": 256})
    text.write_bytes(bytes(range(256)) * 8)
    plan = api.plan(source, experts=3, rule="measured", calibrate=text)
    assert plan.factors["3"] == plan.factors["2"] != plan.factors["1"]
    assert plan.calibration["as_the_last_layer"] == ["3"]
