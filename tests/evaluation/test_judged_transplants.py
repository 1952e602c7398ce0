"""What transplanted tokenizers make of a text, against the models that are written."""

import json
from pathlib import Path

import pytest
from models import write_llama
from trained import SENTENCES, train, write_tokenizer_files

from mergemill.cli.main import execute
from mergemill.engine import evaluate, make_transplant_plan, run
from mergemill.engine.evaluation.evaluating import TextSource


def test_a_report_says_what_the_written_models_make_of_a_byte(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [*SENTENCES.values()]
    for seed, (name, part) in enumerate((("model", texts[:2]), ("donor", texts[1:4]))):
        tokenizer = train("bytes", part, 300 + 20 * seed)
        write_llama(tmp_path / name, seed=seed, layers=1, hidden=32, vocab=tokenizer.get_vocab_size(), dtype="float32")
        write_tokenizer_files(tmp_path / name, tokenizer)
    text, both = tmp_path / "text.txt", [str(tmp_path / name) for name in ("model", "donor")]
    text.write_text(texts[0])
    told = ["--report", str(text), "--method", "omp,zero", "--k", "4"]
    assert execute(["transplant", *both, str(tmp_path / "out"), *told, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [*found] == ["before", "omp", "zero"]
    assert not (tmp_path / "out").exists()
    run(make_transplant_plan(*both, method="omp", k=4), tmp_path / "out")
    for name, folder in (("before", tmp_path / "model"), ("omp", tmp_path / "out")):
        bits = evaluate(str(folder), TextSource(str(text))).bits_per_byte
        assert found[name] == pytest.approx(2**bits, rel=1e-6)
