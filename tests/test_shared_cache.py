"""A prefix that is shared through the model's own cache, against its plain twin: every row by itself, nothing shared."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import labeltune
from helpers.packing import FP32, VOCABULARY, assert_equal, lora_model, packed, plain, random_rows
from helpers.tiny_models import CACHE_KINDS, HYBRID_KINDS, MODEL_KINDS, make_model, make_tokenizer
from helpers.training import adapter_weights, config_for, logged, without_dropout
from labeltune.io.run_folder import checkpoints
from labeltune.models.precision import weights_in
from labeltune.training.loss import chunkable_head
from labeltune.training.packing import CALL_TOKENS, Pack, Row, pack_step
from labeltune.training.self_check import Choice, choose_packing, sample_rows

KINDS = MODEL_KINDS | HYBRID_KINDS | CACHE_KINDS


def model_of(kind: str) -> Any:
    if not hasattr(transformers, KINDS[kind][0]):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    return lora_model(kind)


def packs_of(rows: list[Row], budget: int = 10_000, call_tokens: int = 32) -> list[Pack]:
    return pack_step(rows, budget, "shared_cache", call_tokens=call_tokens)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_every_gradient_are_those_of_single_rows(kind: str) -> None:
    """In fp32 to 1e-4: 2e-6 where layers attend, 1e-5 behind a Gated DeltaNet, whose chunks of 64 tokens begin elsewhere."""
    model, rows = model_of(kind), random_rows(text=40)
    right = plain(model, rows)
    head = chunkable_head(model, torch.tensor([rows[0].ids]))
    for budget, call_tokens in ((100, 4), (10_000, 4), (10_000, 4096)):
        packs = packs_of(rows, budget, call_tokens)
        assert any(group.prefix for pack in packs for group in pack.groups)
        assert_equal(packed(model, rows, packs, "shared_cache", head), right, rtol=1e-4)
    assert_equal(packed(model, rows, packs, "shared_cache", None), right, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lfm2", "qwen3_5", "falcon_h1"])
@pytest.mark.parametrize("prefix", [1, 2, 3, 64, 130])
def test_prefixes_shorter_than_a_convolution_and_longer_than_a_chunk(kind: str, prefix: int) -> None:
    model, rows = model_of(kind), random_rows(prefixes=(prefix,), text=30)
    assert_equal(packed(model, rows, packs_of(rows), "shared_cache", None), plain(model, rows), rtol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_5", "lfm2", "gemma2", "granitemoehybrid"])
def test_in_bf16_it_is_as_far_from_fp32_as_single_rows_are(kind: str) -> None:
    model, rows = model_of(kind).to(torch.bfloat16), random_rows(text=40)
    with weights_in(model, torch.float32):
        right = plain(model, rows)

    def error(found: tuple[float, dict[str, Any]]) -> float:
        off = sum(float((found[1][n].float() - g).square().sum()) for n, g in right[1].items())
        return (off / sum(float(g.square().sum()) for g in right[1].values())) ** 0.5

    own = error(plain(model, rows))
    assert 1e-4 < own < 0.1
    assert error(packed(model, rows, packs_of(rows), "shared_cache", None)) < 2 * own


@pytest.mark.parametrize(
    "kind", ["gemma2", "gpt_oss", "qwen3_next", "granitemoehybrid", "falcon_h1", "mamba2"]
)
def test_the_check_finds_models_that_share_by_their_cache_only(kind: str) -> None:
    said: list[str] = []
    rows = sample_rows(random_rows(prefixes=(12,), text=30))
    found = choose_packing(model_of(kind), rows, "shared_prefix", FP32, 0, head=None, say=said.append)
    assert found == Choice("shared_cache")
    assert len(said) == 1 and said[0].startswith("the shared prefix goes through the model's own cache")


def test_a_cache_that_cannot_be_repeated_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, as with Mamba's, which begins anew behind its cache, the next plainer way is taken."""
    model = lora_model("lfm2")
    inner = model.get_base_model()
    plain_forward = inner.forward

    def forward(*args: Any, **options: Any) -> Any:
        output = plain_forward(*args, **options)
        output.past_key_values = None
        return output

    monkeypatch.setattr(inner, "forward", forward)
    said: list[str] = []
    rows = sample_rows(random_rows(prefixes=(12,)))
    found = choose_packing(model, rows, "shared_prefix", FP32, 0, head=None, say=said.append)
    assert found == Choice("padded")
    assert "the model returns no cache" in said[0]


def counted_tokens(model: Any, rows: list[Row], packs: list[Pack]) -> int:
    """Tokens that go into the embedding layer."""
    counts: list[int] = []
    hook = model.get_input_embeddings().register_forward_pre_hook(
        lambda module, inputs: counts.append(inputs[0].numel())
    )
    packed(model, rows, packs, "shared_cache", None)
    hook.remove()
    return sum(counts)


def test_the_prefix_is_computed_once_and_little_is_padded() -> None:
    generator = random.Random(0)
    prompts = [
        [*range(3, 103), *(generator.randrange(3, 300) for _ in range(generator.randrange(5, 40)))]
        for _ in range(16)
    ]
    rows = [Row.of([*prompt, 7, 8, 2], len(prompt), len(prompt) + 3) for prompt in prompts]
    (pack,) = packs_of(rows, call_tokens=CALL_TOKENS)
    (group,) = pack.groups
    assert group.prefix == 100
    computed = counted_tokens(lora_model("lfm2"), rows, [pack])
    own = sum(len(row.ids) - 100 for row in rows)
    assert computed == pack.tokens(rows, "shared_cache") == group.tokens(rows)
    assert 100 + own <= computed < 100 + 1.3 * own
    # On a device where calls are dear, all rows are one batch; where they cost nothing, nothing is padded.
    assert [len(g.batches) for (g,) in (p.groups for p in packs_of(rows, call_tokens=2048))] == [1]
    (whole,) = packs_of(rows, call_tokens=0)
    assert whole.tokens(rows, "shared_cache") == 100 + own


@pytest.mark.parametrize("processes", [1, 3])
@pytest.mark.parametrize("budget", [30, 60, 10_000])
def test_packs_hold_every_row_once_within_the_budget(budget: int, processes: int) -> None:
    rows = random_rows(prefixes=(20, 9, 2), text=30)
    shares = pack_step(rows, budget, "shared_cache", processes)
    assert len({len(share) for share in shares}) == 1
    counted = [pack for share in shares for pack in share if pack.counted]
    assert sorted(i for pack in counted for i in pack.rows) == list(range(len(rows)))
    for pack in (pack for share in shares for pack in share):
        (group,) = pack.groups
        assert sorted(i for batch in group.batches for i in batch) == sorted(group.rows)
        assert len(pack.rows) == 1 or pack.tokens(rows, "shared_cache") <= budget
        prefixes = {rows[i].ids[: group.prefix] for i in group.rows}
        # Every batch has two columns at least, and every answer is predicted behind the prefix.
        assert len(prefixes) == 1 and all(
            len(rows[i].ids) - group.prefix >= 2 or not group.prefix for i in group.rows
        )
        assert all(group.prefix < rows[i].answer_start for i in group.rows)


def test_a_pack_that_is_too_wide_is_padded_less_before_it_is_cut() -> None:
    rows = [Row.of([*range(3, 53), *range(60, 60 + own), 7, 2], 50 + own, 52 + own) for own in (40, 3, 2, 4)]
    assert len(packs_of(rows, 160, 4096)) == 1
    assert len(packs_of(rows, 10_000, 4096)[0].groups[0].batches) == 1
    assert len(packs_of(rows, 160, 4096)[0].groups[0].batches) > 1


def test_a_capped_output_layer_is_noticed_however_small_the_logits_are() -> None:
    from transformers import AutoModelForCausalLM, Gemma2Config

    shape = make_model(VOCABULARY, "gemma2").config.to_dict()
    model = AutoModelForCausalLM.from_config(Gemma2Config(**{**shape, "final_logit_softcapping": 30.0}))
    ids = torch.tensor([[5, 6, 7]])
    assert float(model(ids).logits.detach().abs().max()) < 2
    assert chunkable_head(model, ids) is None


@pytest.fixture
def hybrid_folder(in_folder: Path) -> Path:
    """A model of short convolutions and attention, with its tokenizer."""
    tokenizer = make_tokenizer()
    make_model(len(tokenizer), "lfm2").save_pretrained(in_folder / "hybrid")
    tokenizer.save_pretrained(in_folder / "hybrid")
    return in_folder / "hybrid"


@pytest.mark.filterwarnings("ignore:prediction uses the model's own cache")
def test_a_run_shares_by_the_cache_and_ends_where_a_padded_run_does(
    in_folder: Path, hybrid_folder: Path
) -> None:
    config = without_dropout(config_for(in_folder, hybrid_folder, max_steps=4, save_steps=1000))
    said: list[str] = []
    found = labeltune.train(config, say=said.append)
    assert any("steps: packing=shared_cache" in line for line in said), "\n".join(said)
    assert not any(line.startswith("warning: training.packing") for line in said)
    saved = logged(found.last, "tokens_saved")[-1]["tokens_saved"]
    assert saved > 0.2
    shared = adapter_weights(found.last)
    options = config.training.model_copy(update={"packing": "padded"})
    padded = labeltune.train(config.model_copy(update={"training": options}), overwrite=True)
    for name, tensor in adapter_weights(padded.last).items():
        torch.testing.assert_close(shared[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore:prediction uses the model's own cache")
def test_a_resumed_run_is_the_same_to_the_last_bit(in_folder: Path, hybrid_folder: Path) -> None:
    """With dropout, whose masks the prefix and the rows behind it draw one after the other."""
    torch.set_num_threads(1)
    config = config_for(in_folder, hybrid_folder, max_steps=4, save_steps=2)
    assert config.lora.dropout > 0
    whole = adapter_weights(labeltune.train(config).last)
    shutil.rmtree(checkpoints(Path(config.output_dir))[-1])
    resumed = adapter_weights(labeltune.train(config, resume=True).last)
    assert set(resumed) == set(whole) and all(torch.equal(resumed[name], whole[name]) for name in whole)
