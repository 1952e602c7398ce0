"""Tied heads: the config's word counts, whatever is stored and in whatever order the models stand."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from plan.sketches import EMBEDDING, HEAD, config, llama, name_inputs, plan_of, write_sketch

from mergemill.engine.checkpoint.family import choose_family, find_side, find_tie, is_head, is_vocabulary
from mergemill.engine.plan.coverage import COPY_UNUSED
from mergemill.engine.plan.values import Plan


@pytest.fixture(autouse=True)
def _models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tied models, of which one stores a copy as its head, and one that is not tied."""
    monkeypatch.chdir(tmp_path)
    write_sketch(Path("tied"), llama(tied=True), config=config(tied=True))
    write_sketch(Path("copy"), llama(tied=False), config=config(tied=True))
    write_sketch(Path("untied"), llama(tied=False), config=config(tied=False))


def linear(*models: str) -> dict[str, Any]:
    return {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1}}


def written_config(plan: Plan) -> dict[str, Any]:
    text = next(file.data for file in plan.files if file.name == "config.json")
    assert text is not None
    return dict(json.loads(text))


@pytest.mark.parametrize("models", [("tied", "copy"), ("copy", "tied"), ("copy",), ("copy", "copy")])
def test_tied_models_of_which_one_stores_a_copy_stay_tied_and_write_no_head(models: tuple[str, ...]) -> None:
    plan = plan_of(linear(*models))
    assert HEAD not in name_inputs(plan)
    assert written_config(plan)["tie_word_embeddings"] is True
    copy = next(source for source in plan.sources if source.model == "copy")
    assert copy.dropped == {COPY_UNUSED: 1}
    assert any(f"copy stores {HEAD} though its config says that it is tied to {EMBEDDING}" in w for w in plan.warnings)


@pytest.mark.parametrize("models", [*itertools.permutations(["tied", "copy", "untied"])])
def test_the_head_does_not_depend_on_the_order_of_the_models(models: tuple[str, ...]) -> None:
    plan = plan_of(linear(*models))
    assert sorted(name_inputs(plan)[HEAD]) == [f"copy:{EMBEDDING}", f"tied:{EMBEDDING}", f"untied:{HEAD}"]
    assert written_config(plan)["tie_word_embeddings"] is False


def test_a_head_is_kept_of_a_class_that_ties_none_whatever_its_config_says() -> None:
    for model in ("a", "b"):
        said = config(tied=True) | {"architectures": ["BigBirdPegasusForCausalLM"]}
        write_sketch(Path(model), llama(tied=False), config=said)
    assert sorted(name_inputs(plan_of(linear("a", "b")))[HEAD]) == [f"a:{HEAD}", f"b:{HEAD}"]


def test_a_model_that_does_not_say_whether_it_is_tied_keeps_the_head_that_it_stores() -> None:
    silent = config(tied=False)
    del silent["tie_word_embeddings"]
    write_sketch(Path("silent"), llama(tied=False), config=silent)
    assert name_inputs(plan_of(linear("silent", "untied")))[HEAD] == (f"silent:{HEAD}", f"untied:{HEAD}")


# A family of each pair that transformers 5.23.0 ties (`_tied_weights_keys`): the head, and what stands for it.
TIES = [
    ("bert", "cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("deberta", "cls.predictions.decoder.weight", "deberta.embeddings.word_embeddings.weight"),
    ("ernie", "cls.predictions.decoder.weight", "ernie.embeddings.word_embeddings.weight"),
    ("fnet", "cls.predictions.decoder.weight", "fnet.embeddings.word_embeddings.weight"),
    ("layoutlm", "cls.predictions.decoder.weight", "layoutlm.embeddings.word_embeddings.weight"),
    ("lxmert", "cls.predictions.decoder.weight", "lxmert.embeddings.word_embeddings.weight"),
    ("mobilebert", "cls.predictions.decoder.weight", "mobilebert.embeddings.word_embeddings.weight"),
    ("mra", "cls.predictions.decoder.weight", "mra.embeddings.word_embeddings.weight"),
    ("nomic_bert", "cls.predictions.decoder.weight", "nomic_bert.embeddings.word_embeddings.weight"),
    ("nystromformer", "cls.predictions.decoder.weight", "nystromformer.embeddings.word_embeddings.weight"),
    ("roc_bert", "cls.predictions.decoder.weight", "roc_bert.embeddings.word_embeddings.weight"),
    ("roformer", "cls.predictions.decoder.weight", "roformer.embeddings.word_embeddings.weight"),
    ("tapas", "cls.predictions.decoder.weight", "tapas.embeddings.word_embeddings.weight"),
    ("squeezebert", "cls.predictions.decoder.weight", "transformer.embeddings.word_embeddings.weight"),
    ("visual_bert", "cls.predictions.decoder.weight", "visual_bert.embeddings.word_embeddings.weight"),
    ("yoso", "cls.predictions.decoder.weight", "yoso.embeddings.word_embeddings.weight"),
    ("fsmt", "decoder.output_projection.weight", "decoder.embed_tokens.weight"),
    ("modernbert", "decoder.weight", "model.embeddings.tok_embeddings.weight"),
    ("gpt_neox_japanese", "embed_out.weight", "gpt_neox_japanese.embed_in.weight"),
    ("convbert", "generator_lm_head.weight", "convbert.embeddings.word_embeddings.weight"),
    ("electra", "generator_lm_head.weight", "electra.embeddings.word_embeddings.weight"),
    ("ultrabert", "head.decoder.weight", "model.embed_tokens.weight"),
    ("rwkv", "head.weight", "rwkv.embeddings.weight"),
    ("bert-generation", "lm_head.decoder.weight", "bert.embeddings.word_embeddings.weight"),
    ("data2vec-text", "lm_head.decoder.weight", "data2vec_text.embeddings.word_embeddings.weight"),
    ("esm", "lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight"),
    ("gte", "lm_head.decoder.weight", "gte.embeddings.word_embeddings.weight"),
    ("longformer", "lm_head.decoder.weight", "longformer.embeddings.word_embeddings.weight"),
    ("mpnet", "lm_head.decoder.weight", "mpnet.embeddings.word_embeddings.weight"),
    ("camembert", "lm_head.decoder.weight", "roberta.embeddings.word_embeddings.weight"),
    ("roberta-prelayernorm", "lm_head.decoder.weight", "roberta_prelayernorm.embeddings.word_embeddings.weight"),
    ("t5gemma", "lm_head.out_proj.weight", "model.decoder.embed_tokens.weight"),
    ("t5gemma2", "lm_head.out_proj.weight", "model.encoder.text_model.embed_tokens.weight"),
    ("falcon_mamba", "lm_head.weight", "backbone.embeddings.weight"),
    ("funnel", "lm_head.weight", "funnel.embeddings.word_embeddings.weight"),
    ("gpt_neox", "lm_head.weight", "gpt_neox.embed_in.weight"),
    ("led", "lm_head.weight", "led.shared.weight"),
    ("bart", "lm_head.weight", "model.decoder.embed_tokens.weight"),
    ("kyutai_speech_to_text", "lm_head.weight", "model.embed_tokens.embed_tokens.weight"),
    ("afmoe", "lm_head.weight", "model.embed_tokens.weight"),
    ("neomme", "lm_head.weight", "model.embed_tokens.word_embeddings.weight"),
    ("aria", "lm_head.weight", "model.language_model.embed_tokens.weight"),
    ("florence2", "lm_head.weight", "model.language_model.shared.weight"),
    ("bart", "lm_head.weight", "model.shared.weight"),
    ("emu3", "lm_head.weight", "model.text_model.embed_tokens.weight"),
    ("modernvbert", "lm_head.weight", "model.text_model.embeddings.tok_embeddings.weight"),
    ("prophetnet", "lm_head.weight", "prophetnet.word_embeddings.weight"),
    ("longt5", "lm_head.weight", "shared.weight"),
    ("openai-gpt", "lm_head.weight", "transformer.tokens_embed.weight"),
    ("ctrl", "lm_head.weight", "transformer.w.weight"),
    ("bloom", "lm_head.weight", "transformer.word_embeddings.weight"),
    ("codegen", "lm_head.weight", "transformer.wte.weight"),
    ("xlnet", "lm_loss.weight", "transformer.word_embedding.weight"),
    ("git", "output.weight", "git.embeddings.word_embeddings.weight"),
    ("biogpt", "output_projection.weight", "biogpt.embed_tokens.weight"),
    ("trocr", "output_projection.weight", "model.decoder.embed_tokens.weight"),
    ("flaubert", "pred_layer.proj.weight", "transformer.embeddings.weight"),
    ("albert", "predictions.decoder.weight", "albert.embeddings.word_embeddings.weight"),
    ("canary", "proj_out.weight", "model.decoder.embed_tokens.weight"),
    ("blip", "text_decoder.cls.predictions.decoder.weight", "text_decoder.bert.embeddings.word_embeddings.weight"),
    ("speecht5", "text_decoder_postnet.lm_head.weight", "speecht5.decoder.prenet.embed_tokens.weight"),
    ("kosmos-2", "text_model.lm_head.weight", "text_model.model.embed_tokens.weight"),
    ("distilbert", "vocab_projector.weight", "distilbert.embeddings.word_embeddings.weight"),
]


@pytest.mark.parametrize(("kind", "head", "embedding"), TIES)
def test_heads_are_known_by_every_name_that_transformers_ties(kind: str, head: str, embedding: str) -> None:
    family = choose_family({"model_type": kind})
    assert find_tie(head, [head, embedding], family) == embedding
    assert is_head(head, family)
    assert is_vocabulary(head, family)
    assert is_vocabulary(embedding, family)
    assert (find_side(head, family), find_side(embedding, family)) == ("after", "before")
