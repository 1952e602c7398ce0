"""A model with the tokenizer of another, as the command makes it: row by row, cut into parts, resumed and replayed."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from models import write_llama
from oracles import transplants as oracles
from runs.buckets import found_by_environment, new_place
from runs.merging import hash_output, parts_of, run_until
from safetensors.torch import load_file, save_file
from servers.s3 import S3
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from mergemill.cli.main import execute
from mergemill.engine import describe_plan, make_convert_plan, make_plan, make_transplant_plan, run, verify
from mergemill.engine.errors import InputError, RunError
from mergemill.engine.plan.values import Plan
from mergemill.engine.transplants import methods

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
MODEL_TOKENS, DONOR_TOKENS = 3000, 2600
SHARED = 1900  # the donor's ids from 700 on are the model's from 1,000 on
MODEL_ROWS, DONOR_ROWS = 3008, 2624
K = 6
PART = 1 << 18

Tensors = Mapping[str, np.ndarray]


def write_tokenizer(folder: Path, tokens: list[str], **roles: str) -> None:
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": number, "content": token, **special} for number, token in enumerate(tokens) if token[0] == "<"]
    vocab = {token: number for number, token in enumerate(tokens)}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    written = {"version": "1.0", "added_tokens": added, "pre_tokenizer": level, "decoder": level, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(written))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **{f"{role}_token": each for role, each in roles.items()}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model with a head, and of a narrower donor without one. Not to be changed."""
    folder = tmp_path_factory.mktemp("pair")
    sizes: dict[str, Any] = {"layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 32, "dtype": "float32"}
    write_llama(folder / "model", seed=1, hidden=64, vocab=MODEL_ROWS, **sizes)
    write_llama(folder / "donor", seed=2, hidden=32, vocab=DONOR_ROWS, tied=True, **sizes)
    letters = [chr(ord("a") + i) for i in range(26)]
    own = ["<s>", "</s>", *letters, *(f"own{i}" for i in range(28, MODEL_TOKENS))]
    theirs = ["<|end|>", *(f"new{chr(97 + i % 26)}{i}" for i in range(1, DONOR_TOKENS))]
    theirs[700:] = [f"own{i - 700 + 1000}" for i in range(700, DONOR_TOKENS)]
    write_tokenizer(folder / "model", own, bos="<s>", eos="</s>")
    write_tokenizer(folder / "donor", theirs, eos="<|end|>")
    (folder / "donor" / "generation_config.json").write_text('{"eos_token_id": [0, 5]}')
    (folder / "donor" / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def plan(pair: Path, method: str = "omp", part_bytes: int = 1 << 30, **options: Any) -> Plan:
    with parts_of(part_bytes):
        return make_transplant_plan(str(pair / "model"), str(pair / "donor"), **{"method": method, "k": K, **options})


def load(folder: Path) -> Tensors:
    found = {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}
    return {name: each.double().numpy() for name, each in found.items()}


@pytest.fixture(scope="module")
def given(pair: Path) -> tuple[Tensors, Tensors]:
    return load(pair / "model"), load(pair / "donor")


@pytest.fixture(scope="module")
def omp(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What omp makes where no tensor is cut."""
    out = tmp_path_factory.mktemp("omp") / "out"
    assert execute(["transplant", str(pair / "model"), str(pair / "donor"), str(out), "-k", str(K), "--quiet"]) == 0
    return out


def shared_rows(given: tuple[Tensors, Tensors], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the donor's rows and the model's of the tokens that both have, in the order of donor ids, and new ones."""
    model, donor = given
    x = donor[EMBEDDING]
    return (
        np.vstack([x[:1], x[700:DONOR_TOKENS]]),
        np.vstack([model[name][1:2], model[name][1000 : 1000 + SHARED]]),
        x[1:700],
    )


def check_rest(out: Path, given: tuple[Tensors, Tensors]) -> None:
    """Rows of shared tokens are the model's, padding is its mean row, and every other tensor is copied."""
    model, found = given[0], load(out)
    for name in (EMBEDDING, HEAD):
        assert found[name].shape == (DONOR_ROWS, 64)
        assert (found[name][0] == model[name][1]).all(), "the end is the end"
        assert (found[name][700:DONOR_TOKENS] == model[name][1000 : 1000 + SHARED]).all()
        mean = model[name][:MODEL_TOKENS].mean(0)
        np.testing.assert_allclose(found[name][DONOR_TOKENS:], np.tile(mean, (24, 1)), atol=1e-7)
    assert all((found[name] == model[name]).all() for name in model.keys() - {EMBEDDING, HEAD})


def test_omp_of_the_command_is_that_of_the_formula(omp: Path, given: tuple[Tensors, Tensors]) -> None:
    check_rest(omp, given)
    found = load(omp)
    for name in (EMBEDDING, HEAD):
        x, w, y = shared_rows(given, name)
        for row in (0, 1, 350, 698):
            np.testing.assert_allclose(found[name][1 + row], oracles.omp(y[row], x, w, K), atol=1e-6)


Oracle = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
FORMULAS: Mapping[str, Oracle] = {
    "common_interpolation": lambda y, x, w: oracles.interpolation(y, x, w, K, "euclidean", "distance_proportional"),
    "landmark_pca": oracles.landmark_pca,
    "stb": lambda y, x, w: oracles.stb(y, x, w, K),
    "focus": oracles.focus,
    "wechsel": oracles.wechsel,
    "mp_rope": lambda y, x, w: oracles.mp_rope(y, x, w, K, (16, 1e4), (32, 1e4)),
    "zero": lambda y, x, w: np.zeros(64),
}


@pytest.mark.parametrize("method", [*FORMULAS, "mean", "subword", "randn", "john_hewitt"])
def test_each_method_streams_to_the_rows_of_its_formula(
    pair: Path, given: tuple[Tensors, Tensors], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(methods, "MOST_TOGETHER", 100)
    cut = plan(pair, method, part_bytes=PART, seed=3)
    assert len(cut.parts) > 4
    run(cut, tmp_path / "out", workers=0, threads=1)
    check_rest(tmp_path / "out", given)
    found, model = load(tmp_path / "out"), given[0]
    for name in (EMBEDDING, HEAD):
        x, w, y = shared_rows(given, name)
        new = found[name][1:700]
        if method in FORMULAS:
            for row in (0, 400, 698):
                np.testing.assert_allclose(new[row], FORMULAS[method](y[row], x, w), atol=2e-5)
        elif method == "mean":
            np.testing.assert_allclose(new, np.tile(model[name][:MODEL_TOKENS].mean(0), (699, 1)), atol=1e-7)
        elif method == "subword":  # "newb1": digits are in no token of the model
            np.testing.assert_allclose(new[0], model[name][:MODEL_TOKENS].mean(0), atol=1e-7)
        elif method == "randn":
            assert abs(new.std() - 1) < 0.02
        else:
            np.testing.assert_allclose(new.std(0), model[name][:MODEL_TOKENS].std(0), rtol=0.3)
    with parts_of(PART):
        assert verify(tmp_path / "out", replay=2).replayed == 2


def test_the_bytes_are_those_of_two_processes_of_four_threads_and_of_a_run_that_was_killed(
    pair: Path, omp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(methods, "MOST_TOGETHER", 100)
    cut = plan(pair, part_bytes=PART)
    assert len(cut.parts) > 4
    run(cut, tmp_path / "a" / "out", workers=2)
    run_until(cut, tmp_path / "b" / "out", 3)
    assert run(cut, tmp_path / "b" / "out", workers=0).redone_parts == len(cut.parts) - 3
    run(cut, tmp_path / "c" / "out", workers=0, threads=4)
    first, *others = [hash_output(tmp_path / each / "out") for each in "abc"]
    assert others == [first, first]
    whole, found = load(omp), load(tmp_path / "a" / "out")
    np.testing.assert_allclose(found[EMBEDDING], whole[EMBEDDING], atol=1e-6)


def test_configs_and_tokenizer_are_those_of_the_new_vocabulary(pair: Path, omp: Path) -> None:
    config = json.loads((omp / "config.json").read_text())
    before = json.loads((pair / "model" / "config.json").read_text())
    assert {key for key in config if config[key] != before.get(key)} <= {"vocab_size", "eos_token_id", "bos_token_id"}
    assert config["vocab_size"] == DONOR_ROWS
    assert json.loads((omp / "generation_config.json").read_text())["eos_token_id"] == [0, 5]
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (omp / name).read_bytes() == (pair / "donor" / name).read_bytes()
    card = (omp / "README.md").read_text()
    assert "# model with the tokenizer of donor\n" in card
    assert "**Orthogonal matching pursuit.**" in card
    assert str(pair) not in card


def test_transformers_loads_it_strictly(omp: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model, told = transformers.AutoModelForCausalLM.from_pretrained(str(omp), output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(omp))
    ids = torch.tensor([[tokenizer.convert_tokens_to_ids("own1234"), 0]])
    assert model(ids).logits.shape == (1, 2, DONOR_ROWS)


def test_tokens_of_a_config_alone_have_the_ids_that_a_loader_gives_them(tmp_path: Path) -> None:
    """A source's keep their rows: in a union another model's tokens had got them."""
    transformers = pytest.importorskip("transformers")
    words, end = [f"word{i}" for i in range(20)], {"content": "<|end|>", "special": True}
    alone = {"additional_special_tokens": ["<q>"], "pad_token": "[PAD]", "added_tokens_decoder": {"20": end}}
    for seed, (name, tokens) in enumerate({"own": words, "other": [*words, "new1", "new2"]}.items()):
        write_llama(tmp_path / name, seed=seed, layers=1, hidden=16, vocab=24, dtype="float32", heads=2, kv_heads=1)
        write_tokenizer(tmp_path / name, tokens)
    path = tmp_path / "own" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | alone))
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in ("own", "other")]
    run(make_plan({"merge_method": "linear", "models": models, "tokenizer_source": "union"}), tmp_path / "out")
    ids = {name: transformers.AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() for name in ("own", "out")}
    assert ids["out"] == {**ids["own"], "new1": 23, "new2": 24}
    found, own, other = (load(tmp_path / name)[EMBEDDING] for name in ("out", "own", "other"))
    assert np.array_equal(found, np.vstack([(own[:20] + other[:20]) / 2, own[20:23], other[20:22]]).astype(np.float32))


def test_the_command_shows_counts_and_lists_tokens(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["transplant", str(pair / "model"), str(pair / "donor"), str(tmp_path / "out")]
    assert execute([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "of 2,600 tokens 1,900 the same, 1 by role, 699 approximated" in said
    assert execute([*words, "--tokens", "--match", "text"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["      0  role          '<|end|>' = 1 '</s>'", "      1  approximated  'newb1'"]
    assert lines[700] == "    700  same          'own1000' = 1000 'own1000'"
    assert not (tmp_path / "out").exists()


def test_options_change_rows_alone(pair: Path, given: tuple[Tensors, Tensors], tmp_path: Path) -> None:
    run(plan(pair, "mean", noise=0.5, scale=2.0, pad_to_multiple_of=64, rows="tokens"), tmp_path / "out", workers=0)
    found = load(tmp_path / "out")[EMBEDDING]
    assert found.shape == (2624, 64)
    mean = given[0][EMBEDDING][:MODEL_TOKENS].mean(0)
    assert abs((found[1:700] / 2 - mean).std() - 0.5) < 0.02
    assert (found[700:800] == given[0][EMBEDDING][1000:1100]).all()


def write_broken(pair: Path, folder: Path) -> Path:
    """Return the folder of the pair whose donor has NaN in the row of a new token and of a shared one."""
    shutil.copytree(pair, folder)
    for path in (folder / "donor").glob("*.safetensors"):
        tensors = load_file(path)
        if EMBEDDING in tensors:
            tensors[EMBEDDING][[3, 900]] = torch.nan
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


def test_of_rows_without_numbers_none_is_made_that_looks_like_one(pair: Path, tmp_path: Path) -> None:
    broken = write_broken(pair, tmp_path / "pair")
    for method in ("omp", "common_interpolation", "focus"):
        committed = run(plan(broken, method), tmp_path / method, workers=0)
        found = np.isfinite(load(tmp_path / method)[EMBEDDING]).all(1)
        assert np.flatnonzero(~found).tolist() == [3]
        assert [(each.tensor, each.broken) for each in committed.guard.faults] == [(HEAD, 64), (EMBEDDING, 64)]
        assert committed.guard.most_changed == ()
    with pytest.raises(RunError, match="rows that landmark_pca goes by hold NaN or infinity"):
        run(plan(broken, "landmark_pca"), tmp_path / "out", workers=0)


def write_quantised(pair: Path, folder: Path) -> Path:
    """Write the pair with a donor whose embedding is FP8 in blocks, and one that has its values, `plain`."""
    shutil.copytree(pair, folder)
    shutil.copytree(pair / "donor", folder / "plain")
    (path,) = (pair / "donor").glob("*.safetensors")
    tensors = load_file(path)
    scales = torch.rand(-(-DONOR_ROWS // 128), 1, generator=torch.Generator().manual_seed(0)) / 1000 + 1e-4
    whole = scales.repeat_interleave(128, 0)[:DONOR_ROWS]
    codes = (tensors[EMBEDDING] / whole).clamp(-448, 448).to(torch.float8_e4m3fn)
    for name, more in {"plain": {EMBEDDING: codes.float() * whole}, "donor": {EMBEDDING: codes}}.items():
        more |= {f"{EMBEDDING}_scale_inv": scales} if name == "donor" else {}
        save_file(tensors | more, folder / name / path.name, metadata={"format": "pt"})
    config = json.loads((folder / "donor" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "donor" / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return folder


def test_a_quantised_donor_in_a_bucket_gives_the_rows_of_its_values(
    pair: Path, moto_server: S3, tmp_path: Path
) -> None:
    folder = write_quantised(pair, tmp_path / "pair")
    run(make_transplant_plan(str(folder / "model"), str(folder / "plain"), k=K), tmp_path / "plain", workers=0)
    with found_by_environment(moto_server):
        url = new_place(moto_server).fill(folder).url
        run(make_transplant_plan(f"{url}/model", f"{url}/donor", k=K), tmp_path / "far", workers=0)
    found, expected = load(tmp_path / "far"), load(tmp_path / "plain")
    assert all((found[name] == expected[name]).all() for name in expected)
    with pytest.raises(InputError, match=rf"{EMBEDDING} is F8_E4M3; a transplant needs BF16, F16, F32, F64"):
        make_transplant_plan(str(folder / "donor"), str(folder / "model"))


def write_quantised_donors(folder: Path, donor: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield the donor with an embedding of MXFP4, and as a file of Q8_0, with what packages make of that."""
    (path,) = donor.glob("*.safetensors")
    tensors, stream = load_file(path), torch.Generator().manual_seed(0)
    rows, columns = tensors.pop(EMBEDDING).shape
    blocks = torch.randint(0, 256, (rows, columns // 32, 16), generator=stream, dtype=torch.uint8)
    scales = torch.randint(118, 124, (rows, columns // 32), generator=stream, dtype=torch.uint8)
    shutil.copytree(donor, folder / "mxfp4")
    stored = {f"{EMBEDDING}_blocks": blocks, f"{EMBEDDING}_scales": scales}
    save_file(tensors | stored, folder / "mxfp4" / path.name, metadata={"format": "pt"})
    config = json.loads((donor / "config.json").read_text()) | {"quantization_config": {"quant_method": "mxfp4"}}
    (folder / "mxfp4" / "config.json").write_text(json.dumps(config))
    yield folder / "mxfp4", convert_moe_packed_tensors(blocks[None], scales[None])[0].T.float().numpy()
    run(make_convert_plan(str(donor), gguf="donor.gguf", quantize="q8_0"), folder / "file", workers=0)
    file = folder / "file" / "donor.gguf"
    (found,) = (each for each in gguf.GGUFReader(file).tensors if each.name == "token_embd.weight")
    assert found.tensor_type.name == "Q8_0"
    yield file, gguf.quants.dequantize(found.data, found.tensor_type)


def test_donors_of_mxfp4_and_of_q8_0_give_the_rows_of_their_values(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"layers": 1, "heads": 2, "kv_heads": 1, "intermediate": 32, "dtype": "float32"}
    for name, first, hidden in (("model", 0, 32), ("donor", 40, 64)):
        write_llama(tmp_path / name, seed=first, hidden=hidden, vocab=100, tied=True, **sizes)
        write_tokenizer(tmp_path / name, [f"word{i}" for i in range(first, first + 100)])
    path = tmp_path / "donor" / "tokenizer.json"
    path.write_text(path.read_text().replace('"use_regex": false', '"use_regex": true'))  # which llama.cpp has
    model = load(tmp_path / "model")[EMBEDDING]
    for donor, values in write_quantised_donors(tmp_path, tmp_path / "donor"):
        out = tmp_path / f"of_{donor.stem}"
        run(make_transplant_plan(str(tmp_path / "model"), str(donor), k=K), out, workers=0)
        found, x = load(out)[EMBEDDING], values.astype(np.float64)
        assert (found[:60] == model[40:]).all()
        for row in (60, 77, 99):
            np.testing.assert_allclose(found[row], oracles.omp(x[row], x[:60], model[40:], K), atol=2e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "onp"}, r"transplant: method is 'onp'; did you mean 'omp'\? It must be one of omp, "),
        ({"k": 0}, r"transplant: k is 0; it must be a whole number from 1 on"),
        ({"pad_to_multiple_of": 1 << 31}, r"pad_to_multiple_of is 2147483648; it may be 1048576 at most"),
        ({"kk": 3}, r"transplant: unknown option 'kk'; did you mean 'k'\?"),
        ({"noise": -1.0}, r"transplant: noise -1.0, scale 1.0: must be finite, noise not under 0"),
    ],
)
def test_what_is_asked_for_wrongly_is_one_error(pair: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_transplant_plan(str(pair / "model"), str(pair / "donor"), **options)


def test_too_little_memory_and_too_few_tokens_are_told_before(pair: Path, tmp_path: Path) -> None:
    told = plan(pair, k=5000)
    assert [each for each in told.warnings if "k is 5000" in each] != []
    with pytest.raises(InputError, match=r"is too little: tensor .* needs \d+ bytes"):
        describe_plan(plan(pair), memory="16MiB")
    write_llama(tmp_path / "other", seed=1, layers=1, hidden=16, vocab=8)
    write_tokenizer(tmp_path / "other", [f"foreign{i}" for i in range(8)])
    with pytest.raises(InputError, match=r"no token is in both, so omp has nothing to go by; --method mean"):
        make_transplant_plan(str(pair / "model"), str(tmp_path / "other"))
    path = tmp_path / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"foreign7": 7', '"own7": 2147483646'))
    with pytest.raises(InputError, match=r"other: has a token of the id 2147483646; a matrix has 16777216 rows at"):
        make_transplant_plan(str(pair / "model"), str(tmp_path / "other"), rows="tokens")
    path.unlink()
    with pytest.raises(InputError, match=r"other: has no tokenizer.json"):
        make_transplant_plan(str(pair / "model"), str(tmp_path / "other"))
